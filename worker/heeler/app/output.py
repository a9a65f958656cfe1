"""Where a program's output goes: to our own streams, and to the job's log. Blocking calls, from worker threads."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from functools import partial
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


class JobLogs:
    """The logs of all jobs, in a folder for each; the oldest are removed, but none of a job that runs."""

    def __init__(self, folder: Path, on_error: Callable[[str, OSError], None]) -> None:
        """Args: the folder of all, and what is told which job's log can't be kept."""
        self._folder = folder
        self._on_error = on_error
        self._running: list[str] = []
        self._pruning = threading.Lock()

    def open(self, job_id: str) -> JobLog:
        """The log of a job that is about to run."""
        self._running.append(job_id)
        with self._pruning:
            prune_logs(self._folder, {*self._running})
            return JobLog(self._folder / job_id / "job.log", partial(self._on_error, job_id))

    def close(self, job_id: str, log: JobLog) -> None:
        """The job has ended. It does not wait for others."""
        log.close()
        with suppress(OSError):
            os.utime(self._folder / job_id)  # its age counts from its end
        self._running.remove(job_id)


def prune_logs(folder: Path, running: Collection[str] = (), keep: int = _LOGS_KEPT) -> None:
    """Remove the oldest jobs' log folders beyond `keep`, not counting those of running jobs, which stay."""
    try:
        jobs = sorted((job for job in folder.iterdir() if job.name not in running), key=_last_change, reverse=True)
    except OSError:  # it is not there, or can't be listed: whoever opens the log will tell
        return
    for job in jobs[keep:]:
        shutil.rmtree(job, ignore_errors=True)


def _last_change(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # it has gone, or can't be looked at
        return 0.0
