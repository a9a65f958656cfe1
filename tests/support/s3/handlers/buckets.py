"""Operations on buckets."""

from __future__ import annotations

import re

from ..errors import S3Error
from ..messages import Request, Response
from .base import Context, Handler, iso_time, tag, xml_response

_NAME = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")


def create_bucket(context: Context, request: Request) -> Response:
    """Make it."""
    if not _NAME.fullmatch(request.bucket):
        raise S3Error("InvalidBucketName")
    context.store.create_bucket(request.bucket)
    return Response(200, headers={"Location": f"/{request.bucket}"})


def head_bucket(context: Context, request: Request) -> Response:
    """Say whether it exists."""
    context.store.bucket(request.bucket)
    return Response(200, headers={"x-amz-bucket-region": "auto"})


def delete_bucket(context: Context, request: Request) -> Response:
    """Remove it if it is empty."""
    context.store.delete_bucket(request.bucket)
    return Response(204)


def list_buckets(context: Context, request: Request) -> Response:
    """All of them."""
    rows = "".join(
        f"<Bucket>{tag('Name', bucket.name)}{tag('CreationDate', iso_time(bucket.created))}</Bucket>"
        for bucket in context.store.buckets()
    )
    owner = "<Owner><ID>0</ID><DisplayName>owner</DisplayName></Owner>"
    return xml_response("ListAllMyBucketsResult", f"{owner}<Buckets>{rows}</Buckets>")


def get_bucket_location(context: Context, request: Request) -> Response:
    """The region."""
    context.store.bucket(request.bucket)
    return xml_response("LocationConstraint", "auto")


BUCKET_OPERATIONS: dict[str, Handler] = {
    "CreateBucket": create_bucket,
    "DeleteBucket": delete_bucket,
    "GetBucketLocation": get_bucket_location,
    "HeadBucket": head_bucket,
    "ListBuckets": list_buckets,
}
