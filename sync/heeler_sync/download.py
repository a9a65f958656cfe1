"""Objects to files: to a temporary name, resumed where it was cut, verified, then renamed into place.

A download that brings bytes goes on for ever; one that brings none gives up after the policy's patience. A listing
or an object that can't be had is an error, never an empty folder.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import anyio
from blake3 import blake3

from heeler_sync.errors import (
    DamagedObjectError,
    LocalFileError,
    ObjectNotFoundError,
    PreconditionFailedError,
    RangeNotSupportedError,
    TransientStoreError,
)
from heeler_sync.paths import OWN_FOLDER, Location, is_own, relative_path
from heeler_sync.store.base import DIGEST_KEY, ObjectInfo, ObjectStore
from heeler_sync.store.retry import RetryPolicy
from heeler_sync.threads import in_thread
from heeler_sync.tree import Stamp
from heeler_sync.upload import Stored, digest_file

_MD5_ETAG = re.compile(r'"([0-9a-f]{32})"')
_DAMAGED_TRIES = 3
_RESTARTS = 20


@dataclass(frozen=True)
class Wanted:
    """An object that belongs at `relative` below a folder."""

    store: ObjectStore
    info: ObjectInfo
    relative: str


async def list_wanted(store: ObjectStore, location: Location, include: Callable[[str], bool]) -> list[Wanted]:
    """All objects below a location that are a job's files.

    Raises:
        UnsafeKeyError: A key has no place inside the folder.
        StoreError: The listing can't be had.
    """
    wanted = []
    async for page in store.list(location.prefix):
        for info in page:
            relative = relative_path(info.key, location.prefix)
            if not is_own(relative) and include(relative):
                wanted.append(Wanted(store, info, relative))
    return wanted


async def in_place(wanted: Wanted, root: Path) -> Stored | None:
    """What is known of the file that is already where the object belongs, if its content is the object's.

    Raises:
        StoreError: The object can't be asked.
    """
    if not await in_thread(_may_be_in_place, root, wanted):
        return None
    info = await wanted.store.head(wanted.info.key)
    expected = info.metadata.get(DIGEST_KEY)
    if expected is None or (wanted.info.exact and info.size != wanted.info.size):
        return None
    if not wanted.info.exact and not await in_thread(_may_be_in_place, root, replace(wanted, info=info)):
        return None
    found = await in_thread(digest_file, root, wanted.relative)
    return replace(found, etag=info.etag) if found.digest == expected else None


def _may_be_in_place(root: Path, wanted: Wanted) -> bool:
    """Whether a real file of that size, if it is known, is there, not reached through a symbolic link. Blocks."""
    path = root / wanted.relative
    direct = os.path.realpath(path) == os.path.join(os.path.realpath(root), wanted.relative)  # noqa: PTH118
    return direct and path.is_file() and (not wanted.info.exact or path.stat().st_size == wanted.info.size)


async def fetch(wanted: Wanted, root: Path, policy: RetryPolicy) -> Stored | None:
    """Download one object to its place below `root`; None if it was a folder marker.

    Raises:
        StoreError: It can't be had.
        DamagedObjectError: Its bytes are not what its digest says, several times over.
        LocalFileError: The file can't be written.
    """
    reason = "never as stored"
    for _ in range(_DAMAGED_TRIES):
        partial = _Partial(root, wanted)
        try:
            info = await partial.fill(policy)
            if partial.verified(info):
                return replace(await in_thread(partial.move_into_place), etag=info.etag)
        except DamagedObjectError as error:
            reason = error.detail
        except ObjectNotFoundError:
            # obstore lists a folder marker "a/" as "a" of no bytes; there is no such object to get.
            if wanted.info.size == 0:
                await in_thread(_make_folder, root / wanted.relative)
                return None
            raise
        except OSError as error:
            raise LocalFileError(str(root / wanted.relative), f"cannot be written: {error.strerror}") from None
        finally:
            partial.discard()
    raise DamagedObjectError(wanted.store.bucket, wanted.info.key, f"read {_DAMAGED_TRIES} times, {reason}")


class _Partial:
    """A download on its way, under a temporary name in heeler's own folder of the same tree."""

    def __init__(self, root: Path, wanted: Wanted) -> None:
        self._root = root
        self._wanted = wanted
        self._path = root / OWN_FOLDER / "incoming" / secrets.token_hex(8)
        self._etag = wanted.info.etag
        self._taken = 0
        self._restart()

    def _restart(self) -> None:
        self._taken = 0
        self._blake3 = blake3()
        self._md5 = hashlib.md5(usedforsecurity=False)

    async def fill(self, policy: RetryPolicy) -> ObjectInfo:
        """Download until the object is whole, going on where a cut left it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        backoff = policy.backoff()
        last_progress = anyio.current_time()
        restarts = 0
        with self._path.open("wb") as file:
            while True:
                before = self._taken
                try:
                    return await self._attempt(file)
                except (PreconditionFailedError, RangeNotSupportedError) as refused:
                    restarts += 1
                    if restarts > _RESTARTS:
                        raise TransientStoreError(
                            "GetObject", refused.bucket, refused.key, f"never whole: {refused.detail}"
                        ) from None
                    await self._start_over(file)
                    continue
                except TransientStoreError as transient:
                    error = transient
                if self._taken > before:
                    backoff.reset()
                    last_progress = anyio.current_time()
                if policy.patience is not None and anyio.current_time() - last_progress > policy.patience:
                    raise error
                delay = backoff.next()
                policy.on_retry(error, delay)
                await anyio.sleep(delay)

    async def _attempt(self, file: BinaryIO) -> ObjectInfo:
        store, key = self._wanted.store, self._wanted.info.key
        if self._taken and self._wanted.info.exact and self._taken == self._wanted.info.size:
            return await store.head(key)  # cut after the last byte: nothing is left to ask for by range
        if self._taken and not store.provider.ranges:
            raise RangeNotSupportedError("GetObject", store.bucket, key, "cut, and the provider has no ranges")

        def sink(data: bytes) -> None:
            file.write(data)
            self._blake3.update(data)
            self._md5.update(data)
            self._taken += len(data)

        info = await store.download(key, sink, offset=self._taken, if_match=self._etag or None)
        if self._taken != info.size:
            detail = f"the answer ended after {self._taken} of {info.size} bytes"
            raise TransientStoreError("GetObject", store.bucket, key, detail)
        return info

    async def _start_over(self, file: BinaryIO) -> None:
        """The object is another one by now, or the store has no ranges: from the first byte on."""
        info = await self._wanted.store.head(self._wanted.info.key)
        self._etag = info.etag
        file.seek(0)
        file.truncate()
        self._restart()

    def verified(self, info: ObjectInfo) -> bool:
        """Whether the bytes are the object's, as far as the store lets us know."""
        expected = info.metadata.get(DIGEST_KEY)
        if expected is not None:
            return bool(self._blake3.hexdigest() == expected)
        etag = _MD5_ETAG.fullmatch(info.etag)
        if etag and self._wanted.store.provider.etag_is_md5:
            return self._md5.hexdigest() == etag.group(1)
        return self._taken == info.size

    def move_into_place(self) -> Stored:
        """Rename the finished file to where it belongs."""
        target = self._root / self._wanted.relative
        _make_folder(target.parent)
        if target.is_dir() and not target.is_symlink():
            raise LocalFileError(str(target), "is a folder, and an object of that name is to be a file")
        self._path.replace(target)
        return Stored(Stamp.of(target.stat()), self._blake3.hexdigest())

    def discard(self) -> None:
        """Remove what is left of it."""
        self._path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise LocalFileError(str(folder), "is a file, and objects below that name want a folder") from None


def check_space(root: Path, needed: int) -> None:
    """Refuse a download that can't fit. Blocks.

    Raises:
        LocalFileError: Fewer than `needed` bytes are free on the folder's file system.
    """
    free = shutil.disk_usage(root).free
    if free < needed:
        raise LocalFileError(str(root), f"{needed} bytes are to be downloaded and {free} are free")
