"""The outbox: packs get to storage in the end, however slow the uplink, and nothing of it outlives its block."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from pathlib import Path

import anyio
import pytest

from heeler_sync.errors import AccessDeniedError, SyncError, TransientStoreError
from heeler_sync.paths import location
from heeler_sync.progress import Progress
from heeler_sync.snapshot import outbox
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.outbox import Outbox, sending
from heeler_sync.snapshot.packs import Pack
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import IMPATIENT, ScriptedStore, transient
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_snapshot_restore import keep_threads

pytestmark = pytest.mark.anyio

SLOW = 100.0
"""Seconds that one put takes on the slow uplink."""


def files_in(spool: Path) -> list[Path]:
    """All that waits in it, however it is laid out."""
    return [file for file in spool.rglob("*") if file.is_file()]


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_threads(monkeypatch)


class Uplink:
    """A store with an uplink as slow as told, and an outbox in front of it."""

    def __init__(self, spool: Path | None, seconds: float = 0.0) -> None:
        self.store = ScriptedStore(MemoryStore("bucket"))
        if seconds:
            self.store.scripts["put"] = [lambda: anyio.sleep(seconds)] * 10_000
        self.layout = Layout(self.store, location("bucket", "p/"), IMPATIENT)
        self.spool = spool
        self.progress = Progress(clock=anyio.current_time)
        self.sent: list[str] = []
        self.packs: dict[str, bytes] = {}

    def open(self) -> AbstractAsyncContextManager[Outbox]:
        return sending(self.layout, self.spool, self.progress, self._note)

    async def _note(self, pack: Pack) -> None:
        self.sent.append(pack.id)

    async def add(self, box: Outbox, count: int = 1) -> None:
        for _ in range(count):
            pack = Pack(new_id(1))
            self.packs[pack.id] = pack.id.encode() * 3
            await box.add(pack, self.packs[pack.id])

    def stored(self) -> dict[str, bytes]:
        return {key.removeprefix("p/.heeler/packs/"): data for key, data in self.store.objects().items()}

    def spooled(self) -> int:
        return len(files_in(self.spool)) if self.spool is not None else 0


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    return tmp_path / "state" / "spool"


async def test_when_the_block_ends_all_is_in_storage_and_told(spool: Path) -> None:
    uplink = Uplink(spool)
    async with uplink.open() as box:
        await uplink.add(box, 30)
    assert uplink.stored() == uplink.packs
    assert sorted(uplink.sent) == sorted(uplink.packs)
    assert uplink.progress.bytes_up == sum(map(len, uplink.packs.values())) == box.bytes


async def test_a_pack_is_told_only_after_it_is_in_storage(spool: Path) -> None:
    uplink = Uplink(spool)

    async def check(pack: Pack) -> None:
        assert pack.id in uplink.stored()
        uplink.sent.append(pack.id)

    async with sending(uplink.layout, spool, uplink.progress, check) as box:
        await uplink.add(box, 10)
    assert len(uplink.sent) == 10


async def test_a_fast_uplink_needs_no_disk(spool: Path) -> None:
    uplink = Uplink(spool, 0.05)
    async with uplink.open() as box:
        await uplink.add(box, 30)
    assert files_in(spool) == []


async def test_some_are_sent_at_a_time_and_no_more(spool: Path) -> None:
    uplink = Uplink(spool, 1.0)
    async with uplink.open() as box:
        await uplink.add(box, 20)
    assert uplink.store.most_at_once == outbox._AT_ONCE


async def test_what_a_slow_uplink_does_not_take_waits_on_disk_so_that_reading_goes_on(spool: Path) -> None:
    uplink = Uplink(spool, SLOW)
    started = anyio.current_time()
    async with uplink.open() as box:
        await uplink.add(box, 20)
        assert anyio.current_time() - started < SLOW / 4, "the capture waited for the uplink"
        assert uplink.spooled() == 20 - outbox._IN_MEMORY
        assert uplink.stored() == {}
    assert uplink.stored() == uplink.packs
    assert uplink.spooled() == 0


async def test_memory_that_came_free_is_used_again(spool: Path) -> None:
    uplink = Uplink(spool, 1.0)
    async with uplink.open() as box:
        await uplink.add(box, outbox._IN_MEMORY)
        await anyio.sleep(60.0)
        await uplink.add(box, outbox._IN_MEMORY)
        assert uplink.spooled() == 0


async def test_without_a_spool_the_reader_waits_for_room(spool: Path) -> None:
    uplink = Uplink(None, SLOW)
    started = anyio.current_time()
    async with uplink.open() as box:
        await uplink.add(box, 20)
        assert anyio.current_time() - started > SLOW
    assert uplink.stored() == uplink.packs


@pytest.mark.parametrize("spoil", ["write", "mkdir", "is a file"])
async def test_a_disk_that_takes_nothing_means_waiting_in_memory(
    spool: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    uplink = Uplink(spool, SLOW)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    if spoil == "is a file":
        spool.parent.parent.mkdir(exist_ok=True)
        spool.parent.write_bytes(b"")
    else:
        monkeypatch.setattr(Path, "write_bytes" if spoil == "write" else "mkdir", full)
    async with uplink.open() as box:
        await uplink.add(box, 20)
    assert uplink.stored() == uplink.packs


async def test_a_full_disk_leaves_no_half_written_file_behind(spool: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uplink = Uplink(spool, SLOW)
    write = Path.write_bytes

    def half(path: Path, data: bytes) -> int:
        write(path, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)
    async with uplink.open() as box:
        await uplink.add(box, 12)
        assert uplink.spooled() == 0
    assert uplink.stored() == uplink.packs


async def test_two_outboxes_that_share_a_spool_leave_each_others_packs_alone(spool: Path) -> None:
    """All folders of a session, and all sessions of a worker, are given one and the same spool folder."""
    slow, fast = Uplink(spool, SLOW), Uplink(spool)
    async with slow.open() as box:
        await slow.add(box, 12)
        waiting = slow.spooled()
        assert waiting
        async with fast.open() as other:
            await fast.add(other)
        assert slow.spooled() == waiting, "another folder's commit removed packs that wait for the uplink"
    assert slow.stored() == slow.packs


async def test_an_error_of_the_block_empties_the_spool_and_ends_the_sending(spool: Path) -> None:
    uplink = Uplink(spool, SLOW)

    async def capture() -> None:
        async with uplink.open() as box:
            await uplink.add(box, 12)
            raise ValueError("reading failed")

    with pytest.raises(ValueError, match="reading failed"):
        await capture()
    assert uplink.spooled() == 0
    puts = uplink.store.count("put")
    await anyio.sleep(10 * SLOW)
    assert uplink.store.count("put") == puts
    assert uplink.store.at_once == 0, "a put goes on after its outbox is closed"


async def test_a_pack_that_is_refused_for_good_ends_it_at_once_with_that_error(spool: Path) -> None:
    uplink = Uplink(spool, SLOW)
    uplink.store.scripts["put"].insert(3, AccessDeniedError("PutObject", "bucket", "k", "403"))

    async def capture() -> None:
        async with uplink.open() as box:
            await uplink.add(box, 12)
            await anyio.sleep(10**6)

    with pytest.raises(AccessDeniedError):
        await capture()
    assert uplink.spooled() == 0
    assert uplink.store.at_once == 0


async def test_a_refused_pack_ends_the_waiting_for_room_too() -> None:
    uplink = Uplink(None, 1.0)
    uplink.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")] * 4
    with anyio.fail_after(60), pytest.raises(AccessDeniedError):
        async with uplink.open() as box:
            await uplink.add(box, 50)


async def test_transient_failures_are_sent_again_and_patience_ends(spool: Path) -> None:
    uplink = Uplink(spool)
    uplink.store.scripts["put"] = [transient("PutObject"), None, transient("PutObject")] * 3
    async with uplink.open() as box:
        await uplink.add(box, 6)
    assert uplink.stored() == uplink.packs
    uplink.store.scripts["put"] = [transient("PutObject")] * 100_000
    with pytest.raises(TransientStoreError):
        async with uplink.open() as box:
            await uplink.add(box)


async def test_an_answer_that_was_lost_stores_and_tells_the_pack_once(spool: Path) -> None:
    uplink = Uplink(spool)
    uplink.store.scripts["put"] = [("after", transient("PutObject"))]
    async with uplink.open() as box:
        await uplink.add(box)
    assert uplink.stored() == uplink.packs
    assert uplink.sent == list(uplink.packs)


async def test_cancelled_it_leaves_neither_a_task_nor_a_file(spool: Path) -> None:
    uplink = Uplink(spool, SLOW)

    async def work() -> None:
        async with uplink.open() as box:
            await uplink.add(box, 12)
            await anyio.sleep_forever()

    async with anyio.create_task_group() as group:
        group.start_soon(work)
        await anyio.sleep(SLOW / 2)
        assert uplink.spooled()
        group.cancel_scope.cancel()
    assert uplink.spooled() == 0
    assert uplink.store.at_once == 0
    await anyio.sleep(10 * SLOW)
    assert uplink.stored() == {}


async def test_a_spooled_pack_that_can_not_be_read_again_is_an_error_of_ours(spool: Path) -> None:
    """A disk that fails is no bug: the commit fails and is tried again, the session lives on."""
    uplink = Uplink(spool, SLOW)

    async def capture() -> None:
        async with uplink.open() as box:
            await uplink.add(box, 12)
            for file in files_in(spool):
                file.unlink()

    with pytest.raises(SyncError):
        await capture()
