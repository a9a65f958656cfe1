"""`heeler local`: storage, the Salad Job Queue, Kelpie's API and metadata services on loopback, until told to stop.

Ports, from the first: storage (S3 and SQS), the queue's service for workers, its REST API, Kelpie's API, then a
metadata service for each machine.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import anyio
import anyio.to_thread

from heeler.errors import UsageError
from heeler.local import imds, kelpie_api, queue_rest, web
from heeler.local.kelpie_rows import Job as KelpieJob
from heeler.local.kelpie_table import KelpieTable
from heeler.local.queue_grpc import QueueServer
from heeler.local.queue_model import Job, QueueName
from heeler.local.queue_state import QueueState
from heeler.local.salad import API_KEY, SaladProject
from heeler.local.storage import LocalStorage, local_storage
from heeler.local.tokens import TokenIssuer
from heeler.local.webhooks import Webhooks
from heeler.signals import DRAIN_SIGNALS
from heeler.tasks import background

BUCKET = "local"
QUEUE = QueueName("local", "default", "jobs")


@dataclass(frozen=True)
class LocalOptions:
    """What `heeler local` is told.

    Attributes:
        port_base: The first of the ports; 0 takes free ones.
        machines: How many machines there are; each worker wants its own.
        app_port: Where the app listens.
        app_path: What jobs are POSTed to.
        env_file: Where the environment is written, too; that of machine 2 to `FILE.2`, and so on.
    """

    port_base: int
    machines: int
    app_port: int
    app_path: str
    env_file: Path | None

    def port(self, number: int) -> int:
        """The port of that place in the order."""
        return self.port_base + number if self.port_base else 0


def run_local(options: LocalOptions) -> None:
    """Serve until SIGTERM, SIGINT, or the terminal is closed.

    Raises:
        UsageError: The environment can't be written, or the extra `local` is not installed.
        UnavailableError: A port is taken, or storage did not start.
    """
    anyio.run(_until_told, options)


async def _until_told(options: LocalOptions) -> None:
    with anyio.open_signal_receiver(*DRAIN_SIGNALS, signal.SIGHUP) as signals, anyio.CancelScope() as told:
        async with background(partial(_cancel_at_first, signals, told)):
            await _serve(options)


async def _cancel_at_first(signals: AsyncIterable[signal.Signals], told: anyio.CancelScope) -> None:
    async for _ in signals:
        told.cancel()
        return


async def _serve(options: LocalOptions) -> None:
    async with _storage(options.port(0)) as storage, _salad(options) as environments:
        texts = [_lines(number, {**storage.environment(), **salad}) for number, salad in enumerate(environments, 1)]
        if options.env_file is not None:
            await anyio.to_thread.run_sync(_write, options.env_file, texts)
        for text in texts:
            _say(text)
        _say(f"# storage: s3://{BUCKET}/; ready")
        await anyio.sleep_forever()


@asynccontextmanager
async def _storage(port: int) -> AsyncIterator[LocalStorage]:
    """Storage with a bucket; the process ends with the block, whatever happens."""
    with ExitStack() as stack:
        storage = await anyio.to_thread.run_sync(stack.enter_context, local_storage(port))
        await anyio.to_thread.run_sync(partial(storage.client().create_bucket, Bucket=BUCKET))
        yield storage


@asynccontextmanager
async def _salad(options: LocalOptions) -> AsyncIterator[list[dict[str, str]]]:
    """The queue and the machines, and the environment of each."""
    webhooks = Webhooks()
    state = QueueState()
    state.listeners += [_log, webhooks.tell]
    tokens = TokenIssuer()
    project = SaladProject(state, tokens, queue=QUEUE, port=options.app_port, path=options.app_path)
    server = QueueServer(state, tokens, port=options.port(1))
    api = queue_rest.create_app(state, webhooks, API_KEY)
    async with background(webhooks.run), AsyncExitStack() as stack:
        await stack.enter_async_context(server.serving())
        url = await stack.enter_async_context(web.serving(api, options.port(2)))
        kelpie_url = await stack.enter_async_context(_kelpie(tokens, options.port(3)))
        submit = {
            "SALAD_API_KEY": API_KEY,
            "SALAD_API_URL": url + queue_rest.BASE,
            "SALAD_QUEUE_NAME": QUEUE.queue,
            "KELPIE_API_URL": kelpie_url,
        }
        environments = []
        for number in range(options.machines):
            machine = project.imds(f"machine-{number + 1}")
            uri = await stack.enter_async_context(web.serving(imds.create_app(machine), options.port(4 + number)))
            environment = project.environment(machine, endpoint=server.endpoint, metadata_uri=uri)
            environments.append({**environment, **submit})
        yield environments


def _kelpie(tokens: TokenIssuer, port: int) -> AbstractAsyncContextManager[str]:
    """Kelpie's API; its URL."""
    table = KelpieTable(on_reallocate=_log_reallocation)
    table.listeners.append(_log_kelpie)
    return kelpie_api.serving(
        table,
        tokens,
        kelpie_key=None,
        api_key=API_KEY,
        organization=QUEUE.organization,
        project=QUEUE.project,
        port=port,
    )


def _lines(number: int, environment: dict[str, str]) -> str:
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([f"# machine {number}", *exports])


def _write(file: Path, texts: list[str]) -> None:
    """Write each machine's environment, that of the first machine last: whoever waits for it finds all."""
    places = [file, *(file.with_name(f"{file.name}.{number}") for number in range(2, len(texts) + 1))]
    for place, text in reversed([*zip(places, texts, strict=True)]):
        part = place.with_name(f"{place.name}.part")
        try:
            part.write_text(text + "\n", encoding="utf-8")
            part.replace(place)
        except OSError as error:
            raise UsageError(f"--env-file: {place} can't be written: {error.strerror}") from None


def _log(event: str, job: Job) -> None:
    at = f" on {job.workers[-1]}, try {job.tries}" if event == "started" else ""
    _say(f"{time.strftime('%H:%M:%S')} job {job.id} {event}{at}")


def _log_kelpie(event: str, job: KelpieJob) -> None:
    details = {
        "started": f" on {job['machine_id']}",
        "failed": f" {job['num_failures']} of {job['max_failures']}",
    }
    _say(f"{time.strftime('%H:%M:%S')} job {job['id']} {event}{details.get(event, '')}")


def _log_reallocation(machine_id: str, _container_group_id: str) -> None:
    _say(f"{time.strftime('%H:%M:%S')} {machine_id} failed at every job that it could have: it would be moved")


def _say(line: str) -> None:
    """Print a line; whoever reads us may have gone."""
    with suppress(OSError, ValueError):
        print(line, flush=True)
