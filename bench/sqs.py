"""Jobs of an SQS queue a second, and API calls for them, beside the loop that people write by hand.

Both take jobs from moto, which counts the calls, and POST each to the same app on loopback. The link to the queue is
slowed to what a queue in the same region answers in, or not. Run it as `python -m bench.sqs [CASE...]`.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil

from bench.common import RUNS, Report
from tests.support.proxy import FaultProxy
from tests.support.sqs_server import KEY, REGION, SECRET, SqsServer
from tests.support.worker import Worker, clean_environment

BATCH = 10
LONE = 40
LONE_PAUSE = 0.03
PATIENCE = 120
AIM = 1 / 3
"""Of the peer's calls."""

PEER = """
import os, queue, sys, threading, time
import boto3, requests
from botocore.config import Config

url, app, lanes, visibility = os.environ["SQS_QUEUE_URL"], sys.argv[1], int(sys.argv[2]), 60
sqs = boto3.client("sqs", config=Config(max_pool_connections=lanes + 2))
held, lock = {}, threading.Lock()

def extend():
    while True:
        time.sleep(1)
        with lock:
            due = [handle for handle, at in held.items() if time.monotonic() - at > visibility / 2]
        for handle in due:
            sqs.change_message_visibility(QueueUrl=url, ReceiptHandle=handle, VisibilityTimeout=visibility)
            with lock:
                if handle in held:
                    held[handle] = time.monotonic()

def lane():
    session = requests.Session()
    while True:
        found = sqs.receive_message(QueueUrl=url, MaxNumberOfMessages=1, WaitTimeSeconds=20,
                                    VisibilityTimeout=visibility)
        for message in found.get("Messages", []):
            handle = message["ReceiptHandle"]
            with lock:
                held[handle] = time.monotonic()
            answer = session.post(app, data=message["Body"], headers={"Content-Type": "application/json"})
            with lock:
                del held[handle]
            if answer.ok:
                sqs.delete_message(QueueUrl=url, ReceiptHandle=handle)

for _ in range(lanes):
    threading.Thread(target=lane).start()
extend()
"""
"""No readiness, no record, no retry, no log, no drain, no dead letters; one thread extends for all."""


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        lanes: Jobs at a time.
        job: Seconds that one takes in the app.
        link: Seconds that the link adds to a call.
        jobs: How many.
    """

    lanes: int
    job: float
    link: float
    jobs: int

    def __str__(self) -> str:
        return f"{self.lanes} at a time, jobs of {self.job * 1000:g} ms, {self.link * 1000:g} ms to the queue"

    @property
    def warm(self) -> int:
        """Jobs before the first that counts."""
        return self.jobs // 5


CASES = {
    "8x0": Case(8, 0, 0, 400),
    "8x50": Case(8, 0.05, 0, 400),
    "8x0far": Case(8, 0, 0.01, 400),
    "8x50far": Case(8, 0.05, 0.01, 400),
    "1x0": Case(1, 0, 0, 150),
    "1x50": Case(1, 0.05, 0, 60),
    "1x0far": Case(1, 0, 0.01, 100),
}
"""The first two carry the aims."""


@dataclass
class Figures:
    """One run of one worker."""

    rate: float
    calls: float
    """For 1,000 jobs."""
    cpu: float
    """Milliseconds of a core a job."""
    lone: list[float]
    """Milliseconds from the sending of a job, to a worker that is idle, to its POST."""
    kinds: Counter[str] = field(default_factory=Counter)


class App:
    """Answers each POST after a while; knows when each came."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.came: list[tuple[float, bytes]] = []
        self.answered: list[float] = []
        self._changed = threading.Condition()
        self._listens = threading.Event()
        self.port = 0
        threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True).start()
        self._listens.wait()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._listens.set()
        await server.serve_forever()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                _, _, rest = head.partition(b"content-length:")
                body = await reader.readexactly(int(rest.split(b"\r\n")[0] or 0))
                if head.startswith(b"post"):
                    self.came.append((time.time(), body))
                    await asyncio.sleep(self.delay)
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
                if head.startswith(b"post"):
                    with self._changed:
                        self.answered.append(time.time())
                        self._changed.notify_all()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def wait(self, count: int) -> None:
        """Return once so many are answered."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.answered) >= count, PATIENCE):
                raise RuntimeError(f"{len(self.answered)} of {count} jobs in {PATIENCE} s")

    def forget(self, delay: float) -> None:
        """Start anew, with jobs of so many seconds."""
        self.delay, self.came, self.answered = delay, [], []


Start = Callable[[Case, App, Mapping[str, str], Path], AbstractContextManager[int]]


@contextmanager
def ours(case: Case, app: App, environment: Mapping[str, str], folder: Path) -> Iterator[int]:
    """`heeler run` as it is by default, but for where the control API listens; its pid."""
    arguments = ("--source", "sqs", "--concurrency", str(case.lanes), "--app-url", f"http://127.0.0.1:{app.port}")
    with Worker(*arguments, state_dir=folder / "state", env=environment, cwd=folder, control="127.0.0.1:0") as worker:
        yield worker.pid


@contextmanager
def peer(case: Case, app: App, environment: Mapping[str, str], folder: Path) -> Iterator[int]:
    """The loop by hand; its pid."""
    command = [sys.executable, "-c", PEER, f"http://127.0.0.1:{app.port}/", str(case.lanes)]
    with subprocess.Popen(command, env=dict(environment), cwd=folder) as process:
        try:
            yield process.pid
        finally:
            process.kill()


class Bench:
    """A server, an app, and what is between."""

    def __init__(self, server: SqsServer, proxy: FaultProxy) -> None:
        self._server = server
        self._proxy = proxy
        self._app = App()
        self._numbers = itertools.count()

    def measure(self, start: Start, case: Case) -> Figures:
        """One worker, on a queue of its own that is full before it starts."""
        url = self._server.queue(f"jobs-{next(self._numbers)}")
        self._app.forget(case.job)
        self._fill(url, case.warm + case.jobs)
        self._proxy.set(latency=case.link / 2)
        # A link that is not slowed has no proxy in it.
        endpoint = self._proxy.url if case.link else self._server.url
        environment = clean_environment(
            SQS_QUEUE_URL=url,
            AWS_ENDPOINT_URL_SQS=endpoint,
            AWS_ACCESS_KEY_ID=KEY,
            AWS_SECRET_ACCESS_KEY=SECRET,
            AWS_DEFAULT_REGION=REGION,
            SQS_AWS_REGION=REGION,
        )
        with (
            TemporaryDirectory(prefix="heeler-bench-") as folder,
            start(case, self._app, environment, Path(folder)) as pid,
        ):
            return self._watch(case, url, psutil.Process(pid))

    def _watch(self, case: Case, url: str, process: psutil.Process) -> Figures:
        self._app.wait(case.warm)
        calls, before = self._server.calls(), process.cpu_times()
        self._app.wait(case.warm + case.jobs)
        made, now = self._server.calls() - calls, process.cpu_times()
        cpu = (now.user + now.system - before.user - before.system) / case.jobs * 1000
        ends = self._app.answered
        rate = case.jobs / (ends[-1] - ends[case.warm - 1])
        while self._server.messages(url):
            time.sleep(0.05)
        kinds = Counter({name: round(count * 1000 / case.jobs) for name, count in made.items()})
        return Figures(rate, sum(kinds.values()), cpu, self._lone(url), kinds)

    def _lone(self, url: str) -> list[float]:
        """Jobs that come one at a time."""
        done = len(self._app.came)
        for number in range(LONE):
            self._server.client.send_message(QueueUrl=url, MessageBody=str(time.time()))
            self._app.wait(done + number + 1)
            time.sleep(LONE_PAUSE)
        return [(came - float(body)) * 1000 for came, body in self._app.came[done:]]

    def _fill(self, url: str, count: int) -> None:
        for first in range(0, count, BATCH):
            entries = [{"Id": str(number), "MessageBody": f'{{"number": {first + number}}}'} for number in range(BATCH)]
            self._server.client.send_message_batch(QueueUrl=url, Entries=entries[: count - first])


def show(report: Report, case: Case, found: dict[str, list[Figures]]) -> None:
    """The rows of one case."""
    print(f"\n{case}")
    rows = (("jobs/s", "rate", 0), ("calls for 1,000 jobs", "calls", 0), ("CPU per job, ms", "cpu", 2))
    for name, field_name, digits in rows:
        mine, theirs = ([float(getattr(run, field_name)) for run in found[who]] for who in ("ours", "peer"))
        report.row(name, mine, theirs, digits)
    for name, judge in (("p50", statistics.median), ("slowest", max)):
        mine, theirs = ([judge(run.lone) for run in found[who]] for who in ("ours", "peer"))
        report.row(f"a lone job, sent to POST, {name} ms", mine, theirs, 1)
    for who, runs in found.items():
        kinds = sorted({name for run in runs for name in run.kinds})
        each = (f"{statistics.median(run.kinds[name] for run in runs):.0f} {name}" for name in kinds)
        print(f"  {who}: {', '.join(each)}")


def main(names: list[str]) -> int:
    """Print the figures."""
    how = f"a full queue of moto's, {RUNS} runs each, alternating"
    report = Report("sqs", how, "boto3 and requests, a thread for each job at a time, by hand")
    with SqsServer() as server, FaultProxy("127.0.0.1", server.port) as proxy:
        bench = Bench(server, proxy)
        for name in names or CASES:
            case = CASES[name]
            found: dict[str, list[Figures]] = {"ours": [], "peer": []}
            for _ in range(RUNS):
                found["ours"].append(bench.measure(ours, case))
                found["peer"].append(bench.measure(peer, case))
            show(report, case, found)
            if case.lanes > 1:
                _judge(report, name, found)
    print()
    return report.end()


def _judge(report: Report, name: str, found: dict[str, list[Figures]]) -> None:
    mine, theirs = (
        {key: statistics.median(getattr(run, key) for run in found[who]) for key in ("rate", "calls")}
        for who in ("ours", "peer")
    )
    report.at_least(f"{name}: jobs/s, ours/peer", mine["rate"] / theirs["rate"], 1, "")
    report.target(f"{name}: calls, ours/peer", [mine["calls"] / theirs["calls"]], AIM, "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
