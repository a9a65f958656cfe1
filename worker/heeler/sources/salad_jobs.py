"""The one job that the Salad Job Queue has given us, from its message to the answer that the service has taken.

The service sends the next job only after `CompleteJob` or `RejectJob` (PROTOCOLS 1). Both may be repeated: where a
call went unanswered and the next one says NOT_FOUND, the first took effect.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import anyio

from heeler.job import Job, Target, check_job_id
from heeler.scopes import Doubling, Signal
from heeler.sources.base import BARREN_LIMIT, LeaseLostError, SourceUnavailableError
from heeler.sources.salad_calls import CallFailedError, QueueCalls
from heeler.sources.salad_channel import Code
from heeler.sources.salad_record import Answer, JobRecord, Records
from heeler.wire.salad_queue import messages

_RETRY = (0.2, 5.0)
_ABANDONED_SECONDS = 10.0
"""After so long without a stream, an answer is told by `finish` too: whoever held the lease may have given up."""
_NOT_ACCEPTABLE = (Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED)


@dataclass(eq=False)
class Held:
    """A delivery of a job.

    Attributes:
        record: The job.
        confirmed: Whether the service has said to this process that we have it.
        taken: Whether a lease of it was given out.
        lost: It is no longer ours.
        answer: What the service is to be told, once that is decided.
        tried: Whether it was tried to tell it.
        unanswered: A call with the answer may have taken effect.
        superseded: The service went on to another job, or does not know that we have this one, after `answer`.
        settled: The service has the answer.
        guard: One call at a time.
    """

    record: JobRecord
    confirmed: bool = True
    taken: bool = False
    lost: Signal = field(default_factory=Signal)
    answer: Answer | None = None
    tried: bool = False
    unanswered: bool = False
    superseded: bool = False
    settled: bool = False
    guard: anyio.Lock = field(default_factory=lambda: anyio.Lock(fast_acquire=True))

    def job(self) -> Job:
        """The job, as the program is to get it."""
        record = self.record
        path = record.path if record.path.startswith("/") else f"/{record.path}"
        return Job(record.job_id, record.input, Target(record.port, path), {"Salad-Job-Id": record.job_id})


class Jobs:
    """Owns what we know of the job, in memory and on disk."""

    def __init__(self, records: Records, calls: QueueCalls, on_fault: Callable[..., None], rng: random.Random) -> None:
        """Args: where it is kept, how the service is told, who hears of faults, and where jitter comes from."""
        self._records = records
        self._calls = calls
        self._on_fault = on_fault
        self._rng = rng
        self._current: Held | None = None
        """What the service counts as ours, as far as we know."""
        self._offer: Held | None = None
        self._orphan: Held | None = None
        """What `finish` has to settle, since no lease does."""
        self._offered = anyio.Event()
        self._ended = anyio.Event()
        self._last = ("", 0)

    # For the source.

    async def offered(self) -> None:
        """Return once there is a job to take."""
        while self._offer is None:
            self._offered = anyio.Event()
            await self._offered.wait()

    def take(self) -> Held | None:
        """The job to be done next, if there is one."""
        held, self._offer = self._offer, None
        if held is not None:
            held.taken = True
        return held

    def refuse(self) -> None:
        """The job on offer won't be done here; `finish` tells the service."""
        if self._offer is not None:
            self._orphan, self._offer = self._offer, None

    @property
    def out(self) -> bool:
        """Whether somebody works on a job."""
        return self._current is not None and self._current.taken

    async def progressed(self, held: Held) -> None:
        """Something of the job became durable."""
        if held.record.barren and held is self._current and held.answer is None:
            held.record = replace(held.record, barren=0)
            await self._records.save_job(held.record)

    async def settle(self, held: Held, output: bytes | None) -> None:
        """Tell the service: `CompleteJob` with the output, or `RejectJob`. Raises as `Lease.complete`.

        The answer that was decided on first is told, however often this is called.
        """
        async with held.guard:
            if held.lost.is_set():
                raise LeaseLostError(f"job {held.record.job_id} is no longer ours")
            answer = held.answer or await self._decide(held, output)
            try:
                await self._tell(held, answer)
            except CallFailedError as error:
                if answer.output is None or error.code not in _NOT_ACCEPTABLE:
                    raise
                self._on_fault("answer_refused", job_id=answer.job_id, error=str(error))
                await self._tell(held, await self._decide(held, None))

    # For the stream.

    @property
    def current_id(self) -> str:
        """The job to name when the stream is opened; empty for none."""
        return "" if self._current is None else self._current.record.job_id

    @property
    def unfinished(self) -> bool:
        """Whether there is something for `finish`."""
        return self._orphan is not None

    def recover(self) -> None:
        """Take up what an earlier process left."""
        answer, record = self._records.load_answer(), self._records.load_job()
        if answer is not None:
            # The rest of the job is not needed any more.
            self._orphan = Held(JobRecord(answer.job_id, 0, "", b""), answer=answer, unanswered=True)
        if record is not None and (answer is None or answer.job_id != record.job_id):
            record = replace(record, attempt=record.attempt + 1, barren=record.barren + 1)
            self._current = Held(record, confirmed=False)
            self._last = record.job_id, record.attempt

    async def finish(self) -> None:
        """Tell the service what no lease will tell it, for as long as it takes."""
        backoff = Doubling(*_RETRY, self._rng)
        while (held := self._orphan) is not None:
            try:
                await self.settle(held, None)
            except SourceUnavailableError as error:
                delay = backoff.next()
                self._on_fault("queue_unreachable", error=str(error), retry_in=round(delay, 3))
                await anyio.sleep(delay)
            except LeaseLostError as error:
                self._on_fault("lease_lost", job_id=held.record.job_id, error=str(error))
                self._orphan = None
            else:
                self._orphan = None

    async def answered(self) -> None:
        """Return once the service has the answer of the current job, where one was decided on.

        Only then is it clear what a new stream has to name.
        """
        while (held := self._current) is not None and held.answer is not None:
            self._ended = anyio.Event()
            with anyio.move_on_after(_ABANDONED_SECONDS):
                await self._ended.wait()
                continue
            self._orphan = held
            await self.finish()

    async def confirm(self) -> None:
        """The service counts the current job as ours."""
        held = self._current
        if held is None or held.confirmed:
            return
        held.confirmed = True
        if held.record.barren > BARREN_LIMIT:
            self._on_fault("job_barren", job_id=held.record.job_id, attempts=BARREN_LIMIT)
            self._orphan = held
            return
        await self._put_on_offer(held)

    async def deliver(self, message: messages.Job) -> None:
        """The service sent a job."""
        held = self._current
        if held is not None and held.record.job_id == message.job_id and held.answer is None:
            await self.confirm()
            return
        self.supersede()
        attempt = self._last[1] + 1 if self._last[0] == message.job_id else 1
        self._last = message.job_id, attempt
        self._current = held = Held(JobRecord(message.job_id, message.port, message.path, message.input, attempt))
        try:
            check_job_id(message.job_id)
        except ValueError as error:
            self._on_fault("job_refused", error=str(error))
            self._orphan = held
            return
        await self._put_on_offer(held)

    def supersede(self) -> None:
        """The service does not count the current job as ours any more."""
        held, self._current = self._current, None
        if held is None:
            return
        if held.answer is None:
            self._lose(held)
        held.superseded = True
        self._ended.set()

    async def _put_on_offer(self, held: Held) -> None:
        with anyio.CancelScope(shield=True):  # what was received is not dropped half-way
            await self._records.save_job(held.record)
        self._offer = held
        self._offered.set()

    async def _decide(self, held: Held, output: bytes | None) -> Answer:
        held.answer = Answer(held.record.job_id, output)
        await self._records.save_answer(held.answer)
        if held is self._current:
            self._records.drop_job()
        return held.answer

    async def _tell(self, held: Held, answer: Answer) -> None:
        """One call with the answer, unless the service has it."""
        if held.superseded and held.unanswered:
            self._settle(held, answer)
        if held.settled:
            return
        patient, held.tried = held.tried, True
        before, held.unanswered = held.unanswered, True
        try:
            if answer.output is None:
                await self._calls.reject(answer.job_id, patient=patient)
            else:
                await self._calls.complete(answer.job_id, answer.output, patient=patient)
        except CallFailedError as error:
            held.unanswered = before or not error.unchanged
            if error.code is not Code.NOT_FOUND and (answer.output is not None or error.code not in _NOT_ACCEPTABLE):
                raise
            if not before:
                self._lose(held)
                raise LeaseLostError(f"job {answer.job_id} is no longer ours: {error}") from None
        except SourceUnavailableError:
            held.unanswered = before  # there was no token, so no call
            raise
        self._settle(held, answer)

    def _settle(self, held: Held, answer: Answer) -> None:
        held.settled = True
        self._records.drop_answer(answer)
        self._let_go(held)

    def _lose(self, held: Held) -> None:
        held.lost.set()
        if held.answer is None:
            self._records.drop_job()
        else:
            self._records.drop_answer(held.answer)
        self._let_go(held)

    def _let_go(self, held: Held) -> None:
        if self._offer is held:
            self._offer = None
        if self._orphan is held:
            self._orphan = None
        if self._current is held:
            self._current = None
        self._ended.set()
