"""The metadata service of one local machine (PROTOCOLS.md 2), and what a test may do to it.

Statuses are those of Salad's published description of it: 403 without `Metadata: true`, 400 for a body that is wrong.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field

from heeler.local.tokens import Identity, TokenIssuer
from heeler.local.web import new_app, problem

_KEPT = 10_000


class DeletionCost(BaseModel):
    """What deleting this instance would cost; the instance with the lowest goes first."""

    deletion_cost: Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)]


class Reallocation(BaseModel):
    """Why another machine is wanted."""

    reason: Annotated[str, Field(strict=True, min_length=1, max_length=1000)]


@dataclass(frozen=True)
class Call:
    """One request that the service got.

    Attributes:
        time: When (monotonic).
        method: The method.
        path: The path.
        status: What it was answered with.
    """

    time: float
    method: str
    path: str
    status: int


@dataclass
class ImdsState:
    """What the service knows, and how it behaves. Its fields may be set by any thread, at any time.

    Attributes:
        identity: Whom its tokens speak for.
        tokens: Who issues them.
        ready: What `/v1/status` says.
        started: What `/v1/status` says.
        token_lifetime: Seconds.
        gone: The instance does not exist any more: every call is answered with 404.
        deletion_cost: The current one.
        deletion_costs: Each that was put, with its time (monotonic).
        reallocations: Each reason given, with its time.
        recreations: When a recreation was asked for.
        restarts: When a restart was asked for.
        calls: The last requests.
    """

    identity: Identity
    tokens: TokenIssuer
    ready: bool = True
    started: bool = True
    token_lifetime: float = 3600.0
    gone: bool = False
    deletion_cost: int = 0
    deletion_costs: list[tuple[float, int]] = field(default_factory=list)
    reallocations: list[tuple[float, str]] = field(default_factory=list)
    recreations: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    calls: deque[Call] = field(default_factory=lambda: deque(maxlen=_KEPT))

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._fault: tuple[int, float] = (0, 0)

    def fail(self, status: int, times: float = float("inf")) -> None:
        """Answer the next calls, all by default, with this status."""
        with self._lock:
            self._fault = (status, times)

    def heal(self) -> None:
        """Answer as usual again."""
        self.fail(0, 0)

    def fault(self) -> int:
        """Take the status that this call is to fail with; 0 if it may pass."""
        with self._lock:
            status, times = self._fault
            if times < 1:
                return 0
            self._fault = (status, times - 1)
            return status


def create_app(state: ImdsState) -> FastAPI:
    """The service of one machine."""
    app = new_app()

    @app.middleware("http")
    async def guard(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
        refused = _refused(state, request)
        response = refused if refused is not None else await handle(request)
        state.calls.append(Call(time.monotonic(), request.method, request.url.path, response.status_code))
        return response

    @app.get("/v1/status")
    async def status() -> dict[str, bool]:
        return {"ready": state.ready, "started": state.started}

    @app.get("/v1/token")
    async def token() -> dict[str, str]:
        return {"jwt": state.tokens.issue(state.identity, state.token_lifetime)}

    @app.get("/v1/deletion-cost")
    async def deletion_cost() -> DeletionCost:
        return DeletionCost(deletion_cost=state.deletion_cost)

    @app.put("/v1/deletion-cost")
    async def replace_deletion_cost(body: DeletionCost) -> DeletionCost:
        state.deletion_cost = body.deletion_cost
        state.deletion_costs.append((time.monotonic(), body.deletion_cost))
        return body

    @app.post("/v1/reallocate")
    async def reallocate(body: Reallocation) -> Response:
        state.reallocations.append((time.monotonic(), body.reason))
        return Response(status_code=204)

    @app.post("/v1/recreate")
    async def recreate() -> Response:
        state.recreations.append(time.monotonic())
        return Response(status_code=204)

    @app.post("/v1/restart")
    async def restart() -> Response:
        state.restarts.append(time.monotonic())
        return Response(status_code=204)

    return app


def _refused(state: ImdsState, request: Request) -> Response | None:
    if status := state.fault():
        return problem(status, "the metadata service fails, as it was told to")
    if request.headers.get("metadata") != "true":
        return problem(403, "the request has no header Metadata: true")
    if state.gone:
        return problem(404, "the container instance could not be found")
    return None
