"""Which files some process holds open for writing, as far as /proc shows us. Blocking calls only."""

from __future__ import annotations

import os
from collections.abc import Iterable

_ACCESS_MODE = 0o3


def open_for_writing(paths: Iterable[str]) -> set[str]:
    """Those of `paths` (absolute, real) that a process other than this one holds open for writing.

    Processes that we may not look into, and writers through a memory map alone, are not seen.
    """
    wanted = set(paths)
    if not wanted:
        return set()
    found: set[str] = set()
    own = str(os.getpid())
    for process in os.listdir("/proc"):
        if process.isdigit() and process != own:
            found |= _held_by(process, wanted)
    return found


def _held_by(process: str, wanted: set[str]) -> set[str]:
    folder = f"/proc/{process}/fd"
    held: set[str] = set()
    try:
        descriptors = os.listdir(folder)
    except OSError:  # it ended, or it is not ours to look into
        return held
    for descriptor in descriptors:
        try:
            target = os.readlink(f"{folder}/{descriptor}")
            if target in wanted and _writable(process, descriptor):
                held.add(target)
        except OSError:
            continue
    return held


def _writable(process: str, descriptor: str) -> bool:
    with open(f"/proc/{process}/fdinfo/{descriptor}", encoding="ascii") as info:
        for line in info:
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & _ACCESS_MODE in (os.O_WRONLY, os.O_RDWR)
    return False
