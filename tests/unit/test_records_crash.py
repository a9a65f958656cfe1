"""A worker with records that dies at any call of queue or bucket: the job ends once, with one result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from heeler.job import Result
from heeler.records.source import RecordedSource
from heeler.sources.base import Lease, SourceUnavailableError
from tests.support.crashing import CrashError, Fuse, When
from tests.support.record_world import PREFIX, RecordWorld, take
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

OK = Result(exit_code=0)
BAD = Result(exit_code=1)
Life = Callable[[Lease], Awaitable[None]]
CRASHES = (When.BEFORE, When.AFTER)


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


async def done(lease: Lease) -> None:
    await lease.extend(progressed=True)
    await lease.complete(OK)


async def failed(lease: Lease) -> None:
    await lease.extend()
    await lease.fail("bad input", result=BAD)


async def retried(lease: Lease) -> None:
    await lease.retry("exit code 1", result=BAD, delay=2.0)


async def released(lease: Lease) -> None:
    await lease.extend()
    await lease.release("the worker was told to stop")


LIVES: dict[str, Life] = {"done": done, "failed": failed, "retried": retried, "released": released}


async def live(source: RecordedSource, life: Life) -> None:
    await life(await take(source, wait=100.0))


async def first_life(world: RecordWorld, life: Life, fuse: Fuse) -> None:
    """A worker that dies where its fuse says."""
    try:
        async with world.worker(fuse) as source:
            await live(source, life)
    except (CrashError, SourceUnavailableError):
        assert fuse.dead


async def to_the_end(world: RecordWorld, life: Life) -> int:
    """A worker that lives until the queue is empty; how often it ran the job."""
    runs = 0
    async with world.worker() as source:
        while world.model.messages:
            lease = await source.receive(wait=30.0)
            if lease is not None:
                runs += 1
                await (life if life in (done, failed) else done)(lease)
    return runs


async def operations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, life: Life, webhook: str | None) -> int:
    """How many there are in a life without a crash."""
    world, fuse = RecordWorld(tmp_path, monkeypatch), Fuse()
    world.submit(webhook=webhook)
    await first_life(world, life, fuse)
    return len(fuse.operations)


@pytest.mark.parametrize("webhook", [None, "http://x/"])
@pytest.mark.parametrize("name", LIVES)
async def test_a_crash_at_any_call_leaves_a_job_that_ends_once(
    name: str, webhook: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = LIVES[name]
    count = await operations(tmp_path, monkeypatch, life, webhook)
    assert count >= 4
    for when in CRASHES:
        for number in range(count):
            world, fuse = RecordWorld(tmp_path, monkeypatch), Fuse(number, when)
            world.submit(webhook=webhook)
            with anyio.fail_after(1000):
                await first_life(world, life, fuse)
                runs = await to_the_end(world, life)
            await check(world, life, runs, f"{name}: {fuse.last}", webhook)


async def check(world: RecordWorld, life: Life, runs: int, where: str, webhook: str | None) -> None:
    record = await world.record()
    assert record.state == ("failed" if life is failed else "done"), where
    assert len(record.history) <= record.attempts <= 3, where
    assert record.attempts == record.failures + record.interruptions + int(record.state == "done"), where
    assert record.failures <= (1 if life in (failed, retried) else 0), where
    assert len(world.model.dead) == (0 if life is not failed else max(1, len(world.model.dead))), where
    assert len(world.model.dead) <= 2, where
    assert record.result_key.removeprefix(f"{PREFIX}results/") in world.results(), where
    assert runs <= 2, where
    assert len({event.id for _, event in world.webhooks.sent}) == int(webhook is not None), where
    if webhook:
        assert 1 <= len(world.webhooks.sent) <= 2, where
        assert record.webhook == "sent", where


@pytest.mark.parametrize("when", CRASHES)
async def test_a_crash_after_the_end_was_written_runs_nothing_again(
    when: When, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, fuse = RecordWorld(tmp_path, monkeypatch), Fuse(("", "delete"), when)
    world.submit()
    await first_life(world, done, fuse)
    assert fuse.dead
    assert await to_the_end(world, done) == 0
    assert (await world.record()).attempts == 1


async def test_two_workers_that_crash_at_every_pair_of_calls_leave_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = await operations(tmp_path, monkeypatch, done, None)
    for first in range(count):
        for second in range(count):
            world = RecordWorld(tmp_path, monkeypatch)
            world.submit()
            for number in (first, second):
                if world.model.messages:
                    try:
                        with anyio.move_on_after(200):
                            await first_life(world, done, Fuse(number, When.AFTER))
                    except AssertionError:
                        assert not world.model.messages, f"{first}, {second}"
            runs = await to_the_end(world, done)
            await check(world, done, runs, f"{first}, {second}", None)
