"""One attempt at a job: restore, deliver, flush. It is ended by the lease's end, and by the drain's deadline.

Whatever goes on is cancelled when the lease ends, and nothing more is changed. Nothing is done before it is durable.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from heeler.app.base import Assignment, Delivery
from heeler.checkpoints import Checkpoints
from heeler.drain import Drain
from heeler.folders import Files
from heeler.job import Ending, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.sources.base import Lease, LeaseState
from heeler.status import Phase, Status
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

_RELEASE_DELAY = 5.0
_HANDOVER_SECONDS = 1500.0
"""Of a job whose queue is about to take it away (half an hour before): for its program's end and the flush."""
_HANDOVER = "the queue takes every job away after a time: handed back before that"
_KEPT_BODY_BYTES = 256 << 10
"""An answer up to this size is kept with a job's last generation, to be told again if the job comes again."""

_FOR_GOOD = (UnsafeKeyError, PrefixTakenError, UnfencedStoreError, DamagedHeadError, NoGenerationError)
"""Why a restore fails on every machine, until a person has mended something."""


class Attempt:
    """One attempt, with folders of its own."""

    def __init__(
        self,
        lease: Lease,
        keeper: LeaseKeeper,
        files: Files,
        delivery: Delivery,
        drain: Drain,
        status: Status,
        checkpoints: Checkpoints,
        give_way: Callable[[Files], Awaitable[None]],
    ) -> None:
        """Args: `give_way` is called when only the outputs are still to be made durable."""
        self._give_way = give_way
        self._lease = lease
        self._keeper = keeper
        self._files = files
        self._delivery = delivery
        self._worker_drain = self._drain = drain
        self._status = status
        self._checkpoints = checkpoints

    async def run(self) -> Ending:
        """Work until the attempt ends, the lease ends, or the drain leaves just enough time to tell the queue."""
        with self._worker_drain.of_one_job(self._keeper.ending, _HANDOVER, _HANDOVER_SECONDS) as self._drain:
            return await self._run()

    async def _run(self) -> Ending:
        ending = None
        with self._keeper.ended.ends(), self._drain.until_nearly_over():
            if not self._keeper.ended.is_set():  # between two tries: work without folders reaches the app uncancelled
                ending = await self._work()
        if self._keeper.state is LeaseState.CANCELLED:
            return Ending(Outcome.CANCELLED, "cancelled")
        if self._keeper.state is LeaseState.LOST:
            return Ending(Outcome.LOST, "another worker has it")
        if ending is None:
            self._status.fault("grace_over", unsent_seconds=round(await self._files.reserve(), 1))
        return ending or Ending(Outcome.RELEASE, "the grace period was over before all was sent")

    async def _work(self) -> Ending:
        try:
            if not await self._restore():
                return Ending(Outcome.RELEASE, self._drain.words)
        except FinishedError as finished:
            return Ending(Outcome.DONE, "it was done already", Result.from_json(finished.result))
        except FencedError as error:
            return self._fenced(error)
        except SyncError as error:
            return self._restore_failed(error)
        try:
            ending = await self._deliver()
            if ending.outcome is Outcome.DONE:
                await self._give_way(self._files)
                await self._files.publish()
                if (result := _kept(ending)) is not None:
                    await self._files.complete(result)
        except FencedError as error:
            return self._fenced(error)
        except SyncError as error:
            self._status.fault("upload_failed", error=str(error))
            interrupted = self._drain.requested.is_set()
            return Ending(Outcome.RELEASE if interrupted else Outcome.RETRY, f"its files can't be stored: {error}")
        return ending

    async def _restore(self) -> bool:
        """Whether the folders are ready; a drain ends it early, since nothing is lost by that."""
        self._status.tell_unsent(self._files.unsent)
        self._status.enter(Phase.RESTORE)
        ready = False
        with self._drain.requested.ends():
            await self._files.restore()
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

    async def _deliver(self) -> Ending:
        async with self._files.watching():
            self._status.enter(Phase.RUN)
            assignment = Assignment(
                self._lease.job, self._lease.attempt, self._files.environment, self._files.reserve, self._files.freeze
            )
            with self._checkpoints.taken_by(self._files.checkpoint):
                ending = await self._delivery.deliver(assignment, self._drain)
            self._status.enter(Phase.UPLOAD)
            await self._files.flush(whole=ending.whole, result=_kept(ending))
        return ending


def _kept(ending: Ending) -> Result | None:
    """What the checkpoints may say of a job that is done: all of its answer, or nothing, so that it is asked anew."""
    if ending.outcome is not Outcome.DONE or len(ending.result.body) > _KEPT_BODY_BYTES:
        return None
    return ending.result
