"""A queue service that does what a test scripted: for what the real rules of `heeler.local` never do.

Each call takes the next entry of its script; when there is none left it does the last thing again.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anyio
import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from heeler.wire.salad_queue import SERVICE, messages

HANG = "hang"
"""Never answer."""
HEARTBEAT = messages.AcceptJobsResponse(heartbeat=Empty())
UNKNOWN_MESSAGE = messages.AcceptJobsResponse()

Step = Any
"""Of a stream: a message, seconds to wait, `HANG`, an event to wait for, a status to end with. Of a call: likewise."""


def job(job_id: str, body: bytes = b"input", *, port: int = 8080, path: str = "/run") -> messages.AcceptJobsResponse:
    return messages.AcceptJobsResponse(job=messages.Job(job_id=job_id, port=port, path=path, input=body))


@dataclass(frozen=True)
class Got:
    """A call as it came.

    Attributes:
        method: Which.
        job_id: What it names.
        token: What stood behind Bearer.
        time: When (monotonic).
        open: How many streams were open.
        output: Of `CompleteJob`.
    """

    method: str
    job_id: str
    token: str
    time: float
    open: int
    output: bytes = field(default=b"", repr=False)


class ScriptedQueue:
    """The service.

    Attributes:
        streams: What each `AcceptJobs` does.
        answers: What each call of a name is answered with; OK if there is no script for it.
        details: What stands beside statuses.
        calls: What it got.
        open: How many streams are open.
    """

    def __init__(self, *streams: Sequence[Step], **answers: Sequence[Step]) -> None:
        self.streams = [list(steps) for steps in streams] or [[HANG]]
        self.answers = {name: list(steps) for name, steps in answers.items()}
        self.details = "as scripted"
        self.calls: list[Got] = []
        self.open = 0
        self.endpoint = ""

    def got(self, method: str) -> list[Got]:
        return [call for call in self.calls if call.method == method]

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[ScriptedQueue]:
        server = grpc.aio.server(options=(("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)))
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, self._handlers()),))
        self.endpoint = f"127.0.0.1:{server.add_insecure_port(self.endpoint or '127.0.0.1:0')}"
        await server.start()
        try:
            yield self
        finally:
            with anyio.CancelScope(shield=True):
                await server.stop(None)

    def _handlers(self) -> dict[str, Any]:
        parse: dict[str, Any] = {"CompleteJob": messages.CompleteJobRequest, "RejectJob": messages.RejectJobRequest}
        handlers: dict[str, Any] = {
            name: grpc.unary_unary_rpc_method_handler(
                self._unary(name), request_deserializer=kind.FromString, response_serializer=Empty.SerializeToString
            )
            for name, kind in parse.items()
        }
        handlers["AcceptJobs"] = grpc.unary_stream_rpc_method_handler(
            self._accept,
            request_deserializer=messages.AcceptJobsRequest.FromString,
            response_serializer=messages.AcceptJobsResponse.SerializeToString,
        )
        return handlers

    async def _accept(self, request: messages.AcceptJobsRequest, context: Any) -> None:
        self._note("AcceptJobs", request.current_job_id, context)
        self.open += 1
        try:
            for step in self.streams.pop(0) if len(self.streams) > 1 else self.streams[0]:
                if isinstance(step, messages.AcceptJobsResponse):
                    await context.write(step)
                else:
                    await self._do(step, context)
        finally:
            self.open -= 1

    def _unary(self, name: str) -> Any:
        async def handle(request: Any, context: Any) -> Empty:
            self._note(name, request.job_id, context, getattr(request, "output", b""))
            steps = self.answers.get(name, [])
            if steps:
                await self._do(steps.pop(0) if len(steps) > 1 else steps[0], context)
            return Empty()

        return handle

    def _note(self, name: str, job_id: str, context: Any, output: bytes = b"") -> None:
        token = dict(context.invocation_metadata())["authorization"].removeprefix("Bearer ")
        self.calls.append(Got(name, job_id, token, time.monotonic(), self.open, output))

    async def _do(self, step: Step, context: Any) -> None:
        if isinstance(step, grpc.StatusCode):
            await context.abort(step, self.details)
        elif isinstance(step, float):
            await anyio.sleep(step)
        elif isinstance(step, anyio.Event):
            await step.wait()
        elif step is HANG:
            await anyio.sleep_forever()


class StubMachine:
    """A machine whose answers a test sets.

    Attributes:
        is_ready: What `ready` says; an exception is raised.
        tokens: What `token` gives, one after another for each fresh one; an exception is raised.
        asked: When `ready` was asked (monotonic).
    """

    def __init__(self, *tokens: str | Exception) -> None:
        self.is_ready: bool | Exception = True
        self.tokens = list(tokens) or ["token-1"]
        self.asked: list[float] = []

    async def ready(self) -> bool:
        self.asked.append(time.monotonic())
        await anyio.lowlevel.checkpoint()
        if isinstance(self.is_ready, Exception):
            raise self.is_ready
        return self.is_ready

    async def token(self, *, fresh: bool = False) -> str:
        await anyio.lowlevel.checkpoint()
        if fresh and len(self.tokens) > 1:
            self.tokens.pop(0)
        if isinstance(self.tokens[0], Exception):
            raise self.tokens[0]
        return self.tokens[0]
