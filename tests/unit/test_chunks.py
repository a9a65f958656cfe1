"""Chunks: stored and had back byte for byte; anything else is told as damage and nothing but damage."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import given, settings

from heeler_sync.snapshot.chunks import (
    CHUNK_BYTES,
    Codec,
    DamagedChunkError,
    chunk_count,
    digest_of,
    pack_chunk,
    unpack_chunk,
)


def mixed(seed: int, size: int) -> bytes:
    """Bytes of which some compress and some do not."""
    rng = random.Random(seed)
    pieces = [
        rng.randbytes(97) if rng.random() < 0.5 else bytes([rng.randrange(256)]) * 211 for _ in range(size // 97 + 1)
    ]
    return b"".join(pieces)[:size]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.one_of(st.integers(1, 300), st.integers(1, 200_000)))
def test_any_chunk_comes_back_as_it_was(seed: int, size: int) -> None:
    data = mixed(seed, size)
    codec, stored = pack_chunk(data)
    assert bytes(unpack_chunk(stored, codec, digest_of(data), size)) == data
    assert len(stored) <= size


def test_what_compresses_is_compressed_and_what_does_not_is_stored_as_it_is() -> None:
    text, noise = b"step 17 loss 0.25\n" * 60_000, os.urandom(CHUNK_BYTES)
    assert pack_chunk(text)[0] is Codec.ZSTD
    assert len(pack_chunk(text)[1]) < len(text) / 20
    assert pack_chunk(noise) == (Codec.RAW, noise)


def test_a_chunk_may_be_any_kind_of_buffer() -> None:
    data = bytearray(b"x" * 1000)
    codec, stored = pack_chunk(memoryview(data))
    assert bytes(unpack_chunk(memoryview(bytes(stored)), codec, digest_of(data), 1000)) == bytes(data)


@pytest.mark.parametrize(("size", "count"), [(0, 0), (1, 1), (64, 1), (65, 2), (128, 2), (129, 3)])
def test_a_file_has_as_many_chunks_as_its_size_says(size: int, count: int) -> None:
    assert chunk_count(size, 64) == count


@settings(max_examples=300, deadline=None)
@given(st.booleans(), st.integers(0, 2**31), st.integers(0, 7), st.one_of(st.none(), st.integers(0, 2**31)))
def test_one_flipped_bit_or_a_cut_is_damage_and_never_another_error(
    text: bool, at: int, bit: int, cut: int | None
) -> None:
    data = b"step 17 loss 0.25\n" * 200 if text else mixed(3, 3_600)
    codec, stored = pack_chunk(data)
    hurt = bytearray(stored)
    if cut is None:
        hurt[at % len(hurt)] ^= 1 << bit
    else:
        del hurt[cut % len(hurt) :]
    try:
        found = unpack_chunk(bytes(hurt), codec, digest_of(data), len(data))
    except DamagedChunkError:
        return
    assert bytes(found) == data, "a bit that zstandard does not read"


@pytest.mark.parametrize("codec", list(Codec))
def test_bytes_of_another_size_or_content_are_damage(codec: Codec) -> None:
    data = b"x" * 1000
    stored = data if codec is Codec.RAW else zstandard.ZstdCompressor().compress(data)
    for digest, size in ((digest_of(b"y" * 1000), 1000), (digest_of(data), 999), (digest_of(data), 1001)):
        with pytest.raises(DamagedChunkError):
            unpack_chunk(stored, codec, digest, size)


def claiming(size: int) -> bytes:
    """A small zstandard frame whose header claims `size` bytes."""
    return struct.pack("<IBQ", 0xFD2FB528, 0xE0, size) + bytes([0x01, 0x00, 0x00])


@pytest.mark.parametrize("size", [1 << 40, 1 << 50, 1 << 62])
def test_a_chunk_that_claims_to_be_huge_is_damage_and_costs_no_memory(size: int) -> None:
    """The size in the frame's header is as good as any other damaged byte."""
    with pytest.raises(DamagedChunkError):
        unpack_chunk(claiming(size), Codec.ZSTD, digest_of(b"x"), 1)


def test_a_chunk_that_unpacks_to_more_than_its_size_is_refused_before_it_is_unpacked() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DamagedChunkError):
            unpack_chunk(bomb, Codec.ZSTD, digest_of(b"x"), 1000)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
