"""`heeler run -- PROGRAM`: jobs as POSTs to the user's app, with real processes, signals and a queue in a folder."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from heeler.local.processes import free_port
from heeler.sources.base import JobRecord
from tests.acceptance.world import BUCKET, FAMILY, MEMBERS, World, alive, eventually
from tests.support.worker import Worker, clean_environment, heeler

APP = '''
import base64, json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

W = Path(os.environ["W"])
lock = threading.Lock()


def tell(name, text=""):
    new = W / f"{name}.{threading.get_ident()}.new"
    new.write_text(str(text))
    new.rename(W / name)


def note(name, text):
    with lock, open(W / name, "a") as file:
        file.write(f"{text}\\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        note("gets", self.path)
        self.answer(503 if (W / "sick").exists() else 200)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        headers = {name.lower(): value for name, value in self.headers.items()}
        note("calls", json.dumps({"path": self.path, "headers": headers, "body": base64.b64encode(body).decode()}))
        try:
            message = json.loads(body)
        except ValueError:
            message = {}
        do = message.get("do") or (message.get("arguments") or ["echo"])[0]
        getattr(self, do)(message, body)

    def answer(self, status, body=b"ok"):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def echo(self, message, body):
        self.answer(message.get("status", 200), body)

    def size(self, message, body):
        self.answer(message.get("status", 200), b"x" * message["bytes"])

    def first(self):
        """Whether this job is here for the first time."""
        job = self.headers["Heeler-Job-Id"]
        with lock:
            if (W / f"seen-{job}").exists():
                return False
            (W / f"seen-{job}").touch()
            return True

    def crash(self, message, body):
        if self.first():
            os._exit(7)
        self.answer(200)

    def hang(self, message, body):
        if self.first():
            tell("hanging")
            time.sleep(1000)
        self.answer(200)

    def wait(self, message, body):
        tell(f"begun-{self.headers['Heeler-Attempt']}")
        while not (W / "go").exists():
            time.sleep(0.005)
        self.answer(200, b"finished")
        if os.environ.get("ON_TERM") == "finish":
            os._exit(0)

    def work(self, message, body):
        read = (Path(self.headers["Heeler-Input-Dir"]) / "in.txt").read_text()
        (Path(self.headers["Heeler-Output-Dir"]) / "out.txt").write_text(read.upper())
        self.answer(200)

    def meet(self, message, body):
        out = Path(self.headers["Heeler-Output-Dir"])
        out.mkdir(parents=True, exist_ok=True)
        (out / "who.txt").write_text(self.headers["Heeler-Job-Id"])
        job = self.headers["Heeler-Job-Id"]
        (W / f"met-{job}").touch()
        while len(list(W.glob("met-*"))) < message["all"]:
            time.sleep(0.005)
        self.answer(200)

    def log_message(self, *_):
        pass


def on_term(*_):
    note("terms", os.getpid())
    how = os.environ.get("ON_TERM", "exit")
    if how == "exit":
        os._exit(0)
    if how == "finish":
        (W / "go").touch()


signal.signal(signal.SIGTERM, on_term)
note("starts", os.getpid())
if "DIES" in os.environ:
    sys.exit(int(os.environ["DIES"]))
while "SLOW" in os.environ and not (W / "listen").exists():
    time.sleep(0.005)
os.write(1, b"to stdout\\n")
os.write(2, b"to stderr\\n")
if "FAMILY" in os.environ:
    exec(os.environ["FAMILY"])
    tell("pid", os.getpid())
    while not all((W / name).exists() for name in os.environ["MEMBERS"].split()):
        time.sleep(0.005)
ThreadingHTTPServer.daemon_threads = True
ThreadingHTTPServer.request_queue_size = 100
ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("PORT", "0"))), Handler).serve_forever()
'''


class AppWorld:
    """A world with an app."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.program = world.folder / "app.py"
        self.program.write_text(APP)
        self.argv = [sys.executable, str(self.program)]

    @contextmanager
    def worker(self, *flags: str, **environment: str) -> Iterator[Worker]:
        with self.world.worker(*flags, "--", *self.argv, W=str(self.world.folder), **environment) as worker:
            yield worker

    def submit(self, do: str = "echo", **fields: Any) -> str:
        return self.world.desk.submit_message(json.dumps({"do": do, **fields}).encode())

    def lines(self, name: str) -> list[str]:
        try:
            return (self.world.folder / name).read_text().splitlines()
        except FileNotFoundError:
            return []

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines("calls")]

    def done(self, job_id: str, timeout: float = 20.0) -> JobRecord:
        return self.world.wait_state("done", job_id, timeout)


@pytest.fixture
def app(world: World) -> AppWorld:
    return AppWorld(world)


def answer(record: JobRecord) -> tuple[int, bytes]:
    assert record.result is not None
    return record.result["status"], base64.b64decode(record.result["body"])


# Jobs.


def test_each_job_is_one_post_byte_for_byte_and_its_answer_is_kept(app: AppWorld) -> None:
    body = bytes(range(256)) * 1000
    ids = [app.world.desk.submit_message(body), app.submit(status=204), app.submit(status=201)]
    with app.worker("--max-jobs", "3", "--app-path", "/jobs/new?x=1") as worker:
        assert worker.wait() == 0
    assert answer(app.world.job(ids[0])) == (200, body)
    assert answer(app.world.job(ids[1])) == (204, b""), "a body after a 204 belongs to no answer"
    assert answer(app.world.job(ids[2]))[0] == 201
    calls = app.calls()
    assert base64.b64decode(calls[0]["body"]) == body
    assert [call["path"] for call in calls] == ["/jobs/new?x=1"] * 3
    assert [call["headers"]["heeler-job-id"] for call in calls] == ids
    assert {call["headers"]["heeler-attempt"] for call in calls} == {"1"}
    assert {call["headers"]["content-type"] for call in calls} == {"application/json"}
    assert len(app.lines("starts")) == 1
    assert len(app.lines("terms")) == 1, "it is asked to end when the work is done"


def test_a_message_with_a_sync_has_folders_that_are_restored_told_and_uploaded(app: AppWorld) -> None:
    entries = {"before": [app.world.entry("in")], "after": [app.world.entry("out")]}
    job = app.submit("work", sync=entries)
    app.world.storage.put(BUCKET, app.world.key("in/in.txt", job), b"hello")
    with app.worker("--max-jobs", "1") as worker:
        assert worker.wait() == 0
    assert app.world.stored("out/out.txt", job) == b"HELLO"
    assert app.world.job(job).state == "done"


@pytest.mark.parametrize(("status", "state"), [(404, "failed"), (302, "failed"), (500, "pending"), (429, "pending")])
def test_a_refusal_fails_the_job_or_has_it_tried_again(app: AppWorld, status: int, state: str) -> None:
    job = app.submit(status=status)
    with app.worker("--max-jobs", "1") as worker:
        assert worker.wait() == 0
    record = app.world.job(job)
    assert (record.state, record.failures, record.attempts) == (state, 1, 1)
    assert f"the app answered {status}" in record.reason
    assert len(app.calls()) == 1


def test_a_message_with_a_wrong_sync_fails_at_once_and_never_reaches_the_app(app: AppWorld) -> None:
    job = app.submit(sync={"before": [{"bucket": "b-1", "prefix": "../x", "local_path": "x"}]})
    good = app.submit()
    with app.worker("--max-jobs", "2") as worker:
        assert worker.wait() == 0
    assert "sync.before.0.prefix" in app.world.job(job).reason
    assert app.world.job(job).state == "failed"
    assert app.world.job(good).state == "done"
    assert len(app.calls()) == 1


@pytest.mark.parametrize("more", [0, 1])
def test_an_answer_may_have_as_many_bytes_as_the_limit_and_no_more(app: AppWorld, more: int) -> None:
    limit = 3_000_000
    job = app.submit("size", bytes=limit + more)
    after = app.submit()
    with app.worker("--max-jobs", "2", "--app-answer-bytes", str(limit)) as worker:
        assert worker.wait(60) == 0
    record = app.world.job(job)
    if more:
        assert record.state == "failed"
        assert f"more than {limit} bytes" in record.reason
        assert "--app-answer-bytes" in record.reason
    else:
        assert answer(record) == (200, b"x" * limit)
    assert app.world.job(after).state == "done"
    assert len(app.lines("starts")) == 1


def test_what_the_app_prints_is_passed_on_and_kept(app: AppWorld) -> None:
    app.submit()
    with app.worker("--max-jobs", "1") as worker:
        assert worker.wait() == 0
        assert b"to stdout\n" in worker.stdout
        assert "to stderr" in worker.lines
    kept = (app.world.folder / "state-a" / "app.log").read_text()
    assert "to stdout\n" in kept
    assert "to stderr\n" in kept


def test_several_jobs_at_a_time_each_have_folders_of_their_own(app: AppWorld) -> None:
    ids = [app.submit("meet", all=4) for _ in range(4)]
    folders = {"HEELER_OUTPUTS": f"s3://{BUCKET}/{{job_id}}/out/", "HEELER_OUTPUT_DIR": "work/{job_id}/out"}
    with app.worker("--max-jobs", "4", "--concurrency", "4", **folders) as worker:
        assert worker.wait() == 0
    for job in ids:
        assert app.world.job(job).state == "done"
        assert app.world.stored("out/who.txt", job) == job.encode()


def test_several_jobs_at_a_time_without_folders_of_their_own_are_refused(app: AppWorld) -> None:
    folders = {"HEELER_OUTPUTS": f"s3://{BUCKET}/{{job_id}}/out/", "HEELER_OUTPUT_DIR": "work/out"}
    with app.worker("--concurrency", "4", **folders) as worker:
        assert worker.wait() == 64
    assert "HEELER_OUTPUT_DIR" in worker.lines[-1]
    assert app.lines("starts") == []


def test_the_one_job_of_the_source_once_may_be_any_message(app: AppWorld) -> None:
    message = app.world.folder / "message.json"
    message.write_text('{"do": "echo", "prompt": "a cat"}')
    with Worker(
        *("--job", str(message), "--", *app.argv),
        state_dir=app.world.folder / "state-once",
        env=app.world.environment(W=str(app.world.folder)),
        cwd=app.world.folder,
    ) as worker:
        assert worker.wait() == 0, worker.lines[-20:]
    assert base64.b64decode(app.calls()[0]["body"]) == message.read_bytes()


# The app's health.


def test_no_job_is_taken_before_the_app_listens(app: AppWorld) -> None:
    """FAULTS, Salad 4."""
    job = app.submit()
    with app.worker("--max-jobs", "1", SLOW="1") as worker:
        eventually(lambda: app.lines("starts"), "the app started")
        # Longer than many looks at its ports; a worker that does not wait for the app has the job by then.
        worker.wait_for("phase", phase="receive")
        time.sleep(1.0)
        assert app.world.job(job).attempts == 0
        app.world.tell("listen")
        assert worker.wait() == 0
    record = app.world.job(job)
    assert (record.state, record.attempts, record.failures) == ("done", 1, 0)


def test_no_job_is_taken_while_the_app_says_that_it_is_not_well(app: AppWorld) -> None:
    with app.worker("--app-health-path", "/health") as worker:
        worker.wait_for("app_ready")
        app.done(app.submit())
        app.world.tell("sick")
        worker.wait_for("app_not_ready")
        job = app.submit()
        looks = len(app.lines("gets"))
        eventually(lambda: len(app.lines("gets")) > looks + 2, "it was asked again")
        assert app.world.job(job).attempts == 0
        (app.world.folder / "sick").unlink()
        app.done(job)


def test_a_crash_in_a_job_says_how_it_ended_and_the_job_is_done_by_the_next_life(app: AppWorld) -> None:
    job, after = app.submit("crash"), app.submit()
    with app.worker("--max-jobs", "3", HEELER_RETRY_DELAY="0.1") as worker:
        worker.wait_for("job_settled", job_id=job, outcome="retry")
        assert "exit code 7" in app.world.job(job).reason
        assert worker.wait() == 0
    record = app.world.job(job)
    assert (record.state, record.attempts, record.failures) == ("done", 2, 1)
    assert app.world.job(after).state == "done"
    assert len(app.lines("starts")) == 2


@pytest.mark.parametrize(
    ("flag", "words"), [("--app-silence", "nothing came for 1 s"), ("--app-timeout", "took longer than 1 s")]
)
def test_an_app_that_hangs_fails_the_attempt_and_is_started_anew(app: AppWorld, flag: str, words: str) -> None:
    """FAULTS, Salad 5."""
    job, after = app.submit("hang"), app.submit()
    with app.worker("--max-jobs", "3", flag, "1", HEELER_RETRY_DELAY="0.1") as worker:
        worker.wait_for("job_settled", job_id=job, outcome="retry")
        assert words in app.world.job(job).reason
        assert worker.wait() == 0
    assert (app.world.job(job).state, app.world.job(job).failures) == ("done", 1)
    assert app.world.job(after).state == "done"
    assert len(app.lines("starts")) == 2
    assert not alive(int(app.lines("starts")[0]))
    assert worker.find("app_restarted")
    assert not worker.find("app_ended"), "that was not its fault"


def test_a_cancelled_job_does_not_go_on_in_the_app(app: AppWorld) -> None:
    document = {"id": "job-1", "command": "app", "arguments": ["hang"], "heartbeat_interval": 0.2}
    app.world.desk.submit([json.dumps(document).encode()])
    with app.worker() as worker:
        app.world.told("hanging")
        (first,) = app.lines("starts")
        app.world.desk.cancel("job-1")
        worker.wait_for("app_restarted")
        assert not alive(int(first))
        app.done(app.submit())
    assert app.world.job("job-1").state == "cancelled"
    assert len(app.lines("starts")) == 2


def test_an_app_that_keeps_dying_ends_us_with_its_code(app: AppWorld) -> None:
    job = app.submit()
    with app.worker("--app-max-restarts", "1", DIES="7") as worker:
        assert worker.wait() == 7
    assert len(app.lines("starts")) == 2
    assert worker.find("app_given_up")
    assert app.world.job(job).attempts == 0


def test_an_app_that_can_not_be_started_ends_us_with_64(app: AppWorld) -> None:
    app.argv = ["no-such-program"]
    with app.worker() as worker:
        assert worker.wait() == 64
    assert "no-such-program" in "\n".join(worker.lines)


# Stopping.


def stop(worker: Worker, within: float) -> None:
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)
    assert worker.wait(within + 20) == 0, worker.lines[-30:]
    assert time.monotonic() - asked < within, worker.lines[-30:]
    assert not worker.find("exit_forced")


def test_sigterm_in_a_job_lets_the_app_answer(app: AppWorld) -> None:
    """FAULTS, Salad 3."""
    job = app.submit("wait")
    with app.worker(HEELER_STOP_GRACE="10", ON_TERM="finish") as worker:
        app.world.told("begun-1")
        stop(worker, within=5)
    assert answer(app.world.job(job)) == (200, b"finished")
    assert len(app.lines("terms")) == 1


def test_sigterm_in_a_job_hands_it_back_as_soon_as_the_app_has_ended(app: AppWorld) -> None:
    """FAULTS, Salad 3."""
    job = app.submit("wait", sync=app.world.checkpoints())
    with app.worker(HEELER_STOP_GRACE="20") as worker:
        app.world.told("begun-1")
        saved = app.world.path("ck/late.txt", job)
        saved.write_text("saved a moment before")
        stop(worker, within=6)
    record = app.world.job(job)
    assert (record.state, record.interruptions, record.failures) == ("pending", 1, 0)
    assert app.world.stored("ck/late.txt", job) == b"saved a moment before", "captured whole: it ended by itself"
    assert len(app.lines("terms")) == 1
    app.world.tell("go")
    with app.worker("--max-jobs", "1") as second:
        assert second.wait() == 0
    assert app.world.job(job).state == "done"


def test_sigterm_in_a_job_kills_an_app_that_ignores_it_inside_the_grace(app: AppWorld) -> None:
    job = app.submit("wait")
    with app.worker(HEELER_STOP_GRACE="6", ON_TERM="ignore", FAMILY=FAMILY_OF_APP, MEMBERS=" ".join(MEMBERS)) as worker:
        app.world.told("begun-1")
        pids = [app.world.told_pid(name) for name in MEMBERS]
        stop(worker, within=6)
    assert not any(alive(pid) for pid in pids)
    record = app.world.job(job)
    assert (record.state, record.interruptions, record.failures) == ("pending", 1, 0)


def test_sigterm_while_idle_ends_an_app_that_ignores_it_and_all_its_kin(app: AppWorld) -> None:
    with app.worker(HEELER_STOP_GRACE="3", ON_TERM="ignore", FAMILY=FAMILY_OF_APP, MEMBERS=" ".join(MEMBERS)) as worker:
        worker.wait_for("app_ready")
        pids = [app.world.told_pid(name) for name in MEMBERS]
        stop(worker, within=3)
    assert not any(alive(pid) for pid in pids)


def test_sigterm_while_the_app_starts_ends_both_at_once(app: AppWorld) -> None:
    with app.worker(SLOW="1") as worker:
        eventually(lambda: app.lines("starts"), "the app started")
        worker.wait_for("phase", phase="receive")
        stop(worker, within=3)
    assert not alive(int(app.lines("starts")[0]))


def test_with_several_jobs_each_is_handed_back_and_the_app_is_told_once(app: AppWorld) -> None:
    ids = [app.submit("wait") for _ in range(3)]
    with app.worker("--concurrency", "3", HEELER_STOP_GRACE="10") as worker:
        eventually(lambda: len(app.calls()) == 3, "all are with the app")
        stop(worker, within=6)
    assert [app.world.job(job).state for job in ids] == ["pending"] * 3
    assert len(app.lines("terms")) == 1


FAMILY_OF_APP = "import subprocess\n" + FAMILY.split("signal.signal(number, lambda *_: os._exit(0))\n")[1]


def test_kill_9_of_the_runtime_leaves_nothing_and_the_next_one_does_the_job_again(app: AppWorld) -> None:
    job = app.submit("wait")
    members = {"FAMILY": FAMILY_OF_APP, "MEMBERS": " ".join(MEMBERS)}
    with app.worker(**members) as worker:
        app.world.told("begun-1")
        pids = [app.world.told_pid(name) for name in MEMBERS]
        assert all(alive(pid) for pid in pids)
        worker.signal(signal.SIGKILL)
        worker.wait()
        eventually(lambda: not alive(pids[0]), "the app died with its runtime")
    with app.worker("--max-jobs", "1") as second:
        app.world.told("begun-2")
        assert not any(alive(pid) for pid in pids), "no two of it compute for one job"
        app.world.tell("go")
        assert second.wait() == 0
    record = app.world.job(job)
    assert (record.state, record.attempts, record.failures, record.interruptions) == ("done", 2, 0, 1)
    assert second.find("leftover_processes_killed")


def test_kill_9_of_the_runtime_with_several_jobs_frees_them_all_at_once(app: AppWorld) -> None:
    ids = [app.submit("wait") for _ in range(3)]
    with app.worker("--concurrency", "3") as worker:
        eventually(lambda: len(app.calls()) == 3, "all are with the app")
        worker.signal(signal.SIGKILL)
        worker.wait()
    app.world.tell("go")
    with app.worker("--concurrency", "3", "--max-jobs", "3") as second:
        assert second.wait(15) == 0  # a lease would take 30 s to lapse
    assert [(app.world.job(job).state, app.world.job(job).attempts) for job in ids] == [("done", 2)] * 3


def test_a_program_on_another_port_in_each_life_is_found_again(app: AppWorld) -> None:
    with app.worker() as worker:
        worker.wait_for("app_ready")
        os.kill(int(app.lines("starts")[0]), signal.SIGKILL)
        worker.wait_for("app_ready", count=2)
        app.done(app.submit())
    first, second = (event["address"] for event in worker.find("app_ready"))
    assert first != second
    assert worker.find("app_ended")[0]["error"] == "killed by SIGKILL"


UVICORN = """
import asyncio, os
from fastapi import FastAPI, Request, Response
from pathlib import Path

W = Path(os.environ["W"])
app = FastAPI()


@app.post("/")
async def work(request: Request) -> Response:
    message = await request.json()
    if message["do"] == "wait":
        (W / "begun").touch()
        await asyncio.sleep(message["seconds"])
    return Response(b"finished", media_type="text/plain")
"""


def test_an_app_under_uvicorn_finishes_its_request_in_a_drain_and_then_ends(app: AppWorld) -> None:
    (app.world.folder / "served.py").write_text(UVICORN)
    app.argv = [sys.executable, "-m", "uvicorn", "--app-dir", str(app.world.folder), "--port", "0", "served:app"]
    with app.worker(HEELER_STOP_GRACE="20") as worker:
        app.done(app.submit("echo"))
        job = app.submit("wait", seconds=1.5)
        app.world.told("begun")
        stop(worker, within=8)
    assert answer(app.world.job(job)) == (200, b"finished")


# An app of somebody else.


@contextmanager
def external(app: AppWorld, port: int) -> Iterator[psutil.Process]:
    environment = clean_environment(W=str(app.world.folder), PORT=str(port))
    with subprocess.Popen([sys.executable, str(app.program)], env=environment) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.kill()


def run_external(app: AppWorld, *flags: str, **environment: str) -> Any:
    return app.world.worker(*flags, W=str(app.world.folder), **environment)


def test_an_app_that_somebody_else_runs_is_waited_for_used_and_left_alone(app: AppWorld) -> None:
    port = free_port()
    job = app.submit()
    with run_external(app, "--app-url", f"http://127.0.0.1:{port}/base") as worker:
        worker.wait_for("phase", phase="receive")
        assert app.world.job(job).attempts == 0
        with external(app, port) as process:
            app.done(job)
            assert app.calls()[0]["path"] == "/base/"
            waits = app.submit("wait")
            app.world.told("begun-1")
            worker.signal(signal.SIGTERM)
            worker.wait_for("drain")
            app.world.tell("go")
            assert worker.wait() == 0
            assert process.is_running()
    assert answer(app.world.job(waits)) == (200, b"finished"), "it had the grace period to answer"
    assert app.lines("terms") == []


def test_an_external_app_that_goes_away_and_comes_back_costs_no_job(app: AppWorld) -> None:
    port = free_port()
    with run_external(app, "--app-url", f"http://localhost:{port}") as worker:
        with external(app, port):
            app.done(app.submit())
        worker.wait_for("app_not_ready")
        job = app.submit()
        with external(app, port):
            record = app.done(job)
    assert (record.attempts, record.failures) == (1, 0)


@pytest.mark.parametrize(
    ("flags", "program", "words"),
    [
        (["--delivery", "app"], [], "who is the app"),
        (["--delivery", "command"], ["true"], "leave out the program"),
        (["--delivery", "command", "--app-url", "http://localhost:1"], [], "leave out the program"),
        (["--app-url", "localhost:8080"], [], "must be like http://127.0.0.1:8080"),
        (["--app-path", "jobs"], ["true"], "a path that starts with /"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(
    tmp_path: Path, flags: list[str], program: list[str], words: str
) -> None:
    environment = clean_environment(HEELER_STATE_DIR=str(tmp_path / "state"))
    arguments = ["run", "--source", f"local:{tmp_path}/q", "--control", "off", *flags]
    done = heeler(*arguments, *(["--", *program] if program else []), env=environment)
    assert done.returncode == 64, done.stderr
    assert words in done.stderr
