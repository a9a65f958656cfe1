"""Reading all of a prefix: every loss is named, nothing else is, and a worker that is alive hides and fakes none.

`Prefix` is what the tests of repair use too: a bucket with generations that were never files.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import pytest
from blake3 import blake3

from heeler_sync.errors import DamagedHeadError, SyncError
from heeler_sync.paths import location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.snapshot.chunks import digest_of
from heeler_sync.snapshot.head import Kept, encode_head
from heeler_sync.snapshot.holder import Claim, Holder, acquire
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import FileEntry, Tree
from heeler_sync.snapshot.packs import Pack
from heeler_sync.snapshot.verify import Finding, Kind, RestlessError, Verified, verify
from heeler_sync.store.base import DIGEST_KEY
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS
from heeler_sync.verify_plain import verify_plain
from tests.support.stores import IMPATIENT, Events, ScriptedStore
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

PERMIT = AlwaysPermitted()


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Prefix:
    """A prefix whose generations hold small files, each of one chunk that no pack compresses."""

    def __init__(self, keep: int = 2) -> None:
        self.memory = MemoryStore()
        self.store = ScriptedStore(self.memory)
        self.layout = Layout(self.store, location("memory", "p/"), IMPATIENT)
        self._keep = keep

    async def take(self, job_id: str = "") -> Holder:
        """Acquire it."""
        claim = Claim(job_id, "", 1, "test", ordered=False)
        return await acquire(self.layout, claim, PERMIT, Events(), keep=self._keep)

    async def commit(self, holder: Holder, *names: str) -> Kept:
        """Commit a tree with these files; the content of each follows from its name."""
        contents = {name: random.Random(name).randbytes(60) for name in names}
        missing = {name: data for name, data in contents.items() if holder.known(digest_of(data)) is None}
        if missing:
            await self.send(holder, missing)
        files = {name: FileEntry(name, 0o644, 0, 60, (digest_of(data),)) for name, data in contents.items()}
        kept = await holder.commit(Tree(files))
        await holder.collect(PERMIT)
        return kept

    async def send(self, holder: Holder, contents: Mapping[str, bytes]) -> str:
        """Put a pack with these chunks; its key."""
        pack = Pack(new_id(holder.epoch))
        for data in contents.values():
            pack.add(digest_of(data), data)
        key = self.layout.pack_key(pack.id)
        await self.store.put(key, pack.take())
        holder.add_pack(pack.id, pack.size, pack.places)
        return key

    async def delete(self, key: str) -> None:
        """Lose an object."""
        await self.memory.delete(key)

    async def flip(self, key: str, at: int) -> None:
        """Damage one byte of an object."""
        data = bytearray(self.memory.objects()[key])
        data[at] ^= 0x10
        await self.memory.put(key, bytes(data))

    def keys(self, kind: str) -> list[str]:
        """The keys of its packs or manifests."""
        return sorted(key for key in self.memory.objects() if f"/{kind}/" in key)

    async def verified(self) -> Verified:
        """What `verify` finds."""
        found = await verify(self.layout)
        assert found is not None
        return found


async def two_generations() -> Prefix:
    """Generation 1 holds a, b and c, and generation 2 holds a, b and d: each has a pack, and the first is shared."""
    prefix = Prefix()
    holder = await prefix.take()
    await prefix.commit(holder, "a", "b", "c")
    await prefix.commit(holder, "a", "b", "d")
    return prefix


def brief(found: Verified) -> list[tuple[Kind, str, tuple[int, ...]]]:
    return [(finding.kind, finding.key, finding.generations) for finding in found.findings]


async def test_a_whole_prefix_has_no_findings_and_all_of_it_was_read() -> None:
    prefix = await two_generations()
    read: list[int] = []
    found = await verify(prefix.layout, read.append)
    assert found is not None
    assert found.whole
    assert found.findings == ()
    assert found.objects == 5
    assert found.bytes == sum(read) == 4 * 60


async def test_where_there_is_no_snapshot_none_is_verified() -> None:
    prefix = Prefix()
    await prefix.store.put("p/plain", b"x")
    assert await verify(prefix.layout) is None


@pytest.mark.parametrize("kind", ["packs", "manifests"])
async def test_every_deleted_object_is_reported_and_nothing_else(kind: str) -> None:
    prefix = await two_generations()
    for key in prefix.keys(kind):
        data = prefix.memory.objects()[key]
        await prefix.delete(key)
        found = await prefix.verified()
        assert [(entry.kind, entry.key) for entry in found.findings] == [(Kind.MISSING, key)]
        assert found.findings[0].generations == users(prefix, key, len(data))
        await prefix.memory.put(key, data)
    assert (await prefix.verified()).whole


@pytest.mark.parametrize("kind", ["packs", "manifests"])
async def test_every_flipped_byte_is_reported_and_nothing_else(kind: str) -> None:
    prefix = await two_generations()
    for key in prefix.keys(kind):
        size = len(prefix.memory.objects()[key])
        for at in {*range(0, size, 7), size - 1}:
            await prefix.flip(key, at)
            found = await prefix.verified()
            assert [(entry.kind, entry.key) for entry in found.findings] == [(Kind.DAMAGED, key)], at
            await prefix.flip(key, at)
    assert (await prefix.verified()).whole


def users(prefix: Prefix, key: str, size: int) -> tuple[int, ...]:
    """The generations of `two_generations` that need an object: the larger pack is both's."""
    owned = prefix.layout.owned(key)
    assert owned is not None
    if owned.manifest is not None:
        return (owned.generation,)
    return (1, 2) if size == 180 else (2,)


async def test_damage_is_laid_only_to_the_generations_that_need_the_damaged_part() -> None:
    prefix = await two_generations()
    pack = next(key for key in prefix.keys("packs") if len(prefix.memory.objects()[key]) == 180)
    await prefix.flip(pack, 130)  # c, which only generation 1 has
    assert brief(await prefix.verified()) == [(Kind.DAMAGED, pack, (1,))]
    await prefix.flip(pack, 10)  # a, which both have
    assert brief(await prefix.verified()) == [(Kind.DAMAGED, pack, (1, 2))]


@pytest.mark.parametrize("change", [-1, 1])
async def test_a_pack_of_another_length_is_damaged(change: int) -> None:
    prefix = await two_generations()
    pack = prefix.keys("packs")[0]
    data = prefix.memory.objects()[pack]
    await prefix.memory.put(pack, data[:-1] if change < 0 else data + b"x")
    found = await prefix.verified()
    assert [(entry.kind, entry.key) for entry in found.findings] == [(Kind.DAMAGED, pack)]
    assert f"{len(data) + change} bytes instead of {len(data)}" in found.findings[0].detail


async def test_no_flipped_byte_of_the_head_passes_for_another_set_of_generations() -> None:
    prefix = await two_generations()
    key = prefix.layout.head_key
    listed = [replace(kept, run_id="", created=0.0) for kept in (await prefix.take()).head.kept]
    caught = 0
    for at in range(len(prefix.memory.objects()[key])):
        await prefix.flip(key, at)
        try:
            found = await prefix.verified()
        except SyncError:
            caught += 1
        else:
            assert found.head is not None
            same = [replace(kept, run_id="", created=0.0) for kept in found.head.kept] == listed
            assert same or not found.whole, prefix.memory.objects()[key]
            caught += not found.whole
        await prefix.flip(key, at)
    assert caught > 100


async def test_a_head_that_lists_other_numbers_than_the_manifest_has_is_damaged() -> None:
    prefix = await two_generations()
    head = (await prefix.take()).head
    wrong = replace(head, kept=(head.kept[0], replace(head.kept[1], files=7)))
    await prefix.memory.put(prefix.layout.head_key, encode_head(wrong))
    found = await prefix.verified()
    assert brief(found) == [(Kind.DAMAGED, prefix.layout.head_key, (2,))]
    assert "7 files" in found.findings[0].detail


async def test_generations_without_a_head_ask_for_a_repair() -> None:
    prefix = await two_generations()
    await prefix.delete(prefix.layout.head_key)
    with pytest.raises(DamagedHeadError, match="heeler sync repair s3://memory/p/"):
        await verify(prefix.layout)


async def test_what_nothing_refers_to_is_told_apart_by_its_epoch_and_name() -> None:
    prefix = await two_generations()
    garbage = f"p/.heeler/packs/{new_id(1)}"
    await prefix.store.put(garbage, b"x")
    orphan = f"p/.heeler/manifests/3.{new_id(1)}.json.zst"
    await prefix.store.put(orphan, b"x")
    holder = await prefix.take()
    under_way = await prefix.send(holder, {"e": b"e" * 60})
    foreign = ["p/.heeler/notes.txt", "p/.heeler/packs/mine", "p/.heeler/packs/0-" + "0" * 32]
    for key in foreign:
        await prefix.store.put(key, b"x")
    found = await prefix.verified()
    assert found.whole
    assert {entry.key: entry.kind for entry in found.findings} == {
        garbage: Kind.GARBAGE,
        orphan: Kind.GARBAGE,
        under_way: Kind.UNDER_WAY,
        **dict.fromkeys(foreign, Kind.FOREIGN),
    }


async def test_while_a_manifest_cannot_be_read_no_pack_is_called_garbage() -> None:
    prefix = await two_generations()
    await prefix.take()
    last = prefix.keys("manifests")[-1]
    await prefix.flip(last, 3)
    found = await prefix.verified()
    assert brief(found) == [(Kind.DAMAGED, last, (2,))]
    assert found.unknown_packs == 1


async def test_an_adopted_pack_that_is_gone_is_missing_and_one_that_is_there_is_no_garbage() -> None:
    prefix = await two_generations()
    head = (await prefix.take()).head
    there, gone = new_id(1), new_id(1)
    await prefix.memory.put(prefix.layout.pack_key(there), b"x")
    await prefix.memory.put(prefix.layout.head_key, encode_head(replace(head, adopted=(there, gone))))
    assert brief(await prefix.verified()) == [(Kind.MISSING, prefix.layout.pack_key(gone), ())]


async def test_a_worker_that_commits_and_collects_meanwhile_makes_no_false_findings() -> None:
    prefix = await two_generations()
    holder = await prefix.take()

    async def live_on() -> None:
        await prefix.commit(holder, "d", "e")
        await prefix.commit(holder, "e", "f")

    before = set(prefix.memory.objects())
    prefix.store.scripts["list"] = [live_on]
    found = await prefix.verified()
    assert set(prefix.memory.objects()) & before <= {prefix.layout.head_key, *prefix.keys("packs")}
    assert len(before - set(prefix.memory.objects())) >= 3, "it collected"
    assert found.whole
    assert found.head is not None
    assert [kept.generation for kept in found.head.kept] == [3, 4]
    assert found.findings == ()


async def test_a_manifest_that_is_collected_right_after_the_head_was_read_is_no_finding() -> None:
    prefix = await two_generations()
    holder = await prefix.take()

    async def live_on() -> None:
        await prefix.commit(holder, "e")
        await prefix.commit(holder, "f")

    prefix.store.scripts["download"] = [None, live_on]
    assert (await prefix.verified()).findings == ()


async def test_what_was_found_whole_is_not_read_again_for_the_next_head() -> None:
    prefix = Prefix()
    holder = await prefix.take()
    await prefix.commit(holder, "a", "z")
    await prefix.commit(holder, "a", "b")
    shared = next(key for key in prefix.keys("packs") if len(prefix.memory.objects()[key]) == 120)

    async def live_on() -> None:
        await prefix.commit(holder, "a", "c")
        await prefix.commit(holder, "a", "d")

    prefix.store.scripts["list"] = [live_on]
    prefix.store.calls.clear()
    assert (await prefix.verified()).whole
    assert prefix.store.count("list") == 2, "it began again"
    assert prefix.store.count("read", shared) == 1


async def test_a_prefix_that_never_rests_is_given_up() -> None:
    prefix = await two_generations()
    holder = await prefix.take()
    number = iter(range(1000))

    async def live_on() -> None:
        for _ in range(2):
            await prefix.commit(holder, f"n{next(number)}")

    prefix.store.scripts["list"] = [live_on] * 100
    with pytest.raises(RestlessError, match="faster than it can be verified"):
        await verify(prefix.layout)


async def test_a_damage_that_is_only_on_the_way_is_no_finding() -> None:
    prefix = await two_generations()

    class Noise(ScriptedStore):
        async def read(self, key: str, *, offset: int, length: int) -> bytes:
            data = await super().read(key, offset=offset, length=length)
            return data if self.count("read", key) > 1 else bytes(length)

    layout = Layout(Noise(prefix.memory), prefix.layout.location, IMPATIENT)
    found = await verify(layout)
    assert found is not None
    assert found.whole


# -- plain keys -----------------------------------------------------------------------------------------------------


async def plain(store: MemoryStore) -> Verified:
    return await verify_plain(store, location("memory", "p/"), IMPATIENT)


async def test_plain_keys_are_compared_with_their_digest_or_else_with_their_etag() -> None:
    store = MemoryStore()
    put = partial(store.put)
    await put("p/good", b"good", metadata={DIGEST_KEY: blake3(b"good").hexdigest()})
    await put("p/plain", b"plain")
    await put("p/.heeler/x", b"ours")
    await put("q/other", b"other")
    found = await plain(store)
    assert found.whole
    assert (found.objects, found.bytes, found.findings) == (2, 9, ())


async def test_a_damaged_plain_key_is_reported() -> None:
    store = MemoryStore()
    await store.put("p/good", b"good", metadata={DIGEST_KEY: blake3(b"good").hexdigest()})
    await store.put("p/bad", b"bad!", metadata={DIGEST_KEY: blake3(b"good").hexdigest()})
    entry = (await store.head("p/good")).etag
    store._objects["p/rot"] = replace(store._objects["p/good"], data=b"goot", metadata={}, etag=entry)
    found = await plain(store)
    assert not found.whole
    assert [(entry.kind, entry.key) for entry in found.findings] == [(Kind.DAMAGED, "p/bad"), (Kind.DAMAGED, "p/rot")]


async def test_a_plain_key_without_a_checksum_is_said_not_to_be_checked() -> None:
    store = MemoryStore(provider=PROVIDERS["aws"])
    await store.put("p/one", b"x")
    assert brief(await plain(store)) == [(Kind.UNCHECKED, "p/one", ())]
    parts = MemoryStore()
    store._objects["p/one"] = replace(store._objects["p/one"], etag='"0123456789abcdef0123456789abcdef-2"')
    parts._objects.update(store._objects)
    assert brief(await plain(parts)) == [(Kind.UNCHECKED, "p/one", ())]
    assert (await plain(parts)).whole


def test_only_what_cannot_be_restored_counts_as_lost() -> None:
    lost = {kind for kind in Kind if not Verified(None, (Finding(kind, "k", ""),), 1, 1).whole}
    assert lost == {Kind.MISSING, Kind.DAMAGED}
