"""Kelpie's jobs and processes that die: at any operation, again and again, and all at once."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from heeler.lease import LeaseKeeper
from heeler.sources.base import (
    BARREN_LIMIT,
    Lease,
    LeaseLostError,
    LeaseState,
    SourceUnavailableError,
)
from heeler.sources.kelpie import KelpieSource
from heeler.tasks import background
from tests.support.crashing import CrashError, Fuse, When
from tests.support.kelpie_reports import BAD, LAPSE, OK, REPORTS, SETTLES, Report, settled
from tests.support.kelpie_script import INTERVAL, Called, Room, Weather, taken
from tests.support.virtual_time import VIRTUAL, run_virtual

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
async def room(anyio_backend: object, tmp_path: Path) -> AsyncIterator[Room]:
    room = Room(tmp_path)
    yield room
    assert room.wrong == []


# Attempts without anything durable.


async def test_ten_attempts_in_a_row_without_anything_durable_are_one_failure(room: Room) -> None:
    job_id = room.submit(max_failures=2)
    for attempt in range(1, BARREN_LIMIT + 1):
        lease = await taken(room.source())
        assert lease.attempt == attempt
        del lease
    assert room.calls(*REPORTS) == []
    source = room.source()
    assert await source.receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]
    assert room.job(job_id)["num_failures"] == 1
    assert "job_barren" in room.events()
    assert await room.source().receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]


async def test_fruitless_releases_count_like_crashes(room: Room) -> None:
    room.submit()
    source = room.source()
    for _ in range(BARREN_LIMIT):
        await (await taken(source)).release(fruitless=True)
        await anyio.sleep(LAPSE)
    assert await source.receive(wait=0.5) is None
    assert room.calls(*REPORTS) == ["failed"]


@pytest.mark.parametrize("what", ["progress", "release"])
async def test_what_becomes_durable_and_an_orderly_release_start_the_count_anew(room: Room, what: str) -> None:
    room.submit()
    for attempt in range(1, 3 * BARREN_LIMIT):
        lease = await taken(room.source())
        assert lease.attempt == attempt
        if attempt % BARREN_LIMIT == 0:
            await (lease.extend(progressed=True) if what == "progress" else lease.release())
        else:
            await lease.extend()
        del lease
    assert room.calls(*REPORTS) == []


async def test_starts_are_counted_only_where_the_job_was_begun(room: Room) -> None:
    room.submit()
    room.weather = lambda call: "before" if call.kind == "heartbeat" else ""
    for _ in range(3 * BARREN_LIMIT):
        with pytest.raises(SourceUnavailableError):
            await room.source().receive(wait=0.5)
    room.weather = lambda call: ""
    assert (await taken(room.source())).attempt == 1


async def test_a_job_that_failed_elsewhere_counts_that_as_attempts(room: Room) -> None:
    job_id = room.submit()
    room.take()
    room.table.failed(room.job(job_id)["user_id"], job_id, "other")
    await anyio.sleep(LAPSE)
    lease = await taken(room.source())
    assert (lease.attempt, lease.attempts_ordered) == (2, False)
    await lease.retry("exit code 1", result=BAD, delay=0.0)
    assert room.job(job_id)["num_failures"] == 2


# Crashes.


async def drive(source: KelpieSource, report: Report) -> bool:
    """One process: takes a job, keeps it, ends it. Whether it had one."""
    lease = await source.receive(wait=0.5)
    if lease is None:
        return False
    await lease.extend(progressed=True)
    await report(lease)
    return True


@pytest.mark.parametrize("meanwhile", ["nothing", "lapse", "other machine"])
@pytest.mark.parametrize("when", [When.BEFORE, When.AFTER])
@pytest.mark.parametrize("how", ["completed", "failed", "released"])
async def test_a_process_that_dies_at_any_operation_leaves_nothing_wrong(
    room: Room, how: str, when: When, meanwhile: str
) -> None:
    """At each call and each change on disk; what its heir does is watched by the referee, too."""
    fuse = Fuse()
    rehearsed = room.submit()
    assert await drive(room.source("rehearsal", "rehearsal", fuse=fuse), SETTLES[how])
    names = [name for _, name in fuse.operations]
    assert len(names) > 6
    assert {"work", "save", "heartbeat", "get"} <= {*names}
    room.cancel(rehearsed)
    for number, name in enumerate(names):
        where = f"{number}: {name} {when.value}"
        # Nobody can know of a job whose hand-out was not heard or not noted: it lapses.
        unknown = (number, when) in ((names.index("work"), When.AFTER), (names.index("save"), When.BEFORE))
        job_id = room.submit()
        state, room.called = f"state-{number}", []
        died = False
        try:
            await drive(room.source(state, state, fuse=Fuse(number, when)), SETTLES[how])
        except CrashError:
            died = True
        assert died, where
        told = [call.kind for call in room.called if call.kind in REPORTS]
        if meanwhile == "lapse":
            await anyio.sleep(LAPSE)
        if meanwhile == "other machine":
            await anyio.sleep(LAPSE)
            had = room.take("other")
            assert (had == job_id) is (told != ["completed"]), where
        room.called = []
        had_it = await drive(room.source(state, state), REPORTS["completed"])
        reports = told + [call.kind for call in room.called if call.kind in REPORTS]
        job = room.job(job_id)
        if meanwhile == "other machine":
            assert not had_it, where
            assert reports == told, where
        elif how == "released":
            assert had_it is (not unknown or meanwhile == "lapse"), where
        elif meanwhile == "nothing" and unknown:
            assert not had_it, where
        else:
            assert reports in ([how], ["completed"]), where
            assert job["num_failures"] == reports.count("failed"), where
            assert (job["status"] == "completed") is ("completed" in reports), where
            if not had_it:
                assert reports == [how], where
        await anyio.sleep(LAPSE)
        room.table.cancel(job["user_id"], job_id)
        assert room.wrong == [], where


@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_verdict_that_the_api_never_heard_is_told_by_the_next_process(room: Room, how: str) -> None:
    job_id = room.submit()
    lease = await taken(room.source())
    room.weather = lambda call: "before" if call.kind in REPORTS else ""
    with pytest.raises(SourceUnavailableError):
        await REPORTS[how](lease)
    room.weather = lambda call: ""
    assert await room.source().receive(wait=0.5) is None, "it is not begun again"
    assert room.calls(*REPORTS) == [how]
    assert room.job(job_id)["num_failures"] == (how == "failed")


async def test_a_verdict_in_doubt_keeps_nobody_from_other_jobs(room: Room) -> None:
    room.submit()
    lease = await taken(room.source())
    room.weather = lambda call: "before" if call.kind in (*REPORTS, "get") and call.job_id == lease.job.id else ""
    with pytest.raises(SourceUnavailableError):
        await lease.complete(OK)
    other = room.submit()
    source = room.source()
    assert (await taken(source)).job.id == other
    room.weather = lambda call: ""
    assert await source.receive(wait=3.0) is None
    assert room.calls(*REPORTS) == ["completed"]


async def test_a_job_in_doubt_is_held_onto_while_it_may_be_ours_and_no_other_is_taken(room: Room) -> None:
    first, second = room.submit(), room.submit()
    source = room.source()
    room.weather = lambda call: "before" if call.job_id == first else ""
    start = anyio.current_time()
    while anyio.current_time() - start < 2 * INTERVAL:
        with pytest.raises(SourceUnavailableError):
            await source.receive(wait=1.0)
        assert room.calls("work") == ["work"]
        await anyio.sleep(0.5)
    with pytest.raises(SourceUnavailableError):  # it lapsed, so there may be others; but it is the first of them
        await source.receive(wait=3.0)
    assert room.calls("work") == ["work", "work"]
    room.weather = lambda call: ""
    assert [(await taken(source)).job.id for _ in range(2)] == [first, second]


async def test_a_report_of_an_earlier_process_cannot_be_overtaken_by_a_hand_out(room: Room) -> None:
    """The job has been silent for long; between our question and our report it would be somebody else's."""
    job_id = room.submit()
    lease = await taken(room.source())
    room.weather = lambda call: "before" if call.kind == "completed" else ""
    with pytest.raises(SourceUnavailableError):
        await lease.complete(OK)
    room.weather = lambda call: ""
    await anyio.sleep(LAPSE)

    async def snatch(call: Called) -> None:
        if call.kind == "completed":
            room.take()

    room.between = snatch
    await room.source().receive(wait=0.5)
    assert room.calls("completed") == ["completed"]
    assert room.job(job_id)["status"] == "completed"


# All of it at once.


@pytest.mark.parametrize("seed", range(25))
def test_random_crews_on_bad_days(tmp_path: Path, seed: int) -> None:
    print("seed", seed)
    run_virtual(_crews, tmp_path, random.Random(seed))


async def _crews(folder: Path, rng: random.Random) -> None:
    """Two machines with two workers each, which crash, release, fail and lose calls; the referee watches."""
    room = Room(folder, offset=rng.random())
    bad = rng.choice([0.0, 0.05, 0.2])
    calm = False

    def weather(_call: Called) -> Weather:
        if calm or rng.random() >= bad:
            return ""
        return "before" if rng.random() < 0.5 else "after"

    room.weather = weather
    room.latency = lambda: rng.choice([0.0, 0.02, 0.5])
    room.table.race = rng.choice([0, 2, 5])
    jobs = [room.submit(heartbeat_interval=rng.choice([2, 5]), max_failures=9) for _ in range(4)]
    working: dict[tuple[str, str], int] = {}

    @asynccontextmanager
    async def program(machine: str, lease: Lease) -> AsyncIterator[None]:
        key = (machine, lease.job.id)
        working[key] = working.get(key, 0) + 1
        assert working[key] == 1, f"{key} is run twice at once"
        try:
            yield
        finally:
            working[key] -= 1

    async def life(machine: str, name: str) -> None:
        """A process; its locks go with it, and so do its leases."""
        fuse = Fuse(rng.randrange(5, 60) if rng.random() < 0.6 else None, rng.choice([When.BEFORE, When.AFTER]))
        source = room.source(name, machine, claims=f"claims-{machine}", fuse=None if calm else fuse)
        claims: list[object] = []
        try:
            for _ in range(rng.randrange(1, 6)):
                try:
                    lease = await source.receive(wait=rng.random() * 5)
                except SourceUnavailableError:
                    await anyio.sleep(rng.random())
                    continue
                if lease is not None:
                    claims.append(lease._held.claim)  # type: ignore[attr-defined]
                    await one_job(machine, lease)
        except CrashError:
            pass
        finally:
            for claim in claims:
                claim._file.close()  # type: ignore[attr-defined]
            del source
        await anyio.sleep(rng.random())

    async def one_job(machine: str, lease: Lease) -> None:
        keeper = LeaseKeeper(lease, lambda *_: None, rng=rng, clock=anyio.current_time)
        async with program(machine, lease), background(keeper.keep):
            with keeper.ended.ends():
                await anyio.sleep(rng.choice([0.1, 3.0, 12.0]))
                end = rng.choice(["completed", "completed", "failed", "released"]) if not calm else "completed"
                try:
                    await settled(lambda: SETTLES[end](lease))
                except LeaseLostError:
                    return
        if keeper.state is LeaseState.CANCELLED:
            await lease.withdraw()

    async def worker(machine: str, name: str) -> None:
        while not all(room.job(job_id)["status"] in ("completed", "failed") for job_id in jobs):
            await life(machine, name)
            if anyio.current_time() > 1_000 + 3_000:
                return

    with anyio.fail_after(5_000):
        async with anyio.create_task_group() as group:
            for machine in ("machine-1", "machine-2"):
                for name in ("a", "b"):
                    group.start_soon(worker, machine, f"{machine}-{name}")
            await anyio.sleep(300)
            calm = True
            for number in range(4):
                group.start_soon(worker, f"fresh-{number}", f"fresh-{number}")
    assert room.wrong == []
    assert {room.job(job_id)["status"] for job_id in jobs} <= {"completed", "failed"}
