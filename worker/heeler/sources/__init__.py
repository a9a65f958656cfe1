"""Where jobs come from. `open_source` finds the implementation that a setting names (`heeler.desks`: for submitters).

Queues of others come in as entry points of the group `heeler.sources`: a callable that takes a `SourceRequest`
and returns a `Source`. They must pass `tests/contract/test_source.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path

from heeler.errors import UnavailableError, UsageError
from heeler.job import InvalidJobError
from heeler.settings import Settings
from heeler.sources.base import Machine, Source, SourceUnavailableError

_GROUP = "heeler.sources"
FaultSink = Callable[..., None]


def _nobody(_event: str, **_fields: object) -> None:
    return


_SALAD_SETS = ("SALAD_MACHINE_ID", "SALAD_CONTAINER_GROUP_ID")
"""What SaladCloud always sets (PROTOCOLS 2)."""
_NO_SOURCE = (
    "no source of jobs: set --source (or HEELER_SOURCE) to sqs, salad or kelpie, or to local:FOLDER for a queue in a"
    " folder, or give one job with --job FILE (or HEELER_JOB)"
)


@dataclass(frozen=True)
class SourceRequest:
    """What a source is opened with.

    Attributes:
        spec: The setting: a name, or NAME:ADDRESS.
        worker: Who asks, for people who look at the queue.
        state_dir: A folder that outlives the process.
        job: The document of `once`, or in app mode its message.
        settings: All settings.
        machine: The machine that we run on.
        app_mode: Whether messages go to an app as they are; else they are job documents.
        on_fault: Told an event's name and fields when something goes wrong between calls.
    """

    spec: str | None
    worker: str
    state_dir: Path
    job: bytes | None = None
    settings: Settings = field(default_factory=Settings)
    machine: Machine | None = None
    app_mode: bool = False
    on_fault: FaultSink = _nobody


def guess_source(environ: Mapping[str, str], settings: Settings) -> str | None:
    """The source that nobody named: `once` if a job is given, the queue that is, or that of the cloud we run on."""
    if settings.job is not None:
        return "once"
    if settings.sqs_queue_url is not None:
        return "sqs"
    if settings.kelpie_api_key is not None:
        return "kelpie"
    return "salad" if any(environ.get(name) for name in _SALAD_SETS) else None


def open_source(request: SourceRequest) -> Source:
    """The source that a setting names.

    Raises:
        UsageError: There is none of that name, or what it was given is wrong.
        UnavailableError: It can't be opened now.
    """
    spec = request.spec
    if spec is None:
        raise UsageError(_NO_SOURCE)
    name, _, address = spec.partition(":")
    try:
        if name == "local":
            from heeler.sources.local import LocalSource  # noqa: PLC0415 - only what is used

            return LocalSource(folder_of(address), request.worker)
        if name == "once":
            from heeler.sources.once import once_of_document, once_of_message  # noqa: PLC0415

            if request.job is None:
                raise UsageError("source once needs its job: --job FILE, or the document in HEELER_JOB")
            return (once_of_message if request.app_mode else once_of_document)(request.job, request.state_dir)
        if name == "salad":
            from heeler.sources.salad import SaladSource  # noqa: PLC0415 - it brings gRPC

            return SaladSource(request)
        if name == "kelpie":
            from heeler.sources.kelpie import KelpieSource  # noqa: PLC0415

            if address:
                raise UsageError(f"source kelpie takes no address: leave out {address!r}, and set --kelpie-url")
            return KelpieSource(request)
        if name == "sqs":
            from heeler.sources.sqs import SqsSource  # noqa: PLC0415 - it brings boto

            return SqsSource(request)
        return _from_entry_point(name, request)
    except SourceUnavailableError as error:
        raise UnavailableError(str(error)) from None
    except InvalidJobError as error:
        raise UsageError(f"the job is refused: {error}") from None


def folder_of(address: str) -> Path:
    """The folder in `local:FOLDER`; raises `UsageError` if there is none."""
    if not address:
        raise UsageError("source local needs a folder: local:FOLDER")
    return Path(address).absolute()


def _from_entry_point(name: str, request: SourceRequest) -> Source:
    for entry in entry_points(group=_GROUP, name=name):
        source: Source = entry.load()(request)
        return source
    known = ["kelpie", "local:FOLDER", "once", "salad", "sqs", *(entry.name for entry in entry_points(group=_GROUP))]
    raise UsageError(f"unknown source {name!r}; known are {', '.join(known)}")
