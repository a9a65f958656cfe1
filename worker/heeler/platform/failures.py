"""Counts failures in a row: a machine on which job after job fails is left (Kelpie's MAX_JOB_FAILURES)."""

from __future__ import annotations

from heeler.job import Ending, Outcome

_FAILED = (Outcome.RETRY, Outcome.FAIL)


class FailuresInARow:
    """How many attempts in a row failed here, of whatever jobs. Interruptions neither count nor break the row."""

    def __init__(self, limit: int | None) -> None:
        """Args: how many are enough; None means that no number is."""
        self._limit = limit
        self._count = 0
        self._last = ""

    def settled(self, ending: Ending) -> None:
        """An attempt ended."""
        if ending.outcome in _FAILED:
            self._count += 1
            self._last = ending.reason
        elif ending.outcome is Outcome.DONE:
            self._count = 0

    def enough_with(self, ending: Ending) -> bool:
        """Whether this end, which is still to be settled, makes it enough."""
        return self._limit is not None and ending.outcome in _FAILED and self._count + 1 >= self._limit

    @property
    def reason(self) -> str | None:
        """Why this machine is to be left; None while it is not."""
        if self._limit is None or self._count < self._limit:
            return None
        return f"{self._count} failures in a row on this machine; the last: {self._last}"
