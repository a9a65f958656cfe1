"""HTTP servers on loopback in the caller's event loop, and errors as problem details (RFC 7807)."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from http import HTTPStatus
from typing import Any

import anyio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from heeler.errors import UnavailableError
from heeler.tasks import background


class _Server(uvicorn.Server):
    """A uvicorn server that says when it serves, and leaves the signals to us."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = anyio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.up.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Problem(Exception):  # noqa: N818 - the name that RFC 7807 gives it
    """Ends a request with problem details."""

    def __init__(self, status: int, detail: str) -> None:
        self.status = status
        self.detail = detail
        super().__init__(detail)


def listen(port: int) -> socket.socket:
    """A listening socket on loopback; port 0 takes a free one.

    Raises:
        UnavailableError: The port is taken.
    """
    # With the protocol named, or asyncio leaves Nagle's delay on.
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UnavailableError(f"can't listen on 127.0.0.1:{port}: {error.strerror}") from None
    return listener


@asynccontextmanager
async def serving(app: Callable[..., Awaitable[None]], port: int = 0) -> AsyncIterator[str]:
    """Serve an ASGI app while the block runs.

    Yields:
        Its URL, without a slash at the end.

    Raises:
        UnavailableError: The port is taken.
    """
    listener = listen(port)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = _Server(config)

    async def serve() -> None:
        try:
            await server.serve(sockets=[listener])
        finally:
            server.should_exit = True
            with anyio.CancelScope(shield=True), anyio.move_on_after(2):
                await server.shutdown(sockets=[listener])
            listener.close()

    async with background(serve):
        await server.up.wait()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def problem(status: int, detail: str) -> Response:
    """An answer with problem details."""
    content: dict[str, Any] = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
    }
    return JSONResponse(content, status, media_type="application/problem+json")


def new_app() -> FastAPI:
    """A FastAPI app whose every error is problem details."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)

    @app.exception_handler(Problem)
    async def of_ours(_request: Request, error: Problem) -> Response:
        return problem(error.status, error.detail)

    @app.exception_handler(HTTPException)
    async def of_routes(_request: Request, error: HTTPException) -> Response:
        return problem(error.status_code, str(error.detail))

    @app.exception_handler(RequestValidationError)
    async def of_bodies(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return problem(400, f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}")

    return app
