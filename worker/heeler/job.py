"""Jobs and what becomes of them: the words that every other room speaks. No I/O here.

A job arrives as bytes. In command mode they must be a job document (JSON, a superset of Kelpie's; DESIGN 4); in app
mode they go to the program as they are.
"""

from __future__ import annotations

import base64
import enum
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from heeler.patterns import check_pattern
from heeler.urls import check_webhook

_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@=+-]{0,199}")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}")
_TEN_YEARS = 10 * 366 * 86_400
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class InvalidJobError(ValueError):
    """A message is no job that can be run, and never will be.

    Attributes:
        field: Where in the document, as a dotted path; "document" for the whole.
        reason: What is wrong and what would be right.
    """

    def __init__(self, field: str, reason: str) -> None:
        self.field = field
        self.reason = reason
        super().__init__(f"{field}: {reason}")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _without_nul(value: object) -> object:
    if isinstance(value, str) and "\0" in value:
        raise ValueError("contains a NUL character")
    return value


_Text = Annotated[str, BeforeValidator(_without_nul)]


def _without_climbing(value: str) -> str:
    if ".." in value.split("/"):
        raise ValueError(f"{value!r} contains '..'")
    return value


def _unless_off(value: object) -> object:
    return None if value is False or value == "" else value


T = TypeVar("T")
_Off = Annotated[T, BeforeValidator(_unless_off)]
"""May be said to be off by `false`, as Kelpie's documents do."""
_Path = Annotated[_Text, AfterValidator(_without_climbing)]
_Switch = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]
"""Kelpie's database writes it as 0 or 1, or leaves it null."""


class SyncEntry(_Model):
    """One folder of a job and its place in storage: Kelpie's fields, `mode`, `ready` of a snapshot.

    `deletes: false` of a mirror keeps the objects of files that go.
    """

    bucket: str
    prefix: _Path
    local_path: _Path = Field(min_length=1)
    direction: Literal["download", "upload"] | None = None
    pattern: str | None = None
    mode: Literal["mirror", "snapshot"] = "mirror"
    ready: _Text | None = Field(default=None, min_length=1)
    deletes: bool = True

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            check_pattern(value)
        return value

    @model_validator(mode="after")
    def _ready_of_snapshot(self) -> SyncEntry:
        if self.ready is not None and self.mode != "snapshot":
            raise ValueError("ready names the last file of a checkpoint, so it needs mode 'snapshot'")
        return self

    @model_validator(mode="after")
    def _deletes_of_mirror(self) -> SyncEntry:
        if not self.deletes and self.mode == "snapshot":
            raise ValueError(
                "deletes false keeps the objects of a mirror's files, so it has no place in mode 'snapshot'"
            )
        return self

    @field_validator("bucket")
    @classmethod
    def _bucket_name(cls, value: str) -> str:
        if not _BUCKET.fullmatch(value):
            raise ValueError(f"{value!r} is not a bucket name")
        return value


class SyncSpec(_Model):
    """What is downloaded before, mirrored during and uploaded after the run."""

    before: tuple[SyncEntry, ...] = ()
    during: tuple[SyncEntry, ...] = ()
    after: tuple[SyncEntry, ...] = ()

    @model_validator(mode="after")
    def _directions(self) -> SyncSpec:
        for name, wanted in (("before", "download"), ("during", "upload"), ("after", "upload")):
            for index, entry in enumerate(getattr(self, name)):
                if entry.direction not in (None, wanted):
                    raise ValueError(f"{name}.{index}.direction must be {wanted!r}, or be left out")
        return self


class JobDocument(_Model):
    """A job that names its command."""

    id: str | None = None
    run_id: str = Field(default="", max_length=64, pattern=r"^[A-Za-z0-9._-]*$")
    command: _Text = Field(min_length=1)
    arguments: tuple[_Text, ...] = ()
    environment: Mapping[str, _Text] = Field(default_factory=dict)
    sync: SyncSpec = SyncSpec()
    timeout: float | None = Field(default=None, gt=0, le=_TEN_YEARS, allow_inf_nan=False)
    max_failures: int = Field(default=3, ge=1, le=1000)
    heartbeat_interval: float | None = Field(default=None, ge=0.1, le=3600, allow_inf_nan=False)
    index: int | None = Field(default=None, ge=0, strict=True)
    compression: _Switch = False
    webhook: _Off[str | None] = None
    result_key: _Off[_Path | None] = Field(default=None, min_length=1, max_length=900)

    @field_validator("id")
    @classmethod
    def _plain_id(cls, value: str | None) -> str | None:
        if value is not None:
            check_job_id(value)
        return value

    @field_validator("webhook")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        return None if value is None else check_webhook(value)

    @field_validator("result_key")
    @classmethod
    def _below(cls, value: str | None) -> str | None:
        if value is not None and value.startswith("/"):
            raise ValueError("starts with '/': it is a key below the prefix of the records")
        return value

    @field_validator("environment")
    @classmethod
    def _names(cls, value: Mapping[str, str]) -> Mapping[str, str]:
        for name in value:
            if not _VARIABLE.fullmatch(name):
                raise ValueError(f"{name!r} is no name of an environment variable")
        return value


def check_job_id(value: str) -> str:
    """The id, if it can stand in keys and paths.

    Raises:
        ValueError: It can't.
    """
    if not _JOB_ID.fullmatch(value) or ".." in value:
        raise ValueError(f"{value!r} can't be used: an id is 1 to 200 letters, digits and . _ : @ = + -")
    return value


def parse_document(body: bytes) -> JobDocument:
    """The job document in a message.

    Raises:
        InvalidJobError: It is none; the first fault is named.
    """
    try:
        data = json.loads(body)
    except ValueError as error:
        raise InvalidJobError("document", f"is not JSON: {error}") from None
    except RecursionError:
        raise InvalidJobError("document", "is nested too deeply") from None
    if not isinstance(data, dict):
        raise InvalidJobError("document", "is not a JSON object")
    try:
        refuse_half_characters(data, ())
    except RecursionError:
        raise InvalidJobError("document", "is nested too deeply") from None
    try:
        return JobDocument.model_validate(data)
    except ValidationError as error:
        raise first_fault(error) from None


def refuse_half_characters(data: object, where: tuple[str, ...]) -> None:
    """JSON can escape half of a surrogate pair, which no file, environment, queue or storage can hold.

    Raises:
        InvalidJobError: There is one; `where` the data is found in the message is named.
    """
    if isinstance(data, str) and not _is_whole(data):
        raise InvalidJobError(".".join(where), "contains half of a surrogate pair, which is no character")
    if isinstance(data, dict):
        for name, value in data.items():
            if not _is_whole(name):
                raise InvalidJobError(".".join(where) or "document", f"the name {name!a} contains half of a character")
            refuse_half_characters(value, (*where, name))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            refuse_half_characters(value, (*where, str(index)))


def _is_whole(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_fault(error: ValidationError) -> InvalidJobError:
    """The first of what is wrong with a document, by its field."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"]) or "document"
    reason = {
        "missing": "is missing",
        "extra_forbidden": "is not a field of a job document",
    }.get(fault["type"], fault["msg"].removeprefix("Value error, "))
    return InvalidJobError(where, reason[:1].lower() + reason[1:])


@dataclass(frozen=True)
class Target:
    """Where on this machine the queue wants a job to be delivered: the app's port, if it says so, and the path."""

    port: int | None
    path: str


@dataclass(frozen=True)
class Job:
    """One message of a queue.

    Attributes:
        id: Unique in its queue; safe in keys and paths.
        body: The message as it came; it may hold secrets of the program's.
        target: Where to deliver it, if the queue says so.
        headers: What the queue's own worker would tell the app besides, by name.
        index: Its place in an array of jobs, from 0.
    """

    id: str
    body: bytes = field(repr=False)
    target: Target | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    index: int | None = None

    def document(self) -> JobDocument:
        """The job document in it; raises `InvalidJobError`, also for an id that can't stand in keys and paths."""
        try:
            check_job_id(self.id)
        except ValueError as error:
            raise InvalidJobError("id", str(error)) from None
        return parse_document(self.body)


class Outcome(enum.Enum):
    """What becomes of a job after an attempt (DESIGN 4, table of outcomes)."""

    DONE = "done"
    RETRY = "retry"
    """It failed; it is tried again, and the failure counts."""
    FAIL = "fail"
    """It failed for good."""
    RELEASE = "release"
    """It was interrupted; it is tried again, and nothing counts."""
    LOST = "lost"
    """Another worker has it: we change and report nothing."""
    CANCELLED = "cancelled"


@dataclass(frozen=True)
class Result:
    """What a program left behind when it ended, or what an app answered.

    Attributes:
        exit_code: Of a command that exited by itself.
        signal: The number of the signal that killed it.
        status: The HTTP status of an app's answer; None if it gave none.
        body: The answer's body, byte for byte.
    """

    exit_code: int | None = None
    signal: int | None = None
    status: int | None = None
    body: bytes = field(default=b"", repr=False)

    def as_json(self) -> dict[str, int | str | None]:
        """As it is kept in queues, in heads, and shown to people; the body in base64."""
        if self.status is None:
            return {"exit_code": self.exit_code, "signal": self.signal}
        return {"status": self.status, "body": base64.b64encode(self.body).decode("ascii")}

    def facts(self) -> dict[str, int | None]:
        """What a log may say of it: never the body, which is the user's and may be large."""
        if self.status is None:
            return {"exit_code": self.exit_code, "signal": self.signal}
        return {"status": self.status, "bytes": len(self.body)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Result:
        """The result in what `as_json` gave; what is not there, or of another kind, is None."""
        found = {name: data.get(name) for name in ("exit_code", "signal", "status")}
        numbers = {name: value if isinstance(value, int) else None for name, value in found.items()}
        body = data.get("body")
        return cls(**numbers, body=base64.b64decode(body) if isinstance(body, str) else b"")


@dataclass(frozen=True)
class Ending:
    """An attempt's end, before the queue is told.

    Attributes:
        outcome: What becomes of the job.
        reason: Why, for people; empty for success.
        result: What the program left.
        whole: Whether the folders may be captured as they are now, or only what had settled before.
        delay: Seconds that the job should rest before the next attempt.
        fruitless: Of a `RELEASE`: nobody told us to stop. Too many of these in a row, with nothing made durable
            meanwhile, fail the job.
        transient: Of a `RETRY`: the same attempt may succeed here in a moment (no connection, 503, a crash).
    """

    outcome: Outcome
    reason: str = ""
    result: Result = field(default_factory=Result)
    whole: bool = False
    delay: float = 0.0
    fruitless: bool = False
    transient: bool = False
