"""Our S3 server and moto's give boto3 and obstore the same results where moto is right."""

from __future__ import annotations

import hashlib
import io
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import obstore
import pytest
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer
from obstore.exceptions import AlreadyExistsError, GenericError, NotModifiedError, PreconditionError

from tests.support.s3 import Rules, S3Server
from tests.support.s3_clients import Endpoint, boto3_client, obstore_store

if TYPE_CHECKING:
    from obstore.store import S3Store

MIB = 1 << 20
PART = 5 * MIB


@dataclass(frozen=True)
class Moto:
    """A moto server."""

    url: str
    access_key: str = "testing"
    secret_key: str = "testing"


@pytest.fixture(scope="module")
def moto() -> Iterator[Moto]:
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield Moto(f"http://{host}:{port}")
    server.stop()


@pytest.fixture(scope="module")
def ours() -> Iterator[S3Server]:
    with S3Server.start(rules=Rules(write_interval=0)) as server:
        yield server


@pytest.fixture(params=["ours", "moto"])
def endpoint(request: pytest.FixtureRequest) -> Endpoint:
    found: Endpoint = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(endpoint: Endpoint) -> Any:
    return boto3_client(endpoint)


@pytest.fixture
def bucket(client: Any) -> str:
    name = f"bucket-{uuid.uuid4().hex[:12]}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def store(endpoint: Endpoint, bucket: str) -> S3Store:
    return obstore_store(endpoint, bucket)


def refusal(call: Callable[[], object]) -> tuple[int, str]:
    """Status and code of the error that a boto3 call ends with."""
    with pytest.raises(ClientError) as caught:
        call()
    response = caught.value.response
    return response["ResponseMetadata"]["HTTPStatusCode"], response["Error"]["Code"]


# boto3, default configuration: checksum trailers or headers, Expect: 100-continue.


def test_boto3_gets_back_what_it_put_with_its_metadata(client: Any, bucket: str) -> None:
    put = client.put_object(
        Bucket=bucket, Key="a b/ü+%.txt", Body=b"hello", ContentType="text/x", Metadata={"step": "7"}
    )
    assert put["ETag"] == f'"{hashlib.md5(b"hello").hexdigest()}"'
    got = client.get_object(Bucket=bucket, Key="a b/ü+%.txt")
    assert got["Body"].read() == b"hello"
    head = client.head_object(Bucket=bucket, Key="a b/ü+%.txt")
    for answer in (got, head):
        assert (answer["ContentLength"], answer["ContentType"]) == (5, "text/x")
        assert (answer["Metadata"], answer["ETag"]) == ({"step": "7"}, put["ETag"])


def test_an_empty_object_is_an_object(client: Any, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="empty", Body=b"")
    assert client.get_object(Bucket=bucket, Key="empty")["Body"].read() == b""
    assert client.head_object(Bucket=bucket, Key="empty")["ContentLength"] == 0


def test_what_is_missing_is_refused_by_its_name(client: Any, bucket: str) -> None:
    assert refusal(lambda: client.get_object(Bucket=bucket, Key="none")) == (404, "NoSuchKey")
    assert refusal(lambda: client.head_object(Bucket=bucket, Key="none")) == (404, "404")
    assert refusal(lambda: client.get_object(Bucket="no-such", Key="k")) == (404, "NoSuchBucket")
    assert refusal(lambda: client.put_object(Bucket="no-such", Key="k")) == (404, "NoSuchBucket")
    assert refusal(lambda: client.list_objects_v2(Bucket="no-such")) == (404, "NoSuchBucket")
    assert refusal(lambda: client.head_bucket(Bucket="no-such")) == (404, "404")


@pytest.mark.parametrize(
    ("header", "content", "content_range"),
    [
        ("bytes=0-0", b"0", "bytes 0-0/10"),
        ("bytes=2-4", b"234", "bytes 2-4/10"),
        ("bytes=7-", b"789", "bytes 7-9/10"),
        ("bytes=-3", b"789", "bytes 7-9/10"),
        ("bytes=8-99", b"89", "bytes 8-9/10"),
        ("bytes=-99", b"0123456789", "bytes 0-9/10"),
    ],
)
def test_a_range_is_answered_with_206(
    client: Any, bucket: str, header: str, content: bytes, content_range: str
) -> None:
    client.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    got = client.get_object(Bucket=bucket, Key="k", Range=header)
    assert got["Body"].read() == content
    assert got["ContentRange"] == content_range
    assert got["ResponseMetadata"]["HTTPStatusCode"] == 206


def test_a_range_past_the_end_is_refused(client: Any, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="k", Body=b"0123456789")
    assert refusal(lambda: client.get_object(Bucket=bucket, Key="k", Range="bytes=10-")) == (416, "InvalidRange")


def test_a_conditional_get_is_answered_by_its_condition(client: Any, bucket: str) -> None:
    etag = client.put_object(Bucket=bucket, Key="k", Body=b"x")["ETag"]
    get = client.get_object
    assert get(Bucket=bucket, Key="k", IfMatch=etag)["Body"].read() == b"x"
    assert get(Bucket=bucket, Key="k", IfNoneMatch='"other"')["Body"].read() == b"x"
    assert refusal(lambda: get(Bucket=bucket, Key="k", IfMatch='"other"')) == (412, "PreconditionFailed")
    assert refusal(lambda: get(Bucket=bucket, Key="k", IfNoneMatch=etag)) == (304, "304")


def test_a_conditional_put_is_refused_unless_its_condition_holds(client: Any, bucket: str) -> None:
    put = client.put_object
    etag = put(Bucket=bucket, Key="k", Body=b"1", IfNoneMatch="*")["ETag"]
    failed = (412, "PreconditionFailed")
    assert refusal(lambda: put(Bucket=bucket, Key="k", Body=b"2", IfNoneMatch="*")) == failed
    assert refusal(lambda: put(Bucket=bucket, Key="k", Body=b"2", IfMatch='"other"')) == failed
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == b"1"
    put(Bucket=bucket, Key="k", Body=b"3", IfMatch=etag)
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == b"3"


def test_if_match_on_a_missing_key_is_no_such_key(client: Any, bucket: str) -> None:
    refused = refusal(lambda: client.put_object(Bucket=bucket, Key="none", Body=b"", IfMatch='"x"'))
    assert refused == (404, "NoSuchKey")


def test_a_listing_is_sorted_and_comes_in_pages(client: Any, bucket: str) -> None:
    keys = ["a", "a/1", "a/2", "b &<>", "ü", "z/x/y", "\U0001f600"]
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=key.encode())
    found, tokens, token = [], 0, ""
    while True:
        more = {"ContinuationToken": token} if token else {}
        page = client.list_objects_v2(Bucket=bucket, MaxKeys=2, **more)
        found += [(entry["Key"], entry["Size"]) for entry in page.get("Contents", [])]
        if not page["IsTruncated"]:
            break
        token, tokens = page["NextContinuationToken"], tokens + 1
    assert found == [(key, len(key.encode())) for key in sorted(keys)]
    assert tokens == 3


def test_a_delimiter_rolls_keys_up(client: Any, bucket: str) -> None:
    for key in ("p/a", "p/b/1", "p/b/2", "p/c/1", "q"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    page = client.list_objects_v2(Bucket=bucket, Prefix="p/", Delimiter="/")
    assert [entry["Key"] for entry in page["Contents"]] == ["p/a"]
    assert [entry["Prefix"] for entry in page["CommonPrefixes"]] == ["p/b/", "p/c/"]
    assert page["KeyCount"] == 3
    after = client.list_objects_v2(Bucket=bucket, StartAfter="p/b/1")
    assert [entry["Key"] for entry in after["Contents"]] == ["p/b/2", "p/c/1", "q"]
    within = client.list_objects_v2(Bucket=bucket, Prefix="p/", Delimiter="/", StartAfter="p/b/1")
    assert [entry["Prefix"] for entry in within["CommonPrefixes"]] == ["p/c/"]


def test_the_old_listing_goes_on_from_its_marker(client: Any, bucket: str) -> None:
    for key in ("a", "b", "c"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    page = client.list_objects(Bucket=bucket, Marker="a", MaxKeys=1)
    assert [entry["Key"] for entry in page["Contents"]] == ["b"]
    assert page["IsTruncated"]


def test_deletes_remove_and_do_not_mind_what_is_gone(client: Any, bucket: str) -> None:
    for key in ("a", "b", "c"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    client.delete_object(Bucket=bucket, Key="a")
    client.delete_object(Bucket=bucket, Key="a")
    answer = client.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": "b"}, {"Key": "gone"}]})
    assert sorted(entry["Key"] for entry in answer["Deleted"]) == ["b", "gone"]
    assert [entry["Key"] for entry in client.list_objects_v2(Bucket=bucket)["Contents"]] == ["c"]


def test_buckets_are_made_listed_and_removed(client: Any, bucket: str) -> None:
    assert bucket in [entry["Name"] for entry in client.list_buckets()["Buckets"]]
    client.head_bucket(Bucket=bucket)
    client.get_bucket_location(Bucket=bucket)
    client.put_object(Bucket=bucket, Key="k", Body=b"")
    assert refusal(lambda: client.delete_bucket(Bucket=bucket)) == (409, "BucketNotEmpty")
    client.delete_object(Bucket=bucket, Key="k")
    client.delete_bucket(Bucket=bucket)
    assert refusal(lambda: client.head_bucket(Bucket=bucket)) == (404, "404")


def test_parts_become_one_object(client: Any, bucket: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key="k", Metadata={"m": "1"})["UploadId"]
    where = {"Bucket": bucket, "Key": "k", "UploadId": upload}
    bodies = {1: b"1" * PART, 2: b"2" * PART, 3: b"3"}
    etags = {n: client.upload_part(**where, PartNumber=n, Body=body)["ETag"] for n, body in bodies.items()}
    listed = client.list_parts(**where)
    assert [(part["PartNumber"], part["Size"]) for part in listed["Parts"]] == [(1, PART), (2, PART), (3, 1)]
    assert [entry["UploadId"] for entry in client.list_multipart_uploads(Bucket=bucket)["Uploads"]] == [upload]
    assert refusal(lambda: client.head_object(Bucket=bucket, Key="k")) == (404, "404")
    parts = [{"PartNumber": n, "ETag": etag} for n, etag in etags.items()]
    done = client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    md5s = b"".join(hashlib.md5(body).digest() for body in bodies.values())
    assert done["ETag"] == f'"{hashlib.md5(md5s).hexdigest()}-3"'
    got = client.get_object(Bucket=bucket, Key="k")
    assert got["Body"].read() == b"".join(bodies.values())
    assert got["Metadata"] == {"m": "1"}
    assert "Uploads" not in client.list_multipart_uploads(Bucket=bucket)
    assert refusal(lambda: client.list_parts(**where)) == (404, "NoSuchUpload")


def test_an_aborted_upload_is_gone(client: Any, bucket: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    where = {"Bucket": bucket, "Key": "k", "UploadId": upload}
    client.upload_part(**where, PartNumber=1, Body=b"1")
    client.abort_multipart_upload(**where)
    assert refusal(lambda: client.list_parts(**where)) == (404, "NoSuchUpload")
    assert refusal(lambda: client.abort_multipart_upload(**where)) == (404, "NoSuchUpload")


def test_a_wrong_list_of_parts_is_refused(client: Any, bucket: str) -> None:
    upload = client.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    where = {"Bucket": bucket, "Key": "k", "UploadId": upload}
    etags = [client.upload_part(**where, PartNumber=n, Body=b"small")["ETag"] for n in (1, 2)]

    def complete(*parts: tuple[int, str]) -> tuple[int, str]:
        rows = [{"PartNumber": number, "ETag": etag} for number, etag in parts]
        return refusal(lambda: client.complete_multipart_upload(**where, MultipartUpload={"Parts": rows}))

    assert complete((1, etags[0]), (2, '"0123456789abcdef0123456789abcdef"')) == (400, "InvalidPart")
    assert complete((1, etags[0]), (3, etags[1])) == (400, "InvalidPart")
    assert complete((1, etags[0]), (2, etags[1])) == (400, "EntityTooSmall")


def test_boto3_upload_and_download_managers_work(client: Any, bucket: str) -> None:
    data = bytes(range(256)) * (20 * MIB // 256)
    client.upload_fileobj(io.BytesIO(data), bucket, "big")
    target = io.BytesIO()
    client.download_fileobj(bucket, "big", target)
    assert target.getvalue() == data
    assert client.head_object(Bucket=bucket, Key="big")["ETag"].endswith('-3"')


def test_a_copy_keeps_or_replaces_metadata(client: Any, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="a ü", Body=b"x", Metadata={"m": "1"}, ContentType="text/x")
    source = {"Bucket": bucket, "Key": "a ü"}
    client.copy_object(Bucket=bucket, Key="b", CopySource=source)
    client.copy_object(Bucket=bucket, Key="c", CopySource=source, Metadata={"m": "2"}, MetadataDirective="REPLACE")
    kept, replaced = (client.get_object(Bucket=bucket, Key=key) for key in "bc")
    assert kept["Body"].read() == replaced["Body"].read() == b"x"
    assert (kept["Metadata"], replaced["Metadata"]) == ({"m": "1"}, {"m": "2"})
    itself = refusal(lambda: client.copy_object(Bucket=bucket, Key="a ü", CopySource=source))
    assert itself == (400, "InvalidRequest")
    missing = {"Bucket": bucket, "Key": "none"}
    assert refusal(lambda: client.copy_object(Bucket=bucket, Key="d", CopySource=missing)) == (404, "NoSuchKey")


def test_parts_are_copied_from_objects(client: Any, bucket: str) -> None:
    client.put_object(Bucket=bucket, Key="source", Body=b"0" * PART + b"123456789")
    upload = client.create_multipart_upload(Bucket=bucket, Key="k")["UploadId"]
    where = {"Bucket": bucket, "Key": "k", "UploadId": upload}
    source = {"Bucket": bucket, "Key": "source"}
    ranges = [f"bytes=0-{PART - 1}", f"bytes={PART + 2}-{PART + 4}"]
    parts = []
    for number, span in enumerate(ranges, 1):
        answer = client.upload_part_copy(**where, PartNumber=number, CopySource=source, CopySourceRange=span)
        parts.append({"PartNumber": number, "ETag": answer["CopyPartResult"]["ETag"]})
    client.complete_multipart_upload(**where, MultipartUpload={"Parts": parts})
    assert client.get_object(Bucket=bucket, Key="k")["Body"].read() == b"0" * PART + b"345"


def test_a_presigned_url_is_all_that_a_stranger_needs(endpoint: Endpoint, bucket: str) -> None:
    client: Any = boto3_client(endpoint, signature_version="s3v4")
    client.put_object(Bucket=bucket, Key="a b", Body=b"x")
    url = client.generate_presigned_url("get_object", Params={"Bucket": bucket, "Key": "a b"})
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"x"


# obstore.


def test_obstore_gets_back_what_it_put(store: S3Store) -> None:
    put = store.put("a b/ü", b"hello")
    got = store.get("a b/ü")
    assert bytes(got.bytes()) == b"hello"
    assert got.meta["e_tag"] == store.head("a b/ü")["e_tag"] == put["e_tag"]
    assert bytes(store.get_range("a b/ü", start=1, end=3)) == b"el"
    assert [bytes(piece) for piece in store.get_ranges("a b/ü", starts=[0, 4], ends=[1, 5])] == [b"h", b"o"]


def test_obstore_says_what_is_missing(endpoint: Endpoint, store: S3Store) -> None:
    for call in (store.get, store.head):
        with pytest.raises(FileNotFoundError):
            call("none")
    elsewhere = obstore_store(endpoint, "no-such")
    with pytest.raises(FileNotFoundError, match="NoSuchBucket"):
        elsewhere.get("k")
    with pytest.raises(GenericError, match="NoSuchBucket"):
        elsewhere.list().collect()


def test_obstore_puts_under_conditions(store: S3Store) -> None:
    first = store.put("k", b"1", mode="create")
    with pytest.raises(AlreadyExistsError):
        store.put("k", b"2", mode="create")
    with pytest.raises(PreconditionError):
        store.put("k", b"2", mode={"e_tag": '"other"'})
    assert first["e_tag"] is not None
    store.put("k", b"3", mode={"e_tag": first["e_tag"]})
    assert bytes(store.get("k").bytes()) == b"3"
    with pytest.raises(PreconditionError):
        store.put("none", b"", mode={"e_tag": '"other"'})
    with pytest.raises(NotModifiedError):
        store.get("k", options={"if_none_match": store.head("k")["e_tag"] or ""})


def test_obstore_sends_a_large_body_in_parts(store: S3Store) -> None:
    data = bytes(range(256)) * (12 * MIB // 256)
    put = store.put("k", data, chunk_size=PART)
    assert (put["e_tag"] or "").endswith('-3"')
    assert bytes(store.get("k").bytes()) == data


def test_obstore_lists_copies_and_deletes(store: S3Store) -> None:
    keys = [f"p/{number:04}" for number in range(1005)]
    for key in keys:
        store.put(key, b"x")
    store.copy("p/0000", "q/r")
    assert [entry["path"] for entry in store.list().collect()] == [*keys, "q/r"]
    assert [entry["path"] for entry in store.list("q").collect()] == ["q/r"]
    rolled = obstore.list_with_delimiter(store)
    assert (rolled["common_prefixes"], rolled["objects"]) == (["p", "q"], [])
    store.delete(keys)
    store.delete("none")
    assert [entry["path"] for entry in store.list().collect()] == ["q/r"]
