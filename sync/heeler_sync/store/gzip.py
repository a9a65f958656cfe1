"""A wrapper round any store that keeps objects gzipped under `<key>.gz`, as Kelpie's `compression: true` does.

Callers see keys, sizes and digests of the content. An object without `.gz` is what it is, under its own key, unless
there is one with it: that one is meant then.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

from heeler_sync.errors import (
    DamagedObjectError,
    ObjectNotFoundError,
    RangeNotSupportedError,
    ShortAnswerError,
    TransientStoreError,
)
from heeler_sync.store.base import (
    DIGEST_KEY,
    Condition,
    ObjectInfo,
    ObjectStore,
    Reader,
    Sink,
    SizedReader,
)
from heeler_sync.store.gzip_stream import Gunzip, GzipReader, gzipped
from heeler_sync.store.providers import Provider
from heeler_sync.threads import in_thread

SIZE_KEY = "heeler-size"
"""The user metadata under which the size of the content travels, in bytes."""
SENT_KEY = "heeler-gzip-md5"
"""The same for the MD5 of the compressed bytes, where they went in one request."""

_SUFFIX = ".gz"
_MD5_ETAG = re.compile(r'"([0-9a-f]{32})"')


class GzipStore:
    """The same bucket, its objects compressed."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._store.bucket

    @property
    def provider(self) -> Provider:
        """The server's quirks, but that ETags say nothing of the content and nothing is read from its middle."""
        return replace(self._store.provider, etag_is_md5=False, ranges=False)

    async def head(self, key: str) -> ObjectInfo:
        """As `ObjectStore.head`; its size is not `exact` where others than heeler wrote it."""
        try:
            info = await self._store.head(key + _SUFFIX)
        except ObjectNotFoundError:
            if not _may_be_plain(key):
                raise
            return replace(await self._store.head(key), etag="")
        return self._content(key, info)

    def _content(self, key: str, info: ObjectInfo) -> ObjectInfo:
        size, sent = info.metadata.get(SIZE_KEY, ""), info.metadata.get(SENT_KEY)
        etag = _MD5_ETAG.fullmatch(info.etag)
        damaged = self._store.provider.etag_is_md5 and sent and etag and etag[1] != sent
        if damaged or not re.fullmatch("[0-9]{1,19}", size):
            unproven = {name: value for name, value in info.metadata.items() if name != DIGEST_KEY}
            return replace(info, key=key, exact=False, metadata=unproven)
        return replace(info, key=key, size=int(size))

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        """As `ObjectStore.list`, in one page, since `a` and `a.gz` may be far apart; no compressed size is `exact`."""
        found: dict[str, ObjectInfo] = {}
        async for page in self._store.list(prefix):
            for info in page:
                # An empty one is no gzip: a folder's marker.
                if _may_be_plain(info.key) or not info.size:
                    found.setdefault(info.key, replace(info, etag=""))
                else:
                    key = info.key.removesuffix(_SUFFIX)
                    found[key] = replace(info, key=key, exact=False)
        if found:
            yield [*found.values()]

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        """As `ObjectStore.download`, from the start only.

        Raises:
            DamagedObjectError: It is no gzip, or not a whole one.
        """
        if offset:
            raise RangeNotSupportedError("GetObject", self.bucket, key, "what is compressed is read from its start")
        gunzip = Gunzip(sink, self.bucket, key + _SUFFIX)
        try:
            info = await self._store.download(key + _SUFFIX, gunzip.take, if_match=if_match)
        except ObjectNotFoundError:
            if not _may_be_plain(key):
                raise
            return await self._download_plain(key, sink)
        gunzip.finish()
        return replace(info, key=key, size=gunzip.size)

    async def _download_plain(self, key: str, sink: Sink) -> ObjectInfo:
        """Nobody else compares it with its ETag."""
        md5 = hashlib.md5(usedforsecurity=False)

        def hashing(data: bytes) -> None:
            md5.update(data)
            sink(data)

        info = await self._store.download(key, hashing)
        etag = _MD5_ETAG.fullmatch(info.etag)
        unproven = DIGEST_KEY not in info.metadata and self._store.provider.etag_is_md5
        if unproven and etag is not None and etag[1] != md5.hexdigest():
            raise DamagedObjectError(self.bucket, key, "its bytes are not those of its ETag")
        return replace(info, etag="")

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        """As `ObjectStore.read`; all that is before is read, too."""
        wanted = bytearray()
        at = 0

        def sink(data: bytes) -> None:
            nonlocal at
            wanted.extend(data[max(offset - at, 0) : max(offset + length - at, 0)])
            at += len(data)

        await self.download(key, sink)
        if len(wanted) != length:
            raise ShortAnswerError("GetObject", self.bucket, key, f"it has only {at} bytes")
        return bytes(wanted)

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        """As `ObjectStore.put`; what the store answers is compared with what was sent."""
        packed = await in_thread(gzipped, data)
        md5 = hashlib.md5(packed, usedforsecurity=False).hexdigest()
        told = {**(metadata or {}), SIZE_KEY: str(len(data)), SENT_KEY: md5}
        etag = await self._store.put(key + _SUFFIX, packed, metadata=told, condition=condition)
        await self._verify(key + _SUFFIX, etag, f'"{md5}"', len(packed))
        return etag

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        """As `ObjectStore.upload`; a `SizedReader` lets the object tell its content's size."""
        told = dict(metadata or {})
        if isinstance(reader, SizedReader):
            told[SIZE_KEY] = str(reader.size)
        packing = GzipReader(reader)
        etag = await self._store.upload(key + _SUFFIX, packing, metadata=told)
        await self._verify(key + _SUFFIX, etag, packing.etag(), packing.size)
        return etag

    async def _verify(self, key: str, etag: str, expected: str, size: int) -> None:
        if etag == expected:
            return
        if self._store.provider.etag_is_md5 and etag:
            detail = f"stored as {etag}, sent as {expected}; if the bucket encrypts with KMS, set --s3-provider aws"
            raise TransientStoreError("PutObject", self.bucket, key, detail)
        info = await self._store.head(key)
        if info.size != size:
            raise TransientStoreError("PutObject", self.bucket, key, f"stored {info.size} of {size} bytes")

    async def delete(self, key: str) -> None:
        """As `ObjectStore.delete`; the plain object goes first, or it would come to light."""
        if _may_be_plain(key):
            await self._store.delete(key)
        await self._store.delete(key + _SUFFIX)


def _may_be_plain(key: str) -> bool:
    """Whether an object of this key stands for itself: it doesn't end in .gz, or is named nothing else."""
    name = key.rpartition("/")[2]
    return not name.endswith(_SUFFIX) or name.removesuffix(_SUFFIX) in ("", ".", "..")
