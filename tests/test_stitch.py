"""Weighted sums of windows, and labels from scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sattile.grid import Geometry, Window, blocks
from sattile.stitch import NODATA, PEAK, Stitcher, blend_weights, taper, to_labels

quick = settings(deadline=None, max_examples=60)
sides = st.integers(1, 40)


@given(st.integers(1, 600))
def test_weights_are_whole_symmetric_and_at_least_one(length: int) -> None:
    weights = taper(length)
    assert weights.dtype == np.int64
    assert weights.min() >= 1
    assert weights.max() <= PEAK
    np.testing.assert_array_equal(weights, weights[::-1])
    assert (np.diff(weights[: (length + 1) // 2]) >= 0).all()


def stitch(geometry: Geometry, values: np.ndarray, valid: np.ndarray, edge: int) -> tuple[np.ndarray, np.ndarray]:
    """What a network that gives its input back makes of an image, block by block."""
    height, width, classes = values.shape
    scores, coverage = np.empty(values.shape, np.float32), np.empty(valid.shape, np.int64)
    weights = blend_weights(*geometry.input_shape(height, width))
    for block in blocks(height, width, edge):
        stitcher = Stitcher(block, classes)
        for place in geometry.placements(height, width, block):
            inside = place.keep.slices(place.read)
            stitcher.add(place.keep, values[place.keep.slices()], valid[place.keep.slices()], weights[inside])
        scores[block.slices()], coverage[block.slices()] = stitcher.scores(), stitcher.coverage
    return scores, coverage


@st.composite
def lattices(draw: st.DrawFn) -> Geometry:
    size = draw(st.integers(1, 16))
    return Geometry("blend", size, draw(st.integers(1, size)), 0)


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(lattices(), sides, sides, st.integers(1, 40), st.data())
@quick
def test_identity_gives_the_input_back_to_the_bit_and_is_nan_without_data(
    geometry: Geometry, height: int, width: int, edge: int, data: st.DataObject
) -> None:
    values = data.draw(hnp.arrays(np.float32, (height, width, 2), elements=finite))
    valid = data.draw(hnp.arrays(bool, (height, width)))
    scores, coverage = stitch(geometry, np.where(valid[..., None], values, np.float32(np.nan)), valid, edge)
    np.testing.assert_array_equal(scores[valid], values[valid])
    assert np.isnan(scores[~valid]).all()
    np.testing.assert_array_equal(coverage > 0, valid)


@given(lattices(), sides, sides, finite)
@quick
def test_a_constant_stays_exactly_that_constant(geometry: Geometry, height: int, width: int, value: float) -> None:
    scores, _ = stitch(geometry, np.full((height, width, 1), value, np.float32), np.ones((height, width), bool), 17)
    assert (scores == np.float32(value)).all()


@given(lattices(), sides, sides, st.integers(1, 40))
@quick
def test_scores_and_coverage_do_not_depend_on_how_a_scene_is_cut(
    geometry: Geometry, height: int, width: int, edge: int
) -> None:
    shape = geometry.input_shape(height, width)
    weights = blend_weights(*shape)

    def run(cut: int) -> tuple[np.ndarray, np.ndarray]:
        scores, coverage = np.empty((height, width, 3), np.float32), np.empty((height, width), np.int64)
        for block in blocks(height, width, cut):
            stitcher = Stitcher(block, 3)
            for place in geometry.placements(height, width, block):
                # Each window gives other scores for a pixel, so that the order of adding shows.
                rng = np.random.default_rng([place.read.row, place.read.col])
                window = rng.normal(size=(*shape, 3)).astype(np.float32)
                inside = place.keep.slices(place.read)
                stitcher.add(place.keep, window[inside], np.ones(place.keep.shape, bool), weights[inside])
            scores[block.slices()], coverage[block.slices()] = stitcher.scores(), stitcher.coverage
        return scores, coverage

    whole, part = run(max(height, width)), run(edge)
    np.testing.assert_array_equal(whole[0], part[0])
    np.testing.assert_array_equal(whole[1], part[1])


def test_rows_of_a_map_are_those_of_the_whole() -> None:
    stitcher = Stitcher(Window(3, 5, 4, 6), 2)
    stitcher.add(Window(4, 6, 2, 3), np.arange(12, dtype=np.float32).reshape(2, 3, 2), np.ones((2, 3), bool))
    np.testing.assert_array_equal(stitcher.scores()[1:3], stitcher.scores(slice(1, 3)))
    np.testing.assert_array_equal(stitcher.coverage.nonzero(), np.mgrid[1:3, 1:4].reshape(2, -1))


def test_what_lies_under_a_scene_s_nodata_does_not_spoil_another_scene_s_pixel() -> None:
    stitcher = Stitcher(Window(0, 0, 1, 2), 1)
    window = Window(0, 0, 1, 2)
    stitcher.add(window, np.float32([[[4], [np.nan]]]), np.array([[True, False]]), np.array([[3, 3]]))
    stitcher.add(window, np.float32([[[np.inf], [8]]]), np.array([[False, True]]))
    np.testing.assert_array_equal(stitcher.scores(), [[[4], [8]]])
    np.testing.assert_array_equal(stitcher.coverage, [[3, 1]])


IDS = np.array([4, 0, 200], np.uint8)


@given(hnp.arrays(np.float32, (3, 5, 3), elements=st.floats(0, 1, width=32)), hnp.arrays(bool, (3, 5)))
def test_labels_are_the_id_of_the_largest_score(scores: np.ndarray, valid: np.ndarray) -> None:
    labels = to_labels(scores, valid, IDS)
    for row, col in np.ndindex(3, 5):
        best = list(scores[row, col]).index(max(scores[row, col]))
        assert labels[row, col] == (IDS[best] if valid[row, col] else NODATA)


@given(
    hnp.arrays(np.float32, (3, 5, 2), elements=st.floats(0, 1, width=32)),
    hnp.arrays(bool, (3, 5)),
    st.floats(0, 1, width=32),
)
def test_two_classes(scores: np.ndarray, valid: np.ndarray, threshold: float) -> None:
    plain, moved = to_labels(scores, valid, IDS[:2]), to_labels(scores, valid, IDS[:2], threshold)
    for row, col in np.ndindex(3, 5):
        first, second = scores[row, col]
        assert plain[row, col] == ((0 if second > first else 4) if valid[row, col] else NODATA)
        assert moved[row, col] == ((0 if second >= threshold else 4) if valid[row, col] else NODATA)


def test_with_more_classes_a_pixel_below_the_threshold_stays_undecided() -> None:
    scores = np.float32([[[0.4, 0.3, 0.3], [0.1, 0.8, 0.1]]])
    np.testing.assert_array_equal(to_labels(scores, np.ones((1, 2), bool), IDS, 0.5), [[NODATA, 0]])


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("channel", [0, 1])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_score_that_is_not_a_number_is_never_a_class(classes: int, channel: int, threshold: float | None) -> None:
    scores = np.full((1, 2, classes), 0.7, np.float32)
    scores[0, 1, channel] = np.nan
    labels = to_labels(scores, np.ones((1, 2), bool), IDS[:classes], threshold)
    assert labels[0, 0] != NODATA
    assert labels[0, 1] == NODATA
