"""Kelpie's API out of reach for a minute at each stage of a job, and kills meanwhile: it ends once, nothing is lost."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from heeler.local.kelpie_faults import Fault
from heeler.local.kelpie_rows import Job
from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import eventually
from tests.support.kelpie_server import KelpieServer
from tests.support.s3 import S3Server
from tests.support.worker import Worker

OUTAGE = 60.0
"""Seconds."""
RUNS = "echo run >> $W/runs; echo 1 > $CHECKPOINT_DIR/step; echo result > $OUTPUT_DIR/result\n"
WAITS = (
    RUNS + "touch $W/began; while ! test -e $W/more; do sleep 0.05; done; echo 2 > $CHECKPOINT_DIR/step\n"
    "touch $W/saved; while ! test -e $W/go; do sleep 0.05; done"
)


@dataclass
class Stage:
    """A worker that is at one stage of its job when the API goes.

    Attributes:
        name: Of the stage; its keys lie below.
        kelpie: Its world.
        worker: It.
        job: The job; "" before there is one.
    """

    name: str
    kelpie: KelpieWorld
    worker: Worker
    job: str = ""

    def submit(self, text: str, **fields: Any) -> None:
        """The job."""
        self.job = self.kelpie.submit(self.kelpie.bash(text), sync=self.kelpie.sync(self.name), **fields)

    def stored(self, step: int, *, result: bool) -> bool:
        """Whether storage holds just this."""
        wanted = {f"{self.name}/checkpoint/step": b"%d\n" % step}
        if result:
            wanted[f"{self.name}/output/result"] = b"result\n"
        return self.kelpie.keys(f"{self.name}/") == wanted

    def ended(self, status: str, *, failures: int = 0) -> None:
        """Wait until the API has heard of the job's end, once, and the worker takes the next one."""
        found = self.kelpie.wait_status(status, self.job, timeout=60)
        assert (found["machine_id"], found["num_failures"]) == ("one", failures)
        self.worker.wait_for("job_settled", job_id=self.job, told=True)
        assert (self.kelpie.folder / "runs").read_text() == "run\n"
        other = self.kelpie.submit(["true"])
        self.kelpie.wait_status("completed", other)
        assert self.kelpie.events(self.job) == ["created", "started", status]
        assert self.worker.process.poll() is None


@contextmanager
def stage(name: str, folder: Path, storage: S3Server) -> Iterator[Stage]:
    """A worker without a job, with an API of its own."""
    (folder / name).mkdir()
    with KelpieServer() as server:
        kelpie = KelpieWorld(folder / name, storage, server)
        try:
            with kelpie.worker() as worker:
                worker.wait_for("phase", phase="receive")
                yield Stage(name, kelpie, worker)
        finally:
            kelpie.close()


def test_a_minute_without_the_api_at_any_stage_loses_nothing_and_is_told_once(
    tmp_path: Path, storage: S3Server
) -> None:
    with ExitStack() as stack:
        asking, held, lapsed, done, failed = stages = [
            stack.enter_context(stage(name, tmp_path, storage))
            for name in ("asking", "held", "lapsed", "completed", "failed")
        ]
        eventually(lambda: asking.kelpie.server.faults.calls["work"] >= 2, "it asks for work")
        held.submit(WAITS, heartbeat_interval=60)  # nobody would be given it within two minutes
        lapsed.submit(WAITS, heartbeat_interval=2)  # after 4 s somebody else would
        done.kelpie.server.faults.fail("completed", Fault.DROP, float("inf"))
        done.submit(RUNS, heartbeat_interval=60)
        failed.kelpie.server.faults.fail("failed", Fault.ERROR, float("inf"))
        failed.submit(RUNS + "exit 3", heartbeat_interval=60, max_failures=1)
        for each in (held, lapsed):
            eventually(lambda each=each: each.stored(1, result=False), "the first step is stored")  # type: ignore[misc]
        eventually(lambda: done.kelpie.server.faults.calls["completed"] >= 1, "its end is reported")
        eventually(lambda: failed.kelpie.server.faults.calls["failed"] >= 1, "its failure is reported")

        for each in stages:
            each.kelpie.server.stop()
            each.kelpie.server.faults.clear()
        back = time.monotonic() + OUTAGE
        asking.submit(RUNS)
        lapsed.worker.wait_for("lease_lapsed")
        for each in (held, lapsed):
            each.kelpie.tell("more")
            each.kelpie.told("saved")
        eventually(lambda: held.stored(2, result=False), "the second step is stored while the API is away")
        time.sleep(max(0.0, back - time.monotonic()))  # the outage itself
        assert not held.worker.find("lease_lapsed")
        assert lapsed.stored(1, result=False)  # it may not be ours to change any more
        assert done.stored(1, result=True)
        for each in stages:
            assert each.kelpie.events(each.job)[2:] == []
            each.kelpie.server.start()

        eventually(lambda: lapsed.stored(2, result=False), "the second step is stored once the API has answered")
        lapsed.worker.wait_for("lease_confirmed_again")
        for each in (held, lapsed):
            each.kelpie.tell("go")
        asking.ended("completed")
        assert asking.stored(1, result=True)
        for each in (held, lapsed):
            each.ended("completed")
            assert each.stored(2, result=True)
        done.ended("completed")
        failed.ended("failed", failures=1)
        assert not failed.kelpie.keys("failed/output/")


# Killed meanwhile.


def _was_heard(kelpie: KelpieWorld) -> Callable[[], object]:
    """The API takes the report, and nobody gets an answer any more."""
    kelpie.server.faults.fail("completed", Fault.LOSE, float("inf"))

    def listen(event: str, _job: Job) -> None:
        if event == "completed":
            kelpie.server.faults.fail("get", Fault.DROP, float("inf"))

    kelpie.server.table.listeners.append(listen)
    return lambda: kelpie.server.faults.calls["completed"]


def _was_not_heard(kelpie: KelpieWorld) -> Callable[[], object]:
    """No report gets to the API."""
    kelpie.server.faults.fail("completed", Fault.DROP, float("inf"))
    return lambda: kelpie.server.faults.calls["completed"]


@pytest.mark.parametrize("lose", [_was_heard, _was_not_heard], ids=["heard", "not heard"])
def test_what_a_killed_worker_could_not_report_the_next_process_reports_once_without_running_the_job_again(
    kelpie: KelpieWorld, lose: Callable[[KelpieWorld], Callable[[], object]]
) -> None:
    reported = lose(kelpie)
    job = kelpie.submit(kelpie.bash(RUNS), sync=kelpie.sync())
    with kelpie.worker() as worker:
        eventually(reported, "the job's end is reported")
        kelpie.server.stop()
        worker.signal(signal.SIGKILL)
        worker.wait()
    with kelpie.worker("--max-jobs", "1") as worker:
        worker.wait_for("queue_unreachable")
        kelpie.server.faults.clear()
        other = kelpie.submit(["true"])
        kelpie.server.start()
        assert worker.wait() == 0
        assert [event["job_id"] for event in worker.find("job_received")] == [other]
    assert kelpie.events(job) == ["created", "started", "completed"]
    assert kelpie.events(other) == ["created", "started", "completed"]
    assert (kelpie.folder / "runs").read_text() == "run\n"
    assert kelpie.keys() == {"job/checkpoint/step": b"1\n", "job/output/result": b"result\n"}
    assert kelpie.server.job(job)["num_failures"] == 0


@pytest.mark.parametrize("away", [False, True], ids=["with the api", "without"])
def test_a_process_after_one_that_was_killed_goes_on_with_its_job_at_once_from_the_files_that_are_there(
    kelpie: KelpieWorld, away: bool
) -> None:
    program = kelpie.bash(
        "cat $CHECKPOINT_DIR/step >> $W/starts 2> /dev/null || echo 0 >> $W/starts\n"
        "test $(wc -l < $W/starts) = 2 && exit 0\n"
        "echo 1 > $CHECKPOINT_DIR/step; while :; do sleep 1; done"
    )
    # Ten minutes pass before anybody is given it again.
    job = kelpie.submit(program, heartbeat_interval=300, sync=kelpie.sync())
    with kelpie.worker() as worker:
        eventually(lambda: kelpie.keys() == {"job/checkpoint/step": b"1\n"}, "the checkpoint is stored")
        if away:
            kelpie.server.stop()
        worker.signal(signal.SIGKILL)
        worker.wait()
    with kelpie.worker() as worker:
        if away:
            worker.wait_for("queue_unreachable")
            kelpie.server.start()
        kelpie.wait_status("completed", job)
    assert (kelpie.folder / "starts").read_text() == "0\n1\n"
    assert kelpie.events(job) == ["created", "started", "completed"]
    assert kelpie.server.job(job)["num_failures"] == 0
    assert not kelpie.storage.stats.find("GetObject", "job/checkpoint/step")
