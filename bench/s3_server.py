"""Requests a second of our test S3 server beside moto's, in the same run: the yardstick must not be the limit.

Both run as processes of their own; obstore's sync API puts and gets objects of 4 KiB from several threads.
Run it as `python bench/s3_server.py`.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import boto3
from obstore.store import S3Store

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.s3 import S3Process

KEYS = ("testing", "testing")


@contextmanager
def moto_process() -> Iterator[str]:
    """A moto server's URL."""
    program = "import sys; from moto.server import main; main(sys.argv[1:])"
    port = free_port()
    command = [sys.executable, "-c", program, "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_for_bucket(url: str) -> None:
    """Make the bucket as soon as the server answers."""
    client = boto3.client(
        "s3",
        endpoint_url=url,
        aws_access_key_id=KEYS[0],
        aws_secret_access_key=KEYS[1],
        region_name="us-east-1",
    )
    deadline = time.monotonic() + 30
    while True:
        try:
            client.create_bucket(Bucket="bench")
        except Exception:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return


def store_at(url: str) -> S3Store:
    """A store on the bench's bucket."""
    return S3Store(
        "bench",
        endpoint=url,
        access_key_id=KEYS[0],
        secret_access_key=KEYS[1],
        region="us-east-1",
        virtual_hosted_style_request=False,
        client_options={"allow_http": True, "timeout": "300s"},
    )


def rate(work: Callable[[int], object], count: int, threads: int) -> float:
    """Calls a second."""
    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        for _ in pool.map(work, range(count)):
            pass
        return count / (time.perf_counter() - began)


def measure(url: str, run: int, count: int, threads: int, size: int) -> tuple[float, float]:
    """PUTs and GETs a second, of new keys."""
    store, data = store_at(url), bytes(size)
    puts = rate(lambda number: store.put(f"{run}/{number}", data), count, threads)
    gets = rate(lambda number: store.get(f"{run}/{number}").bytes(), count, threads)
    return puts, gets


def main() -> None:
    """Print both servers' figures and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--count", type=int, default=6000, help="requests of a run to ours; moto gets a tenth")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--size", type=int, default=4096)
    options = parser.parse_args()
    ours: list[tuple[float, float]] = []
    moto: list[tuple[float, float]] = []
    with (
        S3Process.start(buckets=["bench"], access_key=KEYS[0], secret_key=KEYS[1]) as server,
        moto_process() as moto_url,
    ):
        wait_for_bucket(moto_url)
        for run in range(options.runs):
            ours.append(measure(server.url, run, options.count, options.threads, options.size))
            moto.append(measure(moto_url, run, max(1, options.count // 10), options.threads, options.size))
    print(f"{options.size} B, {options.threads} threads, median of {options.runs} runs")
    print(f"{'':6}{'ours /s':>10}{'moto /s':>10}{'ratio':>8}")
    for index, name in enumerate(("PUT", "GET")):
        mine = statistics.median(run[index] for run in ours)
        theirs = statistics.median(run[index] for run in moto)
        print(f"{name:6}{mine:10.0f}{theirs:10.0f}{mine / theirs:8.1f}")


if __name__ == "__main__":
    main()
