"""Blocking calls in worker threads, without leaving one behind that still writes."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
import anyio.to_thread
from anyio.lowlevel import RunVar

T = TypeVar("T")
Args = ParamSpec("Args")

_READERS = 20
_TIDY_SECONDS = 1.0
_readers: RunVar[anyio.CapacityLimiter] = RunVar("heeler_sync_readers")


async def in_thread(call: Callable[Args, T], *args: Args.args, **kwargs: Args.kwargs) -> T:
    """Run a blocking call on local files in a worker thread, beside at most 19 others.

    The limit is ours alone: files on a disk that hangs must not take the threads that heartbeats need.
    """
    try:
        limiter = _readers.get()
    except LookupError:
        limiter = anyio.CapacityLimiter(_READERS)
        _readers.set(limiter)
    return await anyio.to_thread.run_sync(partial(call, *args, **kwargs), limiter=limiter)


class _Start:
    """Decides, once, whether the thread began or the caller gave up first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._taken_by: str | None = None

    def take(self, who: str) -> bool:
        with self._lock:
            self._taken_by = self._taken_by or who
            return self._taken_by == who


async def run_stoppable(call: Callable[[], T], stop: Callable[[], bool], limiter: anyio.CapacityLimiter) -> T:
    """Run a blocking `call` in a worker thread; when cancelled, `stop` it and wait as long as it may take effect.

    A write that outlived its cancellation could land after a newer one of the same key. Where `stop` says (False)
    that the thread can do no more than fail and tidy up, it is left to itself after a moment.
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
            with suppress(RuntimeError):  # left to itself, it may end after the loop
                loop.call_soon_threadsafe(ended.set)

    try:
        return await anyio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=limiter)
    except anyio.get_cancelled_exc_class():
        may_take_effect = stop()
        if not start.take("caller"):
            with anyio.move_on_after(math.inf if may_take_effect else _TIDY_SECONDS, shield=True):
                await ended.wait()
        raise
