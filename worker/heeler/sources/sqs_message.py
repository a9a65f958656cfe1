"""A message of SQS, and the job that it is (PROTOCOLS 4, DESIGN 4)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

from heeler.job import InvalidJobError, Job, JobDocument, parse_document

ATTRIBUTES = 10
"""The most that a message can have."""
_OURS = "heeler-"
_REASON_LENGTH = 1000
_OUT_OF_VALUE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What SQS takes in no text (SendMessage)."""
_HEADER = "X-Aws-Sqsd-"
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
        document: The job document in its body, if it is one.
    """

    id: str
    handle: str = field(repr=False)
    text: str = field(repr=False)
    system: dict[str, str]
    attributes: dict[str, dict[str, Any]] = field(repr=False)
    received: float
    document: JobDocument | None = field(repr=False)

    @classmethod
    def of(cls, found: dict[str, Any], received: float) -> Message:
        """From an entry of `ReceiveMessage`."""
        text = found.get("Body", "")
        return cls(
            found["MessageId"],
            found["ReceiptHandle"],
            text,
            found.get("Attributes", {}),
            found.get("MessageAttributes", {}),
            received,
            _document(text),
        )

    @property
    def receives(self) -> int:
        """How often it was given out, this time included."""
        return int(self.system.get("ApproximateReceiveCount", 1))

    @property
    def max_failures(self) -> int | None:
        """What the job document asks for, if it says so itself."""
        document = self.document
        named = document is not None and "max_failures" in document.model_fields_set
        return document.max_failures if document is not None and named else None

    def job(self, queue: str) -> Job:
        """The job; its id is the document's, or the message's."""
        named = self.document.id if self.document is not None else None
        return Job(named or self.id, _bytes(self.text), headers=self._headers(queue))

    def _headers(self, queue: str) -> dict[str, str]:
        """What Elastic Beanstalk's worker daemon tells an app."""
        headers = {
            "Msgid": self.id,
            "Queue": queue,
            "Receive-Count": str(self.receives),
        }
        first = self.system.get("ApproximateFirstReceiveTimestamp")
        if first is not None:
            moment = datetime.fromtimestamp(int(first) / 1000, timezone.utc)
            headers["First-Received-At"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
        if "SenderId" in self.system:
            headers["Sender-Id"] = self.system["SenderId"]
        for name, value in self.attributes.items():
            if "StringValue" in value:
                headers[f"Attr-{name}"] = value["StringValue"]
        return {f"{_HEADER}{name}": value for name, value in headers.items()}

    def dead_letter(self, url: str, notes: dict[str, str]) -> dict[str, Any]:
        """What to send to a dead-letter queue: the same again, with notes in as many attributes as there is room for.

        In a FIFO queue the group stays, and what is sent twice is the same message's, whatever its own deduplication
        was: two jobs that are years apart may share that, and one would be dropped.
        """
        kept = {
            name: {part: value[part] for part in _PARTS if part in value}
            for name, value in self.attributes.items()
            if not name.startswith(_OURS)
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
