"""The check of the link to storage, against a strict S3 server."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest

from heeler.errors import UsageError
from heeler.platform.link import Link, probe_place
from heeler.settings import Settings
from heeler.status import Status
from heeler.storage import stores
from tests.support.s3.process import S3Process


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Process]:
    with S3Process.start(buckets=["bucket"]) as server:
        yield server


def reasons(s3: S3Process, bucket: str, asked: int) -> list[str]:
    settings = Settings(
        s3_endpoint=s3.url,
        s3_access_key_id=s3.access_key,
        s3_secret_access_key=s3.secret_key,
        check_bucket=f"s3://{bucket}/a/",
        check_uplink=asked,
        check_downlink=asked,
    )
    status = Status(lambda *_: None, worker="w", source="s")
    link = Link(stores(settings)(bucket), probe_place(settings), settings, status)
    return anyio.run(link.reasons)


@pytest.mark.parametrize("asked", [1_000, 20_000_000])
def test_a_link_that_is_fast_enough(s3: S3Process, asked: int) -> None:
    assert reasons(s3, "bucket", asked) == []
    assert s3.keys("bucket") == []


def test_a_link_that_is_not_with_the_largest_probe_in_parts(s3: S3Process) -> None:
    s3.stats.reset()
    (reason,) = reasons(s3, "bucket", 10**12)
    assert reason.startswith("uplink ")
    assert reason.endswith(" MB/s, at least 1000000 MB/s asked for by --check-uplink")
    assert s3.keys("bucket") == []
    assert s3.stats.bytes_in < 100 << 20
    assert s3.stats.calls["UploadPart"] == 2 + 8


def test_a_bucket_that_is_not_there(s3: S3Process) -> None:
    with pytest.raises(UsageError, match=r"s3://nothing/a/\.heeler/probe-\w+: .*--check-bucket"):
        reasons(s3, "nothing", 1)
