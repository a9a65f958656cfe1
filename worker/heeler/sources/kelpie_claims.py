"""Several workers on one machine are one machine to Kelpie's API. Which of them has a job, they settle by locks.

Where the API hands out to one worker what another of the same machine has (it was silent for too long, or died just
now), no answer of the API tells the two apart. So who was given a job and can't lock it leaves word of that hand-out,
and who has the lock goes on by it.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import stat
import tempfile
from contextlib import suppress
from io import FileIO
from pathlib import Path

_WORD = "~started"
"""After a job's id, which never has a "~"."""
_WORD_BYTES = 200


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
                claim = Claim(path, file)
                claim.forget_word()  # it was for who had the lock before
                return claim
            file.close()  # its holder released it, and the name with it, between our two calls

    def leave_word(self, job_id: str, started: str) -> None:
        """Tell who has the lock of a job that it was handed out to this machine once more, and when.

        Raises:
            OSError: It can't be told.
        """
        self.prepare()
        path = self._folder / job_id
        word, made = _word(path), self._folder / f"~{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            with FileIO(os.open(made, flags, 0o600), "w") as file:
                file.write(started.encode())
            made.replace(word)
        finally:
            made.unlink(missing_ok=True)
        if not path.exists():  # its holder has let go meanwhile
            word.unlink(missing_ok=True)


class Claim:
    """A lock that is ours; let go with the object at the latest."""

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path = path
        self._file = file

    def word(self) -> str:
        """When the job was handed out to a worker of this machine that could not lock it; "" if none has left word."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            with FileIO(os.open(_word(self._path), flags), "r") as file:
                found = os.fstat(file.fileno())
                if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
                    return ""
                return (file.read(_WORD_BYTES) or b"").decode()
        except (OSError, ValueError):
            return ""

    def forget_word(self) -> None:
        """It is of no use to anyone any more."""
        with suppress(OSError):
            _word(self._path).unlink(missing_ok=True)

    def release(self) -> None:
        """Let another have it."""
        if not self._file.closed:
            self.forget_word()
            with suppress(OSError):  # the lock counts, not its name
                self._path.unlink()
            self._file.close()


def _word(path: Path) -> Path:
    return path.with_name(path.name + _WORD)


def _is_at(path: Path, file: FileIO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
