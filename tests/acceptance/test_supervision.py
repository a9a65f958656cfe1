"""The program's process: its output, its environment, its end, and that nothing of it outlives its job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.acceptance.world import FAMILY, JOB, MEMBERS, World, alive, eventually

# The end of the runtime.


def test_a_killed_runtime_takes_its_program_with_it_and_the_next_one_ends_what_is_left(world: World) -> None:
    world.submit(world.python(FAMILY + "await_('never')"), heartbeat_interval=0.3)
    with world.worker() as first:
        pids = {name: world.told_pid(name) for name in MEMBERS}
        first.signal(signal.SIGKILL)
        first.wait()
        eventually(lambda: not alive(pids["pid"]), "the program is dead", timeout=5)
    # The kernel ends only the child itself; its descendants had nobody to end them yet.
    assert alive(pids["daemon"])
    with world.worker() as second:
        second.wait_for("leftover_processes_killed")
        assert not [name for name, pid in pids.items() if alive(pid)]
        # Only then does it take the job, whose lease has lapsed.
        taken = second.wait_for("job_received")
        assert taken["attempt"] == 2
        assert [event["event"] for event in second.events].index("leftover_processes_killed") < [
            event["event"] for event in second.events
        ].index("job_received")
    assert world.job().failures == 0


def test_a_second_runtime_on_the_same_state_folder_is_refused_in_one_line(world: World) -> None:
    with world.worker() as first:
        first.wait_for("phase", phase="receive")
        with world.worker() as second:
            assert second.wait() == 64
        assert len(second.lines) == 1
        assert second.lines[0].startswith("heeler: another heeler uses the state folder")
        assert "HEELER_STATE_DIR" in second.lines[0]
        assert first.process.poll() is None


def test_a_process_that_hides_without_environment_or_session_dies_with_its_job(world: World) -> None:
    hidden = "env -i setsid bash -c 'echo $$ > '$W'/hidden; while :; do sleep 100; done' >/dev/null 2>&1 &"
    world.submit(world.bash(f"({hidden})\nwhile ! test -s $W/hidden; do sleep 0.01; done"))
    try:
        with world.worker():
            world.wait_state("done")
            assert not alive(world.told_pid("hidden"))
    finally:
        pid = world.told_pid("hidden")
        if alive(pid):
            os.kill(pid, signal.SIGKILL)


def test_a_full_state_folder_ends_no_runtime_and_the_job_is_handed_on(world: World) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    disk = world.folder / "state-a"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs can be mounted here")
    try:
        world.submit(world.bash(f"head -c 5000000 /dev/zero > {disk}/filler; exit 0"), "filling")
        with world.worker("--control", "127.0.0.1:0", name="a") as worker:
            worker.wait_for("job_settled", job_id="filling", timeout=30)
            for _ in range(3):
                world.submit(world.bash("exit 0"), job_id := f"job-{len(worker.find('job_settled'))}")
                worker.wait_for("job_settled", job_id=job_id)
            assert worker.process.poll() is None
            worker.wait_for("journal_failed")
            reasons = [event["reason"] for event in worker.find("job_settled", outcome="release")]
            assert any(f"the state folder {disk} can't be written" in reason for reason in reasons), reasons
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
        with world.worker("--control", "127.0.0.1:0", name="a") as worker:
            worker.wait_for("control_address_not_kept")
            worker.wait_for("phase", phase="receive")
        (disk / "filler").unlink()
        with world.worker(name="a"):
            world.wait_state("done", job_id)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


# Output.


def test_output_is_passed_through_and_kept_in_the_jobs_log(world: World) -> None:
    world.submit(
        world.bash("echo to-stdout; echo to-stderr >&2; printf 'no line end'; head -c 3000000 /dev/zero | tr '\\0' x")
    )
    with world.worker() as worker:
        world.wait_state("done")
        worker.wait_until(lambda: len(worker.stdout) >= 3_000_000, "the output")
    assert worker.stdout == b"to-stdout\nno line end" + b"x" * 3_000_000
    assert worker.lines.count("to-stderr") == 1
    log = (world.folder / "state-a/jobs" / JOB / "job.log").read_bytes()
    assert b"to-stdout\n" in log
    assert b"to-stderr\n" in log
    assert log.count(b"x") == 3_000_000


def test_the_jobs_log_keeps_the_output_of_all_attempts(world: World) -> None:
    world.submit(world.bash("echo attempt $HEELER_ATTEMPT; test $HEELER_ATTEMPT = 2"))
    with world.worker(HEELER_RETRY_DELAY="0"):
        world.wait_state("done")
    assert (world.folder / "state-a/jobs" / JOB / "job.log").read_text() == "attempt 1\nattempt 2\n"


@pytest.mark.parametrize("stream", [1, 2], ids=["stdout", "stderr"])
def test_a_reader_who_stops_reading_our_output_stops_neither_heartbeats_nor_the_drain(
    world: World, stream: int
) -> None:
    fifo = world.folder / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        flood = f"echo x > $W/runs; exec head -c 100000000 /dev/zero >&{stream}"
        world.submit(world.bash(flood), heartbeat_interval=0.5)
        wrapper = ["sh", "-c", f'exec "$@" {stream}>{fifo}', "sh"]
        with world.worker(wrapper=wrapper, HEELER_STOP_GRACE="3", PYTHONUNBUFFERED="") as worker:
            world.told("runs")
            with world.worker(name="b") as other:
                time.sleep(2.5)  # longer than the lease of 1.5 s
                assert (world.job().state, world.job().attempts) == ("running", 1)
                assert alive(world.told_pid())
                other.signal(signal.SIGTERM)
                assert other.wait() == 0
            asked = time.monotonic()
            worker.signal(signal.SIGTERM)
            assert worker.wait() == 0
            assert time.monotonic() - asked < 3 + 2.5  # the log waits 2 s for its reader
        assert world.job().state == "pending"
    finally:
        os.close(reader)


# The end of the program.


@pytest.mark.parametrize("program", ["no-such-program", "/etc", "{folder}/not-executable", "{folder}/no-program"])
def test_a_program_that_cannot_be_started_fails_the_job_and_says_why(world: World, program: str) -> None:
    (world.folder / "not-executable").write_text("#!/bin/sh\n")
    (world.folder / "no-program").write_bytes(b"\x7fELF nonsense")
    (world.folder / "no-program").chmod(0o755)
    path = program.format(folder=world.folder)
    world.submit([path], max_failures=1)
    with world.worker():
        record = world.wait_state("failed")
    assert f"{path!r} can't be started: " in record.reason


def test_a_job_that_runs_longer_than_its_timeout_has_failed_and_its_whole_tree_is_dead(world: World) -> None:
    world.submit(world.python(FAMILY + "await_('never')"), timeout=1.5, max_failures=1)
    with world.worker():
        record = world.wait_state("failed")
        pids = [world.told_pid(name) for name in MEMBERS]
        assert not [name for name, pid in zip(MEMBERS, pids, strict=True) if alive(pid)]
    assert "timeout of 1.5 s" in record.reason
    assert (record.attempts, record.failures) == (1, 1)


def test_an_exit_code_that_asks_for_another_run_is_not_counted(world: World) -> None:
    world.submit(world.bash("case $HEELER_ATTEMPT in 1) exit 75;; 2) exit 7;; esac"), max_failures=1)
    with world.worker("--retry-exit-codes", "7,75"):
        record = world.wait_state("done")
    assert (record.attempts, record.failures, record.interruptions) == (3, 0, 2)


def test_any_other_exit_code_is_counted_and_named(world: World) -> None:
    world.submit(world.bash("exit 7"), max_failures=2)
    with world.worker(HEELER_RETRY_DELAY="0"):
        record = world.wait_state("failed")
    assert (record.attempts, record.failures, record.reason) == (2, 2, "exit code 7")
    assert record.result == {"exit_code": 7, "signal": None}


# Environment.


def test_the_program_is_told_its_job_its_attempt_and_its_folders(world: World) -> None:
    sync = {"before": [world.entry("in")], "during": [world.entry("ck")], "after": [world.entry("out")]}
    program = world.python("import json\ntell('told', json.dumps({'cwd': os.getcwd(), **env}))\n")
    world.submit(program, sync=sync, environment={"MINE": "1", "HEELER_JOB_ID": "forged", "PATH": os.environ["PATH"]})
    with world.worker():
        world.wait_state("done")
    told = json.loads(world.told("told"))
    for name in ("HEELER_JOB_ID", "KELPIE_JOB_ID", "AWS_BATCH_JOB_ID"):
        assert told[name] == JOB
    assert told["HEELER_ATTEMPT"] == told["AWS_BATCH_JOB_ATTEMPT"] == "1"
    assert told["MINE"] == "1"
    for name, folder in {"INPUT_DIR": "in", "CHECKPOINT_DIR": "ck", "OUTPUT_DIR": "out"}.items():
        assert told[name] == told[f"HEELER_{name}"] == str(world.path(folder))
    assert Path(told["cwd"]) == world.folder


def test_the_program_has_no_descriptor_and_no_signal_mask_of_ours(world: World) -> None:
    program = world.python(
        "names = [os.readlink(f'/proc/self/fd/{fd}') for fd in os.listdir('/proc/self/fd') if int(fd) > 2"
        " and os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "status = dict(line.split(':', 1) for line in Path('/proc/self/status').read_text().splitlines())\n"
        "tell('told', '|'.join([*names, status['SigBlk'].strip(), sys.stdin.read()]))\n"
    )
    world.submit(program)
    with world.worker():
        world.wait_state("done")
    assert world.told("told").split("|")[-2:] == ["0" * 16, ""]
    assert len(world.told("told").split("|")) == 2, world.told("told")


# Heartbeats do not depend on the program.


def test_programs_that_spin_on_every_core_or_are_stopped_keep_their_lease(world: World) -> None:
    spin = "for _ in $(seq $(($(nproc) * 2))); do (while :; do :; done) & done; echo x > $W/spins; wait"
    world.submit(world.bash(spin), "spinning", heartbeat_interval=1)
    world.submit(world.bash("echo $$ > $W/stopped; kill -STOP $$"), "stopped", heartbeat_interval=1)
    with world.worker() as one, world.worker(name="b") as two, world.worker(name="c") as idle:
        world.told("spins")
        pid = world.told_pid("stopped")
        eventually(lambda: psutil.Process(pid).status() == psutil.STATUS_STOPPED, "it is stopped")
        time.sleep(4)  # longer than the lease of 3 s
        for job_id in ("spinning", "stopped"):
            assert (world.job(job_id).state, world.job(job_id).attempts) == ("running", 1)
        # A stopped program is told to stop all the same, and killed.
        for worker in (one, two, idle):
            worker.signal(signal.SIGINT)
            worker.wait_for("drain")
            worker.signal(signal.SIGINT)
        assert [worker.wait() for worker in (one, two, idle)] == [0, 0, 0]
    assert not alive(pid)
    assert {world.job(job_id).state for job_id in ("spinning", "stopped")} == {"pending"}


def test_orphans_of_the_program_that_end_are_reaped_while_it_runs(world: World) -> None:
    program = world.bash("for _ in $(seq 20); do (setsid sleep 0.05 &); done; echo x > $W/forked; sleep 1000")
    world.submit(program)
    with world.worker() as worker:
        world.told("forked")

        def zombies() -> list[int]:
            children = [child.pid for child in psutil.Process(worker.pid).children()]
            return [pid for pid in children if psutil.pid_exists(pid) and not alive(pid)]

        eventually(zombies, "the orphans have become ours")
        eventually(lambda: not zombies(), "they are reaped", timeout=15)
        assert world.job().state == "running"
