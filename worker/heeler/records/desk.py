"""Records as a person needs them: reserved at a submission, listed, cancelled, and with their results."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from heeler.job import check_job_id
from heeler.records.record import DamagedRecordError, Record
from heeler.records.store import ConflictError, RecordStore, Stored
from heeler.records.submission import Place, Wish, place
from heeler_sync.groups import for_each
from heeler_sync.store.base import ObjectStore
from heeler_sync.store.retry import RetryPolicy, retrying

_AT_ONCE = 16
_PATIENCE = 10.0
_SUFFIX = ".json"


class RecordDesk:
    """Owns nothing: all is in the bucket. Every method raises `SyncError`, and `DamagedRecordError`."""

    def __init__(self, records: RecordStore, bucket: Callable[[], ObjectStore]) -> None:
        """Args: the records of a queue, and what gives their bucket."""
        self._records = records
        self._bucket = bucket

    async def reserve(self, wishes: Sequence[Wish]) -> list[Place]:
        """Write a record for each job that needs one; what is to be done with each. All are judged before any write.

        Raises:
            InvalidJobError: An id is another job's.
        """
        found = await self._stored(wish.id for wish in wishes)
        places = {wish.id: place(_record(found.get(wish.id)), wish) for wish in wishes}

        async def write(wish: Wish) -> None:
            places[wish.id] = await self._write(wish, places[wish.id], found.get(wish.id))

        await for_each(wishes, write, _AT_ONCE)
        return [places[wish.id] for wish in wishes]

    async def _write(self, wish: Wish, wanted: Place, over: Stored | None) -> Place:
        while wanted.record is not None:
            try:
                await self._records.write(wanted.record, over)
            except ConflictError as conflict:  # somebody submits the same job now
                over = conflict.found
                wanted = place(_record(over), wish)
            else:
                return wanted
        return wanted

    async def look(self, ids: Iterable[str]) -> dict[str, Record]:
        """Those of these records that there are."""
        return {job_id: stored.record for job_id, stored in (await self._stored(ids)).items()}

    async def all(self) -> tuple[list[Record], list[str]]:
        """All records, oldest first, and a line about each object that is none."""
        found: list[Record] = []
        damaged: list[str] = []

        async def read(key: str) -> None:
            try:
                stored = await self._records.get(self._id_in(key))
            except DamagedRecordError as error:
                damaged.append(str(error))
            else:
                found.extend([] if stored is None else [stored.record])

        await for_each(await retrying(RetryPolicy(patience=_PATIENCE), self._keys), read, _AT_ONCE)
        return sorted(found, key=lambda record: (record.created, record.id)), sorted(damaged)

    async def cancel(self, job_id: str, now: float) -> bool:
        """Cancel a job; whether it had not ended."""
        cancelled = False

        def change(record: Record) -> Record | None:
            nonlocal cancelled
            cancelled = not record.ended
            # Who gets the message knows whether there is a webhook to be sent.
            return record.cancelled(now, "pending") if cancelled else None

        await self._records.update(job_id, change)
        return cancelled

    async def result(self, job_id: str) -> bytes | None:
        """What a job left; None if there is nothing."""
        stored = await self._records.get(job_id)
        if stored is None or not stored.record.result_key:
            return None
        return await self._records.result(stored.record.result_key)

    async def _stored(self, ids: Iterable[str]) -> dict[str, Stored]:
        found: dict[str, Stored] = {}

        async def read(job_id: str) -> None:
            stored = await self._records.get(job_id)
            if stored is not None:
                found[job_id] = stored

        await for_each(ids, read, _AT_ONCE)
        return found

    async def _keys(self) -> list[str]:
        return [info.key async for page in self._bucket().list(f"{self._records.prefix}jobs/") for info in page]

    def _id_in(self, key: str) -> str:
        job_id = key.removeprefix(f"{self._records.prefix}jobs/").removesuffix(_SUFFIX)
        try:
            if key != self._records.key(check_job_id(job_id)):
                raise ValueError
        except ValueError:
            raise DamagedRecordError(f"s3://{self._bucket().bucket}/{key} is no record of a job: delete it") from None
        return job_id


def _record(stored: Stored | None) -> Record | None:
    return None if stored is None else stored.record
