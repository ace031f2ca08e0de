"""One pixel grid under many scenes: which of its pixels a scene reaches, and a scene's scores brought onto it.

The coordinates of a pixel are computed from its own number and a lattice anchored to the grid, never from the block
that it is computed in: any cut into blocks gives the same numbers. (GDAL's warper chooses its approximation by the
window it is asked for; between two UTM zones that alone changes most pixels by a little.)
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyproj
from affine import Affine

from sattile import geography, raster
from sattile.errors import UsageError
from sattile.grid import Window
from sattile.schema import Scene

SPACING = 16
"""Pixels between two points of the lattice on which projections are computed; between them they are interpolated."""

TOLERANCE = 0.01
"""Pixels that an interpolated position may be off; where it is more (a pole, a seam), every pixel is projected."""

POINTS = 1 << 19
"""Points that are resampled at once: their arrays fit the CPU's cache."""

MOST_POINTS, MOST_FINER = 512, 256
"""How much coarser and finer than a scene a grid may be, along one axis; beyond, its units are mistaken."""

WORLD = 360.0

HALF_AROUND = 20_037_508.342789244
"""Half around the Earth, in metres: pi times the equator's radius."""


@dataclass(frozen=True)
class Grid:
    """A pixel grid on Earth.

    Attributes:
        crs: `EPSG:n` or WKT2.
        transform: affine coefficients (a, b, c, d, e, f) as in `schema.Scene`, of pixel (0, 0).
        limits: the pixels it has; None for as many as scenes reach.
        is_file: it is that of a file, and covers that as a whole.
    """

    crs: str
    transform: tuple[float, float, float, float, float, float]
    limits: Window | None = None
    is_file: bool = False

    @property
    def world(self) -> Window | None:
        """The pixels that it can have: `limits`, else those on Earth; None where nothing is known of that."""
        return self.limits or _world(self.crs, self.transform)

    def of(self, window: Window) -> tuple[float, float, float, float, float, float]:
        """Affine coefficients of a window of this grid."""
        a, b, c, d, e, f = self.transform
        return a, b, c + a * window.col + b * window.row, d, e, f + d * window.col + e * window.row


@lru_cache(maxsize=64)
def _world(crs: str, transform: tuple[float, ...]) -> Window | None:
    """Pixels of a projected CRS no farther from its origin, along either axis, than half around the Earth.

    Web Mercator ends there. Others run on for ever, with coordinates of what they were not made for.
    """
    definition = pyproj.CRS.from_user_input(crs)
    a, b, west, d, e, north = transform
    if not definition.is_projected or definition.coordinate_operation is None or b or d:
        return None
    origin = [0.0, 0.0]
    for one in definition.coordinate_operation.params:
        for axis, name in enumerate(("easting", "northing")):
            if name in one.name.lower() and isinstance(one.value, float):
                origin[axis] = one.value * one.unit_conversion_factor
    unit = definition.axis_info[0].unit_conversion_factor
    (left, right), (top, bottom) = (
        sorted(((middle + side) / unit - start) / step for side in (-HALF_AROUND, HALF_AROUND))
        for middle, start, step in zip(origin, (west, north), (a, e), strict=True)
    )
    row, col = math.floor(top + 1e-6), math.floor(left + 1e-6)
    return Window(row, col, math.ceil(bottom - 1e-6) - row, math.ceil(right - 1e-6) - col)


def parse_grid(text: str) -> Grid:
    """`EPSG:32633@10`: pixels of 10 units of that CRS, whose corners lie on multiples of 10.

    Raises:
        UsageError: for a CRS that PROJ does not know, or a resolution that can't be one.
    """
    match = re.fullmatch(r"\s*([A-Za-z]+:\d+)\s*@\s*([0-9.eE+-]+)\s*", text)
    if not match:
        raise UsageError(f"grid {text!r}: write EPSG:N@RES, such as EPSG:32633@10 (RES in units of the CRS)")
    try:
        crs = pyproj.CRS.from_user_input(match.group(1).upper())
    except pyproj.exceptions.CRSError:
        raise UsageError(f"grid {text!r}: PROJ knows no {match.group(1)}") from None
    try:
        resolution = float(match.group(2))
    except ValueError:
        raise UsageError(f"grid {text!r}: {match.group(2)} is no number") from None
    if not math.isfinite(resolution) or resolution <= 0:
        raise UsageError(f"grid {text!r}: the resolution must be more than 0")
    if not (crs.is_projected or crs.is_geographic) or len(crs.axis_info) != 2:
        raise UsageError(f"grid {text!r}: {crs.name} is no map of two axes; use a projected or geographic CRS")
    if crs.is_geographic and resolution > 1:
        raise UsageError(
            f"grid {text!r}: {crs.name} counts in degrees, and pixels of {resolution:g} degrees are no map; for about "
            f"{resolution:g} m write {match.group(1)}@{resolution / 111_320:.2g}"
        )
    grid = Grid(match.group(1).upper(), (resolution, 0.0, 0.0, 0.0, -resolution, 0.0))
    if not crs.is_geographic:
        return grid
    # Nothing lies beyond a pole or the antimeridian.
    cols, rows = math.ceil(WORLD / 2 / resolution), math.ceil(WORLD / 4 / resolution)
    return Grid(grid.crs, grid.transform, Window(-rows, -cols, 2 * rows, 2 * cols))


def grid_like(found: raster.FileInfo) -> Grid:
    """The grid of a raster.

    Raises:
        UsageError: if it has no CRS.
    """
    if found.crs is None:
        raise UsageError(f"--like {found.url} has no CRS, so scenes can't be laid on its grid")
    return Grid(found.crs, found.transform, Window(0, 0, found.height, found.width), True)


@dataclass(frozen=True)
class Cut:
    """Points of a grid's window in pixels of a scene; see `Warp.cut`.

    Attributes:
        window: of the grid.
        need: the scene's pixels that are looked at, inside the scene; of area 0 if there are none.
        nodes: for a projection, (row, col) in the scene of the lattice's points, (2, n, m); None for an affine map.
        bad: cells of the lattice, (n - 1, m - 1) bool, in which every pixel is projected by itself.
    """

    window: Window
    need: Window
    nodes: np.ndarray | None = None
    bad: np.ndarray | None = None


class Warp:
    """Brings scores from a scene's grid onto another.

    Scores and weights are interpolated bilinearly from the valid ones of the four pixels around a point. A pixel of the
    grid is valid where the scene's pixel that holds its centre is. Where the grid is coarser than the scene, a pixel
    is the mean over `points` x `points` points in it, and valid where half of them are.

    Args:
        grid: to.
        scene: from; has a CRS.
    """

    def __init__(self, grid: Grid, scene: Scene):
        assert scene.crs is not None
        self.grid, self.shape = grid, (scene.height, scene.width)
        self._to_grid, self._to_scene = Affine(*grid.transform), ~Affine(*scene.transform)
        self._there = geography.transformer_between(grid.crs, scene.crs)
        self._centre = Affine(*scene.transform) * (scene.width / 2, scene.height / 2)
        self._wraps = geography.is_geographic(scene.crs), geography.is_geographic(grid.crs)
        if self._there is None and self._wraps[0] and self._leaves_the_world(scene):
            # Degrees on both sides, and yet not one map: longitudes have to be turned.
            self._there = _identity()
        self._between = self._to_scene * self._to_grid
        jacobian = self._jacobian(scene)
        self.stretch = float(np.abs(jacobian).sum(axis=1).max())
        self.points = max(round(math.sqrt(abs(np.linalg.det(jacobian)))), 1)
        between = self._between
        upright = max(abs(between.b), abs(between.d)) * max(self.shape) < 1e-3 * min(abs(between.a), abs(between.e))
        self._separable = self._there is None and upright

    @property
    def world(self) -> Window | None:
        """The pixels of the grid that the scene can have a part in; None for all."""
        return self.grid.limits if self._there is None else self.grid.world

    def misfit(self) -> str | None:
        """Why the grid's resolution can't be meant for this scene, and which could; None if it can."""
        if not self.stretch or (self.stretch >= 1 / MOST_FINER and self.points <= MOST_POINTS):
            return None
        wide = math.hypot(self.grid.transform[0], self.grid.transform[3])
        how = f"{self.points:,} times as wide as" if self.points > 1 else f"{1 / self.stretch:,.0f} times finer than"
        return (
            f"pixels of the grid ({wide:g} units of its CRS) are {how} the scene's; for about the scene's own give "
            f"{self.grid.crs.partition('[')[0]}@{wide / self.stretch:.2g}"
        )

    # -- where things lie

    def _leaves_the_world(self, scene: Scene) -> bool:
        corners = [
            Affine(*scene.transform) * at
            for at in ((0, 0), (scene.width, 0), (0, scene.height), (scene.width, scene.height))
        ]
        xs = [x for x, _ in corners]
        if self.grid.limits is None:
            return min(xs) < -WORLD / 2 or max(xs) > WORLD / 2
        box = self.grid.limits
        edges = [(self._to_grid * (col, 0))[0] for col in (box.col, box.stop_col)]
        slack = abs(self.grid.transform[0])
        return min(xs) < min(edges) - slack or max(xs) > max(edges) + slack

    def _jacobian(self, scene: Scene) -> np.ndarray:
        """(2, 2): rows and columns of the scene for a row and a column of the grid, as near its centre as there is one;
        zeros if the two share no ground."""
        if self._there is None:
            between = self._between
            return np.array([[between.e, between.d], [between.b, between.a]])
        rows, cols = (one.ravel() for one in np.meshgrid(*[np.linspace(0.04, 0.96, 9)] * 2))
        nearest = np.argsort(np.hypot(rows - 0.5, cols - 0.5), kind="stable")
        at = self._forward(rows[nearest] * scene.height, cols[nearest] * scene.width)
        with np.errstate(invalid="ignore"):
            ends = [
                np.array(
                    [self._project(at[0] + sign, at[1], check=False), self._project(at[0], at[1] + sign, check=False)]
                )
                for sign in (-0.5, 0.5)
            ]
            found = np.moveaxis(ends[1] - ends[0], 2, 0).transpose(0, 2, 1)
        good = np.isfinite(found).all(axis=(1, 2)) & (np.abs(np.nan_to_num(found)).max(axis=(1, 2)) > 0)
        return found[good.argmax()] if good.any() else np.zeros((2, 2))

    def _project(self, rows: np.ndarray, cols: np.ndarray, check: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """(row, col) in the scene of points of the grid in pixels; NaN where a projection does not lead back."""
        assert self._there is not None
        g = self._to_grid
        xs, ys = g.a * cols + g.b * rows + g.c, g.d * cols + g.e * rows + g.f
        sx, sy = _transform(self._there, xs, ys)
        if self._wraps[0]:
            with np.errstate(invalid="ignore"):
                sx = (sx - self._centre[0] + WORLD / 2) % WORLD - WORLD / 2 + self._centre[0]
        t = self._to_scene
        at_row, at_col = t.d * sx + t.e * sy + t.f, t.a * sx + t.b * sy + t.c
        if not check:
            return at_row, at_col
        bx, by = _transform(self._there, sx, sy, inverse=True)
        with np.errstate(invalid="ignore"):
            dx, dy = bx - xs, by - ys
            if self._wraps[1]:
                dx = (dx + WORLD / 2) % WORLD - WORLD / 2
            pixel = math.sqrt(abs(g.determinant))
            wrong = ~(np.isfinite(at_row) & np.isfinite(at_col) & (np.hypot(dx, dy) < pixel / 2))
        return np.where(wrong, np.nan, at_row), np.where(wrong, np.nan, at_col)

    def reach(self, edge: int) -> list[Window]:
        """Blocks of `edge` x `edge` of the grid's lattice that the scene may reach, in order; some may prove empty."""
        found: set[tuple[int, int]] = set()
        height, width = self.shape
        if not self.stretch:
            return []
        step = max(edge * self.stretch / 4, 1.0)  # a quarter of a block
        rows = np.linspace(0, height, max(math.ceil(height / step), 1) + 1)
        cols = np.linspace(0, width, max(math.ceil(width / step), 1) + 1)
        at = self._forward(*np.meshgrid(rows, cols, indexing="ij"))
        corners = np.stack([at[:, :-1, :-1], at[:, 1:, :-1], at[:, :-1, 1:], at[:, 1:, 1:]])
        low, high = corners.min(axis=0), corners.max(axis=0)
        size = (high - low).max(axis=0)
        usual = self._usual(height / (len(rows) - 1), width / (len(cols) - 1)) or float(edge)
        torn = ~(size <= 8 * usual + 4)
        # A straight side of one CRS is a curve in the other.
        pads = 2 + 0.1 * size[~torn]
        found |= _blocks_over(low[:, ~torn] - pads, high[:, ~torn] + pads, edge)
        for r, c in zip(*np.nonzero(torn), strict=True):
            # A seam of the grid's CRS runs through this cell: by points, each with what surrounds it.
            inner = np.meshgrid(np.linspace(rows[r], rows[r + 1], 33), np.linspace(cols[c], cols[c + 1], 33))
            points = self._forward(*inner).reshape(2, -1)
            points = points[:, np.isfinite(points).all(axis=0)]
            found |= _blocks_over(points - usual / 4 - 2, points + usual / 4 + 2, edge)
        windows = [Window(row * edge, col * edge, edge, edge) for row, col in sorted(found)]
        return windows if self.world is None else [one for one in windows if (one & self.world).area]

    def _usual(self, height: float, width: float) -> float:
        """How far, in pixels of the grid, a part of the scene of so many rows and columns usually goes; 0 if nowhere.

        By small steps: of a few large ones a seam may run through most.
        """
        rows, cols = (np.linspace(0, extent, 33) for extent in self.shape)
        at = self._forward(*np.meshgrid(rows, cols, indexing="ij"))
        found = 0.0
        for axis, share in ((1, height / self.shape[0]), (2, width / self.shape[1])):
            steps = np.abs(np.diff(at, axis=axis)).max(axis=0)
            if np.isfinite(steps).any():
                found = max(found, 32 * share * float(np.median(steps[np.isfinite(steps)])))
        return found

    def extent(self) -> Window | None:
        """The smallest window of the grid that holds the scene; None where a seam of the grid's CRS cuts it."""
        height, width = self.shape
        at = self._forward(*np.meshgrid(np.linspace(0, height, 33), np.linspace(0, width, 33), indexing="ij"))
        steps = [np.abs(np.diff(at, axis=axis)).max(axis=0) for axis in (1, 2)]
        if not np.isfinite(at).all() or any(one.max() > 8 * np.median(one) + 4 for one in steps):
            return None
        # A straight side of one CRS is a curve in the other, and bulges between two points.
        slack = 1 + 0.01 * max(one.max() for one in steps) * (self._there is not None)
        row, col = np.floor(at.min(axis=(1, 2)) - slack + 1).astype(int)
        stop_row, stop_col = np.ceil(at.max(axis=(1, 2)) + slack - 1).astype(int)
        return Window(int(row), int(col), int(stop_row - row), int(stop_col - col))

    def touches(self, blocks: Sequence[Window]) -> list[bool]:
        """Which windows of the grid have a pixel that the scene gives something to."""
        if self._separable or not blocks:
            return [bool(self.cut(one).need.area) for one in blocks]
        steps = np.linspace(0, 1, 9)
        rows = np.array([one.row + steps * one.height for one in blocks])
        cols = np.array([one.col + steps * one.width for one in blocks])
        shape = (len(blocks), 9, 9)
        at = self._at(np.broadcast_to(rows[:, :, None], shape), np.broadcast_to(cols[:, None, :], shape))
        size = np.array(self.shape)[:, None, None, None]
        with np.errstate(invalid="ignore"):
            inner = ((at > 1) & (at < size - 1)).all(axis=0).any(axis=(1, 2))
            # All on one side of the scene: some before and some behind it may have it between them.
            far = ((at < -8).all(axis=(2, 3)) | (at > size + 8).all(axis=(2, 3))).any(axis=0)
        return [
            bool(hit or (not away and self.cut(one).need.area))
            for one, hit, away in zip(blocks, inner, far, strict=True)
        ]

    def _forward(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """(2, ...): row and column in the grid of points of the scene; NaN or infinite where there are none."""
        xs, ys = geography.apply(~self._to_scene, cols, rows)
        if self._there is not None:
            xs, ys = _transform(self._there, xs, ys, inverse=True)
        if self._wraps[1] and self._there is not None:
            left = (self._to_grid * (self.grid.limits.col, 0))[0] if self.grid.limits else -WORLD / 2
            with np.errstate(invalid="ignore"):
                xs = (xs - left) % WORLD + left
        grid_cols, grid_rows = geography.apply(~self._to_grid, xs, ys)
        found = np.stack([grid_rows, grid_cols])
        world = None if self._there is None else _world(self.grid.crs, self.grid.transform)
        if world is not None:
            with np.errstate(invalid="ignore"):
                beyond = (grid_rows < world.row - 1) | (grid_rows > world.stop_row + 1)
                beyond |= (grid_cols < world.col - 1) | (grid_cols > world.stop_col + 1)
            found[:, beyond] = np.nan
        return found

    def cut(self, window: Window) -> Cut:
        """What is needed of the scene for a window of the grid."""
        if self._separable:
            rows, cols = self._axes(window)
            if rows.empty or cols.empty:
                return Cut(window, Window(0, 0, 0, 0))
            need = Window(rows.start, cols.start, rows.stop - rows.start, cols.stop - cols.start)
            copied = self.points == 1 and rows.whole and cols.whole
            return Cut(window, need if copied else need.pad(1) & Window(0, 0, *self.shape))
        down = np.arange(window.row // SPACING, -(-window.stop_row // SPACING) + 1) * float(SPACING)
        right = np.arange(window.col // SPACING, -(-window.stop_col // SPACING) + 1) * float(SPACING)
        nodes = self._at(*np.meshgrid(down, right, indexing="ij"))
        middle = self._at(*np.meshgrid(down[:-1] + SPACING / 2, right[:-1] + SPACING / 2, indexing="ij"))
        corners = np.stack([nodes[:, :-1, :-1], nodes[:, 1:, :-1], nodes[:, :-1, 1:], nodes[:, 1:, 1:]])
        with np.errstate(invalid="ignore"):
            off = np.abs(corners.mean(axis=0) - middle).max(axis=0)
        nowhere = np.isnan(corners).any(axis=1).all(axis=0) & np.isnan(middle).any(axis=0)
        bad = ~(off <= TOLERANCE * max(self.stretch, 1.0)) & ~nowhere
        low, high = corners.min(axis=0), corners.max(axis=0)
        for r, c in zip(*np.nonzero(bad), strict=True):
            cell = Window(int(down[r]), int(right[c]), SPACING, SPACING)
            points = self._at(*_centres(cell, self.points))
            good = np.isfinite(points).all(axis=0)
            low[:, r, c], high[:, r, c] = np.nan, np.nan
            if good.any():
                low[:, r, c], high[:, r, c] = points[:, good].min(axis=1), points[:, good].max(axis=1)
        size = np.array(self.shape)[:, None, None]
        with np.errstate(invalid="ignore"):
            inside = ((high > -1) & (low < size + 1)).all(axis=0)
        if not inside.any():
            return Cut(window, Window(0, 0, 0, 0))
        # One more on each side: which way a pixel is computed looks at its neighbours.
        first = np.floor(low[:, inside].min(axis=1) - 0.5).astype(int) - 1
        last = np.floor(high[:, inside].max(axis=1) - 0.5).astype(int) + 3
        row, col = np.clip(first, 0, self.shape)
        stop_row, stop_col = np.clip(last, 0, self.shape)
        need = Window(int(row), int(col), int(stop_row - row), int(stop_col - col))
        return Cut(window, need if need.area else Window(0, 0, 0, 0), nodes, bad)

    def _at(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        if self._there is None:
            t = self._between
            return np.stack([t.d * cols + t.e * rows + t.f, t.a * cols + t.b * rows + t.c])
        found = self._project(rows.ravel(), cols.ravel())
        return np.stack([one.reshape(rows.shape) for one in found])

    def _axes(self, window: Window) -> tuple[Axis, Axis]:
        t = self._between
        return (
            Axis(window.row, window.height, t.e, t.f, self.shape[0], self.points),
            Axis(window.col, window.width, t.a, t.c, self.shape[1], self.points),
        )

    # -- resampling

    def apply(self, cut: Cut, scores: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Scores and weights on the grid.

        Args:
            cut: of `self.cut`, with a need.
            scores: (height, width, classes) float32 of `cut.need`.
            weights: (height, width) integers of `cut.need`, 0 where the scene is not valid.

        Returns:
            scores: (height, width, classes) float32 of the window; anything where the weight is 0.
            weights: (height, width) uint32 of the window; 0 where there is nothing.
        """
        window = cut.window
        found = np.zeros((*window.shape, scores.shape[-1]), np.float32)
        weight = np.zeros(window.shape, np.uint32)
        axes = self._axes(window) if self._separable else None
        if axes and self.points == 1 and axes[0].whole and axes[1].whole:
            rows, cols = (np.flatnonzero(one.inside) for one in axes)
            there = slice(rows[0], rows[-1] + 1), slice(cols[0], cols[-1] + 1)
            found[there], weight[there] = scores, weights
            return found, weight
        step = max(POINTS // (window.width * self.points**2), 1)
        for start in range(0, window.height, step):
            strip = slice(start, min(start + step, window.height))
            at = (
                _Places.on_axes(axes[0].part(strip), axes[1], cut.need)
                if axes
                else _Places.at(self._points(cut, strip), cut.need)
            )
            if at is not None:
                found[strip], weight[strip] = at.mix(scores, weights, self.points)
        return found, weight

    def _points(self, cut: Cut, strip: slice) -> np.ndarray:
        """(2, rows, cols): row and column in the scene of all points of some rows of a window; NaN for none."""
        window, count = cut.window, self.points
        rows = _points(window.row + strip.start, strip.stop - strip.start, count)
        cols = _points(window.col, window.width, count)
        if self._there is None:
            return self._at(*np.meshgrid(rows, cols, indexing="ij"))
        assert cut.nodes is not None
        assert cut.bad is not None
        i = (rows // SPACING).astype(int) - window.row // SPACING
        j = (cols // SPACING).astype(int) - window.col // SPACING
        s, t = (rows % SPACING / SPACING)[:, None], cols % SPACING / SPACING
        found = np.empty((2, len(rows), len(cols)))
        first = i[0]
        for axis, nodes in enumerate(cut.nodes):
            some = nodes[first : i[-1] + 2]
            along = some[:, j] * (1 - t) + some[:, j + 1] * t
            found[axis] = along[i - first] * (1 - s) + along[i - first + 1] * s
        torn = cut.bad[i][:, j]
        if torn.any():
            r, c = np.nonzero(torn)
            found[:, r, c] = self._at(rows[r], cols[c])
        return found


class Axis(raster.Axis):
    """Of points along one axis of a window, where grid and scene are parallel."""

    def __init__(self, begin: int, length: int, step: float, offset: float, extent: int, points: int):
        # Transforms carry the noise of their last digits: a thousandth of a pixel over a whole scene is none.
        step = float(round(step)) if abs(step - round(step)) < 1e-9 and round(step) else step
        offset = round(offset, 3)
        super().__init__(_points(begin, length, points) * step + offset, extent)
        self.points = points
        if self.empty:
            return
        # Without a share between two pixels, scores are copied.
        self.whole = bool(step == 1 and not self.share.any())
        used = [index[self.inside] for index in (self.nearest,) + (() if self.whole else (self.low, self.high))]
        self.start = int(min(one.min() for one in used))
        self.stop = int(max(one.max() for one in used)) + 1

    def part(self, rows: slice) -> Axis:
        """Some pixels of it."""
        found = object.__new__(Axis)
        found.__dict__ |= self.__dict__
        some = slice(rows.start * self.points, rows.stop * self.points)
        for name in ("inside", "share", "low", "high", "nearest"):
            setattr(found, name, getattr(self, name)[some])
        return found


@dataclass(frozen=True)
class _Places:
    """The four pixels of a scene around each point, by row and column, and how far from the first.

    Arrays of rows and columns broadcast: (h, 1) and (1, w) where both grids are parallel, else (h, w) each.

    Attributes:
        top, bottom, left, right: pixel numbers.
        down, across: share of bottom and of right.
        row, col: the pixel that holds the point.
        inside: (h, w) bool: whether there is one.
    """

    top: np.ndarray
    bottom: np.ndarray
    left: np.ndarray
    right: np.ndarray
    down: np.ndarray
    across: np.ndarray
    row: np.ndarray
    col: np.ndarray
    inside: np.ndarray

    @classmethod
    def on_axes(cls, rows: Axis, cols: Axis, need: Window) -> _Places | None:
        inside = rows.inside[:, None] & cols.inside
        if not inside.any():
            return None
        down = ((one - need.row).clip(0, need.height - 1)[:, None] for one in (rows.low, rows.high, rows.nearest))
        right = ((one - need.col).clip(0, need.width - 1)[None] for one in (cols.low, cols.high, cols.nearest))
        (top, bottom, row), (left, after, col) = down, right
        return cls(
            top, bottom, left, after, rows.share[:, None], cols.share[None], row, col, inside
        )  # fmt: skip

    @classmethod
    def at(cls, points: np.ndarray, need: Window) -> _Places | None:
        """Of points given by (row, col) in the scene, (2, h, w); NaN for none."""
        rows, cols = points[0] - need.row, points[1] - need.col
        with np.errstate(invalid="ignore"):
            inside = (rows >= 0) & (rows < need.height) & (cols >= 0) & (cols < need.width)
        if not inside.any():
            return None
        if not inside.all():
            rows, cols = np.where(inside, rows, 0.5), np.where(inside, cols, 0.5)
        top, left = np.floor(rows - 0.5), np.floor(cols - 0.5)
        down, across = rows - 0.5 - top, cols - 0.5 - left
        top, left = top.astype(np.int64), left.astype(np.int64)
        last_row, last_col = need.height - 1, need.width - 1
        return cls(
            np.maximum(top, 0), np.minimum(top + 1, last_row), np.maximum(left, 0), np.minimum(left + 1, last_col),
            down, across, rows.astype(np.int64), cols.astype(np.int64), inside,
        )  # fmt: skip

    def mix(self, scores: np.ndarray, weights: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Warp.apply`; a pixel has `points` x `points` of these points."""
        # And the row below, which decides how a pixel of the last one is computed.
        first, last = int(min(self.top.min(), self.row.min())), int(max(self.bottom.max(), self.row.max())) + 2
        scores, weights = scores[first:last], weights[first:last]
        height, width = weights.shape
        flat, flat_weights = scores.reshape(height * width, -1), weights.reshape(-1)
        rows = [(one - first) * width for one in (self.top, self.bottom)]
        corners = [row + col for row in rows for col in (self.left, self.right)]
        own = flat_weights[(self.row - first) * width + self.col]
        if points == 1:
            # Of four equal weights the mean needs none, and in this form a constant stays what it is.
            bottom, right = np.minimum(np.arange(height) + 1, height - 1), np.minimum(np.arange(width) + 1, width - 1)
            alike = (
                (weights == weights[bottom]) & (weights == weights[:, right]) & (weights == weights[bottom][:, right])
            )
            even = (alike & (weights > 0)).reshape(-1)[corners[0]] & self.inside
            across, down = self.across[..., None].astype(np.float32), self.down[..., None].astype(np.float32)
            upper, right, lower, right_below = (flat.take(one, axis=0, mode="clip") for one in corners)
            right -= upper
            right *= across
            upper += right
            right_below -= lower
            right_below *= across
            lower += right_below
            lower -= upper
            lower *= down
            upper += lower
            found, weight = upper, np.where(even, own, 0).astype(np.uint32)
            rest = np.nonzero(self.inside & ~even)
            if not rest[0].size:
                return found, weight
            pick: tuple[Any, ...] = rest
        else:
            pick = (slice(None), slice(None))
        shape = self.inside.shape
        held = (np.broadcast_to(own, shape)[pick] > 0) & self.inside[pick]
        shares = [
            (np.broadcast_to(down, shape)[pick] * np.broadcast_to(across, shape)[pick])
            for down in (1 - self.down, self.down)
            for across in (1 - self.across, self.across)
        ]
        total, valid = np.zeros(held.shape), np.zeros(held.shape)
        sums = np.zeros((*held.shape, flat.shape[1]))
        for share, corner in zip(shares, corners, strict=True):
            at = np.broadcast_to(corner, shape)[pick]
            here = flat_weights[at]
            usable = here > 0
            share = share * (usable & held)
            heavy = share * here
            total += heavy
            valid += share
            # A score under an invalid pixel may be NaN, and 0 * NaN is NaN.
            sums += np.where(usable[..., None], flat[at], 0) * heavy[..., None]
        if points > 1:
            sums, total, valid = (_means(one, points) for one in (sums, total, valid))
            held = _means(held.astype(float), points) >= 0.5
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = (sums / total[..., None]).astype(np.float32)
            heavy = np.where(held & (total > 0), np.maximum(np.rint(total / valid), 1), 0)
        if points > 1:
            return mean, np.nan_to_num(heavy).astype(np.uint32)
        found[rest], weight[rest] = mean, heavy.astype(np.uint32)
        return found, weight


def _means(values: np.ndarray, points: int) -> np.ndarray:
    """Over the points of each pixel: (h * points, w * points, ...) -> (h, w, ...)."""
    height, width = values.shape[0] // points, values.shape[1] // points
    return values.reshape(height, points, width, points, *values.shape[2:]).mean(axis=(1, 3))


def _points(begin: int, length: int, points: int) -> np.ndarray:
    """Where the points of some pixels of an axis lie, `points` in each."""
    return begin + (np.arange(length * points) + 0.5) / points


def _centres(window: Window, points: int) -> tuple[np.ndarray, np.ndarray]:
    rows, cols = _points(window.row, window.height, points), _points(window.col, window.width, points)
    found = np.meshgrid(rows, cols, indexing="ij")
    return found[0], found[1]


def _blocks_over(low: np.ndarray, high: np.ndarray, edge: int) -> set[tuple[int, int]]:
    """Blocks (row, col) of a lattice that boxes from `low` to `high`, (2, n) each, touch."""
    first, last = np.floor(low / edge).astype(np.int64), np.floor(high / edge).astype(np.int64)
    boxes = np.unique(np.concatenate([first, last]).T, axis=0)
    return {(r, c) for r0, c0, r1, c1 in boxes.tolist() for r in range(r0, r1 + 1) for c in range(c0, c1 + 1)}


def _transform(
    transformer: pyproj.Transformer, xs: np.ndarray, ys: np.ndarray, *, inverse: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """pyproj's own, for arrays of any shape (of one element it would make a number); NaN for what lies nowhere."""
    flat = np.append(np.ravel(xs), 0.0), np.append(np.ravel(ys), 0.0)
    found = transformer.transform(*flat, direction="INVERSE" if inverse else "FORWARD")
    shape = np.shape(xs)
    x, y = (np.asarray(one, float)[:-1].reshape(shape) for one in found)
    nowhere = np.isinf(x) | np.isinf(y)
    return np.where(nowhere, np.nan, x), np.where(nowhere, np.nan, y)


@lru_cache(maxsize=1)
def _identity() -> pyproj.Transformer:
    return pyproj.Transformer.from_pipeline("+proj=noop")
