"""One file's settled state to one object: read, compare, send, verify.

What is sent is exactly the state that the caller saw settle. The file's stamp is compared before and after the
read, and for large files once more before the last part goes out, so that a file rewritten during its upload
never becomes visible as a mixture of two states.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from blake3 import blake3

from heeler_sync.errors import (
    FileChangedError,
    LocalFileError,
    ObjectNotFoundError,
    ObjectReplacedError,
    PermitInDoubtError,
    PreconditionFailedError,
    TransientStoreError,
)
from heeler_sync.store.base import DIGEST_KEY, Condition, ObjectStore
from heeler_sync.threads import in_thread
from heeler_sync.tree import Stamp, open_inside

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class Stored:
    """A file's state that is known to be in storage.

    Attributes:
        stamp: The file when it was read.
        digest: BLAKE3 of its content, 64 hex digits.
        etag: The object's ETag; empty before it is stored.
    """

    stamp: Stamp
    digest: str
    etag: str = ""


class _HashingReader:
    """Reads one open file part by part, hashes what passes, and refuses to end if the file is not the same file."""

    def __init__(
        self, descriptor: int, path: str, expected: Stored, part_bytes: int, permitted: Callable[[], bool]
    ) -> None:
        # Its own: an upload that was given up may still read when the caller has closed the file.
        self._file = os.fdopen(os.dup(descriptor), "rb", buffering=0)
        self._path = path
        self._expected = expected
        self._part_bytes = part_bytes
        self._permitted = permitted
        self._left = self.size = expected.stamp.size
        self._whole = blake3()
        self._parts = b""
        self._count = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next part; obstore asks for parts of the size that it was told."""
        wanted = self._part_bytes if size < 0 else min(size, self._part_bytes)
        part = _read_exactly(self._file.fileno(), min(wanted, self._left), self._path)
        if part:
            self._left -= len(part)
            self._whole.update(part)
            self._parts += hashlib.md5(part, usedforsecurity=False).digest()
            self._count += 1
        if self._left == 0:
            self._check()
        return part

    def _check(self) -> None:
        same = Stamp.of(os.fstat(self._file.fileno())) == self._expected.stamp
        if not same or self._whole.hexdigest() != self._expected.digest:
            raise FileChangedError(self._path)
        if not self._permitted():
            raise PermitInDoubtError(self._path)

    def close(self) -> None:
        """Let go of the file; not to be called while an upload may still read."""
        self._file.close()

    def etag(self) -> str:
        """The ETag of a multipart upload of these parts."""
        return f'"{hashlib.md5(self._parts, usedforsecurity=False).hexdigest()}-{self._count}"'


def _read_exactly(descriptor: int, size: int, path: str) -> bytes:
    parts = []
    while size > 0:
        part = os.read(descriptor, size)
        if not part:
            raise FileChangedError(path)
        parts.append(part)
        size -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def digest_file(root: Path, relative: str, expected: Stamp | None = None) -> Stored:
    """Read a file once and return its stamp and digest. Blocks.

    Raises:
        FileNotFoundError: It is gone.
        FileChangedError: It is not in the `expected` state, or changed during the read.
        LocalFileError: It can't be read or leads out of `root`.
    """
    descriptor = open_inside(root, relative)
    try:
        return _digest(descriptor, str(root / relative), expected)
    finally:
        os.close(descriptor)


def _digest(descriptor: int, path: str, expected: Stamp | None) -> Stored:
    before = Stamp.of(os.fstat(descriptor))
    if expected is not None and before != expected:
        raise FileChangedError(path)
    hasher = blake3()
    left = before.size  # a file that grows faster than we read would keep us for ever
    while left > 0 and (part := os.read(descriptor, min(left, _READ_BYTES))):
        hasher.update(part)
        left -= len(part)
    os.lseek(descriptor, 0, os.SEEK_SET)
    if Stamp.of(os.fstat(descriptor)) != before:
        raise FileChangedError(path)
    return Stored(before, hasher.hexdigest())


async def upload_file(
    store: ObjectStore,
    key: str,
    root: Path,
    relative: str,
    settled: Stamp,
    known: Stored | None,
    permitted: Callable[[], bool],
) -> tuple[Stored, int]:
    """Make the settled state of a file durable under `key`.

    Args:
        store: Where to.
        key: The object's key.
        root: The synced folder.
        relative: The file below it.
        settled: The state that settled; another one is not sent.
        known: What storage holds under the key, if we know. The same content is not sent again; other content
            replaces only that object, where the store enforces conditions and one request carries it.
        permitted: Whether the right to change storage is certain; asked, from a worker thread too, right before
            the request that makes the state visible.

    Returns:
        What storage holds now, and how many bytes were sent for it.

    Raises:
        FileNotFoundError: The file is gone.
        FileChangedError: It is no longer in the state that settled.
        PermitInDoubtError: It is not certain that storage may be changed.
        ObjectReplacedError: Somebody else wrote the object since `known`.
        LocalFileError: It can't be read, or leads out of the folder.
        StoreError: The store did not take it.
    """
    path = str(root / relative)
    descriptor = await in_thread(open_inside, root, relative)
    try:
        local = await in_thread(_digest, descriptor, path, settled)
        if known is not None and known.digest == local.digest and known.stamp.size == local.stamp.size:
            return replace(local, etag=known.etag), 0
        if not permitted():
            raise PermitInDoubtError(path)
        if local.stamp.size <= store.provider.part_bytes:
            etag = await _put_whole(store, key, descriptor, path, local, known)
        else:
            reader = _HashingReader(descriptor, path, local, store.provider.part_bytes, permitted)
            etag = await _put_parts(store, key, reader, local)
        return replace(local, etag=etag), local.stamp.size
    except FileNotFoundError:
        raise
    except OSError as error:
        raise LocalFileError(path, f"cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)


async def _put_whole(
    store: ObjectStore, key: str, descriptor: int, path: str, local: Stored, known: Stored | None
) -> str:
    def read() -> bytes:
        data = _read_exactly(descriptor, local.stamp.size, path)
        same = Stamp.of(os.fstat(descriptor)) == local.stamp
        if not same or blake3(data).hexdigest() != local.digest:
            raise FileChangedError(path)
        return data

    data = await in_thread(read)
    expected = f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'
    condition = None
    if known is not None and known.etag and store.provider.conditional_writes:
        condition = Condition(if_match=known.etag)
    try:
        etag = await store.put(key, data, metadata={DIGEST_KEY: local.digest}, condition=condition)
    except (PreconditionFailedError, ObjectNotFoundError):
        return await _resolve_replaced(store, key, local, expected)
    await _verify(store, key, local, etag, expected)
    return etag


async def _resolve_replaced(store: ObjectStore, key: str, local: Stored, expected: str) -> str:
    """A condition failed: our own earlier try whose answer was lost, or somebody else. The object tells."""
    try:
        info = await store.head(key)
    except ObjectNotFoundError:
        raise ObjectReplacedError(store.bucket, key) from None
    # The digest came from us along with bytes that may have been damaged on the way: the ETag is the store's own.
    damaged = store.provider.etag_is_md5 and info.etag != expected
    if info.metadata.get(DIGEST_KEY) != local.digest or info.size != local.stamp.size or damaged:
        raise ObjectReplacedError(store.bucket, key)
    return info.etag


async def _put_parts(store: ObjectStore, key: str, reader: _HashingReader, local: Stored) -> str:
    try:
        etag = await store.upload(key, reader, metadata={DIGEST_KEY: local.digest})
    except Exception:
        reader.close()
        raise
    # Not in `finally`: after a cancellation a thread may still read; the file is closed with its last reference.
    reader.close()
    await _verify(store, key, local, etag, reader.etag())
    return etag


async def _verify(store: ObjectStore, key: str, local: Stored, etag: str, expected: str) -> None:
    """Compare what the store says that it holds with what we sent: by ETag where it is a checksum."""
    if etag == expected:
        return
    if store.provider.etag_is_md5 and etag:
        detail = f"stored as {etag}, sent as {expected}; if the bucket encrypts with KMS, set --s3-provider aws"
        raise TransientStoreError("PutObject", store.bucket, key, detail)
    info = await store.head(key)
    if info.size != local.stamp.size:
        raise TransientStoreError("PutObject", store.bucket, key, f"stored {info.size} of {local.stamp.size} bytes")
