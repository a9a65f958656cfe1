"""The submitter's side of Kelpie's API against the local one: what is asked, what comes back, what fails."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from heeler.desks import open_desk, opened_desk
from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.job import InvalidJobError
from heeler.local.kelpie_faults import Fault
from heeler.settings import Settings
from heeler.sources.base import Desk, PartlySubmittedError, SourceUnavailableError, SubmitOptions
from heeler.sources.kelpie_job import DOCUMENT_VARIABLE
from tests.support.kelpie_server import API_KEY, GROUP, KEY, ORGANIZATION, PROJECT, KelpieServer

MINUTE = 60.0
NO_ID = "7c1b2a54-0000-4000-8000-000000000000"


class Clock:
    """Seconds since 1970, as the API sees them."""

    def __init__(self) -> None:
        self.now = math.floor(time.time())

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def server(clock: Clock) -> Iterator[KelpieServer]:
    with KelpieServer(clock=clock) as server:
        yield server


def settings(server: KelpieServer, **changes: Any) -> Settings:
    values = {"kelpie_url": server.url, "kelpie_api_key": KEY, "container_group_id": GROUP}
    return Settings(**{**values, **changes})


@pytest.fixture
def desk(server: KelpieServer) -> Iterator[Desk]:
    with opened_desk(settings(server)) as desk:
        yield desk


def document(**fields: Any) -> bytes:
    return json.dumps({"command": "true", **fields}).encode()


def many(count: int) -> list[bytes]:
    return [document(arguments=[str(number)]) for number in range(count)]


def posts(server: KelpieServer) -> tuple[int, int]:
    """How many submissions of one and of several jobs there were."""
    return server.faults.calls["create"], server.faults.calls["batch"]


def refusal(error: type[Exception], call: Callable[[], Any], *absent: str) -> str:
    """The one line of what is raised."""
    with pytest.raises(error) as caught:
        call()
    words = str(caught.value)
    assert "\n" not in words
    for secret in (KEY, API_KEY, *absent):
        assert secret not in words
    return words


@contextmanager
def failing(server: KelpieServer, *fault: Any, **more: Any) -> Iterator[None]:
    server.faults.fail(*fault, **more)
    yield
    server.faults.clear()


# Submitting.


def test_one_document_is_one_job_and_several_are_a_batch(server: KelpieServer, desk: Desk) -> None:
    (one,) = desk.submit([document(timeout=5, index=0, id="dropped")])
    assert posts(server) == (1, 0)
    ids = desk.submit(many(3))
    assert posts(server) == (1, 1)
    assert [server.job(job_id)["arguments"] for job_id in ids] == [["0"], ["1"], ["2"]]
    job = server.job(one)
    assert (job["id"], job["status"], job["container_group_id"]) == (one, "pending", GROUP)
    assert json.loads(job["environment"][DOCUMENT_VARIABLE]) == {"timeout": 5, "index": 0}
    assert desk.notes() == []


def test_2500_documents_are_three_batches_and_all_are_listed_in_order(server: KelpieServer, desk: Desk) -> None:
    ids = desk.submit(many(2500))
    assert posts(server) == (0, 3)
    assert len({*ids}) == 2500
    assert [server.job(ids[number])["arguments"] for number in (0, 999, 1000, 2499)] == [
        ["0"], ["999"], ["1000"], ["2499"],
    ]  # fmt: skip
    server.faults.calls.clear()
    assert [record.id for record in desk.jobs()] == ids
    assert server.faults.calls == {"list": 3}


def test_a_last_document_alone_is_a_job_of_its_own(server: KelpieServer, desk: Desk) -> None:
    assert len(desk.submit(many(1001))) == 1001
    assert posts(server) == (1, 1)


def test_a_document_may_name_its_container_group(server: KelpieServer, desk: Desk) -> None:
    ours, other = desk.submit([document(), document(container_group_id="group-2")])
    assert server.job(other)["container_group_id"] == "group-2"
    assert [record.id for record in desk.jobs()] == [ours]
    assert {*desk.look([ours, other, NO_ID])} == {ours, other}
    with opened_desk(settings(server, container_group_id=None)) as everywhere:
        assert [record.id for record in everywhere.jobs()] == [ours, other]
        assert "SALAD_CONTAINER_GROUP_ID" in refusal(UsageError, lambda: everywhere.submit([document()]))
        assert len(everywhere.submit([document(container_group_id="group-2")])) == 1


def test_nothing_is_sent_if_one_document_is_wrong(server: KelpieServer, desk: Desk) -> None:
    wrong = [*many(3), document(id="mine")]
    assert refusal(InvalidJobError, lambda: desk.submit(wrong)).startswith("id: can't be chosen")
    assert refusal(UsageError, lambda: desk.submit(many(1), SubmitOptions(group="g"))).startswith("--group names")
    assert refusal(UsageError, lambda: desk.submit_message(b"x")).startswith("--raw sends")
    assert server.faults.calls == {}


@pytest.mark.parametrize(
    "who",
    [
        {"kelpie_api_key": KEY},
        {
            "kelpie_api_key": None,
            "salad_api_key": API_KEY,
            "salad_organization": ORGANIZATION,
            "salad_project": PROJECT,
        },
    ],
)
def test_either_key_will_do(server: KelpieServer, who: dict[str, Any]) -> None:
    with opened_desk(settings(server, source="kelpie", **who)) as desk:
        (job_id,) = desk.submit([document()])
    assert server.job(job_id)["status"] == "pending"


def test_on_a_machine_of_saladclouds_its_token_will_do(server: KelpieServer) -> None:
    uri = server.environment()["SALAD_METADATA_URI"]
    who = settings(server, source="kelpie", kelpie_api_key=None, salad_project=PROJECT, metadata_uri=uri)
    with opened_desk(who) as desk:
        (job_id,) = desk.submit([document()])
        assert [record.id for record in desk.jobs()] == [job_id]


# Submissions that fail.


def test_an_api_that_is_down_is_said_without_any_doubt(server: KelpieServer, desk: Desk) -> None:
    with server.away():
        words = refusal(SourceUnavailableError, lambda: desk.submit(many(2)))
    assert words == f"Kelpie's API at {server.url} is out of reach: Connection refused"
    with failing(server, "list", Fault.ERROR, status=503):
        assert "answered GET /jobs with 503" in refusal(SourceUnavailableError, lambda: desk.submit(many(2)))
    assert posts(server) == (0, 0)
    assert len(desk.submit(many(2))) == 2


@pytest.mark.parametrize("fault", [Fault.LOSE, Fault.DROP, Fault.ERROR])
@pytest.mark.parametrize(("count", "those"), [(1, "the job"), (2, "the first 2 jobs"), (1001, "the first 1000 jobs")])
def test_a_submission_without_an_answer_is_never_repeated_and_the_doubt_is_said(
    server: KelpieServer, desk: Desk, fault: Fault, count: int, those: str
) -> None:
    server.faults.fail("create" if count == 1 else "batch", fault, math.inf)
    words = refusal(UnavailableError, lambda: desk.submit(many(count)))
    assert f"; {those} may have been submitted all the same, and would be twice if they were" in words
    assert words.endswith("look with heeler jobs first")
    assert sum(posts(server)) == 1
    server.faults.clear()
    assert len(desk.jobs()) == (min(count, 1000) if fault is Fault.LOSE else 0)


def test_a_later_batch_that_fails_tells_the_ids_so_far(
    server: KelpieServer, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_after_first(fault: Fault, status: int = 500) -> None:
        def listen(event: str, job: dict[str, Any]) -> None:
            if event == "created":
                server.faults.fail("batch", fault, status=status)

        server.table.listeners[1:] = [listen]

    fail_after_first(Fault.LOSE)
    with pytest.raises(PartlySubmittedError) as unsure:
        desk.submit(many(2500))
    assert len(unsure.value.sent) == 1000
    assert unsure.value.exit_code == 69
    assert str(unsure.value).startswith(f"1000 of 2500 jobs were submitted, then: Kelpie's API at {server.url} is out")
    assert "; the next 1000 jobs may have been submitted all the same" in str(unsure.value)
    server.table.listeners[1:] = []
    server.faults.clear()
    listed = [record.id for record in desk.jobs()]
    assert (listed[:1000], len(listed)) == ([*unsure.value.sent], 2000)
    fail_after_first(Fault.ERROR, 413)
    with pytest.raises(PartlySubmittedError) as refused:
        desk.submit(many(1002))
    assert (len(refused.value.sent), refused.value.exit_code) == (1000, 64)
    assert str(refused.value).startswith("1000 of 1002 jobs were submitted, then: Kelpie's API at ")
    assert str(refused.value).endswith("submit the others only, once that is mended")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"kelpie_api_key": "wrong"}, UsageError, "with 403: Invalid API Key; check KELPIE_API_KEY, or SALAD_API_KEY"),
        ({"kelpie_api_key": None, "salad_api_key": "wrong"}, UsageError, "403: Invalid API Key; check KELPIE_API_KEY"),
        ({"kelpie_api_key": None, "salad_api_key": API_KEY, "salad_project": "x"}, UsageError, "403: Invalid Project"),
        ({"kelpie_api_key": None, "salad_api_key": API_KEY, "salad_project": ""}, UsageError, "400: "),
        ({"kelpie_url": "URL/elsewhere"}, UsageError, "404: Route Not Found; is KELPIE_API_URL (or --kelpie-url) righ"),
        ({"kelpie_url": "http://127.0.0.1:9"}, SourceUnavailableError, "out of reach: Connection refused"),
    ],
)
def test_who_is_refused_is_told_what_to_check(
    server: KelpieServer, changes: dict[str, Any], error: type[HeelerError], words: str
) -> None:
    values = {"source": "kelpie", "salad_organization": ORGANIZATION, "salad_project": PROJECT, **changes}
    values = {name: value and value.replace("URL", server.url) for name, value in values.items()}
    desk = open_desk(settings(server, **values))
    assert words in refusal(error, lambda: desk.submit(many(2)), "wrong")
    assert words in refusal(error, desk.jobs, "wrong")
    desk.close()
    assert posts(server) == (0, 0)


def test_a_submission_that_is_refused_says_so(server: KelpieServer, desk: Desk) -> None:
    with failing(server, "batch", Fault.ERROR, status=400):
        words = refusal(UsageError, lambda: desk.submit(many(2)))
    assert words.startswith(f"nothing was submitted: Kelpie's API at {server.url} answered POST /jobs/batch with 400:")


# Looking.


def test_pages_are_read_to_the_end_though_jobs_come_meanwhile(
    server: KelpieServer, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("heeler.kelpie_desk._BATCH", 10)
    ids = [server.submit("true") for _ in range(30)]
    pages = server.table.list

    def listing(*who: Any, page: int, page_size: int, **what: Any) -> Any:
        found = pages(*who, **what, page_size=1000)
        found.insert(20, found[5])  # jobs of one second have no order of their own
        if page == 2:
            ids.append(server.submit("true"))
        return found[(page - 1) * page_size : page * page_size]

    monkeypatch.setattr(server.table, "list", listing)
    assert [record.id for record in desk.jobs()] == ids
    assert server.faults.calls["list"] == 4
    monkeypatch.setattr(server.table, "list", lambda *who, **what: pages(*who, **{**what, "page": 1}))
    assert [record.id for record in desk.jobs()] == ids[:10]  # a page that comes again is the last


def test_many_jobs_are_looked_at_by_the_page_and_few_old_ones_one_by_one(server: KelpieServer, desk: Desk) -> None:
    old = desk.submit(many(3))
    new = desk.submit(many(400))
    server.faults.calls.clear()
    assert [*desk.look([])] == []
    assert server.faults.calls == {}
    assert {*desk.look(new)} == {*new}
    assert server.faults.calls == {"list": 1}
    server.faults.calls.clear()
    assert {*desk.look([*old, NO_ID])} == {*old}
    assert server.faults.calls["list"] + server.faults.calls["get"] <= 2 * 4
    server.faults.calls.clear()
    assert [*desk.look([new[0]])] == [new[0]]
    assert server.faults.calls == {"get": 1}


def test_a_job_is_shown_as_it_goes_on(server: KelpieServer, desk: Desk, clock: Clock) -> None:
    (job_id,) = desk.submit([document(max_failures=2)])
    submitted = float(clock.now)
    found = desk.show(job_id)
    assert found is not None
    assert (found.state, found.attempts, found.created, found.heard) == ("pending", 0, submitted, None)
    clock.now += 5
    assert server.take("machine-2") == job_id
    found = desk.show(job_id)
    assert found is not None
    assert (found.state, found.attempts, found.worker, found.heard) == ("running", 1, "machine-2", submitted + 5)
    server.table.failed(server.user, job_id, "machine-2")
    server.table.failed(server.user, job_id, "machine-3")
    found = desk.show(job_id)
    assert found is not None
    assert (found.state, found.attempts, found.failures, found.reason) == ("failed", 2, 2, "failed 2 times")
    assert found.finished == submitted + 5
    for nobody in (NO_ID, "../jobs", "", "a b"):
        assert desk.show(nobody) is None


def test_jobs_that_are_none_are_said(server: KelpieServer, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.table, "batch", lambda *_: [])
    assert "did not say which 2 jobs it has made; the first 2 jobs may have been" in refusal(
        UnavailableError, lambda: desk.submit(many(2))
    )
    monkeypatch.setattr(server.table, "list", lambda *_, **__: [{"id": "a"}])
    assert "told of a job that is none" in refusal(SourceUnavailableError, desk.jobs)


# Cancelling.


def test_a_job_is_cancelled_while_it_waits_or_runs_and_never_after(server: KelpieServer, desk: Desk) -> None:
    running, waiting, done = desk.submit(many(3))
    assert server.take() == running
    server.table.completed(server.user, done, "machine-2")
    assert [desk.cancel(job_id) for job_id in (running, waiting, done, NO_ID, "no id")] == [True, True, *[False] * 3]
    assert server.faults.calls["cancel"] == 2
    assert [record.state for record in desk.jobs()] == ["cancelled", "cancelled", "done"]
    assert desk.cancel(waiting) is False
    assert server.heartbeat(running) == "canceled"


def test_a_job_that_ends_before_its_cancellation_is_not_said_to_be_cancelled(
    server: KelpieServer, desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = desk.submit(many(1))
    cancel = server.table.cancel

    def late(user: str, subject: str) -> None:
        server.table.completed(user, subject, "machine-2")
        cancel(user, subject)

    monkeypatch.setattr(server.table, "cancel", late)
    assert desk.cancel(job_id) is False
    assert server.job(job_id)["status"] == "completed"


def test_a_cancellation_without_an_answer_says_how_to_look(server: KelpieServer, desk: Desk) -> None:
    (job_id,) = desk.submit(many(1))
    server.faults.fail("cancel", Fault.LOSE)
    words = refusal(UnavailableError, lambda: desk.cancel(job_id))
    assert words.endswith(f"; the job may be cancelled all the same: see heeler jobs show {job_id}")
    server.faults.fail("cancel", Fault.ERROR, 2, status=403)
    (other,) = desk.submit(many(1))
    assert "with 403" in refusal(UsageError, lambda: desk.cancel(other))


def test_results_are_kept_elsewhere(desk: Desk) -> None:
    assert "keeps no results" in refusal(UsageError, lambda: desk.result(NO_ID))
