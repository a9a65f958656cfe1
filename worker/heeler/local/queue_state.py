"""The Salad Job Queue's rules (PROTOCOLS.md 1), without any I/O: who gets which job, and what a try costs.

Not documented by Salad, and decided here: a job whose try was lost goes to the head of its queue, since it is the
oldest; a report on a job that its machine does not hold, be it a repeated one, is an error; a job can be cancelled
while a machine has it (Salad's guide says that it can't, but not what its API does then). One thread only.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

from heeler.local.queue_line import Line
from heeler.local.queue_model import (
    Action,
    ContainerGroup,
    End,
    ExistsError,
    Hold,
    Job,
    JobEvent,
    JobStatus,
    Machine,
    NotFoundError,
    NotHeldError,
    Queue,
    QueueName,
    Stream,
)
from heeler.wire.salad_queue import TRIES

Listener = Callable[[str, Job], None]
"""Told of each event of a job: an `Action`'s value, or `retried`."""


class QueueState:
    """All queues, jobs and streams."""

    def __init__(
        self,
        *,
        grace: float = 30.0,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Args: seconds in which a machine may come back after its stream was lost; the clocks."""
        self.grace = grace
        self.queues: dict[QueueName, Queue] = {}
        self.groups: dict[str, ContainerGroup] = {}
        self.jobs: dict[str, Job] = {}
        self.streams: dict[Machine, Stream] = {}
        self.holds: dict[Machine, Hold] = {}
        self.listeners: list[Listener] = []
        self._lines: dict[QueueName, Line] = {}
        self._numbers = itertools.count()
        self._monotonic = monotonic
        self._wall = wall

    # Queues and container groups.

    def create_queue(
        self, name: QueueName, *, display_name: str | None = None, description: str | None = None
    ) -> Queue:
        """Make a queue, or raise `ExistsError`."""
        if name in self.queues:
            raise ExistsError(f"the queue {name.queue} exists already")
        now = self._now()
        queue = Queue(str(uuid.uuid4()), name, display_name or name.queue, description, now, now)
        self.queues[name] = queue
        self._lines[name] = Line()
        return queue

    def update_queue(self, name: QueueName, changes: dict[str, str | None]) -> Queue:
        """Change `display_name` or `description`; a display name of None is the queue's name again."""
        queue = self.queue(name)
        if "display_name" in changes:
            queue.display_name = changes["display_name"] or name.queue
        if "description" in changes:
            queue.description = changes["description"]
        queue.updated = self._now()
        return queue

    def delete_queue(self, name: QueueName) -> None:
        """Forget a queue and its jobs, and end the streams of its workers."""
        self.queue(name)
        for job in self.jobs_of(name):
            if not job.status.final:
                self.cancel(job.id)
            del self.jobs[job.id]
        for stream in [stream for stream in self.streams.values() if stream.queue == name]:
            self.end(stream, End.GONE)
        self.groups = {id_: group for id_, group in self.groups.items() if group.queue != name}
        del self.queues[name], self._lines[name]

    def queue(self, name: QueueName) -> Queue:
        """A queue, or raise `NotFoundError`."""
        if name not in self.queues:
            raise NotFoundError(f"there is no queue {name.queue} in the project {name.project}")
        return self.queues[name]

    def connect(self, group: ContainerGroup) -> None:
        """Connect a container group to its queue."""
        self.queue(group.queue)
        self.groups[group.id] = group

    # Jobs, as those who submit them see them.

    def submit(
        self, name: QueueName, data: bytes, *, metadata: dict[str, Any] | None = None, webhook: str | None = None
    ) -> Job:
        """Put a job at the end of a queue."""
        self.queue(name)
        now = self._now()
        job = Job(str(uuid.uuid4()), next(self._numbers), name, data, metadata, webhook, now, now)
        self.jobs[job.id] = job
        self._happened(job, JobStatus.PENDING, Action.CREATED)
        job.created = job.updated
        self._enqueue(job)
        return job

    def job(self, job_id: str) -> Job:
        """A job, or raise `NotFoundError`."""
        if job_id not in self.jobs:
            raise NotFoundError(f"there is no job {job_id}")
        return self.jobs[job_id]

    def jobs_of(self, name: QueueName) -> list[Job]:
        """The jobs of a queue, oldest first."""
        return [job for job in self.jobs.values() if job.queue == name]

    def waiting(self, name: QueueName) -> int:
        """How many jobs wait for a worker."""
        return len(self._lines[name].waiting)

    def cancel(self, job_id: str) -> None:
        """Cancel a job that has not ended. A worker that has it loses it, and its stream."""
        job = self.job(job_id)
        if job.status.final:
            return
        hold = next((hold for hold in self.holds.values() if hold.job is job), None)
        if hold is None:
            self._lines[job.queue].waiting.remove(job)
        else:
            del self.holds[hold.machine]
        self._happened(job, JobStatus.CANCELLED, Action.CANCELLED)
        if hold is not None and hold.machine in self.streams:
            self.end(self.streams[hold.machine], End.CANCELLED)

    # Streams.

    def open(self, machine: Machine, current_job_id: str, wake: Callable[[], None]) -> Stream:
        """Open a machine's stream; an earlier one of it ends.

        Args:
            machine: Whose stream it is.
            current_job_id: The job that it still works on, or nothing: then a job that it holds is lost to it.
            wake: See `Stream`.

        Raises:
            NotFoundError: Its container group is not connected to a queue.
            NotHeldError: It does not hold that job.
        """
        if machine.workload_id not in self.groups:
            raise NotFoundError("the container group is not connected to a queue")
        hold = self.holds.get(machine)
        if current_job_id and (hold is None or hold.job.id != current_job_id):
            raise NotHeldError(f"the job {current_job_id} is not this machine's")
        if machine in self.streams:
            self.end(self.streams[machine], End.REPLACED)
        stream = Stream(machine, self.groups[machine.workload_id].queue, wake)
        self.streams[machine] = stream
        if hold is not None and current_job_id:
            hold.lapses = None
        elif hold is not None:
            self._lose(hold)
        if machine not in self.holds:
            self._rest(stream)
        return stream

    def end(self, stream: Stream, why: End) -> None:
        """End a stream; its machine may come back for its job within the grace."""
        if self.streams.get(stream.machine) is not stream:
            return
        del self.streams[stream.machine]
        stream.end = why
        self._lines[stream.queue].forget(stream)
        if stream.machine in self.holds:
            self.holds[stream.machine].lapses = self._monotonic() + self.grace
        stream.wake()

    def complete(self, machine: Machine, job_id: str, output: bytes) -> None:
        """A machine has done its job.

        Raises:
            NotHeldError: It does not hold it.
        """
        job = self._take(machine, job_id).job
        job.output = output
        self._happened(job, JobStatus.SUCCEEDED, Action.SUCCEEDED)
        self._next(machine)

    def reject(self, machine: Machine, job_id: str) -> None:
        """A machine could not do its job: the try is spent.

        Raises:
            NotHeldError: It does not hold it.
        """
        self._again(self._take(machine, job_id).job)
        self._next(machine)

    # Time.

    def until_lapse(self) -> float | None:
        """Seconds until the next try is lost if its machine does not come back."""
        lapses = [hold.lapses for hold in self.holds.values() if hold.lapses is not None]
        return max(0.0, min(lapses) - self._monotonic()) if lapses else None

    def lapse(self) -> None:
        """Lose the tries whose machines have not come back in time."""
        now = self._monotonic()
        for hold in [hold for hold in self.holds.values() if hold.lapses is not None and hold.lapses <= now]:
            self._lose(hold)

    def resume(self) -> None:
        """The service was away: machines have the whole grace, from now, to come back."""
        for hold in self.holds.values():
            if hold.machine not in self.streams:
                hold.lapses = self._monotonic() + self.grace

    # Inside.

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._wall(), timezone.utc)

    def _take(self, machine: Machine, job_id: str) -> Hold:
        hold = self.holds.get(machine)
        if hold is None or hold.job.id != job_id:
            raise NotHeldError(f"the job {job_id} is not this machine's")
        return self.holds.pop(machine)

    def _next(self, machine: Machine) -> None:
        if machine in self.streams:
            self._rest(self.streams[machine])

    def _rest(self, stream: Stream) -> None:
        line = self._lines[stream.queue]
        line.idle.append(stream)
        self._match(line)

    def _lose(self, hold: Hold) -> None:
        del self.holds[hold.machine]
        self._again(hold.job)

    def _again(self, job: Job) -> None:
        if job.tries >= TRIES:
            self._happened(job, JobStatus.FAILED, Action.FAILED)
            return
        job.status = JobStatus.PENDING
        job.updated = self._now()
        self._tell("retried", job)
        self._enqueue(job)

    def _enqueue(self, job: Job) -> None:
        line = self._lines[job.queue]
        line.add(job)
        self._match(line)

    def _match(self, line: Line) -> None:
        while pair := line.next():
            self._send(*pair)

    def _send(self, job: Job, stream: Stream) -> None:
        self.holds[stream.machine] = Hold(job, stream.machine)
        job.tries += 1
        job.workers.append(stream.machine.machine_id)
        self._happened(job, JobStatus.RUNNING, Action.STARTED)
        stream.job = job
        stream.wake()

    def _happened(self, job: Job, status: JobStatus, action: Action) -> None:
        job.status = status
        job.updated = self._now()
        job.events.append(JobEvent(action, job.updated))
        self._tell(action.value, job)

    def _tell(self, event: str, job: Job) -> None:
        for listener in self.listeners:
            listener(event, job)
