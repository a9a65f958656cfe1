"""The jobs of Kelpie's API and its rules (PROTOCOLS.md 3) on SQLite: who gets which job, and what a failure costs.

Faithful where it hurts, too: nothing is fenced, so `completed` and `failed` are taken from anyone at any time; a job
that failed stays running, without a heartbeat, until that is old enough for another machine; and a job may be given to
two machines (`race`). Any thread may call it.
"""

from __future__ import annotations

import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

from heeler.local.kelpie_model import Status, Submission
from heeler.local.kelpie_rows import BANNED_IN_A_ROW, CANDIDATES, INSERT, SCHEMA, Job, new, shown

Jobs: TypeAlias = list[Job]
Listener: TypeAlias = Callable[[str, Job], None]
"""Told of each event of a job: `created`, `started`, `completed`, `failed` (each time) or `canceled`."""
_Rows: TypeAlias = list[sqlite3.Row]
_USERS = uuid.UUID("2a1c60a5-0c5e-5d1c-8d0a-7a7a0a0b3c11")


class NoJobError(LookupError):
    """There is no such job, or it is another user's."""


def user_of(organization: str) -> str:
    """The id of an organization's user."""
    return str(uuid.uuid5(_USERS, organization))


class KelpieTable:
    """All jobs.

    Attributes:
        listeners: Who is told of events, in their order; they may call the table.
        on_reallocate: Told of a machine, and its container group, that failed too many of the jobs to have another.
        shows_taken: `work` answers the job as it is once it is taken; else, by default, as it was before.
    """

    def __init__(
        self,
        path: Path | str = ":memory:",
        *,
        clock: Callable[[], float] = time.time,
        on_reallocate: Callable[[str, str], None] | None = None,
    ) -> None:
        """Args: the database, in memory by default; seconds since 1970, of which only whole ones count; see above."""
        self.listeners: list[Listener] = []
        self.on_reallocate = on_reallocate
        self.shows_taken = False
        self._clock = clock
        self._lock = threading.RLock()
        self._racing = 0
        self._read: dict[tuple[str, str], _Rows] = {}
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA synchronous = OFF")
        self._database.executescript(SCHEMA)

    def close(self) -> None:
        """Let go of the database."""
        with self._lock:
            self._database.close()

    @property
    def race(self) -> int:
        """How many of the next calls of `work` see the jobs as the first of them does.

        The API reads and writes in two steps, so several askers may read before any of them writes: as if all these
        calls had come at once.
        """
        with self._lock:
            return self._racing

    @race.setter
    def race(self, calls: int) -> None:
        with self._lock:
            self._racing = calls
            self._read.clear()

    # For those who submit.

    def create(self, user: str, submission: Submission) -> Job:
        """Put a job at the end."""
        return self.batch(user, [submission])[0]

    def batch(self, user: str, submissions: Sequence[Submission]) -> Jobs:
        """Put jobs at the end, all or none."""
        with self._lock:
            now = self._now()
            rows = [new(user, submission.fields(), now) for submission in submissions]
            with self._database:
                self._database.executemany(INSERT, rows)
            jobs = [self.get(user, row[0]) for row in rows]
            for job in jobs:
                self._tell("created", job)
            return jobs

    def get(self, user: str, job_id: str) -> Job:
        """A job.

        Raises:
            NoJobError: There is none, as in every method that takes an id.
        """
        return shown(self._row(user, job_id))

    def list(
        self,
        user: str,
        *,
        status: Status | None = None,
        container_group_id: str | None = None,
        page_size: int = 100,
        page: int = 1,
        asc: bool = False,
    ) -> Jobs:
        """A page of the jobs, by when they were created, the newest first unless `asc`."""
        order = "ASC" if asc else "DESC"
        query = f"""
        SELECT * FROM jobs WHERE user_id = :user AND status = ifnull(:status, status)
        AND container_group_id = ifnull(:container_group, container_group_id)
        ORDER BY created {order}, number {order} LIMIT :size OFFSET :skipped
        """  # noqa: S608 - of the two words above
        values = {
            "user": user,
            "status": status,
            "container_group": container_group_id,
            "size": page_size,
            "skipped": (page - 1) * page_size,
        }
        with self._lock:
            return [shown(row) for row in self._database.execute(query, values)]

    def cancel(self, user: str, job_id: str) -> None:
        """Cancel a job, unless it has ended."""
        with self._lock:
            if self._row(user, job_id)["status"] in ("pending", "running"):
                self._end(user, job_id, "canceled", "user")

    def purge(self, user: str, container_group_id: str) -> int:
        """Cancel the jobs of a container group that have not ended; how many."""
        query = """
        SELECT id FROM jobs WHERE user_id = ? AND container_group_id = ? AND status IN ('pending', 'running')
        ORDER BY number
        """
        with self._lock:
            found = self._database.execute(query, (user, container_group_id)).fetchall()
            for row in found:
                self._end(user, row["id"], "canceled", "user")
            return len(found)

    # For workers.

    def work(self, user: str, machine_id: str, container_group_id: str) -> Job | None:
        """Take a job: a running one that is silent, else a pending one; of each, the oldest."""
        with self._lock:
            found = self._candidates(user, container_group_id)
            allowed = next((row for row in found if not self._banned(machine_id, row["id"])), None)
            if allowed is not None:
                return self._take(user, allowed, machine_id)
        if len(found) >= BANNED_IN_A_ROW and self.on_reallocate is not None:
            self.on_reallocate(machine_id, container_group_id)
        return None

    def heartbeat(self, user: str, job_id: str, machine_id: str) -> str:
        """Note that a machine works on its job; what it is to know of the status."""
        with self._lock:
            row = self._row(user, job_id)
            if row["status"] != "running":
                return str(row["status"])
            if row["machine_id"] != machine_id:
                return "canceled"
            self._change(job_id, "heartbeat = ?, num_heartbeats = num_heartbeats + 1", self._now())
            return "running"

    def completed(self, user: str, job_id: str, machine_id: str) -> Job:
        """A machine, whichever, says that a job is done; the job."""
        with self._lock:
            self._row(user, job_id)
            return self._end(user, job_id, "completed", machine_id)

    def failed(self, user: str, job_id: str, machine_id: str) -> Job:
        """A machine, whichever, says that a job failed, and gets it never again; the job."""
        with self._lock:
            row = self._row(user, job_id)
            with self._database:
                self._database.execute("INSERT OR IGNORE INTO bans VALUES (?, ?)", (machine_id, job_id))
            self._change(job_id, "num_failures = num_failures + 1")
            if row["num_failures"] + 1 >= row["max_failures"]:
                return self._end(user, job_id, "failed", machine_id)
            job = self.get(user, job_id)
            self._tell("failed", job)
            return job

    # Inside.

    def _now(self) -> int:
        return int(self._clock())

    def _row(self, user: str, job_id: str) -> sqlite3.Row:
        query = "SELECT * FROM jobs WHERE id = ? AND user_id = ?"
        with self._lock:
            row: sqlite3.Row | None = self._database.execute(query, (job_id, user)).fetchone()
        if row is None:
            raise NoJobError(job_id)
        return row

    def _candidates(self, user: str, container_group_id: str) -> _Rows:
        """The first jobs to hand out; in a race, as they were when it began."""
        key = (user, container_group_id)
        rows = self._read.get(key)
        if rows is None:
            rows = self._database.execute(CANDIDATES, (*key, self._now())).fetchall()
        if self._racing:
            self._read[key] = rows
            self._racing -= 1
            if not self._racing:
                self._read.clear()
        return rows

    def _banned(self, machine_id: str, job_id: str) -> bool:
        query = "SELECT 1 FROM bans WHERE machine_id = ? AND job_id = ?"
        return self._database.execute(query, (machine_id, job_id)).fetchone() is not None

    def _take(self, user: str, row: sqlite3.Row, machine_id: str) -> Job:
        now = self._now()
        self._change(row["id"], "status = 'running', started = ?, heartbeat = ?, machine_id = ?", now, now, machine_id)
        taken = self.get(user, row["id"])
        self._tell("started", taken)
        return taken if self.shows_taken else shown(row)

    def _end(self, user: str, job_id: str, status: Status, machine_id: str) -> Job:
        now = self._now()
        self._change(job_id, f"status = ?, {status} = ?, heartbeat = ?, machine_id = ?", status, now, now, machine_id)
        job = self.get(user, job_id)
        self._tell(status, job)
        return job

    def _change(self, job_id: str, changes: str, *values: object) -> None:
        with self._database:
            self._database.execute(f"UPDATE jobs SET {changes} WHERE id = ?", (*values, job_id))  # noqa: S608 - ours

    def _tell(self, event: str, job: Job) -> None:
        for listener in self.listeners:
            listener(event, job)
