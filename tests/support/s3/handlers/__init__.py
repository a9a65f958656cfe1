"""The S3 operations, each a function from a request to a response."""

from __future__ import annotations

from .base import Context, Handler
from .buckets import BUCKET_OPERATIONS
from .listings import LISTING_OPERATIONS
from .multipart import MULTIPART_OPERATIONS
from .objects import OBJECT_OPERATIONS

OPERATIONS: dict[str, Handler] = {
    **BUCKET_OPERATIONS,
    **LISTING_OPERATIONS,
    **OBJECT_OPERATIONS,
    **MULTIPART_OPERATIONS,
}

__all__ = ["OPERATIONS", "Context", "Handler"]
