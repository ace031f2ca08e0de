"""What the benchmarks reckon with: scenes, agreement of maps, memory of processes, the exponent."""

from __future__ import annotations

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import from_origin

from benchmarks import imagery, shapes
from benchmarks.growth import exponent
from benchmarks.memory import Peak
from benchmarks.peers import Measured, agree, shape, table
from benchmarks.predicting import cells
from sattile.grid import Window
from sattile.shapes import pack, rasterize


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 20), st.integers(0, 9))
def test_cells_keep_each_pixel_once_with_all_the_context_that_the_scene_has(
    height: int, width: int, size: int, halo: int
) -> None:
    kept = np.zeros((height, width), int)
    for (top, left, bottom, right), (row, col, rows, cols) in cells(height, width, size, halo):
        kept[row : row + rows, col : col + cols] += 1
        assert (top, left) == (max(row - halo, 0), max(col - halo, 0))
        assert (bottom, right) == (min(row + rows + halo, height), min(col + cols + halo, width))
    assert (kept == 1).all()


@given(st.floats(-2, 2), st.floats(0.1, 10), st.lists(st.integers(1, 10**10), min_size=2, max_size=6, unique=True))
def test_the_exponent_of_a_power_is_found(power: float, factor: float, sizes: list[int]) -> None:
    assert exponent(sizes, [factor * size**power for size in sizes]) == pytest.approx(power, abs=1e-6)


@given(st.integers(1, 4000))
def test_a_scene_of_so_many_megapixels_is_wider_than_high(megapixels: int) -> None:
    height, width = shape(megapixels)
    assert height * width >= megapixels * 1e6
    assert height < width
    assert (height % 1024, width % 1024) == (0, 0)


def test_a_scene_shows_the_same_ground_whatever_its_extent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagery, "CELL", 64)
    small, large = imagery.write(tmp_path, 90, 150), imagery.write(tmp_path, 200)
    for one, other in zip(small, large, strict=True):
        with rasterio.open(one) as part, rasterio.open(other) as whole:
            assert part.shape == (90, 150)
            np.testing.assert_array_equal(part.read(), whole.read()[:, :90, :150])
    with rasterio.open(small[0]) as image:
        cell, _ = imagery.cell(1, 0)
        np.testing.assert_array_equal(image.read()[:, 64:, :64], cell[:, :26])
    assert not list(tmp_path.glob("*.part"))


def raster(path: Path, values: np.ndarray, west: float = 600_000) -> Path:
    height, width = values.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "crs": "EPSG:32632"}
    with rasterio.open(path, "w", transform=from_origin(west, 5_000_000, 10, 10), **profile) as file:
        file.write(values, 1)
    return path


def test_agreement_is_the_share_of_equal_pixels_and_none_on_another_grid(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 2, (2100, 70)).astype(np.uint8)
    other = values.copy()
    other[[0, 1023, 1024, 2099], [0, 69, 0, 69]] ^= 1
    one = raster(tmp_path / "one.tif", values)
    assert agree(one, one) == 1
    assert agree(one, raster(tmp_path / "other.tif", other)) == 1 - 4 / 147_000
    assert agree(one, raster(tmp_path / "turned.tif", np.ascontiguousarray(values.T))) == 0
    assert agree(one, raster(tmp_path / "moved.tif", values, west=600_010)) == 0


def test_the_ratio_is_that_of_sattile_doing_the_same_work() -> None:
    runs = {
        "sattile crop": [Measured(2.0, 12_000_000, 10_000_000, 900.4, 1_500_000)],
        "sattile blend": [Measured(8.0, 40_000_000, 10_000_000, 950)],
        "loop": [Measured(4.0, 12_000_000, 10_000_000, 300), Measured(4.0, 12_000_000, 10_000_000, 310)],
        "rastervision": [Measured(16.0, 40_000_000, 10_000_000, 400)],
    }
    speed = {"sattile crop": 5.0, "sattile blend": 1.25, "loop": 2.5, "rastervision": 0.625}
    assert table(runs, speed, {"loop": 1.0, "rastervision": 0.9951})[2:] == [
        "| sattile crop | 5.00 | 6.00 | 900 | 1.50 |  |  |",
        "| sattile blend | 1.25 | 5.00 | 950 | - |  |  |",
        "| loop | 2.50 | 3.00 | 310 | - | 2.00 | 100.00% |",
        "| rastervision | 0.62 | 2.50 | 400 | - | 2.00 | 99.51% |",
    ]


def hold(megabytes: int) -> None:
    block = np.ones(megabytes * 1_000_000, np.uint8)
    time.sleep(1.5)
    del block


def test_the_peak_counts_what_children_hold() -> None:
    context = multiprocessing.get_context("spawn")
    with Peak() as before:
        pass
    with Peak() as peak:
        children = [context.Process(target=hold, args=(150,)) for _ in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
    assert 300 < peak.megabytes - before.megabytes < 900


def test_shapes_are_measured_in_each_way_of_drawing_them(capsys: pytest.CaptureFixture[str]) -> None:
    ratios = shapes.main(1, edge=300, footprints=40, vertices=900)
    for crs in ("EPSG:4326", "EPSG:32633"):
        assert f"40 footprints in {crs}, labels, 9 windows" in ratios
        assert f"a coast of 900 vertices in {crs}, labels, 3 strips" in ratios
        assert f"a coast of 900 vertices in {crs}, area, 9 windows" in ratios
    assert capsys.readouterr().out.count("against") == len(ratios) == 12
    assert all(ratio > 0 for ratio in ratios.values())


def test_the_shapes_that_are_measured_are_drawn_alike_by_both() -> None:
    scene = shapes.Scene(300, 300)
    for drawing in (shapes.houses(300, 40), shapes.coast(300, 900)):
        values = [5] * len(drawing)
        packed = pack(list(zip(shapely.to_wkb(shapes.on_ground(drawing, scene, "EPSG:4326")), values, strict=True)))
        drawn = rasterize(packed, "EPSG:4326", scene, Window(0, 0, 300, 300))
        assert 0 < (drawn == 5).sum() < 90_000
        assert (drawn != shapes.at_once(drawing, values, 300)).mean() < 1e-4
