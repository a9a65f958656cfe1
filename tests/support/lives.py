"""Lives of a process that keeps a folder's generations: they share a bucket, and some of them a disk.

`Life` does with the real parts what a session does, one step after the other. `picture` says what a folder holds,
`audit` what a bucket does; both know nothing of the code under test but the format.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
from blake3 import blake3

from heeler_sync.paths import Location
from heeler_sync.progress import Progress
from heeler_sync.sender import AlwaysPermitted, Permit
from heeler_sync.snapshot import capture, collect, fetch, outbox, restore
from heeler_sync.snapshot import holder as holding
from heeler_sync.snapshot.chunks import unpack_chunk
from heeler_sync.snapshot.committer import Committer, SnapshotContext, SnapshotTimes, Taking
from heeler_sync.snapshot.head import Head, Kept, decode_head
from heeler_sync.snapshot.holder import Adoptable, Claim, Holder, acquire
from heeler_sync.snapshot.index import FileIndex, Indexed, MemoryIndex
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest, Tree, decode
from heeler_sync.snapshot.recover import restore_newest
from heeler_sync.snapshot.swap import require_fence
from heeler_sync.snapshot.uploads import SqliteUploads
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.memory import MemoryStore
from tests.support.crashing import CrashingIndex, CrashingStore, CrashingUploads, Fuse, crashing_files
from tests.support.stores import IMPATIENT, KIB, Events

PREFIX = Location("memory", "job/")
Picture = dict[str, tuple[object, ...]]


@contextmanager
def small_pieces(at_once: int) -> Iterator[None]:
    """Chunks of 1 KiB and packs of 3 KiB, `at_once` calls at a time; nothing waits for a real clock's next tick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(capture, "CHUNK_BYTES", KIB)
        patch.setattr(capture, "PACK_BYTES", 3 * KIB)
        patch.setattr(fetch, "PACK_BYTES", 3 * KIB)
        patch.setattr(holding, "Manifest", partial(Manifest, chunk_bytes=KIB))
        patch.setattr(restore, "_READERS", at_once)
        patch.setattr(fetch, "_AT_ONCE", at_once)
        patch.setattr(outbox, "_AT_ONCE", at_once)
        patch.setattr(collect, "_DELETES_AT_ONCE", at_once)
        patch.setattr(capture, "coarse_now", lambda: 1 << 62)
        yield


def picture(root: Path) -> Picture:
    """All that a folder holds, but for heeler's own: bytes, permissions, times, links, and folders, empty or not."""
    found: Picture = {}
    for folder, folders, files in os.walk(root):
        if Path(folder) == root and ".heeler" in folders:
            folders.remove(".heeler")
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            mode = stat.S_IMODE(status.st_mode)
            key = str(path.relative_to(root))
            if stat.S_ISLNK(status.st_mode):
                found[key] = ("link", os.readlink(path))
            elif stat.S_ISDIR(status.st_mode):
                found[key] = ("folder", mode)
            else:
                found[key] = ("file", mode, status.st_mtime_ns, path.read_bytes())
    return found


@dataclass(frozen=True)
class Held:
    """What a bucket's head refers to: the head itself, and the keys of all objects that it needs."""

    head: Head | None
    keys: frozenset[str]


def audit(objects: Mapping[str, bytes], prefix: str = PREFIX.prefix) -> Held:
    """Check that every object that the head refers to is there, and that every chunk in it verifies."""
    own = f"{prefix}.heeler/"
    if f"{own}head.json" not in objects:
        return Held(None, frozenset())
    head = decode_head(objects[f"{own}head.json"])
    keys = {f"{own}head.json", *(f"{own}packs/{pack}" for pack in head.adopted)}
    for kept in head.kept:
        key = f"{own}manifests/{kept.generation}.{kept.manifest}.json.zst"
        assert key in objects, f"the head lists {key}, which is not there"
        assert blake3(objects[key]).hexdigest() == kept.digest, key
        manifest = decode(objects[key])
        assert manifest.generation == kept.generation
        assert manifest.tree.digests() <= manifest.places.keys()
        keys |= {key, *(f"{own}packs/{pack}" for pack in manifest.packs)}
        for digest, place in manifest.places.items():
            pack = objects.get(f"{own}packs/{place.pack}")
            assert pack is not None, f"{key} refers to pack {place.pack}, which is not there"
            assert len(pack) == manifest.packs[place.pack]
            unpack_chunk(pack[place.offset : place.offset + place.stored], place.codec, digest, place.size)
    assert keys <= objects.keys(), f"not there: {keys - objects.keys()}"
    return Held(head, frozenset(keys))


class Disk:
    """What outlives a process: a folder, the index of its files, and the journal of what a commit had sent."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.index: FileIndex = MemoryIndex()
        self.uploads = SqliteUploads(Path(":memory:"), "boot", _fail)

    def copy(self, root: Path) -> Disk:
        """The same in another folder; the index does not know its files."""
        shutil.copytree(self.root, root, symlinks=True)
        disk = Disk(root)
        self.uploads._open.backup(disk.uploads._open)
        return disk


def _fail(fault: str) -> None:
    raise AssertionError(fault)


@dataclass
class Record:
    """What a test knows of all lives: the picture of each generation that was tried, and the newest confirmed one."""

    tried: dict[int, Picture] = field(default_factory=dict)
    confirmed: int = 0

    def copy(self) -> Record:
        return Record(dict(self.tried), self.confirmed)


class Life:
    """One process, from its start on, until it ends or `fuse` ends it."""

    def __init__(self, store: MemoryStore, disk: Disk, record: Record, fuse: Fuse | None = None) -> None:
        self.disk = disk
        self.record = record
        self.fuse = fuse or Fuse()
        self.events = Events()
        seen: ObjectStore = CrashingStore(store, self.fuse)
        self.layout = Layout(seen, PREFIX, IMPATIENT)
        self.context = SnapshotContext(
            SnapshotTimes(),
            AlwaysPermitted(),
            self.events,
            Progress(clock=anyio.current_time),
            CrashingIndex(disk.index, self.fuse),
            disk.root.with_name("spool"),
            CrashingUploads(disk.uploads, self.fuse),
        )
        self.adopted: Mapping[str, Adoptable] = {}
        self._restored: Mapping[str, Indexed] = {}

    async def acquire(self) -> None:
        """Take the prefix. Of what the journal offers, one pack is not adopted: there must be something to sweep."""
        self.fuse.phase = "acquire"
        await require_fence(self.layout)

        def adopt(head: Head) -> Mapping[str, Adoptable]:
            found = self.context.uploads.load(str(PREFIX), head)
            self.adopted = dict(sorted(found.items())[1:])
            return self.adopted

        claim = Claim("j", "r", holder="worker")
        self.holder = await acquire(self.layout, claim, self.context.permit, self.events, adopt=adopt)

    async def sweep(self) -> None:
        self.fuse.phase = "sweep"
        await self.holder.sweep(self.context.permit)

    async def restore(self) -> Kept | None:
        """The generation that the folder was brought to; None if there is none."""
        self.fuse.phase = "restore"
        if self.holder.lists_any():
            indexed = self.context.index.load(self.disk.root)
            with crashing_files(self.fuse):
                found = await restore_newest(
                    self.holder, self.disk.root, indexed, self.context.progress, self.layout.policy
                )
            assert found is not None
            kept, restored = found
            self._restored = restored.files
            self.context.index.update(self.disk.root, restored.files, indexed.keys() - restored.files.keys())
        else:
            kept = None
        self.committer = Committer(self.holder, self.disk.root, lambda _path: True, self.context, self._restored)
        return kept

    async def commit(self, phase: str = "commit", result: Mapping[str, Any] | None = None) -> Kept:
        """Commit the folder, and collect what that made garbage."""
        self.fuse.phase = phase
        self.record.tried[self.holder.head.generation + 1] = picture(self.disk.root)

        async def confirm() -> None:
            return

        taking = Taking(lambda _scan: set(), confirm, lambda _scan: set(), lambda: None, lambda: None)
        with self._noting(), crashing_files(self.fuse):
            kept = await self.committer.commit(taking, result=result)
        assert kept is not None
        return kept

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Note for the test when the swap was confirmed, which is before anything is collected."""
        real_commit, real_collect = Holder.commit, Holder.collect

        async def commit(holder: Holder, tree: Tree, *, result: Mapping[str, Any] | None = None) -> Kept:
            kept = await real_commit(holder, tree, result=result)
            self.record.confirmed = kept.generation
            return kept

        async def collect(holder: Holder, permit: Permit) -> int:
            self.fuse.phase = f"collect of {self.fuse.phase}"
            return await real_collect(holder, permit)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Holder, "commit", commit)
            patch.setattr(Holder, "collect", collect)
            yield


def copied(store: MemoryStore) -> MemoryStore:
    """A bucket with the same objects."""
    copy = MemoryStore(store.bucket, store.provider)
    copy._objects = dict(store._objects)
    return copy
