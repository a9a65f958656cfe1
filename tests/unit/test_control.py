"""The control API answers programs on this machine, by the address that it was given, come what may."""

from __future__ import annotations

import http.client
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from heeler.checkpoints import Checkpoints
from heeler.control.server import bind, serve
from heeler.drain import Drain
from heeler.status import Phase, Status


def ask(host: str, port: int, headers: dict[str, str], path: str = "/healthz") -> int:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def answers(address: str, state_dir: Path, *asked: dict[str, str]) -> tuple[list[int], dict[str, Any]]:
    """What a server says to requests with these headers, and its status."""

    async def run() -> list[int]:
        listener = bind(f"{address}:0")
        host, port = listener.getsockname()[:2]
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, listener, status, Drain(1), Checkpoints(), lambda: True, state_dir)
            with anyio.fail_after(20):
                found = [await anyio.to_thread.run_sync(ask, host, port, headers) for headers in asked]
            tasks.cancel_scope.cancel()
        return found

    status = Status(lambda *_: None, worker="w", source="s")
    return anyio.run(run), status.snapshot()


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.2", "[::1]"])
def test_it_answers_by_the_address_that_it_listens_on(address: str, tmp_path: Path) -> None:
    others: list[dict[str, str]] = [{"Host": "evil.example"}, {"Host": "127.0.0.3"}, {"Origin": "http://evil.example"}]
    found, _ = answers(address, tmp_path, {}, {"Host": "localhost"}, *others)
    assert found == [200, 200, 403, 403, 403]


def test_a_state_folder_that_can_not_be_written_is_a_fault_and_it_serves_all_the_same(tmp_path: Path) -> None:
    found, status = answers("127.0.0.1", tmp_path / "not-there", {})
    assert found == [200]
    assert [fault["event"] for fault in status["faults"]] == ["control_address_not_kept"]
    assert f"{tmp_path}/not-there/control" in status["faults"][0]["error"]


def test_it_is_ready_only_while_the_program_could_take_a_job(tmp_path: Path) -> None:
    async def run() -> list[int]:
        listener = bind("127.0.0.1:0")
        host, port = listener.getsockname()[:2]
        status = Status(lambda *_: None, worker="w", source="s")
        available = anyio.Event()
        found = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(serve, listener, status, Drain(1), Checkpoints(), available.is_set, tmp_path)
            with anyio.fail_after(20):
                status.enter(Phase.RECEIVE)
                found.append(await anyio.to_thread.run_sync(ask, host, port, {}, "/readyz"))
                available.set()
                found.append(await anyio.to_thread.run_sync(ask, host, port, {}, "/readyz"))
                status.enter(Phase.END)
                found.append(await anyio.to_thread.run_sync(ask, host, port, {}, "/readyz"))
            tasks.cancel_scope.cancel()
        return found

    assert anyio.run(run) == [503, 200, 503]
