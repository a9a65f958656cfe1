"""300 jobs of an SQS queue, four workers of four jobs each, and every two seconds a SIGKILL: each job is done once.

Besides, one call of twenty to the queue fails, half of those after doing what was asked. The kills are seeded, and
most of them aimed at a phase; what they really hit is read from the dead workers' last words, a phase for each job
that was under way, and printed.
"""

from __future__ import annotations

import json
import random
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.snapshot_programs import snapshots
from tests.acceptance.sqs_world import SqsWorld, sqs_world
from tests.acceptance.world import BUCKET
from tests.support.sqs_server import SqsServer
from tests.support.worker import Worker

JOBS = 300
WORKERS = 4
CONCURRENCY = 4
VISIBILITY = 10
STEPS = 6
KILLS = 30
_BETWEEN_KILLS = 2.0
_AIM_SECONDS = 1.0
_GIVE_UP_SECONDS = 240.0
PHASES = {"receive": 0.02, "restore": 0.1, "run": 1.0, "upload": 0.1, "settle": 0.05}
"""What kills are aimed at, and for how long each lasts, about."""
_SNAPSHOT_EVERY = 10
"""Each tenth job keeps snapshots, the others plain files: a generation costs requests."""

# Each step depends on all before it; what is saved is replaced whole.
PROGRAM = """
import os, sys, time, zlib
folder = os.environ["CHECKPOINT_DIR"]
saved = os.path.join(folder, "state")
step, chain = 0, zlib.crc32(sys.argv[1].encode())
if os.path.exists(saved):
    with open(saved) as file:
        step, chain = map(int, file.read().split())
for step in range(step + 1, int(sys.argv[2]) + 1):
    time.sleep(0.1)
    chain = zlib.crc32(b"%d" % chain)
    with open(saved + ".new", "w") as file:
        file.write(f"{step} {chain}")
    os.rename(saved + ".new", saved)
with open(os.path.join(os.environ["OUTPUT_DIR"], "chain"), "w") as file:
    file.write(str(chain))
"""


def expected(job_id: str) -> bytes:
    """The output of an uninterrupted run, by the program's own rule."""
    chain = zlib.crc32(job_id.encode())
    for _ in range(STEPS):
        chain = zlib.crc32(b"%d" % chain)
    return str(chain).encode()


class Machines:
    """Workers, each with a folder of its own; one that was killed is started again there at once."""

    def __init__(self, world: SqsWorld) -> None:
        self._world = world
        self.workers = [self._start(slot) for slot in range(WORKERS)]
        self.dead: list[Worker] = []

    def _start(self, slot: int) -> Worker:
        home = self._world.folder / f"machine-{slot}"
        home.mkdir(exist_ok=True)
        environment = self._world.environment(HEELER_SQS_VISIBILITY=str(VISIBILITY))
        return Worker(
            *("--source", "sqs", "--concurrency", str(CONCURRENCY)),
            state_dir=home / "state",
            env=environment,
            cwd=home,
        )

    def kill(self, slot: int) -> Counter[str]:
        """SIGKILL; the phases of the jobs that it had, as far as it could still say."""
        worker = self.workers[slot]
        with worker:
            worker.process.kill()
            worker.wait()
        self.dead.append(worker)
        self.workers[slot] = self._start(slot)
        return phases(worker)

    def aim(self, rng: random.Random, hits: Counter[str]) -> int:
        """The worker to kill: one that has just entered a phase, if one does so in time; else one that has begun.

        A phase that was not hit yet comes before those that were.
        """
        wanted = rng.choice([phase for phase in PHASES if phase not in hits] or list(PHASES))
        since = [len(worker.find("phase")) for worker in self.workers]
        give_up = time.monotonic() + _AIM_SECONDS
        while time.monotonic() < give_up:
            for slot, worker in enumerate(self.workers):
                if any(event["phase"] == wanted for event in worker.find("phase")[since[slot] :]):
                    time.sleep(rng.uniform(0, PHASES[wanted]))
                    return slot
            time.sleep(0.01)
        begun = [slot for slot, worker in enumerate(self.workers) if worker.find("job_received")]
        return rng.choice(begun or range(WORKERS))

    def close(self) -> None:
        for worker in self.workers:
            with worker:
                worker.process.kill()
                worker.wait()

    def events(self, name: str) -> list[dict[str, Any]]:
        """The events of that name, of all lives."""
        return [event for worker in (*self.dead, *self.workers) for event in worker.find(name)]


def phases(worker: Worker) -> Counter[str]:
    """The phase of each job that a worker had; `receive` if it had none, `start` if it took none yet."""
    last: dict[str, str] = {}
    began = False
    for event in list(worker.events):
        began |= event["event"] == "phase"
        job_id = event.get("job_id")
        if job_id is None:
            continue
        if event["event"] == "job_received":
            last[job_id] = "receive"
        elif event["event"] == "phase":
            last[job_id] = event["phase"]
        elif event["event"] == "job_settled":
            last.pop(job_id, None)
    return Counter(last.values()) or Counter(["receive" if began else "start"])


@contextmanager
def running(world: SqsWorld) -> Iterator[Machines]:
    machines = Machines(world)
    try:
        yield machines
    finally:
        machines.close()


def entry(name: str) -> dict[str, str]:
    return {"bucket": BUCKET, "prefix": f"{{job_id}}/{name}/", "local_path": f"work/{{job_id}}/{name}"}


def submit(world: SqsWorld, program: Path) -> list[str]:
    """Submit all jobs, by ten; their ids."""
    documents = []
    for number in range(JOBS):
        kept = snapshots() if number % _SNAPSHOT_EVERY == 0 else {"before": [entry("ck")], "during": [entry("ck")]}
        job_id = f"job-{number}"
        arguments = ["-I", "-S", str(program), job_id, str(STEPS)]
        sync = {**kept, "after": [entry("out")]}
        documents.append({"id": job_id, "command": sys.executable, "arguments": arguments, "sync": sync})
    for start in range(0, JOBS, 10):
        batch = [
            {"Id": str(number), "MessageBody": json.dumps(document)}
            for number, document in enumerate(documents[start : start + 10])
        ]
        world.server.client.send_message_batch(QueueUrl=world.url, Entries=batch)
    return [str(document["id"]) for document in documents]


def history(world: SqsWorld, job_id: str) -> str:
    """What the records, and the workers that are left, say of a job."""
    return "\n".join(str(record) for record in world.record_versions(job_id))


def check_done_once(world: SqsWorld, job_id: str) -> None:
    """The job has one result, written before the record said so and never otherwise, and no end but that."""
    versions = world.record_versions(job_id)
    states = [record.state for record in versions]
    record = versions[-1]
    told = history(world, job_id)
    assert states.count("done") == 1, told
    assert record.state == "done", told
    assert not {"failed", "cancelled"} & set(states), told
    assert record.failures == 0, told
    assert record.attempts == record.interruptions + 1, told
    attempts = [version.attempts for version in versions]
    assert attempts == sorted(attempts), told
    assert record.result == {"exit_code": 0, "signal": None}, told
    results = world.results(job_id)
    assert record.result_key in results, told
    for key, contents in results.items():
        assert len({json.dumps(json.loads(content or b"null")) for content in contents}) == 1, f"{key}: {contents}"
    assert json.loads(world.result(job_id)) == record.result
    outputs = world.storage.history(BUCKET, f"{job_id}/out/chain")
    assert set(outputs) == {expected(job_id)}, outputs


def check_no_late_results(world: SqsWorld) -> None:
    """No result was written after the record said that the job is done."""
    log = [(each.key, each.started) for each in world.storage.stats.find("PutObject") if each.status == 200]
    ends = {key.rpartition("/")[2].removesuffix(".json"): started for key, started in log if "/jobs/" in key}
    for key, started in log:
        if "/results/" in key:
            assert started <= ends[key.split("/")[3]], f"{key} was written after its end"


@pytest.mark.parametrize("seed", [20261121])
def test_jobs_survive_sigkills_and_a_queue_that_fails_with_one_result_each(seed: int, tmp_path: Path) -> None:
    print(f"seed {seed}")
    rng = random.Random(seed)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    hits: Counter[str] = Counter()
    kills = 0
    with SqsServer() as server, sqs_world(tmp_path, server) as world:
        ids = submit(world, program)
        server.fail_share(0.05, seed)
        began = time.monotonic()
        with running(world) as machines:
            next_kill = began + _BETWEEN_KILLS
            while world.left():
                assert time.monotonic() - began < _GIVE_UP_SECONDS, f"{len(world.left())} left\n{world.left()[:5]}"
                if kills < KILLS and time.monotonic() >= next_kill:
                    next_kill += _BETWEEN_KILLS
                    hits += machines.kill(machines.aim(rng, hits))
                    kills += 1
                time.sleep(0.2)
            took = time.monotonic() - began
            assert not [event for name in ("bug", "exit_forced") for event in machines.events(name)]
        interruptions = sum(world.record_versions(job_id)[-1].interruptions for job_id in ids)
        print(f"{kills} kills in {took:.0f} s; the jobs that they hit, by phase: {dict(hits)}")
        print(f"interruptions: {interruptions}; failed calls: {dict(server.failed())}")
        assert not world.set_aside()
        for job_id in ids:
            check_done_once(world, job_id)
        check_no_late_results(world)
        assert {"restore", "run", "upload", "settle"} <= hits.keys(), hits
