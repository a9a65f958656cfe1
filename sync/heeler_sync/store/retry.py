"""Retry as a wrapper round any store, and the backoff that the rest of the package uses.

Only transient errors are tried again, and only calls that may be repeated without a question: conditional writes
are passed through once, since the second answer could hide the first.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import anyio

from heeler_sync.errors import StoreError, TransientStoreError
from heeler_sync.store.base import Condition, ObjectInfo, ObjectStore, Reader, Sink
from heeler_sync.store.providers import Provider

T = TypeVar("T")


@dataclass
class Backoff:
    """Growing, capped, jittered delays.

    Attributes:
        base: The first delay's upper bound, seconds.
        cap: The largest delay, seconds.
        rng: Where the jitter comes from.
    """

    base: float = 0.2
    cap: float = 20.0
    rng: random.Random = field(default_factory=random.Random)
    _failures: int = 0

    def next(self) -> float:
        """The next delay in seconds, between half of the bound and the bound."""
        bound = min(self.cap, self.base * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return bound * self.rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Start again from `base`, after something succeeded."""
        self._failures = 0


@dataclass(frozen=True)
class RetryPolicy:
    """How long to go on trying.

    Attributes:
        patience: Seconds without any success after which the last error is raised; None means as long as the
            surrounding scope lives.
        backoff: Makes the delays of one call.
        on_retry: Told of each failure that will be tried again, with the delay in seconds.
    """

    patience: float | None = None
    backoff: Callable[[], Backoff] = Backoff
    on_retry: Callable[[StoreError, float], None] = lambda _error, _delay: None


async def retrying(policy: RetryPolicy, call: Callable[[], Awaitable[T]]) -> T:
    """Await `call()` until it does not fail transiently.

    Raises:
        StoreError: A permanent error at once; a transient one when the patience is over.
    """
    backoff = policy.backoff()
    give_up = None if policy.patience is None else anyio.current_time() + policy.patience
    while True:
        try:
            return await call()
        except TransientStoreError as error:
            delay = backoff.next()
            if give_up is not None and anyio.current_time() + delay >= give_up:
                raise
            policy.on_retry(error, delay)
        await anyio.sleep(delay)


class RetryingStore:
    """A store that tries transient failures again by `policy`.

    `download` and `upload` are passed through: whoever owns the file knows where to go on from.
    """

    def __init__(self, store: ObjectStore, policy: RetryPolicy) -> None:
        self._store = store
        self._policy = policy

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._store.bucket

    @property
    def provider(self) -> Provider:
        """The quirks of the server."""
        return self._store.provider

    async def head(self, key: str) -> ObjectInfo:
        """As `ObjectStore.head`, retried."""
        return await retrying(self._policy, lambda: self._store.head(key))

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        """As `ObjectStore.list`; the whole listing is retried, so that no page is missing or doubled."""

        async def collect() -> list[list[ObjectInfo]]:
            return [page async for page in self._store.list(prefix)]

        for page in await retrying(self._policy, collect):
            yield page

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        """As `ObjectStore.download`, once."""
        return await self._store.download(key, sink, offset=offset, if_match=if_match)

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        """As `ObjectStore.read`, retried."""
        return await retrying(self._policy, lambda: self._store.read(key, offset=offset, length=length))

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        """As `ObjectStore.put`; retried only without a condition."""
        if condition is not None:
            return await self._store.put(key, data, metadata=metadata, condition=condition)
        return await retrying(self._policy, lambda: self._store.put(key, data, metadata=metadata))

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        """As `ObjectStore.upload`, once."""
        return await self._store.upload(key, reader, metadata=metadata)

    async def delete(self, key: str) -> None:
        """As `ObjectStore.delete`, retried."""
        await retrying(self._policy, lambda: self._store.delete(key))
