"""FAULTS.md, Kelpie 1 to 4: uploads that fail, and files that change while they are sent."""

from __future__ import annotations

import hashlib
from typing import Literal

import pytest

from tests.acceptance.world import BUCKET, MIB, World, eventually
from tests.support.proxy import FaultProxy
from tests.support.s3 import Answer, Slow, Stall

WRITE_OUTPUTS = "echo one > $OUTPUT_DIR/one; mkdir $OUTPUT_DIR/d; echo two > $OUTPUT_DIR/d/two"


# 1: "the error is logged, the job is reported completed, the bucket is empty and the local copy deleted".


@pytest.mark.parametrize(("status", "code"), [(500, "InternalError"), (503, "SlowDown")])
def test_a_final_upload_that_storage_answers_with_an_error_is_tried_until_it_is_stored(
    world: World, status: int, code: str
) -> None:
    world.storage.faults.add(Answer(status, code), operation="PutObject", key="*/d/two")
    world.submit(world.bash(WRITE_OUTPUTS), sync=world.outputs(), heartbeat_interval=0.2)
    with world.worker() as worker, world.worker(name="b") as other:
        worker_with_it = eventually(lambda: next((w for w in (worker, other) if w.find("job_received")), None), "a job")
        # Longer than the lease of 0.6 s, so that it is held by heartbeats alone.
        worker_with_it.wait_for("upload_retried", count=4)
        assert world.job().state == "running"
        assert world.path("out/one").exists()
        assert world.path("out/d/two").exists()
        world.storage.faults.clear()
        record = world.wait_state("done")
    assert record.attempts == 1
    assert world.storage.objects(BUCKET) == {world.key("out/one"): b"one\n", world.key("out/d/two"): b"two\n"}


def test_a_final_upload_survives_storage_that_is_out_of_reach_for_a_while(world: World) -> None:
    with FaultProxy("127.0.0.1", world.storage.port) as proxy:
        proxy.set(refuse=True)
        world.submit(world.bash(WRITE_OUTPUTS), sync=world.outputs(), heartbeat_interval=0.5)
        with world.worker(AWS_ENDPOINT_URL_S3=proxy.url) as worker:
            worker.wait_for("upload_retried", count=3)
            assert world.job().state == "running"
            proxy.set(refuse=False)
            world.wait_state("done")
    assert world.stored("out/one") == b"one\n"
    assert world.stored("out/d/two") == b"two\n"


def test_a_final_upload_that_is_forbidden_fails_the_job_and_keeps_the_local_copy(world: World) -> None:
    world.storage.faults.add(Answer(403, "AccessDenied"), operation="PutObject", key="*/d/two")
    world.submit(world.bash(WRITE_OUTPUTS), sync=world.outputs(), max_failures=2)
    with world.worker(HEELER_RETRY_DELAY="0.1") as worker:
        record = world.wait_state("failed")
    assert record.failures == 2
    assert f"s3://{BUCKET}/{world.key('out/d/two')}" in record.reason
    assert "403" in record.reason
    assert not worker.find("job_settled", outcome="done")
    assert world.path("out/d/two").read_text() == "two\n"


def test_the_local_copy_is_removed_only_after_the_job_is_reported_done(world: World) -> None:
    hold = world.storage.faults.add(Stall(at="after"), operation="PutObject", key="*/d/two")
    world.submit(world.bash(WRITE_OUTPUTS), sync=world.outputs())
    with world.worker() as worker:
        hold.wait_held()
        assert world.stored("out/d/two") == b"two\n"  # it is there, but we have not been told
        assert world.job().state == "running"
        assert world.path("out/d/two").exists()
        hold.release()
        world.wait_state("done")
        worker.wait_for("phase", phase="receive", count=2)
    assert not world.path("out/d").exists()


# 2: "a checkpoint upload that failed once is never tried again".


def test_a_checkpoint_upload_that_failed_once_is_tried_again_while_the_program_runs(world: World) -> None:
    world.storage.faults.add(Answer(500, "InternalError"), operation="PutObject", count=1)
    world.submit(world.bash("echo 1 > $CHECKPOINT_DIR/step; sleep 1000"), sync=world.checkpoints())
    with world.worker() as worker:
        eventually(lambda: world.stored("ck/step") == b"1\n", "the checkpoint is stored")
        assert worker.find("upload_retried")
        assert world.job().state == "running"


def test_a_checkpoint_upload_that_was_forbidden_once_is_tried_again_at_the_programs_end(world: World) -> None:
    world.storage.faults.add(Answer(403, "AccessDenied"), operation="PutObject", count=1)
    program = world.bash("echo 1 > $CHECKPOINT_DIR/step; while ! test -e $W/go; do sleep 0.01; done")
    world.submit(program, sync=world.checkpoints())
    with world.worker() as worker:
        worker.wait_for("upload_refused")
        world.tell("go")
        world.wait_state("done")
    assert world.stored("ck/step") == b"1\n"


# 3: "the bucket keeps the old content for ever (lost update)".


@pytest.mark.parametrize("at", ["before", "after"])
@pytest.mark.parametrize("disguised", [False, True], ids=["plainly", "with the size and mtime of the old one"])
def test_a_file_rewritten_while_it_uploads_is_stored_in_its_newest_state(
    world: World, at: Literal["before", "after"], disguised: bool
) -> None:
    hold = world.storage.faults.add(Stall(at=at), operation="PutObject", count=1)
    program = world.python(
        "file = Path(env['CHECKPOINT_DIR']) / 'model'\n"
        "file.write_bytes(b'old' * 1000)\n"
        "os.utime(file, (1e9, 1e9))\n"
        "await_('rewrite')\n"
        "file.write_bytes(b'new' * 1000)\n"
        f"if {disguised}: os.utime(file, (1e9, 1e9))\n"
        "tell('rewritten')\n"
        "await_('never')\n"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker():
        hold.wait_held()
        world.tell("rewrite")
        world.told("rewritten")
        hold.release()
        eventually(lambda: world.stored("ck/model") == b"new" * 1000, "the newest state is stored")
        assert world.job().state == "running"


def test_a_file_deleted_while_it_uploads_is_deleted_in_storage_too(world: World) -> None:
    hold = world.storage.faults.add(Stall(at="before"), operation="PutObject", count=1)
    program = world.bash(
        "cd $CHECKPOINT_DIR; echo 1 > step; while ! test -e $W/go; do sleep 0.01; done; rm step; touch $W/gone; sleep 9"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker():
        hold.wait_held()
        world.tell("go")
        world.told("gone")
        hold.release()
        eventually(lambda: world.versions("ck/step")[-1:] == [None], "the object is deleted")


# 4: "the stored object is 75 MB of one version and 239 MB of the other, 'successfully'".


def test_a_large_file_rewritten_in_place_during_its_upload_is_never_visible_as_a_mixture(world: World) -> None:
    size = 64 * MIB
    hold = world.storage.faults.add(Stall(at="before"), operation="UploadPart", part_number=3, count=1)
    program = world.python(
        "file = Path(env['CHECKPOINT_DIR']) / 'big'\n"
        f"file.write_bytes(b'A' * {size})\n"
        "await_('rewrite')\n"
        "with file.open('r+b', buffering=0) as out:\n"
        f"    for _ in range({size // MIB}): out.write(b'B' * {MIB})\n"
        "tell('rewritten')\n"
        "await_('never')\n"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker():
        hold.wait_held()
        world.tell("rewrite")
        world.told("rewritten")
        hold.release()
        eventually(lambda: world.versions("ck/big"), "an object is visible", timeout=40)
    # The server keeps every version that was ever visible: stronger than a reader that polls.
    assert [_kind(version) for version in world.versions("ck/big")] == [("B", size)]


def test_a_large_file_rewritten_again_and_again_is_visible_only_in_states_that_it_had(world: World) -> None:
    size = 24 * MIB
    world.storage.faults.add(Slow(up=16 * MIB), operation="UploadPart")
    program = world.python(
        "file = Path(env['CHECKPOINT_DIR']) / 'big'\n"
        "for state in b'abcdef':\n"
        "    with file.open('r+b' if file.exists() else 'wb', buffering=0) as out:\n"
        f"        for _ in range({size // MIB}):\n"
        f"            out.write(bytes([state]) * {MIB}); time.sleep(0.002)\n"
        "    time.sleep(0.3)\n"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker():
        world.wait_state("done", timeout=60)
    versions = [_kind(version) for version in world.versions("ck/big")]
    assert versions[-1] == ("f", size)
    assert all(kind in [(state, size) for state in "abcdef"] for kind in versions)
    assert world.storage.uploads(BUCKET) == []


def _kind(data: bytes | None) -> tuple[str, int]:
    """What a version consists of: one letter and its length, or a digest if it is a mixture."""
    if data is None:
        return ("deleted", 0)
    if data.count(data[:1]) == len(data):
        return (data[:1].decode(), len(data))
    return (f"mixture {hashlib.sha256(data).hexdigest()}", len(data))
