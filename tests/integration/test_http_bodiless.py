"""Answers that have no body although their headers, or the server, say otherwise."""

from __future__ import annotations

import pytest

from tests.integration.test_http import serving, sized

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


async def test_an_honest_204_keeps_its_connection() -> None:
    async with serving(lambda _: b"HTTP/1.1 204 No Content\r\n\r\n") as (server, client):
        for _ in range(3):
            assert (await client.call("POST", "/", headers={})).status == 204
    assert server.connections == 1
