"""Every file that other projects found awkward: read as rasterio reads it, or refused with a reason."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
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


def by_bands(files: list[str]) -> dict[int, list[str]]:
    """The files by their number of bands, alpha left out; those without a header that can be read go with any."""
    found: dict[int, list[str]] = {}
    for candidate in scenes.find(files):
        try:
            count = len(scenes.describe(candidate, raster.describe_file).bands)
        except Refused:
            count = 1
        found.setdefault(count, []).append(candidate.url)
    raster.close_files()
    return found


def quarantined(out: Path) -> dict[str, str]:
    table = pq.read_table(out / "_quarantine.parquet").to_pylist() if (out / "_quarantine.parquet").exists() else []
    return {os.path.basename(row["url"]): row["reason"] for row in table}


def names(count: int) -> str:
    return ",".join(f"b{number}" for number in range(1, count + 1))


LIMIT = 100.0


def test_each_is_predicted_right_or_quarantined(spark, files, tmp_path):
    """A 1x1 network: water where the first band is above 100."""
    import keras

    from sattile.model import bundle
    from sattile.prediction import predict

    refused: dict[str, str] = {}
    compared = 0
    for count, urls in by_bands(files).items():
        values = keras.Input((None, None, count))
        layer = keras.layers.Conv2D(2, 1)
        network = keras.Model(values, layer(values))
        kernel = np.zeros((1, 1, count, 2), np.float32)
        kernel[0, 0, 0, 1] = 1
        layer.set_weights([kernel, np.array([LIMIT, 0], np.float32)])
        network.save(tmp_path / f"{count}.keras")
        model = bundle(
            str(tmp_path / f"{count}.keras"), bands=names(count), classes="land,water", activation="none",
            out=str(tmp_path / f"m{count}"),
        )  # fmt: skip
        out = tmp_path / f"maps{count}"
        predict(spark, model=model, scenes=urls, bands=names(count), out=str(out), max_failed_fraction=1.0)
        refused |= quarantined(out)
        by_name = {scene.scene_id: scene.url for scene in scenes.find(urls)}
        for folder in sorted(path for path in out.iterdir() if path.is_dir()):
            with rasterio.open(folder / "labels.tif") as file:
                for row in range(0, file.height, 2048):
                    window = Window(row, 0, min(2048, file.height - row), file.width)
                    data, valid = plain_read(by_name[folder.name], window)
                    found = file.read(1, window=((window.row, window.stop_row), (0, file.width)))
                    with np.errstate(over="ignore"):
                        expected = np.where(valid, data[..., 0].astype(np.float32) > LIMIT, 255)
                    assert np.array_equal(found, expected), folder.name
            compared += 1
    assert set(refused) == set(REFUSED), refused
    assert compared == len(files) - len(REFUSED)


def test_each_is_tiled_right_or_quarantined(spark, files, tmp_path):
    from sattile.tiles import tile

    small = [url for url in files if os.path.getsize(url) and not url.endswith("image_web_z5_z11.tif")]
    refused: dict[str, str] = {}
    compared = set()
    for count, urls in by_bands(small).items():
        labels = tmp_path / f"labels{count}"
        labels.mkdir()
        where = {scene.scene_id: scene.url for scene in scenes.find(urls)}
        for scene_id, url in where.items():
            try:
                info = raster.describe_file(url)
            except Refused:
                height = width = 8
            else:
                height, width = info.height, info.width
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(
                    labels / f"{scene_id}.tif", "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8"
                ) as file:
                    file.write(np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8) % 2, 1)
        raster.close_files()
        out = tmp_path / f"tiles{count}"
        tile(
            spark, scenes=urls, labels=str(labels), out=str(out), bands=names(count), classes="even,odd", size=512,
            split="scene", max_failed_fraction=1.0,
        )  # fmt: skip
        refused |= quarantined(out)
        for row in pq.ParquetDataset(sorted(str(one) for one in out.glob("*/*.parquet"))).read().to_pylist():
            image, stored, valid = (np.load(io.BytesIO(row[name])) for name in ("image", "labels", "valid"))
            full = Window(row["row"], row["col"], *valid.shape)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.open(where[row["scene_id"]]) as file:
                    inside = full & Window(0, 0, file.height, file.width)
            data, expected_valid = plain_read(where[row["scene_id"]], inside)
            part = inside.slices(full)
            good = expected_valid[..., None]
            assert np.array_equal(np.where(good, image[part], 0), np.where(good, data, 0)), row["scene_id"]
            assert np.array_equal(valid[part].astype(bool), expected_valid), row["scene_id"]
            assert valid.sum() == valid[part].sum()
            rows, cols = np.arange(inside.row, inside.stop_row), np.arange(inside.col, inside.stop_col)
            parity = np.where(expected_valid, np.add.outer(rows, cols) % 2, 255)
            assert np.array_equal(stored[part], parity), row["scene_id"]
            compared.add(row["scene_id"])
    assert set(refused) == set(REFUSED), refused
    assert len(compared) > 200
