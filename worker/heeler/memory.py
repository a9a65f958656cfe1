"""What the C library keeps of the memory that we freed."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
_LARGE_BLOCK = 1 << 20


def give_memory_back() -> None:
    """Let packs' memory go back to the system as soon as they are sent, where the C library would keep it (glibc).

    It raises its threshold with the first large block that is freed, and keeps what lies below: 200 MB at the peak.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
