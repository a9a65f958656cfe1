"""A superseded worker changes no snapshot: one that was stopped, cut off from storage, or has a write on its way."""

from __future__ import annotations

import signal
import sqlite3
from pathlib import Path

from tests.acceptance.snapshot_programs import QUICK, Prefix, in_worlds, snapshots
from tests.acceptance.world import JOB, World, alive, eventually
from tests.support.proxy import FaultProxy
from tests.support.s3 import Stall

LEASE = 3.0
INTERVAL = LEASE / 3

# Saves who it is, again and again; all but the first attempt pause when they are told to, and end when told to.
WHO = (
    "who=$HEELER_ATTEMPT; echo $$ > $W/pid-$who\n"
    "for number in $(seq 100000); do\n"
    "  echo $who $number > $CHECKPOINT_DIR/new; mv $CHECKPOINT_DIR/new $CHECKPOINT_DIR/state; sleep 0.6\n"
    "  if test $who != 1 -a -e $W/pause; then\n"
    "    touch $W/paused; while ! test -e $W/finish; do sleep 0.01; done; exit 0; fi\n"
    "done"
)


def holders_are_in_order(prefix: Prefix) -> None:
    """No write of an older epoch came after one of a newer, and no generation after the first of another holder."""
    heads = prefix.heads()
    assert [head["epoch"] for head in heads] == sorted(head["epoch"] for head in heads)
    owner = {head["epoch"]: head["holder"] for head in heads}
    assert [owner[head["epoch"]] for head in heads] == [head["holder"] for head in heads]
    whose = [files["state"].split()[0] for files in prefix.every().values()]
    assert whose == sorted(whose), whose


def settle(world: World, prefix: Prefix) -> dict[str, bytes]:
    """Let the second worker's program pause; what storage holds once all of it is committed."""
    world.tell("pause")
    world.told("paused", 30)
    last = (world.folder / "other" / "work" / JOB / "ck" / "state").read_bytes()
    eventually(lambda: prefix.newest().get("state") == last, "the last state is committed", 30)
    # What a commit made garbage is deleted right after it.
    eventually(lambda: set(prefix.referenced()) == {key for key in prefix.objects() if not left(key)}, "collected", 30)
    return prefix.objects()


def left(key: str) -> bool:
    """Whether an object is of the first epoch: one that a commit cut short left behind, which nobody needs."""
    return key.rpartition("/")[2].split(".")[-3 if "manifests" in key else 0].startswith("1-")


def test_a_worker_stopped_beyond_its_lease_changes_nothing_in_storage_and_ends_its_program(tmp_path: Path) -> None:
    cases = {str(held): held for held in (None, "*/head.json", "*/manifests/*", "*/packs/*")}
    in_worlds(tmp_path, cases, stopped_beyond_its_lease)


def stopped_beyond_its_lease(world: World, held: str | None) -> None:
    prefix = Prefix(world.storage)
    world.submit(world.bash(WHO), sync=snapshots(), heartbeat_interval=INTERVAL)
    with world.worker(**QUICK) as first:
        first.wait_for("committed")
        # With a write on its way, which storage takes up only after the second has committed.
        hold = world.storage.faults.add(Stall(), operation="PutObject", key=held, count=1) if held else None
        if hold is not None:
            hold.wait_held(timeout=30)
        first.signal(signal.SIGSTOP)
        with world.worker(name="b", machine="other", **QUICK) as second:
            assert second.wait_for("job_received", timeout=LEASE + 20)["attempt"] == 2
            second.wait_for("committed", count=2)
            pid = world.told_pid("pid-1")
            assert alive(pid)
            before = settle(world, prefix)
            if hold is not None:
                world.storage.faults.remove(hold)
            first.signal(signal.SIGCONT)
            settled = first.wait_for("job_settled", outcome="lost")
            if held == "*/head.json":  # what was on its way was refused, and not sent again
                puts = world.storage.stats.find("PutObject", prefix.head_key)
                assert [put for put in puts if put.status in (412, 429)]
            assert first.find("lease_lost") or first.find("fenced")
            assert not alive(pid)
            first.wait_for("phase", phase="receive", count=2)
            after = prefix.objects()
            # A pack or manifest of a commit that nobody lists is no change: the next holder sweeps it.
            assert {key: data for key, data in after.items() if not left(key)} == {
                key: data for key, data in before.items() if not left(key)
            }
            assert set(before) <= set(after)
            world.tell("finish")
            record = world.wait_state("done")
    holders_are_in_order(prefix)
    prefix.referenced()
    assert settled["told"]
    assert not first.find("job_settled", outcome="done")
    assert (record.attempts, record.failures) == (2, 0)
    assert record.worker == prefix.head()["holder"]
    assert prefix.head()["status"] == "complete"


def test_a_worker_cut_off_from_storage_is_fenced_there_when_the_link_heals_and_stops_its_program(world: World) -> None:
    prefix = Prefix(world.storage)
    # A heartbeat every minute and a half: it is storage that tells, not the queue.
    world.submit(world.bash(WHO), sync=snapshots(), heartbeat_interval=100)
    with FaultProxy("127.0.0.1", world.storage.port) as proxy:
        settings = {**QUICK, "AWS_ENDPOINT_URL_S3": proxy.url, "HEELER_S3_TIMEOUT": "1"}
        with world.worker(**settings) as first:
            first.wait_for("committed")
            proxy.set(partition=True)
            lapse(world)
            with world.worker(name="b", machine="other", **QUICK) as second:
                assert second.wait_for("job_received")["attempt"] == 2
                second.wait_for("committed", count=2)
                first.wait_until(lambda: first.find("storage_retried") or first.find("commit_failed"), "a refusal")
                pid = world.told_pid("pid-1")
                assert alive(pid)
                before = settle(world, prefix)
                proxy.clear()
                fault = first.wait_for("fenced", timeout=90)
                assert fault["epoch"] == 2
                assert fault["holder"] == prefix.head()["holder"]
                first.wait_for("job_settled", outcome="lost")
                assert not alive(pid)
                assert not first.find("lease_lost")
                assert {key: data for key, data in prefix.objects().items() if not left(key)} == {
                    key: data for key, data in before.items() if not left(key)
                }
                world.tell("finish")
                record = world.wait_state("done")
                second.wait_for("job_settled", outcome="done")
    holders_are_in_order(prefix)
    assert (record.attempts, record.failures) == (2, 0)
    assert len(second.find("job_settled", outcome="done")) == 1


def test_a_worker_whose_job_was_finished_by_another_is_fenced_and_does_not_report_it(world: World) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        "echo $$ > $W/pid-$HEELER_ATTEMPT; echo $HEELER_ATTEMPT > $CHECKPOINT_DIR/state\n"
        "test $HEELER_ATTEMPT = 1 || exit 0\n"
        "while ! test -e $W/go; do sleep 0.01; done; echo late > $CHECKPOINT_DIR/state; exit 3"
    )
    world.submit(program, sync=snapshots(), heartbeat_interval=100)
    with world.worker(**QUICK) as first:
        first.wait_for("committed")
        lapse(world)
        with world.worker(name="b", machine="other", **QUICK):
            record = world.wait_state("done")
            before = prefix.objects()
            world.tell("go")
            first.wait_for("job_settled", outcome="lost")
    assert prefix.objects().items() >= before.items()
    assert prefix.newest() == {"state": b"2\n"}
    assert world.job() == record
    assert (record.failures, record.result) == (0, {"exit_code": 0, "signal": None})


def test_a_job_longer_than_its_lease_that_goes_on_committing_stays_with_one_worker(world: World) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        "for number in $(seq 6); do echo $number > $CHECKPOINT_DIR/new; mv $CHECKPOINT_DIR/new $CHECKPOINT_DIR/state\n"
        "sleep 1.5; done; echo x >> $W/ends"
    )
    world.submit(program, sync=snapshots(), heartbeat_interval=0.5)
    with world.worker(**QUICK) as first, world.worker(name="b", machine="other", **QUICK) as second:
        record = world.wait_state("done", timeout=60)
        committed = [len(worker.find("committed")) for worker in (first, second)]
    assert sorted(committed)[0] == 0
    assert max(committed) >= 3
    assert (record.attempts, record.interruptions) == (1, 0)
    assert world.told("ends") == "x\n"
    assert {head["epoch"] for head in prefix.heads()} == {1}
    assert prefix.newest() == {"state": b"6\n"}


def lapse(world: World) -> None:
    """The queue takes the lease for over, as if no heartbeat had come."""
    connection = sqlite3.connect(world.queue / "queue.db", timeout=10)
    try:
        with connection:
            connection.execute("UPDATE jobs SET expires = 1 WHERE state = 'running'")
    finally:
        connection.close()
