"""The Salad Job Queue's three calls (PROTOCOLS 1), with this machine's token.

Nothing is tried again here, but for a token that was refused. No error shows the token.
"""

from __future__ import annotations

from typing import Any

import anyio
import anyio.lowlevel

from heeler.sources.base import Machine, SourceUnavailableError
from heeler.sources.salad_channel import Channel, Code, RpcError
from heeler.wire.salad_queue import UNARY_SECONDS, messages

_TOKEN_PAUSE = 0.8
"""Seconds between two looks for a token that could not be had."""
_TOKEN_SECONDS = 0.5
"""Between two tries to have a token, which is asked for on this machine."""
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

    def __init__(self, call: str, code: Code, words: str, *, connected: bool) -> None:
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
    """An open `AcceptJobs`, until `close`."""

    def __init__(self, channel: Channel, current_job_id: str, token: str) -> None:
        """Open it; it is sent when a message is first asked for."""
        request = messages.AcceptJobsRequest(current_job_id=current_job_id)
        self._channel = channel
        self._token = token
        self._call = channel.take().accept(request, metadata=_metadata(token))

    async def next(self) -> messages.AcceptJobsResponse:
        """The next message.

        Raises:
            CallFailedError: The stream has ended.
        """
        try:
            message = await self._call.read()
        except RpcError as error:
            raise _failure("AcceptJobs", error, self._token, self._channel) from None
        except anyio.get_cancelled_exc_class():
            await _in_our_name()
            raise
        if isinstance(message, messages.AcceptJobsResponse):
            return message
        raise CallFailedError("AcceptJobs", Code.OK, "the stream has ended", connected=True)

    def close(self) -> None:
        """Let it go."""
        self._call.cancel()
        self._channel.back()


class QueueCalls:
    """The calls. Each raises `SourceUnavailableError` when there is no token, and `CallFailedError`."""

    def __init__(self, channel: Channel, machine: Machine) -> None:
        """Args: where to, and whose token to use."""
        self._channel = channel
        self._machine = machine
        self._tokenless = False

    async def accept(self, current_job_id: str, *, fresh_token: bool, patient: bool) -> JobStream:
        """Open the stream.

        Args:
            current_job_id: The job that we have; empty for none.
            fresh_token: The last token was refused.
            patient: Wait for a service that can't be reached, instead of failing at once.
        """
        if patient:
            await self._channel.connected()
        return JobStream(self._channel, current_job_id, await self._machine.token(fresh=fresh_token))

    async def complete(self, job_id: str, output: bytes, *, patient: bool) -> None:
        """`CompleteJob`; `patient`: wait a while for a connection and a token, instead of failing at once."""
        await self._unary("CompleteJob", messages.CompleteJobRequest(job_id=job_id, output=output), patient=patient)

    async def reject(self, job_id: str, *, patient: bool) -> None:
        """`RejectJob`; `patient` as in `complete`."""
        await self._unary("RejectJob", messages.RejectJobRequest(job_id=job_id), patient=patient)

    async def _unary(self, name: str, request: Any, *, patient: bool) -> None:
        """One call, and a second with a fresh token if the first's was refused."""
        if patient:
            with anyio.move_on_after(UNARY_SECONDS):
                await self._channel.connected()
                await self._authorized()
        try:
            await self._once(name, request, await self._token())
        except CallFailedError as error:
            if not error.token_refused:
                raise
            await self._once(name, request, await self._token(fresh=True))

    async def _token(self, *, fresh: bool = False) -> str:
        """A token. Where the last call found none, this one waits for it: the answer of a job is told at once then.

        Raises:
            SourceUnavailableError: There is none.
        """
        give_up = anyio.current_time() + (UNARY_SECONDS if self._tokenless else 0.0)
        while True:
            try:
                token = await self._machine.token(fresh=fresh)
            except SourceUnavailableError:
                self._tokenless = True
                if anyio.current_time() + _TOKEN_PAUSE > give_up:
                    raise
            else:
                self._tokenless = False
                return token
            await anyio.sleep(_TOKEN_PAUSE)

    async def _authorized(self) -> None:
        """Return once there is a token."""
        while True:
            try:
                await self._machine.token()
            except SourceUnavailableError:
                await anyio.sleep(_TOKEN_SECONDS)
            else:
                return

    async def _once(self, name: str, request: Any, token: str) -> None:
        stubs = self._channel.take()
        call = stubs.complete if isinstance(request, messages.CompleteJobRequest) else stubs.reject
        try:
            await call(request, timeout=UNARY_SECONDS, metadata=_metadata(token))
        except RpcError as error:
            raise _failure(name, error, token, self._channel) from None
        except anyio.get_cancelled_exc_class():
            await _in_our_name()
            raise
        finally:
            self._channel.back()


def _failure(call: str, error: RpcError, token: str, channel: Channel) -> CallFailedError:
    """What a call's status says, without the token."""
    words = (error.details() or "").replace(token, "********")
    return CallFailedError(call, error.code(), words, connected=channel.up)


def _metadata(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {token}"),)


async def _in_our_name() -> None:
    """Raise the cancellation of our own scope: gRPC raises another in its place, which no scope would know."""
    await anyio.lowlevel.checkpoint_if_cancelled()
