"""Any tree, any history of it: what is restored is the tree as it was committed, whatever was there before."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from heeler_sync.session import Capture, Plan
from heeler_sync.snapshot.index import MemoryIndex
from tests.support.virtual_time import run_virtual
from tests.unit.test_snapshot_restore import CHUNK, Job, Tree, noise, shrink, tree_of

NAMES = ["a", "b", "c d", os.fsdecode(b"\xff\n")]
PATHS = [*NAMES, *(f"{one}/{two}" for one in NAMES for two in NAMES[:2]), "a/b/a", "b/b/b"]
paths = st.sampled_from(PATHS)


def content(seed: int, size: int) -> bytes:
    """Bytes that compress, or do not."""
    return (f"{seed} ".encode() * size)[:size] if seed % 2 else noise(seed, size)


contents = st.builds(
    content,
    st.integers(0, 6),
    st.one_of(st.integers(0, 3), st.sampled_from([CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK]), st.integers(0, 12 * CHUNK)),
)
targets = st.sampled_from(["a", "b", ".", "a/b", "../a", "../b/a", "nowhere"])
modes = st.sampled_from([0o600, 0o644, 0o755, 0o400, 0o000])
folder_modes = st.sampled_from([0o700, 0o755, 0o555])


class Folder:
    """A folder that a program plays with. What can't be done to it now is not done."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def _free(self, path: str) -> Path | None:
        """Where something new may be made, its parents made too; None if something is in the way."""
        target = self.root / path
        for parent in reversed(target.relative_to(self.root).parents):
            place = self.root / parent
            if place.is_symlink() or (place.exists() and not place.is_dir()):
                return None
        target.parent.mkdir(parents=True, exist_ok=True)
        return None if target.is_symlink() or target.exists() else target

    def _file(self, path: str) -> Path | None:
        target = self.root / path
        direct = Path(os.path.realpath(target)) == Path(os.path.realpath(self.root)) / path
        return target if direct and target.is_file() else None

    def write(self, path: str, data: bytes) -> None:
        target = self._file(path) or self._free(path)
        if target is not None:
            target.write_bytes(data)

    def replace(self, path: str, data: bytes) -> None:
        target = self._file(path) or self._free(path)
        if target is not None:
            (self.root / "tmp").write_bytes(data)
            (self.root / "tmp").replace(target)

    def append(self, path: str, data: bytes) -> None:
        target = self._file(path)
        if target is not None:
            with target.open("ab") as file:
                file.write(data)

    def patch(self, path: str, at: int, data: bytes) -> None:
        target = self._file(path)
        if target is not None:
            with target.open("r+b") as file:
                file.seek(at % (target.stat().st_size + 1))
                file.write(data)

    def truncate(self, path: str, size: int) -> None:
        target = self._file(path)
        if target is not None:
            os.truncate(target, size % (target.stat().st_size + 1))

    def rename(self, path: str, other: str) -> None:
        target = self._file(path)
        place = self._file(other) or (self._free(other) if target is not None else None)
        if target is not None and place is not None:
            target.replace(place)

    def move_folder(self, path: str, other: str) -> None:
        source = self.root / path
        if source.is_dir() and not source.is_symlink() and not other.startswith(path + "/") and self._direct(source):
            place = self._free(other)
            if place is not None:
                source.rename(place)

    def _direct(self, path: Path) -> bool:
        return os.path.realpath(path) == os.path.join(os.path.realpath(self.root), path.relative_to(self.root))  # noqa: PTH118

    def delete(self, path: str) -> None:
        target = self.root / path
        if not self._direct(target.parent):
            return
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.is_dir():
            shutil.rmtree(target)

    def link(self, path: str, target: str) -> None:
        place = self._free(path)
        if place is not None and not (target.startswith("..") and "/" not in path):
            place.symlink_to(target)

    def folder(self, path: str) -> None:
        place = self._free(path)
        if place is not None:
            place.mkdir()

    def chmod(self, path: str, mode: int, folder_mode: int) -> None:
        target = self.root / path
        if not target.is_symlink() and target.exists() and self._direct(target):
            target.chmod(folder_mode if target.is_dir() else mode)

    def touch(self, path: str, time: int) -> None:
        target = self._file(path)
        if target is not None:
            os.utime(target, ns=(time, time))


steps = st.one_of(
    st.tuples(st.just("write"), paths, contents),
    st.tuples(st.just("write"), paths, contents),
    st.tuples(st.just("replace"), paths, contents),
    st.tuples(st.just("append"), paths, contents),
    st.tuples(st.just("append"), paths, contents),
    st.tuples(st.just("patch"), paths, st.integers(0, 12 * CHUNK), st.binary(min_size=1, max_size=9)),
    st.tuples(st.just("truncate"), paths, st.integers(0, 12 * CHUNK)),
    st.tuples(st.just("rename"), paths, paths),
    st.tuples(st.just("move_folder"), st.sampled_from(NAMES), paths),
    st.tuples(st.just("delete"), paths),
    st.tuples(st.just("link"), paths, targets),
    st.tuples(st.just("folder"), paths),
    st.tuples(st.just("chmod"), paths, modes, folder_modes),
    st.tuples(st.just("touch"), paths, st.integers(-(10**18), 10**19)),
)
"""What a program does: a method of `Folder` and what it is given."""

histories = st.lists(st.lists(steps, max_size=12), min_size=1, max_size=4)
"""What it does between one commit and the next."""


@contextmanager
def place() -> Iterator[Path]:
    """Folders for one example, with small chunks."""
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        home = Path(tempfile.mkdtemp(prefix="heeler-property-"))
        try:
            yield home
        finally:
            shutil.rmtree(home)


def play(root: Path, history: list[tuple[Any, ...]]) -> None:
    for name, *arguments in history:
        getattr(Folder(root), name)(*arguments)


def kept(root: Path) -> Tree:
    """The tree as a generation keeps it: a link that leads out, or to nothing that may be, is left out."""
    real = os.path.realpath(root)
    found = tree_of(root)
    for path in [path for path, entry in found.items() if entry[0] == "link"]:
        leads_to = os.path.realpath(root / path)
        if leads_to != real and not leads_to.startswith(real + "/"):
            del found[path]
    return found


async def live_through(job: Job, root: Path, histories: list[list[tuple[Any, ...]]]) -> list[Tree]:
    """One attempt that commits after each history; the trees at its commits."""
    folder = job.folder(root)
    session = job.session(Plan(before=(folder,), during=(folder,)))
    trees = []
    try:
        await session.restore()
        async with session.watching():
            for number, history in enumerate(histories):
                play(root, history)
                if number == len(histories) - 1:
                    await session.flush(Capture(whole=True))
                else:
                    await session.checkpoint()
                trees.append(kept(root))
    finally:
        session.close()
    return trees


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(histories, st.integers(0, 3))
def test_what_is_restored_is_the_tree_at_its_commit(histories: list[list[tuple[Any, ...]]], older: int) -> None:
    async def run(home: Path) -> None:
        job = Job()
        # A copy of the folder stays behind on another machine at some older commit.
        before = histories[: older % (len(histories) + 1)]
        if before:
            await live_through(job, home / "old", before)
            shutil.copytree(home / "old", home / "worn", symlinks=True)
        trees = await live_through(job, home / "old", histories[len(before) :] or [[]])
        for place in ("empty", "worn"):
            await job.restore(home / place)
            assert tree_of(home / place) == trees[-1], place
        generations = [one.generation for one in job.head().kept]
        assert len(generations) <= 2
        assert generations == sorted(generations)
        named = {f"p/.heeler/packs/{pack}" for one in generations for pack in job.manifest(one).packs}
        assert set(job.keys("packs/")) == named, "packs that no generation names are gone, and no others"

    with place() as home:
        run_virtual(run, home)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(steps, max_size=15), st.lists(steps, max_size=15))
def test_a_folder_in_any_other_state_is_brought_to_the_tree(
    wanted: list[tuple[Any, ...]], there: list[tuple[Any, ...]]
) -> None:
    async def run(home: Path) -> None:
        job = Job()
        (tree,) = await live_through(job, home / "a", [wanted])
        Folder(home / "b")
        play(home / "b", there)
        await job.restore(home / "b")
        assert tree_of(home / "b") == tree

    with place() as home:
        run_virtual(run, home)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.lists(steps, max_size=8), st.booleans()), min_size=1, max_size=4))
def test_an_index_that_lives_on_changes_nothing_but_the_work(
    attempts: list[tuple[list[tuple[Any, ...]], bool]],
) -> None:
    """One machine, one index; between attempts somebody else may have gone on with the job, elsewhere."""

    async def run(home: Path) -> None:
        job, index = Job(), MemoryIndex()
        tree: Tree = {}
        for number, (history, elsewhere) in enumerate(attempts):
            root = home / (f"elsewhere-{number}" if elsewhere else "here")

            def program(root: Path = root, before: Tree = tree, history: list[tuple[Any, ...]] = history) -> None:
                assert tree_of(root) == before
                play(root, history)

            await job.run(root, program, index=MemoryIndex() if elsewhere else index)
            tree = kept(root)
        await job.restore(home / "here", index=index)
        assert tree_of(home / "here") == tree

    with place() as home:
        run_virtual(run, home)


def test_bytes_sent_are_about_bytes_changed() -> None:
    async def run(home: Path) -> None:
        job = Job()
        whole, more = os.urandom(400 * CHUNK), os.urandom(3 * CHUNK)
        first = await job.run(home / "a", lambda: (home / "a/log").write_bytes(whole))
        sent = first.progress.bytes_up
        assert len(whole) <= sent <= len(whole) * 1.01
        second = await job.run(home / "a", lambda: (home / "a/log").write_bytes(whole + more))
        assert second.progress.bytes_up <= len(more) + CHUNK
        third = await job.run(home / "a", lambda: (home / "a/log").rename(home / "a/renamed"))
        assert third.progress.bytes_up == 0
        await job.restore(home / "b")
        assert (home / "b/renamed").read_bytes() == whole + more

    with place() as home:
        run_virtual(run, home)
