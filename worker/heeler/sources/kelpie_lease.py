"""A job of Kelpie's in our hands, as the rest of the worker sees it."""

from __future__ import annotations

from collections.abc import Callable

from heeler.job import Job, Result
from heeler.sources.base import LeaseState
from heeler.sources.kelpie_book import Book, lapse
from heeler.sources.kelpie_pace import Pace
from heeler.sources.kelpie_record import COMPLETED, FAILED, Held

_FIRST_BEAT = 2.0
"""Seconds: two workers that asked at the same moment may both have been given a job; the next heartbeat tells."""
_UNFIT_DELAY = 2.0
"""Who releases a job with so long a delay could not begin it, or not end it; a program that asks to be run again waits
for less."""


class KelpieLease:
    """A job that the API counts as ours."""

    def __init__(self, job: Job, held: Held, book: Book, pace: Pace) -> None:
        """Args: `pace` is told whether this machine can run what it is given."""
        self._pace = pace
        self._job = job
        self._held = held
        self._book = book

    @property
    def job(self) -> Job:
        """The job."""
        return self._job

    @property
    def attempt(self) -> int:
        """Its failures, and the starts of it on this machine: the API does not count interruptions."""
        return 1 + self._held.record.row.failures + self._held.record.restarts

    @property
    def attempts_ordered(self) -> bool:
        """Not where another machine was interrupted with it."""
        return False

    @property
    def expires_after(self) -> float:
        """Twice the job's `heartbeat_interval`, then it is handed out again; what is left of it until we extend it."""
        whole = lapse(self._held)
        return whole if self._held.beats else max(0.0, whole - self._book.age(self._held))

    @property
    def extend_every(self) -> float | None:
        """The job's `heartbeat_interval`; the first time sooner."""
        interval = self._held.record.row.interval
        return interval if self._held.beats else min(_FIRST_BEAT, interval)

    @property
    def spends_tries(self) -> bool:
        """Each `retry` counts, and bans this machine from the job."""
        return True

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Lease.listen`: it has to be asked."""

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """As `Lease.extend`: a heartbeat."""
        return await self._book.beat(self._held, progressed=progressed)

    async def complete(self, result: Result) -> None:
        """As `Lease.complete`; the API has no place for a result."""
        del result
        self._pace.ran()
        await self._book.report(self._held, COMPLETED)

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`, but the API takes neither reason nor delay, and gives it to other machines only."""
        del reason, result, delay
        self._pace.ran()
        await self._book.report(self._held, FAILED)

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `retry`: the API has no word for "never again", and counts to the job's `max_failures`."""
        del reason, result
        self._pace.ran()
        await self._book.report(self._held, FAILED)

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`: nothing is reported, and heartbeats stop.

        What rests because this machine can't do it now is not followed by the next job at once: each that is taken in
        vain waits for two heartbeats.
        """
        begun = delay < _UNFIT_DELAY
        if begun:
            self._pace.ran(delay)
        else:
            self._pace.could_not(delay, reason)
        await self._book.put_back(self._held, fruitless=fruitless, begun=begun)

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: the API knows."""
        self._book.settle(self._held)
