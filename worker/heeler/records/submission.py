"""What is to be done with a job that is submitted, by the record that it may have already. No I/O here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from heeler.job import InvalidJobError
from heeler.records.record import HOLDER_SECONDS, Record
from heeler.sources.base import FRESH_RUN


@dataclass(frozen=True)
class Wish:
    """A job that somebody wants done.

    Attributes:
        id: The job.
        run_id: Which run of it.
        digest: Of its document, in whichever run.
        fresh: Whether the run id was made up for this call.
        now: Seconds since 1970.
        expires: When the queue drops a message that is sent now, as before; or None.
    """

    id: str
    run_id: str
    digest: str
    fresh: bool
    now: float
    expires: float | None = None


@dataclass(frozen=True)
class Place:
    """What to do.

    Attributes:
        run_id: The run that the job is submitted in.
        send: Whether it is to be sent.
        known: Its state, if it was submitted before; else empty.
        record: What to write first; None if nothing.
    """

    run_id: str
    send: bool
    known: str = ""
    record: Record | None = None


def place(record: Record | None, wish: Wish) -> Place:
    """What to do with a job, by the record of its id.

    Raises:
        InvalidJobError: The id is another job's.
    """
    fresh = Record(wish.id, wish.run_id, "pending", wish.now, digest=wish.digest, expires=wish.expires)
    if record is None:
        return Place(wish.run_id, send=True, record=fresh)
    same = record.digest == wish.digest
    if record.run_id == wish.run_id:
        if not same:
            raise _taken(wish.id, "is in the queue already" + (" with another document" if record.digest else ""))
        return _repeated(record, wish)
    if record.ended:
        again = record.again(wish.run_id, wish.now)
        return Place(wish.run_id, send=True, record=replace(again, digest=wish.digest, expires=wish.expires))
    if same and wish.fresh and record.run_id.startswith(FRESH_RUN):
        # A repeated `--fresh`: the run that the first one began counts.
        return _repeated(record, wish)
    raise _taken(wish.id, f"is in the queue already, {record.state} in another run")


def _taken(job_id: str, words: str) -> InvalidJobError:
    return InvalidJobError("id", f"{job_id!r} {words}; choose another, or submit --fresh once it has ended")


def _repeated(record: Record, wish: Wish) -> Place:
    """Sent again if its message may be missing; a second message does no harm, but costs its receives."""
    if record.ended:
        return Place(record.run_id, send=False, known=record.state)
    held = record.state == "running" and wish.now - record.heard < HOLDER_SECONDS
    if record.expires is not None and record.expires < wish.now and not held:
        return Place(record.run_id, send=True, known=record.state, record=replace(record, expires=wish.expires))
    # Whoever submitted it may have died between record and message.
    unseen = record.state == "pending" and not record.message_id
    return Place(record.run_id, send=unseen, known=record.state)
