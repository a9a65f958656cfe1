"""Watches a prefix and says what must never happen there (DESIGN 1, promises 2 and 3; 6.3).

It sees each change of the bucket as it takes effect, keeps the history of heads, and knows what each process was told.
It knows the format, and nothing of the code that keeps to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from blake3 import blake3

from heeler_sync.snapshot.chunks import DamagedChunkError, unpack_chunk
from heeler_sync.snapshot.head import Head, Kept, decode_head
from heeler_sync.snapshot.ids import epoch_of
from heeler_sync.snapshot.manifest import Manifest, Tree, decode


@dataclass(frozen=True)
class Violation:
    """Something that must never happen. `kind` is one of step, missing, deleted, answer, reader, litter, fault."""

    kind: str
    detail: str


@dataclass
class PrefixReferee:
    """Implements `cloud.Referee`.

    Attributes:
        own: What the keys of all objects begin with.
        keep: How many generations are kept.
        ordered: Whether attempts are ordered.
        objects: The bucket's objects.
        history: All heads there were, oldest first.
        trees: What each manifest was to hold, by id.
        violations: What was found.
    """

    own: str
    keep: int
    ordered: bool
    objects: Mapping[str, bytes] = field(default_factory=dict)
    history: list[Head] = field(default_factory=list)
    trees: dict[str, Tree] = field(default_factory=dict)
    violations: list[Violation] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    _owners: dict[int, str] = field(default_factory=dict)
    _needed: set[str] = field(default_factory=set)
    _written: set[str] = field(default_factory=set)
    _visible: set[str] = field(default_factory=set)
    _committed: set[str] = field(default_factory=set)
    _refused: set[str] = field(default_factory=set)

    def found(self, kind: str, detail: str) -> None:
        self.violations.append(Violation(kind, detail))
        self.log.append(f"*** {kind}: {detail}")

    @property
    def head(self) -> Head | None:
        return self.history[-1] if self.history else None

    def holds(self, by: str) -> bool:
        """Whether a process is the one that acquired last."""
        return self.head is not None and self._owners[self.head.epoch] == by

    # -- what happens to the bucket --------------------------------------------------------------------------------

    def putting(self, key: str, data: bytes, by: str) -> None:
        self.log.append(f"{by} put {key.removeprefix(self.own)}")
        if key != self.own + "head.json":
            return
        head = decode_head(data)
        self.log.append(f"    epoch {head.epoch} generation {head.generation} {head.status} write {head.writes[-1]}")
        self._check_step(self.head, head, by)
        self._check_whole(head)
        self._written.add(head.writes[-1])
        self._visible.update(kept.manifest for kept in head.kept)
        self.history.append(head)

    def deleting(self, key: str, by: str) -> None:
        self.log.append(f"{by} delete {key.removeprefix(self.own)}")
        if key in self._needed or key == self.own + "head.json":
            self.found("deleted", f"{by} deleted {key}, which the head refers to")

    def _check_step(self, old: Head | None, new: Head, by: str) -> None:
        why = self._why_no_step(old, new, by)
        if why:
            self.found("step", f"{by} wrote epoch {new.epoch}, generation {new.generation}: {why}")

    def _why_no_step(self, old: Head | None, new: Head, by: str) -> str:
        if new.writes[-1] in self._written:
            return "the same write took effect twice"
        if old is None:
            self._owners[new.epoch] = by
            return "" if (new.epoch, new.generation, new.kept) == (1, 0, ()) else "the first head is no acquire"
        if new.writes[:-1] != old.writes[-7:]:
            return "it was made from another head than the one before"
        if new.epoch != old.epoch:
            self._owners[new.epoch] = by
            return self._why_no_acquire(old, new)
        if self._owners.get(new.epoch) != by:
            return f"the epoch is {self._owners.get(new.epoch)}'s"
        return self._why_no_commit(old, new)

    def _why_no_acquire(self, old: Head, new: Head) -> str:
        same_run = (old.job_id, old.run_id) == (new.job_id, new.run_id)
        if new.epoch != old.epoch + 1:
            return f"the epoch before was {old.epoch}"
        if (new.generation, new.kept, new.status) != (old.generation, old.kept, "open"):
            return "an acquire changed the generations"
        if same_run and old.complete:
            return "the job was complete"
        if same_run and self.ordered and new.attempt < old.attempt:
            return f"a newer attempt held it: {old.attempt} and not {new.attempt}"
        return ""

    def _why_no_commit(self, old: Head, new: Head) -> str:
        if old.complete:
            return "the job was complete"
        may_change = {
            "generation": 0,
            "kept": (),
            "adopted": (),
            "status": "",
            "result": None,
            "writes": (),
            "written": 0,
        }
        if replace(old, **may_change) != replace(new, **may_change):  # type: ignore[arg-type]
            return "a commit changed who holds the prefix"
        if new.generation == old.generation:
            return "" if new.complete and new.kept == old.kept else "nothing was committed or completed"
        if new.generation != old.generation + 1 or not new.kept or new.kept[-1].generation != new.generation:
            return f"the generation before was {old.generation}"
        if new.kept[:-1] != old.kept[len(old.kept) - min(len(old.kept), self.keep - 1) :]:
            return "others are kept than the newest"
        if new.adopted:
            return "packs are adopted still, and no commit is under way"
        if epoch_of(new.kept[-1].manifest) != new.epoch:
            return "the manifest is of another epoch"
        return self._why_no_packs(old, new)

    def _why_no_packs(self, old: Head, new: Head) -> str:
        """A commit refers only to packs of the head that it replaces and of its own epoch."""
        manifest = self._manifest(new.kept[-1])
        allowed = {key.rpartition("/")[2] for key in self._needed}
        others = {pack for pack in manifest.packs if epoch_of(pack) != new.epoch} if manifest else set()
        return "" if others <= allowed else f"it refers to packs {others - allowed} of other epochs"

    def _manifest(self, kept: Kept) -> Manifest | None:
        data = self.objects.get(f"{self.own}manifests/{kept.generation}.{kept.manifest}.json.zst")
        if data is None or blake3(data).hexdigest() != kept.digest:
            return None
        return decode(data)

    def _check_whole(self, head: Head) -> None:
        """Note what the head refers to; all of it must be there, as it should be."""
        packs = set(head.adopted)
        for kept in head.kept:
            manifest = self._manifest(kept)
            if manifest is None:
                self.found("missing", f"the manifest of generation {kept.generation} is not there")
                continue
            packs.update(manifest.packs)
            if manifest.tree != self.trees[kept.manifest]:
                self.found("missing", f"generation {kept.generation} is another tree")
            self._check_chunks(manifest)
        missing = {pack for pack in packs if f"{self.own}packs/{pack}" not in self.objects}
        if missing:
            self.found("missing", f"generation {head.generation} refers to {missing}, which are not there")
        names = {f"{self.own}manifests/{kept.generation}.{kept.manifest}.json.zst" for kept in head.kept}
        self._needed = {*names, *(f"{self.own}packs/{pack}" for pack in packs)}

    def _check_chunks(self, manifest: Manifest) -> None:
        for digest, place in manifest.places.items():
            pack = self.objects.get(f"{self.own}packs/{place.pack}")
            if pack is not None:
                try:
                    unpack_chunk(pack[place.offset : place.offset + place.stored], place.codec, digest, place.size)
                except DamagedChunkError as error:
                    self.found("missing", f"generation {manifest.generation}: a chunk {error}")

    # -- what processes are told -----------------------------------------------------------------------------------

    def acquired(self, by: str, epoch: int) -> None:
        """A process was told that it holds the prefix."""
        if self._owners.get(epoch) != by:
            self.found("answer", f"{by} believes that it has epoch {epoch}, which is {self._owners.get(epoch)}'s")

    def committed(self, by: str, kept: Kept) -> None:
        """A process was told that its commit is done."""
        self.log.append(f"{by} told: {kept.generation} committed")
        self._committed.add(kept.manifest)

    def refused(self, by: str, manifest: str) -> None:
        """A process was told that its commit was fenced and never written."""
        self.log.append(f"{by} told: fenced, {manifest} not written")
        self._refused.add(manifest)

    def told(self, by: str, event: str, fields: Mapping[str, object]) -> None:
        """An event of a process."""
        if event == "generation_damaged":
            self.found("reader", f"{by} found damage: {fields}")

    def close(self) -> None:
        """All is over, and no change on its way any more."""
        if lost := self._committed - self._visible:
            self.found("answer", f"commits were confirmed, and never were: {lost}")
        if wrong := self._refused & self._visible:
            self.found("answer", f"commits were said to be fenced and not written, and were: {wrong}")
        if litter := self.objects.keys() - self._needed - {self.own + "head.json"}:
            self.found("litter", f"nothing refers to {litter}, and no sweep took it")
