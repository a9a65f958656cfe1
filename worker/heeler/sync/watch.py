"""`heeler sync watch`: a folder is kept in storage until a signal says that it is enough."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio

from heeler.config import Configuration
from heeler.errors import UsageError
from heeler.settings import Settings
from heeler.sync.compare import everything, in_common, look
from heeler.sync.hold import PERMIT, Hold, check_source, claim_on, take
from heeler.sync.mirror import in_storage, mirror_context, refuse_beside_generations
from heeler.sync.place import MIRROR, Place, leave, open_place, run
from heeler.sync.state import open_index, open_spool, open_uploads
from heeler.sync.voice import Voice
from heeler_sync.errors import NotNowError
from heeler_sync.groups import background
from heeler_sync.mirror import Capture, Mirror
from heeler_sync.progress import Progress
from heeler_sync.snapshot.committer import SnapshotContext, SnapshotTimes
from heeler_sync.snapshot.folder import SnapshotFolder
from heeler_sync.snapshot.holder import Holder
from heeler_sync.snapshot.index import FileIndex
from heeler_sync.snapshot.moments import Moment, QuietMoment, ReadyMoment
from heeler_sync.snapshot.uploads import Uploads
from heeler_sync.threads import in_thread
from heeler_sync.watch import CHANGED, Batch


@dataclass(frozen=True)
class WatchOptions:
    """What a person asks for besides folder and address; see the flags."""

    mode: str | None = None
    ready: str | None = None
    job_id: str = ""
    unfenced: bool = False


def watch(configuration: Configuration, folder: Path, url: str, options: WatchOptions) -> None:
    """Keep a folder in storage, one line for each commit or upload; a signal takes it a last time, whole."""
    settings = configuration.settings
    voice = Voice(tell_news=True)
    stopped = anyio.Event()

    async def work() -> int:
        root = check_source(folder)
        place = await open_place(settings, url, options.mode, voice)
        watching = _Watch(settings, place, root, options, voice, stopped)
        if place.mode == MIRROR:
            await watching.mirror()
        else:
            with open_index(settings, voice.warn) as index, open_uploads(settings, voice.warn) as uploads:
                await watching.snapshot(index, uploads)
        return 0

    run(voice, work, lambda _number: stopped.set())


@dataclass
class _Watch:
    """One watch."""

    settings: Settings
    place: Place
    root: Path
    options: WatchOptions
    voice: Voice
    stopped: anyio.Event

    async def mirror(self) -> None:
        """Plain keys, as mirror mode keeps them: objects of files that go are deleted."""
        if self.options.ready is not None:
            raise UsageError("--ready is for snapshots: a mirror sends each file by itself")
        refuse_beside_generations(self.place)
        progress = Progress(clock=anyio.current_time)
        stored = await in_storage(self.place, self.root)
        context = mirror_context(self.settings, self.voice, progress)
        mirror = Mirror(self.place.store, self.place.location, self.root, everything, context, stored)
        async with background(mirror.run):
            self.voice.say(f"watching {self.root} for {self.place.location} (mirror)")
            await self.stopped.wait()
            self.voice.say("stopping: the folder is sent as it is")
            mirror.end(Capture(whole=True))
            async with self._bounded():
                await mirror.finished.wait()
        if mirror.refusal is not None:
            raise mirror.refusal
        self.voice.say(f"{self.place.location} holds the folder as it was at the end")

    async def snapshot(self, index: FileIndex, uploads: Uploads) -> None:
        """Generations: by quiet, or when a ready file was written."""
        hold = Hold(self.options.job_id, self.options.unfenced)
        claim = claim_on(self.place, hold)
        looked = await in_thread(look, self.root)
        holder = await take(self.place, claim, hold, self.settings, self.voice, uploads)
        size = sum(found.stamp.size for found in looked.scan.files.values())
        with open_spool(self.settings, size) as spool:
            times = SnapshotTimes(self.settings.checkpoint_quiet, self.settings.commit_interval, self.settings.max_wait)
            progress = Progress(clock=anyio.current_time)
            context = SnapshotContext(times, PERMIT, self.voice.on_event, progress, index, spool, uploads)
            restored = in_common(await in_thread(index.load, self.root), holder.latest())
            moment = self._moment(list(looked.scan.files))
            folder = SnapshotFolder(holder, self.root, everything, moment, context, restored)
            async with background(folder.run, lambda: holder.sweep(PERMIT)):
                self.voice.say(f"watching {self.root} for {self.place.location} (snapshot, epoch {holder.epoch})")
                if self.options.ready is None:
                    await self._begin(folder)
                await self.stopped.wait()
                self.voice.say("stopping: the folder is taken as it is")
                folder.end(whole=True)
                async with self._bounded():
                    await folder.finished.wait()
        if folder.refusal is not None:
            raise folder.refusal
        self._say_end(holder)

    def _moment(self, files: list[str]) -> Moment:
        if self.options.ready is None:
            return QuietMoment(self.settings.checkpoint_quiet)
        matches = re.compile(fnmatch.translate(self.options.ready)).match
        moment = ReadyMoment(lambda path: matches(path) is not None, self.settings.checkpoint_quiet)
        # A state that was complete before we came: of when its ready file was closed only quiet tells.
        moment.take(Batch({path: CHANGED for path in files if matches(path)}), anyio.current_time())
        return moment

    async def _begin(self, folder: SnapshotFolder) -> None:
        """Take the folder as it is, unless it is being changed: then its quiet is waited for."""
        try:
            await folder.checkpoint()
        except NotNowError as error:
            self.voice.note(f"{error}; it is taken when it is quiet")

    @asynccontextmanager
    async def _bounded(self) -> AsyncIterator[None]:
        """The last transfer may take as long as any stop of ours."""
        limit = self.settings.stop_grace
        with anyio.move_on_after(limit) as scope:
            yield
        if scope.cancelled_caught:
            # At once: a request that storage does not answer can't be recalled, only waited for.
            self.voice.note(
                f"heeler: the last state of {self.root} could not be sent within {limit:g} s (--stop-grace);"
                " what was sent before is whole"
            )
            leave(1)

    def _say_end(self, holder: Holder) -> None:
        newest = next(iter(holder.generations()), None)
        if newest is None:
            self.voice.say(f"{self.place.location} holds no generation: nothing was there to commit")
        else:
            self.voice.say(f"{self.place.location} holds the folder in generation {newest.generation}")
