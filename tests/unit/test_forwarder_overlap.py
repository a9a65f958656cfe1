"""The next job is taken while the outputs of the last one upload: what that changes, and what it must not."""

from __future__ import annotations

import anyio
import pytest

from heeler.job import Ending, Job, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.sources.base import Lease, LeaseState
from heeler.status import Phase
from heeler_sync.errors import AccessDeniedError
from tests.support.leases import Hook, ScriptedDelivery, ScriptedFiles, ScriptedLease
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_forwarder import World

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class OverlapWorld(World):
    """Its folders can be set apart, unless `stuck`; publishing takes a while. `calls` names the job each is of."""

    def __init__(self, *script: object, publish: float = 100.0, stuck: bool = False, **more: object) -> None:
        super().__init__(*script, **{"overlap": True, **more})  # type: ignore[arg-type]
        self.publish_seconds = publish
        self.stuck = stuck
        self.refusals: dict[str, Exception] = {}

    def _open(self, lease: Lease, keeper: LeaseKeeper) -> ScriptedFiles:
        job_id = lease.job.id
        calls = _Named(self.calls, job_id)

        async def publish() -> None:
            await anyio.sleep(self.publish_seconds)
            if job_id in self.refusals:
                raise self.refusals[job_id]

        hooks: dict[str, Hook] = {"publish": publish}
        files = ScriptedFiles(calls, hooks, self.reserve)
        files.movable = not self.stuck
        self.files.append(files)
        return files


class _Named(list[str]):
    def __init__(self, calls: list[str], name: str) -> None:
        super().__init__()
        self._calls, self._name = calls, name

    def append(self, call: str) -> None:
        self._calls.append(f"{self._name} {call}")


def job(name: str, **more: object) -> ScriptedLease:
    return ScriptedLease(job=Job(name, b"{}"), **more)  # type: ignore[arg-type]


def at(world: World, call: str) -> int:
    return world.calls.index(call)


async def test_the_next_job_runs_while_the_outputs_of_the_last_one_upload() -> None:
    first, second = job("a"), job("b")
    world = OverlapWorld(first, second)
    took = await world.run()
    assert at(world, "a set apart done") < at(world, "b restore") < at(world, "a publish done")
    assert at(world, "a flush done") < at(world, "a set apart")
    assert first.how == second.how == ["complete"]
    assert 100 <= took < 200, "one after the other they take 200 s"


async def test_a_job_is_reported_only_after_its_outputs_are_durable_and_its_lease_is_kept_until_then() -> None:
    first, second = job("a", expires_after=30.0), job("b")
    world = OverlapWorld(first, second)
    await world.run()
    assert len(first.extended) >= 9, "heartbeats go on while it uploads"
    assert at(world, "a publish done") < at(world, "a discard")
    assert min(first.tries) >= world.start + 100


async def test_without_it_one_job_comes_after_the_other() -> None:
    world = OverlapWorld(job("a"), job("b"), overlap=False)
    assert await world.run() >= 200
    assert "a set apart" not in world.calls
    assert at(world, "a discard done") < at(world, "b restore")


async def test_outputs_that_cannot_be_moved_are_uploaded_where_they_are_before_the_next_job() -> None:
    world = OverlapWorld(job("a"), job("b"), stuck=True)
    assert await world.run() >= 200
    assert at(world, "a discard done") < at(world, "b restore")


async def test_the_last_job_that_is_wanted_does_not_give_way() -> None:
    world = OverlapWorld(job("a"), job("b"), max_jobs=1)
    await world.run()
    assert "a set apart" not in world.calls
    assert len(world.source.script) == 1


@pytest.mark.parametrize("limit", [1, 2, 3, 4])
async def test_as_many_jobs_are_done_as_were_asked_for(limit: int) -> None:
    leases = [job(name) for name in "abcd"]
    world = OverlapWorld(*leases, max_jobs=limit)
    await world.run()
    assert [lease.how for lease in leases] == [["complete"]] * limit + [[]] * (4 - limit)


async def test_a_job_that_is_handed_back_while_its_outputs_upload_makes_room_for_another() -> None:
    lost, *others = job("a", expires_after=30.0, answers=[LeaseState.LOST]), job("b"), job("c")
    world = OverlapWorld(lost, *others, max_jobs=2)
    await world.run()
    assert lost.how == []
    assert [lease.how for lease in others] == [["complete"], ["complete"]]


async def test_outputs_that_are_refused_fail_their_job_and_no_other() -> None:
    first, second = job("a"), job("b")
    world = OverlapWorld(first, second)
    world.refusals["a"] = AccessDeniedError("PutObject", "b", "k", "403")
    await world.run()
    assert (first.how, second.how) == (["retry"], ["complete"])
    assert "a discard" not in world.calls, "what is not in storage stays on disk"


async def test_a_program_that_fails_has_nothing_to_set_apart() -> None:
    world = OverlapWorld(
        job("a"), job("b"), delivery=ScriptedDelivery(Ending(Outcome.RETRY, "exit code 1", Result(exit_code=1)))
    )
    await world.run()
    assert "a set apart" not in world.calls


async def test_a_drain_ends_the_upload_and_the_job_in_time_and_takes_no_other() -> None:
    first, second, third = job("a"), job("b"), job("c")
    world = OverlapWorld(first, second, third, publish=1000.0, grace=30.0)
    async with anyio.create_task_group() as group:
        group.start_soon(world.run)
        await anyio.sleep(500)
        world.drain.begin("SIGTERM")
    assert anyio.current_time() <= world.start + 531
    assert (first.how, second.how, third.how) == (["release"], ["release"], [])


async def test_at_most_two_jobs_are_ours_and_one_is_restored_or_runs() -> None:
    leases = [job(name) for name in "abcdef"]
    world = OverlapWorld(*leases)
    await world.run()
    running, most = set[str](), 0
    for call in world.calls:
        name, _, what = call.partition(" ")
        if what == "restore":
            running.add(name)
            most = max(most, len(running))
        elif what in ("set apart done", "discard done"):
            running.discard(name)
    assert most == 1
    assert all(lease.how == ["complete"] for lease in leases)


async def test_an_upload_that_goes_on_is_not_idleness() -> None:
    world = OverlapWorld(job("a"), verdict=None, exit_when_idle=10.0)
    assert 110 <= await world.run() < 140
    assert world.names().count("idle") == 1
    assert world.forwarder.idle


async def test_what_is_said_is_said_of_the_right_job() -> None:
    world = OverlapWorld(job("a"), job("b"))
    await world.run()
    phases = [(fields.get("job_id"), fields["phase"]) for name, fields in world.logged if name == "phase"]
    for name in "ab":
        own = [phase for job_id, phase in phases if job_id == name]
        assert own == [phase.value for phase in (Phase.RESTORE, Phase.RUN, Phase.UPLOAD, Phase.SETTLE)]
    assert [fields["job_id"] for name, fields in world.logged if name == "job_settled"] == ["a", "b"]
