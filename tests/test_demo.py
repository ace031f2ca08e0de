"""Laws of the demo's archive: one world, many photographs."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.errors import RasterioIOError

from sattile import demo
from sattile.schema import IGNORE

PLAIN = demo.Acquisition("plain", datetime(2024, 6, 1, 10), row=40, col=25, height=70, width=110, seed=5)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> demo.Archive:
    return demo.make_archive(tmp_path_factory.mktemp("archive"), scenes=3, height=200, width=260, seed=3)


def content(folder: str) -> dict[str, str]:
    files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@settings(max_examples=15, deadline=None)
@given(
    row=st.integers(-400, 400), col=st.integers(-400, 400), down=st.integers(0, 30), right=st.integers(0, 50),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_world_is_a_function_of_the_place(row: int, col: int, down: int, right: int, seed: int) -> None:
    """Two surveys that begin at different points agree on the ground that they share."""
    rows, cols = np.arange(row, row + 60), np.arange(col, col + 85)
    whole = demo.survey(*demo._ground(cols, rows), seed=seed)
    part = demo.survey(*demo._ground(cols[right:], rows[down:]), seed=seed)
    np.testing.assert_array_equal(whole.labels[down:, right:], part.labels)
    np.testing.assert_array_equal(whole.cover[down:, right:], part.cover)
    np.testing.assert_allclose(whole.tone[down:, right:], part.tone, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(cell=st.floats(15, 4000), start=st.integers(-5000, 5000), seed=st.integers(0, 2**31))
def test_noise_is_the_same_by_both_ways(cell: float, start: int, seed: int) -> None:
    x, y = (np.arange(start, start + 31) + 0.5) * 10, (np.arange(-start, -start + 17) + 0.5) * 10
    fast = demo.noise(x, y, cell, seed=seed)
    grid_x, grid_y = np.meshgrid(x, y)
    np.testing.assert_allclose(fast, demo.noise_at(grid_x, grid_y, cell, seed=seed), atol=1e-6)
    assert fast.min() >= 0
    assert fast.max() <= 1


def test_scenes_agree_where_they_overlap(archive: demo.Archive) -> None:
    """Labels of every two scenes are equal on shared ground where both have one."""
    shared = 0
    for index, first_id in enumerate(archive.scene_ids):
        for second_id in archive.scene_ids[index + 1 :]:
            with (
                rasterio.open(f"{archive.labels}/{first_id}.tif") as first,
                rasterio.open(f"{archive.labels}/{second_id}.tif") as second,
            ):
                x, y, other_x, other_y = first.transform.c, first.transform.f, second.transform.c, second.transform.f
                down, right = round((y - other_y) / demo.GSD), round((other_x - x) / demo.GSD)
                a, b = first.read(1), second.read(1)
            # First's row r is second's row r - down: cut both to what they share.
            a, b = a[max(down, 0) :, max(right, 0) :], b[max(-down, 0) :, max(-right, 0) :]
            height, width = min(a.shape[0], b.shape[0]), min(a.shape[1], b.shape[1])
            a, b = a[:height, :width], b[:height, :width]
            both = (a != IGNORE) & (b != IGNORE)
            shared += int(both.sum())
            np.testing.assert_array_equal(a[both], b[both])
    assert shared > 20_000


def test_files_are_what_they_say(archive: demo.Archive) -> None:
    sizes = set()
    for scene_id in archive.scene_ids:
        with (
            rasterio.open(f"{archive.scenes}/{scene_id}.tif") as scene,
            rasterio.open(f"{archive.labels}/{scene_id}.tif") as labels,
        ):
            assert scene.descriptions == demo.BANDS
            assert (scene.dtypes[0], scene.nodata, scene.crs) == ("uint16", 0, rasterio.CRS.from_epsg(32632))
            assert scene.res == (10, 10)
            assert scene.height != scene.width
            assert (labels.dtypes[0], labels.nodata, labels.shape) == ("uint8", IGNORE, scene.shape)
            assert labels.transform == scene.transform
            assert scene.tags()["TIFFTAG_DATETIME"].startswith("2024:")
            assert scene.scales == (0.0001,) * 6
            sizes.add(scene.shape)
            if scene_id == archive.corrupt:
                continue
            pixels, ids = scene.read(), labels.read(1)
        outside = (pixels == 0).any(axis=0)
        np.testing.assert_array_equal(outside, (pixels == 0).all(axis=0))
        assert (ids[outside] == IGNORE).all()
        assert set(np.unique(ids)) <= {*range(len(demo.CLASS_NAMES)), IGNORE}
    assert len(sizes) == len(archive.scene_ids)


def test_corrupt_file_opens_but_does_not_read(archive: demo.Archive) -> None:
    assert archive.corrupt
    with rasterio.open(f"{archive.scenes}/{archive.corrupt}.tif") as file, pytest.raises(RasterioIOError):
        file.read()


def test_same_seed_same_bytes_and_made_once(archive: demo.Archive, tmp_path: Path) -> None:
    again = demo.make_archive(tmp_path, scenes=3, height=200, width=260, seed=3)
    assert content(again.folder) == content(archive.folder)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    demo.make_archive(tmp_path, scenes=3, height=200, width=260, seed=3)
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    first = Path(again.scenes, f"{again.scene_ids[0]}.tif")
    whole = first.read_bytes()
    first.write_bytes(whole[:-1])
    demo.make_archive(tmp_path, scenes=3, height=200, width=260, seed=3)
    assert first.read_bytes() == whole


def test_another_seed_is_another_world() -> None:
    rows, cols = np.arange(300), np.arange(400)
    maps = [demo.survey(*demo._ground(cols, rows), seed=seed).labels for seed in (0, 1)]
    assert (maps[0] != maps[1]).mean() > 0.2


def test_every_class_is_there_and_spectra_are_plausible() -> None:
    """Vegetation is bright in the near infrared, water dark; soil and built-up overlap in every band."""
    plan = demo.plan_archive(scenes=2, height=600, width=720, seed=0, corrupt=False)
    pixels, labels = demo.photograph(replace(plan[0], cloud_cover=0.0, collar=0.0, haze=0.0))
    red, infrared = pixels[..., 2].astype(float), pixels[..., 3].astype(float)
    ndvi = (infrared - red) / (infrared + red)
    shares = [float((labels == number).mean()) for number in range(4)]
    assert min(shares) > 0.02
    assert np.median(ndvi[labels == demo.VEGETATION]) > 0.5
    assert np.median(ndvi[labels == demo.WATER]) < 0
    assert np.median(infrared[labels == demo.WATER]) < 700
    for band in range(4):
        soil, built = pixels[..., band][labels == demo.SOIL], pixels[..., band][labels == demo.BUILT_UP]
        low, high = np.percentile(soil, [10, 90])
        assert ((built > low) & (built < high)).mean() > 0.3


def test_clouds_hide_labels_and_throw_shadows() -> None:
    clear, cloudy = PLAIN, replace(PLAIN, height=300, width=420, cloud_cover=0.25)
    _, labels = demo.photograph(cloudy)
    assert 0.02 < (labels == IGNORE).mean() < 0.8
    _, labels = demo.photograph(clear)
    assert (labels != IGNORE).all()
    rows, cols = np.arange(300), np.arange(420)
    cloud, shadow = demo.sky(*demo._ground(cols, rows), cover=0.25, seed=5)
    assert shadow.max() > 0.9
    assert (shadow * cloud).max() < 0.3


@pytest.mark.parametrize("collar", [-0.25, 0.3])
def test_swath_edge_leans(collar: float) -> None:
    inside = demo.swath(replace(PLAIN, collar=collar))
    assert inside.shape == (70, 110)
    assert 0.1 < 1 - inside.mean() < 0.5
    assert (inside[0] != inside[-1]).any()


def test_dark_ground_is_not_nodata() -> None:
    pixels, _ = demo.photograph(replace(PLAIN, gain=0.001))
    assert pixels.min() == 1
