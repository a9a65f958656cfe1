"""When is a tree complete? Pure bookkeeping of what happened to its files: no file, clock or store is touched here.

Two ways to know (DESIGN 6.1): the program says so by a file that it writes last (`ReadyMoment`), or nothing has
changed for a while (`QuietMoment`). Only the first is certain. A request to take a checkpoint now needs neither.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from heeler_sync.snapshot.scan import Found, TreeScan
from heeler_sync.watch import CLOSED, GONE, Batch

_DEBOUNCE = 0.05
"""Seconds that the program must live on after it closed a file: what its death closed is not complete."""

_RECENTLY = 5.0
"""Seconds after its change in which a file that is still open for writing is perhaps half written."""

_CLOCK_SLACK_NS = 1_000_000_000

_ORDERED = 0.6
"""Seconds after which all earlier events have come: watchdog keeps a file that is moved away back for half a second."""


class Moment(Protocol):
    """Says when a tree may be complete, and which files show that it is no longer."""

    @property
    def certain(self) -> bool:
        """Whether the program itself said so; else commits are some time apart, and open files may hinder them."""
        ...

    def take(self, batch: Batch, now: float) -> None:
        """Something happened to files."""
        ...

    def scanned(self, scan: TreeScan, now: float) -> None:
        """A scan was made: what differs from the last one may have come without an event."""
        ...

    def due(self) -> float:
        """From when on the tree may be complete; infinite if that is not in sight."""
        ...

    def settled(self) -> float:
        """From when on it is certain that the program made the tree complete, and not its death."""
        ...

    def begin(self) -> None:
        """The tree is going to be taken as it is now."""
        ...

    def late(self, scan: TreeScan, now: float) -> set[str]:
        """The files and links that were changed after the tree was complete."""
        ...

    def must_be_closed(self, scan: TreeScan) -> set[str]:
        """The files that nobody may hold open for writing if the tree is complete."""
        ...

    def taken(self) -> None:
        """It was taken as it was at `begin`: what came after that is of the next one."""
        ...


class QuietMoment:
    """The tree is complete when nothing has changed for a while: 2 s, or twice the longest gap inside a checkpoint."""

    def __init__(self, quiet: float, wall: Callable[[], int] = time.time_ns) -> None:
        """Args: the least number of seconds without a change; the clock of files' stamps, nanoseconds since 1970."""
        self._quiet = quiet
        self._wall = wall
        self._longest_gap = 0.0
        self._last: float | None = None
        self._begun: float | None = None
        self._known: TreeScan | None = None

    @property
    def certain(self) -> bool:
        """As `Moment.certain`."""
        return False

    @property
    def window(self) -> float:
        """Seconds without a change that are asked for now."""
        return max(self._quiet, 2 * self._longest_gap)

    def take(self, batch: Batch, now: float) -> None:
        """As `Moment.take`."""
        if batch:
            self._changed(now)

    def scanned(self, scan: TreeScan, now: float) -> None:
        """As `Moment.scanned`."""
        if self._known is not None and self._last is None and not scan.same_tree(self._known):
            self._changed(now)
        self._known = scan

    def _changed(self, now: float) -> None:
        # A longer gap than `quiet` parts two checkpoints, whether the first could be taken in it or not.
        if self._last is not None and now - self._last < self._quiet:
            self._longest_gap = max(self._longest_gap, now - self._last)
        self._last = now

    def due(self) -> float:
        """As `Moment.due`."""
        return math.inf if self._last is None else self._last + self.window

    def settled(self) -> float:
        """As `Moment.settled`."""
        return self.due()

    def begin(self) -> None:
        """As `Moment.begin`."""
        self._begun = self._last

    def late(self, scan: TreeScan, now: float) -> set[str]:
        """As `Moment.late`: what was changed long after the last change that we were told of."""
        if self._last is None:
            return set()
        wall = self._wall()
        known = wall - int((now - self._last - self.window / 2) * 1e9)
        # A stamp from the future says only that the clock was set back.
        return {path for path, found in scan.files.items() if known < found.stamp.ctime_ns < wall + _CLOCK_SLACK_NS}

    def must_be_closed(self, scan: TreeScan) -> set[str]:
        """As `Moment.must_be_closed`: what was written just now."""
        since = self._wall() - int(_RECENTLY * 1e9)
        return {path for path, (stamp, _) in scan.files.items() if max(stamp.mtime_ns, stamp.ctime_ns) > since}

    def taken(self) -> None:
        """As `Moment.taken`."""
        if self._last == self._begun:
            self._last = None


@dataclass(frozen=True)
class _Closed:
    """A ready file that was closed or renamed into place: which event that was, and when we heard of it."""

    order: int
    path: str
    at: float
    wall_ns: int


@dataclass
class _Seen:
    """What happened to files since the last tree was taken, in the order of events."""

    order: dict[str, int] = field(default_factory=dict)
    ready: _Closed | None = None
    open: dict[str, float] = field(default_factory=dict)
    """Ready files that changed and were not seen being closed, and when they last changed."""
    unsure: int = 0
    """The last event after which files may have changed without one of their own."""


class ReadyMoment:
    """The tree is complete when a file that matches was closed or renamed into place, and nothing came after it.

    What came after is told by the order of events, which are in one queue; where there was none (a folder filled before
    its watch, an overflow, no inotify), by the files' change times, and in a tie of these by quiet.
    """

    def __init__(self, matches: Callable[[str], bool], quiet: float, wall: Callable[[], int] = time.time_ns) -> None:
        """Args.

        matches: Whether a path is of such a file.
        quiet: Seconds without a change that decide where events can't.
        wall: The clock of files' stamps, nanoseconds since 1970.
        """
        self._matches = matches
        self._quiet = quiet
        self._wall = wall
        self._count = 0
        self._last = -math.inf
        self._seen = _Seen()
        self._begun = 0
        self._begun_at = -math.inf
        self._known: Mapping[str, Found] | None = None
        self._told: set[str] = set()

    @property
    def certain(self) -> bool:
        """As `Moment.certain`."""
        return not self._seen.open

    def take(self, batch: Batch, now: float) -> None:
        """As `Moment.take`."""
        if not batch:
            return
        self._last = now
        for path, what in batch.files.items():
            self._count += 1
            if what == GONE:
                self._seen.order.pop(path, None)
                self._seen.open.pop(path, None)
            elif path not in batch.implied:
                self._seen.order[path] = self._count
            if what != GONE and self._matches(path):
                self._note_ready(path, now, closed=what == CLOSED and path not in batch.implied)
        if batch.rescan:
            self._count += 1
            self._seen.unsure = self._count

    def _note_ready(self, path: str, now: float, *, closed: bool) -> None:
        self._told.add(path)
        if closed:
            self._seen.open.pop(path, None)
            self._seen.ready = _Closed(self._count, path, now, self._wall())
        else:
            self._seen.open[path] = now

    def scanned(self, scan: TreeScan, now: float) -> None:
        """As `Moment.scanned`."""
        found = {path: entry for path, entry in scan.files.items() if self._matches(path)}
        if self._known is not None:
            for path, entry in found.items():
                if self._known.get(path) != entry and path not in self._told and path not in self._seen.open:
                    self._seen.open[path] = self._last = now
                    self._count += 1
                    self._seen.unsure = self._count
        self._known = found
        self._told.clear()

    def due(self) -> float:
        """As `Moment.due`: when it was closed; where we did not see that, when all has been quiet."""
        if self._seen.open:
            return self._last + self._quiet
        return self._seen.ready.at if self._seen.ready is not None else math.inf

    def settled(self) -> float:
        """As `Moment.settled`."""
        return self.due() if self._seen.open or self._seen.ready is None else self._seen.ready.at + _DEBOUNCE

    def begin(self) -> None:
        """As `Moment.begin`."""
        self._begun, self._begun_at = self._count, self._last

    def late(self, scan: TreeScan, now: float) -> set[str]:
        """As `Moment.late`."""
        seen = self._seen
        quiet = self._last + self._quiet <= now
        ready = self.must_be_closed(scan)
        complete = max((scan.files[path].stamp.ctime_ns for path in ready), default=-1)
        if seen.open or seen.ready is None:
            # Its writer may not be done with it, or its events were lost: only quiet tells.
            order, latest = self._count, (complete if quiet else -1)
            heard = self._wall() - int(_ORDERED * 1e9)
        else:
            # Within one tick of the kernel's clock only the order of events tells, and only once all have come.
            told = quiet or (not seen.unsure and now >= seen.ready.at + _ORDERED)
            order, latest, heard = seen.ready.order, (complete if told else complete - 1), seen.ready.wall_ns
        times = {**scan.link_times, **{path: found.stamp.ctime_ns for path, found in scan.files.items()}}
        return {
            path
            for path, time in times.items()
            if seen.order.get(path, 0) > order or time > (heard if path in ready else min(heard, latest))
        }

    def must_be_closed(self, scan: TreeScan) -> set[str]:
        """As `Moment.must_be_closed`: the ready files."""
        closed = {self._seen.ready.path} if self._seen.ready is not None else set()
        return {path for path in closed | self._seen.open.keys() if path in scan.files}

    def taken(self) -> None:
        """As `Moment.taken`."""
        seen, begun = self._seen, self._begun
        self._seen = _Seen(
            order={path: order for path, order in seen.order.items() if order > begun},
            ready=seen.ready if seen.ready is not None and seen.ready.order > begun else None,
            open={path: at for path, at in seen.open.items() if at > self._begun_at},
            unsure=seen.unsure if seen.unsure > begun else 0,
        )
