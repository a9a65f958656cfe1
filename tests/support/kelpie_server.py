"""The local Kelpie API in a thread, on a free port of its own, for a test. Every call is safe in any thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from anyio.from_thread import BlockingPortal, start_blocking_portal

from heeler.local import imds, kelpie_api, web
from heeler.local.imds import ImdsState
from heeler.local.kelpie_faults import KelpieFaults
from heeler.local.kelpie_model import Submission
from heeler.local.kelpie_rows import Job
from heeler.local.kelpie_table import KelpieTable, user_of
from heeler.local.tokens import Identity, TokenIssuer

KEY, API_KEY = "kelpie-key", "salad-api-key"
ORGANIZATION, PROJECT, GROUP = "lab", "default", "group-1"


class KelpieServer:
    """The API, what it got, and its jobs. Use it as a context manager.

    Attributes:
        table: The jobs and the rules.
        faults: What it is to do wrong, and what it was asked.
        tokens: Who verifies machines' tokens.
        url: Where it listens.
        moved: The machines that it would have had moved.
        events: What happened to jobs: event and job.
    """

    def __init__(self, path: Path | str = ":memory:", *, clock: Callable[[], float] = time.time) -> None:
        self.moved: list[tuple[str, str]] = []
        self.table = KelpieTable(path, clock=clock, on_reallocate=lambda *who: self.moved.append(who))
        self.events: list[tuple[str, str]] = []
        self.table.listeners.append(lambda event, job: self.events.append((event, job["id"])))
        self.faults = KelpieFaults()
        self.tokens = TokenIssuer()
        self.user = user_of(ORGANIZATION)
        self.url = ""
        self._port = 0
        self._machines: dict[str, tuple[ImdsState, str]] = {}
        self._stack = ExitStack()
        self._serving: AbstractContextManager[str] | None = None

    def __enter__(self) -> KelpieServer:
        with ExitStack() as stack:
            stack.callback(self.table.close)
            self._portal: BlockingPortal = stack.enter_context(start_blocking_portal())
            self._stack = stack.enter_context(ExitStack())  # machines
            stack.callback(self.stop)
            self.start()
            self._all = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.faults.clear()
        self._all.close()

    def start(self) -> None:
        """Listen; again on the same port after `stop`."""
        serving = kelpie_api.serving(
            self.table,
            self.tokens,
            kelpie_key=KEY,
            api_key=API_KEY,
            organization=ORGANIZATION,
            project=PROJECT,
            faults=self.faults,
            port=self._port,
        )
        self._serving = self._portal.wrap_async_context_manager(serving)
        self.url = self._serving.__enter__()
        self._port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """Refuse connections."""
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.__exit__(None, None, None)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The API is out of reach during the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def submit(self, command: str, *arguments: str, **fields: Any) -> str:
        """Put a job into the queue, as the API takes it; its id."""
        document = {"command": command, "arguments": list(arguments), "container_group_id": GROUP, **fields}
        job_id: str = self.table.create(self.user, Submission.model_validate(document))["id"]
        return job_id

    def job(self, job_id: str) -> Job:
        """A job as the API shows it."""
        return self.table.get(self.user, job_id)

    def take(self, machine_id: str = "machine-2") -> str | None:
        """Take a job as another machine would; its id."""
        job = self.table.work(self.user, machine_id, GROUP)
        return None if job is None else str(job["id"])

    def heartbeat(self, job_id: str, machine_id: str = "machine-2") -> str:
        """Keep a job as another machine would; its status."""
        return self.table.heartbeat(self.user, job_id, machine_id)

    def token(self, machine_id: str = "machine-1", lifetime: float = 3600.0) -> str:
        """A machine's token."""
        return self.tokens.issue(self._identity(machine_id), lifetime)

    @staticmethod
    def _identity(machine_id: str) -> Identity:
        return Identity(machine_id, "org-1", ORGANIZATION, GROUP, "workers")

    def imds(self, machine_id: str = "machine-1") -> ImdsState:
        """What a machine's metadata service knows."""
        return self._machine(machine_id)[0]

    def _machine(self, machine_id: str) -> tuple[ImdsState, str]:
        if machine_id not in self._machines:
            state = ImdsState(self._identity(machine_id), self.tokens)
            serving = self._portal.wrap_async_context_manager(web.serving(imds.create_app(state), 0))
            self._machines[machine_id] = state, self._stack.enter_context(serving)
        return self._machines[machine_id]

    def environment(self, machine_id: str = "machine-1") -> dict[str, str]:
        """What a Kelpie container's environment has on a machine, with a metadata service of its own."""
        return {
            "SALAD_METADATA_URI": self._machine(machine_id)[1],
            "KELPIE_API_URL": self.url,
            "KELPIE_API_KEY": KEY,
            "SALAD_MACHINE_ID": machine_id,
            "SALAD_CONTAINER_GROUP_ID": GROUP,
        }
