"""What is stored: buckets, objects and unfinished multipart uploads, and the rules of writing them.

Thread-safe: the server's loop and the test's own thread use the same store under one lock.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field

from .body import Body
from .errors import S3Error
from .rules import Rules

MAX_KEY = 1024
"""Bytes of a key (S3 and R2)."""


@dataclass(slots=True)
class StoredObject:
    """One version of one key."""

    body: Body
    etag: str
    """Without quotes."""
    modified: float
    """Seconds since the epoch."""
    headers: dict[str, str] = field(default_factory=dict)
    """Content-Type, x-amz-meta-* and the like, returned as they came."""
    checksums: dict[str, str] = field(default_factory=dict)
    """x-amz-checksum-* of the whole object, base64."""
    part_sizes: tuple[int, ...] = ()
    """Sizes of its parts, in bytes, if it came as a multipart upload."""


@dataclass(slots=True)
class Part:
    """One uploaded part."""

    number: int
    body: Body
    etag: str
    modified: float
    checksums: dict[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Upload:
    """One unfinished multipart upload."""

    upload_id: str
    key: str
    started: float
    headers: dict[str, str]
    parts: dict[int, Part] = field(default_factory=dict)


class Bucket:
    """One bucket's objects and uploads."""

    def __init__(self, name: str, created: float) -> None:
        """Start empty."""
        self.name = name
        self.created = created
        self.objects: dict[str, StoredObject] = {}
        self.keys: list[str] = []
        """Sorted; by code points, which is the order of their UTF-8 bytes."""
        self.uploads: dict[str, Upload] = {}
        self.history: dict[str, list[StoredObject | None]] = {}
        self.last_writes: dict[str, float] = {}


@dataclass(frozen=True, slots=True)
class Conditions:
    """Preconditions of a write, as the headers gave them."""

    if_match: str | None = None
    if_none_match: str | None = None

    def check(self, current: StoredObject | None, rules: Rules) -> None:
        """Refuse the write unless the conditions hold.

        Raises:
            S3Error: PreconditionFailed; NoSuchKey for If-Match where there is no object; NotImplemented for
                If-None-Match with anything but `*`, as S3 documents.
        """
        if self.if_none_match is not None:
            if self.if_none_match.strip() != "*":
                raise S3Error("NotImplemented", "If-None-Match on a write takes only *")
            if current is not None:
                raise S3Error("PreconditionFailed")
        if self.if_match is not None:
            if current is None:
                raise S3Error("NoSuchKey" if rules.if_match_missing == 404 else "PreconditionFailed")
            if not etag_matches(self.if_match, current.etag):
                raise S3Error("PreconditionFailed")


def etag_matches(header: str, etag: str) -> bool:
    """Whether a list of ETags in a header, or `*`, names this one."""
    texts = [text.strip().removeprefix("W/").strip('"') for text in header.split(",")]
    return "*" in texts or etag in texts


UNCONDITIONAL = Conditions()


class Store:
    """Every bucket of the server."""

    def __init__(
        self,
        rules: Rules,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """Start without buckets; `monotonic` times the writes of a key, `wall` dates objects."""
        self.rules = rules
        self.lock = threading.RLock()
        self._monotonic = monotonic
        self.now = wall
        self._buckets: dict[str, Bucket] = {}
        self._names = itertools.count(1)

    def unique(self) -> str:
        """A name never given before by this server, 32 hexadecimal digits."""
        return hashlib.md5(f"{id(self)}-{next(self._names)}-{time.time_ns()}".encode()).hexdigest()

    def create_bucket(self, name: str) -> None:
        """Make a bucket.

        Raises:
            S3Error: BucketAlreadyOwnedByYou.
        """
        with self.lock:
            if name in self._buckets:
                raise S3Error("BucketAlreadyOwnedByYou")
            self._buckets[name] = Bucket(name, self.now())

    def delete_bucket(self, name: str) -> None:
        """Remove an empty bucket.

        Raises:
            S3Error: NoSuchBucket, BucketNotEmpty.
        """
        with self.lock:
            if self.bucket(name).objects:
                raise S3Error("BucketNotEmpty")
            del self._buckets[name]

    def buckets(self) -> list[Bucket]:
        """Every bucket, by name."""
        with self.lock:
            return [self._buckets[name] for name in sorted(self._buckets)]

    def bucket(self, name: str) -> Bucket:
        """A bucket.

        Raises:
            S3Error: NoSuchBucket.
        """
        try:
            return self._buckets[name]
        except KeyError:
            raise S3Error("NoSuchBucket") from None

    def get(self, bucket: str, key: str) -> StoredObject:
        """An object.

        Raises:
            S3Error: NoSuchBucket, NoSuchKey.
        """
        try:
            return self.bucket(bucket).objects[key]
        except KeyError:
            raise S3Error("NoSuchKey") from None

    def put(
        self,
        bucket: str,
        key: str,
        stored: StoredObject,
        conditions: Conditions = UNCONDITIONAL,
        *,
        limited: bool = True,
    ) -> None:
        """Write an object if the rules let it; `limited=False` skips the limit of writes a second.

        Raises:
            S3Error: NoSuchBucket, KeyTooLongError, TooManyRequests and what `Conditions.check` raises.
        """
        with self.lock:
            place = self.bucket(bucket)
            check_key(key)
            if limited:
                self._check_rate(place, key)
            conditions.check(place.objects.get(key), self.rules)
            if self.rules.write_interval:
                place.last_writes[key] = self._monotonic()
            if key not in place.objects:
                insort(place.keys, key)
            place.objects[key] = stored
            if self.rules.keep_history:
                place.history.setdefault(key, []).append(stored)

    def _check_rate(self, place: Bucket, key: str) -> None:
        interval = self.rules.write_interval
        last = place.last_writes.get(key) if interval else None
        if last is not None and self._monotonic() - last < interval:
            raise S3Error(
                self.rules.write_limit_code,
                "Reduce your concurrent request rate for the same object.",
                status=429,
            )

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object; a missing one is fine.

        Raises:
            S3Error: NoSuchBucket.
        """
        with self.lock:
            place = self.bucket(bucket)
            if place.objects.pop(key, None) is not None:
                del place.keys[bisect_left(place.keys, key)]
                if self.rules.keep_history:
                    place.history.setdefault(key, []).append(None)

    def start_upload(self, bucket: str, key: str, headers: dict[str, str]) -> Upload:
        """Begin a multipart upload.

        Raises:
            S3Error: NoSuchBucket, KeyTooLongError.
        """
        with self.lock:
            place = self.bucket(bucket)
            check_key(key)
            upload = Upload(self.unique(), key, self.now(), headers)
            place.uploads[upload.upload_id] = upload
            return upload

    def upload(self, bucket: str, key: str, upload_id: str) -> Upload:
        """An unfinished multipart upload.

        Raises:
            S3Error: NoSuchBucket, NoSuchUpload.
        """
        found = self.bucket(bucket).uploads.get(upload_id)
        if found is None or found.key != key:
            raise S3Error("NoSuchUpload")
        return found

    def end_upload(self, bucket: str, key: str, upload_id: str) -> None:
        """Forget an upload and its parts.

        Raises:
            S3Error: NoSuchBucket, NoSuchUpload.
        """
        with self.lock:
            self.upload(bucket, key, upload_id)
            del self.bucket(bucket).uploads[upload_id]


def check_key(key: str) -> None:
    """Refuse a key that is too long.

    Raises:
        S3Error: KeyTooLongError.
    """
    if len(key) * 4 > MAX_KEY and len(key.encode()) > MAX_KEY:
        raise S3Error("KeyTooLongError")
