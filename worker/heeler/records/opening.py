"""Finds the records that settings name."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from heeler.errors import UsageError
from heeler.records.announce import Announcer
from heeler.records.lease import Context
from heeler.records.source import RecordedSource
from heeler.records.store import RecordStore
from heeler.settings import Settings
from heeler.sources.base import Source
from heeler.sources.facts import RecordableSource
from heeler.webhook import Webhooks
from heeler_sync.errors import BadLocationError
from heeler_sync.paths import parse_location
from heeler_sync.store.base import ObjectStore


def open_records(settings: Settings, queue: str, open_store: Callable[[str], ObjectStore]) -> RecordStore | None:
    """The records of a queue; None if no bucket is named for them.

    Raises:
        UsageError: What is named is no place in a bucket.
    """
    if settings.records is None:
        return None
    try:
        place = parse_location(settings.records)
    except BadLocationError as error:
        raise UsageError(f"HEELER_RECORDS (or R2_BUCKET_NAME): {error}") from None
    return RecordStore(partial(open_store, place.bucket), f"{place.prefix}{queue}/")


def with_records(
    source: Source,
    settings: Settings,
    open_store: Callable[[str], ObjectStore],
    worker: str,
    on_fault: Callable[..., None],
    on_event: Callable[..., None],
    *,
    documents: bool,
) -> Source:
    """The source with a record of each job, where it keeps none itself and a bucket is named.

    Raises:
        UsageError: A webhook is asked for that nobody would remember, or a setting is wrong.
    """
    records = open_records(settings, source.queue, open_store) if isinstance(source, RecordableSource) else None
    if records is None or not isinstance(source, RecordableSource):
        if settings.webhook is not None:
            raise UsageError("--webhook needs records of jobs: use the source sqs, and set HEELER_RECORDS")
        return source
    announcer = Announcer(Webhooks(settings.webhook_secret), settings.webhook, time.time, on_fault)
    return RecordedSource(
        source, Context(records, announcer, time.time, on_fault, on_event), worker, documents=documents
    )
