"""When a machine has failed often enough, and how it is left."""

from __future__ import annotations

import math
from typing import cast

import anyio
import pytest

from heeler.drain import Drain
from heeler.errors import UnavailableError
from heeler.job import Ending, Outcome
from heeler.platform.failures import FailuresInARow
from heeler.platform.imds import Imds, InstanceGoneError
from heeler.platform.moving import leave_machine, leave_unfit
from heeler.sources.base import SourceUnavailableError
from heeler.status import Status
from heeler.tasks import background
from tests.support.virtual_time import VIRTUAL

BAD = {"r": Outcome.RETRY, "f": Outcome.FAIL}
OTHER = {"d": Outcome.DONE, "i": Outcome.RELEASE, "l": Outcome.LOST, "c": Outcome.CANCELLED}


def ends(letters: str) -> list[Ending]:
    return [Ending((BAD | OTHER)[letter], f"reason {number}") for number, letter in enumerate(letters)]


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.mark.parametrize(
    ("letters", "limit", "enough"),
    [
        ("", 1, False),
        ("d", 1, False),
        ("r", 1, True),
        ("f", 1, True),
        ("rr", 3, False),
        ("rfr", 3, True),
        ("rrdr", 3, False),
        ("rrdrrr", 3, True),
        ("riliclrc", 3, False),
        ("riliclrcr", 3, True),
        ("iiiilllccc", 1, False),
        ("rrrrrrrr", None, False),
    ],
)
def test_when_it_is_enough(letters: str, limit: int | None, enough: bool) -> None:
    failures = FailuresInARow(limit)
    foreseen = False
    for ending in ends(letters):
        assert failures.reason is None
        foreseen = failures.enough_with(ending)
        failures.settled(ending)
    assert (failures.reason is not None) is foreseen is enough


def test_the_reason_names_the_number_and_the_last_failure() -> None:
    failures = FailuresInARow(2)
    for ending in ends("rir"):
        failures.settled(ending)
    assert failures.reason == "2 failures in a row on this machine; the last: reason 2"


class Machine:
    """Refuses the first moves, and takes the others."""

    def __init__(self, *refusals: SourceUnavailableError) -> None:
        self.refusals = list(refusals)
        self.asked: list[tuple[int, str]] = []
        self.begun = anyio.current_time()

    async def reallocate(self, reason: str) -> None:
        self.asked.append((round(anyio.current_time() - self.begun), reason))
        if self.refusals:
            raise self.refusals.pop(0)


@pytest.mark.anyio
async def test_a_machine_is_left_once_and_then_only_waited_for() -> None:
    machine, drain, status = Machine(), Drain(30), Status(lambda *_: None, worker="w", source="s")

    async def stop() -> None:
        await anyio.sleep(100)
        drain.begin("SIGTERM")

    async with background(stop):
        await leave_machine(cast(Imds, machine), "too slow", drain, status)
    assert anyio.current_time() - machine.begun == pytest.approx(100)
    assert machine.asked == [(0, "too slow")]
    assert status.events["reallocation_asked"] == 1


@pytest.mark.anyio
async def test_a_move_that_is_refused_or_never_happens_is_asked_for_again() -> None:
    refusals = [SourceUnavailableError("500")] * 9
    machine, drain, status = Machine(*refusals), Drain(30), Status(lambda *_: None, worker="w", source="s")
    with anyio.move_on_after(2000):
        await leave_machine(cast(Imds, machine), "too slow", drain, status)
    assert [second for second, _ in machine.asked] == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243, 843, 1443]
    assert status.events["reallocation_failed"] == 9


@pytest.mark.anyio
async def test_an_unfit_machine_is_left_or_ends_us() -> None:
    machine, drain, status = Machine(), Drain(30), Status(lambda *_: None, worker="w", source="s")
    with anyio.move_on_after(5) as scope:
        await leave_unfit(cast(Imds, machine), "slow; small", drain, status)
    assert scope.cancelled_caught
    assert machine.asked == [(0, "slow; small")]
    with pytest.raises(UnavailableError, match="this machine is unfit: slow; small") as caught:
        await leave_unfit(None, "slow; small", drain, status)
    assert caught.value.exit_code == 69
    assert status.events["machine_unfit"] == 2


@pytest.mark.anyio
async def test_an_instance_that_is_gone_is_left_at_once() -> None:
    drain, status = Drain(math.inf), Status(lambda *_: None, worker="w", source="s")

    class Gone(Machine):
        async def reallocate(self, reason: str) -> None:
            drain.begin("gone")
            raise InstanceGoneError("gone")

    with anyio.fail_after(1):
        await leave_machine(cast(Imds, Gone()), "too slow", drain, status)
