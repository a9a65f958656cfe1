"""What has to outlive this process on this machine: one SQLite file in the state folder, one process at a time.

Today it holds the processes that we started; a new runtime ends what an old one left, before it takes a job.
Blocking calls only; any thread may call.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from pathlib import Path

from heeler.app.process import Started
from heeler.app.processes import kill_all, start_time
from heeler.errors import UsageError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS processes (
    tag TEXT PRIMARY KEY,
    process_group INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    boot TEXT NOT NULL
);
"""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


class Journal:
    """The open journal of one state folder. It is a `ProcessRegister`."""

    def __init__(self, folder: Path) -> None:
        """Open and lock it.

        Raises:
            UsageError: The folder can't be written, or another runtime uses it.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock_file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UsageError(
                f"state folder {folder} can't be written ({error.strerror}): set HEELER_STATE_DIR to one that can"
            ) from None
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock_file)
            raise UsageError(
                f"another heeler uses the state folder {folder}: give each its own with HEELER_STATE_DIR"
            ) from None
        self._guard = threading.Lock()
        try:
            self._open = sqlite3.connect(folder / "journal.db", isolation_level=None, check_same_thread=False)
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.executescript(_SCHEMA)
        except sqlite3.Error as error:
            os.close(self._lock_file)
            raise UsageError(f"the journal in {folder} can't be opened ({error}); delete journal.db there") from None

    def started(self, process: Started) -> None:
        """As `ProcessRegister.started`."""
        self._execute(
            "INSERT INTO processes VALUES (?, ?, ?, ?)",
            (process.tag, process.group, process.start_time, _boot()),
        )

    def ended(self, process: Started) -> None:
        """As `ProcessRegister.ended`."""
        self._execute("DELETE FROM processes WHERE tag = ?", (process.tag,))

    def end_leftovers(self) -> int:
        """Kill what an earlier runtime of this folder left running; how many processes that were."""
        killed = 0
        with self._guard:
            rows = self._open.execute("SELECT tag, process_group, start_time, boot FROM processes").fetchall()
        for tag, group, started_at, boot in rows:
            if boot == _boot():
                # The pid may belong to somebody else by now; the tag does not.
                same = start_time(group) == started_at
                killed += kill_all(tag, group if same else None)
            self._execute("DELETE FROM processes WHERE tag = ?", (tag,))
        return killed

    def close(self) -> None:
        """Let go of the folder."""
        with self._guard:
            self._open.close()
        os.close(self._lock_file)

    def _execute(self, statement: str, values: tuple[object, ...]) -> None:
        with self._guard:
            self._open.execute(statement, values)
