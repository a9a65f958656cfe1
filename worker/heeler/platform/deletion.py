"""Keeps the instance's deletion cost as the work goes, so that a scale-in takes the machine that loses least.

As Kelpie sets it (PROTOCOLS 2): 0 when idle, growing by 1 with each beat of a running job (of several, the longest),
the most during the final upload. The service being out of reach never hinders a job.
"""

from __future__ import annotations

import math

import anyio

from heeler.platform.imds import Imds
from heeler.sources.base import SourceUnavailableError
from heeler.status import Phase, Status

BEAT = 30.0
"""Seconds, as the heartbeat of a Kelpie job (PROTOCOLS 3)."""
FINAL_UPLOAD = 999_999_999
_RETRY = 30.0
_SPACING = 1.0
"""Seconds between two calls at the least: short jobs come and go faster than anybody looks."""


class DeletionCost:
    """Tells the metadata service what the instance would cost to delete."""

    def __init__(self, imds: Imds, status: Status) -> None:
        self._imds = imds
        self._status = status
        self._changed = anyio.Event()
        self._since: dict[tuple[str, int], float] = {}
        """When each attempt at a job began that goes on."""
        self._told: int | None = None
        self._failing = False

    async def run(self) -> None:
        """Follow the status until cancelled."""
        self._status.on_change.append(self._note)
        try:
            self._note()
            while True:
                changed = self._changed = anyio.Event()
                if self._cost() != self._told:
                    await self._tell(self._cost())
                    await anyio.sleep(_SPACING)
                with anyio.move_on_after(self._rest()):
                    await changed.wait()
        finally:
            self._status.on_change.remove(self._note)

    def _note(self) -> None:
        """The status has changed: a job may have begun, too short for `run` to see it."""
        now = anyio.current_time()
        jobs = [(lane.job_id, lane.attempt) for lane in self._status.lanes if lane.job_id is not None]
        self._since = {job: self._since.get(job, now) for job in jobs}
        self._changed.set()

    def _cost(self) -> int:
        if not self._since:
            return 0
        if self._status.is_anywhere(Phase.UPLOAD, Phase.SETTLE):
            return FINAL_UPLOAD
        return min(1 + self._beats(), FINAL_UPLOAD - 1)

    def _beats(self) -> int:
        return int((anyio.current_time() - self._longest()) // BEAT)

    def _longest(self) -> float:
        """When the job began that goes on for the longest time."""
        return min(self._since.values())

    def _rest(self) -> float:
        """Seconds until there may be something to tell though nothing changes."""
        if self._cost() != self._told:
            return _RETRY if self._failing else 0.0
        if not self._since or self._told == FINAL_UPLOAD:
            return math.inf
        return self._longest() + (self._beats() + 1) * BEAT - anyio.current_time()

    async def _tell(self, cost: int) -> None:
        try:
            await self._imds.set_deletion_cost(cost)
        except SourceUnavailableError as error:
            if not self._failing:
                self._status.fault("deletion_cost_failed", error=str(error), cost=cost)
            self._failing = True
        else:
            self._failing = False
            self._told = cost
