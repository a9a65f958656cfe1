"""A job of Kelpie's that is ours, from its hand-out to the report that the API has taken.

The API fences nobody: it takes `completed` and `failed` from anyone at any time. So before each report it is asked
whose the job is; and what was reported without an answer is looked up before it is reported again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakValueDictionary

from heeler.job import Job, Result
from heeler.sources.base import JobCancelledError, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.sources.kelpie_calls import KelpieCalls
from heeler.sources.kelpie_http import NoSuchJobError
from heeler.sources.kelpie_job import Row
from heeler.sources.kelpie_record import COMPLETED, FAILED, Held, Records

_RUNNING, _CANCELED = "running", "canceled"
_CLOCK_STEP = 1.0
"""The API's times are whole seconds: what is "two heartbeats old" may be one second younger."""
_FIRST_BEAT = 2.0
"""Seconds: two workers that asked at the same moment may both have been given a job; the next heartbeat tells."""


class Book:
    """Keeps what is held in step with the API and the disk."""

    def __init__(self, calls: KelpieCalls, records: Records, clock: Callable[[], float]) -> None:
        self._calls = calls
        self._records = records
        self._clock = clock
        self._open: WeakValueDictionary[str, Held] = WeakValueDictionary()

    def age(self, held: Held) -> float:
        """Seconds since the heartbeat was sent by which it became ours."""
        return self._clock() - held.asked_at

    async def confirm(self, held: Held) -> None:
        """Make sure that a job is ours that was just handed out, or that an earlier process had.

        Raises:
            LeaseLostError: It is not.
            SourceUnavailableError: The API did not say.
        """
        if not held.record.started:
            await self.keep(held)  # or a process that dies now would leave a job that nobody goes on with
        held.asked_at = self._clock()
        try:
            status = await self._calls.heartbeat(held.id)
            row = await self._calls.job(held.id) if status == _RUNNING else None
        except NoSuchJobError:
            row = None
        if row is not None and not held.record.started:
            held.record = replace(held.record, started=row.started or "")
        if row is None or row.failures != held.record.row.failures or not self._is_ours(held, row):
            self.forget(held)  # who failed with it meanwhile was perhaps another worker of this machine
            raise _lost(held)
        self._open[held.id] = held
        await self.keep(held)

    async def renew(self, job_id: str) -> bool:
        """Go on with a job of ours that the API handed out to us once more, since it heard nothing of us for too long.

        Returns:
            Whether we have it.

        Raises:
            SourceUnavailableError: The API did not say.
        """
        held = self._open.get(job_id)
        if held is None or held.lost or held.settled:
            return False
        try:
            row = await self._calls.job(job_id)
        except NoSuchJobError:
            return False
        if row.status == _RUNNING and row.machine_id == held.record.machine_id:
            await self.keep(held, started=row.started or "")
        return True

    async def beat(self, held: Held, *, progressed: bool) -> LeaseState:
        """As `Lease.extend`."""
        if held.lost or held.settled:
            return LeaseState.LOST
        try:
            status = await self._calls.heartbeat(held.id)
            cancelled = status == _CANCELED and await self._is_cancelled(held)
        except NoSuchJobError:
            status, cancelled = "", False
        if held.record.verdict and not held.lost:
            return LeaseState.HELD  # what the status is may be our own doing; who reports finds out
        if cancelled:
            held.lost = True
            return LeaseState.CANCELLED
        if status != _RUNNING:
            self.forget(held)
            return LeaseState.LOST
        held.beats += 1
        if progressed and held.record.barren:
            await self.keep(held, barren=0)
        return LeaseState.HELD

    async def report(self, held: Held, verdict: str) -> None:
        """Tell the API; the verdict that was decided on first is told, however often this is called.

        Raises:
            JobCancelledError: Somebody cancelled the job.
            LeaseLostError: It is no longer ours.
            SourceUnavailableError: It is not known whether the API has it.
        """
        async with held.guard:
            if held.settled:
                return
            if held.lost:
                raise self._over(held)
            if not held.record.verdict:
                await self.keep(held, verdict=verdict)
            if not await self._has_taken(held):
                held.tried = True
                await self._tell(held)
            self.settle(held)

    async def put_back(self, held: Held, *, fruitless: bool) -> None:
        """Nobody works on it here any more; the API hands it out again when it has heard nothing for long enough."""
        if held.settled:
            return
        if held.lost:
            raise self._over(held)
        await self.keep(held, released=True, barren=held.record.barren if fruitless else 0)
        held.settled = True
        held.claim.release()

    async def keep(self, held: Held, **changes: object) -> None:
        """Change the record, on disk too."""
        held.record = replace(held.record, **changes)  # type: ignore[arg-type]
        async with held.writing:
            if not held.dropped:
                await self._records.save(held.record)
            if held.dropped:  # while it was written
                self._records.drop(held.id)

    def settle(self, held: Held) -> None:
        """Nothing more is to be done about it."""
        held.settled = True
        self._drop(held)
        held.claim.release()

    def forget(self, held: Held) -> None:
        """It is not ours any more. Its lock goes with the lease: its program may still run."""
        held.lost = True
        self._drop(held)

    def _drop(self, held: Held) -> None:
        if not held.dropped:
            held.dropped = True
            self._records.drop(held.id)

    def _over(self, held: Held) -> LeaseLostError:
        """A job whose program has ended is not ours any more, nor anything to keep others from."""
        self.forget(held)
        held.claim.release()
        return _lost(held)

    async def _is_cancelled(self, held: Held) -> bool:
        """What "canceled" means: that somebody cancelled it, or only that another machine has it (PROTOCOLS 3)."""
        try:
            return (await self._calls.job(held.id)).status == _CANCELED
        except SourceUnavailableError:
            return False  # either way it is not ours, and nothing is reported

    async def _has_taken(self, held: Held) -> bool:
        """Whether the API has our report already. Raises as `report` if there is nothing to be reported any more."""
        try:
            await self._calls.heartbeat(held.id)  # or it might be handed out between the next two calls
            row = await self._calls.job(held.id)
        except NoSuchJobError:
            raise self._over(held) from None
        mine = row.machine_id == held.record.machine_id
        if held.tried and mine and held.record.verdict == COMPLETED and row.status == COMPLETED:
            return True
        if held.tried and held.record.verdict == FAILED and row.failures > held.record.row.failures:
            return True
        if row.status == _CANCELED:
            raise JobCancelledError(f"job {held.id} was cancelled")
        if not self._is_ours(held, row):
            raise self._over(held)
        return False

    async def _tell(self, held: Held) -> None:
        call = self._calls.completed if held.record.verdict == COMPLETED else self._calls.failed
        try:
            await call(held.id)
        except NoSuchJobError:
            raise self._over(held) from None

    def _is_ours(self, held: Held, row: Row) -> bool:
        mine = row.status == _RUNNING and row.machine_id == held.record.machine_id
        return mine and (row.started or "") == held.record.started


def _lost(held: Held) -> LeaseLostError:
    return LeaseLostError(f"job {held.id} is no longer ours")


class KelpieLease:
    """A job that the API counts as ours."""

    def __init__(self, job: Job, held: Held, book: Book, rest: Callable[[float], None]) -> None:
        """Args: `rest` is told for how many seconds this machine had better not ask for another job."""
        self._rest = rest
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
        whole = max(0.5, 2 * self._held.record.row.interval - _CLOCK_STEP)
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
        await self._book.report(self._held, COMPLETED)

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`, but the API takes neither reason nor delay, and gives it to other machines only."""
        del reason, result, delay
        await self._book.report(self._held, FAILED)

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `retry`: the API has no word for "never again", and counts to the job's `max_failures`."""
        del reason, result
        await self._book.report(self._held, FAILED)

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`: nothing is reported, and heartbeats stop.

        What rests because this machine can't do it now is not followed by the next job at once: each that is taken in
        vain waits for two heartbeats.
        """
        del reason
        if delay:
            self._rest(delay)
        await self._book.put_back(self._held, fruitless=fruitless)

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: the API knows."""
        self._book.settle(self._held)
