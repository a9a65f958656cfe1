"""Plain keys and a folder: what both have in common already, and bringing one to the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio

from heeler.settings import Settings
from heeler.sync.compare import everything
from heeler.sync.place import FailedError, Place
from heeler.sync.voice import Amount, Voice, count, size
from heeler_sync.download import Wanted, list_wanted
from heeler_sync.errors import FileChangedError, LocalFileError
from heeler_sync.groups import background, for_each
from heeler_sync.mirror import Capture, Mirror
from heeler_sync.progress import Progress
from heeler_sync.sender import AlwaysPermitted, MirrorContext
from heeler_sync.settle import SettleTimes
from heeler_sync.store.base import DIGEST_KEY
from heeler_sync.store.retry import RetryingStore
from heeler_sync.threads import in_thread
from heeler_sync.tree import scan
from heeler_sync.upload import Stored, digest_file

_AT_ONCE = 16


def refuse_beside_generations(place: Place) -> None:
    """Plain keys beside generations would never be restored.

    Raises:
        FailedError: The prefix holds generations.
    """
    if place.head is not None or place.trouble is not None:
        raise FailedError(
            f"{place.location} holds snapshots: plain keys beside them would never be restored;"
            " leave --mode mirror out, or name another prefix"
        )


async def in_storage(place: Place, root: Path) -> dict[str, Stored]:
    """The files of the folder that storage holds just so, by relative path; it is asked for their digests."""
    store = RetryingStore(place.store, place.policy)
    local = (await in_thread(scan, root, everything)).files
    wanted = await list_wanted(store, place.location, everything)
    found: dict[str, Stored] = {}

    async def compare(item: Wanted) -> None:
        info = await store.head(item.info.key)
        digest = info.metadata.get(DIGEST_KEY)
        if digest is None or info.size != item.info.size:
            return
        try:
            known = await in_thread(digest_file, root, item.relative, local[item.relative])
        except (FileNotFoundError, FileChangedError, LocalFileError):
            return  # then it is sent, and whoever sends it learns why it can't be
        if known.digest == digest:
            found[item.relative] = replace(known, etag=info.etag)

    alike = [item for item in wanted if item.relative in local and local[item.relative].size == item.info.size]
    await for_each(alike, compare, _AT_ONCE)
    return found


def mirror_context(settings: Settings, voice: Voice, progress: Progress) -> MirrorContext:
    """What a mirror needs besides its folder."""
    times = SettleTimes(settings.debounce, settings.open_wait, settings.max_wait)
    return MirrorContext(times, AlwaysPermitted(), voice.on_event, progress)


async def push_mirror(settings: Settings, place: Place, root: Path, voice: Voice) -> None:
    """Upload the files that differ; nothing is deleted in storage.

    Raises:
        SyncError: Storage or disk refused one; all others are there.
    """
    refuse_beside_generations(place)
    progress = Progress(clock=anyio.current_time)
    stored = await in_storage(place, root)
    found = await in_thread(scan, root, everything)
    total = sum(stamp.size for path, stamp in found.files.items() if path not in stored)
    context = mirror_context(settings, voice, progress)
    mirror = Mirror(place.store, place.location, root, everything, context, stored, deletes=False)
    mirror.end(Capture(whole=True))
    async with voice.showing(lambda: Amount(progress.bytes_up, total, "sending")), background(mirror.run):
        await mirror.finished.wait()
    if mirror.refusal is not None:
        raise mirror.refusal
    files, nbytes = len(found.files), sum(stamp.size for stamp in found.files.values())
    what = f"{count(files, 'file')}, {size(nbytes)}"
    if progress.files_up:
        voice.say(
            f"{count(progress.files_up, 'file')} uploaded ({size(progress.bytes_up)} sent); the folder has {what}"
        )
    else:
        voice.say(f"unchanged: {place.location} holds the folder as it is ({what})")
    voice.give(
        {
            "mode": place.mode,
            "location": str(place.location),
            "changed": progress.files_up > 0,
            "uploaded": progress.files_up,
            "files": files,
            "bytes": nbytes,
            "sent": progress.bytes_up,
            "left_out": len(found.left_out),
        }
    )
