"""Plans tiles around shapes: where few pixels are labelled, windows lie around them and are dealt in groups of shapes.

A regular grid of large tiles shows few shapes of many classes together, and leaves none apart for validation. Which
shapes are few follows from their outlines and the scenes' grids; what counts for the deal is what they show (`shown`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from shapely.geometry.base import BaseGeometry

from sattile import geography, shapes, split
from sattile.errors import Refused
from sattile.grid import Window, ceil_to, hull
from sattile.labels import LabelSource
from sattile.schema import IGNORE, Scene
from sattile.split import SPLITS

SIZES = (64, 32, 16, 8)
"""Edges of windows that are tried, in pixels: the largest is taken with which as many classes as with any other are in
as many splits."""

MOST_SHAPES, MOST_POINTS = 1000, 100_000
"""More polygons, or more points of them, are not few."""

FEW_PIXELS = 4 * 256 * 256
"""Shapes that cover as much are not few: four whole tiles of the usual size."""

FEW_COVERED = 0.5
"""Share of the grid's windows that show shapes, from which on these cover them well."""

TINY = 16
"""Pixels; of smaller shapes the pixel centres that they hold are counted, of others the area is taken."""


@dataclass(frozen=True)
class Drawn:
    """A polygon on a scene's grid.

    Attributes:
        key: of the polygon, the same on all scenes.
        class_id: its class.
        outline: in (col, row) of the scene, cut to it.
        pixels: how many it covers, about; of what was looked at, how many it shows.
    """

    scene_id: str
    key: str
    class_id: int
    outline: BaseGeometry
    pixels: int

    @property
    def box(self) -> Window:
        """The pixels around it."""
        left, top, right, bottom = self.outline.bounds
        row, col = int(np.floor(top)), int(np.floor(left))
        return Window(row, col, max(int(np.ceil(bottom)) - row, 1), max(int(np.ceil(right)) - col, 1))


@dataclass(frozen=True)
class ShapeWindows:
    """Windows around shapes, and how they are dealt.

    Attributes:
        size: edge of a window in pixels.
        buffer: pixels kept free between windows of different groups.
        placed: (window, split, group) of each window by scene id, in (row, col) order; they share no pixel.
        dealt: split of each group.
        shapes: how many there are.
        classes: by class id: `shapes`, and groups of them in each split.
    """

    size: int
    buffer: int
    placed: Mapping[str, tuple[tuple[Window, str, str], ...]]
    dealt: Mapping[str, str]
    shapes: int
    classes: Mapping[int, Mapping[str, int]]

    @property
    def reached(self) -> int:
        """In how many splits classes are, summed over the classes."""
        return sum(bool(found[name]) for found in self.classes.values() for name in SPLITS)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "around": "shapes",
            "shapes": self.shapes,
            "groups": len(self.dealt),
            "classes": {str(class_id): dict(found) for class_id, found in sorted(self.classes.items())},
        }


def draw(
    scenes: Sequence[Scene],
    sources: Mapping[str, LabelSource],
    aoi: tuple[bytes, str] | None = None,
    *,
    only_few: bool = False,
) -> list[Drawn] | None:
    """Bring the polygons of vector labels onto the grids of their scenes; those without a pixel are left out.

    Args:
        aoi: WKB and its CRS; what lies outside is cut off.
        only_few: give up beyond `MOST_SHAPES` different ones, or `MOST_POINTS`.

    Returns:
        None if there are more.
    """
    polygons: dict[tuple[bytes, int, str | None], list[tuple[str, BaseGeometry]]] = {}
    of_source: dict[str, list[tuple[int, list[tuple[str, BaseGeometry]]]]] = {}
    count = points = 0
    for scene in scenes:
        source = sources[scene.scene_id]
        of_source[scene.scene_id] = held = []
        for shape, class_id in zip(*shapes.unpack(source.shapes or shapes.pack([])), strict=True):
            if class_id == IGNORE:  # it takes labels away
                continue
            whole = shapely.to_wkb(shape), int(class_id), source.crs
            if whole not in polygons:
                points += shapely.get_num_coordinates(shape)
                if only_few and points > MOST_POINTS:
                    return None
                polygons[whole] = list(_parts(shape, *whole[1:]))
                count += len(polygons[whole])
                if only_few and count > MOST_SHAPES:
                    return None
            held.append((int(class_id), polygons[whole]))
    found = []
    for scene in scenes:
        ground = shapely.box(0, 0, scene.width, scene.height)
        try:
            if aoi is not None:
                area = shapes.in_pixels(shapely.from_wkb(aoi[0]), aoi[1], scene)
                ground = shapely.intersection(ground, shapely.make_valid(area))
            for class_id, parts in of_source[scene.scene_id]:
                for key, part in parts:
                    outline = shapely.make_valid(shapes.in_pixels(part, sources[scene.scene_id].crs, scene))
                    outline = shapely.intersection(outline, ground)
                    pixels = _pixels(outline)
                    if pixels:
                        found.append(Drawn(scene.scene_id, key, class_id, outline, pixels))
        except Refused:  # whoever draws it there says why it can't be
            continue
    return found


def _parts(shape: BaseGeometry, class_id: int, crs: str | None) -> Iterator[tuple[str, BaseGeometry]]:
    """(key, polygon) of each polygon of a shape: what a file holds as one may lie at many places."""
    for part in shapely.get_parts(shapely.get_parts(shape)):
        if part.area > 0:
            yield hashlib.sha256(f"{class_id}\0{crs}\0".encode() + shapely.to_wkb(part)).hexdigest(), part


def _pixels(outline: BaseGeometry) -> int:
    area = outline.area
    if not 0 < area < TINY:
        return round(area)
    left, top, right, bottom = (int(np.floor(side)) for side in outline.bounds)
    if (right - left + 1) * (bottom - top + 1) > TINY**2:  # a long, thin one
        return max(round(area), 1)
    cols, rows = np.meshgrid(np.arange(left, right + 1) + 0.5, np.arange(top, bottom + 1) + 0.5)
    return int(shapely.contains_xy(outline, cols, rows).sum())


def are_few(drawn: Sequence[Drawn], scenes: Sequence[Scene], size: int) -> bool:
    """Whether shapes cover little: together less than `FEW_PIXELS`, and less than `FEW_COVERED` of the windows of a
    grid of this size that show any. Of a place that several scenes show the one with most pixels counts."""
    most: dict[str, int] = {}
    for one in drawn:
        most[one.key] = max(most.get(one.key, 0), one.pixels)
    if not drawn or sum(most.values()) >= FEW_PIXELS:
        return False
    extents = {scene.scene_id: (scene.height, scene.width) for scene in scenes}
    touched = set()
    for one in drawn:
        box = one.box
        for row in range(box.row // size, (box.stop_row - 1) // size + 1):
            for col in range(box.col // size, (box.stop_col - 1) // size + 1):
                if shapely.intersects(one.outline, _centres(Window(row * size, col * size, size, size))):
                    touched.add((one.scene_id, row, col))
    shown = 0
    for scene_id, row, col in touched:
        height, width = extents[scene_id]
        shown += (Window(row * size, col * size, size, size) & Window(0, 0, height, width)).area
    return sum(one.pixels for one in drawn) < FEW_COVERED * shown


LOOKED = 256
"""Edge of the windows in which shapes are looked at, in pixels."""


def to_look_at(drawn: Sequence[Drawn], scene: Scene) -> list[tuple[Window, list[int]]]:
    """Windows that together hold all pixels of a scene's polygons, each with the numbers of those that it shows."""
    found = []
    for window, numbers in _around(drawn, LOOKED, scene.height, scene.width):
        found.append((window & hull(drawn[number].box for number in numbers), numbers))
    return found


def shown(labels: np.ndarray, window: Window, drawn: Sequence[Drawn]) -> list[int]:
    """How many pixels of a window each polygon shows: those of its class that no later polygon holds.

    Args:
        labels: (height, width) uint8 of the window, `IGNORE` where there is no valid pixel.
        drawn: in the order in which they are drawn.
    """
    rows, cols = np.nonzero(labels != IGNORE)
    ids, last = labels[rows, cols], np.full(len(rows), -1)
    for number, one in enumerate(drawn):
        near = shapely.buffer(one.outline, 1e-6)  # pixels whose centre is on its edge may be its own
        shapely.prepare(near)
        own = np.flatnonzero(ids == one.class_id)
        held = shapely.intersects_xy(near, cols[own] + window.col + 0.5, rows[own] + window.row + 0.5)
        last[own[held]] = number
    counts: list[int] = np.bincount(last[last >= 0], minlength=len(drawn)).tolist()
    return counts


def plan(
    drawn: Sequence[Drawn],
    scenes: Sequence[Scene],
    *,
    size: int | None,
    buffer: int | None,
    fractions: tuple[float, float, float],
    seed: int,
) -> ShapeWindows:
    """Lay windows around shapes and deal them.

    Windows whose buffers reach each other, and all windows that show one shape, are a group; so no window of a group
    shows a shape of another, and no ground of it lies within the buffer of another's, whatever the scene.

    Args:
        drawn: one shape at least.
        size: edge of a window; None tries `SIZES`.
        buffer: pixels to keep free between groups; None is a window's size.
    """
    plans = [
        _plan(drawn, scenes, one, one if buffer is None else buffer, fractions, seed)
        for one in (SIZES if size is None else (size,))
    ]
    return max(plans, key=lambda one: (one.reached, one.size))


def _plan(
    drawn: Sequence[Drawn],
    scenes: Sequence[Scene],
    size: int,
    buffer: int,
    fractions: tuple[float, float, float],
    seed: int,
) -> ShapeWindows:
    windows: list[tuple[str, Window]] = []
    outlines: list[split.Outline] = []
    padded: list[split.Outline] = []
    shown: list[tuple[int, int]] = []  # (window, shape) by their numbers
    by_scene: dict[str, list[int]] = {}
    for number, one in enumerate(drawn):
        by_scene.setdefault(one.scene_id, []).append(number)
    for scene in scenes:
        numbers = by_scene.get(scene.scene_id, [])
        laid = list(_around([drawn[number] for number in numbers], size, scene.height, scene.width))
        own, wide = (
            geography.outlines(str(scene.crs), scene.transform, np.array([_sides(one.pad(pad)) for one, _ in laid]))
            for pad in (0, buffer)
        )
        for (window, within), outline, with_buffer in zip(laid, own, wide, strict=True):
            if np.isfinite(outline).all() and np.isfinite(with_buffer).all():  # not off the edge of a full-disk image
                shown += [(len(windows), numbers[index]) for index in within]
                windows.append((scene.scene_id, window))
                outlines.append(outline)
                padded.append(with_buffer)
    first_of: dict[str, int] = {}
    same_shape = [(first_of.setdefault(drawn[number].key, place), place) for place, number in shown]
    roots = split.same_place([*same_shape, *split.near(outlines, padded)], len(windows))
    names = [f"{scene_id}/{window.row}/{window.col}" for scene_id, window in windows]
    name_of: dict[int, str] = {}
    for root, name in zip(roots, names, strict=True):
        name_of[root] = min(name, name_of.get(root, name))
    groups = sorted(name_of.values())
    class_ids = sorted({one.class_id for one in drawn})
    pixels = np.zeros((len(groups), len(class_ids)), np.int64)
    counted: set[int] = set()
    keys: dict[int, set[str]] = {class_id: set() for class_id in class_ids}
    for place, number in shown:
        if number not in counted:
            counted.add(number)
            one = drawn[number]
            pixels[groups.index(name_of[roots[place]]), class_ids.index(one.class_id)] += one.pixels
            keys[one.class_id].add(one.key)
    dealt = dict(zip(groups, split.deal_groups(pixels, groups, fractions, seed), strict=True))
    placed: dict[str, list[tuple[Window, str, str]]] = {}
    for (scene_id, window), root in zip(windows, roots, strict=True):
        placed.setdefault(scene_id, []).append((window, dealt[name_of[root]], name_of[root]))
    classes = {
        class_id: {
            "shapes": len(keys[class_id]),
            **{name: sum(bool(pixels[g, index]) for g, one in enumerate(groups) if dealt[one] == name)
               for name in SPLITS},
        }
        for index, class_id in enumerate(class_ids)
    }  # fmt: skip
    return ShapeWindows(
        size, buffer, {scene_id: tuple(sorted(found)) for scene_id, found in placed.items()}, dealt,
        sum(map(len, keys.values())), classes,
    )  # fmt: skip


def _sides(window: Window) -> tuple[int, int, int, int]:
    return window.row, window.col, window.stop_row, window.stop_col


def _centres(window: Window) -> BaseGeometry:
    """What holds the centres of a window's pixels."""
    return shapely.box(window.col + 0.5, window.row + 0.5, window.stop_col - 0.5, window.stop_row - 0.5)


def _around(drawn: Sequence[Drawn], size: int, height: int, width: int) -> Iterator[tuple[Window, list[int]]]:
    """Windows that show shapes of one scene, and the numbers of these; no two share a pixel."""
    if not drawn:
        return
    outlines = np.array([one.outline for one in drawn])
    tree = shapely.STRtree(outlines)
    for area in lattices([one.box for one in drawn], size, height, width):
        for row in range(area.row, area.stop_row, size):
            for col in range(area.col, area.stop_col, size):
                window = Window(row, col, size, size)
                within = tree.query(_centres(window), predicate="intersects")
                if len(within):
                    yield window, sorted(within.tolist())


def lattices(boxes: Sequence[Window], size: int, height: int, width: int) -> list[Window]:
    """Rectangles of whole windows that together hold all boxes and share no pixel; near boxes share one.

    Each lies with what it holds in its middle, moved inside the scene as far as it fits there.
    """
    held = list(boxes)
    while True:
        found = [_whole(box, size, height, width) for box in held]
        tree = shapely.STRtree([shapely.box(one.col, one.row, one.stop_col, one.stop_row) for one in found])
        pairs = tree.query(tree.geometries, predicate="intersects").T.tolist()
        together = split.same_place(((a, b) for a, b in pairs if a < b and (found[a] & found[b]).area), len(found))
        if len(set(together)) == len(found):
            return sorted(found)
        grouped: dict[int, list[Window]] = {}
        for box, root in zip(held, together, strict=True):
            grouped.setdefault(root, []).append(box)
        held = [hull(group) for group in grouped.values()]


def _whole(box: Window, size: int, height: int, width: int) -> Window:
    def along(start: int, length: int, extent: int) -> tuple[int, int]:
        whole = ceil_to(length, size)
        return max(min(start - (whole - length) // 2, extent - whole), 0), whole

    (row, tall), (col, wide) = along(box.row, box.height, height), along(box.col, box.width, width)
    return Window(row, col, tall, wide)
