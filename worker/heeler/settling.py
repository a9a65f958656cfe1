"""Telling the queue how an attempt ended, as often as it takes while the job is ours and our time is not over."""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, suppress
from dataclasses import replace

import anyio

from heeler.drain import Drain
from heeler.job import Ending, Outcome
from heeler.lease import LeaseKeeper
from heeler.scopes import Doubling
from heeler.sources.base import JobCancelledError, Lease, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.status import Phase, Status

RETRY = (0.2, 5.0)
"""Seconds between two tries of a call to the queue: the first, and the longest."""
_UNWIND_SECONDS = 0.3
_LONGEST_DELAY = 300.0
_WITHDRAW_SECONDS = 10.0


class Settling:
    """Settles leases."""

    def __init__(self, drain: Drain, status: Status, rng: random.Random, retry_delay: float) -> None:
        """Args: `retry_delay` are the seconds before a failed job's second attempt; they double with each."""
        self._drain = drain
        self._status = status
        self._rng = rng
        self._retry_delay = retry_delay

    async def release_late(self, lease: Lease, worked: anyio.Event) -> None:
        """Near the deadline of a drain, hand the job back although a call to storage or disk does not end.

        To be started when the drain has begun. The process ends at the deadline, and the call with it.
        """
        with self._drain.until_nearly_over():
            await worked.wait()
            return
        with anyio.move_on_after(_UNWIND_SECONDS):
            await worked.wait()
        if not worked.is_set():
            self._status.fault("grace_over", error="a call to storage or disk does not end")
            with suppress(LeaseLostError):  # then there is nothing to hand back
                await self._tell(lease, Ending(Outcome.RELEASE, "the grace period was over before all was sent"))

    async def settle(self, lease: Lease, keeper: LeaseKeeper, ending: Ending) -> tuple[Ending, bool]:
        """Tell the queue, as often as it takes while the job is ours and our time is not over.

        Returns:
            What became of the job, which may be that it was lost, and whether the queue knows.
        """
        self._status.enter(Phase.SETTLE)
        if ending.outcome is Outcome.RETRY:
            delay = min(_LONGEST_DELAY, self._retry_delay * 2.0 ** min(lease.attempt - 1, 20))
            ending = replace(ending, delay=max(ending.delay, delay * self._rng.uniform(0.5, 1.0)))
        try:
            told = await self._tell_while_ours(lease, keeper, ending)
            cancelled = not told and keeper.state is LeaseState.CANCELLED
        except JobCancelledError:
            told, cancelled = False, True
        except LeaseLostError as error:
            return self._lost(error)
        try:
            if cancelled and ending.outcome is not Outcome.CANCELLED:
                ending = Ending(Outcome.CANCELLED, "cancelled")
                told = await self._tell_while_ours(lease, keeper, ending)
        except LeaseLostError as error:
            return self._lost(error)
        if not told and keeper.state is LeaseState.LOST:
            ending = Ending(Outcome.LOST, "another worker has it")
        self._status.settled(ending, told=told)
        return ending, told

    def _lost(self, error: LeaseLostError) -> tuple[Ending, bool]:
        self._status.fault("lease_lost", error=str(error))
        ending = Ending(Outcome.LOST, "another worker has it")
        self._status.settled(ending, told=True)
        return ending, True

    async def _tell_while_ours(self, lease: Lease, keeper: LeaseKeeper, ending: Ending) -> bool:
        """Whether the queue knows."""
        with self._while_ours(keeper, ending), self._drain.until_over():
            return await self._tell_at_last(lease, ending)
        return False

    def _while_ours(self, keeper: LeaseKeeper, ending: Ending) -> AbstractContextManager[anyio.CancelScope]:
        """How long the queue may be told; of a cancelled job, whose lease has ended, not for long."""
        if ending.outcome is Outcome.CANCELLED:
            return anyio.move_on_after(_WITHDRAW_SECONDS)
        return keeper.ended.ends()

    async def _tell_at_last(self, lease: Lease, ending: Ending) -> bool:
        """Tell the queue again and again, until it knows."""
        backoff = Doubling(*RETRY, self._rng)
        while not await self._tell(lease, ending):  # noqa: ASYNC110 - a retry, not a poll
            await anyio.sleep(backoff.next())
        return True

    async def _tell(self, lease: Lease, ending: Ending) -> bool:
        if ending.outcome is Outcome.LOST:
            return True
        reason = self._status.clean(ending.reason)
        try:
            if ending.outcome is Outcome.DONE:
                await lease.complete(ending.result)
            elif ending.outcome is Outcome.RETRY:
                await lease.retry(reason, result=ending.result, delay=ending.delay)
            elif ending.outcome is Outcome.FAIL:
                await lease.fail(reason, result=ending.result)
            elif ending.outcome is Outcome.CANCELLED:
                await lease.withdraw()
            else:
                await lease.release(reason, delay=ending.delay, fruitless=ending.fruitless)
        except SourceUnavailableError as error:
            self._status.fault("queue_unreachable", error=str(error))
            return False
        return True
