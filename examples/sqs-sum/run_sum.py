"""Adds up the four parts of a sum on this computer: a queue of SQS, storage, and two machines with a worker each.

    python run_sum.py [--kill] [--heeler-submit]

It starts heeler by its command line, and submits as a program of yours would. What it starts is gone when it ends, and
so is what it wrote: all of that is in a temporary folder.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import boto3
from botocore.config import Config

HERE = Path(__file__).resolve().parent
HEELER = [sys.executable, "-m", "heeler"]
LAST, PARTS = 1_000_000, 4  # as in job.json
BUCKET = "local"  # that of `heeler local`
VISIBILITY = 5  # seconds after which a killed worker's jobs are given to another
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIMIT = 60.0  # seconds for each wait


class Processes:
    """Programs in the background. They get no Ctrl-C themselves: `stop` ends them, the last first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], **more: Any) -> None:
        """Start one; what it prints is its log."""
        # A signal between a program's start and our knowing of it would leave it running.
        with self.log(name).open("ab") as log, signals_wait():
            self.running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **more
            )

    def log(self, name: str) -> Path:
        """What one has printed."""
        return self._folder / f"{name}.log"

    def said(self, name: str) -> str:
        """The same, as text."""
        return self.log(name).read_text(encoding="utf-8", errors="replace")

    def kill(self, name: str) -> None:
        """SIGKILL: it can do nothing about it."""
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def wait(self, name: str) -> None:
        """Until it ends by itself; anything but 0 is the end of all."""
        try:
            code = self.running[name].wait(LIMIT)
        except subprocess.TimeoutExpired:
            sys.exit(f"{name} did not end within {LIMIT:g} s:\n{self.said(name)[-3000:]}")
        if code != 0:
            sys.exit(f"{name} ended with code {code}:\n{self.said(name)[-3000:]}")

    def check(self) -> None:
        """End with an error if one has ended with an error."""
        for name, process in self.running.items():
            if process.poll() not in (None, 0):
                self.wait(name)

    def stop(self) -> None:
        """End all. No signal cuts that short."""
        ignore_signals()
        for process in reversed(self.running.values()):
            process.terminate()
        for process in reversed(self.running.values()):
            try:
                process.wait(40)  # a worker's grace period is 30 s
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Stage:
    """Queue, storage and machines. Each machine is a folder with the program in it, as an image would have it."""

    def __init__(self, home: Path, processes: Processes) -> None:
        self._home = home
        self._processes = processes
        self._environment: dict[str, str] = {}

    def start_services(self) -> None:
        """Start `heeler local`, wait until it serves, and make the two queues."""
        file = self._home / "env"
        self._processes.start("local", [*HEELER, "local", "--env-file", str(file)], env=clean_environment())
        limit = time.monotonic() + LIMIT
        while not file.exists():
            if self._processes.running["local"].poll() is not None or time.monotonic() > limit:
                sys.exit(f"`heeler local` did not start:\n{self._processes.said('local')[-3000:]}")
            time.sleep(0.05)
        aws = {name: value for name, value in exported(file).items() if name.startswith("AWS_")}
        self._environment = {**clean_environment(), **aws}
        sqs = self._client("sqs")
        self._environment |= {
            "HEELER_SOURCE": "sqs",
            "SQS_QUEUE_URL": sqs.create_queue(QueueName="sums")["QueueUrl"],
            "SQS_DLQ_URL": sqs.create_queue(QueueName="sums-dead")["QueueUrl"],
            "HEELER_RECORDS": f"s3://{BUCKET}/records/",
        }

    def submit(self, command: Sequence[str]) -> list[str]:
        """Submit by a command that prints the ids."""
        return self._ask(command).split()

    def start_worker(self, name: str, idle: int) -> None:
        """Start the worker of a machine: two jobs at a time, each with folders of its own; it leaves when idle."""
        machine = self._home / name
        machine.mkdir()
        shutil.copy(HERE / "sum.py", machine)
        worker = {
            "HEELER_CHECKPOINTS": f"s3://{BUCKET}/sums/{{job_id}}/checkpoint/",
            "HEELER_OUTPUTS": f"s3://{BUCKET}/sums/{{job_id}}/output/",
            "HEELER_CHECKPOINT_DIR": "work/{job_id}/checkpoint",
            "HEELER_OUTPUT_DIR": "work/{job_id}/output",
            "HEELER_CHECKPOINT_READY": "state.json",  # whenever it was renamed into place, the checkpoint is whole
            "HEELER_COMMIT_INTERVAL": "0.5",
            "HEELER_SQS_VISIBILITY": str(VISIBILITY),
            "HEELER_STATE_DIR": str(machine / "state"),
            "HEELER_CONTROL": "off",
            "HEELER_LOG_FORMAT": "json",
        }
        command = [*HEELER, "run", "--concurrency", "2", "--exit-when-idle", str(idle)]
        self._processes.start(name, command, cwd=machine, env={**self._environment, **worker})

    def seen(self, event: str, name: str) -> set[str]:
        """The jobs of which the log of a machine's worker has such an event."""
        lines = re.findall(r"^\{.*\}$", self._processes.said(name), re.MULTILINE)
        found = [json.loads(line) for line in lines]
        return {entry["job_id"] for entry in found if entry.get("event") == event}

    def records(self) -> list[dict[str, Any]]:
        """What is known of each job."""
        found: list[dict[str, Any]] = json.loads(self._ask([*HEELER, "jobs", "--json"]))
        return found

    def output(self, job_id: str) -> int:
        """The sum that a job has left in storage."""
        key = f"sums/{job_id}/output/sum.json"
        return int(json.load(self._client("s3").get_object(Bucket=BUCKET, Key=key)["Body"])["sum"])

    def _ask(self, command: Sequence[str]) -> str:
        done = subprocess.run(command, env=self._environment, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(command)} ended with code {done.returncode}: {done.stderr}")
        return done.stdout

    def _client(self, service: str) -> Any:
        aws = self._environment
        return boto3.client(  # type: ignore[call-overload]
            service,
            endpoint_url=aws[f"AWS_ENDPOINT_URL_{service.upper()}"],
            aws_access_key_id=aws["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=aws["AWS_SECRET_ACCESS_KEY"],
            region_name=aws["AWS_REGION"],
            config=Config(proxies={}),  # it is on this computer
        )


def clean_environment() -> dict[str, str]:
    """Ours, without settings of heeler; a job's "python" is this one."""
    prefixes = ("HEELER_", "AWS_", "R2_", "SQS_", "SALAD_", "KELPIE_")
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


def kill_midway(stage: Stage, processes: Processes, name: str) -> None:
    """SIGKILL to a worker once a checkpoint of each of its two jobs is in storage."""
    limit = time.monotonic() + LIMIT
    while len(mine := stage.seen("committed", name)) < 2:
        processes.check()
        if time.monotonic() > limit:
            sys.exit(f"{name} has kept no checkpoint of two jobs within {LIMIT:g} s:\n{processes.said(name)[-3000:]}")
        time.sleep(0.1)
    processes.kill(name)
    say(f"--- {name} is killed (SIGKILL) with {' and '.join(sorted(mine))}; nobody is told, its files are gone")


def report(stage: Stage, ids: Sequence[str]) -> int:
    """Print each part's record and the total; 0 if all is as it has to be."""
    records = {record["id"]: record for record in stage.records()}
    total = 0
    for job_id in ids:
        record = records[job_id]
        if record["state"] != "done":
            sys.exit(f"{job_id} is {record['state']}: {record['reason']}")
        part = stage.output(job_id)
        total += part
        say(f"{job_id}  done  attempts {record['attempts']}  interruptions {record['interruptions']}  sum {part}")
    right = LAST * (LAST + 1) * (2 * LAST + 1) // 6
    say(f"total {total}, by the formula {right}: {'the same' if total == right else 'WRONG'}")
    return 0 if total == right else 1


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
    parser = argparse.ArgumentParser(description="Add up the parts of a sum on this computer, by way of SQS.")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle of its jobs")
    parser.add_argument("--heeler-submit", action="store_true", help="submit by `heeler submit`, not by submit.py")
    asked = parser.parse_args()
    for number in END_SIGNALS:
        signal.signal(number, leave)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heeler-sqs-sum-") as home, ExitStack() as cleanup:
        processes = Processes(Path(home))
        cleanup.callback(processes.stop)
        stage = Stage(Path(home), processes)
        stage.start_services()
        by_hand = [sys.executable, str(HERE / "submit.py"), str(PARTS)]
        by_heeler = [*HEELER, "submit", "--array", str(PARTS), str(HERE / "job.json")]
        ids = stage.submit(by_heeler if asked.heeler_submit else by_hand)
        say(f"{len(ids)} jobs submitted: the squares of 1 to {LAST} in {PARTS} parts")
        for name in ("machine-1", "machine-2"):
            stage.start_worker(name, idle=VISIBILITY + 1 if asked.kill else 2)
        if asked.kill:
            kill_midway(stage, processes, "machine-1")
        for name in [name for name in processes.running if name != "local"]:
            processes.wait(name)
        for line in re.findall(r"^\d+ to \d+: going on at \d+$", processes.said("machine-2"), re.MULTILINE):
            say(f"machine-2: {line}")
        code = report(stage, ids)
    say(f"after {time.monotonic() - began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
