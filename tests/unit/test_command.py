"""Command mode: what a program's end means, and what is the machine's fault rather than the program's."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest

from heeler.app import process as process_module
from heeler.app.base import Assignment
from heeler.app.command import CommandDelivery, CommandSettings
from heeler.app.output import JobLogs
from heeler.app.process import RegisterError, Started
from heeler.app.processes import UndyingError
from heeler.app.siblings import Siblings
from heeler.drain import Drain
from heeler.job import Ending, Job, Outcome


class Register:
    """Refuses what it is told to refuse."""

    def __init__(self, error: RegisterError | None = None) -> None:
        self.error = error
        self.stuck_pids: list[int] = []

    def started(self, process: Started) -> None:
        if self.error is not None:
            raise self.error

    def ended(self, process: Started) -> None:
        return

    def stuck(self, process: Started, pids: Sequence[int]) -> None:
        self.stuck_pids += pids


def deliver(folder: Path, argv: list[str], register: Register) -> Ending:
    async def nothing() -> float:
        return 0.0

    async def run() -> Ending:
        settings = CommandSettings(dict(os.environ), frozenset({75}), folder / "logs")
        delivery = CommandDelivery(settings, register, lambda _job, _error: None)
        body = json.dumps({"command": argv[0], "arguments": argv[1:]}).encode()
        return await delivery.deliver(Assignment(Job("j", body), 1, {}, nothing, lambda: None), Drain(30))

    return anyio.run(run)


@pytest.mark.parametrize(
    ("code", "outcome", "whole", "fruitless"),
    [(0, Outcome.DONE, True, False), (75, Outcome.RELEASE, True, True), (3, Outcome.RETRY, False, False)],
)
def test_an_exit_code_decides(tmp_path: Path, code: int, outcome: Outcome, whole: bool, fruitless: bool) -> None:
    ending = deliver(tmp_path, ["sh", "-c", f"exit {code}"], Register())
    assert (ending.outcome, ending.whole, ending.fruitless) == (outcome, whole, fruitless)


def test_a_state_folder_that_is_full_sends_the_job_elsewhere_and_nothing_runs(tmp_path: Path) -> None:
    register = Register(RegisterError("the state folder /state can't be written (database or disk is full)"))
    ending = deliver(tmp_path, ["sh", "-c", f"sleep 0.3; touch {tmp_path}/ran"], register)
    assert (ending.outcome, ending.delay, ending.fruitless, ending.whole) == (Outcome.RELEASE, 5.0, False, False)
    assert "the state folder /state" in ending.reason
    assert not (tmp_path / "ran").exists()


def test_a_launcher_that_dies_sends_the_job_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "launcher.py").write_text("import sys; sys.exit(1)")
    monkeypatch.setattr(process_module, "_LAUNCHER", tmp_path / "launcher.py")
    ending = deliver(tmp_path, ["true"], Register())
    assert (ending.outcome, ending.delay, ending.fruitless) == (Outcome.RELEASE, 5.0, True)


@pytest.mark.parametrize(("code", "outcome"), [(0, Outcome.RELEASE), (75, Outcome.RELEASE), (3, Outcome.RETRY)])
def test_while_a_process_does_not_die_nothing_is_captured_whole_and_nothing_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, outcome: Outcome
) -> None:
    def undying(*_: object) -> int:
        raise UndyingError([4711])

    monkeypatch.setattr(Siblings, "kill", undying)
    register = Register()
    ending = deliver(tmp_path, ["sh", "-c", f"exit {code}"], register)
    assert (ending.outcome, ending.whole, ending.result.exit_code) == (outcome, False, code)
    assert register.stuck_pids == [4711]


def make_logs(folder: Path, numbers: range, modified: float) -> None:
    for number in numbers:
        (folder / f"j{number}").mkdir(parents=True)
        os.utime(folder / f"j{number}", (modified, modified))


def test_the_log_of_a_running_job_stays_however_many_start_and_its_age_counts_from_its_end(tmp_path: Path) -> None:
    told: list[str] = []
    logs = JobLogs(tmp_path, lambda job_id, _error: told.append(job_id))
    log = logs.open("long")
    os.utime(tmp_path / "long", (1000, 1000))
    make_logs(tmp_path, range(60), 2000)
    logs.close("other", logs.open("other"))
    assert (tmp_path / "long").exists()
    assert len([*tmp_path.iterdir()]) == 52
    log.write(b"still here")
    logs.close("long", log)
    logs.close("next", logs.open("next"))
    assert (tmp_path / "long/job.log").read_bytes() == b"still here"
    os.utime(tmp_path / "long", (1000, 1000))
    logs.close("last", logs.open("last"))
    assert not (tmp_path / "long").exists()
    assert told == []


def test_commands_at_once_are_told_apart_and_their_logs_kept(tmp_path: Path) -> None:
    """The first outlives sixty others."""

    async def nothing() -> float:
        return 0.0

    async def run() -> None:
        settings = CommandSettings(dict(os.environ), frozenset({75}), tmp_path / "logs")
        delivery = CommandDelivery(settings, Register(), lambda _job, _error: None)

        async def one(job_id: str, command: str) -> None:
            body = json.dumps({"command": "sh", "arguments": ["-c", command]}).encode()
            assignment = Assignment(Job(job_id, body), 1, {}, nothing, lambda: None)
            endings[job_id] = await delivery.deliver(assignment, Drain(30))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(one, "long", f"echo first; while ! test -e {tmp_path}/go; do sleep 0.01; done; echo last")
            while not (tmp_path / "logs/long/job.log").exists():  # noqa: ASYNC110
                await anyio.sleep(0.01)
            os.utime(tmp_path / "logs/long", (1000, 1000))
            make_logs(tmp_path / "logs", range(60), 2000)
            for number in range(3):
                await one(f"short-{number}", "(setsid sleep 1000 >/dev/null 2>&1 &); exit 0")
            (tmp_path / "go").touch()

    endings: dict[str, Ending] = {}
    anyio.run(run)
    assert [ending.outcome for ending in endings.values()] == [Outcome.DONE] * 4
    assert (tmp_path / "logs/long/job.log").read_text() == "first\nlast\n"
