"""The state file of Kelpie's: what programs read there, whatever goes on."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator
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

    async def jobs(self, count: int) -> list[dict[str, Any]]:
        """What it says of the jobs once it tells of so many."""
        with anyio.fail_after(10):
            while True:
                if self.place.exists() and len(self.read()["jobs"]) == count:
                    break
                await anyio.sleep(0.01)
        await anyio.sleep(0.1)
        jobs: list[dict[str, Any]] = self.read()["jobs"]
        return jobs

    def settle(self, outcome: Outcome, code: int | None) -> None:
        self.status.enter(Phase.UPLOAD)
        self.status.enter(Phase.SETTLE)
        self.status.settled(Ending(outcome, "", Result(exit_code=code)), told=True)
        self.status.drop()


@asynccontextmanager
async def kept(place: Path) -> AsyncIterator[World]:
    world = World(place)
    async with background(KelpieStateFile(place, world.status).run):
        await anyio.sleep(0.05)
        yield world
    assert world.status.on_change == []
    assert world.status.on_settled == []


async def test_the_format_is_kelpies(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        assert world.read().keys() == {"start", "jobs"}
        world.status.take("one", 1)
        world.status.enter(Phase.RUN)
        world.status.tell_unsent(lambda: {tmp_path / "b", tmp_path / "a"})
        (job,) = await world.jobs(1)
        assert list(job) == ["id", "status", "start", "activeUploads", "activeDownloads"]
        assert (job["id"], job["status"]) == ("one", "running")
        await anyio.sleep(0.6)
        (job,) = await world.jobs(1)
        assert job["activeUploads"] == [str(tmp_path / "a"), str(tmp_path / "b")]
        assert job["activeDownloads"] == []
        world.settle(Outcome.DONE, 0)
        (job,) = await world.jobs(1)
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
        world.status.take("one", 1)
        world.settle(outcome, code)
        (job,) = await world.jobs(1)
    assert (job["status"], job["exitCode"]) == (word, told)


@pytest.mark.parametrize("outcome", [Outcome.RELEASE, Outcome.LOST, Outcome.CANCELLED])
async def test_a_job_that_is_not_over_and_not_ours_is_not_told(tmp_path: Path, outcome: Outcome) -> None:
    async with kept(tmp_path / "state.json") as world:
        world.status.take("one", 1)
        await world.jobs(1)
        world.settle(outcome, 75)
        await world.jobs(0)


async def test_a_job_that_comes_again_begins_again(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        world.status.take("one", 1)
        world.settle(Outcome.RETRY, 1)
        world.status.take("one", 2)
        world.status.enter(Phase.RESTORE)
        (job,) = await world.jobs(1)
    assert job["status"] == "running"
    assert "end" not in job


async def test_a_hundred_jobs_are_kept(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        for number in range(130):
            world.status.take(f"j{number}", 1)
            world.settle(Outcome.DONE, 0)
        jobs = await world.jobs(100)
    assert [job["id"] for job in jobs] == [f"j{number}" for number in range(30, 130)]


async def test_many_files_hold_nobody_up_and_the_first_thousand_are_told(tmp_path: Path) -> None:
    paths = {Path(f"/data/{number:06}") for number in range(100_000)}
    gaps = [0.0]

    async def beat() -> None:
        while True:
            begun = anyio.current_time()
            await anyio.sleep(0.01)
            gaps.append(anyio.current_time() - begun)

    async with kept(tmp_path / "state.json") as world, background(beat):
        world.status.take("one", 1)
        world.status.tell_unsent(lambda: set(paths))
        for _ in range(4):
            await anyio.sleep(0.5)
            paths.pop()
        (job,) = await world.jobs(1)
    assert max(gaps) < 0.5, "the event loop went on"
    assert len(job["activeUploads"]) == 1000
    assert job["activeUploads"] == sorted(job["activeUploads"])
    assert job["activeUploads"][-1] < "/data/001100"


async def test_what_has_not_changed_is_not_written(tmp_path: Path) -> None:
    async with kept(tmp_path / "state.json") as world:
        world.status.take("one", 1)
        world.status.tell_unsent(lambda: {Path("/data/a")})
        await anyio.sleep(0.8)
        before = world.place.stat()
        for _ in range(5):
            world.status.enter(Phase.RUN)
            await anyio.sleep(0.2)
        assert world.place.stat().st_ino == before.st_ino
        assert world.place.stat().st_mtime_ns == before.st_mtime_ns


async def test_a_place_that_can_not_be_written_is_one_fault_until_it_can(tmp_path: Path) -> None:
    folder = tmp_path / "later"
    async with kept(folder / "state.json") as world:
        for number in range(4):
            world.status.take(f"j{number}", 1)
            await anyio.sleep(0.05)
        assert world.status.events["state_file_failed"] == 1
        assert str(folder) in world.status.faults[0]["error"]
        folder.mkdir()
        await world.jobs(4)
        assert world.status.events["state_file_failed"] == 1


async def test_the_end_is_told_when_the_worker_stops(tmp_path: Path) -> None:
    place = tmp_path / "state.json"
    async with kept(place) as world:
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
        reader = threading.Thread(target=look)
        reader.start()
        try:
            world.status.tell_unsent(lambda: {Path(f"/data/{number}") for number in range(500)})
            for number in range(60):
                world.status.take(f"j{number}", 1)
                await anyio.sleep(0.01)
        finally:
            over.set()
            await anyio.to_thread.run_sync(reader.join)
    assert broken == []
    assert len(set(seen)) > 5
