"""When is a file's state worth sending? Pure bookkeeping: no file, no clock and no store is touched here.

Mirror mode settles file by file (DESIGN 6.1): closed or renamed into place and then unchanged for the debounce; a
file that stays open settles when it has not changed for `open_wait`. Every change gets a sequence number, and a
deletion waits until all changes before it are durable: a rotation must never leave storage with neither checkpoint.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class SettleTimes:
    """The waits, all in seconds.

    Attributes:
        debounce: Quiet needed after a file was closed.
        open_wait: Quiet needed of a file that stays open for writing.
        max_wait: How long a file may go on without settling before it is worth a warning.
    """

    debounce: float = 0.05
    open_wait: float = 5.0
    max_wait: float = 300.0


@dataclass
class _Dirty:
    sequence: int
    """Its own number; or that of an older state of the same content's, as long as that one is not durable."""
    own: int
    since: float
    last: float
    closed: bool
    not_before: float
    warned: bool = False


class Settler:
    """What is dirty, what is on its way, and what is gone, of one folder."""

    def __init__(self, times: SettleTimes) -> None:
        self._times = times
        self._sequence = itertools.count(1)
        self._dirty: dict[str, _Dirty] = {}
        self._in_flight: dict[str, int] = {}
        self._gone: dict[str, int] = {}
        self._deleting: set[str] = set()

    @property
    def busy(self) -> bool:
        """Whether anything is not yet durable, deletions included."""
        return bool(self._dirty or self._in_flight or self._gone or self._deleting)

    def unsent(self) -> set[str]:
        """The files whose newest state is not durable yet."""
        return {*self._dirty, *self._in_flight}

    def oldest(self) -> float | None:
        """Since when the oldest dirty file is dirty; None if there is none."""
        return min((dirty.since for dirty in self._dirty.values()), default=None)

    def changed(self, path: str, now: float, *, closed: bool, settled: bool = False) -> None:
        """A file's content changed; `closed` if its writer let go, `settled` if no wait is needed at all."""
        self._gone.pop(path, None)
        wait = 0.0 if settled else self._times.debounce
        dirty = self._dirty.get(path)
        if dirty is None:
            own = next(self._sequence)
            sequence = self._in_flight.get(path, own)
            self._dirty[path] = _Dirty(sequence, own, now, now, closed or settled, now + wait)
        else:
            dirty.last, dirty.closed, dirty.not_before = now, closed or settled, now + wait

    def vanished(self, path: str, *, stored: bool) -> None:
        """A file is gone; its object is to be deleted if it is `stored` or on its way there."""
        self.abandon(path)
        if stored or path in self._in_flight:
            self._gone.setdefault(path, next(self._sequence))

    def abandon(self, path: str) -> None:
        """What waits to be sent of a file is not to be sent any more."""
        dirty = self._dirty.pop(path, None)
        if dirty is not None:
            self._give_up(dirty.sequence)

    def quiet(self, now: float) -> list[str]:
        """Files that have been quiet long enough to be sent if nobody holds them open for writing."""
        return [path for path, dirty in self._dirty.items() if dirty.not_before <= now and self._free(path)]

    def hold(self, path: str) -> None:
        """A quiet file is still open for writing: it waits until `open_wait` after its last change."""
        dirty = self._dirty[path]
        dirty.closed = False
        dirty.not_before = dirty.last + self._times.open_wait

    def waited_open(self, path: str, now: float) -> bool:
        """Whether a file has been quiet for `open_wait`, so that it settles open or not."""
        return now >= self._dirty[path].last + self._times.open_wait

    def start(self, path: str) -> None:
        """A file's current state is being sent."""
        self._in_flight[path] = self._dirty.pop(path).sequence

    def done(self, path: str, *, durable: bool) -> None:
        """The sending of a file ended: durable, or `changed` again, or `vanished`.

        A newer state that waits keeps the number of the older one unless that is durable: a deletion in between
        must not overtake both.
        """
        sequence = self._in_flight.pop(path)
        dirty = self._dirty.get(path)
        if dirty is None and not durable:
            self._give_up(sequence)
        elif dirty is not None and durable:
            dirty.sequence = dirty.own

    def _give_up(self, sequence: int) -> None:
        """A state will never be durable: its file vanished, perhaps under another name.

        Deletions that waited for it wait for all that is to be sent now: the other name is among it.
        """
        for path in [path for path, gone in self._gone.items() if gone > sequence]:
            self._gone[path] = next(self._sequence)

    def renew_deletions(self) -> None:
        """Have all deletions wait for all that is to be sent now: only now we know of it."""
        self._give_up(0)

    def postpone(self, path: str, now: float) -> None:
        """A quiet file could not be looked at: it is quiet again after the debounce."""
        self._dirty[path].not_before = now + self._times.debounce

    def drop_unsettled(self, now: float) -> None:
        """Forget what had not settled by `now`, and deletions: a program that died may have died inside a save."""
        self._dirty = {path: dirty for path, dirty in self._dirty.items() if self._has_settled(dirty, now)}
        self._gone.clear()

    def forget(self) -> None:
        """Forget what waits, changes and deletions: they are of a folder that no longer stands there."""
        self._dirty.clear()
        self._gone.clear()

    def _has_settled(self, dirty: _Dirty, now: float) -> bool:
        return (dirty.closed and dirty.not_before <= now) or now >= dirty.last + self._times.open_wait

    def deletable(self) -> list[str]:
        """The vanished files whose earlier changes, of any file, are all durable."""
        if not self._gone:
            return []
        pending = itertools.chain((d.sequence for d in self._dirty.values()), self._in_flight.values())
        first = min(pending, default=None)
        return [
            path
            for path, sequence in self._gone.items()
            if (first is None or first > sequence) and path not in self._deleting
        ]

    def delete(self, path: str) -> None:
        """A vanished file's object is being deleted."""
        del self._gone[path]
        self._deleting.add(path)

    def deleted(self, path: str) -> None:
        """The deleting ended."""
        self._deleting.discard(path)

    def is_dirty(self, path: str) -> bool:
        """Whether a file has a state that waits to be sent."""
        return path in self._dirty

    def next_due(self) -> float | None:
        """When a dirty file may next become quiet; None if none is waiting."""
        return min((dirty.not_before for path, dirty in self._dirty.items() if self._free(path)), default=None)

    def _free(self, path: str) -> bool:
        """One call at a time for one key: its order is the order of the answers."""
        return path not in self._in_flight and path not in self._deleting

    def overdue(self, now: float) -> Iterable[str]:
        """Files that have not settled for `max_wait`, each told once per change."""
        for path, dirty in self._dirty.items():
            if not dirty.warned and now - dirty.since >= self._times.max_wait:
                dirty.warned = True
                yield path
