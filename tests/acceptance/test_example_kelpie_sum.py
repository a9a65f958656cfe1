"""The Kelpie example as one runs it: two machines, a kill, a new machine, and the sum that the formula gives."""

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

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "kelpie-sum" / "run_kelpie_sum.py"
TOTAL = "total 9000045000050000, by the formula 9000045000050000: the same"


@contextmanager
def example(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The example; ends by itself, by our signal, or after 120 s."""
    scratch = folder / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=folder,
        # Settings of the person who runs it must not get in the way.
        env=clean_environment(
            TMPDIR=str(scratch), HEELER_SOURCE="local:elsewhere", KELPIE_API_URL="http://elsewhere", INPUT_DIR="/else"
        ),
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
    """Processes whose temporary folder is this one, or one in it."""
    found = []
    for process in psutil.process_iter():
        try:
            theirs = Path(process.environ().get("TMPDIR") or "/")
            if theirs.is_relative_to(scratch) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def reported(said: str) -> dict[str, tuple[str, int]]:
    """The machine that completed each job, and its failures."""
    found = re.findall(r"^(\w)  completed  on (machine-\d)  failures (\d+)  sum \d+$", said, re.MULTILINE)
    return {name: (machine, int(failures)) for name, machine, failures in found}


def test_the_jobs_of_kelpies_api_give_the_sum(tmp_path: Path) -> None:
    with example(tmp_path) as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert TOTAL in said
    assert [*reported(said)] == ["a", "b", "c"], said
    assert {failures for _, failures in reported(said).values()} == {0}
    assert "killed" not in said


def test_with_a_machine_killed_its_job_goes_on_elsewhere_and_the_sum_is_the_same(tmp_path: Path) -> None:
    with example(tmp_path, "--kill") as process:
        said, _ = process.communicate()
    assert process.returncode == 0, said
    assert TOTAL in said
    pattern = r"^--- machine-1 is killed \(SIGKILL\) in (\w); step (\d+) of 20 is in storage, and its disk is gone$"
    killed = re.search(pattern, said, re.MULTILINE)
    assert killed, said
    machines = reported(said)
    assert [*machines] == ["a", "b", "c"], said
    assert machines[killed[1]][0] in ("machine-2", "machine-3"), said
    assert {failures for _, failures in machines.values()} == {0}, "an interruption is no failure"
    went_on = re.findall(r"^(machine-\d): going on after step (\d+) of 20$", said, re.MULTILINE)
    # What storage was just taking in when we looked may have made it a later step.
    steps = [int(step) for machine, step in went_on if machine == machines[killed[1]][0]]
    assert steps, said
    assert max(steps) >= int(killed[2]) >= 1, said


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with example(tmp_path, "--kill") as process:
        assert process.stdout is not None
        assert any("machine-3 starts" in line for line in process.stdout)
        assert len(started_below(tmp_path / "scratch")) > 3, "the example, the services, two workers"
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in said
