"""What a hostile review did to the command line: each test is an attack that once worked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.acceptance.world import BUCKET, World, eventually
from tests.support.worker import Worker

# Two workers of one machine, and two jobs that name the same folder.


def test_two_jobs_with_one_folder_take_turns(world: World) -> None:
    folder = world.folder / "checkpoint"
    entry = {"bucket": BUCKET, "prefix": "{job_id}/ck/", "local_path": str(folder)}
    sync = {"before": [entry], "during": [entry]}
    program = world.bash(
        "name=$HEELER_JOB_ID; echo $name > $CHECKPOINT_DIR/ck-$name\n"
        "until [ -e $W/go ]; do sleep 0.02; done; ls $CHECKPOINT_DIR > $W/seen-$name"
    )
    world.submit(program, "j1", sync=sync)
    with world.worker(name="a") as first:
        eventually(lambda: world.stored("ck/ck-j1", "j1"), "the first job's checkpoint is stored")
        world.submit(program, "j2", sync=sync)
        with world.worker(name="b") as second:
            failed = second.wait_for("restore_failed")
            assert f"{folder}: is in use by another job" in failed["error"]
            released = world.wait_state("pending", "j2")
            assert (released.failures, released.interruptions) == (0, 1)
            assert str(folder) in released.reason
            assert (folder / "ck-j1").read_text() == "j1\n"
            assert not (folder / ".heeler").exists()
            world.tell("go")
            world.wait_state("done", "j1")
            assert world.wait_state("done", "j2").failures == 0
            assert not first.find("deleted") + second.find("deleted")
    assert world.storage.objects(BUCKET) == {"j1/ck/ck-j1": b"j1\n", "j2/ck/ck-j2": b"j2\n"}
    assert world.versions("ck/ck-j1", "j1") == [b"j1\n"]
    assert [(world.folder / f"seen-{job}").read_text() for job in ("j1", "j2")] == ["ck-j1\n", "ck-j2\n"]


# A program that dies inside a save.

GOOD = b"GOOD" * 1000
DEATHS = {"exit-1": "os._exit(1)", "sigkill": "os.kill(os.getpid(), signal.SIGKILL)"}


FILL_STDOUT = """
os.set_blocking(1, False)
refused = 0
while refused < 40:
    try:
        refused = os.write(1, bytes(65536)) * 0
    except BlockingIOError:
        refused += 1
        time.sleep(0.005)
"""


@pytest.mark.parametrize("stdout", ["read", "not read"])
def test_half_a_save_of_a_program_that_died_in_it_never_replaces_the_last_good_one(world: World, stdout: str) -> None:
    wrapper: list[str] = []
    if stdout == "not read":
        os.mkfifo(world.folder / "unread")
        wrapper = ["bash", "-c", 'exec 3<> "$0"; exec "$@" >&3', str(world.folder / "unread")]
    with ExitStack() as stack:
        workers = []
        for job_id, death in DEATHS.items():
            program = world.python(
                "ck = Path(env['CHECKPOINT_DIR']) / 'ck'\n"
                f"ck.write_bytes({GOOD!r})\n"
                "await_('go')\n"
                f"{FILL_STDOUT if wrapper else ''}"
                "file = ck.open('wb')\n"
                "file.write(b'HALF')\n"
                "file.flush()\n" + death
            )
            world.submit(program, job_id, sync=world.checkpoints(), max_failures=1)
            arguments = {"name": job_id, "machine": job_id, "wrapper": wrapper}
            workers.append(stack.enter_context(world.worker("--max-jobs", "1", **arguments)))  # type: ignore[arg-type]
        for job_id in DEATHS:
            eventually(lambda job_id=job_id: world.stored("ck/ck", job_id), "stored")  # type: ignore[misc]
        world.tell("go")
        for worker in workers:
            assert worker.wait() == 0
    for job_id in DEATHS:
        assert world.job(job_id).state == "failed"
        assert world.versions("ck/ck", job_id) == [GOOD]


# A program that takes its output folder away.


def test_a_job_whose_output_folder_is_gone_at_its_end_has_failed(world: World) -> None:
    world.submit(world.bash("echo x > $OUTPUT_DIR/x; mv $OUTPUT_DIR $W/moved; exit 0"), sync=world.outputs())
    with world.worker("--max-jobs", "1") as worker:
        assert worker.wait() == 0
    record = world.job()
    assert (record.state, record.failures) == ("pending", 1)
    assert f"{world.path('out')}: is gone" in record.reason
    assert (world.folder / "moved" / "x").exists()


# A program that asks to be run again and again.

PROGRESSING = "n=$(ls $CHECKPOINT_DIR | wc -l); echo $n > $CHECKPOINT_DIR/step$n; [ $n -lt 12 ] && exit 75; exit 0"
FRUITLESS = "exit 75"


@contextmanager
def once(world: World, job_id: str, text: str) -> Iterator[Worker]:
    """A worker with the one job that it was given."""
    program = world.bash(text)
    path = Path(world.folder / f"{job_id}.json")
    document = {"id": job_id, "command": program[0], "arguments": program[1:], "sync": world.checkpoints()}
    path.write_text(json.dumps(document))
    state = world.folder / f"state-{job_id}"
    with Worker("--job", str(path), state_dir=state, env=world.environment(), cwd=world.folder) as worker:
        world.started.append(worker)
        yield worker


def test_asking_to_be_run_again_ends_the_job_only_if_nothing_comes_of_it(world: World) -> None:
    world.submit(world.bash(PROGRESSING), "queued-good", sync=world.checkpoints())
    world.submit(world.bash(FRUITLESS), "queued-barren", sync=world.checkpoints())
    with (
        world.worker(),
        once(world, "once-good", PROGRESSING) as good,
        once(world, "once-barren", FRUITLESS) as barren,
    ):
        done, failed = world.wait_state("done", "queued-good", 40), world.wait_state("failed", "queued-barren", 40)
        assert good.wait() == 0
        assert barren.wait() == 1
    assert (done.attempts, done.failures) == (13, 0)
    assert (failed.attempts, failed.failures) == (10, 0)
    reason = "10 attempts in a row ended without an answer and without anything made durable; the last: exit code 75"
    assert failed.reason == reason
    assert good.find("no_more_jobs", exit_code=0)
    assert barren.find("no_more_jobs", exit_code=1, reason=reason)
    for job_id in ("queued-good", "once-good"):
        assert len([key for key in world.storage.objects(BUCKET) if key.startswith(f"{job_id}/")]) == 13
