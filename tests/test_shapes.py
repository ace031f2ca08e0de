"""Shapes drawn on grids: which pixels they hold, and which blocks they touch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st

from sattile import geography, shapes
from sattile.errors import Refused
from sattile.grid import Window, blocks
from sattile.schema import IGNORE
from sattile.warp import HALF_AROUND

UTM = Affine(10, 0, 500_000, 0, -10, 5_000_000)


@dataclass(frozen=True)
class Grid:
    height: int
    width: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float]


GRID = Grid(40, 60, "EPSG:32618", tuple(UTM)[:6])
WHOLE = Window(0, 0, 40, 60)


@st.composite
def windows(draw) -> Window:
    row, col = draw(st.integers(-20, 39)), draw(st.integers(-20, 59))
    return Window(row, col, draw(st.integers(1, 60)), draw(st.integers(1, 90)))


@given(window=windows(), seed=st.integers(0, 5))
def test_shapes_cover_the_pixels_whose_centre_they_hold(window, seed):
    rng = np.random.default_rng(seed)
    discs = [shapely.Point(*rng.uniform(0, 60, 2)).buffer(rng.uniform(2, 15), 4) for _ in range(3)]
    placed = [(shapely.to_wkb(shapely.transform(one, lambda at: at * [10, -10] + [UTM.c, UTM.f])), value)
              for value, one in enumerate(discs, 1)]  # fmt: skip
    labels = shapes.rasterize(placed, "EPSG:32618", GRID, window)
    inside = window & WHOLE
    expected = np.full(window.shape, IGNORE)
    cols, rows = np.meshgrid(np.arange(window.col, window.stop_col) + 0.5, np.arange(window.row, window.stop_row) + 0.5)
    for value, one in enumerate(discs, 1):
        expected[shapely.contains_xy(one, cols, rows)] = value
    outside = np.ones(window.shape, bool)
    outside[inside.slices(window)] = False
    expected[outside] = IGNORE
    assert np.array_equal(labels, expected)


def test_shapes_of_another_crs_and_areas_of_interest():
    grid = replace(GRID, transform=tuple(UTM @ Affine.rotation(20))[:6])
    aoi = shapely.from_wkb(geography.footprint(grid.crs, grid.transform, grid.height, grid.width))
    assert shapes.aoi_mask(shapely.to_wkb(aoi.buffer(0.001)), "EPSG:4326", grid, Window(5, 5, 9, 9)).all()
    assert not shapes.aoi_mask(shapely.to_wkb(shapely.box(0, 0, 1, 1)), "EPSG:4326", grid, WHOLE).any()
    to_lonlat = pyproj.Transformer.from_crs(32618, 4326, always_xy=True)
    spot = shapely.Point(to_lonlat.transform(*(Affine(*grid.transform) * (30.5, 10.5)))).buffer(0.00006)
    mask = shapes.aoi_mask(shapely.to_wkb(spot), "EPSG:4326", grid, WHOLE)
    assert np.argwhere(mask).tolist() == [[10, 30]]
    with pytest.raises(Refused, match="no CRS"):
        shapes.aoi_mask(shapely.to_wkb(spot), "EPSG:4326", replace(grid, crs=None), WHOLE)


@given(seed=st.integers(0, 1000), turn=st.sampled_from([0, 20]), crs=st.sampled_from(["EPSG:4326", "EPSG:32617"]))
def test_an_area_touches_each_block_that_it_has_pixels_of(seed, turn, crs):
    rng = np.random.default_rng(seed)
    grid = replace(GRID, transform=tuple(UTM @ Affine.rotation(turn))[:6])
    area = shapely.Point(*rng.uniform(-5, 60, 2)).buffer(rng.uniform(1, 20), 3)
    to_crs = pyproj.Transformer.from_crs(grid.crs, crs, always_xy=True)
    on_ground = shapely.transform(area, lambda at: np.column_stack(geography.apply(grid.transform, at[:, 0], at[:, 1])))
    aoi = shapely.transform(on_ground, lambda at: np.column_stack(to_crs.transform(at[:, 0], at[:, 1])))
    found = blocks(grid.height, grid.width, 13)
    touched = shapes.AoiTest((shapely.to_wkb(aoi), crs))(grid, found)
    has_pixels = [bool(shapes.aoi_mask(shapely.to_wkb(aoi), crs, grid, one).any()) for one in found]
    assert not [one for one, is_touched, has in zip(found, touched, has_pixels, strict=True) if has and not is_touched]
    far = [shapely.distance(area, shapely.box(one.col, one.row, one.stop_col, one.stop_row)) > 3 for one in found]
    assert not [one for one, is_touched, is_far in zip(found, touched, far, strict=True) if is_far and is_touched]


@pytest.mark.parametrize("crs", ["EPSG:32601", "EPSG:32633", "EPSG:32760", "EPSG:3413", "EPSG:2193", "EPSG:3857"])
@pytest.mark.parametrize(("aoi", "box"), [("EPSG:4326", (-180, -85, 180, 85)), ("EPSG:3857", (-2e7, -2e7, 2e7, 2e7))])
def test_an_area_as_large_as_the_world_holds_every_scene(crs, aoi, box):
    """Far away, projections fold what they can't show."""
    corners = {"EPSG:3413": (0, -2_000_000), "EPSG:2193": (1_600_000, 5_400_000), "EPSG:3857": (19_991_000, -1_900_000)}
    west, north = corners.get(crs, (200_000, 6_700_000))
    grid = Grid(700, 900, crs, (10, 0, west, 0, -10, north))
    area = shapely.to_wkb(shapely.box(*box))
    found = blocks(700, 900, 300)
    assert shapes.AoiTest((area, aoi))(grid, found) == [True] * len(found)
    assert shapes.aoi_mask(area, aoi, grid, Window(0, 0, 700, 900)).all()


def test_an_area_whose_crs_does_not_reach_a_scene_does_not_touch_it():
    area = shapely.to_wkb(shapely.box(300_000, 5_000_000, 700_000, 5_500_000))
    for crs in ("EPSG:32603", "EPSG:32718", "EPSG:32753"):
        grid = Grid(70, 90, crs, (10, 0, 480_000, 0, -10, 5_200_000))
        assert shapes.AoiTest((area, "EPSG:32633"))(grid, [Window(0, 0, 70, 90)]) == [False]
        assert not shapes.aoi_mask(area, "EPSG:32633", grid, Window(0, 0, 70, 90)).any()


def test_an_area_across_the_antimeridian_holds_pixels_on_both_sides():
    grid = Grid(60, 400, "EPSG:32601", (1000, 0, 100_000, 0, -1000, 6_700_000))
    both = shapely.MultiPolygon([shapely.box(178, 59, 180, 61), shapely.box(-180, 59, -179, 61)])
    mask = shapes.aoi_mask(shapely.to_wkb(both), "EPSG:4326", grid, Window(0, 0, 60, 400))
    to_lonlat = pyproj.Transformer.from_crs(grid.crs, 4326, always_xy=True)
    cols, rows = np.meshgrid(np.arange(400) + 0.5, np.arange(60) + 0.5)
    lons, lats = to_lonlat.transform(*geography.apply(grid.transform, cols, rows))
    expected = ((lons > 178) | (lons < -179)) & (lats > 59) & (lats < 61)
    assert (expected & (lons > 0)).any()
    assert (expected & (lons < 0)).any()
    assert (mask != expected).mean() < 0.002  # a side of the box is a curve here, drawn in 64 parts


@pytest.mark.parametrize("gap", [0, 9_000, 30_000])
@pytest.mark.parametrize("turned", [0, 360])
def test_an_area_on_both_sides_of_the_antimeridian_is_not_turned_inside_out(gap, turned):
    """Web Mercator is torn there itself."""
    grid = Grid(200, 220, "EPSG:3857", (1000, 0, HALF_AROUND - gap - 220_000, 0, -1000, -1_800_000))
    whole = Window(0, 0, 200, 220)
    fiji = shapely.MultiPolygon([shapely.box(175, -25, 180, -10), shapely.box(-180, -25, -175, -10)])
    beyond = shapely.box(-180 + turned, -25, -175 + turned, -10)
    for area, expected in ((fiji, 1.0), (shapely.box(175, -25, 185, -10), 1.0), (beyond, 0.0)):
        assert shapes.aoi_mask(shapely.to_wkb(area), "EPSG:4326", grid, whole).mean() == expected
