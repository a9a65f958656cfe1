"""What a worker has of Kelpie's jobs, on disk: a file each, so that the process that comes after goes on with them.

The API hands a job out again only after its worker was silent for two heartbeats. Until then it is ours to go on with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from heeler.sources.base import SourceUnavailableError
from heeler.sources.kelpie_claims import Claim
from heeler.sources.kelpie_job import Row
from heeler.sources.salad_record import DamagedRecordError, decode, replace_file

COMPLETED, FAILED = "completed", "failed"
_SUFFIX = ".job"
_KEPT = 100
"""Of jobs that were put back: what is known of older ones is forgotten."""


@dataclass(frozen=True)
class JobRecord:
    """A job that is or was ours.

    Attributes:
        data: The job as the API told it when we took it.
        machine_id: Who we were to the API.
        started: When it was handed out to us, as the API writes times; "" until that is known, and nothing was begun.
        restarts: How often it was started here before this time.
        barren: Attempts in a row, this one included, without an answer or anything made durable.
        verdict: What the API is to be told, once that is decided: completed, failed or "".
        released: Whether it was put back: nobody works on it here.
    """

    data: dict[str, Any] = field(repr=False)
    machine_id: str
    started: str = ""
    restarts: int = 0
    barren: int = 1
    verdict: str = ""
    released: bool = False

    @property
    def row(self) -> Row:
        """The job as the API told it when we took it."""
        return Row.of(self.data)

    def again(self) -> JobRecord:
        """As it is when it is started once more."""
        if not self.started:
            return self
        return replace(self, released=False, restarts=self.restarts + 1, barren=self.barren + 1)

    def after(self, earlier: JobRecord) -> JobRecord:
        """As it is when it was here before."""
        again = earlier.again()
        return replace(self, restarts=again.restarts, barren=again.barren)


@dataclass(eq=False)
class Held:
    """A job that is ours, as far as we know.

    Attributes:
        record: The job; it is kept on disk.
        claim: Our lock of it among the workers of this machine.
        lost: It is not ours any more.
        asked_at: When the last heartbeat that was answered was sent, by the book's clock.
        doubtful: A heartbeat may have got no answer since.
        strange_since: Since when the API tells of a hand-out to this machine that we know nothing of.
        tried: A report may have taken effect, though no answer came.
        settled: The API has our report, or nobody wants one.
        dropped: Nothing of it is to be on disk.
        beats: Heartbeats that were answered.
        guard: One report at a time.
        writing: One change of the file at a time.
    """

    record: JobRecord
    claim: Claim
    lost: bool = False
    asked_at: float = 0.0
    doubtful: bool = False
    strange_since: float | None = None
    tried: bool = False
    settled: bool = False
    dropped: bool = False
    beats: int = 0
    guard: anyio.Lock = field(default_factory=anyio.Lock)
    writing: anyio.Lock = field(default_factory=anyio.Lock)

    @property
    def id(self) -> str:
        """The job."""
        return self.record.row.id


class Records:
    """The files. `on_fault` is told of what can't be read or written: the job goes on without them."""

    def __init__(self, folder: Path, on_fault: Callable[..., None]) -> None:
        self._folder = folder
        self._on_fault = on_fault

    def load_all(self) -> list[JobRecord]:
        """Those of earlier processes, the newest first; damaged ones are told of and left out."""
        return [record for path in self._paths() if (record := self._load(path)) is not None]

    def load(self, job_id: str) -> JobRecord | None:
        """That of one job."""
        path = self._path(job_id)
        return self._load(path) if path.exists() else None

    async def save(self, record: JobRecord) -> None:
        """Keep it, on disk before anything follows from it."""
        fields = asdict(record)
        body = json.dumps(fields.pop("data")).encode()

        def write() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            replace_file(self._path(record.row.id), fields, body)

        try:
            await anyio.to_thread.run_sync(write)
        except OSError as error:
            self._failed(self._path(record.row.id), error)

    def drop(self, job_id: str) -> None:
        """It is no longer of use."""
        path = self._path(job_id)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._failed(path, error)

    def prune(self) -> None:
        """Forget the oldest of too many that nobody works on, and whose verdict nobody waits for."""
        for path in self._paths()[_KEPT:]:
            record = self._load(path)
            if record is None or record.released:
                self.drop(path.name.removesuffix(_SUFFIX))

    def _path(self, job_id: str) -> Path:
        return self._folder / f"{job_id}{_SUFFIX}"

    def _paths(self) -> list[Path]:
        def ages() -> Iterator[tuple[float, Path]]:
            for path in self._folder.glob(f"*{_SUFFIX}"):
                try:
                    yield path.stat().st_mtime, path
                except OSError:  # gone meanwhile
                    continue

        return [path for _, path in sorted(ages(), reverse=True)]

    def _load(self, path: Path) -> JobRecord | None:
        try:
            fields, body = decode(path.read_bytes())
            record = JobRecord(json.loads(body), **fields)
            if record.row.id == path.name.removesuffix(_SUFFIX):
                return record
            self._on_fault("record_damaged", path=str(path), error="it is another job's")
        except (DamagedRecordError, SourceUnavailableError, KeyError, TypeError, ValueError) as error:
            self._on_fault("record_damaged", path=str(path), error=str(error) or type(error).__name__)
        except OSError as error:
            self._failed(path, error)
        return None

    def _failed(self, path: Path, error: OSError) -> None:
        self._on_fault("record_failed", path=str(path), error=error.strerror or str(error))
