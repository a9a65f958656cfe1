"""How the C library keeps the memory that we free."""

from __future__ import annotations

import ctypes
from contextlib import suppress

_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_LARGE_BLOCK = 16 << 20


def share_freed_memory() -> None:
    """Have all threads share one heap, packs included (glibc; elsewhere nothing is done).

    Packs are filled in one thread and sent in others. By default each thread has a heap of its own, and blocks of a
    megabyte come from the kernel page by page each time: twice the CPU for sending, and 200 MB kept for nothing.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(_M_ARENA_MAX, 1)
        library.mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)
