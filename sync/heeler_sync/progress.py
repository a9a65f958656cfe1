"""What moved and how fast: plain counters that a status line or a flush reserve is computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Progress:
    """Totals of one session; its owner counts, anybody reads.

    Attributes:
        clock: Seconds on a clock that never jumps.
        files_up: Files made durable.
        bytes_up: Bytes sent for them.
        files_down: Files restored by download.
        bytes_down: Bytes received for them.
        files_kept: Files that a restore found in place already.
        deleted: Objects deleted because their file was.
        generations: Generations committed.
    """

    clock: Callable[[], float]
    files_up: int = 0
    bytes_up: int = 0
    files_down: int = 0
    bytes_down: int = 0
    files_kept: int = 0
    deleted: int = 0
    generations: int = 0
    _sending: int = 0
    _busy_since: float = 0.0
    _busy_seconds: float = 0.0

    @contextmanager
    def sending(self) -> Iterator[None]:
        """Count the time of the block as time in which the uplink was in use."""
        if self._sending == 0:
            self._busy_since = self.clock()
        self._sending += 1
        try:
            yield
        finally:
            self._sending -= 1
            if self._sending == 0:
                self._busy_seconds += self.clock() - self._busy_since

    def uplink(self) -> float | None:
        """Bytes a second while something was being sent; None before the first upload ended."""
        busy = self._busy_seconds + (self.clock() - self._busy_since if self._sending else 0.0)
        return self.bytes_up / busy if self.bytes_up and busy > 0 else None
