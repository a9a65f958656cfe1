"""What the runtime is doing, in one place: every event goes through here to the log, the counters and the status.

Nothing fails in silence (promise 10): a fault is a log event, a line in `heeler status` and a metric at once.
"""

from __future__ import annotations

import enum
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from heeler.job import Ending

_FAULTS_KEPT = 20

Log = Callable[[str, str, dict[str, object]], None]
"""Takes a level ("info", "warning"), an event's name and its fields."""


class Phase(enum.Enum):
    """Where a worker is with its job."""

    START = "start"
    RECEIVE = "receive"
    RESTORE = "restore"
    RUN = "run"
    UPLOAD = "upload"
    SETTLE = "settle"
    END = "end"


@dataclass
class Lane:
    """One job at a time: a worker has as many lanes as jobs at once.

    Attributes:
        phase: Where it is.
        since: When it got there, seconds since 1970.
        job_id: Its job, if it has one.
        attempt: Which delivery of it.
        checkpoint: The newest generation of the job's checkpoint.
        unsent: Tells which files of the job have a state that is not in storage, as far as that is known.
    """

    phase: Phase = Phase.START
    since: float = field(default_factory=time.time)
    job_id: str | None = None
    attempt: int = 0
    checkpoint: dict[str, Any] | None = None
    unsent: Callable[[], set[Path]] | None = None

    def as_json(self) -> dict[str, Any]:
        """As the status shows it."""
        shown = ("since", "job_id", "attempt", "checkpoint")
        return {"phase": self.phase.value, **{name: getattr(self, name) for name in shown}}


_lane: ContextVar[Lane | None] = ContextVar("lane", default=None)
"""Whose job it is that a task, a thread of it or a task that it started speaks of."""


class Status:
    """The state that people and metrics see. Written from the event loop and from worker threads."""

    def __init__(self, log: Log, *, worker: str, source: str, mask: Callable[[str], str] = str) -> None:
        """Args: where events go, who we are, where jobs come from, and what takes the secrets out of a text."""
        self._log = log
        self._mask = mask
        self._lock = threading.Lock()
        self.worker = worker
        self.source = self.clean(source)
        self._lanes = [Lane()]
        self.draining = False
        self.unfenced = False
        self.outcomes: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.faults: deque[dict[str, Any]] = deque(maxlen=_FAULTS_KEPT)
        self.on_change: list[Callable[[], None]] = []
        """Called on the event loop when the phase or the job has changed."""
        self.on_settled: list[Callable[[str, Ending], None]] = []
        """Called on the event loop when an attempt has ended: whose job's, and how."""

    @contextmanager
    def lane(self) -> Iterator[None]:
        """What this task says in the block, and all that it starts there, is of one job at a time of several."""
        lane = Lane()
        self._lanes.append(lane)
        token = _lane.set(lane)
        try:
            yield
        finally:
            _lane.reset(token)
            self._lanes.remove(lane)

    @property
    def _current(self) -> Lane:
        """The lane that is spoken of; for all others, the first with a job."""
        busy = (lane for lane in self._lanes if lane.job_id is not None)
        return _lane.get() or next(busy, self._lanes[0])

    def _own_job(self) -> str | None:
        """The job that an event is about: what is said outside of several lanes is about none of theirs."""
        return (_lane.get() or self._lanes[0]).job_id

    @property
    def phase(self) -> Phase:
        """Where the worker is with its job."""
        return self._current.phase

    def is_anywhere(self, *phases: Phase) -> bool:
        """Whether one of the jobs is in one of these phases."""
        return any(lane.job_id is not None and lane.phase in phases for lane in self._lanes)

    @property
    def lanes(self) -> Sequence[Lane]:
        """All of them, busy or not."""
        return [*self._lanes]

    @property
    def job_id(self) -> str | None:
        """The job, if there is one."""
        return self._current.job_id

    @property
    def attempt(self) -> int:
        """Which delivery of it."""
        return self._current.attempt

    @property
    def checkpoint(self) -> dict[str, Any] | None:
        """The newest generation of its checkpoint."""
        return self._current.checkpoint

    def clean(self, text: str) -> str:
        """The text as it may be shown and kept: without secrets, and of characters that any encoding has."""
        return self._mask(text.encode("utf-8", "backslashreplace").decode())

    def _clean(self, value: object) -> Any:
        """A field of an event, as JSON has it."""
        if value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            return {self.clean(str(name)): self._clean(part) for name, part in value.items()}
        if isinstance(value, list | tuple):
            return [self._clean(part) for part in value]
        return self.clean(str(value))

    def event(self, name: str, **fields: object) -> None:
        """Something happened that is no fault."""
        self._tell("info", name, self._clean(fields))

    def fault(self, name: str, **fields: object) -> None:
        """Something went wrong; what we do about it is in the fields."""
        fields = self._clean(fields)
        with self._lock:
            self.faults.append({"event": name, "time": time.time(), "job_id": self._own_job(), **fields})
        self._tell("warning", name, fields)

    def enter(self, phase: Phase) -> None:
        """The worker goes on to another phase."""
        lane = _lane.get() or self._lanes[0]
        lane.phase, lane.since = phase, time.time()
        self.event("phase", phase=phase.value)
        self._changed()

    def take(self, job_id: str, attempt: int) -> None:
        """A job was received."""
        lane = _lane.get() or self._lanes[0]
        lane.job_id, lane.attempt = self.clean(job_id), attempt
        self.event("job_received", attempt=attempt)
        self._changed()

    def tell_unsent(self, unsent: Callable[[], set[Path]]) -> None:
        """Who knows which files of the job have a state that is not in storage."""
        (_lane.get() or self._lanes[0]).unsent = unsent

    def settled(self, ending: Ending, *, told: bool) -> None:
        """An attempt ended, and the queue was `told` or could not be."""
        outcome = ending.outcome.value
        self.outcomes[outcome] += 1
        for listener in self.on_settled:
            listener(self._own_job() or "", ending)
        fields = {"outcome": outcome, "reason": ending.reason, "told": told, **ending.result.facts()}
        if ending.outcome.value in ("done", "release", "cancelled") and told:
            self.event("job_settled", **fields)
        else:
            self.fault("job_settled", **fields)

    def committed(self, fields: Mapping[str, object]) -> None:
        """A generation of the job's checkpoint is in storage."""
        shown = {name: fields[name] for name in ("generation", "files", "bytes")}
        self._current.checkpoint = {**shown, "time": time.time()}
        self.event("committed", **fields)

    def drop(self) -> None:
        """The job is no longer ours to speak of."""
        lane = _lane.get() or self._lanes[0]
        lane.job_id, lane.attempt, lane.checkpoint, lane.unsent = None, 0, None, None
        self._changed()

    def _changed(self) -> None:
        token = _lane.set(None)  # a listener asks of the whole worker, not of the lane that has changed
        try:
            for listener in self.on_change:
                listener()
        finally:
            _lane.reset(token)

    def _tell(self, level: str, name: str, fields: dict[str, object]) -> None:
        with self._lock:
            self.events[name] += 1
        if (job_id := self._own_job()) is not None:
            fields = {"job_id": job_id, **fields}
        self._log(level, name, fields)

    def snapshot(self) -> dict[str, Any]:
        """All of it, for JSON."""
        with self._lock:
            return {
                "worker": self.worker,
                "source": self.source,
                **self._current.as_json(),
                "jobs": [lane.as_json() for lane in self._lanes if lane.job_id is not None],
                "draining": self.draining,
                "unfenced": self.unfenced,
                "outcomes": dict(self.outcomes),
                "events": dict(self.events),
                "faults": list(self.faults),
            }
