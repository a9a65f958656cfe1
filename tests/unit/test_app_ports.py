"""On which ports a program listens, as /proc has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import ExitStack

import pytest

from heeler.app.ports import listening

LISTENS = """
import os, socket, sys
tcp = socket.create_server(("127.0.0.1", 0))
six = socket.create_server(("::1", 0), family=socket.AF_INET6) if sys.argv[1] == "6" else None
bound = socket.socket(); bound.bind(("127.0.0.1", 0))
udp = socket.socket(type=socket.SOCK_DGRAM); udp.bind(("127.0.0.1", 0))
out = socket.create_connection(tcp.getsockname()); in_, _ = tcp.accept()
print(tcp.getsockname()[1], six.getsockname()[1] if six else 0, flush=True)
sys.stdin.read()
"""


def has_six() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.parametrize("family", ["4", pytest.param("6", marks=pytest.mark.skipif(not has_six(), reason="no IPv6"))])
def test_the_ports_that_accept_connections_and_no_others(family: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", LISTENS, family], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        ports = {int(port) for port in process.stdout.readline().split()} - {0}
        assert listening([process.pid]) == ports
        assert len(ports) == (2 if family == "6" else 1)
        process.kill()


def test_several_processes_may_share_a_socket_and_some_may_be_gone() -> None:
    with ExitStack() as stack:
        first, second = (stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
        ports = {first.getsockname()[1], second.getsockname()[1]}
        assert ports <= listening([os.getpid(), os.getpid(), 2**22 + 1])
    assert not ports & listening([os.getpid()])
    assert listening([]) == set()
