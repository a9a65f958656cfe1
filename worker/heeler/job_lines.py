"""A job in lines that a person reads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from heeler.job import Result
from heeler.sources.base import JobRecord

_BODY_SHOWN = 200
_DATES = {"created", "finished", "heard"}
_IF_ANY = {"expires", "history", "webhook", "result_key", "heard"}
"""What a queue may not have."""


def readable(record: JobRecord, now: float) -> Iterable[tuple[str, str]]:
    """Names and values, a line each; `now` is in seconds since 1970."""
    for name, value in asdict(record).items():
        if name in _IF_ANY and not value:
            continue
        if name == "history":
            yield from _history(record)
        elif name == "expires":
            yield from _expires(record, now)
        elif name == "result":
            yield name, _result_words(value or {})
        else:
            yield name, _date(value) if name in _DATES else str(value)


def _date(seconds: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else ""


def _expires(record: JobRecord, now: float) -> Iterable[tuple[str, str]]:
    if record.expires is None or record.finished is not None:
        return
    if record.expires < now:
        words = "the queue has dropped its message then: submit it again"
    else:
        words = "the queue drops its message then, whoever works on it"
    yield "expires", f"{_date(record.expires)} ({words})"


def _history(record: JobRecord) -> Iterable[tuple[str, str]]:
    yield "history", "attempt, worker, start, seconds, outcome, reason"
    for entry in record.history:
        running = record.state == "running" and entry["attempt"] == record.attempts
        outcome = entry["outcome"] or ("running" if running else "no end was told")
        seconds = "-" if entry["ended"] is None else f"{entry['ended'] - entry['started']:.1f}"
        parts = (str(entry["attempt"]), entry["worker"], _date(entry["started"]), seconds, outcome, entry["reason"])
        yield "", "  ".join(" ".join(part.split()) for part in parts if part)


def _result_words(result: Mapping[str, Any]) -> str:
    """A result in one line; of an app's answer its beginning, if it is text."""
    shown = {name: part for name, part in result.items() if part is not None}
    if "body" in shown:
        body = Result.from_json(result).body
        text = body[:_BODY_SHOWN].decode("utf-8", "replace")
        whole = text.isprintable() and len(body) <= _BODY_SHOWN
        shown["body"] = text if whole else f"{len(body)} bytes (--json has them, in base64)"
    return " ".join(f"{name}={part}" for name, part in shown.items())
