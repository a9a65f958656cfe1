"""The local Salad Job Queue over real gRPC, as any worker sees it: every rule of PROTOCOLS.md 1, from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import grpc
import pytest

from heeler.local.queue_model import End, JobStatus
from heeler.local.tokens import TokenIssuer
from heeler.wire.salad_queue import MESSAGE_BYTES
from tests.support.salad import Machine, SaladService
from tests.support.salad_client import Client

Code = grpc.StatusCode
NEVER = 3600.0


@pytest.fixture
def salad() -> Iterator[SaladService]:
    """No heartbeat comes by itself, and nothing lapses, within a test."""
    with SaladService(port=8123, path="generate", heartbeat=NEVER, grace=NEVER) as service:
        yield service


Connect = Callable[..., Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes clients, and closes them."""
    clients: list[Client] = []

    def make(salad: SaladService, machine: Machine | None = None, token: str | None = None) -> Client:
        clients.append(Client(salad, machine, token))
        return clients[-1]

    yield make
    for client in clients:
        client.channel.close()


def refused_everywhere(client: Client, job_id: str) -> set[Code]:
    return {client.accept().end(), client.accept(job_id).end(), client.complete(job_id), client.reject(job_id)}


def test_every_call_wants_a_token_that_is_ours_and_still_good(salad: SaladService, connect: Connect) -> None:
    job_id = salad.submit({})
    foreign = TokenIssuer().issue(salad.imds.identity, 60)
    old = salad.machine.token()
    salad.expire_tokens()
    stranger = salad.tokens.issue(replace(salad.imds.identity, workload_id="no-such-group"), 60)
    for token in ("", old, salad.machine.token(lifetime=-1)):
        assert refused_everywhere(connect(salad, token=token), job_id) == {Code.UNAUTHENTICATED}
    for token in (foreign, "no.token.atall", "nonsense"):
        assert refused_everywhere(connect(salad, token=token), job_id) == {Code.PERMISSION_DENIED}
    assert connect(salad, token=stranger).accept().end() is Code.PERMISSION_DENIED
    assert salad.job(job_id).tries == 0
    assert connect(salad).accept().job().job_id == job_id


def test_a_job_comes_with_its_place_and_its_input_byte_for_byte(salad: SaladService, connect: Connect) -> None:
    client = connect(salad)
    stream = client.accept()
    job_id = salad.submit(b'{"a":\t1.50, "b": "\xc3\xa9"}')
    job = stream.job()
    assert (job.job_id, job.port, job.path) == (job_id, 8123, "generate")
    assert job.input == b'{"a":\t1.50, "b": "\xc3\xa9"}'
    assert salad.job(job_id).status is JobStatus.RUNNING
    assert client.complete(job_id, b"\x00\xffany bytes") is Code.OK
    done = salad.job(job_id)
    assert (done.status, done.output, done.workers) == (JobStatus.SUCCEEDED, b"\x00\xffany bytes", ["machine-1"])


def test_the_next_job_comes_only_after_a_report_and_in_order(connect: Connect) -> None:
    with SaladService(heartbeat=0.02) as salad:
        client = connect(salad)
        stream = client.accept()
        job_ids = [salad.submit(number) for number in range(3)]
        for job_id in job_ids:
            assert stream.job().job_id == job_id
            assert [stream.message() for _ in range(5)] == ["heartbeat"] * 5
            assert client.complete(job_id) is Code.OK


def test_heartbeats_come_as_often_as_they_should(connect: Connect) -> None:
    with SaladService(heartbeat=0.1) as salad:
        stream = connect(salad).accept()
        began = time.monotonic()
        assert [stream.message() for _ in range(5)] == ["heartbeat"] * 5
        assert 0.45 <= time.monotonic() - began < 5


def test_only_the_holder_may_report_a_job_and_only_once(salad: SaladService, connect: Connect) -> None:
    holder, other = connect(salad), connect(salad, salad.add_machine("machine-2"))
    stream = holder.accept()
    job_id = salad.submit({})
    assert stream.job().job_id == job_id
    assert other.complete(job_id, b"theirs") is Code.NOT_FOUND
    assert other.reject(job_id) is Code.NOT_FOUND
    assert holder.complete("no-such-job") is Code.NOT_FOUND
    assert holder.complete("") is holder.reject("") is Code.INVALID_ARGUMENT
    assert holder.complete(job_id, b"mine") is Code.OK
    assert holder.complete(job_id, b"mine") is Code.NOT_FOUND
    assert holder.reject(job_id) is Code.NOT_FOUND
    assert salad.job(job_id).output == b"mine"


def test_a_rejected_job_is_tried_four_times_in_all(salad: SaladService, connect: Connect) -> None:
    client = connect(salad)
    stream = client.accept()
    job_id = salad.submit({})
    for _ in range(4):
        assert stream.job().job_id == job_id
        assert client.reject(job_id) is Code.OK
    failed = salad.job(job_id)
    assert (failed.status, failed.tries) == (JobStatus.FAILED, 4)
    following = salad.submit({})
    assert stream.job().job_id == following


@pytest.mark.parametrize(("why", "code"), [(End.DROPPED, Code.UNAVAILABLE), (End.CLOSED, Code.OK)])
def test_a_machine_whose_stream_was_lost_comes_back_for_its_job(
    salad: SaladService, connect: Connect, why: End, code: Code
) -> None:
    client = connect(salad)
    stream = client.accept()
    job_id = salad.submit({})
    stream.job()
    salad.drop_streams(why)
    assert stream.end() is code
    again = client.accept(job_id)
    assert again.message() == "heartbeat", "at once"
    assert client.complete(job_id) is Code.OK
    following = salad.submit({})
    assert again.job().job_id == following
    assert salad.job(job_id).tries == 1


def test_a_machine_whose_stream_was_lost_may_report_without_one(salad: SaladService, connect: Connect) -> None:
    client = connect(salad)
    stream = client.accept()
    job_id = salad.submit({})
    stream.job()
    salad.drop_streams()
    stream.end()
    assert client.complete(job_id) is Code.OK
    assert salad.job(job_id).status is JobStatus.SUCCEEDED


def test_a_stream_for_a_job_that_is_not_the_machines_is_not_found(salad: SaladService, connect: Connect) -> None:
    client, other = connect(salad), connect(salad, salad.add_machine("machine-2"))
    stream = client.accept()
    job_id = salad.submit({})
    stream.job()
    assert other.accept(job_id).end() is Code.NOT_FOUND
    assert other.accept("no-such-job").end() is Code.NOT_FOUND
    client.complete(job_id)
    assert client.accept(job_id).end() is Code.NOT_FOUND
    following = salad.submit({})
    assert stream.job().job_id == following, "the open stream was left alone"


def test_after_the_grace_the_job_is_anothers(connect: Connect) -> None:
    with SaladService(heartbeat=NEVER, grace=0.3) as salad:
        client, other = connect(salad), connect(salad, salad.add_machine("machine-2"))
        stream, job_id = client.accept(), salad.submit({})
        stream.job()
        salad.drop_streams()
        lost = time.monotonic()
        assert other.accept().job().job_id == job_id
        assert time.monotonic() - lost >= 0.3
        assert client.accept(job_id).end() is Code.NOT_FOUND
        assert client.complete(job_id) is Code.NOT_FOUND
        assert other.complete(job_id) is Code.OK
        assert salad.job(job_id).workers == ["machine-1", "machine-2"]


@pytest.mark.parametrize("how", ["cancelled", "connection closed"])
def test_a_stream_that_its_client_gives_up_is_lost_too(connect: Connect, how: str) -> None:
    with SaladService(heartbeat=NEVER, grace=0.1) as salad:
        client, other = connect(salad), connect(salad, salad.add_machine("machine-2"))
        stream, job_id = client.accept(), salad.submit({})
        stream.job()
        waiting = other.accept()
        if how == "cancelled":
            stream.cancel()
        else:
            client.channel.close()
        assert waiting.job().job_id == job_id


def test_a_new_stream_without_the_job_costs_its_try_at_once(salad: SaladService, connect: Connect) -> None:
    client = connect(salad)
    stream, job_id = client.accept(), salad.submit({})
    stream.job()
    again = client.accept()
    assert again.job().job_id == job_id
    assert stream.end() is Code.ABORTED
    assert salad.job(job_id).tries == 2


def test_a_second_stream_of_a_machine_ends_the_first(salad: SaladService, connect: Connect) -> None:
    first = connect(salad).accept()
    salad.wait_streams(1)
    second = connect(salad).accept()
    assert first.end() is Code.ABORTED
    job_id = salad.submit({})
    assert second.job().job_id == job_id
    assert salad.streams() == 1


def test_outputs_and_inputs_of_ten_mebibytes_pass_and_larger_outputs_do_not(
    salad: SaladService, connect: Connect
) -> None:
    client = connect(salad)
    data = b'"' + b"x" * (MESSAGE_BYTES - 8192) + b'"'
    stream, job_id = client.accept(), salad.submit(data)
    assert stream.job().input == data
    assert client.complete(job_id, bytes(MESSAGE_BYTES)) is Code.RESOURCE_EXHAUSTED
    assert salad.job(job_id).status is JobStatus.RUNNING
    assert client.complete(job_id, bytes(MESSAGE_BYTES - 100)) is Code.OK
    assert len(salad.job(job_id).output or b"") == MESSAGE_BYTES - 100


def test_a_job_cancelled_at_a_machine_ends_its_stream_and_is_not_found_then(
    salad: SaladService, connect: Connect
) -> None:
    client = connect(salad)
    stream, job_id = client.accept(), salad.submit({})
    stream.job()
    salad.cancel(job_id)
    assert stream.end() is Code.CANCELLED
    assert client.complete(job_id) is Code.NOT_FOUND
    assert client.accept(job_id).end() is Code.NOT_FOUND
    waiting, following = salad.submit({}), salad.submit({})
    salad.cancel(waiting)
    assert client.accept().job().job_id == following
    assert [salad.job(one).status for one in (job_id, waiting)] == [JobStatus.CANCELLED] * 2


def test_a_service_that_was_away_keeps_its_port_its_jobs_and_who_holds_them(
    salad: SaladService, connect: Connect
) -> None:
    client, port = connect(salad), salad.endpoint
    stream, job_id, waiting = client.accept(), salad.submit({}), salad.submit({})
    stream.job()
    salad.stop()
    assert stream.end() is Code.UNAVAILABLE
    assert client.complete(job_id) is Code.UNAVAILABLE
    salad.start()
    assert salad.endpoint == port
    again = connect(salad).accept(job_id)
    assert again.message() == "heartbeat"
    assert connect(salad).complete(job_id) is Code.OK
    assert again.job().job_id == waiting
    assert salad.job(job_id).tries == 1


def test_the_grace_starts_anew_when_a_service_comes_back(connect: Connect) -> None:
    with SaladService(heartbeat=NEVER, grace=0.1) as salad:
        client, job_id = connect(salad), salad.submit({})
        client.accept().job()
        salad.stop()
        time.sleep(0.2)
        salad.state.grace = NEVER
        salad.start()
        assert connect(salad).accept(job_id).message() == "heartbeat"
        assert salad.job(job_id).tries == 1


def test_calls_fail_as_they_are_told_to_before_or_after_they_took_effect(salad: SaladService, connect: Connect) -> None:
    client = connect(salad)
    salad.faults.fail("AcceptJobs", Code.UNAVAILABLE, 2)
    assert [client.accept().end() for _ in range(2)] == [Code.UNAVAILABLE] * 2
    stream, job_id = client.accept(), salad.submit({})
    stream.job()
    salad.faults.fail("CompleteJob", Code.UNKNOWN)
    assert client.complete(job_id) is Code.UNKNOWN
    assert salad.job(job_id).status is JobStatus.RUNNING
    salad.faults.fail("CompleteJob", Code.UNAVAILABLE, applied=True)
    assert client.complete(job_id) is Code.UNAVAILABLE
    assert salad.job(job_id).status is JobStatus.SUCCEEDED
    assert client.complete(job_id) is Code.NOT_FOUND
    methods = [call.method for call in salad.faults.calls]
    assert methods == ["AcceptJobs"] * 3 + ["CompleteJob"] * 3


def test_many_machines_do_many_jobs_once_each(salad: SaladService, connect: Connect) -> None:
    clients = [connect(salad, salad.add_machine(f"machine-{number}")) for number in range(2, 6)]
    streams = [(client, client.accept()) for client in clients]
    salad.wait_streams(4)
    job_ids = [salad.submit(number) for number in range(100)]
    done = []
    for number in range(100):
        client, stream = streams[number % 4]
        done.append(stream.job().job_id)
        assert client.complete(done[-1]) is Code.OK
    assert sorted(done) == sorted(job_ids)
    assert {salad.job(job_id).tries for job_id in job_ids} == {1}
