"""The local queue's table: SQLite in a folder, shared by processes of one machine. Blocking calls only.

Every change is one `BEGIN IMMEDIATE` transaction with `synchronous=FULL`: after a SIGKILL or a power loss it is
there whole or not at all. A lease is a random token in the row; whoever presents another one holds nothing.
Clock: wall time in seconds, the same for all processes of the machine.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heeler.job import Job, Result
from heeler.sources.base import BARREN_LIMIT, JobRecord, LeaseLostError, LeaseState, SourceUnavailableError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    body BLOB NOT NULL,
    lease_seconds REAL NOT NULL,
    max_failures INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'pending',
    visible_at REAL NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    barren INTEGER NOT NULL DEFAULT 0,
    failures INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    token TEXT,
    worker TEXT NOT NULL DEFAULT '',
    expires REAL,
    reason TEXT NOT NULL DEFAULT '',
    result TEXT,
    created REAL NOT NULL,
    finished REAL
);
CREATE INDEX IF NOT EXISTS jobs_open ON jobs (state, visible_at);
"""
_VERSION = 1
_LOCKED_SECONDS = 0.01
_BUSY_SECONDS = 5.0
_RECORD = ("id", "state", "attempts", "failures", "interruptions", "reason", "worker", "created", "finished", "result")


@dataclass(frozen=True)
class Taken:
    """A row that was leased to us."""

    job: Job
    token: str
    attempt: int
    lease_seconds: float


@dataclass(frozen=True)
class NewJob:
    """A row to be."""

    id: str
    body: bytes
    lease_seconds: float
    max_failures: int


class JobTable:
    """The queue in `folder/queue.db`, over one connection that any thread may use in its turn.

    Every method raises `SourceUnavailableError` when SQLite can't do it now (locked for long, disk full).
    """

    def __init__(
        self, folder: Path, clock: Callable[[], float] = time.time, busy_seconds: float = _BUSY_SECONDS
    ) -> None:
        """Args: the folder, wall time in seconds, and how long a call waits while another process holds the lock."""
        self._path = folder / "queue.db"
        self._log = folder / "queue.db-wal"
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._open = self._connect()
        except (sqlite3.Error, OSError) as error:
            raise SourceUnavailableError(f"queue {self._path} can't be opened: {error}") from None
        with self._connection() as connection:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _VERSION):
                raise SourceUnavailableError(f"queue {self._path} is of version {version}; we know {_VERSION}")
            connection.executescript(_SCHEMA)
            connection.execute(f"PRAGMA user_version = {_VERSION}")

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self._path, timeout=self._busy_seconds, isolation_level=None, check_same_thread=False
        )
        self._use_log(connection)
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _use_log(self, connection: sqlite3.Connection) -> None:
        """Switch a new file to a write-ahead log. SQLite does not wait for others that open it at this moment."""
        give_up = time.monotonic() + self._busy_seconds
        while True:
            try:
                connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() >= give_up:
                    connection.close()
                    raise
                time.sleep(_LOCKED_SECONDS)
            else:
                return

    def stamp(self) -> object:
        """Differs whenever another process has changed the queue since; does not block."""
        try:
            status = self._log.stat()
        except OSError:
            return None
        return status.st_mtime_ns, status.st_size

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            self._open.close()

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._open
            except sqlite3.Error as error:
                raise SourceUnavailableError(f"queue {self._path}: {error}") from None

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        with self._connection() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                self._roll_back(connection)
                raise

    def _roll_back(self, connection: sqlite3.Connection) -> None:
        """Leave the transaction; where even that fails, the connection with it."""
        try:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        except sqlite3.Error:
            connection.close()
            self._open = self._connect()

    def add(self, jobs: list[NewJob]) -> str | None:
        """Add all jobs or, if an id is taken, none; the taken id."""
        now = self._clock()
        with self._change() as connection:
            for job in jobs:
                if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (job.id,)).fetchone():
                    return job.id
            for job in jobs:
                connection.execute(
                    "INSERT INTO jobs (id, body, lease_seconds, max_failures, visible_at, created)"
                    " VALUES (?, ?, ?, ?, ?, ?)",
                    (job.id, job.body, job.lease_seconds, job.max_failures, now, now),
                )
        return None

    def take(self, worker: str) -> Taken | None:
        """Lease the next job: first those whose lease lapsed, then those that wait, each oldest first."""
        if not self._any_due():
            return None
        now = self._clock()
        with self._change() as connection:
            while True:
                row = connection.execute(
                    "SELECT seq, id, body, attempts, barren, lease_seconds, state FROM jobs"
                    " WHERE (state = 'running' AND expires <= ?) OR (state = 'pending' AND visible_at <= ?)"
                    " ORDER BY state = 'running' DESC, seq LIMIT 1",
                    (now, now),
                ).fetchone()
                if row is None:
                    return None
                seq, job_id, body, attempts, barren, lease_seconds, state = row
                lapsed = int(state == "running")
                if barren >= BARREN_LIMIT:
                    self._give_up(connection, seq, lapsed)
                    continue
                token = secrets.token_hex(16)
                connection.execute(
                    "UPDATE jobs SET state = 'running', token = ?, worker = ?, expires = ?, attempts = attempts + 1,"
                    " barren = barren + 1, interruptions = interruptions + ? WHERE seq = ?",
                    (token, worker, now + lease_seconds, lapsed, seq),
                )
                return Taken(Job(job_id, bytes(body)), token, attempts + 1, lease_seconds)

    def reclaim(self, worker: str) -> None:
        """What a worker that is dead still holds goes back at once, as if its lease had lapsed."""
        with self._change() as connection:
            connection.execute(
                "UPDATE jobs SET expires = ? WHERE state = 'running' AND worker = ? AND expires > ?",
                (self._clock(), worker, self._clock()),
            )

    def _any_due(self) -> bool:
        """Look without the write lock, so that idle workers don't stand in the way of the busy ones."""
        now = self._clock()
        with self._connection() as connection:
            row = connection.execute(
                "SELECT 1 FROM jobs WHERE (state = 'running' AND expires <= ?)"
                " OR (state = 'pending' AND visible_at <= ?) LIMIT 1",
                (now, now),
            ).fetchone()
        return row is not None

    def _give_up(self, connection: sqlite3.Connection, seq: int, lapsed: int) -> None:
        connection.execute(
            "UPDATE jobs SET state = 'failed', token = NULL, finished = ?, interruptions = interruptions + ?,"
            " reason = ? || CASE WHEN reason = '' THEN '' ELSE '; the last: ' || reason END WHERE seq = ?",
            (
                self._clock(),
                lapsed,
                f"{BARREN_LIMIT} attempts in a row ended without an answer and without anything made durable",
                seq,
            ),
        )

    def extend(self, job_id: str, token: str, *, progressed: bool) -> LeaseState:
        """Keep a lease; one that lapsed without being given to another is ours again."""
        with self._change() as connection:
            row = connection.execute("SELECT state, token, lease_seconds FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None or row[1] != token:
                return LeaseState.LOST
            if row[0] != "running":
                return LeaseState.CANCELLED if row[0] == "cancelled" else LeaseState.LOST
            connection.execute(
                "UPDATE jobs SET expires = ?, barren = CASE WHEN ? THEN 0 ELSE barren END WHERE id = ?",
                (self._clock() + row[2], progressed, job_id),
            )
        return LeaseState.HELD

    def complete(self, job_id: str, token: str, result: Result) -> None:
        """The job is done. Raises `LeaseLostError` unless the lease is ours."""
        self._settle(
            job_id,
            token,
            "state = 'done', finished = ?, reason = '', result = ?",
            (self._clock(), json.dumps(result.as_json())),
        )

    def retry(self, job_id: str, token: str, reason: str, result: Result, delay: float) -> None:
        """The attempt failed. Raises `LeaseLostError` unless the lease is ours."""
        now = self._clock()
        self._settle(
            job_id,
            token,
            "failures = failures + 1, barren = 0, reason = ?, result = ?, visible_at = ?,"
            " state = CASE WHEN failures + 1 >= max_failures THEN 'failed' ELSE 'pending' END,"
            " finished = CASE WHEN failures + 1 >= max_failures THEN ? ELSE NULL END",
            (reason, json.dumps(result.as_json()), now + delay, now),
        )

    def fail(self, job_id: str, token: str, reason: str, result: Result) -> None:
        """The job can never succeed. Raises `LeaseLostError` unless the lease is ours."""
        self._settle(
            job_id,
            token,
            "state = 'failed', failures = failures + 1, finished = ?, reason = ?, result = ?",
            (self._clock(), reason, json.dumps(result.as_json())),
        )

    def release(self, job_id: str, token: str, reason: str, delay: float, *, fruitless: bool) -> None:
        """The attempt was interrupted. Raises `LeaseLostError` unless the lease is ours."""
        self._settle(
            job_id,
            token,
            "state = 'pending', interruptions = interruptions + 1, reason = ?, visible_at = ?,"
            " barren = CASE WHEN ? THEN barren ELSE 0 END",
            (reason, self._clock() + delay, fruitless),
        )

    def _settle(self, job_id: str, token: str, assignments: str, values: tuple[object, ...]) -> None:
        """Change a row that we hold and end the lease; a repeated call finds that it was heard."""
        with self._change() as connection:
            row = connection.execute("SELECT state, token FROM jobs WHERE id = ?", (job_id,)).fetchone()
            if row is None or row[1] not in (token, f"settled {token}") or row[0] == "cancelled":
                raise LeaseLostError(f"job {job_id} is no longer ours")
            if row[1] == token:
                connection.execute(
                    f"UPDATE jobs SET {assignments}, token = ?, expires = NULL WHERE id = ?",  # noqa: S608 - ours
                    (*values, f"settled {token}", job_id),
                )

    def cancel(self, job_id: str) -> bool:
        """Cancel a job that has not ended; its holder learns of it with the next extension."""
        with self._change() as connection:
            done = connection.execute(
                "UPDATE jobs SET state = 'cancelled', finished = ?, reason = 'cancelled'"
                " WHERE id = ? AND state IN ('pending', 'running')",
                (self._clock(), job_id),
            )
            return done.rowcount == 1

    def records(self, job_id: str | None = None) -> list[JobRecord]:
        """All jobs or one, oldest first."""
        where, values = ("", ()) if job_id is None else (" WHERE id = ?", (job_id,))
        with self._connection() as connection:
            rows = connection.execute(f"SELECT {', '.join(_RECORD)} FROM jobs{where} ORDER BY seq", values)  # noqa: S608
            return [_record(row) for row in rows]


def _record(row: tuple[Any, ...]) -> JobRecord:
    columns: dict[str, Any] = dict(zip(_RECORD, row, strict=True))
    columns["result"] = json.loads(columns["result"]) if columns["result"] else None
    return JobRecord(**columns)
