"""When Kelpie's API is asked for the next job. No I/O here."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

_JITTER = (0.8, 1.2)
_LONGEST_REST = 600.0
_TELLING = 5
"""Jobs in a row that this machine could not begin: a person is told."""


class Pace:
    """One for all lanes of a worker. A machine that can't do what it is given must not empty the queue by trying."""

    def __init__(
        self, poll: float, *, clock: Callable[[], float], rng: random.Random, on_fault: Callable[..., None]
    ) -> None:
        """Args: `poll` is how many seconds after "no job" it is asked again."""
        self._poll = poll
        self._clock = clock
        self._rng = rng
        self._on_fault = on_fault
        self._ask_at = self._rested_at = -math.inf
        self._first_rest = poll
        self._unfit = 0

    def rest(self) -> float:
        """Seconds until the API may be asked."""
        return max(0.0, max(self._ask_at, self._rested_at) - self._clock())

    def asked(self, *, found: bool) -> None:
        """It was: after a job the next question may come at once."""
        self._ask_at = -math.inf if found else self._clock() + self._poll * self._rng.uniform(*_JITTER)

    def ran(self, rest: float = 0.0) -> None:
        """This machine can run jobs. The next one comes after `rest` seconds, if any."""
        self._unfit = 0
        self._rested_at = min(self._rested_at, self._clock() + self._first_rest)
        if rest:
            self._rest_for(rest)

    def could_not(self, rest: float, reason: str) -> None:
        """A job was put back since this machine can't do it now. Each in a row doubles the rest before the next one."""
        self._unfit += 1
        self._first_rest = max(rest, self._poll)
        self._rest_for(min(_LONGEST_REST, self._first_rest * 2.0 ** min(self._unfit - 1, 20)))
        if self._unfit == _TELLING:
            self._on_fault("machine_unfit_for_jobs", error=reason, jobs=self._unfit, retry_in=round(self.rest(), 3))

    def _rest_for(self, seconds: float) -> None:
        self._rested_at = max(self._rested_at, self._clock() + max(seconds, self._poll))
