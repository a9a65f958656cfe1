"""One path at a time made durable, or deleted, with retries: the only place where mirror mode changes storage.

Every change waits for the permit first. What an attempt's end means for the folder's bookkeeping is the caller's
business; the `Ended` it gets says all of it.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import anyio

from heeler_sync.errors import (
    FileChangedError,
    LocalFileError,
    ObjectReplacedError,
    PermanentStoreError,
    PermitInDoubtError,
    SyncError,
    TransientStoreError,
    UnsafeKeyError,
)
from heeler_sync.events import EventSink
from heeler_sync.paths import Location
from heeler_sync.progress import Progress
from heeler_sync.settle import SettleTimes
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import Backoff
from heeler_sync.tree import Stamp
from heeler_sync.upload import Stored, upload_file

_REFUSED_RETRY_SECONDS = 30.0
_ENDING_RETRY_SECONDS = 2.0


class Permit(Protocol):
    """The right to change storage, which may be in doubt or end (a lease)."""

    async def wait(self) -> None:
        """Return once the right is certain."""
        ...

    async def doubt(self) -> None:
        """Something hints that the right is gone: return only after it was confirmed anew."""
        ...

    def certain(self) -> bool:
        """Whether the right is certain now; any thread may ask."""
        ...


class AlwaysPermitted:
    """The permit of a caller who shares storage with nobody."""

    async def wait(self) -> None:
        """Return at once."""

    async def doubt(self) -> None:
        """Return at once."""

    def certain(self) -> bool:
        """Always."""
        return True


@dataclass
class MirrorContext:
    """What all mirrors of one session share.

    Attributes:
        times: When a file counts as settled.
        permit: Waited for before each change of storage.
        on_event: Told of what is worth telling.
        progress: Counts what moved.
        backoff: Makes the delays of one file's retries.
    """

    times: SettleTimes
    permit: Permit
    on_event: EventSink
    progress: Progress
    backoff: Callable[[], Backoff] = field(default=Backoff)


class Ended(enum.Enum):
    """How the sending of one settled state ended."""

    DURABLE = "durable"
    GONE = "gone"
    CHANGED = "changed"
    REFUSED = "refused"


class Sender:
    """Sends and deletes below one location. `over` is set when the program has ended: then nothing waits long."""

    def __init__(self, store: ObjectStore, location: Location, root: Path, context: MirrorContext) -> None:
        self._store = store
        self._location = location
        self._root = root
        self._context = context
        self.over = anyio.Event()
        self.refusal: SyncError | None = None

    async def send(self, relative: str, settled: Stamp, known: Stored | None) -> tuple[Ended, Stored | None]:
        """Try until the settled state is durable, is no longer the file's, or is refused for good."""
        key = self._location.key(relative)
        backoff = self._context.backoff()
        while True:
            await self._context.permit.wait()
            try:
                return Ended.DURABLE, await self._upload(key, relative, settled, known)
            except FileNotFoundError:
                return Ended.GONE, None
            except FileChangedError:
                return Ended.CHANGED, None
            except PermitInDoubtError:
                continue
            except ObjectReplacedError as error:
                await self._pause("object_replaced", key, error, backoff.next())
                await self._context.permit.doubt()
                known = None if known is None else replace(known, digest="", etag="")
            except TransientStoreError as error:
                await self._pause("upload_retried", key, error, backoff.next())
            except (PermanentStoreError, LocalFileError, UnsafeKeyError) as error:
                if self.over.is_set():
                    self.refusal = error
                    return Ended.REFUSED, None
                await self._pause("upload_refused", key, error, _REFUSED_RETRY_SECONDS)

    async def _upload(self, key: str, relative: str, settled: Stamp, known: Stored | None) -> Stored:
        progress = self._context.progress
        with progress.sending():
            permitted = self._context.permit.certain
            stored, sent = await upload_file(self._store, key, self._root, relative, settled, known, permitted)
            progress.bytes_up += sent
        if known is None or known.digest != stored.digest:
            progress.files_up += 1
            self._event("uploaded", key=key, bytes=sent)
        return stored

    async def delete(self, relative: str, is_back: Callable[[], bool]) -> bool:
        """Delete the object of a vanished file, unless the file `is_back()` first; whether it is certainly gone."""
        key = self._location.key(relative)
        backoff = self._context.backoff()
        while not is_back():
            await self._context.permit.wait()
            try:
                await self._store.delete(key)
            except TransientStoreError as error:
                await self._pause("delete_retried", key, error, backoff.next())
            except PermanentStoreError as error:
                if self.over.is_set():
                    self.refusal = error
                    return False
                await self._pause("delete_refused", key, error, _REFUSED_RETRY_SECONDS)
            else:
                self._context.progress.deleted += 1
                self._event("deleted", key=key)
                return True
        return False

    async def _pause(self, event: str, key: str, error: SyncError, seconds: float) -> None:
        """Wait before another try; the program's end cuts the wait short."""
        if self.over.is_set():
            seconds = min(seconds, _ENDING_RETRY_SECONDS)
        self._event(event, key=key, error=str(error), retry_in=round(seconds, 3))
        if self.over.is_set():
            await anyio.sleep(seconds)
        else:
            with anyio.move_on_after(seconds):
                await self.over.wait()

    def _event(self, name: str, **fields: object) -> None:
        self._context.on_event(name, {"bucket": self._store.bucket, **fields})
