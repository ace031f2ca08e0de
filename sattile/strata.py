"""For which spatial block and which region a pixel counts, when it is asked how well a model does, and how surely.

Scenes are counted in squares on their own lattice: all pixels of one go where its middle lies. So what is counted
where does not depend on how a scene is cut into blocks for prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from sattile import geography, labels, split, storage
from sattile.errors import Refused, UsageError
from sattile.grid import Window
from sattile.schema import Scene

log = logging.getLogger("sattile")

SQUARE = 32
"""Edge of the squares in which scenes are counted, in pixels."""

LARGEST, SMALLEST, ENOUGH = 512, 128, 30
"""Edge of a spatial block of scenes in pixels: the largest there is, less where that makes fewer than `ENOUGH` blocks,
but no less than the smallest: what lies nearer is wrong together."""

OUTSIDE = "(outside)"
"""The region of pixels that are in none."""

Stratum = tuple[str, str | None]
"""(spatial block, region); region is None where none were given."""


@dataclass(frozen=True)
class Regions:
    """Named areas; where they overlap, a later one wins.

    Attributes:
        names, wkb: of each shape; several shapes may have one name.
        crs: of the shapes.
    """

    names: tuple[str, ...]
    wkb: tuple[bytes, ...]
    crs: str

    @property
    def digest(self) -> str:
        return storage.digest([self.names, [one.hex() for one in self.wkb], self.crs])


@dataclass(frozen=True)
class Strata:
    """How the pixels of scenes are dealt.

    Attributes:
        cell: edge of a spatial block in metres; see `split` for where they lie.
    """

    cell: float
    regions: Regions | None = None


def read_regions(url: str | None, attribute: str | None) -> Regions | None:
    """The polygons of a vector file, named by an attribute, or by their numbers in the file, from 1.

    Raises:
        UsageError: if the file can't be read, lacks the attribute, or holds no polygon.
    """
    import shapely

    if url is None:
        if attribute is not None:
            raise UsageError("--region-attribute names an attribute of --regions; give that, too")
        return None
    features = labels.read_vector(url, attribute)
    names = features.values if attribute else tuple(map(str, features.numbers))
    areas = shapely.area(shapely.from_wkb(list(features.wkb)))
    kept = [index for index, area in enumerate(areas) if area > 0]
    if not kept:
        which = f" with a {attribute}" if attribute else ""
        raise UsageError(f"--regions {url} holds no polygon{which}")
    if OUTSIDE in names:
        raise UsageError(f"--regions {url}: {OUTSIDE} is the name of all that lies in no region; rename that region")
    return Regions(tuple(names[index] for index in kept), tuple(features.wkb[index] for index in kept), features.crs)


def strata_of(scenes: Sequence[Scene], regions: Regions | None) -> Strata:
    """Spatial blocks for these scenes: `LARGEST`, or smaller ones where these would be too few."""
    known = [scene for scene in scenes if scene.gsd]
    gsd = float(np.median([scene.gsd for scene in known])) if known else 1.0
    ground = sum(scene.height * scene.width * (scene.gsd or 0) ** 2 for scene in known)
    edge = min(max((ground / ENOUGH) ** 0.5 / gsd, SMALLEST), LARGEST)
    _warn_without_place(regions, [scene.url for scene in scenes if scene.crs is None])
    return Strata(edge * gsd, regions)


def parts(scene: Scene, block: Window, strata: Strata) -> Iterator[tuple[Window, Stratum]]:
    """The rectangles of a block that count for one stratum each; together they are the block.

    A scene without a CRS, and what of another lies on no ground, is a spatial block of its own, outside all regions.
    """
    rows = np.arange(block.row // SQUARE, -(-block.stop_row // SQUARE))
    cols = np.arange(block.col // SQUARE, -(-block.stop_col // SQUARE))
    # Squares at the right and bottom edge are cut off by it.
    down = (rows * SQUARE + np.minimum((rows + 1) * SQUARE, scene.height)) / 2
    right = (cols * SQUARE + np.minimum((cols + 1) * SQUARE, scene.width)) / 2
    at_cols, at_rows = (one.ravel() for one in np.meshgrid(right, down))
    blocks = blocks_at(scene.scene_id, scene.crs, scene.transform, at_cols, at_rows, strata.cell)
    regions = regions_at(strata.regions, scene.crs, scene.transform, at_cols, at_rows)
    found = list(zip(blocks, regions, strict=True))
    for index, row in enumerate(rows):
        strip, first = found[index * len(cols) :][: len(cols)], 0
        for last in range(1, len(cols) + 1):
            if last == len(cols) or strip[last] != strip[first]:
                col, width = int(cols[first]) * SQUARE, (last - first) * SQUARE
                yield Window(int(row) * SQUARE, col, SQUARE, width) & block, strip[first]
                first = last


def blocks_at(
    scene_id: str, crs: str | None, transform: Sequence[float], cols: np.ndarray, rows: np.ndarray, cell: float
) -> list[str]:
    """The spatial block of each point of a scene, (n,) float pixel coordinates."""
    if crs is None:
        return [scene_id] * len(cols)
    lon, lat = _in(crs, "EPSG:4326", transform, cols, rows)
    on_ground = np.isfinite(lon) & np.isfinite(lat)
    found = split.cells_at(np.where(on_ground, lon, 0), np.where(on_ground, lat, 0), cell)
    return [key if good else scene_id for key, good in zip(found, on_ground, strict=True)]


def regions_at(
    regions: Regions | None, crs: str | None, transform: Sequence[float], cols: np.ndarray, rows: np.ndarray
) -> list[str | None]:
    """The name of the region of each point of a grid, (n,) float pixel coordinates."""
    import shapely

    if regions is None:
        return [None] * len(cols)
    if crs is None:
        return [OUTSIDE] * len(cols)
    x, y = _in(crs, regions.crs, transform, cols, rows)
    numbers = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    # A tree of points, asked for each shape: it is the asker that is made ready for many questions.
    tree = shapely.STRtree(shapely.points(x[numbers], y[numbers]))
    shapes, points = tree.query(_shapes(regions), predicate="intersects")
    holder = np.full(len(cols), -1)
    np.maximum.at(holder, numbers[points], shapes)
    return [OUTSIDE if index < 0 else regions.names[index] for index in holder]


@lru_cache(maxsize=2)
def _shapes(regions: Regions) -> Any:
    import shapely

    return shapely.from_wkb(list(regions.wkb))


def _in(
    crs: str, other: str, transform: Sequence[float], cols: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in another CRS of points of a grid; infinite where they have none there."""
    x, y = geography.apply(transform, cols, rows)
    try:
        transformer = geography.transformer_between(crs, other)
    except Refused:  # a drawing's CRS: on no ground
        return np.full(x.shape, np.inf), np.full(y.shape, np.inf)
    # As lists: pyproj takes an array of one for a scalar.
    found = transformer.transform(x.tolist(), y.tolist()) if transformer else (x, y)
    return np.asarray(found[0], np.float64), np.asarray(found[1], np.float64)


def of_tiles(
    tiles: Sequence[tuple[str, int, int, str]], description: Mapping[str, Any], regions: Regions | None
) -> dict[tuple[str, int, int], Stratum]:
    """The stratum of each tile of a dataset: its ground cell, or a larger block where that is smaller than `SMALLEST`;
    the region is that of its middle.

    Args:
        tiles: (scene_id, row, col, spatial_block).
        description: of the dataset.

    Raises:
        UsageError: with regions, if the dataset does not say where its scenes lie.
    """
    size, gsd, sources = description["size"], description["gsd"], description["sources"]
    places = {one["scene_id"]: one for one in sources}
    is_placed = all("transform" in one for one in sources)
    if regions is not None and not is_placed:
        raise UsageError("the dataset does not say where its tiles lie, so --regions can't be used; tile it again")
    cell = SMALLEST * gsd if is_placed and gsd else 0.0
    rule = description.get("split_rule", {})
    if rule.get("by") == "shapes" or cell <= (rule.get("cell") or size * (gsd or 0.0)):
        cell = 0.0  # the tiles' own are large enough, or groups of shapes that lie apart
    if regions is None and not cell:
        return {tile[:3]: (tile[3], None) for tile in tiles}
    by_scene: dict[str, list[tuple[str, int, int, str]]] = {}
    for tile in tiles:
        by_scene.setdefault(tile[0], []).append(tile)
    _warn_without_place(regions, [places[scene_id]["url"] for scene_id in by_scene if not places[scene_id]["crs"]])
    found: dict[tuple[str, int, int], Stratum] = {}
    for scene_id, group in by_scene.items():
        rows, cols = (np.array([tile[axis] for tile in group]) + size / 2 for axis in (1, 2))
        crs, transform = places[scene_id]["crs"], places[scene_id]["transform"]
        names = regions_at(regions, crs, transform, cols, rows)
        blocks = blocks_at(scene_id, crs, transform, cols, rows, cell) if cell else [tile[3] for tile in group]
        found |= {tile[:3]: (block, name) for tile, block, name in zip(group, blocks, names, strict=True)}
    return found


def _warn_without_place(regions: Regions | None, urls: Sequence[str]) -> None:
    if regions is not None and urls:
        log.warning("evaluate: %s: no CRS, so outside all regions", ", ".join(urls))
