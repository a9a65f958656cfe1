"""Bringing folders to the state that storage holds, before anything watches or uses them.

A listing or an object that can't be had is an error; only a listing that says "nothing there" is an empty folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from heeler_sync.aside import move_aside, remove_incoming
from heeler_sync.download import Wanted, check_space, fetch, in_place, list_wanted
from heeler_sync.events import EventSink
from heeler_sync.groups import for_each
from heeler_sync.paths import Location
from heeler_sync.progress import Progress
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryPolicy
from heeler_sync.threads import in_thread
from heeler_sync.upload import Stored

_AT_ONCE = 16


@dataclass(frozen=True)
class SyncFolder:
    """A folder and the place in storage that belongs to it.

    Attributes:
        location: Bucket and prefix.
        path: The folder, absolute.
        pattern: Only files whose relative path it matches somewhere (`re.search`); None takes all.
        snapshot: Whether its files are kept as generations, and not under their own names.
        ready: Of a snapshot: a glob (`fnmatch`) of the file that the program writes last.
        deletes: Of a mirror: whether the objects of files that go are deleted.
        gzip: Whether the objects are gzipped and named `<key>.gz`; of a snapshot: those that it takes over when there
            is no generation yet.
    """

    location: Location
    path: Path
    pattern: re.Pattern[str] | None = None
    snapshot: bool = False
    ready: str | None = None
    deletes: bool = True
    gzip: bool = False

    def include(self, relative: str) -> bool:
        """Whether a file belongs to it."""
        return self.pattern is None or self.pattern.search(relative) is not None


@dataclass
class Restored:
    """What storage and folders have in common after a restore: by root folder, then by relative path."""

    files: dict[Path, dict[str, tuple[Wanted, Stored]]] = field(default_factory=dict)

    def known(self, folder: SyncFolder) -> dict[str, Stored]:
        """The files of `folder` that its own location is known to hold under their own names, by relative path."""
        return {
            relative: stored
            for relative, (item, stored) in self.files.get(folder.path, {}).items()
            if item.store.bucket == folder.location.bucket
            and item.info.key == folder.location.key(relative)
            and folder.include(relative)
        }


class Restore:
    """One restore of several folders."""

    def __init__(
        self,
        stores: Callable[[SyncFolder], ObjectStore],
        policy: RetryPolicy,
        progress: Progress,
        on_event: EventSink,
    ) -> None:
        """Args: `stores` gives the store of a folder's files."""
        self._stores = stores
        self._policy = policy
        self._progress = progress
        self._on_event = on_event
        self._restored = Restored()

    async def run(
        self, sources: Sequence[SyncFolder], roots: Iterable[Path], others: Collection[Path] = ()
    ) -> Restored:
        """Make every folder of `roots` hold exactly what the `sources` that belong to it hold.

        Folders in `others` stay as they are, also below one of the roots.

        Raises:
            SyncError: Something can't be had or written; nothing is known of the folders then.
        """
        wanted: dict[Path, dict[str, Wanted]] = {root: {} for root in roots}
        for source in sources:
            found = await list_wanted(self._stores(source), source.location, source.include)
            wanted[source.path].update({item.relative: item for item in found})
        for root in sorted(wanted, key=lambda path: len(path.parts)):
            nested = [other for other in {*wanted, *others} if other != root and other.is_relative_to(root)]
            await self._restore_folder(root, _without_markers(wanted[root]), nested)
        return self._restored

    async def _restore_folder(self, root: Path, wanted: dict[str, Wanted], nested: list[Path]) -> None:
        kept: dict[str, Stored] = {}

        async def check(item: Wanted) -> None:
            found = await in_place(item, root)
            if found is not None:
                kept[item.relative] = found
                self._note(root, item, found)

        await for_each(wanted.values(), check, _AT_ONCE)
        moved = await in_thread(move_aside, root, kept, nested)
        missing = [item for relative, item in wanted.items() if relative not in kept]
        await in_thread(check_space, root, sum(item.info.size for item in missing))
        self._progress.files_kept += len(kept)

        async def download(item: Wanted) -> None:
            found = await fetch(item, root, self._policy)
            if found is not None:
                self._note(root, item, found)
            self._progress.files_down += 1
            self._progress.bytes_down += item.info.size

        await for_each(missing, download, _AT_ONCE)
        await in_thread(remove_incoming, root)
        self._on_event(
            "folder_restored",
            {"folder": str(root), "downloaded": len(missing), "kept": len(kept), "moved_aside": moved},
        )

    def _note(self, root: Path, item: Wanted, found: Stored) -> None:
        self._restored.files.setdefault(root, {})[item.relative] = (item, found)


def _without_markers(wanted: dict[str, Wanted]) -> dict[str, Wanted]:
    """Leave out empty objects that are only a folder's name, below which others lie."""
    folders: set[str] = set()
    for relative in wanted:
        parts = relative.split("/")
        folders.update("/".join(parts[:count]) for count in range(1, len(parts)))
    return {relative: item for relative, item in wanted.items() if item.info.size or relative not in folders}
