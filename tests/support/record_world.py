"""Workers with records on a modelled queue, in virtual time; each may crash at one exact call of queue or bucket."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.records.announce import Announcer
from heeler.records.lease import Context
from heeler.records.record import Record
from heeler.records.source import RecordedSource
from heeler.records.store import RecordStore
from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import Lease
from heeler.sources.sqs import SqsSource
from heeler.sources.sqs_calls import Address, Change
from heeler.tasks import background
from heeler.webhook import Event, WebhookError, Webhooks
from heeler_sync.store.memory import MemoryStore
from tests.support.crashing import CrashingStore, Fuse
from tests.support.sqs_model import ModelCalls, SqsModel

PREFIX = "r/jobs/"


class CrashingCalls(ModelCalls):
    """The calls of a process that dies at one of them."""

    def __init__(self, model: SqsModel, address: Address, fuse: Fuse) -> None:
        super().__init__(model, address, "")
        self._fuse = fuse

    async def _one(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        fate = self._fuse.begin(name)
        try:
            return await call()
        finally:
            self._fuse.end(fate)

    async def receive(self, count: int, wait: int, visibility: int) -> list[dict[str, Any]]:
        return list(await self._one("receive", lambda: super(CrashingCalls, self).receive(count, wait, visibility)))

    async def hide(self, changes: Sequence[Change]) -> list[Exception | None]:
        return list(await self._one("hide", lambda: super(CrashingCalls, self).hide(changes)))

    async def delete(self, changes: Sequence[Change]) -> list[Exception | None]:
        return list(await self._one("delete", lambda: super(CrashingCalls, self).delete(changes)))

    async def send(self, url: str, **message: Any) -> None:
        await self._one("send", lambda: super(CrashingCalls, self).send(url, **message))


class RememberingWebhooks(Webhooks):
    """Keeps what it is asked to send; the first of them may fail."""

    def __init__(self, *failures: WebhookError) -> None:
        super().__init__(None)
        self.failures = list(failures)
        self.sent: list[tuple[str, Event]] = []

    async def send(self, url: str, event: Event) -> None:
        await anyio.lowlevel.checkpoint()
        if self.failures:
            raise self.failures.pop(0)
        self.sent.append((url, event))


class RecordWorld:
    """A queue, a bucket, and any number of workers, one after another or at once.

    Attributes:
        settings: Of the workers that begin from now on.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, **model: Any) -> None:
        self.model = SqsModel(**model)
        self.store = MemoryStore()
        self.records = RecordStore(lambda: self.store, PREFIX)
        self.webhooks = RememberingWebhooks()
        self.faults: list[tuple[str, dict[str, object]]] = []
        self.settings: dict[str, Any] = {
            "sqs_queue_url": "http://queue/jobs",
            "sqs_dlq_url": "http://queue/dead",
            "sqs_region": "x",
            "records": f"s3://bucket/{PREFIX}",
        }
        self._folder = folder
        self._monkeypatch = monkeypatch
        self._count = 0

    def submit(self, job_id: str = "a", **fields: object) -> str:
        """Send a job's document; the message's id."""
        return self.model.put(json.dumps({"id": job_id, "command": "x", **fields})).id

    @asynccontextmanager
    async def worker(self, fuse: Fuse | None = None, *, documents: bool = True) -> AsyncIterator[RecordedSource]:
        """A worker's source, running."""
        self._count += 1
        name, fuse = f"w{self._count}", fuse or Fuse()
        self._monkeypatch.setattr(
            "heeler.sources.sqs.SqsCalls", lambda address: CrashingCalls(self.model, address, fuse)
        )
        request = SourceRequest(
            "sqs",
            name,
            self._folder / name,
            settings=Settings(**self.settings),
            app_mode=not documents,
            on_fault=self._fault,
        )
        bare = SqsSource(request, clock=anyio.current_time)
        store = CrashingStore(self.store, fuse)
        announcer = Announcer(self.webhooks, None, self.model.now, self._fault)
        context = Context(RecordStore(lambda: store, PREFIX), announcer, self.model.now, self._fault, self._fault)
        source = RecordedSource(bare, context, name, documents=documents)
        async with background(source.run):
            yield source

    def _fault(self, name: str, **fields: object) -> None:
        self.faults.append((name, fields))

    def told(self) -> list[str]:
        """The names of the faults."""
        return [name for name, _ in self.faults]

    async def record(self, job_id: str = "a") -> Record:
        """A job's record, which has to be there."""
        found = await self.records.get(job_id)
        assert found is not None
        return found.record

    async def change(self, job_id: str, change: Callable[[Record], Record]) -> None:
        """Change a record from outside."""
        assert await self.records.update(job_id, change) is not None

    def results(self) -> Mapping[str, bytes]:
        """The result objects, by job and attempt."""
        start = f"{PREFIX}results/"
        return {key.removeprefix(start): data for key, data in self.store.objects().items() if key.startswith(start)}


async def take(source: RecordedSource, wait: float = 5.0) -> Lease:
    """The next job, which has to come."""
    lease = await source.receive(wait=wait)
    assert lease is not None
    return lease
