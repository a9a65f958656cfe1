"""Memory and CPU of a worker that has nothing to do, beside a hand-written Python worker's.

Run it as `python -m bench.idle`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack

import psutil

from bench.common import BUCKET, Report, World, sync_entry, world
from tests.support.worker import Worker

RUNS = 5
SETTLE_SECONDS = 5.0
CPU_SECONDS = 15.0
MOST_MB = 72.0
MEASURED = "Kelpie's worker 72 MB, 0.27 % CPU; Salad's worker in Go 13 MB"
"""Measured by the same means, each running idle on loopback (MEASUREMENTS.md, FAULTS.md)."""

PEER = f"""
import sqlite3, sys, threading, time, boto3
from pathlib import Path
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

folder, queue = Path(sys.argv[1]), sqlite3.connect(sys.argv[2], isolation_level=None)
folder.mkdir()
sqs, s3 = boto3.client("sqs"), boto3.client("s3")
closed = threading.Event()

class Handler(FileSystemEventHandler):
    def on_closed(self, event):
        s3.upload_file(event.src_path, {BUCKET!r}, folder.name + "/" + Path(event.src_path).name)
        closed.set()

observer = Observer()
observer.schedule(Handler(), str(folder), recursive=True)
observer.start()

def heartbeat():
    while True:
        time.sleep(10)

threading.Thread(target=heartbeat, daemon=True).start()
print("idle", flush=True)
while True:
    row = queue.execute("SELECT seq FROM jobs WHERE state = 'pending' LIMIT 1").fetchone()
    if row is None:
        time.sleep(0.2)
        continue
    s3.list_objects_v2(Bucket={BUCKET!r}, Prefix=folder.name + "/")
    (folder / "result").write_text("done")
    closed.wait()
    queue.execute("UPDATE jobs SET state = 'done' WHERE seq = ?", row)
    print("idle", flush=True)
"""
"""It polls its queue as often as our local source does; otherwise its CPU would be nothing at all."""


def usage(pids: Sequence[int]) -> tuple[list[float], list[float]]:
    """RSS in MB after a while of idleness, and CPU in percent of one core from then on, of each process."""
    time.sleep(SETTLE_SECONDS)
    memory = [psutil.Process(pid).memory_info().rss / 1e6 for pid in pids]
    before = [_cpu_seconds(pid) for pid in pids]
    time.sleep(CPU_SECONDS)
    return memory, [100 * (_cpu_seconds(pid) - was) / CPU_SECONDS for pid, was in zip(pids, before, strict=True)]


def _cpu_seconds(pid: int) -> float:
    """A process' own CPU clock (as clock_getcpuclockid(3) names it): nanoseconds, where /proc tells ticks of 10 ms."""
    return time.clock_gettime((~pid << 3) | 2)


def start_ours(here: World, stack: ExitStack) -> list[Worker]:
    """Idle workers, each with a queue of its own and the control API on."""
    workers = [stack.enter_context(here.worker(f"queue{run}")) for run in range(RUNS)]
    for worker in workers:
        worker.wait_for("phase", phase="receive")
        worker.wait_for("control_ready")
    return workers


def start_peers(here: World, stack: ExitStack) -> list[subprocess.Popen[str]]:
    """As many idle peers."""
    peers = []
    for run in range(RUNS):
        here.queue(f"peerqueue{run}").close()
        arguments = (str(here.folder / f"peer{run}"), str(here.folder / f"peerqueue{run}" / "queue.db"))
        peers.append(stack.enter_context(here.peer(PEER, *arguments)))
    for peer in peers:
        _wait_until_idle(peer)
    return peers


def run_a_job(here: World, workers: Sequence[Worker], peers: Sequence[subprocess.Popen[str]]) -> None:
    """Each runs one small job with sync."""
    sync = {"before": [sync_entry("ck")], "during": [sync_entry("ck")], "after": [sync_entry("out")]}
    program = ["-c", "echo done > $CHECKPOINT_DIR/step; sleep 0.2; echo done > $OUTPUT_DIR/result"]
    for run, (worker, peer) in enumerate(zip(workers, peers, strict=True)):
        job = {"id": f"job-{run}", "command": "sh", "arguments": program, "sync": sync}
        here.queue(f"queue{run}", [job]).close()
        worker.wait_for("job_settled", outcome="done")
        worker.wait_for("phase", phase="receive", count=2)
        here.queue(f"peerqueue{run}", [job]).close()
        _wait_until_idle(peer)


def _wait_until_idle(peer: subprocess.Popen[str]) -> None:
    assert peer.stdout is not None
    assert peer.stdout.readline() == "idle\n"


def main() -> int:
    """Print memory and CPU before a job and after one."""
    report = Report(
        "idle worker",
        f"{RUNS} of each at once, {SETTLE_SECONDS:.0f} s after start and after a job; "
        f"RSS, then the process' CPU clock over {CPU_SECONDS:.0f} s",
        "a worker by hand: boto3's s3 and sqs clients, a watchdog observer, a heartbeat thread, a polled SQLite table\n"
        f"measured: {MEASURED}",
    )
    with world() as here, ExitStack() as stack:
        workers, peers = start_ours(here, stack), start_peers(here, stack)
        pids = [worker.pid for worker in workers] + [peer.pid for peer in peers]
        fresh, fresh_cpu = usage(pids)
        report.row("MB, fresh", fresh[:RUNS], fresh[RUNS:])
        report.row("CPU %, fresh", fresh_cpu[:RUNS], fresh_cpu[RUNS:], 2)
        run_a_job(here, workers, peers)
        after, after_cpu = usage(pids)
        report.row("MB, after one small job with sync", after[:RUNS], after[RUNS:])
        report.row("CPU %, after it", after_cpu[:RUNS], after_cpu[RUNS:], 2)
    report.target("MB, fresh", fresh[:RUNS], MOST_MB, "MB")
    report.target("MB, after a job", after[:RUNS], MOST_MB, "MB")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
