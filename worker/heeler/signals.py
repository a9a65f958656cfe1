"""SIGTERM and SIGINT from the first moment on. This module imports nothing slow and nothing of ours.

While modules are still being imported a signal would kill the process, or raise in the middle of an import. So
`hold` only notes it; `Held.deliver` hands it to whoever is ready: the supervisor, or the default.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

DRAIN_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_held: list[int] = []


def _note(number: int, _frame: FrameType | None) -> None:
    _held.append(number)


def hold() -> None:
    """From now on note the signals that ask us to stop instead of dying of them."""
    for number in DRAIN_SIGNALS:
        signal.signal(number, _note)


def held() -> list[int]:
    """Take the signals that came since `hold`, oldest first."""
    taken = _held[:]
    _held.clear()
    return taken


def release() -> None:
    """Give the signals their usual meaning again, for commands that need no drain; one that came counts now."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in held():
        os.kill(os.getpid(), number)
