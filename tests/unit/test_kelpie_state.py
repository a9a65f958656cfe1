"""The state file of Kelpie's: what programs read there, whatever goes on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.job import Ending, Outcome, Result
from heeler.kelpie_state import KelpieStateFile
from heeler.status import Phase, Status
from heeler.tasks import background

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class World:
    """A state file beside a status that a test changes."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.status = Status(lambda *_: None, worker="w", source="s")

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.place.read_text(encoding="utf-8"))
        return found

    async def jobs(self, when: Callable[[list[dict[str, Any]]], object] = lambda _jobs: True) -> list[dict[str, Any]]:
        """What it says of the jobs, once that is so."""
        with anyio.fail_after(20):
            while True:
                if self.place.exists() and when(jobs := self.read()["jobs"]):
                    found: list[dict[str, Any]] = jobs
                    return found
                await anyio.sleep(0.01)

    async def looks(self, count: int) -> None:
        """So many more looks at what is unsent; there is nothing of it."""
        left = [count]

        def look() -> set[Path]:
            left[0] -= 1
            return {Path("/data/a")}

        self.status.tell_unsent(look)
        with anyio.fail_after(20):
            while left[0] > 0:
                self.status.enter(Phase.RUN)
                await anyio.sleep(0.01)

    def settle(self, outcome: Outcome, code: int | None) -> None:
        self.status.enter(Phase.UPLOAD)
        self.status.enter(Phase.SETTLE)
        self.status.settled(Ending(outcome, "", Result(exit_code=code)), told=True)
        self.status.drop()


@asynccontextmanager
async def kept(place: Path) -> AsyncIterator[World]:
    world = World(place)
    async with background(KelpieStateFile(place, world.status).run):
        yield world
    assert world.status.on_change == []
    assert world.status.on_settled == []


async def test_the_format_is_kelpies(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        assert await world.jobs() == []
        assert world.read().keys() == {"start", "jobs"}
        world.status.take("one", 1)
        world.status.enter(Phase.RUN)
        (job,) = await world.jobs(len)
        assert list(job) == ["id", "status", "start", "activeUploads", "activeDownloads"]
        assert (job["id"], job["status"]) == ("one", "running")
        world.status.tell_unsent(lambda: {tmp_path / "b", tmp_path / "a"})
        (job,) = await world.jobs(lambda jobs: jobs[0]["activeUploads"])
        assert job["activeUploads"] == [str(tmp_path / "a"), str(tmp_path / "b")]
        assert job["activeDownloads"] == []
        world.settle(Outcome.DONE, 0)
        (job,) = await world.jobs(lambda jobs: jobs[0]["status"] != "running")
    assert job["status"] == "completed"
    assert job["exitCode"] == 0
    assert job["activeUploads"] == []
    times = [datetime.fromisoformat(job[name].replace("Z", "+00:00")) for name in ("start", "exitTime", "end")]
    assert times == sorted(times)
    assert os.listdir(tmp_path) == ["state.json"]


@pytest.mark.parametrize(
    ("outcome", "code", "word", "told"),
    [
        (Outcome.DONE, 0, "completed", 0),
        (Outcome.RETRY, 7, "failed", 7),
        (Outcome.FAIL, None, "failed", -2),
    ],
)
async def test_how_a_job_ended(tmp_path: Path, outcome: Outcome, code: int | None, word: str, told: int) -> None:
    async with kept(tmp_path / "state.json") as world:
        await world.jobs()
        world.status.take("one", 1)
        world.settle(outcome, code)
        (job,) = await world.jobs(len)
    assert (job["status"], job["exitCode"]) == (word, told)


@pytest.mark.parametrize("outcome", [Outcome.RELEASE, Outcome.LOST, Outcome.CANCELLED])
async def test_a_job_that_is_not_over_and_not_ours_is_not_told(tmp_path: Path, outcome: Outcome) -> None:
    async with kept(tmp_path / "state.json") as world:
        await world.jobs()
        world.status.take("one", 1)
        await world.jobs(len)
        world.settle(outcome, 75)
        assert await world.jobs(lambda jobs: not jobs) == []


async def test_a_job_that_comes_again_begins_again(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        await world.jobs()
        world.status.take("one", 1)
        world.settle(Outcome.RETRY, 1)
        await world.jobs(lambda jobs: jobs and "end" in jobs[0])
        world.status.take("one", 2)
        world.status.enter(Phase.RESTORE)
        (job,) = await world.jobs(lambda jobs: "end" not in jobs[0])
    assert job["status"] == "running"
    assert "end" not in job


async def test_a_hundred_jobs_are_kept(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        await world.jobs()
        for number in range(130):
            world.status.take(f"j{number}", 1)
            world.settle(Outcome.DONE, 0)
        jobs = await world.jobs(lambda jobs: jobs and jobs[-1]["id"] == "j129")
    assert [job["id"] for job in jobs] == [f"j{number}" for number in range(30, 130)]


async def test_of_many_files_the_first_thousand_are_told(tmp_path: Path) -> None:
    paths = {Path(f"/data/{number:06}") for number in range(100_000)}
    async with kept(tmp_path / "state.json") as world:
        await world.jobs()
        world.status.take("one", 1)
        world.status.tell_unsent(lambda: paths)
        (job,) = await world.jobs(lambda jobs: jobs and jobs[0]["activeUploads"])
    assert job["activeUploads"] == [f"/data/{number:06}" for number in range(1000)]


async def test_what_has_not_changed_is_not_written(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        await world.jobs()
        world.status.take("one", 1)
        await world.looks(2)
        await world.jobs(lambda jobs: jobs and jobs[0]["activeUploads"])
        before = world.place.stat()
        await world.looks(5)
        assert world.place.stat().st_ino == before.st_ino
        assert world.place.stat().st_mtime_ns == before.st_mtime_ns


async def test_a_place_that_can_not_be_written_is_one_fault_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    async with kept(folder / "state.json") as world:
        with anyio.fail_after(20):
            while not world.status.faults:  # noqa: ASYNC110 - a thread writes
                await anyio.sleep(0.01)
        world.status.take("one", 1)
        await world.looks(5)
        assert world.status.events["state_file_failed"] == 1
        assert str(folder) in world.status.faults[0]["error"]
        folder.mkdir()
        world.status.tell_unsent(set)
        await world.jobs(len)
        assert world.status.events["state_file_failed"] == 1


async def test_the_end_is_told_when_the_worker_stops(tmp_path: Path) -> None:
    place = tmp_path / "state.json"
    async with kept(place) as world:
        await world.jobs()
        world.status.take("one", 1)
        world.settle(Outcome.DONE, 0)
    assert [job["status"] for job in world.read()["jobs"]] == ["completed"]


async def test_a_program_never_reads_half_of_it(tmp_path: Path) -> None:
    place = tmp_path / "state.json"
    over, broken, seen = threading.Event(), list[str](), list[int]()

    def look() -> None:
        while not over.is_set():
            text = place.read_text(encoding="utf-8")
            try:
                seen.append(len(json.loads(text)["jobs"]))
            except ValueError:
                broken.append(text)

    async with kept(place) as world:
        await world.jobs()
        reader = threading.Thread(target=look)
        reader.start()
        try:
            world.status.tell_unsent(lambda: {Path(f"/data/{number}") for number in range(500)})
            for number in range(60):
                world.status.take(f"j{number}", 1)
                await world.jobs(lambda jobs, last=f"j{number}": jobs and jobs[-1]["id"] == last)  # type: ignore[misc]
        finally:
            over.set()
            await anyio.to_thread.run_sync(reader.join)
    assert broken == []
    assert len(set(seen)) > 5
