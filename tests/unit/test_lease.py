"""The lease keeper, in virtual time, against queues that answer as scripted."""

from __future__ import annotations

import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import anyio
import pytest

from heeler.lease import LeaseKeeper
from heeler.sources.base import LeaseState
from heeler.tasks import background
from tests.support.leases import HANG, OUT_OF_REACH, ScriptedLease
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Watched:
    """A keeper at work, and what it said when."""

    def __init__(self, lease: ScriptedLease, seed: int = 1) -> None:
        self.lease = lease
        self.start = anyio.current_time()
        self.events: list[tuple[str, float, dict[str, object]]] = []
        self.durable = 0
        self.keeper = LeaseKeeper(
            lease, self._note, rng=random.Random(seed), clock=anyio.current_time, durable=lambda: self.durable
        )

    def _note(self, name: str, fields: dict[str, object]) -> None:
        self.events.append((name, anyio.current_time() - self.start, fields))

    def names(self) -> list[str]:
        return [name for name, _, _ in self.events]

    def when(self, name: str) -> float:
        return next(at for found, at, _ in self.events if found == name)

    def extended(self) -> list[float]:
        return [at - self.start for at in self.lease.extended]


@asynccontextmanager
async def kept(lease: ScriptedLease, seed: int = 1) -> AsyncIterator[Watched]:
    watched = Watched(lease, seed)
    async with background(watched.keeper.keep):
        yield watched


async def returns_within(seconds: float, call: Callable[[], Awaitable[object]]) -> bool:
    """Whether `call` comes back in so many virtual seconds."""
    with anyio.move_on_after(seconds) as scope:
        await call()
    return not scope.cancelled_caught


async def test_a_lease_is_extended_every_third_of_its_time_with_jitter() -> None:
    gaps = []
    for seed in range(20):
        async with kept(ScriptedLease(expires_after=30.0), seed) as watched:
            await anyio.sleep(100)
        times = [0.0, *watched.extended()]
        gaps += [later - earlier for earlier, later in pairwise(times)]
        assert watched.names() == []
    assert len(gaps) > 150
    assert 8.0 - 1e-3 <= min(gaps) < 8.3
    assert 9.7 < max(gaps) <= 10.0 + 1e-3


async def test_an_infinite_lease_is_always_certain_and_its_source_hears_of_progress_now_and_then() -> None:
    async with kept(ScriptedLease(expires_after=math.inf)) as watched:
        await anyio.sleep(3600)
        assert watched.keeper.confirmed
        await watched.keeper.wait()
    assert 3600 / 30 - 1 <= len(watched.lease.extended) <= 3600 / 24 + 1


async def test_a_failed_call_is_repeated_with_growing_pauses_until_the_queue_answers() -> None:
    async with kept(ScriptedLease(answers=[OUT_OF_REACH] * 6)) as watched:
        await anyio.sleep(29)
        assert watched.keeper.confirmed
    times = watched.extended()
    gaps = [later - earlier for earlier, later in pairwise(times)][:6]
    for count, gap in enumerate(gaps):
        assert 0.1 * 2**count - 1e-6 <= gap <= 0.2 * 2**count + 1e-3, gaps
    assert watched.names() == ["heartbeat_failed"] * 6


async def test_a_call_that_hangs_is_given_up_and_repeated_while_the_lease_lives() -> None:
    async with kept(ScriptedLease(expires_after=30.0, answers=[HANG])) as watched:
        await anyio.sleep(29)
        assert watched.keeper.confirmed
    assert len(watched.extended()) >= 2
    assert watched.extended()[1] < 21
    assert watched.names() == ["heartbeat_failed"]
    assert watched.events[0][2]["error"] == "no answer in time"


async def test_repeats_are_never_further_apart_than_ten_seconds() -> None:
    async with kept(ScriptedLease(expires_after=600.0, answers=[OUT_OF_REACH] * 500)) as watched:
        await anyio.sleep(1200)
    times = watched.extended()
    assert max(later - earlier for earlier, later in pairwise(times)) <= 10.01


async def test_when_the_lease_lapses_the_permit_waits_until_the_queue_confirms_it() -> None:
    lease = ScriptedLease(expires_after=30.0, answers=[OUT_OF_REACH] * 12)
    async with kept(lease) as watched:
        await anyio.sleep(29.9)
        assert await returns_within(0.01, watched.keeper.wait)
        await anyio.sleep(0.2)
        assert not watched.keeper.confirmed
        assert not watched.keeper.ended.is_set()
        assert not await returns_within(2.0, watched.keeper.wait)
        assert await returns_within(90.0, watched.keeper.wait)
        assert watched.keeper.confirmed
    assert watched.names().count("lease_lapsed") == 1
    assert 30.0 <= watched.when("lease_lapsed") <= 41.0
    assert watched.names()[-1] == "lease_confirmed_again"


async def test_a_lease_confirmed_by_a_late_answer_counts_from_the_question() -> None:
    """The queue counts from when it was asked; an answer that took 9 s leaves 21 s, not 30."""

    class Slow(ScriptedLease):
        async def extend(self, *, progressed: bool = False) -> LeaseState:
            state = await super().extend(progressed=progressed)
            if len(self.extended) == 1:
                await anyio.sleep(9)
            return state

    async with kept(Slow(expires_after=30.0, answers=[LeaseState.HELD, *[OUT_OF_REACH] * 99])) as watched:
        await anyio.sleep(20)
        asked = watched.extended()[0]
        await anyio.sleep(asked + 29.9 - 20)
        assert watched.keeper.confirmed
        await anyio.sleep(0.2)
        assert not watched.keeper.confirmed


async def test_doubt_returns_only_after_the_queue_was_asked_anew() -> None:
    async with kept(ScriptedLease(answers=[OUT_OF_REACH, LeaseState.HELD])) as watched:
        await anyio.sleep(1)
        assert watched.extended() == []
        assert await returns_within(1.0, watched.keeper.doubt)
        assert len(watched.extended()) == 2
        assert watched.keeper.confirmed


async def test_an_answer_to_a_question_asked_before_the_doubt_does_not_settle_it() -> None:
    """A heartbeat that was under way may have been answered before what raised the doubt happened."""
    answered = anyio.Event()

    class Slow(ScriptedLease):
        async def extend(self, *, progressed: bool = False) -> LeaseState:
            state = await super().extend(progressed=progressed)
            if len(self.extended) == 1:
                await answered.wait()
            else:
                await anyio.sleep(3)
            return state

    async with kept(Slow()) as watched:
        await anyio.sleep(10.1)
        assert len(watched.extended()) == 1
        async with anyio.create_task_group() as group:
            group.start_soon(watched.keeper.doubt)
            await anyio.sleep(0.1)
            answered.set()
            told = anyio.current_time()
        assert anyio.current_time() - told >= 3


@pytest.mark.parametrize("state", [LeaseState.LOST, LeaseState.CANCELLED])
async def test_a_lost_or_cancelled_lease_ends_and_is_asked_no_more(state: LeaseState) -> None:
    async with kept(ScriptedLease(answers=[LeaseState.HELD, state])) as watched:
        with anyio.fail_after(60):
            await watched.keeper.ended.wait()
        assert watched.keeper.state is state
        assert not watched.keeper.confirmed
        assert not await returns_within(100.0, watched.keeper.wait)
    assert len(watched.extended()) == 2
    assert watched.events[-1][0] == ("cancelled" if state is LeaseState.CANCELLED else "lease_lost")


async def test_a_waiter_is_not_let_through_when_the_queue_says_lost() -> None:
    async with kept(ScriptedLease(answers=[LeaseState.LOST])) as watched:
        assert not await returns_within(50.0, watched.keeper.doubt)
        assert watched.keeper.ended.is_set()


async def test_the_queue_is_told_once_of_what_became_durable_and_again_if_it_did_not_hear() -> None:
    lease = ScriptedLease(answers=[LeaseState.HELD, OUT_OF_REACH])
    async with kept(lease) as watched:
        await anyio.sleep(10.1)
        watched.durable = 3
        await anyio.sleep(25)
    assert lease.progress[:4] == [False, True, True, False]


async def test_many_waiters_cost_one_question() -> None:
    async with kept(ScriptedLease(answers=[OUT_OF_REACH] * 3)) as watched:
        watched.keeper._confirmed_until = -math.inf  # as a lapse leaves it
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(watched.keeper.wait)
        assert len(watched.extended()) == 4


async def test_a_queue_that_wants_a_pace_of_its_own_is_asked_at_that_pace() -> None:
    lease = ScriptedLease(expires_after=59.0)
    lease.extend_every = 2.0
    gaps = []
    for seed in range(10):
        async with kept(lease, seed) as watched:
            await anyio.sleep(40)
            lease.extend_every = 30.0
            times = len(lease.extended)
            await anyio.sleep(160)
        slow = [later - earlier for earlier, later in pairwise(lease.extended[times:])]
        assert slow
        assert all(24.0 - 1e-3 <= gap <= 30.0 + 1e-3 for gap in slow)
        fast = lease.extended[:times]
        gaps += [later - earlier for earlier, later in pairwise(fast)]
        assert watched.names() == []
        lease.extended.clear()
        lease.extend_every = 2.0
    assert 1.6 - 1e-3 <= min(gaps) < 1.65
    assert 1.95 < max(gaps) <= 2.0 + 1e-3


async def test_however_slow_a_pace_is_a_cancellation_is_heard_of_in_minutes() -> None:
    lease = ScriptedLease(expires_after=1e9)
    lease.extend_every = 5e8
    async with kept(lease) as watched:
        await anyio.sleep(3600)
    gaps = [later - earlier for earlier, later in pairwise([0.0, *watched.extended()])]
    assert max(gaps) <= 240.0 + 1e-3


async def test_a_failed_call_is_repeated_sooner_than_the_pace() -> None:
    lease = ScriptedLease(expires_after=59.0, answers=[OUT_OF_REACH] * 3)
    lease.extend_every = 30.0
    async with kept(lease) as watched:
        await anyio.sleep(32)
    assert len(watched.extended()) == 4
