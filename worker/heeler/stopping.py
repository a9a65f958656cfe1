"""How the runtime is told to stop, and how it is kept from staying after that."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import NoReturn

import anyio

from heeler import signals
from heeler.drain import Drain
from heeler.status import Status

_LAST_SECONDS = 0.2


async def announce_drain(drain: Drain, status: Status) -> None:
    """Say when the drain begins."""
    await drain.requested.wait()
    status.draining = True
    status.event("drain", reason=drain.reason, seconds=round(drain.left(), 3))


async def leave_at_deadline(drain: Drain, status: Status, leave: Callable[[], NoReturn]) -> None:
    """End the process at the drain's deadline, when a call that hangs keeps us from it."""
    with drain.until_over():
        await anyio.sleep_forever()
    await anyio.sleep(_LAST_SECONDS)
    status.fault("exit_forced", error="the grace period is over, and a call does not end")
    leave()


async def take_signals(drain: Drain, status: Status) -> None:
    """SIGTERM and SIGINT drain; each further SIGINT hurries."""
    try:
        with anyio.open_signal_receiver(*signals.DRAIN_SIGNALS) as received:
            for number in signals.held():
                _take_signal(number, drain, status)
            async for number in received:
                _take_signal(number, drain, status)
    finally:
        signals.hold()  # all is said and done: a late one must not change the exit code


def _take_signal(number: int, drain: Drain, status: Status) -> None:
    name = signal.Signals(number).name
    if not drain.begin(name) and number == signal.SIGINT:
        drain.hurry()
        status.event("drain_hurried", seconds=round(drain.left(), 3))
