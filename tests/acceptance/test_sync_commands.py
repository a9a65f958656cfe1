"""`heeler sync push` and `pull` of snapshots: what goes in comes out, nothing is lost midway, nothing sent twice.

`Sync` is what the other tests of `heeler sync` use too.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from heeler_sync.snapshot.head import Head, decode_head, encode_head
from tests.acceptance.world import BUCKET, MIB, World, eventually
from tests.support.s3 import Corrupt, Delay, Stall
from tests.support.worker import heeler

Said = subprocess.CompletedProcess[str]
URL = f"s3://{BUCKET}/p/"
HEAD = "p/.heeler/head.json"
WRITES = {"PUT", "POST", "DELETE"}


class Sync:
    """The command line of `heeler sync` in one folder, with one state folder."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.folder = world.folder
        self.storage = world.storage
        self.env = world.environment(HEELER_STATE_DIR=str(world.folder / "state"))

    def run(self, *arguments: str | Path, **environment: str) -> Said:
        """One command to its end."""
        words = [str(word) for word in arguments]
        return heeler("sync", *words, env={**self.env, **environment}, cwd=self.folder)

    def ok(self, *arguments: str | Path, **environment: str) -> str:
        """One command that succeeds; its standard output."""
        said = self.run(*arguments, **environment)
        assert said.returncode == 0, said
        return said.stdout

    def json(self, *arguments: str | Path, code: int = 0) -> Any:
        """What a command says with --json."""
        said = self.run(*arguments, "--json")
        assert said.returncode == code, said
        return json.loads(said.stdout)

    def refused(self, *arguments: str | Path, code: int = 1, **environment: str) -> str:
        """The one line of complaint of a command that fails."""
        said = self.run(*arguments, **environment)
        assert said.returncode == code, said
        assert "Traceback" not in said.stderr
        lines = [line for line in said.stderr.splitlines() if not line.startswith("warning: ")]
        assert len(lines) == 1, said.stderr
        assert lines[0].startswith("heeler: ")
        return lines[0]

    def start(self, *arguments: str | Path, **environment: str) -> subprocess.Popen[str]:
        """A command that runs beside the test."""
        return subprocess.Popen(
            [sys.executable, "-m", "heeler", "sync", *(str(word) for word in arguments)],
            env={**self.env, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def tree(self, **files: bytes) -> Path:
        """A folder with these files."""
        return make(self.folder / "src", {name.replace("_", "."): data for name, data in files.items()})

    def writes(self) -> list[str]:
        """What changed storage, or tried to, since the counts were reset."""
        found = self.storage.stats.snapshot().log
        return [f"{record.method} {record.key}" for record in found if record.method in WRITES]

    def head(self, key: str = HEAD) -> Head:
        """The head of the prefix."""
        return decode_head(self.storage.objects(BUCKET)[key])

    def set_head(self, **changes: Any) -> Head:
        """Write the head anew, as others would have."""
        head = replace(self.head(), **changes)
        self.storage.put(BUCKET, HEAD, encode_head(head))
        return head

    def keys(self, part: str) -> list[str]:
        """The keys that hold a text."""
        return sorted(key for key in self.storage.objects(BUCKET) if part in key)


@pytest.fixture
def sync(world: World) -> Sync:
    return Sync(world)


def make(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def noise(size: int) -> bytes:
    return os.urandom(size)


def picture(root: Path) -> dict[bytes, object]:
    """All that a folder holds, with modes, times, links and bytes, but for heeler's own."""
    found: dict[bytes, object] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        if b".heeler" in folders and os.fsdecode(folder) == str(root):
            folders.remove(b".heeler")
        for name in [*folders, *files]:
            path = folder + b"/" + name
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            what: object = None
            if stat.S_ISLNK(status.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(status.st_mode):
                what = (Path(os.fsdecode(path)).read_bytes(), stat.S_IMODE(status.st_mode), status.st_mtime_ns)
            else:
                what = stat.S_IMODE(status.st_mode)
            found[os.path.relpath(path, os.fsencode(root))] = (kind, what)
    return found


def rich_tree(root: Path) -> Path:
    """A folder with what folders can have."""
    make(root, {"a/deep/er/file": b"hello", "empty-file": b"", "big": noise(3 * MIB + 17), "same": b"hello"})
    make(root, {"spaces and ü/\N{SNOWMAN}": b"snow", "line\nbreak": b"1", "sparse": b"\0" * (2 * MIB)})
    (root / os.fsdecode(b"not-\xff-utf8")).write_bytes(b"bytes")
    (root / "empty/nested").mkdir(parents=True)
    (root / "link").symlink_to("a/deep")
    (root / "a/up").symlink_to("../big")
    (root / "a/deep/er/file").chmod(0o4751)
    (root / "a/deep/er/file").chmod(0o751)
    (root / "big").chmod(0o400)
    (root / "empty").chmod(0o700)
    os.utime(root / "same", ns=(1, 1_234_567_890_123_456_789))
    return root


def test_what_is_pushed_is_pulled_to_the_last_bit(sync: Sync) -> None:
    source = rich_tree(sync.folder / "src")
    assert "generation 1 committed: 8 files" in sync.ok("push", source, URL, "--mode", "snapshot")
    sync.ok("pull", URL, "deep/er/dst")
    assert picture(sync.folder / "deep/er/dst") == picture(source)
    assert sync.json("verify", URL)["findings"] == []


def test_a_second_pull_reads_no_pack_and_one_of_a_newer_generation_only_what_is_new(sync: Sync) -> None:
    source = sync.tree(one=noise(5 * MIB), two=noise(100))
    sync.ok("push", source, URL, "--mode", "snapshot")
    assert sync.json("pull", URL, "dst")["written"] == 2
    assert sync.json("pull", URL, "dst") | {"received": 0, "written": 0, "kept": 2} == sync.json("pull", URL, "dst")
    make(source, {"two": b"new"})
    sync.ok("push", source, URL)
    found = sync.json("pull", URL, "dst")
    assert (found["generation"], found["written"], found["kept"]) == (2, 1, 1)
    assert found["received"] < 1000
    assert picture(sync.folder / "dst") == picture(source)


def test_an_unchanged_folder_is_pushed_without_any_write(sync: Sync) -> None:
    source = rich_tree(sync.folder / "src")
    sync.ok("push", source, URL, "--mode", "snapshot")
    sync.storage.stats.reset()
    assert "unchanged: generation 1" in sync.ok("push", source, URL)
    assert sync.json("push", source, URL)["changed"] is False
    # Another machine knows of no stamp: it reads the files, and finds them the same.
    assert "unchanged: generation 1" in sync.ok("push", source, URL, "--state-dir", sync.folder / "other")
    assert "unchanged: generation 1" in sync.ok("push", source, URL, "--state-dir", sync.folder / "other")
    assert sync.writes() == []
    assert sync.storage.stats.snapshot().find(), "it did ask"


def test_every_kind_of_change_makes_a_generation(sync: Sync) -> None:
    source = make(sync.tree(one=b"one", two=b"two"), {"sub/x": b"x"})
    sync.ok("push", source, URL, "--mode", "snapshot")
    changes: list[Callable[[], object]] = [
        lambda: (source / "one").write_bytes(b"eno"),
        lambda: (source / "one").chmod(0o600),
        lambda: os.utime(source / "one", ns=(1, 1)),
        (source / "one").unlink,
        lambda: (source / "three").write_bytes(b""),
        (source / "folder").mkdir,
        lambda: (source / "link").symlink_to("two"),
        lambda: (source / "sub").chmod(0o700),
    ]
    for number, change in enumerate(changes, 2):
        change()
        assert sync.json("push", source, URL)["generation"] == number, number
        assert sync.json("push", source, URL)["changed"] is False, number
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == picture(source)


def test_a_file_with_other_bytes_and_its_old_size_and_time_is_noticed(sync: Sync) -> None:
    source = sync.tree(one=b"one", two=b"two")
    sync.ok("push", source, URL, "--mode", "snapshot")
    status = (source / "one").stat()
    (source / "one").write_bytes(b"eno")
    os.utime(source / "one", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sync.json("push", source, URL)["changed"] is True
    (source / "one").write_bytes(b"noe")
    os.utime(source / "one", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sync.json("push", source, URL, "--state-dir", sync.folder / "other")["changed"] is True


def test_what_is_known_of_files_is_not_taken_for_what_another_machine_pushed(sync: Sync) -> None:
    source, other = sync.tree(one=b"one"), make(sync.folder / "other", {"one": b"eno"})
    for root in (source, other):
        os.utime(root / "one", ns=(1, 1_000_000_000))
    sync.ok("push", source, URL, "--mode", "snapshot")
    assert sync.json("push", other, URL, "--state-dir", sync.folder / "b")["generation"] == 2
    assert sync.json("push", source, URL)["generation"] == 3


def test_what_is_known_of_files_is_good_for_every_prefix(sync: Sync) -> None:
    source = sync.tree(one=b"one")
    sync.ok("push", source, URL, "--mode", "snapshot")
    os.utime(source / "one", ns=(1, 1_000_000_000))
    sync.ok("push", source, f"s3://{BUCKET}/q/", "--mode", "snapshot")
    assert sync.json("push", source, URL)["generation"] == 2, "its time is another one there"
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == picture(source)


def test_a_small_change_sends_little_and_the_last_two_generations_are_kept(sync: Sync) -> None:
    source = sync.tree(big=noise(20 * MIB), small=b"1")
    sync.ok("push", source, URL, "--mode", "snapshot")
    with (source / "big").open("r+b") as file:
        file.seek(7 * MIB + 5)
        file.write(b"changed")
    sync.storage.stats.reset()
    assert sync.json("push", source, URL)["generation"] == 2
    assert sync.storage.stats.snapshot().bytes_in < 1.2 * MIB
    make(source, {"small": b"22"})
    sync.ok("push", source, URL)
    assert [kept["generation"] for kept in sync.json("ls", URL)["head"]["kept"]] == [2, 3]
    sync.ok("pull", URL, "dst", "--generation", "2")
    assert (sync.folder / "dst/small").read_bytes() == b"1"


def test_a_push_that_is_killed_changes_nothing_and_the_next_does_not_send_it_all_again(sync: Sync) -> None:
    source = sync.tree(old=noise(MIB))
    sync.ok("push", source, URL, "--mode", "snapshot")
    before = picture(source)
    make(source, {"new": noise(40 * MIB)})
    stall = sync.storage.faults.add(Stall(), operation="PutObject", key="*/packs/*", nth=4, count=1000)
    push = sync.start("push", source, URL)
    stall.wait_held(1, 20)
    eventually(lambda: len(sync.keys("/packs/")) >= 4, "three packs of the new file are there")
    push.kill()
    push.communicate()
    sync.storage.faults.clear()
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == before
    assert sync.json("verify", URL)["whole"]
    sync.storage.stats.reset()
    assert sync.json("push", source, URL)["generation"] == 2
    assert sync.storage.stats.snapshot().bytes_in < 30 * MIB, "three packs of 8 MiB were there"
    sync.ok("pull", URL, "dst", "--move-aside")
    assert picture(sync.folder / "dst") == picture(source)
    assert sync.json("verify", URL)["findings"] == []
    assert list((sync.folder / "state/sync-spool").iterdir()) == []


def test_a_pushs_packs_are_not_taken_for_granted_where_the_prefix_was_deleted(sync: Sync) -> None:
    source = sync.tree(new=noise(20 * MIB))
    stall = sync.storage.faults.add(Stall(), operation="PutObject", key="*/packs/*", nth=2, count=1000)
    push = sync.start("push", source, URL, "--mode", "snapshot")
    stall.wait_held(1, 20)
    eventually(lambda: sync.keys("/packs/"), "a pack is there")
    time.sleep(0.3)
    push.kill()
    push.communicate()
    sync.storage.faults.clear()
    for key in sync.keys("/packs/"):
        sync.storage.delete(BUCKET, key)
    sync.ok("push", source, URL)
    assert sync.json("verify", URL)["findings"] == []


def test_a_pull_that_is_killed_goes_on_where_it_was(sync: Sync) -> None:
    source = sync.tree(**{f"file{number}": noise(8 * MIB) for number in range(6)})
    sync.ok("push", source, URL, "--mode", "snapshot")
    stall = sync.storage.faults.add(Stall(), operation="GetObject", key="*/packs/*", nth=4, count=1000)
    pull = sync.start("pull", URL, "dst")
    stall.wait_held(1, 20)
    time.sleep(1.0)  # what came is on disk
    pull.kill()
    pull.communicate()
    sync.storage.faults.clear()
    sync.storage.stats.reset()
    assert "generation 1" in sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == picture(source)
    assert sync.storage.stats.snapshot().bytes_out < 30 * MIB
    assert not (sync.folder / "dst/.heeler/incoming").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_push_that_is_interrupted_ends_at_once_and_says_so(sync: Sync, number: int, code: int) -> None:
    source = sync.tree(new=noise(30 * MIB))
    sync.storage.faults.add(Stall(seconds=3), operation="PutObject", key="*/packs/*")
    push = sync.start("push", source, URL, "--mode", "snapshot")
    sync.storage.stats.wait_until(lambda seen: bool(seen.find("PutObject", HEAD)), 20)
    time.sleep(0.5)
    began = time.monotonic()
    push.send_signal(number)
    _, said = push.communicate(timeout=20)
    assert time.monotonic() - began < 9
    assert push.returncode == code
    assert "Traceback" not in said
    sync.storage.faults.clear()
    sync.ok("push", source, URL)
    assert list((sync.folder / "state/sync-spool").iterdir()) == []


# Whose prefix it is.


def test_a_push_to_a_jobs_prefix_is_refused_by_the_jobs_name(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    sync.ok("push", source, URL, "--mode", "snapshot")
    before = sync.set_head(job_id="train-7", run_id="r1", attempt=3)
    make(source, {"one": b"2"})
    sync.storage.stats.reset()
    for arguments in ((), ("--job-id", "other")):
        said = sync.refused("push", source, URL, *arguments)
        assert "belongs to job train-7" in said
        assert "would take the prefix from its worker" in said
        assert "--job-id train-7" in said
    assert sync.refused("watch", source, URL)
    assert sync.writes() == []
    sync.ok("push", source, URL, "--job-id", "train-7")
    head = sync.head()
    assert (head.job_id, head.run_id, head.attempt, head.epoch) == ("train-7", "r1", 3, before.epoch + 1)
    assert head.kept[-1].run_id == "r1"
    sync.set_head(status="complete", result={})
    make(source, {"one": b"3"})
    sync.storage.stats.reset()
    assert "job train-7, which is done" in sync.refused("push", source, URL, "--job-id", "train-7")
    assert sync.writes() == []


def test_a_pushed_folder_is_where_a_job_begins(sync: Sync) -> None:
    source = sync.tree(start=b"41")
    sync.ok("push", source, f"s3://{BUCKET}/job-1/ck/", "--mode", "snapshot")
    world = sync.world
    entry = {**world.entry("ck"), "mode": "snapshot"}
    program = world.bash('cd "$CHECKPOINT_DIR"; echo $(($(cat start) + 1)) > start')
    world.submit(program, sync={"before": [entry], "during": [entry]})
    with world.worker("--max-jobs", "1") as worker:
        assert worker.wait() == 0
    assert world.job().state == "done"
    sync.ok("pull", f"s3://{BUCKET}/job-1/ck/", "dst")
    assert (sync.folder / "dst/start").read_bytes() == b"42\n"
    assert "job job-1" in sync.refused("push", source, f"s3://{BUCKET}/job-1/ck/")


def test_two_pushes_at_once_leave_a_whole_prefix(sync: Sync) -> None:
    sources = [make(sync.folder / name, {"file": noise(3 * MIB), "name": name.encode()}) for name in ("x", "y")]
    sync.storage.faults.add(Delay(0.2), operation="PutObject", key="*/packs/*")
    pushes = [sync.start("push", source, URL, "--mode", "snapshot") for source in sources]
    ended = [(push.communicate(timeout=60)[1], push.returncode) for push in pushes]
    assert 0 in [code for _, code in ended], ended
    for said, code in ended:
        assert code == 0 or "is held by heeler sync on" in said, ended
    assert sync.json("verify", URL)["whole"]
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") in [picture(source) for source in sources]


def test_plain_keys_stay_beside_the_first_generation_and_that_is_said(sync: Sync) -> None:
    sync.storage.put(BUCKET, "p/plain", b"x")
    said = sync.run("push", sync.tree(one=b"1"), URL, "--mode", "snapshot")
    assert said.returncode == 0
    assert "holds plain keys: they stay" in said.stderr
    sync.ok("pull", URL, "dst")
    assert sorted(picture(sync.folder / "dst")) == [b"one"]
    assert sync.storage.objects(BUCKET)["p/plain"] == b"x"


# The folder that is pulled into.


def test_other_files_in_the_folder_are_named_and_stay_unless_they_may_be_moved(sync: Sync) -> None:
    source = sync.tree(one=b"1", two=b"2")
    sync.ok("push", source, URL, "--mode", "snapshot")
    target = make(sync.folder / "dst", {"mine/precious": b"p", "two": b"old", "b": b"", "c": b"", "d": b""})
    before = picture(target)
    said = sync.refused("pull", URL, "dst")
    assert "holds 4 other files (b, c, d ...)" in said
    assert "--move-aside" in said
    assert picture(target) == before
    assert sync.json("pull", URL, "dst", "--move-aside")["moved_aside"] == 4
    assert (target / ".heeler/aside/mine/precious").read_bytes() == b"p"
    assert picture(target) == picture(source)
    # A second pull does not delete what the first moved aside.
    make(target, {"later": b"l"})
    sync.ok("pull", URL, "dst", "--move-aside")
    found = {path.read_bytes() for path in (target / ".heeler").rglob("*") if path.is_file()}
    assert {b"p", b"l"} <= found


@pytest.mark.parametrize("folder", ["/", "/etc", "/usr/local/x", "/tmp", "HOME", "state", "state/x", ".", "file"])
def test_folders_that_others_need_are_not_pulled_into(sync: Sync, folder: str) -> None:
    sync.ok("push", sync.tree(one=b"1"), URL, "--mode", "snapshot")
    (sync.folder / "file").write_bytes(b"")
    target = str(Path.home()) if folder == "HOME" else folder
    assert "DIR" in sync.refused("pull", URL, target, code=64)


def test_a_folder_that_a_job_uses_now_is_not_pulled_into(sync: Sync) -> None:
    sync.ok("push", sync.tree(one=b"1"), URL, "--mode", "snapshot")
    sync.storage.faults.add(Delay(3), operation="GetObject", key="*/packs/*")
    first = sync.start("pull", URL, "dst")
    sync.storage.stats.wait_until(lambda seen: len(seen.find("GetObject")) >= 2, 20)
    time.sleep(0.5)
    assert "is in use" in sync.refused("pull", URL, "dst")
    first.communicate(timeout=30)
    assert first.returncode == 0


# Nothing to pull.


def test_nothing_is_never_pulled_as_an_empty_folder(sync: Sync) -> None:
    assert f"nothing at {URL}" in sync.refused("pull", URL, "dst")
    assert f"nothing at {URL}" in sync.refused("pull", URL, "dst", "--mode", "snapshot")
    assert not (sync.folder / "dst").exists()
    sync.ok("push", sync.tree(one=b"1"), URL, "--mode", "snapshot")
    assert "does not hold generation 7; it holds 1" in sync.refused("pull", URL, "dst", "--generation", "7", code=64)
    assert "leave --mode mirror out" in sync.refused("pull", URL, "dst", "--mode", "mirror")
    sync.set_head(kept=(), generation=0)
    assert "no generation was ever committed" in sync.refused("pull", URL, "dst")
    assert not (sync.folder / "dst").exists()


def test_a_damaged_generation_is_passed_over_and_said(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    sync.ok("push", source, URL, "--mode", "snapshot")
    before = picture(source)
    old = set(sync.keys("/packs/"))
    make(source, {"one": noise(1000)})
    sync.ok("push", source, URL)
    (new,) = set(sync.keys("/packs/")) - old
    sync.storage.put(BUCKET, new, noise(1000))
    said = sync.run("pull", URL, "dst")
    assert said.returncode == 0
    assert "warning: generation 2 is damaged" in said.stderr
    assert "generation 1 of" in said.stdout
    assert picture(sync.folder / "dst") == before
    assert "no generation that can be restored" in sync.refused("pull", URL, "dst2", "--generation", "2")


def test_bytes_that_were_damaged_on_the_way_are_fetched_again(sync: Sync) -> None:
    source = sync.tree(one=noise(100_000))
    sync.ok("push", source, URL, "--mode", "snapshot")
    rule = sync.storage.faults.add(Corrupt(50), operation="GetObject", key="*/packs/*", count=1)
    sync.ok("pull", URL, "dst")
    assert rule.hits == 1
    assert picture(sync.folder / "dst") == picture(source)


# What people see.


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("push", "none", URL), "DIR none is not there"),
        (("push", "file", URL), "DIR file is not a folder"),
        (("watch", "none", URL), "DIR none is not there"),
        (("pull", URL, "file"), "DIR file is not a folder"),
        (("push", ".", "jobs/p"), "'jobs/p' is not of the form s3://bucket/prefix/"),
        (("push", ".", "s3:///p"), "'' is not a bucket name"),
        (("pull", "s3://jobs/a/../b", "dst"), "'..' part"),
        (("ls", "https://jobs/p"), "is not of the form s3://bucket/prefix/"),
        (("push", ".", URL, "--mode", "both"), "--mode is 'both', but must be snapshot or mirror"),
        (("push", ".", "s3://none-such/p/"), "the bucket does not exist"),
        (("verify", "s3://none-such/p/"), "the bucket does not exist"),
        (("pull", URL, "dst", "--generation", "0"), "--generation"),
        (("push", "."), "Missing argument"),
        (("push", ".", URL, "--s3-timeout", "soon"), "--s3-timeout is 'soon'"),
        (("repair", URL, "--run-id", "r"), "--job-id"),
        (("nonsense",), "nonsense"),
    ],
)
def test_wrong_input_is_told_in_one_line(sync: Sync, arguments: tuple[str, ...], words: str) -> None:
    (sync.folder / "file").write_bytes(b"")
    assert words in sync.refused(*arguments, code=64)


@pytest.mark.parametrize("command", [("push", "src", URL), ("pull", URL, "dst"), ("ls", URL), ("verify", URL)])
def test_keys_that_are_refused_are_told_without_being_shown(sync: Sync, command: tuple[str, ...]) -> None:
    sync.tree(one=b"1")
    said = sync.run(*command, AWS_SECRET_ACCESS_KEY="wrong-secret-of-mine")
    assert said.returncode == 64
    assert "storage refuses us" in said.stderr
    assert "check bucket, keys and endpoint" in said.stderr
    assert "wrong-secret-of-mine" not in said.stdout + said.stderr


def test_storage_out_of_reach_is_told_within_the_limit(sync: Sync) -> None:
    sync.tree(one=b"1")
    began = time.monotonic()
    limit = ("--startup-timeout", "1")
    for address in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        said = sync.refused("push", "src", URL, *limit, code=69, AWS_ENDPOINT_URL_S3=address)
        assert "storage is out of reach" in said
    sync.storage.faults.add(Stall())
    assert "storage is out of reach" in sync.refused("ls", URL, *limit, code=69)
    assert time.monotonic() - began < 15


def test_a_pipe_gets_plain_lines_and_programs_get_json(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    plain: list[tuple[str | Path, ...]] = [("push", source, URL, "--mode", "snapshot"), ("ls", URL), ("verify", URL)]
    for command in (*plain, ("ls", URL, "--files")):
        said = sync.run(*command)
        assert said.stdout
        assert "\x1b" not in said.stdout + said.stderr
        assert "\r" not in said.stdout + said.stderr
    for command in (("push", source, URL), ("ls", URL), ("ls", URL, "--files"), ("verify", URL), ("pull", URL, "dst")):
        assert sync.json(*command)["location"] == URL


def test_a_terminal_gets_bars_and_tables(sync: Sync) -> None:
    source = sync.tree(one=noise(4 * MIB))
    sync.storage.faults.add(Delay(0.8), operation="PutObject", key="*/packs/*")
    shown = on_terminal(sync, "push", str(source), URL, "--mode", "snapshot")
    assert "sending" in shown
    assert "generation 1 committed" in shown
    assert "\x1b" in shown
    assert "GENERATION" in on_terminal(sync, "ls", URL)


def on_terminal(sync: Sync, *arguments: str) -> str:
    ours, theirs = pty.openpty()
    env = {**sync.env, "TERM": "xterm", "COLUMNS": "120"}
    command = [sys.executable, "-m", "heeler", "sync", *arguments]
    process = subprocess.Popen(command, env=env, cwd=sync.folder, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not data:
            break
        shown += data
    os.close(ours)
    assert process.wait(30) == 0, shown
    return shown.decode()


def test_names_from_storage_cannot_move_the_cursor(sync: Sync) -> None:
    make(sync.folder / "src", {"a\x1b[2Jb\nc": b""})
    sync.ok("push", "src", URL, "--mode", "snapshot")
    shown = sync.ok("ls", URL, "--files")
    assert "\x1b" not in shown
    assert "a\\x1b[2Jb\\nc" in shown


def test_a_reader_that_has_seen_enough_gets_no_traceback(sync: Sync) -> None:
    make(sync.folder / "src", {f"{number:05}": b"" for number in range(5000)})
    sync.ok("push", "src", URL, "--mode", "snapshot")
    command = f"{sys.executable} -m heeler sync ls {URL} --files | head -1"
    said = subprocess.run(["bash", "-c", command], env=sync.env, capture_output=True, text=True, check=False)
    assert said.stdout.startswith("MODE")
    assert said.stderr == ""


# The state folder.


def test_an_index_that_cannot_be_used_is_done_without_and_said(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    sync.ok("push", source, URL, "--mode", "snapshot")
    (sync.folder / "state/sync-index.db").write_bytes(b"this is no database" * 100)
    for name in ("-wal", "-shm"):
        (sync.folder / f"state/sync-index.db{name}").unlink(missing_ok=True)
    make(source, {"one": b"2"})
    said = sync.run("push", source, URL)
    assert said.returncode == 0
    assert "sync-index.db can't be used" in said.stderr
    (sync.folder / "file").write_bytes(b"")
    make(source, {"one": b"3"})
    said = sync.run("push", source, URL, "--state-dir", sync.folder / "file/state")
    assert said.returncode == 0
    assert said.stderr.count("can't be used") == 1
    assert sync.head().generation == 3


def test_spools_of_pushes_that_were_killed_are_removed(sync: Sync) -> None:
    left = sync.folder / "state/sync-spool/left"
    make(left, {"pack": b"x"})
    sync.ok("push", sync.tree(one=b"1"), URL, "--mode", "snapshot")
    assert not left.exists()


# Storage without conditions.


def test_storage_without_conditions_is_refused_unless_it_is_asked_for(sync: Sync) -> None:
    source = sync.tree(one=b"1")
    provider = ("--s3-provider", "rclone")
    said = sync.refused("push", source, URL, "--mode", "snapshot", *provider, code=64)
    assert "does not enforce If-Match" in said
    assert "mode mirror" in said
    assert "--allow-unfenced" in said
    assert sync.keys("p/") == []
    done = sync.run("push", source, URL, "--mode", "snapshot", "--allow-unfenced", *provider)
    assert done.returncode == 0
    assert "can't keep two writers apart" in done.stderr
