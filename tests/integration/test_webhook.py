"""Webhooks against servers of raw bytes, over real sockets."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import socket
import ssl
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
import pytest
from anyio.abc import ByteStream, Process, SocketAttribute, SocketListener
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSListener

from heeler import __version__
from heeler.webhook import Event, WebhookError, Webhooks, message_id
from tests.support.s3.tls import server_context, write_certificate

pytestmark = pytest.mark.anyio

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
PATH = "/hook%2Fa/%7Eb?token=s3cr3t&x=%41+%20"
EVENT = Event(
    message_id("job", "run", "done"), "job.done", 1700000000.5, {"id": "job", "reason": "\u00e4\udc80", "exit_code": 0}
)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


Script = Callable[[ByteStream], Awaitable[None]]


class Server:
    """Reads a request on each connection, and then does what its script says, the last one for all that come yet."""

    def __init__(self, scripts: list[Script], port: int, scheme: str) -> None:
        self._scripts = scripts
        self.origin = f"{scheme}://127.0.0.1:{port}"
        self.url = self.origin + PATH
        self.requests: list[bytes] = []
        self.asked = anyio.Event()
        self.left = anyio.Event()

    async def handle(self, stream: ByteStream) -> None:
        async with stream:
            with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
                self.requests.append(await read_request(stream))
                self.asked.set()
                await (self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0])(stream)
            self.left.set()


async def gone(stream: ByteStream) -> None:
    """Say nothing until the other side leaves."""
    with suppress(anyio.BrokenResourceError, anyio.EndOfStream):
        while True:
            await stream.receive()


async def read_request(stream: ByteStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        data += await stream.receive()
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    missing = int(lengths[0]) - len(body) if lengths else 0
    while missing > 0:
        part = await stream.receive()
        data += part
        missing -= len(part)
    return data


def says(answer: bytes) -> Script:
    """Send it, then wait for the other side's end."""

    async def script(stream: ByteStream) -> None:
        await stream.send(answer)
        await gone(stream)

    return script


def answers(status: int, *headers: str) -> Script:
    return says("\r\n".join([f"HTTP/1.1 {status} X", "Content-Length: 0", *headers, "", ""]).encode())


def drips(head: bytes, drop: bytes = b"x") -> Script:
    async def script(stream: ByteStream) -> None:
        await stream.send(head)
        while True:
            await stream.send(drop)
            await anyio.sleep(0.01)

    return script


async def resets(stream: ByteStream) -> None:
    raw = stream.extra(SocketAttribute.raw_socket)
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@asynccontextmanager
async def serving(*scripts: Script, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    multi = await anyio.create_tcp_listener(local_host="127.0.0.1")
    listener: SocketListener | TLSListener = multi.listeners[0]  # type: ignore[assignment]
    port = listener.extra(SocketAttribute.local_port)
    if tls is not None:
        listener = TLSListener(listener, tls, standard_compatible=False)
    server = Server([*scripts], port, "http" if tls is None else "https")
    async with multi, anyio.create_task_group() as group:
        group.start_soon(listener.serve, server.handle)
        try:
            yield server
        finally:
            group.cancel_scope.cancel()


async def failing(url: str, webhooks: Webhooks | None = None) -> WebhookError:
    """The error of one try, which holds nothing that may be secret."""
    with anyio.fail_after(14), pytest.raises(WebhookError) as caught:
        await (webhooks or Webhooks(SECRET, timeout=10.0)).send(url, EVENT)
    shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value)
    for secret in ("s3cr3t", "token=", "/hook", "/etc", SECRET, "hunter2"):
        assert secret not in shown
    return caught.value


# What is sent.


def parsed(request: bytes) -> tuple[str, dict[str, str], bytes]:
    head, _, body = request.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    pairs = [line.split(": ", 1) for line in lines]
    headers = {name.lower(): value for name, value in pairs}
    assert len(headers) == len(pairs)
    return first, headers, body


async def test_a_request_is_signed_and_says_what_happened() -> None:
    async with serving(says(OK)) as server:
        await Webhooks(SECRET, wall=lambda: 1700000123.9).send(server.url, EVENT)
    (request,) = server.requests
    first, headers, body = parsed(request)
    assert first == f"POST {PATH} HTTP/1.1"
    signature = hmac.new(KEY, f"{EVENT.id}.1700000123.".encode() + body, hashlib.sha256).digest()
    assert headers == {
        "host": server.origin.removeprefix("http://"),
        "accept": "*/*",
        "content-length": str(len(body)),
        "content-type": "application/json",
        "user-agent": f"heeler/{__version__}",
        "webhook-id": EVENT.id,
        "webhook-timestamp": "1700000123",
        "webhook-signature": "v1," + base64.b64encode(signature).decode(),
    } | {name: headers[name] for name in ("connection",) if name in headers}
    assert json.loads(body) == {"type": "job.done", "timestamp": "2023-11-14T22:13:20.500Z", "data": dict(EVENT.data)}


async def test_without_a_secret_nothing_is_signed() -> None:
    async with serving(says(OK)) as server:
        await Webhooks(None).send(server.url, EVENT)
    _, headers, _ = parsed(server.requests[0])
    assert "webhook-signature" not in headers
    assert headers["webhook-id"] == EVENT.id
    assert abs(int(headers["webhook-timestamp"]) - time.time()) < 60


async def test_tries_again_have_the_same_id_and_body_and_a_timestamp_of_their_own() -> None:
    times = iter([1700000000.0, 1700000060.0])
    async with serving(answers(500), answers(200)) as server:
        webhooks = Webhooks(SECRET, wall=lambda: next(times))
        with pytest.raises(WebhookError):
            await webhooks.send(server.url, EVENT)
        await webhooks.send(server.url, EVENT)
    (_, one, first), (_, two, second) = map(parsed, server.requests)
    assert first == second
    assert one["webhook-id"] == two["webhook-id"]
    assert (one["webhook-timestamp"], two["webhook-timestamp"]) == ("1700000000", "1700000060")
    assert one["webhook-signature"] != two["webhook-signature"]


async def test_passwords_in_the_home_folder_are_not_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password hunter2\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    async with serving(says(OK)) as server:
        await Webhooks(None).send(server.url, EVENT)
    assert b"authorization" not in server.requests[0].lower()


# What an answer means.


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
async def test_any_2xx_is_success(status: int) -> None:
    async with serving(answers(status)) as server:
        await Webhooks(SECRET).send(server.url, EVENT)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("status", "final"),
    [
        *[(status, True) for status in (300, 301, 302, 303, 304, 307, 308)],
        *[(status, True) for status in (400, 401, 404, 405, 410, 422)],
        *[(status, False) for status in (408, 425, 429, 500, 501, 502, 503, 504)],
    ],
)
async def test_any_other_status_fails_and_4xx_and_3xx_for_good(status: int, final: bool) -> None:
    async with serving(answers(status, "Location: /elsewhere?token=1")) as server:
        error = await failing(server.url)
        assert (str(error), error.final, error.delay) == (f"{server.origin} answered {status}", final, 0.0)
        assert len(server.requests) == 1, "no redirect is followed, nothing is sent twice"


async def test_a_redirect_is_not_followed_to_another_host() -> None:
    async with serving(says(OK)) as other, serving(answers(307, f"Location: {other.url}")) as server:
        with pytest.raises(WebhookError):
            await Webhooks(SECRET).send(server.url, EVENT)
        assert (len(server.requests), len(other.requests)) == (1, 0)


@pytest.mark.parametrize("status", [429, 503])
async def test_the_receiver_says_when_to_come_again(status: int) -> None:
    async with serving(answers(status, "Retry-After: 7"), answers(status, "retry-after: 99999999")) as server:
        assert (await failing(server.url)).delay == 7.0
        assert (await failing(server.url)).delay == 3600.0


# Receivers that are broken.


async def test_a_receiver_that_hangs_is_given_up_and_its_connection_closed() -> None:
    async with serving(gone) as server:
        error = await failing(server.url, Webhooks(SECRET, timeout=0.2))
        assert (str(error), error.final) == (f"{server.origin} gave no answer in 0.2 s", False)
        with anyio.fail_after(10):
            await server.left.wait()


async def test_a_head_that_drips_is_no_answer() -> None:
    async with serving(drips(b"HTTP/1.1 200 OK\r\nX: ")) as server:
        error = await failing(server.url, Webhooks(SECRET, timeout=0.3))
        assert "gave no answer in 0.3 s" in str(error)


@pytest.mark.parametrize(
    "script",
    [
        drips(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"),
        drips(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Encoding: gzip\r\n\r\nnot gzip!!"),
    ],
    ids=["drips", "drips chunks", "not gzip"],
)
async def test_the_status_decides_whatever_becomes_of_the_body(script: Script) -> None:
    async with serving(script) as server:
        with anyio.fail_after(10):
            await Webhooks(SECRET, timeout=0.8).send(server.url, EVENT)
    assert len(server.requests) == 1


async def test_of_a_large_body_only_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("heeler.webhook._BODY_SECONDS", 60.0)
    async with serving(says(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n" + b"x" * 65_536)) as server:
        with anyio.fail_after(10):
            await Webhooks(SECRET).send(server.url, EVENT)
            await server.left.wait()


async def test_of_a_body_that_fails_the_status_is_told() -> None:
    async with serving(drips(b"HTTP/1.1 410 Gone\r\nContent-Length: 1000000\r\n\r\n")) as server:
        error = await failing(server.url)
    assert error.final
    assert str(error).endswith("answered 410")


async def _ends(_: ByteStream) -> None:
    """Close the connection without a word."""


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (resets, "Connection reset by peer|the connection was closed before the answer"),
        (_ends, "the connection was closed before the answer"),
        (says(b"SSH-2.0-OpenSSH_9.6\r\n\r\n"), "the answer is not HTTP"),
        (says(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"), "the answer is not HTTP"),
        (says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n"), "the answer is not HTTP"),
    ],
    ids=["reset", "closed", "not HTTP", "huge head", "not chunked"],
)
async def test_a_broken_answer_may_come_better(script: Script, words: str) -> None:
    async with serving(script) as server:
        error = await failing(server.url)
        assert re.match(f"{re.escape(server.origin)}: ({words})", str(error))
        assert not error.final
        assert len(server.requests) == 1


async def test_a_port_without_a_listener_may_get_one() -> None:
    async with serving(_ends) as server:
        pass
    error = await failing(server.url)
    assert (str(error), error.final) == (f"{server.origin}: Connection refused", False)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/hook",
        "file:///etc/passwd",
        "hook",
        "http://",
        "http://h:x/hook",
        "http://u:hunter2@h/",
        "http://h/\r\n",
    ],
)
async def test_what_is_no_url_for_it_is_refused_for_good(url: str) -> None:
    assert (await failing(url)).final


# Names.


async def test_a_name_that_nobody_knows_may_be_known_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    error = await failing("http://nowhere.example/hook?token=1")
    assert (str(error), error.final) == ("http://nowhere.example: Name or service not known", False)


async def test_a_name_is_looked_up() -> None:
    async with serving(says(OK)) as server:
        await Webhooks(SECRET).send(server.url.replace("127.0.0.1", "localhost"), EVENT)
    assert parsed(server.requests[0])[1]["host"].startswith("localhost:")


async def test_a_look_up_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hangs(*_: object, **__: object) -> object:
        released.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "")

    monkeypatch.setattr(socket, "getaddrinfo", hangs)
    try:
        error = await failing("http://slow.example/hook", Webhooks(SECRET, timeout=0.2))
    finally:
        released.set()
    assert str(error) == "http://slow.example gave no answer in 0.2 s"


# TLS.


async def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path / "own.pem")
    async with serving(says(OK), tls=server_context(certificate)) as server:
        error = await failing(server.url)
    assert str(error) == f"{server.origin}: its certificate is refused (self-signed certificate)"
    assert not error.final, "it may be renewed"
    assert server.requests == []


async def test_a_receiver_without_tls_is_no_receiver_for_https() -> None:
    async with serving(says(OK)) as server:
        multi = await anyio.create_tcp_listener(local_host="127.0.0.1")

        async def plain(stream: ByteStream) -> None:
            async with stream:
                await stream.send(b"HTTP/1.1 400 Bad\r\n\r\n")
                await gone(stream)

        async with multi, anyio.create_task_group() as group:
            group.start_soon(multi.serve, plain)
            error = await failing(f"https://127.0.0.1:{multi.extra(SocketAttribute.local_port)}{PATH}")
            group.cancel_scope.cancel()
    assert str(error).endswith("no TLS connection came about")
    assert server.requests == []


SENDER = """
import os, socket, sys, threading
import anyio
from heeler.webhook import Event, WebhookError, Webhooks

async def main(url):
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(cancel_when_told, scope)
            await Webhooks(None).send(url, Event("msg_1", "job.done", 0.0, {}))
            print("sent", flush=True)
            group.cancel_scope.cancel()
    if scope.cancelled_caught:
        print("cancelled", flush=True)

async def cancel_when_told(scope):
    from anyio import wait_readable
    await wait_readable(sys.stdin)
    scope.cancel()

if "hanging-names" in sys.argv:
    def hang(*_, **__):
        print("looking", flush=True)
        threading.Event().wait()
    socket.getaddrinfo = hang
anyio.run(main, sys.argv[1])
if "hanging-names" in sys.argv:
    os._exit(0)  # as `heeler run` ends
"""


@asynccontextmanager
async def sender(*arguments: str, **environment: str) -> AsyncIterator[tuple[Process, Callable[[], Awaitable[bytes]]]]:
    """A process that sends one event, and what gives its next line."""
    command = [sys.executable, "-c", SENDER, *arguments]
    environment["PYTHONPATH"] = ":".join(sys.path)
    async with await anyio.open_process(command, env=environment, stderr=None) as process:
        assert process.stdout is not None
        lines = BufferedByteReceiveStream(process.stdout)
        with anyio.fail_after(30):
            yield process, lambda: lines.receive_until(b"\n", 1000)


async def cancel(process: Process) -> None:
    assert process.stdin is not None
    await process.stdin.send(b"\n")


async def test_a_certificate_that_the_machine_trusts_is_taken(tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path / "own.pem")
    async with (
        serving(says(OK), tls=server_context(certificate)) as server,
        sender(server.url, SSL_CERT_FILE=str(certificate)) as (_, line),
    ):
        assert await line() == b"sent"
    assert len(server.requests) == 1


# Cancellation.


async def test_a_cancelled_call_leaves_nothing_that_a_process_waits_for() -> None:
    async with serving(gone) as server, sender(server.url) as (process, line):
        await server.asked.wait()
        with anyio.fail_after(10):  # a try takes 15 s
            await cancel(process)
            assert await line() == b"cancelled"
            await server.left.wait()
            assert await process.wait() == 0


async def test_a_cancelled_look_up_leaves_nothing_that_an_event_loop_waits_for() -> None:
    async with sender("http://slow.example/", "hanging-names") as (process, line):
        assert await line() == b"looking"
        await cancel(process)
        assert await line() == b"cancelled"
        assert await process.wait() == 0


async def test_the_event_loop_goes_on_while_a_receiver_hangs() -> None:
    turns = 0
    async with serving(gone) as server, anyio.create_task_group() as group:

        async def send() -> None:
            await failing(server.url, Webhooks(SECRET, timeout=0.3))
            group.cancel_scope.cancel()

        group.start_soon(send)
        while not group.cancel_scope.cancel_called:
            turns += 1
            await anyio.sleep(0.001)
    assert turns > 20


# Proxies.


async def test_the_environment_s_proxy_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(says(OK)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.origin.replace("http://", "http://user:hunter2@"))
        await Webhooks(SECRET).send("http://receiver.example/hook?token=1", EVENT)
        first, headers, _ = parsed(proxy.requests[0])
        assert first == "POST http://receiver.example/hook?token=1 HTTP/1.1"
        assert headers["host"] == "receiver.example"
        assert headers["proxy-authorization"] == "Basic " + base64.b64encode(b"user:hunter2").decode()


async def test_a_proxy_that_refuses_a_tunnel_or_is_gone_is_named_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(says(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.origin.removeprefix("http://"))
        error = await failing("https://receiver.example/hook?token=1")
        assert str(error) == "https://receiver.example: the proxy answered 407"
        assert proxy.requests[0].startswith(b"CONNECT receiver.example:443 ")
        assert b"webhook-id" not in proxy.requests[0]
    monkeypatch.setenv("HTTPS_PROXY", proxy.origin.replace("http://", "http://user:hunter2@"))
    error = await failing("https://receiver.example/hook?token=1")
    assert str(error) == "https://receiver.example: the proxy can't be reached"
    assert not error.final


async def test_hosts_of_no_proxy_are_asked_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(says(OK)) as server, serving(says(OK)) as proxy:
        monkeypatch.setenv("http_proxy", proxy.origin)
        monkeypatch.setenv("no_proxy", "example.com,127.0.0.1")
        await Webhooks(SECRET).send(server.url, EVENT)
        assert (len(server.requests), len(proxy.requests)) == (1, 0)
