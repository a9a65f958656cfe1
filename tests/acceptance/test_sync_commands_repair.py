"""`heeler sync ls`, `verify` and `repair`: what is there is said, what is lost is named, and what can be is mended."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from heeler_sync.snapshot.ids import new_id
from tests.acceptance.test_sync_commands import HEAD, URL, Sync, make, noise, on_terminal, picture
from tests.acceptance.world import BUCKET, MIB, World
from tests.support.s3 import Corrupt


@pytest.fixture
def sync(world: World) -> Sync:
    return Sync(world)


def two_generations(sync: Sync) -> Path:
    """Two generations that share a pack."""
    source = sync.tree(one=noise(300_000), two=noise(1000))
    sync.ok("push", source, URL, "--mode", "snapshot")
    make(source, {"two": noise(1000), "three/x": b"x"})
    sync.ok("push", source, URL)
    return source


def lose_head(sync: Sync) -> None:
    sync.storage.delete(BUCKET, HEAD)


# ls


def test_ls_says_who_has_a_prefix_and_what_it_holds(sync: Sync) -> None:
    two_generations(sync)
    sync.set_head(job_id="train-7", run_id="r1", attempt=3, holder="worker-a")
    shown = sync.ok("ls", URL)
    for words in ("job train-7, attempt 3, run r1", "worker-a (epoch 2", "status   open", *sync.keys("/manifests/")):
        assert words in shown
    rows = [line.split() for line in shown.splitlines() if line[:1].isdigit()]
    assert [(row[0], row[3]) for row in rows] == [("2", "3"), ("1", "2")]
    found = sync.json("ls", URL)["head"]
    assert (found["job_id"], found["epoch"], [kept["files"] for kept in found["kept"]]) == ("train-7", 2, [2, 3])


def test_ls_lists_the_files_of_one_generation(sync: Sync) -> None:
    source = two_generations(sync)
    (source / "link").symlink_to("one")
    (source / "one").chmod(0o600)
    sync.ok("push", source, URL)
    shown = sync.ok("ls", URL, "--files")
    assert [line.split()[-1] for line in shown.splitlines()] == ["PATH", "one", "one", "three/", "three/x", "two"]
    assert "link -> one" in shown
    assert "0600  300.0 kB" in shown
    older = sync.json("ls", URL, "--generation", "2")
    assert [entry["path"] for entry in older["files"]] == ["one", "three/x", "two"]
    assert older["links"] == {}
    assert "does not hold generation 1; it holds 2, 3" in sync.refused("ls", URL, "--generation", "1", code=64)


def test_ls_of_plain_keys(sync: Sync) -> None:
    assert f"nothing at {URL}" in sync.refused("ls", URL)
    sync.storage.put(BUCKET, "p/a/b", b"12345")
    sync.storage.put(BUCKET, "p/c", b"")
    assert sync.ok("ls", URL).splitlines()[1:] == ["5 B   a/b", "0 B   c", "2 objects, 5 B"]
    assert sync.json("ls", URL)["objects"] == [{"path": "a/b", "size": 5}, {"path": "c", "size": 0}]
    assert "for snapshots" in sync.refused("ls", URL, "--files", code=64)


# verify


def test_verify_names_each_object_that_is_lost_and_what_to_do(sync: Sync) -> None:
    two_generations(sync)
    assert "is whole: 2 generations" in sync.ok("verify", URL)
    packs = {len(data): key for key, data in sync.storage.objects(BUCKET).items() if "/packs/" in key}
    newest = packs[min(packs)]
    good = sync.storage.objects(BUCKET)[newest]
    sync.storage.delete(BUCKET, newest)
    said = sync.run("verify", URL)
    assert said.returncode == 1
    assert f"missing: s3://{BUCKET}/{newest}" in said.stdout
    assert "generation 2 can't be restored; generation 1 is whole" in said.stdout
    sync.storage.put(BUCKET, newest, bytes(len(good)))
    found = sync.json("verify", URL, code=1)
    assert [(entry["kind"], entry["key"]) for entry in found["findings"]] == [("damaged", newest)]
    sync.storage.put(BUCKET, newest, good)
    manifest = next(key for key in sync.keys("/manifests/1."))
    sync.storage.delete(BUCKET, manifest)
    said = sync.run("verify", URL)
    assert said.returncode == 1
    assert f"missing: s3://{BUCKET}/{manifest}" in said.stdout


def test_verify_tells_garbage_from_what_is_lost(sync: Sync) -> None:
    two_generations(sync)
    old, current, odd = f"p/.heeler/packs/{new_id(1)}", f"p/.heeler/packs/{new_id(2)}", "p/.heeler/odd"
    for key in (old, current, odd):
        sync.storage.put(BUCKET, key, b"x")
    said = sync.run("verify", URL)
    assert said.returncode == 0
    for words in (
        f"garbage: s3://{BUCKET}/{old}",
        "garbage of an interrupted worker: the next worker collects it",
        f"under way: s3://{BUCKET}/{current}",
        "perhaps of a commit under way",
        f"foreign: s3://{BUCKET}/{odd}",
        "not ours",
        "is whole: 2 generations",
    ):
        assert words in said.stdout
    make(sync.folder / "src", {"new": b"n"})
    sync.ok("push", "src", URL)
    left = [entry["key"] for entry in sync.json("verify", URL)["findings"]]
    assert left == [odd], "the next push collected the rest"


def test_verify_is_not_fooled_by_a_push_that_goes_on_meanwhile(sync: Sync) -> None:
    source = two_generations(sync)
    for number in range(3):
        make(source, {"two": noise(200_000)})
        verify = sync.start("verify", URL, "--json")
        sync.ok("push", source, URL)
        said, _ = verify.communicate(timeout=60)
        assert verify.returncode == 0, said
        assert {entry["kind"] for entry in json.loads(said)["findings"]} <= {"under way", "garbage"}, number


def test_verify_of_plain_keys(sync: Sync) -> None:
    assert f"nothing at {URL}" in sync.refused("verify", URL)
    sync.ok("push", sync.tree(one=b"1", two=b"22"), URL)
    assert "is whole as far as it can be checked (2 objects, 3 B read)" in sync.ok("verify", URL)
    sync.storage.put(BUCKET, "p/three", b"333")
    aws = ("--s3-provider", "aws")
    assert f"unchecked: s3://{BUCKET}/p/three" in sync.ok("verify", URL, *aws)
    sync.storage.faults.add(Corrupt(0), operation="GetObject", key="p/two")
    said = sync.run("verify", URL)
    assert said.returncode == 1
    assert f"damaged: s3://{BUCKET}/p/two" in said.stdout
    assert "push the file again" in said.stdout


# repair


def test_a_head_that_is_lost_is_said_by_every_command_and_mended_by_repair(sync: Sync) -> None:
    source = two_generations(sync)
    lose_head(sync)
    before = sync.storage.objects(BUCKET)
    for command in (("push", "src", URL), ("pull", URL, "dst"), ("watch", "src", URL), ("ls", URL), ("verify", URL)):
        assert f"heeler sync repair {URL}" in sync.refused(*command)
    said = sync.run("repair", URL)
    assert said.returncode == 1
    assert "nothing was changed; to do it: --yes" in said.stderr
    for words in (
        "there is no head",
        "generation 2 (epoch 2) is whole: 3 files",
        "generation 1 (epoch 1) is whole: 2 files",
        "will list generation 2 and 1, with epoch 3",
        "nobody's: any job may take it over",
        "Stop all workers",
    ):
        assert words in said.stdout
    assert sync.storage.objects(BUCKET) == before
    assert "has a head again (epoch 3, generation 2)" in sync.ok("repair", URL, "--yes")
    assert sync.json("verify", URL)["findings"] == []
    sync.ok("pull", URL, "dst")
    assert picture(sync.folder / "dst") == picture(source)
    make(source, {"two": b"next"})
    assert sync.json("push", source, URL)["generation"] == 3


def test_a_head_that_cannot_be_read_is_replaced_and_what_is_left_of_it_is_said(sync: Sync) -> None:
    two_generations(sync)
    sync.set_head(job_id="train-7", run_id="r1", epoch=9)
    sync.storage.put(BUCKET, HEAD, sync.storage.objects(BUCKET)[HEAD][:-30])
    said = sync.ok("repair", URL, "--yes", "--job-id", "train-7")
    assert "speaks of: " in said
    assert "--run-id r1" in said
    head = sync.head()
    assert (head.job_id, head.epoch, head.generation, head.status) == ("train-7", 10, 2, "open")
    assert "job train-7" in sync.refused("push", "src", URL, "--job-id", "other")


def test_a_job_goes_on_after_a_repair(sync: Sync) -> None:
    world = sync.world
    entry = {**world.entry("ck"), "mode": "snapshot"}
    url, head = f"s3://{BUCKET}/job-1/ck/", "job-1/ck/.heeler/head.json"
    sync.ok("push", sync.tree(state=b"41"), url, "--mode", "snapshot")
    sync.storage.delete(BUCKET, head)
    assert "has a head again" in sync.ok("repair", url, "--yes")
    program = world.bash('cd "$CHECKPOINT_DIR"; echo $(($(cat state) + 1)) > state')
    world.submit(program, sync={"before": [entry], "during": [entry]})
    with world.worker("--max-jobs", "1") as worker:
        assert worker.wait() == 0
    assert world.job().state == "done"
    sync.ok("pull", url, "dst")
    assert (sync.folder / "dst/state").read_bytes() == b"42\n"


def test_repair_passes_over_what_is_not_whole(sync: Sync) -> None:
    two_generations(sync)
    lose_head(sync)
    packs = {len(data): key for key, data in sync.storage.objects(BUCKET).items() if "/packs/" in key}
    sync.storage.put(BUCKET, packs[min(packs)], bytes(min(packs)))
    assert "generation 2 is not there, or not whole" in sync.run("repair", URL, "--yes", "--generation", "2").stderr
    assert HEAD not in sync.storage.objects(BUCKET)
    said = sync.ok("repair", URL, "--yes")
    assert "generation 2 (epoch 2) is lost: " in said
    assert "What it does not list, the next push or worker deletes." in said
    assert [kept.generation for kept in sync.head().kept] == [1]
    sync.storage.delete(BUCKET, HEAD)
    sync.storage.delete(BUCKET, packs[max(packs)])
    said = sync.run("repair", URL, "--yes").stderr
    assert "has no generation that is whole" in said
    assert HEAD not in sync.storage.objects(BUCKET)


def test_repair_goes_back_to_the_generation_that_is_asked_for(sync: Sync) -> None:
    two_generations(sync)
    lose_head(sync)
    sync.ok("repair", URL, "--yes", "--generation", "1")
    assert ([kept.generation for kept in sync.head().kept], sync.head().generation) == ([1], 2)


def test_repair_leaves_alone_what_needs_none(sync: Sync) -> None:
    assert "there is no snapshot to repair" in sync.refused("repair", URL, "--yes")
    two_generations(sync)
    sync.storage.stats.reset()
    assert "nothing is to be repaired" in sync.ok("repair", URL, "--yes")
    assert sync.writes() == []
    sync.storage.put(BUCKET, HEAD, b'{"format": 99}')
    assert "use a newer heeler" in sync.refused("repair", URL, "--yes")
    assert sync.storage.objects(BUCKET)[HEAD] == b'{"format": 99}'


@pytest.mark.parametrize(("typed", "code"), [(b"repair\n", 0), (b"yes\n", 1), (b"\x03", 130)])
def test_a_person_at_a_terminal_is_asked(sync: Sync, typed: bytes, code: int) -> None:
    two_generations(sync)
    lose_head(sync)
    ours, theirs = pty.openpty()
    command = ["setsid", "--ctty", "--wait", sys.executable, "-m", "heeler", "sync", "repair", URL]
    process = subprocess.Popen(command, env=sync.env, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    while b"Type 'repair'" not in shown:
        shown += os.read(ours, 65536)
    os.write(ours, typed)
    assert process.wait(20) == code, shown
    os.close(ours)
    assert (HEAD in sync.storage.objects(BUCKET)) == (code == 0)


def test_a_terminal_gets_the_findings_in_lines(sync: Sync) -> None:
    make(sync.folder / "src", {"one": noise(3 * MIB)})
    sync.ok("push", "src", URL, "--mode", "snapshot")
    assert "is whole" in on_terminal(sync, "verify", URL)
