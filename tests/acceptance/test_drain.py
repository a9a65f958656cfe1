"""SIGTERM and SIGINT at any moment: tell the program, flush, hand the job back, exit inside the grace period."""

from __future__ import annotations

import random
import signal
import sqlite3
import time

import pytest

from tests.acceptance.world import BUCKET, JOB, MIB, World, alive, eventually
from tests.support.proxy import FaultProxy
from tests.support.s3 import Stall
from tests.support.worker import Worker

SLEEP = "trap 'exit 0' TERM; echo x > $W/runs; sleep 1000 & wait"
GRACE = 4.0


def drained(worker: Worker, within: float = GRACE) -> float:
    """Send SIGTERM; the seconds until it exited with 0."""
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)
    code = worker.wait(within + 20)
    took = time.monotonic() - asked
    assert code == 0, worker.lines[-30:]
    assert took < within, f"{took:.1f} s; {worker.lines[-30:]}"
    return took


def test_sigterm_while_idle_exits_at_once_with_0(world: World) -> None:
    with world.worker() as worker:
        worker.wait_for("phase", phase="receive")
        drained(worker, within=2)
    assert worker.find("stopped", reason="SIGTERM")


def test_sigterm_while_storage_is_out_of_reach_at_the_start_exits_at_once_with_0(world: World) -> None:
    with FaultProxy("127.0.0.1", world.storage.port) as proxy:
        proxy.set(refuse=True)
        settings = {"AWS_ENDPOINT_URL_S3": proxy.url, "HEELER_CHECKPOINTS": f"s3://{BUCKET}/ck/{{job_id}}/"}
        with world.worker(**settings) as worker:
            worker.wait_for("storage_retried")
            drained(worker, within=2)


def test_sigterm_while_storage_hangs_at_the_start_exits_inside_the_grace_with_0(world: World) -> None:
    hold = world.storage.faults.add(Stall(at="before"), operation="ListObjectsV2")
    with world.worker(HEELER_STOP_GRACE=f"{GRACE}", HEELER_CHECKPOINTS=f"s3://{BUCKET}/ck/{{job_id}}/") as worker:
        hold.wait_held()
        drained(worker)


@pytest.mark.parametrize("operation", ["ListObjectsV2", "GetObject"])
def test_sigterm_during_a_restore_hands_the_job_back_unstarted(world: World, operation: str) -> None:
    world.storage.put(BUCKET, world.key("ck/step"), b"5\n" * 1000)
    at = "response_body" if operation == "GetObject" else "before"
    hold = world.storage.faults.add(Stall(at=at, after_bytes=10), operation=operation)  # type: ignore[arg-type]
    world.submit(world.bash(SLEEP), sync=world.checkpoints())
    with world.worker(HEELER_STOP_GRACE=f"{GRACE}") as worker:
        hold.wait_held()
        drained(worker)
    assert world.job().state == "pending"
    assert world.job().failures == 0
    assert not (world.folder / "runs").exists()


def test_sigterm_during_the_run_stores_the_checkpoint_that_the_program_writes_in_its_last_second(world: World) -> None:
    program = world.bash(
        "stop() { head -c 30000000 /dev/urandom > $W/last; cp $W/last $CHECKPOINT_DIR/last; exit 0; }\n"
        "trap stop TERM; echo x > $W/runs; sleep 1000 & wait"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker(HEELER_STOP_GRACE="20") as worker:
        world.told("runs")
        drained(worker, within=20)
        settled = worker.find("job_settled")[0]
    assert (settled["outcome"], settled["exit_code"]) == ("release", 0)
    assert world.stored("ck/last") == (world.folder / "last").read_bytes()
    record = world.job()
    assert (record.state, record.attempts, record.failures, record.interruptions) == ("pending", 1, 0, 1)


def test_a_program_that_exits_with_any_code_of_its_own_in_a_drain_is_captured_whole_and_not_counted(
    world: World,
) -> None:
    program = world.bash("trap 'echo last > $CHECKPOINT_DIR/last; exit 3' TERM; echo x > $W/runs; sleep 1000 & wait")
    world.submit(program, sync=world.checkpoints())
    with world.worker() as worker:
        world.told("runs")
        drained(worker)
    assert world.stored("ck/last") == b"last\n"
    assert (world.job().state, world.job().failures) == ("pending", 0)


def test_a_program_killed_by_the_sigterm_adds_only_what_had_settled_before(world: World) -> None:
    program = world.python(
        "folder = Path(env['CHECKPOINT_DIR'])\n"
        "(folder / 'whole').write_text('whole')\n"
        "half = (folder / 'half').open('w')\n"
        "half.write('half of a save'); half.flush()\n"
        "tell('half'); await_('never')\n"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker() as worker:
        world.told("half")
        eventually(lambda: world.stored("ck/whole"), "the settled file is stored")
        drained(worker)
    assert world.storage.objects(BUCKET) == {world.key("ck/whole"): b"whole"}
    assert worker.find("job_settled", outcome="release", signal=signal.SIGTERM)


def test_a_program_that_ignores_sigterm_is_killed_inside_the_grace_and_its_files_are_stored(world: World) -> None:
    program = world.bash(
        "trap '' TERM INT; echo 1 > $CHECKPOINT_DIR/step; echo x > $W/runs; while :; do sleep 0.1; done"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker(HEELER_STOP_GRACE="5") as worker:
        world.told("runs")
        pid = world.told_pid()
        drained(worker, within=5)
    assert not alive(pid)
    assert world.stored("ck/step") == b"1\n"
    assert world.job().state == "pending"


def test_sigterm_during_the_last_upload_finishes_it_and_reports_the_job_done(world: World) -> None:
    hold = world.storage.faults.add(Stall(at="before"), operation="PutObject")
    world.submit(world.bash("echo 1 > $OUTPUT_DIR/one"), sync=world.outputs())
    with world.worker() as worker:
        hold.wait_held()
        worker.signal(signal.SIGTERM)
        worker.wait_for("drain")
        hold.release()
        assert worker.wait() == 0
    assert world.job().state == "done"
    assert world.stored("out/one") == b"1\n"


@pytest.mark.parametrize("size", [10, 20 * MIB], ids=["small", "in parts"])
def test_sigterm_while_storage_hangs_hands_the_job_back_and_exits_inside_the_grace(world: World, size: int) -> None:
    operation = "PutObject" if size < MIB else "UploadPart"
    hold = world.storage.faults.add(Stall(at="before"), operation=operation)
    world.submit(world.bash(f"head -c {size} /dev/zero > $OUTPUT_DIR/one"), sync=world.outputs())
    with world.worker(HEELER_STOP_GRACE=f"{GRACE}") as worker:
        hold.wait_held()
        drained(worker, within=GRACE + 0.5)
    assert worker.find("grace_over")
    record = world.job()
    assert (record.state, record.failures) == ("pending", 0)
    assert world.stored("out/one") is None
    assert world.path("out/one").stat().st_size == size


def test_sigterm_while_the_queue_is_locked_exits_inside_the_grace(world: World) -> None:
    world.submit(world.bash(SLEEP))
    with world.worker(HEELER_STOP_GRACE=f"{GRACE}") as worker:
        world.told("runs")
        pid = world.told_pid()
        lock = sqlite3.connect(world.queue / "queue.db", isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            drained(worker, within=GRACE + 1.5)
        finally:
            lock.close()
    assert not alive(pid)
    assert worker.find("job_settled", told=False)


def test_a_second_sigint_kills_the_program_at_once_and_still_stores_what_had_settled(world: World) -> None:
    hold = world.storage.faults.add(Stall(at="before"), operation="PutObject")
    world.submit(world.bash("trap '' TERM INT; echo 1 > $CHECKPOINT_DIR/step; sleep 1000"), sync=world.checkpoints())
    with world.worker() as worker:
        hold.wait_held()
        pid = world.told_pid()
        worker.signal(signal.SIGINT)
        worker.wait_for("drain", reason="SIGINT")
        assert alive(pid)
        hurried = time.monotonic()
        worker.signal(signal.SIGINT)
        worker.wait_for("phase", phase="upload")
        assert not alive(pid)
        hold.release()
        assert worker.wait() == 0
        assert time.monotonic() - hurried < 3
    assert world.stored("ck/step") == b"1\n"
    assert world.job().state == "pending"


def test_many_sigterms_are_one_drain(world: World) -> None:
    world.submit(world.bash("trap 'sleep 0.5; echo x >> $W/told; exit 0' TERM; echo x > $W/runs; sleep 1000 & wait"))
    with world.worker() as worker:
        world.told("runs")
        for _ in range(10):
            worker.signal(signal.SIGTERM)
            time.sleep(0.02)
        assert worker.wait() == 0
    assert len(worker.find("drain")) == 1
    assert world.told("told") == "x\n"
    assert world.job().interruptions == 1


def test_signals_that_come_again_at_the_very_end_do_not_change_the_exit_code(world: World) -> None:
    for number in range(8):
        with world.worker() as worker:
            worker.wait_for("phase", phase="receive")
            worker.signal(signal.SIGINT)
            worker.wait_for("drain")
            time.sleep(number * 0.002)
            worker.signal(signal.SIGTERM if number % 2 else signal.SIGINT)
            assert worker.wait() == 0, worker.lines


def test_sigterm_at_any_moment_of_the_start_leaves_no_traceback_and_no_job_leased(world: World) -> None:
    for number in range(13):
        job_id = world.submit(world.bash("sleep 1000"), f"long-{number}", sync=world.checkpoints())
        with world.worker("--control", "127.0.0.1:0") as worker:
            time.sleep(number * 0.025)
            worker.signal(signal.SIGTERM)
            code = worker.wait()
        assert code in (0, -signal.SIGTERM), worker.lines
        assert "Traceback" not in "\n".join(worker.lines), worker.lines
        assert not worker.find("bug")
        assert (world.job(job_id).state, world.job(job_id).failures) == ("pending", 0), worker.lines
        world.desk.cancel(job_id)


def test_sigterm_at_random_moments_among_quick_jobs_leaves_each_done_and_stored_or_free(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    ids = [f"quick-{number}" for number in range(60)]
    for job_id in ids:
        world.submit(world.bash("echo $HEELER_JOB_ID > $CHECKPOINT_DIR/last"), job_id, sync=world.checkpoints())
    for _ in range(7):
        with world.worker() as worker:
            worker.wait_for("job_received", timeout=10)
            time.sleep(moments.uniform(0, 0.4))
            drained(worker)
        states = {job_id: world.job(job_id).state for job_id in ids}
        assert set(states.values()) <= {"done", "pending"}, states
        objects = world.storage.objects(BUCKET)
        done = [job_id for job_id, state in states.items() if state == "done"]
        assert [objects.get(f"{job_id}/ck/last") for job_id in done] == [f"{job_id}\n".encode() for job_id in done]
        assert sum(world.job(job_id).failures for job_id in ids) == 0


def test_the_lease_is_free_the_moment_the_worker_has_gone(world: World) -> None:
    world.submit(world.bash(SLEEP))
    with world.worker() as worker:
        world.told("runs")
        drained(worker)
    taken = world.desk._table.take("somebody")
    assert taken is not None
    assert (taken.job.id, taken.attempt) == (JOB, 2)
