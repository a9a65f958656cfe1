"""The control API: loopback only, for people, probes and metrics."""

from __future__ import annotations

import socket

CONTROL_VARIABLE = "HEELER_CONTROL_URL"
"""In the program's environment: the API's URL, for `heeler checkpoint`."""

ADDRESS_FILE = "control"
"""In the state folder: the API's URL while it is served."""


def url_of(listener: socket.socket) -> str:
    """The API's URL when it is served on this socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
