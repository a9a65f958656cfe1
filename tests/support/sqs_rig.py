"""Queues of moto, and a worker's `sqs` source against them, with the faults that it told and a clock of its own."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import Lease
from heeler.sources.sqs import SqsSource
from heeler.tasks import background
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer

_numbers = itertools.count()


class Queues:
    """A queue and its dead-letter queue."""

    def __init__(self, server: SqsServer, suffix: str = "", **attributes: str) -> None:
        number = next(_numbers)
        self._server = server
        fifo = {"FifoQueue": "true"} if suffix else {}
        self.dead = server.queue(f"dead-{number}{suffix}", **fifo)
        self.url = server.queue(f"jobs-{number}{suffix}", **fifo, **attributes)

    def send(self, body: str, **more: Any) -> str:
        return str(self._server.client.send_message(QueueUrl=self.url, MessageBody=body, **more)["MessageId"])

    def send_to(self, group: str, body: str) -> str:
        return self.send(body, MessageGroupId=group, MessageDeduplicationId=body)

    def left(self) -> list[dict[str, Any]]:
        return self._server.messages(self.url)

    def set_aside(self) -> list[dict[str, Any]]:
        return self._server.messages(self.dead)

    def send_back(self) -> None:
        """Move what was set aside into the queue again, as a redrive does."""
        found = self._server.client.receive_message(
            QueueUrl=self.dead, MaxNumberOfMessages=10, MessageAttributeNames=["All"]
        )
        for message in found["Messages"]:
            self.send(message["Body"], MessageAttributes=message.get("MessageAttributes", {}))
            self._server.client.delete_message(QueueUrl=self.dead, ReceiptHandle=message["ReceiptHandle"])

    def remove(self, message_id: str) -> None:
        """Delete a message behind the back of whoever holds it; the others are visible a second later."""
        self._server.pass_time(61)
        found = self._server.client.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10, VisibilityTimeout=1)
        for message in found.get("Messages", []):
            if message["MessageId"] == message_id:
                self._server.client.delete_message(QueueUrl=self.url, ReceiptHandle=message["ReceiptHandle"])


class SqsRig:
    """A source.

    Attributes:
        faults: The events that it told.
        late: Seconds that its clock is ahead.
    """

    def __init__(
        self,
        url: str,
        dead: str | None,
        endpoint: str | None,
        visibility: int,
        worker: str,
        state: Path,
        app_mode: bool,
    ) -> None:
        self.faults: list[tuple[str, dict[str, object]]] = []
        self.late = 0.0
        settings = Settings(
            sqs_queue_url=url,
            sqs_dlq_url=dead,
            sqs_endpoint=endpoint,
            sqs_region=REGION,
            sqs_access_key_id=KEY,
            sqs_secret_access_key=SECRET,
            sqs_visibility=visibility,
        )
        request = SourceRequest(
            "sqs",
            worker,
            state,
            settings=settings,
            app_mode=app_mode,
            on_fault=lambda name, **fields: self.faults.append((name, fields)),
        )
        self.source = SqsSource(request, clock=lambda: time.monotonic() + self.late)

    def told(self) -> list[str]:
        """The names of the events."""
        return [name for name, _ in self.faults]

    async def take(self, wait: float = 1.0) -> Lease:
        """The next job, which has to come."""
        lease = await self.source.receive(wait=wait)
        assert lease is not None
        return lease

    async def take_all(self, count: int) -> list[Lease]:
        """So many jobs, by as many lanes at once."""
        leases: list[Lease] = []

        async def lane() -> None:
            leases.append(await self.take())

        async with anyio.create_task_group() as group:
            for _ in range(count):
                group.start_soon(lane)
        return leases


@asynccontextmanager
async def running(
    url: str,
    dead: str | None = None,
    *,
    endpoint: str | None = None,
    visibility: int = 60,
    worker: str = "w0",
    state: Path | None = None,
    app_mode: bool = False,
) -> AsyncIterator[SqsRig]:
    """A source that runs while the block does. What it holds at the end it leaves as a killed process does."""
    with ExitStack() as stack:
        folder = state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        rig = SqsRig(url, dead, endpoint, visibility, worker, folder, app_mode)
        async with background(rig.source.run):
            yield rig
        await rig.source.aclose()
