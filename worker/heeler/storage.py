"""The stores that settings name, and the check that they can be used before the first job is taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from urllib.parse import urlsplit

import anyio

from heeler.errors import UnavailableError, UsageError
from heeler.files import default_sync
from heeler.job import InvalidJobError
from heeler.settings import Settings
from heeler_sync.errors import StoreError, SyncError, TransientStoreError, UnfencedStoreError
from heeler_sync.paths import parse_location
from heeler_sync.snapshot.layout import Layout
from heeler_sync.snapshot.swap import require_fence
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying


def stores(settings: Settings) -> Callable[[str], ObjectStore]:
    """Gives the store of a bucket, the same one each time.

    Raises:
        UsageError: The endpoint is no URL, or only one half of a credential is there.
    """
    url = settings.s3_endpoint
    if url is not None and "@" in url:
        raise UsageError(
            "the storage endpoint holds a user name or password before an '@': leave it out,"
            " and set HEELER_S3_ACCESS_KEY_ID and HEELER_S3_SECRET_ACCESS_KEY"
        )
    if url is not None and not _is_endpoint(url):
        raise UsageError(f"the storage endpoint is {url!r}, but must be like https://ACCOUNT.r2.cloudflarestorage.com")
    if (settings.s3_access_key_id is None) != (settings.s3_secret_access_key is None):
        raise UsageError("of the storage's access key and secret key only one is set; set both (or neither)")

    @cache
    def store(bucket: str) -> ObjectStore:
        return _open(settings, bucket)

    return store


def _open(settings: Settings, bucket: str) -> ObjectStore:
    from heeler_sync.store.s3 import Endpoint, S3ObjectStore  # noqa: PLC0415 - 19 MB, for those who have a bucket

    endpoint = Endpoint(
        url=settings.s3_endpoint,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=settings.s3_secret_access_key,
        session_token=settings.s3_session_token,
        provider=settings.s3_provider,
        no_progress=settings.s3_timeout,
    )
    return S3ObjectStore(bucket, endpoint)


def _is_endpoint(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _is_sqs(settings: Settings) -> bool:
    if settings.source is None:
        return settings.sqs_queue_url is not None
    return settings.source.partition(":")[0] == "sqs"


async def check(
    settings: Settings, open_store: Callable[[str], ObjectStore], on_retry: Callable[[StoreError, float], None]
) -> None:
    """Ask each bucket that the settings name for one page, so that a wrong name or key is told at once.

    Raises:
        UsageError: A bucket does not exist or refuses us.
        UnavailableError: Storage did not answer within the start-up limit.
    """
    try:
        spec = default_sync(settings)
    except InvalidJobError as error:
        raise UsageError(str(error)) from None
    policy = RetryPolicy(patience=settings.startup_timeout, on_retry=on_retry)
    named = [entry.bucket for entry in (*spec.before, *spec.during, *spec.after)]
    recorded = parse_location(settings.records) if settings.records is not None and _is_sqs(settings) else None
    if recorded is not None:
        named.append(recorded.bucket)
    for bucket in dict.fromkeys(named):

        async def look(bucket: str = bucket) -> None:
            async for _ in open_store(bucket).list(".heeler-probe/"):
                break
            if recorded is not None and bucket == recorded.bucket and not settings.allow_unfenced:
                await require_fence(Layout(open_store(bucket), recorded, policy))

        try:
            with anyio.fail_after(max(1.0, settings.startup_timeout)):
                await retrying(policy, look)
        except TimeoutError:
            raise UnavailableError(
                f"storage is out of reach: no answer for bucket {bucket} within {settings.startup_timeout:g} s;"
                " is the endpoint right?"
            ) from None
        except UnfencedStoreError:
            raise UsageError(
                f"the storage of HEELER_RECORDS (bucket {bucket}) ignores conditions on writes, so two workers could"
                " have one job: name another, or set --allow-unfenced"
            ) from None
        except TransientStoreError as error:
            raise UnavailableError(f"storage is out of reach: {error}; is the endpoint right?") from None
        except SyncError as error:
            raise UsageError(f"storage refuses us: {error}; check bucket, keys and endpoint") from None
