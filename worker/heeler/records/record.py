"""The record of a job, and how it changes. No I/O here.

One object a job, written by compare-and-swap: a worker's take counts the attempt before anything is done, and whoever
took it later makes every write of the earlier holder fail. Failures and interruptions are counted apart (DESIGN 4).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

FORMAT = 1
_ATTEMPTS_KEPT = 20
_REASON_LENGTH = 1000
HOLDER_SECONDS = 900.0
"""A holder that was heard of within that time counts as alive. A wrong guess costs work, never a result."""
ENDED = frozenset({"done", "failed", "cancelled"})

T = TypeVar("T")
State = Literal["pending", "running", "done", "failed", "cancelled"]


class DamagedRecordError(ValueError):
    """An object is no record, or one of a newer heeler."""


@dataclass(frozen=True)
class AttemptRecord:
    """One delivery of the job.

    Attributes:
        attempt: Its number.
        worker: Who had it.
        started: Seconds since 1970.
        ended: As before; None while it runs, and for good if nobody was told of its end.
        outcome: done, retry, fail, release or cancelled; empty as before.
        reason: Of an end that was none of success.
    """

    attempt: int
    worker: str
    started: float
    ended: float | None = None
    outcome: str = ""
    reason: str = ""


@dataclass(frozen=True)
class Record:
    """What is kept of a job.

    Attributes:
        id: The job.
        run_id: Tells runs of one job apart (`heeler submit --fresh`).
        state: pending, running, done, failed or cancelled.
        created: When it was submitted, seconds since 1970.
        message_id: Of the message that was taken last.
        digest: Of the document that was submitted; empty if it came from elsewhere.
        attempts: Deliveries so far; the number of the newest attempt, whose holder may write.
        failures: Attempts that failed and counted.
        interruptions: Attempts that ended without counting.
        fruitless: Interruptions in a row after which nothing more was durable than before.
        reason: Of the last failure or interruption.
        worker: Who has it, or had it last.
        heard: When its holder wrote last, seconds since 1970.
        finished: When it ended, or None.
        expires: When the queue drops its message, whoever works on it; or None.
        last: Whether the queue gives its message to nobody after this attempt (a redrive policy).
        result: How the program ended or what the app answered, without the answer's body.
        result_key: Of the object that holds the result.
        webhook: "", "pending", "sent", or why it was given up.
        history: The newest attempts, oldest first.
        write: The id of this write.
    """

    id: str
    run_id: str
    state: State
    created: float
    message_id: str = ""
    digest: str = ""
    attempts: int = 0
    failures: int = 0
    interruptions: int = 0
    fruitless: int = 0
    reason: str = ""
    worker: str = ""
    heard: float = 0.0
    finished: float | None = None
    expires: float | None = None
    last: bool = False
    result: Mapping[str, Any] | None = None
    result_key: str = ""
    webhook: str = ""
    history: tuple[AttemptRecord, ...] = ()
    write: str = field(default="", compare=False)

    @property
    def ended(self) -> bool:
        """Whether nothing more happens to it."""
        return self.state in ENDED

    def gone(self, now: float) -> bool:
        """Whether the queue has no message of it any more, as far as a clock can tell, though it has not ended."""
        if self.ended or (self.state == "running" and now - self.heard < HOLDER_SECONDS):
            return False
        dropped = self.expires is not None and self.expires < now
        return dropped or (self.last and now - self.heard >= HOLDER_SECONDS)

    def signed(self) -> Record:
        """As it is to be written: with a new write id."""
        return replace(self, write=secrets.token_hex(8))

    def taken(
        self,
        worker: str,
        message_id: str,
        now: float,
        expires: float | None = None,
        receives: int = 0,
        *,
        last: bool = False,
    ) -> Record:
        """A worker has it: the next attempt begins. One of which no end was told was interrupted.

        A new record begins with the queue's count: checkpoints may know that from before there was one. What was
        received then, and came again, counts as interrupted.
        """
        interrupted = int(self.state == "running")
        before = self.attempts or max(0, receives - 1)
        attempt = AttemptRecord(before + 1, worker, now)
        return replace(
            self,
            state="running",
            message_id=message_id,
            attempts=attempt.attempt,
            interruptions=self.interruptions + interrupted + before - self.attempts,
            fruitless=self.fruitless + interrupted,
            worker=worker,
            heard=now,
            expires=expires,
            last=last,
            history=(*self.history, attempt)[-_ATTEMPTS_KEPT:],
        )

    def again(self, run_id: str, created: float) -> Record:
        """The job is to be run anew: nothing counts but the attempts, which order its holders."""
        digest = self.digest if run_id == self.run_id else ""
        return Record(self.id, run_id, "pending", created, digest=digest, attempts=self.attempts, history=self.history)

    def heard_of(self, now: float, *, progressed: bool) -> Record:
        """Its holder lives."""
        return replace(self, heard=now, fruitless=0 if progressed else self.fruitless)

    def done(self, now: float, result: Mapping[str, Any] | None, key: str, webhook: str) -> Record:
        """It succeeded."""
        ended = self._ended("done", "", now)
        return replace(ended, state="done", finished=now, reason="", result=result, result_key=key, webhook=webhook)

    def failed(self, now: float, reason: str, result: Mapping[str, Any] | None, key: str, webhook: str) -> Record:
        """It failed for good."""
        ended = self._ended("fail", reason, now)
        return replace(
            ended,
            state="failed",
            finished=now,
            failures=self.failures + 1,
            result=result,
            result_key=key,
            webhook=webhook,
        )

    def retried(self, now: float, reason: str) -> Record:
        """The attempt failed, and the job is tried again."""
        return replace(self._ended("retry", reason, now), state="pending", failures=self.failures + 1, fruitless=0)

    def released(self, now: float, reason: str, *, fruitless: bool) -> Record:
        """The attempt was interrupted."""
        return replace(
            self._ended("release", reason, now),
            state="pending",
            interruptions=self.interruptions + 1,
            fruitless=self.fruitless + 1 if fruitless else 0,
        )

    def cancelled(self, now: float, webhook: str = "") -> Record:
        """Nobody wants it any more."""
        return replace(self, state="cancelled", finished=now, reason="cancelled", webhook=webhook)

    def withdrawn(self, now: float) -> Record:
        """Its holder has stopped, since it was cancelled."""
        return self._ended("cancelled", self.reason, now)

    def _ended(self, outcome: str, reason: str, now: float) -> Record:
        reason = reason[:_REASON_LENGTH]
        history = tuple(
            replace(entry, ended=now, outcome=outcome, reason=reason) if entry.attempt == self.attempts else entry
            for entry in self.history
        )
        return replace(self, reason=reason, heard=now, history=history)


def encode_record(record: Record) -> bytes:
    """The object's bytes."""
    return json.dumps({"format": FORMAT, **asdict(record)}, indent=1).encode("ascii") + b"\n"


def decode_record(data: bytes) -> Record:
    """The record in an object's bytes.

    Raises:
        DamagedRecordError: There is none.
    """
    try:
        document = json.loads(data)
        if document.pop("format") != FORMAT:
            raise DamagedRecordError("was written by a newer heeler: use that one here, too")
        history = tuple(_checked(AttemptRecord(**entry)) for entry in document.pop("history"))
        return _checked(Record(history=history, **document))
    except DamagedRecordError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedRecordError(f"is no record of a job ({error}): delete it, or mend it") from None


_KINDS: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "State": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "float | None": (int, float, type(None)),
    "Mapping[str, Any] | None": (dict, type(None)),
}


def _checked(entry: T) -> T:
    for part in fields(entry):  # type: ignore[arg-type]
        kinds = _KINDS.get(str(part.type))
        value = getattr(entry, part.name)
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise DamagedRecordError(f"is no record of a job (its {part.name} is {value!r}): delete it, or mend it")
    if isinstance(entry, Record) and entry.state not in ("pending", "running", *ENDED):
        raise DamagedRecordError(f"is no record of a job (its state is {entry.state!r}): delete it, or mend it")
    return entry
