"""Making a folder equal to what was restored: everything else is moved aside, nothing is deleted unseen.

What was moved aside stays in `.heeler/aside/` of the same folder until the folder is prepared the next time.
Blocking calls only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from heeler_sync.errors import FolderBusyError, LocalFileError
from heeler_sync.paths import NOT_A_FILE_OF_THE_JOB, OWN_FOLDER
from heeler_sync.tree import Stamp

_LOOKS = 3
_LOOK_SECONDS = 0.01


class FolderLock(AbstractContextManager["FolderLock"]):
    """A folder that is ours, wherever it is moved; let go of at the end of the block, or when we die."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def is_of(self, folder: Path) -> bool:
        """Whether it is this folder's."""
        return self._descriptor >= 0 and os.path.samestat(os.fstat(self._descriptor), folder.stat())

    def release(self) -> None:
        """Let others have it."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __exit__(self, *_error: object) -> None:
        self.release()


def locked_folder(root: Path) -> FolderLock:
    """Hold a folder, which is created if it is not there, against other processes and sessions of this machine.

    Raises:
        FolderBusyError: Another holds it.
        LocalFileError: It can't be created.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileExistsError, NotADirectoryError):
        raise LocalFileError(str(root), "is not a folder") from None
    except OSError as error:
        raise LocalFileError(str(root), f"cannot be used: {error.strerror}") from None
    for _ in range(_LOOKS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return FolderLock(descriptor)
        except BlockingIOError:
            time.sleep(_LOOK_SECONDS)  # somebody may only be looking, as `_is_held` does
    os.close(descriptor)
    raise FolderBusyError(str(root))


def _is_held(folder: str) -> bool:
    """Whether somebody holds it now, a session of ours included."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)


def _holds_held(folder: str) -> bool:
    """Whether a folder below it is held."""
    return any(_is_held(os.path.join(path, name)) for path, names, _ in os.walk(folder) for name in names)  # noqa: PTH118


def move_aside(root: Path, keep: Collection[str], nested: Collection[Path]) -> int:
    """Move all but `keep` into the folder's aside folder; what an earlier call moved there is deleted.

    Args:
        root: The folder; it is created if it is not there.
        keep: Relative paths of files that stay.
        nested: Folders below `root` that others look after; they stay whole, as do those that somebody holds.

    Returns:
        How many files, links and folders were moved.

    Raises:
        LocalFileError: The folder can't be created or written.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        own = root / OWN_FOLDER
        if own.is_symlink() or own.is_file():
            own.unlink()
        if (own / "aside").exists():
            shutil.rmtree(own / "aside")
        stay = {*keep, *(os.path.relpath(folder, root) for folder in nested if folder.is_relative_to(root))}
        ancestors = {parent for path in stay for parent in _parents(path)}
        return _move_from(root, "", stay, ancestors, own / "aside")
    except (FileExistsError, NotADirectoryError):
        raise LocalFileError(str(root), "is not a folder") from None
    except OSError as error:
        raise LocalFileError(str(root), f"cannot be prepared: {error.strerror}") from None


def _parents(path: str) -> list[str]:
    parts = path.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _move_from(root: Path, prefix: str, stay: Collection[str], ancestors: Collection[str], aside: Path) -> int:
    moved = 0
    with os.scandir(root / prefix) as entries:
        found = list(entries)
    for entry in found:
        relative = prefix + entry.name
        if relative in NOT_A_FILE_OF_THE_JOB or (relative in stay and not entry.is_symlink()):
            continue
        if entry.is_dir(follow_symlinks=False):
            if _is_held(entry.path):
                continue  # another job's, which runs or uploads
            if relative in ancestors or _holds_held(entry.path):
                moved += _move_from(root, relative + "/", stay, ancestors, aside)
                continue
        target = aside / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        Path(entry.path).rename(target)
        moved += 1
    return moved


def remove_incoming(root: Path) -> None:
    """Remove the temporary files of downloads, and heeler's own folder if nothing else is in it."""
    shutil.rmtree(root / OWN_FOLDER / "incoming", ignore_errors=True)
    try:
        (root / OWN_FOLDER).rmdir()
    except OSError:
        return  # files that were moved aside are in it


def remove_stored(root: Path, stored: Mapping[str, Stamp], others: Collection[Path] = ()) -> None:
    """Remove files that are in storage and unchanged since, then the folders below `root` that this leaves empty.

    Folders in `others` and what is below them stay.
    """
    for relative, stamp in stored.items():
        path = root / relative
        try:
            if Stamp.of(path.lstat()) == stamp:
                path.unlink()
        except OSError:
            continue  # gone, or not ours to remove: the next preparation of the folder moves it aside
    for folder, _, _ in os.walk(root, topdown=False):
        try:
            if Path(folder) != root and not any(Path(folder).is_relative_to(other) for other in others):
                Path(folder).rmdir()
        except OSError:
            continue  # something is still in it
