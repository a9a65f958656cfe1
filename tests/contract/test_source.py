"""What every source of jobs promises (`heeler.sources.base`): one suite, run against each.

What a source can't do (several jobs, lapses, cancelling) is asserted to be so, never skipped.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import anyio
import anyio.abc
import pytest

from heeler.job import Result
from heeler.sources.base import Lease, LeaseLostError, LeaseState, Source, SourceUnavailableError
from tests.support.sources import WORLDS, SourceWorld

pytestmark = pytest.mark.anyio

OK, FAILED = Result(exit_code=0), Result(exit_code=3)

Settle = Callable[[Lease], Awaitable[None]]
SETTLES: dict[str, Settle] = {
    "complete": lambda lease: lease.complete(OK),
    "retry": lambda lease: lease.retry("exit code 3", result=FAILED, delay=5.0),
    "fail": lambda lease: lease.fail("never", result=FAILED),
    "release": lambda lease: lease.release(delay=5.0),
}


class Crew:
    """Workers of a world: their sources run until the test is over, or until they are stopped."""

    def __init__(self, world: SourceWorld, group: anyio.abc.TaskGroup) -> None:
        self._world = world
        self._group = group
        self._runs: dict[Source, tuple[anyio.CancelScope, anyio.Event]] = {}

    def worker(self) -> Source:
        return self._start(self._world.worker())

    async def restarted(self, source: Source) -> Source:
        """A new process in the place of that worker, which is killed."""
        await self.stop(source)
        return self._start(self._world.restarted(source))

    async def stop(self, source: Source) -> None:
        scope, over = self._runs.pop(source)
        scope.cancel()
        await over.wait()  # its last words are said
        await source.aclose()

    async def stop_all(self) -> None:
        for source in [*self._runs]:
            await self.stop(source)

    def _start(self, source: Source) -> Source:
        self._runs[source] = scope, over = anyio.CancelScope(), anyio.Event()

        async def run() -> None:
            with scope:
                await source.run()
            over.set()

        self._group.start_soon(run)
        return source


@pytest.fixture(params=sorted(WORLDS))
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SourceWorld]:
    made = WORLDS[request.param](tmp_path)
    yield made
    made.close()


@pytest.fixture
def anyio_backend(world: SourceWorld) -> object:
    return world.backend


@pytest.fixture
async def crew(world: SourceWorld, anyio_backend: object) -> AsyncIterator[Crew]:
    async with anyio.create_task_group() as group:
        crew = Crew(world, group)
        yield crew
        await crew.stop_all()


async def take(source: Source, wait: float = 1.0) -> Lease:
    with anyio.fail_after(60):
        lease = await source.receive(wait=wait)
    assert lease is not None
    return lease


async def nothing(world: SourceWorld, source: Source) -> bool:
    with anyio.fail_after(60):
        return await source.receive(wait=world.moment) is None


async def state_of(lease: Lease, *, unlike: LeaseState | None = None, progressed: bool = False) -> LeaseState:
    """What the queue says of the lease, once it can be asked, and has heard of what happened outside."""
    with anyio.fail_after(5):
        while True:
            with contextlib.suppress(SourceUnavailableError):
                if (state := await lease.extend(progressed=progressed)) is not unlike:
                    return state
            await anyio.sleep(0.01)
    raise AssertionError


async def news_of(world: SourceWorld, lease: Lease) -> LeaseState:
    """What it says after something happened outside: at once if it has to be asked."""
    return await state_of(lease, unlike=LeaseState.HELD if world.tells else None)


async def test_a_job_is_received_with_its_id_its_body_and_attempt_one(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a")
    source = crew.worker()
    lease = await take(source)
    assert lease.job.id == job_id
    assert b'"command"' in lease.job.body
    assert lease.job.document().id == (job_id if world.makes_ids else "a")
    assert lease.attempt == 1
    assert lease.expires_after > 0
    assert math.isinf(lease.expires_after) is not world.lapses
    assert lease.spends_tries is (world.tries is not None or not world.told)
    assert source.name


async def test_a_job_that_is_out_is_not_given_to_another(world: SourceWorld, crew: Crew) -> None:
    world.submit("a")
    source = crew.worker()
    await take(source)
    assert await nothing(world, source)
    if world.many:
        assert await nothing(world, crew.worker())


async def test_waiting_for_a_job_takes_about_as_long_as_asked(world: SourceWorld, crew: Crew) -> None:
    world.submit("a")
    source = crew.worker()
    await take(source)
    start = anyio.current_time()
    wait = 20 * world.moment
    assert await source.receive(wait=wait) is None
    assert wait <= anyio.current_time() - start < wait + 1.0


async def test_a_job_submitted_while_we_wait_is_received_soon(world: SourceWorld, crew: Crew) -> None:
    if not world.many:
        job_id = world.submit("a")
        assert (await take(crew.worker())).job.id == job_id  # its only job is there before the worker is
        return
    source = crew.worker()
    found: list[tuple[str, float]] = []

    async def wait() -> None:
        found.append(((await take(source, wait=50.0)).job.id, anyio.current_time()))

    async with anyio.create_task_group() as group:
        group.start_soon(wait)
        await anyio.sleep(5 * world.moment)
        job_id = world.submit("a")
        submitted = anyio.current_time()
    assert found[0][0] == job_id
    assert found[0][1] - submitted <= 1.0


async def test_jobs_come_in_the_order_in_which_they_were_submitted(world: SourceWorld, crew: Crew) -> None:
    ids = [world.submit(name) for name in (["a", "b", "c"] if world.many else ["a"])]
    source = crew.worker()
    received = []
    for _ in ids:
        lease = await take(source)
        received.append(lease.job.id)
        await lease.complete(OK)
    assert received == ids


async def test_extending_holds_the_lease(world: SourceWorld, crew: Crew) -> None:
    world.submit("a")
    lease = await take(crew.worker())
    for progressed in (False, True, False):
        world.pass_time(25)
        await anyio.sleep(world.moment)  # what stood still is noticed
        assert await state_of(lease, progressed=progressed) is LeaseState.HELD
    if world.many:
        world.pass_time(25)
        assert await nothing(world, crew.worker())


async def test_a_lapsed_job_goes_to_another_and_its_old_holder_learns_of_it(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a")
    first = crew.worker()
    old = await take(first)
    world.pass_time(1e6 if not world.lapses else old.expires_after + 1)
    if not world.lapses:
        assert await nothing(world, first)
        assert await old.extend() is LeaseState.HELD
        return
    new = await take(crew.worker())
    assert new.job.id == job_id
    assert new.attempt == (2 if world.numbers else 1)
    assert world.numbers or not new.attempts_ordered
    assert await news_of(world, old) is LeaseState.LOST
    for settle in SETTLES.values():
        with pytest.raises(LeaseLostError):
            await settle(old)
    assert await state_of(new) is LeaseState.HELD
    assert world.state(job_id)[1] == (1 if world.counts else 0), "a lapse is no failure, but may count"
    await new.complete(OK)
    assert world.state(job_id)[0] == "done"


async def test_a_holder_hears_of_its_loss_without_asking_where_the_queue_says_so(
    world: SourceWorld, crew: Crew
) -> None:
    world.submit("a")
    lease = await take(crew.worker())
    heard = anyio.Event()
    lease.listen(heard.set)
    world.pass_time(lease.expires_after + 1 if world.lapses else 1e6)
    with anyio.move_on_after(10 * world.moment):
        await heard.wait()
    assert heard.is_set() is world.tells, "those that have to be asked call nobody"


async def test_what_a_dead_worker_held_comes_again_at_once_when_it_is_reclaimed_by_name(
    world: SourceWorld, crew: Crew
) -> None:
    job_id = world.submit("a")
    first = crew.worker()
    held = await take(first)
    if not world.reclaims:  # nothing is held by name
        heir = await crew.restarted(first)
        await heir.reclaim("w0")
        if not world.heirs:
            assert await nothing(world, heir)
            world.pass_time(held.expires_after + 1)
        again = await take(heir)
        assert (again.job.id, again.attempt) == (job_id, 2)
        assert world.state(job_id)[1] == (1 if world.counts and world.numbers else 0)
        return
    heir = crew.worker()
    await heir.reclaim("somebody else")
    assert await nothing(world, heir)
    await heir.reclaim("w0")
    again = await take(heir)
    assert (again.job.id, again.attempt) == (job_id, 2)
    assert await held.extend() is LeaseState.LOST
    await heir.reclaim("w0")
    assert await again.extend() is LeaseState.HELD, "what others hold now is not touched"
    assert world.state(job_id) == ("running", 0)


async def test_a_done_job_never_comes_again(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a")
    source = crew.worker()
    await (await take(source)).complete(OK)
    world.pass_time(1e6)
    assert await nothing(world, source)
    assert await nothing(world, crew.worker())
    assert world.state(job_id) == ("done", 0)
    verdict = source.verdict()
    assert (verdict and verdict.exit_code) == (None if world.many else 0)


async def test_a_failed_attempt_counts_and_comes_again_after_its_rest(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a", max_failures=2)
    source = crew.worker()
    lease = await take(source)
    await source.pause()
    await lease.retry("exit code 3", result=FAILED, delay=50.0)
    assert world.state(job_id) == ("pending" if world.told else "running", 1)
    if world.tries is None:
        assert await nothing(world, source)
    if not world.told:
        assert await nothing(world, crew.worker()), "it may still be run, for all that the queue knows"
    world.pass_time(51)
    for failures in range(2, (world.tries or 2) + 1):
        if not world.told:
            assert await nothing(world, source), "who failed with it does not have it again"
            source = crew.worker()
        lease = await take(source)
        assert lease.attempt == failures
        await source.pause()
        await lease.retry("exit code 3", result=FAILED, delay=0.0)
    assert world.state(job_id) == ("failed", world.tries or 2)
    world.pass_time(1e6)
    assert await nothing(world, crew.worker())


async def test_a_job_that_can_never_succeed_is_set_aside(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a")
    source = crew.worker()
    for failures in range(1, (world.tries or (1 if world.told else 3)) + 1):
        # A queue that can't set jobs aside has to be told so often.
        await (await take(source)).fail("no document", result=Result())
        if not world.told:
            assert world.state(job_id) == ("running" if failures < 3 else "failed", failures)
            world.pass_time(51)
            assert await nothing(world, source)
            source = crew.worker()
    world.pass_time(1e6)
    assert await nothing(world, source)
    assert world.state(job_id)[0] == "failed"
    verdict = source.verdict()
    assert (verdict and verdict.exit_code) == (None if world.many else 64)


async def test_a_released_job_comes_again_at_once_and_nothing_counts(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a", max_failures=1)
    source = crew.worker()
    for attempt in (1, 2, 3):
        lease = await take(source)
        assert lease.attempt == attempt
        await source.pause()
        await lease.release()
        if not world.told:
            assert await nothing(world, source)
            assert await nothing(world, crew.worker())
            world.pass_time(51)
    assert world.state(job_id) == ("pending" if world.told else "running", 3 if world.counts else 0)
    assert source.verdict() is None


async def test_a_job_released_with_a_rest_comes_after_it(world: SourceWorld, crew: Crew) -> None:
    world.submit("a")
    source = crew.worker()
    await (await take(source)).release(delay=50.0)
    if world.tries is None:
        assert await nothing(world, source)
        world.pass_time(51)
    assert (await take(source)).attempt == 2


async def test_a_worker_that_pauses_before_it_settles_is_given_no_other_job(world: SourceWorld, crew: Crew) -> None:
    ids = [world.submit(name) for name in (["a", "b"] if world.many else ["a"])]
    source = crew.worker()
    lease = await take(source)
    await source.pause()
    await lease.complete(OK)
    await anyio.sleep(world.moment)
    assert [world.state(job_id)[0] for job_id in ids] == ["done", "pending"][: len(ids)]
    if world.many:
        assert (await take(source)).job.id == ids[1]


@pytest.mark.parametrize("how", sorted(SETTLES))
async def test_an_answer_that_is_repeated_counts_once(world: SourceWorld, crew: Crew, how: str) -> None:
    job_id = world.submit("a")
    source = crew.worker()
    lease = await take(source)
    await source.pause()
    await SETTLES[how](lease)
    once = world.state(job_id)
    await SETTLES[how](lease)
    assert world.state(job_id) == once


@pytest.mark.parametrize("how", sorted(SETTLES))
async def test_an_answer_that_comes_after_the_job_went_to_another_changes_nothing(
    world: SourceWorld, crew: Crew, how: str
) -> None:
    job_id = world.submit("a")
    source = crew.worker()
    old = await take(source)
    await old.release()
    if not world.told:
        world.pass_time(old.expires_after + 1)
    new = await take(source)
    before = world.state(job_id)
    with contextlib.suppress(LeaseLostError):
        await SETTLES[how](old)
    assert world.state(job_id) == before
    assert await new.extend() is LeaseState.HELD
    assert await nothing(world, source), "and it is not given out a second time"


async def test_a_cancelled_job_is_not_given_out_and_its_holder_learns_of_it(world: SourceWorld, crew: Crew) -> None:
    job_id = world.submit("a")
    source = crew.worker()
    lease = await take(source)
    if world.cancels is None:
        with pytest.raises(NotImplementedError):
            world.cancel(job_id)
        assert await lease.extend() is LeaseState.HELD
        return
    other_id = world.submit("b")
    world.cancel(other_id)
    world.cancel(job_id)
    assert await news_of(world, lease) is world.cancels
    for settle in SETTLES.values():
        with pytest.raises(LeaseLostError):
            await settle(lease)
    world.pass_time(1e6)
    assert await nothing(world, source)
    assert world.state(job_id)[0] == world.state(other_id)[0] == "cancelled"


async def test_a_receive_that_is_cancelled_never_drops_a_lease(world: SourceWorld, crew: Crew) -> None:
    """At whatever moment it is cancelled, the job was either not taken at all or is returned."""
    if world.tries is None:
        world.submit("a")
    for steps in range(14):
        if world.tries is not None:
            world.submit(f"a{steps}")
        if not world.told:
            world.pass_time(1e6)
        source = crew.worker()
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
        await crew.stop(source)
        if world.tries is not None:
            world.forget_workers()
        if world.tries is not None or not world.told:
            world.pass_time(1e6)  # what was on its way to a worker that is gone by now
        other = crew.worker()
        lease = await take(other, wait=10.0)  # it may come late, but it comes
        await lease.extend(progressed=True)
        await (lease.release() if world.tries is None else lease.complete(OK))
        await crew.stop(other)
