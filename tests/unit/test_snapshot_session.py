"""Sessions of snapshot folders: whose prefix it is, what is passed over as damaged, what ends a job and what stays."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio
import pytest

from heeler_sync.errors import (
    DamagedHeadError,
    FencedError,
    FinishedError,
    NoGenerationError,
    PrefixTakenError,
)
from heeler_sync.session import Capture, Plan
from heeler_sync.snapshot import capture, holder, restore
from heeler_sync.snapshot import session as snapshot_session
from heeler_sync.snapshot.holder import Claim
from heeler_sync.snapshot.manifest import Manifest
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_snapshot_restore import CHUNK, PACK, Job, noise, shrink, some_tree, tree_of, write

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.fixture
def job() -> Job:
    return Job()


# Whose prefix it is.


async def test_plain_keys_that_were_never_committed_are_imported_and_then_committed(job: Job, tmp_path: Path) -> None:
    for key, data in {"p/ck/1": b"one", "p/ck/2": b"two"}.items():
        await job.store.inner.put(key, data)
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/ck/3", b"three"))
    assert sorted(job.manifest(1).tree.files) == ["ck/1", "ck/2", "ck/3"]
    await job.store.inner.put("p/ck/4", b"a Kelpie worker that came late")
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a"), "generations win over plain keys"


async def test_manifests_without_a_head_stop_everything_and_name_the_repair(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"))
    await job.remove("p/.heeler/head.json")
    before = job.store.objects()
    with pytest.raises(DamagedHeadError, match=re.escape("heeler sync repair s3://bucket/p/")):
        await job.restore(tmp_path / "b")
    assert job.store.objects() == before


@pytest.mark.parametrize("data", [b"", b"{", b"{}", b'{"format": 9}'])
async def test_a_head_that_can_not_be_read_stops_everything_and_is_not_written_over(
    job: Job, tmp_path: Path, data: bytes
) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"))
    await job.store.inner.put("p/.heeler/head.json", data)
    with pytest.raises(Exception, match=r"repair|newer heeler"):
        await job.restore(tmp_path / "b")
    assert job.store.objects()["p/.heeler/head.json"] == data
    assert tree_of(tmp_path / "b") == {}


async def test_another_jobs_prefix_is_refused_by_its_name(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"))
    before = job.store.objects()
    with pytest.raises(PrefixTakenError, match="job job"):
        await job.restore(tmp_path / "b", claim=Claim("another", "", 9))
    assert job.store.objects() == before


async def test_a_finished_job_is_finished_with_the_result_that_it_had(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"), result={"exit_code": 0, "said": "ü"})
    before = job.store.objects()
    with pytest.raises(FinishedError) as caught:
        await job.restore(tmp_path / "b")
    assert caught.value.result == {"exit_code": 0, "said": "ü"}
    assert job.store.objects() == before
    assert not (tmp_path / "b/f").exists()


async def test_a_new_run_of_a_finished_job_starts_empty_and_counts_on(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"), result={})
    fresh = Claim("job", "fresh", 1)
    write(tmp_path / "b/old")
    await job.run(tmp_path / "b", lambda: write(tmp_path / "b/g"), claim=fresh)
    assert set(tree_of(tmp_path / "b")) == {"g"}
    assert job.head().generation == 2
    await job.restore(tmp_path / "c", claim=fresh)
    assert set(tree_of(tmp_path / "c")) == {"g"}, "never a file of the run before"


async def test_a_damaged_new_run_never_falls_back_to_the_run_before(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"), result={})
    fresh = Claim("job", "fresh", 1)
    await job.run(tmp_path / "b", lambda: write(tmp_path / "b/g", b"new"), claim=fresh)
    await job.remove(*job.new_packs(2))
    with pytest.raises(NoGenerationError):
        await job.restore(tmp_path / "c", claim=fresh)


async def test_a_lower_attempt_is_refused_and_the_same_is_not(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"), claim=Claim("job", "", 5, "five"))
    before = job.store.objects()
    with pytest.raises(FencedError, match="five"):
        await job.restore(tmp_path / "b", claim=Claim("job", "", 4, "four"))
    assert job.store.objects() == before
    await job.restore(tmp_path / "b", claim=Claim("job", "", 5, "five again"))
    await job.restore(tmp_path / "b", claim=Claim("job", "", 1, "unordered", ordered=False))
    assert (job.head().holder, job.head().epoch) == ("unordered", 3)


async def test_another_run_is_not_bound_by_the_attempts_of_the_last(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f"), claim=Claim("job", "one", 5))
    await job.restore(tmp_path / "b", claim=Claim("job", "two", 1))
    assert tree_of(tmp_path / "b") == {}


# Damage.


@pytest.fixture
def history(job: Job, tmp_path: Path) -> Callable[[], Awaitable[None]]:
    """Two generations: the first has `old` and `both`, the second `both` and `new`."""

    def first() -> None:
        write(tmp_path / "a/both", noise("both", 3 * CHUNK))
        write(tmp_path / "a/old", noise("old", 3 * CHUNK))

    def second() -> None:
        (tmp_path / "a/old").unlink()
        for number in range(3):
            write(tmp_path / f"a/new-{number}", noise(number, 3 * CHUNK))

    async def commit() -> None:
        await job.run(tmp_path / "a", first)
        await job.run(tmp_path / "a", second)

    return commit


ways = pytest.mark.parametrize("way", ["hurt at its end", "hurt at its begin", "gone", "cut", "empty"])


async def spoil(job: Job, key: str, way: str) -> None:
    if way == "gone":
        await job.remove(key)
    elif way.startswith("hurt"):
        await job.hurt(key, -1 if way.endswith("end") else 0)
    else:
        data = job.store.objects()[key]
        await job.store.inner.put(key, data[: len(data) // 2] if way == "cut" else b"")


@ways
@pytest.mark.parametrize("which", [0, -1], ids=["first pack", "last pack"])
async def test_a_damaged_pack_means_the_generation_before_and_that_is_said(
    job: Job, tmp_path: Path, history: Callable[[], Awaitable[None]], way: str, which: int
) -> None:
    await history()
    bad = job.new_packs(2)[which]
    await spoil(job, bad, way)
    await job.restore(tmp_path / "b")
    assert set(tree_of(tmp_path / "b")) == {"both", "old"}
    assert (tmp_path / "b/old").read_bytes() == noise("old", 3 * CHUNK)
    (told,) = job.told("generation_damaged")
    assert told["generation"] == 2
    assert bad in str(told["error"])


@ways
async def test_after_damage_the_numbers_go_on_and_nothing_refers_to_what_is_damaged(
    job: Job, tmp_path: Path, history: Callable[[], Awaitable[None]], way: str
) -> None:
    await history()
    bad = job.new_packs(2)
    for key in bad:
        await spoil(job, key, way)
    contents = {f"new-{number}": noise(number, 3 * CHUNK) for number in range(3)}

    def again() -> None:
        for name, data in contents.items():
            write(tmp_path / "b" / name, data)

    await job.run(tmp_path / "b", again)
    assert [kept.generation for kept in job.head().kept] == [1, 3], "the damaged one is not kept"
    assert not {f"p/.heeler/packs/{pack}" for pack in job.manifest(3).packs} & set(bad)
    await job.restore(tmp_path / "c")
    assert tree_of(tmp_path / "c") == tree_of(tmp_path / "b")
    assert {name: (tmp_path / "c" / name).read_bytes() for name in contents} == contents


async def test_one_file_that_came_whole_before_the_damage_was_found_is_in_nobodys_way(job: Job, tmp_path: Path) -> None:
    """Many small files share a pack: the first of them are in place before a later chunk turns out to be damaged."""
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/old", b"old"))

    def many() -> None:
        for number in range(6):
            write(tmp_path / f"a/{number}", noise(number, 40))

    await job.run(tmp_path / "a", many)
    await job.hurt(job.new_packs(2)[0], -1)
    await job.restore(tmp_path / "b")
    assert set(tree_of(tmp_path / "b")) == {"old"}


async def test_all_generations_damaged_is_an_error_and_never_a_start_from_zero(
    job: Job, tmp_path: Path, history: Callable[[], Awaitable[None]]
) -> None:
    await history()
    for key in job.keys("packs/"):
        await job.hurt(key)
    write(tmp_path / "b/mine", b"m")
    with pytest.raises(NoGenerationError, match="damaged"):
        await job.restore(tmp_path / "b")
    assert [kept.generation for kept in job.head().kept] == [1, 2], "a repair may still find them"
    with pytest.raises(NoGenerationError):
        await job.run(tmp_path / "b", lambda: write(tmp_path / "b/new"))


@pytest.mark.parametrize("way", ["gone", "hurt", "empty", "of another generation"])
async def test_a_manifest_that_is_not_the_one_listed_means_the_generation_before(
    job: Job, tmp_path: Path, history: Callable[[], Awaitable[None]], way: str
) -> None:
    await history()
    (first,), (second,) = job.keys("manifests/1."), job.keys("manifests/2.")
    if way.startswith("of"):
        await job.store.inner.put(second, job.store.objects()[first])
    else:
        await spoil(job, second, way)
    await job.run(tmp_path / "b", lambda: write(tmp_path / "b/next"))
    assert set(tree_of(tmp_path / "b")) == {"both", "old", "next"}
    assert second in str(job.told("generation_damaged")[0]["error"])
    assert [kept.generation for kept in job.head().kept] == [1, 3]
    await job.remove(first, *job.keys("manifests/3."))
    with pytest.raises(NoGenerationError):
        await job.restore(tmp_path / "c")


async def test_damage_on_the_way_is_read_again_and_nothing_is_passed_over(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"))
    read, flips = job.store.inner.read, [1, 2, 5]

    async def hurt(key: str, *, offset: int, length: int) -> bytes:
        data = bytearray(await read(key, offset=offset, length=length))
        flips[:] = [left - 1 for left in flips]
        data[-1] ^= 1 if 0 in flips else 0
        return bytes(data)

    job.store.inner.read = hurt  # type: ignore[method-assign]
    await job.restore(tmp_path / "b")
    assert tree_of(tmp_path / "b") == tree_of(tmp_path / "a")
    assert job.told("generation_damaged") == []


# Several folders, and what stays on disk.


async def test_discarding_removes_only_what_a_generation_holds_unchanged(job: Job, tmp_path: Path) -> None:
    session = await job.run(tmp_path / "a", lambda: some_tree(tmp_path / "a"))
    write(tmp_path / "a/sizes/1", b"changed since")
    write(tmp_path / "a/late", b"never committed")
    await session.discard()
    left = {path for path, entry in tree_of(tmp_path / "a").items() if entry[0] == "file"}
    assert left == {"sizes/1", "late"}
    await job.restore(tmp_path / "b")
    assert "deep/er/text" in tree_of(tmp_path / "b"), "nothing was deleted in storage"


async def test_what_was_restored_and_left_alone_is_discarded_too(job: Job, tmp_path: Path) -> None:
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/d/f"))
    session = await job.run(tmp_path / "b")
    assert (tmp_path / "b/d/f").exists()
    await session.discard()
    assert not (tmp_path / "b/d").exists()


async def test_two_folders_have_generations_of_their_own(job: Job, tmp_path: Path) -> None:
    one, two = job.folder(tmp_path / "one", "p/"), job.folder(tmp_path / "two", "q/")
    for root in ("first", "second"):
        one, two = job.folder(tmp_path / root / "one", "p/"), job.folder(tmp_path / root / "two", "q/")
        session = job.session(Plan(before=(one, two), during=(one, two)))
        await session.restore()
        if root == "second":
            assert (set(tree_of(one.path)), set(tree_of(two.path))) == ({"a"}, {"b"})
        async with session.watching():
            write(one.path / "a")
            write(two.path / "b")
            await session.flush(Capture(whole=True))
        session.close()


async def test_a_folder_below_another_is_restored_by_its_own_prefix_alone(job: Job, tmp_path: Path) -> None:
    """Committed by both, at different times: the outer one's older copy must not come back over the inner one's."""
    root = tmp_path / "a"

    async def attempt(base: Path, program: Callable[[Path], object]) -> None:
        outer, inner = job.folder(base, "p/"), job.folder(base / "inner", "q/")
        session = job.session(Plan(before=(inner, outer), during=(outer, inner)))
        await session.restore()
        async with session.watching():
            program(base)
            await session.flush(Capture(whole=True))
        session.close()

    def first(base: Path) -> None:
        write(base / "o")
        write(base / "inner/step", b"1")

    await attempt(root, first)
    layer = job.folder(root / "inner", "q/")
    session = job.session(Plan(before=(layer,), during=(layer,)))
    await session.restore()
    async with session.watching():
        write(root / "inner/step", b"22")
        write(root / "inner/new", b"n")
        await session.flush(Capture(whole=True))
    session.close()
    seen: list[object] = []
    await attempt(tmp_path / "b", lambda base: seen.append(tree_of(base / "inner")))
    (found,) = seen
    assert isinstance(found, dict)
    assert {path: entry[3] for path, entry in found.items()} == {"step": b"22", "new": b"n"}


async def test_folders_that_share_a_spool_on_a_slow_uplink_do_not_lose_each_others_packs(
    job: Job, tmp_path: Path
) -> None:
    """One spool for all folders of all jobs of a worker."""
    one, two = job.folder(tmp_path / "one", "p/"), job.folder(tmp_path / "two", "q/")
    session = job.session(Plan(during=(one, two)), spool=tmp_path / "spool")
    await session.restore()
    put = job.store.inner.put

    async def slow(key: str, data: bytes, **options: object) -> str:
        await anyio.sleep(30.0 if key.startswith("p/.heeler/packs") else 5.0)
        return await put(key, data, **options)  # type: ignore[arg-type]

    job.store.inner.put = slow  # type: ignore[method-assign]
    async with session.watching():
        write(one.path / "big", noise("big", 40 * PACK))
        write(two.path / "small", noise("small", PACK))
        await session.flush(Capture(whole=True))
    session.close()
    await job.restore(tmp_path / "other")
    assert (tmp_path / "other/big").read_bytes() == noise("big", 40 * PACK)


async def test_a_reader_that_was_overtaken_by_new_generations_restores_the_newest(job: Job, tmp_path: Path) -> None:
    """An input is read while its owner goes on committing, and collects what is old."""
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", noise(0, 3 * CHUNK)))
    owner = job.attempt

    async def go_on() -> None:
        job.store.scripts.clear()
        for number in range(1, 4):
            await job.run(tmp_path / "a", partial(write, tmp_path / "a/f", noise(number, 3 * CHUNK)))

    job.store.scripts["read"] = [go_on]
    folder = job.folder(tmp_path / "b")
    session = job.session(Plan(before=(folder,)), claim=Claim("reader", "", 1))
    await session.restore()
    session.close()
    assert (tmp_path / "b/f").read_bytes() == noise(3, 3 * CHUNK)
    assert job.head().attempt > owner
    assert job.head().job_id == "job", "a reader acquires nothing"


async def test_a_prefix_with_chunks_of_another_size_is_restored_and_committed_to(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size stands in each manifest, so that a later version may choose another."""
    await job.run(tmp_path / "a", lambda: write(tmp_path / "a/f", noise("f", 10 * CHUNK)))
    other = 2 * CHUNK
    for module in (capture, restore, snapshot_session):
        monkeypatch.setattr(module, "CHUNK_BYTES", other)
    monkeypatch.setattr(holder, "Manifest", partial(Manifest, chunk_bytes=other))
    await job.run(tmp_path / "b", lambda: write(tmp_path / "b/g", noise("g", 10 * CHUNK)))
    await job.restore(tmp_path / "c")
    assert tree_of(tmp_path / "c") == tree_of(tmp_path / "b")
    assert (tmp_path / "c/f").read_bytes() == noise("f", 10 * CHUNK)
