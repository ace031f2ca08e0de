"""Many scenes onto one grid: sheets of it, planned, inferred block by block, added up over scenes, decided once.

A task takes blocks of the grid. For each scene that reaches a block, in a fixed order, it reads what is needed with its
context, infers on the scene's own pixels, brings scores and weights onto the grid (`warp`) and adds them to the block's
sums. Where blocks are few and scenes many, the two halves are two tasks with a shuffle between; the bytes are the same.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile import engine as engines
from sattile import errors, geography, mosaic, raster, record, shapes, storage, vectors
from sattile.decoder import decoder, read_ahead
from sattile.drift import Sights
from sattile.errors import Refused, UsageError, nearest
from sattile.grid import Placement, Window, hull
from sattile.inference import (
    WORKER_BASE,
    BlockRead,
    Inference,
    parse_memory,
    run_windows,
    see,
    warn_of_memory,
    window_memory,
)
from sattile.mapreduce import INFERRED, ROW_BYTES, Tally, columns, deal, refused, rows_of, task_numbers, write_maps
from sattile.memory import peak_mb
from sattile.mosaic import Part, Product, Target
from sattile.schema import Refusal, Scene, SegmentClass, describe_classes
from sattile.stac import moment, whole_span
from sattile.stitch import NODATA, PEAK, Stitcher, blend_weights, to_labels
from sattile.warp import Cut, Grid, Warp, grid_like, parse_grid

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import Row, SparkSession

log = logging.getLogger("sattile")

SHEET = 16_384
"""Edge of a sheet in pixels, unless said otherwise."""

RULES = ("all", "newest")

TURN = 1.09
"""How much longer the edge of a block is in a scene of the next UTM zone, whose grid is turned by 6 degrees times the
sine of the latitude: at 60 degrees, cos + sin of 5.2."""

MOST_EDGE = 4096

FRAME = 4096
"""Edge, in pixels of the grid, of the squares in which areas of interest are drawn."""

TASK_PIXELS = 24_000_000
"""Pixels that one task infers at most, but for a single block."""

WAVE_PIXELS = 1_000_000_000
"""Pixels after which finished sheets are published; a sheet of the usual edge has a quarter of them."""

MOST_STRETCHED = 0.02
"""Share by which a pixel on the ground may differ from what the CRS says; 0.012 in the zones beside one of UTM."""

REFUSED = "sattile:refused"
"""Of a sheet: {scene id: reason} of scenes that reach it and could not be read."""


@dataclass(frozen=True)
class Weights:
    """What a scene's pixels weigh against those of other scenes.

    Attributes:
        edge: less towards the edge of the scene.
        cloud: name of a band that holds the probability of cloud in per cent.
    """

    edge: bool = False
    cloud: str | None = None


def parse_weights(text: str | Sequence[str] | None) -> Weights:
    """`edge`, `cloud=BAND`, or both with a comma.

    Raises:
        UsageError: for anything else.
    """
    found = Weights()
    for part in text.split(",") if isinstance(text, str) else list(text or ()):
        name, _, band = part.strip().partition("=")
        if name == "edge" and not band:
            found = replace(found, edge=True)
        elif name == "cloud" and band:
            found = replace(found, cloud=band.strip())
        else:
            raise UsageError(
                f"weights {part!r}: give edge (less towards a scene's edge), cloud=BAND (a band with the "
                f"probability of cloud in per cent), or both with a comma"
            )
    return found


@dataclass(frozen=True)
class Layout:
    """How a grid is cut, and how scenes share it.

    Attributes:
        grid: the pixels.
        sheet: edge of a sheet, in pixels.
        block: edge of a block, in pixels; blocks begin at their sheet's corner.
        rule: `all`: the weighted mean of all scenes; `newest`: the newest scene that is valid at a pixel.
        weights: see there.
    """

    grid: Grid
    sheet: int
    block: int
    rule: str
    weights: Weights

    def describe(self) -> dict[str, Any]:
        """All of it as JSON: part of the settings of a run."""
        return {
            "grid": self.grid.crs, "transform": list(self.grid.transform),
            "limits": list(asdict(self.grid.limits).values()) if self.grid.limits else None,
            "sheet": self.sheet, "block": self.block, "rule": self.rule, "weights": asdict(self.weights),
        }  # fmt: skip


def lay_out(
    job: Inference,
    *,
    grid: str | None,
    like: str | None,
    sheet: int = SHEET,
    block: int | None = None,
    rule: str = "all",
    weights: str | Sequence[str] | None = None,
    worker_memory: int | str = "3g",
) -> Layout:
    """A layout, checked; the block's edge follows from the bundle, the grid and the worker's memory.

    Raises:
        UsageError: for a grid, a sheet or a rule that can't be.
    """
    if (grid is None) == (like is None):
        raise UsageError("give either --grid EPSG:N@RES or --like FILE")
    if rule not in RULES:
        raise UsageError(f"rule {rule!r}: use {' or '.join(RULES)}")
    if sheet < mosaic.cog.TILE or sheet % mosaic.cog.TILE:
        near = max(round(sheet / mosaic.cog.TILE), 1) * mosaic.cog.TILE
        raise UsageError(f"sheet {sheet}: give a multiple of {mosaic.cog.TILE}, the tiles of a COG, such as {near}")
    if like is not None:
        if not storage.exists(like):
            raise UsageError(f"--like {like} does not exist")
        try:
            found = grid_like(decoder().call(raster.describe_file, storage.absolute(like)))
        except Refused as error:
            raise UsageError(f"--like {like}: {error.reason}") from None
    else:
        found = parse_grid(str(grid))
    memory = parse_memory(worker_memory)
    if block is None:
        block = choose_block(job, found, memory, sheet)
    elif not 16 <= block <= sheet:
        raise UsageError(f"block {block}: give pixels from 16 to the sheet's {sheet}")
    what = f"blocks of {block} px and windows of {job.geometry.input_size} px"
    warn_of_memory(block_memory(job, block, ratio_to(job, found)), memory, what)
    return Layout(found, sheet, block, rule, parse_weights(weights))


def ratio_to(job: Inference, grid: Grid) -> float:
    """Pixels of the model's own size for one of the grid, along one axis."""
    return max((resolution(grid) or job.bundle.gsd or 1.0) / (job.bundle.gsd or resolution(grid) or 1.0), 1e-3)


def choose_block(job: Inference, grid: Grid, memory: int, sheet: int) -> int:
    """Edge of blocks: one window of the network where that is wide enough, and what memory allows.

    It follows from the model's pixel size, not from the scenes: the archive grows, and its settings stay.
    """
    ratio = ratio_to(job, grid)
    if job.geometry.merge == "crop":
        wanted = (job.geometry.size - job.geometry.total_stride - 6) / (ratio * TURN)
    else:
        wanted = MOST_EDGE / max(ratio, 1.0)
    most = int(min(max(wanted, 16), MOST_EDGE, sheet)) // 16 * 16
    while most > 64 and block_memory(job, most, ratio) > memory:
        most = most * 15 // 16 // 16 * 16
    return max(most, 16)


def block_memory(job: Inference, edge: int, ratio: float) -> int:
    """Bytes that a worker needs for blocks of this edge, its network included: an estimate.

    Args:
        ratio: pixels of a scene for one of the grid, along one axis.
    """
    bands, classes, geometry = len(job.bundle.bands), len(job.bundle.classes), job.geometry
    need = edge * ratio * TURN
    if geometry.merge == "crop":  # of more, it is taken in parts
        need = min(need, math.sqrt(2) * geometry.size)
    context = geometry.halo if geometry.merge == "crop" else geometry.size
    read = (need + 2 * context) ** 2 * (4 * bands + 1)
    window = min(need + 2 * context, geometry.input_size) if geometry.merge == "crop" else geometry.input_size
    network = window**2 * job.batch * window_memory(job.bundle, job.engine)
    scores = need**2 * (4 * classes + 8 + (8 * classes + 8) * (geometry.merge == "blend"))
    sums = edge**2 * ((8 + 4 + 8) * classes + 8 + 4 + 2 + 3)
    return int(WORKER_BASE[job.engine] + 2 * read + network + scores + sums)


def resolution(grid: Grid) -> float | None:
    """Pixel size of a grid in metres, at the equator of a geographic one."""
    at = grid.limits or Window(0, 0, 1, 1)
    if geography.is_geographic(grid.crs):
        return abs(grid.transform[0] * grid.transform[4]) ** 0.5 * 111_320
    return geography.ground_sample_distance(grid.crs, grid.of(at), at.height, at.width) or math.sqrt(
        abs(grid.transform[0] * grid.transform[4] - grid.transform[1] * grid.transform[3])
    )


# --- the plan: on the driver --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """A block of the grid and the scenes that reach it, in the order in which they are added.

    Attributes:
        name: of its sheet.
        block: of the grid.
        scenes: ids.
        first: place of the first of them in that order.
    """

    name: str
    block: Window
    scenes: tuple[str, ...]
    first: int = 0


@dataclass(frozen=True)
class Sheet:
    """A part of the mosaic that becomes one folder.

    Attributes:
        target: what it is, its source being the digest of all scenes that reach it.
        window: of the grid; no larger than what scenes reach, by whole tiles of a COG.
        works: its blocks.
        urls: {scene id: URL} of all that reach it.
        refused: {scene id: reason} of scenes that reach it and are left out.
    """

    target: Target
    window: Window
    works: tuple[Work, ...]
    urls: Mapping[str, str]
    refused: Mapping[str, str]

    @property
    def scenes(self) -> set[str]:
        return {one for work in self.works for one in work.scenes}

    @property
    def pixels(self) -> int:
        return sum(work.block.area for work in self.works)

    def without(self, refused: Mapping[str, str]) -> Sheet:
        """The same sheet, left out what can't be read."""
        mine = {one: refused[one] for one in sorted(self.scenes & set(refused))} | dict(self.refused)
        works = tuple(replace(one, scenes=tuple(s for s in one.scenes if s not in mine)) for one in self.works)
        properties = dict(self.target.properties)
        if mine:
            properties[REFUSED] = dict(sorted(mine.items()))
        links = tuple(url for one, url in self.urls.items() if one not in mine)
        return Sheet(replace(self.target, properties=properties, links=links), self.window, works, self.urls, mine)


def plan_sheets(
    scenes: Sequence[Scene], layout: Layout, *, aoi: tuple[bytes, str] | None = None
) -> tuple[list[Sheet], list[Scene], dict[str, str]]:
    """Sheets with their blocks, from metadata alone, in order; scenes that no pixel of the grid lies in; and {scene id:
    reason} of those that can't be laid on the grid.

    Blocks that do not touch the aoi are left out.

    Args:
        scenes: those that `unfit` says nothing of.
    """
    ordered, refused = [], {}
    touched: dict[tuple[int, int], dict[Window, list[str]]] = {}
    extents: dict[str, Window | None] = {}
    for scene in in_order(scenes, layout.rule):
        try:
            warp = Warp(layout.grid, scene)
            blocks_of_scene, extents[scene.scene_id] = list(_blocks_of(warp, layout)), warp.extent()
        except Exception as error:
            refused[scene.scene_id] = errors.refusal(error).reason
            continue
        ordered.append(scene)
        for key, block in blocks_of_scene:
            touched.setdefault(key, {}).setdefault(block, []).append(scene.scene_id)
    by_id = {scene.scene_id: scene for scene in ordered}
    sheets = []
    for key in sorted(touched):
        blocks = sorted(touched[key])
        if aoi is not None:
            frame = _frame(layout.grid, hull(blocks))
            mine = shapes.AoiTest(aoi)(frame, [relative(one, frame) for one in blocks])
            blocks = [one for one, hit in zip(blocks, mine, strict=True) if hit]
        if not blocks:
            continue
        works = [(one, tuple(touched[key][one])) for one in blocks]
        names = {name for _, some in works for name in some}
        used = [scene for scene in ordered if scene.scene_id in names]
        reached = [extents[name] for name in names]
        window = hull(blocks)
        whole = [one for one in reached if one is not None]
        if len(whole) == len(reached):
            window = window & hull(whole)
        if layout.grid.is_file:  # cut only where the sheet or the file ends
            window = Window(key[0] * layout.sheet, key[1] * layout.sheet, layout.sheet, layout.sheet)
        if layout.grid.limits is not None:
            window = window & layout.grid.limits
        if window.area:
            sheets.append(_sheet(key, works, used, layout.grid, window))
    inside = {one for sheet in sheets for one in sheet.scenes}
    return sheets, [scene for scene in by_id.values() if scene.scene_id not in inside], refused


def unfit(scenes: Sequence[Scene], layout: Layout) -> dict[str, str]:
    """{scene id: reason} of scenes for whose pixels the grid's resolution can't be meant, or that have no way onto it.

    Raises:
        UsageError: if it is the resolution of all of them.
    """
    found, elsewhere = {}, {}
    for scene in scenes:
        try:
            if reason := Warp(layout.grid, scene).misfit():
                found[scene.scene_id] = reason
        except Exception as error:
            elsewhere[scene.scene_id] = errors.refusal(error).reason
    if found and len(found) == len(scenes):
        raise UsageError(next(iter(found.values())))
    return found | elsewhere


def stretched(sheets: Sequence[Sheet], grid: Grid) -> str | None:
    """What to say where a projected grid's pixels are not what its CRS calls them, as far outside of a UTM zone."""
    nominal = geography.nominal_distance(grid.crs, grid.transform)
    sizes = [(one.gsd, one.footprint, one.name) for one in (sheet.target for sheet in sheets) if one.gsd]
    if nominal is None or not sizes:
        return None
    gsd, outline, name = max(sizes, key=lambda one: abs(math.log(one[0] / nominal)))
    if abs(gsd / nominal - 1) <= MOST_STRETCHED or outline is None:
        return None
    import shapely

    middle = shapely.from_wkb(outline).representative_point()
    zone = 32600 + (100 if middle.y < 0 else 0) + int((middle.x + 180) // 6) % 60 + 1
    return (
        f"pixels that the grid's CRS calls {nominal:.4g} m are {gsd:.4g} m on the ground in sheet {name}; "
        f"where sizes matter, take a CRS made for it, such as EPSG:{zone}"
    )


def in_order(scenes: Sequence[Scene], rule: str) -> list[Scene]:
    """Scenes as they are added: by id, or the newest first: by their time, or the first of an interval; others last."""
    ordered = sorted(scenes, key=lambda one: one.scene_id)
    if rule != "newest":
        return ordered
    times = {one.scene_id: one.datetime or (one.span and one.span[0]) for one in ordered}
    age = {scene_id: moment(time).timestamp() if time else -math.inf for scene_id, time in times.items()}
    return sorted(ordered, key=lambda one: age[one.scene_id], reverse=True)


def _blocks_of(warp: Warp, layout: Layout) -> Iterator[tuple[tuple[int, int], Window]]:
    """((row, col) of the sheet, block) for all blocks that a scene reaches."""
    size, edge, world = layout.sheet, layout.block, warp.world
    found: dict[Window, tuple[int, int]] = {}
    for box in warp.reach(edge):
        # The lattice of `reach` is the grid's, that of blocks begins anew in each sheet.
        for row in _starts(box.row, box.stop_row, size, edge):
            for col in _starts(box.col, box.stop_col, size, edge):
                key = row // size, col // size
                block = Window(row, col, min(edge, (key[0] + 1) * size - row), min(edge, (key[1] + 1) * size - col))
                if world is not None:
                    block = block & world
                if block.area:
                    found[block] = key
    blocks = list(found)
    for block, hit in zip(blocks, warp.touches(blocks), strict=True):
        if hit:
            yield found[block], block


def _starts(start: int, stop: int, size: int, edge: int) -> Iterator[int]:
    """Where the blocks begin that lie in start <= x < stop of one axis."""
    for sheet in range(start // size, (stop - 1) // size + 1):
        first = max(start - sheet * size, 0) // edge
        for number in range(first, -(-min(stop - sheet * size, size) // edge)):
            yield sheet * size + number * edge


def _sheet(
    key: tuple[int, int], works: Sequence[tuple[Window, tuple[str, ...]]], used: list[Scene], grid: Grid, window: Window
) -> Sheet:
    name = f"r{key[0]}_c{key[1]}"
    transform = grid.of(window)
    datetimes = {scene.datetime for scene in used}
    span = whole_span([scene.span for scene in used])
    target = Target(
        name, window.height, window.width, grid.crs, transform,
        geography.ground_sample_distance(grid.crs, transform, window.height, window.width),
        _footprint(grid, window),
        datetimes.pop() if len(datetimes) == 1 else None,
        storage.digest([[json.loads(scene.source_json()) for scene in used], list(asdict(window).values())]),
        span if span and span[0] != span[1] else None,
        tuple(scene.url for scene in used),
        {mosaic.WINDOW: list(asdict(window).values())},
    )  # fmt: skip
    urls = {scene.scene_id: scene.url for scene in used}
    return Sheet(target, window, tuple(Work(name, block, names) for block, names in works), urls, {})


def _footprint(grid: Grid, window: Window) -> bytes | None:
    transform = grid.of(window)
    a, b, west, d, e, north = transform
    east, south = west + a * window.width, north + e * window.height
    if geography.is_geographic(grid.crs) and not b and not d and max(abs(west), abs(east)) <= 180 + 1e-9:
        import shapely

        # Degrees as they are: the meridian of 180 would come back from a projection as that of -180.
        box = shapely.box(max(min(west, east), -180), min(south, north), min(max(west, east), 180), max(south, north))
        return bytes(shapely.to_wkb(shapely.normalize(box)))
    return geography.footprint(grid.crs, transform, window.height, window.width)


@dataclass(frozen=True)
class _Frame:
    """A window of a grid, as something that shapes are drawn on."""

    height: int
    width: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    window: Window


def _frame(grid: Grid, window: Window) -> _Frame:
    return _Frame(window.height, window.width, grid.crs, grid.of(window), window)


def relative(block: Window, frame: _Frame) -> Window:
    """A block of the grid, counted from a frame's corner."""
    return Window(block.row - frame.window.row, block.col - frame.window.col, block.height, block.width)


def aoi_on_grid(aoi: tuple[bytes, str], grid: Grid, block: Window) -> np.ndarray:
    """Which pixels of a block have their centre in an area of interest: (height, width) bool.

    An area is bent from its CRS to the grid's frame by frame. Frames are the grid's own, so that neither sheets nor
    blocks decide about a pixel at its edge.
    """
    inside = np.zeros(block.shape, bool)
    for row in range(block.row // FRAME, (block.stop_row - 1) // FRAME + 1):
        for col in range(block.col // FRAME, (block.stop_col - 1) // FRAME + 1):
            frame = _frame(grid, Window(row * FRAME, col * FRAME, FRAME, FRAME))
            part = block & frame.window
            inside[part.slices(block)] = shapes.aoi_mask(*aoi, frame, relative(part, frame))
    return inside


def tasks_of(works: Sequence[Work], slots: int) -> list[list[Work]]:
    """Runs of neighbouring blocks, several a core so that the end is even."""
    return deal(works, [work.block.area * len(work.scenes) for work in works], most=TASK_PIXELS, slots=slots)


def shares_a_task(works: Sequence[Work], slots: int) -> bool:
    """Whether a block is inferred and added up in one task; two, with a shuffle between, where cores would idle."""
    return len(works) >= slots or max((len(work.scenes) for work in works), default=0) < 2


# --- a scene in a block -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One scene in one block, or a part of it (`cut.window`): what is read, evaluated, and where it goes."""

    work: Work
    rank: int
    scene: Scene
    warp: Warp
    cut: Cut
    placements: tuple[Placement, ...]
    region: Window


@lru_cache(maxsize=256)
def _warp(grid: Grid, scene_id: str, height: int, width: int, crs: str, transform: tuple[float, ...]) -> Warp:
    return Warp(grid, Scene(scene_id, "", height, width, (), crs, transform))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Unread:
    """A scene that is refused, and the block that it was for."""

    work: Work
    scene_id: str
    reason: str


def steps_of(work: Work, scenes: Mapping[str, Scene], job: Inference, layout: Layout) -> Iterator[Step | Unread]:
    """What has to be done for one block, in order; scenes of which it needs no pixel are left out.

    A scene much finer than the grid is taken in parts of the block, so that no more of it is held than of others.
    """
    for rank, scene_id in enumerate(work.scenes, start=work.first):
        try:
            yield from _steps(work, rank, scenes[scene_id], job, layout)
        except Exception as error:
            yield Unread(work, scene_id, errors.refusal(error).reason)


def _steps(work: Work, rank: int, scene: Scene, job: Inference, layout: Layout) -> Iterator[Step]:
    """Of one scene."""
    edge = job.geometry.size if job.geometry.merge == "crop" else layout.block
    warp = _warp(layout.grid, scene.scene_id, scene.height, scene.width, str(scene.crs), scene.transform)
    extent = warp.extent()
    # A small scene in a block of a coarse grid: the points of all other pixels would be looked up, too. A side that
    # is a curve on the grid may bulge beyond the extent.
    near = extent and extent.pad(2 + max(extent.height, extent.width) // 8)
    parts = [work.block & near if near else work.block]
    while parts:
        part = parts.pop()
        cut = warp.cut(part) if part.area else None
        if cut is None or not cut.need.area:
            continue
        if cut.need.area > 2 * edge**2 and part.area > 1:
            parts += reversed(part.quarters())
            continue
        placements = tuple(job.geometry.cover(scene.height, scene.width, cut.need))
        yield Step(work, rank, scene, warp, cut, placements, hull(one.read for one in placements))


def read_step(
    scene: Scene, region: Window, need: Window, *, scaled: bool, nodata: float | None, cloud: str | None
) -> tuple[BlockRead, np.ndarray | None]:
    """Pixels of a scene for one step, and the probability of cloud of the needed ones. Runs in the decoder.

    Raises:
        Refused: if the scene can't be read.
    """
    pixels = scene if cloud is None else scene.select(scene.band_names[:-1])
    data, valid = raster.read(pixels, region, nodata=nodata, scaled=scaled, by_band=True)
    clouds = None
    if cloud is not None:
        values, known = raster.read(scene.select([cloud]), need, nodata=nodata)
        clouds = np.where(known, np.clip(values[..., 0], 0, 100), 0).astype(np.uint8)
    wanted = valid[need.slices(region)]
    return BlockRead(region, data, valid, wanted, None, peak_mb()), clouds


def score_step(
    step: Step, read: BlockRead, clouds: np.ndarray | None, job: Inference, layout: Layout
) -> tuple[np.ndarray, np.ndarray, int]:
    """Scores and weights of the needed pixels of a scene, on its own grid.

    Returns:
        scores: (height, width, classes) float32.
        weights: (height, width) int64; 0 where there is nothing.
        evaluated: pixels that the network ran on.
    """
    need, classes = step.cut.need, len(job.bundle.classes)
    weights = read.wanted.astype(np.int64)
    scores = np.zeros((*need.shape, classes), np.float32)
    placements = [one for one in step.placements if read.wanted[one.keep.slices(need)].any()]
    if not placements:
        return scores, weights * 0, 0
    scorer = job.scorer
    count = min(job.batch, len(step.placements))
    if job.geometry.merge == "crop":
        for place, window in run_windows(placements, read, job, scorer, count):
            scores[place.keep.slices(need)] = window[place.keep.slices(place.read)]
    else:
        stitcher = Stitcher(need, classes)
        shape = placements[0].read.shape
        taper = blend_weights(*shape)
        for place, window in run_windows(placements, read, job, scorer, count):
            inside = place.keep.slices(place.read)
            stitcher.add(place.keep, window[inside], read.wanted[place.keep.slices(need)], taper[inside])
        scores = stitcher.scores()
        # 1 to some hundred: less where only the rims of windows lie, at the edge of a scene.
        weights = np.where(stitcher.coverage > 0, np.maximum(stitcher.coverage // PEAK, 1), 0)
    weights[~np.isfinite(scores).all(axis=-1)] = 0
    if layout.weights.edge:
        weights *= edge_weights(step.scene, need)
    if clouds is not None:
        weights *= 100 - clouds.astype(np.int64)
    evaluated = -(-len(placements) // count) * count * placements[0].read.area * job.passes
    return scores, weights, evaluated


def edge_weights(scene: Scene, window: Window) -> np.ndarray:
    """(height, width) int64 from 1 at the edge of a scene's grid to `PEAK` in its middle, by distance."""
    sides = []
    for start, stop, extent in (
        (window.row, window.stop_row, scene.height), (window.col, window.stop_col, scene.width)
    ):  # fmt: skip
        at = np.arange(start, stop)
        sides.append(np.minimum(at, extent - 1 - at) + 1)
    near = np.minimum(sides[0][:, None], sides[1][None])
    return np.maximum(near * PEAK * 2 // (min(scene.height, scene.width) + 1), 1).clip(max=PEAK).astype(np.int64)


@dataclass(frozen=True)
class Got:
    """A step whose pixels are read."""

    step: Step
    read: BlockRead
    clouds: np.ndarray | None

    @property
    def work(self) -> Work:
        return self.step.work


@dataclass(frozen=True)
class Scored:
    """A step that is on the grid: scores and weights (None for nothing), and what it took.

    Attributes:
        seen: see `inference.see`.
        evaluated: pixels that the network ran on.
        memory_mb: peak of this worker and its decoder.
    """

    step: Step
    scores: np.ndarray | None
    weights: np.ndarray | None
    seen: np.ndarray | None
    evaluated: int
    memory_mb: float


def read_steps(
    items: Iterable[Step | Unread | Work], job: Inference, layout: Layout, bad: Set[str] = frozenset()
) -> Iterator[Got | Unread | Work]:
    """Read steps one after the other, the next while the present one is used; what is no step passes in its place.

    A scene that can't be read is refused once, and its further steps are left out.

    Args:
        bad: ids of scenes whose further steps are left out, too; may grow.
    """
    how: dict[str, Any] = {
        "scaled": job.bundle.values == "scaled", "nodata": job.nodata, "cloud": layout.weights.cloud,
    }  # fmt: skip

    def call(item: Step | Unread | Work) -> Callable[[], Any] | None:
        if not isinstance(item, Step) or item.scene.scene_id in bad:
            return None
        return partial(read_step, item.scene, item.region, item.cut.need, **how)

    def source(item: Step | Unread | Work) -> str:
        return item.scene.scene_id if isinstance(item, Step) else ""

    for item, read in read_ahead(items, call, source):
        if not isinstance(item, Step):
            yield item
        elif isinstance(read, Refused):
            yield Unread(item.work, item.scene.scene_id, read.reason)
        elif read is not None and item.scene.scene_id not in bad:
            yield Got(item, *read)


# --- a block ------------------------------------------------------------------------------------------------------


class Sums:
    """One block over its scenes, added in order."""

    def __init__(self, work: Work, frame: _Frame, job: Inference, layout: Layout):
        self.work, self.frame, self.job, self.newest = work, frame, job, layout.rule == "newest"
        self.stitcher = Stitcher(work.block, len(job.bundle.classes))
        self.count = np.zeros(work.block.shape, np.uint16)
        self.inside: np.ndarray | None = None
        if job.aoi is not None:
            self.inside = aoi_on_grid(job.aoi, layout.grid, work.block)

    @property
    def is_full(self) -> bool:
        """Whether no further scene can change anything."""
        return self.newest and bool((self.stitcher.coverage > 0).all())

    def add(self, part: Window, scores: np.ndarray, weights: np.ndarray) -> None:
        """One scene's share of a part of the block."""
        here = part.slices(self.work.block)
        usable = weights > 0
        if self.newest:
            usable &= self.stitcher.coverage[here] == 0
        self.stitcher.add(part, scores, usable, weights.astype(np.int64))
        self.count[here] += usable

    def rows(self, tally: Tally) -> Iterator[tuple[Any, ...]]:
        """Rows of `INFERRED`."""
        job, block = self.job, self.work.block
        kept = block & self.frame.window
        covered = self.stitcher.coverage > 0
        if self.inside is not None:
            covered &= self.inside
        labels = np.full(block.shape, NODATA, np.uint8)
        scores = np.full((*block.shape, len(job.bundle.classes)), np.nan, np.float32) if job.scores else None
        if covered.any():
            for start in range(0, block.height, 256):
                rows = slice(start, min(start + 256, block.height))
                strip = self.stitcher.scores(rows)
                labels[rows] = to_labels(strip, covered[rows], job.class_ids, job.threshold)
                if scores is not None:
                    scores[rows] = np.where(covered[rows][..., None], strip, np.nan)
        coverage = None
        if job.coverage:
            most = np.iinfo(np.uint32).max
            coverage = np.where(covered, np.minimum(self.stitcher.coverage, most), 0).astype(np.uint32)
        count = np.where(covered, self.count, 0).astype(np.uint16) if job.coverage else None
        inner = kept.slices(block)
        others = (None if one is None else one[inner] for one in (scores, coverage, count))
        part = Part(relative(kept, self.frame), labels[inner], *others)
        return rows_of(self.work.name, part, covered[inner], tally)


def score_on_grid(got: Got, job: Inference, layout: Layout) -> Scored | Unread:
    """A step on the grid; or why its scene is refused, whatever it was that it raised."""
    if got.read.wanted.any():
        _ = job.scorer  # a network that can't be loaded is no scene's fault
    try:
        scores, weights, evaluated = score_step(got.step, got.read, got.clouds, job, layout)
        seen, memory = see(got.read, got.step.cut.need, job), peak_mb() + got.read.memory_mb
        if not weights.any():
            return Scored(got.step, None, None, seen, evaluated, memory)
        return Scored(got.step, *got.step.warp.apply(got.step.cut, scores, weights), seen, evaluated, memory)
    except Exception as error:
        return Unread(got.work, got.step.scene.scene_id, errors.refusal(error).reason)


def refusal(name: str, scene_id: str, reason: str, memory_mb: float) -> tuple[Any, ...]:
    """A row of `INFERRED`: the sheet `name` can't be before it is known that this scene is left out."""
    return refused(name, json.dumps({"scene": scene_id, "reason": reason}), memory_mb)


def stitch(
    frames: Iterable[pd.DataFrame], *, tasks: Any, scenes: Any, windows: Any, job: Inference, layout: Layout
) -> Iterator[pd.DataFrame]:
    """Map and reduce in one: task numbers in (`id`), rows of `INFERRED` out, for `mapInPandas`.

    Args:
        tasks: broadcast list of lists of works, by task number.
        scenes: broadcast {id: Scene}.
        windows: broadcast {name of sheet: its window}.
    """
    import pandas as pd

    def items() -> Iterator[Step | Unread | Work]:
        for frame in frames:
            for number in frame["id"]:
                for work in tasks.value[int(number)]:
                    yield from steps_of(work, scenes.value, job, layout)
                    yield work  # the end of it

    sums: Sums | None = None
    tally = Tally()
    bad: set[str] = set()
    for item in read_steps(items(), job, layout, bad):
        work = item if isinstance(item, Work) else item.work
        if sums is None:
            sums = Sums(work, _frame(layout.grid, windows.value[work.name]), job, layout)
        if isinstance(item, Work):
            tally.memory_mb = max(tally.memory_mb, peak_mb())
            rows = list(sums.rows(tally))
            sums, tally = None, Tally(memory_mb=tally.memory_mb)
            yield pd.DataFrame(rows, columns=columns(INFERRED))
            continue
        done = score_on_grid(item, job, layout) if isinstance(item, Got) and not sums.is_full else item
        if isinstance(done, Unread):
            bad.add(done.scene_id)
            row = refusal(work.name, done.scene_id, done.reason, tally.memory_mb)
            yield pd.DataFrame([row], columns=columns(INFERRED))
        elif isinstance(done, Scored):
            tally.evaluated += done.evaluated
            tally.seen.add(done.step.scene.scene_id, done.seen)
            tally.memory_mb = max(tally.memory_mb, done.memory_mb)
            if done.scores is not None and done.weights is not None:
                sums.add(done.step.cut.window, done.scores, done.weights)


SHARES = (
    "name string, row int, col int, height int, width int, rank int, top int, left int, rows int, cols int, "
    "scores binary, weights binary, evaluated long, memory_mb double, seen string, scene string, reason string"
)
"""What one scene gives to a part of a block (both in pixels of the grid), on the way to where that is added up."""


def infer(
    frames: Iterable[pd.DataFrame], *, tasks: Any, scenes: Any, job: Inference, layout: Layout
) -> Iterator[pd.DataFrame]:
    """Map alone: task numbers in, rows of `SHARES` out; at least one for each block."""
    import pandas as pd

    def items() -> Iterator[Step | Unread | Work]:
        for frame in frames:
            for number in frame["id"]:
                for work in tasks.value[int(number)]:
                    yield work
                    yield from steps_of(work, scenes.value, job, layout)

    bad: set[str] = set()
    for item in read_steps(items(), job, layout, bad):
        work = item if isinstance(item, Work) else item.work
        place = work.name, *asdict(work.block).values()
        rows: list[tuple[Any, ...]] = []
        nothing = 0, 0, 0, 0
        done = score_on_grid(item, job, layout) if isinstance(item, Got) else item
        if isinstance(done, Work):
            rows.append((*place, -1, *nothing, None, None, 0, peak_mb(), None, None, None))
        elif isinstance(done, Unread):
            bad.add(done.scene_id)
            rows.append((*place, -1, *nothing, None, None, 0, peak_mb(), None, done.scene_id, done.reason))
        else:
            seen = Sights()
            seen.add(done.step.scene.scene_id, done.seen)
            taken = done.evaluated, done.memory_mb, seen.to_json()
            rows.append((*place, -1, *nothing, None, None, *taken, None, None))
            if done.scores is not None and done.weights is not None:
                whole = done.step.cut.window
                step = max(ROW_BYTES // (whole.width * (4 * done.scores.shape[-1] + 4)), 1)
                for top in range(0, whole.height, step):
                    some = slice(top, min(top + step, whole.height))
                    part = whole.row + top, whole.col, some.stop - top, whole.width
                    packed = mosaic.pack(done.scores[some]), mosaic.pack(done.weights[some])
                    rows.append((*place, done.step.rank, *part, *packed, 0, done.memory_mb, None, None, None))
        for row in rows:
            yield pd.DataFrame([row], columns=columns(SHARES))


def add_up(frames: Iterable[pd.DataFrame], *, windows: Any, job: Inference, layout: Layout) -> Iterator[pd.DataFrame]:
    """Reduce alone: rows of `SHARES` sorted by block, rank and top in, rows of `INFERRED` out."""
    import pandas as pd

    classes = len(job.bundle.classes)
    rows = (row for frame in frames for row in frame.itertuples(index=False))
    for (name, *numbers), group in groupby(rows, key=lambda row: (row.name, row.row, row.col, row.height, row.width)):
        work = Work(name, Window(*map(int, numbers)), ())
        sums = Sums(work, _frame(layout.grid, windows.value[name]), job, layout)
        tally = Tally()
        for row in group:
            tally.evaluated += row.evaluated
            tally.seen.merge(row.seen)
            tally.memory_mb = max(tally.memory_mb, row.memory_mb, peak_mb())
            if row.reason is not None:
                yield pd.DataFrame([refusal(name, row.scene, row.reason, tally.memory_mb)], columns=columns(INFERRED))
            elif row.scores is not None:
                part = Window(int(row.top), int(row.left), int(row.rows), int(row.cols))
                scores = mosaic.unpack(row.scores, "float32", (*part.shape, classes))
                weights = mosaic.unpack(row.weights, "uint32", part.shape)
                assert scores is not None
                assert weights is not None
                tally.moved += len(row.scores) + len(row.weights)
                sums.add(part, scores, weights)
        yield pd.DataFrame(list(sums.rows(tally)), columns=columns(INFERRED))


# --- on the driver ------------------------------------------------------------------------------------------------


def run_wave(
    spark: SparkSession, sheets: Sequence[Sheet], *, scenes: Mapping[str, Scene], job: Inference, layout: Layout,
    product: Product, staging: str,
) -> list[Row]:  # fmt: skip
    """Infer, add up and write some sheets: rows of `WRITTEN`."""
    works = [work for sheet in sheets for work in sheet.works]
    slots = engines.slots(spark)
    together = shares_a_task(works, slots)
    if not together:
        works = [replace(work, scenes=(one,), first=rank) for work in works for rank, one in enumerate(work.scenes)]
    tasks = tasks_of(works, slots)
    used = {one: scenes[one] for work in works for one in work.scenes}
    sent = [
        spark.sparkContext.broadcast(value)
        for value in (tasks, used, {sheet.target.name: sheet.window for sheet in sheets})
    ]
    settings: dict[str, Any] = {"job": job, "layout": layout}
    try:
        numbers = task_numbers(spark, len(tasks))
        if together:
            work = partial(stitch, tasks=sent[0], scenes=sent[1], windows=sent[2], **settings)
            inferred = numbers.mapInPandas(engines.on_worker(work), INFERRED)
        else:
            shares = numbers.mapInPandas(
                engines.on_worker(partial(infer, tasks=sent[0], scenes=sent[1], **settings)), SHARES
            )
            block = ["name", "row", "col"]
            grouped = shares.repartition(max(min(len(works), 2 * slots), 1), *block)
            ordered = grouped.sortWithinPartitions(*block, "rank", "top")
            inferred = ordered.mapInPandas(engines.on_worker(partial(add_up, windows=sent[2], **settings)), INFERRED)
        targets = {sheet.target.name: sheet.target for sheet in sheets}
        return write_maps(spark, inferred, targets, product, staging)
    finally:
        for one in sent:
            one.unpersist()


def refusals(reason: str) -> dict[str, str]:
    """{scene id: reason} of what `refusal` said of a sheet; nothing if it is the sheet that could not be written."""
    found: dict[str, str] = {}
    for line in reason.split("\n"):
        with suppress(ValueError):
            value = json.loads(line)
            found.setdefault(value["scene"], value["reason"])
    return found


def describe_plan(
    sheets: Sequence[Sheet], scenes: Mapping[str, Scene], job: Inference, layout: Layout, speed: float | None
) -> dict[str, Any]:
    """What will be computed, in numbers: estimates. `speed` is that of an earlier run, in evaluated Mpix/s."""
    works = [work for sheet in sheets for work in sheet.works]
    used = Counter(name for work in works for name in work.scenes)
    geometry, evaluated = job.geometry, 0.0
    ratio = 1.0
    for name in sorted(used):
        scene = scenes[name]
        warp = Warp(layout.grid, scene)
        ratio = max(ratio, warp.stretch)
        need = layout.block * warp.stretch
        shape = geometry.cover(
            scene.height, scene.width, Window(0, 0, *(max(min(round(need), one), 1) for one in warp.shape))
        )
        price = sum(one.read.area for one in shape) / max(sum(one.keep.area for one in shape), 1)
        # Of a scene that has blocks outside the area of interest, or in sheets that are done, a part.
        evaluated += min(scene.height * scene.width, used[name] * need**2) * price * job.passes
    return {
        "sheets": len(sheets),
        "blocks": len(works),
        "block_edge": layout.block,
        "scenes": len(used),
        "scenes_a_block": max((len(work.scenes) for work in works), default=0),
        **{name: getattr(geometry, name) for name in ("merge", "size", "stride", "halo")},
        "pixels": sum((work.block & sheet.window).area for sheet in sheets for work in sheet.works),
        "evaluated_pixels": round(evaluated),
        "worker_memory_mb": round(block_memory(job, layout.block, ratio / TURN) / 1e6),
        "seconds": round(evaluated / 1e6 / speed, 1) if speed else None,
    }


def announce_plan(
    scenes: Sequence[Scene], refused: Sequence[Refusal], job: Inference, layout: Layout, speed: float | None
) -> None:
    """Print the plan of a mosaic of these scenes."""
    misfits = unfit(scenes, layout)
    by_id = {scene.scene_id: scene for scene in scenes}
    fit = [one for one in scenes if one.scene_id not in misfits]
    sheets, outside, unplaced = plan_sheets(fit, layout, aoi=job.aoi)
    misfits |= unplaced
    refused = [*refused, *(Refusal(by_id[one].url, "predict", reason) for one, reason in misfits.items())]
    numbers = describe_plan(sheets, by_id, job, layout, speed)
    around = f"halo {job.geometry.halo}" if job.geometry.merge == "crop" else f"stride {job.geometry.stride}"
    a, b, _, d, e, _ = layout.grid.transform
    lines = [
        f"scenes      {numbers['scenes']} ({len(refused)} refused, {len(outside)} outside)",
        f"grid        {layout.grid.crs.partition('[')[0]}, pixels of {math.hypot(a, d):g} x {math.hypot(b, e):g} units",
        f"sheets      {numbers['sheets']} of {layout.sheet} px: {', '.join(s.target.name for s in sheets[:8])}"
        f"{', ...' if len(sheets) > 8 else ''}",
        f"blocks      {numbers['blocks']} of {layout.block} px, up to {numbers['scenes_a_block']} scenes in one",
        f"windows     {job.geometry.merge}, size {job.geometry.size}, {around}, {job.batch} a batch",
        f"pixels      {numbers['pixels'] / 1e6:.1f} M of the grid",
        f"evaluated   {numbers['evaluated_pixels'] / 1e6:.1f} Mpix of the scenes",
        f"memory      {numbers['worker_memory_mb'] / 1e3:.1f} GB a worker (an estimate)",
        f"time        {numbers['seconds']:.0f} s at the last run's {speed:g} Mpix/s"
        if speed
        else "time        unknown: no run has been recorded in this folder",
        *(f"refused     {one.url}: {one.reason}" for one in refused),
        *(f"outside     {one.url}" for one in outside),
        *(f"stretched   {said}" for said in [stretched(sheets, layout.grid)] if said),
    ]
    for line in lines:
        record.announce(line)


def waves_of(sheets: Sequence[Sheet]) -> list[list[Sheet]]:
    """Neighbouring sheets, up to `WAVE_PIXELS` together (one at least)."""
    found: list[list[Sheet]] = []
    load = 0
    for sheet in sheets:
        if not found or load + sheet.pixels > WAVE_PIXELS:
            found.append([])
            load = 0
        found[-1].append(sheet)
        load += sheet.pixels
    return found


# --- polygons -----------------------------------------------------------------------------------------------------


VECTORS = "vectors.parquet"
_VECTORS_STATE = "_vectors.json"


def chosen_classes(
    classes: Sequence[SegmentClass], names: str | Sequence[str] | None, sieve: float
) -> tuple[SegmentClass, ...]:
    """The classes that `--vectors` names; none if it names none.

    Raises:
        UsageError: for a name that is no class, a sieve without vectors or below 0.
    """
    wanted = [part.strip() for part in names.split(",")] if isinstance(names, str) else list(names or ())
    if not math.isfinite(sieve) or sieve < 0 or (sieve and not wanted):
        raise UsageError(f"sieve {sieve:g}: give square metres, 0 or more, and --vectors")
    if wanted == ["all"]:
        return tuple(classes)
    by_name = {one.name: one for one in classes}
    for name in wanted:
        if name not in by_name:
            raise UsageError(f"vectors {name!r} is no class of the model{nearest(name, by_name)}")
    return tuple(by_name[name] for name in wanted)


def write_vectors(
    spark: SparkSession, out: str, product: Product, grid: Grid | None, classes: Sequence[SegmentClass], sieve: float
) -> int:
    """Polygons of all finished sheets of `out`, unless the file is already made of just these; how many there are.

    Without classes, a file of other labels than the present ones goes; without sheets any.
    """
    state, url = storage.join(out, _VECTORS_STATE), storage.join(out, VECTORS)
    if not classes and not storage.exists(url):
        return 0
    maps, made_of = [], []
    for name, item in mosaic.finished(out):
        if grid is not None and item["properties"][mosaic.SETTINGS] == product.settings:
            maps.append(vectors.Map(name, storage.join(out, name, "labels.tif"), *item["properties"][mosaic.WINDOW]))
            made_of.append([name, item["properties"][mosaic.WINDOW], item["assets"]["labels"]["file:checksum"]])
    labels = storage.digest(made_of)
    source = storage.digest([labels, describe_classes(classes), sieve])
    before: dict[str, Any] = {}
    if storage.exists(url):
        with suppress(Exception):
            before = storage.read_json(state)
        if classes and before.get("source") == source:
            return int(before["polygons"])
        if not maps or (not classes and before.get("labels") != labels):
            log.warning("predict: %s was of other labels, and is removed; --vectors makes it anew", VECTORS)
            storage.remove(url)
            storage.remove(state)
    if not maps or not classes or grid is None:
        return 0
    for entry in storage.list_folder(out):
        if storage.name(entry.url).startswith(f".{VECTORS}.work-"):  # of a killed run; the lease is ours
            storage.remove(entry.url)
    count = vectors.vectorize(
        spark, maps, classes=classes, crs=grid.crs, transform=grid.transform, out=url, sieve=sieve, source=source
    )
    storage.write_json(state, {"source": source, "labels": labels, "polygons": count})
    return count
