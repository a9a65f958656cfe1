"""What has to outlive this process on this machine: one SQLite file in the state folder, one process at a time.

It holds the processes that we started, which a new runtime ends before it takes a job; who we are in queues, so that a
new runtime need not wait for the lease of the old one; and beside it lies the file index, so that it need not download
what it has. Blocking calls only; any thread may call.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from heeler.app.process import RegisterError, Started
from heeler.app.processes import UndyingError, in_session, kill_all, signal_process, start_time
from heeler.errors import UsageError
from heeler_sync.snapshot.index import FileIndex, MemoryIndex, SqliteIndex
from heeler_sync.snapshot.uploads import NoUploads, SqliteUploads, Uploads

_SCHEMA = """
CREATE TABLE IF NOT EXISTS processes (
    tag TEXT PRIMARY KEY,
    process_group INTEGER NOT NULL,
    start_time INTEGER NOT NULL,
    boot TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS workers (worker TEXT NOT NULL);
"""


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _nobody(_event: str, **_fields: object) -> None:
    return


class Journal:
    """The open journal of one state folder. It is a `ProcessRegister`.

    Attributes:
        on_fault: Told an event's name and fields, from any thread. What can't be written must not end a runtime: a
            record too many is harmless, since nothing carries its tag any more.
    """

    def __init__(self, folder: Path) -> None:
        """Open and lock it.

        Raises:
            UsageError: The folder can't be written, or another runtime uses it.
        """
        self._folder = folder
        self.on_fault: Callable[..., None] = _nobody
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
        self._boot = _boot()
        try:
            self._open = sqlite3.connect(folder / "journal.db", isolation_level=None, check_same_thread=False)
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.executescript(_SCHEMA)
        except sqlite3.Error as error:
            os.close(self._lock_file)
            raise UsageError(
                f"the journal in {folder} can't be opened ({error}); free space or delete journal.db"
            ) from None

    @property
    def former(self) -> str | None:
        """Who was here before us: dead, since only one process has the folder."""
        try:
            rows = self._execute("SELECT worker FROM workers")
        except sqlite3.Error as error:
            self._fault(error)
            return None
        return rows[0][0] if rows else None

    def note_worker(self, worker: str) -> None:
        """Note who we are."""
        try:
            self._execute("DELETE FROM workers")
            self._execute("INSERT INTO workers VALUES (?)", (worker,))
        except sqlite3.Error as error:
            self._fault(error)

    def file_index(self) -> FileIndex:
        """What was read of files; one that does not outlive us if the folder's can't be used."""
        try:
            return SqliteIndex(self._folder / "index.db", self._boot, self._index_fault)
        except sqlite3.Error as error:
            self._index_fault(f"the file index can't be opened ({error})")
            return MemoryIndex()

    def uploads(self) -> Uploads:
        """What commits under way have uploaded; nothing is kept if the folder's file can't be used."""
        try:
            return SqliteUploads(self._folder / "uploads.db", self._boot, self._index_fault)
        except sqlite3.Error as error:
            self._index_fault(f"the journal of uploads can't be opened ({error})")
            return NoUploads()

    def _index_fault(self, words: str) -> None:
        self.on_fault("journal_failed", error=words)

    def started(self, process: Started) -> None:
        """As `ProcessRegister.started`."""
        try:
            self._execute(
                "INSERT INTO processes VALUES (?, ?, ?, ?)",
                (process.tag, process.group, process.start_time, self._boot),
            )
        except sqlite3.Error as error:
            raise RegisterError(self._fault(error)) from None

    def ended(self, process: Started) -> None:
        """As `ProcessRegister.ended`."""
        self._forget(process.tag)

    def stuck(self, process: Started, pids: Sequence[int]) -> None:
        """As `ProcessRegister.stuck`."""
        self.on_fault("process_does_not_die", group=process.group, pids=[*pids])

    def end_leftovers(self) -> int:
        """Kill what an earlier runtime of this folder left running; how many processes that were."""
        killed = 0
        try:
            rows = self._execute("SELECT tag, process_group, start_time, boot FROM processes")
        except sqlite3.Error as error:
            self._fault(error)
            return 0
        for tag, group, started_at, boot in rows:
            if boot == self._boot:
                # The pid may belong to somebody else by now; the tag does not. As long as its group or session has
                # members, no other process gets it.
                now = start_time(group)
                same = now == started_at
                try:
                    # At least its first process, which may be gone with its group before it is looked for.
                    killed += max(int(same), _end(tag, group if same or now is None else None))
                except UndyingError as error:
                    self.on_fault("process_does_not_die", group=group, pids=error.pids)
                    continue
            self._forget(tag)
        return killed

    def close(self) -> None:
        """Let go of the folder."""
        with self._guard:
            self._open.close()
        os.close(self._lock_file)

    def _forget(self, tag: str) -> None:
        try:
            self._execute("DELETE FROM processes WHERE tag = ?", (tag,))
        except sqlite3.Error as error:
            self._fault(error)

    def _fault(self, error: sqlite3.Error) -> str:
        words = f"the state folder {self._folder} can't be written ({error})"
        self.on_fault("journal_failed", error=words)
        return words

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> list[Any]:
        with self._guard:
            return self._open.execute(statement, values).fetchall()


def _end(tag: str, group: int | None) -> int:
    """Kill what carries the tag, and what is in the session, which some leave neither with group nor environment."""
    members = in_session(group) if group is not None else []
    for pid in members:
        signal_process(pid, signal.SIGKILL)
    return max(len(members), kill_all(tag, group))
