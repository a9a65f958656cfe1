"""How a program with snapshots ends: in a drain, by itself, failed or killed; what of it is committed and what not."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from tests.acceptance.snapshot_programs import NEVER, QUICK, Prefix, in_worlds, snapshots
from tests.acceptance.world import MIB, World, alive, eventually
from tests.support.s3 import Slow, Stall
from tests.support.worker import Worker

GRACE = 20.0

# What the attempt finds, once per attempt.
FOUND = "cat $CHECKPOINT_DIR/state > $W/found-$HEELER_ATTEMPT 2>/dev/null; test $HEELER_ATTEMPT = 1 || exit 0\n"


def drained(worker: Worker, within: float = GRACE) -> None:
    """SIGTERM, and its exit with 0 in time."""
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.wait(within + 20) == 0, worker.lines[-30:]
    assert time.monotonic() - asked < within


def test_what_the_program_writes_in_its_handler_is_the_next_workers_start(tmp_path: Path) -> None:
    cases = {f"{ready} {code}": (ready, code) for ready in (None, "state") for code in (0, 3)}
    in_worlds(tmp_path, cases, writes_in_its_handler)


def writes_in_its_handler(world: World, case: tuple[str | None, int]) -> None:
    ready, code = case
    program = world.bash(
        f"{FOUND}echo first > $CHECKPOINT_DIR/state\n"
        "stop() { sleep 0.5; head -c 9000000 /dev/urandom > $W/last; cp $W/last $CHECKPOINT_DIR/state\n"
        f"  exit {code}; }}\n"
        "trap stop TERM; touch $W/runs; while :; do sleep 0.01; done"
    )
    world.submit(program, sync=snapshots(ready))
    with world.worker(HEELER_STOP_GRACE=f"{GRACE}") as first:
        world.told("runs")
        drained(first)
    record = world.job()
    assert (record.state, record.failures, record.interruptions) == ("pending", 0, 1)
    with world.worker(name="b", machine="other"):
        world.wait_state("done")
    assert (world.folder / "found-2").read_bytes() == (world.folder / "last").read_bytes()
    assert world.job().attempts == 2
    Prefix(world.storage).referenced()


def test_a_drain_in_the_middle_of_a_commit_ends_it_and_adds_the_last_state(world: World) -> None:
    prefix = Prefix(world.storage)
    world.storage.faults.add(Slow(up=4 * MIB), operation="PutObject", key="*/packs/*")
    program = world.bash(
        f"{FOUND}trap 'echo last > $CHECKPOINT_DIR/state; exit 0' TERM\n"
        f"head -c {12 * MIB} /dev/urandom > $CHECKPOINT_DIR/big; echo first > $CHECKPOINT_DIR/state\n"
        "touch $W/runs; while :; do sleep 0.01; done"
    )
    world.submit(program, sync=snapshots("state"))
    with world.worker(HEELER_STOP_GRACE=f"{GRACE}") as first:
        world.storage.stats.wait_until(lambda _: world.storage.stats.bytes_in > MIB or bool(prefix.packs()), 30)
        drained(first)
    assert prefix.newest()["state"] == b"last\n"
    assert len(prefix.newest()["big"]) == 12 * MIB
    assert world.job().state == "pending"


def test_a_drain_while_storage_hangs_hands_the_job_back_inside_the_grace_with_the_generation_before(
    world: World,
) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        f"{FOUND}trap 'echo last > $CHECKPOINT_DIR/state; exit 0' TERM\n"
        "echo first > $CHECKPOINT_DIR/state; touch $W/runs; while :; do sleep 0.01; done"
    )
    world.submit(program, sync=snapshots("state"))
    with world.worker(HEELER_STOP_GRACE="4") as first:
        first.wait_for("committed")
        hold = world.storage.faults.add(Stall(), operation="PutObject")
        drained(first, within=5)
        assert first.find("grace_over")
    world.storage.faults.remove(hold)
    assert world.job().state == "pending"
    with world.worker(name="b", machine="other") as second:
        world.wait_state("done")
        # The stalled write was of an older epoch, or it came in time; it is one or the other.
        start = second.wait_for("acquired")["generation"]
    assert world.told("found-2") == prefix.files(start)["state"].decode()
    prefix.referenced()


def test_a_drain_during_the_restore_hands_the_job_back_and_changes_no_generation(world: World) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(f"{FOUND}echo first > $CHECKPOINT_DIR/state; touch $W/runs; sleep 1000")
    world.submit(program, sync=snapshots("state"), heartbeat_interval=0.5)
    with world.worker() as first:
        first.wait_for("committed")
        first.process.kill()
        first.wait()
    hold = world.storage.faults.add(Stall(), operation="GetObject", key="*/packs/*")
    with world.worker(name="b", machine="other", HEELER_STOP_GRACE="4") as second:
        hold.wait_held(timeout=30)
        drained(second, within=5)
    world.storage.faults.clear()
    assert not (world.folder / "found-2").exists()
    with world.worker(name="c", machine="third"):
        world.wait_state("done")
    assert world.told("found-3") == "first\n"
    assert prefix.files(1) == {"state": b"first\n"}


# A program that fails or dies may do so inside a save.
DEATHS = {
    "exit 1": "exit 1",
    "SIGKILL": "kill -9 $$",
    "SIGSEGV": "ulimit -c 0; kill -SEGV $$",
}


def test_a_program_that_fails_in_the_middle_of_a_save_adds_nothing(tmp_path: Path) -> None:
    cases = {f"{death} {ready}": (death, ready) for death in DEATHS for ready in (None, "*/done")}
    in_worlds(tmp_path, cases, fails_in_the_middle)


def fails_in_the_middle(world: World, case: tuple[str, str | None]) -> None:
    death, ready = case
    prefix = Prefix(world.storage)
    program = world.bash(
        "(cd $CHECKPOINT_DIR && cat */* > $W/found-$HEELER_ATTEMPT 2>/dev/null)\n"
        "test $HEELER_ATTEMPT = 1 || exit 0\n"
        "cd $CHECKPOINT_DIR; mkdir 1; for name in a b done; do echo 1 > 1/$name; done\n"
        f"touch $W/saved; while ! test -e $W/go; do sleep 0.01; done; mkdir 2; echo 2 > 2/a; {DEATHS[death]}"
    )
    world.submit(program, sync=snapshots(ready))
    with world.worker(HEELER_RETRY_DELAY="0.1", **QUICK) as first:
        first.wait_for("committed")
        world.tell("go")
        first.wait_for("job_settled", outcome="retry")
        assert prefix.generation() == 1
        # Neither on the same machine nor later.
        world.wait_state("done")
    assert world.told("found-2") == "1\n1\n1\n"
    assert set(prefix.files(1)) == {"1/a", "1/b", "1/done"}


def test_a_program_that_fails_right_after_a_whole_save_keeps_it(world: World) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        f"{FOUND}echo whole > $CHECKPOINT_DIR/state; touch $CHECKPOINT_DIR/done; touch $W/saved\n"
        "while ! test -e $W/go; do sleep 0.01; done; sleep 0.3; kill -9 $$"
    )
    world.submit(program, sync=snapshots("done"))
    hold = world.storage.faults.add(Stall(), operation="PutObject", key="*/packs/*", count=1)
    with world.worker(HEELER_RETRY_DELAY="0.1") as first:
        hold.wait_held(timeout=30)
        # It dies while the commit of what it had saved is on its way.
        world.tell("go")
        pid = world.told_pid()
        eventually(lambda: not alive(pid), "it is dead")
        world.storage.faults.remove(hold)
        first.wait_for("job_settled", outcome="retry")
        assert set(prefix.newest()) == {"done", "state"}
        world.wait_state("done")
    assert world.told("found-2") == "whole\n"


def test_a_program_that_ends_with_0_is_kept_whole_although_nothing_was_quiet_or_ready(world: World) -> None:
    prefix = Prefix(world.storage)
    world.submit(world.bash("echo end > $CHECKPOINT_DIR/state"), sync=snapshots("never"))
    with world.worker(**NEVER):
        world.wait_state("done")
    assert prefix.newest() == {"state": b"end\n"}
    assert prefix.head()["status"] == "complete"
    assert len(prefix.heads()) == 2  # acquired; committed and complete in one


def test_exit_code_75_keeps_the_folder_whole_and_the_next_attempt_goes_on_from_it(world: World) -> None:
    world.submit(world.bash(f"{FOUND}echo again > $CHECKPOINT_DIR/state; exit 75"), sync=snapshots("never"))
    with world.worker(**NEVER):
        record = world.wait_state("done")
    assert world.told("found-2") == "again\n"
    assert record.failures == 0
