"""Law 7: no ground pixel of a test or validation tile lies in a training tile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sattile import split
from sattile.errors import UsageError
from sattile.split import SplitRule


def outline(west: float, south: float, width: float, height: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array([west, west + width, west + width, west]), np.array([south, south, south + height, south + height])


def pad(ring: tuple[np.ndarray, np.ndarray], by: float) -> tuple[np.ndarray, np.ndarray]:
    lon, lat = ring
    return outline(lon.min() - by, lat.min() - by, np.ptp(lon) + 2 * by, np.ptp(lat) + 2 * by)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 10_000),
    st.floats(-179, 170),
    st.floats(-70, 70),
    st.floats(0, 0.05),
    st.lists(st.tuples(st.floats(0, 0.4), st.floats(0, 0.4)), min_size=2, max_size=12),
)
def test_tiles_of_different_splits_share_no_ground(seed, west, south, buffer, offsets):
    rule = SplitRule("block", (0.5, 0.25, 0.25), seed, 9_000.0, 1)
    tiles = [outline(west + dx, south + dy, 0.05, 0.03) for dx, dy in offsets]
    dealt = [(tile, split.split_of_tile(rule, tile, pad(tile, buffer))) for tile in tiles]
    for one, first in dealt:
        for other, second in dealt:
            if first == "train" and second in ("val", "test"):
                gap_x = max(other[0].min() - one[0].max(), one[0].min() - other[0].max())
                gap_y = max(other[1].min() - one[1].max(), one[1].min() - other[1].max())
                assert max(gap_x, gap_y) >= buffer - 1e-6


@given(st.floats(-60, 60), st.integers(0, 99))
def test_a_tile_across_the_antimeridian_sees_the_cells_of_both_sides(south, seed):
    across = outline(179.98, south, 0.04, 0.03)
    wrapped = np.where(across[0] > 180, across[0] - 360, across[0]), across[1]
    east, west = outline(179.98, south, 0.02, 0.03), outline(-180, south, 0.02, 0.03)
    seen = split.cells(*wrapped, 9_000.0)
    assert set(seen) == set(split.cells(*east, 9_000.0)) | set(split.cells(*west, 9_000.0))


def test_the_deal_does_not_change_when_the_archive_grows():
    rule = SplitRule("block", (0.7, 0.15, 0.15), 3, 5_000.0, 0)
    keys = [f"{i}_{i * 7 % 13}" for i in range(4000)]
    shares = [sum(rule.of(key) == name for key in keys) / len(keys) for name in split.SPLITS]
    assert shares == pytest.approx([0.7, 0.15, 0.15], abs=0.03)
    # Written down: a new version of sattile must deal as the old one did.
    assert " ".join(rule.of(key) for key in keys[:8]) == "test train train train test train train train"


@given(st.integers(0, 500), st.integers(3, 9))
def test_no_wanted_split_stays_empty_where_there_is_enough_ground(seed, count):
    rule = SplitRule("block", (0.8, 0.1, 0.1), seed, 5_000.0, 0)
    sizes = {f"{i}_0": 1.0 for i in range(count)}
    filled = split.fill_empty(rule, sizes)
    assert {filled.of(key) for key in sizes} == {"train", "val", "test"}


@pytest.mark.parametrize("seed", range(20))
def test_all_of_a_single_place_is_for_training(seed):
    filled = split.fill_empty(SplitRule("scene", (0.4, 0.3, 0.3), seed, 0, 0), {"only": 1.0})
    assert filled.of("only") == "train"


def test_unwanted_splits_stay_empty():
    filled = split.fill_empty(SplitRule("block", (1.0, 0.0, 0.0), 0, 1.0, 0), {"0_0": 1.0, "1_0": 1.0})
    assert {filled.of(key) for key in ("0_0", "1_0")} == {"train"}


@pytest.mark.parametrize("text", ["0.7,0.3", "0.7,0.2,0.2", "a,b,c", "1.2,-0.1,-0.1"])
def test_fractions_that_do_not_sum_to_one_are_refused(text):
    with pytest.raises(UsageError, match="sum to 1"):
        split.parse_fractions(text)


def test_an_outline_around_a_pole_holds_all_beyond_it():
    lon = np.linspace(-180, 170, 36)
    ring = set(split.cells(lon, np.full(36, -70.0), 50_000.0))
    assert set(split.cells(*outline(20, -85, 5, 2), 50_000.0)) <= ring


def test_an_outline_wider_than_half_the_earth_holds_all_of_it():
    lon = np.array([-120, -60, 0, 60, 120, 120, 60, 0, -60, -120.0])
    wide = set(split.cells(lon, np.repeat([0, 10.0], 5), 500_000.0))
    for west in range(-118, 115, 20):
        assert set(split.cells(*outline(west, 3, 2, 2), 500_000.0)) <= wide


@given(st.floats(-179, 170), st.floats(-60, 50), st.floats(0.1, 9), st.floats(0.1, 9))
def test_shares_of_cells_sum_to_the_area(west, south, width, height):
    x, y = split.ground(np.array([west, west + width]), np.array([south, south + height]))
    cell = 50_000.0
    shares = split.cell_shares((west, south, west + width, south + height), cell)
    # Cells are stretched to fit around the Earth a whole number of times: by 0.1 % at most here.
    assert sum(shares.values()) * cell**2 == pytest.approx(np.ptp(x) * np.ptp(y), rel=2e-3)
    assert max(shares.values()) <= 1 + 1e-9
    assert {key for key, share in shares.items() if share > 1e-6} <= set(
        split.cells(*outline(west, south, width, height), cell)
    )


@pytest.mark.parametrize("text", ["nan,0,0", "inf,0,0", "1,nan,0"])
def test_fractions_are_numbers(text):
    with pytest.raises(UsageError, match="sum to 1"):
        split.parse_fractions(text)
