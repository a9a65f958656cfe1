"""A drain in each phase: what is begun is brought to a safe end inside the grace period, and the job handed back."""

from __future__ import annotations

import math

import anyio
import pytest

from heeler.job import Ending, Outcome, Result
from heeler.sources.base import LeaseLostError
from tests.support.leases import HANG, OUT_OF_REACH, ScriptedDelivery, ScriptedLease
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_forwarder import TRANSIENT, World, failing, hang

pytestmark = pytest.mark.anyio

GRACE = 30.0


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


async def drained(world: World, after: float, limit: float = 600.0) -> float:
    """Run, drain after so many seconds, and return how long the end took from there on."""
    async with anyio.create_task_group() as group:

        async def drain() -> None:
            await anyio.sleep(after)
            world.drain.begin("SIGTERM")

        group.start_soon(drain)
        took = await world.run(limit)
    return took - after


async def test_while_waiting_for_a_job_a_drain_ends_at_once() -> None:
    world = World(HANG, verdict=None)
    assert await drained(world, 5.0) < 0.1
    assert len(world.source.received) == 1


async def test_while_the_queue_is_out_of_reach_a_drain_ends_at_once() -> None:
    world = World(*[OUT_OF_REACH] * 500, verdict=None)
    assert await drained(world, 60.0) < 0.1


async def test_a_lease_that_came_in_the_moment_of_the_drain_is_handed_back_unstarted() -> None:
    lease = ScriptedLease()
    world = World(lease)
    world.drain.begin("SIGTERM")
    await world.run()
    assert world.source.received == []

    other = World(lease, verdict=None)
    receive = other.source.receive

    async def taken_late(*, wait: float) -> object:
        found = await receive(wait=wait)
        with anyio.CancelScope(shield=True):
            await anyio.sleep(10)
        return found

    other.source.receive = taken_late  # type: ignore[method-assign,assignment]
    await drained(other, 5.0)
    assert lease.how == ["release"]
    assert other.delivery.delivered == []
    assert other.status.outcomes == {"release": 1}


async def test_during_the_restore_the_job_is_handed_back_without_starting_the_program() -> None:
    lease = ScriptedLease()
    world = World(lease, hooks={"restore": hang})
    assert await drained(world, 5.0) < 0.1
    assert lease.how == ["release"]
    assert lease.settled[0][1]["delay"] == 0
    assert world.delivery.delivered == []
    assert "flush whole" not in world.calls


async def test_during_the_run_the_program_is_stopped_its_files_are_flushed_and_the_job_handed_back() -> None:
    lease = ScriptedLease()
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf, stop_seconds=3.0))
    assert 3.0 <= await drained(world, 5.0) < 3.1
    assert lease.how == ["release"]
    assert "flush done" in world.calls
    assert "flush whole" in world.calls
    assert "publish" not in world.calls


async def test_a_program_that_ended_well_before_the_drain_is_published_and_reported_done() -> None:
    async def slow() -> None:
        await anyio.sleep(10)

    lease = ScriptedLease()
    world = World(lease, hooks={"flush": slow, "publish": slow})
    assert await drained(world, 5.0) < GRACE
    assert lease.how == ["complete"]


@pytest.mark.parametrize("phase", ["flush", "publish"])
async def test_an_upload_that_does_not_end_in_time_is_given_up_and_the_job_handed_back_before_the_deadline(
    phase: str,
) -> None:
    lease = ScriptedLease()
    world = World(lease, hooks={phase: hang}, grace=GRACE)
    took = await drained(world, 5.0)
    assert GRACE - 2 <= took <= GRACE
    assert lease.how == ["release"]
    assert "grace_over" in world.names()


async def never_unwinds() -> None:
    """A call in a thread that hangs: cancelling does not end it (here it ends long after the deadline)."""
    with anyio.CancelScope(shield=True):
        await anyio.sleep(2 * GRACE)


async def test_a_job_is_handed_back_beside_a_call_that_can_not_be_cancelled() -> None:
    lease = ScriptedLease()
    world = World(lease, hooks={"flush": never_unwinds}, grace=GRACE)
    await drained(world, 5.0)
    assert lease.how[0] == "release"
    assert lease.tries[0] <= world.drain.deadline.at
    assert "grace_over" in world.names()


async def test_a_job_that_is_lost_while_a_call_hangs_is_not_handed_back_and_nothing_breaks() -> None:
    lease = ScriptedLease(settle_answers=[LeaseLostError("another has it"), LeaseLostError("another has it")])
    world = World(lease, hooks={"flush": never_unwinds}, grace=GRACE)
    await drained(world, 5.0)
    assert lease.how == []
    assert [fields["told"] for name, fields in world.logged if name == "job_settled"] == [False]


async def test_a_program_that_does_not_stop_leaves_time_to_hand_the_job_back() -> None:
    lease = ScriptedLease()
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf, stop_seconds=math.inf), grace=GRACE)
    assert await drained(world, 5.0) <= GRACE
    assert lease.how == ["release"]


async def test_the_queue_is_told_again_until_the_deadline_and_not_beyond() -> None:
    lease = ScriptedLease(settle_answers=[OUT_OF_REACH] * 999)
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf), grace=GRACE)
    took = await drained(world, 5.0)
    assert GRACE - 0.6 <= took <= GRACE
    assert len(lease.tries) > 4
    assert lease.how == []
    assert world.settled()["told"] is False


async def test_a_queue_that_hangs_does_not_hold_us_beyond_the_deadline() -> None:
    lease = ScriptedLease(settle_answers=[HANG])
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf), grace=GRACE)
    assert await drained(world, 5.0) <= GRACE + 0.1


async def test_a_drain_while_settling_only_sets_the_deadline() -> None:
    lease = ScriptedLease(settle_answers=[OUT_OF_REACH] * 6)
    world = World(lease)
    await drained(world, 3.0)
    assert lease.how == ["complete"]


async def test_an_interruption_whose_flush_failed_does_not_count_as_a_failure_of_the_job() -> None:
    lease = ScriptedLease()
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf), hooks={"flush": failing(TRANSIENT)})
    await drained(world, 5.0)
    assert lease.how == ["release"]


async def test_hurrying_shortens_the_deadline_to_a_few_seconds() -> None:
    lease = ScriptedLease()
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf), hooks={"flush": hang}, grace=600.0)

    async def hurry() -> None:
        await anyio.sleep(20)
        world.drain.hurry()

    async with anyio.create_task_group() as group:
        group.start_soon(hurry)
        took = await drained(world, 5.0)
    assert 19 <= took <= 21
    assert lease.how == ["release"]


async def test_no_job_is_taken_after_the_drain() -> None:
    leases = [ScriptedLease(), ScriptedLease()]
    world = World(*leases, delivery=ScriptedDelivery(seconds=math.inf))
    await drained(world, 5.0)
    assert leases[1].tries == []
    assert len(world.source.received) == 1


async def test_a_second_request_changes_neither_deadline_nor_reason() -> None:
    world = World(grace=GRACE)
    assert world.drain.begin("first")
    deadline = world.drain.deadline.at
    await anyio.sleep(1)
    assert not world.drain.begin("second")
    assert (world.drain.deadline.at, world.drain.reason) == (deadline, "first")
    assert world.drain.left() == pytest.approx(GRACE - 1 - 0.5, abs=0.01), "half a second is kept for the exit itself"


async def test_a_failure_in_the_moment_of_the_drain_is_reported_as_the_failure_it_is() -> None:
    lease = ScriptedLease()
    failed = ScriptedDelivery(Ending(Outcome.RETRY, "exit code 1", Result(exit_code=1)), seconds=1.0)
    world = World(lease, delivery=failed, hooks={"flush": lambda: anyio.sleep(10)})
    await drained(world, 5.0)
    assert lease.how == ["retry"]
