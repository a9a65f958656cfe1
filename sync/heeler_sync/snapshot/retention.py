"""Which generations stay, what may go, and what is worth rewriting. Pure functions.

The rule that makes collecting safe: a commit refers only to packs of the head that it replaces and to packs of its own
epoch. So what a confirmed head does not refer to, and no epoch of now or later may name, is garbage for ever, whoever
deletes it and when.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from heeler_sync.snapshot.head import Head, Kept
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest


@dataclass(frozen=True)
class References:
    """All that a head needs: manifests by id, and packs by id."""

    manifests: frozenset[str]
    packs: frozenset[str]


def references(head: Head, manifests: Mapping[str, Manifest]) -> References | None:
    """What `head` refers to; None if one of its manifests is not among `manifests` (by id), so that nobody knows."""
    if any(kept.manifest not in manifests for kept in head.kept):
        return None
    packs = set(head.adopted)
    for kept in head.kept:
        packs.update(manifests[kept.manifest].packs)
    return References(frozenset(kept.manifest for kept in head.kept), frozenset(packs))


def retained(kept: Iterable[Kept], damaged: Collection[int], keep: int) -> tuple[Kept, ...]:
    """The generations that stay beside a new one when `keep` are to be kept: the newest that are not damaged."""
    good = [entry for entry in kept if entry.generation not in damaged]
    return tuple(good[len(good) - min(len(good), keep - 1) :])


def dropped(layout: Layout, before: References, after: References, kept_before: Iterable[Kept]) -> list[str]:
    """The keys that a confirmed swap made garbage: what the head before it referred to, and it does not."""
    manifests = [layout.manifest_key(kept) for kept in kept_before if kept.manifest not in after.manifests]
    return [*manifests, *(layout.pack_key(pack) for pack in sorted(before.packs - after.packs))]


def garbage(layout: Layout, keys: Iterable[str], refers: References, epoch: int) -> list[str]:
    """Those of `keys` that epochs before `epoch` left behind, and that the confirmed head of `epoch` does not name."""
    found = []
    for key in keys:
        owned = layout.owned(key)
        if owned is None or owned.epoch >= epoch:
            continue
        if owned.pack not in refers.packs and owned.manifest not in refers.manifests:
            found.append(key)
    return found


def worth_rewriting(latest: Manifest, budget: int) -> set[bytes]:
    """Chunks to store anew, so that packs of which less than half is still used can go; at most `budget` bytes."""
    used: Counter[str] = Counter()
    for place in latest.places.values():
        used[place.pack] += place.stored
    sparse = sorted((used[pack], pack) for pack, size in latest.packs.items() if used[pack] * 2 < size)
    chosen: set[str] = set()
    for live, pack in sparse:
        if live > budget:
            break
        budget -= live
        chosen.add(pack)
    return {digest for digest, place in latest.places.items() if place.pack in chosen}
