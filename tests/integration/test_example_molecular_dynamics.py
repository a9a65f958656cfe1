"""The simulation of `examples/molecular-dynamics` by itself: whatever happens, its results are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("openmm")

EXAMPLE = Path(__file__).parents[2] / "examples" / "molecular-dynamics"
STEPS = 60
FLAGS = ["--steps", str(STEPS), "--frame-every", "2", "--checkpoint-every", "6", "--seed", "11"]
RESULTS = {"energies.csv", "final.pdb", "summary.json", "trajectory.dcd"}
EX_TEMPFAIL = 75
TIMEOUT = 60.0


class Machine:
    """A folder in which the simulation runs; `checkpoints` is what a machine after it would be given."""

    def __init__(self, home: Path) -> None:
        self.checkpoints = home / "checkpoint"
        self.output = home / "output"

    def start(self, *more: str) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "INPUT_DIR": str(EXAMPLE / "input"),
            "CHECKPOINT_DIR": str(self.checkpoints),
            "OUTPUT_DIR": str(self.output),
        }
        command = [sys.executable, str(EXAMPLE / "simulate.py"), *FLAGS, *more]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def finish(self, *more: str) -> str:
        """Run to the end, and return what was printed."""
        with self.start(*more) as process:
            printed, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, printed
        return printed

    def run_until(self, step: int, end: Callable[[subprocess.Popen[str]], None]) -> tuple[str, int]:
        """Run, call `end` once so many steps are reported, and return what was printed and the exit code."""
        printed: list[str] = []
        with self.start() as process:
            watchdog = threading.Timer(TIMEOUT, process.kill)
            watchdog.start()
            assert process.stdout is not None
            reached = False
            for line in process.stdout:
                printed.append(line)
                if not reached and line.startswith("step ") and int(line.split()[1].split("/")[0]) >= step:
                    reached = True
                    end(process)
            code = process.wait()
            watchdog.cancel()
        assert reached, "".join(printed)
        return "".join(printed), code

    def results(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self.output.iterdir()}

    def newest(self) -> list[Path]:
        """Checkpoint files, the newest first."""
        return sorted(self.checkpoints.glob("checkpoint-*.chk"), reverse=True)


def coordinates(pdb: bytes) -> list[float]:
    """In ångström: x of all atoms, then y, then z."""
    atoms = [line for line in pdb.decode().splitlines() if line.startswith("ATOM")]
    return [float(line[at : at + 8]) for at in (30, 38, 46) for line in atoms]


def last_frame(dcd: bytes) -> list[float]:
    """The same of a trajectory's last frame, which is three records with their length before and behind."""
    (atoms,) = struct.unpack_from("<i", dcd, 268)
    record = struct.Struct(f"<i{atoms}fi")
    return [value for found in record.iter_unpack(dcd[-3 * record.size :]) for value in found[1:-1]]


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    machine = Machine(tmp_path_factory.mktemp("undisturbed"))
    machine.finish()
    return machine


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine whose simulation was killed a little past the middle, with several checkpoints kept."""
    machine = Machine(tmp_path_factory.mktemp("killed"))
    machine.run_until(30, kill)
    return machine


@pytest.fixture
def machine(killed: Machine, tmp_path: Path) -> Machine:
    """A machine of one's own that was given the files of the killed one."""
    shutil.copytree(killed.checkpoints, tmp_path / "checkpoint")
    return Machine(tmp_path)


def test_results_are_complete_and_carry_no_date(undisturbed: Machine, tmp_path: Path) -> None:
    results = undisturbed.results()
    assert set(results) == RESULTS
    frames, last_step = struct.unpack("<8xi8xi", results["trajectory.dcd"][:24])
    assert (frames, last_step) == (STEPS // 2, STEPS)
    assert len(results["energies.csv"].splitlines()) == 1 + STEPS // 2
    assert last_frame(results["trajectory.dcd"]) == pytest.approx(coordinates(results["final.pdb"]), abs=0.001)
    again = Machine(tmp_path)
    again.finish()
    assert again.results() == results


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(undisturbed: Machine, tmp_path: Path, seed: int) -> None:
    moments = random.Random(seed)
    machine = Machine(tmp_path)
    for _ in range(2):
        process = machine.start()
        delay = moments.uniform(0.2, 1.6)
        try:
            process.communicate(timeout=delay)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
    machine.finish()
    assert machine.results() == undisturbed.results(), f"seed {seed}"


def test_killed_it_goes_on_from_its_newest_checkpoint(undisturbed: Machine, machine: Machine) -> None:
    newest = machine.newest()[0]
    printed = machine.finish()
    assert f"from {newest.name}" in printed
    assert machine.results() == undisturbed.results()


def test_files_longer_than_the_checkpoint_says_are_cut_back(undisturbed: Machine, machine: Machine) -> None:
    newest = machine.newest()[0]
    for name in ("trajectory.dcd", "energies.csv"):
        with (machine.checkpoints / name).open("ab") as file:
            file.write(b"of a later moment" * 1000)
    with (machine.checkpoints / "trajectory.dcd").open("r+b") as file:
        file.seek(8)
        file.write(struct.pack("<i", 999))
        file.seek(20)
        file.write(struct.pack("<i", 1998))
    printed = machine.finish()
    assert f"from {newest.name}" in printed
    assert machine.results() == undisturbed.results()


@pytest.mark.parametrize("name", ["trajectory.dcd", "energies.csv"])
def test_a_file_of_an_earlier_moment_leads_to_an_earlier_checkpoint(
    undisturbed: Machine, machine: Machine, name: str
) -> None:
    newest, older, *_ = machine.newest()
    told = json.loads(older.read_bytes().split(b"\n", 2)[1])
    os.truncate(machine.checkpoints / name, told[Path(name).stem]["length"])
    printed = machine.finish()
    assert f"{newest.name} can't be used" in printed
    assert f"from {older.name}" in printed
    assert machine.results() == undisturbed.results()


def test_a_torn_newest_checkpoint_leads_to_an_earlier_one(undisturbed: Machine, machine: Machine) -> None:
    newest, older, *_ = machine.newest()
    os.truncate(newest, newest.stat().st_size // 2)
    printed = machine.finish()
    assert f"{newest.name} can't be used" in printed
    assert f"from {older.name}" in printed
    assert machine.results() == undisturbed.results()


def test_a_missing_newest_checkpoint_leads_to_an_earlier_one(undisturbed: Machine, machine: Machine) -> None:
    newest, older, *_ = machine.newest()
    newest.rename(newest.with_name(f".{newest.name}.tmp"))
    printed = machine.finish()
    assert f"from {older.name}" in printed
    assert not list(machine.checkpoints.glob(".*"))
    assert machine.results() == undisturbed.results()


def test_a_trajectory_of_another_history_is_not_continued(undisturbed: Machine, machine: Machine) -> None:
    with (machine.checkpoints / "trajectory.dcd").open("r+b") as file:
        file.seek(400)
        file.write(b"another machine's")
    printed = machine.finish()
    assert "starting at step 0" in printed
    assert machine.results() == undisturbed.results()


def test_without_its_trajectory_it_starts_again(undisturbed: Machine, machine: Machine) -> None:
    (machine.checkpoints / "trajectory.dcd").unlink()
    printed = machine.finish()
    assert "starting at step 0" in printed
    assert machine.results() == undisturbed.results()


def test_sigterm_writes_a_checkpoint_and_asks_to_be_run_again(undisturbed: Machine, tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    printed, code = machine.run_until(12, lambda process: process.send_signal(signal.SIGTERM))
    assert code == EX_TEMPFAIL
    stopped_at = printed.splitlines()[-1].split("step ")[1].split(";")[0]
    assert machine.newest()[0].name == f"checkpoint-{int(stopped_at):09d}.chk"
    assert not machine.output.exists()
    printed = machine.finish()
    assert f"resuming at step {stopped_at}" in printed
    assert machine.results() == undisturbed.results()


def test_run_again_after_its_end_it_only_writes_the_results_again(undisturbed: Machine, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.checkpoints, tmp_path / "checkpoint")
    machine = Machine(tmp_path)
    printed = machine.finish()
    assert f"resuming at step {STEPS}" in printed
    assert machine.results() == undisturbed.results()


def test_a_checkpoint_of_another_run_is_refused_and_kept(machine: Machine) -> None:
    before = {path.name: path.read_bytes() for path in machine.checkpoints.iterdir()}
    with machine.start("--seed", "12") as process:
        printed, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "belongs to another run" in printed
    assert {path.name: path.read_bytes() for path in machine.checkpoints.iterdir()} == before
