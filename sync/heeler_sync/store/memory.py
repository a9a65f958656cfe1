"""An object store in memory: small, real, and as strict as the contract suite asks.

For tests and for callers that want to try a plan without a server. It keeps ETags and conditions as S3 does.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import anyio.lowlevel

from heeler_sync.errors import ObjectNotFoundError, PreconditionFailedError, ShortAnswerError, UnsafeKeyError
from heeler_sync.store.base import Condition, ObjectInfo, Reader, Sink
from heeler_sync.store.providers import PROVIDERS, Provider

_PAGE = 1000
_CHUNK = 64 * 1024


@dataclass(frozen=True)
class _Object:
    data: bytes
    etag: str
    metadata: Mapping[str, str]


class MemoryStore:
    """One bucket, in a dictionary."""

    def __init__(self, bucket: str = "memory", provider: Provider = PROVIDERS["s3"]) -> None:
        self._bucket = bucket
        self._provider = provider
        self._objects: dict[str, _Object] = {}

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._bucket

    @property
    def provider(self) -> Provider:
        """The quirks it claims; conditions are enforced whatever they say."""
        return self._provider

    def objects(self) -> dict[str, bytes]:
        """All that is stored, by key; for assertions."""
        return {key: entry.data for key, entry in self._objects.items()}

    def _get(self, operation: str, key: str) -> _Object:
        try:
            return self._objects[key]
        except KeyError:
            raise ObjectNotFoundError(operation, self._bucket, key, "no such key") from None

    async def head(self, key: str) -> ObjectInfo:
        """As `ObjectStore.head`."""
        await anyio.lowlevel.checkpoint()
        entry = self._get("HeadObject", key)
        return ObjectInfo(key, len(entry.data), entry.etag, entry.metadata)

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        """As `ObjectStore.list`, in pages of 1,000 in key order."""
        await anyio.lowlevel.checkpoint()
        found = [
            ObjectInfo(key, len(entry.data), entry.etag)
            for key, entry in sorted(self._objects.items())
            if key.startswith(prefix) and key != prefix
        ]
        for info in found:
            if any(part in ("", ".", "..") for part in info.key.split("/")):
                raise UnsafeKeyError(info.key, "it has an empty, '.' or '..' part")
        for start in range(0, len(found), _PAGE):
            yield found[start : start + _PAGE]

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        """As `ObjectStore.download`."""
        await anyio.lowlevel.checkpoint()
        entry = self._get("GetObject", key)
        if if_match is not None and if_match != entry.etag:
            raise PreconditionFailedError("GetObject", self._bucket, key, "If-Match does not hold")
        for start in range(offset, len(entry.data), _CHUNK):
            sink(entry.data[start : start + _CHUNK])
        return ObjectInfo(key, len(entry.data), entry.etag, entry.metadata)

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        """As `ObjectStore.read`."""
        await anyio.lowlevel.checkpoint()
        data = self._get("GetObject", key).data
        if offset + length > len(data):
            raise ShortAnswerError("GetObject", self._bucket, key, f"it has only {len(data)} bytes")
        return data[offset : offset + length]

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        """As `ObjectStore.put`."""
        await anyio.lowlevel.checkpoint()
        current = self._objects.get(key)
        if condition is not None:
            absent_wanted = condition.if_absent and current is not None
            match_wanted = condition.if_match is not None and (current is None or current.etag != condition.if_match)
            if absent_wanted or match_wanted:
                raise PreconditionFailedError("PutObject", self._bucket, key, "the condition does not hold")
        digest = hashlib.md5(data, usedforsecurity=False).hexdigest()
        self._objects[key] = _Object(bytes(data), f'"{digest}"', dict(metadata or {}))
        return self._objects[key].etag

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        """As `ObjectStore.upload`."""
        await anyio.lowlevel.checkpoint()
        parts = []
        while part := reader.read(self._provider.part_bytes):
            parts.append(part)
        digests = b"".join(hashlib.md5(part, usedforsecurity=False).digest() for part in parts)
        etag = f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(parts)}"'
        self._objects[key] = _Object(b"".join(parts), etag, dict(metadata or {}))
        return etag

    async def delete(self, key: str) -> None:
        """As `ObjectStore.delete`."""
        await anyio.lowlevel.checkpoint()
        self._objects.pop(key, None)
