"""Two workers, one queue, and a SIGKILL again and again, in every phase: nothing is lost, nothing differs.

The kills are seeded and aimed: the plan names a phase, the next worker that enters it is killed a random moment
later. What a kill really hit is read from the dead worker's last words and printed.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.s3 import Delay, S3Process
from tests.support.worker import Worker, clean_environment, heeler, storage_environment

JOBS = 6
STEPS = 30
PHASES = ("receive", "restore", "run", "upload", "settle")
HITS = 3
_GIVE_UP_SECONDS = 150.0

# Each step is worth 0.1 s and depends on all before it. The history is written at once with the state it belongs to.
PROGRAM = """
import hashlib, json, os, sys, time
from pathlib import Path
seed, steps = sys.argv[1], int(sys.argv[2])
saved = Path(os.environ["CHECKPOINT_DIR"]) / "state.json"
state = json.loads(saved.read_text()) if saved.exists() else {"step": 0, "chain": seed, "history": []}
print("start", state["step"], flush=True)
assert Path(os.environ["INPUT_DIR"], "input.txt").read_text() == "input of all jobs"
while state["step"] < steps:
    time.sleep(float(os.environ.get("STEP_SECONDS", "0.1")))
    state["chain"] = hashlib.sha256(state["chain"].encode()).hexdigest()
    state["step"] += 1
    state["history"].append(state["chain"][:8])
    if state["step"] % 3 == 0:
        temporary = saved.with_name(".state.tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(saved)
out = Path(os.environ["OUTPUT_DIR"])
(out / "chain.txt").write_text(state["chain"])
(out / "parts").mkdir()
for index, word in enumerate(state["history"]):
    if index % 10 == 0:
        (out / "parts" / f"{index}.txt").write_text(word * 1000)
"""


def expected(seed: str) -> dict[str, bytes]:
    """The outputs of an uninterrupted run, by the program's own rule."""
    chain, history = seed, []
    for _ in range(STEPS):
        chain = hashlib.sha256(chain.encode()).hexdigest()
        history.append(chain[:8])
    parts = {f"parts/{i}.txt": (word * 1000).encode() for i, word in enumerate(history) if i % 10 == 0}
    return {"chain.txt": chain.encode(), **parts}


def document(job_id: str, program: Path) -> str:
    def entry(name: str, prefix: str) -> dict[str, str]:
        return {"bucket": "kills", "prefix": prefix, "local_path": f"work/{{job_id}}/{name}"}

    checkpoint = entry("checkpoint", "jobs/{job_id}/checkpoint/")
    return json.dumps(
        {
            "id": job_id,
            "command": sys.executable,
            "arguments": [str(program), job_id, str(STEPS)],
            "heartbeat_interval": 0.7,
            "sync": {
                "before": [entry("input", "input/"), checkpoint],
                "during": [checkpoint],
                "after": [entry("output", "jobs/{job_id}/output/")],
            },
        }
    )


class Machines:
    """Two workers; one that was killed is replaced, on the same machine or on a new one."""

    def __init__(self, folder: Path, server: S3Process, rng: random.Random) -> None:
        self._folder = folder
        self._env = clean_environment(**storage_environment(server))
        self._rng = rng
        self._count = 0
        self.homes: dict[int, Path] = {}
        self.workers: dict[int, Worker] = {}

    def start(self, slot: int) -> Worker:
        home = self.homes.get(slot)
        if home is None or self._rng.random() < 0.7:
            if home is not None:
                shutil.rmtree(home)
            self._count += 1
            home = self._folder / f"machine-{self._count}"
            home.mkdir()
        self.homes[slot] = home
        source = f"local:{self._folder / 'queue'}"
        self.workers[slot] = Worker("--source", source, state_dir=home / "state", env=self._env, cwd=home)
        return self.workers[slot]

    def kill(self, slot: int) -> str:
        """SIGKILL; the phase that the worker was in, as far as it could still say."""
        with self.workers[slot] as worker:
            worker.process.kill()
            worker.wait()
            return worker.phase()

    def close(self) -> None:
        for worker in self.workers.values():
            with worker:
                worker.process.kill()
                worker.wait()


@contextmanager
def held(queue: Path) -> Iterator[None]:
    """Another process of the queue is in the middle of a change: receiving and settling wait."""
    connection = sqlite3.connect(queue / "queue.db", isolation_level=None, timeout=10)
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")
    finally:
        connection.close()


def entered(machines: Machines, phase: str, since: dict[int, int], deadline: float) -> int | None:
    """Wait until a worker enters a phase, and say which; None when the jobs are all done first."""
    while time.monotonic() < deadline:
        for slot, worker in machines.workers.items():
            phases = worker.find("phase")
            if len(phases) > since.get(slot, 0) and phases[-1]["phase"] == phase:
                return slot
        time.sleep(0.002)
    return None


def aim(machines: Machines, phase: str, queue: Path, rng: random.Random) -> int | None:
    """Bring about a good moment for a kill in `phase`; the slot to kill, or None if it did not come."""
    since = {slot: len(worker.find("phase")) for slot, worker in machines.workers.items()}
    deadline = time.monotonic() + 12
    if phase == "settle":
        slot = entered(machines, "upload", since, deadline)
        if slot is None:
            return None
        with held(queue):
            since = {other: 10**9 for other in machines.workers if other != slot}
            if entered(machines, "settle", since, time.monotonic() + 3) is None:
                return None
            time.sleep(rng.uniform(0, 0.1))
            if rng.random() < 0.5:
                return slot
        time.sleep(rng.uniform(0, 0.004))  # the queue is free again: before, within or after the answer
        return slot
    slot = entered(machines, phase, since, deadline)
    if slot is not None:
        time.sleep(rng.uniform(0, {"receive": 0.01, "restore": 0.25, "run": 2.0, "upload": 0.25}[phase]))
    return slot


@pytest.mark.parametrize("seed", [20261121])
def test_jobs_survive_sigkills_in_every_phase_with_the_outputs_of_an_undisturbed_run(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    queue = tmp_path / "queue"
    hits: Counter[str] = Counter()
    with S3Process.start(buckets=["kills"]) as server:
        server.put("kills", "input/input.txt", b"input of all jobs")
        server.faults.add(Delay(0.15), operation="GetObject")
        server.faults.add(Delay(0.2), operation="PutObject", key="jobs/*/output/*")
        ids = [f"job-{number}" for number in range(JOBS)]
        for job_id in ids:
            submit(queue, document(job_id, program))
        machines = Machines(tmp_path, server, rng)
        machines.start(0)
        machines.start(1)
        began = time.monotonic()
        try:
            extra = 0
            while any(hits[phase] < HITS for phase in PHASES):
                assert time.monotonic() - began < _GIVE_UP_SECONDS, f"phases hit so far: {dict(hits)}"
                wanted = rng.choice([phase for phase in PHASES if hits[phase] < HITS])
                if not unfinished(queue):
                    extra += 1
                    ids.append(f"job-{JOBS - 1 + extra}")
                    submit(queue, document(ids[-1], program))
                slot = aim(machines, wanted, queue, rng)
                if slot is not None:
                    hits[machines.kill(slot)] += 1
                    machines.start(slot)
            wait_until_all_ended(queue, began)
        finally:
            machines.close()
        print(f"kills by the phase that they hit: {dict(hits)}; jobs: {len(ids)}")
        records = {record["id"]: record for record in jobs(queue)}
        assert {job_id: record["state"] for job_id, record in records.items()} == dict.fromkeys(ids, "done")
        assert all(record["failures"] == 0 for record in records.values())
        stored = server.objects("kills")
    for job_id in ids:
        prefix = f"jobs/{job_id}/output/"
        found = {key[len(prefix) :]: data for key, data in stored.items() if key.startswith(prefix)}
        assert found == expected(job_id), job_id


def submit(queue: Path, text: str) -> None:
    done = heeler("submit", "--source", f"local:{queue}", "-", stdin=text)
    assert done.returncode == 0, done.stderr


def jobs(queue: Path) -> list[dict[str, object]]:
    done = heeler("jobs", "--source", f"local:{queue}", "--json")
    found: list[dict[str, object]] = json.loads(done.stdout)
    return found


def unfinished(queue: Path) -> bool:
    connection = sqlite3.connect(queue / "queue.db", timeout=10)
    try:
        row = connection.execute("SELECT 1 FROM jobs WHERE state IN ('pending', 'running')").fetchone()
    finally:
        connection.close()
    return row is not None


def wait_until_all_ended(queue: Path, began: float) -> None:
    while unfinished(queue):
        assert time.monotonic() - began < _GIVE_UP_SECONDS, "the jobs do not end"
        time.sleep(0.05)
