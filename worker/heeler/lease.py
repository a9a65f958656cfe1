"""Keeps one lease alive, says when it is lost, and lends the permit to change storage meanwhile.

Extended every third of its time or at the queue's own pace, with jitter; a failed call is repeated with backoff. When
the lease has lapsed without an answer (a partition) the work goes on and we go on asking, but the permit waits until
the queue says that the job is still ours.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

import anyio

from heeler.scopes import Signal
from heeler.sources.base import Lease, LeaseState, SourceUnavailableError

EventSink = Callable[[str, dict[str, object]], None]

_JITTER = (0.8, 1.0)
_LONGEST_CALL = 10.0
_PAUSE_WITHOUT_END = 30.0
"""Of a lease that can't lapse: its source learns of progress, and we of a cancellation, with each call."""
_LONGEST_PAUSE = 240.0
"""A cancellation is heard of with a call, and others see by it that we live."""
_FIRST_RETRY = 0.2
_LONGEST_RETRY = 10.0


def boot_clock() -> float:
    """Seconds since boot, sleep of the machine included: a suspended laptop's lease lapses too."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class LeaseKeeper:
    """Owns what we know of a lease. `keep` runs in the background of the work; `ended` stops it."""

    def __init__(
        self,
        lease: Lease,
        on_event: EventSink,
        *,
        rng: random.Random,
        clock: Callable[[], float] = boot_clock,
        durable: Callable[[], int] = lambda: 0,
    ) -> None:
        """Args.

        lease: The lease, just received.
        on_event: Told of failures, of a lapse, and of the end.
        rng: Where the jitter comes from.
        clock: Seconds; goes on while the process is stopped or the machine sleeps.
        durable: A count that grows when something of the job becomes durable.
        """
        self._lease = lease
        self._on_event = on_event
        self._rng = rng
        self._clock = clock
        self.durable = durable
        self._told_durable = 0
        self._confirmed_until = clock() + lease.expires_after
        self._lapsed = False
        self._settled = False
        self._call: anyio.CancelScope | None = None
        self._failures = 0
        self._doubts = 0
        self._asked = anyio.Event()
        self._answered = anyio.Event()
        self.state = LeaseState.HELD
        self.ended = Signal()
        self.ending = Signal()
        """Set when the queue will take the job away before long: it is to be handed back, and is ours until then."""

    @property
    def confirmed(self) -> bool:
        """Whether the last answer that we hold it is still good."""
        return self.state is LeaseState.HELD and self._clock() < self._confirmed_until

    def certain(self) -> bool:
        """The permit, asked without waiting; any thread may."""
        return self.confirmed

    async def keep(self) -> None:
        """Extend until the lease is lost or cancelled, or its settlement told by `rest`."""
        self._lease.listen(self._ask)
        while self.state is LeaseState.HELD:
            with anyio.move_on_after(self._pause()):
                await self._asked.wait()
            if self._settled:
                return
            self._asked = anyio.Event()
            await self._extend()
        self._on_event("cancelled" if self.state is LeaseState.CANCELLED else "lease_lost", {})
        self.ended.set()

    def rest(self) -> None:
        """The queue has had our answer: there is nothing to extend any more."""
        self._settled = True
        self._ask()
        if self._call is not None:
            self._call.cancel()

    def _ask(self) -> None:
        self._asked.set()

    async def wait(self) -> None:
        """The permit: return once the lease is certain. Never returns after it ended."""
        while not self.confirmed:
            self._asked.set()
            await self._answered.wait()

    async def doubt(self) -> None:
        """The permit: return only after the queue has confirmed the lease anew."""
        self._doubts += 1
        self._confirmed_until = -math.inf
        await self.wait()

    def _pause(self) -> float:
        """Seconds to the next call; measured by our own clock, so that time spent stopped counts."""
        pace = min(_LONGEST_PAUSE, self._lease.extend_every or self._lease.expires_after / 3)
        if math.isinf(self._lease.expires_after):
            pace = _PAUSE_WITHOUT_END
        if self._failures:
            retry = min(_LONGEST_RETRY, pace, _FIRST_RETRY * 2.0 ** min(self._failures - 1, 20))
            return retry * self._rng.uniform(0.5, 1.0)
        return pace * self._rng.uniform(*_JITTER)

    async def _extend(self) -> None:
        asked_at = self._clock()
        durable = self.durable()
        doubts = self._doubts
        try:
            with anyio.fail_after(max(1.0, min(_LONGEST_CALL, self._lease.expires_after / 3))) as self._call:
                state = await self._lease.extend(progressed=durable > self._told_durable)
        except (SourceUnavailableError, TimeoutError) as error:
            self._note_failure(str(error) or "no answer in time")
            return
        finally:
            self._call = None
        if self._settled:
            return
        if state is LeaseState.ENDING:
            if not self.ending.is_set():
                self._on_event("lease_ending", {})
            self.ending.set()
            state = LeaseState.HELD
        self.state = state
        self._failures = 0
        self._told_durable = durable
        if state is LeaseState.HELD:
            if doubts == self._doubts:  # an answer from before a doubt does not settle it
                self._confirmed_until = asked_at + self._lease.expires_after
            if self._lapsed:
                self._on_event("lease_confirmed_again", {})
            self._lapsed = False
            self._answered.set()
            self._answered = anyio.Event()

    def _note_failure(self, error: str) -> None:
        self._failures += 1
        self._on_event("heartbeat_failed", {"error": error, "failures": self._failures})
        if not self._lapsed and self._clock() >= self._confirmed_until:
            self._lapsed = True
            self._on_event("lease_lapsed", {"seconds": self._lease.expires_after})
