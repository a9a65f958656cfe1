"""`heeler sync watch`, and `push` and `pull` of plain keys."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.test_sync_commands import HEAD, URL, Sync, make, noise, picture
from tests.acceptance.world import BUCKET, MIB, World, eventually
from tests.support.backends import rclone
from tests.support.s3 import Stall


@pytest.fixture
def sync(world: World) -> Sync:
    return Sync(world)


class Watch:
    """A running `heeler sync watch` and what it has said."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self._threads = [threading.Thread(target=self._read, args=(pipe,)) for pipe in (process.stdout, process.stderr)]
        for thread in self._threads:
            thread.start()

    def _read(self, pipe: Iterator[str]) -> None:
        self.lines.extend(line.rstrip("\n") for line in pipe)

    def wait_for(self, words: str, count: int = 1) -> None:
        """Wait until so many of its lines hold these words."""
        eventually(lambda: self.process.poll() is not None or sum(words in line for line in self.lines) >= count, words)
        assert sum(words in line for line in self.lines) >= count, self.lines

    def end(self, number: int = signal.SIGTERM) -> int:
        """Tell it to stop; its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        code = self.process.wait(60)
        for thread in self._threads:
            thread.join()
        return code


@contextmanager
def watching(sync: Sync, *arguments: str | Path, **environment: str) -> Iterator[Watch]:
    watch = Watch(sync.start("watch", *arguments, **environment))
    try:
        yield watch
    finally:
        watch.process.kill()
        watch.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_folder_is_taken_at_once_by_quiet_and_at_the_end(sync: Sync, number: int) -> None:
    source = sync.tree(one=b"1")
    quick = {"HEELER_CHECKPOINT_QUIET": "0.3", "HEELER_COMMIT_INTERVAL": "0.1"}
    with watching(sync, source, URL, "--mode", "snapshot", **quick) as watch:
        watch.wait_for("committed generation 1")
        make(source, {"two": b"2"})
        watch.wait_for("committed generation 2: 2 files")
        make(source, {"three": b"3"})
        assert watch.end(number) == 0
    assert watch.lines[-1] == f"{URL} holds the folder in generation 3"
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == picture(source)
    assert sync.json("verify", URL)["findings"] == []


def test_with_a_ready_file_only_complete_states_are_taken(sync: Sync) -> None:
    source = sync.tree(weights=b"1")
    with watching(sync, source, URL, "--mode", "snapshot", "--ready", "*.done") as watch:
        watch.wait_for("watching ")
        make(source, {"weights": b"2"})
        time.sleep(3)
        assert not [line for line in watch.lines if "committed" in line], "no ready file was written"
        make(source, {"1.done": b""})
        watch.wait_for("committed generation 1: 2 files")
        make(source, {"weights": b"3"})
        assert watch.end() == 0
    sync.ok("pull", URL, "dst")
    assert (sync.folder / "dst/weights").read_bytes() == b"3", "the last is whole: a person said so"


def test_a_state_that_was_complete_before_the_watch_began_is_taken(sync: Sync) -> None:
    source = sync.tree(weights=b"1")
    time.sleep(0.1)
    make(source, {"1.done": b""})
    with watching(sync, source, URL, "--mode", "snapshot", "--ready", "*.done") as watch:
        watch.wait_for("committed generation 1: 2 files")
        assert watch.end() == 0


def test_a_watch_whose_prefix_is_taken_ends_and_says_by_whom(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    other = make(sync.folder / "other", {"two": b"2"})
    quick = {"HEELER_CHECKPOINT_QUIET": "0.3", "HEELER_COMMIT_INTERVAL": "0.1"}
    with watching(sync, source, URL, "--mode", "snapshot", **quick) as watch:
        watch.wait_for("committed generation 1")
        sync.ok("push", other, URL)
        make(source, {"one": b"11"})
        assert watch.wait() == 1
    assert "is held by heeler sync on" in watch.lines[-1]
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == picture(other)


def test_the_end_of_a_watch_is_bounded(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    with watching(sync, source, URL, "--mode", "snapshot", "--stop-grace", "1") as watch:
        watch.wait_for("committed generation 1")
        sync.storage.faults.add(Stall(), key="*/packs/*")
        make(source, {"two": noise(1000)})
        began = time.monotonic()
        assert watch.end() == 1
        assert time.monotonic() - began < 10
    assert "could not be sent within 1 s" in watch.lines[-1]
    sync.storage.faults.clear()
    assert [kept["generation"] for kept in sync.json("ls", URL)["head"]["kept"]] == [1]


def test_a_watched_mirror_sends_what_changes_and_deletes_what_goes(sync: Sync) -> None:
    source = sync.tree(one=b"1", two=b"2")
    sync.ok("push", source, URL)
    sync.storage.stats.reset()
    with watching(sync, source, URL) as watch:
        watch.wait_for("watching ")
        make(source, {"three": b"3"})
        watch.wait_for("uploaded p/three (1 B)")
        (source / "one").unlink()
        watch.wait_for("deleted p/one")
        make(source, {"last": b"4"})
        assert watch.end() == 0
    found = {key: data for key, data in sync.storage.objects(BUCKET).items() if key.startswith("p/")}
    assert found == {"p/two": b"2", "p/three": b"3", "p/last": b"4"}
    assert not [write for write in sync.writes() if "p/two" in write], "what was there was not sent again"
    assert "for snapshots" in sync.refused("watch", source, URL, "--ready", "x", code=64)


# Plain keys.


def test_plain_keys_go_there_and_back_and_only_what_differs_is_sent(sync: Sync) -> None:
    source = make(sync.tree(one=noise(20 * MIB), two=b"2"), {"sub/x": b"x"})
    sync.storage.put(BUCKET, "p/others", b"stay")
    assert "3 files uploaded" in sync.ok("push", source, URL)
    sync.storage.stats.reset()
    assert "unchanged" in sync.ok("push", source, URL)
    assert sync.writes() == []
    make(source, {"two": b"22"})
    (source / "one").unlink()
    assert sync.json("push", source, URL)["uploaded"] == 1
    assert set(sync.writes()) == {"PUT p/two"}  # R2 takes one write per key and second: the first may be refused
    assert {"p/one", "p/others"} <= set(sync.keys("p/")), "nothing is deleted"
    assert sync.json("pull", URL, "dst")["files"] == 4
    assert (sync.folder / "dst/two").read_bytes() == b"22"
    make(sync.folder / "dst", {"mine": b"m"})
    assert "1 other file (mine)" in sync.refused("pull", URL, "dst")
    found = sync.json("pull", URL, "dst", "--move-aside")
    assert (found["moved_aside"], found["written"]) == (2, 1), "of what others stored, no digest tells that it is there"
    assert (sync.folder / "dst/.heeler/aside/mine").read_bytes() == b"m"
    for _ in range(3):
        sync.ok("pull", URL, "dst")
    found = [str(path.relative_to(sync.folder / "dst/.heeler")) for path in (sync.folder / "dst/.heeler").rglob("*")]
    assert sorted(found) == ["aside", "aside.1", "aside.1/mine", "aside.1/others", "aside/others"]


def test_a_link_inside_the_folder_is_sent_once(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    (source / "link").symlink_to("one")
    assert sync.json("push", source, URL)["uploaded"] == 2
    assert sync.json("push", source, URL)["uploaded"] == 0


def test_plain_keys_are_not_pushed_beside_snapshots(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    sync.ok("push", source, URL, "--mode", "snapshot")
    assert "holds snapshots" in sync.refused("push", source, URL, "--mode", "mirror")
    assert "holds snapshots" in sync.refused("watch", source, URL, "--mode", "mirror")
    sync.storage.delete(BUCKET, HEAD)
    assert "holds snapshots" in sync.refused("push", source, URL, "--mode", "mirror")


def test_a_store_without_conditions_is_refused_for_snapshots_and_good_for_mirrors(sync: Sync, tmp_path: Path) -> None:
    source = make(sync.tree(one=noise(MIB), two=b"2"), {"sub/x": b"x"})
    folder = tmp_path / "rclone"
    folder.mkdir()
    with rclone(folder) as backend:
        backend.create(BUCKET)
        endpoint = backend.open("x")._once.config["endpoint"]  # type: ignore[attr-defined]
        here = {
            "AWS_ENDPOINT_URL_S3": str(endpoint),
            "AWS_ACCESS_KEY_ID": "rclone-key",
            "AWS_SECRET_ACCESS_KEY": "rclone-secret",
        }
        for provider in ("rclone", "s3"):  # told, and found out
            said = sync.run("push", source, URL, "--mode", "snapshot", "--s3-provider", provider, **here)
            assert said.returncode == 64, said
            assert "does not enforce If-Match" in said.stderr
        here["HEELER_S3_PROVIDER"] = "rclone"
        assert "3 files uploaded" in sync.ok("push", source, URL, **here)
        assert "3 files" in sync.ok("pull", URL, "dst", **here)
        assert "is whole as far as it can be checked" in sync.ok("verify", URL, **here)
        assert "3 objects" in sync.ok("ls", URL, **here)
    got = {path: (sync.folder / "dst" / path).read_bytes() for path in ("one", "two", "sub/x")}
    assert got == {path: (source / path).read_bytes() for path in got}
