"""Counts and the log of requests. Thread-safe; a test can wait for what it wants to see."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

LOG_LENGTH = 200_000
"""Requests that the log keeps."""


@dataclass(slots=True)
class Record:
    """One request. It is logged right before its answer goes out."""

    operation: str
    method: str
    bucket: str
    key: str
    part_number: int | None
    status: int
    """0: nothing was answered."""
    code: str
    """The S3 code of an error, else empty."""
    bytes_in: int
    """Body bytes that came, as they were on the wire."""
    bytes_out: int
    """Body bytes handed to the socket."""
    started: float
    """Seconds on the monotonic clock."""
    seconds: float
    """From the last header until the answer."""
    query: str = ""
    headers: dict[str, str] | None = None


@dataclass(frozen=True, slots=True)
class StatsSnapshot:
    """The counts at one moment."""

    calls: dict[str, int]
    """Requests by operation."""
    statuses: dict[int, int]
    """Requests by status; 0 for those without an answer."""
    bytes_in: int
    bytes_out: int
    connections: int
    """Connections accepted."""
    log: tuple[Record, ...]

    def find(self, operation: str | None = None, key: str | None = None) -> list[Record]:
        """The logged requests of an operation, of a key, or of both."""
        return [record for record in self.log if operation in (None, record.operation) and key in (None, record.key)]

    def as_json(self, *, log: bool) -> dict[str, Any]:
        """The snapshot for `GET /_control/stats`."""
        fields = asdict(self)
        if not log:
            fields["log"] = []
        return fields

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StatsSnapshot:
        """What `as_json` gave."""
        return cls(
            calls=fields["calls"],
            statuses={int(status): count for status, count in fields["statuses"].items()},
            bytes_in=fields["bytes_in"],
            bytes_out=fields["bytes_out"],
            connections=fields["connections"],
            log=tuple(Record(**record) for record in fields["log"]),
        )


class Stats:
    """Counts everything that the server answers."""

    def __init__(self) -> None:
        """Start at nothing."""
        self._changed = threading.Condition()
        self._waiting = 0
        self._log: deque[Record] = deque(maxlen=LOG_LENGTH)
        self._calls: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._bytes_in = 0
        self._bytes_out = 0
        self._connections = 0

    def connected(self) -> None:
        """Count a connection."""
        with self._changed:
            self._connections += 1

    def add(self, record: Record) -> Record:
        """Count and log a request."""
        with self._changed:
            self._log.append(record)
            self._calls[record.operation] += 1
            self._statuses[record.status] += 1
            self._bytes_in += record.bytes_in
            self._bytes_out += record.bytes_out
            if self._waiting:
                self._changed.notify_all()
        return record

    def sent(self, record: Record, count: int) -> None:
        """Count body bytes of an answer that goes out piece by piece."""
        with self._changed:
            record.bytes_out += count
            self._bytes_out += count
            if self._waiting:
                self._changed.notify_all()

    def reset(self) -> None:
        """Forget all counts and the log."""
        with self._changed:
            self._log.clear()
            self._calls.clear()
            self._statuses.clear()
            self._bytes_in = self._bytes_out = self._connections = 0

    def snapshot(self) -> StatsSnapshot:
        """All of it at this moment."""
        with self._changed:
            return StatsSnapshot(
                calls=dict(self._calls),
                statuses=dict(self._statuses),
                bytes_in=self._bytes_in,
                bytes_out=self._bytes_out,
                connections=self._connections,
                log=tuple(self._log),
            )

    def wait_until(self, condition: Callable[[StatsSnapshot], bool], timeout: float = 10.0) -> StatsSnapshot:
        """Block until a condition holds, at most `timeout` seconds.

        Raises:
            TimeoutError: it did not hold in time.
        """
        with self._changed:
            self._waiting += 1
            try:
                if not self._changed.wait_for(lambda: condition(self.snapshot()), timeout):
                    raise TimeoutError(f"not within {timeout} s; counted: {self.snapshot().calls}")
                return self.snapshot()
            finally:
                self._waiting -= 1

    @property
    def calls(self) -> dict[str, int]:
        """Requests by operation."""
        return self.snapshot().calls

    @property
    def bytes_in(self) -> int:
        """Body bytes received."""
        return self._bytes_in

    @property
    def bytes_out(self) -> int:
        """Body bytes sent."""
        return self._bytes_out

    @property
    def log(self) -> tuple[Record, ...]:
        """Every request since the last reset."""
        return self.snapshot().log

    def find(self, operation: str | None = None, key: str | None = None) -> list[Record]:
        """The logged requests of an operation, of a key, or of both."""
        return self.snapshot().find(operation, key)
