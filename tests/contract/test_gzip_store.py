"""What the compressing wrapper promises, on every store: Kelpie's keys, and the content's sizes and digests."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import zlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from heeler_sync.download import Wanted, fetch, in_place, list_wanted
from heeler_sync.errors import (
    DamagedObjectError,
    FileChangedError,
    ObjectNotFoundError,
    PreconditionFailedError,
    RangeNotSupportedError,
    ShortAnswerError,
    TransientStoreError,
)
from heeler_sync.paths import Location
from heeler_sync.store.base import DIGEST_KEY, Condition, ObjectInfo, ObjectStore
from heeler_sync.store.gzip import GzipStore
from heeler_sync.store.gzip_stream import Gunzip, GzipReader, gzipped
from heeler_sync.store.memory import MemoryStore
from heeler_sync.tree import Stamp
from heeler_sync.upload import upload_file
from tests.support.backends import PART, Server
from tests.support.s3 import Corrupt, Cut, S3Server, Truncate
from tests.support.s3_clients import boto3_client
from tests.support.stores import IMPATIENT, ScriptedStore, digest

pytestmark = pytest.mark.anyio

_numbers = itertools.count(1)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def packed(store: ObjectStore) -> GzipStore:
    return GzipStore(store)


@pytest.fixture
def bucket(server: S3Server) -> str:
    name = f"gzip-{next(_numbers)}"
    server.create_bucket(name)
    return name


@pytest.fixture
def faulty(server: S3Server, bucket: str) -> GzipStore:
    return GzipStore(Server(server.url, server.access_key, server.secret_key).store(bucket))


class Sized(io.BytesIO):
    """A reader that knows its size."""

    @property
    def size(self) -> int:
        return len(self.getvalue())


async def listed(store: ObjectStore, prefix: str = "") -> dict[str, ObjectInfo]:
    return {info.key: info async for page in store.list(prefix) for info in page}


async def read(store: ObjectStore, key: str) -> bytes:
    got = bytearray()
    info = await store.download(key, got.extend)
    assert info.size == len(got)
    assert info.exact
    return bytes(got)


async def item(store: ObjectStore, prefix: str = "p/") -> Wanted:
    (found,) = await list_wanted(store, Location(store.bucket, prefix), lambda _: True)
    return found


# Round trips.


@pytest.mark.parametrize("size", [0, 1, 100_000])
async def test_what_was_put_is_a_gzip_in_storage_and_itself_to_callers(
    store: ObjectStore, packed: GzipStore, size: int
) -> None:
    data = os.urandom(size // 2) + b"x" * (size - size // 2)
    etag = await packed.put("p/k", data, metadata=digest(data))
    assert list(await listed(store)) == ["p/k.gz"]
    assert gzip.decompress(await read(store, "p/k.gz")) == data
    assert etag == (await store.head("p/k.gz")).etag
    info = await packed.head("p/k")
    assert (info.key, info.size, info.etag, info.exact) == ("p/k", size, etag, True)
    assert info.metadata[DIGEST_KEY] == digest(data)[DIGEST_KEY]
    assert await read(packed, "p/k") == data


async def test_a_large_object_goes_in_equal_parts_and_comes_back(store: ObjectStore, packed: GzipStore) -> None:
    data = os.urandom(2 * PART) + b"y" * (3 * PART)
    await packed.upload("p/k", Sized(data), metadata=digest(data))
    info = await packed.head("p/k")
    assert (info.size, info.exact) == (len(data), True)
    assert info.metadata[DIGEST_KEY] == digest(data)[DIGEST_KEY]
    assert await read(packed, "p/k") == data
    assert gzip.decompress(await read(store, "p/k.gz")) == data


async def test_an_upload_of_unknown_size_tells_none_and_no_digest(packed: GzipStore) -> None:
    await packed.upload("k", io.BytesIO(b"abc"), metadata=digest(b"abc"))
    info = await packed.head("k")
    assert not info.exact
    assert DIGEST_KEY not in info.metadata
    assert await read(packed, "k") == b"abc"


async def test_what_a_kelpie_worker_wrote_is_read_and_believed_to_equal_nothing(
    store: ObjectStore, packed: GzipStore, tmp_path: Path
) -> None:
    data = b"step 7\n" * 1000
    await store.put("p/k.gz", gzip.compress(data))
    info = await packed.head("p/k")
    assert not info.exact
    assert DIGEST_KEY not in info.metadata
    assert await read(packed, "p/k") == data
    (tmp_path / "k").write_bytes(data)
    assert await in_place(await item(packed), tmp_path) is None
    assert await fetch(await item(packed), tmp_path, IMPATIENT) is not None
    assert (tmp_path / "k").read_bytes() == data


async def test_a_gzip_of_several_members_is_one_content(store: ObjectStore, packed: GzipStore) -> None:
    await store.put("k.gz", gzip.compress(b"one") + gzip.compress(b"") + gzip.compress(b"two") + b"\0" * 100)
    assert await read(packed, "k") == b"onetwo"


async def test_a_file_that_is_in_place_stays_although_a_listing_knows_no_size(
    packed: GzipStore, tmp_path: Path
) -> None:
    await packed.put("p/k", b"abc" * 100, metadata=digest(b"abc" * 100))
    wanted = await item(packed)
    assert not wanted.info.exact
    (tmp_path / "k").write_bytes(b"abc" * 100)
    found = await in_place(wanted, tmp_path)
    assert found is not None
    assert found.etag == (await packed.head("p/k")).etag
    (tmp_path / "k").write_bytes(b"abd" * 100)
    assert await in_place(wanted, tmp_path) is None
    (tmp_path / "k").write_bytes(b"abc")
    assert await in_place(wanted, tmp_path) is None


# Names.


async def test_objects_without_gz_are_themselves_and_a_gzip_wins_wherever_it_is_listed(
    store: ObjectStore, packed: GzipStore
) -> None:
    await store.put("p/a", b"plain a")
    for number in range(5):
        await store.put(f"p/a-{number}", b"between them, as keys are ordered")
    await packed.put("p/a", b"a")
    await store.put("p/plain.txt", b"as it is")
    await packed.put("p/x.gz", b"x")  # a local file of that name
    await store.put("p/.gz", b"no name is left")
    found = await listed(packed, "p/")
    assert sorted(found) == ["p/.gz", "p/a", *(f"p/a-{number}" for number in range(5)), "p/plain.txt", "p/x.gz"]
    assert (found["p/plain.txt"].size, found["p/plain.txt"].exact) == (8, True)
    assert [await read(packed, f"p/{name}") for name in ("a", "plain.txt", "x.gz", ".gz")] == [
        *(b"a", b"as it is", b"x", b"no name is left")
    ]
    assert (await packed.head("p/a")).size == 1
    assert (await packed.head("p/plain.txt")).size == 8


async def test_a_folders_marker_is_no_gzip_whatever_its_name(store: ObjectStore, tmp_path: Path) -> None:
    await store.put("p/sub.gz", b"")  # as obstore lists "p/sub.gz/"
    assert await fetch(await item(GzipStore(store)), tmp_path, IMPATIENT) is None
    assert (tmp_path / "sub.gz").is_dir()


async def test_a_page_boundary_between_a_and_its_gzip_shows_it_once() -> None:
    store = MemoryStore()
    packed = GzipStore(store)
    await store.put("a", b"plain")
    for number in range(1100):
        await store.put(f"a-{number}", b"")
    await packed.put("a", b"gzip")
    assert [info.key async for page in packed.list("") for info in page].count("a") == 1
    assert not (await listed(packed))["a"].exact


async def test_a_gzip_wins_in_whatever_order_a_store_lists() -> None:
    class Backwards(MemoryStore):
        async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
            async for page in super().list(prefix):
                yield page[::-1]

    store = Backwards()
    await store.put("a", b"plain")
    await GzipStore(store).put("a", b"gzip")
    assert not (await listed(GzipStore(store)))["a"].exact


async def test_an_object_that_says_of_itself_that_it_is_gzipped_is_unpacked_once(
    server: S3Server, bucket: str, faulty: GzipStore
) -> None:
    body = gzip.compress(b"abc" * 1000)
    boto3_client(server).put_object(Bucket=bucket, Key="k.gz", Body=body, ContentEncoding="gzip")
    assert boto3_client(server).head_object(Bucket=bucket, Key="k.gz")["ContentEncoding"] == "gzip"
    assert await read(faulty, "k") == b"abc" * 1000


async def test_a_compressed_object_is_no_object_under_its_stored_name(store: ObjectStore, packed: GzipStore) -> None:
    await store.put("k.gz", gzip.compress(b"x"))
    assert list(await listed(packed)) == ["k"]
    for call in (packed.head("k.gz"), packed.download("k.gz", lambda _: None), packed.head("none")):
        with pytest.raises(ObjectNotFoundError):
            await call


async def test_a_deletion_takes_both_and_never_another_files_object(store: ObjectStore, packed: GzipStore) -> None:
    await store.put("a", b"plain")
    await packed.put("a", b"gzip")
    await packed.put("b", b"of a file b")
    await packed.put("b.gz", b"of a file b.gz")
    await packed.delete("a")
    await packed.delete("b.gz")
    await packed.delete("never")
    assert list(await listed(store)) == ["b.gz"]
    assert list(await listed(packed)) == ["b"]
    assert await read(packed, "b") == b"of a file b"


async def test_a_part_of_an_object_can_be_read(packed: GzipStore) -> None:
    data = bytes(range(256)) * 8000
    await packed.put("k", data)
    assert await packed.read("k", offset=1_000_000, length=300_000) == data[1_000_000:1_300_000]
    with pytest.raises(ShortAnswerError):
        await packed.read("k", offset=len(data) - 1, length=2)
    with pytest.raises(RangeNotSupportedError):
        await packed.download("k", lambda _: None, offset=1)
    assert not packed.provider.ranges
    assert packed.provider.part_bytes == PART


# Writes.


async def test_a_condition_is_that_of_the_compressed_object(store: ObjectStore, packed: GzipStore) -> None:
    first = await packed.put("k", b"one")
    if not packed.provider.conditional_writes:
        pytest.skip("this provider enforces no conditions")
    second = await packed.put("k", b"two", condition=Condition(if_match=first))
    with pytest.raises(PreconditionFailedError):
        await packed.put("k", b"three", condition=Condition(if_match=first))
    with pytest.raises(PreconditionFailedError):
        await packed.put("k", b"three", condition=Condition(if_absent=True))
    assert (await packed.head("k")).etag == second
    assert await read(packed, "k") == b"two"
    with pytest.raises(PreconditionFailedError):
        await packed.download("k", lambda _: None, if_match=first)


class ChangedReader:
    """Gives bytes, and says with the last that they were none."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1, /) -> bytes:
        count = min(size, self._left)
        self._left -= count
        if not self._left:
            raise FileChangedError("f")
        return os.urandom(count)


@pytest.mark.parametrize("size", [10, 3 * PART])
async def test_a_reader_that_refuses_its_last_bytes_leaves_nothing_visible(
    store: ObjectStore, packed: GzipStore, size: int
) -> None:
    with pytest.raises(FileChangedError):
        await packed.upload("k", ChangedReader(size))
    assert await listed(store) == {}


@pytest.mark.parametrize("way", ["put", "upload"])
async def test_a_store_that_keeps_other_bytes_is_found_out(way: str) -> None:
    class Other(MemoryStore):
        async def put(self, key: str, data: bytes, **fields: object) -> str:
            return await super().put(key, data + b"!", **fields)  # type: ignore[arg-type]

        async def upload(self, key: str, reader: object, **fields: object) -> str:
            return await super().upload(key, io.BytesIO(b"!"), **fields)  # type: ignore[arg-type]

    packed = GzipStore(Other())
    with pytest.raises(TransientStoreError, match="stored as"):
        await (packed.put("k", b"x") if way == "put" else packed.upload("k", Sized(b"x")))


@pytest.mark.parametrize("way", ["put", "upload"])
async def test_where_etags_are_no_checksums_the_compressed_size_is_compared(way: str) -> None:
    class Strange(ScriptedStore):
        less = 0

        async def head(self, key: str) -> ObjectInfo:
            info = await super().head(key)
            return ObjectInfo(key, info.size - self.less, '"strange"', info.metadata)

        async def put(self, *args: object, **fields: object) -> str:
            await super().put(*args, **fields)  # type: ignore[arg-type]
            return ""

        async def upload(self, *args: object, **fields: object) -> str:
            await super().upload(*args, **fields)  # type: ignore[arg-type]
            return ""

    store = Strange()
    packed = GzipStore(store)

    async def send() -> str:
        return await (packed.put("k", b"x") if way == "put" else packed.upload("k", Sized(b"x")))

    await send()
    store.less = 1
    with pytest.raises(TransientStoreError, match="stored 20 of 21 bytes"):
        await send()


async def test_an_object_that_is_not_what_was_sent_is_believed_to_equal_nothing() -> None:
    store = MemoryStore()
    packed = GzipStore(store)
    await packed.put("k", b"x", metadata=digest(b"x"))
    told = (await store.head("k.gz")).metadata
    await store.put("k.gz", gzip.compress(b"z"), metadata=told)  # damaged on its way, and the answer lost
    info = await packed.head("k")
    assert DIGEST_KEY not in info.metadata
    assert not info.exact


async def test_a_file_is_uploaded_only_where_it_changed_and_replaces_what_was_seen(
    store: ObjectStore, packed: GzipStore, tmp_path: Path
) -> None:
    path = tmp_path / "f"
    for size in (5, PART + 1):
        known = None
        for turn in range(2):
            path.write_bytes(bytes([65 + turn]) * size)
            stamp = Stamp.of(path.stat())
            known, sent = await upload_file(packed, "f", tmp_path, "f", stamp, known, lambda: True)
            assert sent == size
            assert await upload_file(packed, "f", tmp_path, "f", stamp, known, lambda: True) == (known, 0)
            assert known.etag == (await store.head("f.gz")).etag or not store.provider.etag_is_md5
        assert await read(packed, "f") == b"B" * size


# Damage and cuts.


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: data[:-5],
        lambda data: data[:30],
        lambda data: data[: len(data) // 2] + b"\xff" * 8 + data[len(data) // 2 + 8 :],
        lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
        lambda data: data + b"not a member",
        lambda data: b"not a gzip",
    ],
    ids=["a trailer cut", "cut", "overwritten", "another checksum", "something after it", "none"],
)
@pytest.mark.parametrize("marked", [False, True])
async def test_damage_is_found_with_and_without_a_digest_and_no_file_is_made(
    store: ObjectStore, packed: GzipStore, tmp_path: Path, harm: object, marked: bool
) -> None:
    data = os.urandom(10_000)
    assert callable(harm)
    await store.put("p/k.gz", harm(gzip.compress(data)), metadata=digest(data) if marked else None)
    with pytest.raises(DamagedObjectError):
        await packed.download("p/k", lambda _: None)
    with pytest.raises(DamagedObjectError, match=r"read 3 times, it is"):
        await fetch(await item(packed), tmp_path, IMPATIENT)
    assert not (tmp_path / "k").exists()


async def test_a_whole_gzip_of_other_content_than_its_digest_says_is_damaged(packed: GzipStore, tmp_path: Path) -> None:
    await packed.put("p/k", b"one", metadata=digest(b"two"))
    with pytest.raises(DamagedObjectError, match="never as stored"):
        await fetch(await item(packed), tmp_path, IMPATIENT)


async def test_a_plain_object_is_still_compared_with_its_etag(server: S3Server, bucket: str, faulty: GzipStore) -> None:
    server.put(bucket, "k", b"x" * 1000)
    assert await read(faulty, "k") == b"x" * 1000
    server.faults.add(Corrupt(), bucket=bucket, operation="GetObject", key="k")
    with pytest.raises(DamagedObjectError, match="ETag"):
        await faulty.download("k", lambda _: None)


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize(
    "cut",
    [
        Cut(at="response_body", after_bytes=1_300_000),
        Truncate(after_bytes=1_300_000),
        Truncate(after_bytes=1_300_000, hidden=True),
        Corrupt(),
    ],
    ids=repr,
)
async def test_a_cut_download_starts_over_and_becomes_the_file(
    server: S3Server, bucket: str, faulty: GzipStore, tmp_path: Path, cut: Cut | Truncate | Corrupt, marked: bool
) -> None:
    data = os.urandom(2_000_000) + bytes(500_000)
    if marked:
        await faulty.put("p/k", data, metadata=digest(data))
    else:
        server.put(bucket, "p/k.gz", gzip.compress(data))
    wanted = await item(faulty)
    rule = server.faults.add(cut, bucket=bucket, operation="GetObject", key="p/k.gz", count=2)
    stored = await fetch(wanted, tmp_path, IMPATIENT)
    assert rule.hits == 2
    assert stored is not None
    assert stored.digest == blake3(data).hexdigest()
    assert (tmp_path / "k").read_bytes() == data


async def test_a_cut_where_so_much_came_as_the_listing_tells_is_no_whole_file(tmp_path: Path) -> None:
    data = bytes(200_000)
    store = MemoryStore()
    await store.put("p/k.gz", gzip.compress(data))
    size = (await store.head("p/k.gz")).size

    class CutThere(GzipStore):
        cuts = 1

        async def download(self, key: str, sink: object, **fields: object) -> ObjectInfo:
            if self.cuts:
                self.cuts -= 1
                assert callable(sink)
                sink(data[:size])
                raise TransientStoreError("GetObject", "memory", key, "cut")
            return await super().download(key, sink, **fields)  # type: ignore[arg-type]

    await fetch(await item(CutThere(store)), tmp_path, IMPATIENT)
    assert (tmp_path / "k").read_bytes() == data


# The streams alone.


def test_what_swells_comes_in_small_pieces() -> None:
    bomb = gzipped(bytes(300 << 20))
    largest = total = 0

    def sink(data: bytes) -> None:
        nonlocal largest, total
        largest, total = max(largest, len(data)), total + len(data)

    gunzip = Gunzip(sink, "b", "k")
    gunzip.take(bomb)
    gunzip.finish()
    assert total == gunzip.size == 300 << 20
    assert largest <= 1 << 20


def test_a_file_becomes_the_same_gzip_every_time() -> None:
    assert gzipped(b"abc") == gzipped(b"abc")
    assert gzipped(b"abc")[4:8] == b"\0\0\0\0"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.binary(max_size=3000) | st.integers(0, 5000).map(bytes), max_size=5),
    st.integers(1, 700),
    st.integers(1, 700),
)
def test_any_content_makes_the_round_trip_in_any_pieces(members: list[bytes], block: int, piece: int) -> None:
    stored = b""
    for content in members:
        reader = GzipReader(io.BytesIO(content))
        blocks = []
        while part := reader.read(block):
            blocks.append(part)
        assert reader.read(block) == b""
        assert all(len(part) == block for part in blocks[:-1])
        assert zlib.decompress(b"".join(blocks), 31) == content
        assert b"".join(blocks) == gzipped(content)
        stored += b"".join(blocks)
    got = bytearray()
    gunzip = Gunzip(got.extend, "b", "k")
    for at in range(0, len(stored), piece):
        gunzip.take(stored[at : at + piece])
    if members:
        gunzip.finish()
    assert bytes(got) == b"".join(members)
    assert gunzip.size == len(got)
