"""What the local Salad Job Queue has: queues, container groups, jobs and who works on them. Data only."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple


class JobStatus(enum.Enum):
    """Of a job, as the public API names it."""

    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def final(self) -> bool:
        """Whether nothing more happens to such a job."""
        return self not in (JobStatus.PENDING, JobStatus.RUNNING)


class Action(enum.Enum):
    """What happened to a job, as the public API names it. A try that was lost has no event there."""

    CREATED = "created"
    STARTED = "started"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"


class QueueName(NamedTuple):
    """Where a queue is."""

    organization: str
    project: str
    queue: str


class Machine(NamedTuple):
    """A worker: one machine in one container group."""

    workload_id: str
    machine_id: str


@dataclass
class Queue:
    """A queue."""

    id: str
    name: QueueName
    display_name: str
    description: str | None
    created: datetime
    updated: datetime


@dataclass(frozen=True)
class ContainerGroup:
    """A container group and its connection to a queue.

    Attributes:
        id: The workload id in the tokens of its machines.
        name: Its name.
        queue: The queue.
        port: Where the app listens in its containers.
        path: What jobs are POSTed to.
    """

    id: str
    name: str
    queue: QueueName
    port: int
    path: str


@dataclass(frozen=True)
class JobEvent:
    """One step in a job's life."""

    action: Action
    time: datetime


@dataclass
class Job:
    """A job.

    Attributes:
        id: Its id.
        number: Its place in the order of all jobs.
        queue: Where it was submitted.
        input: What the worker gets, byte for byte.
        metadata: What the submitter noted.
        webhook: The URL to tell when it has ended.
        status: Where it is.
        events: Its life so far.
        created: When it was submitted.
        updated: When something last happened to it.
        tries: How often it was sent to a worker.
        output: What the worker answered.
        workers: The machine ids that it was sent to, one for each try.
    """

    id: str
    number: int
    queue: QueueName
    input: bytes
    metadata: dict[str, Any] | None
    webhook: str | None
    created: datetime
    updated: datetime
    status: JobStatus = JobStatus.PENDING
    events: list[JobEvent] = field(default_factory=list)
    tries: int = 0
    output: bytes | None = None
    workers: list[str] = field(default_factory=list)


class End(enum.Enum):
    """Why the service ends a stream."""

    REPLACED = "the machine opened another"
    CANCELLED = "its job was cancelled"
    DROPPED = "the connection is lost"
    GONE = "the queue was deleted"
    CLOSED = "nothing is wrong"


@dataclass(eq=False)
class Stream:
    """An open AcceptJobs stream.

    Attributes:
        machine: Whose it is.
        queue: Where its jobs come from.
        wake: Called when there is something to send, or it has ended.
        job: A job to send, not yet taken.
        end: Why it has ended; None while it is open.
    """

    machine: Machine
    queue: QueueName
    wake: Callable[[], None]
    job: Job | None = None
    end: End | None = None


@dataclass(eq=False)
class Hold:
    """A job at a machine.

    Attributes:
        job: The job.
        machine: Who holds it.
        lapses: When the try is lost unless the machine comes back (monotonic); None while its stream is open.
    """

    job: Job
    machine: Machine
    lapses: float | None = None


class QueueError(Exception):
    """A call that the queue refuses."""


class NotFoundError(QueueError):
    """There is no such queue, job or container group."""


class ExistsError(QueueError):
    """There is one of that name already."""


class NotHeldError(QueueError):
    """The machine does not hold that job."""
