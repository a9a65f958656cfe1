"""`heeler.http` against servers of raw bytes, over real sockets."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.abc import SocketAttribute, SocketStream

from heeler.http import Answer, HttpClient, NoAnswerError, SilentError, TooLargeError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Raw:
    """A server that answers each request with bytes of the test's choice."""

    def __init__(self, answer: Callable[[bytes], bytes | None]) -> None:
        """Args: the answer's bytes, by the request's; None closes the connection at once."""
        self._answer = answer
        self.requests: list[bytes] = []
        self.connections = 0
        self.close_after = False
        self.open: list[SocketStream] = []

    async def handle(self, stream: SocketStream) -> None:
        self.connections += 1
        self.open.append(stream)
        async with stream:
            try:
                while (request := await _request(stream)) is not None:
                    self.requests.append(request)
                    answer = self._answer(request)
                    if answer is None:
                        return
                    await stream.send(answer)
                    if self.close_after:
                        return
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                return


async def _request(stream: SocketStream) -> bytes | None:
    data = b""
    while b"\r\n\r\n" not in data:
        try:
            data += await stream.receive()
        except anyio.EndOfStream:
            return None
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    missing = int(lengths[0]) - len(body) if lengths else 0
    while missing > 0:
        part = await stream.receive()
        data += part
        missing -= len(part)
    return data


@asynccontextmanager
async def serving(answer: Callable[[bytes], bytes | None]) -> AsyncIterator[tuple[Raw, HttpClient]]:
    server = Raw(answer)
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1", backlog=1000)
    client = HttpClient("127.0.0.1", listener.extra(SocketAttribute.local_port))
    async with listener, anyio.create_task_group() as group:
        group.start_soon(listener.serve, server.handle)
        try:
            yield server, client
        finally:
            client.close()
            group.cancel_scope.cancel()


def sized(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


async def get(client: HttpClient, *, silence: float = 5.0, limit: int = 1000) -> Answer:
    return await client.call("GET", "/x?y=1", headers={"A": "b"}, silence=silence, limit=limit)


async def test_what_is_sent_is_what_was_given_and_nothing_else() -> None:
    body = bytes(range(256)) * 4096
    async with serving(lambda _: sized(b"")) as (server, client):
        await client.call("POST", "/a%20b?c=d", headers={"Content-Type": "x/y", "Salad-Job-Id": "1"}, body=body)
        await get(client)
        await client.call("POST", "/", headers={})
    head, _, sent = server.requests[0].partition(b"\r\n\r\n")
    assert sent == body
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /a%20b?c=d HTTP/1.1"
    names = sorted(line.split(":")[0] for line in lines[1:])
    assert names == ["Content-Length", "Content-Type", "Host", "Salad-Job-Id"]
    assert b"content-length" not in server.requests[1].lower()
    assert b"Content-Length: 0\r\n" in server.requests[2]


@pytest.mark.parametrize("size", [0, 1, 65_535, 65_536, 65_537, 3_000_000])
async def test_an_answer_comes_byte_for_byte(size: int) -> None:
    body = os.urandom(size)
    async with serving(lambda _: sized(body, "201 Made", "X-Some-Thing: vAlue")) as (_, client):
        answer = await get(client, limit=size)
    assert (answer.status, answer.body, answer.headers["x-some-thing"]) == (201, body, "vAlue")


async def test_an_answer_may_come_in_chunks() -> None:
    chunks = b"5\r\nhello\r\n1;ext=1\r\n \r\n5\r\nworld\r\n0\r\nTrailer: x\r\n\r\n"
    async with serving(lambda _: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks) as (server, client):
        assert (await get(client)).body == b"hello world"
        assert (await get(client)).body == b"hello world"
    assert server.connections == 1


async def test_an_answer_may_end_with_the_connection() -> None:
    async with serving(lambda _: b"HTTP/1.0 200 OK\r\n\r\nall there is") as (server, client):
        server.close_after = True
        assert (await get(client)).body == b"all there is"
        assert (await get(client)).body == b"all there is"
    assert server.connections == 2


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
async def test_a_redirect_is_an_answer(status: str) -> None:
    async with serving(lambda _: sized(b"", status, "Location: /elsewhere")) as (server, client):
        answer = await client.call("POST", "/here", headers={}, body=b"job")
    assert answer.status == int(status[:3])
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nfour",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 20",
        b"",
    ],
)
async def test_a_truncated_answer_is_none(answer: bytes) -> None:
    async with serving(lambda _: answer) as (server, client):
        server.close_after = True
        with pytest.raises(NoAnswerError) as caught:
            await get(client)
    assert caught.value.sent
    assert "None" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 abc OK\r\n\r\n", b"\0" * 100_000 + b"\r\n"])
async def test_what_is_not_http_is_no_answer(answer: bytes) -> None:
    async with serving(lambda _: answer) as (server, client):
        server.close_after = True
        with pytest.raises(NoAnswerError, match="not HTTP") as caught:
            await get(client)
    assert caught.value.sent


async def test_endless_headers_are_no_answer() -> None:
    async with serving(lambda _: b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1_000 + b"\r\n") as (_, client):
        with pytest.raises(NoAnswerError):
            await get(client)


@pytest.mark.parametrize("interim", ["100 Continue", "102 Processing", "103 Early Hints\r\nLink: </a>", "199 Odd"])
async def test_interim_answers_are_passed_over(interim: str) -> None:
    """Taken for the answer, they would leave the real one to the next call."""
    before = f"HTTP/1.1 {interim}\r\n\r\n".encode() * 2
    async with serving(lambda request: before + sized(request.split()[1])) as (server, client):
        for number in range(3):
            answer = await client.call("POST", f"/{number}", headers={})
            assert (answer.status, answer.body) == (200, b"/%d" % number)
        assert server.connections == 1


@pytest.mark.parametrize("chunked", [False, True])
async def test_an_answer_above_the_limit_is_refused_and_one_at_it_is_taken(chunked: bool) -> None:
    def answer(_: bytes) -> bytes:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n"

    async with serving(answer if chunked else lambda _: sized(b"x" * 100)) as (server, client):
        assert len((await get(client, limit=100)).body) == 100
        with pytest.raises(TooLargeError) as caught:
            await get(client, limit=99)
        assert (caught.value.status, caught.value.limit) == (200, 99)
        assert len((await get(client, limit=100)).body) == 100
    assert server.connections == 2


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
async def test_silence_ends_the_call(answer: bytes) -> None:
    async with serving(lambda _: answer) as (_, client):
        begun = time.monotonic()
        with pytest.raises(SilentError) as caught:
            await get(client, silence=0.2)
    assert caught.value.sent
    assert 0.15 < time.monotonic() - begun < 2


async def test_nobody_there_means_that_nothing_was_sent() -> None:
    client = HttpClient("127.0.0.1", _free_port())
    with pytest.raises(NoAnswerError) as caught:
        await get(client)
    assert not caught.value.sent


async def test_a_connection_is_used_again() -> None:
    async with serving(lambda _: sized(b"hi")) as (server, client):
        for _ in range(20):
            await get(client)
    assert server.connections == 1


async def test_a_connection_that_the_server_closed_while_idle_does_no_harm() -> None:
    async with serving(lambda _: sized(b"hi")) as (server, client):
        for number in range(1, 6):
            await get(client)
            await server.open[-1].aclose()
            await anyio.sleep(0.02)
            assert server.connections == number


async def test_what_comes_unasked_on_an_idle_connection_is_no_answer() -> None:
    async with serving(lambda _: sized(b"mine")) as (server, client):
        await get(client)
        await server.open[-1].send(sized(b"not yours"))
        await anyio.sleep(0.02)
        assert (await get(client)).body == b"mine"


async def test_connection_close_is_honoured() -> None:
    async with serving(lambda _: sized(b"hi", "200 OK", "Connection: close")) as (server, client):
        for _ in range(3):
            assert (await get(client)).body == b"hi"
    assert server.connections == 3


async def test_many_at_once_each_get_their_own_answer() -> None:
    async with serving(lambda request: sized(request.split()[1])) as (server, client):
        answers: dict[int, bytes] = {}

        async def ask(number: int) -> None:
            answers[number] = (await client.call("GET", f"/{number}", headers={})).body

        for _ in range(2):
            async with anyio.create_task_group() as group:
                for number in range(100):
                    group.start_soon(ask, number)
            assert answers == {number: b"/%d" % number for number in range(100)}
            answers.clear()
        assert server.connections <= 200


@pytest.mark.parametrize("value", ["a\r\nEvil: 1", "a\nEvil: 1", "a\rb", "schön€"])
async def test_a_header_can_not_smuggle_another(value: str) -> None:
    async with serving(lambda _: sized(b"")) as (server, client):
        with pytest.raises(NoAnswerError, match="can not be sent") as caught:
            await client.call("GET", "/", headers={"X": value})
    assert not caught.value.sent
    assert server.requests == []


@pytest.mark.parametrize("path", ["/a b", "/a\r\nEvil: 1", "/a HTTP/1.1\r\nEvil: 1\r\n\r\n", "/\n", "/ü", "/\x7f"])
async def test_a_path_can_not_smuggle_a_header(path: str) -> None:
    async with serving(lambda _: sized(b"")) as (server, client):
        with pytest.raises(NoAnswerError) as caught:
            await client.call("GET", path, headers={})
    assert not caught.value.sent
    assert server.requests == []


@pytest.mark.parametrize("name", ["A\r\nEvil", "A:B", "", "A\nB"])
async def test_a_header_name_can_not_smuggle_either(name: str) -> None:
    async with serving(lambda _: sized(b"")) as (server, client):
        with pytest.raises(NoAnswerError) as caught:
            await client.call("GET", "/", headers={name: "1"})
    assert not caught.value.sent
    assert server.requests == []


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _workers() -> int:
    return sum(thread.name == "AnyIO worker thread" for thread in threading.enumerate())


def _sockets() -> int:
    count = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            count += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError:
            continue
    return count


def _run_and_count(work: Callable[[], Awaitable[None]], patience: float) -> None:
    """Run, and see that neither a thread nor a socket is left after `patience` seconds."""
    gc.collect()
    workers, sockets = _workers(), _sockets()
    anyio.run(work)
    give_up = time.monotonic() + patience
    while (_workers(), _sockets()) != (workers, sockets) and time.monotonic() < give_up:
        time.sleep(0.01)
    assert (_workers(), _sockets()) == (workers, sockets)


class TestCancelled:
    """No loop of the plugin's: what is left is seen once the loop is gone."""

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf"])
    def test_while_it_waits(self, answer: bytes) -> None:
        async def work() -> None:
            async with serving(lambda _: answer) as (_, client):
                begun = anyio.current_time()
                with anyio.move_on_after(0.1) as scope:
                    await client.call("POST", "/", headers={}, body=b"x")
                assert scope.cancelled_caught
                assert anyio.current_time() - begun < 0.5

        _run_and_count(work, 2)

    def test_while_it_sends_to_one_who_does_not_read(self) -> None:
        async def work() -> None:
            with socket.create_server(("127.0.0.1", 0)) as deaf:
                client = HttpClient(*deaf.getsockname())
                begun = anyio.current_time()
                with anyio.move_on_after(0.2) as scope:
                    await client.call("POST", "/", headers={}, body=b"x" * 50_000_000)
                assert scope.cancelled_caught
                assert anyio.current_time() - begun < 1

        _run_and_count(work, 2)

    def test_while_it_connects(self) -> None:
        async def work() -> None:
            with BlackHole() as hole:
                client = HttpClient(*hole.address, connect_timeout=1.0)
                begun = anyio.current_time()
                with anyio.move_on_after(0.1) as scope:
                    await client.call("GET", "/", headers={})
                assert scope.cancelled_caught
                assert anyio.current_time() - begun < 0.5

        _run_and_count(work, 3)

    def test_while_it_connects_and_then_is_connected(self) -> None:
        async def work() -> None:
            with BlackHole() as hole:
                with anyio.move_on_after(0.1):
                    await HttpClient(*hole.address, connect_timeout=10.0).call("GET", "/", headers={})
                hole.give_way()
                await anyio.sleep(1.5)  # the kernel tries again after a second
                assert hole.accepted() == 1

        _run_and_count(work, 2)

    def test_many_at_once(self) -> None:
        async def work() -> None:
            async with serving(lambda _: b"") as (_, client):
                with anyio.move_on_after(0.5):
                    async with anyio.create_task_group() as group:
                        for _ in range(100):
                            group.start_soon(get, client)

        _run_and_count(work, 5)


async def test_no_connection_in_time() -> None:
    with BlackHole() as hole:
        begun = time.monotonic()
        with pytest.raises(NoAnswerError, match="no connection in 0") as caught:
            await HttpClient(*hole.address, connect_timeout=0.2).call("GET", "/", headers={})
    assert not caught.value.sent
    assert time.monotonic() - begun < 1


class BlackHole:
    """An address that answers no connection: nobody accepts, and the queue is full."""

    def __enter__(self) -> BlackHole:
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(0)
        self._listener.setblocking(False)
        self.address: tuple[str, int] = self._listener.getsockname()
        self._waiting = [socket.create_connection(self.address)]
        return self

    def give_way(self) -> None:
        """Let the next one in."""
        assert self.accepted() == 1

    def accepted(self) -> int:
        """How many were in the queue."""
        count = 0
        while True:
            try:
                self._waiting.append(self._listener.accept()[0])
            except BlockingIOError:
                return count
            count += 1

    def __exit__(self, *_: object) -> None:
        for sock in (*self._waiting, self._listener):
            sock.close()
