"""Spectral indices as inputs beside the bands: normalised differences (a - b) / (a + b), made inside the network.

A normalised difference does not change when all bands are brighter by one factor, as they are in another atmosphere,
season or product: what a network learns from it carries over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sattile.errors import UsageError, nearest
from sattile.spectrum import place

INDICES = {
    "ndvi": ("nir", "red"),  # vegetation: Rouse et al. 1974
    "ndwi": ("green", "nir"),  # water: McFeeters 1996
    "mndwi": ("green", "swir1"),  # water: Xu 2006; the same difference as NDSI, snow: Hall et al. 1995
    "ndmi": ("nir", "swir1"),  # moisture: Gao 1996
    "nbr": ("nir", "swir2"),  # burnt: Key and Benson 1999
    "ndbi": ("swir1", "nir"),  # built-up: Zha et al. 2003
}
"""The two bands of an index, by their common names: see `spectrum`."""

AUTO = ("ndwi", "mndwi", "ndvi")

GAIN = 2.0
"""Brings a difference, which lies in -1 to 1, to about the spread of normalised bands."""


@dataclass(frozen=True)
class Pair:
    """A normalised difference of two bands: its name, and their places among the network's."""

    name: str
    one: int
    other: int


def choose(text: str, bands: Sequence[str]) -> tuple[str, ...]:
    """The indices that an option asks for: `none`, `auto` (those of `AUTO` whose bands are known), or names.

    Raises:
        UsageError: for an index that is not known, or whose bands are not there.
    """
    if text in ("none", ""):
        return ()
    if text == "auto":
        return tuple(name for name in AUTO if all(place(role, bands) is not None for role in INDICES[name]))
    pairs = parse(tuple(part.strip() for part in text.split(",") if part.strip()), bands)
    for pair in pairs:
        if pair.one == pair.other or sum((pair.one, pair.other) == (one.one, one.other) for one in pairs) > 1:
            raise UsageError(f"indices {text!r}: {pair.name} is of one band, or stands there twice")
    return tuple(pair.name for pair in pairs)


def parse(names: Sequence[str], bands: Sequence[str]) -> list[Pair]:
    """The pairs of bands behind names: of `INDICES`, or `a~b` for two bands by their own names.

    Raises:
        UsageError: for an index that is not known, or whose bands are not there.
    """
    return [_pair(name, bands) for name in names]


def _pair(name: str, bands: Sequence[str]) -> Pair:
    if "~" in name:
        ends = [part.strip() for part in name.split("~")]
        unknown = [end for end in ends if end not in bands]
        if len(ends) != 2 or unknown:
            raise UsageError(f"index {name!r}: write two of the bands {', '.join(bands)}, as {'~'.join(bands[:2])}")
        return Pair(name, bands.index(ends[0]), bands.index(ends[1]))
    if name not in INDICES:
        raise UsageError(f"index {name!r}: use {', '.join(INDICES)}, or two bands, as a~b{nearest(name, INDICES)}")
    places = [place(role, bands) for role in INDICES[name]]
    if places[0] is None or places[1] is None:
        wanted = " and ".join(INDICES[name])
        raise UsageError(
            f"index {name} is of {wanted}, and the bands are {', '.join(bands)}: name them so at `sattile tile "
            f"--bands`, or write the two bands as a~b"
        )
    return Pair(name, places[0], places[1])


def layers(values: Any, pairs: Sequence[Pair], statistics: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """The indices of stored values, each (N, H, W, 1) float32 in -`GAIN` to `GAIN`.

    Negative values count as 0. A fiftieth of the bands' means is added to the sum: over dark ground, where both are
    noise, a difference goes to 0 and not to any value at all.
    """
    import keras

    means = [max(float(one["mean"]), 0.0) for one in statistics.values()]
    made = []
    for pair in pairs:
        one, other = (keras.ops.maximum(values[..., at : at + 1], 0.0) for at in (pair.one, pair.other))
        floor = 0.02 * (means[pair.one] + means[pair.other]) or 1e-6
        made.append(GAIN * (one - other) / (one + other + floor))
    return made
