"""The webhooks of the local queue's jobs: signed, tried again, and never in anybody's way."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from heeler.local.queue_model import Machine
from heeler.local.salad import API_KEY
from tests.support.salad import QUEUE, SaladService


@pytest.fixture
def salad() -> Iterator[SaladService]:
    with SaladService() as service:
        yield service


def secret_key(salad: SaladService, method: str = "GET") -> str:
    url = f"{salad.api_url}/organizations/{QUEUE.organization}/webhook-secret-key"
    answer = httpx.request(method, url, headers={"Salad-Api-Key": API_KEY}, trust_env=False)
    assert answer.status_code == 200
    return str(answer.json()["secret_key"])


class Receiver(ThreadingHTTPServer):
    """Notes each request, and answers with the statuses it is given, then with 204."""

    def __init__(self, statuses: list[int]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses = statuses
        self.requests: list[tuple[dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?for=me"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append(({name.lower(): value for name, value in self.headers.items()}, body))
        assert self.path == "/hook?for=me"
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 204)
        self.send_header("location", self.server.url)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def receiving(*statuses: int) -> Iterator[Receiver]:
    with Receiver(list(statuses)) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


def wait_requests(receiver: Receiver, count: int) -> None:
    deadline = time.monotonic() + 20
    while len(receiver.requests) < count:
        assert time.monotonic() < deadline, receiver.requests
        time.sleep(0.005)


def verified(headers: dict[str, str], body: bytes, secret_key: str) -> Any:
    """The body of a genuine message, by the text of https://www.standardwebhooks.com."""
    signed = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    digest = hmac.new(base64.b64decode(secret_key), signed, hashlib.sha256).digest()
    version, _, signature = headers["webhook-signature"].partition(",")
    assert version == "v1"
    assert base64.b64decode(signature) == digest
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 300
    return json.loads(body)


def test_a_webhook_is_told_of_the_end_signed_until_it_answers_with_2xx(salad: SaladService) -> None:
    secret = secret_key(salad)
    with receiving(500, 302) as receiver:
        job_id = salad.submit({"n": 1}, webhook=receiver.url)
        machine = Machine(salad.project.group_id, "machine-1")
        salad.call(salad.state.open, machine, "", lambda: None)
        salad.call(salad.state.complete, machine, job_id, b'{"answer": 42}')
        wait_requests(receiver, 3)
        first, second, third = receiver.requests
        for headers, body in receiver.requests:
            told = verified(headers, body, secret)
            assert (told["id"], told["status"], told["output"]) == (job_id, "succeeded", {"answer": 42})
        assert first[0]["webhook-id"] == second[0]["webhook-id"] == third[0]["webhook-id"]
        other = salad.submit({}, webhook=receiver.url)
        salad.cancel(other)
        wait_requests(receiver, 4)
        told = verified(*receiver.requests[3], secret)
        assert (told["id"], told["status"]) == (other, "cancelled")
        assert receiver.requests[3][0]["webhook-id"] != first[0]["webhook-id"]


def test_another_secret_key_counts_at_once(salad: SaladService) -> None:
    old = secret_key(salad)
    new = secret_key(salad, "POST")
    assert new != old
    assert secret_key(salad) == new
    with receiving() as receiver:
        salad.cancel(salad.submit({}, webhook=receiver.url))
        wait_requests(receiver, 1)
        verified(*receiver.requests[0], new)


def test_a_webhook_that_never_answers_well_is_given_up_and_holds_nobody_up(salad: SaladService) -> None:
    with receiving(*[500] * 10) as receiver, receiving() as good:
        salad.cancel(salad.submit({}, webhook=receiver.url))
        salad.cancel(salad.submit({}, webhook="http://127.0.0.1:1/"))
        salad.cancel(salad.submit({}, webhook=good.url))
        wait_requests(good, 1)
        wait_requests(receiver, 3)
        salad.cancel(salad.submit({}, webhook=receiver.url))
        wait_requests(receiver, 6)
        ids = [headers["webhook-id"] for headers, _ in receiver.requests]
        assert len(set(ids[:3])) == len(set(ids[3:])) == 1
        assert set(ids[:3]) != set(ids[3:]), "three attempts each"
