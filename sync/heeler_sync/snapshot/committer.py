"""Making a folder's tree the next generation: take it, send what is new, swap the head.

`Committer` is the one owner of what is known of the folder's files: the index, and what the newest generation holds.
One call at a time.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio

from heeler_sync.errors import NotNowError
from heeler_sync.events import EventSink
from heeler_sync.progress import Progress
from heeler_sync.sender import Permit
from heeler_sync.snapshot.capture import Late, Look, Reading, changed_files, look
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.holder import Holder
from heeler_sync.snapshot.index import FileIndex, Indexed
from heeler_sync.snapshot.manifest import Tree
from heeler_sync.snapshot.outbox import sending
from heeler_sync.snapshot.packs import Pack
from heeler_sync.snapshot.scan import Found, TreeScan, scan_tree
from heeler_sync.snapshot.uploads import NoUploads, Uploads
from heeler_sync.store.retry import Backoff
from heeler_sync.threads import in_thread


@dataclass(frozen=True)
class SnapshotTimes:
    """The waits, in seconds.

    Attributes:
        quiet: Without a change, until a tree counts as complete where the program does not say so.
        commit_interval: Between two commits by quiet, at least.
        max_wait: After which a tree that never settles is worth a warning.
    """

    quiet: float = 2.0
    commit_interval: float = 15.0
    max_wait: float = 300.0


@dataclass
class SnapshotContext:
    """What all snapshot folders of one session share.

    Attributes:
        times: When to commit.
        permit: Confirmed before what must not be done without the lease.
        on_event: Told of what is worth telling.
        progress: Counts what moved.
        index: Keeps what was read of files.
        spool: A folder for packs that wait for the uplink; None keeps them in memory.
        uploads: The journal of what commits under way have uploaded.
        backoff: Makes the delays after a commit that failed.
    """

    times: SnapshotTimes
    permit: Permit
    on_event: EventSink
    progress: Progress
    index: FileIndex
    spool: Path | None = None
    uploads: Uploads = field(default_factory=NoUploads)
    backoff: Callable[[], Backoff] = field(default=lambda: Backoff(base=1.0, cap=60.0))


@dataclass(frozen=True)
class Taking:
    """On what conditions a tree is taken.

    Attributes:
        late: Which files of a scan show that the tree is no longer complete.
        confirm: Awaited before the swap; raises `NotNowError` if the tree was not complete after all.
        must_be_closed: Which files of a scan nobody may hold open for writing.
        begin: Called right before the folder is looked at.
        taken: Called when the tree is the newest generation.
        looked: Called when the folder has been looked at, so that nobody held open what must be closed.
    """

    late: Late
    confirm: Callable[[], Awaitable[None]]
    must_be_closed: Late
    begin: Callable[[], None]
    taken: Callable[[], None]
    looked: Callable[[], None] = lambda: None


class Committer:
    """Commits one folder."""

    def __init__(
        self,
        holder: Holder,
        root: Path,
        include: Callable[[str], bool],
        context: SnapshotContext,
        restored: Mapping[str, Indexed],
    ) -> None:
        """Args: `restored` is what the folder and its newest generation have in common, by path."""
        self.root = root
        self.holder = holder
        self._include = include
        self._context = context
        self._location = str(holder.layout.location)
        latest = holder.latest()
        self._tree = latest.tree if latest is not None else None
        self._committed: dict[str, Indexed] = dict(restored)
        self._indexed: dict[str, Indexed] = dict(restored)
        self._seen: dict[str, Indexed] = {}

    @property
    def stored(self) -> Mapping[str, Indexed]:
        """What the newest generation holds, by path."""
        return self._committed

    def scan(self) -> TreeScan:
        """The folder as it is about now. Blocks.

        Raises:
            FileNotFoundError: There is none.
            LocalFileError: It can't be read.
        """
        return scan_tree(self.root, self._include)

    def unsent(self, scan: TreeScan) -> set[Path]:
        """The files whose newest state is in no generation."""
        return {self.root / path for path in changed_files(scan, self._committed)}

    async def commit(self, taking: Taking, *, result: Mapping[str, Any] | None = None) -> Kept | None:
        """Take the tree and make it the next generation, unless it is the newest already.

        With a `result` the head says in the same write that the job is complete.

        Returns:
            The new generation; None if there was nothing to commit.

        Raises:
            NotNowError: The tree can't be had now.
            FencedError: The prefix is no longer ours.
            SyncError: Disk or storage refused.
        """
        started, sent = anyio.current_time(), self._context.progress.bytes_up
        await self.holder.settle()
        looked = await self._look(taking)
        taking.looked()
        if self.is_committed(looked.scan):
            tree = None
        else:
            tree = await self._take(looked)
        await taking.confirm()
        if tree is None or tree == self._tree:
            if result is not None:
                await self.holder.complete(result)
            taking.taken()
            return None
        kept = await self.holder.commit(tree, result=result)
        self._tree = tree
        self._committed = {
            path: Indexed(found.stamp, tree.files[path].chunks) for path, found in looked.scan.files.items()
        }
        taking.taken()
        self._report(kept, anyio.current_time() - started, self._context.progress.bytes_up - sent)
        if await in_thread(self._context.uploads.clear, self._location):
            await self.holder.collect(self._context.permit)
        return kept

    async def _look(self, taking: Taking) -> Look:
        taking.begin()
        try:
            return await look(self.root, self._include, taking.late, self._committed, taking.must_be_closed)
        except FileNotFoundError:
            raise NotNowError(".", "is gone: there is no folder") from None

    async def _take(self, looked: Look) -> Tree:
        """The tree at that instant, all its chunks in storage."""
        reading = Reading(self.root, looked, self._indexed, self._seen, self._committed, self.holder)
        context = self._context
        async with sending(self.holder.layout, context.spool, context.progress, self._note_sent) as outbox:
            try:
                tree = await reading.into(outbox)
            finally:
                await self._keep_index(looked, reading)
        return tree

    def committed(self) -> TreeScan:
        """The folder as the newest generation has it."""
        tree = self._tree
        if tree is None:
            return TreeScan()
        files = {path: Found(entry.stamp, tree.files[path].mode) for path, entry in self._committed.items()}
        return TreeScan(files, dict(tree.folders), dict(tree.links))

    def is_committed(self, scan: TreeScan) -> bool:
        """Whether the newest generation is just this."""
        tree, committed = self._tree, self._committed
        if tree is None or scan.folders != tree.folders or scan.links != tree.links:
            return False
        return scan.files.keys() == tree.files.keys() and all(
            path in committed and committed[path].stamp == found.stamp and tree.files[path].mode == found.mode
            for path, found in scan.files.items()
        )

    async def _note_sent(self, pack: Pack) -> None:
        await in_thread(self._context.uploads.note, self._location, self.holder.head, pack)
        self.holder.add_pack(pack.id, pack.size, pack.places)

    async def _keep_index(self, looked: Look, reading: Reading) -> None:
        gone = self._indexed.keys() - looked.scan.files.keys()
        for path in gone:
            del self._indexed[path]
        self._indexed.update(reading.read)
        self._seen = {path: entry for path, entry in {**self._seen, **reading.seen}.items() if path not in gone}
        await in_thread(self._context.index.update, self.root, dict(reading.read), gone)

    def _report(self, kept: Kept, seconds: float, sent: int) -> None:
        self._context.progress.generations += 1
        fields = {
            "location": str(self.holder.layout.location),
            "generation": kept.generation,
            "files": kept.files,
            "bytes": kept.bytes,
            "sent": sent,
            "seconds": round(seconds, 3),
        }
        self._context.on_event("committed", fields)
