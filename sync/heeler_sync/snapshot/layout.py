"""Where the objects of a prefix's generations lie, and reading the small ones."""

from __future__ import annotations

import re
from dataclasses import dataclass

from blake3 import blake3

from heeler_sync.errors import DamagedHeadError, DamagedObjectError, ObjectNotFoundError, TransientStoreError
from heeler_sync.paths import OWN_FOLDER, Location
from heeler_sync.snapshot.head import Head, Kept, decode_head
from heeler_sync.snapshot.ids import epoch_of
from heeler_sync.snapshot.manifest import BadManifestError, Manifest, decode
from heeler_sync.store.base import ObjectInfo, ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying
from heeler_sync.threads import in_thread

_DAMAGED_TRIES = 3
_MANIFEST = re.compile(r"([1-9][0-9]{0,17})\.([^/]+)\.json\.zst")


@dataclass(frozen=True)
class Owned:
    """What an object's key below `.heeler/` says.

    Attributes:
        epoch: The epoch that wrote it.
        pack: Its id, of a pack.
        manifest: Its id, of a manifest.
        generation: Of a manifest.
    """

    epoch: int
    pack: str | None = None
    manifest: str | None = None
    generation: int = 0


class Layout:
    """One prefix with generations, in one bucket. Its calls are repeated by `policy`."""

    def __init__(self, store: ObjectStore, location: Location, policy: RetryPolicy) -> None:
        self.store = store
        self.location = location
        self.policy = policy
        self.own = location.prefix + OWN_FOLDER + "/"
        self.head_key = self.own + "head.json"

    def __repr__(self) -> str:
        return f"Layout({self.location})"

    def pack_key(self, pack: str) -> str:
        """The key of a pack."""
        return f"{self.own}packs/{pack}"

    def manifest_key(self, kept: Kept) -> str:
        """The key of a generation's manifest."""
        return f"{self.own}manifests/{kept.generation}.{kept.manifest}.json.zst"

    def owned(self, key: str) -> Owned | None:
        """What a key below `.heeler/` says; None for the head and for what is not ours."""
        kind, _, name = key.removeprefix(self.own).partition("/")
        if kind == "packs" and (epoch := epoch_of(name)):
            return Owned(epoch, pack=name)
        found = _MANIFEST.fullmatch(name) if kind == "manifests" else None
        if found and (epoch := epoch_of(found.group(2))):
            return Owned(epoch, manifest=found.group(2), generation=int(found.group(1)))
        return None

    async def read_head(self) -> tuple[Head, str] | None:
        """The head and its ETag; None if there is none.

        Raises:
            DamagedHeadError: It can't be read.
            UnknownFormatError: It was written by a newer heeler.
            StoreError: It can't be had.
        """
        try:
            data, info = await self._read(self.head_key)
        except ObjectNotFoundError:
            return None
        try:
            return decode_head(data), info.etag
        except ValueError as error:
            raise DamagedHeadError(str(self.location), f"the head {self.head_key} {error}") from None

    async def read_manifest(self, kept: Kept) -> Manifest:
        """The manifest of a generation, verified.

        Raises:
            DamagedObjectError: It is missing, or not what the head says that it is.
            UnknownFormatError: It was written by a newer heeler.
            StoreError: It can't be had.
        """
        key = self.manifest_key(kept)
        detail = ""
        for _ in range(_DAMAGED_TRIES):
            try:
                data, _ = await self._read(key)
            except ObjectNotFoundError:
                raise DamagedObjectError(self.store.bucket, key, "it is missing") from None
            if blake3(data).hexdigest() != kept.digest:
                detail = "its digest is not the one that the head lists"
                continue
            try:
                return await in_thread(decode, data)  # of 100,000 files, it takes seconds
            except BadManifestError as error:
                detail = f"it {error}"
        raise DamagedObjectError(self.store.bucket, key, detail)

    async def _read(self, key: str) -> tuple[bytes, ObjectInfo]:
        return await retrying(self.policy, lambda: read_object(self.store, key))


async def read_object(store: ObjectStore, key: str) -> tuple[bytes, ObjectInfo]:
    """A small object, whole, and what the store tells of it."""
    collected = bytearray()
    info = await store.download(key, collected.extend)
    if len(collected) != info.size:
        raise TransientStoreError("GetObject", store.bucket, key, f"{len(collected)} of {info.size} bytes came")
    return bytes(collected), info
