"""Holders without files: trees that are made up in memory, sent and read chunk by chunk."""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import partial

import anyio

from heeler_sync.errors import ObjectNotFoundError
from heeler_sync.snapshot.chunks import digest_of, unpack_chunk
from heeler_sync.snapshot.holder import Adoptable, Holder
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.manifest import FileEntry, Tree
from heeler_sync.snapshot.packs import Pack
from heeler_sync.snapshot.recover import Generations
from heeler_sync.store.retry import retrying

CHUNK = 64


class DoubtfulPermit:
    """A lease that is always believed to be ours: what keeps others out must be the epoch alone."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng

    async def wait(self) -> None:
        return

    async def doubt(self) -> None:
        await anyio.sleep(self._rng.uniform(0.0, 0.5))

    def certain(self) -> bool:
        return self._rng.random() < 0.95


class Program:
    """Makes trees whose chunks come and go and come back, so that packs are shared, dropped, and wanted again."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._pool = [self._content(str(number)) for number in range(12)]
        self.contents = {digest_of(data): data for data in self._pool}

    @staticmethod
    def _content(name: str) -> bytes:
        return random.Random(name).randbytes(CHUNK)

    def tree(self) -> Tree:
        """Another tree."""
        files = {}
        for number in range(self._rng.randint(1, 4)):
            chunks = self._rng.choices(self._pool, k=self._rng.randint(0, 3))
            path = f"{number}.bin"
            digests = tuple(digest_of(data) for data in chunks)
            files[path] = FileEntry(path, 0o644, self._rng.randrange(1 << 60), CHUNK * len(chunks), digests)
        return Tree(files, {"empty": 0o755}, {"link": "0.bin"})


async def upload(
    holder: Holder, tree: Tree, contents: Mapping[bytes, bytes], rng: random.Random
) -> dict[str, Adoptable]:
    """Send what storage lacks of a tree, in packs of a few chunks, as `Outbox` does; what was sent."""
    sent: dict[str, Adoptable] = {}
    missing = [digest for digest in sorted(tree.digests()) if holder.known(digest) is None]
    while missing:
        count = rng.randint(1, 3)
        pack = Pack(new_id(holder.epoch))
        for digest in missing[:count]:
            pack.add(digest, contents[digest])
        missing = missing[count:]
        key, data = holder.layout.pack_key(pack.id), pack.take()
        await retrying(holder.layout.policy, partial(holder.layout.store.put, key, data))
        holder.add_pack(pack.id, pack.size, pack.places)
        sent[pack.id] = Adoptable(dict(pack.places), pack.size)
    return sent


async def read_newest(source: Generations) -> Tree | None:
    """Read the newest generation chunk by chunk, as a restore does; None if the head does not list it any more."""
    for kept in source.generations()[:1]:
        manifest = source.manifest(kept)
        assert manifest is not None
        for digest, place in sorted(manifest.places.items()):
            key = source.layout.pack_key(place.pack)
            read = partial(source.layout.store.read, key, offset=place.offset, length=place.stored)
            try:
                data = await retrying(source.layout.policy, read)
            except ObjectNotFoundError:
                if await source.still_lists(kept):
                    source.damaged(kept, f"{key} is missing")
                return None
            unpack_chunk(data, place.codec, digest, place.size)
        return manifest.tree
    return None
