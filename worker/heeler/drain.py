"""The one request to stop, and until when: shared by all who have to wind down in order."""

from __future__ import annotations

from contextlib import AbstractContextManager

import anyio

from heeler.scopes import Deadline, Signal

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
        deadline: Nothing goes on after it.
    """

    def __init__(self, grace: float) -> None:
        """Args: the seconds from the request to the deadline."""
        self._grace = grace
        self.requested = Signal()
        self.hurried = Signal()
        self.reason = ""
        self.deadline = Deadline()

    def begin(self, reason: str) -> bool:
        """Ask everybody to stop; whether this was the first time."""
        if self.requested.is_set():
            return False
        self.reason = reason
        self.deadline.move(anyio.current_time() + self._grace - min(_EXIT_SECONDS, self._grace / 4))
        self.requested.set()
        return True

    def hurry(self) -> None:
        """Kill the program now and leave only a few seconds for the flush."""
        self.deadline.move(anyio.current_time() + _HURRIED_FLUSH_SECONDS)
        self.hurried.set()

    def left(self) -> float:
        """Seconds to the deadline."""
        return self.deadline.at - anyio.current_time()

    def until_over(self) -> AbstractContextManager[anyio.CancelScope]:
        """Run the block until the deadline."""
        return self.deadline.ends()

    def until_nearly_over(self) -> AbstractContextManager[anyio.CancelScope]:
        """Run the block until only the time to tell the queue is left."""
        return self.deadline.ends(_SETTLE_SECONDS)
