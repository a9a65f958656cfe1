"""Blocking calls in worker threads, without leaving one behind that still writes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class _Start:
    """Decides, once, whether the thread began or the caller gave up first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken_by: str | None = None

    def take(self, who: str) -> bool:
        with self._lock:
            self._taken_by = self._taken_by or who
            return self._taken_by == who


async def run_stoppable(call: Callable[[], T], stop: Callable[[], None], limiter: anyio.CapacityLimiter) -> T:
    """Run a blocking `call` in a worker thread; when cancelled, ask it to `stop` and wait until it has ended.

    A write that outlived its cancellation could land after a newer one of the same key, so it is never abandoned.
    """
    start = _Start()
    ended = anyio.Event()
    loop = asyncio.get_running_loop()

    def run() -> T:
        if not start.take("thread"):
            raise RuntimeError("the caller gave up before the thread began")
        try:
            return call()
        finally:
            loop.call_soon_threadsafe(ended.set)

    try:
        return await anyio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)
    except anyio.get_cancelled_exc_class():
        stop()
        if not start.take("caller"):
            with anyio.CancelScope(shield=True):
                await ended.wait()
        raise
