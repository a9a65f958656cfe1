"""What becomes of a job: the table of outcomes, in virtual time, with scripted queues, programs and folders."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import anyio
import pytest

from heeler.drain import Drain
from heeler.forwarder import Forwarder
from heeler.job import Ending, InvalidJobError, Job, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.sources.base import Lease, LeaseLostError, LeaseState
from heeler.status import Status
from heeler_sync.errors import (
    AccessDeniedError,
    DamagedObjectError,
    LocalFileError,
    NoSuchBucketError,
    SyncError,
    TransientStoreError,
    UnsafeKeyError,
)
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

TRANSIENT = TransientStoreError("PutObject", "b", "k", "503")
DENIED = AccessDeniedError("PutObject", "b", "k", "403")


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class World:
    """A forwarder among fakes; `calls` is the order of what the folders were asked."""

    def __init__(
        self,
        *script: object,
        delivery: ScriptedDelivery | None = None,
        hooks: Mapping[str, Hook] | None = None,
        grace: float = 30.0,
        verdict: int | None = 0,
        reserve: float = 1.0,
        **limits: Any,
    ) -> None:
        self.start = anyio.current_time()
        self.calls: list[str] = []
        self.logged: list[tuple[str, dict[str, object]]] = []
        self.source = ScriptedSource(*script, verdict=verdict)
        self.delivery = delivery or ScriptedDelivery()
        self.drain = Drain(grace)
        self.status = Status(lambda _level, name, fields: self.logged.append((name, fields)), worker="w", source="s")
        self.hooks, self.reserve = hooks, reserve
        self.files: list[ScriptedFiles] = []
        self.forwarder = Forwarder(
            self.source, self.delivery, self._open, self.drain, self.status, rng=random.Random(1), **limits
        )

    def _open(self, lease: Lease, keeper: LeaseKeeper) -> ScriptedFiles:
        if lease.job.body == b"poison":
            raise InvalidJobError("sync.before.0.prefix", "is bad")
        self.files.append(ScriptedFiles(self.calls, self.hooks, self.reserve))
        return self.files[-1]

    async def run(self, limit: float = 3600.0) -> float:
        """Until the forwarder returns; the virtual seconds that it took."""
        with anyio.fail_after(limit):
            await self.forwarder.run()
        assert all(files.closed for files in self.files), "whatever happened, others may use the folders"
        return anyio.current_time() - self.start

    def names(self) -> list[str]:
        return [name for name, _ in self.logged]

    def settled(self) -> dict[str, object]:
        return next(fields for name, fields in self.logged if name == "job_settled")


def failing(error: Exception) -> Hook:
    async def hook() -> None:
        raise error

    return hook


async def hang() -> None:
    await anyio.sleep_forever()


def ended(outcome: Outcome, code: int | None = None, *, whole: bool = False, delay: float = 0.0) -> ScriptedDelivery:
    return ScriptedDelivery(Ending(outcome, "why", Result(exit_code=code), whole=whole, delay=delay))


ORDER = ["restore", "restore done", "watch", "flush whole done", "flush done", "unwatch", "publish", "publish done"]


async def test_a_job_that_succeeds_is_reported_done_after_all_its_files_are_durable() -> None:
    lease = ScriptedLease()
    seen: list[list[str]] = []

    async def look() -> None:
        seen.append(list(lease.how))

    world = World(lease, hooks={"publish": look, "flush": look})
    await world.run()
    assert world.calls == [*ORDER, "discard", "discard done"]
    assert lease.settled == [("complete", {"result": Result(exit_code=0)})]
    assert seen == [[], []]
    assert world.settled()["outcome"] == "done"


@pytest.mark.parametrize(
    ("outcome", "how", "flush"),
    [
        (Outcome.RETRY, "retry", "flush settled"),
        (Outcome.FAIL, "fail", "flush settled"),
        (Outcome.RELEASE, "release", "flush settled"),
    ],
)
async def test_any_other_end_is_flushed_told_and_neither_published_nor_discarded(
    outcome: Outcome, how: str, flush: str
) -> None:
    lease = ScriptedLease()
    world = World(lease, delivery=ended(outcome, 3, delay=1.0))
    await world.run()
    assert lease.how == [how]
    assert flush in world.calls
    assert "publish" not in world.calls
    assert "discard" not in world.calls


async def test_a_program_that_asks_to_be_run_again_is_captured_whole_and_released_with_its_rest() -> None:
    lease = ScriptedLease()
    world = World(lease, delivery=ended(Outcome.RELEASE, 75, whole=True, delay=1.0))
    await world.run()
    assert "flush whole" in world.calls
    assert lease.settled == [("release", {"reason": "why", "delay": 1.0, "fruitless": False})]
    assert world.files[0].frozen


async def test_a_failed_attempt_rests_longer_each_time_but_never_beyond_five_minutes() -> None:
    for attempt in (1, 2, 3, 8, 50, 10_000):
        lease = ScriptedLease(attempt=attempt)
        await World(lease, delivery=ended(Outcome.RETRY, 1), retry_delay=2.0).run()
        bound = min(300.0, 2.0 * 2 ** min(attempt - 1, 20))
        assert bound / 2 <= lease.settled[0][1]["delay"] <= bound


@pytest.mark.parametrize("phase", ["flush", "publish"])
async def test_files_that_can_not_be_stored_make_a_success_a_failed_attempt(phase: str) -> None:
    lease = ScriptedLease()
    world = World(lease, hooks={phase: failing(DENIED)})
    await world.run()
    assert lease.how == ["retry"]
    assert "can't be stored" in lease.settled[0][1]["reason"]
    assert "discard" not in world.calls
    assert "upload_failed" in world.names()


RESTORE_ERRORS: Sequence[tuple[SyncError, str]] = [
    (UnsafeKeyError("../x", "leads out"), "fail"),
    (TRANSIENT, "release"),
    (LocalFileError("/data", "is full"), "release"),
    (DamagedObjectError("b", "k", "never as stored"), "release"),
    (DENIED, "retry"),
    (NoSuchBucketError("ListObjects", "b", "", "none"), "retry"),
]


@pytest.mark.parametrize(
    ("error", "how"), RESTORE_ERRORS, ids=lambda value: getattr(value, "__name__", type(value).__name__)
)
async def test_a_restore_that_failed_never_starts_the_program(error: SyncError, how: str) -> None:
    lease = ScriptedLease()
    world = World(lease, hooks={"restore": failing(error)})
    await world.run()
    assert lease.how == [how]
    assert world.delivery.delivered == []
    assert "watch" not in world.calls
    if how == "release":
        assert lease.settled[0][1]["delay"] > 0, "or it would come back at once, for ever"


async def test_a_message_that_is_no_job_fails_at_once_with_the_field() -> None:
    lease = ScriptedLease(job=Job("p", b"poison"))
    world = World(lease)
    await world.run()
    assert lease.how == ["fail"]
    assert "sync.before.0.prefix" in lease.settled[0][1]["reason"]
    assert world.delivery.delivered == []


@pytest.mark.parametrize("phase", ["restore", "run", "flush", "publish"])
@pytest.mark.parametrize("state", [LeaseState.LOST, LeaseState.CANCELLED])
async def test_a_lease_that_ends_in_any_phase_stops_everything_and_nothing_is_reported(
    phase: str, state: LeaseState
) -> None:
    lease = ScriptedLease(answers=[LeaseState.HELD, state])
    delivery = ScriptedDelivery(seconds=math.inf if phase == "run" else 1.0)
    world = World(lease, delivery=delivery, hooks={phase: hang})
    took = await world.run(limit=60)
    assert took <= 21
    assert lease.how == (["withdraw"] if state is LeaseState.CANCELLED else [])
    assert f"{phase} done" not in world.calls
    assert "discard" not in world.calls
    assert delivery.cancelled == (phase == "run")
    assert world.settled()["outcome"] == state.value
    if phase == "run":
        assert not any(call.startswith("flush") for call in world.calls)


@pytest.mark.parametrize("phase", ["restore", "run"])
async def test_a_job_that_the_queue_will_take_away_is_handed_back_before_as_in_a_drain(phase: str) -> None:
    lease = ScriptedLease(answers=[LeaseState.HELD, LeaseState.ENDING])
    after = ScriptedLease(job=Job("job-2", b"{}"))
    delivery = ScriptedDelivery(stop_seconds=5.0)
    restores: list[float] = []

    async def slow_once() -> None:
        restores.append(anyio.current_time())
        first = len(restores) == 1
        delivery.seconds = math.inf if first and phase == "run" else 1.0
        if first and phase == "restore":
            await anyio.sleep(60)

    world = World(lease, after, delivery=delivery, hooks={"restore": slow_once})
    await world.run(limit=120)
    assert lease.how == ["release"]
    assert "before that" in lease.settled[0][1]["reason"]
    assert not lease.settled[0][1]["fruitless"]
    assert after.how == ["complete"], "the worker goes on with other jobs"
    if phase == "run":
        assert "flush whole" in world.calls
        assert len(lease.extended) >= 2, "it is kept while it is flushed"


async def test_the_flush_before_a_queue_takes_a_job_away_may_take_long() -> None:
    async def long() -> None:
        await anyio.sleep(1200)

    lease = ScriptedLease(answers=[LeaseState.ENDING])
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf), hooks={"flush": long})
    await world.run(limit=2000)
    assert lease.how == ["release"]
    assert "flush whole done" in world.calls or "flush done" in world.calls
    assert len(lease.extended) > 100


async def test_a_job_whose_cancellation_can_not_be_told_does_not_keep_the_worker() -> None:
    lease = ScriptedLease(answers=[LeaseState.CANCELLED], settle_answers=[OUT_OF_REACH] * 999)
    world = World(lease, delivery=ScriptedDelivery(seconds=math.inf))
    took = await world.run(limit=60)
    assert took < 25
    assert world.settled()["outcome"] == "cancelled"
    assert world.settled()["told"] is False


async def test_a_job_that_was_lost_when_it_is_to_be_settled_is_not_called_done() -> None:
    lease = ScriptedLease(settle_answers=[LeaseLostError("gone")])
    world = World(lease)
    await world.run()
    assert len(lease.tries) == 1
    assert world.settled()["outcome"] == "lost"
    assert "discard" not in world.calls


async def test_a_queue_out_of_reach_is_told_again_until_it_has_heard() -> None:
    lease = ScriptedLease(settle_answers=[OUT_OF_REACH] * 20)
    world = World(lease)
    took = await world.run()
    assert lease.how == ["complete"]
    assert len(lease.tries) == 21
    assert 40 <= took <= 120
    gaps = [later - earlier for earlier, later in pairwise(lease.tries)]
    assert gaps[0] <= 0.21
    assert max(gaps) <= 5.01
    assert lease.extended, "the heartbeats go on meanwhile"


async def test_settling_ends_when_the_queue_says_that_the_job_is_lost() -> None:
    lease = ScriptedLease(answers=[LeaseState.HELD, LeaseState.LOST], settle_answers=[OUT_OF_REACH] * 999)
    world = World(lease)
    await world.run()
    assert lease.how == []
    assert world.settled()["told"] is False
    assert "discard" not in world.calls


async def test_heartbeats_go_on_in_every_phase() -> None:
    async def slow() -> None:
        await anyio.sleep(100)

    lease = ScriptedLease()
    delivery = ScriptedDelivery(seconds=100)
    world = World(lease, delivery=delivery, hooks={"restore": slow, "flush": slow, "publish": slow})
    await world.run()
    gaps = [later - earlier for earlier, later in pairwise(lease.extended)]
    assert len(lease.extended) >= 39
    assert max(gaps) <= 10.01


async def test_three_empty_jobs_take_less_than_3_s_at_a_heartbeat_of_15_s() -> None:
    """Beside what the machine takes for them: here that is nothing."""
    leases = [ScriptedLease(expires_after=45.0) for _ in range(3)]
    assert await World(*leases, delivery=ScriptedDelivery(seconds=0.0), max_jobs=3).run() < 3
    assert [lease.how for lease in leases] == [["complete"]] * 3


async def test_what_became_durable_is_told_with_the_heartbeats() -> None:
    lease = ScriptedLease()

    async def stored() -> None:
        world.files[0].count = 1
        await anyio.sleep(30)

    world = World(lease, hooks={"flush": stored})
    await world.run()
    assert lease.progress.count(True) == 1


@pytest.mark.parametrize("expires_after", [30.0, math.inf])
async def test_an_interruption_after_something_became_durable_is_not_fruitless(expires_after: float) -> None:
    """Or ten short slices of a job, each with a checkpoint, count as ten barren attempts and it fails for good."""
    lease = ScriptedLease(expires_after=expires_after)

    async def stored() -> None:
        world.files[0].count = 1

    ending = Ending(Outcome.RELEASE, "why", Result(exit_code=75), whole=True, fruitless=True)
    world = World(lease, delivery=ScriptedDelivery(ending), hooks={"flush": stored})
    await world.run()
    assert lease.how == ["release"]
    assert lease.settled[0][1]["fruitless"] is False


async def test_jobs_are_taken_one_after_another_until_none_can_come() -> None:
    leases = [ScriptedLease(job=Job(f"j{count}", b"{}")) for count in range(5)]
    world = World(*leases)
    await world.run()
    assert [lease.how for lease in leases] == [["complete"]] * 5
    assert [given.job.id for given in world.delivery.delivered] == ["j0", "j1", "j2", "j3", "j4"]
    assert world.status.job_id is None


async def test_max_jobs_counts_jobs_that_ended_not_interruptions() -> None:
    released = ScriptedLease(job=Job("r", b"poison2"))
    leases = [released, ScriptedLease(), ScriptedLease(job=Job("p", b"poison")), ScriptedLease()]
    endings = [Outcome.RELEASE, Outcome.DONE]

    class Each(ScriptedDelivery):
        async def deliver(self, assignment: Any, drain: Drain) -> Ending:
            await super().deliver(assignment, drain)
            return Ending(endings[len(self.delivered) - 1], "", Result(exit_code=0), whole=True)

    world = World(*leases, delivery=Each(), max_jobs=2, verdict=None)
    await world.run()
    assert [lease.how for lease in leases] == [["release"], ["complete"], ["fail"], []]


@pytest.mark.parametrize("outcome", [Outcome.DONE, Outcome.RETRY, Outcome.FAIL, Outcome.RELEASE, Outcome.LOST])
@pytest.mark.parametrize("how", [{}, {"overlap": True}, {"concurrency": 3}], ids=["plain", "overlap", "concurrency"])
async def test_once_ends_after_a_job_whose_program_ran_however_it_ended(outcome: Outcome, how: dict[str, Any]) -> None:
    leases = [ScriptedLease(), ScriptedLease()]
    world = World(*leases, delivery=ended(outcome, whole=True), verdict=None, once=True, **how)
    await world.run()
    assert len(world.delivery.delivered) == 1
    assert leases[1].how == []
    assert world.forwarder.used
    assert world.source.paused, "the queue knows before the job is settled that no other is wanted"


async def test_once_goes_on_after_jobs_whose_programs_never_ran() -> None:
    poison, unreachable, good, other = (
        ScriptedLease(job=Job("p", b"poison")),
        ScriptedLease(),
        ScriptedLease(),
        ScriptedLease(),
    )
    faults = [TRANSIENT]

    async def restore() -> None:
        if faults:
            raise faults.pop()

    world = World(poison, unreachable, good, other, hooks={"restore": restore}, verdict=None, once=True)
    await world.run()
    assert [lease.how for lease in (poison, unreachable, good, other)] == [["fail"], ["release"], ["complete"], []]
    assert world.forwarder.used


async def test_it_ends_when_idle_for_so_long_and_each_job_starts_the_wait_again() -> None:
    world = World(None, ScriptedLease(), verdict=None, exit_when_idle=50.0)
    assert 50.9 <= await world.run() <= 52.0
    assert "idle" in world.names()


async def test_idle_time_does_not_count_a_queue_that_can_not_be_asked() -> None:
    """Jobs may be waiting behind the fault; a worker that went home would leave them there."""
    lease = ScriptedLease()
    world = World(*[OUT_OF_REACH] * 40, lease, verdict=None, exit_when_idle=10.0)
    await world.run()
    assert lease.how == ["complete"]


async def test_an_unreachable_queue_is_asked_again_with_growing_pauses() -> None:
    world = World(*[OUT_OF_REACH] * 12, ScriptedLease())
    await world.run()
    gaps = [later - earlier for earlier, later in pairwise(world.source.received[:13])]
    assert gaps[0] < gaps[3] < gaps[8] <= 5.01
    assert world.names().count("queue_unreachable") == 12


async def test_a_bug_in_a_part_is_not_swallowed_and_the_job_is_not_settled() -> None:
    lease = ScriptedLease()
    world = World(lease, hooks={"flush": failing(RuntimeError("bug"))})
    with pytest.raises(RuntimeError, match="bug"):
        await world.run()
    assert lease.tries == []


async def test_a_heartbeat_that_hangs_does_not_hold_up_the_end_of_a_job() -> None:
    lease = ScriptedLease(answers=[HANG] * 50)
    took = await World(lease, delivery=ScriptedDelivery(seconds=11)).run()
    assert lease.how == ["complete"]
    assert took < 12
