"""Several workers on one machine are one machine to Kelpie's API. Which of them has a job, they settle by locks.

Where the API hands out to one worker what another of the same machine has (it was silent for too long, or died just
now), no answer of the API tells the two apart.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from io import FileIO
from pathlib import Path


class Claims:
    """A folder of locks, the same one for all workers of a user on this machine. Nobody else may write to it."""

    def __init__(self, scope: str, folder: Path | None = None) -> None:
        """Args: whose jobs they are (the same ids may be others' elsewhere); where, if not among temporary files.

        Raises:
            OSError: There is no folder for temporary files.
        """
        self._room = folder or Path(tempfile.gettempdir()) / f"heeler-kelpie-{os.geteuid()}"
        self._folder = self._room / hashlib.sha256(scope.encode()).hexdigest()[:16]

    def prepare(self) -> None:
        """See to the folder.

        Raises:
            OSError: It can't be used; the words say why, and name it.
        """
        for folder in (self._room, self._folder):
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700, parents=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode):
                raise NotADirectoryError(errno.ENOTDIR, "it is no folder", str(folder))
            if found.st_uid != os.geteuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise PermissionError(errno.EPERM, "it is another user's, or others may write to it", str(folder))

    def claim(self, job_id: str) -> Claim | None:
        """The lock of a job, until it is released or this process ends; None if somebody has it.

        Raises:
            OSError: As `prepare`, or of the lock itself.
        """
        self.prepare()
        path = self._folder / job_id
        while True:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600), "r+")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                return None
            except OSError:
                file.close()
                raise
            if _is_at(path, file):
                return Claim(path, file)
            file.close()  # its holder released it, and the name with it, between our two calls


class Claim:
    """A lock that is ours; let go with the object at the latest."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path = path
        self._file = file

    def release(self) -> None:
        """Let another have it."""
        if not self._file.closed:
            with suppress(OSError):  # the lock counts, not its name
                self._path.unlink()
            self._file.close()


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
