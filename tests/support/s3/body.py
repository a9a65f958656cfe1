"""Bodies: a rope of pieces as they came from the socket, their digests, and the aws-chunked coding.

A body is never joined into one piece of memory, so a 2 GiB object costs 2 GiB.
"""

from __future__ import annotations

import base64
import hashlib
import zlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Protocol

PIECE = 256 << 10
"""The most bytes that `slices` hands out at once."""


class Body:
    """Bytes kept as the pieces in which they came."""

    __slots__ = ("_pieces", "_starts", "size")

    def __init__(self, pieces: Iterable[bytes | memoryview] = ()) -> None:
        """Start with some pieces."""
        self._pieces: list[bytes | memoryview] = []
        self._starts: list[int] = []
        self.size = 0
        for piece in pieces:
            self.append(piece)

    def append(self, piece: bytes | memoryview) -> None:
        """Add a piece at the end."""
        if piece:
            self._pieces.append(piece)
            self._starts.append(self.size)
            self.size += len(piece)

    def extend(self, other: Body) -> None:
        """Add another body's pieces, without copying them."""
        for piece in other._pieces:
            self.append(piece)

    def slices(self, start: int = 0, stop: int | None = None) -> Iterator[memoryview]:
        """The bytes from `start` up to `stop`, in views of at most `PIECE` bytes."""
        stop = self.size if stop is None else min(stop, self.size)
        index = max(0, bisect_right(self._starts, start) - 1)
        while start < stop:
            offset = start - self._starts[index]
            piece = self._pieces[index]
            take = min(len(piece) - offset, stop - start, PIECE)
            yield memoryview(piece)[offset : offset + take]
            start += take
            if offset + take == len(piece):
                index += 1

    def part(self, start: int, stop: int) -> Body:
        """A range as a body of its own, its memory shared."""
        return Body(self.slices(start, stop))

    def __bytes__(self) -> bytes:
        return bytes(self._pieces[0]) if len(self._pieces) == 1 else b"".join(self._pieces)


class _Hash(Protocol):
    def update(self, data: bytes | memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class _Crc32:
    """CRC-32 in the shape of a hash."""

    def __init__(self) -> None:
        self._value = 0

    def update(self, data: bytes | memoryview, /) -> None:
        self._value = zlib.crc32(data, self._value)

    def digest(self) -> bytes:
        return self._value.to_bytes(4, "big")


def _new_hash(name: str) -> _Hash:
    return _Crc32() if name == "crc32" else hashlib.new(name)


DIGESTS = ("md5", "sha256", "sha1", "crc32")
"""What can be computed. Other algorithms (crc32c, crc64nvme) are kept as sent."""


def md5_of(body: Body) -> str:
    """The MD5 of a body, in hexadecimal."""
    digests = Digests(("md5",))
    for view in body.slices():
        digests.update(view)
    return digests.hex("md5")


class Digests:
    """Several digests of one stream of bytes."""

    __slots__ = ("_hashes",)

    def __init__(self, names: Iterable[str]) -> None:
        """Compute these of `DIGESTS`."""
        self._hashes = {name: _new_hash(name) for name in names}

    def update(self, data: bytes | memoryview) -> None:
        """Take in more bytes."""
        for entry in self._hashes.values():
            entry.update(data)

    def raw(self, name: str) -> bytes:
        """One digest so far, as bytes."""
        return self._hashes[name].digest()

    def hex(self, name: str) -> str:
        """One digest so far, in hexadecimal."""
        return self.raw(name).hex()

    def base64(self, name: str) -> str:
        """One digest so far, as checksum headers write it."""
        return base64.b64encode(self.raw(name)).decode()


class AwsChunkedDecoder:
    """Takes the aws-chunked coding off a body as it comes.

    The form is `size-in-hex[;chunk-signature=...] CRLF data CRLF ... 0 CRLF [trailers CRLF] CRLF`.
    """

    def __init__(self) -> None:
        """Start before the first chunk."""
        self.trailers: dict[str, str] = {}
        self.done = False
        self._line = b""
        self._left = 0
        self._expect = "size"

    def feed(self, data: bytes) -> list[bytes]:
        """The payload in these bytes.

        Raises:
            ValueError: the coding is broken.
        """
        payload: list[bytes] = []
        position = 0
        while position < len(data):
            if self._left:
                take = min(self._left, len(data) - position)
                payload.append(data[position : position + take])
                position += take
                self._left -= take
                continue
            end = data.find(b"\n", position)
            if end < 0:
                self._line += data[position:]
                if len(self._line) > 8192:
                    raise ValueError("an aws-chunked line is longer than 8192 bytes")
                break
            line = (self._line + data[position:end]).removesuffix(b"\r")
            self._line = b""
            position = end + 1
            self._take_line(line)
        return payload

    def _take_line(self, line: bytes) -> None:
        if self.done:
            raise ValueError("bytes after the end of an aws-chunked body")
        if self._expect == "size":
            self._left = int(line.split(b";", 1)[0], 16)
            self._expect = "end of chunk" if self._left else "trailer"
        elif self._expect == "end of chunk":
            if line:
                raise ValueError("an aws-chunked chunk is longer than its size says")
            self._expect = "size"
        elif line:
            name, colon, value = line.decode("latin-1").partition(":")
            if not colon:
                raise ValueError("an aws-chunked trailer has no colon")
            self.trailers[name.strip().lower()] = value.strip()
        else:
            self.done = True
