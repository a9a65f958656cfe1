"""FAULTS.md, Salad Job Queue worker 0.6.0: what its worker gets wrong, ours does right."""

from __future__ import annotations

import base64
import json
import signal
import time
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from heeler.local.queue_model import End, JobStatus
from tests.acceptance.salad_world import OK, App, Gate, Reply, Request, SaladWorld
from tests.acceptance.world import alive, eventually
from tests.support.worker import Worker, clean_environment, heeler

Code = grpc.StatusCode
FOREVER = float("inf")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[SaladWorld]:
    with SaladWorld(tmp_path).running() as made:
        yield made


# 1. NOT_FOUND or CANCELLED on AcceptJobs left a process that lives but takes no job.


@pytest.mark.parametrize("code", [Code.NOT_FOUND, Code.CANCELLED])
def test_after_not_found_and_cancelled_at_the_start_it_takes_jobs(world: SaladWorld, code: grpc.StatusCode) -> None:
    world.salad.faults.fail("AcceptJobs", code, times=2)
    with world.idle_worker() as worker:
        recovered = world.calls("AcceptJobs")[1].time
        world.prompt(f"AcceptJobs answers {code.name} twice at the start", recovered)
        assert len(world.calls("AcceptJobs")) == 3
        assert worker.find("queue_unreachable")


@pytest.mark.parametrize("code", [Code.NOT_FOUND, Code.CANCELLED])
def test_after_not_found_and_cancelled_between_two_jobs_it_takes_the_next(
    world: SaladWorld, code: grpc.StatusCode
) -> None:
    with world.idle_worker():
        world.done_once(world.submit())
        world.salad.faults.fail("AcceptJobs", code)
        world.salad.drop_streams(End.CANCELLED if code is Code.CANCELLED else End.DROPPED)
        refused = world.wait_calls("AcceptJobs", 2)[1].time
        world.prompt(f"AcceptJobs answers {code.name} between two jobs", refused)


def test_not_found_for_the_current_job_stops_it_and_the_next_is_taken(world: SaladWorld) -> None:
    gate = Gate(first_only=True)
    world.app.reply = gate
    with world.idle_worker() as worker:
        job_id = world.submit()
        gate.wait()
        world.salad.faults.fail("AcceptJobs", Code.NOT_FOUND)
        world.salad.drop_streams()
        refused = world.wait_calls("AcceptJobs", 2)[1]
        assert refused.job_id == job_id
        worker.wait_for("job_settled", outcome="lost")
        # The queue gives it to us once more, as a new try.
        job = world.done(job_id, tries=2)
        assert job.output == b"done"
        assert len(world.app.of(job_id)) == 2
        assert [call.job_id for call in world.calls("CompleteJob")] == [job_id]
        world.prompt("the job is taken away", world.at("succeeded", job_id))


def test_cancelled_while_the_app_computes_keeps_the_job(world: SaladWorld) -> None:
    gate = Gate()
    world.app.reply = gate
    with world.idle_worker():
        job_id = world.submit()
        gate.wait()
        world.salad.faults.fail("AcceptJobs", Code.CANCELLED, times=2)
        world.salad.drop_streams()
        assert [call.job_id for call in world.wait_calls("AcceptJobs", 4)] == ["", job_id, job_id, job_id]
        recovered = gate.open()
        world.done_once(job_id)
        world.prompt("AcceptJobs answers CANCELLED twice in a job", recovered)


# 2. One 500 from IMDS at start: no stream for 120 s.


@pytest.mark.parametrize("path", ["/v1/status", "/v1/token"])
def test_one_500_from_imds_at_the_start_delays_the_stream_by_less_than_3_s(world: SaladWorld, path: str) -> None:
    failed: list[float] = []

    def imds(request: Request) -> Reply:
        if request.path == path and not failed:
            failed.append(time.monotonic())
            return 500, {}, b"{}"
        found = {"/v1/status": {"ready": True, "started": True}, "/v1/token": {"jwt": world.salad.machine.token()}}
        return 200, {}, json.dumps(found.get(request.path, {"deletion_cost": 0})).encode()

    metadata = App(imds)
    metadata.start()
    began = time.monotonic()
    try:
        with world.idle_worker(SALAD_METADATA_URI=metadata.url):
            opened = time.monotonic()
            later, after_start = opened - failed[0], opened - began
            print(f"FIGURE 500 from {path}: stream {later:.2f} s later, {after_start:.2f} s after start")
            assert later < 3
            world.done_once(world.submit())
    finally:
        metadata.stop()


# 3. SIGTERM in a job: it exited at once, the app's request was aborted, nothing was rejected.

GRACE = 4.0
TOLD = "signal.signal(signal.SIGTERM, lambda *_: (tell('told'), {then}))\n"
WAITS = "def reply(request, job, id): tell('runs', os.getpid()); await_('go'); return 200, b'answer'\n"


def terminated(worker: Worker) -> float:
    """SIGTERM, and the exit with 0; the seconds that it took."""
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.lines[-30:]
    return time.monotonic() - asked


def test_sigterm_in_a_job_tells_the_app_and_rejects_the_job_and_takes_no_other(world: SaladWorld) -> None:
    program = world.program(TOLD.format(then="os._exit(0)") + WAITS)
    with world.worker(*program) as worker:
        job_id, following = world.submit(), world.submit()
        pid = int(world.told("runs"))
        took = terminated(worker)
    print(f"FIGURE SIGTERM in a job: exit after {took:.2f} s")
    assert took < GRACE
    assert (world.folder / "told").exists()
    assert not alive(pid)
    assert [call.job_id for call in world.calls("RejectJob")] == [job_id]
    assert not world.calls("CompleteJob")
    job = world.salad.job(job_id)
    assert (job.status, job.tries) == (JobStatus.PENDING, 1)
    assert world.untouched(following)
    assert world.salad.streams() == 0


def test_sigterm_in_a_job_of_an_app_that_ignores_it_rejects_the_job_inside_the_grace(world: SaladWorld) -> None:
    program = world.program(TOLD.format(then="None") + WAITS)
    with world.worker(*program, HEELER_STOP_GRACE=f"{GRACE}") as worker:
        job_id, following = world.submit(), world.submit()
        pid = int(world.told("runs"))
        assert terminated(worker) < GRACE
    assert (world.folder / "told").exists()
    assert not alive(pid)
    assert [call.job_id for call in world.calls("RejectJob")] == [job_id]
    assert world.untouched(following)


def test_sigterm_in_a_job_that_the_app_answers_all_the_same_completes_it(world: SaladWorld) -> None:
    program = world.program(TOLD.format(then="tell('go')") + WAITS)
    with world.worker(*program, HEELER_STOP_GRACE=f"{GRACE}") as worker:
        job_id, following = world.submit(), world.submit()
        world.told("runs")
        assert terminated(worker) < GRACE
    assert world.done(job_id).output == b"answer"
    assert not world.calls("RejectJob")
    assert world.untouched(following)


def test_sigterm_in_a_job_of_an_app_that_something_else_started_rejects_the_job(world: SaladWorld) -> None:
    gate = Gate()
    world.app.reply = gate
    with world.idle_worker(HEELER_STOP_GRACE=f"{GRACE}") as worker:
        job_id, following = world.submit(), world.submit()
        gate.wait()
        assert terminated(worker) < GRACE
    assert [call.job_id for call in world.calls("RejectJob")] == [job_id]
    assert world.untouched(following)


# 4. The app isn't listening yet: the job was rejected within 3 ms.

LATE = 3.0


def test_a_program_that_starts_slowly_is_sent_no_job_before_it_listens(world: SaladWorld) -> None:
    job_id = world.submit()
    text = f"time.sleep({LATE})\ndef reply(request, job, id): return 200, b'answer'\n"
    with world.worker(*world.program(text)):
        assert world.done(job_id).output == b"answer"
    listening = float(world.told("listening"))
    assert world.calls("AcceptJobs")[0].time > listening
    took = world.at("started", job_id) - listening
    print(f"FIGURE slow program: its job is sent {took:.2f} s after it listens")
    assert took < 2
    assert not world.calls("RejectJob")


@pytest.mark.parametrize("named", [True, False])
def test_an_app_that_comes_up_late_is_waited_for_and_no_job_is_rejected(world: SaladWorld, named: bool) -> None:
    job_id = world.submit()
    with world.worker(*(("--app-url", world.app.url) if named else ())):
        if not named:  # only the job says where the app is
            world.at("started", job_id)
        absent_until = time.monotonic() + LATE
        eventually(lambda: time.monotonic() >= absent_until, "3 s without an app")
        assert world.untouched(job_id) is named
        assert not world.calls("RejectJob")
        world.app.start()
        up = time.monotonic()
        world.done_once(job_id)
        took = world.app.wait(job_id).time - up
        print(f"FIGURE late app ({'--app-url' if named else 'named by the job'}): called {took:.2f} s after it is up")
        assert took < 2


# 5. A hanging app was waited for without limit.

HANGS_ONCE = (
    "def reply(request, job, id):\n"
    "    if (W / 'hung').exists(): return 200, b'answer'\n"
    "    tell('hung', os.getpid()); {how}\n"
)
SILENT = "await_('never')"
DRIPS = (
    "request.wfile.write(b'HTTP/1.1 200 OK\\r\\nContent-Length: 1000000\\r\\n\\r\\n')\n"
    "    while True: request.wfile.write(b'.'); time.sleep(0.1)"
)


@pytest.mark.parametrize(
    ("how", "flag", "words"),
    [
        (SILENT, "--app-silence", "the app hangs: nothing came for 2 s"),
        (SILENT, "--app-timeout", "the app took longer than 2 s"),
        (DRIPS, "--app-timeout", "the app took longer than 2 s"),
    ],
    ids=["silent", "slow", "dripping"],
)
def test_a_hanging_app_is_given_up_in_time_its_job_rejected_and_the_program_started_anew(
    world: SaladWorld, how: str, flag: str, words: str
) -> None:
    program = world.program(HANGS_ONCE.format(how=how))
    with world.worker(flag, "2", *program) as worker:
        job_id = world.submit()
        hung = int(world.told("hung"))
        since = time.monotonic()
        assert world.wait_calls("RejectJob")[0].job_id == job_id
        took = time.monotonic() - since
        print(f"FIGURE {flag} 2: rejected after {took:.2f} s")
        assert 1.5 < took < 6
        assert worker.wait_for("job_settled", outcome="retry")["reason"] == words
        assert world.done(job_id, tries=2).output == b"answer"
        worker.wait_for("app_restarted")
    assert not alive(hung)
    pids = [call["pid"] for call in world.program_calls(job_id)]
    assert pids[0] == hung
    assert len(set(pids)) == 2
    assert len(world.calls("RejectJob")) == 1


# 6. Persistent UNAVAILABLE: 18 calls in 5 s, no growing backoff.


def gaps_of(times: list[float]) -> list[float]:
    return [later - earlier for earlier, later in pairwise(times)]


def grow(gaps: list[float]) -> bool:
    """Delays that double, with a jitter of half: of three, the last is more than the first."""
    return all(third > first for first, third in zip(gaps, gaps[2:], strict=False))


def test_a_queue_that_always_says_unavailable_is_asked_at_growing_intervals(world: SaladWorld) -> None:
    world.salad.faults.fail("AcceptJobs", Code.UNAVAILABLE, FOREVER)
    world.app.start()
    job_id = world.submit()
    with world.worker("--app-url", world.app.url) as worker:
        times = [call.time for call in world.wait_calls("AcceptJobs", 5)]
        eventually(lambda: time.monotonic() > times[0] + 6, "6 s of it")
        times = [call.time for call in world.calls("AcceptJobs")]
        within = sum(when < times[0] + 6 for when in times)
        print(f"FIGURE UNAVAILABLE: {within} calls in 6 s, gaps {[round(gap, 2) for gap in gaps_of(times)]}")
        assert within <= 6
        assert grow(gaps_of(times))
        assert len(worker.find("queue_unreachable")) == 1, "said once, not at each call"
        assert world.untouched(job_id)


def test_an_answer_that_is_always_refused_with_unavailable_is_told_again_at_growing_intervals(
    world: SaladWorld,
) -> None:
    with world.idle_worker():
        world.salad.faults.fail("CompleteJob", Code.UNAVAILABLE, FOREVER)
        job_id = world.submit()
        times = [call.time for call in world.wait_calls("CompleteJob", 5)]
        print(f"FIGURE UNAVAILABLE on CompleteJob: gaps {[round(gap, 2) for gap in gaps_of(times)]}")
        assert grow(gaps_of(times))
        world.salad.faults.clear()
        world.done_once(job_id)


# 7. The token was logged at debug level; redirects were followed, and turned a POST into a GET.


def in_all_forms(tokens: list[str]) -> list[bytes]:
    """Each token, its claims and its signature, as they are and encoded once more."""
    plain = {part for token in tokens for part in (token, *token.split(".")[1:])}
    return [form for part in plain for form in (part.encode(), base64.b64encode(part.encode()))]


def test_the_token_is_in_no_log_line_no_file_no_status_and_not_in_the_program(
    world: SaladWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens: list[str] = []
    issue = world.salad.tokens.issue

    def noted(*arguments: Any) -> str:
        tokens.append(issue(*arguments))
        return tokens[-1]

    monkeypatch.setattr(world.salad.tokens, "issue", noted)
    text = "def reply(request, job, id):\n    tell('environ', Path('/proc/self/environ').read_text())\n"
    text += "    tell('headers', request.headers); return 200, b'answer'\n"
    seen: dict[str, bytes] = {}
    with world.worker(*world.program(text), control="127.0.0.1:0", SALAD_LOG_LEVEL="debug") as worker:
        world.done(world.submit())
        # Whatever goes wrong with tokens and calls is put into words, too.
        world.salad.expire_tokens()
        world.salad.drop_streams()
        world.done(world.submit())
        for code in (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED, Code.INTERNAL):
            world.salad.faults.fail("AcceptJobs", code, times=2)
            world.salad.faults.fail("CompleteJob", code, times=2)
            world.salad.drop_streams()
            world.done(world.submit())
        world.salad.machine.stop()
        world.salad.expire_tokens()
        world.salad.drop_streams()
        worker.wait_for("machine_unreachable")
        world.salad.machine.start()
        # A job in hand, so that the state folder holds all that it ever does.
        world.salad.faults.fail("CompleteJob", Code.UNAVAILABLE, FOREVER)
        held = world.submit()
        eventually(lambda: world.calls("CompleteJob", held), "its answer is told")
        url = next((world.folder / "state-a").glob("control*")).read_text().strip()
        for path in ("/v1/status", "/metrics"):
            with urllib.request.urlopen(f"{url}{path}", timeout=10) as answer:
                seen[path] = answer.read()
        for file in (world.folder / "state-a").rglob("*"):
            if file.is_file():
                seen[str(file)] = file.read_bytes()
        seen["environ"], seen["headers"] = world.told("environ").encode(), world.told("headers").encode()
        environment = clean_environment(**world.salad.environment(SALAD_LOG_LEVEL="debug"))
        seen["config"] = heeler("config", env=environment, cwd=world.folder).stdout.encode()
        world.salad.faults.clear()
        terminated(worker)
        seen["log"], seen["stdout"] = "\n".join(worker.lines).encode(), worker.stdout
    assert len(tokens) >= 4
    assert b"AcceptJobs" in seen["log"]
    assert b"log_level" in seen["config"]
    assert any(name.endswith("salad.answer") for name in seen), "the file of an answer was among those read"
    forms = in_all_forms(tokens)
    assert {name: form for name, said in seen.items() for form in forms if form in said} == {}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_the_answer_of_the_job_and_nobody_goes_where_it_points(world: SaladWorld, status: int) -> None:
    target = App()
    target.start()
    moved: Reply = (status, {"Location": f"{target.url}/target"}, f"moved {status}".encode())
    world.app.reply = lambda request: moved if request.path == "/run" else OK
    try:
        with world.idle_worker():
            job_id = world.submit()
            assert world.done(job_id).output == moved[2]
    finally:
        target.stop()
    assert target.requests == []
    assert [(request.method, request.path) for request in world.app.requests] == [("POST", "/run")]
