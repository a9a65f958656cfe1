"""A strict, fast S3 server for tests and benchmarks: R2's rules enforced, faults on command, all counted.

`S3Server.start()` runs it in a thread of this process, `S3Process.start()` in a process of its own.
"""

from __future__ import annotations

from .errors import S3Error
from .faults import Action, Answer, Corrupt, Cut, Delay, Faults, Match, Slow, Stall, Truncate
from .process import S3Process
from .rules import Rules
from .server import S3Server
from .stats import Record, Stats, StatsSnapshot

__all__ = [
    "Action",
    "Answer",
    "Corrupt",
    "Cut",
    "Delay",
    "Faults",
    "Match",
    "Record",
    "Rules",
    "S3Error",
    "S3Process",
    "S3Server",
    "Slow",
    "Stall",
    "Stats",
    "StatsSnapshot",
    "Truncate",
]
