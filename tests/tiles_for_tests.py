"""Small tiles datasets, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sattile import schema
from sattile.dataset import decode, npy, petastorm_metadata
from sattile.schema import IGNORE

BANDS = ("green", "nir", "swir")
SIZE = 16


def make_tile(number: int, split: str, *, unlabelled: bool = False) -> dict[str, Any]:
    """A tile of water (id 7, dark) left of a slanted shore and land (id 2); its first row is invalid."""
    rng = np.random.default_rng([number, len(split)])
    row, col = np.mgrid[:SIZE, :SIZE]
    water = col + row * rng.uniform(-0.5, 0.5) < rng.uniform(4, SIZE - 4)
    image = np.where(water[..., None], [600, 200, 100], [900, 2500, 2000]) + rng.normal(0, 250, (SIZE, SIZE, 3))
    valid = row > 0
    labels = np.where(valid & (not unlabelled), np.where(water, 7, 2), IGNORE).astype(np.uint8)
    scene = f"{split}{number % 3}"
    return {
        "tile_id": f"{scene}/0/{number * SIZE}",
        "scene_id": scene,
        "row": 0,
        "col": number * SIZE,
        "spatial_block": "0/0",
        "image": npy(np.where(valid[..., None], image, -32768).astype(np.int16)),
        "labels": npy(labels),
        "valid": npy(valid),
    }


def write_splits(folder: Path, **counts: int) -> str:
    """A dataset of so many tiles in each split."""
    splits = {split: [make_tile(number, split) for number in range(count)] for split, count in counts.items()}
    return write_dataset(folder, splits)


def write_dataset(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    """A tiles dataset, two files a split."""
    described: dict[str, Any] = {}
    for name, tiles in splits.items():
        (folder / name).mkdir(parents=True)
        files, half = [], -(-len(tiles) // 2)
        for part in (tiles[:half], tiles[half:]):
            if part:
                files.append(f"part-{len(files)}.parquet")
                table = pa.Table.from_pylist(part, schema=schema.TILE)
                pq.write_table(table, folder / name / files[-1], row_group_size=5)
        labels = np.stack([decode(tile["labels"]) for tile in tiles])
        described[name] = {
            "tiles": len(tiles),
            "files": files,
            "class_pixels": {str(one): int((labels == one).sum()) for one in (2, 7)},
        }
    statistics = {band: {"mean": 100.0 * i + 700, "std": 500.0} for i, band in enumerate(BANDS)}
    description = {
        "format": "sattile-tiles/1", "bands": list(BANDS), "dtype": "int16", "values": "raw", "size": SIZE,
        "classes": [{"id": 2, "name": "land", "color": "#ddcc77"}, {"id": 7, "name": "water", "color": "#332288"}],
        "ignore": IGNORE, "gsd": 10.0, "splits": described, "statistics": statistics, "digest": "d1",
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    for name, part in described.items():
        groups = {file: pq.ParquetFile(folder / name / file).num_row_groups for file in part["files"]}
        (folder / name / "_common_metadata").write_bytes(petastorm_metadata(description, groups))
    return str(folder)
