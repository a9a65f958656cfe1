"""Commands that run at the same time: each with daemons of its own, and none ends with another."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.acceptance.world import World, alive, eventually
from tests.support.worker import clean_environment, heeler

JOBS = [f"job-{number}" for number in range(4)]
DAEMONS = {
    "plain": "bash -c {} &",
    "tagged": "(setsid bash -c {} &)",
    "same-session": "(env -i bash -c {} &)",
    "stranger": "(env -i setsid bash -c {} &)",
}
"""How a program starts each: with all its marks, with its tag alone, with its session alone, with none of them."""
SURE = ("plain", "tagged", "same-session")


class Crowd:
    """Jobs with daemons, which run until they are told to go on. A daemon's pid is in a file of its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = world.folder

    def submit(self, job_id: str, kinds: tuple[str, ...] = (*DAEMONS,), end: str = "exit 0", **fields: object) -> None:
        """Put such a job into the queue."""
        text = f"echo output of {job_id}\n"
        for kind in kinds:
            file = self.folder / f"{job_id}-{kind}"
            text += DAEMONS[kind].format(shlex.quote(f"echo $$ > {file}.new; mv {file}.new {file}; exec sleep 1000"))
            text = text.replace(" &", " >/dev/null 2>&1 &") + "\n"
        text += "".join(f"while ! test -e {self.folder}/{job_id}-{kind}; do sleep 0.01; done\n" for kind in kinds)
        text += f"echo $$ > {self.folder}/{job_id}.new; mv {self.folder}/{job_id}.new {self.folder}/{job_id}-main\n"
        text += f"while ! test -e {self.folder}/go-{job_id}; do sleep 0.01; done\n{end}"
        self.world.submit(["bash", "-c", text], job_id, heartbeat_interval=0.5, **fields)

    def pids(self, job_id: str) -> dict[str, int]:
        """Of a job that is up, its first process and all its daemons."""
        self.world.told(f"{job_id}-main")
        files = self.folder.glob(f"{job_id}-*")
        return {file.name.removeprefix(f"{job_id}-"): int(file.read_text()) for file in files if file.suffix != ".new"}

    def living(self, job_id: str) -> set[str]:
        """Which of these are alive."""
        return {kind for kind, pid in self.pids(job_id).items() if alive(pid)}

    def end(self) -> None:
        """Kill what a failed test left."""
        for file in self.folder.glob("job-*-*"):
            if alive(pid := int(file.read_text())):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def crowd(world: World) -> Iterator[Crowd]:
    """Jobs with daemons."""
    made = Crowd(world)
    try:
        yield made
    finally:
        made.end()


ALL = {"main", *DAEMONS}


def test_each_commands_daemons_live_as_long_as_it_does_and_its_output_is_its_own(crowd: Crowd, world: World) -> None:
    for job_id in JOBS:
        crowd.submit(job_id)
    with world.worker("--concurrency", "4", "--max-jobs", "4") as worker:
        for job_id in JOBS:
            crowd.pids(job_id)
        for number, job_id in enumerate(JOBS):
            world.tell(f"go-{job_id}")
            world.wait_state("done", job_id)
            assert not crowd.living(job_id) & {"main", *SURE}
            assert [crowd.living(other) for other in JOBS[number + 1 :]] == [ALL] * (3 - number)
        assert worker.wait() == 0
    assert [crowd.living(job_id) for job_id in JOBS] == [set()] * 4, "the last has ended the strangers too"
    assert {world.job(job_id).attempts for job_id in JOBS} == {1}
    for job_id in JOBS:
        assert (world.folder / "state-a/jobs" / job_id / "job.log").read_text() == f"output of {job_id}\n"
    assert sorted(worker.stdout.decode().splitlines()) == [f"output of {job_id}" for job_id in JOBS]


def test_many_short_commands_at_once_all_end_well_at_their_first_attempt(world: World) -> None:
    names = [f"short-{number}" for number in range(24)]
    seconds = str(100_000 + os.getpid())
    for name in names:
        world.submit(["bash", "-c", f"(env -i setsid sleep {seconds} >/dev/null 2>&1 &); setsid true"], name)
    with world.worker("--concurrency", "4", "--max-jobs", "24") as worker:
        assert worker.wait() == 0
    assert {(world.job(name).state, world.job(name).attempts) for name in names} == {("done", 1)}
    left = [process.pid for process in psutil.process_iter(["cmdline"]) if seconds in (process.info["cmdline"] or ())]
    assert not left


def test_a_drain_ends_them_all_and_hands_all_back(crowd: Crowd, world: World) -> None:
    for job_id in JOBS:
        crowd.submit(job_id)
    with world.worker("--concurrency", "4", HEELER_STOP_GRACE="10") as worker:
        for job_id in JOBS:
            crowd.pids(job_id)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert [crowd.living(job_id) for job_id in JOBS] == [set()] * 4
    assert {(world.job(job_id).state, world.job(job_id).failures) for job_id in JOBS} == {("pending", 0)}


def test_a_cancelled_command_ends_alone(crowd: Crowd, world: World) -> None:
    for job_id in JOBS:
        crowd.submit(job_id)
    with world.worker("--concurrency", "4", "--max-jobs", "4") as worker:
        for job_id in JOBS:
            crowd.pids(job_id)
        assert world.desk.cancel("job-1")
        worker.wait_for("job_settled", job_id="job-1", outcome="cancelled")
        assert not crowd.living("job-1") & {"main", *SURE}
        for job_id in ("job-0", "job-2", "job-3"):
            assert crowd.living(job_id) == ALL
            world.tell(f"go-{job_id}")
        assert worker.wait() == 0
    assert [crowd.living(job_id) for job_id in JOBS] == [set()] * 4
    assert [world.job(job_id).state for job_id in JOBS] == ["done", "cancelled", "done", "done"]


def test_a_command_that_fails_or_runs_out_of_time_ends_alone(crowd: Crowd, world: World) -> None:
    crowd.submit("job-0", end="exit 3", max_failures=1)
    crowd.submit("job-1", timeout=5, max_failures=1)
    crowd.submit("job-2")
    with world.worker("--concurrency", "3", "--max-jobs", "3") as worker:
        for job_id in JOBS[:3]:
            crowd.pids(job_id)
        world.tell("go-job-0")
        for job_id in JOBS[:2]:
            world.wait_state("failed", job_id)
            assert not crowd.living(job_id) & {"main", *SURE}
        assert crowd.living("job-2") == ALL
        world.tell("go-job-2")
        assert worker.wait() == 0
    assert [crowd.living(job_id) for job_id in JOBS[:3]] == [set()] * 3
    assert world.job("job-2").state == "done"


def test_the_next_runtime_ends_what_is_left_of_all_of_them(crowd: Crowd, world: World) -> None:
    for job_id in JOBS:
        crowd.submit(job_id, ("plain", "tagged"))
    with world.worker("--concurrency", "4") as first:
        pids = {job_id: crowd.pids(job_id) for job_id in JOBS}
        first.signal(signal.SIGKILL)
        first.wait()
        eventually(lambda: not any(alive(pids[job_id]["main"]) for job_id in JOBS), "the programs are dead")
    assert [crowd.living(job_id) for job_id in JOBS] == [{"plain", "tagged"}] * 4
    for job_id in JOBS:
        world.tell(f"go-{job_id}")
    with world.worker("--concurrency", "4", "--max-jobs", "4") as second:
        second.wait_for("leftover_processes_killed")
        assert not [pid for job_id in JOBS for pid in pids[job_id].values() if alive(pid)]
        assert second.wait() == 0
    assert {(world.job(job_id).state, world.job(job_id).attempts) for job_id in JOBS} == {("done", 2)}
    assert {world.job(job_id).failures for job_id in JOBS} == {0}


def test_a_job_whose_folder_another_has_waits_for_it_and_no_failure_is_counted(crowd: Crowd, world: World) -> None:
    shared = {"bucket": "jobs", "prefix": "{job_id}/ck/", "local_path": "work/shared"}
    sync = {"before": [shared], "during": [shared]}
    crowd.submit("job-0", (), sync=sync)
    with world.worker("--concurrency", "2", "--max-jobs", "2") as worker:
        crowd.pids("job-0")
        crowd.submit("job-1", (), sync=sync)
        world.tell("go-job-1")
        told = worker.wait_for("job_settled", job_id="job-1", outcome="release")
        assert str(world.folder / "work/shared") in told["reason"]
        assert not (world.folder / "job-1-main").exists()
        assert world.job("job-0").state == "running"
        world.tell("go-job-0")
        assert worker.wait() == 0
    assert [world.job(job_id).state for job_id in JOBS[:2]] == ["done", "done"]
    assert [world.job(job_id).failures for job_id in JOBS[:2]] == [0, 0]


@pytest.mark.parametrize("folder", ["inputs", "checkpoints", "outputs"])
def test_folders_of_the_settings_have_to_be_each_jobs_own(tmp_path: Path, folder: str) -> None:
    environment = clean_environment(
        HEELER_STATE_DIR=str(tmp_path / "state"), **{f"HEELER_{folder.upper()}": "s3://bucket/{job_id}/"}
    )
    done = heeler(
        *("run", "--source", f"local:{tmp_path}/q", "--control", "off", "--concurrency", "2"), env=environment
    )
    assert done.returncode == 64
    assert "with --concurrency each job needs folders of its own: put {job_id} into" in done.stderr


def test_commands_with_folders_of_the_settings_each_have_their_own(world: World) -> None:
    for job_id in JOBS:
        world.submit(["bash", "-c", 'echo "$HEELER_JOB_ID" > "$OUTPUT_DIR/name"'], job_id)
    folders = {"HEELER_OUTPUTS": "s3://jobs/{job_id}/out/", "OUTPUT_DIR": f"{world.folder}/work/{{job_id}}/out"}
    with world.worker("--concurrency", "4", "--max-jobs", "4", **folders) as worker:
        assert worker.wait() == 0
    assert {job_id: world.stored("out/name", job_id) for job_id in JOBS} == {
        job_id: f"{job_id}\n".encode() for job_id in JOBS
    }
