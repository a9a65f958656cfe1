"""A job as Kelpie's API tells it, and the job document in it. No I/O here."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from heeler.job import InvalidJobError, Job, JobDocument, check_job_id
from heeler.settings import Settings
from heeler.sources.base import SourceUnavailableError

DOCUMENT_VARIABLE = "HEELER_DOCUMENT"
"""In a job's environment: JSON of the fields of a job document that Kelpie's API does not keep."""
_SAME = ("command", "arguments", "environment", "compression")
"""`max_failures` and `heartbeat_interval` are between us and the API, which has no bounds for them."""
_OWN = {"sync", "timeout", "run_id", "index"}
_DEFAULT_INTERVAL = 30.0
_PARTS = ("before", "during", "after")


@dataclass(frozen=True)
class Row:
    """A job as the API tells it.

    Attributes:
        id: The job.
        status: pending, running, completed, canceled or failed.
        machine_id: Who has it, or had it last.
        started: When it was last handed out, as the API writes times; another time is another holder.
        failures: How often it failed.
        interval: Seconds between two heartbeats; after twice as many it is handed out again.
        data: All of it.
    """

    id: str
    status: str
    machine_id: str | None
    started: str | None
    failures: int
    interval: float
    data: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(cls, data: Any) -> Row:
        """The job in an answer.

        Raises:
            SourceUnavailableError: It is none.
        """
        try:
            job_id, interval = data["id"], data.get("heartbeat_interval") or _DEFAULT_INTERVAL
            return cls(
                check_job_id(job_id),
                str(data["status"]),
                _text(data.get("machine_id")),
                _text(data.get("started")),
                int(data.get("num_failures") or 0),
                max(0.1, float(interval)),
                data,
            )
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):
            raise SourceUnavailableError("Kelpie's API told of a job that is none") from None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


@dataclass(frozen=True)
class UnusableJob(Job):
    """A job whose document can't even be put together."""

    fault: InvalidJobError = field(default_factory=lambda: InvalidJobError("document", "is none"))

    def document(self) -> JobDocument:
        """Raises `InvalidJobError`."""
        raise self.fault


def job_of(row: Row, settings: Settings) -> Job:
    """The job for the program: its body is a job document, which may turn out to be none."""
    try:
        return Job(row.id, json.dumps(document_of(row, settings)).encode())
    except RecursionError:
        return UnusableJob(row.id, b"", fault=InvalidJobError("document", "is nested too deeply"))
    except InvalidJobError as error:
        return UnusableJob(row.id, json.dumps(dict(row.data)).encode(), fault=error)


def document_of(row: Row, settings: Settings) -> dict[str, Any]:
    """The job document: Kelpie's fields, the older six as `sync`, and what `HEELER_DOCUMENT` adds.

    Raises:
        InvalidJobError: `HEELER_DOCUMENT` holds no fields of a job document.
    """
    document = {name: row.data[name] for name in _SAME if row.data.get(name) is not None}
    sync = row.data.get("sync")
    document["sync"] = _without_nulls(sync) if isinstance(sync, dict) else sync or _older(row.data, settings)
    environment = document.get("environment")
    if isinstance(environment, dict) and DOCUMENT_VARIABLE in environment:
        document["environment"] = {name: value for name, value in environment.items() if name != DOCUMENT_VARIABLE}
        document |= _added(environment[DOCUMENT_VARIABLE])
    if settings.kelpie_snapshots and isinstance(document["sync"], dict):
        document["sync"] = _with_snapshots(document["sync"])
    return {"id": row.id, **document}


def _added(text: object) -> dict[str, Any]:
    where = f"environment.{DOCUMENT_VARIABLE}"
    try:
        found = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidJobError(where, "is no JSON object")
    for name in found:
        if name not in _OWN:
            raise InvalidJobError(f"{where}.{name}", f"can't be set there; only {', '.join(sorted(_OWN))} can")
    return found


def _without_nulls(sync: Mapping[str, Any]) -> dict[str, Any]:
    """What a client filled in for what was left out."""

    def told(entry: Any) -> Any:
        return {name: value for name, value in entry.items() if value is not None} if isinstance(entry, dict) else entry

    return {
        part: [told(entry) for entry in entries] if isinstance(entries, list) else entries
        for part, entries in sync.items()
        if entries is not None
    }


def _older(data: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """The six fields from before `sync`: inputs and checkpoint come down; checkpoint and outputs go up."""

    def entry(name: str, folder: str, **more: Any) -> list[dict[str, Any]]:
        bucket, prefix = data.get(f"{name}_bucket"), data.get(f"{name}_prefix")
        if not bucket or not prefix:
            return []
        return [{"bucket": bucket, "prefix": prefix, "local_path": folder, **more}]

    checkpoints = entry("checkpoint", settings.checkpoint_dir)
    outputs = entry("output", settings.output_dir)
    # Kelpie uploads new outputs while the program runs, and deletes none of them.
    early = entry("output", settings.output_dir, deletes=False)
    if checkpoints and _folder(settings.checkpoint_dir) == _folder(settings.output_dir):
        early = []
    return {
        "before": [*entry("input", settings.input_dir), *checkpoints],
        "during": [*checkpoints, *early],
        "after": outputs,
    }


def _with_snapshots(sync: Mapping[str, Any]) -> dict[str, Any]:
    """Folders that are restored and kept, whole and alone in their place, become snapshots."""
    parts = {part: sync.get(part) or [] for part in _PARTS}
    if not all(isinstance(entries, list) for entries in parts.values()):
        return dict(sync)
    if not all(isinstance(entry, dict) for entries in parts.values() for entry in entries):
        return dict(sync)
    places = {part: [_Place.of(entry) for entry in entries] for part, entries in parts.items()}

    def is_alone(place: _Place, part: str) -> bool:
        """Whether no other entry of a part uses the folder, or what is below the prefix."""
        return [place] == [other for other in places[part] if other.touches(place)]

    chosen = {
        place
        for place in places["during"]
        if is_alone(place, "during")
        and is_alone(place, "before")
        and not any(other.shares_keys(place) for other in places["after"])
    }
    for part in ("before", "during"):
        for entry, place in zip(parts[part], places[part], strict=True):
            if entry.get("pattern") or "mode" in entry or "deletes" in entry:
                chosen.discard(place)
    kept = {
        part: [
            {**entry, "mode": "snapshot"} if place in chosen else entry
            for entry, place in zip(parts[part], places[part], strict=True)
        ]
        for part in ("before", "during")
    }
    return {**sync, **kept}


@dataclass(frozen=True)
class _Place:
    """Where an entry's files are: the keys below a prefix, and a folder."""

    bucket: str
    prefix: str
    folder: str

    @classmethod
    def of(cls, entry: Mapping[str, Any]) -> _Place:
        return cls(str(entry.get("bucket")), _folder(str(entry.get("prefix"))), _folder(str(entry.get("local_path"))))

    def shares_keys(self, other: _Place) -> bool:
        return self.bucket == other.bucket and _overlap(self.prefix, other.prefix)

    def touches(self, other: _Place) -> bool:
        return self.shares_keys(other) or _overlap(self.folder, other.folder)


def _folder(path: str) -> str:
    """The same for every way to write it, with one slash at its end."""
    return posixpath.normpath("/" + path.lstrip("/")).rstrip("/") + "/"


def _overlap(one: str, other: str) -> bool:
    return one.startswith(other) or other.startswith(one)
