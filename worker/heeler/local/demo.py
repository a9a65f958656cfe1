"""`heeler demo`: a job, its machine gone midway, another machine that goes on, and the proof that nothing changed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path

from heeler.errors import HeelerError
from heeler.local import demo_job
from heeler.local.processes import running
from heeler.local.storage import LocalStorage, local_storage
from heeler.sources.local import LocalDesk

_BUCKET = "demo"
_CHECKPOINTS = 40
_KILL_AT = 0.5
_JOB = "three-bodies"
_GIVE_UP_SECONDS = 120.0
_PROGRAM = Path(demo_job.__file__)


def run_demo(seconds: float) -> int:
    """Run the demo; 0 if the interrupted result equals the uninterrupted one.

    Args:
        seconds: About how long the job computes.

    Raises:
        HeelerError: It could not be run.
    """
    every = max(1, _steps_per_second() * int(seconds * 1000) // 1000 // _CHECKPOINTS)
    steps = every * _CHECKPOINTS
    with tempfile.TemporaryDirectory(prefix="heeler-demo-") as folder, local_storage() as storage:
        demo = _Demo(Path(folder), storage, steps, every)
        return demo.run()


def _steps_per_second() -> int:
    state = {name: [body[:] for body in bodies] for name, bodies in demo_job.START.items()}
    began = time.perf_counter()
    for _ in range(2000):
        demo_job.advance(state)
    return int(2000 / (time.perf_counter() - began))


class _Demo:
    def __init__(self, folder: Path, storage: LocalStorage, steps: int, every: int) -> None:
        self._folder = folder
        self._storage = storage
        self._steps = steps
        self._every = every
        self._began = time.monotonic()

    def run(self) -> int:
        self._say(f"storage: an S3 on {self._storage.url}; queue: a folder")
        self._storage.client().create_bucket(Bucket=_BUCKET)
        LocalDesk(self._folder / "queue").submit([json.dumps(self._document()).encode()])
        self._say(f"job {_JOB}: three bodies under gravity, {self._steps} steps, a checkpoint every {self._every}")
        with self._undisturbed() as reference:
            killed_at = self._first_machine()
            resumed_at = self._second_machine()
            reference.wait(_GIVE_UP_SECONDS)
        return self._compare(killed_at, resumed_at)

    def _say(self, line: str) -> None:
        print(f"{time.monotonic() - self._began:5.1f} s  {line}", flush=True)

    def _document(self) -> Mapping[str, object]:
        def entry(name: str, **fields: str) -> Mapping[str, str]:
            return {"bucket": _BUCKET, "prefix": f"{{job_id}}/{name}/", "local_path": name, **fields}

        return {
            "id": _JOB,
            "command": sys.executable,
            "arguments": [str(_PROGRAM), str(self._steps), str(self._every)],
            "heartbeat_interval": 1,
            "sync": {
                "during": [entry("checkpoint", mode="snapshot", ready="state.json")],
                "after": [entry("output")],
            },
        }

    def _undisturbed(self) -> AbstractContextManager[subprocess.Popen[str]]:
        """The same program beside it, without heeler and without a fault."""
        folders = {}
        for name in ("checkpoint", "output"):
            path = self._folder / "undisturbed" / name
            path.mkdir(parents=True)
            folders[f"{name.upper()}_DIR"] = str(path)
        command = [sys.executable, str(_PROGRAM), str(self._steps), str(self._every)]
        return running(command, env={**os.environ, **folders})

    def _machine(self, name: str) -> AbstractContextManager[subprocess.Popen[str]]:
        home = self._folder / name
        home.mkdir()
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HEELER_", "AWS_", "R2_"))}
        env = {**kept, **self._storage.environment(), "HEELER_STATE_DIR": str(home / "state")}
        source = f"local:{self._folder / 'queue'}"
        command = [sys.executable, "-m", "heeler", "run", "--source", source, "--max-jobs", "1", "--control", "off"]
        return running(command, env=env, cwd=home, log=home / "log")

    def _first_machine(self) -> int:
        """Run a worker until half of the job is done, then SIGKILL it; the last step that it showed."""
        with self._machine("machine-1") as worker:
            self._say(f"machine 1: worker {worker.pid} takes the job")
            step = 0
            for kind, step in self._progress(worker, 1):
                if kind == "step" and step >= self._steps * _KILL_AT:
                    break
            else:
                raise HeelerError(f"the first worker ended early: {self._log('machine-1')}")
            self._say(f"machine 1: SIGKILL at step {step}; nobody is told, its files are gone with it")
            worker.send_signal(signal.SIGKILL)
            worker.wait()
        return step

    def _second_machine(self) -> int:
        """Run another worker to the job's end; the step that it went on from."""
        resumed_at = 0
        with self._machine("machine-2") as worker:
            self._say(f"machine 2: worker {worker.pid} waits until the lease has lapsed")
            for kind, step in self._progress(worker, 2):
                if kind == "start":
                    resumed_at = step
                    self._say(f"machine 2: takes the job and goes on from the checkpoint of step {step}")
            if worker.wait(_GIVE_UP_SECONDS) != 0:
                raise HeelerError(f"the second worker failed: {self._log('machine-2')}")
        return resumed_at

    def _progress(self, worker: subprocess.Popen[str], machine: int) -> Iterator[tuple[str, int]]:
        """What the program prints, a line shown at each tenth of the job."""
        if worker.stdout is None:
            return
        shown = 0
        for line in worker.stdout:
            kind, _, number = line.partition(" ")
            step = int(number)
            if kind == "step" and step * 10 // self._steps > shown:
                shown = step * 10 // self._steps
                bar = "#" * (shown * 3) + "." * (30 - shown * 3)
                self._say(f"machine {machine}: [{bar}] step {step}")
            yield kind, step

    def _log(self, machine: str) -> str:
        lines = (self._folder / machine / "log").read_text(encoding="utf-8").splitlines()
        return lines[-1] if lines else "it said nothing"

    def _compare(self, killed_at: int, resumed_at: int) -> int:
        stored = self._storage.client().get_object(Bucket=_BUCKET, Key=f"{_JOB}/output/result.json")["Body"].read()
        undisturbed = (self._folder / "undisturbed" / "output" / "result.json").read_bytes()
        self._say(f"result of the job:        sha256 {hashlib.sha256(stored).hexdigest()}")
        self._say(f"result without the kill:  sha256 {hashlib.sha256(undisturbed).hexdigest()}")
        if stored != undisturbed:
            self._say("DIFFERENT: this is a bug; please report it with the lines above")
            return 1
        if resumed_at == 0:
            self._say("the same, but the second machine started from zero: no checkpoint had reached storage")
            return 1
        lost = killed_at - resumed_at
        self._say(
            f"the same, to the last bit. The kill at step {killed_at} cost {max(0, lost)} of {self._steps} steps."
        )
        return 0
