"""Jobs of the Salad Job Queue with the real command line: whatever breaks, each is done, and in one try of the queue.

"The next within two seconds" is measured from the moment of the recovery to the moment when the queue sends it.
"""

from __future__ import annotations

import hashlib
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import pytest

from heeler.local.queue_model import End, Job, JobStatus
from tests.acceptance.salad_world import OK, Gate, Reply, Request, SaladWorld, answers
from tests.acceptance.snapshot_programs import Prefix, snapshots
from tests.acceptance.world import BUCKET, alive, eventually
from tests.support.proxy import FaultProxy
from tests.support.s3 import S3Server, Stall
from tests.support.worker import Worker, clean_environment, heeler, storage_environment

Code = grpc.StatusCode
FOREVER = float("inf")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SaladWorld]:
    with SaladWorld(tmp_path, grace=300.0).running() as made:
        yield made


# The stream is dropped.


class Cable:
    """Between a worker and the queue; `drop` breaks the stream in one of three ways."""

    def __init__(self, world: SaladWorld, proxy: FaultProxy, how: str) -> None:
        self._world = world
        self._how = how
        self.proxy = proxy

    def drop(self) -> float:
        """Return once the queue has noticed, too; when that was."""
        salad = self._world.salad
        before = salad.call(lambda: [*salad.state.streams.values()])
        if self._how == "reset":
            self.proxy.reset_connections()
            eventually(lambda: all(stream.end for stream in before), "the queue has noticed")
        else:
            salad.drop_streams(End.CLOSED if self._how == "closed" else End.DROPPED)
        return time.monotonic()


@contextmanager
def cable(world: SaladWorld, how: str = "reset") -> Iterator[tuple[Cable, dict[str, str]]]:
    """One, and what a worker's environment needs for it."""
    host, _, port = world.salad.endpoint.rpartition(":")
    with FaultProxy(host, int(port)) as proxy:
        yield Cable(world, proxy, how), {"SALAD_SERVICE_ENDPOINT": f"127.0.0.1:{proxy.port}"}


HOW = pytest.mark.parametrize("how", ["unavailable", "closed", "reset"])


@HOW
def test_a_stream_dropped_before_the_job_costs_nothing(world: SaladWorld, how: str) -> None:
    with cable(world, how) as (line, environment), world.idle_worker(env=environment):
        dropped = line.drop()
        job_id = world.submit()
        world.prompt(f"stream {how} before the job", dropped, job_id)
        world.done_once(job_id)


def test_a_job_lost_on_its_way_to_us_is_done_by_its_second_try(world: SaladWorld) -> None:
    with cable(world) as (line, environment), world.idle_worker(env=environment):
        line.proxy.set(stall_down=True)
        job_id = world.submit()
        world.at("started", job_id)
        dropped = line.drop()
        line.proxy.clear()
        # We never heard of the job, and nobody else can know.
        world.done(job_id, tries=2)
        assert len(world.app.of(job_id)) == 1
        assert not world.calls("RejectJob")
        took = world.app.wait(job_id).time - dropped
        print(f"FIGURE job lost on its way: it is with the app after {took:.2f} s")
        world.prompt("stream reset with a job on its way", world.at("succeeded", job_id))


@HOW
def test_a_stream_dropped_after_the_job_was_received_and_before_the_app_has_it_costs_no_try(
    world: SaladWorld, how: str
) -> None:
    with cable(world, how) as (line, environment), world.worker(env=environment) as worker:
        job_id = world.submit()
        worker.wait_for("app_not_ready")  # it has the job, and waits for the app
        dropped = line.drop()
        world.comes_back_for(job_id)
        world.app.start()
        world.done_once(job_id)
        world.prompt(f"stream {how} after the job was received", max(dropped, world.at("succeeded", job_id)))


@HOW
def test_a_stream_dropped_while_the_app_computes_costs_no_try(world: SaladWorld, how: str) -> None:
    gate = Gate(first_only=True)
    world.app.reply = gate
    with cable(world, how) as (line, environment), world.idle_worker(env=environment):
        job_id = world.submit()
        gate.wait()
        line.drop()
        world.comes_back_for(job_id)
        gate.open()
        world.done_once(job_id)
        # Once more, and the answer comes while there is no stream.
        gate = world.app.reply = Gate(first_only=True)
        job_id = world.submit()
        gate.wait()
        dropped = line.drop()
        gate.open()
        world.done_once(job_id)
        world.prompt(f"stream {how} while the app computes", dropped)


@pytest.mark.parametrize("applied", [True, False])
def test_a_connection_cut_in_the_middle_of_complete_job_tells_it_again_and_the_app_is_not_asked_again(
    world: SaladWorld, applied: bool
) -> None:
    gate = Gate(first_only=True)
    world.app.reply = gate
    with cable(world) as (line, environment), world.idle_worker(env=environment) as worker:
        job_id = world.submit()
        gate.wait()
        line.proxy.set(stall_down=applied, stall_up=not applied)
        gate.open()
        if applied:
            world.at("succeeded", job_id)
        else:
            worker.wait_for("phase", phase="settle")
            assert not world.calls("CompleteJob")
        cut = line.drop()
        line.proxy.clear()
        worker.wait_for("job_settled", outcome="done", told=True)
        world.done_once(job_id)
        assert worker.find("queue_unreachable")
        world.prompt(f"connection cut in CompleteJob, applied: {applied}", max(cut, world.at("succeeded", job_id)))


@pytest.mark.parametrize("applied", [True, False])
@pytest.mark.parametrize("code", [Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED])
def test_a_complete_job_that_fails_with_the_stream_is_told_again_and_the_app_is_not_asked_again(
    world: SaladWorld, code: grpc.StatusCode, applied: bool
) -> None:
    with world.idle_worker():
        world.salad.faults.fail("CompleteJob", code, applied=applied)

        def dropping(request: Request) -> Reply:
            world.salad.drop_streams()
            world.app.reply = answers(OK)
            return OK

        world.app.reply = dropping
        job_id = world.submit()
        world.done_once(job_id)
        world.prompt(f"CompleteJob {code.name}, applied: {applied}", world.at("succeeded", job_id))
        assert not world.calls("RejectJob")


@HOW
def test_a_stream_dropped_after_the_job_costs_nothing(world: SaladWorld, how: str) -> None:
    with cable(world, how) as (line, environment), world.idle_worker(env=environment):
        world.done_once(world.submit())
        dropped = line.drop()
        job_id = world.submit()
        world.prompt(f"stream {how} after the job", dropped, job_id)
        world.done_once(job_id)


def test_a_stream_that_hangs_is_noticed_and_opened_again(world: SaladWorld) -> None:
    gate = Gate(first_only=True)
    world.app.reply = gate
    with (
        cable(world) as (line, environment),
        world.idle_worker(env={**environment, "HEELER_SALAD_SILENCE": "2"}) as worker,
    ):
        job_id = world.submit()
        gate.wait()
        line.proxy.set(stall=True)
        worker.wait_for("queue_silent")
        line.proxy.clear()
        recovered = time.monotonic()
        gate.open()
        world.done_once(job_id)
        world.prompt("a hanging stream", max(recovered, world.at("succeeded", job_id)))


def test_streams_dropped_at_random_never_make_the_app_do_a_job_twice(world: SaladWorld) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    rng = random.Random(seed)

    def computes(_request: Request) -> Reply:
        time.sleep(rng.uniform(0, 0.05))
        return OK

    world.app.reply = computes
    with cable(world) as (line, environment), world.idle_worker(env=environment):
        jobs = [world.submit(number=number) for number in range(40)]
        drops = 0
        while not all(world.salad.job(job_id).status.final for job_id in jobs):
            time.sleep(rng.uniform(0.0, 0.6))
            line.drop()
            drops += 1
            assert drops < 200, world.logs()
        assert drops > 3
        for job_id in jobs:
            assert world.salad.job(job_id).status is JobStatus.SUCCEEDED
            assert len(world.app.of(job_id)) == 1
        assert not world.calls("RejectJob")
        world.prompt("streams dropped at random", time.monotonic())


# The server, the token, the metadata service.


def test_a_server_that_is_away_for_5_s_costs_no_try(world: SaladWorld) -> None:
    early, late = Gate(first_only=True), Gate(first_only=True)
    gates = {"early": early, "late": late}

    def reply(request: Request) -> Reply:
        gate = gates.get(json.loads(request.body).get("gate", ""))
        return OK if gate is None else gate(request)

    world.app.reply = reply
    world.app.start()
    other = world.salad.add_machine("machine-2")
    with ExitStack() as stack:
        jobs = []
        for name, machine in (("early", world.salad.machine), ("late", other)):
            stack.enter_context(world.worker("--app-url", world.app.url, name=name, machine=machine))
            jobs.append(world.submit(gate=name))
            gates[name].wait()
        following = world.submit()
        world.salad.stop()
        threading.Timer(2.0, early.open).start()  # its answer finds no server
        time.sleep(5.0)
        world.salad.start()
        recovered = time.monotonic()
        world.prompt("server restarted in a job", recovered, following)
        late.open()
        for job_id in (*jobs, following):
            world.done_once(job_id)


def test_a_token_that_expires_in_a_job_costs_no_try(world: SaladWorld) -> None:
    with world.idle_worker():
        for dropped in (False, True):
            gate = world.app.reply = Gate(first_only=True)
            job_id = world.submit()
            gate.wait()
            world.salad.expire_tokens()
            if dropped:
                world.salad.drop_streams()
                world.comes_back_for(job_id)
            gate.open()
            world.done_once(job_id)
            world.prompt(f"token expired in a job, stream dropped: {dropped}", gate.opened)


AWAY = 60.0


def test_a_metadata_service_that_is_away_for_60_s_at_the_start_or_in_the_middle_costs_no_try(tmp_path: Path) -> None:
    """All at once: one machine without it at the start, one in a job with a token that expires, one that has all."""
    worlds = {name: SaladWorld(tmp_path / name, grace=300.0) for name in ("start", "middle", "idle")}
    with ExitStack() as stack:
        for name, world in worlds.items():
            world.folder.mkdir()
            stack.enter_context(world.running())
            if name == "start":
                world.salad.machine.stop()
        start, middle, idle = worlds.values()
        middle.salad.imds.token_lifetime = 3.0
        gate = middle.app.reply = Gate(first_only=True)
        start.app.start()
        stack.enter_context(start.worker("--app-url", start.app.url))
        for world in (middle, idle):
            stack.enter_context(world.idle_worker())
        in_hand = middle.submit()
        gate.wait()
        began = time.monotonic()
        for world in (middle, idle):
            world.salad.imds.fail(503)
        waiting = {world: world.submit(next=True) for world in (start, middle)}
        away_until(began, AWAY / 2)
        middle.salad.drop_streams()
        idle.done_once(idle.submit())  # it needs nobody
        gate.open()  # its answer can't be told for a long time
        away_until(began, AWAY - 5)
        idle.done_once(idle.submit())
        away_until(began, AWAY)
        assert start.untouched(waiting[start])
        assert middle.untouched(waiting[middle])
        assert middle.salad.job(in_hand).status is JobStatus.RUNNING
        start.salad.machine.start()
        for world in (middle, idle):
            world.salad.imds.heal()
        recovered = time.monotonic()
        middle.prompt("metadata service away in a job, token expired", recovered, waiting[middle])
        start.prompt("metadata service away at the start", recovered, waiting[start])
        middle.done_once(in_hand)
        for world, job_id in waiting.items():
            world.done_once(job_id)
        idle.prompt("metadata service away while all is well", recovered)


def away_until(began: float, seconds: float) -> None:
    """The outage is itself the time that passes."""
    time.sleep(max(0.0, began + seconds - time.monotonic()))


# Bodies.


@pytest.mark.parametrize("size", [10_000_000, (10 << 20) - 256], ids=["10 MB", "all that the queue takes"])
def test_bodies_of_10_mb_go_both_ways_byte_for_byte(world: SaladWorld, size: int) -> None:
    world.app.reply = lambda request: (200, {}, request.body[::-1])
    data = random.Random(size).randbytes(size)
    with world.idle_worker():
        began = time.monotonic()
        job = world.done(world.salad.submit(data), timeout=60)
        print(f"FIGURE {size} bytes both ways: {time.monotonic() - began:.2f} s")
        request = world.app.wait(job.id)
        assert hashlib.sha256(request.body).digest() == hashlib.sha256(data).digest()
        assert job.output is not None
        assert hashlib.sha256(job.output).digest() == hashlib.sha256(data[::-1]).digest()
        world.prompt("10 MB", time.monotonic())


@pytest.mark.parametrize("size", [10 << 20, (10 << 20) + 1], ids=["more than the queue takes", "more than we take"])
def test_an_answer_that_is_too_large_is_rejected_with_the_reason_and_the_next_job_is_done(
    world: SaladWorld, size: int
) -> None:
    world.app.reply = answers((200, {}, bytes(size)), OK)
    with world.idle_worker() as worker:
        job_id = world.submit()
        world.done(job_id, tries=2)
        assert [call.job_id for call in world.calls("RejectJob")] == [job_id]
        said = worker.find("answer_refused") + worker.find("job_settled", outcome="fail")
        assert len(said) == 1
        assert "bytes" in (said[0].get("reason") or said[0]["error"]) or "larger" in said[0]["error"]


# Failures that pass are tried again here; others spend a try.


@pytest.mark.parametrize("status", [429, 503])
def test_an_app_that_is_overloaded_twice_is_asked_again_here(world: SaladWorld, status: int) -> None:
    world.app.reply = answers((status, {}, b""), (status, {}, b""), OK)
    with world.idle_worker():
        job_id = world.submit()
        assert world.done(job_id).output == b"done"
        assert len(world.app.of(job_id)) == 3
        assert not world.calls("RejectJob")


def test_a_crash_of_the_app_in_a_job_is_tried_again_here_with_a_new_process(world: SaladWorld) -> None:
    text = "def reply(request, job, id):\n    if not (W / 'crashed').exists(): tell('crashed'); os._exit(9)\n"
    with world.worker(*world.program(text + "    return 200, b'answer'\n")) as worker:
        job_id = world.submit()
        assert world.done(job_id).output == b"answer"
        assert worker.wait_for("app_ended")["error"] == "exit code 9"
        assert "exit code 9" in worker.wait_for("tried_again_here")["error"]
        took = world.at("succeeded", job_id) - worker.find("app_ended")[0]["_seen"]
        print(f"FIGURE crash in a job: done {took:.2f} s later")
    assert len({call["pid"] for call in world.program_calls(job_id)}) == 2
    assert not world.calls("RejectJob")


def test_an_app_that_refuses_connections_for_a_while_is_waited_for_here(world: SaladWorld) -> None:
    with world.idle_worker() as worker:
        world.done_once(world.submit())
        world.app.stop()
        job_id = world.submit()
        worker.wait_for("tried_again_here")
        world.app.start()
        up = time.monotonic()
        world.done_once(job_id)
        took = world.at("succeeded", job_id) - up
        print(f"FIGURE connection refused: done {took:.2f} s after the app is back")
        assert took < 3


@pytest.mark.parametrize("tries", [1, 2])
def test_after_app_tries_the_job_is_rejected_once(world: SaladWorld, tries: int) -> None:
    world.app.reply = answers(*[(503, {}, b"")] * tries, OK)
    with world.idle_worker(HEELER_APP_TRIES=f"{tries}"):
        job_id = world.submit()
        world.done(job_id, tries=2)
        assert len(world.app.of(job_id)) == tries + 1
        assert [call.job_id for call in world.calls("RejectJob")] == [job_id]


def test_a_500_is_rejected_at_once_and_after_four_tries_of_the_queue_the_next_job_is_done(world: SaladWorld) -> None:
    bad = world.submit(bad=True)
    world.app.reply = lambda request: (500, {}, b"") if b"bad" in request.body else OK
    with world.idle_worker():
        job = world.salad.wait_for(bad)
        assert (job.status, job.tries) == (JobStatus.FAILED, 4)
        assert len(world.app.of(bad)) == 4
        world.prompt("a job failed for good", world.at("failed", bad))


# Limits and cancellation.


@pytest.mark.parametrize("count", [1, 3])
def test_max_jobs_takes_so_many_and_spends_no_try_of_the_next(world: SaladWorld, count: int) -> None:
    jobs = [world.submit(number=number) for number in range(count + 2)]
    world.app.start()
    with world.worker("--app-url", world.app.url, "--max-jobs", f"{count}") as worker:
        assert worker.wait() == 0
    for job_id in jobs[:count]:
        world.done_once(job_id)
    assert all(world.untouched(job_id) for job_id in jobs[count:])


def test_a_job_cancelled_at_the_queue_stops_the_program_and_reports_nothing(world: SaladWorld) -> None:
    text = "def reply(request, job, id):\n    if 'long' in job: tell('runs', os.getpid()); await_('never')\n"
    with world.worker(*world.program(text + "    return 200, b'answer'\n")) as worker:
        job_id = world.submit(long=True)
        pid = int(world.told("runs"))
        following = world.submit()
        cancelled = time.monotonic()
        world.salad.cancel(job_id)
        world.done(following)
        print(f"FIGURE cancelled: the next is done {world.at('succeeded', following) - cancelled:.2f} s later")
        worker.wait_for("job_settled", outcome="lost", job_id=job_id)
        assert not alive(pid)
        assert {call["pid"] for call in world.program_calls(following)} != {pid}
    assert len(world.program_calls(job_id)) == 1
    assert not world.calls("CompleteJob", job_id)
    assert not world.calls("RejectJob")
    assert world.salad.job(job_id).status is JobStatus.CANCELLED


# The machine.


def test_max_job_failures_in_a_row_lead_to_another_machine_and_no_job_is_taken(world: SaladWorld) -> None:
    bad, following = world.submit(), world.submit()
    world.app.reply = lambda request: (500, {}, b"")
    world.app.start()
    with world.worker("--app-url", world.app.url, MAX_JOB_FAILURES="2") as worker:
        eventually(lambda: world.salad.imds.reallocations, "it asks to be moved")
        reasons = [reason for _, reason in world.salad.imds.reallocations]
        assert reasons == ["2 failures in a row on this machine; the last: the app answered 500"]
        assert world.salad.streams() == 0
        assert world.salad.job(bad).tries == 2
        assert world.untouched(following)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert len(world.calls("AcceptJobs")) == 1
    assert world.untouched(following)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"HEELER_CHECK_COMMAND": "sh -c 'echo no GPU here; exit 3'"}, "exit code 3: no GPU here"),
        ({"HEELER_CHECK_DISK": f"{1 << 60}"}, "GB asked for by --check-disk"),
    ],
    ids=["command", "disk"],
)
def test_a_check_that_fails_leads_to_another_machine_and_no_job_is_taken(
    world: SaladWorld, setting: dict[str, str], words: str
) -> None:
    job_id = world.submit()
    world.app.start()
    with world.worker("--app-url", world.app.url, env=setting) as worker:
        reason = eventually(lambda: [*world.salad.imds.reallocations], "it asks to be moved")[0][1]
        assert words in reason
        assert worker.wait_for("machine_unfit")["error"] == reason
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
    assert not world.calls("AcceptJobs")
    assert world.untouched(job_id)


def test_the_deletion_cost_is_0_then_grows_with_the_job_then_the_most_while_outputs_upload_then_0(
    world: SaladWorld, storage: S3Server
) -> None:
    gate = Gate()

    def reply(request: Request) -> Reply:
        (Path(request.headers["heeler-output-dir"]) / "result").write_bytes(b"result")
        return gate(request)

    world.app.reply = reply

    def told(cost: int) -> None:
        eventually(lambda: world.salad.imds.deletion_cost == cost and world.salad.imds.deletion_costs, f"cost {cost}")

    upload = storage.faults.add(Stall(), operation="PutObject")
    entry = {"bucket": BUCKET, "prefix": "{job_id}/", "local_path": "work/{job_id}/out"}
    with world.idle_worker(env=storage_environment(storage)):
        told(0)
        job_id = world.submit(sync={"after": [entry]})
        gate.wait()
        told(1)
        gate.open()
        upload.wait_held(timeout=30)
        told(999_999_999)
        storage.faults.remove(upload)
        world.done_once(job_id)
        told(0)
    assert [cost for _, cost in world.salad.imds.deletion_costs] == [0, 1, 999_999_999, 0]
    assert storage.objects(BUCKET) == {f"{job_id}/result": b"result"}


# Names that users of Salad's worker know.


def test_salads_environment_alone_is_enough_to_find_queue_and_machine(world: SaladWorld) -> None:
    world.app.start()
    with world.worker(source=(), SALAD_LOG_LEVEL="warn") as worker:
        job_id = world.submit()
        world.done_once(job_id)
        request = world.app.wait(job_id)
        assert (request.method, request.path) == ("POST", "/run")
        assert request.headers["content-type"] == "application/json"
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 0
        assert worker.events == [], "there was nothing to warn of"
    environment = clean_environment(**world.salad.environment(SALAD_LOG_LEVEL="warn"))
    lines = heeler("config", "--json", env=environment, cwd=world.folder).stdout
    for name in ("SALAD_SERVICE_ENDPOINT", "SALAD_SERVICE_USE_TLS", "SALAD_METADATA_URI", "SALAD_LOG_LEVEL"):
        assert f"environment {name}" in lines


def test_tls_is_spoken_where_the_environment_says_so_and_never_a_token_without(world: SaladWorld) -> None:
    world.app.start()
    with world.worker("--app-url", world.app.url, SALAD_SERVICE_USE_TLS="true") as worker:
        worker.wait_for("queue_unreachable")  # the stand-in speaks none
        assert not world.calls("AcceptJobs")


# The runtime dies.

SAVES = (
    "def files(folder):\n"
    "    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob('*')\n"
    "            if p.is_file() and '.heeler' not in p.relative_to(folder).parts}\n"
    "def reply(request, job, id):\n"
    "    folder = Path(request.headers['Heeler-Checkpoint-Dir'])\n"
    "    attempt = request.headers['Heeler-Attempt']\n"
    "    tell('found-' + attempt, json.dumps(files(folder)))\n"
    "    if attempt == '1':\n"
    "        for n in range(4): (folder / f'part-{n}').write_text(f'{n}' * 1000000)\n"
    "        (folder / 'done').write_text('1'); await_('saved')\n"
    "        (folder / 'half-of-step-2').write_text('half'); tell('newer'); await_('never')\n"
    "    return 200, b'answer'\n"
)


def killed(worker: Worker) -> None:
    worker.process.kill()
    worker.wait()


def test_a_job_of_a_killed_runtime_is_taken_up_again_in_the_same_try_with_its_folders_as_they_were(
    world: SaladWorld, storage: S3Server
) -> None:
    program = world.program(SAVES)
    environment = storage_environment(storage)
    with world.worker(*program, env=environment) as first:
        job_id = world.submit(sync=snapshots("done"))
        first.wait_for("committed")
        world.tell("saved")
        world.told("newer")
        killed(first)
    prefix = Prefix(storage, job_id)
    expected = {name: data.decode() for name, data in prefix.files(1).items()}
    assert set(expected) == {"done", "part-0", "part-1", "part-2", "part-3"}
    (old,) = world.program_calls(job_id)
    storage.stats.reset()
    restarted = time.monotonic()
    with world.worker(*program, env=environment) as second:
        assert world.done(job_id).output == b"answer"
        assert second.wait_for("job_received")["attempt"] == 2
    print(f"FIGURE killed while the app computes: done {world.at('succeeded', job_id) - restarted:.2f} s after start")
    assert json.loads(world.told("found-2")) == expected
    assert json.loads(world.told("found-1")) == {}
    assert not [read for read in storage.stats.find("GetObject") if "/packs/" in read.key], "it was on this disk"
    new = world.program_calls(job_id)[-1]
    assert not alive(old["pid"])
    assert new["pid"] != old["pid"]
    assert [call.job_id for call in world.calls("AcceptJobs")][:2] == ["", job_id]
    assert not world.calls("RejectJob")


def test_a_job_whose_runtime_is_killed_again_and_again_stays_in_its_first_try(world: SaladWorld) -> None:
    program = world.program("def reply(request, job, id): await_('go'); return 200, b'done'\n")
    job_id, following = world.submit(), world.submit()
    for life in range(1, 4):
        with world.worker(*program) as worker:
            eventually(lambda: world.program_calls(job_id)[life - 1 :], f"life {life} has the job with the app")  # noqa: B023
            killed(worker)
    world.tell("go")
    with world.worker(*program):
        world.done(job_id)
        world.done(following)
        pids = [call["pid"] for call in world.program_calls(job_id)]
        assert [pid for pid in pids if alive(pid)] == pids[3:]
    assert len(set(pids)) == 4
    assert [call["attempt"] for call in world.program_calls(job_id)] == ["1", "2", "3", "4"]
    assert not world.calls("RejectJob")
    assert [call.job_id for call in world.calls("AcceptJobs")] == ["", job_id, job_id, job_id]


def test_an_app_that_something_else_started_is_given_the_job_of_a_killed_runtime_again(world: SaladWorld) -> None:
    gate = world.app.reply = Gate(first_only=True)
    with world.idle_worker() as first:
        job_id, following = world.submit(), world.submit()
        gate.wait()
        killed(first)
    gate.open()  # its answer finds nobody, and it is idle
    with world.worker("--app-url", world.app.url):
        world.done(job_id)
        world.done_once(following)
    assert [request.headers["heeler-attempt"] for request in world.app.of(job_id)] == ["1", "2"]
    assert [call.job_id for call in world.calls("AcceptJobs")] == ["", job_id]
    assert not world.calls("RejectJob")


@pytest.mark.parametrize("applied", [False, True])
def test_the_answer_of_a_killed_runtime_is_sent_by_the_next_without_asking_the_app_again(
    world: SaladWorld, applied: bool
) -> None:
    text = "def reply(request, job, id): return 200, id.encode()\n"
    program = world.program(text)
    if not applied:
        world.salad.faults.fail("CompleteJob", Code.UNAVAILABLE, FOREVER)
    with world.worker(*program) as first:

        def stop(event: str, _job: Job) -> None:
            if event == "succeeded" and first.process.returncode is None:
                first.signal(signal.SIGSTOP)  # before it hears that its answer is there

        world.salad.call(world.salad.state.listeners.append, stop)
        job_id = world.submit()
        world.wait_calls("CompleteJob")
        if applied:
            world.at("succeeded", job_id)
        killed(first)
    world.salad.faults.clear()
    assert (world.folder / "state-a/salad.answer").exists()
    restarted = time.monotonic()
    with world.worker(*program) as second:
        assert world.done(job_id).output == job_id.encode()
        following = world.submit()
        assert world.done(following).output == following.encode()
        second.wait_for("job_settled", outcome="done", job_id=following)
        took = world.at("succeeded", following) - restarted
        print(f"FIGURE killed before CompleteJob, applied: {applied}: the next is done {took:.2f} s after start")
    assert len(world.program_calls(job_id)) == 1
    assert not world.calls("RejectJob")
    assert not (world.folder / "state-a/salad.answer").exists()
