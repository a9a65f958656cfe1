"""What a killed worker held comes again at once, when the next one takes its place; and what left blocks no group."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from heeler.job import Result
from heeler.sources.base import LeaseState, SourceUnavailableError
from heeler.sources.sqs_handles import FOLDER, Handles
from tests.support.proxy import FaultProxy
from tests.support.sqs_rig import Queues, SqsRig, running
from tests.support.sqs_server import SqsServer

pytestmark = pytest.mark.anyio

OK, FAILED = Result(exit_code=0), Result(exit_code=3)
LONG = 3600
"""Seconds of visibility: whatever comes in a test has not come because it lapsed."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as server:
        yield server


@pytest.fixture
def queues(server: SqsServer) -> Queues:
    return Queues(server)


@pytest.fixture
def fifo(server: SqsServer) -> Queues:
    return Queues(server, ".fifo")


def files(state: Path) -> list[Path]:
    return sorted((state / FOLDER).glob("*"))


def age(state: Path, seconds: float) -> None:
    """Let time pass for the files: each tells when its message lapses."""
    for path in files(state):
        until = path.stat().st_mtime - seconds
        os.utime(path, (until, until))


def heir(url: str, state: Path, **more: str) -> SqsRig:
    """A source in the place of a dead one, before it runs."""
    return SqsRig(url, None, more.get("endpoint"), LONG, "heir", state, False)


async def die_with(url: str, state: Path, count: int) -> None:
    """Hold so many messages, and die."""
    async with running(url, visibility=LONG, state=state) as rig:
        await rig.take_all(count)


async def test_what_a_dead_worker_held_is_visible_at_once(server: SqsServer, queues: Queues, tmp_path: Path) -> None:
    for number in range(12):
        queues.send(str(number))
    await die_with(queues.url, tmp_path, 12)
    assert all(message["hidden"] > LONG - 60 for message in queues.left())
    before = server.calls()
    await heir(queues.url, tmp_path).source.reclaim("w0")
    assert server.calls() - before == {"ChangeMessageVisibilityBatch": 2}
    assert all(message["hidden"] <= 0 for message in queues.left())
    assert files(tmp_path) == []


async def test_one_that_runs_already_keeps_what_it_holds_itself(queues: Queues, tmp_path: Path) -> None:
    queues.send("a")
    async with running(queues.url, visibility=LONG, state=tmp_path) as rig:
        lease = await rig.take()
        await rig.source.reclaim("somebody")
        assert queues.left()[0]["hidden"] > LONG - 60
        assert await lease.extend() is LeaseState.HELD


@pytest.mark.parametrize("how", ["complete", "retry", "fail", "release", "lost"])
async def test_what_is_settled_or_lost_is_not_touched_any_more(
    server: SqsServer, queues: Queues, tmp_path: Path, how: str
) -> None:
    queues.send("a")
    async with running(queues.url, queues.dead, visibility=LONG, state=tmp_path) as rig:
        lease = await rig.take()
        assert len(files(tmp_path)) == 1
        if how == "complete":
            await lease.complete(OK)
        elif how == "retry":
            await lease.retry("exit code 3", result=FAILED, delay=LONG)
        elif how == "fail":
            await lease.fail("never", result=FAILED)
        elif how == "release":
            await lease.release(delay=LONG)
        else:
            server.refuse("ChangeMessageVisibilityBatch", 400, "ReceiptHandleIsInvalid")
            assert await lease.extend() is LeaseState.LOST
        assert files(tmp_path) == []
    before = server.calls()
    await heir(queues.url, tmp_path).source.reclaim("w0")
    assert server.calls() == before


async def test_what_may_have_been_settled_although_nobody_answered_is_not_touched_either(
    server: SqsServer, queues: Queues, tmp_path: Path
) -> None:
    """It may be another worker's by now, and of a standard queue SQS might still take our old handle."""
    queues.send("a")
    async with running(queues.url, visibility=LONG, state=tmp_path) as rig:
        lease = await rig.take()
        server.refuse("ChangeMessageVisibilityBatch", 503, "ServiceUnavailable")
        with pytest.raises(SourceUnavailableError):
            await lease.release()
        assert files(tmp_path) == []


async def test_what_lapsed_belongs_to_others(server: SqsServer, queues: Queues, tmp_path: Path) -> None:
    """Moto takes old handles."""
    queues.send("a")
    await die_with(queues.url, tmp_path, 1)
    age(tmp_path, LONG)
    server.pass_time(LONG + 1)
    async with running(queues.url, visibility=LONG) as other:
        lease = await other.take()
        await heir(queues.url, tmp_path).source.reclaim("w0")
        assert queues.left()[0]["hidden"] > LONG - 60
        await lease.complete(OK)
    assert files(tmp_path) == []


async def test_what_was_extended_is_still_ours(queues: Queues, tmp_path: Path) -> None:
    queues.send("a")
    async with running(queues.url, visibility=LONG, state=tmp_path) as rig:
        lease = await rig.take()
        age(tmp_path, LONG)
        assert await lease.extend() is LeaseState.HELD
    await heir(queues.url, tmp_path).source.reclaim("w0")
    assert queues.left()[0]["hidden"] <= 0


async def test_what_lapsed_while_we_run_is_forgotten_with_the_next_message(tmp_path: Path) -> None:
    now = 1_000_000.0
    handles = Handles(tmp_path, "http://q/1/jobs", print, lambda: now)
    handles.keep("first", 60)
    now += 61
    handles.keep("second", 60)
    assert [path.read_text() for path in files(tmp_path)] == ["second"]


async def test_a_queue_that_is_out_of_reach_is_said_and_what_was_held_is_freed_the_next_time(
    server: SqsServer, queues: Queues, tmp_path: Path
) -> None:
    queues.send("a")
    await die_with(queues.url, tmp_path, 1)
    with FaultProxy("127.0.0.1", server.port) as proxy:
        proxy.set(refuse=True)
        with pytest.raises(SourceUnavailableError):
            await heir(queues.url, tmp_path, endpoint=proxy.url).source.reclaim("w0")
        assert len(files(tmp_path)) == 1
        proxy.clear()
        await heir(queues.url, tmp_path, endpoint=proxy.url).source.reclaim("w0")
    assert files(tmp_path) == []
    assert queues.left()[0]["hidden"] <= 0


async def test_a_handle_that_is_no_longer_good_is_forgotten_and_one_that_sqs_failed_with_is_kept(
    server: SqsServer, queues: Queues, tmp_path: Path
) -> None:
    for number in range(3):
        queues.send(str(number))
    await die_with(queues.url, tmp_path, 3)
    gone = {"Id": "0", "SenderFault": True, "Code": "ReceiptHandleIsInvalid", "Message": ""}
    busy = {"Id": "2", "SenderFault": False, "Code": "InternalError", "Message": ""}
    server.answer("ChangeMessageVisibilityBatch", 200, {"Successful": [{"Id": "1"}], "Failed": [gone, busy]})
    with pytest.raises(SourceUnavailableError, match="InternalError"):
        await heir(queues.url, tmp_path).source.reclaim("w0")
    assert len(files(tmp_path)) == 1
    await heir(queues.url, tmp_path).source.reclaim("w0")
    assert files(tmp_path) == []
    assert [message["hidden"] <= 0 for message in queues.left()].count(True) == 1


async def test_what_was_held_of_another_queue_stays(server: SqsServer, queues: Queues, tmp_path: Path) -> None:
    other = Queues(server)
    other.send("b")
    await die_with(other.url, tmp_path, 1)
    kept = files(tmp_path)
    age(tmp_path, 100 * LONG)
    await heir(queues.url, tmp_path).source.reclaim("w0")
    assert files(tmp_path) == kept


async def test_a_file_that_was_cut_short_is_no_handle(server: SqsServer, queues: Queues, tmp_path: Path) -> None:
    for number in range(3):
        queues.send(str(number))
    await die_with(queues.url, tmp_path, 3)
    for path, end in zip(files(tmp_path), (0, 20, None), strict=True):
        status = path.stat()
        path.write_bytes(path.read_bytes()[:end] if end is not None else b"\xff\xfe")
        os.utime(path, (status.st_mtime, status.st_mtime))
    before = server.calls()
    await heir(queues.url, tmp_path).source.reclaim("w0")
    assert server.calls() == before
    assert files(tmp_path) == []


async def test_what_cannot_be_written_is_said_once_and_the_jobs_go_on(queues: Queues, tmp_path: Path) -> None:
    for number in range(3):
        queues.send(str(number))
    (tmp_path / FOLDER).touch()
    async with running(queues.url, queues.dead, visibility=LONG, state=tmp_path) as rig:
        first, second = await rig.take_all(2)
        assert rig.told() == ["handle_not_kept"]
        assert await first.extend() is LeaseState.HELD
        await first.complete(OK)
        await second.complete(OK)
        assert rig.told() == ["handle_not_kept"]
        (tmp_path / FOLDER).unlink()
        await rig.take()
        assert len(files(tmp_path)) == 1


async def test_a_handle_is_for_our_eyes_alone(queues: Queues, tmp_path: Path) -> None:
    queues.send("a")
    await die_with(queues.url, tmp_path, 1)
    (path,) = files(tmp_path)
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert path.read_text() not in path.name


async def test_no_link_is_followed(tmp_path: Path) -> None:
    handles = Handles(tmp_path, "http://q/1/jobs", print)
    handles.keep("handle", 60)
    (path,) = files(tmp_path)
    path.unlink()
    path.symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    told: list[str] = []
    Handles(tmp_path, "http://q/1/jobs", lambda name, **_: told.append(name)).keep("handle", 60)
    assert ((tmp_path / "precious").read_text(), told) == ("precious", ["handle_not_kept"])


# FIFO.


async def test_the_group_of_a_dead_worker_goes_on_at_once_and_in_order(fifo: Queues, tmp_path: Path) -> None:
    for body in ("a1", "a2"):
        fifo.send_to("a", body)
    await die_with(fifo.url, tmp_path, 1)
    async with running(fifo.url, visibility=LONG) as other:
        assert await other.source.receive(wait=1.0) is None
        await heir(fifo.url, tmp_path).source.reclaim("w0")
        for body, attempt in (("a1", 2), ("a2", 1)):
            lease = await other.take(3.0)
            assert (lease.job.body, lease.attempt) == (body.encode(), attempt)
            await lease.complete(OK)


async def test_a_worker_that_drains_while_it_polls_blocks_no_group(fifo: Queues) -> None:
    for body in ("a1", "a2"):
        fifo.send_to("a", body)
    async with running(fifo.url, visibility=LONG) as leaving:
        held = await leaving.take()
        with anyio.move_on_after(0.5):
            await leaving.source.receive(wait=20.0)
        fifo.send_to("b", "b1")  # the poll, which is still under way, takes it, and nobody waits for it
        await held.release()
    async with running(fifo.url, visibility=LONG) as other:
        first, second = sorted(await other.take_all(2), key=lambda lease: lease.job.body)
        assert (first.job.body, second.job.body) == (b"a1", b"b1")
        assert second.attempt == 2, "the leaving worker had it"
        await first.complete(OK)
        assert (await other.take()).job.body == b"a2"


async def test_a_group_waits_for_its_job_that_rests(server: SqsServer, fifo: Queues) -> None:
    for body in ("a1", "a2"):
        fifo.send_to("a", body)
    async with running(fifo.url, fifo.dead, visibility=LONG) as rig:
        await (await rig.take()).retry("exit code 3", result=FAILED, delay=100.0)
        assert await rig.source.receive(wait=1.0) is None
        server.pass_time(101)
        again = await rig.take()
        assert (again.job.body, again.attempt) == (b"a1", 2)
        await again.complete(OK)
        assert (await rig.take()).job.body == b"a2"


async def test_a_group_goes_on_after_a_job_that_failed_for_good(fifo: Queues) -> None:
    for body in ("a1", "a2"):
        fifo.send_to("a", body)
    async with running(fifo.url, fifo.dead, visibility=LONG) as rig:
        await (await rig.take()).fail("never", result=FAILED)
        assert (await rig.take()).job.body == b"a2"
