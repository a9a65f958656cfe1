"""`kill -9` at the very requests of the protocol: the job goes on from one whole generation, and never an older one.

Storage holds back one request, before or after it takes effect; its worker is killed then, and the request let go: at
once, or when the next worker already holds the prefix.
"""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections import Counter
from contextlib import AbstractContextManager

from tests.acceptance.snapshot_programs import Prefix, snapshots
from tests.acceptance.world import World
from tests.support.s3 import Stall
from tests.support.s3.faults import FaultRule
from tests.support.worker import Worker

KILLS = 10
STEPS = 80
SAVE_EVERY = 4
STEP_SECONDS = 0.1

# Each step depends on all before it; a save is four files overwritten in place, `done` last. A start that does not
# find one whole save, or finds one that is not its own, fails for good.
PROGRAM = f"""
import hashlib
folder, out, chain, step = Path(env["CHECKPOINT_DIR"]), Path(env["OUTPUT_DIR"]), env["HEELER_JOB_ID"], 0
NAMES = ("chain", "copy", "ballast", "done")
found = {{name: (folder / name).read_text().split(" ") for name in NAMES if (folder / name).exists()}}
if found:
    step = int(found["chain"][0])
    expected = chain
    for _ in range(step):
        expected = hashlib.sha256(expected.encode()).hexdigest()
    assert {{name: parts[:2] for name, parts in found.items()}} == dict.fromkeys(NAMES, [str(step), expected]), found
    assert found["ballast"][2] == str(step % 10) * 300_000
    chain = expected
print("start", step, flush=True)
while step < {STEPS}:
    time.sleep({STEP_SECONDS})
    chain = hashlib.sha256(chain.encode()).hexdigest()
    step += 1
    if step % {SAVE_EVERY} == 0:
        for name in NAMES:
            with (folder / name).open("w") as file:
                file.write(f"{{step}} ")
                file.flush()
                file.write(chain + " " + (str(step % 10) * 300_000 if name == "ballast" else ""))
(out / "chain").write_text(chain)
"""

POINTS: list[tuple[str, str]] = [
    ("PutObject", "*/packs/*"),
    ("PutObject", "*/manifests/*"),
    ("PutObject", "*/head.json"),
    ("PutObject", "*/head.json"),
    ("PutObject", "*/out/*"),
    ("GetObject", "*/head.json"),
    ("GetObject", "*/manifests/*"),
    ("GetObject", "*/packs/*"),
    ("DeleteObject", "*"),
]


class Lives:
    """Workers one after another, each on its own machine or on the last one's."""

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world = world
        self.rng = rng
        self.count = 0
        self.committed: Counter[str] = Counter()
        """By job: the newest step of which a worker has said that it is committed."""

    def next(self) -> AbstractContextManager[Worker]:
        """A worker."""
        if self.count == 0 or self.rng.random() < 0.6:
            self.count += 1
        else:
            shutil.rmtree(self.world.folder / f"state-{self.count}", ignore_errors=self.rng.random() < 0.5)
        return self.world.worker(name=str(self.count), machine=f"machine-{self.count}")

    def check(self, worker: Worker) -> None:
        """What a dead worker's programs found, and what it had committed."""
        received = [event["job_id"] for event in worker.find("job_received")]
        found = [int(line.split()[1]) for line in worker.stdout.decode().splitlines() if line.startswith("start ")]
        for job_id, step in zip(received, found, strict=False):
            assert step >= self.committed[job_id], f"{job_id} went back from {self.committed[job_id]} to {step}"
            assert step % SAVE_EVERY == 0
        for event in worker.find("committed"):
            files = Prefix(self.world.storage, event["job_id"]).files(event["generation"])
            step = step_of(files)
            assert step >= self.committed[event["job_id"]]
            self.committed[event["job_id"]] = step


def step_of(files: dict[str, bytes]) -> int:
    """The one step of which these files are."""
    steps = {name: int(data.split(b" ")[0]) for name, data in files.items()}
    assert len(steps) == 4, steps
    assert len(set(steps.values())) == 1, steps
    return steps["done"]


def test_a_job_with_snapshots_survives_kills_at_every_request_of_a_commit_and_ends_as_if_there_had_been_none(
    world: World,
) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    lives, program = Lives(world, rng), world.python(PROGRAM)
    ids: list[str] = []
    hits: Counter[str] = Counter()
    held: FaultRule | None = None

    def submit() -> None:
        ids.append(f"job-{len(ids)}")
        sync = {**snapshots("done"), **world.outputs()}
        world.submit(program, ids[-1], sync=sync, heartbeat_interval=0.4, max_failures=1)

    def acquired_or_ended(worker: Worker) -> None:
        worker.wait_until(lambda: worker.find("acquired") or ended(world, ids[-1]), "a start")

    points = rng.sample(POINTS, len(POINTS))
    for number in range(KILLS):
        if not ids or world.job(ids[-1]).state == "done":
            submit()
        operation, key = points[number % len(points)]
        stage = rng.choice(["before", "after"])
        with lives.next() as worker:
            if held is not None:
                if rng.random() < 0.5:
                    acquired_or_ended(worker)
                world.storage.faults.remove(held)
            nth = rng.randint(1, 2) if operation == "PutObject" and "out" not in key else 1
            held = world.storage.faults.add(Stall(at=stage), operation=operation, key=key, nth=nth, count=1)  # type: ignore[arg-type]
            deadline = time.monotonic() + 4
            while not (
                held.held or ended(world, ids[-1]) or restored(worker, operation) or time.monotonic() > deadline
            ):
                time.sleep(0.01)
            hits[f"{operation} {key} {stage}" if held.held else "any moment"] += 1
            time.sleep(rng.uniform(0, 0.2) if rng.random() < 0.5 else 0)
            if not held.held:
                world.storage.faults.remove(held)
                held = None
            worker.process.kill()
            worker.wait()
            lives.check(worker)
    if held is not None:
        world.storage.faults.remove(held)
    with lives.next() as worker:
        for job_id in ids:
            world.wait_state("done", job_id, timeout=60)
    lives.check(worker)
    print(f"killed at: {dict(hits)}; {lives.count} machines; jobs: {len(ids)}")
    assert hits.total() - hits["any moment"] >= KILLS // 2
    for job_id in ids:
        prefix = Prefix(world.storage, job_id)
        record = world.job(job_id)
        assert (record.failures, record.result) == (0, {"exit_code": 0, "signal": None})
        assert world.stored("out/chain", job_id) == expected(job_id)
        assert prefix.head()["status"] == "complete"
        prefix.referenced()
        steps = [step_of(files) for files in prefix.every().values()]
        assert steps == sorted(steps)
        assert steps[-1] == STEPS


def restored(worker: Worker, operation: str) -> bool:
    """Whether the worker has read all that it had to, if it is a read that is waited for."""
    return operation == "GetObject" and bool(worker.find("phase", phase="run"))


def ended(world: World, job_id: str) -> bool:
    """Whether there is nothing more to be done."""
    return world.job(job_id).state in ("done", "failed")


def expected(job_id: str) -> bytes:
    """The output of an uninterrupted run."""
    chain = job_id
    for _ in range(STEPS):
        chain = hashlib.sha256(chain.encode()).hexdigest()
    return chain.encode()
