"""One child process with its own session and group, from its start to the last of its descendants."""

from __future__ import annotations

import errno
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

from heeler.app.processes import TAG_VARIABLE, UndyingError, descendants, kill_all, signal_group, start_time
from heeler.app.siblings import Siblings
from heeler.tasks import background

_LAUNCHER = Path(__file__).with_name("launcher.py")
_DRAIN_OUTPUT_SECONDS = 5.0
_KILL_SECONDS = 5.0
_SHORT_OF = {errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE}
"""Why a program can't be started here and now, though there is nothing wrong with it."""

Output = Callable[[bytes], None]
"""Takes what a program prints, in a worker thread. It may block: the program waits then, and nothing else does."""


class CannotStartError(Exception):
    """The program could not be executed: it is not there, or it is no program."""


class MachineError(Exception):
    """The machine, not the program, is why it could not be started: later, or on another one, it may."""


class RegisterError(MachineError):
    """What is started here can't be recorded, so that nobody could end it after our death."""


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
        """A child runs; raises `RegisterError`, and the child is ended again."""
        ...

    def ended(self, process: Started) -> None:
        """A child and all its descendants are gone."""
        ...

    def stuck(self, process: Started, pids: Sequence[int]) -> None:
        """These processes of a child do not die of SIGKILL; it stays recorded."""
        ...


class Child:
    """A running child."""

    def __init__(
        self, process: Process, started: Started, register: ProcessRegister, kill: Callable[[float], object]
    ) -> None:
        """Args: `kill` ends all that is left of it, with patience in seconds; it blocks, and raises `UndyingError`."""
        self._process = process
        self._register = register
        self._kill = kill
        # Of our own: heartbeats must not wait until other threads are done.
        self._threads = anyio.CapacityLimiter(2)
        self._given_up = anyio.Event()
        self.started = started

    @property
    def stuck(self) -> bool:
        """Whether some of its processes did not die of SIGKILL; they may still finish a write."""
        return self._given_up.is_set()

    async def wait(self) -> Exit:
        """How it ended, once it has; its descendants may live on. One that does not die counts as killed."""
        code = -int(signal.SIGKILL)
        with anyio.CancelScope() as scope:
            async with background(partial(self._unless_given_up, scope)):
                code = await self._process.wait()
        return Exit(None, -code) if code < 0 else Exit(code, None)

    async def _unless_given_up(self, scope: anyio.CancelScope) -> None:
        await self._given_up.wait()
        if self._process.returncode is None:
            scope.cancel()

    def terminate(self) -> None:
        """SIGTERM to the group."""
        signal_group(self.started.group, signal.SIGTERM)

    async def record(self) -> None:
        """Have it registered; raises `RegisterError`."""
        await anyio.to_thread.run_sync(self._register.started, self.started, limiter=self._threads)

    async def kill(self) -> None:
        """SIGKILL to the group and to every descendant, wherever it went; `stuck` if some do not die.

        A stranger that may be another running child's is left to that one's end.
        """
        kill = partial(self._kill, 0.0 if self.stuck else _KILL_SECONDS)
        try:
            await anyio.to_thread.run_sync(kill, limiter=self._threads)
        except UndyingError as error:
            if not self.stuck:
                self._given_up.set()
                stuck = partial(self._register.stuck, self.started, error.pids)
                await anyio.to_thread.run_sync(stuck, limiter=self._threads)

    async def end(self) -> None:
        """The last of it: nothing is left of it, here or in the register, unless it does not die."""
        await self.kill()
        if self._process.returncode is None and self.stuck:
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    await stream.aclose()
        else:
            await self._process.aclose()
        if not self.stuck:
            await anyio.to_thread.run_sync(self._register.ended, self.started, limiter=self._threads)


@asynccontextmanager
async def child(
    argv: Sequence[str],
    environment: Mapping[str, str],
    stdout: Sequence[Output],
    stderr: Sequence[Output],
    register: ProcessRegister,
    siblings: Siblings | None = None,
) -> AsyncIterator[Child]:
    """Start a child; when the block has ended, however it ended, neither it nor a descendant is left.

    Args:
        argv: The program and its arguments; no shell.
        environment: All of its environment.
        stdout: Takers of its standard output.
        stderr: Takers of its standard error.
        register: Told of its start and its end.
        siblings: Knows which children run at the same time; None if it runs alone.

    Raises:
        CannotStartError: The program can't be executed.
        MachineError: It can't be started here and now.
    """
    siblings = siblings or Siblings()
    threads = anyio.CapacityLimiter(1)
    try:
        before = await anyio.to_thread.run_sync(descendants, limiter=threads)
    except (OSError, RuntimeError) as error:  # no descriptor to look with, or no thread
        raise _not_started(argv[0], getattr(error, "errno", errno.EAGAIN)) from None
    with siblings.join(secrets.token_hex(8), before) as sibling:
        process, reader = await _spawn(argv, {**environment, TAG_VARIABLE: sibling.tag}, sibling.tag)
        started = Started(process.pid, start_time(process.pid) or 0, sibling.tag)
        sibling.started(started.group, started.start_time)
        running = Child(process, started, register, partial(siblings.kill, sibling))
        try:
            await running.record()
            await _check_started(reader, argv[0])
            async with _copied(running, _Copy(process.stdout, stdout), _Copy(process.stderr, stderr)):
                yield running
        finally:
            os.close(reader)
            with anyio.CancelScope(shield=True):
                await running.end()


@asynccontextmanager
async def _copied(running: Child, *copies: _Copy) -> AsyncIterator[None]:
    """Hand on what a child prints; at the block's end it is killed, and what it printed until then still comes."""
    async with background(*(copy.run for copy in copies)):
        try:
            yield
        finally:
            with anyio.CancelScope(shield=True):
                try:
                    await running.kill()
                    with anyio.move_on_after(_DRAIN_OUTPUT_SECONDS):
                        for copy in copies:
                            await copy.ended.wait()
                finally:
                    for copy in copies:
                        copy.stop()


async def _spawn(argv: Sequence[str], environment: Mapping[str, str], tag: str) -> tuple[Process, int]:
    """The launcher as a process, and the descriptor on which it tells whether it became the program."""
    try:
        reader, writer = os.pipe()
    except OSError as error:
        raise _not_started(argv[0], error.errno) from None
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER), str(writer), str(os.getpid())]
    try:
        process = await anyio.open_process(
            [*launcher, *argv],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=(writer,),
        )
    except OSError as error:  # arguments and environment that are too long, or no memory for one more process
        os.close(reader)
        raise _not_started(argv[0], error.errno) from None
    except RuntimeError:  # no thread that waits for its end: it runs, and nobody would know
        os.close(reader)
        kill_all(tag)
        raise _not_started(argv[0], errno.EAGAIN) from None
    except BaseException:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    return process, reader


async def _check_started(reader: int, program: str) -> None:
    """Wait until the launcher has become the program, or has told why not."""
    told = b""
    while True:
        await anyio.wait_readable(reader)
        data = os.read(reader, 16)
        if not data:
            break
        told += data
    if not told:
        raise MachineError(f"{program!r} can't be started here: its launcher died before")
    if told[1:]:
        raise _not_started(program, int(told[1:]))


def _not_started(program: str, number: int | None) -> Exception:
    why = os.strerror(number or 0)
    if number in _SHORT_OF:
        return MachineError(f"{program!r} can't be started here: {why}")
    return CannotStartError(f"{program!r} can't be started: {why}")


class _Copy:
    """Hands one stream of a child to its takers, chunk by chunk: to its end, or until `stop`, but not cancelled.

    What a program prints while it is ended because we are cancelled is its last word, and wanted.
    """

    def __init__(self, stream: ByteReceiveStream | None, outputs: Sequence[Output]) -> None:
        self._stream = stream
        self._outputs = outputs
        self._thread = anyio.CapacityLimiter(1)
        self._scope = anyio.CancelScope(shield=True)
        self.ended = anyio.Event()

    async def run(self) -> None:
        try:
            with self._scope:
                await self._copy()
        except (anyio.ClosedResourceError, anyio.BrokenResourceError):
            return
        finally:
            self.ended.set()

    def stop(self) -> None:
        self._scope.cancel()

    async def _copy(self) -> None:
        if self._stream is None:
            return
        async for data in self._stream:
            for output in self._outputs:
                await anyio.to_thread.run_sync(partial(output, data), abandon_on_cancel=True, limiter=self._thread)
