"""A bucket that several processes use over bad lines, in virtual time: nobody learns for certain what a request did.

Every request has a way there and a way back. A change is applied when it arrives, whatever became of its sender; or it
is lost, arrives twice, arrives long after its sender was told that it timed out, or its answer is lost. All of it is
drawn from one seed. A `Referee` sees each change in the order in which it takes effect.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import itertools
import random
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import anyio

from heeler_sync.errors import ObjectNotFoundError, PreconditionFailedError, ShortAnswerError, TransientStoreError
from heeler_sync.store.base import Condition, ObjectInfo, Reader, Sink
from heeler_sync.store.providers import PROVIDERS, Provider

T = TypeVar("T")

_TIMEOUT = 5.0
LATEST = 90.0
"""Seconds after which no change that was sent is on its way any more."""


class Referee(Protocol):
    """Sees what happens to a bucket."""

    def putting(self, key: str, data: bytes, by: str) -> None:
        """A put takes effect now; the bucket still is as it was before."""
        ...

    def deleting(self, key: str, by: str) -> None:
        """A deletion takes effect now."""
        ...


class Fault(enum.Enum):
    """What becomes of a change."""

    NONE = "none"
    BUSY = "refused by a server that is busy"
    LOST = "lost on its way, and timed out"
    LATE = "timed out, and took effect later"
    NO_ANSWER = "took effect, and timed out"
    TWICE = "sent twice by the client's library; the second answer came back"
    ECHO = "arrived once more, later"


_FAULTS = [fault for fault in Fault if fault is not Fault.NONE]


class Cloud:
    """The bucket."""

    def __init__(self, referee: Referee, *, conditions: bool = True, content_etags: bool = True) -> None:
        """Args: whether conditions are enforced; whether the same bytes have the same ETag."""
        self.objects: dict[str, bytes] = {}
        self._etags: dict[str, str] = {}
        self._referee = referee
        self._conditions = conditions
        self._content_etags = content_etags
        self._count = itertools.count()

    def put(self, key: str, data: bytes, condition: Condition | None, by: str) -> str:
        etag = self._etags.get(key)
        if condition is not None and self._conditions:
            holds = etag is None if condition.if_absent else etag == condition.if_match
            if not holds:
                raise PreconditionFailedError("PutObject", "memory", key, "the condition does not hold")
        self._referee.putting(key, data, by)
        self.objects[key] = data
        mark = b"" if self._content_etags else b"%d" % next(self._count)
        self._etags[key] = f'"{hashlib.md5(data + mark, usedforsecurity=False).hexdigest()}"'
        return self._etags[key]

    def delete(self, key: str, by: str) -> None:
        self._referee.deleting(key, by)
        self.objects.pop(key, None)
        self._etags.pop(key, None)

    def get(self, key: str) -> tuple[bytes, ObjectInfo]:
        if key not in self.objects:
            raise ObjectNotFoundError("GetObject", "memory", key, "no such key")
        return self.objects[key], ObjectInfo(key, len(self.objects[key]), self._etags[key])


@dataclass(frozen=True)
class Weather:
    """How bad the lines are: the part of requests that something happens to, and at which a process is stopped."""

    faults: float = 0.0
    stops: float = 0.0


class _Answer:
    """What a change that arrived was answered."""

    def __init__(self) -> None:
        self.came = anyio.Event()
        self.value: object = None
        self.error: Exception | None = None


class Line:
    """The bucket as one process sees it. Implements `ObjectStore`, but for multipart uploads."""

    def __init__(self, cloud: Cloud, by: str, rng: random.Random, weather: Weather) -> None:
        self.cloud = cloud
        self.by = by
        self.head_puts: list[float] = []
        self.manifest = ""
        """The id of the manifest that was put last."""
        self.on_manifest: Callable[[str], None] = lambda _id: None
        self._rng = rng
        self._weather = weather

    @property
    def bucket(self) -> str:
        return "memory"

    @property
    def provider(self) -> Provider:
        return PROVIDERS["s3"]

    def _way(self) -> float:
        return self._rng.uniform(0.005, 0.3)

    async def _travel(self) -> None:
        """On the way; now and then the process is stopped meanwhile."""
        stopped = self._rng.uniform(1.0, 60.0) if self._rng.random() < self._weather.stops else 0.0
        await anyio.sleep(self._way() + stopped)

    async def _ask(self, operation: str, key: str, look: Callable[[], T]) -> T:
        await self._travel()
        if self._rng.random() < self._weather.faults:
            await anyio.sleep(_TIMEOUT)
            raise TransientStoreError(operation, "memory", key, "timed out")
        found = look()
        await self._travel()
        return found

    def _send(self, effect: Callable[[], object], delay: float) -> _Answer:
        """A change is on its way, and arrives whatever becomes of us."""
        answer = _Answer()

        def arrive() -> None:
            try:
                answer.value = effect()
            except Exception as error:  # noqa: BLE001 - whoever waits for the answer raises it
                answer.error = error
            answer.came.set()

        asyncio.get_running_loop().call_later(delay, arrive)
        return answer

    async def _change(self, operation: str, key: str, effect: Callable[[], object]) -> object:
        rng = self._rng
        fault = rng.choice(_FAULTS) if rng.random() < self._weather.faults else Fault.NONE
        if fault is Fault.BUSY:
            await self._travel()
            raise TransientStoreError(operation, "memory", key, "503")
        if fault in (Fault.LOST, Fault.LATE, Fault.NO_ANSWER):
            if fault is not Fault.LOST:
                self._send(effect, self._way() if fault is Fault.NO_ANSWER else rng.uniform(_TIMEOUT, LATEST))
            await anyio.sleep(_TIMEOUT)
            await self._travel()
            raise TransientStoreError(operation, "memory", key, "timed out")
        first = self._way()
        answer = self._send(effect, first)
        if fault in (Fault.TWICE, Fault.ECHO):
            again = self._send(effect, first + rng.uniform(0.0, 2.0 if fault is Fault.TWICE else LATEST))
            answer = again if fault is Fault.TWICE else answer
        await answer.came.wait()
        await self._travel()
        if answer.error is not None:
            raise answer.error
        return answer.value

    async def head(self, key: str) -> ObjectInfo:
        return await self._ask("HeadObject", key, lambda: self.cloud.get(key)[1])

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        keys = await self._ask("ListObjectsV2", prefix, lambda: sorted(self.cloud.objects))
        found = [ObjectInfo(key, 0, "") for key in keys if key.startswith(prefix)]
        for start in range(0, len(found), 4):
            await self._travel()
            yield found[start : start + 4]

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        data, info = await self._ask("GetObject", key, lambda: self.cloud.get(key))
        sink(data[offset:])
        return info

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        data, _ = await self._ask("GetObject", key, lambda: self.cloud.get(key))
        if offset + length > len(data):
            raise ShortAnswerError("GetObject", "memory", key, "it is shorter")
        return data[offset : offset + length]

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        if condition is not None:
            self.head_puts.append(anyio.current_time())
        elif "/manifests/" in key:
            self.manifest = key.rpartition("/")[2].split(".")[1]
            self.on_manifest(self.manifest)
        return str(await self._change("PutObject", key, lambda: self.cloud.put(key, data, condition, self.by)))

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        raise NotImplementedError

    async def delete(self, key: str) -> None:
        await self._change("DeleteObject", key, lambda: self.cloud.delete(key, self.by))
