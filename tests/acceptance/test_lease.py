"""A worker that was away too long, and a queue that does not answer: the job runs once and is stored once."""

from __future__ import annotations

import signal
import sqlite3
import time

import pytest

from tests.acceptance.world import BUCKET, MIB, World, alive, eventually
from tests.support.s3 import Stall

LEASE = 1.5
INTERVAL = LEASE / 3

# Writes who it is into its checkpoint, again and again; the attempt after the first ends when it is told to.
WHO = (
    "who=$HEELER_ATTEMPT; echo $$ > $W/pid-$who\n"
    "for number in $(seq 100000); do echo $who $number > $CHECKPOINT_DIR/state; touch $W/wrote-$who; sleep 0.1\n"
    "  if test $who != 1 -a -e $W/finish; then exit 0; fi; done"
)


def test_a_worker_stopped_beyond_its_lease_ends_its_program_and_changes_nothing_more(world: World) -> None:
    world.submit(world.bash(WHO), sync=world.checkpoints(), heartbeat_interval=INTERVAL)
    with world.worker() as first:
        eventually(lambda: world.stored("ck/state"), "the first has stored something")
        first.signal(signal.SIGSTOP)
        with world.worker(name="b", machine="other") as second:
            assert second.wait_for("job_received", timeout=LEASE + 5)["attempt"] == 2
            eventually(lambda: (world.stored("ck/state") or b"").startswith(b"2 "), "the second has stored something")
            # The program of the stopped worker ran on all the while.
            pid = world.told_pid("pid-1")
            assert alive(pid)
            before = len(world.versions("ck/state"))
            first.signal(signal.SIGCONT)
            first.wait_for("job_settled", outcome="lost", timeout=5)
            assert not alive(pid)
            first.wait_for("phase", phase="receive", count=2)
            eventually(lambda: len(world.versions("ck/state")) > before, "the second goes on")
            world.tell("finish")
            record = world.wait_state("done")
            second.wait_for("phase", phase="receive", count=2)
    # What was in flight when it was stopped may have landed before the second began; nothing after.
    states = [version.split()[0] for version in world.versions("ck/state") if version is not None]
    assert states == sorted(states), states
    assert (record.attempts, record.failures) == (2, 0)
    assert not first.find("job_settled", outcome="done")
    assert len(second.find("job_settled", outcome="done")) == 1


def test_a_large_upload_of_a_worker_that_lost_its_lease_is_given_up(world: World) -> None:
    hold = world.storage.faults.add(Stall(at="before"), operation="UploadPart", count=8)
    program = world.bash(
        "if test $HEELER_ATTEMPT = 1; then head -c 60000000 /dev/zero > $CHECKPOINT_DIR/big; sleep 1000; fi\n"
        "echo small > $CHECKPOINT_DIR/big; touch $W/second; while ! test -e $W/finish; do sleep 0.01; done"
    )
    world.submit(program, sync=world.checkpoints(), heartbeat_interval=INTERVAL)
    with world.worker() as first:
        hold.wait_held(4)
        first.signal(signal.SIGSTOP)
        with world.worker(name="b", machine="other") as second:
            second.wait_for("job_received", timeout=LEASE + 5)
            eventually(lambda: world.stored("ck/big") == b"small\n", "the second has stored its own")
            first.signal(signal.SIGCONT)
            first.wait_for("lease_lost", timeout=5)
            hold.release()
            first.wait_for("job_settled", outcome="lost")
            world.tell("finish")
            world.wait_state("done")
    assert world.versions("ck/big") == [b"small\n"]
    assert world.storage.uploads(BUCKET) == []


def test_a_worker_stopped_for_less_than_its_lease_goes_on_as_if_nothing_had_been(world: World) -> None:
    world.submit(world.bash("touch $W/runs; while ! test -e $W/finish; do sleep 0.01; done"), heartbeat_interval=2)
    with world.worker() as first, world.worker(name="b"):
        holder = eventually(lambda: next((w for w in world.started if w.find("job_received")), None), "somebody has it")
        world.told("runs")
        holder.signal(signal.SIGSTOP)
        time.sleep(2)
        holder.signal(signal.SIGCONT)
        world.tell("finish")
        record = world.wait_state("done")
        assert first.process.poll() is None
    assert record.attempts == 1


def test_a_queue_locked_for_longer_than_the_lease_is_asked_until_it_answers_and_the_job_ends_once(
    world: World,
) -> None:
    world.submit(
        world.bash("touch $W/runs; while ! test -e $W/finish; do sleep 0.01; done; echo x >> $W/ended"),
        sync=world.outputs(),
        heartbeat_interval=INTERVAL,
    )
    with world.worker() as worker:
        world.told("runs")
        lock = sqlite3.connect(world.queue / "queue.db", isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            worker.wait_for("heartbeat_failed")
            worker.wait_for("lease_lapsed")
            assert alive(world.told_pid())
        finally:
            lock.close()
        worker.wait_for("lease_confirmed_again")
        world.tell("finish")
        record = world.wait_state("done")
    assert (record.attempts, record.failures) == (1, 0)
    assert world.told("ended") == "x\n"


def test_a_program_that_ends_while_the_queue_is_locked_is_reported_once_it_is_free(world: World) -> None:
    world.submit(world.bash("touch $W/runs; while ! test -e $W/finish; do sleep 0.01; done"), heartbeat_interval=10)
    with world.worker() as worker:
        world.told("runs")
        lock = sqlite3.connect(world.queue / "queue.db", isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            world.tell("finish")
            worker.wait_for("queue_unreachable")
            assert not worker.find("job_settled")
        finally:
            lock.close()
        world.wait_state("done")
    assert world.job().attempts == 1


def test_a_worker_partitioned_from_its_queue_uploads_nothing_until_it_is_confirmed(world: World) -> None:
    program = world.bash(
        "touch $W/runs; while ! test -e $W/write; do sleep 0.01; done\n"
        "echo late > $CHECKPOINT_DIR/state; touch $W/wrote\n"
        "while ! test -e $W/finish; do sleep 0.01; done"
    )
    world.submit(program, sync=world.checkpoints(), heartbeat_interval=INTERVAL)
    with world.worker() as worker:
        world.told("runs")
        lock = sqlite3.connect(world.queue / "queue.db", isolation_level=None)
        try:
            lock.execute("BEGIN EXCLUSIVE")
            worker.wait_for("lease_lapsed")
            world.tell("write")
            world.told("wrote")
            time.sleep(0.5)  # ten times the debounce
            assert world.stored("ck/state") is None
        finally:
            lock.close()
        eventually(lambda: world.stored("ck/state") == b"late\n", "it is stored once the lease is confirmed")
        world.tell("finish")
        assert world.wait_state("done").attempts == 1


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_vanishes_loses_only_its_lease(world: World, kill: signal.Signals) -> None:
    size = 2 * MIB
    program = world.bash(
        f"if test $HEELER_ATTEMPT = 1; then head -c {size} /dev/urandom > $W/copy; cp $W/copy $CHECKPOINT_DIR/ck\n"
        "  sleep 1000; fi; cmp $W/copy $CHECKPOINT_DIR/ck && touch $W/same"
    )
    world.submit(program, sync=world.checkpoints(), heartbeat_interval=0.3)
    with world.worker() as first, world.worker(name="b", machine="other") as second:
        holder = eventually(lambda: next((w for w in (first, second) if w.find("uploaded")), None), "it is stored")
        holder.signal(kill)
        record = world.wait_state("done")
    assert (record.attempts, record.failures, record.interruptions) == (2, 0, 1)
    world.told("same")
