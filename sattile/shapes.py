"""Shapes and pixels: polygons drawn on a grid, polygons around the pixels of a class, blocks that an area touches."""

from __future__ import annotations

import math
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce
from typing import Protocol

import numpy as np
import pyproj
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

BAND = 256
"""Rows of a grid whose runs are found together; bands are counted from its first row, whatever the windows."""

BEND = 1 / 1024
"""Pixels that a side may be off from the curve that it is on the grid, if the shapes have another CRS."""

_MOST_BANDS = 32
_MOST_DRAWINGS, _MOST_SIDES = 16, 4_000_000


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


def pack(shapes: Sequence[tuple[bytes, int]]) -> bytes:
    """(WKB, value) pairs as one run of bytes, for `rasterize` and `unpack`; values 0 to 255."""
    collection = struct.pack("<BII", 1, 7, len(shapes)) + b"".join(wkb for wkb, _ in shapes)
    return collection + bytes(value for _, value in shapes)


def unpack(packed: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The shapes and values that `pack` took: (n,) of shapely's geometries, (n,) uint8."""
    count = struct.unpack_from("<I", packed, 5)[0]
    end = len(packed) - count
    return shapely.get_parts(shapely.from_wkb(packed[:end])), np.frombuffer(packed, np.uint8, offset=end)


def renumber(packed: bytes, values: Mapping[int, int]) -> bytes:
    """What `pack` took, with other values; those that are not named stay."""
    count = struct.unpack_from("<I", packed, 5)[0]
    table = np.arange(256, dtype=np.uint8)
    table[list(values)] = list(values.values())
    end = len(packed) - count
    return packed[:end] + table[np.frombuffer(packed, np.uint8, offset=end)].tobytes()


def rasterize(
    shapes: Sequence[tuple[bytes, int]] | bytes,
    crs: str | None,
    scene: OnGrid,
    window: Window,
    *,
    outside: int = IGNORE,
) -> np.ndarray:
    """Draw shapes onto a window of the scene's grid: a pixel is in a shape that holds its centre.

    Whatever the windows, together they are the scene drawn at once. Lines and points hold no pixel. What was laid on
    a scene before is kept for its next windows.

    Args:
        shapes: (WKB, value) pairs, values 0 to 255, or what `pack` made of them; later ones win.
        crs: of the shapes; None only for a scene without one (coordinates are then those of its transform).
        outside: value of the scene's pixels outside all shapes.

    Returns:
        (height, width) uint8; `IGNORE` outside the scene.

    Raises:
        Refused: if one of the two has no CRS, or a shape lies where the scene's is not defined.
    """
    labels = np.full(window.shape, IGNORE, np.uint8)
    inside = window & Window(0, 0, scene.height, scene.width)
    if inside.area:
        labels[inside.slices(window)] = outside
        _drawing(shapes, crs, scene).draw(labels[inside.slices(window)], inside)
    return labels


def aoi_mask(geometry: bytes, crs: str | None, scene: OnGrid, window: Window) -> np.ndarray:
    """Which pixels of a window have their centre in an area of interest: (height, width) bool.

    Args:
        geometry: WKB.
        crs: of the geometry, e.g. `EPSG:4326`.
    """
    return rasterize([(geometry, 1)], crs, scene, window) == 1


def near(tree: shapely.STRtree, crs: str, scene: OnGrid) -> np.ndarray:
    """Which shapes touch a scene, with sides that are straight in their own CRS, as they are drawn.

    Around a pole and on other seams of their CRS: which hold a pixel, or can't be laid there. Elsewhere one that is off
    by less than a thousandth of the scene may be among them.

    Args:
        tree: of the shapes.
        crs: of the shapes.

    Returns:
        (n,) int64, rising: their indices in the tree.
    """
    transformer = geography.transformer_between(str(scene.crs), crs)
    steps = np.linspace(0, 1, 64, endpoint=False)
    right = np.concatenate([steps, np.ones(64), 1 - steps, np.zeros(64)])
    down = np.roll(right, 64)
    here = geography.apply(scene.transform, right * scene.width, down * scene.height)
    if transformer is None:
        return np.sort(tree.query(shapely.Polygon(np.column_stack(here)), predicate="intersects"))
    boxes = _around(scene, crs)
    if boxes is None:
        middle = Affine(*scene.transform) * (scene.width / 2, scene.height / 2)
        return _on_seam(tree, crs, scene, transformer.transform(*middle))
    if not boxes:
        return np.empty(0, np.int64)
    xs, ys = (np.asarray(one) for one in transformer.transform(*here))
    back = transformer.transform(xs, ys, direction="INVERSE")
    away = np.hypot(*(one - other for one, other in zip(back, here, strict=True)))
    west, _, east, _ = boxes[len(boxes) // 2]
    if len(boxes) > 1:
        xs = (xs - (west + east) / 2 + 180) % 360 - 180 + (west + east) / 2
    outline = shapely.Polygon(np.column_stack([xs, ys]))
    areas = shapely.box(*np.transpose(boxes))
    if (away < 1e-4 * math.hypot(np.ptp(here[0]), np.ptp(here[1]))).all() and outline.is_valid:
        # Its sides are curves here, of which 64 points are a little inside.
        wider = shapely.buffer(outline, 2e-4 * max(np.ptp(xs), np.ptp(ys)), quad_segs=1)
        areas = [shapely.transform(wider, lambda at, by=box[0] - west: at + np.array([by, 0])) for box in boxes]
    return np.unique(tree.query(areas, predicate="intersects")[1])


def _on_seam(tree: shapely.STRtree, crs: str, scene: OnGrid, middle: tuple[float, float]) -> np.ndarray:
    """As `near`, where a scene's outline has no inside in the shapes' CRS.

    Args:
        middle: of the scene, in the shapes' CRS.
    """
    footprint = geography.footprint(scene.crs, scene.transform, scene.height, scene.width)
    if not len(tree.geometries) or footprint is None:
        return np.empty(0, np.int64)
    # What lies at the scene's latitudes or around it: others would be laid far beyond it, or nowhere.
    south, north = shapely.bounds(shapely.from_wkb(footprint))[[1, 3]]
    at, ring, owner = _rings(tree.geometries)
    sides = np.abs(np.diff(at, axis=0, append=at[-1:])).max(1) / (np.ptp(at, axis=0).max() / 64)
    sides[np.diff(ring, append=-1) != 0] = 1
    at, ring, _ = _divided(at, ring, np.ceil(sides).clip(1).astype(np.int64))
    _, lats = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(*at.T)
    there = (lats > 1.5 * south - 0.5 * north) & (lats < 1.5 * north - 0.5 * south)
    found = np.unique(owner[ring[there]])
    if np.isfinite(middle).all():
        found = np.union1d(found, tree.query(shapely.Point(middle), predicate="intersects"))
    return found[_have_pixels(tree.geometries[found], crs, scene)] if len(found) else found


def _have_pixels(found: np.ndarray, crs: str, scene: OnGrid) -> np.ndarray:
    """(n,) bool: which shapes hold a pixel of a scene, or can't be laid on it: who draws them says why."""
    has = np.zeros(len(found), bool)
    try:
        at, ring, owner, turns = _laid(found, crs, scene)
    except Refused:
        if len(found) == 1:
            return ~has
        half = len(found) // 2
        return np.concatenate([_have_pixels(part, crs, scene) for part in (found[:half], found[half:])])
    drawing = _Drawing(at, ring, owner, np.zeros(0, np.uint8), scene)
    for owners, *_ in drawing._found(Window(0, 0, scene.height, scene.width)):
        has[owners // turns] = True
    return has


class AoiTest:
    """Which blocks of a scene an area has pixels of, or of the ones around them.

    Args:
        aoi: WKB and its CRS.
    """

    def __init__(self, aoi: tuple[bytes, str]):
        self._aoi = aoi

    def __call__(self, scene: OnGrid, found: Sequence[Window]) -> list[bool]:
        try:
            area = _drawing([(self._aoi[0], 1)], self._aoi[1], scene)
        except Refused:
            return [True] * len(found)  # whoever draws it there says why it can't be
        return [area.touches(one.pad(1)) for one in found]


# --- a drawing: shapes laid on a grid --------------------------------------------------------------------------------

_recent: tuple[tuple[tuple[object, ...], _Drawing], ...] = ()


def _drawing(shapes: Sequence[tuple[bytes, int]] | bytes, crs: str | None, scene: OnGrid) -> _Drawing:
    """Shapes laid on a scene; those of late are kept, the last one at the end."""
    global _recent
    shapes = shapes if isinstance(shapes, bytes) else tuple(shapes)
    # Compared, not hashed: a glance where the shapes are the same objects as before.
    key = (scene.transform, scene.height, scene.width, scene.crs, crs, shapes)
    drawing = next((drawing for known, drawing in _recent if known == key), None) or _lay(shapes, crs, scene)
    kept = [one for one in _recent if one[1] is not drawing][1 - _MOST_DRAWINGS :]
    while kept and drawing.sides + sum(one.sides for _, one in kept) > _MOST_SIDES:
        del kept[0]
    _recent = (*kept, (key, drawing))
    return drawing


def in_pixels(shape: BaseGeometry, crs: str | None, scene: OnGrid) -> BaseGeometry:
    """A shape in (col, row) of a scene, as it is drawn there; of what is far from it nothing, or no more than a border.

    Raises:
        Refused: as `rasterize`.
    """
    at, ring, _, _ = _laid(np.array([shape]), crs, scene)
    _, ring, length = np.unique(ring, return_inverse=True, return_counts=True)
    whole = (length >= 4)[ring]  # what was cut to a border may have no area
    if not whole.any():
        return shapely.Polygon()
    rings = shapely.linearrings(at[whole], indices=np.unique(ring[whole], return_inverse=True)[1])
    # A point is inside if it is so by an odd number of rings: holes, and holes of what lies in holes.
    return reduce(shapely.symmetric_difference, shapely.make_valid(shapely.polygons(rings)))


def _lay(shapes: Sequence[tuple[bytes, int]] | bytes, crs: str | None, scene: OnGrid) -> _Drawing:
    if isinstance(shapes, bytes):
        found, values = unpack(shapes)
    else:
        found = shapely.from_wkb([bytes(wkb) for wkb, _ in shapes])
        values = np.array([value for _, value in shapes], np.uint8)
    at, ring, owner, turns = _laid(found, crs, scene)
    return _Drawing(at, ring, owner, np.repeat(values, turns), scene)


def _laid(found: np.ndarray, crs: str | None, scene: OnGrid) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Rings of shapes in (col, row) of a scene, as `_rings` has them; and how many owners each shape has: it may be
    laid once on each side of the antimeridian."""
    if (crs is None) != (scene.crs is None):
        which = "the shapes have" if crs is None else "the scene has"
        raise Refused(f"{which} no CRS, so the two can't be laid over each other; state it")
    transformer = geography.transformer_between(crs, scene.crs) if crs is not None and scene.crs is not None else None
    inverse = ~Affine(*scene.transform)
    if transformer is None:
        at, ring, owner = _rings(found)
        return np.column_stack(geography.apply(inverse, at[:, 0], at[:, 1])), ring, owner, 1

    def project(at: np.ndarray) -> np.ndarray:
        # An array of one point is a scalar to pyproj.
        there = np.array(transformer.transform(*(at if len(at) > 1 else at.repeat(2, axis=0)).T))[:, : len(at)]
        if not np.isfinite(there).all():
            raise Refused("a shape reaches beyond where the scene's CRS is defined; cut it to the scene first")
        return np.column_stack(geography.apply(inverse, *there))

    boxes = _around(scene, str(crs))
    if boxes is None:
        at, ring, owner = _rings(found)
        longest = np.ptp(at, axis=0).max() / 64 if len(at) else 0.0
        return *_bent(at, ring, longest, project), owner, 1
    if len(boxes) > 1:
        beyond = np.nanmax(np.abs(shapely.bounds(found)[:, ::2]), axis=1, initial=0) > 180
        found = found.copy()
        found[beyond] = [geography.within_world(one) for one in found[beyond]]
    at, ring, owner = _rings(found)
    parts = [(np.empty((0, 2)), np.empty(0, np.int64), np.empty(0, np.int64))]
    for turn, box in enumerate(boxes):
        # Each side of the antimeridian is drawn by itself: other CRSs may be torn there, too.
        part, of_ring = _bent(*_held(at, ring, box), np.ptp(box.reshape(2, 2), axis=0).max() / 16, project)
        parts.append((part, of_ring + turn * len(owner), owner * len(boxes) + turn))
    at, ring, owner = (np.concatenate(one) for one in zip(*parts, strict=True))
    return at, ring, owner, len(boxes)


def _rings(shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rings of polygons, whatever holds them: (points, 2) float64, the ring of each, and the shape of each ring."""
    owner = np.arange(len(shapes))
    for take in (shapely.get_parts, shapely.get_parts):  # multipolygons may lie in collections
        shapes, index = take(shapes, return_index=True)
        owner = owner[index]
    are = shapely.get_type_id(shapes) == shapely.GeometryType.POLYGON
    rings, index = shapely.get_rings(shapes[are], return_index=True)
    at, ring = shapely.get_coordinates(rings, return_index=True)
    return at, ring, owner[are][index]


def _around(scene: OnGrid, crs: str) -> list[np.ndarray] | None:
    """Where a scene lies in another CRS, with room around it: far from it the scene's CRS is not defined, or folds what
    it can't show.

    Returns:
        (west, south, east, north) of boxes, three of them where the CRS counts in degrees: turned by -360, 0 and 360;
        none if it does not reach here; None if the scene lies on a seam of it, such as a pole.
    """
    transformer = geography.transformer_between(str(scene.crs), crs)
    if transformer is None:
        return None
    steps = np.linspace(-0.1, 1.1, 13)
    cols, rows = (one.ravel() for one in np.meshgrid(steps * scene.width, steps * scene.height))
    here = geography.apply(scene.transform, cols, rows)
    xs, ys = (np.asarray(one) for one in transformer.transform(*here))
    if not (np.isfinite(xs).all() and np.isfinite(ys).all()):
        return None
    back = transformer.transform(xs, ys, direction="INVERSE")
    away = np.hypot(*(one - other for one, other in zip(back, here, strict=True)))
    if not (away < 0.05 * math.hypot(np.ptp(here[0]), np.ptp(here[1]))).any():
        return []  # the shape's CRS does not reach here, nor does the shape
    turns = geography.is_geographic(crs)
    if turns:
        xs = (xs - xs[84] + 180) % 360 - 180 + xs[84]  # around the middle one: the antimeridian is no seam
    # Neighbours far apart: the scene lies on a seam of the shape's CRS, such as a pole.
    for one in (xs.reshape(13, 13), ys.reshape(13, 13)):
        for axis in (0, 1):
            gaps = np.abs(np.diff(one, axis=axis))
            if gaps.max() > 10 * np.median(gaps) + np.ptp(one) / 4:
                return None
    pad = max(np.ptp(xs), np.ptp(ys)) * 0.05
    box = np.array([xs.min() - pad, ys.min() - pad, xs.max() + pad, ys.max() + pad])
    return [box + np.array([by, 0, by, 0]) for by in ((-360, 0, 360) if turns else (0,))]


def _held(at: np.ndarray, ring: np.ndarray, box: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rings as far as a box holds them. What lies outside is laid onto its border: inside nothing changes, holes and
    bow-ties included."""
    starts = np.flatnonzero(np.diff(ring, prepend=-1))
    if len(starts):
        low, high = np.minimum.reduceat(at, starts), np.maximum.reduceat(at, starts)
        meets = (low <= box[2:]).all(1) & (high >= box[:2]).all(1)
        keep = np.repeat(meets, np.diff(starts, append=len(ring)))
        at, ring = at[keep], ring[keep]
    for axis in (0, 1):
        for bound, beyond_is in ((box[axis], np.less), (box[axis + 2], np.greater)):
            beyond = beyond_is(at[:, axis], bound)
            if not beyond.any():
                continue
            follows = ring[1:] == ring[:-1]
            # Of those that are beyond, the first and the last of each run are enough.
            idle = np.zeros(len(at), bool)
            idle[1:-1] = beyond[:-2] & beyond[1:-1] & beyond[2:] & follows[:-1] & follows[1:]
            at, ring, beyond = at[~idle], ring[~idle], beyond[~idle]
            crosses = np.flatnonzero((beyond[1:] != beyond[:-1]) & (ring[1:] == ring[:-1]))
            one, next_one = at[crosses], at[crosses + 1]
            share = (bound - one[:, axis]) / (next_one[:, axis] - one[:, axis])
            at[beyond, axis] = bound
            met = one + share[:, None] * (next_one - one)
            met[:, axis] = bound
            at, ring = np.insert(at, crosses + 1, met, axis=0), np.insert(ring, crosses + 1, ring[crosses])
    return at, ring


def _bent(
    at: np.ndarray, ring: np.ndarray, longest: float, project: Callable[[np.ndarray], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Rings in pixels, with points added wherever a straight side of one CRS is more than `BEND` off the other's.

    Args:
        longest: that a side may be before it is looked at.
    """
    sides = np.flatnonzero(ring[1:] == ring[:-1])
    parts = np.ones(len(at), np.int64)
    if longest > 0:
        parts[sides] = np.ceil(np.abs(at[sides + 1] - at[sides]).max(1, initial=0) / longest).clip(1)
    at, ring, _ = _divided(at, ring, parts)
    pixels = project(at)
    sides = np.flatnonzero(ring[1:] == ring[:-1])
    for _ in range(8):  # a tear in a CRS would never end
        # Not at the middle, on which a curve that bends both ways passes through its chord.
        between = at[sides] + 0.4 * (at[sides + 1] - at[sides])
        off = project(between) - (pixels[sides] + 0.4 * (pixels[sides + 1] - pixels[sides]))
        # A parabola: half as long is a quarter as far off, and 0.96 of its most at 0.4.
        needed = np.ceil(np.sqrt(np.hypot(*off.T) / (0.96 * BEND))).clip(1, 64).astype(np.int64)
        if not (needed > 1).any():
            break
        parts = np.ones(len(at), np.int64)
        parts[sides] = needed
        finer, ring, index = _divided(at, ring, parts)
        is_new = np.diff(index, prepend=-1) == 0
        pixels, at = pixels[index], finer
        pixels[is_new] = project(at[is_new])
        sides = np.flatnonzero(parts[index] > 1)
    return pixels, ring


def _divided(at: np.ndarray, ring: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rings with the side after each point cut into so many parts; and the point that each began with."""
    if (parts == 1).all():
        return at, ring, np.arange(len(at))
    index = np.repeat(np.arange(len(at)), parts)
    share = (np.arange(len(index)) - (np.cumsum(parts) - parts)[index]) / parts[index]
    at = at[index] + share[:, None] * (at[np.minimum(index + 1, len(at) - 1)] - at[index])
    return at, ring[index], index


class _Drawing:
    """Shapes on a grid, as the runs of pixels that they hold in each row.

    A run goes from where the line through the centres of a row crosses a side to where it crosses the next one, as in
    GDAL. A crossing follows from the two ends of its side alone, as they lie in the scene: no window has a say in it.

    Args:
        at: (points, 2) of closed rings, (col, row).
        ring: of each point.
        owner: of each ring: the index of its value; the higher one is drawn later.
    """

    def __init__(self, at: np.ndarray, ring: np.ndarray, owner: np.ndarray, values: np.ndarray, scene: OnGrid):
        self._values, self._columns = values, (-2, scene.width + 2)
        at = np.round(at * 65536) / 65536
        begins = np.flatnonzero(ring[1:] == ring[:-1])
        one, other, owner = at[begins], at[begins + 1], owner[ring[begins]]
        down = (one[:, 1] < other[:, 1])[:, None]
        upper, lower = np.where(down, one, other), np.where(down, other, one)
        first, stop = (np.ceil(end[:, 1] - 0.5).clip(-1, scene.height + 1).astype(np.int64) for end in (upper, lower))
        crossing = stop > first
        self._upper, self._lower, self._owner = upper[crossing], lower[crossing], owner[crossing]
        self._first, self._stop = first[crossing], stop[crossing]
        self.sides = len(self._owner)
        # The sides of each band: those that reach into several are listed in each of them.
        top, bottom = self._first // BAND, (self._stop - 1) // BAND
        side = np.repeat(np.arange(self.sides), bottom - top + 1)
        band = np.arange(len(side)) - np.repeat(np.cumsum(bottom - top + 1) - (bottom + 1), bottom - top + 1)
        order = np.argsort(band, kind="stable")
        self._side, self._bands = side[order], band[order]
        self._runs: dict[int, tuple[np.ndarray, ...]] = {}

    def draw(self, labels: np.ndarray, window: Window) -> None:
        """Write the values of the shapes into (height, width) uint8 of a window."""
        for owner, row, start, stop in self._found(window):
            rows = (row - window.row).tolist()
            starts = np.maximum(start - window.col, 0).tolist()
            stops = np.minimum(stop - window.col, window.width).tolist()
            for at, begin, end, value in zip(rows, starts, stops, self._values[owner].tolist(), strict=True):
                labels[at, begin:end] = value

    def touches(self, window: Window) -> bool:
        """Whether a shape holds a pixel of a window, which may reach beyond the scene by one."""
        return any(len(owner) for owner, _, _, _ in self._found(window))

    def _found(self, window: Window) -> Iterator[tuple[np.ndarray, ...]]:
        """(shape, row, first column, the one after the last) of runs that a window has part in, by rows' bands; within
        one, in the order in which they are to be drawn."""
        for band in range(window.row // BAND, (window.stop_row - 1) // BAND + 1):
            if band not in self._runs:
                if len(self._runs) >= _MOST_BANDS:
                    self._runs.pop(next(iter(self._runs)))
                self._runs[band] = self._runs_of(band)
            _, row, start, stop = self._runs[band]
            has = (row >= window.row) & (row < window.stop_row) & (start < window.stop_col) & (stop > window.col)
            yield tuple(one[has] for one in self._runs[band])

    def _runs_of(self, band: int) -> tuple[np.ndarray, ...]:
        side = self._side[slice(*np.searchsorted(self._bands, [band, band + 1]))]
        first = np.maximum(self._first[side], band * BAND)
        count = np.minimum(self._stop[side], (band + 1) * BAND) - first
        row = np.arange(count.sum()) + np.repeat(first - (np.cumsum(count) - count), count)
        side = np.repeat(side, count)
        (x, y), (end_x, end_y), owner = self._upper[side].T, self._lower[side].T, self._owner[side]
        # Of the pixels in the row the first whose centre is not left of the crossing.
        crossing = np.floor((row + 0.5 - y) * (end_x - x) / (end_y - y) + x + 0.5)
        column = crossing.clip(*self._columns).astype(np.int64)
        order = np.lexsort((column, row, owner))
        owner, row, column = owner[order], row[order], column[order]
        runs = owner[::2], row[::2], column[::2], column[1::2]
        has = runs[3] > runs[2]
        return tuple(one[has].astype(np.int32) for one in runs)


# --- polygons around pixels -------------------------------------------------------------------------------------------


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
