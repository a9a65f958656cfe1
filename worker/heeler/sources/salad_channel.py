"""The gRPC channel to the Salad Job Queue, which is made anew when it does not get through.

The core of gRPC waits ever longer before it looks up a name again, up to two minutes, and can't be told otherwise: a
machine whose network is back would be idle for as long. Only a new channel looks at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import anyio

from heeler.wire.salad_queue import ACCEPT_JOBS, COMPLETE_JOB, MESSAGE_BYTES, REJECT_JOB, messages


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
RpcError = grpc.aio.AioRpcError
_State = grpc.ChannelConnectivity

_ENVELOPE_BYTES = 1 << 20
_CONNECT_SECONDS = 10.0
_FAILED_SECONDS = 3.0
_LOOK_SECONDS = 0.1
_OPTIONS = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES + _ENVELOPE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES + _ENVELOPE_BYTES),
    # A service that is back is found within a second or so.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.min_reconnect_backoff_ms", int(_CONNECT_SECONDS * 1000)),  # in truth what one attempt may take
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True)
class Stubs:
    """The service's calls on one channel."""

    accept: Any
    complete: Any
    reject: Any


class Channel:
    """Owns the connection."""

    def __init__(self, endpoint: str, *, tls: bool) -> None:
        """Args: host:port, and whether to talk TLS to it."""
        self._endpoint = endpoint
        self._tls = tls
        self._open: tuple[grpc.aio.Channel, Stubs] | None = None
        self._calls = 0

    @property
    def up(self) -> bool:
        """Whether there is a connection."""
        return self._open is not None and self._open[0].get_state() is _State.READY

    def take(self) -> Stubs:
        """The calls, on a channel that stays until they are given `back`."""
        self._calls += 1
        return self._made()[1]

    def back(self) -> None:
        """A call is over."""
        self._calls -= 1

    async def connected(self) -> None:
        """Return once there is a connection."""
        since = anyio.current_time()
        while (state := self._made()[0].get_state(try_to_connect=True)) is not _State.READY:
            patience = _FAILED_SECONDS if state is _State.TRANSIENT_FAILURE else _CONNECT_SECONDS
            if anyio.current_time() - since >= patience and not self._calls:
                await self.aclose()
                since = anyio.current_time()
            else:
                await anyio.sleep(_LOOK_SECONDS)

    async def aclose(self) -> None:
        """Let go of the connection."""
        if self._open is not None:
            channel, self._open = self._open[0], None
            await channel.close()

    def _made(self) -> tuple[grpc.aio.Channel, Stubs]:
        # When it is first used: a channel belongs to the event loop that runs then.
        if self._open is None:
            channel = self._make()
            self._open = channel, _stubs(channel)
        return self._open

    def _make(self) -> grpc.aio.Channel:
        if self._tls:
            return grpc.aio.secure_channel(self._endpoint, grpc.ssl_channel_credentials(), options=_OPTIONS)
        return grpc.aio.insecure_channel(self._endpoint, options=_OPTIONS)


def _stubs(channel: grpc.aio.Channel) -> Stubs:
    return Stubs(
        channel.unary_stream(
            ACCEPT_JOBS,
            request_serializer=messages.AcceptJobsRequest.SerializeToString,
            response_deserializer=messages.AcceptJobsResponse.FromString,
        ),
        channel.unary_unary(COMPLETE_JOB, request_serializer=messages.CompleteJobRequest.SerializeToString),
        channel.unary_unary(REJECT_JOB, request_serializer=messages.RejectJobRequest.SerializeToString),
    )
