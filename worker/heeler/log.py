"""Log lines: events with fields, to standard error, as JSON or as text. Never a secret, never in anybody's way.

Lines are written by a thread of their own: whoever reads our standard error may stop reading, and the heartbeats
must not stop with them. Lines that don't fit the queue are counted and the count is logged.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, TextIO

_QUEUE_LINES = 10_000
_CLOSE_SECONDS = 1.0
_AT_ONCE = 100


class _Writer(threading.Thread):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(name="heeler-log", daemon=True)
        self._stream = stream
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # the only one that costs a writer little
        self._guard = threading.Lock()
        self._lost = 0

    def put(self, line: str) -> None:
        if self._lines.qsize() >= _QUEUE_LINES:
            self._count_lost(1)
        else:
            self._lines.put(line)

    def run(self) -> None:
        more = True
        while more:
            lines, more = self._next()
            try:
                self._write("".join(lines))
            except UnicodeError:  # of which nothing was written
                for line in lines:
                    self._try(line)
            except (OSError, ValueError):  # a full disk may have room again
                self._count_lost(len(lines))

    def _try(self, line: str) -> None:
        try:
            self._write(line)
        except (OSError, ValueError):
            self._count_lost(1)

    def _write(self, text: str) -> None:
        if lost := self._lost:
            self._stream.write(f'{{"event": "log_lines_lost", "lines": {lost}}}\n')
            self._stream.flush()
            self._count_lost(-lost)
        self._stream.write(text)
        self._stream.flush()

    def _next(self) -> tuple[list[str], bool]:
        """The lines that wait, one at least, to be written at once; and whether others will come."""
        lines = []
        line = self._lines.get()
        while line is not None:
            lines.append(line + "\n")
            if len(lines) == _AT_ONCE:
                return lines, True
            try:
                line = self._lines.get_nowait()
            except queue.Empty:
                return lines, True
        return lines, False

    def _count_lost(self, lines: int) -> None:
        with self._guard:
            self._lost += lines

    def close(self) -> None:
        self._lines.put(None)
        self.join(_CLOSE_SECONDS)


_RANKS = {"debug": 0, "info": 1, "warn": 2, "warning": 2, "error": 3}

Render = Callable[[dict[str, Any]], str]


class Logger:
    """Renders events and hands them to the writer. Callable as `heeler.status.Log`."""

    def __init__(self, writer: _Writer, render: Render, secrets: Iterable[str], least: str = "info") -> None:
        self._least = _RANKS[least]
        self._writer = writer
        self._render = render
        forms = {form for secret in secrets if len(secret) >= 4 for form in _written(secret)}
        self._secrets = sorted(forms, key=len, reverse=True)

    def __call__(self, level: str, event: str, fields: dict[str, object]) -> None:
        """Log one event, if it weighs enough."""
        if _RANKS[level] < self._least:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = self._render({"timestamp": now, "level": level, "event": event, **fields})
        self._writer.put(self.masked(line))

    def close(self) -> None:
        """Write what waits, for a second at the most; nothing is logged afterwards."""
        self._writer.close()

    def masked(self, text: str) -> str:
        """The text without any of the secrets."""
        for secret in self._secrets:
            text = text.replace(secret, "********")
        return text


def _as_json(entry: dict[str, Any]) -> str:
    return json.dumps(entry, default=str)


def _as_text(colors: bool) -> Render:
    from structlog.dev import ConsoleRenderer  # noqa: PLC0415 - a container never needs it

    renderer = ConsoleRenderer(colors=colors)
    return lambda entry: str(renderer(None, entry["level"], entry))


def _written(secret: str) -> set[str]:
    """The forms in which a text stands in a line: as it is, quoted as JSON or by `repr`, and both."""
    forms = {secret}
    for _ in range(2):
        forms |= {json.dumps(form)[1:-1] for form in forms} | {repr(form)[1:-1] for form in forms}
    return forms


@contextmanager
def logging_to(stream: TextIO, log_format: str, secrets: Iterable[str], log_level: str = "info") -> Iterator[Logger]:
    """Log while the block runs; lines still waiting at its end are written, for a second at most.

    Args:
        stream: Where to.
        log_format: "json", "text", or "auto": text on a terminal.
        secrets: Values that are masked wherever they appear.
        log_level: The least that is logged: "debug", "info", "warn" or "error".
    """
    as_text = log_format == "text" or (log_format == "auto" and stream.isatty())
    render = _as_text(stream.isatty()) if as_text else _as_json
    writer = _Writer(stream)
    writer.start()
    try:
        yield Logger(writer, render, secrets, log_level)
    finally:
        writer.close()
