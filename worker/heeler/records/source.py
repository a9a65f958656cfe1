"""A source whose jobs have records: what a message's record says is decided before the job is given out."""

from __future__ import annotations

import anyio

from heeler.job import InvalidJobError, JobDocument, Result
from heeler.records.arrival import WAIT_SECONDS, Arrival, Step, judge
from heeler.records.lease import Context, RecordedLease, end
from heeler.records.record import DamagedRecordError
from heeler.records.store import ConflictError
from heeler.sources.base import BARREN_LIMIT, Lease, LeaseLostError, LeaseState, SourceUnavailableError, Verdict
from heeler.sources.facts import RecordableLease, RecordableSource
from heeler_sync.errors import StoreError

_REST_SECONDS = 10.0
"""Of a message whose record is out of reach."""
_DAMAGED_SECONDS = 300.0
"""Of a message whose record can't be read, until somebody has mended it."""
_PUT_BACK_SECONDS = 2.0
_PART_OF_LEASE = 6
"""A take that took longer than that part of its lease is confirmed before the job is given out."""
_NO_JOB = "heeler-asks"
"""The id of no job, whose record is asked for to see whether the bucket answers."""
_SOON_SECONDS = 86_400.0
"""What is left of a message's life when its end is said."""


class RecordedSource:
    """Wraps the source of a queue that keeps no status."""

    def __init__(self, source: RecordableSource, context: Context, worker: str, *, documents: bool) -> None:
        """Args: `documents` says whether messages are job documents, or an app's."""
        self._source = source
        self._context = context
        self._worker = worker
        self._documents = documents
        self._in_doubt = False

    @property
    def name(self) -> str:
        """As the wrapped source's."""
        return self._source.name

    async def check(self, patience: float) -> None:
        """As `CheckedSource.check`."""
        await self._source.check(patience)

    async def run(self) -> None:
        """As `Source.run`."""
        await self._source.run()

    async def pause(self) -> None:
        """As `Source.pause`."""
        await self._source.pause()

    async def reclaim(self, worker: str) -> None:
        """As `Source.reclaim`."""
        await self._source.reclaim(worker)

    def verdict(self) -> Verdict | None:
        """As `Source.verdict`."""
        return self._source.verdict()

    async def aclose(self) -> None:
        """As `Source.aclose`."""
        await self._source.aclose()

    async def receive(self, *, wait: float) -> Lease | None:
        """As `Source.receive`; messages of jobs that have ended are settled here.

        While the records are out of reach no message is received: each receive may be one of few.
        """
        until = anyio.current_time() + wait
        if self._in_doubt:
            await self._ask_records()
        while True:
            lease = await self._source.receive(wait=max(0.0, until - anyio.current_time()))
            if lease is None:
                return None
            recorded = await self._take(lease)
            if recorded is not None:
                return recorded
            if anyio.current_time() >= until:
                return None

    async def _ask_records(self) -> None:
        """Return once the bucket answers.

        Raises:
            SourceUnavailableError: It does not.
        """
        try:
            await self._context.records.get(_NO_JOB)
        except StoreError as error:
            raise SourceUnavailableError(f"the records are out of reach: {error}") from None
        except DamagedRecordError:
            pass
        self._in_doubt = False

    async def _take(self, lease: RecordableLease) -> RecordedLease | None:
        """The job, if it is to be run."""
        asked_at = anyio.current_time()
        try:
            taken = await self._judge(lease)
            late = anyio.current_time() - asked_at > lease.expires_after / _PART_OF_LEASE
            if taken is not None and late and await taken.extend() is LeaseState.LOST:
                return None
        except LeaseLostError:
            return None  # whoever has the message now judges it
        except DamagedRecordError as error:
            self._context.on_fault("record_damaged", job=lease.job.id, error=str(error))
            await self._put_back(lease, _DAMAGED_SECONDS, str(error))
            return None
        except anyio.get_cancelled_exc_class():
            with anyio.move_on_after(_PUT_BACK_SECONDS, shield=True):
                await self._put_back(lease, 0.0, "the worker was told to stop")
            raise
        except SourceUnavailableError as error:
            self._in_doubt = True
            await self._put_back(lease, _REST_SECONDS, str(error))
            raise
        except StoreError as error:
            self._in_doubt = True
            await self._put_back(lease, _REST_SECONDS, str(error))
            raise SourceUnavailableError(f"the job's record is out of reach: {error}") from None
        return taken

    async def _put_back(self, lease: RecordableLease, delay: float, reason: str) -> None:
        try:
            await lease.release(reason, delay=delay)
        except (SourceUnavailableError, LeaseLostError) as error:  # then it lapses by itself
            self._context.on_fault("message_not_put_back", message=lease.facts.message_id, error=str(error))

    async def _judge(self, lease: RecordableLease) -> RecordedLease | None:
        document = _document(lease) if self._documents else None
        arrival = self._arrival(lease, document)
        records = self._context.records
        stored = await records.get(lease.job.id)
        while True:
            step, record = judge(stored.record if stored is not None else None, arrival)
            if step is Step.WAIT:
                self._context.on_fault("job_has_a_holder", job=record.id, holder=record.worker)
                await lease.release("another message of the job is worked on", delay=WAIT_SECONDS)
                return None
            if step is Step.DROP:
                self._context.on_event("old_run_dropped", job=record.id, run=arrival.run_id)
                await lease.withdraw()
                return None
            if step is Step.END and stored is not None:
                self._context.on_event("job_had_ended", job=record.id, state=record.state)
                await end(lease, stored, self._context.announcer.url_of(document), self._context)
                return None
            try:
                written = await records.write(record, stored)
            except ConflictError as conflict:
                stored = conflict.found
                continue
            if record.fruitless >= BARREN_LIMIT:
                await self._give_up(RecordedLease(lease, written, document, self._context))
                return None
            self._tell_of_expiry(arrival)
            return RecordedLease(lease, written, document, self._context)

    async def _give_up(self, lease: RecordedLease) -> None:
        """Its last attempts vanished without a trace: it may be what kills the machines."""
        words = f"{BARREN_LIMIT} attempts in a row without an end or anything durable"
        self._context.on_fault("job_given_up", job=lease.job.id, error=words)
        await lease.fail(words, result=Result())

    def _tell_of_expiry(self, arrival: Arrival) -> None:
        if arrival.expires is not None and arrival.expires - arrival.now < _SOON_SECONDS:
            words = "the queue drops its message then, whoever works on it: submit it again"
            hours = round((arrival.expires - arrival.now) / 3600, 1)
            self._context.on_fault("message_expires", job=arrival.job_id, hours=hours, error=words)

    def _arrival(self, lease: RecordableLease, document: JobDocument | None) -> Arrival:
        facts, now = lease.facts, self._context.wall()
        return Arrival(
            lease.job.id,
            document.run_id if document is not None else "",
            facts.message_id,
            self._worker,
            now,
            facts.created if facts.created is not None else now,
            facts.expires,
            facts.receives,
            last=facts.last,
        )


def _document(lease: RecordableLease) -> JobDocument | None:
    try:
        return lease.job.document()
    except InvalidJobError:
        return None  # it will be refused when it is read as what it should be
