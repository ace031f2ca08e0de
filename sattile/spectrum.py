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

NUMBER = re.compile(r"b\d+a?")
"""A band's number. It says nothing by itself: b4 may be the fourth of a file without names."""

TELLING = {"b8a", "b08a", "b12"}
"""Names by which a file that writes B01 and not B1 is seen to number its bands as Sentinel-2 does. Landsat has none of
them: its B05 is the near infrared, its B08 panchromatic, its B11 thermal."""


def place(name: str, bands: Sequence[str]) -> int | None:
    """Where the band of a common name is among some bands, which bear Sentinel-2's numbers if any; B11, which is
    thermal where Landsat's scenes are numbered alike, only beside a band that Landsat has not, or calls otherwise."""
    own = [band.lower() for band in bands]
    unsure = () if {*TELLING, "b08"} & {*own} else ("b11",)
    names = [one for one in _names(name) if one not in unsure]
    return next((at for at, band in enumerate(own) if band in names), None)


def match(wanted: Sequence[str], own: Iterable[str]) -> dict[str, str] | None:
    """Which of a file's own bands are the wanted ones: {wanted: own}; None if one is missing."""
    found = known(wanted, own)
    return {name: found[name] for name in wanted} if len(found) == len({*wanted}) else None


def known(wanted: Sequence[str], own: Iterable[str]) -> dict[str, str]:
    """Which of the wanted bands are among a file's own: {wanted: own}.

    A band of the very name goes first. Else one that is called otherwise: `blue` is `B02` in a file of Sentinel-2.
    """
    own = list(own)
    found = {name: name for name in wanted if name in own}
    numbered = _are_padded(own) and _are_sentinel(own)
    for name in wanted:
        if name in found:
            continue
        taken = set(found.values())
        names = _names(name.lower())
        fits = [
            (names.index(one.lower()), one)
            for one in own
            if one not in taken and one.lower() in names and (numbered or not NUMBER.fullmatch(one.lower()))
        ]
        if fits:
            found[name] = min(fits)[1]
    return found


def missing(wanted: Sequence[str], own: Iterable[str]) -> list[str]:
    """Those of the wanted bands that a file has not."""
    found = known(wanted, own)
    return [name for name in wanted if name not in found]


def why(missing: Iterable[str], own: Iterable[str]) -> str:
    """What to add to a refusal where bands are numbered, nobody knows how, and one is missed by another name."""
    own = list(own)
    if not _are_padded(own) or _are_sentinel(own) or all(NUMBER.fullmatch(one.lower()) for one in missing):
        return ""
    return " (numbers are read as Sentinel-2's only beside B8A or B12, since Landsat's mean other bands)"


def _are_padded(own: Iterable[str]) -> bool:
    """Whether bands are numbered as B01: a file without names has b1."""
    return any(NUMBER.fullmatch(one.lower()) and one[1] == "0" for one in own)


def _are_sentinel(own: Iterable[str]) -> bool:
    return bool(TELLING & {one.lower() for one in own})


def _names(name: str) -> tuple[str, ...]:
    """How a band may be called, the best first. The near infrared is the wide one, or else the narrow one."""
    names = next((names for _, names in BANDS.values() if name in names), (name,))
    return (*names, *BANDS["nir08"][1]) if name == "nir" else names


def haze(bands: Sequence[str], mean: np.ndarray) -> np.ndarray:
    """What a clear sky may add to each band, (bands,) float32, in the bands' own numbers.

    Air scatters light with the fourth power of 1 / wavelength (Rayleigh). Between the top of the atmosphere and the
    ground the blue end of a scene doubles, about; so the band of the shortest wavelength gets its own mean, the others
    accordingly less, and bands whose name is not known nothing.

    Args:
        mean: of the bands, (bands,).
    """
    lengths = {at: length for name, (length, _) in BANDS.items() if (at := place(name, bands)) is not None}
    added = np.zeros(len(bands), np.float32)
    if lengths:
        first = min(lengths, key=lambda at: lengths[at])
        for at, length in lengths.items():
            added[at] = max(float(mean[first]), 0.0) * (lengths[first] / length) ** 4
    return added
