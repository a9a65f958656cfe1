"""gzip as a stream, in bounded memory: a reader that compresses what another gives, and a sink that undoes it."""

from __future__ import annotations

import hashlib
import zlib

from heeler_sync.errors import DamagedObjectError
from heeler_sync.store.base import Reader, Sink

_LEVEL = 6
_GZIP = 16 + zlib.MAX_WBITS
_BLOCK = 1 << 20


def gzipped(data: bytes) -> bytes:
    """The same bytes always become the same gzip: it carries no time. Blocks."""
    packing = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
    return packing.compress(data) + packing.flush()


class GzipReader:
    """Reads another reader and gives it compressed, in blocks of just the size that is asked for but the last.

    The last block is given after the other reader said that it ended: what it raises comes through before.

    Attributes:
        size: Bytes given so far.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._packing = zlib.compressobj(_LEVEL, zlib.DEFLATED, _GZIP)
        self._ready = bytearray()
        self._ended = False
        self._parts = b""
        self._count = 0
        self.size = 0

    def read(self, size: int = -1, /) -> bytes:
        """The next `size` bytes; fewer at the end, none after it."""
        while not self._ended and (size < 0 or len(self._ready) < size):
            data = self._reader.read(_BLOCK)
            self._ready += self._packing.compress(data) if data else self._packing.flush()
            self._ended = not data
        end = len(self._ready) if size < 0 else size
        block = bytes(memoryview(self._ready)[:end])
        del self._ready[:end]
        if block:
            self._parts += hashlib.md5(block, usedforsecurity=False).digest()
            self._count += 1
            self.size += len(block)
        return block

    def etag(self) -> str:
        """The ETag of a multipart upload whose parts were the blocks."""
        return f'"{hashlib.md5(self._parts, usedforsecurity=False).hexdigest()}-{self._count}"'


class Gunzip:
    """Takes a gzip in pieces, and gives `sink` its content in pieces of a bounded size, whatever they swell to.

    Attributes:
        size: Bytes given so far.
    """

    def __init__(self, sink: Sink, bucket: str, key: str) -> None:
        """Args: `bucket` and `key` are for people."""
        self._sink = sink
        self._bucket = bucket
        self._key = key
        self._unpacking = zlib.decompressobj(_GZIP)
        self._members = 0
        self._between = True
        self.size = 0

    def take(self, data: bytes) -> None:
        """The next piece of the gzip.

        Raises:
            DamagedObjectError: It is none.
        """
        while data:
            if self._between:
                # Zeros may fill up a gzip's end; after a member comes another, or the end.
                data = data.lstrip(b"\0") if self._members else data
                if not data:
                    return
                self._unpacking = zlib.decompressobj(_GZIP)
                self._between = False
            try:
                content = self._unpacking.decompress(data, _BLOCK)
            except zlib.error as error:
                raise DamagedObjectError(self._bucket, self._key, f"it is no gzip ({error})") from None
            data = self._unpacking.unconsumed_tail
            if self._unpacking.eof:
                data = self._unpacking.unused_data
                self._members += 1
                self._between = True
            if content:
                self.size += len(content)
                self._sink(content)

    def finish(self) -> None:
        """All was given.

        Raises:
            DamagedObjectError: It ends too early.
        """
        if not self._between or not self._members:
            raise DamagedObjectError(self._bucket, self._key, "it is a gzip that ends too early")
