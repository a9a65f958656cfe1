"""One object to one file: verified, resumed where it was cut, or an error; never half a file in place."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from heeler_sync.download import Wanted, check_space, fetch, in_place, list_wanted
from heeler_sync.errors import (
    AccessDeniedError,
    DamagedObjectError,
    LocalFileError,
    ObjectNotFoundError,
    TransientStoreError,
    UnsafeKeyError,
)
from heeler_sync.paths import Location
from heeler_sync.store.base import ObjectInfo, ObjectStore, Sink
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS
from heeler_sync.store.retry import Backoff, RetryPolicy
from tests.support.stores import IMPATIENT, KIB, SMALL_PARTS, CuttingStore, ScriptedStore, digest, transient

pytestmark = pytest.mark.anyio

DATA = os.urandom(300 * KIB)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def wanted(store: ObjectStore, data: bytes = DATA, key: str = "f", *, marked: bool = True) -> Wanted:
    await store.put(key, data, metadata=digest(data) if marked else None)
    return Wanted(store, replace(await store.head(key), metadata={}), key)


def nothing_left(root: Path) -> bool:
    return not any((root / ".heeler" / "incoming").iterdir())


async def test_an_object_becomes_a_file_with_what_is_known_of_it(tmp_path: Path) -> None:
    item = await wanted(MemoryStore(), key="a/b/f")
    stored = await fetch(item, tmp_path, IMPATIENT)
    assert stored is not None
    assert (tmp_path / "a/b/f").read_bytes() == DATA
    assert stored.digest == digest(DATA)["heeler-blake3"]
    assert stored.stamp.size == len(DATA)
    assert nothing_left(tmp_path)


async def test_an_empty_object_becomes_an_empty_file(tmp_path: Path) -> None:
    await fetch(await wanted(MemoryStore(), b""), tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == b""


async def test_a_download_that_is_cut_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    store = CuttingStore(cuts=[100 * KIB, 0, 50 * KIB + 1])
    await fetch(await wanted(store), tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == DATA
    assert store.offsets == [0, 100 * KIB, 100 * KIB, 150 * KIB + 1]


async def test_a_cut_right_after_the_last_byte_needs_no_more_bytes(tmp_path: Path) -> None:
    store = CuttingStore(cuts=[len(DATA)])
    await fetch(await wanted(store), tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == DATA
    assert store.offsets == [0]


async def test_an_answer_that_is_short_without_an_error_is_not_taken_for_the_whole(tmp_path: Path) -> None:
    class Short(ScriptedStore):
        shorts = 2

        async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
            got = bytearray()
            info = await super().download(key, got.extend, offset=offset, if_match=if_match)
            self.shorts -= 1
            sink(bytes(got[: KIB if self.shorts >= 0 else None]))
            return info

    await fetch(await wanted(Short()), tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == DATA


async def test_a_store_without_ranges_is_read_from_the_start_after_a_cut(tmp_path: Path) -> None:
    store = CuttingStore(MemoryStore(provider=replace(SMALL_PARTS, ranges=False)), cuts=[100 * KIB, 200 * KIB])
    await fetch(await wanted(store), tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == DATA
    assert store.offsets == [0, 0, 0]


@pytest.mark.parametrize("marked", [True, False], ids=["with a digest", "without any checksum"])
async def test_an_object_replaced_between_cut_and_resumption_is_read_anew_and_whole(
    tmp_path: Path, marked: bool
) -> None:
    store = CuttingStore(MemoryStore(provider=SMALL_PARTS if marked else PROVIDERS["aws"]), cuts=[100 * KIB])
    item = await wanted(store, marked=marked)
    newer = os.urandom(len(DATA))
    download = store.download

    async def replacing(key: str, sink: Sink, **options: object) -> ObjectInfo:
        try:
            return await download(key, sink, **options)  # type: ignore[arg-type]
        except TransientStoreError:
            await store.inner.put(key, newer, metadata=digest(newer) if marked else None)
            raise

    store.download = replacing  # type: ignore[method-assign]
    await fetch(item, tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == newer


@pytest.mark.parametrize("marked", [True, False], ids=["digest", "etag"])
async def test_a_damaged_download_is_repeated(tmp_path: Path, marked: bool) -> None:
    class Flipping(ScriptedStore):
        bad = 2

        async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
            got = bytearray()
            info = await super().download(key, got.extend, offset=offset, if_match=if_match)
            if self.bad > 0:
                self.bad -= 1
                got[7] ^= 1
            sink(bytes(got))
            return info

    store = Flipping()
    item = await wanted(store, marked=marked)
    await fetch(item, tmp_path, IMPATIENT)
    assert (tmp_path / "f").read_bytes() == DATA
    assert store.count("download") == 3
    store.bad = 99
    (tmp_path / "f").unlink()
    with pytest.raises(DamagedObjectError) as caught:
        await fetch(item, tmp_path, IMPATIENT)
    assert caught.value.key == "f"
    assert not (tmp_path / "f").exists()
    assert nothing_left(tmp_path)


async def test_a_download_that_brings_bytes_goes_on_beyond_the_patience(tmp_path: Path) -> None:
    policy = RetryPolicy(patience=0.05, backoff=lambda: Backoff(base=0.02, cap=0.02))
    store = CuttingStore(cuts=[10 * KIB] * 12)
    await fetch(await wanted(store), tmp_path, policy)
    assert (tmp_path / "f").read_bytes() == DATA


async def test_a_download_that_brings_nothing_gives_up_after_the_patience(tmp_path: Path) -> None:
    policy = RetryPolicy(patience=0.05, backoff=lambda: Backoff(base=0.01, cap=0.01))
    store = CuttingStore(cuts=[0] * 9999)
    with pytest.raises(TransientStoreError):
        await fetch(await wanted(store), tmp_path, policy)
    assert not (tmp_path / "f").exists()
    assert nothing_left(tmp_path)


async def test_a_refusal_ends_a_download_at_once(tmp_path: Path) -> None:
    store = ScriptedStore(download=[AccessDeniedError("GetObject", "b", "f", "403")])
    with pytest.raises(AccessDeniedError):
        await fetch(await wanted(store), tmp_path, IMPATIENT)
    assert store.count("download") == 1


async def test_an_object_that_vanished_after_the_listing_is_an_error_not_an_empty_file(tmp_path: Path) -> None:
    store = MemoryStore()
    item = await wanted(store)
    await store.delete("f")
    with pytest.raises(ObjectNotFoundError):
        await fetch(item, tmp_path, IMPATIENT)
    assert not (tmp_path / "f").exists()


async def test_a_folder_marker_becomes_a_folder(tmp_path: Path) -> None:
    marker = Wanted(MemoryStore(), ObjectInfo("p/folder", 0, '"x"'), "folder")
    assert await fetch(marker, tmp_path, IMPATIENT) is None
    assert (tmp_path / "folder").is_dir()


async def test_an_object_whose_name_is_a_folder_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(LocalFileError, match="is a folder"):
        await fetch(await wanted(MemoryStore()), tmp_path, IMPATIENT)


async def test_an_object_below_what_is_a_file_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"file")
    with pytest.raises(LocalFileError, match="is a file"):
        await fetch(await wanted(MemoryStore(), key="a/f"), tmp_path, IMPATIENT)
    assert (tmp_path / "a").read_bytes() == b"file"


async def test_a_disk_that_takes_no_more_is_a_local_error(tmp_path: Path) -> None:
    class Full(MemoryStore):
        async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
            raise OSError(28, "No space left on device")

    with pytest.raises(LocalFileError, match="No space"):
        await fetch(await wanted(Full()), tmp_path, IMPATIENT)


async def test_a_download_that_can_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(LocalFileError, match="are free"):
        check_space(tmp_path, 1 << 60)


async def test_a_file_in_place_is_known_by_its_content_not_by_its_size(tmp_path: Path) -> None:
    store = ScriptedStore()
    item = await wanted(store)
    assert await in_place(item, tmp_path) is None
    (tmp_path / "f").write_bytes(DATA[:-1])
    assert await in_place(item, tmp_path) is None
    assert store.count("head") == 1, "a file of another size needs no question"
    (tmp_path / "f").write_bytes(DATA[:-1] + bytes([DATA[-1] ^ 1]))
    assert await in_place(item, tmp_path) is None
    (tmp_path / "f").write_bytes(DATA)
    assert await in_place(item, tmp_path) is not None
    unmarked = await wanted(store, marked=False)
    assert await in_place(unmarked, tmp_path) is None


@pytest.mark.parametrize("target", ["outside", "inside", "loop"])
async def test_a_link_is_never_in_place(tmp_path: Path, target: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    item = await wanted(MemoryStore())
    targets = {"outside": tmp_path / "o", "inside": root / "other", "loop": root / "f"}
    if target != "loop":
        targets[target].write_bytes(DATA)
    (root / "f").symlink_to(targets[target])
    assert await in_place(item, root) is None


@pytest.mark.parametrize("key", ["../evil", "a/../../evil", "/abs", "a//b", "a\0b", "./x"])
async def test_a_key_that_would_lead_out_is_refused_by_name(key: str) -> None:
    class Listing(MemoryStore):
        async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
            yield [ObjectInfo(prefix + "good", 1, '"x"'), ObjectInfo(prefix + key, 1, '"x"')]

    with pytest.raises(UnsafeKeyError) as caught:
        await list_wanted(Listing(), Location("memory", "p/"), lambda _: True)
    assert caught.value.key == "p/" + key


async def test_heelers_own_objects_and_those_left_out_are_not_wanted() -> None:
    store = MemoryStore()
    for key in ("p/a.pt", "p/b.txt", "p/.heeler/head.json", "p/sub/.heeler/x.pt", "q/c.pt"):
        await store.put(key, b"x")
    found = await list_wanted(store, Location("memory", "p/"), lambda relative: relative.endswith(".pt"))
    assert [item.relative for item in found] == ["a.pt"]


async def test_a_listing_that_can_not_be_had_is_an_error() -> None:
    with pytest.raises(TransientStoreError):
        await list_wanted(ScriptedStore(list=[transient("ListObjectsV2")]), Location("memory", ""), lambda _: True)
