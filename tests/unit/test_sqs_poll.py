"""Who is asked for when: polls on behalf of lanes, against a scripted queue, in virtual time."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from heeler.sources.base import SourceUnavailableError
from heeler.sources.sqs_batch import enough
from heeler.sources.sqs_calls import ENTRIES, Address, Change, SqsCalls
from heeler.sources.sqs_poll import Poller
from heeler.tasks import background
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

CALL = 0.01
VISIBILITY = 60


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class ScriptedQueue(SqsCalls):
    """Messages that are there, in order; polls as SQS makes them.

    Attributes:
        polls: Milliseconds at which each came, how many it asked for, and how many it brought.
        back: The handles that were put back.
        at_most: What one poll brings, however many are there.
        failure: What the next poll raises.
    """

    def __init__(self, messages: int, *, fifo: bool = False) -> None:
        super().__init__(Address("http://sqs/1/jobs.fifo" if fifo else "http://sqs/1/jobs", "r"))
        self.polls: list[tuple[int, int, int]] = []
        self.back: list[str] = []
        self.at_most = ENTRIES
        self.failure: SourceUnavailableError | None = None
        self.under_way = 0
        self._start = anyio.current_time()
        self._handles = [f"m{number}" for number in range(messages)]
        self._news = anyio.Event()

    def now(self) -> int:
        return round((anyio.current_time() - self._start) * 1000)

    def put(self, *handles: str) -> None:
        self._handles.extend(handles)
        self._news.set()

    async def receive(self, count: int, wait: int, visibility: int) -> list[dict[str, Any]]:
        assert visibility == VISIBILITY
        assert self.under_way == 0, "one poll at a time"
        self.under_way += 1
        at = self.now()
        try:
            await anyio.sleep(CALL)
            if self.failure is not None:
                failure, self.failure = self.failure, None
                raise failure
            if not self._handles:
                self._news = anyio.Event()
                with anyio.move_on_after(wait):
                    await self._news.wait()
            given = self._handles[: min(count, self.at_most)]
            del self._handles[: len(given)]
            self.polls.append((at, count, len(given)))
        finally:
            self.under_way -= 1
        return [{"MessageId": handle, "ReceiptHandle": handle, "Body": ""} for handle in given]

    async def hide(self, changes: Sequence[Change]) -> list[Exception | None]:
        assert all(change.seconds == 0 for change in changes)
        self.back += [change.handle for change in changes]
        return [None] * len(changes)


class World:
    """A poller for so many lanes; `got` are the milliseconds at which messages came to a lane."""

    def __init__(self, queue: ScriptedQueue, lanes: int) -> None:
        self.queue = queue
        self.got: list[int] = []
        self.idle = 0
        self.poller = Poller(
            queue, VISIBILITY, 20, anyio.current_time, self._before, self._fault, together=enough(lanes)
        )

    async def _before(self) -> None:
        await anyio.lowlevel.checkpoint()

    def _fault(self, name: str, **fields: object) -> None:
        raise AssertionError(name, fields)

    async def take(self, wait: float = 20.0) -> None:
        """One lane, until it has a message."""
        self.idle += 1
        try:
            if await self.poller.next(wait) is not None:
                self.got.append(self.queue.now())
        finally:
            self.idle -= 1

    async def take_later(self, *pauses: float, wait: float = 20.0) -> None:
        """Lanes, each so many seconds after the one before."""
        async with anyio.create_task_group() as group:
            for pause in pauses:
                if pause:
                    await anyio.sleep(pause)
                group.start_soon(self.take, wait)


@asynccontextmanager
async def world(messages: int, lanes: int, *, fifo: bool = False) -> AsyncIterator[World]:
    here = World(ScriptedQueue(messages, fifo=fifo), lanes)
    async with background(here.poller.run):
        yield here


async def test_a_single_lane_is_asked_for_at_once() -> None:
    async with world(3, lanes=1) as here:
        for _ in range(3):
            await here.take()
    assert here.queue.polls == [(0, 1, 1), (10, 1, 1), (20, 1, 1)]


async def test_lanes_that_become_free_at_about_the_same_time_are_asked_for_in_one_poll() -> None:
    async with world(20, lanes=8) as here:
        await here.take_later(0, 0.001, 0.001, 0.001)
    assert here.queue.polls == [(3, 4, 4)]


async def test_a_lane_that_nobody_joins_waits_for_a_moment_only() -> None:
    async with world(20, lanes=8) as here:
        await here.take_later(0, 0.003, 0.004)
    assert here.queue.polls == [(5, 2, 2), (20, 1, 1)]


async def test_a_full_poll_is_followed_by_the_next_at_once_if_enough_lanes_wait() -> None:
    async with world(20, lanes=30) as here:
        await here.take_later(*[0.0] * 20)
    assert here.queue.polls == [(0, 10, 10), (10, 10, 10)]


async def test_after_a_poll_that_brought_less_than_was_asked_for_lanes_may_start_undisturbed() -> None:
    async with world(2, lanes=8) as here, anyio.create_task_group() as group:
        group.start_soon(here.take_later, *[0.0] * 8)
        await anyio.sleep(1)
        here.queue.put(*"abcdef")
    assert here.queue.polls == [(0, 8, 2), (15, 6, 6)]


async def test_after_a_poll_that_brought_nothing_the_next_goes_at_once() -> None:
    async with world(0, lanes=8) as here, anyio.create_task_group() as group:
        group.start_soon(here.take_later, *[0.0] * 4)
        group.start_soon(here.take_later, 1.0, 0.0, 0.0, 0.0)
        await anyio.sleep(20.5)
        here.queue.put(*"abcd")
    assert here.queue.polls == [(0, 4, 0), (20010, 4, 4)]


async def test_of_a_fifo_queue_one_message_is_asked_for_at_a_time() -> None:
    async with world(3, lanes=8, fifo=True) as here:
        await here.take_later(0, 0, 0)
    assert here.queue.polls == [(0, 1, 1), (10, 1, 1), (20, 1, 1)]


async def test_a_lane_that_leaves_before_the_poll_is_not_asked_for() -> None:
    async with world(5, lanes=8) as here:
        with anyio.move_on_after(0.002):
            await here.take()
        await anyio.sleep(0.1)
        assert here.queue.polls == []
        await here.take()
    assert [(count, given) for _, count, given in here.queue.polls] == [(1, 1)]


async def test_a_poll_is_not_broken_off_and_what_nobody_waits_for_goes_back() -> None:
    async with world(5, lanes=2) as here:
        with anyio.move_on_after(0.002):
            await here.take()
        await anyio.sleep(0.1)
    assert here.queue.polls == [(0, 1, 1)]
    assert here.queue.back == ["m0"]


async def test_the_end_waits_for_the_poll_that_is_out() -> None:
    async with world(5, lanes=1) as here, anyio.create_task_group() as group:
        group.start_soon(here.take)
        await anyio.sleep(0.001)
    assert here.queue.polls == [(0, 1, 1)]
    with pytest.raises(SourceUnavailableError, match="ended"):
        await here.poller.next(1.0)


async def test_an_outage_is_told_to_all_that_wait_and_the_next_poll_is_an_ordinary_one() -> None:
    async with world(4, lanes=8) as here:
        here.queue.failure = SourceUnavailableError("503")
        told = 0

        async def lane() -> None:
            nonlocal told
            with pytest.raises(SourceUnavailableError, match="503"):
                await here.take()
            told += 1

        async with anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(lane)
        assert told == 4
        await here.take_later(0, 0, 0, 0)
    assert here.queue.polls == [(10, 4, 4)]


async def test_a_queue_that_gives_less_than_it_has_still_serves_every_lane() -> None:
    async with world(8, lanes=8) as here:
        here.queue.at_most = 3
        await here.take_later(*[0.0] * 8)
    assert [given for _, _, given in here.queue.polls] == [3, 3, 2]
    assert here.queue.back == []


@pytest.mark.parametrize("seed", range(10))
async def test_never_more_is_asked_for_than_lanes_wait_and_all_is_handed_out(seed: int) -> None:
    rng = random.Random(seed)
    lanes, jobs = rng.randint(1, 24), 120

    async def lane(here: World) -> None:
        while len(here.got) + here.idle < jobs:
            await here.take()
            await anyio.sleep(rng.choice([0, rng.random() * 0.02, rng.random()]))

    async with world(jobs, lanes) as here:
        here.queue.at_most = rng.randint(1, ENTRIES)
        ask = here.queue.receive

        async def checked(count: int, wait: int, visibility: int) -> list[dict[str, Any]]:
            assert count <= here.idle, f"seed {seed}"
            return await ask(count, wait, visibility)

        here.queue.receive = checked  # type: ignore[method-assign]
        async with anyio.create_task_group() as group:
            for _ in range(lanes):
                group.start_soon(lane, here)
    assert len(here.got) == jobs
    assert here.queue.back == []
