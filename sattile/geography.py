"""Where grids lie on Earth: CRSs and the ways between them, footprints, the size of a pixel on the ground.

Grids are given as schema.Scene gives them: height and width in pixels, a CRS as `EPSG:n` or WKT2, the six coefficients
of an affine transform. No file is opened here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np
import pyproj
import shapely
from affine import Affine
from shapely.geometry.base import BaseGeometry

from sattile.errors import Refused


def same_crs(one: str | None, other: str | None) -> bool:
    """Whether two CRSs, however written, are the same; None is only None's."""
    if one == other or one is None or other is None:
        return one == other
    return transformer_between(one, other) is None


@lru_cache(maxsize=64)
def is_geographic(crs: str) -> bool:
    """Whether a CRS counts in degrees."""
    return bool(pyproj.CRS.from_user_input(crs).is_geographic)


@lru_cache(maxsize=64)
def transformer_between(crs: str, other: str) -> pyproj.Transformer | None:
    """None if the two are the same."""
    one, two = pyproj.CRS.from_user_input(crs), pyproj.CRS.from_user_input(other)
    if one.equals(two, ignore_axis_order=True):
        return None
    try:
        return pyproj.Transformer.from_crs(one, two, always_xy=True)
    except pyproj.exceptions.ProjError as error:
        raise Refused(f"there is no way from CRS {one.name} to {two.name}: {error}") from None


@lru_cache(maxsize=64)
def _to_lonlat(crs: str) -> pyproj.Transformer | None:
    """None for a CRS that does not lie on Earth (a drawing's)."""
    try:
        return pyproj.Transformer.from_crs(pyproj.CRS.from_user_input(crs), "EPSG:4326", always_xy=True)
    except pyproj.exceptions.ProjError:
        return None


def ground_sample_distance(crs: str | None, transform: Sequence[float], height: int, width: int) -> float | None:
    """Pixel size on the ground in metres: geometric mean of both axes at the grid's centre.

    Measured on the ellipsoid; where that is the nominal size to 1 % (UTM is off by up to 0.04 % by construction),
    the nominal one is given. Web Mercator at 60 degrees is off by 2.
    """
    to_lonlat = _to_lonlat(crs) if crs else None
    if crs is None or to_lonlat is None:
        return None
    affine = Affine(*transform)
    col, row = width / 2, height / 2
    xs, ys = zip(*(affine * at for at in ((col, row), (col + 1, row), (col, row + 1))), strict=True)
    lons, lats = to_lonlat.transform(xs, ys)
    if not (np.isfinite(lons).all() and np.isfinite(lats).all()) or max(map(abs, lats)) > 90:
        return None
    _, _, metres = pyproj.Geod(ellps="WGS84").inv([lons[0]] * 2, [lats[0]] * 2, lons[1:], lats[1:])
    measured = math.sqrt(metres[0] * metres[1])
    nominal = nominal_distance(crs, transform)
    if nominal is not None and abs(measured - nominal) <= 0.01 * nominal:
        return nominal
    return measured if measured > 0 else None


def nominal_distance(crs: str, transform: Sequence[float]) -> float | None:
    """Pixel size in metres as a projected CRS has it, whatever it is on the ground; None for other CRSs."""
    definition = pyproj.CRS.from_user_input(crs)
    if not definition.is_projected:
        return None
    a, b, _, d, e, _ = transform
    return float(definition.axis_info[0].unit_conversion_factor * math.sqrt(math.hypot(a, d) * math.hypot(b, e)))


def footprint(crs: str | None, transform: Sequence[float], height: int, width: int) -> bytes | None:
    """Outline of a grid in EPSG:4326 (lon, lat) as WKB; a MultiPolygon where it crosses the antimeridian.

    Sides have 21 points each, since straight lines of one CRS are curves in another. A grid around a pole reaches up
    to it. Where corners are not on Earth (full-disk images), the hull of the pixels that are.
    """
    to_lonlat = _to_lonlat(crs) if crs else None
    if to_lonlat is None:
        return None
    steps = np.linspace(0, 1, 21)
    forth, back = steps[:-1], steps[:0:-1]
    cols = np.concatenate([forth, np.ones(20), back, np.zeros(20)]) * width
    rows = np.concatenate([np.zeros(20), forth, np.ones(20), back]) * height
    lons, lats = _project(to_lonlat, transform, cols, rows)
    good = np.isfinite(lons) & np.isfinite(lats)
    if good.all():
        shape = on_globe(lons, lats)
    else:
        grid_cols, grid_rows = (one.ravel() for one in np.meshgrid(steps * width, steps * height))
        lons, lats = _project(to_lonlat, transform, grid_cols, grid_rows)
        good = np.isfinite(lons) & np.isfinite(lats)
        shape = within_world(shapely.MultiPoint(np.column_stack([lons[good], lats[good]])).convex_hull)
    return None if shape.is_empty else shapely.to_wkb(shapely.normalize(shape))


def _project(
    to_lonlat: pyproj.Transformer, transform: Sequence[float], cols: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    lons, lats = to_lonlat.transform(*apply(transform, cols, rows))
    return np.asarray(lons), np.asarray(lats)


def apply(transform: Iterable[float], cols: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of columns and rows, by affine coefficients."""
    a, b, c, d, e, f = tuple(transform)[:6]
    return a * cols + b * rows + c, d * cols + e * rows + f


def outlines(crs: str, transform: Sequence[float], sides: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Longitudes and latitudes along the outline of each rectangle of a grid, 5 points a side; infinite off the Earth.

    Args:
        sides: (n, 4) first row, first column, last row and last column of each, in pixels.
    """
    forth, back = np.linspace(0, 1, 5)[:-1], np.linspace(1, 0, 5)[:-1]
    down = np.concatenate([np.zeros(4), forth, np.ones(4), back])
    right = np.concatenate([forth, np.ones(4), back, np.zeros(4)])
    top, left, bottom, end = (side[:, None] for side in np.asarray(sides, np.float64).reshape(-1, 4).T)
    x, y = apply(transform, left + right * (end - left), top + down * (bottom - top))
    lons, lats = pyproj.Transformer.from_crs(crs, 4326, always_xy=True).transform(x, y)
    return list(zip(lons, lats, strict=True))


def on_globe(lons: np.ndarray, lats: np.ndarray) -> BaseGeometry:
    """A closed line of points over the globe as what it holds: in two parts where it crosses the antimeridian, up to
    the pole where it goes around one."""
    if np.ptp(lons) <= 180 and np.abs(lons).max() <= 180 and np.abs(lats).max() <= 90:
        return _valid_polygon(np.column_stack([lons, lats]))
    turned = np.unwrap(np.append(lons, lons[0]), period=360)
    points = np.column_stack([turned, np.append(lats, lats[0])])
    if abs(turned[-1] - turned[0]) > 180:
        pole = math.copysign(90, lats.mean())
        points = np.vstack([points, [[turned[-1], pole], [turned[0], pole]]])
    return within_world(_valid_polygon(points))


def _valid_polygon(points: np.ndarray) -> BaseGeometry:
    shape = shapely.Polygon(points)
    return shape if shape.is_valid else shapely.make_valid(shape)


def within_world(shape: BaseGeometry) -> BaseGeometry:
    """Polygons of any longitudes, in those from -180 to 180; cut where they cross the antimeridian."""
    parts = []
    west, _, east, _ = shape.bounds if not shape.is_empty else (0, 0, 0, 0)
    for turn in range(math.floor((west + 180) / 360), math.floor((east + 180) / 360) + 1):
        world = shapely.box(-180 + 360 * turn, -90, 180 + 360 * turn, 90)
        part = shapely.intersection(shape, world)
        moved = shapely.transform(part, lambda at, turn=turn: at - [360 * turn, 0])
        parts += [one for one in shapely.get_parts(moved) if one.geom_type == "Polygon" and one.area > 0]
    return shapely.union_all(parts) if parts else shapely.Polygon()
