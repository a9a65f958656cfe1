"""`once`: what became of the one job outlives the process, and ends it with the right exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from heeler.job import InvalidJobError, Result
from heeler.sources.base import Lease, SourceUnavailableError
from heeler.sources.once import OnceSource, once_of_document
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

BODY = b'{"id": "the-job", "command": "true", "max_failures": 3}'
OK, FAILED, KILLED, NEVER_RAN = Result(exit_code=0), Result(exit_code=3), Result(signal=9), Result()


def exit_code(source: OnceSource) -> int | None:
    verdict = source.verdict()
    return None if verdict is None else verdict.exit_code


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class Machine:
    """A state folder and a wall clock; `start` is a new process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now = 1_000_000.0

    def start(self, body: bytes = BODY) -> OnceSource:
        return once_of_document(body, self.folder, clock=lambda: self.now)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


async def take(source: OnceSource) -> Lease:
    lease = await source.receive(wait=1000.0)
    assert lease is not None
    return lease


async def test_a_job_that_is_done_ends_us_with_zero_and_never_runs_again(machine: Machine) -> None:
    source = machine.start()
    lease = await take(source)
    assert (lease.job.id, lease.attempt) == ("the-job", 1)
    assert source.verdict() is None
    await lease.complete(OK)
    assert exit_code(source) == 0
    again = machine.start()
    assert exit_code(again) == 0
    assert await again.receive(wait=0.0) is None


async def test_success_after_a_failure_ends_us_with_zero(machine: Machine) -> None:
    source = machine.start()
    await (await take(source)).retry("exit code 3", result=FAILED, delay=0.0)
    await (await take(source)).complete(OK)
    assert exit_code(source) == 0
    assert exit_code(machine.start()) == 0


@pytest.mark.parametrize(("result", "code"), [(FAILED, 3), (KILLED, 137), (NEVER_RAN, 64)])
async def test_failures_are_counted_over_restarts_and_the_last_gives_the_exit_code(
    machine: Machine, result: Result, code: int
) -> None:
    for attempt in (1, 2, 3):
        source = machine.start()
        assert source.verdict() is None
        lease = await take(source)
        assert lease.attempt == attempt
        await lease.retry("it failed", result=result, delay=0.0)
    assert exit_code(source) == code
    assert exit_code(machine.start()) == code
    assert await source.receive(wait=0.0) is None


async def test_a_job_that_can_never_succeed_ends_us_at_once(machine: Machine) -> None:
    source = machine.start()
    await (await take(source)).fail("bad", result=NEVER_RAN)
    assert exit_code(source) == 64
    assert exit_code(machine.start()) == 64


async def test_a_failed_job_rests_also_over_a_restart(machine: Machine) -> None:
    await (await take(machine.start())).retry("it failed", result=FAILED, delay=30.0)
    source = machine.start()
    assert await source.receive(wait=10.0) is None
    assert source.verdict() is None
    machine.now += 31
    assert await source.receive(wait=10.0) is not None


async def test_interruptions_count_as_attempts_and_not_as_failures(machine: Machine) -> None:
    for attempt in range(1, 8):
        lease = await take(machine.start())
        assert lease.attempt == attempt
        await lease.release()
    source = machine.start()
    await (await take(source)).retry("x", result=FAILED, delay=0.0)
    assert source.verdict() is None


async def test_an_attempt_is_counted_before_it_runs_so_that_a_kill_counts_too(machine: Machine) -> None:
    await take(machine.start())
    assert (await take(machine.start())).attempt == 2


async def test_ten_barren_attempts_in_a_row_end_it(machine: Machine) -> None:
    for _ in range(10):
        await take(machine.start())
    source = machine.start()
    assert await source.receive(wait=1.0) is None
    assert exit_code(source) == 1


async def test_progress_starts_the_count_of_barren_attempts_again(machine: Machine) -> None:
    for _ in range(12):
        lease = await take(machine.start())
        await lease.extend(progressed=True)
    assert machine.start().verdict() is None
    assert (await take(machine.start())).attempt == 13


async def test_only_one_lease_is_out_at_a_time(machine: Machine) -> None:
    source = machine.start()
    lease = await take(source)
    assert await source.receive(wait=5.0) is None
    await lease.release()
    assert (await take(source)).attempt == 2


async def test_another_job_starts_afresh_on_the_same_machine(machine: Machine) -> None:
    await (await take(machine.start())).complete(OK)
    source = machine.start(b'{"command": "other"}')
    assert source.verdict() is None
    assert (await take(source)).attempt == 1


async def test_a_document_without_an_id_keeps_its_id_over_restarts(machine: Machine) -> None:
    first = await take(machine.start(b'{"command": "a"}'))
    second = await take(machine.start(b'{"command": "a"}'))
    assert first.job.id == second.job.id
    assert first.job.id


async def test_what_can_not_be_kept_is_not_given_out(machine: Machine) -> None:
    source = machine.start()
    (machine.folder / "once.tmp").mkdir()
    with pytest.raises(SourceUnavailableError, match=r"once\.json"):
        await source.receive(wait=1.0)
    (machine.folder / "once.tmp").rmdir()
    lease = await take(source)
    assert lease.attempt == 1
    (machine.folder / "once.tmp").mkdir()
    with pytest.raises(SourceUnavailableError):
        await lease.retry("x", result=FAILED, delay=0.0)
    (machine.folder / "once.tmp").rmdir()
    await lease.retry("x", result=FAILED, delay=0.0)
    assert json.loads((machine.folder / "once.json").read_text())["failures"] == 1


async def test_a_repeated_answer_counts_once(machine: Machine) -> None:
    source = machine.start()
    lease = await take(source)
    await lease.retry("x", result=FAILED, delay=0.0)
    await lease.retry("x", result=FAILED, delay=0.0)
    assert json.loads((machine.folder / "once.json").read_text())["failures"] == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job_id": "the-job", "unknown": 1}', "\0"])
async def test_a_record_that_is_none_is_named(machine: Machine, text: str) -> None:
    (machine.folder / "once.json").write_text(text)
    with pytest.raises(InvalidJobError, match=r"once\.json"):
        machine.start()


async def test_a_document_that_is_none_is_refused(machine: Machine) -> None:
    with pytest.raises(InvalidJobError, match="command"):
        machine.start(b"{}")
