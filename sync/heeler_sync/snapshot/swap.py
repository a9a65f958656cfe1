"""Writing the head by compare-and-swap, and never guessing what became of a write.

Any answer but a plain success is resolved by reading the head and looking for the id of our write: a 412 too, since a
client library or a proxy may have sent the request twice, so that our own success comes back as a failure.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from heeler_sync.errors import (
    AccessDeniedError,
    DamagedHeadError,
    FencedError,
    NoSuchBucketError,
    ObjectNotFoundError,
    PreconditionFailedError,
    StoreError,
    TransientStoreError,
    UnfencedStoreError,
)
from heeler_sync.snapshot.head import Head, encode_head
from heeler_sync.snapshot.layout import Layout
from heeler_sync.store.base import Condition
from heeler_sync.store.retry import retrying

SPACING = 1.05
"""Seconds between two writes of one head: R2 takes one write per key and second (DESIGN 10)."""


@dataclass(frozen=True)
class Written:
    """A head as it is in storage, and its ETag."""

    head: Head
    etag: str


class HeadWriter:
    """Writes one prefix's head. One call at a time."""

    def __init__(self, layout: Layout, *, fenced: bool = True, wall: Callable[[], float] = time.time) -> None:
        """Args: with `fenced` off, a store that ignores conditions is trusted all the same (`--allow-unfenced`)."""
        self._layout = layout
        self._fenced = fenced
        self._wall = wall
        self._last = float("-inf")
        self.unanswered: set[str] = set()
        """The ids of writes that were given up without an answer: they may have taken effect, or may yet."""

    @property
    def now(self) -> float:
        """Wall time in seconds, for what people read."""
        return self._wall()

    async def write(self, head: Head, over: Written | None) -> Written:
        """Put `head` in the place of `over` (None: of nothing), if that is still what is there.

        Raises:
            FencedError: Somebody else wrote it; whether ours was written before that, `wrote` of the error says.
            StoreError: Refused for good, or out of reach for longer than the policy's patience.
        """
        signed = head.signed(self._wall())
        condition = Condition(if_match=over.etag) if over is not None else Condition(if_absent=True)
        data = encode_head(signed)

        async def attempt() -> Written:
            await self._wait_for_spacing()
            try:
                etag = await self._put(data, condition)
            except (AccessDeniedError, NoSuchBucketError):
                raise
            except StoreError as error:
                return await self._resolve(signed, over, error)
            finally:
                self._last = anyio.current_time()
            if not etag:
                untold = TransientStoreError("PutObject", self._layout.store.bucket, self._layout.head_key, "no ETag")
                return await self._resolve(signed, over, untold)
            return Written(signed, etag)

        self.unanswered.add(signed.writes[-1])
        written = await retrying(self._layout.policy, attempt)
        self.unanswered.clear()  # any other write of ours that is still under way names an ETag that is gone
        return written

    async def _put(self, data: bytes, condition: Condition) -> str:
        used = condition if self._fenced else None
        return await self._layout.store.put(self._layout.head_key, data, condition=used)

    async def _resolve(self, signed: Head, over: Written | None, error: StoreError) -> Written:
        """What became of a write without a plain success.

        Raises:
            TransientStoreError: It has not taken effect. The same write may be sent again: if both arrive, the second
                finds another ETag.
            FencedError: Another write came, instead of ours or after it.
            EarlierWriteError: One of ours did, that had been given up, and that is not what we write over.
        """
        found = await self._layout.read_head()
        mine = signed.writes[-1]
        if found is not None and found[0].writes[-1] == mine:
            return Written(*found)
        if found is not None and (over is None or found[1] != over.etag):
            if found[0].writes[-1] in self.unanswered:
                raise EarlierWriteError
            raise fenced_by(self._layout, found[0], wrote=mine in found[0].writes)
        if found is None and over is not None:
            raise DamagedHeadError(str(self._layout.location), "its head was deleted while it was held")
        if isinstance(error, TransientStoreError | PreconditionFailedError | ObjectNotFoundError):
            raise TransientStoreError(error.operation, error.bucket, error.key, error.detail)
        raise error

    async def _wait_for_spacing(self) -> None:
        await anyio.sleep(max(0.0, self._last + SPACING - anyio.current_time()))


class EarlierWriteError(Exception):
    """A write of our own that had been given up took effect meanwhile: what is to be written follows from that head."""


class OvertakenError(FencedError):
    """A `FencedError` of a write, which knows of it.

    Attributes:
        wrote: Whether our own write took effect before the other's.
        head: What is there now.
    """

    def __init__(self, location: str, head: Head, *, wrote: bool) -> None:
        self.wrote = wrote
        self.head = head
        super().__init__(location, head.holder, head.epoch, head.acquired)


def fenced_by(layout: Layout, head: Head, *, wrote: bool = False) -> OvertakenError:
    """The error that says who holds the prefix."""
    return OvertakenError(str(layout.location), head, wrote=wrote)


async def probe(layout: Layout) -> bool:
    """Whether the store refuses a write whose condition does not hold; writes nothing where it does.

    An If-Match on a key that does not exist can't hold: S3, R2, MinIO and moto answer 404 or 412, others write.
    """
    if not layout.store.provider.conditional_writes:
        return False
    key = f"{layout.own}probe-{secrets.token_hex(8)}"
    impossible = Condition(if_match='"00000000000000000000000000000000"')

    async def attempt() -> bool:
        try:
            await layout.store.put(key, b"heeler asks whether conditions are enforced\n", condition=impossible)
        except (PreconditionFailedError, ObjectNotFoundError):
            return True
        return False

    if await retrying(layout.policy, attempt):
        return True
    await retrying(layout.policy, lambda: layout.store.delete(key))
    return False


async def require_fence(layout: Layout) -> None:
    """Refuse a store that ignores conditions.

    Raises:
        UnfencedStoreError: It does.
    """
    if not await probe(layout):
        raise UnfencedStoreError(layout.store.bucket)
