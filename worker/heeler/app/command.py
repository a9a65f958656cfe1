"""Command mode: each job names its command, which runs to its end as a child of ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from heeler.app.base import Assignment, GivenUp
from heeler.app.output import JobLog, JobLogs, passed_to
from heeler.app.process import CannotStartError, Child, Exit, MachineError, ProcessRegister, RegisterError, child
from heeler.app.siblings import Siblings
from heeler.drain import Drain
from heeler.job import Ending, InvalidJobError, JobDocument, Outcome, Result
from heeler.scopes import Signal
from heeler.tasks import background

_LEAST_GRACE = 1.0
_RETRY_REST_SECONDS = 1.0
"""The rest of a job whose program asks to be run again: a program that always does would spin otherwise."""
_INDEX = ("HEELER_JOB_INDEX", "AWS_BATCH_JOB_ARRAY_INDEX")
_MACHINE_REST_SECONDS = 5.0
"""The rest of a job that could not be run here: so that another machine may take it."""


@dataclass(frozen=True)
class CommandSettings:
    """What command mode has to know.

    Attributes:
        environment: The environment that programs inherit, credentials already taken out if so wished.
        retry_exit_codes: Exit codes that mean: again, not counted.
        logs: The folder below which each job's log is kept.
        timeout_grace: Seconds from SIGTERM to SIGKILL for a program that ran out of time.
    """

    environment: Mapping[str, str]
    retry_exit_codes: frozenset[int]
    logs: Path
    timeout_grace: float = 10.0


class CommandDelivery:
    """Runs the command that a job's document names."""

    def __init__(
        self, settings: CommandSettings, register: ProcessRegister, on_log_error: Callable[[str, OSError], None]
    ) -> None:
        """Args: `on_log_error` is told which job's log can't be kept, from a worker thread."""
        self._settings = settings
        self._register = register
        self._logs = JobLogs(settings.logs, on_log_error)
        self._siblings = Siblings()
        self._never = Signal()

    async def run(self) -> None:
        """As `Delivery.run`: each job brings its program."""

    @property
    def available(self) -> bool:
        """As `Delivery.available`."""
        return True

    async def ready(self) -> bool:
        """As `Delivery.ready`: nothing has to be there before a job."""
        return True

    @property
    def unready(self) -> Signal:
        """As `Delivery.unready`: never."""
        return self._never

    def given_up(self) -> GivenUp | None:
        """As `Delivery.given_up`."""
        return None

    async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
        """As `Delivery.deliver`."""
        try:
            document = assignment.job.document()
        except InvalidJobError as error:
            return Ending(Outcome.FAIL, str(error))
        threads = anyio.CapacityLimiter(1)  # of our own: heartbeats must not wait until other threads are done
        log = await anyio.to_thread.run_sync(self._logs.open, assignment.job.id, limiter=threads)
        try:
            return await self._run(document, assignment, drain, log)
        except CannotStartError as error:
            return Ending(Outcome.RETRY, str(error))
        except MachineError as error:
            fruitless = not isinstance(error, RegisterError)
            return Ending(Outcome.RELEASE, str(error), delay=_MACHINE_REST_SECONDS, fruitless=fruitless)
        finally:
            self._logs.close(assignment.job.id, log)

    async def _run(self, document: JobDocument, assignment: Assignment, drain: Drain, log: JobLog) -> Ending:
        environment = self._environment(document, assignment)
        stdout = (log.write, passed_to(sys.stdout.buffer))
        stderr = (log.write, passed_to(sys.stderr.buffer))
        argv = [document.command, *document.arguments]
        async with child(argv, environment, stdout, stderr, self._register, self._siblings) as running:
            watch = _Watch(running, drain, document.timeout or math.inf, self._settings.timeout_grace)
            how = await watch.until_exit(assignment)
        return self._judge(how, watch, stuck=running.stuck)

    def _environment(self, document: JobDocument, assignment: Assignment) -> dict[str, str]:
        job_id, attempt = assignment.job.id, str(assignment.attempt)
        index = {} if document.index is None else {name: str(document.index) for name in _INDEX}
        return {
            **self._settings.environment,
            **document.environment,
            **assignment.environment,
            **index,
            "HEELER_JOB_ID": job_id,
            "HEELER_ATTEMPT": attempt,
            "KELPIE_JOB_ID": job_id,
            "AWS_BATCH_JOB_ID": job_id,
            "AWS_BATCH_JOB_ATTEMPT": attempt,
        }

    def _judge(self, how: Exit, watch: _Watch, *, stuck: bool) -> Ending:
        """The table of outcomes (DESIGN 4), and what may be captured (DESIGN 6.1): nothing that may still change."""
        result = Result(how.code, how.signal)
        asked_for_retry = how.code in self._settings.retry_exit_codes
        if watch.timed_out:
            return Ending(Outcome.RETRY, f"ran longer than its timeout of {watch.timeout:g} s ({how})", result)
        if watch.drained:
            whole = how.code is not None and not stuck
            return Ending(Outcome.RELEASE, watch.drain.words, result, whole=whole)
        if stuck and (how.code == 0 or asked_for_retry):
            reason = f"{how}, but some of its processes do not die here"
            return Ending(Outcome.RELEASE, reason, result, delay=_MACHINE_REST_SECONDS, fruitless=True)
        if how.code == 0:
            return Ending(Outcome.DONE, "", result, whole=True)
        if asked_for_retry:
            return Ending(Outcome.RELEASE, str(how), result, whole=True, delay=_RETRY_REST_SECONDS, fruitless=True)
        return Ending(Outcome.RETRY, str(how), result)


class _Watch:
    """Waits for a child's exit, and stops it when its time or ours is over."""

    def __init__(self, running: Child, drain: Drain, timeout: float, timeout_grace: float) -> None:
        self._running = running
        self.drain = drain
        self._timeout_grace = timeout_grace
        self.timeout = timeout
        self.timed_out = False
        self.drained = False

    async def until_exit(self, assignment: Assignment) -> Exit:
        """The exit, by itself or after a stop; `timed_out` and `drained` say whether and why it was stopped."""
        async with background(partial(self._stop_in_drain, assignment), self._stop_at_timeout):
            how = await self._running.wait()
            assignment.ended()
            return how
        raise AssertionError("background does not swallow")

    async def _stop_in_drain(self, assignment: Assignment) -> None:
        await self.drain.requested.wait()
        self.drained = True
        self._running.terminate()
        grace = self.drain.grace(await assignment.reserve())
        with anyio.move_on_after(max(_LEAST_GRACE, grace)):
            await self.drain.hurried.wait()
        await self._running.kill()

    async def _stop_at_timeout(self) -> None:
        await anyio.sleep(min(self.timeout, 1e9))
        self.timed_out = not self.drained
        self._running.terminate()
        await anyio.sleep(self._timeout_grace)
        await self._running.kill()
