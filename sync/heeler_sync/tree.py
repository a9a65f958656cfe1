"""A folder as it is on disk: which files it holds, and how to open one without leaving it. Blocking calls only.

Symbolic links are followed only to regular files inside the same folder; a link that leads out is reported, never
followed, since its target is not the job's to publish.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from heeler_sync.errors import LocalFileError
from heeler_sync.paths import NOT_A_FILE_OF_THE_JOB, OWN_FOLDER, is_own, why_no_key


@dataclass(frozen=True)
class Stamp:
    """What tells one state of a file from another without reading it.

    Attributes:
        size: Bytes.
        mtime_ns: Last change of the content, nanoseconds since 1970.
        ctime_ns: Last change of content or inode, nanoseconds since 1970; programs can't set it back.
        inode: The inode's number.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """The stamp in a stat result."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@dataclass
class Scan:
    """The files of a folder at about one time.

    Attributes:
        files: Stamps by relative path.
        left_out: What is there but not taken, with the reason, by relative path.
    """

    files: dict[str, Stamp] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def scan(root: Path, include: Callable[[str], bool]) -> Scan:
    """All regular files below `root` that `include` takes, without heeler's own folder.

    Raises:
        FileNotFoundError: `root` itself is not there.
        LocalFileError: A folder can't be read.
    """
    found = Scan()
    root.stat()
    real_root = os.path.realpath(root)
    _scan_folder(str(root), "", real_root, include, found)
    return found


def _scan_folder(folder: str, prefix: str, real_root: str, include: Callable[[str], bool], found: Scan) -> None:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name != OWN_FOLDER and (prefix or entry.name not in NOT_A_FILE_OF_THE_JOB):
                    _scan_entry(entry, prefix + entry.name, real_root, include, found)
    except FileNotFoundError:
        return  # deleted while we walked; the next scan or event tells
    except OSError as error:
        raise LocalFileError(folder, f"cannot be read: {error.strerror}") from None


def _scan_entry(
    entry: os.DirEntry[str], relative: str, real_root: str, include: Callable[[str], bool], found: Scan
) -> None:
    if entry.is_dir(follow_symlinks=False):
        _scan_folder(entry.path, relative + "/", real_root, include, found)
        return
    if not include(relative):
        return
    if why := why_no_key(relative):
        found.left_out[relative] = why
        return
    try:
        state = examine(entry.path, real_root)
    except FileNotFoundError:
        return
    if isinstance(state, Stamp):
        found.files[relative] = state
    else:
        found.left_out[relative] = state


def examine(path: str, real_root: str) -> Stamp | str:
    """The stamp of a file that belongs to the folder with the real path `real_root`, or why it is left out.

    Raises:
        FileNotFoundError: It is gone, or a link to nothing.
        OSError: It can't be looked at.
    """
    reason = _why_not_follow(path, real_root) if os.path.islink(path) else None  # noqa: PTH114
    if reason:
        return reason
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a symbolic link that leads to itself"
        raise
    return Stamp.of(status) if stat.S_ISREG(status.st_mode) else "not a regular file"


def _why_not_follow(path: str, real_root: str) -> str | None:
    target = os.path.realpath(path)
    if not inside(target, real_root):
        return "a symbolic link that leads out of the folder"
    if Path(target).is_dir():
        return "a symbolic link to a folder"
    return None


def inside(path: str, root: str) -> bool:
    """Whether the real path `path` lies below the real path `root`, outside heeler's own folder there."""
    if not path.startswith(root.rstrip("/") + "/"):
        return False
    return not is_own(os.path.relpath(path, root))


def open_inside(root: Path, relative: str) -> int:
    """Open a regular file below `root` for reading and return its descriptor, which the caller closes.

    Where the path leads is asked of the open descriptor, so a link swapped in at the last moment changes nothing.

    Raises:
        FileNotFoundError: It is gone.
        LocalFileError: It leads out of the folder, is no regular file, or can't be read.
    """
    path = root / relative
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(str(path)) from None
    except OSError as error:
        raise LocalFileError(str(path), f"cannot be read: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise LocalFileError(str(path), "is not a regular file")
        real = os.readlink(f"/proc/self/fd/{descriptor}").removesuffix(" (deleted)")
        if not inside(real, os.path.realpath(root)):
            raise LocalFileError(str(path), "leads out of its folder; symbolic links are not followed there")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor
