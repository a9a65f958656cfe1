"""moto's SQS in a process of its own, whose clock can be moved, and which shows what is in a queue.

`with SqsServer() as server: server.queue("jobs")`; moto's rules are its own.
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import boto3

from heeler.local.processes import free_port

KEY, SECRET, REGION = "sqs-key", "sqs-secret", "us-east-1"
WORKER_KEY = "sqs-worker-key"
"""Of callers whose calls may be made to fail."""
_ACCOUNT = "123456789012"
_OURS = "/its-own/"


class SqsServer:
    """A running server."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SqsServer:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.sqs_server", str(self.port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        give_up = time.monotonic() + 60
        while True:
            try:
                self._ask("late/0")
            except urllib.error.URLError:
                assert self._process.poll() is None, "moto did not start"
                assert time.monotonic() < give_up, "moto does not answer"
                time.sleep(0.05)
            else:
                return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    @functools.cached_property
    def client(self) -> Any:
        """A boto3 client."""
        return boto3.client(
            "sqs",
            endpoint_url=self.url,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=REGION,
        )

    def queue(self, name: str, **attributes: str) -> str:
        """Make a queue whose messages live for 14 days; its URL."""
        attributes = {"MessageRetentionPeriod": "1209600", **attributes}
        return str(self.client.create_queue(QueueName=name, Attributes=attributes)["QueueUrl"])

    def pass_time(self, seconds: float) -> None:
        """Move the clock of all queues."""
        self._ask(f"late/{seconds}")

    def messages(self, url: str) -> list[dict[str, Any]]:
        """What is in the queue: id, body, receives, hidden (seconds, at most 0 if visible), attributes, group."""
        found: list[dict[str, Any]] = json.loads(self._ask(f"messages/{url.rpartition('/')[2]}"))
        return found

    def calls(self) -> Counter[str]:
        """How often each operation has been called."""
        return Counter(json.loads(self._ask("calls/all")))

    def answer(self, operation: str, status: int, body: dict[str, Any]) -> None:
        """Answer the next call of an operation so, without doing it."""
        self._ask(f"answer/{operation}", json.dumps([status, body]).encode())

    def refuse(self, operation: str, status: int, code: str) -> None:
        """Refuse the next call of an operation."""
        self.answer(operation, status, {"__type": f"com.amazonaws.sqs#{code}", "message": "as the test wants it"})

    def fail_share(self, share: float, seed: int) -> None:
        """From now on answer a share of the calls with `WORKER_KEY` with a 503, half of them after doing them."""
        self._ask(f"share/{share}", str(seed).encode())

    def failed(self) -> Counter[str]:
        """How often each operation has failed so; what was done all the same is counted as `Operation, done`."""
        return Counter(json.loads(self._ask("failed/all")))

    def _ask(self, path: str, body: bytes | None = None) -> bytes:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(f"{self.url}{_OURS}{path}", body, timeout=10) as answer:
            return bytes(answer.read())


class _Front:
    """What stands before moto: its clock, a look into its queues, and answers of our own."""

    def __init__(self, moto: Callable[..., Iterable[bytes]], backends: Any) -> None:
        self._moto = moto
        self._backends = backends
        self._late = 0.0
        self._calls: Counter[str] = Counter()
        self._answers: dict[str, list[Any]] = defaultdict(list)
        self._share = 0.0
        self._rng = random.Random()
        self._failed: Counter[str] = Counter()

    def now(self) -> float:
        return time.time() + self._late

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path.startswith(_OURS):
            what, argument = path.removeprefix(_OURS).split("/")
            said = json.dumps(self._do(what, argument, environ))
            start("200 OK", [("Content-Type", "application/json")])
            return [said.encode()]
        operation = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        self._calls[operation] += 1
        if self._answers[operation]:
            status, body = self._answers[operation].pop(0)
            start(f"{status} X", [("Content-Type", "application/x-amz-json-1.0")])
            return [json.dumps(body).encode()]
        if f"Credential={WORKER_KEY}/" in environ.get("HTTP_AUTHORIZATION", ""):
            chance = self._rng.random()
            if chance < self._share:
                return self._fail(operation, environ, start, done=chance < self._share / 2)
        return self._moto(environ, start)

    def _fail(
        self, operation: str, environ: dict[str, Any], start: Callable[..., Any], *, done: bool
    ) -> Iterable[bytes]:
        if done:
            list(self._moto(environ, lambda *_: None))
        self._failed[f"{operation}, done" if done else operation] += 1
        start("503 X", [("Content-Type", "application/x-amz-json-1.0")])
        return [b'{"__type": "com.amazonaws.sqs#ServiceUnavailable", "message": "as the test wants it"}']

    def _do(self, what: str, argument: str, environ: dict[str, Any]) -> object:
        if what == "late":
            self._late += float(argument)
        elif what == "answer":
            self._answers[argument].append(json.loads(_body(environ)))
        elif what == "share":
            self._share, self._rng = float(argument), random.Random(_body(environ))
        elif what == "failed":
            return self._failed
        elif what == "calls":
            return self._calls
        else:
            return [self._shown(message) for message in self._backends[_ACCOUNT][REGION].queues[argument]._messages]
        return None

    def _shown(self, message: Any) -> dict[str, Any]:
        values = message.message_attributes.items()
        return {
            "id": message.id,
            "body": message.body,
            "receives": message.approximate_receive_count,
            "hidden": message.visible_at / 1000 - self.now(),
            "group": message.group_id,
            "attributes": {name: value.get("StringValue", "") for name, value in values},
        }


def _body(environ: dict[str, Any]) -> bytes:
    return bytes(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))


def _serve(port: int) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from moto.sqs import models
    from werkzeug.serving import run_simple

    front = _Front(DomainDispatcherApplication(create_backend_app), models.sqs_backends)
    vars(models).update(unix_time=front.now, unix_time_millis=lambda: front.now() * 1000)
    run_simple("127.0.0.1", port, front, threaded=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
