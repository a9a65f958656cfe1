"""Folders whose objects are gzipped, from restore to the last upload: what a Kelpie worker would find and leave."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from heeler_sync.paths import parse_location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session, SyncFolder
from heeler_sync.settle import SettleTimes
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import Events, ScriptedStore, transient, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A bucket, and a machine with folders."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.store = ScriptedStore(MemoryStore("bucket"))
        self.events = Events()
        self.checkpoints = SyncFolder(parse_location("s3://bucket/ck/"), work / "ck", gzip=True)
        self.outputs = SyncFolder(parse_location("s3://bucket/out/"), work / "out", gzip=True)

    async def put(self, **objects: bytes) -> None:
        for key, data in objects.items():
            await self.store.inner.put(key.replace("__", "/").replace("_gz", ".gz"), data)

    def session(self, plan: Plan | None = None) -> Session:
        plan = plan or Plan((self.checkpoints,), (self.checkpoints,), (self.outputs,))
        times = SettleTimes(debounce=0.02, open_wait=0.3)
        return Session(plan, lambda _: self.store, permit=AlwaysPermitted(), on_event=self.events, times=times)

    def bucket(self) -> Mapping[str, bytes]:
        """What is stored, unpacked where its name says that it is packed."""
        found = self.store.objects()
        return {key: gzip.decompress(data) if key.endswith(".gz") else data for key, data in found.items()}

    def files(self) -> Mapping[str, bytes]:
        root = self.work / "ck"
        found = (path for path in root.rglob("*") if path.is_file() and ".heeler" not in path.parts)
        return {str(path.relative_to(root)): path.read_bytes() for path in found}


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_what_kelpie_left_is_gone_on_from_and_what_is_left_is_kelpies(world: World) -> None:
    await world.put(ck__step_gz=gzip.compress(b"7"), ck__sub__old_gz=gzip.compress(b"old"), ck__plain=b"plain")
    await world.put(ck__same_gz=gzip.compress(b"same"))
    session = world.session()
    await session.restore()
    assert world.files() == {"step": b"7", "sub/old": b"old", "plain": b"plain", "same": b"same"}
    ck = world.work / "ck"
    async with session.watching():
        (ck / "step").write_bytes(b"8" * 1000)
        (ck / "sub/old").unlink()
        (ck / "new.gz").write_bytes(b"not a gzip, only called so")
        await until(lambda: "ck/sub/old.gz" not in world.bucket())
        (ck / "last").write_bytes(b"")
        await session.flush(Capture(whole=True))
    (world.work / "out/result").write_bytes(b"42")
    await session.publish()
    assert world.bucket() == {
        "ck/step.gz": b"8" * 1000,
        "ck/plain": b"plain",
        "ck/same.gz": b"same",
        "ck/new.gz.gz": b"not a gzip, only called so",
        "ck/last.gz": b"",
        "out/result.gz": b"42",
    }
    assert "object_replaced" not in world.events.names()
    await session.discard()
    assert world.files() == {}
    assert not (world.work / "out/result").exists()
    session.close()


async def test_a_plain_object_that_changes_or_goes_does_not_come_back(world: World) -> None:
    await world.put(ck__changed=b"1", ck__gone=b"1")
    session = world.session()
    await session.restore()
    async with session.watching():
        (world.work / "ck/changed").write_bytes(b"two")
        (world.work / "ck/gone").unlink()
        await session.flush(Capture(whole=True))
    session.close()
    assert world.bucket() == {"ck/changed": b"1", "ck/changed.gz": b"two"}
    assert "object_replaced" not in world.events.names()
    again = world.session()
    await again.restore()
    assert world.files() == {"changed": b"two"}
    again.close()


async def test_what_is_in_place_is_neither_fetched_nor_sent_again(world: World) -> None:
    session = world.session()
    await session.restore()
    async with session.watching():
        (world.work / "ck/step").write_bytes(b"1" * 100_000)
        await session.flush(Capture(whole=True))
    session.close()
    world.store.calls.clear()
    again = world.session()
    await again.restore()
    async with again.watching():
        await again.flush(Capture(whole=True))
    again.close()
    assert again.progress.files_kept == 1
    assert world.store.count("download") == world.store.count("put") == 0


async def test_another_workers_object_is_noticed_before_it_is_replaced(world: World) -> None:
    session = world.session()
    await session.restore()
    async with session.watching():
        (world.work / "ck/step").write_bytes(b"1")
        await until(lambda: "ck/step.gz" in world.bucket())
        await world.put(ck__step_gz=gzip.compress(b"another's"))
        (world.work / "ck/step").write_bytes(b"22")
        await session.flush(Capture(whole=True))
    session.close()
    assert "object_replaced" in world.events.names()
    assert world.bucket() == {"ck/step.gz": b"22"}


async def test_an_upload_whose_answer_was_lost_is_known_again(world: World) -> None:
    session = world.session()
    await session.restore()
    async with session.watching():
        (world.work / "ck/step").write_bytes(b"1")
        await until(lambda: "ck/step.gz" in world.bucket())
        world.store.scripts["put"] = [("after", transient("PutObject"))]
        (world.work / "ck/step").write_bytes(b"22")
        await session.flush(Capture(whole=True))
    session.close()
    assert "object_replaced" not in world.events.names()
    assert world.bucket() == {"ck/step.gz": b"22"}


async def test_a_snapshot_takes_over_what_kelpie_left_and_keeps_its_own_format(world: World) -> None:
    await world.put(ck__step_gz=gzip.compress(b"7"), ck__sub__old_gz=gzip.compress(b"old"))
    folder = replace(world.checkpoints, snapshot=True)
    for turn in range(2):
        session = world.session(Plan((folder,), (folder,)))
        await session.restore()
        assert world.files() == {"step": b"7" if turn == 0 else b"8", "sub/old": b"old"}
        async with session.watching():
            (world.work / "ck/step").write_bytes(b"8")
            await session.flush(Capture(whole=True))
        await session.discard()
        session.close()
    plain = {key for key in world.store.objects() if not key.startswith("ck/.heeler/")}
    assert plain == {"ck/step.gz", "ck/sub/old.gz"}
    assert not any(key.endswith(".gz") for key in world.store.objects() if key.startswith("ck/.heeler/"))


async def test_folders_that_are_not_gzipped_are_left_as_they_are(world: World) -> None:
    await world.put(ck__step_gz=gzip.compress(b"7"))
    folder = replace(world.checkpoints, gzip=False)
    session = world.session(Plan((folder,), (folder,)))
    await session.restore()
    session.close()
    assert world.files() == {"step.gz": gzip.compress(b"7")}
