"""`heeler sync ls`: what a prefix holds, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from heeler.config import Configuration
from heeler.errors import UsageError
from heeler.sync.place import MIRROR, FailedError, Place, open_place, run
from heeler.sync.voice import Voice, count, size, when
from heeler_sync.paths import is_own
from heeler_sync.snapshot.head import Head, Kept
from heeler_sync.snapshot.manifest import Manifest
from heeler_sync.store.base import ObjectInfo
from heeler_sync.store.retry import retrying


@dataclass(frozen=True)
class ListOptions:
    """What a person asks for besides the address; see the flags."""

    mode: str | None = None
    generation: int | None = None
    files: bool = False
    as_json: bool = False


def print_listing(configuration: Configuration, url: str, options: ListOptions) -> None:
    """Print who holds a prefix and its generations, the files of one, or the plain objects."""
    voice = Voice(as_json=options.as_json)

    async def work() -> int:
        place = await open_place(configuration.settings, url, options.mode, voice)
        if place.mode == MIRROR:
            if options.files:
                raise UsageError(f"--files and --generation are for snapshots, and {place.location} holds plain keys")
            await _print_objects(place, voice)
            return 0
        place.require_head()
        if place.head is None:
            raise FailedError(f"nothing at {place.location}: no snapshot was ever committed there")
        head = place.head[0]
        if options.files:
            kept = chosen(place, head, options.generation)
            _print_files(place, kept, await place.layout.read_manifest(kept), voice)
        else:
            _print_head(place, head, voice)
        return 0

    run(voice, work)


def chosen(place: Place, head: Head, generation: int | None) -> Kept:
    """The generation of that number; without one, the newest.

    Raises:
        HeelerError: The head does not list it.
    """
    if not head.kept:
        raise FailedError(f"{place.location} holds no generation yet")
    if generation is None:
        return head.kept[-1]
    for kept in head.kept:
        if kept.generation == generation:
            return kept
    numbers = ", ".join(str(kept.generation) for kept in head.kept)
    raise UsageError(f"{place.location} does not hold generation {generation}; it holds {numbers}")


def _print_head(place: Place, head: Head, voice: Voice) -> None:
    voice.give({"mode": place.mode, "location": str(place.location), "head": _plain(head)})
    if voice.as_json:
        return
    job = f"job {head.job_id}, attempt {head.attempt}" if head.job_id else "nobody's"
    voice.say(f"prefix   {place.location}")
    voice.say(f"belongs  {job}" + (f", run {head.run_id}" if head.run_id else ""))
    voice.say(f"holder   {head.holder or '?'} (epoch {head.epoch}, since {when(head.acquired)})")
    voice.say(f"status   {head.status}, written {when(head.written)}")
    if head.result is not None:
        voice.say("result   " + " ".join(f"{name}={value}" for name, value in head.result.items() if value is not None))
    if not head.kept:
        voice.say("no generation was committed yet")
        return
    voice.say("")
    rows = [
        (str(kept.generation), when(kept.created), str(kept.files), size(kept.bytes), place.layout.manifest_key(kept))
        for kept in reversed(head.kept)
    ]
    voice.table(("GENERATION", "WHEN", "FILES", "SIZE", "MANIFEST"), rows)


def _plain(head: Head) -> Mapping[str, Any]:
    return {name: value for name, value in asdict(head).items() if name != "writes"}


def _print_files(place: Place, kept: Kept, manifest: Manifest, voice: Voice) -> None:
    tree = manifest.tree
    voice.give(
        {
            "location": str(place.location),
            "generation": kept.generation,
            "files": [
                {"path": path, "size": entry.size, "mode": f"{entry.mode:o}", "mtime": entry.mtime_ns / 1e9}
                for path, entry in sorted(tree.files.items())
            ],
            "folders": sorted(tree.folders),
            "links": dict(sorted(tree.links.items())),
        }
    )
    if voice.as_json:
        return
    rows = [
        (f"{entry.mode:04o}", size(entry.size), when(entry.mtime_ns / 1e9), path) for path, entry in tree.files.items()
    ]
    rows += [(f"{mode:04o}", "", "", path + "/") for path, mode in tree.folders.items()]
    rows += [("", "", "", f"{path} -> {target}") for path, target in tree.links.items()]
    voice.table(("MODE", "SIZE", "CHANGED", "PATH"), sorted(rows, key=lambda row: row[-1]))


async def _print_objects(place: Place, voice: Voice) -> None:
    prefix = place.location.prefix

    async def collect() -> list[ObjectInfo]:
        return [info async for page in place.store.list(prefix) for info in page]

    listed = [
        (info.key.removeprefix(prefix), info.size)
        for info in await retrying(place.policy, collect)
        if not is_own(info.key.removeprefix(prefix))
    ]
    if not listed:
        raise FailedError(f"nothing at {place.location}: no object has a key that begins so")
    voice.give(
        {
            "mode": place.mode,
            "location": str(place.location),
            "objects": [{"path": path, "size": number} for path, number in listed],
        }
    )
    if not voice.as_json:
        voice.table(("SIZE", "PATH"), [(size(number), path) for path, number in listed])
        voice.say(f"{count(len(listed), 'object')}, {size(sum(number for _, number in listed))}")
