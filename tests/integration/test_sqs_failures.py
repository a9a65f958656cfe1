"""What becomes of messages that fail: they rest, they go to the dead-letter queue, and none is lost without a word."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from heeler.job import Result
from heeler.sources.base import BARREN_LIMIT, SourceUnavailableError
from tests.support.sqs_rig import Queues, running
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


async def test_a_message_that_always_fails_goes_to_the_dead_letter_queue_with_the_reason(
    server: SqsServer, queues: Queues
) -> None:
    sent = {"color": {"DataType": "String", "StringValue": "red"}}
    sent["data"] = {"DataType": "Binary", "BinaryValue": b"\0\1"}  # type: ignore[dict-item]
    message_id = queues.send("poison", MessageAttributes=sent)
    async with running(queues.url, queues.dead, worker="host:1") as rig:
        for attempt in (1, 2, 3):
            lease = await rig.take(3.0)
            assert lease.attempt == attempt
            assert queues.set_aside() == []
            await lease.retry("exit code 3\0" + "x" * 5000, result=FAILED, delay=0.2)
            server.pass_time(2)
        assert await rig.source.receive(wait=1.0) is None
    assert queues.left() == []
    (dead,) = queues.set_aside()
    assert dead["body"] == "poison"
    reason = dead["attributes"].pop("heeler-reason")
    assert reason.startswith("exit code 3?xxx")
    assert len(reason) == 1000
    ours = {"heeler-job-id": message_id, "heeler-attempts": "3", "heeler-worker": "host:1"}
    assert dead["attributes"] == {"color": "red", "data": "", **ours}


async def test_a_job_document_says_how_often_it_may_fail(queues: Queues) -> None:
    queues.send(json.dumps({"id": "named", "command": "x", "max_failures": 1}))
    async with running(queues.url, queues.dead) as rig:
        lease = await rig.take()
        assert lease.job.id == "named"
        await lease.retry("no", result=FAILED, delay=0.0)
    assert [message["attributes"]["heeler-reason"] for message in queues.set_aside()] == ["no"]


NOTES = ["heeler-job-id", "heeler-reason", "heeler-attempts", "heeler-worker"]


@pytest.mark.parametrize("room", range(5))
async def test_the_senders_attributes_go_before_our_own_and_then_the_id_and_the_reason(
    queues: Queues, room: int
) -> None:
    sent = {f"a{number}": {"DataType": "String", "StringValue": "v"} for number in range(10 - room)}
    queues.send("x", MessageAttributes=sent)
    async with running(queues.url, queues.dead) as rig:
        await (await rig.take()).fail("no", result=FAILED)
    assert queues.set_aside()[0]["attributes"].keys() == sent.keys() | {*NOTES[:room]}


@pytest.mark.parametrize("refusals", [1, 2])
async def test_notes_that_make_the_message_too_long_are_left_out(
    server: SqsServer, queues: Queues, refusals: int
) -> None:
    message_id = queues.send("x")
    async with running(queues.url, queues.dead) as rig:
        for _ in range(refusals):
            server.refuse("SendMessage", 400, "InvalidParameterValue")
        await (await rig.take()).fail("no", result=FAILED)
        assert rig.told().count("dead_letter_without_reason") == refusals
    (dead,) = queues.set_aside()
    assert dead["attributes"] == ({"heeler-job-id": message_id} if refusals == 1 else {})
    assert queues.left() == []


async def test_a_message_that_is_sent_back_from_the_dead_letter_queue_is_the_same_job(queues: Queues) -> None:
    sent = {"heeler-color": "red", "heeler-index": "7", "a": "1", "b": "2", "c": "3", "d": "4"}  # and four of ours
    attributes = {name: {"DataType": "String", "StringValue": value} for name, value in sent.items()}
    message_id = queues.send("x", MessageAttributes=attributes)
    async with running(queues.url, queues.dead, worker="first") as rig:
        await (await rig.take()).fail("no", result=FAILED)
    queues.send_back()
    async with running(queues.url, queues.dead, worker="second") as rig:
        again = await rig.take()
        assert (again.job.id, again.job.index, again.attempt) == (message_id, 7, 1)
        assert not again.attempts_ordered, "or the head of its checkpoints would refuse an attempt that is lower"
        assert not any("heeler" in name.lower() and "color" not in name for name in again.job.headers)
        await again.fail("still no", result=FAILED)
    (dead,) = queues.set_aside()
    assert dead["id"] != message_id
    notes = {"heeler-reason": "still no", "heeler-attempts": "1", "heeler-worker": "second"}
    assert dead["attributes"] == {**sent, "heeler-job-id": message_id, **notes}


async def test_it_is_sent_first_and_deleted_then_and_sent_once_however_often_it_is_told(
    server: SqsServer, queues: Queues
) -> None:
    queues.send("x")
    async with running(queues.url, queues.dead) as rig:
        lease = await rig.take()
        server.refuse("SendMessage", 503, "ServiceUnavailable")
        with pytest.raises(SourceUnavailableError):
            await lease.fail("no", result=FAILED)
        assert len(queues.left()) == 1
        server.refuse("DeleteMessageBatch", 503, "ServiceUnavailable")
        with pytest.raises(SourceUnavailableError):
            await lease.fail("no", result=FAILED)
        assert (len(queues.left()), len(queues.set_aside())) == (1, 1)
        await lease.fail("no", result=FAILED)
        await lease.fail("no", result=FAILED)
    assert (len(queues.left()), len(queues.set_aside())) == (0, 1)


async def test_without_a_dead_letter_queue_the_message_is_kept_and_rests(queues: Queues) -> None:
    queues.send("x")
    async with running(queues.url) as rig:
        lease = await rig.take()
        assert rig.told() == ["no_dead_letter_queue"]
        await lease.fail("never", result=FAILED)
        assert rig.told()[1:] == ["job_kept"]
        assert "never" in str(rig.faults[-1])
    (kept,) = queues.left()
    assert 43_000 < kept["hidden"] <= 43_200


async def test_ten_fruitless_attempts_are_a_failure(server: SqsServer, queues: Queues) -> None:
    queues.send("x")
    async with running(queues.url, queues.dead) as rig:
        for _ in range(BARREN_LIMIT):
            assert queues.set_aside() == []
            await (await rig.take()).release("it died", fruitless=True)
    assert "10 attempts" in queues.set_aside()[0]["attributes"]["heeler-reason"]


async def test_a_redrive_policy_is_told_and_its_queue_and_its_count_are_used(server: SqsServer) -> None:
    dead = server.queue("redriven")
    arn = server.client.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]["QueueArn"]
    queues = Queues(server, RedrivePolicy=json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 2}))
    queues.send(json.dumps({"command": "x", "max_failures": 50}))
    async with running(queues.url) as rig:
        lease = await rig.take()
        assert lease.spends_tries
        name, fields = rig.faults[0]
        assert (name, fields["max_receives"]) == ("redrive_policy", 2)
        await lease.retry("first", result=FAILED, delay=0.0)
        await (await rig.take()).retry("second", result=FAILED, delay=0.0)
        assert await rig.source.receive(wait=1.0) is None
        queues.send("interrupted")
        await (await rig.take()).release()
        assert "redrive_takes_job" not in rig.told()
        await (await rig.take()).release()
        assert "redrive_takes_job" in rig.told()
    assert server.messages(dead)[0]["attributes"]["heeler-reason"] == "second"


async def test_a_redrive_policy_that_we_may_not_see_is_no_hindrance(server: SqsServer, queues: Queues) -> None:
    queues.send("x")
    async with running(queues.url, queues.dead) as rig:
        server.refuse("GetQueueAttributes", 503, "ServiceUnavailable")
        with pytest.raises(SourceUnavailableError):
            await rig.source.receive(wait=1.0)
        server.refuse("GetQueueAttributes", 403, "AccessDenied")
        await (await rig.take()).complete(OK)
        assert rig.told() == ["redrive_policy_unknown"]
