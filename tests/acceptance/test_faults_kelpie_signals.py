"""FAULTS.md, Kelpie 9, 10 and 11: an interruption, a program killed by a signal, and a cancelled job."""

from __future__ import annotations

import random
import signal
import time

import pytest

from tests.acceptance.world import FAMILY, JOB, MEMBERS, MIB, World, alive, eventually
from tests.support.s3 import Slow
from tests.support.worker import heeler

# 9: "exits at once; the child is not told and lives on as an orphan; a 30 MB upload under way is lost".


def test_sigterm_during_a_large_upload_tells_the_program_finishes_the_upload_and_hands_the_job_on_at_once(
    world: World,
) -> None:
    size = 30 * MIB
    world.storage.faults.add(Slow(up=4 * MIB), operation="UploadPart")
    program = world.bash(
        "test $HEELER_ATTEMPT = 1 || { touch $W/second; exit 0; }\n"
        "trap 'touch $W/told; exit 0' TERM\n"
        "sleep 1000 & echo $! > $W/child\n"
        "while ! test -e $W/go; do sleep 0.01; done\n"
        f"head -c {size} /dev/urandom > $W/big; cp $W/big $CHECKPOINT_DIR/big; wait"
    )
    world.submit(program, sync=world.checkpoints())
    with world.worker(HEELER_STOP_GRACE="20") as first:
        pids = [world.told_pid(), world.told_pid("child")]
        with world.worker(name="b") as second:
            second.wait_for("phase", phase="receive")
            (world.folder / "go").touch()
            eventually(lambda: world.storage.stats.bytes_in > MIB, "the upload is under way")
            assert world.stored("ck/big") is None
            asked = time.monotonic()
            first.signal(signal.SIGTERM)
            assert first.wait() == 0
            ended = time.monotonic()
            assert ended - asked < 20
            assert (world.folder / "told").exists()
            assert not any(alive(pid) for pid in pids)
            assert world.stored("ck/big") == (world.folder / "big").read_bytes()
            taken = second.wait_for("job_received", timeout=5)
            # The lease of 30 s would not have expired before.
            assert taken["_seen"] - ended < 2
            assert taken["attempt"] == 2
            record = world.wait_state("done", timeout=30)
    assert record.failures == 0


# 10: "taken for a remote cancel, never reported as failed; run again 8 times in 16 s".


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_program_that_dies_of_a_signal_has_failed_and_rests_longer_before_each_attempt(
    world: World, name: str
) -> None:
    number = int(signal.Signals[name])
    world.submit(world.bash(f"date +%s.%N >> $W/starts; ulimit -c 0; kill -{number} $$"), max_failures=3)
    with world.worker(HEELER_RETRY_DELAY="0.4"):
        record = world.wait_state("failed")
        time.sleep(0.3)  # for an attempt too many
    assert record.failures == record.attempts == 3
    assert record.reason == f"killed by {name}"
    assert record.result == {"exit_code": None, "signal": number}
    first, second, third = (float(line) for line in (world.folder / "starts").read_text().split())
    assert second - first >= 0.2
    assert third - second >= 0.4


# 11: "SIGINT to the direct child only; grandchildren live on; a child that then exits 0 turns canceled into completed".


def test_a_cancelled_job_dies_with_all_its_descendants_and_stays_cancelled(world: World) -> None:
    world.submit(world.python(FAMILY + "await_('never')"), sync=world.checkpoints(), heartbeat_interval=0.5)
    with world.worker() as worker:
        pids = [world.told_pid(name) for name in MEMBERS]
        assert all(alive(pid) for pid in pids)
        told = heeler("cancel", "--source", f"local:{world.queue}", JOB)
        assert told.returncode == 0, told.stderr
        worker.wait_for("job_settled", outcome="cancelled")
        assert not [name for name, pid in zip(MEMBERS, pids, strict=True) if alive(pid)]
        # The worker is as good as new.
        world.submit(world.bash("exit 0"), "job-2")
        world.wait_state("done", "job-2")
    record = world.job()
    assert (record.state, record.attempts, record.failures) == ("cancelled", 1, 0)


def test_a_program_that_exits_0_while_it_is_cancelled_is_not_done(world: World) -> None:
    # A heartbeat of 3 s: the program ends before its worker could learn of the cancellation.
    world.submit(world.bash("while ! test -e $W/go; do sleep 0.01; done"), sync=world.outputs(), heartbeat_interval=9)
    with world.worker() as worker:
        world.told("pid")
        assert world.desk.cancel(JOB)
        world.tell("go")
        worker.wait_for("job_settled")
    assert world.job().state == "cancelled"


def test_a_program_that_ends_leaves_no_descendant_behind(world: World) -> None:
    world.submit(world.python(FAMILY + f"for name in {MEMBERS}: await_(name)"))
    with world.worker():
        world.wait_state("done")
        pids = [world.told_pid(name) for name in MEMBERS]
        assert not [name for name, pid in zip(MEMBERS, pids, strict=True) if alive(pid)]


def test_random_moments_of_cancellation_never_leave_a_process_or_a_wrong_state(world: World) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    with world.worker() as worker:
        for number in range(8):
            job_id = f"fast-{number}"
            world.submit(world.bash("sleep 0.1"), job_id, heartbeat_interval=0.2, sync=world.checkpoints())
            time.sleep(moments.uniform(0, 0.25))
            cancelled = world.desk.cancel(job_id)
            if world.job(job_id).attempts:
                worker.wait_for("job_settled", job_id=job_id)
            eventually(lambda job_id=job_id: world.job(job_id).state in ("done", "cancelled"), "the job has ended")  # type: ignore[misc]
            assert world.job(job_id).state == ("cancelled" if cancelled else "done")
        assert worker.process.poll() is None
