"""A `SaladSource` as a runtime uses it: opened by its settings, and running."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import Lease, Machine
from heeler.sources.salad import SaladSource
from heeler.tasks import background
from tests.support.salad_script import ScriptedQueue, StubMachine


class Rig:
    """The source, what it said of faults, and shorthands."""

    def __init__(self, source: SaladSource, faults: list[tuple[str, dict[str, object]]]) -> None:
        self.source = source
        self.faults = faults

    async def take(self, wait: float = 10.0) -> Lease:
        lease = await self.source.receive(wait=wait)
        assert lease is not None, self.faults
        return lease

    async def nothing(self, wait: float = 0.5) -> bool:
        return await self.source.receive(wait=wait) is None

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.faults]


@asynccontextmanager
async def running(
    endpoint: str, folder: Path, machine: Machine, *, silence: float = 60.0, tls: bool = False, **options: Any
) -> AsyncIterator[Rig]:
    """A running source. At its end it ends as a process that is killed, unless a job waits on it."""
    faults: list[tuple[str, dict[str, object]]] = []
    request = SourceRequest(
        "salad",
        "worker-1",
        folder,
        settings=Settings(salad_endpoint=endpoint, salad_use_tls=tls, salad_silence=silence),
        machine=machine,
        on_fault=lambda event, **fields: faults.append((event, fields)),
    )
    source = SaladSource(request, **options)
    try:
        async with background(source.run):
            yield Rig(source, faults)
    finally:
        with anyio.CancelScope(shield=True):
            await source.aclose()


@asynccontextmanager
async def scripted(
    folder: Path,
    *streams: Any,
    machine: StubMachine | None = None,
    silence: float = 60.0,
    unwanted_seconds: float = 30.0,
    **answers: Any,
) -> AsyncIterator[tuple[ScriptedQueue, Rig]]:
    """A scripted service, and a source that is running on it."""
    async with (
        ScriptedQueue(*streams, **answers).serving() as queue,
        running(
            queue.endpoint, folder, machine or StubMachine(), silence=silence, unwanted_seconds=unwanted_seconds
        ) as rig,
    ):
        yield queue, rig


async def until(true: Callable[[], bool], timeout: float = 10.0) -> float:
    """Wait until something is so; the seconds that it took."""
    start = time.monotonic()
    while not true():
        assert time.monotonic() - start < timeout, "it never came to be"
        await anyio.sleep(0.005)
    return time.monotonic() - start


def files_in(folder: Path) -> list[str]:
    """The names of what is in a folder."""
    return sorted(path.name for path in folder.iterdir())
