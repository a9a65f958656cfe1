"""Starts and stops everything: the one place that wires the rooms together.

Order matters: what an earlier runtime left is ended before a job is taken; the drain ends the forwarder first, and
the control API answers until the last job is handed back.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import anyio
import anyio.to_thread

from heeler.app.base import GivenUp
from heeler.app.processes import OrphanReaper, become_reaper
from heeler.assembly import (
    check_moves,
    failure_limit,
    is_app_mode,
    make_delivery,
    make_forwarder,
    overlaps,
    program_environment,
    reader,
    state_file,
)
from heeler.checkpoints import Checkpoints
from heeler.config import Configuration
from heeler.control import CONTROL_VARIABLE, url_of
from heeler.drain import Drain
from heeler.files import SPOOL
from heeler.forwarder import Forwarder
from heeler.job import Job
from heeler.journal import Journal
from heeler.kelpie_state import KelpieStateFile
from heeler.kelpie_variables import STATE_FILE, without_effect
from heeler.leftovers import Leftovers
from heeler.log import Logger
from heeler.message import Wanted
from heeler.platform.checks import check_machine
from heeler.platform.deletion import DeletionCost
from heeler.platform.failures import FailuresInARow
from heeler.platform.imds import Imds, find_imds
from heeler.platform.moving import leave_unfit, make_anew
from heeler.records.opening import with_records
from heeler.records.source import RecordedSource
from heeler.settings import Settings
from heeler.sources import SourceRequest, guess_source, open_source
from heeler.sources.base import Source, SourceUnavailableError, Verdict
from heeler.sources.facts import CheckedSource
from heeler.status import Phase, Status
from heeler.stopping import announce_drain, leave_at_deadline, take_signals
from heeler.storage import check, stores
from heeler.tasks import background
from heeler_sync.store.base import ObjectStore

T = TypeVar("T")

_REAP_SECONDS = 5.0
_LAST_SECONDS = 0.2


async def supervise(
    configuration: Configuration, program: Sequence[str], log: Logger, leave: Callable[[], NoReturn]
) -> int:
    """Run until the work is done or we are told to stop; the exit code (DESIGN 3).

    Args:
        configuration: All settings.
        program: The user's app and its arguments, if it is ours to run.
        log: Where events go.
        leave: Ends the process at once with 0, at a drain's deadline, when a call that hangs keeps us from it.

    Raises:
        HeelerError: It can't even start.
    """
    settings = configuration.settings
    drain = Drain(settings.stop_grace)
    # No other worker, past or present, has the same name: what a dead one holds is found by it.
    worker = f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(2)}"
    status = Status(log, worker=worker, source=settings.source or "", mask=log.masked)
    spec = settings.source or guess_source(os.environ, settings)
    kind = (spec or "").partition(":")[0]
    app = tuple(program) if is_app_mode(settings, kind, program) else None
    overlap = overlaps(settings, kind, app_mode=app is not None)
    journal = Journal(settings.state_path)
    try:
        imds = find_imds(
            settings.metadata_uri,
            os.environ,
            uri_given=configuration.origins["metadata_uri"] != "default",
            on_event=status.event,
            on_gone=drain.begin,
            clean=status.clean,
        )
        job = settings.job.encode("utf-8", "surrogateescape") if settings.job is not None else None
        request = SourceRequest(spec, worker, settings.state_path, job, settings, imds, app is not None, status.fault)
        open_store = stores(settings)
        bare = open_source(request)
        source = with_records(bare, settings, open_store, worker, status.fault, status.event, documents=app is None)
        status.source = status.clean(source.name)
        if settings.source is None:
            status.event("source_guessed", source=source.name)
        read = reader(kind, app_mode=app is not None, recorded=isinstance(source, RecordedSource))
        check_moves(settings, imds)
        how = _How(app, read, overlap, failure_limit(settings, kind, imds), state_file(settings, kind))
        for variable, reason in without_effect(os.environ) if kind == "kelpie" else ():
            status.event("variable_without_effect", variable=variable, reason=reason)
        runtime = _Runtime(configuration, how, source, open_store, imds, status, drain, journal)
        try:
            async with background(partial(leave_at_deadline, drain, status, leave)):
                return await runtime.run()
            raise AssertionError("background swallows nothing")
        finally:
            if imds is not None:
                imds.close()
            with anyio.move_on_after(_LAST_SECONDS, shield=True):  # nothing is owed any more
                await source.aclose()
    finally:
        journal.close()


@dataclass(frozen=True)
class _How:
    """How jobs are done.

    Attributes:
        app: The app's program and its arguments (none: somebody else started it); None for a command of each job's own.
        read: Reads what a message says of its folders.
        overlap: Whether the next job is taken while the outputs of the last one upload.
        failures: After so many in a row the machine is left; None means never.
        state_file: Where programs of Kelpie's jobs read what is under way, if they do.
    """

    app: Sequence[str] | None
    read: Callable[[Job], Wanted]
    overlap: bool
    failures: int | None
    state_file: Path | None


class _Runtime:
    """One run of the runtime, with all that it is made of."""

    def __init__(
        self,
        configuration: Configuration,
        how: _How,
        source: Source,
        open_store: Callable[[str], ObjectStore],
        imds: Imds | None,
        status: Status,
        drain: Drain,
        journal: Journal,
    ) -> None:
        settings = configuration.settings
        self._settings = settings
        self._source = source
        self._open_store = open_store
        self._imds = imds
        self._status = status
        self._drain = drain
        self._journal = journal
        self._how = how
        self._checkpoints = Checkpoints()
        self._failures = FailuresInARow(how.failures)
        self._listener = _listener(settings)
        self._environment = program_environment(os.environ, configuration.secrets(), scrub=settings.scrub_env)
        if self._listener is not None:
            self._environment[CONTROL_VARIABLE] = url_of(self._listener)
        if how.state_file is not None:
            self._environment[STATE_FILE] = str(how.state_file)
        self._delivery = make_delivery(settings, how.app, self._environment, journal, drain, status)

    async def run(self) -> int:
        """From the first look at what is left of others to the exit code."""
        status, settings = self._status, self._settings
        status.event("started", source=self._source.name, version=_version(), state_dir=settings.state_dir)
        become_reaper()
        await self._succeed()
        drained = [partial(take_signals, self._drain, status), partial(announce_drain, self._drain, status)]
        async with background(*drained, _reap, *self._api()):
            await self._work()
            status.enter(Phase.END)
            if settings.when_done == "idle" and self._delivery.given_up() is None:
                await self._drain.requested.wait()
        return self._code()

    async def _work(self) -> None:
        """Take jobs while there are any; what runs beside it ends with it."""
        async with background(*self._beside()):
            forwarder = await _until_drained(self._drain, self._prepare)
            if forwarder is not None:
                await forwarder.run()
                await self._afterwards(forwarder)

    async def _afterwards(self, forwarder: Forwarder) -> None:
        """What there is to do once no other job is taken here."""
        imds, settings = self._imds, self._settings
        if self._failures.reason is not None:
            await leave_unfit(imds, self._failures.reason, self._drain, self._status)
        elif forwarder.idle and settings.move_when_idle:
            await leave_unfit(imds, f"no job for {settings.move_when_idle:g} s", self._drain, self._status)
        elif forwarder.used and settings.recreate_between_jobs and imds is not None:
            await make_anew(imds, self._drain, self._status)

    def _beside(self) -> list[Callable[[], Awaitable[object]]]:
        cost = [] if self._imds is None else [DeletionCost(self._imds, self._status).run]
        place = self._how.state_file
        state = [] if place is None else [KelpieStateFile(place, self._status).run]
        return [self._delivery.run, self._source.run, *cost, *state]

    def _api(self) -> list[Callable[[], Awaitable[object]]]:
        if self._listener is None:
            return []
        return [partial(self._serve, self._listener)]

    async def _serve(self, listener: socket.socket) -> None:
        from heeler.control.server import serve  # noqa: PLC0415 - fastapi is only imported where it is used

        await serve(
            listener,
            self._status,
            self._drain,
            self._checkpoints,
            lambda: self._delivery.available,
            self._settings.state_path,
        )

    async def _prepare(self) -> Forwarder | None:
        """Check storage and the machine; None if the machine was left."""
        settings, status, open_store = self._settings, self._status, self._open_store
        await check(
            settings,
            open_store,
            lambda error, delay: status.fault("storage_retried", error=str(error), retry_in=round(delay, 3)),
        )
        if isinstance(self._source, CheckedSource):
            await self._source.check(settings.startup_timeout)
        unfit = await check_machine(settings, open_store, self._environment, self._journal, status)
        if unfit:
            await leave_unfit(self._imds, "; ".join(unfit), self._drain, status)
            return None
        return make_forwarder(
            settings,
            self._source,
            self._delivery,
            open_store,
            status,
            self._drain,
            self._journal,
            self._checkpoints,
            self._failures,
            read=self._how.read,
            overlap=self._how.overlap,
        )

    def _end(self) -> GivenUp | Verdict | None:
        """Why no job can come any more, if none can."""
        return self._delivery.given_up() or self._source.verdict()

    def _code(self) -> int:
        """The exit code, and why."""
        if self._drain.requested.is_set():
            self._status.event("stopped", reason=self._drain.reason)
            return 0
        end = self._end()
        if end is None:
            return 0
        tell = self._status.event if end.exit_code == 0 else self._status.fault
        tell("no_more_jobs", reason=end.reason, exit_code=end.exit_code)
        return end.exit_code

    async def _succeed(self) -> None:
        """Take over from the runtime that died in our state folder: end its processes, free its lease."""
        status, journal = self._status, self._journal
        journal.on_fault = status.fault
        leftovers = await anyio.to_thread.run_sync(journal.end_leftovers)
        if leftovers:
            status.fault("leftover_processes_killed", count=leftovers)
        former = journal.former
        try:
            if former is not None:
                await self._source.reclaim(former)
            journal.note_worker(status.worker)
        except SourceUnavailableError as error:
            status.fault("queue_unreachable", error=str(error))
        await anyio.to_thread.run_sync(Leftovers(self._settings.state_path, status.fault).remove)
        # Packs that an earlier runtime had waiting for its uplink: the adopted ones are in storage.
        spool = self._settings.state_path / SPOOL
        await anyio.to_thread.run_sync(partial(shutil.rmtree, spool, ignore_errors=True))


async def _until_drained(drain: Drain, work: Callable[[], Awaitable[T]]) -> T | None:
    """What the work gives; None if a request to stop came first."""
    with drain.requested.ends():
        return await work()
    return None


def _listener(settings: Settings) -> socket.socket | None:
    """Where the control API will be served, unless it is off."""
    if settings.control == "off":
        return None
    from heeler.control.server import bind  # noqa: PLC0415 - fastapi is only imported where it is used

    return bind(settings.control)


async def _reap() -> None:
    reaper = OrphanReaper()
    while True:
        await anyio.sleep(_REAP_SECONDS)
        await anyio.to_thread.run_sync(reaper.look)


def _version() -> str:
    from heeler import __version__  # noqa: PLC0415

    return __version__
