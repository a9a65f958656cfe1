"""Kelpie's API over TLS: an authority that we trust, the right name, and clear words for everything else."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest

from heeler.sources import kelpie_http
from heeler.sources.base import SourceUnavailableError
from heeler.sources.kelpie_http import KelpieClient, KeyCredentials
from tests.support.s3.tls import server_context, write_certificate

pytestmark = pytest.mark.anyio

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Of 127.0.0.1 alone."""
    return write_certificate(tmp_path / "api.pem")


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    return certificate


class Server:
    """Answers every request; or hangs, once `silent`, or shows that it knows no TLS, if `plain`."""

    def __init__(self) -> None:
        self.port = 0
        self.connections = 0
        self.requests: list[bytes] = []
        self.silent = self.plain = False
        self.gone = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                if self.plain:
                    await reader.readexactly(5)
                    writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    return
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                if self.silent:
                    await reader.read()
                writer.write(ANSWER)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone.set()
            writer.close()

    def client(self, host: str = "127.0.0.1", scheme: str = "https") -> KelpieClient:
        return KelpieClient(f"{scheme}://{host}:{self.port}", KeyCredentials({"X-Kelpie-Key": "secret-key"}))


@asynccontextmanager
async def serving(context: ssl.SSLContext | None) -> AsyncIterator[Server]:
    found = Server()
    server = await asyncio.start_server(found.serve, "127.0.0.1", 0, ssl=context)
    found.port = server.sockets[0].getsockname()[1]
    try:
        yield found
    finally:
        server.close()


async def refusal(client: KelpieClient) -> str:
    with anyio.fail_after(10), pytest.raises(SourceUnavailableError) as error:
        await client.call("GET", "/work")
    client.close()
    return str(error.value)


async def test_calls_go_over_one_connection_to_whom_we_trust(trusted: Path) -> None:
    async with serving(server_context(trusted)) as server:
        client = server.client()
        for _ in range(3):
            assert await client.call("GET", "/work") == []
        assert await client.call("POST", "/jobs/a/heartbeat", body={}) == []
        assert server.connections == 1
        assert b"X-Kelpie-Key: secret-key" in server.requests[0]
        client.close()
        await server.gone.wait()


async def test_a_certificate_that_nobody_vouches_for_is_refused_before_the_key_is_shown(certificate: Path) -> None:
    async with serving(server_context(certificate)) as server:
        words = await refusal(server.client())
        assert words.startswith(f"Kelpie's API at https://127.0.0.1:{server.port} is out of reach: its certificate")
        assert "is not trusted" in words
        assert "SSL_CERT_FILE" in words
        assert server.requests == []


async def test_a_certificate_of_another_name_is_refused_before_the_key_is_shown(trusted: Path) -> None:
    async with serving(server_context(trusted)) as server:
        words = await refusal(server.client("localhost"))
        assert "its certificate is not trusted: Hostname mismatch" in words
        assert "localhost" in words
        assert server.requests == []


async def test_a_server_that_speaks_no_tls_is_said_to_speak_none(trusted: Path) -> None:
    async with serving(None) as server:
        server.plain = True
        words = await refusal(server.client())
        assert "it speaks no TLS that we understand" in words
        assert server.requests == []


async def test_a_server_that_wants_tls_is_not_talked_to_without(trusted: Path) -> None:
    async with serving(server_context(trusted)) as server:
        assert "is out of reach" in await refusal(server.client(scheme="http"))


async def test_a_greeting_that_does_not_come_is_given_up(trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kelpie_http, "_SILENCE", 0.2)
    async with serving(None) as server:
        with anyio.fail_after(5):
            assert "no connection in 0.2 s" in await refusal(server.client())


async def test_a_call_that_is_cancelled_ends_at_once_and_its_connection_with_it(trusted: Path) -> None:
    async with serving(server_context(trusted)) as server:
        client = server.client()
        assert await client.call("GET", "/work") == []
        server.silent = True
        for _ in range(5):
            server.gone.clear()
            start = anyio.current_time()
            with anyio.move_on_after(0.1) as scope:
                await client.call("GET", "/work")
            assert scope.cancelled_caught
            assert anyio.current_time() - start < 3.0
            with anyio.fail_after(5):
                await server.gone.wait()
        server.silent = False
        assert await client.call("GET", "/work") == []
        client.close()


async def test_an_answer_that_does_not_come_is_given_up(trusted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kelpie_http, "_SILENCE", 0.3)
    async with serving(server_context(trusted)) as server:
        server.silent = True
        assert "nothing came for 0.3 s" in await refusal(server.client())
