"""One folder's generations while the program runs: a task that watches, takes the tree at its moments, and commits.

`SnapshotFolder.run` decides when; how is `Committer`'s. One commit at a time; what comes meanwhile is the next one's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anyio

from heeler_sync.anchor import Anchor
from heeler_sync.errors import (
    FencedError,
    LocalFileError,
    NotNowError,
    PermanentStoreError,
    StoreError,
    SyncError,
    TransientStoreError,
)
from heeler_sync.groups import background
from heeler_sync.snapshot.committer import Committer, SnapshotContext, Taking
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.holder import Holder
from heeler_sync.snapshot.index import Indexed
from heeler_sync.snapshot.moments import LIVES_ON, Moment
from heeler_sync.snapshot.scan import TreeScan
from heeler_sync.threads import in_thread
from heeler_sync.watch import CLOSED, Batch, TreeWatch

_DOUBT_SECONDS = 8.0
"""Between two commits while it is in doubt whether the job is ours."""
_BEHIND_SECONDS = 5.0
"""Less is what the distance between two writes of a head costs, not the uplink."""
_SCAN_SECONDS = 60.0
_SCAN_SECONDS_UNWATCHED = 2.0
_SCAN_SOON_SECONDS = 0.05
_SCANS_APART = 20.0
"""Times the duration of a scan, between two: large folders are not looked at all the time."""
_LOOK_SECONDS = 1.0
"""No event tells that the watched folder itself was renamed away."""
_HINDERED_SECONDS = 5.0
_LAST_SECONDS = 10.0
"""After the program's end: how long something else may go on changing the folder."""


class _Request:
    """Somebody asks for a checkpoint now, and waits for what becomes of it."""

    def __init__(self) -> None:
        self.answered = anyio.Event()
        self.kept: Kept | None = None
        self.error: SyncError | None = None

    def answer(self, kept: Kept | None, error: SyncError | None) -> None:
        self.kept, self.error = kept, error
        self.answered.set()


class SnapshotFolder:
    """Keeps the generations of one folder."""

    def __init__(
        self,
        holder: Holder,
        root: Path,
        include: Callable[[str], bool],
        moment: Moment,
        context: SnapshotContext,
        restored: Mapping[str, Indexed],
    ) -> None:
        """Args: `restored` is what the folder and its newest generation have in common, by path."""
        self.root = root
        self.holder = holder
        self._include = include
        self._moment = moment
        self._context = context
        self._committer = Committer(holder, root, include, context, restored)
        self._changed_at: float | None = None
        self._last_commit = -math.inf
        self._retry_at = -math.inf
        self._failures = context.backoff()
        self._warned = False
        self._frozen_at: float | None = None
        self._ended: bool | None = None
        self._result: Mapping[str, Any] | None = None
        self._requests: list[_Request] = []
        self._left_out: set[str] = set()
        self._scanned = False
        self._hindered = ""
        self._hindrances = 0
        self._news = anyio.Event()
        self._events_came = anyio.Event()
        self._scan_seconds = _SCAN_SECONDS
        self._next_scan = -math.inf
        self.finished = anyio.Event()
        self.refusal: SyncError | None = None

    # -- what others ask and tell ----------------------------------------------------------------------------------

    async def checkpoint(self) -> Kept | None:
        """Commit the folder as it is now and return the newest generation; None if there is nothing to commit.

        Raises:
            NotNowError: It is being changed.
            SyncError: It can't be stored.
        """
        if self.finished.is_set():
            raise LocalFileError(str(self.root), "the job has ended")
        request = _Request()
        self._requests.append(request)
        self._news.set()
        await request.answered.wait()
        if request.error is not None:
            raise request.error
        return request.kept

    def freeze(self) -> None:
        """The program ended this very moment: what is not complete by now may be half a save."""
        self._frozen_at = anyio.current_time()

    def end(self, *, whole: bool, result: Mapping[str, Any] | None = None) -> None:
        """The program is over: commit what may be, then let `run` return.

        Args:
            whole: Commit the folder as it is; else only what was complete before the program's end.
            result: Say in the same write that the job is complete.
        """
        self._ended, self._result = whole, result
        self._news.set()

    def oldest_unsent(self) -> float | None:
        """Since when something waits to be committed (clock of `anyio.current_time`)."""
        return self._changed_at

    async def unsent(self) -> set[Path]:
        """The files whose newest state is in no generation."""
        if self._changed_at is None:
            return set()
        try:
            return self._committer.unsent(await in_thread(self._committer.scan))
        except (OSError, SyncError):
            return set()

    def largest(self) -> int:
        """The size in bytes of the largest file committed."""
        return max((entry.stamp.size for entry in self.stored.values()), default=0)

    @property
    def stored(self) -> Mapping[str, Indexed]:
        """What the newest generation holds, by path."""
        return self._committer.stored

    # -- the task --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Commit at the folder's moments until `end` was called and what it allows is committed, or refused.

        Raises:
            FencedError: The prefix is no longer ours.
        """
        try:
            while self._ended is None:
                await self._follow()
            await self._finish(whole=self._ended)
        finally:
            for request in self._requests:
                request.answer(None, LocalFileError(str(self.root), "the job has ended"))
            self.finished.set()

    async def _follow(self) -> None:
        """Watch one folder until it no longer stands there, or all is over."""
        async with AsyncExitStack() as stack:
            anchor = await in_thread(Anchor, self.root)
            stack.callback(anchor.close)
            watch = None if anchor.missing else await self._watch(stack)
            if watch is not None:
                await stack.enter_async_context(background(partial(self._listen, watch)))
            self._next_scan = -math.inf
            while self._ended is None and await in_thread(anchor.stands):
                await self._step()
                await self._wait_for_news()
            if watch is not None:
                self._take_events(watch)

    async def _watch(self, stack: AsyncExitStack) -> TreeWatch | None:
        self._events_came = anyio.Event()
        self._scan_seconds = _SCAN_SECONDS
        try:
            return await stack.enter_async_context(TreeWatch(self.root, self._rouse))
        except OSError as error:
            self._event("watch_unavailable", folder=str(self.root), error=error.strerror or str(error))
            self._scan_seconds = _SCAN_SECONDS_UNWATCHED
            return None

    def _rouse(self) -> None:
        self._events_came.set()

    async def _listen(self, watch: TreeWatch) -> None:
        """Take in events as they come, also while a commit goes on: their time and order matter."""
        while True:
            await self._events_came.wait()
            self._events_came = anyio.Event()
            self._take_events(watch)

    def _take_events(self, watch: TreeWatch) -> None:
        batch, now = watch.drain(), anyio.current_time()
        files = {path: what for path, what in batch.files.items() if self._include(path)}
        self._hindered = next(reversed(files), self._hindered)
        if files or batch.rescan:
            due = self._moment.due()
            self._moment.take(Batch(files, batch.rescan, batch.implied), now)
            closed = batch.rescan or CLOSED in files.values()  # each look is a walk: not with every single write
            if self._moment.certain and self._moment.due() != due and closed:
                self._retry_at, self._hindrances = -math.inf, 0  # a new checkpoint: what hindered the last is past
            self._note_change(now)
            if batch.rescan:
                self._next_scan = min(self._next_scan, now + _SCAN_SOON_SECONDS)
            self._news.set()

    def _note_change(self, now: float) -> None:
        if self._changed_at is None:
            self._changed_at, self._warned = now, False

    async def _step(self) -> None:
        if anyio.current_time() >= self._next_scan:
            await self._scan()
        if self._requests:
            await self._answer()
        elif anyio.current_time() >= self._due() and self._frozen_at is None:
            await self._commit_moment()
        self._warn(anyio.current_time())

    def _due(self) -> float:
        interval = self._context.times.commit_interval
        apart = -math.inf if self._moment.certain else self._last_commit + interval
        if not self._context.permit.certain():  # whoever has the job by now must be able to take the head from us
            apart = max(apart, self._last_commit + max(interval, _DOUBT_SECONDS))
        return max(self._moment.due(), apart, self._retry_at)

    async def _wait_for_news(self) -> None:
        due = math.inf if self._frozen_at is not None else self._due()
        until = min(due, self._next_scan, anyio.current_time() + _LOOK_SECONDS)
        with anyio.move_on_after(max(0.0, until - anyio.current_time())):
            await self._news.wait()
        self._news = anyio.Event()

    async def _scan(self) -> None:
        """A scan is the truth; what it finds that no event told is a change like any other."""
        started = anyio.current_time()
        try:
            scan = await in_thread(self._committer.scan)
        except FileNotFoundError:
            self._next_scan = started + _LOOK_SECONDS
            return
        except LocalFileError as error:
            self._event("scan_failed", folder=str(self.root), error=str(error))
            self._next_scan = started + self._scan_seconds
            return
        now = anyio.current_time()
        self._next_scan = now + max(self._scan_seconds, _SCANS_APART * (now - started))
        self._report_left_out(scan)
        if not self._scanned:
            # What differs from the newest generation already came without an event.
            self._moment.scanned(replace(self._committer.committed(), link_times=scan.link_times), now)
            self._scanned = True
        self._moment.scanned(scan, now)
        if not self._committer.is_committed(scan):
            self._note_change(now)

    def _report_left_out(self, scan: TreeScan) -> None:
        for path, reason in scan.left_out.items():
            if path not in self._left_out:
                self._event("file_left_out", file=path, reason=reason)
        self._left_out = set(scan.left_out)

    def _warn(self, now: float) -> None:
        waited = 0.0 if self._changed_at is None else now - self._changed_at
        if not self._warned and waited >= self._context.times.max_wait:
            self._warned = True
            self._event("checkpoint_never_settles", folder=str(self.root), file=self._hindered, seconds=round(waited))

    # -- commits ---------------------------------------------------------------------------------------------------

    async def _commit_moment(self) -> None:
        """Commit a tree that may be complete; what fails is tried again later."""
        try:
            await self._commit(self._at_moment())
        except NotNowError as error:
            self._hindered = error.path
            self._retry_at = anyio.current_time() + min(_HINDERED_SECONDS, 0.2 * 2.0 ** min(self._hindrances, 8))
            self._hindrances += 1
        except FencedError as fenced:
            await self.holder.regain(fenced, self._context.permit)
        except (StoreError, LocalFileError) as error:
            delay = self._failures.next()
            self._retry_at = anyio.current_time() + delay
            self._event("commit_failed", folder=str(self.root), error=str(error), retry_in=round(delay, 3))

    async def _answer(self) -> None:
        """Commit the folder as it is, for those who asked for it."""
        requests, self._requests = self._requests, []
        refusal = None
        try:
            await self._commit(self._as_it_is())
        except FencedError as fenced:
            self._requests = requests
            await self.holder.regain(fenced, self._context.permit)
            return
        except SyncError as error:
            refusal = error
        newest = next(iter(self.holder.generations()), None)
        for request in requests:
            request.answer(newest, refusal)

    async def _commit(self, taking: Taking, result: Mapping[str, Any] | None = None) -> None:
        """One commit; what comes meanwhile is news."""
        changed_at, self._changed_at = self._changed_at, None
        try:
            kept = await self._committer.commit(taking, result=result)
        except BaseException:
            self._changed_at = changed_at if changed_at is not None else self._changed_at
            raise
        self._retry_at, self._hindrances = -math.inf, 0
        self._failures.reset()
        now = anyio.current_time()
        if kept is not None:
            self._last_commit = now
            behind = 0.0 if self._changed_at is None else now - self._changed_at
            if self._moment.due() <= now and behind > max(_BEHIND_SECONDS, self._context.times.commit_interval):
                self._event("uplink_too_slow", folder=str(self.root), minutes_at_risk=round(behind / 60, 1))

    def _at_moment(self) -> Taking:
        """When the moment says that the tree is complete, and the program lives on after nobody held it open."""
        moment, lived = self._moment, math.inf

        def looked() -> None:
            nonlocal lived
            lived = anyio.current_time() + LIVES_ON

        async def confirm() -> None:
            await anyio.sleep(max(0.0, lived - anyio.current_time()))
            if self._frozen_at is not None and self._frozen_at < lived:
                raise NotNowError(".", "was not known to be complete when the program ended")

        return Taking(
            late=lambda scan: moment.late(scan, anyio.current_time()),
            confirm=confirm,
            must_be_closed=moment.must_be_closed,
            begin=moment.begin,
            taken=moment.taken,
            looked=looked,
        )

    def _as_it_was(self) -> Taking:
        """When it was complete before the program's end: nothing may have been changed since that we know of."""
        moment = self._moment
        return Taking(
            late=lambda scan: moment.late(scan, anyio.current_time()) | moment.unheard(scan),
            confirm=_at_once,
            must_be_closed=moment.must_be_closed,
            begin=moment.begin,
            taken=moment.taken,
        )

    def _as_it_is(self) -> Taking:
        """When somebody says so."""
        return Taking(_none, _at_once, _none, self._moment.begin, self._moment.taken)

    # -- the end ---------------------------------------------------------------------------------------------------

    async def _finish(self, *, whole: bool) -> None:
        """Commit what the program left, as far as it may be; say that the job is complete, if it is."""
        if not whole and not self._was_settled():
            return None
        taking = self._as_it_is() if whole else self._as_it_was()
        give_up = anyio.current_time() + _LAST_SECONDS
        backoff = self._context.backoff()
        while True:
            try:
                if not await in_thread(self.root.is_dir):
                    return await self._finish_without()
                return await self._commit(taking, self._result)
            except NotNowError as error:
                if not whole:
                    return None
                if anyio.current_time() >= give_up:
                    self.refusal = LocalFileError(str(self.root / error.path), "is changed after the program's end")
                    return None
                await anyio.sleep(0.2)
            except FencedError as fenced:
                await self.holder.regain(fenced, self._context.permit)
            except TransientStoreError as error:
                delay = backoff.next()
                self._event("commit_failed", folder=str(self.root), error=str(error), retry_in=round(delay, 3))
                await anyio.sleep(delay)
            except (PermanentStoreError, LocalFileError) as error:
                self.refusal = error
                return None

    def _was_settled(self) -> bool:
        """Whether the tree was complete before the program's end, and not by it."""
        complete = max(self._moment.due(), self._moment.settled())
        return self._frozen_at is not None and complete <= self._frozen_at

    async def _finish_without(self) -> None:
        """The program removed the folder: that takes nothing from what is kept, nor from the job."""
        self._event("folder_replaced", folder=str(self.root))
        if self._result is not None:
            await self.holder.complete(self._result)

    def _event(self, name: str, **fields: object) -> None:
        self._context.on_event(name, fields)


def _none(_scan: TreeScan) -> set[str]:
    return set()


async def _at_once() -> None:
    return
