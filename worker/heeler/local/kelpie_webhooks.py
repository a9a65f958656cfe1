"""The webhooks of Kelpie's jobs (PROTOCOLS.md 3): sent once, whatever comes of it."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass

import anyio

from heeler.local.kelpie_model import Status, Worker
from heeler.local.kelpie_rows import Job
from heeler.webhook import TRY_SECONDS, WebhookError, post

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Note:
    url: str
    body: bytes
    kelpie_key: str


class KelpieWebhooks:
    """Sends while `run` runs; what is told before waits for it."""

    def __init__(self) -> None:
        self._notes: asyncio.Queue[_Note] = asyncio.Queue()

    def tell(self, job: Job, status: Status, worker: Worker, kelpie_key: str) -> None:
        """Send word of a job's status to its webhook, if it has one; in the event loop's thread.

        Args:
            job: The job.
            status: What it has become.
            worker: Who said so.
            kelpie_key: The key that was used to say so, or nothing.
        """
        if job["webhook"]:
            told = {"status": status, "job_id": job["id"], **worker.model_dump()}
            self._notes.put_nowait(_Note(job["webhook"], json.dumps(told).encode(), kelpie_key))

    async def run(self) -> None:
        """Send, until cancelled."""
        async with anyio.create_task_group() as group:
            while True:
                group.start_soon(_send, await self._notes.get())


async def _send(note: _Note) -> None:
    headers = {"Content-Type": "application/json", "X-Kelpie-Key": note.kelpie_key}
    try:
        await post(note.url, headers, note.body, timeout=TRY_SECONDS, proxied=False)
    except WebhookError as error:
        _LOG.warning("a webhook of a Kelpie job was not told: %s", error)
