"""A worker cut off from SQS, or from storage, for longer than the visibility: nothing is lost, and nothing done twice.

The link is a TCP proxy that drops everything without a word.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.acceptance.snapshot_programs import QUICK, Prefix, snapshots
from tests.acceptance.sqs_world import NO_RECORDS, SqsWorld, sqs_world
from tests.acceptance.world import alive, eventually
from tests.support.proxy import FaultProxy
from tests.support.sqs_server import SqsServer
from tests.support.worker import Worker

VISIBILITY = 3
SETTINGS = {**QUICK, "HEELER_COMMIT_INTERVAL": "3", "HEELER_SQS_VISIBILITY": str(VISIBILITY)}

WITH_AND_WITHOUT_RECORDS = pytest.mark.parametrize("records", [{}, NO_RECORDS], ids=["records", "no records"])

# Saves how far it is and who it is, again and again, and ends when told to; the first attempt never does.
WHO = (
    "who=$HEELER_ATTEMPT; cp $CHECKPOINT_DIR/state $W/found-$who; touch $W/found-$who\n"
    "echo $$ > $W/new-$who; mv $W/new-$who $W/pid-$who; for number in $(seq 100000); do\n"
    "  echo $who $number > $CHECKPOINT_DIR/new; mv $CHECKPOINT_DIR/new $CHECKPOINT_DIR/state; sleep 0.6\n"
    "  if test $who != 1 -a -e $W/finish; then echo by $who > $OUTPUT_DIR/who; exit 0; fi\n"
    "done"
)
# Tells that it runs, and ends when told to.
WAITS = (
    "who=$HEELER_ATTEMPT; echo $who >> $W/runs; echo $$ > $W/new-$who; mv $W/new-$who $W/pid-$who\n"
    "while ! test -e $W/finish; do sleep 0.05; done; echo by $who > $OUTPUT_DIR/who"
)


@pytest.fixture(scope="module")
def server() -> Iterator[SqsServer]:
    with SqsServer() as made:
        yield made


@pytest.fixture
def world(tmp_path: Path, server: SqsServer) -> Iterator[SqsWorld]:
    with sqs_world(tmp_path, server) as made:
        yield made


@contextmanager
def cut_off(world: SqsWorld, **settings: str) -> Iterator[tuple[FaultProxy, Worker]]:
    """The link to the queue, and a worker at its end, on a machine of its own."""
    with FaultProxy("127.0.0.1", world.server.port) as link:
        environment = {**SETTINGS, "AWS_ENDPOINT_URL_SQS": link.url, **settings}
        with world.worker(machine="first", **environment) as worker:
            yield link, worker


def held_for(seconds: float, holds: Callable[[], bool], what: str) -> None:
    """A condition holds all that time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert holds(), what
        time.sleep(0.05)


def is_held(world: SqsWorld, receives: int = 1) -> bool:
    """Whether the one message is hidden, and was received so often."""
    message = world.message()
    return bool(message["hidden"] > 0 and message["receives"] == receives)


def check_once(world: SqsWorld, records: dict[str, str], attempts: int) -> None:
    """The job is done, once, in so many attempts, and its message is gone."""
    world.wait_empty()
    assert not world.set_aside()
    if records:  # without
        assert world.record() is None
        return
    versions = world.record_versions()
    assert [version.state for version in versions].count("done") == 1, versions
    record = versions[-1]
    assert (record.state, record.attempts, record.failures) == ("done", attempts, 0), record
    assert record.interruptions == attempts - 1, record
    assert len(world.results()) == 1
    assert world.result() == b'{"exit_code": 0, "signal": null}\n'


# Another worker takes the job.


@WITH_AND_WITHOUT_RECORDS
def test_a_worker_cut_off_while_another_takes_its_job_changes_nothing_more(
    world: SqsWorld, records: dict[str, str]
) -> None:
    prefix = Prefix(world.storage)
    world.submit(world.bash(WHO), sync={**snapshots(), **world.outputs()})
    with cut_off(world, **records) as (link, first):
        first.wait_for("committed")
        link.set(partition=True)
        with world.worker(name="b", machine="second", **SETTINGS, **records) as second:
            assert second.wait_for("job_received")["attempt"] == 2
            second.wait_for("committed", count=2)
            pid = world.told_pid("pid-1")
            link.clear()
            settled = first.wait_for("job_settled", timeout=10)
            assert not alive(pid)
            assert alive(world.told_pid("pid-2"))
            assert is_held(world, receives=2)
            first.wait_for("phase", phase="receive", count=2)
            second.wait_for("committed", count=len(second.find("committed")) + 1)
            world.tell("finish")
            second.wait_for("job_settled", outcome="done")
            assert not second.find("heartbeat_failed")
    assert settled["outcome"] == "lost"
    assert not first.find("job_settled", outcome="done")
    assert world.versions("out/who") == [b"by 2\n"]
    assert world.told("found-2").startswith("1 ")
    whose = [files["state"].split()[0] for files in prefix.every().values()]
    assert whose == sorted(whose), whose
    heads = [(head["epoch"], head["holder"]) for head in prefix.heads()]
    assert len({holder for _, holder in heads}) == 2
    assert [epoch for epoch, _ in heads] == sorted(epoch for epoch, _ in heads)
    assert prefix.head()["status"] == "complete"
    if not records:
        # Of the first worker there is the attempt, and no write after it.
        attempts = [version.attempts for version in world.record_versions()]
        assert attempts == sorted(attempts), attempts
    check_once(world, records, attempts=2)


@WITH_AND_WITHOUT_RECORDS
def test_a_program_without_a_fence_is_ended_when_the_worker_hears_that_another_has_the_job(
    world: SqsWorld, records: dict[str, str]
) -> None:
    world.submit(world.bash(WAITS), sync=world.outputs())
    with cut_off(world, **records) as (link, first):
        pid = world.told_pid("pid-1")
        link.set(partition=True)
        first.wait_for("lease_lapsed")
        with world.worker(name="b", machine="second", **SETTINGS, **records) as second:
            assert second.wait_for("job_received")["attempt"] == 2
            world.told("pid-2")
            if records == NO_RECORDS:
                assert alive(pid)
                link.clear()
            # Else its job's record tells it, the queue still out of reach.
            first.wait_for("job_settled", outcome="lost", timeout=10)
            assert not alive(pid)
            link.clear()
            assert is_held(world, receives=2)
            world.tell("finish")
            second.wait_for("job_settled", outcome="done")
    assert world.versions("out/who") == [b"by 2\n"]
    check_once(world, records, attempts=2)


@WITH_AND_WITHOUT_RECORDS
def test_a_job_that_ends_on_both_sides_of_the_cut_has_the_result_of_its_new_holder(
    world: SqsWorld, records: dict[str, str]
) -> None:
    world.submit(world.bash(WAITS), sync=world.outputs())
    with cut_off(world, **records) as (link, first):
        world.told("pid-1")
        link.set(partition=True)
        first.wait_for("lease_lapsed")
        with world.worker(name="b", machine="second", **SETTINGS, **records) as second:
            second.wait_for("job_received")
            world.told("pid-2")
            world.tell("finish")  # to both
            second.wait_for("job_settled", outcome="done")
            world.wait_empty()
            link.clear()
            first.wait_for("job_settled", outcome="lost", timeout=10)
            first.wait_for("phase", phase="receive", count=2)
    assert world.versions("out/who") == [b"by 2\n"]
    check_once(world, records, attempts=2)


# Nobody else takes it.


def test_a_worker_cut_off_that_no_other_replaces_gets_its_job_back_and_goes_on(world: SqsWorld) -> None:
    world.submit(world.bash(WAITS), sync=world.outputs())
    with cut_off(world) as (link, worker):
        pid = world.told_pid("pid-1")
        link.set(partition=True)
        worker.wait_for("lease_lapsed")
        eventually(lambda: world.message()["hidden"] <= 0, "the message is visible again")
        link.clear()
        worker.wait_for("lease_confirmed_again")
        assert alive(pid)
        eventually(lambda: world.message()["hidden"] > 0, "it is ours again")
        world.tell("finish")
        worker.wait_for("job_settled", outcome="done")
    assert world.told("runs") == "1\n"
    assert world.versions("out/who") == [b"by 1\n"]
    check_once(world, {}, attempts=1)


def test_without_records_such_a_job_is_worked_on_while_the_queue_is_out_of_reach_and_done_again_after(
    world: SqsWorld,
) -> None:
    """Looking for its message would spend receives of others, which count as failures there."""
    world.submit(world.bash(WAITS), sync=world.outputs())
    with cut_off(world, **NO_RECORDS) as (link, worker):
        pid = world.told_pid("pid-1")
        link.set(partition=True)
        worker.wait_for("lease_lapsed")
        eventually(lambda: world.message()["hidden"] <= 0, "the message is visible again")
        worker.wait_for("heartbeat_failed", count=len(worker.find("heartbeat_failed")) + 2)
        assert alive(pid)
        link.clear()
        worker.wait_for("job_settled", outcome="lost", timeout=10)
        assert not alive(pid)
        world.told("pid-2")
        world.tell("finish")
        worker.wait_for("job_settled", outcome="done")
    assert world.versions("out/who") == [b"by 2\n"]
    check_once(world, NO_RECORDS, attempts=2)


@WITH_AND_WITHOUT_RECORDS
def test_a_worker_cut_off_from_a_queue_with_a_redrive_policy_does_its_job_again_from_its_checkpoint(
    tmp_path: Path, server: SqsServer, records: dict[str, str]
) -> None:
    with sqs_world(tmp_path, server, redrive=50) as world:
        prefix = Prefix(world.storage)
        world.submit(world.bash(WHO), sync={**snapshots(), **world.outputs()})
        with cut_off(world, **records) as (link, worker):
            worker.wait_for("committed")
            link.set(partition=True)
            worker.wait_for("lease_lapsed")
            eventually(lambda: world.message()["hidden"] <= 0, "the message is visible again")
            link.clear()
            worker.wait_for("job_settled", outcome="lost")
            assert worker.wait_for("job_received", count=2)["attempt"] == 2
            committed = prefix.files(worker.wait_for("acquired", count=2)["generation"])
            world.told("pid-2")
            world.tell("finish")
            worker.wait_for("job_settled", outcome="done")
        assert world.told("found-2").encode() == committed["state"]
        assert world.told("found-2").startswith("1 ")
        assert world.versions("out/who") == [b"by 2\n"]
        check_once(world, records, attempts=2)


def test_a_program_that_ends_in_a_cut_is_not_run_again(world: SqsWorld) -> None:
    world.submit(world.bash(WAITS), sync=world.outputs())
    with cut_off(world) as (link, worker):
        world.told("pid-1")
        link.set(partition=True)
        worker.wait_for("heartbeat_failed")
        world.tell("finish")
        world.wait_record("done")
        eventually(lambda: world.message()["hidden"] <= 0, "the message is visible again")
        link.clear()
        world.wait_empty()
    assert world.told("runs") == "1\n"
    assert world.versions("out/who") == [b"by 1\n"]
    check_once(world, {}, attempts=1)


# It heals in time.


@WITH_AND_WITHOUT_RECORDS
def test_a_cut_shorter_than_the_visibility_changes_nothing(world: SqsWorld, records: dict[str, str]) -> None:
    world.submit(world.bash(WAITS), sync=world.outputs())
    long = {**records, "HEELER_SQS_VISIBILITY": "12"}
    with cut_off(world, **long) as (link, first):
        world.told("pid-1")
        with world.worker(name="b", machine="second", **{**SETTINGS, **long}) as second:
            link.set(partition=True)
            first.wait_for("heartbeat_failed")
            left = world.message()["hidden"]
            link.clear()
            eventually(lambda: world.message()["hidden"] > left, "it is extended")
            assert is_held(world)
            assert alive(world.told_pid("pid-1"))
            world.tell("finish")
            first.wait_for("job_settled", outcome="done")
            assert not second.find("job_received")
    assert not first.find("lease_lapsed")
    assert world.told("runs") == "1\n"
    assert world.versions("out/who") == [b"by 1\n"]
    check_once(world, records, attempts=1)


# Storage is out of reach, the queue is not.


@WITH_AND_WITHOUT_RECORDS
def test_a_worker_cut_off_from_storage_keeps_its_job(world: SqsWorld, records: dict[str, str]) -> None:
    world.submit(world.bash(WAITS), sync=world.outputs())
    with FaultProxy("127.0.0.1", world.storage.port) as link:
        settings = {**SETTINGS, "AWS_ENDPOINT_URL_S3": link.url, "HEELER_S3_TIMEOUT": "2", **records}
        with world.worker(machine="first", **settings) as first:
            world.told("pid-1")
            with world.worker(name="b", machine="second", **SETTINGS, **records) as second:
                second.wait_for("phase", phase="receive")
                link.set(partition=True)
                held_for(4 * VISIBILITY, lambda: is_held(world), "the message is ours")
                world.tell("finish")
                first.wait_for("phase", phase="upload")
                held_for(VISIBILITY, lambda: is_held(world), "the message is ours")
                assert not first.find("job_settled")
                assert not first.find("lease_lapsed")
                assert bool(first.find("record_not_read")) is not bool(records)
                link.clear()
                first.wait_for("job_settled", outcome="done")
                assert not second.find("job_received")
    assert world.told("runs") == "1\n"
    assert set(world.versions("out/who")) == {b"by 1\n"}  # an answer may have been lost in the cut
    check_once(world, records, attempts=1)


def test_a_cut_off_worker_that_commits_each_second_does_not_keep_out_the_next(world: SqsWorld) -> None:
    often = {"HEELER_COMMIT_INTERVAL": "0.2", **NO_RECORDS}
    world.submit(world.bash(WHO), sync={**snapshots(), **world.outputs()})
    with cut_off(world, **often) as (link, first):
        first.wait_for("committed")
        link.set(partition=True)
        with world.worker(name="b", machine="second", **{**SETTINGS, **often}) as second:
            second.wait_for("acquired", timeout=60)
