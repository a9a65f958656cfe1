"""One folder's generations while a program runs: when they are committed, what hinders, what is told, what ends it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler_sync.errors import AccessDeniedError, FencedError, LocalFileError, NotNowError
from heeler_sync.paths import location
from heeler_sync.sender import AlwaysPermitted
from heeler_sync.session import Capture, Plan, Session
from heeler_sync.snapshot import capture, committer, folder, session
from heeler_sync.snapshot.capture import Look
from heeler_sync.snapshot.committer import SnapshotTimes
from heeler_sync.snapshot.holder import Claim, acquire
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Tree
from heeler_sync.snapshot.moments import QuietMoment, ReadyMoment
from heeler_sync.snapshot.scan import TICK_SECONDS, TreeScan, scan_tree
from heeler_sync.threads import in_thread
from heeler_sync.watch import CHANGED, CLOSED, GONE, Batch
from tests.support.stores import IMPATIENT, transient
from tests.support.virtual_time import VIRTUAL
from tests.unit.test_snapshot_restore import CHUNK, Job, noise, shrink, tree_of, write

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Watch:
    """In the place of `TreeWatch`: events come when a test tells them, or never."""

    latest: Watch

    def __init__(self, root: Path, on_news: Callable[[], None]) -> None:
        self._on_news = on_news
        self._batch = Batch()
        Watch.latest = self

    async def __aenter__(self) -> Watch:
        return self

    async def __aexit__(self, *_: object) -> None:
        return

    def drain(self) -> Batch:
        batch, self._batch = self._batch, Batch()
        return batch

    def tell(self, what: str, *names: str, rescan: bool = False) -> None:
        for name in names:
            self._batch.files.pop(name, None)
            self._batch.files[name] = what
        self._batch.rescan |= rescan
        self._on_news()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)
    monkeypatch.setattr(folder, "TreeWatch", Watch)
    # Files are stamped in real time, of which none passes here: none is younger than what was told of it.
    monkeypatch.setattr(session, "QuietMoment", partial(QuietMoment, wall=lambda: 2**62))


class Machine:
    """A job's folder on this machine while its program runs."""

    def __init__(self, root: Path) -> None:
        self.job = Job()
        self.root = root
        self.session: Session

    @asynccontextmanager
    async def watching(self, claim: Claim | None = None, ready: str | None = None) -> AsyncIterator[Session]:
        one = self.job.folder(self.root, ready=ready)
        self.session = self.job.session(Plan(before=(one,), during=(one,)), claim=claim)
        try:
            await self.session.restore()
            async with self.session.watching():
                await anyio.sleep(0.01)
                yield self.session
        finally:
            self.session.close()

    def write(self, name: str, data: bytes = b"x", *, told: str | None = CLOSED) -> None:
        write(self.root / name, data)
        if told is not None:
            Watch.latest.tell(told, name)

    def generation(self) -> int:
        return self.job.head().generation

    def files(self) -> dict[str, int]:
        """Of the newest generation: sizes by path."""
        tree = self.job.manifest(self.generation()).tree if self.generation() else Tree()
        return {path: entry.size for path, entry in tree.files.items()}

    async def until(self, generation: int, seconds: float = 600.0) -> float:
        """Wait for a generation; how long it took."""
        started = anyio.current_time()
        with anyio.move_on_after(seconds):
            while self.generation() < generation:  # noqa: ASYNC110 - a head in a dictionary has no event
                await anyio.sleep(0.1)
        assert self.generation() == generation
        return anyio.current_time() - started


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "data")


# By quiet.


async def test_a_tree_that_has_been_quiet_is_committed_and_not_before(machine: Machine) -> None:
    async with machine.watching():
        machine.write("a")
        await anyio.sleep(1.9)
        machine.write("b")
        await anyio.sleep(1.9)
        assert machine.generation() == 0
        assert await machine.until(1) < 5
        assert machine.files() == {"a": 1, "b": 1}


async def test_commits_by_quiet_are_some_time_apart_and_coalesce(machine: Machine) -> None:
    machine.job.times = SnapshotTimes(quiet=0.5, commit_interval=15.0)
    times: list[float] = []
    async with machine.watching():
        seen = 0
        for number in range(300):
            if number % 10 == 0:
                machine.write("step", b"x" * (number + 1))
            await anyio.sleep(0.2)
            if machine.generation() > seen:
                seen = machine.generation()
                times.append(anyio.current_time())
    assert 3 <= len(times) <= 5
    assert min(after - before for before, after in pairwise(times)) >= 14.7


async def test_nothing_new_is_no_new_generation(machine: Machine) -> None:
    async with machine.watching():
        machine.write("a")
        await machine.until(1)
        Watch.latest.tell(CHANGED, "a")
        await anyio.sleep(300)
        assert machine.generation() == 1
        assert await machine.session.checkpoint() == list(machine.job.head().kept)
        machine.session.freeze()
        await machine.session.flush(Capture(whole=True))
    assert machine.generation() == 1


async def test_what_no_event_told_is_found_by_the_next_scan(machine: Machine) -> None:
    async with machine.watching():
        await anyio.sleep(1)
        machine.write("a", told=None)
        assert await machine.until(1) < 130


@pytest.mark.parametrize("ready", [None, "ready"], ids=["by quiet", "by ready file"])
async def test_what_was_written_before_the_watch_began_is_committed_too(
    machine: Machine, ready: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting up the watch of a large tree takes seconds: the program runs already, and then computes for hours."""
    began = anyio.current_time()
    passed = lambda: time.time_ns() + int((anyio.current_time() - began) * 1e9)  # noqa: E731
    monkeypatch.setattr(ReadyMoment.__init__, "__defaults__", (passed,))
    one = machine.job.folder(machine.root, ready=ready)
    early = machine.job.session(Plan(before=(one,), during=(one,)))
    await early.restore()
    async with early.watching():
        write(machine.root / "model")
        write(machine.root / "ready")
        await anyio.sleep(1000)
        assert machine.generation() == 1
    early.close()


async def test_plain_keys_that_were_imported_are_committed_without_a_further_change(machine: Machine) -> None:
    await machine.job.store.inner.put("p/ck", b"by Kelpie")
    async with machine.watching():
        await anyio.sleep(1000)
        assert machine.job.told("checkpoint_never_settles") == []
        assert machine.generation() == 1


def hold_open(path: Path) -> subprocess.Popen[bytes]:
    with path.open("ab") as file:
        return subprocess.Popen(["sleep", "100"], stdout=file)


def test_a_file_that_another_process_holds_open_hinders_while_it_is_fresh(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "QuietMoment", QuietMoment)
    machine.job.times = SnapshotTimes(quiet=0.3)

    async def run() -> None:  # in real time, of which files are stamped
        async with machine.watching():
            machine.write("log")
            writer = hold_open(machine.root / "log")
            try:
                await anyio.sleep(1.2)
                assert machine.generation() == 0
            finally:
                writer.kill()
                writer.wait()
            await machine.until(1, 10.0)

    anyio.run(run)


# By the file that is written last.


async def test_the_ready_file_commits_at_once_however_short_ago_the_last_was(machine: Machine) -> None:
    async with machine.watching(ready="*/ready"):
        for number in range(1, 5):
            machine.write(f"{number}/model", noise(number, 100))
            await anyio.sleep(30)
            assert machine.generation() == number - 1
            machine.write(f"{number}/ready")
            assert await machine.until(number) < 3
            assert f"{number}/ready" in machine.files()


async def test_what_came_after_the_ready_file_is_of_the_next_checkpoint(machine: Machine) -> None:
    async with machine.watching(ready="ready"):
        machine.write("model", b"1")
        machine.write("ready", b"1")
        await machine.until(1)
        machine.write("model", b"22")
        await anyio.sleep(100)
        assert machine.files() == {"model": 1, "ready": 1}
        machine.write("ready", b"22")
        await machine.until(2)
        assert machine.files() == {"model": 2, "ready": 2}


async def test_a_log_that_is_appended_to_all_the_time_hinders_no_checkpoint(machine: Machine) -> None:
    async with machine.watching(ready="ready"):
        machine.write("log", b"line\n" * 30)
        machine.write("ready", b"1")
        await machine.until(1)
        machine.write("ready", b"2")
        machine.write("log", b"line\n" * 40)
        await machine.until(2)
        assert machine.files()["log"] in (150, 200)


# When asked.


async def test_a_checkpoint_that_is_asked_for_is_made_at_once_and_answered(machine: Machine) -> None:
    async with machine.watching() as session:
        for number in range(1, 4):
            machine.write("a", noise(number, 10 * number), told=CHANGED)
            started = anyio.current_time()
            (kept,) = await session.checkpoint()
            assert anyio.current_time() - started < 3
            assert (kept.generation, kept.files, kept.bytes) == (number, 1, 10 * number)
            assert machine.files() == {"a": 10 * number}


async def test_requests_that_come_together_are_one_commit(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a")
        answers = []

        async def ask() -> None:
            answers.append(await session.checkpoint())

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(ask)
        assert len(answers) == 5
        assert machine.generation() == 1


def changing(monkeypatch: pytest.MonkeyPatch, path: Path, times: int = 10**9) -> None:
    """Let a file change between any two scans."""
    left = [times]

    def scan(root: Path, include: Callable[[str], bool]) -> TreeScan:
        found = scan_tree(root, include)
        left[0] -= 1
        if left[0] >= 0:
            path.write_bytes(os.urandom(10))
        return found

    monkeypatch.setattr(capture, "scan_tree", scan)


async def test_a_checkpoint_that_can_not_be_had_now_names_the_file(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine.watching() as session:
        machine.write("still", told=None)
        machine.write("busy", told=None)
        changing(monkeypatch, machine.root / "busy")
        with pytest.raises(NotNowError, match="busy") as caught:
            await session.checkpoint()
        assert caught.value.path == "busy"
        assert machine.generation() == 0
        monkeypatch.setattr(capture, "scan_tree", scan_tree)
        assert len(await session.checkpoint()) == 1


async def test_a_checkpoint_asked_for_when_all_is_over_is_answered(machine: Machine) -> None:
    """The control API may ask at any time, also while the program's end is dealt with."""
    async with machine.watching() as session:
        machine.write("a")
        session.freeze()
        await session.flush(Capture(whole=True))
        with anyio.fail_after(60):
            try:
                await session.checkpoint()
            except LocalFileError:
                return


# The end.


async def test_a_program_that_ended_by_itself_is_captured_whole(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a", told=None)
        session.freeze()
        machine.write("b", told=None)
        await session.flush(Capture(whole=True))
        assert machine.files() == {"a": 1, "b": 1}


async def test_a_program_that_was_killed_adds_nothing_that_had_not_settled(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a")
        await machine.until(1)
        machine.write("a", b"half")
        await anyio.sleep(1.5)
        session.freeze()
        await anyio.sleep(100)
        await session.flush(Capture(whole=False))
        assert machine.files() == {"a": 1}
        assert machine.generation() == 1


async def test_what_had_settled_before_the_kill_is_committed_although_its_time_had_not_come(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a", b"1")
        await machine.until(1)
        machine.write("a", b"22")
        await anyio.sleep(8)
        assert machine.generation() == 1, "commits are 15 s apart"
        session.freeze()
        await session.flush(Capture(whole=False))
        assert machine.files() == {"a": 2}


def test_a_save_that_the_kill_cut_is_not_committed_though_its_events_are_still_on_their_way(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What settled before can't be had any more; half a save must not stand in for it."""
    monkeypatch.setattr(session, "QuietMoment", QuietMoment)
    machine.job.times = SnapshotTimes(quiet=0.3, commit_interval=30.0)

    async def run() -> None:  # in real time, of which files are stamped
        async with machine.watching() as running:
            machine.write("a", b"1")
            await machine.until(1, 5.0)
            machine.write("a", b"22")
            await anyio.sleep(0.7)
            machine.write("a", b"half a save", told=None)
            running.freeze()
            await running.flush(Capture(whole=False))

    anyio.run(run)
    assert machine.files() == {"a": 1}


@pytest.mark.parametrize("after", [0.0, 0.04])
async def test_a_ready_file_that_the_kill_may_have_closed_does_not_count(machine: Machine, after: float) -> None:
    async with machine.watching(ready="ready") as session:
        machine.write("model")
        machine.write("ready")
        await anyio.sleep(after)
        session.freeze()
        await session.flush(Capture(whole=False))
        assert machine.generation() == 0


async def test_a_ready_file_that_was_closed_well_before_the_kill_counts(machine: Machine) -> None:
    async with machine.watching(ready="ready") as session:
        machine.write("model")
        await in_thread(time.sleep, TICK_SECONDS)  # in one tick only the order tells, and that takes its time
        machine.write("ready")
        await anyio.sleep(0.2)
        session.freeze()
        await session.flush(Capture(whole=False))
        assert machine.files() == {"model": 1, "ready": 1}


async def half_a_save(machine: Machine) -> None:
    """All but the ready file is written anew; the program dies in writing that, before we were told of any of it."""
    await in_thread(time.sleep, TICK_SECONDS)
    machine.write("model", b"22", told=None)
    await in_thread(time.sleep, TICK_SECONDS)
    machine.write("ready", b"", told=None)


async def test_a_ready_file_that_the_kill_closed_while_the_folder_was_looked_at_does_not_count(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large folder is looked at for longer than the moment that a program must live on."""
    look = capture.look

    async def slow(*arguments: Any) -> Look:
        await anyio.sleep(0.2)
        return await look(*arguments)

    monkeypatch.setattr(committer, "look", slow)
    async with machine.watching(ready="ready") as session:
        machine.write("model")
        await in_thread(time.sleep, TICK_SECONDS)
        machine.write("ready")
        await anyio.sleep(0.1)
        await half_a_save(machine)
        session.freeze()
        await session.flush(Capture(whole=False))
        assert machine.generation() == 0


async def test_a_ready_file_that_the_kill_closed_does_not_count_for_one_that_was_complete_before(
    machine: Machine,
) -> None:
    async with machine.watching(ready="ready") as session:
        machine.write("model")
        await in_thread(time.sleep, TICK_SECONDS)
        machine.job.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")]
        machine.write("ready")
        await anyio.sleep(0.3)
        await half_a_save(machine)
        session.freeze()
        await session.flush(Capture(whole=False))
        assert machine.generation() == 0


async def test_a_ready_file_that_is_being_written_is_not_looked_at_with_each_of_its_changes(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[float] = []

    async def held(*_: object) -> Look:
        looks.append(anyio.current_time())
        raise NotNowError("ready", "is open for writing")

    monkeypatch.setattr(committer, "look", held)
    async with machine.watching(ready="ready"):
        for _ in range(3000):
            Watch.latest.tell(CHANGED, "ready")
            await anyio.sleep(0.01)
    assert 3 <= len(looks) <= 15, "each is a walk through the folder and through /proc"


async def test_a_refusal_for_good_at_the_end_is_raised(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a")
        session.freeze()
        machine.job.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")] * 99
        with pytest.raises(AccessDeniedError):
            await session.flush(Capture(whole=True), result={"exit_code": 0})
        assert not machine.job.head().complete


async def test_a_folder_that_goes_on_changing_after_the_end_is_an_error_and_no_success(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine.watching() as session:
        machine.write("busy")
        changing(monkeypatch, machine.root / "busy")
        with pytest.raises(LocalFileError, match="busy"):
            await session.flush(Capture(whole=True), result={"exit_code": 0})
        assert not machine.job.head().complete


async def test_the_result_comes_with_the_last_generation_in_one_write(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a")
        await machine.until(1)
        machine.write("a", b"last")
        puts = machine.job.store.count("put", "p/.heeler/head.json")
        await session.flush(Capture(whole=True), result={"exit_code": 0})
        assert machine.job.store.count("put", "p/.heeler/head.json") == puts + 1
    assert machine.files() == {"a": 4}
    assert machine.job.head().complete
    assert machine.job.head().result == {"exit_code": 0}


# What goes wrong meanwhile.


async def test_a_commit_that_fails_is_told_and_tried_again(machine: Machine) -> None:
    async with machine.watching():
        machine.job.store.scripts["put"] = [transient("PutObject")] * 10_000
        machine.write("a")
        await anyio.sleep(60)
        assert machine.generation() == 0
        told = machine.job.told("commit_failed")
        assert told
        assert "503" in str(told[0]["error"])
        machine.job.store.scripts["put"] = []
        await machine.until(1)


@pytest.mark.parametrize("ready", [None, "ready"], ids=["by quiet", "by ready file"])
async def test_a_commit_whose_upload_failed_is_tried_again_when_it_was_said(
    machine: Machine, ready: str | None
) -> None:
    """All was read, and then a pack was refused: the tree is as complete as before."""
    async with machine.watching(ready=ready):
        machine.write("model")
        await in_thread(time.sleep, TICK_SECONDS)
        machine.job.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")] * 3
        machine.write("ready")
        assert await machine.until(1) < 30, "it waited for the next scan"
        assert max(float(str(told["retry_in"])) for told in machine.job.told("commit_failed")) < 10


async def test_a_checkpoint_whose_upload_had_failed_before_the_kill_is_committed_at_the_end(machine: Machine) -> None:
    async with machine.watching(ready="ready") as session:
        machine.write("model")
        await in_thread(time.sleep, TICK_SECONDS)
        machine.job.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")]
        machine.write("ready")
        await anyio.sleep(0.3)
        assert len(machine.job.told("commit_failed")) == 1
        session.freeze()
        await session.flush(Capture(whole=False))
        assert machine.files() == {"model": 1, "ready": 1}


async def test_a_refusal_while_the_program_runs_is_told_and_tried_again(machine: Machine) -> None:
    async with machine.watching():
        machine.job.store.scripts["put"] = [AccessDeniedError("PutObject", "bucket", "k", "403")] * 2
        machine.write("a")
        await machine.until(1)
        assert len(machine.job.told("commit_failed")) == 2


async def test_a_folder_that_the_program_deletes_and_makes_anew_goes_on_being_committed(machine: Machine) -> None:
    async with machine.watching():
        machine.write("a", b"1")
        await machine.until(1)
        shutil.rmtree(machine.root)
        Watch.latest.tell(GONE, "a")
        await anyio.sleep(30)
        assert machine.files() == {"a": 1}, "a folder that is gone is no empty folder"
        machine.root.mkdir()
        write(machine.root / "b", b"22")
        await machine.until(2)
        assert machine.files() == {"b": 2}
        machine.write("c")
        await machine.until(3)


async def test_a_folder_that_is_gone_at_the_end_leaves_the_last_generation(machine: Machine) -> None:
    async with machine.watching() as session:
        machine.write("a")
        await machine.until(1)
        shutil.rmtree(machine.root)
        await session.flush(Capture(whole=True))
    assert machine.files() == {"a": 1}


async def test_a_tree_that_never_settles_is_warned_of_once_with_the_file_that_hinders(machine: Machine) -> None:
    async with machine.watching():
        for number in range(400):
            machine.write("log", b"x" * (number % 7 + 1), told=CHANGED)
            await anyio.sleep(1.0)
        assert machine.generation() == 0
        (told,) = machine.job.told("checkpoint_never_settles")
        assert told["file"] == "log"
        assert told["folder"] == str(machine.root)


async def test_a_tree_that_can_not_be_had_at_one_instant_is_warned_of_by_name(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with machine.watching():
        machine.write("busy")
        changing(monkeypatch, machine.root / "busy")
        await anyio.sleep(400)
        assert [told["file"] for told in machine.job.told("checkpoint_never_settles")] == ["busy"]


async def test_what_is_left_out_is_told_once_with_the_reason(machine: Machine) -> None:
    async with machine.watching():
        machine.write("a")
        (machine.root / "out").symlink_to("/etc/passwd")
        await anyio.sleep(300)
        (told,) = machine.job.told("file_left_out")
        assert (told["file"], machine.files()) == ("out", {"a": 1})


# Fenced.


async def overtake(machine: Machine, claim: Claim, *, commit: bool = False) -> None:
    """Somebody else takes the prefix."""
    layout = Layout(machine.job.store.inner, location("bucket", "p/"), IMPATIENT)
    other = await acquire(layout, claim, AlwaysPermitted(), machine.job.events)
    if commit:
        await other.commit(Tree())


async def test_a_worker_that_was_superseded_stops_and_changes_nothing(machine: Machine) -> None:

    async def run() -> None:
        async with machine.watching():
            machine.write("a")
            await machine.until(1)
            await overtake(machine, Claim("job", "", 99, "newer"))
            machine.write("a", b"22")
            await anyio.sleep(1000)

    with pytest.raises(FencedError, match="newer"):
        await run()
    assert (machine.job.head().holder, machine.generation()) == ("newer", 1)


UNORDERED = Claim("job", "", 1, "us", ordered=False)


async def test_where_attempts_do_not_order_a_holder_takes_its_prefix_back(machine: Machine) -> None:
    async with machine.watching(claim=UNORDERED):
        machine.write("a", noise(1, 10 * CHUNK))
        await machine.until(1)
        await overtake(machine, Claim("job", "", 1, "a ghost", ordered=False))
        machine.write("a", noise(1, 10 * CHUNK) + b"more")
        await machine.until(2)
        assert machine.job.head().holder == "us"
        assert len(machine.job.told("regained")) == 1
    await machine.job.restore(machine.root.with_name("other"), claim=UNORDERED)
    assert tree_of(machine.root.with_name("other")) == tree_of(machine.root)


async def test_a_prefix_is_taken_back_three_times_and_no_more(machine: Machine) -> None:

    async def run() -> None:
        async with machine.watching(claim=UNORDERED):
            for number in range(1, 9):
                machine.write("a", b"x" * number)
                await machine.until(number)
                await overtake(machine, Claim("job", "", 1, "a ghost", ordered=False))

    with pytest.raises(FencedError):
        await run()
    assert len(machine.job.told("regained")) == 3


async def test_a_prefix_with_a_foreign_generation_is_not_taken_back(machine: Machine) -> None:

    async def run() -> None:
        async with machine.watching(claim=UNORDERED):
            machine.write("a")
            await machine.until(1)
            await overtake(machine, Claim("job", "", 1, "a ghost", ordered=False), commit=True)
            machine.write("a", b"22")
            await anyio.sleep(1000)

    with pytest.raises(FencedError):
        await run()
    assert machine.job.head().holder == "a ghost"
