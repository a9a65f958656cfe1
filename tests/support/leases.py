"""Leases, sources, deliveries and files that do what a test scripted: small real implementations of the protocols.

Each keeps what it was asked in `calls`, with the time where that matters. An entry of a script is a value to return,
an exception to raise, or `HANG`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio

from heeler.app.base import Assignment, GivenUp
from heeler.checkpoints import Generation
from heeler.drain import Drain
from heeler.job import Ending, Job, Outcome, Result
from heeler.scopes import Signal
from heeler.sources.base import Lease, LeaseState, SourceUnavailableError, Verdict

HANG = object()
"""In a script: never answer."""

OUT_OF_REACH = SourceUnavailableError("out of reach")

Hook = Callable[[], Awaitable[None]]


async def _play(entry: object) -> Any:
    if entry is HANG:
        await anyio.sleep_forever()
    if isinstance(entry, BaseException):
        raise entry
    return entry


class ScriptedLease:
    """A lease whose queue answers as scripted, then HELD and OK for ever."""

    def __init__(
        self,
        *,
        job: Job | None = None,
        attempt: int = 1,
        expires_after: float = 30.0,
        answers: Sequence[object] = (),
        settle_answers: Sequence[object] = (),
    ) -> None:
        self.job = job or Job("job-1", b"{}")
        self.attempt = attempt
        self.attempts_ordered = True
        self.extend_every: float | None = None
        self.spends_tries = False
        self.heard: Callable[[], None] = lambda: None
        self.expires_after = expires_after
        self.answers = list(answers)
        self.settle_answers = list(settle_answers)
        self.extended: list[float] = []
        self.progress: list[bool] = []
        self.settled: list[tuple[str, dict[str, Any]]] = []
        self.tries: list[float] = []

    def listen(self, heard: Callable[[], None]) -> None:
        self.heard = heard

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        self.extended.append(anyio.current_time())
        self.progress.append(progressed)
        await anyio.lowlevel.checkpoint()
        answer: LeaseState = await _play(self.answers.pop(0) if self.answers else LeaseState.HELD)
        return answer

    async def _settle(self, how: str, **facts: Any) -> None:
        self.tries.append(anyio.current_time())
        await anyio.lowlevel.checkpoint()
        await _play(self.settle_answers.pop(0) if self.settle_answers else None)
        self.settled.append((how, facts))

    async def complete(self, result: Result) -> None:
        await self._settle("complete", result=result)

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        await self._settle("retry", reason=reason, result=result, delay=delay)

    async def fail(self, reason: str, *, result: Result) -> None:
        await self._settle("fail", reason=reason, result=result)

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        await self._settle("release", reason=reason, delay=delay, fruitless=fruitless)

    async def withdraw(self) -> None:
        await self._settle("withdraw")

    @property
    def how(self) -> list[str]:
        """How it was settled."""
        return [how for how, _ in self.settled]


class ScriptedSource:
    """Gives the scripted leases (or raises), then says that nothing is left with a verdict."""

    name = "scripted"

    def __init__(self, *script: object, verdict: int | None = 0) -> None:
        self.script = list(script)
        self.received: list[float] = []
        self.reclaimed: list[str] = []
        self._verdict = verdict
        self.paused: list[float] = []

    async def run(self) -> None:
        return

    async def pause(self) -> None:
        self.paused.append(anyio.current_time())

    async def receive(self, *, wait: float) -> Lease | None:
        self.received.append(anyio.current_time())
        await anyio.lowlevel.checkpoint()
        if not self.script:
            await anyio.sleep(0 if self._verdict is not None else wait)
            return None
        lease: Lease | None = await _play(self.script.pop(0))
        return lease

    async def reclaim(self, worker: str) -> None:
        self.reclaimed.append(worker)

    def verdict(self) -> Verdict | None:
        return Verdict(self._verdict, "") if self._verdict is not None and not self.script else None

    async def aclose(self) -> None:
        return


class ScriptedFiles:
    """Folders that do what `hooks` say in the phase of that name; `calls` tells the order."""

    environment: Mapping[str, str]

    def __init__(self, calls: list[str], hooks: Mapping[str, Hook] | None = None, reserve_seconds: float = 1.0) -> None:
        self.environment = {}
        self.calls = calls
        self.hooks = dict(hooks or {})
        self.reserve_seconds = reserve_seconds
        self.count = 0
        self.completed: list[Result] = []
        self.frozen = False
        self.closed = False
        self.movable = False

    async def _do(self, name: str, *details: object) -> None:
        self.calls.append(" ".join([name, *map(str, details)]))
        await anyio.lowlevel.checkpoint()
        if name in self.hooks:
            await self.hooks[name]()
        self.calls.append(f"{name} done")

    async def restore(self) -> None:
        await self._do("restore")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        self.calls.append("watch")
        yield
        self.calls.append("unwatch")

    async def flush(self, *, whole: bool, result: Result | None) -> None:
        await self._do("flush", "whole" if whole else "settled", *(["done"] if result is not None else []))

    async def complete(self, result: Result) -> None:
        self.completed.append(result)
        await anyio.lowlevel.checkpoint()

    async def checkpoint(self) -> list[Generation]:
        await self._do("checkpoint")
        return [Generation(1, 1, 1)]

    def freeze(self) -> None:
        self.frozen = True

    def close(self) -> None:
        self.closed = True

    def unsent(self) -> set[Path]:
        return set()

    async def set_apart(self) -> bool:
        if not self.movable:
            return False
        await self._do("set apart")
        return True

    async def publish(self) -> None:
        await self._do("publish")

    async def discard(self) -> None:
        await self._do("discard")

    async def reserve(self) -> float:
        return self.reserve_seconds

    def durable(self) -> int:
        return self.count


class ScriptedDelivery:
    """Ends each job as `ending` says after `seconds`; in a drain as a program that stops at once does."""

    def __init__(self, ending: Ending | None = None, seconds: float = 1.0, stop_seconds: float = 0.1) -> None:
        self.ending = ending or Ending(Outcome.DONE, "", Result(exit_code=0), whole=True)
        self.seconds = seconds
        self.stop_seconds = stop_seconds
        self.delivered: list[Assignment] = []
        self.cancelled = 0
        self.can = anyio.Event()
        self.can.set()
        self.unready = Signal()
        self.why_never: GivenUp | None = None

    def set_available(self, available: bool) -> None:
        """The app gets ready, or no longer is."""
        if available:
            self.unready = Signal()
            self.can.set()
        else:
            self.can = anyio.Event()
            self.unready.set()

    async def run(self) -> None:
        return

    @property
    def available(self) -> bool:
        return self.can.is_set()

    async def ready(self) -> bool:
        await self.can.wait()
        return self.why_never is None

    def given_up(self) -> GivenUp | None:
        return self.why_never

    async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
        self.delivered.append(assignment)
        try:
            with anyio.move_on_after(self.seconds if not math.isinf(self.seconds) else None):
                await drain.requested.wait()
                await anyio.sleep(self.stop_seconds)
                assignment.ended()
                return Ending(Outcome.RELEASE, drain.words, Result(exit_code=0), whole=True)
        except anyio.get_cancelled_exc_class():
            self.cancelled += 1
            raise
        assignment.ended()
        return self.ending
