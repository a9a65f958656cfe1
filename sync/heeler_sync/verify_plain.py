"""Reading all plain keys of a prefix and comparing each object with the checksum that it carries."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from blake3 import blake3

from heeler_sync.errors import ObjectNotFoundError, TransientStoreError
from heeler_sync.groups import for_each
from heeler_sync.paths import Location, is_own
from heeler_sync.snapshot.verify import Finding, Kind, OnBytes, Verified
from heeler_sync.store.base import DIGEST_KEY, ObjectInfo, ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying

_AT_ONCE = 4
_DAMAGED_TRIES = 3
_MD5_ETAG = re.compile(r'"([0-9a-f]{32})"')


async def verify_plain(
    store: ObjectStore, location: Location, policy: RetryPolicy, on_bytes: OnBytes = lambda _count: None
) -> Verified:
    """Read all plain keys of a prefix, and compare each with the checksum that it carries.

    Raises:
        UnsafeKeyError: A key can't be named as a path.
        StoreError: Storage refused, or was out of reach for longer than the policy's patience.
    """

    async def collect() -> list[ObjectInfo]:
        return [info async for page in store.list(location.prefix) for info in page]

    listed = await retrying(policy, collect)
    wanted = [info for info in listed if not is_own(info.key.removeprefix(location.prefix))]
    findings: list[Finding] = []

    async def check(info: ObjectInfo) -> None:
        fault = await _plain_fault(store, info, policy)
        on_bytes(info.size)
        if fault is not None:
            findings.append(fault)

    await for_each(wanted, check, _AT_ONCE)
    findings.sort(key=lambda finding: finding.key)
    return Verified(None, tuple(findings), len(wanted), sum(info.size for info in wanted))


async def _plain_fault(store: ObjectStore, listed: ObjectInfo, policy: RetryPolicy) -> Finding | None:
    """What is wrong with an object; None if it is as it was stored, or gone since it was listed."""
    for _ in range(_DAMAGED_TRIES):
        try:
            read = await retrying(policy, lambda: _read_plain(store, listed.key))
        except ObjectNotFoundError:
            return None  # deleted meanwhile, or a folder's marker
        digest, etag = read.info.metadata.get(DIGEST_KEY), _MD5_ETAG.fullmatch(read.info.etag)
        if digest is None and (etag is None or not store.provider.etag_is_md5):
            return Finding(Kind.UNCHECKED, listed.key, "it carries no checksum")
        if read.blake3 == digest or (digest is None and etag is not None and read.md5 == etag.group(1)):
            return None
    return Finding(Kind.DAMAGED, listed.key, "its bytes are not those that it was stored with")


@dataclass(frozen=True)
class _Read:
    info: ObjectInfo
    blake3: str
    md5: str


async def _read_plain(store: ObjectStore, key: str) -> _Read:
    content, md5 = blake3(), hashlib.md5(usedforsecurity=False)
    count = 0

    def sink(data: bytes) -> None:
        nonlocal count
        content.update(data)
        md5.update(data)
        count += len(data)

    info = await store.download(key, sink)
    if count != info.size:
        raise TransientStoreError("GetObject", store.bucket, key, f"{count} of {info.size} bytes came")
    return _Read(info, content.hexdigest(), md5.hexdigest())
