"""The journal of packs that a commit under way has uploaded: after our own restart they need not be sent again.

An entry counts only for the very acquire that it was written under: once another came, a sweep may
have removed the packs. So it is cleared after each confirmed swap, before anything is collected.
Blocking calls; any thread may call.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from heeler_sync.snapshot.chunks import Codec
from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.known import Adoptable
from heeler_sync.snapshot.manifest import Place
from heeler_sync.snapshot.packs import Pack


class Uploads(Protocol):
    """Keeps what commits under way have uploaded, by prefix."""

    def note(self, location: str, head: Head, pack: Pack) -> None:
        """A pack is in storage, uploaded while `head` was ours."""
        ...

    def clear(self, location: str) -> bool:
        """No pack of a prefix is to be adopted any more; whether that is certain."""
        ...

    def load(self, location: str, head: Head) -> Mapping[str, Adoptable]:
        """The packs that were uploaded while `head` was ours."""
        ...


class NoUploads:
    """For callers that have no place for a journal: nothing is ever adopted."""

    def note(self, location: str, head: Head, pack: Pack) -> None:
        """As `Uploads.note`."""

    def clear(self, location: str) -> bool:
        """As `Uploads.clear`."""
        del location
        return True

    def load(self, location: str, head: Head) -> Mapping[str, Adoptable]:
        """As `Uploads.load`."""
        del location, head
        return {}


_SCHEMA = """
CREATE TABLE IF NOT EXISTS uploads (
    boot TEXT NOT NULL, location TEXT NOT NULL, holder TEXT NOT NULL, epoch INTEGER NOT NULL, acquired REAL NOT NULL,
    pack TEXT PRIMARY KEY, size INTEGER NOT NULL, places TEXT NOT NULL
);
"""


class SqliteUploads:
    """The journal in one SQLite file. Whoever opens it holds the folder that it is in against others."""

    def __init__(self, file: Path, boot: str, on_fault: Callable[[str], None]) -> None:
        """Args.

        file: The database, which is made.
        boot: An id of this boot of the machine; after a power cut, what was cleared could be there again.
        on_fault: Told, from any thread, of what can't be read or kept.

        Raises:
            sqlite3.Error: The file can't be used.
        """
        self._boot = boot
        self._on_fault = on_fault
        self._guard = threading.Lock()
        self._open = sqlite3.connect(file, isolation_level=None, check_same_thread=False)
        try:
            self._open.execute("PRAGMA journal_mode = WAL")
            self._open.execute("PRAGMA synchronous = NORMAL")
            self._open.executescript(_SCHEMA)
            self._open.execute("DELETE FROM uploads WHERE boot != ?", (boot,))
        except sqlite3.Error:
            self._open.close()
            raise

    def note(self, location: str, head: Head, pack: Pack) -> None:
        """As `Uploads.note`; what can't be noted is sent again."""
        places = [
            [digest.hex(), place.offset, place.stored, place.size, int(place.codec)]
            for digest, place in pack.places.items()
        ]
        row = (self._boot, location, head.holder, head.epoch, head.acquired, pack.id, pack.size, json.dumps(places))
        try:
            with self._guard:
                self._open.execute("INSERT OR REPLACE INTO uploads VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            self._on_fault(f"the journal of uploads can't be written ({error})")

    def clear(self, location: str) -> bool:
        """As `Uploads.clear`."""
        try:
            with self._guard:
                self._open.execute("DELETE FROM uploads WHERE location = ?", (location,))
        except sqlite3.Error as error:
            self._on_fault(f"the journal of uploads can't be written ({error})")
            return False
        return True

    def load(self, location: str, head: Head) -> Mapping[str, Adoptable]:
        """As `Uploads.load`; what can't be read is sent again."""
        wanted = (location, head.holder, head.epoch, head.acquired)
        try:
            with self._guard:
                rows = self._open.execute(
                    "SELECT pack, size, places FROM uploads"
                    " WHERE location = ? AND holder = ? AND epoch = ? AND acquired = ?",
                    wanted,
                ).fetchall()
        except sqlite3.Error as error:
            self._on_fault(f"the journal of uploads can't be read ({error})")
            return {}
        return {pack: Adoptable(_places(pack, places), size) for pack, size, places in rows}

    def close(self) -> None:
        """Let go of the file."""
        with self._guard:
            self._open.close()


def _places(pack: str, places: str) -> dict[bytes, Place]:
    return {
        bytes.fromhex(digest): Place(pack, offset, stored, size, Codec(codec))
        for digest, offset, stored, size, codec in json.loads(places)
    }
