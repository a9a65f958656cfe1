"""Faults of the local job queue on command, and the calls that it got."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

import grpc

_KEPT = 100_000


@dataclass(frozen=True)
class Fault:
    """How a call fails.

    Attributes:
        code: What it is answered with.
        applied: It takes effect all the same: only its answer is lost. Not for AcceptJobs.
    """

    code: grpc.StatusCode
    applied: bool


@dataclass(frozen=True)
class Call:
    """A call that the service got.

    Attributes:
        time: When (monotonic).
        method: `AcceptJobs`, `CompleteJob` or `RejectJob`.
        job_id: The job that it names, or nothing.
    """

    time: float
    method: str
    job_id: str


class Faults:
    """What to do to the next calls. Any thread may call it."""

    def __init__(self) -> None:
        self.calls: deque[Call] = deque(maxlen=_KEPT)
        self._lock = threading.Lock()
        self._faults: dict[str, tuple[Fault, float]] = {}

    def fail(self, method: str, code: grpc.StatusCode, times: float = 1, *, applied: bool = False) -> None:
        """Fail the next calls of a method.

        Args:
            method: `AcceptJobs`, `CompleteJob` or `RejectJob`.
            code: What they are answered with.
            times: How many; infinity until `clear`.
            applied: See `Fault`.
        """
        with self._lock:
            self._faults[method] = (Fault(code, applied), times)

    def clear(self) -> None:
        """Serve as usual again."""
        with self._lock:
            self._faults.clear()

    def take(self, method: str, job_id: str) -> Fault | None:
        """Note a call, and take the fault that is meant for it."""
        self.calls.append(Call(time.monotonic(), method, job_id))
        with self._lock:
            fault, left = self._faults.get(method, (None, 0.0))
            if fault is None or left < 1:
                return None
            self._faults[method] = (fault, left - 1)
            return fault
