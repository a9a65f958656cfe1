"""What /proc says of processes, and how to end all that one start has left. Blocking calls only.

A program's processes are found by a tag in their environment: children that left the group or the session, or
whose parents died, still carry it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterator

TAG_VARIABLE = "HEELER_PROCESS_TAG"
_KILL_SECONDS = 5.0
_PR_SET_CHILD_SUBREAPER = 36


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


def kill_all(tag: str, group: int | None = None) -> int:
    """SIGKILL the group and every process with the tag, until none is left; how many were found.

    Raises:
        TimeoutError: Some did not die (uninterruptible sleep); they can do no more harm than finish one call.
    """
    if group is not None:
        signal_group(group, signal.SIGKILL)
    killed: set[int] = set()
    give_up = time.monotonic() + _KILL_SECONDS
    while pids := tagged(tag):
        for pid in pids:
            signal_process(pid, signal.SIGKILL)
        killed.update(pids)
        if time.monotonic() > give_up:
            raise TimeoutError(f"processes {pids} do not die")
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
        """Collect what was there at the last look already; how many."""
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
