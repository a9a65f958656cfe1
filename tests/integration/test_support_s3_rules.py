"""Our S3 server is strict where moto is lax: conditions, part sizes, rate of writes, digests, signatures."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from botocore.exceptions import ClientError
from obstore.exceptions import GenericError, PermissionDeniedError

from tests.support.s3 import Cut, Rules, S3Process, S3Server, Slow
from tests.support.s3.tls import write_certificate
from tests.support.s3_clients import boto3_client, obstore_store

PART = 5 << 20
UNLIMITED = Rules(write_interval=0)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with S3Server.start(rules=UNLIMITED, buckets=["b"]) as started:
        yield started


@pytest.fixture(scope="module")
def client(server: S3Server) -> Any:
    return boto3_client(server)


def refusal(call: Callable[[], object]) -> tuple[int, str]:
    """Status and code of the error that a boto3 call ends with."""
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


def upload_of(client: Any, key: str, *bodies: bytes) -> dict[str, Any]:
    """An upload with these parts, ready to be completed."""
    upload = client.create_multipart_upload(Bucket="b", Key=key)["UploadId"]
    where = {"Bucket": "b", "Key": key, "UploadId": upload}
    etags = [client.upload_part(**where, PartNumber=n, Body=body)["ETag"] for n, body in enumerate(bodies, 1)]
    parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(etags, 1)]
    return {**where, "MultipartUpload": {"Parts": parts}}


# Multipart uploads.


@pytest.mark.parametrize("sizes", [(PART, PART + 1, PART), (PART + 1, PART, 1), (PART, PART, PART + 1)])
def test_unequal_parts_are_refused(client: Any, server: S3Server, sizes: tuple[int, ...]) -> None:
    upload = upload_of(client, "unequal", *(bytes(size) for size in sizes))
    assert refusal(lambda: client.complete_multipart_upload(**upload)) == (400, "InvalidPart")
    assert "unequal" not in server.objects("b")


@pytest.mark.parametrize("sizes", [(PART, PART, PART), (PART + 1, PART + 1, 1), (1,)])
def test_equal_parts_with_a_last_one_no_larger_are_taken(client: Any, sizes: tuple[int, ...]) -> None:
    client.complete_multipart_upload(**upload_of(client, "equal", *(bytes(size) for size in sizes)))
    assert client.head_object(Bucket="b", Key="equal")["ContentLength"] == sum(sizes)


def test_lenient_rules_take_any_parts() -> None:
    with S3Server.start(rules=Rules.lenient(), buckets=["b"]) as server:
        client = boto3_client(server)
        client.complete_multipart_upload(**upload_of(client, "k", b"1", b"222", b"33"))
        assert server.objects("b") == {"k": b"122233"}


def test_conditions_hold_when_an_upload_completes(client: Any, server: S3Server) -> None:
    etag = server.put("b", "cond", b"old")
    complete, failed = client.complete_multipart_upload, (412, "PreconditionFailed")
    upload = upload_of(client, "cond", b"new")
    assert refusal(lambda: complete(**upload, IfNoneMatch="*")) == failed
    assert refusal(lambda: complete(**upload, IfMatch='"other"')) == failed
    assert server.object("b", "cond").etag == etag
    complete(**upload, IfMatch=f'"{etag}"')
    assert bytes(server.object("b", "cond").body) == b"new"
    missing = upload_of(client, "missing", b"new")
    assert refusal(lambda: complete(**missing, IfMatch='"other"')) == (404, "NoSuchKey")


def test_upload_part_copy_ignores_the_condition_on_its_source(client: Any, server: S3Server) -> None:
    server.put("b", "source", b"data")
    upload = client.create_multipart_upload(Bucket="b", Key="k")["UploadId"]
    client.upload_part_copy(
        Bucket="b",
        Key="k",
        UploadId=upload,
        PartNumber=1,
        CopySource={"Bucket": "b", "Key": "source"},
        CopySourceIfMatch='"other"',
    )


def test_upload_part_copy_refuses_bytes_that_the_source_lacks(client: Any, server: S3Server) -> None:
    server.put("b", "source", b"data")
    upload = client.create_multipart_upload(Bucket="b", Key="k")["UploadId"]
    where = {"Bucket": "b", "Key": "k", "UploadId": upload, "PartNumber": 1}
    source = {"Bucket": "b", "Key": "source"}
    copy = client.upload_part_copy
    beyond = refusal(lambda: copy(**where, CopySource=source, CopySourceRange="bytes=2-4"))
    unbounded = refusal(lambda: copy(**where, CopySource=source, CopySourceRange="bytes=2-"))
    assert (beyond, unbounded) == ((416, "InvalidRange"), (400, "InvalidArgument"))


def test_parts_have_numbers_up_to_ten_thousand_and_an_order(client: Any) -> None:
    upload = upload_of(client, "k", b"1", b"2")
    where = {name: upload[name] for name in ("Bucket", "Key", "UploadId")}
    assert refusal(lambda: client.upload_part(**where, PartNumber=10_001)) == (400, "InvalidArgument")
    assert refusal(lambda: client.upload_part(**where, PartNumber=0)) == (400, "InvalidArgument")
    client.upload_part(**where, PartNumber=10_000)
    backwards = {"Parts": upload["MultipartUpload"]["Parts"][::-1]}
    refused = refusal(lambda: client.complete_multipart_upload(**where, MultipartUpload=backwards))
    assert refused == (400, "InvalidPartOrder")


def test_a_completed_upload_is_read_by_part_numbers_too(client: Any) -> None:
    client.complete_multipart_upload(**upload_of(client, "parts", b"1" * PART, b"22"))
    second = client.get_object(Bucket="b", Key="parts", PartNumber=2)
    assert (second["Body"].read(), second["PartsCount"]) == (b"22", 2)
    assert second["ContentRange"] == f"bytes {PART}-{PART + 1}/{PART + 2}"
    assert refusal(lambda: client.get_object(Bucket="b", Key="parts", PartNumber=3)) == (416, "InvalidRange")


def test_an_ended_upload_takes_no_more_parts(client: Any) -> None:
    upload = upload_of(client, "ended", b"1")
    client.complete_multipart_upload(**upload)
    where = {name: upload[name] for name in ("Bucket", "Key", "UploadId")}
    assert refusal(lambda: client.upload_part(**where, PartNumber=2, Body=b"")) == (404, "NoSuchUpload")
    assert refusal(lambda: client.complete_multipart_upload(**upload)) == (404, "NoSuchUpload")


def test_uploads_and_parts_are_listed_in_pages() -> None:
    with S3Server.start(buckets=["b"]) as server:
        client: Any = boto3_client(server)
        wanted = []
        for key in ("a", "a", "b", "c"):
            wanted.append((key, client.create_multipart_upload(Bucket="b", Key=key)["UploadId"]))
        found: list[tuple[str, str]] = []
        after: dict[str, str] = {}
        while True:
            page = client.list_multipart_uploads(Bucket="b", MaxUploads=1, **after)
            found += [(entry["Key"], entry["UploadId"]) for entry in page["Uploads"]]
            if not page["IsTruncated"]:
                break
            after = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}
        assert sorted(found) == sorted(wanted)
        where = {"Bucket": "b", "Key": "c", "UploadId": wanted[-1][1]}
        for number in (1, 2, 5):
            client.upload_part(**where, PartNumber=number, Body=b"")
        first = client.list_parts(**where, MaxParts=2)
        rest = client.list_parts(**where, PartNumberMarker=first["NextPartNumberMarker"])
        numbers = [[part["PartNumber"] for part in page["Parts"]] for page in (first, rest)]
        assert numbers == [[1, 2], [5]]


# Writing.


def test_a_key_is_written_once_a_second() -> None:
    clock = Clock()
    with S3Server.start(buckets=["b"], monotonic=clock) as server:
        client: Any = boto3_client(server)
        limited = (429, "TooManyRequests")
        client.put_object(Bucket="b", Key="k", Body=b"1")
        clock.now += 0.99
        assert refusal(lambda: client.put_object(Bucket="b", Key="k", Body=b"2")) == limited
        source = {"Bucket": "b", "Key": "k"}
        client.copy_object(Bucket="b", Key="other", CopySource=source)
        assert refusal(lambda: client.copy_object(Bucket="b", Key="other", CopySource=source)) == limited
        upload = upload_of(client, "k", b"3")
        assert refusal(lambda: client.complete_multipart_upload(**upload)) == limited
        clock.now += 0.01
        client.complete_multipart_upload(**upload)
        assert server.objects("b") == {"k": b"3", "other": b"1"}


def test_a_refused_write_does_not_count_against_the_key() -> None:
    clock = Clock()
    with S3Server.start(buckets=["b"], monotonic=clock) as server:
        client: Any = boto3_client(server)
        etag = server.put("b", "k", b"1")
        clock.now += 1
        refusal(lambda: client.put_object(Bucket="b", Key="k", Body=b"2", IfMatch='"other"'))
        client.put_object(Bucket="b", Key="k", Body=b"2", IfMatch=etag)


def test_if_none_match_takes_only_a_star(client: Any, server: S3Server) -> None:
    etag = server.put("b", "star", b"1")
    refused = refusal(lambda: client.put_object(Bucket="b", Key="star", Body=b"", IfNoneMatch=etag))
    assert refused == (501, "NotImplemented")


def test_poor_rules_ignore_conditions_and_ranges() -> None:
    rules = Rules.lenient(conditional_put=False, ranges=False)
    with S3Server.start(rules=rules, buckets=["b"]) as server:
        client: Any = boto3_client(server)
        client.put_object(Bucket="b", Key="k", Body=b"1")
        client.put_object(Bucket="b", Key="k", Body=b"22", IfNoneMatch="*")
        got = client.get_object(Bucket="b", Key="k", Range="bytes=0-0")
        assert (got["Body"].read(), got["ResponseMetadata"]["HTTPStatusCode"]) == (b"22", 200)
        with pytest.raises(GenericError):
            obstore_store(server, "b").get_range("k", start=0, length=1)


def test_a_copy_obeys_the_condition_on_its_source(client: Any, server: S3Server) -> None:
    etag = server.put("b", "a", b"x")
    where = {"Bucket": "b", "Key": "copy", "CopySource": {"Bucket": "b", "Key": "a"}}
    refused = refusal(lambda: client.copy_object(**where, CopySourceIfMatch='"other"'))
    assert refused == (412, "PreconditionFailed")
    client.copy_object(**where, CopySourceIfMatch=etag)
    assert bytes(server.object("b", "copy").body) == b"x"


@pytest.mark.parametrize(
    ("field", "right"),
    [
        ("Content-MD5", base64.b64encode(hashlib.md5(b"body").digest())),
        ("x-amz-checksum-sha256", base64.b64encode(hashlib.sha256(b"body").digest())),
        ("x-amz-checksum-sha1", base64.b64encode(hashlib.sha1(b"body").digest())),
        ("x-amz-checksum-crc32", base64.b64encode(zlib.crc32(b"body").to_bytes(4, "big"))),
    ],
)
def test_a_body_that_does_not_fit_its_digest_is_refused(server: S3Server, field: str, right: bytes) -> None:
    assert signed(server, "PUT", "/b/digest", b"body", {field: right.decode()})[0] == 200
    status, data, _ = signed(server, "PUT", "/b/digest", b"BODY", {field: right.decode()})
    assert (status, code_in(data)) == (400, "BadDigest")
    assert bytes(server.object("b", "digest").body) == b"body"


def test_checksums_come_back_when_asked_for(client: Any) -> None:
    client.put_object(Bucket="b", Key="sum", Body=b"body", ChecksumAlgorithm="SHA256")
    got = client.get_object(Bucket="b", Key="sum", ChecksumMode="ENABLED")
    assert got["ChecksumSHA256"] == base64.b64encode(hashlib.sha256(b"body").digest()).decode()


def test_a_body_of_aws_chunks_is_unwrapped_and_its_trailer_checked(server: S3Server) -> None:
    def put(checksum: bytes, length: int = 4) -> tuple[int, str]:
        trailer = base64.b64encode(checksum)
        body = b"3\r\nbod\r\n1\r\ny\r\n0\r\nx-amz-checksum-crc32:" + trailer + b"\r\n\r\n"
        headers = {
            "Content-Encoding": "aws-chunked,gzip",
            "x-amz-decoded-content-length": str(length),
            "x-amz-trailer": "x-amz-checksum-crc32",
        }
        status, data, _ = signed(server, "PUT", "/b/chunked", body, headers, trailer=True)
        return status, code_in(data)

    crc = zlib.crc32(b"body").to_bytes(4, "big")
    assert put(crc) == (200, "")
    stored = server.object("b", "chunked")
    assert (bytes(stored.body), stored.headers["content-encoding"]) == (b"body", "gzip")
    assert put(b"\0\0\0\0") == (400, "BadDigest")
    assert put(crc, length=5) == (400, "IncompleteBody")


def test_opaque_etags_are_no_md5s() -> None:
    with S3Server.start(rules=UNLIMITED.but(opaque_etags=True), buckets=["b"]) as server:
        client: Any = boto3_client(server)
        first, second = (client.put_object(Bucket="b", Key="k", Body=b"x")["ETag"] for _ in range(2))
        assert first != second != f'"{hashlib.md5(b"x").hexdigest()}"'
        client.put_object(Bucket="b", Key="k", Body=b"y", IfMatch=second)
        client.complete_multipart_upload(**upload_of(client, "m", b"1"))


# Signatures.


def signed(
    server: S3Server,
    method: str,
    path: str,
    body: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    sent_body: bytes | None = None,
    more_headers: Mapping[str, str] | None = None,
    sign: bool = True,
    trailer: bool = False,
) -> tuple[int, bytes, Mapping[str, str]]:
    """Status, body and headers of a request signed by botocore; what is sent can differ from what is signed."""
    request = AWSRequest(method=method, url=server.url + path, data=body, headers=dict(headers or {}))
    if trailer:
        request.context["checksum"] = {"request_algorithm": {"in": "trailer"}}
    if sign:
        S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", "auto").add_auth(request)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        fields = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
        sent = body if sent_body is None else sent_body
        connection.request(method, path, sent, {**fields, **(more_headers or {})})
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())
    finally:
        connection.close()


def code_in(data: bytes) -> str:
    return data.decode().partition("<Code>")[2].partition("</Code>")[0]


def test_a_wrong_secret_and_a_wrong_key_id_are_told_apart(server: S3Server) -> None:
    class Wrong:
        url = server.url
        access_key = server.access_key
        secret_key = "another"

    class Unknown:
        url = server.url
        access_key = "another"
        secret_key = server.secret_key

    for endpoint, code in ((Wrong(), "SignatureDoesNotMatch"), (Unknown(), "InvalidAccessKeyId")):
        client: Any = boto3_client(endpoint)
        assert refusal(partial(client.put_object, Bucket="b", Key="k", Body=b"x")) == (403, code)
        assert refusal(partial(client.list_objects_v2, Bucket="b")) == (403, code)
        with pytest.raises(PermissionDeniedError, match=code):
            obstore_store(endpoint, "b").put("k", b"x")


def test_a_request_without_signature_is_refused(server: S3Server) -> None:
    status, data, _ = signed(server, "PUT", "/b/anonymous", b"x", sign=False)
    assert (status, code_in(data)) == (403, "AccessDenied")
    assert "anonymous" not in server.objects("b")


def test_what_was_signed_is_what_must_be_sent(server: S3Server) -> None:
    def put(**changes: Any) -> tuple[int, str]:
        status, data, _ = signed(server, "PUT", "/b/tamper", b"body", {"x-amz-meta-a": "1"}, **changes)
        return status, code_in(data)

    assert put() == (200, "")
    assert put(sent_body=b"BODY") == (400, "XAmzContentSHA256Mismatch")
    assert put(more_headers={"x-amz-meta-a": "2"}) == (403, "SignatureDoesNotMatch")
    assert put(more_headers={"x-amz-meta-b": "2"}) == (403, "AccessDenied")


def test_signed_paths_and_queries_may_hold_anything(client: Any, server: S3Server) -> None:
    for key in ("a//b", "../up", "/lead", "a?b&c=d#e", "tab\tü%25+ ~*'()", "x" * 1024):
        client.put_object(Bucket="b", Key=key, Body=key.encode())
        assert client.get_object(Bucket="b", Key=key)["Body"].read() == key.encode()
        found = client.list_objects_v2(Bucket="b", Prefix=key)["Contents"]
        assert key in [entry["Key"] for entry in found]
    assert refusal(lambda: client.put_object(Bucket="b", Key="x" * 1025)) == (400, "KeyTooLongError")


def test_obstore_may_leave_payloads_unsigned(server: S3Server) -> None:
    store = obstore_store(server, "b", unsigned_payload=True)
    store.put("unsigned", b"x")
    assert bytes(store.get("unsigned").bytes()) == b"x"


def test_verification_can_be_switched_off() -> None:
    with S3Server.start(rules=Rules(verify_signature=False), buckets=["b"]) as server:
        assert signed(server, "PUT", "/b/k", b"x", sign=False)[0] == 200


# HTTP and TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_certificate(tmp_path_factory.mktemp("tls") / "server.pem")


@pytest.mark.parametrize("algorithm", ["CRC32", "SHA256"])
def test_boto3_sends_checksum_trailers_over_tls(certificate: Path, algorithm: str) -> None:
    rules = Rules.lenient(log_headers=True)
    with S3Server.start(rules=rules, buckets=["b"], certificate=certificate) as server:
        client: Any = boto3_client(server, verify=str(certificate))
        body = io.BytesIO(bytes(3 << 20))
        client.put_object(Bucket="b", Key="k", Body=body, ChecksumAlgorithm=algorithm)
        (record,) = server.stats.find("PutObject")
        assert record.headers is not None
        assert record.headers["x-amz-content-sha256"] == "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
        assert record.headers["x-amz-trailer"] == f"x-amz-checksum-{algorithm.lower()}"
        assert record.headers["expect"] == "100-continue"
        assert server.objects("b") == {"k": bytes(3 << 20)}
        assert client.get_object(Bucket="b", Key="k")["Body"].read() == bytes(3 << 20)


def test_faults_and_obstore_work_over_tls(certificate: Path) -> None:
    with S3Process.start(buckets=["b"], rules=["write_interval=0"], certificate=certificate) as server:
        options = {"allow_invalid_certificates": True}
        store = obstore_store(server, "b", client_options=options, unsigned_payload=True, max_retries=1)
        data = bytes(range(256)) * (12 << 12)
        store.put("k", data, chunk_size=PART)
        for action in (Cut("response_body", after_bytes=1_000_000), Cut("before"), Slow(down=1e8)):
            rule = server.faults.add(action, count=1)
            assert bytes(store.get("k").bytes()) == data
            assert rule.hits == 1
        server.faults.clear()
        server.faults.add(Cut("after"), operation="PutObject")
        with pytest.raises(GenericError):
            store.put("lost", b"x")
        assert server.objects("b") == {"k": data, "lost": b"x"}


def test_boto3_asks_to_continue_and_is_told_so(client: Any, server: S3Server) -> None:
    status, _, _ = signed(server, "PUT", "/b/expect", b"x", more_headers={"Expect": "100-continue"})
    assert status == 200
    with S3Server.start(rules=Rules.lenient(log_headers=True), buckets=["b"]) as logging:
        boto3_client(logging).put_object(Bucket="b", Key="k", Body=b"x")
        (record,) = logging.stats.find("PutObject")
        assert record.headers is not None
        assert record.headers["expect"] == "100-continue"
        assert "authorization" not in record.headers


def test_a_put_without_length_is_refused(server: S3Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
    try:
        request = AWSRequest(method="PUT", url=server.url + "/b/k", headers={})
        S3SigV4Auth(Credentials(server.access_key, server.secret_key), "s3", "auto").add_auth(request)
        connection.request("PUT", "/b/k", iter([b"x"]), dict(request.headers.items()), encode_chunked=True)
        answer = connection.getresponse()
        assert (answer.status, code_in(answer.read())) == (411, "MissingContentLength")
    finally:
        connection.close()


def test_sub_resources_that_are_not_there_say_so(client: Any) -> None:
    assert refusal(lambda: client.get_bucket_versioning(Bucket="b")) == (501, "NotImplemented")
    assert refusal(lambda: client.get_object_tagging(Bucket="b", Key="k")) == (501, "NotImplemented")
