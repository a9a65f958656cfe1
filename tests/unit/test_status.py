"""What people see of a runtime: without secrets, and in any encoding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from heeler.job import Ending, Outcome
from heeler.status import Status


def mask(text: str) -> str:
    return text.replace("s3cr3t", "********")


@pytest.fixture
def logged() -> list[dict[str, object]]:
    return []


@pytest.fixture
def status(logged: list[dict[str, object]]) -> Status:
    return Status(lambda _level, _event, fields: logged.append(fields), worker="w", source="s", mask=mask)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("key s3cr3t", "key ********"),
        ("half \ud800", "half \\ud800"),
        (b"name \xff".decode("utf-8", "surrogateescape"), "name \\udcff"),
        (["s3cr3t", {"s3cr3t": ("s3cr3t", 1)}], ["********", {"********": ["********", 1]}]),
        (Path("/s3cr3t"), "/********"),
        (float("nan"), "nan"),
        (7, 7),
        (None, None),
        (True, True),
        (1.5, 1.5),
    ],
)
def test_what_is_shown_has_no_secret_and_is_json_in_any_encoding(
    status: Status, logged: list[dict[str, object]], value: Any, shown: object
) -> None:
    status.fault("fault", error=value)
    status.event("event", error=value)
    (kept,) = status.snapshot()["faults"]
    assert kept["error"] == logged[0]["error"] == logged[1]["error"] == shown
    json.dumps(status.snapshot(), ensure_ascii=False, allow_nan=False).encode("utf-8")


def test_reasons_and_ids_are_cleaned_too(status: Status) -> None:
    status.take("job-\ud800", 1)
    status.settled(Ending(Outcome.FAIL, "refused: s3cr3t \udfff"), told=True)
    assert status.clean("s3cr3t") == "********"
    text = json.dumps(status.snapshot(), ensure_ascii=False)
    assert "s3cr3t" not in text
    text.encode("utf-8")
    assert status.snapshot()["outcomes"] == {"fail": 1}
