"""The `salad` source against the queue's own rules (`heeler.local`): whatever breaks, each job is done once."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import grpc
import pytest

from heeler.job import Result
from heeler.local.queue_model import End, JobStatus
from heeler.platform.imds import Imds
from heeler.scopes import Doubling
from heeler.sources.base import BARREN_LIMIT, Lease, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.wire.salad_queue import TRIES
from tests.support.salad import SaladService
from tests.support.salad_rig import Rig, files_in, running, until

pytestmark = pytest.mark.anyio

T = TypeVar("T")
Code = grpc.StatusCode
ANSWER = Result(status=200, body=b"output")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def salad() -> Iterator[SaladService]:
    with SaladService(heartbeat=0.5) as service:
        yield service


@asynccontextmanager
async def worker(salad: SaladService, folder: Path, **options: Any) -> AsyncIterator[Rig]:
    machine = Imds(salad.machine.url)
    try:
        async with running(salad.endpoint, folder, machine, **{"silence": 5.0, **options}) as rig:
            yield rig
    finally:
        machine.close()


async def aside(call: Callable[..., T], *args: Any) -> T:
    return await anyio.to_thread.run_sync(lambda: call(*args))


async def settle(call: Callable[[], Any]) -> None:
    """As the forwarder does it."""
    backoff = Doubling(0.2, 5.0, random.Random())
    while True:
        try:
            await call()
        except SourceUnavailableError:
            await anyio.sleep(backoff.next())
        else:
            return


async def complete(lease: Lease) -> None:
    await settle(lambda: lease.complete(ANSWER))


async def held_again(lease: Lease) -> None:
    with anyio.fail_after(10):
        while True:
            try:
                assert await lease.extend() is LeaseState.HELD
            except SourceUnavailableError:
                await anyio.sleep(0.01)
            else:
                return


def assert_done_once(salad: SaladService, *jobs: str) -> None:
    for job_id in jobs:
        job = salad.job(job_id)
        assert (job.status, job.tries, job.output) == (JobStatus.SUCCEEDED, 1, b"output")


async def assert_next_within_two_seconds(salad: SaladService, rig: Rig) -> None:
    start = time.monotonic()
    job = salad.submit(b"next")
    lease = await rig.take()
    assert time.monotonic() - start < 2.0
    assert lease.job.id == job
    await complete(lease)
    assert_done_once(salad, job)


@pytest.mark.parametrize("why", [End.DROPPED, End.CLOSED])
async def test_a_stream_dropped_while_idle(salad: SaladService, tmp_path: Path, why: End) -> None:
    async with worker(salad, tmp_path) as rig:
        assert await rig.nothing()
        salad.drop_streams(why)
        await assert_next_within_two_seconds(salad, rig)


@pytest.mark.parametrize("why", [End.DROPPED, End.CLOSED])
async def test_a_stream_dropped_in_a_job(salad: SaladService, tmp_path: Path, why: End) -> None:
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        for _ in range(2):
            salad.drop_streams(why)
            await until(lambda: not rig.source.alive())
            start = time.monotonic()
            await held_again(lease)
            assert time.monotonic() - start < 2.0
        await complete(lease)
        await assert_next_within_two_seconds(salad, rig)
    assert_done_once(salad, job)


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.INTERNAL, Code.UNKNOWN])
async def test_a_stream_dropped_while_the_answer_is_told(
    salad: SaladService, tmp_path: Path, code: Code, applied: bool
) -> None:
    job = salad.submit(b"input")
    salad.faults.fail("CompleteJob", code, 2, applied=applied)
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        with pytest.raises(SourceUnavailableError):
            await lease.complete(ANSWER)
        salad.drop_streams()
        await complete(lease)
        await assert_next_within_two_seconds(salad, rig)
    assert_done_once(salad, job)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("down", [0.0, 3.0])
async def test_a_service_restarted_while_idle(salad: SaladService, tmp_path: Path, down: float) -> None:
    async with worker(salad, tmp_path) as rig:
        assert await rig.nothing()
        await aside(salad.restart, down)
        await assert_next_within_two_seconds(salad, rig)


@pytest.mark.parametrize("down", [0.0, 3.0])
async def test_a_service_restarted_in_a_job(salad: SaladService, tmp_path: Path, down: float) -> None:
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        await aside(salad.stop)
        await anyio.sleep(down)
        await aside(salad.start)
        start = time.monotonic()
        await held_again(lease)
        assert time.monotonic() - start < 2.0
        await complete(lease)
        await assert_next_within_two_seconds(salad, rig)
    assert_done_once(salad, job)


@pytest.mark.parametrize("down", [0.5, 6.0])
async def test_a_service_restarted_while_the_answer_is_told(salad: SaladService, tmp_path: Path, down: float) -> None:
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        await aside(salad.stop)
        async with anyio.create_task_group() as group:
            group.start_soon(complete, lease)
            await anyio.sleep(down)
            await aside(salad.start)
            start = time.monotonic()
        assert time.monotonic() - start < 2.0
        await assert_next_within_two_seconds(salad, rig)
    assert_done_once(salad, job)


async def test_a_service_that_is_away_at_the_start(salad: SaladService, tmp_path: Path) -> None:
    await aside(salad.stop)
    async with worker(salad, tmp_path) as rig:
        assert await rig.nothing(wait=3.0)
        assert rig.events == ["queue_unreachable"]
        await aside(salad.start)
        await assert_next_within_two_seconds(salad, rig)


async def test_a_token_that_expires_in_a_job(salad: SaladService, tmp_path: Path) -> None:
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        salad.expire_tokens()
        await held_again(lease)
        await lease.complete(ANSWER)
        salad.expire_tokens()
        salad.drop_streams()
        await assert_next_within_two_seconds(salad, rig)
    assert_done_once(salad, job)


@pytest.mark.parametrize("down", [1.0, 8.0])
async def test_a_metadata_service_that_is_away_at_the_start(salad: SaladService, tmp_path: Path, down: float) -> None:
    await aside(salad.machine.stop)
    async with worker(salad, tmp_path) as rig:
        assert await rig.nothing(wait=down)
        await aside(salad.machine.start)
        await assert_next_within_two_seconds(salad, rig)


@pytest.mark.parametrize("down", [2.0, 9.0])
async def test_a_metadata_service_that_is_away_in_a_job(salad: SaladService, tmp_path: Path, down: float) -> None:
    """With the token refused and the stream dropped besides."""
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        await aside(salad.machine.stop)
        salad.expire_tokens()
        salad.drop_streams()
        async with anyio.create_task_group() as group:
            group.start_soon(complete, lease)
            await anyio.sleep(down)
            await aside(salad.machine.start)
            start = time.monotonic()
        await assert_next_within_two_seconds(salad, rig)
        assert time.monotonic() - start < 2.0
    assert_done_once(salad, job)


async def test_a_service_without_tls_is_not_spoken_to_where_tls_is_wanted(salad: SaladService, tmp_path: Path) -> None:
    async with worker(salad, tmp_path, tls=True) as rig:
        assert await rig.nothing(wait=1.0)
        assert rig.events == ["queue_unreachable"]
        assert [*salad.faults.calls] == []


async def test_heartbeats_keep_the_stream_open(salad: SaladService, tmp_path: Path) -> None:
    async with worker(salad, tmp_path, silence=1.5) as rig:
        assert await rig.nothing(wait=4.0)
        assert len(salad.faults.calls) == 1
        assert rig.faults == []


async def test_a_cancelled_job_is_lost_and_the_next_is_taken(salad: SaladService, tmp_path: Path) -> None:
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        heard = anyio.Event()
        lease.listen(heard.set)
        salad.cancel(job)
        with anyio.fail_after(2):
            await heard.wait()
        assert await lease.extend() is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await lease.complete(ANSWER)
        await assert_next_within_two_seconds(salad, rig)
    assert salad.job(job).status is JobStatus.CANCELLED
    assert {call.method for call in salad.faults.calls if call.job_id == job} == {"AcceptJobs"}


async def test_a_rejected_job_comes_again_four_times_in_all(salad: SaladService, tmp_path: Path) -> None:
    job = salad.submit(b"input")
    async with worker(salad, tmp_path) as rig:
        for attempt in range(1, TRIES + 1):
            lease = await rig.take()
            assert (lease.job.id, lease.attempt) == (job, attempt)
            await lease.retry("exit code 3", result=Result(exit_code=3), delay=100.0)
        assert await rig.nothing()
    assert salad.job(job).status is JobStatus.FAILED


async def test_what_was_handed_back_in_a_drain_goes_to_another(salad: SaladService, tmp_path: Path) -> None:
    first, second = salad.submit(b"1"), salad.submit(b"2")
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        await rig.source.pause()
        await lease.release("the worker was told to stop")
        assert await aside(salad.wait_for, first, JobStatus.PENDING)
        assert salad.job(second).tries == 0
    assert files_in(tmp_path) == []


async def test_a_killed_worker_takes_its_job_up_again_without_spending_a_try(
    salad: SaladService, tmp_path: Path
) -> None:
    body = bytes(range(256)) * 1000
    job = salad.submit(body)
    async with worker(salad, tmp_path) as rig:
        before = await rig.take()
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        assert lease.job == before.job
        assert lease.attempt == 2
        await complete(lease)
        await assert_next_within_two_seconds(salad, rig)
        assert rig.faults == []
    assert_done_once(salad, job)


async def test_a_job_that_went_to_another_meanwhile_is_left_to_it(tmp_path: Path) -> None:
    with SaladService(heartbeat=0.5, grace=0.3) as salad:
        other = salad.add_machine("machine-2")
        job = salad.submit(b"input")
        async with worker(salad, tmp_path) as rig:
            await rig.take()
        (tmp_path / "other").mkdir()
        machine = Imds(other.url)
        async with running(salad.endpoint, tmp_path / "other", machine) as others:
            theirs = await others.take()
            async with worker(salad, tmp_path) as rig:
                assert await rig.nothing()
                await assert_next_within_two_seconds(salad, rig)
                assert files_in(tmp_path) == ["other"]
            assert theirs.job.id == job
            assert await theirs.extend() is LeaseState.HELD
            await theirs.complete(ANSWER)
        machine.close()


@pytest.mark.parametrize("how", ["complete", "release"])
@pytest.mark.parametrize("applied", [True, False])
async def test_an_answer_that_was_not_told_is_told_by_the_next_process(
    salad: SaladService, tmp_path: Path, how: str, applied: bool
) -> None:
    job = salad.submit(b"input")
    salad.faults.fail("CompleteJob" if how == "complete" else "RejectJob", Code.UNAVAILABLE, 2, applied=applied)
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        await rig.source.pause()
        with pytest.raises(SourceUnavailableError):
            await (lease.complete(ANSWER) if how == "complete" else lease.release())
    assert files_in(tmp_path) == ["salad.answer"]
    async with worker(salad, tmp_path) as rig:
        await aside(salad.wait_for, job, JobStatus.SUCCEEDED if how == "complete" else JobStatus.PENDING)
        await until(lambda: files_in(tmp_path) == [])
        assert salad.streams() == 0, "nobody has asked for a job"
        if how == "release":
            assert (await rig.take()).job.id == job
    assert salad.job(job).tries == (1 if how == "complete" else 2)


async def test_damaged_records_are_told_and_cost_a_try(tmp_path: Path) -> None:
    with SaladService(heartbeat=0.5, grace=0.3) as salad:
        job = salad.submit(b"input")
        async with worker(salad, tmp_path) as rig:
            await rig.take()
        for name in ("salad.job", "salad.answer"):
            (tmp_path / name).write_bytes((tmp_path / "salad.job").read_bytes()[:-1])
        async with worker(salad, tmp_path) as rig:
            lease = await rig.take()
            assert rig.events == ["record_damaged"] * 2
            assert lease.job.id == job
            await complete(lease)
        assert (salad.job(job).status, salad.job(job).tries) == (JobStatus.SUCCEEDED, 2)


async def test_a_job_that_kills_its_machine_again_and_again_is_rejected(salad: SaladService, tmp_path: Path) -> None:
    job = salad.submit(b"input")
    for attempt in range(1, BARREN_LIMIT + 1):
        async with worker(salad, tmp_path) as rig:
            assert (await rig.take()).attempt == attempt
    async with worker(salad, tmp_path) as rig:
        lease = await rig.take()
        assert rig.events == ["job_barren"]
        assert (salad.job(job).tries, lease.job.id) == (2, job)


async def test_a_job_that_makes_something_durable_may_be_interrupted_for_ever(
    salad: SaladService, tmp_path: Path
) -> None:
    job = salad.submit(b"input")
    for attempt in range(1, 2 * BARREN_LIMIT):
        async with worker(salad, tmp_path) as rig:
            lease = await rig.take()
            assert lease.attempt == attempt
            if not attempt % 5:
                await lease.extend(progressed=True)
    assert salad.job(job).tries == 1


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_goes_wrong_each_job_is_done_once(salad: SaladService, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    jobs = [salad.submit(b"input") for _ in range(25)]

    async def hurt() -> None:
        while True:
            await aside(rng.choice([salad.drop_streams, salad.expire_tokens, salad.restart, fail, fail, fail]))
            await anyio.sleep(rng.uniform(0.0, 0.5))
            salad.faults.clear()  # else every try to open a stream would meet the next one
            await anyio.sleep(rng.uniform(0.0, 0.5))

    def fail() -> None:
        code = rng.choice([Code.UNAVAILABLE, Code.INTERNAL, Code.UNKNOWN, Code.UNAUTHENTICATED])
        method = rng.choice(["AcceptJobs", "CompleteJob"])
        applied = method == "CompleteJob" and code is not Code.UNAUTHENTICATED and rng.random() < 0.5
        salad.faults.fail(method, code, rng.randint(1, 3), applied=applied)

    with anyio.fail_after(60):
        async with worker(salad, tmp_path) as rig, anyio.create_task_group() as group:
            group.start_soon(hurt)
            done = []
            for _ in jobs:
                lease = await rig.take(wait=30.0)
                done.append(lease.job.id)
                await anyio.sleep(rng.uniform(0.0, 0.2))
                await complete(lease)
            group.cancel_scope.cancel()
    # A try may be spent on a job that was lost on its way to us, but then we knew nothing of it.
    assert sorted(done) == sorted(jobs)
    assert {salad.job(job).status for job in jobs} == {JobStatus.SUCCEEDED}
    assert files_in(tmp_path) == []
