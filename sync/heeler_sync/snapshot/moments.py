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

LIVES_ON = 0.05
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

    def unheard(self, scan: TreeScan) -> set[str]:
        """The files and links that were changed after all that we know of: if the program is dead, by its death."""
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

    def unheard(self, scan: TreeScan) -> set[str]:  # noqa: ARG002 - they are late in any case
        """As `Moment.unheard`."""
        return set()

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
    told: set[str] = field(default_factory=set)
    """Those of them whose change an event told, as one would tell their being closed."""
    unsure: int = 0
    """The last event after which files may have changed without one of their own."""

    def forget_open(self, path: str) -> None:
        """It was closed, or went."""
        self.open.pop(path, None)
        self.told.discard(path)


class ReadyMoment:
    """The tree is complete when a file that matches is not open for writing any more, and nothing came after it.

    What came after is told by the files' change times. Where these are the same, within one tick of the kernel's clock,
    the order of events tells, which are in one queue; where there were none (a folder filled before its watch, an
    overflow, no inotify), quiet does.
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
        self._heard_ns = wall()
        self._seen = _Seen()
        self._begun = 0
        self._begun_at = -math.inf
        self._known: Mapping[str, Found] | None = None
        self._told: set[str] = set()

    @property
    def certain(self) -> bool:
        """As `Moment.certain`."""
        return True

    def take(self, batch: Batch, now: float) -> None:
        """As `Moment.take`."""
        if not batch:
            return
        self._hear(now)
        for path, what in batch.files.items():
            self._count += 1
            if what == GONE:
                self._seen.order.pop(path, None)
                self._seen.forget_open(path)
            elif path not in batch.implied:
                self._seen.order[path] = self._count
            if what != GONE and self._matches(path):
                self._note_ready(path, now, what, implied=path in batch.implied)
        if batch.rescan:
            self._count += 1
            self._seen.unsure = self._count

    def _hear(self, now: float) -> None:
        self._last, self._heard_ns = now, self._wall()

    def _note_ready(self, path: str, now: float, what: str, *, implied: bool) -> None:
        self._told.add(path)
        if what == CLOSED and not implied:
            self._seen.forget_open(path)
            self._seen.ready = _Closed(self._count, path, now, self._wall())
        else:
            self._seen.open[path] = now
            if not implied:
                self._seen.told.add(path)

    def scanned(self, scan: TreeScan, now: float) -> None:
        """As `Moment.scanned`."""
        found = {path: entry for path, entry in scan.files.items() if self._matches(path)}
        if self._known is not None:
            for path, entry in found.items():
                if self._known.get(path) != entry and path not in self._told and path not in self._seen.open:
                    self._hear(now)
                    self._seen.open[path] = now
                    self._count += 1
                    self._seen.unsure = self._count
        self._known = found
        self._told.clear()

    def due(self) -> float:
        """As `Moment.due`: when the ready file was last changed, as far as we know."""
        closed = self._seen.ready.at if self._seen.ready is not None else -math.inf
        return max(self._seen.open.values(), default=closed) if self._seen.open or self._seen.ready else math.inf

    def settled(self) -> float:
        """As `Moment.settled`: what we did not see being closed, its writer's death may have closed.

        Where no event tells of its being closed either, quiet stands in for that.
        """
        if self._seen.open:
            return math.inf if self._seen.told else self._last + self._quiet
        return self._seen.ready.at + LIVES_ON if self._seen.ready is not None else math.inf

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
            order, told = self._count, quiet and complete < self._wall() - int(_ORDERED * 1e9)
        else:
            ordered = not seen.unsure and now >= seen.ready.at + _ORDERED
            order, told = seen.ready.order, (quiet or ordered) and complete <= seen.ready.wall_ns
        # What has the ready file's own time came before it only if the order of events, or quiet, told so.
        latest = complete if told else complete - 1
        return {
            path
            for path, time in _change_times(scan).items()
            if seen.order.get(path, 0) > order or (path not in ready and time > latest)
        }

    def unheard(self, scan: TreeScan) -> set[str]:
        """As `Moment.unheard`: after the ready file was closed; where we did not see that, after the last change."""
        closed = None if self._seen.open else self._seen.ready
        heard = self._heard_ns if closed is None else closed.wall_ns
        return {path for path, time in _change_times(scan).items() if time > heard}

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
            open=(left := {path: at for path, at in seen.open.items() if at > self._begun_at}),
            told=seen.told & left.keys(),
            unsure=seen.unsure if seen.unsure > begun else 0,
        )


def _change_times(scan: TreeScan) -> dict[str, int]:
    return {**scan.link_times, **{path: found.stamp.ctime_ns for path, found in scan.files.items()}}
