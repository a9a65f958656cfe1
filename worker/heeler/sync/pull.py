"""`heeler sync pull`: a folder made equal to a generation, or to plain keys. Other files are never lost."""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import anyio

from heeler.config import Configuration
from heeler.errors import UsageError
from heeler.rooms import Rooms
from heeler.settings import Settings
from heeler.sync.place import MIRROR, FailedError, Place, open_place, run
from heeler.sync.state import open_index
from heeler.sync.voice import Amount, Voice, count, size, when
from heeler_sync.aside import locked_folder
from heeler_sync.download import list_wanted
from heeler_sync.errors import LocalFileError
from heeler_sync.paths import NOT_A_FILE_OF_THE_JOB, OWN_FOLDER
from heeler_sync.progress import Progress
from heeler_sync.restore import Restore, SyncFolder
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.index import FileIndex
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest
from heeler_sync.snapshot.recover import Reader, restore_newest
from heeler_sync.snapshot.restore import RestoredTree
from heeler_sync.store.retry import RetryingStore
from heeler_sync.threads import in_thread

_NAMED = 3
_LOOKS = 5


@dataclass(frozen=True)
class PullOptions:
    """What a person asks for besides address and folder; see the flags."""

    mode: str | None = None
    generation: int | None = None
    move_aside: bool = False
    as_json: bool = False


def pull(configuration: Configuration, url: str, folder: Path, options: PullOptions) -> None:
    """Make a folder equal to what storage holds, and say what was done."""
    voice = Voice(as_json=options.as_json)
    settings = configuration.settings

    async def work() -> int:
        root = check_target(settings, folder)
        place = await open_place(settings, url, options.mode, voice)
        if place.mode == MIRROR:
            if options.generation is not None:
                raise UsageError(f"--generation is for snapshots, and {place.location} is pulled in mode mirror")
            await _Pull(place, root, options, voice).mirror()
        else:
            with open_index(settings, voice.warn) as index:
                await _Pull(place, root, options, voice).snapshot(index)
        return 0

    run(voice, work)


def check_target(settings: Settings, folder: Path) -> Path:
    """The folder that may be made equal to a prefix, absolute and without links.

    Raises:
        UsageError: It is no folder, or one that others need.
    """
    if settings.source is not None and settings.source.startswith("local:"):
        queue = Path(settings.source.removeprefix("local:")).expanduser().absolute()
        settings = replace(settings, source=f"local:{queue}")
    try:
        root = Rooms(settings, Path("/")).folder(os.path.abspath(folder))  # noqa: PTH100 - ".." is for people to use
    except ValueError as error:
        said = str(error).replace("can't be a job's folder", "can't be pulled into")
        raise UsageError(f"DIR {said}") from None
    if root.exists() and not root.is_dir():
        raise UsageError(f"DIR {folder} is not a folder")
    return root


class _Chosen(Reader):
    """A reader of one generation only."""

    def __init__(self, layout: Layout, voice: Voice, generation: int | None) -> None:
        super().__init__(layout, voice.on_event)
        self._generation = generation

    def generations(self) -> list[Kept]:
        """As `Reader.generations`; only the one that was asked for."""
        found = super().generations()
        return [kept for kept in found if self._generation in (None, kept.generation)]

    def require(self, place: Place) -> None:
        """Refuse to restore nothing."""
        if not self._kept:
            raise FailedError(f"nothing at {place.location}: no generation was ever committed there")
        if self._generation is not None and all(kept.generation != self._generation for kept in self._kept):
            kept = ", ".join(str(kept.generation) for kept in self._kept)
            raise UsageError(f"{place.location} does not hold generation {self._generation}; it holds {kept}")


class _Pull:
    """One pull."""

    def __init__(self, place: Place, root: Path, options: PullOptions, voice: Voice) -> None:
        self._place = place
        self._root = root
        self._options = options
        self._voice = voice
        self._progress = Progress(clock=anyio.current_time)
        self._total = 0

    def _amount(self) -> Amount:
        return Amount(self._progress.bytes_down, self._total, "receiving")

    async def snapshot(self, index: FileIndex) -> None:
        """Restore a generation."""
        place = self._place
        place.require_head()
        if place.head is None:
            raise FailedError(f"nothing at {place.location}: no snapshot was ever committed there")
        reader = _Chosen(place.layout, self._voice, self._options.generation)
        for _ in range(_LOOKS):
            await reader.look()
            reader.require(place)
            for kept in reader.generations()[:1]:
                await self._clear(reader.manifest(kept))
            restored = await self._restore(reader, index)
            if restored is not None:
                return self._report(*restored)
        raise FailedError(f"{place.location} changes faster than it can be read; try again")

    async def _restore(self, reader: Reader, index: FileIndex) -> tuple[Kept, RestoredTree] | None:
        with await in_thread(locked_folder, self._root):
            indexed = await in_thread(index.load, self._root)
            async with self._voice.showing(self._amount):
                found = await restore_newest(reader, self._root, indexed, self._progress, self._place.policy)
            if found is not None:
                files = found[1].files
                await in_thread(index.update, self._root, files, indexed.keys() - files.keys())
        return found

    async def _clear(self, manifest: Manifest | None) -> None:
        """See to it that nothing of the person's gets lost in the folder."""
        if manifest is not None:
            self._total = sum(place.stored for place in manifest.places.values())
            await in_thread(self._check_others, manifest.tree.files, manifest.tree.links)

    def _check_others(self, files: Collection[str], links: Collection[str]) -> None:
        others = other_files(self._root, files, links)
        if others and not self._options.move_aside:
            named = ", ".join(others[:_NAMED]) + (" ..." if len(others) > _NAMED else "")
            raise FailedError(
                f"DIR {self._root} holds {count(len(others), 'other file')} ({named}): name an empty folder,"
                " or let --move-aside move them into .heeler/aside there"
            )
        _keep_earlier_aside(self._root, files, links)

    async def mirror(self) -> None:
        """Download plain keys."""
        place, root = self._place, self._root
        store = RetryingStore(place.store, place.policy)
        wanted = await list_wanted(store, place.location, lambda _path: True)
        if not wanted:
            held = "; it holds snapshots: leave --mode mirror out" if place.head or place.trouble else ""
            raise FailedError(f"nothing at {place.location}: no object has a key that begins so{held}")
        self._total = sum(item.info.size for item in wanted)
        await in_thread(self._check_others, {item.relative for item in wanted}, ())
        moved: list[int] = []

        def on_event(event: str, fields: Mapping[str, object]) -> None:
            if event == "folder_restored":
                moved.append(int(str(fields["moved_aside"])))
            self._voice.on_event(event, fields)

        with await in_thread(locked_folder, root):
            async with self._voice.showing(self._amount):
                restore = Restore(lambda _bucket: store, place.policy, self._progress, on_event)
                await restore.run([SyncFolder(place.location, root)], [root])
        progress = self._progress
        self._voice.say(
            f"{place.location} is in {root}: {count(len(wanted), 'file')}, {size(self._total)}; {progress.files_down}"
            f" written, {progress.files_kept} were there{self._aside(sum(moved))}"
        )
        self._voice.give(
            {
                "mode": place.mode,
                "location": str(place.location),
                "files": len(wanted),
                "bytes": self._total,
                "written": progress.files_down,
                "kept": progress.files_kept,
                "received": progress.bytes_down,
                "moved_aside": sum(moved),
            }
        )

    def _report(self, kept: Kept, restored: RestoredTree) -> None:
        what = f"{count(kept.files, 'file')}, {size(kept.bytes)}"
        self._voice.say(
            f"generation {kept.generation} of {when(kept.created)} is in {self._root}: {what};"
            f" {restored.fetched} written, {restored.kept} were there{self._aside(restored.moved_aside)}"
        )
        self._voice.give(
            {
                "mode": self._place.mode,
                "location": str(self._place.location),
                "generation": kept.generation,
                "files": kept.files,
                "bytes": kept.bytes,
                "written": restored.fetched,
                "kept": restored.kept,
                "received": restored.bytes,
                "moved_aside": restored.moved_aside,
            }
        )

    def _aside(self, moved: int) -> str:
        if not moved:
            return ""
        what = count(moved, "other or older entry", "other or older entries")
        return f"; {what} moved to {self._root}/{OWN_FOLDER}/aside"


def other_files(root: Path, files: Collection[str], links: Collection[str]) -> list[str]:
    """What is in a folder besides these files and links; folders don't count. Blocks.

    Raises:
        LocalFileError: It can't be read.
    """
    found: list[str] = []
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            with os.scandir(root / prefix) as entries:
                for entry in entries:
                    path = prefix + entry.name
                    if path in NOT_A_FILE_OF_THE_JOB:
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(path + "/")
                    elif path not in (links if entry.is_symlink() else files):
                        found.append(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise LocalFileError(str(root / prefix), f"cannot be read: {error.strerror}") from None
    return sorted(found)


def _keep_earlier_aside(root: Path, files: Collection[str], links: Collection[str]) -> None:
    """What an earlier pull moved aside would be deleted by this one: it gets a name of its own. Blocks.

    But for older states of files that are wanted: these may go.
    """
    own = root / OWN_FOLDER
    aside = own / "aside"
    try:
        if own.is_symlink() or not aside.is_dir() or not other_files(aside, files, links):
            return
        number = next(number for number in itertools.count(1) if not (own / f"aside.{number}").exists())
        aside.rename(own / f"aside.{number}")
    except OSError as error:
        raise LocalFileError(str(aside), f"cannot be renamed: {error.strerror}") from None
