"""Confusion matrices, what follows from them and how surely, and whether scores can be believed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score, precision_score, recall_score

from sattile import metrics
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


def blocks(seed: int, count: int, classes: int = 3) -> np.ndarray:
    """(count, classes, classes): blocks of unequal size and difficulty."""
    rng = np.random.default_rng(seed)
    right = rng.uniform(0.4, 0.95, count)[:, None, None]
    shares = np.where(np.eye(classes, dtype=bool), right, (1 - right) / (classes - 1))
    return rng.poisson(shares * rng.integers(50, 400, count)[:, None, None])


def test_bootstrap_is_a_draw_of_whole_blocks_with_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain loop over the same draws; and held at a time or not makes no difference."""
    tables = blocks(1, 7)
    rng = np.random.default_rng(5)
    slow = []
    for _ in range(40):
        total = np.zeros((3, 3), int)
        for number in rng.integers(7, size=7):
            total += tables[number]
        slow.append(total)
    np.testing.assert_array_equal(metrics.bootstrap(tables, 40, seed=5), slow)
    monkeypatch.setattr(metrics, "_AT_ONCE", 21)
    np.testing.assert_array_equal(metrics.bootstrap(tables, 40, seed=5), slow)
    assert (metrics.bootstrap(tables, 40, seed=6) != slow).any()


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_intervals_hold_the_estimate_and_are_as_wide_as_blocks_differ(seed: int) -> None:
    tables = blocks(seed, 60)
    found = metrics.intervals(tables, CLASSES)
    assert found is not None
    assert (found["blocks"], found["resamples"], found["level"]) == (60, 1000, 0.95)
    whole = summarize(tables.sum(0), CLASSES)
    for name in ("miou", "accuracy"):
        low, high = found[name]
        assert low < whole[name] < high
    for one in CLASSES:
        for name in metrics.OF_CLASS:
            low, high = found["classes"][one.name][name]
            assert low < whole["classes"][one.name][name] < high
    # The standard error of a ratio of sums over blocks (Cochran, Sampling Techniques, 1977, equation 6.13).
    pixels, hits = tables.sum((1, 2)), np.trace(tables, axis1=1, axis2=2)
    rest = hits - whole["accuracy"] * pixels
    error = np.sqrt((rest**2).sum() / 59 * 60) / pixels.sum()
    low, high = found["accuracy"]
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("tables", [blocks(0, 1), blocks(0, 0), np.stack([blocks(0, 1)[0], np.zeros((3, 3), int)])])
def test_fewer_than_two_blocks_have_no_intervals(tables: np.ndarray) -> None:
    assert metrics.intervals(tables, CLASSES) is None


def test_a_class_that_is_absent_has_no_interval_and_one_that_is_rare_is_left_out_where_it_is_not_drawn() -> None:
    tables = blocks(2, 9)
    tables[:, 2], tables[:, :, 2] = 0, 0
    tables[4:6, 2, 2] = 10  # in two blocks: a tenth of the resamples lack it
    found = metrics.intervals(tables, CLASSES)
    assert found is not None
    assert found["classes"]["ice"]["iou"] == [1.0, 1.0]
    for left in (10, 0):  # in one block, whose pixels say nothing of other places; in none
        tables[4:6, 2, 2] = left, 0
        found = metrics.intervals(tables, CLASSES)
        assert found is not None
        assert found["classes"]["ice"] is None
    tables[2:4, 0, 2] = 5  # where it is not, and is taken for
    found = metrics.intervals(tables, CLASSES)
    assert found is not None
    assert found["classes"]["ice"]["iou"] == [0.0, 0.0]


@given(st.permutations(range(12)), st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_what_was_counted_is_assessed_alike_in_any_order_and_regions_sum_to_the_whole(
    order: list[int], seed: int
) -> None:
    tables = blocks(seed, 12)
    keys = [(f"scene {i % 3}", f"{i % 5}_0", ("north", "(outside)", "south")[i % 4 % 3]) for i in range(12)]
    counted: metrics.Counted = dict(zip(keys, tables, strict=True))
    none = np.zeros((metrics.BINS + 1, 3), np.int64)
    found = metrics.assess(counted, none, CLASSES)
    shuffled = {list(counted)[i]: list(counted.values())[i] for i in order}
    assert metrics.assess(shuffled, none, CLASSES) == found
    assert set(found["regions"]) == {"north", "(outside)", "south"}
    for part in ("regions", "scenes"):
        total = sum(np.array(one["confusion"]) for one in found[part].values())
        np.testing.assert_array_equal(total, found["confusion"])
    assert found["intervals"]["blocks"] == 5
    assert found["calibration"] is None
    (note,) = found["notes"]
    assert note.startswith("intervals follow from 5 spatial blocks: so few")


def test_a_class_in_one_block_is_told() -> None:
    tables = blocks(3, 30)
    tables[1:, 2] = 0
    counted: metrics.Counted = {("s", f"{number}_0", None): one for number, one in enumerate(tables)}
    found = metrics.assess(counted, np.zeros((metrics.BINS + 1, 3), np.int64), CLASSES)
    assert found["notes"] == ["no intervals of ice: all pixels of it lie in one spatial block"]
    assert found["intervals"]["classes"]["ice"] is None


def test_a_difference_is_drawn_on_the_same_blocks_for_both() -> None:
    """Two models that err alike but for a tenth differ surely, though each by itself is unsure."""
    good = blocks(4, 40)
    worse = good.copy()
    lost = worse[:, 0, 0] // 10
    worse[:, 0, 0] -= lost
    worse[:, 0, 1] += lost
    assert metrics.paired_difference(good, good) == (0, [0, 0])
    difference, (low, high) = metrics.paired_difference(worse, good)  # type: ignore[misc]
    expected = summarize(worse.sum(0), CLASSES)["miou"] - summarize(good.sum(0), CLASSES)["miou"]
    assert difference == pytest.approx(expected)
    assert low < difference < high < 0
    alone = [metrics.intervals(one, CLASSES) for one in (worse, good)]
    assert alone[0]["miou"][1] > alone[1]["miou"][0]  # type: ignore[index]
    with pytest.raises(ValueError, match="different pixels"):
        metrics.paired_difference(good, good[:-1])
    worse[3, 1, 1] += 1
    with pytest.raises(ValueError, match="different pixels"):
        metrics.paired_difference(good, worse)


def scored(seed: int, height: int = 70, width: int = 23) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of three classes that sum to 1, truth and labels with some of both that are not counted."""
    rng = np.random.default_rng(seed)
    scores = rng.dirichlet((0.5, 0.5, 0.5), (height, width)).astype(np.float32)
    predicted = np.array(IDS, np.uint8)[scores.argmax(-1)]
    truth = np.where(rng.random((height, width)) < 0.6, predicted, rng.choice(IDS, (height, width))).astype(np.uint8)
    truth[rng.random((height, width)) < 0.2] = 255
    predicted[rng.random((height, width)) < 0.1] = 255
    return scores, truth, predicted


@given(st.integers(0, 99), st.integers(0, 70), st.integers(0, 23))
@settings(max_examples=20, deadline=None)
def test_reliability_of_disjoint_pixels_adds_up_exactly(seed: int, row: int, col: int) -> None:
    scores, truth, predicted = scored(seed)
    whole = metrics.reliability(scores, truth, predicted, IDS)
    parts = sum(
        metrics.reliability(scores[part], truth[part], predicted[part], IDS)
        for part in itertools.product((slice(0, row), slice(row, 70)), (slice(0, col), slice(col, 23)))
    )
    np.testing.assert_array_equal(parts, whole)


@given(st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_calibration_is_that_of_the_paper(seed: int) -> None:
    """Guo et al. (2017), equations 1 to 3 and 5, pixel by pixel in float64."""
    scores, truth, predicted = scored(seed)
    counted = (truth != 255) & (predicted != 255)
    confidence, right = scores.max(-1)[counted].astype(float), (truth == predicted)[counted]
    gaps, shares = [], []
    found = metrics.calibration(metrics.reliability(scores, truth, predicted, IDS))
    assert found is not None
    for m in range(20):
        inside = (confidence > m / 20) & (confidence <= (m + 1) / 20)
        assert found["bins"][m]["pixels"] == inside.sum()
        assert (found["bins"][m]["from"], found["bins"][m]["to"]) == (m / 20, (m + 1) / 20)
        if inside.any():
            assert found["bins"][m]["accuracy"] == pytest.approx(right[inside].mean())
            assert found["bins"][m]["confidence"] == pytest.approx(confidence[inside].mean(), abs=1e-7)
            gaps.append(abs(right[inside].mean() - confidence[inside].mean()))
            shares.append(inside.mean())
        else:
            assert found["bins"][m]["accuracy"] is None
    assert found["ece"] == pytest.approx(np.dot(gaps, shares), abs=1e-7)
    assert found["mce"] == pytest.approx(max(gaps), abs=1e-7)


def test_a_network_that_always_says_three_quarters() -> None:
    """By hand: 12 pixels, of which 2 are unlabelled and 1 undecided; of the 9 left 6 are right."""
    scores = np.broadcast_to(np.float32([0.25, 0.75]), (3, 4, 2))
    truth = np.uint8([[3, 3, 3, 255], [3, 3, 3, 0], [0, 0, 255, 3]])
    predicted = np.full((3, 4), 3, np.uint8)
    predicted[2, 3] = 255
    table = metrics.reliability(scores, truth, predicted, (0, 3))
    assert table.dtype == np.int64
    assert table[14].tolist() == [9, 6, 9 * 12_582_912]  # (0.70, 0.75]
    assert table.sum() == table[14].sum()
    found = metrics.calibration(table)
    assert found is not None
    assert found["bins"][14] == {"from": 0.7, "to": 0.75, "pixels": 9, "accuracy": 6 / 9, "confidence": 0.75}
    assert (found["ece"], found["mce"]) == (pytest.approx(1 / 12), pytest.approx(1 / 12))


def test_a_class_taken_by_threshold_counts_with_its_own_score() -> None:
    scores = np.float32([[[0.75, 0.25]]])
    table = metrics.reliability(scores, np.uint8([[3]]), np.uint8([[3]]), (0, 3))
    assert table[4].tolist() == [1, 1, metrics.UNIT // 4]


@pytest.mark.parametrize("strange", [[0.5, 0.502], [1.5, -0.5], [2.0, 7.0], [-0.01, 1.01]])
def test_scores_that_are_no_probabilities_have_no_calibration(strange: list[float]) -> None:
    scores = np.float32([[[0.25, 0.75]] * 3, [[0.25, 0.75], strange, [0.4998, 0.5]]])
    truth = np.full((2, 3), 3, np.uint8)
    table = metrics.reliability(scores, truth, truth, (0, 3))
    assert table[-1, 0] == 1
    assert metrics.calibration(table) is None
    truth[1, 1] = 255  # what is not counted may be anything
    assert metrics.calibration(metrics.reliability(scores, truth, truth, (0, 3))) is not None
    assert metrics.calibration(np.zeros_like(table)) is None


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    # Newcombe, Two-sided confidence intervals for the single proportion, 1998, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_intervals_of_shares_are_those_of_the_literature(right: int, of: int, low: float, high: float) -> None:
    assert metrics.wilson(right / of, of) == pytest.approx([low, high], abs=5e-5)


def test_recall_on_few_shapes_is_as_sure_as_there_are_shapes() -> None:
    """Not as there are pixels; and shapes of unlike size count for fewer."""
    classes = [SegmentClass(index, name, "#000000") for index, name in enumerate(("sand", "marsh", "sea"))]
    tables = np.zeros((3, 3, 3), np.int64)
    tables[0, 0] = 30, 0, 0
    tables[1, 0] = 30, 0, 0
    tables[2, 1] = 10, 30, 0
    found = metrics.recall_of_groups(tables, classes)
    assert found["sea"] is None
    assert found["sand"] == {"groups": 2, "pixels": 60, "recall": 1.0, "interval": metrics.wilson(1.0, 2)}
    assert found["marsh"] == {"groups": 1, "pixels": 40, "recall": 0.75, "interval": metrics.wilson(0.75, 1)}
    assert metrics.wilson(1.0, 1)[0] == pytest.approx(1 / (1 + metrics.NORMAL**2))
    tables[1, 0] = 3, 0, 0
    low, _ = metrics.recall_of_groups(tables, classes)["sand"]["interval"]
    assert low == metrics.wilson(1.0, 33**2 / (30**2 + 3**2))[0]
    assert metrics.wilson(1.0, 1)[0] < low < metrics.wilson(1.0, 2)[0]


def test_groups_of_shapes_are_called_so() -> None:
    classes = [SegmentClass(0, "sand", "#111111"), SegmentClass(1, "marsh", "#222222")]
    one, other = np.array([[9, 0], [0, 4]]), np.array([[7, 1], [0, 0]])
    counted = {("s", "g1", None): one, ("s", "g2", None): other}
    nothing = np.zeros((metrics.BINS + 1, 3), np.int64)
    assert "shapes" not in metrics.assess(counted, nothing, classes)
    found = metrics.assess(counted, nothing, classes, around_shapes=True)
    assert found["shapes"]["sand"]["groups"] == 2
    assert found["shapes"]["marsh"]["groups"] == 1
    assert found["notes"][1].startswith("intervals follow from 2 groups of shapes")
