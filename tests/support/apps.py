"""An app and all around it, scripted: for tests of how jobs are delivered, in virtual time and without processes."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import cast

import anyio

from heeler.app.base import Assignment
from heeler.app.http import HttpDelivery, HttpSettings
from heeler.app.process import Child, Exit, Started
from heeler.app.program import Life, Program, ProgramSettings
from heeler.app.readiness import Address, Readiness
from heeler.drain import Drain
from heeler.http import Answer, HttpClient
from heeler.job import Ending, Job

CALL = Mapping[str, object]


class Register:
    """Keeps nothing."""

    def started(self, process: Started) -> None:
        return

    def ended(self, process: Started) -> None:
        return

    def stuck(self, process: Started, pids: object) -> None:
        return


class Told:
    """Events and faults, in order."""

    def __init__(self) -> None:
        self.all: list[tuple[str, dict[str, object]]] = []

    def __call__(self, name: str, **fields: object) -> None:
        self.all.append((name, fields))

    def names(self) -> list[str]:
        return [name for name, _ in self.all]

    def of(self, wanted: str) -> list[dict[str, object]]:
        return [fields for name, fields in self.all if name == wanted]


class FakeChild:
    """A process that ends `obeys` seconds after SIGTERM with `exit`, at once when killed, and when told to."""

    def __init__(self, obeys: float | None = 0.0, exit: Exit | None = None) -> None:
        self.obeys = obeys
        self.exit = exit or Exit(0, None)
        self.stuck = False
        self.started = Started(0, 0, "no such tag")
        self.told: list[tuple[str, float]] = []
        self.terminated = anyio.Event()
        self.life: Life

    def terminate(self) -> None:
        self.told.append(("TERM", anyio.current_time()))
        self.terminated.set()

    async def kill(self) -> None:
        self.told.append(("KILL", anyio.current_time()))
        self.end(Exit(None, 9))

    def end(self, how: Exit) -> None:
        if self.life.how is None:
            self.life.how = how
            self.life.over.set()

    async def run(self) -> None:
        await self.terminated.wait()
        if self.obeys is not None:
            await anyio.sleep(self.obeys)
            self.end(self.exit)


class FakeProgram(Program):
    """A program without a process; `calls` has what was asked of it, with the time."""

    def __init__(self, child: FakeChild | None = None) -> None:
        super().__init__(
            ProgramSettings(["x"], {}, Path("/nowhere"), 1), Register(), Drain(30.0), Told(), Told(), random.Random(1)
        )
        self.calls: list[str] = []
        self.child = child or FakeChild()
        self.stop_seconds = 0.0
        self.begin()

    def begin(self) -> None:
        self.life = self.child.life = Life(cast(Child, self.child))

    async def run(self) -> None:
        await self.child.run()

    def proved(self) -> None:
        self.calls.append("proved")

    async def stop(self, grace: float = 10.0) -> None:
        self.calls.append(f"stop {grace:g}")
        self.child.end(Exit(None, 9))
        self.life = None

    async def restart(self) -> None:
        self.calls.append("restart")
        await anyio.sleep(self.stop_seconds)
        self.child.end(Exit(None, 15))
        self.begin()
        self._tell()


Script = Callable[[CALL], Awaitable[Answer]]


class FakeClient(HttpClient):
    """Connections that give what the script gives; `calls` has what was sent."""

    def __init__(self, script: Script) -> None:
        super().__init__("nowhere", 1)
        self.calls: list[CALL] = []
        self._script = script

    async def call(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: bytes = b"",
        silence: float | None = None,
        limit: int = 1 << 20,
    ) -> Answer:
        call = {
            "method": method, "path": path, "headers": headers, "body": body, "silence": silence, "limit": limit,
        }  # fmt: skip
        self.calls.append(call)
        await anyio.lowlevel.checkpoint()
        return await self._script(call)


class FakeReadiness(Readiness):
    """Ready unless a test says otherwise; a look finds a living program ready that was not spoiled."""

    def __init__(self, program: Program | None, script: Script, *, address: Address | None = None) -> None:
        self.told = Told()
        super().__init__(program, address or Address("app", 80, "/base"), None, self.told, self.told)
        self.fake = FakeClient(script)
        self.asked: list[Address] = []
        self.why: str | None = None
        self.looks = 0
        self._note(ready=True, why="")

    def client(self, address: Address) -> HttpClient:
        self.asked.append(address)
        return self.fake

    async def _ask(self, address: Address) -> str | None:
        self.looks += 1
        await anyio.lowlevel.checkpoint()
        return self.why

    def set(self, *, ready: bool) -> None:
        self.why = None if ready else "the test says so"
        self._note(ready=ready, why="the test says so")


class Delivered:
    """A delivery among fakes."""

    def __init__(self, script: Script, child: FakeChild | None = None, *, ours: bool = True, **settings: float) -> None:
        self.program = FakeProgram(child) if ours else None
        self.readiness = FakeReadiness(self.program, script)
        given: dict[str, float] = {"start_timeout": 60.0, "silence": 50.0, "timeout": 100.0, **settings}
        self.delivery = HttpDelivery(
            HttpSettings(
                path="/jobs",
                start_timeout=given["start_timeout"],
                silence=given["silence"],
                timeout=given["timeout"],
                answer_bytes=1000,
            ),
            self.program,
            self.readiness,
            lambda: 1_000_000.0,
        )
        self.drain = Drain(30.0)
        self.reserve = 3.0
        self.ended: list[float] = []

    @property
    def sent(self) -> list[CALL]:
        return self.readiness.fake.calls

    def assignment(self, job: Job | None = None, environment: Mapping[str, str] | None = None) -> Assignment:
        async def reserve() -> float:
            await anyio.lowlevel.checkpoint()
            return self.reserve

        return Assignment(
            job or Job("job-1", b"body"), 2, environment or {}, reserve, lambda: self.ended.append(anyio.current_time())
        )

    async def deliver(self, job: Job | None = None, environment: Mapping[str, str] | None = None) -> Ending:
        """One job, with what goes on beside it."""
        ending = None
        async with anyio.create_task_group() as group:
            group.start_soon(self.delivery.run)
            ending = await self.delivery.deliver(self.assignment(job, environment), self.drain)
            group.cancel_scope.cancel()
        assert ending is not None
        return ending
