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
    """Passes a request on to the jobs that run."""

    def __init__(self) -> None:
        self._takes: list[Take] = []

    @contextmanager
    def taken_by(self, take: Take) -> Iterator[None]:
        """While the block runs, `take` makes the checkpoints of a running job durable."""
        self._takes.append(take)
        try:
            yield
        finally:
            self._takes.remove(take)

    async def take(self) -> list[Generation]:
        """Make the running jobs' checkpoints durable as they are; their newest generations.

        Raises:
            NoJobError: No program runs now.
            SyncError: They are being changed, or can't be stored.
        """
        if not self._takes:
            raise NoJobError("no job is running here now")
        found: list[Generation] = []
        for take in [*self._takes]:
            if take in self._takes:  # else its job has ended meanwhile
                found.extend(await take())
        return found
