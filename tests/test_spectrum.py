"""Bands that are called otherwise in another provider's files."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sattile.spectrum import BANDS, known, match, place

SEVEN = ("coastal", "blue", "green", "red", "nir", "swir1", "swir2")
SENTINEL = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")


@pytest.mark.parametrize(
    ("wanted", "own", "expected"),
    [
        (SEVEN, SENTINEL, ("B01", "B02", "B03", "B04", "B08", "B11", "B12")),
        (SEVEN, SENTINEL[::-1], ("B01", "B02", "B03", "B04", "B08", "B11", "B12")),
        (("nir",), ("B04", "B8A"), ("B8A",)),
        (("nir08", "nir"), SENTINEL, ("B8A", "B08")),
        (("B02", "B11"), ("red", "swir16", "Blue"), ("Blue", "swir16")),
        (("B8A",), ("B08",), None),  # the narrow near infrared is not the wide one
        (("blue", "B02"), ("B02", "B08"), None),  # one band is not two
        (("swir2", "quality"), ("quality", "SWIR22"), ("SWIR22", "quality")),
        # Numbers that may be Landsat's: B08 is panchromatic, B11 thermal, B05 the near infrared.
        (("blue", "nir"), tuple(f"B{number:02d}" for number in range(1, 12)), None),
        (("blue", "green"), ("B02", "B03", "B04", "B08"), None),
        # Names that a file without names gets.
        (("swir1", "swir2"), tuple(f"b{number}" for number in range(1, 14)), None),
        (("B4", "B5"), tuple(f"b{number}" for number in range(1, 14)), None),
        (("green", "swir1"), ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B10", "B11"), None),
        (("red",), ("B4",), None),
        (("b1",), ("b2", "b3"), None),
        ((), ("a",), ()),
    ],
)
def test_bands_called_otherwise(
    wanted: tuple[str, ...], own: tuple[str, ...], expected: tuple[str, ...] | None
) -> None:
    found = match(wanted, own)
    assert found == (None if expected is None else dict(zip(wanted, expected, strict=True)))


@given(st.lists(st.sampled_from([*SENTINEL, *SEVEN, "x"]), unique=True), st.data())
def test_a_name_that_is_there_is_that_band_and_no_band_is_taken_twice(own: list[str], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.sampled_from([*SENTINEL, *SEVEN, "x"]), unique=True))
    found = match(wanted, own)
    some = known(wanted, own)
    assert (len(some) == len(wanted)) == (found is not None)
    if found is not None:
        assert list(found) == wanted
        assert len({*found.values()}) == len(wanted)
        assert all(found[name] == name for name in wanted if name in own)
        assert {*found.values()} <= {*own}
    else:
        assert not {*wanted} <= {*own}


def test_names_mean_one_band_only() -> None:
    names = [name for _, names in BANDS.values() for name in names]
    assert len(names) == len({*names})
    assert place("nir", ["red", "B8A"]) == 1
    assert place("nir08", ["nir", "red"]) is None
