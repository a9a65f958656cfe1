"""What becomes of a message, by what the program says (DESIGN 4): with commands and over real HTTP."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.records.record import Record
from tests.acceptance.salad_world import OK, App, Gate, Reply, Request, answers
from tests.acceptance.sqs_world import NO_RECORDS, SqsWorld, sqs_world
from tests.acceptance.world import JOB, alive, eventually
from tests.support.s3 import Answer
from tests.support.sqs_server import SqsServer
from tests.support.worker import Worker

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
BIG = 65_537
"""Bytes of an answer that does not go with a webhook."""

WITH_AND_WITHOUT_RECORDS = pytest.mark.parametrize("records", [{}, NO_RECORDS], ids=["records", "no records"])


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as made:
        yield made


@pytest.fixture
def world(tmp_path: Path, server: SqsServer) -> Iterator[SqsWorld]:
    with sqs_world(tmp_path, server) as made:
        yield made


@contextmanager
def listening(reply: Callable[[Request], Reply]) -> Iterator[App]:
    """An HTTP server of this process."""
    app = App(reply)
    app.start()
    try:
        yield app
    finally:
        app.stop()


@contextmanager
def app_worker(world: SqsWorld, reply: Callable[[Request], Reply], **settings: str) -> Iterator[tuple[App, Worker]]:
    """An app, and a worker for it."""
    with listening(reply) as app, world.worker("--app-url", app.url, **settings) as worker:
        yield app, worker


def hidden_after(world: SqsWorld, worker: Worker) -> float:
    """Wait until the worker has put the one message back; the seconds until it is visible."""
    worker.wait_for("job_settled")
    return float(world.message()["hidden"])


def wait_for_record(world: SqsWorld, condition: Callable[[Record], bool], what: str) -> Record:
    """Wait until the record is as it has to be."""

    def found() -> Record | None:
        record = world.record()
        return record if record is not None and condition(record) else None

    return eventually(found, what)


def check_record(record: Record, **fields: object) -> None:
    assert {name: getattr(record, name) for name in fields} == fields, record


# It succeeds.


def test_a_2xx_stores_the_answer_and_deletes_the_message(world: SqsWorld) -> None:
    answer = b"\x00\xffanswer " * 3
    message = world.send("any text\n")
    with app_worker(world, lambda _: (201, {}, answer)) as (app, worker):
        world.wait_empty()
        worker.wait_for("job_settled", outcome="done")
    assert [request.body for request in app.requests] == [b"any text\n"]
    record = world.record(message)
    assert record is not None
    check_record(record, state="done", attempts=1, failures=0, interruptions=0, message_id=message)
    assert record.result == {"status": 201, "bytes": len(answer)}
    assert world.result(message) == answer
    assert not world.set_aside()


def test_exit_0_stores_the_exit_code_and_deletes_the_message(world: SqsWorld) -> None:
    world.submit(["true"])
    with world.worker():
        world.wait_empty()
    record = world.record()
    assert record is not None
    check_record(record, state="done", attempts=1, failures=0, result={"exit_code": 0, "signal": None})
    assert json.loads(world.result()) == {"exit_code": 0, "signal": None}
    assert [entry.outcome for entry in record.history] == ["done"]


def test_a_result_that_can_not_be_stored_keeps_the_message(world: SqsWorld) -> None:
    broken = world.storage.faults.add(Answer(503, "SlowDown"), operation="PutObject", key="*/results/*")
    world.submit(["true"])
    with world.worker() as worker:
        broken.wait_hits(2, 30)
        assert world.message()["hidden"] > 0
        assert not worker.find("job_settled")
        world.storage.faults.remove(broken)
        world.wait_empty()
    record = world.record()
    assert record is not None
    check_record(record, state="done", attempts=1, failures=0)


# It fails.


def test_exit_1_comes_again_after_a_backoff_and_goes_to_the_dead_letter_queue(world: SqsWorld) -> None:
    message = world.submit(world.bash("echo x >> $W/runs; exit 1"), max_failures=2)
    body = world.message()["body"]
    with world.worker(HEELER_RETRY_DELAY="30") as worker:
        assert 10 < hidden_after(world, worker) <= 30
        record = world.wait_record("pending")
        check_record(record, attempts=1, failures=1, interruptions=0)
        world.server.pass_time(30)
        (dead,) = world.wait_dead()
        worker.wait_for("job_settled", count=2)
    assert dead["body"] == body
    assert dead["attributes"]["heeler-job-id"] == JOB
    assert dead["attributes"]["heeler-attempts"] == "2"
    assert "1" in dead["attributes"]["heeler-reason"]
    assert dead["attributes"]["heeler-worker"] == world.wait_record("failed").worker
    record = world.wait_record("failed")
    check_record(record, attempts=2, failures=2, interruptions=0, message_id=message)
    assert record.result == {"exit_code": 1, "signal": None}
    assert [entry.outcome for entry in record.history] == ["retry", "fail"]
    assert world.told("runs") == "x\nx\n"


@WITH_AND_WITHOUT_RECORDS
def test_a_500_comes_again_and_goes_to_the_dead_letter_queue(world: SqsWorld, records: dict[str, str]) -> None:
    message = world.send("work")
    with app_worker(world, lambda _: (500, {}, b"broken"), HEELER_RETRY_DELAY="0.1", **records) as (app, _):
        (dead,) = world.wait_dead()
    assert len(app.requests) == 3
    assert [request.headers["heeler-attempt"] for request in app.requests] == ["1", "2", "3"]
    assert (dead["body"], dead["attributes"]["heeler-attempts"]) == ("work", "3")
    assert "500" in dead["attributes"]["heeler-reason"]
    if not records:
        check_record(world.wait_record("failed", message), attempts=3, failures=3)
        assert world.result(message) == b"broken"


@WITH_AND_WITHOUT_RECORDS
def test_retry_after_is_honoured(world: SqsWorld, records: dict[str, str]) -> None:
    world.send("work")
    with app_worker(world, answers((503, {"Retry-After": "40"}, b""), OK), **records) as (app, worker):
        app_asked = eventually(lambda: app.requests[:1], "it is asked")[0].time
        hidden = hidden_after(world, worker)
        assert 40 - (time.monotonic() - app_asked) - 2 <= hidden <= 41
        world.server.pass_time(41)
        world.wait_empty()
    assert len(app.requests) == 2
    assert not world.set_aside()


def test_a_400_goes_to_the_dead_letter_queue_at_once_with_the_reason(world: SqsWorld) -> None:
    message = world.send("work")
    with app_worker(world, lambda _: (400, {}, b"no such model")) as (app, _):
        (dead,) = world.wait_dead()
    assert len(app.requests) == 1
    assert dead["attributes"]["heeler-job-id"] == message
    assert "400" in dead["attributes"]["heeler-reason"]
    record = world.wait_record("failed", message)
    check_record(record, attempts=1, failures=1)
    assert "400" in record.reason
    assert world.result(message) == b"no such model"


def test_exit_75_comes_again_and_is_not_counted(world: SqsWorld) -> None:
    world.submit(world.bash("test $HEELER_ATTEMPT = 4 || exit 75"), max_failures=1)
    with world.worker():
        world.wait_empty()
    record = world.record()
    assert record is not None
    check_record(record, state="done", attempts=4, failures=0, interruptions=3)
    assert not world.set_aside()


def test_a_program_beyond_its_timeout_has_failed(world: SqsWorld) -> None:
    world.submit(world.bash("exec sleep 1000"), timeout=0.5, max_failures=1)
    with world.worker():
        (dead,) = world.wait_dead()
        assert not alive(world.told_pid())
    assert "timeout of 0.5 s" in dead["attributes"]["heeler-reason"]
    check_record(world.wait_record("failed"), attempts=1, failures=1)


POISON = {
    "no json": "JSON",
    '{"command": 5}': "command",
    '{"arguments": []}': "command",
    '{"id": "../../x", "command": "true"}': "id",
    '{"command": "true", "timeout": -1}': "timeout",
}
"""Messages that are no job, and what the reason has to name."""


@WITH_AND_WITHOUT_RECORDS
def test_messages_that_are_no_jobs_go_to_the_dead_letter_queue_at_once(
    world: SqsWorld, records: dict[str, str]
) -> None:
    for body in POISON:
        world.send(body)
    world.send({"id": JOB, "command": "true"})
    with world.worker(**records) as worker:
        dead = world.wait_dead(len(POISON))
        worker.wait_for("job_settled", outcome="done")
    assert {message["body"] for message in dead} == POISON.keys()
    for message in dead:
        assert POISON[message["body"]] in message["attributes"]["heeler-reason"]
    assert len(worker.find("job_received")) == len(POISON) + 1


# It is cancelled.


def test_a_job_cancelled_while_it_runs_is_stopped_and_its_message_deleted(world: SqsWorld) -> None:
    world.submit(world.bash("while :; do sleep 0.05; done"))
    with world.worker(HEELER_SQS_VISIBILITY="3") as worker:
        pid = world.told_pid()
        now = time.time()
        world.update(lambda record: record.cancelled(now))
        world.wait_empty()
        worker.wait_for("job_settled", outcome="cancelled")
        assert not alive(pid)
        record = wait_for_record(world, lambda found: found.history[-1].ended is not None, "it is withdrawn")
        world.submit(["true"], "job-2")
        world.wait_record("done", "job-2")
    check_record(record, state="cancelled", attempts=1, failures=0)
    assert [entry.outcome for entry in record.history] == ["cancelled"]
    assert not world.set_aside()


def test_a_job_cancelled_before_it_is_received_is_never_run(world: SqsWorld) -> None:
    record = Record(JOB, "", "pending", time.time()).cancelled(time.time())
    anyio.run(world.records().write, record, None)
    world.submit(world.bash("touch $W/ran"))
    with world.worker() as worker:
        world.wait_empty()
        assert not worker.find("job_received")
    assert not (world.folder / "ran").exists()
    check_record(world.wait_record("cancelled"), attempts=0)


# Of redrive policies, repetitions, and what is sent back.


@pytest.mark.parametrize("records", [{}, NO_RECORDS], ids=["records", "no records"])
def test_a_redrive_policy_is_found_and_its_last_receive_is_ours_to_judge(
    tmp_path: Path, server: SqsServer, records: dict[str, str]
) -> None:
    with sqs_world(tmp_path, server, redrive=3) as world:
        world.submit(world.bash("echo x >> $W/runs; exit 7"), max_failures=10)
        with world.worker(HEELER_RETRY_DELAY="0.1", SQS_DLQ_URL="", **records) as worker:
            assert worker.wait_for("redrive_policy")["max_receives"] == 3
            (dead,) = world.wait_dead()
        assert not worker.find("no_dead_letter_queue")
        assert world.told("runs") == "x\n" * 3
        assert "7" in dead["attributes"]["heeler-reason"]
        if not records:
            record = world.wait_record("failed")
            check_record(record, attempts=3, failures=3)
            assert record.expires is not None


def test_a_finished_job_that_is_delivered_again_is_not_run_again(world: SqsWorld) -> None:
    program = world.bash("echo x >> $W/runs")
    world.submit(program)
    with world.worker() as worker:
        done = world.wait_record("done")
        world.wait_empty()
        world.submit(program)
        world.wait_empty()
        assert len(worker.find("job_received")) == 1
    assert world.told("runs") == "x\n"
    assert world.record() == done
    assert not world.set_aside()


@WITH_AND_WITHOUT_RECORDS
@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
def test_a_message_sent_back_from_the_dead_letter_queue_runs_again_and_finds_its_checkpoint(
    world: SqsWorld, records: dict[str, str], named: bool
) -> None:
    program = world.bash(
        "if test -e $CHECKPOINT_DIR/state; then cp $CHECKPOINT_DIR/state $W/found; exit 0; fi\n"
        "echo $HEELER_JOB_ID > $W/id.new; mv $W/id.new $W/id; echo saved > $CHECKPOINT_DIR/state\n"
        "while ! test -e $W/fail; do sleep 0.02; done; exit 3"
    )
    document: dict[str, Any] = {"command": program[0], "arguments": program[1:], "sync": world.checkpoints()}
    world.send({**document, "max_failures": 1, **({"id": JOB} if named else {})})
    with world.worker(**records):
        job_id = world.told("id").strip()
        eventually(lambda: world.stored("ck/state", job_id), "it is stored")
        world.tell("fail")
        world.wait_dead()
        world.send_back()
        world.wait_empty()
        assert world.told("found") == "saved\n"
    assert not world.set_aside()
    if not records:
        record = world.wait_record("done", job_id)
        check_record(record, attempts=2, failures=0)
        assert [entry.outcome for entry in record.history] == ["fail", "done"]


# Webhooks.


def verified(request: Request) -> dict[str, Any]:
    """What a webhook says, once its signature is checked as a receiver checks it (standardwebhooks.com)."""
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    signed = f"{request.headers['webhook-id']}.{request.headers['webhook-timestamp']}.".encode() + request.body
    signature = base64.b64encode(hmac.new(key, signed, hashlib.sha256).digest()).decode()
    assert request.headers["webhook-signature"] == f"v1,{signature}"
    assert abs(time.time() - int(request.headers["webhook-timestamp"])) < 60
    said: dict[str, Any] = json.loads(request.body)
    return said


def test_a_webhook_is_sent_until_it_is_taken_and_then_the_message_deleted(world: SqsWorld) -> None:
    held: list[int] = []
    replies = answers((500, {}, b""), (500, {}, b""), OK)

    def taken(request: Request) -> Reply:
        held.append(len(world.left()))
        return replies(request)

    with listening(taken) as receiver:
        world.submit(world.bash("echo x >> $W/runs"), webhook=receiver.url)
        with world.worker(HEELER_WEBHOOK_SECRET=SECRET) as worker:
            for count in (1, 2):
                worker.wait_for("webhook_retried", count=count)
                eventually(lambda: 5 < world.message()["hidden"] < 20, "it is put back, to be tried again")
                world.server.pass_time(20)
            world.wait_empty()
            record = wait_for_record(world, lambda found: found.webhook == "sent", "it is noted")
    assert len(receiver.requests) == 3
    assert held == [1, 1, 1]
    assert len({request.headers["webhook-id"] for request in receiver.requests}) == 1
    (said,) = {json.dumps(verified(request)) for request in receiver.requests}
    told = json.loads(said)
    assert told["type"] == "job.done"
    assert (told["data"]["id"], told["data"]["state"], told["data"]["attempts"]) == (JOB, "done", 1)
    assert told["data"]["result"]["exit_code"] == 0
    check_record(record, state="done", attempts=1, failures=0)
    assert world.told("runs") == "x\n"


@pytest.mark.parametrize("size", [BIG - 1, BIG])
def test_an_answer_of_more_than_64_kib_does_not_go_with_the_webhook(world: SqsWorld, size: int) -> None:
    answer = b"a" * size
    with listening(lambda _: OK) as receiver:
        message = world.send("work")
        settings = {"HEELER_WEBHOOK": receiver.url, "HEELER_WEBHOOK_SECRET": SECRET}
        with app_worker(world, lambda _: (200, {}, answer), **settings):
            world.wait_empty()
    (request,) = receiver.requests
    result = verified(request)["data"]["result"]
    if size < BIG:
        assert base64.b64decode(result["body"]) == answer
    else:
        assert "body" not in result
    assert (result["status"], result["bytes"]) == (200, size)
    assert verified(request)["data"]["result_key"] == world.wait_record("done", message).result_key
    assert world.result(message) == answer


def test_a_failed_job_is_told_before_it_is_set_aside(world: SqsWorld) -> None:
    gate = Gate()
    with listening(gate) as receiver:
        world.submit(["false"], max_failures=1)
        with world.worker(HEELER_WEBHOOK=receiver.url, HEELER_WEBHOOK_SECRET=SECRET):
            gate.wait()
            assert (len(world.left()), world.set_aside()) == (1, [])
            gate.open()
            world.wait_dead()
    told = verified(receiver.requests[0])
    assert told["type"] == "job.failed"
    assert "1" in told["data"]["reason"]


def test_records_of_a_newer_heeler_are_left_alone(world: SqsWorld) -> None:
    world.storage.put("jobs", world.record_key(), b'{"format": 999}\n')
    world.submit(world.bash("touch $W/ran"))
    with world.worker() as worker:
        worker.wait_for("record_damaged")
        eventually(lambda: world.message()["hidden"] > 5, "it is put back for a while")
    assert not (world.folder / "ran").exists()
    assert world.storage.objects("jobs")[world.record_key()] == b'{"format": 999}\n'


def test_two_messages_of_one_job_are_not_run_side_by_side(world: SqsWorld) -> None:
    program = world.bash("echo x >> $W/runs; touch $W/started; while ! test -e $W/finish; do sleep 0.02; done")
    first = world.submit(program)
    with world.worker("--concurrency", "2") as worker:
        world.told("started")
        second = world.submit(program)
        worker.wait_for("job_has_a_holder")
        eventually(lambda: len([m for m in world.left() if m["hidden"] > 3000]) == 1, "it waits")
        assert {message["id"] for message in world.left()} == {first, second}
        world.tell("finish")
        world.wait_record("done")
        eventually(lambda: [message["id"] for message in world.left()] == [second], "the first is deleted")
        world.server.pass_time(3600)
        world.wait_empty()
    assert world.told("runs") == "x\n"
    check_record(world.wait_record("done"), attempts=1, interruptions=0)


def test_a_queue_that_is_not_there_ends_the_worker_at_once(world: SqsWorld) -> None:
    with world.worker(SQS_QUEUE_URL=f"{world.url}-not") as worker:
        assert worker.wait() == 64
    assert any("SQS_QUEUE_URL" in line for line in worker.lines)


def test_a_queue_out_of_reach_ends_the_worker_after_the_start_up_limit(world: SqsWorld) -> None:
    nowhere = {"AWS_ENDPOINT_URL_SQS": "http://127.0.0.1:9", "HEELER_STARTUP_TIMEOUT": "1"}
    with world.worker(**nowhere) as worker:
        assert worker.wait() == 69
    assert any("is the queue's URL right?" in line for line in worker.lines)
