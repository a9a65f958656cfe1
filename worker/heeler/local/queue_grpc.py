"""The Salad Job Queue's service for workers (PROTOCOLS.md 1) on gRPC: a strict server of `QueueState`.

A stream sends nothing but jobs and heartbeats; its first message may be one of either, so a client must not wait for
headers. What Salad does not document: a stream whose job is cancelled ends with CANCELLED.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import grpc
import grpc.aio
from google.protobuf.empty_pb2 import Empty

from heeler.local.processes import free_port
from heeler.local.queue_faults import Faults
from heeler.local.queue_model import End, Machine, NotFoundError, NotHeldError, Stream
from heeler.local.queue_state import QueueState
from heeler.local.tokens import ExpiredTokenError, ForeignTokenError, TokenIssuer
from heeler.tasks import background
from heeler.wire.salad_queue import MESSAGE_BYTES, SERVICE, messages

_Apply = Callable[[Machine, str], None]
_Context = grpc.aio.ServicerContext[Any, Any]

_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),
)
_STATUS = {
    End.REPLACED: grpc.StatusCode.ABORTED,
    End.CANCELLED: grpc.StatusCode.CANCELLED,
    End.DROPPED: grpc.StatusCode.UNAVAILABLE,
    End.GONE: grpc.StatusCode.PERMISSION_DENIED,
}
"""How a stream ends that the service ends; the others end with OK."""


class QueueServer:
    """The service on a loopback port. It can be stopped and started again with the same state and port.

    Attributes:
        port: The port, once it serves.
        faults: What to do to the next calls.
    """

    def __init__(self, state: QueueState, tokens: TokenIssuer, *, port: int = 0, heartbeat: float = 10.0) -> None:
        """Args: the rules; who verifies tokens; the port, 0 for a free one; seconds between two heartbeats."""
        self.port = port
        self.faults = Faults()
        self._state = state
        self._tokens = tokens
        self._heartbeat = heartbeat
        self._lost = asyncio.Event()

    @property
    def endpoint(self) -> str:
        """Where it listens, as SALAD_SERVICE_ENDPOINT wants it."""
        return f"127.0.0.1:{self.port}"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Serve while the block runs; at its end every call is cut off.

        Raises:
            UnavailableError: The port is taken.
        """
        self.port = free_port(self.port)  # gRPC itself would fail with lines of its own
        server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._handlers(),))
        server.add_insecure_port(self.endpoint)
        self._state.resume()
        await server.start()
        try:
            async with background(self._lapse):
                yield
        finally:
            with anyio.CancelScope(shield=True):
                await server.stop(None)

    def drop_streams(self, why: End = End.DROPPED) -> None:
        """End every open stream, as a load balancer does; the service goes on."""
        for stream in list(self._state.streams.values()):
            self._state.end(stream, why)
        self._lost.set()

    def _handlers(self) -> grpc.GenericRpcHandler:
        accept = grpc.unary_stream_rpc_method_handler(
            self._accept,
            request_deserializer=messages.AcceptJobsRequest.FromString,
            response_serializer=messages.AcceptJobsResponse.SerializeToString,
        )
        complete = _unary(self._complete, messages.CompleteJobRequest.FromString)
        reject = _unary(self._reject, messages.RejectJobRequest.FromString)
        handlers = {"AcceptJobs": accept, "CompleteJob": complete, "RejectJob": reject}
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    async def _accept(self, request: messages.AcceptJobsRequest, context: _Context) -> None:
        if fault := self.faults.take("AcceptJobs", request.current_job_id):
            await context.abort(fault.code, "as it was told to")
        machine = await self._machine(context)
        woken = asyncio.Event()
        try:
            stream = self._state.open(machine, request.current_job_id, woken.set)
        except NotFoundError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        except NotHeldError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        try:
            if request.current_job_id:
                await context.write(messages.AcceptJobsResponse(heartbeat=Empty()))
            await self._send_jobs(stream, woken, context)
        finally:
            self._state.end(stream, End.DROPPED)
            self._lost.set()

    async def _send_jobs(self, stream: Stream, woken: asyncio.Event, context: _Context) -> None:
        while stream.end is None:
            if (job := stream.job) is not None:
                stream.job = None
                group = self._state.groups[stream.machine.workload_id]
                sent = messages.Job(job_id=job.id, port=group.port, path=group.path, input=job.input)
                await context.write(messages.AcceptJobsResponse(job=sent))
            with anyio.move_on_after(self._heartbeat):
                await woken.wait()
            if not woken.is_set():
                await context.write(messages.AcceptJobsResponse(heartbeat=Empty()))
            woken.clear()
        if stream.end in _STATUS:
            await context.abort(_STATUS[stream.end], stream.end.value)

    async def _complete(self, request: messages.CompleteJobRequest, context: _Context) -> Empty:
        apply = partial(self._state.complete, output=request.output)
        return await self._report("CompleteJob", apply, request.job_id, context)

    async def _reject(self, request: messages.RejectJobRequest, context: _Context) -> Empty:
        return await self._report("RejectJob", self._state.reject, request.job_id, context)

    async def _report(self, method: str, apply: _Apply, job_id: str, context: _Context) -> Empty:
        fault = self.faults.take(method, job_id)
        if fault and not fault.applied:
            await context.abort(fault.code, "as it was told to")
        machine = await self._machine(context)
        if not job_id:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call names no job")
        try:
            apply(machine, job_id)
        except NotHeldError as error:
            await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        if fault:
            await context.abort(fault.code, "its answer is lost, as it was told to")
        return Empty()

    async def _machine(self, context: _Context) -> Machine:
        """Whom the call's token speaks for."""
        given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
        kind, _, token = str(given[-1]).partition(" ") if given else ("", "", "")
        if kind.lower() != "bearer" or not token:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the call has no bearer token")
        try:
            identity = self._tokens.verify(token)
        except ExpiredTokenError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        except ForeignTokenError as error:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
        return Machine(identity.workload_id, identity.machine_id)

    async def _lapse(self) -> None:
        """Lose tries when their time has come."""
        while True:
            self._state.lapse()
            self._lost.clear()
            wait = self._state.until_lapse()
            with anyio.move_on_after(math.inf if wait is None else wait):
                await self._lost.wait()


def _unary(method: Callable[..., Awaitable[Empty]], parse: Callable[[bytes], Any]) -> Any:
    return grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=parse, response_serializer=Empty.SerializeToString
    )
