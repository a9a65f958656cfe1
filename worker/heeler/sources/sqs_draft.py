"""A job on its way into a queue of SQS: checked, measured, and written as SQS takes it. No I/O here."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from heeler.errors import UsageError
from heeler.job import InvalidJobError, JobDocument, parse_document
from heeler.sources.sqs_calls import ENTRIES
from heeler.sources.sqs_message import JOB_ID

MESSAGE_BYTES = 1 << 20
"""The most that SQS takes in a message, its attributes included (PROTOCOLS 4)."""
BATCH_BYTES = 256 << 10
"""The most that every service of its kind takes in a batch. What is larger goes alone."""
_OUT_OF_TEXT = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_GROUP = re.compile("[!-~]{1,128}")
_GROUP_LENGTH = 128
_STRING = "String"


@dataclass(frozen=True)
class Draft:
    """A job that is to be submitted.

    Attributes:
        id: The job's.
        run_id: Which run of it.
        named: Whether it came with its id, so that it has the same when it is submitted again.
        text: The message's body.
        document: The job document; None of a message for an app.
        attributes: Beside the body, by name.
    """

    id: str
    run_id: str
    named: bool
    text: str = field(repr=False)
    document: Mapping[str, Any] | None = field(default=None, repr=False)
    attributes: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Tells whether it is the same job, in whichever run."""
        text = self.text
        if self.document is not None:
            plain = {name: value for name, value in self.document.items() if name != "run_id"}
            text = json.dumps(plain, sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def size(self) -> int:
        """Bytes, as SQS counts them."""
        parts = (part for name, value in self.attributes.items() for part in (name, _STRING, value))
        return len(self.text.encode()) + sum(len(part.encode()) for part in parts)

    def in_run(self, run_id: str) -> Draft:
        """The same job in another run."""
        if run_id == self.run_id or self.document is None:
            return self
        document = {**self.document, "run_id": run_id}
        return replace(self, run_id=run_id, document=document, text=_text_of(document))

    def message(self, *, fifo: bool, group: str | None) -> dict[str, Any]:
        """What `SendMessageBatch` takes, but for the entry's id."""
        message: dict[str, Any] = {"MessageBody": self.text}
        if self.attributes:
            message["MessageAttributes"] = {
                name: {"DataType": _STRING, "StringValue": value} for name, value in self.attributes.items()
            }
        if fifo:
            message["MessageGroupId"] = group or _group_of(self.id)
            message["MessageDeduplicationId"] = _digest(self.id, self.run_id, self.digest)
        return message


def draft_of_document(body: bytes) -> tuple[Draft, JobDocument]:
    """A job document, which gets an id if it has none.

    Raises:
        InvalidJobError: It is none.
    """
    document = parse_document(body)
    job_id = document.id or secrets.token_hex(8)
    data = {**json.loads(body), "id": job_id}
    return Draft(job_id, document.run_id, document.id is not None, _text_of(data), data), document


def draft_of_message(body: bytes) -> Draft:
    """A message for an app, byte for byte. Its id is that of a document in it, or made up; it is sent beside it.

    Raises:
        InvalidJobError: SQS takes no such text.
    """
    try:
        text = body.decode()
    except ValueError:
        raise InvalidJobError("message", "is not UTF-8 text, and SQS takes nothing else: encode it (base64)") from None
    if not text:
        raise InvalidJobError("message", "is empty, which SQS does not take")
    if unfit := _OUT_OF_TEXT.search(text):
        reason = f"contains U+{ord(unfit.group()):04X}, which SQS does not take: encode it (base64)"
        raise InvalidJobError("message", reason)
    named = _id_in(body)
    job_id = named or secrets.token_hex(8)
    return Draft(job_id, "", named=named is not None, text=text, attributes={JOB_ID: job_id})


def refuse_doubles(drafts: Sequence[Draft]) -> None:
    """Raises `InvalidJobError` where two jobs have one id."""
    seen: set[str] = set()
    for draft in drafts:
        if draft.id in seen:
            raise InvalidJobError("id", f"{draft.id!r} is there twice; choose another, or leave it out")
        seen.add(draft.id)


def refuse_large(drafts: Sequence[Draft], most: int = MESSAGE_BYTES) -> None:
    """Raises `InvalidJobError` for a job that does not fit into a message of the queue."""
    for draft in drafts:
        if draft.size > most:
            raise InvalidJobError(
                "document" if draft.document is not None else "message",
                f"job {draft.id!r} has {draft.size} bytes, and the queue takes {most}:"
                " put what is large into storage, and name it in the job",
            )


def check_group(group: str | None, *, fifo: bool) -> None:
    """Raises `UsageError` for a message group that the queue can't have."""
    if group is None:
        return
    if not fifo:
        raise UsageError("--group names a message group of a FIFO queue, and this queue is none: leave it out")
    if not _GROUP.fullmatch(group):
        raise UsageError(f"--group is {group!r}, but must be 1 to 128 ASCII letters, digits and punctuation")


def batches(drafts: Sequence[Draft]) -> Iterator[list[Draft]]:
    """Neighbours in as few calls as SQS allows, in their order."""
    batch: list[Draft] = []
    size = 0
    for draft in drafts:
        if batch and (len(batch) == ENTRIES or size + draft.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(draft)
        size += draft.size
    if batch:
        yield batch


def _text_of(document: Mapping[str, Any]) -> str:
    """The document as short as it can be; escaped where SQS does not take a character as it is."""
    text = json.dumps(document, ensure_ascii=False)
    return json.dumps(document) if _OUT_OF_TEXT.search(text) else text


def _id_in(body: bytes) -> str | None:
    try:
        return parse_document(body).id
    except InvalidJobError:
        return None


def _group_of(job_id: str) -> str:
    return job_id if len(job_id) <= _GROUP_LENGTH else _digest(job_id)


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=32).hexdigest()
