"""Structured concurrency for all rooms. The helpers live in `heeler_sync.groups`, which stands alone."""

from heeler_sync.groups import alongside, background, spawning

__all__ = ["alongside", "background", "spawning"]
