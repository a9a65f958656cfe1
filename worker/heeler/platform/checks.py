"""Optional checks before the first job: a machine that is too small, too slow or broken is left at once.

Each check that a setting asks for gives a reason that a person understands, or none.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import anyio

from heeler.app.process import CannotStartError, Exit, MachineError, ProcessRegister, child
from heeler.errors import UsageError
from heeler.platform.link import Link, figure, probe_place
from heeler.settings import Settings
from heeler.status import Status
from heeler_sync.store.base import ObjectStore
from heeler_sync.threads import in_thread

_COMMAND_SECONDS = 120.0
_TAIL_BYTES = 64 << 10
_TAIL_SHOWN = 500


async def check_machine(
    settings: Settings,
    open_store: Callable[[str], ObjectStore],
    environment: Mapping[str, str],
    register: ProcessRegister,
    status: Status,
) -> list[str]:
    """Why this machine is unfit for jobs; empty if it is fit.

    Args:
        settings: Which checks, and how much is enough.
        open_store: Gives the store of a bucket.
        environment: Of the check's command.
        register: Told of the check's process.
        status: Told of what was measured, and takes the secrets out of what the command prints.

    Raises:
        UsageError: A check can't be made as the settings have it, or the bucket refuses us.
    """
    argv = _words(settings.check_command)
    place = probe_place(settings) if settings.check_uplink or settings.check_downlink else None
    reasons = [] if settings.check_disk is None else await in_thread(_full_disks, settings, settings.check_disk)
    if argv is not None:
        reasons += await _failed_command(argv, environment, register, status)
    if place is not None and not reasons:  # a probe costs time and requests
        link = Link(open_store(place.bucket), place, settings, status)
        reasons += await link.reasons()
    return reasons


def _words(command: str | None) -> list[str] | None:
    if command is None:
        return None
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"--check-command can't be split into words: {error}") from None
    if not words:
        raise UsageError("--check-command is empty")
    return words


def _full_disks(settings: Settings, asked: int) -> list[str]:
    """One reason for each file system of our folders that has too little room."""
    free: dict[int, tuple[str, int]] = {}
    for folder in (settings.input_dir, settings.checkpoint_dir, settings.output_dir, str(settings.state_path)):
        there = _existing(Path(folder).absolute())
        free.setdefault(there.stat().st_dev, (folder, shutil.disk_usage(there).free))
    return [
        f"{folder} has {_gigabytes(size)} free, at least {_gigabytes(asked)} asked for by --check-disk"
        for folder, size in free.values()
        if size < asked
    ]


def _gigabytes(size: int) -> str:
    return f"{figure(size / 1e9)} GB"


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there already; it will be made on that file system."""
    return next(path for path in (folder, *folder.parents) if os.access(path, os.F_OK))


class _Tail:
    """The end of what a command prints."""

    def __init__(self) -> None:
        self._kept = b""

    def take(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-_TAIL_BYTES:]

    def shown(self, clean: Callable[[str], str]) -> str:
        """Its last words, in one line without secrets."""
        text = clean(self._kept.decode("utf-8", "replace"))
        line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
        return f": {line[-_TAIL_SHOWN:]}" if line else ""


async def _failed_command(
    argv: list[str], environment: Mapping[str, str], register: ProcessRegister, status: Status
) -> list[str]:
    """The reason, if the command does not end with 0 in time."""
    tail = _Tail()
    how: Exit | None = None
    try:
        async with child(argv, environment, [tail.take], [tail.take], register) as running:
            with anyio.move_on_after(_COMMAND_SECONDS):
                how = await running.wait()
    except (CannotStartError, MachineError) as error:
        return [f"--check-command: {error}"]
    if how is None:
        return [f"--check-command: {argv[0]!r} did not end in {_COMMAND_SECONDS:g} s{tail.shown(status.clean)}"]
    if how.code != 0:
        return [f"--check-command: {argv[0]!r} ended with {how}{tail.shown(status.clean)}"]
    return []
