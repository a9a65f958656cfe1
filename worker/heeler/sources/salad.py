"""`salad`: the Salad Job Queue, by its worker protocol (PROTOCOLS 1), on a machine of SaladCloud's.

The service sends jobs by itself, one at a time; each try counts, four in all. What must not be lost outlives the
process in the state folder: the job that we have, and an answer that the service has not taken yet.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable

import anyio

from heeler.errors import UsageError
from heeler.job import Job, Result
from heeler.lease import boot_clock
from heeler.sources import SourceRequest
from heeler.sources.base import Lease, LeaseState, SourceUnavailableError, Verdict
from heeler.sources.salad_calls import QueueCalls
from heeler.sources.salad_channel import Channel
from heeler.sources.salad_jobs import Held, Jobs
from heeler.sources.salad_record import Records
from heeler.sources.salad_stream import Pump
from heeler.tasks import background

_UNWANTED_SECONDS = 30.0
_LOOKS = 6
_LAST_SECONDS = 3.0
_GRACE_SECONDS = 30.0
"""How long, at a guess, the service waits for a lost worker beyond the silence that we wait for it."""
_ENDPOINT = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?):(\d{1,5})")


class SaladLease:
    """A job that the service counts as ours."""

    def __init__(self, source: SaladSource, held: Held) -> None:
        self._source = source
        self._held = held
        self._job = held.job()

    @property
    def job(self) -> Job:
        """The job."""
        return self._job

    @property
    def attempt(self) -> int:
        """Which start of it on this machine this is, as far as we know; the service does not say."""
        return self._held.record.attempt

    @property
    def attempts_ordered(self) -> bool:
        """They are counted on this machine only."""
        return False

    @property
    def expires_after(self) -> float:
        """Nobody says when the service gives the job of a lost worker to another; longer than it may be silent."""
        return self._source.silence + _GRACE_SECONDS

    @property
    def extend_every(self) -> float | None:
        """As `Lease.extend_every`: by how long it lasts."""
        return None

    @property
    def spends_tries(self) -> bool:
        """There are four in all, and every `RejectJob` spends one."""
        return True

    def listen(self, heard: Callable[[], None]) -> None:
        """As `Lease.listen`: the service gave the job to another."""
        self._held.lost.then(heard)

    async def extend(self, *, progressed: bool = False) -> LeaseState:
        """As `Lease.extend`: the service is not asked, since the stream says it already."""
        if progressed:
            await self._source.jobs.progressed(self._held)
        if self._held.lost.is_set():
            return LeaseState.LOST
        if not self._source.alive():
            raise SourceUnavailableError("the stream to the queue is down")
        return LeaseState.HELD

    async def complete(self, result: Result) -> None:
        """As `Lease.complete`: an app's answer as it is; of a command, what `Result.as_json` says."""
        output = result.body if result.status is not None else json.dumps(result.as_json()).encode()
        await self._source.settle(self._held, output)

    async def retry(self, reason: str, *, result: Result, delay: float) -> None:
        """As `Lease.retry`, but the queue takes neither a reason nor a delay."""
        del reason, result, delay
        await self._source.settle(self._held, None)

    async def fail(self, reason: str, *, result: Result) -> None:
        """As `Lease.fail`: the app's answer is the job's output (PROTOCOLS 1); without one it can only be rejected."""
        del reason
        await self._source.settle(self._held, None if result.status is None else result.body)

    async def release(self, reason: str = "", *, delay: float = 0.0, fruitless: bool = False) -> None:
        """As `Lease.release`, but it spends a try."""
        del reason, delay, fruitless
        await self._source.settle(self._held, None)

    async def withdraw(self) -> None:
        """As `Lease.withdraw`: nobody cancels a job there."""


class SaladSource:
    """The worker's side of the queue."""

    def __init__(
        self,
        request: SourceRequest,
        *,
        clock: Callable[[], float] = boot_clock,
        rng: random.Random | None = None,
        unwanted_seconds: float = _UNWANTED_SECONDS,
    ) -> None:
        """Args.

        request: The endpoint and its silence, the machine, the state folder, and who is told of faults.
        clock: Seconds; goes on while the machine sleeps.
        rng: Where jitter comes from.
        unwanted_seconds: How long a job that nobody asks for is kept before it is rejected.

        Raises:
            UsageError: There is no machine to ask, or the endpoint is none.
        """
        settings = request.settings
        if request.machine is None:
            raise UsageError(
                "source salad needs SaladCloud's metadata service, which is not there:"
                " set SALAD_METADATA_URI (or --metadata-uri) to where it is"
            )
        rng = rng or random.Random()  # noqa: S311 - jitter
        self.silence = settings.salad_silence
        self._clock = clock
        self._unwanted_seconds = unwanted_seconds
        self._channel = Channel(_endpoint(settings.salad_endpoint), tls=settings.salad_use_tls)
        calls = QueueCalls(self._channel, request.machine)
        self.jobs = Jobs(Records(request.state_dir, request.on_fault), calls, request.on_fault, rng)
        self._pump = Pump(
            calls, self.jobs, request.machine, request.on_fault, silence=self.silence, clock=clock, rng=rng
        )
        self.jobs.recover()
        self._waiting = 0
        self._asked_at = clock()

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return "salad"

    async def run(self) -> None:
        """As `Source.run`: the stream, and what no lease tells the service."""
        try:
            async with background(self._turn_away):
                await self._pump.run()
        finally:
            with anyio.move_on_after(_LAST_SECONDS, shield=True):
                self.jobs.refuse()
                await self.jobs.finish()

    async def pause(self) -> None:
        """As `Source.pause`: the stream is closed."""
        await self._pump.close()

    async def receive(self, *, wait: float) -> Lease | None:
        """As `Source.receive`. An unreachable queue is waited for: the stream is opened as soon as it is back."""
        self._pump.want()
        self._waiting += 1
        try:
            with anyio.move_on_after(wait):
                await self.jobs.offered()
        except anyio.get_cancelled_exc_class():
            if self._waiting == 1 and not self.jobs.out:
                self._pump.unwant()
            raise
        finally:
            self._waiting -= 1
            self._asked_at = self._clock()
        held = self.jobs.take()
        return None if held is None else SaladLease(self, held)

    async def reclaim(self, worker: str) -> None:
        """As `Source.reclaim`: what is held is found in the state folder, not by name."""

    def verdict(self) -> Verdict | None:
        """None: somebody may submit at any time."""
        return None

    async def aclose(self) -> None:
        """Let go of the connection."""
        await self._channel.aclose()

    def alive(self) -> bool:
        """Whether the service has said lately that what we hold is ours."""
        return self._pump.alive()

    async def settle(self, held: Held, output: bytes | None) -> None:
        """As `Jobs.settle`."""
        try:
            await self.jobs.settle(held, output)
        finally:
            self._asked_at = self._clock()

    async def _turn_away(self) -> None:
        """Close the stream, and reject the job on it, once nobody has asked for one for a while."""
        while True:
            await anyio.sleep(self._unwanted_seconds / _LOOKS)
            idle = not self._waiting and not self.jobs.out
            if idle and self._clock() - self._asked_at >= self._unwanted_seconds:
                await self._pump.close()
                self.jobs.refuse()
                self._pump.look()


def _endpoint(text: str) -> str:
    """The endpoint, as gRPC takes it.

    Raises:
        UsageError: It is not host:port.
    """
    found = _ENDPOINT.fullmatch(text)
    if found is None or not 0 < int(found[1]) < 1 << 16:
        raise UsageError(f"SALAD_SERVICE_ENDPOINT (or --salad-endpoint) is {text!r}, but must be like host:443")
    return text
