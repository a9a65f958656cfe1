"""The `kelpie` source at its work: who it says it is, when it asks, and that nothing it was given gets lost."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

from heeler.errors import UnavailableError, UsageError
from heeler.job import Result
from heeler.platform.imds import Imds
from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import Lease, LeaseState, SourceUnavailableError
from heeler.sources.kelpie import KelpieSource
from tests.support.kelpie_script import INTERVAL, Called, Room, connected, taken
from tests.support.kelpie_server import API_KEY, KEY, ORGANIZATION, PROJECT, KelpieServer
from tests.support.virtual_time import VIRTUAL

pytestmark = pytest.mark.anyio

OK = Result(exit_code=0)
LAPSE = 2 * INTERVAL + 1.0
BY_SALADS_KEY = {"kelpie_api_key": None, "salad_api_key": API_KEY}
WAYS: dict[str, dict[str, Any]] = {
    "kelpie's key": {},
    "salad's key": {**BY_SALADS_KEY, "salad_organization": ORGANIZATION, "salad_project": PROJECT},
    "salad's key, organization of the token": {**BY_SALADS_KEY, "salad_project": PROJECT},
    "token": {"kelpie_api_key": None, "salad_project": PROJECT},
    "token alone": {"kelpie_api_key": None, "salad_project": PROJECT, "machine_id": None, "container_group_id": None},
}


@pytest.fixture
def anyio_backend() -> object:
    return VIRTUAL


@pytest.fixture
def kelpie() -> Iterator[KelpieServer]:
    with KelpieServer() as server:
        yield server


@pytest.fixture
def room(anyio_backend: object, tmp_path: Path) -> Room:
    return Room(tmp_path)


class Tokens:
    """A metadata service whose first tokens are no good."""

    def __init__(self, server: KelpieServer, *bad: str) -> None:
        self._server = server
        self._left = list(bad)
        self._kept = ""
        self.given: list[bool] = []

    async def ready(self) -> bool:
        return True

    async def token(self, *, fresh: bool = False) -> str:
        if fresh or not self._kept:
            self.given.append(fresh)
            self._kept = self._left.pop(0) if self._left else self._server.token()
        return self._kept


# Who we are.


@pytest.mark.parametrize("way", WAYS)
async def test_a_job_is_done_whichever_way_we_say_who_we_are(kelpie: KelpieServer, tmp_path: Path, way: str) -> None:
    job_id = kelpie.submit("true")
    machine = Imds(kelpie.environment()["SALAD_METADATA_URI"])
    source, faults = connected(kelpie, tmp_path, machine=machine, **WAYS[way])
    await source.check(1.0)
    lease = await taken(source)
    assert await lease.extend() is LeaseState.HELD
    assert kelpie.job(job_id)["machine_id"] == "machine-1"
    await lease.complete(OK)
    assert (kelpie.job(job_id)["status"], faults) == ("completed", [])
    await source.aclose()
    machine.close()


async def test_a_token_that_has_expired_is_fetched_anew_once(kelpie: KelpieServer, tmp_path: Path) -> None:
    kelpie.submit("true")
    machine = Tokens(kelpie, kelpie.token(lifetime=-1.0))
    source, _ = connected(kelpie, tmp_path, machine=machine, **WAYS["token"])
    await (await taken(source)).complete(OK)
    assert machine.given == [False, True]
    await source.aclose()


async def test_tokens_that_are_all_refused_are_a_usage_error_at_the_start(kelpie: KelpieServer, tmp_path: Path) -> None:
    bad = kelpie.token(lifetime=-1.0)
    machine = Tokens(kelpie, bad, bad)
    source, _ = connected(kelpie, tmp_path, machine=machine, **WAYS["token"])
    with pytest.raises(UsageError, match="SALAD_PROJECT_NAME") as error:
        await source.check(1.0)
    assert bad not in str(error.value)
    assert machine.given == [False, True]


@pytest.mark.parametrize(
    "wrong",
    [
        {"kelpie_api_key": "wrong-key"},
        {**WAYS["salad's key"], "salad_api_key": "wrong-key"},
        {**WAYS["salad's key"], "salad_organization": "others"},
        {**WAYS["salad's key"], "salad_project": "others"},
    ],
)
async def test_wrong_credentials_are_a_usage_error_that_names_the_variables(
    kelpie: KelpieServer, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    source, _ = connected(kelpie, tmp_path, **wrong)
    with pytest.raises(UsageError) as error:
        await source.check(5.0)
    for name in ("KELPIE_API_KEY", "SALAD_API_KEY", "SALAD_ORGANIZATION_NAME", "SALAD_PROJECT_NAME"):
        assert name in str(error.value)
    assert not any(key in str(error.value) for key in ("wrong-key", API_KEY, KEY))


async def test_credentials_that_are_refused_later_are_an_outage(kelpie: KelpieServer, tmp_path: Path) -> None:
    source, faults = connected(kelpie, tmp_path, kelpie_api_key="wrong-key")
    with pytest.raises(SourceUnavailableError, match="check KELPIE_API_KEY"):
        await source.receive(wait=0.5)
    assert "wrong-key" not in str(faults)


async def test_an_api_that_is_somewhere_else_is_a_usage_error(kelpie: KelpieServer, tmp_path: Path) -> None:
    source, _ = connected(kelpie, tmp_path, kelpie_url=kelpie.url + "/v2")
    with pytest.raises(UsageError, match=r"Route Not Found; is KELPIE_API_URL \(or --kelpie-url\) right\?"):
        await source.check(5.0)


async def test_an_api_that_is_out_of_reach_is_asked_until_patience_ends(kelpie: KelpieServer, tmp_path: Path) -> None:
    source, faults = connected(kelpie, tmp_path)
    start = anyio.current_time()
    with kelpie.away(), pytest.raises(UnavailableError, match="is out of reach"):
        await source.check(20.0)
    assert 10.0 < anyio.current_time() - start <= 20.0
    assert len(faults) > 3
    assert {event for event, _ in faults} == {"queue_unreachable"}
    await source.check(0.0)


def test_whose_jobs_it_takes_has_to_be_known(tmp_path: Path) -> None:
    request = SourceRequest("kelpie", "w", tmp_path, settings=Settings(kelpie_api_key=KEY))
    with pytest.raises(UsageError, match="set SALAD_CONTAINER_GROUP_ID"):
        KelpieSource(request)


async def test_locks_that_can_not_be_kept_are_a_usage_error_at_the_start(kelpie: KelpieServer, tmp_path: Path) -> None:
    source, _ = connected(kelpie, tmp_path)
    (tmp_path / "claims").mkdir(mode=0o777)
    (tmp_path / "claims").chmod(0o777)
    with pytest.raises(UsageError, match=r"others may write to it.*claims.*; set TMPDIR to a folder of your own"):
        await source.check(1.0)


async def test_no_job_is_taken_while_locks_can_not_be_kept(kelpie: KelpieServer, tmp_path: Path) -> None:
    ids = [kelpie.submit("true") for _ in range(3)]
    source, _ = connected(kelpie, tmp_path)
    await source.check(1.0)
    (tmp_path / "claims").chmod(0o777)
    for _ in range(5):
        with pytest.raises(SourceUnavailableError, match="the locks of jobs can't be kept"):
            await source.receive(wait=1.0)
    assert kelpie.faults.calls["work"] == 1, "none is kept from others"
    (tmp_path / "claims").chmod(0o700)
    assert (await taken(source)).job.id == ids[0]


async def test_a_machine_of_ones_own_has_the_same_name_for_ever(kelpie: KelpieServer, tmp_path: Path) -> None:
    names = []
    for content in (None, None, "", "\xff", "../x\n"):
        place = tmp_path / "kelpie" / "machine-id"
        if content is not None:
            place.write_text(content, encoding="latin-1")
        job_id = kelpie.submit("true")
        source, _ = connected(kelpie, tmp_path, machine_id=None)
        await (await taken(source)).complete(OK)
        names.append(kelpie.job(job_id)["machine_id"])
        await source.aclose()
    assert names[0] == names[1]
    assert all(name.startswith("heeler-") for name in names)


# When it asks.


async def test_the_api_is_asked_with_jitter_and_never_faster(room: Room) -> None:
    times: list[float] = []

    async def note(call: Called) -> None:
        times.append(anyio.current_time())

    room.between, room.latency = note, lambda: 0.0
    assert await room.source(kelpie_poll=5.0).receive(wait=300.0) is None
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert len(gaps) > 48
    assert 4.0 - 1e-3 <= min(gaps) < 4.5
    assert 5.5 < max(gaps) <= 6.0 + 1e-3


async def test_after_a_job_was_taken_the_next_is_asked_for_at_once(room: Room) -> None:
    ids = [room.submit() for _ in range(5)]
    source = room.source(kelpie_poll=100.0)
    start = anyio.current_time()
    assert [(await taken(source)).job.id for _ in ids] == ids
    assert await source.receive(wait=50.0) is None
    assert anyio.current_time() - start < 51.0
    assert len(room.calls("work")) == 6


async def test_after_a_job_that_this_machine_cannot_do_now_no_other_is_taken_at_once(
    kelpie: KelpieServer, tmp_path: Path
) -> None:
    for _ in range(3):
        kelpie.submit("true")
    source, _ = connected(kelpie, tmp_path, kelpie_poll=4.0)
    lease = await taken(source)
    await lease.release("its folder is in use", delay=5.0)
    assert await source.receive(wait=4.9) is None, "each job that is taken in vain waits for two heartbeats"
    before = anyio.current_time()
    lease = await taken(source)
    assert anyio.current_time() - before < 1.0
    await lease.release("told to stop")
    before = anyio.current_time()
    assert await source.receive(wait=1.0) is not None
    assert anyio.current_time() - before < 1.0
    await source.aclose()


async def test_many_lanes_ask_one_question_at_a_time_and_keep_one_pace(room: Room) -> None:
    asking, most = 0, 0

    async def ask(_call: Called) -> None:
        nonlocal asking, most
        asking += 1
        most = max(most, asking)
        await anyio.sleep(0.3)
        asking -= 1

    room.between = ask
    source = room.source(kelpie_poll=10.0)
    ended: list[float] = []
    start = anyio.current_time()

    async def lane() -> None:
        assert await source.receive(wait=100.0) is None
        ended.append(anyio.current_time() - start)

    async with anyio.create_task_group() as group:
        for _ in range(5):
            group.start_soon(lane)
    assert most == 1
    assert len(room.calls("work")) <= 14
    assert min(ended) >= 100.0 - 1e-3
    assert max(ended) < 101.0, "nobody waits for the others' waiting"


async def test_jobs_that_came_together_go_to_all_lanes_at_once(room: Room) -> None:
    source = room.source(kelpie_poll=60.0)
    assert await source.receive(wait=0.0) is None
    leases: list[Lease] = []

    async def lane() -> None:
        leases.append(await taken(source, 200.0))

    start = anyio.current_time()
    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(lane)
        await anyio.sleep(10.0)
        ids = [room.submit() for _ in range(4)]
    assert sorted(lease.job.id for lease in leases) == sorted(ids)
    assert anyio.current_time() - start < 75.0, "one pause for all of them"


async def test_a_question_without_an_answer_is_not_repeated_at_once(room: Room) -> None:
    room.weather = lambda call: "before"
    source = room.source(kelpie_poll=10.0)
    with pytest.raises(SourceUnavailableError):
        await source.receive(wait=30.0)
    start = anyio.current_time()
    with pytest.raises(SourceUnavailableError):
        await source.receive(wait=30.0)
    assert anyio.current_time() - start >= 8.0


# What it was given.


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("late", [0.0, 0.015, 0.03])
async def test_a_receive_that_is_cancelled_during_any_call_returns_its_job(
    room: Room, number: int, late: float
) -> None:
    job_id = room.submit()
    source = room.source()
    leases: list[Lease | None] = []
    room.latency = lambda: 0.02
    reached = anyio.Event()

    async def watch(_call: Called) -> None:
        if len(room.called) == number:
            reached.set()

    room.between = watch

    async def receive() -> None:
        leases.append(await source.receive(wait=30.0))

    async with anyio.create_task_group() as group:
        group.start_soon(receive)
        with anyio.move_on_after(1.0):
            await reached.wait()
            await anyio.sleep(late)
        group.cancel_scope.cancel()
    room.between = None
    lease = leases[0] if leases else await source.receive(wait=5.0)
    assert lease is not None
    assert lease.job.id == job_id
    await lease.complete(OK)
    assert room.calls("work") == ["work"]


async def test_a_receive_that_waits_ends_at_once_when_it_is_cancelled(room: Room) -> None:
    source = room.source(kelpie_poll=60.0)
    start = anyio.current_time()
    for _ in range(2):
        with anyio.move_on_after(1.0):
            await source.receive(wait=1000.0)
    assert anyio.current_time() - start < 2.1


async def test_what_hangs_is_given_up_and_what_was_given_is_gone_on_with(room: Room) -> None:
    job_id = room.submit()
    source = room.source()

    async def hang(call: Called) -> None:
        await anyio.sleep(100.0 if call.kind == "heartbeat" else 0.0)

    room.between = hang
    start = anyio.current_time()
    with anyio.move_on_after(1.0), pytest.raises(SourceUnavailableError, match="gave no answer in 15 s"):
        await source.receive(wait=30.0)
    assert anyio.current_time() - start < 16.0, "cancelled or not"
    room.between = None
    assert (await taken(source)).job.id == job_id
    assert room.calls("work") == ["work"]


async def test_two_jobs_of_two_lanes_are_both_kept_by_the_next_process(room: Room) -> None:
    ids = {room.submit(), room.submit()}
    source = room.source()
    for _ in ids:
        await taken(source)
    room.submit()
    heir = room.source()
    assert {(await taken(heir)).job.id for _ in ids} == ids
    assert room.calls("work") == ["work", "work"]


async def test_a_job_that_was_put_back_is_gone_on_with_by_the_next_process_alone(room: Room) -> None:
    job_id = room.submit()
    source = room.source()
    await (await taken(source)).release()
    assert await source.receive(wait=5.0) is None, "it stopped taking it"
    lease = await taken(room.source())
    assert (lease.job.id, lease.attempt) == (job_id, 2)


async def test_a_row_that_is_no_job_is_an_outage_and_the_next_one_is_taken(room: Room) -> None:
    first, second = room.submit(), room.submit()
    with room.table._database as database:
        database.execute("UPDATE jobs SET id = '../up' WHERE id = ?", (first,))
    source = room.source()
    with pytest.raises(SourceUnavailableError, match="a job that is none"):
        await source.receive(wait=5.0)
    assert (await taken(source)).job.id == second


# Two processes on one machine.

_SIBLING = """
import sys
from pathlib import Path
import anyio
from tests.support.kelpie_script import connected

class Server:
    url = sys.argv[1]

async def main():
    folder = Path(sys.argv[2])
    source, faults = connected(Server, folder)
    source._claims_folder = folder.parent / "claims"
    lease = await source.receive(wait=0.5)
    print("none" if lease is None else lease.job.id, flush=True)
    await anyio.sleep_forever()

anyio.run(main)
"""


@contextmanager
def sibling(url: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Another worker of this machine, and the job that it was given."""
    arguments = [sys.executable, "-c", _SIBLING, url, str(folder)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


class Moved:
    """A clock that is moved instead of waited for."""

    def __init__(self) -> None:
        self.late = 0.0

    def __call__(self) -> float:
        return time.time() + self.late


async def test_a_job_that_another_process_has_is_not_begun_until_that_is_dead(tmp_path: Path) -> None:
    clock = Moved()
    with KelpieServer(clock=clock) as kelpie:
        job_id = kelpie.submit("true")
        source, faults = connected(kelpie, tmp_path / "one")
        source._claims_folder = tmp_path / "claims"
        with sibling(kelpie.url, tmp_path / "two") as (process, had):
            assert had == job_id
            clock.late += LAPSE
            assert await source.receive(wait=0.5) is None
            assert "job_of_sibling" in [event for event, _ in faults]
            clock.late += LAPSE
            process.kill()
            process.wait(10)
            assert (await taken(source)).job.id == job_id
        await source.aclose()


async def test_another_process_does_not_begin_a_job_of_ours(tmp_path: Path) -> None:
    clock = Moved()
    with KelpieServer(clock=clock) as kelpie:
        job_id = kelpie.submit("true")
        source, _ = connected(kelpie, tmp_path / "one")
        source._claims_folder = tmp_path / "claims"
        lease = await taken(source)
        clock.late += LAPSE
        with sibling(kelpie.url, tmp_path / "two") as (_, had):
            assert had == "none"
        await lease.complete(OK)  # it was given to the other, who has left word
        assert kelpie.events.count(("started", job_id)) == 2
        assert kelpie.job(job_id)["status"] == "completed"
        await source.aclose()
