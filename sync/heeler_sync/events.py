"""How this package tells what happens: a name and fields, to whoever listens."""

from __future__ import annotations

from collections.abc import Callable, Mapping

EventSink = Callable[[str, Mapping[str, object]], None]
"""Takes an event's name and its fields. Fields never hold credentials or signed URLs."""
