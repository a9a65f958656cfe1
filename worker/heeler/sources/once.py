"""`once`: one job, given with the container. No queue is needed, and nothing is shared.

What became of it is kept in the state folder, so that a restarted container neither forgets failed attempts nor
runs a finished job again. On another machine it starts from the job's checkpoint, with its failures forgotten.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import anyio

from heeler.errors import EXIT_USAGE
from heeler.job import InvalidJobError, Job, Result, parse_document
from heeler.sources.base import BARREN_LIMIT, Lease, LeaseState, SourceUnavailableError, Verdict

_EXIT_BARREN = 1
_DEFAULT_FAILURES = 3
"""As Kelpie's `max_failures` (PROTOCOLS 3), for messages that can't say."""


@dataclass(frozen=True)
class _Record:
    job_id: str
    attempts: int = 0
    barren: int = 0
    failures: int = 0
    visible_at: float = 0.0
    state: str = "pending"
    exit_code: int = 0
    reason: str = ""


def _exit_code(result: Result) -> int:
    """As a shell reports it: the program's own, or 128 and the signal's number; 64 if it never ran."""
    if result.signal is not None:
        return 128 + result.signal
    return EXIT_USAGE if result.exit_code is None else result.exit_code


class OnceLease:
    """The only lease there is; it can't lapse or be lost."""

    def __init__(self, source: OnceSource, job: Job, attempt: int) -> None:
        self._source = source
        self._job = job
        self._attempt = attempt

    @property
    def job(self) -> Job:
        """The job."""
        return self._job

    @property
    def attempt(self) -> int:
        """Which start of it on this machine this is."""
        return self._attempt

    @property
    def attempts_ordered(self) -> bool:
        """They are counted on this machine only."""
        return False

    @property
    def expires_after(self) -> float:
        """Never."""
        return math.inf

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
        if progressed:
            self._source.update(barren=0)
        return LeaseState.HELD

    async def complete(self, result: Result) -> None:
        """As `Lease.complete`."""
        del result
        self._source.settle(self._attempt, state="done", reason="", exit_code=0)

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`."""
        self._source.count_failure(self._attempt, reason, delay, _exit_code(result))

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `Lease.fail`."""
        self._source.settle(self._attempt, state="failed", reason=reason, exit_code=_exit_code(result))

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`."""
        self._source.put_back(self._attempt, reason, delay, fruitless=fruitless)

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: the queue knows."""


def once_of_document(body: bytes, state_dir: Path, clock: Callable[[], float] = time.time) -> OnceSource:
    """The source of the job that a document describes.

    Raises:
        InvalidJobError: It describes none.
    """
    document = parse_document(body)
    return OnceSource(Job(document.id or _id_of(body), body), document.max_failures, state_dir, clock)


def once_of_message(body: bytes, state_dir: Path, clock: Callable[[], float] = time.time) -> OnceSource:
    """The source of one message for an app, byte for byte."""
    return OnceSource(Job(_id_of(body), body), _DEFAULT_FAILURES, state_dir, clock)


def _id_of(body: bytes) -> str:
    return sha256(body).hexdigest()[:16]


class OnceSource:
    """Gives one job until it is done or has failed for good."""

    def __init__(self, job: Job, max_failures: int, state_dir: Path, clock: Callable[[], float] = time.time) -> None:
        """Args: the job, how often it may fail, the folder for what became of it, and wall time in seconds.

        Raises:
            InvalidJobError: What is in the folder is no record of ours.
        """
        self._max_failures = max_failures
        self._job = job
        self._path = state_dir / "once.json"
        self._clock = clock
        self._record = self._load()
        self._out: int | None = None

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return "once"

    async def run(self) -> None:
        """As `Source.run`: nothing."""

    async def pause(self) -> None:
        """As `Source.pause`: jobs come only when they are asked for."""

    async def receive(self, *, wait: float) -> Lease | None:
        """As `Source.receive`."""
        rest = self._record.visible_at - self._clock()
        if self._out is not None or self._record.state != "pending" or rest > wait:
            await anyio.sleep(wait if self._record.state == "pending" else 0)
            return None
        await anyio.sleep(max(0.0, rest))
        if self._record.barren >= BARREN_LIMIT:
            barren = f"{BARREN_LIMIT} attempts in a row ended without an answer and without anything made durable"
            reason = f"{barren}; the last: {self._record.reason}" if self._record.reason else barren
            self.update(state="failed", reason=reason, exit_code=_EXIT_BARREN)
            return None
        self.update(attempts=self._record.attempts + 1, barren=self._record.barren + 1)
        self._out = self._record.attempts
        return OnceLease(self, self._job, self._record.attempts)

    async def reclaim(self, worker: str) -> None:
        """As `Source.reclaim`: nothing is held by name."""

    def verdict(self) -> Verdict | None:
        """The program's own exit code, once it has ended for good."""
        if self._record.state == "pending":
            return None
        return Verdict(self._record.exit_code, self._record.reason or f"job {self._job.id} is {self._record.state}")

    async def aclose(self) -> None:
        """Nothing is open."""

    def count_failure(self, attempt: int, reason: str, delay: float, exit_code: int) -> None:
        """An attempt failed: it comes again after `delay` seconds, if it may."""
        failures = self._record.failures + 1
        state = "failed" if failures >= self._max_failures else "pending"
        visible_at = self._clock() + delay
        told = {"state": state, "reason": reason, "exit_code": exit_code}
        self.settle(attempt, failures=failures, barren=0, visible_at=visible_at, **told)

    def put_back(self, attempt: int, reason: str, delay: float, *, fruitless: bool) -> None:
        """An attempt was interrupted: it comes again after `delay` seconds."""
        barren = self._record.barren if fruitless else 0
        self.settle(attempt, reason=reason, barren=barren, visible_at=self._clock() + delay)

    def settle(self, attempt: int, **changes: object) -> None:
        """End the attempt that is out; a repeated answer changes nothing."""
        if self._out == attempt:
            self.update(**changes)
            self._out = None

    def update(self, **changes: object) -> None:
        """Change the record, on disk first."""
        record = replace(self._record, **changes)  # type: ignore[arg-type]
        temporary = self._path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(asdict(record), file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self._path)
        except OSError as error:
            raise SourceUnavailableError(f"{self._path} can't be written: {error.strerror}") from None
        self._record = record

    def _load(self) -> _Record:
        try:
            found = _Record(**json.loads(self._path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return _Record(self._job.id)
        except (ValueError, TypeError):
            raise InvalidJobError(str(self._path), "is not a record of ours; delete it to start afresh") from None
        return found if found.job_id == self._job.id else _Record(self._job.id)
