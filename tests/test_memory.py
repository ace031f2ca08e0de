"""Memory that a process keeps for what comes next, and how much it says that it held."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

BLOCKS = """
import resource
import numpy as np
from sattile.memory import keep_freed
{}
np.ones(10_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    np.ones(10_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

PEAKS = """
import subprocess, sys
import numpy as np
from sattile.memory import peak_mb
before = peak_mb()
np.ones(25_000_000)
assert 180 < peak_mb() - before < 230, (before, peak_mb())
if len(sys.argv) == 1:  # once more, started by a process that has held as much
    subprocess.run([sys.executable, "-c", sys.stdin.read(), "child"], check=True)
"""


def output(script: str, **variables: str) -> int:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | variables
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, env=environment)
    return int(done.stdout)


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or tuple(map(int, platform.libc_ver()[1].split("."))) < (2, 35),
    reason="needs glibc 2.35 or later, whose settings these are",
)
def test_blocks_of_one_size_share_their_memory():
    plain, kept = (output(BLOCKS.format(line)) for line in ("", "keep_freed()"))
    given = output(BLOCKS.format("keep_freed()"), MALLOC_MMAP_THRESHOLD_="1000000")
    # Five arrays of 80 MB: 40 large pages each at least, and 20,000 small ones where there are no large ones.
    assert plain > 100
    assert given > 100  # the user's own setting
    assert kept < 30


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system counts other memory")
def test_the_peak_is_in_megabytes_and_a_process_own():
    subprocess.run([sys.executable, "-c", PEAKS], check=True, input=PEAKS, text=True)
