"""What is to be done with a message that has come, by the record of its job. No I/O here."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from heeler.records.record import HOLDER_SECONDS, Record

WAIT_SECONDS = 3600
"""Until a second message of a job that somebody has is looked at again."""


@dataclass(frozen=True)
class Arrival:
    """A message of a job, just received.

    Attributes:
        job_id: The job.
        run_id: Which run of it the message asks for.
        message_id: The message.
        worker: Who received it.
        now: Seconds since 1970.
        created: When it was sent, as before.
        expires: When the queue drops it, as before; or None.
        receives: The queue's own count of receives.
        last: Whether the queue gives it to nobody after this receive.
    """

    job_id: str
    run_id: str
    message_id: str
    worker: str
    now: float
    created: float
    expires: float | None = None
    receives: int = 1
    last: bool = False


class Step(enum.Enum):
    """What to do."""

    RUN = "run"
    """The job is to be run, once the record is written."""
    END = "end"
    """It has ended: the queue is to be told again, and nothing run."""
    DROP = "drop"
    """It is of an older run than the one that has ended: nobody wants it any more."""
    WAIT = "wait"
    """Another message of the job is being worked on: come again later."""


def judge(record: Record | None, arrival: Arrival) -> tuple[Step, Record]:
    """What to do with a message, and the record as it is to be then (for `RUN`) or as it is.

    A job that ended is not run again for the same run, but one that had failed and comes as a message that was sent
    after that is: so does one that is sent back from a dead-letter queue. While somebody is at work, only the same
    message (whose holder has then lost it) takes the job over.
    """
    if record is None:
        fresh = Record(arrival.job_id, arrival.run_id, "pending", arrival.created)
        return Step.RUN, _take(fresh, arrival)
    same_message = record.message_id in ("", arrival.message_id)
    if record.state == "running" and not same_message and arrival.now - record.heard < HOLDER_SECONDS:
        return Step.WAIT, record
    if record.run_id != arrival.run_id:
        return _other_run(record, arrival)
    if record.state == "failed" and not same_message and arrival.created > (record.finished or 0.0):
        return Step.RUN, _take(record.again(arrival.run_id, record.created), arrival)
    if record.ended:
        return Step.END, record
    return Step.RUN, _take(record, arrival)


def _other_run(record: Record, arrival: Arrival) -> tuple[Step, Record]:
    if arrival.created < record.created:  # a newer run than the message's was submitted meanwhile
        return Step.DROP if record.ended else Step.WAIT, record
    return Step.RUN, _take(record.again(arrival.run_id, arrival.created), arrival)


def _take(record: Record, arrival: Arrival) -> Record:
    return record.taken(
        arrival.worker, arrival.message_id, arrival.now, arrival.expires, arrival.receives, last=arrival.last
    )
