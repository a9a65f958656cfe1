"""The loop that tests of waits stand on."""

from __future__ import annotations

import threading
import time

import anyio
import anyio.to_thread
import pytest

from tests.support.virtual_time import VIRTUAL, StuckError, VirtualTimeLoop, run_virtual


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.mark.anyio
async def test_an_hour_passes_at_once_and_in_order() -> None:
    began, start = time.monotonic(), anyio.current_time()
    woken: list[tuple[str, float]] = []

    async def sleeper(name: str, seconds: float) -> None:
        await anyio.sleep(seconds)
        woken.append((name, round(anyio.current_time() - start, 3)))

    async with anyio.create_task_group() as group:
        group.start_soon(sleeper, "late", 3600.0)
        group.start_soon(sleeper, "early", 0.25)
    assert woken == [("early", 0.25), ("late", 3600.0)]
    assert time.monotonic() - began < 5


@pytest.mark.anyio
async def test_a_deadline_passes_in_virtual_time() -> None:
    with anyio.move_on_after(60) as scope:
        await anyio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.anyio
async def test_time_does_not_jump_while_a_thread_works() -> None:
    go = threading.Event()
    start = anyio.current_time()
    order = []

    async def in_thread() -> None:
        await anyio.to_thread.run_sync(go.wait, 5)
        order.append("thread")
        assert anyio.current_time() - start < 1

    async def sleeper() -> None:
        await anyio.sleep(1000)
        order.append("timer")

    async with anyio.create_task_group() as group:
        group.start_soon(in_thread)
        group.start_soon(sleeper)
        await anyio.lowlevel.checkpoint()
        threading.Timer(0.05, go.set).start()
    assert order == ["thread", "timer"]


def test_runaway_time_is_an_error() -> None:
    async def forever() -> None:
        for _ in range(1000):
            await anyio.sleep(3600)

    with pytest.raises(StuckError):
        anyio.run(forever, backend_options={"loop_factory": lambda: VirtualTimeLoop(seconds=86_400)})


def test_a_result_comes_back() -> None:
    async def add(left: int, right: int) -> int:
        await anyio.sleep(1)
        return left + right

    assert run_virtual(add, 2, 3) == 5
