"""Requests and responses as the handlers see them, and what a request asks for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from urllib.parse import unquote, unquote_plus
from xml.sax.saxutils import escape

from .body import Body, Digests
from .errors import S3Error

CONTROL = "/_control/"
"""Paths under this one command the server; they are no S3 requests."""

_OBJECT_SUBRESOURCES = frozenset(
    ("acl", "attributes", "legal-hold", "restore", "retention", "select", "tagging", "torrent", "versionId")
)
_BUCKET_SUBRESOURCES = frozenset(
    (
        "accelerate",
        "acl",
        "analytics",
        "cors",
        "encryption",
        "intelligent-tiering",
        "inventory",
        "lifecycle",
        "logging",
        "metrics",
        "notification",
        "object-lock",
        "ownershipControls",
        "policy",
        "policyStatus",
        "publicAccessBlock",
        "replication",
        "requestPayment",
        "tagging",
        "versioning",
        "versions",
        "website",
    )
)


class Request:
    """One request: what it asks for as soon as its headers are in, its body when that has come."""

    __slots__ = (
        "body",
        "bucket",
        "bytes_in",
        "digests",
        "headers",
        "keep_alive",
        "key",
        "method",
        "operation",
        "part_number",
        "query",
        "raw_path",
        "raw_query",
        "recorded",
        "started",
        "trailers",
    )

    def __init__(self, method: str, target: str, headers: dict[str, str]) -> None:
        """Parse the target; header names are in lower case.

        Raises:
            S3Error: the path is not UTF-8 or the part number no number.
        """
        self.method = method
        self.headers = headers
        self.raw_path, _, self.raw_query = target.partition("?")
        self.query = parse_query(self.raw_query) if self.raw_query else {}
        path = self.raw_path
        if "%" in path:
            try:
                path = unquote(path, errors="strict")
            except UnicodeDecodeError:
                raise S3Error("InvalidURI") from None
        self.bucket, _, self.key = path[1:].partition("/")
        self.part_number: int | None = None
        number = self.query.get("partNumber")
        if number is not None:
            if not number.isdecimal():
                raise S3Error("InvalidArgument", "Part number must be an integer")
            self.part_number = int(number)
        self.operation = "Control" if path.startswith(CONTROL) else operation_of(self)
        self.body = Body()
        self.digests = Digests(())
        self.trailers: dict[str, str] = {}
        self.bytes_in = 0
        self.keep_alive = True
        self.recorded = False
        self.started = time.monotonic()

    def header(self, name: str) -> str | None:
        """A header's value, or a trailer's."""
        return self.headers.get(name) or self.trailers.get(name)


def parse_query(raw: str) -> dict[str, str]:
    """The query's fields; a name without value gets an empty one."""
    fields: dict[str, str] = {}
    for field in raw.split("&"):
        if field:
            name, _, value = field.partition("=")
            fields[unquote_plus(name)] = unquote_plus(value)
    return fields


def operation_of(request: Request) -> str:
    """The S3 operation's name; `NotImplemented` or `MethodNotAllowed` for what is none of ours."""
    if not request.bucket:
        return "ListBuckets" if request.method == "GET" else "MethodNotAllowed"
    return _object_operation(request) if request.key else _bucket_operation(request)


def _bucket_operation(request: Request) -> str:
    query = request.query
    if query and not _BUCKET_SUBRESOURCES.isdisjoint(query):
        return "NotImplemented"
    if request.method == "GET":
        if "location" in query:
            return "GetBucketLocation"
        if "uploads" in query:
            return "ListMultipartUploads"
        return "ListObjectsV2" if query.get("list-type") == "2" else "ListObjects"
    if request.method == "POST":
        return "DeleteObjects" if "delete" in query else "NotImplemented"
    names = {"PUT": "CreateBucket", "HEAD": "HeadBucket", "DELETE": "DeleteBucket"}
    return names.get(request.method, "MethodNotAllowed")


def _object_operation(request: Request) -> str:
    query, method = request.query, request.method
    if query and not _OBJECT_SUBRESOURCES.isdisjoint(query):
        return "NotImplemented"
    upload = "uploadId" in query
    if method == "PUT":
        copy = "x-amz-copy-source" in request.headers
        if upload:
            return "UploadPartCopy" if copy else "UploadPart"
        return "CopyObject" if copy else "PutObject"
    if method == "POST":
        if "uploads" in query:
            return "CreateMultipartUpload"
        return "CompleteMultipartUpload" if upload else "NotImplemented"
    if method == "GET":
        return "ListParts" if upload else "GetObject"
    if method == "DELETE":
        return "AbortMultipartUpload" if upload else "DeleteObject"
    return "HeadObject" if method == "HEAD" else "MethodNotAllowed"


class Response:
    """One answer: a status, headers, and a body or a range of one."""

    __slots__ = ("body", "close", "code", "headers", "length", "send_body", "start", "status")

    def __init__(
        self,
        status: int = 200,
        body: Body | bytes = b"",
        headers: dict[str, str] | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        code: str = "",
    ) -> None:
        """Answer `body[start:stop]`; `code` is the S3 code of an error."""
        self.status = status
        self.headers = headers if headers is not None else {}
        self.body = body if isinstance(body, Body) else Body((body,))
        self.start = start
        self.length = (self.body.size if stop is None else stop) - start
        self.send_body = True
        self.code = code
        self.close = False

    @property
    def body_length(self) -> int:
        """Bytes of body that go out."""
        return self.length if self.send_body else 0

    def head(self) -> bytes:
        """Status line and headers. A 204 and a 304 have no length."""
        lines = [_status_line(self.status), f"Date: {_http_date(int(time.time()))}\r\nServer: strict-s3\r\n"]
        if self.status not in (204, 304):
            lines.append(f"Content-Length: {self.length}\r\n")
        if self.close:
            lines.append("Connection: close\r\n")
        lines.extend(f"{name}: {value}\r\n" for name, value in self.headers.items())
        lines.append("\r\n")
        return "".join(lines).encode("latin-1", "replace")

    def pieces(self) -> Iterator[memoryview]:
        """The body's bytes as they go out."""
        return self.body.slices(self.start, self.start + self.body_length)


def error_response(error: S3Error, request: Request | None) -> Response:
    """The XML answer of an error (to HEAD: none, only the status)."""
    resource = f"/{request.bucket}/{request.key}" if request else ""
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f"<Error><Code>{error.code}</Code><Message>{escape(error.message)}</Message>"
        f"<Resource>{escape(resource)}</Resource><RequestId>0</RequestId></Error>"
    )
    headers = {"Content-Type": "application/xml", **error.headers}
    return Response(error.status, text.encode(), headers, code=error.code)


@lru_cache(maxsize=128)
def _status_line(status: int) -> str:
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    return f"HTTP/1.1 {status} {phrase}\r\n"


@lru_cache(maxsize=4)
def _http_date(second: int) -> str:
    return formatdate(second, usegmt=True)
