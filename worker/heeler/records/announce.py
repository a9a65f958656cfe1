"""Tells by webhook that a job has ended: at least once, with the queue's message as what remembers it."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from heeler.job import JobDocument
from heeler.records.record import DamagedRecordError, Record
from heeler.records.store import RecordStore
from heeler.sources.base import SourceUnavailableError
from heeler.webhook import Event, WebhookError, Webhooks, message_id
from heeler_sync.errors import StoreError

_GIVE_UP_SECONDS = 86_400.0
_BRIEF_SECONDS = 300.0
_DELAYS = (10.0, 900.0)
"""Between two tries: as long as the job has ended, within these."""
_TOLD = ("id", "run_id", "state", "attempts", "failures", "interruptions", "reason", "worker", "created", "finished")
_BODY_BYTES = 64 << 10
"""An answer up to this size goes with the webhook."""


class Announcer:
    """Sends webhooks of jobs with records."""

    def __init__(
        self, webhooks: Webhooks, default_url: str | None, wall: Callable[[], float], on_fault: Callable[..., None]
    ) -> None:
        """Args: who signs and sends, where to for jobs that don't say, seconds since 1970, and who is told."""
        self._webhooks = webhooks
        self._default_url = default_url
        self._wall = wall
        self._on_fault = on_fault

    def url_of(self, document: JobDocument | None) -> str | None:
        """Where the end of a job is told."""
        named = document.webhook if document is not None else None
        return named or self._default_url

    async def announce(
        self, record: Record, url: str | None, records: RecordStore, *, last: bool, brief: bool
    ) -> float | None:
        """Send the webhook of a record that says "pending"; the seconds until it is to be tried again, if so.

        Args:
            record: Of a job that has ended.
            url: Where to.
            records: Where the record and the result are.
            last: Whether its message will not come again.
            brief: Whether others wait for its message.

        Raises:
            SourceUnavailableError: The result or the record is out of reach.
        """
        try:
            said = await self._send(record, url, records)
        except WebhookError as error:
            age = self._wall() - (record.finished or 0.0)
            if not error.final and not last and age < (_BRIEF_SECONDS if brief else _GIVE_UP_SECONDS):
                self._on_fault("webhook_retried", job=record.id, error=str(error))
                return max(error.delay, min(_DELAYS[1], max(_DELAYS[0], age)))
            self._on_fault("webhook_failed", job=record.id, error=str(error))
            said = f"given up: {error}"
        try:
            await records.update(record.id, lambda found: _with_webhook(found, record, said))
        except (StoreError, DamagedRecordError) as error:
            raise SourceUnavailableError(f"the job's record can't be written: {error}") from None
        return None

    async def _send(self, record: Record, url: str | None, records: RecordStore) -> str:
        if url is None:
            return ""
        try:
            data = await _data(record, records)
        except StoreError as error:
            raise SourceUnavailableError(f"the result can't be read: {error}") from None
        finished = record.finished or self._wall()
        await self._webhooks.send(
            url,
            Event(
                message_id(record.id, record.run_id, record.state, str(record.attempts)),
                f"job.{record.state}",
                finished,
                data,
            ),
        )
        return "sent"


def _with_webhook(found: Record, ended: Record, said: str) -> Record | None:
    same = (found.run_id, found.state, found.finished) == (ended.run_id, ended.state, ended.finished)
    return replace(found, webhook=said) if same else None


async def _data(record: Record, records: RecordStore) -> dict[str, Any]:
    result = dict(record.result or {})
    size = result.get("bytes")
    if record.result_key and isinstance(size, int) and size <= _BODY_BYTES:
        body = await records.result(record.result_key)
        if body is not None:
            result["body"] = base64.b64encode(body).decode("ascii")
    data = {name: getattr(record, name) for name in _TOLD}
    return {**data, "result": result or None, "result_key": record.result_key or None}
