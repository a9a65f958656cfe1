"""The file index: what was read of each file last, so that only what changed is read again. It outlives the process.

An entry is a stamp and the digests of the file's chunks; a file with the same stamp has the same content. After a
reboot no entry is believed, since a power cut can leave a file with its size and times, and without its bytes.
Blocking calls; any thread may call.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from heeler_sync.snapshot.chunks import CHUNK_BYTES, DIGEST_BYTES
from heeler_sync.tree import Stamp


@dataclass(frozen=True)
class Indexed:
    """What was read of a file: its chunks' digests in order, and its stamp then."""

    stamp: Stamp
    chunks: tuple[bytes, ...]


class FileIndex(Protocol):
    """Keeps the entries of folders, by the folder's path."""

    def load(self, root: Path) -> dict[str, Indexed]:
        """All entries of a folder, by relative path."""
        ...

    def update(self, root: Path, changed: Mapping[str, Indexed], gone: Iterable[str]) -> None:
        """Add or replace some, remove others. What can't be kept is only read again."""
        ...


class MemoryIndex:
    """An index that does not outlive the process."""

    def __init__(self) -> None:
        self._entries: dict[Path, dict[str, Indexed]] = {}

    def load(self, root: Path) -> dict[str, Indexed]:
        """As `FileIndex.load`."""
        return dict(self._entries.get(root, {}))

    def update(self, root: Path, changed: Mapping[str, Indexed], gone: Iterable[str]) -> None:
        """As `FileIndex.update`."""
        entries = self._entries.setdefault(root, {})
        entries.update(changed)
        for path in gone:
            entries.pop(path, None)


_SCHEMA = """
CREATE TABLE IF NOT EXISTS boots (boot TEXT PRIMARY KEY);
CREATE TABLE IF NOT EXISTS files (
    root TEXT NOT NULL, path TEXT NOT NULL,
    size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, ctime_ns INTEGER NOT NULL, inode INTEGER NOT NULL,
    chunks BLOB NOT NULL,
    PRIMARY KEY (root, path)
) WITHOUT ROWID;
"""


class SqliteIndex:
    """An index in one SQLite file. Whoever opens it holds the folder that it is in against others."""

    def __init__(self, file: Path, boot: str, on_fault: Callable[[str], None]) -> None:
        """Args.

        file: The database, which is made.
        boot: An id of this boot of the machine.
        on_fault: Told, from any thread, why something could not be read or kept: files are only read once more then.

        Raises:
            sqlite3.Error: The file can't be used.
        """
        self._on_fault = on_fault
        self._guard = threading.Lock()
        self._open = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.execute("PRAGMA synchronous = NORMAL")
            self._open.executescript(_SCHEMA)
            boot = f"{boot} {CHUNK_BYTES}"
            if self._open.execute("SELECT boot FROM boots").fetchall() != [(boot,)]:
                self._open.executescript("BEGIN; DELETE FROM files; DELETE FROM boots;")
                self._open.execute("INSERT INTO boots VALUES (?)", (boot,))
                self._open.execute("COMMIT")
        except sqlite3.Error:
            self._open.close()
            raise

    def load(self, root: Path) -> dict[str, Indexed]:
        """As `FileIndex.load`."""
        try:
            with self._guard:
                rows = self._open.execute(
                    "SELECT path, size, mtime_ns, ctime_ns, inode, chunks FROM files WHERE root = ?", (_key(root),)
                ).fetchall()
        except sqlite3.Error as error:
            self._on_fault(f"the file index can't be read ({error})")
            return {}
        return {
            _path(path): Indexed(Stamp(size, mtime_ns, ctime_ns, _unsigned(inode)), _split(chunks))
            for path, size, mtime_ns, ctime_ns, inode, chunks in rows
        }

    def update(self, root: Path, changed: Mapping[str, Indexed], gone: Iterable[str]) -> None:
        """As `FileIndex.update`."""
        name = _key(root)
        rows = [
            (name, _key(path), stamp.size, stamp.mtime_ns, stamp.ctime_ns, _signed(stamp.inode), b"".join(entry.chunks))
            for path, entry in changed.items()
            for stamp in (entry.stamp,)
        ]
        try:
            with self._guard, self._open:
                self._open.execute("BEGIN")
                self._open.executemany("DELETE FROM files WHERE root = ? AND path = ?", ((name, _key(p)) for p in gone))
                self._open.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        except sqlite3.Error as error:
            self._on_fault(f"the file index can't be written ({error})")

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._open.close()


def _key(path: Path | str) -> str:
    """A path as SQLite takes it: names need not be UTF-8."""
    return str(path).encode("utf-8", "surrogateescape").decode("latin-1")


def _path(key: str) -> str:
    return key.encode("latin-1").decode("utf-8", "surrogateescape")


def _signed(number: int) -> int:
    """SQLite's integers are signed; inode numbers are not."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _unsigned(number: int) -> int:
    return number + (1 << 64) if number < 0 else number


def _split(chunks: bytes) -> tuple[bytes, ...]:
    return tuple(chunks[at : at + DIGEST_BYTES] for at in range(0, len(chunks), DIGEST_BYTES))
