"""Job documents: what is one, and what is said of what is none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.job import InvalidJobError, Job, check_job_id, parse_document
from heeler.message import of_document

ENTRY = {"bucket": "bucket", "prefix": "a/", "local_path": "/data"}


def parse(**document: Any) -> Any:
    return parse_document(json.dumps(document).encode())


def fault(body: bytes | dict[str, Any]) -> InvalidJobError:
    with pytest.raises(InvalidJobError) as caught:
        parse_document(body if isinstance(body, bytes) else json.dumps(body).encode())
    assert caught.value.field in str(caught.value)
    return caught.value


def test_the_smallest_document_has_the_documented_defaults() -> None:
    document = parse(command="true")
    assert (document.arguments, dict(document.environment), document.max_failures) == ((), {}, 3)
    assert document.id is None
    assert document.timeout is None
    assert document.sync.before == ()


def test_a_full_document_of_kelpies_is_taken() -> None:
    document = parse(
        id="job-1",
        command="python",
        arguments=["a.py", "--x=1", ""],
        environment={"A": "b", "_X9": ""},
        sync={
            "before": [{**ENTRY, "direction": "download"}],
            "during": [{**ENTRY, "direction": "upload", "pattern": r"\.pt$", "mode": "mirror"}],
            "after": [ENTRY],
        },
        timeout=3600,
        max_failures=5,
        heartbeat_interval=10,
        compression=False,
        webhook=None,
        result_key="",
    )
    assert document.arguments == ("a.py", "--x=1", "")
    assert document.sync.during[0].pattern == r"\.pt$"
    assert document.heartbeat_interval == 10


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"command": None}, "command"),
        ({"command": ""}, "command"),
        ({"command": 5}, "command"),
        ({"command": "a\0b"}, "command"),
        ({"command": "\ud800"}, "command"),
        ({"arguments": "a b"}, "arguments"),
        ({"arguments": ["a", 5]}, "arguments.1"),
        ({"arguments": ["\0"]}, "arguments.0"),
        ({"environment": ["A=b"]}, "environment"),
        ({"environment": {"A": 1}}, "environment.A"),
        ({"environment": {"A": "\0"}}, "environment.A"),
        ({"environment": {"A=B": "x"}}, "environment"),
        ({"environment": {"": "x"}}, "environment"),
        ({"id": "../x"}, "id"),
        ({"id": "a/b"}, "id"),
        ({"id": ""}, "id"),
        ({"id": 7}, "id"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": -1}, "timeout"),
        ({"timeout": "long"}, "timeout"),
        ({"max_failures": 0}, "max_failures"),
        ({"max_failures": 1.5}, "max_failures"),
        ({"heartbeat_interval": 0}, "heartbeat_interval"),
        ({"sync": []}, "sync"),
        ({"sync": {"before": ENTRY}}, "sync.before"),
        ({"sync": {"befor": []}}, "sync.befor"),
        ({"sync": {"before": [{"bucket": "bucket", "prefix": ""}]}}, "sync.before.0.local_path"),
        ({"sync": {"before": [{**ENTRY, "local_path": ""}]}}, "sync.before.0.local_path"),
        ({"sync": {"before": [{**ENTRY, "prefix": "a\0"}]}}, "sync.before.0.prefix"),
        ({"sync": {"during": [{**ENTRY, "pattern": "("}]}}, "sync.during.0.pattern"),
        ({"sync": {"during": [{**ENTRY, "paterm": "x"}]}}, "sync.during.0.paterm"),
        ({"sync": {"during": [{**ENTRY, "mode": "delta"}]}}, "sync.during.0.mode"),
        ({"comand": "x"}, "comand"),
        ({"arguments": ["a", "\ud800"]}, "arguments.1"),
        ({"environment": {"A": "\udfff"}}, "environment.A"),
        ({"environment": {"\ud800": "x"}}, "environment"),
        ({"\ud800": "x"}, "document"),
        ({"id": "\ud800"}, "id"),
        ({"sync": {"before": [{**ENTRY, "prefix": "\ud800/"}]}}, "sync.before.0.prefix"),
        ({"sync": {"during": [{**ENTRY, "pattern": "\ud800"}]}}, "sync.during.0.pattern"),
        ({"timeout": 10 * 366 * 86_400 + 1}, "timeout"),
        ({"timeout": 1e300}, "timeout"),
        ({"max_failures": 1001}, "max_failures"),
        ({"max_failures": 10**30}, "max_failures"),
        ({"heartbeat_interval": 0.09}, "heartbeat_interval"),
        ({"heartbeat_interval": 3601}, "heartbeat_interval"),
        ({"sync": {"before": [{**ENTRY, "bucket": "UP_CASE!"}]}}, "sync.before.0.bucket"),
        ({"sync": {"before": [{**ENTRY, "bucket": "a/b"}]}}, "sync.before.0.bucket"),
        ({"sync": {"before": [{**ENTRY, "bucket": ""}]}}, "sync.before.0.bucket"),
        ({"sync": {"before": [{**ENTRY, "prefix": "a/../b"}]}}, "sync.before.0.prefix"),
        ({"sync": {"after": [{**ENTRY, "local_path": "../b"}]}}, "sync.after.0.local_path"),
        ({"sync": {"during": [{**ENTRY, "pattern": "(a+)+$"}]}}, "sync.during.0.pattern"),
        ({"sync": {"during": [{**ENTRY, "pattern": "x" * 201}]}}, "sync.during.0.pattern"),
    ],
)
def test_a_fault_names_its_field(change: dict[str, Any], field: str) -> None:
    assert fault({"command": "true", **change}).field == field


@pytest.mark.parametrize(("part", "direction"), [("before", "upload"), ("during", "download"), ("after", "download")])
def test_a_wrong_direction_is_refused_with_the_right_one(part: str, direction: str) -> None:
    error = fault({"command": "true", "sync": {part: [{**ENTRY, "direction": direction}]}})
    assert f"{part}.0.direction" in str(error)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"null", b"[]", b'"x"', b"5", b"\xff\xfe\xfa", b"\x80", b"{} {}", b'{"command": "x"', b"NaN"]
)
def test_what_is_no_json_object_is_refused_as_a_whole(body: bytes) -> None:
    assert fault(body).field == "document"


@pytest.mark.parametrize(
    "body", [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 100_000, b'{"command":"x","a":' + b"[" * 9999]
)
def test_a_document_made_to_break_the_parser_is_refused_like_any_other(body: bytes) -> None:
    assert fault(body).field == "document"


@pytest.mark.parametrize("name", ["timeout", "heartbeat_interval"])
def test_times_are_finite(name: str) -> None:
    for value in ("Infinity", "NaN", "1e999"):
        assert fault(f'{{"command": "true", "{name}": {value}}}'.encode()).field == name


@pytest.mark.parametrize(("value", "expected"), [(True, True), (1, True), (False, False), (0, False), (None, False)])
def test_compression_is_on_or_off_as_kelpie_writes_it(value: object, expected: bool) -> None:
    assert parse(command="true", compression=value).compression is expected
    assert of_document(Job("x", json.dumps({"command": "true", "compression": value}).encode())).gzip is expected


@pytest.mark.parametrize("value", ["gzip", 2, [], {}])
def test_compression_is_nothing_else(value: object) -> None:
    assert fault({"command": "true", "compression": value}).field == "compression"


@pytest.mark.parametrize(
    "url",
    [
        "ftp://x/",
        "x",
        "http://",
        "http://user:secret@x/",
        "http://x y/",
        "http://x:0/",
        "http://[::1",
        "http://\u00e9/",
    ],
)
def test_a_webhook_is_an_url_without_a_user(url: str) -> None:
    error = fault({"command": "true", "webhook": url})
    assert error.field == "webhook"
    assert "secret" not in error.reason.replace("HEELER_WEBHOOK_SECRET", "")
    assert parse(command="true", webhook="https://example.com:8443/done?x=1").webhook is not None


@pytest.mark.parametrize("key", ["../x", "a/../b", "a\0b", "/x", "x" * 901])
def test_a_result_key_stays_below_its_prefix(key: str) -> None:
    assert fault({"command": "true", "result_key": key}).field == "result_key"


@pytest.mark.parametrize("index", [-1, 1.5, "1", True])
def test_an_index_is_a_whole_number_from_zero(index: object) -> None:
    assert fault({"command": "true", "index": index}).field == "index"
    assert parse(command="true", index=0).index == 0


def test_a_ready_file_belongs_to_a_snapshot() -> None:
    assert "mode 'snapshot'" in fault({"command": "true", "sync": {"during": [{**ENTRY, "ready": "*/done"}]}}).reason
    snapshot = {**ENTRY, "mode": "snapshot", "ready": "*/done"}
    assert parse(command="true", sync={"during": [snapshot]}).sync.during[0].ready == "*/done"


def test_a_snapshot_that_keeps_what_goes_is_refused_by_name() -> None:
    for part in ("before", "during"):
        refusal = fault({"command": "true", "sync": {part: [{**ENTRY, "mode": "snapshot", "deletes": False}]}})
        assert refusal.field == f"sync.{part}.0"
        assert refusal.reason.startswith("deletes false")
    parse(command="true", sync={"during": [{**ENTRY, "mode": "snapshot", "deletes": True}]})
    parse(command="true", sync={"during": [{**ENTRY, "deletes": False}]})


def test_a_job_in_a_log_or_a_traceback_does_not_show_its_body() -> None:
    assert repr(Job("j", b'{"environment": {"TOKEN": "hush"}}', index=3)) == (
        "Job(id='j', target=None, headers={}, index=3)"
    )


@pytest.mark.parametrize("value", [False, None])
def test_what_needs_a_record_may_be_said_to_be_off(value: object) -> None:
    parse(command="true", webhook=value, result_key=value)


@pytest.mark.parametrize("value", ["a", "A9._:@=+-x", "x" * 200, "0"])
def test_ids_that_can_stand_in_keys_and_paths_are_taken(value: str) -> None:
    assert check_job_id(value) == value


@given(st.text(max_size=250))
def test_an_id_that_was_taken_is_one_safe_name(value: str) -> None:
    try:
        check_job_id(value)
    except ValueError:
        return
    assert 1 <= len(value) <= 200
    assert not set(value) & set("/\\\0\n ")
    assert ".." not in value
    assert not value.startswith((".", "-"))


def taken_or_named(body: bytes) -> bool:
    """Whether it is a document, or refused with a field and a reason."""
    try:
        Job("x", body).document()
    except InvalidJobError as error:
        return bool(error.field and error.reason)
    return True


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_a_named_fault(body: bytes) -> None:
    assert taken_or_named(body)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    ["id", "command", "arguments", "environment", "sync", "timeout", "max_failures", "compression"]
)


@given(st.dictionaries(FIELDS, JSON_VALUES, max_size=4))
def test_any_values_are_a_document_or_a_named_fault(document: dict[str, Any]) -> None:
    assert taken_or_named(json.dumps({"command": "x", **document}).encode())


@pytest.mark.parametrize(
    "document",
    [
        {"timeout": 10 * 366 * 86_400, "max_failures": 1000, "heartbeat_interval": 3600},
        {"heartbeat_interval": 0.1, "arguments": ["\U0001f600", "\uffff"]},
        {"sync": {"before": [{**ENTRY, "prefix": "a..b/{job_id}/", "local_path": "..a/b.."}]}},
    ],
)
def test_what_is_just_inside_the_limits_is_taken(document: dict[str, Any]) -> None:
    parse(command="true", **document)
