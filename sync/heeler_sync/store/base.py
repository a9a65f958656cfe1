"""The protocol that every object store implements, and what it speaks of.

One store is one bucket. Implementations never retry where a retry could hide an answer; policy wraps them
(`heeler_sync.store.retry`). One contract suite (`tests/contract/test_object_store.py`) runs against them all.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from heeler_sync.store.providers import Provider

DIGEST_KEY = "heeler-blake3"
"""The user metadata under which a file's BLAKE3 digest (64 hex digits) travels with its object."""


@dataclass(frozen=True)
class ObjectInfo:
    """What a store tells of an object.

    Attributes:
        key: Its full key.
        size: Bytes.
        etag: Its entity tag, quoted as HTTP has it; empty where it is no use for a condition.
        metadata: User metadata; empty in listings, which do not carry it.
        exact: Whether a download brings `size` bytes; else it is what the object takes compressed.
    """

    key: str
    size: int
    etag: str
    metadata: Mapping[str, str] = field(default_factory=dict)
    exact: bool = True


@dataclass(frozen=True)
class Condition:
    """A precondition of a write: give `if_match` (an ETag) or `if_absent`, not both."""

    if_match: str | None = None
    if_absent: bool = False


class Reader(Protocol):
    """What an upload reads from, called in a worker thread. An exception that it raises aborts the upload."""

    def read(self, size: int = -1, /) -> bytes:
        """At most `size` bytes; empty at the end."""
        ...


@runtime_checkable
class SizedReader(Reader, Protocol):
    """A reader that knows how many bytes it will give in all."""

    @property
    def size(self) -> int:
        """So many."""
        ...


Sink = Callable[[bytes], None]
"""Takes the bytes of a download in order, in a worker thread. An exception that it raises ends the download."""


class ObjectStore(Protocol):
    """One bucket. Every method raises `StoreError` and its kinds, and nothing else of the network's."""

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        ...

    @property
    def provider(self) -> Provider:
        """The quirks of the server."""
        ...

    async def head(self, key: str) -> ObjectInfo:
        """What is known of an object, its metadata included.

        Raises:
            ObjectNotFoundError: There is none.
        """
        ...

    def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        """Pages of the objects whose keys start with `prefix`, which is empty or ends in "/".

        Raises:
            UnsafeKeyError: A key below the prefix can't be named as a path ("..", "//").
        """
        ...

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        """Stream an object's bytes from `offset` on into `sink`; what it took before an error stays taken.

        Returns:
            What the store told of the object in the same answer (with its whole size and metadata).

        Raises:
            ObjectNotFoundError: There is no such object.
            PreconditionFailedError: It is not the one with the ETag `if_match`.
            RangeNotSupportedError: `offset` is not 0 and the store does not do ranges.
            DamagedObjectError: It was to be decompressed and can't be.
        """
        ...

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        """`length` bytes of an object from `offset` on, at most about one pack's.

        Raises:
            ObjectNotFoundError: There is no such object.
            ShortAnswerError: Fewer came.
        """
        ...

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        """Write a small object in one request and return its ETag.

        Raises:
            PreconditionFailedError: The condition does not hold.
        """
        ...

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        """Write a large object in parts of `provider.part_bytes` and return its ETag.

        Nothing is visible under the key before the reader came to its end; where the reader raises, the
        multipart upload is aborted and its exception raised.
        """
        ...

    async def delete(self, key: str) -> None:
        """Delete an object; one that does not exist is deleted already."""
        ...
