"""Scenes to measure on: large, textured (so that compression works as on real imagery), with labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
from rasterio.transform import from_origin
from rasterio.windows import Window

NAMES = ("B02", "B03", "B04", "B08")
CELL = 2048


def cell(row: int, col: int) -> tuple[np.ndarray, np.ndarray]:
    """(4, CELL, CELL) uint16 and labels (CELL, CELL) uint8: smooth ground, sensor noise, two classes."""
    rng = np.random.default_rng([7, row, col])
    y, x = np.mgrid[0:CELL, 0:CELL].astype(np.float32)
    y, x = (y + row * CELL) / 190, (x + col * CELL) / 230
    ground = np.sin(x) + np.sin(y * 1.3 + np.sin(x / 3)) + 0.5 * np.sin(4 * x + 3 * y)
    water = ground < -0.4
    bands = []
    for level, slope, dark in ((900, 90, 500), (1100, 140, 450), (1000, 220, 300), (2600, 500, 150)):
        values = np.where(water, dark, level + slope * ground) + rng.normal(0, 25, ground.shape)
        bands.append(np.clip(values, 1, 10_000).astype(np.uint16))
    return np.stack(bands), water.astype(np.uint8)


def write(folder: Path, height: int, width: int | None = None, *, plain: bool = False) -> tuple[Path, Path]:
    """A scene of `height` x `width` pixels (square if that is not given) and its labels; kept for the next run.

    Tiled 512, deflate (as Landsat and Sentinel-2 are published), or plain: not compressed. The ground repeats every two
    cells.
    """
    width = width or height
    name = (str(height) if width == height else f"{height}x{width}") + "_plain" * plain
    scene, labels = folder / f"scene_{name}.tif", folder / f"labels_{name}.tif"
    if scene.exists() and labels.exists():
        return scene, labels
    folder.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff", "height": height, "width": width, "crs": "EPSG:32632", "tiled": True, "blockxsize": 512,
        "blockysize": 512, "transform": from_origin(600_000, 5_000_000, 10, 10), "interleave": "band",
        "BIGTIFF": "IF_SAFER",
    }  # fmt: skip
    profile |= {} if plain else {"compress": "deflate", "zlevel": 1, "NUM_THREADS": "ALL_CPUS"}
    predictor = {} if plain else {"predictor": 2}
    # What a killed run leaves must not pass for a scene.
    parts = [path.with_suffix(".part") for path in (scene, labels)]
    with (
        rasterio.open(parts[0], "w", count=4, dtype="uint16", nodata=0, **profile, **predictor) as image,
        rasterio.open(parts[1], "w", count=1, dtype="uint8", nodata=255, **profile) as truth,
    ):
        image.descriptions = NAMES
        made = {}
        for row in range(0, height, CELL):
            for col in range(0, width, CELL):
                # Four distinct cells, laid out in turn: making noise takes longer than measuring.
                key = (row // CELL % 2, col // CELL % 2)
                if key not in made:
                    made[key] = cell(*key)
                bands, water = made[key]
                rows, cols = min(CELL, height - row), min(CELL, width - col)
                window = Window(col, row, cols, rows)
                image.write(bands[:, :rows, :cols], window=window)
                truth.write(water[None, :rows, :cols], window=window)
    parts[0].rename(scene)
    parts[1].rename(labels)
    return scene, labels
