"""watchdog's events, gathered into batches for one consumer. Events only say when to look.

The observer's threads only touch `_Inbox`, under its lock; the event loop is woken once per batch.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from heeler_sync.paths import is_own
from heeler_sync.threads import in_thread

_FILE_EVENTS = (FileClosedEvent, FileCreatedEvent, FileDeletedEvent, FileModifiedEvent, FileMovedEvent)
_FOLDER_EVENTS = (DirCreatedEvent, DirDeletedEvent, DirMovedEvent)

CHANGED, CLOSED, GONE = "changed", "closed", "gone"


@dataclass
class Batch:
    """What happened since the last batch.

    Attributes:
        files: The last thing that happened to each file (`CHANGED`, `CLOSED` or `GONE`), by relative path.
            In the order of these last things.
        rescan: Whether a folder came, went or moved, so that only a scan tells.
        implied: Those of `files` of which we only know since a folder came or moved: their order says nothing.
    """

    files: dict[str, str] = field(default_factory=dict)
    rescan: bool = False
    implied: set[str] = field(default_factory=set)

    def __bool__(self) -> bool:
        """Whether anything happened."""
        return bool(self.files) or self.rescan


class _Inbox(FileSystemEventHandler):
    def __init__(self, root: str, wake: Callable[[], None]) -> None:
        self._root = root
        self._wake = wake
        self._lock = threading.Lock()
        self._batch = Batch()
        self._woken = False

    def dispatch(self, event: FileSystemEvent) -> None:
        with self._lock:
            if isinstance(event, _FOLDER_EVENTS):
                self._batch.rescan = True
            elif isinstance(event, FileMovedEvent):
                self._note(event.src_path, GONE, event.is_synthetic)
                self._note(event.dest_path, CLOSED, event.is_synthetic)
            elif isinstance(event, FileDeletedEvent):
                self._note(event.src_path, GONE, event.is_synthetic)
            else:
                what = CLOSED if isinstance(event, FileClosedEvent) else CHANGED
                self._note(event.src_path, what, event.is_synthetic)
            woken, self._woken = self._woken, True
        if not woken:
            self._wake()

    def _note(self, path: bytes | str, what: str, implied: bool) -> None:
        relative = os.path.relpath(os.fsdecode(path), self._root) if path else ".."
        if relative != ".." and not relative.startswith("../") and not is_own(relative):
            # Moved last: a path that went and came back must count as the newer of both.
            self._batch.files.pop(relative, None)
            self._batch.files[relative] = what
            (self._batch.implied.add if implied else self._batch.implied.discard)(relative)

    def drain(self) -> Batch:
        with self._lock:
            batch, self._batch, self._woken = self._batch, Batch(), False
            return batch


class TreeWatch:
    """Watches one folder while its `async with` block runs.

    Entering raises OSError where inotify can't be had (its limits); the caller then relies on scans.
    """

    def __init__(self, root: Path, on_news: Callable[[], None]) -> None:
        """Args: the folder, and what is called on the event loop when there is something to `drain`."""
        self._root = root
        self._on_news = on_news
        self._observer = Observer()
        self._inbox: _Inbox | None = None

    async def __aenter__(self) -> TreeWatch:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._on_news)

        self._inbox = _Inbox(str(self._root), wake)
        self._observer.schedule(
            self._inbox, str(self._root), recursive=True, event_filter=[*_FILE_EVENTS, *_FOLDER_EVENTS]
        )
        await in_thread(self._observer.start)
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.CancelScope(shield=True):
            await in_thread(self._stop)

    def _stop(self) -> None:
        self._observer.stop()
        self._observer.join()

    def drain(self) -> Batch:
        """All that happened since the last call."""
        return Batch() if self._inbox is None else self._inbox.drain()
