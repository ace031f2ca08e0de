"""Confusion matrices and what follows from them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from sattile.metrics import confusion, summarize
from sattile.schema import SegmentClass

CLASSES = (SegmentClass(0, "land", "#111111"), SegmentClass(3, "water", "#222222"), SegmentClass(7, "ice", "#333333"))
IDS = (0, 3, 7)

maps = st.lists(st.tuples(st.sampled_from([*IDS, 255]), st.sampled_from([*IDS, 255])), min_size=1, max_size=60)


@given(maps)
def test_confusion_is_that_of_an_independent_package(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs, np.uint8).T
    both = [(t, p) for t, p in pairs if t != 255 and p != 255]
    found = confusion(truth, predicted, IDS)
    assert found.dtype == np.int64
    if both:
        expected = confusion_matrix([t for t, _ in both], [p for _, p in both], labels=IDS)
        np.testing.assert_array_equal(found, expected)
    else:
        assert not found.any()


@given(maps, st.integers(0, 60))
def test_matrices_of_disjoint_pixels_add_up(pairs: list[tuple[int, int]], cut: int) -> None:
    truth, predicted = np.array(pairs, np.uint8).T
    parts = confusion(truth[:cut], predicted[:cut], IDS) + confusion(truth[cut:], predicted[cut:], IDS)
    np.testing.assert_array_equal(parts, confusion(truth, predicted, IDS))


@given(st.lists(st.tuples(st.sampled_from(IDS), st.sampled_from(IDS)), min_size=1, max_size=60))
def test_metrics_are_those_of_an_independent_package(pairs: list[tuple[int, int]]) -> None:
    truth, predicted = np.array(pairs, np.uint8).T
    found = summarize(confusion(truth, predicted, IDS), CLASSES)
    ious = []
    for one in CLASSES:
        t, p = truth == one.id, predicted == one.id
        entry = found["classes"][one.name]
        if not t.any() and not p.any():
            assert entry is None
            continue
        ious.append(jaccard_score(t, p))
        assert entry["iou"] == pytest.approx(ious[-1])
        assert entry["f1"] == pytest.approx(f1_score(t, p))
        assert entry["precision"] == (pytest.approx(precision_score(t, p)) if p.any() else None)
        assert entry["recall"] == (pytest.approx(recall_score(t, p)) if t.any() else None)
        assert entry["pixels"] == t.sum()
    assert found["miou"] == pytest.approx(np.mean(ious))
    assert found["accuracy"] == pytest.approx((truth == predicted).mean())
    assert found["pixels"] == len(pairs)


def test_rows_are_truth_and_columns_are_prediction() -> None:
    found = summarize(confusion(np.uint8([0, 0, 0]), np.uint8([0, 3, 3]), IDS), CLASSES)
    assert found["confusion"] == [[1, 2, 0], [0, 0, 0], [0, 0, 0]]
    assert found["classes"]["land"] == {"iou": 1 / 3, "precision": 1.0, "recall": 1 / 3, "f1": 0.5, "pixels": 3}
    assert found["classes"]["water"] == {"iou": 0.0, "precision": 0.0, "recall": None, "f1": 0.0, "pixels": 0}
    assert found["classes"]["ice"] is None
    assert found["miou"] == pytest.approx(1 / 6)


def test_nothing_counted_is_null_not_an_error() -> None:
    found = summarize(np.zeros((3, 3), np.int64), CLASSES)
    assert found["miou"] is None
    assert found["accuracy"] is None
    assert found["classes"] == {"land": None, "water": None, "ice": None}


@pytest.mark.parametrize("stranger", [1, 254])
def test_a_value_that_is_no_class_is_an_error_on_either_side(stranger: int) -> None:
    for truth, predicted in ((stranger, 0), (0, stranger)):
        with pytest.raises(ValueError, match=str(stranger)):
            confusion(np.uint8([truth, 0]), np.uint8([predicted, 0]), IDS)
