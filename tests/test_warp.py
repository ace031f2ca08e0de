"""Scenes on other grids: the same numbers in any cut, right against PROJ, nothing lost at seams and poles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyproj
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.warp import reproject

from sattile.errors import UsageError
from sattile.grid import Window
from sattile.schema import Scene
from sattile.warp import Grid, Warp, parse_grid

UTM31, UTM32 = "EPSG:32631", "EPSG:32632"


def scene_of(shape: tuple[int, int], crs: str, transform: tuple[float, ...], name: str = "s") -> Scene:
    return Scene(name, name, *shape, (), crs, transform)  # type: ignore[arg-type]


def hull_of(warp: Warp, edge: int) -> Window:
    found = [one for one in warp.reach(edge) if warp.touches([one])[0]]
    row, col = min(one.row for one in found), min(one.col for one in found)
    return Window(row, col, max(one.stop_row for one in found) - row, max(one.stop_col for one in found) - col)


def on_grid(
    warp: Warp, window: Window, scores: np.ndarray, weights: np.ndarray, edge: int
) -> tuple[np.ndarray, np.ndarray]:
    """A window of the grid, block by block; scores are 0 where there is nothing."""
    found = np.zeros((*window.shape, scores.shape[-1]), np.float32)
    weight = np.zeros(window.shape, np.uint32)
    for row in range(window.row, window.stop_row, edge):
        for col in range(window.col, window.stop_col, edge):
            block = Window(row, col, min(edge, window.stop_row - row), min(edge, window.stop_col - col))
            cut = warp.cut(block)
            if cut.need.area:
                part = cut.need.slices()
                got, heavy = warp.apply(cut, scores[part], weights[part])
                found[block.slices(window)] = np.where(heavy[..., None] > 0, got, 0)
                weight[block.slices(window)] = heavy
    return found, weight


def surface(height: int, width: int) -> np.ndarray:
    rows, cols = np.mgrid[0:height, 0:width]
    return np.stack([np.sin(cols / 40) + np.cos(rows / 30), cols / width], -1).astype(np.float32)


@settings(max_examples=20, deadline=None)
@given(
    grid=st.sampled_from(["EPSG:32632@10", "EPSG:32632@23", "EPSG:32631@10", "EPSG:32631@7.5", "EPSG:4326@0.0002"]),
    edge=st.integers(20, 200),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 130)),
    seed=st.integers(0, 9),
)
@example(grid="EPSG:32631@7.5", edge=22, shape=(2, 2), seed=0)  # a block that ends above a change of weight
def test_any_cut_into_blocks_gives_the_same_bits(grid: str, edge: int, shape: tuple[int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    scene = scene_of(shape, UTM31, (10, 0, 700_000 + seed, 0, -10, 5_000_000))
    scores = rng.normal(size=(*shape, 2)).astype(np.float32)
    weights = rng.integers(0, 3, shape) * rng.integers(1, 200)
    scores[weights == 0] = np.nan
    warp = Warp(parse_grid(grid), scene)
    window = hull_of(warp, 64)
    for one, other in zip(
        on_grid(warp, window, scores, weights, 10_000), on_grid(warp, window, scores, weights, edge), strict=True
    ):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "grid", ["EPSG:32632@10", "EPSG:32632@4", "EPSG:3857@17", "EPSG:4326@0.0001", "EPSG:32631@10", "EPSG:32631@7.5"]
)
def test_scores_lie_where_gdal_puts_them(grid: str) -> None:
    scene = scene_of((233, 310), UTM31, (10, 0, 700_000, 0, -10, 5_000_000))
    scores, weights = surface(233, 310), np.ones((233, 310), np.int64)
    warp = Warp(parse_grid(grid), scene)
    window = hull_of(warp, 64)
    found, weight = on_grid(warp, window, scores, weights, 100)
    expected = np.full((2, *window.shape), np.nan, np.float32)
    reproject(
        np.moveaxis(scores, -1, 0), expected, src_transform=scene_transform(scene), src_crs=scene.crs,
        dst_transform=scene_transform(warp.grid.of(window)), dst_crs=warp.grid.crs, resampling=Resampling.bilinear,
        init_dest_nodata=False, dst_nodata=np.nan, XSCALE=1, YSCALE=1,
    )  # fmt: skip
    there = weight > 0
    # GDAL's own approximation is off by an eighth of a pixel.
    assert np.abs(np.moveaxis(expected, 0, -1) - found)[there].max() < 0.02
    assert (np.isfinite(expected[0]) != there).sum() <= 0.002 * there.sum()


def scene_transform(scene: Scene | tuple[float, ...]) -> object:
    from affine import Affine

    return Affine(*(scene.transform if isinstance(scene, Scene) else scene))


@pytest.mark.parametrize("grid", ["EPSG:32632@10", "EPSG:32632@33", "EPSG:32631@10", "EPSG:32631@20", "EPSG:3857@9"])
def test_a_constant_stays_exactly_constant_and_nodata_gives_nothing(grid: str) -> None:
    rng = np.random.default_rng(0)
    scene = scene_of((120, 170), UTM31, (10, 0, 700_000, 0, -10, 5_000_000))
    weights = rng.integers(1, 300, (120, 170))
    weights[30:80, 40:90] = 0
    scores = np.where(weights[..., None] > 0, np.float32(0.3), np.float32(np.nan)) * np.ones(2, np.float32)
    warp = Warp(parse_grid(grid), scene)
    window = hull_of(warp, 64)
    found, weight = on_grid(warp, window, scores, weights, 50)
    assert set(np.unique(found[weight > 0])) == {np.float32(0.3)}
    assert weight.max() <= weights.max()
    # The hole is as large as it was, in pixels of the grid.
    whole = on_grid(warp, window, scores, np.ones_like(weights), 50)[1]
    hole = (whole > 0).sum() - (weight > 0).sum()
    assert hole / (whole > 0).sum() == pytest.approx(50 * 50 / (120 * 170), rel=0.03)


def test_a_grid_that_is_the_scene_s_copies_it() -> None:
    scene = scene_of((37, 53), UTM31, (10, 0, 600_000, 0, -10, 5_000_000))
    scores = surface(37, 53)
    weights = np.arange(37 * 53).reshape(37, 53) % 7
    warp = Warp(parse_grid(f"{UTM31}@10"), scene)
    found, weight = on_grid(warp, Window(-500_000, 60_000, 37, 53), scores, weights, 16)
    np.testing.assert_array_equal(weight, weights)
    np.testing.assert_array_equal(found[weights > 0], scores[weights > 0])


def test_a_coarser_grid_holds_means() -> None:
    scene = scene_of((40, 60), UTM31, (10, 0, 600_000, 0, -10, 5_000_000))
    scores = np.random.default_rng(1).normal(size=(40, 60, 2)).astype(np.float32)
    warp = Warp(parse_grid(f"{UTM31}@20"), scene)
    assert warp.points == 2
    found, weight = on_grid(warp, Window(-250_000, 30_000, 20, 30), scores, np.ones((40, 60), np.int64), 7)
    means = scores.reshape(20, 2, 30, 2, 2).astype(float).mean(axis=(1, 3))
    np.testing.assert_allclose(found, means, atol=1e-6)
    assert (weight == 1).all()


PLACES = [
    # (scene's CRS, x, y of its corner, pixel size, grid)
    ("EPSG:32660", 800_000, 200_000, 10, "EPSG:32601@10"),
    ("EPSG:32601", 165_000, 6_000_000, 10, "EPSG:4326@0.0001"),
    ("EPSG:32660", 832_000, 200_000, 10, "EPSG:4326@0.0001"),
    ("EPSG:32660", 832_000, 200_000, 10, "EPSG:3857@10"),
    ("EPSG:4326", 179.99, -17.0, 0.0001, "EPSG:32701@10"),
    ("EPSG:4326", 179.99, -17.0, 0.0001, "EPSG:4326@0.0001"),
    ("EPSG:4326", -180.005, -17.0, 0.0001, "EPSG:4326@0.0001"),
    ("EPSG:3413", -70_000, 90_000, 1000, "EPSG:4326@0.05"),
    ("EPSG:3413", -700, 900, 10, "EPSG:3413@10"),
    ("EPSG:3995", -700, 900, 10, "EPSG:3413@10"),
    ("EPSG:4326", 10.0, 90.0, (0.2, 0.0002), "EPSG:3413@10"),
    ("EPSG:4326", -120.0, 84.0, (0.0008, 0.0002), "EPSG:3413@10"),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda one: f"{one[0]}-{one[1]}-{one[4]}")
def test_nothing_is_lost_at_the_antimeridian_or_at_a_pole(place: tuple[str, float, float, Any, str]) -> None:
    crs, x, y, size, grid_text = place
    wide, high = size if isinstance(size, tuple) else (size, size)
    height, width = 131, 187
    scene = scene_of((height, width), crs, (wide, 0, x, 0, -high, y))
    grid = parse_grid(grid_text)
    warp = Warp(grid, scene)
    rows, cols = np.mgrid[0:height, 0:width]
    scores = np.stack([rows, cols], -1).astype(np.float32)
    weights = np.ones((height, width), np.int64)
    blocks = [one & (grid.limits or one) for one in warp.reach(64)]
    seen = np.zeros((height, width), bool)
    area = 0
    for block in blocks:
        cut = warp.cut(block)
        touched = warp.touches([block])[0]
        if not cut.need.area:
            continue
        part = cut.need.slices()
        found, weight = warp.apply(cut, scores[part], weights[part])
        there = weight > 0
        assert touched or not there.any()
        area += there.sum()
        # A pixel of the grid got the number of the scene's pixel that lies there: checked by PROJ, point by point.
        r, c = np.nonzero(there)
        gx, gy = scene_transform(grid.transform) * (block.col + c + 0.5, block.row + r + 0.5)
        there_and_back = pyproj.Transformer.from_crs(grid.crs, crs, always_xy=True)
        sx, sy = there_and_back.transform(gx, gy) if grid.crs != crs else (gx, gy)
        if crs == "EPSG:4326":
            sx = x + (np.asarray(sx) - x) % 360
        at_col, at_row = (np.asarray(sx) - x) / wide, (y - np.asarray(sy)) / high
        if warp.points == 1:
            assert np.abs(found[there][:, 0] - (at_row - 0.5).clip(0, height - 1)).max(initial=0) < 0.05
            assert np.abs(found[there][:, 1] - (at_col - 0.5).clip(0, width - 1)).max(initial=0) < 0.05
        seen[at_row.astype(int).clip(0, height - 1), at_col.astype(int).clip(0, width - 1)] = True
    _, lat = on_earth(scene)
    north = lat <= 90
    finer = warp.stretch < 0.9
    share = seen[north].mean() if finer else None
    assert share is None or share > 0.999
    # As much ground on the grid as in the scene.
    assert area == pytest.approx(expected_pixels(scene, grid, north), rel=0.03)


def on_earth(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = np.mgrid[0 : scene.height, 0 : scene.width] + 0.5
    xs, ys = scene_transform(scene) * (cols, rows)
    if scene.crs == "EPSG:4326":
        return xs, ys
    return pyproj.Transformer.from_crs(scene.crs, "EPSG:4326", always_xy=True).transform(xs, ys)


def expected_pixels(scene: Scene, grid: Grid, counted: np.ndarray) -> float:
    """Pixels of the grid under the scene's pixels, by the projections' own area scales at each."""
    lon, lat = on_earth(scene)
    lon = (lon + 180) % 360 - 180

    def scale(crs: str) -> np.ndarray:
        if crs == "EPSG:4326":
            return 1 / (111_320.0**2 * np.cos(np.radians(lat)))
        return np.asarray(pyproj.Proj(crs).get_factors(lon, lat).areal_scale)

    ratio = scale(grid.crs) / scale(str(scene.crs))
    pixel = abs(scene.transform[0] * scene.transform[4]) / abs(grid.transform[0] * grid.transform[4])
    return float((ratio * pixel)[counted].sum())


@pytest.mark.parametrize(("pixels", "edge"), [(200, 200), (150, 512), (400, 512), (1000, 2048)])
def test_a_small_scene_at_the_antimeridian_reaches_a_few_blocks_on_either_side(pixels: int, edge: int) -> None:
    """Of as few cells as it has, a seam runs through most."""
    x, y = pyproj.Transformer.from_crs(4326, 32601, always_xy=True).transform(-180, -17)
    scene = scene_of((pixels, pixels), "EPSG:32701", (10, 0, round(x) - 900, 0, -10, round(y + 1e7) + 1000))
    warp = Warp(parse_grid("EPSG:4326@0.0002"), scene)
    found = warp.reach(edge)
    assert len(found) <= 12
    rows, cols = np.meshgrid(np.linspace(1, pixels - 1, 60), np.linspace(1, pixels - 1, 60))
    at = np.floor(warp._forward(rows, cols) / edge).reshape(2, -1).T
    assert {(int(row) * edge, int(col) * edge) for row, col in at} <= {(one.row, one.col) for one in found}


def test_scenes_that_share_no_ground_with_a_grid_reach_nothing() -> None:
    like = Grid("EPSG:32631", (10, 0, 600_000, 0, -10, 5_000_000), Window(0, 0, 100, 100), True)
    far = scene_of((50, 50), "EPSG:32655", (10, 0, 500_000, 0, -10, 1_000_000))
    assert not any(Warp(like, far).touches(Warp(like, far).reach(64)))
    near = scene_of((50, 50), "EPSG:32631", (10, 0, 600_990, 0, -10, 5_000_000))
    assert [one for one in Warp(like, near).reach(64) if Warp(like, near).touches([one & Window(0, 0, 100, 100)])[0]]


@settings(max_examples=30, deadline=None)
@given(
    grid=st.sampled_from(["EPSG:25832@10", "EPSG:25832@100", "EPSG:32633@10", "EPSG:4326@0.0001"]),
    edge=st.sampled_from([64, 464, 3072]),
    shape=st.sampled_from([(1, 1), (1, 300), (256, 256)]),
    move=st.tuples(st.integers(0, 40_000), st.integers(0, 40_000)),
)
def test_no_scene_is_so_small_that_a_block_misses_it(
    grid: str, edge: int, shape: tuple[int, int], move: tuple[int, int]
) -> None:
    scene = scene_of(shape, UTM32, (10, 0, 600_000 + move[0], 0, -10, 5_000_000 - move[1]))
    warp = Warp(parse_grid(grid), scene)
    blocks = warp.reach(edge)
    exact = [bool(warp.cut(one).need.area) for one in blocks]
    assert warp.touches(blocks) == exact
    assert any(exact) or warp.points > 1


def test_a_resolution_in_other_units_is_told_with_one_to_use() -> None:
    scene = scene_of((300, 300), UTM32, (10, 0, 600_000, 0, -10, 5_000_000))
    for text, says in (
        ("EPSG:32632@0.0001", "100,000 times finer than"),
        ("EPSG:32632@20000", "2,000 times as wide as"),
        ("EPSG:4326@1", "times as wide as"),
    ):
        reason = Warp(parse_grid(text), scene).misfit()
        assert reason
        assert says in reason
    assert reason.endswith("EPSG:4326@8.9e-05")
    assert Warp(parse_grid("EPSG:32632@0.0001"), scene).misfit().endswith("EPSG:32632@10")
    assert Warp(parse_grid("EPSG:32632@640"), scene).misfit() is None
    assert Warp(parse_grid("EPSG:32632@0.5"), scene).misfit() is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("EPSG:32633", "EPSG:N@RES"),
        ("EPSG:999999@10", "PROJ knows no"),
        ("EPSG:4326@10", "degrees"),
        ("EPSG:32633@0", "more than 0"),
        ("EPSG:32633@-3", "more than 0"),
        ("EPSG:4978@10", "two axes"),
    ],
)
def test_grids_that_cannot_be_are_refused(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        parse_grid(text)


def test_a_window_of_a_grid_is_where_it_is() -> None:
    grid = Grid(UTM31, (8.0, 3.0, 5e5, 3.0, -8.0, 5e6))
    window = Window(-7, 11, 3, 5)
    assert grid.of(window)[2] == 5e5 + 8 * 11 + 3 * -7
    assert math.isclose(grid.of(window)[5], 5e6 + 3 * 11 - 8 * -7)


@pytest.mark.parametrize("grid", ["EPSG:3413@20000", "EPSG:3031@20000", "EPSG:3857@20000", "EPSG:32633@20000"])
def test_the_whole_world_reaches_what_a_projection_can_show_of_it(grid):
    """Towards the other pole coordinates grow beyond all bounds."""
    warp = Warp(parse_grid(grid), scene_of((180, 360), "EPSG:4326", (1, 0, -180, 0, -1, 90)))
    found = warp.reach(64)
    hit = [one for one, touched in zip(found, warp.touches(found), strict=True) if touched]
    assert 500 < len(hit) < 3000
    half = 20_037_509 / 20_000 + 64
    east = 25 if "326" in grid else 0  # its false easting
    assert all(abs(one.row + 32) <= half and abs(one.col + 32 - east) <= half for one in hit)


@pytest.mark.parametrize(
    ("grid", "unit", "east", "north"),
    [
        ("EPSG:3857@10", 1, 0, 0),
        ("EPSG:32733@10", 1, 500_000, 10_000_000),
        ("EPSG:2263@100", 1200 / 3937, 984_250, 0),
        ("EPSG:3035@10", 1, 4_321_000, 3_210_000),
    ],
)
def test_a_projection_ends_half_around_the_earth_from_its_origin(grid, unit, east, north):
    found = parse_grid(grid)
    step, world = found.transform[0], found.world
    for start, size, middle in ((world.col, world.width, east), (world.row, world.height, -north)):
        assert (start + size / 2) * step == pytest.approx(middle, abs=2 * step)
        assert size * step * unit == pytest.approx(40_075_017, abs=2 * step)
