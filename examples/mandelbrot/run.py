"""Renders the Mandelbrot set on this computer: a job queue, two machines with a worker each, and a job for each tile.

    python run.py [--kill] [--tile-pixels N] [--iterations N] [--result FILE]

It starts heeler by its command line, and uses the queue by HTTP, as a program of yours uses that of SaladCloud. What
it starts is gone when it ends; what it writes besides the picture is in a temporary folder.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
LEFT, TOP, TILE_SIDE = Decimal("-2.3"), Decimal("1.2"), Decimal("0.4")  # in the plane
COLUMNS, ROWS = 8, 6  # of tiles
MACHINES = 2
END_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
START_SECONDS = 60.0
LOOK_SECONDS = 0.03
KILL_SECONDS = 0.1  # so long the tile is rendered already that a worker is killed in
AWAY_SECONDS = 1.0  # from the kill to the next start
ENDED = {"succeeded", "failed", "cancelled"}  # what the queue says of jobs to which nothing more happens


class Processes:
    """Programs in the background. They get no Ctrl-C themselves: `stop` ends them, in the order that is right."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: Sequence[str], **more: Any) -> None:
        """Start one; what it prints is added to its log."""
        # A signal between a program's start and our knowing of it would leave it running.
        with self.log(name).open("ab") as log, signals_wait():
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, **more
            )

    def log(self, name: str) -> Path:
        """What one has printed."""
        return self._folder / f"{name}.log"

    def signal(self, name: str, number: int) -> None:
        """Send one a signal."""
        self._running[name].send_signal(number)

    def kill(self, name: str) -> None:
        """SIGKILL: it can do nothing about it."""
        process = self._running.pop(name)
        process.kill()
        process.wait()

    def check(self) -> None:
        """End with an error if one has ended."""
        for name, process in self._running.items():
            if process.poll() is not None:
                said = self.log(name).read_text(encoding="utf-8", errors="replace")
                sys.exit(f"{name} ended with code {process.returncode}:\n{said[-3000:]}")

    def stop(self) -> None:
        """End all, the last first: a worker ends its app, too. No signal cuts that short."""
        ignore_signals()
        for process in reversed(self._running.values()):
            process.terminate()
        for process in reversed(self._running.values()):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class Queue:
    """The queue as one who submits jobs knows it, by the public REST calls of SaladCloud."""

    def __init__(self, environment: dict[str, str]) -> None:
        organization, project = environment["SALAD_ORGANIZATION_NAME"], environment["SALAD_PROJECT_NAME"]
        place = f"organizations/{organization}/projects/{project}/queues/{environment['SALAD_QUEUE_NAME']}"
        self._url = f"{environment['SALAD_API_URL']}/{place}/jobs"
        self._headers = {"Salad-Api-Key": environment["SALAD_API_KEY"], "Content-Type": "application/json"}
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this computer

    def submit(self, data: object) -> str:
        """Create a job, and return its id."""
        return str(self._call("POST", self._url, json.dumps({"input": data}).encode())["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        """A job as it is now."""
        return self._call("GET", f"{self._url}/{job_id}")

    def _call(self, method: str, url: str, body: bytes | None = None) -> dict[str, Any]:
        request = urllib.request.Request(url, body, self._headers, method=method)
        with self._opener.open(request, timeout=30) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


class Stage:
    """The queue and the machines. Each machine is a folder with the app in it, as an image would have it."""

    def __init__(self, home: Path, processes: Processes) -> None:
        self._home = home
        self._processes = processes
        self._ports = free_ports(MACHINES)

    def start_queue(self) -> Queue:
        """Start `heeler local`, and wait until it serves."""
        file = self._home / "env"
        command = [sys.executable, "-m", "heeler", "local", "--machines", str(MACHINES), "--app-path", "/tile"]
        self._processes.start("queue", [*command, "--env-file", str(file)])
        limit = time.monotonic() + START_SECONDS
        while not file.exists():
            self._processes.check()
            if time.monotonic() > limit:
                sys.exit(f"the queue did not start within {START_SECONDS:g} s")
            time.sleep(LOOK_SECONDS)
        return Queue(exported(file))

    def start_worker(self, number: int) -> None:
        """Start the worker of a machine, with the environment and the folder of that machine."""
        folder = self._home / f"machine-{number}"
        folder.mkdir(exist_ok=True)
        shutil.copy(HERE / "app.py", folder)
        environment = exported(self._home / ("env" if number == 1 else f"env.{number}"))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HEELER_")}
        # The queue names one port for all machines; these share a computer, so each app has a port of its own.
        port = str(self._ports[number - 1])
        app = [sys.executable, "-m", "uvicorn", "app:app", "--port", port]
        options = ["--app-url", f"http://127.0.0.1:{port}", "--app-health-path", "/health"]
        options += ["--state-dir", str(folder / "state"), "--control", "off", "--stop-grace", "5"]
        command = [sys.executable, "-m", "heeler", "run", "--source", "salad", *options, "--", *app]
        self._processes.start(folder.name, command, cwd=folder, env={**inherited, **environment})

    def kill_worker(self, number: int) -> None:
        """SIGKILL to the worker of a machine; its app goes with it."""
        self._processes.kill(f"machine-{number}")

    def halt_worker(self, number: int, *, on: bool) -> None:
        """The worker of a machine stands still, or goes on."""
        self._processes.signal(f"machine-{number}", signal.SIGSTOP if on else signal.SIGCONT)

    def rendering(self, number: int) -> str | None:
        """The job that the app of a machine has now; the log of its worker tells."""
        job = None
        for line in self._processes.log(f"machine-{number}").read_text(encoding="utf-8").splitlines():
            if '"event": "phase"' in line and line.endswith("}"):
                said = json.loads(line)
                job = said["job_id"] if said["phase"] == "run" else None
        return job

    def check(self) -> None:
        """End with an error if something of it has ended."""
        self._processes.check()


class Killer:
    """Kills the first worker once, in the middle of a tile, and starts it again."""

    def __init__(self, stage: Stage, queue: Queue, tiles: dict[str, int]) -> None:
        self._stage = stage
        self._queue = queue
        self._tiles = tiles
        self._job: str | None = None
        self._since = 0.0
        self.victim: str | None = None
        """The job that it was killed in."""

    def look(self) -> None:
        """Kill it if it has been at its tile for a while."""
        job = self._stage.rendering(1)
        if job != self._job:
            self._job, self._since = job, time.monotonic()
        if job is None or time.monotonic() < self._since + KILL_SECONDS:
            return
        self._stage.halt_worker(1, on=True)  # else it may be done, and given another, just before it is killed
        if self._status(job) in ENDED:
            self._stage.halt_worker(1, on=False)
            return
        self._stage.kill_worker(1)
        self.victim = job
        say(f"--- the worker of machine-1 is killed (SIGKILL) in tile {self._tiles[job]}")
        time.sleep(AWAY_SECONDS)
        say("--- it is started again")
        self._stage.start_worker(1)

    def _status(self, job: str) -> str:
        return str(self._queue.job(job)["status"])


class Picture:
    """The whole picture, tile by tile."""

    def __init__(self, tile_pixels: int) -> None:
        self._tile_pixels = tile_pixels
        self.columns, self.rows = COLUMNS * tile_pixels, ROWS * tile_pixels
        self._rgb = bytearray(3 * self.columns * self.rows)

    def paste(self, number: int, rgb: bytes) -> None:
        """Put a tile where it belongs."""
        row, column = divmod(number - 1, COLUMNS)
        length = 3 * self._tile_pixels
        for line in range(self._tile_pixels):
            at = ((row * self._tile_pixels + line) * COLUMNS + column) * length
            self._rgb[at : at + length] = rgb[line * length : (line + 1) * length]

    def png(self) -> bytes:
        """The picture as a file."""
        return png(self.columns, self.rows, bytes(self._rgb))


def png(columns: int, rows: int, rgb: bytes) -> bytes:
    """A PNG file with these pixels: three bytes each, row by row from the top."""
    length = 3 * columns
    lines = b"".join(b"\0" + rgb[at : at + length] for at in range(0, len(rgb), length))  # 0: not filtered
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)  # 8 bits each of red, green and blue
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def tile_input(number: int, pixels: int, iterations: int) -> dict[str, object]:
    """What a job says of its tile; they are counted from 1, row by row from the top."""
    row, column = divmod(number - 1, COLUMNS)
    x, y, side = LEFT + TILE_SIDE * column, TOP - TILE_SIDE * row, float(TILE_SIDE)
    place = {"x": float(x), "y": float(y), "width": side, "height": side}
    return {**place, "pixels": pixels, "iterations": iterations}


def exported(file: Path) -> dict[str, str]:
    """What a shell would export after reading a file of `heeler local`."""
    words = [shlex.split(line) for line in file.read_text(encoding="utf-8").splitlines()]
    pairs = [line[1].partition("=") for line in words if line[:1] == ["export"]]
    return {name: value for name, _, value in pairs}


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def say(line: str) -> None:
    """Print a line now."""
    print(line, flush=True)


def wait_for(job_id: str, queue: Queue, stage: Stage, killer: Killer | None) -> dict[str, Any]:
    """A job, once it has ended."""
    while (job := queue.job(job_id))["status"] not in ENDED:
        stage.check()
        if killer is not None and killer.victim is None:
            killer.look()
        time.sleep(LOOK_SECONDS)
    return job


def result_of(number: int, job: dict[str, Any]) -> dict[str, Any]:
    """The answer of the app to a job; ends with an error if there is none."""
    output = job.get("output")
    if job["status"] != "succeeded" or not isinstance(output, dict) or "rgb" not in output:
        sys.exit(f"tile {number}: the job has {job['status']} without a picture: {output}")
    return output


def render(stage: Stage, asked: argparse.Namespace) -> Picture:
    """Submit a job for each tile, wait for all, and put them together."""
    queue = stage.start_queue()
    count = COLUMNS * ROWS
    tiles = {
        queue.submit(tile_input(number, asked.tile_pixels, asked.iterations)): number for number in range(1, count + 1)
    }
    say(f"{count} jobs submitted, one for each tile")
    for machine in range(1, MACHINES + 1):
        stage.start_worker(machine)
    killer = Killer(stage, queue, tiles) if asked.kill else None
    picture = Picture(asked.tile_pixels)
    for job_id, number in tiles.items():
        job = wait_for(job_id, queue, stage, killer)
        output = result_of(number, job)
        picture.paste(number, zlib.decompress(base64.b64decode(output["rgb"])))
        tries = [event["action"] for event in job["events"]].count("started")
        killed = ", though its worker was killed" if killer is not None and killer.victim == job_id else ""
        say(f"tile {number:2} of {count}: done by {output['machine']}, try {tries}{killed}")
    if killer is not None and killer.victim is None:
        sys.exit("no tile took long enough to kill a worker in: raise --iterations")
    return picture


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


def positive(text: str) -> int:
    """A number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def main() -> None:
    """The whole story."""
    parser = argparse.ArgumentParser(description="Render the Mandelbrot set on this computer, by way of a job queue.")
    parser.add_argument("--kill", action="store_true", help="kill a worker in the middle of a tile")
    parser.add_argument("--tile-pixels", type=positive, default=128, metavar="N", help="in a row of one of 8 x 6 tiles")
    parser.add_argument("--iterations", type=positive, default=500, metavar="N", help="of a point, at the most")
    parser.add_argument("--result", type=Path, default=Path("mandelbrot.png"), metavar="FILE")
    asked = parser.parse_args()
    for number in END_SIGNALS:
        signal.signal(number, leave)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="heeler-mandelbrot-") as home, ExitStack() as cleanup:
        processes = Processes(Path(home))
        cleanup.callback(processes.stop)
        picture = render(Stage(Path(home), processes), asked)
    asked.result.write_bytes(picture.png())
    say(f"{picture.columns} x {picture.rows} pixels after {time.monotonic() - began:.0f} s, in {asked.result}")


if __name__ == "__main__":
    main()
