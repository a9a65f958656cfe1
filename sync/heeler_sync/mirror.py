"""Mirror mode of one folder: every settled file at prefix + relative path, as Kelpie lays it out.

`Mirror.run` is the one owner of the folder's state: it takes in what the watcher saw, decides what has settled,
keeps a bounded number of files on their way, and deletes objects only after everything before them is durable.
`end` tells it that the program is over: then it captures what it may and returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from heeler_sync.anchor import Anchor
from heeler_sync.errors import LocalFileError, SyncError
from heeler_sync.paths import Location, why_no_key
from heeler_sync.sender import Ended, MirrorContext, Sender
from heeler_sync.settle import Settler
from heeler_sync.states import look_at
from heeler_sync.store.base import ObjectStore
from heeler_sync.threads import in_thread
from heeler_sync.tree import Scan, Stamp, scan
from heeler_sync.upload import Stored
from heeler_sync.watch import CLOSED, GONE, Batch, TreeWatch

_MAX_IN_FLIGHT = 16
_MAX_BYTES_IN_FLIGHT = 32 << 20
"""Slow uplinks share one link among all that is sent: too much of it at once, and every request times out."""
_SCAN_SECONDS = 60.0
_SCAN_SECONDS_UNWATCHED = 5.0
_SCAN_SECONDS_MISSING = 0.5
_LOOK_SECONDS = 1.0
"""No event tells that the watched folder itself was renamed away."""
_SCAN_SOON_SECONDS = 0.05


@dataclass(frozen=True)
class Capture:
    """What a program's end lets us send.

    Attributes:
        whole: All that the folder holds now; else only what had settled before the end.
    """

    whole: bool


class Mirror:
    """Keeps one prefix equal to one folder."""

    def __init__(
        self,
        store: ObjectStore,
        location: Location,
        root: Path,
        include: Callable[[str], bool],
        context: MirrorContext,
        stored: dict[str, Stored] | None = None,
        *,
        deletes: bool = True,
        owes: bool = False,
    ) -> None:
        """Args: `stored` is what storage is known to hold below `location`, by relative path.

        With `deletes` the objects of files that go are deleted. What the folder holds at the end may be owed: then a
        file that goes before it is sent is a refusal.
        """
        self._owes = owes
        self.root = root
        self._include = include
        self._context = context
        self._deletes = deletes
        self._sender = Sender(store, location, root, context)
        self._settler = Settler(context.times)
        self._stored = dict(stored or {})
        self._tried: set[str] = set()
        self._seen: dict[str, Stamp] = {path: known.stamp for path, known in self._stored.items()}
        self._left_out: set[str] = set()
        self._capture: Capture | None = None
        self._captured = False
        self._frozen_at: float | None = None
        self._lost = False
        self._unscanned = False
        self._unseen: set[str] = set()
        self._sending: dict[str, int] = {}
        self._next_scan = -math.inf
        self._next_look = math.inf
        self._scan_seconds = _SCAN_SECONDS
        self._news = anyio.Event()
        self.finished = anyio.Event()

    @property
    def refusal(self) -> SyncError | None:
        """After `finished`: why something could not be made durable (all else is); None if all is."""
        return self._sender.refusal

    @property
    def stored(self) -> dict[str, Stored]:
        """What storage is known to hold, by relative path."""
        return dict(self._stored)

    def unsent(self) -> set[Path]:
        """The files whose newest state is not durable yet."""
        return {self.root / relative for relative in self._settler.unsent()}

    def oldest_unsent(self) -> float | None:
        """Since when (clock of `anyio.current_time`) the oldest of them is waiting."""
        return self._settler.oldest()

    def largest(self) -> int:
        """The size in bytes of the largest file seen: what a last checkpoint may add."""
        return max((stamp.size for stamp in self._seen.values()), default=0)

    def freeze(self) -> None:
        """The program has just ended: what has not settled by now may be half a save, closed by its death."""
        self._frozen_at = anyio.current_time()

    def end(self, capture: Capture) -> None:
        """The program is over: capture what `capture` allows, then let `run` return."""
        self._capture = capture
        self._sender.over.set()
        self._news.set()

    def leave(self) -> None:
        """As `end`, but all that is not on its way already is for somebody else to send."""
        self._frozen_at = -math.inf
        self.end(Capture(whole=False))

    async def run(self) -> None:
        """Mirror until `end` was called and what it allows is durable, or refused for good (`refusal`)."""
        try:
            async with anyio.create_task_group() as group:
                while not await self._follow(group):
                    self._next_scan = -math.inf
                group.cancel_scope.cancel()
        finally:
            self.finished.set()

    async def _follow(self, group: TaskGroup) -> bool:
        """Watch one folder until all is done; False when it no longer stands there."""
        async with AsyncExitStack() as stack:
            self._anchor = await in_thread(Anchor, self.root)
            stack.callback(self._anchor.close)
            watch = None if self._capture else await self._watch(stack)
            self._next_look = math.inf if watch is None else anyio.current_time()
            while not await self._step(watch, group):
                if self._lost and self._capture is None:
                    self._lost = False
                    return False
                await self._wait_for_news()
        return True

    async def _watch(self, stack: AsyncExitStack) -> TreeWatch | None:
        if self._anchor.missing:
            self._scan_seconds = _SCAN_SECONDS_MISSING
            return None
        self._scan_seconds = _SCAN_SECONDS
        try:
            return await stack.enter_async_context(TreeWatch(self.root, self._rouse))
        except OSError as error:
            self._event("watch_unavailable", folder=str(self.root), error=error.strerror or str(error))
            self._scan_seconds = _SCAN_SECONDS_UNWATCHED
            return None

    async def _stands(self) -> bool:
        """Whether the folder that we follow still stands there. If not, all that we saw of it is forgotten.

        Its files are not gone because the folder is (an unmounted disk): storage keeps what it has.
        """
        if not self._lost and not await in_thread(self._anchor.stands):
            self._lost = True
            self._event("folder_replaced", folder=str(self.root))
            self._seen.clear()
            self._settler.forget()
            self._unscanned = False
            self._unseen = {*self._stored, *self._tried}
        return not self._lost

    def _rouse(self) -> None:
        self._news.set()

    async def _step(self, watch: TreeWatch | None, group: TaskGroup) -> bool:
        """Take in, decide, send; whether all is done."""
        if not self._captured:
            now = anyio.current_time()
            if watch is not None:
                batch = watch.drain()
                if (batch or now >= self._next_look) and await self._stands():
                    self._next_look = now + _LOOK_SECONDS
                    self._take(batch, now)
            if self._capture is not None:
                self._captured = True
                await self._take_last(self._capture, now)
            elif now >= self._next_scan:
                self._next_scan = now + self._scan_seconds
                await self._compare(now, settled=False)
        await self._start_uploads(group)
        for relative in self._settler.deletable() if not self._unscanned else ():
            self._settler.delete(relative)
            if self._deletes:
                group.start_soon(self._delete, relative)
            else:
                self._settler.deleted(relative)
        return self._captured and not self._settler.busy

    async def _wait_for_news(self) -> None:
        due = self._settler.next_due() if self._room() and not self._waits_for_capture() else None
        next_look = math.inf if self._captured else min(self._next_scan, self._next_look)
        until = min(math.inf if due is None else due, next_look)
        with anyio.move_on_after(max(0.0, until - anyio.current_time())):
            await self._news.wait()
        self._news = anyio.Event()

    def _take(self, batch: Batch, now: float) -> None:
        """Changes before deletions: a deletion then waits for what came with it, too."""
        for relative, what in batch.files.items():
            if what != GONE and self._include(relative) and why_no_key(relative) is None:
                self._unseen.discard(relative)
                self._settler.changed(relative, now, closed=what == CLOSED)
        for relative, what in batch.files.items():
            if what == GONE:
                self._note_gone(relative)
        if batch.rescan:
            # A folder may have been filled before its watch: until a scan, we don't know what deletions wait for.
            self._unscanned = True
            self._next_scan = min(self._next_scan, now + _SCAN_SOON_SECONDS)
        for relative in self._settler.overdue(now):
            self._event("file_never_settles", file=relative, seconds=self._context.times.max_wait)

    async def _take_last(self, capture: Capture, now: float) -> None:
        if capture.whole:
            await self._compare(now, settled=True)
        else:
            self._unscanned = False
            self._settler.drop_unsettled(now if self._frozen_at is None else self._frozen_at)

    async def _compare(self, now: float, *, settled: bool) -> None:
        """A scan is the truth; what it finds that we did not know is a change like any other."""
        try:
            found = await in_thread(scan, self.root, self._include)
        except FileNotFoundError:
            await self._stands()
            if self._captured and not self._deletes:
                self._sender.refusal = LocalFileError(str(self.root), "is gone, and the job owes what was in it")
            return
        except LocalFileError as error:
            self._event("scan_failed", folder=str(self.root), error=str(error))
            if self._captured:
                self._unscanned = False
                self._sender.refusal = error
            return
        if not await self._stands() and self._capture is None:
            return
        self._report_left_out(found)
        unsent = self._settler.unsent()
        for relative, stamp in found.files.items():
            stored = self._stored.get(relative)
            if settled and (stored is None or stored.stamp != stamp):
                self._settler.changed(relative, now, closed=True, settled=True)
            elif not settled and self._seen.get(relative) != stamp and relative not in unsent:
                self._settler.changed(relative, now, closed=False)
            self._seen[relative] = stamp
            self._unseen.discard(relative)
        for relative in (self._seen.keys() | self._settler.unsent()) - found.files.keys():
            self._note_gone(relative)
        if self._unscanned:
            self._unscanned = False
            self._settler.renew_deletions()

    def _miss(self, relative: str) -> None:
        """A file that was to be sent is gone."""
        if self._owes and self._captured and self._sender.refusal is None:
            self._sender.refusal = LocalFileError(str(self.root / relative), "is gone, and the job owes it")
        self._note_gone(relative)

    def _note_gone(self, relative: str) -> None:
        self._seen.pop(relative, None)
        if relative in self._unseen:  # of a folder that stood here before: not ours to delete
            self._settler.abandon(relative)
        else:
            # What was tried may be stored, though we never heard of it.
            self._settler.vanished(relative, stored=relative in self._stored or relative in self._tried)

    def _report_left_out(self, found: Scan) -> None:
        for relative, reason in found.left_out.items():
            self._note_left_out(relative, reason)
        self._left_out = set(found.left_out)

    def _note_left_out(self, relative: str, reason: str) -> None:
        if relative not in self._left_out:
            self._left_out.add(relative)
            self._event("file_left_out", file=relative, reason=reason)

    async def _start_uploads(self, group: TaskGroup) -> None:
        if self._waits_for_capture():
            return
        quiet = self._settler.quiet(anyio.current_time())[: self._room()]
        if not quiet:
            return
        states = await in_thread(look_at, self.root, quiet, not self._captured)
        now = anyio.current_time()
        for relative, state in states.items():
            if state is None and not self._captured:
                # Deleted, or renamed; a scan tells, which takes in the new name before it misses the old one.
                self._settler.postpone(relative, now)
                self._next_scan = now
            elif state is None:
                self._miss(relative)
            elif isinstance(state, str):
                self._note_left_out(relative, state)
                self._note_gone(relative)
            elif state.held_open and not self._settler.waited_open(relative, now):
                self._settler.hold(relative)
            elif self._room():
                self._seen[relative] = state.stamp
                self._sending[relative] = state.stamp.size
                self._tried.add(relative)
                self._settler.start(relative)
                group.start_soon(self._upload, relative, state.stamp)

    def _waits_for_capture(self) -> bool:
        """Whether the program has ended, and what it was allowed to leave is not known yet."""
        return self._frozen_at is not None and not self._captured

    def _room(self) -> int:
        """How many more files may be sent now."""
        full = sum(self._sending.values()) >= _MAX_BYTES_IN_FLIGHT
        return 0 if full else _MAX_IN_FLIGHT - len(self._sending)

    async def _upload(self, relative: str, settled: Stamp) -> None:
        ended, stored = await self._sender.send(relative, settled, self._stored.get(relative))
        if ended is Ended.DURABLE and stored is not None:
            self._stored[relative] = stored
        elif ended is Ended.GONE:
            self._miss(relative)
        newer = self._seen.get(relative, settled) != settled  # a scan saw it meanwhile, without an event
        if (ended is Ended.CHANGED or newer) and self._may_take_newer() and not self._settler.is_dirty(relative):
            self._settler.changed(relative, anyio.current_time(), closed=self._captured)
        del self._sending[relative]
        self._settler.done(relative, durable=ended is Ended.DURABLE)
        self._news.set()

    def _may_take_newer(self) -> bool:
        """After a program that died, a newer state than the settled one may be half a save: it is left."""
        return self._capture is None or self._capture.whole

    async def _delete(self, relative: str) -> None:
        # Forgotten first: whether a delete without an answer took effect is not known.
        self._stored.pop(relative, None)
        self._tried.add(relative)
        if await self._sender.delete(relative, lambda: self._settler.is_dirty(relative)):
            self._tried.discard(relative)
        self._settler.deleted(relative)
        self._news.set()

    def _event(self, name: str, **fields: object) -> None:
        self._context.on_event(name, fields)
