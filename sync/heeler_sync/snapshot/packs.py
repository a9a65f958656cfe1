"""Packs: objects that hold chunks one after another, and nothing else. Where each chunk lies, manifests say.

A pack's id carries the epoch that uploaded it and is never used twice; a pack is written once and never changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from heeler_sync.snapshot.chunks import Buffer, pack_chunk
from heeler_sync.snapshot.manifest import Place

PACK_BYTES = 8 << 20
"""A pack is closed when another chunk might make it larger: one request carries it, also on a slow uplink."""


@dataclass
class Pack:
    """A pack that is being filled, or is full.

    Attributes:
        id: Its name.
        places: Where its chunks lie, by digest.
        size: Bytes so far.
    """

    id: str
    places: dict[bytes, Place] = field(default_factory=dict)
    size: int = 0
    _pieces: list[Buffer] = field(default_factory=list, repr=False)

    def add(self, digest: bytes, data: Buffer) -> None:
        """Append a chunk; compressed where that pays."""
        codec, stored = pack_chunk(data)
        self.places[digest] = Place(self.id, self.size, len(stored), len(data), codec)
        self._pieces.append(stored)
        self.size += len(stored)

    def take(self) -> bytes:
        """The object's bytes; the pack keeps none of them."""
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data
