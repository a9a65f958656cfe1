"""The sources that the contract suite runs against, each behind one face: submit, look, expire, cancel."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from heeler.config import Settings
from heeler.local.queue_model import JobStatus
from heeler.sources import SourceRequest
from heeler.sources.base import LeaseState, Source
from heeler.sources.local import LocalDesk, LocalSource
from heeler.sources.local_table import JobTable
from heeler.sources.once import once_of_document
from heeler.sources.salad import SaladSource
from heeler.wire.salad_queue import TRIES
from tests.support.salad import SaladService
from tests.support.salad_script import StubMachine
from tests.support.virtual_time import VIRTUAL


class Clock:
    """Wall time of the test's own."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


class SourceWorld(Protocol):
    """A queue with `jobs` in it, from outside.

    Attributes:
        backend: What tests of it run on; virtual time, unless others than us speak on sockets.
        moment: Seconds in which what comes at once has come.
        many: Whether it can hold more than one job.
        lapses: Whether a lease can lapse.
        reclaims: Whether what a dead worker held is given to others by its name; else only who restarts has it.
        cancels: What the holder of a job learns that is cancelled from outside; None if none can be.
        tries: None if failures are counted as the job asks, nothing else is counted, and rests are kept. Else every
            end but success spends one of so many tries, without a rest.
    """

    backend: object
    moment: float
    many: bool
    lapses: bool
    reclaims: bool
    cancels: LeaseState | None
    tries: int | None

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        """Add a job; its id."""

    def worker(self) -> Source:
        """A (further) worker's source."""

    def restarted(self, worker: Source) -> Source:
        """The source of a new process in the place of that worker's, which is dead."""

    def pass_time(self, seconds: float) -> None:
        """Let wall time pass, in which no worker reaches the queue."""

    def cancel(self, job_id: str) -> None:
        """Cancel a job from outside."""

    def state(self, job_id: str) -> tuple[str, int]:
        """The job's state (pending, running, done, failed, cancelled) and its counted ends."""

    def close(self) -> None:
        """Let go of everything."""


def _document(job_id: str, max_failures: int) -> bytes:
    return json.dumps({"id": job_id, "command": "true", "max_failures": max_failures}).encode()


class LocalWorld(SourceWorld):
    """`local:FOLDER`."""

    backend, moment = VIRTUAL, 1.0
    many, lapses, reclaims, cancels, tries = True, True, True, LeaseState.CANCELLED, None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = Clock()
        self._desk = self._with_clock(LocalDesk(folder))
        self._sources: list[LocalSource] = []

    def _with_clock(self, holder: LocalDesk) -> LocalDesk:
        holder._table.close()
        holder._table = JobTable(self._folder, self._clock)
        return holder

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        return self._desk.submit([_document(name, max_failures)])[0]

    def worker(self) -> Source:
        source = LocalSource(self._folder, f"w{len(self._sources)}")
        source._table.close()
        source._table = JobTable(self._folder, self._clock)
        self._sources.append(source)
        return source

    def restarted(self, worker: Source) -> Source:
        return self.worker()

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    def cancel(self, job_id: str) -> None:
        assert self._desk.cancel(job_id)

    def state(self, job_id: str) -> tuple[str, int]:
        found = self._desk.show(job_id)
        assert found is not None
        return found.state, found.failures

    def close(self) -> None:
        self._desk.close()


class OnceWorld(SourceWorld):
    """`once`: a restarted worker is the only second one there can be."""

    backend, moment = VIRTUAL, 1.0
    many, lapses, reclaims, cancels, tries = False, False, False, None, None

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = Clock()
        self._body = b""

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        self._body = _document(name, max_failures)
        return name

    def worker(self) -> Source:
        return once_of_document(self._body, self._folder, self._clock)

    def restarted(self, worker: Source) -> Source:
        return self.worker()

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    def cancel(self, job_id: str) -> None:
        raise NotImplementedError

    def state(self, job_id: str) -> tuple[str, int]:
        record = json.loads((self._folder / "once.json").read_text())
        return record["state"], record["failures"]

    def close(self) -> None:
        return


class SaladWorld(SourceWorld):
    """`salad`, against the rules of `heeler.local`, which run in a thread of their own and in real time."""

    backend, moment = "asyncio", 0.3
    many, lapses, reclaims, cancels, tries = True, True, False, LeaseState.LOST, TRIES

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._salad = SaladService(heartbeat=0.2)
        self._salad.__enter__()
        self._late = 0.0
        self._salad.state._monotonic = lambda: time.monotonic() + self._late
        self._places: dict[int, tuple[Path, StubMachine]] = {}

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        return self._salad.submit(_document(name, max_failures))

    def worker(self) -> Source:
        name = f"machine-{len(self._places) + 2}"
        folder = self._folder / name
        folder.mkdir()
        return self._source(folder, StubMachine(self._salad.add_machine(name).token()))

    def restarted(self, worker: Source) -> Source:
        return self._source(*self._places[id(worker)])

    def _source(self, folder: Path, machine: StubMachine) -> Source:
        settings = Settings(salad_endpoint=self._salad.endpoint, salad_use_tls=False)
        source = SaladSource(SourceRequest("salad", folder.name, folder, settings=settings, machine=machine))
        self._places[id(source)] = folder, machine
        return source

    def pass_time(self, seconds: float) -> None:
        def passes() -> None:
            self._salad._server.drop_streams()
            self._late += seconds
            self._salad.state.lapse()

        self._salad.call(passes)

    def cancel(self, job_id: str) -> None:
        self._salad.cancel(job_id)

    def state(self, job_id: str) -> tuple[str, int]:
        job = self._salad.job(job_id)
        state = "done" if job.status is JobStatus.SUCCEEDED else job.status.value
        return state, job.tries - (state in ("running", "done"))

    def close(self) -> None:
        self._salad.__exit__(None, None, None)


WORLDS: dict[str, Callable[[Path], SourceWorld]] = {"local": LocalWorld, "once": OnceWorld, "salad": SaladWorld}
