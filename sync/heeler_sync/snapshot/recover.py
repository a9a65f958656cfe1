"""Which generation a folder is brought to: the newest that is whole; a damaged one is passed over and said."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from heeler_sync.errors import DamagedObjectError, NoGenerationError
from heeler_sync.events import EventSink
from heeler_sync.progress import Progress
from heeler_sync.snapshot.fetch import DamagedPackError
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.index import Indexed
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest
from heeler_sync.snapshot.restore import RestoredTree, TreeRestore
from heeler_sync.store.retry import RetryPolicy


class Generations(Protocol):
    """Where generations come from: a prefix that we hold, or one that we only read."""

    layout: Layout

    def generations(self) -> list[Kept]:
        """Those that may be restored, newest first."""
        ...

    def manifest(self, kept: Kept) -> Manifest | None:
        """A generation's manifest, if it can be read."""
        ...

    async def still_lists(self, kept: Kept) -> bool:
        """Whether the head still lists it; may raise `FencedError`."""
        ...

    def damaged(self, kept: Kept, reason: str) -> None:
        """It can't be restored."""
        ...

    def forget_pack(self, pack: str) -> None:
        """A pack is damaged."""
        ...


class Reader:
    """The generations of a prefix that we do not hold. Implements `Generations`."""

    def __init__(self, layout: Layout, on_event: EventSink) -> None:
        self.layout = layout
        self._on_event = on_event
        self._kept: tuple[Kept, ...] = ()
        self._manifests: dict[str, Manifest] = {}
        self._damaged: set[int] = set()

    async def look(self) -> bool:
        """Read the head and its manifests; whether there is a head.

        Raises:
            DamagedHeadError: It can't be read.
        """
        found = await self.layout.read_head()
        self._kept = () if found is None else found[0].kept
        self._manifests.clear()
        self._damaged.clear()
        for kept in self._kept:
            try:
                self._manifests[kept.manifest] = await self.layout.read_manifest(kept)
            except DamagedObjectError as error:
                if not await self.still_lists(kept):
                    return await self.look()
                self.damaged(kept, str(error))
        return found is not None

    def lists_any(self) -> bool:
        """Whether the head lists a generation, damaged or not."""
        return bool(self._kept)

    def generations(self) -> list[Kept]:
        """As `Generations.generations`."""
        return [kept for kept in reversed(self._kept) if kept.generation not in self._damaged]

    def manifest(self, kept: Kept) -> Manifest | None:
        """As `Generations.manifest`."""
        return self._manifests.get(kept.manifest)

    async def still_lists(self, kept: Kept) -> bool:
        """As `Generations.still_lists`."""
        found = await self.layout.read_head()
        return found is not None and kept in found[0].kept

    def damaged(self, kept: Kept, reason: str) -> None:
        """As `Generations.damaged`."""
        self._damaged.add(kept.generation)
        self._on_event("generation_damaged", {"generation": kept.generation, "error": reason})

    def forget_pack(self, pack: str) -> None:
        """As `Generations.forget_pack`: a reader refers to none."""


async def restore_newest(
    source: Generations,
    root: Path,
    indexed: Mapping[str, Indexed],
    progress: Progress,
    policy: RetryPolicy,
    nested: Collection[Path] = (),
) -> tuple[Kept, RestoredTree] | None:
    """Bring `root` to the newest generation that is whole.

    Returns:
        Which one, and what was done; None if the source does not list it any more: look again.

    Raises:
        NoGenerationError: There are generations, and all are damaged.
        FencedError: The prefix is not ours any more.
        SyncError: Storage or disk refused.
    """
    reasons = []
    for kept in source.generations():
        manifest = source.manifest(kept)
        if manifest is None:
            continue
        try:
            return kept, await TreeRestore(source.layout, root, indexed, progress, policy).run(manifest, nested)
        except DamagedPackError as error:
            if not await source.still_lists(kept):
                return None
            source.forget_pack(error.pack)
            source.damaged(kept, str(error))
            reasons.append(str(error))
    raise NoGenerationError(str(source.layout.location), reasons)
