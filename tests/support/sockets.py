"""What Linux can say and do about a TCP socket that asyncio can't."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import struct
import termios

_LINGER_NOT = struct.pack("ii", 1, 0)


def abort(transport: asyncio.WriteTransport) -> None:
    """Close a connection by a reset; what is not yet sent is lost."""
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    transport.abort()


async def flush(transport: asyncio.WriteTransport, timeout: float = 5.0) -> None:
    """Wait until the other side's kernel has all that was written, at most `timeout` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout
    sock = transport.get_extra_info("socket")
    while not transport.is_closing() and loop.time() < deadline:
        with contextlib.suppress(OSError):
            unsent = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, b"\0" * 4))[0]
            if not unsent and not transport.get_write_buffer_size():
                return
        await asyncio.sleep(0.001)
