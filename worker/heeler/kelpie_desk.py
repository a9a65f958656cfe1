"""The submitter's side of `kelpie`: jobs in Kelpie's API, which people submit, look at and cancel (PROTOCOLS 3).

The API makes the ids itself and knows no repetition: a submission without an answer is never sent again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from typing import Any, TypeVar
from urllib.parse import quote

import anyio

from heeler.errors import HeelerError, UnavailableError, UsageError
from heeler.job import check_job_id
from heeler.sources.base import PLAINLY, JobRecord, PartlySubmittedError, SourceUnavailableError, SubmitOptions
from heeler.sources.kelpie_draft import submission_of
from heeler.sources.kelpie_http import CallRefusedError, KelpieClient, NoSuchJobError
from heeler.sources.kelpie_job import Row

_BATCH = 1000
"""The most jobs of one submission, and of one page that we ask for."""
_SMALL_PAGE = 100
_PACE = (1.0, 10.0)
_STATES = {"completed": "done", "canceled": "cancelled"}
_OPEN = ("pending", "running")
_NOBODY = "user"
"""The API's machine id of a job that a person cancelled."""

T = TypeVar("T")


def record_of(row: Row) -> JobRecord:
    """A job of the API, for people."""
    failed, data = row.status == "failed", row.data
    finished = None if row.status in _OPEN else _moment(data.get(row.status))
    times = "once" if row.failures == 1 else f"{row.failures} times"
    begun = row.failures if failed else row.failures + 1
    return JobRecord(
        id=row.id,
        state=_STATES.get(row.status, row.status),
        attempts=begun if row.started else 0,
        failures=row.failures,
        interruptions=0,
        reason=f"failed {times}" if failed else "",
        worker="" if row.machine_id in (None, _NOBODY) else str(row.machine_id),
        created=_moment(data.get("created")) or 0.0,
        finished=finished,
        result=None,
        heard=_moment(data.get("heartbeat")),
    )


def _moment(text: object) -> float | None:
    """Seconds since 1970 of a time as the API writes it: JavaScript's way or SQLite's, both UTC; None if it is none."""
    try:
        found = datetime.fromisoformat(str(text).replace("Z", "+00:00"))
    except ValueError:
        return None
    return (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()


class KelpieDesk:
    """Kelpie's API, as a person who submits and asks sees it."""

    def __init__(self, client: KelpieClient, group: str | None, let_go: Callable[[], None] | None = None) -> None:
        """Args: the API, our container group, and what is to be called at the end besides."""
        self._client = client
        self._group = group
        self._let_go = let_go

    @property
    def name(self) -> str:
        """As `Desk.name`."""
        return f"Kelpie's API at {self._client.name}"

    @property
    def pace(self) -> tuple[float, float]:
        """As `Desk.pace`: each look is a request or more."""
        return _PACE

    def submit(self, documents: list[bytes], options: SubmitOptions = PLAINLY) -> list[str]:
        """As `Desk.submit`: a thousand at a time, each thousand once."""
        if options.group is not None:
            raise UsageError("--group names a message group of a FIFO queue of SQS, and Kelpie's API has none")
        wanted = [submission_of(body, self._group) for body in documents]
        self._run(partial(self._page, 1, 1))  # what can be found out before there is any doubt
        sent: list[str] = []
        for start in range(0, len(wanted), _BATCH):
            chunk = wanted[start : start + _BATCH]
            try:
                sent += self._run(partial(self._send, chunk))
            except UsageError as error:
                raise _refused(error, sent, len(wanted)) from None
            except SourceUnavailableError as error:
                raise _unsure(error, sent, len(chunk), len(wanted)) from None
        return sent

    def submit_message(self, message: bytes, options: SubmitOptions = PLAINLY) -> str:
        """As `Desk.submit_message`: the API has only jobs with commands."""
        del message, options
        raise UsageError("--raw sends a message for an app, and Kelpie's API takes job documents only: leave it out")

    def notes(self) -> list[str]:
        """As `Desk.notes`: none."""
        return []

    def jobs(self) -> list[JobRecord]:
        """As `Desk.jobs`: those of our container group; of all, if it is not known."""
        return self._run(self._all)

    def show(self, job_id: str) -> JobRecord | None:
        """As `Desk.show`."""
        return self.look([job_id]).get(job_id)

    def look(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """As `Desk.look`."""
        return self._run(partial(self._look, ids))

    def cancel(self, job_id: str) -> bool:
        """As `Desk.cancel`: the API says yes to everything, so it is asked before and after."""
        return self._run(partial(self._cancel, job_id))

    def result(self, job_id: str) -> bytes | None:
        """As `Desk.result`: there is none."""
        del job_id
        raise UsageError("Kelpie's API keeps no results: what a job left is in the storage that its sync names")

    def close(self) -> None:
        """As `Desk.close`."""
        self._client.close()
        if self._let_go is not None:
            self._let_go()

    def _run(self, call: Callable[[], Awaitable[T]]) -> T:
        """Await a call; what the API will never do is an error of the person who asks."""
        try:
            return anyio.run(call)
        except CallRefusedError as error:
            raise UsageError(str(error)) from None
        except NoSuchJobError as error:
            raise UsageError(f"{error}; is KELPIE_API_URL (or --kelpie-url) right?") from None

    async def _send(self, chunk: Sequence[dict[str, Any]]) -> list[str]:
        if len(chunk) == 1:
            return [Row.of(await self._client.call("POST", "/jobs", body=chunk[0])).id]
        found = await self._client.call("POST", "/jobs/batch", body=chunk)
        if not isinstance(found, list) or len(found) != len(chunk):
            raise SourceUnavailableError(f"{self.name} did not say which {len(chunk)} jobs it has made")
        return [Row.of(job).id for job in found]

    async def _page(self, page: int, size: int, **query: str) -> list[Row]:
        told = {"page": str(page), "page_size": str(size), **query}
        found = await self._client.call("GET", "/jobs", query=told)
        if not isinstance(found, dict) or not isinstance(found.get("jobs"), list):
            raise SourceUnavailableError(f"{self.name} gave no list of jobs")
        return [Row.of(job) for job in found["jobs"]]

    async def _row(self, job_id: str) -> Row | None:
        try:
            return Row.of(await self._client.call("GET", _path(check_job_id(job_id))))
        except (NoSuchJobError, ValueError):  # no job has such an id
            return None

    async def _all(self) -> list[JobRecord]:
        group = {} if self._group is None else {"container_group_id": self._group}
        found: dict[str, Row] = {}
        page, more = 1, True
        while more:
            rows = await self._page(page, _BATCH, asc="true", **group)
            known = len(found)
            for row in rows:  # the pages of jobs of the same second may overlap
                found.setdefault(row.id, row)
            more = len(rows) == _BATCH and len(found) > known
            page += 1
        return [record_of(row) for row in found.values()]

    async def _look(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """Pages, the newest jobs first, until they have cost as much as one call for each of the others."""
        left = dict.fromkeys(ids)
        found: dict[str, JobRecord] = {}
        size = min(_BATCH, max(_SMALL_PAGE, 2 * len(left)))
        page, more = 1, True
        while more and page < len(left):
            rows = await self._page(page, size)
            for row in rows:
                if row.id in left:
                    del left[row.id]
                    found[row.id] = record_of(row)
            more = len(rows) == size
            page += 1
        for job_id in left:
            if (one := await self._row(job_id)) is not None:
                found[job_id] = record_of(one)
        return found

    async def _cancel(self, job_id: str) -> bool:
        before = await self._row(job_id)
        if before is None or before.status not in _OPEN:
            return False
        try:
            await self._client.call("DELETE", _path(job_id))
        except CallRefusedError:
            raise
        except SourceUnavailableError as error:
            words = f"{error}; the job may be cancelled all the same: see heeler jobs show {job_id}"
            raise UnavailableError(words) from None
        after = await self._row(job_id)
        return after is not None and after.status == "canceled"


def _path(job_id: str) -> str:
    return f"/jobs/{quote(job_id, safe='')}"


def _refused(error: UsageError, sent: Sequence[str], count: int) -> HeelerError:
    """What to tell of a submission of which the API will not take the next part."""
    if not sent:
        return UsageError(f"nothing was submitted: {error}")
    words = f"{len(sent)} of {count} jobs were submitted, then: {error}; submit the others only, once that is mended"
    return PartlySubmittedError(words, sent, error.exit_code)


def _unsure(error: SourceUnavailableError, sent: Sequence[str], tried: int, count: int) -> HeelerError:
    """What to tell of a submission of which it is not known whether the API has taken the next part."""
    those = "the job" if count == 1 else f"the next {tried} jobs" if sent else f"the first {tried} jobs"
    words = (
        f"{error}; {those} may have been submitted all the same, and would be twice if they were submitted again:"
        " look with heeler jobs first"
    )
    if not sent:
        return UnavailableError(words)
    return PartlySubmittedError(
        f"{len(sent)} of {count} jobs were submitted, then: {words}", sent, UnavailableError.exit_code
    )
