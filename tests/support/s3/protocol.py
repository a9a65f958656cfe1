"""One HTTP/1.1 connection: reads requests with httptools, paces them, hands them on when whole."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any

import httptools

from ..sockets import abort, flush
from .delivery import deliver, send
from .errors import S3Error
from .faults import Cut, FaultRule, Plan, Stall
from .intake import Intake
from .messages import Request, error_response

if TYPE_CHECKING:
    from .app import Application

SMALL = 256 << 10
"""Bytes of a response's body up to which it is written at once."""
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class Connection(asyncio.Protocol):
    """One client's connection. Answers go out in the order of the requests."""

    def __init__(self, app: Application, open_connections: set[Connection]) -> None:
        """Not connected yet; it is among the open connections while it is."""
        self._app = app
        self._open = open_connections
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport
        self._url = b""
        self._headers: dict[str, str] = {}
        self._in_headers = True
        # The request whose body is coming, and what is to be done to it.
        self._request: Request | None = None
        self._intake: Intake
        self._plan: Plan | None = None
        self._body_faults: list[FaultRule] = []
        self._up_rate: float | None = None
        self._pacing = 0.0
        # Requests that have come whole, and the task that serves one; small ones need none.
        self._ready: deque[tuple[Request, Intake, Plan | None]] = deque()
        self._task: asyncio.Task[None] | None = None
        self._holds: set[asyncio.Task[None]] = set()
        self._writable: asyncio.Future[None] | None = None
        self._closed = False
        self.lost = asyncio.Event()

    # What asyncio calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._open.add(self)
        self._app.stats.connected()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count what was under way as not answered, and stop it."""
        self._closed = True
        self._open.discard(self)
        self.lost.set()
        for task in (*self._holds, self._task):
            if task is not None:
                task.cancel()
        self.resume_writing()
        unanswered = [request for request, _, _ in self._ready]
        if self._request is not None:
            unanswered.append(self._request)
        for request in unanswered:
            self._app.record(request, None, bytes_out=0)
        self._ready.clear()
        self._request = None

    def pause_writing(self) -> None:
        """The socket takes no more."""
        self._writable = self._loop.create_future()

    def resume_writing(self) -> None:
        """It does again."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)
        self._writable = None

    def data_received(self, data: bytes) -> None:
        """Parse what came, pace it, and serve what is whole."""
        if self._closed:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if not self._closed:
                self._refuse(error.__context__)
            return
        if self._pacing:
            seconds, self._pacing = self._pacing, 0.0
            self._hold(asyncio.sleep(seconds))
        self._next()

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = b""
        self._headers = {}
        self._in_headers = True

    def on_url(self, url: bytes) -> None:
        """Its target, maybe in pieces."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header (or one of HTTP's own trailers, which nobody here uses)."""
        if self._in_headers:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """It is known what the request wants: choose its faults, and say 100 Continue."""
        self._in_headers = False
        app = self._app
        request = Request(self._parser.get_method().decode(), self._url.decode("latin-1"), self._headers)
        plan = app.faults.plan(request) if request.operation != "Control" else None
        self._request, self._intake, self._plan = request, Intake(request, app.rules), plan
        self._body_faults = plan.at("request_body") if plan is not None else []
        self._up_rate = plan.rate("up") if plan is not None else None
        if "expect" in self._headers and app.rules.answer_continue:
            self._transport.write(_CONTINUE)

    def on_body(self, data: bytes) -> None:
        """Some of the body."""
        if self._closed or self._request is None:
            return
        self._intake.take(data)
        if self._up_rate is not None:
            self._pacing += len(data) / self._up_rate
        for rule in list(self._body_faults):
            action = rule.action
            if isinstance(action, (Cut, Stall)) and self._request.bytes_in > action.after_bytes:
                self._body_faults.remove(rule)
                if isinstance(action, Cut):
                    self.drop(reset=action.reset)
                    return
                self._hold(rule.hold(action.seconds))

    def on_message_complete(self) -> None:
        """The request is whole; `data_received` serves it."""
        if self._closed or self._request is None:
            return
        self._request.keep_alive = self._parser.should_keep_alive()
        self._ready.append((self._request, self._intake, self._plan))
        self._request = None

    # Serving.

    def _next(self) -> None:
        """Serve the next whole request, if nothing holds it."""
        while self._ready and self._task is None and not self._holds and not self._closed:
            request, intake, plan = self._ready.popleft()
            if plan is not None:
                self._serve(request, deliver(self, self._app, request, intake, plan))
                continue
            response = self._app.handle(request, intake)
            if response.body_length > SMALL or self._writable is not None:
                self._serve(request, send(self, self._app, request, response, None))
                continue
            response.close = not request.keep_alive
            self._app.record(request, response, bytes_out=response.body_length)
            self._transport.write(b"".join((response.head(), *response.pieces())))
            if response.close:
                self.drop(reset=False)

    def _serve(self, request: Request, work: Coroutine[Any, Any, None]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(partial(self._served, request))

    def _served(self, request: Request, task: asyncio.Task[None]) -> None:
        self._task = None
        if not request.recorded:
            self._app.record(request, None, bytes_out=0)
        if not task.cancelled() and task.exception() is not None:
            self._app.internal_errors.append(task.exception() or RuntimeError())
            self.drop(reset=True)
        self._next()

    def _hold(self, wait: Coroutine[Any, Any, None]) -> None:
        """Read nothing and serve nothing until a wait is over."""
        if not self._holds and not self._transport.is_closing():
            self._transport.pause_reading()
        task = self._loop.create_task(wait)
        self._holds.add(task)
        task.add_done_callback(self._held)

    def _held(self, task: asyncio.Task[None]) -> None:
        self._holds.discard(task)
        if not self._holds and not self._closed:
            self._transport.resume_reading()
            self._next()

    def _refuse(self, cause: BaseException | None) -> None:
        """Answer what is no request of HTTP or of S3, and close."""
        if cause is not None and not isinstance(cause, S3Error):
            self._app.internal_errors.append(cause)
        response = error_response(cause if isinstance(cause, S3Error) else S3Error("BadRequest"), None)
        response.close = True
        self._transport.write(b"".join((response.head(), *response.pieces())))
        self.drop(reset=False)

    # What the delivery of an answer uses.

    async def write(self, data: bytes | memoryview) -> None:
        """Hand bytes to the socket, and wait until it takes more."""
        self._transport.write(data)
        if self._writable is not None:
            await self._writable

    async def flush(self) -> None:
        """Wait until the client's kernel has all that was written."""
        await flush(self._transport)

    def drop(self, *, reset: bool) -> None:
        """End the connection: by a reset, or in order after what was written."""
        self._closed = True
        if reset:
            abort(self._transport)
        else:
            self._transport.close()
