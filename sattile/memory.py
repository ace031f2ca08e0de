"""What memory a process has held, and what it does with memory that it needs no more."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt(3)."""


def peak_mb() -> float:
    """The most memory this process has held, in MB (ru_maxrss is in kB on Linux)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def keep_freed() -> None:
    """Let this process keep the memory that its arrays leave, for the next ones, if these are as large.

    Else the system is given back every large array and asked for another, which costs a page fault every 4 kB: an
    eighth of the time that reading takes. Without glibc all stays as it was.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
