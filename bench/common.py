"""What the benches share: the table that they print, the verdict that they end with, and the world that they run in."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from heeler.sources.local import LocalDesk
from tests.support.s3 import S3Process
from tests.support.worker import Worker, clean_environment, storage_environment

BUCKET = "bench"


class Report:
    """The lines of one bench: figures beside a peer's, then what was to be reached and whether it was."""

    def __init__(self, title: str, how: str, peer: str) -> None:
        """Args: what is measured, how, and beside whom."""
        self._missed = False
        print(f"{title}: {how}")
        print(f"peer: {peer}\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        print(f"{'median (least to most)':44}{'ours':>26}{'peer':>26}{'ours/peer':>11}")

    def row(self, name: str, ours: Sequence[float], peer: Sequence[float], digits: int = 1) -> None:
        """One figure of each, of several runs."""
        ratio = f"{statistics.median(ours) / statistics.median(peer):.2f}" if ours and peer else "-"
        print(f"{name:44}{_spread(ours, digits):>26}{_spread(peer, digits):>26}{ratio:>11}", flush=True)

    def target(self, name: str, ours: Sequence[float], most: float, unit: str) -> None:
        """Our median must be less than `most`."""
        median = statistics.median(ours)
        self._missed = self._missed or median >= most
        print(f"target: {name} < {most:g} {unit}: {median:.3g} {unit}, {'MISSED' if median >= most else 'met'}")

    def end(self) -> int:
        """The exit code: 1 if a target was missed."""
        return int(self._missed)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


class World:
    """A folder, storage, and the processes of one run in them."""

    def __init__(self, folder: Path, storage: S3Process) -> None:
        self.folder = folder
        self.storage = storage
        # boto3 looks for its own name of the region in every client but s3.
        self.environment = clean_environment(**storage_environment(storage), AWS_DEFAULT_REGION="us-east-1")

    def queue(self, name: str, jobs: Sequence[Mapping[str, Any]] = ()) -> LocalDesk:
        """A queue in a folder of that name, with these jobs in it."""
        desk = LocalDesk(self.folder / name)
        if jobs:
            desk.submit([json.dumps(job).encode() for job in jobs])
        return desk

    @contextmanager
    def worker(self, queue: str, *arguments: str, control: str = "127.0.0.1:0") -> Iterator[Worker]:
        """A real `heeler run` on a queue, with the control API on; it is ended with the block."""
        source = ("--source", f"local:{self.folder / queue}")
        state = self.folder / f"state-{queue}"
        with Worker(
            *source, *arguments, state_dir=state, env=self.environment, cwd=self.folder, control=control
        ) as worker:
            yield worker

    @contextmanager
    def peer(self, text: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
        """A Python program that talks over its stdin and stdout; it is killed with the block."""
        command = [sys.executable, "-c", text, *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, env=self.environment, cwd=self.folder, text=True, **pipes) as process:  # type: ignore[call-overload]
            try:
                yield process
            finally:
                process.kill()


@contextmanager
def world() -> Iterator[World]:
    """A fresh one. The storage's limit of one write per key and second is off: it is not what we measure."""
    with (
        TemporaryDirectory(prefix="heeler-bench-") as folder,
        S3Process.start(buckets=[BUCKET], rules=["write_interval=0"]) as storage,
    ):
        yield World(Path(folder), storage)


def sync_entry(name: str) -> dict[str, str]:
    """A sync entry of a folder of the job's own."""
    return {"bucket": BUCKET, "prefix": f"{{job_id}}/{name}/", "local_path": f"work/{{job_id}}/{name}"}
