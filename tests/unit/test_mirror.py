"""A folder kept equal to a prefix: real files, a store in memory, waits on conditions only."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from heeler_sync.errors import AccessDeniedError, SyncError
from heeler_sync.groups import background
from heeler_sync.mirror import Capture, Mirror
from heeler_sync.paths import Location
from heeler_sync.progress import Progress
from heeler_sync.sender import AlwaysPermitted, MirrorContext, Permit
from heeler_sync.settle import SettleTimes
from heeler_sync.store.retry import Backoff
from heeler_sync.tree import Stamp
from heeler_sync.upload import Stored
from tests.support.stores import Events, ScriptedStore, digest, transient, until

pytestmark = pytest.mark.anyio

QUICK = SettleTimes(debounce=0.02, open_wait=0.3)
DENIED = AccessDeniedError("PutObject", "b", "k", "403")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Folder:
    """A folder, its mirror, its store, and what was told."""

    def __init__(self, root: Path, store: ScriptedStore, permit: Permit, times: SettleTimes, stored: dict[str, Stored]):
        root.mkdir(exist_ok=True)
        self.root = root
        self.store = store
        self.events = Events()
        self.progress = Progress(clock=anyio.current_time)
        context = MirrorContext(times, permit, self.events, self.progress, backoff=lambda: Backoff(0.005, 0.01))
        self.mirror = Mirror(
            store, Location("memory", "p/"), root, lambda relative: not relative.endswith(".tmp"), context, stored
        )

    def bucket(self) -> dict[str, bytes]:
        return {key.removeprefix("p/"): data for key, data in self.store.objects().items()}

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and not path.is_symlink() and path.suffix != ".tmp"
        }

    async def equal(self) -> None:
        await until(lambda: self.bucket() == self.files())

    async def end(self, *, whole: bool) -> SyncError | None:
        self.mirror.end(Capture(whole=whole))
        with anyio.fail_after(10):
            await self.mirror.finished.wait()
        return self.mirror.refusal


@asynccontextmanager
async def mirrored(
    root: Path,
    store: ScriptedStore | None = None,
    *,
    permit: Permit | None = None,
    times: SettleTimes = QUICK,
    stored: dict[str, Stored] | None = None,
) -> AsyncIterator[Folder]:
    folder = Folder(root, store or ScriptedStore(), permit or AlwaysPermitted(), times, stored or {})
    async with background(folder.mirror.run):
        yield folder


async def test_files_written_appended_renamed_and_deleted_reach_storage(tmp_path: Path) -> None:
    (tmp_path / "early").write_bytes(b"there before")
    async with mirrored(tmp_path) as folder:
        await folder.equal()
        (tmp_path / "sub/deep").mkdir(parents=True)
        (tmp_path / "sub/deep/a").write_bytes(b"one")
        await folder.equal()
        with (tmp_path / "sub/deep/a").open("ab") as file:
            file.write(b" two")
        await folder.equal()
        (tmp_path / "x.tmp").write_bytes(b"renamed")
        (tmp_path / "x.tmp").rename(tmp_path / "x")
        await folder.equal()
        (tmp_path / "early").unlink()
        await folder.equal()
        assert await folder.end(whole=True) is None
    assert folder.bucket() == {"sub/deep/a": b"one two", "x": b"renamed"}
    assert folder.mirror.unsent() == set()


async def test_a_file_emptied_is_emptied_in_storage_and_counts_as_made_durable(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"full")
    async with mirrored(tmp_path) as folder:
        await folder.equal()
        count = folder.progress.files_up
        (tmp_path / "a").write_bytes(b"")
        await folder.equal()
        assert await folder.end(whole=True) is None
    assert folder.progress.files_up == count + 1


async def test_a_file_rewritten_while_it_is_sent_is_sent_again(tmp_path: Path) -> None:
    async def rewrite() -> None:
        (tmp_path / "a").write_bytes(b"newer")

    async with mirrored(tmp_path, ScriptedStore(put=[rewrite])) as folder:
        (tmp_path / "a").write_bytes(b"older")
        await until(lambda: folder.bucket() == {"a": b"newer"})


async def test_failures_are_tried_again_until_it_is_durable(tmp_path: Path) -> None:
    async with mirrored(tmp_path, ScriptedStore(put=[transient()] * 4)) as folder:
        (tmp_path / "a").write_bytes(b"x")
        await folder.equal()
    assert folder.events.names().count("upload_retried") == 4


async def test_a_refusal_while_the_program_runs_is_told_and_tried_again_at_its_end(tmp_path: Path) -> None:
    async with mirrored(tmp_path, ScriptedStore(put=[DENIED])) as folder:
        (tmp_path / "a").write_bytes(b"x")
        await until(lambda: "upload_refused" in folder.events.names())
        assert await folder.end(whole=True) is None
        assert folder.bucket() == {"a": b"x"}


async def test_a_refusal_at_the_end_is_the_end_and_says_why(tmp_path: Path) -> None:
    async with mirrored(tmp_path, ScriptedStore(put=[DENIED] * 99)) as folder:
        (tmp_path / "a").write_bytes(b"x")
        assert await folder.end(whole=True) is DENIED


async def test_an_old_checkpoint_is_deleted_only_after_the_new_one_is_durable(tmp_path: Path) -> None:
    release = anyio.Event()
    async with mirrored(tmp_path) as folder:
        (tmp_path / "step-1").write_bytes(b"1")
        await folder.equal()
        folder.store.scripts["put"] = [release.wait]
        (tmp_path / "step-2").write_bytes(b"2")
        (tmp_path / "step-1").unlink()
        await until(lambda: folder.store.count("put", "p/step-2") == 1)
        await anyio.sleep(0.1)
        assert folder.bucket() == {"step-1": b"1"}
        release.set()
        await folder.equal()
    assert folder.bucket() == {"step-2": b"2"}


async def test_a_file_that_comes_back_while_its_deletion_fails_is_never_deleted(tmp_path: Path) -> None:
    async with mirrored(tmp_path) as folder:
        (tmp_path / "a").write_bytes(b"1")
        await folder.equal()
        folder.store.scripts["delete"] = [transient("DeleteObject")] * 5
        (tmp_path / "a").unlink()
        await until(lambda: "delete_retried" in folder.events.names())
        folder.store.scripts["delete"] = [transient("DeleteObject")] * 5
        (tmp_path / "a").write_bytes(b"2")
        await folder.equal()
    assert folder.progress.deleted == 0


async def test_an_object_of_which_we_never_heard_is_deleted_with_its_file(tmp_path: Path) -> None:
    """Stored, the answer lost; then the file changed, so it was not sent again; then it went."""

    class Losing(ScriptedStore):
        async def put(self, key: str, data: bytes, **options: object) -> str:
            await super().put(key, data, **options)  # type: ignore[arg-type]
            (tmp_path / "a").write_bytes(b"newer")
            raise transient("PutObject")

    async with mirrored(tmp_path, Losing(), times=SettleTimes(debounce=0.2)) as folder:
        (tmp_path / "a").write_bytes(b"older")
        await until(lambda: "upload_retried" in folder.events.names())
        await until(lambda: not folder.mirror._settler._in_flight)
        assert folder.bucket() == {"a": b"older"}
        (tmp_path / "a").unlink()
        assert await folder.end(whole=True) is None
    assert folder.bucket() == {}


async def test_a_crashed_program_adds_only_what_had_settled(tmp_path: Path) -> None:
    async with mirrored(tmp_path, times=SettleTimes(debounce=0.2)) as folder:
        (tmp_path / "settled").write_bytes(b"whole")
        await folder.equal()
        (tmp_path / "settled").write_bytes(b"ha")
        (tmp_path / "new").write_bytes(b"ha")
        await until(lambda: len(folder.mirror.unsent()) == 2)
        assert await folder.end(whole=False) is None
    assert folder.bucket() == {"settled": b"whole"}


async def test_a_crashed_program_deletes_nothing_more(tmp_path: Path) -> None:
    release = anyio.Event()
    async with mirrored(tmp_path) as folder:
        (tmp_path / "old").write_bytes(b"1")
        await folder.equal()
        folder.store.scripts["put"] = [release.wait]
        (tmp_path / "new").write_bytes(b"2")
        await until(lambda: folder.store.count("put", "p/new") == 1)
        (tmp_path / "old").unlink()
        await until(lambda: folder.mirror._settler._gone)
        folder.mirror.end(Capture(whole=False))
        release.set()
        await until(folder.mirror.finished.is_set)
    assert folder.bucket() == {"old": b"1", "new": b"2"}


async def test_many_settled_files_waiting_for_their_turn_survive_a_crash(tmp_path: Path) -> None:
    """More files than fly at once, found by a scan: they were settled before the program died."""
    release = anyio.Event()
    for count in range(40):
        (tmp_path / f"f{count}").write_bytes(b"x")
    async with mirrored(tmp_path, ScriptedStore(put=[release.wait] * 40)) as folder:
        await until(lambda: folder.store.count("put") == 16)
        await anyio.sleep(QUICK.open_wait)
        folder.mirror.end(Capture(whole=False))
        release.set()
        await until(folder.mirror.finished.is_set)
        assert len(folder.bucket()) == 40


async def test_a_whole_capture_takes_all_that_is_there_at_once(tmp_path: Path) -> None:
    async with mirrored(tmp_path, times=SettleTimes(debounce=60.0, open_wait=60.0)) as folder:
        (tmp_path / "a").write_bytes(b"just written")
        assert await folder.end(whole=True) is None
    assert folder.bucket() == {"a": b"just written"}


async def test_a_file_held_open_by_a_writer_waits_and_settles_when_quiet(tmp_path: Path) -> None:
    script = "import sys,time; f=open(sys.argv[1],'wb',0); f.write(b'x'); time.sleep(60)"
    async with mirrored(tmp_path, times=SettleTimes(debounce=0.02, open_wait=0.6)) as folder:
        started = anyio.current_time()
        async with await anyio.open_process(["python3", "-c", script, str(tmp_path / "a")]) as process:
            await until(lambda: folder.bucket() == {"a": b"x"})
            assert anyio.current_time() - started >= 0.6
            process.kill()


@pytest.mark.parametrize("phase", ["while it runs", "at its end"])
@pytest.mark.parametrize("kind", ["link out", "link to a folder", "link loop", "dangling link", "fifo", "socket"])
async def test_what_is_no_file_of_the_folder_is_left_out_and_spoils_nothing(
    tmp_path: Path, kind: str, phase: str
) -> None:
    root = tmp_path / "root"
    outside = tmp_path / "outside"
    outside.write_bytes(b"secret")
    makers: dict[str, Callable[[Path], object]] = {
        "link out": lambda path: path.symlink_to(outside),
        "link to a folder": lambda path: path.symlink_to("step-1"),
        "link loop": lambda path: path.symlink_to(path.name),
        "dangling link": lambda path: path.symlink_to("nowhere"),
        "fifo": os.mkfifo,
        "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    }
    async with mirrored(root) as folder:
        (root / "step-1").mkdir()
        (root / "step-1" / "a").write_bytes(b"x")
        await folder.equal()
        makers[kind](root / "odd")
        if phase == "while it runs":
            (root / "b").write_bytes(b"y")
            await until(lambda: folder.bucket() == {"step-1/a": b"x", "b": b"y"})
            await anyio.sleep(0.1)
        assert await folder.end(whole=True) is None
        assert folder.bucket() == ({"step-1/a": b"x"} | ({"b": b"y"} if phase == "while it runs" else {}))
    assert "upload_refused" not in folder.events.names()


async def test_a_link_to_a_file_of_the_folder_is_sent_as_a_file(tmp_path: Path) -> None:
    async with mirrored(tmp_path) as folder:
        (tmp_path / "real").write_bytes(b"x")
        (tmp_path / "link").symlink_to("real")
        await until(lambda: folder.bucket() == {"real": b"x", "link": b"x"})
        assert await folder.end(whole=True) is None


async def test_nothing_is_sent_while_the_permit_is_in_doubt(tmp_path: Path) -> None:
    class Lent(AlwaysPermitted):
        def __init__(self) -> None:
            self.given = anyio.Event()

        async def wait(self) -> None:
            await self.given.wait()

    permit = Lent()
    async with mirrored(tmp_path, permit=permit) as folder:
        (tmp_path / "a").write_bytes(b"x")
        await until(folder.mirror.unsent)
        await anyio.sleep(0.1)
        assert folder.store.calls == []
        permit.given.set()
        await folder.equal()


async def test_an_object_that_somebody_else_wrote_is_replaced_only_after_the_lease_was_confirmed(
    tmp_path: Path,
) -> None:
    class Doubted(AlwaysPermitted):
        doubts = 0

        async def doubt(self) -> None:
            self.doubts += 1

    permit = Doubted()
    async with mirrored(tmp_path, permit=permit) as folder:
        (tmp_path / "a").write_bytes(b"mine")
        await folder.equal()
        await folder.store.inner.put("p/a", b"foreign")
        (tmp_path / "a").write_bytes(b"mine again")
        await folder.equal()
    assert permit.doubts == 1
    assert "object_replaced" in folder.events.names()


async def test_a_restored_file_is_not_sent_again_and_its_deletion_is_mirrored(tmp_path: Path) -> None:
    store = ScriptedStore()
    etag = await store.inner.put("p/a", b"x", metadata=digest(b"x"))
    await store.inner.put("p/never seen", b"y")
    (tmp_path / "a").write_bytes(b"x")
    known = Stored(Stamp.of((tmp_path / "a").stat()), digest(b"x")["heeler-blake3"], etag)
    async with mirrored(tmp_path, store, stored={"a": known}) as folder:
        (tmp_path / "b").write_bytes(b"z")
        await until(lambda: "b" in folder.bucket())
        assert store.count("put", "p/a") == 0
        (tmp_path / "a").unlink()
        await until(lambda: "a" not in folder.bucket())
    assert set(folder.bucket()) == {"b", "never seen"}


async def test_a_burst_of_random_changes_ends_with_equal_sides(tmp_path: Path) -> None:
    seed = int(os.environ.get("HEELER_TEST_SEED") or random.randrange(1 << 30))
    print(f"seed {seed}")
    rng = random.Random(seed)

    async def sometimes_slow() -> None:
        await anyio.sleep(rng.choice([0, 0, 0.003, 0.02]))

    faults: list[object] = [rng.choice([sometimes_slow, transient(), ("after", transient())]) for _ in range(600)]
    async with mirrored(tmp_path, ScriptedStore(put=faults, delete=list(faults), upload=list(faults))) as folder:
        names = ["a", "b", "d/c", "d/e", "f"]
        steps: list[Callable[[Path], object]] = [
            lambda path: path.write_bytes(rng.randbytes(rng.choice([0, 5, 70_000]))),
            lambda path: path.write_bytes(rng.randbytes(5)),
            lambda path: path.unlink(missing_ok=True),
            lambda path: path.exists() and path.rename(path.with_name("r" + path.name)),
        ]
        (tmp_path / "d").mkdir()
        for _ in range(150):
            rng.choice(steps)(tmp_path / rng.choice(names))
            if rng.random() < 0.4:
                await anyio.sleep(rng.choice([0, 0.005, 0.03]))
        assert await folder.end(whole=True) is None
    assert folder.bucket() == folder.files(), f"seed {seed}"


async def test_one_key_has_one_call_at_a_time(tmp_path: Path) -> None:
    busy: set[str] = set()

    class Watching(ScriptedStore):
        async def _do(self, method: str, key: str, call: Callable[[], Awaitable[object]]) -> object:
            if method in ("put", "upload", "delete"):
                assert key not in busy, f"two calls at once for {key}"
                busy.add(key)
                await anyio.sleep(0.01)
            try:
                return await super()._do(method, key, call)
            finally:
                busy.discard(key)

    async with mirrored(tmp_path, Watching()) as folder:
        for count in range(60):
            path = tmp_path / "a"
            if count % 3 == 2:
                path.unlink()
            else:
                path.write_bytes(b"%d" % count)
            await anyio.sleep(0.007)
        await folder.equal()
        assert await folder.end(whole=True) is None
