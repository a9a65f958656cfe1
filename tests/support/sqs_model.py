"""A standard queue of SQS by its documented rules, in this process and on anyio's clock, for tests in virtual time.

`SqsModel().calls(address)` is what `heeler.sources.sqs_calls.SqsCalls(address)` would be. What is not modelled: FIFO.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio

from heeler.sources.base import LeaseLostError, SourceUnavailableError
from heeler.sources.sqs_calls import Address, Change

TWELVE_HOURS = 43_200
_EPOCH = 1_800_000_000
_LOOK = 0.1


@dataclass
class Stored:
    """A message in the queue."""

    id: str
    body: str
    sent: float
    visible_at: float
    receives: int = 0
    handle: str = ""
    received: float = -math.inf
    attributes: dict[str, dict[str, str]] = field(default_factory=dict)


class SqsModel:
    """One queue, and what was sent elsewhere.

    Attributes:
        unreachable: While set, every call fails.
        receives: The redrive policy's maxReceiveCount; None without one.
    """

    def __init__(self, *, receives: int | None = None, retention: int = 1_209_600) -> None:
        self.messages: dict[str, Stored] = {}
        self.dead: list[dict[str, Any]] = []
        self.counts: Counter[str] = Counter()
        self.refused: list[str] = []
        self.unreachable: set[str] = set()
        self.receives = receives
        self.retention = retention
        self._numbers = itertools.count(1)

    def now(self) -> float:
        """Seconds since 1970."""
        return _EPOCH + anyio.current_time()

    def put(self, body: str, **attributes: str) -> Stored:
        """Send a message."""
        number = next(self._numbers)
        values = {name: {"DataType": "String", "StringValue": value} for name, value in attributes.items()}
        message = Stored(f"message-{number}", body, self.now(), self.now(), attributes=values)
        self.messages[message.id] = message
        return message

    def calls(self, address: Address, who: str = "") -> ModelCalls:
        """The calls of one worker."""
        return ModelCalls(self, address, who)

    def take(self, count: int, visibility: int) -> list[Stored]:
        """Give out what is visible."""
        found: list[Stored] = []
        for message in [*self.messages.values()]:
            if self.now() - message.sent > self.retention:
                del self.messages[message.id]
            elif message.visible_at <= self.now() and len(found) < count:
                if self.receives is not None and message.receives >= self.receives:
                    self.dead.append({"MessageBody": message.body, "by": "redrive"})
                    del self.messages[message.id]
                    continue
                message.receives += 1
                message.received = self.now()
                message.visible_at = self.now() + visibility
                message.handle = f"{message.id}/{message.receives}"
                found.append(message)
        return found

    def change(self, handle: str, seconds: int) -> Exception | None:
        """Hide a message for so long."""
        message = self._held(handle)
        if message is None:
            return LeaseLostError("InvalidParameterValue: not available for a visibility change")
        if self.now() + seconds - message.received > TWELVE_HOURS:
            self.refused.append(handle)
            return LeaseLostError("InvalidParameterValue: total visibility is beyond 43200 seconds")
        message.visible_at = self.now() + seconds
        return None

    def remove(self, handle: str) -> Exception | None:
        """Delete a message; of a superseded handle, SQS says yes and does nothing."""
        message = self._held(handle)
        if message is not None:
            del self.messages[message.id]
        return None

    def _held(self, handle: str) -> Stored | None:
        message = self.messages.get(handle.partition("/")[0])
        if message is None or message.handle != handle or message.visible_at <= self.now():
            return None
        return message


class ModelCalls:
    """As `SqsCalls`."""

    def __init__(self, model: SqsModel, address: Address, who: str) -> None:
        self.address = address
        self._model = model
        self._who = who

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        yield

    async def _call(self, name: str) -> None:
        await anyio.sleep(0.001)
        self._model.counts[name] += 1
        if self._who in self._model.unreachable:
            raise SourceUnavailableError("out of reach")

    async def receive(self, count: int, wait: int, visibility: int) -> list[dict[str, Any]]:
        until = anyio.current_time() + wait
        while True:
            await self._call("receive")
            found = self._model.take(count, visibility)
            if found or anyio.current_time() >= until:
                return [self._shown(message) for message in found]
            due = min((message.visible_at for message in self._model.messages.values()), default=math.inf)
            await anyio.sleep(min(until - anyio.current_time(), max(_LOOK, due - self._model.now())))

    def _shown(self, message: Stored) -> dict[str, Any]:
        system = {
            "ApproximateReceiveCount": str(message.receives),
            "SentTimestamp": str(int(message.sent * 1000)),
            "ApproximateFirstReceiveTimestamp": str(int(message.received * 1000)),
        }
        return {
            "MessageId": message.id,
            "ReceiptHandle": message.handle,
            "Body": message.body,
            "Attributes": system,
            "MessageAttributes": message.attributes,
        }

    async def hide(self, changes: Sequence[Change]) -> list[Exception | None]:
        await self._call("hide")
        return [self._model.change(change.handle, change.seconds) for change in changes]

    async def delete(self, changes: Sequence[Change]) -> list[Exception | None]:
        await self._call("delete")
        return [self._model.remove(change.handle) for change in changes]

    async def send(self, url: str, **message: Any) -> None:
        await self._call("send")
        self._model.dead.append({"by": url, **message})

    async def attributes(self, *names: str) -> dict[str, str]:
        await self._call("attributes")
        found = {"MessageRetentionPeriod": str(self._model.retention)}
        if self._model.receives is not None:
            policy = {"maxReceiveCount": self._model.receives, "deadLetterTargetArn": "arn:aws:sqs:x:1:dead"}
            found["RedrivePolicy"] = json.dumps(policy)
        return {name: value for name, value in found.items() if name in names}

    async def reach(self) -> None:
        await self._call("attributes")

    async def url_of(self, arn: str) -> str:
        return f"http://queue/{arn.rpartition(':')[2]}"
