"""Whether scenes hold such values as a network was trained on: numpy only.

A network says something of any numbers. What it says of reflectance that is stored in another scale, or with an
offset, looks like a map and is none. So some of each scene's pixels are compared with the training tiles'.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = ("1", "25", "99")
"""Of the training tiles, that scenes are compared with."""

STEP = 16
"""Every so many rows and columns a pixel is looked at."""

ENOUGH = 400
"""Looked-at pixels (256 times as many in the scene) below which nothing is said: a pond is no wrong scale."""

STRANGE = 0.5
"""Share of a band outside of what 98 % of the training pixels lie in, above which a scene is unlike them."""

ROUGH = 0.01
"""How far off percentiles of floats may be, relatively."""

DARK = 0.01
"""Share in the training pixels' lower quarter. With less than this in every band something was added to them all."""


@dataclass(frozen=True)
class Known:
    """What the training tiles held, per band: percentiles 1, 25 and 99, in the numbers that the network takes."""

    bands: tuple[str, ...]
    low: tuple[float, ...]
    quarter: tuple[float, ...]
    high: tuple[float, ...]

    @classmethod
    def of(cls, bands: Sequence[str], statistics: Mapping[str, Any]) -> Known | None:
        """From `statistics` of a `dataset.json` or bundle; None where it does not tell."""
        found = [(statistics.get(name) or {}).get("percentiles") or {} for name in bands]
        if not all(one.keys() >= set(PERCENTILES) for one in found):
            return None
        low, quarter, high = (tuple(one[at] for one in found) for at in PERCENTILES)
        return cls(tuple(bands), low, quarter, high)


def look(data: np.ndarray, wanted: np.ndarray, known: Known, rescale: tuple[float, float] = (1.0, 0.0)) -> np.ndarray:
    """Count a sample of pixels.

    Args:
        data: (height, width, bands).
        wanted: (height, width) bool: pixels with data.
        rescale: factor and offset that bring them to the numbers that the network takes.

    Returns:
        (bands, 4) int64: pixels looked at; of these, below `low`, no brighter than `quarter`, above `high`. Percentiles
        of floats are a per cent off at most (`statistics`), so that much is let pass.
    """
    values = data[::STEP, ::STEP][wanted[::STEP, ::STEP]] * rescale[0] + rescale[1]
    low, quarter, high = (np.asarray(one, np.float64) for one in (known.low, known.quarter, known.high))
    looked = np.full(len(known.bands), len(values), np.int64)
    counted = (
        values < low - ROUGH * np.abs(low),
        values <= quarter + ROUGH * np.abs(quarter),
        values > high + ROUGH * np.abs(high),
    )
    return np.stack([looked, *(np.count_nonzero(one, 0) for one in counted)], 1)


def judge(counts: np.ndarray, known: Known) -> str | None:
    """Why a scene is unlike the training tiles, in words; None if it is not, or too small to tell.

    Args:
        counts: (bands, 4), of `look`, added up over the scene.
    """
    looked = counts[:, 0]
    if looked.min() < ENOUGH:
        return None
    outside = (counts[:, 1] + counts[:, 3]) / looked
    worst, many = int(outside.argmax()), int(np.count_nonzero(outside > STRANGE))
    if 2 * many <= len(looked) and (counts[:, 2] < DARK * looked).all():
        return (
            "it is brighter than the training tiles in every band (a quarter of their pixels did not exceed "
            f"{', '.join(f'{one:.6g}' for one in known.quarter)}, hardly one of it does not); was an offset not taken "
            "off? --rescale 1,OFFSET does it (1,-1000 where Sentinel-2's reflectance is stored x 10,000 + 1,000, as "
            "since 2022); or is it all cloud?"
        )
    if not many:
        return None
    where = "below" if counts[worst, 1] > counts[worst, 3] else "above"
    return (
        f"{outside[worst]:.0%} of its pixels hold values of {known.bands[worst]} that the training tiles hardly had, "
        f"most {where} their {known.low[worst]:.6g} to {known.high[worst]:.6g}"
        + (f" (as in {many} of {len(looked)} bands)" if many > 1 else "")
        + "; has it their scale and offset (--rescale FACTOR,OFFSET brings others to them), and their correction (top "
        "of the atmosphere, or surface)?"
    )


class Sights:
    """Counts of several scenes, on their way from the tasks to the driver."""

    def __init__(self, text: str | None = None):
        self.counts: dict[str, np.ndarray] = {}
        self.merge(text)

    def add(self, scene_id: str, counts: np.ndarray | None) -> None:
        if counts is not None:
            self.counts[scene_id] = self.counts[scene_id] + counts if scene_id in self.counts else counts

    def merge(self, text: str | None) -> None:
        """Add what `to_json` of another said."""
        for scene_id, counts in json.loads(text or "{}").items():
            self.add(scene_id, np.asarray(counts, np.int64).reshape(-1, 4))

    def to_json(self) -> str | None:
        """None for nothing."""
        return json.dumps({name: one.tolist() for name, one in self.counts.items()}) if self.counts else None

    def unlike(self, known: Known) -> Iterable[tuple[str, str]]:
        """(scene id, why) of the scenes unlike the training tiles, by id."""
        for scene_id, counts in sorted(self.counts.items()):
            why = judge(counts, known)
            if why is not None:
                yield scene_id, why
