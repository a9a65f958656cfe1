"""A job of Kelpie's in our hands, against the API's own rules in virtual time: whose it is, and what is reported."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import anyio
import pytest

from heeler.lease import LeaseKeeper
from heeler.sources.base import (
    JobCancelledError,
    Lease,
    LeaseLostError,
    LeaseState,
    SourceUnavailableError,
)
from heeler.tasks import background
from tests.support.kelpie_reports import LAPSE, OK, REPORTS, SETTLES, once, settled
from tests.support.kelpie_script import INTERVAL, Called, Room, Weather, taken
from tests.support.virtual_time import VIRTUAL, run_virtual

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
async def room(anyio_backend: object, tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    yield room
    assert room.wrong == []


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
