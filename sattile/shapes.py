"""Shapes and pixels: polygons drawn on a grid, polygons around the pixels of a class, blocks that an area touches."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import rasterio.features
import shapely
from affine import Affine
from rasterio.errors import NotGeoreferencedWarning
from shapely.geometry.base import BaseGeometry

from sattile import geography, raster
from sattile.errors import Refused
from sattile.grid import Window
from sattile.schema import IGNORE

_IDENTITY = Affine.identity()


class OnGrid(Protocol):
    """What shapes can be drawn on: a scene, or a part of another grid. Fields as of `schema.Scene`."""

    @property
    def height(self) -> int: ...
    @property
    def width(self) -> int: ...
    @property
    def crs(self) -> str | None: ...
    @property
    def transform(self) -> tuple[float, float, float, float, float, float]: ...


def rasterize(shapes: Sequence[tuple[bytes, int]], crs: str | None, scene: OnGrid, window: Window) -> np.ndarray:
    """Draw shapes onto a window of the scene's grid: a pixel is in a shape that holds its centre.

    Args:
        shapes: (WKB, value) pairs, values 0 to 254; later ones win.
        crs: of the shapes; None only for a scene without one (coordinates are then those of its transform).

    Returns:
        (height, width) uint8; `IGNORE` outside all shapes and outside the scene.
    """
    labels = np.full(window.shape, IGNORE, np.uint8)
    inside = window & Window(0, 0, scene.height, scene.width)
    if not inside.area:
        return labels
    box = shapely.box(inside.col, inside.row, inside.stop_col, inside.stop_row)
    drawn = []
    for wkb, value in shapes:
        shape = _in_pixels(bytes(wkb), crs, scene.crs, scene.transform, (scene.height, scene.width))
        if not shape.is_empty and shapely.intersects(shape, box):
            # Whole numbers of 1/65536 pixel: moving them to the window's corner is exact, so windows agree.
            moved = shapely.transform(shape, lambda at: np.round(at * 65536) / 65536 - [inside.col, inside.row])
            drawn.append((moved, int(value)))
    if drawn:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            labels[inside.slices(window)] = rasterio.features.rasterize(
                drawn, out_shape=inside.shape, fill=IGNORE, transform=_IDENTITY, dtype=np.uint8
            )
    return labels


@lru_cache(maxsize=1024)
def _in_pixels(
    wkb: bytes, crs: str | None, scene_crs: str | None, transform: tuple[float, ...], size: tuple[int, int]
) -> BaseGeometry:
    """A shape in (col, row) of a scene of this height and width."""
    shape = shapely.from_wkb(wkb)
    if (crs is None) != (scene_crs is None):
        which = "the shapes have" if crs is None else "the scene has"
        raise Refused(f"{which} no CRS, so the two can't be laid over each other; state it")
    transformer = geography.transformer_between(crs, scene_crs) if crs is not None and scene_crs is not None else None
    if transformer is not None:
        shape = _near(shape, str(scene_crs), str(crs), transform, size)
        # A straight side of one CRS is a curve in the other.
        west, south, east, north = shape.bounds if not shape.is_empty else (0, 0, 0, 0)
        longest = max(east - west, north - south) / 64
        shape = shapely.segmentize(shape, longest) if longest > 0 else shape
        shape = shapely.transform(shape, lambda at: np.column_stack(transformer.transform(at[:, 0], at[:, 1])))
        if not np.isfinite(shapely.get_coordinates(shape)).all():
            raise Refused("a shape reaches beyond where the scene's CRS is defined; cut it to the scene first")
    inverse = ~Affine(*transform)
    return shapely.transform(shape, lambda at: np.column_stack(geography.apply(inverse, at[:, 0], at[:, 1])))


def _near(
    shape: BaseGeometry, scene_crs: str, crs: str, transform: tuple[float, ...], size: tuple[int, int]
) -> BaseGeometry:
    """What of a shape lies around a scene: far from it the scene's CRS is not defined, or folds what it can't show."""
    transformer = geography.transformer_between(scene_crs, crs)
    if transformer is None or shape.is_empty:
        return shape
    steps = np.linspace(-0.1, 1.1, 13)
    cols, rows = (one.ravel() for one in np.meshgrid(steps * size[1], steps * size[0]))
    here = geography.apply(transform, cols, rows)
    xs, ys = (np.asarray(one) for one in transformer.transform(*here))
    if not (np.isfinite(xs).all() and np.isfinite(ys).all()):
        return shape
    back = transformer.transform(xs, ys, direction="INVERSE")
    away = np.hypot(*(one - other for one, other in zip(back, here, strict=True)))
    if not (away < 0.05 * math.hypot(np.ptp(here[0]), np.ptp(here[1]))).any():
        return shapely.Polygon()  # the shape's CRS does not reach here, nor does the shape
    turns = geography.is_geographic(crs)
    if turns:
        xs = (xs - xs[84] + 180) % 360 - 180 + xs[84]  # around the middle one: the antimeridian is no seam
    # Neighbours far apart: the scene lies on a seam of the shape's CRS, such as a pole.
    for one in (xs.reshape(13, 13), ys.reshape(13, 13)):
        for axis in (0, 1):
            gaps = np.abs(np.diff(one, axis=axis))
            if gaps.max() > 10 * np.median(gaps) + np.ptp(one) / 4:
                return shape
    pad = max(np.ptp(xs), np.ptp(ys)) * 0.05
    box = shapely.box(xs.min() - pad, ys.min() - pad, xs.max() + pad, ys.max() + pad)
    if turns and shapely.get_dimensions(shape) == 2 and np.abs(shape.bounds[::2]).max() > 180:
        shape = geography.within_world(shape)
    if shapely.covers(box, shape):
        return shape
    # Each side of the antimeridian stays by itself: other CRSs may be torn there, too.
    boxes = [shapely.transform(box, lambda at, by=by: at + np.array([by, 0])) for by in range(-360, 361, 360)]
    cut = [shapely.intersection(shape, one) for one in (boxes if turns else [box])]
    # An edge along the box leaves lines behind.
    parts = shapely.get_parts(cut)
    return shapely.union_all(parts[shapely.get_dimensions(parts) == shapely.get_dimensions(shape)])


def in_pixels(wkb: bytes, crs: str | None, scene: OnGrid) -> BaseGeometry:
    """A shape in (col, row) of a scene, as it is drawn there; empty where the scene is far.

    Raises:
        Refused: if it can't be laid over the scene.
    """
    return _in_pixels(wkb, crs, scene.crs, scene.transform, (scene.height, scene.width))


def aoi_mask(geometry: bytes, crs: str | None, scene: OnGrid, window: Window) -> np.ndarray:
    """Which pixels of a window have their centre in an area of interest: (height, width) bool.

    Args:
        geometry: WKB.
        crs: of the geometry, e.g. `EPSG:4326`.
    """
    return rasterize([(geometry, 1)], crs, scene, window) == 1


class AoiTest:
    """Which blocks of a scene an area touches, by its pixel coordinates and within one pixel.

    Args:
        aoi: WKB and its CRS.
    """

    def __init__(self, aoi: tuple[bytes, str]):
        self._aoi = aoi

    def __call__(self, scene: OnGrid, found: Sequence[Window]) -> list[bool]:
        try:
            area = _in_pixels(*self._aoi, scene.crs, scene.transform, (scene.height, scene.width))
        except Refused:
            return [True] * len(found)  # whoever draws it there says why it can't be
        area = shapely.make_valid(area)
        shapely.prepare(area)
        sides = np.array([[one.col - 1, one.row - 1, one.stop_col + 1, one.stop_row + 1] for one in found], float)
        return list(shapely.intersects(area, shapely.box(*sides.reshape(-1, 4).T)))


def outlines(
    url: str, shape: tuple[int, int], window: Window, wanted: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Polygons around the class ids in a window of a finished labels map; see `polygonize`.

    Args:
        shape: (height, width) that the map must have.

    Raises:
        Refused: if the file can't be read, or is no map of one band of uint8 of this shape.
    """
    return polygonize(raster.read_ids(url, shape, window), wanted)


def polygonize(ids: np.ndarray, wanted: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Polygons around pixels of one class that hang together by edges (corners do not count); holes stay holes.

    Args:
        ids: (height, width) uint8.
        wanted: class ids; pixels of others are in no polygon.

    Returns:
        classes: (polygons,) uint8.
        points: (points, 2) int64, (col, row) of pixel corners; rings are closed, each polygon's first is its shell.
        rings: (rings + 1,) int64, where each begins in `points`.
        polygons: (polygons + 1,) int64, where each begins in `rings`.
    """
    is_wanted = np.zeros(256, bool)
    is_wanted[list(wanted)] = True
    classes, found, lengths, counts = [], [np.empty((0, 2), np.int64)], [0], [0]
    mask = is_wanted[ids]
    if mask.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            for shape, value in rasterio.features.shapes(ids, mask=mask, connectivity=4, transform=_IDENTITY):
                rings = shape["coordinates"]
                found += [np.array(ring, np.float64).astype(np.int64) for ring in rings]
                lengths += [len(ring) for ring in rings]
                counts.append(len(rings))
                classes.append(int(value))
    return np.array(classes, np.uint8), np.concatenate(found), np.cumsum(lengths), np.cumsum(counts)
