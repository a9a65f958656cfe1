"""A generation back into a folder: what is there already is kept, the rest is fetched, verified and renamed into place.

A file on its way stands in `.heeler/incoming/` under a name made of its path, so that a restore that was interrupted
goes on with the chunks that it had; a file that differs from the wanted one lends the chunks that it shares.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import anyio
from blake3 import blake3

from heeler_sync.aside import move_aside, remove_incoming
from heeler_sync.download import check_space
from heeler_sync.errors import LocalFileError
from heeler_sync.groups import for_each
from heeler_sync.paths import OWN_FOLDER
from heeler_sync.progress import Progress
from heeler_sync.snapshot.chunks import CHUNK_BYTES, Buffer, digest_of
from heeler_sync.snapshot.fetch import fetch_chunks
from heeler_sync.snapshot.index import Indexed
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import FileEntry, Manifest, Tree
from heeler_sync.snapshot.scan import TICK_SECONDS
from heeler_sync.store.retry import RetryPolicy
from heeler_sync.threads import in_thread
from heeler_sync.tree import Stamp

_READERS = 4
_BATCH = 100
_PLACERS = 16
_PLACED = 10
"""Small files are made durable many at a time: the file system then puts them into one commit of its journal."""


@dataclass
class _Incoming:
    """A file on its way: the chunks that it lacks, by their numbers."""

    entry: FileEntry
    path: Path
    missing: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class RestoredTree:
    """What a restore did.

    Attributes:
        files: All files of the folder with their stamps, as an index keeps them.
        kept: How many were in place.
        fetched: How many were written.
        bytes: Read from storage.
        moved_aside: What else was in the folder.
    """

    files: Mapping[str, Indexed]
    kept: int
    fetched: int
    bytes: int
    moved_aside: int


class TreeRestore:
    """Makes one folder equal to one generation."""

    def __init__(
        self,
        layout: Layout,
        root: Path,
        indexed: Mapping[str, Indexed],
        progress: Progress,
        policy: RetryPolicy,
    ) -> None:
        """Args: `indexed` is what is known of files on disk, good for files with the same stamp."""
        self._layout = layout
        self._root = root
        self._indexed = indexed
        self._progress = progress
        self._policy = policy
        self._chunk_bytes = CHUNK_BYTES
        self._done: dict[str, Indexed] = {}
        self._bytes = 0

    async def run(self, manifest: Manifest, nested: Collection[Path] = ()) -> RestoredTree:
        """Restore; folders in `nested` are others' and stay.

        Raises:
            DamagedPackError: The generation can't be had.
            LocalFileError: The folder can't be written, or its disk is too small.
            StoreError: Storage refused, or was out of reach for longer than the policy's patience.
        """
        tree = manifest.tree
        self._chunk_bytes = manifest.chunk_bytes
        entries = list(tree.files.values())
        batches = [entries[at : at + _BATCH] for at in range(0, len(entries), _BATCH)]
        await for_each(batches, lambda batch: in_thread(self._keep, batch), _READERS)
        kept = len(self._done)
        with _local_errors(self._root):
            await in_thread(self._clear_way, tree, nested)
        moved = await in_thread(move_aside, self._root, {*self._done, *self._arriving(tree)}, nested)
        with _local_errors(self._root):
            incoming = await in_thread(self._prepare, manifest)
            missing = sum(self._size(manifest, item, number) for item in incoming for number in item.missing)
        await in_thread(check_space, self._root, missing)
        await self._fetch(manifest, incoming)
        with _local_errors(self._root):
            await in_thread(self._finish, tree)
        await in_thread(remove_incoming, self._root)
        await anyio.sleep(TICK_SECONDS)  # what the program changes from now on gets another stamp
        self._progress.files_kept += kept
        self._progress.files_down += len(incoming)
        return RestoredTree(self._done, kept, len(incoming), self._bytes, moved)

    # -- what is there already -------------------------------------------------------------------------------------

    def _keep(self, entries: Sequence[FileEntry]) -> None:
        for entry in entries:
            found = self._in_place(entry)
            if found is not None:
                self._done[entry.path] = found

    def _in_place(self, entry: FileEntry) -> Indexed | None:
        """What is known of the file on disk, if it has the wanted content; it gets the wanted mode and time."""
        path = self._root / entry.path
        try:
            if path.is_symlink() or not path.is_file() or not self._is_direct(path):
                return None
            status = path.stat()
            if status.st_size != entry.size or status.st_nlink > 1:
                return None  # names of one file can't have a mode and a time each
            stamp = Stamp.of(status)
            known = self._indexed.get(entry.path) if self._chunk_bytes == CHUNK_BYTES else None
            if known is None or known.stamp != stamp:
                known = Indexed(stamp, tuple(_digests(path, self._chunk_bytes)))
            if known.chunks != entry.chunks:
                return None
            return Indexed(_dressed(path, entry), entry.chunks)
        except OSError:
            return None  # then it is fetched, and whoever writes it learns what is wrong

    def _is_direct(self, path: Path) -> bool:
        """Whether no link leads to it."""
        return os.path.realpath(path.parent) == os.path.join(  # noqa: PTH118
            os.path.realpath(self._root), os.path.relpath(path.parent, self._root)
        ).removesuffix("/.")

    # -- what is to come -------------------------------------------------------------------------------------------

    def _arriving(self, tree: Tree) -> set[str]:
        """Files that are not as wanted but may lend chunks: they stay until they are replaced."""
        return {path for path in tree.files if path not in self._done and self._lends(path)}

    def _clear_way(self, tree: Tree, nested: Collection[Path]) -> None:
        """Remove links that are as wanted and wanted folders that are empty: they are made anew, not moved aside."""
        for name, _, _ in os.walk(self._root):
            mode = Path(name).stat().st_mode & 0o777
            if mode & 0o700 != 0o700:  # what is in it, and it itself, could not be moved
                Path(name).chmod(mode | 0o700)
        folders = [folder for path in sorted(tree.folders) if self._is_own_folder(folder := self._root / path)]
        for path, target in tree.links.items():
            link = self._root / path
            if link.is_symlink() and self._is_direct(link) and os.readlink(link) == target:
                link.unlink()
        for folder in reversed(folders):
            if folder not in nested and not any(folder.iterdir()):
                folder.rmdir()

    def _is_own_folder(self, folder: Path) -> bool:
        return folder.is_dir() and not folder.is_symlink() and self._is_direct(folder)

    def _lends(self, path: str) -> bool:
        target = self._root / path
        return target.is_file() and not target.is_symlink() and self._is_direct(target)

    def _prepare(self, manifest: Manifest) -> list[_Incoming]:
        """Folders, and a file for each entry that is not in place, with the chunks that this disk has."""
        for path in sorted(manifest.tree.folders):
            (self._root / path).mkdir(exist_ok=True)
            (self._root / path).chmod(0o700 | manifest.tree.folders[path])
        folder = self._root / OWN_FOLDER / "incoming"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [entry for path, entry in manifest.tree.files.items() if path not in self._done]
        names = {_incoming_name(entry.path) for entry in wanted}
        for stale in folder.iterdir():
            if stale.name not in names:
                shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        return [self._begin(entry, folder / _incoming_name(entry.path), manifest.chunk_bytes) for entry in wanted]

    def _begin(self, entry: FileEntry, path: Path, chunk_bytes: int) -> _Incoming:
        item = _Incoming(entry, path, set(range(len(entry.chunks))))
        if path.is_file() and not path.is_symlink():
            path.chmod(0o600)  # an earlier restore may have died right before it renamed a read-only file
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            for number, _ in _matching(descriptor, entry, chunk_bytes):
                item.missing.discard(number)
            if item.missing and self._lends(entry.path):
                self._borrow(descriptor, item, chunk_bytes)
            os.ftruncate(descriptor, entry.size)
        finally:
            os.close(descriptor)
        return item

    def _borrow(self, descriptor: int, item: _Incoming, chunk_bytes: int) -> None:
        """Take what the file on disk shares with the wanted one."""
        try:
            lender = os.open(self._root / item.entry.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError:
            return  # not for us to read: then it is fetched
        try:
            for number, data in _matching(lender, item.entry, chunk_bytes):
                if number in item.missing:
                    os.pwrite(descriptor, data, number * chunk_bytes)
                    item.missing.discard(number)
        finally:
            os.close(lender)

    @staticmethod
    def _size(manifest: Manifest, item: _Incoming, number: int) -> int:
        return manifest.places[item.entry.chunks[number]].size

    # -- fetch -----------------------------------------------------------------------------------------------------

    async def _fetch(self, manifest: Manifest, incoming: list[_Incoming]) -> None:
        targets: dict[bytes, list[tuple[_Incoming, int]]] = {}
        for item in incoming:
            for number in item.missing:
                targets.setdefault(item.entry.chunks[number], []).append((item, number))

        def write(digest: bytes, data: Buffer) -> None:
            with _local_errors(self._root):
                for item, number in targets[digest]:
                    self._write(item, number, data, manifest.chunk_bytes)

        def on_bytes(count: int) -> None:
            self._bytes += count
            self._progress.bytes_down += count

        places = {digest: manifest.places[digest] for digest in targets}
        await fetch_chunks(self._layout, places, write, on_bytes, self._policy)
        batches = [incoming[at : at + _PLACED] for at in range(0, len(incoming), _PLACED)]
        await for_each(batches, lambda batch: in_thread(self._place, batch), _PLACERS)

    def _write(self, item: _Incoming, number: int, data: Buffer, chunk_bytes: int) -> None:
        descriptor = os.open(item.path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.pwrite(descriptor, data, number * chunk_bytes)
        finally:
            os.close(descriptor)

    def _place(self, items: Sequence[_Incoming]) -> None:
        """These files have all their chunks: make them durable and give them their names."""
        with _local_errors(self._root):
            for item in items:
                target = self._root / item.entry.path
                _finish_file(item.path, item.entry)
                item.path.replace(target)
                self._done[item.entry.path] = Indexed(Stamp.of(target.stat()), item.entry.chunks)

    def _finish(self, tree: Tree) -> None:
        """Links, then the folders' own permissions, deepest first."""
        for path, target in tree.links.items():
            (self._root / path).symlink_to(target)
        for path in sorted(tree.folders, reverse=True):
            _sync(self._root / path)
            (self._root / path).chmod(tree.folders[path])
        _sync(self._root)


def _incoming_name(path: str) -> str:
    return str(blake3(path.encode("utf-8", "surrogateescape")).hexdigest()[:32])


def _digests(path: Path, chunk_bytes: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while data := file.read(chunk_bytes):
            yield digest_of(data)


def _matching(descriptor: int, entry: FileEntry, chunk_bytes: int) -> Iterator[tuple[int, bytes]]:
    """The chunks of an open file that are where the entry wants them: number and bytes."""
    for number, digest in enumerate(entry.chunks):
        data = os.pread(descriptor, min(chunk_bytes, entry.size - number * chunk_bytes), number * chunk_bytes)
        if not data:
            return
        if digest_of(data) == digest:
            yield number, data


def _dressed(path: Path, entry: FileEntry) -> Stamp:
    """The file's stamp once it has the entry's mode and time."""
    status = path.stat()
    if status.st_mode & 0o777 != entry.mode:
        path.chmod(entry.mode)
    if status.st_mtime_ns != entry.mtime_ns:
        os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns))
    return Stamp.of(path.stat())


def _finish_file(path: Path, entry: FileEntry) -> None:
    """Make a file durable, then give it its mode and time."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        os.fchmod(descriptor, entry.mode)
        os.utime(descriptor, ns=(entry.mtime_ns, entry.mtime_ns))
    finally:
        os.close(descriptor)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _local_errors(root: Path) -> Iterator[None]:
    """The machine's refusals as errors of ours."""
    try:
        yield
    except OSError as error:
        where = error.filename or root
        raise LocalFileError(str(where), f"cannot be written: {error.strerror or error}") from None
