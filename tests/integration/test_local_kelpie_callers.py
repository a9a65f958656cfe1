"""Who may call the local Kelpie API, whom it tells, and how it fails on command; over real HTTP."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, get_args

import httpx
import pytest

from heeler.local.kelpie_faults import Fault, Kind, kind_of
from tests.integration.test_local_kelpie import (
    API_KEY,
    KEY,
    NO_JOB,
    ORGANIZATION,
    PROJECT,
    SUBMITTED,
    WORKER,
    KelpieService,
    get,
    ok,
    refused,
    submit,
    tell,
    work,
)

CALLS: dict[Kind, tuple[str, str]] = {
    "create": ("POST", "/jobs"),
    "batch": ("POST", "/jobs/batch"),
    "list": ("GET", "/jobs"),
    "get": ("GET", NO_JOB),
    "cancel": ("DELETE", NO_JOB),
    "purge": ("DELETE", "/jobs/container-groups/g"),
    "work": ("GET", "/work?machine_id=m1&container_group_id=g"),
    "heartbeat": ("POST", f"{NO_JOB}/heartbeat"),
    "completed": ("POST", f"{NO_JOB}/completed"),
    "failed": ("POST", f"{NO_JOB}/failed"),
}
BY_KEY = {"Salad-Api-Key": API_KEY, "Salad-Organization": ORGANIZATION, "Salad-Project": PROJECT}


@pytest.fixture
def kelpie() -> Iterator[KelpieService]:
    with KelpieService() as service:
        yield service


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


# Credentials.


def test_the_names_of_the_calls_are_all_there_are() -> None:
    assert set(CALLS) == set(get_args(Kind))
    for kind, (method, path) in CALLS.items():
        found = kind_of(method, path.partition("?")[0])
        assert found is not None
        assert found[0] == kind


def test_the_three_ways_are_one_user(kelpie: KelpieService) -> None:
    ways = [
        {"X-Kelpie-Key": KEY},
        BY_KEY,
        {"Salad-Api-Key": API_KEY, "Salad-Organization-Name": ORGANIZATION, "Salad-Project-Name": PROJECT},
        {"Authorization": f"Bearer {kelpie.token()}", "Salad-Project": PROJECT},
        {"Authorization": f"Bearer {kelpie.token()}", "Salad-Project-Name": PROJECT},
    ]
    for number, way in enumerate(ways):
        with kelpie.client(way) as http:
            submit(http)
            assert ok(http.get("/jobs"))["_count"] == number + 1


def test_another_organizations_jobs_are_not_there(kelpie: KelpieService) -> None:
    theirs = {"Authorization": f"Bearer {kelpie.token('other')}", "Salad-Project": "theirs"}
    with kelpie.client() as http, kelpie.client(theirs) as other:
        job = submit(http)
        assert submit(other)["user_id"] != job["user_id"]
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/heartbeat"), ("POST", "/completed")):
            answer = other.request(method, f"/jobs/{job['id']}{path}", json=WORKER if method == "POST" else None)
            assert refused(answer, 404, "Not Found") == "Job not found"
        assert ok(other.get("/jobs"))["_count"] == 1
        assert work(other)[0]["id"] != job["id"]
        assert get(http, job) == job


REFUSED: list[tuple[dict[str, str], int, str]] = [
    ({}, 401, "Unauthorized"),
    ({"Salad-Organization": ORGANIZATION, "Salad-Project": PROJECT}, 401, "Unauthorized"),
    ({"Authorization": "Basic abc", "Salad-Project": PROJECT}, 401, "Unauthorized"),
    ({"X-Kelpie-Key": "another"}, 403, "Forbidden"),
    ({"X-Kelpie-Key": ""}, 403, "Forbidden"),
    ({"X-Kelpie-Key": "another", **BY_KEY}, 403, "Forbidden"),
    ({**BY_KEY, "Salad-Api-Key": "another"}, 403, "Forbidden"),
    ({**BY_KEY, "Salad-Organization": "another"}, 403, "Forbidden"),
    ({**BY_KEY, "Salad-Project": "another"}, 403, "Forbidden"),
    ({"Salad-Api-Key": API_KEY, "Salad-Project": PROJECT}, 400, "Bad Request"),
    ({"Salad-Api-Key": API_KEY, "Salad-Organization": ORGANIZATION}, 400, "Bad Request"),
    ({"Authorization": "Bearer good"}, 400, "Bad Request"),
    ({"Authorization": "Bearer good", "Salad-Project": "another"}, 403, "Forbidden"),
    ({"Authorization": "Bearer expired", "Salad-Project": PROJECT}, 403, "Forbidden"),
    ({"Authorization": "Bearer foreign", "Salad-Project": PROJECT}, 403, "Forbidden"),
    ({"Authorization": "Bearer .", "Salad-Project": PROJECT}, 403, "Forbidden"),
    ({"Authorization": "Bearer", "Salad-Project": PROJECT}, 401, "Unauthorized"),
]


@pytest.mark.parametrize(("headers", "status", "error"), REFUSED, ids=str)
def test_nothing_is_done_without_good_credentials(
    kelpie: KelpieService, headers: dict[str, str], status: int, error: str
) -> None:
    sent = dict(headers)
    if "Authorization" in sent:
        tokens = {"good": kelpie.token(), "expired": kelpie.token(lifetime=-1)}
        scheme, _, name = sent["Authorization"].partition(" ")
        sent["Authorization"] = f"{scheme} {tokens.get(name, name)}".strip()
    with kelpie.client(sent) as http:
        for method, path in CALLS.values():
            assert refused(http.request(method, path), status, error), "before the body is looked at"
        assert refused(http.get("/no/such/route"), status, error)
        assert refused(http.post("/jobs", json=SUBMITTED), status, error)
    with kelpie.client() as http:
        assert ok(http.get("/jobs"))["_count"] == 0


def test_a_revoked_token_is_refused_and_a_new_one_is_good(kelpie: KelpieService) -> None:
    with kelpie.client({"Salad-Project": PROJECT}) as http:
        http.headers["Authorization"] = f"Bearer {kelpie.token()}"
        assert work(http) == []
        kelpie.tokens.revoke_all()
        refused(http.get(CALLS["work"][1]), 403, "Forbidden")
        http.headers["Authorization"] = f"Bearer {kelpie.token()}"
        assert work(http) == []


def test_any_project_will_do_if_none_is_named() -> None:
    with KelpieService(project=None) as kelpie, kelpie.client({**BY_KEY, "Salad-Project": "another"}) as http:
        assert ok(http.get("/jobs"))["_count"] == 0


# Webhooks.


class Receiver(ThreadingHTTPServer):
    """Notes each request, and answers with a status."""

    def __init__(self, status: int) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = status
        self.requests: list[tuple[str, dict[str, str], Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?for=me"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def receiving(status: int = 204) -> Iterator[Receiver]:
    with Receiver(status) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


def test_a_webhook_hears_of_start_and_end_with_the_key_that_was_used(kelpie: KelpieService) -> None:
    token = {"Authorization": f"Bearer {kelpie.token()}", "Salad-Project": PROJECT}
    with receiving() as receiver, kelpie.client() as http, kelpie.client(token) as worker:
        job = submit(http, webhook=receiver.url)
        other = submit(http, webhook=receiver.url, max_failures=2)
        cancelled = submit(http, webhook=receiver.url)
        http.delete(f"/jobs/{cancelled['id']}")
        steps: list[tuple[Callable[[], object], str, str, str, str]] = [
            (lambda: work(http, "m1"), "running", job["id"], "m1", KEY),
            (lambda: http.post(f"/jobs/{job['id']}/completed", json=WORKER), "completed", job["id"], "m1", KEY),
            (lambda: work(worker, "m2"), "running", other["id"], "m2", ""),
            (
                lambda: [tell(worker, other, "failed", f"m{number}") for number in (2, 3)],
                "failed",
                other["id"],
                "m3",
                "",
            ),
        ]
        for count, (step, status, job_id, machine, key) in enumerate(steps, 1):
            step()
            wait_until(lambda: len(receiver.requests) >= count)  # noqa: B023 - called here
            path, headers, body = receiver.requests[-1]
            assert body == {"status": status, "job_id": job_id, "machine_id": machine, "container_group_id": "g"}
            assert (path, headers["content-type"]) == ("/hook?for=me", "application/json")
            assert headers["x-kelpie-key"] == key
        assert len(receiver.requests) == len(steps), "nothing of cancellations, or of a failure that is not the last"


def test_the_worker_that_reports_names_the_group(kelpie: KelpieService) -> None:
    with receiving() as receiver, kelpie.client() as http:
        job = submit(http, webhook=receiver.url)
        http.post(f"/jobs/{job['id']}/completed", json={"machine_id": "m7", "container_group_id": "elsewhere"})
        wait_until(lambda: bool(receiver.requests))
        assert receiver.requests[0][2]["container_group_id"] == "elsewhere"


def test_a_webhook_that_fails_is_logged_once_and_holds_nobody_up(
    kelpie: KelpieService, caplog: pytest.LogCaptureFixture
) -> None:
    with receiving(500) as receiver, receiving() as good, kelpie.client() as http:
        for url in (receiver.url, "http://127.0.0.1:1/", "no url", good.url):
            submit(http, webhook=url)
        with caplog.at_level(logging.WARNING):
            for number in range(4):
                assert len(work(http, f"m{number}")) == 1
            wait_until(lambda: len(good.requests) == 1 and len(caplog.records) == 3)
        assert len(receiver.requests) == 1
        assert ok(http.get("/healthz")) == {"status": "ok"}


# Faults.


def ask(http: httpx.Client, kind: Kind) -> httpx.Response:
    method, path = CALLS[kind]
    return http.request(method, path, json=WORKER if method == "POST" else None)


@pytest.mark.parametrize("kind", CALLS)
def test_a_call_fails_as_often_as_it_is_told_to(kelpie: KelpieService, kind: Kind) -> None:
    with kelpie.client() as http:
        good = ask(http, kind).status_code
        kelpie.faults.fail(kind, Fault.ERROR, 2)
        assert [ask(http, kind).status_code for _ in range(3)] == [500, 500, good]
        kelpie.faults.fail(kind, Fault.ERROR, math.inf, status=503)
        answers = [ask(http, kind) for _ in range(3)]
        assert refused(answers[2], 503, "Service Unavailable")
        kelpie.faults.clear()
        assert ask(http, kind).status_code == good
        kelpie.faults.fail(kind, Fault.DROP)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            ask(http, kind)
        assert ask(http, kind).status_code == good
    assert kelpie.faults.calls == {kind: 10}
    assert {call.kind for call in kelpie.faults.log} == {kind}
    times = [call.time for call in kelpie.faults.log]
    assert times == sorted(times)


def test_a_fault_is_for_one_kind_of_call(kelpie: KelpieService) -> None:
    kelpie.faults.fail("heartbeat", Fault.ERROR)
    with kelpie.client() as http:
        job = submit(http)
        assert [given["id"] for given in work(http)] == [job["id"]]
        assert tell(http, job, "heartbeat").status_code == 500
        assert get(http, job)["num_heartbeats"] == 0
    assert kelpie.faults.log[-2].subject == job["id"]


@pytest.mark.parametrize(("fault", "done"), [(Fault.ERROR, False), (Fault.DROP, False), (Fault.LOSE, True)])
def test_only_a_lost_answer_leaves_the_call_done(kelpie: KelpieService, fault: Fault, done: bool) -> None:
    with kelpie.client() as http:
        job = submit(http)
        kelpie.faults.fail("completed", fault)
        if fault is Fault.ERROR:
            assert tell(http, job, "completed").status_code == 500
        else:
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                tell(http, job, "completed")
        assert get(http, job)["status"] == ("completed" if done else "pending")


def test_a_call_that_hangs_is_not_done_and_leaves_the_others_alone(kelpie: KelpieService) -> None:
    kelpie.faults.fail("completed", Fault.HANG)
    with kelpie.client() as http, kelpie.client(timeout=httpx.Timeout(20, read=0.2)) as hanging:
        job = submit(http)
        with pytest.raises(httpx.ReadTimeout):
            tell(hanging, job, "completed")
        assert get(http, job)["status"] == "pending"
        assert tell(hanging, job, "completed").status_code == 200


def test_down_is_down_for_every_call_until_it_is_lifted(kelpie: KelpieService) -> None:
    with kelpie.client() as http:
        kelpie.faults.down = True
        for kind in CALLS:
            with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
                ask(http, kind)
        with pytest.raises((httpx.RemoteProtocolError, httpx.ReadError)):
            http.get("/healthz")
        assert kelpie.faults.calls == dict.fromkeys(CALLS, 1)
        kelpie.faults.clear()
        assert ok(http.get("/healthz")) == {"status": "ok"}
        assert ok(http.get("/jobs"))["_count"] == 0
