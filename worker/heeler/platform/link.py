"""Measures the way to the bucket and back with objects of random bytes, which are gone afterwards."""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Awaitable, Callable
from functools import partial

import anyio

from heeler.errors import UsageError
from heeler.files import default_sync
from heeler.job import InvalidJobError
from heeler.settings import Settings
from heeler.status import Status
from heeler_sync.errors import BadLocationError, PermanentStoreError, StoreError, TransientStoreError
from heeler_sync.groups import for_each
from heeler_sync.paths import OWN_FOLDER, Location, location, parse_location
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying
from heeler_sync.threads import in_thread

_MIB = 1 << 20
_SIZES = (_MIB // 4, _MIB, 4 * _MIB, 16 * _MIB, 64 * _MIB)
"""Of the probes, one after the other: what a slow link carries in a moment, and what a fast one needs to be seen."""
_IN_PARTS = 8 * _MIB
"""Objects above this size go in parts, several at a time, as files do."""
_SECONDS = 2.0
"""A measurement that took so long is good enough."""
_PATIENT_SECONDS = 10.0
"""So long a write may take that is not measured: there has to be something large to read."""
_READ_SECONDS = 4.0
_READ_BYTES = 64 * _MIB
_READS_AT_ONCE = 4
_TIDY_SECONDS = 10.0
_JOB_ID = "{job_id}"
_MB = 1_000_000


def probe_place(settings: Settings) -> Location:
    """Where probes are written: the bucket of the checks, else that of checkpoints, outputs or inputs.

    Raises:
        UsageError: There is none, or it is no s3://bucket/prefix/.
    """
    try:
        if settings.check_bucket is not None:
            return parse_location(settings.check_bucket)
        spec = default_sync(settings)
    except BadLocationError as error:
        raise UsageError(f"--check-bucket: {error}") from None
    except InvalidJobError as error:
        raise UsageError(str(error)) from None
    for entry in (*spec.during, *spec.after, *spec.before):
        above, job_id, _ = entry.prefix.partition(_JOB_ID)
        return location(entry.bucket, above.rpartition("/")[0] if job_id else above)
    raise UsageError("--check-uplink and --check-downlink need a bucket: set --check-bucket to s3://BUCKET/PREFIX/")


class Link:
    """The way to one bucket and back."""

    def __init__(self, store: ObjectStore, place: Location, settings: Settings, status: Status) -> None:
        """Args: the bucket, where in it, how fast is fast enough, and who is told."""
        self._store = store
        self._place = place
        self._uplink = settings.check_uplink
        self._downlink = settings.check_downlink
        self._status = status
        self._policy = RetryPolicy(patience=settings.startup_timeout, on_retry=self._retried)
        self._probes: list[str] = []

    async def reasons(self) -> list[str]:
        """Why the link is not good enough; empty if it is. No probe is left, whatever happens.

        Raises:
            UsageError: The bucket refuses us.
        """
        try:
            return await self._measure()
        except TransientStoreError as error:  # storage has answered before: see `heeler.storage.check`
            return [f"no probe of the link to storage came through: {error}"]
        except PermanentStoreError as error:
            words = "storage refuses the probe of --check-uplink or --check-downlink"
            raise UsageError(f"{words}: {error}; check --check-bucket and what the keys may do") from None
        finally:
            with anyio.move_on_after(_TIDY_SECONDS, shield=True) as scope:
                await self._tidy()
            if scope.cancelled_caught:
                self._status.fault("probe_left", error=f"{self._place}: probes can't be deleted in {_TIDY_SECONDS:g} s")

    async def _measure(self) -> list[str]:
        uplink, key, size = await self._write()
        self._status.event("uplink_measured", bytes_per_second=round(uplink))
        if self._uplink is not None and uplink < self._uplink:
            return [_too_slow("uplink", uplink, self._uplink)]
        if self._downlink is None:
            return []
        downlink = await self._read(key, size)
        self._status.event("downlink_measured", bytes_per_second=round(downlink))
        return [_too_slow("downlink", downlink, self._downlink)] if downlink < self._downlink else []

    async def _write(self) -> tuple[float, str, int]:
        """Write larger and larger objects until that is enough; the best rate, and the last one's key and size."""
        best, key, size = 0.0, "", 0
        for size in _SIZES:
            key = self._place.key(f"{OWN_FOLDER}/probe-{secrets.token_hex(8)}")
            self._probes.append(key)
            try:
                seconds = await retrying(self._policy, partial(self._write_one, key, size))
            except PermanentStoreError:
                self._probes.remove(key)  # refused, so it is not there
                raise
            best = max(best, size / seconds)
            fast = self._uplink is None or best >= self._uplink
            large = self._downlink is None or size * _READS_AT_ONCE >= self._downlink
            if (fast and large) or seconds >= (_SECONDS if self._uplink is not None else _PATIENT_SECONDS):
                break
        return best, key, size

    async def _write_one(self, key: str, size: int) -> float:
        """The seconds that it took."""
        if size > _IN_PARTS:
            return await _timed(lambda: self._store.upload(key, _RandomBytes(size)))
        data = await in_thread(os.urandom, size)
        return await _timed(lambda: self._store.put(key, data))

    async def _read(self, key: str, size: int) -> float:
        """Read an object again and again, several times at once; the rate of them all."""
        counter = _Counter()

        async def read(_number: int) -> None:
            await retrying(self._policy, lambda: self._store.download(key, counter.take))

        async def read_all() -> None:
            with anyio.move_on_after(_READ_SECONDS):
                await for_each(range(max(_READS_AT_ONCE, _READ_BYTES // size)), read, _READS_AT_ONCE)

        seconds = await _timed(read_all)
        return counter.count / seconds

    async def _tidy(self) -> None:
        for key in self._probes:
            try:
                await retrying(self._policy, partial(self._store.delete, key))
            except StoreError as error:
                self._status.fault("probe_left", error=str(error))

    def _retried(self, error: StoreError, delay: float) -> None:
        self._status.fault("storage_retried", error=str(error), retry_in=round(delay, 3))


def _too_slow(name: str, measured: float, asked: int) -> str:
    words = f"at least {figure(asked / _MB)} MB/s asked for by --check-{name}"
    return f"{name} {figure(measured / _MB)} MB/s, {words}"


def figure(value: float) -> str:
    """A number as people write it, with three digits that count."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


async def _timed(call: Callable[[], Awaitable[object]]) -> float:
    begun = anyio.current_time()
    await call()
    return max(1e-6, anyio.current_time() - begun)


class _RandomBytes:
    """A reader of so many bytes that nobody can compress."""

    def __init__(self, size: int) -> None:
        self._left = size

    def read(self, size: int = -1, /) -> bytes:
        size = self._left if size < 0 else min(size, self._left)
        self._left -= size
        return os.urandom(size)


class _Counter:
    """Counts the bytes of downloads, which come in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.count = 0

    def take(self, data: bytes) -> None:
        with self._lock:
            self.count += len(data)
