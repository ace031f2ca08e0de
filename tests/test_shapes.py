"""Shapes drawn on grids: which pixels they hold, and which blocks they touch."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace

import numpy as np
import pyproj
import pytest
import rasterio.features
import shapely
from affine import Affine
from hypothesis import given
from hypothesis import strategies as st
from rasterio.errors import NotGeoreferencedWarning

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


def cut(height: int, width: int, rows: int, cols: int) -> list[Window]:
    """Windows of rows x cols over a scene of height x width, cut off at its edges."""
    every = [Window(row, col, rows, cols) for row in range(0, height, rows) for col in range(0, width, cols)]
    return [one & Window(0, 0, height, width) for one in every]


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


def star(rng: np.random.Generator, reach: float) -> shapely.Polygon:
    """Thorns of all lengths around a point, (col, row); some with a hole."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    away = reach * rng.uniform(0.05, 1, 9)
    at = rng.uniform(0, [60, 40])
    whole = shapely.Polygon(at + np.column_stack([away * np.cos(angles), away * np.sin(angles)])).buffer(0)
    return whole.difference(shapely.Point(at).buffer(reach / 9))


def drawing(seed: int) -> list[shapely.Geometry]:
    """Large and tiny shapes over each other, in (col, row); some with sides that lie on centres of pixels."""
    rng = np.random.default_rng(seed)
    found = [star(rng, reach) for reach in (90, 0.4, 20, 1.5, 0.7, 5)]
    left, top = rng.integers(0, [100, 60]) / 2
    return [*found[:3], shapely.box(left, top, left + 7.5, top + 4), shapely.box(left + 7.5, top, left + 9, top + 4.5),
            *found[3:]]  # fmt: skip


def on_ground(shape: shapely.Geometry, grid: Grid, crs: str | None) -> shapely.Geometry:
    ground = shapely.transform(shape, lambda at: np.column_stack(geography.apply(grid.transform, at[:, 0], at[:, 1])))
    if crs == grid.crs:
        return ground
    way = pyproj.Transformer.from_crs(grid.crs, crs, always_xy=True)
    return shapely.transform(ground, lambda at: np.column_stack(way.transform(at[:, 0], at[:, 1])))


@given(seed=st.integers(0, 10_000))
def test_a_drawing_is_gdals(seed):
    """Also where centres of pixels lie on a side."""
    found = list(enumerate(drawing(seed), 1))
    exact = [(shapely.transform(one, lambda at: np.round(at * 65536) / 65536), value) for value, one in found]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        expected = rasterio.features.rasterize(exact, out_shape=(40, 60), fill=IGNORE, dtype=np.uint8)
    placed = [(shapely.to_wkb(one), value) for value, one in found]
    grid = replace(GRID, crs=None, transform=(1, 0, 0, 0, 1, 0))
    assert np.array_equal(shapes.rasterize(placed, None, grid, WHOLE), expected)


@given(
    seed=st.integers(0, 10_000),
    crs=st.sampled_from(["EPSG:32618", "EPSG:4326", "EPSG:3857", "EPSG:32617", "EPSG:2163"]),
    metres=st.sampled_from([1, 30, 900]),
    height=st.integers(3, 17),
    width=st.integers(5, 43),
)
def test_whatever_the_windows_they_are_parts_of_the_scene_drawn_at_once(seed, crs, metres, height, width):
    turned = Affine(metres, 0, 500_000, 0, -metres, 5_000_000) @ Affine.rotation(seed % 40)
    grid = replace(GRID, transform=tuple(turned)[:6])
    placed = [(shapely.to_wkb(on_ground(one, grid, crs)), value) for value, one in enumerate(drawing(seed))]
    whole = shapes.rasterize(placed, crs, grid, WHOLE)
    packed = shapes.pack(placed)
    for window in cut(40, 60, height, width):
        assert np.array_equal(shapes.rasterize(packed, crs, grid, window), whole[window.slices(WHOLE)])


@pytest.mark.parametrize("height", [600, 37])
def test_windows_of_a_scene_of_several_bands_agree_from_above_and_from_below(height):
    grid = replace(GRID, height=700, width=90)
    rng = np.random.default_rng(3)
    ends = np.column_stack([rng.uniform(-20, 110, 300), np.linspace(-50, 750, 300)])
    coast = shapely.Polygon([*ends.tolist(), [-50, 750], [-50, -50]])
    placed = [(shapely.to_wkb(on_ground(coast, grid, grid.crs)), 4)]
    cols, rows = np.meshgrid(np.arange(90) + 0.5, np.arange(700) + 0.5)
    expected = np.where(shapely.contains_xy(coast, cols, rows), 4, IGNORE)
    for window in reversed(cut(700, 90, height, 33)):
        drawn = shapes.rasterize(placed, grid.crs, grid, window)
        assert np.array_equal(drawn, expected[window.slices(Window(0, 0, 700, 90))])


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:3857", "EPSG:32615"])
@pytest.mark.parametrize("metres", [100, 1000])
def test_a_long_side_is_the_curve_that_it_is_on_the_grid(crs, metres):
    """Pixels are in the shape whose centres are in it in its own CRS; but for those on the side, to 1/512 pixel."""
    grid = Grid(400, 600, "EPSG:32618", (metres, 0, 500_000, 0, -metres, 5_000_000))
    corners = shapely.Polygon([(-3000, 31), (570, -500), (590, 390), (20, 2500)])
    there = shapely.Polygon(shapely.get_coordinates(on_ground(corners, grid, crs)))
    way = pyproj.Transformer.from_crs(grid.crs, crs, always_xy=True)
    cols, rows = np.meshgrid(np.arange(600) + 0.5, np.arange(400) + 0.5)
    xs, ys = way.transform(*geography.apply(grid.transform, cols, rows))
    drawn = shapes.aoi_mask(shapely.to_wkb(there), crs, grid, Window(0, 0, 400, 600))
    differ = np.argwhere(drawn != shapely.contains_xy(there, xs, ys))
    for row, col in differ:
        around = np.linspace(0, 2 * np.pi, 32)
        x, y = way.transform(*geography.apply(grid.transform, col + 0.5 + np.cos(around) / 512,
                                              row + 0.5 + np.sin(around) / 512))  # fmt: skip
        assert len(set(shapely.contains_xy(there, x, y).tolist())) == 2
    assert len(differ) < 10
    assert drawn.any()
    assert not drawn.all()


def test_a_shape_may_need_one_more_point():
    """pyproj takes an array of one point for a scalar, and warns."""
    grid = replace(GRID, transform=(3000, 0, 500_000, 0, -3000, 5_000_000))
    spike = shapely.Polygon([(33, 10), (43, 10), (38.2, 13)])
    drawn = shapes.aoi_mask(shapely.to_wkb(on_ground(spike, grid, "EPSG:4326")), "EPSG:4326", grid, WHOLE)
    assert drawn.sum(axis=1)[9:14].tolist() == [0, 8, 5, 2, 0]


def test_lines_and_points_hold_no_pixel():
    square = shapely.MultiPolygon([shapely.box(5, 7, 9, 9)])
    mixed = shapely.GeometryCollection([shapely.LineString([(0, 0), (60, 40)]), shapely.Point(3.5, 3.5), square])
    grid = replace(GRID, crs=None, transform=(1, 0, 0, 0, 1, 0))
    drawn = shapes.rasterize([(shapely.to_wkb(mixed), 2), (shapely.to_wkb(shapely.Point(6, 8)), 3)], None, grid, WHOLE)
    expected = np.full((40, 60), IGNORE)
    expected[7:9, 5:9] = 2
    assert np.array_equal(drawn, expected)


def test_shapes_are_laid_on_a_scene_once(monkeypatch):
    """As they come out of a message: equal, and not the same objects."""
    laid = []
    lay = shapes._lay
    monkeypatch.setattr(shapes, "_lay", lambda *given: laid.append(1) or lay(*given))
    for window in cut(40, 60, 11, 13):
        for number in range(3):
            grid = replace(GRID, transform=(10, 0, 400_000 + number, 0, -10, 4_000_000))
            placed = [
                (shapely.to_wkb(shapely.box(west, 36, west + 1, 37)), value) for value, west in enumerate([-76, 9])
            ]
            shapes.rasterize(shapes.pack(placed), "EPSG:4326", grid, window)
            shapes.aoi_mask(placed[0][0], "EPSG:4326", grid, window)
    assert len(laid) == 6


def test_what_was_packed_comes_out_again():
    found = [(shapely.to_wkb(one), value) for value, one in enumerate([shapely.Point(1, 2), *drawing(1)], 250)][:5]
    geometries, values = shapes.unpack(shapes.pack(found))
    assert shapely.to_wkb(geometries).tolist() == [wkb for wkb, _ in found]
    assert values.tolist() == [250, 251, 252, 253, 254]
    assert len(shapes.unpack(shapes.pack([]))[0]) == 0


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
    assert (mask != expected).mean() < 0.0002  # a side of the box is a curve here


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


@pytest.mark.parametrize("crs", ["EPSG:32618", "EPSG:4326"])
def test_a_shape_in_pixels_holds_the_centres_that_are_drawn(crs):
    """With its holes, and what lies in these."""
    scene = Grid(90, 130, "EPSG:32618", GRID.transform)
    rings = [shapely.Point(60, 40).buffer(radius, quad_segs=5) for radius in (35, 22, 9)]
    whole = shapely.union(shapely.difference(rings[0], rings[1]), rings[2])
    ground = shapely.transform(whole, lambda at: at * [10, -10] + [UTM.c, UTM.f])
    if crs != scene.crs:
        transformer = pyproj.Transformer.from_crs(scene.crs, crs, always_xy=True)
        ground = shapely.transform(ground, lambda at: np.column_stack(transformer.transform(*at.T)))
    found = shapes.in_pixels(ground, crs, scene)
    rows, cols = np.mgrid[:90, :130] + 0.5
    drawn = shapes.rasterize([(shapely.to_wkb(ground), 1)], crs, scene, Window(0, 0, 90, 130)) == 1
    assert 1000 < drawn.sum() < 4000
    assert np.array_equal(shapely.contains_xy(found, cols, rows), drawn)
    far = shapely.transform(ground, lambda at: at + ([300_000, 0] if crs == scene.crs else [40, 0]))
    assert not shapely.intersection(shapes.in_pixels(far, crs, scene), shapely.box(0, 0, 130, 90)).area


def squares(west: float, south: float, east: float, north: float) -> list[shapely.Polygon]:
    """Boxes around a place and beside it, in the order in which they are asked for."""
    dx, dy = east - west, north - south
    at = [(0, 0), (9, 0), (0, 9), (-9, 0), (0, -9)]
    return [shapely.box(west + i * dx, south + j * dy, east + i * dx, north + j * dy) for i, j in at]


NEAR = {
    "across the antimeridian": ("EPSG:32601", squares(138_000, -1_840_000, 199_000, -1_780_000),
                                ("EPSG:32601", 10, 180_000, -1_810_000)),
    "a long edge": ("EPSG:3035", [shapely.box(2.6e6, 1.5e6, 6e6, 5.4e6), shapely.box(2.6e6, 5.5e6, 6e6, 6e6)],
                    ("EPSG:3035", 10, 4.3e6, 5.395e6)),
    "around the pole": ("EPSG:3413", squares(-1e6, -1e6, 1e6, 1e6), ("EPSG:3413", 30, 90_000, 4000)),
    "a circle around the pole": ("EPSG:3413", [shapely.Point(0, 0).buffer(5e5)], ("EPSG:3413", 30, -1500, 4000)),
    "beyond -180": ("EPSG:4326", [shapely.box(-190, -25, -170, -10), shapely.box(-175, -25, -170, -10)],
                    ("EPSG:32760", 30, 600_000, 8_100_000)),
    "a cap in degrees, and one to -90": (
        "EPSG:4326", [shapely.box(-180, 80, 180, 90), shapely.box(-180, -90, 180, -60)], ("EPSG:3413", 30, -1000, 400)
    ),
    "in degrees beside the pole": (
        "EPSG:4326",
        [shapely.box(*one) for one in ((-60, 89.9, -30, 89.99), (-150, 89.9, -120, 89.97), (120, 89.9, 150, 89.99))],
        ("EPSG:3413", 100, -1000, 1200),
    ),
    "a world in metres": (
        "EPSG:3857", [shapely.box(-2.0037e7, y, 2.0037e7, 2e7) for y in (1.8e7, 1.99e7)],
        ("EPSG:3413", 100, -478_000, 478_000),
    ),
    "a long edge of another CRS": ("EPSG:4326", [shapely.box(-170, -60, 170, 45)], ("EPSG:32632", 10, 6e5, 4.98e6)),
    "where the shapes' CRS is not": ("EPSG:32633", [shapely.box(3e5, 5e6, 7e5, 5.5e6)],
                                     ("EPSG:32753", 10, 480_000, 5_200_000)),
}  # fmt: skip


@pytest.mark.parametrize("case", NEAR)
def test_shapes_are_near_a_scene_that_they_have_pixels_of(case):
    crs, found, (scene_crs, size, west, north) = NEAR[case]
    grid = Grid(70, 90, scene_crs, (size, 0, west, 0, -size, north))
    window = Window(0, 0, 70, 90)
    near = shapes.near(shapely.STRtree(found), crs, grid).tolist()
    drawn = []
    for index, one in enumerate(found):
        if "-90" not in case or index == 0:  # what ends at the other pole can't be laid around this one
            drawn += [index] * int(1 in shapes.rasterize([(shapely.to_wkb(one), 1)], crs, grid, window))
    assert near == drawn
    assert near == ([] if "is not" in case else [0, 2] if "beside" in case else [0])


def test_a_scene_beside_a_shape_is_not_near_it():
    """A hundredth of the scene away, in its own CRS and in others."""
    grid = Grid(70, 90, "EPSG:32618", GRID.transform)
    for crs in ("EPSG:32618", "EPSG:32617", "EPSG:4326", "EPSG:3857"):
        transformer = pyproj.Transformer.from_crs(grid.crs, crs, always_xy=True)
        for away, expected in ((-1, [0, 1]), (1, [])):
            rings = [shapely.box(90 + away, -70, 200, 140), shapely.box(-90, 70 + away, 90, 200)]
            found = [
                shapely.transform(
                    shapely.segmentize(one, 1),
                    lambda at, to=transformer: np.column_stack(
                        to.transform(*geography.apply(grid.transform, at[:, 0], at[:, 1]))
                    ),
                )
                for one in rings
            ]
            assert shapes.near(shapely.STRtree(found), crs, grid).tolist() == expected, (crs, away)
