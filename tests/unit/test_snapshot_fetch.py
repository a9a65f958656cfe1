"""Chunks out of packs: few requests, each chunk verified, given once, and damage told apart from a bad moment."""

from __future__ import annotations

import random
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from heeler_sync.errors import (
    AccessDeniedError,
    RangeNotSupportedError,
    ShortAnswerError,
    TransientStoreError,
)
from heeler_sync.paths import location
from heeler_sync.snapshot import fetch
from heeler_sync.snapshot.chunks import Codec, digest_of
from heeler_sync.snapshot.fetch import DamagedPackError, fetch_chunks, spans
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Place
from heeler_sync.snapshot.packs import PACK_BYTES, Pack
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import IMPATIENT, ScriptedStore, transient
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

KIB = 1 << 10


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Packs:
    """A prefix with packs, and what a fetch brought out of them."""

    def __init__(self, store: ScriptedStore | None = None) -> None:
        self.store = store or ScriptedStore(MemoryStore("bucket"))
        self.layout = Layout(self.store, location("bucket", "p/"), IMPATIENT)
        self.places: dict[bytes, Place] = {}
        self.chunks: dict[bytes, bytes] = {}
        self.got: list[bytes] = []
        self.bytes: list[int] = []

    async def add(self, *chunks: bytes) -> str:
        pack = Pack(new_id(1))
        for data in chunks:
            pack.add(digest_of(data), data)
            self.chunks[digest_of(data)] = data
        self.places.update(pack.places)
        await self.store.inner.put(self.layout.pack_key(pack.id), pack.take())
        return pack.id

    async def damage(self, pack: str, data: bytes) -> None:
        await self.store.inner.put(self.layout.pack_key(pack), data)

    async def object(self, pack: str) -> bytes:
        return self.store.objects()[self.layout.pack_key(pack)]

    async def fetch(self, wanted: Sequence[bytes] | None = None) -> None:
        chosen = {digest_of(data): self.places[digest_of(data)] for data in wanted or self.chunks.values()}

        def write(digest: bytes, data: bytes | bytearray | memoryview) -> None:
            assert bytes(data) == self.chunks[digest], "nothing unverified is ever handed on"
            self.got.append(digest)

        await fetch_chunks(self.layout, chosen, write, self.bytes.append, IMPATIENT)


@pytest.fixture
def packs() -> Packs:
    return Packs()


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


# Which requests are made.


def place(pack: str, offset: int, stored: int) -> Place:
    return Place(pack, offset, stored, stored, Codec.RAW)


def test_neighbours_are_read_by_one_request_and_far_ones_are_not() -> None:
    near, far = place("a", 10, 5), place("a", 15 + fetch._GAP + 1, 5)
    found = spans([(b"3", far), (b"2", near), (b"1", place("a", 0, 5)), (b"4", place("b", 0, 5))])
    assert [(span.pack, span.offset, span.length) for span in found] == [
        ("a", 0, 15),
        ("a", 15 + fetch._GAP + 1, 5),
        ("b", 0, 5),
    ]


@settings(max_examples=150)
@given(st.integers(0, 2**32))
def test_spans_cover_each_wanted_chunk_once_and_none_is_larger_than_a_pack(seed: int) -> None:
    rng = random.Random(seed)
    wanted = []
    for pack in ("a", "b"):
        at = 0
        for number in range(rng.randrange(12)):
            at += rng.choice([0, 0, 1, 100_000, 200_000, 5 << 20])
            stored = rng.randint(1, 3 << 20)
            wanted.append((f"{pack}{number}".encode(), place(pack, at, stored)))
            at += stored
    rng.shuffle(wanted)
    found = spans(wanted)
    covered = [chunk for span in found for chunk in span.chunks]
    assert sorted(covered) == sorted(wanted), seed
    for span in found:
        assert span.length <= PACK_BYTES, seed
        assert all(item.pack == span.pack for _, item in span.chunks), seed
        assert all(span.offset <= item.offset for _, item in span.chunks), seed
        assert all(item.offset + item.stored <= span.offset + span.length for _, item in span.chunks), seed


async def test_all_chunks_come_verified_once_each_and_the_bytes_are_counted(packs: Packs) -> None:
    await packs.add(noise(1, 1000), b"x" * 5000, noise(2, 10))
    await packs.add(noise(3, 500))
    await packs.fetch()
    assert sorted(packs.got) == sorted(packs.chunks)
    assert sum(packs.bytes) == sum(place.stored for place in packs.places.values())
    assert packs.store.count("read") == 2


async def test_of_a_pack_only_what_is_wanted_is_read(packs: Packs) -> None:
    first, second = noise(1, 1000), noise(2, 300 * KIB)
    third = noise(3, 1000)
    await packs.add(first, second, third)
    await packs.fetch([first, third])
    assert sorted(packs.got) == sorted([digest_of(first), digest_of(third)])
    assert sum(packs.bytes) == 2000


# A bad moment is not damage.


async def test_transient_failures_and_cut_answers_are_asked_again(packs: Packs) -> None:
    await packs.add(noise(1, 1000))
    short = ShortAnswerError("GetObject", "bucket", "k", "3 of 1000 bytes came")
    packs.store.scripts["read"] = [transient(), short, transient(), short]
    await packs.fetch()
    assert len(packs.got) == 1
    assert packs.store.count("read") == 5


async def test_a_store_that_stays_out_of_reach_is_not_damage(packs: Packs) -> None:
    await packs.add(noise(1, 1000))
    packs.store.scripts["read"] = [transient()] * 100_000
    with pytest.raises(TransientStoreError):
        await packs.fetch()


async def test_a_refusal_is_not_damage(packs: Packs) -> None:
    await packs.add(noise(1, 1000))
    packs.store.scripts["read"] = [AccessDeniedError("GetObject", "bucket", "k", "403")]
    with pytest.raises(AccessDeniedError):
        await packs.fetch()


class FlippingStore(ScriptedStore):
    """The first `flips` reads bring one byte at `at` that is wrong: the network's fault, not the object's."""

    def __init__(self, flips: int, at: int) -> None:
        super().__init__(MemoryStore("bucket"))
        self.flips, self.at = flips, at

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        data = bytearray(await super().read(key, offset=offset, length=length))
        if self.flips > 0 and offset <= self.at < offset + length:
            self.flips -= 1
            data[self.at - offset] ^= 1
        return bytes(data)


@pytest.mark.parametrize("flips", [1, 2])
async def test_a_byte_that_was_hurt_on_the_way_is_read_again(flips: int) -> None:
    packs = Packs(FlippingStore(flips, 5))
    await packs.add(noise(1, 1000))
    await packs.fetch()
    assert len(packs.got) == 1


async def test_what_was_good_before_a_hurt_byte_is_not_handed_on_twice() -> None:
    """`write` is promised each chunk once: the restore renames a file into place when it has its last."""
    packs = Packs(FlippingStore(1, 1500))
    await packs.add(noise(1, 1000), noise(2, 1000))
    await packs.fetch()
    assert sorted(packs.got) == sorted(packs.chunks)


# Damage.


async def test_a_pack_that_is_missing_is_damage_and_named(packs: Packs) -> None:
    pack = await packs.add(noise(1, 1000))
    await packs.store.inner.delete(packs.layout.pack_key(pack))
    with pytest.raises(DamagedPackError, match="missing") as caught:
        await packs.fetch()
    assert caught.value.pack == pack
    assert packs.layout.pack_key(pack) in str(caught.value)


async def test_a_pack_that_ends_early_is_damage(packs: Packs) -> None:
    pack = await packs.add(noise(1, 1000), noise(2, 1000))
    await packs.damage(pack, (await packs.object(pack))[:1500])
    with pytest.raises(DamagedPackError, match="shorter"):
        await packs.fetch()


@pytest.mark.parametrize("size", [0, 100, 1000])
async def test_a_pack_that_ends_before_the_wanted_chunk_begins_is_damage(packs: Packs, size: int) -> None:
    pack = await packs.add(noise(1, 1000), noise(2, 1000))
    await packs.damage(pack, (await packs.object(pack))[:size])
    with pytest.raises(DamagedPackError, match="shorter"):
        await packs.fetch([noise(2, 1000)])


@pytest.mark.parametrize("at", [0, 999, 1000, 1999])
async def test_a_pack_with_one_other_byte_is_damage_after_a_few_tries(packs: Packs, at: int) -> None:
    pack = await packs.add(noise(1, 1000), noise(2, 1000))
    data = bytearray(await packs.object(pack))
    data[at] ^= 1
    await packs.damage(pack, bytes(data))
    with pytest.raises(DamagedPackError, match="digest") as caught:
        await packs.fetch()
    assert caught.value.pack == pack
    assert packs.store.count("read") == 3


# Stores without ranges.


class RangelessStore(ScriptedStore):
    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        self.calls.append(("read", key))
        raise RangeNotSupportedError("GetObject", self.bucket, key, "the whole object came")


async def test_a_store_that_answers_a_range_with_the_whole_is_read_whole() -> None:
    packs = Packs(RangelessStore(MemoryStore("bucket")))
    await packs.add(noise(1, 1000), noise(2, 1000), noise(3, 1000))
    await packs.fetch([noise(2, 1000)])
    assert packs.got == [digest_of(noise(2, 1000))]


async def test_damage_is_found_without_ranges_too() -> None:
    packs = Packs(RangelessStore(MemoryStore("bucket")))
    pack = await packs.add(noise(1, 1000), noise(2, 1000))
    await packs.damage(pack, (await packs.object(pack))[:1500])
    with pytest.raises(DamagedPackError):
        await packs.fetch()
    await packs.store.inner.delete(packs.layout.pack_key(pack))
    with pytest.raises(DamagedPackError, match="missing"):
        await packs.fetch()
