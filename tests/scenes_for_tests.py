"""Small GeoTIFFs whose pixels say where they are, so that a shift, flip or transposition shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin


def position_image(height: int, width: int, bands: int, row0: int = 0, col0: int = 0) -> np.ndarray:
    """(bands, height, width) uint16: band 0 counts rows, band 1 columns (from 1), further ones mix both."""
    rows, cols = np.mgrid[row0 : row0 + height, col0 : col0 + width]
    layers = [rows + 1, cols + 1] + [rows * 7 + cols * 3 + 11 * band + 1 for band in range(2, bands)]
    return np.stack(layers[:bands]).astype(np.uint16)


def write_scene(
    path: Path, data: np.ndarray, *, west: float = 600_000, north: float = 5_000_000, gsd: float = 10.0, **profile: Any
) -> str:
    """Write (bands, height, width) as a GeoTIFF in EPSG:32632 and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = profile.pop("names", None)
    options = {"crs": "EPSG:32632", "transform": from_origin(west, north, gsd, gsd)} | profile
    bands, height, width = data.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=bands, dtype=data.dtype, **options
    ) as file:
        file.write(data)
        if names:
            file.descriptions = names
    return str(path)
