"""The object store of S3's wire protocol, on obstore.

obstore's calls block without the GIL, so each runs in a worker thread: measured faster for small objects than its
async API, which can also abort at interpreter exit. Time-outs of reading are "no progress": obstore's read time-out
restarts with each read. Nothing is retried here except the parts of a multipart upload, whose repetition hides nothing.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import anyio
import anyio.to_thread
import obstore
from obstore import Bytes
from obstore.exceptions import BaseError
from obstore.store import S3Store

from heeler_sync.errors import ObjectNotFoundError, PermanentStoreError, ShortAnswerError, TransientStoreError
from heeler_sync.store.base import Condition, ObjectInfo, Reader, Sink
from heeler_sync.store.obstore_errors import store_error
from heeler_sync.store.providers import Provider, provider_for
from heeler_sync.threads import run_stoppable

_FAILURES = (BaseError, OSError, ValueError)
"""What obstore raises: its own errors, and built-in ones where Python has a name for it."""

_RANGE_NOT_SATISFIABLE = "416"
_MIN_CHUNK = 256 * 1024
_PART_CONCURRENCY = 4
_THREADS = 32

# obstore's read time-out also runs while a body is being sent, when nothing is read: a request that sends much
# gets the time that its bytes, and those sent beside it, need on the slowest uplink that we serve.
_SMALL = 256 * 1024
_SLOWEST_UPLINK = 64 * 1024
BYTES_IN_FLIGHT = 32 << 20
"""So many bytes are sent at a time at the most, beside one large file: callers keep to it."""


@dataclass(frozen=True)
class Endpoint:
    """Where a store is and how to sign for it.

    Attributes:
        url: The endpoint's URL; None means AWS.
        region: The region to sign for; None means the provider's default.
        access_key_id: With `secret_access_key`; None means what the machine itself offers (an instance's role).
        secret_access_key: The secret half.
        session_token: For temporary credentials.
        provider: A name of the provider table; None means: by the endpoint's host.
        no_progress: Seconds without a byte after which a request counts as broken.
    """

    url: str | None = None
    region: str | None = None
    access_key_id: str | None = field(default=None, repr=False)
    secret_access_key: str | None = field(default=None, repr=False)
    session_token: str | None = field(default=None, repr=False)
    provider: str | None = None
    no_progress: float = 30.0


class S3ObjectStore:
    """One bucket of an S3-compatible server."""

    def __init__(self, bucket: str, endpoint: Endpoint) -> None:
        self._bucket = bucket
        self._provider = provider_for(endpoint.url, endpoint.provider)
        sending = endpoint.no_progress + BYTES_IN_FLIGHT / _SLOWEST_UPLINK
        self._once = _client(bucket, endpoint, self._provider, endpoint.no_progress, retries=0)
        self._sending = _client(bucket, endpoint, self._provider, sending, retries=0)
        self._parts = _client(bucket, endpoint, self._provider, sending, retries=4, signs_payload=False)
        self._threads = anyio.CapacityLimiter(_THREADS)

    def __repr__(self) -> str:
        return f"S3ObjectStore({self._bucket!r}, provider={self._provider.name!r})"

    @property
    def bucket(self) -> str:
        """The bucket's name."""
        return self._bucket

    @property
    def provider(self) -> Provider:
        """The quirks of the server."""
        return self._provider

    async def head(self, key: str) -> ObjectInfo:
        """As `ObjectStore.head`."""

        def call() -> ObjectInfo:
            # A GET of options head=True: obstore's own head() leaves the metadata out.
            try:
                answer = obstore.get(self._once, key, options={"head": True})
            except _FAILURES as error:
                raise store_error("HeadObject", self._bucket, key, error) from None
            return _info(answer.meta, answer.attributes)

        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)

    async def list(self, prefix: str) -> AsyncIterator[list[ObjectInfo]]:
        """As `ObjectStore.list`."""
        pages = iter(obstore.list(self._once, prefix=prefix or None, chunk_size=1000))

        def call() -> list[ObjectInfo] | None:
            try:
                page = next(pages, None)
            except _FAILURES as error:
                raise store_error("ListObjectsV2", self._bucket, prefix, error) from None
            # obstore cuts the "/" off a folder marker's key; the marker of the prefix itself is no object of it.
            return None if page is None else [_info(meta, {}) for meta in page if meta["path"].startswith(prefix)]

        while True:
            page = await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
            if page is None:
                return
            yield page

    async def download(self, key: str, sink: Sink, *, offset: int = 0, if_match: str | None = None) -> ObjectInfo:
        """As `ObjectStore.download`."""
        stopped = threading.Event()
        options: dict[str, Any] = {}
        if offset:
            options["range"] = {"offset": offset}
        if if_match is not None:
            options["if_match"] = if_match

        def call() -> ObjectInfo:
            info, chunks = self._open(key, options)
            for chunk in chunks:
                if stopped.is_set():
                    break
                sink(chunk)
            return info

        # Abandoned, unlike a write: its sink takes at most one more chunk, and storage may not answer for long.
        try:
            return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)
        finally:
            stopped.set()

    def _open(self, key: str, options: Mapping[str, Any]) -> tuple[ObjectInfo, Iterator[bytes]]:
        """The answer's head and its chunks, the store's errors translated; the sink's errors stay outside."""
        try:
            answer = obstore.get(self._once, key, options=options or None)  # type: ignore[arg-type]
            info = _info(answer.meta, answer.attributes)
            stream = iter(answer.stream(min_chunk_size=_MIN_CHUNK))
        except _FAILURES as error:
            raise store_error("GetObject", self._bucket, key, error) from None
        return info, self._chunks(key, stream)

    def _chunks(self, key: str, stream: Iterator[Any]) -> Iterator[bytes]:
        while True:
            try:
                chunk = next(stream, None)
            except _FAILURES as error:
                raise store_error("GetObject", self._bucket, key, error) from None
            if chunk is None:
                return
            yield bytes(chunk)

    async def read(self, key: str, *, offset: int, length: int) -> bytes:
        """As `ObjectStore.read`."""

        def call() -> bytes:
            try:
                data: Bytes | memoryview
                if self._provider.ranges:
                    data = obstore.get_range(self._once, key, start=offset, length=length)
                else:
                    data = memoryview(obstore.get(self._once, key).bytes())[offset : offset + length]
            except _FAILURES as error:
                failure = store_error("GetObject", self._bucket, key, error)
                if isinstance(failure, PermanentStoreError) and failure.detail.startswith(_RANGE_NOT_SATISFIABLE):
                    raise ShortAnswerError("GetObject", self._bucket, key, "it ends before the range") from None
                raise failure from None
            if len(data) != length:
                raise ShortAnswerError("GetObject", self._bucket, key, f"{len(data)} of {length} bytes came")
            return bytes(data)

        return await anyio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=self._threads)

    async def put(
        self,
        key: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        condition: Condition | None = None,
    ) -> str:
        """As `ObjectStore.put`."""

        def call() -> str:
            try:
                answer = obstore.put(
                    self._once if len(data) <= _SMALL else self._sending,
                    key,
                    data,
                    attributes=dict(metadata or {}),
                    mode=_mode(condition),
                    use_multipart=False,
                )
            except _FAILURES as error:
                raise store_error("PutObject", self._bucket, key, error) from None
            return answer["e_tag"] or ""

        return await run_stoppable(call, _in_one_request, self._threads)

    async def upload(self, key: str, reader: Reader, *, metadata: Mapping[str, str] | None = None) -> str:
        """As `ObjectStore.upload`."""
        guarded = _GuardedReader(reader)

        def call() -> str:
            try:
                answer = obstore.put(
                    self._parts,
                    key,
                    guarded.parts(self._provider.part_bytes),
                    attributes=dict(metadata or {}),
                    use_multipart=True,
                    chunk_size=self._provider.part_bytes,
                    max_concurrency=_PART_CONCURRENCY,
                )
            except _FAILURES as error:
                if guarded.error is not None:
                    raise guarded.error from None
                failure = store_error("UploadPart", self._bucket, key, error)
                if isinstance(failure, ObjectNotFoundError):
                    # A lost answer to the last call: obstore asks again, and the upload is no longer there.
                    unknown = "the multipart upload is gone: completed without an answer, or aborted"
                    failure = TransientStoreError("CompleteMultipartUpload", self._bucket, key, unknown)
                raise failure from None
            return answer["e_tag"] or ""

        return await run_stoppable(call, guarded.stop, self._threads)

    async def delete(self, key: str) -> None:
        """As `ObjectStore.delete`."""

        def call() -> None:
            try:
                obstore.delete(self._once, key)
            except _FAILURES as error:
                failure = store_error("DeleteObject", self._bucket, key, error)
                if not isinstance(failure, ObjectNotFoundError):
                    raise failure from None

        await run_stoppable(call, _in_one_request, self._threads)


class _StoppedError(Exception):
    """The upload's task was cancelled between two parts."""


class _GuardedReader:
    """A reader whose exception is kept (obstore turns it into text) and which can be stopped from outside."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._stopped = False
        self._ended = False
        self.error: Exception | None = None

    def stop(self) -> bool:
        """Let the upload end as a failure; whether it may become visible all the same."""
        with self._lock:
            self._stopped = True
            return self._ended

    def parts(self, size: int) -> Iterator[bytes]:
        """The reader's bytes in parts of `size`; obstore takes the next when a connection is free for it."""
        try:
            while True:
                part = self._reader.read(size)
                self._pass(last=not part)
                if not part:
                    return
                yield part
        except Exception as error:
            self.error = error
            raise

    def _pass(self, *, last: bool) -> None:
        with self._lock:
            if self._stopped:
                raise _StoppedError
            self._ended = last


def _in_one_request() -> bool:
    """A single request can't be recalled: it may take effect as long as it lives."""
    return True


def _mode(condition: Condition | None) -> Any:
    if condition is None:
        return None
    return "create" if condition.if_absent else {"e_tag": condition.if_match}


def _info(meta: Mapping[str, Any], attributes: Mapping[Any, Any]) -> ObjectInfo:
    metadata = {str(name): str(value) for name, value in attributes.items()}
    return ObjectInfo(meta["path"], meta["size"], meta["e_tag"] or "", metadata)


def _client(
    bucket: str,
    endpoint: Endpoint,
    provider: Provider,
    no_progress: float,
    *,
    retries: int,
    signs_payload: bool = True,
) -> S3Store:
    plain = endpoint.url is not None and endpoint.url.startswith("http://")
    options: dict[str, Any] = {
        "region": endpoint.region or provider.default_region,
        "virtual_hosted_style_request": False,
        # A signed body is one whose SHA-256 the server checks. Large files are checked by the parts' ETags instead,
        # where TLS protects them on the way.
        "unsigned_payload": not plain and not signs_payload,
        "client_options": {
            "allow_http": plain,
            "connect_timeout": "10s",
            "read_timeout": timedelta(seconds=no_progress),
            "timeout": "24h",
        },
        "retry_config": {"max_retries": retries, "retry_timeout": timedelta(seconds=120)},
    }
    named: Sequence[tuple[str, str | None]] = (
        ("endpoint", endpoint.url),
        ("access_key_id", endpoint.access_key_id),
        ("secret_access_key", endpoint.secret_access_key),
        ("session_token", endpoint.session_token),
    )
    options.update({name: value for name, value in named if value is not None})
    try:
        return S3Store(bucket, **options)
    except _FAILURES as error:
        detail = str(error).split("\n", 1)[0]
        raise PermanentStoreError("open", bucket, "", f"the storage settings are refused: {detail}") from None
