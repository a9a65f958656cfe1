"""`heeler sync repair`: a new head for generations that have none, said first and done only when it is wanted."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import anyio
import anyio.to_thread

from heeler.config import Configuration
from heeler.errors import UsageError
from heeler.settings import Settings
from heeler.sync.place import FailedError, Place, holder_name, open_place, run
from heeler.sync.voice import Amount, Voice, count, size, when
from heeler_sync.errors import DamagedHeadError
from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.repair import Survey, new_head, survey, write_head
from heeler_sync.snapshot.session import Fences

_WORD = "repair"


@dataclass(frozen=True)
class RepairOptions:
    """What a person asks for besides the address; see the flags."""

    generation: int | None = None
    job_id: str = ""
    run_id: str = ""
    yes: bool = False
    unfenced: bool = False


def repair(configuration: Configuration, url: str, options: RepairOptions) -> None:
    """Say what a new head would list, and write it if that is wanted."""
    voice = Voice()
    settings = configuration.settings

    async def work() -> int:
        if options.run_id and not options.job_id:
            raise UsageError("--run-id is of a job: name it with --job-id")
        place = await open_place(settings, url, "snapshot", voice)
        if place.trouble is None:
            return _nothing_to_do(place, voice)
        if not isinstance(place.trouble, DamagedHeadError):
            raise place.trouble
        fences = Fences(voice.on_event, allow_unfenced=options.unfenced or settings.allow_unfenced)
        await fences.require(place.layout)
        await _Repair(settings, place, options, voice, fenced=fences.trusted).run()
        return 0

    run(voice, work)


def _nothing_to_do(place: Place, voice: Voice) -> int:
    if place.head is None:
        raise FailedError(f"nothing at {place.location}: there is no snapshot to repair")
    head = place.head[0]
    voice.say(
        f"{place.location} has a head that can be read (epoch {head.epoch}, {count(len(head.kept), 'generation')}):"
        " nothing is to be repaired, nothing was changed; heeler sync verify reads the rest"
    )
    return 0


@dataclass
class _Repair:
    """One repair."""

    settings: Settings
    place: Place
    options: RepairOptions
    voice: Voice
    fenced: bool
    _read: int = 0

    async def run(self) -> None:
        layout = self.place.layout
        async with self.voice.showing(lambda: Amount(self._read, 0, "reading")):
            found = await survey(
                layout,
                keep=self.settings.keep_generations,
                generation=self.options.generation,
                on_bytes=self._count,
            )
        if found.trouble is None:
            self.voice.say(f"{self.place.location} has a head by now: nothing was changed")
            return
        self._say_found(found)
        self._require_chosen(found)
        head = new_head(found, holder_name(), job_id=self.options.job_id, run_id=self.options.run_id)
        self._say_plan(found, head)
        await self._require_consent()
        await write_head(layout, head, found.etag, fenced=self.fenced)
        newest = head.kept[-1].generation
        self.voice.say(f"done: {self.place.location} has a head again (epoch {head.epoch}, generation {newest})")

    def _count(self, count: int) -> None:
        self._read += count

    def _say_found(self, found: Survey) -> None:
        self.voice.say(f"{self.place.location}: {found.trouble}")
        for candidate in found.candidates:
            kept = candidate.kept
            if candidate.whole:
                what = f"whole: {count(kept.files, 'file')}, {size(kept.bytes)}, of {when(kept.created)}"
                taken = "" if candidate in found.chosen else "; older than another of its place, so it is left"
            else:
                what, taken = f"lost: {candidate.faults[0]}", ""
            self.voice.say(f"  generation {kept.generation} (epoch {candidate.epoch}) is {what}{taken}")

    def _require_chosen(self, found: Survey) -> None:
        wanted = self.options.generation
        if wanted is not None and all(candidate.kept.generation != wanted for candidate in found.chosen):
            raise FailedError(f"{self.place.location}: generation {wanted} is not there, or not whole; see above")
        if not found.chosen:
            raise FailedError(
                f"{self.place.location} has no generation that is whole, so there is nothing to go on from; to start"
                f" anew, delete what is below {self.place.location}.heeler/"
            )

    def _say_plan(self, found: Survey, head: Head) -> None:
        numbers = " and ".join(str(kept.generation) for kept in reversed(head.kept))
        self.voice.say(f"The new head will list generation {numbers}, with epoch {head.epoch}.")
        if head.job_id:
            run = f", run {head.run_id}" if head.run_id else ""
            self.voice.say(f"It will belong to job {head.job_id}{run}.")
        else:
            self.voice.say("It will be nobody's: any job may take it over (--job-id ID gives it to one).")
        hints = {name: text for name, text in found.hints.items() if text}
        if hints and (hints.get("job_id", "") != head.job_id or hints.get("run_id", "") != head.run_id):
            flags = " ".join(f"--{name.replace('_', '-')} {text}" for name, text in hints.items())
            self.voice.say(f"What is left of the old head speaks of: {flags}")
        self.voice.say("What it does not list, the next push or worker deletes.")
        self.voice.say("Stop all workers of this prefix first: one that runs loses it.")

    async def _require_consent(self) -> None:
        if self.options.yes:
            return
        if not sys.stdin.isatty():
            raise FailedError("nothing was changed; to do it: --yes")
        self.voice.note(f"Type {_WORD!r} to do it: ")
        typed = await anyio.to_thread.run_sync(sys.stdin.readline, abandon_on_cancel=True)
        if typed.strip() != _WORD:
            raise FailedError("nothing was changed")
