"""Moving what is still to be uploaded out of the way of others who want the same folders. Blocking calls only."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path

from heeler_sync.errors import LocalFileError


def unnoted(_targets: list[Path]) -> None:
    """Nobody wants to know."""


def move_apart(
    folders: Iterable[Path], name: str, note: Callable[[list[Path]], None] = unnoted
) -> dict[Path, Path] | None:
    """Rename each folder to one beside it, and put an empty one in its place.

    A folder that came with a container's image can't be renamed, but what is in it can.

    Args:
        folders: The folders.
        name: What to call them by, after their own name and a hyphen.
        note: Told where they will be before anything is moved there.

    Returns:
        Where each is now; None, and all as it was, where that can't be done (a mount point, a folder of others).

    Raises:
        LocalFileError: It could be done in part only, and not be undone.
    """
    moved: dict[Path, Path] = {}
    try:
        targets = {folder: _free(folder, name) for folder in folders}
        note([*targets.values()])
        for folder, target in targets.items():
            moved[folder] = target
            _move(folder, target)
    except OSError:
        _move_back(moved)
        return None
    return moved


def _move(folder: Path, target: Path) -> None:
    mode = folder.stat().st_mode
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _make(target, mode)
        _move_all(folder, target)
    else:
        _make(folder, mode)


def _make(folder: Path, mode: int) -> None:
    folder.mkdir()
    folder.chmod(mode)


def _move_all(folder: Path, target: Path) -> None:
    for name in os.listdir(folder):
        (folder / name).rename(target / name)


def _free(folder: Path, name: str) -> Path:
    target = folder.with_name(f"{folder.name}-{name}")
    return target if not target.exists() else folder.with_name(f"{folder.name}-{name}-{secrets.token_hex(4)}")


def _move_back(moved: dict[Path, Path]) -> None:
    for folder, target in moved.items():
        if not target.exists():
            continue
        try:
            if folder.exists():
                _move_all(target, folder)
                target.rmdir()
            else:
                target.rename(folder)
        except OSError as error:
            words = f"was to be set apart, and a part of it can't be brought back from {target}: {error.strerror}"
            raise LocalFileError(str(folder), words) from None
