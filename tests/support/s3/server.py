"""The server in a thread of the test's own process, with an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from .app import Application
from .body import Body
from .control import put_directly
from .faults import Faults
from .protocol import Connection
from .rules import Rules
from .stats import Stats
from .store import Store, StoredObject, Upload
from .tls import server_context

ACCESS_KEY = "strict-access-key"
SECRET_KEY = "strict-secret-key"
_PIECE = 1 << 20


class S3Server:
    """An S3 server on loopback. `with S3Server.start(buckets=["b"]) as server: ...`."""

    def __init__(self, app: Application, host: str, port: int, certificate: Path | None) -> None:
        """Not started: use `start`."""
        self.certificate = certificate
        """The PEM file of https, which clients may trust."""
        self._app = app
        self._host = host
        self._port = port
        self._connections: set[Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._stopping: asyncio.Event | None = None
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="s3-server", daemon=True)

    @classmethod
    def start(
        cls,
        *,
        rules: Rules | None = None,
        buckets: Iterable[str] = (),
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        monotonic: Callable[[], float] = time.monotonic,
        host: str = "127.0.0.1",
        port: int = 0,
        certificate: Path | None = None,
    ) -> S3Server:
        """Start a server and wait until it listens; port 0 takes a free one.

        With a certificate (`tls.write_certificate` makes one) it speaks https.
        `monotonic` is the clock of the limit of writes a second.

        Raises:
            OSError: the port can't be had.
        """
        rules = rules or Rules()
        store = Store(rules, monotonic=monotonic)
        server = cls(Application(rules, store, access_key, secret_key), host, port, certificate)
        for bucket in buckets:
            server.create_bucket(bucket)
        server._thread.start()
        server._started.wait()
        if server._error is not None:
            server._thread.join()
            raise server._error
        return server

    def __enter__(self) -> S3Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        if error is None and self._app.internal_errors:
            raise RuntimeError("the S3 server itself failed") from self._app.internal_errors[0]

    def stop(self) -> None:
        """Cut every connection, stop listening and end the thread."""
        self._app.faults.clear()
        if self._thread.is_alive() and self._stopping is not None:
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the server has ended."""
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that started us
            self._error = error
        finally:
            self._loop.close()
            self._started.set()

    async def _serve(self) -> None:
        self._stopping = asyncio.Event()
        server = await self._loop.create_server(
            lambda: Connection(self._app, self._connections),
            self._host,
            self._port,
            backlog=1024,
            ssl=server_context(self.certificate) if self.certificate is not None else None,
        )
        self._port = server.sockets[0].getsockname()[1]
        self._started.set()
        await self._stopping.wait()
        server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.drop(reset=True)
        await server.wait_closed()
        for connection in connections:
            await connection.lost.wait()
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        scheme = "https" if self.certificate is not None else "http"
        return f"{scheme}://{self._host}:{self._port}"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self._port

    @property
    def access_key(self) -> str:
        """The only access key id it knows."""
        return self._app.access_key

    @property
    def secret_key(self) -> str:
        """That key's secret."""
        return self._app.secret_key

    @property
    def faults(self) -> Faults:
        """The fault rules in force."""
        return self._app.faults

    @property
    def stats(self) -> Stats:
        """Counts and the log of requests."""
        return self._app.stats

    @property
    def store(self) -> Store:
        """What is stored, past all protocol."""
        return self._app.store

    def create_bucket(self, bucket: str) -> None:
        """Make a bucket."""
        self.store.create_bucket(bucket)

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Every key with its bytes."""
        with self.store.lock:
            found = dict(self.store.bucket(bucket).objects)
        return {key: bytes(stored.body) for key, stored in sorted(found.items())}

    def object(self, bucket: str, key: str) -> StoredObject:
        """One object with its ETag and headers."""
        return self.store.get(bucket, key)

    def put(self, bucket: str, key: str, data: bytes) -> str:
        """Write an object past limits and conditions; its ETag."""
        view = memoryview(data)
        body = Body(view[start : start + _PIECE] for start in range(0, len(view), _PIECE))
        return put_directly(self._app, bucket, key, body).etag

    def delete(self, bucket: str, key: str) -> None:
        """Remove an object."""
        self.store.delete(bucket, key)

    def uploads(self, bucket: str) -> list[Upload]:
        """The unfinished multipart uploads."""
        with self.store.lock:
            return list(self.store.bucket(bucket).uploads.values())

    def history(self, bucket: str, key: str) -> list[bytes | None]:
        """Every version that a key has had, in order, None where it was deleted (rule `keep_history`)."""
        with self.store.lock:
            versions = list(self.store.bucket(bucket).history.get(key, ()))
        return [None if version is None else bytes(version.body) for version in versions]
