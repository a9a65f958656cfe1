"""Making a folder equal to what was restored: everything else is moved aside, nothing is deleted unseen.

What was moved aside stays in `.heeler/aside/` of the same folder until the folder is prepared the next time.
Blocking calls only.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from heeler_sync.errors import FolderBusyError, LocalFileError
from heeler_sync.paths import NOT_A_FILE_OF_THE_JOB, OWN_FOLDER
from heeler_sync.tree import Stamp


def locked_folder(root: Path) -> AbstractContextManager[None]:
    """Hold a folder, which is created if it is not there, against other processes of this machine.

    Returns:
        A context that lets go of it when it ends; the kernel does when we die.

    Raises:
        FolderBusyError: Another process holds it.
        LocalFileError: It can't be created.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileExistsError, NotADirectoryError):
        raise LocalFileError(str(root), "is not a folder") from None
    except OSError as error:
        raise LocalFileError(str(root), f"cannot be used: {error.strerror}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise FolderBusyError(str(root)) from None
    return _closed_at_the_end(descriptor)


@contextmanager
def _closed_at_the_end(descriptor: int) -> Iterator[None]:
    """Close a descriptor when the block ends."""
    try:
        yield
    finally:
        os.close(descriptor)


def move_aside(root: Path, keep: Collection[str], nested: Collection[Path]) -> int:
    """Move all but `keep` into the folder's aside folder; what an earlier call moved there is deleted.

    Args:
        root: The folder; it is created if it is not there.
        keep: Relative paths of files that stay.
        nested: Folders below `root` that others look after; they stay whole.

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
        if relative in ancestors and entry.is_dir(follow_symlinks=False):
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


def remove_stored(root: Path, stored: Mapping[str, Stamp]) -> None:
    """Remove files that are in storage and unchanged since, then the folders below `root` that this leaves empty."""
    for relative, stamp in stored.items():
        path = root / relative
        try:
            if Stamp.of(path.lstat()) == stamp:
                path.unlink()
        except OSError:
            continue  # gone, or not ours to remove: the next preparation of the folder moves it aside
    for folder, _, _ in os.walk(root, topdown=False):
        try:
            if Path(folder) != root:
                Path(folder).rmdir()
        except OSError:
            continue  # something is still in it
