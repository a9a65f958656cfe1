"""A worker's side of the Salad Job Queue by hand: each call made when a test says so, and what it was answered."""

from __future__ import annotations

from typing import Any

import grpc
from google.protobuf.empty_pb2 import Empty

from heeler.wire.salad_queue import ACCEPT_JOBS, COMPLETE_JOB, REJECT_JOB, messages
from tests.support.salad import Machine, SaladService

Code = grpc.StatusCode
_GIVE_UP = 20.0


class Stream:
    """An AcceptJobs call."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def message(self) -> str:
        """The kind of the next message."""
        return str(next(self._call).WhichOneof("message"))

    def job(self) -> messages.Job:
        """The next job; heartbeats before it are passed over."""
        for message in self._call:
            if message.HasField("job"):
                found: messages.Job = message.job
                return found
        raise AssertionError("the stream ended before a job came")

    def end(self) -> Code:
        """Wait for its end, past heartbeats, and say how it ended."""
        try:
            for message in self._call:
                assert not message.HasField("job"), "no job was expected"
        except grpc.RpcError:
            pass
        code: Code = self._call.code()
        return code

    def cancel(self) -> None:
        """Give it up."""
        self._call.cancel()


class Client:
    """A worker's side, by hand: each call with the machine's token."""

    def __init__(self, salad: SaladService, machine: Machine | None = None, token: str | None = None) -> None:
        limits = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        # Each client has connections of its own, as a machine has.
        self.channel = grpc.insecure_channel(salad.endpoint, [*limits, ("grpc.use_local_subchannel_pool", 1)])
        self.token = token if token is not None else (machine or salad.machine).token()
        self._accept = self.channel.unary_stream(
            ACCEPT_JOBS,
            request_serializer=messages.AcceptJobsRequest.SerializeToString,
            response_deserializer=messages.AcceptJobsResponse.FromString,
        )

    def accept(self, current: str = "") -> Stream:
        """Open a stream."""
        request = messages.AcceptJobsRequest(current_job_id=current)
        return Stream(self._accept(request, metadata=self._metadata(), timeout=_GIVE_UP, wait_for_ready=True))

    def complete(self, job_id: str, output: bytes = b"{}") -> Code:
        """Report a job as done."""
        return self._report(COMPLETE_JOB, messages.CompleteJobRequest(job_id=job_id, output=output))

    def reject(self, job_id: str) -> Code:
        """Report that a job could not be done."""
        return self._report(REJECT_JOB, messages.RejectJobRequest(job_id=job_id))

    def _metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    def _report(self, method: str, request: Any) -> Code:
        call = self.channel.unary_unary(
            method, request_serializer=type(request).SerializeToString, response_deserializer=Empty.FromString
        )
        try:
            call(request, metadata=self._metadata(), timeout=_GIVE_UP)
        except grpc.RpcError as error:
            code: Code = error.code()
            return code
        return Code.OK
