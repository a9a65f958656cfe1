"""The control API's routes: what a runtime tells about itself, and what it can be told (checkpoint, drain).

Only a loopback name, or the address that it listens on, in the Host header is answered, so that a web page in
somebody's browser can't talk to it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from heeler.checkpoints import Checkpoints, NoJobError
from heeler.control.metrics import render
from heeler.drain import Drain
from heeler.status import Phase, Status
from heeler_sync.errors import NotNowError, SyncError

_LOOPBACK_NAMES = {"127.0.0.1", "localhost", "::1"}


def create_app(
    status: Status, drain: Drain, checkpoints: Checkpoints, available: Callable[[], bool], *, address: str
) -> FastAPI:
    """The API of one runtime that listens on `address`; `available` says whether the program could take a job."""
    names = _LOOPBACK_NAMES | {address}
    app = FastAPI(title="heeler", openapi_url=None, docs_url=None, redoc_url=None)

    @app.middleware("http")
    async def refuse_other_hosts(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.hostname not in names or "origin" in request.headers:
            return PlainTextResponse("this API answers programs on this machine only\n", 403)
        return await answer(request)

    @app.get("/healthz")
    async def healthz() -> Response:
        """200 while the runtime lives."""
        return PlainTextResponse("ok\n")

    @app.get("/readyz")
    async def readyz() -> Response:
        """200 while the runtime takes jobs, 503 before, while the app is not ready, and while it drains."""
        ready = not drain.requested.is_set() and status.phase not in (Phase.START, Phase.END) and available()
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    @app.get("/v1/status")
    async def show() -> Any:
        """All that the runtime knows of itself."""
        return status.snapshot()

    @app.get("/metrics")
    async def metrics() -> Response:
        """Prometheus' text format."""
        return Response(render(status), media_type="text/plain; version=0.0.4")

    @app.post("/v1/checkpoint")
    async def take_checkpoint() -> Response:
        """Make the running job's checkpoints durable as they are now, and answer when they are."""
        try:
            found = await checkpoints.take()
        except (NoJobError, NotNowError) as error:
            return JSONResponse({"error": str(error)}, 409)
        except SyncError as error:
            return JSONResponse({"error": status.clean(str(error))}, 503)
        return JSONResponse({"generations": [asdict(generation) for generation in found]})

    @app.post("/v1/drain")
    async def begin_drain() -> Response:
        """As SIGTERM: stop taking jobs, stop the program, flush, hand the job back, exit."""
        first = drain.begin("asked by the control API")
        return JSONResponse({"draining": True, "first": first}, 202)

    return app
