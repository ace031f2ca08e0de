"""How good labels are: confusion matrices, which add, and what follows from them. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

IGNORE = 255
"""Pixels that are not counted: `schema.IGNORE` in labels, `stitch.NODATA` in maps."""


class Named(Protocol):
    """Anything with a name, such as `schema.SegmentClass`."""

    @property
    def name(self) -> str: ...


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
    position = np.full(256, -1, np.int64)
    position[list(class_ids)] = np.arange(len(class_ids))
    counted = (truth != ignore) & (predicted != ignore)
    classes = len(class_ids)
    pairs = np.bincount(truth[counted].astype(np.int64) * 256 + predicted[counted], minlength=256 * 256)
    table = pairs.reshape(256, 256)
    strangers = sorted(int(value) for value in np.flatnonzero(table.sum(0) + table.sum(1)) if position[value] < 0)
    if strangers:
        raise ValueError(f"values {strangers} are none of the classes {list(class_ids)}")
    return table[np.ix_(list(class_ids), list(class_ids))].reshape(classes, classes)


def summarize(confusion: np.ndarray, classes: Sequence[Named]) -> dict[str, Any]:
    """Metrics of a confusion matrix, as in `metrics.json`.

    A class that is absent from truth and prediction is None and left out of the mean. Precision of a class that is
    never predicted, and recall of one that never occurs, are undefined: None too.

    Args:
        confusion: (classes, classes) counts, [truth row, predicted column].
        classes: in the order of rows and columns.
    """
    counts = np.asarray(confusion, np.int64)
    hits, true, found = np.diag(counts), counts.sum(1), counts.sum(0)
    total = int(counts.sum())
    by_class: dict[str, Any] = {}
    for index, one in enumerate(classes):
        hit, present, claimed = int(hits[index]), int(true[index]), int(found[index])
        if present + claimed == 0:
            by_class[one.name] = None
            continue
        by_class[one.name] = {
            "iou": hit / (present + claimed - hit),
            "precision": hit / claimed if claimed else None,
            "recall": hit / present if present else None,
            "f1": 2 * hit / (present + claimed),
            "pixels": present,
        }
    ious = [entry["iou"] for entry in by_class.values() if entry]
    return {
        "classes": by_class,
        "miou": sum(ious) / len(ious) if ious else None,
        "accuracy": int(hits.sum()) / total if total else None,
        "confusion": counts.tolist(),
        "pixels": total,
    }
