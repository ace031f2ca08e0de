"""What memory a process has held, and what it does with memory that it needs no more."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from contextlib import suppress

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Parameters of glibc's mallopt(3)."""


def peak_mb() -> float:
    """The most memory this process has held, in MB."""
    with suppress(OSError), open("/proc/self/status") as file:
        # ru_maxrss would begin with what the process held that started this one.
        return round(next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024, 1)
    unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def keep_freed() -> None:
    """Let this process keep the memory that its arrays leave, for the next ones, if these are as large.

    Else the system is given back every array of more than 32 MB and asked for another, which costs a page fault every
    4 kB: an eighth of the time that reading takes. Settings of the user's own go before it, and where the C library
    has or takes no such setting (glibc before 2.35) all stays as it was.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        # In this order: the second alone would turn off what glibc does about the first by itself.
        if libc.mallopt(MMAP_THRESHOLD, 1 << 30):
            libc.mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
