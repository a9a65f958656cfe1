"""Serving one request under fault rules, and sending an answer piece by piece."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .body import Body
from .errors import DEFAULT_CODES, S3Error
from .faults import Answer, Corrupt, Cut, Delay, FaultRule, Plan, Stage, Stall, Truncate
from .intake import Intake
from .messages import Request, Response, error_response

if TYPE_CHECKING:
    from .app import Application
    from .protocol import Connection

_TICK = 0.02
"""Seconds between two pieces on a slow link."""


class _CutNow(Exception):  # noqa: N818 - a jump, no error
    """A rule cuts the connection here."""

    def __init__(self, *, reset: bool) -> None:
        self.reset = reset


async def deliver(connection: Connection, app: Application, request: Request, intake: Intake, plan: Plan) -> None:
    """Serve a request that fault rules act on."""
    try:
        response = await _stage(plan, "before", request)
        if response is None:
            response = app.handle(request, intake)
            response = await _stage(plan, "after", request) or response
    except _CutNow as cut:
        app.record(request, None, bytes_out=0)
        connection.drop(reset=cut.reset)
        return
    await send(connection, app, request, response, plan)


async def _stage(plan: Plan, stage: Stage, request: Request) -> Response | None:
    """Do what the rules want before or after the effect; the answer that one of them gives, if any."""
    for rule in plan.at(stage):
        action = rule.action
        if isinstance(action, Delay):
            await asyncio.sleep(action.seconds)
        elif isinstance(action, Stall):
            await rule.hold(action.seconds)
        elif isinstance(action, Cut):
            raise _CutNow(reset=action.reset)
        elif isinstance(action, Answer):
            return _answer(action, request)
    return None


def _answer(action: Answer, request: Request) -> Response:
    code = action.code or DEFAULT_CODES.get(action.status, "InternalError")
    headers = {} if action.retry_after is None else {"Retry-After": str(action.retry_after)}
    error = S3Error(code, action.message, status=action.status, headers=headers)
    response = error_response(error, request)
    response.send_body = request.method != "HEAD"
    return response


async def send(
    connection: Connection, app: Application, request: Request, response: Response, plan: Plan | None
) -> None:
    """Send an answer piece by piece, doing to its body what the rules want."""
    if plan is not None:
        _change(response, plan)
    response.close = response.close or not request.keep_alive
    record = app.record(request, response, bytes_out=0)
    rate = plan.rate("down") if plan is not None else None
    marks = _marks(response, plan) if plan is not None else []
    sent = 0
    await connection.write(response.head())

    async def out(view: memoryview) -> None:
        nonlocal sent
        step = max(1, int(rate * _TICK)) if rate else max(1, len(view))
        for start in range(0, len(view), step):
            piece = view[start : start + step]
            if record is not None:
                app.stats.sent(record, len(piece))
            await connection.write(piece)
            sent += len(piece)
            if rate:
                await asyncio.sleep(len(piece) / rate)

    try:
        for whole in response.pieces():
            view = whole
            while marks and sent + len(view) > marks[0][0]:
                position, rule = marks.pop(0)
                ahead = position - sent
                await out(view[:ahead])
                view = view[ahead:]
                await _at_mark(rule)
            await out(view)
    except _CutNow as cut:
        await connection.flush()
        connection.drop(reset=cut.reset)
        return
    if response.close:
        connection.drop(reset=False)


def _marks(response: Response, plan: Plan) -> list[tuple[int, FaultRule]]:
    """Where in the body a rule stalls or cuts, in order."""
    marks = []
    for rule in plan.at("response_body"):
        if isinstance(rule.action, (Cut, Stall)):
            marks.append((rule.action.after_bytes, rule))
    for rule in plan.of(Truncate):
        if isinstance(rule.action, Truncate) and not rule.action.hidden:
            marks.append((rule.action.after_bytes, rule))
    return sorted((mark for mark in marks if mark[0] < response.body_length), key=lambda mark: mark[0])


async def _at_mark(rule: FaultRule) -> None:
    action = rule.action
    if isinstance(action, Stall):
        await rule.hold(action.seconds)
    elif isinstance(action, Cut):
        raise _CutNow(reset=action.reset)
    elif isinstance(action, Truncate):
        raise _CutNow(reset=False)


def _change(response: Response, plan: Plan) -> None:
    """Shorten or corrupt the body, as the rules want."""
    for rule in (*plan.of(Truncate), *plan.of(Corrupt)):
        action = rule.action
        if isinstance(action, Truncate) and action.hidden:
            response.length = min(response.length, action.after_bytes)
        elif isinstance(action, Corrupt) and response.length:
            offset = action.offset % response.length
            changed = Body(response.body.slices(response.start, response.start + offset))
            at = response.start + offset
            changed.append(bytes(byte ^ 0xFF for byte in bytes(next(response.body.slices(at, at + 1)))))
            for view in response.body.slices(at + 1, response.start + response.length):
                changed.append(view)
            response.body, response.start, response.length = changed, 0, changed.size
