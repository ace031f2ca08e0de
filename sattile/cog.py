"""Cloud-optimised GeoTIFFs of our own results: block by block onto scratch, then GDAL's COG driver.

Memory is bounded by a block: GDAL's cache is limited, and the COG driver copies from file to file. The bytes are the
same for the same pixels in whatever order the blocks came.
"""

from __future__ import annotations

import os
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine
from rasterio.windows import Window as RasterWindow

from sattile.grid import Window

TILE = 512
"""Edge of the COG's internal tiles, in pixels."""

CACHE_BYTES = 64_000_000
"""In bytes: rasterio does not take a small number for megabytes, as GDAL does."""


@dataclass(frozen=True)
class Layer:
    """One raster to write.

    Attributes:
        name: of the file, without `.tif`.
        dtype: numpy dtype.
        bands: description of each band.
        nodata: declared missing value; None where every value is one.
        overviews: `mode` for class ids, `average` for quantities.
        colors: {value: (red, green, blue)} of a labels map.
    """

    name: str
    dtype: str
    bands: tuple[str, ...]
    nodata: float | None
    overviews: str
    colors: tuple[tuple[int, tuple[int, int, int]], ...] = ()

    @property
    def pixel_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * len(self.bands)


@contextmanager
def _quiet() -> Iterator[None]:
    # A scene without georeference is kept as it is: nothing to warn of.
    with (
        warnings.catch_warnings(),
        rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES, GDAL_PAM_ENABLED="NO", GDAL_TIFF_INTERNAL_MASK=True),
    ):
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _profile(layer: Layer, height: int, width: int) -> dict[str, Any]:
    """Of a scratch file; uncompressed, so that a tile written twice takes no second place."""
    return {
        "driver": "GTiff", "height": height, "width": width, "count": len(layer.bands), "dtype": layer.dtype,
        "nodata": layer.nodata, "tiled": True, "blockxsize": TILE, "blockysize": TILE, "interleave": "band",
        "bigtiff": "IF_SAFER", "sparse_ok": True,
    }  # fmt: skip


class Canvas:
    """A raster that takes blocks in any order, on local scratch. Use as a context manager, then `to_cog`.

    What no block covers is nodata (0 where the layer declares none).

    Args:
        path: of the scratch file.
        layer: what it holds.
        height, width: of the grid, in pixels.
        crs: as rasterio takes it; None for none.
        transform: affine coefficients (a, b, c, d, e, f); any rotation and either direction is kept.
    """

    def __init__(
        self,
        path: str,
        layer: Layer,
        *,
        height: int,
        width: int,
        crs: str | None,
        transform: tuple[float, float, float, float, float, float],
    ):
        self.path, self.layer = path, layer
        self._profile = _profile(layer, height, width) | {"crs": crs, "transform": Affine(*transform)}

    def __enter__(self) -> Canvas:
        with _quiet():
            self._file = rasterio.open(self.path, "w", **self._profile)
            for index, description in enumerate(self.layer.bands, start=1):
                self._file.set_band_description(index, description)
            if self.layer.colors:
                table = dict.fromkeys(range(256), (0, 0, 0, 0))
                self._file.write_colormap(1, table | {value: (*color, 255) for value, color in self.layer.colors})
            elif self.layer.dtype != "uint8":
                self._file.colorinterp = [ColorInterp.gray] + [ColorInterp.undefined] * (len(self.layer.bands) - 1)
        return self

    def write(self, window: Window, values: np.ndarray) -> None:
        """Write one block: (height, width) or (height, width, bands), in the layer's dtype."""
        place = RasterWindow(window.col, window.row, window.width, window.height)
        with _quiet():
            if values.ndim == 2:
                self._file.write(values, 1, window=place)
            else:
                self._file.write(np.moveaxis(values, -1, 0), window=place)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with _quiet():
            self._file.close()


def to_cog(canvas: Canvas, path: str, threads: int = 1) -> None:
    """Turn a closed canvas into a COG with overviews; the scratch file is gone afterwards.

    DEFLATE, because everything that reads GeoTIFF reads it; tiles without data take no space. The bytes do not depend
    on the number of threads.
    """
    layer, source, overviews = canvas.layer, canvas.path, [canvas.path]
    with _quiet():
        if layer.overviews == "mode":
            while smaller := _halved(overviews[-1], layer):
                overviews.append(smaller)
            source = _with_overviews(*overviews)
        rasterio.shutil.copy(
            source, path, driver="COG", BLOCKSIZE=TILE, COMPRESS="DEFLATE", LEVEL=6,
            PREDICTOR="NO" if layer.colors else "YES", OVERVIEW_RESAMPLING=layer.overviews.upper(),
            OVERVIEW_COMPRESS="DEFLATE", BIGTIFF="IF_SAFER", SPARSE_OK="YES", GEOTIFF_VERSION="AUTO",
            NUM_THREADS=threads,
        )  # fmt: skip
    for scratch in {source, *overviews}:
        os.remove(scratch)


def _halved(path: str, layer: Layer) -> str | None:
    """A file of one band at half the resolution, by `mode`; None if it would be smaller than a tile."""
    with rasterio.open(path) as source:
        if max(source.shape) <= TILE:
            return None
        height, width = (-(-side // 2) for side in source.shape)
        profile = _profile(layer, height, width)
        with rasterio.open(smaller := f"{path}.2", "w", **profile) as target:
            for row in range(0, height, TILE):
                for col in range(0, width, TILE):
                    rows, cols = min(TILE, height - row), min(TILE, width - col)
                    values = source.read(1, window=RasterWindow(2 * col, 2 * row, 2 * cols, 2 * rows))
                    place = RasterWindow(col, row, cols, rows)
                    target.write(mode(values, layer.nodata), 1, window=place)
    return smaller


def mode(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """The most frequent of each two by two values: GDAL's resampling `mode`, in a fraction of its time.

    Most pixels of a map are like their neighbours, and two of them are compared as one number.

    Args:
        values: (height, width) of an unsigned integer type; where a side is odd, its last pixels stand for two.
        nodata: does not count where anything else is there.

    Returns:
        (ceil(height / 2), ceil(width / 2)); of equally frequent ones the first, row by row.
    """
    odd = [(0, side % 2) for side in values.shape]
    values = np.pad(values, odd, mode="edge") if any(map(any, odd)) else np.ascontiguousarray(values)
    bits = 8 * values.itemsize
    pairs = values.view(f"u{2 * values.itemsize}")
    upper, lower = pairs[0::2], pairs[1::2]
    found = upper.astype(values.dtype)  # the first of the pair: its lower bits
    mixed = np.nonzero((upper != lower) | (upper >> bits != found))
    if mixed[0].size:
        four = np.stack([part for pair in (upper[mixed], lower[mixed]) for part in (pair, pair >> bits)])
        four = four.astype(values.dtype)
        votes = (four[:, None] == four).sum(axis=1)
        if nodata is not None:
            votes[four == nodata] = 0
        found[mixed] = np.take_along_axis(four, votes.argmax(axis=0)[None], axis=0)[0]
    return found


def _with_overviews(path: str, *overviews: str) -> str:
    """A VRT of a raster of one band whose overviews are these files; the raster itself if there are none."""
    if not overviews:
        return path
    rasterio.shutil.copy(path, name := f"{path}.vrt", driver="VRT")
    tree = Xml.parse(name)
    (band,) = tree.iter("VRTRasterBand")
    for one in overviews:
        overview = Xml.SubElement(band, "Overview")
        Xml.SubElement(overview, "SourceFilename").text = one
        Xml.SubElement(overview, "SourceBand").text = "1"
    tree.write(name)
    return name


def preview(path: str, edge: int = 1024) -> np.ndarray:
    """A labels COG at no more than `edge` pixels a side, from its overviews: (height, width) uint8."""
    with _quiet(), rasterio.open(path) as file:
        scale = max(file.height / edge, file.width / edge, 1)
        shape = max(round(file.height / scale), 1), max(round(file.width / scale), 1)
        return file.read(1, out_shape=shape, resampling=Resampling.nearest)


def read_png(data: bytes) -> np.ndarray:
    """What `encode_png` made of palette indices: (height, width) uint8."""
    with _quiet(), rasterio.MemoryFile(data) as memory, memory.open(driver="PNG") as file:
        return file.read(1)


def encode_png(pixels: np.ndarray, palette: dict[int, tuple[int, int, int]] | None = None) -> bytes:
    """A PNG, the same bytes everywhere.

    Args:
        pixels: (height, width) uint8 of palette indices, or (height, width, 3) uint8 red, green, blue.
        palette: colour of each index; indices that are not in it are transparent.
    """
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels, np.uint8).reshape(height, -1)
    filtered = np.hstack([np.zeros((height, 1), np.uint8), rows])  # each row begins with its filter type: none
    chunks = [_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2 if pixels.ndim == 3 else 3, 0, 0, 0))]
    if pixels.ndim == 2:
        colors = palette or {value: (value, value, value) for value in range(256)}
        chunks.append(_chunk(b"PLTE", bytes(part for value in range(256) for part in colors.get(value, (0, 0, 0)))))
        chunks.append(_chunk(b"tRNS", bytes(255 if value in colors else 0 for value in range(256))))
    chunks.append(_chunk(b"IDAT", zlib.compress(filtered.tobytes(), 6)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def rgb(color: str) -> tuple[int, int, int]:
    """`#rrggbb` -> (red, green, blue), 0 to 255."""
    return int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16)


def layers(
    classes: Sequence[tuple[int, str, str]], *, scores: bool, coverage: bool, scenes: bool = False
) -> list[Layer]:
    """The rasters of one mosaic.

    Args:
        classes: (id, name, `#rrggbb`) of each.
        scores: with the network's scores, a float32 band a class, NaN where there is no data.
        coverage: with the sum of (integer) blend weights that each pixel received, uint32, 0 where there is no data;
            in `crop` each pixel has one owner and so 1.
        scenes: with the number of scenes that each pixel comes from, uint16.
    """
    colors = tuple((class_id, rgb(color)) for class_id, _, color in classes)
    found = [Layer("labels", "uint8", ("labels",), 255, "mode", colors)]
    if scores:
        found.append(Layer("scores", "float32", tuple(name for _, name, _ in classes), float("nan"), "average"))
    if coverage:
        found.append(Layer("coverage", "uint32", ("coverage",), None, "average"))
    if scenes:
        found.append(Layer("scenes", "uint16", ("scenes",), None, "mode"))
    return found
