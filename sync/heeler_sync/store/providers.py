"""What differs between S3 providers, in one table, so that no `if provider` stands anywhere else."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

MIB = 1 << 20


@dataclass(frozen=True)
class Provider:
    """The quirks of one kind of S3 server.

    Attributes:
        name: As written in settings.
        default_region: The region to sign for where the user names none.
        etag_is_md5: Whether ETags are the MD5 of the body, and of the parts' MD5s for multipart uploads, so that
            an ETag that differs from ours means that other bytes were stored.
        conditional_writes: Whether If-Match and If-None-Match on PUT are enforced.
        ranges: Whether a range is answered with 206 and just that range.
        key_seconds: Between two writes of one key, or the second is refused with 429.
        part_bytes: The size of all parts of a multipart upload but the last, in bytes (5 MiB to 5 GiB).
    """

    name: str
    default_region: str = "us-east-1"
    etag_is_md5: bool = True
    conditional_writes: bool = True
    ranges: bool = True
    key_seconds: float = 0.0
    part_bytes: int = 8 * MIB


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("r2", default_region="auto", key_seconds=1.05),
        # With SSE-KMS the ETag of S3 is no MD5; everywhere else it is, but nothing tells us which.
        Provider("aws", etag_is_md5=False),
        Provider("s3"),
        Provider("rclone", conditional_writes=False, ranges=False, etag_is_md5=False),
    )
}
"""By name. `s3` stands for any other server that keeps to S3's documented behaviour (MinIO, Ceph, moto)."""

_BY_HOST = {".r2.cloudflarestorage.com": "r2", ".amazonaws.com": "aws"}


def provider_for(endpoint: str | None, name: str | None = None) -> Provider:
    """The provider that `name` names, else the one that the endpoint's host belongs to, else `s3`.

    Args:
        endpoint: The endpoint's URL; None means AWS.
        name: A key of `PROVIDERS`, or None to guess.

    Raises:
        ValueError: No provider has that name.
    """
    if name is not None:
        try:
            return PROVIDERS[name]
        except KeyError:
            raise ValueError(f"unknown provider {name!r}; known are {', '.join(sorted(PROVIDERS))}") from None
    if endpoint is None:
        return PROVIDERS["aws"]
    host = urlsplit(endpoint).hostname or ""
    for suffix, known in _BY_HOST.items():
        if host.endswith(suffix):
            return PROVIDERS[known]
    return PROVIDERS["s3"]
