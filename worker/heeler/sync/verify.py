"""`heeler sync verify`: reads all of a prefix and says what is lost, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass

from heeler.config import Configuration
from heeler.sync.place import MIRROR, FailedError, Place, open_place, run
from heeler.sync.voice import Amount, Voice, count, size
from heeler_sync.snapshot.head import Head
from heeler_sync.snapshot.verify import Finding, Kind, Verified, verify
from heeler_sync.verify_plain import verify_plain

_LOST = 1

_ADVICE = {
    Kind.UNDER_WAY: "perhaps of a commit under way; if no worker runs: the next one collects it",
    Kind.GARBAGE: "garbage of an interrupted worker: the next worker collects it",
    Kind.FOREIGN: "not ours: heeler leaves it alone",
    Kind.UNCHECKED: "can't be checked: it was not written by heeler, or its storage tells no checksum",
}


def print_findings(configuration: Configuration, url: str, mode: str | None, *, as_json: bool) -> None:
    """Verify a prefix and print each finding; exit code 1 if something is lost."""
    voice = Voice(as_json=as_json)

    async def work() -> int:
        place = await open_place(configuration.settings, url, mode, voice)
        found = await _verify(place, voice)
        _print(place, found, voice)
        return 0 if found.whole else _LOST

    run(voice, work)


@dataclass
class _Count:
    bytes: int = 0

    def add(self, count: int) -> None:
        self.bytes += count


async def _verify(place: Place, voice: Voice) -> Verified:
    read = _Count()
    async with voice.showing(lambda: Amount(read.bytes, 0, "reading")):
        if place.mode == MIRROR:
            plain = await verify_plain(place.store, place.location, place.policy, read.add)
            if not plain.objects:
                raise FailedError(f"nothing at {place.location}: no object has a key that begins so")
            return plain
        place.require_head()
        found = await verify(place.layout, read.add)
    if found is None:
        raise FailedError(f"nothing at {place.location}: no snapshot was ever committed there")
    return found


def _print(place: Place, found: Verified, voice: Voice) -> None:
    for finding in found.findings:
        voice.say(f"{finding.kind.value}: s3://{place.location.bucket}/{finding.key}: {finding.detail}")
        voice.say(f"  {_advice(place, found, finding)}")
    if found.unknown_packs:
        packs = count(found.unknown_packs, "pack")
        voice.say(f"of {packs} nobody knows whether anything needs them, since a manifest can't be read")
    voice.say(_summary(place, found))
    voice.give(
        {
            "mode": place.mode,
            "location": str(place.location),
            "whole": found.whole,
            "objects": found.objects,
            "bytes": found.bytes,
            "unknown_packs": found.unknown_packs,
            "findings": [
                {
                    "kind": finding.kind.value,
                    "key": finding.key,
                    "detail": finding.detail,
                    "generations": list(finding.generations),
                    "advice": _advice(place, found, finding),
                }
                for finding in found.findings
            ],
        }
    )


def _summary(place: Place, found: Verified) -> str:
    lost = sum(finding.kind.lost for finding in found.findings)
    others = len(found.findings) - lost
    beside = f"; {count(others, 'object')} worth a look, none of them needed" if others else ""
    read = f"{count(found.objects, 'object')}, {size(found.bytes)} read"
    if lost:
        return f"{place.location} has lost something: {lost} missing or damaged ({read}){beside}"
    if found.head is None:
        return f"{place.location} is whole as far as it can be checked ({read}){beside}"
    whole = count(len(found.head.kept), "generation")
    return f"{place.location} is whole: {whole} ({read}){beside}"


def _advice(place: Place, found: Verified, finding: Finding) -> str:
    if not finding.kind.lost:
        return _ADVICE[finding.kind]
    if found.head is None:
        return "push the file again from where it is whole"
    return _about_generations(place, found, found.head, finding)


def _about_generations(place: Place, found: Verified, head: Head, finding: Finding) -> str:
    if not finding.generations:
        return "of an interrupted commit: nothing that was committed needs it"
    lost = {number for other in found.findings if other.kind.lost for number in other.generations}
    hit = " and ".join(str(number) for number in finding.generations)
    noun = "generation" if len(finding.generations) == 1 else "generations"
    left = [kept.generation for kept in head.kept if kept.generation not in lost]
    if not left:
        return f"{noun} {hit} can't be restored, and none is left: push the folder again from where it is whole"
    return (
        f"{noun} {hit} can't be restored; generation {left[-1]} is whole, and is what a restore falls back to"
        f" (heeler sync pull {place.location} DIR)"
    )
