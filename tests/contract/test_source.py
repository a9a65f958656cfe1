"""What every source of jobs promises (`heeler.sources.base`): one suite, run against each.

What a source can't do (several jobs, lapses, cancelling) is asserted to be so, never skipped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from heeler.job import Result
from heeler.sources.base import Lease, LeaseLostError, LeaseState, Source
from tests.support.sources import WORLDS, SourceWorld
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

OK, FAILED = Result(exit_code=0), Result(exit_code=3)

Settle = Callable[[Lease], Awaitable[None]]
SETTLES: dict[str, Settle] = {
    "complete": lambda lease: lease.complete(OK),
    "retry": lambda lease: lease.retry("exit code 3", result=FAILED, delay=5.0),
    "fail": lambda lease: lease.fail("never", result=FAILED),
    "release": lambda lease: lease.release(delay=5.0),
}


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture(params=sorted(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> SourceWorld:
    return WORLDS[request.param](tmp_path)


async def take(source: Source, wait: float = 1.0) -> Lease:
    with anyio.fail_after(60):
        lease = await source.receive(wait=wait)
    assert lease is not None
    return lease


async def nothing(source: Source, wait: float = 1.0) -> bool:
    with anyio.fail_after(60):
        return await source.receive(wait=wait) is None


async def test_a_job_is_received_with_its_id_its_body_and_attempt_one(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    lease = await take(source)
    assert lease.job.id == "a"
    assert b'"command"' in lease.job.body
    assert lease.job.document().id == "a"
    assert lease.attempt == 1
    assert lease.expires_after > 0
    assert math.isinf(lease.expires_after) is not world.lapses
    assert source.name
    await source.aclose()


async def test_a_job_that_is_out_is_not_given_to_another(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    await take(source)
    assert await nothing(source)
    if world.many:
        assert await nothing(world.worker())


async def test_waiting_for_a_job_takes_about_as_long_as_asked(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    await take(source)
    start = anyio.current_time()
    assert await nothing(source, wait=20.0)
    assert 20.0 <= anyio.current_time() - start < 21.0


async def test_a_job_submitted_while_we_wait_is_received_soon(world: SourceWorld) -> None:
    if not world.many:
        world.submit("a")
        assert (await take(world.worker())).job.id == "a"  # its only job is there before the worker is
        return
    source = world.worker()
    found: list[float] = []

    async def wait() -> None:
        assert (await take(source, wait=50.0)).job.id == "a"
        found.append(anyio.current_time())

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.sleep(5)
        world.submit("a")
        submitted = anyio.current_time()
    assert found[0] - submitted <= 1.0


async def test_jobs_come_in_the_order_in_which_they_were_submitted(world: SourceWorld) -> None:
    ids = ["a", "b", "c"] if world.many else ["a"]
    for job_id in ids:
        world.submit(job_id)
    source = world.worker()
    assert [(await take(source)).job.id for _ in ids] == ids


async def test_extending_holds_the_lease(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    lease = await take(source)
    for progressed in (False, True, False):
        world.pass_time(25)
        assert await lease.extend(progressed=progressed) is LeaseState.HELD
    if world.many:
        world.pass_time(25)
        assert await nothing(world.worker())


async def test_a_lapsed_job_goes_to_another_and_its_old_holder_learns_of_it(world: SourceWorld) -> None:
    world.submit("a")
    first = world.worker()
    old = await take(first)
    world.pass_time(1e6 if not world.lapses else old.expires_after + 1)
    if not world.lapses:
        assert await nothing(first)
        assert await old.extend() is LeaseState.HELD
        return
    new = await take(world.worker())
    assert (new.job.id, new.attempt) == ("a", 2)
    assert await old.extend() is LeaseState.LOST
    for settle in SETTLES.values():
        with pytest.raises(LeaseLostError):
            await settle(old)
    assert await new.extend() is LeaseState.HELD
    assert world.state("a")[1] == 0, "a lapse is no failure of the job"
    await new.complete(OK)
    assert world.state("a")[0] == "done"


async def test_what_a_dead_worker_held_comes_again_at_once_when_it_is_reclaimed_by_name(world: SourceWorld) -> None:
    world.submit("a")
    held = await take(world.worker())
    heir = world.worker()
    if not world.lapses:  # nothing is held by name, and the one job that there is comes to whoever restarts
        await heir.reclaim("w0")
        assert (await take(heir)).attempt == 2
        return
    await heir.reclaim("somebody else")
    assert await nothing(heir)
    await heir.reclaim("w0")
    again = await take(heir)
    assert (again.job.id, again.attempt) == ("a", 2)
    assert await held.extend() is LeaseState.LOST
    await heir.reclaim("w0")
    assert await again.extend() is LeaseState.HELD, "what others hold now is not touched"
    assert world.state("a") == ("running", 0)


async def test_a_done_job_never_comes_again(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    await (await take(source)).complete(OK)
    world.pass_time(1e6)
    assert await nothing(source)
    assert await nothing(world.worker())
    assert world.state("a") == ("done", 0)
    verdict = source.verdict()
    assert (verdict and verdict.exit_code) == (None if world.many else 0)


async def test_a_failed_attempt_counts_and_comes_again_after_its_rest(world: SourceWorld) -> None:
    world.submit("a", max_failures=2)
    source = world.worker()
    await (await take(source)).retry("exit code 3", result=FAILED, delay=50.0)
    assert world.state("a") == ("pending", 1)
    assert await nothing(source)
    world.pass_time(51)
    lease = await take(world.worker())
    assert lease.attempt == 2
    await lease.retry("exit code 3", result=FAILED, delay=0.0)
    assert world.state("a") == ("failed", 2)
    world.pass_time(1e6)
    assert await nothing(world.worker())


async def test_a_job_that_can_never_succeed_is_set_aside(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    await (await take(source)).fail("no document", result=Result())
    world.pass_time(1e6)
    assert await nothing(source)
    assert world.state("a")[0] == "failed"
    verdict = source.verdict()
    assert (verdict and verdict.exit_code) == (None if world.many else 64)


async def test_a_released_job_comes_again_at_once_and_nothing_counts(world: SourceWorld) -> None:
    world.submit("a", max_failures=1)
    source = world.worker()
    for attempt in (1, 2, 3):
        lease = await take(source)
        assert lease.attempt == attempt
        await lease.release()
    assert world.state("a") == ("pending", 0)
    assert source.verdict() is None


async def test_a_job_released_with_a_rest_comes_after_it(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    await (await take(source)).release(delay=50.0)
    assert await nothing(source)
    world.pass_time(51)
    assert (await take(source)).attempt == 2


@pytest.mark.parametrize("how", sorted(SETTLES))
async def test_an_answer_that_is_repeated_counts_once(world: SourceWorld, how: str) -> None:
    world.submit("a")
    lease = await take(world.worker())
    await SETTLES[how](lease)
    once = world.state("a")
    await SETTLES[how](lease)
    assert world.state("a") == once


@pytest.mark.parametrize("how", sorted(SETTLES))
async def test_an_answer_that_comes_after_the_job_went_to_another_changes_nothing(world: SourceWorld, how: str) -> None:
    world.submit("a")
    source = world.worker()
    old = await take(source)
    await old.release()
    new = await take(source)
    before = world.state("a")
    with contextlib.suppress(LeaseLostError):
        await SETTLES[how](old)
    assert world.state("a") == before
    assert await new.extend() is LeaseState.HELD
    assert await nothing(source), "and it is not given out a second time"


async def test_a_cancelled_job_is_not_given_out_and_its_holder_learns_of_it(world: SourceWorld) -> None:
    world.submit("a")
    source = world.worker()
    lease = await take(source)
    if not world.cancels:
        with pytest.raises(NotImplementedError):
            world.cancel("a")
        assert await lease.extend() is LeaseState.HELD
        return
    world.submit("b")
    world.cancel("a")
    world.cancel("b")
    assert await lease.extend() is LeaseState.CANCELLED
    for settle in SETTLES.values():
        with pytest.raises(LeaseLostError):
            await settle(lease)
    world.pass_time(1e6)
    assert await nothing(source)
    assert world.state("a")[0] == world.state("b")[0] == "cancelled"


async def test_a_receive_that_is_cancelled_never_drops_a_lease(world: SourceWorld) -> None:
    """At whatever moment it is cancelled, the job was either not taken at all or is returned."""
    world.submit("a")
    for steps in range(14):
        source = world.worker()
        leases: list[Lease | None] = []

        async def receive(source: Source = source, leases: list[Lease | None] = leases) -> None:
            leases.append(await source.receive(wait=30.0))

        async with anyio.create_task_group() as group:
            group.start_soon(receive)
            for _ in range(steps):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        if leases and leases[0] is not None:
            await leases[0].release()
        await source.aclose()
        other = world.worker()
        lease = await take(other)
        await lease.extend(progressed=True)
        await lease.release()
        await other.aclose()
