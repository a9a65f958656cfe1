"""The documents of Kelpie's API (PROTOCOLS.md 3): what may be submitted, and what a worker says of itself.

As strict as the API: fields that it does not know are dropped at every level, and null is no way to leave one out.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic_core import PydanticCustomError

Status: TypeAlias = Literal["pending", "running", "completed", "canceled", "failed"]
BATCH = 1000
"""The most jobs of one call."""
_INTEGER = (1 << 53) - 1
"""The largest number that JavaScript counts to."""

T = TypeVar("T")


def _with_slash(prefix: str) -> str:
    return prefix if prefix.endswith("/") else prefix + "/"


def _given(value: Any) -> Any:
    if value is None:
        raise PydanticCustomError("null_type", "Expected a value, received null")
    return value


_Prefix: TypeAlias = Annotated[str, AfterValidator(_with_slash)]
_Count: TypeAlias = Annotated[int, Field(ge=1, le=_INTEGER)]
_Maybe: TypeAlias = Annotated[T | None, BeforeValidator(_given)]
"""A field that may be left out, but not be null."""


class _Document(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class SyncEntry(_Document):
    """A folder and its place in storage."""

    bucket: str
    prefix: _Prefix
    local_path: str
    direction: Literal["download", "upload"]
    pattern: _Maybe[str] = None


class Sync(_Document):
    """What is synced when."""

    before: _Maybe[list[SyncEntry]] = None
    during: _Maybe[list[SyncEntry]] = None
    after: _Maybe[list[SyncEntry]] = None


class Submission(_Document):
    """A job as it is submitted."""

    command: str
    arguments: list[str] = []
    environment: dict[str, str] = {}
    input_bucket: _Maybe[str] = None
    input_prefix: _Maybe[_Prefix] = None
    checkpoint_bucket: _Maybe[str] = None
    checkpoint_prefix: _Maybe[_Prefix] = None
    output_bucket: _Maybe[str] = None
    output_prefix: _Maybe[_Prefix] = None
    max_failures: _Count = 3
    heartbeat_interval: _Count = 30
    webhook: _Maybe[str] = None
    container_group_id: str
    compression: bool = False
    sync: _Maybe[Sync] = None

    def fields(self) -> dict[str, Any]:
        """Every field as a job shows it: null if it was left out, while a `sync` has only what was given."""
        sync = None if self.sync is None else self.sync.model_dump(exclude_none=True)
        return {**self.model_dump(exclude={"sync"}), "sync": sync}


class Worker(_Document):
    """Who reports."""

    machine_id: str
    container_group_id: str


SUBMISSION = TypeAdapter(Submission)
SUBMISSIONS = TypeAdapter(Annotated[list[Submission], Field(min_length=1, max_length=BATCH)])
WORKER = TypeAdapter(Worker)
