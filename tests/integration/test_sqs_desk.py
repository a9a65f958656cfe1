"""The submitter's side of SQS against moto and the strict storage: what is sent, what is recorded, what fails."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.desks import open_desk
from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.job import InvalidJobError, Result
from heeler.records.opening import open_records
from heeler.records.record import Record, decode_record
from heeler.records.store import RecordStore
from heeler.settings import Settings
from heeler.sources.base import Desk, JobRecord, PartlySubmittedError, SubmitOptions
from heeler.sources.sqs_calls import RefusedError
from heeler.sources.sqs_draft import Draft
from heeler.sources.sqs_send import RefusedJobError, Sender
from heeler.storage import stores
from tests.support.s3 import Answer, Cut, S3Server
from tests.support.sqs_rig import running
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer

BUCKET = "jobs"
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as server:
        yield server


@pytest.fixture(scope="module")
def shared_storage() -> Iterator[S3Server]:
    with S3Server.start(buckets=[BUCKET]) as storage:
        yield storage


@pytest.fixture
def storage(shared_storage: S3Server) -> Iterator[S3Server]:
    yield shared_storage
    shared_storage.faults.clear()


class Shop:
    """A queue with records, and desks on it."""

    def __init__(self, server: SqsServer, storage: S3Server, suffix: str = "", **attributes: str) -> None:
        fifo = {"FifoQueue": "true"} if suffix else {}
        self.name = f"desk-{next(_numbers)}{suffix}"
        self.server, self.storage = server, storage
        self.url = server.queue(self.name, **fifo, **attributes)
        self.opened: list[Desk] = []

    def settings(self, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "sqs_queue_url": self.url,
            "sqs_region": REGION,
            "sqs_access_key_id": KEY,
            "sqs_secret_access_key": SECRET,
            "records": f"s3://{BUCKET}/r/",
            "s3_endpoint": self.storage.url,
            "s3_access_key_id": self.storage.access_key,
            "s3_secret_access_key": self.storage.secret_key,
            "s3_provider": "r2",
        }
        return Settings(**{**values, **changes})

    def desk(self, **changes: Any) -> Desk:
        desk = open_desk(self.settings(**changes))
        self.opened.append(desk)
        return desk

    def key(self, job_id: str) -> str:
        return f"r/{self.name}/jobs/{job_id}.json"

    def record(self, job_id: str) -> Record:
        """What is in the bucket."""
        return decode_record(self.storage.objects(BUCKET)[self.key(job_id)])

    def write(self, record: Record) -> None:
        """Put a record there, as if a worker had."""
        from heeler.records.record import encode_record

        self.storage.put(BUCKET, self.key(record.id), encode_record(record.signed()))

    def sent(self) -> list[Any]:
        """The documents in the queue."""
        return [json.loads(message["body"]) for message in self.server.messages(self.url)]

    def sent_ids(self) -> Counter[str]:
        return Counter(document["id"] for document in self.sent())


@pytest.fixture
def shop(server: SqsServer, storage: S3Server) -> Iterator[Shop]:
    made = Shop(server, storage)
    yield made
    for desk in made.opened:
        desk.close()


def document(job_id: str | None = None, **fields: Any) -> bytes:
    named = {} if job_id is None else {"id": job_id}
    return json.dumps({**named, "command": "true", **fields}).encode()


def many(count: int, **fields: Any) -> list[bytes]:
    return [document(f"j{number}", **fields) for number in range(count)]


def refusal(error: type[Exception], call: Any) -> str:
    """The one line of what is raised."""
    with pytest.raises(error) as caught:
        call()
    words = str(caught.value)
    assert "\n" not in words
    assert SECRET not in words
    return words


# What is sent and recorded.


def test_jobs_are_sent_in_batches_and_recorded_as_pending(shop: Shop) -> None:
    before = shop.server.calls()
    ids = shop.desk().submit([*many(21), document()])
    assert ids[:21] == [f"j{number}" for number in range(21)]
    assert shop.sent_ids() == Counter(ids)
    assert (shop.server.calls() - before)["SendMessageBatch"] == 3
    for job_id in ids:
        record = shop.record(job_id)
        assert (record.state, record.attempts, record.message_id, record.run_id) == ("pending", 0, "", "")
        assert abs(record.created - time.time()) < 60
        assert record.expires == pytest.approx(record.created + 1_209_600)
        assert len(record.digest) == 32


def test_large_documents_go_in_batches_of_a_quarter_megabyte_or_alone(shop: Shop) -> None:
    before = shop.server.calls()
    sizes = {"a": 200_000, "b": 200_000, "c": 1_000_000, "d": 10}
    shop.desk().submit([document(job_id, environment={"X": "x" * size}) for job_id, size in sizes.items()])
    assert shop.sent_ids() == Counter([*sizes])
    assert (shop.server.calls() - before)["SendMessageBatch"] == 4


def test_a_message_for_an_app_has_an_id_beside_it(shop: Shop) -> None:
    desk = shop.desk()
    job_id = desk.submit_message(b"hello \xe2\x82\xac")
    (message,) = shop.server.messages(shop.url)
    assert (message["body"], message["attributes"]) == ("hello \u20ac", {"heeler-job-id": job_id})
    found = desk.show(job_id)
    assert found is not None
    assert found.state == "pending"


def test_a_fifo_queue_gets_groups_and_keeps_the_order(server: SqsServer, storage: S3Server) -> None:
    shop = Shop(server, storage, ".fifo")
    desk = shop.desk()
    try:
        desk.submit(many(12))
        desk.submit([document("k1"), document("k2")], SubmitOptions("line"))
        desk.submit([document("k1"), document("k2")], SubmitOptions("line"))
        messages = server.messages(shop.url)
        assert [json.loads(message["body"])["id"] for message in messages] == [
            *(f"j{number}" for number in range(12)),
            "k1",
            "k2",
        ]
        assert [message["group"] for message in messages] == [*(f"j{number}" for number in range(12)), "line", "line"]
    finally:
        desk.close()


def test_notes_tell_of_the_redrive_policy_and_of_the_retention(server: SqsServer, storage: S3Server) -> None:
    server.queue("resting-place")
    policy = {"deadLetterTargetArn": f"arn:aws:sqs:{REGION}:123456789012:resting-place", "maxReceiveCount": 7}
    shop = Shop(server, storage, RedrivePolicy=json.dumps(policy), MessageRetentionPeriod="345600")
    desk = shop.desk()
    try:
        desk.submit([document("a")])
        redrive, retention = desk.notes()
        assert redrive.startswith("this queue's redrive policy moves a message to resting-place after 7 receives;")
        assert retention.startswith("this queue drops messages after 4 days, whoever works on them: a job must end")
        assert desk.notes() == []
        for code in ("AccessDenied", "AccessDeniedException"):
            server.refuse("GetQueueAttributes", 403, code)
            desk.submit([document(f"b-{code}")])
            assert desk.notes() == []
    finally:
        desk.close()


def test_a_queue_for_small_messages_refuses_a_large_job_before_anything_is_sent(
    server: SqsServer, storage: S3Server
) -> None:
    shop = Shop(server, storage, MaximumMessageSize="2000")
    desk = shop.desk()
    try:
        words = refusal(
            InvalidJobError, lambda: desk.submit([document("a"), document("big", environment={"X": "x" * 2000})])
        )
        assert "job 'big' has 2" in words
        assert "the queue takes 2000: put what is large into storage" in words
        assert shop.sent() == []
    finally:
        desk.close()


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([document("a"), b'{"id": "b"}'], "command: is missing"),
        ([document("a"), document("a")], "id: 'a' is there twice"),
        ([document("a"), document("b", environment={"X": "x" * (1 << 20)})], "job 'b' has 1048"),
        ([document("../x")], "can't be used"),
        ([b"nonsense"], "is not JSON"),
    ],
)
def test_nothing_is_sent_or_recorded_if_one_document_is_wrong(shop: Shop, documents: list[bytes], words: str) -> None:
    before = shop.server.calls()
    assert words in refusal(InvalidJobError, lambda: shop.desk().submit(documents))
    assert shop.server.calls() - before == {}
    assert not any(shop.name in key for key in shop.storage.objects(BUCKET))


def test_what_needs_a_record_is_refused_without_a_bucket(shop: Shop) -> None:
    desk = shop.desk(records=None)
    for fields in ({"webhook": "https://example.com/"}, {"result_key": "x"}):
        assert "needs records" in refusal(InvalidJobError, lambda fields=fields: desk.submit([document("a", **fields)]))
    for call in (desk.jobs, lambda: desk.show("a"), lambda: desk.cancel("a"), lambda: desk.result("a")):
        assert "set HEELER_RECORDS=s3://bucket/prefix/" in refusal(UsageError, call)
    assert desk.submit([document("a")]) == ["a"]
    shop.desk().submit([document("b", webhook="https://example.com/", result_key="x")])
    assert shop.sent_ids() == Counter(["a", "b"])


def test_a_group_needs_a_fifo_queue(shop: Shop) -> None:
    assert "this queue is none" in refusal(UsageError, lambda: shop.desk().submit([document("a")], SubmitOptions("g")))


# Submitted again.


def test_the_same_jobs_submitted_again_are_sent_again_only_while_nobody_has_begun(shop: Shop) -> None:
    desk = shop.desk()
    documents = many(4)
    desk.submit(documents)
    desk.notes()
    shop.write(shop.record("j1").taken("w", "m", time.time()))
    shop.write(shop.record("j2").taken("w", "m", time.time()).done(time.time(), None, "", ""))
    assert desk.submit(documents) == ["j0", "j1", "j2", "j3"]
    again, known = desk.notes()[:2]
    assert again.endswith("so sent again: j0 (pending), j3 (pending)")
    assert "so not sent again: j1 (running), j2 (done); --fresh runs an ended job anew" in known
    assert shop.sent_ids() == Counter({"j0": 2, "j1": 1, "j2": 1, "j3": 2})


def test_another_document_of_the_same_id_is_refused_before_anything_is_sent(shop: Shop) -> None:
    desk = shop.desk()
    desk.submit([document("b", timeout=1)])
    words = refusal(InvalidJobError, lambda: desk.submit([document("a"), document("b", timeout=2)]))
    assert "id: 'b' is in the queue already with another document; choose another, or submit --fresh once" in words
    assert shop.sent_ids() == Counter(["b"])
    assert shop.key("a") not in shop.storage.objects(BUCKET)


def test_a_fresh_run_replaces_the_record_of_a_job_that_has_ended(shop: Shop) -> None:
    desk = shop.desk()
    desk.submit([document("a")])
    fresh = [document("a", run_id="fresh-1")]
    assert "pending in another run" in refusal(InvalidJobError, lambda: desk.submit(fresh, SubmitOptions(fresh=True)))
    shop.write(shop.record("a").taken("w", "m", time.time()).done(time.time(), {"exit_code": 0}, "k", ""))
    desk.submit(fresh, SubmitOptions(fresh=True))
    desk.submit([document("a", run_id="fresh-2")], SubmitOptions(fresh=True))
    record = shop.record("a")
    assert (record.run_id, record.state, record.attempts, record.result) == ("fresh-1", "pending", 1, None)
    assert [found.get("run_id") for found in shop.sent()] == [None, "fresh-1", "fresh-1"]


def test_the_same_file_submitted_twice_at_once_is_one_set_of_jobs(shop: Shop) -> None:
    documents = many(30)
    desks = [shop.desk() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert len({tuple(ids) for ids in threads.map(lambda desk: desk.submit(documents), desks)}) == 1
    assert set(shop.sent_ids()) == {f"j{number}" for number in range(30)}
    assert max(shop.sent_ids().values()) <= 3
    assert {record.state for record in shop.desk().jobs()} == {"pending"}
    assert len(shop.desk().jobs()) == 30


def test_two_files_that_give_one_id_to_different_jobs_at_once_leave_one_of_them(shop: Shop) -> None:
    desks = [shop.desk() for _ in range(4)]
    gate = threading.Barrier(4)
    taken: list[int] = []

    def submit(number: int) -> None:
        gate.wait()
        try:
            desks[number].submit([document("a", timeout=number + 1)])
        except InvalidJobError:
            return
        taken.append(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(submit, range(4)))
    assert len(taken) == 1
    assert [found["timeout"] for found in shop.sent()] == [taken[0] + 1]


# Failures on the way.


def test_single_failures_of_a_batch_are_tried_again_and_only_those(shop: Shop) -> None:
    failed = [{"Id": str(number), "Code": "InternalError", "SenderFault": False} for number in (1, 3)]
    done = [{"Id": str(number), "MessageId": "m", "MD5OfMessageBody": "x"} for number in (0, 2)]
    shop.server.answer("SendMessageBatch", 200, {"Successful": done, "Failed": failed})
    assert shop.desk().submit(many(4)) == ["j0", "j1", "j2", "j3"]
    assert shop.sent_ids() == Counter(["j1", "j3"]), "the answer said that it had taken the others"


@pytest.mark.parametrize("code", ["ServiceUnavailable", "RequestThrottled", "ThrottlingException", "InternalError"])
def test_what_passes_is_waited_for(shop: Shop, code: str) -> None:
    for operation in ("GetQueueAttributes", "SendMessageBatch"):
        shop.server.refuse(operation, 503 if code == "ServiceUnavailable" else 400, code)
    assert shop.desk().submit([document("a")]) == ["a"]
    assert shop.sent_ids() == Counter(["a"])


def test_a_job_that_sqs_blames_us_for_is_named_and_the_others_of_the_batch_count_as_sent(shop: Shop) -> None:
    failed = [
        {"Id": "0", "Code": "InternalError", "SenderFault": False},
        {"Id": "2", "Code": "InvalidMessageContents", "SenderFault": True, "Message": "bad\nbyte"},
    ]
    shop.server.answer("SendMessageBatch", 200, {"Successful": [{"Id": "1", "MessageId": "m"}], "Failed": failed})
    with pytest.raises(PartlySubmittedError) as caught:
        shop.desk().submit(many(3))
    assert (caught.value.sent, caught.value.exit_code) == (["j1"], 64)
    assert str(caught.value) == (
        "1 of 3 jobs were sent, then: SQS refused job 'j2' with InvalidMessageContents: bad byte;"
        " once that is mended, submit the same again: what was sent is not run twice"
    )


def break_off_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    """Let so many batches pass, and the next call be refused."""
    passed = itertools.count(1)
    send_once = Sender._send_once

    async def send(sender: Sender, batch: Sequence[Draft], group: str | None) -> dict[str, RefusedJobError]:
        if next(passed) > batches:
            raise RefusedError("send_message_batch", "AccessDenied", "not\nyou")
        return await send_once(sender, batch, group)

    monkeypatch.setattr(Sender, "_send_once", send)


def test_a_submission_that_breaks_off_says_how_much_and_is_safe_to_repeat(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = many(35)
    with monkeypatch.context() as patch:
        break_off_after(patch, 2)
        with pytest.raises(PartlySubmittedError) as caught:
            shop.desk().submit(documents)
    assert caught.value.exit_code == 64
    assert Counter(caught.value.sent) == shop.sent_ids()
    assert str(caught.value) == (
        f"{len(caught.value.sent)} of 35 jobs were sent, then: SQS refused send_message_batch with AccessDenied:"
        " not you; check the queue's URL, and its credentials and what they may do; once that is mended,"
        " submit the same again: what was sent is not run twice"
    )
    shop.desk().submit(documents)
    assert set(shop.sent_ids()) == {f"j{number}" for number in range(35)}


def test_nothing_was_sent_is_said_so(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    break_off_after(monkeypatch, 0)
    assert refusal(UsageError, lambda: shop.desk().submit(many(2))).startswith("nothing was sent: SQS refused")


@pytest.mark.parametrize(("named", "records"), [(False, "s3://jobs/r/"), (True, None)])
def test_jobs_that_would_be_others_or_run_twice_are_not_to_be_repeated_and_those_sent_are_told(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, named: bool, records: str | None
) -> None:
    break_off_after(monkeypatch, 1)
    documents = many(25) if named else [document() for _ in range(25)]
    with pytest.raises(PartlySubmittedError, match="submit the others only: the ids of those that were sent") as caught:
        shop.desk(records=records).submit(documents)
    assert Counter(caught.value.sent) == shop.sent_ids()


def test_a_record_that_can_not_be_written_stops_the_submission_before_anything_is_sent(shop: Shop) -> None:
    shop.storage.faults.add(Answer(403, "AccessDenied"), operation="PutObject")
    words = refusal(UsageError, lambda: shop.desk().submit(many(3)))
    assert "storage refuses us" in words
    assert shop.sent() == []


def test_a_record_whose_write_got_no_answer_is_not_taken_for_another_submission(shop: Shop) -> None:
    shop.storage.faults.add(Cut(at="after"), operation="PutObject", count=2)
    desk = shop.desk()
    desk.submit(many(3))
    assert not any("submitted before" in note for note in desk.notes())
    assert shop.sent_ids() == Counter(["j0", "j1", "j2"])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"sqs_queue_url": "URLx"}, UsageError, "NonExistentQueue"),
        ({"sqs_queue_url": "http://127.0.0.1:9/123456789012/q"}, UnavailableError, "is the queue's URL right?"),
        ({"sqs_queue_url": "ftp://x/q"}, UsageError, "is not an http or https URL"),
        ({"sqs_region": None}, UsageError, "SQS_AWS_REGION"),
        ({"sqs_secret_access_key": None}, UsageError, "SQS_AWS_SECRET_ACCESS_KEY is not set"),
        ({"records": "s3://nowhere/r/"}, UsageError, "the bucket does not exist"),
        ({"records": "nowhere"}, UsageError, "HEELER_RECORDS"),
        ({"s3_secret_access_key": "wrong"}, UsageError, "storage refuses us"),
        ({"s3_endpoint": "http://127.0.0.1:9"}, UnavailableError, "storage is out of reach"),
        ({"s3_endpoint": "nowhere"}, UsageError, "the storage endpoint is 'nowhere'"),
        ({"source": "once"}, UsageError, "takes no jobs from here; use sqs or local:FOLDER"),
        ({"sqs_queue_url": None}, UsageError, "no source of jobs"),
        ({"source": "sqs", "sqs_queue_url": None}, UsageError, "SQS_QUEUE_URL"),
        ({"source": "sqs:nonsense"}, UsageError, "the queue of --source sqs:URL"),
    ],
)
def test_wrong_settings_are_said_in_one_line(
    shop: Shop, changes: dict[str, Any], error: type[HeelerError], words: str
) -> None:
    changes = {name: value.replace("URL", shop.url) if name == "sqs_queue_url" and value else value
               for name, value in changes.items()}  # fmt: skip
    assert words in refusal(error, lambda: shop.desk(**changes).submit([document("a")]))
    assert shop.sent() == []


# Records, as people see them.


def test_jobs_are_listed_oldest_first_and_a_damaged_one_is_named(shop: Shop) -> None:
    desk = shop.desk()
    now = time.time()
    for number, job_id in enumerate(("c", "a", "b")):
        shop.write(Record(job_id, "", "pending", now + number))
    assert [job.id for job in desk.jobs()] == ["c", "a", "b"]
    assert desk.notes() == []
    shop.storage.put(BUCKET, shop.key("a"), b"{}")
    shop.storage.put(BUCKET, f"r/{shop.name}/jobs/notes.txt", b"x")
    assert [job.id for job in desk.jobs()] == ["c", "b"]
    damaged, foreign = desk.notes()
    assert damaged.startswith(f"s3://{BUCKET}/{shop.key('a')} is no record of a job (")
    assert damaged.endswith("delete it, or mend it")
    assert "notes.txt is no record of a job" in foreign
    assert shop.key("a") in refusal(UsageError, lambda: desk.show("a"))


def test_a_record_is_shown_whole(shop: Shop) -> None:
    record = Record("a", "", "pending", 100.0).taken("w1", "m1", 110.0, 9000.0).retried(120.0, "exit code 1")
    record = record.taken("w2", "m1", 130.0, 9000.0).done(140.0, {"status": 200, "bytes": 2}, "r/key", "sent")
    shop.write(record)
    history = (
        {"attempt": 1, "worker": "w1", "started": 110.0, "ended": 120.0, "outcome": "retry", "reason": "exit code 1"},
        {"attempt": 2, "worker": "w2", "started": 130.0, "ended": 140.0, "outcome": "done", "reason": ""},
    )
    assert shop.desk().show("a") == JobRecord(
        id="a",
        state="done",
        attempts=2,
        failures=1,
        interruptions=0,
        reason="",
        worker="w2",
        created=100.0,
        finished=140.0,
        result={"status": 200, "bytes": 2},
        expires=9000.0,
        history=history,
        webhook="sent",
        result_key="r/key",
        heard=140.0,
    )
    assert shop.desk().show("b") is None
    assert shop.desk().show("../a") is None


def test_a_job_is_cancelled_once_whoever_writes_its_record_meanwhile(shop: Shop) -> None:
    shop.write(Record("a", "", "pending", 100.0).taken("w", "m", 110.0))
    desks = [shop.desk() for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        said = sorted(threads.map(lambda desk: desk.cancel("a"), desks))
    assert said == [False, False, True]
    record = shop.record("a")
    assert (record.state, record.reason, record.attempts) == ("cancelled", "cancelled", 1)
    assert record.webhook == "pending", "whoever gets the message sends it, if the job has one"
    assert not shop.desk().cancel("nobody")


def test_a_result_comes_as_it_was_stored(shop: Shop) -> None:
    body = bytes(range(256)) * 1000
    shop.storage.put(BUCKET, "r/elsewhere", body)
    shop.write(Record("a", "", "pending", 100.0).done(110.0, {"status": 200, "bytes": len(body)}, "r/elsewhere", ""))
    shop.write(Record("b", "", "pending", 100.0).failed(110.0, "lost", None, "", ""))
    desk = shop.desk()
    assert desk.result("a") == body
    assert (desk.result("b"), desk.result("c")) == (None, None)


def test_waiting_needs_one_client_and_reads_only_what_is_asked_for(shop: Shop) -> None:
    desk = shop.desk()
    desk.submit(many(5))
    before = shop.storage.stats.snapshot()
    for _ in range(4):
        assert list(desk.look(["j3"])) == ["j3"]
    after = shop.storage.stats.snapshot()
    assert after.calls["GetObject"] - before.calls["GetObject"] == 4
    assert after.connections - before.connections <= 1
    assert desk.look([]) == {}


# With a worker.


@pytest.mark.anyio
async def test_what_was_submitted_again_after_a_failure_midway_is_run_once_each(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = many(15)
    desk = shop.desk()
    with monkeypatch.context() as patch:
        break_off_after(patch, 1)
        with pytest.raises(PartlySubmittedError):
            desk.submit(documents)
    desk.submit(documents)
    assert sum(shop.sent_ids().values()) in (20, 25)
    settings = shop.settings()
    records = open_records(settings, shop.name, stores(settings))
    assert records is not None
    assert sorted(await _run_all(shop, records, tmp_path)) == sorted(f"j{number}" for number in range(15))
    assert {job.state for job in await anyio.to_thread.run_sync(desk.jobs)} == {"done"}
    assert shop.sent() == []


async def _run_all(shop: Shop, records: RecordStore, state: Path) -> list[str]:
    """Run what comes, as a worker does."""
    from heeler.records.announce import Announcer
    from heeler.records.lease import Context
    from heeler.records.source import RecordedSource
    from heeler.webhook import Webhooks

    ran = []
    async with running(shop.url, state=state) as rig:
        announcer = Announcer(Webhooks(None), None, time.time, lambda *_, **__: None)
        context = Context(records, announcer, time.time, lambda *_, **__: None, lambda *_, **__: None)
        source = RecordedSource(rig.source, context, "w0", documents=True)
        while (lease := await source.receive(wait=2.0)) is not None:
            ran.append(lease.job.id)
            await lease.complete(Result(exit_code=0))
    return ran


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
