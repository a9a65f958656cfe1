"""Processes that a local command starts and ends by their pid, and a port that is free for one."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from heeler.errors import UnavailableError

_END_SECONDS = 5.0


def free_port(wanted: int = 0) -> int:
    """A loopback port that nobody listens on now; 0 wants any.

    Raises:
        UnavailableError: Somebody does.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise UnavailableError(f"can't listen on 127.0.0.1:{wanted}: {error.strerror}") from None
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(
    command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None, log: Path | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A process that lives as long as the block at the most.

    Args:
        command: Program and arguments.
        env: Its environment; None means ours.
        cwd: Its working directory.
        log: Where its standard error goes; None discards it.
    """
    with open(log or "/dev/null", "ab") as errors:
        process = subprocess.Popen(
            command,
            env=dict(env) if env is not None else None,
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
