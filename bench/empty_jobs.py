"""What the runtime adds to jobs that do nothing, beside a loop that people write by hand.

Run it as `python -m bench.empty_jobs`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from bench.common import Report, World, sync_entry, world
from heeler.sources.base import JobRecord

RUNS = 5
JOBS = 100
MOST_SECONDS = 3.0
KELPIE_SECONDS = 46.0
"""Kelpie's worker 0.7.1 with the same three jobs and interval (FAULTS.md): it sleeps out a heartbeat after each."""

PEER = """
import json, sqlite3, subprocess, sys, time
queue = sqlite3.connect(sys.argv[1], isolation_level=None)
while True:
    row = queue.execute("SELECT seq, body FROM jobs WHERE state = 'pending' ORDER BY seq LIMIT 1").fetchone()
    if row is None:
        break
    job = json.loads(row[1])
    subprocess.run([job["command"], *job.get("arguments", [])], check=True)
    queue.execute("UPDATE jobs SET state = 'done', finished = ? WHERE seq = ?", (time.time(), row[0]))
"""
"""No lease, no heartbeat, no log, no end of descendants: one commit (with its fsync) a job."""

SYNC = {"before": [sync_entry("ck")], "during": [sync_entry("ck")], "after": [sync_entry("out")]}


def jobs(name: str, count: int, **fields: Any) -> list[dict[str, Any]]:
    """Jobs that do nothing."""
    job = {"command": "true", "heartbeat_interval": 15, **fields}
    return [{"id": f"{name}-{number}", **job} for number in range(count)]


def ours(here: World, name: str, count: int, **fields: Any) -> tuple[float, list[JobRecord]]:
    """When the worker was started, and its jobs once all are done."""
    desk = here.queue(name, jobs(name, count, **fields))
    began = time.time()
    with here.worker(name, "--max-jobs", str(count)) as worker:
        assert worker.wait(120) == 0, worker.lines
    records = desk.jobs()
    desk.close()
    return began, records


def peer(here: World, name: str, count: int) -> tuple[float, list[JobRecord]]:
    """The same of the loop by hand."""
    desk = here.queue(name, jobs(name, count))
    began = time.time()
    with here.peer(PEER, str(here.folder / name / "queue.db")) as loop:
        assert loop.wait(120) == 0
    records = desk.jobs()
    desk.close()
    return began, records


def ends(records: list[JobRecord]) -> list[float]:
    """When the jobs were done, in order."""
    assert all(record.state == "done" for record in records), records
    return sorted(record.finished or 0.0 for record in records)


def rate(records: list[JobRecord]) -> float:
    """Jobs a second from the end of the first to the end of the last: without the start of the process."""
    done = ends(records)
    return (len(done) - 1) / (done[-1] - done[0])


def main() -> int:
    """Print the time of three jobs and the rate of a hundred."""
    report = Report(
        "empty jobs",
        f"`true` as a job, heartbeat_interval 15, local queue; {RUNS} runs of each in turn; seconds from the start of "
        "the process to the last `done`, rates from the first `done` to the last",
        "a loop by hand: subprocess.run and one commit a job on the same SQLite table\n"
        f"measured: Kelpie's worker takes {KELPIE_SECONDS:.0f} s for three",
    )
    three: tuple[list[float], list[float]] = ([], [])
    many: tuple[list[float], list[float], list[float]] = ([], [], [])
    with world() as here:
        for run in range(RUNS):
            for found, (began, records) in zip(
                three, (ours(here, f"three{run}", 3), peer(here, f"peer3{run}", 3)), strict=True
            ):
                found.append(ends(records)[-1] - began)
            many[0].append(rate(ours(here, f"plain{run}", JOBS)[1]))
            many[1].append(rate(ours(here, f"sync{run}", JOBS, sync=SYNC)[1]))
            many[2].append(rate(peer(here, f"peer{run}", JOBS)[1]))
    report.row("s for three jobs", *three, digits=2)
    report.row(f"jobs/s, {JOBS} jobs without sync", many[0], many[2])
    report.row(f"jobs/s, {JOBS} jobs, sync before, during, after", many[1], many[2])
    print(f"(load now {os.getloadavg()[0]:.1f})")
    report.target("three jobs", three[0], MOST_SECONDS, "s")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
