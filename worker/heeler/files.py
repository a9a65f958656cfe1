"""A job's folders: which they are, by its document and our settings, and the session that keeps them in storage.

The one room that knows both jobs and `heeler_sync`; sources and app know neither it nor each other.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from heeler.checkpoints import Generation
from heeler.folders import Files, NoFolders
from heeler.job import InvalidJobError, Job, Result, SyncEntry, SyncSpec, first_fault
from heeler.leftovers import Leftovers
from heeler.message import Wanted, of_document
from heeler.patterns import compile_pattern
from heeler.rooms import Rooms
from heeler.settings import Settings
from heeler.sources.base import Lease
from heeler_sync.errors import BadLocationError
from heeler_sync.events import EventSink
from heeler_sync.paths import Location, location, parse_location
from heeler_sync.sender import Permit
from heeler_sync.session import Capture, Plan, Session, SnapshotSettings, SyncFolder
from heeler_sync.settle import SettleTimes
from heeler_sync.snapshot.committer import SnapshotTimes
from heeler_sync.snapshot.holder import Claim
from heeler_sync.snapshot.index import FileIndex
from heeler_sync.snapshot.session import Fences
from heeler_sync.snapshot.uploads import Uploads
from heeler_sync.store.base import ObjectStore
from heeler_sync.threads import in_thread

SPOOL = "spool"
"""In the state folder: what waits for the uplink."""

_JOB_ID = "{job_id}"
_NOTHING = SyncSpec()
_NO_PLAN = Plan((), (), ())
_LEAST_RESERVE = 3.0
_ASSUMED_UPLINK = 2 << 20
"""Bytes a second, until we have measured it: a modest home connection."""


@dataclass(frozen=True)
class JobFilesSettings:
    """What a job's folders depend on besides the job.

    Attributes:
        settings: Ours.
        stores: Gives the store of a bucket.
        on_event: Told of what happens to files.
        worker: Who we are, for people who look at a head.
        fences: Knows which stores enforce conditions.
        index: Keeps what was read of files.
        uploads: The journal of what commits under way have uploaded.
        leftovers: Told of what is set apart.
        read: What a job's message says of its folders.
        base: Relative local paths start here.
    """

    settings: Settings
    stores: Callable[[str], ObjectStore]
    on_event: EventSink
    worker: str
    fences: Fences
    index: FileIndex
    uploads: Uploads
    leftovers: Leftovers
    read: Callable[[Job], Wanted] = of_document
    base: Path = field(default_factory=Path.cwd)

    @cached_property
    def default(self) -> SyncSpec:
        """What jobs have that name no folders; raises `InvalidJobError`."""
        return default_sync(self.settings)

    @cached_property
    def rooms(self) -> Rooms:
        """Which folders jobs may have."""
        return Rooms(self.settings, self.base)


def job_files(lease: Lease, permit: Permit, context: JobFilesSettings) -> Files:
    """A job's folders, worked out; nothing is touched yet.

    Raises:
        InvalidJobError: The message is no job document, or a folder or prefix in it can't be used.
    """
    wanted = context.read(lease.job)
    plan = _plan(lease.job.id, wanted, context)
    if plan == _NO_PLAN:
        return NoFolders(_environment(plan, lease.job.id, context.settings, wanted))
    return JobFiles(lease, permit, wanted, plan, context)


class JobFiles:
    """The folders of one attempt. Implements `heeler.folders.Files`."""

    def __init__(self, lease: Lease, permit: Permit, wanted: Wanted, plan: Plan, context: JobFilesSettings) -> None:
        job = lease.job
        settings = context.settings
        claim = Claim(job.id, wanted.run_id, lease.attempt, context.worker, lease.attempts_ordered)
        self.environment = _environment(plan, job.id, settings, wanted)
        self._name = job.id
        self._leftovers = context.leftovers
        self._session = Session(
            plan,
            context.stores,
            permit=permit,
            on_event=context.on_event,
            times=SettleTimes(settings.debounce, settings.open_wait, settings.max_wait),
            patience=settings.restore_patience,
            snapshots=SnapshotSettings(
                claim=claim,
                fences=context.fences,
                times=SnapshotTimes(settings.checkpoint_quiet, settings.commit_interval, settings.max_wait),
                keep=settings.keep_generations,
                index=context.index,
                spool=settings.state_path / SPOOL,
                uploads=context.uploads,
            ),
        )

    async def restore(self) -> None:
        """As `Files.restore`."""
        await self._session.restore()

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """As `Files.watching`."""
        async with self._session.watching():
            yield

    def freeze(self) -> None:
        """As `Files.freeze`."""
        self._session.freeze()

    def close(self) -> None:
        """As `Files.close`."""
        self._session.close()
        if self._session.apart:
            self._leftovers.abandon(self._name)

    async def flush(self, *, whole: bool, result: Result | None) -> None:
        """As `Files.flush`."""
        await self._session.flush(Capture(whole=whole), result=None if result is None else result.as_json())

    async def set_apart(self) -> bool:
        """As `Files.set_apart`."""
        moved = await self._session.set_apart(self._name, partial(self._leftovers.note, self._name))
        if not moved:
            await in_thread(self._leftovers.drop, self._name)
        return moved

    async def publish(self) -> None:
        """As `Files.publish`."""
        await self._session.publish()

    async def complete(self, result: Result) -> None:
        """As `Files.complete`."""
        await self._session.complete(result.as_json())

    async def checkpoint(self) -> list[Generation]:
        """As `Files.checkpoint`."""
        return [Generation(kept.generation, kept.files, kept.bytes) for kept in await self._session.checkpoint()]

    async def discard(self) -> None:
        """As `Files.discard`."""
        await self._session.discard()
        if self._session.apart and not await in_thread(_any_there, self._session.apart):
            await in_thread(self._leftovers.drop, self._name)

    async def reserve(self) -> float:
        """As `Files.reserve`: what is unsent, and one more of the largest file, at the measured uplink."""
        unsent = await self._session.unsent()
        uplink = self._session.progress.uplink() or _ASSUMED_UPLINK
        return _LEAST_RESERVE + (unsent.bytes + self._session.largest()) / uplink

    def unsent(self) -> set[Path]:
        """As `Files.unsent`."""
        return self._session.unsent_files()

    def durable(self) -> int:
        """As `Files.durable`."""
        return self._session.progress.files_up + self._session.progress.generations


def _plan(job_id: str, wanted: Wanted, context: JobFilesSettings) -> Plan:
    spec = context.default if wanted.sync == _NOTHING else wanted.sync
    rooms = context.rooms
    before = _folders("before", spec.before, job_id, rooms, gzip=wanted.gzip)
    during = _folders("during", spec.during, job_id, rooms, gzip=wanted.gzip)
    after = _folders("after", spec.after, job_id, rooms, gzip=wanted.gzip)
    restored = {folder.location for folder in before}
    # What is kept as generations goes on from the newest, whether `before` says so or not.
    kept = tuple(folder for folder in during if folder.snapshot and folder.location not in restored)
    spare = _standard_folders(job_id, context) if wanted.standard else ()
    plan = Plan((*before, *kept), during, after, spare)
    _refuse_nested(plan.before)
    _refuse_mixed(plan)
    return plan


def _standard_folders(job_id: str, context: JobFilesSettings) -> tuple[Path, ...]:
    """Those of the settings; one that can't be a job's is left alone."""
    found = []
    for folder in (context.settings.input_dir, context.settings.checkpoint_dir, context.settings.output_dir):
        with suppress(ValueError):
            found.append(context.rooms.folder(folder.replace(_JOB_ID, job_id)))
    return tuple(dict.fromkeys(found))


def _refuse_mixed(plan: Plan) -> None:
    """A generation is a whole folder's: no second prefix can be restored into it, and none can be two folders'."""
    for index, folder in enumerate(plan.before):
        for other in plan.before:
            if folder.path == other.path and folder is not other and (folder.snapshot or other.snapshot):
                words = f"{folder.path} is restored from a snapshot, so no other entry can be restored into it"
                raise InvalidJobError(f"sync.before.{index}.local_path", words)
    twice = [folder.location for folder in plan.during if folder.snapshot]
    if len(twice) != len(set(twice)):
        raise InvalidJobError("sync.during", "a snapshot is listed twice; one entry takes the whole folder")
    kept: dict[Location, Path] = {}
    for folder in (*plan.before, *plan.during, *plan.after):
        if folder.snapshot and kept.setdefault(folder.location, folder.path) != folder.path:
            raise InvalidJobError("sync", f"{folder.location} can't be the snapshots of two folders; name two prefixes")


def _refuse_nested(folders: tuple[SyncFolder, ...]) -> None:
    """A restore makes a folder equal to its prefix: what another one restores into it would be moved aside."""
    for index, inner in enumerate(folders):
        for other, outer in enumerate(folders):
            if inner.path != outer.path and inner.path.is_relative_to(outer.path):
                raise InvalidJobError(
                    f"sync.before.{index}.local_path",
                    f"{inner.path} lies inside {outer.path} (sync.before.{other}); name folders of their own",
                )


def default_sync(settings: Settings) -> SyncSpec:
    """The sync of jobs that name none: HEELER_INPUTS, HEELER_CHECKPOINTS and HEELER_OUTPUTS.

    Raises:
        InvalidJobError: One of them is no s3://bucket/prefix/, or many jobs would share one checkpoint.
    """

    def entries(url: str | None, folder: str, name: str, **fields: Any) -> tuple[SyncEntry, ...]:
        if url is None:
            return ()
        try:
            place = parse_location(url)
            return (SyncEntry(bucket=place.bucket, prefix=place.prefix, local_path=folder, **fields),)
        except BadLocationError as error:
            raise InvalidJobError(name, str(error)) from None
        except ValidationError as error:
            raise InvalidJobError(name, f"{url!r}: {first_fault(error)}") from None

    inputs = entries(settings.inputs, settings.input_dir, "HEELER_INPUTS")
    mode = {"mode": settings.checkpoint_mode, "ready": settings.checkpoint_ready}
    checkpoints = entries(settings.checkpoints, settings.checkpoint_dir, "HEELER_CHECKPOINTS", **mode)
    outputs = entries(settings.outputs, settings.output_dir, "HEELER_OUTPUTS")
    if settings.source not in (None, "once") and any(_JOB_ID not in entry.prefix for entry in checkpoints):
        words = f"{settings.checkpoints!r} would give every job of the queue the checkpoint of another; put"
        raise InvalidJobError("HEELER_CHECKPOINTS", f"{words} {_JOB_ID} into the prefix")
    return SyncSpec(before=(*inputs, *checkpoints), during=checkpoints, after=outputs)


def _folders(
    part: str, entries: tuple[SyncEntry, ...], job_id: str, rooms: Rooms, *, gzip: bool
) -> tuple[SyncFolder, ...]:
    found = (_folder(f"sync.{part}.{index}", entry, job_id, rooms) for index, entry in enumerate(entries))
    return tuple(replace(folder, gzip=gzip) for folder in found)


def _folder(where: str, entry: SyncEntry, job_id: str, rooms: Rooms) -> SyncFolder:
    try:
        place = location(entry.bucket, entry.prefix.replace(_JOB_ID, job_id))
    except BadLocationError as error:
        raise InvalidJobError(f"{where}.prefix", str(error)) from None
    try:
        path = rooms.folder(entry.local_path.replace(_JOB_ID, job_id))
    except ValueError as error:
        raise InvalidJobError(f"{where}.local_path", str(error)) from None
    pattern = compile_pattern(entry.pattern) if entry.pattern else None
    return SyncFolder(place, path, pattern, snapshot=entry.mode == "snapshot", ready=entry.ready, deletes=entry.deletes)


def _environment(plan: Plan, job_id: str, settings: Settings, wanted: Wanted) -> Mapping[str, str]:
    """INPUT_DIR and its kin: the first folder of each part, else the folder of the settings.

    The names without HEELER_ are always the latter where the job wants the standard folders.
    """
    during = {folder.path for folder in plan.during}

    def own(folder: str) -> Path:
        return Path(folder.replace(_JOB_ID, job_id))

    standard = {
        "INPUT_DIR": own(settings.input_dir),
        "CHECKPOINT_DIR": own(settings.checkpoint_dir),
        "OUTPUT_DIR": own(settings.output_dir),
    }
    inputs = [folder.path for folder in plan.before if folder.path not in during]
    folders = {
        "INPUT_DIR": next(iter(inputs), standard["INPUT_DIR"]),
        "CHECKPOINT_DIR": next((folder.path for folder in plan.during), standard["CHECKPOINT_DIR"]),
        "OUTPUT_DIR": next((folder.path for folder in plan.after), standard["OUTPUT_DIR"]),
    }
    plain = standard if wanted.standard else folders
    return {
        **{name: str(path) for name, path in plain.items()},
        **{f"HEELER_{name}": str(path) for name, path in folders.items()},
    }


def _any_there(folders: list[Path]) -> bool:
    return any(folder.exists() for folder in folders)
