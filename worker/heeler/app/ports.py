"""Which TCP ports a program listens on, as /proc tells. Blocking calls only."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

_LISTENS = "0A"
"""The state of a listening socket in /proc/net/tcp (proc(5))."""
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")


def listening(pids: Iterable[int]) -> set[int]:
    """The ports on which these processes accept connections."""
    ports = dict(_listening_sockets())
    return {ports[inode] for pid in pids for inode in _sockets(pid) if inode in ports}


def _listening_sockets() -> Iterator[tuple[str, int]]:
    """The inode and the port of every listening socket of this network namespace."""
    for table in _TABLES:
        try:
            with open(table, encoding="ascii") as file:
                rows = [line.split() for line in file]
        except OSError:  # no IPv6 here
            continue
        for row in rows[1:]:
            if row[3] == _LISTENS:
                yield row[9], int(row[1].rpartition(":")[2], 16)


def _sockets(pid: int) -> Iterator[str]:
    folder = f"/proc/{pid}/fd"
    try:
        names = os.listdir(folder)
    except OSError:  # it ended, or it is not ours to look into
        return
    for name in names:
        try:
            target = os.readlink(f"{folder}/{name}")
        except OSError:
            continue
        if target.startswith("socket:["):
            yield target[8:-1]
