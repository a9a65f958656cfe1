"""A folder's tree at one instant, its new chunks on their way to storage.

Stat all; stat all again: equal, so between the two there was an instant at which the tree was just that. Then read what
changed, and stat each file after its read: still the same, so what was read is what it was at that instant. What the
program does to a file after its read does not matter any more, and new files belong to the next generation.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import anyio

from heeler_sync.errors import LocalFileError, NotNowError
from heeler_sync.openfiles import open_for_writing
from heeler_sync.snapshot.chunks import CHUNK_BYTES, digest_of
from heeler_sync.snapshot.holder import Holder
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.index import Indexed
from heeler_sync.snapshot.manifest import FileEntry, Tree
from heeler_sync.snapshot.outbox import Outbox
from heeler_sync.snapshot.packs import PACK_BYTES, Pack
from heeler_sync.snapshot.retention import worth_rewriting
from heeler_sync.snapshot.scan import TICK_SECONDS, Found, TreeScan, coarse_now, scan_tree
from heeler_sync.threads import in_thread
from heeler_sync.tree import Stamp, open_inside

_LOOKS = 5


Late = Callable[[TreeScan], "set[str]"]
"""Says which files of a scan were changed after the tree was complete."""


@dataclass(frozen=True)
class Look:
    """A folder at one instant, by its stamps.

    Attributes:
        scan: What was there.
        growing: Files that grew while we looked: of these, what the scan's length covers is meant, and only if they are
            known to be appended to.
        late: Files that were changed after the tree was complete; they may be taken only if what the last generation
            holds of them is how they begin.
    """

    scan: TreeScan
    growing: frozenset[str] = frozenset()
    late: frozenset[str] = frozenset()


async def look(
    root: Path,
    include: Callable[[str], bool],
    late: Late,
    committed: Mapping[str, Indexed],
    must_be_closed: Late = lambda _scan: set(),
) -> Look:
    """Look until two scans in a row agree.

    Args:
        root: The folder.
        include: Which files belong to it.
        late: Says which files came too late; those that the last generation does not have hinder.
        committed: What the last generation holds.
        must_be_closed: Says which files nobody may hold open for writing.

    Raises:
        NotNowError: It changes all the time, a file came too late, or one is being written.
        FileNotFoundError: There is no folder.
        LocalFileError: It can't be read.
    """
    changing = ""
    growing: set[str] = set()
    for _ in range(_LOOKS):
        tick = coarse_now()
        first = await in_thread(scan_tree, root, include)
        too_late = late(first)
        for path in too_late:
            if not _may_be_appended_to(path, first, committed):
                raise NotNowError(path, "was changed after the checkpoint was complete")
        if (held := await in_thread(_first_open, root, must_be_closed(first))) is not None:
            raise NotNowError(held, "is open for writing")
        fresh = [path for path, found in first.files.items() if found.stamp.ctime_ns >= tick]
        if fresh and not growing.issuperset(fresh):
            # What was changed in this very tick may change again in it, and keep its stamp.
            changing = fresh[0]
            await anyio.sleep(TICK_SECONDS)
        second = await in_thread(scan_tree, root, include)
        growing.update(path for path, found in first.files.items() if _grew(found, second.files.get(path)))
        if fresh and not growing.issuperset(fresh):
            continue
        if second.without(growing).same_tree(first.without(growing)):
            return Look(first, frozenset(growing & first.files.keys()), frozenset(too_late))
        changing = _difference(first, second)
    raise NotNowError(changing, "is being changed")


def _first_open(root: Path, paths: set[str]) -> str | None:
    """One of the files that another process holds open for writing."""
    real = {os.path.realpath(root / path): path for path in paths}
    return next((real[held] for held in open_for_writing(real)), None)


def _may_be_appended_to(path: str, scan: TreeScan, committed: Mapping[str, Indexed]) -> bool:
    return path in committed and path in scan.files and committed[path].stamp.size <= scan.files[path].stamp.size


def _grew(before: Found, now: Found | None) -> bool:
    return now is not None and now.stamp.inode == before.stamp.inode and now.stamp.size > before.stamp.size


def _difference(first: TreeScan, second: TreeScan) -> str:
    pairs: tuple[tuple[Mapping[str, object], Mapping[str, object]], ...] = (
        (first.files, second.files),
        (first.folders, second.folders),
        (first.links, second.links),
    )
    for one, other in pairs:
        for path in {*one, *other}:
            if one.get(path) != other.get(path):
                return path
    return "."


class Reading:
    """One reading of what changed. What was read stays known when the reading fails: `read` and `seen`."""

    def __init__(
        self,
        root: Path,
        looked: Look,
        indexed: Mapping[str, Indexed],
        seen: Mapping[str, Indexed],
        committed: Mapping[str, Indexed],
        holder: Holder,
    ) -> None:
        """Args.

        root: The folder.
        looked: The instant.
        indexed: What is known of files, good for files with the same stamp.
        seen: What was once read of files that grew, good only to show that they are appended to.
        committed: What the last generation holds.
        holder: Knows which chunks storage has.
        """
        self._indexed = indexed
        self._looked = looked
        late = {path: committed[path] for path in looked.late}
        self._reader = _Reader(root, looked, indexed, {**indexed, **seen, **late}, holder)

    @property
    def read(self) -> Mapping[str, Indexed]:
        """What was read of files, with the stamps that it is good for."""
        return self._reader.read

    @property
    def seen(self) -> Mapping[str, Indexed]:
        """What was read of files that grew, good as `seen` of another reading."""
        return self._reader.seen

    async def into(self, outbox: Outbox) -> Tree:
        """Read what changed, and hand new chunks to the outbox.

        Raises:
            NotNowError: A file changed before it was read.
            LocalFileError: A file can't be read.
        """
        packs = self._reader.packs()
        while (full := await in_thread(next, packs, None)) is not None:
            await outbox.add(*full)
        scan, known = self._looked.scan, {**self._indexed, **self._reader.seen, **self._reader.read}
        return _tree(scan, known)


def _tree(scan: TreeScan, known: Mapping[str, Indexed]) -> Tree:
    files = {
        path: FileEntry(path, found.mode, found.stamp.mtime_ns, found.stamp.size, known[path].chunks)
        for path, found in scan.files.items()
    }
    return Tree(files, dict(scan.folders), dict(scan.links))


def changed_files(scan: TreeScan, indexed: Mapping[str, Indexed]) -> list[str]:
    """The files of a scan whose content is not known."""
    return [
        path for path, found in scan.files.items() if (known := indexed.get(path)) is None or known.stamp != found.stamp
    ]


@dataclass
class _Reader:
    """Reads files chunk by chunk and fills packs with what storage does not have. Runs in worker threads."""

    root: Path
    looked: Look
    indexed: Mapping[str, Indexed]
    before: Mapping[str, Indexed]
    holder: Holder
    read: dict[str, Indexed] = field(default_factory=dict)
    seen: dict[str, Indexed] = field(default_factory=dict)
    _pending: set[bytes] = field(default_factory=set)

    @property
    def scan(self) -> TreeScan:
        """The instant."""
        return self.looked.scan

    def packs(self) -> Iterator[tuple[Pack, bytes]]:
        """Full packs and their bytes, in order; `read` is complete after the last."""
        self._pack = self._empty()
        taken = 0
        for path in self._to_read():
            for full in self._file(path):
                taken += full[0].size
                yield full
        for full in self._rewritten((taken + self._pack.size) // 2):
            yield full
        if self._pack.size:
            yield self._pack, self._pack.take()

    def _to_read(self) -> list[str]:
        """What changed, and what storage lacks a chunk of (a damaged pack, an epoch that is over)."""
        changed = {*changed_files(self.scan, self.indexed), *self.looked.growing, *self.looked.late}
        known = self.holder.known
        return [
            path
            for path in self.scan.files
            if path in changed or any(known(digest) is None for digest in self.indexed[path].chunks)
        ]

    def _empty(self) -> Pack:
        return Pack(new_id(self.holder.epoch))

    def _file(self, path: str) -> Iterator[tuple[Pack, bytes]]:
        found = self.scan.files[path]
        descriptor = self._open(path)
        try:
            self._check(path, descriptor, found, grown=True)
            prefix = _Prefix(self.before.get(path))
            digests = []
            for at in range(0, found.stamp.size, CHUNK_BYTES):
                data = os.pread(descriptor, min(CHUNK_BYTES, found.stamp.size - at), at)
                if len(data) < min(CHUNK_BYTES, found.stamp.size - at):
                    raise NotNowError(path, "was cut short while it was read")
                digest = digest_of(data)
                digests.append(digest)
                prefix.see(len(digests) - 1, digest, data)
                if self.holder.known(digest) is None and digest not in self._pending:
                    yield from self._add(digest, data)
            entry = Indexed(found.stamp, tuple(digests))
            if path in self.looked.growing or Stamp.of(os.fstat(descriptor)).size > found.stamp.size:
                self.seen[path] = entry
            self._check(path, descriptor, found, grown=prefix.same)
            if path in self.looked.growing | self.looked.late and not prefix.same:
                raise NotNowError(path, "goes on being changed, and not only by appending")
        except OSError as error:
            raise LocalFileError(str(self.root / path), f"cannot be read: {error.strerror}") from None
        finally:
            os.close(descriptor)
        if path not in self.seen:
            self.read[path] = entry

    def _add(self, digest: bytes, data: bytes) -> Iterator[tuple[Pack, bytes]]:
        if self._pack.size + len(data) > PACK_BYTES:
            full, self._pack = self._pack, self._empty()
            yield full, full.take()
        self._pending.add(digest)
        self._pack.add(digest, data)

    def _open(self, path: str) -> int:
        try:
            return open_inside(self.root, path)
        except FileNotFoundError:
            raise NotNowError(path, "went before it was read") from None

    @staticmethod
    def _check(path: str, descriptor: int, found: Found, *, grown: bool) -> None:
        """Whether the file still is what the scan saw; with `grown` it may have been appended to since."""
        status = os.fstat(descriptor)
        now = Stamp.of(status)
        if now == found.stamp:
            return
        same = (now.size, now.mtime_ns, now.inode) == (found.stamp.size, found.stamp.mtime_ns, found.stamp.inode)
        if same and status.st_nlink == 0:
            return  # deleted, and otherwise as it was
        if not (grown and now.inode == found.stamp.inode and now.size > found.stamp.size):
            raise NotNowError(path, "was changed before it was read")

    def _rewritten(self, budget: int) -> Iterator[tuple[Pack, bytes]]:
        """Chunks of packs that are mostly unused, stored anew, so that these packs can go."""
        latest = self.holder.latest()
        wanted = worth_rewriting(latest, budget) if latest is not None and budget else set()
        if not wanted:
            return
        for path in self.scan.files:
            for index, digest in enumerate((self.read.get(path) or self.seen.get(path) or self.indexed[path]).chunks):
                if digest in wanted and digest not in self._pending:
                    data = self._chunk(path, index)
                    if digest_of(data) == digest:
                        yield from self._add(digest, data)

    def _chunk(self, path: str, index: int) -> bytes:
        """A chunk as it is now: rewriting is no duty, so what can't be read is left."""
        try:
            descriptor = open_inside(self.root, path)
        except (FileNotFoundError, LocalFileError):
            return b""
        try:
            return os.pread(descriptor, CHUNK_BYTES, index * CHUNK_BYTES)[: self._size(path, index)]
        except OSError:
            return b""
        finally:
            os.close(descriptor)

    def _size(self, path: str, index: int) -> int:
        return min(CHUNK_BYTES, self.scan.files[path].stamp.size - index * CHUNK_BYTES)


class _Prefix:
    """Whether a file begins with all that was read of it before: if it grew meanwhile, then by appending."""

    def __init__(self, before: Indexed | None) -> None:
        self._before = before
        self._seen = 0
        self._differs = before is None or not before.chunks

    def see(self, index: int, digest: bytes, data: bytes) -> None:
        """Take in the next chunk."""
        if self._differs or self._before is None or index >= len(self._before.chunks):
            return
        if index == len(self._before.chunks) - 1:
            last = self._before.stamp.size - index * CHUNK_BYTES
            digest = digest_of(memoryview(data)[:last])
        self._differs = digest != self._before.chunks[index]
        self._seen += 1

    @property
    def same(self) -> bool:
        """Whether it does."""
        return not self._differs and self._before is not None and self._seen == len(self._before.chunks)
