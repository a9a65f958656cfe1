"""What an instance would cost to delete, from moment to moment."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import anyio
import pytest

from heeler.platform.deletion import BEAT, FINAL_UPLOAD, DeletionCost
from heeler.platform.imds import Imds
from heeler.sources.base import SourceUnavailableError
from heeler.status import Phase, Status
from heeler.tasks import background
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Machine:
    """Takes costs, with the second at which each came."""

    def __init__(self) -> None:
        self.begun = anyio.current_time()
        self.costs: list[tuple[int, int]] = []
        self.calls = 0
        self.broken = False
        self.slow = 0.0

    async def set_deletion_cost(self, cost: int) -> None:
        self.calls += 1
        await anyio.sleep(self.slow)
        if self.broken:
            raise SourceUnavailableError("out of reach")
        self.costs.append((round(anyio.current_time() - self.begun), cost))


@asynccontextmanager
async def following() -> AsyncIterator[tuple[Machine, Status]]:
    machine = Machine()
    status = Status(lambda *_: None, worker="w", source="s")
    async with background(DeletionCost(cast(Imds, machine), status).run):
        await anyio.sleep(10)
        yield machine, status
    assert status.on_change == []


async def test_idle_is_told_once_at_the_start() -> None:
    async with following() as (machine, status):
        status.enter(Phase.RECEIVE)
        await anyio.sleep(10_000)
    assert machine.costs == [(0, 0)]


async def test_a_job_from_its_lease_to_its_end() -> None:
    async with following() as (machine, status):
        status.enter(Phase.RECEIVE)
        status.take("job", 1)
        status.enter(Phase.RESTORE)
        await anyio.sleep(BEAT + 5)
        status.enter(Phase.RUN)
        await anyio.sleep(2 * BEAT)
        status.enter(Phase.UPLOAD)
        await anyio.sleep(1000)
        status.enter(Phase.SETTLE)
        await anyio.sleep(5)
        status.drop()
        status.enter(Phase.RECEIVE)
        await anyio.sleep(1000)
        status.enter(Phase.END)
        await anyio.sleep(1000)
    assert machine.costs == [(0, 0), (10, 1), (40, 2), (70, 3), (100, 4), (105, FINAL_UPLOAD), (1110, 0)]


@pytest.mark.parametrize("attempt", [1, 2])
async def test_the_next_job_begins_again_though_nothing_was_told_between(attempt: int) -> None:
    async with following() as (machine, status):
        status.take("job", 1)
        status.enter(Phase.RUN)
        await anyio.sleep(BEAT * 2)
        status.drop()
        status.take("job" if attempt == 2 else "other", attempt)
        status.enter(Phase.RUN)
        await anyio.sleep(BEAT + 5)
    assert machine.costs == [(0, 0), (10, 1), (40, 2), (70, 1), (100, 2)]


async def test_of_two_jobs_the_longest_counts_when_the_other_ends() -> None:
    """As with overlap: the outputs of one upload while the next runs."""
    async with following() as (machine, status):
        with status.lane():
            status.take("long", 1)
            status.enter(Phase.RUN)
            await anyio.sleep(10 * BEAT + 5)
            async with anyio.create_task_group() as group:
                group.start_soon(_short_job, status)
            await anyio.sleep(1)
            assert machine.costs[-1] == (10 + 12 * int(BEAT) + 5, 13)
            status.drop()
        await anyio.sleep(2)
        assert machine.costs[-1][1] == 0


async def _short_job(status: Status) -> None:
    with status.lane():
        status.take("short", 1)
        status.enter(Phase.RUN)
        await anyio.sleep(BEAT)
        status.enter(Phase.UPLOAD)
        await anyio.sleep(BEAT)
        status.drop()


async def test_the_first_of_two_ends_and_the_second_keeps_its_own_beginning() -> None:
    async with following() as (machine, status):
        status.take("first", 1)
        status.enter(Phase.RUN)
        await anyio.sleep(2 * BEAT)
        with status.lane():
            status.take("second", 1)
            status.enter(Phase.RUN)
            await anyio.sleep(BEAT * 4 + 5)
            first = status.lanes[0]
            first.job_id, first.phase = None, Phase.RECEIVE
            status.enter(Phase.RUN)
            await anyio.sleep(2)
            assert machine.costs[-1][1] == 5
            status.drop()


async def test_a_job_of_ten_years_stays_below_a_final_upload() -> None:
    async with following() as (machine, status):
        deletion = DeletionCost(cast(Imds, machine), status)
        status.take("job", 1)
        status.on_change.append(deletion._note)
        deletion._note()
        deletion._since["job", 1] -= 1e15
        assert deletion._cost() == FINAL_UPLOAD - 1
        status.on_change.remove(deletion._note)


async def test_short_jobs_are_not_all_told() -> None:
    async with following() as (machine, status):
        for number in range(1000):
            status.take(f"job-{number}", 1)
            for phase in (Phase.RESTORE, Phase.RUN, Phase.UPLOAD, Phase.SETTLE):
                status.enter(phase)
                await anyio.sleep(0.001)
            status.drop()
            status.enter(Phase.RECEIVE)
        await anyio.sleep(5)
    assert machine.calls <= 8
    assert machine.costs[-1][1] == 0


async def test_a_slow_service_is_told_the_newest() -> None:
    async with following() as (machine, status):
        machine.slow = 20
        status.take("job", 1)
        await anyio.sleep(1)
        for phase in (Phase.RUN, Phase.UPLOAD, Phase.SETTLE):
            status.enter(phase)
            await anyio.sleep(1)
        status.drop()
        await anyio.sleep(100)
    assert machine.costs == [(0, 0), (30, 1), (51, 0)]


async def test_out_of_reach_is_one_fault_and_tried_again() -> None:
    async with following() as (machine, status):
        for _ in range(2):
            machine.broken = True
            status.take("job", 1)
            status.enter(Phase.RUN)
            await anyio.sleep(10 * BEAT)
            machine.broken = False
            await anyio.sleep(BEAT + 5)
            status.drop()
            await anyio.sleep(5)
    assert status.events["deletion_cost_failed"] == 2
    assert 15 <= machine.calls <= 40
    assert [cost for _, cost in machine.costs if cost != 11] == [0, 12, 0, 12, 0]


async def test_a_change_is_told_at_once_after_a_failure() -> None:
    async with following() as (machine, status):
        machine.broken = True
        status.take("job", 1)
        await anyio.sleep(5)
        machine.broken = False
        status.enter(Phase.UPLOAD)
        await anyio.sleep(5)
    assert machine.costs == [(0, 0), (15, FINAL_UPLOAD)]
