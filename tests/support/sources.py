"""The sources that the contract suite runs against, each behind one face: submit, look, expire, cancel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from heeler.sources.base import Source
from heeler.sources.local import LocalDesk, LocalSource
from heeler.sources.local_table import JobTable
from heeler.sources.once import OnceSource


class Clock:
    """Wall time of the test's own."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class SourceWorld(Protocol):
    """A queue with `jobs` in it, from outside.

    Attributes:
        many: Whether it can hold more than one job.
        cancels: Whether jobs can be cancelled from outside.
        lapses: Whether a lease can lapse.
    """

    many: bool
    cancels: bool
    lapses: bool

    def submit(self, job_id: str, *, max_failures: int = 3) -> None:
        """Add a job."""

    def worker(self) -> Source:
        """A (further) worker's source."""

    def pass_time(self, seconds: float) -> None:
        """Let wall time pass."""

    def cancel(self, job_id: str) -> None:
        """Cancel a job from outside."""

    def state(self, job_id: str) -> tuple[str, int]:
        """The job's state (pending, running, done, failed, cancelled) and its counted failures."""


def _document(job_id: str, max_failures: int) -> bytes:
    return json.dumps({"id": job_id, "command": "true", "max_failures": max_failures}).encode()


class LocalWorld:
    """`local:FOLDER`."""

    many, cancels, lapses = True, True, True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = Clock()
        self._desk = self._with_clock(LocalDesk(folder))
        self._sources: list[LocalSource] = []

    def _with_clock(self, holder: LocalDesk) -> LocalDesk:
        holder._table.close()
        holder._table = JobTable(self._folder, self._clock)
        return holder

    def submit(self, job_id: str, *, max_failures: int = 3) -> None:
        self._desk.submit([_document(job_id, max_failures)])

    def worker(self) -> Source:
        source = LocalSource(self._folder, f"w{len(self._sources)}")
        source._table.close()
        source._table = JobTable(self._folder, self._clock)
        self._sources.append(source)
        return source

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    def cancel(self, job_id: str) -> None:
        assert self._desk.cancel(job_id)

    def state(self, job_id: str) -> tuple[str, int]:
        found = self._desk.show(job_id)
        assert found is not None
        return found.state, found.failures


class OnceWorld:
    """`once`: a restarted worker is the only second one there can be."""

    many, cancels, lapses = False, False, False

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = Clock()
        self._body = b""

    def submit(self, job_id: str, *, max_failures: int = 3) -> None:
        self._body = _document(job_id, max_failures)

    def worker(self) -> Source:
        return OnceSource(self._body, self._folder, self._clock)

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    def cancel(self, job_id: str) -> None:
        raise NotImplementedError

    def state(self, job_id: str) -> tuple[str, int]:
        record = json.loads((self._folder / "once.json").read_text())
        return record["state"], record["failures"]


WORLDS: dict[str, Callable[[Path], SourceWorld]] = {"local": LocalWorld, "once": OnceWorld}
