"""Sends jobs into a queue of SQS, patiently, and says what a failure means to a person."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import anyio
from botocore.exceptions import CredentialRetrievalError, NoCredentialsError, PartialCredentialsError

from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.sources.base import SourceUnavailableError
from heeler.sources.sqs_calls import RefusedError, SqsCalls
from heeler.sources.sqs_draft import Draft, batches
from heeler_sync.groups import for_each
from heeler_sync.store.retry import Backoff

_PATIENCE = 10.0
_SEND_SECONDS = 60.0
"""The most that one call may take: a megabyte on a slow uplink."""
_AT_ONCE = 4
"""Batches under way. A FIFO queue has one: their order is the jobs'."""
_NO_QUEUE = {"QueueDoesNotExist", "NonExistentQueue", "InvalidAddress"}
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)

T = TypeVar("T")


class RefusedJobError(RefusedError):
    """SQS took others of the batch, and not this one; it passes if it was SQS's fault."""

    def __init__(self, job_id: str, failed: Mapping[str, Any]) -> None:
        passes = not failed.get("SenderFault")
        super().__init__(f"job {job_id!r}", failed.get("Code", ""), failed.get("Message", ""), passes=passes)


class Sender(SqsCalls):
    """The calls of who submits; good within `opened`."""

    async def send_all(self, drafts: Sequence[Draft], group: str | None, on_sent: Callable[[Draft], None]) -> None:
        """Send them all; the first that can't be sent ends it.

        Args:
            drafts: The jobs.
            group: The message group of all, in a FIFO queue.
            on_sent: Told of each that is in the queue.

        Raises:
            SourceUnavailableError: SQS refused one, or was out of reach for long.
        """
        failures: list[SourceUnavailableError] = []

        async def send(batch: list[Draft]) -> None:
            if failures:
                return
            try:
                await self._send_batch(batch, group, on_sent)
            except SourceUnavailableError as error:
                failures.append(error)  # what is under way goes on, so that it is known what was sent

        await for_each(batches(drafts), send, 1 if self.address.fifo else _AT_ONCE)
        for error in failures:
            raise error

    async def _send_batch(self, batch: list[Draft], group: str | None, on_sent: Callable[[Draft], None]) -> None:
        left = batch

        async def send() -> None:
            nonlocal left
            errors = await self._send_once(left, group)
            for draft in left:
                if draft.id not in errors:
                    on_sent(draft)
            left = [draft for draft in left if draft.id in errors]
            # What can't ever be sent goes before what may be tried again.
            for error in sorted(errors.values(), key=_passes):
                raise error

        await patiently(send)

    async def _send_once(self, batch: Sequence[Draft], group: str | None) -> dict[str, RefusedJobError]:
        """One call: why a job was not taken, by its id."""
        fifo = self.address.fifo
        entries = [{"Id": str(number), **draft.message(fifo=fifo, group=group)} for number, draft in enumerate(batch)]
        answer = await self._call("send_message_batch", _SEND_SECONDS, QueueUrl=self.address.url, Entries=entries)
        failed = {batch[int(entry["Id"])].id: entry for entry in answer.get("Failed", [])}
        return {job_id: RefusedJobError(job_id, entry) for job_id, entry in failed.items()}


async def patiently(call: Callable[[], Awaitable[T]], patience: float = _PATIENCE) -> T:
    """Await `call()` until it does not fail for a reason that passes, or for so many seconds.

    Raises:
        SourceUnavailableError: The last failure.
    """
    backoff = Backoff()
    give_up = anyio.current_time() + patience
    while True:
        try:
            return await call()
        except SourceUnavailableError as error:
            delay = backoff.next()
            if not _passes(error) or anyio.current_time() + delay >= give_up:
                raise
        await anyio.sleep(delay)


def _passes(error: SourceUnavailableError) -> bool:
    if isinstance(error, RefusedError):
        return error.passes
    return not isinstance(error.__context__, _CREDENTIALS)


def explained(error: SourceUnavailableError) -> HeelerError:
    """What a person is told, in one line, with what to do."""
    words = " ".join(str(error).split()).rstrip(".")
    if isinstance(error.__context__, _CREDENTIALS):
        return UsageError(f"{words}: set SQS_AWS_ACCESS_KEY_ID and SQS_AWS_SECRET_ACCESS_KEY")
    if _passes(error):
        return UnavailableError(f"{words}; is the queue's URL right?")
    if isinstance(error, RefusedError) and error.code in _NO_QUEUE:
        return UsageError(f"{words}; check SQS_QUEUE_URL (or --sqs-queue-url) and the region")
    if isinstance(error, RefusedJobError):
        return UsageError(words)
    return UsageError(f"{words}; check the queue's URL, and its credentials and what they may do")
