"""Records in a bucket: read, listed, and written by compare-and-swap, whose answer is never guessed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import anyio

from heeler.records.record import DamagedRecordError, Record, decode_record, encode_record
from heeler_sync.errors import ObjectNotFoundError, PreconditionFailedError, TransientStoreError
from heeler_sync.store.base import Condition, ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying

_PATIENCE = 10.0


@dataclass(frozen=True)
class Stored:
    """A record as it is in storage.

    Attributes:
        record: The record.
        etag: Of its object.
        written: When we wrote it, by `anyio.current_time`; long ago if we have only read it.
    """

    record: Record
    etag: str
    written: float = -math.inf


class ConflictError(Exception):
    """Somebody else wrote the record.

    Attributes:
        found: What is there now.
    """

    def __init__(self, found: Stored | None) -> None:
        self.found = found
        super().__init__("the record was written by another")


class RecordStore:
    """The records of one queue. Every method raises `StoreError`, and `DamagedRecordError` of what is no record."""

    def __init__(self, open_store: Callable[[], ObjectStore], prefix: str) -> None:
        """Args: gives the bucket, asked when it is first used; and a prefix that ends with `/`."""
        self._open = open_store
        self.prefix = prefix
        self._policy = RetryPolicy(patience=_PATIENCE)

    def key(self, job_id: str) -> str:
        """Where a job's record is."""
        return f"{self.prefix}jobs/{job_id}.json"

    def result_key(self, job_id: str, attempt: int) -> str:
        """Where the result of an attempt is: a key of its own, so that an earlier holder can't overwrite it."""
        return f"{self.prefix}results/{job_id}/{attempt}"

    def named_key(self, name: str) -> str:
        """Where a result is whose job names its key: away from records and from the results of others."""
        return f"{self.prefix}named/{name}"

    async def get(self, job_id: str) -> Stored | None:
        """A job's record, if it has one."""
        return await retrying(self._policy, lambda: self._get(self.key(job_id)))

    async def write(self, record: Record, over: Stored | None) -> Stored:
        """Put a record in the place of `over` (None: of nothing), if that is still what is there.

        Raises:
            ConflictError: It is not.
        """
        signed = record.signed()
        if over is not None:
            await anyio.sleep(max(0.0, over.written + self._open().provider.key_seconds - anyio.current_time()))
        return await retrying(self._policy, lambda: self._write(signed, over))

    async def update(self, job_id: str, change: Callable[[Record], Record | None]) -> Stored | None:
        """Change a record, whoever else writes it meanwhile; as it is then, or None if there is none.

        Args:
            job_id: The job.
            change: Gives the new record from what is there, or None to leave it so.
        """
        found = await self.get(job_id)
        while found is not None:
            changed = change(found.record)
            if changed is None:
                return found
            try:
                return await self.write(changed, found)
            except ConflictError as conflict:
                found = conflict.found
        return None

    async def put_result(self, key: str, body: bytes) -> None:
        """Keep a result."""
        await retrying(self._policy, lambda: self._open().put(key, body))

    async def result(self, key: str) -> bytes | None:
        """A result, if it is there."""
        try:
            return (await retrying(self._policy, lambda: self._download(key)))[0]
        except ObjectNotFoundError:
            return None

    async def _write(self, signed: Record, over: Stored | None) -> Stored:
        condition = Condition(if_match=over.etag) if over is not None else Condition(if_absent=True)
        key = self.key(signed.id)
        store = self._open()
        try:
            etag = await store.put(key, encode_record(signed), condition=condition)
        except (TransientStoreError, PreconditionFailedError, ObjectNotFoundError) as error:
            found = await self._get(key)
            if found is not None and found.record.write == signed.write:
                return found
            if (found and found.etag) != (over and over.etag):
                raise ConflictError(found) from None
            raise TransientStoreError(error.operation, error.bucket, error.key, error.detail) from None
        return Stored(signed, etag, anyio.current_time()) if etag else await self._read_back(key)

    async def _read_back(self, key: str) -> Stored:
        found = await self._get(key)
        if found is None:
            raise TransientStoreError("PutObject", self._open().bucket, key, "no ETag")
        return found

    async def _get(self, key: str) -> Stored | None:
        try:
            data, etag = await self._download(key)
        except ObjectNotFoundError:
            return None
        try:
            return Stored(decode_record(data), etag)
        except DamagedRecordError as error:
            raise DamagedRecordError(f"s3://{self._open().bucket}/{key} {error}") from None

    async def _download(self, key: str) -> tuple[bytes, str]:
        parts: list[bytes] = []
        info = await self._open().download(key, parts.append)
        return b"".join(parts), info.etag
