"""A job document as it is submitted to Kelpie's API (PROTOCOLS 3). No I/O here.

The API drops what it does not know without a word, so that is carried in a variable which our worker reads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from heeler.errors import UsageError
from heeler.job import (
    InvalidJobError,
    JobDocument,
    SyncEntry,
    SyncSpec,
    first_fault,
    parse_document,
    refuse_half_characters,
)
from heeler.sources.kelpie_job import DOCUMENT_VARIABLE

_GROUP = "container_group_id"
_FOLDERS = ("input", "checkpoint", "output")
_OLDER = tuple(f"{folder}_{field}" for folder in _FOLDERS for field in ("bucket", "prefix"))
_COUNTS = ("max_failures", "heartbeat_interval")
"""Between the API and its workers: it has other bounds for them than a job document."""
_LARGEST = (1 << 53) - 1
_SAME = ("command", "arguments", "environment", "webhook", "compression")
_PARTS = {"before": "download", "during": "upload", "after": "upload"}
_DROPPED = {"mode", "ready", "deletes"}
"""Fields of a sync entry that the API drops."""


def submission_of(body: bytes, group: str | None) -> dict[str, Any]:
    """What the API is to be sent for a job document, which may have Kelpie's older fields and a container group.

    Args:
        body: The document.
        group: The container group of documents that name none.

    Raises:
        InvalidJobError: It is no job document, or asks for what the API has not; the field is named.
        UsageError: Nobody says which container group is to run it.
    """
    document, own = _read(body)
    _refuse_what_is_missing(document)
    texts = _texts(own)
    older = _checked_older(texts)
    given = document.model_dump(mode="json", include={*_SAME}, exclude_unset=True, exclude_none=True)
    if "sync" in document.model_fields_set:
        if older:
            raise InvalidJobError(next(iter(older)), "has no effect beside sync: leave one of them out")
        given["sync"] = _sync(document.sync)
    if kept := _kept(document):
        given["environment"] = {**document.environment, DOCUMENT_VARIABLE: json.dumps(kept)}
    return {**given, **_counts(own), **older, _GROUP: _group(texts, group)}


def _read(body: bytes) -> tuple[JobDocument, dict[str, Any]]:
    """The job document, and beside it the fields that only Kelpie has, or has in its own way."""
    try:
        data = json.loads(body)
        own = {name: data.pop(name) for name in (*_OLDER, _GROUP, *_COUNTS) if name in data}
        rest = json.dumps(data).encode()
    except (ValueError, RecursionError, AttributeError, TypeError):
        return parse_document(body), {}  # which says what is wrong
    return parse_document(rest), own


def _texts(own: Mapping[str, Any]) -> dict[str, str]:
    """Those of Kelpie's texts that say something."""
    found = {name: own[name] for name in (*_OLDER, _GROUP) if own.get(name) not in (None, False, "")}
    for name, value in found.items():
        if not isinstance(value, str):
            raise InvalidJobError(name, "must be a text")
        refuse_half_characters(value, (name,))
    return found


def _counts(own: Mapping[str, Any]) -> dict[str, int]:
    found = {name: own[name] for name in _COUNTS if own.get(name) is not None}
    for name, value in found.items():
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        if isinstance(value, bool) or not whole or not 1 <= value <= _LARGEST:
            raise InvalidJobError(name, "must be a whole number, 1 or more, for Kelpie's API")
    return {name: int(value) for name, value in found.items()}


def _refuse_what_is_missing(document: JobDocument) -> None:
    if document.id is not None and document.index is None:  # of an array they are made up
        raise InvalidJobError("id", "can't be chosen, for Kelpie's API makes the ids: leave it out")
    if document.result_key is not None:
        raise InvalidJobError("result_key", "Kelpie's API keeps no results: leave it out")
    if DOCUMENT_VARIABLE in document.environment:
        raise InvalidJobError(
            f"environment.{DOCUMENT_VARIABLE}", "is made from the document's own fields: write them there"
        )


def _checked_older(texts: Mapping[str, str]) -> dict[str, str]:
    """Those of the six fields from before `sync` that say something, as our worker will want them."""
    for folder in _FOLDERS:
        pair = {field: texts[f"{folder}_{field}"] for field in ("bucket", "prefix") if f"{folder}_{field}" in texts}
        try:
            if pair:
                SyncEntry.model_validate({**pair, "local_path": folder})
        except ValidationError as error:
            fault = first_fault(error)
            raise InvalidJobError(f"{folder}_{fault.field}", fault.reason) from None
    return {name: texts[name] for name in _OLDER if name in texts}


def _group(texts: Mapping[str, str], group: str | None) -> str:
    found = texts.get(_GROUP) or group
    if found is None:
        raise UsageError(
            "Kelpie's API wants to know which container group is to run a job: set SALAD_CONTAINER_GROUP_ID"
            " (or --container-group-id), or name it in the document's field container_group_id"
        )
    return found


def _sync(spec: SyncSpec) -> dict[str, Any]:
    """A `sync` as the API keeps it."""
    wanted = {"bucket", "prefix", "local_path", "pattern"}
    return {
        part: [
            {**entry.model_dump(include=wanted, exclude_none=True), "direction": direction}
            for entry in getattr(spec, part)
        ]
        for part, direction in _PARTS.items()
        if part in spec.model_fields_set
    }


def _kept(document: JobDocument) -> dict[str, Any]:
    """What the API would drop; a `sync` is told as a whole."""
    found: dict[str, Any] = {}
    sync = document.sync.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if any(_DROPPED & entry.keys() for entries in sync.values() for entry in entries):
        found["sync"] = sync
    told = {"timeout": document.timeout, "run_id": document.run_id or None, "index": document.index}
    return found | {name: value for name, value in told.items() if value is not None}
