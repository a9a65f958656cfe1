"""`heeler sync push`: a folder to storage once, as the next generation or as plain keys."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import anyio

from heeler.config import Configuration
from heeler.settings import Settings
from heeler.sync.compare import Comparison, Memory, everything, in_common, look
from heeler.sync.hold import PERMIT, Hold, check_source, claim_on, commit, take
from heeler.sync.mirror import push_mirror
from heeler.sync.place import MIRROR, Place, open_place, run
from heeler.sync.state import boot_id, open_index, open_spool, open_uploads
from heeler.sync.voice import Amount, Voice, count, size
from heeler_sync.errors import DamagedObjectError
from heeler_sync.progress import Progress
from heeler_sync.snapshot.capture import changed_files
from heeler_sync.snapshot.committer import Committer, SnapshotContext, SnapshotTimes
from heeler_sync.snapshot.head import Kept
from heeler_sync.snapshot.holder import Claim
from heeler_sync.snapshot.index import FileIndex
from heeler_sync.snapshot.scan import TreeScan
from heeler_sync.snapshot.uploads import Uploads
from heeler_sync.threads import in_thread


@dataclass(frozen=True)
class PushOptions:
    """What a person asks for besides folder and address; see the flags."""

    mode: str | None = None
    job_id: str = ""
    unfenced: bool = False
    as_json: bool = False


def push(configuration: Configuration, folder: Path, url: str, options: PushOptions) -> None:
    """Bring a folder to storage, and say what was done."""
    voice = Voice(as_json=options.as_json)

    async def work() -> int:
        root = check_source(folder)
        place = await open_place(configuration.settings, url, options.mode, voice)
        if place.mode == MIRROR:
            await push_mirror(configuration.settings, place, root, voice)
        else:
            hold = Hold(options.job_id, options.unfenced)
            with (
                open_index(configuration.settings, voice.warn) as index,
                open_uploads(configuration.settings, voice.warn) as uploads,
            ):
                await _Push(configuration.settings, place, root, hold, index, uploads, voice).run()
        return 0

    run(voice, work)


class _Push:
    """One push of a generation."""

    def __init__(
        self,
        settings: Settings,
        place: Place,
        root: Path,
        hold: Hold,
        index: FileIndex,
        uploads: Uploads,
        voice: Voice,
    ) -> None:
        self._settings = settings
        self._place = place
        self._root = root
        self._hold = hold
        self._index = index
        self._uploads = uploads
        self._memory = Memory(settings.state_path, boot_id(), root, str(place.location))
        self._voice = voice
        self._progress = Progress(clock=anyio.current_time)
        self._total = 0
        self._left_out = 0
        self._read = 0

    async def run(self) -> None:
        """Commit the folder, unless the newest generation holds it as it is."""
        claim = claim_on(self._place, self._hold)
        kept = self._newest(claim)
        if kept is not None and await self._is_held(kept):
            self._report(kept, sent=0, new=False)
            return
        async with self._voice.showing(lambda: Amount(self._progress.bytes_up, self._total, "sending")):
            await self._commit(claim)

    def _newest(self, claim: Claim) -> Kept | None:
        """The generation that a push would follow, if the prefix is held for just that."""
        head = None if self._place.head is None else self._place.head[0]
        if head is None or not head.kept or not head.is_of(claim.job_id, claim.run_id):
            return None
        return head.kept[-1] if head.kept[-1].run_id == claim.run_id else None

    async def _is_held(self, kept: Kept) -> bool:
        looked = await in_thread(look, self._root)
        self._report_left_out(looked.scan)
        comparison = Comparison(self._place.layout, kept, self._root, self._index, self._memory)
        async with self._voice.showing(lambda: Amount(comparison.read, kept.bytes, "comparing")):
            try:
                return await comparison.same(looked)
            except DamagedObjectError:
                return False  # damaged, or collected by now: whoever takes the prefix learns which

    async def _commit(self, claim: Claim) -> None:
        holder = await take(self._place, claim, self._hold, self._settings, self._voice, self._uploads)
        indexed = await in_thread(self._index.load, self._root)
        looked = await in_thread(look, self._root)
        self._report_left_out(looked.scan)
        restored = in_common(indexed, holder.latest())
        changed = changed_files(looked.scan, restored)
        self._total = sum(looked.scan.files[path].stamp.size for path in changed)
        with open_spool(self._settings, self._total) as spool:
            context = SnapshotContext(
                SnapshotTimes(),
                PERMIT,
                self._voice.on_event,
                self._progress,
                self._index,
                spool,
                self._uploads,
            )
            committer = Committer(holder, self._root, everything, context, restored)
            kept = await commit(committer)
        await holder.sweep(PERMIT)
        newest = kept or holder.generations()[0]
        looked = await in_thread(look, self._root)
        if committer.is_committed(looked.scan):
            await in_thread(self._memory.note, looked, newest)
        self._report(newest, sent=self._progress.bytes_up, new=kept is not None)

    def _report_left_out(self, scan: TreeScan) -> None:
        for path, reason in sorted(scan.left_out.items())[self._left_out :]:
            self._voice.warn(f"{path} is left out: {reason}")
        self._left_out = max(self._left_out, len(scan.left_out))

    def _report(self, kept: Kept, *, sent: int, new: bool) -> None:
        what = f"{count(kept.files, 'file')}, {size(kept.bytes)}"
        if new:
            self._voice.say(f"generation {kept.generation} committed: {what}; {size(sent)} sent")
        else:
            self._voice.say(f"unchanged: generation {kept.generation} holds the folder as it is ({what})")
        self._voice.give(
            {
                "mode": self._place.mode,
                "location": str(self._place.location),
                "changed": new,
                "generation": kept.generation,
                "files": kept.files,
                "bytes": kept.bytes,
                "sent": sent,
                "left_out": self._left_out,
            }
        )
