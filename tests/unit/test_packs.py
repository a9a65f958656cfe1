"""Packs: what was put in lies where it is said to, under names that are never used twice."""

from __future__ import annotations

import pytest

from heeler_sync.snapshot.chunks import Codec, digest_of, unpack_chunk
from heeler_sync.snapshot.ids import epoch_of, new_id
from heeler_sync.snapshot.packs import Pack


def test_all_chunks_of_a_pack_lie_where_it_says() -> None:
    pack = Pack(new_id(7))
    chunks = [b"a", b"b" * 5_000, bytes(range(256)) * 3, b"c" * 127]
    for data in chunks:
        pack.add(digest_of(data), data)
    size = pack.size
    stored = pack.take()
    assert len(stored) == size
    for data in chunks:
        place = pack.places[digest_of(data)]
        assert place.pack == pack.id
        piece = stored[place.offset : place.offset + place.stored]
        assert bytes(unpack_chunk(piece, place.codec, digest_of(data), place.size)) == data
    assert {place.codec for place in pack.places.values()} == {Codec.RAW, Codec.ZSTD}
    assert sum(place.stored for place in pack.places.values()) == size, "and nothing else is in it"


def test_a_pack_that_was_taken_keeps_its_places_and_no_bytes() -> None:
    pack = Pack(new_id(1))
    pack.add(digest_of(b"a"), b"a")
    assert pack.take() == b"a"
    assert pack.take() == b""
    assert (pack.size, len(pack.places)) == (1, 1)


def test_ids_carry_their_epoch_and_are_never_used_twice() -> None:
    ids = {new_id(12) for _ in range(1000)}
    assert len(ids) == 1000
    assert {epoch_of(name) for name in ids} == {12}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "1",
        "x-" + "a" * 32,
        "0-" + "a" * 32,
        "01-" + "a" * 32,
        "-1-" + "a" * 32,
        "1-" + "a" * 31,
        "1-" + "a" * 33,
        "1-" + "A" * 32,
        "1-" + "g" * 32,
        "../1-" + "a" * 32,
        "1-" + "a" * 32 + "\n",
        "1" * 19 + "-" + "a" * 32,
    ],
)
def test_what_is_no_id_has_no_epoch(name: str) -> None:
    assert epoch_of(name) is None
