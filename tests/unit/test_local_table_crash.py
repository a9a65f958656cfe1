"""The local queue after a worker was killed at any moment: no job is lost, none is done twice, none is given twice."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from heeler.job import Result
from heeler.sources.local_table import JobTable, NewJob

OK = Result(exit_code=0)


class PowerCutError(BaseException):
    """The process ends here, as far as the table is concerned."""


class _CutConnection(sqlite3.Connection):
    """Raises before or after its n-th statement, and for every one that follows: nothing is tidied up."""

    left = 1 << 30
    after = False

    def execute(self, *arguments: object) -> sqlite3.Cursor:
        type(self).left -= 1
        if self.left == 0 and self.after:
            super().execute(*arguments)  # type: ignore[arg-type]
        if self.left <= 0:
            raise PowerCutError
        return super().execute(*arguments)  # type: ignore[arg-type]


def new(job_id: str) -> NewJob:
    return NewJob(job_id, b"{}", 30.0, 3)


STEPS: dict[str, Callable[[JobTable], object]] = {
    "add": lambda table: table.add([new("b"), new("c")]),
    "take": lambda table: table.take("w"),
    "complete": lambda table: table.complete("a", _token(table), OK),
    "retry": lambda table: table.retry("a", _token(table), "x", OK, 0.0),
    "fail": lambda table: table.fail("a", _token(table), "x", OK),
    "release": lambda table: table.release("a", _token(table), "x", 0.0, fruitless=False),
    "extend": lambda table: table.extend("a", _token(table), progressed=True),
    "cancel": lambda table: table.cancel("a"),
}


def _token(table: JobTable) -> str:
    (token,) = sqlite3.connect(table._path).execute("SELECT token FROM jobs WHERE id = 'a'").fetchone()
    return str(token)


def _rows(folder: Path) -> list[tuple[object, ...]]:
    connection = sqlite3.connect(folder / "queue.db")
    try:
        columns = "id, state, attempts, failures, interruptions, expires IS NULL"
        return connection.execute(f"SELECT {columns} FROM jobs ORDER BY seq").fetchall()
    finally:
        connection.close()


@pytest.mark.parametrize("after", [False, True], ids=["before the statement", "after the statement"])
@pytest.mark.parametrize("step", STEPS)
def test_a_change_cut_at_any_statement_is_there_whole_or_not_at_all(
    tmp_path: Path, step: str, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prepared(folder: Path) -> JobTable:
        table = JobTable(folder, clock=lambda: 1000.0)
        table.add([new("a")])
        if step not in ("add", "take"):
            table.take("w")
        return table

    whole = tmp_path / "whole"
    table = prepared(whole)
    before = _rows(whole)
    STEPS[step](table)
    done = _rows(whole)
    assert done != before or step == "extend"

    outcomes = []
    connect = sqlite3.connect
    for statement in range(1, 12):
        folder = tmp_path / str(statement)
        prepared(folder).close()
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, **{"factory": _CutConnection, **k}))
            monkeypatch.setattr(_CutConnection, "left", 1 << 30)
            monkeypatch.setattr(_CutConnection, "after", after)
            cut = JobTable(folder, clock=lambda: 1000.0)
        token = _token(cut)
        monkeypatch.setattr(sys.modules[__name__], "_token", lambda _table, token=token: token)
        _CutConnection.left = statement
        try:
            STEPS[step](cut)
            survived = True
        except PowerCutError:
            survived = False
        finally:
            _CutConnection.left = 1 << 30
            cut._open.close()
            monkeypatch.undo()
        assert _rows(folder) in (before, done), f"half a {step} after statement {statement}"
        outcomes.append(_rows(folder) == done)
        reopened = JobTable(folder, clock=lambda: 2000.0)
        reopened.take("w2")  # and the queue goes on working
        reopened.close()
        if survived:
            assert _rows(folder)[0][0] == "a"
            break
    else:
        raise AssertionError("more statements than expected: raise the bound")
    assert outcomes[-1] or step == "extend"


WORKER = """
import json, sys, time
from pathlib import Path
from heeler.job import Result
from heeler.sources.local_table import JobTable
folder = Path(sys.argv[1])
table = JobTable(folder)
log = open(folder / "told", "ab", buffering=0)
while True:
    taken = table.take("w")
    if taken is None:
        time.sleep(0.001)
        continue
    log.write(json.dumps(["taken", taken.job.id, taken.token, taken.attempt, time.time()]).encode() + b"\\n")
    table.complete(taken.job.id, taken.token, Result(exit_code=0))
    log.write(json.dumps(["done", taken.job.id, taken.token, taken.attempt, time.time()]).encode() + b"\\n")
"""


def test_workers_killed_at_random_moments_lose_no_job_and_do_none_twice(tmp_path: Path) -> None:
    seed = int(os.environ.get("HEELER_TEST_SEED") or random.randrange(1 << 30))
    print(f"seed {seed}")
    rng = random.Random(seed)
    count = 200
    table = JobTable(tmp_path)
    # A lease so short that what a killed worker held comes back while the test runs.
    table.add([NewJob(f"j{number}", b"{}", 0.4, 3) for number in range(count)])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("HEELER_TEST_SEED", None)

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], env=environment)

    workers = [start() for _ in range(2)]
    kills = 0
    deadline = time.monotonic() + 40
    try:
        while any(found.state != "done" for found in table.records()):
            assert time.monotonic() < deadline, Counter(found.state for found in table.records())
            time.sleep(rng.uniform(0.0, 0.25))
            if kills < 8:
                victim = rng.randrange(len(workers))
                workers[victim].send_signal(signal.SIGKILL)
                workers[victim].wait()
                workers[victim] = start()
                kills += 1
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    lines = [json.loads(line) for line in (tmp_path / "told").read_bytes().splitlines() if line.endswith(b"]")]
    taken = Counter((job, attempt) for what, job, _, attempt, _ in lines if what == "taken")
    done = Counter(job for what, job, *_ in lines if what == "done")
    assert set(taken.values()) == {1}, "the same attempt was given to two"
    assert max(done.values()) == 1, "a job was done twice"
    records = table.records()
    table.close()
    assert len(records) == count
    assert all(found.attempts == 1 + found.interruptions for found in records)
    assert kills > 0
