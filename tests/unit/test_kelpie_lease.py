"""A job of Kelpie's in our hands, against the API's own rules in virtual time: whose it is, and what is reported."""

from __future__ import annotations

import gc
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import pytest

from heeler.drain import Drain
from heeler.forwarder import Forwarder
from heeler.job import Result
from heeler.lease import LeaseKeeper
from heeler.sources.base import (
    BARREN_LIMIT,
    JobCancelledError,
    Lease,
    LeaseLostError,
    LeaseState,
    SourceUnavailableError,
)
from heeler.sources.kelpie import KelpieSource
from heeler.sources.kelpie_http import NoSuchJobError
from heeler.sources.kelpie_record import JobRecord
from heeler.status import Status
from heeler.tasks import background
from tests.support.crashing import CrashError, Fuse, When
from tests.support.kelpie_script import INTERVAL, Called, Room, Weather, taken
from tests.support.leases import ScriptedDelivery, ScriptedFiles
from tests.support.virtual_time import VIRTUAL, run_virtual

pytestmark = pytest.mark.anyio

T = TypeVar("T")
OK, BAD = Result(exit_code=0), Result(exit_code=3)
LAPSE = 2 * INTERVAL + 1.0

Report = Callable[[Lease], Awaitable[None]]
REPORTS: dict[str, Report] = {
    "completed": lambda lease: lease.complete(OK),
    "failed": lambda lease: lease.retry("exit code 3", result=BAD, delay=1.0),
}
SETTLES: dict[str, Report] = {
    **REPORTS,
    "given up": lambda lease: lease.fail("never", result=BAD),
    "released": lambda lease: lease.release(),
}


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
async def room(anyio_backend: object, tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    yield room
    assert room.wrong == []


async def until(condition: Callable[[], object]) -> None:
    while not condition():  # noqa: ASYNC110 - in virtual time
        await anyio.sleep(0.1)


async def settled(call: Callable[[], Awaitable[None]]) -> None:
    """As the forwarder does it: again and again."""
    while True:
        try:
            return await call()
        except SourceUnavailableError:
            await anyio.sleep(0.2)


def once(kind: str, how: Weather) -> Callable[[Called], Weather]:
    """The next call of a kind fails so."""
    left = [how]
    return lambda call: left.pop() if call.kind == kind and left else ""


def words(room: Room) -> list[Path]:
    """What siblings have left for who has a lock."""
    return [path for path in (room.folder / "shared").rglob("*") if "~" in path.name]


# Whose it is.


@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_job_that_another_machine_has_by_now_is_not_reported(room: Room, how: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source())
    await anyio.sleep(LAPSE)
    assert room.take() == job_id
    with pytest.raises(LeaseLostError) as caught:
        await REPORTS[how](lease)
    assert not isinstance(caught.value, JobCancelledError)
    assert room.calls(*REPORTS) == []
    assert room.job(job_id)["machine_id"] == "other"


@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_cancelled_job_is_not_reported_and_said_to_be_cancelled(room: Room, how: str) -> None:
    job_id = room.submit()
    source = room.source()
    lease = await taken(source)
    room.cancel(job_id)
    with pytest.raises(JobCancelledError):
        await REPORTS[how](lease)
    await lease.withdraw()
    assert room.calls(*REPORTS) == []
    assert list(room.folder.glob("*/kelpie/*.job")) == []


@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_job_that_was_handed_out_again_to_the_same_machine_is_not_reported(room: Room, how: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source())
    await anyio.sleep(LAPSE)
    assert room.take("machine-1") == job_id
    with pytest.raises(LeaseLostError):
        await REPORTS[how](lease)
    assert room.calls(*REPORTS) == []


@pytest.mark.parametrize("how", sorted(REPORTS))
@pytest.mark.parametrize("end", ["completed", "failed"])
async def test_a_job_that_somebody_else_ended_is_lost(room: Room, how: str, end: str) -> None:
    job_id = room.submit(max_failures=1)
    lease = await taken(room.source())
    getattr(room.table, end)(room.job(job_id)["user_id"], job_id, "stranger")
    assert await lease.extend() is LeaseState.LOST
    with pytest.raises(LeaseLostError):
        await REPORTS[how](lease)
    assert room.calls(*REPORTS) == []


@pytest.mark.parametrize("status", ["pending", "paused", "completed"])
async def test_any_status_but_running_ends_the_lease(room: Room, status: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source())
    room.table._change(job_id, "status = ?", status)
    assert await lease.extend() is LeaseState.LOST
    assert await lease.extend() is LeaseState.LOST


async def test_a_job_that_the_api_forgot_is_lost(room: Room) -> None:
    for settle in (None, *SETTLES.values()):
        job_id = room.submit()
        lease = await taken(room.source())
        with room.table._database as database:
            database.execute("DELETE FROM jobs WHERE id = ?", (job_id,))
        if settle is None or settle is SETTLES["released"]:
            assert await lease.extend() is LeaseState.LOST
        if settle is not None:
            with pytest.raises(LeaseLostError):
                await settle(lease)
    assert room.calls(*REPORTS) == []


async def test_canceled_means_cancelled_only_if_the_job_says_so_too(room: Room) -> None:
    first, second = room.submit(), room.submit()
    source = room.source()
    cancelled, stolen = await taken(source), await taken(source)
    room.cancel(first)
    assert await cancelled.extend() is LeaseState.CANCELLED
    await cancelled.withdraw()
    await anyio.sleep(LAPSE)
    assert room.take() == second
    assert await stolen.extend() is LeaseState.LOST


async def test_canceled_is_a_loss_while_nobody_can_say_which(room: Room) -> None:
    job_id = room.submit()
    lease = await taken(room.source())
    room.cancel(job_id)
    room.weather = once("get", "before")
    assert await lease.extend() is LeaseState.LOST


# Races.


@pytest.mark.parametrize("late", ["machine-1", "machine-2"])
async def test_of_two_that_were_given_the_same_job_one_works_on_it(room: Room, late: str) -> None:
    """Each asks and looks in its own time; whoever is slower finds out before or after it has begun."""
    job_id = room.submit()
    room.table.race = 2
    room.latency = lambda: 0.0
    slow: dict[str, float] = {late: 0.5}

    async def wait(call: Called) -> None:
        await anyio.sleep(slow.get(call.machine, 0.1 if call.machine == "machine-2" else 0.2))

    room.between = wait
    leases: dict[str, Lease] = {}
    states: dict[str, list[LeaseState]] = {}

    async def work(machine: str) -> None:
        source = room.source(machine, machine)
        lease = await source.receive(wait=0.0)
        if lease is None:
            return
        leases[machine] = lease
        keeper = LeaseKeeper(lease, lambda *_: None, rng=random.Random(1), clock=anyio.current_time)
        states[machine] = []
        with anyio.move_on_after(2 * INTERVAL):
            await keeper.keep()
        states[machine].append(keeper.state)

    async with anyio.create_task_group() as group:
        group.start_soon(work, "machine-1")
        group.start_soon(work, "machine-2")
        with anyio.move_on_after(5):
            await anyio.sleep(5)
        held = [machine for machine in leases if states[machine] != [LeaseState.LOST]]
        assert held == [room.job(job_id)["machine_id"]], "two heartbeats at most"
    assert room.calls("work") == ["work", "work"]
    for machine, lease in leases.items():
        if machine in held:
            await lease.complete(OK)
        else:
            with pytest.raises(LeaseLostError):
                await lease.complete(OK)
    assert room.calls(*REPORTS) == ["completed"]


async def test_who_began_before_the_other_took_it_too_learns_of_it_at_the_first_heartbeat(room: Room) -> None:
    job_id = room.submit()
    room.table.race = 2
    lease = await taken(room.source())
    assert lease.extend_every is not None
    assert lease.extend_every <= 2.0
    assert room.take() == job_id, "read before we had it, written after"
    assert await lease.extend() is LeaseState.LOST
    assert room.job(job_id)["machine_id"] == "other"


async def test_who_lost_the_race_before_it_looked_is_given_nothing(room: Room) -> None:
    job_id = room.submit()
    room.table.race = 2

    async def overtake(call: Called) -> None:
        if call.kind == "heartbeat" and room.job(job_id)["machine_id"] == "machine-1":
            assert room.take() == job_id

    room.between = overtake
    source = room.source()
    assert await source.receive(wait=0.5) is None
    assert "job_not_ours" in room.events()
    assert list(room.folder.glob("*/kelpie/*.job")) == []


# Answers that get lost.


@pytest.mark.parametrize("weather", ["before", "after"])
@pytest.mark.parametrize("kind", ["work", "heartbeat", "get", "completed", "failed"])
@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_whatever_call_is_lost_the_job_is_reported_exactly_once(
    room: Room, how: str, kind: str, weather: Weather
) -> None:
    job_id = room.submit()
    source = room.source()
    room.weather = once(kind, weather)
    leases: list[Lease | None] = []

    async def take() -> None:
        leases.append(await source.receive(wait=3 * LAPSE))

    await settled(take)
    lease = leases[0]
    assert lease is not None
    room.weather = once(kind, weather)
    try:
        assert await lease.extend() is LeaseState.HELD
    except SourceUnavailableError:
        assert await lease.extend() is LeaseState.HELD
    room.weather = once(kind, weather)
    await settled(partial(REPORTS[how], lease))
    assert room.job(job_id)["num_failures"] == (how == "failed")
    assert room.job(job_id)["status"] == ("running" if how == "failed" else "completed")
    assert room.calls("completed", "failed").count(how) == 1


@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_heartbeat_that_sees_our_own_report_does_not_take_the_job_from_us(room: Room, how: str) -> None:
    """The report took effect, its answer was lost, and the keeper asks before the report is made again."""
    job_id = room.submit(max_failures=1)
    lease = await taken(room.source())
    room.weather = once(how, "after")
    with pytest.raises(SourceUnavailableError):
        await REPORTS[how](lease)
    assert room.job(job_id)["status"] == how
    assert await lease.extend() is LeaseState.HELD
    await REPORTS[how](lease)
    assert room.calls(*REPORTS) == [how]


async def test_a_heartbeat_that_is_answered_after_the_report_does_not_take_the_job_from_us(room: Room) -> None:
    room.submit()
    lease = await taken(room.source())
    states: list[LeaseState] = []

    async def slowly(call: Called) -> None:
        await anyio.sleep(3.0 if call.kind == "heartbeat" and not room.calls("completed") else 0.0)

    async def beat() -> None:
        states.append(await lease.extend(progressed=True))

    room.between = slowly
    async with anyio.create_task_group() as group:
        group.start_soon(beat)
        await anyio.sleep(0.1)
        await lease.complete(OK)
    assert states[0] in (LeaseState.HELD, LeaseState.LOST)
    assert list(room.folder.glob("*/kelpie/*.job")) == [], "nor is it kept any more"


async def test_what_became_of_a_lease_is_not_told_twice_nor_asked_again(room: Room) -> None:
    for name, settle in SETTLES.items():
        room.submit()
        lease = await taken(room.source(name, name))
        await settle(lease)
        before = len(room.called)
        await settle(lease)
        assert await lease.extend() is LeaseState.LOST
        assert len(room.called) == before


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


# Attempts without anything durable.


async def test_ten_attempts_in_a_row_without_anything_durable_are_one_failure(room: Room) -> None:
    job_id = room.submit(max_failures=2)
    for attempt in range(1, BARREN_LIMIT + 1):
        lease = await taken(room.source())
        assert lease.attempt == attempt
        del lease
    assert room.calls(*REPORTS) == []
    source = room.source()
    assert await source.receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]
    assert room.job(job_id)["num_failures"] == 1
    assert "job_barren" in room.events()
    assert await room.source().receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]


async def test_fruitless_releases_count_like_crashes(room: Room) -> None:
    room.submit()
    source = room.source()
    for _ in range(BARREN_LIMIT):
        await (await taken(source)).release(fruitless=True)
        await anyio.sleep(LAPSE)
    assert await source.receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]


@pytest.mark.parametrize("what", ["progress", "release"])
async def test_what_becomes_durable_and_an_orderly_release_start_the_count_anew(room: Room, what: str) -> None:
    room.submit()
    for attempt in range(1, 3 * BARREN_LIMIT):
        lease = await taken(room.source())
        assert lease.attempt == attempt
        if attempt % BARREN_LIMIT == 0:
            await (lease.extend(progressed=True) if what == "progress" else lease.release())
        else:
            await lease.extend()
        del lease
    assert room.calls(*REPORTS) == []


async def test_starts_are_counted_only_where_the_job_was_begun(room: Room) -> None:
    room.submit()
    room.weather = lambda call: "before" if call.kind == "heartbeat" else ""
    for _ in range(3 * BARREN_LIMIT):
        with pytest.raises(SourceUnavailableError):
            await room.source().receive(wait=0.5)
    room.weather = lambda call: ""
    assert (await taken(room.source())).attempt == 1


async def test_a_job_that_failed_elsewhere_counts_that_as_attempts(room: Room) -> None:
    job_id = room.submit()
    room.take()
    room.table.failed(room.job(job_id)["user_id"], job_id, "other")
    await anyio.sleep(LAPSE)
    lease = await taken(room.source())
    assert (lease.attempt, lease.attempts_ordered) == (2, False)
    await lease.retry("exit code 1", result=BAD, delay=0.0)
    assert room.job(job_id)["num_failures"] == 2


# How long it is ours.


async def test_it_is_ours_from_before_the_heartbeat_that_confirmed_it(room: Room) -> None:
    room.submit(heartbeat_interval=10)
    room.latency = lambda: 1.0
    start = anyio.current_time()
    lease = await taken(room.source())
    waited = anyio.current_time() - start
    assert waited >= 4.0
    assert lease.expires_after == pytest.approx(19.0 - 4.0), "since the heartbeat was sent"
    assert await lease.extend() is LeaseState.HELD
    assert lease.expires_after == 19.0
    assert lease.extend_every == 10.0


@pytest.mark.parametrize("seed", range(20))
def test_nobody_is_given_a_job_while_its_holder_is_certain_of_it(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    run_virtual(_certain, tmp_path, random.Random(seed))


async def _certain(folder: Path, rng: random.Random) -> None:
    room = Room(folder, offset=rng.random())
    interval = rng.choice([1, 2, 3, 10])
    job_id = room.submit(heartbeat_interval=interval)
    room.latency = lambda: rng.choice([0.0, 0.01, 0.3, 1.0])
    lease = await taken(room.source())
    keeper = LeaseKeeper(lease, lambda *_: None, rng=rng, clock=anyio.current_time)
    end = anyio.current_time() + 40 * interval
    room.weather = lambda _call: "before" if rng.random() < 0.7 else ""
    async with background(keeper.keep):
        while anyio.current_time() < end:
            await anyio.sleep(rng.random() * 0.2 * interval)
            if room.take() == job_id:
                assert not keeper.certain()
                return


# Crashes.


async def drive(source: KelpieSource, report: Report) -> bool:
    """One process: takes a job, keeps it, ends it. Whether it had one."""
    lease = await source.receive(wait=0.5)
    if lease is None:
        return False
    await lease.extend(progressed=True)
    await report(lease)
    return True


@pytest.mark.parametrize("meanwhile", ["nothing", "lapse", "other machine"])
@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
@pytest.mark.parametrize("how", ["completed", "failed", "released"])
async def test_a_process_that_dies_at_any_operation_leaves_nothing_wrong(
    room: Room, how: str, when: When, meanwhile: str
) -> None:
    """At each call and each change on disk; what its heir does is watched by the referee, too."""
    fuse = Fuse()
    rehearsed = room.submit()
    assert await drive(room.source("rehearsal", "rehearsal", fuse=fuse), SETTLES[how])
    names = [name for _, name in fuse.operations]
    assert len(names) > 6
    assert {"work", "save", "heartbeat", "get"} <= {*names}
    room.cancel(rehearsed)
    for number, name in enumerate(names):
        where = f"{number}: {name} {when.value}"
        # Nobody can know of a job whose hand-out was not heard or not noted: it lapses.
        unknown = (number, when) in ((names.index("work"), When.AFTER), (names.index("save"), When.BEFORE))
        job_id = room.submit()
        state, room.called = f"state-{number}", []
        died = False
        try:
            await drive(room.source(state, state, fuse=Fuse(number, when)), SETTLES[how])
        except CrashError:
            died = True
        assert died, where
        told = [call.kind for call in room.called if call.kind in REPORTS]
        if meanwhile == "lapse":
            await anyio.sleep(LAPSE)
        if meanwhile == "other machine":
            await anyio.sleep(LAPSE)
            had = room.take("other")
            assert (had == job_id) is (told != ["completed"]), where
        room.called = []
        had_it = await drive(room.source(state, state), REPORTS["completed"])
        reports = told + [call.kind for call in room.called if call.kind in REPORTS]
        job = room.job(job_id)
        if meanwhile == "other machine":
            assert not had_it, where
            assert reports == told, where
        elif how == "released":
            assert had_it is (not unknown or meanwhile == "lapse"), where
        elif meanwhile == "nothing" and unknown:
            assert not had_it, where
        else:
            assert reports in ([how], ["completed"]), where
            assert job["num_failures"] == reports.count("failed"), where
            assert (job["status"] == "completed") is ("completed" in reports), where
            if not had_it:
                assert reports == [how], where
        await anyio.sleep(LAPSE)
        room.table.cancel(job["user_id"], job_id)
        assert room.wrong == [], where


@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_verdict_that_the_api_never_heard_is_told_by_the_next_process(room: Room, how: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source())
    room.weather = lambda call: "before" if call.kind in REPORTS else ""
    with pytest.raises(SourceUnavailableError):
        await REPORTS[how](lease)
    room.weather = lambda call: ""
    assert await room.source().receive(wait=0.5) is None, "it is not begun again"
    assert room.calls(*REPORTS) == [how]
    assert room.job(job_id)["num_failures"] == (how == "failed")


async def test_a_verdict_in_doubt_keeps_nobody_from_other_jobs(room: Room) -> None:
    room.submit()
    lease = await taken(room.source())
    room.weather = lambda call: "before" if call.kind in (*REPORTS, "get") and call.job_id == lease.job.id else ""
    with pytest.raises(SourceUnavailableError):
        await lease.complete(OK)
    other = room.submit()
    source = room.source()
    assert (await taken(source)).job.id == other
    room.weather = lambda call: ""
    assert await source.receive(wait=3.0) is None
    assert room.calls(*REPORTS) == ["completed"]


async def test_a_job_in_doubt_is_held_onto_while_it_may_be_ours_and_no_other_is_taken(room: Room) -> None:
    first, second = room.submit(), room.submit()
    source = room.source()
    room.weather = lambda call: "before" if call.job_id == first else ""
    start = anyio.current_time()
    while anyio.current_time() - start < 2 * INTERVAL:
        with pytest.raises(SourceUnavailableError):
            await source.receive(wait=1.0)
        assert room.calls("work") == ["work"]
        await anyio.sleep(0.5)
    with pytest.raises(SourceUnavailableError):  # it lapsed, so there may be others; but it is the first of them
        await source.receive(wait=3.0)
    assert room.calls("work") == ["work", "work"]
    room.weather = lambda call: ""
    assert [(await taken(source)).job.id for _ in range(2)] == [first, second]


async def test_a_report_of_an_earlier_process_cannot_be_overtaken_by_a_hand_out(room: Room) -> None:
    """The job has been silent for long; between our question and our report it would be somebody else's."""
    job_id = room.submit()
    lease = await taken(room.source())
    room.weather = lambda call: "before" if call.kind == "completed" else ""
    with pytest.raises(SourceUnavailableError):
        await lease.complete(OK)
    room.weather = lambda call: ""
    await anyio.sleep(LAPSE)

    async def snatch(call: Called) -> None:
        if call.kind == "completed":
            room.take()

    room.between = snatch
    await room.source().receive(wait=0.5)
    assert room.calls("completed") == ["completed"]
    assert room.job(job_id)["status"] == "completed"


# All of it at once.


@pytest.mark.parametrize("seed", range(25))
def test_random_crews_on_bad_days(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    run_virtual(_crews, tmp_path, random.Random(seed))


async def _crews(folder: Path, rng: random.Random) -> None:
    """Two machines with two workers each, which crash, release, fail and lose calls; the referee watches."""
    room = Room(folder, offset=rng.random())
    bad = rng.choice([0.0, 0.05, 0.2])
    calm = False

    def weather(_call: Called) -> Weather:
        if calm or rng.random() >= bad:
            return ""
        return "before" if rng.random() < 0.5 else "after"

    room.weather = weather
    room.latency = lambda: rng.choice([0.0, 0.02, 0.5])
    room.table.race = rng.choice([0, 2, 5])
    jobs = [room.submit(heartbeat_interval=rng.choice([2, 5]), max_failures=9) for _ in range(4)]
    working: dict[tuple[str, str], int] = {}

    @asynccontextmanager
    async def program(machine: str, lease: Lease) -> AsyncIterator[None]:
        key = (machine, lease.job.id)
        working[key] = working.get(key, 0) + 1
        assert working[key] == 1, f"{key} is run twice at once"
        try:
            yield
        finally:
            working[key] -= 1

    async def life(machine: str, name: str) -> None:
        """A process; its locks go with it, and so do its leases."""
        fuse = Fuse(rng.randrange(5, 60) if rng.random() < 0.6 else None, rng.choice([When.BEFORE, When.AFTER]))
        source = room.source(name, machine, claims=f"claims-{machine}", fuse=None if calm else fuse)
        claims: list[object] = []
        try:
            for _ in range(rng.randrange(1, 6)):
                try:
                    lease = await source.receive(wait=rng.random() * 5)
                except SourceUnavailableError:
                    await anyio.sleep(rng.random())
                    continue
                if lease is not None:
                    claims.append(lease._held.claim)  # type: ignore[attr-defined]
                    await one_job(machine, lease)
        except CrashError:
            pass
        finally:
            for claim in claims:
                claim._file.close()  # type: ignore[attr-defined]
            del source
        await anyio.sleep(rng.random())

    async def one_job(machine: str, lease: Lease) -> None:
        keeper = LeaseKeeper(lease, lambda *_: None, rng=rng, clock=anyio.current_time)
        async with program(machine, lease), background(keeper.keep):
            with keeper.ended.ends():
                await anyio.sleep(rng.choice([0.1, 3.0, 12.0]))
                end = rng.choice(["completed", "completed", "failed", "released"]) if not calm else "completed"
                try:
                    await settled(lambda: SETTLES[end](lease))
                except LeaseLostError:
                    return
        if keeper.state is LeaseState.CANCELLED:
            await lease.withdraw()

    async def worker(machine: str, name: str) -> None:
        while not all(room.job(job_id)["status"] in ("completed", "failed") for job_id in jobs):
            await life(machine, name)
            if anyio.current_time() > 1_000 + 3_000:
                return

    with anyio.fail_after(5_000):
        async with anyio.create_task_group() as group:
            for machine in ("machine-1", "machine-2"):
                for name in ("a", "b"):
                    group.start_soon(worker, machine, f"{machine}-{name}")
            await anyio.sleep(300)
            calm = True
            for number in range(4):
                group.start_soon(worker, f"fresh-{number}", f"fresh-{number}")
    assert room.wrong == []
    assert {room.job(job_id)["status"] for job_id in jobs} <= {"completed", "failed"}
