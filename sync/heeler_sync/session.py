"""What a caller uses: one set of folders from restore to the last upload.

    session = Session(plan, stores, ...)
    await session.restore()
    async with session.watching():
        ...                                  # the program runs
        await session.flush(Capture(whole=True))
    await session.publish()
    session.close()

Every method raises `SyncError` and its kinds; when one returns, what it promises is durable.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from heeler_sync.aside import locked_folder, remove_stored
from heeler_sync.events import EventSink
from heeler_sync.groups import background
from heeler_sync.mirror import Capture, Mirror
from heeler_sync.progress import Progress
from heeler_sync.restore import Restore, Restored, SyncFolder
from heeler_sync.sender import MirrorContext, Permit
from heeler_sync.settle import SettleTimes
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryingStore, RetryPolicy
from heeler_sync.threads import in_thread
from heeler_sync.upload import Stored

__all__ = ["Capture", "Plan", "Session", "SyncFolder", "Unsent"]


@dataclass(frozen=True)
class Plan:
    """The folders of one job.

    Attributes:
        before: Downloaded by `restore`.
        during: Mirrored while `watching`.
        after: Uploaded by `publish`.
    """

    before: tuple[SyncFolder, ...] = ()
    during: tuple[SyncFolder, ...] = ()
    after: tuple[SyncFolder, ...] = ()

    def roots(self) -> list[Path]:
        """All local folders, each once."""
        return list(dict.fromkeys(folder.path for folder in (*self.before, *self.during, *self.after)))


@dataclass(frozen=True)
class Unsent:
    """What would be lost if the machine vanished now.

    Attributes:
        files: How many files have a state that is not durable.
        bytes: Their size.
        oldest: Seconds since the oldest of these changes was seen; 0 if there is none.
    """

    files: int
    bytes: int
    oldest: float


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
    ) -> None:
        """Args.

        plan: The folders.
        stores: Gives the store of a bucket.
        permit: Waited for before each change of storage.
        on_event: Told of what is worth telling.
        times: When a file counts as settled.
        patience: Seconds without progress after which `restore` gives up on a store that is out of reach.
        """
        self._plan = plan
        self._on_event = on_event
        self._policy = RetryPolicy(patience=patience, on_retry=self._report_retry)
        self._stores = stores
        self.progress = Progress(clock=anyio.current_time)
        self._context = MirrorContext(times or SettleTimes(), permit, on_event, self.progress)
        self._restored = Restored()
        self._mirrors: list[Mirror] = []
        self._locks = ExitStack()

    async def restore(self) -> None:
        """Make every folder of the plan equal to what `before` names; other files are moved aside.

        Raises:
            FolderBusyError: Another process uses one of the folders now.
            SyncError: It can't be had; the program must not start.
        """
        for root in self._plan.roots():
            self._locks.enter_context(await in_thread(locked_folder, root))
        restore = Restore(self._retrying_store, self._policy, self.progress, self._on_event)
        self._restored = await restore.run(self._plan.before, self._plan.roots())

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Mirror the `during` folders while the block runs."""
        self._mirrors = [self._mirror(folder, deletes=True) for folder in self._plan.during]
        async with background(*(mirror.run for mirror in self._mirrors)):
            yield

    def freeze(self) -> None:
        """Inside `watching`: the program ended this very moment; what has not settled may be half a save."""
        for mirror in self._mirrors:
            mirror.freeze()

    async def flush(self, capture: Capture) -> None:
        """Inside `watching`, after the program ended: make durable what `capture` allows of `during`.

        Raises:
            SyncError: Something was refused for good.
        """
        await self._finish(self._mirrors, capture)

    async def publish(self) -> None:
        """Upload the `after` folders as they are.

        Raises:
            SyncError: Something was refused for good.
        """
        mirrors = [self._mirror(folder, deletes=False) for folder in self._plan.after]
        self._mirrors.extend(mirrors)
        for mirror in mirrors:
            mirror.end(Capture(whole=True))
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(background(*(mirror.run for mirror in mirrors)))
            await self._finish(mirrors, Capture(whole=True))

    async def discard(self) -> None:
        """Remove from disk what is in storage unchanged, and folders that are empty then; all else stays."""
        kept: dict[Path, dict[str, Stored]] = {}
        for folder in self._plan.before:
            kept.setdefault(folder.path, {}).update(self._restored.known(folder))
        for mirror in self._mirrors:
            kept.setdefault(mirror.root, {}).update(mirror.stored)
        for root, stored in kept.items():
            stamps = {relative: known.stamp for relative, known in stored.items()}
            await in_thread(remove_stored, root, stamps)

    def close(self) -> None:
        """Let others use the folders. Nothing of the session may be used afterwards."""
        self._locks.close()

    @staticmethod
    async def _finish(mirrors: list[Mirror], capture: Capture) -> None:
        for mirror in mirrors:
            mirror.end(capture)
        for mirror in mirrors:
            await mirror.finished.wait()
        for mirror in mirrors:
            if mirror.refusal is not None:
                raise mirror.refusal

    def _mirror(self, folder: SyncFolder, *, deletes: bool) -> Mirror:
        store, known = self._stores(folder.location.bucket), self._restored.known(folder)
        return Mirror(store, folder.location, folder.path, folder.include, self._context, known, deletes=deletes)

    async def unsent(self) -> Unsent:
        """What is not durable yet."""
        paths = set().union(*(mirror.unsent() for mirror in self._mirrors))
        size = await in_thread(_total_size, paths)
        oldest = [since for since in (mirror.oldest_unsent() for mirror in self._mirrors) if since is not None]
        return Unsent(len(paths), size, anyio.current_time() - min(oldest) if oldest else 0.0)

    def largest(self) -> int:
        """The size in bytes of the largest file in the `during` folders: what a last checkpoint may add."""
        return max((mirror.largest() for mirror in self._mirrors), default=0)

    def _retrying_store(self, bucket: str) -> ObjectStore:
        return RetryingStore(self._stores(bucket), self._policy)

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
