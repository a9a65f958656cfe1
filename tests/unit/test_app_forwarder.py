"""Several jobs at a time, an app that comes and goes, and tries that are made here first; in virtual time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import anyio
import pytest

from heeler.app.base import Assignment, GivenUp
from heeler.drain import Drain
from heeler.forwarder import Forwarder
from heeler.job import Ending, InvalidJobError, Job, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.platform.failures import FailuresInARow
from heeler.sources.base import Lease, LeaseState
from heeler.status import Status
from tests.support.leases import (
    HANG,
    OUT_OF_REACH,
    Hook,
    ScriptedDelivery,
    ScriptedFiles,
    ScriptedLease,
    ScriptedSource,
)
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

DONE = Ending(Outcome.DONE, "", Result(status=200), whole=True)
PASSING = Ending(Outcome.RETRY, "the app answered 503", Result(status=503), transient=True)
RELEASED = Ending(Outcome.RELEASE, "it asked for it")


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Noting(ScriptedSource):
    """Notes receives, pauses and how leases are settled, in one order."""

    def __init__(self, notes: list[str], *script: object, verdict: int | None = 0) -> None:
        super().__init__(*script, verdict=verdict)
        self.notes = notes
        self.waiting = 0

    async def pause(self) -> None:
        self.notes.append("pause")
        await super().pause()

    async def receive(self, *, wait: float) -> Lease | None:
        self.notes.append("receive")
        self.waiting += 1
        try:
            return await super().receive(wait=wait)
        finally:
            self.waiting -= 1


class NotedLease(ScriptedLease):
    def __init__(self, notes: list[str], job_id: str = "job-1", **facts: Any) -> None:
        super().__init__(job=Job(job_id, b"{}"), **facts)
        self.notes = notes

    async def _settle(self, how: str, **facts: Any) -> None:
        self.notes.append(f"{how} {self.job.id}")
        await super()._settle(how, **facts)


class Delivery(ScriptedDelivery):
    """Ends each delivery, in the order in which they began, as `endings` says, then done; notes who is together."""

    def __init__(self, *endings: Ending | Exception, seconds: float = 1.0) -> None:
        super().__init__(DONE, seconds)
        self.endings = list(endings)
        self.now: set[str] = set()
        self.together: list[set[str]] = []
        self.times: list[float] = []

    async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
        self.now.add(assignment.job.id)
        self.together.append(set(self.now))
        self.times.append(anyio.current_time())
        chosen = self.endings.pop(0) if self.endings else DONE
        try:
            ending = await super().deliver(assignment, drain)
            if drain.requested.is_set():
                return ending
            if isinstance(chosen, Exception):
                raise chosen
            return chosen
        finally:
            self.now.discard(assignment.job.id)


class World:
    def __init__(
        self,
        ids: Sequence[str] = ("job-1",),
        delivery: ScriptedDelivery | None = None,
        *,
        hooks: Mapping[str, Hook] | None = None,
        verdict: int | None = 0,
        spends_tries: bool = False,
        lease: Mapping[str, Any] | None = None,
        **limits: Any,
    ) -> None:
        self.notes: list[str] = []
        self.leases = [NotedLease(self.notes, job_id, **(lease or {})) for job_id in ids]
        for made in self.leases:
            made.spends_tries = spends_tries
        self.source = Noting(self.notes, *self.leases, verdict=verdict)
        self.delivery = delivery or Delivery()
        self.drain = Drain(30.0)
        self.logged: list[tuple[str, dict[str, object]]] = []
        self.status = Status(lambda _level, name, fields: self.logged.append((name, fields)), worker="w", source="s")
        self.files: list[ScriptedFiles] = []
        self.hooks = hooks
        self.forwarder = Forwarder(
            self.source, self.delivery, self._open, self.drain, self.status, rng=random.Random(1), **limits
        )

    def _open(self, lease: Lease, keeper: LeaseKeeper) -> ScriptedFiles:
        if lease.job.id == "poison":
            raise InvalidJobError("sync.before", "is bad")
        self.files.append(ScriptedFiles([], self.hooks))
        return self.files[-1]

    async def run(self, limit: float = 3600.0) -> float:
        begun = anyio.current_time()
        with anyio.fail_after(limit):
            await self.forwarder.run()
        assert all(files.closed for files in self.files)
        return anyio.current_time() - begun

    def how(self) -> list[list[str]]:
        return [lease.how for lease in self.leases]


# Several at a time.


async def test_as_many_jobs_as_asked_are_with_the_app_at_a_time() -> None:
    delivery = Delivery(seconds=10)
    world = World([f"j{n}" for n in range(8)], delivery, concurrency=4)
    assert await world.run() == pytest.approx(20, abs=1)
    assert max(len(jobs) for jobs in delivery.together) == 4
    assert world.how() == [["complete"]] * 8


async def test_every_event_of_a_job_names_that_job() -> None:
    world = World(["a", "b", "c"], Delivery(RELEASED, DONE, PASSING, seconds=10), concurrency=3)
    await world.run()
    outcomes = {fields["job_id"]: fields["outcome"] for name, fields in world.logged if name == "job_settled"}
    assert outcomes == {"a": "release", "b": "done", "c": "retry"}
    for job in "abc":
        phases = [fields["phase"] for name, fields in world.logged if name == "phase" and fields.get("job_id") == job]
        assert phases == ["restore", "run", "upload", "settle"]


async def test_the_status_shows_all_jobs_and_none_when_they_are_over() -> None:
    world = World(["a", "b", "c"], Delivery(seconds=10), concurrency=3)
    shown: list[list[tuple[object, object]]] = []

    async def look() -> None:
        await anyio.sleep(5)
        jobs = world.status.snapshot()["jobs"]
        shown.append([(job["job_id"], job["phase"]) for job in jobs])

    async with anyio.create_task_group() as group:
        group.start_soon(look)
        await world.run()
    assert shown == [[("a", "run"), ("b", "run"), ("c", "run")]]
    assert world.status.snapshot()["jobs"] == []
    assert world.status.outcomes == {"done": 3}


@pytest.mark.parametrize("concurrency", [1, 2, 3, 8])
@pytest.mark.parametrize("max_jobs", [1, 2, 5])
async def test_max_jobs_is_exact(concurrency: int, max_jobs: int) -> None:
    world = World([f"j{n}" for n in range(20)], concurrency=concurrency, max_jobs=max_jobs)
    await world.run()
    assert sum(how == ["complete"] for how in world.how()) == max_jobs
    assert sum(how == [] for how in world.how()) == 20 - max_jobs
    assert len(world.delivery.delivered) == max_jobs


@pytest.mark.parametrize("concurrency", [1, 2, 3])
@pytest.mark.parametrize("max_jobs", [1, 2])
async def test_interrupted_jobs_do_not_count_whatever_the_other_lanes_do(concurrency: int, max_jobs: int) -> None:
    world = World([f"j{n}" for n in range(20)], Delivery(*[RELEASED] * 3), concurrency=concurrency, max_jobs=max_jobs)
    await world.run()
    assert sum(how == ["complete"] for how in world.how()) == max_jobs
    assert sum(how == ["release"] for how in world.how()) == 3


async def test_a_job_in_any_lane_is_no_idleness() -> None:
    delivery = Delivery(seconds=100)
    world = World(["long"], delivery, concurrency=2, exit_when_idle=10.0, verdict=None)
    late = NotedLease(world.notes, "late")

    async def submit() -> None:
        await anyio.sleep(50)
        world.source.script.append(late)

    begun = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(submit)
        await world.run()
    assert world.how() == [["complete"]]
    assert late.how == ["complete"]
    assert delivery.times[1] - begun < 75, "the other lane is still there to take it"
    assert anyio.current_time() - delivery.times[1] == pytest.approx(100 + 10, abs=2)


async def test_lanes_that_are_idle_all_together_end_all() -> None:
    assert await World([], concurrency=4, exit_when_idle=10.0, verdict=None).run() == pytest.approx(10, abs=1)


async def test_a_bug_in_one_lane_ends_all_with_its_error_and_settles_nothing() -> None:
    world = World(["a", "b"], Delivery(KeyError("a bug"), seconds=10), concurrency=2)
    with pytest.raises(KeyError, match="a bug"):
        await world.run()
    assert world.how() == [[], []]


async def test_a_poisoned_message_ends_no_other_job() -> None:
    world = World(["a", "poison", "b"], Delivery(seconds=10), concurrency=2)
    await world.run()
    assert world.how() == [["complete"], ["fail"], ["complete"]]


async def test_a_lost_lease_stops_its_own_job_only() -> None:
    world = World(["a", "b"], Delivery(seconds=60), concurrency=2, lease={"expires_after": 30.0})
    world.leases[0].answers = [LeaseState.LOST]
    await world.run()
    assert world.how() == [[], ["complete"]]
    assert world.delivery.cancelled == 1


async def test_a_drain_hands_all_jobs_back() -> None:
    world = World(["a", "b", "c"], Delivery(seconds=1000), concurrency=3)

    async def ask() -> None:
        await anyio.sleep(50)
        world.drain.begin("SIGTERM")

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        assert await world.run() < 51
    assert world.how() == [["release"]] * 3


async def test_what_is_said_of_a_job_at_the_deadline_names_that_job() -> None:
    async def hang() -> None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(40)

    world = World(["a", "b"], Delivery(seconds=1000), concurrency=2, hooks={"flush": hang})

    async def ask() -> None:
        await anyio.sleep(50)
        world.drain.begin("SIGTERM")

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await world.run()
    said = [fields["job_id"] for name, fields in world.logged if name == "grace_over" and "error" in fields]
    assert sorted(map(str, said)) == ["a", "b"]


async def test_enough_failures_end_the_lanes_that_wait_too() -> None:
    failed = Ending(Outcome.FAIL, "the app answered 404", Result(status=404))
    delivery = Delivery(failed, failed)
    world = World(["a", "b"], delivery, concurrency=4, verdict=None, failures=FailuresInARow(2))
    assert await world.run() < 60


# Tried here first.


@pytest.mark.parametrize(("spends", "deliveries"), [(True, 3), (False, 1)])
async def test_a_passing_fault_is_tried_here_only_where_the_queues_tries_are_few(spends: bool, deliveries: int) -> None:
    delivery = Delivery(*[PASSING] * 9)
    world = World(delivery=delivery, spends_tries=spends, tries=3)
    await world.run()
    assert len(delivery.delivered) == deliveries
    assert world.how() == [["retry"]]
    assert sum(name == "tried_again_here" for name, _ in world.logged) == deliveries - 1


async def test_a_fault_that_has_passed_costs_nothing_at_the_queue() -> None:
    delivery = Delivery(PASSING, DONE)
    world = World(delivery=delivery, spends_tries=True, tries=3)
    await world.run()
    assert world.how() == [["complete"]]
    assert [files.calls[0] for files in world.files] == ["restore", "restore"], "each from the files in storage"


@pytest.mark.parametrize(
    "ending",
    [
        Ending(Outcome.RETRY, "the app answered 500", Result(status=500)),
        Ending(Outcome.FAIL, "the app answered 404", Result(status=404)),
        RELEASED,
    ],
)
async def test_any_other_end_is_told_at_once(ending: Ending) -> None:
    delivery = Delivery(ending)
    world = World(delivery=delivery, spends_tries=True, tries=3)
    await world.run()
    assert len(delivery.delivered) == 1


async def test_tries_here_rest_longer_each_time_and_as_long_as_the_app_asked() -> None:
    asks = Ending(Outcome.RETRY, "the app answered 429", Result(status=429), transient=True, delay=90.0)
    delivery = Delivery(PASSING, PASSING, asks, DONE, seconds=0.0)
    world = World(delivery=delivery, spends_tries=True, tries=9)
    await world.run()
    rests = [after - before for before, after in zip(delivery.times, delivery.times[1:], strict=False)]
    assert 0.5 <= rests[0] <= 1.1
    assert 1.0 <= rests[1] <= 2.1
    assert 90 <= rests[2] < 91


async def test_an_app_that_wants_to_rest_for_longer_than_five_minutes_does_so_without_the_job() -> None:
    asks = Ending(Outcome.RETRY, "the app answered 429", Result(status=429), transient=True, delay=301.0)
    world = World(delivery=Delivery(asks), spends_tries=True, tries=3)
    assert await world.run() < 10
    assert world.how() == [["retry"]]


async def test_a_drain_ends_the_rest_between_tries() -> None:
    asks = Ending(Outcome.RETRY, "the app answered 429", Result(status=429), transient=True, delay=250.0)
    world = World(delivery=Delivery(asks), spends_tries=True, tries=3)

    async def ask() -> None:
        await anyio.sleep(50)
        world.drain.begin("SIGTERM")

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        assert await world.run() < 51
    assert world.how() == [["release"]]
    assert len(world.delivery.delivered) == 1


async def test_a_lease_that_is_lost_ends_the_rest_between_tries() -> None:
    asks = Ending(Outcome.RETRY, "the app answered 429", Result(status=429), transient=True, delay=250.0)
    world = World(
        delivery=Delivery(asks), spends_tries=True, tries=3, lease={"answers": [LeaseState.LOST], "expires_after": 30.0}
    )
    assert await world.run() < 15
    assert world.how() == [[]]


# The source is told when no other job is wanted.


async def test_no_pause_while_other_jobs_are_wanted() -> None:
    world = World(["a", "b"], verdict=None, exit_when_idle=5.0)
    await world.run()
    assert world.notes[:4] == ["receive", "complete a", "receive", "complete b"]
    assert "pause" not in world.notes


async def test_a_pause_before_the_last_of_max_jobs_is_settled() -> None:
    world = World(["a", "b", "c"], max_jobs=2)
    await world.run()
    assert world.notes == ["receive", "complete a", "receive", "pause", "complete b"]


async def test_no_pause_for_a_job_that_does_not_count() -> None:
    world = World(["a", "b", "c"], Delivery(RELEASED, DONE), max_jobs=1)
    await world.run()
    assert world.notes == ["receive", "release a", "receive", "pause", "complete b"]


async def test_a_pause_before_a_job_is_handed_back_in_a_drain() -> None:
    world = World(delivery=Delivery(seconds=1000))

    async def ask() -> None:
        await anyio.sleep(5)
        world.drain.begin("SIGTERM")

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        await world.run()
    assert world.notes == ["receive", "pause", "release job-1"]


async def test_a_pause_before_a_job_is_settled_while_the_app_is_away_and_no_receive_until_it_is_back() -> None:
    class Crashes(Delivery):
        async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
            ending = await super().deliver(assignment, drain)
            self.set_available(False)
            return ending

    delivery = Crashes(PASSING)
    world = World(["a", "b"], delivery, max_jobs=2)

    async def come_back() -> None:
        await anyio.sleep(100)
        assert world.notes == ["receive", "pause", "retry a", "pause"]
        delivery.set_available(True)

    async with anyio.create_task_group() as group:
        group.start_soon(come_back)
        await world.run()
    assert world.notes[4:] == ["receive", "pause", "complete b"]


async def test_a_pause_that_hangs_does_not_keep_the_queue_from_its_answer() -> None:
    world = World(max_jobs=1)

    async def hang() -> None:
        world.notes.append("pause")
        await anyio.sleep_forever()

    world.source.pause = hang  # type: ignore[method-assign]
    await world.run()
    assert world.notes == ["receive", "pause", "complete job-1"]


async def test_a_pause_before_the_failure_that_makes_us_leave_the_machine() -> None:
    failed = Ending(Outcome.FAIL, "the app answered 404", Result(status=404))
    world = World(["a", "b", "c"], Delivery(failed, failed), failures=FailuresInARow(2))
    await world.run()
    assert world.notes == ["receive", "fail a", "receive", "pause", "fail b"]


# An app that comes and goes.


async def test_no_job_is_asked_for_before_the_app_is_ready_and_nobody_is_idle_meanwhile() -> None:
    delivery = Delivery()
    delivery.set_available(False)
    world = World(delivery=delivery, exit_when_idle=10.0, verdict=None)

    async def get_ready() -> None:
        await anyio.sleep(500)
        assert world.notes == ["pause"]
        delivery.set_available(True)

    async with anyio.create_task_group() as group:
        group.start_soon(get_ready)
        assert await world.run() == pytest.approx(500 + 1 + 10, abs=1)
    assert world.how() == [["complete"]]


async def test_the_wait_for_a_job_ends_the_moment_that_the_app_is_not_ready() -> None:
    delivery = Delivery()
    world = World([], delivery, verdict=None, exit_when_idle=60.0)

    async def go() -> None:
        await anyio.sleep(5)
        assert world.source.waiting == 1
        delivery.set_available(False)
        await anyio.sleep(0.001)
        assert world.source.waiting == 0
        assert world.notes == ["receive", "pause"]
        await anyio.sleep(100)
        delivery.set_available(True)

    async with anyio.create_task_group() as group:
        group.start_soon(go)
        assert await world.run() == pytest.approx(105 + 60, abs=1)


async def test_a_lease_that_was_taken_at_that_moment_is_not_dropped() -> None:
    """As a queue does whose answer is under way when the call is cancelled."""
    delivery = Delivery()
    world = World([], delivery, verdict=None, max_jobs=1)
    lease = NotedLease(world.notes)

    async def receive(*, wait: float) -> Lease | None:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(5)
        return lease

    world.source.receive = receive  # type: ignore[method-assign]

    async def go() -> None:
        await anyio.sleep(1)
        delivery.set_available(False)

    async with anyio.create_task_group() as group:
        group.start_soon(go)
        await world.run()
    assert lease.how == ["complete"]


async def test_an_app_that_is_given_up_ends_all_lanes() -> None:
    delivery = Delivery()
    delivery.set_available(False)
    world = World([], delivery, verdict=None, concurrency=3)

    async def give_up() -> None:
        await anyio.sleep(50)
        delivery.why_never = GivenUp(3, "it ended too often")
        delivery.can.set()

    async with anyio.create_task_group() as group:
        group.start_soon(give_up)
        assert await world.run() == pytest.approx(50, abs=1)
    assert "receive" not in world.notes


async def test_a_drain_ends_the_wait_for_the_app() -> None:
    delivery = Delivery()
    delivery.set_available(False)
    world = World([], delivery, verdict=None)

    async def ask() -> None:
        await anyio.sleep(50)
        world.drain.begin("SIGTERM")

    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        assert await world.run() == pytest.approx(50, abs=1)


async def test_an_unreachable_queue_stops_no_other_lane() -> None:
    world = World(["a", "b"], Delivery(seconds=10), concurrency=2)
    world.source.script.insert(0, OUT_OF_REACH)
    await world.run()
    assert world.how() == [["complete"], ["complete"]]


async def test_a_queue_that_does_not_hear_of_one_job_keeps_no_other_from_its_lane() -> None:
    world = World(["a", "b", "c"], Delivery(), concurrency=2, lease={"expires_after": 30.0})
    world.leases[0].settle_answers = [HANG]
    with anyio.move_on_after(100):
        await world.forwarder.run()
    assert world.how() == [[], ["complete"], ["complete"]]
