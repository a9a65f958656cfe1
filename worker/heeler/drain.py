"""The one request to stop, and until when: shared by all who have to wind down in order."""

from __future__ import annotations

import math

import anyio

_HURRIED_FLUSH_SECONDS = 5.0
_SETTLE_SECONDS = 1.0
_EXIT_SECONDS = 0.5
"""The deadline is that much before the grace period's end: to be gone takes a moment, too."""


class Drain:
    """Set once by the supervisor, watched by everybody else.

    Attributes:
        requested: Set when we are to stop.
        hurried: Set when whoever waits has lost patience.
        reason: Why, for people.
        deadline: Clock of `anyio.current_time`; nothing goes on after it.
    """

    def __init__(self, grace: float) -> None:
        """Args: the seconds from the request to the deadline."""
        self._grace = grace
        self.requested = anyio.Event()
        self.hurried = anyio.Event()
        self.reason = ""
        self.deadline = math.inf

    def begin(self, reason: str) -> bool:
        """Ask everybody to stop; whether this was the first time."""
        if self.requested.is_set():
            return False
        self.reason = reason
        self.deadline = anyio.current_time() + self._grace - min(_EXIT_SECONDS, self._grace / 4)
        self.requested.set()
        return True

    def hurry(self) -> None:
        """Kill the program now and leave only a few seconds for the flush."""
        self.deadline = min(self.deadline, anyio.current_time() + _HURRIED_FLUSH_SECONDS)
        self.hurried.set()

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline - anyio.current_time()

    async def over(self) -> None:
        """Return at the deadline, which may move nearer; never without a request."""
        await self._reached(0.0)

    async def nearly_over(self) -> None:
        """Return when only the time to tell the queue is left."""
        await self._reached(_SETTLE_SECONDS)

    async def _reached(self, before: float) -> None:
        await self.requested.wait()
        with anyio.move_on_after(max(0.0, self.left() - before)):
            await self.hurried.wait()
        await anyio.sleep(max(0.0, self.left() - before))
