"""What a queue of SQS says of itself that whoever submits has to know: how long and how often a job may try."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

from heeler.sources.sqs_calls import RefusedError, SqsCalls
from heeler.sources.sqs_draft import MESSAGE_BYTES
from heeler.sources.sqs_send import patiently

_NOT_TOLD = {"AccessDenied", "AccessDeniedException", "InvalidAttributeName", "UnsupportedOperation"}
"""Who may send may not always ask, and a look-alike of SQS may have no word for it."""
_UNITS = ((86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second"))


@dataclass(frozen=True)
class QueueLimits:
    """Attributes of the queue.

    Attributes:
        message_bytes: The largest message.
        retention: Seconds after which a message is dropped, whoever works on it; None if nobody says.
        receives: After so many receives a message is moved; None if it never is.
        moved_to: The name of the queue that it is moved to.
    """

    message_bytes: int = MESSAGE_BYTES
    retention: float | None = None
    receives: int | None = None
    moved_to: str = ""

    def notes(self, now: float) -> list[str]:
        """What to tell who submits at that time."""
        found = []
        if self.receives is not None:
            found.append(
                f"this queue's redrive policy moves a message to {self.moved_to} after"
                f" {_count(self.receives, 'receive')}; an interruption and every 12 hours of a job count as a receive"
            )
        if self.retention is not None:
            end = time.strftime("%Y-%m-%d %H:%M", time.localtime(now + self.retention))
            found.append(
                f"this queue drops messages after {_duration(self.retention)}, whoever works on them:"
                f" a job must end before {end}"
            )
        return found


async def limits_of(calls: SqsCalls) -> QueueLimits:
    """What the queue says; nothing if we may not ask.

    Raises:
        SourceUnavailableError: SQS is out of reach, or refuses us altogether.
    """
    try:
        return _limits(await patiently(lambda: calls.attributes("All")))
    except RefusedError as error:
        if error.code not in _NOT_TOLD:
            raise
        return QueueLimits()


def _limits(said: Mapping[str, str]) -> QueueLimits:
    try:
        policy = json.loads(said.get("RedrivePolicy") or "{}")
        retention = said.get("MessageRetentionPeriod")
        return QueueLimits(
            min(MESSAGE_BYTES, int(said.get("MaximumMessageSize", MESSAGE_BYTES))),
            None if retention is None else float(retention),
            int(policy["maxReceiveCount"]) if "maxReceiveCount" in policy else None,
            str(policy.get("deadLetterTargetArn", "")).rpartition(":")[2] or "another queue",
        )
    except (ValueError, TypeError, AttributeError):  # a look-alike's own words
        return QueueLimits()


def _duration(seconds: float) -> str:
    for size, unit in _UNITS[:-1]:
        if seconds >= size:
            return _count(seconds / size, unit)
    return _count(seconds, _UNITS[-1][1])


def _count(number: float, unit: str) -> str:
    return f"{number:.3g} {unit}{'' if number == 1 else 's'}"
