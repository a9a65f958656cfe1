"""Whose a job of Kelpie's is, from its hand-out to the report that the API has taken.

The API fences nobody: it takes `completed` and `failed` from anyone at any time. So before each report it is asked
whose the job is; and what was reported without an answer is looked up before it is reported again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from weakref import WeakValueDictionary

import anyio

from heeler.sources.base import JobCancelledError, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.sources.kelpie_calls import KelpieCalls
from heeler.sources.kelpie_http import NoSuchJobError
from heeler.sources.kelpie_job import Row
from heeler.sources.kelpie_record import COMPLETED, FAILED, Held, JobRecord, Records

_RUNNING, _CANCELED = "running", "canceled"
_CLOCK_STEP = 1.0
"""The API's times are whole seconds: what is "two heartbeats old" may be one second younger."""
_WORD_SECONDS = 10.0
"""Within so many a sibling has left word of what it was handed out, if there is one."""
_LOOK_SECONDS = 0.5


class Book:
    """Keeps what is held in step with the API and the disk."""

    def __init__(self, calls: KelpieCalls, records: Records, clock: Callable[[], float]) -> None:
        self._calls = calls
        self._records = records
        self._clock = clock
        self._open: WeakValueDictionary[str, Held] = WeakValueDictionary()

    def age(self, held: Held) -> float:
        """Seconds since the last heartbeat was sent that was answered."""
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
        if _is_at(held.record.machine_id, row):
            await self.keep(held, started=row.started or "")
        return True

    async def handed_out(self, record: JobRecord) -> str:
        """When a job that a sibling has the lock of was handed out to us; "" if it was not. It is kept for the sibling.

        Raises:
            SourceUnavailableError: The API did not say.
        """
        try:
            status = await self._calls.heartbeat(record.row.id)
            row = await self._calls.job(record.row.id) if status == _RUNNING else None
        except NoSuchJobError:
            row = None
        return "" if row is None or not _is_at(record.machine_id, row) else row.started or ""

    async def beat(self, held: Held, *, progressed: bool) -> LeaseState:
        """As `Lease.extend`."""
        if held.lost or held.settled:
            return LeaseState.LOST
        asked_at = self._clock()
        look = held.doubtful or self.age(held) >= lapse(held)
        held.doubtful = True
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
        if status != _RUNNING or (look and not await self._is_still_ours(held)):
            self.forget(held)
            return LeaseState.LOST
        held.beats += 1
        held.asked_at, held.doubtful = asked_at, False
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

    async def put_back(self, held: Held, *, fruitless: bool, begun: bool) -> None:
        """Nobody works on it here any more; the API hands it out again when it has heard nothing for long enough.

        What this machine could not begin says nothing of the job: it counts neither way.
        """
        if held.settled:
            return
        if held.lost:
            raise self._over(held)
        barren = held.record.barren if fruitless else 0
        await self.keep(held, released=True, barren=barren if begun else max(0, held.record.barren - 1))
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
        if not await self._is_still_ours(held, row):
            raise self._over(held)
        return False

    async def _is_still_ours(self, held: Held, row: Row | None = None) -> bool:
        """Whether it is ours, by what the API shows now, or by word of the sibling that it was handed out to since."""
        try:
            row = row or await self._calls.job(held.id)
            while not self._is_ours(held, row):
                if held.settled or held.lost or not _is_at(held.record.machine_id, row):
                    return False
                if row.started and held.claim.word() == row.started:
                    await self.keep(held, started=row.started)
                    break
                if held.strange_since is None:
                    held.strange_since = self._clock()
                if self._clock() - held.strange_since >= _WORD_SECONDS:
                    return False
                await anyio.sleep(_LOOK_SECONDS)  # the sibling asks, too, before it leaves word
                row = await self._calls.job(held.id)
        except NoSuchJobError:
            return False
        held.strange_since = None
        return True

    async def _tell(self, held: Held) -> None:
        call = self._calls.completed if held.record.verdict == COMPLETED else self._calls.failed
        try:
            await call(held.id)
        except NoSuchJobError:
            raise self._over(held) from None

    def _is_ours(self, held: Held, row: Row) -> bool:
        return _is_at(held.record.machine_id, row) and (row.started or "") == held.record.started


def lapse(held: Held) -> float:
    """Seconds from a heartbeat until the job may be handed out anew."""
    return max(0.5, 2 * held.record.row.interval - _CLOCK_STEP)


def _is_at(machine_id: str, row: Row) -> bool:
    return row.status == _RUNNING and row.machine_id == machine_id


def _lost(held: Held) -> LeaseLostError:
    return LeaseLostError(f"job {held.id} is no longer ours")
