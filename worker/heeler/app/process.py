"""One child process with its own session and group, from its start to the last of its descendants."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import anyio
import anyio.to_thread
from anyio.abc import ByteReceiveStream, Process

from heeler.app.processes import TAG_VARIABLE, kill_all, signal_group, start_time
from heeler.tasks import background

_LAUNCHER = Path(__file__).with_name("launcher.py")
_DRAIN_OUTPUT_SECONDS = 5.0

Output = Callable[[bytes], None]
"""Takes what a program prints, in a worker thread. It may block: the program waits then, and nothing else does."""


class CannotStartError(Exception):
    """The program could not be executed: it is not there, or it is no program."""


@dataclass(frozen=True)
class Exit:
    """How a process ended: by itself with `code`, or killed by `signal`; the other is None."""

    code: int | None
    signal: int | None

    def __str__(self) -> str:
        if self.signal is None:
            return f"exit code {self.code}"
        try:
            return f"killed by {signal.Signals(self.signal).name}"
        except ValueError:
            return f"killed by signal {self.signal}"


@dataclass(frozen=True)
class Started:
    """What has to be known to end a child whose runtime died.

    Attributes:
        group: Its process group, which is its pid too.
        start_time: In clock ticks since boot; tells it from a later process of the same pid.
        tag: What all its processes carry in their environment.
    """

    group: int
    start_time: int
    tag: str


class ProcessRegister(Protocol):
    """Keeps what runs on disk, so that a new runtime can end what an old one left. Calls block."""

    def started(self, process: Started) -> None:
        """A child runs."""
        ...

    def ended(self, process: Started) -> None:
        """A child and all its descendants are gone."""
        ...


class Child:
    """A running child."""

    def __init__(self, process: Process, started: Started) -> None:
        self._process = process
        self.started = started

    async def wait(self) -> Exit:
        """How it ended, once it has; its descendants may live on."""
        code = await self._process.wait()
        return Exit(None, -code) if code < 0 else Exit(code, None)

    def terminate(self) -> None:
        """SIGTERM to the group."""
        signal_group(self.started.group, signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL to the group and to every descendant, wherever it went."""
        await anyio.to_thread.run_sync(kill_all, self.started.tag, self.started.group)


@asynccontextmanager
async def child(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stdout: Sequence[Output],
    stderr: Sequence[Output],
    register: ProcessRegister,
) -> AsyncIterator[Child]:
    """Start a child; when the block has ended, however it ended, neither it nor a descendant is left.

    Args:
        argv: The program and its arguments; no shell.
        environment: All of its environment.
        stdout: Takers of its standard output.
        stderr: Takers of its standard error.
        register: Told of its start and its end.

    Raises:
        CannotStartError: The program can't be executed.
    """
    tag = secrets.token_hex(8)
    reader, writer = os.pipe()
    try:
        process = await _spawn(argv, {**environment, TAG_VARIABLE: tag}, writer)
    except OSError as error:  # arguments and environment that are too long, or no memory for one more process
        os.close(reader)
        raise CannotStartError(f"{argv[0]!r} can't be started: {error.strerror}") from None
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    started = Started(process.pid, start_time(process.pid) or 0, tag)
    running = Child(process, started)
    try:
        await anyio.to_thread.run_sync(register.started, started)
        await _check_started(reader, argv[0])
        copies = [_Copy(process.stdout, stdout), _Copy(process.stderr, stderr)]
        async with background(*(copy.run for copy in copies)):
            try:
                yield running
            finally:
                with anyio.CancelScope(shield=True):
                    await running.kill()
                    with anyio.move_on_after(_DRAIN_OUTPUT_SECONDS):
                        for copy in copies:
                            await copy.ended.wait()
    finally:
        os.close(reader)
        with anyio.CancelScope(shield=True):
            await running.kill()
            await process.aclose()
            await anyio.to_thread.run_sync(register.ended, started)


async def _spawn(argv: Sequence[str], environment: Mapping[str, str], descriptor: int) -> Process:
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(descriptor), str(os.getpid())]
    return await anyio.open_process(
        [*launcher, *argv],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(descriptor,),
    )


async def _check_started(reader: int, program: str) -> None:
    """Wait until the launcher has become the program, or has told why not."""
    await anyio.wait_readable(reader)
    told = os.read(reader, 16)
    if told:
        raise CannotStartError(f"{program!r} can't be started: {os.strerror(int(told))}")


class _Copy:
    """Hands one stream of a child to its takers, chunk by chunk."""

    def __init__(self, stream: ByteReceiveStream | None, outputs: Sequence[Output]) -> None:
        self._stream = stream
        self._outputs = outputs
        self._thread = anyio.CapacityLimiter(1)
        self.ended = anyio.Event()

    async def run(self) -> None:
        try:
            if self._stream is not None:
                async for data in self._stream:
                    for output in self._outputs:
                        await anyio.to_thread.run_sync(
                            partial(output, data), abandon_on_cancel=True, limiter=self._thread
                        )
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return
        finally:
            self.ended.set()
