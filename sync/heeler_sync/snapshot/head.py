"""The head: the one object of a prefix that is ever overwritten, and its data. No I/O here.

It says who holds the prefix (the epoch is the fencing token) and which generations there are. Each write of it has an
id of its own, so that whoever got no clear answer can look whether the write took effect.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from heeler_sync.snapshot.ids import epoch_of
from heeler_sync.snapshot.manifest import FORMAT, UnknownFormatError

T = TypeVar("T")

_WRITES_KEPT = 8
_MAX_ADOPTED = 100_000


@dataclass(frozen=True)
class Kept:
    """A generation that the head lists.

    Attributes:
        generation: Its number.
        run_id: The run that committed it.
        manifest: The manifest's id.
        digest: BLAKE3 of the manifest object's bytes, 64 hex digits.
        created: Seconds since 1970; for people only.
        files: How many files it holds.
        bytes: Their size.
    """

    generation: int
    run_id: str
    manifest: str
    digest: str
    created: float
    files: int
    bytes: int


@dataclass(frozen=True)
class Head:
    """What the object says.

    Attributes:
        job_id: The job that the prefix belongs to; empty for nobody's.
        run_id: Tells runs of one job apart (`heeler submit --fresh`).
        attempt: The attempt that holds it.
        epoch: The fencing token: one more with each acquire.
        holder: Who holds it; for people.
        acquired: Since when, seconds since 1970; for people.
        generation: The newest generation's number; 0 before the first.
        kept: The generations that can be restored, oldest first.
        adopted: Packs of an interrupted commit that no manifest names yet and that must stay.
        status: "open", or "complete" once the job is done.
        result: What a complete job left.
        failures: Attempts that failed and counted.
        interruptions: Attempts that ended without counting.
        writes: The ids of the last writes, newest last.
        written: When, seconds since 1970; for people.
    """

    job_id: str
    run_id: str
    attempt: int
    epoch: int
    holder: str
    acquired: float
    generation: int = 0
    kept: tuple[Kept, ...] = ()
    adopted: tuple[str, ...] = ()
    status: str = "open"
    result: Mapping[str, Any] | None = None
    failures: int = 0
    interruptions: int = 0
    writes: tuple[str, ...] = field(default=())
    written: float = 0.0

    def signed(self, now: float) -> Head:
        """The head as it is to be written now: with a new write id."""
        writes = (*self.writes, secrets.token_hex(8))[-_WRITES_KEPT:]
        return replace(self, writes=writes, written=now)

    @property
    def complete(self) -> bool:
        """Whether the job is done."""
        return self.status == "complete"

    def is_of(self, job_id: str, run_id: str) -> bool:
        """Whether it speaks of this run of this job."""
        return (self.job_id, self.run_id) == (job_id, run_id)


def encode_head(head: Head) -> bytes:
    """The object's bytes."""
    return json.dumps({"format": FORMAT, **asdict(head)}, indent=1).encode("ascii") + b"\n"


def decode_head(data: bytes) -> Head:
    """The head in an object's bytes.

    Raises:
        UnknownFormatError: It was written by a newer heeler.
        ValueError: It is damaged.
    """
    try:
        document = json.loads(data)
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 - one kind of error for what comes from outside
    if document.pop("format", None) != FORMAT:
        raise UnknownFormatError("the head", json.loads(data).get("format"))
    try:
        kept = tuple(_checked(Kept(**entry)) for entry in document.pop("kept"))
        adopted, writes = tuple(document.pop("adopted")), tuple(document.pop("writes"))
        head = _checked(Head(kept=kept, adopted=adopted, writes=writes, **document))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"is not as it should be: {error}") from None
    _check(head)
    return head


_KINDS: Mapping[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "Mapping[str, Any] | None": (dict, type(None)),
}


def _checked(entry: T) -> T:
    for part in fields(entry):  # type: ignore[arg-type]
        kind = _KINDS.get(str(part.type))
        value = getattr(entry, part.name)
        if kind is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"its {part.name} is {value!r}")
    return entry


def _check(head: Head) -> None:
    numbers = [kept.generation for kept in head.kept]
    if head.epoch < 1 or head.generation < 0 or numbers != sorted(set(numbers)) or numbers[:1] == [0]:
        raise ValueError("its numbers can't be")
    if numbers and head.generation < numbers[-1]:
        raise ValueError("it lists a generation that is newer than its newest")
    if head.status not in ("open", "complete"):
        raise ValueError(f"its status is {head.status!r}")
    if not all(isinstance(pack, str) and epoch_of(pack) for pack in head.adopted[:_MAX_ADOPTED]):
        raise ValueError("an adopted pack's id is none")
    if not all(epoch_of(kept.manifest) for kept in head.kept):
        raise ValueError("a manifest's id is none")
    if not head.writes or not all(isinstance(write, str) for write in head.writes):
        raise ValueError("it has no write id")
