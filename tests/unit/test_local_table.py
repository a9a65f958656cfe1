"""The local queue's table: leases, counts and ends, with a clock of the test's own."""

from __future__ import annotations

import sqlite3
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from heeler.job import Result
from heeler.sources.base import BARREN_LIMIT, JobRecord, LeaseLostError, LeaseState, SourceUnavailableError
from heeler.sources.local_table import JobTable, NewJob, Taken

OK, FAILED = Result(exit_code=0), Result(exit_code=3)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(tmp_path: Path, clock: Clock) -> Iterator[JobTable]:
    found = JobTable(tmp_path, clock)
    yield found
    found.close()


def new(job_id: str, *, lease_seconds: float = 30.0, max_failures: int = 3) -> NewJob:
    return NewJob(job_id, f"body of {job_id}".encode(), lease_seconds, max_failures)


def take(table: JobTable, worker: str = "w") -> Taken:
    taken = table.take(worker)
    assert taken is not None
    return taken


def record(table: JobTable, job_id: str = "a") -> JobRecord:
    (found,) = table.records(job_id)
    return found


def test_jobs_come_oldest_first_with_their_bodies_and_an_attempt_count(table: JobTable) -> None:
    assert table.add([new("a"), new("b")]) is None
    first, second = take(table, "w1"), take(table, "w2")
    assert (first.job.id, first.job.body, first.attempt) == ("a", b"body of a", 1)
    assert second.job.id == "b"
    assert first.token != second.token
    assert table.take("w3") is None
    assert record(table).state == "running"
    assert record(table).worker == "w1"


def test_all_jobs_are_added_or_none(table: JobTable) -> None:
    assert table.add([new("a")]) is None
    assert table.add([new("b"), new("a"), new("c")]) == "a"
    assert [found.id for found in table.records()] == ["a"]


def test_a_lease_lapses_at_its_time_and_the_job_goes_to_another(table: JobTable, clock: Clock) -> None:
    table.add([new("a", lease_seconds=30.0), new("b")])
    first = take(table)
    take(table)
    clock.now += 29.9
    assert table.take("w2") is None
    clock.now += 0.1
    second = take(table, "w2")
    assert (second.job.id, second.attempt) == ("a", 2)
    assert table.extend("a", first.token, progressed=False) is LeaseState.LOST
    assert table.extend("a", second.token, progressed=False) is LeaseState.HELD
    assert record(table).interruptions == 1
    assert record(table).failures == 0


def test_a_lapsed_job_comes_before_those_that_still_wait(table: JobTable, clock: Clock) -> None:
    table.add([new("a"), new("b"), new("c")])
    take(table)
    second = take(table)
    clock.now += 60
    table.extend("b", second.token, progressed=False)
    assert [take(table).job.id, take(table).job.id] == ["a", "c"]


def test_an_extension_counts_from_now_even_after_a_lapse_that_nobody_used(table: JobTable, clock: Clock) -> None:
    table.add([new("a")])
    taken = take(table)
    clock.now += 100
    assert table.extend("a", taken.token, progressed=False) is LeaseState.HELD
    clock.now += 29
    assert table.take("w2") is None


def test_a_done_job_keeps_its_result_and_never_comes_again(table: JobTable, clock: Clock) -> None:
    table.add([new("a")])
    taken = take(table)
    table.complete("a", taken.token, OK)
    clock.now += 1e6
    assert table.take("w") is None
    found = record(table)
    assert (found.state, found.result, found.finished) == ("done", {"exit_code": 0, "signal": None}, 1000.0)


def test_a_failed_attempt_rests_then_comes_again_until_its_failures_are_used_up(table: JobTable, clock: Clock) -> None:
    table.add([new("a", max_failures=2)])
    table.retry("a", take(table).token, "exit code 3", FAILED, 10.0)
    assert table.take("w") is None
    clock.now += 10
    second = take(table)
    assert second.attempt == 2
    table.retry("a", second.token, "exit code 3", FAILED, 10.0)
    clock.now += 100
    assert table.take("w") is None
    assert (record(table).state, record(table).failures, record(table).reason) == ("failed", 2, "exit code 3")


def test_interruptions_are_not_failures(table: JobTable, clock: Clock) -> None:
    table.add([new("a", max_failures=1)])
    for _ in range(5):
        taken = take(table)
        table.extend("a", taken.token, progressed=True)
        table.release("a", taken.token, "x", 0.0, fruitless=False)
    table.release("a", take(table).token, "x", 7.0, fruitless=False)
    assert table.take("w") is None
    clock.now += 7
    assert take(table).attempt == 7
    assert (record(table).failures, record(table).interruptions) == (0, 6)


def test_a_job_that_can_never_succeed_is_failed_at_once(table: JobTable) -> None:
    table.add([new("a")])
    table.fail("a", take(table).token, "no document", Result())
    assert table.take("w") is None
    assert (record(table).state, record(table).reason) == ("failed", "no document")


@pytest.mark.parametrize("how", ["complete", "retry", "fail", "release"])
def test_an_answer_that_is_repeated_counts_once(table: JobTable, how: str) -> None:
    table.add([new("a")])
    token = take(table).token
    calls = {
        "complete": lambda: table.complete("a", token, OK),
        "retry": lambda: table.retry("a", token, "x", FAILED, 5.0),
        "fail": lambda: table.fail("a", token, "x", FAILED),
        "release": lambda: table.release("a", token, "x", 5.0, fruitless=False),
    }
    calls[how]()
    once = record(table)
    calls[how]()
    assert record(table) == once


@pytest.mark.parametrize("how", ["complete", "retry", "fail", "release"])
def test_a_worker_whose_job_was_given_away_changes_nothing(table: JobTable, clock: Clock, how: str) -> None:
    table.add([new("a")])
    old = take(table, "old").token
    clock.now += 31
    take(table, "new")
    before = record(table)
    calls = {
        "complete": lambda: table.complete("a", old, OK),
        "retry": lambda: table.retry("a", old, "x", FAILED, 5.0),
        "fail": lambda: table.fail("a", old, "x", FAILED),
        "release": lambda: table.release("a", old, "x", 5.0, fruitless=False),
    }
    with pytest.raises(LeaseLostError):
        calls[how]()
    assert record(table) == before


def test_a_waiting_job_can_be_cancelled_and_a_running_one_learns_of_it(table: JobTable) -> None:
    table.add([new("a"), new("b")])
    running = take(table)
    assert table.cancel("a")
    assert table.cancel("b")
    assert not table.cancel("a")
    assert not table.cancel("nobody")
    assert table.extend("a", running.token, progressed=False) is LeaseState.CANCELLED
    with pytest.raises(LeaseLostError):
        table.complete("a", running.token, OK)
    assert table.take("w") is None
    assert {found.state for found in table.records()} == {"cancelled"}


def test_a_job_that_has_ended_can_not_be_cancelled(table: JobTable) -> None:
    table.add([new("a")])
    table.complete("a", take(table).token, OK)
    assert not table.cancel("a")
    assert record(table).state == "done"


def test_ten_attempts_in_a_row_without_progress_or_answer_are_a_failure(table: JobTable, clock: Clock) -> None:
    table.add([new("a"), new("b")])
    for attempt in range(1, BARREN_LIMIT + 1):
        assert take(table).attempt == attempt
        clock.now += 31
    assert take(table).job.id == "b", "the worn-out job stands in nobody's way"
    assert record(table).state == "failed"
    assert "10 attempts" in record(table).reason
    assert record(table).interruptions == BARREN_LIMIT


def test_progress_and_counted_failures_start_the_barren_count_again(table: JobTable, clock: Clock) -> None:
    table.add([new("a", max_failures=2)])
    for _ in range(BARREN_LIMIT - 1):
        take(table)
        clock.now += 31
    table.extend("a", take(table).token, progressed=True)
    for _ in range(BARREN_LIMIT - 1):
        clock.now += 31
        last = take(table)
    table.retry("a", last.token, "x", FAILED, 0.0)
    for _ in range(BARREN_LIMIT):
        last = take(table)
        clock.now += 31
    assert last.attempt == 3 * BARREN_LIMIT - 1


def test_two_tables_on_one_file_share_the_jobs_and_none_is_given_twice(tmp_path: Path) -> None:
    count, workers = 120, 8
    tables = [JobTable(tmp_path) for _ in range(4)]
    tables[0].add([new(f"j{number}") for number in range(count)])
    given: Counter[str] = Counter()
    errors: list[BaseException] = []
    lock = threading.Lock()

    def work(table: JobTable) -> None:
        try:
            while (taken := table.take("w")) is not None:
                with lock:
                    given[taken.job.id] += 1
                table.complete(taken.job.id, taken.token, OK)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(tables[number % 4],)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for table in tables:
        table.close()
    assert errors == []
    assert len(given) == count
    assert set(given.values()) == {1}


def open_together(folder: Path, barrier: threading.Barrier, errors: list[BaseException]) -> None:
    barrier.wait()
    try:
        JobTable(folder).close()
    except BaseException as error:  # noqa: BLE001 - raised by the test
        errors.append(error)


def test_many_processes_may_open_a_new_queue_at_once(tmp_path: Path) -> None:
    for round_number in range(5):
        folder = tmp_path / str(round_number)
        barrier = threading.Barrier(12)
        errors: list[BaseException] = []

        threads = [threading.Thread(target=open_together, args=(folder, barrier, errors)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []


def test_a_file_that_is_no_queue_is_named(tmp_path: Path) -> None:
    (tmp_path / "queue.db").write_bytes(b"no database " * 400)
    with pytest.raises(SourceUnavailableError, match=r"queue\.db"):
        JobTable(tmp_path)


def test_a_queue_of_a_later_version_is_refused(tmp_path: Path, table: JobTable) -> None:
    connection = sqlite3.connect(tmp_path / "queue.db")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(SourceUnavailableError, match="99"):
        JobTable(tmp_path)


def test_a_locked_queue_is_unavailable_and_works_again_later(
    tmp_path: Path, table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    table.add([new("a")])
    table._open.execute("PRAGMA busy_timeout = 50")
    other = sqlite3.connect(tmp_path / "queue.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(SourceUnavailableError, match="locked"):
        table.take("w")
    other.execute("ROLLBACK")
    other.close()
    assert take(table).attempt == 1
