"""The Range header of GetObject and the range header of UploadPartCopy."""

from __future__ import annotations

import re

from .errors import S3Error

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """Start and stop (exclusive) of a Range header on an object of `size` bytes.

    None where the header is to be ignored, as S3 does with several ranges and with other units.

    Raises:
        S3Error: InvalidRange: no byte of the object is in the range.
    """
    found = _RANGE.fullmatch(text.strip())
    if found is None or found[0] == "bytes=-":
        return None
    first, last = found[1], found[2]
    if first and last and int(last) < int(first):
        return None
    start = int(first) if first else max(0, size - int(last))
    stop = min(size, int(last) + 1) if first and last else size
    if start >= size:
        raise S3Error("InvalidRange", headers={"Content-Range": f"bytes */{size}"})
    return start, stop


def parse_copy_range(text: str, size: int) -> tuple[int, int]:
    """Start and stop (exclusive) of x-amz-copy-source-range: `bytes=first-last`, all of it in the source.

    Raises:
        S3Error: InvalidArgument for another form, InvalidRange for bytes that the source does not have.
    """
    found = _RANGE.fullmatch(text.strip())
    if found is None or not found[1] or not found[2] or int(found[2]) < int(found[1]):
        raise S3Error("InvalidArgument", "The x-amz-copy-source-range value must be of the form bytes=first-last")
    if int(found[2]) >= size:
        raise S3Error("InvalidRange", f"Range specified is not valid for source object of size: {size}")
    return int(found[1]), int(found[2]) + 1
