"""The prefix that a command of `heeler sync` works on, how it is reached, and how its errors are told."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NoReturn

import anyio

from heeler import signals
from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.memory import share_freed_memory
from heeler.settings import Settings
from heeler.storage import stores
from heeler.sync.voice import Voice
from heeler_sync.errors import (
    AccessDeniedError,
    BadLocationError,
    DamagedHeadError,
    NoSuchBucketError,
    PrefixTakenError,
    SyncError,
    TransientStoreError,
    UnfencedStoreError,
)
from heeler_sync.paths import Location, parse_location
from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import UnknownFormatError
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying

SNAPSHOT, MIRROR = "snapshot", "mirror"
_LAST_SECONDS = 5.0
"""How long a command that was told to stop may tidy up."""


class FailedError(HeelerError):
    """The command could not do what it was asked: something is lost, held by others, or in the way."""

    exit_code = 1


class StoppedError(HeelerError):
    """A signal ended the command."""

    def __init__(self, number: int) -> None:
        self.exit_code = 128 + number
        super().__init__("interrupted")


@dataclass(frozen=True)
class Place:
    """A prefix as it was at the first look.

    Attributes:
        location: Bucket and prefix.
        store: Its bucket.
        policy: How long storage may be out of reach from now on.
        mode: "snapshot" or "mirror".
        head: Its head and the head's ETag, if there is one that can be read.
        trouble: Why the head can't be read, or that there should be one.
    """

    location: Location
    store: ObjectStore
    policy: RetryPolicy
    mode: str
    head: tuple[Head, str] | None = None
    trouble: SyncError | None = field(default=None)

    @property
    def layout(self) -> Layout:
        """Where its generations lie."""
        return Layout(self.store, self.location, self.policy)

    def require_head(self) -> None:
        """Refuse to go on where the head is not as it should be.

        Raises:
            SyncError: It says how, and what to do.
        """
        if self.trouble is not None:
            raise self.trouble


async def open_place(settings: Settings, url: str, mode: str | None, voice: Voice) -> Place:
    """Look at a prefix for the first time, which storage must answer within the start-up limit.

    Raises:
        HeelerError: The address is none, or storage can't be reached or refuses us.
    """
    if mode not in (None, SNAPSHOT, MIRROR):
        raise UsageError(f"--mode is {mode!r}, but must be {SNAPSHOT} or {MIRROR}")
    location = address(url)
    store = stores(settings)(location.bucket)
    limit = max(1.0, settings.startup_timeout)
    first = RetryPolicy(patience=settings.startup_timeout, on_retry=voice.on_retry)
    try:
        with anyio.fail_after(limit):
            head, trouble = await _first_look(Layout(store, location, first))
    except TimeoutError:
        raise UnavailableError(
            f"storage is out of reach: no answer for bucket {location.bucket} within {limit:g} s;"
            " is the endpoint right?"
        ) from None
    found = SNAPSHOT if head is not None or trouble is not None else MIRROR
    policy = RetryPolicy(patience=settings.restore_patience, on_retry=voice.on_retry)
    return Place(location, store, policy, mode or found, head, trouble)


def address(url: str) -> Location:
    """The prefix of an address.

    Raises:
        UsageError: It is none.
    """
    try:
        return parse_location(url)
    except BadLocationError as error:
        raise UsageError(f"URL {error}") from None


async def _first_look(layout: Layout) -> tuple[tuple[Head, str] | None, SyncError | None]:
    try:
        head = await layout.read_head()
    except (DamagedHeadError, UnknownFormatError) as error:
        return None, error
    if head is None and await retrying(layout.policy, lambda: has_generations(layout)):
        return None, DamagedHeadError(str(layout.location), "there are generations here, and no head")
    return head, None


async def has_generations(layout: Layout) -> bool:
    """Whether manifests or packs are there."""
    async for page in layout.store.list(layout.own):
        if any(layout.owned(info.key) for info in page):
            return True
    return False


# -- a command's run ------------------------------------------------------------------------------------------------

Stop = Callable[[int], None]


def run(voice: Voice, work: Callable[[], Awaitable[int]], on_stop: Stop | None = None) -> NoReturn:
    """Run a command and exit with the code that it returns; SIGINT and SIGTERM end it, or are given to `on_stop`.

    Whatever goes wrong is one line.
    """
    signals.hold()
    share_freed_memory()
    try:
        with told():
            code = anyio.run(_run, work, on_stop)
    except HeelerError as error:
        voice.note(f"heeler: {error}")
        code = error.exit_code
    leave(code)


def leave(code: int) -> NoReturn:
    """End the process now: a thread may hang in a request that storage never answers, and Python would wait for it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _run(work: Callable[[], Awaitable[int]], on_stop: Stop | None) -> int:
    stopped: list[int] = []
    scope = anyio.CancelScope()
    code = 0

    def stop(number: int) -> None:
        stopped.append(number)
        if on_stop is not None and len(stopped) == 1:
            on_stop(number)
            return
        scope.cancel()
        timer = threading.Timer(0 if len(stopped) > 2 else _LAST_SECONDS, os._exit, (128 + number,))
        timer.daemon = True
        timer.start()

    with anyio.open_signal_receiver(*signals.DRAIN_SIGNALS) as received:
        async with anyio.create_task_group() as group:
            group.start_soon(_listen, received, stop)
            for number in signals.held():
                stop(number)
            with scope:
                code = await work()
            group.cancel_scope.cancel()
    if scope.cancelled_caught:
        raise StoppedError(stopped[-1])
    return code


async def _listen(received: AsyncIterator[int], stop: Stop) -> None:
    async for number in received:
        stop(int(number))


@contextmanager
def told() -> Iterator[None]:
    """Errors of storage and files as errors of a command."""
    try:
        yield
    except HeelerError:
        raise
    except BaseException as raised:
        error = _first_of(raised)
        if isinstance(error, HeelerError):
            raise error from None
        if not isinstance(error, SyncError):
            raise
        raise _told(error) from None


def _first_of(error: BaseException) -> BaseException:
    while (inner := getattr(error, "exceptions", None)) is not None:
        error = inner[0]
    return error


def _told(error: SyncError) -> HeelerError:
    if isinstance(error, TransientStoreError):
        return UnavailableError(f"storage is out of reach: {error}; is the endpoint right?")
    if isinstance(error, AccessDeniedError | NoSuchBucketError):
        return UsageError(f"storage refuses us: {error}; check bucket, keys and endpoint")
    if isinstance(error, UnfencedStoreError | BadLocationError):
        return UsageError(str(error))
    if isinstance(error, PrefixTakenError):
        return held_by_job(error.location, error.job_id)
    return FailedError(str(error))


def held_by_job(location: str, job_id: str) -> FailedError:
    """The refusal to take a prefix from a job's worker."""
    return FailedError(
        f"{location} belongs to job {job_id}: a push would take the prefix from its worker, which could save nothing"
        f" any more; if that is what you want: --job-id {job_id}"
    )


def holder_name() -> str:
    """Who we are, for people who look at a head."""
    return f"heeler sync on {os.uname().nodename}:{os.getpid()}"
