"""Holding a prefix: acquire, commit, complete, collect (docs/snapshot-format.md). No local files here.

A `Holder` is the one owner of what we know of a prefix that we hold: the head as we last wrote it, the manifests that
it lists, and the chunks that a commit of ours may refer to. Its calls that write come one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from blake3 import blake3

from heeler_sync.errors import (
    DamagedHeadError,
    DamagedObjectError,
    FencedError,
    TransientStoreError,
)
from heeler_sync.events import EventSink
from heeler_sync.sender import Permit
from heeler_sync.snapshot.claim import Claim
from heeler_sync.snapshot.collect import Collector
from heeler_sync.snapshot.head import Head, Kept
from heeler_sync.snapshot.ids import epoch_of, new_id
from heeler_sync.snapshot.known import Adoptable, Chunks
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Manifest, Place, Tree, encode
from heeler_sync.snapshot.retention import references, retained
from heeler_sync.snapshot.swap import EarlierWriteError, HeadWriter, OvertakenError, Written, fenced_by
from heeler_sync.store.retry import retrying
from heeler_sync.threads import in_thread

__all__ = ["Adoptable", "Claim", "Holder", "acquire"]

_REGAINS = 3
_CONTENDED = 5


class Holder:
    """A prefix that we hold. Made by `acquire`."""

    def __init__(self, layout: Layout, writer: HeadWriter, claim: Claim, on_event: EventSink, keep: int) -> None:
        self.layout = layout
        self._writer = writer
        self._claim = claim
        self._on_event = on_event
        self._keep = keep
        self._written: Written | None = None
        self._manifests: dict[str, Manifest] = {}
        self._chunks = Chunks()
        self._damaged: set[int] = set()
        self._regains = 0
        self._collector = Collector(layout, on_event)

    @property
    def head(self) -> Head:
        """The head as we last wrote it."""
        if self._written is None:
            raise RuntimeError("a prefix is held only after acquire")
        return self._written.head

    @property
    def epoch(self) -> int:
        """Our fencing token."""
        return self.head.epoch

    def generations(self) -> list[Kept]:
        """The generations of our run that can be restored, newest first; damaged ones are left out."""
        mine = [kept for kept in self.head.kept if kept.run_id == self._claim.run_id]
        return [kept for kept in reversed(mine) if kept.generation not in self._damaged]

    def lists_any(self) -> bool:
        """Whether the head lists a generation of our run, damaged or not."""
        return any(kept.run_id == self._claim.run_id for kept in self.head.kept)

    def latest(self) -> Manifest | None:
        """The newest of them, if it can be read."""
        for kept in self.generations()[:1]:
            return self._manifests.get(kept.manifest)
        return None

    def known(self, digest: bytes) -> Place | None:
        """Where a chunk is that a commit of ours may refer to."""
        return self._chunks.place(digest)

    # -- acquire ---------------------------------------------------------------------------------------------------

    async def acquire(self, permit: Permit, adopt: Callable[[Head], Mapping[str, Adoptable]]) -> None:
        """Take the prefix: from nobody, from whoever held it before, or anew from ourselves.

        Args:
            permit: Confirmed before and after.
            adopt: Says, of the head before, which packs of an interrupted commit of our own go on to be used.

        Raises:
            FinishedError: The job is done.
            PrefixTakenError: The prefix belongs to another job.
            FencedError: A newer attempt of the job holds it.
            DamagedHeadError: There are generations, but no head that can be read.
        """
        self._written = await self._contend(permit, adopt, partial(self._claim.refuse, self.layout))
        await permit.doubt()
        await self._read_manifests()
        self._on_event(
            "acquired",
            {
                "location": str(self.layout.location),
                "epoch": self.epoch,
                "generation": self.head.generation,
                "attempt": self._claim.attempt,
            },
        )

    async def _contend(
        self, permit: Permit, adopt: Callable[[Head], Mapping[str, Adoptable]], refuse: Callable[[Head], None]
    ) -> Written:
        for turn in range(_CONTENDED):
            found = await self.layout.read_head()
            if found is not None:
                refuse(found[0])
            elif await self._has_generations():
                if await self.layout.read_head() is not None:
                    continue  # another worker began here just now
                raise DamagedHeadError(str(self.layout.location), "there are generations here, and no head")
            await permit.doubt()
            ours = found is not None and found[0].is_of(self._claim.job_id, self._claim.run_id)
            adopted = adopt(found[0]) if found is not None and ours else {}
            head = self._claim.head(None if found is None else found[0], tuple(adopted), self._writer.now)
            try:
                written = await self._writer.write(head, None if found is None else Written(*found))
            except OvertakenError as overtaken:
                if turn == _CONTENDED - 1:
                    raise
                self._on_event("acquire_contended", {"error": str(overtaken)})
                continue
            except EarlierWriteError:
                continue
            self._forget_own()
            for pack, adoptable in adopted.items():
                self.add_pack(pack, adoptable.size, adoptable.places)
            return written
        raise TransientStoreError("PutObject", self.layout.store.bucket, self.layout.head_key, "others write it, too")

    async def _has_generations(self) -> bool:
        async for page in self.layout.store.list(self.layout.own):
            if any(self.layout.owned(info.key) for info in page):
                return True
        return False

    def _forget_own(self) -> None:
        """Of an epoch that is over: its packs that no head names may be collected by now."""
        self._chunks.clear()

    async def _read_manifests(self) -> None:
        wanted = {kept.manifest: kept for kept in self.head.kept}
        self._manifests = {name: found for name, found in self._manifests.items() if name in wanted}
        for name, kept in wanted.items():
            if name in self._manifests or kept.generation in self._damaged:
                continue
            try:
                self._manifests[name] = await self.layout.read_manifest(kept)
            except DamagedObjectError as error:
                await self.still_lists(kept)
                self.damaged(kept, str(error))
        for kept in self.head.kept:
            if kept.generation not in self._damaged and kept.manifest in self._manifests:
                self._chunks.know(self._manifests[kept.manifest])

    def manifest(self, kept: Kept) -> Manifest | None:
        """The manifest of a generation, if it can be read."""
        return self._manifests.get(kept.manifest)

    async def still_lists(self, kept: Kept) -> bool:
        """Whether the head, read again, is still ours and lists the generation: then what is missing is damage.

        Raises:
            FencedError: It is not ours any more: what is missing may have been collected since.
        """
        found = await self.layout.read_head()
        if found is None or found[0].epoch != self.epoch:
            raise fenced_by(self.layout, self.head if found is None else found[0])
        return kept in found[0].kept

    def damaged(self, kept: Kept, reason: str) -> None:
        """A generation can't be restored: it is said, it is not kept, and its packs are not referred to any more."""
        self._damaged.add(kept.generation)
        self._on_event("generation_damaged", {"generation": kept.generation, "error": reason})
        whole: dict[bytes, Place] = {}
        for other in self.head.kept:
            manifest = self._manifests.get(other.manifest)
            if manifest is not None and other.generation not in self._damaged:
                whole.update(manifest.places)
        # What only damaged generations name may be gone, too, though nobody has asked for it yet.
        adopted = self.head.adopted
        self._chunks.keep(lambda place: epoch_of(place.pack) == self.epoch or place.pack in adopted, whole)

    def forget_pack(self, pack: str) -> None:
        """A pack was found missing or damaged: no commit refers to it from now on."""
        self._chunks.forget_pack(pack)

    # -- commit ----------------------------------------------------------------------------------------------------

    def add_pack(self, pack: str, size: int, places: Mapping[bytes, Place]) -> None:
        """A pack of our epoch is in storage: commits may refer to it."""
        self._chunks.add(pack, size, places)

    async def commit(self, tree: Tree, *, result: Mapping[str, Any] | None = None) -> Kept:
        """Make `tree` the next generation; with a `result` the job is complete by the same write.

        Every chunk of the tree must be `known`. Nothing is visible before the head is swapped.

        Raises:
            FencedError: The prefix is no longer ours. If the swap had taken effect before, the generation counts.
        """
        await self.settle()
        places = self._chunks.places(tree.digests())
        if places is None:
            detail = "a write of ours took effect after all, and dropped packs that this tree needs: take it again"
            raise TransientStoreError("PutObject", self.layout.store.bucket, self.layout.head_key, detail)
        manifest = Manifest(
            generation=self.head.generation + 1,
            epoch=self.epoch,
            created=self._writer.now,
            tree=tree,
            places=places,
            packs=self._chunks.sizes({place.pack for place in places.values()}),
        )
        data = await in_thread(encode, manifest)
        kept = Kept(
            generation=manifest.generation,
            run_id=self._claim.run_id,
            manifest=new_id(self.epoch),
            digest=blake3(data).hexdigest(),
            created=manifest.created,
            files=len(tree.files),
            bytes=tree.size,
        )
        await self._put(self.layout.manifest_key(kept), data)
        head = replace(
            self.head,
            generation=kept.generation,
            kept=(*retained(self.head.kept, self._damaged, self._keep), kept),
            adopted=(),
        )
        self._manifests[kept.manifest] = manifest
        await self._swap(_completed(head, result))
        return kept

    async def complete(self, result: Mapping[str, Any]) -> None:
        """Say that the job is done, with the newest generation as it is.

        Raises:
            FencedError: The prefix is no longer ours.
        """
        await self.settle()
        in_doubt = bool(self._writer.unanswered)
        try:
            await self._swap(_completed(self.head, result))
        except TransientStoreError:
            if not in_doubt or self._writer.unanswered:
                raise
            await self._swap(_completed(self.head, result))  # an earlier write of ours had come in between

    async def settle(self) -> None:
        """Learn what became of a write of ours that was given up without an answer.

        Raises:
            FencedError: Somebody else wrote the head since.
        """
        if not self._writer.unanswered:
            return
        found = await self.layout.read_head()
        if found is None:
            raise DamagedHeadError(str(self.layout.location), "its head was deleted while it was held")
        if found[0].writes[-1] in self._writer.unanswered:
            self._take_over(Written(*found))
            self._writer.unanswered.clear()
        elif self._written is None or found[1] != self._written.etag:
            raise fenced_by(self.layout, found[0])

    async def _put(self, key: str, data: bytes) -> None:
        store = self.layout.store
        await retrying(self.layout.policy, lambda: store.put(key, data))

    async def _swap(self, head: Head) -> None:
        try:
            written = await self._writer.write(head, self._written)
        except EarlierWriteError:
            await self.settle()
            detail = "a write of ours that was given up took effect after all: once more"
            raise TransientStoreError("PutObject", self.layout.store.bucket, self.layout.head_key, detail) from None
        self._take_over(written)

    def _take_over(self, written: Written) -> None:
        """The head is this one now: what it dropped is garbage."""
        before, kept_before = references(self.head, self._manifests), self.head.kept
        named_before = self._named()
        self._written = written
        names = {kept.manifest for kept in self.head.kept}
        self._manifests = {name: found for name, found in self._manifests.items() if name in names}
        named = self._named()
        gone = named_before - named
        # A commit refers only to packs of the head that it replaces, and to those of its own epoch.
        self._chunks.keep(
            lambda place: place.pack in named or (epoch_of(place.pack) == self.epoch and place.pack not in gone)
        )
        self._collector.dropped(before, references(self.head, self._manifests), kept_before)

    def _named(self) -> set[str]:
        """The packs that the head names, as far as its manifests can be read."""
        manifests = (self._manifests.get(kept.manifest) for kept in self.head.kept)
        return set(self.head.adopted).union(*(found.packs for found in manifests if found is not None))

    # -- collect ---------------------------------------------------------------------------------------------------

    async def collect(self, permit: Permit) -> int:
        """Delete what confirmed swaps of ours made garbage; how many objects that were.

        What can't be deleted now is left to the sweep of a later epoch.
        """
        return await self._collector.collect(permit)

    async def sweep(self, permit: Permit) -> int:
        """Delete what epochs before ours left behind and the head does not name; how many objects that were."""
        refers = references(self.head, self._manifests)
        return 0 if refers is None else await self._collector.sweep(refers, self.epoch, permit)

    # -- fenced ----------------------------------------------------------------------------------------------------

    async def regain(self, fenced: FencedError, permit: Permit) -> None:
        """Take the prefix back, where attempts don't order and the queue still calls us the holder.

        Raises:
            FencedError: It is not ours to take back: `fenced` itself.
        """
        if self._claim.ordered or self._regains >= _REGAINS:
            raise fenced
        generation = self.head.generation

        def refuse(head: Head) -> None:
            ours = head.is_of(self._claim.job_id, self._claim.run_id) and not head.complete
            if head.generation != generation or not ours:
                raise fenced

        self._regains += 1
        self._written = await self._contend(permit, _nothing, refuse)
        await permit.doubt()
        await self._read_manifests()
        self._on_event("regained", {"location": str(self.layout.location), "epoch": self.epoch})


def _nothing(_head: Head) -> Mapping[str, Adoptable]:
    return {}


def _completed(head: Head, result: Mapping[str, Any] | None) -> Head:
    return head if result is None else replace(head, status="complete", result=dict(result))


async def acquire(
    layout: Layout,
    claim: Claim,
    permit: Permit,
    on_event: EventSink,
    *,
    keep: int = 2,
    fenced: bool = True,
    adopt: Callable[[Head], Mapping[str, Adoptable]] = _nothing,
) -> Holder:
    """Take a prefix; see `Holder.acquire`."""
    holder = Holder(layout, HeadWriter(layout, fenced=fenced), claim, on_event, keep)
    await holder.acquire(permit, adopt)
    return holder
