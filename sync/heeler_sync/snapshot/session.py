"""The snapshot folders of one session: acquired together, restored, watched, and completed in order.

Fenced in one of them is fenced in all: the error ends whatever goes on.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from heeler_sync.errors import NoGenerationError, SyncError
from heeler_sync.events import EventSink
from heeler_sync.paths import Location
from heeler_sync.restore import Restore, SyncFolder
from heeler_sync.snapshot.chunks import CHUNK_BYTES
from heeler_sync.snapshot.committer import SnapshotContext
from heeler_sync.snapshot.folder import SnapshotFolder
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.holder import Claim, Holder, acquire
from heeler_sync.snapshot.index import Indexed
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.moments import Moment, QuietMoment, ReadyMoment
from heeler_sync.snapshot.recover import Generations, Reader, restore_newest
from heeler_sync.snapshot.swap import require_fence
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryPolicy
from heeler_sync.threads import in_thread


class Fences:
    """Which buckets are known to enforce conditions: each is asked once."""

    def __init__(self, on_event: EventSink, *, allow_unfenced: bool = False) -> None:
        """Args: with `allow_unfenced`, a store that does not is used all the same, and that is said."""
        self._on_event = on_event
        self._allow_unfenced = allow_unfenced
        self._asked: set[str] = set()

    @property
    def trusted(self) -> bool:
        """Whether writes of heads carry conditions."""
        return not self._allow_unfenced

    async def require(self, layout: Layout) -> None:
        """Ask, unless the bucket was asked before.

        Raises:
            UnfencedStoreError: Its store ignores conditions.
        """
        bucket = layout.store.bucket
        if bucket in self._asked:
            return
        if self._allow_unfenced:
            self._on_event("unfenced", {"bucket": bucket})
        else:
            await require_fence(layout)
        self._asked.add(bucket)


@dataclass(frozen=True)
class SnapshotRules:
    """What holds for all prefixes of a session.

    Attributes:
        claim: Who holds them.
        fences: Knows which stores enforce conditions.
        keep: How many generations are kept.
    """

    claim: Claim
    fences: Fences
    keep: int = 2


class Snapshots:
    """All snapshot folders of a session."""

    def __init__(
        self,
        folders: Sequence[SyncFolder],
        stores: Callable[[str], ObjectStore],
        rules: SnapshotRules,
        context: SnapshotContext,
        policy: RetryPolicy,
    ) -> None:
        """Args: `folders` are those that are committed, in the order of the job: the first has the job's head."""
        self._folders = list(folders)
        self._stores = stores
        self._rules = rules
        self._context = context
        self._policy = policy
        self._holders: dict[Location, Holder] = {}
        self._restored: dict[Path, Mapping[str, Indexed]] = {}
        self._running: list[SnapshotFolder] = []

    @property
    def primary(self) -> Holder | None:
        """The holder of the job's head."""
        return self._holders.get(self._folders[0].location) if self._folders else None

    @property
    def running(self) -> Sequence[SnapshotFolder]:
        """The folders that were watched or published so far."""
        return self._running

    def _layout(self, location: Location) -> Layout:
        return Layout(self._stores(location.bucket), location, self._policy)

    async def acquire(self) -> None:
        """Take all prefixes, in sorted order, the job's head first asked whether the job is done.

        Raises:
            FinishedError: The job is done.
            FencedError: A newer attempt holds one of them.
            SyncError: One of them can't be taken.
        """
        locations = sorted({folder.location for folder in self._folders}, key=str)
        for location in locations:
            await self._rules.fences.require(self._layout(location))
        for location in locations:
            self._holders[location] = await acquire(
                self._layout(location),
                self._rules.claim,
                self._context.permit,
                self._context.on_event,
                keep=self._rules.keep,
                fenced=self._rules.fences.trusted,
                adopt=partial(self._context.uploads.load, str(location)),
            )
            # What was adopted is named by the head now; the rest is of an epoch that is over.
            await in_thread(self._context.uploads.clear, str(location))

    async def restore(self, folder: SyncFolder, mirror: Restore, nested: Sequence[Path]) -> None:
        """Bring a folder to the newest generation of its prefix, or to plain keys that were never committed.

        Raises:
            SyncError: It can't be had; nothing starts from zero.
        """
        holder = self._holders.get(folder.location)
        source: Generations
        if holder is not None:
            source, listed, fresh = holder, holder.lists_any(), bool(holder.head.kept)
        else:
            source = reader = Reader(self._layout(folder.location), self._context.on_event)
            listed = await reader.look() and reader.lists_any()
            fresh = False
        if not listed:
            await mirror.run([] if fresh else [folder], [folder.path], nested)
            return
        await self._restore(source, folder, nested)

    async def _restore(self, source: Generations, folder: SyncFolder, nested: Sequence[Path]) -> None:
        context = self._context
        indexed = await in_thread(context.index.load, folder.path)
        while True:
            found = await restore_newest(source, folder.path, indexed, context.progress, self._policy, nested)
            if found is not None:
                break
            if not isinstance(source, Reader) or not await source.look():
                raise NoGenerationError(str(folder.location), ["the head does not list it any more"])
        kept, restored = found
        manifest = source.manifest(kept)
        # Chunks of another size are no chunks of the next generation: then all is read once more.
        files = restored.files if manifest is not None and manifest.chunk_bytes == CHUNK_BYTES else {}
        self._restored[folder.path] = files
        await in_thread(context.index.update, folder.path, files, indexed.keys() - files.keys())
        context.on_event(
            "folder_restored",
            {
                "folder": str(folder.path),
                "generation": kept.generation,
                "downloaded": restored.fetched,
                "kept": restored.kept,
                "bytes": restored.bytes,
                "moved_aside": restored.moved_aside,
            },
        )

    def start(self, folders: Sequence[SyncFolder]) -> list[Callable[[], Awaitable[None]]]:
        """The tasks that keep these folders' generations."""
        started = [self._folder(folder) for folder in folders]
        self._running.extend(started)
        return [folder.run for folder in started]

    def sweeps(self) -> list[Callable[[], Awaitable[object]]]:
        """Tasks that remove what epochs before ours left behind; each ends by itself."""
        return [partial(self._sweep, holder) for holder in self._holders.values()]

    async def _sweep(self, holder: Holder) -> None:
        try:
            await holder.sweep(self._context.permit)
        except SyncError as error:
            self._context.on_event("collect_failed", {"error": str(error)})

    def _folder(self, folder: SyncFolder) -> SnapshotFolder:
        holder = self._holders[folder.location]
        restored = self._restored.get(folder.path, {})
        return SnapshotFolder(holder, folder.path, folder.include, self._moment(folder), self._context, restored)

    def _moment(self, folder: SyncFolder) -> Moment:
        quiet = self._context.times.quiet
        if folder.ready is None:
            return QuietMoment(quiet)
        matches = re.compile(fnmatch.translate(folder.ready)).match
        return ReadyMoment(lambda path: matches(path) is not None, quiet)

    def freeze(self) -> None:
        """The program ended this very moment."""
        for folder in self._running:
            folder.freeze()

    async def checkpoint(self) -> list[Kept]:
        """Commit all watched folders as they are now; their newest generations.

        Raises:
            NotNowError: One is being changed.
            SyncError: One can't be stored.
        """
        found = [await folder.checkpoint() for folder in self._running]
        return [kept for kept in found if kept is not None]

    async def finish(self, *, whole: bool, result: Mapping[str, Any] | None = None) -> None:
        """Commit what may be of all running folders; with a `result`, the job's head says last that it is complete.

        Raises:
            SyncError: Something was refused for good.
        """
        last = [folder for folder in self._running if folder.holder is self.primary]
        for folder in self._running:
            if folder not in last or result is None:
                folder.end(whole=whole)
        await self._wait([folder for folder in self._running if folder not in last])
        if result is not None:
            for folder in last:
                folder.end(whole=whole, result=result)
        await self._wait(last)

    async def _wait(self, folders: Sequence[SnapshotFolder]) -> None:
        for folder in folders:
            await folder.finished.wait()
        for folder in folders:
            if folder.refusal is not None:
                raise folder.refusal

    async def complete(self, result: Mapping[str, Any]) -> None:
        """Say in the job's head that it is done, unless it says so already.

        Raises:
            SyncError: It can't be written, or the job is no longer ours.
        """
        if self.primary is not None and not self.primary.head.complete:
            await self.primary.complete(result)
