"""The local queue's public REST calls, by Salad's published description of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx
import pytest

from heeler.local.queue_model import JobStatus, Machine
from heeler.local.salad import API_KEY
from tests.support.salad import QUEUE, SaladService

QUEUES = f"/organizations/{QUEUE.organization}/projects/{QUEUE.project}/queues"
JOBS = f"{QUEUES}/{QUEUE.queue}/jobs"
SECRET_KEY = f"/organizations/{QUEUE.organization}/webhook-secret-key"
WORKER = "machine-1"


@pytest.fixture
def salad() -> Iterator[SaladService]:
    with SaladService() as service:
        yield service


@pytest.fixture
def http(salad: SaladService) -> Iterator[httpx.Client]:
    headers = {"Salad-Api-Key": API_KEY}
    with httpx.Client(base_url=salad.api_url, headers=headers, trust_env=False) as client:
        yield client


def ok(answer: httpx.Response, status: int = 200) -> Any:
    """The resource in an answer with the status that Salad's description gives the call."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def create(http: httpx.Client, data: Any, **fields: Any) -> Any:
    return ok(http.post(JOBS, json={"input": data, **fields}), 201)


def get(http: httpx.Client, job_id: str) -> Any:
    return ok(http.get(f"{JOBS}/{job_id}"))


class Worker:
    """A machine's side, past gRPC."""

    def __init__(self, salad: SaladService) -> None:
        self._salad = salad
        self._machine = Machine(salad.project.group_id, WORKER)
        salad.call(salad.state.open, self._machine, "", lambda: None)

    def complete(self, job_id: str, output: bytes) -> None:
        self._salad.call(self._salad.state.complete, self._machine, job_id, output)

    def reject(self, job_id: str) -> None:
        self._salad.call(self._salad.state.reject, self._machine, job_id)


def problem(answer: httpx.Response, status: int) -> str:
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert {"type", "title", "detail"} <= set(body)
    return str(body["detail"])


# Queues.


def test_queues_are_made_listed_changed_and_deleted(http: httpx.Client) -> None:
    body = {"name": "second", "display_name": "My Queue", "description": "for me"}
    made = ok(http.post(QUEUES, json=body), 201)
    assert made == {
        **body,
        "id": made["id"],
        "container_groups": [],
        "current_queue_length": 0,
        "create_time": made["create_time"],
        "update_time": made["create_time"],
    }
    path = f"{QUEUES}/second"
    assert ok(http.get(path)) == made
    assert [queue["name"] for queue in ok(http.get(QUEUES))["items"]] == ["jobs", "second"]
    assert ok(http.get(QUEUES.replace("default", "another")))["items"] == []
    patch = {"content-type": "application/merge-patch+json"}
    changed = ok(http.patch(path, content=b'{"display_name": "Yours", "description": null}', headers=patch))
    assert (changed["id"], changed["display_name"]) == (made["id"], "Yours")
    assert "description" not in changed
    assert changed["update_time"] >= made["update_time"]
    deleted = http.delete(path)
    assert (deleted.status_code, deleted.content) == (202, b"")
    assert "second" in problem(http.get(path), 404)


def test_a_queue_needs_a_good_name_of_its_own(http: httpx.Client) -> None:
    assert "exists" in problem(http.post(QUEUES, json={"name": "jobs"}), 400)
    for name in ("x", "Upper", "9lives", "ends-", "a" * 64, None):
        assert "name" in problem(http.post(QUEUES, json={"name": name}), 400)
    assert ok(http.post(QUEUES, json={"name": "a" * 63}), 201)["display_name"] == "a" * 63


def test_a_queues_length_is_that_of_its_waiting_jobs(salad: SaladService, http: httpx.Client) -> None:
    for _ in range(3):
        create(http, {})
    path = f"{QUEUES}/{QUEUE.queue}"
    assert ok(http.get(path))["current_queue_length"] == 3
    Worker(salad)
    assert ok(http.get(path))["current_queue_length"] == 2


# Jobs.


@pytest.mark.parametrize("data", [{"a": [1, 2.5, None]}, "text \u2603 \U0001f600", 0, 12.25, False, [], {}, None])
def test_any_json_is_an_input_and_reaches_the_worker_as_it_is(
    salad: SaladService, http: httpx.Client, data: object
) -> None:
    job = create(http, data)
    assert json.loads(salad.job(job["id"]).input) == data
    assert job["input"] == get(http, job["id"])["input"] == data


def test_a_jobs_life_as_the_api_shows_it(salad: SaladService, http: httpx.Client) -> None:
    job = create(http, {"n": 1}, metadata={"mine": 7}, webhook="http://127.0.0.1:1/hook")
    assert job == {
        "id": job["id"],
        "input": {"n": 1},
        "metadata": {"mine": 7},
        "webhook": "http://127.0.0.1:1/hook",
        "status": "pending",
        "events": [{"action": "created", "time": job["create_time"]}],
        "create_time": job["create_time"],
        "update_time": job["create_time"],
    }
    worker = Worker(salad)
    assert get(http, job["id"])["status"] == "running"
    worker.reject(job["id"])
    worker.complete(job["id"], b'{"answer": 42}')
    done = get(http, job["id"])
    assert (done["status"], done["output"], done["metadata"]) == ("succeeded", {"answer": 42}, {"mine": 7})
    assert [event["action"] for event in done["events"]] == ["created", "started", "started", "succeeded"]
    times = [datetime.fromisoformat(event["time"]) for event in done["events"]]
    assert times == sorted(times)
    assert times[0].tzinfo is not None
    assert done["update_time"] == done["events"][-1]["time"]
    assert done["create_time"] == job["create_time"]


def test_a_job_of_little_has_little_to_show(http: httpx.Client) -> None:
    assert set(create(http, {})) == {"id", "input", "status", "events", "create_time", "update_time"}


@pytest.mark.parametrize(
    ("output", "shown"),
    [
        (b'{"a": [1]}', {"a": [1]}),
        (b"null", None),
        (b"plain text", "plain text"),
        (b"", ""),
        (b"\xff\xfe", "\ufffd\ufffd"),
        (b"[NaN]", "[NaN]"),
        (b'["\\ud800"]', '["\\ud800"]'),
        (b"[" * 100_000, "[" * 100_000),
    ],
    ids=["json", "null", "text", "empty", "bytes", "nan", "half a character", "deep"],
)
def test_an_output_is_json_if_it_can_be_and_else_a_text(
    salad: SaladService, http: httpx.Client, output: bytes, shown: object
) -> None:
    job_id = salad.submit({})
    Worker(salad).complete(job_id, output)
    assert get(http, job_id)["output"] == shown


def test_jobs_are_listed_a_page_at_a_time(http: httpx.Client) -> None:
    made = [create(http, number)["id"] for number in range(30)]
    pages = [ok(http.get(JOBS, params={"page": page, "page_size": 12})) for page in (1, 2, 3, 4)]
    assert [[job["id"] for job in page["items"]] for page in pages] == [made[:12], made[12:24], made[24:], []]
    assert len(ok(http.get(JOBS))["items"]) == 25
    for wrong in ("page=0", "page_size=0", "page_size=101", "page=x"):
        assert wrong.partition("=")[0] in problem(http.get(f"{JOBS}?{wrong}"), 400)


def test_a_job_is_cancelled_by_deleting_it_and_stays(salad: SaladService, http: httpx.Client) -> None:
    job = create(http, {})
    assert http.delete(f"{JOBS}/{job['id']}").status_code == 202
    shown = get(http, job["id"])
    assert (shown["status"], shown["events"][-1]["action"]) == ("cancelled", "cancelled")
    done = create(http, {})
    Worker(salad).complete(done["id"], b"{}")
    assert http.delete(f"{JOBS}/{done['id']}").status_code == 202
    assert get(http, done["id"])["status"] == "succeeded"


def test_what_is_not_there_is_404(http: httpx.Client, salad: SaladService) -> None:
    job_id = salad.submit({})
    ok(http.post(QUEUES, json={"name": "second"}), 201)
    for path in (f"{JOBS}/no-such-job", f"{QUEUES}/second/jobs/{job_id}", f"{QUEUES}/no-such-queue"):
        problem(http.get(path), 404)
        problem(http.delete(path), 404)
    problem(http.get(f"{QUEUES}/no-such-queue/jobs"), 404)
    problem(http.post(f"{QUEUES}/no-such-queue/jobs", json={"input": 1}), 404)
    problem(http.patch(f"{QUEUES}/no-such-queue", json={}), 404)
    problem(http.get("/no/such/path"), 404)
    problem(http.put(JOBS), 405)
    assert salad.job(job_id).status is JobStatus.PENDING


def test_without_the_key_nothing_is_done(salad: SaladService, http: httpx.Client) -> None:
    problem(http.post(JOBS, json={"input": 1}, headers={"Salad-Api-Key": "another"}), 403)
    problem(httpx.post(salad.api_url + JOBS, json={"input": 1}, trust_env=False), 401)
    problem(http.get(SECRET_KEY, headers={"Salad-Api-Key": "another"}), 403)
    assert ok(http.get(JOBS)) == {"items": []}


def test_what_is_no_job_is_refused_with_the_field_named(http: httpx.Client) -> None:
    bodies: list[tuple[Any, str]] = [
        ({"metadata": {}}, "input"),
        ({"input": 1, "metadata": []}, "metadata"),
        ({"input": 1, "webhook": ""}, "webhook"),
        ({"input": "x" * (10 << 20)}, "input"),
    ]
    for body, field in bodies:
        assert field in problem(http.post(JOBS, json=body), 400)
    headers = {"content-type": "application/json"}
    problem(http.post(JOBS, content=b"{no json", headers=headers), 400)
    problem(http.post(JOBS, content=b'{"input": NaN}', headers=headers), 400)
