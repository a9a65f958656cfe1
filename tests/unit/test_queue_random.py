"""Random schedules of everything that can happen to the local Salad Job Queue, against what must always hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from heeler.local.queue_model import Action, End, Job, JobStatus, Machine, NotHeldError, Stream
from tests.support.queue_world import GRACE, QUEUE, QueueWorld, actions


class Schedule(RuleBasedStateMachine):
    """Any order of anything that can happen, against what must hold all the time."""

    machines = st.sampled_from([Machine("group", name) for name in "abc"])
    index = st.integers(0, 1 << 16)

    def __init__(self) -> None:
        super().__init__()
        self.world = QueueWorld()
        self.state = self.world.state
        self.streams: list[Stream] = []
        self.sent: list[Job] = []
        self.state.listeners.append(self._listen)

    def _listen(self, event: str, job: Job) -> None:
        if event == "started":
            waiting = [other.number for other in self.state.jobs.values() if other.status is JobStatus.PENDING]
            assert all(job.number < number for number in waiting), "an older job waits"

    def _some_job(self, index: int) -> str:
        jobs = list(self.state.jobs)
        return jobs[index % len(jobs)] if jobs else "none"

    @rule()
    def submit(self) -> None:
        self.world.submit()

    @rule(machine=machines)
    def open_new(self, machine: Machine) -> None:
        before = self.world.held(machine)
        tries = before.tries if before else 0
        self.streams.append(self.world.open(machine))
        if before is not None:
            assert before.status is JobStatus.FAILED if tries == 4 else before.tries >= tries

    @rule(machine=machines, index=index)
    def come_back(self, machine: Machine, index: int) -> None:
        held = self.world.held(machine)
        job_id = self._some_job(index)
        if held is not None and held.id == job_id:
            tries = held.tries
            self.streams.append(self.world.open(machine, job_id))
            assert (self.world.held(machine), held.tries) == (held, tries)
        else:
            with pytest.raises(NotHeldError):
                self.world.open(machine, job_id)

    @rule(machine=machines)
    def come_back_for_its_own(self, machine: Machine) -> None:
        if held := self.world.held(machine):
            self.streams.append(self.world.open(machine, held.id))

    @rule(index=index)
    def lose_a_stream(self, index: int) -> None:
        if self.streams:
            self.state.end(self.streams[index % len(self.streams)], End.DROPPED)

    @rule(machine=machines, index=index, own=st.booleans(), done=st.booleans())
    def report(self, machine: Machine, index: int, own: bool, done: bool) -> None:
        held = self.world.held(machine)
        job_id = held.id if own and held else self._some_job(index)
        allowed = held is not None and held.id == job_id

        def call() -> None:
            if done:
                self.state.complete(machine, job_id, b"result")
            else:
                self.state.reject(machine, job_id)

        if not allowed:
            with pytest.raises(NotHeldError):
                call()
            return
        assert held is not None
        tries = held.tries
        call()
        if done:
            assert (held.status, held.tries, held.output) == (JobStatus.SUCCEEDED, tries, b"result")
        else:
            assert (held.status is JobStatus.FAILED) == (tries == 4)

    @rule(index=index)
    def cancel(self, index: int) -> None:
        if self.state.jobs:
            self.state.cancel(self._some_job(index))

    @rule(seconds=st.floats(0, 2 * GRACE))
    def wait(self, seconds: float) -> None:
        self.world.wait(seconds)

    @rule(seconds=st.floats(0, 10 * GRACE))
    def be_away(self, seconds: float) -> None:
        for stream in list(self.state.streams.values()):
            self.state.end(stream, End.DROPPED)
        self.world.clock.now += seconds
        held = dict(self.state.holds)
        self.state.resume()
        self.state.lapse()
        assert self.state.holds == held

    @invariant()
    def each_job_is_in_one_place(self) -> None:
        held = [hold.job for hold in self.state.holds.values()]
        assert len({job.id for job in held}) == len(held), "one job at two machines"
        for job in self.state.jobs.values():
            assert (job in held) == (job.status is JobStatus.RUNNING)
        pending = [job for job in self.state.jobs.values() if job.status is JobStatus.PENDING]
        assert self.state.waiting(QUEUE) == len(pending)

    @invariant()
    def tries_are_counted_as_they_are_sent(self) -> None:
        for job in self.state.jobs.values():
            assert job.tries == actions(job).count(Action.STARTED) == len(job.workers) <= 4
            assert job.status is not JobStatus.FAILED or job.tries == 4
            assert sum(1 for action in actions(job) if action not in (Action.CREATED, Action.STARTED)) == int(
                job.status.final
            ), "it ends once"

    @invariant()
    def nobody_waits_for_nothing(self) -> None:
        free = [machine for machine in self.state.streams if machine not in self.state.holds]
        assert not free or self.state.waiting(QUEUE) == 0

    @invariant()
    def a_hold_without_a_stream_lapses(self) -> None:
        for machine, hold in self.state.holds.items():
            assert (hold.lapses is None) == (machine in self.state.streams)

    @invariant()
    def a_machine_has_one_open_stream(self) -> None:
        opened = [stream for stream in self.streams if stream.end is None]
        assert {stream.machine: stream for stream in opened} == self.state.streams
        assert len(opened) == len(self.state.streams)

    def teardown(self) -> None:
        """Whatever happened: one good worker brings every job to its end."""
        for stream in list(self.state.streams.values()):
            self.state.end(stream, End.DROPPED)
        self.world.wait(GRACE)
        worker = Machine("group", "last")
        self.world.open(worker)
        while held := self.world.held(worker):
            self.state.complete(worker, held.id, b"")
        assert all(job.status.final for job in self.state.jobs.values())


def test_in_any_schedule_each_job_is_at_one_place_and_ends_once() -> None:
    run_state_machine_as_test(Schedule, settings=settings(max_examples=100, stateful_step_count=40, deadline=None))
