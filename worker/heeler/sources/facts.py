"""What a queue's lease has to tell of its message, so that its job can have a record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from heeler.sources.base import Lease, Source


@dataclass(frozen=True)
class MessageFacts:
    """One receive of a message.

    Attributes:
        message_id: The queue's own id of it.
        created: When it was sent, seconds since 1970; None if the queue does not say.
        expires: When the queue drops it, as before; None if nobody knows.
        receives: How often it was given out, this time included.
        grouped: Whether other messages wait while this one rests (FIFO).
        max_failures: How often the job may fail.
        last: Whether the queue gives it to nobody after this receive (a redrive policy).
    """

    message_id: str
    created: float | None
    expires: float | None
    receives: int
    grouped: bool
    max_failures: int
    last: bool


class RecordableLease(Lease, Protocol):
    """A lease of a queue that keeps no status."""

    @property
    def facts(self) -> MessageFacts:
        """What is known of the message."""
        ...


@runtime_checkable
class CheckedSource(Source, Protocol):
    """A source whose queue can be looked at before the first job."""

    async def check(self, patience: float) -> None:
        """Ask the queue whether it is there, and whether it knows us.

        Args:
            patience: Seconds to go on asking.

        Raises:
            UsageError: It is not, or it does not.
            UnavailableError: There was no answer in time.
        """
        ...


@runtime_checkable
class RecordableSource(CheckedSource, Protocol):
    """A source of such leases."""

    @property
    def queue(self) -> str:
        """The queue's name, as it may stand in keys."""
        ...

    async def receive(self, *, wait: float) -> RecordableLease | None:
        """As `Source.receive`."""
        ...
