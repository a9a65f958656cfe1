"""Where jobs come from. `open_source` and `open_desk` find the implementation that a setting names.

Queues of others come in as entry points of the group `heeler.sources`: a callable that takes a `SourceRequest`
and returns a `Source`. They must pass `tests/contract/test_source.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from heeler.errors import UnavailableError, UsageError
from heeler.job import InvalidJobError
from heeler.sources.base import Desk, Source, SourceUnavailableError

_GROUP = "heeler.sources"
_LATER = {"sqs", "salad", "kelpie"}
_NO_SOURCE = (
    "no source of jobs: set --source (or HEELER_SOURCE) to local:FOLDER for a queue in a folder,"
    " or give one job with --job FILE (or HEELER_JOB)"
)


@dataclass(frozen=True)
class SourceRequest:
    """What a source is opened with.

    Attributes:
        spec: The setting: a name, or NAME:ADDRESS.
        worker: Who asks, for people who look at the queue.
        state_dir: A folder that outlives the process.
        job: The document of `once`.
    """

    spec: str | None
    worker: str
    state_dir: Path
    job: bytes | None = None


def open_source(request: SourceRequest) -> Source:
    """The source that a setting names; `once` if none is named but a job is given.

    Raises:
        UsageError: There is none of that name, or what it was given is wrong.
        UnavailableError: It can't be opened now.
    """
    spec = request.spec or ("once" if request.job is not None else None)
    if spec is None:
        raise UsageError(_NO_SOURCE)
    name, _, address = spec.partition(":")
    try:
        if name == "local":
            from heeler.sources.local import LocalSource  # noqa: PLC0415 - only what is used

            return LocalSource(_folder(address), request.worker)
        if name == "once":
            from heeler.sources.once import OnceSource  # noqa: PLC0415

            if request.job is None:
                raise UsageError("source once needs its job: --job FILE, or the document in HEELER_JOB")
            return OnceSource(request.job, request.state_dir)
        return _from_entry_point(name, request)
    except SourceUnavailableError as error:
        raise UnavailableError(str(error)) from None
    except InvalidJobError as error:
        raise UsageError(f"the job is refused: {error}") from None


def open_desk(spec: str | None) -> Desk:
    """Where jobs are submitted and looked up.

    Raises:
        UsageError: The source is none that takes jobs from here.
        UnavailableError: It can't be opened now.
    """
    if spec is None:
        raise UsageError("no source of jobs: set --source (or HEELER_SOURCE) to local:FOLDER")
    name, _, address = spec.partition(":")
    if name != "local":
        raise UsageError(f"source {name!r} takes no jobs from here; use local:FOLDER")
    from heeler.sources.local import LocalDesk  # noqa: PLC0415

    try:
        return LocalDesk(_folder(address))
    except SourceUnavailableError as error:
        raise UnavailableError(str(error)) from None


def _folder(address: str) -> Path:
    if not address:
        raise UsageError("source local needs a folder: local:FOLDER")
    return Path(address).absolute()


def _from_entry_point(name: str, request: SourceRequest) -> Source:
    for entry in entry_points(group=_GROUP, name=name):
        source: Source = entry.load()(request)
        return source
    if name in _LATER:
        raise UsageError(f"source {name!r} is not supported by this version yet; use local:FOLDER or once")
    known = ["local:FOLDER", "once", *(entry.name for entry in entry_points(group=_GROUP))]
    raise UsageError(f"unknown source {name!r}; known are {', '.join(known)}")
