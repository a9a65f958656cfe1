"""What the tests of the Salad Job Queue share: the queue, an app of this process, programs, and real workers."""

from __future__ import annotations

import contextlib
import json
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil

from heeler.local.processes import free_port
from heeler.local.queue_faults import Call
from heeler.local.queue_model import Job, JobStatus
from tests.acceptance.world import eventually
from tests.support.salad import Machine, SaladService
from tests.support.worker import Worker, clean_environment

PROMPT = 2.0
"""Seconds after a recovery within which the next job is to be taken."""
_MARK = "ACCEPTANCE_SALAD_WORLD"

Reply = tuple[int, Mapping[str, str], bytes]
OK: Reply = (200, {}, b"done")


@dataclass(frozen=True)
class Request:
    """A request as the app got it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    time: float = field(default_factory=time.monotonic)

    @property
    def job_id(self) -> str:
        return self.headers.get("salad-job-id", "")


class Gate:
    """An answer that waits until the test lets it go."""

    def __init__(self, *, first_only: bool = False) -> None:
        """Args: with `first_only`, every call but the first is answered at once."""
        self.came = threading.Event()
        self._go = threading.Event()
        self._first_only = first_only
        self.opened = 0.0

    def __call__(self, _request: Request) -> Reply:
        if not (self._first_only and self.came.is_set()):
            self.came.set()
            assert self._go.wait(120)
        return OK

    def wait(self, timeout: float = 30.0) -> None:
        """Wait until the app was called."""
        assert self.came.wait(timeout), "the app was not called"

    def open(self) -> float:
        """Let it go; when that was."""
        self.opened = time.monotonic()
        self._go.set()
        return self.opened


def answers(*replies: Reply) -> Callable[[Request], Reply]:
    """One after the other, the last again and again."""
    left = list(replies)
    return lambda _request: left.pop(0) if len(left) > 1 else left[0]


class App:
    """An HTTP server of this process: an app that something else than heeler started.

    Attributes:
        port: Where it listens; the same for its whole life.
        requests: What it got.
        reply: How it answers.
    """

    def __init__(self, reply: Callable[[Request], Reply] | None = None) -> None:
        self.port = free_port()
        self.requests: list[Request] = []
        self.reply: Callable[[Request], Reply] = reply or (lambda _request: OK)
        self._server: ThreadingHTTPServer | None = None
        self._connections: set[Any] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def of(self, job_id: str) -> list[Request]:
        """The requests with that job."""
        return [request for request in list(self.requests) if request.job_id == job_id]

    def wait(self, job_id: str, count: int = 1) -> Request:
        """Wait until it was asked so often to do that job; the last of them."""
        return eventually(lambda: self.of(job_id)[count - 1 :], f"call {count} with job {job_id}")[0]

    def start(self) -> None:
        app = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                app._connections.add(self.connection)

            def log_message(self, *_: object) -> None: ...

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                headers = {name.lower(): value for name, value in self.headers.items()}
                request = Request(self.command, self.path, headers, body)
                app.requests.append(request)
                status, more, answer = app.reply(request)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **more}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def handle(self) -> None:
                with contextlib.suppress(OSError):  # the caller went away
                    super().handle()

            do_GET = do_POST = do_PUT = handle_any  # noqa: N815 - http.server's names

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 100

            def handle_error(self, *_: object) -> None: ...

        self._server = Server(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections, and cut those that there are."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        for connection in [*self._connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(2)
        self._connections.clear()


_PROGRAM = """
import json, os, signal, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
W = Path({folder!r})
def tell(name, text=""):
    (W / (name + ".new")).write_text(str(text)); (W / (name + ".new")).rename(W / name)
def await_(name):
    while not (W / name).exists(): time.sleep(0.005)
class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_POST(self):
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        said = {{"id": self.headers["Salad-Job-Id"], "attempt": self.headers["Heeler-Attempt"], "pid": os.getpid()}}
        with open(W / "calls", "a") as file: file.write(json.dumps(said) + "\\n")
        status, answer = reply(self, job, said["id"])
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
{text}
server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
server.daemon_threads = True
tell("listening", time.monotonic())
server.serve_forever()
"""


class SaladWorld:
    """What a test plays with.

    Attributes:
        folder: Workers start there.
        salad: The queue, and the first machine.
        app: Where the queue says that jobs go, unless a test starts a program there.
        started: The workers so far.
    """

    def __init__(self, folder: Path, *, grace: float = 30.0, heartbeat: float = 0.5) -> None:
        self.folder = folder
        self.app = App()
        self.salad = SaladService(port=self.app.port, path="/run", grace=grace, heartbeat=heartbeat)
        self.started: list[Worker] = []
        self._mark = secrets.token_hex(16)
        self._happened: list[tuple[float, str, str]] = []

    @contextmanager
    def running(self) -> Iterator[SaladWorld]:
        """While the block runs there is a queue; at its end no process of a worker's is left."""
        try:
            with self.salad as salad:
                salad.call(salad.state.listeners.append, self._note)
                yield self
        finally:
            self.app.stop()
            self._kill_all()

    def _note(self, event: str, job: Job) -> None:
        self._happened.append((time.monotonic(), event, job.id))

    def _kill_all(self) -> None:
        """Kill what a failed test left: only descendants of this world's workers carry its mark."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(_MARK) == self._mark:
                    process.send_signal(signal.SIGKILL)

    # Workers.

    @contextmanager
    def worker(
        self,
        *arguments: str,
        name: str = "a",
        machine: Machine | None = None,
        control: str = "off",
        source: tuple[str, ...] = ("--source", "salad"),
        env: Mapping[str, str] | None = None,
        **environment: str,
    ) -> Iterator[Worker]:
        """A running worker on a machine, with a state folder of its own name; killed with the block."""
        given = {**(machine or self.salad.machine).environment(), _MARK: self._mark, **(env or {}), **environment}
        with Worker(
            *source,
            *arguments,
            state_dir=self.folder / f"state-{name}",
            env=clean_environment(**given),
            cwd=self.folder,
            control=control,
        ) as worker:
            self.started.append(worker)
            yield worker

    @contextmanager
    def idle_worker(self, *arguments: str, **options: Any) -> Iterator[Worker]:
        """A worker for the app of this process, once its stream is open."""
        if not arguments:
            arguments = ("--app-url", self.app.url)
            self.app.start()
        with self.worker(*arguments, **options) as worker:
            self.salad.wait_streams(1)
            yield worker

    # Programs.

    def program(self, text: str) -> tuple[str, ...]:
        """What stands behind `heeler run ...`: a server whose `reply(request, job, id)` is in the text.

        `W` is the world's folder; `tell` and `await_` make and await files there.
        """
        path = self.folder / "app.py"
        path.write_text(_PROGRAM.format(folder=str(self.folder), text=text))
        return ("--", sys.executable, "-I", "-S", str(path), str(self.app.port))

    def tell(self, name: str) -> None:
        """Make the file that a program waits for."""
        (self.folder / name).touch()

    def told(self, name: str, timeout: float = 30.0) -> str:
        """Wait for a file that a program makes, and its text."""
        eventually((self.folder / name).exists, f"the program made {name}", timeout)
        return (self.folder / name).read_text()

    def program_calls(self, job_id: str = "") -> list[dict[str, Any]]:
        """The jobs that programs were given: id, attempt and pid."""
        path = self.folder / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [call for call in found if job_id in ("", call["id"])]

    # The queue.

    def submit(self, **fields: Any) -> str:
        """Submit a job; its id."""
        return self.salad.submit(fields)

    def calls(self, method: str, job_id: str | None = None) -> list[Call]:
        """The calls of a method that the queue got."""
        found = list(self.salad.faults.calls)
        return [call for call in found if call.method == method and job_id in (None, call.job_id)]

    def wait_calls(self, method: str, count: int = 1, timeout: float = 30.0) -> list[Call]:
        """Wait until the queue got so many calls of a method."""
        return eventually(lambda: self.calls(method)[count - 1 :] and self.calls(method), f"{count} {method}", timeout)

    def at(self, event: str, job_id: str, timeout: float = 30.0) -> float:
        """Wait until something happened to a job at the queue, and when that was first."""
        found = eventually(
            lambda: [when for when, *what in list(self._happened) if what == [event, job_id]],
            f"{event} of {job_id}",
            timeout,
        )
        return found[0]

    def done(self, job_id: str, *, tries: int = 1, timeout: float = 30.0) -> Job:
        """Wait until a job has succeeded; that it took so many tries."""
        try:
            job = self.salad.wait_for(job_id, timeout=timeout)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()}") from None
        assert (job.status, job.tries) == (JobStatus.SUCCEEDED, tries), f"{job}\n{self.logs()}"
        return job

    def done_once(self, job_id: str) -> None:
        """A job is done in one try of the queue and one call of the app."""
        self.done(job_id)
        assert len(self.app.of(job_id)) == 1
        assert not self.calls("RejectJob", job_id)

    def untouched(self, job_id: str) -> bool:
        """Whether no worker was ever sent this job."""
        job = self.salad.job(job_id)
        return (job.status, job.tries, job.workers) == (JobStatus.PENDING, 0, [])

    def comes_back_for(self, job_id: str) -> None:
        """Wait until a worker's newest stream is open and names that job."""
        eventually(lambda: self.calls("AcceptJobs")[-1].job_id == job_id, "it comes back for its job")
        self.salad.wait_streams(1)

    def prompt(self, what: str, since: float, job_id: str = "") -> None:
        """The next job, submitted now if none is named, is taken within two seconds after a recovery, and done."""
        job_id = job_id or self.submit(next=what)
        took = self.at("started", job_id) - since
        print(f"FIGURE {what}: the next job is taken after {took:.2f} s")
        assert took <= PROMPT, f"{took:.2f} s\n{self.logs()}"
        self.done(job_id)

    def logs(self) -> str:
        """The workers' last lines."""
        return "\n".join(line for worker in self.started for line in [f"worker {worker.pid}", *worker.lines[-40:]])
