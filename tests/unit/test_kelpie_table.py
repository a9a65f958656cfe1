"""The rules of the local Kelpie API: who gets which job, to the second, and what reports and cancellations do."""

from __future__ import annotations

import re
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from heeler.local.kelpie_model import SUBMISSION, Submission
from heeler.local.kelpie_rows import BANNED_IN_A_ROW, Job
from heeler.local.kelpie_table import KelpieTable, NoJobError, user_of

ME = user_of("me")
OTHER = user_of("other")
MORNING = 1_713_552_811
"""2024-04-19 18:53:31 UTC."""


class Clock:
    def __init__(self) -> None:
        self.now = float(MORNING)

    def __call__(self) -> float:
        return self.now


def submission(group: str = "g", interval: int = 30, failures: int = 3, **fields: Any) -> Submission:
    return Submission(
        command="run", container_group_id=group, heartbeat_interval=interval, max_failures=failures, **fields
    )


class World:
    def __init__(self) -> None:
        self.clock = Clock()
        self.events: list[tuple[str, str]] = []
        self.moved: list[tuple[str, str]] = []
        self.table = KelpieTable(clock=self.clock, on_reallocate=lambda *who: self.moved.append(who))
        self.table.listeners.append(lambda event, job: self.events.append((event, job["id"])))

    def create(self, group: str = "g", user: str = ME, **fields: Any) -> str:
        return str(self.table.create(user, submission(group, **fields))["id"])

    def work(self, machine: str = "m1", group: str = "g", user: str = ME) -> str | None:
        job = self.table.work(user, machine, group)
        return None if job is None else str(job["id"])

    def get(self, job_id: str) -> Job:
        return self.table.get(ME, job_id)

    def after(self, seconds: float) -> None:
        self.clock.now += seconds


@pytest.fixture
def world() -> World:
    return World()


# What a job looks like.


def test_a_new_job_shows_every_field_of_its_submission_and_of_its_life(world: World) -> None:
    given = SUBMISSION.validate_json(
        '{"command": "python", "arguments": ["a"], "environment": {"A": "1"}, "container_group_id": "g",'
        '"webhook": "http://hook", "compression": true, "max_failures": 5, "heartbeat_interval": 7, "later": 1,'
        '"input_bucket": "b", "input_prefix": "in", "output_prefix": "out/", "sync": {"before": '
        '[{"bucket": "b", "prefix": "p", "local_path": "/l", "direction": "download", "mode": "snapshot"}],'
        '"after": [], "never": []}}'
    )
    job = world.table.create(ME, given)
    assert job == {
        "id": str(uuid.UUID(job["id"], version=4)),
        "user_id": ME,
        "status": "pending",
        "created": "2024-04-19T18:53:31.000Z",
        "started": None,
        "completed": None,
        "canceled": None,
        "failed": None,
        "heartbeat": None,
        "num_failures": 0,
        "num_heartbeats": 0,
        "machine_id": None,
        "command": "python",
        "arguments": ["a"],
        "environment": {"A": "1"},
        "input_bucket": "b",
        "input_prefix": "in/",
        "checkpoint_bucket": None,
        "checkpoint_prefix": None,
        "output_bucket": None,
        "output_prefix": "out/",
        "max_failures": 5,
        "heartbeat_interval": 7,
        "webhook": "http://hook",
        "container_group_id": "g",
        "compression": True,
        "sync": {
            "before": [{"bucket": "b", "prefix": "p/", "local_path": "/l", "direction": "download"}],
            "after": [],
        },
    }
    assert world.get(job["id"]) == job
    assert world.table.list(ME) == [job]


def test_what_is_left_out_has_its_default(world: World) -> None:
    job = world.get(world.create())
    assert (job["arguments"], job["environment"], job["compression"], job["sync"]) == ([], {}, False, None)
    plain = SUBMISSION.validate_json('{"command": "x", "container_group_id": "g"}')
    assert (plain.max_failures, plain.heartbeat_interval) == (3, 30)


def test_times_are_whole_seconds_and_only_the_first_is_iso(world: World) -> None:
    world.after(0.9)
    job = world.create()
    assert world.get(job)["created"] == "2024-04-19T18:53:31.000Z"
    world.after(0.2)
    world.work()
    shown = world.get(job)
    assert shown["started"] == shown["heartbeat"] == "2024-04-19 18:53:32"
    assert shown["completed"] is shown["canceled"] is shown["failed"] is None


def test_a_user_is_an_organization(world: World) -> None:
    assert user_of("me") == str(uuid.UUID(ME)) != OTHER
    job = world.create()
    theirs = world.create(user=OTHER)
    assert world.work(user=OTHER) == theirs
    assert world.work(user=OTHER) is None
    world.work()
    calls: list[Callable[[], object]] = [
        lambda: world.table.get(OTHER, job),
        lambda: world.table.cancel(OTHER, job),
        lambda: world.table.heartbeat(OTHER, job, "m1"),
        lambda: world.table.completed(OTHER, job, "m1"),
        lambda: world.table.failed(OTHER, job, "m1"),
        lambda: world.table.get(ME, "none"),
    ]
    before = world.get(job)
    for call in calls:
        with pytest.raises(NoJobError):
            call()
    assert world.get(job) == before
    assert world.table.purge(OTHER, "g") == 1
    assert world.get(job) == before
    assert [found["id"] for found in world.table.list(OTHER)] == [theirs]


# Handing out.


def test_the_oldest_job_comes_first_and_those_of_a_second_as_they_came(world: World) -> None:
    first, second = world.create(), world.create()
    world.after(1)
    third = world.create()
    assert [world.work() for _ in range(4)] == [first, second, third, None]


def test_a_silent_job_comes_before_a_pending_one_whatever_its_age(world: World) -> None:
    older, younger, youngest = (world.create(interval=10) for _ in range(3))
    world.table.failed(ME, older, "m1")
    assert [world.work("m1"), world.work("m1")] == [younger, youngest]
    world.after(20)
    assert [world.work("m2") for _ in range(4)] == [younger, youngest, older, None]


@pytest.mark.parametrize(("interval", "silent"), [(1, 2), (30, 60), (45, 90)])
def test_a_running_job_is_silent_at_two_intervals_to_the_second(world: World, interval: int, silent: int) -> None:
    job = world.create(interval=interval)
    world.work()
    world.after(5)
    assert world.table.heartbeat(ME, job, "m1") == "running"
    world.after(silent - 1)
    assert world.work("m2") is None
    world.after(1)
    assert world.work("m2") == job
    world.after(silent - 1)
    assert world.work("m3") is None, "to take a job is a heartbeat"


def test_fractions_of_a_second_do_not_count(world: World) -> None:
    world.after(0.9)
    job = world.create(interval=1)
    world.work()
    world.after(1.05)
    assert world.work("m2") is None
    world.after(0.1)
    assert world.work("m2") == job, "two seconds have begun since"


def test_a_machine_may_be_given_its_own_silent_job_again(world: World) -> None:
    job = world.create(interval=1)
    assert world.work() == job
    world.after(2)
    assert world.work() == job


def test_a_container_group_has_jobs_of_its_own(world: World) -> None:
    job = world.create("a")
    assert world.work(group="b") is None
    assert world.work(group="a") == job


def test_the_answer_is_the_job_before_it_was_taken_unless_told_otherwise(world: World) -> None:
    world.create()
    given = world.table.work(ME, "m1", "g")
    assert given is not None
    assert (given["status"], given["started"], given["machine_id"]) == ("pending", None, None)
    assert (world.get(given["id"])["status"], world.get(given["id"])["machine_id"]) == ("running", "m1")
    world.table.shows_taken = True
    world.after(60)
    assert world.table.work(ME, "m2", "g") == world.get(given["id"])


def test_two_machines_get_two_jobs_or_in_a_race_the_same(world: World) -> None:
    first, second = world.create(), world.create()
    world.table.race = 2
    assert [world.work("m1"), world.work("m2")] == [first, first]
    assert world.table.race == 0
    assert world.work("m3") == second, "the race is over"
    assert world.get(first)["machine_id"] == "m2"
    assert world.table.heartbeat(ME, first, "m1") == "canceled"
    assert world.table.heartbeat(ME, first, "m2") == "running"


def test_a_race_is_within_a_group_and_keeps_to_bans(world: World) -> None:
    first, second, other = world.create(), world.create(), world.create("h")
    world.table.failed(ME, first, "m2")
    world.table.race = 4
    assert [world.work("m1"), world.work("m2"), world.work(group="h"), world.work("m3")] == [
        first,
        second,
        other,
        first,
    ]
    assert world.table.race == 0


def test_in_a_race_what_came_after_its_beginning_is_not_seen(world: World) -> None:
    world.table.race = 2
    assert world.work("m1") is None
    job = world.create()
    assert world.work("m2") is None
    assert world.work("m2") == job


def test_askers_in_threads_get_different_jobs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = world.table._banned

    def slowly(machine_id: str, job_id: str) -> bool:
        time.sleep(0.001)  # between reading and writing: long enough for anybody else who may
        return looked(machine_id, job_id)

    monkeypatch.setattr(world.table, "_banned", slowly)
    jobs = [world.create() for _ in range(40)]
    got: list[str | None] = []
    start = threading.Barrier(4)

    def ask(machine: str) -> None:
        start.wait()
        got.extend(world.work(machine) for _ in range(10))

    threads = [threading.Thread(target=ask, args=(f"m{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, got)) == sorted(jobs)


# Failures and bans.


def test_a_failure_keeps_the_job_running_until_another_machine_may_have_it(world: World) -> None:
    job = world.create()
    world.work()
    world.after(10)
    world.table.failed(ME, job, "m1")
    shown = world.get(job)
    assert (shown["status"], shown["num_failures"], shown["failed"], shown["machine_id"]) == ("running", 1, None, "m1")
    assert shown["heartbeat"] == "2024-04-19 18:53:31", "still that of its taking"
    world.after(49)
    assert world.work("m2") is None
    world.after(1)
    assert world.work("m1") is None, "never again"
    assert world.work("m2") == job


def test_the_last_failure_fails_the_job(world: World) -> None:
    job = world.create(failures=2, interval=1)
    for number in (1, 2):
        assert world.work(f"m{number}") == job
        world.after(2)
        told = world.table.failed(ME, job, f"m{number}")
        assert told == world.get(job)
    assert (told["status"], told["num_failures"], told["machine_id"]) == ("failed", 2, "m2")
    assert told["failed"] == "2024-04-19 18:53:35"
    assert world.work("m3") is None
    assert [event for event, _ in world.events] == ["created", "started", "failed", "started", "failed"]


def test_a_failure_is_taken_from_anyone_even_of_a_job_that_waits(world: World) -> None:
    job = world.create(failures=1)
    other = world.create()
    world.table.failed(ME, other, "m9")
    assert (world.get(other)["status"], world.get(other)["num_failures"]) == ("pending", 1)
    world.table.completed(ME, job, "m1")
    world.table.failed(ME, job, "m2")
    assert (world.get(job)["status"], world.get(job)["machine_id"]) == ("failed", "m2")


def test_a_machine_is_passed_over_for_what_failed_on_it_and_gets_the_next(world: World) -> None:
    jobs = [world.create(failures=9) for _ in range(BANNED_IN_A_ROW)]
    for job in jobs[:-1]:
        world.table.failed(ME, job, "m1")
    assert world.work("m1") == jobs[-1]
    assert world.moved == []


def test_a_machine_that_failed_the_next_five_gets_nothing_and_is_moved(world: World) -> None:
    jobs = [world.create(failures=9) for _ in range(BANNED_IN_A_ROW)]
    for job in jobs[:-1]:
        world.table.failed(ME, job, "m1")
    world.table.cancel(ME, jobs[-1])
    assert (world.work("m1"), world.moved) == (None, []), "four are not enough"
    fifth = world.create(failures=9)
    world.table.failed(ME, fifth, "m1")
    allowed = world.create()
    assert (world.work("m1"), world.moved) == (None, [("m1", "g")]), "it does not look further"
    assert world.work("m2") == jobs[0]
    assert world.get(allowed)["status"] == "pending"


# Heartbeats, ends, cancellations.


def test_a_heartbeat_is_noted_for_the_holder_alone(world: World) -> None:
    job = world.create()
    world.work("m1")
    world.after(3)
    assert world.table.heartbeat(ME, job, "m1") == "running"
    before = world.get(job)
    assert (before["num_heartbeats"], before["heartbeat"]) == (1, "2024-04-19 18:53:34")
    world.after(3)
    assert world.table.heartbeat(ME, job, "m2") == "canceled"
    assert world.get(job) == before


@pytest.mark.parametrize("status", ["pending", "completed", "canceled", "failed"])
def test_a_heartbeat_of_a_job_that_does_not_run_tells_its_status(world: World, status: str) -> None:
    job = world.create(failures=1)
    end: dict[str, Callable[[], object]] = {
        "pending": lambda: None,
        "completed": lambda: world.table.completed(ME, job, "m1"),
        "canceled": lambda: world.table.cancel(ME, job),
        "failed": lambda: world.table.failed(ME, job, "m1"),
    }
    end[status]()
    before = world.get(job)
    world.after(5)
    assert world.table.heartbeat(ME, job, "m1") == status
    assert world.get(job) == before


def test_completed_is_taken_from_anyone_at_any_time(world: World) -> None:
    job = world.create()
    world.work("m1")
    world.table.cancel(ME, job)
    world.after(7)
    shown = world.table.completed(ME, job, "m2")
    assert shown == world.get(job)
    assert (shown["status"], shown["machine_id"]) == ("completed", "m2")
    assert shown["completed"] == shown["heartbeat"] == "2024-04-19 18:53:38"
    world.after(1)
    world.table.completed(ME, job, "m3")
    assert world.get(job)["completed"] == "2024-04-19 18:53:39", "and again"


def test_a_job_that_ended_is_not_cancelled(world: World) -> None:
    ended = [world.create(failures=1) for _ in range(3)]
    world.table.completed(ME, ended[0], "m1")
    world.table.failed(ME, ended[1], "m1")
    world.table.cancel(ME, ended[2])
    before = [world.get(job) for job in ended]
    world.after(5)
    world.events.clear()
    for job in ended:
        world.table.cancel(ME, job)
    assert [world.get(job) for job in ended] == before
    assert world.events == []


def test_a_cancelled_job_is_the_users_and_goes_to_nobody(world: World) -> None:
    waiting, running = world.create(), world.create()
    world.table.failed(ME, waiting, "m1")
    assert world.work("m1") == running
    for job in (waiting, running):
        world.table.cancel(ME, job)
        shown = world.get(job)
        assert (shown["status"], shown["canceled"], shown["machine_id"]) == ("canceled", "2024-04-19 18:53:31", "user")
    world.after(1000)
    assert world.work("m2") is None
    assert world.table.heartbeat(ME, running, "m1") == "canceled"


def test_a_purge_cancels_what_has_not_ended_in_one_group(world: World) -> None:
    done, running, waiting, elsewhere = world.create(), world.create(), world.create(), world.create("h")
    world.table.completed(ME, done, "m1")
    assert world.work() == running
    assert world.table.purge(ME, "g") == 2
    assert [world.get(job)["status"] for job in (done, running, waiting, elsewhere)] == [
        "completed",
        "canceled",
        "canceled",
        "pending",
    ]
    assert world.table.purge(ME, "g") == 0
    assert world.events[-2:] == [("canceled", running), ("canceled", waiting)]


# Lists and batches.


def test_jobs_are_listed_by_their_creation_a_page_at_a_time(world: World) -> None:
    jobs = []
    for number in range(5):
        jobs.append(world.create("a" if number % 2 else "b"))
        world.after(number % 2)
    world.table.completed(ME, jobs[3], "m1")

    def ids(**query: Any) -> list[str]:
        return [job["id"] for job in world.table.list(ME, **query)]

    assert ids() == jobs[::-1]
    assert ids(asc=True) == jobs
    assert [ids(asc=True, page_size=2, page=page) for page in (1, 2, 3, 4)] == [jobs[:2], jobs[2:4], jobs[4:], []]
    assert ids(container_group_id="a") == [jobs[3], jobs[1]]
    assert ids(status="completed") == [jobs[3]]
    assert ids(status="pending", container_group_id="a") == [jobs[1]]
    assert ids(status="failed") == []


def test_a_page_has_a_hundred_jobs(world: World) -> None:
    jobs = [job["id"] for job in world.table.batch(ME, [submission() for _ in range(101)])]
    assert [job["id"] for job in world.table.list(ME, asc=True)] == jobs[:100]


def test_a_batch_is_all_or_none(world: World) -> None:
    assert world.table.batch(ME, []) == []
    three = [submission("a"), submission("b"), submission("a")]
    made = world.table.batch(ME, three)
    assert [job["container_group_id"] for job in made] == ["a", "b", "a"]
    too_large = submission().model_copy(update={"max_failures": 1 << 70})
    with pytest.raises(OverflowError):
        world.table.batch(ME, [submission(), too_large])
    assert len(world.table.list(ME)) == 3
    assert [event for event, _ in world.events] == ["created"] * 3


# A file.


def test_a_file_keeps_jobs_and_bans(tmp_path: Path) -> None:
    clock = Clock()
    first = KelpieTable(tmp_path / "jobs.db", clock=clock)
    job = first.create(ME, submission(interval=1))["id"]
    first.work(ME, "m1", "g")
    before = first.failed(ME, job, "m1")
    first.close()
    second = KelpieTable(tmp_path / "jobs.db", clock=clock)
    assert second.get(ME, job) == before
    clock.now += 2
    assert second.work(ME, "m1", "g") is None
    taken = second.work(ME, "m2", "g")
    assert taken is not None
    assert taken["id"] == job
    second.close()


# Everything in any order.


@dataclass
class _Model:
    """A job by a second opinion."""

    id: str
    group: str
    interval: int
    failures: int
    created: int
    status: str = "pending"
    heartbeat: int | None = None
    failed: int = 0
    beats: int = 0
    machine: str | None = None
    banned: set[str] = field(default_factory=set)

    def silent(self, now: int) -> bool:
        last = self.created if self.heartbeat is None else self.heartbeat
        return self.status == "running" and now - last >= 2 * self.interval


class Schedule(RuleBasedStateMachine):
    machines = st.sampled_from(["m1", "m2", "m3"])
    groups = st.sampled_from(["g", "h"])
    index = st.integers(0, 1 << 16)

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.jobs: list[_Model] = []
        self.moved = 0

    @property
    def now(self) -> int:
        return int(self.world.clock.now)

    def some(self, index: int) -> _Model | None:
        return self.jobs[index % len(self.jobs)] if self.jobs else None

    def end(self, job: _Model, status: str, machine: str) -> None:
        job.status, job.machine, job.heartbeat = status, machine, self.now

    @rule(seconds=st.sampled_from([0.4, 1, 2, 5]))
    def wait(self, seconds: float) -> None:
        self.world.after(seconds)

    @rule(group=groups, interval=st.integers(1, 3), failures=st.integers(1, 3))
    def create(self, group: str, interval: int, failures: int) -> None:
        job_id = self.world.create(group, interval=interval, failures=failures)
        self.jobs.append(_Model(job_id, group, interval, failures, self.now))

    @rule(machine=machines, group=groups)
    def work(self, machine: str, group: str) -> None:
        mine = [job for job in self.jobs if job.group == group]
        line = [job for job in mine if job.silent(self.now)] + [job for job in mine if job.status == "pending"]
        expected = next((job for job in line[:5] if machine not in job.banned), None)
        self.moved += expected is None and len(line) >= 5
        assert self.world.work(machine, group) == (expected and expected.id)
        if expected is not None:
            self.end(expected, "running", machine)

    @rule(machine=machines, index=index)
    def heartbeat(self, machine: str, index: int) -> None:
        if (job := self.some(index)) is None:
            return
        lost = job.status == "running" and job.machine != machine
        expected = "canceled" if lost else job.status
        assert self.world.table.heartbeat(ME, job.id, machine) == expected
        if expected == "running":
            job.heartbeat, job.beats = self.now, job.beats + 1

    @rule(machine=machines, index=index)
    def complete(self, machine: str, index: int) -> None:
        if (job := self.some(index)) is not None:
            self.world.table.completed(ME, job.id, machine)
            self.end(job, "completed", machine)

    @rule(machine=machines, index=index)
    def fail(self, machine: str, index: int) -> None:
        if (job := self.some(index)) is None:
            return
        self.world.table.failed(ME, job.id, machine)
        job.banned.add(machine)
        job.failed += 1
        if job.failed >= job.failures:
            self.end(job, "failed", machine)

    @rule(index=index)
    def cancel(self, index: int) -> None:
        if (job := self.some(index)) is not None:
            self.world.table.cancel(ME, job.id)
            self.cancelled(job)

    @rule(group=groups)
    def purge(self, group: str) -> None:
        mine = [job for job in self.jobs if job.group == group and job.status in ("pending", "running")]
        assert self.world.table.purge(ME, group) == len(mine)
        for job in mine:
            self.cancelled(job)

    def cancelled(self, job: _Model) -> None:
        if job.status in ("pending", "running"):
            self.end(job, "canceled", "user")

    @invariant()
    def the_table_agrees(self) -> None:
        shown = self.world.table.list(ME, asc=True, page_size=1000)
        names = ("id", "status", "num_failures", "num_heartbeats", "machine_id")
        assert [tuple(job[name] for name in names) for job in shown] == [
            (job.id, job.status, job.failed, job.beats, job.machine) for job in self.jobs
        ]
        assert len(self.world.moved) == self.moved


def test_in_any_schedule_the_table_does_what_a_plain_model_does() -> None:
    run_state_machine_as_test(
        Schedule, settings=settings(max_examples=60, stateful_step_count=50, deadline=None, print_blob=True)
    )


def test_a_time_is_never_in_another_form(world: World) -> None:
    job = world.create(failures=1)
    world.work()
    world.table.completed(ME, job, "m1")
    world.table.failed(ME, job, "m1")
    shown = world.get(job)
    for name in ("started", "completed", "failed", "heartbeat"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", shown[name]), name
