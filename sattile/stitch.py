"""Adding up windows into a normalised map: weights, sums, coverage, labels. numpy only.

Weights are integers >= 1 and sums are float64, so the products and sums of float32 scores are exact: a constant
stays exactly that constant wherever windows overlap (float32 Hann windows leave a third of the pixels off by a bit).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from sattile.grid import Window

NODATA = 255
"""Value of a labels map where there is no data."""

PEAK = 256
"""Weight of a window's middle along one axis. Two axes make 2**16, which leaves float64 room for exact sums of
float32 scores over thousands of overlapping windows."""


def taper(length: int) -> np.ndarray:
    """Integer weights of a window along one axis, shape (length,), int64, from 1 at the edges to `PEAK`.

    A raised cosine (Hann), rounded, and at least 1, so that a pixel under one window's edge alone is still covered.
    """
    phase = (np.arange(length) + 0.5) / length
    return np.maximum(np.rint(PEAK * np.sin(np.pi * phase) ** 2), 1).astype(np.int64)


@lru_cache(maxsize=8)  # of each block the same; to be read only
def blend_weights(height: int, width: int) -> np.ndarray:
    """Integer weights of a window of this shape, (height, width), int64."""
    return np.outer(taper(height), taper(width))


class Stitcher:
    """Sums of weighted scores over one block of the output, and what they were divided by.

    Feed it windows in a fixed order (float addition is not associative): sorted by window, then scene id.

    Args:
        block: the rectangle it fills.
        classes: number of scores a pixel has.
    """

    def __init__(self, block: Window, classes: int):
        self.block = block
        self.sums = np.zeros((*block.shape, classes), np.float64)
        self.coverage = np.zeros(block.shape, np.int64)

    def add(self, keep: Window, scores: np.ndarray, valid: np.ndarray, weight: np.ndarray | None = None) -> None:
        """Add one window's share.

        Args:
            keep: where it lies, inside the block.
            scores: (height, width, classes), float32.
            valid: (height, width) bool; other pixels are not touched.
            weight: (height, width) integers >= 1; None is 1 everywhere.
        """
        part = keep.slices(self.block)
        share = valid.astype(np.int64) if weight is None else np.where(valid, weight, 0)
        # A NaN score under an invalid pixel must not leak into the sums: 0 * nan is nan.
        self.sums[part] += np.where(valid[..., None], scores, 0) * share[..., None].astype(np.float64)
        self.coverage[part] += share

    def scores(self, rows: slice = slice(None)) -> np.ndarray:
        """The normalised map of these rows of the block, (height, width, classes), float32; NaN where coverage is 0."""
        with np.errstate(invalid="ignore"):
            return (self.sums[rows] / self.coverage[rows, :, None]).astype(np.float32)


def to_labels(
    scores: np.ndarray, valid: np.ndarray, class_ids: np.ndarray, threshold: float | None = None
) -> np.ndarray:
    """Class ids from scores.

    Args:
        scores: (height, width, classes), float.
        valid: (height, width) bool.
        class_ids: (classes,) uint8, the id of each channel.
        threshold: with two classes, the second wins where its score is at least this (instead of being the larger
            one); with more, a pixel whose best score is below it stays undecided and becomes nodata.

    Returns:
        (height, width) uint8; `NODATA` where not valid or where the network gave NaN. Ties go to the first class.
    """
    if scores.shape[-1] == 2:
        # Four times as fast as argmax over an axis of two, and most networks have two classes.
        first, second = scores[..., 0], scores[..., 1]
        best = (second > first if threshold is None else second >= threshold).view(np.uint8)
        decided = valid
        if scores.size and np.isnan(scores.max()):
            decided = valid & ~(np.isnan(first) | np.isnan(second))
        labels = best * (class_ids[1:] - class_ids[:1]) + class_ids[:1]  # modulo 256; `take` takes ten times as long
    else:
        best = scores.argmax(axis=-1)
        top = np.take_along_axis(scores, best[..., None], axis=-1)[..., 0]
        # argmax takes a NaN for the largest.
        decided = valid & (~np.isnan(top) if threshold is None else top >= threshold)
        labels = class_ids.take(best)
    if not decided.all():
        np.copyto(labels, NODATA, where=~decided)
    return labels
