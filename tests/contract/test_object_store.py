"""What every object store promises (`heeler_sync.store.base`): one suite, run against each.

What a provider lacks stands in the provider table, and the test then asserts that the lack is told as documented.
"""

from __future__ import annotations

import io
import os

import pytest

from heeler_sync.errors import (
    NoSuchBucketError,
    ObjectNotFoundError,
    PermanentStoreError,
    PreconditionFailedError,
    RangeNotSupportedError,
    ShortAnswerError,
    StoreError,
    TransientStoreError,
)
from heeler_sync.groups import for_each
from heeler_sync.store.base import DIGEST_KEY, Condition, ObjectStore
from tests.support.backends import PART, Backend, Server, free_port

pytestmark = pytest.mark.anyio

ODD_KEYS = [
    "a b",
    "a%20b",
    "a#b",
    "a?b",
    "a+b",
    "a&b",
    "ü/ö",
    "日本/語",
    "a*b",
    "a~b",
    'a"b',
    "a=b",
    "x/.hidden",
    "a:b",
    "a,b;c",
]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [info.key async for page in store.list(prefix) for info in page]


async def read(store: ObjectStore, key: str, *, offset: int = 0, if_match: str | None = None) -> bytes:
    got = bytearray()
    await store.download(key, got.extend, offset=offset, if_match=if_match)
    return bytes(got)


class FailingReader:
    """Gives some bytes, then raises."""

    def __init__(self, size: int, error: Exception) -> None:
        self._left, self._error = size, error

    def read(self, size: int = -1, /) -> bytes:
        if not self._left:
            raise self._error
        count = min(size if size >= 0 else self._left, self._left)
        self._left -= count
        return b"x" * count


class BoomError(Exception):
    """Of no kind that a store knows."""


# Small objects.


@pytest.mark.parametrize("size", [0, 1, 100_000])
async def test_what_was_put_is_there_with_size_etag_and_metadata(store: ObjectStore, size: int) -> None:
    data = os.urandom(size)
    etag = await store.put("p/k", data, metadata={DIGEST_KEY: "ab" * 32})
    info = await store.head("p/k")
    assert (info.key, info.size, info.etag) == ("p/k", size, etag)
    assert info.metadata[DIGEST_KEY] == "ab" * 32
    assert etag.startswith('"')
    assert etag.endswith('"')
    assert await read(store, "p/k") == data


async def test_an_object_without_metadata_has_no_digest(store: ObjectStore) -> None:
    await store.put("k", b"x")
    assert DIGEST_KEY not in (await store.head("k")).metadata


async def test_a_second_put_replaces_the_first_and_its_metadata(store: ObjectStore) -> None:
    first = await store.put("k", b"one", metadata={DIGEST_KEY: "1"})
    second = await store.put("k", b"twenty", metadata={})
    info = await store.head("k")
    assert first != second
    assert (info.size, info.etag, DIGEST_KEY in info.metadata) == (6, second, False)


@pytest.mark.parametrize("key", ODD_KEYS)
async def test_any_key_that_can_be_a_path_makes_the_round_trip(store: ObjectStore, key: str) -> None:
    await store.put(f"p/{key}", b"x")
    assert (await store.head(f"p/{key}")).key == f"p/{key}"
    assert await keys(store, "p/") == [f"p/{key}"]
    assert await read(store, f"p/{key}") == b"x"
    await store.delete(f"p/{key}")
    assert await keys(store, "p/") == []


async def test_what_is_not_there_is_said_to_be_not_there(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFoundError) as caught:
        await store.head("p/none")
    assert (caught.value.bucket, caught.value.key) == (store.bucket, "p/none")
    with pytest.raises(ObjectNotFoundError):
        await read(store, "p/none")


async def test_deleting_is_done_once_and_again_without_complaint(store: ObjectStore) -> None:
    await store.put("k", b"x")
    await store.delete("k")
    await store.delete("k")
    await store.delete("never was")
    assert await keys(store) == []


# Listings.


async def test_a_listing_holds_all_keys_below_the_prefix_and_no_others(store: ObjectStore) -> None:
    for key in ("a/1", "a/b/2", "ab/3", "a.4", "b", "A/5"):
        await store.put(key, b"xx")
    assert sorted(await keys(store, "a/")) == ["a/1", "a/b/2"]
    assert sorted(await keys(store, "a/b/")) == ["a/b/2"]
    assert sorted(await keys(store)) == ["A/5", "a.4", "a/1", "a/b/2", "ab/3", "b"]
    assert await keys(store, "none/") == []


async def test_a_listing_tells_size_and_etag(store: ObjectStore) -> None:
    etag = await store.put("p/k", b"12345")
    (info,) = [info async for page in store.list("p/") for info in page]
    assert info.size == 5
    if store.provider.etag_is_md5:
        assert info.etag == etag
    assert info.metadata == {}


async def test_a_listing_of_more_than_one_page_is_whole(store: ObjectStore) -> None:
    wanted = [f"p/{number:04}" for number in range(1003)]
    # The first makes the folder: of several that want to make it at once, rclone (1.75) answers some with 500, since
    # it looks whether the folder is there, makes it, and loses sight of what the other request has put into its own.
    await store.put(wanted[0], b"")
    await for_each(wanted[1:], lambda key: store.put(key, b""), 16)
    pages = [page async for page in store.list("p/")]
    found = [info.key for page in pages for info in page]
    assert len(found) == len(set(found))
    assert sorted(found) == wanted
    assert found == wanted, "in the order of keys"
    assert max(len(page) for page in pages) <= 1000


# Downloads.


@pytest.mark.parametrize("size", [1, 300_000, PART + 1])
async def test_a_download_brings_all_bytes_in_order_and_what_is_known(store: ObjectStore, size: int) -> None:
    data = os.urandom(size)
    await store.put("k", data, metadata={DIGEST_KEY: "d"})
    got: list[bytes] = []
    info = await store.download("k", lambda chunk: got.append(bytes(chunk)))
    assert b"".join(got) == data
    assert (info.key, info.size, info.metadata[DIGEST_KEY]) == ("k", size, "d")


@pytest.mark.parametrize("offset", [1, 150_000, 299_999])
async def test_a_download_from_an_offset_brings_the_rest_or_says_that_it_can_not(
    store: ObjectStore, offset: int
) -> None:
    data = os.urandom(300_000)
    etag = await store.put("k", data, metadata={DIGEST_KEY: "d"})
    if not store.provider.ranges:
        with pytest.raises(RangeNotSupportedError):
            await read(store, "k", offset=offset)
        return
    got = bytearray()
    info = await store.download("k", got.extend, offset=offset, if_match=etag)
    assert bytes(got) == data[offset:]
    assert (info.size, info.etag, info.metadata[DIGEST_KEY]) == (len(data), etag, "d"), "of the whole object"


async def test_a_download_of_another_version_is_refused(store: ObjectStore) -> None:
    old = await store.put("k", b"old")
    new = await store.put("k", b"newer")
    assert await read(store, "k", if_match=new) == b"newer"
    if store.provider.conditional_writes:
        with pytest.raises(PreconditionFailedError):
            await read(store, "k", if_match=old)
    else:
        # A store that keeps no conditions may ignore this one too; the digest then tells.
        try:
            assert await read(store, "k", if_match=old) == b"newer"
        except PreconditionFailedError:
            return


async def test_the_sinks_exception_ends_a_download_and_comes_out_as_it_is(store: ObjectStore) -> None:
    await store.put("k", b"x" * 3_000_000)
    taken = []

    def full(chunk: bytes) -> None:
        taken.append(len(chunk))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        await store.download("k", full)
    assert len(taken) == 1

    def boom(chunk: bytes) -> None:
        raise BoomError("sink")

    with pytest.raises(BoomError):
        await store.download("k", boom)


# Uploads.


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART, 2 * PART + 12345])
async def test_an_upload_of_any_size_is_whole(store: ObjectStore, size: int) -> None:
    data = os.urandom(size)
    etag = await store.upload("p/big", io.BytesIO(data), metadata={DIGEST_KEY: "d"})
    info = await store.head("p/big")
    assert (info.size, info.metadata[DIGEST_KEY]) == (size, "d")
    if store.provider.conditional_writes:
        assert info.etag == etag, "or a later write on condition of it would be refused"
    assert await read(store, "p/big") == data


@pytest.mark.parametrize("size", [0, 100, PART, PART + 1, 3 * PART])
@pytest.mark.parametrize("error", [BoomError("reader"), OSError(5, "Input/output error"), ValueError("bad")], ids=repr)
async def test_the_readers_exception_leaves_nothing_visible_and_comes_out_as_it_is(
    store: ObjectStore, size: int, error: Exception
) -> None:
    await store.put("p/before", b"kept")
    with pytest.raises(type(error)) as caught:
        await store.upload("p/k", FailingReader(size, error))
    assert caught.value is error
    with pytest.raises(type(error)):
        await store.upload("p/before", FailingReader(size, error))
    assert await keys(store, "p/") == ["p/before"]
    assert await read(store, "p/before") == b"kept"


# Conditions.


async def test_a_write_on_condition_happens_only_if_it_holds(store: ObjectStore) -> None:
    if not store.provider.conditional_writes:
        await store.put("k", b"one")
        await store.put("k", b"two", condition=Condition(if_match='"other"'))
        assert await read(store, "k") == b"two", "the table says that conditions are ignored: it can be mended"
        return
    etag = await store.put("k", b"one", condition=Condition(if_absent=True))
    with pytest.raises(PreconditionFailedError):
        await store.put("k", b"two", condition=Condition(if_absent=True))
    with pytest.raises(PreconditionFailedError):
        await store.put("k", b"two", condition=Condition(if_match='"00000000000000000000000000000000"'))
    assert await read(store, "k") == b"one"
    newer = await store.put("k", b"three", condition=Condition(if_match=etag))
    with pytest.raises(PreconditionFailedError):
        await store.put("k", b"four", condition=Condition(if_match=etag))
    assert await read(store, "k") == b"three"
    assert (await store.head("k")).etag == newer


async def test_replacing_what_is_gone_is_refused(store: ObjectStore) -> None:
    if store.provider.conditional_writes:
        with pytest.raises((PreconditionFailedError, ObjectNotFoundError)):
            await store.put("gone", b"x", condition=Condition(if_match='"00000000000000000000000000000000"'))
        assert await keys(store) == []


# What is wrong with the whole store.


async def test_a_bucket_that_does_not_exist_is_named(backend: Backend) -> None:
    if backend.name == "memory":
        assert await keys(backend.open("any-bucket")) == []  # a dictionary has no bucket to miss
        return
    store = backend.open("no-such-bucket-here")
    with pytest.raises(NoSuchBucketError, match="no-such-bucket-here"):
        await keys(store, "p/")
    with pytest.raises(NoSuchBucketError):
        await store.put("k", b"x")
    for call in (store.upload("k", io.BytesIO(b"x" * 10)), store.head("k"), read(store, "k")):
        with pytest.raises(PermanentStoreError):  # a HEAD has no body to say which of both is missing
            await call


async def test_a_server_that_is_not_there_is_a_transient_fault_without_secrets() -> None:
    store = Server(f"http://127.0.0.1:{free_port()}", "the-access-key", "the-secret-key").store("bucket")
    for call in (
        store.head("k"),
        keys(store),
        store.put("k", b"x"),
        read(store, "k"),
        store.delete("k"),
    ):
        with pytest.raises(TransientStoreError) as caught:
            await call
        assert "connection refused" in str(caught.value)
        assert "s3://bucket/" in str(caught.value)
        assert "the-secret-key" not in str(caught.value)
        assert "the-access-key" not in str(caught.value)
        assert isinstance(caught.value, StoreError)


# Ranges.


@pytest.mark.parametrize(("offset", "length"), [(0, 1), (0, 300_000), (1, 299_999), (150_000, 7), (299_999, 1)])
async def test_a_range_brings_just_its_bytes(store: ObjectStore, offset: int, length: int) -> None:
    data = os.urandom(300_000)
    await store.put("p/k", data)
    assert await store.read("p/k", offset=offset, length=length) == data[offset : offset + length]


@pytest.mark.parametrize(("offset", "length"), [(0, 1001), (999, 2), (1000, 1), (1001, 1), (10**9, 1)])
async def test_a_range_beyond_the_objects_end_is_a_short_answer(store: ObjectStore, offset: int, length: int) -> None:
    """A pack that was cut short must be told from a store that refuses: it means damage, and an older generation."""
    await store.put("p/k", b"x" * 1000)
    with pytest.raises(ShortAnswerError) as caught:
        await store.read("p/k", offset=offset, length=length)
    assert caught.value.key == "p/k"


async def test_a_range_of_an_empty_object_is_a_short_answer(store: ObjectStore) -> None:
    await store.put("p/k", b"")
    with pytest.raises(ShortAnswerError):
        await store.read("p/k", offset=0, length=1)


async def test_a_range_of_what_is_not_there_is_said_to_be_not_there(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFoundError) as caught:
        await store.read("p/none", offset=5, length=1)
    assert (caught.value.bucket, caught.value.key) == (store.bucket, "p/none")


async def test_a_range_of_a_large_object_that_came_in_parts_is_whole(store: ObjectStore) -> None:
    data = os.urandom(2 * PART + 5)
    await store.upload("p/big", io.BytesIO(data))
    assert await store.read("p/big", offset=PART - 10, length=20) == data[PART - 10 : PART + 10]
    assert await store.read("p/big", offset=1, length=2 * PART + 4) == data[1:]


async def test_many_ranges_at_once_do_not_mix(store: ObjectStore) -> None:
    data = os.urandom(64 * 1024)
    await store.put("p/k", data)
    offsets = list(range(0, len(data), 1024))
    found: dict[int, bytes] = {}

    async def one(offset: int) -> None:
        found[offset] = await store.read("p/k", offset=offset, length=1024)

    await for_each(offsets, one, 16)
    assert b"".join(found[offset] for offset in offsets) == data
