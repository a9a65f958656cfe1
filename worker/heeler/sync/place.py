"""The prefix that a command of `heeler sync` works on, how it is reached, and how its errors are told."""

from __future__ import annotations

SNAPSHOT, MIRROR = "snapshot", "mirror"
