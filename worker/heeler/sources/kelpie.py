"""`kelpie`: jobs of Kelpie's API (PROTOCOLS 3), taken as Salad's own worker takes them.

The API is asked for work at a pace of its own. A job is ours once a heartbeat and a look at it have said so after it
was handed out: two askers may have been given the same one.
"""

from __future__ import annotations

import random
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import anyio

from heeler.errors import UnavailableError, UsageError
from heeler.scopes import Doubling
from heeler.sources import SourceRequest
from heeler.sources.base import BARREN_LIMIT, Lease, LeaseLostError, SourceUnavailableError, Verdict
from heeler.sources.kelpie_book import Book
from heeler.sources.kelpie_calls import Identity, KelpieCalls
from heeler.sources.kelpie_claims import Claims
from heeler.sources.kelpie_http import CallRefusedError, KelpieClient, NoSuchJobError, claims_of, credentials_of
from heeler.sources.kelpie_job import Row, job_of
from heeler.sources.kelpie_lease import KelpieLease
from heeler.sources.kelpie_pace import Pace
from heeler.sources.kelpie_record import FAILED, Held, JobRecord, Records

_TAKE_SECONDS = 15.0
"""What is being taken when nobody wants a job any more is taken to the end for so long: a job may be on its way."""
_RETRY = (0.5, 5.0)
_MADE_UP = re.compile(r"heeler-[0-9a-f]{16}")


@dataclass(frozen=True)
class _Connected:
    """The API, as who we are."""

    calls: KelpieCalls
    book: Book
    claims: Claims


class KelpieSource:
    """The worker's side of the API."""

    def __init__(
        self,
        request: SourceRequest,
        *,
        clock: Callable[[], float] = anyio.current_time,
        rng: random.Random | None = None,
        claims_folder: Path | None = None,
    ) -> None:
        """Args.

        request: The API, who we are to it, the state folder, and who is told of faults.
        clock: Seconds, of the pace at which the API is asked.
        rng: Where jitter comes from.
        claims_folder: Where the workers of this machine have their locks; None is among temporary files.

        Raises:
            UsageError: Something that the API wants to know is missing, or its URL is none.
        """
        settings = request.settings
        self._settings = settings
        self._machine = request.machine
        self._on_fault = request.on_fault
        self._clock = clock
        self._rng = rng or random.Random()  # noqa: S311 - jitter
        self._client = KelpieClient(settings.kelpie_url, credentials_of(settings, request.machine))
        if settings.container_group_id is None and request.machine is None:
            raise UsageError(
                "source kelpie needs to know whose jobs it takes: set SALAD_CONTAINER_GROUP_ID"
                " (or --container-group-id)"
            )
        self._folder = request.state_dir / "kelpie"
        self._records = Records(self._folder, request.on_fault)
        self._left = [known.again() for known in self._records.load_all()]
        """What earlier processes had, or what we could not ask about yet; each is looked at before there is more."""
        self._doubts: dict[str, float] = {}
        """Since when the API could not be asked about one of these, by the clock."""
        self._claims_folder = claims_folder
        self._connected: _Connected | None = None
        self._asking = anyio.Lock()
        self._pace = Pace(settings.kelpie_poll, clock=clock, rng=self._rng, on_fault=request.on_fault)

    @property
    def name(self) -> str:
        """As the user wrote it."""
        return "kelpie"

    async def check(self, patience: float) -> None:
        """As `CheckedSource.check`: one page of our jobs is asked for."""
        backoff = Doubling(*_RETRY, self._rng)
        limit = self._clock() + patience
        while (error := await self._look()) is not None:
            delay = backoff.next()
            if self._clock() + delay >= limit:
                raise UnavailableError(str(error))
            self._on_fault("queue_unreachable", error=str(error), retry_in=round(delay, 3))
            await anyio.sleep(delay)

    async def _look(self) -> SourceUnavailableError | None:
        """Why the API can't be asked for our jobs; None if it can.

        Raises:
            UsageError: It refuses us.
        """
        try:
            group = (await self._connect()).calls.identity.container_group_id
            await self._client.call("GET", "/jobs", query={"container_group_id": group, "page_size": "1"})
        except CallRefusedError as error:
            raise UsageError(str(error)) from None
        except NoSuchJobError as error:
            raise UsageError(f"{error}; is KELPIE_API_URL (or --kelpie-url) right?") from None
        except SourceUnavailableError as error:
            return error
        return None

    async def run(self) -> None:
        """As `Source.run`: nothing goes on between calls."""

    async def pause(self) -> None:
        """As `Source.pause`: jobs come only when they are asked for."""

    async def receive(self, *, wait: float) -> Lease | None:
        """As `Source.receive`: first what an earlier process had here, then what the API hands out."""
        limit = self._clock() + wait
        while self._clock() + (rest := self._pace.rest()) <= limit:
            await anyio.sleep(rest)
            async with self._asking:
                if self._pace.rest() <= 0 and (lease := await self._ask()) is not None:
                    return lease
        await anyio.sleep(max(0.0, limit - self._clock()))
        return None

    async def reclaim(self, worker: str) -> None:
        """As `Source.reclaim`: what is held is found in the state folder, not by name."""

    def verdict(self) -> Verdict | None:
        """None: somebody may submit at any time."""
        return None

    async def aclose(self) -> None:
        """Let go of connections."""
        self._client.close()

    async def _ask(self) -> Lease | None:
        """To its end, cancelled or not: who asks for work has it, whether the answer is waited for or not."""
        with anyio.move_on_after(_TAKE_SECONDS, shield=True):
            return await self._next(await self._connect())
        raise SourceUnavailableError(f"Kelpie's API at {self._client.name} gave no answer in {_TAKE_SECONDS:g} s")

    async def _next(self, to_api: _Connected) -> Lease | None:
        """The next job that is ours; None where the API has none now."""
        lease = None
        try:
            for _ in range(len(self._left)):
                if (lease := await self._offer_again(self._left.pop(0), to_api)) is not None:
                    return lease
            row = await to_api.calls.work()
            lease = None if row is None else await self._offer(self._taken(row, to_api), to_api)
        finally:
            self._pace.asked(found=lease is not None)
        return lease

    def _taken(self, row: Row, to_api: _Connected) -> JobRecord:
        """The record of a job that was handed out to us just now."""
        self._forget(row.id)
        record = JobRecord(dict(row.data), to_api.calls.identity.machine_id)
        known = self._records.load(row.id)
        return record if known is None else record.after(known)

    async def _offer_again(self, record: JobRecord, to_api: _Connected) -> Lease | None:
        """As `_offer`; a job that the API can't be asked about keeps us from others only while it may be ours."""
        row = record.row
        since = self._doubts.pop(row.id, self._clock())
        try:
            return await self._offer(record, to_api)
        except SourceUnavailableError as error:
            self._doubts[row.id] = since
            if not record.verdict and self._clock() - since < 2 * row.interval:
                raise
            self._on_fault("job_in_doubt", job_id=row.id, error=str(error))
            if not record.verdict:  # silent for so long, it is handed out anew
                self._forget(row.id)
            return None

    def _forget(self, job_id: str) -> None:
        """It is on disk at most: as what came before, if we are given it again."""
        self._left = [left for left in self._left if left.row.id != job_id]
        self._doubts.pop(job_id, None)

    async def _offer(self, record: JobRecord, to_api: _Connected) -> Lease | None:
        """The lease of a job that was handed out to us, now or to an earlier process, if it is ours."""
        try:
            claim = to_api.claims.claim(record.row.id)
        except OSError as error:
            self._left.append(record)
            raise SourceUnavailableError(_unusable(error)) from None
        if claim is None:
            await self._pass_on(record, to_api)
            return None
        held = Held(record, claim, tried=bool(record.verdict))
        lease = None
        try:
            lease = await self._lease(held, to_api.book)
        except LeaseLostError as error:
            self._on_fault("job_not_ours", job_id=held.id, error=str(error))
            to_api.book.settle(held)
        except BaseException:
            self._left.append(held.record)  # it may be ours: to be asked again
            raise
        finally:
            if lease is None:
                claim.release()
        return lease

    async def _pass_on(self, record: JobRecord, to_api: _Connected) -> None:
        """What somebody of this machine has already goes on there: in another lane of ours, or by word to a sibling."""
        words = "another worker of this machine has it"
        try:
            if await to_api.book.renew(record.row.id):
                return
            if not record.started and (started := await to_api.book.handed_out(record)):
                to_api.claims.leave_word(record.row.id, started)
        except OSError as error:
            words = f"{words}, and can't be told: {error}"
        except BaseException:
            self._left.append(record)
            raise
        self._on_fault("job_of_sibling", job_id=record.row.id, error=words)

    async def _lease(self, held: Held, book: Book) -> Lease | None:
        """The lease, once the API has said that the job is ours; None if all that is left of it was a report."""
        if held.record.verdict:
            await book.report(held, held.record.verdict)
            return None
        await book.confirm(held)
        if held.record.barren > BARREN_LIMIT:
            reason = f"{BARREN_LIMIT} attempts in a row ended without an answer and without anything made durable"
            self._on_fault("job_barren", job_id=held.id, error=reason)
            await book.report(held, FAILED)
            return None
        self._records.prune()
        return KelpieLease(job_of(held.record.row, self._settings), held, book, self._pace)

    async def _connect(self) -> _Connected:
        """The API, once it is known who we are."""
        if self._connected is None:
            calls = KelpieCalls(self._client, await self._identity())
            # Those whom the API takes for one machine.
            scope = f"{self._client.name} {calls.identity.container_group_id} {calls.identity.machine_id}"
            try:
                claims = Claims(scope, self._claims_folder)
                claims.prepare()
            except OSError as error:
                raise UsageError(_unusable(error)) from None
            self._connected = _Connected(calls, Book(calls, self._records, self._clock), claims)
        return self._connected

    async def _identity(self) -> Identity:
        machine, group = self._settings.machine_id, self._settings.container_group_id
        if self._machine is not None and (machine is None or group is None):
            claims = claims_of(await self._machine.token())
            machine = machine or str(claims.get("salad_machine_id") or "") or None
            group = group or str(claims.get("salad_workload_id") or "") or None
        if group is None:
            raise SourceUnavailableError("the machine's token names no container group: set SALAD_CONTAINER_GROUP_ID")
        return Identity(machine or self._made_up_id(), group)

    def _made_up_id(self) -> str:
        """An id for a machine that is none of SaladCloud's: the same for ever."""
        place = self._folder / "machine-id"
        try:
            with suppress(FileNotFoundError):
                if _MADE_UP.fullmatch(found := place.read_text(encoding="ascii", errors="replace")):
                    return found
            made = f"heeler-{secrets.token_hex(8)}"
            self._folder.mkdir(parents=True, exist_ok=True)
            place.write_text(made, encoding="ascii")
        except OSError as error:
            raise UsageError(f"{place} can't be kept: {error.strerror}; set SALAD_MACHINE_ID") from None
        return made


def _unusable(error: OSError) -> str:
    return f"the locks of jobs can't be kept: {error}; set TMPDIR to a folder of your own"
