"""Several workers race for one prefix over bad lines: none of 1,200 races hurts a generation or lets two hold it.

What a race is made of stands in `tests/support/races.py`, what must never happen in `tests/support/referee.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest

from heeler_sync.errors import PreconditionFailedError, StoreError, TransientStoreError
from heeler_sync.snapshot import swap
from heeler_sync.snapshot.head import Head, encode_head
from heeler_sync.snapshot.holder import Holder
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.retention import References, garbage
from heeler_sync.snapshot.swap import HeadWriter, Written
from heeler_sync.store.base import Condition
from tests.support.races import Arena, race

_BLOCKS = 20
_SEEDS = 30
_MUTANT_SEEDS = 150


def _says(seed: int, arena: Arena) -> str:
    found = "\n".join(f"{violation.kind}: {violation.detail}" for violation in arena.referee.violations)
    return f"seed {seed}:\n{found}\nthe end of its log:\n" + "\n".join(arena.referee.log[-60:])


@pytest.mark.parametrize("block", range(_BLOCKS))
@pytest.mark.parametrize("ordered", [True, False], ids=["attempts are ordered", "attempts are not ordered"])
def test_no_race_hurts_what_was_committed_or_lets_a_superseded_worker_change_anything(
    ordered: bool, block: int
) -> None:
    outcomes: Counter[str] = Counter()
    for turn in range(_SEEDS):
        seed = 2 * (block * _SEEDS + turn) + ordered
        arena = race(seed, ordered=ordered)
        outcomes.update(arena.outcomes)
        if arena.referee.violations:
            pytest.fail(_says(seed, arena))
    # The races are worth something only if all of this happens in them.
    assert outcomes["committed"] > 60
    assert outcomes["commit: fenced"] > 10
    assert outcomes["read"] > 60
    assert outcomes["regained"] > 3 or ordered


def test_a_race_can_be_repeated_from_its_seed() -> None:
    logs = [race(7, ordered=False).referee.log for _ in range(2)]
    assert logs[0] == logs[1]
    assert len(logs[0]) > 20


# -- the races find what they are meant to find --------------------------------------------------------------------


def _finds(*kinds: str, ordered: Sequence[bool] = (True, False), conditions: bool = True) -> None:
    """Whether the races find each of these with a bug built in."""
    found: Counter[str] = Counter()
    for seed in range(_MUTANT_SEEDS):
        try:
            arena = race(seed, ordered=ordered[seed % len(ordered)], conditions=conditions)
        except Exception as error:  # noqa: BLE001 - what a bug that is built in makes of the code is its own affair
            found[f"raised {type(error).__name__}"] += 1
            continue
        found.update({violation.kind for violation in arena.referee.violations})
        if all(found[kind] for kind in kinds):
            return
    pytest.fail(f"not all of {kinds} in {_MUTANT_SEEDS} races, but {dict(found)}")


def test_the_races_find_a_store_that_ignores_conditions() -> None:
    _finds("step", "missing", conditions=False)


def test_the_races_find_a_writer_that_believes_a_412(monkeypatch: pytest.MonkeyPatch) -> None:
    real = HeadWriter._resolve

    async def believing(self: HeadWriter, signed: Head, over: Written | None, error: StoreError) -> Written:
        if isinstance(error, PreconditionFailedError):
            raise swap.fenced_by(self._layout, over.head if over is not None else signed)
        return await real(self, signed, over, error)

    monkeypatch.setattr(HeadWriter, "_resolve", believing)
    _finds("answer")


def test_the_races_find_a_writer_that_takes_a_time_out_for_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    async def write(self: HeadWriter, head: Head, over: Written | None) -> Written:
        condition = Condition(if_match=over.etag) if over is not None else Condition(if_absent=True)
        while True:
            signed = head.signed(0.0)
            await self._wait_for_spacing()
            try:
                etag = await self._put(encode_head(signed), condition)
            except TransientStoreError:
                continue
            except StoreError as error:
                return await self._resolve(signed, over, error)
            return Written(signed, etag)

    monkeypatch.setattr(HeadWriter, "write", write)
    _finds("answer")


def test_the_races_find_a_writer_that_writes_over_whatever_it_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    real = HeadWriter._resolve

    async def stubborn(self: HeadWriter, signed: Head, over: Written | None, error: StoreError) -> Written:
        try:
            return await real(self, signed, over, error)
        except swap.OvertakenError:
            found = await self._layout.read_head()
            return await self.write(signed, None if found is None else Written(*found))

    monkeypatch.setattr(HeadWriter, "_resolve", stubborn)
    _finds("step")


def test_the_races_find_a_collector_of_whatever_is_not_referred_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(layout: Layout, keys: Sequence[str], refers: References, epoch: int) -> list[str]:
        del epoch
        return garbage(layout, keys, refers, 1 << 60)

    monkeypatch.setattr("heeler_sync.snapshot.collect.garbage", greedy)
    _finds("missing")


def test_the_races_find_a_holder_that_goes_on_using_packs_of_an_epoch_that_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Holder, "_forget_own", lambda _self: None)
    _finds("step", ordered=[False])
