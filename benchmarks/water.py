"""Quality on real, labelled imagery: what a network adds to looking at each pixel by itself.

Needs the water mosaics (`water_train_*.tif`, `water_val_*.tif`: Landsat/Sentinel-2 chips of 128 px side by side). The
default network and the per-pixel baseline (`--arch pixel-mlp`) are trained on `water_train` with the defaults of
`sattile train`, from several seeds, and measured on `water_val`; the seeds are then averaged, with and without
test-time augmentation. scikit-learn's gradient boosting on the same pixels is a second opinion on the baseline. Then
the chips are changed as they might come from another provider, and the same networks measured again.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

BANDS = "coastal,blue,green,red,nir,swir1,swir2"
ARCHITECTURES = ("unet-small", "pixel-mlp")


def tiles(dataset: Path, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Image (height, width, bands) and labels (height, width) uint8 of each tile."""
    for name in json.loads((dataset / "dataset.json").read_text())["splits"][split]["files"]:
        for row in pq.read_table(dataset / split / name, columns=["image", "labels"]).to_pylist():
            yield np.load(io.BytesIO(row["image"])), np.load(io.BytesIO(row["labels"]))


def pixels(dataset: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labelled pixels of a split, (n, bands) float32 and (n,) uint8."""
    values, labels = [], []
    for image, marks in tiles(dataset, split):
        values.append(image[marks != 255])
        labels.append(marks[marks != 255])
    return np.concatenate(values).astype(np.float32), np.concatenate(labels)


def by_boosting(dataset: Path, seed: int = 0) -> float:
    """IoU of a per-pixel classifier."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    values, labels = pixels(dataset, "train")
    some = np.random.default_rng(seed).choice(len(values), 300_000, replace=False)
    classifier = HistGradientBoostingClassifier(max_iter=200, random_state=seed).fit(values[some], labels[some])
    held, truth = pixels(dataset, "val")
    found = classifier.predict(held)
    return float(((truth == 1) & (found == 1)).sum() / ((truth == 1) | (found == 1)).sum())


SKY = np.array([900, 650, 350, 180, 60, 10, 5], np.float32)
"""What air adds to the bands at the top of the atmosphere, about (reflectance x 10,000)."""

THROUGH = np.array([0.85, 0.88, 0.92, 0.95, 0.97, 0.98, 0.98], np.float32)
"""What it lets through."""


def thrice(chips: np.ndarray) -> np.ndarray:
    """(n, height, width, bands) at a third of the pixel size, smoothed."""
    fine = chips.repeat(3, 1).repeat(3, 2)
    for axis in (1, 2):
        ahead, behind = np.roll(fine, 1, axis), np.roll(fine, -1, axis)
        fine = (fine + ahead + behind) / 3
    return fine.astype(np.float32)


PROVIDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda chips: chips,
    "hazy": lambda chips: chips + SKY / 2,
    "from the top of the atmosphere": lambda chips: chips * THROUGH + SKY,
    "1000 added": lambda chips: chips + 1000,
    "pixels of 10 m": thrice,
}


def elsewhere(model: str, dataset: Path) -> dict[str, float]:
    """IoU of water of one model on chips as other providers might give them."""
    from sattile.model import load_bundle, load_scorer

    score = load_scorer(load_bundle(model), engine="tensorflow", threads=2)
    chips = [(image.astype(np.float32), marks) for image, marks in tiles(dataset, "val")]
    found = {}
    for name, change in PROVIDERS.items():
        both = either = 0
        for chip, marks in chips:
            scores = score(change(chip[None]))[0]
            step = len(scores) // len(marks)
            water = scores[step // 2 :: step, step // 2 :: step, 1] > 0.5
            known = marks != 255
            both += (water & (marks == 1) & known).sum()
            either += ((water | (marks == 1)) & known).sum()
        found[name] = float(both / either)
    return found


def main(
    folder: Path,
    data: Path,
    seeds: int = 3,
    architectures: Sequence[str] = ARCHITECTURES,
    **options: Any,
) -> dict[str, Any]:
    """Train, measure, print and return IoU of water on `water_val`; models that are there are not trained again.

    Args:
        options: of `train`, beside the defaults.
    """
    from sattile.engine import session
    from sattile.evaluation import evaluate
    from sattile.tiles import tile
    from sattile.training import train

    folder.mkdir(parents=True, exist_ok=True)
    data = data.resolve()
    pairs = folder / "pairs.csv"
    lines = [f"{data}/water_{one}_img.tif,{data}/water_{one}_water.tif,{one}" for one in ("train", "val")]
    pairs.write_text("scene,labels,split\n" + "\n".join(lines) + "\n")
    spark = session("local[2]")
    result: dict[str, Any] = {}
    try:
        dataset = tile(spark, pairs=str(pairs), out=str(folder / "tiles"), size=128, bands=BANDS, classes="land,water")

        def measure(name: str, model: str, **how: Any) -> float:
            out = folder / f"evaluation-{name}"
            url = evaluate(spark, model=model, dataset=dataset, split="val", out=str(out), overwrite=True, **how)
            found = json.loads(Path(url).read_text())
            water = found["classes"]["water"]
            low, high = (found["intervals"] or {"classes": {"water": {"iou": (0, 0)}}})["classes"]["water"]["iou"]
            print(
                f"  {name:32s} IoU {water['iou']:.3f} [{low:.3f}, {high:.3f}]  precision {water['precision']:.3f}  "
                f"recall {water['recall']:.3f}  ECE {found['calibration']['ece']:.3f}",
                flush=True,
            )
            return float(water["iou"])

        print("water on water_val, with 95 % intervals by spatial block:")
        for arch in architectures:
            models, start = [], time.monotonic()
            for seed in range(seeds):
                out = str(folder / f"model-{arch}-{seed}")
                models.append(train(spark, dataset=dataset, out=out, arch=arch, seed=seed, overwrite=True, **options))
            seconds = (time.monotonic() - start) / seeds
            found = [measure(f"{arch}, seed {seed}", model) for seed, model in enumerate(models)]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            print(f"  {arch}: mean {statistics.mean(found):.3f}, spread {spread:.3f}; {seconds:.0f} s a training")
            result[arch] = found
            if seeds > 1:
                result[f"{arch} averaged"] = measure(f"{arch}, {seeds} seeds averaged", ",".join(models))
            others = [elsewhere(model, Path(dataset)) for model in models]
            for name in PROVIDERS:
                values = [one[name] for one in others]
                print(
                    f"  {arch}, {name:30s} mean {statistics.mean(values):.3f}  {' '.join(f'{v:.3f}' for v in values)}"
                )
            if arch != "pixel-mlp":
                result[f"{arch} turns"] = measure(f"{arch}, the same with --tta turns", ",".join(models), tta="turns")
    finally:
        spark.stop()
    result["boosting"] = by_boosting(Path(dataset))
    print(f"  per-pixel gradient boosting       IoU {result['boosting']:.3f}")
    return result
