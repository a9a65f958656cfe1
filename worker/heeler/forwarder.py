"""The loop: receive, restore, deliver, flush, settle. It knows protocols only; the supervisor wires them.

Each lane has one job at a time; one that only uploads its outputs may give way to the next. While a job is ours, a
keeper extends its lease; when the lease ends, whatever is going on is cancelled and nothing more is changed or
reported. Nothing is reported done before its files are durable.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import anyio

from heeler.app.base import Delivery
from heeler.attempt import Attempt
from heeler.checkpoints import Checkpoints
from heeler.drain import Drain
from heeler.folders import Files, OpenFiles
from heeler.job import Ending, InvalidJobError, Outcome
from heeler.lease import LeaseKeeper
from heeler.platform.failures import FailuresInARow
from heeler.scopes import Doubling
from heeler.settling import RETRY, Settling
from heeler.sources.base import Lease, Source, SourceUnavailableError
from heeler.status import Phase, Status
from heeler.tasks import alongside

_RECEIVE_SECONDS = 20.0
_HERE_AGAIN = (1.0, 30.0)
_LONGEST_HERE = 300.0
"""Seconds: an app that wants to rest for longer does so without a job that is ours."""
_PAUSE_SECONDS = 5.0
_TELL_SECONDS = 0.5
"""What a pause leaves of a drain's last second, in which the queue is told."""


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
        failures: FailuresInARow | None = None,
        *,
        rng: random.Random,
        retry_delay: float = 2.0,
        max_jobs: int | None = None,
        exit_when_idle: float | None = None,
        concurrency: int = 1,
        tries: int = 1,
        overlap: bool = False,
        once: bool = False,
    ) -> None:
        """Args.

        source: Where jobs come from.
        delivery: How they reach the program.
        open_files: Makes a job's folders.
        drain: Tells when to stop.
        status: Told of all that happens.
        checkpoints: Told whose checkpoints may be asked for.
        failures: Says when so many jobs failed here that no other is to be taken.
        rng: Where jitter comes from.
        retry_delay: Seconds before a failed job's second attempt; doubles with each.
        max_jobs: Stop after so many jobs.
        exit_when_idle: Stop after so many seconds without a job.
        concurrency: How many jobs at a time.
        tries: How often a job that failed for a passing reason is tried here before a try of the queue is spent.
        overlap: Whether the next job is taken while the outputs of the last one upload.
        once: Stop after one job whose program may have run, however it ended; `max_jobs` is not used then.
        """
        self._source = source
        self._delivery = delivery
        self._open_files = open_files
        self._drain = drain
        self._status = status
        self._checkpoints = checkpoints or Checkpoints()
        self._failures = failures or FailuresInARow(None)
        self._settling = Settling(drain, status, rng, retry_delay)
        self._rng = rng
        self._once = once
        self._left = 1 if once else max_jobs
        self._exit_when_idle = exit_when_idle
        self._concurrency = concurrency
        self._tries = tries
        self._overlap = overlap
        self._floor = anyio.Semaphore(concurrency, fast_acquire=True)
        """So many jobs may be anywhere but in the upload of their outputs."""
        self._over = False
        self._busy = 0
        self.used = False
        """Whether the program of a job may have run here."""
        self.idle = False
        """Whether it ended because there was no job for `exit_when_idle`."""
        self._last_job = 0.0

    async def run(self) -> None:
        """Take and handle jobs; returns in a drain, at `max_jobs`, when idle or exhausted, or without a program."""
        self._last_job = anyio.current_time()
        lanes = self._concurrency * (2 if self._overlap else 1)
        if lanes == 1:
            await self._lane()
            return
        self._status.enter(Phase.RECEIVE)
        async with alongside(*[self._shown_lane] * lanes):
            pass

    async def _shown_lane(self) -> None:
        with self._status.lane():
            await self._lane()

    async def _lane(self) -> None:
        """One job after another."""
        more = True
        while more:
            async with _Turn(self._floor) as turn:
                more = await self._one_job(turn)

    async def _one_job(self, turn: _Turn) -> bool:
        """Take one job and handle it; whether there may be another."""
        if self._over or self._failures.reason is not None or not self._take_slot():
            return False
        lease = await self._receive()
        if lease is None:
            self._give_slot_back()
            self._over = True
            return False
        self._busy += 1
        try:
            ending = await self._handle(lease, turn)
        finally:
            self._busy -= 1
            self._last_job = anyio.current_time()
        if not self._counts(ending):
            self._give_slot_back()
        return True

    def _counts(self, ending: Ending) -> bool:
        """Whether the job was one of those after which we stop."""
        return self.used if self._once else _is_end(ending)

    def _take_slot(self) -> bool:
        if self._left is None:
            return True
        if self._left <= 0:
            return False
        self._left -= 1
        return True

    def _give_slot_back(self) -> None:
        if self._left is not None:
            self._left += 1

    async def _receive(self) -> Lease | None:
        """The next lease; None when there is to be no other."""
        self._status.enter(Phase.RECEIVE)
        backoff = Doubling(*RETRY, self._rng)
        while not self._drain.requested.is_set() and self._failures.reason is None:
            try:
                lease = await self._receive_once(self._patience())
            except SourceUnavailableError as error:
                delay = backoff.next()
                self._status.fault("queue_unreachable", error=str(error), retry_in=round(delay, 3))
                with anyio.move_on_after(delay):
                    await self._drain.requested.wait()
                continue
            if lease is not None:
                return lease
            if self._source.verdict() is not None or self._delivery.given_up() is not None:
                return None
            if self._exit_when_idle is not None and self._idle_for() >= self._exit_when_idle:
                self._status.event("idle", seconds=self._exit_when_idle)
                self.idle = True
                return None
            backoff.reset()
        return None

    def _patience(self) -> float:
        """Seconds to wait for a job in one call."""
        if self._exit_when_idle is None:
            return _RECEIVE_SECONDS
        return min(_RECEIVE_SECONDS, max(0.0, self._exit_when_idle - self._idle_for()))

    def _idle_for(self) -> float:
        return 0.0 if self._busy else anyio.current_time() - self._last_job

    async def _receive_once(self, wait: float) -> Lease | None:
        """One call, while a job can be delivered; ended by a drain. A lease that was taken all the same is returned."""
        lease = None
        with self._drain.requested.ends():
            if not self._delivery.available:
                await self._source.pause()
                if not await self._delivery.ready():
                    return None
                self._last_job = anyio.current_time()  # before it was ready, nobody was idle
            with self._delivery.unready.ends():
                lease = await self._source.receive(wait=wait)
        return lease

    async def _handle(self, lease: Lease, turn: _Turn) -> Ending:
        """From the lease to the queue's answer."""
        self._status.take(lease.job.id, lease.attempt)
        keeper = LeaseKeeper(lease, self._keeper_event, rng=self._rng)
        try:
            async with alongside(keeper.keep):
                try:
                    ending = await self._try_here(lease, keeper, turn)
                finally:
                    keeper.rest()
        finally:
            self._status.drop()
        return ending

    def _keeper_event(self, name: str, fields: dict[str, object]) -> None:
        wanted = name in ("cancelled", "lease_confirmed_again")
        (self._status.event if wanted else self._status.fault)(name, **fields)

    async def _try_here(self, lease: Lease, keeper: LeaseKeeper, turn: _Turn) -> Ending:
        """Attempts on this machine, until one ends otherwise than by a passing fault or the tries are used up."""
        tries = self._tries if lease.spends_tries else 1
        backoff = Doubling(*_HERE_AGAIN, self._rng)
        while True:
            tries -= 1
            try:
                files = self._open_files(lease, keeper)
            except InvalidJobError as error:
                return await self._settle(lease, keeper, Ending(Outcome.FAIL, str(error)))
            ending, settled = await self._with_files(lease, keeper, files, turn, last=tries <= 0)
            if settled:
                return ending
            self._status.enter(Phase.RESTORE)
            with anyio.move_on_after(max(ending.delay, backoff.next())), keeper.ended.ends():
                await self._drain.requested.wait()

    async def _with_files(
        self, lease: Lease, keeper: LeaseKeeper, files: Files, turn: _Turn, *, last: bool
    ) -> tuple[Ending, bool]:
        """One attempt, and unless it is to be made again here (False), the queue's answer."""
        keeper.durable = files.durable
        worked = anyio.Event()
        try:
            async with self._drain.requested.starts(partial(self._settling.release_late, lease, worked)):
                attempt = Attempt(
                    lease,
                    keeper,
                    files,
                    self._delivery,
                    self._drain,
                    self._status,
                    self._checkpoints,
                    partial(self._give_way, turn),
                )
                ending = await attempt.run()
                self.used = self.used or self._status.phase not in (Phase.RECEIVE, Phase.RESTORE)
                worked.set()
                again = ending.transient and ending.delay <= _LONGEST_HERE
                if again and not last and not self._drain.requested.is_set():
                    self._status.fault("tried_again_here", error=ending.reason)
                    return ending, False
                if files.durable():
                    ending = replace(ending, fruitless=False)
                return await self._settle(lease, keeper, ending, files), True
        finally:
            files.close()

    async def _give_way(self, turn: _Turn, files: Files) -> None:
        """Let the next job begin, if another is wanted and the outputs of this one are out of its way."""
        wanted = self._overlap and not self._over and (self._left is None or self._left > 0)
        stopping = self._drain.requested.is_set() or self._failures.reason is not None
        if wanted and not stopping and await files.set_apart():
            turn.leave()

    async def _settle(self, lease: Lease, keeper: LeaseKeeper, ending: Ending, files: Files | None = None) -> Ending:
        if not self._goes_on(ending):
            with anyio.move_on_after(_PAUSE_SECONDS), self._drain.deadline.ends(_TELL_SECONDS):
                await self._source.pause()
        ending, told = await self._settling.settle(lease, keeper, ending)
        keeper.rest()  # an extension now would find a lease that is settled
        self._failures.settled(ending)
        if told and ending.outcome is Outcome.DONE and files is not None:
            await files.discard()
        return ending

    def _goes_on(self, ending: Ending) -> bool:
        """Whether another job is wanted after this one."""
        over = self._failures.enough_with(ending) or (
            self._counts(ending) and self._left is not None and self._left <= 0
        )
        return not over and not self._drain.requested.is_set() and self._delivery.available


def _is_end(ending: Ending) -> bool:
    """Whether the job is over here, and not interrupted."""
    return ending.outcome not in (Outcome.RELEASE, Outcome.LOST)


class _Turn:
    """One job's place among those that run; left at the end of the block at the latest."""

    def __init__(self, floor: anyio.Semaphore) -> None:
        self._floor = floor
        self._held = False

    async def __aenter__(self) -> _Turn:
        await self._floor.acquire()
        self._held = True
        return self

    async def __aexit__(self, *_error: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Let another job begin."""
        if self._held:
            self._held = False
            self._floor.release()
