"""Memory that a process keeps for what comes next, and how much it says that it held."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import numpy as np
import pytest

from sattile.memory import peak_mb

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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc, whose settings these are")
def test_blocks_of_one_size_share_their_memory():
    faults = [
        int(subprocess.run([sys.executable, "-c", BLOCKS.format(line)], check=True, capture_output=True).stdout)
        for line in ("", "keep_freed()")
    ]
    assert faults[0] > 100  # in pages of 4 kB some 100,000, in large ones fewer
    assert faults[1] < faults[0] / 10


def test_the_peak_is_in_megabytes_and_stays():
    before = peak_mb()
    held = np.ones(int(before) * 300_000)  # 2.4 times all that was held so far
    assert 2 < peak_mb() / before < 4
    assert peak_mb() == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, abs=0.1)
    del held
    assert peak_mb() > 2 * before
