"""A process that dies at any operation: what is in storage stays whole, and its successor goes on from there."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from heeler_sync.errors import FinishedError
from heeler_sync.progress import Progress
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.recover import Reader, restore_newest
from heeler_sync.store.memory import MemoryStore
from tests.support.crashing import CrashError, Fuse, When
from tests.support.lives import PREFIX, Disk, Life, Picture, Record, audit, copied, picture, small_pieces
from tests.support.stores import IMPATIENT, KIB, Events
from tests.support.virtual_time import run_virtual


def _bytes(seed: str, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


def _write(root: Path, path: str, data: bytes, mode: int = 0o644) -> None:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists():
        file.chmod(0o644)
    file.write_bytes(data)
    file.chmod(mode)
    stamp = random.Random(data).randrange(10**18, 2 * 10**18)
    os.utime(file, ns=(stamp, stamp))


def _save(root: Path, version: int) -> None:
    """What the program does between two commits: an append, an overwrite, new files, and some that go."""
    root.mkdir(exist_ok=True)
    log = root / "log.txt"
    _write(root, "log.txt", (log.read_bytes() if log.exists() else b"") + b"step %d\n" % version * 200)
    _write(root, "weights.bin", _bytes("base", 2 * KIB) + _bytes(f"weights {version}", KIB + 100))
    _write(root, f"checkpoint-{version}/shard", _bytes(f"shard {version}", 3 * KIB), 0o755)
    _write(root, f"checkpoint-{version}/empty", b"")
    (root / f"checkpoint-{version}" / "scratch").mkdir(exist_ok=True)
    (root / f"checkpoint-{version}" / "scratch").chmod(0o550)
    shutil.rmtree(root / f"checkpoint-{version - 2}", ignore_errors=True)
    (root / "latest").unlink(missing_ok=True)
    (root / "latest").symlink_to(f"checkpoint-{version}")
    if not (root / "always").is_symlink():
        (root / "always").symlink_to("weights.bin")


@dataclass
class World:
    """A bucket and a disk, as a first process left them: five generations, two of them kept, and half of a sixth."""

    store: MemoryStore
    disk: Disk
    record: Record

    @classmethod
    async def made(cls, folder: Path) -> World:
        disk, record, store = Disk(folder / "root"), Record(), MemoryStore()
        disk.root.mkdir()
        fuse = Fuse(("interrupted", f"put {PREFIX.prefix}.heeler/head.json"))
        life = Life(store, disk, record, fuse)
        await life.acquire()
        await life.restore()
        for version in range(1, 6):
            _save(disk.root, version)
            await life.commit()
        _save(disk.root, 6)
        with pytest.raises(CrashError):
            await life.commit("interrupted")
        _write(disk.root, ".heeler/aside/old/file", b"moved aside by the restore before")
        _write(disk.root, ".heeler/incoming/0123", b"of a file that is not wanted any more")
        _write(disk.root, "stray/file", b"in no generation")
        return cls(store, disk, record)

    def copy(self, folder: Path) -> World:
        """The same, with a bucket and a disk of its own."""
        folder.mkdir()
        return World(copied(self.store), self.disk.copy(folder / "root"), self.record.copy())


async def _second_life(world: World, fuse: Fuse) -> None:
    """All that a process does, from its start to the end of its job."""
    life = Life(world.store, world.disk, world.record, fuse)
    await life.acquire()
    await life.sweep()
    await life.restore()
    _save(world.disk.root, life.holder.head.generation + 1)
    await life.commit()
    _save(world.disk.root, life.holder.head.generation + 1)
    await life.commit("complete", result={"exit_code": 0})


async def _third_life(store: MemoryStore, disk: Disk, record: Record) -> None:
    """Whoever comes after the crash: checks what it finds, and goes on."""
    held = audit(store.objects())
    assert held.head is not None
    newest = held.head.generation
    assert newest >= record.confirmed
    assert newest in record.tried
    life = Life(store, disk, record)
    try:
        await life.acquire()
    except FinishedError:
        assert newest == max(record.tried)
        assert await _read(store, disk.root.with_name("read")) == record.tried[newest]
        return
    kept = await life.restore()
    assert kept is not None
    assert kept.generation == newest
    assert picture(disk.root) == record.tried[newest]
    await life.sweep()
    _save(disk.root, newest + 4)
    assert (await life.commit()).generation == newest + 1
    assert audit(store.objects()).keys == store.objects().keys(), "garbage is left"
    assert await _read(store, disk.root.with_name("read")) == record.tried[newest + 1]
    assert "generation_damaged" not in life.events.names()
    assert "collect_failed" not in life.events.names()


async def _read(store: MemoryStore, folder: Path) -> Picture:
    """What a reader gets."""
    reader = Reader(Layout(store, PREFIX, IMPATIENT), Events())
    await reader.look()
    await restore_newest(reader, folder, {}, Progress(clock=lambda: 0.0), IMPATIENT)
    return picture(folder)


async def _crash(world: World, folder: Path, fuse: Fuse) -> None:
    """Die, and be followed by a process with the same disk, and by one with another."""
    before, wanted = picture(world.disk.root), world.record.tried[world.record.confirmed]
    with contextlib.suppress(CrashError):
        await _second_life(world, fuse)
    if fuse.phase == "restore":
        _check_no_file_is_half(picture(world.disk.root), before, wanted)
    assert fuse.dead, "nothing happened at that point"
    try:
        await _third_life(copied(world.store), Disk(folder / "other"), world.record.copy())
        await _third_life(world.store, world.disk, world.record)
    except Exception as error:
        raise AssertionError(f"after a crash at {fuse.last}: {error!r}") from error


def _check_no_file_is_half(found: Picture, before: Picture, wanted: Picture) -> None:
    """Under its own name, a file has only ever the content that it had or that it is to have."""
    for path, (kind, *_, content) in found.items():
        if kind == "file":
            contents = [other[path][-1] for other in (before, wanted) if path in other]
            assert content in contents, f"{path} is half restored"


def _points(folder: Path, phases: str, at_once: int) -> tuple[World, list[tuple[int, str]]]:
    """The world before the crash, and the operations of those phases in a second life that is not cut short."""

    async def find() -> tuple[World, list[tuple[int, str]]]:
        world, fuse = await World.made(folder), Fuse()
        with small_pieces(at_once):
            await _second_life(world.copy(folder / "clean"), fuse)
        return world, [(at, name) for at, (phase, name) in enumerate(fuse.operations) if phase.startswith(phases)]

    with small_pieces(1):
        return run_virtual(find)


_PHASES = {"acquire": 4, "sweep": 2, "restore": 40, "commit": 4, "collect of commit": 2, "complete": 4}
"""Phases, and how many operations each has at the least: the tests are worth nothing if there are none."""


@pytest.mark.parametrize("at_once", [1, 4], ids=["one call at a time", "four calls at a time"])
@pytest.mark.parametrize("phase", _PHASES)
def test_a_process_that_dies_at_any_operation_leaves_whole_generations_and_its_successor_goes_on(
    tmp_path: Path, phase: str, at_once: int
) -> None:
    world, points = _points(tmp_path, phase, at_once)
    assert len(points) >= _PHASES[phase], points
    for at, name in points:
        for when in When:
            if when is not When.TORN or name.startswith("pwrite"):
                folder = tmp_path / f"{at}-{when.name}"
                with small_pieces(at_once):
                    run_virtual(_crash, world.copy(folder), folder, Fuse(at, when))
                shutil.rmtree(folder)


@pytest.mark.parametrize("seed", range(40))
def test_processes_that_die_again_and_again_on_two_machines_lose_nothing_that_was_committed(
    tmp_path: Path, seed: int
) -> None:
    world, points = _points(tmp_path, "", 1)
    rng = random.Random(seed)

    async def die() -> None:
        disks = [world.disk, Disk(tmp_path / "other")]
        for _ in range(rng.randint(3, 6)):
            fuse = Fuse(rng.randrange(len(points)), rng.choice(list(When)))
            with contextlib.suppress(CrashError, FinishedError):
                await _second_life(World(world.store, rng.choice(disks), world.record), fuse)
            audit(world.store.objects())
        for disk in rng.sample(disks, 2):
            await _third_life(world.store, disk, world.record)

    with small_pieces(rng.choice([1, 4])):
        run_virtual(die)


def test_a_journal_of_a_prefix_that_was_emptied_since_offers_nothing_to_its_next_life(tmp_path: Path) -> None:
    """Somebody removes the prefix to start anew: epochs begin again at 1, of which the journal has entries."""

    async def case() -> None:
        disk, head_key = Disk(tmp_path / "root"), f"{PREFIX.prefix}.heeler/head.json"
        disk.root.mkdir()

        async def live(store: MemoryStore, fuse: Fuse | None = None) -> None:
            life = Life(store, disk, Record(), fuse)
            await life.acquire()
            await life.restore()
            _save(disk.root, 1)
            await life.commit()

        with pytest.raises(CrashError):
            await live(MemoryStore(), Fuse(("commit", f"put {head_key}")))
        store = MemoryStore()
        await Life(store, disk, Record()).acquire()  # and it dies again
        await live(store)
        audit(store.objects())

    with small_pieces(1):
        run_virtual(case)
