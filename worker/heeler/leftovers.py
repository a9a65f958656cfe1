"""Folders that were set apart for an upload: noted on disk, so that none is left behind by a runtime that is killed.

Its job is run again from its checkpoint, by us or by another worker; what was set apart is of no use to it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from heeler_sync.aside import locked_folder
from heeler_sync.errors import SyncError


class Leftovers:
    """The notes, a file for each job. Blocking calls."""

    def __init__(self, state: Path, on_fault: Callable[..., None]) -> None:
        """Args: the state folder, and who is told what can't be written or removed."""
        self._folder = state / "apart"
        self._on_fault = on_fault
        self._abandoned: set[str] = set()

    def note(self, job_id: str, folders: Iterable[Path]) -> None:
        """These are to be removed if we don't come to it; those that were abandoned are removed now."""
        while self._abandoned:
            self._remove(self._folder / self._abandoned.pop())
        place = self._folder / job_id
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            place.write_text(json.dumps([str(folder) for folder in folders]), encoding="utf-8")
        except OSError as error:
            self._on_fault("leftover_not_noted", error=f"{place} can't be written: {error.strerror}")

    def drop(self, job_id: str) -> None:
        """They are gone, or stay on purpose."""
        self._unlink(self._folder / job_id)

    def abandon(self, job_id: str) -> None:
        """Nobody uploads them any more. They stay, for people to look at, until something else is set apart."""
        self._abandoned.add(job_id)

    def remove(self) -> None:
        """Remove what an earlier runtime did not come to."""
        for note in sorted(self._folder.glob("*")):
            self._remove(note)

    def _remove(self, note: Path) -> None:
        if not note.exists():
            return
        try:
            for folder in map(Path, json.loads(note.read_text(encoding="utf-8"))):
                if folder.exists():
                    with locked_folder(folder):  # or it is another worker's by now
                        shutil.rmtree(folder)
        except (OSError, ValueError, TypeError, SyncError) as error:
            self._on_fault("leftover_not_removed", error=f"{note}: {error}")
        self._unlink(note)

    def _unlink(self, note: Path) -> None:
        try:
            note.unlink(missing_ok=True)
        except OSError as error:
            self._on_fault("leftover_not_removed", error=f"{note}: {error.strerror}")
