"""Background tasks that live exactly as long as a block, with plain exceptions."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TypeVar

import anyio

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

T = TypeVar("T")


@asynccontextmanager
async def background(*tasks: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `tasks` while the block runs and cancel them when it ends.

    An error of the block or of a task is raised itself; where several failed, the first is raised from the group
    of them all. A task that returns early is simply done.
    """
    try:
        async with anyio.create_task_group() as group:
            for task in tasks:
                group.start_soon(_run, task)
            yield
            group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        first = _first_leaf(errors)
        raise first from (errors if len(errors.exceptions) > 1 else first.__cause__)


@asynccontextmanager
async def spawning() -> AsyncIterator[Callable[[Callable[[], Awaitable[object]]], None]]:
    """A block in which tasks can be started; they are cancelled when it ends, with errors as in `background`."""
    started = False

    def spawn(task: Callable[[], Awaitable[object]]) -> None:
        nonlocal started
        started = True
        group.start_soon(_run, task)

    try:
        async with anyio.create_task_group() as group:
            yield spawn
            if started:  # a cancellation is dear, and most blocks have nothing to cancel
                group.cancel_scope.cancel()
    except BaseExceptionGroup as errors:
        first = _first_leaf(errors)
        raise first from (errors if len(errors.exceptions) > 1 else first.__cause__)


@asynccontextmanager
async def alongside(*tasks: Callable[[], Awaitable[object]]) -> AsyncIterator[None]:
    """Run `tasks` beside the block and wait for them when it ends; whichever fails first ends all and is raised."""
    try:
        async with anyio.create_task_group() as group:
            for task in tasks:
                group.start_soon(_run, task)
            yield
    except BaseExceptionGroup as errors:
        first = _first_leaf(errors)
        raise first from (errors if len(errors.exceptions) > 1 else first.__cause__)


async def for_each(items: Iterable[T], work: Callable[[T], Awaitable[object]], at_once: int) -> None:
    """Await `work(item)` for every item, at most `at_once` at a time; the first error ends it and is raised."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await work(item)

    try:
        async with anyio.create_task_group() as group:
            for _ in range(at_once):
                group.start_soon(worker)
    except BaseExceptionGroup as errors:
        raise _first_leaf(errors) from errors


async def _run(task: Callable[[], Awaitable[object]]) -> None:
    await task()


def _first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    return leaf
