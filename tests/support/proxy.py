"""A TCP proxy on loopback that hurts what passes through it, on command and while it runs.

It knows nothing of HTTP, but for one thing: it can swallow the interim answer `100 Continue`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

from .proxy_link import Link, ProxyFaults

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class ProxyCounts:
    """What has passed so far."""

    connections: int = 0
    """Accepted."""
    open_connections: int = 0
    bytes_up: int = 0
    """Handed to the server."""
    bytes_down: int = 0
    """Handed to the client."""
    dropped: int = 0
    """Bytes dropped by a partition."""
    continues_swallowed: int = 0


class FaultProxy:
    """`with FaultProxy("127.0.0.1", port) as proxy: proxy.set(latency=0.02)`. Thread-safe."""

    def __init__(self, host: str, port: int) -> None:
        """Forward to this address once entered."""
        self._upstream = (host, port)
        self.port = 0
        """Where it listens on 127.0.0.1; the same for its whole life."""
        self.faults = ProxyFaults()
        """What is in force; change it by `set`."""
        self._counts = ProxyCounts()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._links: set[Link] = set()
        self.cut_epoch = 0

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        try:
            self._call(self._listen())
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Reset every connection and end the thread. Safe to call twice."""
        if self._thread.is_alive():
            self._call(self._stop())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        elif not self._loop.is_closed():
            self._loop.close()

    @property
    def url(self) -> str:
        """For HTTP through the proxy."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def counts(self) -> ProxyCounts:
        """What has passed so far."""
        with self._changed:
            return dataclasses.replace(self._counts, open_connections=len(self._links))

    def wait_until(self, condition: Callable[[ProxyCounts], bool], timeout: float = 10.0) -> ProxyCounts:
        """Block until a condition on the counts holds, at most `timeout` seconds.

        Raises:
            TimeoutError: it did not hold in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self.counts), timeout):
                raise TimeoutError(f"not within {timeout} s: {self.counts}")
            return self.counts

    def set(
        self,
        *,
        latency: float | None = None,
        rate: float | None = None,
        stall: bool | None = None,
        **changes: float | bool | None,
    ) -> None:
        """Change faults; what is not named stays. In force when this returns.

        `latency`, `rate` (0 for none) and `stall` set both directions; the other names are the fields of
        `ProxyFaults`.
        """
        if latency is not None:
            changes.update(latency_up=latency, latency_down=latency)
        if rate is not None:
            changes.update(rate_up=rate, rate_down=rate)
        if stall is not None:
            changes.update(stall_up=stall, stall_down=stall)
        faults = dataclasses.replace(self.faults, **changes)  # type: ignore[arg-type]
        recount = "cut_up" in changes or "cut_down" in changes
        self._call(self._apply(faults, recount=recount))

    def clear(self) -> None:
        """Heal everything. In force when this returns."""
        self._call(self._apply(ProxyFaults(), recount=True))

    def reset_connections(self) -> int:
        """Reset every connection that is open now, on both sides; how many there were."""
        return self._call(self._reset(list(self._links)))

    # What runs in the thread.

    def _run(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _apply(self, faults: ProxyFaults, *, recount: bool) -> None:
        healed = self.faults.partition and not faults.partition
        self.faults = faults
        self.cut_epoch += recount
        if faults.refuse and self._server is not None:
            self._server.close()
            self._server = None
        elif not faults.refuse and self._server is None:
            await self._listen()
        for link in list(self._links):
            link.wake.set()
        if healed:
            await self._reset([link for link in self._links if link.damaged])

    async def _reset(self, links: list[Link]) -> int:
        for link in links:
            link.reset()
        for link in links:
            await link.ended.wait()
        return len(links)

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self._reset(list(self._links))
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        link = Link(self, reader, writer)
        self._add(link)
        try:
            await link.serve(*self._upstream)
        finally:
            self._discard(link)
            link.ended.set()

    def _add(self, link: Link) -> None:
        with self._changed:
            self._links.add(link)
        self.count(connections=1)

    def _discard(self, link: Link) -> None:
        with self._changed:
            self._links.discard(link)
        self.count()

    def count(self, **more: int) -> None:
        """Add to the counts (for the proxy's own parts)."""
        with self._changed:
            new = {name: getattr(self._counts, name) + value for name, value in more.items()}
            self._counts = dataclasses.replace(self._counts, **new)
            self._changed.notify_all()


__all__ = ["FaultProxy", "ProxyCounts", "ProxyFaults"]
