"""What a caller uses: one set of folders from restore to the last upload.

    session = Session(plan, stores, ...)
    await session.restore()
    async with session.watching():
        ...                                  # the program runs
        await session.flush(Capture(whole=True))
    await session.publish()
    await session.complete({...})
    session.close()

Every method raises `SyncError` and its kinds; when one returns, what it promises is durable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio

from heeler_sync.apart import move_apart, unnoted
from heeler_sync.aside import FolderLock, locked_folder, move_aside, remove_stored
from heeler_sync.errors import FolderBusyError, LocalFileError
from heeler_sync.events import EventSink
from heeler_sync.groups import background
from heeler_sync.mirror import Capture, Mirror
from heeler_sync.plan import Plan, SnapshotSettings, Unsent
from heeler_sync.progress import Progress
from heeler_sync.restore import Restore, Restored, SyncFolder
from heeler_sync.sender import MirrorContext, Permit
from heeler_sync.settle import SettleTimes
from heeler_sync.snapshot.committer import SnapshotContext
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.session import Fences, SnapshotRules, Snapshots
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.gzip import GzipStore
from heeler_sync.store.retry import RetryingStore, RetryPolicy
from heeler_sync.threads import in_thread
from heeler_sync.tree import Stamp
from heeler_sync.upload import Stored

__all__ = ["Capture", "Plan", "Session", "SnapshotSettings", "SyncFolder", "Unsent"]


class Session:
    """One job's folders. It is used once, in the order restore, watching, flush, publish."""

    def __init__(
        self,
        plan: Plan,
        stores: Callable[[str], ObjectStore],
        *,
        permit: Permit,
        on_event: EventSink,
        times: SettleTimes | None = None,
        patience: float | None = 600.0,
        snapshots: SnapshotSettings | None = None,
    ) -> None:
        """Args.

        plan: The folders.
        stores: Gives the store of a bucket.
        permit: Waited for before each change of storage.
        on_event: Told of what is worth telling.
        times: When a file counts as settled.
        patience: Seconds without progress after which `restore` gives up on a store that is out of reach.
        snapshots: What the plan's snapshot folders need besides.
        """
        self._plan = plan
        self._on_event = on_event
        self._policy = RetryPolicy(patience=patience, on_retry=self._report_retry)
        self._stores = stores
        self.progress = Progress(clock=anyio.current_time)
        self._context = MirrorContext(times or SettleTimes(), permit, on_event, self.progress)
        self._restored = Restored()
        self._mirrors: list[Mirror] = []
        self._kept: list[tuple[SyncFolder, Mirror]] = []
        chosen = snapshots or SnapshotSettings()
        self._snapshots = Snapshots(
            [folder for folder in (*plan.during, *plan.after) if folder.snapshot],
            stores,
            SnapshotRules(chosen.claim, chosen.fences or Fences(on_event), chosen.keep),
            SnapshotContext(chosen.times, permit, on_event, self.progress, chosen.index, chosen.spool, chosen.uploads),
            self._policy,
        )
        self._locks: dict[Path, FolderLock] = {}
        self._apart: dict[Path, Path] = {}

    async def restore(self) -> None:
        """Make every folder of the plan equal to what `before` names; other files are moved aside.

        Raises:
            FolderBusyError: Another process uses one of the folders now.
            SyncError: It can't be had; the program must not start.
        """
        for root in self._plan.roots():
            self._locks[root] = await in_thread(locked_folder, root)
        await self._snapshots.acquire()
        restore = Restore(self._retrying_store_of, self._policy, self.progress, self._on_event)
        snapshots = [folder for folder in self._plan.before if folder.snapshot]
        roots, own = self._plan.roots(), {folder.path for folder in snapshots}
        mirrors = [folder for folder in self._plan.before if not folder.snapshot]
        self._restored = await restore.run(mirrors, [root for root in roots if root not in own], own)
        for folder in sorted(snapshots, key=lambda folder: len(folder.path.parts)):
            nested = [root for root in roots if root != folder.path and root.is_relative_to(folder.path)]
            await self._snapshots.restore(folder, restore, nested)
        for spare in self._plan.spare:
            await in_thread(self._empty, spare, roots)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Keep the `during` folders in storage while the block runs.

        Raises:
            FencedError: Another worker has the job.
        """
        self._kept = [
            (folder, self._mirror(folder, folder.path, self._restored.known(folder), deletes=folder.deletes))
            for folder in self._plan.during
            if not folder.snapshot
        ]
        self._mirrors = [mirror for _, mirror in self._kept]
        snapshots = self._snapshots.start([folder for folder in self._plan.during if folder.snapshot])
        async with background(*(mirror.run for mirror in self._mirrors), *snapshots, *self._snapshots.sweeps()):
            yield

    async def checkpoint(self) -> list[Kept]:
        """Inside `watching`: commit the snapshot folders as they are now; their newest generations.

        Raises:
            NotNowError: One is being changed.
            SyncError: One can't be stored.
        """
        return await self._snapshots.checkpoint()

    def freeze(self) -> None:
        """Inside `watching`: the program ended this very moment; what has not settled may be half a save."""
        for mirror in self._mirrors:
            mirror.freeze()
        self._snapshots.freeze()

    async def flush(self, capture: Capture, *, result: Mapping[str, Any] | None = None) -> None:
        """Inside `watching`, after the program ended: make durable what `capture` allows of `during`.

        With a `result` the job is done; where it owes nothing in `after`, its head says so by the same write. What
        `publish` is to send anyway is left to it then.

        Raises:
            SyncError: Something was refused for good.
        """
        for folder, mirror in self._kept:
            if result is not None and self._is_published(folder):
                mirror.leave()
            else:
                mirror.end(capture)
        if result is not None and not self._plan.after:
            for mirror in self._mirrors:
                await mirror.finished.wait()
            if any(mirror.refusal for mirror in self._mirrors):
                result = None
            await self._snapshots.finish(whole=capture.whole, result=result)
        else:
            await self._snapshots.finish(whole=capture.whole)
        await self._finish(self._mirrors)

    @property
    def apart(self) -> list[Path]:
        """Where `set_apart` moved what `publish` owes."""
        return [*self._apart.values()]

    async def set_apart(self, name: str, note: Callable[[list[Path]], None] = unnoted) -> bool:
        """After `flush`: let others use the folders, though `publish` is still to come.

        What it owes is moved beside them; what is in storage already is removed from them.

        Args:
            name: Of this set of folders, such as the job's.
            note: Told, in a thread, where it will be before anything is moved there.

        Returns:
            Whether that could be done. Else all is as it was.
        """
        folders = [*dict.fromkeys(folder.path for folder in self._plan.after)]
        nested = any(one != other and one.is_relative_to(other) for one in folders for other in folders)
        if not folders or nested or any(folder.snapshot for folder in self._plan.after):
            return False
        moved = await in_thread(move_apart, folders, name, note)
        if moved is None:
            return False
        self._apart = moved
        await self._remove_stored()
        await in_thread(self._keep_only, moved)
        return True

    def _keep_only(self, moved: Mapping[Path, Path]) -> None:
        """Hold what was moved, and nothing else."""
        held = {}
        for folder, target in moved.items():
            lock = self._locks[folder]
            if lock.is_of(target):
                del self._locks[folder]
                held[target] = lock
            else:
                held[target] = locked_folder(target)
        self.close()
        self._locks = held

    async def publish(self) -> None:
        """Upload the `after` folders as they are.

        Raises:
            SyncError: Something was refused for good.
        """
        mirrors = [self._last_mirror(folder) for folder in self._plan.after if not folder.snapshot]
        snapshots = self._snapshots.start([folder for folder in self._plan.after if folder.snapshot])
        self._mirrors.extend(mirrors)
        for mirror in mirrors:
            mirror.end(Capture(whole=True))
        async with background(*(mirror.run for mirror in mirrors), *snapshots):
            await self._snapshots.finish(whole=True)
            await self._finish(mirrors)

    async def complete(self, result: Mapping[str, Any]) -> None:
        """Say in the job's head that it is done with this result; nothing where no folder is kept as snapshots.

        Raises:
            SyncError: It can't be written, or another worker has the job.
        """
        await self._snapshots.complete(result)

    async def discard(self) -> None:
        """Remove from disk what is in storage unchanged, and folders that are empty then; all else stays."""
        await self._remove_stored(self.apart or None)
        for folder in self.apart:
            with suppress(OSError):  # what is not in storage is still in it
                await in_thread(folder.rmdir)

    async def _remove_stored(self, only: Collection[Path] | None = None) -> None:
        """Args: `only` of these folders; of all, but for what was set apart, if there is none."""
        kept: dict[Path, dict[str, Stamp]] = {}
        for folder in self._plan.before:
            found = self._restored.known(folder)
            kept.setdefault(folder.path, {}).update({path: known.stamp for path, known in found.items()})
        for mirror in self._mirrors:
            stored = mirror.stored
            kept.setdefault(mirror.root, {}).update({path: known.stamp for path, known in stored.items()})
        for snapshot in self._snapshots.running:
            held = snapshot.stored
            kept.setdefault(snapshot.root, {}).update({path: known.stamp for path, known in held.items()})
        for root, stamps in kept.items():
            if only is None:
                await in_thread(remove_stored, root, stamps, self.apart)
            elif root in only:
                await in_thread(remove_stored, root, stamps)

    def close(self) -> None:
        """Let others use the folders. Nothing of the session may be used afterwards."""
        for lock in self._locks.values():
            lock.release()
        self._locks = {}

    @staticmethod
    async def _finish(mirrors: list[Mirror]) -> None:
        for mirror in mirrors:
            await mirror.finished.wait()
        for mirror in mirrors:
            if mirror.refusal is not None:
                raise mirror.refusal

    def _is_published(self, folder: SyncFolder) -> bool:
        """Whether `publish` sends all that a folder of `during` still owes."""
        after = (replace(each, deletes=folder.deletes) for each in self._plan.after)
        return not folder.deletes and folder in after

    def _last_mirror(self, folder: SyncFolder) -> Mirror:
        """Of a folder that is published: what `during` has stored of it already is not sent again."""
        known = dict(self._restored.known(folder))
        for entry, mirror in self._kept:
            if (entry.location, entry.path) == (folder.location, folder.path):
                known |= mirror.stored
        path = self._apart.get(folder.path, folder.path)
        return self._mirror(folder, path, known, deletes=False, owes=True)

    def _empty(self, spare: Path, roots: list[Path]) -> None:
        if any(spare.is_relative_to(root) for root in roots):
            return  # a restore saw to it
        try:
            self._locks[spare] = locked_folder(spare)
            move_aside(spare, (), [root for root in roots if root.is_relative_to(spare)])
        except (FolderBusyError, LocalFileError) as error:
            self._on_event("folder_not_emptied", {"folder": str(spare), "error": str(error)})

    def _mirror(
        self, folder: SyncFolder, path: Path, known: dict[str, Stored], *, deletes: bool, owes: bool = False
    ) -> Mirror:
        store = self._store_of(folder)
        return Mirror(store, folder.location, path, folder.include, self._context, known, deletes=deletes, owes=owes)

    def unsent_files(self) -> set[Path]:
        """The files that are mirrored and have a state that is not durable yet."""
        return set[Path]().union(*(mirror.unsent() for mirror in self._mirrors))

    async def unsent(self) -> Unsent:
        """What is not durable yet."""
        paths = self.unsent_files()
        for snapshot in self._snapshots.running:
            paths |= await snapshot.unsent()
        size = await in_thread(_total_size, paths)
        waiting = [mirror.oldest_unsent() for mirror in self._mirrors]
        waiting.extend(snapshot.oldest_unsent() for snapshot in self._snapshots.running)
        oldest = [since for since in waiting if since is not None]
        return Unsent(len(paths), size, anyio.current_time() - min(oldest) if oldest else 0.0)

    def largest(self) -> int:
        """The size in bytes of the largest file in the `during` folders: what a last checkpoint may add."""
        largest = [mirror.largest() for mirror in self._mirrors]
        largest.extend(snapshot.largest() for snapshot in self._snapshots.running)
        return max(largest, default=0)

    def _store_of(self, folder: SyncFolder) -> ObjectStore:
        """Where the files of a folder are under their own names."""
        store = self._stores(folder.location.bucket)
        return GzipStore(store) if folder.gzip else store

    def _retrying_store_of(self, folder: SyncFolder) -> ObjectStore:
        return RetryingStore(self._store_of(folder), self._policy)

    def _report_retry(self, error: Exception, delay: float) -> None:
        self._on_event("storage_retried", {"error": str(error), "retry_in": round(delay, 3)})


def _total_size(paths: set[Path]) -> int:
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:  # gone meanwhile: nothing to send
            continue
    return total
