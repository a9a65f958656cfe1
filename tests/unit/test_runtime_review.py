"""What a hostile reading of the runtime found; in virtual time."""

from __future__ import annotations

import gc
import io
import json
import os
import random
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import NoReturn, cast

import anyio
import pytest

from heeler import signals, supervisor
from heeler.app.process import Child, child
from heeler.app.readiness import Address, parse_app_url
from heeler.checkpoints import Checkpoints, Generation
from heeler.config import flag_name, load
from heeler.drain import Drain
from heeler.errors import UsageError
from heeler.folders import NoFolders
from heeler.forwarder import Forwarder
from heeler.http import Answer
from heeler.job import Ending, InvalidJobError, Job, Outcome, Result
from heeler.log import logging_to
from heeler.message import of_app_message
from heeler.platform.deletion import DeletionCost
from heeler.platform.imds import Imds
from heeler.sources.base import LeaseState
from heeler.status import Phase, Status
from tests.support.apps import Delivered, Register
from tests.support.leases import HANG, ScriptedDelivery, ScriptedFiles, ScriptedLease, ScriptedSource
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture(scope="module", autouse=True)
def _leave_no_files_open() -> Iterator[None]:
    """Other tests count the open ones; a runtime's end leaves its file index to the process's."""
    yield
    gc.collect()


def quiet() -> Status:
    return Status(lambda _level, _name, _fields: None, worker="w", source="s")


async def never(_: object) -> Answer:
    await anyio.sleep_forever()
    raise AssertionError


async def test_a_lease_lost_between_two_tries_here_does_not_touch_the_app() -> None:
    world = Delivered(never, start_timeout=5.0)
    passing = Ending(Outcome.RETRY, "the app answered 503", Result(status=503), delay=60.0, transient=True)
    calls = 0
    real = world.delivery.deliver

    async def deliver(assignment: object, drain: Drain) -> Ending:
        nonlocal calls
        calls += 1
        return passing if calls == 1 else await real(assignment, drain)  # type: ignore[arg-type]

    world.delivery.deliver = deliver  # type: ignore[method-assign]
    lease = ScriptedLease(answers=[LeaseState.LOST])
    lease.spends_tries = True
    forwarder = Forwarder(
        ScriptedSource(lease),
        world.delivery,
        lambda _lease, _keeper: NoFolders({}),
        Drain(30.0),
        quiet(),
        rng=random.Random(1),
        tries=3,
    )
    with anyio.fail_after(100):
        await forwarder.run()
    assert calls == 1
    assert world.sent == []
    assert world.program is not None
    assert world.program.calls == []
    assert lease.how == []


@pytest.mark.parametrize("seconds", [2.0, 1000.0])
async def test_a_pause_that_hangs_leaves_time_to_tell_the_queue_in_a_drain(seconds: float) -> None:
    """The drain begins before the pause, or in it."""
    lease = ScriptedLease(expires_after=3600.0)
    source = ScriptedSource(lease)

    async def hang() -> None:
        await anyio.sleep_forever()

    source.pause = hang  # type: ignore[method-assign]
    drain = Drain(3.0)
    files = ScriptedFiles([], {"flush": anyio.sleep_forever} if seconds > 3 else {})
    delivery = ScriptedDelivery(seconds=seconds)
    forwarder = Forwarder(source, delivery, lambda *_: files, drain, quiet(), rng=random.Random(1), max_jobs=1)
    async with anyio.create_task_group() as group:
        group.start_soon(forwarder.run)
        await anyio.sleep(3)
        drain.begin("SIGTERM")
    assert lease.how == ["release" if seconds > 3 else "complete"]
    assert anyio.current_time() < drain.deadline.at


class Costs:
    def __init__(self) -> None:
        self.told: list[int] = []

    async def set_deletion_cost(self, cost: int) -> None:
        self.told.append(cost)


async def test_the_deletion_cost_stays_while_any_lane_has_a_job() -> None:
    status, costs = quiet(), Costs()
    async with anyio.create_task_group() as group:
        group.start_soon(DeletionCost(cast(Imds, costs), status).run)

        async def lane(job: str, seconds: float) -> None:
            with status.lane():
                status.take(job, 1)
                status.enter(Phase.RUN)
                await anyio.sleep(seconds)
                status.drop()
                status.enter(Phase.RECEIVE)
                await anyio.sleep(1000)

        group.start_soon(lane, "a", 300.0)
        group.start_soon(lane, "b", 5.0)
        await anyio.sleep(200)
        assert costs.told[-1] >= 5
        assert 0 not in costs.told[1:]
        await anyio.sleep(200)
        assert costs.told[-1] == 0
        group.cancel_scope.cancel()


@pytest.mark.parametrize("url", ["http://me:hunter22@127.0.0.1:8080", "https://me:hunter22@a", "me:hunter22@a:80"])
def test_a_refused_app_url_shows_no_password(url: str) -> None:
    with pytest.raises(UsageError, match="--app-url") as refused:
        parse_app_url(url)
    assert "hunter22" not in str(refused.value)


def test_port_0_is_no_address_of_an_app() -> None:
    with pytest.raises(UsageError, match="--app-url"):
        parse_app_url("http://127.0.0.1:0")


def test_an_ipv6_address_is_shown_as_one_writes_it() -> None:
    assert str(parse_app_url("http://[::1]:8080/x")) == "http://[::1]:8080/x"
    assert str(Address("localhost", 80)) == "http://localhost:80"


async def test_a_look_that_began_before_the_app_was_spoiled_does_not_make_it_ready_again() -> None:
    world = Delivered(never)
    readiness = world.readiness
    assert world.program is not None
    assert world.program.life is not None
    life = world.program.life
    async with anyio.create_task_group() as group:
        group.start_soon(readiness.look)
        while not readiness.looks:
            await anyio.lowlevel.checkpoint()
        readiness.spoiled(life)
    assert not readiness.available


async def test_a_look_at_a_program_that_ended_meanwhile_does_not_make_it_ready() -> None:
    world = Delivered(never)
    readiness = world.readiness
    assert world.program is not None
    async with anyio.create_task_group() as group:
        group.start_soon(readiness.look)
        while not readiness.looks:
            await anyio.lowlevel.checkpoint()
        world.program.life = None
    assert not readiness.available


async def test_a_job_that_ends_while_checkpoints_are_taken_spoils_no_other() -> None:
    checkpoints = Checkpoints()
    ends = anyio.Event()
    going = anyio.Event()

    async def slow() -> list[Generation]:
        going.set()
        await ends.wait()
        return [Generation(7, 1, 1)]

    async def ended() -> list[Generation]:
        raise AssertionError("its job is over")

    found: list[Generation] = []

    async def take() -> None:
        found.extend(await checkpoints.take())

    with checkpoints.taken_by(slow):
        async with anyio.create_task_group() as group:
            with checkpoints.taken_by(ended):
                group.start_soon(take)
                await going.wait()
            ends.set()
    assert [generation.number for generation in found] == [7]


@pytest.mark.parametrize("field", ["prefix", "pattern", "local_path"])
def test_half_a_character_in_the_sync_of_an_apps_message_is_refused(field: str) -> None:
    entry = {"bucket": "bucket", "prefix": "a/", "local_path": "work", field: "a\ud800"}
    body = json.dumps({"sync": {"during": [entry]}}).encode()
    with pytest.raises(InvalidJobError, match=f"sync.during.0.{field}"):
        of_app_message(Job("job-1", body))


def test_half_a_character_elsewhere_is_the_apps_own() -> None:
    body = json.dumps({"prompt": "\ud800", "sync": {"during": []}}).encode()
    assert of_app_message(Job("job-1", body)).sync.during == ()


def test_what_is_said_outside_of_the_lanes_names_no_lanes_job() -> None:
    told: list[tuple[str, object]] = []
    status = Status(lambda _level, name, fields: told.append((name, fields.get("job_id"))), worker="w", source="s")
    outside = copy_context()
    with status.lane():
        status.take("a", 1)
        outside.run(status.fault, "app_ended")
        status.fault("upload_failed")
    assert told == [("job_received", "a"), ("app_ended", None), ("upload_failed", "a")]
    assert [fault["job_id"] for fault in status.faults] == [None, "a"]


@pytest.mark.parametrize("name", ["app_silence", "app_timeout", "salad_silence"])
@pytest.mark.parametrize("value", ["0", "1e10", "inf", "nan", "-1"])
def test_a_limit_that_no_call_can_have_is_refused(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=flag_name(name)):
        load({name: value}, {})


async def test_a_source_that_does_not_close_keeps_nobody_from_ending(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = ScriptedSource()
    source.aclose = anyio.sleep_forever  # type: ignore[method-assign]
    monkeypatch.setattr(supervisor, "open_source", lambda _request: source)
    # What would stay with the process that runs the tests.
    monkeypatch.setattr(supervisor, "become_reaper", lambda: None)
    monkeypatch.setattr(signals, "hold", lambda: None)
    settings = load({"source": "local:x", "state_dir": str(tmp_path), "control": "off"}, {})

    def leave() -> NoReturn:
        raise AssertionError

    with logging_to(io.StringIO(), "json", ()) as log, anyio.fail_after(20):
        assert await supervisor.supervise(settings, (), log, leave) == 0


@pytest.mark.parametrize(
    ("state", "outcome", "given"), [(LeaseState.LOST, "lost", 2), (LeaseState.CANCELLED, "cancelled", 1)]
)
async def test_a_lease_that_ends_while_the_queue_is_told_is_no_job_done(
    state: LeaseState, outcome: str, given: int
) -> None:
    ends = ScriptedLease(answers=[state], settle_answers=[HANG])
    source, status = ScriptedSource(ends, ScriptedLease()), quiet()
    forwarder = Forwarder(
        source, ScriptedDelivery(), lambda *_: ScriptedFiles([]), Drain(30.0), status, rng=random.Random(1), max_jobs=1
    )
    with anyio.fail_after(100):
        await forwarder.run()
    assert status.outcomes[outcome] == 1
    assert status.outcomes["done"] == given - 1
    assert len(source.received) == given, "a lost job does not count for --max-jobs, a cancelled one does"


def test_a_child_that_can_not_be_killed_for_want_of_a_thread_does_not_hang_us(monkeypatch: pytest.MonkeyPatch) -> None:
    real, failures = Child.kill, [RuntimeError("can't start new thread")]

    async def kill(child: Child) -> None:
        if failures:
            raise failures.pop()
        await real(child)

    monkeypatch.setattr(Child, "kill", kill)

    async def run() -> None:
        async with child(["sleep", "1000"], {"PATH": os.environ["PATH"]}, [], [], Register()):
            pass

    with pytest.raises(RuntimeError, match="new thread"):
        anyio.run(run)
