"""`sattile predict` against what else makes the same map of the same scene: `benchmarks.peer` says what each does.

sattile runs here, each peer in the environment of `benchmarks/requirements.txt`, one after the other, in turns. Both
have done the whole job once before it is timed. Seconds are those of the whole job: sattile's cover listing, planning,
the quicklook, STAC item and record, which no peer makes. Memory is that of all processes together; sattile's has the
JVM in it.

A peer that slides overlapping windows is compared with sattile doing the same (`merge=blend`). The mean is weighted
there (towards windows' middles) and not in raster-vision.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import imagery
from benchmarks.memory import Peak
from benchmarks.predicting import BANDS, CLASSES, cheap_bundle, predicted, unet_bundle

ROOT = Path(__file__).resolve().parents[1]
PYTHON = ROOT / "benchmarks" / ".venv" / "bin" / "python"
STRIDE = 256
CHUNK = 1024
"""Least edge of the peers' windows. A model without context leaves it to them; of 512, 1024 and 2048 px this was the
fastest for each (sattile reads blocks of several windows, whatever these are)."""
LEAST_AGREEMENT = 0.99

PEERS = {
    "loop": "crop", "dask-threads": "crop", "dask-processes": "crop", "rastervision-crop": "crop",
    "rastervision": "blend",
}  # fmt: skip
"""Each peer, and which of sattile's merges does the same work."""


@dataclass(frozen=True)
class Measured:
    """One run.

    Attributes:
        seconds: of the whole job.
        evaluated, delivered: pixels that the network ran on, and of the map.
        peak_mb: of all its processes together.
        moved: bytes that went from task to task, None where nothing counts them.
    """

    seconds: float
    evaluated: int
    delivered: int
    peak_mb: float
    moved: int | None = None


def main(folder: Path, megapixels: int = 16, repeats: int = 3, python: Path = PYTHON) -> dict[str, Any]:
    """Print a table a model, return {model: {name: Mpix/s delivered}}.

    Raises:
        SystemExit: without the peers' environment, or if a peer's labels differ from sattile's.
    """
    if not python.exists():
        raise SystemExit(f"{python} does not exist: `make benchmarks-env` makes it, or name another with --peers")
    folder.mkdir(parents=True, exist_ok=True)
    scene, labels = imagery.write(folder, *shape(megapixels))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        models = {
            "cheap": pool.apply(cheap_bundle, (folder,)),
            "unet": pool.apply(_trained_unet, (folder, scene, labels)),
        }
    found, differ = {}, []
    for name, model in models.items():
        found[name], bad = _compare(name, model, scene, folder, repeats, python)
        differ += bad
    if differ:
        raise SystemExit(f"labels differ from sattile's in more than 1 % of the pixels: {', '.join(differ)}")
    return found


def shape(megapixels: int) -> tuple[int, int]:
    """(height, width) of about so many megapixels, multiples of 1024: wider than high, that a transposed map shows."""
    height = max(round((megapixels * 1e6 * 0.6) ** 0.5 / 1024), 1) * 1024
    return height, max(-(-int(megapixels * 1e6) // (height * 1024)), height // 1024 + 1) * 1024


def _trained_unet(folder: Path, scene: Path, labels: Path, steps: int = 60) -> str:
    """The default network after some steps on the scene's own labels.

    Untrained it gives one class to nearly all pixels, and any two maps would agree; with its classes evened out it is
    undecided everywhere, and the last bit of a score decides.
    """
    import keras
    import rasterio

    from sattile.model import bundle

    out = folder / "unet_trained"
    if not (out / "bundle.json").exists():
        keras.utils.set_random_seed(0)
        network = keras.saving.load_model(Path(unet_bundle(folder)) / "model.keras", compile=False)
        network.compile(keras.optimizers.Adam(3e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
        rng = np.random.default_rng(0)
        with rasterio.open(scene) as image, rasterio.open(labels) as truth:
            size = 1024
            window = rasterio.windows.Window(0, 0, size, size)
            data, marks = np.moveaxis(image.read(window=window), 0, -1), truth.read(1, window=window)
        places = [tuple(rng.integers(0, size - 128, 2)) for _ in range(steps * 8)]
        images = np.stack([data[row : row + 128, col : col + 128] for row, col in places]).astype(np.float32)
        classes = np.stack([marks[row : row + 128, col : col + 128] for row, col in places])
        network.fit(images, classes, batch_size=8, epochs=1, shuffle=False, verbose=0)
        network.save(folder / "unet_trained.keras")
        bundle(keras=str(folder / "unet_trained.keras"), bands=",".join(BANDS), classes=CLASSES, out=str(out))
    return str(out)


def _compare(
    name: str, model: str, scene: Path, folder: Path, repeats: int, python: Path
) -> tuple[dict[str, float], list[str]]:
    from sattile.engine import session

    runs: dict[str, list[Measured]] = {}
    agreement: dict[str, float] = {}
    spark = session("local[2]")
    try:
        merges = {"crop": {}, "blend": {"merge": "blend", "size": 2 * STRIDE, "stride": STRIDE}}
        for turn in range(repeats + 1):
            maps = {}
            for merge, options in merges.items():
                out = folder / f"{name}_{merge}"
                begin = time.monotonic()
                with Peak() as peak:
                    record = predicted(spark, model, scene, out, engine="tensorflow", **options)
                seconds = time.monotonic() - begin
                (maps[merge],) = out.glob("*/labels.tif")
                if merge == "crop":
                    size, halo = max(record["settings"]["size"], CHUNK), record["settings"]["halo"]
                if turn:  # the first is the start: workers, the network's compilation
                    runs.setdefault(f"sattile {merge}", []).append(
                        Measured(
                            seconds, record["evaluated_pixels"], record["delivered_pixels"], peak.megabytes,
                            record.get("moved_bytes"),
                        )
                    )  # fmt: skip
            for peer, merge in PEERS.items():
                if turn:
                    made = folder / f"{name}_{peer}"
                    network = None if name == "cheap" else f"{model}/model.keras"
                    one = _run_peer(peer, python, scene, made, network, size, halo)
                    runs.setdefault(peer, []).append(one)
                    agreement[peer] = agree(maps[merge], Path(f"{made}.tif"))
    finally:
        spark.stop()
    speed = {one: float(np.median([run.delivered / 1e6 / run.seconds for run in all_])) for one, all_ in runs.items()}
    print(f"{name}, {runs['loop'][0].delivered / 1e6:.1f} Mpix, 2 cores, windows of {size} + 2 x {halo} px", end=" ")
    print(f"(blend: {2 * STRIDE} every {STRIDE}), medians of {repeats}; class 1 on {share(maps['crop']):.0%}")
    print("\n".join(table(runs, speed, agreement)))
    return speed, [f"{name} {peer} ({same:.2%})" for peer, same in agreement.items() if same < LEAST_AGREEMENT]


def table(runs: dict[str, list[Measured]], speed: dict[str, float], agreement: dict[str, float]) -> list[str]:
    """Lines of the table; `ratio` is sattile's delivered pixels a second to the peer's."""
    lines = ["| name | delivered Mpix/s | evaluated Mpix/s | peak MB | moved MB | sattile's ratio to it | agreement |"]
    lines.append("|---" * 7 + "|")
    for name, every in runs.items():
        evaluated = np.median([one.evaluated / 1e6 / one.seconds for one in every])
        moved = "-" if every[-1].moved is None else f"{every[-1].moved / 1e6:.2f}"
        ours = f"sattile {PEERS[name]}" if name in PEERS else None
        ratio, same = (f"{speed[ours] / speed[name]:.2f}", f"{agreement[name]:.2%}") if ours else ("", "")
        peak = max(one.peak_mb for one in every)
        lines.append(f"| {name} | {speed[name]:.2f} | {evaluated:.2f} | {peak:.0f} | {moved} | {ratio} | {same} |")
    return lines


def _run_peer(name: str, python: Path, scene: Path, out: Path, network: str | None, size: int, halo: int) -> Measured:
    command = [str(python), "-m", "benchmarks.peer", name, "--scene", str(scene), "--out", str(out)]
    command += ["--size", str(size), "--halo", str(halo), "--stride", str(STRIDE)]
    command += ["--model", network] if network else []
    # Not this process's environment as it is: Spark has put its own into it.
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    environment |= {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["OPENBLAS_NUM_THREADS"] = "1" if name.startswith("dask") else "2"  # two workers of one, or one of two
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-4000:]}")
    said = json.loads(done.stdout.strip().splitlines()[-1])
    return Measured(said["seconds"], said["evaluated_pixels"], said["delivered_pixels"], said["peak_mb"])


def agree(one: Path, other: Path) -> float:
    """The share of pixels with the same value in two rasters of one shape, strip by strip."""
    import rasterio
    from rasterio.windows import Window

    with rasterio.open(one) as first, rasterio.open(other) as second:
        if first.shape != second.shape or first.transform != second.transform or first.crs != second.crs:
            return 0.0
        same = 0
        for row in range(0, first.height, 1024):
            window = Window(0, row, first.width, min(1024, first.height - row))
            same += int((first.read(1, window=window) == second.read(1, window=window)).sum())
        return same / (first.height * first.width)


def share(labels: Path) -> float:
    """The share of pixels of class 1, from the overviews."""
    from sattile.cog import preview

    return float((preview(str(labels)) == 1).mean())
