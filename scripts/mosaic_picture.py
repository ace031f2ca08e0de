"""Lay overlapping scenes onto one grid and draw it: the scenes, their labels as one map, how many overlap.

The network is no trained one: it tells the colours that k-means finds in the scenes apart, in the mean of 5 x 5 pixels.
What the picture shows is the stitching.

.venv/bin/python scripts/mosaic_picture.py EPSG:32618@300 docs/images/mosaic.png scenes/*.tif
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from matplotlib.figure import Figure
from rasterio.warp import Resampling, reproject

INK = "#1b1f1d"
COLORS = ("#332288", "#117733", "#ddcc77", "#cc6677", "#eeeeee", "#88ccee")


def bundle_of(scenes: list[str], folder: Path, classes: int) -> tuple[str, list[str], list[float]]:
    """A bundle that tells the scenes' colours apart, from dark to bright, its class names, and the bands' means."""
    import keras
    from sklearn.cluster import KMeans

    from sattile.model import bundle

    samples = []
    for scene in scenes:
        with rasterio.open(scene) as file:
            data = file.read()
            valid = (data != 0).all(axis=0)
            pixels = data[:, valid].T.astype(np.float32)
        samples.append(pixels[np.random.default_rng(0).integers(0, len(pixels), 4000)])
    pixels = np.concatenate(samples)
    scale = float(pixels.std())
    centres = KMeans(classes, n_init=4, random_state=0).fit(pixels / scale).cluster_centers_
    centres = centres[centres.sum(axis=1).argsort()]
    bands = centres.shape[1]
    inputs = keras.Input((None, None, bands))
    x = keras.layers.Rescaling(1 / scale)(inputs)
    mean = keras.layers.DepthwiseConv2D(5, padding="same", use_bias=False)
    # The nearest centre has the largest 2 c x - c c.
    nearest = keras.layers.Conv2D(classes, 1, activation="softmax")
    network = keras.Model(inputs, nearest(mean(x)))
    mean.set_weights([np.full((5, 5, bands, 1), 1 / 25)])
    nearest.set_weights([4 * 2 * centres.T[None, None], -4 * (centres**2).sum(axis=1)])
    network.save(folder / "colours.keras")
    names = [f"colour {number}" for number in range(1, classes + 1)]
    described = ",".join(f"{name}={number}={COLORS[number]}" for number, name in enumerate(names))
    file_bands = ",".join(f"b{number}" for number in range(1, bands + 1))
    out = folder / "model"
    bundle(keras=str(folder / "colours.keras"), bands=file_bands, classes=described, out=str(out))
    return str(out), names, pixels.mean(axis=0).tolist()


def draw(scenes: list[str], out: Path, picture: Path, names: list[str]) -> None:
    with rasterio.open(out / "labels.vrt") as file:
        labels, grid = file.read(1), file.profile
    with rasterio.open(out / "scenes.vrt") as file:
        count = file.read(1)
    shape = labels.shape
    images, outlines = np.ones((*shape, 3), np.float32), []
    for scene in scenes:
        with rasterio.open(scene) as file:
            data = file.read().astype(np.float32)
            valid = (data != 0).all(axis=0).astype(np.float32)
            bands = [data[index] for index in ((2, 1, 0) if len(data) > 2 else (0, 0, 0))]
            low, high = np.percentile(data[:, valid > 0], (2, 98))
            place = {
                "src_transform": file.transform, "src_crs": file.crs, "dst_transform": grid["transform"],
                "dst_crs": grid["crs"],
            }  # fmt: skip
        on_grid = np.zeros(shape, np.float32)
        reproject(valid, on_grid, resampling=Resampling.nearest, **place)
        outlines.append(on_grid)
        for channel, band in enumerate(bands):
            moved = np.zeros(shape, np.float32)
            reproject(band, moved, resampling=Resampling.bilinear, **place)
            images[..., channel] = np.where(
                on_grid > 0, np.clip((moved - low) / (high - low), 0, 1), images[..., channel]
            )
    colored = np.ones((*shape, 3), np.float32)
    for number in range(len(names)):
        colored[labels == number] = [int(COLORS[number][at : at + 2], 16) / 255 for at in (1, 3, 5)]
    height = 4.9 * shape[0] / shape[1] + 0.6
    figure = Figure(figsize=(15, height), layout="constrained", facecolor="white")
    titles = f"{len(scenes)} scenes", "one map of labels", "scenes that a pixel comes from"
    axes = figure.subplots(1, 3)
    axes[0].imshow(images, interpolation="nearest")
    for outline in outlines:
        axes[0].contour(outline, [0.5], colors="#c8321f", linewidths=1)
    axes[1].imshow(colored, interpolation="nearest")
    shown = axes[2].imshow(np.ma.masked_equal(count, 0), cmap="viridis", interpolation="nearest")
    figure.colorbar(shown, ax=axes[2], ticks=range(1, int(count.max()) + 1), shrink=0.6)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=12, color=INK)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_frame_on(False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=72, metadata={"Software": None})


def main() -> None:
    from sattile.engine import session
    from sattile.prediction import predict

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grid", help="EPSG:N@RES")
    parser.add_argument("picture", type=Path)
    parser.add_argument("scenes", nargs="+")
    parser.add_argument("--classes", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sattile-mosaic-") as temporary:
        folder = Path(temporary)
        model, names, means = bundle_of(given.scenes, folder, given.classes)
        spark = session("local[2]")
        try:
            predict(
                spark, model=model, scenes=given.scenes, out=str(folder / "out"), grid=given.grid, coverage=True,
                max_gsd_ratio=100, nodata=0, fill=means,
            )  # fmt: skip
        finally:
            spark.stop()
        draw(given.scenes, folder / "out", given.picture, names)


if __name__ == "__main__":
    main()
