"""The local Salad Job Queue's rules: tries, order, who holds what, and what a lost stream costs."""

from __future__ import annotations

import pytest

from heeler.local.queue_model import (
    Action,
    ContainerGroup,
    End,
    ExistsError,
    JobStatus,
    Machine,
    NotFoundError,
    NotHeldError,
)
from tests.support.queue_world import GRACE, QUEUE, QueueWorld, actions

A, B = Machine("group", "a"), Machine("group", "b")


@pytest.fixture
def world() -> QueueWorld:
    return QueueWorld()


def test_a_job_goes_to_a_stream_that_waits_and_to_one_that_comes_later(world: QueueWorld) -> None:
    stream = world.open(A)
    first = world.submit()
    assert stream.job is first
    assert world.wakes == [A]
    second = world.submit()
    assert second.status is JobStatus.PENDING, "one job at a time"
    assert world.open(B).job is second


def test_jobs_are_sent_in_the_order_of_their_submission_one_after_each_report(world: QueueWorld) -> None:
    jobs = [world.submit() for _ in range(4)]
    world.open(A)
    for number, job in enumerate(jobs):
        assert world.held(A) is job
        if number == 2:
            world.state.complete(A, job.id, b"2")
        else:
            world.state.complete(A, job.id, b"")
    assert [job.output for job in jobs] == [b"", b"", b"2", b""]


def test_workers_take_turns(world: QueueWorld) -> None:
    world.open(A)
    world.open(B)
    taken = []
    for _ in range(4):
        job = world.submit()
        taken += job.workers
        world.state.complete(Machine("group", job.workers[-1]), job.id, b"")
    assert taken == ["a", "b", "a", "b"]


def test_a_rejected_job_comes_again_before_later_ones_and_fails_after_its_fourth_try(world: QueueWorld) -> None:
    job, later = world.submit(), world.submit()
    world.open(A)
    for number in range(1, 5):
        assert world.held(A) is job
        assert job.tries == number
        world.state.reject(A, job.id)
    assert job.status is JobStatus.FAILED
    assert actions(job) == [Action.CREATED, *[Action.STARTED] * 4, Action.FAILED]
    assert world.held(A) is later


def test_only_the_holder_may_report_and_only_once(world: QueueWorld) -> None:
    job = world.submit()
    world.open(A)
    world.open(B)
    for machine, job_id in ((B, job.id), (Machine("other", "a"), job.id), (A, "no-such-job")):
        with pytest.raises(NotHeldError):
            world.state.complete(machine, job_id, b"")
        with pytest.raises(NotHeldError):
            world.state.reject(machine, job_id)
    world.state.complete(A, job.id, b"mine")
    with pytest.raises(NotHeldError):
        world.state.complete(A, job.id, b"again")
    with pytest.raises(NotHeldError):
        world.state.reject(A, job.id)
    assert job.output == b"mine"
    assert job.tries == 1


def test_a_machine_may_come_back_for_its_job_within_the_grace_and_the_try_goes_on(world: QueueWorld) -> None:
    job = world.submit()
    stream = world.open(A)
    world.state.end(stream, End.DROPPED)
    assert stream.end is End.DROPPED
    other = world.open(B)
    world.wait(GRACE - 0.001)
    again = world.open(A, job.id)
    world.wait(10 * GRACE)
    assert (job.status, job.tries, job.workers) == (JobStatus.RUNNING, 1, ["a"])
    assert again.job is None, "it has it already"
    assert other.job is None
    world.state.complete(A, job.id, b"")
    assert job.status is JobStatus.SUCCEEDED


def test_a_job_of_a_lost_stream_may_be_reported_within_the_grace_and_not_after(world: QueueWorld) -> None:
    first = world.submit()
    world.state.end(world.open(A), End.DROPPED)
    world.wait(GRACE - 0.001)
    world.state.complete(A, first.id, b"")
    second = world.submit()
    world.state.end(world.open(A), End.DROPPED)
    assert world.state.until_lapse() == GRACE
    world.wait(GRACE)
    with pytest.raises(NotHeldError):
        world.state.complete(A, second.id, b"")
    assert (second.status, second.tries) == (JobStatus.PENDING, 1)
    assert world.state.until_lapse() is None


def test_after_the_grace_the_job_goes_to_the_next_stream_and_its_old_machine_has_lost_it(world: QueueWorld) -> None:
    job = world.submit()
    world.state.end(world.open(A), End.DROPPED)
    other = world.open(B)
    world.wait(GRACE)
    assert other.job is job
    assert job.tries == 2
    with pytest.raises(NotHeldError):
        world.open(A, job.id)
    assert A not in world.state.streams, "the stream was not opened"


def test_a_stream_opened_without_the_job_that_its_machine_holds_costs_the_try_at_once(world: QueueWorld) -> None:
    job = world.submit()
    first = world.open(A)
    second = world.open(A)
    assert first.end is End.REPLACED
    assert second.job is job
    assert (job.tries, job.workers) == (2, ["a", "a"])
    other = world.open(B)
    world.state.reject(A, job.id)
    assert other.job is job, "the one that waited longer"


def test_a_second_stream_of_a_machine_ends_the_first_and_takes_its_place(world: QueueWorld) -> None:
    first = world.open(A)
    second = world.open(A)
    world.state.end(first, End.DROPPED)
    job = world.submit()
    assert first.end is End.REPLACED
    assert first.job is None
    assert second.job is job
    assert world.state.streams == {A: second}


def test_the_loss_of_a_replaced_stream_does_not_start_the_grace(world: QueueWorld) -> None:
    job = world.submit()
    first = world.open(A)
    world.open(A, job.id)
    world.state.end(first, End.DROPPED)
    world.wait(10 * GRACE)
    assert world.held(A) is job


def test_a_stream_for_a_job_of_another_is_refused_and_leaves_the_machines_own_stream(world: QueueWorld) -> None:
    job = world.submit()
    world.open(A)
    own = world.open(B)
    for wrong in (job.id, "no-such-job"):
        with pytest.raises(NotHeldError):
            world.open(B, wrong)
    assert own.end is None


def test_lost_machines_cost_tries_too_and_the_fourth_is_the_last(world: QueueWorld) -> None:
    job = world.submit()
    for _ in range(4):
        world.state.end(world.open(A), End.DROPPED)
        world.wait(GRACE)
    assert (job.status, job.tries) == (JobStatus.FAILED, 4)


def test_a_service_that_was_away_gives_the_whole_grace_again(world: QueueWorld) -> None:
    job = world.submit()
    world.state.end(world.open(A), End.DROPPED)
    world.clock.now += 100 * GRACE
    world.state.resume()
    world.state.lapse()
    assert world.held(A) is job
    world.wait(GRACE)
    assert world.held(A) is None


def test_a_job_cancelled_while_it_waits_is_never_sent(world: QueueWorld) -> None:
    first, second = world.submit(), world.submit()
    world.state.cancel(first.id)
    assert world.open(A).job is second
    assert actions(first) == [Action.CREATED, Action.CANCELLED]


def test_a_job_cancelled_at_a_machine_ends_its_stream_and_is_no_longer_its_own(world: QueueWorld) -> None:
    job = world.submit()
    stream = world.open(A)
    world.state.cancel(job.id)
    assert stream.end is End.CANCELLED
    assert world.wakes == [A, A], "for the job, and for the end"
    with pytest.raises(NotHeldError):
        world.open(A, job.id)
    with pytest.raises(NotHeldError):
        world.state.complete(A, job.id, b"")
    following = world.submit()
    assert world.open(A).job is following
    assert job.tries == 1


def test_to_cancel_a_job_that_has_ended_changes_nothing(world: QueueWorld) -> None:
    job = world.submit()
    world.open(A)
    world.state.complete(A, job.id, b"")
    world.state.cancel(job.id)
    assert job.status is JobStatus.SUCCEEDED


def test_a_deleted_queue_ends_its_streams_and_refuses_new_ones(world: QueueWorld) -> None:
    job, waiting = world.submit(), world.submit()
    busy = world.open(A)
    world.state.delete_queue(QUEUE)
    assert busy.end is not None
    assert job.status is waiting.status is JobStatus.CANCELLED
    for gone in (lambda: world.open(A), world.submit, lambda: world.state.job(job.id)):
        with pytest.raises(NotFoundError):
            gone()


def test_a_queue_has_its_name_for_itself(world: QueueWorld) -> None:
    with pytest.raises(ExistsError):
        world.state.create_queue(QUEUE)
    world.state.create_queue(QUEUE._replace(project="another"))


def test_a_machine_of_a_group_without_a_queue_gets_no_stream(world: QueueWorld) -> None:
    with pytest.raises(NotFoundError):
        world.open(Machine("another", "a"))


def test_queues_do_not_share_jobs_or_workers(world: QueueWorld) -> None:
    other = QUEUE._replace(queue="other")
    world.state.create_queue(other)
    world.state.connect(ContainerGroup("other-group", "workers", other, 81, "/"))
    job = world.state.submit(other, b"1")
    assert world.open(A).job is None
    assert world.open(Machine("other-group", "a")).job is job
