"""Where a program's output goes: to our own streams, and to the job's log. Blocking calls, from worker threads."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

_LOG_BYTES = 64 << 20
_LOGS_KEPT = 50


def passed_to(stream: BinaryIO) -> Callable[[bytes], None]:
    """An output that copies to a stream at once; a reader who went away or a full disk is no fault of the job."""

    def write(data: bytes) -> None:
        try:
            stream.write(data)
            stream.flush()
        except (OSError, ValueError):
            return

    return write


class JobLog:
    """`job.log` of one job: all attempts on this machine, the newest 64 to 128 MiB of them."""

    def __init__(self, path: Path, on_error: Callable[[OSError], None], limit: int = _LOG_BYTES) -> None:
        """Args: the file, what is told of the first failure (after it nothing is kept), and half of the space."""
        self._path = path
        self._on_error = on_error
        self._limit = limit
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            on_error(error)

    def write(self, data: bytes) -> None:
        """Keep what the program printed."""
        with self._lock:
            if self._file is None:
                return
            try:
                if self._file.tell() + len(data) > self._limit:
                    self._rotate(self._file)
                self._file.write(data)
                self._file.flush()
            except OSError as error:
                self._file = None
                self._on_error(error)

    def _rotate(self, file: BinaryIO) -> None:
        file.close()
        self._path.replace(self._path.with_suffix(".log.1"))
        self._file = self._path.open("ab")

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            if self._file is not None:
                self._file.close()
                self._file = None


def prune_logs(folder: Path, keep: int = _LOGS_KEPT) -> None:
    """Remove the oldest jobs' log folders beyond `keep`."""
    try:
        jobs = sorted(folder.iterdir(), key=_last_change, reverse=True)
    except OSError:  # it is not there, or can't be listed: whoever opens the log will tell
        return
    for job in jobs[keep:]:
        shutil.rmtree(job, ignore_errors=True)


def _last_change(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has gone, or can't be looked at
        return 0.0
