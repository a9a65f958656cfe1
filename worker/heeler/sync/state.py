"""What `heeler sync` keeps on this machine: what it read of files, and packs that wait for the uplink."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from heeler.settings import Settings
from heeler_sync.snapshot.index import FileIndex, MemoryIndex, SqliteIndex
from heeler_sync.snapshot.uploads import NoUploads, SqliteUploads, Uploads

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_INDEX = "sync-index.db"
_UPLOADS = "sync-uploads.db"
_SPOOL = "sync-spool"
_ROOM = 2
"""Packs wait on disk only where so many times their size is free."""


def boot_id() -> str:
    """An id of this boot of the machine; empty if it is unknown."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return ""


@contextmanager
def open_index(settings: Settings, warn: Callable[[str], None]) -> Iterator[FileIndex]:
    """The index of this machine; where it can't be used, one that forgets, and that is said."""
    try:
        settings.state_path.mkdir(parents=True, exist_ok=True)
        index = SqliteIndex(settings.state_path / _INDEX, boot_id() or secrets.token_hex(16), warn)
    except (OSError, sqlite3.Error) as error:
        detail = getattr(error, "strerror", None) or error
        warn(f"{settings.state_path / _INDEX} can't be used ({detail}): all files are read anew each time")
        yield MemoryIndex()
        return
    try:
        yield index
    finally:
        index.close()


@contextmanager
def open_uploads(settings: Settings, warn: Callable[[str], None]) -> Iterator[Uploads]:
    """The journal of what pushes have uploaded; where it can't be used, none: then a killed push starts anew."""
    try:
        settings.state_path.mkdir(parents=True, exist_ok=True)
        uploads = SqliteUploads(settings.state_path / _UPLOADS, boot_id() or secrets.token_hex(16), warn)
    except (OSError, sqlite3.Error):
        yield NoUploads()  # the index has said why
        return
    try:
        yield uploads
    finally:
        uploads.close()


@contextmanager
def open_spool(settings: Settings, size: int) -> Iterator[Path | None]:
    """A folder of our own for packs of `size` bytes, removed at the end; None where there is no room for them."""
    room = settings.state_path / _SPOOL
    try:
        room.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_left(room)
        enough = shutil.disk_usage(room).free > _ROOM * size
    except OSError:
        enough = False
    if not enough:
        yield None
        return
    # Named so that nobody takes it for one that was left before it is locked.
    spool = Path(tempfile.mkdtemp(prefix="new-", dir=room))
    descriptor = os.open(spool, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        spool = spool.rename(room / spool.name.removeprefix("new-"))
        yield spool
    finally:
        shutil.rmtree(spool, ignore_errors=True)
        os.close(descriptor)


def _remove_left(room: Path) -> None:
    """Remove what processes left that were killed: nobody holds the lock of these."""
    for left in room.iterdir():
        if left.name.startswith("new-"):
            continue  # somebody's of this moment; empty
        with suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left)
            finally:
                os.close(descriptor)
