"""Rows of the local Kelpie API's jobs: their columns, and how a row is shown."""

from __future__ import annotations

import json
import sqlite3
import uuid
from datetime import datetime, timezone
from typing import Any, TypeAlias

Job: TypeAlias = dict[str, Any]
"""A job as the API shows it."""
BANNED_IN_A_ROW = 5
"""A machine that may have none of so many jobs is moved."""
STALE_INTERVALS = 2
"""A running job is handed out again when its heartbeat is so many intervals old."""
_TIMES = ("started", "completed", "canceled", "failed", "heartbeat")
SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    user_id TEXT NOT NULL,
    container_group_id TEXT NOT NULL,
    max_failures INTEGER NOT NULL,
    heartbeat_interval INTEGER NOT NULL,
    submission TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'pending',
    created INTEGER NOT NULL,
    started INTEGER,
    completed INTEGER,
    canceled INTEGER,
    failed INTEGER,
    heartbeat INTEGER,
    num_failures INTEGER NOT NULL DEFAULT 0,
    num_heartbeats INTEGER NOT NULL DEFAULT 0,
    machine_id TEXT
);
CREATE INDEX IF NOT EXISTS open_jobs ON jobs (user_id, container_group_id, status, created);
CREATE TABLE IF NOT EXISTS bans (machine_id TEXT NOT NULL, job_id TEXT NOT NULL, PRIMARY KEY (machine_id, job_id));
"""
CANDIDATES = f"""
SELECT * FROM jobs WHERE user_id = ? AND container_group_id = ? AND (
    status = 'pending'
    OR status = 'running' AND ifnull(heartbeat, created) <= ? - {STALE_INTERVALS} * heartbeat_interval
) ORDER BY status = 'pending', created, number LIMIT {BANNED_IN_A_ROW}
"""  # noqa: S608 - of numbers alone
INSERT = """
INSERT INTO jobs (id, user_id, container_group_id, max_failures, heartbeat_interval, submission, created)
VALUES (?, ?, ?, ?, ?, ?, ?)
"""


def new(user: str, fields: dict[str, Any], now: int) -> tuple[str, str, str, int, int, str, int]:
    """The values of `INSERT`."""
    group, failures, interval = (fields[name] for name in ("container_group_id", "max_failures", "heartbeat_interval"))
    return str(uuid.uuid4()), user, group, failures, interval, json.dumps(fields), now


def shown(row: sqlite3.Row) -> Job:
    """A job as the API shows it: its creation as JavaScript writes a time, other times as SQLite does."""
    return {
        "id": row["id"],
        "user_id": row["user_id"],
        "status": row["status"],
        "created": _time(row["created"], "%Y-%m-%dT%H:%M:%S.000Z"),
        **{name: None if row[name] is None else _time(row[name], "%Y-%m-%d %H:%M:%S") for name in _TIMES},
        "num_failures": row["num_failures"],
        "num_heartbeats": row["num_heartbeats"],
        "machine_id": row["machine_id"],
        **json.loads(row["submission"]),
    }


def _time(seconds: int, form: str) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime(form)
