"""Races for one prefix: machines that take it, commit, collect, die, are stopped, and come back, all from one seed.

No files: a machine's trees are made up in memory. `race(seed)` says what was violated.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import anyio
import pytest

from heeler_sync.errors import DamagedHeadError, FencedError, FinishedError, StoreError
from heeler_sync.groups import background
from heeler_sync.paths import Location
from heeler_sync.sender import AlwaysPermitted, Permit
from heeler_sync.snapshot import holder as holding
from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.holder import Adoptable, Claim, Holder, acquire
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest
from heeler_sync.snapshot.recover import Reader
from heeler_sync.snapshot.swap import OvertakenError
from heeler_sync.store.retry import Backoff, RetryPolicy
from tests.support.cloud import LATEST, Cloud, Line, Weather
from tests.support.holders import CHUNK, DoubtfulPermit, Program, read_newest, upload
from tests.support.referee import PrefixReferee
from tests.support.virtual_time import run_virtual

_KEEP = 2
_PREFIX = Location("memory", "job/")
_END = 20 * 60.0
"""Virtual seconds that a process lives at most."""


@dataclass
class Arena:
    """One race: the bucket, the referee, and what all machines share."""

    cloud: Cloud
    referee: PrefixReferee
    rng: random.Random
    weather: Weather
    patience: float | None
    attempt: int = 0
    lives: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def line(self, name: str, weather: Weather | None = None) -> Line:
        """A new process's line; its name is used once."""
        self.lives += 1
        return Line(self.cloud, f"{name}.{self.lives}", self.rng, weather or self.weather)

    def layout(self, line: Line) -> Layout:
        backoff = partial(Backoff, base=0.2, cap=5.0, rng=self.rng)
        return Layout(line, _PREFIX, RetryPolicy(self.patience, backoff))

    def count(self, outcome: str) -> None:
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class Machine:
    """Runs one process after the other on one disk, all for the same delivery of the job."""

    def __init__(self, arena: Arena, name: str) -> None:
        self._arena = arena
        self._name = name
        self._rng = arena.rng
        self._program = Program(arena.rng)
        self._attempt = 0
        self._epoch = 0
        self._sent: dict[str, Adoptable] = {}

    async def run(self) -> None:
        """Start, die, and start again."""
        await anyio.sleep(self._rng.uniform(0.0, 60.0))
        if self._arena.referee.ordered:
            self._arena.attempt += 1
        self._attempt = max(1, self._arena.attempt)
        for _ in range(self._rng.randint(1, 3)):
            killed_after = self._rng.uniform(0.0, 60.0) if self._rng.random() < 0.4 else _END
            with anyio.move_on_after(killed_after):
                await self._live()
            await anyio.sleep(self._rng.uniform(0.0, 20.0))

    def _adopt(self, head: Head) -> Mapping[str, Adoptable]:
        return dict(self._sent) if head.epoch == self._epoch else {}

    async def _live(self) -> None:
        arena, line = self._arena, self._arena.line(self._name)
        permit = DoubtfulPermit(self._rng)
        claim = Claim("j", "r", self._attempt, line.by, ordered=arena.referee.ordered)
        told = partial(arena.referee.told, line.by)
        try:
            holder = await acquire(arena.layout(line), claim, permit, told, keep=_KEEP, adopt=self._adopt)
        except (FencedError, FinishedError, StoreError) as error:
            arena.count(f"acquire: {type(error).__name__}")
            return
        except DamagedHeadError as error:
            arena.referee.found("alarm", f"{line.by}: {error}")
            return
        self._note_acquired(line, holder, holder.head.adopted)
        with contextlib.suppress(FencedError, StoreError):
            await read_newest(holder)
        async with background(partial(self._sweep, holder, permit)):
            for _ in range(self._rng.randint(1, 6)):
                if not await self._commit(holder, line, permit):
                    break
                await anyio.sleep(self._rng.uniform(0.0, 10.0))
        times = line.head_puts
        if any(after - before < 1.0 for before, after in itertools.pairwise(times)):
            arena.referee.found("fault", f"{line.by} wrote the head twice within a second")

    def _note_acquired(self, line: Line, holder: Holder, adopted: tuple[str, ...]) -> None:
        self._arena.count("acquired" + (", adopted" if adopted else ""))
        self._arena.referee.acquired(line.by, holder.epoch)
        self._epoch, self._sent = holder.epoch, {}

    async def _sweep(self, holder: Holder, permit: Permit) -> None:
        with contextlib.suppress(StoreError):
            await holder.sweep(permit)

    async def _commit(self, holder: Holder, line: Line, permit: Permit) -> bool:
        """Commit another tree and collect; whether the process goes on."""
        arena, tree = self._arena, self._program.tree()
        result = {"exit_code": 0} if self._rng.random() < 0.02 else None
        line.manifest = ""
        try:
            self._sent.update(await upload(holder, tree, self._program.contents, self._rng))
            line.on_manifest = lambda name: arena.referee.trees.update({name: tree})
            kept = await holder.commit(tree, result=result)
        except StoreError as error:
            arena.count(f"commit: {type(error).__name__}")
            return True
        except FencedError as fenced:
            return await self._fenced(holder, line, permit, fenced)
        arena.count("committed")
        arena.referee.committed(line.by, kept)
        self._sent.clear()
        with contextlib.suppress(StoreError):
            await holder.collect(permit)
        return result is None

    async def _fenced(self, holder: Holder, line: Line, permit: Permit, fenced: FencedError) -> bool:
        self._arena.count("commit: fenced")
        if self._arena.referee.holds(line.by):
            self._arena.referee.found("self-fenced", f"{line.by} is the holder, and was told that it is fenced")
        if isinstance(fenced, OvertakenError) and not fenced.wrote:
            self._arena.referee.refused(line.by, line.manifest)
        generation = holder.head.generation
        try:
            await holder.regain(fenced, permit)
        except (FencedError, StoreError):
            return False
        self._note_acquired(line, holder, ())
        self._arena.count("regained")
        if holder.head.generation != generation:
            self._arena.referee.found("step", f"{line.by} regained over a foreign generation")
        return True


async def _watch(arena: Arena) -> None:
    """A reader that looks again and again."""
    line = arena.line("reader")
    reader = Reader(arena.layout(line), partial(arena.referee.told, line.by))
    while True:
        await anyio.sleep(arena.rng.uniform(0.0, 10.0))
        with contextlib.suppress(StoreError):
            if await reader.look() and await read_newest(reader) is not None:
                arena.count("read")


async def _tidy(arena: Arena) -> None:
    """One last holder, over a good line: it sweeps, reads and commits; nothing may be left over."""
    line = arena.line("last", Weather())
    permit = AlwaysPermitted()
    claim = Claim("j", "fresh", 1, line.by)
    told = partial(arena.referee.told, line.by)
    holder = await acquire(arena.layout(line), claim, permit, told, keep=_KEEP)
    await holder.sweep(permit)
    program = Program(arena.rng)
    tree = program.tree()
    await upload(holder, tree, program.contents, arena.rng)
    line.on_manifest = lambda name: arena.referee.trees.update({name: tree})
    arena.referee.committed(line.by, await holder.commit(tree))
    await holder.collect(permit)
    if await read_newest(holder) != tree:
        arena.referee.found("reader", "the last generation can't be read")


@contextlib.contextmanager
def _from_one_seed(rng: random.Random) -> Iterator[None]:
    """All that is random comes from `rng`; chunks are tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secrets.token_hex", lambda size: rng.randbytes(size).hex())
        patch.setattr(holding, "Manifest", partial(Manifest, chunk_bytes=CHUNK))
        yield


def arena_of(seed: int, *, ordered: bool, conditions: bool = True) -> Arena:
    """The bucket, the weather and the patience of a seed."""
    rng = random.Random(seed)
    referee = PrefixReferee(f"{_PREFIX.prefix}.heeler/", _KEEP, ordered)
    cloud = Cloud(referee, conditions=conditions, content_etags=rng.random() < 0.5)
    referee.objects = cloud.objects
    weather = rng.choice([Weather(0.02, 0.005), Weather(0.1, 0.02), Weather(0.3, 0.03), Weather(0.1, 0.15)])
    return Arena(cloud, referee, rng, weather, rng.choice([None, 20.0]))


Watch = Callable[[Arena], Awaitable[None]]
"""Runs beside a race until it is over."""


async def _race(arena: Arena, watches: Sequence[Watch]) -> None:
    machines = [Machine(arena, name) for name in "abc"[: arena.rng.choice([2, 2, 3])]]
    async with background(*(partial(watch, arena) for watch in watches)):
        async with anyio.create_task_group() as group:
            for machine in machines:
                group.start_soon(machine.run)
        await anyio.sleep(LATEST + 60.0)
        await _tidy(arena)
    arena.referee.close()


def race(seed: int, *, ordered: bool, conditions: bool = True, watches: Sequence[Watch] = (_watch,)) -> Arena:
    """Run a race to its end. What went wrong is in `arena.referee.violations`."""
    arena = arena_of(seed, ordered=ordered, conditions=conditions)
    with _from_one_seed(arena.rng):
        run_virtual(_race, arena, watches)
    return arena
