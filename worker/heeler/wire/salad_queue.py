"""The Salad Job Queue's worker service (PROTOCOLS.md 1): its calls and its limits; the messages are generated."""

from __future__ import annotations

from heeler.wire import salad_queue_pb2 as messages

SERVICE = "salad.grpc.saladcloud_job_queue_worker.v1alpha.JobQueueWorkerService"
ACCEPT_JOBS = f"/{SERVICE}/AcceptJobs"
COMPLETE_JOB = f"/{SERVICE}/CompleteJob"
REJECT_JOB = f"/{SERVICE}/RejectJob"

ENDPOINT = "job-queue-worker-api.salad.com:443"
MESSAGE_BYTES = 10 << 20
"""The largest message, both ways."""
UNARY_SECONDS = 30.0
"""The deadline of CompleteJob and RejectJob."""
TRIES = 4
"""How often the service tries a job in all."""

__all__ = [
    "ACCEPT_JOBS",
    "COMPLETE_JOB",
    "ENDPOINT",
    "MESSAGE_BYTES",
    "REJECT_JOB",
    "SERVICE",
    "TRIES",
    "UNARY_SECONDS",
    "messages",
]
