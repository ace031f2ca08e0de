"""Windows, blocks, and the lattice a network is laid on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sattile.errors import UsageError
from sattile.grid import Geometry, Window, blocks, ceil_to, check_geometry, choose_geometry, starts

quick = settings(deadline=None, max_examples=60)
extents = st.integers(1, 90)
small = st.integers(1, 30)


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    step = draw(st.sampled_from([1, 2, 4]))
    fixed = draw(st.booleans())
    if draw(st.booleans()):
        size, halo = step * draw(st.integers(1, 8)), step * draw(st.integers(0, 6))
        return Geometry("crop", size, size, halo, step, fixed)
    count = draw(st.integers(1, 8))
    return Geometry("blend", step * count, step * draw(st.integers(1, count)), 0, step, fixed)


@given(extents, st.integers(1, 40), st.data())
def test_starts_cover_an_axis_to_its_last_pixel_without_a_gap(extent: int, size: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, size))
    found = starts(extent, size, stride)
    covered = {pixel for begin in found for pixel in range(begin, begin + size)}
    assert covered >= set(range(extent))
    assert found == sorted(set(found))
    assert max(found) + size <= max(extent, size)


@pytest.mark.parametrize("stride", [0, -1, 5])
def test_a_stride_that_would_leave_gaps_is_refused(stride: int) -> None:
    with pytest.raises(UsageError, match="from 1 to 4"):
        starts(10, 4, stride)


@given(extents, extents, st.integers(1, 40))
def test_blocks_hold_each_pixel_once(height: int, width: int, edge: int) -> None:
    hits = np.zeros((height, width), int)
    for block in blocks(height, width, edge):
        hits[block.slices()] += 1
        assert 0 < block.height <= edge
        assert 0 < block.width <= edge
    assert (hits == 1).all()


windows_anywhere = st.builds(Window, st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 20), st.integers(0, 20))


@given(windows_anywhere, windows_anywhere)
def test_the_common_part_is_what_both_hold(one: Window, other: Window) -> None:
    def pixels(window: Window) -> set[tuple[int, int]]:
        return {(r, c) for r in range(window.row, window.stop_row) for c in range(window.col, window.stop_col)}

    assert pixels(one & other) == pixels(one) & pixels(other)
    assert (one & other).area == len(pixels(one) & pixels(other))


def test_slices_are_relative_to_an_origin_and_padding_grows_all_sides() -> None:
    window = Window(5, 7, 2, 3)
    assert window.pad(1) == Window(4, 6, 4, 5)
    assert window.slices(window.pad(1)) == (slice(1, 3), slice(1, 4))


@given(geometries(), small, small, st.integers(1, 30))
@quick
def test_evaluations_of_all_blocks(geometry: Geometry, height: int, width: int, edge: int) -> None:
    """Kept parts cover the scene (in crop once); inputs are of one shape, on the stride's multiples, in the scene as
    extended, and the region read holds them; `count` says how many there are."""
    hits = np.zeros((height, width), int)
    shape = geometry.input_shape(height, width)
    step, found = geometry.total_stride, 0
    extended = Window(0, 0, max(ceil_to(height, step), shape[0]), max(ceil_to(width, step), shape[1]))
    for block in geometry.blocks(height, width, edge):
        region = geometry.region(height, width, block)
        assert region in extended
        for place in geometry.placements(height, width, block):
            found += 1
            assert place.read.shape == shape
            assert place.read.row % step == place.read.col % step == 0
            assert place.read in region
            assert place.keep in block
            assert place.keep in place.read
            hits[place.keep.slices()] += 1
    assert (hits == 1).all() if geometry.merge == "crop" else (hits >= 1).all()
    assert found == geometry.count(height, width, edge)
    if not geometry.fixed:
        assert shape[0] <= ceil_to(height, step)
        assert shape[1] <= ceil_to(width, step)


@given(geometries(), extents, extents, st.integers(1, 60))
@quick
def test_blocks_of_a_lattice_hold_each_pixel_once(geometry: Geometry, height: int, width: int, edge: int) -> None:
    hits = np.zeros((height, width), int)
    for block in geometry.blocks(height, width, edge):
        hits[block.slices()] += 1
        region = geometry.region(height, width, block)
        if geometry.merge == "crop" and not geometry.fixed:
            most = max(edge, geometry.size) + 2 * geometry.halo
            assert region.height <= most
            assert region.width <= most
    assert (hits == 1).all()


crops = geometries().filter(lambda one: one.merge == "crop")


@given(crops, extents, extents, st.integers(1, 60))
@quick
def test_crop_evaluates_no_more_than_its_price(geometry: Geometry, height: int, width: int, edge: int) -> None:
    """However a scene is cut, and whatever is left over at its end."""
    step = geometry.total_stride
    shape = geometry.input_shape(height, width)
    count = geometry.count(height, width, edge)
    assert count == geometry.count(height, width, max(height, width))
    assert shape[0] <= geometry.input_size
    assert shape[1] <= geometry.input_size
    if not geometry.fixed:
        per_axis = geometry.input_size / geometry.size
        # All windows of an axis are rounded up to the stride: that much each.
        most = [ceil_to(extent, step) * per_axis + step * (extent / geometry.size + 1) for extent in (height, width)]
        assert count * shape[0] * shape[1] <= most[0] * most[1]


def test_a_scene_a_little_larger_than_whole_windows_costs_little_more() -> None:
    geometry = Geometry("crop", 1928, 1928, 56, 8)
    for extent in (3216, 3217, 8192, 10_000, 10_980, 15_537):
        edge = geometry.input_shape(extent, extent)[0]
        assert geometry.count(extent, extent, 1552) * edge**2 <= 1.155 * extent**2


@given(crops, extents, extents, st.integers(1, 60))
@quick
def test_crop_keeps_a_halo_of_context_wherever_the_scene_has_it(
    geometry: Geometry, height: int, width: int, edge: int
) -> None:
    halo, step = geometry.halo, geometry.total_stride
    for block in blocks(height, width, edge):
        for place in geometry.placements(height, width, block):
            assert place.read.row <= max(place.keep.row - halo, 0)
            assert place.read.col <= max(place.keep.col - halo, 0)
            assert place.read.stop_row >= min(place.keep.stop_row + halo, ceil_to(height, step))
            assert place.read.stop_col >= min(place.keep.stop_col + halo, ceil_to(width, step))


@given(geometries().filter(lambda one: one.merge == "blend"), small, small, st.integers(1, 30))
@quick
def test_in_blend_a_pixel_has_the_same_windows_in_the_same_order_for_any_block(
    geometry: Geometry, height: int, width: int, edge: int
) -> None:
    def windows_of(cut: int) -> dict[tuple[int, int], list[Window]]:
        found: dict[tuple[int, int], list[Window]] = {}
        for block in blocks(height, width, cut):
            for place in geometry.placements(height, width, block):
                for row in range(place.keep.row, place.keep.stop_row):
                    for col in range(place.keep.col, place.keep.stop_col):
                        found.setdefault((row, col), []).append(place.read)
        return found

    assert windows_of(edge) == windows_of(max(height, width))


@pytest.mark.parametrize(
    ("geometry", "radius", "numbers"),
    [
        (Geometry("crop", 60, 60, 16, 8), 10, "use size 64"),
        (Geometry("crop", 64, 64, 10, 8), 10, "use halo 16"),
        (Geometry("crop", 64, 64, 8, 8), 10, "use halo 16"),
        (Geometry("crop", 64, 64, 8, 8), None, "use merge blend"),
        (Geometry("blend", 64, 20, 0, 8), 10, "use stride 24"),
        (Geometry("blend", 64, 72, 0, 8), 10, "use stride 32"),
        (Geometry("mean", 64, 64, 0, 8), 10, "crop or blend"),
    ],
)
def test_a_geometry_that_shows_seams_is_refused_with_the_numbers_to_use(
    geometry: Geometry, radius: int | None, numbers: str
) -> None:
    with pytest.raises(UsageError, match=numbers):
        check_geometry(geometry, radius)


def test_defaults() -> None:
    # U-Net of 3 levels: (1928 + 2 * 56)^2 / 1928^2 = 1.1196, and 1.1201 for 1920.
    assert choose_geometry(total_stride=8, radius=51, max_input=4096) == Geometry("crop", 1928, 1928, 56, 8)
    assert choose_geometry(total_stride=8, radius=51, max_input=1500) == Geometry("crop", 1384, 1384, 56, 8)
    assert choose_geometry(total_stride=1, radius=0) == Geometry("crop", 512, 512, 0, 1)
    assert choose_geometry(total_stride=8, radius=None) == Geometry("blend", 512, 256, 0, 8)
    assert choose_geometry(total_stride=8, radius=None, max_input=300) == Geometry("blend", 296, 144, 0, 8)
    # A fixed input leaves little of itself beside the halo: (256 / 64)^2 = 16 pixels for one.
    fixed = choose_geometry(total_stride=8, radius=96, input_shape=(256, 256))
    assert fixed == Geometry("blend", 256, 128, 0, 8, True)
    assert choose_geometry(total_stride=8, radius=16, input_shape=(256, 256)).size == 224
    assert choose_geometry(total_stride=8, radius=16, stride=32, size=64).merge == "blend"
    assert choose_geometry(total_stride=8, radius=3, input_shape=(37, 37)).merge == "blend"


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"size": 100}, "use size 104"),
        ({"halo": 16}, "use halo 56"),
        ({"merge": "crop", "stride": 64, "size": 128}, "leave --stride out"),
        ({"merge": "blend", "halo": 8}, "set --stride"),
        ({"merge": "mean"}, "crop or blend"),
        ({"input_shape": (64, 128)}, "square"),
        ({"input_shape": (37, 37), "merge": "crop"}, "multiples of .* 8, and this one takes inputs of 37 x 37 only"),
        ({"input_shape": (37, 37), "merge": "crop", "radius": None}, "mixes the whole window.*use merge blend"),
        ({"input_shape": (256, 256), "merge": "blend", "size": 128}, "256 x 256 only"),
    ],
)
def test_wishes_that_cannot_be_are_refused(wish: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        choose_geometry(**{"total_stride": 8, "radius": 51, **wish})  # type: ignore[arg-type]


@given(st.sampled_from([1, 2, 8, 32]), st.one_of(st.none(), st.integers(0, 500)), st.integers(64, 5000))
def test_what_is_chosen_always_passes_the_check(step: int, radius: int | None, max_input: int) -> None:
    geometry = choose_geometry(total_stride=step, radius=radius, max_input=max_input)
    check_geometry(geometry, radius)
    assert geometry.merge == "blend" or geometry.input_size**2 <= 4 * geometry.size**2
