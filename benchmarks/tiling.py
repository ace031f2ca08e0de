"""Tiling against a plain two-process loop that writes the same rows.

The loop: each process reads its share of the tiles row by row with rasterio, encodes them with `np.save`, and writes
zstd Parquet with pyarrow. sattile does the same in Spark tasks, and besides deals tiles to splits, counts classes,
gathers exact statistics and digests, and decodes in child processes.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import imagery
from benchmarks.predicting import paired_ratio

SIZE = 256


def plain(scene: str, labels: str, out: str, rows: list[int]) -> int:
    """One process's share of the plain loop."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import rasterio
    from rasterio.windows import Window

    from sattile.schema import TILE

    def encoded(array: np.ndarray) -> bytes:
        file = io.BytesIO()
        np.save(file, array)
        return file.getvalue()

    table: list[dict[str, Any]] = []
    count = 0
    with rasterio.open(scene) as image, rasterio.open(labels) as truth, pq.ParquetWriter(
        f"{out}/part-{rows[0]}.parquet", TILE, compression="zstd", compression_level=1
    ) as writer:  # fmt: skip
        for row in rows:
            strip = np.moveaxis(image.read(window=Window(0, row, image.width, SIZE)), 0, -1)
            marks = truth.read(1, window=Window(0, row, image.width, SIZE))
            for col in range(0, image.width, SIZE):
                data, label = strip[:, col : col + SIZE], marks[:, col : col + SIZE]
                table.append(
                    {
                        "tile_id": f"s/{row}/{col}", "scene_id": "s", "row": row, "col": col, "spatial_block": "",
                        "image": encoded(np.ascontiguousarray(data)), "labels": encoded(np.ascontiguousarray(label)),
                        "valid": encoded((data != 0).all(-1)),
                    }
                )  # fmt: skip
                count += 1
                if len(table) == 32:
                    writer.write_table(pa.Table.from_pylist(table, schema=TILE))
                    table = []
        if table:
            writer.write_table(pa.Table.from_pylist(table, schema=TILE))
    return count


def main(folder: Path, megapixels: int = 64, repeats: int = 3) -> dict[str, Any]:
    """Print and return the ratio."""
    from sattile.engine import session
    from sattile.tiles import tile

    edge = -(-int((megapixels * 1e6) ** 0.5) // 1024) * 1024
    scene, labels = imagery.write(folder, edge)
    small, small_labels = imagery.write(folder, 2048)
    pixels = edge * edge
    ours, theirs, peak = [], [], 0.0
    spark = session("local[2]")
    options: dict[str, Any] = {"size": SIZE, "fractions": "1,0,0", "buffer": 0, "overwrite": True}
    try:
        tile(spark, scenes=[str(small)], labels=str(small_labels), out=str(folder / "warm"), **options)
        for _ in range(repeats):
            out = folder / "plain"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            rows = list(range(0, edge, SIZE))
            with multiprocessing.get_context("spawn").Pool(2) as pool:
                pool.starmap(time.sleep, [(0.5,), (0.5,)])  # started, as Spark's workers are
                start = time.monotonic()
                half = len(rows) // 2
                shares = [(str(scene), str(labels), str(out), part) for part in (rows[:half], rows[half:])]
                count = sum(pool.starmap(plain, shares))
                theirs.append(pixels / 1e6 / (time.monotonic() - start))
            shutil.rmtree(folder / "tiles", ignore_errors=True)
            tile(spark, scenes=[str(scene)], labels=str(labels), out=str(folder / "tiles"), **options)
            record = json.loads((folder / "tiles" / "_run.json").read_text())
            stage = next(one for one in record["stages"] if one["name"] == "cut tiles")
            ours.append(stage["mpix_per_s"])
            peak = max(peak, record["peak_memory_mb"])
            rows_made = json.loads((folder / "tiles" / "dataset.json").read_text())["splits"]["train"]["tiles"]
            assert rows_made == count, (rows_made, count)
    finally:
        spark.stop()
    ratio = paired_ratio(ours, theirs)
    print(
        f"tiling, {pixels / 1e6:.0f} Mpix x 4 uint16, {SIZE} px, 2 cores: sattile {np.median(ours):.1f} Mpix/s, plain "
        f"two-process loop {np.median(theirs):.1f}, ratio {ratio:.2f} (medians of {repeats}); "
        f"peak {peak:.0f} MB a worker"
    )
    return {"ratio": ratio, "peak_mb": peak}
