"""Operations on whole objects."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

from ..body import md5_of
from ..errors import S3Error
from ..messages import Request, Response
from ..ranges import parse_range
from ..store import StoredObject, etag_matches
from .base import (
    Context,
    Handler,
    conditions,
    copy_source,
    etag_of,
    iso_time,
    kept_headers,
    object_headers,
    parse_xml,
    sent_checksums,
    tag,
    xml_response,
)


def put_object(context: Context, request: Request) -> Response:
    """Store the body if the rules and conditions let it."""
    rules, store = context.rules, context.store
    checksums = sent_checksums(request)
    stored = StoredObject(request.body, etag_of(context, request), store.now(), kept_headers(request), checksums)
    if rules.conditional_put:
        store.put(request.bucket, request.key, stored, conditions(request))
    else:
        store.put(request.bucket, request.key, stored)
    return Response(200, headers={"ETag": f'"{stored.etag}"', **checksums})


def get_object(context: Context, request: Request) -> Response:
    """The object, a range or a part of it."""
    stored = context.store.get(request.bucket, request.key)
    headers = object_headers(stored)
    refused = check_read(request, stored, prefix="")
    if refused is not None:
        return Response(304, headers=headers) if refused == 304 else _refuse(refused)
    size = stored.body.size
    span: tuple[int, int] | None = None
    if request.part_number is not None:
        span = _part_span(stored, request.part_number)
        if stored.part_sizes:
            headers["x-amz-mp-parts-count"] = str(len(stored.part_sizes))
    elif context.rules.ranges and "range" in request.headers:
        span = parse_range(request.headers["range"], size)
    if span is None:
        if request.headers.get("x-amz-checksum-mode", "").upper() == "ENABLED":
            headers.update(stored.checksums)
            if stored.checksums:
                headers["x-amz-checksum-type"] = "FULL_OBJECT"
        return Response(200, stored.body, headers)
    start, stop = span
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(206, stored.body, headers, start=start, stop=stop)


def _part_span(stored: StoredObject, number: int) -> tuple[int, int] | None:
    sizes = stored.part_sizes or (stored.body.size,)
    if not 1 <= number <= len(sizes):
        raise S3Error("InvalidRange", "The requested partnumber is not satisfiable")
    start = sum(sizes[: number - 1])
    return (start, start + sizes[number - 1]) if stored.body.size else None


def _refuse(status: int) -> Response:
    raise S3Error("PreconditionFailed", status=status)


def check_read(request: Request, stored: StoredObject, *, prefix: str) -> int | None:
    """Status of a read that its conditions refuse (304, 412), else None.

    `prefix` is `x-amz-copy-source-` for the source of a copy. An ETag condition that is given outranks the
    one on the date, as S3 documents.
    """
    headers, second = request.headers, int(stored.modified)
    match, unmodified = headers.get(f"{prefix}if-match"), headers.get(f"{prefix}if-unmodified-since")
    if match is not None:
        if not etag_matches(match, stored.etag):
            return 412
    elif unmodified is not None and second > _seconds(unmodified):
        return 412
    none_match, modified = headers.get(f"{prefix}if-none-match"), headers.get(f"{prefix}if-modified-since")
    if none_match is not None:
        if etag_matches(none_match, stored.etag):
            return 412 if prefix else 304
    elif modified is not None and second <= _seconds(modified):
        return 412 if prefix else 304
    return None


def _seconds(text: str) -> float:
    try:
        return parsedate_to_datetime(text).timestamp()
    except ValueError:
        raise S3Error("InvalidArgument", f"Bad date: {text}") from None


def copy_object(context: Context, request: Request) -> Response:
    """Copy an object in the store, its bytes not moved."""
    store = context.store
    bucket, key = copy_source(request)
    directive = request.headers.get("x-amz-metadata-directive", "COPY").upper()
    if directive not in ("COPY", "REPLACE"):
        raise S3Error("InvalidArgument", "Unknown metadata directive.")
    if (bucket, key) == (request.bucket, request.key) and directive == "COPY":
        raise S3Error(
            "InvalidRequest",
            "This copy request is illegal because it is trying to copy an object to itself without changing "
            "the object's metadata.",
        )
    source = store.get(bucket, key)
    refused = check_read(request, source, prefix="x-amz-copy-source-")
    if refused is not None:
        _refuse(refused)
    headers = kept_headers(request) if directive == "REPLACE" else source.headers
    etag = store.unique() if context.rules.opaque_etags else _plain_etag(source)
    copied = StoredObject(source.body, etag, store.now(), headers, source.checksums)
    store.put(request.bucket, request.key, copied, conditions(request))
    return xml_response("CopyObjectResult", tag("ETag", f'"{etag}"') + tag("LastModified", iso_time(copied.modified)))


def _plain_etag(source: StoredObject) -> str:
    """The ETag of a copy: a copied object has one part, so its ETag is the MD5."""
    return md5_of(source.body) if "-" in source.etag else source.etag


def delete_object(context: Context, request: Request) -> Response:
    """Remove it, there or not."""
    context.store.delete(request.bucket, request.key)
    return Response(204)


def delete_objects(context: Context, request: Request) -> Response:
    """Remove up to 1,000 named objects."""
    context.store.bucket(request.bucket)
    root = parse_xml(bytes(request.body), "Delete")
    keys = [element.findtext("Key") for element in root.findall("Object")]
    if not keys or len(keys) > 1000 or None in keys:
        raise S3Error("MalformedXML")
    quiet = root.findtext("Quiet", "false").strip().lower() == "true"
    rows = []
    for key in keys:
        context.store.delete(request.bucket, key or "")
        if not quiet:
            rows.append(f"<Deleted>{tag('Key', key or '')}</Deleted>")
    return xml_response("DeleteResult", "".join(rows))


OBJECT_OPERATIONS: dict[str, Handler] = {
    "CopyObject": copy_object,
    "DeleteObject": delete_object,
    "DeleteObjects": delete_objects,
    "GetObject": get_object,
    "HeadObject": get_object,
    "PutObject": put_object,
}
