"""How the S3 store takes refusals, cuts and cancellations: on our strict server, which does them on command."""

from __future__ import annotations

import io
import itertools
import threading
from collections.abc import AsyncIterator, Awaitable

import anyio
import anyio.to_thread
import pytest

from heeler_sync.errors import (
    AccessDeniedError,
    ObjectNotFoundError,
    PermanentStoreError,
    ShortAnswerError,
    TransientStoreError,
    UnsafeKeyError,
)
from heeler_sync.store.base import Condition, ObjectInfo
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.retry import Backoff, RetryingStore, RetryPolicy
from heeler_sync.store.s3 import S3ObjectStore
from tests.support.backends import PART, Server
from tests.support.s3 import Answer, Cut, S3Server, Stall, Truncate
from tests.support.stores import ScriptedStore, transient, until

pytestmark = pytest.mark.anyio

_numbers = itertools.count(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def bucket(server: S3Server) -> str:
    name = f"faults-{next(_numbers)}"
    server.create_bucket(name)
    return name


@pytest.fixture
def store(server: S3Server, bucket: str) -> S3ObjectStore:
    return Server(server.url, server.access_key, server.secret_key).store(bucket)


async def keys(store: S3ObjectStore) -> list[str]:
    return [info.key async for page in store.list("") for info in page]


@pytest.mark.parametrize("wrong", ["access_key_id", "secret_access_key"])
async def test_wrong_keys_are_refused_and_never_shown(server: S3Server, bucket: str, wrong: str) -> None:
    good = Server(server.url, server.access_key, server.secret_key)
    store = good.store(bucket, **{wrong: "a-wrong-credential"})
    for call in (
        store.head("k"),
        keys(store),
        store.put("k", b"x"),
        store.upload("k", io.BytesIO(b"x")),
        store.delete("k"),
    ):
        with pytest.raises(AccessDeniedError) as caught:
            await call
        assert "a-wrong-credential" not in str(caught.value)
    assert server.objects(bucket) == {}
    assert "secret" not in repr(store)


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_busy_store_is_a_transient_fault_and_asked_once_only(
    server: S3Server, store: S3ObjectStore, bucket: str, status: int
) -> None:
    rule = server.faults.add(Answer(status, "SlowDown"), bucket=bucket)
    calls = (store.head("k"), keys(store), store.put("k", b"x"), store.download("k", lambda _: None), store.delete("k"))
    for count, call in enumerate(calls, 1):
        with pytest.raises(TransientStoreError, match=str(status)):
            await call
        assert rule.hits == count, "a hidden retry could hide an answer"


async def test_a_lost_answer_to_a_conditional_write_is_not_repeated(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    rule = server.faults.add(Cut(at="after"), bucket=bucket, operation="PutObject", count=1)
    with pytest.raises(TransientStoreError):
        await store.put("k", b"x", condition=Condition(if_absent=True))
    assert server.objects(bucket) == {"k": b"x"}
    assert rule.hits == 1


@pytest.mark.parametrize("cut", [Cut(at="response_body", after_bytes=700_000), Truncate(after_bytes=700_000)], ids=repr)
async def test_a_body_that_ends_early_is_a_transient_fault_and_what_came_stays(
    server: S3Server, store: S3ObjectStore, bucket: str, cut: Cut | Truncate
) -> None:
    data = bytes(range(256)) * 8192
    server.put(bucket, "k", data)
    server.faults.add(cut, bucket=bucket, operation="GetObject", count=1)
    got = bytearray()
    with pytest.raises(TransientStoreError):
        await store.download("k", got.extend)
    assert len(got) <= 700_000
    await store.download("k", got.extend, offset=len(got))
    assert bytes(got) == data


async def test_an_answer_shorter_than_the_object_is_told_by_its_size(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    server.put(bucket, "k", b"x" * 1000)
    server.faults.add(Truncate(after_bytes=400, hidden=True), bucket=bucket, operation="GetObject", count=1)
    got = bytearray()
    try:
        info = await store.download("k", got.extend)
    except TransientStoreError:
        return
    assert info.size == len(got) == 400, "HTTP hides it; the digest is what finds it"


async def test_a_store_that_goes_silent_is_given_up_after_the_time_without_progress(
    server: S3Server, bucket: str
) -> None:
    store = Server(server.url, server.access_key, server.secret_key).store(bucket, no_progress=0.5)
    server.put(bucket, "k", b"x" * 2_000_000)
    for stall in (Stall(), Stall(at="response_body", after_bytes=300_000)):
        rule = server.faults.add(stall, bucket=bucket)
        with anyio.fail_after(5), pytest.raises(TransientStoreError):
            await store.download("k", lambda _: None)
        server.faults.remove(rule)


async def test_a_failed_part_is_sent_again_and_the_object_is_whole(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    rule = server.faults.add(Answer(500), bucket=bucket, operation="UploadPart", part_number=2, count=1)
    data = b"".join(bytes([number]) * PART for number in range(3))
    await store.upload("k", io.BytesIO(data))
    assert rule.hits == 1
    assert server.objects(bucket) == {"k": data}


async def test_a_refused_part_ends_the_upload_and_leaves_nothing_behind(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    server.faults.add(Answer(403, "AccessDenied"), bucket=bucket, operation="UploadPart", part_number=2)
    with pytest.raises(AccessDeniedError):
        await store.upload("k", io.BytesIO(b"x" * 3 * PART))
    assert server.objects(bucket) == {}
    assert server.uploads(bucket) == [], "the multipart upload is aborted: it would be billed for ever"


async def test_a_reader_that_raises_leaves_no_multipart_upload_behind(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    class Reader:
        parts = 0

        def read(self, size: int = -1, /) -> bytes:
            self.parts += 1
            if self.parts == 3:
                raise RuntimeError("the file changed")
            return b"x" * size

    with pytest.raises(RuntimeError, match="the file changed"):
        await store.upload("k", Reader())
    assert server.objects(bucket) == {}
    assert server.uploads(bucket) == []


@pytest.mark.parametrize("parts", [1, 5])
async def test_a_cancelled_upload_is_waited_for_and_leaves_nothing_visible(
    server: S3Server, store: S3ObjectStore, bucket: str, parts: int
) -> None:
    entered = threading.Event()
    going = threading.Event()
    ended = threading.Event()

    class Reader:
        left = parts

        def read(self, size: int = -1, /) -> bytes:
            if not self.left:
                entered.set()  # the last call: what it returns decides whether the upload is whole
                going.wait(10)
                ended.set()
                return b""
            self.left -= 1
            return b"x" * size

    async with anyio.create_task_group() as group:
        group.start_soon(store.upload, "k", Reader())
        # Stopped before that, it is not asked for its last part at all.
        await until(entered.is_set)
        group.cancel_scope.cancel()
        threading.Timer(0.2, going.set).start()
    assert ended.is_set(), "it came back before its thread had ended"
    assert server.objects(bucket) == {}
    await anyio.sleep(0.2)
    assert server.objects(bucket) == {}, "nothing is written after the cancellation came back"
    assert server.uploads(bucket) == []


async def test_an_upload_cancelled_between_two_parts_is_aborted(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    class Endless:
        reads = 0

        def read(self, size: int = -1, /) -> bytes:
            self.reads += 1
            return b"x" * size

    reader = Endless()
    async with anyio.create_task_group() as group:
        group.start_soon(store.upload, "k", reader)
        await until(lambda: reader.reads >= 3)
        group.cancel_scope.cancel()
    reads = reader.reads
    assert server.objects(bucket) == {}
    assert server.uploads(bucket) == []
    await anyio.sleep(0.1)
    assert reader.reads == reads


async def test_an_upload_that_can_not_become_visible_any_more_is_not_waited_for_while_the_store_hangs(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    """Its reader has not come to its end and is stopped: nothing that is still on its way can complete it."""

    class Endless:
        def read(self, size: int = -1, /) -> bytes:
            return b"x" * size

    rule = server.faults.add(Stall(), bucket=bucket, operation="UploadPart")
    async with anyio.create_task_group() as group:
        group.start_soon(store.upload, "k", Endless())
        await anyio.to_thread.run_sync(rule.wait_held)
        cancelled = anyio.current_time()
        group.cancel_scope.cancel()
        threading.Timer(3.0, rule.release).start()
    assert anyio.current_time() - cancelled < 2


async def test_a_cancelled_put_is_waited_for(server: S3Server, store: S3ObjectStore, bucket: str) -> None:
    rule = server.faults.add(Stall(), bucket=bucket, operation="PutObject")
    async with anyio.create_task_group() as group:
        group.start_soon(store.put, "k", b"x")
        await anyio.to_thread.run_sync(rule.wait_held)
        group.cancel_scope.cancel()
        threading.Timer(0.2, rule.release).start()
    assert server.objects(bucket) == {"k": b"x"}, "a request that is out can't be recalled, so its end is awaited"


async def test_a_cancelled_download_gives_its_sink_nothing_more(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    server.put(bucket, "k", b"x" * 3_000_000)
    rule = server.faults.add(Stall(at="response_body", after_bytes=1_000_000), bucket=bucket)
    got = bytearray()
    async with anyio.create_task_group() as group:
        group.start_soon(store.download, "k", got.extend)
        await anyio.to_thread.run_sync(rule.wait_held)
        group.cancel_scope.cancel()
        threading.Timer(0.1, rule.release).start()
    taken = len(got)
    await anyio.sleep(0.1)
    assert len(got) == taken < 3_000_000


@pytest.mark.parametrize("key", ["p/../evil", "p//x", "p/./x", "p/.."])
async def test_a_key_that_can_not_be_a_path_makes_the_listing_fail_by_name(
    server: S3Server, store: S3ObjectStore, bucket: str, key: str
) -> None:
    server.put(bucket, "p/good", b"x")
    server.put(bucket, key, b"x")
    with pytest.raises(UnsafeKeyError) as caught:
        [page async for page in store.list("p/")]
    assert caught.value.key == key


async def test_a_key_with_a_leading_slash_is_never_taken_for_the_one_without(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    """obstore lists "/x" as "x": the restore then ends with an error, not with wrong bytes."""
    server.put(bucket, "/x", b"evil")
    assert await keys(store) == ["x"]
    with pytest.raises(ObjectNotFoundError):
        await store.download("x", lambda _: None)


async def test_folder_markers_are_listed_as_empty_names_and_the_prefixs_own_is_not(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    for key in ("p/", "p/sub/", "p/sub/a"):
        server.put(bucket, key, b"" if key.endswith("/") else b"x")
    found = [(info.key, info.size) async for page in store.list("p/") for info in page]
    assert found == [("p/sub", 0), ("p/sub/a", 1)]
    with pytest.raises(ObjectNotFoundError):
        await store.head("p/sub")


# Retry, as a wrapper round any store.


def retrying(inner: ScriptedStore, patience: float | None = 5.0) -> tuple[RetryingStore, list[float]]:
    delays: list[float] = []
    policy = RetryPolicy(patience, lambda: Backoff(0.001, 0.004), lambda _error, delay: delays.append(delay))
    return RetryingStore(inner, policy), delays


async def test_transient_failures_are_tried_again_and_each_is_told() -> None:
    fails = [transient()] * 4
    inner = ScriptedStore(MemoryStore(), head=list(fails), put=list(fails), delete=list(fails), list=list(fails))
    store, delays = retrying(inner)
    await store.put("p/k", b"x")
    assert (await store.head("p/k")).size == 1
    assert [info.key async for page in store.list("p/") for info in page] == ["p/k"]
    await store.delete("p/k")
    assert inner.objects() == {}
    assert len(delays) == 16
    assert max(delays) <= 0.004


async def test_a_listing_that_broke_in_the_middle_is_had_whole_or_not_at_all() -> None:
    class Breaking(ScriptedStore):
        breaks = 2

        async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
            pages = [page async for page in self.inner.list(prefix)]
            yield pages[0]
            self.breaks -= 1
            if self.breaks >= 0:
                raise transient("ListObjectsV2")
            yield pages[1]

    inner = Breaking(MemoryStore())
    for number in range(1500):
        await inner.inner.put(f"p/{number:04}", b"")
    store, _ = retrying(inner)
    found = [info.key async for page in store.list("p/") for info in page]
    assert found == [f"p/{number:04}" for number in range(1500)]


async def test_what_is_permanent_is_not_tried_again() -> None:
    inner = ScriptedStore(MemoryStore(), put=[PermanentStoreError("PutObject", "b", "k", "400")])
    store, delays = retrying(inner)
    with pytest.raises(PermanentStoreError):
        await store.put("k", b"x")
    assert delays == []


async def test_patience_ends_with_the_last_error() -> None:
    inner = ScriptedStore(MemoryStore(), head=[transient("HeadObject")] * 9999)
    store, delays = retrying(inner, patience=0.05)
    with anyio.fail_after(5), pytest.raises(TransientStoreError):
        await store.head("k")
    assert len(delays) > 3


async def test_conditional_writes_uploads_and_downloads_are_passed_on_once() -> None:
    for method in ("put", "upload", "download"):
        inner = ScriptedStore(MemoryStore(), **{method: [transient()]})
        store, delays = retrying(inner)
        calls: dict[str, Awaitable[object]] = {
            "put": store.put("k", b"x", condition=Condition(if_absent=True)),
            "upload": store.upload("k", io.BytesIO(b"x")),
            "download": store.download("k", lambda _: None),
        }
        call = calls.pop(method)
        for other in calls.values():
            other.close()  # type: ignore[attr-defined]
        with pytest.raises(TransientStoreError):
            await call
        assert delays == []
        assert inner.count(method) == 1


# Ranges.


@pytest.mark.parametrize("cut", [Cut(at="response_body", after_bytes=300_000), Truncate(after_bytes=300_000)], ids=repr)
async def test_a_range_that_is_cut_in_the_middle_is_a_transient_fault_and_never_short_bytes(
    server: S3Server, store: S3ObjectStore, bucket: str, cut: Cut | Truncate
) -> None:
    data = bytes(range(256)) * 8192
    server.put(bucket, "k", data)
    server.faults.add(cut, bucket=bucket, operation="GetObject", count=1)
    with pytest.raises(TransientStoreError):
        await store.read("k", offset=1000, length=1_000_000)
    assert await store.read("k", offset=1000, length=1_000_000) == data[1000:1_001_000]


async def test_a_range_that_is_shorter_than_asked_for_without_a_word_is_a_short_answer(
    server: S3Server, store: S3ObjectStore, bucket: str
) -> None:
    server.put(bucket, "k", b"x" * 1000)
    server.faults.add(Truncate(after_bytes=400, hidden=True), bucket=bucket, operation="GetObject", count=1)
    with pytest.raises(TransientStoreError):
        await store.read("k", offset=0, length=1000)
    assert len(await store.read("k", offset=0, length=1000)) == 1000


@pytest.mark.parametrize("status", [429, 500, 503])
async def test_a_range_from_a_busy_store_is_a_transient_fault_and_asked_for_once_only(
    server: S3Server, store: S3ObjectStore, bucket: str, status: int
) -> None:
    server.put(bucket, "k", b"x" * 1000)
    rule = server.faults.add(Answer(status, "SlowDown"), bucket=bucket)
    with pytest.raises(TransientStoreError, match=str(status)):
        await store.read("k", offset=1, length=9)
    assert rule.hits == 1


async def test_a_range_that_is_refused_is_refused_by_name(server: S3Server, store: S3ObjectStore, bucket: str) -> None:
    server.put(bucket, "k", b"x" * 1000)
    server.faults.add(Answer(403, "AccessDenied"), bucket=bucket)
    with pytest.raises(AccessDeniedError, match="k"):
        await store.read("k", offset=1, length=9)


async def test_a_range_that_stalls_is_given_up_after_the_time_without_progress(server: S3Server, bucket: str) -> None:
    store = Server(server.url, server.access_key, server.secret_key).store(bucket, no_progress=0.5)
    server.put(bucket, "k", b"x" * 2_000_000)
    server.faults.add(Stall(at="response_body", after_bytes=300_000), bucket=bucket)
    with anyio.fail_after(5), pytest.raises(TransientStoreError):
        await store.read("k", offset=0, length=1_500_000)


async def test_a_cancelled_range_comes_back_at_once(server: S3Server, store: S3ObjectStore, bucket: str) -> None:
    server.put(bucket, "k", b"x" * 2_000_000)
    rule = server.faults.add(Stall(), bucket=bucket)
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: store.read("k", offset=0, length=1_500_000))
        await anyio.to_thread.run_sync(rule.wait_held)
        cancelled = anyio.current_time()
        group.cancel_scope.cancel()
    assert anyio.current_time() - cancelled < 1
    rule.release()


async def test_ranges_are_retried_by_the_policy_and_refusals_are_not() -> None:
    short = ShortAnswerError("GetObject", "memory", "k", "1 of 2 bytes came")
    inner = ScriptedStore(MemoryStore(), read=[transient(), short, PermanentStoreError("GetObject", "b", "k", "400")])
    store, delays = retrying(inner)
    await store.put("k", b"xyz")
    with pytest.raises(PermanentStoreError):
        await store.read("k", offset=1, length=2)
    assert len(delays) == 2
    assert await store.read("k", offset=1, length=2) == b"yz"
