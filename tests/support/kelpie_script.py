"""Kelpie's API without sockets: its table behind the client's one method, in virtual time, with a referee.

Each call can fail before or after it took effect, take time, or be the last thing that its process does.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import anyio

from heeler.local.kelpie_faults import kind_of
from heeler.local.kelpie_model import Submission
from heeler.local.kelpie_rows import Job
from heeler.local.kelpie_table import KelpieTable, NoJobError, user_of
from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import Lease, Machine, SourceUnavailableError
from heeler.sources.kelpie import KelpieSource
from heeler.sources.kelpie_http import NoSuchJobError
from heeler.sources.kelpie_record import JobRecord
from tests.support import kelpie_server
from tests.support.crashing import Fuse
from tests.support.kelpie_server import KEY, KelpieServer

GROUP = "group-1"
INTERVAL = 30
_MORNING = 1_713_552_811
_USER = user_of("lab")

Weather = Literal["", "before", "after"]


@dataclass(frozen=True)
class Called:
    """A call that reached the API, done or not: which, of what job, by whom."""

    kind: str
    job_id: str
    machine: str


@dataclass
class Room:
    """The API and the machines that call it; to be made inside of the event loop.

    Attributes:
        folder: Where state folders and locks are.
        faults: What workers said: event and fields.
        called: What reached the API.
        wrong: What no worker may do.
        weather: Asked of each call whether it fails, and when.
        between: Called before each call takes effect.
        latency: Seconds each way.
    """

    folder: Path
    offset: float = 0.0
    faults: list[tuple[str, dict[str, object]]] = field(default_factory=list)
    called: list[Called] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    weather: Callable[[Called], Weather] = lambda _call: ""
    between: Callable[[Called], Awaitable[None]] | None = None
    latency: Callable[[], float] = lambda: 0.01
    processes: int = 0

    def __post_init__(self) -> None:
        self.table = KelpieTable(clock=lambda: _MORNING + self.offset + anyio.current_time())
        self._reported: set[tuple[str, str]] = set()

    def submit(self, **fields: Any) -> str:
        """Put a job into the queue; its id."""
        document = {"command": "true", "container_group_id": GROUP, "heartbeat_interval": INTERVAL, **fields}
        return str(self.table.create(_USER, Submission.model_validate(document))["id"])

    def job(self, job_id: str) -> Job:
        return self.table.get(_USER, job_id)

    def take(self, machine: str = "other") -> str | None:
        """Take a job as another machine does."""
        job = self.table.work(_USER, machine, GROUP)
        return None if job is None else str(job["id"])

    def heartbeat(self, job_id: str, machine: str = "other") -> str:
        return self.table.heartbeat(_USER, job_id, machine)

    def cancel(self, job_id: str) -> None:
        self.table.cancel(_USER, job_id)

    def calls(self, *kinds: str) -> list[str]:
        """Which calls of these kinds came."""
        return [call.kind for call in self.called if call.kind in kinds]

    def events(self) -> list[str]:
        return [event for event, _ in self.faults]

    def source(
        self, name: str = "one", machine: str = "machine-1", *, claims: str = "", fuse: Fuse | None = None, **more: Any
    ) -> KelpieSource:
        """A new process's source, in the state folder of that name.

        Args:
            name: Of the state folder.
            machine: The machine's id.
            claims: The machine's locks; else those of a process that is alone there.
            fuse: Ends it at one operation.
            more: Settings.
        """
        self.processes += 1
        state = self.folder / name
        state.mkdir(exist_ok=True)
        options = {"kelpie_poll": 1.0, "machine_id": machine, "container_group_id": GROUP, **more}
        request = SourceRequest(
            "kelpie",
            name,
            state,
            settings=Settings(kelpie_api_key="key", kelpie_url="http://kelpie.test", **options),
            on_fault=lambda event, **fields: self.faults.append((event, fields)),
        )
        source = KelpieSource(
            request, rng=random.Random(1), claims_folder=self.folder / (claims or f"claims-{self.processes}")
        )
        source._client = TableClient(self, fuse)  # type: ignore[assignment]
        if fuse is not None:
            _wire(source, fuse)
        return source

    # The API.

    def perform(self, call: Called, path_job: str, body: Mapping[str, str]) -> Any:
        """What the API answers; the referee looks at each report first."""
        machine = body.get("machine_id", "")
        if call.kind in ("completed", "failed"):
            self._judge(call, self.job(path_job), machine)
        if call.kind == "work":
            job = self.table.work(_USER, machine, GROUP)
            return [] if job is None else [job]
        if call.kind == "get":
            return self.job(path_job)
        if call.kind == "heartbeat":
            return {"status": self.heartbeat(path_job, machine)}
        if call.kind == "completed":
            return self.table.completed(_USER, path_job, machine)
        if call.kind == "failed":
            return self.table.failed(_USER, path_job, machine)
        return {"_count": 0, "jobs": []}

    def _judge(self, call: Called, job: Job, machine: str) -> None:
        if job["status"] != "running" or job["machine_id"] != machine:
            self.wrong.append(f"{call}, which is {job['status']} at {job['machine_id']}")
        handed_out = (job["id"], f"{job['started']} {machine}")
        if handed_out in self._reported:
            self.wrong.append(f"{call} a second time")
        self._reported.add(handed_out)


class TableClient:
    """In the place of `KelpieClient`."""

    name = "http://kelpie.test"

    def __init__(self, room: Room, fuse: Fuse | None) -> None:
        self._room = room
        self._fuse = fuse

    async def call(self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Any = None) -> Any:
        found = kind_of(method, path)
        assert found is not None
        told = {**(query or {}), **(body or {})}
        call = Called(*found, told.get("machine_id", ""))
        how = None if self._fuse is None else self._fuse.begin(call.kind)
        weather = self._room.weather(call)
        await anyio.sleep(self._room.latency())
        if self._fuse is not None:
            self._fuse.check()
        if self._room.between is not None:
            await self._room.between(call)
        if weather == "before":
            raise SourceUnavailableError("lost on its way")
        self._room.called.append(call)
        try:
            answer = self._room.perform(call, found[1], told)
        except NoJobError:
            raise NoSuchJobError("no such job") from None
        if self._fuse is not None:
            self._fuse.end(how)
        await anyio.sleep(self._room.latency())
        if weather == "after":
            raise SourceUnavailableError("the answer was lost")
        return answer

    def close(self) -> None:
        return


def _wire(source: KelpieSource, fuse: Fuse) -> None:
    """Have what goes to disk count, too."""
    records = source._records
    save, drop = records.save, records.drop

    async def saving(record: JobRecord) -> None:
        how = fuse.begin("save")
        await save(record)
        fuse.end(how)

    def dropping(job_id: str) -> None:
        how = fuse.begin("drop")
        drop(job_id)
        fuse.end(how)

    records.save, records.drop = saving, dropping  # type: ignore[method-assign]


async def taken(source: KelpieSource, wait: float = 10.0) -> Lease:
    """The next job."""
    lease = await source.receive(wait=wait)
    assert lease is not None
    return lease


def connected(
    server: KelpieServer, folder: Path, *, machine: Machine | None = None, **settings: Any
) -> tuple[KelpieSource, list[tuple[str, dict[str, object]]]]:
    """A source that calls a real server, and what it says of faults; by Kelpie's key unless settings name another."""
    faults: list[tuple[str, dict[str, object]]] = []
    folder.mkdir(exist_ok=True)
    told: dict[str, Any] = {
        "kelpie_url": server.url,
        "kelpie_api_key": KEY,
        "kelpie_poll": 0.1,
        "machine_id": "machine-1",
        "container_group_id": kelpie_server.GROUP,
        **settings,
    }
    request = SourceRequest(
        "kelpie",
        folder.name,
        folder,
        settings=Settings(**told),
        machine=machine,
        on_fault=lambda event, **fields: faults.append((event, fields)),
    )
    return KelpieSource(request, rng=random.Random(1), claims_folder=folder / "claims"), faults
