"""Starts and stops everything: the one place that wires the rooms together.

Order matters: what an earlier runtime left is ended before a job is taken; the drain ends the forwarder first, and
the control API answers until the last job is handed back.
"""

from __future__ import annotations

import os
import random
import secrets
import shutil
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar

import anyio
import anyio.to_thread

from heeler import signals
from heeler.app.command import CommandDelivery, CommandSettings
from heeler.app.processes import OrphanReaper, become_reaper
from heeler.checkpoints import Checkpoints
from heeler.config import Configuration, Settings, environment_name, secret_names
from heeler.control import CONTROL_VARIABLE, url_of
from heeler.drain import Drain
from heeler.files import SPOOL, JobFiles, JobFilesSettings
from heeler.forwarder import Forwarder
from heeler.journal import Journal
from heeler.lease import LeaseKeeper
from heeler.log import Logger
from heeler.sources import SourceRequest, open_source
from heeler.sources.base import Lease, Source, SourceUnavailableError
from heeler.status import Phase, Status
from heeler.storage import check, stores
from heeler.tasks import background
from heeler_sync.snapshot.session import Fences

T = TypeVar("T")

_REAP_SECONDS = 5.0
_LAST_SECONDS = 0.2

_FAULTS = {
    "checkpoint_never_settles",
    "collect_failed",
    "commit_failed",
    "delete_refused",
    "delete_retried",
    "file_left_out",
    "file_never_settles",
    "folder_replaced",
    "generation_damaged",
    "object_replaced",
    "scan_failed",
    "storage_retried",
    "unfenced",
    "uplink_too_slow",
    "upload_refused",
    "upload_retried",
    "watch_unavailable",
}
"""Those of `heeler_sync`'s events that are faults."""


async def supervise(configuration: Configuration, log: Logger, leave: Callable[[], NoReturn]) -> int:
    """Run until the work is done or we are told to stop; the exit code (DESIGN 3).

    Args:
        configuration: All settings.
        log: Where events go.
        leave: Ends the process at once with 0, at a drain's deadline, when a call that hangs keeps us from it.

    Raises:
        HeelerError: It can't even start.
    """
    settings = configuration.settings
    state_dir = settings.state_path
    drain = Drain(settings.stop_grace)
    # No other worker, past or present, has the same name: what a dead one holds is found by it.
    worker = f"{socket.gethostname()}:{os.getpid()}-{secrets.token_hex(2)}"
    journal = Journal(state_dir)
    try:
        job = settings.job.encode() if settings.job is not None else None
        source = open_source(SourceRequest(settings.source, worker, state_dir, job))
        try:
            status = Status(log, worker=worker, source=source.name, mask=log.masked)
            async with background(partial(_leave_at_deadline, drain, status, leave)):
                return await _run(configuration, source, status, drain, journal)
            raise AssertionError("background swallows nothing")
        finally:
            with anyio.CancelScope(shield=True):
                await source.aclose()
    finally:
        journal.close()


async def _run(configuration: Configuration, source: Source, status: Status, drain: Drain, journal: Journal) -> int:
    settings = configuration.settings
    checkpoints = Checkpoints()
    listener = _listener(settings)
    control = [] if listener is None else [partial(_serve, listener, status, drain, checkpoints, settings.state_path)]
    environment = program_environment(os.environ, configuration_secrets(settings), scrub=settings.scrub_env)
    if listener is not None:
        environment[CONTROL_VARIABLE] = url_of(listener)
    status.event("started", source=source.name, version=_version(), state_dir=settings.state_dir)
    become_reaper()
    journal.on_fault = status.fault
    leftovers = await anyio.to_thread.run_sync(journal.end_leftovers)
    if leftovers:
        status.fault("leftover_processes_killed", count=leftovers)
    await _succeed(journal, source, status)
    # Packs that an earlier runtime had waiting for its uplink: the adopted ones are in storage.
    await anyio.to_thread.run_sync(partial(shutil.rmtree, settings.state_path / SPOOL, ignore_errors=True))
    async with background(
        partial(_take_signals, drain, status), partial(_announce_drain, drain, status), _reap, *control
    ):
        make = partial(_forwarder, settings, source, status, drain, journal, checkpoints, environment)
        forwarder = await _until_drained(drain, make)
        if forwarder is not None:
            await forwarder.run()
        status.enter(Phase.END)
        if settings.when_done == "idle":
            await drain.requested.wait()
    if drain.requested.is_set():
        status.event("stopped", reason=drain.reason)
        return 0
    verdict = source.verdict()
    if verdict is None:
        return 0
    tell = status.event if verdict.exit_code == 0 else status.fault
    tell("no_more_jobs", reason=verdict.reason, exit_code=verdict.exit_code)
    return verdict.exit_code


async def _forwarder(
    settings: Settings,
    source: Source,
    status: Status,
    drain: Drain,
    journal: Journal,
    checkpoints: Checkpoints,
    environment: Mapping[str, str],
) -> Forwarder:
    open_store = stores(settings)
    await check(
        settings,
        open_store,
        lambda error, delay: status.fault("storage_retried", error=str(error), retry_in=round(delay, 3)),
    )
    on_event = partial(_file_event, status)
    files = JobFilesSettings(
        settings,
        open_store,
        on_event,
        worker=status.worker,
        fences=Fences(on_event, allow_unfenced=settings.allow_unfenced),
        index=journal.file_index(),
        uploads=journal.uploads(),
    )

    def open_files(lease: Lease, keeper: LeaseKeeper) -> JobFiles:
        return JobFiles(lease, keeper, files)

    command = CommandSettings(
        environment=environment,
        retry_exit_codes=settings.retry_exit_codes,
        logs=settings.state_path / "jobs",
    )
    delivery = CommandDelivery(
        command, journal, lambda _job, error: status.fault("job_log_failed", error=error.strerror or str(error))
    )
    return Forwarder(
        source,
        delivery,
        open_files,
        drain,
        status,
        checkpoints,
        rng=random.Random(),  # noqa: S311 - jitter
        retry_delay=settings.retry_delay,
        max_jobs=settings.max_jobs,
        exit_when_idle=settings.exit_when_idle,
    )


async def _until_drained(drain: Drain, work: Callable[[], Awaitable[T]]) -> T | None:
    """What the work gives; None if a request to stop came first."""
    done = None
    with anyio.CancelScope() as scope:

        async def give_up() -> None:
            await drain.requested.wait()
            scope.cancel()

        async with background(give_up):
            done = await work()
    return done


async def _succeed(journal: Journal, source: Source, status: Status) -> None:
    """Take over from the runtime that died in our state folder, once its processes are gone: no lease has to lapse."""
    former = journal.former
    try:
        if former is not None:
            await source.reclaim(former)
    except SourceUnavailableError as error:
        status.fault("queue_unreachable", error=str(error))
        return
    journal.note_worker(status.worker)


def _listener(settings: Settings) -> socket.socket | None:
    """Where the control API will be served, unless it is off."""
    if settings.control == "off":
        return None
    from heeler.control.server import bind  # noqa: PLC0415 - fastapi is only imported where it is used

    return bind(settings.control)


async def _serve(
    listener: socket.socket, status: Status, drain: Drain, checkpoints: Checkpoints, state_dir: Path
) -> None:
    from heeler.control.server import serve  # noqa: PLC0415

    await serve(listener, status, drain, checkpoints, state_dir)


async def _announce_drain(drain: Drain, status: Status) -> None:
    await drain.requested.wait()
    status.draining = True
    status.event("drain", reason=drain.reason, seconds=round(drain.left(), 3))


async def _leave_at_deadline(drain: Drain, status: Status, leave: Callable[[], NoReturn]) -> None:
    await drain.over()
    await anyio.sleep(_LAST_SECONDS)
    status.fault("exit_forced", error="the grace period is over, and a call does not end")
    leave()


async def _take_signals(drain: Drain, status: Status) -> None:
    """SIGTERM and SIGINT drain; each further SIGINT hurries."""
    try:
        with anyio.open_signal_receiver(*signals.DRAIN_SIGNALS) as received:
            for number in signals.held():
                _take_signal(number, drain, status)
            async for number in received:
                _take_signal(number, drain, status)
    finally:
        signals.hold()  # all is said and done: a late one must not change the exit code


def _take_signal(number: int, drain: Drain, status: Status) -> None:
    name = signal.Signals(number).name
    if not drain.begin(name) and number == signal.SIGINT:
        drain.hurry()
        status.event("drain_hurried", seconds=round(drain.left(), 3))


async def _reap() -> None:
    reaper = OrphanReaper()
    while True:
        await anyio.sleep(_REAP_SECONDS)
        await anyio.to_thread.run_sync(reaper.look)


def _file_event(status: Status, name: str, fields: Mapping[str, object]) -> None:
    if name == "committed":
        status.committed(fields)
        return
    status.unfenced = status.unfenced or name == "unfenced"
    tell = status.fault if name in _FAULTS else status.event
    tell(name, **fields)


def configuration_secrets(settings: Settings) -> set[str]:
    """The credentials that the settings hold."""
    return {
        value
        for value in (settings.s3_access_key_id, settings.s3_secret_access_key, settings.s3_session_token)
        if value
    }


def program_environment(environ: Mapping[str, str], secrets: set[str], *, scrub: bool) -> dict[str, str]:
    """What programs inherit: never heeler's own credentials; none at all under `--scrub-env`."""
    own = {name for name in secret_names() if name.startswith(environment_name(""))}
    kept = {name: value for name, value in environ.items() if name not in own and name != "HEELER_JOB"}
    if not scrub:
        return kept
    hidden = secret_names()
    values = secrets | {environ[name] for name in hidden if environ.get(name)}
    return {
        name: value
        for name, value in kept.items()
        if name not in hidden and value not in values and not any(len(part) >= 4 and part in value for part in values)
    }


def _version() -> str:
    from heeler import __version__  # noqa: PLC0415

    return __version__
