"""How much memory a process and all that it started hold together."""

from __future__ import annotations

import os
import re
import threading
from types import TracebackType

SECONDS_A_SAMPLE = 0.2


class Peak:
    """The most memory that this process and its descendants have held while the block ran.

    Pages that several of them share count once (Linux's Pss): a sum of resident sizes would charge forked workers and
    shared memory to each. Short peaks between two samples are missed.

    Attributes:
        megabytes: of 10**6 bytes.
    """

    def __init__(self) -> None:
        self.megabytes = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while True:
            held = sum(proportional_bytes(pid) for pid in descendants(os.getpid()))
            self.megabytes = max(self.megabytes, held / 1e6)
            if self._stop.wait(SECONDS_A_SAMPLE):
                return


def descendants(pid: int) -> list[int]:
    """A process and all that it started and that still run."""
    parents = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat") as file:
                    # The command's name, in parentheses, may hold anything: what follows the last one counts.
                    parents[int(name)] = int(file.read().rpartition(")")[2].split()[1])
            except OSError:  # it has ended meanwhile
                continue
    found = [pid]
    for one in found:
        found.extend(child for child, parent in parents.items() if parent == one)
    return found


def proportional_bytes(pid: int) -> int:
    """Memory of a process, pages shared with others in proportion; 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            match = re.search(r"^Pss:\s+(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(match.group(1)) * 1024 if match else 0
