"""Folders are restored while other machines race for the prefix: each gets one generation, whole and byte-exact."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import anyio
import pytest

from heeler_sync.errors import NoGenerationError, StoreError
from heeler_sync.progress import Progress
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.manifest import Tree
from heeler_sync.snapshot.recover import Reader, restore_newest
from tests.support.cloud import Weather
from tests.support.holders import Program
from tests.support.lives import Picture, picture, small_pieces
from tests.support.races import Arena, race

_SEEDS = 120


def _picture_of(tree: Tree, program: Program) -> Picture:
    """What a folder with this tree holds."""
    found: Picture = {path: ("folder", mode) for path, mode in tree.folders.items()}
    found.update({path: ("link", target) for path, target in tree.links.items()})
    for path, entry in tree.files.items():
        content = b"".join(program.contents[digest] for digest in entry.chunks)
        found[path] = ("file", entry.mode, entry.mtime_ns, content)
    return found


class _Restorer:
    """Restores a folder again and again, over what it held before or from nothing."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.done: list[Kept] = []

    async def __call__(self, arena: Arena) -> None:
        line = arena.line("restorer", Weather(faults=0.1, stops=0.3))
        layout = arena.layout(line)
        program = Program(arena.rng)
        reader = Reader(layout, partial(arena.referee.told, line.by))
        while True:
            await anyio.sleep(arena.rng.uniform(0.0, 10.0))
            if arena.rng.random() < 0.3:
                shutil.rmtree(self._root, ignore_errors=True)
            with contextlib.suppress(StoreError):
                kept = await self._restore(arena, reader)
                if kept is not None:
                    self.done.append(kept)
                    if picture(self._root) != _picture_of(arena.referee.trees[kept.manifest], program):
                        arena.referee.found("reader", f"generation {kept.generation} was not restored as it is")

    async def _restore(self, arena: Arena, reader: Reader) -> Kept | None:
        """As a session does it."""
        newest = 0 if arena.referee.head is None else arena.referee.head.generation
        progress = Progress(clock=anyio.current_time)
        while await reader.look() and reader.lists_any():
            try:
                found = await restore_newest(reader, self._root, {}, progress, reader.layout.policy)
            except NoGenerationError as error:
                arena.referee.found("reader", str(error))
                return None
            if found is not None:
                if found[0].generation < newest:
                    arena.referee.found("reader", f"{found[0].generation} was restored, and {newest} was there before")
                return found[0]
            arena.count("looked again")
        return None


@pytest.mark.parametrize("block", range(3))
def test_a_restore_beside_commits_and_collections_gets_one_generation_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _descriptor: None)
    outcomes: Counter[str] = Counter()
    restored = []
    for seed in range(block, _SEEDS, 3):
        restorer = _Restorer(tmp_path / str(seed))
        with small_pieces(1):
            arena = race(seed, ordered=seed % 4 < 2, watches=[restorer])
        restored.extend(restorer.done)
        outcomes.update(arena.outcomes)
        bad = arena.referee.violations
        assert not bad, (f"seed {seed}", bad, arena.referee.log[-60:])
    assert len(restored) > 60
    assert outcomes["looked again"] > 0, "no restore was ever overtaken by a collection"
