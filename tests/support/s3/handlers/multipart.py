"""Multipart uploads: the parts, and the rules that completing them obeys."""

from __future__ import annotations

import hashlib

from ..body import Body, md5_of
from ..errors import S3Error
from ..messages import Request, Response
from ..ranges import parse_copy_range
from ..store import Part, StoredObject, Upload
from .base import (
    CHECKSUM,
    Context,
    Handler,
    conditions,
    copy_source,
    encoder,
    etag_of,
    iso_time,
    kept_headers,
    parse_xml,
    sent_checksums,
    tag,
    xml_response,
)
from .listings import limit_of
from .objects import check_read


def create_multipart_upload(context: Context, request: Request) -> Response:
    """Begin one."""
    upload = context.store.start_upload(request.bucket, request.key, kept_headers(request))
    content = tag("Bucket", request.bucket) + tag("Key", request.key) + tag("UploadId", upload.upload_id)
    headers = {}
    algorithm = request.headers.get("x-amz-checksum-algorithm")
    if algorithm:
        headers["x-amz-checksum-algorithm"] = algorithm
    return xml_response("InitiateMultipartUploadResult", content, headers)


def _upload_of(context: Context, request: Request) -> Upload:
    return context.store.upload(request.bucket, request.key, request.query["uploadId"])


def _part_number(context: Context, request: Request) -> int:
    number = request.part_number
    if number is None or not 1 <= number <= context.rules.max_parts:
        raise S3Error(
            "InvalidArgument",
            f"Part number must be an integer between 1 and {context.rules.max_parts}, inclusive",
        )
    return number


def upload_part(context: Context, request: Request) -> Response:
    """Take a part; a second one of the same number replaces the first."""
    number = _part_number(context, request)
    checksums = sent_checksums(request)
    part = Part(number, request.body, etag_of(context, request), context.store.now(), checksums)
    with context.store.lock:
        _upload_of(context, request).parts[number] = part
    return Response(200, headers={"ETag": f'"{part.etag}"', **checksums})


def upload_part_copy(context: Context, request: Request) -> Response:
    """Take a part from an object in the store."""
    number = _part_number(context, request)
    upload = _upload_of(context, request)
    source = context.store.get(*copy_source(request))
    if context.rules.conditional_part_copy:
        refused = check_read(request, source, prefix="x-amz-copy-source-")
        if refused is not None:
            raise S3Error("PreconditionFailed", status=refused)
    span = request.headers.get("x-amz-copy-source-range")
    start, stop = parse_copy_range(span, source.body.size) if span else (0, source.body.size)
    body = source.body.part(start, stop)
    etag = context.store.unique() if context.rules.opaque_etags else md5_of(body)
    part = Part(number, body, etag, context.store.now())
    with context.store.lock:
        upload.parts[number] = part
    content = tag("ETag", f'"{etag}"') + tag("LastModified", iso_time(part.modified))
    return xml_response("CopyPartResult", content)


def complete_multipart_upload(context: Context, request: Request) -> Response:
    """Make the parts an object, if they obey the rules and the conditions hold."""
    store, rules = context.store, context.rules
    with store.lock:
        upload = _upload_of(context, request)
        parts = _listed_parts(upload, bytes(request.body))
        _check_sizes(context, parts)
        body = Body()
        for part in parts:
            body.extend(part.body)
        etag = store.unique() if rules.opaque_etags else combined_etag([part.etag for part in parts])
        sizes = tuple(part.body.size for part in parts)
        stored = StoredObject(body, etag, store.now(), upload.headers, {}, sizes)
        if rules.conditional_complete:
            store.put(request.bucket, request.key, stored, conditions(request))
        else:
            store.put(request.bucket, request.key, stored)
        store.end_upload(request.bucket, request.key, upload.upload_id)
    content = tag("Location", request.raw_path) + tag("Bucket", request.bucket) + tag("Key", request.key)
    return xml_response("CompleteMultipartUploadResult", content + tag("ETag", f'"{etag}"'))


def combined_etag(etags: list[str]) -> str:
    """The ETag of an object made of parts: MD5 of their MD5s, and their number."""
    return f"{hashlib.md5(b''.join(bytes.fromhex(etag) for etag in etags)).hexdigest()}-{len(etags)}"


def _listed_parts(upload: Upload, body: bytes) -> list[Part]:
    """The parts that the request lists."""
    rows = parse_xml(body, "CompleteMultipartUpload").findall("Part")
    if not rows:
        raise S3Error("MalformedXML")
    parts: list[Part] = []
    for row in rows:
        number, etag = row.findtext("PartNumber", ""), row.findtext("ETag", "").strip().strip('"')
        if not number.strip().isdecimal():
            raise S3Error("MalformedXML")
        if parts and int(number) <= parts[-1].number:
            raise S3Error("InvalidPartOrder")
        part = upload.parts.get(int(number))
        if part is None or part.etag != etag:
            raise S3Error("InvalidPart")
        for name, value in part.checksums.items():
            element = "Checksum" + name.removeprefix(CHECKSUM).upper()
            if row.findtext(element, value) != value:
                raise S3Error("InvalidPart")
        parts.append(part)
    return parts


def _check_sizes(context: Context, parts: list[Part]) -> None:
    rules = context.rules
    sizes = [part.body.size for part in parts]
    if any(size < rules.min_part_size for size in sizes[:-1]):
        raise S3Error("EntityTooSmall")
    if rules.equal_parts and len(sizes) > 1 and (len(set(sizes[:-1])) > 1 or sizes[-1] > sizes[0]):
        raise S3Error("InvalidPart", "All non-trailing parts must have the same length.")


def abort_multipart_upload(context: Context, request: Request) -> Response:
    """Throw it away."""
    context.store.end_upload(request.bucket, request.key, request.query["uploadId"])
    return Response(204)


def list_parts(context: Context, request: Request) -> Response:
    """A page of the parts that have come."""
    limit, marker = limit_of(request, "max-parts"), request.query.get("part-number-marker") or "0"
    if not marker.isdecimal():
        raise S3Error("InvalidArgument", "part-number-marker must be an integer")
    with context.store.lock:
        upload = _upload_of(context, request)
        parts = [upload.parts[number] for number in sorted(upload.parts) if number > int(marker)]
    page = parts[:limit]
    rows = [
        f"<Part>{tag('PartNumber', part.number)}{tag('LastModified', iso_time(part.modified))}"
        f"<ETag>&quot;{part.etag}&quot;</ETag>{tag('Size', part.body.size)}</Part>"
        for part in page
    ]
    head = [
        tag("Bucket", request.bucket),
        tag("Key", encoder(request)(request.key)),
        tag("UploadId", upload.upload_id),
        tag("PartNumberMarker", marker),
        tag("NextPartNumberMarker", page[-1].number if page else 0),
        tag("MaxParts", limit),
        tag("IsTruncated", "true" if len(parts) > len(page) else "false"),
    ]
    return xml_response("ListPartsResult", "".join(head + rows))


def list_multipart_uploads(context: Context, request: Request) -> Response:
    """A page of the unfinished uploads, by key and then by time."""
    query, encode, limit = request.query, encoder(request), limit_of(request, "max-uploads")
    marker, id_marker = query.get("key-marker", ""), query.get("upload-id-marker", "")
    prefix = query.get("prefix", "")
    with context.store.lock:
        every = list(context.store.bucket(request.bucket).uploads.values())
    every.sort(key=lambda upload: (upload.key, upload.started, upload.upload_id))
    passed = [upload.upload_id for upload in every if upload.key == marker]
    after = set(passed[: passed.index(id_marker) + 1]) if id_marker in passed else set(passed)
    found = [
        upload
        for upload in every
        if upload.key.startswith(prefix)
        and (not marker or upload.key > marker or (upload.key == marker and upload.upload_id not in after))
    ]
    page = found[:limit]
    rows = [
        f"<Upload>{tag('Key', encode(upload.key))}{tag('UploadId', upload.upload_id)}"
        f"<StorageClass>STANDARD</StorageClass>{tag('Initiated', iso_time(upload.started))}</Upload>"
        for upload in page
    ]
    head = [
        tag("Bucket", request.bucket),
        tag("KeyMarker", encode(marker)),
        tag("UploadIdMarker", id_marker),
        tag("Prefix", encode(prefix)),
        tag("MaxUploads", limit),
        tag("IsTruncated", "true" if len(found) > len(page) else "false"),
    ]
    if query.get("encoding-type") == "url":
        head.append(tag("EncodingType", "url"))
    if len(found) > len(page) and page:
        head += [tag("NextKeyMarker", encode(page[-1].key)), tag("NextUploadIdMarker", page[-1].upload_id)]
    return xml_response("ListMultipartUploadsResult", "".join(head + rows))


MULTIPART_OPERATIONS: dict[str, Handler] = {
    "AbortMultipartUpload": abort_multipart_upload,
    "CompleteMultipartUpload": complete_multipart_upload,
    "CreateMultipartUpload": create_multipart_upload,
    "ListMultipartUploads": list_multipart_uploads,
    "ListParts": list_parts,
    "UploadPart": upload_part,
    "UploadPartCopy": upload_part_copy,
}
