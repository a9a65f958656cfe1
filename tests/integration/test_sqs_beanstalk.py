"""What the `sqs` source makes of a message's attributes: where and how an app has it, and which job it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from heeler.job import Result, Target
from tests.support.sqs_rig import Queues, running
from tests.support.sqs_server import SqsServer

pytestmark = pytest.mark.anyio

OK = Result(status=200)
PATH = "beanstalk.sqsd.path"


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


def texts(**values: str) -> dict[str, Any]:
    """Attributes, with `_` for each character that a Python name can't have."""
    names = {"job_id": "heeler-job-id", "index": "heeler-index", "path": PATH}
    return {names.get(name, name): {"DataType": "String", "StringValue": value} for name, value in values.items()}


async def test_a_job_has_the_headers_of_elastic_beanstalks_daemon(queues: Queues) -> None:
    data = {"DataType": "Binary", "BinaryValue": b"\0\1"}
    number = {"DataType": "Number.int", "StringValue": "42"}
    message_id = queues.send("hello", MessageAttributes={**texts(color="red"), "data": data, "weight": number})
    async with running(queues.url, app_mode=True) as rig:
        job = (await rig.take()).job
        assert rig.told() == ["no_dead_letter_queue"], "a binary attribute is left out as a matter of course"
    assert (job.id, job.body, job.target, job.index) == (message_id, b"hello", None, None)
    headers = dict(job.headers)
    assert headers.pop("X-Aws-Sqsd-First-Received-At").endswith("Z")
    assert headers.pop("X-Aws-Sqsd-Sent-At").endswith("Z")
    assert headers.pop("X-Aws-Sqsd-Sender-Id")
    assert headers == {
        "User-Agent": "aws-sqsd/2.0",
        "X-Aws-Sqsd-Msgid": message_id,
        "X-Aws-Sqsd-Queue": queues.url.rpartition("/")[2],
        "X-Aws-Sqsd-Receive-Count": "1",
        "X-Aws-Sqsd-Attr-color": "red",
        "X-Aws-Sqsd-Attr-weight": "42",
    }


async def test_a_message_names_its_path(queues: Queues) -> None:
    queues.send("x", MessageAttributes=texts(path="task"))
    async with running(queues.url, app_mode=True) as rig:
        assert (await rig.take()).job.target == Target(None, "/task")


async def test_a_message_for_no_path_of_the_app_is_set_aside_and_the_next_one_comes(queues: Queues) -> None:
    bad = queues.send("bad", MessageAttributes=texts(path="http://elsewhere/x"))
    queues.send("good")
    async with running(queues.url, queues.dead, app_mode=True) as rig:
        assert (await rig.take()).job.body == b"good"
        assert rig.told() == ["message_refused"]
        assert rig.faults[0][1]["message"] == bad
    (dead,) = queues.set_aside()
    assert dead["attributes"]["heeler-reason"].startswith(f"{PATH}: 'http://elsewhere/x' is the address of a host")
    assert dead["attributes"][PATH] == "http://elsewhere/x"


async def test_a_message_that_can_not_be_set_aside_now_comes_again_when_it_lapses(
    server: SqsServer, queues: Queues
) -> None:
    queues.send("bad", MessageAttributes=texts(path="//x"))
    async with running(queues.url, queues.dead, app_mode=True) as rig:
        server.refuse("SendMessage", 503, "ServiceUnavailable")
        assert await rig.source.receive(wait=1.0) is None
        assert rig.told() == ["message_refused", "message_not_set_aside"]
        rig.late += 61
        server.pass_time(61)
        assert await rig.source.receive(wait=1.0) is None
    assert (len(queues.left()), len(queues.set_aside())) == (0, 1)


async def test_a_command_has_no_path(queues: Queues) -> None:
    queues.send(json.dumps({"command": "x"}), MessageAttributes=texts(path="//x", color="a\nb"))
    async with running(queues.url) as rig:
        await (await rig.take()).complete(OK)
        assert rig.told() == ["no_dead_letter_queue"]


async def test_what_no_header_can_hold_is_left_out_and_said(queues: Queues) -> None:
    message_id = queues.send("x", MessageAttributes=texts(color="red\r\nX-Admin: 1"))
    async with running(queues.url, queues.dead, app_mode=True) as rig:
        job = (await rig.take()).job
    assert not any("Admin" in value for value in job.headers.values())
    ((name, fields),) = rig.faults
    assert (name, fields["message"], fields["attribute"]) == ("attribute_left_out", message_id, "color")


DOCUMENT = {"command": "x"}


@pytest.mark.parametrize(
    ("body", "attributes", "job_id", "index", "ignored"),
    [
        ("x", {"job_id": "mine", "index": "3"}, "mine", 3, []),
        (DOCUMENT, {"job_id": "mine", "index": "3"}, "mine", 3, []),
        ({**DOCUMENT, "id": "own", "index": 0}, {"job_id": "mine", "index": "3"}, "own", 0, []),
        ({**DOCUMENT, "id": "own"}, {"index": "0"}, "own", 0, []),
        ("x", {"job_id": "../x"}, None, None, ["heeler-job-id"]),
        ("x", {"index": "-1"}, None, None, ["heeler-index"]),
        ("x", {"index": "1.0"}, None, None, ["heeler-index"]),
        ("x", {"index": "٣"}, None, None, ["heeler-index"]),
        ("x", {"index": "9" * 5000}, None, None, ["heeler-index"]),
    ],
)
async def test_which_job_it_is(
    queues: Queues, body: Any, attributes: dict[str, str], job_id: str | None, index: int | None, ignored: list[str]
) -> None:
    text = body if isinstance(body, str) else json.dumps(body)
    message_id = queues.send(text, MessageAttributes=texts(**attributes))
    async with running(queues.url, queues.dead) as rig:
        job = (await rig.take()).job
    assert (job.id, job.index) == (job_id or message_id, index)
    assert [(name, fields["attribute"]) for name, fields in rig.faults] == [
        ("attribute_left_out", name) for name in ignored
    ]
