"""App mode's program: one process of ours that serves all jobs, started again when it dies."""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from heeler.app.base import GivenUp
from heeler.app.output import JobLog, passed_to
from heeler.app.process import CannotStartError, Child, Exit, MachineError, ProcessRegister, child
from heeler.drain import Drain
from heeler.errors import EXIT_USAGE
from heeler.tasks import background

EventSink = Callable[..., None]

_FIRST_REST, _LONGEST_REST = 0.5, 30.0
_STOP_SECONDS = 10.0
"""From SIGTERM to SIGKILL, where the drain's grace period does not say."""
_KILL_SECONDS = 0.5
"""What is left of the grace period for SIGKILL and its traces."""


@dataclass
class Life:
    """One start of the program.

    Attributes:
        child: The process.
        over: Set when it and all its descendants have ended.
        how: How it ended, then.
        told: Whether it was told to end.
    """

    child: Child
    over: anyio.Event = field(default_factory=anyio.Event)
    how: Exit | None = None
    told: bool = False

    def terminate(self) -> None:
        """SIGTERM to its group, once: many programs take a second one for impatience."""
        if not self.told:
            self.told = True
            self.child.terminate()


@dataclass(frozen=True)
class ProgramSettings:
    """How a program is run.

    Attributes:
        argv: The program and its arguments; no shell.
        environment: All of its environment.
        log: The file that keeps what it prints.
        max_restarts: So often it is started again without a job done between.
    """

    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    max_restarts: int


class Program:
    """Owns the program's process. `run` starts it again and again; what happens is told by `changed`."""

    def __init__(
        self,
        settings: ProgramSettings,
        register: ProcessRegister,
        drain: Drain,
        on_event: EventSink,
        on_fault: EventSink,
        rng: random.Random,
    ) -> None:
        """Args: how to run it, who keeps its process on record, who tells us to stop, who is told, and jitter."""
        self._settings = settings
        self._register = register
        self._drain = drain
        self._on_event = on_event
        self._on_fault = on_fault
        self._rng = rng
        self._restarts = 0
        self.life: Life | None = None
        self.given_up: GivenUp | None = None
        self.changed = anyio.Event()
        """Set, and replaced by a new one, whenever a life begins or ends, and when it is given up."""

    async def run(self) -> None:
        """Keep the program running until it is given up; cancelled, it is told to stop and ended first."""
        log = JobLog(self._settings.log, lambda error: self._on_fault("app_log_failed", error=str(error)))
        try:
            while self.given_up is None:
                if self._drain.requested.is_set():
                    await anyio.sleep_forever()  # it ended because it was told to, or nobody wants it any more
                await self._live_once(log)
        finally:
            log.close()

    def proved(self) -> None:
        """A job was answered: what went wrong before does not count any more."""
        self._restarts = 0

    async def stop(self, grace: float = _STOP_SECONDS) -> None:
        """SIGTERM to its group, and SIGKILL to all that is left after `grace` seconds, or before a drain's deadline."""
        life = self.life
        if life is None:
            return
        life.terminate()
        with anyio.move_on_after(grace) as scope, self._drain.requested.calls(lambda: self._hasten(scope)):
            await life.over.wait()
            return
        await life.child.kill()
        await life.over.wait()

    def _hasten(self, scope: anyio.CancelScope) -> None:
        scope.deadline = min(scope.deadline, anyio.current_time() + self._drain.left() - _KILL_SECONDS)

    async def restart(self) -> None:
        """End it, whatever it does; `run` starts it anew, and this does not count as its fault."""
        await self.stop()

    async def _live_once(self, log: JobLog) -> None:
        reason, code, told = "", 1, False
        try:
            life = await self._live(log)
        except CannotStartError as error:
            self._give_up(GivenUp(EXIT_USAGE, str(error)))
            return
        except MachineError as error:
            reason = str(error)
        else:
            how, told = life.how or Exit(1, None), life.told
            reason, code = str(how), 128 + how.signal if how.signal is not None else how.code or 0
        if self._drain.requested.is_set():
            return
        if told:
            self._on_event("app_restarted")
            return
        self._restarts += 1
        if self._restarts > self._settings.max_restarts:
            self._give_up(GivenUp(code, f"the program ended {self._restarts} times without a job done: {reason}"))
            return
        rest = min(_LONGEST_REST, _FIRST_REST * 2.0 ** (self._restarts - 1)) * self._rng.uniform(0.5, 1.0)
        self._on_fault("app_ended", error=reason, restart_in=round(rest, 3), restarts=self._restarts)
        await anyio.sleep(rest)

    async def _live(self, log: JobLog) -> Life:
        """One life, from start to end."""
        stdout, stderr = ((log.write, passed_to(stream)) for stream in (sys.stdout.buffer, sys.stderr.buffer))
        settings = self._settings
        async with child(settings.argv, settings.environment, stdout, stderr, self._register) as running:
            life = self.life = Life(running)
            self._on_event("app_started", pid=running.started.group)
            self._tell()
            async with background(lambda: self._watch(life)):
                try:
                    await life.over.wait()
                except anyio.get_cancelled_exc_class():
                    with anyio.CancelScope(shield=True):
                        await self.stop()
                    raise
        return life

    async def _watch(self, life: Life) -> None:
        with anyio.CancelScope(shield=True):  # whoever stops the program waits for `over`
            life.how = await life.child.wait()
            self.life = None
            self._tell()
            await life.child.kill()
            life.over.set()

    def _give_up(self, why: GivenUp) -> None:
        self.given_up = why
        self._on_fault("app_given_up", error=why.reason, exit_code=why.exit_code)
        self._tell()

    def _tell(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


def grace_of(drain: Drain, reserve: float) -> float:
    """Seconds that a program has to end by itself in a drain."""
    grace = drain.grace(reserve)
    return _STOP_SECONDS if math.isinf(grace) else max(1.0, grace)
