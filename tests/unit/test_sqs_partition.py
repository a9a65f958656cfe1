"""A worker cut off from SQS for longer than the visibility, in virtual time: who has the message afterwards."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest

from heeler.job import Result
from heeler.sources.base import Lease, LeaseLostError, LeaseState, SourceUnavailableError
from tests.support.record_world import RecordWorld, take
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

OK = Result(exit_code=0)


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordWorld:
    return RecordWorld(tmp_path, monkeypatch)


async def cut_off(world: RecordWorld, seconds: float = 100.0) -> None:
    """Nobody reaches the queue for so long."""
    world.model.unreachable.add("")
    await anyio.sleep(seconds)
    world.model.unreachable.clear()


async def asked(lease: Lease, times: int = 70) -> LeaseState:
    """What it says at last, asked as the keeper does."""
    for _ in range(times):
        try:
            return await lease.extend()
        except SourceUnavailableError:
            await anyio.sleep(1.0)
    raise AssertionError("it never said")


async def test_a_job_that_nobody_took_meanwhile_is_still_ours_and_goes_on(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await cut_off(world)
        with pytest.raises(SourceUnavailableError):
            await lease.complete(OK)
        assert await asked(lease) is LeaseState.HELD
        await anyio.sleep(50)
        assert await lease.extend() is LeaseState.HELD, "with the new handle"
        await lease.complete(OK)
    assert world.model.messages == {}
    record = await world.record()
    assert (record.state, record.attempts, record.interruptions) == ("done", 1, 0)


async def test_while_it_is_cut_off_nothing_is_said_about_the_lease(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        world.model.unreachable.add("")
        for _ in range(20):
            await anyio.sleep(20)
            with pytest.raises(SourceUnavailableError):
                await lease.extend()
        world.model.unreachable.clear()
        assert await asked(lease) is LeaseState.HELD


async def test_a_job_that_another_took_meanwhile_is_lost(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as first, world.worker() as second:
        old = await take(first)
        await anyio.sleep(100)  # the first worker alone is cut off
        new = await take(second)
        assert await asked(old) is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await old.complete(OK)
        assert await new.extend() is LeaseState.HELD
        await new.complete(OK)
    assert (await world.record()).worker == "w2"


async def test_a_job_that_another_had_meanwhile_and_gave_back_is_lost(world: RecordWorld) -> None:
    """Its folders here are older than what the other left in storage."""
    world.submit()
    async with world.worker() as first, world.worker() as second:
        old = await take(first)
        await anyio.sleep(100)
        await (await take(second)).release("told to stop")
        assert await asked(old) is LeaseState.LOST
        again = await take(second)
        assert again.attempt == 3
        await again.complete(OK)
    assert world.model.messages == {}


async def test_what_is_found_besides_is_put_back_at_once(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as first, world.worker() as second:
        lease = await take(first)
        others = {world.submit(f"job-{number}") for number in range(5)}
        await cut_off(world)
        assert await asked(lease) is LeaseState.HELD
        for _ in others:
            other = await take(second, wait=2.0)
            await other.complete(OK)
            assert (await world.record(other.job.id)).failures == 0
        await lease.complete(OK)
    assert world.model.messages == {}


async def test_with_a_redrive_policy_nothing_is_received_to_look_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would spend a try of each message that is found besides."""
    world = RecordWorld(tmp_path, monkeypatch, receives=5)
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await cut_off(world)
        assert await asked(lease) is LeaseState.LOST
        again = await take(source)
        assert again.attempt == 2
        await again.complete(OK)
    assert world.model.messages == {}


async def test_a_job_that_was_deleted_meanwhile_is_lost(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await cut_off(world)
        world.model.messages.clear()
        assert await asked(lease) is LeaseState.LOST
