"""The object stores that the contract suite runs against: one in memory and three servers on loopback."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from heeler_sync.store.base import ObjectStore
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS
from heeler_sync.store.s3 import Endpoint, S3ObjectStore
from tests.support.s3 import Rules, S3Server
from tests.support.s3_clients import boto3_client

MIB = 1 << 20
PART = 5 * MIB
"""The smallest part that S3 takes."""


class Backend:
    """One kind of store. `open` gives the store of a bucket, which `create` makes."""

    def __init__(self, name: str, create: Callable[[str], None], open_store: Callable[[str], ObjectStore]) -> None:
        self.name = name
        self.create = create
        self.open = open_store


class Server:
    """Where a server listens and the keys that it knows."""

    def __init__(self, url: str, access_key: str, secret_key: str) -> None:
        self.url, self.access_key, self.secret_key = url, access_key, secret_key

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket, by S3's own call."""
        boto3_client(self).create_bucket(Bucket=bucket)

    def store(self, bucket: str, provider: str = "s3", **changes: object) -> S3ObjectStore:
        """A store with small parts; `changes` are fields of `Endpoint`."""
        endpoint = Endpoint(self.url, "us-east-1", self.access_key, self.secret_key, provider=provider, no_progress=5.0)
        store = S3ObjectStore(bucket, replace(endpoint, **changes))  # type: ignore[arg-type]
        store._provider = replace(store.provider, part_bytes=PART)
        return store


def memory() -> Backend:
    """The store in a dictionary."""
    provider = replace(PROVIDERS["s3"], part_bytes=PART)
    buckets: dict[str, MemoryStore] = {}
    return Backend("memory", lambda bucket: None, lambda name: buckets.setdefault(name, MemoryStore(name, provider)))


@contextmanager
def strict() -> Iterator[tuple[Backend, S3Server]]:
    """Our strict server. Two writes a second of one key are allowed, since tests of other rules need them."""
    with S3Server.start(rules=Rules(write_interval=0.0)) as server:
        at = Server(server.url, server.access_key, server.secret_key)
        yield Backend("strict", server.create_bucket, at.store), server


@contextmanager
def moto() -> Iterator[Backend]:
    """moto's server, in a process of its own."""
    with _process([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p"]) as url:
        at = Server(url, "testing", "testing")
        yield Backend("moto", at.create_bucket, at.store)


@contextmanager
def rclone(folder: Path) -> Iterator[Backend]:
    """`rclone serve s3` of a folder: a provider without ranges, conditions and MD5 ETags."""
    program = shutil.which("rclone") or str(Path(sys.executable).with_name("rclone"))
    key, secret = "rclone-key", "rclone-secret"
    config = ["--config", "/dev/null", "--cache-dir", str(folder / "cache")]
    command = [program, "serve", "s3", *config, "--auth-key", f"{key},{secret}", str(folder / "data"), "--addr"]
    (folder / "data").mkdir()
    with _process(command, "127.0.0.1:") as url:
        at = Server(url, key, secret)
        yield Backend("rclone", at.create_bucket, lambda name: at.store(name, "rclone"))


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def _process(command: list[str], before_port: str = "") -> Iterator[str]:
    port = free_port()
    with ExitStack() as stack:
        process = subprocess.Popen(
            [*command, f"{before_port}{port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        deadline = time.monotonic() + 30
        while True:
            assert process.poll() is None, f"{command} ended with {process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                assert time.monotonic() < deadline, f"{command} does not listen"
                time.sleep(0.05)
            else:
                break
        yield f"http://127.0.0.1:{port}"
