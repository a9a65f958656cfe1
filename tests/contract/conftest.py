"""The stores of the contract suite, each started once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from heeler_sync.store.base import ObjectStore
from tests.support.backends import Backend, memory, moto, rclone, strict
from tests.support.s3 import S3Server

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def memory_backend() -> Backend:
    return memory()


@pytest.fixture(scope="session")
def strict_pair() -> Iterator[tuple[Backend, S3Server]]:
    with strict() as pair:
        yield pair


@pytest.fixture(scope="session")
def strict_backend(strict_pair: tuple[Backend, S3Server]) -> Backend:
    return strict_pair[0]


@pytest.fixture
def server(strict_pair: tuple[Backend, S3Server]) -> Iterator[S3Server]:
    """The strict server itself, its faults gone at the end."""
    yield strict_pair[1]
    strict_pair[1].faults.clear()


@pytest.fixture(scope="session")
def moto_backend() -> Iterator[Backend]:
    with moto() as backend:
        yield backend


@pytest.fixture(scope="session")
def rclone_backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with rclone(tmp_path_factory.mktemp("rclone")) as backend:
        yield backend


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.getfixturevalue(f"{request.param}_backend")
    return found


@pytest.fixture
def store(backend: Backend) -> ObjectStore:
    """A store with an empty bucket of its own."""
    bucket = f"bucket-{next(_numbers)}"
    backend.create(bucket)
    return backend.open(bucket)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", ["memory", "strict", "moto", "rclone"], indirect=True)
