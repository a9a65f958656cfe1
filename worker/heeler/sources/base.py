"""What a source of jobs is: the protocols that every queue implements, and what they speak of.

One contract suite (`tests/contract/test_source.py`) runs against every implementation. A source never retries by
itself for long and never decides what a job's end means.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from heeler.errors import HeelerError
from heeler.job import Job, Result

BARREN_LIMIT = 10
"""So many attempts in a row without an answer or anything durable are a failure (a job that kills its machine)."""


class SourceUnavailableError(Exception):
    """The queue did not answer, or not sensibly: the same call may succeed later."""


class LeaseLostError(Exception):
    """The job is no longer ours: another worker has it, or it was cancelled. Nothing was changed."""


class JobCancelledError(LeaseLostError):
    """The job was cancelled: it is to be withdrawn."""


class LeaseState(enum.Enum):
    """What the queue says when a lease is extended."""

    HELD = "held"
    ENDING = "ending"
    """Held, but the queue takes it away before long, whatever is done: to be handed back as in a drain."""
    LOST = "lost"
    CANCELLED = "cancelled"


class Lease(Protocol):
    """The right to work on one job until it expires. It is settled at most once, by one of the last five calls.

    Each of those raises `LeaseLostError` when the job is no longer ours, and `SourceUnavailableError` when it is
    not known whether the call took effect; repeating it is safe.
    """

    @property
    def job(self) -> Job:
        """The job."""
        ...

    @property
    def attempt(self) -> int:
        """Which delivery of the job this is, from 1; counted before the program starts."""
        ...

    @property
    def attempts_ordered(self) -> bool:
        """Whether a higher `attempt` of the same job is always the newer one, on whatever machine."""
        ...

    @property
    def expires_after(self) -> float:
        """Seconds from an extension to the lapse; infinite where a lease can't lapse."""
        ...

    @property
    def extend_every(self) -> float | None:
        """Seconds from one extension to the next, where the queue wants to hear of us at a pace of its own.

        None leaves it to whoever keeps the lease: a third of `expires_after`.
        """
        ...

    @property
    def spends_tries(self) -> bool:
        """Whether each `retry` spends one of few tries of the queue: a transient failure is tried again here first."""
        ...

    def listen(self, heard: Callable[[], None]) -> None:
        """Have `heard` called when the queue has news of this lease by itself; `extend` then says which."""
        ...

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """Keep the lease, from now on for `expires_after`.

        Args:
            progressed: Whether something of the job became durable since the last call, so that a source which
                counts fruitless attempts starts again.

        Raises:
            SourceUnavailableError: It is not known whether we hold it.
        """
        ...

    async def complete(self, result: Result) -> None:
        """The job is done; its outputs are durable."""
        ...

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """The attempt failed and counts; to be delivered again after `delay` seconds, if it may fail again."""
        ...

    async def fail(self, reason: str, *, result: Result) -> None:
        """The job can never succeed: set it aside with the reason."""
        ...

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """The attempt was interrupted and does not count as a failure: to another worker, after `delay` seconds.

        Too many `fruitless` ones in a row (nobody asked for it, and nothing became durable) fail the job.
        """
        ...

    async def withdraw(self) -> None:
        """`extend` said that the job was cancelled, and its program has ended."""
        ...


class Machine(Protocol):
    """What a source asks of the machine that it runs on; `heeler.platform` implements it."""

    async def ready(self) -> bool:
        """Whether this machine is to take jobs now.

        Raises:
            SourceUnavailableError: It could not be asked.
        """
        ...

    async def token(self, *, fresh: bool = False) -> str:
        """The token that says who this machine is, for a queue's `authorization`; never to be logged.

        Args:
            fresh: The one given before was refused.

        Raises:
            SourceUnavailableError: It could not be asked.
        """
        ...


@dataclass(frozen=True)
class Verdict:
    """The last word of a source that has no more jobs.

    Attributes:
        exit_code: For our process.
        reason: For people.
    """

    exit_code: int
    reason: str


class Source(Protocol):
    """A queue, as a worker sees it."""

    @property
    def name(self) -> str:
        """As the user wrote it, without secrets."""
        ...

    async def run(self) -> None:
        """What goes on between the other calls; runs beside them until it is cancelled, or returns: nothing does.

        A source that asks its queue only when it is called itself returns at once. All other calls may come before
        and after it, but then nothing is received, and nothing is told.
        """
        ...

    async def pause(self) -> None:
        """No job is wanted until the next `receive`: to be called before a lease is settled, if none will be.

        A queue that sends jobs by itself would send the next one to a worker that won't do it.
        """
        ...

    async def receive(self, *, wait: float) -> Lease | None:
        """The next job, or None after about `wait` seconds without one.

        Cancelled, it either raises or still returns the lease that it took; it never drops one.

        Raises:
            SourceUnavailableError: The queue is out of reach.
        """
        ...

    async def reclaim(self, worker: str) -> None:
        """What a worker of that name, which is certainly dead, still holds may be received again at once.

        Raises:
            SourceUnavailableError: The queue is out of reach; its leases lapse by themselves.
        """
        ...

    def verdict(self) -> Verdict | None:
        """None while jobs may come; the last word once none can ever come again."""
        ...

    async def aclose(self) -> None:
        """Let go of connections and files."""
        ...


@dataclass(frozen=True)
class JobRecord:
    """A job as a queue shows it to people.

    Attributes:
        id: The job.
        state: pending, running, done, failed or cancelled.
        attempts: Deliveries so far.
        failures: Attempts that failed and counted.
        interruptions: Attempts that ended without counting.
        reason: Of the last failure or interruption.
        worker: Who has it, or had it last.
        created: When it was submitted, seconds since 1970.
        finished: When it ended, or None.
        result: What the program left, once it ended.
        expires: When the queue drops it, whoever works on it, seconds since 1970; None if it never does.
        history: The newest attempts, oldest first: attempt, worker, started, ended, outcome, reason.
        webhook: What became of its webhook: "", pending, sent, or why it was given up.
        result_key: Of the object that holds the result.
        heard: When its worker wrote last, as before.
    """

    id: str
    state: str
    attempts: int
    failures: int
    interruptions: int
    reason: str
    worker: str
    created: float
    finished: float | None
    result: dict[str, Any] | None
    expires: float | None = None
    history: tuple[dict[str, Any], ...] = ()
    webhook: str = ""
    result_key: str = ""
    heard: float | None = None


FRESH_RUN = "fresh-"
"""How the run ids begin that `heeler submit --fresh` gives."""


@dataclass(frozen=True)
class SubmitOptions:
    """How jobs are submitted.

    Attributes:
        group: The message group of a FIFO queue.
        fresh: Whether the documents have a new run id of `FRESH_RUN`.
    """

    group: str | None = None
    fresh: bool = False


PLAINLY = SubmitOptions()


class PartlySubmittedError(HeelerError):
    """Some jobs are in the queue, and the others are not.

    Attributes:
        sent: The ids of those that are.
        exit_code: That of what came between.
    """

    def __init__(self, words: str, sent: Sequence[str], exit_code: int) -> None:
        self.sent = sent
        self.exit_code = exit_code
        super().__init__(words)


class Desk(Protocol):
    """A queue, as a person who submits and asks sees it. Blocking calls.

    Each may raise a `HeelerError`, and `SourceUnavailableError` while the queue is out of reach.
    """

    @property
    def name(self) -> str:
        """The queue, for people."""
        ...

    @property
    def pace(self) -> tuple[float, float]:
        """Seconds between two looks of somebody who waits: at first, and at the most."""
        ...

    def submit(self, documents: list[bytes], options: SubmitOptions = PLAINLY) -> list[str]:
        """Add jobs and return their ids. All or none, unless it says otherwise.

        Raises:
            InvalidJobError: A document is none, or its id is taken.
            PartlySubmittedError: The queue went away midway.
        """
        ...

    def submit_message(self, message: bytes, options: SubmitOptions = PLAINLY) -> str:
        """Add a message for an app, byte for byte, and return its id.

        Raises:
            InvalidJobError: The queue can't hold it.
        """
        ...

    def notes(self) -> list[str]:
        """What the calls so far have found that a person should know, a line each; nothing is told twice."""
        ...

    def look(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """Those of these jobs that are known, by id. Without ids it only says whether the queue can tell."""
        ...

    def result(self, job_id: str) -> bytes | None:
        """What a job left, byte for byte; None if it left nothing (yet) or is unknown."""
        ...

    def jobs(self) -> list[JobRecord]:
        """All jobs, oldest first."""
        ...

    def show(self, job_id: str) -> JobRecord | None:
        """One job."""
        ...

    def cancel(self, job_id: str) -> bool:
        """Cancel a job; whether it was still to be done or being done."""
        ...

    def close(self) -> None:
        """Let go of connections and files."""
        ...
