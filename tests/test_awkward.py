"""Every file that other projects found awkward: read as rasterio reads it, or refused with a reason."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from sattile import raster, scenes
from sattile.decoder import Decoder
from sattile.errors import Refused
from sattile.grid import Window

# Name, and what the reason has to say.
REFUSED = {
    "colormap-shl-overflow.tiff": "PlanarConfiguration",
    "graydepth-invert-overflow-5a0aad5024cc4ff3.tiff": "SamplesPerPixel",
    "graydepth-invert-overflow-9f2f479685f84884.tiff": "SamplesPerPixel",
    "slc.tif": "ground control points",
    # found when their pixels are read:
    "sample-get-lzw-stuck.tiff": "pixels cannot be read",
    "corrupt.tif": "pixels cannot be read",
}
BIG = 4_000_000  # pixels; of larger files a corner


@pytest.fixture(scope="module")
def files(shared_data: Path) -> list[str]:
    found = sorted(str(path) for path in (shared_data / "awkward").rglob("*") if path.suffix.lower() in scenes.SUFFIXES)
    assert len(found) > 200
    return found


def plain_read(url: str, window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Data bands and validity by rasterio alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        source = rasterio.open(url)
    with source:
        area = ((window.row, window.stop_row), (window.col, window.stop_col))
        indexes = [i for i in source.indexes if source.colorinterp[i - 1] != ColorInterp.alpha]
        data = np.moveaxis(source.read(indexes, window=area), 0, 2)
        masks = np.moveaxis(source.read_masks(indexes, window=area), 0, 2)
    valid = (masks != 0).all(axis=2)
    return data, valid & np.isfinite(data).all(axis=2) if data.dtype.kind == "f" else valid


def test_each_is_read_right_or_refused_with_a_reason(files):
    refused: dict[str, str] = {}
    with Decoder(timeout=60) as decoder:
        for candidate in scenes.find(files):
            name = os.path.basename(candidate.url)
            try:
                scene = scenes.describe(candidate, lambda url: decoder.call(raster.describe_file, url))
                window = Window(0, 0, scene.height, scene.width)
                if window.area > BIG:
                    window = Window(scene.height // 3, scene.width // 3, 700, 900)
                data, valid = decoder.call(raster.read, scene, window)
            except Refused as error:
                refused[name] = error.reason
                continue
            expected, expected_valid = plain_read(candidate.url, window)
            assert data.dtype == expected.dtype, name
            assert np.array_equal(data, expected, equal_nan=data.dtype.kind == "f"), name
            assert np.array_equal(valid, expected_valid), name
    assert set(refused) == set(REFUSED), refused
    for name, reason in refused.items():
        assert REFUSED[name] in reason, (name, reason)
        assert "See previous exception" not in reason
        assert len(reason) < 300


def test_windows_of_masks_and_alpha_are_those_of_the_whole(files):
    names = {"RGBA.uint16.tif", "image_rgb_mask.tif", "float_nan.tif", "rotated.tif", "image_webp.tif"}
    chosen = [url for url in files if os.path.basename(url) in names]
    assert len(chosen) == 5
    for candidate in scenes.find(chosen):
        scene = scenes.describe(candidate, raster.describe_file)
        data, valid = raster.read(scene, Window(0, 0, scene.height, scene.width))
        rng = np.random.default_rng(0)
        for _ in range(10):
            row, col = int(rng.integers(0, scene.height)), int(rng.integers(0, scene.width))
            window = Window(row, col, int(rng.integers(1, 99)), int(rng.integers(1, 99)))
            part, part_valid = raster.read(scene, window)
            inside = window & Window(0, 0, scene.height, scene.width)
            same = data[inside.slices()], valid[inside.slices()]
            assert np.array_equal(part[inside.slices(window)], same[0], equal_nan=data.dtype.kind == "f")
            assert np.array_equal(part_valid[inside.slices(window)], same[1])
            assert part_valid.sum() == same[1].sum()
    raster.close_files()
