"""What a review of the SQS source found, in virtual time: refusals, lost answers, calls that overtake others."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from botocore.exceptions import ClientError

from heeler.drain import Drain
from heeler.errors import UnavailableError, UsageError
from heeler.job import Ending, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.records.source import RecordedSource
from heeler.settings import Settings
from heeler.settling import Settling
from heeler.sources import SourceRequest
from heeler.sources.base import Lease, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.sources.sqs import SqsSource
from heeler.sources.sqs_calls import Address, Change, RefusedError, SqsCalls
from heeler.status import Status
from heeler.tasks import background
from tests.support.record_world import CrashingCalls, RecordWorld, take
from tests.support.sqs_model import TWELVE_HOURS, ModelCalls
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio
OK, BAD = Result(exit_code=0), Result(exit_code=1)
HANDLE = "AQEBsecret=="
GONE = LeaseLostError("ReceiptHandleIsInvalid")

Results = Callable[[Any, Sequence[Change]], Awaitable[list[Exception | None]]]


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
def world(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> RecordWorld:
    return RecordWorld(tmp_path, monkeypatch)


@asynccontextmanager
async def bare(world: RecordWorld, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[SqsSource]:
    """A worker of the world's queue that has no records."""
    monkeypatch.setattr("heeler.sources.sqs.SqsCalls", lambda address: ModelCalls(world.model, address, ""))
    settings = Settings(**{**world.settings, "records": None})
    source = SqsSource(SourceRequest("sqs", "w", tmp_path, settings=settings), clock=anyio.current_time)
    async with background(source.run):
        yield source


def keeper_of(lease: Lease) -> LeaseKeeper:
    return LeaseKeeper(lease, lambda *_: None, rng=random.Random(3), clock=anyio.current_time)


async def settled(lease: Lease, ending: Ending, keeper: LeaseKeeper | None = None) -> tuple[Ending, bool]:
    """As the forwarder settles it, with a keeper beside."""
    status = Status(lambda *_args, **_fields: None, worker="w", source="s")
    settling = Settling(Drain(30), status, random.Random(1), 1.0)
    if keeper is not None:
        return await settling.settle(lease, keeper, ending)
    keeper = keeper_of(lease)
    async with background(keeper.keep):
        return await settling.settle(lease, keeper, ending)


def only(world: RecordWorld) -> Any:
    (message,) = world.model.messages.values()
    return message


def hidden(world: RecordWorld) -> float:
    return float(only(world).visible_at - world.model.now())


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, *calls: Results) -> None:
    """The next such calls of workers that begin from now on are these; those after them are as ever."""
    real, left = getattr(CrashingCalls, name), [*calls]

    async def call(self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        made = left.pop(0) if left else real
        return list(await made(self, changes))

    monkeypatch.setattr(CrashingCalls, name, call)


def unanswered(name: str, seconds: float = 5.0) -> Results:
    """It is done, and the answer is lost."""
    real = getattr(CrashingCalls, name)

    async def call(self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        await real(self, changes)
        await anyio.sleep(seconds)
        raise SourceUnavailableError("no answer")

    return call


def refused(error: Exception) -> Results:
    async def call(_self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        await anyio.sleep(0.01)
        return [error] * len(changes)

    return call


# The dead-letter queue.


@pytest.mark.parametrize(
    "code",
    ["AccessDenied", "AWS.SimpleQueueService.NonExistentQueue", "KMS.DisabledException", "InvalidParameterValue"],
)
async def test_a_dead_letter_queue_that_refuses_us_does_not_hold_the_lane(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    async def send(_self: Any, _url: str, **_message: Any) -> None:
        await anyio.sleep(0.01)
        raise RefusedError("send_message", code, "no")

    world.submit(max_failures=1)
    async with world.worker() as source:
        lease = await take(source)
        start = anyio.current_time()
        with monkeypatch.context() as patch:
            patch.setattr(CrashingCalls, "send", send)
            with anyio.fail_after(60):
                _, told = await settled(lease, Ending(Outcome.RETRY, "bad", BAD))
        assert told
        assert anyio.current_time() - start < 5
        assert hidden(world) > TWELVE_HOURS - 100
        faults = dict(world.faults)
        assert "sqs:SendMessage" in str(faults["dead_letter_refused"]["error"])
        assert "bad" in str(faults["job_kept"]["error"])
        assert (await world.record()).state == "failed"
        assert await source.receive(wait=TWELVE_HOURS) is None, "it comes again, and is tried again"
    assert [letter["by"] for letter in world.model.dead] == ["http://queue/dead"]
    assert world.model.messages == {}


@pytest.mark.parametrize("code", ["ThrottlingException", "KmsThrottled", "503", "InternalError"])
async def test_a_refusal_that_passes_is_waited_for(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    real, left = CrashingCalls.send, [code] * 3

    async def send(self: Any, url: str, **message: Any) -> None:
        if left:
            raise RefusedError("send_message", left.pop(), "")
        await real(self, url, **message)

    monkeypatch.setattr(CrashingCalls, "send", send)
    world.submit(max_failures=1)
    async with world.worker() as source:
        assert (await settled(await take(source), Ending(Outcome.RETRY, "bad", BAD)))[1]
    assert len(world.model.dead) == 1
    assert "dead_letter_refused" not in world.told()


@pytest.mark.parametrize(("code", "passes"), [("NonExistentQueue", False), ("AccessDenied", False), ("500", True)])
async def test_a_policy_whose_dead_letter_queue_is_unknown_does_not_keep_jobs_from_us(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, code: str, passes: bool
) -> None:
    async def url_of(_self: Any, _arn: str) -> str:
        raise RefusedError("get_queue_url", f"AWS.SimpleQueueService.{code}", "")

    monkeypatch.setattr(CrashingCalls, "url_of", url_of)
    world.model.receives = 3
    del world.settings["sqs_dlq_url"]
    world.submit()
    async with world.worker() as source:
        if passes:
            with pytest.raises(SourceUnavailableError, match="get_queue_url"):
                await source.receive(wait=5.0)
            return
        lease = await take(source)
        assert lease.spends_tries
        assert "SQS_DLQ_URL" in str(dict(world.faults)["dead_letter_queue_unknown"]["error"])
        await lease.fail("bad", result=BAD)
    assert hidden(world) > TWELVE_HOURS - 100
    assert world.told()[-1] == "job_kept"


# The start.


@asynccontextmanager
async def answering(
    world: RecordWorld, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, *errors: Exception
) -> AsyncIterator[SqsSource]:
    """A source whose queue answers so at first, the last of them for ever."""
    left = [*errors]

    async def attributes(_self: Any, *_names: str) -> dict[str, str]:
        await anyio.sleep(0.01)
        error = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(error, SourceUnavailableError):
            raise error
        return {}

    monkeypatch.setattr(ModelCalls, "attributes", attributes)
    async with bare(world, tmp_path, monkeypatch) as source:
        yield source


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("AWS.SimpleQueueService.NonExistentQueue", "check SQS_QUEUE_URL"),
        ("InvalidClientTokenId", "credentials"),
        ("SignatureDoesNotMatch", "credentials"),
    ],
)
async def test_a_queue_that_is_not_there_or_refuses_us_is_told_at_the_start(
    world: RecordWorld, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, code: str, words: str
) -> None:
    refusal = RefusedError("get_queue_attributes", code, "")
    async with answering(world, tmp_path, monkeypatch, refusal) as source:
        with anyio.fail_after(1), pytest.raises(UsageError, match=words):
            await source.check(60.0)


async def test_a_queue_out_of_reach_is_waited_for_as_long_as_was_said(
    world: RecordWorld, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = SourceUnavailableError("out of reach")
    async with answering(world, tmp_path, monkeypatch, away) as source:
        start = anyio.current_time()
        with pytest.raises(UnavailableError):
            await source.check(60.0)
        assert 30 < anyio.current_time() - start <= 60
    async with answering(world, tmp_path, monkeypatch, *[away] * 5, ValueError()) as source:
        await source.check(60.0)


async def test_who_may_receive_and_not_ask_may_start(
    world: RecordWorld, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = RefusedError("get_queue_attributes", "AccessDenied", "")
    async with answering(world, tmp_path, monkeypatch, refusal) as source:
        await source.check(60.0)


# Lapsed messages.


async def test_without_records_nothing_is_received_to_look_for_a_lapsed_message(
    world: RecordWorld, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each receive of another message would count as a failure of it."""
    async with bare(world, tmp_path, monkeypatch) as source:
        own = world.submit("own")
        lease = await source.receive(wait=5.0)
        assert lease is not None
        for number in range(20):
            world.submit(f"other-{number}")
        world.model.messages[own].visible_at += 3000  # another worker has it
        await anyio.sleep(100)
        keeper = keeper_of(lease)
        async with background(keeper.keep):
            await anyio.sleep(200)
        assert keeper.state is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await lease.complete(OK)
    assert [message.receives for message in world.model.messages.values()] == [1] + [0] * 20


async def receiving(source: RecordedSource, got: list[Lease]) -> None:
    """An idle lane."""
    while not got:
        try:
            lease = await source.receive(wait=20)
        except SourceUnavailableError:
            await anyio.sleep(3)
        else:
            got += [lease] if lease is not None else []


async def test_a_lapsed_message_that_our_own_idle_lane_receives_is_its_holders(world: RecordWorld) -> None:
    world.submit()
    got: list[Lease] = []
    async with world.worker() as source:
        lease = await take(source)
        keeper = keeper_of(lease)
        async with background(keeper.keep, lambda: receiving(source, got)):
            world.model.unreachable.add("")
            await anyio.sleep(100)
            assert not keeper.confirmed
            world.model.unreachable.clear()
            await anyio.sleep(200)
            assert keeper.confirmed
            keeper.rest()
        assert got == []
        await lease.complete(OK)
    assert world.model.messages == {}
    record = await world.record()
    assert (record.attempts, record.interruptions, record.state) == (1, 0, "done")


async def test_a_lapsed_message_that_nobody_keeps_any_more_goes_to_a_lane(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)  # and its lane is gone
        again = await take(source, 100.0)
        assert again.attempt == 2
        assert await lease.extend() is LeaseState.LOST


@pytest.mark.parametrize("lost", [False, True])
async def test_the_answer_to_an_old_handle_says_nothing_of_the_new_one(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, lost: bool
) -> None:
    async def late(_self: Any, _changes: Sequence[Change]) -> list[Exception | None]:
        await anyio.sleep(8.0)
        return [GONE if lost else None]

    replaced(monkeypatch, "hide", late)
    world.submit()
    got: list[Lease] = []
    async with world.worker() as source:
        lease = await take(source)
        await anyio.sleep(55)
        async with background(lambda: receiving(source, got)):
            assert await lease.extend() is LeaseState.HELD  # answered three seconds after the lapse
            assert world.model.counts["receive"] > 1
            await anyio.sleep(55)
            assert await lease.extend() is LeaseState.HELD
        assert got == []
        await lease.complete(OK)
    assert world.model.messages == {}


async def test_lanes_that_lapsed_together_find_each_others_messages(world: RecordWorld) -> None:
    for number in range(4):
        world.submit(f"job-{number}")
    async with world.worker() as source:
        leases = [await take(source) for _ in range(4)]
        keepers = [keeper_of(lease) for lease in leases]
        async with background(*[keeper.keep for keeper in keepers]):
            world.model.unreachable.add("")
            await anyio.sleep(100)
            world.model.unreachable.clear()
            await anyio.sleep(200)
            assert [keeper.confirmed for keeper in keepers] == [True] * 4
            for keeper in keepers:
                keeper.rest()
        for lease in leases:
            await lease.complete(OK)
    assert world.model.messages == {}


async def test_near_the_twelve_hours_a_slow_line_is_not_refused(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        await anyio.sleep(4.0)
        return list(await real_hide(self, changes))

    async def receive(self: Any, *args: int) -> list[dict[str, Any]]:
        found = await real_receive(self, *args)
        await anyio.sleep(4.0)
        return list(found)

    real_hide, real_receive = CrashingCalls.hide, CrashingCalls.receive
    monkeypatch.setattr(CrashingCalls, "hide", slow)
    monkeypatch.setattr(CrashingCalls, "receive", receive)
    del world.settings["sqs_dlq_url"]
    world.submit()
    async with world.worker() as source:
        await (await take(source)).fail("bad", result=BAD)
    assert world.model.refused == []
    assert hidden(world) > TWELVE_HOURS - 100


# Answers that are lost.


@pytest.mark.parametrize("found_by", ["extension", "second deletion"])
async def test_a_deletion_whose_answer_was_lost_is_no_loss(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, found_by: str
) -> None:
    replaced(monkeypatch, "delete", unanswered("delete"), refused(GONE))
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        with pytest.raises(SourceUnavailableError):
            await lease.complete(OK)
        if found_by == "extension":
            for _ in range(3):
                assert await lease.extend() is LeaseState.HELD
                await anyio.sleep(30)
        await lease.complete(OK)
        await lease.complete(OK)
    assert world.model.messages == {}


async def test_a_deletion_without_an_answer_is_settled_as_done(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, "delete", *[unanswered("delete", 10.0)] * 3, refused(GONE))
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        keeper = keeper_of(lease)
        async with background(keeper.keep):
            await anyio.sleep(14)  # it extends while the deletion is under way
            ending, told = await settled(lease, Ending(Outcome.DONE, "", OK), keeper)
    assert (ending.outcome, told) == (Outcome.DONE, True)


@pytest.mark.parametrize("how", ["deletion", "extension"])
async def test_an_invalid_handle_is_a_loss_if_nothing_was_settled(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    replaced(monkeypatch, "hide" if how == "extension" else "delete", refused(GONE))
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        if how == "extension":
            assert await lease.extend() is LeaseState.LOST
        with pytest.raises(LeaseLostError):
            await lease.complete(OK)
        assert await lease.extend() is LeaseState.LOST


async def test_a_deletion_that_was_refused_for_good_did_nothing(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, "delete", refused(RefusedError("delete", "AccessDenied", "")))
    replaced(monkeypatch, "hide", refused(GONE))
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        with pytest.raises(SourceUnavailableError):
            await lease.complete(OK)
        assert await lease.extend() is LeaseState.LOST


# Extensions beside settlements.


@pytest.mark.parametrize("delay", [0.0, 0.0005, 0.002, 0.0055, 0.05])
async def test_an_extension_beside_a_release_does_not_undo_it(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, delay: float
) -> None:
    async def late(self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        await anyio.sleep(0.02)
        return list(await real(self, changes))

    real = CrashingCalls.hide
    replaced(monkeypatch, "hide", late)
    world.submit()
    states: list[LeaseState] = []
    async with world.worker() as source:
        lease = await take(source)

        async def extend() -> None:
            await anyio.sleep(delay)
            states.append(await lease.extend())

        async with anyio.create_task_group() as group:
            group.start_soon(extend)
            await anyio.sleep(0.001)
            await lease.release("told to stop")
    assert hidden(world) <= 0
    assert states == [LeaseState.HELD if delay < 0.02 else LeaseState.LOST]


async def test_a_release_waits_for_an_extension_that_is_under_way(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another connection it might overtake it."""

    async def late(self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        await anyio.sleep(0.3)
        return list(await real(self, changes))

    real = CrashingCalls.hide
    replaced(monkeypatch, "hide", late)
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        async with background(lease.extend):
            await anyio.sleep(0.25)  # sent after 0.2
            await lease.retry("bad", result=BAD, delay=20.0)
            await anyio.sleep(1.0)
            assert hidden(world) <= 20


async def test_a_release_does_not_wait_for_long(world: RecordWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(_self: Any, changes: Sequence[Change]) -> list[Exception | None]:
        await anyio.sleep(10.0)
        raise SourceUnavailableError("no answer")

    replaced(monkeypatch, "hide", never)
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        with anyio.move_on_after(0.5):
            await lease.extend()
        with anyio.fail_after(0.7):
            await lease.release("told to stop")
        assert hidden(world) <= 0


async def test_after_a_release_without_an_answer_nothing_is_extended(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced(monkeypatch, "hide", unanswered("hide"))
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        with pytest.raises(SourceUnavailableError):
            await lease.retry("bad", result=BAD, delay=20.0)
        calls = world.model.counts["hide"]
        assert await lease.extend() is LeaseState.HELD
        assert world.model.counts["hide"] == calls
        assert hidden(world) <= 20
        await lease.retry("bad", result=BAD, delay=20.0)


# Handles are secret.


def client_error(words: str, code: str = "InvalidParameterValue") -> ClientError:
    return ClientError({"Error": {"Code": code, "Message": words}}, "x")


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("InvalidParameterValue", f"Value {HANDLE} for parameter ReceiptHandle is invalid. Reason: it does not exist."),
        ("ReceiptHandleIsInvalid", f'The input receipt handle "{HANDLE}" is not a valid receipt handle.'),
    ],
)
async def test_a_handle_is_in_no_words_of_ours(whole: bool, code: str, words: str) -> None:
    async def answer(**_parameters: Any) -> dict[str, Any]:
        if whole:
            raise client_error(words, code)
        return {"Failed": [{"Id": "0", "Code": code, "Message": words}]}

    calls = SqsCalls(Address("http://queue/jobs", "x"))
    calls._client = SimpleNamespace(change_message_visibility_batch=answer, delete_message_batch=answer)
    for error in (*await calls.hide([Change(HANDLE, 0)]), *await calls.delete([Change(HANDLE)])):
        assert isinstance(error, LeaseLostError)
        assert HANDLE not in repr(error)
        assert code in str(error)


async def test_other_words_of_sqs_are_kept() -> None:
    async def answer(**_parameters: Any) -> dict[str, Any]:
        raise client_error("The group is missing")

    calls = SqsCalls(Address("http://queue/jobs", "x"))
    calls._client = SimpleNamespace(send_message=answer)
    with pytest.raises(RefusedError, match="The group is missing"):
        await calls.send("http://queue/dead")
