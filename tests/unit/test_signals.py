"""Signals that come before anybody can take them, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

PRELUDE = "import os, signal, sys, time; from heeler import signals; me = os.getpid(); "


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=20, check=False
    )


def test_held_signals_do_not_kill_and_are_given_out_once_in_order() -> None:
    done = run(
        "signals.hold(); os.kill(me, signal.SIGTERM); os.kill(me, signal.SIGINT);"
        "print(*signals.held()); print(*signals.held())"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["15 2", ""]


def test_a_signal_held_during_imports_does_not_break_them() -> None:
    done = run("signals.hold(); os.kill(me, signal.SIGINT); import heeler.supervisor; print(*signals.held())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_release_signals_have_their_usual_meaning(number: int) -> None:
    done = run(f"signals.hold(); signals.release(); os.kill(me, {int(number)}); time.sleep(5); print('alive')")
    assert "alive" not in done.stdout
    assert done.returncode in (-number, -signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_came_while_held_counts_at_release(number: int) -> None:
    done = run(f"signals.hold(); os.kill(me, {int(number)}); signals.release(); time.sleep(5); print('alive')")
    assert "alive" not in done.stdout
    assert done.returncode in (-number, -signal.SIGINT)


def test_the_module_imports_nothing_slow() -> None:
    done = run(
        "print(*sorted(name for name in sys.modules if name.startswith(('heeler', 'anyio', 'asyncio', 'pydantic'))))"
    )
    assert done.stdout.split() == ["heeler", "heeler.signals"]
