"""Jobs longer than SQS's twelve hours, in virtual time: who holds them, what is kept, what the limits do to them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import anyio
import pytest

from heeler.app.base import Assignment, GivenUp
from heeler.drain import Drain
from heeler.forwarder import Forwarder
from heeler.job import Ending, Outcome, Result
from heeler.lease import LeaseKeeper
from heeler.records.announce import Announcer
from heeler.records.lease import Context
from heeler.records.source import RecordedSource
from heeler.records.store import RecordStore
from heeler.scopes import Signal
from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import Lease, Source
from heeler.sources.sqs import SqsSource
from heeler.status import Status
from heeler.tasks import background
from heeler.webhook import Webhooks
from heeler_sync.store.memory import MemoryStore
from tests.support.leases import ScriptedFiles
from tests.support.sqs_model import SqsModel
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio
HOUR = 3600.0
DEAD = "http://queue/dead"


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


class LongProgram:
    """Computes for some hours, and goes on from where it was when it was last flushed."""

    def __init__(self, seconds: float, stop_seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.stop_seconds = stop_seconds
        self.done = 0.0
        self.stops: list[float] = []
        self.starts: list[float] = []
        self.unready = Signal()
        self.available = True

    async def run(self) -> None:
        return

    async def ready(self) -> bool:
        return True

    def given_up(self) -> GivenUp | None:
        return None

    async def deliver(self, assignment: Assignment, drain: Drain) -> Ending:
        started = anyio.current_time()
        self.starts.append(started)
        with anyio.move_on_after(self.seconds - self.done):
            await drain.requested.wait()
            self.stops.append(anyio.current_time() - started)
            await anyio.sleep(self.stop_seconds)
            self.done += anyio.current_time() - started
            assignment.ended()
            return Ending(Outcome.RELEASE, drain.words, Result(exit_code=143), whole=True)
        assignment.ended()
        return Ending(Outcome.DONE, "", Result(exit_code=0), whole=True)


class Worker:
    """A forwarder on a queue of the model."""

    def __init__(
        self,
        model: SqsModel,
        name: str,
        program: LongProgram,
        records: RecordStore | None,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        attempts: int = 1,
        visibility: int = 60,
    ) -> None:
        self.name = name
        self._attempts = attempts
        self.model = model
        self.drain = Drain(30.0)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.status = Status(self._note, worker=name, source="s")
        monkeypatch.setattr("heeler.sources.sqs.SqsCalls", lambda address: model.calls(address, name))
        settings = Settings(
            sqs_queue_url="http://queue/jobs",
            sqs_dlq_url=DEAD,
            sqs_region="x",
            sqs_access_key_id="k",
            sqs_secret_access_key="s",
            sqs_visibility=visibility,
            records=None if records is None else "s3://bucket/r/",
        )
        request = SourceRequest("sqs", name, folder / name, settings=settings, on_fault=self.status.fault)
        bare = SqsSource(request, clock=anyio.current_time)
        self.source: Source = bare
        if records is not None:
            announcer = Announcer(Webhooks(None), None, model.now, self.status.fault)
            context = Context(records, announcer, model.now, self.status.fault, self.status.event)
            self.source = RecordedSource(bare, context, name, documents=True)
        self._forwarder = Forwarder(
            self.source, program, self._files, self.drain, self.status, rng=random.Random(1), exit_when_idle=60.0
        )

    def _files(self, lease: Lease, keeper: LeaseKeeper) -> ScriptedFiles:
        keeper._clock = anyio.current_time
        keeper._confirmed_until = anyio.current_time() + lease.expires_after
        return ScriptedFiles([])

    async def run(self) -> None:
        async with background(self.source.run):
            await self._forwarder.run()

    def _note(self, _level: str, event: str, fields: dict[str, object]) -> None:
        self.events.append((event, fields))
        if event == "job_settled" and len(self.outcomes()) == self._attempts:
            self.drain.begin("one attempt is enough")

    def outcomes(self) -> list[object]:
        return [fields["outcome"] for name, fields in self.events if name == "job_settled"]

    def names(self) -> list[str]:
        return [name for name, _ in self.events]


def _records() -> RecordStore:
    store = MemoryStore()
    return RecordStore(lambda: store, "r/")


@pytest.mark.parametrize("recorded", [True, False])
async def test_a_job_of_thirty_hours_has_three_holders_and_one_result(
    recorded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SqsModel()
    records = _records() if recorded else None
    model.put(json.dumps({"id": "long", "command": "x"}))
    program = LongProgram(30 * HOUR)
    outcomes: list[object] = []
    for number in range(3):
        worker = Worker(model, f"w{number}", program, records, tmp_path, monkeypatch)
        with anyio.fail_after(100 * HOUR):
            await worker.run()
        outcomes += worker.outcomes()
    assert outcomes == ["release", "release", "done"]
    assert [11.4 * HOUR < stop < 11.6 * HOUR for stop in program.stops] == [True, True]
    assert len(program.starts) == 3
    assert model.messages == {}
    assert model.dead == []
    assert model.refused == [], "SQS was never asked for more than it gives"
    if records is not None:
        found = await records.get("long")
        assert found is not None
        assert (found.record.state, found.record.attempts) == ("done", 3)
        assert (found.record.failures, found.record.interruptions) == (0, 2)
        assert [entry.outcome for entry in found.record.history] == ["release", "release", "done"]
        assert "before that" in found.record.history[0].reason
        assert await records.result(found.record.result_key) == b'{"exit_code": 0, "signal": null}\n'


async def test_one_worker_alone_takes_a_long_job_again_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, records = SqsModel(), _records()
    model.put(json.dumps({"id": "long", "command": "x"}))
    program = LongProgram(30 * HOUR)
    worker = Worker(model, "w", program, records, tmp_path, monkeypatch, attempts=3)
    with anyio.fail_after(100 * HOUR):
        await worker.run()
    assert worker.outcomes() == ["release", "release", "done"]
    gaps = [
        start - (before + stop + 5)
        for before, stop, start in zip(program.starts, program.stops, program.starts[1:], strict=False)
    ]
    assert max(gaps) < 5


async def test_a_program_that_ignores_the_request_is_cut_off_before_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, records = SqsModel(), _records()
    model.put(json.dumps({"id": "long", "command": "x"}))
    program = LongProgram(30 * HOUR, stop_seconds=10 * HOUR)
    worker = Worker(model, "w", program, records, tmp_path, monkeypatch)
    with anyio.fail_after(100 * HOUR):
        await worker.run()
    assert worker.outcomes() == ["release"]
    assert "grace_over" in worker.names()
    assert model.refused == []
    message = next(iter(model.messages.values()))
    assert model.now() - message.received < 12 * HOUR
    assert message.visible_at <= model.now()


@pytest.mark.parametrize("visibility", [15, 60, 3600])
async def test_the_last_half_hour_is_used_with_any_visibility(
    visibility: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SqsModel()
    model.put(json.dumps({"id": "long", "command": "x"}))
    program = LongProgram(11.99 * HOUR + 30 * 60, stop_seconds=20 * 60)
    worker = Worker(model, "w", program, _records(), tmp_path, monkeypatch, visibility=visibility)
    with anyio.fail_after(100 * HOUR):
        await worker.run()
    assert worker.outcomes() == ["release"]
    assert "lease_lost" not in worker.names()
    assert model.refused == []
    assert program.done > 0, "its twenty minutes were granted"


async def test_a_redrive_policy_that_ends_a_long_job_is_said_before_and_in_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, records = SqsModel(receives=2), _records()
    model.put(json.dumps({"id": "long", "command": "x"}))
    program = LongProgram(30 * HOUR)
    worker = Worker(model, "w", program, records, tmp_path, monkeypatch, attempts=2)
    with anyio.fail_after(100 * HOUR):
        await worker.run()
    assert "redrive_policy" in worker.names()
    assert "redrive_takes_job" in worker.names()
    found = await records.get("long")
    assert found is not None
    assert "redrive policy" in found.record.reason
    assert found.record.failures == 0
    last = Worker(model, "v", program, records, tmp_path, monkeypatch)
    with anyio.fail_after(100 * HOUR):
        await last.run()
    assert [letter["by"] for letter in model.dead] == ["redrive"]


async def test_a_message_that_the_queue_will_drop_is_said_with_its_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, records = SqsModel(retention=86_400), _records()
    message = model.put(json.dumps({"id": "long", "command": "x"}))
    worker = Worker(model, "w", LongProgram(30 * HOUR), records, tmp_path, monkeypatch)
    with anyio.fail_after(100 * HOUR):
        await worker.run()
    found = await records.get("long")
    assert found is not None
    assert found.record.expires == pytest.approx(message.sent + 86_400, abs=0.01)
    assert "message_expires" in worker.names()
