"""The manifest: what goes in comes out; nothing that storage may hold leads out of the folder or hangs the reader."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from collections.abc import Mapping
from typing import Any

import hypothesis.strategies as st
import pytest
import zstandard
from hypothesis import HealthCheck, example, given, settings

from heeler_sync.snapshot.chunks import Codec, chunk_count
from heeler_sync.snapshot.manifest import (
    FORMAT,
    BadManifestError,
    FileEntry,
    Manifest,
    Place,
    Tree,
    UnknownFormatError,
    decode,
    encode,
    why_not_link,
)

CHUNK = 64
PACK = "1-" + "a" * 32
DIGEST = bytes(range(32))

names = (
    st.one_of(
        st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12),
        st.binary(min_size=1, max_size=12).map(lambda data: os.fsdecode(data.replace(b"/", b"_").replace(b"\0", b"_"))),
        st.sampled_from(
            [" ", "a b", "new\nline", "-rf", "..a", "...", "~", "ü", "日本", '"', "\\", "\udcff", "x" * 255]
        ),
    )
    .filter(lambda name: name not in (".", "..", ".heeler"))
    .filter(lambda name: len(name.encode("utf-8", "surrogateescape")) <= 255)
)
modes = st.integers(0, 0o777)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    folders: dict[str, int] = {}
    for name in draw(st.lists(names, max_size=4, unique=True)):
        parent = draw(st.sampled_from(["", *folders]))
        folders[f"{parent}/{name}" if parent else name] = draw(modes)
    packs = {f"{epoch}-{epoch:032x}": 0 for epoch in draw(st.lists(st.integers(1, 99), max_size=3, unique=True))}
    places: dict[bytes, Place] = {}

    def chunk(size: int) -> bytes:
        digest = draw(st.binary(min_size=32, max_size=32).filter(lambda new: new not in places))
        pack = draw(st.sampled_from(sorted(packs)))
        gap, stored = draw(st.integers(0, 9)), draw(st.integers(1, CHUNK))
        places[digest] = Place(pack, packs[pack] + gap, stored, size, draw(st.sampled_from(Codec)))
        packs[pack] += gap + stored
        return digest

    files, links = {}, {}
    for name in draw(st.lists(names, max_size=6, unique=True)):
        parent = draw(st.sampled_from(["", *folders]))
        path = f"{parent}/{name}" if parent else name
        if path in folders or path in files or path in links:
            continue
        if draw(st.integers(0, 3)) == 0:
            links[path] = draw(st.sampled_from([".", "x", "a/b/c", "..x", *(["../y"] if parent else [])]))
            continue
        size = draw(st.integers(0, 5 * CHUNK)) if packs else 0
        pieces = [min(CHUNK, size - at) for at in range(0, size, CHUNK)]
        known = {size: digest for digest, place in places.items() for size in (place.size,)}
        chunks = tuple(known[one] if one in known and draw(st.booleans()) else chunk(one) for one in pieces)
        mtime = draw(st.integers(-(2**62), 2**62))
        files[path] = FileEntry(path, draw(modes), mtime, size, chunks)
    tree = Tree(files, folders, links)
    used = {place.pack for place in places.values()}
    return Manifest(
        generation=draw(st.integers(1, 2**40)),
        epoch=draw(st.integers(1, 2**40)),
        created=draw(st.floats(0, 1e10)),
        tree=tree,
        places=places,
        packs={pack: size for pack, size in packs.items() if pack in used},
        chunk_bytes=CHUNK,
    )


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(manifests())
def test_any_manifest_makes_the_round_trip(manifest: Manifest) -> None:
    assert decode(encode(manifest)) == manifest


def test_a_tree_with_all_kinds_of_names_makes_the_round_trip() -> None:
    odd = ["a b", "new\nline", os.fsdecode(b"\xff\xfe"), "ü日", "-", "'\"\\", "\x01", "x" * 255]
    files = {name: FileEntry(name, 0o640, -1, 0, ()) for name in odd}
    manifest = Manifest(1, 1, 0.0, Tree(files, {"d": 0o700}, {"d/l": "../a b"}), {}, {})
    assert decode(encode(manifest)) == manifest


# What comes from storage is not to be trusted.


def document(**changes: Any) -> dict[str, Any]:
    """A manifest with one file, d/f, and one pack; `changes` replace parts of it."""
    return {
        "format": FORMAT,
        "generation": 1,
        "epoch": 1,
        "created": 0.0,
        "chunk_bytes": CHUNK,
        "packs": [[PACK, 100]],
        "chunks": [[DIGEST.hex(), 0, 0, 64, 64, 0], [DIGEST[::-1].hex(), 0, 64, 10, 20, 1]],
        "folders": [["d", 0o755]],
        "links": [],
        "files": [["d/f", 0o644, 1, 84, [[0, 2]]]],
        **changes,
    }


def packed(found: object) -> bytes:
    return zstandard.ZstdCompressor().compress(json.dumps(found).encode("ascii"))


def file(path: object, **changes: Any) -> dict[str, Any]:
    """A manifest with an empty file at `path`."""
    return document(files=[[path, 0o644, 1, 0, []]], **changes)


def test_the_document_that_the_others_are_made_of_is_good() -> None:
    found = decode(packed(document()))
    assert found.tree.files["d/f"] == FileEntry("d/f", 0o644, 1, 84, (DIGEST, DIGEST[::-1]))


WAYS_OUT = ["..", "../x", "d/../../x", "/etc/passwd", "/", "", ".", "d/", "d//x", "./x", "d/.", "a\0b"]


@pytest.mark.parametrize("path", WAYS_OUT)
def test_no_path_leads_out_or_nowhere(path: str) -> None:
    for found in (file(path), document(folders=[["d", 0o755], [path, 0o755]]), document(links=[[path, "x"]])):
        with pytest.raises(BadManifestError):
            decode(packed(found))


@pytest.mark.parametrize("path", [".heeler", ".heeler/head.json", "d/.heeler", "d/.heeler/x"])
def test_nothing_is_in_heelers_own_folder(path: str) -> None:
    folders = [["d", 0o755], [".heeler", 0o755], ["d/.heeler", 0o755]]
    for found in (file(path), file(path, folders=folders), document(links=[[path, "x"]])):
        with pytest.raises(BadManifestError):
            decode(packed(found))


@pytest.mark.parametrize(
    "changes",
    [
        {"links": [["l", "d"]], "files": [["l/f", 0o644, 1, 0, []]]},
        {"links": [["l", "d"]], "folders": [["d", 0o755], ["l/sub", 0o755]]},
        {"files": [["f", 0o644, 1, 0, []], ["f/g", 0o644, 1, 0, []]]},
        {"files": [["none/f", 0o644, 1, 0, []]]},
        {"folders": [["a/b", 0o755]]},
    ],
    ids=["file below a link", "folder below a link", "file below a file", "below no folder", "folder below none"],
)
def test_all_is_below_a_folder_of_the_tree(changes: dict[str, Any]) -> None:
    with pytest.raises(BadManifestError, match="not below a folder"):
        decode(packed(document(**changes)))


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("l", "/etc"),
        ("l", "../x"),
        ("l", ".."),
        ("d/l", "../../x"),
        ("d/l", ".././../x"),
        ("l", "m/../../x"),  # m may be a link to anywhere deep: its parent is not ours
        ("l", "d/.."),
        ("l", ".heeler/head.json"),
        ("d/l", "../.heeler"),
        ("l", ""),
        ("l", "a\0b"),
        ("l", None),
        ("l", 7),
    ],
)
def test_no_link_leads_out_also_not_by_way_of_another(path: str, target: object) -> None:
    assert why_not_link(path, target)
    with pytest.raises(BadManifestError):
        decode(packed(document(links=[["m", "d"], [path, target]])))


@pytest.mark.parametrize(("path", "target"), [("l", "."), ("l", "d/f"), ("d/l", "../x"), ("l", "./d//f"), ("l", "l")])
def test_links_that_stay_inside_are_taken(path: str, target: str) -> None:
    assert decode(packed(document(links=[[path, target]]))).tree.links == {path: target}


@pytest.mark.parametrize(
    "changes",
    [
        {"files": [["d/f", 0o644, 1, 0, []], ["d/f", 0o600, 2, 0, []]]},
        {"folders": [["d", 0o755], ["d", 0o700]]},
        {"links": [["l", "d"], ["l", "d/f"]]},
        {"files": [["d", 0o644, 1, 0, []]]},
        {"links": [["d", "x"]]},
        {"links": [["d/f", "x"]]},
    ],
    ids=["files", "folders", "links", "file and folder", "link and folder", "link and file"],
)
def test_no_path_is_two_things(changes: dict[str, Any]) -> None:
    with pytest.raises(BadManifestError, match=r"two things|twice"):
        decode(packed(document(**changes)))


@pytest.mark.parametrize(
    "changes",
    [
        {"chunks": [[DIGEST.hex(), 0, 40, 64, 64, 0]]},
        {"chunks": [[DIGEST.hex(), 0, 100, 1, 64, 0]]},
        {"chunks": [[DIGEST.hex(), 0, -1, 64, 64, 0]]},
        {"chunks": [[DIGEST.hex(), 0, 0, 64, 65, 0]]},
        {"chunks": [[DIGEST.hex(), 0, 0, 0, 64, 0]]},
        {"chunks": [[DIGEST.hex(), 1, 0, 64, 64, 0]]},
        {"chunks": [[DIGEST.hex(), -1, 0, 64, 64, 0]]},
        {"chunks": [[DIGEST.hex(), 0, 0, 64, 64, 2]]},
        {"chunks": [[DIGEST.hex()[2:], 0, 0, 64, 64, 0]]},
        {"chunks": [["zz" * 32, 0, 0, 64, 64, 0]]},
        {"packs": [["", 100]]},
        {"packs": [["../x", 100]]},
        {"packs": [[PACK, 0]]},
        {"packs": [[PACK, "100"]]},
        {"chunk_bytes": 0},
        {"chunk_bytes": 1.5},
        {"generation": 0},
        {"generation": True},
        {"epoch": -1},
        {"created": "now"},
        {"files": [["d/f", 0o644, 1, 83, [[0, 2]]]]},
        {"files": [["d/f", 0o644, 1, 85, [[0, 2]]]]},
        {"files": [["d/f", 0o644, 1, 64, [[0, 2]]]]},
        {"files": [["d/f", 0o644, 1, 84, [[1, 1], [0, 1]]]]},
        {"files": [["d/f", 0o644, 1, 84, [[0, 3]]]]},
        {"files": [["d/f", 0o644, 1, 84, [[-1, 2]]]]},
        {"files": [["d/f", -1, 1, 84, [[0, 2]]]]},
        {"files": [["d/f", 0o644, 1.5, 84, [[0, 2]]]]},
        {"files": [["d/f", 0o644, 1, -1, []]]},
        {"files": [["d/f", 0o644, 1]]},
        {"files": [["d/" + "x" * 256, 0o644, 1, 0, []]]},
        {"files": [["\ud800", 0o644, 1, 0, []]]},
        {"files": None},
        {"folders": [[["d"], 0o755]]},
        {"links": 7},
    ],
    ids=repr,
)
def test_what_can_not_be_is_refused(changes: Mapping[str, Any]) -> None:
    with pytest.raises(BadManifestError):
        decode(packed(document(**changes)))


@pytest.mark.parametrize("pack", ["..", ".", "head.json", "x", "0-" + "a" * 32, "1-" + "A" * 32])
def test_a_pack_has_an_id_of_ours_since_its_key_is_made_of_it(pack: str) -> None:
    with pytest.raises(BadManifestError):
        decode(packed(document(packs=[[pack, 100]])))


def test_a_pack_is_not_listed_twice() -> None:
    with pytest.raises(BadManifestError):
        decode(packed(document(packs=[[PACK, 100], [PACK, 50]])))


def test_a_time_that_no_file_can_have_is_refused() -> None:
    """It would only be found when the file is to get it, with an error that is not ours."""
    with pytest.raises(BadManifestError):
        decode(packed(document(files=[["d/f", 0o644, 10**30, 84, [[0, 2]]]])))


@pytest.mark.parametrize("found", [2, 0, "1", None, [1], 10**30])
def test_an_unknown_format_is_said_to_be_one(found: object) -> None:
    with pytest.raises(UnknownFormatError, match="newer heeler"):
        decode(packed(document(format=found)))
    with pytest.raises(UnknownFormatError):
        decode(packed({"format": found}))


@pytest.mark.parametrize("text", [b"", b"[]", b"1", b"null", b"{", b"\xff", b"[" * 100_000, b"1" * 10_000])
def test_what_is_no_json_object_is_no_manifest(text: bytes) -> None:
    with pytest.raises(BadManifestError):
        decode(zstandard.ZstdCompressor().compress(text))


# Whatever the bytes are, the answer is one of ours, and it comes soon.


def refuse_or_take(data: bytes) -> None:
    started = time.monotonic()
    try:
        found = decode(data)
    except (BadManifestError, UnknownFormatError):
        pass
    else:
        assert all(
            chunk_count(entry.size, found.chunk_bytes) == len(entry.chunks) for entry in found.tree.files.values()
        )
    assert time.monotonic() - started < 5


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=300))
@example(b"")
def test_arbitrary_bytes_are_refused_in_our_own_words(data: bytes) -> None:
    refuse_or_take(data)


@settings(max_examples=250, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 255), st.one_of(st.none(), st.integers(0, 10**6)))
def test_damaged_bytes_are_refused_in_our_own_words(at: int, value: int, cut: int | None) -> None:
    data = bytearray(packed(document()))
    data[at % len(data)] = value
    refuse_or_take(bytes(data[: None if cut is None else cut % len(data)]))


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-3, 200), st.integers(), st.floats(), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_documents_with_anything_in_any_place_are_refused_in_our_own_words(data: st.DataObject) -> None:
    found: Any = document(links=[["l", "d"]])
    place: Any = found
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], list | dict) or not place[key] or data.draw(st.booleans()):
            place[key] = data.draw(json_values)
            break
        place = place[key]
    refuse_or_take(packed(found))


def refuse_in_little_memory(data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadManifestError):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_names_its_chunks_over_and_over_is_refused_soon() -> None:
    """Runs are short to write: a small object could stand for more rows than there is memory."""
    chunks = [[f"{number:064x}", 0, 0, 1, 64, 0] for number in range(2_000)]
    refuse_in_little_memory(packed(document(chunks=chunks, files=[["d/f", 0o644, 1, 1, [[0, 2_000]] * 500]])))


def test_an_object_that_unpacks_to_more_than_any_manifest_is_refused_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heeler_sync.snapshot.manifest._MAX_BYTES", 1 << 20)
    blank = json.dumps(document())[:-1] + " " * (8 << 20) + "}"
    refuse_in_little_memory(zstandard.ZstdCompressor().compress(blank.encode()))
