"""The Salad Job Queue's three calls (PROTOCOLS 1) on one gRPC channel, with this machine's token.

Nothing is tried again here, but for a token that was refused. No error shows the token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import anyio
import anyio.lowlevel

from heeler.sources.base import Machine, SourceUnavailableError
from heeler.wire.salad_queue import ACCEPT_JOBS, COMPLETE_JOB, MESSAGE_BYTES, REJECT_JOB, UNARY_SECONDS, messages


@contextmanager
def _silent() -> Iterator[None]:
    """GRPC's core asks the environment once, when it is loaded, whether to write to our standard error."""
    given = os.environ.get("GRPC_VERBOSITY")
    os.environ["GRPC_VERBOSITY"] = given or "NONE"
    yield
    if given is None:
        del os.environ["GRPC_VERBOSITY"]  # programs that we start inherit the environment


with _silent():
    import grpc
    import grpc.aio

Code = grpc.StatusCode

_ENVELOPE_BYTES = 1 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES + _ENVELOPE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES + _ENVELOPE_BYTES),
    # A service that is back is found within a second or so.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # in truth the time that one attempt to connect may take
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)
_TOKEN_REFUSED = (Code.UNAUTHENTICATED, Code.PERMISSION_DENIED)
_DEFINITE = {
    *_TOKEN_REFUSED,
    Code.NOT_FOUND,
    Code.INVALID_ARGUMENT,
    Code.RESOURCE_EXHAUSTED,
}
"""Answers which say that a call changed nothing."""


class CallFailedError(SourceUnavailableError):
    """A call had another answer than OK.

    Attributes:
        code: The status; OK for a stream that ended without one.
        connected: Whether the service itself answered, rather than that it could not be reached.
    """

    def __init__(self, call: str, code: grpc.StatusCode, words: str, *, connected: bool) -> None:
        self.code = code
        self.connected = connected
        super().__init__(f"the queue answered {call} with {code.name}{words and ': '}{words}")

    @property
    def token_refused(self) -> bool:
        """Whether another token may help."""
        return self.code in _TOKEN_REFUSED

    @property
    def unchanged(self) -> bool:
        """Whether the call certainly took no effect."""
        return self.code in _DEFINITE


class JobStream:
    """An open `AcceptJobs`. It is closed when its reading is cancelled, or by `close`."""

    def __init__(self, calls: QueueCalls, call: grpc.aio.UnaryStreamCall[Any, messages.AcceptJobsResponse], token: str):
        self._calls = calls
        self._call = call
        self._token = token

    async def next(self) -> messages.AcceptJobsResponse:
        """The next message.

        Raises:
            CallFailedError: The stream has ended.
        """
        try:
            message = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise self._calls.failure("AcceptJobs", error, self._token) from None
        except anyio.get_cancelled_exc_class():
            await _in_our_name()
            raise
        if isinstance(message, messages.AcceptJobsResponse):
            return message
        raise CallFailedError("AcceptJobs", Code.OK, "the stream has ended", connected=True)

    def close(self) -> None:
        """Let it go."""
        self._call.cancel()


class QueueCalls:
    """The calls. Each raises `SourceUnavailableError` when there is no token, and `CallFailedError`."""

    def __init__(self, endpoint: str, *, tls: bool, machine: Machine) -> None:
        """Args: host:port, whether to talk TLS to it, and whose token to use."""
        self._endpoint = endpoint
        self._tls = tls
        self._machine = machine

    async def accept(self, current_job_id: str, *, fresh_token: bool, patient: bool) -> JobStream:
        """Open the stream; it is sent when a message is first asked for.

        Args:
            current_job_id: The job that we have; empty for none.
            fresh_token: The last token was refused.
            patient: Wait for a service that can't be reached, instead of failing at once.
        """
        token = await self._machine.token(fresh=fresh_token)
        request = messages.AcceptJobsRequest(current_job_id=current_job_id)
        return JobStream(self, self._accept(request, metadata=_metadata(token), wait_for_ready=patient), token)

    async def complete(self, job_id: str, output: bytes, *, patient: bool) -> None:
        """`CompleteJob`; `patient` as in `accept`."""
        request = messages.CompleteJobRequest(job_id=job_id, output=output)
        await self._unary("CompleteJob", self._complete, request, patient=patient)

    async def reject(self, job_id: str, *, patient: bool) -> None:
        """`RejectJob`; `patient` as in `accept`."""
        await self._unary("RejectJob", self._reject, messages.RejectJobRequest(job_id=job_id), patient=patient)

    async def aclose(self) -> None:
        """Let go of the connection."""
        if "_channel" in self.__dict__:
            await self._channel.close()

    def failure(self, call: str, error: grpc.aio.AioRpcError, token: str) -> CallFailedError:
        """What a call's status says, without the token."""
        words = (error.details() or "").replace(token, "********")
        connected = self._channel.get_state() is grpc.ChannelConnectivity.READY
        return CallFailedError(call, error.code(), words, connected=connected)

    async def _unary(self, name: str, call: Any, request: Any, *, patient: bool) -> None:
        """One call, and a second with a fresh token if the first's was refused."""
        for fresh in (False, True):
            token = await self._machine.token(fresh=fresh)
            try:
                await call(request, timeout=UNARY_SECONDS, metadata=_metadata(token), wait_for_ready=patient)
            except grpc.aio.AioRpcError as error:
                failure = self.failure(name, error, token)
                if fresh or not failure.token_refused:
                    raise failure from None
            except anyio.get_cancelled_exc_class():
                await _in_our_name()
                raise
            else:
                return

    # Made when they are first used: a channel belongs to the event loop that runs then.

    @cached_property
    def _channel(self) -> grpc.aio.Channel:
        if self._tls:
            return grpc.aio.secure_channel(self._endpoint, grpc.ssl_channel_credentials(), options=_OPTIONS)
        return grpc.aio.insecure_channel(self._endpoint, options=_OPTIONS)

    @cached_property
    def _accept(self) -> Any:
        request, response = messages.AcceptJobsRequest, messages.AcceptJobsResponse
        return self._channel.unary_stream(
            ACCEPT_JOBS, request_serializer=request.SerializeToString, response_deserializer=response.FromString
        )

    @cached_property
    def _complete(self) -> Any:
        return self._channel.unary_unary(COMPLETE_JOB, request_serializer=messages.CompleteJobRequest.SerializeToString)

    @cached_property
    def _reject(self) -> Any:
        return self._channel.unary_unary(REJECT_JOB, request_serializer=messages.RejectJobRequest.SerializeToString)


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def _in_our_name() -> None:
    """Raise the cancellation of our own scope: gRPC raises another in its place, which no scope would know."""
    await anyio.lowlevel.checkpoint_if_cancelled()
