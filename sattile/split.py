"""Which split a tile belongs to, decided on the ground, so that no pixel of a test tile lies in a training tile.

Ground is laid out in cells of Lambert's cylindrical equal-area projection of the sphere, which has no zones: scenes of
different dates, CRSs and resolutions fall into the same cells. numpy only; positions are longitude and latitude.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sattile.errors import UsageError

SPLITS = {"train": "training", "val": "validation", "test": "test"}
"""Names as files and settings have them, with what a person calls them, in the order in which they are shown."""

EARTH_RADIUS = 6_371_008.8
"""Mean radius in metres (IUGG)."""

_COS_30 = float(np.cos(np.pi / 6))  # standard parallels at 30 degrees: cells are near square where people live
_AROUND = 2 * float(np.pi) * EARTH_RADIUS * _COS_30

Outline = tuple[np.ndarray, np.ndarray]
"""Longitudes and latitudes of a closed line."""


@dataclass(frozen=True)
class SplitRule:
    """How tiles are dealt to train, val and test.

    Attributes:
        by: `scene`, `block`, or `shapes` (groups of them, see `deal_groups`).
        fractions: shares of train, val, test; they sum to 1.
        seed: another seed, another deal.
        cell: edge of a ground cell in metres (`block`).
        buffer: pixels kept between training tiles and the others.
        fixed: cells (scene ids, groups) whose split was set, because a hash left a split empty or the user said so.
    """

    by: str
    fractions: tuple[float, float, float]
    seed: int
    cell: float
    buffer: int
    fixed: Mapping[str, str] = field(default_factory=dict)

    def of(self, key: str) -> str:
        """The split of a cell or scene: by a hash, so that a growing archive never moves what was dealt before."""
        if key in self.fixed:
            return self.fixed[key]
        draw = unit_hash(key, self.seed)
        _, val, test = self.fractions
        return "test" if draw < test else "val" if draw < test + val else "train"


def parse_fractions(text: str) -> tuple[float, float, float]:
    """`0.7,0.15,0.15` -> shares of train, val and test.

    Raises:
        UsageError: if they are not three, or do not sum to 1.
    """
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 3 or not min(values) >= 0 or not abs(sum(values) - 1) <= 1e-6:
        raise UsageError(f"fractions {text!r}: give three shares for train, val and test that sum to 1: 0.7,0.15,0.15")
    return values


def unit_hash(key: str, seed: int) -> float:
    """A number in [0, 1) that depends on key and seed alone."""
    data = hashlib.sha256(f"{seed}:{key}".encode()).digest()
    return int.from_bytes(data[:8], "big") / 2**64


def ground(lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metres east and north on the equal-area plane.

    Longitudes are those of a line, and go on beyond 180 where it does: its points are less than half way around apart.
    """
    lon = np.unwrap(np.asarray(lon, np.float64), period=360)
    return EARTH_RADIUS * _COS_30 * np.radians(lon), EARTH_RADIUS * np.sin(np.radians(lat)) / _COS_30


def cells(lon: np.ndarray, lat: np.ndarray, cell: float) -> list[str]:
    """Every ground cell that the bounding rectangle of a closed outline touches, as `column_row`.

    An outline that goes around the Earth holds the pole on its side.
    """
    return [key for key, _ in _touched(*_rectangle(lon, lat), cell)]


def _rectangle(lon: np.ndarray, lat: np.ndarray) -> tuple[float, float, float, float]:
    """Left, low, right and high of the bounding rectangle of a closed outline on the plane."""
    x, y = ground(np.append(lon, lon[0]), np.append(lat, lat[0]))
    low, high = float(y.min()), float(y.max())
    if abs(x[-1] - x[0]) > _AROUND / 2:
        pole = float(np.copysign(EARTH_RADIUS / _COS_30, y.mean()))
        low, high = min(low, pole), max(high, pole)
    return float(x.min()), low, float(x.max()), high


def near(outlines: Sequence[Outline], padded: Sequence[Outline]) -> Iterator[tuple[int, int]]:
    """Pairs of outlines of which one, with its buffer, reaches into the other's bounding rectangle.

    Args:
        outlines, padded: longitudes and latitudes of closed lines, and of the same with their buffers.
    """
    # One place seen on many dates is one rectangle.
    sides = np.array([_rectangle(*one) + _rectangle(*wide) for one, wide in zip(outlines, padded, strict=True)])
    sides, first, number = np.unique(np.round(sides.reshape(-1, 8), 3), axis=0, return_index=True, return_inverse=True)
    yield from zip(first[number.ravel()].tolist(), range(len(outlines)), strict=True)
    turns = np.floor(sides[:, :1] / _AROUND) * _AROUND
    sides[:, 0::2] -= turns
    if len(sides) and (sides[:, 4].min() < 0 or sides[:, 6].max() > _AROUND):  # the seam is at 0 E now
        sides, first = np.concatenate([sides, sides + np.tile([_AROUND, 0], 4)]), np.tile(first, 2)
    order = np.argsort(sides[:, 4], kind="stable")
    sides, first = sides[order], first[order]
    for index, (left, low, right, high, wide_left, wide_low, wide_right, wide_high) in enumerate(sides.tolist()):
        others = sides[index + 1 : int(np.searchsorted(sides[:, 4], wide_right))]
        touched = (others[:, 0] < wide_right) & (others[:, 2] > wide_left)
        touched &= (others[:, 1] < wide_high) & (others[:, 3] > wide_low)
        touching = (others[:, 4] < right) & (others[:, 6] > left) & (others[:, 5] < high) & (others[:, 7] > low)
        for other in np.flatnonzero(touched | touching).tolist():
            yield int(first[index]), int(first[index + 1 + other])


def cells_at(lon: np.ndarray, lat: np.ndarray, cell: float) -> list[str]:
    """The ground cell of each point by itself, as `cells` names it."""
    x = EARTH_RADIUS * _COS_30 * np.radians(lon)
    y = EARTH_RADIUS * np.sin(np.radians(lat)) / _COS_30
    around = max(round(_AROUND / cell), 1)
    cols = np.floor((x + 1e-3) / (_AROUND / around)).astype(np.int64) % around
    rows = np.floor((y + 1e-3) / cell).astype(np.int64)
    return [f"{col}_{row}" for col, row in zip(cols.tolist(), rows.tolist(), strict=True)]


def cell_shares(bounds: tuple[float, float, float, float], cell: float) -> dict[str, float]:
    """How much of each ground cell a rectangle (west, south, east, north) covers, 0 to 1."""
    west, south, east, north = bounds
    x, y = ground(np.linspace(west, east, 5), np.linspace(south, north, 5))
    shares: dict[str, float] = {}
    for key, share in _touched(x[0], y[0], x[-1], y[-1], cell):
        shares[key] = shares.get(key, 0.0) + share
    return shares


def _touched(left: float, low: float, right: float, high: float, cell: float) -> Iterator[tuple[str, float]]:
    """(cell, covered share of it) of a rectangle on the plane."""
    around = max(round(_AROUND / cell), 1)
    width = _AROUND / around  # whole cells around the Earth, so that 180 E meets 180 W
    # A rectangle that ends on a border does not touch the next cell; rounding leaves a millimetre.
    first_col, last_col = int(np.floor((left + 1e-3) / width)), int(np.floor((right - 1e-3) / width))
    first_row, last_row = int(np.floor((low + 1e-3) / cell)), int(np.floor((high - 1e-3) / cell))
    for row in range(first_row, max(last_row, first_row) + 1):
        tall = max(min(high, (row + 1) * cell) - max(low, row * cell), 0) / cell
        for col in range(first_col, min(max(last_col, first_col), first_col + around - 1) + 1):
            wide = max(min(right, (col + 1) * width) - max(left, col * width), 0) / width
            yield f"{col % around}_{row}", wide * tall


def split_of_tile(
    rule: SplitRule,
    outline: tuple[np.ndarray, np.ndarray],
    padded: tuple[np.ndarray, np.ndarray],
) -> str | None:
    """The split of one tile under a `block` rule, None if it lies across a border and is left out.

    A val or test tile lies wholly in cells of its split; a training tile does so with its buffer. Cells are disjoint,
    so no ground pixel is in two splits, whatever the scene, date or CRS it was seen in.

    Args:
        rule: how cells are dealt.
        outline: longitudes and latitudes of the tile's outline.
        padded: those of the tile with its buffer.
    """
    own = {rule.of(cell) for cell in cells(*outline, rule.cell)}
    if len(own) != 1:
        return None
    (split,) = own
    if split == "train" and any(rule.of(cell) != "train" for cell in cells(*padded, rule.cell)):
        return None
    return split


def fill_empty(rule: SplitRule, sizes: Mapping[str, float]) -> SplitRule:
    """Make sure that no split that was asked for stays empty, where there are enough cells or scenes for it.

    Args:
        rule: as dealt by hash.
        sizes: how much of the archive lies in each cell (or scene).
    """
    wanted = [split for split, share in zip(SPLITS, rule.fractions, strict=True) if share > 0]
    fixed = dict(rule.fixed)
    # The largest ones are worth dealing by hand: a sliver would leave the split empty after all. Among those that
    # are about as large, the hash decides, so that a seed still deals differently.
    largest = max(sizes.values(), default=0)
    order = sorted(sizes, key=lambda key: (sizes[key] < 0.7 * largest, unit_hash(key, rule.seed), key))
    whole = {key for key in sizes if sizes[key] >= 0.7 * largest}

    def current() -> dict[str, list[str]]:
        dealt: dict[str, list[str]] = {split: [] for split in SPLITS}
        for key in order:
            if key in whole:
                dealt[fixed.get(key) or rule.of(key)].append(key)
        return dealt

    for split in wanted:
        dealt = current()
        if dealt[split]:
            continue
        giver = max(wanted, key=lambda one: len(dealt[one]))
        if len(dealt[giver]) > (split != "train"):  # a single one is for training
            fixed[dealt[giver][0]] = split
    return SplitRule(rule.by, rule.fractions, rule.seed, rule.cell, rule.buffer, fixed)


def deal_groups(pixels: np.ndarray, keys: Sequence[str], fractions: tuple[float, float, float], seed: int) -> list[str]:
    """Deal groups of shapes to splits, so that each class is learned, and measured on ground that was not seen.

    In this order: each class is in training; a class of two groups is in validation, too; one of three also in test;
    and each class's pixels are dealt as near to the fractions as whole groups allow. Begins with the draw of each
    group's hash, then moves one group, or exchanges two, as long as that comes nearer; few groups are drawn several
    times. A split whose fraction is 0 gets nothing.

    Args:
        pixels: (groups, classes) labelled pixels of each class.
        keys: names of the groups; their hashes say who comes first.

    Returns:
        The split of each group.
    """
    pixels = np.asarray(pixels, np.float64)
    names = [name for name, share in zip(SPLITS, fractions, strict=True) if share > 0 or name == "train"]
    shares = np.array([share for name, share in zip(SPLITS, fractions, strict=True) if name in names])
    has, totals = (pixels > 0).astype(np.int64), np.maximum(pixels.sum(0), 1)
    # So many groups a class must have before it is asked for in each of the wanted splits.
    due = has.sum(0) >= np.arange(1, len(names) + 1)[:, None]
    order = sorted(range(len(keys)), key=lambda index: (unit_hash(keys[index], seed), keys[index]))
    is_few = len(keys) <= EXCHANGED

    def cost(place: np.ndarray) -> tuple[float, ...]:
        own = place == np.arange(len(names))[:, None]
        lacking = (due & (own @ has == 0)).sum(1)
        return (*lacking.tolist(), float(np.round(np.abs(own @ pixels / totals - shares[:, None]).mean(), 9)))

    def moves(place: np.ndarray) -> Iterator[tuple[list[int], list[int]]]:
        """Groups, and the splits that they may go to together."""
        for one in order:
            yield from (([one], [to]) for to in range(len(names)) if to != place[one])
        for one, other in itertools.combinations(order, 2) if is_few else ():
            if place[one] != place[other]:
                yield [one, other], [int(place[other]), int(place[one])]

    def settled(place: np.ndarray) -> tuple[tuple[float, ...], np.ndarray]:
        """What a deal comes to."""
        best, better = cost(place), True
        while better:
            better = False
            for groups, to in moves(place):
                tried = place.copy()
                tried[groups] = to
                if (found := cost(tried)) < best:
                    best, place, better = found, tried, True
                    if len(groups) > 1:  # what may be exchanged has changed
                        break
        return best, place

    rule = SplitRule("shapes", fractions, seed, 0, 0)
    deals = []
    for turn in range(DRAWS if is_few else 1):
        drawn = [rule.of(f"{turn}:{key}" if turn else key) for key in keys]
        deals.append(settled(np.array([names.index(one) if one in names else 0 for one in drawn], np.int64)))
    _, place = min(deals, key=lambda one: one[0])
    return [names[one] for one in place]


EXCHANGED, DRAWS = 24, 8
"""Up to so many groups are exchanged in pairs, too, and drawn so often: of more, moves alone come near enough."""


def same_place(pairs: Iterable[tuple[int, int]], count: int) -> list[int]:
    """Group numbers of things of which some pairs lie on the same ground (union-find).

    Args:
        pairs: indices that belong together.
        count: how many things there are.

    Returns:
        For each thing, the smallest index of its group.
    """
    root = list(range(count))

    def find(index: int) -> int:
        while root[index] != index:
            root[index] = root[root[index]]
            index = root[index]
        return index

    for one, other in pairs:
        a, b = find(one), find(other)
        root[max(a, b)] = min(a, b)
    return [find(index) for index in range(count)]


def kept_background(tile_id: str, share: float, seed: int) -> bool:
    """Whether a tile that shows background alone is among the share that is kept."""
    return unit_hash(f"background:{tile_id}", seed) < share
