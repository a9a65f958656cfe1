"""Runs the example on this computer: an S3 of its own, one job, and a worker that may be killed on the way.

    python run.py [--kill-after SECONDS] [--results FOLDER]

It uses heeler as a user does, by its command line. Everything happens in a temporary folder. Each "machine"
is a folder in it that holds the program, as an image would; only storage and queue outlive a machine.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

HERE = Path(__file__).resolve().parent
BUCKET = "heeler"  # as in job.json
INPUTS = "inputs/molecular-dynamics/"
REGION = "us-east-1"
START_UP_LIMIT = 60.0  # seconds


class Stage:
    """Storage, queue and machines. What it starts is stopped by `cleanup`."""

    def __init__(self, home: Path, cleanup: ExitStack) -> None:
        self._home = home
        self._cleanup = cleanup
        self._queue = ("--source", f"local:{home / 'queue'}")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = str(probe.getsockname()[1])
        os.environ.update(
            AWS_ENDPOINT_URL_S3=f"http://127.0.0.1:{self._port}",
            AWS_ACCESS_KEY_ID="example",
            AWS_SECRET_ACCESS_KEY="example",
            AWS_REGION=REGION,
            # The job says "python": let it be this one, which has OpenMM.
            PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        )

    def start_storage(self) -> S3Client:
        """Start moto, wait until it answers, and make the bucket."""
        log = self._home / "storage.log"
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", self._port]
        with log.open("wb") as file:
            server = subprocess.Popen(command, stdout=file, stderr=file)
        self._cleanup.callback(stop, server)
        config = Config(retries={"max_attempts": 0}, proxies={})
        s3: S3Client = boto3.client("s3", region_name=REGION, config=config)
        limit = time.monotonic() + START_UP_LIMIT
        while server.poll() is None and time.monotonic() < limit:
            try:
                s3.create_bucket(Bucket=BUCKET)
            except (BotoCoreError, ClientError):
                time.sleep(0.2)
            else:
                return s3
        sys.exit(f"storage does not answer: {log.read_text(encoding='utf-8', errors='replace')}")

    def submit(self) -> str:
        """Put the job into the queue, and return its id."""
        command = [sys.executable, "-m", "heeler", "submit", *self._queue, str(HERE / "job.json")]
        done = subprocess.run(command, cwd=self._home, check=True, stdout=subprocess.PIPE, text=True)
        return done.stdout.strip()

    def run_worker(self, number: int, kill_after: float | None) -> int:
        """Let a worker on a new machine do one job. After `kill_after` seconds it gets SIGKILL."""
        machine = self._home / f"machine-{number}"
        machine.mkdir()
        shutil.copy(HERE / "simulate.py", machine)
        environment = {**os.environ, "HEELER_STATE_DIR": str(machine / "state")}
        command = [sys.executable, "-m", "heeler", "run", *self._queue, "--max-jobs", "1", "--control", "off"]
        print(f"--- machine {number} starts", flush=True)
        worker = subprocess.Popen(command, cwd=machine, env=environment)
        self._cleanup.callback(stop, worker)
        try:
            return worker.wait(kill_after)
        except subprocess.TimeoutExpired:
            worker.kill()
            print(f"--- machine {number} vanishes after {kill_after:g} s (SIGKILL)", flush=True)
            return worker.wait()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process: kindly first, since a worker then stops its program and hands its job back."""
    process.terminate()
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def leave(number: int, _frame: FrameType | None) -> None:
    """End by a signal, but clean up first; the next signal must not cut that short."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(128 + number)


def fetch_results(s3: S3Client, prefix: str, folder: Path) -> None:
    """Download what the job left; print its summary and the digest of each file."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [entry["Key"] for entry in s3.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])]
    if f"{prefix}summary.json" not in names:
        sys.exit(f"no summary.json in s3://{BUCKET}/{prefix}, only {names}")
    paths = [folder / Path(name).name for name in names]
    for name, path in zip(names, paths, strict=True):
        s3.download_file(BUCKET, name, str(path))
    print((folder / "summary.json").read_text(encoding="utf-8"))
    for path in paths:
        print(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}")
    print(f"results are in {folder}")


def main() -> int:
    """The whole story. Returns the exit code of the last worker."""
    parser = argparse.ArgumentParser(description="Run the molecular dynamics example on this computer.")
    parser.add_argument("--kill-after", type=float, metavar="SECONDS", help="kill the worker, start another")
    parser.add_argument("--results", type=Path, default=Path("molecular-dynamics-results"), metavar="FOLDER")
    asked = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, leave)
    with tempfile.TemporaryDirectory(prefix="heeler-md-") as home, ExitStack() as cleanup:
        stage = Stage(Path(home), cleanup)
        s3 = stage.start_storage()
        for path in (HERE / "input").iterdir():
            s3.upload_file(str(path), BUCKET, INPUTS + path.name)
        job = stage.submit()
        print(f"submitted job {job}", flush=True)
        code = stage.run_worker(1, asked.kill_after)
        if code == -signal.SIGKILL:
            code = stage.run_worker(2, None)
        elif asked.kill_after is not None:
            print(f"the worker ended before {asked.kill_after:g} s had passed: it was not killed")
        if code == 0:
            fetch_results(s3, f"jobs/{job}/output/", asked.results)
        return code


if __name__ == "__main__":
    sys.exit(main())
