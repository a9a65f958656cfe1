"""Which folders may be a job's. A restore moves aside whatever else is in one, so none may hold what others need."""

from __future__ import annotations

import sys
from pathlib import Path

from heeler.settings import Settings

_PARENTS = {
    Path(name)
    for name in ("/", "/home", "/opt", "/root", "/run", "/srv", "/tmp", "/var", "/var/lib", "/var/tmp")  # noqa: S108
}
"""Rooms of many: a folder in one of them may be a job's, but not the room."""

_SYSTEM = ("bin", "boot", "dev", "etc", "proc", "sbin", "sys", "usr")
_NOT_SYSTEM = (Path("/dev/shm"), Path("/usr/src"))  # noqa: S108
"""In memory, and where many images keep the program: folders below them may be a job's."""


class Rooms:
    """Turns local paths of job documents into folders that a job may have."""

    def __init__(self, settings: Settings, base: Path) -> None:
        """Args: ours, and where relative paths start."""
        self._base = base.resolve()
        self._own = {"heeler's state": settings.state_path.resolve(), "heeler's programs": Path(sys.prefix).resolve()}
        kind, _, queue = (settings.source or "").partition(":")
        if kind == "local" and queue:
            self._own["the queue"] = Path(base, queue).expanduser().resolve()

    def folder(self, local_path: str) -> Path:
        """The folder, absolute and without links.

        Raises:
            ValueError: It can't be a job's.
        """
        path = Path(self._base, local_path)
        if ".." in path.parts:
            raise ValueError(f"{local_path!r} contains '..'")
        try:
            path = path.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle, or that we may not follow
            raise ValueError(f"{path} can't be resolved: {error}") from None
        if whose := self._holds(path):
            raise ValueError(
                f"{path} can't be a job's folder, since it {whose}: what else is in it would be moved aside;"
                " name a folder of its own"
            )
        return path

    def _holds(self, path: Path) -> str | None:
        """Why a folder is not for jobs."""
        if self._base.is_relative_to(path):
            return "holds the working directory"
        if path in _PARENTS or path == _home():
            return "is a room of many"
        if _is_system(path):
            return "belongs to the system"
        for name, own in self._own.items():
            if own.is_relative_to(path):
                return f"holds {name}"
            if path.is_relative_to(own) and not _is_system(own):
                return f"lies inside {own} with {name}"
        return None


def _home() -> Path | None:
    try:
        return Path.home().resolve()
    except RuntimeError:
        return None


def _is_system(path: Path) -> bool:
    if any(path.is_relative_to(room) and path != room for room in _NOT_SYSTEM):
        return False
    top = path.parts[1:2]
    return bool(top) and (top[0] in _SYSTEM or top[0].startswith("lib"))
