"""What /proc says of processes, and how to end all that one start has left. Blocking calls only.

A program's processes are found by a tag in their environment: children that left the group or the session, or
whose parents died, still carry it. One that has dropped its environment too is found as a descendant of ours, since
the kernel gives orphans to their nearest reaper, which we are; `siblings` knows whose.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import NamedTuple

TAG_VARIABLE = "HEELER_PROCESS_TAG"
_KILL_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37

Identity = tuple[int, int]
"""A process for good: its pid, and its start in clock ticks since boot."""


class UndyingError(Exception):
    """Processes did not die of SIGKILL (uninterruptible sleep): they can do no more harm than finish one call.

    Attributes:
        pids: Which they are.
    """

    def __init__(self, pids: Collection[int]) -> None:
        self.pids = sorted(pids)
        super().__init__(f"processes {self.pids} do not die")


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; with the pid it names a process for good."""
    fields = _stat(pid)
    return None if fields is None else int(fields[19])


def _stat(pid: int) -> list[bytes] | None:
    """The fields of /proc/PID/stat from the state (field 3) on."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rsplit(b")", 1)[1].split()
    except (OSError, IndexError):
        return None


def _pids() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def tagged(tag: str) -> list[int]:
    """All living processes whose environment carries the tag."""
    mark = f"{TAG_VARIABLE}={tag}".encode()
    found = []
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                if mark in file.read().split(b"\0"):
                    found.append(pid)
        except OSError:  # it ended, or it is not ours to look into
            continue
    return found


def in_session(leader: int) -> list[int]:
    """All living processes of a session, by its leader's pid: also those that have dropped their environment."""
    return [pid for pid in _pids() if (fields := _stat(pid)) is not None and int(fields[3]) == leader]


def descendants() -> frozenset[Identity] | None:
    """All living descendants of ours; None if we are no reaper, so that orphans do not become ours."""
    return frozenset((pid, one.started) for pid, one in relatives().items()) if _is_reaper() else None


def _is_reaper() -> bool:
    if os.getpid() == 1:
        return True
    answer = ctypes.c_int(0)
    ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(answer), 0, 0, 0)
    return bool(answer.value)


class Relative(NamedTuple):
    """A descendant of ours.

    Attributes:
        started: Its start in clock ticks since boot.
        group: Its process group.
        session: Its session.
        branch: The child of ours that it is, or descends from.
    """

    started: int
    group: int
    session: int
    branch: int


def relatives() -> dict[int, Relative]:
    """All living descendants of ours by pid."""
    children: dict[int, list[tuple[int, list[bytes]]]] = {}
    for pid in _pids():
        fields = _stat(pid)
        # A zombie of several threads is one whose first thread has ended: the others live.
        if fields is not None and (fields[0] not in (b"Z", b"X") or int(fields[17]) > 1):
            children.setdefault(int(fields[1]), []).append((pid, fields))
    found: dict[int, Relative] = {}
    parents = [(os.getpid(), 0)]
    while parents:
        parent, branch = parents.pop()
        for pid, fields in children.get(parent, ()):
            if pid not in found:
                found[pid] = Relative(int(fields[19]), int(fields[2]), int(fields[3]), branch or pid)
                parents.append((pid, branch or pid))
    return found


def kill_all(tag: str, group: int | None = None) -> int:
    """SIGKILL the group and every process with the tag; how many were found.

    Args:
        tag: What the processes of one start carry.
        group: The start's process group.

    Raises:
        UndyingError: Some did not die.
    """
    if group is not None:
        signal_group(group, signal.SIGKILL)
    return kill_found(partial(tagged, tag), 1, _KILL_SECONDS)


def kill_found(find: Callable[[], Collection[int]], looks: int, patience: float) -> int:
    """SIGKILL what is found until nothing is; how many were found.

    Args:
        find: Looks for what is left.
        looks: So many in a row have to find nothing.
        patience: Seconds until those that do not die are given up.

    Raises:
        UndyingError: Some did not die.
    """
    killed: set[int] = set()
    give_up = time.monotonic() + patience
    quiet = 0
    while quiet < looks:
        pids = find()
        for pid in pids:
            signal_process(pid, signal.SIGKILL)
        killed.update(pids)
        quiet = 0 if pids else quiet + 1
        if pids and time.monotonic() > give_up:
            raise UndyingError(pids)
        if pids:
            time.sleep(0.005)
    return len(killed)


def signal_group(group: int, number: int) -> bool:
    """Signal a process group; whether there was one that we may signal."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def signal_process(pid: int, number: int) -> None:
    """Signal a process that may be gone, or not be ours to signal."""
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return


def become_reaper() -> None:
    """Have the kernel give us the orphans among our descendants, as it does to PID 1."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


class OrphanReaper:
    """Collects the zombies of orphans that became ours.

    Our own children are collected at once by whoever started them; a zombie that was there at the last look too
    has nobody else to collect it.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()

    def look(self) -> int:
        """Collect what was there at the last look already; how many those were."""
        zombies = set(_own_zombies()) if _a_child_has_ended() else set()
        reaped = 0
        for pid in zombies & self._seen:
            try:
                os.waitpid(pid, os.WNOHANG)
                reaped += 1
            except ChildProcessError:
                continue
        self._seen = zombies
        return reaped


def _a_child_has_ended() -> bool:
    """Whether any child of ours waits to be collected; much cheaper than a look at all processes."""
    try:
        return os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return False


def _own_zombies() -> Iterator[int]:
    me = str(os.getpid()).encode()
    for pid in _pids():
        fields = _stat(pid)
        if fields is not None and fields[0] == b"Z" and fields[1] == me:
            yield pid
