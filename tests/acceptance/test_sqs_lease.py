"""A message stays ours whatever the program does, and is handed back when the worker is told to stop or is killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.acceptance.sqs_world import NO_RECORDS, SqsWorld, sqs_world
from tests.acceptance.world import alive, eventually
from tests.support.sqs_server import SqsServer

VISIBILITY = 3
SETTINGS = {"HEELER_SQS_VISIBILITY": str(VISIBILITY)}
LAPSES = 5
"""So many visibilities a program behaves badly."""
SHORT_POLLS = {"HEELER_STOP_GRACE": "6"}
"""A poll takes a sixth of it: one of moto's does not see that a group is free again."""
PROMPT = 15.0
"""Seconds; a message that was not handed back would come after a minute, the visibility where nothing else is said."""

# An app whose only job does as its body says, until it is told to end.
APP = """
import os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
W = Path({folder!r})
class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_): pass
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with open(W / "calls", "a") as file: file.write("call\\n")
        children = []
        if body == b"spin":
            for _ in range({spinners}):
                if not (child := os.fork()):
                    while True: pass
                children.append(child)
        (W / "new").write_text(str(os.getpid())); (W / "new").rename(W / "pid")
        while not (W / "finish").exists(): time.sleep(0.05)
        for child in children:
            os.kill(child, 9); os.waitpid(child, 0)
        self.send_response(200)
        self.send_header("Content-Length", "4")
        self.end_headers()
        self.wfile.write(b"done")
server = HTTPServer(("127.0.0.1", 0), Handler)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as made:
        yield made


@pytest.fixture
def world(tmp_path: Path, server: SqsServer) -> Iterator[SqsWorld]:
    with sqs_world(tmp_path, server) as made:
        yield made


def stays_ours(world: SqsWorld, seconds: float) -> None:
    """All that time the one message is hidden, and was received once."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        message = world.message()
        assert message["hidden"] > 0, world.logs()
        assert message["receives"] == 1, world.logs()
        time.sleep(0.1)


@pytest.mark.parametrize("behaviour", ["spin", "stop"])
def test_an_app_that_spins_on_all_cores_or_is_stopped_keeps_its_lease(world: SqsWorld, behaviour: str) -> None:
    app = world.folder / "app.py"
    app.write_text(APP.format(folder=str(world.folder), spinners=2 * (os.cpu_count() or 1)))
    world.send(behaviour)
    program = ("--", sys.executable, "-I", "-S", str(app))
    with world.worker(*program, **SETTINGS) as first:
        process = psutil.Process(world.told_pid())
        with world.worker(*program, name="b", **SETTINGS) as second:
            second.wait_for("phase", phase="receive")
            if behaviour == "stop":
                process.suspend()
            else:
                busy = psutil.cpu_times()
            stays_ours(world, LAPSES * VISIBILITY)
            if behaviour == "spin":
                assert sum(child.cpu_times().user for child in process.children()) > LAPSES, busy
            world.tell("finish")
            process.resume()
            first.wait_for("job_settled", outcome="done")
            world.wait_empty()
            assert not second.find("job_received")
    assert not first.find("lease_lapsed")
    assert world.told("calls") == "call\n"


# A drain.

# Saves one last time when it is told to stop; another attempt says what it found.
SAVES = (
    "trap 'echo last > $CHECKPOINT_DIR/state; exit 0' TERM\n"
    "cat $CHECKPOINT_DIR/state > $W/found-$HEELER_JOB_ID; if test $HEELER_ATTEMPT != 1; then exit 0; fi\n"
    "echo first > $CHECKPOINT_DIR/state; touch $W/runs-$HEELER_JOB_ID; while :; do sleep 0.05; done"
)


@pytest.mark.parametrize("records", [{}, NO_RECORDS], ids=["records", "no records"])
def test_sigterm_hands_back_all_jobs_at_once_with_their_last_checkpoints(
    world: SqsWorld, records: dict[str, str]
) -> None:
    jobs = ["job-1", "job-2", "job-3"]
    for job_id in jobs:
        world.submit(world.bash(SAVES), job_id, sync=world.checkpoints())
    with world.worker("--concurrency", "3", **records) as worker:
        for job_id in jobs:
            world.told(f"runs-{job_id}")
            assert world.told(f"found-{job_id}") == ""
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert [message["hidden"] <= 0 for message in world.left()] == [True] * 3, world.logs()
    assert [message["receives"] for message in world.left()] == [1] * 3
    for job_id in jobs:
        assert world.stored("ck/state", job_id) == b"last\n"
        record = world.record(job_id)
        if records:
            assert record is None
        else:
            assert record is not None
            assert (record.state, record.attempts, record.interruptions, record.failures) == ("pending", 1, 1, 0)
            assert [entry.outcome for entry in record.history] == ["release"]
    with world.worker(name="b", machine="other", **records):
        world.wait_empty(PROMPT)
    for job_id in jobs:
        assert world.told(f"found-{job_id}") == "last\n"
    assert not world.set_aside()


def test_a_worker_that_waits_for_jobs_hides_none_when_it_is_told_to_stop(world: SqsWorld) -> None:
    with world.worker() as worker:
        worker.wait_for("phase", phase="receive")
        worker.signal(signal.SIGTERM)
        world.send({"id": "job-1", "command": "true"})
        assert worker.wait(10) == 0
    if world.left():  # else it was taken and done before the signal was heard
        eventually(lambda: world.message()["hidden"] <= 0, "it is visible", 1.0)


# A FIFO group, in which one message that is held keeps back the rest.


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("suffix", ["", ".fifo"])
def test_no_group_and_no_job_is_blocked_by_a_worker_that_ended_and_was_started_again(
    tmp_path: Path, server: SqsServer, end: signal.Signals, suffix: str
) -> None:
    with sqs_world(tmp_path, server, suffix) as world:
        program = world.bash(
            "echo $HEELER_JOB_ID $HEELER_ATTEMPT >> $W/order; touch $W/runs\n"
            "while ! test -e $W/finish; do sleep 0.05; done"
        )
        jobs = ["job-1", "job-2", "job-3"] if suffix else ["job-1"]
        for job_id in jobs:
            document = {"id": job_id, "command": program[0], "arguments": program[1:]}
            world.send(document, group="g" if suffix else "")
        with world.worker(**SHORT_POLLS) as worker:
            pid = world.told_pid()
            world.told("runs")
            worker.signal(end)
            assert worker.wait() == (0 if end == signal.SIGTERM else -end)
            eventually(lambda: not alive(pid), "the program is gone")
        world.tell("finish")
        began = time.monotonic()
        with world.worker("--concurrency", "2", **SHORT_POLLS):
            eventually(lambda: (world.folder / "order").read_text().count("\n") > 1, "it is received again", PROMPT)
            world.wait_empty()
        print(f"{end.name} {suffix or 'standard'}: all done {time.monotonic() - began:.1f} s after the start")
        assert world.told("order").splitlines() == ["job-1 1", "job-1 2", *(f"{job_id} 1" for job_id in jobs[1:])]
        record = world.record()
        assert record is not None
        assert (record.state, record.attempts, record.interruptions, record.failures) == ("done", 2, 1, 0)
        assert not world.set_aside()
