"""Faults of the local Kelpie API on command, and the calls that it got."""

from __future__ import annotations

import enum
import re
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Literal, TypeAlias, cast

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from heeler.local.kelpie_answers import refusal

Kind: TypeAlias = Literal[
    "create", "batch", "get", "list", "work", "heartbeat", "completed", "failed", "cancel", "purge"
]
"""A call of the API, by the name of the table's method."""
_KEPT = 100_000
_PATHS: dict[tuple[str, str], Kind] = {
    ("POST", "/jobs"): "create",
    ("POST", "/jobs/batch"): "batch",
    ("GET", "/jobs"): "list",
    ("GET", "/work"): "work",
}
_JOB_PATHS: dict[tuple[str, str], Kind] = {
    ("GET", ""): "get",
    ("DELETE", ""): "cancel",
    ("POST", "/heartbeat"): "heartbeat",
    ("POST", "/completed"): "completed",
    ("POST", "/failed"): "failed",
}
_JOB_PATH = re.compile(r"/jobs/([^/]+)(/[a-z]+)?")
_PURGE_PATH = re.compile(r"/jobs/container-groups/([^/]+)")


class Fault(enum.Enum):
    """How a call fails."""

    ERROR = "it is answered with an error status, and not done"
    DROP = "the connection is lost before it is done"
    LOSE = "it is done, and the connection lost before the answer"
    HANG = "it is not done, and there is no answer until the client goes"


@dataclass(frozen=True)
class Call:
    """A call that the API got.

    Attributes:
        time: When (monotonic).
        kind: Which.
        subject: The job, or the container group of a purge, that its path names; or nothing.
    """

    time: float
    kind: Kind
    subject: str


@dataclass
class _Order:
    fault: Fault
    left: float
    status: int


class KelpieFaults:
    """What to do to the next calls. Any thread may call it.

    Attributes:
        calls: How many calls of each kind there were, whatever became of them.
        log: The last calls.
        down: Every connection is lost as soon as something is asked.
    """

    def __init__(self) -> None:
        self.calls: Counter[Kind] = Counter()
        self.log: deque[Call] = deque(maxlen=_KEPT)
        self.down = False
        self._lock = threading.Lock()
        self._orders: dict[Kind, _Order] = {}

    def fail(self, kind: Kind, fault: Fault, times: float = 1, *, status: int = 500) -> None:
        """Fail the next calls of a kind, instead of what was ordered before.

        Args:
            kind: Which calls.
            fault: How.
            times: How many; infinity until `clear`.
            status: That of `Fault.ERROR`.
        """
        with self._lock:
            self._orders[kind] = _Order(fault, times, status)

    def clear(self) -> None:
        """Serve as usual again. A call that hangs stays as it is."""
        with self._lock:
            self._orders.clear()
            self.down = False

    def take(self, kind: Kind, subject: str) -> tuple[Fault, int] | None:
        """Note a call; the fault that is meant for it, and the status."""
        with self._lock:
            self.calls[kind] += 1
            self.log.append(Call(time.monotonic(), kind, subject))
            if self.down:
                return Fault.DROP, 0
            order = self._orders.get(kind)
            if order is None or order.left < 1:
                return None
            order.left -= 1
            return order.fault, order.status


def kind_of(method: str, path: str) -> tuple[Kind, str] | None:
    """Which call that is, and the job or container group in its path."""
    if kind := _PATHS.get((method, path)):
        return kind, ""
    if method == "DELETE" and (found := _PURGE_PATH.fullmatch(path)):
        return "purge", found[1]
    if (found := _JOB_PATH.fullmatch(path)) and (kind := _JOB_PATHS.get((method, found[2] or ""))):
        return kind, found[1]
    return None


class FaultyApp:
    """Middleware that does what `KelpieFaults` says. Connections can be lost on uvicorn only."""

    def __init__(self, app: ASGIApp, faults: KelpieFaults) -> None:
        self._app = app
        self._faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        fault = self._fault(scope)
        if fault is None:
            await self._app(scope, receive, send)
        elif fault[0] is Fault.ERROR:
            phrase = HTTPStatus(fault[1]).phrase
            await refusal(fault[1], phrase, "the API fails, as it was told to")(scope, receive, send)
        else:
            if fault[0] is Fault.LOSE:
                await self._app(scope, receive, _nowhere)
            if fault[0] is not Fault.HANG:
                _cut(receive)
            await _gone(receive)

    def _fault(self, scope: Scope) -> tuple[Fault, int] | None:
        if scope["type"] != "http":
            return None
        call = kind_of(scope["method"], scope["path"])
        if call is None:
            return (Fault.DROP, 0) if self._faults.down else None
        return self._faults.take(*call)


async def _nowhere(_message: Message) -> None:
    pass


def _cut(receive: Receive) -> None:
    """Close the connection without an answer. ASGI has no word for it, but uvicorn's `receive` knows its transport."""
    cycle = cast("Any", receive).__self__
    cycle.transport.abort()


async def _gone(receive: Receive) -> None:
    """Wait until the connection is closed, or uvicorn would answer for us."""
    while (await receive())["type"] != "http.disconnect":
        pass
