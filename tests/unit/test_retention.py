"""What stays, what goes and what is rewritten: never anything that a head of now or later may need."""

from __future__ import annotations

import random
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from heeler_sync.paths import location
from heeler_sync.snapshot.chunks import Codec
from heeler_sync.snapshot.head import Head, Kept
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest, Place, Tree
from heeler_sync.snapshot.retention import References, dropped, garbage, references, retained, worth_rewriting
from heeler_sync.store.memory import MemoryStore
from tests.support.stores import IMPATIENT

LAYOUT = Layout(MemoryStore("bucket"), location("bucket", "p/"), IMPATIENT)


def generation(number: int, epoch: int = 1) -> Kept:
    return Kept(number, "run", new_id(epoch), "0" * 64, 0.0, 0, 0)


def manifest(packs: dict[str, int], used: dict[str, int] | None = None) -> Manifest:
    """One generation of these packs; of each, `used` bytes (all of them if it says nothing)."""
    places = {
        bytes([number]) * 32: Place(pack, 0, (used or packs).get(pack, size), size, Codec.RAW)
        for number, (pack, size) in enumerate(packs.items())
    }
    return Manifest(1, 1, 0.0, Tree(), places, packs)


@given(st.sets(st.integers(1, 20)), st.sets(st.integers(1, 20)), st.integers(1, 5))
def test_beside_a_new_generation_the_newest_whole_ones_stay(numbers: set[int], damaged: set[int], keep: int) -> None:
    found = retained([generation(number) for number in sorted(numbers)], damaged, keep)
    wanted = sorted(numbers - damaged)[-(keep - 1) :] if keep > 1 else []
    assert [kept.generation for kept in found] == wanted


def test_a_head_needs_all_that_its_manifests_name_and_what_it_adopted() -> None:
    old, new, adopted = generation(1), generation(2), new_id(1)
    head = Head("j", "", 1, 1, "", 0.0, 2, (old, new), (adopted,))
    manifests = {old.manifest: manifest({"1-a": 5}), new.manifest: manifest({"1-a": 5, "1-b": 6})}
    found = references(head, manifests)
    assert found == References(frozenset({old.manifest, new.manifest}), frozenset({"1-a", "1-b", adopted}))


def test_of_a_manifest_that_can_not_be_read_nobody_knows_what_it_needs() -> None:
    old, new = generation(1), generation(2)
    head = Head("j", "", 1, 1, "", 0.0, 2, (old, new))
    assert references(head, {new.manifest: manifest({})}) is None


def test_a_swap_makes_garbage_of_just_what_the_new_head_does_not_need() -> None:
    old, middle, new = generation(1), generation(2), generation(3)
    first, second, third = new_id(1), new_id(1), new_id(1)
    before = References(frozenset({old.manifest, middle.manifest}), frozenset({first, second}))
    after = References(frozenset({middle.manifest, new.manifest}), frozenset({second, third}))
    keys = dropped(LAYOUT, before, after, [old, middle])
    assert sorted(keys) == sorted([LAYOUT.manifest_key(old), LAYOUT.pack_key(first)])


def test_only_what_older_epochs_left_behind_and_the_head_does_not_name_is_garbage() -> None:
    needed, left, own, later = new_id(2), new_id(2), new_id(5), new_id(6)
    kept, lost = generation(1, epoch=2), generation(9, epoch=4)
    refers = References(frozenset({kept.manifest}), frozenset({needed}))
    own_keys = [LAYOUT.pack_key(pack) for pack in (needed, left, own, later)]
    keys = [*own_keys, LAYOUT.manifest_key(kept), LAYOUT.manifest_key(lost), LAYOUT.head_key]
    foreign = ["p/model.pt", "p/.heeler/packs/notes.txt", "p/.heeler/other/" + left, "p/.heeler/manifests/x.json"]
    found = garbage(LAYOUT, [*keys, *foreign, LAYOUT.own + "probe-00"], refers, epoch=5)
    assert sorted(found) == sorted([LAYOUT.pack_key(left), LAYOUT.manifest_key(lost)])


def test_a_later_epochs_objects_are_never_garbage_whoever_sweeps_late() -> None:
    keys = [LAYOUT.pack_key(new_id(epoch)) for epoch in (3, 4, 5)]
    assert garbage(LAYOUT, keys, References(frozenset(), frozenset()), epoch=3) == []


def test_the_sparsest_packs_are_rewritten_within_the_budget() -> None:
    packs = {"sparse": 100, "sparser": 100, "half": 100, "full": 100}
    found = manifest(packs, used={"sparse": 40, "sparser": 10, "half": 50, "full": 100})
    digest = {place.pack: name for name, place in found.places.items()}
    assert worth_rewriting(found, 1000) == {digest["sparse"], digest["sparser"]}
    assert worth_rewriting(found, 49) == {digest["sparser"]}
    assert worth_rewriting(found, 9) == set()


@settings(max_examples=100)
@given(st.integers(0, 2**32), st.integers(0, 500))
def test_rewriting_never_costs_more_than_its_budget_and_empties_whole_packs(seed: int, budget: int) -> None:
    rng = random.Random(seed)
    packs = {f"p{number}": rng.randint(1, 200) for number in range(6)}
    found = manifest(packs, used={pack: rng.randint(1, size) for pack, size in packs.items()})
    chosen = worth_rewriting(found, budget)
    assert sum(found.places[name].stored for name in chosen) <= budget, seed
    gone = {found.places[name].pack for name in chosen}
    assert all(place.pack not in gone or name in chosen for name, place in found.places.items()), seed
    assert all(2 * found.places[name].stored < packs[found.places[name].pack] for name in chosen), seed


def test_a_manifest_of_its_own_is_not_changed_by_the_question() -> None:
    found = manifest({"a": 10}, used={"a": 1})
    before = replace(found)
    worth_rewriting(found, 5)
    assert found == before
