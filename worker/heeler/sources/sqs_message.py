"""A message of SQS, and the job that it is (PROTOCOLS 4, DESIGN 4)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from heeler.job import InvalidJobError, Job, JobDocument, Target, check_job_id, parse_document
from heeler.sources.sqs_beanstalk import Told, body_of, target_of, told

ATTRIBUTES = 10
"""The most that a message can have."""
_OURS = "heeler-"
JOB_ID, INDEX = f"{_OURS}job-id", f"{_OURS}index"
"""What a sender may say of a job beside its message; a dead letter says it too, so that it may be sent back."""
_NOTES = {JOB_ID, *(_OURS + name for name in ("reason", "attempts", "worker"))}
"""What we write into a dead letter."""
_REASON_LENGTH = 1000
_OUT_OF_VALUE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What SQS takes in no text (SendMessage)."""
_INDEX = re.compile(r"[0-9]{1,15}")
_PARTS = ("DataType", "StringValue", "BinaryValue")


@dataclass(frozen=True)
class Message:
    """What one receive gave.

    Attributes:
        id: SQS's own.
        handle: The right to change it that this receive gave.
        text: Its body.
        system: The attributes that SQS keeps, by name.
        attributes: Those of the sender, as they are sent.
        received: By our clock.
        document: The job document in its body, if it is to be one.
    """

    id: str
    handle: str = field(repr=False)
    text: str = field(repr=False)
    system: dict[str, str]
    attributes: dict[str, dict[str, Any]] = field(repr=False)
    received: float
    document: JobDocument | None = field(repr=False)

    @classmethod
    def of(cls, found: dict[str, Any], received: float, *, documents: bool = True) -> Message:
        """From an entry of `ReceiveMessage`; an app's messages are none of our `documents`, whatever is in them."""
        text = found.get("Body", "")
        return cls(
            found["MessageId"],
            found["ReceiptHandle"],
            text,
            found.get("Attributes", {}),
            found.get("MessageAttributes", {}),
            received,
            _document(text) if documents else None,
        )

    @property
    def receives(self) -> int:
        """How often it was given out, this time included."""
        return int(self.system.get("ApproximateReceiveCount", 1))

    @property
    def sent(self) -> float | None:
        """When it was sent, seconds since 1970."""
        sent = self.system.get("SentTimestamp")
        return None if sent is None else int(sent) / 1000

    @property
    def max_failures(self) -> int | None:
        """What the job document asks for, if it says so itself."""
        document = self.document
        named = document is not None and "max_failures" in document.model_fields_set
        return document.max_failures if document is not None and named else None

    @cached_property
    def texts(self) -> dict[str, str]:
        """The sender's attributes that are text: strings and numbers."""
        return {name: value["StringValue"] for name, value in self.attributes.items() if "StringValue" in value}

    @property
    def job_id(self) -> str:
        """The document's, or what the sender named, or the message's own."""
        named = self.document.id if self.document is not None else None
        return named or self._named_id or self.id

    @property
    def index(self) -> int | None:
        """The document's, or what the sender named."""
        if self.document is not None and self.document.index is not None:
            return self.document.index
        named = self.texts.get(INDEX, "")
        return int(named) if _INDEX.fullmatch(named) else None

    def job(self, queue: str) -> Job:
        """The job."""
        try:
            target = self.target
        except InvalidJobError:
            target = None  # a source of an app's jobs asks for it first
        body = _bytes(body_of(self.text, self.texts))
        return Job(self.job_id, body, target, self.told(queue).headers, self.index)

    @property
    def target(self) -> Target | None:
        """Where the sender wants an app to have it; raises `InvalidJobError`."""
        return target_of(self.texts)

    def told(self, queue: str) -> Told:
        """What Elastic Beanstalk's worker daemon tells an app."""
        texts = {name: value for name, value in self.texts.items() if name not in {*_NOTES, INDEX}}
        return told(self.id, queue, self.system, texts)

    def ignored(self) -> dict[str, str]:
        """The attributes that are meant for us and are not as they have to be, and why."""
        found = {}
        if JOB_ID in self.texts and self._named_id is None:
            found[JOB_ID] = "it is no id of a job"
        if INDEX in self.texts and not _INDEX.fullmatch(self.texts[INDEX]):
            found[INDEX] = "it is no whole number from 0"
        return found

    @property
    def _named_id(self) -> str | None:
        try:
            return check_job_id(self.texts[JOB_ID])
        except (KeyError, ValueError):
            return None

    def dead_letter(self, url: str, notes: dict[str, str]) -> dict[str, Any]:
        """What to send to a dead-letter queue: the same again, with notes in as many attributes as there is room for.

        In a FIFO queue the group stays, and what is sent twice is the same message's, whatever its own deduplication
        was: two jobs that are years apart may share that, and one would be dropped.
        """
        kept = {
            name: {part: value[part] for part in _PARTS if part in value}
            for name, value in self.attributes.items()
            if name not in _NOTES
        }
        for name, value in notes.items():
            if len(kept) < ATTRIBUTES:
                kept[_OURS + name] = {"DataType": "String", "StringValue": _value(value)}
        sent: dict[str, Any] = {"MessageBody": self.text, "MessageAttributes": kept}
        if url.endswith(".fifo"):
            sent["MessageGroupId"] = self.system.get("MessageGroupId", self.id)
            sent["MessageDeduplicationId"] = self.id
        return sent


def _value(text: str) -> str:
    """A text as SQS takes it: of its characters, not too long, and not empty."""
    return _OUT_OF_VALUE.sub("?", text)[:_REASON_LENGTH] or "?"


def _bytes(text: str) -> bytes:
    # A look-alike of SQS may let half of a surrogate pair pass: whoever reads the message judges it.
    return text.encode("utf-8", "surrogatepass")


def _document(text: str) -> JobDocument | None:
    try:
        return parse_document(_bytes(text))
    except InvalidJobError:
        return None
