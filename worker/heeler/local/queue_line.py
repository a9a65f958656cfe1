"""One queue's line: jobs that wait for a worker, and workers that wait for a job, each in their order."""

from __future__ import annotations

import bisect
from collections import deque

from heeler.local.queue_model import Job, Stream


class Line:
    """Pairs the oldest job with the worker that has waited longest."""

    def __init__(self) -> None:
        self.waiting: list[Job] = []
        self.idle: deque[Stream] = deque()

    def add(self, job: Job) -> None:
        """Let a job wait; one that comes back is before all that were submitted later."""
        bisect.insort(self.waiting, job, key=lambda other: other.number)

    def forget(self, stream: Stream) -> None:
        """Take out a worker, if it waits."""
        if stream in self.idle:
            self.idle.remove(stream)

    def next(self) -> tuple[Job, Stream] | None:
        """Take the next pair, if there is one."""
        if not self.waiting or not self.idle:
            return None
        return self.waiting.pop(0), self.idle.popleft()
