"""A folder's tree at one instant: what changes while it is taken is told apart from what may, and little is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio
import pytest

from heeler_sync.errors import LocalFileError, NotNowError
from heeler_sync.paths import location
from heeler_sync.progress import Progress
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.snapshot import capture
from heeler_sync.snapshot.capture import Look, Reading, look
from heeler_sync.snapshot.chunks import digest_of
from heeler_sync.snapshot.holder import Claim, Holder, acquire
from heeler_sync.snapshot.index import Indexed
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Tree
from heeler_sync.snapshot.outbox import sending
from heeler_sync.snapshot.packs import Pack
from heeler_sync.snapshot.scan import TreeScan, scan_tree
from heeler_sync.store.memory import MemoryStore
from heeler_sync.tree import open_inside
from tests.support.stores import IMPATIENT, Events, ScriptedStore
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_snapshot_restore import CHUNK, PACK, noise, shrink

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Camera:
    """A folder, a prefix that we hold, and what is known of the files."""

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.patch = patch
        root.mkdir()
        self.store = ScriptedStore(MemoryStore("bucket"))
        self.layout = Layout(self.store, location("bucket", "p/"), IMPATIENT)
        self.holder: Holder
        self.indexed: dict[str, Indexed] = {}
        self.seen: dict[str, Indexed] = {}
        self.committed: dict[str, Indexed] = {}
        self.late: set[str] = set()
        self.opened: list[str] = []
        self.rewritten: set[bytes] = set()

        def noted(folder: Path, path: str) -> int:
            self.opened.append(path)
            return open_inside(folder, path)

        patch.setattr(capture, "open_inside", noted)

    async def hold(self) -> Camera:
        self.holder = await acquire(self.layout, Claim("job"), AlwaysPermitted(), Events())
        return self

    def write(self, path: str, data: bytes) -> None:
        (self.root / path).parent.mkdir(parents=True, exist_ok=True)
        (self.root / path).write_bytes(data)

    def append(self, path: str, data: bytes) -> None:
        with (self.root / path).open("ab") as file:
            file.write(data)

    async def look(self) -> Look:
        return await look(self.root, lambda _: True, lambda _: self.late, self.committed)

    async def read(self, looked: Look) -> Tree:
        """Read and send what changed, as a commit does."""
        reading = Reading(self.root, looked, self.indexed, self.seen, self.committed, self.holder)

        async def sent(pack: Pack) -> None:
            self.holder.add_pack(pack.id, pack.size, pack.places)

        try:
            async with sending(self.layout, None, Progress(clock=anyio.current_time), sent) as outbox:
                return await reading.into(outbox)
        finally:
            self.indexed.update(reading.read)
            self.seen.update(reading.seen)

    async def take(self) -> Tree:
        """One generation."""
        looked = await self.look()
        tree = await self.read(looked)
        await self.holder.commit(tree)
        self.committed = {
            path: Indexed(found.stamp, tree.files[path].chunks) for path, found in looked.scan.files.items()
        }
        return tree

    def between_scans(self, *acts: Callable[[], object]) -> None:
        """Let the program act after each scan."""
        left = list(acts)

        def scan(root: Path, include: Callable[[str], bool]) -> TreeScan:
            found = scan_tree(root, include)
            if left:
                left.pop(0)()
            return found

        self.patch.setattr(capture, "scan_tree", scan)

    def while_reading(self, path: str, act: Callable[[], object], *, nth: int = 1) -> None:
        """Let the program act when the nth chunk of anything was read."""
        pread, count = os.pread, [0]

        def reading(descriptor: int, size: int, offset: int) -> bytes:
            data = pread(descriptor, size, offset)
            if os.readlink(f"/proc/self/fd/{descriptor}").endswith("/" + path):
                count[0] += 1
                if count[0] == nth:
                    act()
            return data

        self.patch.setattr(os, "pread", reading)

    def packs(self) -> Mapping[str, bytes]:
        return {key: data for key, data in self.store.objects().items() if "/packs/" in key}


@pytest.fixture
async def camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Camera:
    shrink(monkeypatch)
    return await Camera(tmp_path / "root", monkeypatch).hold()


def digests(data: bytes) -> tuple[bytes, ...]:
    return tuple(digest_of(data[at : at + CHUNK]) for at in range(0, len(data), CHUNK))


# Looking.


async def test_a_still_tree_is_seen_as_it_is(camera: Camera) -> None:
    camera.write("d/f", b"x")
    found = await camera.look()
    assert set(found.scan.files) == {"d/f"}
    assert (found.growing, found.late) == (frozenset(), frozenset())


async def test_a_change_between_two_scans_means_looking_again(camera: Camera) -> None:
    camera.write("a", b"1")
    camera.between_scans(lambda: camera.write("b", b"2"))
    assert set((await camera.look()).scan.files) == {"a", "b"}


async def test_a_tree_that_changes_all_the_time_is_not_to_be_had_and_the_file_is_named(camera: Camera) -> None:
    camera.write("still", b"1")
    camera.between_scans(*[lambda: camera.write("busy", os.urandom(5))] * 99)
    with pytest.raises(NotNowError, match="busy"):
        await camera.look()


async def test_folders_and_links_that_change_hinder_too(camera: Camera) -> None:
    def flip() -> None:
        if (camera.root / "l").is_symlink():
            (camera.root / "l").unlink()
        else:
            (camera.root / "l").symlink_to("x")

    camera.between_scans(*[flip] * 99)
    with pytest.raises(NotNowError) as caught:
        await camera.look()
    assert caught.value.path == "l"


async def test_a_file_written_in_this_very_tick_is_looked_at_again_when_the_tick_is_over(
    camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stamp would not show a second change in the same tick."""
    slept: list[float] = []

    class Clock:
        @staticmethod
        async def sleep(seconds: float) -> None:
            slept.append(seconds)

    camera.write("f", b"1")
    stamp = (camera.root / "f").stat()
    monkeypatch.setattr(capture, "anyio", Clock)
    monkeypatch.setattr(capture, "coarse_now", lambda: stamp.st_ctime_ns)
    with pytest.raises(NotNowError):
        await camera.look()
    assert slept
    monkeypatch.setattr(capture, "coarse_now", lambda: stamp.st_ctime_ns + 1)
    slept.clear()
    await camera.look()
    assert slept == [], "a file of an earlier tick costs no wait"


async def test_a_file_that_came_too_late_hinders_unless_the_last_generation_has_it(camera: Camera) -> None:
    camera.write("log", b"1")
    camera.late = {"log"}
    with pytest.raises(NotNowError, match="after the checkpoint was complete"):
        await camera.look()
    camera.late = set()
    await camera.take()
    camera.append("log", b"2")
    camera.late = {"log"}
    assert (await camera.look()).late == {"log"}
    camera.write("log", b"")
    with pytest.raises(NotNowError):
        await camera.look()


async def test_a_link_that_came_too_late_hinders(camera: Camera) -> None:
    (camera.root / "l").symlink_to("x")
    camera.late = {"l"}
    with pytest.raises(NotNowError, match="l was changed"):
        await camera.look()


async def test_a_folder_that_is_not_there_is_said_to_be_missing(camera: Camera) -> None:
    camera.root.rmdir()
    with pytest.raises(FileNotFoundError):
        await camera.look()


# Reading.


async def test_what_was_read_is_in_packs_and_nothing_twice(camera: Camera) -> None:
    data = noise("f", 10 * CHUNK)
    camera.write("a", data)
    camera.write("b", data)
    tree = await camera.take()
    assert tree.files["a"].chunks == tree.files["b"].chunks == digests(data)
    assert sum(map(len, camera.packs().values())) == len(data)
    assert max(map(len, camera.packs().values())) <= PACK


async def test_unchanged_files_are_not_opened_again(camera: Camera) -> None:
    for number in range(5):
        camera.write(str(number), noise(number, 3 * CHUNK))
    await camera.take()
    assert sorted(camera.opened) == ["0", "1", "2", "3", "4"]
    camera.opened.clear()
    camera.write("3", noise("new", 3 * CHUNK))
    await camera.take()
    assert camera.opened == ["3"]
    camera.opened.clear()
    (camera.root / "4").rename(camera.root / "renamed")
    await camera.take()
    assert camera.opened == ["renamed"]


async def test_a_chunk_that_storage_lacks_is_read_again_though_the_file_is_unchanged(camera: Camera) -> None:
    camera.write("a", noise("a", CHUNK))
    camera.write("b", noise("b", CHUNK))
    tree = await camera.take()
    place = camera.holder.known(tree.files["a"].chunks[0])
    assert place is not None
    camera.holder.forget_pack(place.pack)
    camera.opened.clear()
    again = await camera.take()
    assert "a" in camera.opened
    found = camera.holder.known(again.files["a"].chunks[0])
    assert found is not None
    assert found.pack != place.pack


@pytest.mark.parametrize("how", ["rewritten", "replaced", "touched", "cut short", "deleted"])
async def test_a_file_that_changed_between_the_scan_and_its_read_is_not_taken(camera: Camera, how: str) -> None:
    camera.write("f", noise("f", 3 * CHUNK))
    looked = await camera.look()
    target = camera.root / "f"
    if how == "rewritten":
        camera.write("f", noise("other", 3 * CHUNK))
    elif how == "replaced":
        camera.write("new", noise("f", 3 * CHUNK))
        (camera.root / "new").replace(target)
    elif how == "touched":
        os.utime(target)
    elif how == "cut short":
        os.truncate(target, CHUNK)
    else:
        target.unlink()
    with pytest.raises(NotNowError, match=r"^f "):
        await camera.read(looked)
    assert camera.indexed == {}


@pytest.mark.parametrize("nth", [1, 2, 3])
async def test_a_file_that_is_rewritten_while_it_is_read_is_not_taken(camera: Camera, nth: int) -> None:
    camera.write("f", noise("f", 3 * CHUNK))
    looked = await camera.look()
    camera.while_reading("f", lambda: camera.write("f", noise("other", 3 * CHUNK)), nth=nth)
    with pytest.raises(NotNowError):
        await camera.read(looked)


async def test_a_file_that_is_deleted_while_it_is_read_is_taken(camera: Camera) -> None:
    data = noise("f", 3 * CHUNK)
    camera.write("f", data)
    looked = await camera.look()
    camera.while_reading("f", (camera.root / "f").unlink)
    assert (await camera.read(looked)).files["f"].chunks == digests(data)


async def test_what_happens_to_a_file_after_its_read_does_not_matter(camera: Camera) -> None:
    camera.write("a", noise("a", CHUNK))
    camera.write("b", noise("b", CHUNK))
    looked = await camera.look()
    first, second = looked.scan.files

    def change() -> None:
        camera.write(first, b"new")
        camera.write("c", b"c")

    camera.while_reading(second, change)
    tree = await camera.read(looked)
    assert tree.files.keys() == {"a", "b"}
    assert tree.files[first].chunks == digests(noise(first, CHUNK))
    camera.opened.clear()
    assert (await camera.take()).files[first].chunks == digests(b"new")
    assert sorted(camera.opened) == sorted([first, "c"])


async def test_a_file_that_may_not_be_read_is_an_error_that_names_it(
    camera: Camera, monkeypatch: pytest.MonkeyPatch
) -> None:
    camera.write("f", b"x")
    looked = await camera.look()

    def refuse(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(LocalFileError, match="Input/output"):
        await camera.read(looked)


# Files that grow.


async def test_a_log_that_is_known_to_be_appended_to_is_taken_up_to_its_length_at_the_instant(camera: Camera) -> None:
    old = noise("log", 3 * CHUNK + 5)
    camera.write("log", old)
    await camera.take()
    camera.append("log", b"+" * 10)
    looked = await camera.look()
    camera.append("log", b"-" * 100)
    tree = await camera.read(looked)
    assert tree.files["log"].size == len(old) + 10
    assert tree.files["log"].chunks == digests(old + b"+" * 10)


async def test_a_log_that_grows_between_the_scans_is_taken_once_it_is_known_to_be_appended_to(camera: Camera) -> None:
    camera.write("log", noise("log", 3 * CHUNK))
    camera.between_scans(*[lambda: camera.append("log", b"+")] * 99)
    looked = await camera.look()
    assert looked.growing == {"log"}
    with pytest.raises(NotNowError, match="log"):
        await camera.read(looked)
    tree = await camera.read(await camera.look())
    size = tree.files["log"].size
    assert tree.files["log"].chunks == digests((camera.root / "log").read_bytes()[:size])


async def test_a_file_that_grew_and_was_rewritten_is_not_taken_for_a_log(camera: Camera) -> None:
    camera.write("f", noise("f", 3 * CHUNK))
    await camera.take()
    looked = await camera.look()
    camera.write("f", noise("other", 4 * CHUNK))
    camera.indexed.clear()
    with pytest.raises(NotNowError):
        await camera.read(looked)


async def test_a_late_file_is_taken_only_if_it_begins_with_what_the_last_generation_has(camera: Camera) -> None:
    camera.write("f", noise("f", 3 * CHUNK))
    await camera.take()
    camera.late = {"f"}
    camera.append("f", b"more")
    assert (await camera.read(await camera.look())).files["f"].size == 3 * CHUNK + 4
    camera.write("f", noise("other", 5 * CHUNK))
    with pytest.raises(NotNowError):
        await camera.read(await camera.look())


# Sparse packs.


async def test_chunks_of_a_mostly_unused_pack_are_stored_anew_and_the_pack_goes(camera: Camera) -> None:
    camera.write("keep", noise("keep", 20))
    camera.write("drop", noise("drop", CHUNK))
    await camera.take()
    (old,) = camera.packs()
    (camera.root / "drop").unlink()
    for turn in range(4):
        camera.write("work", noise(turn, 3 * CHUNK))
        await camera.take()
        await camera.holder.collect(AlwaysPermitted())
    assert old not in camera.packs(), "its 20 live bytes kept 84 alive"
    latest = camera.holder.latest()
    assert latest is not None
    assert digests(noise("keep", 20))[0] in latest.places


async def test_nothing_is_rewritten_where_nothing_new_is_sent(camera: Camera) -> None:
    camera.write("keep", noise("keep", 20))
    camera.write("drop", noise("drop", CHUNK))
    await camera.take()
    before = set(camera.packs())
    (camera.root / "drop").unlink()
    for turn in range(3):
        (camera.root / "keep").chmod(0o600 + turn)
        await camera.take()
    assert set(camera.packs()) == before, "rewriting may cost half of what is sent anyhow"
