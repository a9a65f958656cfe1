"""The `sqs` source against moto, through a proxy where the line breaks: nothing is lost, and nothing done twice."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from heeler.job import Result
from heeler.lease import LeaseKeeper
from heeler.settings import Settings
from heeler.sources.base import Lease, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.tasks import alongside
from tests.support.proxy import FaultProxy
from tests.support.sqs_rig import Queues, SqsRig, running
from tests.support.sqs_server import SqsServer

pytestmark = pytest.mark.anyio

OK, FAILED = Result(exit_code=0), Result(exit_code=3)


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


async def together(*calls: Callable[[], Any]) -> list[Any]:
    """What each gives or raises."""
    results: list[Any] = [None] * len(calls)

    async def make(number: int) -> None:
        try:
            results[number] = await calls[number]()
        except (LeaseLostError, SourceUnavailableError) as error:
            results[number] = LeaseLostError if isinstance(error, LeaseLostError) else SourceUnavailableError

    async with anyio.create_task_group() as group:
        for number in range(len(calls)):
            group.start_soon(make, number)
    return results


async def test_jobs_of_many_lanes_come_extend_and_end_in_few_calls(server: SqsServer, queues: Queues) -> None:
    for number in range(12):
        queues.send(f"job {number}")
    async with running(queues.url) as rig:
        before = server.calls()
        leases = await rig.take_all(12)
        assert {lease.job.body for lease in leases} == {f"job {number}".encode() for number in range(12)}
        assert await together(*(lease.extend for lease in leases)) == [LeaseState.HELD] * 12
        await together(*(partial(lease.complete, OK) for lease in leases))
        made = server.calls() - before
    assert made["ReceiveMessage"] == made["ChangeMessageVisibilityBatch"] == made["DeleteMessageBatch"] == 2
    assert queues.left() == []


async def test_lanes_that_wait_cost_one_poll_between_them(server: SqsServer, queues: Queues) -> None:
    async with running(queues.url) as rig:
        before = server.calls()
        assert await together(*[partial(rig.source.receive, wait=1.0)] * 8) == [None] * 8
        assert (server.calls() - before)["ReceiveMessage"] == 1


async def test_of_a_batch_each_entry_has_its_own_answer(server: SqsServer, queues: Queues) -> None:
    for number in range(3):
        queues.send(str(number))
    async with running(queues.url) as rig:
        leases = sorted(await rig.take_all(3), key=lambda lease: lease.job.body)
        failed = {"Id": "1", "SenderFault": True, "Code": "ReceiptHandleIsInvalid", "Message": ""}
        busy = {"Id": "2", "SenderFault": False, "Code": "InternalError", "Message": ""}
        body = {"Successful": [{"Id": "0"}], "Failed": [failed, busy]}
        server.answer("ChangeMessageVisibilityBatch", 200, body)
        answers = await together(*(lease.extend for lease in leases))
        assert answers == [LeaseState.HELD, LeaseState.LOST, SourceUnavailableError]
        busy["Id"] = "1"  # what is lost is not asked for any more
        server.answer("DeleteMessageBatch", 200, {"Successful": [{"Id": "0"}], "Failed": [busy]})
        answers = await together(*(partial(lease.complete, OK) for lease in leases))
        assert answers == [None, LeaseLostError, SourceUnavailableError]


async def test_a_release_overtakes_an_extension_that_is_not_sent_yet(server: SqsServer, queues: Queues) -> None:
    queues.send("a")
    async with running(queues.url) as rig:
        lease = await rig.take()
        before = server.calls()
        answers = await together(lease.extend, lease.release)
        assert answers == [LeaseState.HELD, None]
        assert (server.calls() - before)["ChangeMessageVisibilityBatch"] == 1
    assert queues.left()[0]["hidden"] <= 0


async def test_a_batch_that_is_refused_for_one_entrys_sake_is_made_entry_by_entry(
    server: SqsServer, queues: Queues
) -> None:
    """Moto counts the twelve hours from the sending, and then refuses the whole batch."""
    queues.send("old")
    server.pass_time(43_190)
    queues.send("young")
    async with running(queues.url) as rig:
        old, young = sorted(await rig.take_all(2), key=lambda lease: lease.job.body)
        assert await together(old.extend, young.extend) == [LeaseState.LOST, LeaseState.HELD]


async def test_a_message_that_was_deleted_behind_our_back_is_lost(server: SqsServer, queues: Queues) -> None:
    gone, kept = queues.send("a"), queues.send("b")
    async with running(queues.url) as rig:
        leases = {lease.job.id: lease for lease in await rig.take_all(2)}
        queues.remove(gone)
        assert await leases[gone].extend() is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await leases[gone].complete(OK)
        assert [message["id"] for message in queues.left()] == [kept]


@pytest.mark.parametrize(
    ("status", "code"),
    [(503, "ServiceUnavailable"), (500, "InternalFailure"), (400, "ThrottlingException"), (403, "AccessDenied")],
)
async def test_an_outage_is_no_loss(server: SqsServer, queues: Queues, status: int, code: str) -> None:
    queues.send("a")
    async with running(queues.url) as rig:
        lease = await rig.take()
        server.refuse("ChangeMessageVisibilityBatch", status, code)
        with pytest.raises(SourceUnavailableError, match=code):
            await lease.extend()
        assert await lease.extend() is LeaseState.HELD
        server.refuse("DeleteMessageBatch", status, code)
        with pytest.raises(SourceUnavailableError, match=code):
            await lease.complete(OK)
        await lease.complete(OK)
        server.refuse("ReceiveMessage", status, code)
        with pytest.raises(SourceUnavailableError, match=code):
            await rig.source.receive(wait=1.0)
        assert await rig.source.receive(wait=1.0) is None
    assert queues.left() == []


@pytest.mark.parametrize("code", ["ReceiptHandleIsInvalid", "MessageNotInflight", "InvalidParameterValue"])
async def test_a_handle_that_is_no_longer_good_is_a_loss(server: SqsServer, queues: Queues, code: str) -> None:
    queues.send("a")
    async with running(queues.url) as rig:
        lease = await rig.take()
        server.refuse("ChangeMessageVisibilityBatch", 400, code)
        assert await lease.extend() is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await lease.complete(OK)
    assert len(queues.left()) == 1


async def test_a_broken_line_is_an_outage_and_heals(server: SqsServer, queues: Queues) -> None:
    queues.send("a")
    with FaultProxy("127.0.0.1", server.port) as proxy:
        async with running(queues.url, endpoint=proxy.url) as rig:
            lease = await rig.take()
            for fault in ({"cut_down": 10}, {"refuse": True}):
                proxy.set(**fault)
                proxy.reset_connections()
                with pytest.raises(SourceUnavailableError):
                    await lease.extend()
                with pytest.raises(SourceUnavailableError):
                    await rig.source.receive(wait=1.0)
                proxy.clear()
                assert await lease.extend() is LeaseState.HELD
            proxy.set(partition=True)
            with anyio.move_on_after(0.5) as gone:
                await lease.extend()
            assert gone.cancelled_caught, "the caller has its own patience"
            proxy.clear()
            assert await lease.extend() is LeaseState.HELD
            await lease.complete(OK)


async def regained(rig: SqsRig, lease: Lease) -> LeaseState:
    """What it says at last, asked as the keeper does."""
    with pytest.raises(SourceUnavailableError):
        await lease.extend()
    rig.late += 66  # so long it is looked for
    return await lease.extend()


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The workers' settings name a bucket for records, which keep the counts."""
    monkeypatch.setattr("tests.support.sqs_rig.Settings", partial(Settings, records="s3://bucket/r/"))


@pytest.mark.usefixtures("recorded")
async def test_what_lapsed_by_our_clock_and_another_has_is_lost_although_sqs_still_takes_the_handle(
    server: SqsServer, queues: Queues
) -> None:
    queues.send("a")
    async with running(queues.url) as first, running(queues.url) as second:
        old = await first.take()
        first.late += 61
        server.pass_time(61)
        new = await second.take()
        assert new.attempt == 2
        with pytest.raises(SourceUnavailableError):
            await old.complete(OK)
        assert await regained(first, old) is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await old.complete(OK)
        assert len(queues.left()) == 1
        assert await new.extend() is LeaseState.HELD
        await new.complete(OK)
    assert queues.left() == []


async def test_extensions_end_before_the_twelve_hours_do(queues: Queues) -> None:
    queues.send("a")
    async with running(queues.url, visibility=3600) as rig:
        lease = await rig.take()
        for _ in range(10):
            rig.late += 3000
            assert await lease.extend() is LeaseState.HELD
        for _ in range(4):
            rig.late += 3000
            assert await lease.extend() is LeaseState.ENDING
        rig.late += 1200
        assert await lease.extend() is LeaseState.LOST


async def test_without_records_what_lapsed_by_our_clock_is_lost_and_no_other_message_is_received(
    server: SqsServer, queues: Queues
) -> None:
    for body in ("a", "b"):
        queues.send(body)
    async with running(queues.url) as rig:
        lease = await rig.take()
        rig.late += 61
        server.pass_time(61)
        before = server.calls()
        assert await lease.extend() is LeaseState.LOST
        assert (server.calls() - before)["ReceiveMessage"] == 0


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize("taken", [False, True], ids=["alone", "taken by another"])
async def test_after_a_partition_one_finishes_and_the_other_changes_nothing(
    server: SqsServer, queues: Queues, taken: bool
) -> None:
    queues.send("a")
    events: list[str] = []
    with FaultProxy("127.0.0.1", server.port) as proxy:
        async with (
            running(queues.url, endpoint=proxy.url, visibility=6) as cut_off,
            running(queues.url, visibility=6) as other,
        ):
            old = await cut_off.take()
            keeper = LeaseKeeper(old, lambda name, _: events.append(name), rng=random.Random(1), clock=time.monotonic)
            async with alongside(keeper.keep):
                proxy.set(partition=True)
                await anyio.sleep(7.2)
                assert not keeper.confirmed
                assert not keeper.ended.is_set(), "it goes on working"
                new = await other.take(3.0) if taken else None
                proxy.clear()
                with anyio.fail_after(30):
                    if new is None:
                        await keeper.wait()
                    while new is not None and not keeper.ended.is_set():
                        assert await new.extend() is LeaseState.HELD
                        await anyio.sleep(0.5)
                keeper.rest()
            assert "lease_lapsed" in events
            if new is None:
                assert events[-1] == "lease_confirmed_again"
                await old.complete(OK)
                assert queues.left() == []
                return
            assert events[-1] == "lease_lost"
            with pytest.raises(LeaseLostError):
                await old.complete(OK)
            assert len(queues.left()) == 1
            assert new.attempt == 2
            await new.complete(OK)
    assert queues.left() == []


# FIFO.


async def test_the_order_of_a_group_is_kept_and_a_worker_that_left_blocks_none(server: SqsServer) -> None:
    queues = Queues(server, ".fifo")
    for body in ("a1", "a2", "a3"):
        queues.send_to("a", body)
    queues.send_to("b", "b1")
    async with running(queues.url, queues.dead) as rig:
        a, b = sorted(await rig.take_all(2), key=lambda lease: lease.job.body)
        assert (a.job.body, b.job.body) == (b"a1", b"b1"), "one of each group, however many lanes there are"
        assert await rig.source.receive(wait=1.0) is None
        await a.release()
    async with running(queues.url, queues.dead) as heir:
        again = await heir.take()
        assert (again.job.body, again.attempt) == (b"a1", 2)
        await again.complete(OK)
        second = await heir.take()
        assert second.job.body == b"a2"
        await second.fail("never", result=FAILED)
        third = await heir.take()
        assert third.job.body == b"a3"
        await third.complete(OK)
    (dead,) = queues.set_aside()
    assert (dead["body"], dead["group"]) == ("a2", "a")


# Receives that nobody waits for any more.


async def test_a_receive_that_is_cancelled_ends_at_once_and_its_message_is_put_back(
    server: SqsServer, queues: Queues
) -> None:
    async with running(queues.url) as first, running(queues.url) as second:
        await first.source.receive(wait=1.0)
        with anyio.move_on_after(0.5):
            await first.source.receive(wait=20.0)
        queues.send("late")  # the poll, which is still under way, takes it
        lease = await second.take(3.0)
        assert lease.attempt == 2
        assert first.told() == ["no_dead_letter_queue"]
        await lease.complete(OK)


@pytest.mark.parametrize("moment", [0.0, 0.002, 0.005, 0.01, 0.02, 0.04, 0.08])
async def test_a_worker_that_ends_while_it_receives_takes_nothing_with_it(queues: Queues, moment: float) -> None:
    got: list[Lease | None] = []

    async def receive(rig: SqsRig) -> None:
        got.append(await rig.source.receive(wait=20.0))

    async with running(queues.url) as rig:
        await rig.source.receive(wait=0.0)
        queues.send("x")
        async with anyio.create_task_group() as group:
            group.start_soon(receive, rig)
            await anyio.sleep(moment)
            group.cancel_scope.cancel()
        for lease in got:
            if lease is not None:
                await lease.release()
    assert len(queues.left()) == 1
    assert queues.left()[0]["hidden"] <= 0


async def test_whatever_receives_are_cancelled_each_message_is_done_once(server: SqsServer, queues: Queues) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    rng = random.Random(seed)
    sent = {str(number) for number in range(40)}
    for body in sent:
        queues.send(body)
    done: list[str] = []

    async def lane(rig: SqsRig) -> None:
        for _ in range(8):
            lease = None
            with anyio.move_on_after(rng.choice([0.0, 0.003, 0.01, 0.03, 1.0])):
                lease = await rig.source.receive(wait=1.0)
            if lease is not None and rng.random() < 0.3:
                await lease.release()
            elif lease is not None:
                await lease.complete(OK)
                done.append(lease.job.body.decode())

    while queues.left():
        async with running(queues.url) as rig, anyio.create_task_group() as group:
            for _ in range(4):
                group.start_soon(lane, rig)
            if rng.random() < 0.5:
                await anyio.sleep(rng.uniform(0.0, 0.3))
                group.cancel_scope.cancel()
        server.pass_time(61)  # what was ours when its lane was killed
    assert set(done) <= sent
    assert len(done) == len(set(done))


async def test_calls_after_the_end_say_so(queues: Queues) -> None:
    queues.send("x")
    async with running(queues.url) as rig:
        lease = await rig.take()
    with pytest.raises(SourceUnavailableError):
        await lease.complete(OK)
    with pytest.raises(SourceUnavailableError):
        await rig.source.receive(wait=1.0)
