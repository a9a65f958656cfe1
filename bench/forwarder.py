"""What the forwarder costs a job of the Salad Job Queue, beside a worker that people write by hand.

The queue is our stand-in (`heeler.local`, Python, in this process), the app a server that costs next to nothing, both
on loopback. Run it as `python -m bench.forwarder`.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from bench.common import RUNS, Report
from heeler.local.processes import free_port
from heeler.local.queue_model import Job
from tests.support.salad import SaladService
from tests.support.worker import Worker, clean_environment

JOBS = 1500
WARM = 100
IDLE_SECONDS = 5.0
GO_RATE = 500
GO = "Salad's worker in Go with a Python queue: about 500 jobs/s, p50 1.3 ms, 0.7 ms CPU, 13 MB, 0.06 s (FAULTS.md)"

APP = """
import asyncio, sys

class App(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport = transport
    def data_received(self, data):
        self.transport.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")

async def main():
    server = await asyncio.get_running_loop().create_server(App, "127.0.0.1", int(sys.argv[1]))
    print("ready", flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

PEER = """
import os, grpc, requests
from heeler.wire import salad_queue as wire

uri, endpoint = os.environ["SALAD_METADATA_URI"], os.environ["SALAD_SERVICE_ENDPOINT"]
token = requests.get(uri + "/v1/token", headers={"Metadata": "true"}).json()["jwt"]
call = [("authorization", "Bearer " + token)]
channel = grpc.insecure_channel(endpoint)
accept = channel.unary_stream(wire.ACCEPT_JOBS, wire.messages.AcceptJobsRequest.SerializeToString,
                              wire.messages.AcceptJobsResponse.FromString)
complete = channel.unary_unary(wire.COMPLETE_JOB, wire.messages.CompleteJobRequest.SerializeToString, lambda data: data)
session = requests.Session()
for message in accept(wire.messages.AcceptJobsRequest(), metadata=call):
    if message.HasField("job"):
        job = message.job
        answer = session.post(f"http://localhost:{job.port}{job.path}", data=job.input,
                              headers={"Content-Type": "application/json", "Salad-Job-Id": job.job_id})
        complete(wire.messages.CompleteJobRequest(job_id=job.job_id, output=answer.content), metadata=call)
"""
"""No readiness, no record, no retry, no log, no drain: one thread that takes and posts."""


@dataclass(frozen=True)
class Figures:
    """One run of one worker."""

    rate: float
    p50: float
    p99: float
    cpu: float
    """Milliseconds of a core a job."""
    stream: float
    """Seconds from the start of the process to its stream."""
    idle_mb: float
    idle_cpu: float
    """Percent of a core."""


class Clock:
    """When each job was sent and when its result came, as the queue sees it."""

    def __init__(self) -> None:
        self.sent: dict[str, float] = {}
        self.took: list[float] = []
        self.ends: list[float] = []
        self._changed = threading.Condition()

    def note(self, event: str, job: Job) -> None:
        """A listener of the queue."""
        now = time.perf_counter()
        if event == "started":
            self.sent[job.id] = now
        elif event == "succeeded":
            with self._changed:
                self.took.append(now - self.sent[job.id])
                self.ends.append(now)
                self._changed.notify_all()

    def wait(self, count: int) -> None:
        """Return once so many results are there."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.took) >= count, 120):
                raise RuntimeError(f"{len(self.took)} of {count} jobs in 120 s")


@contextmanager
def app() -> Iterator[int]:
    """An app on a port."""
    port = free_port()
    with subprocess.Popen([sys.executable, "-c", APP, str(port)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield port
        finally:
            process.kill()


@contextmanager
def ours(environment: Mapping[str, str], folder: Path) -> Iterator[int]:
    """`heeler run` as it is by default, but for where the control API listens; its pid."""
    arguments = ("--source", "salad")
    with Worker(*arguments, state_dir=folder / "state", env=environment, cwd=folder, control="127.0.0.1:0") as worker:
        yield worker.pid


@contextmanager
def peer(environment: Mapping[str, str], folder: Path) -> Iterator[int]:
    """The worker by hand; its pid."""
    with subprocess.Popen([sys.executable, "-c", PEER], env=dict(environment), cwd=folder) as process:
        try:
            yield process.pid
        finally:
            process.kill()


def measure(start: object, port: int) -> Figures:
    """One worker: from its start over its idle time to the last of its jobs."""
    clock = Clock()
    with TemporaryDirectory(prefix="heeler-bench-") as folder, SaladService(port=port) as service:
        service.call(service.state.listeners.append, clock.note)
        began = time.perf_counter()
        with start(clean_environment(**service.environment()), Path(folder)) as pid:  # type: ignore[operator]
            service.wait_streams(1)
            stream = time.perf_counter() - began
            process = psutil.Process(pid)
            time.sleep(IDLE_SECONDS)
            idle_mb = process.memory_info().rss / 1e6
            before = process.cpu_times()
            time.sleep(IDLE_SECONDS)
            idle_cpu = _cpu(process, before) / IDLE_SECONDS * 100
            _submit(service, WARM)
            clock.wait(WARM)
            before = process.cpu_times()
            _submit(service, JOBS)
            clock.wait(WARM + JOBS)
            cpu = _cpu(process, before) / JOBS * 1000
    took = sorted(clock.took[WARM:])
    rate = (JOBS - 1) / (clock.ends[-1] - clock.ends[WARM])
    p50, p99 = (took[int(len(took) * share)] * 1000 for share in (0.5, 0.99))
    return Figures(rate, p50, p99, cpu, stream, idle_mb, idle_cpu)


def _cpu(process: psutil.Process, before: object) -> float:
    now = process.cpu_times()
    return float(now.user + now.system - before.user - before.system)  # type: ignore[attr-defined]


def _submit(service: SaladService, count: int) -> None:
    for number in range(count):
        service.submit({"number": number})


def main() -> int:
    """Print the figures."""
    how = f"{JOBS} jobs of the Salad Job Queue one after another, {RUNS} runs each, alternating"
    report = Report("forwarder", how, "grpcio and requests in one thread, by hand")
    print(GO)
    found: dict[str, list[Figures]] = {"ours": [], "peer": []}
    with app() as port:
        for _ in range(RUNS):
            found["ours"].append(measure(ours, port))
            found["peer"].append(measure(peer, port))
    rows: Sequence[tuple[str, str, int]] = (
        ("jobs/s", "rate", 0),
        ("job sent to result received, p50 ms", "p50", 2),
        ("job sent to result received, p99 ms", "p99", 2),
        ("CPU per job, ms", "cpu", 2),
        ("start to open stream, s", "stream", 2),
        ("idle memory, MB", "idle_mb", 1),
        ("idle CPU, %", "idle_cpu", 2),
    )
    for name, field, digits in rows:
        mine, theirs = ([float(getattr(run, field)) for run in found[who]] for who in ("ours", "peer"))
        report.row(name, mine, theirs, digits)
    runs = found["ours"]
    report.target("p50", [run.p50 for run in runs], 5, "ms")
    report.target("p99", [run.p99 for run in runs], 25, "ms")
    print(f"aim: {GO_RATE} jobs per second: {statistics.median(run.rate for run in runs):.0f}")
    return report.end()


if __name__ == "__main__":
    sys.exit(main())
