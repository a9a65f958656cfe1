"""Who may ask for a checkpoint now, and of what: the folders of the job whose program runs, while it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Generation:
    """A checkpoint that is in storage: its number, its files and their bytes."""

    number: int
    files: int
    bytes: int


class NoJobError(Exception):
    """No program runs that could have checkpoints."""


Take = Callable[[], Awaitable[list[Generation]]]


class Checkpoints:
    """Passes a request on to the job that runs."""

    def __init__(self) -> None:
        self._take: Take | None = None

    @contextmanager
    def taken_by(self, take: Take) -> Iterator[None]:
        """While the block runs, `take` makes the checkpoints of the running job durable."""
        self._take = take
        try:
            yield
        finally:
            self._take = None

    async def take(self) -> list[Generation]:
        """Make the running job's checkpoints durable as they are; its newest generations.

        Raises:
            NoJobError: No program runs now.
            SyncError: They are being changed, or can't be stored.
        """
        if self._take is None:
            raise NoJobError("no job is running here now")
        return await self._take()
