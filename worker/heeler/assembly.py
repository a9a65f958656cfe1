"""Puts the rooms together for the supervisor: the delivery, a job's folders, the forwarder, the machine we run on."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from heeler.app.base import Delivery
from heeler.app.command import CommandDelivery, CommandSettings
from heeler.checkpoints import Checkpoints
from heeler.config import environment_name, secret_names
from heeler.drain import Drain
from heeler.errors import UsageError
from heeler.files import JobFilesSettings, job_files
from heeler.folders import Files
from heeler.forwarder import Forwarder
from heeler.job import Job
from heeler.journal import Journal
from heeler.lease import LeaseKeeper
from heeler.leftovers import Leftovers
from heeler.message import Wanted, of_app_message, of_document, of_kelpie_document, of_recorded_document
from heeler.platform.failures import FailuresInARow
from heeler.platform.imds import Imds
from heeler.settings import Settings
from heeler.sources.base import Lease, Source
from heeler.status import Status
from heeler_sync.snapshot.session import Fences
from heeler_sync.store.base import ObjectStore

_JOB_ID = "{job_id}"
_KELPIE_FAILURES = 5
"""As MAX_JOB_FAILURES of Kelpie's worker."""

_FAULTS = {
    "checkpoint_never_settles",
    "collect_failed",
    "commit_failed",
    "delete_refused",
    "delete_retried",
    "file_left_out",
    "file_never_settles",
    "folder_not_emptied",
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


def is_app_mode(settings: Settings, source: str, program: Sequence[str]) -> bool:
    """Whether jobs are POSTed to an app.

    Raises:
        UsageError: The settings contradict each other.
    """
    app = settings.delivery == "app" or bool(program) or settings.app_url is not None
    if settings.delivery == "command" and app:
        raise UsageError("--delivery command runs each job's own command: leave out the program and --app-url")
    if settings.delivery == "auto" and source == "salad":
        app = True
    if app and not program and settings.app_url is None and source != "salad":
        raise UsageError("who is the app? Name its program (heeler run -- PROGRAM), or where it answers (--app-url)")
    _check_concurrency(settings, source)
    return app


def _check_concurrency(settings: Settings, source: str) -> None:
    if settings.concurrency == 1:
        return
    if source in ("salad", "once"):
        raise UsageError(f"the source {source} gives one job at a time: leave --concurrency at 1")
    for url, folder in (("inputs", "input_dir"), ("checkpoints", "checkpoint_dir"), ("outputs", "output_dir")):
        if getattr(settings, url) is not None and _JOB_ID not in getattr(settings, folder):
            words = f"put {_JOB_ID} into {environment_name(folder)}, such as /jobs/{_JOB_ID}/{folder.split('_')[0]}"
            raise UsageError(f"with --concurrency each job needs folders of its own: {words}")


def reader(source: str, *, app_mode: bool, recorded: bool) -> Callable[[Job], Wanted]:
    """What reads a message's folders."""
    if app_mode:
        return of_app_message
    if source == "kelpie":
        return of_kelpie_document
    return of_recorded_document if recorded else of_document


def overlaps(settings: Settings, source: str, *, app_mode: bool) -> bool:
    """Whether the next job is taken while the outputs of the last one upload.

    Raises:
        UsageError: It is wanted where it can't be.
    """
    if settings.overlap == "on" and source in ("salad", "once"):
        raise UsageError(f"the source {source} gives one job at a time: leave out --overlap on")
    if settings.overlap == "on" and app_mode:
        raise UsageError("an app keeps its folders between jobs, so they can't be moved: leave out --overlap on")
    return settings.overlap == "on" or (settings.overlap == "auto" and source == "kelpie" and not app_mode)


def failure_limit(settings: Settings, source: str, imds: Imds | None) -> int | None:
    """After so many failures in a row the machine is left; None means never."""
    if settings.max_job_failures is None and source == "kelpie" and imds is not None:
        return _KELPIE_FAILURES
    return settings.max_job_failures


def state_file(settings: Settings, source: str) -> Path | None:
    """Where programs read what is under way, if they are Kelpie's."""
    return Path(settings.kelpie_state_file).absolute() if source == "kelpie" else None


def check_moves(settings: Settings, imds: Imds | None) -> None:
    """Refuse what nobody could do here.

    Raises:
        UsageError: A setting is in vain, or contradicts another.
    """
    if settings.recreate_between_jobs and imds is None:
        raise UsageError(
            "--recreate-between-jobs (KELPIE_RECREATE_BETWEEN_JOBS) needs SaladCloud's metadata service,"
            " which is not here"
        )
    if settings.recreate_between_jobs and settings.max_jobs is not None:
        raise UsageError("--max-jobs and --recreate-between-jobs (KELPIE_RECREATE_BETWEEN_JOBS): set only one of them")
    if settings.move_when_idle and settings.exit_when_idle is not None:
        raise UsageError("--exit-when-idle and --move-when-idle (MAX_TIME_WITH_NO_WORK_S): set only one of them")


def make_delivery(
    settings: Settings,
    program: Sequence[str] | None,
    environment: Mapping[str, str],
    journal: Journal,
    drain: Drain,
    status: Status,
) -> Delivery:
    """How jobs reach the program: by command, or with a `program` (which may be empty) as an app."""
    if program is None:
        command = CommandSettings(
            environment=environment,
            retry_exit_codes=settings.retry_exit_codes,
            logs=settings.state_path / "jobs",
        )
        return CommandDelivery(
            command, journal, lambda _job, error: status.fault("job_log_failed", error=error.strerror or str(error))
        )
    return _app(settings, program, environment, journal, drain, status)


def _app(
    settings: Settings,
    argv: Sequence[str],
    environment: Mapping[str, str],
    journal: Journal,
    drain: Drain,
    status: Status,
) -> Delivery:
    from heeler.app.http import HttpDelivery, HttpSettings  # noqa: PLC0415 - of app mode only
    from heeler.app.program import Program, ProgramSettings  # noqa: PLC0415
    from heeler.app.readiness import Readiness, parse_app_url  # noqa: PLC0415

    program = None
    if argv:
        how = ProgramSettings(
            argv, {**environment, **_folders(settings)}, settings.state_path / "app.log", settings.app_max_restarts
        )
        program = Program(how, journal, drain, status.event, status.fault, random.Random())  # noqa: S311 - jitter
    address = None if settings.app_url is None else parse_app_url(settings.app_url)
    readiness = Readiness(program, address, settings.app_health_path, status.event, status.fault)
    http = HttpSettings(
        path=settings.app_path,
        start_timeout=settings.app_start_timeout,
        silence=settings.app_silence,
        timeout=settings.app_timeout,
        answer_bytes=settings.app_answer_bytes,
    )
    return HttpDelivery(http, program, readiness, time.time)


def _folders(settings: Settings) -> dict[str, str]:
    """What an app is told of folders that all jobs share; those of one job come with it."""
    folders = {name: getattr(settings, name.lower()) for name in ("INPUT_DIR", "CHECKPOINT_DIR", "OUTPUT_DIR")}
    return {
        prefix + name: folder for name, folder in folders.items() if _JOB_ID not in folder for prefix in ("", "HEELER_")
    }


def make_forwarder(
    settings: Settings,
    source: Source,
    delivery: Delivery,
    open_store: Callable[[str], ObjectStore],
    status: Status,
    drain: Drain,
    journal: Journal,
    checkpoints: Checkpoints,
    failures: FailuresInARow,
    *,
    read: Callable[[Job], Wanted],
    overlap: bool,
) -> Forwarder:
    """The loop, with all that it needs."""
    on_event = partial(_file_event, status)
    files = JobFilesSettings(
        settings,
        open_store,
        on_event,
        worker=status.worker,
        fences=Fences(on_event, allow_unfenced=settings.allow_unfenced),
        index=journal.file_index(),
        uploads=journal.uploads(),
        leftovers=Leftovers(settings.state_path, status.fault),
        read=read,
    )

    def open_files(lease: Lease, keeper: LeaseKeeper) -> Files:
        return job_files(lease, keeper, files)

    return Forwarder(
        source,
        delivery,
        open_files,
        drain,
        status,
        checkpoints,
        failures,
        rng=random.Random(),  # noqa: S311 - jitter
        retry_delay=settings.retry_delay,
        max_jobs=settings.max_jobs,
        exit_when_idle=settings.move_when_idle or settings.exit_when_idle,
        concurrency=settings.concurrency,
        tries=settings.app_tries,
        overlap=overlap,
        once=settings.recreate_between_jobs,
    )


def _file_event(status: Status, name: str, fields: Mapping[str, object]) -> None:
    if name == "committed":
        status.committed(fields)
        return
    status.unfenced = status.unfenced or name == "unfenced"
    tell = status.fault if name in _FAULTS else status.event
    tell(name, **fields)


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
