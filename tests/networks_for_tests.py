"""Networks of numpy, exact on whole numbers, and the bundles that go with them."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from sattile.grid import ceil_to
from sattile.inference import Inference
from sattile.model import Bundle
from sattile.schema import SegmentClass

CLASSES = (SegmentClass(0, "land", "#ddcc77"), SegmentClass(7, "water", "#332288"))


def bundle_of(**changes: Any) -> Bundle:
    made = Bundle(
        url="/m", bands=("x", "y"), classes=CLASSES, values="raw", fill=(3.0, 5.0), total_stride=1,
        receptive_radius=0, input_shape=None, activation_bytes=100.0, gsd=None, output="scores", digest="d",
    )  # fmt: skip
    return replace(made, **changes)


def box(images: np.ndarray, radius: int) -> np.ndarray:
    """Sum over a square of 2 radius + 1, zeros outside: what a convolution of ones with `same` padding gives."""
    padded = np.pad(images, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
    height, width = images.shape[1:3]
    reach = range(2 * radius + 1)
    return sum(padded[:, down : down + height, right : right + width] for down in reach for right in reach)  # type: ignore[return-value]


def pooling_network(images: np.ndarray) -> np.ndarray:
    """Convolution, 2x2 maximum, convolution, back to full size, plus the input: stride 2, radius 1 + 2 + 1.

    On whole numbers it is exact in float32, so that results are compared to the bit.
    """
    full = box(images, 1)
    count, height, width, bands = full.shape
    small = full.reshape(count, height // 2, 2, width // 2, 2, bands).max((2, 4))
    return box(small, 1).repeat(2, 1).repeat(2, 2) + images


def window_network(images: np.ndarray) -> np.ndarray:
    """Each pixel depends on its whole window: its receptive field has no bound."""
    return images + images.sum((1, 2), keepdims=True) % 7


def whole(job: Inference, scorer: Callable[..., Any], data: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Whole-image inference: the scene extended right and bottom to the stride's multiple, missing pixels filled."""
    height, width = valid.shape
    step = job.geometry.total_stride
    image = np.empty((ceil_to(height, step), ceil_to(width, step), 2), np.float32)
    image[:] = job.fill
    image[:height, :width][valid] = data[valid]
    return scorer(image[None])[0, :height, :width]


def weights(model: Path) -> list[np.ndarray]:
    """All weights of a `.keras` file, by name, without TensorFlow."""
    import h5py

    found: list[np.ndarray] = []
    with zipfile.ZipFile(model / "model.keras") as archive, archive.open("model.weights.h5") as file:
        content = h5py.File(file, "r")
        content.visititems(lambda _, node: found.append(node[()]) if isinstance(node, h5py.Dataset) else None)
    return found
