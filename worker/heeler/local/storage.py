"""An S3 and an SQS on loopback for trying things: moto's server in a process of its own, all of it in memory."""

from __future__ import annotations

import importlib.util
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from heeler.errors import UnavailableError, UsageError
from heeler.local.processes import free_port, running

ACCESS_KEY = "local-access-key"
SECRET_KEY = "local-secret-key"  # noqa: S105 - of a server that asks nobody for one
_START_SECONDS = 30.0


@dataclass(frozen=True)
class LocalStorage:
    """A running S3 and SQS.

    Attributes:
        url: The endpoint of both.
    """

    url: str

    def environment(self) -> dict[str, str]:
        """What points heeler, and boto3, at it."""
        return {
            "AWS_ENDPOINT_URL_S3": self.url,
            "AWS_ENDPOINT_URL_SQS": self.url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_REGION": "us-east-1",
        }

    def client(self) -> Any:
        """A boto3 client of the S3."""
        import boto3  # noqa: PLC0415 - moto brings it

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )


@contextmanager
def local_storage(port: int = 0) -> Iterator[LocalStorage]:
    """Run it while the block runs, on a port; 0 takes a free one.

    Raises:
        UsageError: The extra `local` is not installed.
        UnavailableError: It did not start, or the port is taken.
    """
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("flask") is None:
        raise UsageError("this needs an S3 of one's own: pip install 'heeler[local]'")
    port = free_port(port)
    with running([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]) as server:
        storage = LocalStorage(f"http://127.0.0.1:{port}")
        give_up = time.monotonic() + _START_SECONDS
        while not _answers(storage.url):
            if server.poll() is not None or time.monotonic() > give_up:
                raise UnavailableError("the local S3 (moto) did not start")
            time.sleep(0.05)
        yield storage


def _answers(url: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/moto-api/", timeout=2):
            return True
    except (urllib.error.URLError, OSError):
        return False
