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
    queues.send("poison", MessageAttributes=sent)
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
    assert dead["attributes"] == {"color": "red", "data": "", "heeler-attempts": "3", "heeler-worker": "host:1"}


async def test_a_job_document_says_how_often_it_may_fail(queues: Queues) -> None:
    queues.send(json.dumps({"id": "named", "command": "x", "max_failures": 1}))
    async with running(queues.url, queues.dead) as rig:
        lease = await rig.take()
        assert lease.job.id == "named"
        await lease.retry("no", result=FAILED, delay=0.0)
    assert [message["attributes"]["heeler-reason"] for message in queues.set_aside()] == ["no"]


async def test_the_senders_attributes_go_before_our_own(queues: Queues) -> None:
    sent = {f"a{number}": {"DataType": "String", "StringValue": "v"} for number in range(9)}
    queues.send("x", MessageAttributes=sent)
    async with running(queues.url, queues.dead) as rig:
        await (await rig.take()).fail("no", result=FAILED)
    assert queues.set_aside()[0]["attributes"].keys() == sent.keys() | {"heeler-reason"}


async def test_notes_that_make_the_message_too_long_are_left_out(server: SqsServer, queues: Queues) -> None:
    queues.send("x")
    async with running(queues.url, queues.dead) as rig:
        server.refuse("SendMessage", 400, "InvalidParameterValue")
        await (await rig.take()).fail("no", result=FAILED)
        assert "dead_letter_without_reason" in rig.told()
    assert queues.set_aside()[0]["attributes"] == {}
    assert queues.left() == []


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
