"""What Kelpie's API is sent for a job document, and how its jobs are shown: no job loses a field on the way."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.desks import open_desk
from heeler.errors import UsageError
from heeler.job import InvalidJobError, JobDocument, parse_document
from heeler.kelpie_desk import KelpieDesk, record_of
from heeler.local.kelpie_model import SUBMISSION
from heeler.settings import Settings
from heeler.sources.kelpie_draft import submission_of
from heeler.sources.kelpie_job import DOCUMENT_VARIABLE, Row, document_of
from heeler_sync.paths import location
from tests.support.sqs_server import REGION

GROUP = "group-1"
ENTRY = {"bucket": "lab", "prefix": "a/{job_id}/", "local_path": "/input"}


def sent(document: Any, group: str | None = GROUP) -> dict[str, Any]:
    """What the API is sent; everything that it takes."""
    return submission_of(json.dumps({"command": "true", **document}).encode(), group)


def answered(submission: dict[str, Any]) -> Row:
    """The job that the API makes of a submission, as a worker is told of it."""
    fields = SUBMISSION.validate_json(json.dumps(submission)).fields()
    return Row.of({"id": "9e1f-1", "status": "pending", "num_failures": 0, **fields})


def run(document: Any, settings: Settings | None = None) -> JobDocument:
    """The job document that our worker has in the end."""
    return parse_document(json.dumps(document_of(answered(sent(document)), settings or Settings())).encode())


# What is sent.


@pytest.mark.parametrize(
    ("document", "more"),
    [
        ({}, {}),
        ({"arguments": ["a", ""], "environment": {"A": "1"}}, {"arguments": ["a", ""], "environment": {"A": "1"}}),
        ({"max_failures": 5, "heartbeat_interval": 10}, {"max_failures": 5, "heartbeat_interval": 10}),
        ({"heartbeat_interval": 10.0, "max_failures": 5000}, {"heartbeat_interval": 10, "max_failures": 5000}),
        ({"heartbeat_interval": 86400}, {"heartbeat_interval": 86400}),
        (
            {
                "heartbeat_interval": None,
                "max_failures": None,
                "webhook": None,
                "timeout": None,
                "index": None,
                "id": None,
            },
            {},
        ),
        ({"webhook": "https://x.example/h"}, {"webhook": "https://x.example/h"}),
        ({"webhook": False, "result_key": ""}, {}),
        ({"compression": True}, {"compression": True}),
        ({"compression": 1}, {"compression": True}),
        ({"sync": {}}, {"sync": {}}),
        (
            {"sync": {"before": [ENTRY], "during": [], "after": [{**ENTRY, "pattern": "x$", "direction": "upload"}]}},
            {
                "sync": {
                    "before": [{**ENTRY, "direction": "download"}],
                    "during": [],
                    "after": [{**ENTRY, "pattern": "x$", "direction": "upload"}],
                }
            },
        ),
        (
            {"sync": {"during": [{**ENTRY, "pattern": None, "direction": None, "ready": None}]}},
            {"sync": {"during": [{**ENTRY, "direction": "upload"}]}},
        ),
        ({"input_bucket": "lab", "input_prefix": "x"}, {"input_bucket": "lab", "input_prefix": "x"}),
        ({"input_bucket": None, "input_prefix": "", "output_bucket": False}, {}),
        ({"run_id": ""}, {}),
        ({"container_group_id": "other"}, {"container_group_id": "other"}),
        ({"container_group_id": ""}, {}),
    ],
)
def test_kelpies_fields_are_sent_as_they_are_and_nothing_is_added(
    document: dict[str, Any], more: dict[str, Any]
) -> None:
    submission = sent(document)
    assert submission == {"command": "true", "container_group_id": GROUP, **more}
    answered(submission)


@pytest.mark.parametrize(
    ("document", "kept"),
    [
        ({"timeout": 5}, {"timeout": 5}),
        ({"run_id": "fresh-1"}, {"run_id": "fresh-1"}),
        ({"index": 0, "id": "made-up-0"}, {"index": 0}),
        ({"sync": {"during": [{**ENTRY, "mode": "mirror"}]}}, {"sync": {"during": [{**ENTRY, "mode": "mirror"}]}}),
        (
            {"sync": {"before": [ENTRY], "after": [{**ENTRY, "deletes": False}]}, "timeout": 1.5},
            {"sync": {"before": [ENTRY], "after": [{**ENTRY, "deletes": False}]}, "timeout": 1.5},
        ),
    ],
)
def test_what_the_api_drops_is_carried_in_one_variable(document: dict[str, Any], kept: dict[str, Any]) -> None:
    submission = sent({**document, "environment": {"A": "1"}})
    assert {*submission["environment"]} == {"A", DOCUMENT_VARIABLE}
    assert json.loads(submission["environment"][DOCUMENT_VARIABLE]) == kept
    assert ("sync" in submission) == ("sync" in document)
    assert run({**document, "environment": {"A": "1"}}).environment == {"A": "1"}


SNAPSHOT = {**ENTRY, "mode": "snapshot", "ready": "*/done"}


def test_a_snapshot_reaches_our_worker_and_a_worker_of_kelpies_sees_a_folder() -> None:
    document = {"sync": {"before": [{**SNAPSHOT}], "during": [{**SNAPSHOT, "pattern": "x"}]}}
    assert sent(document)["sync"] == {
        "before": [{**ENTRY, "direction": "download"}],
        "during": [{**ENTRY, "pattern": "x", "direction": "upload"}],
    }
    assert run(document).sync == parse_document(json.dumps({"command": "true", **document}).encode()).sync


def test_the_older_six_fields_become_the_folders_that_kelpie_makes_of_them() -> None:
    older = {f"{name}_{field}": "lab" for name in ("input", "checkpoint", "output") for field in ("bucket", "prefix")}
    found = run({**older, "timeout": 3})
    assert found.timeout == 3
    assert [entry.local_path for entry in found.sync.before] == ["/input", "/checkpoint"]
    assert [(entry.local_path, entry.deletes) for entry in found.sync.during] == [
        ("/checkpoint", True),
        ("/output", False),
    ]
    assert {entry.prefix for entry in (*found.sync.before, *found.sync.during, *found.sync.after)} == {"lab/"}


# Whatever the document.

texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
prefixes = st.from_regex(r"[a-z{}_]{1,5}(/[a-z]{1,3})?/?|/?", fullmatch=True)
entries = st.fixed_dictionaries(
    {"bucket": st.from_regex("[a-z]{3,9}", fullmatch=True), "prefix": prefixes, "local_path": st.just("/work/a")},
    optional={
        "pattern": st.sampled_from([None, "a+", "", r"\.txt$"]),
        "mode": st.sampled_from(["mirror", "snapshot"]),
        "deletes": st.booleans(),
    },
).filter(lambda entry: entry.get("mode") != "snapshot" or entry.get("deletes", True)) | st.just({**SNAPSHOT})
documents = st.fixed_dictionaries(
    {"command": texts.filter(bool)},
    optional={
        "arguments": st.lists(texts, max_size=3),
        "environment": st.dictionaries(st.from_regex("[A-Z_]{1,5}", fullmatch=True), texts, max_size=3),
        "sync": st.fixed_dictionaries(
            {}, optional={part: st.lists(entries, max_size=3) for part in ("before", "during", "after")}
        ),
        "timeout": st.none() | st.floats(0.001, 1e8) | st.integers(1, 1000),
        "max_failures": st.integers(1, 1000),
        "heartbeat_interval": st.none() | st.integers(1, 3600) | st.integers(1, 3600).map(float),
        "index": st.none() | st.integers(0, 10**6),
        "run_id": st.from_regex(r"[A-Za-z0-9._-]{0,20}", fullmatch=True),
        "compression": st.sampled_from([True, False, None, 0, 1]),
        "webhook": st.sampled_from([None, False, "", "https://x.example/hook"]),
    },
)


def meant(document: JobDocument, *, directed: bool) -> dict[str, Any]:
    """A document as what it means: places, not spellings."""
    found = document.model_dump(exclude={"id", "webhook", "max_failures", "heartbeat_interval"})
    for part, direction in (("before", "download"), ("during", "upload"), ("after", "upload")):
        for entry in found["sync"][part]:
            entry["prefix"] = str(location(entry["bucket"], entry["prefix"]))
            assert not directed or entry["direction"] in (None, direction)
            entry["direction"] = direction
    return found


@given(documents)
def test_our_worker_gets_the_document_that_was_meant(document: dict[str, Any]) -> None:
    wanted = parse_document(json.dumps(document).encode())
    submission = sent(document)
    assert meant(run(document), directed=True) == meant(wanted, directed=False)
    row = answered(submission)
    assert (row.interval, row.data["max_failures"]) == (wanted.heartbeat_interval or 30, wanted.max_failures)
    assert submission.get("webhook") == wanted.webhook
    entries = [entry for part in document.get("sync", {}).values() for entry in part]
    dropped = any({"mode", "ready", "deletes"} & entry.keys() for entry in entries)
    more = dropped or any(document.get(name) not in (None, "") for name in ("timeout", "run_id", "index"))
    assert (DOCUMENT_VARIABLE in submission.get("environment", {})) == more


# What is refused.


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ({"command": ""}, "command: "),
        ({"id": "mine"}, "id: can't be chosen, for Kelpie's API makes the ids: leave it out"),
        ({"result_key": "x"}, "result_key: Kelpie's API keeps no results"),
        ({"heartbeat_interval": 0.5}, "heartbeat_interval: must be a whole number, 1 or more"),
        ({"heartbeat_interval": 1.5}, "heartbeat_interval: must be a whole number, 1 or more"),
        *(
            ({name: value}, f"{name}: must be a whole number, 1 or more")
            for name in ("heartbeat_interval", "max_failures")
            for value in (0, -1, True, "2", [1], float("inf"), 1 << 53)
        ),
        ({"environment": {DOCUMENT_VARIABLE: "{}"}}, f"environment.{DOCUMENT_VARIABLE}: is made from the document's"),
        ({"environment": {"A B": "x"}}, "environment: 'A B' is no name"),
        ({"webhook": "nowhere"}, "webhook: "),
        ({"commnd": "x"}, "commnd: is not a field of a job document"),
        ({"status": "pending"}, "status: is not a field of a job document"),
        ({"input_bucket": 5}, "input_bucket: must be a text"),
        ({"input_bucket": "lab"}, "input_prefix: is missing"),
        ({"output_prefix": "lab"}, "output_bucket: is missing"),
        ({"output_prefix": "../x", "output_bucket": "lab"}, "output_prefix: '../x' contains '..'"),
        ({"checkpoint_prefix": "x", "checkpoint_bucket": "s3://lab"}, "checkpoint_bucket: 's3://lab' is not a bucket"),
        ({"checkpoint_prefix": "\ud800", "checkpoint_bucket": "lab"}, "checkpoint_prefix: contains half"),
        ({"input_bucket": "lab", "input_prefix": "x", "sync": {}}, "input_bucket: has no effect beside sync"),
        ({"sync": {"before": [{**ENTRY, "direction": "upload"}]}}, "sync: before.0.direction must be 'download'"),
        ({"sync": {"before": [{**ENTRY, "bucket": None}]}}, "sync.before.0.bucket: "),
        ({"container_group_id": ["x"]}, "container_group_id: must be a text"),
    ],
)
def test_what_the_api_would_refuse_or_forget_is_named(document: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        sent(document)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("text", [b"", b"[]", b"nonsense", b"[" * 100_000, b'{"command": "x", "a": ' + b"[" * 100_000])
def test_what_is_no_document_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidJobError, match=r"^document: "):
        submission_of(text, GROUP)


def test_a_job_without_a_container_group_is_refused_with_the_variables_name() -> None:
    with pytest.raises(UsageError, match=r"set SALAD_CONTAINER_GROUP_ID \(or --container-group-id\), or name it in"):
        sent({}, group=None)
    assert sent({"container_group_id": "own"}, group=None)["container_group_id"] == "own"


# What is shown.


def row(status: str, **fields: Any) -> Row:
    created = "2024-04-19T18:53:31.000Z"
    return Row.of({"id": "a", "status": status, "created": created, "num_failures": 0, "machine_id": None, **fields})


SECOND = 1713552811.0
"""Of that time, since 1970."""


@pytest.mark.parametrize(
    ("status", "fields", "shown"),
    [
        ("pending", {}, {"state": "pending", "attempts": 0, "worker": "", "finished": None, "heard": None}),
        (
            "running",
            {"started": "2024-04-19 18:53:32", "heartbeat": "2024-04-19 18:53:33", "machine_id": "m"},
            {"state": "running", "attempts": 1, "worker": "m", "heard": SECOND + 2, "finished": None},
        ),
        (
            "running",
            {"started": "2024-04-19 18:53:32", "num_failures": 2},
            {"attempts": 3, "failures": 2, "reason": ""},
        ),
        (
            "completed",
            {"started": "2024-04-19 18:53:32", "completed": "2024-04-19 18:53:41", "failed": "2024-04-19 18:53:40"},
            {"state": "done", "attempts": 1, "finished": SECOND + 10, "reason": ""},
        ),
        (
            "canceled",
            {"canceled": "2024-04-19 18:53:34", "machine_id": "user"},
            {"state": "cancelled", "attempts": 0, "worker": "", "finished": SECOND + 3},
        ),
        (
            "failed",
            {"started": "2024-04-19 18:53:32", "failed": "2024-04-19 18:53:34", "num_failures": 3},
            {"state": "failed", "attempts": 3, "failures": 3, "reason": "failed 3 times", "finished": SECOND + 3},
        ),
        ("failed", {"started": "2024-04-19 18:53:32", "num_failures": 1}, {"reason": "failed once", "finished": None}),
        ("pending", {"heartbeat": "soon", "started": "x"}, {"heard": None}),
    ],
)
def test_a_job_of_the_api_is_shown_as_any_other(status: str, fields: dict[str, Any], shown: dict[str, Any]) -> None:
    record = record_of(row(status, **fields))
    assert (record.created, record.result, record.interruptions, record.webhook) == (SECOND, None, 0, "")
    assert {name: getattr(record, name) for name in shown} == shown


def test_times_are_utc_wherever_we_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        record = record_of(row("running", heartbeat="2024-04-19 18:53:33"))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert (record.created, record.heard) == (SECOND, SECOND + 2)


# Which desk.

API = {"kelpie_url": "http://127.0.0.1:9"}


@pytest.mark.parametrize(
    "settings",
    [
        {"source": "kelpie", "kelpie_api_key": "k"},
        {"kelpie_api_key": "k"},
        {"source": "kelpie", "salad_api_key": "k", "salad_organization": "o", "salad_project": "p"},
        {"source": "kelpie", "machine_id": "m", "salad_project": "p"},
        {"source": "kelpie", "sqs_queue_url": "http://127.0.0.1:9/1/q", "kelpie_api_key": "k"},
    ],
)
def test_the_desk_is_kelpies_by_name_or_by_its_key(settings: dict[str, str]) -> None:
    desk = open_desk(Settings(**API, **settings))  # type: ignore[arg-type]
    assert isinstance(desk, KelpieDesk)
    assert desk.name == "Kelpie's API at http://127.0.0.1:9"
    desk.close()


def test_a_queue_of_sqs_goes_before_kelpies_key() -> None:
    desk = open_desk(Settings(kelpie_api_key="k", sqs_queue_url="http://127.0.0.1:9/123456789012/q", sqs_region=REGION,
                              sqs_access_key_id="a", sqs_secret_access_key="b"))  # fmt: skip
    assert desk.name.startswith("sqs:")
    desk.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "sqs or kelpie, or to local:FOLDER"),
        ({"source": "salad"}, "or kelpie for Kelpie's API"),
        ({"source": "kelpie"}, "set KELPIE_API_KEY; or SALAD_API_KEY with SALAD_ORGANIZATION_NAME"),
        ({"source": "kelpie", "container_group_id": "g"}, "set KELPIE_API_KEY; or SALAD_API_KEY"),
        ({"source": "kelpie", "machine_id": "m"}, "set SALAD_PROJECT_NAME"),
        ({"source": "kelpie", "salad_api_key": "secret"}, "set SALAD_PROJECT_NAME"),
        ({"source": "kelpie", "salad_api_key": "secret", "salad_project": "p"}, "set SALAD_ORGANIZATION_NAME"),
        ({"source": "kelpie", "kelpie_api_key": "secret", "kelpie_url": "nowhere"}, "KELPIE_API_URL (or --kelpie-url)"),
        ({"source": "kelpie:http://x", "kelpie_api_key": "secret"}, "takes no address ('http://x')"),
    ],
)
def test_what_the_desk_misses_is_named(settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        open_desk(Settings(**{**API, **settings}))  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "secret" not in str(caught.value)
