"""Children of ours that run at the same time: which of our descendants each may end.

A process is surely a child's if it carries the child's tag, or if the kernel says so: it descends from a process that
is surely the child's, or is in the group or session of one. A stranger has dropped its environment and its session,
and lost its parents: any child that ran when it started may have started it, so it lives until the last of these ends.
Any thread may call.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from heeler.app.processes import (
    Identity,
    Relative,
    UndyingError,
    kill_found,
    relatives,
    signal_group,
    start_time,
    tagged,
)

_LOOKS = 2
"""One look can miss a process that changes its parent meanwhile; the next one sees it."""


@dataclass(eq=False)
class Sibling:
    """One child among those that run at the same time.

    Attributes:
        tag: What its processes carry in their environment.
        before: Our descendants before its start, which are none of it; None if we are no reaper.
        group: The pid of its first process, which is its group and session; None before its start.
        since: The start of that process, in clock ticks since boot.
        known: Processes that are surely its own, with their starts: what descends from them is too.
        ending: Whether all that is left of it is being killed.
    """

    tag: str
    before: frozenset[Identity] | None
    group: int | None = None
    since: int = 0
    known: dict[int, int] = field(default_factory=dict)
    ending: bool = False

    def started(self, group: int, since: int) -> None:
        """Its first process is there."""
        self.since = since
        self.group = group
        self.known[group] = since

    def owns(self, one: Relative, seen: Mapping[int, Relative]) -> bool:
        """Whether the kernel says that a process is its own."""
        return any(self._knows(number, seen) for number in (one.branch, one.group, one.session))

    def _knows(self, number: int, seen: Mapping[int, Relative]) -> bool:
        """Whether a number is of a process of its own, and not of a later one that got it after that."""
        holder = seen.get(number)
        return number in self.known and (holder is None or holder.started == self.known[number])

    def may_have_started(self, process: Identity) -> bool:
        """Whether it ran when a stranger started, and will end it."""
        return not self.ending and process[1] >= self.since and process not in (self.before or ())


class Siblings:
    """Who runs at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._members: list[Sibling] = []
        self._undying: set[Identity] = set()

    @contextmanager
    def join(self, tag: str, before: frozenset[Identity] | None) -> Iterator[Sibling]:
        """A child's place, from before its start to its end: others leave alone what it starts."""
        sibling = Sibling(tag, before)
        with self._lock:
            self._members.append(sibling)
        try:
            yield sibling
        finally:
            with self._lock:
                self._members.remove(sibling)

    def kill(self, sibling: Sibling, patience: float) -> int:
        """SIGKILL all that is surely a child's, and the strangers that no other may have started. Blocks.

        Args:
            sibling: The child.
            patience: Seconds until those that do not die are given up, by the others too.

        Returns:
            How many processes were found.

        Raises:
            UndyingError: Some did not die.
        """
        sibling.ending = True  # before the first look: of two that end at once, one has to take the strangers
        try:
            if self._others(sibling):
                self._left_of(sibling)  # to know who descends from its first process while there is one
        finally:
            if sibling.group is not None and start_time(sibling.group) in (None, sibling.since):
                signal_group(sibling.group, signal.SIGKILL)
        try:
            return kill_found(lambda: self._left_of(sibling), _LOOKS, patience)
        except UndyingError as error:
            with self._lock:
                self._undying |= {(pid, start_time(pid) or 0) for pid in error.pids}
            raise

    def _others(self, sibling: Sibling) -> list[Sibling]:
        with self._lock:
            return [member for member in self._members if member is not sibling]

    def _left_of(self, sibling: Sibling) -> set[int]:
        carriers = tagged(sibling.tag)
        seen = relatives()
        others = self._others(sibling)  # after the look, so that whoever had a process then is among them
        free = {pid: one for pid, one in seen.items() if not any(other.owns(one, seen) for other in others)}
        _learn(sibling, carriers, free, seen)
        found = {pid for pid in carriers if pid not in seen}
        found |= {pid for pid, one in free.items() if _is_for(sibling, pid, one, others)}
        with self._lock:
            undying = self._undying.copy()
        return {pid for pid in found if (pid, start_time(pid)) not in undying} if undying else found


def _learn(
    sibling: Sibling, carriers: Collection[int], free: Mapping[int, Relative], seen: Mapping[int, Relative]
) -> None:
    """Note which processes are surely the child's: by its tag, and by those that are known already."""
    new = {pid: free[pid].started for pid in carriers if pid in free}
    while True:
        sibling.known |= new
        owned = {pid: one.started for pid, one in free.items() if sibling.owns(one, seen)}
        new = {pid: started for pid, started in owned.items() if sibling.known.get(pid) != started}
        if not new:
            return


def _is_for(sibling: Sibling, pid: int, one: Relative, others: Collection[Sibling]) -> bool:
    """Whether the child's end ends a process. If we are no reaper, we do not know our orphans at all."""
    if sibling.known.get(pid) == one.started:
        return True
    stranger = (pid, one.started)
    if sibling.before is None or stranger in sibling.before:
        return False
    return not any(other.may_have_started(stranger) for other in others)
