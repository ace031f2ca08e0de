"""Pictures of what a model was given, should have said, and said: an evaluation's samples, for the report."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sattile import cog, storage
from sattile.schema import IGNORE, SegmentClass

SAMPLES = 6
SAMPLE_EDGE = 512

RIGHT, WRONG = (222, 222, 222), (204, 51, 17)

RED_GREEN_BLUE = (("B04", "B03", "B02"), ("B4", "B3", "B2"), ("red", "green", "blue"), ("r", "g", "b"))


def draw(
    bands: Sequence[str], classes: Sequence[SegmentClass], image: np.ndarray, valid: np.ndarray, truth: np.ndarray,
    labels: np.ndarray,
) -> str:  # fmt: skip
    """The four pictures of a sample: JSON of base64.

    Args:
        image: (height, width, bands).
        valid: (height, width) bool; truth, labels: (height, width) uint8.
    """
    colors = {one.id: cog.rgb(one.color) for one in classes}
    errors = np.where((truth == IGNORE) | (labels == IGNORE), IGNORE, (truth != labels).astype(np.uint8))
    drawn = {
        "image": cog.encode_png(stretch(image, valid, bands)),
        "truth": cog.encode_png(truth, colors),
        "prediction": cog.encode_png(labels, colors),
        "errors": cog.encode_png(errors.astype(np.uint8), {0: RIGHT, 1: WRONG}),
    }
    return json.dumps({name: base64.b64encode(data).decode() for name, data in drawn.items()})


def stretch(image: np.ndarray, valid: np.ndarray, bands: Sequence[str]) -> np.ndarray:
    """A picture of an image: red, green and blue bands (else the first three, or one in grey), from their 2nd to
    their 98th percentile: (height, width, 3) uint8, black where not valid."""
    lower = [name.lower() for name in bands]
    named = next((one for one in RED_GREEN_BLUE if all(name.lower() in lower for name in one)), None)
    places = [lower.index(name.lower()) for name in named or ()] or ([0, 1, 2] if len(bands) >= 3 else [0, 0, 0])
    picture = np.zeros((*valid.shape, 3), np.uint8)
    if not valid.any():
        return picture
    for channel, place in enumerate(places):
        values = image[..., place].astype(np.float64)
        low, high = np.percentile(values[valid], (2, 98))
        scaled = np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 255
        picture[..., channel] = np.where(valid, np.nan_to_num(scaled), 0)
    return picture


def write(out: str, rows: Sequence[Any]) -> None:
    """`samples/N_*.png` and `samples/samples.json`, replacing earlier ones."""
    folder = storage.join(out, "samples")
    storage.remove(folder)
    listed = []
    for number, row in enumerate(sorted(rows, key=lambda row: (row.scene_id, row.row, row.col))):
        files = {}
        for name, text in json.loads(row.pictures).items():
            files[name] = f"{number}_{name}.png"
            storage.write_bytes(storage.join(folder, files[name]), base64.b64decode(text))
        place = {"row": row.row, "col": row.col, "height": row.height, "width": row.width}
        name = f"{row.scene_id} ({row.row}, {row.col})"
        listed.append({"name": name, "scene_id": row.scene_id, "window": place} | files)
    storage.write_json(storage.join(folder, "samples.json"), listed)
