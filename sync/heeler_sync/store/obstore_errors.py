"""obstore's exceptions, which carry S3's answer as text, turned into ours.

Only the status, S3's error code and S3's own sentence are kept: the rest of the text is a debug dump.
"""

from __future__ import annotations

import re

from heeler_sync.errors import (
    AccessDeniedError,
    NoSuchBucketError,
    ObjectNotFoundError,
    PermanentStoreError,
    PreconditionFailedError,
    RangeNotSupportedError,
    StoreError,
    SyncError,
    TransientStoreError,
    UnsafeKeyError,
)

_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([^<]{1,100})</Code>")
_MESSAGE = re.compile(r"<Message>([^<]{1,300})</Message>")
_PATH = re.compile(r'path: "((?:[^"\\]|\\.)*)"')

_TRANSIENT_CODES = {
    "RequestTimeout",  # 400: the body did not arrive in time
    "BadDigest",
    "XAmzContentSHA256Mismatch",
    "OperationAborted",
    "ConditionalRequestConflict",
}
_NETWORK = (
    ("Connection refused", "connection refused"),
    ("ConnectionRefused", "connection refused"),
    ("Connection reset", "connection reset"),
    ("ConnectionReset", "connection reset"),
    ("dns error", "the host name can't be resolved"),
    ("certificate", "the TLS certificate is not trusted"),
    ("TimedOut", "no answer in time"),
    ("timed out", "no answer in time"),
    ("IncompleteMessage", "the connection was closed before the answer ended"),
    ("error decoding response body", "the connection was cut within the body"),
)


def store_error(operation: str, bucket: str, key: str, error: Exception) -> SyncError:
    """The error of ours that an exception of obstore's stands for."""
    text = str(error)
    if "Could not parse path" in text or type(error).__name__ == "InvalidPathError":
        found = _PATH.search(text)
        return UnsafeKeyError(
            found.group(1) if found else key, "it has an empty, '.' or '..' part, or a control character"
        )
    if "non-partial response" in text or "NotPartial" in text:
        return RangeNotSupportedError(operation, bucket, key, "the store answers a range with the whole object")
    status = _STATUS.search(text)
    if status is None:
        return _without_status(operation, bucket, key, error, text)
    return _with_status(operation, bucket, key, int(status.group(1)), text)


def _with_status(operation: str, bucket: str, key: str, status: int, text: str) -> StoreError:
    code = _first(_CODE, text)
    detail = " ".join(part for part in (str(status), code, _first(_MESSAGE, text)) if part)
    if code in _TRANSIENT_CODES or status in (408, 409, 429) or status >= 500:
        return TransientStoreError(operation, bucket, key, detail)
    if code == "NoSuchBucket":
        return NoSuchBucketError(operation, bucket, key, "the bucket does not exist at this endpoint")
    if status == 404:
        return ObjectNotFoundError(operation, bucket, key, detail)
    if status in (401, 403):
        return AccessDeniedError(operation, bucket, key, detail)
    if status == 412:
        return PreconditionFailedError(operation, bucket, key, detail)
    if status in (301, 307, 308):
        return PermanentStoreError(operation, bucket, key, f"{detail}: is the region or the endpoint right?")
    return PermanentStoreError(operation, bucket, key, detail)


def _without_status(operation: str, bucket: str, key: str, error: Exception, text: str) -> StoreError:
    if isinstance(error, FileNotFoundError):
        return ObjectNotFoundError(operation, bucket, key, "no such key")
    if isinstance(error, UnicodeError):
        return PermanentStoreError(operation, bucket, repr(key), "the key is not UTF-8")
    for mark, words in _NETWORK:
        if mark in text:
            return TransientStoreError(operation, bucket, key, words)
    return TransientStoreError(operation, bucket, key, text.split("\n", 1)[0][:200])


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found.group(1) if found else ""
