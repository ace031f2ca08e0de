"""Reading tiles for training against petastorm's own way to TensorFlow, and the share of a step spent waiting.

Petastorm: `make_petastorm_dataset(make_reader(...)).batch(16)`, with as many threads as there are cores, decoding with
its codecs. sattile: `Batches`, which besides maps class ids, marks what is invalid, fills it, and makes float32 of it;
once from the files (`files`), once from what the first epoch unpacked (`again`), and with augmentation (`varied`).
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks import imagery

SIZE, BATCH = 256, 16


def by_petastorm(dataset: str) -> int:
    """Read an epoch; the number of tiles."""
    import warnings

    warnings.simplefilter("ignore")
    from petastorm.tf_utils import make_petastorm_dataset

    from sattile.dataset import petastorm_reader

    tiles = 0
    cores = len(os.sched_getaffinity(0))
    with petastorm_reader(dataset, "train", num_epochs=1, workers_count=cores) as reader:
        for batch in make_petastorm_dataset(reader).batch(BATCH):
            tiles += int(batch.image.shape[0])
    return tiles


def by_sattile(split: Any, augmentation: Any = None) -> int:
    """The same."""
    import tensorflow as tf

    from sattile.training.batches import Batches

    tiles = 0
    for images, labels in Batches(split, batch_size=BATCH, epoch=1, augmentation=augmentation):
        tf.constant(images), tf.constant(labels)
        tiles += len(images)
    return tiles


def main(folder: Path, megapixels: int = 64, repeats: int = 3) -> dict[str, Any]:
    """Print and return the ratios."""
    from sattile.engine import session
    from sattile.tiles import tile
    from sattile.training import train
    from sattile.training.augmentation import Augmentation
    from sattile.training.reader import Split, load_dataset

    edge = -(-int((megapixels * 1e6) ** 0.5) // 1024) * 1024
    scene, labels = imagery.write(folder, edge)
    spark = session("local[2]")
    try:
        dataset = tile(
            spark, scenes=[str(scene)], labels=str(labels), out=str(folder / "tiles"), size=SIZE, fractions="1,0,0",
            buffer=0, overwrite=True,
        )  # fmt: skip
        model = train(spark, dataset=dataset, out=str(folder / "model"), epochs=2, overwrite=True, augment=True)
    finally:
        spark.stop()
    history = json.loads((Path(model) / "history.json").read_text())
    described = load_dataset(dataset)
    by_petastorm(dataset)  # its imports, and TensorFlow's start
    seconds: dict[str, list[float]] = {name: [] for name in ("petastorm", "files", "again", "varied")}
    for _ in range(repeats):
        start = time.perf_counter()
        tiles = by_petastorm(dataset)
        seconds["petastorm"].append((time.perf_counter() - start) / tiles)
        split = Split(described, "train", memory_bytes=4 << 30)
        for name, augmentation in (("files", None), ("again", None), ("varied", Augmentation())):
            start = time.perf_counter()
            tiles = by_sattile(split, augmentation)
            seconds[name].append((time.perf_counter() - start) / tiles)
    speed = {name: SIZE**2 / 1e6 / statistics.median(values) for name, values in seconds.items()}
    ratio = {name: speed[name] / speed["petastorm"] for name in ("files", "again", "varied")}
    print(f"reading {described.tiles('train')} tiles of {SIZE} px, {len(described.bands)} bands, medians of {repeats}:")
    for name, value in speed.items():
        print(f"  {name:10s} {value:7.1f} Mpix/s" + (f"  {ratio[name]:.1f} x petastorm" if name in ratio else ""))
    waiting = history[-1]["waiting"]
    print(f"  training unet-small waits for tiles {waiting:.2%} of its time")
    return {"speed": speed, "ratio": ratio, "waiting": waiting}
