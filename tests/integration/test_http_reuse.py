"""What makes a connection unfit for the next call: a body where none can be, and idleness."""

from __future__ import annotations

import anyio
import pytest

from heeler import http
from tests.integration.test_http import Raw, serving, sized

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
@pytest.mark.parametrize(
    "rest",
    [
        "Content-Length: 5\r\n\r\nhello",
        "Content-Length: 5\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n",
        "Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ],
)
async def test_a_body_where_none_can_be_is_neither_waited_for_nor_taken_for_the_next_answer(
    status: str, rest: str
) -> None:
    odd = f"HTTP/1.1 {status}\r\n{rest}".encode()
    async with serving(lambda request: odd if b"/odd" in request else sized(b"good")) as (_, client):
        for _ in range(3):
            answer = await client.call("POST", "/odd", headers={}, silence=5.0)
            assert (answer.status, answer.body) == (int(status[:3]), b"")
            assert (await client.call("POST", "/", headers={}, silence=5.0)).body == b"good"


async def test_a_body_where_none_can_be_that_comes_late_is_not_the_next_answer() -> None:
    connections: list[Raw] = []

    def answer(request: bytes) -> bytes:
        if b"/odd" in request:
            return b"HTTP/1.1 204 No Content\r\nContent-Length: 5\r\n\r\n"
        return (b"hello" if connections[0].connections == 1 else b"") + sized(b"good")

    async with serving(answer) as (server, client):
        connections.append(server)
        await client.call("POST", "/odd", headers={})
        assert (await client.call("POST", "/", headers={})).body == b"good"


async def test_an_honest_204_keeps_its_connection() -> None:
    async with serving(lambda _: b"HTTP/1.1 204 No Content\r\n\r\n") as (server, client):
        for _ in range(3):
            assert (await client.call("POST", "/", headers={})).status == 204
    assert server.connections == 1


async def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server may close it at any moment now, and a request that is under way then is lost."""
    monkeypatch.setattr(http, "_IDLE_SECONDS", 0.2)
    async with serving(lambda _: sized(b"hi")) as (server, client):
        await client.call("POST", "/", headers={})
        await client.call("POST", "/", headers={})
        assert server.connections == 1
        await anyio.sleep(0.25)
        await client.call("POST", "/", headers={})
        assert server.connections == 2
