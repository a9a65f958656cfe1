"""How long a command takes to start, beside bare Python and beside a boto3 client.

Run it as `python -m bench.start`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.common import Report, World, world

RUNS = 11
MOST_HELP_SECONDS = 0.3
HEELER = str(Path(sys.executable).with_name("heeler"))
BOTO3 = "import boto3; boto3.client('s3')"


def wall(*command: str, env: Mapping[str, str]) -> float:
    """Seconds of one command from start to exit."""
    began = time.perf_counter()
    subprocess.run(command, env=env, check=True, capture_output=True)
    return time.perf_counter() - began


def until_receive(here: World, control: str) -> float:
    """Seconds from the start of a worker until its log says that it takes jobs."""
    began = time.monotonic()
    with here.worker("queue", control=control) as worker:
        seen: float = worker.wait_for("phase", phase="receive")["_seen"]
        return seen - began


def main() -> int:
    """Print start-up times, all taken in turn."""
    report = Report(
        "start in ms",
        f"wall time of each in turn, {RUNS} times after one to warm up the disk cache",
        "python -c pass, and: python -c \"import boto3; boto3.client('s3')\"",
    )
    with world() as here:
        env = {**here.environment, "HEELER_STATE_DIR": str(here.folder / "state")}
        measures: dict[str, Callable[[], float]] = {
            "python": lambda: wall(sys.executable, "-c", "pass", env=env),
            "boto3": lambda: wall(sys.executable, "-c", BOTO3, env=env),
            "help": lambda: wall(HEELER, "--help", env=env),
            "receive": lambda: until_receive(here, "127.0.0.1:0"),
            "receive without control": lambda: until_receive(here, "off"),
        }
        found: dict[str, list[float]] = {name: [] for name in measures}
        for run in range(-1, RUNS):
            for name, measure in measures.items():
                seconds = measure()
                if run >= 0:
                    found[name].append(seconds * 1000)
    report.row("heeler --help, beside python", found["help"], found["python"])
    report.row("heeler --help, beside boto3", found["help"], found["boto3"])
    report.row("heeler run to `receive`, beside boto3", found["receive"], found["boto3"])
    report.row("the same with --control off, beside boto3", found["receive without control"], found["boto3"])
    print(f"(load now {os.getloadavg()[0]:.1f})")
    report.target("heeler --help", found["help"], MOST_HELP_SECONDS * 1000, "ms")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
