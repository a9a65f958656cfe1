"""The request to stop, and until when: shared by all who have to wind down in order.

There is one for the whole worker, and for each job one that follows it and can also begin alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

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
        self.words = "the worker was told to stop"
        self.deadline = Deadline()

    @property
    def everything(self) -> bool:
        """Whether all of the worker is to stop, and not one job alone."""
        return self.requested.is_set()

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

    def grace(self, reserve: float) -> float:
        """Seconds that a program has to end by itself, of which a flush needs `reserve` afterwards."""
        return self.left() - reserve

    def until_over(self) -> AbstractContextManager[anyio.CancelScope]:
        """Run the block until the deadline."""
        return self.deadline.ends()

    @contextmanager
    def of_one_job(self, asked: Signal, words: str, seconds: float) -> Iterator[JobDrain]:
        """A drain that begins with this one, or alone when a job is `asked` back: then its flush may take `seconds`."""
        drain = JobDrain(self._grace, seconds, words)

        def follow() -> None:
            drain.follow(self)

        with asked.calls(drain.begin_alone), self.requested.calls(follow), self.hurried.calls(follow):
            yield drain

    def until_nearly_over(self) -> AbstractContextManager[anyio.CancelScope]:
        """Run the block until only the time to tell the queue is left."""
        return self.deadline.ends(_SETTLE_SECONDS)


class JobDrain(Drain):
    """The drain of one job."""

    def __init__(self, grace: float, seconds: float, words: str) -> None:
        """Args: the program's grace period, the job's when it is drained alone, and why that would be."""
        super().__init__(grace)
        self._seconds = seconds
        self._alone_words = words
        self._program_until = math.inf
        self._everything = False

    @property
    def everything(self) -> bool:
        """As `Drain.everything`."""
        return self._everything

    def begin_alone(self) -> None:
        """The job is to be handed back, and the worker goes on."""
        if not self.requested.is_set():
            self.reason = self.words = self._alone_words
            self._program_until = anyio.current_time() + self._grace
            self.deadline.move(anyio.current_time() + self._seconds)
            self.requested.set()

    def follow(self, whole: Drain) -> None:
        """The whole worker stops, or hurries."""
        self._everything = True
        self.reason, self.words = whole.reason, whole.words
        self.deadline.move(whole.deadline.at)
        self.requested.set()
        if whole.hurried.is_set():
            self.hurried.set()

    def grace(self, reserve: float) -> float:
        """As `Drain.grace`; the flush of a job that is drained alone has time of its own."""
        return min(self._program_until, self.deadline.at - reserve) - anyio.current_time()
