"""Quality on real, labelled imagery: the default U-Net against a per-pixel classifier trained on the same tiles.

Needs the water mosaics (`water_train_*.tif`, `water_val_*.tif`: Landsat/Sentinel-2 chips of 128 px side by side). The
classifier is scikit-learn's gradient boosting on the seven bands of each pixel (an MLP comes as far if trained long
enough, and to half of that if not). Both are measured on the same pixels of `water_val`.
"""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

BANDS = "coastal,blue,green,red,nir,swir1,swir2"


def pixels(dataset: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labelled pixels of a split, (n, bands) float32 and (n,) uint8."""
    values, labels = [], []
    for name in json.loads((dataset / "dataset.json").read_text())["splits"][split]["files"]:
        for row in pq.read_table(dataset / split / name, columns=["image", "labels"]).to_pylist():
            marks = np.load(io.BytesIO(row["labels"]))
            values.append(np.load(io.BytesIO(row["image"]))[marks != 255])
            labels.append(marks[marks != 255])
    return np.concatenate(values).astype(np.float32), np.concatenate(labels)


def iou(truth: np.ndarray, found: np.ndarray) -> float:
    return float(((truth == 1) & (found == 1)).sum() / ((truth == 1) | (found == 1)).sum())


def main(folder: Path, data: Path, epochs: int | None = None, seed: int = 0) -> dict[str, Any]:
    """Train both, print and return IoU of water on `water_val`."""
    from sklearn.ensemble import HistGradientBoostingClassifier

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
    try:
        dataset = tile(spark, pairs=str(pairs), out=str(folder / "tiles"), size=128, bands=BANDS, classes="land,water")
        start = time.monotonic()
        options = {} if epochs is None else {"epochs": epochs}
        model = train(spark, dataset=dataset, out=str(folder / f"model_{seed}"), seed=seed, **options)
        seconds = time.monotonic() - start
        url = evaluate(spark, model=model, dataset=dataset, split="val", out=str(folder / f"evaluation_{seed}"))
    finally:
        spark.stop()
    network = json.loads(Path(url).read_text())["classes"]["water"]["iou"]
    values, labels = pixels(Path(dataset), "train")
    some = np.random.default_rng(seed).choice(len(values), 300_000, replace=False)
    classifier = HistGradientBoostingClassifier(max_iter=200, random_state=seed)
    classifier.fit(values[some], labels[some])
    held, truth = pixels(Path(dataset), "val")
    baseline = iou(truth, classifier.predict(held))
    print(
        f"water, IoU on water_val: U-Net {network:.3f} ({seconds:.0f} s of training), per-pixel boosting {baseline:.3f}"
    )
    return {"network": network, "baseline": baseline, "seconds": seconds}
