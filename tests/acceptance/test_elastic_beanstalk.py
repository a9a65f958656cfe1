"""A program written for the worker tier of Elastic Beanstalk, unchanged under `heeler run --source sqs`."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.world import eventually
from tests.support.sqs_rig import Queues
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer
from tests.support.worker import Worker, clean_environment

APPLICATION = """
import json, os, time
from pathlib import Path

from flask import Flask, abort, request

application = Flask(__name__)
W = Path(os.environ["W"])


def note(what):
    headers = {name.lower(): value for name, value in request.headers.items()}
    with open(W / "calls", "a") as file:
        file.write(json.dumps({"what": what, "headers": headers, "body": request.get_data(as_text=True)}) + "\\n")


@application.before_request
def from_the_daemon():
    if not request.headers.get("User-Agent", "").startswith("aws-sqsd/"):
        abort(403)


@application.post("/")
def message():
    job = request.get_json()  # answers 400 or 415 to what is no JSON
    note("message")
    while job.get("wait") and not (W / "go").exists():
        time.sleep(0.005)
    return "ok"


@application.post("/tasks/<name>")
def task(name):
    if request.content_length:
        request.get_json()
    note(name)
    return "ok"


if __name__ == "__main__":
    application.run(port=int(os.environ.get("PORT", "0")))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as server:
        yield server


class Tier:
    """Two queues, an app, and workers that share a state folder, so that each takes the place of the last."""

    def __init__(self, server: SqsServer, folder: Path, suffix: str = "") -> None:
        self.queues = Queues(server, suffix)
        self.folder = folder
        (folder / "application.py").write_text(APPLICATION)

    @contextmanager
    def worker(self, **environment: str) -> Iterator[Worker]:
        env = clean_environment(
            SQS_QUEUE_URL=self.queues.url,
            SQS_DLQ_URL=self.queues.dead,
            SQS_AWS_REGION=REGION,
            SQS_AWS_ACCESS_KEY_ID=KEY,
            SQS_AWS_SECRET_ACCESS_KEY=SECRET,
            W=str(self.folder),
            **environment,
        )
        program = ["--", sys.executable, str(self.folder / "application.py")]
        with Worker("--source", "sqs", *program, state_dir=self.folder / "state", env=env, cwd=self.folder) as worker:
            yield worker

    def calls(self) -> list[dict[str, Any]]:
        try:
            return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        except FileNotFoundError:
            return []


def texts(**values: str) -> dict[str, dict[str, str]]:
    return {name.replace("__", "."): {"DataType": "String", "StringValue": value} for name, value in values.items()}


def test_messages_and_tasks_come_as_from_elastic_beanstalks_daemon(server: SqsServer, tmp_path: Path) -> None:
    tier = Tier(server, tmp_path)
    message_id = tier.queues.send('{"image": 1}', MessageAttributes=texts(color="größer"))
    scheduled = texts(beanstalk__sqsd__path="/tasks/mail", beanstalk__sqsd__task_name="mail")
    scheduled |= texts(beanstalk__sqsd__scheduled_time="2015-10-07 13:39:04 UTC")
    tier.queues.send("elasticbeanstalk scheduled job", MessageAttributes=scheduled)
    tier.queues.send("{}", MessageAttributes=texts(beanstalk__sqsd__path="tasks/spaced out"))
    with tier.worker():
        eventually(lambda: not tier.queues.left(), "all messages are done")
    calls = {call["what"]: call for call in tier.calls()}
    assert calls.keys() == {"message", "mail", "spaced out"}
    message, mail = calls["message"], calls["mail"]
    assert message["body"] == '{"image": 1}'
    headers = message["headers"]
    assert headers["content-type"] == "application/json"
    assert headers["user-agent"] == "aws-sqsd/2.0"
    assert headers["x-aws-sqsd-msgid"] == message_id
    assert headers["x-aws-sqsd-queue"] == tier.queues.url.rpartition("/")[2]
    assert headers["x-aws-sqsd-receive-count"] == "1"
    assert headers["x-aws-sqsd-attr-color"].encode("latin-1").decode() == "größer"
    assert mail["body"] == ""
    assert mail["headers"]["x-aws-sqsd-taskname"] == "mail"
    assert mail["headers"]["x-aws-sqsd-scheduled-at"] == "2015-10-07T13:39:04Z"
    assert mail["headers"]["x-aws-sqsd-path"] == "/tasks/mail"
    assert calls["spaced out"]["body"] == "{}"


def test_what_the_app_refuses_and_what_can_be_posted_nowhere_are_set_aside_with_the_reason(
    server: SqsServer, tmp_path: Path
) -> None:
    tier = Tier(server, tmp_path)
    tier.queues.send("{}", MessageAttributes=texts(beanstalk__sqsd__path="/nowhere"))
    tier.queues.send("{}", MessageAttributes=texts(beanstalk__sqsd__path="//host/"))
    tier.queues.send("{}", MessageAttributes=texts(color="red\r\nUser-Agent: me"))
    with tier.worker() as worker:
        eventually(lambda: not tier.queues.left(), "all messages are done")
        assert worker.find("message_refused")
        assert worker.find("attribute_left_out", attribute="color")
    reasons = sorted(message["attributes"]["heeler-reason"] for message in tier.queues.set_aside())
    assert len(reasons) == 2
    assert reasons[0].startswith("beanstalk.sqsd.path: '//host/' is the address of a host")
    assert reasons[1] == "the app answered 404"
    (call,) = tier.calls()
    assert call["headers"]["user-agent"] == "aws-sqsd/2.0"


def test_kill_9_blocks_no_group_for_the_one_that_takes_its_place(server: SqsServer, tmp_path: Path) -> None:
    """Without the handle on disk the messages would come in an hour."""
    tier = Tier(server, tmp_path, ".fifo")
    tier.queues.send_to("a", '{"wait": 1}')
    tier.queues.send_to("a", '{"second": 1}')
    with tier.worker(HEELER_SQS_VISIBILITY="3600") as worker:
        eventually(tier.calls, "the first job is with the app")
        worker.signal(signal.SIGKILL)
        worker.wait()
    (tmp_path / "go").touch()
    with tier.worker(HEELER_SQS_VISIBILITY="3600"):
        eventually(lambda: not tier.queues.left(), "the group goes on")
    told = [(call["body"], call["headers"]["x-aws-sqsd-receive-count"]) for call in tier.calls()]
    assert told == [('{"wait": 1}', "1"), ('{"wait": 1}', "2"), ('{"second": 1}', "1")]
