"""The sources that the contract suite runs against, each behind one face: submit, look, expire, cancel."""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import anyio

from heeler.local.queue_model import JobStatus
from heeler.records.announce import Announcer
from heeler.records.lease import Context
from heeler.records.record import Record, decode_record, encode_record
from heeler.records.source import RecordedSource
from heeler.records.store import RecordStore
from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import LeaseState, Source
from heeler.sources.kelpie import KelpieSource
from heeler.sources.local import LocalDesk, LocalSource
from heeler.sources.local_table import JobTable
from heeler.sources.once import once_of_document
from heeler.sources.salad import SaladSource
from heeler.sources.sqs import SqsSource
from heeler.webhook import Webhooks
from heeler.wire.salad_queue import TRIES
from heeler_sync.store.memory import MemoryStore
from tests.support import kelpie_server
from tests.support.kelpie_server import KelpieServer
from tests.support.salad import SaladService
from tests.support.salad_script import StubMachine
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer
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
        reclaims: Whether what a dead worker held is given to others by its name.
        heirs: Whether who restarts in a dead worker's place has what it held.
        tells: Whether a holder hears of its loss without asking.
        cancels: What the holder of a job learns that is cancelled from outside; None if none can be.
        counts: Whether every delivery counts that did not end well, not only failures.
        numbers: Whether the queue numbers deliveries; else each worker does so for itself.
        tries: None if a job may fail as often as it asks for, and rests are kept. Else every end but success spends
            one of so many tries, without a rest.
        told: Whether the queue is told that a job was given back, and so gives it out again; that nothing more is
            heard of it is all that the others go by, and who failed with it never has it again.
        makes_ids: Whether it makes the ids of jobs, whatever they say.
    """

    backend: object
    moment: float
    many: bool
    lapses: bool
    reclaims: bool
    heirs: bool
    tells: bool
    cancels: LeaseState | None
    counts: bool
    numbers: bool
    tries: int | None
    told: bool = True
    makes_ids: bool = False

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        """Add a job; its id."""

    def worker(self) -> Source:
        """A (further) worker's source."""

    def restarted(self, worker: Source) -> Source:
        """The source of a new process in the place of that worker's, which is dead."""

    def pass_time(self, seconds: float) -> None:
        """Let wall time pass, in which no worker reaches the queue."""

    def forget_workers(self) -> None:
        """All workers are gone: what one of them asked for, and the queue has not heard yet, it never hears."""

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
    heirs, tells, counts, numbers = False, False, False, True

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
    heirs, tells, counts, numbers = True, False, False, True

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
    heirs, tells, counts, numbers = True, True, True, False

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

    def forget_workers(self) -> None:
        self._salad.expire_tokens()  # else a stream may be opened now, for a job that nobody takes

    def cancel(self, job_id: str) -> None:
        self._salad.cancel(job_id)

    def state(self, job_id: str) -> tuple[str, int]:
        job = self._salad.job(job_id)
        state = "done" if job.status is JobStatus.SUCCEEDED else job.status.value
        return state, job.tries - (state in ("running", "done"))

    def close(self) -> None:
        self._salad.__exit__(None, None, None)


@functools.cache
def _sqs_server() -> SqsServer:
    """One for all worlds, since it takes a second to start."""
    server = SqsServer().__enter__()
    atexit.register(server.__exit__)
    return server


class SqsWorld(SourceWorld):
    """`sqs`, against moto with its own rules and a clock that we move. Each world has queues of its own."""

    backend, moment = "asyncio", 0.3
    many, lapses, reclaims, tries = True, True, False, None
    cancels: LeaseState | None = None
    heirs, tells, counts, numbers = True, False, True, True
    _numbers = itertools.count()

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._server = _sqs_server()
        number = next(self._numbers)
        self._dead = self._server.queue(f"dead-{number}")
        self._queue = self._server.queue(f"jobs-{number}")
        self._late = 0.0
        self._places: dict[int, Path] = {}

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        self._server.client.send_message(QueueUrl=self._queue, MessageBody=_document(name, max_failures).decode())
        return name

    def worker(self) -> Source:
        folder = self._folder / f"w{len(self._places)}"
        folder.mkdir()
        return self._source(folder)

    def restarted(self, worker: Source) -> Source:
        return self._source(self._places[id(worker)])

    def _source(self, folder: Path) -> Source:
        settings = Settings(
            sqs_queue_url=self._queue,
            sqs_dlq_url=self._dead,
            sqs_region=REGION,
            sqs_access_key_id=KEY,
            sqs_secret_access_key=SECRET,
        )
        request = SourceRequest("sqs", folder.name, folder, settings=settings)
        source = SqsSource(request, clock=lambda: time.monotonic() + self._late)
        self._places[id(source)] = folder
        return source

    def pass_time(self, seconds: float) -> None:
        self._late += seconds
        self._server.pass_time(seconds)

    def cancel(self, job_id: str) -> None:
        raise NotImplementedError

    def state(self, job_id: str) -> tuple[str, int]:
        """Who is hidden for longer than any rest in the suite is with a worker."""
        for message in self._server.messages(self._queue):
            if json.loads(message["body"])["id"] == job_id:
                running = message["hidden"] > 55
                return ("running" if running else "pending"), message["receives"] - running
        for message in self._server.messages(self._dead):
            if json.loads(message["body"])["id"] == job_id:
                return "failed", int(message["attributes"]["heeler-attempts"])
        return "done", 0

    def close(self) -> None:
        return


def _nobody(_name: str, **_fields: object) -> None:
    return


class RecordedSqsWorld(SqsWorld):
    """`sqs` with records of its jobs in a bucket."""

    cancels, counts = LeaseState.CANCELLED, False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._store = MemoryStore()
        self._records = RecordStore(lambda: self._store, "r/")

    def _wall(self) -> float:
        return time.time() + self._late

    def _source(self, folder: Path) -> Source:
        bare = super()._source(folder)
        assert isinstance(bare, SqsSource)
        announcer = Announcer(Webhooks(None), None, self._wall, _nobody)
        context = Context(self._records, announcer, self._wall, _nobody, _nobody)
        source = RecordedSource(bare, context, folder.name, documents=True)
        self._places[id(source)] = folder
        return source

    def _record(self, job_id: str) -> tuple[str, Record | None]:
        key = self._records.key(job_id)
        data = self._store.objects().get(key)
        return key, None if data is None else decode_record(data)

    def cancel(self, job_id: str) -> None:
        key, record = self._record(job_id)
        assert record is not None
        self._put(key, record.cancelled(self._wall()))

    def _put(self, key: str, record: Record) -> None:
        """From outside of the test's event loop."""
        with ThreadPoolExecutor(1) as threads:
            threads.submit(lambda: anyio.run(self._store.put, key, encode_record(record.signed()))).result()

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        self._put(self._records.key(name), Record(name, "", "pending", self._wall()))
        return super().submit(name, max_failures=max_failures)

    def state(self, job_id: str) -> tuple[str, int]:
        record = self._record(job_id)[1]
        return ("pending", 0) if record is None else (record.state, record.failures)


class KelpieWorld(SourceWorld):
    """`kelpie`, against the local API, whose clock we move. Each worker is a machine of its own."""

    backend, moment = VIRTUAL, 1.0
    many, lapses, reclaims, cancels, tries, told = True, True, False, LeaseState.CANCELLED, None, False
    heirs, tells, counts, numbers, makes_ids = True, False, False, False, True

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = Clock()
        self._server = KelpieServer(clock=self._clock)
        self._server.__enter__()
        self._places: dict[int, Path] = {}
        self._machines, self._processes = itertools.count(), itertools.count()

    def submit(self, name: str, *, max_failures: int = 3) -> str:
        return self._server.submit("true", max_failures=max_failures, heartbeat_interval=20)

    def worker(self) -> Source:
        folder = self._folder / f"machine-{next(self._machines)}"
        folder.mkdir()
        return self._source(folder)

    def restarted(self, worker: Source) -> Source:
        return self._source(self._places[id(worker)])

    def _source(self, folder: Path) -> Source:
        """A process's locks end with it: each has a room of its own for them."""
        settings = Settings(
            kelpie_url=self._server.url,
            kelpie_api_key=kelpie_server.KEY,
            kelpie_poll=0.4,
            machine_id=folder.name,
            container_group_id=kelpie_server.GROUP,
        )
        request = SourceRequest("kelpie", folder.name, folder, settings=settings)
        source = KelpieSource(
            request,
            clock=lambda: anyio.current_time() + self._clock.now,
            claims_folder=self._folder / f"claims-{next(self._processes)}",
        )
        self._places[id(source)] = folder
        return source

    def pass_time(self, seconds: float) -> None:
        self._clock.now += seconds

    def cancel(self, job_id: str) -> None:
        self._server.table.cancel(self._server.user, job_id)

    def state(self, job_id: str) -> tuple[str, int]:
        job = self._server.job(job_id)
        state = {"completed": "done", "canceled": "cancelled"}.get(job["status"], job["status"])
        return str(state), job["num_failures"]

    def close(self) -> None:
        self._server.__exit__(None, None, None)


WORLDS: dict[str, Callable[[Path], SourceWorld]] = {
    "kelpie": KelpieWorld,
    "local": LocalWorld,
    "once": OnceWorld,
    "salad": SaladWorld,
    "sqs": SqsWorld,
    "sqs with records": RecordedSqsWorld,
}
