"""Where messages go that failed for good: the dead-letter queue that is named, or that of the redrive policy."""

from __future__ import annotations

import json
from collections.abc import Callable

from heeler.sources.sqs_calls import RefusedError, SqsCalls
from heeler.sources.sqs_message import Message

FAILURES = 3
"""As Kelpie's `max_failures` (PROTOCOLS 3), where neither the job nor the queue says."""
NOT_TOLD = {"AccessDenied", "AccessDeniedException", "InvalidAttributeName", "UnsupportedOperation"}
"""Who may receive may not always ask for a policy, and a look-alike of SQS may have none."""
_WHAT_TO_DO = "allow sqs:SendMessage on the dead-letter queue (and its key), or set SQS_DLQ_URL"
_REFUSALS = {"InvalidParameterValue", "InvalidMessageContents", "BatchRequestTooLong"}
"""What SQS answers to a message that our notes made too long."""


class DeadLetters:
    """Owns what we know of the dead-letter queue and of the redrive policy."""

    def __init__(self, calls: SqsCalls, url: str | None, worker: str, on_fault: Callable[..., None]) -> None:
        """Args: the queue's calls, the queue that was named, who we are, and who is told."""
        self._calls = calls
        self._url = url
        self._worker = worker
        self._on_fault = on_fault
        self._looked = False
        self.receives: int | None = None
        """After so many receives SQS takes a message away by itself."""
        self.retention: float | None = None
        """Seconds after its sending SQS drops a message, whoever works on it."""

    async def look(self) -> None:
        """Learn of the redrive policy, once.

        Raises:
            SourceUnavailableError: SQS could not be asked.
        """
        if self._looked:
            return
        try:
            found = await self._calls.attributes("RedrivePolicy", "MessageRetentionPeriod")
            if "MessageRetentionPeriod" in found:
                self.retention = float(found["MessageRetentionPeriod"])
            await self._take(json.loads(found.get("RedrivePolicy") or "{}"))
        except RefusedError as error:
            if error.code not in NOT_TOLD:
                raise
            self._on_fault("redrive_policy_unknown", error=str(error))
        self._looked = True
        if self._url is None:
            self._on_fault(
                "no_dead_letter_queue", error="a job that fails for good stays in the queue: set SQS_DLQ_URL"
            )

    async def _take(self, policy: dict[str, object]) -> None:
        if not policy:
            return
        self.receives = int(str(policy["maxReceiveCount"]))
        self._on_fault(
            "redrive_policy", max_receives=self.receives, error="SQS counts every receive, interrupted ones too"
        )
        if self._url is None:
            self._url = await self._find(str(policy["deadLetterTargetArn"]))

    async def _find(self, arn: str) -> str | None:
        """The URL of the queue that the policy names; None, and a fault, if we may not know."""
        try:
            return await self._calls.url_of(arn)
        except RefusedError as error:
            if error.passes:
                raise
            self._on_fault("dead_letter_queue_unknown", error=f"{error}; set SQS_DLQ_URL")
        return None

    def tries(self, message: Message) -> int:
        """How often a message may fail: as its job says, else as the redrive policy does, which also is the most."""
        wanted = message.max_failures or self.receives or FAILURES
        return wanted if self.receives is None else min(wanted, self.receives)

    async def send(self, message: Message, reason: str) -> bool:
        """Send it there, with the reason; False if there is no such queue, or none that takes it.

        Raises:
            SourceUnavailableError: It is not known whether it is there.
        """
        if self._url is None:
            return False
        try:
            await self._send(self._url, message, reason)
        except RefusedError as error:
            if error.passes:
                raise
            self._on_fault("dead_letter_refused", message=message.id, error=f"{error}; {_WHAT_TO_DO}")
            return False
        return True

    async def _send(self, url: str, message: Message, reason: str) -> None:
        notes = {
            "job-id": message.job_id,
            "reason": reason,
            "attempts": str(message.receives),
            "worker": self._worker,
        }
        # A long message may have room for the id only, by which its checkpoints are found once it is sent back.
        for fewer in ({"job-id": message.job_id}, {}):
            try:
                await self._calls.send(url, **message.dead_letter(url, notes))
            except RefusedError as error:
                if error.code not in _REFUSALS:
                    raise
                self._on_fault("dead_letter_without_reason", message=message.id, error=str(error))
                notes = fewer
            else:
                return
        await self._calls.send(url, **message.dead_letter(url, notes))
