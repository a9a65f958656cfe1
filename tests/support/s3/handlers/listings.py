"""ListObjects, both versions."""

from __future__ import annotations

import base64
import binascii

from ..errors import S3Error
from ..listing import Page, list_page
from ..messages import Request, Response
from .base import Context, Handler, encoder, iso_time, tag, xml_response

MOST = 1000
"""Entries of a page at most."""


def limit_of(request: Request, name: str) -> int:
    """A page's size as asked for.

    Raises:
        S3Error: InvalidArgument.
    """
    text = request.query.get(name, str(MOST))
    if not text.isdecimal():
        raise S3Error("InvalidArgument", f"Provided {name} not an integer or within integer range")
    return min(int(text), MOST)


def list_objects_v2(context: Context, request: Request) -> Response:
    """A page, found again by an opaque continuation token."""
    query = request.query
    after = query.get("start-after", "")
    token = query.get("continuation-token")
    if token is not None:
        try:
            after = base64.urlsafe_b64decode(token.encode()).decode()
        except (binascii.Error, UnicodeError):
            raise S3Error("InvalidArgument", "The continuation token provided is incorrect") from None
    limit = limit_of(request, "max-keys")
    page, rows = _page(context, request, after, limit, owner=query.get("fetch-owner") == "true")
    encode = encoder(request)
    parts = [tag("KeyCount", len(page.keys) + len(page.prefixes))]
    if token is not None:
        parts.append(tag("ContinuationToken", token))
    if "start-after" in query:
        parts.append(tag("StartAfter", encode(query["start-after"])))
    if page.truncated:
        token = base64.urlsafe_b64encode(page.last.encode()).decode()
        parts.append(tag("NextContinuationToken", token))
    return xml_response("ListBucketResult", _common(request, page, limit) + "".join(parts) + rows)


def list_objects(context: Context, request: Request) -> Response:
    """A page, found again by a marker."""
    encode = encoder(request)
    limit = limit_of(request, "max-keys")
    marker = request.query.get("marker", "")
    page, rows = _page(context, request, marker, limit, owner=True)
    parts = [tag("Marker", encode(marker))]
    if page.truncated and request.query.get("delimiter"):
        parts.append(tag("NextMarker", encode(page.last)))
    return xml_response("ListBucketResult", _common(request, page, limit) + "".join(parts) + rows)


def _common(request: Request, page: Page, limit: int) -> str:
    encode = encoder(request)
    parts = [
        tag("Name", request.bucket),
        tag("Prefix", encode(request.query.get("prefix", ""))),
        tag("MaxKeys", limit),
        tag("IsTruncated", "true" if page.truncated else "false"),
    ]
    if request.query.get("delimiter"):
        parts.append(tag("Delimiter", encode(request.query["delimiter"])))
    if request.query.get("encoding-type") == "url":
        parts.append(tag("EncodingType", "url"))
    return "".join(parts)


def _page(context: Context, request: Request, after: str, limit: int, *, owner: bool) -> tuple[Page, str]:
    """The page and its rows."""
    encode = encoder(request)
    owned = "<Owner><ID>0</ID><DisplayName>owner</DisplayName></Owner>" if owner else ""
    rows = []
    with context.store.lock:
        bucket = context.store.bucket(request.bucket)
        page = list_page(
            bucket.keys,
            prefix=request.query.get("prefix", ""),
            delimiter=request.query.get("delimiter", ""),
            after=after,
            limit=limit,
        )
        for key in page.keys:
            stored = bucket.objects[key]
            rows.append(
                f"<Contents>{tag('Key', encode(key))}<LastModified>{iso_time(stored.modified)}</LastModified>"
                f"<ETag>&quot;{stored.etag}&quot;</ETag><Size>{stored.body.size}</Size>{owned}"
                "<StorageClass>STANDARD</StorageClass></Contents>"
            )
    rows.extend(f"<CommonPrefixes>{tag('Prefix', encode(prefix))}</CommonPrefixes>" for prefix in page.prefixes)
    return page, "".join(rows)


LISTING_OPERATIONS: dict[str, Handler] = {"ListObjects": list_objects, "ListObjectsV2": list_objects_v2}
