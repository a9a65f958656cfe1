"""Tells a job's webhook that it has ended, signed the Standard Webhooks way (PROTOCOLS.md 1).

Salad does not document the body; here it is the job as the public API shows it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress

import anyio

from heeler.local.queue_model import Job
from heeler.local.queue_resources import job_resource
from heeler.webhook import TRY_SECONDS, WebhookError, post, signed

DELAYS = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Seconds before each further attempt."""


class Webhooks:
    """Delivers while `run` runs; whatever ends meanwhile waits for it."""

    def __init__(self, *, delays: Sequence[float] = DELAYS, wall: Callable[[], float] = time.time) -> None:
        """Args: seconds before each further attempt; the clock of the timestamps."""
        self.secret_key = ""
        self._delays = delays
        self._wall = wall
        self._ended: asyncio.Queue[Job] = asyncio.Queue()
        self.new_secret_key()

    def new_secret_key(self) -> None:
        """Sign with another key from now on (base64 of 32 bytes)."""
        self.secret_key = base64.b64encode(secrets.token_bytes(32)).decode()

    def tell(self, _event: str, job: Job) -> None:
        """Note that something happened to a job: a listener of `QueueState`."""
        if job.webhook is not None and job.status.final:
            self._ended.put_nowait(job)

    async def run(self) -> None:
        """Deliver, until cancelled."""
        async with anyio.create_task_group() as group:
            while True:
                group.start_soon(self._deliver, await self._ended.get())

    async def _deliver(self, job: Job) -> None:
        message_id = f"msg_{uuid.uuid4().hex}"
        body = json.dumps(job_resource(job)).encode()
        for delay in (0.0, *self._delays):
            await anyio.sleep(delay)
            key = base64.b64decode(self.secret_key)
            headers = {"Content-Type": "application/json", **signed(key, message_id, int(self._wall()), body)}
            with suppress(WebhookError):
                await post(str(job.webhook), headers, body, timeout=TRY_SECONDS, proxied=False)
                return
