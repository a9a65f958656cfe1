"""A folder as a snapshot sees it: files with their stamps, folders, and links that stay inside. Blocking calls only.

Unlike mirror mode, links are kept as links. What can't be kept is left out, with the reason.
"""

from __future__ import annotations

import os
import posixpath
import stat
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from heeler_sync.errors import LocalFileError
from heeler_sync.paths import NOT_A_FILE_OF_THE_JOB, OWN_FOLDER
from heeler_sync.snapshot.manifest import why_not_link
from heeler_sync.tree import Stamp, inside

_CLOCK_REALTIME_COARSE = 5
"""Linux's own number; the clock that the kernel stamps files with. Python has no name for it."""


TICK_SECONDS = 0.011
"""Longer than any kernel's tick (100 to 1,000 Hz)."""


def coarse_now() -> int:
    """What the kernel would stamp a file with now, nanoseconds since 1970: it moves in ticks of a few milliseconds.

    A file whose stamp is of this very tick may change again without its stamp changing.
    """
    return time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)


class Found(NamedTuple):
    """A file's stamp and permission bits."""

    stamp: Stamp
    mode: int


@dataclass
class TreeScan:
    """A folder at about one time.

    Attributes:
        files: By path.
        folders: Permission bits by path.
        links: Targets by path; relative and inside.
        link_times: When each link was made, nanoseconds since 1970.
        left_out: What is there but can't be kept, with the reason, by path.
    """

    files: dict[str, Found] = field(default_factory=dict)
    folders: dict[str, int] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    link_times: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def without(self, paths: Collection[str]) -> TreeScan:
        """The scan without some of its files."""
        files = {path: found for path, found in self.files.items() if path not in paths} if paths else self.files
        return TreeScan(files, self.folders, self.links, self.link_times, self.left_out)

    def same_tree(self, other: TreeScan) -> bool:
        """Whether both saw the same."""
        mine = (self.files, self.folders, self.links, self.link_times)
        return mine == (other.files, other.folders, other.links, other.link_times)


def scan_tree(root: Path, include: Callable[[str], bool]) -> TreeScan:
    """All below `root` but heeler's own folder; of files and links only those that `include` takes.

    Raises:
        FileNotFoundError: `root` itself is not there.
        LocalFileError: A folder can't be read.
    """
    found = TreeScan()
    real_root = os.path.realpath(root)
    pending = [(str(root), "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name != OWN_FOLDER and (prefix or entry.name not in NOT_A_FILE_OF_THE_JOB):
                        _note(entry, prefix + entry.name, real_root, include, found, pending)
        except FileNotFoundError:
            if not prefix:
                raise
            found.folders.pop(prefix[:-1], None)  # removed while we walked: the next scan tells
        except OSError as error:
            raise LocalFileError(folder, f"cannot be read: {error.strerror}") from None
    return found


def _note(
    entry: os.DirEntry[str],
    path: str,
    real_root: str,
    include: Callable[[str], bool],
    found: TreeScan,
    pending: list[tuple[str, str]],
) -> None:
    try:
        status = entry.stat(follow_symlinks=False)
    except FileNotFoundError:
        return
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        found.folders[path] = mode & 0o777
        pending.append((entry.path, path + "/"))
    elif not include(path):
        return
    elif stat.S_ISREG(mode):
        found.files[path] = Found(Stamp.of(status), mode & 0o777)
    elif stat.S_ISLNK(mode):
        _note_link(entry.path, path, real_root, found)
        if path in found.links:
            found.link_times[path] = status.st_ctime_ns
    else:
        found.left_out[path] = "not a regular file"


def _note_link(at: str, path: str, real_root: str, found: TreeScan) -> None:
    try:
        text = os.readlink(at)
    except OSError:
        return  # gone, or something else by now: the next scan tells
    target = _inner_target(text, path, real_root)
    why = why_not_link(path, target)
    real = os.path.realpath(at)
    if why is None and real != real_root and not inside(real, real_root):
        why = "it leads out of the folder"
    if why is None and target != text and os.path.realpath(posixpath.join(posixpath.dirname(at), target)) != real:
        why = "it has '..' behind a link"
    if why is None:
        found.links[path] = target
    else:
        found.left_out[path] = f"a symbolic link: {why}"


def _inner_target(text: str, path: str, real_root: str) -> str:
    """The link's target without detours; an absolute one inside the folder as seen from the link."""
    if text.startswith("/"):
        if text != real_root and not text.startswith(real_root + "/"):
            return text
        text = posixpath.relpath(text, posixpath.join(real_root, posixpath.dirname(path)))
    return posixpath.normpath(text) if text else text
