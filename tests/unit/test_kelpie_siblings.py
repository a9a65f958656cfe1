"""Kelpie's jobs on a machine with several workers, or one that can't do its jobs; and what the API says wrongly."""

from __future__ import annotations

import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from heeler.drain import Drain
from heeler.forwarder import Forwarder
from heeler.sources.base import (
    BARREN_LIMIT,
    LeaseLostError,
    LeaseState,
    SourceUnavailableError,
)
from heeler.sources.kelpie import KelpieSource
from heeler.sources.kelpie_http import NoSuchJobError
from heeler.sources.kelpie_record import JobRecord
from heeler.status import Status
from heeler.tasks import background
from tests.support.kelpie_reports import BAD, LAPSE, OK, REPORTS, SETTLES, once, settled, until, words
from tests.support.kelpie_script import Called, Room, taken
from tests.support.leases import ScriptedDelivery, ScriptedFiles
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
async def room(anyio_backend: object, tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    yield room
    assert room.wrong == []


# The locks of this machine.


async def test_of_two_workers_of_one_machine_one_has_a_job_whatever_the_api_says(room: Room) -> None:
    job_id = room.submit()
    lease = await taken(room.source("one", claims="shared"))
    sibling = room.source("two", claims="shared")
    await anyio.sleep(LAPSE)
    assert await sibling.receive(wait=0.5) is None
    assert room.calls("work") == ["work", "work"]
    assert "job_of_sibling" in room.events()
    await lease.complete(OK)  # it was handed out anew, but the sibling left word of that
    assert room.calls(*REPORTS) == ["completed"]
    assert room.job(job_id)["status"] == "completed"
    assert words(room) == []


async def test_a_job_that_a_sibling_was_given_goes_on_where_it_is(room: Room) -> None:
    """After an outage for both; the holder knows at its first heartbeat, and for good."""
    room.submit()
    lease = await taken(room.source("one", claims="shared"))
    sibling = room.source("two", claims="shared")
    for _ in range(3):
        await anyio.sleep(LAPSE)
        assert await sibling.receive(wait=3.0) is None
        assert len(words(room)) == 1
        assert words(room)[0].stat().st_mode & 0o777 == 0o600
        assert await lease.extend() is LeaseState.HELD
    await lease.retry("exit code 3", result=BAD, delay=1.0)
    assert room.calls(*REPORTS) == ["failed"]
    assert words(room) == []


@pytest.mark.parametrize("how", sorted(REPORTS))
@pytest.mark.parametrize("by", ["heartbeat", "report"])
async def test_word_of_a_sibling_that_comes_a_little_late_is_waited_for(room: Room, how: str, by: str) -> None:
    room.submit()
    lease = await taken(room.source("one", claims="shared"))
    sibling = room.source("two", claims="shared")
    await anyio.sleep(LAPSE)
    room.weather = once("heartbeat", "before")
    with pytest.raises(SourceUnavailableError):
        await sibling.receive(wait=0.5)
    assert words(room) == []

    async def later() -> None:
        await anyio.sleep(4.0)
        assert await sibling.receive(wait=0.5) is None

    async with anyio.create_task_group() as group:
        group.start_soon(later)
        if by == "heartbeat":
            assert await lease.extend() is LeaseState.HELD
        await REPORTS[how](lease)
    assert room.calls(*REPORTS) == [how]


@pytest.mark.parametrize("why", ["late", "one failed"])
async def test_without_word_a_job_that_was_handed_out_again_is_given_up_at_the_heartbeat(room: Room, why: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source("one", claims="shared"))
    if why == "late":
        await anyio.sleep(LAPSE)
        assert room.take("machine-1") == job_id
    else:
        room.weather = once("heartbeat", "before")
        with pytest.raises(SourceUnavailableError):
            await lease.extend()
        room.table._change(job_id, "started = ?", 1_713_600_000)
    start = anyio.current_time()
    assert await lease.extend() is LeaseState.LOST
    assert anyio.current_time() - start < 12.0
    with pytest.raises(LeaseLostError):
        await lease.complete(OK)


@pytest.mark.parametrize("what", ["another hand-out", "a link", "a folder", "nothing", "no text"])
async def test_only_word_of_this_very_hand_out_counts(room: Room, what: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source("one", claims="shared"))
    await anyio.sleep(LAPSE)
    assert room.take("machine-1") == job_id
    started = str(room.job(job_id)["started"])
    lock = next(path for path in (room.folder / "shared").rglob("*") if path.name == job_id)
    word = lock.with_name(job_id + "~started")
    if what == "a link":
        (room.folder / "elsewhere").write_text(started)
        word.symlink_to(room.folder / "elsewhere")
    elif what == "a folder":
        word.mkdir()
    else:
        word.write_bytes({"another hand-out": b"2020-01-01 00:00:00", "nothing": b"", "no text": b"\xff"}[what])
    assert await lease.extend() is LeaseState.LOST


async def test_word_for_an_earlier_holder_is_not_kept_for_the_next(room: Room) -> None:
    job_id = room.submit()
    lease = await taken(room.source("one", claims="shared"))
    await anyio.sleep(LAPSE)
    assert await room.source("two", claims="shared").receive(wait=0.5) is None
    assert len(words(room)) == 1
    lease._held.claim._file.close()  # type: ignore[attr-defined]  # as if it died
    await anyio.sleep(LAPSE)
    again = await taken(room.source("three", claims="shared"))
    assert again.job.id == job_id
    assert words(room) == []
    await again.complete(OK)


async def test_word_that_can_not_be_left_is_told_of(room: Room) -> None:
    room.submit()
    lease = await taken(room.source("one", claims="shared"))
    sibling = room.source("two", claims="shared")
    await sibling._connect()
    await anyio.sleep(LAPSE)

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    assert sibling._connected is not None
    sibling._connected.claims.leave_word = refuse  # type: ignore[method-assign,assignment]
    assert await sibling.receive(wait=0.5) is None
    assert ["No space left" in str(fields["error"]) for event, fields in room.faults if event == "job_of_sibling"] == [
        True
    ]
    assert await lease.extend() is LeaseState.LOST


# A machine that can't do its jobs.


async def hoarded(room: Room, source: KelpieSource, seconds: float) -> int:
    """How many jobs are taken within a time, of which none can be begun."""
    end, count = anyio.current_time() + seconds, 0
    while anyio.current_time() < end:
        lease = await source.receive(wait=end - anyio.current_time())
        if lease is not None:
            count += 1
            await lease.release("its folder is blocked", delay=5.0, fruitless=True)
    return count


async def test_a_machine_that_can_begin_nothing_takes_ever_fewer_jobs_and_says_so_once(room: Room) -> None:
    for _ in range(40):
        room.submit(heartbeat_interval=100_000)
    source = room.source()
    assert await hoarded(room, source, 4.0) == 1
    assert await hoarded(room, source, 5 + 10 + 20 + 40 - 8) == 3
    assert "machine_unfit_for_jobs" not in room.events()
    assert await hoarded(room, source, 10.0) == 1
    unfit = [fields for event, fields in room.faults if event == "machine_unfit_for_jobs"]
    assert [fields["error"] for fields in unfit] == ["its folder is blocked"]
    await hoarded(room, source, 3_600.0)
    assert await hoarded(room, source, 6_000.0) in (9, 10, 11), "every ten minutes at the least"
    assert room.events().count("machine_unfit_for_jobs") == 1


async def test_lanes_rest_together(room: Room) -> None:
    for _ in range(9):
        room.submit(heartbeat_interval=1_000)
    source = room.source()
    for lease in [await taken(source) for _ in range(4)]:
        await lease.release("no room", delay=5.0)
    assert await source.receive(wait=39.0) is None
    assert await source.receive(wait=2.0) is not None


@pytest.mark.parametrize("how", sorted(SETTLES))
async def test_a_job_that_ran_shows_that_the_machine_can(room: Room, how: str) -> None:
    for _ in range(9):
        room.submit(heartbeat_interval=1_000)
    source = room.source()
    long, *others = [await taken(source) for _ in range(6)]
    for lease in others:
        await lease.release("no room", delay=5.0)
    await SETTLES[how](long)
    assert await source.receive(wait=4.9) is None
    await (await taken(source)).release("no room", delay=5.0)
    assert await source.receive(wait=4.9) is None
    assert await source.receive(wait=0.5) is not None, "the rest begins anew"


async def test_what_the_machine_could_not_begin_counts_neither_way(room: Room) -> None:
    job_id = room.submit(heartbeat_interval=5)
    await (await taken(room.source())).release("told to stop", fruitless=True)
    for _ in range(2 * BARREN_LIMIT):
        await anyio.sleep(LAPSE)
        await (await taken(room.source())).release("no room", delay=5.0, fruitless=True)
    assert room.calls(*REPORTS) == []
    for _ in range(BARREN_LIMIT - 1):
        await anyio.sleep(LAPSE)
        await (await taken(room.source())).release("ran in vain", fruitless=True)
    await anyio.sleep(LAPSE)
    assert await room.source().receive(wait=0.5) is None, "the ten that ran are as many as ever"
    assert room.job(job_id)["num_failures"] == 1


async def test_a_program_that_asks_to_be_run_again_has_run(room: Room) -> None:
    """Its short rest says nothing of the machine; and it counts, or it would go on for ever."""
    room.submit(heartbeat_interval=5)
    source = room.source()
    for _ in range(BARREN_LIMIT):
        await (await taken(source, 30.0)).release("exit code 75", delay=1.0, fruitless=True)
    assert await source.receive(wait=30.0) is None
    assert room.calls(*REPORTS) == ["failed"]
    assert "machine_unfit_for_jobs" not in room.events()


# A wrong word.


@pytest.mark.parametrize("kind", ["heartbeat", "get", "completed", "failed"])
@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_job_that_is_wrongly_said_to_be_gone_is_kept_and_reported(room: Room, how: str, kind: str) -> None:
    room.submit()
    lease = await taken(room.source())

    def lie() -> Callable[[Called], Awaitable[None]]:
        left = [kind]

        async def between(call: Called) -> None:
            if call.kind in left:
                left.remove(call.kind)
                raise NoSuchJobError("Job not found")

        return between

    room.between = lie()
    try:
        assert await lease.extend() is LeaseState.HELD
    except SourceUnavailableError:
        assert await lease.extend() is LeaseState.HELD
    room.between = lie()
    await settled(partial(REPORTS[how], lease))
    assert room.calls(*REPORTS) == [how]


async def test_a_job_of_ours_that_is_handed_out_to_us_once_more_goes_on(room: Room) -> None:
    """As after an outage, where another lane asks for work before the job's own heartbeat is repeated."""
    job_id = room.submit()
    source = room.source()
    lease = await taken(source)
    await anyio.sleep(LAPSE)
    assert await source.receive(wait=0.5) is None
    assert room.calls("work") == ["work", "work"]
    assert "job_of_sibling" not in room.events()
    assert await lease.extend() is LeaseState.HELD
    await lease.complete(OK)
    assert room.job(job_id)["status"] == "completed"


async def test_while_it_is_not_known_which_hand_out_is_ours_it_is_asked_again(room: Room) -> None:
    room.submit()
    source = room.source()
    lease = await taken(source)
    await anyio.sleep(LAPSE)
    room.weather = once("get", "before")
    with pytest.raises(SourceUnavailableError):
        await source.receive(wait=0.5)
    assert await source.receive(wait=3.0) is None
    await lease.complete(OK)
    assert room.calls(*REPORTS) == ["completed"]


async def test_what_is_written_late_of_a_job_that_is_done_does_not_stay(room: Room) -> None:
    """The record is renewed for a new hand-out while a report is made a second time."""
    room.submit()
    source = room.source()
    lease = await taken(source)
    room.weather = once("completed", "before")
    with pytest.raises(SourceUnavailableError):
        await lease.complete(OK)
    await anyio.sleep(LAPSE)
    save = source._records.save

    async def slowly(record: JobRecord) -> None:
        await anyio.sleep(10.0)
        await save(record)

    source._records.save = slowly  # type: ignore[method-assign]
    async with anyio.create_task_group() as group:
        group.start_soon(partial(source.receive, wait=0.5))
        await anyio.sleep(1.0)
        await lease.complete(OK)
    assert room.calls(*REPORTS) == ["completed"]
    assert list(room.folder.glob("*/kelpie/*.job")) == []


async def test_a_job_with_which_a_sibling_failed_is_not_begun_by_who_was_never_sure_of_it(room: Room) -> None:
    """All that the API tells is that this machine has it, since `failed` leaves it as it is."""
    job_id = room.submit()
    room.weather = lambda call: "before" if call.kind == "heartbeat" else ""
    with pytest.raises(SourceUnavailableError):
        await room.source("one", claims="shared").receive(wait=0.5)
    room.weather = lambda call: ""
    await anyio.sleep(LAPSE)
    await (await taken(room.source("two", claims="shared"))).retry("exit code 3", result=BAD, delay=0.0)
    assert room.job(job_id)["machine_id"] == "machine-1"
    assert await room.source("one", claims="shared").receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]


async def test_a_job_whose_loss_was_heard_of_is_not_begun_here_while_its_program_may_still_run(room: Room) -> None:
    job_id = room.submit()
    source = room.source()
    lease = await taken(source)
    await anyio.sleep(LAPSE)
    assert room.take() == job_id
    assert await lease.extend() is LeaseState.LOST
    await anyio.sleep(LAPSE)
    assert await source.receive(wait=0.5) is None, "the other died, and we are asked; our lease is still somebody's"
    with pytest.raises(LeaseLostError):
        await lease.release()
    await anyio.sleep(LAPSE)
    assert (await taken(source)).job.id == job_id


async def test_after_a_loss_the_loop_lets_go_of_the_job_without_the_garbage_collector(room: Room) -> None:
    """The lock lives as long as the lease: nobody may keep that longer than the program runs."""
    job_id = room.submit()
    source = room.source()
    drain, files = Drain(30.0), ScriptedFiles([])
    status = Status(lambda *_: None, worker="w", source="kelpie")
    delivery = ScriptedDelivery(seconds=100.0)
    forwarder = Forwarder(source, delivery, lambda *_: files, drain, status, rng=random.Random(1))
    gc.collect()
    gc.disable()
    try:
        async with background(forwarder.run):
            await until(lambda: delivery.delivered)
            room.table._change(job_id, "machine_id = ?", "other")
            await until(lambda: delivery.cancelled)
            delivery.delivered.clear()
            await until(lambda: delivery.delivered)  # the other is silent, and nobody else asks
            assert anyio.current_time() < 1_000 + 2 * LAPSE
    finally:
        gc.enable()
    assert "job_of_sibling" not in room.events()
