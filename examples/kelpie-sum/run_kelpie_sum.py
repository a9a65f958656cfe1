"""Has three sums added up on this computer: Kelpie's API, storage, and two machines with heeler in Kelpie's place.

    python run_kelpie_sum.py [--kill]

It submits as a script of yours would, by plain HTTP, and starts heeler by its command line. What it starts is gone when
it ends, and so is what it wrote: all of that is in a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import boto3
from botocore.config import Config

HERE = Path(__file__).resolve().parent
HEELER = [sys.executable, "-m", "heeler"]
NAMES = ("a", "b", "c")
LAST = 300_000  # the squares of 1 to LAST, a third of them in each job
BUCKET = "local"  # that of `heeler local`, as in job.json
MACHINES = 3  # the third takes the place of one that is killed
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT = 60.0  # seconds for each wait
LOOK_SECONDS = 0.1


class Processes:
    """Programs in the background. They get no Ctrl-C themselves: `stop` ends them, the last first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], **more: Any) -> None:
        """Start one; what it prints is its log."""
        # A signal between a program's start and our knowing of it would leave it running.
        with self._log(name).open("ab") as log, signals_wait():
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **more
            )

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def said(self, name: str) -> str:
        """What one has printed."""
        return self._log(name).read_text(encoding="utf-8", errors="replace")

    def halt(self, name: str, *, on: bool) -> None:
        """One stands still, or goes on."""
        self._running[name].send_signal(signal.SIGSTOP if on else signal.SIGCONT)

    def kill(self, name: str) -> None:
        """SIGKILL: it can do nothing about it."""
        process = self._running[name]
        process.kill()
        process.wait()
        del self._running[name]

    def check(self) -> None:
        """End with an error if one has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                sys.exit(f"{name} ended with code {process.returncode}:\n{self.said(name)[-3000:]}")

    def stop(self) -> None:
        """End all. No signal cuts that short."""
        ignore_signals()
        for process in reversed(self._running.values()):
            process.terminate()
            process.send_signal(signal.SIGCONT)
        for process in reversed(self._running.values()):
            try:
                process.wait(40)  # a worker's grace period is 30 s
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Kelpie:
    """The API as one who submits knows it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._url = environment["KELPIE_API_URL"]
        self._headers = {
            "Content-Type": "application/json",
            "Salad-Api-Key": environment["SALAD_API_KEY"],
            "Salad-Organization": environment["SALAD_ORGANIZATION_NAME"],
            "Salad-Project": environment["SALAD_PROJECT_NAME"],
        }
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this computer

    def submit(self, document: dict[str, Any]) -> str:
        """Queue a job, and return its id."""
        return str(self._call("POST", "/jobs", json.dumps(document).encode())["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it is now."""
        return self._call("GET", f"/jobs/{job_id}")

    def _call(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(self._url + path, body, self._headers, method=method)
        with self._opener.open(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


class Stage:
    """The services and the machines. Each machine is a folder with the program in it, as an image would have it."""

    def __init__(self, home: Path, processes: Processes) -> None:
        self._home = home
        self.processes = processes
        self.environment: dict[str, str] = {}

    def start_services(self) -> None:
        """Start `heeler local`, and wait until it serves."""
        file = self._home / "env"
        command = [*HEELER, "local", "--machines", str(MACHINES), "--env-file", str(file)]
        self.processes.start("local", command, env=clean_environment())
        limit = time.monotonic() + LIMIT
        while not file.exists():
            self.processes.check()
            if time.monotonic() > limit:
                sys.exit(f"`heeler local` did not start:\n{self.processes.said('local')[-3000:]}")
            time.sleep(LOOK_SECONDS)
        self.environment = exported(file)

    def start_worker(self, number: int) -> str:
        """Start the worker of a machine with an empty disk, in the environment that Kelpie's has; its name."""
        environment = exported(self._home / ("env" if number == 1 else f"env.{number}"))
        del environment["SALAD_API_KEY"]  # a machine has a token of its own
        name = environment["SALAD_MACHINE_ID"]
        disk = self._home / name
        (disk / "tmp").mkdir(parents=True)
        shutil.copy(HERE / "slow_sum.py", disk)
        kelpie = {
            "HEARTBEAT_INTERVAL_S": "0.5",  # between two questions for work
            **{f"{part.upper()}_DIR": str(disk / part) for part in ("input", "checkpoint", "output")},
        }
        # On SaladCloud a machine has these to itself; here they share a computer.
        shared = {"HEELER_STATE_DIR": str(disk / "state"), "HEELER_CONTROL": "off", "TMPDIR": str(disk / "tmp")}
        self.processes.start(
            name, [*HEELER, "kelpie"], cwd=disk, env={**clean_environment(), **environment, **kelpie, **shared}
        )
        return name

    def lose(self, name: str) -> None:
        """SIGKILL to the worker of a machine; its disk is gone."""
        self.processes.kill(name)
        shutil.rmtree(self._home / name, ignore_errors=True)

    def put(self, key: str, data: bytes) -> None:
        """Upload an object."""
        self._storage().put_object(Bucket=BUCKET, Key=key, Body=data)

    def get(self, key: str) -> dict[str, Any] | None:
        """The JSON of an object, if there is one."""
        storage = self._storage()
        try:
            found: dict[str, Any] = json.load(storage.get_object(Bucket=BUCKET, Key=key)["Body"])
        except storage.exceptions.NoSuchKey:
            return None
        return found

    def _storage(self) -> Any:
        aws = self.environment
        return boto3.client(
            "s3",
            endpoint_url=aws["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=aws["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=aws["AWS_SECRET_ACCESS_KEY"],
            region_name=aws["AWS_REGION"],
            config=Config(proxies={}),  # it is on this computer
        )


def submission(name: str, container_group_id: str) -> dict[str, Any]:
    """The job of that name; each has prefixes of its own."""
    text = (HERE / "job.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text.replace("NAME", name))
    return {**found, "container_group_id": container_group_id}


def submit_all(stage: Stage, kelpie: Kelpie) -> dict[str, str]:
    """Upload the inputs and submit the jobs; the id of each."""
    ids = {}
    for index, name in enumerate(NAMES):
        numbers = range(LAST * index // len(NAMES) + 1, LAST * (index + 1) // len(NAMES) + 1)
        stage.put(f"sums/{name}/input/numbers.txt", "\n".join(map(str, numbers)).encode())
        ids[name] = kelpie.submit(submission(name, stage.environment["SALAD_CONTAINER_GROUP_ID"]))
    return ids


def kill_midway(stage: Stage, kelpie: Kelpie, ids: dict[str, str], machine: str) -> None:
    """SIGKILL to a machine's worker once a checkpoint of its job is in storage."""
    limit = time.monotonic() + LIMIT
    while time.monotonic() < limit:
        stage.processes.check()
        for name, job_id in ids.items():
            if not at_work(kelpie, job_id, machine) or stage.get(f"sums/{name}/checkpoint/state.json") is None:
                continue
            stage.processes.halt(machine, on=True)  # else the job may be done just before the kill
            state = stage.get(f"sums/{name}/checkpoint/state.json") or {"done": 0, "steps": 0}
            if state["done"] < state["steps"] and at_work(kelpie, job_id, machine):
                stage.lose(machine)
                step = f"step {state['done']} of {state['steps']}"
                say(f"--- {machine} is killed (SIGKILL) in {name}; {step} is in storage, and its disk is gone")
                return
            stage.processes.halt(machine, on=False)
        time.sleep(LOOK_SECONDS)
    sys.exit(f"{machine} has kept no checkpoint within {LIMIT:g} s:\n{stage.processes.said(machine)[-3000:]}")


def at_work(kelpie: Kelpie, job_id: str, machine: str) -> bool:
    """Whether a job is that machine's."""
    job = kelpie.job(job_id)
    return bool(job["status"] == "running" and job["machine_id"] == machine)


def wait_for(stage: Stage, kelpie: Kelpie, job_id: str) -> None:
    """Until a job has ended."""
    limit = time.monotonic() + LIMIT
    while (status := kelpie.job(job_id)["status"]) in ("pending", "running"):
        stage.processes.check()
        if time.monotonic() > limit:
            sys.exit(f"job {job_id} is {status} after {LIMIT:g} s:\n{stage.processes.said('local')[-3000:]}")
        time.sleep(LOOK_SECONDS)


def report(stage: Stage, kelpie: Kelpie, ids: dict[str, str]) -> int:
    """Print what became of each job, and the total; 0 if all is as it has to be."""
    total = 0
    for name, job_id in ids.items():
        job = kelpie.job(job_id)
        output = stage.get(f"sums/{name}/output/sum.json")
        if job["status"] != "completed" or output is None:
            sys.exit(f"{name} is {job['status']}, and its output {output}")
        total += output["sum"]
        say(f"{name}  completed  on {job['machine_id']}  failures {job['num_failures']}  sum {output['sum']}")
    right = LAST * (LAST + 1) * (2 * LAST + 1) // 6
    say(f"total {total}, by the formula {right}: {'the same' if total == right else 'WRONG'}")
    return 0 if total == right else 1


def clean_environment() -> dict[str, str]:
    """Ours, without settings of heeler; a job's "python" is this one."""
    prefixes = ("HEELER_", "AWS_", "R2_", "SQS_", "SALAD_", "KELPIE_", "FILE_WATCHER_", "MAX_", "HEARTBEAT_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {**kept, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"}


def exported(file: Path) -> dict[str, str]:
    """What a shell would export after reading a file of `heeler local`."""
    words = [shlex.split(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line[1].partition("=") for line in words if line[:1] == ["export"]]
    return {name: value for name, _, value in pairs}


def say(line: str) -> None:
    """Print a line now."""
    print(line, flush=True)


@contextmanager
def signals_wait() -> Iterator[None]:
    """A signal that comes during the block ends us after it."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in END_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        leave(came[0], None)


def leave(number: int, _frame: FrameType | None) -> None:
    """End by a signal, but clean up first."""
    ignore_signals()
    sys.exit(128 + number)


def ignore_signals() -> None:
    """We are ending already."""
    for number in END_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def main() -> int:
    """The whole story."""
    parser = argparse.ArgumentParser(description="Have sums added up on this computer, by way of Kelpie's API.")
    parser.add_argument("--kill", action="store_true", help="kill a machine's worker in the middle of its job")
    asked = parser.parse_args()
    for number in END_SIGNALS:
        signal.signal(number, leave)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heeler-kelpie-sum-") as home, ExitStack() as cleanup:
        processes = Processes(Path(home))
        cleanup.callback(processes.stop)
        stage = Stage(Path(home), processes)
        stage.start_services()
        kelpie = Kelpie(stage.environment)
        ids = submit_all(stage, kelpie)
        say(f"{len(ids)} jobs submitted to Kelpie's API: the squares of 1 to {LAST} in {len(ids)} parts")
        machines = [stage.start_worker(1), stage.start_worker(2)]
        if asked.kill:
            kill_midway(stage, kelpie, ids, machines.pop(0))
            machines.append(stage.start_worker(3))
            say(f"--- {machines[-1]} starts, with an empty disk")
        for job_id in ids.values():
            wait_for(stage, kelpie, job_id)
        for name in machines:
            for line in re.findall(r"^going on after step \d+ of \d+$", processes.said(name), re.MULTILINE):
                say(f"{name}: {line}")
        code = report(stage, kelpie, ids)
    say(f"after {time.monotonic() - began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
