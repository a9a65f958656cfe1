"""The local Kelpie API over real HTTP: each call's status, type and body, by Salad's published source of it."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import pytest
from anyio.from_thread import start_blocking_portal

from heeler.local import kelpie_api
from heeler.local.kelpie_faults import KelpieFaults
from heeler.local.kelpie_rows import Job
from heeler.local.kelpie_table import KelpieTable, user_of
from heeler.local.tokens import Identity, TokenIssuer

KEY = "kelpie-key"
API_KEY = "salad-api-key"
ORGANIZATION = "lab"
PROJECT = "default"
NOW = 1_713_552_811.4
NO_JOB = "/jobs/8b9c902c-7da6-4af3-be0b-59cd4487895a"
SUBMITTED = {"command": "python", "container_group_id": "g"}
WORKER = {"machine_id": "m1", "container_group_id": "g"}


class KelpieService:
    """The API in a thread, on a free port, with a clock that stands still. Use it as a context manager."""

    def __init__(self, path: Path | str = ":memory:", *, project: str | None = PROJECT) -> None:
        self.now = NOW
        self.moved: list[tuple[str, str]] = []
        self.table = KelpieTable(path, clock=lambda: self.now, on_reallocate=lambda *who: self.moved.append(who))
        self.tokens = TokenIssuer()
        self.faults = KelpieFaults()
        self._project = project
        self._stack = ExitStack()

    def __enter__(self) -> KelpieService:
        with ExitStack() as stack:
            stack.callback(self.table.close)
            portal = stack.enter_context(start_blocking_portal())
            serving = kelpie_api.serving(
                self.table,
                self.tokens,
                kelpie_key=KEY,
                api_key=API_KEY,
                organization=ORGANIZATION,
                project=self._project,
                faults=self.faults,
            )
            self.url = stack.enter_context(portal.wrap_async_context_manager(serving))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def client(self, headers: dict[str, str] | None = None, **options: Any) -> httpx.Client:
        """A client, with the key of Kelpie's own unless there are headers."""
        given = {"X-Kelpie-Key": KEY} if headers is None else headers
        return httpx.Client(base_url=self.url, headers=given, trust_env=False, **options)

    def token(self, organization: str = ORGANIZATION, lifetime: float = 60) -> str:
        identity = Identity("m1", "organization-id", organization, "g", "workers")
        return self.tokens.issue(identity, lifetime)


@pytest.fixture
def kelpie() -> Iterator[KelpieService]:
    with KelpieService() as service:
        yield service


@pytest.fixture
def http(kelpie: KelpieService) -> Iterator[httpx.Client]:
    with kelpie.client() as client:
        yield client


def ok(answer: httpx.Response, status: int = 200) -> Any:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    return answer.json()


def refused(answer: httpx.Response, status: int, error: str) -> str:
    """The message of an error of the API's own code."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].partition(";")[0] == "text/plain"
    body = answer.json()
    assert set(body) == {"error", "message"}
    assert body["error"] == error
    return str(body["message"])


def invalid(answer: httpx.Response) -> list[list[str | int]]:
    """The places of what fails validation."""
    body = ok(answer, 400)
    assert (body["success"], body["result"]) == (False, {})
    for error in body["errors"]:
        assert set(error) == {"code", "message", "path"}
        assert re.fullmatch(r"invalid_type|invalid_enum_value|too_small|too_big", error["code"])
    return [error["path"] for error in body["errors"]]


def submit(http: httpx.Client, **fields: Any) -> Job:
    job: Job = ok(http.post("/jobs", json={**SUBMITTED, **fields}), 202)
    return job


def work(http: httpx.Client, machine: str = "m1", group: str = "g") -> list[Job]:
    jobs: list[Job] = ok(http.get("/work", params={"machine_id": machine, "container_group_id": group}))
    return jobs


def get(http: httpx.Client, job: Job) -> Job:
    found: Job = ok(http.get(f"/jobs/{job['id']}"))
    return found


def tell(http: httpx.Client, job: Job, what: str, machine: str = "m1") -> httpx.Response:
    return http.post(f"/jobs/{job['id']}/{what}", json={**WORKER, "machine_id": machine})


# Submitting.


def test_a_job_is_submitted_and_looked_up(http: httpx.Client) -> None:
    entry = {"bucket": "b", "prefix": "p", "local_path": "/out", "direction": "upload", "pattern": "x$"}
    fields = {
        "arguments": ["main.py"],
        "environment": {"A": "ä"},
        "webhook": "http://127.0.0.1:1/",
        "max_failures": 5,
        "heartbeat_interval": 10,
        "compression": True,
        "sync": {"after": [entry]},
    }
    job = submit(http, **fields)
    assert job == {
        "id": str(uuid.UUID(job["id"], version=4)),
        "user_id": user_of(ORGANIZATION),
        "status": "pending",
        "created": "2024-04-19T18:53:31.000Z",
        **dict.fromkeys(("started", "completed", "canceled", "failed", "heartbeat", "machine_id")),
        **dict.fromkeys(("input_bucket", "input_prefix", "checkpoint_bucket", "checkpoint_prefix")),
        **dict.fromkeys(("output_bucket", "output_prefix")),
        "num_failures": 0,
        "num_heartbeats": 0,
        **SUBMITTED,
        **fields,
        "sync": {"after": [{**entry, "prefix": "p/"}]},
    }
    assert get(http, job) == job


def test_the_older_fields_get_their_slash(http: httpx.Client) -> None:
    older = {f"{what}_{part}": f"{what}" for what in ("input", "checkpoint", "output") for part in ("bucket", "prefix")}
    job = submit(http, **older)
    assert {name: job[name] for name in older} == {
        name: value + "/" if name.endswith("prefix") else value for name, value in older.items()
    }


def test_fields_that_it_does_not_know_are_dropped_at_every_level(http: httpx.Client) -> None:
    entry = {"bucket": "b", "prefix": "p/", "local_path": "/in", "direction": "download"}
    job = submit(http, timeout=5, id="mine", status="completed", sync={"before": [{**entry, "mode": "x"}], "later": []})
    assert "timeout" not in job
    assert job["id"] != "mine"
    assert job["status"] == "pending"
    assert job["sync"] == {"before": [entry]}


ENTRY = {"bucket": "b", "prefix": "p", "local_path": "/in", "direction": "download"}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"command": None}, ["command"]),
        ({"command": 5}, ["command"]),
        ({"container_group_id": None}, ["container_group_id"]),
        ({"arguments": "a"}, ["arguments"]),
        ({"arguments": ["a", 1]}, ["arguments", 1]),
        ({"arguments": None}, ["arguments"]),
        ({"environment": {"A": 1}}, ["environment", "A"]),
        ({"environment": None}, ["environment"]),
        ({"max_failures": 0}, ["max_failures"]),
        ({"max_failures": "3"}, ["max_failures"]),
        ({"max_failures": True}, ["max_failures"]),
        ({"max_failures": 1 << 70}, ["max_failures"]),
        ({"heartbeat_interval": 0}, ["heartbeat_interval"]),
        ({"heartbeat_interval": 1.5}, ["heartbeat_interval"]),
        ({"heartbeat_interval": None}, ["heartbeat_interval"]),
        ({"webhook": None}, ["webhook"]),
        ({"input_bucket": None}, ["input_bucket"]),
        ({"output_prefix": None}, ["output_prefix"]),
        ({"compression": "true"}, ["compression"]),
        ({"compression": 1}, ["compression"]),
        ({"sync": None}, ["sync"]),
        ({"sync": []}, ["sync"]),
        ({"sync": {"before": None}}, ["sync", "before"]),
        ({"sync": {"during": [{**ENTRY, "direction": "both"}]}}, ["sync", "during", 0, "direction"]),
        ({"sync": {"before": [ENTRY, {**ENTRY, "pattern": None}]}}, ["sync", "before", 1, "pattern"]),
        ({"sync": {"after": [{**ENTRY, "bucket": 1}]}}, ["sync", "after", 0, "bucket"]),
    ],
    ids=str,
)
def test_what_is_no_job_is_refused_with_its_place(
    http: httpx.Client, fields: dict[str, Any], place: list[str | int]
) -> None:
    body = {**SUBMITTED, **fields}
    assert invalid(http.post("/jobs", json=body)) == [["body", *place]]
    assert invalid(http.post("/jobs/batch", json=[SUBMITTED, body])) == [["body", 1, *place]]
    assert ok(http.get("/jobs"))["_count"] == 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'"job"'], ids=repr)
def test_a_body_that_is_no_document_is_refused(http: httpx.Client, body: bytes) -> None:
    assert invalid(http.post("/jobs", content=body))[0][0] == "body"
    assert invalid(http.post(f"{NO_JOB}/heartbeat", content=body))[0][0] == "body"


def test_what_is_missing_is_required(http: httpx.Client) -> None:
    answer = http.post("/jobs", json={})
    assert invalid(answer) == [["body", "command"], ["body", "container_group_id"]]
    assert {error["message"] for error in answer.json()["errors"]} == {"Required"}


def test_a_batch_has_one_to_a_thousand_jobs(http: httpx.Client) -> None:
    made = ok(http.post("/jobs/batch", json=[{**SUBMITTED, "command": str(number)} for number in range(1000)]), 202)
    assert [job["command"] for job in made] == [str(number) for number in range(1000)]
    assert len({job["id"] for job in made}) == 1000
    for wrong in ([], [SUBMITTED] * 1001, SUBMITTED):
        assert invalid(http.post("/jobs/batch", json=wrong)) == [["body"]]
    assert ok(http.get("/jobs", params={"page_size": 2000}))["_count"] == 1000


# Looking up and cancelling.


def test_jobs_are_listed_the_newest_first_a_page_at_a_time(kelpie: KelpieService, http: httpx.Client) -> None:
    jobs = []
    for number in range(5):
        jobs.append(submit(http, container_group_id="odd" if number % 2 else "even"))
        kelpie.now += 1
    jobs[0] = work(http, group="even")[0]
    running = get(http, jobs[0])

    def listed(**query: object) -> list[Job]:
        body = ok(http.get("/jobs", params={name: str(value) for name, value in query.items()}))
        assert set(body) == {"_count", "jobs"}
        assert body["_count"] == len(body["jobs"])
        found: list[Job] = body["jobs"]
        return found

    assert listed() == [*jobs[:0:-1], running]
    assert listed(asc="true") == [running, *jobs[1:]]
    assert listed(asc="false", page_size=2, page=2) == jobs[2:0:-1]
    assert listed(page=2) == []
    assert listed(container_group_id="odd", asc="true") == [jobs[1], jobs[3]]
    assert listed(status="running") == [running]
    assert listed(status="pending", container_group_id="even") == [jobs[4], jobs[2]]
    for wrong in ("status=done", "page=0", "page=x", "page_size=0", "asc=perhaps"):
        assert invalid(http.get(f"/jobs?{wrong}")) == [["query", wrong.partition("=")[0]]]


def test_a_cancelled_job_says_so_and_one_that_ended_stays(http: httpx.Client) -> None:
    job, done = submit(http), submit(http)
    assert ok(tell(http, done, "completed")) == {"message": "Completed reported"}
    before = get(http, done)
    for each in (job, done):
        assert ok(http.delete(f"/jobs/{each['id']}"), 202) == {"message": "Job canceled"}
    shown = get(http, job)
    assert (shown["status"], shown["canceled"], shown["machine_id"]) == ("canceled", "2024-04-19 18:53:31", "user")
    assert get(http, done) == before


def test_a_purge_tells_how_many_it_cancelled(http: httpx.Client) -> None:
    jobs = [submit(http, container_group_id=group) for group in ("g", "g", "g", "h")]
    ok(tell(http, jobs[0], "completed"))
    assert ok(http.delete("/jobs/container-groups/g")) == {"count": 2}
    assert [get(http, job)["status"] for job in jobs] == ["completed", "canceled", "canceled", "pending"]
    assert ok(http.delete("/jobs/container-groups/none")) == {"count": 0}


def test_what_is_not_there_is_404(http: httpx.Client) -> None:
    assert refused(http.get(NO_JOB), 404, "Not Found") == "Job not found"
    assert refused(http.delete(NO_JOB), 404, "Not Found") == "Job not found"
    for what in ("heartbeat", "completed", "failed"):
        assert refused(http.post(f"{NO_JOB}/{what}", json=WORKER), 404, "Not Found") == "Job not found"
    for method, path in (("GET", "/other"), ("PUT", "/jobs"), ("POST", NO_JOB), ("GET", "/jobs/"), ("PATCH", "/work")):
        answer = http.request(method, path)
        assert (answer.status_code, answer.json()) == (404, {"error": "Route Not Found"})
        assert answer.headers["content-type"].startswith("text/plain")


def test_health_needs_no_credentials(kelpie: KelpieService) -> None:
    assert ok(httpx.get(f"{kelpie.url}/healthz", trust_env=False)) == {"status": "ok"}


# Working.


def test_a_job_from_work_to_completed(kelpie: KelpieService, http: httpx.Client) -> None:
    assert work(http) == []
    job = submit(http)
    assert work(http) == [job], "as it was before it was taken"
    assert work(http, "m2") == []
    kelpie.now += 9
    assert ok(tell(http, job, "heartbeat")) == {"status": "running"}
    assert ok(tell(http, job, "heartbeat", "m2")) == {"status": "canceled"}
    shown = get(http, job)
    assert (shown["status"], shown["started"]) == ("running", "2024-04-19 18:53:31")
    assert (shown["heartbeat"], shown["num_heartbeats"]) == ("2024-04-19 18:53:40", 1)
    kelpie.now += 9
    assert ok(tell(http, job, "completed", "m9")) == {"message": "Completed reported"}
    shown = get(http, job)
    assert (shown["status"], shown["completed"], shown["machine_id"]) == ("completed", "2024-04-19 18:53:49", "m9")
    assert ok(tell(http, job, "heartbeat")) == {"status": "completed"}


def test_failures_are_counted_and_the_machine_is_passed_over(kelpie: KelpieService, http: httpx.Client) -> None:
    job = submit(http, max_failures=2, heartbeat_interval=5)
    assert work(http) == [job]
    assert ok(tell(http, job, "failed"), 202) == {"message": "Failure reported"}
    assert (get(http, job)["status"], get(http, job)["num_failures"]) == ("running", 1)
    kelpie.now += 9
    assert work(http, "m2") == []
    kelpie.now += 1
    assert work(http, "m1") == []
    assert [taken["id"] for taken in work(http, "m2")] == [job["id"]]
    assert ok(tell(http, job, "failed", "m2"), 202) == {"message": "Failure reported"}
    shown = get(http, job)
    assert (shown["status"], shown["num_failures"], shown["failed"]) == ("failed", 2, "2024-04-19 18:53:41")
    assert kelpie.moved == []


def test_a_machine_with_five_bans_is_to_be_moved(kelpie: KelpieService, http: httpx.Client) -> None:
    for _ in range(5):
        tell(http, submit(http, max_failures=9), "failed")
    assert work(http) == []
    assert kelpie.moved == [("m1", "g")]
    assert len(work(http, "m2")) == 1


def test_who_works_has_to_say_so(http: httpx.Client) -> None:
    job = submit(http)
    assert invalid(http.get("/work")) == [["query", "machine_id"], ["query", "container_group_id"]]
    assert invalid(http.get("/work?machine_id=m")) == [["query", "container_group_id"]]
    for what in ("heartbeat", "completed", "failed"):
        path = f"/jobs/{job['id']}/{what}"
        assert invalid(http.post(path, json={})) == [["body", "machine_id"], ["body", "container_group_id"]]
        assert invalid(http.post(path, json={**WORKER, "machine_id": None})) == [["body", "machine_id"]]
        assert invalid(http.post(path, json={"machine_id": "m1"})) == [["body", "container_group_id"]]
    assert get(http, job) == job


def test_a_body_without_its_type_is_read_all_the_same(http: httpx.Client) -> None:
    job = submit(http)
    headers = {"content-type": "text/plain;charset=UTF-8"}
    path = f"/jobs/{job['id']}/heartbeat"
    assert ok(http.post(path, content=json.dumps(WORKER), headers=headers)) == {"status": "pending"}
    assert ok(http.post("/jobs", content=json.dumps(SUBMITTED), headers=headers), 202)["status"] == "pending"


def test_a_race_gives_one_job_to_two_machines(kelpie: KelpieService, http: httpx.Client) -> None:
    job = submit(http)
    kelpie.table.race = 2
    assert work(http, "m1") == work(http, "m2") == [job]
    assert work(http, "m3") == []
    assert ok(tell(http, job, "heartbeat", "m1")) == {"status": "canceled"}
    assert ok(tell(http, job, "heartbeat", "m2")) == {"status": "running"}


def test_a_file_outlives_the_service(tmp_path: Path) -> None:
    with KelpieService(tmp_path / "kelpie.db") as first, first.client() as http:
        job = submit(http, heartbeat_interval=1)
        work(http)
        ok(tell(http, job, "failed"), 202)
        before = get(http, job)
    with KelpieService(tmp_path / "kelpie.db") as second, second.client() as http:
        assert get(http, job) == before
        second.now += 2
        assert work(http, "m1") == []
        assert [taken["id"] for taken in work(http, "m2")] == [job["id"]]
