"""What `heeler sync` says: results on standard output, all else on standard error; bars on a terminal only."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, TextIO

import anyio

from heeler_sync.errors import StoreError
from heeler_sync.groups import background

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

_BAR_SECONDS = 0.1
_LINE_SECONDS = 10.0
_SAME_RETRY_SECONDS = 5.0
_WORTH_TELLING = 0.5

_WARNINGS = {
    "generation_damaged": "generation {generation} is damaged: {error}",
    "file_left_out": "{file} is left out: {reason}",
    "collect_failed": "what is no longer needed can't be deleted now: {error}",
    "unfenced": "the storage of bucket {bucket} can't keep two writers apart; two at once would damage the prefix",
    "acquire_contended": "somebody else took the prefix in this moment: {error}; trying again",
    "regained": "taken back from another process (epoch {epoch})",
    "upload_retried": "{key} is tried again in {retry_in} s: {error}",
    "delete_retried": "the deletion of {key} is tried again in {retry_in} s: {error}",
    "upload_refused": "{key} is refused: {error}; it is tried again in {retry_in} s",
    "delete_refused": "the deletion of {key} is refused: {error}; it is tried again in {retry_in} s",
    "object_replaced": "{key} was changed by somebody else; it is looked at again",
    "watch_unavailable": "{folder} can't be watched ({error}); it is looked at from time to time instead",
    "scan_failed": "{folder} can't be read: {error}",
    "folder_replaced": "{folder} is another folder now; what storage has stays",
    "commit_failed": "the commit is tried again in {retry_in} s: {error}",
    "uplink_too_slow": "the folder changes faster than it can be sent: {minutes_at_risk} minutes behind",
    "checkpoint_never_settles": "{folder} has not been quiet for {seconds} s ({file}); name a file with --ready",
    "file_never_settles": "{file} has not been quiet for {seconds} s, so it is not sent",
}

_NEWS = {
    "committed": "committed generation {generation}: {files} files, {bytes}; {sent} sent in {seconds} s",
    "uploaded": "uploaded {key} ({bytes})",
    "deleted": "deleted {key}",
}


@dataclass(frozen=True)
class Amount:
    """How far something has come: bytes so far, bytes in all (0 if that is not known), and words."""

    done: int
    total: int
    words: str


class Voice:
    """Says things to people or, with `as_json`, to programs. Never raises because nobody listens."""

    def __init__(self, *, as_json: bool = False, tell_news: bool = False) -> None:
        """Args: with `as_json` standard output gets one JSON document; with `tell_news` a line for each event."""
        self.as_json = as_json
        self._tell_news = tell_news
        self._next_retry = 0.0
        self._above_bar: Callable[[str], None] | None = None

    def say(self, line: str) -> None:
        """A line of the result; programs get it as JSON instead."""
        if not self.as_json:
            _write(sys.stdout, printable(line) + "\n")

    def give(self, document: object) -> None:
        """The result, for programs."""
        if self.as_json:
            _write(sys.stdout, json.dumps(document, indent=2) + "\n")

    def note(self, line: str) -> None:
        """A line beside the result."""
        if self._above_bar is not None:
            self._above_bar(printable(line))
        else:
            _write(sys.stderr, printable(line) + "\n")

    def warn(self, line: str) -> None:
        """A line that somebody should read."""
        self.note(f"warning: {line}")

    def on_event(self, event: str, fields: Mapping[str, object]) -> None:
        """What `heeler_sync` tells, as far as a person wants to hear it."""
        if event in _WARNINGS:
            self.warn(_WARNINGS[event].format(**fields))
        elif self._tell_news and event in _NEWS:
            shown = {name: size(value) if _is_size(name, value) else value for name, value in fields.items()}
            self.say(_NEWS[event].format(**shown))

    def on_retry(self, error: StoreError, delay: float) -> None:
        """Storage is asked again; said now and then, and not of what is over in a moment."""
        if delay >= _WORTH_TELLING and time.monotonic() >= self._next_retry:
            self._next_retry = time.monotonic() + _SAME_RETRY_SECONDS
            self.warn(f"storage is asked again in {delay:.1f} s: {error}")

    def table(self, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows for people: aligned, coloured on a terminal."""
        if sys.stdout.isatty():
            from rich.console import Console  # noqa: PLC0415 - a pipe never needs it
            from rich.table import Table  # noqa: PLC0415
            from rich.text import Text  # noqa: PLC0415

            table = Table(*head, box=None, header_style="bold")
            for row in rows:
                table.add_row(*(Text(printable(cell)) for cell in row))
            Console().print(table)
            return
        lines = [[printable(cell) for cell in row] for row in (head, *rows)]
        widths = [max(len(row[column]) for row in lines) for column in range(len(head))]
        for row in lines:
            self.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())

    @asynccontextmanager
    async def showing(self, amount: Callable[[], Amount]) -> AsyncIterator[None]:
        """While the block runs, show how far it is: a bar on a terminal, else a line every ten seconds."""
        async with background(lambda: self._bar(amount) if sys.stderr.isatty() else self._lines(amount)):
            yield

    async def _lines(self, amount: Callable[[], Amount]) -> None:
        while True:
            await anyio.sleep(_LINE_SECONDS)
            now = amount()
            of = f" of {size(now.total)}" if now.total else ""
            self.note(f"{now.words}: {size(now.done)}{of}")

    async def _bar(self, amount: Callable[[], Amount]) -> None:
        progress = _progress()
        with progress:
            self._above_bar = lambda line: progress.console.print(line, markup=False, highlight=False)
            task = progress.add_task("", total=None)
            try:
                while True:
                    now = amount()
                    progress.update(task, description=now.words, completed=now.done, total=now.total or None)
                    await anyio.sleep(_BAR_SECONDS)
            finally:
                self._above_bar = None


def _progress() -> RichProgress:
    from rich.console import Console  # noqa: PLC0415 - a pipe never needs it
    from rich.progress import (  # noqa: PLC0415
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def _is_size(name: str, value: object) -> bool:
    return name in ("bytes", "sent") and isinstance(value, int)


def printable(line: str) -> str:
    """A line without what could break it or move a terminal's cursor: names in storage are others' to choose."""
    if line.isprintable():
        return line
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode("ascii") for one in line)


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except BrokenPipeError:
        # Who read us has seen enough. Nothing can be flushed into the pipe at our exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def size(value: object) -> str:
    """Bytes as people read them."""
    number = float(str(value))
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def when(seconds: float) -> str:
    """A time as people and programs read it."""
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).isoformat(sep=" ", timespec="seconds")[:19] + "Z"
    except (OverflowError, ValueError, OSError):
        return "?"


def count(number: int, one: str, many: str = "") -> str:
    """How many of something, with the right word."""
    return f"{number} {one if number == 1 else many or one + 's'}"
