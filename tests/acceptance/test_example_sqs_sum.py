"""The SQS example as one runs it: two workers, a kill, and the sum that the formula gives."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.support.worker import clean_environment

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "sqs-sum" / "run_sum.py"
TOTAL = "total 333333833333500000, by the formula 333333833333500000: the same"


@contextmanager
def example(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The example; ends by itself, by our signal, or after 120 s."""
    scratch = folder / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        # Settings of the person who runs it must not get in the way.
        env=clean_environment(TMPDIR=str(scratch), HEELER_SOURCE="local:elsewhere", SQS_QUEUE_URL="http://elsewhere/q"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    too_long = threading.Timer(120, process.terminate)
    too_long.start()
    try:
        yield process
    finally:
        too_long.cancel()
        if process.poll() is None:
            process.terminate()
            process.communicate()
    left = started_below(scratch)
    for found in left:
        found.kill()
    assert left == [], "nothing that it started runs on"
    assert list(scratch.iterdir()) == [], "its temporary folder is gone"


def started_below(scratch: Path) -> list[psutil.Process]:
    """Processes that inherited this temporary folder from the example."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(scratch) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def reported(said: str) -> dict[str, tuple[int, int]]:
    """Attempts and interruptions of each job."""
    found = re.findall(r"^(sum-\d)  done  attempts (\d+)  interruptions (\d+)  sum \d+$", said, re.MULTILINE)
    return {job_id: (int(attempts), int(interruptions)) for job_id, attempts, interruptions in found}


def test_the_parts_submitted_by_boto3_give_the_sum(tmp_path: Path) -> None:
    with example(tmp_path) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert TOTAL in said
    assert [*reported(said)] == ["sum-0", "sum-1", "sum-2", "sum-3"], said
    assert "killed" not in said


def test_with_a_worker_killed_its_parts_go_on_elsewhere_and_the_sum_is_the_same(tmp_path: Path) -> None:
    with example(tmp_path, "--kill", "--heeler-submit") as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert TOTAL in said
    killed = re.search(r"^--- machine-1 is killed \(SIGKILL\) with (sum-\d) and (sum-\d);", said, re.MULTILINE)
    assert killed, said
    jobs = reported(said)
    assert len(jobs) == 4
    for job_id in killed.groups():
        attempts, interruptions = jobs[job_id]
        assert interruptions >= 1, said
        assert attempts == interruptions + 1, said
    went_on = re.findall(r"^machine-2: (\d+) to \d+: going on at (\d+)$", said, re.MULTILINE)
    assert len(went_on) >= 2, said
    assert all(int(at) > int(first) for first, at in went_on), said


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with example(tmp_path) as process:
        assert process.stdout is not None
        assert any("jobs submitted" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said
