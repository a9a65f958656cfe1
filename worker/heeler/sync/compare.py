"""Whether a folder is what its newest generation holds: by stamps where they are known, else by reading."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from heeler_sync.errors import DamagedObjectError, LocalFileError, ObjectNotFoundError
from heeler_sync.groups import for_each
from heeler_sync.snapshot.chunks import CHUNK_BYTES, digest_of
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.index import FileIndex, Indexed
from heeler_sync.snapshot.layout import Layout, read_object
from heeler_sync.snapshot.manifest import Manifest, Tree
from heeler_sync.snapshot.scan import Found, TreeScan, coarse_now, scan_tree
from heeler_sync.store.retry import retrying
from heeler_sync.threads import in_thread
from heeler_sync.tree import Stamp, open_inside

_READERS = 4


def everything(_path: str) -> bool:
    """All files belong to a folder that a person names."""
    return True


def in_common(indexed: Mapping[str, Indexed], manifest: Manifest | None) -> dict[str, Indexed]:
    """Those entries that are just what the generation holds of their files."""
    if manifest is None or manifest.chunk_bytes != CHUNK_BYTES:
        return {}
    files = manifest.tree.files
    return {
        path: entry
        for path, entry in indexed.items()
        if (held := files.get(path)) is not None
        and entry.chunks == held.chunks
        and entry.stamp.mtime_ns == held.mtime_ns
    }


@dataclass(frozen=True)
class Looked:
    """A folder by its stamps.

    Attributes:
        scan: What was there.
        since: When the scan began, as the kernel would have stamped a file.
    """

    scan: TreeScan
    since: int

    @property
    def lasting(self) -> bool:
        """Whether every file would get another stamp by another change, also by one in this very moment."""
        return all(found.stamp.ctime_ns < self.since for found in self.scan.files.values())

    def fingerprint(self) -> str:
        """A digest of all stamps, permissions, folders and links."""
        scan = self.scan
        files = sorted((path, found.mode, vars(found.stamp)) for path, found in scan.files.items())
        text = repr((files, sorted(scan.folders.items()), sorted(scan.links.items())))
        return str(blake3(text.encode("utf-8")).hexdigest())


def look(root: Path) -> Looked:
    """Look at a folder once. Blocks.

    Raises:
        LocalFileError: It is not there, or can't be read.
    """
    since = coarse_now()
    try:
        with _without_collections():
            return Looked(scan_tree(root, everything), since)
    except FileNotFoundError:
        raise LocalFileError(str(root), "is gone") from None


class Memory:
    """Which generation a folder was seen to be, by the folder's fingerprint: one small file for each."""

    def __init__(self, state: Path, boot: str, root: Path, location: str) -> None:
        """Args: after a reboot nothing is believed, since a power cut may leave a file with its times alone."""
        name = blake3(f"{root}\0{location}".encode("utf-8", "surrogateescape")).hexdigest()
        self._file = state / "sync-seen" / f"{name[:32]}.json"
        self._boot = boot

    def is_known(self, looked: Looked, kept: Kept) -> bool:
        """Whether the folder, as it was looked at, is known to be what that generation holds. Blocks."""
        try:
            known = json.loads(self._file.read_bytes())
        except (OSError, ValueError):
            return False
        return bool(known == self._entry(looked, kept))

    def note(self, looked: Looked, kept: Kept) -> None:
        """The folder, as it was looked at, is what that generation holds. Blocks."""
        if not self._boot or not looked.lasting:
            return
        new = self._file.with_suffix(f".{os.getpid()}")
        with suppress(OSError):  # then it is only compared anew
            self._file.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self._entry(looked, kept)), encoding="ascii")
            new.replace(self._file)

    def _entry(self, looked: Looked, kept: Kept) -> dict[str, str]:
        return {"boot": self._boot, "manifest": kept.digest, "tree": looked.fingerprint()}


class Comparison:
    """One comparison of a folder with a generation."""

    def __init__(self, layout: Layout, kept: Kept, root: Path, index: FileIndex, memory: Memory) -> None:
        self._layout = layout
        self._kept = kept
        self._root = root
        self._index = index
        self._memory = memory
        self._differs = False
        self._learned: dict[str, Indexed] = {}
        self.read = 0

    async def same(self, looked: Looked) -> bool:
        """Whether the folder holds just what the generation does; files whose stamps are unknown are read.

        Raises:
            DamagedObjectError: The generation's manifest is gone or damaged.
            LocalFileError: A file can't be read.
        """
        if await in_thread(self._memory.is_known, looked, self._kept):
            await self._require_manifest()
            return True
        manifest = await self._layout.read_manifest(self._kept)
        if manifest.chunk_bytes != CHUNK_BYTES or not _alike(looked.scan, manifest.tree):
            return False
        if await self._same_content(looked, manifest.tree):
            await in_thread(self._memory.note, looked, self._kept)
            return True
        return False

    async def _require_manifest(self) -> None:
        """The manifest is what the head says; nobody needs to know what it says."""
        store, key = self._layout.store, self._layout.manifest_key(self._kept)
        try:
            data, _ = await retrying(self._layout.policy, lambda: read_object(store, key))
        except ObjectNotFoundError:
            raise DamagedObjectError(store.bucket, key, "it is missing") from None
        if blake3(data).hexdigest() != self._kept.digest:
            raise DamagedObjectError(store.bucket, key, "its digest is not the one that the head lists")

    async def _same_content(self, looked: Looked, tree: Tree) -> bool:
        with _without_collections():
            indexed = await in_thread(self._index.load, self._root)
        unknown = []
        for path, found in looked.scan.files.items():
            entry = indexed.get(path)
            if entry is None or entry.stamp != found.stamp:
                unknown.append((path, found))
            elif entry.chunks != tree.files[path].chunks:
                return False

        async def compare(item: tuple[str, Found]) -> None:
            path, found = item
            if not self._differs:
                chunks = await in_thread(self._digests, path, found)
                self._differs = self._differs or chunks != tree.files[path].chunks
                if chunks is not None and found.stamp.ctime_ns < looked.since:
                    self._learned[path] = Indexed(found.stamp, chunks)

        await for_each(unknown, compare, _READERS)
        await in_thread(self._index.update, self._root, self._learned, indexed.keys() - looked.scan.files.keys())
        return not self._differs

    def _digests(self, path: str, found: Found) -> tuple[bytes, ...] | None:
        """The chunks of a file; None if it is another one by now. Blocks."""
        try:
            descriptor = open_inside(self._root, path)
        except FileNotFoundError:
            return None
        try:
            chunks: list[bytes] = []
            for at in range(0, found.stamp.size, CHUNK_BYTES):
                data = os.pread(descriptor, min(CHUNK_BYTES, found.stamp.size - at), at)
                chunks.append(digest_of(data))
                self.read += len(data)
            return tuple(chunks) if Stamp.of(os.fstat(descriptor)) == found.stamp else None
        except OSError as error:
            raise LocalFileError(str(self._root / path), f"cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)


def _alike(scan: TreeScan, tree: Tree) -> bool:
    """Whether names, kinds, sizes, times and permissions are the same."""
    if scan.folders != tree.folders or scan.links != tree.links or scan.files.keys() != tree.files.keys():
        return False
    files = tree.files
    return all(
        (found.mode, found.stamp.mtime_ns, found.stamp.size) == ((held := files[path]).mode, held.mtime_ns, held.size)
        for path, found in scan.files.items()
    )


@contextmanager
def _without_collections() -> Iterator[None]:
    """Many small objects are made, and none of them is garbage: looking for some would double the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
