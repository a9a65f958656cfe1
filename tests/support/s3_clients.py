"""boto3 and obstore clients for a test server: no retries unless asked for, so that a test sees each answer."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

import boto3
from botocore.config import Config
from obstore.store import S3Store

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client


class Endpoint(Protocol):
    """What a client must know; `S3Server` and `S3Process` are such."""

    @property
    def url(self) -> str:
        """The endpoint, http."""

    @property
    def access_key(self) -> str:
        """The access key id."""

    @property
    def secret_key(self) -> str:
        """Its secret."""


def boto3_client(
    endpoint: Endpoint,
    *,
    attempts: int = 1,
    url: str | None = None,
    verify: str | bool = True,
    **config: Any,
) -> S3Client:
    """A boto3 client in its default configuration, but path-style; `config` goes to botocore's Config.

    `url` is another way to the same server, such as a proxy's; `verify` is a certificate to trust.
    """
    settings: dict[str, Any] = {
        "s3": {"addressing_style": "path"},
        "retries": {"total_max_attempts": attempts, "mode": "standard"},
        **config,
    }
    return boto3.client(
        "s3",
        endpoint_url=url or endpoint.url,
        aws_access_key_id=endpoint.access_key,
        aws_secret_access_key=endpoint.secret_key,
        region_name="us-east-1",
        verify=verify,
        config=Config(**settings),
    )


def obstore_store(
    endpoint: Endpoint,
    bucket: str,
    *,
    max_retries: int = 0,
    url: str | None = None,
    client_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> S3Store:
    """An obstore store with short backoff."""
    milliseconds = timedelta(milliseconds=1)
    settings: dict[str, Any] = {
        "access_key_id": endpoint.access_key,
        "secret_access_key": endpoint.secret_key,
        "region": "us-east-1",
        "virtual_hosted_style_request": False,
        "client_options": {
            "allow_http": True,
            "timeout": "300s",
            "read_timeout": "30s",
            **(client_options or {}),
        },
        "retry_config": {
            "max_retries": max_retries,
            "retry_timeout": timedelta(seconds=30),
            "backoff": {"base": 2, "init_backoff": milliseconds, "max_backoff": 5 * milliseconds},
        },
        **options,
    }
    return S3Store(bucket, endpoint=url or endpoint.url, **settings)
