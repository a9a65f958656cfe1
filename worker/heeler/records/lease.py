"""A lease of a job that has a record: each settlement is in the bucket before the queue is told.

So a worker that dies between the two leaves a message that comes again, finds the job ended, and is told to the queue
without running anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import anyio

from heeler.job import Job, JobDocument, Result
from heeler.records.announce import Announcer
from heeler.records.record import DamagedRecordError, Record
from heeler.records.store import ConflictError, RecordStore, Stored
from heeler.sources.base import BARREN_LIMIT, JobCancelledError, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.sources.facts import RecordableLease
from heeler.tasks import alongside
from heeler_sync.errors import StoreError

_BEAT_SECONDS = 300.0
"""Between two writes by which a holder shows that it lives: each costs a write."""
_LOOK_SECONDS = 5.0
_PART_OF_LEASE = 6
"""A look takes up to that part of the lease: half of what its keeper waits for an extension (`lease.py`)."""
_LAST_WORD_SECONDS = 0.6
"""The most that a release or a withdrawal waits for the bucket: that the queue hears of it at once matters more, and a
drain's last words have a second in all."""
_LATE_WORD_SECONDS = 3.0
"""And after that, if there is time."""
_JOB_ID = "{job_id}"


@dataclass(frozen=True)
class Context:
    """What all leases of a source share.

    Attributes:
        records: The records.
        announcer: Sends webhooks.
        wall: Seconds since 1970.
        on_fault: Told an event's name and fields.
        on_event: As before, of what is no fault.
    """

    records: RecordStore
    announcer: Announcer
    wall: Callable[[], float]
    on_fault: Callable[..., None]
    on_event: Callable[..., None]


class RecordedLease:
    """Owns the record of one attempt, as far as it is ours."""

    def __init__(self, lease: RecordableLease, stored: Stored, document: JobDocument | None, context: Context) -> None:
        """Args: the queue's lease, the record with our attempt, the job document if it is one, and what is shared."""
        self._lease = lease
        self._stored = stored
        self._document = document
        self._context = context
        self._attempt = stored.record.attempts
        self._run_id = stored.record.run_id
        self._progressed = False
        self._owed = False
        self._news: LeaseState | None = None

    @property
    def job(self) -> Job:
        """The job."""
        return self._lease.job

    @property
    def attempt(self) -> int:
        """The record's count of deliveries."""
        return self._attempt

    @property
    def attempts_ordered(self) -> bool:
        """The record counts them, by compare-and-swap."""
        return True

    @property
    def expires_after(self) -> float:
        """As the queue says."""
        return self._lease.expires_after

    @property
    def extend_every(self) -> float | None:
        """As the queue's."""
        return self._lease.extend_every

    @property
    def spends_tries(self) -> bool:
        """As the queue says."""
        return self._lease.spends_tries

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Lease.listen`."""
        self._lease.listen(heard)

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """As `Lease.extend`; a cancellation, or that another worker has the job, is in the record.

        Both are asked side by side: one that is out of reach says nothing against what the other says.
        """
        self._owed |= progressed
        state, error = LeaseState.HELD, None
        async with alongside(self._look):
            if self._news is None:  # what an earlier call has found out, which was broken off
                try:
                    state = await self._lease.extend(progressed=progressed)
                except SourceUnavailableError as out_of_reach:
                    error = out_of_reach
        if self._news is not None or state is LeaseState.LOST:
            return self._news or state
        if error is not None:
            raise error
        return state

    async def _look(self) -> None:
        """Learn what the record says that the queue does not."""
        seconds = min(_LOOK_SECONDS, self.expires_after / _PART_OF_LEASE)
        error = f"no answer in {seconds:.1f} s"
        with anyio.move_on_after(seconds):
            try:
                self._news = await self._read()
            except (StoreError, DamagedRecordError) as found:
                error = str(found)
            else:
                return
        self._context.on_fault("record_not_read", error=error)

    async def _read(self) -> LeaseState | None:
        """What it says of the lease, if that is anything; it is written anew now and then."""
        found = await self._context.records.get(self.job.id)
        if found is None or not self._is_ours(found.record):
            return LeaseState.LOST
        self._stored = found
        if found.record.state == "cancelled":
            return LeaseState.CANCELLED
        progressed = self._owed  # told once, and perhaps not written then
        first_progress = progressed and not self._progressed
        now = self._context.wall()
        if first_progress or now - found.record.heard >= _BEAT_SECONDS:
            try:
                self._stored = await self._context.records.write(
                    found.record.heard_of(now, progressed=progressed), found
                )
            except ConflictError:
                return None  # the next look tells why
            self._progressed |= progressed
            self._owed = False
        return None

    def _is_ours(self, record: Record) -> bool:
        """Whether it speaks of our attempt: not of a later one, nor of a run that was submitted since."""
        return (record.attempts, record.run_id) == (self._attempt, self._run_id)

    async def complete(self, result: Result) -> None:
        """As `Lease.complete`: result, record, webhook, and then the message."""
        self._refuse_cancelled()
        if not self._record.ended:
            key = await self._keep(result)
            await self._write(lambda record: record.done(self._now(), _facts(result), key, self._pending()))
        await end(self._lease, self._stored, self._webhook(), self._context)

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`; failures are counted in the record."""
        self._refuse_cancelled()
        facts = self._lease.facts
        counted = self._record.state == "pending"  # in an earlier call, which the queue did not hear of
        if not counted and self._record.failures + 1 >= facts.max_failures:
            await self.fail(reason, result=result)
        elif not counted and facts.last:
            await self.fail(f"{reason}; the queue's redrive policy allows no further receive", result=result)
        else:
            if not counted:
                await self._write(lambda record: record.retried(self._now(), reason))
            await self._lease.release(reason, delay=delay)

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `Lease.fail`."""
        self._refuse_cancelled()
        if not self._record.ended:
            key = await self._keep(result)
            await self._write(lambda record: record.failed(self._now(), reason, _facts(result), key, self._pending()))
        await end(self._lease, self._stored, self._webhook(), self._context)

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`. Whoever takes it next counts an interruption, if the bucket does not hear of it now."""
        self._refuse_cancelled()
        fruitless = fruitless and not self._progressed and not self._owed
        counted = self._record.state == "pending"
        if not counted and fruitless and self._record.fruitless + 1 >= BARREN_LIMIT:
            words = f"{BARREN_LIMIT} attempts in a row without an end or anything durable, last: {reason}"
            await self.fail(words, result=Result())
            return
        if self._lease.facts.last:
            reason = f"{reason}; the queue's redrive policy moves it to the dead-letter queue now".lstrip("; ")
        written = counted or await self._note_release(reason, _LAST_WORD_SECONDS, fruitless=fruitless)
        await self._lease.release(reason, delay=delay)
        if not written:
            with suppress(LeaseLostError):  # whoever has it by now counts an interruption
                await self._note_release(reason, _LATE_WORD_SECONDS, fruitless=fruitless)

    async def _note_release(self, reason: str, seconds: float, *, fruitless: bool) -> bool:
        """Whether the record says so, within so many seconds."""
        with anyio.move_on_after(seconds):
            try:
                await self._write(lambda record: record.released(self._now(), reason, fruitless=fruitless))
            except SourceUnavailableError as error:
                self._context.on_fault("record_not_written", error=str(error))
            else:
                return True
        return False

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: the record says already that nobody wants it, so the message does not wait for it."""
        noted = await self._note_withdrawal(_LAST_WORD_SECONDS)
        await end(self._lease, self._stored, self._webhook(), self._context)
        if not noted:
            await self._note_withdrawal(_LATE_WORD_SECONDS)

    async def _note_withdrawal(self, seconds: float) -> bool:
        """Whether the record says that our attempt has ended, or is none of ours, within so many seconds."""
        with anyio.move_on_after(seconds):
            try:
                await self._context.records.update(self.job.id, self._withdrawn)
            except (StoreError, DamagedRecordError) as error:
                self._context.on_fault("record_not_written", error=str(error))
            else:
                return True
        return False

    def _withdrawn(self, found: Record) -> Record | None:
        """The record without our attempt, whoever else has written it meanwhile."""
        return found.withdrawn(self._now()) if self._is_ours(found) and found.state == "cancelled" else None

    def _refuse_cancelled(self) -> None:
        if self._record.state == "cancelled":
            raise JobCancelledError("its record says that it is cancelled")

    @property
    def _record(self) -> Record:
        return self._stored.record

    def _now(self) -> float:
        return self._context.wall()

    def _webhook(self) -> str | None:
        return self._context.announcer.url_of(self._document)

    def _pending(self) -> str:
        return "pending" if self._webhook() is not None else ""

    async def _keep(self, result: Result) -> str:
        """Store the result; its key, empty if there is none."""
        if result == Result():
            return ""
        named = self._document.result_key if self._document is not None else None
        records = self._context.records
        key = records.result_key(self.job.id, self._attempt)
        if named is not None:
            key = records.named_key(named.replace(_JOB_ID, self.job.id))
            await self._make_sure()  # whoever has overtaken us may have stored another result there
        body = result.body if result.status is not None else json.dumps(result.facts()).encode() + b"\n"
        try:
            await records.put_result(key, body)
        except StoreError as error:
            raise SourceUnavailableError(f"the result can't be stored: {error}") from None
        return key

    async def _make_sure(self) -> None:
        """The record says that the job is ours, right now.

        Raises:
            LeaseLostError: It does not.
            SourceUnavailableError: It can't be read.
        """
        try:
            found = await self._context.records.get(self.job.id)
        except (StoreError, DamagedRecordError) as error:
            raise SourceUnavailableError(f"the job's record can't be read: {error}") from None
        if found is None or not self._is_ours(found.record):
            raise LeaseLostError("its record says that another worker has it")

    async def _write(self, change: Callable[[Record], Record]) -> None:
        """Write our record.

        Raises:
            LeaseLostError: Somebody else has the job, or it was cancelled.
            SourceUnavailableError: It is not known whether it was written.
        """
        while True:
            record = change(self._record)
            try:
                self._stored = await self._context.records.write(record, self._stored)
            except ConflictError as conflict:
                found = conflict.found
            except (StoreError, DamagedRecordError) as error:
                raise SourceUnavailableError(f"the job's record can't be written: {error}") from None
            else:
                return
            if found is None or not self._is_ours(found.record):
                raise LeaseLostError("its record says that another worker has it")
            # A heartbeat came between, or a write of ours whose answer was lost, or a cancellation.
            self._stored = found
            if found.record.state == record.state:
                return
            self._refuse_cancelled()
            if found.record.state != "running":
                raise LeaseLostError(f"its record says that it is {found.record.state}")


def _facts(result: Result) -> Mapping[str, int | None] | None:
    return None if result == Result() else result.facts()


async def end(lease: RecordableLease, stored: Stored, webhook: str | None, context: Context) -> None:
    """Announce that a job has ended, and settle its message so; it may have been begun before."""
    record = stored.record
    if record.webhook == "pending":
        retry_in = await context.announcer.announce(
            record, webhook, context.records, last=lease.facts.last, brief=lease.facts.grouped
        )
        if retry_in is not None:
            await lease.release("its webhook is tried again", delay=retry_in)
            return
    if record.state == "failed":
        await lease.fail(record.reason, result=Result())
    elif record.state == "cancelled":
        await lease.withdraw()
    else:
        await lease.complete(Result())
