"""The parts of our S3 server that need no socket."""

from __future__ import annotations

import hashlib
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth, S3SigV4QueryAuth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from hypothesis import given
from hypothesis import strategies as st

from tests.support.s3.auth import canonical_path, canonical_query, verify
from tests.support.s3.body import AwsChunkedDecoder, Body, Digests, md5_of
from tests.support.s3.errors import S3Error
from tests.support.s3.faults import Answer, FaultRule, Match, rule_as_json, rule_from_json
from tests.support.s3.handlers.multipart import combined_etag
from tests.support.s3.listing import list_page
from tests.support.s3.messages import Request, Response, error_response, parse_query
from tests.support.s3.ranges import parse_copy_range, parse_range
from tests.support.s3.rules import Rules
from tests.support.s3.stats import Record, Stats, StatsSnapshot
from tests.support.s3.store import Conditions, Store, StoredObject, etag_matches

DAY = 1_763_700_000.0


# Ranges.


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("bytes=0-0", (0, 1)),
        ("bytes=3-", (3, 10)),
        ("bytes=-4", (6, 10)),
        ("bytes=-99", (0, 10)),
        ("bytes=9-99", (9, 10)),
        ("bytes=0-1,3-4", None),
        ("bytes=-", None),
        ("bytes=4-3", None),
        ("lines=0-1", None),
    ],
)
def test_a_range_is_cut_to_the_object_or_ignored(text: str, span: tuple[int, int] | None) -> None:
    assert parse_range(text, 10) == span


@pytest.mark.parametrize(("text", "size"), [("bytes=10-", 10), ("bytes=-0", 10), ("bytes=0-", 0), ("bytes=-1", 0)])
def test_a_range_without_bytes_is_refused_with_the_size(text: str, size: int) -> None:
    with pytest.raises(S3Error) as caught:
        parse_range(text, size)
    assert (caught.value.status, caught.value.headers) == (416, {"Content-Range": f"bytes */{size}"})


def test_a_copied_range_must_be_whole() -> None:
    assert parse_copy_range("bytes=2-9", 10) == (2, 10)
    for text, code in (("bytes=2-10", "InvalidRange"), ("bytes=2-", "InvalidArgument"), ("2-3", "InvalidArgument")):
        with pytest.raises(S3Error) as caught:
            parse_copy_range(text, 10)
        assert caught.value.code == code


# Bodies.


@given(st.lists(st.binary(max_size=20), max_size=8), st.integers(0, 170), st.integers(0, 170))
def test_a_slice_of_a_rope_is_the_slice_of_its_bytes(pieces: list[bytes], start: int, stop: int) -> None:
    body, whole = Body(pieces), b"".join(pieces)
    assert bytes(body) == whole
    assert b"".join(body.slices(start, stop)) == whole[start:stop]
    assert bytes(body.part(start, stop)) == whole[start:stop]
    assert md5_of(body) == hashlib.md5(whole).hexdigest()


def test_large_pieces_are_handed_out_in_small_ones() -> None:
    body = Body([bytes(1_000_000), bytes(10)])
    lengths = [len(view) for view in body.slices(5)]
    assert sum(lengths) == 1_000_005
    assert max(lengths) <= 256 << 10


@given(st.lists(st.binary(min_size=1, max_size=30), max_size=6), st.integers(1, 40), st.booleans())
def test_aws_chunks_are_undone_wherever_they_are_split(chunks: list[bytes], step: int, signed: bool) -> None:
    signature = b";chunk-signature=" + b"0" * 64 if signed else b""
    coded = b"".join(b"%x%s\r\n%s\r\n" % (len(chunk), signature, chunk) for chunk in chunks)
    coded += b"0" + signature + b"\r\nX-Amz-Checksum-Crc32: abc=\r\n\r\n"
    decoder = AwsChunkedDecoder()
    found = b""
    for start in range(0, len(coded), step):
        assert not decoder.done
        found += b"".join(decoder.feed(coded[start : start + step]))
    assert (found, decoder.done) == (b"".join(chunks), True)
    assert decoder.trailers == {"x-amz-checksum-crc32": "abc="}


@pytest.mark.parametrize("coded", [b"zz\r\n", b"1\r\nab\r\n", b"0\r\nno colon\r\n", b"0\r\n\r\nmore\n", b"1" * 9000])
def test_broken_aws_chunks_are_an_error(coded: bytes) -> None:
    with pytest.raises(ValueError):
        AwsChunkedDecoder().feed(coded)


def test_digests_are_those_of_the_whole() -> None:
    digests = Digests(("md5", "sha256", "crc32"))
    for piece in (b"12345", b"6789"):
        digests.update(piece)
    assert digests.hex("crc32") == "cbf43926"
    assert digests.hex("sha256") == hashlib.sha256(b"123456789").hexdigest()
    assert digests.base64("md5") == "JfnnlDI7RTiF9RgfG2JNCw=="


def test_the_etag_of_parts_is_the_md5_of_their_md5s() -> None:
    first, second = hashlib.md5(b"1"), hashlib.md5(b"2")
    expected = hashlib.md5(first.digest() + second.digest()).hexdigest() + "-2"
    assert combined_etag([first.hexdigest(), second.hexdigest()]) == expected


# Listings.

KEYS = st.lists(st.text(alphabet="ab/\U0010ffff", min_size=1, max_size=5), unique=True, max_size=12).map(sorted)


def naive_entries(keys: list[str], prefix: str, delimiter: str) -> list[tuple[str, bool]]:
    """Every entry of a listing in order, and whether it is a common prefix."""
    entries: list[tuple[str, bool]] = []
    for key in keys:
        if key.startswith(prefix):
            rest = key[len(prefix) :]
            common = bool(delimiter) and delimiter in rest
            entry = (prefix + rest.split(delimiter)[0] + delimiter, True) if common else (key, False)
            if entry not in entries:
                entries.append(entry)
    return entries


@given(KEYS, st.sampled_from(["", "a", "a/", "b"]), st.sampled_from(["", "/"]), st.integers(1, 4))
def test_pages_together_are_the_whole_listing(keys: list[str], prefix: str, delimiter: str, limit: int) -> None:
    found: list[tuple[str, bool]] = []
    after = ""
    while True:
        page = list_page(keys, prefix=prefix, delimiter=delimiter, after=after, limit=limit)
        entries = [(key, False) for key in page.keys] + [(common, True) for common in page.prefixes]
        assert len(entries) <= limit
        found += sorted(entries)
        if not page.truncated:
            break
        assert len(entries) == limit
        after = page.last
    assert found == naive_entries(keys, prefix, delimiter)


def test_a_page_of_nothing_is_not_truncated() -> None:
    page = list_page(["a"], prefix="", delimiter="", after="", limit=0)
    assert (page.keys, page.truncated) == ([], False)


# What a request asks for.


@pytest.mark.parametrize(
    ("method", "target", "headers", "operation"),
    [
        ("GET", "/", {}, "ListBuckets"),
        ("PUT", "/b", {}, "CreateBucket"),
        ("HEAD", "/b/", {}, "HeadBucket"),
        ("DELETE", "/b", {}, "DeleteBucket"),
        ("GET", "/b?location", {}, "GetBucketLocation"),
        ("GET", "/b?uploads=", {}, "ListMultipartUploads"),
        ("GET", "/b/?list-type=2&prefix=x", {}, "ListObjectsV2"),
        ("GET", "/b?prefix=x", {}, "ListObjects"),
        ("POST", "/b?delete", {}, "DeleteObjects"),
        ("GET", "/b/k", {}, "GetObject"),
        ("HEAD", "/b/k", {}, "HeadObject"),
        ("PUT", "/b/k", {}, "PutObject"),
        ("PUT", "/b/k", {"x-amz-copy-source": "b/c"}, "CopyObject"),
        ("DELETE", "/b/k", {}, "DeleteObject"),
        ("POST", "/b/k?uploads", {}, "CreateMultipartUpload"),
        ("PUT", "/b/k?uploadId=u&partNumber=1", {}, "UploadPart"),
        ("PUT", "/b/k?uploadId=u&partNumber=1", {"x-amz-copy-source": "b/c"}, "UploadPartCopy"),
        ("POST", "/b/k?uploadId=u", {}, "CompleteMultipartUpload"),
        ("DELETE", "/b/k?uploadId=u", {}, "AbortMultipartUpload"),
        ("GET", "/b/k?uploadId=u", {}, "ListParts"),
        ("GET", "/b/k?tagging", {}, "NotImplemented"),
        ("GET", "/b?versioning", {}, "NotImplemented"),
        ("PATCH", "/b/k", {}, "MethodNotAllowed"),
        ("GET", "/_control/stats", {}, "Control"),
    ],
)
def test_every_operation_is_recognised(method: str, target: str, headers: dict[str, str], operation: str) -> None:
    assert Request(method, target, headers).operation == operation


def test_keys_are_decoded_once_and_nothing_is_normalised() -> None:
    request = Request("GET", "/b//a/../%2e%2F+%C3%BC%2520?partNumber=7", {})
    assert (request.bucket, request.key, request.part_number) == ("b", "/a/.././+ü%20", 7)
    assert parse_query("a=1&b&c=%26+x&&") == {"a": "1", "b": "", "c": "& x"}
    for target, code in (("/b/%ff", "InvalidURI"), ("/b/k?partNumber=x", "InvalidArgument")):
        with pytest.raises(S3Error) as caught:
            Request("GET", target, {})
        assert caught.value.code == code


def test_errors_are_xml_that_can_be_read() -> None:
    response = error_response(S3Error("NoSuchKey"), Request("GET", "/b/a%3C%26", {}))
    body = bytes(response.body).decode()
    assert response.status == 404
    assert "<Code>NoSuchKey</Code>" in body
    assert "<Resource>/b/a&lt;&amp;</Resource>" in body


def test_a_head_says_the_length_but_for_204_and_304() -> None:
    assert b"\r\nContent-Length: 3\r\n" in Response(200, b"abc").head()
    assert b"Content-Length" not in Response(204).head() + Response(304, b"abc").head()


# Signatures.


def signed_request(
    url: str = "http://h:1/b/k", headers: dict[str, str] | None = None, *, presigned: bool = False
) -> Request:
    """A request as botocore signs it."""
    request = AWSRequest(method="PUT", url=url, data=b"", headers=headers or {})
    credentials = Credentials("id", "secret")
    if presigned:
        S3SigV4QueryAuth(credentials, "s3", "auto", expires=60).add_auth(request)
    else:
        S3SigV4Auth(credentials, "s3", "auto").add_auth(request)
    prepared = request.prepare()
    fields = {name.lower(): value for name, value in prepared.headers.items()}
    return Request("PUT", str(prepared.url).removeprefix("http://h:1"), {"host": "h:1", **fields})


def refusal(request: Request, *, key: str = "id", secret: str = "secret", later: float = 0) -> str:
    """The code with which `verify` refuses, or nothing."""
    import time

    try:
        verify(request, key, secret, now=time.time() + later, max_skew=900)
    except S3Error as error:
        return error.code
    return ""


@pytest.mark.parametrize(
    "url", ["http://h:1/b/k", "http://h:1/b/a%20b/%C3%BC?x=1&a=%2F&b", "http://h:1/b/~%2A%27%28%29"]
)
def test_what_botocore_signs_is_verified(url: str) -> None:
    assert refusal(signed_request(url, {"x-amz-meta-a": "  two   spaces "})) == ""
    assert refusal(signed_request(url, presigned=True)) == ""


def test_signatures_are_refused_by_their_fault() -> None:
    assert refusal(signed_request(), key="other") == "InvalidAccessKeyId"
    assert refusal(signed_request(), secret="other") == "SignatureDoesNotMatch"
    assert refusal(signed_request(), later=901) == "RequestTimeTooSkewed"
    assert refusal(signed_request(), later=-901) == "RequestTimeTooSkewed"
    assert refusal(signed_request(), later=890) == ""
    assert refusal(signed_request(presigned=True), later=61) == "ExpiredRequest"
    assert refusal(signed_request(presigned=True), secret="other") == "SignatureDoesNotMatch"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"authorization": "Basic x"}, "AuthorizationHeaderMalformed"),
        ({"x-amz-date": "yesterday"}, "AccessDenied"),
        ({"x-amz-content-sha256": "nonsense"}, "InvalidArgument"),
        ({"x-amz-content-sha256": "UNSIGNED-PAYLOAD"}, "SignatureDoesNotMatch"),
        ({"x-amz-meta-new": "1"}, "AccessDenied"),
        ({"host": "other"}, "SignatureDoesNotMatch"),
    ],
)
def test_a_changed_header_is_refused(change: dict[str, str], code: str) -> None:
    request = signed_request()
    request.headers.update(change)
    assert refusal(request) == code


def test_a_changed_target_is_refused() -> None:
    for target in ("/b/other", "/c/k", "/b/k?x=1"):
        changed = Request("PUT", target, signed_request().headers)
        assert refusal(changed) == "SignatureDoesNotMatch"


def test_canonical_forms() -> None:
    assert canonical_path("/b/a b/%7Eü".replace("ü", "%c3%bc")) == "/b/a%20b/~%C3%BC"
    assert canonical_query("b=2&a=%2F&c") == "a=%2F&b=2&c="


# Rules of writing.


def stored(etag: str = "e") -> StoredObject:
    return StoredObject(Body([b"x"]), etag, DAY)


def test_conditions_hold_or_refuse() -> None:
    rules = Rules()
    Conditions(if_none_match="*").check(None, rules)
    Conditions(if_match='"e"').check(stored(), rules)
    Conditions(if_match="*").check(stored(), rules)
    for conditions, current, code in (
        (Conditions(if_none_match="*"), stored(), "PreconditionFailed"),
        (Conditions(if_match='"f"'), stored(), "PreconditionFailed"),
        (Conditions(if_match='"e"'), None, "NoSuchKey"),
        (Conditions(if_none_match='"e"'), None, "NotImplemented"),
    ):
        with pytest.raises(S3Error) as caught:
            conditions.check(current, rules)
        assert caught.value.code == code
    with pytest.raises(S3Error) as caught:
        Conditions(if_match='"e"').check(None, rules.but(if_match_missing=412))
    assert caught.value.status == 412
    assert etag_matches('"a", W/"b"', "b")
    assert not etag_matches('"ab"', "b")


def test_the_limit_of_writes_is_by_key() -> None:
    now = [0.0]
    store = Store(Rules(write_interval=2), monotonic=lambda: now[0])
    store.create_bucket("b")
    store.put("b", "k", stored())
    store.put("b", "other", stored())
    store.put("b", "k", stored(), limited=False)
    now[0] = 1.9
    with pytest.raises(S3Error) as caught:
        store.put("b", "k", stored())
    assert (caught.value.status, caught.value.code) == (429, "TooManyRequests")
    now[0] = 2
    store.put("b", "k", stored())


def test_rules_are_read_from_texts() -> None:
    rules = Rules().with_texts(["write_interval=0.5", "equal_parts=false", "write_limit_code=SlowDown"])
    assert rules == Rules(write_interval=0.5, equal_parts=False, write_limit_code="SlowDown")
    assert Rules.lenient(ranges=False) == Rules(equal_parts=False, min_part_size=0, write_interval=0.0, ranges=False)
    for text in ("no=1", "ranges=yes", "min_part_size=x"):
        with pytest.raises(ValueError):
            Rules().with_texts([text])


# Faults and counts.


def test_a_rule_survives_json() -> None:
    match, action = Match(key="a/*", nth=3, probability=0.5, seed=9), Answer(503, "SlowDown", retry_after=2)
    again, fields = rule_from_json(rule_as_json(match, action))
    assert (again, Match(**fields)) == (action, match)


def test_a_probable_rule_counts_only_what_it_hits() -> None:
    rule = FaultRule(1, Match(probability=0.5, seed=4, count=3), Answer(500))
    request = Request("GET", "/b/k", {})
    hits = [rule.takes(request) for _ in range(50)]
    assert sum(hits) == rule.hits == 3
    assert not all(hits[:4])


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {
        "operation": "GetObject",
        "method": "GET",
        "bucket": "b",
        "key": "k",
        "part_number": None,
        "status": 200,
        "code": "",
        "bytes_in": 0,
        "bytes_out": 0,
        "started": 0.0,
        "seconds": 0.0,
    }
    return Record(**{**fields, **changes})


def test_counts_survive_json() -> None:
    stats = Stats()
    stats.connected()
    stats.sent(stats.add(record(status=206)), 5)
    snapshot = stats.snapshot()
    assert snapshot.bytes_out == snapshot.log[0].bytes_out == 5
    assert StatsSnapshot.from_json(snapshot.as_json(log=True)) == snapshot
    assert StatsSnapshot.from_json(snapshot.as_json(log=False)).log == ()
    assert snapshot.find("GetObject", "k") == list(snapshot.log)
    assert snapshot.find("PutObject") == snapshot.find(key="other") == []
