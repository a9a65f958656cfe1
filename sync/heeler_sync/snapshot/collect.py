"""Deleting what is garbage for ever. Which objects that are, and why it is safe, is said in `retention`."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from heeler_sync.errors import StoreError
from heeler_sync.events import EventSink
from heeler_sync.groups import for_each
from heeler_sync.sender import Permit
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.retention import References, dropped, garbage

_DELETES_AT_ONCE = 8


class Collector:
    """Collects one prefix for its holder. What can't be deleted now is left to the sweep of a later epoch."""

    def __init__(self, layout: Layout, on_event: EventSink) -> None:
        self._layout = layout
        self._on_event = on_event
        self._garbage: list[str] = []

    def dropped(self, before: References | None, after: References | None, kept_before: Iterable[Kept]) -> None:
        """A confirmed swap put a head that refers to `after` in the place of one that referred to `before`."""
        if after is not None and before is not None:
            # What an unreadable manifest needs is not known: then a later epoch's sweep finds what is left.
            self._garbage.extend(dropped(self._layout, before, after, kept_before))

    async def collect(self, permit: Permit) -> int:
        """Delete what was dropped; how many objects that were."""
        wanted, self._garbage = self._garbage, []
        return await self._delete(wanted, permit)

    async def sweep(self, refers: References, epoch: int, permit: Permit) -> int:
        """Delete what epochs before `epoch` left behind and its head, which `refers`, does not name; how many."""
        found: list[str] = []
        async for page in self._layout.store.list(self._layout.own):
            found.extend(garbage(self._layout, (info.key for info in page), refers, epoch))
        return await self._delete(found, permit)

    async def _delete(self, keys: Collection[str], permit: Permit) -> int:
        deleted: list[str] = []
        refused: list[StoreError] = []

        async def delete(key: str) -> None:
            if refused or not permit.certain():
                return  # garbage stays garbage: the next holder finds it
            try:
                await self._layout.store.delete(key)
            except StoreError as error:
                refused.append(error)
            else:
                deleted.append(key)

        await for_each(keys, delete, _DELETES_AT_ONCE)
        if refused:
            self._on_event("collect_failed", {"error": str(refused[0])})
        if deleted:
            self._on_event("collected", {"location": str(self._layout.location), "objects": len(deleted)})
        return len(deleted)
