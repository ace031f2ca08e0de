"""Pixel geometry: windows, blocks and the lattice of windows a network is run on. numpy-free, pure functions.

Everything is in (row, col) order; (0, 0) is the top-left pixel; intervals are half-open.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from sattile.errors import UsageError


@dataclass(frozen=True, order=True)
class Window:
    """A rectangle of pixels, half-open: rows `row <= r < row + height`, columns likewise.

    Ordered by (row, col, height, width), which is the order in which windows are added up everywhere.
    """

    row: int
    col: int
    height: int
    width: int

    @property
    def stop_row(self) -> int:
        return self.row + self.height

    @property
    def stop_col(self) -> int:
        return self.col + self.width

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def area(self) -> int:
        return max(self.height, 0) * max(self.width, 0)

    def __and__(self, other: Window) -> Window:
        """The common part; its area is 0 where there is none."""
        row, col = max(self.row, other.row), max(self.col, other.col)
        return Window(
            row,
            col,
            max(min(self.stop_row, other.stop_row) - row, 0),
            max(min(self.stop_col, other.stop_col) - col, 0),
        )

    def __contains__(self, other: Window) -> bool:
        return (self & other) == other

    def pad(self, pixels: int) -> Window:
        return Window(self.row - pixels, self.col - pixels, self.height + 2 * pixels, self.width + 2 * pixels)

    def quarters(self) -> list[Window]:
        """Up to four parts, row by row: each axis is halved, if it can be."""
        rows = sorted({self.row, self.row + self.height // 2, self.stop_row})
        cols = sorted({self.col, self.col + self.width // 2, self.stop_col})
        return [
            Window(row, col, stop_row - row, stop_col - col)
            for row, stop_row in itertools.pairwise(rows)
            for col, stop_col in itertools.pairwise(cols)
        ]

    def slices(self, origin: Window | None = None) -> tuple[slice, slice]:
        """Row and column slices of this window in an array whose top-left pixel is that of `origin`."""
        row, col = (origin.row, origin.col) if origin else (0, 0)
        return slice(self.row - row, self.stop_row - row), slice(self.col - col, self.stop_col - col)


def hull(windows: Iterable[Window]) -> Window:
    """The smallest rectangle that holds all of some windows, one at least."""
    every = list(windows)
    row, col = min(one.row for one in every), min(one.col for one in every)
    return Window(row, col, max(one.stop_row for one in every) - row, max(one.stop_col for one in every) - col)


def ceil_to(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def starts(extent: int, size: int, stride: int) -> list[int]:
    """Where the windows along one axis begin, so that together they cover `extent` pixels to the last one.

    The lattice is anchored at 0; the last window is moved back to end at the edge. An extent smaller than a
    window has one window, which reaches over the edge.

    >>> starts(10, 4, 3)
    [0, 3, 6]
    >>> starts(11, 4, 3)
    [0, 3, 6, 7]
    """
    if stride < 1 or stride > size:
        raise UsageError(
            f"stride {stride} with size {size}: windows must touch or overlap; use a stride from 1 to {size}"
        )
    if extent <= size:
        return [0]
    regular = list(range(0, extent - size + 1, stride))
    if regular[-1] + size < extent:
        regular.append(extent - size)
    return regular


def blocks(height: int, width: int, edge: int) -> list[Window]:
    """The rectangles of at most `edge` x `edge` that partition a scene, row by row."""
    return [
        Window(row, col, min(edge, height - row), min(edge, width - col))
        for row in range(0, height, edge)
        for col in range(0, width, edge)
    ]


@dataclass(frozen=True)
class Placement:
    """One evaluation of the network: what it reads, and which pixels of the result count.

    Attributes:
        read: the network's input, in pixels of the scene; may reach over the right and bottom edge.
        keep: the pixels that the result is used for, inside both `read` and the scene.
    """

    read: Window
    keep: Window


@dataclass(frozen=True)
class Geometry:
    """How a network is laid over a scene. Build with `choose_geometry`, which checks it.

    In `crop` the windows of a scene are as few as `size` allows, all of one shape and evenly spread: a lattice of steps
    of `size` would end with windows that lie almost wholly on what others have done.

    Attributes:
        merge: `crop` (each pixel has one owner, and `halo` pixels of context all round) or `blend` (overlapping
            weighted windows).
        size: edge of the output cell (`crop`; the most, see above) or of the network's input (`blend`), in pixels.
        stride: distance between windows in `blend`; equals `size` in `crop`.
        halo: context on each side in `crop`; 0 in `blend`.
        total_stride: product of the network's strides: every network input begins and ends on its multiples.
        fixed: the network takes inputs of `input_size` only, so that smaller scenes are padded to it.
    """

    merge: str
    size: int
    stride: int
    halo: int
    total_stride: int = 1
    fixed: bool = False

    @property
    def input_size(self) -> int:
        """The largest edge of an input."""
        return self.size + 2 * self.halo

    def input_shape(self, height: int, width: int) -> tuple[int, int]:
        """The one input shape with which the network runs on a scene of this shape."""
        return self._length(height), self._length(width)

    def _length(self, extent: int) -> int:
        if self.fixed:
            return self.input_size
        extended = ceil_to(extent, self.total_stride)
        if self.merge == "blend":
            return min(self.input_size, extended)
        count = self._cells(extended)
        return ceil_to(-(-(extended + 2 * self.halo * (count - 1)) // count), self.total_stride)

    def _cells(self, extended: int) -> int:
        """How many windows an axis takes: the first and the last need no context beyond the scene."""
        return max(-(-(extended - 2 * self.halo) // self.size), 1)

    def placements(self, height: int, width: int, block: Window) -> Iterator[Placement]:
        """The evaluations that one block of a scene of `height` x `width` needs, in lattice order.

        The lattice is anchored to the scene, never to the block. Windows lie inside the scene (extended right and
        bottom to a multiple of `total_stride`): they keep at least `halo` pixels of context wherever the scene has
        them, and all inputs are of one shape.
        """
        scene = Window(0, 0, height, width)
        in_height, in_width = self.input_shape(height, width)
        rows = list(self._axis(height, in_height, block.row, block.stop_row))
        cols = list(self._axis(width, in_width, block.col, block.stop_col))
        for read_row, keep_row, keep_height in rows:
            for read_col, keep_col, keep_width in cols:
                keep = Window(keep_row, keep_col, keep_height, keep_width) & block & scene
                if keep.area:
                    yield Placement(Window(read_row, read_col, in_height, in_width), keep)

    def cover(self, height: int, width: int, need: Window) -> list[Placement]:
        """The evaluations for any rectangle of a scene of `height` x `width`, which no lattice is laid for.

        In `crop` the rectangle is cut into as few equal parts as `size` allows, each an input of its own, so that
        hardly more is evaluated than is needed; inputs are of one shape. In `blend` the lattice is the scene's.
        """
        if self.merge != "crop":
            return list(self.placements(height, width, need))
        scene = Window(0, 0, height, width)
        rows = list(self._parts(height, need.row, need.height))
        cols = list(self._parts(width, need.col, need.width))
        found = []
        for read_row, in_height, row, stop_row in rows:
            for read_col, in_width, col, stop_col in cols:
                keep = Window(row, col, stop_row - row, stop_col - col) & need & scene
                if keep.area:
                    found.append(Placement(Window(read_row, read_col, in_height, in_width), keep))
        return found

    def _parts(self, extent: int, start: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """(begin and length of the input, start and stop of what is kept) along one axis."""
        step = self.total_stride
        part = ceil_to(-(-length // -(-length // self.size)), step)
        if self.fixed:
            size = self.input_size
        else:
            # A kept part begins anywhere, an input on the stride. Each shape is compiled, so that few are better: those
            # of whole blocks hardly differ, and what is cut off by the edge of a scene is rounded up generously.
            whole = part > self.size * 7 // 8
            size = ceil_to(part + step - 1, ceil_to(SHAPES if whole else max(self.size // 8, SHAPES), step))
            size = min(size + 2 * self.halo, ceil_to(extent, step))
        extended = max(ceil_to(extent, step), size)
        for row in range(start, start + length, part):
            begin = min(max(row // step * step - self.halo, 0), extended - size)
            yield begin, size, row, min(row + part, start + length)

    def region(self, height: int, width: int, block: Window) -> Window:
        """All that the evaluations of one block read: the block and its context, as one rectangle."""
        in_height, in_width = self.input_shape(height, width)
        rows = [begin for begin, _, _ in self._axis(height, in_height, block.row, block.stop_row)]
        cols = [begin for begin, _, _ in self._axis(width, in_width, block.col, block.stop_col)]
        row, col = min(rows), min(cols)
        return Window(row, col, max(rows) + in_height - row, max(cols) + in_width - col)

    def blocks(self, height: int, width: int, edge: int) -> list[Window]:
        """The rectangles that partition a scene, row by row: in `crop` whole cells, which no two blocks share.

        Args:
            edge: of a block, in pixels. In `crop` the evaluations of a block read no more than `edge + 2 * halo`.
        """
        rows, cols = self._cuts(height, edge), self._cuts(width, edge)
        return [
            Window(row, col, stop_row - row, stop_col - col)
            for row, stop_row in itertools.pairwise(rows)
            for col, stop_col in itertools.pairwise(cols)
        ]

    def count(self, height: int, width: int, edge: int) -> int:
        """How many evaluations a scene of `height` x `width` takes when it is cut into blocks of `edge`."""
        sums = []
        for extent, length in zip((height, width), self.input_shape(height, width), strict=True):
            cuts = self._cuts(extent, edge)
            sums.append(sum(len(list(self._axis(extent, length, *pair))) for pair in itertools.pairwise(cuts)))
        return math.prod(sums)

    def _cuts(self, extent: int, edge: int) -> list[int]:
        """Where the blocks along one axis begin, and the end of the last."""
        if self.merge == "blend":
            return [*range(0, extent, edge), extent]
        cells = [cell for _, cell, _ in self._axis(extent, self._length(extent), 0, extent)]
        parts = -(-len(cells) // max(edge // self.size, 1))
        return [*(cells[index * len(cells) // parts] for index in range(parts)), extent]

    def _axis(self, extent: int, length: int, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Of all that touches the pixels from `start` to `stop`: where an input begins, what is kept, its length."""
        extended = max(ceil_to(extent, self.total_stride), length)
        if self.merge == "crop":
            count, step = self._cells(extended), self.total_stride
            begins = [(extended - length) // step * index // max(count - 1, 1) * step for index in range(count)]
            cells = [0, *(begin + self.halo for begin in begins[1:]), extended]
            for index, begin in enumerate(begins):
                if cells[index] < min(stop, extent) and cells[index + 1] > start:
                    yield begin, cells[index], cells[index + 1] - cells[index]
        else:
            for begin in starts(extended, length, min(self.stride, length)):
                if begin < stop and begin + length > start:
                    yield begin, begin, length


def check_geometry(geometry: Geometry, radius: int | None) -> None:
    """Refuse a geometry under which seams or shifted pooling grids would appear, with the numbers to use.

    Args:
        geometry: as asked for.
        radius: the network's receptive radius in pixels, None if it has no bound.

    Raises:
        UsageError: naming the nearest numbers that work.
    """
    step = geometry.total_stride
    if geometry.merge not in ("crop", "blend"):
        raise UsageError(f"merge {geometry.merge!r}: use crop or blend")
    for name in ("size", "stride", "halo"):
        value = getattr(geometry, name)
        least = (radius or 0) if name == "halo" else step
        if value % step or (value < 1 and name != "halo") or value < 0:
            raise UsageError(
                f"{name} {value} is no multiple of the network's total stride {step}: pooling grids would shift "
                f"from window to window; use {name} {ceil_to(max(value, least), step)}"
            )
    if geometry.merge == "crop":
        if radius is None:
            raise UsageError(f"merge crop {_why_no_crop(step, radius, 0)}; use merge blend")
        if geometry.halo < radius:
            raise UsageError(
                f"halo {geometry.halo} is less than the network's receptive radius {radius}: seams would show; "
                f"use halo {ceil_to(radius, step)}"
            )
    elif geometry.stride > geometry.size:
        raise UsageError(
            f"stride {geometry.stride} is more than size {geometry.size}: pixels between windows would be lost; "
            f"use stride {max(geometry.size // 2 // step, 1) * step}"
        )


SHAPES = 32
"""Inputs that follow from what is needed have edges of multiples of this at least, but for the halo."""

CELL = 512
"""Edge of the smallest cell that is chosen unasked: that of a COG's own tiles."""

FAIR_PRICE, WORST_PRICE = 1.12, 4.0
"""Pixels evaluated per pixel delivered: what a default window should cost at most, and above which overlapping
windows are the better default than a halo."""


def choose_geometry(
    *,
    total_stride: int,
    radius: int | None,
    input_shape: tuple[int, int] | None = None,
    merge: str | None = None,
    size: int | None = None,
    stride: int | None = None,
    halo: int | None = None,
    max_input: int = 2048,
    cell: int = CELL,
) -> Geometry:
    """Fill in what was not asked for, and check the whole.

    `crop` is the default where the receptive radius is finite and the halo costs less than `WORST_PRICE`; `blend`
    where it does not, or where a stride below the size is asked for. The size of `crop` is the smallest whose halo
    costs no more than `FAIR_PRICE`, or the largest that `max_input` allows.

    Args:
        total_stride: product of the network's strides.
        radius: its receptive radius in pixels, None if it has no bound.
        input_shape: (height, width) if the network takes inputs of this shape only.
        merge, size, stride, halo: as asked for; None leaves the choice to this function.
        max_input: largest edge of an input that the memory holds.
        cell: smallest size of `crop` that is chosen unasked, where `max_input` allows it.

    Raises:
        UsageError: with the numbers to use.
    """
    fixed = input_shape is not None
    if input_shape is not None and input_shape[0] != input_shape[1]:
        raise UsageError(f"the network takes inputs of {input_shape[0]} x {input_shape[1]} only; windows are square")
    # A network of fixed shape is always laid on its own whole input: in blend its pooling grid can't shift.
    edge = input_shape[0] if input_shape else 0
    unfit = _why_no_crop(total_stride, radius, edge)
    if merge == "crop" and unfit:
        raise UsageError(f"merge crop {unfit}; use merge blend")
    if merge is None and (unfit or (stride is not None and size is not None and stride < size)):
        merge = "blend"
    if merge is None or merge == "crop":
        chosen = _choose_crop(total_stride, radius or 0, edge, size, halo, max_input, cell)
        price = (chosen.input_size / max(chosen.size, 1)) ** 2
        if merge is None and size is None and halo is None and (chosen.size < 1 or price > WORST_PRICE):
            merge = "blend"
        else:
            merge = "crop"
            if stride is not None and stride != chosen.size:
                raise UsageError(f"stride {stride} with merge crop: each pixel has one owner there; leave --stride out")
    if merge == "blend":
        if halo:
            raise UsageError(f"halo {halo} with merge blend: its windows overlap instead; set --stride")
        step = 1 if fixed and edge % total_stride else total_stride
        size = size or edge or min(ceil_to(CELL, step), max(max_input // step * step, step))
        stride = max(size // 2 // step, 1) * step if stride is None else stride
        chosen = Geometry("blend", size, stride, 0, step, fixed)
    elif merge != "crop":
        raise UsageError(f"merge {merge!r}: use crop or blend")
    if fixed and chosen.input_size != edge:
        what = "size" if merge == "blend" else "size + 2 halo"
        raise UsageError(f"{what} is {chosen.input_size}, and the network takes inputs of {edge} x {edge} only")
    check_geometry(chosen, radius)
    return chosen


def _why_no_crop(step: int, radius: int | None, edge: int) -> str:
    """What keeps a network from `crop`, whatever the size; nothing if nothing does.

    Args:
        edge: of the input that it takes only; 0 for any.
    """
    if radius is None:
        return "needs a network whose receptive field is bounded, and this one's is not (it mixes the whole window)"
    if edge % step:
        return (
            f"needs windows of multiples of the network's total stride {step}, and this one takes inputs of {edge} x "
            f"{edge} only"
        )
    return ""


def _choose_crop(
    step: int, radius: int, edge: int, size: int | None, halo: int | None, max_input: int, cell: int
) -> Geometry:
    if halo is None:
        # With a fixed input and a size, the halo is what is left.
        halo = (edge - size) // 2 if edge and size is not None else ceil_to(radius, step)
    if size is None and edge:
        size = edge - 2 * halo
    if size is None:
        fair = max(math.ceil(2 * halo / (math.sqrt(FAIR_PRICE) - 1)), cell)
        size = max(min(ceil_to(fair, step), (max_input - 2 * halo) // step * step), step)
    return Geometry("crop", size, size, halo, step, bool(edge))
