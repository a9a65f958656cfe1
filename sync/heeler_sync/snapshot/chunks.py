"""Chunks: the pieces of files that generations share, named by the BLAKE3 of their bytes. Pure functions.

All chunks of a file but the last have the same size, so an append or an overwrite changes only the chunks that it
touches. A chunk is stored compressed where a sample of it says that this pays.
"""

from __future__ import annotations

import enum

import zstandard
from blake3 import blake3

CHUNK_BYTES = 1 << 20
"""Bytes of every chunk of a file but its last."""

DIGEST_BYTES = 32

Buffer = bytes | bytearray | memoryview

_LEVEL = 1
_SAMPLE_BYTES = 16 << 10
_SAMPLES = 4
_PAYS = 0.9
"""Compressed size over plain size from which on it is not worth the reader's time."""


class Codec(enum.IntEnum):
    """How a chunk is stored."""

    RAW = 0
    ZSTD = 1


class DamagedChunkError(ValueError):
    """Stored bytes are not the chunk that they should be."""


def digest_of(data: Buffer) -> bytes:
    """The name of a chunk with these bytes (32 bytes)."""
    return blake3(data).digest()


def chunk_count(size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks a file of `size` bytes has."""
    return -(-size // chunk_bytes)


def pack_chunk(data: Buffer) -> tuple[Codec, Buffer]:
    """The bytes to store for a chunk: compressed if that pays, else `data` itself."""
    if not _may_pay(data):
        return Codec.RAW, data
    packed = zstandard.ZstdCompressor(level=_LEVEL).compress(data)
    return (Codec.ZSTD, packed) if len(packed) <= len(data) * _PAYS else (Codec.RAW, data)


def _may_pay(data: Buffer) -> bool:
    """Look at a few samples: most of what is worth storing (weights, trajectories) does not compress."""
    size = len(data)
    if size <= _SAMPLES * _SAMPLE_BYTES:
        return size >= 128
    view = memoryview(data)
    step = (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
    sample = b"".join(view[at : at + _SAMPLE_BYTES] for at in range(0, size, step))
    return len(zstandard.ZstdCompressor(level=_LEVEL).compress(sample)) <= len(sample) * _PAYS


def unpack_chunk(stored: Buffer, codec: Codec, digest: bytes, size: int) -> Buffer:
    """The chunk in its stored bytes, verified.

    Raises:
        DamagedChunkError: They are not the bytes of `digest`.
    """
    data: Buffer = stored
    if codec is Codec.ZSTD:
        try:
            if zstandard.get_frame_parameters(stored).content_size != size:
                raise DamagedChunkError("does not unpack to the size that it is listed with")
            data = zstandard.ZstdDecompressor().decompress(stored)
        except zstandard.ZstdError as error:
            raise DamagedChunkError(f"can't be decompressed ({error})") from None
    if len(data) != size or digest_of(data) != digest:
        raise DamagedChunkError("does not have the digest that it is listed under")
    return data
