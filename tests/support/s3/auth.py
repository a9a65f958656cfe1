"""AWS Signature Version 4, checked as S3 does: in the Authorization header and in presigned URLs.

Of the STREAMING-* forms the seed signature is checked, not each chunk's.
"""

from __future__ import annotations

import calendar
import hashlib
import hmac
import re
import time
from functools import lru_cache
from urllib.parse import quote, unquote, unquote_plus

from .errors import S3Error
from .messages import Request

_HEADER = re.compile(r"AWS4-HMAC-SHA256 +Credential=([^,\s]+), *SignedHeaders=([^,\s]+), *Signature=([0-9a-f]{64})")
_PLAIN = re.compile(r"[A-Za-z0-9/_.~-]*")
_SPACES = re.compile(r" +")
_HEX = re.compile(r"[0-9a-f]{64}")


def verify(request: Request, access_key: str, secret_key: str, *, now: float, max_skew: float) -> None:
    """Refuse a request that is not signed with these keys.

    Raises:
        S3Error: AccessDenied, InvalidAccessKeyId, SignatureDoesNotMatch, RequestTimeTooSkewed,
            ExpiredRequest, AuthorizationHeaderMalformed or InvalidRequest.
    """
    authorization = request.headers.get("authorization")
    if authorization is None:
        if "X-Amz-Signature" not in request.query:
            raise S3Error("AccessDenied", "Anonymous access is forbidden for this operation")
        _verify_presigned(request, access_key, secret_key, now=now, max_skew=max_skew)
        return
    found = _HEADER.fullmatch(authorization.strip())
    if found is None:
        raise S3Error("AuthorizationHeaderMalformed")
    stamp = request.headers.get("x-amz-date", "")
    if abs(now - _seconds(stamp)) > max_skew:
        raise S3Error("RequestTimeTooSkewed")
    payload = request.headers.get("x-amz-content-sha256")
    if payload is None:
        raise S3Error("InvalidRequest", "Missing required header for this request: x-amz-content-sha256")
    if not (_HEX.fullmatch(payload) or payload == "UNSIGNED-PAYLOAD" or payload.startswith("STREAMING-")):
        raise S3Error("InvalidArgument", "x-amz-content-sha256 must be UNSIGNED-PAYLOAD, STREAMING-* or a SHA-256")
    signed = found[2].split(";")
    for name in request.headers:
        if (name == "host" or name.startswith("x-amz-")) and name not in signed:
            raise S3Error("AccessDenied", f"There were headers present in the request which were not signed: {name}")
    query = canonical_query(request.raw_query)
    _compare(request, found[1], signed, found[3], stamp, payload, query, (access_key, secret_key))


def _verify_presigned(request: Request, access_key: str, secret_key: str, *, now: float, max_skew: float) -> None:
    query = request.query
    try:
        stamp, expires = query["X-Amz-Date"], int(query["X-Amz-Expires"])
        credential, signed = query["X-Amz-Credential"], query["X-Amz-SignedHeaders"].split(";")
    except (KeyError, ValueError):
        raise S3Error("AccessDenied", "A presigned URL's query is not complete") from None
    signed_at = _seconds(stamp)
    if now > signed_at + expires:
        raise S3Error("ExpiredRequest")
    if signed_at - now > max_skew:
        raise S3Error("RequestTimeTooSkewed")
    fields = [field for field in request.raw_query.split("&") if not field.startswith("X-Amz-Signature=")]
    _compare(
        request,
        credential,
        signed,
        query["X-Amz-Signature"],
        stamp,
        query.get("X-Amz-Content-Sha256", "UNSIGNED-PAYLOAD"),
        canonical_query("&".join(fields)),
        (access_key, secret_key),
    )


def _compare(
    request: Request,
    credential: str,
    signed: list[str],
    signature: str,
    stamp: str,
    payload: str,
    query: str,
    keys: tuple[str, str],
) -> None:
    """Check credential scope and signature."""
    scope = credential.rsplit("/", 4)
    if len(scope) != 5 or scope[3] != "s3" or scope[4] != "aws4_request" or scope[1] != stamp[:8]:
        raise S3Error("AuthorizationHeaderMalformed")
    if not hmac.compare_digest(scope[0].encode(), keys[0].encode()):
        raise S3Error("InvalidAccessKeyId")
    if "host" not in signed:
        raise S3Error("AccessDenied", "The host header must be signed")
    lines = [request.method, canonical_path(request.raw_path), query]
    for name in signed:
        value = request.headers.get(name, "")
        lines.append(f"{name}:{_SPACES.sub(' ', value.strip())}")
    lines += ("", ";".join(signed), payload)
    digest = hashlib.sha256("\n".join(lines).encode("latin-1", "replace")).hexdigest()
    text = f"AWS4-HMAC-SHA256\n{stamp}\n{'/'.join(scope[1:])}\n{digest}"
    key = signing_key(keys[1], scope[1], scope[2])
    if not hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), signature):
        raise S3Error("SignatureDoesNotMatch")


def canonical_path(raw: str) -> str:
    """The path as S3 signs it: encoded once, slashes kept, nothing normalised."""
    return raw if _PLAIN.fullmatch(raw) else quote(unquote(raw), safe="/-_.~")


def canonical_query(raw: str) -> str:
    """The query as it is signed: each name and value encoded, in order."""
    if not raw:
        return ""
    pairs = []
    for field in raw.split("&"):
        if field:
            name, _, value = field.partition("=")
            pairs.append((quote(unquote_plus(name), safe="-_.~"), quote(unquote_plus(value), safe="-_.~")))
    return "&".join(f"{name}={value}" for name, value in sorted(pairs))


@lru_cache(maxsize=64)
def signing_key(secret_key: str, day: str, region: str) -> bytes:
    """The key that signs a day's requests to S3 in a region."""
    key = b"AWS4" + secret_key.encode()
    for text in (day, region, "s3", "aws4_request"):
        key = hmac.digest(key, text.encode(), "sha256")
    return key


@lru_cache(maxsize=64)
def _seconds(stamp: str) -> float:
    try:
        return calendar.timegm(time.strptime(stamp, "%Y%m%dT%H%M%SZ"))
    except ValueError:
        raise S3Error("AccessDenied", "x-amz-date must be given as YYYYMMDDTHHMMSSZ") from None
