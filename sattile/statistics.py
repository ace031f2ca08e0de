"""Statistics of bands, added up exactly: the same numbers for any order of tiles. numpy only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

MEASURED = 1e15
"""No sensor measures more; squares of more leave float32."""

PERCENTILES = (1, 2, 5, 25, 50, 75, 95, 98, 99)


class BandStatistics:
    """Count, sums and histogram of one band, added up exactly, so that the order of tiles does not matter.

    Integers of up to 16 bits are counted value by value, and all else follows from the counts. Other types are
    summed per tile in float64 and the tiles' sums by `math.fsum`, which rounds once; their histogram has a bin for
    each float32 that agrees in the upper 16 bits (steps of 0.8 % at most).
    """

    def __init__(self, dtype: str):
        self.dtype = np.dtype(dtype)
        self.exact = self.dtype.kind in "iu" and self.dtype.itemsize <= 2
        self.counts = np.zeros(1 << 16, np.int64)
        self.sums: list[float] = []
        self.squares: list[float] = []
        self.low, self.high = math.inf, -math.inf

    @property
    def _low(self) -> int:
        return int(np.iinfo(self.dtype).min) if self.exact else 0

    def add(self, values: np.ndarray) -> None:
        """Count the values of one tile, (n,) of the band's dtype."""
        if self.exact:
            index = values.astype(np.int32) - self._low if self._low else values
            counted = np.bincount(index)
            self.counts[: counted.size] += counted
        elif values.size:
            numbers = values.astype(np.float64)
            self.sums.append(float(numbers.sum()))
            self.squares.append(float(np.square(numbers).sum()))
            self.low, self.high = min(self.low, float(numbers.min())), max(self.high, float(numbers.max()))
            self.counts += np.bincount(_float_bin(values.astype(np.float32)), minlength=1 << 16)

    def merge(self, other: BandStatistics) -> None:
        self.counts += other.counts
        self.sums += other.sums
        self.squares += other.squares
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def summary(self) -> dict[str, Any]:
        """Mean, std, min, max and percentiles (nearest rank); None where there is no pixel."""
        count = int(self.counts.sum())
        if not count:
            return {"mean": None, "std": None, "min": None, "max": None, "percentiles": {}}
        values = np.arange(1 << 16) + self._low if self.exact else _bin_value(np.arange(1 << 16))
        if self.exact:
            total = sum(int(v) * int(n) for v, n in zip(values, self.counts, strict=True) if n)
            squares = sum(int(v) ** 2 * int(n) for v, n in zip(values, self.counts, strict=True) if n)
            mean, variance = total / count, max((squares * count - total**2) / count**2, 0.0)
        else:
            mean = math.fsum(self.sums) / count
            variance = max(math.fsum(self.squares) / count - mean**2, 0.0)
        seen = np.flatnonzero(self.counts)
        rank = np.cumsum(self.counts[seen])
        low, high = (float(values[seen[0]]), float(values[seen[-1]])) if self.exact else (self.low, self.high)
        found = (float(values[seen[np.searchsorted(rank, max(count * p / 100, 1))]]) for p in PERCENTILES)
        at = {str(p): min(max(value, low), high) for p, value in zip(PERCENTILES, found, strict=True)}
        return {"mean": mean, "std": math.sqrt(variance), "min": low, "max": high, "percentiles": at}


def steady(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """A summary that a few wild values cannot move: as it is, unless the mean lies outside of what 98 % of the values
    are; then with the median for it."""
    percentiles = found.get("percentiles") or {}
    if not {"1", "50", "99"} <= percentiles.keys() or percentiles["1"] <= found["mean"] <= percentiles["99"]:
        return found
    middle = {**found, "mean": percentiles["50"]}
    return middle | {"std": spread(middle)}


def spread(found: Mapping[str, Any]) -> float:
    """A band's deviation that a few wild values cannot blow up; 1 for a constant band.

    The larger half of the range from the 1st to the 99th percentile over 2.33 (a normal distribution's own ratio) where
    outliers have blown up the plain one.
    """
    std = float(found["std"])
    percentiles = found.get("percentiles") or {}
    if "1" in percentiles and "99" in percentiles:
        mean = float(found["mean"])
        half = max(float(percentiles["99"]) - mean, mean - float(percentiles["1"])) / 2.33
        if 0 < half < std:
            std = half
    return std if std > 0 else 1.0


def _float_bin(values: np.ndarray) -> np.ndarray:
    """Bin of a float32 in a 16-bit histogram whose bins are in the order of the numbers."""
    bits = values.view(np.uint32) >> np.uint32(16)
    return np.where(bits & 0x8000, 0xFFFF - bits, bits + 0x8000).astype(np.int64)


def _bin_value(bins: np.ndarray) -> np.ndarray:
    bits = np.where(bins >= 0x8000, bins - 0x8000, 0xFFFF - bins).astype(np.uint32)
    with np.errstate(invalid="ignore"):
        return np.nan_to_num((bits << np.uint32(16)).view(np.float32).astype(np.float64), posinf=0, neginf=0)
