"""`sqs` or `sqs:URL`: a queue of Amazon SQS, standard or FIFO, or of a service that speaks its protocol (PROTOCOLS 4).

A message is ours while its visibility is extended. SQS counts receives, and nothing else: interruptions count like
failures, and each receive spends one of a redrive policy's tries.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import anyio

from heeler.errors import UnavailableError, UsageError
from heeler.job import InvalidJobError, Result
from heeler.lease import boot_clock
from heeler.settings import Settings
from heeler.sources import SourceRequest
from heeler.sources.base import LeaseLostError, SourceUnavailableError, Verdict
from heeler.sources.sqs_batch import Batcher, enough
from heeler.sources.sqs_calls import Address, RefusedError, SqsCalls
from heeler.sources.sqs_dead import NOT_TOLD, DeadLetters
from heeler.sources.sqs_handles import Handles
from heeler.sources.sqs_lease import Queue, SqsLease
from heeler.sources.sqs_message import Message
from heeler.sources.sqs_poll import POLL_SECONDS, Poller
from heeler.sources.sqs_send import explained, patiently
from heeler.tasks import background

_PART_OF_GRACE = 6
"""A poll is not broken off, so an idle worker takes up to that part of its grace to end."""
_AWS = re.compile(r"(?:^|[./])sqs\.([a-z0-9-]+)\.(?:vpce\.)?amazonaws\.com(?:\.cn)?$")


class SqsSource:
    """The worker's side of the queue."""

    def __init__(self, request: SourceRequest, *, clock: Callable[[], float] = boot_clock) -> None:
        """Args.

        request: The queue, its credentials, who asks, and who is told of faults.
        clock: Seconds; goes on while the machine sleeps.

        Raises:
            UsageError: A setting is missing or wrong; it is named.
        """
        settings = request.settings
        self._address = address_of(settings, (request.spec or "").partition(":")[2])
        dead_url = settings.sqs_dlq_url and _checked(settings.sqs_dlq_url, "SQS_DLQ_URL (or --sqs-dlq-url)")
        calls = SqsCalls(self._address)
        dead = DeadLetters(calls, dead_url, request.worker, request.on_fault)
        self._calls = calls
        self._app_mode = request.app_mode
        self._handles = Handles(request.state_dir, self._address.url, request.on_fault)
        together = enough(settings.concurrency)
        self._queue = Queue(
            self._address.name,
            settings.sqs_visibility,
            Batcher(self._handles.noting(calls.hide)),
            Batcher(calls.delete, together),
            dead,
            calls.reach,
            self._seek if settings.records is not None else None,
            self._handles.keep,
            self._handles.drop,
            clock,
            request.on_fault,
        )
        longest = max(1, min(POLL_SECONDS, int(settings.stop_grace / _PART_OF_GRACE)))
        self._leases: WeakValueDictionary[str, SqsLease] = WeakValueDictionary()
        """The newest of each message, while somebody has it."""
        read = partial(Message.of, documents=not request.app_mode)
        self._poller = Poller(
            calls,
            settings.sqs_visibility,
            longest,
            clock,
            dead.look,
            request.on_fault,
            together,
            self._claim,
            read=read,
        )
        self._running = False
        self._ended = anyio.Event()

    @property
    def queue(self) -> str:
        """The queue's name."""
        return self._address.name

    @property
    def name(self) -> str:
        """The queue, by its URL."""
        return f"sqs:{self._address.url}"

    async def run(self) -> None:
        """As `Source.run`: all calls are made here."""
        self._running = True
        try:
            async with self._calls.opened(), background(self._queue.hides.run, self._queue.deletes.run):
                await self._poller.run()
        finally:
            self._ended.set()

    async def pause(self) -> None:
        """As `Source.pause`: jobs come only when they are asked for."""

    async def receive(self, *, wait: float) -> SqsLease | None:
        """As `Source.receive`; what can be posted to no app is set aside."""
        until = anyio.current_time() + wait
        while True:
            message = await self._poller.next(max(0.0, until - anyio.current_time()))
            if message is None:
                return None
            self._handles.keep(message.handle, self._queue.visibility)
            self._leases[message.id] = lease = SqsLease(self._queue, message)
            reason = self._refusal(message)
            if not reason:
                self._tell_ignored(message)
                return lease
            await self._set_aside(lease, message, reason)

    async def _seek(self, message_id: str) -> Message | None:
        return await self._poller.seek(message_id)

    def _claim(self, message: Message) -> bool:
        """Whether it lapsed in another lane, which goes on with it."""
        lease = self._leases.get(message.id)
        return lease is not None and lease.adopt(message)

    def _refusal(self, message: Message) -> str:
        """Why an app can't have it; empty if it can."""
        try:
            if self._app_mode:
                message.target  # noqa: B018 - raises
        except InvalidJobError as error:
            return str(error)
        return ""

    async def _set_aside(self, lease: SqsLease, message: Message, reason: str) -> None:
        """What is not set aside now comes again when it lapses."""
        self._queue.on_fault("message_refused", message=message.id, error=reason)
        try:
            await lease.fail(reason, result=Result())
        except (SourceUnavailableError, LeaseLostError) as error:
            self._queue.on_fault("message_not_set_aside", message=message.id, error=str(error))

    def _tell_ignored(self, message: Message) -> None:
        left_out = message.told(self._queue.name).left_out if self._app_mode else {}
        for name, why in {**message.ignored(), **left_out}.items():
            self._queue.on_fault("attribute_left_out", message=message.id, attribute=name, error=why)

    async def reclaim(self, worker: str) -> None:
        """As `Source.reclaim`, of whoever held messages in our state folder: SQS does not know holders by name.

        `run` has not begun yet, so it has connections of its own.
        """
        del worker
        await self._handles.reclaim(SqsCalls(self._address))

    async def check(self, patience: float) -> None:
        """Ask the queue, so that a wrong URL or key is told before the first job. With connections of its own.

        Raises:
            UsageError: There is no such queue, or it refuses us.
            UnavailableError: It did not answer for `patience` seconds.
        """
        calls = SqsCalls(self._address)
        async with calls.opened():
            try:
                with anyio.fail_after(max(1.0, patience)):
                    await patiently(lambda: calls.attributes("QueueArn"), patience)
            except TimeoutError:
                raise UnavailableError(f"SQS did not answer within {patience:g} s; is the queue's URL right?") from None
            except SourceUnavailableError as error:
                # Who may receive may not always ask.
                if not isinstance(error, RefusedError) or error.code not in NOT_TOLD:
                    raise explained(error) from None

    def verdict(self) -> Verdict | None:
        """None: somebody may submit at any time."""
        return None

    async def aclose(self) -> None:
        """Return once the connections are closed, which `run` does at its end."""
        if self._running:
            await self._ended.wait()


def address_of(settings: Settings, url: str = "") -> Address:
    """Where the queue is, by the settings; an URL given with the source's name goes before.

    Raises:
        UsageError: A setting is missing or wrong.
    """
    where = "the queue of --source sqs:URL" if url else "SQS_QUEUE_URL (or --sqs-queue-url)"
    url = url or settings.sqs_queue_url or ""
    if not url:
        raise UsageError("source sqs needs its queue: set SQS_QUEUE_URL (or --sqs-queue-url), or --source sqs:URL")
    parts = urlsplit(_checked(url, where))
    keys = settings.sqs_access_key_id, settings.sqs_secret_access_key
    if (keys[0] is None) is not (keys[1] is None):
        missing = "SQS_AWS_SECRET_ACCESS_KEY" if keys[0] is not None else "SQS_AWS_ACCESS_KEY_ID"
        raise UsageError(f"the queue's credentials are incomplete: {missing} is not set")
    in_url = _AWS.search(parts.hostname or "")
    endpoint = settings.sqs_endpoint and _checked(settings.sqs_endpoint, "AWS_ENDPOINT_URL_SQS (or --sqs-endpoint)")
    if endpoint is None and in_url is None and not (parts.hostname or "").endswith(".amazonaws.com"):
        endpoint = f"{parts.scheme}://{parts.netloc}"
    region = in_url[1] if in_url is not None else settings.sqs_region
    if region is None:
        raise UsageError("the queue's URL names no region: set SQS_AWS_REGION (or --sqs-region)")
    token = settings.sqs_session_token if keys[0] is not None else None
    return Address(url, region, endpoint, *keys, token)


def _checked(url: str, where: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise UsageError(f"{where} is not an http or https URL without a user")
    return url
