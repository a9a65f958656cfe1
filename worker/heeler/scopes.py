"""Small tools for waiting: what ends a block early, and delays that grow."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import copy_context

import anyio

from heeler.tasks import spawning


class Signal:
    """An event that can also end blocks, without a task for each: jobs may be as short as a millisecond."""

    def __init__(self) -> None:
        self._event = anyio.Event()
        self._calls: list[Callable[[], object]] = []

    def set(self) -> None:
        """It happens."""
        if not self.is_set():
            self._event.set()
            for call in [*self._calls]:
                call()

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return once it has."""
        await self._event.wait()

    def then(self, call: Callable[[], object]) -> None:
        """Call something when it happens; at once, if it has."""
        if self.is_set():
            call()
        else:
            self._calls.append(call)

    @contextmanager
    def calls(self, call: Callable[[], object]) -> Iterator[None]:
        """Call something when it happens, if that is during the block; at once, if it has."""
        if self.is_set():
            call()
        self._calls.append(call)
        try:
            yield
        finally:
            self._calls.remove(call)

    @contextmanager
    def ends(self) -> Iterator[anyio.CancelScope]:
        """Run the block until it happens."""
        with anyio.CancelScope() as scope, self.calls(scope.cancel):
            yield scope

    @asynccontextmanager
    async def starts(self, work: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
        """Once it happens, do the work beside the block, in its context, and only as long as the block runs."""
        context = copy_context()
        async with spawning() as spawn:
            with self.calls(lambda: context.run(spawn, work)):
                yield


class Deadline:
    """A moment that is not known yet, and may move nearer: blocks end at it."""

    def __init__(self) -> None:
        self._at = math.inf
        self._scopes: dict[anyio.CancelScope, float] = {}

    @property
    def at(self) -> float:
        """Clock of `anyio.current_time`."""
        return self._at

    def move(self, at: float) -> None:
        """It is known, or nearer than it was."""
        self._at = min(self._at, at)
        for scope, before in self._scopes.items():
            scope.deadline = self._at - before

    @contextmanager
    def ends(self, before: float = 0.0) -> Iterator[anyio.CancelScope]:
        """Run the block until so many seconds before the moment."""
        with anyio.CancelScope(deadline=self._at - before) as scope:
            self._scopes[scope] = before
            try:
                yield scope
            finally:
                del self._scopes[scope]


class Doubling:
    """Delays in seconds that double from `first` to `longest`, with jitter."""

    def __init__(self, first: float, longest: float, rng: random.Random) -> None:
        self._first = first
        self._longest = longest
        self._rng = rng
        self._next = first

    def next(self) -> float:
        """The next delay."""
        delay, self._next = self._next, min(self._longest, self._next * 2)
        return delay * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        """What was tried succeeded."""
        self._next = self._first
