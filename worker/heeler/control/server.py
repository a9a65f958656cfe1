"""Serves the control API on loopback while the runtime runs."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import anyio
import uvicorn

from heeler.checkpoints import Checkpoints
from heeler.control import ADDRESS_FILE, url_of
from heeler.control.api import create_app
from heeler.drain import Drain
from heeler.errors import UsageError
from heeler.status import Status


class _Server(uvicorn.Server):
    """A uvicorn server that leaves the signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bind(address: str) -> socket.socket:
    """A listening socket on a loopback address.

    Raises:
        UsageError: It is no loopback address with a port, or the port is taken.
    """
    host, _, port = address.rpartition(":")
    try:
        ip = ipaddress.ip_address(host.strip("[]"))
        number = int(port)
    except ValueError:
        raise UsageError(f"--control is {address!r}, but must be like 127.0.0.1:8642, or off") from None
    if not ip.is_loopback:
        raise UsageError(f"--control is {address!r}, but the control API listens on loopback only: 127.0.0.1:PORT")
    family = socket.AF_INET6 if ip.version == 6 else socket.AF_INET
    # Only a socket that says so is known to asyncio as one of TCP, and gets its answers out without Nagle's delay.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((str(ip), number))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UsageError(
            f"the control API can't listen on {address} ({error.strerror}): give this heeler its own with --control"
        ) from None
    return listener


async def serve(
    listener: socket.socket,
    status: Status,
    drain: Drain,
    checkpoints: Checkpoints,
    available: Callable[[], bool],
    state_dir: Path,
) -> None:
    """Serve until cancelled; the URL stands in the state folder meanwhile."""
    host = listener.getsockname()[0]
    app = create_app(status, drain, checkpoints, available, address=host)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1)
    server = _Server(config)
    url = url_of(listener)
    place = state_dir / ADDRESS_FILE
    try:
        place.write_text(url + "\n", encoding="ascii")
    except OSError as error:
        status.fault("control_address_not_kept", error=f"{place} can't be written: {error.strerror}")
    status.event("control_ready", url=url)
    try:
        await server.serve(sockets=[listener])
    except anyio.get_cancelled_exc_class():
        server.should_exit = True
        with anyio.CancelScope(shield=True), anyio.move_on_after(2):
            await server.shutdown(sockets=[listener])
        raise
    finally:
        with suppress(OSError):
            place.unlink()
        listener.close()
