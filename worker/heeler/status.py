"""What the runtime is doing, in one place: every event goes through here to the log, the counters and the status.

Nothing fails in silence (promise 10): a fault is a log event, a line in `heeler status` and a metric at once.
"""

from __future__ import annotations

import enum
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
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


class Status:
    """The state that people and metrics see. Written from the event loop and from worker threads."""

    def __init__(self, log: Log, *, worker: str, source: str, mask: Callable[[str], str] = str) -> None:
        """Args: where events go, who we are, where jobs come from, and what takes the secrets out of a text."""
        self._log = log
        self._mask = mask
        self._lock = threading.Lock()
        self.worker = worker
        self.source = self.clean(source)
        self.phase = Phase.START
        self.job_id: str | None = None
        self.attempt = 0
        self.since = time.time()
        self.draining = False
        self.unfenced = False
        self.checkpoint: dict[str, Any] | None = None
        self.outcomes: Counter[str] = Counter()
        self.events: Counter[str] = Counter()
        self.faults: deque[dict[str, Any]] = deque(maxlen=_FAULTS_KEPT)

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
            self.faults.append({"event": name, "time": time.time(), "job_id": self.job_id, **fields})
        self._tell("warning", name, fields)

    def enter(self, phase: Phase) -> None:
        """The worker goes on to another phase."""
        self.phase = phase
        self.since = time.time()
        self.event("phase", phase=phase.value)

    def take(self, job_id: str, attempt: int) -> None:
        """A job was received."""
        self.job_id, self.attempt = self.clean(job_id), attempt
        self.event("job_received", attempt=attempt)

    def settled(self, ending: Ending, *, told: bool) -> None:
        """An attempt ended, and the queue was `told` or could not be."""
        outcome = ending.outcome.value
        self.outcomes[outcome] += 1
        fields = {"outcome": outcome, "reason": ending.reason, "told": told, **ending.result.as_json()}
        if ending.outcome.value in ("done", "release", "cancelled") and told:
            self.event("job_settled", **fields)
        else:
            self.fault("job_settled", **fields)

    def committed(self, fields: Mapping[str, object]) -> None:
        """A generation of the job's checkpoint is in storage."""
        shown = {name: fields[name] for name in ("generation", "files", "bytes")}
        self.checkpoint = {**shown, "time": time.time()}
        self.event("committed", **fields)

    def drop(self) -> None:
        """The job is no longer ours to speak of."""
        self.job_id, self.attempt, self.checkpoint = None, 0, None

    def _tell(self, level: str, name: str, fields: dict[str, object]) -> None:
        with self._lock:
            self.events[name] += 1
        if self.job_id is not None:
            fields = {"job_id": self.job_id, **fields}
        self._log(level, name, fields)

    def snapshot(self) -> dict[str, Any]:
        """All of it, for JSON."""
        with self._lock:
            return {
                "worker": self.worker,
                "source": self.source,
                "phase": self.phase.value,
                "since": self.since,
                "draining": self.draining,
                "job_id": self.job_id,
                "attempt": self.attempt,
                "checkpoint": self.checkpoint,
                "unfenced": self.unfenced,
                "outcomes": dict(self.outcomes),
                "events": dict(self.events),
                "faults": list(self.faults),
            }
