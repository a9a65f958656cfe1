"""Reading all of a prefix: what is missing, damaged, or referred to by nothing. Nothing is changed.

A pack or a manifest that can't be had is a loss only while the head, read again, is still the one that needs it: a
worker that is alive commits and collects meanwhile. Packs never change under their names, so what was read once
counts for the next head, too.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

from heeler_sync.errors import (
    DamagedHeadError,
    DamagedObjectError,
    SyncError,
)
from heeler_sync.groups import for_each
from heeler_sync.snapshot.fetch import DamagedPackError, fetch_chunks
from heeler_sync.snapshot.head import Head, Kept
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest, Place
from heeler_sync.store.base import ObjectInfo
from heeler_sync.store.retry import retrying

_AT_ONCE = 4
_ROUNDS = 10

OnBytes = Callable[[int], None]
"""Told how many bytes were read."""


class Kind(enum.Enum):
    """What is wrong with an object."""

    MISSING = "missing"
    DAMAGED = "damaged"
    UNDER_WAY = "under way"
    GARBAGE = "garbage"
    FOREIGN = "foreign"
    UNCHECKED = "unchecked"

    @property
    def lost(self) -> bool:
        """Whether something can't be restored because of it."""
        return self in (Kind.MISSING, Kind.DAMAGED)


@dataclass(frozen=True)
class Finding:
    """An object that is not as it should be.

    Attributes:
        kind: In which way.
        key: Its key.
        detail: What is known of it.
        generations: The generations that need it.
    """

    kind: Kind
    key: str
    detail: str
    generations: tuple[int, ...] = ()


@dataclass(frozen=True)
class Verified:
    """All that was found.

    Attributes:
        head: The head that was verified; None of plain keys.
        findings: What is not as it should be, by key.
        objects: How many objects were looked at.
        bytes: How many bytes were read and compared.
        unknown_packs: Packs of which nobody knows whether something refers to them, since a manifest can't be read.
    """

    head: Head | None
    findings: tuple[Finding, ...]
    objects: int
    bytes: int
    unknown_packs: int = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is lost."""
        return not any(finding.kind.lost for finding in self.findings)


class RestlessError(SyncError):
    """The prefix changes faster than it can be verified."""


class PackCheck:
    """Reads packs and compares them with what manifests say of them; what was found whole is not read again."""

    def __init__(self, layout: Layout, on_bytes: OnBytes) -> None:
        self._layout = layout
        self._on_bytes = on_bytes
        self._whole: set[tuple[str, bytes]] = set()
        self.bytes = 0

    async def fault(self, pack: str, size: int, places: Mapping[bytes, Place], there: int | None) -> Finding | None:
        """What is wrong with a pack; None if it is whole.

        Args:
            pack: Its id.
            size: Its bytes, as a manifest has them.
            places: The chunks that it should hold.
            there: Its bytes as the store lists them; None if it does not list it.

        Raises:
            StoreError: Storage refused, or was out of reach for longer than the policy's patience.
        """
        key = self._layout.pack_key(pack)
        if there is None:
            return Finding(Kind.MISSING, key, "it is not there")
        if there != size:
            return Finding(Kind.DAMAGED, key, f"it has {there} bytes instead of {size}")
        wanted = {digest: place for digest, place in places.items() if (pack, digest) not in self._whole}
        try:
            await fetch_chunks(self._layout, wanted, lambda _digest, _data: None, self._count, self._layout.policy)
        except DamagedPackError as error:
            detail = str(error).partition(" is damaged: ")[2]
            return Finding(Kind.MISSING if detail == "it is missing" else Kind.DAMAGED, key, detail)
        self._whole.update((pack, digest) for digest in wanted)
        return None

    def _count(self, count: int) -> None:
        self.bytes += count
        self._on_bytes(count)


def by_pack(manifests: Iterable[Manifest]) -> dict[str, dict[bytes, Place]]:
    """The chunks that manifests expect in each pack."""
    found: dict[str, dict[bytes, Place]] = {}
    for manifest in manifests:
        for digest, place in manifest.places.items():
            found.setdefault(place.pack, {})[digest] = place
    return found


async def list_own(layout: Layout) -> dict[str, ObjectInfo]:
    """All objects below `.heeler/`, by key."""

    async def collect() -> dict[str, ObjectInfo]:
        return {info.key: info async for page in layout.store.list(layout.own) for info in page}

    return await retrying(layout.policy, collect)


async def verify(layout: Layout, on_bytes: OnBytes = lambda _count: None) -> Verified | None:
    """Read all that a prefix's head needs, and look for what it does not.

    Returns:
        What was found; None if there is no snapshot at all.

    Raises:
        DamagedHeadError: The head can't be read, or is missing where generations are.
        UnknownFormatError: Something was written by a newer heeler.
        RestlessError: The head moves on faster than what it needs can be read.
        StoreError: Storage refused, or was out of reach for longer than the policy's patience.
    """
    packs = PackCheck(layout, on_bytes)
    for _ in range(_ROUNDS):
        found = await layout.read_head()
        if found is None:
            if any(layout.owned(key) for key in await list_own(layout)) and await layout.read_head() is None:
                raise DamagedHeadError(str(layout.location), "there are generations here, and no head")
            return None
        head, etag = found
        result = await _Verification(layout, head, packs).run()
        if result.whole:
            return result
        again = await layout.read_head()
        if again is not None and again[1] == etag:
            return result
    raise RestlessError(f"{layout.location} changes faster than it can be verified; try again when its worker rests")


@dataclass
class _Verification:
    """One head, verified."""

    layout: Layout
    head: Head
    packs: PackCheck
    findings: list[Finding] = field(default_factory=list)
    _manifests: dict[int, Manifest] = field(default_factory=dict)

    async def run(self) -> Verified:
        for kept in self.head.kept:
            await self._read_manifest(kept)
        listed = await list_own(self.layout)
        await self._check_packs(listed)
        unknown = self._look_for_others(listed)
        self.findings.sort(key=lambda finding: finding.key)
        return Verified(self.head, tuple(self.findings), len(listed), self.packs.bytes, unknown)

    async def _read_manifest(self, kept: Kept) -> None:
        key = self.layout.manifest_key(kept)
        try:
            manifest = await self.layout.read_manifest(kept)
        except DamagedObjectError as error:
            detail = str(error).partition(" is damaged: ")[2]
            kind = Kind.MISSING if detail == "it is missing" else Kind.DAMAGED
            self._add(Finding(kind, key, detail), [kept.generation])
            return
        self._manifests[kept.generation] = manifest
        listed = (kept.generation, kept.files, kept.bytes)
        held = (manifest.generation, len(manifest.tree.files), manifest.tree.size)
        if listed != held:
            detail = "it lists generation {} with {} files and {} bytes".format(*listed)
            detail += ", and the manifest is of generation {} with {} files and {} bytes".format(*held)
            self._add(Finding(Kind.DAMAGED, self.layout.head_key, detail), [kept.generation])

    async def _check_packs(self, listed: Mapping[str, ObjectInfo]) -> None:
        wanted = by_pack(self._manifests.values())

        async def check(pack: str) -> None:
            users = {number: found for number, found in self._manifests.items() if pack in found.packs}
            sizes = {found.packs[pack] for found in users.values()}
            there = listed.get(self.layout.pack_key(pack))
            size = None if there is None else there.size
            fault = await self.packs.fault(pack, min(sizes), wanted[pack], size)
            if fault is not None:
                self._add(fault, [number for number in users if await self._needs_damaged(number, pack, size)])

        await for_each(sorted(wanted), check, _AT_ONCE)
        for pack in set(self.head.adopted) - wanted.keys():
            if self.layout.pack_key(pack) not in listed:
                self._add(Finding(Kind.MISSING, self.layout.pack_key(pack), "it is not there"), [])

    async def _needs_damaged(self, number: int, pack: str, there: int | None) -> bool:
        """Whether a generation needs a part of a damaged pack that is damaged: it may do with the rest."""
        manifest = self._manifests[number]
        return await self.packs.fault(pack, manifest.packs[pack], by_pack([manifest])[pack], there) is not None

    def _look_for_others(self, listed: Collection[str]) -> int:
        """Note what nothing refers to; how many packs nobody can tell of."""
        named = {kept.manifest for kept in self.head.kept}
        packs = set(self.head.adopted).union(*(found.packs for found in self._manifests.values()))
        all_known = len(self._manifests) == len(self.head.kept)
        unknown = 0
        for key in listed:
            owned = self.layout.owned(key)
            if owned is None:
                if key != self.layout.head_key:
                    self._add(Finding(Kind.FOREIGN, key, "its name is none of heeler's"), [])
            elif owned.pack in packs or owned.manifest in named:
                continue
            elif owned.pack is not None and not all_known:
                unknown += 1
            else:
                kind = Kind.UNDER_WAY if owned.epoch >= self.head.epoch else Kind.GARBAGE
                self._add(Finding(kind, key, f"no generation needs it (epoch {owned.epoch})"), [])
        return unknown

    def _add(self, finding: Finding, generations: Iterable[int]) -> None:
        self.findings.append(Finding(finding.kind, finding.key, finding.detail, tuple(sorted(generations))))
