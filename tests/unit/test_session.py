"""Folders from restore to the last upload, through `Session`: what comes down, what goes up, what is never touched."""

from __future__ import annotations

import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from heeler_sync.errors import AccessDeniedError, LocalFileError, TransientStoreError, UnsafeKeyError
from heeler_sync.paths import parse_location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session, SyncFolder
from heeler_sync.settle import SettleTimes
from heeler_sync.store.base import ObjectInfo
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import Events, ScriptedStore, digest, transient, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A machine with a folder `work`, and a bucket."""

    def __init__(self, tmp_path: Path) -> None:
        self.work = tmp_path / "work"
        self.store = ScriptedStore(MemoryStore("bucket"))
        self.events = Events()
        self.last: Session | None = None

    def folder(self, prefix: str, path: str = "data", pattern: str | None = None) -> SyncFolder:
        compiled = re.compile(pattern) if pattern else None
        return SyncFolder(parse_location(f"s3://bucket/{prefix}"), self.work / path, compiled)

    def session(self, patience: float | None = 5.0, **parts: SyncFolder | tuple[SyncFolder, ...]) -> Session:
        folders = {name: part if isinstance(part, tuple) else (part,) for name, part in parts.items()}
        plan = Plan(folders.get("before", ()), folders.get("during", ()), folders.get("after", ()))
        times = SettleTimes(debounce=0.02, open_wait=0.3)
        if self.last is not None:
            self.last.close()
        self.last = Session(
            plan, lambda _: self.store, permit=AlwaysPermitted(), on_event=self.events, times=times, patience=patience
        )
        return self.last

    async def put(self, **objects: bytes) -> None:
        for key, data in objects.items():
            await self.store.inner.put(key.replace("__", "/"), data, metadata=digest(data))

    def write(self, name: str, data: bytes = b"x") -> Path:
        path = self.work / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path

    def files(self, path: str = "data") -> dict[str, bytes]:
        root = self.work / path
        found = (item for item in sorted(root.rglob("*")) if item.is_file() and ".heeler" not in item.parts)
        return {str(item.relative_to(root)): item.read_bytes() for item in found}

    def bucket(self) -> dict[str, bytes]:
        return self.store.objects()


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def run(session: Session, program: Callable[[], object] = lambda: None, *, whole: bool = True) -> None:
    await session.restore()
    async with session.watching():
        program()
        await session.flush(Capture(whole=whole))
    await session.publish()


async def test_a_job_goes_on_where_the_last_one_stopped(world: World) -> None:
    first = world.session(before=world.folder("ck/"), during=world.folder("ck/"))
    await run(first, lambda: world.write("data/step-1", b"one"))
    assert world.bucket() == {"ck/step-1": b"one"}
    await first.discard()
    assert world.files() == {}
    second = world.session(before=world.folder("ck/"), during=world.folder("ck/"))
    await run(second, lambda: world.write("data/step-2", b"two"))
    assert world.files() == {"step-1": b"one", "step-2": b"two"}
    assert world.bucket() == {"ck/step-1": b"one", "ck/step-2": b"two"}


async def test_folders_are_there_even_if_nothing_is_stored(world: World) -> None:
    await world.session(before=world.folder("in/"), after=world.folder("out/", "out")).restore()
    assert (world.work / "data").is_dir()
    assert (world.work / "out").is_dir()


async def test_after_a_restore_the_folder_holds_exactly_what_storage_holds(world: World) -> None:
    await world.put(in__a=b"A", in__sub__b=b"B", other__c=b"C")
    for name in ("old", "sub/old", "deep/er/old", ".hidden"):
        world.write(f"data/{name}", b"old")
    (world.work / "data/link").symlink_to("/etc")
    await world.session(before=world.folder("in/")).restore()
    assert world.files() == {"a": b"A", "sub/b": b"B"}
    aside = world.work / "data/.heeler/aside"
    assert (aside / "old").read_bytes() == b"old"
    assert (aside / "sub/old").read_bytes() == b"old"
    assert (aside / "deep/er/old").read_bytes() == b"old"
    assert (aside / "link").is_symlink()


async def test_what_was_moved_aside_is_neither_mirrored_nor_kept_for_ever(world: World) -> None:
    world.write("data/old")
    session = world.session(before=world.folder("ck/"), during=world.folder("ck/"))
    await run(session)
    assert world.bucket() == {}
    await world.session(before=world.folder("ck/")).restore()
    assert not (world.work / "data/.heeler").exists()


async def test_a_file_named_as_heelers_own_folder_is_in_nobodys_way(world: World) -> None:
    await world.put(in__a=b"A")
    world.write("data/.heeler")
    await world.session(before=world.folder("in/")).restore()
    assert world.files() == {"a": b"A"}


async def test_files_in_place_are_kept_and_not_downloaded_again(world: World) -> None:
    await world.put(in__a=b"A", in__b=b"B", in__c=b"C")
    world.write("data/a", b"A")
    world.write("data/b", b"?")
    session = world.session(before=world.folder("in/"))
    await session.restore()
    assert world.files() == {"a": b"A", "b": b"B", "c": b"C"}
    assert world.store.count("download") == 2
    assert (session.progress.files_kept, session.progress.files_down) == (1, 2)


async def test_a_link_in_the_way_is_moved_aside_and_never_written_through(world: World, tmp_path: Path) -> None:
    await world.put(in__sub__a=b"A", in__f=b"F")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "f").write_bytes(b"mine")
    (world.work / "data").mkdir(parents=True)
    (world.work / "data/sub").symlink_to(outside)
    (world.work / "data/f").symlink_to(outside / "f")
    await world.session(before=world.folder("in/")).restore()
    assert world.files() == {"f": b"F", "sub/a": b"A"}
    assert {item.name: item.read_bytes() for item in outside.iterdir()} == {"f": b"mine"}


async def test_nested_folders_are_left_to_each_other(world: World) -> None:
    await world.put(in__a=b"A", ck__step=b"1")
    world.write("data/ck/old")
    before = (world.folder("in/"), world.folder("ck/", "data/ck"))
    await world.session(before=before).restore()
    assert world.files() == {"a": b"A", "ck/step": b"1"}
    assert (world.work / "data/ck/.heeler/aside/old").exists()


async def test_a_link_in_the_place_of_a_nested_folder_is_moved_aside(world: World, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine").write_bytes(b"mine")
    (world.work / "data").mkdir(parents=True)
    (world.work / "data/ck").symlink_to(outside)
    await world.put(ck__step=b"1")
    await world.session(before=(world.folder("in/"), world.folder("ck/", "data/ck"))).restore()
    assert world.files() == {"ck/step": b"1"}
    assert [item.name for item in outside.iterdir()] == ["mine"]


async def test_two_prefixes_may_share_a_folder_and_the_later_wins(world: World) -> None:
    await world.put(base__a=b"1", base__b=b"1", over__b=b"2")
    await world.session(before=(world.folder("base/"), world.folder("over/"))).restore()
    assert world.files() == {"a": b"1", "b": b"2"}


async def test_empty_objects_that_name_a_folder_are_folders(world: World) -> None:
    await world.put(in__sub=b"", in__sub__a=b"A", in__empty=b"")
    await world.session(before=world.folder("in/")).restore()
    assert world.files() == {"sub/a": b"A", "empty": b""}


async def test_a_file_and_a_folder_of_one_name_is_refused_by_name(world: World) -> None:
    await world.put(in__sub=b"file", in__sub__a=b"A")
    with pytest.raises(LocalFileError, match="sub"):
        await world.session(before=world.folder("in/")).restore()


@pytest.mark.parametrize("key", ["../evil", "a/../../evil", "/abs", "a//b", "x\0y"])
async def test_a_key_that_leads_out_stops_the_restore_before_anything_is_touched(world: World, key: str) -> None:
    class Listing(MemoryStore):
        async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
            yield [ObjectInfo(prefix + "good", 0, '"x"'), ObjectInfo(prefix + key, 0, '"x"')]

    world.store.inner = Listing("bucket")
    world.write("data/mine")
    with pytest.raises(UnsafeKeyError):
        await world.session(before=world.folder("in/")).restore()
    assert world.files() == {"mine": b"x"}
    assert not list(world.work.parent.glob("evil"))


async def test_a_folder_that_can_not_be_listed_is_never_an_empty_one(world: World) -> None:
    await world.put(ck__a=b"A")
    world.store.scripts["list"] = [AccessDeniedError("ListObjectsV2", "bucket", "ck/", "403")]
    with pytest.raises(AccessDeniedError):
        await world.session(before=world.folder("ck/")).restore()
    world.store.scripts["list"] = [transient("ListObjectsV2")] * 99
    with pytest.raises(TransientStoreError):
        await world.session(patience=0.3, before=world.folder("ck/")).restore()
    world.store.scripts["list"] = [transient("ListObjectsV2")] * 2
    await world.session(before=world.folder("ck/")).restore()
    assert world.files() == {"a": b"A"}


async def test_a_root_that_is_a_file_is_refused(world: World) -> None:
    world.write("data")
    with pytest.raises(LocalFileError, match="not a folder"):
        await world.session(before=world.folder("in/")).restore()


async def test_restored_files_that_the_program_leaves_alone_are_neither_sent_nor_deleted(world: World) -> None:
    await world.put(ck__a=b"A", ck__b=b"B")
    await run(world.session(before=world.folder("ck/"), during=world.folder("ck/")))
    assert world.bucket() == {"ck/a": b"A", "ck/b": b"B"}
    assert world.store.count("put") == world.store.count("delete") == 0


async def test_a_restored_file_that_the_program_deletes_is_deleted(world: World) -> None:
    await world.put(ck__a=b"A", ck__b=b"B")
    session = world.session(before=world.folder("ck/"), during=world.folder("ck/"))
    await run(session, (world.work / "data/a").unlink)
    assert world.bucket() == {"ck/b": b"B"}


async def test_objects_that_a_pattern_leaves_out_are_never_deleted(world: World) -> None:
    await world.put(ck__a__pt=b"A", ck__log=b"L")
    session = world.session(before=world.folder("ck/"), during=world.folder("ck/", pattern=r"pt$"))
    await run(session, lambda: world.write("data/b.pt", b"B"))
    assert world.bucket() == {"ck/a/pt": b"A", "ck/log": b"L", "ck/b.pt": b"B"}


async def test_objects_restored_to_another_place_of_the_folder_are_never_deleted(world: World) -> None:
    """`before` brings job/ to the folder, `during` mirrors the same folder to job/ck/: other names, other files."""
    await world.put(job__ck__step=b"1")
    session = world.session(before=world.folder("job/"), during=world.folder("job/ck/"))
    await run(session)
    assert world.bucket()["job/ck/step"] == b"1"
    assert world.store.count("delete") == 0


async def test_outputs_are_published_and_storage_keeps_what_the_program_did_not_make(world: World) -> None:
    await world.put(out__earlier=b"E")
    session = world.session(after=world.folder("out/", "out"))
    await run(session, lambda: world.write("out/result", b"R"))
    assert world.bucket() == {"out/earlier": b"E", "out/result": b"R"}


async def test_a_refused_output_is_an_error(world: World) -> None:
    world.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")] * 9
    session = world.session(after=world.folder("out/", "out"))
    with pytest.raises(AccessDeniedError):
        await run(session, lambda: world.write("out/result"))


async def test_one_file_that_is_refused_does_not_cost_the_others(world: World) -> None:
    denied = AccessDeniedError("PutObject", "bucket", "k", "403")

    class Refusing(MemoryStore):
        async def put(self, key: str, data: bytes, **options: object) -> str:
            if key == "ck/f3":
                raise denied
            return await super().put(key, data, **options)  # type: ignore[arg-type]

    world.store.inner = Refusing("bucket")
    session = world.session(during=world.folder("ck/"))
    await session.restore()
    async with session.watching():
        for count in range(40):
            world.write(f"data/f{count}")
        with pytest.raises(AccessDeniedError):
            await session.flush(Capture(whole=True))
    assert len(world.bucket()) == 39


async def test_what_is_unsent_is_known_with_its_size(world: World) -> None:
    session = world.session(during=world.folder("ck/"))
    world.store.scripts["put"] = [transient("PutObject")] * 10_000
    await session.restore()
    async with session.watching():
        world.write("data/a", b"x" * 100)
        world.write("data/b", b"x" * 11)
        await until(lambda: "upload_retried" in world.events.names())
        unsent = await session.unsent()
        assert (unsent.files, unsent.bytes) == (2, 111)
        world.store.scripts["put"] = []
        await session.flush(Capture(whole=True))
        assert (await session.unsent()).files == 0
        assert session.largest() == 100
    assert session.progress.uplink() is not None


async def test_discarding_removes_only_what_is_in_storage_unchanged(world: World) -> None:
    await world.put(in__input=b"I", in__sub__touched=b"T")
    session = world.session(before=world.folder("in/"), after=world.folder("out/", "out"))

    def program() -> None:
        world.write("data/sub/touched", b"t")
        world.write("data/scratch/notes", b"N")
        world.write("out/result", b"R")

    await run(session, program)
    world.write("out/late", b"L")
    os.utime(world.work / "out/late")
    await session.discard()
    assert world.files() == {"sub/touched": b"t", "scratch/notes": b"N"}
    assert world.files("out") == {"late": b"L"}
    assert set(world.bucket()) == {"in/input", "in/sub/touched", "out/result"}


async def test_discarding_between_jobs_deletes_nothing_in_storage(world: World) -> None:
    session = world.session(before=world.folder("ck/"), during=world.folder("ck/"))
    await session.restore()
    async with session.watching():
        world.write("data/a")
        await session.flush(Capture(whole=True))
    await session.discard()
    assert world.files() == {}
    assert world.bucket() == {"ck/a": b"x"}


async def test_inputs_that_the_program_deletes_stay_in_storage_although_they_are_published_to(world: World) -> None:
    """Deletion is mirrored in `during` alone (DESIGN 6.2)."""
    await world.put(io__input=b"I")
    session = world.session(before=world.folder("io/"), after=world.folder("io/"))
    await session.restore()
    (world.work / "data/input").unlink()
    world.write("data/output", b"O")
    await session.publish()
    assert world.bucket() == {"io/input": b"I", "io/output": b"O"}
