"""HTTP calls: to the user's app, the machine's metadata service, Kelpie's API. The standard library in threads.

Bodies go and come byte for byte. Nothing is followed (a redirect is an answer like any other), no proxy is asked, and
nothing is sent twice. A cancelled call ends at once, whatever its thread is waiting for.
"""

from __future__ import annotations

import http.client
import select
import socket
import ssl
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import anyio
import anyio.to_thread

_CHUNK = 1 << 16
_BODILESS = (204, 304)
"""What has no body, whatever its headers say; what a sloppy server sends all the same is not the next answer."""
_KEPT = 16
"""Idle connections that are kept."""
_IDLE_SECONDS = 1.0
"""So long a connection is kept: servers close idle ones, many after 2 or 5 s, perhaps just as we send a request."""


class NoAnswerError(Exception):
    """The other side gave no answer, or none that is HTTP.

    Attributes:
        sent: Whether a part of the request may have reached it.
    """

    def __init__(self, reason: str, *, sent: bool) -> None:
        self.sent = sent
        super().__init__(reason)


class SilentError(NoAnswerError):
    """Nothing came for longer than the call was ready to wait."""


class TooLargeError(Exception):
    """The answer has more bytes than the call was ready to take.

    Attributes:
        status: Of the answer.
        limit: In bytes.
    """

    def __init__(self, status: int, limit: int) -> None:
        self.status = status
        self.limit = limit
        super().__init__(f"the answer (status {status}) has more than {limit} bytes")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer: its status, its headers by lower-case name, and its body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Calls one host and port, and keeps its connections for the next call. Any number of calls at a time."""

    def __init__(
        self, host: str, port: int, *, connect_timeout: float = 5.0, tls: ssl.SSLContext | None = None
    ) -> None:
        """Args: where; `localhost` means ::1 or 127.0.0.1. Seconds until a connection that is not made is given up."""
        self._tls = tls
        self.host = host
        self.port = port
        self._connect_timeout = connect_timeout
        self._idle: list[tuple[float, http.client.HTTPConnection]] = []
        self._threads = anyio.CapacityLimiter(1000)
        self._closed = False

    async def call(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str],
        body: bytes = b"",
        silence: float | None = None,
        limit: int = 1 << 20,
    ) -> Answer:
        """Send one request and read the whole answer.

        Args:
            method: The method.
            path: The path and query, as they are to be sent.
            headers: Besides Host and Content-Length.
            body: The body.
            silence: Seconds without a byte after which the call is given up; None waits for ever.
            limit: The most bytes of a body that are taken.

        Raises:
            NoAnswerError: There was no answer; `SilentError` if it took too long.
            TooLargeError: The answer's body is larger than `limit`.
        """
        exchange = _Exchange(self._connection(), self._connect_timeout, silence, limit)
        run = partial(exchange.run, method, path, headers, body)
        try:
            answer = await anyio.to_thread.run_sync(run, abandon_on_cancel=True, limiter=self._threads)
        except BaseException:
            exchange.abort()
            raise
        if exchange.reusable and len(self._idle) < _KEPT and not self._closed:
            self._idle.append((time.monotonic(), exchange.connection))
        else:
            exchange.connection.close()
        return answer

    def close(self) -> None:
        """Close all connections: those of calls under way when they end."""
        self._closed = True
        while self._idle:
            self._idle.pop()[1].close()

    def _connection(self) -> http.client.HTTPConnection:
        while self._idle:
            since, found = self._idle.pop()
            fresh = time.monotonic() - since < _IDLE_SECONDS
            if fresh and found.sock is not None and not _is_readable(found.sock):
                return found
            found.close()  # what comes unasked on an idle connection is its end
        if self._tls is not None:
            return _TlsConnection(self.host, self.port, timeout=self._connect_timeout, context=self._tls)
        return _Connection(self.host, self.port, timeout=self._connect_timeout)


class _Exchange:
    """One request and its answer, in a thread; `abort` may be called from another."""

    def __init__(
        self, connection: http.client.HTTPConnection, connect_timeout: float, silence: float | None, limit: int
    ) -> None:
        self.connection = connection
        self.reusable = False
        self._connect_timeout = connect_timeout
        self._silence = silence
        self._limit = limit
        self._lock = threading.Lock()
        self._aborted = False

    def run(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        sent = False
        try:
            self._connect()
            self.connection.putrequest(method, path, skip_accept_encoding=True)
            for name, value in headers.items():
                self.connection.putheader(name, value)
            if body or method not in ("GET", "HEAD"):
                self.connection.putheader("Content-Length", str(len(body)))
            sent = True
            self.connection.endheaders(body or None)
            answer = self._read()
        except TooLargeError:
            self.connection.close()
            raise
        except TimeoutError:
            self.connection.close()
            if not sent:
                raise NoAnswerError(f"no connection in {self._connect_timeout:g} s", sent=False) from None
            raise SilentError(f"nothing came for {self._silence:g} s", sent=True) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.connection.close()
            raise NoAnswerError(_words(error, sent), sent=sent) from None
        if self._aborted:  # nobody waits for it, or for its connection
            self.connection.close()
        return answer

    def _connect(self) -> None:
        if self.connection.sock is None:
            self.connection.connect()  # without Nagle's delay: http.client sees to that
        with self._lock:
            if self._aborted:
                self.connection.close()
                raise ConnectionAbortedError("the call was given up")
        self.connection.sock.settimeout(self._silence)

    def _read(self) -> Answer:
        response = self.connection.getresponse()
        with response:
            body = bytearray()
            bodiless = response.status in _BODILESS
            while not bodiless and (chunk := response.read(min(_CHUNK, self._limit + 1 - len(body)))):
                body += chunk
                if len(body) > self._limit:
                    raise TooLargeError(response.status, self._limit)
            if response.length:  # the connection ended before the body that was announced
                raise http.client.IncompleteRead(bytes(body), response.length)
            odd = bodiless and (response.chunked or response.headers.get("Content-Length", "0") != "0")
            self.reusable = not response.will_close and not odd
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, bytes(body))

    def abort(self) -> None:
        """Wake the thread up, if it still waits; it closes the connection, and nobody else may while it uses it."""
        with self._lock:
            self._aborted = True
            sock: socket.socket | None = self.connection.sock
        if sock is not None:
            with suppress(OSError):  # it is closed already
                socket.socket.shutdown(sock, socket.SHUT_RDWR)  # of TLS it would take the session from the thread


class _Response(http.client.HTTPResponse):
    """Passes over every interim answer (1xx): the standard library does so only with 100."""

    def _read_status(self) -> tuple[str, int, str]:
        version, status, reason = super()._read_status()  # type: ignore[misc]
        return version, http.client.CONTINUE if 100 <= status < 200 else status, reason


class _Connection(http.client.HTTPConnection):
    response_class = _Response


class _TlsConnection(http.client.HTTPSConnection):
    response_class = _Response


def _words(error: Exception, sent: bool) -> str:
    if isinstance(error, http.client.IncompleteRead):
        return f"the answer ended {error.expected or 'some'} bytes early"
    if isinstance(error, http.client.RemoteDisconnected | ConnectionResetError | BrokenPipeError):
        return "the connection was closed before the answer"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not trusted: {error.verify_message} (SSL_CERT_FILE names whom to trust)"
    if isinstance(error, ssl.SSLError):
        return f"it speaks no TLS that we understand ({error.reason or type(error).__name__})"
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return f"the {'answer is not' if sent else 'request can not be sent as'} HTTP ({type(error).__name__})"


def _is_readable(sock: socket.socket) -> bool:
    poll = select.poll()
    try:
        poll.register(sock, select.POLLIN)
    except (OSError, ValueError):
        return True
    return bool(poll.poll(0))
