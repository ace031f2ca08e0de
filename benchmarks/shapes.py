"""Drawing many shapes and a long coast, window by window, against one `rasterio.features.rasterize` of the whole scene.

That one is given shapes that are in pixels already. sattile takes WKB, lays it onto the scene from another CRS and from
the scene's own, finds what each window needs, and draws that. Processor seconds of one process.
"""

from __future__ import annotations

import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pyproj
import rasterio.features
import shapely
from rasterio.errors import NotGeoreferencedWarning

from sattile import grid, shapes
from sattile.grid import Window

TILE = 128
"""Edge of the windows; and the height of the strips that `sattile tile` reads for tiles of this size."""


@dataclass(frozen=True)
class Scene:
    height: int
    width: int
    crs: str = "EPSG:32633"
    transform: tuple[float, float, float, float, float, float] = (1, 0, 500_000, 0, -1, 5_000_000)


def main(repeats: int = 3, *, edge: int = 2048, footprints: int = 20_000, vertices: int = 400_000) -> dict[str, float]:
    """Print and return the ratios.

    Args:
        edge: of the scene, in pixels.
        footprints: number of small shapes on it.
        vertices: of a coast across it.
    """
    scene = Scene(edge, edge)
    windows = grid.blocks(edge, edge, TILE)
    strips = [Window(row, 0, TILE, edge) for row in range(0, edge, TILE)]
    ratios, numbers = {}, itertools.count()
    for name, drawing in (
        (f"{footprints} footprints", houses(edge, footprints)),
        (f"a coast of {vertices} vertices", coast(edge, vertices)),
    ):
        values = [1 + index % 2 for index in range(len(drawing))]
        plain = _seconds(repeats, partial(at_once, drawing, values, edge))
        for crs in ("EPSG:4326", scene.crs):
            wkb = shapely.to_wkb(on_ground(drawing, scene, crs)).tolist()
            packed = shapes.pack(list(zip(wkb, values, strict=True)))
            ways: dict[str, Callable[[Scene], Any]] = {
                f"labels, {len(windows)} windows": partial(labels, packed, crs, windows),
                f"labels, {len(strips)} strips": partial(labels, packed, crs, strips),
            }
            if len(drawing) == 1:
                ways[f"area, {len(windows)} windows"] = partial(area, wkb[0], crs, windows)
                ways["area, which windows it touches"] = partial(touched, wkb[0], crs, windows)
            for way, work in ways.items():
                taken = _seconds(repeats, partial(on_another, scene, numbers, work))
                ratios[f"{name} in {crs}, {way}"] = taken / plain
                print(
                    f"shapes, {name} in {crs}, {way}: {taken / plain:.2f} ({taken:.2f} against {plain:.2f} s)",
                    flush=True,
                )
    return ratios


def houses(edge: int, count: int) -> np.ndarray:
    """Rectangles of 2 to 6 px all over a scene, in (col, row)."""
    rng = np.random.default_rng(0)
    left, top, size = rng.uniform(5, edge - 8, count), rng.uniform(5, edge - 8, count), rng.uniform(2, 6, count)
    return np.asarray(shapely.box(left, top, left + size, top + size))


def coast(edge: int, count: int) -> np.ndarray:
    """One polygon, the ground left of a jagged line from above a scene to below it."""
    rng = np.random.default_rng(0)
    rows = np.linspace(-0.05 * edge, 1.05 * edge, count)
    wander = np.cumsum(rng.normal(0, 1, count)) * edge / 20 / count**0.5
    cols = edge / 2 + edge / 7 * np.sin(rows / edge * 10) + wander + rng.normal(0, edge / 2000, count)
    corners = [(-0.1 * edge, rows[-1]), (-0.1 * edge, rows[0])]
    return np.array([shapely.Polygon(np.vstack([np.column_stack([cols, rows]), corners]))])


def on_ground(drawing: np.ndarray, scene: Scene, crs: str) -> np.ndarray:
    west, north = scene.transform[2], scene.transform[5]
    placed = shapely.transform(drawing, lambda at: at * [1, -1] + [west, north])
    way = pyproj.Transformer.from_crs(scene.crs, crs, always_xy=True)
    return np.asarray(shapely.transform(placed, lambda at: np.column_stack(way.transform(at[:, 0], at[:, 1]))))


def at_once(drawing: np.ndarray, values: list[int], edge: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        pairs = list(zip(drawing.tolist(), values, strict=True))
        return rasterio.features.rasterize(pairs, out_shape=(edge, edge), fill=255, dtype=np.uint8)


def labels(packed: bytes, crs: str, windows: list[Window], scene: Scene) -> None:
    for window in windows:
        shapes.rasterize(packed, crs, scene, window)


def area(wkb: bytes, crs: str, windows: list[Window], scene: Scene) -> None:
    for window in windows:
        shapes.aoi_mask(wkb, crs, scene, window)


def touched(wkb: bytes, crs: str, windows: list[Window], scene: Scene) -> None:
    shapes.AoiTest((wkb, crs))(scene, windows)


def on_another(scene: Scene, number: Iterator[int], work: Callable[[Scene], Any]) -> None:
    """Work on a scene that nothing was laid on before: each a little further east."""
    a, b, west, d, e, north = scene.transform
    work(replace(scene, transform=(a, b, west + next(number) * 1e-6, d, e, north)))


def _seconds(repeats: int, work: Callable[[], Any]) -> float:
    taken = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        taken.append(time.process_time() - begin)
    return statistics.median(taken)
