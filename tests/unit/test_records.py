"""Records of jobs: what a message meets, who may write, what is counted, in virtual time on a modelled queue."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from heeler.job import Result
from heeler.records.arrival import Arrival, Step, judge
from heeler.records.desk import RecordDesk
from heeler.records.record import (
    HOLDER_SECONDS,
    AttemptRecord,
    DamagedRecordError,
    Record,
    decode_record,
    encode_record,
)
from heeler.records.store import ConflictError, RecordStore
from heeler.records.submission import Wish
from heeler.sources.base import LeaseLostError, LeaseState, SourceUnavailableError
from heeler.webhook import WebhookError
from heeler_sync.errors import AccessDeniedError, TransientStoreError
from heeler_sync.store.base import Condition, ObjectInfo, Sink
from heeler_sync.store.memory import MemoryStore
from heeler_sync.store.providers import PROVIDERS
from tests.support.record_world import PREFIX, RecordWorld, take
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

OK = Result(exit_code=0)
BAD = Result(exit_code=1)
URL = "https://example.com/hook"


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RecordWorld:
    return RecordWorld(tmp_path, monkeypatch)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TIMES = st.floats(0, 2e9)
ATTEMPTS = st.builds(
    AttemptRecord, st.integers(0, 99), TEXT, TIMES, st.none() | TIMES, st.sampled_from(["", "done", "retry"]), TEXT
)
RECORDS = st.builds(
    Record,
    id=TEXT,
    run_id=TEXT,
    state=st.sampled_from(["pending", "running", "done", "failed", "cancelled"]),
    created=TIMES,
    message_id=TEXT,
    attempts=st.integers(0, 99),
    failures=st.integers(0, 99),
    reason=TEXT,
    finished=st.none() | TIMES,
    result=st.none() | st.just({"exit_code": 1, "signal": None}),
    history=st.lists(ATTEMPTS, max_size=3).map(tuple),
)


@given(RECORDS)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    signed = record.signed()
    assert decode_record(encode_record(signed)) == record
    assert decode_record(encode_record(signed)).write == signed.write != record.signed().write


@given(st.binary(max_size=50) | RECORDS.map(encode_record).map(lambda data: data[: len(data) // 2]))
def test_what_is_no_record_is_said_to_be_none(data: bytes) -> None:
    with pytest.raises(DamagedRecordError):
        decode_record(data)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"state": "lost"},
        {"attempts": "1"},
        {"attempts": True},
        {"history": [{"attempt": 1}]},
        {"history": 3},
        {"unknown": 1},
        {"id": None},
    ],
)
def test_a_field_that_can_not_be_is_named(change: Mapping[str, object]) -> None:
    document = json.loads(encode_record(Record("a", "", "pending", 1.0))) | change
    with pytest.raises(DamagedRecordError, match="newer heeler" if "format" in change else "no record"):
        decode_record(json.dumps(document).encode())


NOW = 1e9
RUNNING = Record("a", "", "pending", NOW - 100).taken("w1", "m1", NOW - 50)


def arrival(message_id: str = "m1", run_id: str = "", created: float = NOW - 100) -> Arrival:
    return Arrival("a", run_id, message_id, "w2", NOW, created)


@pytest.mark.parametrize(
    ("record", "message", "step"),
    [
        (None, arrival(), Step.RUN),
        (Record("a", "", "pending", NOW - 100), arrival(), Step.RUN),
        (RUNNING, arrival(), Step.RUN),
        (RUNNING, arrival("m2"), Step.WAIT),
        (replace(RUNNING, heard=NOW - HOLDER_SECONDS - 1), arrival("m2"), Step.RUN),
        (RUNNING.done(NOW, None, "", ""), arrival(), Step.END),
        (RUNNING.done(NOW, None, "", ""), arrival("m2"), Step.END),
        (RUNNING.done(NOW, None, "", ""), arrival("m2", "other"), Step.RUN),
        (RUNNING.failed(NOW, "", None, "", ""), arrival(), Step.END),
        (RUNNING.failed(NOW - 9, "", None, "", ""), arrival("m2", created=NOW - 5), Step.RUN),
        (RUNNING.failed(NOW - 9, "", None, "", ""), arrival("m2", created=NOW - 20), Step.END),
        (RUNNING.cancelled(NOW), arrival(), Step.END),
        (RUNNING.cancelled(NOW), arrival("m2"), Step.END),
        (Record("a", "new", "pending", NOW - 10), arrival("m1", "old"), Step.WAIT),
        (Record("a", "old", "pending", NOW - 200), arrival("m1", "new"), Step.RUN),
        (Record("a", "new", "pending", NOW - 10).cancelled(NOW), arrival("m1", "old"), Step.DROP),
        (RUNNING.retried(NOW, ""), arrival("m2"), Step.RUN),
    ],
)
def test_what_a_message_meets(record: Record | None, message: Arrival, step: Step) -> None:
    found, after = judge(record, message)
    assert found is step
    if step is Step.RUN:
        assert (after.state, after.worker, after.message_id) == ("running", "w2", message.message_id)
        assert after.attempts == (record.attempts if record is not None else 0) + 1, "it orders the holders for good"
        assert after.run_id == message.run_id
    else:
        assert after == record


def test_a_job_that_was_sent_back_from_a_dead_letter_queue_starts_from_zero_failures() -> None:
    failed = replace(RUNNING.failed(NOW - 9, "bad", None, "", ""), failures=3, interruptions=2, digest="d")
    after = judge(failed, arrival("m2", created=NOW - 5))[1]
    assert after.digest == "d", "it is the same document"
    assert (after.failures, after.interruptions, after.fruitless, after.finished) == (0, 0, 0, None)
    assert after.attempts == 2


async def test_the_attempt_is_counted_before_the_job_is_given_out(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        record = await world.record()
        assert (record.state, record.attempts, record.worker, lease.attempt) == ("running", 1, "w1", 1)
        assert lease.attempts_ordered
        await lease.complete(OK)
    record = await world.record()
    assert (record.state, record.result, record.failures) == ("done", {"exit_code": 0, "signal": None}, 0)
    assert world.results() == {"a/1": b'{"exit_code": 0, "signal": null}\n'}
    assert record.history[0].outcome == "done"
    assert (record.history[0].ended or 0) >= record.history[0].started
    assert world.model.messages == {}


async def test_an_answer_is_kept_byte_for_byte_under_the_key_that_the_job_names(world: RecordWorld) -> None:
    world.submit(result_key="mine/{job_id}.bin")
    async with world.worker() as source:
        lease = await take(source)
        await lease.complete(Result(status=200, body=b"\0\xff answer"))
    assert world.store.objects()[f"{PREFIX}named/mine/a.bin"] == b"\0\xff answer"
    record = await world.record()
    assert record.result == {"status": 200, "bytes": 9}
    assert record.result_key == f"{PREFIX}named/mine/a.bin"


async def test_failures_and_interruptions_are_counted_apart(world: RecordWorld) -> None:
    world.submit(max_failures=2)
    async with world.worker() as source:
        for _ in range(5):
            await (await take(source)).release("told to stop")
        await (await take(source)).retry("exit code 1", result=BAD, delay=0.0)
        await (await take(source)).release("told to stop")
        record = await world.record()
        assert (record.state, record.attempts, record.failures, record.interruptions) == ("pending", 7, 1, 6)
        await (await take(source)).retry("exit code 2", result=BAD, delay=0.0)
    record = await world.record()
    assert (record.state, record.failures, record.reason) == ("failed", 2, "exit code 2")
    assert len(world.model.dead) == 1
    assert world.model.messages == {}


async def test_a_failure_that_the_queue_did_not_hear_of_is_counted_once(world: RecordWorld) -> None:
    world.submit(max_failures=3)
    async with world.worker() as source:
        for failures in (1, 2):
            lease = await take(source)
            world.model.unreachable.add("")
            for _ in range(4):
                with pytest.raises(SourceUnavailableError):
                    await lease.retry("exit code 1", result=BAD, delay=0.0)
            world.model.unreachable.clear()
            await lease.retry("exit code 1", result=BAD, delay=0.0)
            record = await world.record()
            assert (record.state, record.failures) == ("pending", failures)


async def test_an_interruption_that_the_queue_did_not_hear_of_is_counted_once(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        for interruptions in range(1, 10):
            lease = await take(source)
            world.model.unreachable.add("")
            with pytest.raises(SourceUnavailableError):
                await lease.release("machine", fruitless=True)
            world.model.unreachable.clear()
            await lease.release("machine", fruitless=True)
            record = await world.record()
            assert (record.state, record.interruptions, record.fruitless) == ("pending", interruptions, interruptions)


async def test_a_message_is_hidden_for_the_delay_of_its_failure(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        await (await take(source)).retry("429", result=BAD, delay=40.0)
        before = anyio.current_time()
        await take(source, wait=100.0)
        assert 39 <= anyio.current_time() - before <= 42


async def test_ten_interruptions_in_a_row_without_anything_durable_fail_the_job(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        for _ in range(9):
            await (await take(source)).release("machine", fruitless=True)
        lease = await take(source)
        await lease.extend(progressed=True)
        await lease.release("machine", fruitless=True)
        assert (await world.record()).fruitless == 0, "something was durable between"
        for _ in range(9):
            await (await take(source)).release("machine", fruitless=True)
        assert (await world.record()).state == "pending"
        await (await take(source)).release("machine", fruitless=True)
    record = await world.record()
    assert record.state == "failed"
    assert "in a row" in record.reason
    assert len(world.model.dead) == 1


async def test_progress_counts_although_its_worker_vanishes(world: RecordWorld) -> None:
    world.submit()
    for _ in range(12):
        async with world.worker() as source:
            lease = await take(source, wait=100.0)
            await lease.extend(progressed=True)
    record = await world.record()
    assert (record.interruptions, record.fruitless, record.state) == (11, 0, "running")


async def test_a_job_whose_workers_vanish_ten_times_in_a_row_is_not_run_again(world: RecordWorld) -> None:
    world.submit()
    for _ in range(10):
        async with world.worker() as source:
            await take(source, wait=100.0)
    async with world.worker() as source:
        assert await source.receive(wait=100.0) is None
    record = await world.record()
    assert record.state == "failed"
    assert "in a row" in record.reason
    assert len(world.model.dead) == 1


async def test_a_holder_that_was_overtaken_changes_nothing(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as first, world.worker() as second:
        old = await take(first)
        await anyio.sleep(61)  # without a heartbeat
        new = await take(second)
        before = world.store.objects()
        with pytest.raises(LeaseLostError):
            await old.complete(OK)
        with pytest.raises(LeaseLostError):
            await old.retry("x", result=BAD, delay=0.0)
        with pytest.raises(LeaseLostError):
            await old.fail("x", result=Result())
        with pytest.raises(LeaseLostError):
            await old.release("x")
        assert await old.extend() is LeaseState.LOST
        after = world.store.objects()
        assert after[f"{PREFIX}jobs/a.json"] == before[f"{PREFIX}jobs/a.json"]
        assert await new.extend() is LeaseState.HELD
        await new.complete(OK)
    record = await world.record()
    assert (record.state, record.worker, record.interruptions, record.attempts) == ("done", "w2", 1, 2)


@pytest.mark.parametrize("named", [None, "mine/{job_id}"])
async def test_a_holder_whose_record_another_has_written_stores_no_result(
    world: RecordWorld, named: str | None
) -> None:
    message = world.submit(result_key=named)
    async with world.worker() as source:
        old = await take(source)
        # At-least-once delivery: the handle stays good, and another has the message too.
        await world.change("a", lambda record: record.taken("w9", message, world.model.now()))
        await world.store.put(f"{PREFIX}named/mine/a", b"the other's")
        with pytest.raises(LeaseLostError):
            await old.complete(OK)
        assert await old.extend() is LeaseState.LOST
    assert world.store.objects()[f"{PREFIX}named/mine/a"] == b"the other's"
    record = await world.record()
    assert (record.worker, record.state, record.result_key) == ("w9", "running", "")


async def test_a_cancelled_job_is_heard_of_at_the_next_heartbeat_and_its_message_deleted(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await world.change("a", lambda record: record.cancelled(world.model.now()))
        assert await lease.extend() is LeaseState.CANCELLED
        await lease.withdraw()
    record = await world.record()
    assert (record.state, record.history[0].outcome) == ("cancelled", "cancelled")
    assert world.model.messages == {}
    assert world.model.dead == []


@pytest.mark.parametrize("webhook", [None, URL])
async def test_a_cancelled_jobs_message_is_deleted_though_the_bucket_is_slow_and_its_end_noted_late(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch, webhook: str | None
) -> None:
    world.submit(webhook=webhook)
    async with world.worker() as source:
        lease = await take(source)
        waiting = "" if webhook is None else "pending"
        await world.change("a", lambda record: record.cancelled(world.model.now(), waiting))
        assert await lease.extend() is LeaseState.CANCELLED
        put = world.store.put

        async def slow(key: str, data: bytes, **more: Any) -> str:
            await anyio.sleep(1.0)
            return await put(key, data, **more)

        monkeypatch.setattr(world.store, "put", slow)
        await lease.withdraw()
    assert world.model.messages == {}
    record = await world.record()
    assert (record.state, record.webhook) == ("cancelled", "" if webhook is None else "sent")
    assert [(entry.outcome, entry.ended is None) for entry in record.history] == [("cancelled", False)]
    assert len(world.webhooks.sent) == (webhook is not None)


async def test_a_cancelled_jobs_message_is_deleted_though_the_bucket_refuses(
    world: RecordWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await world.change("a", lambda record: record.cancelled(world.model.now()))
        assert await lease.extend() is LeaseState.CANCELLED

        async def refused(key: str, data: bytes, **more: Any) -> str:
            del data, more
            raise AccessDeniedError("PutObject", "bucket", key, "denied")

        monkeypatch.setattr(world.store, "put", refused)
        await lease.withdraw()
    assert world.model.messages == {}
    assert "record_not_written" in world.told()


async def test_a_job_cancelled_in_the_moment_of_its_end_stays_cancelled(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await world.change("a", lambda record: record.cancelled(world.model.now()))
        with pytest.raises(LeaseLostError, match="cancelled"):
            await lease.complete(OK)
        await anyio.sleep(61)
        assert await source.receive(wait=5.0) is None
    assert world.model.messages == {}
    assert (await world.record()).state == "cancelled"


async def test_a_cancelled_job_that_nobody_has_is_deleted_unseen(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        await (await take(source)).release("told to stop")
        await world.change("a", lambda record: record.cancelled(world.model.now()))
        assert await source.receive(wait=5.0) is None
    assert world.model.messages == {}


async def test_two_messages_of_one_job_are_not_worked_on_side_by_side(world: RecordWorld) -> None:
    world.submit()
    world.submit()
    async with world.worker() as first, world.worker() as second:
        lease = await take(first)
        assert await second.receive(wait=5.0) is None
        assert "job_has_a_holder" in world.told()
        await lease.complete(OK)
        await anyio.sleep(3700)
        assert await second.receive(wait=5.0) is None
    assert world.model.messages == {}
    assert (await world.record()).attempts == 1


async def test_a_holder_shows_now_and_then_that_it_lives(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        began = (await world.record()).heard
        for _ in range(40):
            await anyio.sleep(20)
            assert await lease.extend() is LeaseState.HELD
        writes = (await world.record()).heard - began
        assert 500 <= writes <= 800


class Sick(MemoryStore):
    """Fails as it is told to."""

    def __init__(self, inner: MemoryStore) -> None:
        super().__init__()
        self._objects = inner._objects
        self.reads: list[Exception] = []
        self.writes: list[tuple[Exception, bool]] = []

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        if self.reads:
            raise self.reads.pop(0)
        return await super().download(key, sink, offset=offset, if_match=if_match)

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        error, took_effect = self.writes.pop(0) if self.writes else (None, True)
        etag = await super().put(key, data, metadata=metadata, condition=condition) if took_effect else ""
        if error is not None:
            raise error
        return etag


def down(key: str = "k") -> TransientStoreError:
    return TransientStoreError("PutObject", "b", key, "503")


async def test_a_heartbeat_holds_while_the_bucket_is_out_of_reach(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        lease._context = replace(lease._context, records=RecordStore(lambda: sick, PREFIX))  # type: ignore[attr-defined]
        sick = Sick(world.store)
        sick.reads = [down()] * 99
        assert await lease.extend() is LeaseState.HELD
        sick.writes = [(down(), False)] * 99
        with pytest.raises(SourceUnavailableError):
            await lease.complete(OK)
        sick.reads, sick.writes = [], []
        await lease.complete(OK)
    assert (await world.record()).state == "done"


async def test_while_the_bucket_is_out_of_reach_no_message_is_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each receive may be one of few: the whole queue would go to the dead-letter queue, and nothing have been run."""
    world = RecordWorld(tmp_path, monkeypatch, receives=3)
    for number in range(10):
        world.submit(f"job-{number}")
    async with world.worker() as source:
        sick = Sick(world.store)
        source._context = replace(source._context, records=RecordStore(lambda: sick, PREFIX))
        sick.reads = [AccessDeniedError("GetObject", "b", "k", "403")] * 60
        while sick.reads:
            with pytest.raises(SourceUnavailableError, match="403"):
                await source.receive(wait=5.0)
            await anyio.sleep(5.0)
        assert sum(message.receives for message in world.model.messages.values()) == 1
        for _ in range(10):
            await (await take(source, wait=30.0)).complete(OK)
    assert world.model.dead == []


async def test_a_damaged_record_is_named_and_the_other_jobs_are_run(world: RecordWorld) -> None:
    world.submit()
    await world.store.put(f"{PREFIX}jobs/a.json", b"{}")
    async with world.worker() as source:
        assert await source.receive(wait=5.0) is None
        world.submit("b")
        assert (await take(source)).job.id == "b"
    assert "jobs/a.json" in str(next(fields for name, fields in world.faults if name == "record_damaged")["error"])
    assert len(world.model.messages) == 2


async def test_a_record_that_was_damaged_meanwhile_ends_no_worker(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await world.store.put(f"{PREFIX}jobs/a.json", b'{"format": 2}')
        for settle in (lease.complete(OK), lease.retry("x", result=BAD, delay=0.0), lease.fail("x", result=BAD)):
            with pytest.raises(SourceUnavailableError):
                await settle
        assert await lease.extend() is LeaseState.HELD


async def test_a_fresh_run_is_not_ended_by_the_cancelled_one_before(world: RecordWorld) -> None:
    desk = RecordDesk(world.records, lambda: world.store)
    world.submit()
    async with world.worker() as source:
        lease, now = await take(source), world.model.now()
        assert await desk.cancel("a", now)
        await desk.reserve([Wish("a", "fresh-1", "d", fresh=True, now=now)])
        world.submit(run_id="fresh-1")
        with pytest.raises(LeaseLostError):
            await lease.complete(OK)
        assert await lease.extend() is LeaseState.LOST
        again = await take(source, wait=7200.0)
        assert again.job.document().run_id == "fresh-1"


@pytest.mark.parametrize("key", ["jobs/b.json", "results/b/1", "{job_id}/b.json"])
async def test_a_result_key_reaches_no_record_and_no_other_result(world: RecordWorld, key: str) -> None:
    world.submit("b")
    world.submit("jobs", result_key=key)
    async with world.worker() as source:
        for _ in range(2):
            await (await take(source)).complete(OK)
    assert (await world.record("b")).id == "b"
    assert world.results() == {"b/1": b'{"exit_code": 0, "signal": null}\n'}


async def test_a_release_does_not_wait_for_a_slow_bucket(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)

        class Slow(Sick):
            async def put(
                self,
                key: str,
                data: bytes,
                *,
                metadata: Mapping[str, str] | None = None,
                condition: Condition | None = None,
            ) -> str:
                await anyio.sleep(5.0)
                return await super().put(key, data, metadata=metadata, condition=condition)

        slow = Slow(world.store)
        lease._context = replace(lease._context, records=RecordStore(lambda: slow, PREFIX))  # type: ignore[attr-defined]
        with anyio.move_on_after(1.0):  # the last words of a drain
            await lease.release("told to stop")
        assert world.model.messages["message-1"].visible_at <= world.model.now()


async def test_progress_that_could_not_be_written_is_written_later(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:
        lease = await take(source)
        await world.change("a", lambda record: replace(record, fruitless=5))
        sick = Sick(world.store)
        sick.reads = [down()] * 99
        lease._context = replace(lease._context, records=RecordStore(lambda: sick, PREFIX))  # type: ignore[attr-defined]
        await lease.extend(progressed=True)
        sick.reads = []
        await lease.extend()
    assert (await world.record()).fruitless == 0


async def test_a_take_that_took_long_is_confirmed_before_the_job_is_given_out(world: RecordWorld) -> None:
    world.submit()
    async with world.worker() as source:

        class Slow(Sick):
            async def download(
                self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None
            ) -> ObjectInfo:
                await anyio.sleep(50.0)
                return await super().download(key, sink, offset=offset, if_match=if_match)

        slow = Slow(world.store)
        source._context = replace(source._context, records=RecordStore(lambda: slow, PREFIX))
        await take(source, wait=60.0)
        assert world.model.messages["message-1"].visible_at - world.model.now() > 50


async def test_an_apps_message_is_the_apps_whatever_is_in_it(world: RecordWorld) -> None:
    async with world.worker(documents=False) as source:
        for _ in range(2):
            world.submit("user-1", max_failures=1)
            lease = await take(source)
            assert lease.job.id.startswith("message-")
            await lease.complete(Result(status=200, body=b"x"))


async def test_a_message_of_an_older_run_is_deleted_and_nothing_told(world: RecordWorld) -> None:
    world.submit(webhook=URL, run_id="old")
    newer = Record("a", "new", "pending", world.model.now() + 1)
    await world.records.write(newer.failed(world.model.now() + 2, "bad", None, "", "pending"), None)
    async with world.worker() as source:
        assert await source.receive(wait=5.0) is None
    assert world.model.messages == {}
    assert world.model.dead == []
    assert world.webhooks.sent == []
    assert (await world.record()).webhook == "pending"


async def test_a_record_begins_with_the_queues_count(world: RecordWorld) -> None:
    """A checkpoint from before there was a record knows it, and refuses a lower attempt."""
    world.submit()
    world.model.messages["message-1"].receives = 4
    async with world.worker() as source:
        lease = await take(source)
        assert lease.attempt == 5
        await lease.complete(OK)
    record = await world.record()
    assert (record.attempts, record.interruptions, record.failures) == (5, 4, 0)


def test_a_job_whose_message_the_queue_took_away_is_gone() -> None:
    last = Record("a", "", "pending", NOW).taken("w", "m", NOW, last=True)
    assert not last.gone(NOW + 100)
    assert last.gone(NOW + HOLDER_SECONDS)
    assert last.released(NOW, "", fruitless=False).gone(NOW + HOLDER_SECONDS)
    assert not last.done(NOW, None, "", "").gone(NOW + 1e6)
    assert Record("a", "", "pending", NOW, expires=NOW + 5).gone(NOW + 6)


@pytest.mark.parametrize("took_effect", [True, False])
async def test_a_write_without_an_answer_is_looked_for(took_effect: bool) -> None:
    sick = Sick(MemoryStore())
    records = RecordStore(lambda: sick, PREFIX)
    first = await records.write(Record("a", "", "pending", 1.0), None)
    sick.writes = [(down(), took_effect)]
    second = await records.write(first.record.cancelled(2.0), first)
    found = await records.get("a")
    assert found is not None
    assert found.record.write == second.record.write
    assert found.etag == second.etag


async def test_a_write_over_what_is_no_longer_there_conflicts() -> None:
    store = MemoryStore()
    records = RecordStore(lambda: store, PREFIX)
    first = await records.write(Record("a", "", "pending", 1.0), None)
    second = await records.write(first.record.taken("w", "m", 2.0), first)
    with pytest.raises(ConflictError) as conflict:
        await records.write(first.record.cancelled(3.0), first)
    assert conflict.value.found is not None
    assert conflict.value.found.record.write == second.record.write
    with pytest.raises(ConflictError):
        await records.write(first.record, None)


async def test_writes_of_one_record_keep_the_distance_that_the_store_wants() -> None:
    store = MemoryStore(provider=PROVIDERS["r2"])
    records = RecordStore(lambda: store, PREFIX)
    first = await records.write(Record("a", "", "pending", 1.0), None)
    before = anyio.current_time()
    await records.write(first.record.cancelled(2.0), first)
    assert 1.0 <= anyio.current_time() - before < 1.2


async def test_a_webhook_is_sent_after_the_record_and_before_the_message_is_deleted(world: RecordWorld) -> None:
    world.submit(webhook=URL)
    async with world.worker() as source:
        await (await take(source)).complete(Result(status=200, body=b"hi"))
    ((url, event),) = world.webhooks.sent
    assert (url, event.type, event.data["state"], event.data["attempts"]) == (URL, "job.done", "done", 1)
    assert event.data["result"] == {"status": 200, "bytes": 2, "body": "aGk="}
    assert (await world.record()).webhook == "sent"


async def test_a_webhook_that_fails_is_tried_again_without_running_the_job(world: RecordWorld) -> None:
    world.submit(webhook=URL)
    world.webhooks.failures = [WebhookError("503"), WebhookError("503")]
    async with world.worker() as source:
        await (await take(source)).complete(OK)
        assert (await world.record()).webhook == "pending"
        assert len(world.model.messages) == 1
        while world.model.messages:
            assert await source.receive(wait=20.0) is None
    assert len(world.webhooks.sent) == 1
    record = await world.record()
    assert (record.webhook, record.attempts) == ("sent", 1)


async def test_a_webhook_that_nobody_takes_is_given_up_after_a_day_and_said(world: RecordWorld) -> None:
    world.submit(webhook=URL)
    world.webhooks.failures = [WebhookError("503")] * 9999
    async with world.worker() as source:
        await (await take(source)).complete(OK)
        started = anyio.current_time()
        while world.model.messages:
            assert await source.receive(wait=20.0) is None
        assert 86_000 <= anyio.current_time() - started <= 90_000
    assert len(world.webhooks.failures) > 9999 - 150, "it is not hammered"
    assert "webhook_failed" in world.told()
    assert (await world.record()).webhook.startswith("given up")


async def test_a_redrive_policy_ends_the_tries_with_the_reason_in_the_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = RecordWorld(tmp_path, monkeypatch, receives=2)
    world.submit(max_failures=9)
    async with world.worker() as source:
        await (await take(source)).retry("exit code 1", result=BAD, delay=0.0)
        await (await take(source)).retry("exit code 1", result=BAD, delay=0.0)
    assert world.model.messages == {}
    assert [letter["by"] for letter in world.model.dead] == ["http://queue/dead"], "ours, not the policy's"
    record = await world.record()
    assert record.state == "failed"
    assert "redrive policy" in record.reason
