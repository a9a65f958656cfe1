"""A new head out of the manifests that are there: only whole generations, above all that was, and fenced."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from heeler_sync.errors import (
    AccessDeniedError,
    DamagedHeadError,
    FencedError,
    NoGenerationError,
    TransientStoreError,
)
from heeler_sync.snapshot.head import Head, encode_head
from heeler_sync.snapshot.ids import new_id
from heeler_sync.snapshot.manifest import UnknownFormatError
from heeler_sync.snapshot.repair import Survey, new_head, survey, write_head
from heeler_sync.snapshot.verify import verify
from tests.support.stores import transient
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_snapshot_verify import Prefix, two_generations

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


async def repaired(prefix: Prefix, generation: int | None = None) -> Head:
    """Repair it, and return the head that is there then."""
    found = await survey(prefix.layout, generation=generation)
    await write_head(prefix.layout, new_head(found, "test"), found.etag)
    read = await prefix.layout.read_head()
    assert read is not None
    return read[0]


def numbers(found: Survey) -> list[int]:
    return [candidate.kept.generation for candidate in found.chosen]


async def headless() -> Prefix:
    prefix = await two_generations()
    await prefix.delete(prefix.layout.head_key)
    return prefix


async def test_a_missing_head_is_made_of_all_that_is_whole() -> None:
    prefix = await two_generations()
    before = (await prefix.take()).head
    await prefix.delete(prefix.layout.head_key)
    head = await repaired(prefix)
    assert head.kept == before.kept
    assert (head.generation, head.epoch, head.status) == (2, 2, "open")
    assert (head.job_id, head.run_id, head.attempt) == ("", "", 0)
    assert (await prefix.verified()).findings == ()


async def test_a_worker_goes_on_where_the_repair_left_it() -> None:
    prefix = await headless()
    await repaired(prefix)
    holder = await prefix.take("job")
    assert [kept.generation for kept in holder.generations()] == [2, 1]
    assert (await prefix.commit(holder, "a", "x")).generation == 3
    assert (await prefix.verified()).whole


@pytest.mark.parametrize("left", [b"", b"{", b"\xff\xfe", b'{"format": 1}', b"[]"])
async def test_an_unreadable_head_is_replaced(left: bytes) -> None:
    prefix = await two_generations()
    await prefix.memory.put(prefix.layout.head_key, left)
    found = await survey(prefix.layout)
    assert found.trouble is not None
    assert found.trouble.startswith("the head ")
    assert numbers(found) == [2, 1]
    await write_head(prefix.layout, new_head(found, "test"), found.etag)
    assert (await prefix.verified()).whole


async def test_what_is_left_of_a_head_tells_its_job_and_its_epoch() -> None:
    prefix = await two_generations()
    for _ in range(3):
        await prefix.take("my-job")
    data = prefix.memory.objects()[prefix.layout.head_key]
    await prefix.memory.put(prefix.layout.head_key, data[:-20])
    found = await survey(prefix.layout)
    assert found.hints == {"job_id": "my-job"}
    assert found.epoch == 4, "three acquires that no name of an object tells of"
    assert new_head(found, "test").epoch == 5


async def test_what_is_left_of_a_head_is_told_of_itself_and_not_of_its_generations() -> None:
    prefix = await two_generations()
    head = (await prefix.take("my-job")).head
    kept = tuple(replace(entry, run_id="earlier") for entry in head.kept)
    data = encode_head(replace(head, run_id="now", kept=kept))
    await prefix.memory.put(prefix.layout.head_key, data[:-20])
    assert (await survey(prefix.layout)).hints == {"job_id": "my-job", "run_id": "now"}


async def test_a_healthy_head_is_left_alone() -> None:
    prefix = await two_generations()
    assert (await survey(prefix.layout)).trouble is None
    assert prefix.store.count("read") == 0


async def test_a_head_of_a_newer_heeler_is_not_repaired() -> None:
    prefix = await two_generations()
    await prefix.memory.put(prefix.layout.head_key, b'{"format": 2}')
    with pytest.raises(UnknownFormatError):
        await survey(prefix.layout)


async def test_a_generation_that_is_not_whole_is_passed_over_and_its_number_is_not_used_again() -> None:
    prefix = await headless()
    newest = next(key for key in prefix.keys("packs") if len(prefix.memory.objects()[key]) == 60)
    await prefix.flip(newest, 5)
    found = await survey(prefix.layout)
    assert numbers(found) == [1]
    assert [candidate.whole for candidate in found.candidates] == [False, True]
    assert "digest" in found.candidates[0].faults[0]
    head = await repaired(prefix)
    assert head.generation == 2
    holder = await prefix.take()
    assert (await prefix.commit(holder, "z")).generation == 3


async def test_an_older_generation_may_be_asked_for() -> None:
    prefix = await headless()
    head = await repaired(prefix, generation=1)
    assert [kept.generation for kept in head.kept] == [1]
    assert head.generation == 2


async def test_no_other_generation_is_taken_for_the_one_that_was_asked_for() -> None:
    prefix = await headless()
    await prefix.flip(prefix.keys("manifests")[-1], 9)
    assert numbers(await survey(prefix.layout, generation=2)) == []
    assert numbers(await survey(prefix.layout)) == [1]


async def test_only_so_many_are_listed_and_read_as_are_kept() -> None:
    prefix = Prefix(keep=4)
    holder = await prefix.take()
    for name in "abcd":
        await prefix.commit(holder, name)
    await prefix.delete(prefix.layout.head_key)
    assert numbers(await survey(prefix.layout, keep=3)) == [4, 3, 2]
    assert prefix.store.count("read") == 3


async def test_of_two_manifests_of_one_number_the_later_epochs_counts() -> None:
    prefix = Prefix()
    late = await prefix.take()
    await prefix.commit(late, "a")
    head = prefix.memory.objects()[prefix.layout.head_key]
    newer = await prefix.take()
    with pytest.raises(FencedError):
        await prefix.commit(late, "a", "never")  # its manifest stays, of generation 2
    await prefix.commit(newer, "a", "real")
    assert len(prefix.keys("manifests")) == 3
    await prefix.memory.put(prefix.layout.head_key, head[:40])
    found = await survey(prefix.layout)
    assert [(candidate.kept.generation, candidate.epoch) for candidate in found.chosen] == [(2, 2), (1, 1)]
    assert len(found.candidates) == 3


async def test_a_generation_that_a_later_epoch_wrote_below_the_newest_is_of_another_history() -> None:
    prefix, other = Prefix(), Prefix()
    holder = await prefix.take()
    await prefix.commit(holder, "a")
    await prefix.commit(holder, "b")
    for _ in range(3):
        holder = await other.take()
    await other.commit(holder, "c")
    prefix.memory._objects.update(other.memory._objects)  # generation 1 of epoch 3 beside 2 of epoch 1
    await prefix.delete(prefix.layout.head_key)
    found = await survey(prefix.layout)
    assert [(candidate.kept.generation, candidate.epoch) for candidate in found.chosen] == [(2, 1), (1, 1)]
    assert [(candidate.kept.generation, candidate.epoch) for candidate in found.candidates] == [(2, 1), (1, 3), (1, 1)]


async def test_a_manifest_under_a_wrong_name_is_not_taken() -> None:
    prefix = await headless()
    last = prefix.keys("manifests")[-1]
    data = prefix.memory.objects()[last]
    await prefix.memory.put(f"p/.heeler/manifests/9.{new_id(1)}.json.zst", data)
    await prefix.memory.put(f"p/.heeler/manifests/3.{new_id(7)}.json.zst", data)
    found = await survey(prefix.layout)
    assert numbers(found) == [2, 1]
    assert (found.generation, found.epoch) == (9, 7)


async def test_where_nothing_is_whole_there_is_no_head() -> None:
    prefix = await headless()
    for key in prefix.keys("packs"):
        await prefix.delete(key)
    found = await survey(prefix.layout)
    assert found.chosen == ()
    with pytest.raises(NoGenerationError, match=r"generation 2: .*it is not there"):
        new_head(found, "test")


async def test_a_head_that_came_meanwhile_is_not_overwritten() -> None:
    prefix = await headless()
    found = await survey(prefix.layout)
    await repaired(prefix)
    now = prefix.memory.objects()[prefix.layout.head_key]
    with pytest.raises(DamagedHeadError, match="changed by somebody else"):
        await write_head(prefix.layout, new_head(found, "late"), found.etag)
    assert prefix.memory.objects()[prefix.layout.head_key] == now


async def test_an_unreadable_head_that_changed_meanwhile_is_not_overwritten() -> None:
    prefix = await two_generations()
    await prefix.memory.put(prefix.layout.head_key, b"{")
    found = await survey(prefix.layout)
    await prefix.memory.put(prefix.layout.head_key, b"{{")
    with pytest.raises(DamagedHeadError, match="changed by somebody else"):
        await write_head(prefix.layout, new_head(found, "late"), found.etag)
    await prefix.memory.delete(prefix.layout.head_key)
    with pytest.raises(DamagedHeadError, match="changed by somebody else"):
        await write_head(prefix.layout, new_head(found, "late"), found.etag)
    assert prefix.layout.head_key not in prefix.memory.objects()


async def test_a_write_whose_answer_was_lost_counts_and_is_not_repeated() -> None:
    prefix = await headless()
    prefix.store.scripts["put"] = [("after", transient("PutObject"))]
    puts = prefix.store.count("put")
    head = await repaired(prefix)
    assert head.holder == "test"
    assert prefix.store.count("put") == puts + 1


async def test_a_write_that_did_not_arrive_is_repeated() -> None:
    prefix = await headless()
    prefix.store.scripts["put"] = [transient("PutObject"), transient("PutObject")]
    assert (await repaired(prefix)).holder == "test"


async def test_storage_that_refuses_is_told() -> None:
    prefix = await headless()
    found = await survey(prefix.layout)
    prefix.store.scripts["put"] = [AccessDeniedError("PutObject", "memory", "k", "403")]
    with pytest.raises(AccessDeniedError):
        await write_head(prefix.layout, new_head(found, "test"), found.etag)
    prefix.store.scripts["put"] = [transient("PutObject")] * 100_000
    with pytest.raises(TransientStoreError):
        await write_head(prefix.layout, new_head(found, "test"), found.etag)


async def test_whoever_held_the_prefix_before_is_fenced_out() -> None:
    prefix = Prefix()
    holder = await prefix.take("job")
    await prefix.commit(holder, "a")
    await prefix.delete(prefix.layout.head_key)
    await repaired(prefix)
    with pytest.raises(FencedError):
        await prefix.commit(holder, "a", "b")


async def test_whatever_is_lost_a_repaired_prefix_is_whole() -> None:
    sample = await two_generations()
    names = [*sample.keys("packs"), *sample.keys("manifests")]
    rng = random.Random(7)
    for lost in itertools.chain.from_iterable(itertools.combinations(names, count) for count in range(len(names) + 1)):
        prefix = Prefix()
        prefix.memory._objects = dict(sample.memory._objects)
        await prefix.delete(prefix.layout.head_key)
        for key in lost:
            if rng.random() < 0.5:
                await prefix.delete(key)
            else:
                await prefix.flip(key, rng.randrange(len(prefix.memory.objects()[key])))
        found = await survey(prefix.layout)
        if not found.chosen:
            continue
        await write_head(prefix.layout, new_head(found, "test"), found.etag)
        verified = await verify(prefix.layout)
        assert verified is not None
        assert verified.whole, (lost, verified.findings)
        assert lost or numbers(found) == [2, 1]
