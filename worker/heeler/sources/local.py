"""`local:PATH`: a queue in a folder, for one machine and any number of workers on it. No server is needed."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.to_thread

from heeler.errors import UsageError
from heeler.job import InvalidJobError, Job, JobDocument, Result, parse_document
from heeler.message import refuse_what_needs_a_record
from heeler.sources.base import PLAINLY, JobRecord, Lease, LeaseState, SubmitOptions, Verdict
from heeler.sources.local_table import JobTable, NewJob, Taken

_LOOK_SECONDS = 1.0
_STAMPS_PER_LOOK = 5
_LOOK_OF_DESK_SECONDS = 0.2
_DEFAULT_LEASE_SECONDS = 30.0
_HEARTBEATS_PER_LEASE = 3
_DEFAULT_FAILURES = 3
"""As Kelpie's `max_failures` (PROTOCOLS 3), for messages that can't say."""
_WORKER_BUSY_SECONDS = 1.0
"""A worker's call on a locked queue is cut short and repeated, so that a drain is never stuck in one."""

T = TypeVar("T")


async def _in_thread(call: Callable[[], T]) -> T:
    # Not abandoned when cancelled: what the call took or changed has to reach its caller.
    return await anyio.to_thread.run_sync(call)


class LocalLease:
    """A row of the table that is ours."""

    def __init__(self, table: JobTable, taken: Taken) -> None:
        self._table = table
        self._taken = taken

    @property
    def job(self) -> Job:
        """The job."""
        return self._taken.job

    @property
    def attempt(self) -> int:
        """Which delivery this is."""
        return self._taken.attempt

    @property
    def attempts_ordered(self) -> bool:
        """The table counts them."""
        return True

    @property
    def expires_after(self) -> float:
        """Three times the job's `heartbeat_interval`, or 30 s."""
        return self._taken.lease_seconds

    @property
    def extend_every(self) -> float | None:
        """As `Lease.extend_every`: by how long it lasts."""
        return None

    @property
    def spends_tries(self) -> bool:
        """Failures are counted as the job asks, and interruptions cost nothing."""
        return False

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Lease.listen`: it has to be asked."""

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """As `Lease.extend`."""
        return await _in_thread(partial(self._table.extend, self.job.id, self._taken.token, progressed=progressed))

    async def complete(self, result: Result) -> None:
        """As `Lease.complete`."""
        await _in_thread(partial(self._table.complete, self.job.id, self._taken.token, result))

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`."""
        await _in_thread(partial(self._table.retry, self.job.id, self._taken.token, reason, result, delay))

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `Lease.fail`."""
        await _in_thread(partial(self._table.fail, self.job.id, self._taken.token, reason, result))

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`."""
        call = partial(self._table.release, self.job.id, self._taken.token, reason, delay, fruitless=fruitless)
        await _in_thread(call)

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: the queue knows."""


class LocalSource:
    """The worker's side of the queue."""

    def __init__(self, folder: Path, worker: str) -> None:
        self._folder = folder
        self._worker = worker
        self._table = JobTable(folder, busy_seconds=_WORKER_BUSY_SECONDS)

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return f"local:{self._folder}"

    async def run(self) -> None:
        """As `Source.run`: nothing."""

    async def pause(self) -> None:
        """As `Source.pause`: jobs come only when they are asked for."""

    async def receive(self, *, wait: float) -> Lease | None:
        """As `Source.receive`."""
        give_up = anyio.current_time() + wait
        while True:
            stamp = self._table.stamp()
            taken = await _in_thread(partial(self._table.take, self._worker))
            if taken is not None:
                return LocalLease(self._table, taken)
            if anyio.current_time() >= give_up:
                return None
            # A look at the file's stamp costs next to nothing; leases lapse and delays pass without a change of it.
            next_look = min(give_up, anyio.current_time() + _LOOK_SECONDS)
            for _ in range(_STAMPS_PER_LOOK):
                if anyio.current_time() < next_look and self._table.stamp() == stamp:
                    await anyio.sleep(_LOOK_SECONDS / _STAMPS_PER_LOOK)

    async def reclaim(self, worker: str) -> None:
        """As `Source.reclaim`."""
        await _in_thread(partial(self._table.reclaim, worker))

    def verdict(self) -> Verdict | None:
        """None: somebody may submit at any time."""
        return None

    async def aclose(self) -> None:
        """Let go of the queue's file."""
        self._table.close()


class LocalDesk:
    """The submitter's side of the queue."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table = JobTable(folder)

    @property
    def name(self) -> str:
        """As `Desk.name`."""
        return f"local:{self._folder}"

    @property
    def pace(self) -> tuple[float, float]:
        """As `Desk.pace`: a look costs next to nothing."""
        return _LOOK_OF_DESK_SECONDS, _LOOK_OF_DESK_SECONDS

    def submit(self, documents: list[bytes], options: SubmitOptions = PLAINLY) -> list[str]:
        """As `Desk.submit`."""
        _refuse_group(options)
        jobs = [_new_job(body) for body in documents]
        ids = [job.id for job in jobs]
        counts = Counter(ids)
        taken = next((job_id for job_id in ids if counts[job_id] > 1), None) or self._table.add(jobs)
        if taken is not None:
            raise InvalidJobError("id", f"{taken!r} is in the queue already; choose another, or leave it out")
        return ids

    def submit_message(self, message: bytes, options: SubmitOptions = PLAINLY) -> str:
        """As `Desk.submit_message`."""
        _refuse_group(options)
        job = NewJob(secrets.token_hex(8), message, _DEFAULT_LEASE_SECONDS, _DEFAULT_FAILURES)
        self._table.add([job])
        return job.id

    def jobs(self) -> list[JobRecord]:
        """As `Desk.jobs`."""
        return self._table.records()

    def show(self, job_id: str) -> JobRecord | None:
        """As `Desk.show`."""
        return next(iter(self._table.records(job_id)), None)

    def look(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """As `Desk.look`."""
        return {record.id: record for job_id in ids for record in self._table.records(job_id)}

    def result(self, job_id: str) -> bytes | None:
        """As `Desk.result`: the answer's body, or how a command ended."""
        record = self.show(job_id)
        result = Result.from_json(record.result or {}) if record is not None else Result()
        if result == Result():
            return None
        return result.body if result.status is not None else json.dumps(result.facts()).encode() + b"\n"

    def notes(self) -> list[str]:
        """As `Desk.notes`: none."""
        return []

    def cancel(self, job_id: str) -> bool:
        """As `Desk.cancel`."""
        return self._table.cancel(job_id)

    def close(self) -> None:
        """As `Desk.close`."""
        self._table.close()


def _refuse_group(options: SubmitOptions) -> None:
    if options.group is not None:
        raise UsageError("--group names a message group of a FIFO queue of SQS, and this queue is none: leave it out")


def _new_job(body: bytes) -> NewJob:
    document: JobDocument = parse_document(body)
    refuse_what_needs_a_record(document)
    job_id = document.id or secrets.token_hex(8)
    if document.id is None:
        body = json.dumps({**json.loads(body), "id": job_id}).encode()
    interval = document.heartbeat_interval
    lease_seconds = interval * _HEARTBEATS_PER_LEASE if interval else _DEFAULT_LEASE_SECONDS
    return NewJob(job_id, body, lease_seconds, document.max_failures)
