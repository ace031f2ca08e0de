"""How good labels and scores are: counts, which add, and what follows from them. numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

IGNORE = 255
"""Pixels that are not counted: `schema.IGNORE` in labels, `stitch.NODATA` in maps."""


class Named(Protocol):
    """Anything with a name, such as `schema.SegmentClass`."""

    @property
    def name(self) -> str: ...


# --- confusion ----------------------------------------------------------------------------------------------------


def confusion(truth: np.ndarray, predicted: np.ndarray, class_ids: Sequence[int], ignore: int = IGNORE) -> np.ndarray:
    """Count pixels by true and predicted class.

    Matrices of disjoint pixels add up. Pixels where either side is `ignore` are not counted.

    Args:
        truth, predicted: uint8 class ids of one shape.
        class_ids: the ids, in the order of rows and columns.

    Returns:
        (classes, classes) int64: [truth row, predicted column].

    Raises:
        ValueError: if either holds a value that is neither a class nor `ignore`.
    """
    counted = (truth != ignore) & (predicted != ignore)
    classes = len(class_ids)
    position = _positions(class_ids)
    rows, cols = position[truth[counted]], position[predicted[counted]]
    if rows.size and min(rows.min(), cols.min()) < 0:
        values = np.union1d(truth[counted], predicted[counted])
        strangers = [int(value) for value in values if position[value] < 0]
        raise ValueError(f"values {strangers} are none of the classes {list(class_ids)}")
    return np.bincount(rows * classes + cols, minlength=classes * classes).reshape(classes, classes)


def _positions(class_ids: Sequence[int]) -> np.ndarray:
    """(256,) int64: the position of each class id, -1 of other values."""
    position = np.full(256, -1, np.int64)
    position[list(class_ids)] = np.arange(len(class_ids))
    return position


def ratios(confusions: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of many confusion matrices at once; NaN where one is undefined.

    A class that is absent from truth and prediction is left out of the mean. Precision of a class that is never
    predicted, and recall of one that never occurs, are undefined.

    Args:
        confusions: (..., classes, classes) counts, [truth row, predicted column].

    Returns:
        iou, precision, recall, f1: (..., classes) float64; miou, accuracy: (...).
    """
    counts = np.asarray(confusions)
    hits, true, found = np.diagonal(counts, axis1=-2, axis2=-1), counts.sum(-1), counts.sum(-2)
    with np.errstate(invalid="ignore"):
        iou = hits / (true + found - hits)
        present = ~np.isnan(iou)
        return {
            "iou": iou,
            "precision": hits / found,
            "recall": hits / true,
            "f1": 2 * hits / (true + found),
            "miou": np.where(present, iou, 0).sum(-1) / present.sum(-1),
            "accuracy": hits.sum(-1) / counts.sum((-2, -1)),
        }


OF_CLASS = ("iou", "precision", "recall", "f1")
"""The metrics that each class has."""


def summarize(confusion: np.ndarray, classes: Sequence[Named]) -> dict[str, Any]:
    """Metrics of a confusion matrix, as in `metrics.json`: None for what is undefined, see `ratios`.

    Args:
        confusion: (classes, classes) counts, [truth row, predicted column].
        classes: in the order of rows and columns.
    """
    counts = np.asarray(confusion, np.int64)
    found = ratios(counts)
    by_class: dict[str, Any] = {}
    for index, one in enumerate(classes):
        values: dict[str, Any] = {name: _number(found[name][index]) for name in OF_CLASS}
        absent = values["iou"] is None
        by_class[one.name] = None if absent else values | {"pixels": int(counts[index].sum())}
    return {
        "classes": by_class,
        "miou": _number(found["miou"]),
        "accuracy": _number(found["accuracy"]),
        "confusion": counts.tolist(),
        "pixels": int(counts.sum()),
    }


def _number(value: np.ndarray) -> float | None:
    return None if np.isnan(value) else float(value)


# --- how sure that is ---------------------------------------------------------------------------------------------

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0

_AT_ONCE = 1 << 20
"""Draws that are held at a time."""


def bootstrap(tables: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Confusion matrices of as many blocks as there are, drawn with replacement, again and again.

    Blocks, not pixels: pixels side by side are wrong together, and to draw them one by one would take a million of them
    for a million independent observations (Lahiri, Resampling Methods for Dependent Data, 2003). The draw depends on
    seed and number of blocks alone, so that two models measured on the same blocks are drawn in pairs.

    Args:
        tables: (blocks, classes, classes) counts, in an order that does not depend on how they were computed.

    Returns:
        (resamples, classes, classes) int64.
    """
    blocks, classes = len(tables), tables.shape[-1]
    # Sums of float64 are exact below 2**53 pixels, and their matrix product is some times that of integers.
    flat = np.asarray(tables, np.float64).reshape(blocks, classes * classes)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, classes * classes), np.int64)
    step = max(_AT_ONCE // max(blocks, 1), 1)
    for first in range(0, resamples, step):
        count = min(step, resamples - first)
        draws = rng.integers(blocks, size=(count, blocks)) + np.arange(count)[:, None] * blocks
        times = np.bincount(draws.ravel(), minlength=count * blocks).reshape(count, blocks)
        drawn[first : first + count] = times.astype(np.float64) @ flat
    return drawn.reshape(resamples, classes, classes)


def intervals(tables: np.ndarray, classes: Sequence[Named]) -> dict[str, Any] | None:
    """Percentile intervals of all metrics by `bootstrap` (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, chapter 13), as in `metrics.json`; None for fewer than two blocks.

    A resample in which a metric is undefined is left out of its interval. A class that is absent has None, and so has
    one whose pixels all lie in one block: nothing says how much it differs from place to place.

    Args:
        tables: (blocks, classes, classes) counts; blocks without a counted pixel are left out.
        classes: in the order of rows and columns.
    """
    tables = tables[tables.sum((1, 2)) > 0]
    if len(tables) < 2:
        return None
    drawn = ratios(bootstrap(tables))
    by_class = {
        one.name: {name: interval(drawn[name][:, index]) for name in OF_CLASS} if _varies(tables, index) else None
        for index, one in enumerate(classes)
    }
    return {
        "level": LEVEL,
        "blocks": len(tables),
        "resamples": RESAMPLES,
        "classes": by_class,
        "miou": interval(drawn["miou"]),
        "accuracy": interval(drawn["accuracy"]),
    }


def _varies(tables: np.ndarray, index: int) -> bool:
    """Whether a class is found in two blocks at least: by truth or, where it is in none of them, by the model."""
    true, predicted = (np.count_nonzero(tables.sum(axis)[:, index]) for axis in (2, 1))
    return (true or predicted) > 1


NORMAL = 1.959963984540054
"""Of a standard normal, the middle `LEVEL` lies within so much of 0."""


def recall_of_groups(tables: np.ndarray, classes: Sequence[Named]) -> dict[str, Any]:
    """Recall by class on few groups of shapes, with intervals that hold for one of them, too; as in `metrics.json`.

    The pixels of a group are taken for one observation: they are right or wrong together. The interval is that of
    Wilson (Probable inference, the law of succession, and statistical inference, 1927) for as many observations as
    groups, less where some have most of the pixels: (sum of pixels)^2 / sum of (pixels^2) (Kish, Survey Sampling,
    1965). Resampling would find no spread among two or three.

    Args:
        tables: (groups, classes, classes) counts, [truth row, predicted column].
        classes: in the order of rows and columns.

    Returns:
        By class `groups`, `pixels`, `recall` and `interval`; None for a class that no group shows.
    """
    found: dict[str, Any] = {}
    for index, one in enumerate(classes):
        true = tables[:, index].sum(-1)
        pixels, groups = int(true.sum()), int(np.count_nonzero(true))
        found[one.name] = None
        if pixels:
            recall = int(tables[:, index, index].sum()) / pixels
            between = wilson(recall, pixels**2 / float((true.astype(np.float64) ** 2).sum()))
            found[one.name] = {"groups": groups, "pixels": pixels, "recall": recall, "interval": between}
    return found


def wilson(share: float, observations: float) -> list[float]:
    """[low, high] of a share that was seen in so many independent observations."""
    spread = NORMAL**2 / observations
    middle = (share + spread / 2) / (1 + spread)
    half = (share * (1 - share) * spread + spread**2 / 4) ** 0.5 / (1 + spread)
    return [max(middle - half, 0.0), min(middle + half, 1.0)]


FEW_BLOCKS = 20
"""Below these intervals are too narrow (decision 0014)."""


def interval(values: np.ndarray) -> list[float] | None:
    """[low, high] that the middle `LEVEL` of the values lies between; NaN is left out."""
    values = values[~np.isnan(values)]
    return np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist() if values.size else None


def paired_difference(one: np.ndarray, other: np.ndarray) -> tuple[float, list[float] | None]:
    """By how much the mIoU of one model is above that of another on the same blocks, and the interval of that.

    Args:
        one, other: (blocks, classes, classes) counts of the same blocks in the same order.

    Raises:
        ValueError: if they count other pixels: a block's pixels of a true class differ in number.
    """
    if one.shape != other.shape or not (one.sum(-1) == other.sum(-1)).all():
        raise ValueError("the two count different pixels")
    counted = one.sum((1, 2)) > 0
    one, other = one[counted], other[counted]
    difference = ratios(one.sum(0))["miou"] - ratios(other.sum(0))["miou"]
    drawn = ratios(bootstrap(one))["miou"] - ratios(bootstrap(other))["miou"]
    return float(difference), interval(drawn) if len(one) > 1 else None


# --- calibration --------------------------------------------------------------------------------------------------

BINS = 20
UNIT = 1 << 24
"""Confidences are summed in whole parts of this: exact in any order (float32 has no finer steps from 1/2 to 1, and a
product with a power of two is exact)."""

TOLERANCE = 1e-3
"""How far the scores of a pixel may sum from 1."""

_ROWS = 64
"""Rows of which copies are made at a time."""


def reliability(
    scores: np.ndarray, truth: np.ndarray, predicted: np.ndarray, class_ids: Sequence[int], ignore: int = IGNORE
) -> np.ndarray:
    """Count pixels by the score of the class that was decided for them, and how often it is right.

    Tables of disjoint pixels add up. Pixels where truth or prediction is `ignore` are not counted.

    Args:
        scores: (height, width, classes) float32, in the order of `class_ids`.
        truth, predicted: (height, width) uint8 class ids.

    Returns:
        (BINS + 1, 3) int64: of each bin pixels, those that are right, and the sum of scores in 1/UNIT. Bin i holds
        the scores above i / BINS up to (i + 1) / BINS; the last row those pixels whose scores are no probabilities.
    """
    counts = np.zeros((BINS + 2, 2), np.int64)  # wrong and right; the last row is of pixels that do not count
    units = np.zeros(BINS + 2, np.int64)
    for first in range(0, len(truth), _ROWS):
        rows = slice(first, first + _ROWS)
        found = predicted[rows]
        counted = (truth[rows] != ignore) & (found != ignore)
        if not counted.any():
            continue
        # A class at a time: numpy is slow over a short last axis.
        total, confidence = np.zeros(found.shape, np.float32), np.zeros(found.shape, np.float32)
        likely = counted.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            for index, class_id in enumerate(class_ids):
                score = scores[rows, ..., index]
                total += score
                likely &= (score >= -TOLERANCE) & (score <= 1 + TOLERANCE)
                np.copyto(confidence, score, where=found == class_id)
            likely &= np.abs(total - 1) <= TOLERANCE
        whole = np.rint(np.clip(confidence, 0, 1) * np.float32(UNIT)).astype(np.int32)
        bins = np.maximum((whole * BINS - 1) // UNIT, 0)
        bins[~likely] = BINS
        bins[~counted] = BINS + 1
        right = truth[rows] == found
        counts += np.bincount((2 * bins + right).ravel(), minlength=2 * (BINS + 2)).reshape(counts.shape)
        # Weights are summed as float64: exact for the pixels of a few rows.
        units += np.bincount(bins.ravel(), weights=whole.ravel(), minlength=BINS + 2).astype(np.int64)
    return np.column_stack([counts.sum(1), counts[:, 1], units])[: BINS + 1]


def calibration(table: np.ndarray) -> dict[str, Any] | None:
    """Whether a model is right as often as it says, as in `metrics.json`.

    `ece` is the expected calibration error: the mean over pixels of |accuracy - confidence| of their bin; `mce` is the
    largest of a bin that holds pixels (Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equations 3
    and 5). 0 is best; a model of ECE 0.05 is right 5 points less, or more, often than its scores say.

    Args:
        table: as `reliability` gives it.

    Returns:
        None if no pixel was counted, or the scores of any are no probabilities.
    """
    counts = [[int(value) for value in row] for row in table]
    total = sum(pixels for pixels, _, _ in counts[:BINS])
    if not total or counts[BINS][0]:
        return None
    bins, gaps = [], []
    for index, (pixels, right, units) in enumerate(counts[:BINS]):
        accuracy = right / pixels if pixels else None
        confidence = units / (pixels * UNIT) if pixels else None
        bins.append(
            {"from": index / BINS, "to": (index + 1) / BINS, "pixels": pixels, "accuracy": accuracy,
             "confidence": confidence}
        )  # fmt: skip
        gaps.append(abs(right * UNIT - units))
    return {
        "ece": sum(gaps) / (total * UNIT),
        "mce": max(gap / (one["pixels"] * UNIT) for gap, one in zip(gaps, bins, strict=True) if one["pixels"]),
        "bins": bins,
    }


# --- all of it ----------------------------------------------------------------------------------------------------

Counted = dict[tuple[str, str, str | None], np.ndarray]
"""Confusion matrices by (scene_id, spatial block, region); region is None where none were asked for."""


def assess(
    counted: Counted, reliability: np.ndarray, classes: Sequence[Named], *, around_shapes: bool = False
) -> dict[str, Any]:
    """All of `metrics.json` that follows from what was counted.

    Args:
        counted: in any order.
        reliability: see `reliability`.
        around_shapes: spatial blocks are groups of shapes.

    Returns:
        What `summarize` gives, and `intervals`; both by scene_id under `scenes` and, where there are any, by name
        under `regions`; `calibration`; `notes`: why something is None, or not to be trusted; of groups of shapes
        `shapes`, see `recall_of_groups`.
    """
    block = "group of shapes" if around_shapes else "spatial block"
    blocks = "groups of shapes" if around_shapes else "spatial blocks"
    found = _measured(counted, classes) | {"calibration": calibration(reliability)}
    for name, part in (("scenes", 0), ("regions", 2)):
        groups: dict[str, Counted] = {}
        for key, table in counted.items():
            if key[part] is not None and (name == "scenes" or table.any()):
                groups.setdefault(str(key[part]), {})[key] = table
        if groups or name == "scenes":
            found[name] = {group: _measured(groups[group], classes) for group in sorted(groups)}
    notes = []
    if found["pixels"] and found["intervals"] is None:
        notes.append(f"no intervals: all counted pixels lie in one {block}, and it takes two at least")
    elif sure := found["intervals"]:
        alone = [one.name for one in classes if found["classes"][one.name] and not sure["classes"][one.name]]
        if alone:
            but = " but of recall" if around_shapes else ""
            notes.append(f"no intervals of {', '.join(alone)}{but}: all pixels of it lie in one {block}")
        if sure["blocks"] < FEW_BLOCKS:
            notes.append(
                f"intervals follow from {sure['blocks']} {blocks}: so few tell little of other ground; take them "
                f"for too narrow"
            )
    if reliability[BINS, 0]:
        notes.append(
            f"no calibration: the scores of {reliability[BINS, 0]} of {found['pixels']} pixels are no probabilities "
            f"(from 0 to 1, and 1 in sum)"
        )
    if around_shapes:
        found["shapes"] = recall_of_groups(_tables(counted, len(classes)), classes)
    return found | {"notes": notes}


def _tables(counted: Counted, classes: int) -> np.ndarray:
    return np.array(list(by_block(counted).values()), np.int64).reshape(-1, classes, classes)


def _measured(counted: Counted, classes: Sequence[Named]) -> dict[str, Any]:
    tables = _tables(counted, len(classes))
    return summarize(tables.sum(0), classes) | {"intervals": intervals(tables, classes)}


def by_block(counted: Counted) -> dict[str, np.ndarray]:
    """Confusion matrices by spatial block, sorted."""
    found: dict[str, np.ndarray] = {}
    for (_, block, _), table in counted.items():
        found[block] = found[block] + table if block in found else table
    return dict(sorted(found.items()))


def headline(found: Mapping[str, Any]) -> str:
    """What metrics say, in a line: of two classes the second one's IoU, mIoU, and how far scores can be believed."""
    sure = found["intervals"] or {"classes": {}}
    names = list(found["classes"])
    said = []
    if len(names) == 2 and found["classes"][names[1]]:
        iou, between = found["classes"][names[1]]["iou"], (sure["classes"].get(names[1]) or {}).get("iou")
        said.append(f"{names[1]} IoU {_with_interval(iou, between)}")
    if found["miou"] is not None:
        said.append(f"mIoU {_with_interval(found['miou'], sure.get('miou'))}")
    if found["calibration"]:
        said.append(f"ECE {found['calibration']['ece']:.3f}")
    return ", ".join(said) or "no pixel was counted"


def _with_interval(value: float, between: Sequence[float] | None) -> str:
    return f"{value:.3f} [{between[0]:.3f}, {between[1]:.3f}]" if between else f"{value:.3f}"
