"""What a hostile review did to mirror mode: each test is an attack that once worked."""

from __future__ import annotations

import os
import shutil
from collections.abc import Awaitable, Callable
from pathlib import Path

import anyio
import pytest

from heeler_sync import mirror as mirror_module
from heeler_sync.errors import FileChangedError
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.upload import digest_file
from tests.support.stores import KIB, ScriptedStore, transient, until
from tests.unit.test_mirror import mirrored

pytestmark = pytest.mark.anyio

LARGE = 200 * KIB
"""More than one part, so that the file is read while it is sent."""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class RecordingStore(ScriptedStore):
    """Keeps every state that the bucket was ever in."""

    def __init__(self) -> None:
        super().__init__()
        self.states: list[dict[str, bytes]] = []

    async def _do(self, method: str, key: str, call: Callable[[], Awaitable[object]]) -> object:
        try:
            return await super()._do(method, key, call)
        finally:
            if self.states or self.objects():
                self.states.append(self.objects())

    def always_held(self, *good: bytes) -> bool:
        """Whether at each moment since the first object one was there with a content that is a checkpoint."""
        return all(set(good) & set(state.values()) for state in self.states)


@pytest.mark.parametrize("when", ["while it runs", "at its end"])
async def test_a_file_made_anew_after_a_deletion_without_an_answer_is_sent_again(tmp_path: Path, when: str) -> None:
    class Losing(ScriptedStore):
        async def delete(self, key: str) -> None:
            await super().delete(key)
            (tmp_path / "a").write_bytes(b"same")
            await until(lambda: tmp_path / "a" in folder.mirror.unsent())
            raise transient("DeleteObject")

    async with mirrored(tmp_path, Losing()) as folder:
        (tmp_path / "a").write_bytes(b"same")
        await folder.equal()
        (tmp_path / "a").unlink()
        await until(lambda: "delete_retried" in folder.events.names())
        if when == "while it runs":
            await folder.equal()
        assert await folder.end(whole=True) is None
    assert folder.bucket() == {"a": b"same"}


def _renamed_over(path: Path) -> None:
    path.with_suffix(".tmp").write_bytes(b"3" * LARGE)
    path.with_suffix(".tmp").replace(path)


TOUCHES: dict[str, Callable[[Path], object]] = {
    "chmod": lambda path: path.chmod(0o640),
    "utime": os.utime,
    "rewritten": lambda path: path.write_bytes(b"3" * LARGE),
    "renamed over": _renamed_over,
}


@pytest.mark.parametrize("first", ["the old one goes", "the new one changes"])
@pytest.mark.parametrize("touch", TOUCHES)
async def test_an_old_checkpoint_stays_until_the_new_one_that_changed_on_its_way_is_durable(
    tmp_path: Path, touch: str, first: str
) -> None:
    release = anyio.Event()
    store = RecordingStore()
    async with mirrored(tmp_path, store) as folder:
        settler = folder.mirror._settler

        async def go() -> None:
            (tmp_path / "step1").unlink()
            await until(lambda: settler._gone)

        async def change() -> None:
            TOUCHES[touch](tmp_path / "step2")
            if "re" in touch:  # of a change of its attributes alone nobody tells
                await until(lambda: settler.is_dirty("step2"))

        (tmp_path / "step1").write_bytes(b"1")
        await folder.equal()
        store.scripts["upload"] = [release.wait, transient(), transient()]
        (tmp_path / "step2").write_bytes(b"2" * LARGE)
        await until(lambda: store.count("upload", "p/step2"))
        for act in (go, change) if first == "the old one goes" else (change, go):
            await act()
        release.set()
        await folder.equal()
        assert set(folder.bucket()) == {"step2"}
    assert store.always_held(b"1", b"2" * LARGE, b"3" * LARGE), [sorted(state) for state in store.states]


@pytest.mark.parametrize("new", ["x.part", "x.part/weights"])
@pytest.mark.parametrize("when", ["at once", "before it is sent", "while it is sent", "when it is stored"])
async def test_a_rename_into_place_after_the_old_one_was_removed_leaves_no_gap(
    tmp_path: Path, new: str, when: str
) -> None:
    release = anyio.Event()
    store = RecordingStore()
    async with mirrored(tmp_path, store) as folder:
        settler = folder.mirror._settler
        (tmp_path / "old").write_bytes(b"1")
        await folder.equal()
        store.scripts["upload"] = [release.wait] if when == "while it is sent" else [transient(), transient()]
        (tmp_path / new).parent.mkdir(exist_ok=True)
        (tmp_path / new).write_bytes(b"2" * LARGE)
        if when == "before it is sent":
            await until(lambda: settler.is_dirty(new) or new in settler._in_flight)
        elif when == "while it is sent":
            await until(lambda: store.count("upload"))
        elif when == "when it is stored":
            await folder.equal()
        (tmp_path / "old").unlink()
        if when in ("before it is sent", "while it is sent"):
            await until(lambda: settler._gone)
        (tmp_path / "x.part").rename(tmp_path / "new")
        if when == "while it is sent":
            await until(lambda: settler.is_dirty(new.replace("x.part", "new")))
        release.set()
        await folder.equal()
    assert store.always_held(b"1", b"2" * LARGE), [sorted(state) for state in store.states]


async def test_without_inotify_a_file_rewritten_while_it_is_sent_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_watch(*_: object) -> None:
        raise OSError(28, "inotify watch limit reached")

    monkeypatch.setattr(mirror_module, "TreeWatch", no_watch)
    monkeypatch.setattr(mirror_module, "_SCAN_SECONDS_UNWATCHED", 0.03)
    release = anyio.Event()
    async with mirrored(tmp_path, ScriptedStore(put=[release.wait])) as folder:
        (tmp_path / "a").write_bytes(b"old")
        await until(lambda: folder.store.count("put"))
        (tmp_path / "a").write_bytes(b"newer")
        await until(lambda: folder.mirror._seen["a"].size == len(b"newer"))
        release.set()
        await folder.equal()
    assert "watch_unavailable" in folder.events.names()


class Lent(AlwaysPermitted):
    """A permit that is withdrawn and given again; `waits` counts who asked for it."""

    def __init__(self) -> None:
        self.given = anyio.Event()
        self.given.set()
        self.waits = 0

    async def wait(self) -> None:
        self.waits += 1
        await self.given.wait()

    def certain(self) -> bool:
        return self.given.is_set()

    async def withdraw(self) -> None:
        self.given = anyio.Event()


async def test_a_file_in_parts_becomes_visible_only_with_the_permit(tmp_path: Path) -> None:
    permit = Lent()
    async with mirrored(tmp_path, ScriptedStore(upload=[permit.withdraw]), permit=permit) as folder:
        (tmp_path / "a").write_bytes(b"2" * LARGE)
        await until(lambda: permit.waits == 2)  # the sender asks anew
        assert folder.store.count("upload") == 1
        assert folder.bucket() == {}
        permit.given.set()
        await folder.equal()


async def test_damaged_bytes_under_our_own_digest_are_never_believed(tmp_path: Path) -> None:
    class Corrupting(ScriptedStore):
        async def put(self, key: str, data: bytes, **options: object) -> str:
            damaged = self.count("put") == 1
            return await super().put(key, b"X" * len(data) if damaged else data, **options)  # type: ignore[arg-type]

    async with mirrored(tmp_path, Corrupting()) as folder:
        (tmp_path / "a").write_bytes(b"v1")
        await folder.equal()
        (tmp_path / "a").write_bytes(b"v2")
        await until(lambda: "upload_retried" in folder.events.names())
        assert await folder.end(whole=True) is None
    assert folder.bucket() == {"a": b"v2"}


@pytest.mark.parametrize("gap", ["at once", "when it was missed"])
async def test_a_folder_removed_and_made_anew_is_watched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gap: str
) -> None:
    monkeypatch.setattr(mirror_module, "_SCAN_SECONDS_UNWATCHED", 0.1)
    root, fresh = tmp_path / "root", tmp_path / "fresh"
    fresh.mkdir()
    async with mirrored(root) as folder:
        (root / "a").write_bytes(b"1")
        await folder.equal()
        shutil.rmtree(root)
        if gap == "when it was missed":
            await until(lambda: "folder_replaced" in folder.events.names(), 2)
        fresh.rename(root)
        for name in ("b", "c", "d"):
            (root / name).write_bytes(b"2")
            await until(lambda name=name: name in folder.bucket(), 2)  # type: ignore[misc]


@pytest.mark.parametrize("deletion_waits", [False, True])
async def test_a_folder_renamed_away_deletes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deletion_waits: bool
) -> None:
    monkeypatch.setattr(mirror_module, "_SCAN_SECONDS", 0.3)
    root = tmp_path / "root"
    release = anyio.Event()
    async with mirrored(root, ScriptedStore(upload=[release.wait])) as folder:
        (root / "a").write_bytes(b"1")
        (root / "b").write_bytes(b"2")
        await folder.equal()
        if deletion_waits:
            (root / "new").write_bytes(b"3" * LARGE)
            await until(lambda: folder.store.count("upload"))
            (root / "a").unlink()
            await until(lambda: folder.mirror._settler._gone)
        root.rename(tmp_path / "away")
        await until(lambda: "folder_replaced" in folder.events.names())
        release.set()
        assert await folder.end(whole=True) is None
    assert folder.store.count("delete") == 0
    assert folder.bucket().items() >= {"a": b"1", "b": b"2"}.items()


async def test_names_that_can_be_no_keys_are_left_out_with_a_reason_and_all_others_are_sent(tmp_path: Path) -> None:
    odd = [os.fsdecode(b"a\xffb"), "a\tb", "a\nb", os.fsdecode(b"d\xff/in it")]
    async with mirrored(tmp_path) as folder:
        (tmp_path / "first").write_bytes(b"1")
        await folder.equal()
        (tmp_path / "..foo").write_bytes(b"x")
        await until(lambda: "..foo" in folder.bucket(), 2)  # by its event; a folder's would bring a scan
        for name in (*odd, "...", "d/..bar"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        sent = {"first": b"1", "..foo": b"x", "...": b"x", "d/..bar": b"x"}
        await until(lambda: folder.bucket() == sent, 2)
        (tmp_path / "a\tb").rename(tmp_path / "better")
        await until(lambda: folder.bucket() == {**sent, "better": b"x"}, 2)
        assert await folder.end(whole=True) is None
    assert folder.bucket() == {**sent, "better": b"x"}
    told = {fields["file"]: fields["reason"] for name, fields in folder.events.seen if name == "file_left_out"}
    assert told.keys() >= {*odd} - {"a\tb"}
    assert told[odd[0]] == "its name is not UTF-8"
    assert told["a\nb"] == "its name contains a control character"


def test_reading_a_file_that_keeps_growing_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(b"x" * 10)
    read, reads = os.read, []

    def grow(descriptor: int, size: int) -> bytes:
        reads.append(size)
        assert len(reads) < 50, "it reads for ever"
        with (tmp_path / "a").open("ab") as file:
            file.write(b"y" * (2 * KIB))
        return read(descriptor, size)

    monkeypatch.setattr(os, "read", grow)
    with pytest.raises(FileChangedError):
        digest_file(tmp_path, "a")
    assert reads == [10]
