"""One file to one object: exactly the state that settled, or an error."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from heeler_sync.errors import FileChangedError, LocalFileError, ObjectReplacedError, TransientStoreError
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS
from heeler_sync.tree import Stamp
from heeler_sync.upload import Stored, digest_file, upload_file
from tests.support.stores import KIB, SMALL_PARTS, ScriptedStore, digest, transient

pytestmark = pytest.mark.anyio

SIZES = [0, 1, 64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 128 * KIB, 200 * KIB]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def write(root: Path, data: bytes, name: str = "f") -> Stamp:
    (root / name).write_bytes(data)
    return Stamp.of((root / name).stat())


async def send(
    store: ScriptedStore | MemoryStore, root: Path, stamp: Stamp, known: Stored | None = None, name: str = "f"
) -> tuple[Stored, int]:
    return await upload_file(store, "k", root, name, stamp, known, lambda: True)


@pytest.mark.parametrize("size", SIZES)
async def test_a_file_of_any_size_is_stored_whole_with_its_digest(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    store = ScriptedStore()
    stored, sent = await send(store, tmp_path, write(tmp_path, data))
    info = await store.inner.head("k")
    assert store.objects() == {"k": data}
    assert dict(info.metadata) == digest(data)
    assert (stored.digest, stored.etag, sent) == (digest(data)["heeler-blake3"], info.etag, size)
    assert store.count("upload") == (size > 64 * KIB)


@pytest.mark.parametrize("size", SIZES)
async def test_the_same_content_is_not_sent_again(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    store = ScriptedStore()
    first, _ = await send(store, tmp_path, write(tmp_path, data))
    calls = len(store.calls)
    stamp = write(tmp_path, data)
    again, sent = await send(store, tmp_path, stamp, first)
    assert len(store.calls) == calls
    assert sent == 0
    assert (again.stamp, again.etag) == (stamp, first.etag)


async def test_a_state_other_than_the_settled_one_is_not_sent(tmp_path: Path) -> None:
    stamp = write(tmp_path, b"one")
    write(tmp_path, b"other")
    store = ScriptedStore()
    with pytest.raises(FileChangedError):
        await send(store, tmp_path, stamp)
    assert store.calls == []


@pytest.mark.parametrize("size", [10, 200 * KIB])
async def test_a_file_rewritten_in_place_during_the_read_is_not_stored(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = write(tmp_path, b"a" * size)
    read, reads = os.read, []

    def rewriting(descriptor: int, count: int) -> bytes:
        data = read(descriptor, count)
        reads.append(len(data))
        # The second pass over the file (the one that is sent) is disturbed after its first bytes.
        if sum(reads) > size and data and len(reads) < 9:
            monkeypatch.setattr(os, "read", read)
            with (tmp_path / "f").open("r+b") as file:
                file.seek(size - 1)
                file.write(b"b")
        return data

    monkeypatch.setattr(os, "read", rewriting)
    store = ScriptedStore()
    with pytest.raises(FileChangedError):
        await send(store, tmp_path, stamp)
    assert store.objects() == {}


@pytest.mark.parametrize("size", [10, 200 * KIB])
async def test_a_file_that_shrinks_during_the_read_is_not_stored(
    tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = write(tmp_path, b"a" * size)
    read, passed = os.read, [0]

    def shrinking(descriptor: int, count: int) -> bytes:
        if passed[0] >= size:
            os.truncate(tmp_path / "f", 1)
        data = read(descriptor, count)
        passed[0] += len(data)
        return data

    monkeypatch.setattr(os, "read", shrinking)
    store = ScriptedStore()
    with pytest.raises(FileChangedError):
        await send(store, tmp_path, stamp)
    assert store.objects() == {}


async def test_a_file_renamed_away_during_the_read_is_stored_as_it_had_settled(tmp_path: Path) -> None:
    """A rename over the path leaves the open file alone; what is sent is one whole state."""

    async def replace_it() -> None:
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(tmp_path / "f")

    store = ScriptedStore(put=[replace_it])
    await send(store, tmp_path, write(tmp_path, b"old"))
    assert store.objects() == {"k": b"old"}


async def test_a_file_that_is_gone_says_so(tmp_path: Path) -> None:
    stamp = write(tmp_path, b"x")
    (tmp_path / "f").unlink()
    with pytest.raises(FileNotFoundError):
        await send(ScriptedStore(), tmp_path, stamp)


async def test_an_object_that_is_known_is_replaced_only_if_it_is_still_that_one(tmp_path: Path) -> None:
    store = ScriptedStore()
    known, _ = await send(store, tmp_path, write(tmp_path, b"one"))
    await store.inner.put("k", b"somebody else's")
    with pytest.raises(ObjectReplacedError):
        await send(store, tmp_path, write(tmp_path, b"two"), known)
    assert store.objects() == {"k": b"somebody else's"}


async def test_an_object_that_somebody_deleted_is_not_brought_back_unasked(tmp_path: Path) -> None:
    store = ScriptedStore()
    known, _ = await send(store, tmp_path, write(tmp_path, b"one"))
    await store.inner.delete("k")
    with pytest.raises(ObjectReplacedError):
        await send(store, tmp_path, write(tmp_path, b"two"), known)
    assert store.objects() == {}


async def test_a_refusal_that_our_own_lost_answer_caused_is_a_success(tmp_path: Path) -> None:
    store = ScriptedStore()
    known, _ = await send(store, tmp_path, write(tmp_path, b"one"))
    stamp = write(tmp_path, b"two")
    store.scripts["put"] = [("after", transient("PutObject"))]
    with pytest.raises(TransientStoreError):
        await send(store, tmp_path, stamp, known)
    stored, sent = await send(store, tmp_path, stamp, known)
    assert store.objects() == {"k": b"two"}
    assert stored.etag == (await store.inner.head("k")).etag
    assert sent == 3


async def test_no_condition_is_sent_to_a_store_that_does_not_keep_them(tmp_path: Path) -> None:
    provider = replace(SMALL_PARTS, conditional_writes=False)
    store = ScriptedStore(MemoryStore(provider=provider))
    known, _ = await send(store, tmp_path, write(tmp_path, b"one"))
    await send(store, tmp_path, write(tmp_path, b"two"), known)
    assert store.conditions == [None, None]


@pytest.mark.parametrize("size", [5, 200 * KIB])
async def test_other_bytes_stored_than_were_sent_are_found_by_the_etag(tmp_path: Path, size: int) -> None:
    class Garbling(MemoryStore):
        async def put(self, key: str, data: bytes, **options: object) -> str:
            return await super().put(key, b"?" + data[1:], **options)  # type: ignore[arg-type]

        async def upload(self, key: str, reader: object, **options: object) -> str:
            await super().upload(key, reader, **options)  # type: ignore[arg-type]
            return '"00000000000000000000000000000000-4"'

    with pytest.raises(TransientStoreError, match="stored as"):
        await send(Garbling(provider=SMALL_PARTS), tmp_path, write(tmp_path, b"x" * size))


async def test_where_an_etag_is_no_checksum_the_size_is_asked_for(tmp_path: Path) -> None:
    class Opaque(MemoryStore):
        async def put(self, key: str, data: bytes, **options: object) -> str:
            await super().put(key, data[:-1], **options)  # type: ignore[arg-type]
            return '"opaque"'

    with pytest.raises(TransientStoreError, match="stored 4 of 5 bytes"):
        await send(Opaque(provider=PROVIDERS["aws"]), tmp_path, write(tmp_path, b"x" * 5))


async def test_a_link_that_leads_out_is_never_sent(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_bytes(b"secret")
    (root / "f").symlink_to(tmp_path / "secret")
    (root / "up").symlink_to(tmp_path)
    for name in ("f", "up/secret", "../secret"):
        with pytest.raises(LocalFileError):
            await send(ScriptedStore(), root, Stamp.of((root / name).stat()), name=name)


async def test_a_link_to_a_file_of_the_folder_is_sent_as_that_file(tmp_path: Path) -> None:
    write(tmp_path, b"real", "real")
    (tmp_path / "f").symlink_to("real")
    store = ScriptedStore()
    await send(store, tmp_path, Stamp.of((tmp_path / "f").stat()))
    assert store.objects() == {"k": b"real"}


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
async def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "f")
    with pytest.raises(LocalFileError, match="not a regular file"):
        await send(ScriptedStore(), tmp_path, Stamp.of((tmp_path / "f").stat()))


async def test_no_descriptor_is_left_open_whatever_happens(tmp_path: Path) -> None:
    stamp = write(tmp_path, b"x" * 100 * KIB)
    before = len(os.listdir("/proc/self/fd"))
    calls: list[Callable[[], Awaitable[object]]] = [
        lambda: send(ScriptedStore(upload=[transient()]), tmp_path, stamp),
        lambda: send(ScriptedStore(), tmp_path, replace(stamp, size=1)),
        lambda: send(ScriptedStore(), tmp_path, stamp),
    ]
    for call in calls:
        try:
            await call()
        except (TransientStoreError, FileChangedError):
            continue
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_digest_is_of_one_state_only(tmp_path: Path) -> None:
    stamp = write(tmp_path, b"abc")
    assert digest_file(tmp_path, "f").digest == digest(b"abc")["heeler-blake3"]
    with pytest.raises(FileChangedError):
        digest_file(tmp_path, "f", replace(stamp, mtime_ns=1))
