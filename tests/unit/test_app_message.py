"""What a message for an app says of its job's folders, and what it does not."""

from __future__ import annotations

import json

import pytest

from heeler.job import InvalidJobError, Job, SyncSpec
from heeler.message import of_app_message, of_document

ENTRY = {"bucket": "b-1", "prefix": "p/{job_id}/", "local_path": "/data/{job_id}"}


def read(body: bytes, job_id: str = "j") -> SyncSpec:
    return of_app_message(Job(job_id, body)).sync


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"text",
        bytes(range(256)),
        b'"sync"',
        b'["sync", {"before": []}]',
        b'{"prompt": "a cat"}',
        b'{"sync": true}',
        b'{"sync": null}',
        b'{"sync": "before"}',
        b'{"sync": ["before"]}',
        b'{"sync": {}}',
        b'{"sync": {"mode": "fast"}}',
        b'{"inner": {"sync": {"before": [1]}}}',
        b'{"sync": {"before": [}',
        b'\xff{"sync": {"before": [1]}}',
        b'{"sync": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"sync": ' + b"9" * 10_000 + b"}",
    ],
)
def test_what_is_not_ours_is_left_to_the_app(body: bytes) -> None:
    assert read(body) == SyncSpec()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_sync_in_a_json_object_is_honoured(encoding: str) -> None:
    message = {"prompt": "a cat", "sync": {"before": [ENTRY], "after": [ENTRY]}}
    found = read(json.dumps(message).encode(encoding))
    assert [entry.local_path for entry in found.before] == ["/data/{job_id}"]
    assert len(found.after) == 1
    assert found.during == ()


@pytest.mark.parametrize(
    ("sync", "field"),
    [
        ({"before": 1}, "sync.before"),
        ({"before": [{}]}, "sync.before.0.bucket"),
        ({"before": [ENTRY], "odd": 1}, "sync.odd"),
        ({"after": [{**ENTRY, "prefix": "../x/"}]}, "sync.after.0.prefix"),
        ({"after": [{**ENTRY, "local_path": "\ud800"}]}, "sync.after.0.local_path"),
        ({"after": [{**ENTRY, "local_path": "a\0"}]}, "sync.after.0.local_path"),
        ({"during": [{**ENTRY, "pattern": "("}]}, "sync.during.0.pattern"),
        ({"before": [{**ENTRY, "direction": "upload"}]}, "sync"),
    ],
)
def test_one_that_is_meant_for_us_and_wrong_names_the_field(sync: object, field: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        read(json.dumps({"sync": sync}).encode())
    assert caught.value.field == field


@pytest.mark.parametrize("job_id", ["", "../x", "a/b", "a\r\nb", "ü", "x" * 201])
def test_an_id_that_can_not_stand_in_keys_is_refused(job_id: str) -> None:
    with pytest.raises(InvalidJobError) as caught:
        read(b"{}", job_id)
    assert caught.value.field == "id"


def test_a_job_document_is_read_as_one() -> None:
    body = json.dumps({"command": "x", "run_id": "r", "sync": {"after": [ENTRY]}}).encode()
    assert of_document(Job("j", body)).run_id == "r"
    assert of_document(Job("j", body)).sync == read(body)
    with pytest.raises(InvalidJobError):
        of_document(Job("j", b"text"))
