"""Packs on their way to storage: some at a time, the rest in memory or on disk, so that reading never waits long.

A capture must read what changed before the program changes it again; an uplink may need minutes for it. So what the
uplink does not take soon is put on disk, and the capture ends when all is read.
"""

from __future__ import annotations

import math
import secrets
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

from heeler_sync.errors import LocalFileError
from heeler_sync.groups import alongside
from heeler_sync.progress import Progress
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.packs import Pack
from heeler_sync.store.retry import retrying
from heeler_sync.threads import in_thread

_AT_ONCE = 4
_IN_MEMORY = 6
_PATIENCE = 0.25
"""Seconds to wait for room in memory: on a fast uplink, it is there by then, and no disk is written."""


OnSent = Callable[[Pack], Awaitable[None]]


@dataclass(frozen=True)
class _Parcel:
    pack: Pack
    body: bytes | Path
    """The bytes, or the file that they wait in."""


class Outbox:
    """Takes full packs and sends them while its block runs; made by `sending`."""

    def __init__(self, layout: Layout, spool: Path | None, progress: Progress, on_sent: OnSent) -> None:
        self._layout = layout
        self._spool = spool
        self._progress = progress
        self._on_sent = on_sent
        self._put, self._take = anyio.create_memory_object_stream[_Parcel](math.inf)
        self._room = anyio.Semaphore(_IN_MEMORY)
        self.bytes = 0

    async def add(self, pack: Pack, data: bytes) -> None:
        """Send a pack with these bytes; returns as soon as they are in memory or on disk."""
        self.bytes += len(data)
        with anyio.move_on_after(_PATIENCE):
            await self._room.acquire()
            self._put.send_nowait(_Parcel(pack, data))
            return
        file = None if self._spool is None else await in_thread(_spooled, self._spool, data)
        if file is None:
            await self._room.acquire()
            self._put.send_nowait(_Parcel(pack, data))
        else:
            self._put.send_nowait(_Parcel(pack, file))

    async def send(self) -> None:
        """Send until there are no more: one of several workers."""
        while True:
            try:
                parcel = await self._take.receive()
            except anyio.EndOfStream:
                return
            await self._send(parcel)

    async def _send(self, parcel: _Parcel) -> None:
        key = self._layout.pack_key(parcel.pack.id)
        body = parcel.body
        data = body if isinstance(body, bytes) else await in_thread(_unspooled, body)
        with self._progress.sending():
            await retrying(self._layout.policy, lambda: self._layout.store.put(key, data))
            self._progress.bytes_up += len(data)
        if isinstance(body, bytes):
            self._room.release()
        await self._on_sent(parcel.pack)

    def close(self) -> None:
        """No more packs come."""
        self._put.close()

    def discard(self) -> None:
        """Nothing of it is wanted any more."""
        self._put.close()
        self._take.close()


@asynccontextmanager
async def sending(layout: Layout, spool: Path | None, progress: Progress, on_sent: OnSent) -> AsyncIterator[Outbox]:
    """An outbox; when the block ends, all that it took is in storage.

    Args:
        layout: Where to.
        spool: A folder for what has to wait, in one of its own there; None keeps it in memory, and `add` waits.
        progress: Counts what is sent.
        on_sent: Told of each pack that is in storage.

    Raises:
        StoreError: A pack was refused for good.
    """
    own = None if spool is None else spool / secrets.token_hex(8)
    outbox = Outbox(layout, own, progress, on_sent)
    try:
        async with alongside(*[outbox.send] * _AT_ONCE):
            yield outbox
            outbox.close()
    finally:
        outbox.discard()
        if own is not None:
            with anyio.CancelScope(shield=True):
                await in_thread(shutil.rmtree, own, ignore_errors=True)


def _spooled(spool: Path, data: bytes) -> Path | None:
    """Keep bytes in a file; None if the disk does not take them."""
    file = spool / secrets.token_hex(8)
    try:
        spool.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    except OSError:
        with suppress(OSError):
            file.unlink()
        return None
    return file


def _unspooled(file: Path) -> bytes:
    try:
        data = file.read_bytes()
        file.unlink()
    except OSError as error:
        raise LocalFileError(str(file), f"can't be read again: {error.strerror}") from None
    return data
