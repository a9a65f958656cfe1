"""What a program may leave behind at its end, and what becomes of the job's head."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import anyio
import anyio.to_thread
import pytest

from heeler_sync.paths import Location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session, SnapshotSettings, SyncFolder
from heeler_sync.snapshot.head import decode_head
from heeler_sync.snapshot.holder import Claim
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import Events
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


async def test_a_program_that_removes_its_folder_at_its_end_has_done_its_job(tmp_path: Path) -> None:
    store, events = MemoryStore("b"), Events()
    folder = SyncFolder(Location("b", "p/"), tmp_path / "data", snapshot=True)
    session = Session(
        Plan(before=(folder,), during=(folder,)),
        lambda _: store,
        permit=AlwaysPermitted(),
        on_event=events,
        snapshots=SnapshotSettings(claim=Claim("job", "", 1, "worker")),
    )
    await session.restore()
    async with session.watching():
        (folder.path / "model").write_bytes(b"model")
        await anyio.to_thread.run_sync(time.sleep, 0.05)  # ticks of the kernel's clock take their time
        await session.checkpoint()
        shutil.rmtree(folder.path)
        session.freeze()
        await session.flush(Capture(whole=True), result={"exit_code": 0})
    await session.complete({"exit_code": 0})
    session.close()

    head = decode_head(store.objects()["p/.heeler/head.json"])
    assert (head.status, head.result) == ("complete", {"exit_code": 0})
    assert [kept.generation for kept in head.kept] == [1], "what was kept stays"
    assert "folder_replaced" in events.names()
