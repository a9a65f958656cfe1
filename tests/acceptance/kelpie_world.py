"""A world whose queue is Kelpie's API (the local one): jobs, programs and workers as Kelpie's users have them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from heeler.local.kelpie_rows import Job
from tests.acceptance.world import BUCKET, World
from tests.support.kelpie_server import KelpieServer
from tests.support.s3 import S3Server
from tests.support.worker import Worker


class KelpieWorld(World):
    """What a test plays with. The keys of a job lie below its `name`, since the API makes the ids.

    Attributes:
        server: The API.
    """

    def __init__(self, folder: Path, storage: S3Server, server: KelpieServer) -> None:
        super().__init__(folder, storage)
        self.server = server

    # Jobs.

    def folders(self, name: str = "job") -> dict[str, str]:
        """The older six fields, for a job whose keys lie below `name`."""
        return {
            f"{part}_{field}": value
            for part in ("input", "checkpoint", "output")
            for field, value in (("bucket", BUCKET), ("prefix", f"{name}/{part}/"))
        }

    def place(self, folder: str, machine: str = "one") -> Path:
        """A folder of a machine: input, checkpoint or output."""
        return self.folder / machine / folder

    def sync(self, name: str = "job", machine: str | None = None, **more: Any) -> dict[str, Any]:
        """The same as `sync`; local paths are one machine's, or by default relative: each machine's own."""

        def entry(part: str, direction: str) -> dict[str, str]:
            path = part if machine is None else str(self.place(part, machine))
            return {"bucket": BUCKET, "prefix": f"{name}/{part}", "local_path": path, "direction": direction, **more}

        return {
            "before": [entry("input", "download"), entry("checkpoint", "download")],
            "during": [entry("checkpoint", "upload")],
            "after": [entry("output", "upload")],
        }

    def snapshots(self, ready: str, name: str = "job") -> dict[str, Any]:
        """The fields of a job whose checkpoints are snapshots, each complete with its file `ready`."""
        sync = self.sync(name)
        wanted = {**sync, "during": [{**sync["during"][0], "mode": "snapshot", "ready": ready}]}
        wanted["before"] = [sync["before"][0], {**sync["before"][1], "mode": "snapshot"}]
        return {"sync": sync, "environment": {"HEELER_DOCUMENT": json.dumps({"sync": wanted})}}

    def submit(self, program: Sequence[str], job_id: str = "", **fields: Any) -> str:
        """Put a job into the queue; its id, which the API makes."""
        assert not job_id
        return self.server.submit(*program, **fields)

    def wait_status(self, status: str, job_id: str, timeout: float = 20.0) -> Job:
        """Wait until the API says so of a job."""
        deadline = time.monotonic() + timeout
        while (job := self.server.job(job_id))["status"] != status:
            logs = "\n".join(line for worker in self.started for line in [str(worker.pid), *worker.lines[-40:]])
            assert time.monotonic() < deadline, f"not {status} within {timeout} s: {job}\n{logs}"
            time.sleep(0.01)
        return job

    def events(self, job_id: str) -> list[str]:
        """What the API heard of a job, in order."""
        return [event for event, about in self.server.events if about == job_id]

    def keys(self, below: str = "job/") -> dict[str, bytes]:
        """What storage holds, by key."""
        return {key: data for key, data in self.storage.objects(BUCKET).items() if key.startswith(below)}

    # Workers.

    @contextmanager
    def worker(  # type: ignore[override]
        self,
        *arguments: str,
        name: str = "",
        machine: str = "one",
        wrapper: Sequence[str] = (),
        command: str = "run",
        bare: bool = False,
        **environment: str,
    ) -> Iterator[Worker]:
        """A running worker in a Kelpie container's environment: `machine` has folders, temporary files
        too, and a machine id of its own.

        A worker of another `name` has another state folder: two of them on one machine, or a machine anew. A `bare`
        one serves its control API where the defaults say.
        """
        place = self.folder / machine
        place.mkdir(exist_ok=True)
        folders = {f"{part.upper()}_DIR": str(place / part) for part in ("input", "checkpoint", "output")}
        temporary = self.folder / f"tmp-{machine}"
        temporary.mkdir(exist_ok=True)
        own = {**folders, "TMPDIR": str(temporary), "HEARTBEAT_INTERVAL_S": "0.2"}
        told = {**self.server.environment(machine), **own, **environment}
        with Worker(
            *(() if command == "kelpie" else ("--source", "kelpie")),
            *arguments,
            state_dir=self.folder / f"state-{name or machine}",
            control=None if bare else "off",
            command=command,
            env=self.environment(**told),
            cwd=place,
            wrapper=wrapper,
        ) as worker:
            self.started.append(worker)
            yield worker
