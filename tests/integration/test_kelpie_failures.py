"""The `kelpie` source over real connections that break, hang and lie: each job is reported once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from heeler.job import Result
from heeler.local.kelpie_faults import Fault, Kind
from heeler.sources import kelpie, kelpie_http
from heeler.sources.base import Lease, LeaseState, SourceUnavailableError
from heeler.sources.kelpie_http import KelpieClient, KeyCredentials
from tests.support.kelpie_script import connected, taken
from tests.support.kelpie_server import KelpieServer

pytestmark = pytest.mark.anyio

OK, BAD = Result(exit_code=0), Result(exit_code=3)
REPORTS: dict[str, Callable[[Lease], Awaitable[None]]] = {
    "completed": lambda lease: lease.complete(OK),
    "failed": lambda lease: lease.retry("exit code 3", result=BAD, delay=0.0),
}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Clock:
    def __init__(self) -> None:
        self.now = 1_713_552_811.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api(clock: Clock) -> Iterator[KelpieServer]:
    with KelpieServer(clock=clock) as server:
        yield server


def order(api: KelpieServer, kind: Kind, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next call of a kind fail; one that hangs is given up soon."""
    if fault is Fault.HANG:
        monkeypatch.setattr(kelpie_http, "_SILENCE", 1.0)
    api.faults.fail(kind, fault)


async def insist(call: Callable[[], Awaitable[object]]) -> int:
    """Until it is done; how often it was not."""
    with anyio.fail_after(20):
        for failures in range(1000):
            try:
                await call()
            except SourceUnavailableError:
                await anyio.sleep(0.01)
            else:
                return failures
    raise AssertionError


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("kind", ["heartbeat", "get", "completed", "failed"])
@pytest.mark.parametrize("how", sorted(REPORTS))
async def test_a_call_that_fails_while_a_job_is_reported_is_made_up_for(
    api: KelpieServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, kind: Kind, fault: Fault
) -> None:
    job_id = api.submit("true")
    source, _ = connected(api, tmp_path)
    lease = await taken(source)
    order(api, kind, fault, monkeypatch)
    failures = await insist(lambda: REPORTS[how](lease))
    assert failures >= (kind in ("heartbeat", "get", how))
    job = api.job(job_id)
    assert (job["status"], job["num_failures"]) == (("completed", 0) if how == "completed" else ("running", 1))
    assert api.events.count((how, job_id)) == 1
    await source.aclose()


@pytest.mark.parametrize("fault", Fault)
@pytest.mark.parametrize("kind", ["work", "heartbeat", "get"])
async def test_a_call_that_fails_while_a_job_is_taken_is_made_up_for(
    api: KelpieServer, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Kind, fault: Fault
) -> None:
    job_id = api.submit("true")
    source, _ = connected(api, tmp_path)
    order(api, kind, fault, monkeypatch)
    with pytest.raises(SourceUnavailableError):
        await source.receive(wait=1.0)
    monkeypatch.undo()
    if kind == "work" and fault is Fault.LOSE:
        assert api.job(job_id)["status"] == "running"
        assert await source.receive(wait=0.3) is None, "we never heard of it"
        clock.now += 61
    lease = await taken(source)
    assert lease.job.id == job_id
    await lease.complete(OK)
    assert api.events.count(("completed", job_id)) == 1
    await source.aclose()


async def test_an_outage_in_the_middle_of_a_job_costs_nothing(api: KelpieServer, tmp_path: Path) -> None:
    job_id = api.submit("true")
    source, _ = connected(api, tmp_path)
    lease = await taken(source)
    with api.away():
        for call in (lease.extend, lambda: lease.complete(OK), lambda: source.receive(wait=0.5)):
            with pytest.raises(SourceUnavailableError, match="is out of reach"):
                await call()
    assert await lease.extend() is LeaseState.HELD
    await lease.complete(OK)
    assert api.events.count(("completed", job_id)) == 1
    await source.aclose()


async def test_an_api_that_drops_every_connection_is_out_of_reach(api: KelpieServer, tmp_path: Path) -> None:
    api.submit("true")
    source, _ = connected(api, tmp_path)
    api.faults.down = True
    with pytest.raises(SourceUnavailableError, match="the connection was closed before the answer"):
        await source.receive(wait=0.5)
    api.faults.clear()
    assert await taken(source)
    await source.aclose()


@pytest.mark.parametrize("status", [400, 401, 403, 408, 409, 429, 500, 503])
async def test_an_error_status_says_nothing_of_whose_the_job_is(api: KelpieServer, tmp_path: Path, status: int) -> None:
    job_id = api.submit("true")
    source, _ = connected(api, tmp_path)
    lease = await taken(source)
    api.faults.fail("heartbeat", Fault.ERROR, 2, status=status)
    for _ in range(2):
        with pytest.raises(SourceUnavailableError, match=f"with {status}: the API fails, as it was told to"):
            await lease.extend()
    assert await lease.extend() is LeaseState.HELD
    await lease.complete(OK)
    assert api.job(job_id)["status"] == "completed"
    await source.aclose()


async def test_a_receive_that_is_cancelled_while_the_api_hangs_ends_in_time(
    api: KelpieServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kelpie, "_TAKE_SECONDS", 0.4)
    api.faults.fail("work", Fault.HANG)
    source, _ = connected(api, tmp_path)
    start = anyio.current_time()
    with anyio.move_on_after(0.1), pytest.raises(SourceUnavailableError):
        await source.receive(wait=30.0)
    assert 0.3 < anyio.current_time() - start < 9.0, "before the call itself is given up"
    await source.aclose()


# Answers that are none.

Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def answering(script: Script) -> AsyncIterator[KelpieClient]:
    """Something that is not the API, and a client of it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            await script(writer)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    client = KelpieClient(f"http://127.0.0.1:{port}", KeyCredentials({"X-Kelpie-Key": "secret-key"}))
    try:
        yield client
    finally:
        client.close()
        server.close()


def head(length: int, status: str = "200 OK", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}", *more, "", ""]
    return "\r\n".join(lines).encode()


async def refused(script: Script) -> str:
    async with answering(script) as client:
        with anyio.fail_after(10), pytest.raises(SourceUnavailableError) as error:
            await client.call("GET", "/work")
    assert "secret-key" not in str(error.value)
    return str(error.value)


async def test_an_answer_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kelpie_http, "_TOTAL", 0.5)

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(head(10_000))
        for _ in range(10_000):
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    assert "no whole answer in 0.5 s" in await refused(drip)


async def test_an_answer_that_is_too_large_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kelpie_http, "_ANSWER_BYTES", 1000)

    async def flood(writer: asyncio.StreamWriter) -> None:
        writer.write(head(2000) + b"[" * 2000)

    assert "more than 1000 bytes" in await refused(flood)


async def test_an_answer_that_is_cut_off_is_none() -> None:
    async def cut(writer: asyncio.StreamWriter) -> None:
        writer.write(head(100) + b"[]")

    assert "ended 98 bytes early" in await refused(cut)


async def test_what_is_not_http_or_no_json_is_said_to_be_none() -> None:
    async def greet(writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.test ESMTP\r\n")

    async def page(writer: asyncio.StreamWriter) -> None:
        writer.write(head(6) + b"<html>")

    assert "not HTTP" in await refused(greet)
    assert "no sensible answer" in await refused(page)


async def test_a_redirect_is_not_followed_and_names_the_setting() -> None:
    seen = 0

    async def elsewhere(writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        seen += 1
        writer.write(head(0, "302 Found", "Location: /elsewhere"))

    assert "with 302; is KELPIE_API_URL (or --kelpie-url) right?" in await refused(elsewhere)
    assert seen == 1


async def test_errors_of_the_api_are_read_although_they_call_themselves_text() -> None:
    body = json.dumps({"error": "Not Found", "message": "Job not found"}).encode()

    async def missing(writer: asyncio.StreamWriter) -> None:
        writer.write(head(len(body), "503 Busy", "Content-Type: text/plain;charset=UTF-8") + body)

    assert "with 503: Job not found" in await refused(missing)
