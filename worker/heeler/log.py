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


class _Writer(threading.Thread):
    def __init__(self, stream: TextIO) -> None:
        super().__init__(name="heeler-log", daemon=True)
        self._stream = stream
        self._lines: queue.Queue[str | None] = queue.Queue(_QUEUE_LINES)
        self._guard = threading.Lock()
        self._lost = 0

    def put(self, line: str) -> None:
        try:
            self._lines.put_nowait(line)
        except queue.Full:
            self._count_lost(1)

    def run(self) -> None:
        while (line := self._lines.get()) is not None:
            try:
                if lost := self._lost:
                    self._stream.write(f'{{"event": "log_lines_lost", "lines": {lost}}}\n')
                    self._stream.flush()
                    self._count_lost(-lost)
                self._stream.write(line + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a full disk may have room again
                self._count_lost(1)

    def _count_lost(self, lines: int) -> None:
        with self._guard:
            self._lost += lines

    def close(self) -> None:
        try:
            self._lines.put(None, timeout=_CLOSE_SECONDS)
        except queue.Full:
            return
        self.join(_CLOSE_SECONDS)


Render = Callable[[dict[str, Any]], str]


class Logger:
    """Renders events and hands them to the writer. Callable as `heeler.status.Log`."""

    def __init__(self, writer: _Writer, render: Render, secrets: Iterable[str]) -> None:
        self._writer = writer
        self._render = render
        forms = {form for secret in secrets if len(secret) >= 4 for form in _written(secret)}
        self._secrets = sorted(forms, key=len, reverse=True)

    def __call__(self, level: str, event: str, fields: dict[str, object]) -> None:
        """Log one event."""
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
def logging_to(stream: TextIO, log_format: str, secrets: Iterable[str]) -> Iterator[Logger]:
    """Log while the block runs; lines still waiting at its end are written, for a second at most.

    Args:
        stream: Where to.
        log_format: "json", "text", or "auto": text on a terminal.
        secrets: Values that are masked wherever they appear.
    """
    as_text = log_format == "text" or (log_format == "auto" and stream.isatty())
    render = _as_text(stream.isatty()) if as_text else _as_json
    writer = _Writer(stream)
    writer.start()
    try:
        yield Logger(writer, render, secrets)
    finally:
        writer.close()
