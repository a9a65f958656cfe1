"""The loop: receive, restore, deliver, flush, settle. It knows protocols only; the supervisor wires them.

One job at a time. While a job is ours, a keeper extends its lease; when the lease ends, whatever is going on is
cancelled and nothing more is changed or reported. Nothing is reported done before its files are durable.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial

import anyio

from heeler.app.base import Assignment, Delivery
from heeler.checkpoints import Checkpoints
from heeler.drain import Drain
from heeler.folders import Files, OpenFiles
from heeler.job import Ending, InvalidJobError, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.sources.base import Lease, LeaseLostError, LeaseState, Source, SourceUnavailableError
from heeler.status import Phase, Status
from heeler.tasks import background
from heeler_sync.errors import (
    DamagedHeadError,
    FencedError,
    FinishedError,
    FolderBusyError,
    LocalFileError,
    NoGenerationError,
    PermanentStoreError,
    PrefixTakenError,
    SyncError,
    UnfencedStoreError,
    UnsafeKeyError,
)

_RECEIVE_SECONDS = 20.0
_SETTLE_RETRY = (0.2, 5.0)
_RELEASE_DELAY = 5.0
_UNWIND_SECONDS = 0.3
_LONGEST_DELAY = 300.0

_FOR_GOOD = (UnsafeKeyError, PrefixTakenError, UnfencedStoreError, DamagedHeadError, NoGenerationError)
"""Why a restore fails on every machine, until a person has mended something."""


class Forwarder:
    """Takes jobs until it is told to stop, or until its limits say so."""

    def __init__(
        self,
        source: Source,
        delivery: Delivery,
        open_files: OpenFiles,
        drain: Drain,
        status: Status,
        checkpoints: Checkpoints | None = None,
        *,
        rng: random.Random,
        retry_delay: float = 2.0,
        max_jobs: int | None = None,
        exit_when_idle: float | None = None,
    ) -> None:
        """Args.

        source: Where jobs come from.
        delivery: How they reach the program.
        open_files: Makes a job's folders.
        drain: Tells when to stop.
        status: Told of all that happens.
        checkpoints: Told whose checkpoints may be asked for.
        rng: Where jitter comes from.
        retry_delay: Seconds before a failed job's second attempt; doubles with each.
        max_jobs: Stop after so many jobs.
        exit_when_idle: Stop after so many seconds without a job.
        """
        self._source = source
        self._delivery = delivery
        self._open_files = open_files
        self._drain = drain
        self._status = status
        self._checkpoints = checkpoints or Checkpoints()
        self._rng = rng
        self._retry_delay = retry_delay
        self._max_jobs = max_jobs
        self._exit_when_idle = exit_when_idle

    async def run(self) -> None:
        """Take and handle jobs one after another; returns in a drain, at `max_jobs`, when idle or exhausted."""
        handled = 0
        while self._max_jobs is None or handled < self._max_jobs:
            lease = await self._receive()
            if lease is None:
                return
            ending = await self._handle(lease)
            handled += ending.outcome not in (Outcome.RELEASE, Outcome.LOST)

    async def _receive(self) -> Lease | None:
        """The next lease; None when there is to be no other."""
        self._status.enter(Phase.RECEIVE)
        idle_until = None if self._exit_when_idle is None else anyio.current_time() + self._exit_when_idle
        backoff = _Doubling(*_SETTLE_RETRY, self._rng)
        while not self._drain.requested.is_set():
            wait = _RECEIVE_SECONDS
            if idle_until is not None:
                wait = min(wait, max(0.0, idle_until - anyio.current_time()))
            try:
                lease = await self._receive_once(wait)
            except SourceUnavailableError as error:
                delay = backoff.next()
                self._status.fault("queue_unreachable", error=str(error), retry_in=round(delay, 3))
                with anyio.move_on_after(delay):
                    await self._drain.requested.wait()
                continue
            if lease is not None:
                return lease
            if self._source.verdict() is not None:
                return None
            if idle_until is not None and anyio.current_time() >= idle_until:
                self._status.event("idle", seconds=self._exit_when_idle)
                return None
            backoff.reset()
        return None

    async def _receive_once(self, wait: float) -> Lease | None:
        """One call, ended by a drain. A lease that was taken all the same is returned and then handled as drained."""
        lease = None
        with anyio.CancelScope() as scope:
            async with background(partial(_cancel_after, self._drain.requested.wait, scope)):
                lease = await self._source.receive(wait=wait)
        return lease

    async def _handle(self, lease: Lease) -> Ending:
        """One attempt from the lease to the queue's answer."""
        self._status.take(lease.job.id, lease.attempt)
        keeper = LeaseKeeper(lease, self._keeper_event, rng=self._rng)
        try:
            files = self._open_files(lease, keeper)
        except InvalidJobError as error:
            async with background(keeper.keep):
                ending, _ = await self._settle(lease, keeper, Ending(Outcome.FAIL, str(error)))
        else:
            ending = await self._handle_files(lease, keeper, files)
        self._status.drop()
        return ending

    async def _handle_files(self, lease: Lease, keeper: LeaseKeeper, files: Files) -> Ending:
        keeper.durable = files.durable
        worked = anyio.Event()
        try:
            async with background(keeper.keep, partial(self._release_late, lease, worked)):
                ending = await self._attempt(lease, keeper, files)
                worked.set()
                if files.durable():
                    ending = replace(ending, fruitless=False)
                ending, told = await self._settle(lease, keeper, ending)
            if told and ending.outcome is Outcome.DONE:
                await files.discard()
        finally:
            files.close()
        return ending

    async def _release_late(self, lease: Lease, worked: anyio.Event) -> None:
        """Near the drain's deadline, hand the job back although a call to storage or disk does not end.

        The process ends at the deadline, and the call with it.
        """
        await self._drain.nearly_over()
        with anyio.move_on_after(_UNWIND_SECONDS):
            await worked.wait()
        if not worked.is_set():
            self._status.fault("grace_over", error="a call to storage or disk does not end")
            with suppress(LeaseLostError):  # then there is nothing to hand back
                await self._tell(lease, Ending(Outcome.RELEASE, "the grace period was over before all was sent"))

    def _keeper_event(self, name: str, fields: dict[str, object]) -> None:
        wanted = name in ("cancelled", "lease_confirmed_again")
        (self._status.event if wanted else self._status.fault)(name, **fields)

    async def _attempt(self, lease: Lease, keeper: LeaseKeeper, files: Files) -> Ending:
        """Work until the attempt ends, the lease ends, or the drain leaves just enough time to tell the queue."""
        ending = None
        with anyio.CancelScope() as scope:
            async with background(
                partial(_cancel_after, keeper.ended.wait, scope),
                partial(_cancel_after, self._drain.nearly_over, scope),
            ):
                ending = await self._work(lease, files)
        if keeper.state is LeaseState.CANCELLED:
            return Ending(Outcome.CANCELLED, "cancelled")
        if keeper.state is LeaseState.LOST:
            return Ending(Outcome.LOST, "another worker has it")
        if ending is None:
            self._status.fault("grace_over", unsent_seconds=round(await files.reserve(), 1))
        return ending or Ending(Outcome.RELEASE, "the grace period was over before all was sent")

    async def _work(self, lease: Lease, files: Files) -> Ending:
        try:
            if not await self._restore(files):
                return Ending(Outcome.RELEASE, "the worker was told to stop")
        except FinishedError as finished:
            return Ending(Outcome.DONE, "it was done already", Result.from_json(finished.result))
        except FencedError as error:
            return self._fenced(error)
        except SyncError as error:
            return self._restore_failed(error)
        try:
            ending = await self._run(lease, files)
            if ending.outcome is Outcome.DONE:
                await files.publish()
                await files.complete(ending.result)
        except FencedError as error:
            return self._fenced(error)
        except SyncError as error:
            self._status.fault("upload_failed", error=str(error))
            interrupted = self._drain.requested.is_set()
            return Ending(Outcome.RELEASE if interrupted else Outcome.RETRY, f"its files can't be stored: {error}")
        return ending

    async def _restore(self, files: Files) -> bool:
        """Whether the folders are ready; a drain ends it early, since nothing is lost by that."""
        self._status.enter(Phase.RESTORE)
        ready = False
        with anyio.CancelScope() as scope:
            async with background(partial(_cancel_after, self._drain.requested.wait, scope)):
                await files.restore()
                ready = True
        return ready and not self._drain.requested.is_set()

    def _fenced(self, error: FencedError) -> Ending:
        """Storage knows before us: another worker has the job."""
        self._status.fault("fenced", error=str(error), holder=error.holder, epoch=error.epoch)
        return Ending(Outcome.LOST, "another worker has it")

    def _restore_failed(self, error: SyncError) -> Ending:
        """Never "start from zero": the job's own fault fails it, the machine's sends it elsewhere."""
        self._status.fault("restore_failed", error=str(error))
        if isinstance(error, _FOR_GOOD):
            return Ending(Outcome.FAIL, str(error))
        if isinstance(error, LocalFileError) or not isinstance(error, PermanentStoreError):
            fruitless = not isinstance(error, FolderBusyError)
            reason = f"its files can't be restored here: {error}"
            return Ending(Outcome.RELEASE, reason, delay=_RELEASE_DELAY, fruitless=fruitless)
        return Ending(Outcome.RETRY, f"its files can't be restored: {error}")

    async def _run(self, lease: Lease, files: Files) -> Ending:
        async with files.watching():
            self._status.enter(Phase.RUN)
            assignment = Assignment(lease.job, lease.attempt, files.environment, files.reserve, files.freeze)
            with self._checkpoints.taken_by(files.checkpoint):
                ending = await self._delivery.deliver(assignment, self._drain)
            self._status.enter(Phase.UPLOAD)
            await files.flush(whole=ending.whole, result=ending.result if ending.outcome is Outcome.DONE else None)
        return ending

    async def _settle(self, lease: Lease, keeper: LeaseKeeper, ending: Ending) -> tuple[Ending, bool]:
        """Tell the queue, as often as it takes while the job is ours and our time is not over.

        Returns:
            What became of the job, which may be that it was lost, and whether the queue knows.
        """
        self._status.enter(Phase.SETTLE)
        if ending.outcome is Outcome.RETRY:
            delay = min(_LONGEST_DELAY, self._retry_delay * 2.0 ** min(lease.attempt - 1, 20))
            ending = replace(ending, delay=delay * self._rng.uniform(0.5, 1.0))
        told = False
        backoff = _Doubling(*_SETTLE_RETRY, self._rng)
        with anyio.CancelScope() as scope:
            async with background(
                partial(_cancel_after, keeper.ended.wait, scope), partial(_cancel_after, self._drain.over, scope)
            ):
                try:
                    while not (told := await self._tell(lease, ending)):  # noqa: ASYNC110 - a retry, not a poll
                        await anyio.sleep(backoff.next())
                except LeaseLostError as error:
                    self._status.fault("lease_lost", error=str(error))
                    ending, told = Ending(Outcome.LOST, "another worker has it"), True
        self._status.settled(ending, told=told)
        return ending, told

    async def _tell(self, lease: Lease, ending: Ending) -> bool:
        if ending.outcome in (Outcome.LOST, Outcome.CANCELLED):
            return True
        reason = self._status.clean(ending.reason)
        try:
            if ending.outcome is Outcome.DONE:
                await lease.complete(ending.result)
            elif ending.outcome is Outcome.RETRY:
                await lease.retry(reason, result=ending.result, delay=ending.delay)
            elif ending.outcome is Outcome.FAIL:
                await lease.fail(reason, result=ending.result)
            else:
                await lease.release(reason, delay=ending.delay, fruitless=ending.fruitless)
        except SourceUnavailableError as error:
            self._status.fault("queue_unreachable", error=str(error))
            return False
        return True


class _Doubling:
    """Delays that double from `first` to `longest`, with jitter."""

    def __init__(self, first: float, longest: float, rng: random.Random) -> None:
        self._first = first
        self._longest = longest
        self._rng = rng
        self._next = first

    def next(self) -> float:
        delay, self._next = self._next, min(self._longest, self._next * 2)
        return delay * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._next = self._first


async def _cancel_after(happens: Callable[[], Awaitable[object]], scope: anyio.CancelScope) -> None:
    await happens()
    scope.cancel()
