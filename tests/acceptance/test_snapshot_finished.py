"""A job that is done is done: delivered or submitted again it runs only with `--fresh`, from an empty folder."""

from __future__ import annotations

import json
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.snapshot_programs import QUICK, Prefix, snapshots
from tests.acceptance.world import BUCKET, JOB, World, eventually
from tests.support.worker import Worker, heeler

DONE = {"exit_code": 0, "signal": None}

# Counts its runs, and says what it found.
ONCE = (
    "echo $HEELER_ATTEMPT >> $W/runs; ls -A $CHECKPOINT_DIR >> $W/found; cat $CHECKPOINT_DIR/state >> $W/found\n"
    "echo end > $CHECKPOINT_DIR/state; echo x > $W/waits\n"
    "while ! test -e $W/finish; do sleep 0.01; done; exit 0"
)


def shown(queue: Path, job_id: str = JOB) -> dict[str, Any]:
    """The job as `heeler jobs show` prints it."""
    said = heeler("jobs", "--source", f"local:{queue}", "show", job_id, "--json")
    assert said.returncode == 0, said
    found: dict[str, Any] = json.loads(said.stdout)
    return found


def killed_between_head_and_queue(world: World, worker: Worker, prefix: Prefix) -> None:
    """End the program while the queue can't be changed, and the worker once storage has it that the job is done."""
    world.told("waits")
    lock = sqlite3.connect(world.queue / "queue.db", isolation_level=None, timeout=10)
    try:
        lock.execute("BEGIN IMMEDIATE")
        world.tell("finish")
        eventually(lambda: prefix.heads() and prefix.head()["status"] == "complete", "the head says that it is done")
        worker.signal(signal.SIGKILL)
        worker.wait()
    finally:
        lock.close()
    assert world.job().state == "running"


@pytest.mark.parametrize("outputs", [False, True], ids=["checkpoints", "and outputs"])
def test_a_job_whose_worker_dies_before_it_told_the_queue_is_acknowledged_unrun_with_the_result_it_had(
    world: World, outputs: bool
) -> None:
    prefix = Prefix(world.storage)
    sync = {**snapshots(), **(world.outputs() if outputs else {})}
    program = world.bash(ONCE.replace("exit 0", "echo out > $OUTPUT_DIR/out" if outputs else "exit 0"))
    world.submit(program, sync=sync, heartbeat_interval=0.5)
    with world.worker(**QUICK) as first:
        killed_between_head_and_queue(world, first, prefix)
    before = prefix.objects()
    if outputs:  # they came before the head said that the job is done
        assert world.stored("out/out") == b"out\n"
    with world.worker(name="b", machine="other", **QUICK) as second:
        world.wait_state("done")
        settled = second.wait_for("job_settled", outcome="done")
        assert "done already" in settled["reason"]
    record = shown(world.queue)
    assert (record["state"], record["attempts"], record["result"]) == ("done", 2, DONE)
    assert world.told("runs") == "1\n"
    assert prefix.objects() == before
    assert prefix.newest() == {"state": b"end\n"}


def test_a_job_that_was_done_does_not_run_again_when_submitted_to_another_queue_and_does_with_fresh(
    world: World,
) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(ONCE)
    document = json.dumps({"id": JOB, "command": program[0], "arguments": program[1:], "sync": snapshots()})
    world.tell("finish")
    queues = [world.queue, world.folder / "queue-again", world.folder / "queue-fresh"]
    results = []
    for number, queue in enumerate(queues):
        fresh = ("--fresh",) if queue.name == "queue-fresh" else ()
        said = heeler("submit", "--source", f"local:{queue}", *fresh, "-", stdin=document)
        assert (said.returncode, said.stdout) == (0, f"{JOB}\n"), said
        machine, environment = f"machine-{number}", QUICK
        with world.worker(
            "--source", f"local:{queue}", "--max-jobs", "1", name=machine, machine=machine, **environment
        ) as worker:
            assert worker.wait() == 0
            results.append((shown(queue)["result"], len((world.folder / "runs").read_text().split())))
        if queue.name == "queue-again":
            assert prefix.generation() == 1
    assert results == [(DONE, 1), (DONE, 1), (DONE, 2)]
    assert world.told("found") == ""
    runs = [kept["run_id"] for kept in prefix.kept().values()]
    assert len(runs) == 2
    assert runs[0] == ""
    assert runs[1]


def test_a_fresh_job_that_was_killed_goes_on_from_its_own_generation_and_not_from_the_former_runs(
    world: World,
) -> None:
    prefix = Prefix(world.storage)
    program = world.bash(
        "cat $CHECKPOINT_DIR/state >> $W/found 2>/dev/null\n"
        "echo $WHO > $CHECKPOINT_DIR/state; touch $W/wrote\n"
        "while ! test -e $W/finish; do sleep 0.01; done"
    )
    for who in ("former", "fresh"):
        document = {"id": JOB, "command": program[0], "arguments": program[1:], "sync": snapshots()}
        text = json.dumps({**document, "environment": {"WHO": who}, "heartbeat_interval": 0.5})
        queue = f"local:{world.folder / who}"
        said = heeler("submit", "--source", queue, *(("--fresh",) if who == "fresh" else ()), "-", stdin=text)
        assert said.returncode == 0, said
        if who == "former":
            world.tell("finish")
        for life in range(2 if who == "fresh" else 1):
            name = f"{who}-{life}"
            arguments = ("--source", queue, "--max-jobs", "1")
            with world.worker(*arguments, name=name, machine=name, **QUICK) as worker:
                if name == "fresh-0":
                    worker.wait_for("committed")
                    worker.process.kill()
                    worker.wait()
                    world.tell("finish")
                else:
                    assert worker.wait(60) == 0
        (world.folder / "finish").unlink()
    assert world.told("found") == "fresh\n"
    assert prefix.newest() == {"state": b"fresh\n"}
    assert prefix.head()["status"] == "complete"
    assert world.storage.objects(BUCKET).keys() == prefix.referenced().keys()
