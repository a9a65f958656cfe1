"""Fixtures of the acceptance tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.acceptance.kelpie_world import KelpieWorld
from tests.acceptance.world import BUCKET, World
from tests.support.kelpie_server import KelpieServer
from tests.support.s3 import Rules, S3Server


@pytest.fixture
def storage() -> Iterator[S3Server]:
    """A strict S3 server that remembers every version of every key."""
    with S3Server.start(rules=Rules(keep_history=True), buckets=[BUCKET]) as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, storage: S3Server) -> Iterator[World]:
    """Everything else."""
    made = World(tmp_path, storage)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def kelpie(tmp_path: Path, storage: S3Server) -> Iterator[KelpieWorld]:
    """A world whose queue is Kelpie's API."""
    with KelpieServer() as server:
        made = KelpieWorld(tmp_path, storage, server)
        try:
            yield made
        finally:
            made.close()
