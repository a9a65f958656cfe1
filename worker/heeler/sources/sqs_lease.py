"""A message that is ours for a while."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from heeler.job import Job, Result
from heeler.sources.base import BARREN_LIMIT, LeaseLostError, LeaseState
from heeler.sources.sqs_batch import Batcher
from heeler.sources.sqs_calls import Change
from heeler.sources.sqs_dead import DeadLetters
from heeler.sources.sqs_message import Message

LONGEST_SECONDS = 43_200
"""Twelve hours after its receive a message is visible again, whatever was asked."""
_SETTLE_WITHIN = 0.005
_EXTEND_WITHIN = 0.2
_PART_OF_LEASE = 30
"""An extension waits for others for that part of the lease at the most."""


@dataclass(frozen=True)
class Queue:
    """What all leases of a queue share.

    Attributes:
        name: For the app.
        visibility: Seconds of one extension.
        hides: Changes of visibility.
        deletes: Deletions.
        dead: Where messages go that failed for good.
        clock: Seconds; goes on while the machine sleeps.
        on_fault: Told an event's name and fields.
    """

    name: str
    visibility: int
    hides: Batcher
    deletes: Batcher
    dead: DeadLetters
    clock: Callable[[], float]
    on_fault: Callable[..., None]


class SqsLease:
    """Owns what we know of one receive of a message.

    Once it has lapsed by our own clock it is lost, whatever SQS says: of a standard queue an old handle may still be
    taken, and with it we would change or delete what another worker has.
    """

    def __init__(self, queue: Queue, message: Message) -> None:
        """Args: the queue, and the message, just received."""
        self._queue = queue
        self._message = message
        self._job = message.job(queue.name)
        self._until = message.received + queue.visibility
        self._lost = False
        self._settled = False
        self._sent = False
        self._progressed = False

    @property
    def job(self) -> Job:
        """The job."""
        return self._job

    @property
    def attempt(self) -> int:
        """SQS's count of receives."""
        return self._message.receives

    @property
    def attempts_ordered(self) -> bool:
        """SQS counts them."""
        return True

    @property
    def expires_after(self) -> float:
        """The visibility that we ask for."""
        return float(self._queue.visibility)

    @property
    def spends_tries(self) -> bool:
        """With a redrive policy every receive is one of few; without one, a rest costs nothing."""
        return self._queue.dead.receives is not None

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Lease.listen`: it has to be asked."""

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """As `Lease.extend`; it is lost once less than a whole visibility is left of the twelve hours."""
        self._progressed |= progressed
        clock, visibility = self._queue.clock, self._queue.visibility
        if self._lost or self._settled or self._left() < visibility:
            self._lost = True
            return LeaseState.LOST
        asked_at = clock()
        within = min(_EXTEND_WITHIN, visibility / _PART_OF_LEASE)
        try:
            await self._queue.hides.call(Change(self._message.handle, visibility), within=within)
        except LeaseLostError:
            self._lost = True
        if self._lost or self._settled or clock() >= self._until:
            self._lost = True
            return LeaseState.LOST
        self._until = asked_at + visibility
        return LeaseState.HELD

    async def complete(self, result: Result) -> None:
        """As `Lease.complete`: the message is deleted. Without a bucket nobody keeps the result."""
        del result
        if not self._over():
            await self._delete()

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`. Failures can't be told from interruptions: each receive counts as one."""
        del result
        if self._over():
            return
        if self.attempt >= self._queue.dead.tries(self._message):
            await self._set_aside(reason)
        else:
            await self._hide(delay)

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `Lease.fail`."""
        del result
        if not self._over():
            await self._set_aside(reason)

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`. What was made durable in earlier attempts is not known here."""
        if self._over():
            return
        if fruitless and not self._progressed and self.attempt >= BARREN_LIMIT:
            await self._set_aside(f"{self.attempt} attempts without an end or anything durable, last: {reason}")
            return
        await self._hide(delay)
        if self._queue.dead.receives is not None and self.attempt >= self._queue.dead.receives:
            self._queue.on_fault("redrive_takes_job", message=self._message.id, receives=self.attempt)

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: the message is deleted."""
        if not self._over():
            await self._delete()

    def _over(self) -> bool:
        """Whether it is settled already.

        Raises:
            LeaseLostError: It is no longer ours to settle.
        """
        if self._settled:
            return True
        if self._lost or self._queue.clock() >= self._until:
            self._lost = True
            raise LeaseLostError("the message may be visible to others")
        return False

    async def _set_aside(self, reason: str) -> None:
        """To the dead-letter queue first, then away from here; without one it stays, hidden for as long as can be."""
        if not self._sent:
            self._sent = await self._queue.dead.send(self._message, reason)
        if self._sent:
            await self._delete()
            return
        await self._hide(LONGEST_SECONDS)
        self._queue.on_fault("job_kept", error=f"it failed for good, and there is no dead-letter queue: {reason}")

    async def _hide(self, delay: float) -> None:
        seconds = max(0, min(math.ceil(delay), self._left()))
        await self._queue.hides.call(Change(self._message.handle, seconds), within=_SETTLE_WITHIN)
        self._settled = True

    async def _delete(self) -> None:
        await self._queue.deletes.call(Change(self._message.handle), within=_SETTLE_WITHIN)
        self._settled = True

    def _left(self) -> int:
        """Whole seconds of the twelve hours that are left."""
        return LONGEST_SECONDS - 1 - math.ceil(self._queue.clock() - self._message.received)
