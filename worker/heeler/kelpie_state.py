"""The state file of Kelpie's worker (PROTOCOLS 3: KELPIE_STATE_FILE): programs read there what is under way.

    {"start": TIME, "jobs": [{"id", "status": "running|completed|failed", "start", "exitTime", "exitCode", "end",
                              "activeUploads": [PATH, ...], "activeDownloads": []}]}

Times are ISO 8601. `activeUploads` are the files with a state that is not in storage yet, from the moment that we
know of it: the first 1,000 in the order of their paths, if there are more. `activeDownloads` is always empty, since a
program never runs while a folder of its job is restored.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from heeler.job import Ending, Outcome
from heeler.status import Phase, Status

_LOOK_SECONDS = 0.5
_KEPT = 100
_MOST_PATHS = 1000
_NO_CODE = -2
"""What Kelpie's worker writes for a program that left no exit code."""
_WORDS = {Outcome.DONE: "completed", Outcome.RETRY: "failed", Outcome.FAIL: "failed"}

_Jobs = list[tuple[dict[str, Any], set[Path]]]
"""What is known of each job, and its files that are not in storage."""


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class KelpieStateFile:
    """Keeps the file in step with the status."""

    def __init__(self, place: Path, status: Status) -> None:
        """Args: the file, and what is going on."""
        self._place = place
        self._status = status
        self._start = _now()
        self._jobs: dict[str, dict[str, Any]] = {}
        self._written: _Jobs | None = None
        self._failing = False
        self._changed = anyio.Event()

    async def run(self) -> None:
        """Write it until cancelled, and once more then."""
        self._status.on_change.append(self._note)
        self._status.on_settled.append(self._settled)
        try:
            while True:
                self._changed = anyio.Event()
                await self._write()
                with anyio.move_on_after(_LOOK_SECONDS):
                    await self._changed.wait()
        finally:
            self._status.on_change.remove(self._note)
            self._status.on_settled.remove(self._settled)
            with anyio.CancelScope(shield=True):
                await self._write()

    def _look(self) -> _Jobs:
        """All that the file tells, as the event loop can say it at once, however many files there are."""
        lanes = {lane.job_id: lane for lane in self._status.lanes if lane.job_id is not None}
        found: _Jobs = []
        for job in self._jobs.values():
            lane = lanes.get(job["id"])
            found.append(({**job}, set() if lane is None or lane.unsent is None else lane.unsent()))
        return found

    def _note(self) -> None:
        for lane in self._status.lanes:
            if lane.job_id is None:
                continue
            job = self._jobs.get(lane.job_id)
            if job is None or ("end" in job and lane.phase is Phase.RESTORE):
                self._jobs.pop(lane.job_id, None)
                job = self._jobs[lane.job_id] = {"id": lane.job_id, "status": "running", "start": _now()}
            if lane.phase in (Phase.UPLOAD, Phase.SETTLE):
                job.setdefault("exitTime", _now())
        while len(self._jobs) > _KEPT:
            del self._jobs[next(iter(self._jobs))]
        self._changed.set()

    def _settled(self, job_id: str, ending: Ending) -> None:
        job = self._jobs.get(job_id)
        word = _WORDS.get(ending.outcome)
        if job is None:
            return
        if word is None:
            del self._jobs[job_id]  # it is not over, and not ours
        else:
            code = ending.result.exit_code
            job |= {"status": word, "exitCode": _NO_CODE if code is None else code, "end": _now()}
        self._changed.set()

    async def _write(self) -> None:
        jobs = self._look()
        try:
            await anyio.to_thread.run_sync(_replace, self._place, self._start, jobs, self._written)
        except OSError as error:
            if not self._failing:
                self._status.fault("state_file_failed", error=f"{self._place}: {error.strerror}")
            self._failing = True
        else:
            self._failing = False
            self._written = jobs


def _as_text(start: str, jobs: _Jobs) -> str:
    told = [{**job, "activeUploads": _first(unsent), "activeDownloads": []} for job, unsent in jobs]
    return json.dumps({"start": start, "jobs": told}, indent=2)


def _first(paths: set[Path]) -> Sequence[str]:
    return heapq.nsmallest(_MOST_PATHS, map(str, paths))


def _replace(place: Path, start: str, jobs: _Jobs, written: _Jobs | None) -> None:
    """Programs read it at any time: never half of it. Nothing is done if this is what it holds."""
    if jobs == written:
        return
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    part.write_text(_as_text(start, jobs), encoding="utf-8")
    part.replace(place)
