"""A generation back into a folder: whole or not at all, with few bytes, and nothing beside it hurt.

`Job` is what the other tests of snapshots use too: a bucket, and sessions that commit to it and restore from it.
"""

from __future__ import annotations

import os
import random
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anyio._backends._asyncio import WorkerThread

from heeler_sync.errors import (
    AccessDeniedError,
    LocalFileError,
)
from heeler_sync.paths import location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session, SnapshotSettings, SyncFolder
from heeler_sync.snapshot import capture, chunks, fetch, holder, packs, restore, session
from heeler_sync.snapshot.committer import SnapshotTimes
from heeler_sync.snapshot.head import Head, decode_head
from heeler_sync.snapshot.holder import Claim
from heeler_sync.snapshot.index import FileIndex, MemoryIndex
from heeler_sync.snapshot.manifest import Manifest, decode
from heeler_sync.store.memory import MemoryStore
from heeler_sync.threads import in_thread
from tests.support.stores import Events, ScriptedStore
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

CHUNK, PACK = 64, 256

Tree = dict[str, tuple[Any, ...]]


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


async def _really_sleep(seconds: float) -> None:
    await in_thread(time.sleep, seconds)


def keep_threads(patch: pytest.MonkeyPatch) -> None:
    """Let no leap of virtual time retire anyio's idle threads: the virtual loop waits in vain for one that ends."""
    patch.setattr(WorkerThread, "MAX_IDLE_TIME", 1e12)


def shrink(patch: pytest.MonkeyPatch) -> None:
    """Small chunks and packs, so that small files have many; and ticks of the kernel's clock that take their time."""
    keep_threads(patch)
    for module in (capture, restore):
        patch.setattr(module, "anyio", SimpleNamespace(sleep=_really_sleep))
    for module in (capture, chunks, restore, session):
        patch.setattr(module, "CHUNK_BYTES", CHUNK)
    for module in (capture, packs, fetch):
        patch.setattr(module, "PACK_BYTES", PACK)
    patch.setattr(fetch, "_GAP", 32)
    patch.setattr(holder, "Manifest", partial(Manifest, chunk_bytes=CHUNK))


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


class CountingStore(ScriptedStore):
    """Counts the bytes that ranges brought."""

    fetched = 0

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        data = await super().read(key, offset=offset, length=length)
        self.fetched += len(data)
        return data


class Job:
    """A job with a prefix of one bucket, on machines that come and go."""

    def __init__(self) -> None:
        self.store = CountingStore(MemoryStore("bucket"))
        self.events = Events()
        self.attempt = 0
        self.times = SnapshotTimes()
        self.keep = 2

    def folder(self, root: Path, prefix: str = "p/", **fields: Any) -> SyncFolder:
        return SyncFolder(location("bucket", prefix), root, snapshot=True, **fields)

    def session(
        self,
        plan: Plan,
        *,
        claim: Claim | None = None,
        index: FileIndex | None = None,
        spool: Path | None = None,
    ) -> Session:
        """The next attempt of the job, unless `claim` is another's."""
        self.attempt += 1
        settings = SnapshotSettings(
            claim=claim or Claim("job", "", self.attempt, f"machine-{self.attempt}"),
            times=self.times,
            keep=self.keep,
            index=index or MemoryIndex(),
            spool=spool,
        )
        return Session(
            plan, lambda _: self.store, permit=AlwaysPermitted(), on_event=self.events, patience=5.0, snapshots=settings
        )

    async def run(
        self,
        root: Path,
        program: Callable[[], object] = lambda: None,
        *,
        result: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Session:
        """One attempt: restore, the program, and its folder as it is at the end."""
        folder = self.folder(root)
        session = self.session(Plan(before=(folder,), during=(folder,)), **options)
        try:
            await session.restore()
            async with session.watching():
                program()
                session.freeze()
                await session.flush(Capture(whole=True), result=result)
        finally:
            session.close()
        return session

    async def restore(self, root: Path, **options: Any) -> Session:
        """An attempt that goes no further than its restore."""
        folder = self.folder(root)
        session = self.session(Plan(before=(folder,), during=(folder,)), **options)
        try:
            await session.restore()
        finally:
            session.close()
        return session

    def head(self) -> Head:
        return decode_head(self.store.objects()["p/.heeler/head.json"])

    def manifest(self, generation: int) -> Manifest:
        (key,) = self.keys(f"manifests/{generation}.")
        return decode(self.store.objects()[key])

    def keys(self, below: str = "") -> list[str]:
        return sorted(key for key in self.store.objects() if key.startswith(f"p/.heeler/{below}"))

    async def remove(self, *keys: str) -> None:
        for key in keys:
            await self.store.inner.delete(key)

    async def hurt(self, key: str, at: int = -1) -> None:
        data = bytearray(self.store.objects()[key])
        data[at] ^= 1
        await self.store.inner.put(key, bytes(data))

    def new_packs(self, generation: int) -> list[str]:
        """The packs that came with a generation."""
        before = self.manifest(generation - 1).packs if generation > 1 else {}
        return [f"p/.heeler/packs/{pack}" for pack in self.manifest(generation).packs if pack not in before]

    def told(self, name: str) -> list[dict[str, object]]:
        return [fields for event, fields in self.events.seen if event == name]


@pytest.fixture
def job() -> Job:
    return Job()


def noise(seed: object, size: int) -> bytes:
    return random.Random(repr(seed)).randbytes(size)


def write(path: Path, data: bytes = b"x", mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


def tree_of(root: Path) -> Tree:
    """All that a generation keeps of a folder."""
    found: Tree = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name != ".heeler"]
        for name in (*folders, *files):
            path = Path(folder, name)
            status = path.lstat()
            mode, relative = stat.S_IMODE(status.st_mode), str(path.relative_to(root))
            if path.is_symlink():
                found[relative] = ("link", os.readlink(path))
            elif path.is_dir():
                found[relative] = ("folder", mode)
            else:
                found[relative] = ("file", mode, status.st_mtime_ns, path.read_bytes())
    return found


def some_tree(root: Path) -> None:
    """Files of all sizes, empty folders, links, odd modes and names."""
    for size in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 4 * CHUNK, 9 * CHUNK + 7):
        write(root / f"sizes/{size}", noise(size, size), 0o640)
    write(root / "deep/er/text", b"step 1 loss 0.25\n" * 40, 0o400)
    write(root / os.fsdecode(b"odd \xff\nname"), b"odd")
    write(root / "deep/.hidden", b"")
    (root / "empty/inner").mkdir(parents=True)
    (root / "empty").chmod(0o750)
    (root / "latest").symlink_to("deep/er")
    (root / "deep/up").symlink_to("../sizes/1")
    (root / "dangling").symlink_to("nothing")
    os.utime(root / "sizes/1", ns=(1, 1_000_000_007))


# Into an empty folder, and over what is there.


async def test_a_restored_folder_equals_the_committed_one(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"))
    session = await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")
    assert not (tmp_path / "b/.heeler").exists(), "and nothing else is left in it"
    assert session.progress.files_down == 10
    assert job.told("folder_restored")[-1]["generation"] == 1


async def test_restoring_again_fetches_nothing_and_touches_nothing(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"))
    inodes = {
        path: path.lstat().st_ino for path in (tmp_path / "a").rglob("*") if path.is_file() and not path.is_symlink()
    }
    before = tree_of(tmp_path / "a")
    session = await job.restore(tmp_path / "a")
    assert job.store.fetched == 0
    assert (session.progress.files_kept, session.progress.files_down) == (10, 0)
    assert tree_of(tmp_path / "a") == before
    assert {path: path.lstat().st_ino for path in inodes} == inodes
    assert job.told("folder_restored")[-1]["moved_aside"] == 0


async def test_a_kept_file_gets_the_mode_and_time_of_the_generation(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"))
    before = tree_of(tmp_path / "a")
    for path in (tmp_path / "a").rglob("*"):
        if not path.is_symlink():
            path.chmod(0o777)
            os.utime(path)
    await job.restore(tmp_path / "a")
    assert job.store.fetched == 0
    assert tree_of(tmp_path / "a") == before


async def test_files_with_the_stamp_of_the_index_are_not_even_read(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = MemoryIndex()
    await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"), index=index)
    read: list[Path] = []
    digests = restore._digests

    def noted(path: Path, chunk_bytes: int) -> Iterator[bytes]:
        read.append(path)
        return digests(path, chunk_bytes)

    monkeypatch.setattr(restore, "_digests", noted)
    await job.restore(tmp_path / "a", index=index)
    assert read == []
    write(tmp_path / "a/sizes/1", b"?")
    await job.restore(tmp_path / "a", index=index)
    assert read == [tmp_path / "a/sizes/1"]


async def test_a_file_of_the_same_size_and_time_with_other_bytes_is_replaced(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", noise("f", 3 * CHUNK)))
    status = (tmp_path / "a/f").stat()
    write(tmp_path / "b/f", noise("other", 3 * CHUNK))
    os.utime(tmp_path / "b/f", ns=(status.st_mtime_ns, status.st_mtime_ns))
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")


async def test_a_file_on_disk_lends_the_chunks_that_it_shares(job: Job, tmp_path: Path) -> None:
    data = noise("big", 20 * CHUNK)
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", data))
    write(tmp_path / "b/f", data[: 5 * CHUNK] + noise("other", CHUNK) + data[6 * CHUNK :] + b"and more")
    await job.restore(tmp_path / "b")
    assert (tmp_path / "b/f").read_bytes() == data
    assert job.store.fetched == CHUNK
    assert not (tmp_path / "b/.heeler/aside").exists(), "it was replaced, not moved aside"


async def test_an_interrupted_restore_goes_on_with_what_it_had(job: Job, tmp_path: Path) -> None:
    size = 50 * PACK
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", noise("f", size)))
    refused = AccessDeniedError("GetObject", "bucket", "k", "403")
    job.store.scripts["read"] = [*[None] * 40, refused]
    with pytest.raises(AccessDeniedError):
        await job.restore(tmp_path / "b")
    assert not (tmp_path / "b/f").exists(), "never a half-written file under its own name"
    job.store.scripts["read"] = []
    job.store.fetched = 0
    await job.restore(tmp_path / "b")
    assert (tmp_path / "b/f").read_bytes() == noise("f", size)
    assert job.store.fetched <= size - 24 * PACK, "of 40 that came, all but those under way were kept"
    assert not (tmp_path / "b/.heeler").exists()


async def test_what_an_interrupted_restore_left_is_not_trusted(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", noise("f", 10 * CHUNK)))
    incoming = tmp_path / "b/.heeler/incoming"
    write(incoming / restore._incoming_name("f"), noise("wrong", 12 * CHUNK))
    write(incoming / "of another file", b"?")
    (incoming / "folder").mkdir()
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")
    assert not (tmp_path / "b/.heeler").exists()


async def test_a_chunk_that_many_files_share_is_fetched_once(job: Job, tmp_path: Path) -> None:
    def program() -> None:
        for number in range(5):
            write(tmp_path / f"a/{number}", noise("same", 3 * CHUNK) * 2)

    await job.run(tmp_path / "a", program)
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")
    assert job.store.fetched == 3 * CHUNK


# What else is in the folder.


async def test_all_else_is_moved_aside_and_stays_until_the_next_time(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"))
    for name in ("old", "deep/old", "deep/er/old", "empty/old", "other/old"):
        write(tmp_path / "b" / name, b"old")
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")
    aside = tree_of(tmp_path / "b/.heeler/aside")
    assert {path for path, entry in aside.items() if entry[0] == "file"} == {
        "old",
        "deep/old",
        "deep/er/old",
        "empty/old",
        "other/old",
    }
    await job.restore(tmp_path / "b")
    assert not (tmp_path / "b/.heeler").exists()


async def test_each_kind_of_thing_gives_way_to_each_other(job: Job, tmp_path: Path) -> None:
    kinds: dict[str, Callable[[Path], object]] = {
        "file": lambda path: write(path, b"file"),
        "folder": lambda path: write(path / "inner", b"inner"),
        "empty": lambda path: path.mkdir(parents=True),
        "link": lambda path: path.symlink_to("x"),
        "loop": lambda path: path.symlink_to(path.name),
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    for wanted, make in kinds.items():
        for found, make_other in kinds.items():
            make(tmp_path / f"a/{wanted}-{found}")
            make_other(tmp_path / f"b/{wanted}-{found}")
    await job.run(tmp_path / "c", lambda: shutil.copytree(tmp_path / "a", tmp_path / "c", True, dirs_exist_ok=True))
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "c")


async def test_nothing_is_written_or_removed_through_a_link_in_the_way(job: Job, tmp_path: Path) -> None:
    def program() -> None:
        write(tmp_path / "a/sub/f", b"f")
        write(tmp_path / "a/sub/deep/g", b"g")
        (tmp_path / "a/sub/empty").mkdir()
        (tmp_path / "a/sub/link").symlink_to("f")

    await job.run(tmp_path / "a", program)
    outside = tmp_path / "outside"
    write(outside / "f", b"f")
    write(outside / "deep/g", b"mine")
    (outside / "empty").mkdir()
    (outside / "link").symlink_to("f")
    before = tree_of(outside)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/sub").symlink_to(outside)
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")
    assert tree_of(outside) == before, "the restore reached out of its folder"


async def test_names_of_one_file_that_are_to_differ_become_files_of_their_own(job: Job, tmp_path: Path) -> None:
    def program() -> None:
        for name, mode, at in (("one", 0o600, 10), ("two", 0o640, 20)):
            write(tmp_path / "a" / name, b"same", mode)
            os.utime(tmp_path / "a" / name, ns=(at, at))

    await job.run(tmp_path / "a", program)
    write(tmp_path / "b/one", b"same")
    os.link(tmp_path / "b/one", tmp_path / "b/two")
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")


async def test_read_only_files_and_folders_come_back_and_can_be_restored_over(job: Job, tmp_path: Path) -> None:
    def program() -> None:
        write(tmp_path / "a/sealed/inner/f", noise("f", 3 * CHUNK), 0o400)
        write(tmp_path / "a/none", b"n", 0o000)
        for folder in ("sealed/inner", "sealed"):
            (tmp_path / "a" / folder).chmod(0o555)

    await job.run(tmp_path / "a", program)
    before = tree_of(tmp_path / "a")
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == before
    (tmp_path / "b/sealed/inner/f").chmod(0o600)
    (tmp_path / "b/sealed/inner/f").write_bytes(b"another")
    (tmp_path / "b/sealed/inner/f").chmod(0o400)
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == before


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """A folder of somebody who may not do all; the test is this somebody."""
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    home = Path(tempfile.mkdtemp(prefix="heeler-nobody-"))
    os.chown(home, 65534, 65534)
    os.seteuid(65534)
    try:
        yield home
    finally:
        os.seteuid(0)
        shutil.rmtree(home)


async def test_somebody_who_is_not_root_restores_over_read_only_folders(job: Job, as_nobody: Path) -> None:
    def program() -> None:
        write(as_nobody / "a/sealed/inner/f", b"f", 0o400)
        (as_nobody / "a/sealed/inner/l").symlink_to("f")
        for folder in ("sealed/inner", "sealed"):
            (as_nobody / "a" / folder).chmod(0o555)

    await job.run(as_nobody / "a", program)
    before = tree_of(as_nobody / "a")
    await job.restore(as_nobody / "b")
    assert tree_of(as_nobody / "b") == before
    await job.restore(as_nobody / "b")
    assert tree_of(as_nobody / "b") == before
    for folder in ("sealed", "sealed/inner"):
        (as_nobody / "b" / folder).chmod(0o755)
    write(as_nobody / "b/sealed/inner/old", b"old")
    write(as_nobody / "b/stale/old", b"old")
    for folder in ("sealed/inner", "sealed", "stale"):
        (as_nobody / "b" / folder).chmod(0o555)
    for _ in range(2):
        await job.restore(as_nobody / "b")
        assert tree_of(as_nobody / "b") == before


async def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", noise("f", 10 * CHUNK)))
    usage = shutil.disk_usage(tmp_path)._replace(free=5 * CHUNK)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(LocalFileError):
        await job.restore(tmp_path / "b")
    assert job.store.fetched == 0
    write(tmp_path / "b/f", noise("f", 10 * CHUNK)[: 9 * CHUNK])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    await job.restore(tmp_path / "b")
    assert job.store.fetched == CHUNK
