"""Keeps `AcceptJobs` of the Salad Job Queue open while a job is wanted or done, whatever happens to it.

A stream that breaks is opened again: soon where it had lived or the service can't be reached, with a growing backoff
where the service answers but refuses. Only this task opens and closes streams, so there is never more than one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import anyio

from heeler.scopes import Doubling
from heeler.sources.base import Machine, SourceUnavailableError
from heeler.sources.salad_calls import CallFailedError, QueueCalls
from heeler.sources.salad_channel import Code
from heeler.sources.salad_jobs import Jobs

_POLL_SECONDS = 5.0
"""Between two looks at whether the machine is ready (PROTOCOLS 1)."""
_SOON = (0.4, 1.0)
_REFUSED = (0.5, 15.0)
_HEALTHY_SECONDS = 10.0
"""After a stream that lived as long, the next is opened at once."""


class Pump:
    """Owns the stream. `run` goes on beside everything else."""

    def __init__(
        self,
        calls: QueueCalls,
        jobs: Jobs,
        machine: Machine,
        on_fault: Callable[..., None],
        *,
        silence: float,
        clock: Callable[[], float],
        rng: random.Random,
    ) -> None:
        """Args.

        calls: The queue.
        jobs: Told of every message.
        machine: Says whether jobs are to be taken.
        on_fault: Told of what goes wrong; once in a row.
        silence: Seconds without a message after which a stream counts as broken.
        clock: Seconds; goes on while the machine sleeps.
        rng: Where jitter comes from.
        """
        self._calls = calls
        self._jobs = jobs
        self._machine = machine
        self._on_fault = on_fault
        self._silence = silence
        self._clock = clock
        self._soon = Doubling(*_SOON, rng)
        self._refused = Doubling(*_REFUSED, rng)
        self._wanted = False
        self._wake = anyio.Event()
        self._session: anyio.CancelScope | None = None
        self._closed = anyio.Event()
        self._heard_first = math.inf
        self._heard_last = -math.inf
        self._fresh_token = False
        self._patient = False
        self._reported: tuple[str, str] | None = None

    def alive(self) -> bool:
        """Whether the stream is open, and the service has spoken on it lately."""
        return self._session is not None and self._clock() - self._heard_last <= self._silence

    def want(self) -> None:
        """Have the stream open from now on."""
        self._wanted = True
        self._wake.set()

    def unwant(self) -> None:
        """Have it closed until the next `want`."""
        self._wanted = False
        if self._session is not None:
            self._session.cancel()

    async def close(self) -> None:
        """As `unwant`, and return once it is closed."""
        self.unwant()
        if self._session is not None:
            await self._closed.wait()

    def look(self) -> None:
        """There is something for `Jobs.finish`."""
        self._wake.set()

    async def run(self) -> None:
        """Open the stream whenever it is wanted; runs until it is cancelled."""
        while True:
            await self._jobs.finish()
            if self._wanted:
                await self._jobs.answered()
            if self._wanted:
                await anyio.sleep(await self._one_session())
            else:
                self._wake = anyio.Event()
                await self._wake.wait()

    async def _one_session(self) -> float:
        delay = 0.0
        self._closed = anyio.Event()
        self._heard_first, self._heard_last = math.inf, -math.inf
        try:
            with anyio.CancelScope() as self._session:
                delay = await self._hold_open()
        finally:
            self._session = None
            self._closed.set()
        return delay

    async def _hold_open(self) -> float:
        """One stream, from its opening to its end; the seconds to wait before the next."""
        current_id = self._jobs.current_id
        try:
            # Whoever has a job goes on with it, ready or not.
            if not current_id and not await self._machine.ready():
                return _POLL_SECONDS
            await self._read(current_id)
        except CallFailedError as error:
            if error.code is Code.NOT_FOUND and current_id and current_id == self._jobs.current_id:
                if self._jobs.out:
                    self._wanted = False  # whoever works on it ends that first, and then asks for the next
                self._jobs.supersede()
                return 0.0
            return self._broken(error)
        except SourceUnavailableError as error:
            self._report("machine_unreachable", "", error=str(error))
            return self._soon.next()
        if not self._patient:  # else there was no connection, which is known
            self._report("queue_silent", "", seconds=self._silence)
        return self._soon.next()

    async def _read(self, current_id: str) -> None:
        """Pass on what the stream says; returns when it has been silent for too long."""
        with anyio.CancelScope(deadline=anyio.current_time() + self._silence) as watchdog:
            stream = await self._calls.accept(current_id, fresh_token=self._fresh_token, patient=self._patient)
            try:
                while True:
                    message = await stream.next()
                    watchdog.deadline = anyio.current_time() + self._silence
                    self._heard()
                    if message.HasField("job"):
                        await self._jobs.deliver(message.job)
                    else:
                        await self._jobs.confirm()
                    if self._jobs.unfinished:
                        await self._jobs.finish()
            finally:
                stream.close()

    def _heard(self) -> None:
        self._heard_last = self._clock()
        self._heard_first = min(self._heard_first, self._heard_last)
        self._fresh_token = self._patient = False
        self._reported = None
        self._refused.reset()

    def _broken(self, error: CallFailedError) -> float:
        """The seconds to wait after a stream that has ended."""
        if error.token_refused and not self._fresh_token:
            self._fresh_token = True
            return 0.0
        self._report("queue_unreachable", error.code.name, error=str(error))
        if self._clock() - self._heard_first >= _HEALTHY_SECONDS:
            self._soon.reset()
        if self._heard_first < math.inf:
            return self._soon.next()
        if not error.connected and not self._patient:
            self._patient = True
            return self._soon.next()
        return self._refused.next()

    def _report(self, event: str, kind: str, **fields: object) -> None:
        if self._reported != (event, kind):
            self._reported = event, kind
            self._on_fault(event, **fields)
