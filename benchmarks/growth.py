"""How time and memory of `sattile predict` grow with a scene: the cheap model, two cores, once started."""

from __future__ import annotations

import math
import multiprocessing
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import imagery
from benchmarks.memory import Peak
from benchmarks.predicting import cheap_bundle, predicted

SIZES = (64, 256, 1024)
"""Megapixels; 2209 is 47,000 x 47,000: a few minutes and 10 GB to make."""


def main(folder: Path, sizes: Sequence[int] = SIZES, repeats: int = 1, *, keep: bool = False) -> dict[str, Any]:
    """Print seconds and memory of each size, and the exponent; return them.

    Args:
        sizes: megapixels of the scenes, at least two.
        keep: leave the scenes where they are.
    """
    from sattile.engine import session

    folder.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model = pool.apply(cheap_bundle, (folder,))
    pixels, seconds, peaks = [], [], []
    spark = session("local[2]")
    try:
        # Workers started, and the writer has run: as large as the smallest scene, that memory is warm, too.
        for number, size in enumerate([min(sizes), *sorted(sizes)]):
            edge = math.isqrt(size * 1_000_000)
            scene, labels = imagery.write(folder, edge)
            taken, held, a_worker = [], 0.0, 0.0
            for _ in range(repeats if number else 1):
                begin = time.monotonic()
                with Peak() as peak:
                    record = predicted(spark, model, scene, folder / "growth_out")
                taken.append(time.monotonic() - begin)
                held, a_worker = max(held, peak.megabytes), record["peak_memory_mb"]
            shutil.rmtree(folder / "growth_out")
            if not number:
                continue
            if not keep:
                scene.unlink()
                labels.unlink()
            pixels.append(edge * edge)
            seconds.append(float(np.median(taken)))
            peaks.append(held)
            print(
                f"growth, {edge} x {edge}: {seconds[-1]:.1f} s, {edge * edge / 1e6 / seconds[-1]:.1f} Mpix/s, peak "
                f"{held:.0f} MB of all processes, {a_worker:.0f} a worker",
                flush=True,
            )
    finally:
        spark.stop()
    found = exponent(pixels, seconds)
    print(f"growth: seconds ~ pixels^{found:.3f}, memory ~ pixels^{exponent(pixels, peaks):.3f}")
    return {"exponent": found, "pixels": pixels, "seconds": seconds, "peaks_mb": peaks}


def exponent(x: Sequence[float], y: Sequence[float]) -> float:
    """e of the least-squares fit y = c x^e, in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])
