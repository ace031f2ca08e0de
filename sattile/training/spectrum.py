"""What bands are, by their names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BANDS = {
    "coastal": (0.443, ("coastal", "b01")),
    "blue": (0.49, ("blue", "b02")),
    "green": (0.56, ("green", "b03")),
    "red": (0.665, ("red", "b04")),
    "nir": (0.842, ("nir", "nir08", "b08", "b8a", "b08a")),
    "swir1": (1.61, ("swir1", "swir16", "b11")),
    "swir2": (2.19, ("swir2", "swir22", "b12")),
}
"""By common name: the wavelength in micrometres, and how it is written: plainly, as in STAC's eo extension, as
Sentinel-2's file names have it. Landsat's B3 to B7 are other bands on each of its sensors."""


def place(name: str, bands: Sequence[str]) -> int | None:
    """Where the band of a common name is among some bands."""
    return next((at for at, band in enumerate(bands) if band.lower() in BANDS[name][1]), None)


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
