"""Windows around few shapes: each labelled pixel once, groups apart on the ground, each class where it can be."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import shapely

from sattile import geography, split
from sattile.grid import Window
from sattile.labels import LabelSource
from sattile.schema import Scene
from sattile.shape_windows import Drawn, ShapeWindows, are_few, draw, lattices, plan, shown, to_look_at
from sattile.shapes import pack

UTM = "EPSG:32632"
SHARES = (0.7, 0.15, 0.15)


def scene(name: str, height: int, width: int, *, row: int = 0, col: int = 0) -> Scene:
    """A grid of 10 m whose first pixel lies so many pixels below and right of 600,000 E, 5,000,000 N."""
    transform = (10.0, 0.0, 600_000.0 + 10 * col, 0.0, -10.0, 5_000_000.0 - 10 * row)
    footprint = geography.footprint(UTM, transform, height, width)
    return Scene(name, name, height, width, (), UTM, transform, footprint=footprint, gsd=10.0)


def on_ground(top: float, left: float, bottom: float, right: float) -> shapely.Polygon:
    """A rectangle given in pixels of `scene` at row 0, column 0."""
    return shapely.box(600_000 + 10 * left, 5_000_000 - 10 * bottom, 600_000 + 10 * right, 5_000_000 - 10 * top)


def labelled(shapes: list[tuple[shapely.Geometry, int]]) -> LabelSource:
    return LabelSource("l.gpkg", shapes=pack([(shapely.to_wkb(shape), value) for shape, value in shapes]), crs=UTM)


def planned(scenes: list[Scene], source: LabelSource, **asked) -> tuple[list[Drawn], ShapeWindows]:
    drawn = draw(scenes, {one.scene_id: source for one in scenes})
    assert drawn
    return drawn, plan(drawn, scenes, **({"size": None, "buffer": None, "fractions": SHARES, "seed": 0} | asked))


def scattered(seed: int, count: int, classes: int, height: int, width: int) -> list[tuple[shapely.Geometry, int]]:
    rng = np.random.default_rng(seed)
    shapes = []
    for number in range(count):
        top, left = rng.uniform(0, height - 9), rng.uniform(0, width - 9)
        tall, wide = rng.uniform(1.5, 22, 2)
        shapes.append((on_ground(top, left, top + tall, left + wide), number % classes))
    return shapes


@pytest.mark.parametrize("seed", range(25))
def test_lattices_hold_all_boxes_and_share_no_pixel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    height, width, size = (int(one) for one in rng.integers((40, 90, 5), (300, 500, 70)))
    boxes = [
        Window(int(rng.integers(0, height - 8)), int(rng.integers(0, width - 8)), *map(int, rng.integers(1, 8, 2)))
        for _ in range(rng.integers(1, 25))
    ]
    found = lattices(boxes, size, height, width)
    assert all(any(box in one for one in found) for box in boxes)
    assert not any((one & other).area for one, other in itertools.combinations(found, 2))
    for one in found:
        assert one.height % size == one.width % size == 0
        assert one.row >= 0
        assert one.col >= 0
        assert one.stop_row <= height or one.row == 0
        assert one.stop_col <= width or one.col == 0
    assert lattices(boxes[::-1], size, height, width) == found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("asked", [{}, {"size": 24}, {"size": 32, "buffer": 5}])
def test_groups_of_shapes_lie_apart_on_all_scenes_of_a_place(seed: int, asked: dict[str, int]) -> None:
    """Law 7, by the ground in pixels of 10 m; the second scene lies 17 rows and 41 columns off, and is smaller."""
    scenes = [scene("a", 403, 701), scene("b", 290, 350, row=17, col=41)]
    shapes = scattered(seed, 24, 5, 403, 701)
    drawn, found = planned(scenes, labelled(shapes), **asked)
    shift = {"a": (0, 0), "b": (17, 41)}
    windows = [
        (shapely.box(one.col + shift[name][1], one.row + shift[name][0], one.stop_col + shift[name][1],
                     one.stop_row + shift[name][0]), part, group)
        for name, placed in found.placed.items() for one, part, group in placed
    ]  # fmt: skip
    assert {part for _, part, _ in windows} >= {"train", "val"}
    assert all(found.dealt[group] == part for _, part, group in windows)
    for (one, part, group), (other, other_part, other_group) in itertools.combinations(windows, 2):
        if group != other_group:
            # A pixel of tolerance: degrees lie between. Of rectangles: as far as one of the two axes says.
            gaps = [max(other.bounds[k] - one.bounds[k + 2], one.bounds[k] - other.bounds[k + 2]) for k in (0, 1)]
            assert max(gaps) >= found.buffer - 1, (part, other_part)
    for shape, _ in shapes:
        in_pixels = shapely.transform(shape, lambda at: (at - [600_000, 5_000_000]) / [10, -10])
        assert len({group for window, _, group in windows if shapely.intersection(window, in_pixels).area > 0}) <= 1
    assert found.shapes == len({one.key for one in drawn})


@pytest.mark.parametrize("seed", range(12))
def test_each_labelled_pixel_is_in_one_window_of_its_scene(seed: int) -> None:
    from sattile import shapes as drawing

    where = scene("a", 203, 331)
    source = labelled(scattered(seed, 15, 4, 203, 331))
    _, found = planned([where], source)
    whole = drawing.rasterize(source.shapes or b"", UTM, where, Window(0, 0, 203, 331)) != 255
    times = np.zeros((203 + 64, 331 + 64), int)
    for window, _, _ in found.placed["a"]:
        times[window.slices()] += 1
    assert (times[:203, :331][whole] == 1).all()
    assert times.max() == 1


def far_apart(counts: list[int], step: int = 90) -> list[tuple[shapely.Geometry, int]]:
    """So many squares of each class, 8 px wide, alone in cells of this edge."""
    classes = [class_id for class_id, count in enumerate(counts) for _ in range(count)]
    return [
        (on_ground(step * (number // 6) + 40, step * (number % 6) + 40, step * (number // 6) + 48,
                   step * (number % 6) + 48), class_id)
        for number, class_id in enumerate(classes)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(6))
def test_a_class_of_two_shapes_is_validated_and_one_of_three_is_tested(seed: int) -> None:
    _, found = planned([scene("a", 400, 560)], labelled(far_apart([1, 2, 3, 4, 7])), seed=seed)
    assert [found.classes[0][name] for name in ("shapes", "train", "val", "test")] == [1, 1, 0, 0]
    assert [found.classes[1][name] for name in ("shapes", "train", "val", "test")] == [2, 1, 1, 0]
    assert [found.classes[2][name] for name in ("shapes", "train", "val", "test")] == [3, 1, 1, 1]
    assert [found.classes[3][name] for name in ("shapes", "train", "val", "test")] == [4, 2, 1, 1]
    assert [found.classes[4][name] for name in ("shapes", "train", "val", "test")] == [7, 5, 1, 1]


def test_another_seed_deals_otherwise_and_the_order_of_scenes_and_shapes_does_not() -> None:
    scenes, shapes = [scene("a", 400, 560), scene("b", 390, 540, row=7, col=9)], far_apart([4, 4, 4])
    _, found = planned(scenes, labelled(shapes))
    _, again = planned(scenes[::-1], labelled(shapes[::-1]))
    assert (again.dealt, again.placed) == (found.dealt, found.placed)
    assert len({tuple(sorted(planned(scenes, labelled(shapes), seed=seed)[1].dealt.items())) for seed in range(5)}) > 1


@pytest.mark.parametrize(("gap", "size"), [(130, 64), (66, 32), (32, 16), (14, 8)])
def test_windows_are_as_large_as_leaves_shapes_apart(gap: int, size: int) -> None:
    """Four shapes of 4 px in a row; with windows too large for the gap all are one group."""
    shapes = [(on_ground(100, at, 104, at + 4), 0) for at in range(20, 20 + 4 * (gap + 4), gap + 4)]
    shapes += [(on_ground(400, at, 404, at + 4), 1) for at in range(20, 20 + 4 * (gap + 4), gap + 4)]
    _, found = planned([scene("a", 500, 700)], labelled(shapes))
    # Windows reach (size - 4) / 2 beyond a shape on both sides, and lie apart as far as they are wide.
    assert 2 * size - 4 < gap
    assert found.size == found.buffer == size
    assert all(found.classes[class_id][name] for class_id in (0, 1) for name in ("train", "val", "test"))


def test_a_shape_of_many_parts_is_as_many_shapes_and_one_without_a_pixel_is_none() -> None:
    parts = [shape for shape, _ in far_apart([4])]
    speck, line = (
        on_ground(300.1, 300.1, 300.3, 300.4),
        shapely.LineString([(600_000, 4_999_000), (601_000, 4_999_000)]),
    )
    _, found = planned([scene("a", 400, 560)], labelled([(shapely.MultiPolygon(parts), 3), (speck, 4), (line, 5)]))
    assert {class_id: one["shapes"] for class_id, one in found.classes.items()} == {3: 4}


def test_what_lies_outside_the_area_of_interest_is_no_shape() -> None:
    where, source = scene("a", 400, 560), labelled(far_apart([4]))
    area = shapely.to_wkb(on_ground(0, 0, 400, 44)), UTM  # half of the first square
    (only,) = draw([where], {"a": source}, area)
    assert only.pixels == 32


def test_few_shapes_cover_little() -> None:
    where = scene("a", 512, 768)

    def few(shapes: list[tuple[shapely.Geometry, int]]) -> bool:
        drawn = draw([where], {"a": labelled(shapes)}, only_few=True)
        return bool(drawn) and are_few(drawn, [where], 256)

    assert few(far_apart([3, 3, 3]))
    assert few([(on_ground(10, 10, 130, 250), 0)])  # 44 % of one window
    assert not few([(on_ground(10, 10, 150, 250), 0)])  # 51 %
    assert not few([(on_ground(0, 0, 512, 768), 0)])
    assert not few([(on_ground(10, 10 + at / 10, 11.5, 11.5 + at / 10), 0) for at in range(1001)])
    around = np.linspace(0, 2 * np.pi, 120_000)
    coast = shapely.Polygon(np.column_stack([602_000 + 300 * np.cos(around), 4_998_000 + 300 * np.sin(around)]))
    assert not few([(coast, 0)])
    assert few([(shapely.simplify(coast, 1), 0)])


@pytest.mark.parametrize("seed", range(40))
def test_no_other_deal_has_more_classes_where_they_are_due(seed: int) -> None:
    """Against all deals of seven groups, of which some show several classes."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 90, (7, 4)) * (rng.random((7, 4)) < 0.35)
    keys = [f"g{number}" for number in range(7)]

    def lacking(deal: tuple[str, ...]) -> tuple[int, ...]:
        groups = (pixels > 0).sum(0)
        there = {name: (pixels[[one == name for one in deal]] > 0).any(0) for name in split.SPLITS}
        return tuple(int(((groups >= due) & ~there[name]).sum()) for due, name in enumerate(split.SPLITS, 1))

    found = split.deal_groups(pixels, keys, SHARES, seed)
    best = min(lacking(deal) for deal in itertools.product(split.SPLITS, repeat=7))
    assert lacking(tuple(found)) == best


@pytest.mark.parametrize("fractions", [(1.0, 0.0, 0.0), (0.5, 0.0, 0.5), (0.6, 0.4, 0.0)])
def test_a_split_that_nobody_wants_gets_no_group(fractions: tuple[float, float, float]) -> None:
    dealt = split.deal_groups(np.full((6, 1), 10), list("abcdef"), fractions, 0)
    assert [dealt.count(name) / 6 for name in split.SPLITS] == pytest.approx(fractions, abs=0.1)


def test_a_shape_of_several_windows_is_one_group_without_a_buffer_too() -> None:
    """In degrees: there windows side by side touch, and overlap by nothing."""
    transform = (1e-4, 0.0, 9.0, 0.0, -1e-4, 45.0)
    where = Scene("a", "a", 400, 560, (), "EPSG:4326", transform, gsd=10.0)
    shapes = [shapely.box(9.005, 44.9942, 9.017, 44.995), shapely.box(9.005, 44.9792, 9.006, 44.98)]
    source = LabelSource("l.gpkg", shapes=pack([(shapely.to_wkb(one), 0) for one in shapes]), crs="EPSG:4326")
    _, found = planned([where], source, size=16, buffer=0)
    assert len(found.dealt) == 2
    assert len(found.placed["a"]) == 8 + 1


@pytest.mark.parametrize("middle", [0.0, 180.0])
def test_rectangles_meet_across_all_meridians(middle: float) -> None:
    def outline(west: float, east: float) -> tuple[np.ndarray, np.ndarray]:
        return np.array([west, east, east, west]), np.array([10.0, 10.0, 10.1, 10.1])

    other = middle - 360 if middle else 0  # the same meridian by its other name
    own = [outline(middle - 0.2, middle - 0.1), outline(other + 0.05, other + 0.1), outline(90, 90.1)]
    wide = [outline(middle - 0.4, middle + 0.1), outline(other - 0.15, other + 0.3), outline(89.8, 90.3)]
    assert split.same_place(split.near(own, wide), 3) == [0, 0, 2]
    narrow = [outline(middle - 0.25, middle - 0.05), outline(other + 0.03, other + 0.15), outline(89.8, 90.3)]
    assert split.same_place(split.near(own, narrow), 3) == [0, 1, 2]


def test_shapes_that_take_labels_away_have_no_windows() -> None:
    shapes = [(on_ground(20, 20, 29, 31), 3), (on_ground(120, 200, 131, 209), 255)]
    drawn = draw([scene("a", 203, 331)], {"a": labelled(shapes)})
    assert [one.class_id for one in drawn or ()] == [3]


@pytest.mark.parametrize("seed", range(12))
def test_a_shape_shows_the_pixels_that_it_is_the_last_to_be_drawn_on(seed: int) -> None:
    """Against one drawn after the other on the whole scene, where some pixels are missing; whole pixels among them."""
    from sattile import shapes as drawing

    rng = np.random.default_rng(seed)
    height, width = 311, 423
    where = scene("a", height, width)
    shapes = scattered(seed, 60, 4, height, width)
    for number in range(40):
        top, left = (int(one) for one in rng.integers(0, (height - 20, width - 20)))
        tall, wide = (int(one) for one in rng.integers(1, 20, 2))
        shapes.append((on_ground(top, left, top + tall, left + wide), 255 if number % 10 == 0 else number % 4))
    source = labelled(shapes)
    valid = rng.random((height, width)) < 0.7
    last = np.full((height, width), -1)
    for number, (shape, _) in enumerate(shapes):
        mask = drawing.rasterize([(shapely.to_wkb(shape), 1)], UTM, where, Window(0, 0, height, width)) == 1
        last[mask] = number
    expected = [int(((last == number) & valid).sum()) for number, (_, kind) in enumerate(shapes) if kind != 255]
    drawn = draw([where], {"a": source})
    assert drawn is not None
    assert len(drawn) == len(expected)
    found = np.zeros(len(drawn), int)
    for window, numbers in to_look_at(drawn, where):
        labels = drawing.rasterize(source.shapes or b"", UTM, where, window)
        inside = window & Window(0, 0, height, width)
        labels[inside.slices(window)][~valid[inside.slices()]] = 255
        found[numbers] += shown(labels, window, [drawn[number] for number in numbers])
    assert found.tolist() == expected
