"""The `salad` source and what the service may answer, at every point (PROTOCOLS.md 1; FAULTS.md, Salad 1, 2, 6, 7)."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest

from heeler.job import Job, Result, Target
from heeler.sources.base import Lease, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.wire.salad_queue import MESSAGE_BYTES
from tests.support.salad_rig import scripted, until
from tests.support.salad_script import HANG, HEARTBEAT, UNKNOWN_MESSAGE, StubMachine, job

pytestmark = pytest.mark.anyio

Code = grpc.StatusCode
ANSWER = Result(status=200, body=b"output")
TOKEN = "eyJhbGciOi.very-secret.token"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def lost(lease: Lease) -> Callable[[], bool]:
    """Whether the lease has said by itself that there is news."""
    heard = anyio.Event()
    lease.listen(heard.set)
    return heard.is_set


async def test_a_job_comes_as_it_was_sent(tmp_path: Path) -> None:
    body = bytes(range(256))
    async with scripted(tmp_path, [HEARTBEAT, job("a", body, port=9000, path="x/y"), HANG]) as (_, rig):
        lease = await rig.take()
        assert lease.job == Job("a", body, Target(9000, "/x/y"), {"Salad-Job-Id": "a"})
        assert (lease.attempt, lease.attempts_ordered, lease.spends_tries) == (1, False, True)
        assert lease.expires_after > 60
        assert await lease.extend() is LeaseState.HELD
        assert rig.source.name == "salad"
        assert rig.source.verdict() is None


async def test_ten_megabytes_go_both_ways(tmp_path: Path) -> None:
    body = b"\xff" * MESSAGE_BYTES
    async with scripted(tmp_path, [job("a", body), HANG]) as (queue, rig):
        lease = await rig.take()
        assert lease.job.body == body
        await lease.complete(Result(status=200, body=body))
        assert [call.output for call in queue.got("CompleteJob")] == [body]


@pytest.mark.parametrize(
    "end", [Code.NOT_FOUND, Code.CANCELLED, Code.INTERNAL, Code.UNKNOWN, Code.RESOURCE_EXHAUSTED, Code.ABORTED, None]
)
async def test_a_stream_that_is_refused_is_opened_again(tmp_path: Path, end: Code | None) -> None:
    """FAULTS, Salad 1."""
    ends = [] if end is None else [end]
    async with scripted(tmp_path, ends, ends, [UNKNOWN_MESSAGE, job("a"), HANG]) as (queue, rig):
        await (await rig.take()).complete(ANSWER)
        assert [call.job_id for call in queue.got("AcceptJobs")] == ["", "", ""]
        assert rig.events == ["queue_unreachable"], "told once in a row"


@pytest.mark.parametrize("end", [Code.UNAVAILABLE, Code.NOT_FOUND, Code.PERMISSION_DENIED])
async def test_a_service_that_goes_on_refusing_is_asked_ever_less_often(tmp_path: Path, end: Code) -> None:
    """FAULTS, Salad 6: 18 calls in 5 s."""
    async with scripted(tmp_path, [end]) as (queue, rig):
        assert await rig.nothing(wait=5.0)
        times = [call.time for call in queue.calls]
        assert 4 <= len(times) <= 8
        assert times[1] - times[0] < 0.7
        assert times[-1] - times[-2] > 0.9


@pytest.mark.parametrize("end", [Code.UNAVAILABLE, None])
async def test_a_service_that_drops_every_stream_at_once_is_not_asked_in_a_hot_loop(
    tmp_path: Path, end: Code | None
) -> None:
    async with scripted(tmp_path, [HEARTBEAT, *([end] if end else [])]) as (queue, rig):
        assert await rig.nothing(wait=5.0)
        assert 5 <= len(queue.calls) <= 12, "about one a second"


@pytest.mark.parametrize("refusal", [Code.UNAUTHENTICATED, Code.PERMISSION_DENIED])
async def test_a_refused_token_is_replaced_at_once(tmp_path: Path, refusal: Code) -> None:
    machine = StubMachine("old", "new")
    async with scripted(tmp_path, [refusal], [job("a"), HANG], machine=machine) as (queue, rig):
        start = time.monotonic()
        await rig.take()
        assert time.monotonic() - start < 0.5
        assert [call.token for call in queue.calls] == ["old", "new"]
        assert rig.faults == []


@pytest.mark.parametrize("refusal", [Code.UNAUTHENTICATED, Code.PERMISSION_DENIED])
@pytest.mark.parametrize("how", ["CompleteJob", "RejectJob"])
async def test_a_token_refused_for_an_answer_is_replaced_at_once(tmp_path: Path, refusal: Code, how: str) -> None:
    machine = StubMachine("old", "new")
    script: dict[str, Any] = {how: [refusal, None]}
    async with scripted(tmp_path, [job("a"), HANG], machine=machine, **script) as (queue, rig):
        lease = await rig.take()
        await (lease.complete(ANSWER) if how == "CompleteJob" else lease.release())
        assert [call.token for call in queue.got(how)] == ["old", "new"]


async def test_no_token_is_ever_told(tmp_path: Path) -> None:
    """FAULTS, Salad 7; even where the service sends it back."""
    machine = StubMachine(TOKEN)
    streams = [[Code.UNAUTHENTICATED], [Code.PERMISSION_DENIED], [Code.INTERNAL], [job("a"), Code.INTERNAL]]
    refusals = [Code.INTERNAL, Code.UNAUTHENTICATED, Code.UNAUTHENTICATED, Code.INVALID_ARGUMENT]
    async with scripted(tmp_path, *streams, machine=machine, CompleteJob=refusals) as (queue, rig):
        queue.details = f"what is {TOKEN}?"
        lease = await rig.take()
        told = [repr(rig.source), repr(lease), repr(lease.job)]
        for _ in range(2):
            with pytest.raises(SourceUnavailableError) as raised:
                await lease.complete(ANSWER)
            told += [str(raised.value), repr(raised.value)]
        await lease.complete(ANSWER)
        told += [repr(fault) for fault in rig.faults]
        assert len(queue.calls) >= 9
        assert "answer_refused" in rig.events
        assert "********" in "".join(told)
        assert TOKEN not in "".join(told)


async def test_a_silent_stream_counts_as_broken_and_is_opened_again_for_the_job_that_we_have(tmp_path: Path) -> None:
    streams = [[HANG], [job("a"), 0.3, HEARTBEAT, HANG], [HEARTBEAT, HANG]]
    async with scripted(tmp_path, *streams, silence=0.5) as (queue, rig):
        lease = await rig.take()
        await until(lambda: queue.open == 0)
        with pytest.raises(SourceUnavailableError):
            await lease.extend()
        await until(rig.source.alive)
        assert await lease.extend() is LeaseState.HELD
        first, second, third = queue.calls
        assert [first.job_id, second.job_id, third.job_id] == ["", "", "a"]
        assert 0.5 <= second.time - first.time < 1.5
        assert 0.8 <= third.time - second.time < 1.8
        assert rig.events[0] == "queue_silent"


async def test_cancelled_is_not_believed_and_not_found_is(tmp_path: Path) -> None:
    go_on = anyio.Event()
    streams = [[job("a"), Code.CANCELLED], [HEARTBEAT, go_on, Code.NOT_FOUND], [job("b"), HANG]]
    async with scripted(tmp_path, *streams) as (queue, rig):
        lease = await rig.take()
        await until(lambda: len(queue.calls) == 2 and rig.source.alive())
        assert await lease.extend() is LeaseState.HELD
        go_on.set()
        await until(lost(lease), timeout=2.0)
        assert await lease.extend() is LeaseState.LOST
        for settle in (lease.complete(ANSWER), lease.release()):
            with pytest.raises(LeaseLostError):
                await settle
        assert (await rig.take()).job.id == "b"
        assert [(call.method, call.job_id) for call in queue.calls] == [
            ("AcceptJobs", ""),
            ("AcceptJobs", "a"),
            ("AcceptJobs", ""),
        ]


async def test_another_job_on_the_stream_means_that_ours_is_lost(tmp_path: Path) -> None:
    async with scripted(tmp_path, [job("a"), job("a", b"again"), 0.1, job("b"), HANG]) as (queue, rig):
        lease = await rig.take()
        await until(lost(lease), timeout=2.0)
        assert await lease.extend() is LeaseState.LOST
        next_lease = await rig.take()
        assert (next_lease.job.id, next_lease.attempt) == ("b", 1)
        await next_lease.complete(ANSWER)
        assert [call.job_id for call in queue.got("CompleteJob")] == ["b"]


@pytest.mark.parametrize(
    "code", [Code.UNKNOWN, Code.INTERNAL, Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED, Code.CANCELLED]
)
@pytest.mark.parametrize("how", ["CompleteJob", "RejectJob"])
async def test_an_answer_without_an_answer_may_be_repeated_until_it_has_one(
    tmp_path: Path, code: Code, how: str
) -> None:
    """NOT_FOUND then means that one of the calls before took effect."""
    script: dict[str, Any] = {how: [code, code, Code.NOT_FOUND]}
    async with scripted(tmp_path, [job("a"), HANG], **script) as (queue, rig):
        lease = await rig.take()
        for _ in range(2):
            with pytest.raises(SourceUnavailableError):
                await (lease.complete(ANSWER) if how == "CompleteJob" else lease.retry("", result=ANSWER, delay=9.0))
            assert not lease._held.lost.is_set()  # type: ignore[attr-defined]
        await lease.complete(ANSWER)  # what was decided on first is told
        await lease.release()
        assert [call.method for call in queue.calls[1:]] == [how] * 3


@pytest.mark.parametrize("how", ["CompleteJob", "RejectJob"])
async def test_not_found_at_once_means_that_the_job_is_no_longer_ours(tmp_path: Path, how: str) -> None:
    script: dict[str, Any] = {how: [Code.NOT_FOUND]}
    async with scripted(tmp_path, [job("a"), 0.3, job("b"), HANG], **script) as (queue, rig):
        lease = await rig.take()
        for _ in range(2):
            with pytest.raises(LeaseLostError):
                await (lease.complete(ANSWER) if how == "CompleteJob" else lease.fail("", result=Result()))
        assert await lease.extend() is LeaseState.LOST
        assert len(queue.got(how)) == 1
        assert (await rig.take()).job.id == "b"
    assert not (tmp_path / "salad.answer").exists()


@pytest.mark.parametrize("code", [Code.INVALID_ARGUMENT, Code.RESOURCE_EXHAUSTED])
async def test_an_answer_that_is_not_acceptable_becomes_a_rejection(tmp_path: Path, code: Code) -> None:
    script: dict[str, Any] = {"CompleteJob": [code], "RejectJob": [Code.UNAVAILABLE, None]}
    async with scripted(tmp_path, [job("a"), HANG], **script) as (queue, rig):
        lease = await rig.take()
        with pytest.raises(SourceUnavailableError):
            await lease.complete(ANSWER)
        await lease.complete(ANSWER)
        assert [call.method for call in queue.calls[1:]] == ["CompleteJob", "RejectJob", "RejectJob"]
        assert rig.events == ["answer_refused"]


async def test_a_repeated_answer_finds_out_what_a_call_that_hung_did(tmp_path: Path) -> None:
    async with scripted(tmp_path, [job("a"), HANG], CompleteJob=[HANG, Code.NOT_FOUND]) as (queue, rig):
        lease = await rig.take()
        with anyio.move_on_after(0.3) as scope:
            await lease.complete(ANSWER)
        assert scope.cancelled_caught
        await lease.complete(ANSWER)
        await lease.complete(ANSWER)
        assert len(queue.got("CompleteJob")) == 2


async def test_the_next_job_shows_that_an_unanswered_call_took_effect(tmp_path: Path) -> None:
    answered = anyio.Event()
    stream = [job("a"), answered, job("b"), HANG]
    async with scripted(tmp_path, stream, CompleteJob=[HANG, Code.NOT_FOUND]) as (queue, rig):
        lease = await rig.take()
        with anyio.move_on_after(0.3):
            await lease.complete(ANSWER)
        answered.set()
        assert (await rig.take()).job.id == "b"
        await lease.complete(ANSWER)
        assert not lease._held.lost.is_set()  # type: ignore[attr-defined]
        assert len(queue.got("CompleteJob")) == 1


async def test_the_next_job_may_come_before_the_answer_to_our_answer(tmp_path: Path) -> None:
    """Also if it is the same one, rejected just now."""
    rejected, sent = anyio.Event(), anyio.Event()
    stream = [job("a"), rejected, job("a"), 0.2, HANG]
    async with scripted(tmp_path, stream, RejectJob=[sent]) as (_, rig):
        lease = await rig.take()
        async with anyio.create_task_group() as group:
            group.start_soon(lease.release)
            rejected.set()
            again = await rig.take()
            sent.set()
        assert (again.job.id, again.attempt) == ("a", 2)
        assert await again.extend() is LeaseState.HELD
        await lease.release()
        assert await again.extend() is LeaseState.HELD
        await again.complete(ANSWER)


async def test_what_the_program_says_decides_between_the_two_calls(tmp_path: Path) -> None:
    ended = [anyio.Event() for _ in range(4)]
    stream = [job("1"), ended[0], job("2"), ended[1], job("3"), ended[2], job("4"), ended[3], HANG]
    async with scripted(tmp_path, stream) as (queue, rig):
        await (await rig.take()).fail("404", result=Result(status=404, body=b"none"))
        ended[0].set()
        await (await rig.take()).fail("no document", result=Result())
        ended[1].set()
        await (await rig.take()).complete(Result(exit_code=0))
        ended[2].set()
        await (await rig.take()).retry("500", result=Result(status=500, body=b"oops"), delay=100.0)
        told = [(call.method, call.output) for call in queue.calls[1:]]
        assert told[:2] == [("CompleteJob", b"none"), ("RejectJob", b"")]
        assert json.loads(told[2][1]) == {"exit_code": 0, "signal": None}
        assert told[3] == ("RejectJob", b"")


@pytest.mark.parametrize("job_id", ["../../etc", "a/b", "", "x" * 300])
async def test_a_job_whose_id_can_not_stand_in_paths_is_rejected(tmp_path: Path, job_id: str) -> None:
    script: dict[str, Any] = {"RejectJob": [Code.INVALID_ARGUMENT if not job_id else None]}
    async with scripted(tmp_path, [job(job_id), 0.3, job("b"), HANG], **script) as (queue, rig):
        assert (await rig.take()).job.id == "b"
        assert [call.job_id for call in queue.got("RejectJob")] == [job_id]
        assert rig.events[0] == "job_refused"
