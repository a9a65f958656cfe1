"""Joins calls about single messages, which concurrent jobs make at about the same time, into batch calls."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import anyio

from heeler.sources.base import SourceUnavailableError
from heeler.sources.sqs_calls import ENTRIES, Change
from heeler.tasks import spawning

_ORDER_SECONDS = 0.5
"""So long a call waits for the answer to the one before it of the same message, or SQS might do them in reverse."""

Send = Callable[[Sequence[Change]], Awaitable[list[Exception | None]]]


def enough(lanes: int) -> int:
    """So many of these lanes together are worth a call: half, so that while one half waits for SQS the other works.

    More would make all lanes wait for the slowest, less costs calls; a single lane has nobody to wait for.
    """
    return max(1, min(ENTRIES, (lanes + 1) // 2))


def _ended() -> Exception:
    return SourceUnavailableError("the source has ended")


@dataclass(eq=False)
class _Entry:
    change: Change
    due: float
    done: anyio.Event = field(default_factory=anyio.Event)
    error: Exception | None = field(default_factory=_ended)
    older: list[_Entry] = field(default_factory=list)
    """Of the same message, not sent yet: they have the answer of the newer one, since a batch has no order."""

    def end(self) -> None:
        for entry in (self, *self.older):
            entry.error = self.error
            entry.done.set()


class Batcher:
    """Calls of one kind. `run` makes them; each call has its own answer."""

    def __init__(self, send: Send, together: int = ENTRIES) -> None:
        """Args: the batch call, which gives each entry's error, or None; and how many entries are sent at once."""
        self._send = send
        self._together = min(together, ENTRIES)
        self._waiting: list[_Entry] = []
        self._sent: dict[str, _Entry] = {}
        """Without an answer yet, by handle."""
        self._news = anyio.Event()
        self._over = False

    async def run(self) -> None:
        """Make the calls until cancelled; those that are not answered by then fail."""
        try:
            async with spawning() as spawn:
                while True:
                    await self._until_due()
                    batch, self._waiting = self._waiting[:ENTRIES], self._waiting[ENTRIES:]
                    self._sent.update((entry.change.handle, entry) for entry in batch)
                    spawn(partial(self._make, batch))
        finally:
            self._over = True
            for entry in self._waiting:
                entry.end()

    async def call(self, change: Change, *, within: float) -> None:
        """Have one entry sent after at most `within` seconds; cancelled before that, it is not sent.

        Raises:
            LeaseLostError: The handle is no longer good.
            SourceUnavailableError: It is not known whether it took effect.
        """
        before = self._sent.get(change.handle)
        if before is not None:
            with anyio.move_on_after(_ORDER_SECONDS):
                await before.done.wait()
        if self._over:
            raise _ended()
        entry = _Entry(change, anyio.current_time() + within)
        entry.older = [other for other in self._waiting if other.change.handle == change.handle]
        self._waiting = [*(other for other in self._waiting if other not in entry.older), entry]
        self._news.set()
        try:
            await entry.done.wait()
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
        if entry.error is not None:
            raise entry.error

    async def _until_due(self) -> None:
        """Return once there are enough entries, or one can wait no longer."""
        while len(self._waiting) < self._together:
            due = min((entry.due for entry in self._waiting), default=math.inf)
            if due <= anyio.current_time():
                return
            self._news = anyio.Event()
            with anyio.CancelScope(deadline=due):
                await self._news.wait()

    async def _make(self, batch: list[_Entry]) -> None:
        try:
            errors = await self._send([entry.change for entry in batch])
            for entry, error in zip(batch, errors, strict=True):
                entry.error = error
        except SourceUnavailableError as error:
            for entry in batch:
                entry.error = SourceUnavailableError(str(error))
        finally:
            for entry in batch:
                if self._sent.get(entry.change.handle) is entry:
                    del self._sent[entry.change.handle]
                entry.end()
