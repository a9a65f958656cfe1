"""A new head for a prefix whose head is missing or unreadable, out of the manifests that are there.

Nothing is deleted, and no pack or manifest is written: what the new head does not name, the next worker collects.
Whoever held the prefix before is fenced out, since its ETag is no longer the head's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from heeler_sync.errors import (
    DamagedHeadError,
    NoGenerationError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreError,
    TransientStoreError,
)
from heeler_sync.snapshot.head import Head, Kept, decode_head, encode_head
from heeler_sync.snapshot.layout import Layout, Owned, read_object
from heeler_sync.snapshot.manifest import BadManifestError, Manifest, UnknownFormatError, decode
from heeler_sync.snapshot.verify import OnBytes, PackCheck, by_pack, list_own
from heeler_sync.store.base import Condition, ObjectInfo
from heeler_sync.store.retry import retrying

_NUMBER = re.compile(rb'"(epoch|generation)":\s*([0-9]{1,17})\b')
_NAME = re.compile(rb'"(job_id|run_id)":\s*"([^"\\]{1,200})"')


@dataclass(frozen=True)
class Candidate:
    """A generation whose manifest is there.

    Attributes:
        kept: As a head would list it; its digest and sizes are empty where the manifest can't be read.
        epoch: The epoch that wrote it.
        faults: Why it is not whole; empty if it is.
    """

    kept: Kept
    epoch: int
    faults: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether it can be restored."""
        return not self.faults


@dataclass(frozen=True)
class Survey:
    """What a prefix without a usable head holds.

    Attributes:
        trouble: What is wrong with the head; None if nothing is.
        etag: The ETag of the head that can't be read; None if there is no head.
        epoch: The highest epoch that a name speaks of, or what is left of the head.
        generation: The highest number of a generation, likewise.
        candidates: The generations that were looked at, newest first; others than the chosen may not have been.
        chosen: Those of them that a new head would list, newest first.
        hints: What is left of an unreadable head: `job_id` and `run_id`, as far as they can be read.
    """

    trouble: str | None
    etag: str | None = None
    epoch: int = 0
    generation: int = 0
    candidates: tuple[Candidate, ...] = ()
    chosen: tuple[Candidate, ...] = ()
    hints: Mapping[str, str] = field(default_factory=dict)


async def survey(
    layout: Layout, *, keep: int = 2, generation: int | None = None, on_bytes: OnBytes = lambda _count: None
) -> Survey:
    """Look for what a new head could list, and read it; nothing is changed.

    Args:
        layout: The prefix.
        keep: How many whole generations are wanted.
        generation: The newest that is wanted; None takes the newest whole one.
        on_bytes: Told how many bytes were read.

    Raises:
        UnknownFormatError: The head was written by a newer heeler, which can read it.
        StoreError: Storage refused, or was out of reach for longer than the policy's patience.
    """
    trouble, etag, left = await _look_at_head(layout)
    if trouble is None:
        return Survey(None)
    listed = await list_own(layout)
    owned = [found for key in listed if (found := layout.owned(key)) is not None]
    numbers = [(name.decode(), int(number)) for name, number in _NUMBER.findall(left)]
    search = _Search(layout, listed, keep, generation, PackCheck(layout, on_bytes))
    await search.run([found for found in owned if found.manifest is not None])
    return Survey(
        trouble,
        etag,
        epoch=max([0, *(found.epoch for found in owned), *(number for name, number in numbers if name == "epoch")]),
        generation=max(
            [0, *(found.generation for found in owned), *(number for name, number in numbers if name == "generation")]
        ),
        candidates=tuple(search.candidates),
        chosen=tuple(search.chosen),
        # The head's own come first in it; those of its generations follow.
        hints={name.decode(): text.decode("utf-8", "replace") for name, text in reversed(_NAME.findall(left))},
    )


async def _look_at_head(layout: Layout) -> tuple[str | None, str | None, bytes]:
    """What is wrong with the head, its ETag and its bytes."""
    try:
        data, info = await retrying(layout.policy, lambda: read_object(layout.store, layout.head_key))
    except ObjectNotFoundError:
        return "there is no head", None, b""
    try:
        decode_head(data)
    except ValueError as error:
        return f"the head {error}", info.etag, data
    return None, info.etag, data


@dataclass
class _Search:
    """The search for whole generations, from the newest on, until there are enough."""

    layout: Layout
    listed: Mapping[str, ObjectInfo]
    keep: int
    newest: int | None
    packs: PackCheck
    candidates: list[Candidate] = field(default_factory=list)
    chosen: list[Candidate] = field(default_factory=list)

    async def run(self, manifests: Sequence[Owned]) -> None:
        for number in sorted({owned.generation for owned in manifests}, reverse=True):
            if len(self.chosen) >= self.keep:
                return
            if self.newest is not None and number > self.newest:
                continue
            same = [await self._look(owned) for owned in manifests if owned.generation == number]
            # Of several of one number only the last can have been committed: an epoch begins after the one before.
            same.sort(key=lambda candidate: (candidate.epoch, candidate.kept.created), reverse=True)
            self.candidates.extend(same)
            self._choose(same)
            if number == self.newest and not self.chosen:
                return  # no other was asked for

    def _choose(self, same: Sequence[Candidate]) -> None:
        """At most one of a number, and none of a later epoch than the generation after it."""
        for candidate in same:
            if candidate.whole and (not self.chosen or candidate.epoch <= self.chosen[-1].epoch):
                self.chosen.append(candidate)
                return

    async def _look(self, owned: Owned) -> Candidate:
        unread = Kept(owned.generation, "", owned.manifest or "", "", 0.0, 0, 0)
        key = self.layout.manifest_key(unread)
        try:
            data, _ = await retrying(self.layout.policy, lambda: read_object(self.layout.store, key))
            manifest = decode(data)
        except ObjectNotFoundError:
            return Candidate(unread, owned.epoch, ("its manifest is gone",))
        except (BadManifestError, UnknownFormatError) as error:
            return Candidate(unread, owned.epoch, (f"its manifest can't be used: {error}",))
        kept = Kept(
            generation=owned.generation,
            run_id="",
            manifest=unread.manifest,
            digest=blake3(data).hexdigest(),
            created=manifest.created,
            files=len(manifest.tree.files),
            bytes=manifest.tree.size,
        )
        return Candidate(kept, owned.epoch, tuple(await self._faults(owned, manifest)))

    async def _faults(self, owned: Owned, manifest: Manifest) -> list[str]:
        if (manifest.generation, manifest.epoch) != (owned.generation, owned.epoch):
            return [f"its manifest is of generation {manifest.generation} and epoch {manifest.epoch}"]
        for pack, places in sorted(by_pack([manifest]).items()):
            there = self.listed.get(self.layout.pack_key(pack))
            size = None if there is None else there.size
            fault = await self.packs.fault(pack, manifest.packs[pack], places, size)
            if fault is not None:
                return [f"{fault.key}: {fault.detail}"]
        return []


def new_head(found: Survey, holder: str, *, job_id: str = "", run_id: str = "") -> Head:
    """The head that a survey's chosen generations get.

    Args:
        found: The survey.
        holder: Who writes it, for people.
        job_id: The job that the prefix is to belong to; empty for nobody's, which any job may take.
        run_id: The run of that job.

    Raises:
        NoGenerationError: No generation is whole.
    """
    if not found.chosen:
        reasons = [f"generation {seen.kept.generation}: {fault}" for seen in found.candidates for fault in seen.faults]
        raise NoGenerationError("the prefix", reasons)
    kept = [Kept(**{**vars(candidate.kept), "run_id": run_id}) for candidate in reversed(found.chosen)]
    now = time.time()
    head = Head(
        job_id=job_id,
        run_id=run_id,
        attempt=0,
        epoch=found.epoch + 1,
        holder=holder,
        acquired=now,
        generation=max(found.generation, kept[-1].generation),
        kept=tuple(kept),
    )
    return head.signed(now)


async def write_head(layout: Layout, head: Head, etag: str | None, *, fenced: bool = True) -> None:
    """Put a new head where there is none, or in the place of the unreadable one with that ETag.

    Args:
        layout: The prefix.
        head: As `new_head` made it.
        etag: Of the unreadable head; None if there is none.
        fenced: Whether storage enforces conditions.

    Raises:
        DamagedHeadError: Somebody else wrote, or deleted, the head meanwhile.
        StoreError: Storage refused, or was out of reach for longer than the policy's patience.
    """
    data = encode_head(head)
    condition = Condition(if_absent=True) if etag is None else Condition(if_match=etag)

    async def attempt() -> None:
        try:
            await layout.store.put(layout.head_key, data, condition=condition if fenced else None)
        except StoreError as error:
            await _resolve(layout, data, etag, error)

    await retrying(layout.policy, attempt)


async def _resolve(layout: Layout, data: bytes, etag: str | None, error: StoreError) -> None:
    """What became of a write without a plain success: the object tells."""
    there: tuple[bytes, ObjectInfo] | None
    try:
        there = await read_object(layout.store, layout.head_key)
    except ObjectNotFoundError:
        there = None
    if there is not None and there[0] == data:
        return
    if (None if there is None else there[1].etag) != etag:
        raise DamagedHeadError(str(layout.location), "its head was changed by somebody else meanwhile") from None
    if isinstance(error, PreconditionFailedError | ObjectNotFoundError):  # and yet it holds: ours came to nothing
        raise TransientStoreError(error.operation, error.bucket, error.key, error.detail)
    raise error
