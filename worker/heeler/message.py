"""What a message says of its job's folders: a whole job document, or the `sync` in an app's message (DESIGN 4)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

from pydantic import ValidationError

from heeler.job import InvalidJobError, Job, JobDocument, SyncSpec, check_job_id, first_fault, refuse_half_characters

_NOTHING = SyncSpec()
_PARTS = {"before", "during", "after"}


@dataclass(frozen=True)
class Wanted:
    """What a message says of its job's folders.

    Attributes:
        sync: Which it asks for.
        run_id: Which run of it this is.
        standard: Whether its program knows the folders of the settings, as Kelpie's do: named INPUT_DIR and so on
            whatever `sync` says, and empty where that does not fill them.
        gzip: Whether the objects of its folders are gzipped.
    """

    sync: SyncSpec
    run_id: str = ""
    standard: bool = False
    gzip: bool = False


def of_recorded_document(job: Job) -> Wanted:
    """What a job document says.

    Raises:
        InvalidJobError: The message is none.
    """
    document = job.document()
    return Wanted(document.sync, document.run_id, gzip=document.compression)


def of_document(job: Job) -> Wanted:
    """As `of_recorded_document`, where nobody keeps records of jobs.

    Raises:
        InvalidJobError: The message is no job document, or it asks for what needs a record.
    """
    refuse_what_needs_a_record(job.document())
    return of_recorded_document(job)


def of_kelpie_document(job: Job) -> Wanted:
    """As `of_document`, of one of Kelpie's jobs.

    Raises:
        InvalidJobError: As `of_document`.
    """
    return replace(of_document(job), standard=True)


def refuse_what_needs_a_record(document: JobDocument) -> None:
    """Raises `InvalidJobError` for what would be forgotten without one."""
    for name in ("webhook", "result_key"):
        if getattr(document, name) is not None:
            raise InvalidJobError(name, "needs records of jobs: use sqs with HEELER_RECORDS, or leave it out")


def of_app_message(job: Job) -> Wanted:
    """What a message for an app says: it may be anything, and only a JSON object's `sync` is ours to read.

    Raises:
        InvalidJobError: Its `sync` is meant for us and is wrong, or the id can't stand in keys and paths.
    """
    try:
        check_job_id(job.id)
    except ValueError as error:
        raise InvalidJobError("id", str(error)) from None
    found = _sync_in(job.body)
    if not isinstance(found, dict) or not _PARTS & found.keys():
        return Wanted(_NOTHING)  # the app's own word
    try:
        refuse_half_characters(found, ("sync",))
        return Wanted(SyncSpec.model_validate(found))
    except RecursionError:
        raise InvalidJobError("sync", "is nested too deeply") from None
    except ValidationError as error:
        fault = first_fault(error)
        where = "sync" if fault.field == "document" else f"sync.{fault.field}"
        raise InvalidJobError(where, fault.reason) from None


def _sync_in(body: bytes) -> object:
    if b'"sync"' not in body:
        return None
    try:
        message = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return message.get("sync") if isinstance(message, dict) else None
