"""An asyncio event loop in virtual time: `anyio.sleep` and its kin take no real time at all.

Where a loop would wait for its next timer, this one moves its clock there. While a worker thread of anyio's is busy
it waits for the thread instead, so that time never jumps past work that is under way. A loop that waits for nothing
that could ever happen raises instead of hanging.

    @pytest.fixture
    def anyio_backend() -> object:
        return VIRTUAL

or `run_virtual(function)`.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio

T = TypeVar("T")

_REAL_SECONDS = 10.0
"""How long a thread or a socket may take before the test counts as stuck."""


class StuckError(RuntimeError):
    """Nothing can ever wake the loop, or virtual time ran away."""


class _VirtualSelector(selectors.DefaultSelector):
    """Looks for real events without waiting; a wait moves the clock."""

    def __init__(self, clock: _Clock, end: float) -> None:
        super().__init__()
        self._clock = clock
        self._end = end

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events: list[tuple[selectors.SelectorKey, int]] = super().select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if timeout is None or self._clock.busy_threads():
            events = super().select(_REAL_SECONDS)
            if not events:
                raise StuckError(f"nothing happened for {_REAL_SECONDS:g} real seconds, and no timer is due")
            return events
        # One tick more: asyncio asks for the time from a timer to now, and sums of floats may fall short of it.
        self._clock.now += timeout + 1e-9
        if self._clock.now > self._end:
            raise StuckError(f"virtual time ran past {self._end:g} s")
        return []


class _Clock:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.now = 1_000.0

    def busy_threads(self) -> bool:
        """Whether a worker thread of anyio's works for this loop."""
        return any(
            getattr(thread, "loop", None) is self._loop
            and thread not in getattr(thread, "idle_workers", ())
            and not getattr(thread, "stopping", False)
            for thread in threading.enumerate()
        )


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The loop. Its clock starts at 1,000 s."""

    def __init__(self, seconds: float = 30 * 86_400.0) -> None:
        """Args: how much virtual time a test may use up before it counts as stuck."""
        self._virtual = _Clock(self)
        super().__init__(_VirtualSelector(self._virtual, self._virtual.now + seconds))

    def time(self) -> float:
        """Virtual seconds."""
        return self._virtual.now


VIRTUAL: tuple[str, dict[str, Any]] = ("asyncio", {"loop_factory": VirtualTimeLoop})
"""What an `anyio_backend` fixture returns."""


def run_virtual(function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """`anyio.run` in virtual time."""
    return anyio.run(function, *arguments, backend_options={"loop_factory": VirtualTimeLoop})
