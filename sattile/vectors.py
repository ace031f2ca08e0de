"""Polygons out of finished labels maps, joined across blocks and across maps, as one GeoParquet file.

Polygons are whole numbers of pixels of one common grid until they are written, so joining them is exact: a border
between two blocks or two maps leaves no trace. A task outlines one area of a map block by block, joins what touches
its blocks' borders, and finishes what does not reach the area's own border. What does goes, with where it does, to a
second round of tasks, for which the driver has found out which pieces belong together from the borders alone. The
driver merges the tasks' sorted parts into one file, a few rows of each at a time.

Memory follows from the area of a task, and from the largest single polygon: that one is held whole.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pickle
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sattile import engine, storage
from sattile.decoder import decoder
from sattile.errors import Refused, SattileError, UsageError, refusal
from sattile.grid import Window, blocks
from sattile.schema import SegmentClass

if TYPE_CHECKING:
    import pandas
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

BLOCK = 2048
"""Edge of what is outlined at a time, in pixels."""

TASK_PIXELS = 1 << 26
TASK_BYTES = 32 << 20
"""Of pieces that one task of the second round joins, where no polygon is larger."""

HELD_BYTES = 32 << 20
"""Of finished polygons that a task holds, before it writes them as a part."""

FAN_IN = 64
"""Parts that are merged at a time: each has a file open and a row group in memory."""

PART_ROWS, PART_BYTES = 8192, 1 << 20
FILE_ROWS, FILE_BYTES = 1 << 16, 1 << 24
"""Where a row group ends, in parts and in the finished file."""

MEASURED_EVERY = 500.0
"""Metres. A side that is straight in the CRS is none on the ellipsoid: it is measured in steps of this length. At 60
degrees north, a parallel and the geodesic between two points of it, 500 m apart, hold 3 square metres between them."""

HORIZONTAL, VERTICAL = 0, 1
BEFORE, AFTER = 0, 1

PART = pa.schema(
    [
        ("place", pa.int64()),  # order in the finished file; of a cut polygon, nothing
        ("class_id", pa.int16()),
        ("area_m2", pa.float64()),
        ("geometry", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Map:
    """One finished labels map on the common grid.

    Attributes:
        name: for messages.
        url: of its `labels.tif`: one band of uint8 class ids.
        row, col: where its top-left pixel lies in the common grid; may be negative.
        height, width: in pixels.
    """

    name: str
    url: str
    row: int
    col: int
    height: int
    width: int

    @property
    def window(self) -> Window:
        """In the common grid."""
        return Window(self.row, self.col, self.height, self.width)


@dataclass(frozen=True)
class Area:
    """What one task outlines: a part of a map, `window` in the common grid."""

    map: Map
    window: Window


@dataclass(frozen=True)
class Pieces:
    """Polygons, whole or cut by borders, in (col, row) of the common grid.

    Attributes:
        shapes: (pieces,) shapely polygons.
        classes: (pieces,) uint8.
        runs: (runs, 6) int64: where pieces touch borders: axis (`HORIZONTAL`: along a row of pixel corners), the
            border's row or column, side (`BEFORE`: the piece lies above, or left), start and stop along it, piece.
    """

    shapes: np.ndarray
    classes: np.ndarray
    runs: np.ndarray


@dataclass(frozen=True)
class Layout:
    """What all tasks know.

    Attributes:
        grid: the rectangle around all maps.
        crs, transform, sieve: as in `vectorize`.
        work: URL of the folder for parts.
    """

    grid: Window
    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    sieve: float
    work: str


@dataclass(frozen=True)
class Finished:
    """Finished polygons: the URLs of their parts, how many, and their box in units of the CRS (None without any)."""

    urls: tuple[str, ...] = ()
    count: int = 0
    bounds: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Cut:
    """A part of polygons that reach the border of an area.

    Attributes:
        url: of the part; row n is piece n. Coordinates are pixels of the common grid.
        classes, runs: as in `Pieces`; runs on the area's border alone.
        sizes: (pieces,) int64, bytes of each as WKB.
    """

    url: str
    classes: np.ndarray
    runs: np.ndarray
    sizes: np.ndarray


@dataclass(frozen=True)
class Outlined:
    """What became of an area.

    Attributes:
        area: its number.
        finished: polygons that do not reach its border.
        cut: those that do; None for none.
        reason: why the map can't be read.
    """

    area: int
    finished: Finished = Finished()
    cut: Cut | None = None
    reason: str | None = None


def vectorize(
    spark: SparkSession,
    maps: Sequence[Map],
    *,
    classes: Sequence[SegmentClass],
    crs: str | None,
    transform: tuple[float, float, float, float, float, float],
    out: str,
    sieve: float = 0.0,
    source: str | None = None,
    block: int = BLOCK,
    task_pixels: int = TASK_PIXELS,
) -> int:
    """Write the polygons of some classes of labels maps as one GeoParquet file, published by one rename.

    A polygon is all pixels of a class that hang together by their edges, in whatever maps they lie; where pixels touch
    by a corner alone, they are two polygons (or two holes). Columns: `class_id` int16, `class` string, `area_m2`
    float64, `geometry` WKB polygons, shells counterclockwise. In order of class id, then of each polygon's first pixel,
    row by row. The same bytes for the same pixels, however they are cut into maps, blocks and tasks.

    Args:
        maps: those of one grid; they may not overlap, and need not touch.
        classes: those to outline; other pixels are in no polygon.
        crs: of the grid, as pyproj takes it; None for none.
        transform: of the grid, affine coefficients as in `schema.Scene`, from pixel (0, 0).
        out: URL of the file; one that is there is replaced.
        sieve: polygons of less than this area, after joining, are left out. The area is that on the CRS's ellipsoid in
            square metres, less holes; for a CRS that does not lie on Earth, or none, in square units of the transform.
        source: where the maps come from, kept in the file's metadata.
        block: edge of what is outlined at a time, in pixels.
        task_pixels: at most this many in a task, by rows of blocks.

    Returns:
        How many polygons the file has.

    Raises:
        UsageError: for maps that overlap, no maps or classes, a transform that is no grid.
        SattileError: naming a map that can't be read.
    """
    wanted = sorted({one.id for one in classes})
    out = storage.absolute(out)
    layout = Layout(
        _check(maps, wanted, transform, sieve), crs, transform, sieve,
        storage.join(storage.parent(out), f".{storage.name(out)}.work-{uuid.uuid4().hex[:8]}"),
    )  # fmt: skip
    geodesy(crs)  # a CRS that is none ends it before any work
    areas = plan([replace(one, url=storage.absolute(one.url)) for one in maps], block, task_pixels)
    try:
        with engine.progress(spark, "vectors"):
            work = partial(_outline_all, layout=layout, wanted=wanted, block=block)
            done = sorted(_run(spark, list(enumerate(areas)), work), key=lambda one: one.area)
            for one in done:
                if one.reason:
                    raise SattileError(f"map {areas[one.area].map.name} cannot be outlined: {one.reason}")
            tasks = _deal(done, engine.slots(spark))
            joined = _run(spark, tasks, partial(_join_all, layout=layout))
        finished = [*(one.finished for one in done), *joined]
        _write_file(finished, out, classes, layout, source)
    finally:
        storage.remove(layout.work)
    count = sum(one.count for one in finished)
    log.info("vectors: %d polygons of %d maps", count, len(maps))
    return count


def _check(
    maps: Sequence[Map], wanted: Sequence[int], transform: tuple[float, float, float, float, float, float], sieve: float
) -> Window:
    """The rectangle around all maps."""
    if not maps or not wanted:
        raise UsageError(f"no {'classes' if maps else 'maps'} to outline; name at least one")
    if not all(map(math.isfinite, transform)) or _determinant(transform) == 0:
        raise UsageError(f"transform {tuple(transform)} is no grid: pixels without an area")
    if not sieve >= 0:
        raise UsageError(f"sieve {sieve}: give the least area to keep, 0 or more")
    at = np.array([[one.row, one.col, one.row + one.height, one.col + one.width] for one in maps], np.int64)
    for number, (row, col, stop_row, stop_col) in enumerate(at):
        others = at[number + 1 :]
        common = (others[:, 0] < stop_row) & (row < others[:, 2]) & (others[:, 1] < stop_col) & (col < others[:, 3])
        if common.any():
            other = maps[number + 1 + int(common.argmax())]
            raise UsageError(f"maps {maps[number].name} and {other.name} overlap: a pixel may lie in one map only")
    top, left = (int(one) for one in at[:, :2].min(axis=0))
    bottom, right = (int(one) for one in at[:, 2:].max(axis=0))
    return Window(top, left, bottom - top, right - left)


def plan(maps: Sequence[Map], block: int, task_pixels: int) -> list[Area]:
    """Areas of at most `task_pixels` (but of one row of blocks at least), in the order of the grid."""
    areas = []
    for one in sorted(maps, key=lambda one: (one.row, one.col)):
        height = max(task_pixels // max(one.width * block, 1), 1) * block
        for start in range(0, one.height, height):
            rows = min(height, one.height - start)
            areas.append(Area(one, Window(one.row + start, one.col, rows, one.width)))
    return areas


def _run(spark: SparkSession, items: Sequence[Any], work: Callable[..., Iterator[Any]]) -> list[Any]:
    """What `work` gives for each item, in a Spark task each, in any order."""
    if not items:
        return []
    # A bounded number of tasks: a thousand small maps are no reason for a thousand workers' starts.
    count = min(len(items), max(4 * engine.slots(spark), -(-len(items) // 16)))
    groups: list[list[tuple[bytes]]] = [[] for _ in range(count)]
    for number, item in enumerate(items):
        groups[number * count // len(items)].append((pickle.dumps(item),))
    frame = engine.partitioned(spark, groups, "item binary")
    rows = frame.mapInPandas(engine.on_worker(partial(_each, work=work)), "done binary").collect()
    return [pickle.loads(row.done) for row in rows]  # from our own task, never stored


def _each(batches: Iterable[pandas.DataFrame], *, work: Callable[..., Iterator[Any]]) -> Iterator[pandas.DataFrame]:
    """mapInPandas: rows `item` (pickled) in, rows `done` (pickled) out."""
    import pandas

    items = (pickle.loads(packed) for batch in batches for packed in batch["item"])
    for done in work(items):
        yield pandas.DataFrame({"done": [pickle.dumps(done)]})


# ---------------------------------------------------------------- first round: areas


def _outline_all(
    areas: Iterable[tuple[int, Area]], *, layout: Layout, wanted: Sequence[int], block: int
) -> Iterator[Outlined]:
    from sattile import shapes

    for number, area in areas:
        at = area.map

        def read(window: Window, at: Map = at) -> tuple[np.ndarray, ...]:
            inside = Window(window.row - at.row, window.col - at.col, window.height, window.width)
            try:
                return decoder().call(shapes.outlines, at.url, (at.height, at.width), inside, wanted)
            except Exception as error:
                raise refusal(error) from None

        parts = _Parts(layout)
        cut = None
        try:
            for pieces in outline(area.window, block, read):
                if not len(pieces.runs):
                    parts.add(pieces.shapes, pieces.classes)
                else:
                    count = len(pieces.shapes)
                    table = _table(np.zeros(count, np.int64), pieces.classes, np.zeros(count), pieces.shapes)
                    cut = Cut(_write_part([table], layout.work), pieces.classes, pieces.runs, _sizes(table))
        except Refused as error:
            yield Outlined(number, reason=error.reason)
            continue
        yield Outlined(number, parts.close(), cut)


def outline(area: Window, block: int, read: Callable[[Window], tuple[np.ndarray, ...]]) -> Iterator[Pieces]:
    """Polygons of an area, joined across its blocks' borders.

    Args:
        area: in the common grid.
        block: edge in pixels.
        read: gives what `shapes.polygonize` does, for a window of the common grid.

    Yields:
        Whole polygons, without runs, as they are known; and those that reach the area's border, with their runs on it.
    """
    import shapely

    held: list[Pieces] = []
    count = 0
    for one in blocks(area.height, area.width, block):
        window = Window(area.row + one.row, area.col + one.col, one.height, one.width)
        classes, points, rings, polygons = read(window)
        if not len(classes):
            continue
        points = points + np.array([window.col, window.row])
        runs = border_runs(points, rings, polygons, window)
        shapes = shapely.from_ragged_array(shapely.GeometryType.POLYGON, points.astype(np.float64), (rings, polygons))
        whole, cut = _apart(Pieces(shapes, classes, runs))
        yield Pieces(canonical(whole.shapes), whole.classes, whole.runs)
        cut.runs[:, 5] += count
        count += len(cut.shapes)
        held.append(cut)
    if not held:
        return
    joined = join(
        Pieces(*(np.concatenate([getattr(one, name) for one in held]) for name in ("shapes", "classes", "runs")))
    )
    yield from _apart(Pieces(joined.shapes, joined.classes, joined.runs[on_border(joined.runs, area)]))


def _apart(pieces: Pieces) -> tuple[Pieces, Pieces]:
    """Those that no run names, and the others, numbered anew."""
    touches = np.zeros(len(pieces.shapes), bool)
    touches[pieces.runs[:, 5]] = True
    runs = pieces.runs.copy()
    runs[:, 5] = (np.cumsum(touches) - 1)[runs[:, 5]]
    return (
        Pieces(pieces.shapes[~touches], pieces.classes[~touches], np.empty((0, 6), np.int64)),
        Pieces(pieces.shapes[touches], pieces.classes[touches], runs),
    )


def border_runs(points: np.ndarray, rings: np.ndarray, polygons: np.ndarray, window: Window) -> np.ndarray:
    """Where polygons of a window touch its border: `runs` of `Pieces`.

    Args:
        points, rings, polygons: as of `shapes.polygonize`, in the common grid.
    """
    ends = np.delete(np.arange(len(points)), rings[1:] - 1)
    piece = np.repeat(np.arange(len(polygons) - 1), np.diff(rings[polygons]) - np.diff(polygons))
    first, last = points[ends], points[ends + 1]
    low, high = np.minimum(first, last), np.maximum(first, last)
    found = [np.empty((0, 6), np.int64)]
    sides = (
        (HORIZONTAL, window.row, AFTER), (HORIZONTAL, window.stop_row, BEFORE),
        (VERTICAL, window.col, AFTER), (VERTICAL, window.stop_col, BEFORE),
    )  # fmt: skip
    for axis, line, side in sides:
        across, along = (1, 0) if axis == HORIZONTAL else (0, 1)
        at = np.flatnonzero((low[:, across] == line) & (high[:, across] == line))
        run = np.empty((len(at), 6), np.int64)
        run[:, :3] = axis, line, side
        run[:, 3], run[:, 4], run[:, 5] = low[at, along], high[at, along], piece[at]
        found.append(run)
    return np.concatenate(found)


def on_border(runs: np.ndarray, area: Window) -> np.ndarray:
    """Which runs lie on the border of an area, (runs,) bool."""
    axis, line = runs[:, 0], runs[:, 1]
    return np.where(
        axis == HORIZONTAL, (line == area.row) | (line == area.stop_row), (line == area.col) | (line == area.stop_col)
    )


# ---------------------------------------------------------------- joining


def join(pieces: Pieces) -> Pieces:
    """Pieces that share an edge across a border, as one; all without points where their sides do not turn.

    Runs stay those of the pieces, with the numbers of the joined ones.
    """
    import shapely

    owner = components(len(pieces.shapes), matches(pieces.runs, pieces.classes[pieces.runs[:, 5]]))
    first, owner = np.unique(owner, return_inverse=True)
    order = np.argsort(owner, kind="stable")
    starts = np.searchsorted(owner[order], np.arange(len(first) + 1))
    shapes = pieces.shapes[first]
    for one in np.flatnonzero(np.diff(starts) > 1):
        shapes[one] = shapely.union_all(pieces.shapes[order[starts[one] : starts[one + 1]]])
    runs = pieces.runs.copy()
    runs[:, 5] = owner[runs[:, 5]]
    return Pieces(canonical(shapes), pieces.classes[first], runs)


def matches(runs: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Pairs of pieces of one class that share an edge (not only a corner) across a border: (pairs, 2) int64.

    Args:
        runs: as of `Pieces`; those of one side of a border do not overlap.
        classes: (runs,) of the runs' pieces.
    """
    if not len(runs):
        return np.empty((0, 2), np.int64)
    # One number line for all borders and classes, each with a stretch of its own.
    _, group = np.unique(np.column_stack([runs[:, :2], classes]), axis=0, return_inverse=True)
    low = runs[:, 3].min()
    offset = group.reshape(-1) * (runs[:, 4].max() - low + 1) - low
    start, stop, piece = runs[:, 3] + offset, runs[:, 4] + offset, runs[:, 5]
    before = np.flatnonzero(runs[:, 2] == BEFORE)
    after = np.flatnonzero(runs[:, 2] == AFTER)
    after = after[np.argsort(start[after])]
    begin = np.searchsorted(stop[after], start[before], "right")
    count = np.maximum(np.searchsorted(start[after], stop[before], "left") - begin, 0)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.column_stack([np.repeat(piece[before], count), piece[after[np.repeat(begin, count) + within]]])


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Which of `count` things hang together by pairs: for each, the least number among its own, (count,) int64."""
    least = np.arange(count)
    one, two = pairs[:, 0], pairs[:, 1]
    while (least[one] != least[two]).any():
        low = np.minimum(least[one], least[two])
        for roots in (least[one], least[two]):
            np.minimum.at(least, roots, low)
        while (least[least] != least).any():
            least = least[least]
    return least


def canonical(shapes: np.ndarray) -> np.ndarray:
    """Rectilinear polygons by their corners alone, in shapely's normal form: one form for one set of pixels."""
    import shapely

    if not len(shapes):
        return shapes
    _, points, (rings, polygons) = shapely.to_ragged_array(shapes)
    # Neighbours within a ring, whose last point is its first again.
    before, after = np.roll(points, 1, axis=0), np.roll(points, -1, axis=0)
    firsts, lasts = rings[:-1], rings[1:] - 1
    before[firsts] = points[lasts - 1]
    after[lasts] = points[firsts + 1]
    turns = (before[:, 0] != after[:, 0]) & (before[:, 1] != after[:, 1])
    turns[lasts] = False
    lengths = np.add.reduceat(turns, firsts, dtype=np.int64)
    kept = points[turns]
    starts = np.cumsum(lengths) - lengths
    # Closed again: each ring's first corner after its last.
    ended = np.insert(kept, np.cumsum(lengths), kept[starts], axis=0)
    rings = np.concatenate([[0], np.cumsum(lengths + 1)])
    return shapely.normalize(shapely.from_ragged_array(shapely.GeometryType.POLYGON, ended, (rings, polygons)))


# ---------------------------------------------------------------- second round: what crosses areas


def _deal(done: Sequence[Outlined], slots: int) -> list[list[list[tuple[str, int]]]]:
    """Tasks of polygons of (part, row) pieces: those of one polygon in one task, neighbours together."""
    cuts = [one.cut for one in done if one.cut]
    if not cuts:
        return []
    counts = np.array([len(one.classes) for one in cuts])
    firsts = np.cumsum(counts) - counts
    part = np.repeat(np.arange(len(cuts)), counts)
    runs = np.concatenate(
        [one.runs + np.array([0, 0, 0, 0, 0, first]) for one, first in zip(cuts, firsts, strict=True)]
    )
    classes, sizes = np.concatenate([one.classes for one in cuts]), np.concatenate([one.sizes for one in cuts])
    owner = components(len(part), matches(runs, classes[runs[:, 5]]))
    order = np.argsort(owner, kind="stable")
    begins = np.flatnonzero(np.diff(owner[order], prepend=-1))
    reached = np.cumsum(np.add.reduceat(sizes[order], begins))
    count = min(len(begins), max(2 * slots, int(reached[-1]) // TASK_BYTES + 1))
    tasks: dict[int, list[list[tuple[str, int]]]] = {}
    for task, pieces in zip((reached - 1) * count // reached[-1], np.split(order, begins[1:]), strict=True):
        named = [(cuts[part[piece]].url, int(piece - firsts[part[piece]])) for piece in pieces]
        tasks.setdefault(int(task), []).append(named)
    return list(tasks.values())


def _join_all(tasks: Iterable[list[list[tuple[str, int]]]], *, layout: Layout) -> Iterator[Finished]:
    import shapely

    for polygons in tasks:
        wanted: dict[str, list[int]] = {}
        for pieces in polygons:
            for url, number in pieces:
                wanted.setdefault(url, []).append(number)
        held = {url: _read_rows(url, sorted(numbers)) for url, numbers in sorted(wanted.items())}
        shapes, classes = np.empty(len(polygons), object), np.empty(len(polygons), np.uint8)
        for at, pieces in enumerate(polygons):
            found = [held[url].pop(number) for url, number in pieces]
            classes[at] = found[0][0]
            parts = shapely.from_wkb([wkb for _, wkb in found])
            shapes[at] = parts[0] if len(parts) == 1 else shapely.union_all(parts)
        parts = _Parts(layout)
        parts.add(canonical(shapes), classes)
        yield parts.close()


def _read_rows(url: str, numbers: Sequence[int]) -> dict[int, tuple[int, bytes]]:
    """Class and WKB of some rows of a part, by number; opens only the row groups they are in."""
    found: dict[int, tuple[int, bytes]] = {}
    wanted = np.array(numbers)
    with storage.open_file(url) as file:
        reader = pq.ParquetFile(file)
        start = 0
        for group in range(reader.num_row_groups):
            stop = start + reader.metadata.row_group(group).num_rows
            inside = wanted[(wanted >= start) & (wanted < stop)]
            if len(inside):
                table = reader.read_row_group(group, columns=["class_id", "geometry"]).take(pa.array(inside - start))
                rows = zip(table["class_id"].to_pylist(), table["geometry"].to_pylist(), strict=True)
                found.update(zip(inside.tolist(), rows, strict=True))
            start = stop
    return found


# ---------------------------------------------------------------- finished polygons


class _Parts:
    """Finished polygons of a task: measured, sieved, placed, and written in sorted parts of bounded size."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self._tables: list[pa.Table] = []
        self._urls: list[str] = []
        self._boxes: list[np.ndarray] = []
        self._count = self._size = 0

    def add(self, shapes: np.ndarray, classes: np.ndarray) -> None:
        """Add polygons in normal form, in pixels."""
        import shapely

        area = measure(shapes, self.layout.crs, self.layout.transform)
        # NaN is an area that is not known: kept.
        kept = ~(area < self.layout.sieve)
        if not kept.any():
            return
        shapes, classes = shapes[kept], classes[kept]
        placed = on_ground(shapes, self.layout.transform)
        table = _table(places(shapes, classes, self.layout.grid), classes, area[kept], placed)
        self._boxes.append(shapely.total_bounds(placed))
        self._tables.append(table)
        self._count += len(shapes)
        self._size += table.nbytes
        if self._size > HELD_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._tables:
            rows = pa.concat_tables(self._tables)
            order = np.argsort(rows["place"].to_numpy())
            self._urls.append(_write_part([rows.take(pa.array(order))], self.layout.work))
        self._tables, self._size = [], 0

    def close(self) -> Finished:
        """Write what is held, and say what was."""
        self._flush()
        return Finished(tuple(self._urls), self._count, _around(self._boxes))


def _around(boxes: Sequence[Any]) -> tuple[float, float, float, float] | None:
    """The box around (west, south, east, north) boxes."""
    if not boxes:
        return None
    west, south, east, north = zip(*boxes, strict=True)
    return float(min(west)), float(min(south)), float(max(east)), float(max(north))


def places(shapes: np.ndarray, classes: np.ndarray, grid: Window) -> np.ndarray:
    """Order in the finished file, (polygons,) int64: by class, then by first pixel, row by row. No two are the same."""
    import shapely

    _, points, (rings, polygons) = shapely.to_ragged_array(shapes)
    points = points.astype(np.int64) - np.array([grid.col, grid.row])
    # The first pixel's corner is the first of the polygon's corners.
    pixel = np.minimum.reduceat(points[:, 1] * grid.width + points[:, 0], rings[polygons[:-1]])
    return classes.astype(np.int64) * grid.area + pixel


def on_ground(shapes: np.ndarray, transform: Sequence[float]) -> np.ndarray:
    """Polygons in normal form, from pixels to units of the CRS; shells counterclockwise."""
    import shapely

    a, b, c, d, e, f = transform
    moved = shapely.transform(
        shapes, lambda at: np.column_stack([a * at[:, 0] + b * at[:, 1] + c, d * at[:, 0] + e * at[:, 1] + f])
    )
    # shapely's normal form has them clockwise; a grid whose rows go down mirrors that.
    return moved if _determinant(transform) < 0 else shapely.reverse(moved)


def _determinant(transform: Sequence[float]) -> float:
    a, b, _, d, e, _ = transform
    return a * e - b * d


def geodesy(crs: str | None) -> tuple[Any, Any, float] | None:
    """How to measure in a CRS: (transformer to longitude and latitude, ellipsoid, degrees of their unit); None if it
    does not lie on Earth.

    Longitude and latitude are those of the CRS's own datum: none is changed for another.

    Raises:
        UsageError: if it is no CRS.
    """
    import pyproj

    if crs is None:
        return None
    try:
        given = pyproj.CRS.from_user_input(crs)
        base = given.geodetic_crs
        if base is None or given.get_geod() is None:
            return None
        base = base.to_2d()
        transformer = pyproj.Transformer.from_crs(given.to_2d(), base, always_xy=True)
    except pyproj.exceptions.CRSError as error:
        raise UsageError(f"{crs!r} is no CRS: {error}") from error
    except pyproj.exceptions.ProjError:
        return None
    return transformer, given.get_geod(), math.degrees(base.axis_info[0].unit_conversion_factor)


def measure(shapes: np.ndarray, crs: str | None, transform: Sequence[float]) -> np.ndarray:
    """Areas of polygons without their holes, (polygons,) float64: on the CRS's ellipsoid in square metres, or planar in
    square units where there is none. NaN where a corner is not on Earth.

    In a projected CRS, polygons of less than half the Earth.

    Args:
        shapes: in pixels of the grid that `transform` places.
    """
    import pyproj
    import shapely

    if not len(shapes):
        return np.empty(0)
    earth = geodesy(crs)
    if earth is None:
        return shapely.area(shapes) * abs(_determinant(transform))
    transformer, ellipsoid, degrees = earth
    a, b, c, d, e, f = transform
    given = pyproj.CRS.from_user_input(crs)
    # Metres that a pixel is long at most: a degree is longest along the equator.
    factor = given.axis_info[0].unit_conversion_factor * (1 if given.is_projected else ellipsoid.a)
    pixel = max(math.hypot(a, d), math.hypot(b, e)) * factor
    upright = given.is_geographic and b == d == 0
    # Sides along meridians and parallels are measured as such.
    fine = shapes if upright else shapely.segmentize(shapes, MEASURED_EVERY / pixel)
    _, points, (rings, polygons) = shapely.to_ragged_array(fine)
    xs, ys = a * points[:, 0] + b * points[:, 1] + c, d * points[:, 0] + e * points[:, 1] + f
    if upright:
        areas = _between_parallels(np.radians(xs * degrees), np.radians(ys * degrees), rings, ellipsoid)
    else:
        lons, lats = (np.asarray(one) * degrees for one in transformer.transform(xs, ys))
        areas = _between_geodesics(lons, lats, rings, ellipsoid)
    areas[polygons[:-1]] *= -1
    return -np.add.reduceat(areas, polygons[:-1])


def _between_parallels(lons: np.ndarray, lats: np.ndarray, rings: np.ndarray, ellipsoid: Any) -> np.ndarray:
    """Areas of rings whose sides lie along meridians and parallels, in square metres; radians in. Longitudes may go
    beyond 180 degrees, and a ring may hold more than half the ellipsoid.

    Exact: the authalic latitude's q (Snyder, Map Projections: A Working Manual, USGS 1987, 3-12), which is the area
    between the equator and a parallel over half of a square semi-major axis, an angle of longitude.
    """
    e = math.sqrt(ellipsoid.es)
    sin = np.sin(lats)
    q = 2 * sin if not e else (1 - e * e) * (sin / (1 - (e * sin) ** 2) + np.arctanh(e * sin) / e)
    first, last = np.delete(np.arange(len(lons)), rings[1:] - 1), np.delete(np.arange(len(lons)), rings[:-1])
    counts = np.diff(rings) - 1
    q -= np.repeat(q[rings[:-1]], np.diff(rings))  # small differences keep their digits
    strips = (q[first] + q[last]) / 2 * (lons[last] - lons[first])
    areas = np.abs(np.add.reduceat(strips, np.cumsum(counts) - counts)) * ellipsoid.a**2 / 2
    beyond = np.maximum.reduceat(np.abs(lats), rings[:-1]) > math.pi / 2 + 1e-9
    areas[beyond] = np.nan
    return areas


def _between_geodesics(lons: np.ndarray, lats: np.ndarray, rings: np.ndarray, ellipsoid: Any) -> np.ndarray:
    """Areas of rings whose sides are geodesics, in square metres; degrees in. NaN where a corner is not on Earth."""
    good = np.isfinite(lons) & np.isfinite(lats)
    lons, lats = np.where(good, lons, 0), np.where(good, lats, 0)
    areas = np.empty(len(rings) - 1)
    for ring, (start, stop) in enumerate(pairwise(rings)):
        part = slice(start, stop - 1)
        areas[ring] = abs(ellipsoid.polygon_area_perimeter(lons[part], lats[part])[0])
    areas[~np.logical_and.reduceat(good, rings[:-1])] = np.nan
    return areas


# ---------------------------------------------------------------- files


def _table(place: np.ndarray, classes: np.ndarray, area: np.ndarray, shapes: np.ndarray) -> pa.Table:
    import shapely

    wkb = pa.array(shapely.to_wkb(shapes, byte_order=1), pa.binary())
    return pa.Table.from_arrays([pa.array(place), pa.array(classes.astype(np.int16)), pa.array(area), wkb], schema=PART)


def _sizes(table: pa.Table) -> np.ndarray:
    return pc.binary_length(table["geometry"]).to_numpy().astype(np.int64)


def regroup(tables: Iterable[pa.Table], most_rows: int, most_bytes: int) -> Iterator[pa.Table]:
    """The same rows in other tables: one ends with the row that reaches either limit, wherever those given end."""
    held: list[pa.Table] = []
    rows = size = 0
    for table in tables:
        sizes = np.cumsum(_sizes(table))
        start = 0
        while start < table.num_rows:
            past = int(sizes[start - 1]) if start else 0
            full = int(np.searchsorted(sizes, most_bytes - size + past)) + 1
            stop = min(full, start + most_rows - rows)
            part = table.slice(start, min(stop, table.num_rows) - start)
            held.append(part)
            rows, size = rows + part.num_rows, size + int(sizes[start + part.num_rows - 1]) - past
            start += part.num_rows
            if stop <= table.num_rows:
                yield pa.concat_tables(held).combine_chunks()
                held, rows, size = [], 0, 0
    if held:
        yield pa.concat_tables(held).combine_chunks()


def _write_part(tables: Iterable[pa.Table], folder: str) -> str:
    """A part under a name of its own: another attempt of this task may be writing the same."""
    sink = io.BytesIO()
    _write(sink, regroup(tables, PART_ROWS, PART_BYTES), PART)
    url = storage.join(folder, f"{uuid.uuid4().hex}.parquet")
    storage.write_bytes(url, sink.getvalue())
    return url


def _write(sink: Any, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """One row group a table."""
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table, row_group_size=table.num_rows)


def merged(urls: Sequence[str]) -> Iterator[pa.Table]:
    """Rows of sorted parts in the order of `place`, of each part a row group in memory."""
    streams = [_row_groups(url) for url in urls]
    heads = {number: table for number, stream in enumerate(streams) if (table := next(stream, None)) is not None}
    while heads:
        # Up to here every part is known: what it has later comes later.
        bound = min(table["place"][-1].as_py() for table in heads.values())
        taken = []
        for number, table in list(heads.items()):
            count = int(np.searchsorted(table["place"].to_numpy(), bound, "right"))
            taken.append(table.slice(0, count))
            rest: pa.Table | None = table.slice(count)
            if not table.num_rows - count:
                rest = next(streams[number], None)
            if rest is None:
                del heads[number]
            else:
                heads[number] = rest
        rows = pa.concat_tables(taken)
        yield rows.take(pa.array(np.argsort(rows["place"].to_numpy(), kind="stable")))


def _row_groups(url: str) -> Iterator[pa.Table]:
    with storage.open_file(url) as file:
        reader = pq.ParquetFile(file)
        for group in range(reader.num_row_groups):
            yield reader.read_row_group(group)


def _write_file(
    parts: Sequence[Finished], out: str, classes: Sequence[SegmentClass], layout: Layout, source: str | None
) -> None:
    """Merge parts into the file that is published."""
    schema = _schema(parts, layout, source)
    ids = np.zeros(256, np.int64)
    ids[[one.id for one in classes]] = np.arange(len(classes))
    names = pa.array([one.name for one in classes], pa.string())

    def rows(urls: Sequence[str]) -> Iterator[pa.Table]:
        for table in regroup(merged(urls), FILE_ROWS, FILE_BYTES):
            named = names.take(pa.array(ids[table["class_id"].to_numpy()]))
            yield pa.Table.from_arrays([table["class_id"], named, table["area_m2"], table["geometry"]], schema=schema)

    urls = [url for one in parts for url in one.urls]
    with storage.scratch() as folder:
        while len(urls) > FAN_IN:
            urls = [_write_merged(urls[start : start + FAN_IN], folder) for start in range(0, len(urls), FAN_IN)]
        path = os.path.join(folder, "finished.parquet")
        _write(path, rows(urls), schema)
        storage.upload(path, out)


def _write_merged(urls: Sequence[str], folder: str) -> str:
    path = os.path.join(folder, f"{uuid.uuid4().hex}.parquet")
    _write(path, regroup(merged(urls), PART_ROWS, PART_BYTES), PART)
    for url in urls:
        storage.remove(url)
    return path


def _schema(parts: Sequence[Finished], layout: Layout, source: str | None) -> pa.Schema:
    """GeoParquet 1.1 (https://geoparquet.org/releases/v1.1.0)."""
    import pyproj

    outlines: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": ["Polygon"] if any(one.count for one in parts) else [],
        # Without a CRS it says so: no word of it would mean longitude and latitude.
        "crs": pyproj.CRS.from_user_input(layout.crs).to_json_dict() if layout.crs else None,
        "orientation": "counterclockwise",
        "edges": "planar",
    }
    box = _around([one.bounds for one in parts if one.bounds])
    if box:
        outlines["bbox"] = list(box)
    geo = {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": outlines}}
    said = {"sieve_m2": layout.sieve} | ({"source": source} if source is not None else {})
    fields = [
        ("class_id", pa.int16()), ("class", pa.string()), ("area_m2", pa.float64()), ("geometry", pa.binary()),
    ]  # fmt: skip
    return pa.schema(fields, metadata={"geo": json.dumps(geo), "sattile": json.dumps(said)})
