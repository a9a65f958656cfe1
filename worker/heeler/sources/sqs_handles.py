"""Receipt handles on disk, so that a runtime which takes the place of a killed one frees at once what that one held.

A handle is the right to change and delete a message: its file is ours alone, and it is in no log.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import anyio.to_thread

from heeler.sources.base import LeaseLostError
from heeler.sources.sqs_batch import Send
from heeler.sources.sqs_calls import ENTRIES, Change, SqsCalls

FOLDER = "sqs"
"""In the state folder."""
_NEARLY = 5.0
"""What lapses so soon is left to lapse: SQS's own count may be a little ahead of ours."""


class Handles:
    """Owns the files of one queue, one a message that is ours. One process at a time has the folder.

    A file's modification time is the moment at which the message lapses. After it another worker may have the message,
    and of a standard queue SQS may still take an old handle: it would take the message from that worker.
    """

    def __init__(
        self, state_dir: Path, queue: str, on_fault: Callable[..., None], wall: Callable[[], float] = time.time
    ) -> None:
        """Args: the state folder, the queue's URL, who is told of faults, and seconds since 1970."""
        self._folder = state_dir / FOLDER
        self._prefix = f"{_digest(queue)}-"
        self._on_fault = on_fault
        self._wall = wall
        self._held: dict[str, float] = {}
        self._failing = False

    def keep(self, handle: str, seconds: float) -> None:
        """Note a message that is ours from now on, for so long."""
        now = self._wall()
        for lapsed in [other for other, until in self._held.items() if until <= now]:
            self.drop(lapsed)
        try:
            self._write(handle, now + seconds)
            self._held[handle] = now + seconds
            self._failing = False
        except OSError as error:
            self._fault(error)

    def drop(self, handle: str) -> None:
        """It is no longer ours, or is being settled."""
        if self._held.pop(handle, None) is not None:
            self._remove(self._path(handle))

    def noting(self, hide: Send) -> Send:
        """The same call, after which we know for how long each message is ours."""

        async def hide_and_note(changes: Sequence[Change]) -> list[Exception | None]:
            asked_at = self._wall()
            results = await hide(changes)
            for change, error in zip(changes, results, strict=True):
                if error is None:
                    self._prolong(change.handle, asked_at + change.seconds)
                elif isinstance(error, LeaseLostError):
                    self.drop(change.handle)
            return results

        return hide_and_note

    async def reclaim(self, calls: SqsCalls) -> None:
        """Make visible what dead processes held.

        Raises:
            SourceUnavailableError: The queue is out of reach; what is left is kept for the next time.
        """
        found = await anyio.to_thread.run_sync(self._left_behind)
        if not found:
            return
        async with calls.opened():
            for start in range(0, len(found), ENTRIES):
                await self._free(calls, found[start : start + ENTRIES])

    async def _free(self, calls: SqsCalls, handles: Sequence[str]) -> None:
        failed = None
        results = await calls.hide([Change(handle, 0) for handle in handles])
        for handle, error in zip(handles, results, strict=True):
            if error is None or isinstance(error, LeaseLostError):
                self._remove(self._path(handle))
            else:
                failed = error
        if failed is not None:
            raise failed

    def _left_behind(self) -> list[str]:
        """The handles of others than us that are still good."""
        good_after = self._wall() + _NEARLY
        ours = {self._path(handle) for handle in self._held}
        found = []
        for path in self._folder.glob(f"{self._prefix}*"):
            if path in ours:
                continue
            try:
                handle = path.read_text("utf-8")
                good = path.stat().st_mtime > good_after
            except (OSError, ValueError):
                good = False
            # A file that was cut short by a full disk or a crash is not of its own name.
            if good and path == self._path(handle):
                found.append(handle)
            else:
                self._remove(path)
        return found

    def _write(self, handle: str, until: float) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path, data = self._path(handle), handle.encode()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(path, flags, 0o600)
        try:
            if os.write(file, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.utime(file, (until, until))
        except OSError:
            with suppress(OSError):
                path.unlink()
            raise
        finally:
            os.close(file)

    def _prolong(self, handle: str, until: float) -> None:
        if handle not in self._held:
            return
        try:
            os.utime(self._path(handle), (until, until))
            self._held[handle] = until
        except OSError as error:
            self._fault(error)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._fault(error)

    def _path(self, handle: str) -> Path:
        return self._folder / f"{self._prefix}{_digest(handle)}"

    def _fault(self, error: OSError) -> None:
        """Say it once, until it works again: there may be many messages."""
        if not self._failing:
            self._failing = True
            words = f"{self._folder} can't be written ({error.strerror}): after a crash a message comes when it lapses"
            self._on_fault("handle_not_kept", error=words)


def _digest(text: str) -> str:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
