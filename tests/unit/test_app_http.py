"""App mode: what an app's answer, its silence or its end means, in virtual time with a scripted app."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime, timezone
from email.utils import format_datetime, formatdate

import anyio
import pytest

from heeler.app.base import GivenUp
from heeler.app.http import headers_of, retry_after
from heeler.app.process import Exit
from heeler.app.readiness import Address
from heeler.http import Answer, NoAnswerError, SilentError, TooLargeError
from heeler.job import Job, Outcome, Result, Target
from tests.support.apps import CALL, Delivered, FakeChild, Script
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

BINARY = bytes(range(256)) + b"\r\n\r\n\0"


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


def answers(status: int, body: bytes = b"", headers: Mapping[str, str] | None = None, after: float = 0.0) -> Script:
    async def script(_: CALL) -> Answer:
        await anyio.sleep(after)
        return Answer(status, headers or {}, body)

    return script


def raises(error: Exception) -> Script:
    async def script(_: CALL) -> Answer:
        raise error

    return script


async def hangs(_: CALL) -> Answer:
    await anyio.sleep_forever()
    raise AssertionError


# The table of outcomes.


@pytest.mark.parametrize(
    ("status", "outcome", "transient"),
    [
        (200, Outcome.DONE, False),
        (201, Outcome.DONE, False),
        (204, Outcome.DONE, False),
        (299, Outcome.DONE, False),
        (300, Outcome.FAIL, False),
        (302, Outcome.FAIL, False),
        (307, Outcome.FAIL, False),
        (400, Outcome.FAIL, False),
        (404, Outcome.FAIL, False),
        (422, Outcome.FAIL, False),
        (408, Outcome.RETRY, False),
        (429, Outcome.RETRY, True),
        (500, Outcome.RETRY, False),
        (501, Outcome.RETRY, False),
        (502, Outcome.RETRY, True),
        (503, Outcome.RETRY, True),
        (504, Outcome.RETRY, True),
        (599, Outcome.RETRY, False),
    ],
)
@pytest.mark.parametrize("body", [b"", BINARY])
async def test_the_status_decides_and_the_answer_is_kept_byte_for_byte(
    status: int, outcome: Outcome, transient: bool, body: bytes
) -> None:
    world = Delivered(answers(status, body))
    ending = await world.deliver()
    assert (ending.outcome, ending.transient) == (outcome, transient)
    assert ending.result == Result(status=status, body=body)
    assert ending.whole == (outcome is Outcome.DONE)
    assert (str(status) in ending.reason) == (outcome is not Outcome.DONE)
    assert len(world.ended) == 1
    assert len(world.sent) == 1, "nothing is followed, nothing is sent twice"
    assert world.program is not None
    assert world.program.calls == (["proved"] if outcome is Outcome.DONE else [])


async def test_a_retry_after_is_the_delay() -> None:
    assert (await Delivered(answers(429, headers={"retry-after": "17"})).deliver()).delay == 17
    assert (
        await Delivered(answers(503, headers={"retry-after": formatdate(1_000_090, usegmt=True)})).deliver()
    ).delay == 90
    assert (await Delivered(answers(503)).deliver()).delay == 0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        (" 120 ", 120.0),
        ("999999999999999999999999999999", 3600.0),
        ("-5", 0.0),
        ("1.5", 0.0),
        ("soon", 0.0),
        ("", 0.0),
        ("\u0663", 0.0),
        (formatdate(1_000_060, usegmt=True), 60.0),
        (format_datetime(datetime.fromtimestamp(1_000_060, timezone.utc)), 60.0),
        ("Mon Jan 12 13:47:40 1970", 60.0),
        ("Mon, 12 Jan 1970 13:47:40 -0000", 60.0),
        ("Monday, 12-Jan-70 13:47:40 GMT", 60.0),
        (formatdate(900_000, usegmt=True), 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600.0),
        ("Fri, 99 Dec 9999 99:99:99 GMT", 0.0),
    ],
)
def test_every_form_of_a_retry_after(monkeypatch: pytest.MonkeyPatch, value: str, seconds: float) -> None:
    monkeypatch.setenv("TZ", "America/Los_Angeles")
    import time

    time.tzset()
    try:
        assert retry_after({"retry-after": value}, 1_000_000.0) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("status", "outcome"), [(200, Outcome.FAIL), (404, Outcome.FAIL), (500, Outcome.RETRY), (429, Outcome.RETRY)]
)
async def test_an_answer_that_is_too_large_says_what_to_do(status: int, outcome: Outcome) -> None:
    world = Delivered(raises(TooLargeError(status, 1000)))
    ending = await world.deliver()
    assert ending.outcome is outcome
    assert not ending.transient
    assert "1000 bytes" in ending.reason
    assert "--app-answer-bytes" in ending.reason
    assert world.program is not None
    assert world.program.calls == []


async def test_an_app_that_hangs_is_started_anew_before_the_job_is_settled() -> None:
    world = Delivered(raises(SilentError("nothing came for 50 s", sent=True)))
    ending = await world.deliver()
    assert (ending.outcome, ending.transient) == (Outcome.RETRY, False)
    assert "hangs" in ending.reason
    assert world.program is not None
    assert world.program.calls == ["restart"]


async def test_an_app_that_takes_too_long_is_started_anew() -> None:
    world = Delivered(hangs, timeout=7.0)
    begun = anyio.current_time()
    ending = await world.deliver()
    assert anyio.current_time() - begun == pytest.approx(7.0, abs=0.1)
    assert (ending.outcome, ending.transient) == (Outcome.RETRY, False)
    assert "longer than 7 s" in ending.reason
    assert world.program is not None
    assert world.program.calls == ["restart"]
    assert len(world.ended) == 1


async def test_an_app_of_somebody_else_that_hangs_is_left_alone_and_that_is_said() -> None:
    world = Delivered(hangs, ours=False, timeout=7.0)
    ending = await world.deliver()
    assert ending.outcome is Outcome.RETRY
    assert world.delivery.available
    (fault,) = world.readiness.told.of("app_left_alone")
    assert "--app-health-path" in str(fault["error"])


async def test_an_app_of_somebody_else_that_answered_is_not_said_to_be_left() -> None:
    world = Delivered(answers(200), ours=False)
    assert (await world.deliver()).outcome is Outcome.DONE
    assert world.readiness.told.of("app_left_alone") == []


async def test_no_connection_is_a_passing_fault() -> None:
    ending = await Delivered(raises(NoAnswerError("Connection refused", sent=False))).deliver()
    assert (ending.outcome, ending.transient, ending.whole) == (Outcome.RETRY, True, False)
    assert "Connection refused" in ending.reason


async def test_a_connection_closed_midway_is_a_passing_fault() -> None:
    world = Delivered(raises(NoAnswerError("the connection was closed before the answer", sent=True)))
    ending = await world.deliver()
    assert (ending.outcome, ending.transient) == (Outcome.RETRY, True)
    assert "ended with" not in ending.reason
    assert world.program is not None
    assert world.program.calls == []


@pytest.mark.parametrize("first", ["the process ends", "the connection ends"])
async def test_an_app_that_dies_midway_is_named_with_how_it_ended(first: str) -> None:
    """Which of the two is seen first is the kernel's whim."""

    async def script(_: CALL) -> Answer:
        async def die() -> None:
            await anyio.sleep(0.2 if first == "the connection ends" else 0)
            assert world.program is not None
            world.program.life = None
            world.program._tell()
            child.end(Exit(None, 11))

        group.start_soon(die)
        await anyio.sleep(0.1)
        raise NoAnswerError("the connection was closed before the answer", sent=True)

    child = FakeChild()
    world = Delivered(script, child)
    async with anyio.create_task_group() as group:
        ending = await world.deliver()
    assert (ending.outcome, ending.transient, ending.whole) == (Outcome.RETRY, True, False)
    assert "killed by SIGSEGV" in ending.reason
    assert not world.delivery.available, "seen before the job is settled, so that no other is asked for"


@pytest.mark.parametrize("error", [NoAnswerError("closed", sent=True), NoAnswerError("refused", sent=False)])
async def test_an_app_that_gave_no_answer_is_looked_at_before_the_job_is_settled(error: Exception) -> None:
    """Else the next job would be asked for, and sent to nobody."""
    world = Delivered(raises(error), ours=False)
    world.readiness.why = "nothing answers on port 80"
    await world.delivery.deliver(world.assignment(), world.drain)
    assert not world.delivery.available


# What is sent.


async def test_the_queue_names_the_port_unless_the_settings_do() -> None:
    world = Delivered(answers(200), ours=False)
    await world.delivery.deliver(world.assignment(Job("j", b"", Target(8081, "/x"))), world.drain)
    world.readiness._given = None
    await world.delivery.deliver(world.assignment(Job("j", b"", Target(8081, "/x"))), world.drain)
    await world.delivery.deliver(world.assignment(Job("j", b"", Target(8082, "/x"))), world.drain)
    assert world.readiness.asked == [
        Address("app", 80, "/base"),
        Address("localhost", 8081),
        Address("localhost", 8082),
    ]
    assert [call["path"] for call in world.sent] == ["/base/x", "/x", "/x"]


async def test_a_job_for_another_port_waits_until_that_one_answers() -> None:
    world = Delivered(answers(200), ours=False)
    world.readiness._given = None
    world.readiness.why = "nothing answers on port 8081"

    async def get_ready() -> None:
        await anyio.sleep(20)
        assert world.sent == []
        world.readiness.set(ready=True)

    async with anyio.create_task_group() as group:
        group.start_soon(get_ready)
        job = Job("j", b"", Target(8081, "/x"))
        assert (await world.delivery.deliver(world.assignment(job), world.drain)).outcome is Outcome.DONE


async def test_the_body_goes_out_byte_for_byte_with_the_limits_of_the_settings() -> None:
    world = Delivered(answers(200))
    await world.deliver(Job("j", BINARY))
    (call,) = world.sent
    assert (call["method"], call["path"], call["body"]) == ("POST", "/base/jobs", BINARY)
    assert (call["silence"], call["limit"]) == (50.0, 1000)


def test_the_headers_are_the_queues_and_ours() -> None:
    world = Delivered(answers(200))
    environment = {"HEELER_INPUT_DIR": "/in", "HEELER_CHECKPOINT_DIR": "/ck", "HEELER_OUTPUT_DIR": "/out", "X": "y"}
    job = Job("j-1", b"", None, {"Salad-Job-Id": "s-1"})
    assert headers_of(world.assignment(job, environment)) == {
        "Content-Type": "application/json",
        "Salad-Job-Id": "s-1",
        "Heeler-Job-Id": "j-1",
        "Heeler-Attempt": "2",
        "Heeler-Input-Dir": "/in",
        "Heeler-Checkpoint-Dir": "/ck",
        "Heeler-Output-Dir": "/out",
    }


def test_the_queue_may_say_what_kind_of_body_it_is() -> None:
    assignment = Delivered(answers(200)).assignment(Job("j", b"", None, {"Content-Type": "text/plain"}))
    assert headers_of(assignment)["Content-Type"] == "text/plain"
    assert "Heeler-Output-Dir" not in headers_of(assignment)


@pytest.mark.parametrize("path", ["/données/é", "/数据", "/schön €", "/a\udcff"])
def test_a_folder_of_any_name_is_told_in_its_own_bytes(path: str) -> None:
    value = headers_of(Delivered(answers(200)).assignment(None, {"HEELER_OUTPUT_DIR": path}))["Heeler-Output-Dir"]
    assert value.encode("latin-1") == path.encode("utf-8", "surrogateescape")


@pytest.mark.parametrize("value", ["a\r\nEvil: 1", "a\nb", "a\rb", "a\0b", "\x7f"])
def test_a_value_that_can_not_stand_in_a_header_is_left_out(value: str) -> None:
    job = Job("j", b"", None, {"X-Aws-Sqsd-Attr-A": value, "X-Aws-Sqsd-Attr-B": "good"})
    headers = headers_of(Delivered(answers(200)).assignment(job, {"HEELER_OUTPUT_DIR": value}))
    assert "X-Aws-Sqsd-Attr-A" not in headers
    assert "Heeler-Output-Dir" not in headers
    assert headers["X-Aws-Sqsd-Attr-B"] == "good"


@pytest.mark.parametrize(
    ("path", "sent"),
    [
        ("/generate", "/generate"),
        ("/", "/"),
        ("/a%20b?c=d&e=%2F", "/a%20b?c=d&e=%2F"),
        ("/a b", "/a%20b"),
        ("/ü/数", "/%C3%BC/%E6%95%B0"),
        ("/x HTTP/1.1\r\nEvil: 1\r\n\r\n", "/x%20HTTP/1.1%0D%0AEvil:%201%0D%0A%0D%0A"),
        ("/a#b", "/a%23b"),
        ("/~u/(1);v=[2]", "/~u/(1);v=[2]"),
    ],
)
async def test_the_queue_names_the_path(path: str, sent: str) -> None:
    world = Delivered(answers(200))
    await world.deliver(Job("j", b"", Target(80, path)))
    assert world.sent[0]["path"] == "/base" + sent


# Waiting for the app.


async def test_a_job_waits_for_an_app_that_is_not_ready() -> None:
    world = Delivered(answers(200))
    world.readiness.set(ready=False)

    async def get_ready() -> None:
        await anyio.sleep(30)
        assert world.sent == []
        world.readiness.set(ready=True)

    async with anyio.create_task_group() as group:
        group.start_soon(get_ready)
        ending = await world.delivery.deliver(world.assignment(), world.drain)
    assert ending.outcome is Outcome.DONE


async def test_an_app_that_does_not_get_ready_in_time_fails_the_attempt_with_its_address() -> None:
    world = Delivered(answers(200))
    world.readiness.set(ready=False)
    begun = anyio.current_time()
    ending = await world.delivery.deliver(world.assignment(), world.drain)
    assert anyio.current_time() - begun == pytest.approx(60, abs=0.1)
    assert ending.outcome is Outcome.RETRY
    assert "not ready within 60 s (http://app:80/base)" in ending.reason
    assert world.sent == []


async def test_a_drain_ends_the_wait_for_an_app() -> None:
    world = Delivered(answers(200))
    world.readiness.set(ready=False)

    async def drain() -> None:
        await anyio.sleep(5)
        world.drain.begin("SIGTERM")

    begun = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(drain)
        ending = await world.delivery.deliver(world.assignment(), world.drain)
    assert (ending.outcome, ending.fruitless) == (Outcome.RELEASE, False)
    assert anyio.current_time() - begun == pytest.approx(5, abs=0.1)


async def test_an_app_that_is_given_up_meanwhile_hands_the_job_back() -> None:
    world = Delivered(answers(200))
    world.readiness.set(ready=False)
    program = world.program
    assert program is not None

    async def give_up() -> None:
        await anyio.sleep(5)
        program._give_up(GivenUp(3, "it ended too often"))

    async with anyio.create_task_group() as group:
        group.start_soon(give_up)
        ending = await world.delivery.deliver(world.assignment(), world.drain)
        assert not await world.delivery.ready()
    assert (ending.outcome, ending.fruitless) == (Outcome.RELEASE, True)
    assert ending.reason == "it ended too often"
    assert world.delivery.given_up() == GivenUp(3, "it ended too often")


# The drain.


async def drained(world: Delivered, at: float = 5.0, hurry_at: float | None = None) -> tuple[Outcome, bool, float]:
    """Ask to stop during a job: how it ended, whether its folders may be captured whole, and seconds since asked."""

    async def ask() -> None:
        await anyio.sleep(at)
        world.drain.begin("SIGTERM")
        if hurry_at is not None:
            await anyio.sleep(hurry_at)
            world.drain.hurry()

    begun = anyio.current_time()
    async with anyio.create_task_group() as group:
        group.start_soon(ask)
        ending = await world.deliver()
    assert len(world.ended) == 1
    if world.program is not None:
        told = [name for name, _ in world.program.child.told]
        assert told.count("TERM") == 1
        assert "restart" not in world.program.calls
    return ending.outcome, ending.whole, round(anyio.current_time() - begun - at, 1)


async def test_an_app_that_answers_in_the_grace_has_done_its_job() -> None:
    world = Delivered(answers(200, after=15), FakeChild(obeys=20))
    assert await drained(world) == (Outcome.DONE, True, 10.0)


async def test_an_app_whose_answer_comes_with_its_end_has_done_its_job() -> None:
    world = Delivered(answers(200, after=15.2), FakeChild(obeys=10))
    assert await drained(world) == (Outcome.DONE, True, 10.2)


async def test_an_app_that_ends_by_itself_is_captured_whole() -> None:
    assert await drained(Delivered(hangs, FakeChild(obeys=2))) == (Outcome.RELEASE, True, 2.5)
    assert await drained(Delivered(hangs, FakeChild(obeys=2, exit=Exit(3, None)))) == (Outcome.RELEASE, True, 2.5)


async def test_an_app_that_dies_of_the_signal_is_not_captured_whole() -> None:
    assert await drained(Delivered(hangs, FakeChild(obeys=0, exit=Exit(None, 15)))) == (Outcome.RELEASE, False, 0.5)


async def test_an_app_with_processes_that_do_not_die_is_not_captured_whole() -> None:
    child = FakeChild(obeys=2)
    child.stuck = True
    assert await drained(Delivered(hangs, child)) == (Outcome.RELEASE, False, 2.5)


async def test_an_app_that_ignores_the_signal_is_killed_when_only_the_flush_has_time() -> None:
    world = Delivered(hangs, FakeChild(obeys=None))
    world.reserve = 12.0
    assert await drained(world) == (Outcome.RELEASE, False, 29.5 - 12.0)
    assert world.program is not None
    assert [name for name, _ in world.program.child.told] == ["TERM", "KILL"]


@pytest.mark.parametrize("status", [500, 503, 404])
async def test_a_refusal_in_a_drain_hands_the_job_back_once_the_app_has_ended(status: int) -> None:
    world = Delivered(answers(status, after=6), FakeChild(obeys=4))
    assert await drained(world) == (Outcome.RELEASE, True, 4.0)


async def test_connections_that_an_app_closes_before_it_ends_are_not_its_end() -> None:
    async def script(_: CALL) -> Answer:
        await anyio.sleep(5.0)
        raise NoAnswerError("the connection was closed before the answer", sent=True)

    world = Delivered(script, FakeChild(obeys=4))
    assert await drained(world) == (Outcome.RELEASE, True, 4.0)


async def test_a_closed_connection_does_not_lift_the_limit_while_the_reserve_is_worked_out() -> None:
    async def slow_reserve() -> float:
        await anyio.sleep(2)
        return 3.0

    async def script(_: CALL) -> Answer:
        await anyio.sleep(6)
        raise NoAnswerError("the connection was closed before the answer", sent=True)

    world = Delivered(script, FakeChild(obeys=None))
    assignment = world.assignment()
    object.__setattr__(assignment, "reserve", slow_reserve)
    begun = anyio.current_time()
    async with anyio.create_task_group() as group:

        async def ask() -> None:
            await anyio.sleep(5)
            world.drain.begin("SIGTERM")

        group.start_soon(ask)
        with anyio.fail_after(100):
            ending = await world.delivery.deliver(assignment, world.drain)
    assert (ending.outcome, ending.whole) == (Outcome.RELEASE, False)
    assert anyio.current_time() - begun < 5 + 30


async def test_impatience_kills_the_app() -> None:
    world = Delivered(hangs, FakeChild(obeys=None))
    outcome, whole, seconds = await drained(world, hurry_at=1.0)
    assert (outcome, whole) == (Outcome.RELEASE, False)
    assert seconds < 2


async def test_an_app_of_somebody_else_has_the_grace_to_answer() -> None:
    assert await drained(Delivered(answers(200, after=15), ours=False)) == (Outcome.DONE, True, 10.0)
    assert await drained(Delivered(hangs, ours=False)) == (Outcome.RELEASE, False, 29.5 - 3.0)


async def test_the_jobs_time_is_not_up_in_a_drain() -> None:
    world = Delivered(answers(200, after=12), FakeChild(obeys=30), timeout=10.0)
    assert await drained(world) == (Outcome.DONE, True, 7.0)


async def test_several_jobs_are_one_signal_to_the_app() -> None:
    world = Delivered(hangs, FakeChild(obeys=2))
    program = world.program
    assert program is not None
    async with anyio.create_task_group() as group:
        group.start_soon(program.run)
        for _ in range(4):
            group.start_soon(world.delivery.deliver, world.assignment(), world.drain)
        await anyio.sleep(1)
        world.drain.begin("SIGTERM")
    assert [name for name, _ in program.child.told] == ["TERM"]


async def test_a_call_that_is_given_up_in_a_drain_leaves_no_app_behind() -> None:
    world = Delivered(hangs, FakeChild(obeys=None))
    program = world.program
    assert program is not None
    with anyio.move_on_after(5) as scope:
        world.drain.begin("SIGTERM")
        await world.delivery.deliver(world.assignment(), world.drain)
    assert scope.cancelled_caught
    assert program.calls == ["stop 0"]


# The lease is lost: the call is cancelled.


async def test_a_call_that_is_given_up_has_the_app_started_anew_before_it_returns() -> None:
    world = Delivered(hangs)
    program = world.program
    assert program is not None
    program.stop_seconds = 4.0
    before = program.life
    begun = anyio.current_time()
    with anyio.move_on_after(5):
        await world.delivery.deliver(world.assignment(), world.drain)
    assert anyio.current_time() - begun == pytest.approx(9, abs=0.1)
    assert program.calls == ["restart"]
    assert before is not None
    assert before.over.is_set()


async def test_a_call_that_is_given_up_waits_for_the_others_and_no_job_is_taken_meanwhile() -> None:
    async def script(call: CALL) -> Answer:
        await anyio.sleep(60 if call["body"] == b"other" else math.inf)
        return Answer(200, {}, b"")

    world = Delivered(script)
    program = world.program
    assert program is not None
    ended: list[str] = []

    async def other() -> None:
        ending = await world.delivery.deliver(world.assignment(Job("other", b"other")), world.drain)
        ended.append(ending.outcome.value)

    async with anyio.create_task_group() as group:
        group.start_soon(world.delivery.run)
        async with anyio.create_task_group() as others:
            others.start_soon(other)
            with anyio.move_on_after(5):
                await world.delivery.deliver(world.assignment(), world.drain)
            assert program.calls == []
            for _ in range(10):
                assert not world.delivery.available, "looks at its port do not make it fit"
                await anyio.sleep(4)
            third = world.delivery.deliver(world.assignment(Job("third", b"other")), world.drain)
            await third
        assert ended == ["done"]
        assert program.calls == ["restart", "proved", "proved"]
        group.cancel_scope.cancel()


async def test_an_app_that_died_meanwhile_is_not_started_anew_once_more() -> None:
    async def script(call: CALL) -> Answer:
        await anyio.sleep(60 if call["body"] == b"other" else math.inf)
        raise NoAnswerError("closed", sent=True)

    world = Delivered(script)
    program = world.program
    assert program is not None
    async with anyio.create_task_group() as group:
        group.start_soon(world.delivery.deliver, world.assignment(Job("other", b"other")), world.drain)
        with anyio.move_on_after(5):
            await world.delivery.deliver(world.assignment(), world.drain)
        program.child.end(Exit(1, None))
        program.begin()
    assert program.calls == []
    await world.readiness.look()
    assert world.delivery.available


async def test_a_call_to_an_app_of_somebody_else_that_is_given_up_changes_nothing() -> None:
    world = Delivered(hangs, ours=False)
    with anyio.move_on_after(5):
        await world.delivery.deliver(world.assignment(), world.drain)
    assert world.delivery.available


async def test_nobody_says_where_the_app_answers() -> None:
    world = Delivered(hangs, ours=False)
    world.readiness._given = None
    ending = await world.delivery.deliver(world.assignment(), world.drain)
    assert ending.outcome is Outcome.RETRY
    assert "--app-url" in ending.reason
