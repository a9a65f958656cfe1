"""How a job reaches the user's program: the protocol of deliveries."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from heeler.drain import Drain
from heeler.job import Ending, Job
from heeler.scopes import Signal


@dataclass(frozen=True)
class Assignment:
    """One attempt at one job.

    Attributes:
        job: The job.
        attempt: From 1.
        environment: What the job's folders add to the program's environment.
        reserve: Seconds that the flush after the program's end will need, as far as we know now.
        ended: To be called the moment the program has ended by itself or was killed, before anything else.
    """

    job: Job
    attempt: int
    environment: Mapping[str, str]
    reserve: Callable[[], Awaitable[float]]
    ended: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class GivenUp:
    """Why no job can be delivered any more: the program ended for good.

    Attributes:
        exit_code: For our process: the program's own.
        reason: For people.
    """

    exit_code: int
    reason: str


class Delivery(Protocol):
    """Hands a job to the program and says how it ended."""

    async def run(self) -> None:
        """What goes on between jobs (a program that lives longer than one); cancelled, it is ended first."""
        ...

    @property
    def available(self) -> bool:
        """Whether a job could be delivered now."""
        ...

    async def ready(self) -> bool:
        """Wait until a job can be delivered; False: never again."""
        ...

    @property
    def unready(self) -> Signal:
        """Set when no job can be delivered any more, for now or for good; another one after each `ready`."""
        ...

    def given_up(self) -> GivenUp | None:
        """Why never again."""
        ...

    async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
        """Run one attempt to its end; cancelled, the program is ended first.

        In a drain the program is told to stop and given the grace period less the reserve.
        """
        ...
