"""A SaladCloud of one project for tests: the stand-ins of `heeler.local` in a thread, on free loopback ports.

Every call is safe in any thread. Faults on command: lost streams, a service that is away, tokens that no longer count.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from anyio.from_thread import BlockingPortal, start_blocking_portal

from heeler.local import imds, queue_rest, web
from heeler.local.imds import ImdsState
from heeler.local.queue_faults import Faults
from heeler.local.queue_grpc import QueueServer
from heeler.local.queue_model import End, Job, JobStatus, QueueName
from heeler.local.queue_state import QueueState
from heeler.local.salad import API_KEY, SaladProject
from heeler.local.tokens import TokenIssuer
from heeler.local.webhooks import Webhooks
from heeler.tasks import background

QUEUE = QueueName("local", "default", "jobs")

P = ParamSpec("P")
T = TypeVar("T")


class _Switch:
    """Something that is served, and can be away for a while."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._serving: AbstractContextManager[Any] | None = None

    def on(self) -> Any:
        assert self._serving is None
        self._serving = self._make()
        return self._serving.__enter__()

    def off(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.__exit__(None, None, None)


class Machine:
    """One machine of the container group, with a metadata service of its own.

    Attributes:
        imds: What that service knows, and how it behaves.
        url: Where it listens.
    """

    def __init__(self, salad: SaladService, portal: BlockingPortal, machine_id: str) -> None:
        self.imds: ImdsState = salad.project.imds(machine_id)
        self.url = ""
        self._salad = salad
        app = imds.create_app(self.imds)
        self._switch = _Switch(lambda: portal.wrap_async_context_manager(web.serving(app, self._port)))
        self._port = 0
        self.start()

    def start(self) -> None:
        """Listen; again on the same port after `stop`."""
        self.url = self._switch.on()
        self._port = int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        """Refuse connections."""
        self._switch.off()

    def token(self, lifetime: float = 3600.0) -> str:
        """A token of this machine, for a client that asks no metadata service."""
        return self._salad.tokens.issue(self.imds.identity, lifetime)

    def environment(self, **extra: str) -> dict[str, str]:
        """What a container's environment on this machine has, and `extra`."""
        project, endpoint = self._salad.project, self._salad.endpoint
        return {**project.environment(self.imds, endpoint=endpoint, metadata_uri=self.url), **extra}


class SaladService:
    """The job queue (gRPC and REST) and the metadata services of its machines. Use it as a context manager.

    Attributes:
        state: The queue's rules; call its methods through `call`.
        tokens: Who issues and verifies tokens.
        project: The queue and the container group.
        webhooks: Who tells the webhooks of jobs.
        api_url: The base URL of the REST calls, as the SDK's `base_url` wants it.
        machine: The first machine.
        imds: What the first machine's metadata service knows.
    """

    def __init__(
        self,
        *,
        port: int = 8080,
        path: str = "/",
        grace: float = 30.0,
        heartbeat: float = 10.0,
        webhook_delays: Sequence[float] = (0.05, 0.1),
    ) -> None:
        """Describe it.

        Args:
            port: Where the app listens.
            path: What jobs are POSTed to.
            grace: Seconds in which a machine may come back for its job.
            heartbeat: Seconds between two heartbeats of a stream.
            webhook_delays: Seconds before each further attempt to tell a webhook.
        """
        self.state = QueueState(grace=grace)
        self.tokens = TokenIssuer()
        self.project = SaladProject(self.state, self.tokens, queue=QUEUE, port=port, path=path)
        self.webhooks = Webhooks(delays=webhook_delays)
        self._server = QueueServer(self.state, self.tokens, heartbeat=heartbeat)
        self._stack = ExitStack()
        self._machines: dict[str, Machine] = {}

    def __enter__(self) -> SaladService:
        with ExitStack() as stack:
            self._portal = stack.enter_context(start_blocking_portal())
            self._queue = _Switch(lambda: self._portal.wrap_async_context_manager(self._server.serving()))
            self.api_url = stack.enter_context(self._portal.wrap_async_context_manager(self._rest()))
            self.start()
            stack.callback(self.stop)
            self.machine = self.add_machine("machine-1")
            stack.callback(self._stop_machines)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _stop_machines(self) -> None:
        for machine in self._machines.values():
            machine.stop()

    @asynccontextmanager
    async def _rest(self) -> AsyncIterator[str]:
        """The public API, and the webhooks of its jobs."""
        self.state.listeners.append(self.webhooks.tell)
        app = queue_rest.create_app(self.state, self.webhooks, API_KEY)
        async with background(self.webhooks.run), web.serving(app) as url:
            yield url + queue_rest.BASE

    # Machines.

    def add_machine(self, machine_id: str) -> Machine:
        """Another machine of the container group."""
        self._machines[machine_id] = Machine(self, self._portal, machine_id)
        return self._machines[machine_id]

    @property
    def imds(self) -> ImdsState:
        return self.machine.imds

    @property
    def endpoint(self) -> str:
        """The gRPC service's host:port."""
        return self._server.endpoint

    def environment(self, **extra: str) -> dict[str, str]:
        """The environment of a container on the first machine, and `extra`."""
        return self.machine.environment(**extra)

    def connect(self, port: int, path: str = "/") -> None:
        """Change where the app listens."""
        self.call(self.project.connect, port, path)

    # Jobs.

    def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call something of the state in the service's own thread."""
        return self._portal.call(lambda: function(*args, **kwargs))

    def submit(self, data: Any, **fields: Any) -> str:
        """Submit a job, past REST; bytes are sent as they are, anything else as JSON. Its id."""
        body = data if isinstance(data, bytes) else json.dumps(data).encode()
        return self.call(self.state.submit, QUEUE, body, **fields).id

    def job(self, job_id: str) -> Job:
        """A job as it is now."""

        def copy() -> Job:
            job = self.state.job(job_id)
            return dataclasses.replace(job, events=[*job.events], workers=[*job.workers])

        return self.call(copy)

    def wait_for(self, job_id: str, *statuses: JobStatus, timeout: float = 30.0) -> Job:
        """Wait until a job has one of these statuses; without any, until it has ended.

        Raises:
            AssertionError: It was not in time.
        """
        deadline = time.monotonic() + timeout
        while True:
            job = self.job(job_id)
            if job.status in statuses or (not statuses and job.status.final):
                return job
            assert time.monotonic() < deadline, f"not {statuses or 'ended'} within {timeout} s: {job}"
            time.sleep(0.005)

    def cancel(self, job_id: str) -> None:
        """Cancel a job, as the REST call does."""
        self.call(self.state.cancel, job_id)

    # Faults.

    @property
    def faults(self) -> Faults:
        """What to do to the next gRPC calls, and those that there were."""
        return self._server.faults

    def streams(self) -> int:
        """How many streams are open."""
        return self.call(lambda: len(self.state.streams))

    def wait_streams(self, count: int, timeout: float = 30.0) -> None:
        """Wait until that many streams are open."""
        deadline = time.monotonic() + timeout
        while (found := self.streams()) != count:
            assert time.monotonic() < deadline, f"{found} streams, not {count}, within {timeout} s"
            time.sleep(0.005)

    def drop_streams(self, why: End = End.DROPPED) -> None:
        """End every open stream: with UNAVAILABLE, or with OK if nothing is wrong (`End.CLOSED`)."""
        self.call(self._server.drop_streams, why)

    def stop(self) -> None:
        """Take the gRPC service away: calls are cut off, connections refused."""
        self._queue.off()

    def start(self) -> None:
        """Bring it back, on the same port and with the same jobs."""
        self._queue.on()

    def restart(self, down_seconds: float = 0.0) -> None:
        """Take the gRPC service away for a while."""
        self.stop()
        time.sleep(down_seconds)
        self.start()

    def expire_tokens(self) -> None:
        """Refuse every token issued so far."""
        self.tokens.revoke_all()
