"""The state file of Kelpie's worker (PROTOCOLS 3: KELPIE_STATE_FILE): programs read there what is under way.

    {"start": TIME, "jobs": [{"id", "status": "running|completed|failed", "start", "exitTime", "exitCode", "end",
                              "activeUploads": [PATH, ...], "activeDownloads": [PATH, ...]}]}

Times are ISO 8601. `activeUploads` are the files with a state that is not in storage yet, from the moment that we
know of it. While a job's folders are restored they stand in `activeDownloads`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread

from heeler.job import Ending, Outcome
from heeler.status import Lane, Phase, Status

_LOOK_SECONDS = 0.5
_KEPT = 100
_NO_CODE = -2
"""What Kelpie's worker writes for a program that left no exit code."""
_WORDS = {Outcome.DONE: "completed", Outcome.RETRY: "failed", Outcome.FAIL: "failed"}


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class KelpieStateFile:
    """Keeps the file in step with the status."""

    def __init__(self, place: Path, status: Status, folders: Callable[[], list[str]] = list) -> None:
        """Args: the file, what is going on, and which folders a restore fills."""
        self._place = place
        self._status = status
        self._folders = folders
        self._start = _now()
        self._jobs: dict[str, dict[str, Any]] = {}
        self._written = ""
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

    def as_text(self) -> str:
        """What the file is to hold now."""
        lanes = {lane.job_id: lane for lane in self._status.lanes if lane.job_id is not None}
        jobs = [{**job, **self._transfers(lanes.get(job["id"]))} for job in self._jobs.values()]
        return json.dumps({"start": self._start, "jobs": jobs}, indent=2)

    def _transfers(self, lane: Lane | None) -> dict[str, list[str]]:
        uploads = [] if lane is None or lane.unsent is None else sorted(str(path) for path in lane.unsent())
        downloads = self._folders() if lane is not None and lane.phase is Phase.RESTORE else []
        return {"activeUploads": uploads, "activeDownloads": downloads}

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
        text = self.as_text()
        if text == self._written:
            return
        try:
            await anyio.to_thread.run_sync(_replace, self._place, text)
        except OSError as error:
            if not self._failing:
                self._status.fault("state_file_failed", error=f"{self._place}: {error.strerror}")
            self._failing = True
        else:
            self._failing = False
            self._written = text


def _replace(place: Path, text: str) -> None:
    """Programs read it at any time: never half of it."""
    part = place.with_name(f"{place.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(place)
