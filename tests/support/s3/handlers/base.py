"""What every handler needs: its context, XML in and out, and the headers that objects share."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import formatdate
from functools import lru_cache
from urllib.parse import quote, unquote
from xml.sax.saxutils import escape

from ..errors import S3Error
from ..messages import Request, Response
from ..rules import Rules
from ..store import Conditions, Store, StoredObject

_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_KEPT = frozenset(
    (
        "cache-control",
        "content-disposition",
        "content-encoding",
        "content-language",
        "content-type",
        "expires",
    )
)
CHECKSUM = "x-amz-checksum-"
CHECKSUMS = ("crc32", "crc32c", "crc64nvme", "sha1", "sha256")


@dataclass(frozen=True, slots=True)
class Context:
    """What the handlers work on."""

    store: Store
    rules: Rules


Handler = Callable[[Context, Request], Response]


def xml_response(root: str, content: str, headers: dict[str, str] | None = None) -> Response:
    """An XML answer; `content` is markup already."""
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<{root} xmlns="{_NAMESPACE}">{content}</{root}>'
    return Response(200, text.encode(), {"Content-Type": "application/xml", **(headers or {})})


def tag(name: str, value: str | int) -> str:
    """One element with a text in it."""
    return f"<{name}>{_clean(value) if isinstance(value, str) else value}</{name}>"


def _clean(value: str) -> str:
    """Escaped; control characters, which XML 1.0 can't hold, as character references, as S3 writes them."""
    text = escape(value, {'"': "&quot;", "\r": "&#13;"})
    if text.isprintable():
        return text
    return "".join(f"&#x{ord(char):x};" if char < " " and char not in "\t\n" else char for char in text)


def parse_xml(body: bytes, root: str) -> ET.Element:
    """The root element of a request's body, namespaces taken off.

    Raises:
        S3Error: MalformedXML.
    """
    try:
        element = ET.fromstring(body)
    except ET.ParseError:
        raise S3Error("MalformedXML") from None
    for each in element.iter():
        each.tag = each.tag.rpartition("}")[2]
    if element.tag != root:
        raise S3Error("MalformedXML")
    return element


@lru_cache(maxsize=256)
def iso_time(seconds: float) -> str:
    """A time as listings write it."""
    text = datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


@lru_cache(maxsize=256)
def http_time(second: int) -> str:
    """A time as headers write it."""
    return formatdate(second, usegmt=True)


def conditions(request: Request) -> Conditions:
    """The preconditions of a write."""
    return Conditions(request.headers.get("if-match"), request.headers.get("if-none-match"))


def kept_headers(request: Request) -> dict[str, str]:
    """The headers that an object keeps and gives back."""
    kept = {name: value for name, value in request.headers.items() if name in _KEPT or name.startswith("x-amz-meta-")}
    encoding = kept.get("content-encoding")
    if encoding is not None and "aws-chunked" in encoding:
        rest = [part for part in (text.strip() for text in encoding.split(",")) if part != "aws-chunked"]
        del kept["content-encoding"]
        if rest:
            kept["content-encoding"] = ",".join(rest)
    return kept


def sent_checksums(request: Request) -> dict[str, str]:
    """The checksums that came with the body, as headers or as trailers."""
    found = {}
    for name in CHECKSUMS:
        value = request.header(CHECKSUM + name)
        if value is not None:
            found[CHECKSUM + name] = value
    return found


def object_headers(stored: StoredObject) -> dict[str, str]:
    """What GetObject and HeadObject say of an object."""
    headers = {
        "ETag": f'"{stored.etag}"',
        "Last-Modified": http_time(int(stored.modified)),
        "Accept-Ranges": "bytes",
        **stored.headers,
    }
    headers.setdefault("content-type", "binary/octet-stream")
    return headers


def etag_of(context: Context, request: Request) -> str:
    """The ETag of a body that came in one request."""
    return context.store.unique() if context.rules.opaque_etags else request.digests.hex("md5")


def copy_source(request: Request) -> tuple[str, str]:
    """Bucket and key of x-amz-copy-source.

    Raises:
        S3Error: InvalidArgument.
    """
    source = unquote(request.headers["x-amz-copy-source"].partition("?")[0]).removeprefix("/")
    bucket, _, key = source.partition("/")
    if not bucket or not key:
        raise S3Error("InvalidArgument", "Copy Source must mention the source bucket and key: sourcebucket/sourcekey")
    return bucket, key


def encoder(request: Request) -> Callable[[str], str]:
    """How a listing writes keys: as they are, or URL-encoded on demand."""
    if request.query.get("encoding-type") == "url":
        return lambda key: quote(key, safe="/-_.~*!'()")
    return str
