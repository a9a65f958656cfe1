"""The chunks that a commit of ours may refer to: where each is, and how large the packs are. No storage here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

from heeler_sync.snapshot.manifest import Manifest, Place


@dataclass(frozen=True)
class Adoptable:
    """A pack that an interrupted commit of ours had uploaded: its places by digest, and its size in bytes."""

    places: Mapping[bytes, Place]
    size: int


class Chunks:
    """What one holder knows of its prefix's chunks. A pack that was found bad is never referred to again."""

    def __init__(self) -> None:
        self._places: dict[bytes, Place] = {}
        self._sizes: dict[str, int] = {}
        self._bad: set[str] = set()

    def place(self, digest: bytes) -> Place | None:
        """Where a chunk is; None if it is in no pack that may be referred to."""
        return self._places.get(digest)

    def places(self, digests: Collection[bytes]) -> dict[bytes, Place] | None:
        """Where all of `digests` are; None if one of them is not known."""
        found = {digest: self._places[digest] for digest in digests if digest in self._places}
        return found if len(found) == len(digests) else None

    def sizes(self, packs: Iterable[str]) -> dict[str, int]:
        """The packs' sizes in bytes."""
        return {pack: self._sizes[pack] for pack in packs}

    def add(self, pack: str, size: int, places: Mapping[bytes, Place]) -> None:
        """A pack of our epoch is in storage."""
        self._sizes[pack] = size
        self._places.update(places)

    def know(self, manifest: Manifest) -> None:
        """The head lists a generation."""
        self._places.update({d: place for d, place in manifest.places.items() if place.pack not in self._bad})
        self._sizes.update(manifest.packs)

    def forget_pack(self, pack: str) -> None:
        """It was found missing or damaged."""
        self._bad.add(pack)
        self.keep(lambda _: True)

    def keep(self, stays: Callable[[Place], bool], instead: Mapping[bytes, Place] | None = None) -> None:
        """Forget what `stays` refuses, unless `instead` says where else it is, and believe that in any case."""
        other = instead or {}
        kept = {d: other.get(d, place) for d, place in self._places.items() if d in other or stays(place)}
        self._places = {digest: place for digest, place in kept.items() if place.pack not in self._bad}

    def clear(self) -> None:
        """Forget all but which packs are bad."""
        self._places.clear()
        self._sizes.clear()
