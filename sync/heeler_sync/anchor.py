"""Which folder stands at a path. Blocking calls only.

A folder may be unmounted, renamed away, or removed and made anew while it is mirrored; what happens to another
folder of the same name says nothing of the files of the first.
"""

from __future__ import annotations

import os
from pathlib import Path


class Anchor:
    """The folder that stood at a path once, held open, so that its inode can't become another folder's."""

    def __init__(self, root: Path) -> None:
        self._root = root
        try:
            self._descriptor: int | None = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            self._descriptor = None

    @property
    def missing(self) -> bool:
        """Whether there was no folder."""
        return self._descriptor is None

    def stands(self) -> bool:
        """Whether that folder still stands there."""
        if self._descriptor is None:
            return not self._root.is_dir()
        try:
            return os.path.samestat(os.fstat(self._descriptor), self._root.stat())
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the folder."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
