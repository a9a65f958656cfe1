"""Asks SQS for messages on behalf of all lanes: one poll at a time, for as many messages as there are free lanes."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio

from heeler.sources.base import SourceUnavailableError
from heeler.sources.sqs_calls import ENTRIES, Change, SqsCalls
from heeler.sources.sqs_message import Message

POLL_SECONDS = 20
"""The longest that SQS lets one poll wait."""
_NEARLY = 0.05
_LINGER_SECONDS = 0.005
"""So long a poll is put off for the sake of lanes that may be free in a moment too."""


@dataclass(eq=False)
class _Waiter:
    until: float
    done: anyio.Event = field(default_factory=anyio.Event)
    message: Message | None = None
    error: SourceUnavailableError | None = None


class Poller:
    """Owns who waits for a message. `run` asks for them.

    A poll is never broken off: SQS would hide the message that it was about to give for a whole visibility. What
    nobody waits for any more is put back at once.
    """

    def __init__(
        self,
        calls: SqsCalls,
        visibility: int,
        longest: int,
        clock: Callable[[], float],
        before: Callable[[], Awaitable[None]],
        on_fault: Callable[..., None],
        together: int = 1,
        claim: Callable[[Message], bool] = lambda _message: False,
        read: Callable[[dict[str, Any], float], Message] = Message.of,
    ) -> None:
        """Args.

        calls: The queue's.
        visibility: Seconds that a message is ours.
        longest: Seconds of one poll.
        clock: What receives are stamped with.
        before: To be done before each poll.
        on_fault: Told what goes wrong between calls.
        together: How many waiting lanes are polled for at once; fewer, after a moment.
        claim: Given each message first; whether a lane has it already.
        read: Makes a message of an entry and the time of its receive.
        """
        self._calls = calls
        self._visibility = visibility
        self._longest = longest
        self._clock = clock
        self._before = before
        self._on_fault = on_fault
        self._claim = claim
        self._read = read
        # Of a FIFO queue one poll may give several messages of a group, which lanes would do side by side.
        self._at_once = 1 if calls.address.fifo else ENTRIES
        self._together = min(together, self._at_once)
        self._waiters: list[_Waiter] = []
        self._news = anyio.Event()
        self._few = False
        """Whether the last poll brought less than was asked for: there is time to start on it, undisturbed."""
        self._over = False

    async def run(self) -> None:
        """Poll while somebody waits."""
        try:
            while True:
                await self._gather()
                with anyio.CancelScope(shield=True):
                    await self._poll()
                await anyio.lowlevel.checkpoint()
        finally:
            self._over = True
            self._fail("the source has ended")

    async def _gather(self) -> None:
        """Return once somebody waits, and whoever else may come in a moment has come too."""
        count = ENTRIES if self._few else self._together
        while True:
            await self._wait_for(1)
            with anyio.move_on_after(_LINGER_SECONDS):
                await self._wait_for(count)
            if self._waiters:
                return

    async def _wait_for(self, count: int) -> None:
        """Return once so many wait."""
        while len(self._waiters) < count:
            self._news = anyio.Event()
            await self._news.wait()

    async def next(self, wait: float) -> Message | None:
        """The next message; None once a whole poll, and `wait` seconds, brought none.

        Cancelled, it returns the message that has come all the same.

        Raises:
            SourceUnavailableError: The queue is out of reach.
        """
        if self._over:
            raise SourceUnavailableError("the source has ended")
        waiter = _Waiter(anyio.current_time() + wait)
        self._waiters.append(waiter)
        self._news.set()
        try:
            await waiter.done.wait()
        except anyio.get_cancelled_exc_class():
            if waiter.message is None:
                raise
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
        if waiter.error is not None:
            raise waiter.error
        return waiter.message

    async def seek(self, message_id: str) -> Message | None:
        """Receive a message that has lapsed while its program worked on, if it is visible; others are put back at once.

        Raises:
            SourceUnavailableError: The queue is out of reach.
        """
        # A receive that only gets through when its sender has given up would hide the message from everybody.
        await self._calls.reach()
        sought = None
        with anyio.CancelScope(shield=True):
            found = self._messages(await self._calls.receive(self._at_once, 1, self._visibility))
            sought = next((message for message in found if message.id == message_id), None)
            spare = [message for message in found if message is not sought and not self._claim(message)]
            if spare:
                await self._put_back(spare)
        return sought

    async def _poll(self) -> None:
        asked = [*self._waiters]
        count = min(len(asked), self._at_once)
        left = min(waiter.until for waiter in asked) - anyio.current_time()
        seconds = max(1, min(self._longest, math.ceil(left)))
        try:
            await self._before()
            found = await self._calls.receive(count, seconds, self._visibility)
        except SourceUnavailableError as error:
            self._fail(str(error))
            return
        self._few = 0 < len(found) < count
        new = [message for message in self._messages(found) if not self._claim(message)]
        spare = [message for message in new if not self._hand_out(message)]
        if spare:
            await self._put_back(spare)
        now = anyio.current_time()
        for waiter in asked:
            if waiter in self._waiters and waiter.until - now < _NEARLY:
                self._end(waiter)

    def _messages(self, found: list[dict[str, Any]]) -> list[Message]:
        received = self._clock()
        return [self._read(entry, received) for entry in found]

    def _hand_out(self, message: Message) -> bool:
        """Give it to whoever waits longest; False if nobody does."""
        if not self._waiters:
            return False
        waiter = self._waiters[0]
        waiter.message = message
        self._end(waiter)
        return True

    def _end(self, waiter: _Waiter) -> None:
        self._waiters.remove(waiter)
        waiter.done.set()

    def _fail(self, error: str) -> None:
        for waiter in [*self._waiters]:
            waiter.error = SourceUnavailableError(error)
            self._end(waiter)

    async def _put_back(self, messages: list[Message]) -> None:
        try:
            results = await self._calls.hide([Change(message.handle, 0) for message in messages])
        except SourceUnavailableError as error:
            results = [error] * len(messages)
        for message, failure in zip(messages, results, strict=True):
            if failure is not None:  # it lapses by itself
                self._on_fault("message_not_put_back", message=message.id, error=str(failure))
