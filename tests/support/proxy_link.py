"""One connection through the fault proxy: four tasks, reading and writing each way, under the faults in force."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .sockets import abort, flush

_CHUNK = 64 << 10
_AHEAD = 64
"""Chunks that are read ahead of writing in each direction."""
_TICK = 0.02
_CONNECT_SECONDS = 10.0
_CONTINUE = b"HTTP/1.1 100"


@dataclass(frozen=True, slots=True)
class ProxyFaults:
    """What the proxy does to its connections; `up` is from the client to the server."""

    latency_up: float = 0.0
    """Seconds added to every byte."""
    latency_down: float = 0.0
    rate_up: float | None = None
    """Bytes per second of each connection."""
    rate_down: float | None = None
    cut_up: int | None = None
    """Reset a connection once so many more bytes have passed, counted from the setting."""
    cut_down: int | None = None
    stall_up: bool = False
    """Hold all bytes, in order, until set back."""
    stall_down: bool = False
    partition: bool = False
    """Drop all bytes and all endings without a word. When healed, connections that lost any are reset."""
    refuse: bool = False
    """Refuse new connections (nothing listens)."""
    swallow_continue: bool = False
    """Drop the interim answer `100 Continue`."""


class Owner(Protocol):
    """What a link needs of its proxy."""

    faults: ProxyFaults
    cut_epoch: int

    def count(self, **more: int) -> None:
        """Add to the counts."""


class Link:
    """One client's connection and the one to the server."""

    def __init__(self, proxy: Owner, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.proxy = proxy
        self.wake = asyncio.Event()
        self.ended = asyncio.Event()
        self.damaged = False
        self._connecting = False
        self._doomed = False
        self._reader = reader
        self._writers = [writer]
        self._task: asyncio.Task[None] | None = None

    async def serve(self, host: str, port: int) -> None:
        """Forward both ways until both have ended."""
        self._task = asyncio.current_task()
        flows: list[asyncio.Task[None]] = []
        try:
            await self.until(lambda: not self.proxy.faults.partition)
            self._connecting = True
            reader, writer = await asyncio.wait_for(asyncio.open_connection(host, port), _CONNECT_SECONDS)
            self._connecting = False
            self._writers.append(writer)
            if self._doomed:
                raise ConnectionResetError("reset by the proxy while it connected")
            up, down = _Flow(self, "up", self._reader, writer), _Flow(self, "down", reader, self._writers[0])
            flows = [asyncio.ensure_future(work) for work in (up.read(), up.write(), down.read(), down.write())]
            done, _ = await asyncio.wait(flows, return_when=asyncio.FIRST_EXCEPTION)
            if all(flow.exception() is None for flow in done):
                self.close()
            else:
                self.reset()
        except (OSError, asyncio.TimeoutError, asyncio.CancelledError):
            self._connecting = False
            self.reset()
        finally:
            for flow in flows:
                flow.cancel()
            await asyncio.gather(*flows, return_exceptions=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on the faults in force holds."""
        while not condition():
            self.wake.clear()
            await self.wake.wait()

    def close(self) -> None:
        """End both connections in order."""
        for writer in self._writers:
            writer.close()

    def reset(self) -> None:
        """Reset both connections; one that is being made, as soon as it is."""
        if self._connecting:
            self._doomed = True
            return
        for writer in self._writers:
            abort(writer.transport)
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()


class _Flow:
    """The bytes of one direction: read ahead by one task, written when they are due by another."""

    def __init__(
        self,
        link: Link,
        way: Literal["up", "down"],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._link = link
        self._way = way
        self._reader = reader
        self._writer = writer
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_AHEAD)
        self._passed = 0
        self._cut_epoch = link.proxy.cut_epoch
        self._head = b""

    def _fault(self, name: str) -> Any:
        return getattr(self._link.proxy.faults, f"{name}_{self._way}")

    async def read(self) -> None:
        """Take what comes; an empty chunk is the end."""
        loop = asyncio.get_running_loop()
        data = b"-"
        while data:
            data = await self._reader.read(_CHUNK)
            await self._queue.put((loop.time() + self._fault("latency"), data))

    async def write(self) -> None:
        """Write what is due, as fast as is allowed."""
        loop, link = asyncio.get_running_loop(), self._link
        while True:
            due, data = await self._queue.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            await link.until(lambda: not self._fault("stall"))
            if link.damaged or link.proxy.faults.partition:
                link.damaged = True
                link.proxy.count(dropped=len(data))
                continue
            if not data:
                if self._writer.can_write_eof():
                    self._writer.write_eof()
                return
            if self._way == "down":
                data = self._without_continue(data)
            await self._pass_on(memoryview(data))

    async def _pass_on(self, data: memoryview) -> None:
        link = self._link
        while data:
            if self._cut_epoch != link.proxy.cut_epoch:
                self._cut_epoch, self._passed = link.proxy.cut_epoch, 0
            rate, cut = self._fault("rate"), self._fault("cut")
            take = len(data) if not rate else max(1, int(rate * _TICK))
            if cut is not None:
                take = min(take, cut - self._passed)
                if take <= 0:
                    await flush(self._writer.transport)
                    raise ConnectionResetError("cut by the proxy")
            piece, data = data[:take], data[take:]
            self._passed += len(piece)
            link.proxy.count(**{f"bytes_{self._way}": len(piece)})
            self._writer.write(piece)
            await self._writer.drain()
            if rate:
                await asyncio.sleep(len(piece) / rate)

    def _without_continue(self, data: bytes) -> bytes:
        """The bytes without an interim answer at their start, which may come in pieces."""
        if not self._link.proxy.faults.swallow_continue:
            data, self._head = self._head + data, b""
            return data
        data, self._head = self._head + data, b""
        while data and data[: len(_CONTINUE)] == _CONTINUE[: len(data)]:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                self._head = data
                return b""
            self._link.proxy.count(continues_swallowed=1)
            data = data[end + 4 :]
        return data
