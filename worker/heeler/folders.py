"""What the forwarder asks of a job's folders; `heeler.files` implements it on `heeler_sync`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from pathlib import Path
from typing import Protocol

from heeler.checkpoints import Generation
from heeler.job import Result
from heeler.lease import LeaseKeeper
from heeler.sources.base import Lease

_LEAST_RESERVE = 3.0


class Files(Protocol):
    """A job's folders. Every method raises `SyncError`."""

    @property
    def environment(self) -> Mapping[str, str]:
        """What the program is told of them."""
        ...

    async def restore(self) -> None:
        """Bring them to what storage holds; raises `FinishedError` where storage says that the job is done."""
        ...

    def watching(self) -> AbstractAsyncContextManager[None]:
        """Mirror what the program writes while the block runs."""
        ...

    def freeze(self) -> None:
        """Inside `watching`: the program ended this very moment."""
        ...

    async def flush(self, *, whole: bool, result: Result | None) -> None:
        """Inside `watching`, after the program's end: make durable what may be; with a `result` the job is done."""
        ...

    async def set_apart(self) -> bool:
        """After `watching`: let the next job have the folders, though `publish` is still to come; whether it may."""
        ...

    async def publish(self) -> None:
        """Make the outputs durable."""
        ...

    async def complete(self, result: Result) -> None:
        """All that the job owes is durable: say so where its checkpoints are."""
        ...

    async def checkpoint(self) -> list[Generation]:
        """Inside `watching`: make the checkpoints durable as they are now."""
        ...

    async def discard(self) -> None:
        """The job is done: remove from disk what is in storage."""
        ...

    def close(self) -> None:
        """Let other processes use them."""
        ...

    async def reserve(self) -> float:
        """Seconds that a flush would take now."""
        ...

    def unsent(self) -> set[Path]:
        """The files that are kept under their own names and have a state that is not durable yet."""
        ...

    def durable(self) -> int:
        """How much has become durable so far; it only grows."""
        ...


class NoFolders:
    """The files of a job that has none: there is nothing to do for it, and so it costs nothing."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.environment = environment

    async def restore(self) -> None:
        """As `Files.restore`."""

    def watching(self) -> AbstractAsyncContextManager[None]:
        """As `Files.watching`."""
        return nullcontext()

    def freeze(self) -> None:
        """As `Files.freeze`."""

    async def flush(self, *, whole: bool, result: Result | None) -> None:
        """As `Files.flush`."""

    async def set_apart(self) -> bool:
        """As `Files.set_apart`: nothing is to come."""
        return False

    async def publish(self) -> None:
        """As `Files.publish`."""

    async def complete(self, result: Result) -> None:
        """As `Files.complete`."""

    async def checkpoint(self) -> list[Generation]:
        """As `Files.checkpoint`."""
        return []

    async def discard(self) -> None:
        """As `Files.discard`."""

    def close(self) -> None:
        """As `Files.close`."""

    async def reserve(self) -> float:
        """As `Files.reserve`: the time to tell the queue."""
        return _LEAST_RESERVE

    def unsent(self) -> set[Path]:
        """As `Files.unsent`."""
        return set()

    def durable(self) -> int:
        """As `Files.durable`."""
        return 0


OpenFiles = Callable[[Lease, LeaseKeeper], Files]
"""Makes a job's folders; the keeper is the permit to change storage. Raises `InvalidJobError`."""
