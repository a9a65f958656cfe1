"""The submitter's side of `sqs`: messages in the queue, and all that is known of jobs in their records.

Blocking calls on the outside; inside one event loop in a thread of its own, with one client, until `close`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

from anyio.from_thread import start_blocking_portal

from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.job import check_job_id
from heeler.message import refuse_what_needs_a_record
from heeler.records.desk import RecordDesk
from heeler.records.record import DamagedRecordError, Record
from heeler.records.submission import Place, Wish
from heeler.sources.base import PLAINLY, JobRecord, PartlySubmittedError, SourceUnavailableError, SubmitOptions
from heeler.sources.sqs_calls import Address
from heeler.sources.sqs_draft import (
    Draft,
    check_group,
    draft_of_document,
    draft_of_message,
    refuse_doubles,
    refuse_large,
)
from heeler.sources.sqs_limits import QueueLimits, limits_of
from heeler.sources.sqs_send import Sender, explained
from heeler_sync.errors import SyncError, TransientStoreError

_PACE = (1.0, 5.0)
_NAMED = 3
"""Of many jobs that a note is about, so many are named."""
_SHOWN = (
    "id",
    "state",
    "attempts",
    "failures",
    "interruptions",
    "reason",
    "worker",
    "created",
    "finished",
    "expires",
    "webhook",
    "result_key",
)

T = TypeVar("T")


class SqsDesk:
    """A queue of SQS and the records of its jobs, if a bucket is named for them."""

    def __init__(self, address: Address, records: RecordDesk | None, wall: Callable[[], float] = time.time) -> None:
        """Args: the queue, the records, and seconds since 1970."""
        self._address = address
        self._records = records
        self._wall = wall
        self._notes: list[str] = []
        self._stack = ExitStack()
        self._portal = self._stack.enter_context(start_blocking_portal())
        self._opened: Sender | None = None

    @property
    def name(self) -> str:
        """As `Desk.name`."""
        return f"sqs:{self._address.url}"

    @property
    def pace(self) -> tuple[float, float]:
        """As `Desk.pace`: each look is a request a job."""
        return _PACE

    def submit(self, documents: list[bytes], options: SubmitOptions = PLAINLY) -> list[str]:
        """As `Desk.submit`. What can be checked is checked before anything is written or sent."""
        pairs = [draft_of_document(body) for body in documents]
        if self._records is None:
            for _, document in pairs:
                refuse_what_needs_a_record(document)
        return self._submit([draft for draft, _ in pairs], options)

    def submit_message(self, message: bytes, options: SubmitOptions = PLAINLY) -> str:
        """As `Desk.submit_message`."""
        return self._submit([draft_of_message(message)], options)[0]

    def notes(self) -> list[str]:
        """As `Desk.notes`."""
        told, self._notes = self._notes, []
        return told

    def jobs(self) -> list[JobRecord]:
        """As `Desk.jobs`; objects that are no records are noted."""
        found, damaged = self._run(self._kept("the list of jobs").all)
        self._notes += damaged
        return [_shown(record, self._wall()) for record in found]

    def show(self, job_id: str) -> JobRecord | None:
        """As `Desk.show`."""
        try:
            return self.look([check_job_id(job_id)]).get(job_id)
        except ValueError:  # no job has such an id
            return None

    def look(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """As `Desk.look`."""
        found = self._run(partial(self._kept("the state of a job").look, ids))
        return {job_id: _shown(record, self._wall()) for job_id, record in found.items()}

    def cancel(self, job_id: str) -> bool:
        """As `Desk.cancel`."""
        return self._run(partial(self._kept("a cancellation").cancel, job_id, self._wall()))

    def result(self, job_id: str) -> bytes | None:
        """As `Desk.result`."""
        return self._run(partial(self._kept("a result").result, job_id))

    def close(self) -> None:
        """As `Desk.close`."""
        self._stack.close()

    def _kept(self, what: str) -> RecordDesk:
        if self._records is None:
            raise UsageError(f"{what} needs records, for SQS keeps none: set HEELER_RECORDS=s3://bucket/prefix/")
        return self._records

    def _submit(self, drafts: list[Draft], options: SubmitOptions) -> list[str]:
        check_group(options.group, fifo=self._address.fifo)
        refuse_doubles(drafts)
        refuse_large(drafts)
        sender = self._sender()
        limits = self._run(partial(limits_of, sender))
        refuse_large(drafts, limits.message_bytes)
        places = self._reserve(drafts, limits, options)
        chosen = [draft.in_run(place.run_id) for draft, place in zip(drafts, places, strict=True) if place.send]
        sent: list[Draft] = []
        try:
            self._run(partial(sender.send_all, chosen, options.group, sent.append))
        except HeelerError as error:
            raise self._broken(error, chosen, sent) from None
        self._note(drafts, places, limits)
        return [draft.id for draft in drafts]

    def _reserve(self, drafts: list[Draft], limits: QueueLimits, options: SubmitOptions) -> list[Place]:
        if self._records is None:
            return [Place(draft.run_id, send=True) for draft in drafts]
        now = self._wall()
        expires = None if limits.retention is None else now + limits.retention
        wishes = [Wish(draft.id, draft.run_id, draft.digest, options.fresh, now, expires) for draft in drafts]
        return self._run(partial(self._records.reserve, wishes))

    def _broken(self, error: HeelerError, chosen: list[Draft], sent: list[Draft]) -> HeelerError:
        """What to tell of a submission that broke off."""
        kind = UnavailableError if isinstance(error, UnavailableError) else UsageError
        if not sent:
            return kind(f"nothing was sent: {error}")
        if self._records is not None and all(draft.named for draft in chosen):
            advice = "submit the same again: what was sent is not run twice"
        else:
            advice = "submit the others only: the ids of those that were sent are printed"
        words = f"{len(sent)} of {len(chosen)} jobs were sent, then: {error}; once that is mended, {advice}"
        return PartlySubmittedError(words, [draft.id for draft in sent], kind.exit_code)

    def _note(self, drafts: list[Draft], places: list[Place], limits: QueueLimits) -> None:
        pairs = [*zip(drafts, places, strict=True)]
        again = [f"{draft.id} ({place.known})" for draft, place in pairs if place.known and place.send]
        known = [f"{draft.id} ({place.known})" for draft, place in pairs if place.known and not place.send]
        if again:
            self._notes.append(
                f"submitted before, but perhaps without a message in the queue, so sent again: {_list(again)}"
            )
        if known:
            self._notes.append(f"submitted before, so not sent again: {_list(known)}; --fresh runs an ended job anew")
        if any(place.send for place in places):
            self._notes += limits.notes(self._wall())

    def _sender(self) -> Sender:
        if self._opened is None:
            sender = Sender(self._address)
            self._stack.enter_context(self._portal.wrap_async_context_manager(sender.opened()))
            self._opened = sender
        return self._opened

    def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await a call in the loop; its failures are said as a person understands them."""
        future = self._portal.start_task_soon(call)
        try:
            return future.result()
        except SourceUnavailableError as error:
            raise explained(error) from None
        except TransientStoreError as error:
            raise UnavailableError(f"storage is out of reach: {error}; is the endpoint right?") from None
        except SyncError as error:
            raise UsageError(f"storage refuses us: {error}; check bucket, keys and endpoint") from None
        except DamagedRecordError as error:
            raise UsageError(str(error)) from None
        except BaseException:
            future.cancel()  # Ctrl-C ends what goes on in the loop, too
            raise


def _list(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _shown(record: Record, now: float) -> JobRecord:
    values: dict[str, Any] = {name: getattr(record, name) for name in _SHOWN}
    if record.gone(now):
        values["state"] = "gone"
    return JobRecord(
        **values,
        result=None if record.result is None else dict(record.result),
        history=tuple(asdict(entry) for entry in record.history),
        heard=record.heard or None,
    )
