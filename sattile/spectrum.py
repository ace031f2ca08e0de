"""What bands are, by their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

BANDS = {
    "coastal": (0.443, ("coastal", "b01")),
    "blue": (0.49, ("blue", "b02")),
    "green": (0.56, ("green", "b03")),
    "red": (0.665, ("red", "b04")),
    "nir": (0.842, ("nir", "b08")),
    "nir08": (0.865, ("nir08", "b8a", "b08a")),
    "swir1": (1.61, ("swir1", "swir16", "b11")),
    "swir2": (2.19, ("swir2", "swir22", "b12")),
}
"""By common name: the wavelength in micrometres, and how it is written: plainly, as in STAC's eo extension, as
Sentinel-2's files have it."""

SENTINEL = re.compile(r"b(0?[1-9]|0?8a|1[0-2])")

TELLING = {"b08", "b8a", "b08a", "b12"}
"""Names by which a file is seen to number its bands as Sentinel-2 does: Landsat's B05 is another band, and its B11 is
thermal."""


def place(name: str, bands: Sequence[str]) -> int | None:
    """Where the band of a common name is among some bands."""
    names = _names(name)
    return next((at for at, band in enumerate(bands) if band.lower() in names), None)


def match(wanted: Sequence[str], own: Iterable[str]) -> dict[str, str] | None:
    """Which of a file's own bands are the wanted ones: {wanted: own}; None if one is missing.

    A band of the very name goes first. Else one that is called otherwise: `blue` is `B02` in a file of Sentinel-2.
    """
    own = list(own)
    found = {name: name for name in wanted if name in own}
    numbered = bool(TELLING & {one.lower() for one in own})
    for name in wanted:
        if name in found:
            continue
        taken = set(found.values())
        names = _names(name.lower())
        fits = [
            (names.index(one.lower()), one)
            for one in own
            if one not in taken and one.lower() in names and (numbered or not SENTINEL.fullmatch(one.lower()))
        ]
        if not fits:
            return None
        found[name] = min(fits)[1]
    return {name: found[name] for name in wanted}


def _names(name: str) -> tuple[str, ...]:
    """How a band may be called, the best first. The near infrared is the wide one, or else the narrow one."""
    known = next((names for _, names in BANDS.values() if name in names), (name,))
    return (*known, *BANDS["nir08"][1]) if name == "nir" else known


def haze(bands: Sequence[str], mean: np.ndarray) -> np.ndarray:
    """What a clear sky may add to each band, (bands,) float32, in the bands' own numbers.

    Air scatters light with the fourth power of 1 / wavelength (Rayleigh). Between the top of the atmosphere and the
    ground the blue end of a scene doubles, about; so the band of the shortest wavelength gets its own mean, the others
    accordingly less, and bands whose name is not known nothing.

    Args:
        mean: of the bands, (bands,).
    """
    known = {at: length for name, (length, _) in BANDS.items() if (at := place(name, bands)) is not None}
    added = np.zeros(len(bands), np.float32)
    if known:
        first = min(known, key=lambda at: known[at])
        for at, length in known.items():
            added[at] = max(float(mean[first]), 0.0) * (known[first] / length) ** 4
    return added
