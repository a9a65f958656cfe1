"""Lanes: what is said in one is of its job, whoever says it."""

from __future__ import annotations

import anyio
import anyio.to_thread
import pytest

from heeler.job import Ending, Outcome
from heeler.status import Phase, Status


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    def __init__(self) -> None:
        self.logged: list[tuple[str, object]] = []
        self.status = Status(
            lambda _level, name, fields: self.logged.append((name, fields.get("job_id"))), worker="w", source="s"
        )


def test_without_lanes_there_is_one() -> None:
    world = World()
    status = world.status
    status.take("a", 2)
    status.enter(Phase.RUN)
    status.committed({"generation": 1, "files": 2, "bytes": 3})
    snapshot = status.snapshot()
    assert (snapshot["job_id"], snapshot["attempt"], snapshot["phase"]) == ("a", 2, "run")
    assert snapshot["checkpoint"]["generation"] == 1
    assert [job["job_id"] for job in snapshot["jobs"]] == ["a"]
    status.drop()
    assert status.snapshot()["jobs"] == []
    assert (status.job_id, status.attempt, status.checkpoint) == (None, 0, None)


@pytest.mark.anyio
async def test_tasks_and_threads_of_a_lane_speak_of_its_job() -> None:
    world = World()
    status = world.status
    both = anyio.Event()

    async def child() -> None:
        status.fault("from a task", error="x")
        await anyio.to_thread.run_sync(lambda: status.event("from a thread"))

    async def lane(job_id: str) -> None:
        with status.lane():
            status.take(job_id, 1)
            if job_id == "b":
                both.set()
            await both.wait()
            status.committed({"generation": ord(job_id), "files": 1, "bytes": 1})
            async with anyio.create_task_group() as group:
                group.start_soon(child)
            assert status.checkpoint is not None
            assert status.checkpoint["generation"] == ord(job_id)
            status.settled(Ending(Outcome.DONE), told=True)
            status.drop()
            assert status.job_id is None

    async with anyio.create_task_group() as group:
        group.start_soon(lane, "a")
        group.start_soon(lane, "b")
    for name in ("job_received", "committed", "from a task", "from a thread", "job_settled"):
        assert sorted(str(job) for said, job in world.logged if said == name) == ["a", "b"], name
    assert sorted(str(fault["job_id"]) for fault in status.faults) == ["a", "b"]
    assert status.snapshot()["jobs"] == []


@pytest.mark.anyio
async def test_who_is_in_no_lane_sees_a_lane_with_a_job() -> None:
    status = World().status
    with status.lane():
        status.take("a", 1)
        status.enter(Phase.RUN)
        seen: list[object] = []
        import contextvars

        contextvars.Context().run(lambda: seen.append((status.job_id, status.phase, status.snapshot()["phase"])))
        assert seen == [("a", Phase.RUN, "run")]
    assert status.job_id is None


def test_a_lane_ends_with_its_block_even_by_an_error() -> None:
    status = World().status

    def fail() -> None:
        with status.lane():
            status.take("a", 1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert status.snapshot()["jobs"] == []
    assert status.job_id is None


def test_all_changes_are_told_whichever_lane_they_are_in() -> None:
    status = World().status
    changes: list[object] = []
    status.on_change.append(lambda: changes.append(status.job_id))
    with status.lane():
        status.take("a", 1)
        status.enter(Phase.RUN)
        status.drop()
    assert changes == ["a", "a", None]
