"""Single calls become batches: what is sent when, with what, and who has which answer; in virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import anyio
import pytest

from heeler.sources.base import LeaseLostError, SourceUnavailableError
from heeler.sources.sqs_batch import Batcher, enough
from heeler.sources.sqs_calls import ENTRIES, Change
from heeler.tasks import background
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

WINDOW = 0.005


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Sqs:
    """Answers each batch after `seconds`; notes the milliseconds at which batches came, and their handles."""

    def __init__(self, seconds: float = 0.01, **errors: Exception) -> None:
        self.batches: list[tuple[int, list[str]]] = []
        self.failure: SourceUnavailableError | None = None
        self._seconds = seconds
        self._errors = errors
        self._start = anyio.current_time()

    def now(self) -> int:
        return round((anyio.current_time() - self._start) * 1000)

    def sizes(self) -> list[int]:
        return [len(handles) for _, handles in self.batches]

    async def send(self, changes: Sequence[Change]) -> list[Exception | None]:
        self.batches.append((self.now(), [change.handle for change in changes]))
        await anyio.sleep(self._seconds)
        if self.failure is not None:
            raise self.failure
        return [self._errors.get(change.handle) for change in changes]


async def settle(batcher: Batcher, pauses: Sequence[float], within: float = WINDOW) -> None:
    """Entries a, b, ... each so many seconds after the one before."""
    async with anyio.create_task_group() as group:
        for number, pause in enumerate(pauses):
            if pause:
                await anyio.sleep(pause)
            group.start_soon(partial(batcher.call, Change("abcdefghijklmnop"[number]), within=within))


@pytest.mark.parametrize(
    ("lanes", "wanted"), [(1, 1), (2, 1), (3, 2), (8, 4), (9, 5), (20, ENTRIES), (500, ENTRIES), (0, 1)]
)
def test_half_of_the_lanes_are_worth_a_call_but_no_more_than_one_call_takes(lanes: int, wanted: int) -> None:
    assert enough(lanes) == wanted


async def test_a_single_lane_waits_for_nobody() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send, enough(1))
    async with background(batcher.run):
        for _ in range(3):
            await batcher.call(Change("a"), within=WINDOW)
    assert [at for at, _ in sqs.batches] == [0, 10, 20]


async def test_a_batch_goes_as_soon_as_half_of_the_lanes_have_joined() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send, enough(8))
    async with background(batcher.run):
        await settle(batcher, [0, 0.001, 0.001, 0.001])
    assert sqs.batches == [(3, ["a", "b", "c", "d"])]


async def test_a_batch_of_fewer_goes_once_its_first_entry_has_waited_long_enough() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send, enough(8))
    async with background(batcher.run):
        await settle(batcher, [0, 0.003, 0.003])
    assert sqs.batches == [(5, ["a", "b"]), (11, ["c"])]


async def test_a_batch_does_not_wait_for_the_answer_to_the_one_before() -> None:
    sqs = Sqs(seconds=1.0)
    batcher = Batcher(sqs.send, 2)
    async with background(batcher.run):
        await settle(batcher, [0, 0, 0.01, 0])
    assert sqs.batches == [(0, ["a", "b"]), (10, ["c", "d"])]


async def test_what_came_at_once_goes_in_one_batch_up_to_the_most_that_a_call_takes() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send, 2)
    async with anyio.create_task_group() as group:
        for number in range(14):
            group.start_soon(partial(batcher.call, Change(str(number)), within=WINDOW))
        await anyio.wait_all_tasks_blocked()
        async with background(batcher.run):
            await anyio.sleep(0.1)
    assert sqs.sizes() == [ENTRIES, 4]


async def test_without_a_number_of_lanes_a_batch_waits_until_it_is_full_or_due() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send)
    async with background(batcher.run):
        await settle(batcher, [0.0] * 8, within=0.2)
        await settle(batcher, [0.0] * 10, within=0.2)
    assert [(at, len(handles)) for at, handles in sqs.batches] == [(200, 8), (210, 10)]


async def test_one_that_is_in_a_hurry_takes_along_those_that_are_not() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send)
    async with background(batcher.run), anyio.create_task_group() as group:
        group.start_soon(partial(batcher.call, Change("a"), within=0.2))
        await anyio.sleep(0.02)
        group.start_soon(partial(batcher.call, Change("b"), within=WINDOW))
    assert sqs.batches == [(25, ["a", "b"])]


async def test_of_a_batch_each_entry_has_its_own_answer() -> None:
    sqs = Sqs(b=LeaseLostError("b"))
    batcher = Batcher(sqs.send, 2)
    async with background(batcher.run), anyio.create_task_group() as group:
        group.start_soon(partial(batcher.call, Change("a"), within=WINDOW))
        with pytest.raises(LeaseLostError):
            await batcher.call(Change("b"), within=WINDOW)
    assert sqs.sizes() == [2]


async def test_a_batch_that_fails_fails_for_all_of_it_and_for_no_other() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send, 1)
    async with background(batcher.run):
        sqs.failure = SourceUnavailableError("503")
        with pytest.raises(SourceUnavailableError, match="503"):
            await batcher.call(Change("a"), within=WINDOW)
        sqs.failure = None
        await batcher.call(Change("a"), within=WINDOW)


async def test_what_is_cancelled_before_it_is_sent_does_not_count() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send, 2)
    async with background(batcher.run):
        with anyio.move_on_after(0.001):
            await batcher.call(Change("a"), within=WINDOW)
        await batcher.call(Change("b"), within=WINDOW)
    assert sqs.batches == [(6, ["b"])]


async def test_a_newer_change_of_a_message_goes_instead_of_the_older_and_answers_for_both() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send)
    async with background(batcher.run), anyio.create_task_group() as group:
        group.start_soon(partial(batcher.call, Change("a", 60), within=0.2))
        await anyio.sleep(0.01)
        await batcher.call(Change("a", 0), within=WINDOW)
    assert sqs.batches == [(15, ["a"])]


async def test_at_the_end_whoever_waits_is_told_and_nothing_is_sent_any_more() -> None:
    sqs = Sqs()
    batcher = Batcher(sqs.send)
    told = []

    async def lane() -> None:
        with pytest.raises(SourceUnavailableError, match="ended"):
            await batcher.call(Change("a"), within=1.0)
        told.append("a")

    async with anyio.create_task_group() as group, background(batcher.run):
        group.start_soon(lane)
        await anyio.sleep(0.1)
    assert told == ["a"]
    with pytest.raises(SourceUnavailableError, match="ended"):
        await batcher.call(Change("b"), within=0)
    assert sqs.batches == []
