"""Compose README's picture from what `make demo` left: image, labels, map and errors on one scene's test ground.

.venv/bin/python scripts/demo_picture.py demo docs/images/demo.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import rasterio
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rasterio.windows import Window

RIGHT, WRONG, NOTHING = "#e4e5e1", "#c8321f", "#ffffff"
IGNORE = 255
INK = "#1b1f1d"


def unseen_ground(demo: Path, *, tiles: int = 3) -> tuple[str, Window]:
    """The square of test tiles, ground that the network never saw, that shows most: all classes and few clouds."""
    description = json.loads((demo / "tiles" / "dataset.json").read_text())
    size = description["size"]
    held = {
        (row["scene_id"], row["row"], row["col"])
        for file in description["splits"]["test"]["files"]
        for row in pq.read_table(demo / "tiles" / "test" / file, columns=["scene_id", "row", "col"]).to_pylist()
    }
    best: tuple[float, str, Window] | None = None
    for scene_id, top, left in sorted(held):
        square = {(scene_id, top + size * i, left + size * j) for i in range(tiles) for j in range(tiles)}
        if not square <= held:
            continue
        window = Window(left, top, tiles * size, tiles * size)
        with rasterio.open(demo / "archive" / "labels" / f"{scene_id}.tif") as file:
            counts = np.bincount(file.read(1, window=window).ravel(), minlength=IGNORE + 1) / window.width**2
        least = min(counts[one["id"]] for one in description["classes"])
        score = min(least, 0.1) - 2 * counts[IGNORE]
        if best is None or score > best[0]:
            best = (score, scene_id, window)
    if best is None:
        raise SystemExit(f"{demo} has no {tiles} x {tiles} test tiles side by side")
    return best[1:]


def painted(labels: np.ndarray, colors: dict[int, str]) -> np.ndarray:
    """Labels (height, width) in their colours, (height, width, 3); what has none is white."""
    picture = np.ones((*labels.shape, 3))
    for number, color in colors.items():
        picture[labels == number] = to_rgb(color)
    return picture


def compose(demo: Path) -> Figure:
    """Four panels of one scene, and the legend below."""
    classes = json.loads((demo / "tiles" / "dataset.json").read_text())["classes"]
    colors = {one["id"]: one["color"] for one in classes}
    scene_id, window = unseen_ground(demo)
    with rasterio.open(demo / "archive" / "scenes" / f"{scene_id}.tif") as file:
        bands = [file.descriptions.index(name) + 1 for name in ("B04", "B03", "B02")]
        image = np.moveaxis(file.read(bands, window=window), 0, -1).astype(float)
    with rasterio.open(demo / "archive" / "labels" / f"{scene_id}.tif") as file:
        labels = file.read(1, window=window)
    with rasterio.open(demo / "mosaics" / scene_id / "labels.tif") as file:
        stitched = file.read(1, window=window)
    valid = (labels != IGNORE) & (stitched != IGNORE)
    errors = np.where(valid, np.where(labels == stitched, 0, 1), 2)

    panels = {
        "image": np.clip(image / 2600, 0, 1) ** 0.75,
        "labels": painted(labels, colors),
        "map": painted(stitched, colors),
        "errors": painted(errors, {0: RIGHT, 1: WRONG, 2: NOTHING}),
    }
    width = 12.5
    figure = Figure(figsize=(width, (width - 0.5) / 4 * window.height / window.width + 0.8), facecolor="white")
    axes = figure.subplots(1, 4)
    for ax, (title, panel) in zip(axes, panels.items(), strict=True):
        ax.imshow(panel, interpolation="nearest")
        ax.set_title(title, fontsize=15, color=INK, loc="left", pad=6)
        ax.set_xticks([])
        ax.set_yticks([])
        for spine in ax.spines.values():
            spine.set_color("#c9cdc9")
    handles = [Patch(facecolor=one["color"], label=one["name"]) for one in classes]
    handles.append(Patch(facecolor=WRONG, label="map differs from labels"))
    handles.append(Patch(facecolor=NOTHING, edgecolor="#c9cdc9", label="no label or no data"))
    inches = figure.get_figheight()
    figure.subplots_adjust(left=0.005, right=0.995, top=1 - 0.36 / inches, bottom=0.42 / inches, wspace=0.03)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=12, labelcolor=INK,
                  handlelength=1.0, columnspacing=1.4)  # fmt: skip
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", type=Path, help="what `sattile demo --out` made")
    parser.add_argument("out", type=Path, help="the PNG to write")
    arguments = parser.parse_args()
    figure = compose(arguments.demo)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    figure.savefig(arguments.out, dpi=128, metadata={"Software": None}, pil_kwargs={"optimize": True})
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
