"""Tells a job's webhook that it has ended, signed the Standard Webhooks way (PROTOCOLS.md 1).

Salad does not document the body; here it is the job as the public API shows it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import secrets
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence

import anyio
import anyio.to_thread

from heeler.local.queue_model import Job
from heeler.local.queue_resources import job_resource

DELAYS = (1.0, 5.0, 30.0, 120.0, 600.0)
"""Seconds before each further attempt."""
_TIMEOUT_SECONDS = 15.0


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
            timestamp = int(self._wall())
            headers = {
                "Content-Type": "application/json",
                "webhook-id": message_id,
                "webhook-timestamp": str(timestamp),
                "webhook-signature": sign(self.secret_key, message_id, timestamp, body),
            }
            request = urllib.request.Request(str(job.webhook), body, headers, method="POST")  # noqa: S310
            if await anyio.to_thread.run_sync(_post, request, abandon_on_cancel=True):
                return


def sign(secret_key: str, message_id: str, timestamp: int, body: bytes) -> str:
    """The header `webhook-signature` (https://www.standardwebhooks.com, symmetric signatures)."""
    signed = f"{message_id}.{timestamp}.".encode() + body
    digest = hmac.new(base64.b64decode(secret_key), signed, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: object, **_fields: object) -> None:
        return None


def _post(request: urllib.request.Request) -> bool:
    """Whether the answer was 2xx."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS):
            return True
    except (urllib.error.URLError, OSError, ValueError):
        return False
