"""FAULTS.md, Kelpie 6, 7, 8 and 15: downloads that fail, and keys that lead elsewhere."""

from __future__ import annotations

import hashlib
import random

import pytest

from tests.acceptance.world import BUCKET, JOB, MIB, World, eventually
from tests.support.s3 import Action, Answer, Corrupt, Cut, Stall, Truncate

# Takes up its step where the checkpoint left it, tells it, and writes the next.
STEPS = (
    "step=$(cat $CHECKPOINT_DIR/step 2>/dev/null || echo 0); echo $step > $W/start.new; mv $W/start.new $W/start\n"
    "echo $((step + 1)) > $CHECKPOINT_DIR/step"
)


# 6: "the job starts at step 0 and overwrites checkpoint 5 with 2".


@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2", "HeadObject"])
def test_a_restore_that_storage_answers_500_waits_and_goes_on_from_the_checkpoint_when_healed(
    world: World, operation: str
) -> None:
    world.storage.put(BUCKET, world.key("ck/step"), b"5\n")
    if operation == "HeadObject":  # asked where a file of that size is there already
        world.path("ck").mkdir(parents=True)
        world.path("ck/step").write_bytes(b"7\n")
    world.storage.faults.add(Answer(500, "InternalError"), operation=operation)
    world.submit(world.bash(STEPS), sync=world.checkpoints(), heartbeat_interval=0.5)
    with world.worker() as worker:
        worker.wait_for("storage_retried", count=2)
        assert worker.phase() == "restore"
        assert world.job().state == "running"
        assert world.versions("ck/step") == [b"5\n"]
        world.storage.faults.clear()
        record = world.wait_state("done")
    assert record.attempts == 1
    assert world.told("start") == "5\n"
    assert world.versions("ck/step") == [b"5\n", b"6\n"]


@pytest.mark.parametrize("operation", ["GetObject", "ListObjectsV2"])
def test_a_restore_that_is_forbidden_fails_the_job_unstarted_and_names_bucket_and_key(
    world: World, operation: str
) -> None:
    world.storage.put(BUCKET, world.key("ck/step"), b"5\n")
    world.storage.faults.add(Answer(403, "AccessDenied"), operation=operation)
    world.submit(world.bash(STEPS), sync=world.checkpoints(), max_failures=1)
    with world.worker():
        record = world.wait_state("failed")
    assert f"{operation} s3://{BUCKET}/{JOB}/ck/" in record.reason
    assert "403" in record.reason
    assert not (world.folder / "pid").exists()
    assert world.versions("ck/step") == [b"5\n"]


def test_a_restore_from_a_bucket_that_does_not_exist_fails_the_job_and_names_it(world: World) -> None:
    sync = {"before": [{**world.entry("ck"), "bucket": "nope"}]}
    world.submit(world.bash(STEPS), sync=sync, max_failures=1)
    with world.worker():
        record = world.wait_state("failed")
    assert "s3://nope/" in record.reason
    assert "does not exist" in record.reason
    assert not (world.folder / "pid").exists()


def test_a_restore_that_never_succeeds_gives_the_job_to_another_worker_uncounted_and_unstarted(world: World) -> None:
    world.storage.put(BUCKET, world.key("ck/step"), b"5\n")
    world.storage.faults.add(Answer(500, "InternalError"), operation="GetObject")
    world.submit(world.bash(STEPS), sync=world.checkpoints())
    with world.worker(HEELER_RESTORE_PATIENCE="0.5") as worker:
        settled = worker.wait_for("job_settled", outcome="release")
    assert f"s3://{BUCKET}/{world.key('ck/step')}" in settled["reason"]
    assert world.job().failures == 0
    assert world.job().state == "pending"
    assert not (world.folder / "pid").exists()
    assert world.versions("ck/step") == [b"5\n"]


# 7: "a download cut in the middle of the body hangs for ever with a truncated file, heartbeats going on".


@pytest.mark.parametrize(
    "fault",
    [
        Cut(at="response_body", after_bytes=2 * MIB),
        Cut(at="response_body", after_bytes=2 * MIB, reset=False),
        Truncate(after_bytes=2 * MIB),
        Stall(at="response_body", after_bytes=2 * MIB),
    ],
    ids=["reset", "closed", "truncated", "stalled"],
)
def test_a_download_cut_within_its_body_goes_on_where_it_was_while_the_lease_is_kept(
    world: World, fault: Action
) -> None:
    content = random.Random(7).randbytes(8 * MIB)
    world.storage.put(BUCKET, world.key("ck/big"), content)
    # The stalled one takes 1.6 s of silence, longer than the lease of 1.2 s.
    world.storage.faults.add(fault, operation="GetObject", count=2)
    world.submit(
        world.bash("sha256sum < $CHECKPOINT_DIR/big > $W/sum"), sync=world.checkpoints(), heartbeat_interval=0.4
    )
    with world.worker(HEELER_S3_TIMEOUT="0.8"), world.worker(name="b", HEELER_S3_TIMEOUT="0.8"):
        record = world.wait_state("done")
    assert record.attempts == 1
    assert world.told("sum").split()[0] == hashlib.sha256(content).hexdigest()
    gets = world.storage.stats.find("GetObject", world.key("ck/big"))
    assert len(gets) == 3
    assert [get.status for get in gets] == [200, 206, 206]
    # From its start each time it would have been 12 MiB.
    assert sum(get.bytes_out for get in gets) < 10 * MIB


@pytest.mark.parametrize(
    "fault", [Truncate(after_bytes=1000, hidden=True), Corrupt(offset=-1)], ids=["short in silence", "corrupt"]
)
def test_a_download_with_wrong_bytes_is_noticed_and_repeated(world: World, fault: Action) -> None:
    content = random.Random(8).randbytes(MIB)
    world.storage.put(BUCKET, world.key("ck/big"), content)
    world.storage.faults.add(fault, operation="GetObject", count=1)
    world.submit(world.bash("sha256sum < $CHECKPOINT_DIR/big > $W/sum"), sync=world.checkpoints())
    with world.worker():
        world.wait_state("done")
    assert world.told("sum").split()[0] == hashlib.sha256(content).hexdigest()


def test_a_download_that_is_damaged_every_time_never_starts_the_program(world: World) -> None:
    world.storage.put(BUCKET, world.key("ck/step"), b"5\n")
    world.storage.faults.add(Corrupt(), operation="GetObject")
    world.submit(world.bash(STEPS), sync=world.checkpoints())
    with world.worker() as worker:
        fault = worker.wait_for("restore_failed")
        worker.wait_for("job_settled")
    assert world.key("ck/step") in fault["error"]
    assert not (world.folder / "pid").exists()
    assert not world.path("ck/step").exists()
    assert world.versions("ck/step") == [b"5\n"]


# 8: "an object key with ../ is written outside the job's folder".


@pytest.mark.parametrize("bad", ["../../evil", "a/../../../evil", "/etc/evil", "a//evil", "./evil"])
def test_an_object_key_that_leads_out_of_the_folder_fails_the_job_by_name_and_writes_nothing(
    world: World, bad: str
) -> None:
    world.storage.put(BUCKET, world.key("ck/step"), b"5\n")
    world.storage.put(BUCKET, world.key("ck/") + bad, b"evil")
    world.submit(world.bash(STEPS), sync=world.checkpoints())
    with world.worker():
        record = world.wait_state("failed")
    assert world.key("ck/") + bad in record.reason
    assert "refused" in record.reason
    assert record.attempts == 1
    assert not list(world.folder.rglob("evil*"))
    assert not (world.folder / "pid").exists()


def test_a_link_that_an_earlier_job_left_does_not_lead_a_download_out_of_the_folder(world: World) -> None:
    outside = world.folder / "outside"
    outside.mkdir()
    world.path("ck").mkdir(parents=True)
    world.path("ck/d").symlink_to(outside)
    world.storage.put(BUCKET, world.key("ck/d/step"), b"5\n")
    world.submit(world.bash("cat $CHECKPOINT_DIR/d/step > $W/read"), sync=world.checkpoints())
    with world.worker():
        world.wait_state("done")
    assert world.told("read") == "5\n"
    assert not list(outside.iterdir())


# 15: "local_path is not created when there was nothing to download".


def test_all_folders_of_a_job_are_there_and_empty_when_there_is_nothing_to_download(world: World) -> None:
    sync = {
        "before": [world.entry("in"), world.entry("ck")],
        "during": [world.entry("ck")],
        "after": [world.entry("out")],
    }
    world.submit(world.bash("ls -A $INPUT_DIR $CHECKPOINT_DIR $OUTPUT_DIR > $W/found && touch $W/all_there"), sync=sync)
    with world.worker():
        world.wait_state("done")
    world.told("all_there")
    assert [line for line in world.told("found").split() if not line.endswith(":")] == []


def test_what_lay_in_the_folders_before_is_out_of_the_programs_sight(world: World) -> None:
    world.path("ck").mkdir(parents=True)
    world.path("ck/of_somebody").write_text("x")
    world.submit(world.bash("ls $CHECKPOINT_DIR > $W/found"), sync=world.checkpoints())
    with world.worker():
        world.wait_state("done")
    assert world.told("found") == ""
    eventually(lambda: not world.storage.objects(BUCKET), "nothing of it is stored")
