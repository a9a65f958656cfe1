"""Chunks out of storage and into files: ranged reads in parallel, each chunk verified before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import anyio

from heeler_sync.errors import (
    ObjectNotFoundError,
    RangeNotSupportedError,
    ShortAnswerError,
    SyncError,
)
from heeler_sync.groups import for_each
from heeler_sync.snapshot.chunks import DamagedChunkError, unpack_chunk
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.manifest import Place
from heeler_sync.snapshot.packs import PACK_BYTES
from heeler_sync.store.retry import RetryPolicy, retrying
from heeler_sync.threads import in_thread

_AT_ONCE = 8
_GAP = 128 << 10
"""Unwanted bytes between two chunks that are cheaper to read than a request of their own."""
_TRIES = 3

Write = Callable[[bytes, "bytes | bytearray | memoryview"], None]
"""Takes a chunk's digest and its verified bytes; called in worker threads, several at a time."""


class DamagedPackError(SyncError):
    """A pack is missing, too short, or holds other bytes than the manifest says.

    Attributes:
        pack: Its id.
    """

    def __init__(self, layout: Layout, pack: str, detail: str) -> None:
        self.pack = pack
        super().__init__(f"s3://{layout.store.bucket}/{layout.pack_key(pack)} is damaged: {detail}")


@dataclass(frozen=True)
class Span:
    """Neighbouring chunks of one pack, read by one request."""

    pack: str
    offset: int
    length: int
    chunks: tuple[tuple[bytes, Place], ...]


def spans(wanted: Iterable[tuple[bytes, Place]]) -> list[Span]:
    """The requests that bring the wanted chunks."""
    found: list[Span] = []
    group: list[tuple[bytes, Place]] = []
    for digest, place in sorted(wanted, key=lambda item: (item[1].pack, item[1].offset)):
        if group and not _fits(group, place):
            found.append(_span(group))
            group = []
        group.append((digest, place))
    return [*found, _span(group)] if group else found


def _fits(group: list[tuple[bytes, Place]], place: Place) -> bool:
    first, last = group[0][1], group[-1][1]
    near = place.offset - (last.offset + last.stored) <= _GAP
    return place.pack == first.pack and near and place.offset + place.stored - first.offset <= PACK_BYTES


def _span(group: list[tuple[bytes, Place]]) -> Span:
    first, last = group[0][1], group[-1][1]
    return Span(first.pack, first.offset, last.offset + last.stored - first.offset, tuple(group))


async def fetch_chunks(
    layout: Layout, wanted: Mapping[bytes, Place], write: Write, on_bytes: Callable[[int], None], policy: RetryPolicy
) -> None:
    """Read chunks and give each to `write` once, verified.

    Raises:
        DamagedPackError: A pack does not have them, however often it is asked.
        StoreError: Storage refused, or was out of reach for longer than the policy's patience.
    """

    async def one(span: Span) -> None:
        await _fetch(layout, span, write, policy)
        on_bytes(span.length)

    await for_each(spans(wanted.items()), one, _AT_ONCE)


async def _fetch(layout: Layout, span: Span, write: Write, policy: RetryPolicy) -> None:
    fault = ""
    done: set[bytes] = set()
    for turn in range(_TRIES):
        try:
            data = await retrying(policy, lambda: _read(layout, span))
            await in_thread(_take, span, data, write, done)
        except ObjectNotFoundError:
            raise DamagedPackError(layout, span.pack, "it is missing") from None
        except _TooShortError:
            raise DamagedPackError(layout, span.pack, "it is shorter than it was") from None
        except DamagedChunkError as error:
            fault = str(error)
            await anyio.sleep(0.1 * turn)
        else:
            return
    raise DamagedPackError(layout, span.pack, f"a chunk of it {fault}")


class _TooShortError(Exception):
    """The object itself ends before the span does."""


async def _read(layout: Layout, span: Span) -> bytes:
    key = layout.pack_key(span.pack)
    try:
        return await layout.store.read(key, offset=span.offset, length=span.length)
    except RangeNotSupportedError:
        whole = bytearray()
        await layout.store.download(key, whole.extend)
        return bytes(whole[span.offset : span.offset + span.length])
    except ShortAnswerError:
        if (await layout.store.head(key)).size < span.offset + span.length:
            raise _TooShortError from None
        raise


def _take(span: Span, data: bytes, write: Write, done: set[bytes]) -> None:
    view = memoryview(data)
    for digest, place in span.chunks:
        if digest not in done:
            at = place.offset - span.offset
            write(digest, unpack_chunk(view[at : at + place.stored], place.codec, digest, place.size))
            done.add(digest)
