"""A message that is ours for a while."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from heeler.job import Job, Result
from heeler.sources.base import BARREN_LIMIT, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.sources.facts import MessageFacts
from heeler.sources.sqs_batch import Batcher
from heeler.sources.sqs_calls import Change, RefusedError
from heeler.sources.sqs_dead import FAILURES, DeadLetters
from heeler.sources.sqs_message import Message

LONGEST_SECONDS = 43_200
"""Twelve hours after its receive a message is visible again, whatever was asked."""
ENDING_SECONDS = 1800
"""So long before that the job is to be handed back (DESIGN 4)."""
_ENDING_EXTENSIONS = 3
"""But a lease must be extended so often at least before it ends."""
_SEARCH_SECONDS = 5.0
"""So much longer than a visibility a message that lapsed is looked for; then somebody else has it. An extension of ours
that arrived late may hide it once more."""
_TENDED_SECONDS = 30.0
"""A lease that is kept is asked about more often than that once it has lapsed; of another nobody would settle it."""
_MARGIN_SECONDS = 30
"""What we leave of the twelve hours: a call takes a while, and so did the answer to the receive."""
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
        reach: Returns if SQS answers.
        seek: Receives a message of that id again, if it is visible; None where each receive counts as a failure.
        keep: Called with the handle of a message that is ours again, and for how many seconds.
        forget: Called with a handle before its message is settled: from then on another worker may have it.
        clock: Seconds; goes on while the machine sleeps.
        on_fault: Told an event's name and fields.
    """

    name: str
    visibility: int
    hides: Batcher
    deletes: Batcher
    dead: DeadLetters
    reach: Callable[[], Awaitable[None]]
    seek: Callable[[str], Awaitable[Message | None]] | None
    keep: Callable[[str, float], None]
    forget: Callable[[str], None]
    clock: Callable[[], float]
    on_fault: Callable[..., None]


class SqsLease:
    """Owns what we know of one receive of a message.

    Once it has lapsed by our own clock its handle is not used again, whatever SQS says: of a standard queue an old one
    may still be taken, and with it we would change or delete what another worker has. The message is received anew: it
    is still ours if nobody had it in between.
    """

    def __init__(self, queue: Queue, message: Message) -> None:
        """Args: the queue, and the message, just received."""
        self._queue = queue
        self._message = message
        self._job = message.job(queue.name)
        self._until = message.received + queue.visibility
        self._granted = queue.visibility
        self._attempt = message.receives
        self._search_until: float | None = None
        self._asked_at = message.received
        self._lost = False
        self._settled = False
        self._begun: Batcher | None = None
        """What was asked to end our hold, while it may have done so without our knowing."""
        self._in_air = False
        self._gone = False
        """An extension told that a deletion of ours was done whose answer was lost."""
        self._sent = False
        self._progressed = False

    @property
    def job(self) -> Job:
        """The job."""
        return self._job

    @property
    def attempt(self) -> int:
        """SQS's count of receives."""
        return self._attempt

    @property
    def attempts_ordered(self) -> bool:
        """A message that was sent back from a dead-letter queue is the same job, and counted from 1 again."""
        return False

    @property
    def expires_after(self) -> float:
        """The visibility that was granted last."""
        return float(self._granted)

    @property
    def facts(self) -> MessageFacts:
        """What is known of the message."""
        dead, message = self._queue.dead, self._message
        expires = None
        if message.sent is not None and dead.retention is not None:
            expires = message.sent + dead.retention
        last = dead.receives is not None and message.receives >= dead.receives
        return MessageFacts(
            message.id,
            message.sent,
            expires,
            message.receives,
            "MessageGroupId" in message.system,
            message.max_failures or FAILURES,
            last,
        )

    @property
    def extend_every(self) -> float | None:
        """As `Lease.extend_every`: by how long it lasts."""
        return None

    @property
    def spends_tries(self) -> bool:
        """With a redrive policy every receive is one of few; without one, a rest costs nothing."""
        return self._queue.dead.receives is not None

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Lease.listen`: it has to be asked."""

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """As `Lease.extend`; it ends before the twelve hours do, and undoes no settlement that is under way."""
        self._progressed |= progressed
        clock, left = self._queue.clock, self._left()
        self._asked_at = asked_at = clock()
        if self._settling():
            return LeaseState.HELD
        if self._lost or self._settled or left < 1:
            self._lost = True
            return LeaseState.LOST
        if asked_at >= self._until:
            return await self._regain()
        seconds = min(self._queue.visibility, left)
        within = min(_EXTEND_WITHIN, self._queue.visibility / _PART_OF_LEASE)
        message = self._message
        try:
            await self._queue.hides.call(Change(message.handle, seconds), within=within)
        except LeaseLostError:
            if message is self._message:
                self._refute()
        if message is not self._message:  # it lapsed, and a poll has brought it anew
            return LeaseState.HELD
        if self._lost:
            return LeaseState.LOST
        if self._settled or self._settling():
            return LeaseState.HELD
        if clock() >= self._until:  # the answer may be to a handle that is another's by now
            return await self._regain()
        self._until = asked_at + seconds
        self._granted = seconds
        ending = max(ENDING_SECONDS, _ENDING_EXTENSIONS * self._queue.visibility)
        return LeaseState.ENDING if left < ending else LeaseState.HELD

    def _settling(self) -> bool:
        """Whether a settlement is under way that an extension would undo, or could say nothing about."""
        if self._gone:
            return True
        given_back = self._begun is self._queue.hides
        return (self._in_air or given_back) and not self._settled and not self._lapsed()

    def _refute(self) -> None:
        """SQS says that our handle is no longer good: if we have begun to settle, that may be why."""
        if self._begun is None and not self._settled:
            self._lost = True
        elif self._begun is self._queue.deletes and not self._in_air:
            self._gone = True

    async def _regain(self) -> LeaseState:
        """After a partition: receive the message anew, if nobody has it, and nobody had it meanwhile.

        Raises:
            SourceUnavailableError: It is not known who has it.
        """
        # With a redrive policy each receive is one of few, of the other messages too.
        if self._queue.seek is None or self._queue.dead.receives is not None:
            await self._queue.reach()  # while SQS is out of reach, nobody says that another has it
            self._lost = True
            return LeaseState.LOST
        found = await self._queue.seek(self._message.id)
        now = self._queue.clock()
        if found is None and not self._lapsed():  # a poll has found it meanwhile
            return LeaseState.HELD
        if self._search_until is None:
            self._search_until = now + self._queue.visibility + _SEARCH_SECONDS
        if found is None and now < self._search_until:
            raise SourceUnavailableError("the message lapsed, and it is not known who has it")
        if found is not None and self._follows(found):
            self._take(found)
            return LeaseState.HELD
        self._lost = True
        if found is not None:
            await self._queue.hides.call(Change(found.handle, 0), within=_SETTLE_WITHIN)
        return LeaseState.LOST

    def adopt(self, message: Message) -> bool:
        """Go on with our message, which lapsed here and which another lane has received; False if it is that lane's."""
        tended = self._queue.clock() - self._asked_at < _TENDED_SECONDS
        over = self._lost or self._settled or self._gone
        if over or not tended or not self._lapsed() or not self._follows(message):
            return False
        self._take(message)
        return True

    def _follows(self, message: Message) -> bool:
        """Whether it was given to nobody between our receive and that one."""
        return message.receives == self._message.receives + 1

    def _take(self, message: Message) -> None:
        self._queue.forget(self._message.handle)
        self._queue.keep(message.handle, self._queue.visibility)
        self._message, self._search_until, self._begun = message, None, None
        self._until, self._granted = message.received + self._queue.visibility, self._queue.visibility

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
            SourceUnavailableError: It has lapsed, and `extend` has not found out yet who has it.
        """
        self._settled |= self._gone
        if self._settled:
            return True
        if self._lost:
            raise LeaseLostError("the message may be visible to others")
        if self._lapsed():
            raise SourceUnavailableError("the message lapsed, and it is not known who has it")
        return False

    async def _set_aside(self, reason: str) -> None:
        """To the dead-letter queue first, then away from here; without one it stays, hidden for as long as can be."""
        if not self._sent:
            self._sent = await self._queue.dead.send(self._message, reason)
        if self._sent:
            await self._delete()
            return
        await self._hide(LONGEST_SECONDS)
        words = f"it failed for good, and there is no dead-letter queue that takes it: {reason}"
        self._queue.on_fault("job_kept", message=self._message.id, error=words)

    async def _hide(self, delay: float) -> None:
        seconds = max(0, min(math.ceil(delay), self._left()))
        await self._settle(self._queue.hides, Change(self._message.handle, seconds))

    async def _delete(self) -> None:
        await self._settle(self._queue.deletes, Change(self._message.handle))

    async def _settle(self, calls: Batcher, change: Change) -> None:
        """End our hold, by a call that no extension is to undo."""
        before, self._begun, self._in_air = self._begun, calls, True
        self._queue.forget(change.handle)
        try:
            await calls.call(change, within=_SETTLE_WITHIN)
        except LeaseLostError:
            self._lost |= before is not self._queue.deletes  # else that deletion was done, and its answer was lost
        except RefusedError as error:
            if not error.passes:
                self._begun = before
            raise
        finally:
            self._in_air = False
        if change.handle != self._message.handle:
            raise SourceUnavailableError("the message lapsed meanwhile, and was received anew")
        if self._lost:
            raise LeaseLostError("its handle is no longer good")
        self._settled = True

    def _lapsed(self) -> bool:
        return self._queue.clock() >= self._until

    def _left(self) -> int:
        """Whole seconds of the twelve hours that are left."""
        return LONGEST_SECONDS - _MARGIN_SECONDS - math.ceil(self._queue.clock() - self._message.received)
