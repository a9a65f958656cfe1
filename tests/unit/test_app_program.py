"""The app's process: started again when it dies, given up with its own code, and ended to the last of its kin."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import psutil
import pytest

from heeler.app import process as process_module
from heeler.app import program as program_module
from heeler.app.base import GivenUp
from heeler.app.process import Exit, MachineError
from heeler.app.program import Life, Program, ProgramSettings, grace_of
from heeler.drain import Drain
from tests.support.apps import Register, Told

pytestmark = pytest.mark.anyio

SLEEPS = ["sleep", "1000"]
STUBBORN = ["bash", "-c", "trap '' TERM; echo up; while :; do sleep 0.05; done"]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_FIRST_REST", 0.02)


class World:
    """A program with all that it is told."""

    def __init__(self, folder: Path, argv: Sequence[str], max_restarts: int = 2, grace: float = 30.0) -> None:
        self.told = Told()
        self.drain = Drain(grace)
        self.log = folder / "logs" / "app.log"
        settings = ProgramSettings(argv, {**os.environ, "W": str(folder)}, self.log, max_restarts)
        self.program = Program(settings, Register(), self.drain, self.told, self.told, random.Random(1))

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Program]:
        async with anyio.create_task_group() as group:
            group.start_soon(self.program.run)
            with anyio.fail_after(30):
                yield self.program
            group.cancel_scope.cancel()

    async def life(self, after: Life | None = None) -> Life:
        """The next life after that one."""
        while self.program.life is None or self.program.life is after:
            await self.program.changed.wait()
        return self.program.life

    async def up(self) -> None:
        """It has said so."""
        await until(lambda: self.log.exists() and "up\n" in self.log.read_text())

    async def given_up(self) -> GivenUp:
        while self.program.given_up is None:
            await self.program.changed.wait()
        return self.program.given_up


async def until(condition: Callable[[], object]) -> None:
    with anyio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - files have no events
            await anyio.sleep(0.005)


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def fails_with(end: str) -> list[str]:
    return ["bash", "-c", f"echo x >> $W/runs; {end}"]


@pytest.mark.parametrize(
    ("end", "code", "words"),
    [
        ("exit 3", 3, "exit code 3"),
        ("exit 0", 0, "exit code 0"),
        ("kill -9 $$", 137, "killed by SIGKILL"),
        ("kill -TERM $$", 143, "killed by SIGTERM"),
    ],
)
async def test_a_program_that_keeps_ending_is_given_up_with_its_code(
    tmp_path: Path, end: str, code: int, words: str
) -> None:
    world = World(tmp_path, fails_with(end), max_restarts=2)
    async with world.running():
        why = await world.given_up()
    assert why.exit_code == code
    assert words in why.reason
    assert (tmp_path / "runs").read_text() == "x\n" * 3
    assert [fault["restarts"] for fault in world.told.of("app_ended")] == [1, 2]
    assert world.told.of("app_given_up") == [{"error": why.reason, "exit_code": code}]


async def test_without_restarts_the_first_end_is_the_last(tmp_path: Path) -> None:
    world = World(tmp_path, fails_with("exit 7"), max_restarts=0)
    async with world.running():
        assert (await world.given_up()).exit_code == 7
    assert (tmp_path / "runs").read_text() == "x\n"


@pytest.mark.parametrize("argv", [["/no/such/program"], ["/etc/passwd"], ["/"]])
async def test_a_program_that_can_not_be_started_is_given_up_at_once_as_a_usage_error(
    tmp_path: Path, argv: list[str]
) -> None:
    world = World(tmp_path, argv, max_restarts=5)
    async with world.running():
        why = await world.given_up()
    assert why.exit_code == 64
    assert argv[0] in why.reason
    assert world.told.names() == ["app_given_up"]


async def test_a_machine_that_can_not_start_it_now_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = process_module._spawn
    short = [True]

    async def spawn(*args: object) -> object:
        if short:
            short.clear()
            raise MachineError("no memory")
        return await real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(process_module, "_spawn", spawn)
    world = World(tmp_path, SLEEPS)
    async with world.running():
        await world.life()
    assert world.told.of("app_ended")[0]["error"] == "no memory"


async def test_the_rest_grows_between_restarts_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_FIRST_REST", 0.01)
    monkeypatch.setattr(program_module, "_LONGEST_REST", 0.03)
    world = World(tmp_path, fails_with("exit 1"), max_restarts=4)
    async with world.running():
        await world.given_up()
    rests = [fault["restart_in"] for fault in world.told.of("app_ended")]
    for rest, longest in zip(rests, [0.01, 0.02, 0.03, 0.03], strict=True):
        assert isinstance(rest, float)
        assert longest / 2 <= rest <= longest


async def test_a_job_that_was_done_clears_what_went_wrong_before(tmp_path: Path) -> None:
    world = World(tmp_path, SLEEPS, max_restarts=1)
    async with world.running() as program:
        life = await world.life()
        for _ in range(3):
            await life.child.kill()
            life = await world.life(life)
            program.proved()
        await life.child.kill()
        life = await world.life(life)
        await life.child.kill()
        assert (await world.given_up()).exit_code == 137


async def test_a_restart_that_we_asked_for_is_no_fault_and_has_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program_module, "_FIRST_REST", 1000.0)
    world = World(tmp_path, SLEEPS, max_restarts=0)
    async with world.running() as program:
        life = None
        for _ in range(3):
            life = await world.life(life)
            await program.restart()
            assert life.how == Exit(None, 15)
        await world.life(life)
    assert world.told.names() == ["app_started", *["app_restarted", "app_started"] * 3]


async def test_a_restart_between_two_lives_excuses_no_later_end(tmp_path: Path) -> None:
    world = World(tmp_path, SLEEPS, max_restarts=1)
    async with world.running() as program:
        life = await world.life()
        await life.child.kill()
        await life.over.wait()
        assert program.life is None
        await program.restart()
        life = await world.life(life)
        await life.child.kill()
        assert (await world.given_up()).exit_code == 137


async def test_stop_is_sigterm_first_and_sigkill_after_the_grace(tmp_path: Path) -> None:
    polite = World(tmp_path, ["bash", "-c", "trap 'echo asked; exit 5' TERM; echo up; while :; do sleep 0.01; done"])
    async with polite.running() as program:
        life = await polite.life()
        await polite.up()
        await program.stop()
        assert life.how == Exit(5, None)
    assert "asked\n" in polite.log.read_text()
    stubborn = World(tmp_path / "other", STUBBORN)
    async with stubborn.running() as program:
        life = await stubborn.life()
        await stubborn.up()
        begun = time.monotonic()
        await program.stop(grace=0.3)
        assert life.how == Exit(None, 9)
        assert 0.3 <= time.monotonic() - begun < 3


async def test_sigterm_comes_once_however_many_ask(tmp_path: Path) -> None:
    script = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: os.write(1, b'TERM\\n'))\n"
        "print('up', flush=True)\nwhile True: time.sleep(0.01)\n"
    )
    world = World(tmp_path, [sys.executable, "-c", script])
    async with world.running() as program:
        life = await world.life()
        await world.up()
        life.terminate()
        await until(lambda: "TERM" in world.log.read_text())
        life.terminate()
        await program.stop(grace=0.3)
    assert world.log.read_text() == "up\nTERM\n"


FAMILY = """
trap 'exit 0' TERM
bash -c 'trap "" TERM; echo $$ > $W/child; while :; do sleep 0.05; done' &
setsid bash -c 'trap "" TERM; echo $$ > $W/other; while :; do sleep 0.05; done' &
wait
"""
"""The shell itself starts nothing while it waits: a signal that meets it in a fork may be forgotten."""


@pytest.mark.parametrize("how", ["stop", "its own end", "cancelled"])
async def test_nothing_is_left_of_its_descendants(tmp_path: Path, how: str) -> None:
    world = World(tmp_path, ["bash", "-c", FAMILY])

    def pids() -> list[int]:
        try:
            return [int((tmp_path / name).read_text()) for name in ("child", "other")]
        except (OSError, ValueError):
            return []

    async with world.running() as program:
        life = await world.life()
        await until(pids)
        if how == "stop":
            await program.stop()
        elif how == "its own end":
            life.terminate()
            await life.over.wait()
        if how != "cancelled":
            assert all(gone(pid) for pid in pids()), "when it is over, nothing of it may change a file any more"
    assert all(gone(pid) for pid in pids())


async def test_cancelled_it_is_asked_politely_first(tmp_path: Path) -> None:
    script = "trap 'echo bye > $W/bye; echo last word; exit 0' TERM; echo up; while :; do sleep 0.01; done"
    world = World(tmp_path, ["bash", "-c", script])
    async with world.running():
        await world.life()
        await world.up()
    assert (tmp_path / "bye").read_text() == "bye\n"
    assert "last word\n" in world.log.read_text()


async def test_cancelled_what_it_printed_before_is_not_lost(tmp_path: Path) -> None:
    script = "touch $W/up; for n in 1 2 3 4 5; do head -c 30000 /dev/zero; done; touch $W/all; sleep 1000"
    world = World(tmp_path, ["bash", "-c", script])
    async with world.running():
        await world.life()
        await until((tmp_path / "all").exists)
    assert len(world.log.read_bytes()) == 150_000


async def test_a_reader_that_hangs_does_not_keep_it_from_being_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(program_module, "passed_to", lambda _stream: lambda _data: release.wait(20))
    monkeypatch.setattr(process_module, "_DRAIN_OUTPUT_SECONDS", 0.1)
    world = World(tmp_path, ["bash", "-c", "echo up; sleep 1000"])
    async with world.running():
        life = await world.life()
        await world.up()
        begun = time.monotonic()
    assert gone(life.child.started.group)
    assert time.monotonic() - begun < 5
    release.set()


async def test_in_a_drain_a_stubborn_program_is_gone_before_the_deadline(tmp_path: Path) -> None:
    world = World(tmp_path, STUBBORN, grace=2.0)
    async with world.running():
        life = await world.life()
        await world.up()
        world.drain.begin("SIGTERM")
    assert gone(life.child.started.group)
    assert world.drain.left() > 0


async def test_a_drain_in_the_middle_of_a_restart_hastens_it(tmp_path: Path) -> None:
    world = World(tmp_path, STUBBORN, grace=2.0)
    async with world.running() as program:
        life = await world.life()
        await world.up()
        async with anyio.create_task_group() as group:
            group.start_soon(program.restart)
            await anyio.sleep(0.1)
            assert not life.over.is_set()
            world.drain.begin("SIGTERM")
    assert gone(life.child.started.group)
    assert world.drain.left() > 0


async def test_in_a_drain_it_is_not_started_again(tmp_path: Path) -> None:
    world = World(tmp_path, SLEEPS, max_restarts=0)
    async with world.running() as program:
        life = await world.life()
        world.drain.begin("SIGTERM")
        await program.stop()
        await anyio.sleep(0.2)
        assert program.life is None
        assert program.given_up is None
    assert life.over.is_set()
    assert world.told.names() == ["app_started"]


async def test_a_drain_during_the_rest_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_module, "_FIRST_REST", 0.3)
    world = World(tmp_path, fails_with("exit 1"))
    async with world.running():
        await until(lambda: world.told.of("app_ended"))
        world.drain.begin("SIGTERM")
        await anyio.sleep(0.5)
    assert world.told.names() == ["app_started", "app_ended"]


async def test_what_it_prints_is_kept_over_its_lives_and_passed_on(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    world = World(tmp_path, ["bash", "-c", "echo out; echo err >&2; printf '\\377\\0'; exit 1"], max_restarts=1)
    async with world.running():
        await world.given_up()
    kept = world.log.read_bytes()
    assert (kept.count(b"out\n"), kept.count(b"err\n"), kept.count(b"\xff\0")) == (2, 2, 2)


async def test_a_log_that_can_not_be_kept_is_said_and_the_program_runs(tmp_path: Path) -> None:
    world = World(tmp_path, SLEEPS)
    (tmp_path / "logs").write_text("in the way")
    async with world.running():
        await world.life()
    assert len(world.told.of("app_log_failed")) == 1


async def test_the_grace_of_a_drain_leaves_time_for_the_flush() -> None:
    drain = Drain(30.0)
    assert grace_of(drain, 5.0) == 10.0
    drain.begin("x")
    assert grace_of(drain, 5.0) == pytest.approx(24.5, abs=0.1)
    assert grace_of(drain, 100.0) == 1.0
