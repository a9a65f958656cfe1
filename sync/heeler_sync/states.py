"""The present states of files that have been quiet: to be sent, still open, left out, or gone. Blocking calls only."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from heeler_sync.openfiles import open_for_writing
from heeler_sync.tree import Stamp, examine

UNKNOWN = Stamp(-1, 0, 0, 0)
"""Of a file that can't be looked at: whoever tries to send it learns why."""


@dataclass(frozen=True)
class State:
    """A file that may be sent.

    Attributes:
        stamp: Its state now.
        held_open: Whether another process has it open for writing.
    """

    stamp: Stamp
    held_open: bool


def look_at(root: Path, relatives: list[str], look_for_writers: bool) -> dict[str, State | str | None]:
    """The present states of files that look quiet: why one is left out, or None for one that is gone. Blocks."""
    real = {relative: os.path.realpath(root / relative) for relative in relatives}
    real_root = os.path.realpath(root)
    held = open_for_writing(real.values()) if look_for_writers else set()
    states: dict[str, State | str | None] = {}
    for relative in relatives:
        try:
            found = examine(str(root / relative), real_root)
        except (FileNotFoundError, NotADirectoryError):
            states[relative] = None
        except OSError:
            states[relative] = State(UNKNOWN, held_open=False)
        else:
            states[relative] = State(found, real[relative] in held) if isinstance(found, Stamp) else found
    return states
