"""What can go wrong between files and objects, as one small tree.

Every error says what failed and on what. Two questions decide what a caller does, and the types answer them:
may the same call succeed later (`TransientStoreError`), or does somebody have to change something first?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from typing import Any


class SyncError(Exception):
    """The root of everything that `heeler_sync` raises on purpose."""


class StoreError(SyncError):
    """A call to the object store did not succeed.

    Attributes:
        operation: The call, as S3 names it ("PutObject", "ListObjects" ...).
        bucket: The bucket asked.
        key: The key or prefix asked; empty where the call has none.
        detail: What the store or the network said, without credentials or signed URLs.
    """

    def __init__(self, operation: str, bucket: str, key: str, detail: str) -> None:
        self.operation = operation
        self.bucket = bucket
        self.key = key
        self.detail = detail
        super().__init__(f"{operation} s3://{bucket}/{key}: {detail}")


class TransientStoreError(StoreError):
    """The store was busy, broken or out of reach: the same call may succeed later."""


class ShortAnswerError(TransientStoreError):
    """Fewer bytes came than were asked for: the connection was cut, or the object is shorter than it was."""


class PermanentStoreError(StoreError):
    """The store refused, and will refuse again until somebody changes something."""


class AccessDeniedError(PermanentStoreError):
    """The credentials are wrong or may not do this (401, 403)."""


class NoSuchBucketError(PermanentStoreError):
    """The bucket does not exist at this endpoint."""


class ObjectNotFoundError(PermanentStoreError):
    """The key does not exist."""


class PreconditionFailedError(PermanentStoreError):
    """The object is not, or no longer, the one that the condition named (412)."""


class RangeNotSupportedError(PermanentStoreError):
    """The store answers a range with something else: read the object from its start."""


class UnsafeKeyError(SyncError):
    """An object's key has no place inside the folder that it would be downloaded to.

    Attributes:
        key: The key, as the store lists it.
        reason: What is wrong with it.
    """

    def __init__(self, key: str, reason: str) -> None:
        self.key = key
        self.reason = reason
        super().__init__(f"object key {key!r} is refused: {reason}; rename or delete the object")


class DamagedObjectError(SyncError):
    """An object's bytes are not the ones that were stored under its digest."""

    def __init__(self, bucket: str, key: str, detail: str) -> None:
        self.bucket = bucket
        self.key = key
        self.detail = detail
        super().__init__(f"s3://{bucket}/{key} is damaged: {detail}")


class ObjectReplacedError(SyncError):
    """Somebody else wrote or deleted an object that was ours: another worker may hold the job by now."""

    def __init__(self, bucket: str, key: str) -> None:
        self.bucket = bucket
        self.key = key
        super().__init__(f"s3://{bucket}/{key} was changed by somebody else")


class FencedError(SyncError):
    """Another worker has acquired the prefix since we did: nothing of ours is to change there any more.

    Attributes:
        location: The prefix.
        holder: Who holds it now.
        epoch: Its epoch.
        since: When it was acquired, seconds since 1970.
    """

    def __init__(self, location: str, holder: str, epoch: int, since: float) -> None:
        self.location = location
        self.holder = holder
        self.epoch = epoch
        self.since = since
        super().__init__(f"{location} is held by {holder} (epoch {epoch}) since {_as_date(since)}")


def _as_date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
    except (ValueError, OverflowError, OSError):  # a head is not ours alone to write
        return "an impossible time"


class FinishedError(SyncError):
    """The job is done already: nothing is to be run or restored.

    Attributes:
        result: What it left.
    """

    def __init__(self, result: Mapping[str, Any]) -> None:
        self.result = result
        super().__init__("the job is done already")


class PrefixTakenError(SyncError):
    """A prefix belongs to another job, for good.

    Attributes:
        location: The prefix.
        job_id: The job that it belongs to.
    """

    def __init__(self, location: str, job_id: str) -> None:
        self.location = location
        self.job_id = job_id
        super().__init__(f"{location} holds the checkpoints of job {job_id}; give this job a prefix of its own")


class DamagedHeadError(SyncError):
    """The head can't be read, or is missing where generations are: only a person may decide what to go on from.

    Attributes:
        location: The prefix, as s3://bucket/prefix/.
    """

    def __init__(self, location: str, detail: str) -> None:
        self.location = location
        super().__init__(f"{location}: {detail}; stop its workers and run: heeler sync repair {location}")


class NoGenerationError(SyncError):
    """Every generation of a prefix is damaged: nothing can be restored, and nothing starts from zero."""

    def __init__(self, location: str, reasons: Sequence[str]) -> None:
        said = "; ".join(reasons) or "none of them can be read"
        super().__init__(f"{location} has no generation that can be restored: {said}")


class UnfencedStoreError(SyncError):
    """The store does not refuse a write whose condition fails, so no worker could be kept out."""

    def __init__(self, bucket: str) -> None:
        super().__init__(
            f"the storage of bucket {bucket} does not enforce If-Match, which snapshots need;"
            " use mode mirror, other storage, or --allow-unfenced at your own risk"
        )


class NotNowError(SyncError):
    """The tree can't be had at one instant now.

    Attributes:
        path: The file that hinders, relative.
    """

    def __init__(self, path: str, detail: str) -> None:
        self.path = path
        super().__init__(f"{path} {detail}")


class PermitInDoubtError(SyncError):
    """The right to change storage is in doubt; what was under way had no effect. Ask for it anew and repeat."""


class LocalFileError(SyncError):
    """A local folder or file can't be used as asked: missing rights, a full disk, a path in the way.

    Attributes:
        path: The folder or file.
    """

    def __init__(self, path: str, detail: str) -> None:
        self.path = path
        super().__init__(f"{path}: {detail}")


class FolderBusyError(LocalFileError):
    """Another process uses the folder for a job of its own."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "is in use by another job; give workers on one machine folders of their own")


class FileChangedError(SyncError):
    """A file changed while it was read, so what was read is no state that it ever had. Read it again."""

    def __init__(self, path: str) -> None:
        self.path = path
        super().__init__(f"{path} changed while it was read")


class BadLocationError(SyncError, ValueError):
    """A storage address is not of the form s3://bucket/prefix/."""
