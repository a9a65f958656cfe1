"""When the `salad` source has a stream open, what comes of a job that nobody wants, and gRPC itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio
import grpc
import pytest

from heeler.errors import UsageError
from heeler.job import Result
from heeler.settings import Settings
from heeler.sources import SourceRequest, open_source, salad_jobs
from heeler.sources.base import LeaseLostError, SourceUnavailableError
from heeler.sources.salad_channel import Channel
from heeler.tasks import background
from tests.support.salad_rig import files_in, running, scripted, until
from tests.support.salad_script import HANG, HEARTBEAT, ScriptedQueue, StubMachine, job

pytestmark = pytest.mark.anyio

Code = grpc.StatusCode
ANSWER = Result(status=200, body=b"output")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_job_that_nobody_asks_for_is_kept_for_a_while(tmp_path: Path) -> None:
    async with scripted(tmp_path, [0.2, job("a"), HANG], unwanted_seconds=2.0) as (queue, rig):
        assert await rig.nothing(wait=0.1)
        await anyio.sleep(1.0)
        assert (await rig.take(wait=0.0)).job.id == "a"
        await anyio.sleep(2.5)
        assert queue.open == 1, "a lease keeps the stream open"
        assert queue.got("RejectJob") == []


async def test_a_job_that_nobody_asks_for_is_rejected_then(tmp_path: Path) -> None:
    script: dict[str, Any] = {"RejectJob": [Code.UNAVAILABLE, None]}
    async with scripted(tmp_path, [0.2, job("a"), HANG], [job("b"), HANG], unwanted_seconds=0.6, **script) as (
        queue,
        rig,
    ):
        assert await rig.nothing(wait=0.1)
        await until(lambda: len(queue.got("RejectJob")) == 2)
        assert [call.open for call in queue.got("RejectJob")] == [0, 0], "or the next would come at once"
        await anyio.sleep(0.5)
        assert len(queue.got("AcceptJobs")) == 1
        assert (await rig.take()).job.id == "b"


async def test_a_job_that_waits_is_rejected_when_the_process_ends(tmp_path: Path) -> None:
    async with ScriptedQueue([0.2, job("a"), HANG]).serving() as queue:
        async with running(queue.endpoint, tmp_path, StubMachine()) as rig:
            assert await rig.nothing(wait=0.1)
            await until((tmp_path / "salad.job").exists)
        assert [call.open for call in queue.got("RejectJob")] == [0]
    assert files_in(tmp_path) == []


async def test_a_pause_closes_the_stream_before_the_answer_is_told(tmp_path: Path) -> None:
    async with scripted(tmp_path, [job("a"), HANG], [job("b"), HANG]) as (queue, rig):
        lease = await rig.take()
        assert queue.open == 1
        await rig.source.pause()
        await rig.source.pause()
        await lease.release()
        assert [call.open for call in queue.got("RejectJob")] == [0]
        await anyio.sleep(0.5)
        assert len(queue.got("AcceptJobs")) == 1
        start = time.monotonic()
        assert (await rig.take()).job.id == "b"
        assert time.monotonic() - start < 0.5
        assert [call.job_id for call in queue.got("AcceptJobs")] == ["", ""]


async def test_without_anybody_who_asks_there_is_no_stream(tmp_path: Path) -> None:
    async with scripted(tmp_path, [HEARTBEAT, HANG]) as (queue, rig):
        await anyio.sleep(0.3)
        assert queue.calls == []
        with anyio.move_on_after(0.3):
            await rig.source.receive(wait=10.0)
        await until(lambda: queue.open == 0)
        assert len(queue.calls) == 1


async def test_no_stream_is_opened_before_the_machine_is_ready(tmp_path: Path) -> None:
    machine = StubMachine()
    machine.is_ready = False
    async with scripted(tmp_path, [job("a"), HANG], machine=machine) as (queue, rig):
        assert await rig.nothing(wait=1.0)
        machine.is_ready = True
        assert queue.calls == []
        await rig.take()
        assert 4.5 <= machine.asked[1] - machine.asked[0] <= 6.0
        assert rig.faults == []


async def test_a_metadata_service_that_fails_is_asked_again_soon(tmp_path: Path) -> None:
    """FAULTS, Salad 2: one 500 cost 120 s."""
    machine = StubMachine()
    machine.is_ready = SourceUnavailableError("500")
    async with scripted(tmp_path, [job("a"), HANG], machine=machine) as (_, rig):
        assert await rig.nothing(wait=4.0)
        assert 4 <= len(machine.asked) <= 9
        machine.is_ready = True
        start = time.monotonic()
        await rig.take()
        assert time.monotonic() - start < 2.0
        assert rig.events == ["machine_unreachable"], "told once in a row"


async def test_a_token_that_can_not_be_had_is_asked_for_again_soon(tmp_path: Path) -> None:
    machine = StubMachine(SourceUnavailableError("connection refused"), "token-2")
    async with scripted(tmp_path, [job("a"), HANG], machine=machine) as (_, rig):
        assert await rig.nothing(wait=1.0)
        machine.tokens.pop(0)
        lease = await rig.take()
        machine.tokens.insert(0, SourceUnavailableError("connection refused"))
        with pytest.raises(SourceUnavailableError):
            await lease.complete(ANSWER)
        machine.tokens.pop(0)
        await lease.complete(ANSWER)


async def test_an_answer_that_was_never_sent_is_not_taken_for_one(tmp_path: Path) -> None:
    """Without a token there was no call, so NOT_FOUND means that the job was lost."""
    machine = StubMachine()
    async with scripted(tmp_path, [job("a"), HANG], machine=machine, CompleteJob=[Code.NOT_FOUND]) as (_, rig):
        lease = await rig.take()
        machine.tokens.insert(0, SourceUnavailableError("connection refused"))
        with pytest.raises(SourceUnavailableError):
            await lease.complete(ANSWER)
        machine.tokens.pop(0)
        with pytest.raises(LeaseLostError):
            await lease.complete(ANSWER)


async def test_an_answer_that_was_given_up_half_way_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the worker would live, but take no job any more."""
    monkeypatch.setattr(salad_jobs, "_ABANDONED_SECONDS", 0.3)
    streams = [[job("a"), 0.5, Code.UNAVAILABLE], [job("b"), HANG]]
    script: dict[str, Any] = {"CompleteJob": [HANG, Code.INTERNAL, None]}
    async with scripted(tmp_path, *streams, **script) as (queue, rig):
        lease = await rig.take()
        with anyio.move_on_after(0.1):
            await lease.complete(ANSWER)
        assert (await rig.take()).job.id == "b"
        assert [call.job_id for call in queue.got("AcceptJobs")] == ["", ""]
        assert [call.output for call in queue.got("CompleteJob")] == [ANSWER.body] * 3


async def test_a_name_is_looked_up_by_ever_new_channels_until_there_is_a_connection() -> None:
    channel = Channel("queue.heeler.invalid:443", tls=True)
    seen = set()
    with anyio.move_on_after(7.0):
        async with background(channel.connected):
            while True:
                await anyio.sleep(0.05)
                seen.add(channel._open)
    assert len(seen - {None}) == 3
    await channel.aclose()


def test_grpc_writes_nothing_to_our_standard_error_and_leaves_the_environment_alone() -> None:
    program = """
import os, subprocess, anyio
from heeler.sources.salad_channel import Channel
async def main():
    channel = Channel("127.0.0.1:9", tls=False)
    with anyio.move_on_after(0.5):
        await channel.connected()
    if os.fork() == 0:
        os._exit(0)
    os.wait()
    await channel.aclose()
    assert "GRPC_VERBOSITY" not in os.environ
anyio.run(main)
"""
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_grpc_is_not_loaded_for_other_sources() -> None:
    program = "import sys, heeler.supervisor, heeler.sources.local; assert 'grpc' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.mark.parametrize("endpoint", ["", "host", "http://host:443", "host:0", "host:65536", "host:443/x", "a b:443"])
def test_an_endpoint_that_is_none_is_refused_by_its_names(tmp_path: Path, endpoint: str) -> None:
    request = SourceRequest("salad", "w", tmp_path, settings=Settings(salad_endpoint=endpoint), machine=StubMachine())
    with pytest.raises(UsageError, match=r"SALAD_SERVICE_ENDPOINT \(or --salad-endpoint\)"):
        open_source(request)


@pytest.mark.parametrize("endpoint", ["host:443", "127.0.0.1:1", "[::1]:65535", "a-b.c_d.example:50051"])
def test_an_endpoint_is_a_host_and_a_port(tmp_path: Path, endpoint: str) -> None:
    request = SourceRequest("salad", "w", tmp_path, settings=Settings(salad_endpoint=endpoint), machine=StubMachine())
    assert open_source(request).name == "salad"


def test_off_saladcloud_the_setting_that_helps_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="SALAD_METADATA_URI"):
        open_source(SourceRequest("salad", "w", tmp_path))
