"""Takes in a request's body: undoes aws-chunked, digests as it comes, checks what the headers promised."""

from __future__ import annotations

import base64
import binascii
import re

from .body import AwsChunkedDecoder, Digests
from .errors import S3Error
from .messages import Request
from .rules import Rules

_HEX = re.compile(r"[0-9a-f]{64}")
_EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
_STORED = frozenset(("PutObject", "UploadPart"))
_CHECKSUMS = {
    "x-amz-checksum-crc32": "crc32",
    "x-amz-checksum-sha1": "sha1",
    "x-amz-checksum-sha256": "sha256",
}


class Intake:
    """One request's body on its way in."""

    __slots__ = ("_broken", "_decoder", "_request", "_rules")

    def __init__(self, request: Request, rules: Rules) -> None:
        """Choose the digests that the headers ask for."""
        self._request = request
        self._rules = rules
        self._broken = False
        self._decoder: AwsChunkedDecoder | None = None
        headers = request.headers
        payload = headers.get("x-amz-content-sha256", "")
        if "aws-chunked" in headers.get("content-encoding", "") or payload.startswith("STREAMING-"):
            self._decoder = AwsChunkedDecoder()
        names = set()
        if request.operation in _STORED and not rules.opaque_etags:
            names.add("md5")
        if rules.verify_digests:
            if "content-md5" in headers:
                names.add("md5")
            if _HEX.fullmatch(payload):
                names.add("sha256")
            trailer = headers.get("x-amz-trailer", "")
            names.update(name for field, name in _CHECKSUMS.items() if field in headers or field in trailer)
        request.digests = Digests(names)

    def take(self, data: bytes) -> None:
        """Some more of the body as it came."""
        request = self._request
        request.bytes_in += len(data)
        if self._decoder is None:
            request.body.append(data)
            request.digests.update(data)
            return
        try:
            pieces = self._decoder.feed(data)
        except ValueError:
            self._broken = True
            return
        for piece in pieces:
            request.body.append(piece)
            request.digests.update(piece)

    def finish(self) -> None:
        """Check the whole body.

        Raises:
            S3Error: IncompleteBody, MissingContentLength, XAmzContentSHA256Mismatch, InvalidDigest,
                BadDigest.
        """
        request, headers = self._request, self._request.headers
        if self._decoder is not None:
            if self._broken or not self._decoder.done:
                raise S3Error("IncompleteBody", "The aws-chunked body is broken")
            request.trailers = self._decoder.trailers
            if str(request.body.size) != headers.get("x-amz-decoded-content-length"):
                raise S3Error("IncompleteBody")
        elif request.operation in _STORED and "content-length" not in headers:
            raise S3Error("MissingContentLength")
        if self._rules.verify_digests:
            self._check_digests()

    def _check_digests(self) -> None:
        request, headers = self._request, self._request.headers
        payload = headers.get("x-amz-content-sha256", "")
        if _HEX.fullmatch(payload):
            actual = request.digests.hex("sha256") if request.body.size else _EMPTY_SHA256
            if actual != payload:
                raise S3Error("XAmzContentSHA256Mismatch")
        md5 = headers.get("content-md5")
        if md5 is not None:
            if _decoded_length(md5) != 16:
                raise S3Error("InvalidDigest")
            if request.digests.base64("md5") != md5:
                raise S3Error("BadDigest")
        for field, name in _CHECKSUMS.items():
            sent = request.header(field)
            if sent is not None and not request.operation.startswith("Complete"):
                if _decoded_length(sent) is None:
                    raise S3Error("InvalidRequest", f"Value for {field} header is invalid.")
                if request.digests.base64(name) != sent:
                    raise S3Error("BadDigest", f"The {name.upper()} you specified did not match the calculated one.")


def _decoded_length(text: str) -> int | None:
    try:
        return len(base64.b64decode(text, validate=True))
    except binascii.Error:
        return None
