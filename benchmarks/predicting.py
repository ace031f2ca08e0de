"""Prediction against the bare model, and the engine with a cheap model against a plain rasterio loop.

* bare model: as many processes as cores, one thread each, that call the same scorer on one window again and again (with
  `--engines tensorflow-gpu` they share the GPU). Beside it the network as Keras gives it, in a `tf.function` or as
  OpenVINO reads its SavedModel: without the fusion of its layers, what one has without sattile.
* plain loop: one process reads blocks with rasterio, applies the same 1x1 model with numpy, writes a tiled GeoTIFF and
  makes the COG of it (mode overviews): the product that `sattile predict` publishes.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import imagery

BANDS = imagery.NAMES
CLASSES = "land,water"
STARTS = 4
"""Runs of two seconds before the first that counts: the JVM compiles what it does often."""

WEIGHTS = np.array([[-0.2, 0.5], [-0.3, 0.6], [0.4, -0.1], [0.6, -0.9]], np.float32)


def cheap_bundle(folder: Path) -> str:
    """A 1x1 model: two weighted sums of the bands."""
    import keras

    from sattile.model import bundle

    out = folder / "cheap"
    if not (out / "bundle.json").exists():
        inputs = keras.Input((None, None, len(BANDS)))
        layer = keras.layers.Conv2D(2, 1, use_bias=False, name="scores")
        net = keras.Model(inputs, layer(inputs))
        layer.set_weights([WEIGHTS[None, None]])
        net.save(folder / "cheap.keras")
        file = str(folder / "cheap.keras")
        bundle(keras=file, bands=",".join(BANDS), classes=CLASSES, activation="none", out=str(out))
    return str(out)


def unet_bundle(folder: Path) -> str:
    """The default network, untrained: the speed is that of a trained one."""
    from sattile.model import bundle
    from sattile.training.networks import build

    out = folder / "unet"
    if not (out / "bundle.json").exists():
        statistics = {name: {"mean": 1200.0, "std": 500.0} for name in BANDS}
        net = build("unet-small", bands=BANDS, classes=CLASSES.split(","), statistics=statistics, size=256)
        net.save(folder / "unet.keras")
        bundle(keras=str(folder / "unet.keras"), bands=",".join(BANDS), classes=CLASSES, out=str(out))
    return str(out)


def given(model: str, engine: str, shape: tuple[int, int, int, int], precision: str) -> Callable[[np.ndarray], Any]:
    """The scores of a bundle's network as Keras gives it, one thread: a bundle's other parts have its layers fused."""
    from sattile import scorers
    from sattile.model import KERAS, load_keras

    scorers.use_threads(1)
    network = load_keras(f"{model}/{KERAS}")
    if engine != "openvino":
        return scorers.by_tensorflow(network, second=False)
    import openvino

    core = openvino.Core()
    with tempfile.TemporaryDirectory() as folder:
        network.export(folder, verbose=False)
        read = core.read_model(folder)
        read.reshape({0: shape})
        hint = scorers.PRECISIONS[precision]
        settings = {"INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": hint}
        request = core.compile_model(read, "CPU", settings).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


def bare(
    model: str, engine: str, shape: tuple[int, int, int, int], precision: str, seconds: float, as_given: bool,
    start: Any,
) -> float:  # fmt: skip
    """Mpix/s of one process that does nothing but call the scorer, or the network as it was `given`."""
    from sattile.model import load_bundle, load_scorer

    count, height, width, bands = shape
    planes = np.random.default_rng(0).integers(1, 5_000, (count, bands, height, width)).astype(np.float32)
    batch = np.moveaxis(planes, 1, -1)  # as sattile lays it
    if as_given:
        score = given(model, engine, shape, precision)
        batch = np.ascontiguousarray(batch)
    else:
        score = load_scorer(load_bundle(model), engine=engine, threads=1, precision=precision)
    score(batch)
    start.wait()
    begin = time.monotonic()
    calls = 0
    while time.monotonic() - begin < seconds:
        score(batch)
        calls += 1
    return calls * batch[..., 0].size / 1e6 / (time.monotonic() - begin)


def bare_speed(
    model: str,
    engine: str,
    shape: tuple[int, int, int, int],
    processes: int,
    precision: str,
    *,
    as_given: bool = False,
    seconds: float = 25,
) -> float:
    """Mpix/s of some such processes together."""
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(processes) as pool:
        start = manager.Barrier(processes)
        return sum(pool.starmap(bare, [(model, engine, shape, precision, seconds, as_given, start)] * processes))


def cheap_scores(data: np.ndarray) -> np.ndarray:
    """The 1x1 model in numpy: (..., bands) of any dtype -> (..., classes) float32."""
    return data.astype(np.float32) @ WEIGHTS


def plain(
    scene: str,
    out: str,
    scores: Callable[[np.ndarray], np.ndarray] = cheap_scores,
    *,
    size: int = 2048,
    halo: int = 0,
    threads: int = 1,
) -> float:
    """Seconds of the plain loop; makes `out`.tif.

    Args:
        scores: (height, width, bands) -> (height, width, classes).
        size: edge of a window's own pixels.
        halo: pixels of context that are read on each side, where the scene has them.
        threads: that compress the COG.
    """
    import rasterio
    from rasterio.windows import Window

    begin = time.monotonic()
    with rasterio.open(scene) as source:
        profile = {
            "driver": "GTiff", "height": source.height, "width": source.width, "count": 1, "dtype": "uint8",
            "crs": source.crs, "transform": source.transform, "tiled": True, "blockxsize": 512, "blockysize": 512,
            "nodata": 255,
        }  # fmt: skip
        with rasterio.open(f"{out}.part.tif", "w", **profile) as target:
            for (top, left, bottom, right), (row, col, height, width) in cells(source.height, source.width, size, halo):
                window = Window(left, top, right - left, bottom - top)
                data = np.moveaxis(source.read(window=window), 0, -1)
                kept = slice(row - top, row - top + height), slice(col - left, col - left + width)
                valid = (data[kept] != 0).all(-1)
                labels = scores(data)[kept].argmax(-1).astype(np.uint8)
                target.write(np.where(valid, labels, 255).astype(np.uint8), 1, window=Window(col, row, width, height))
    to_cog(f"{out}.part.tif", f"{out}.tif", threads)
    return time.monotonic() - begin


def cells(height: int, width: int, size: int, halo: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(top, left, bottom, right) of what is read, and (row, col, height, width) of what is kept, row by row."""
    for row in range(0, height, size):
        for col in range(0, width, size):
            rows, cols = min(size, height - row), min(size, width - col)
            read = max(row - halo, 0), max(col - halo, 0), min(row + rows + halo, height), min(col + cols + halo, width)
            yield read, (row, col, rows, cols)


def to_cog(path: str, out: str, threads: int = 1) -> None:
    import rasterio.shutil

    rasterio.shutil.copy(
        path, out, driver="COG", blocksize=512, compress="DEFLATE", resampling="mode", overview_resampling="mode",
        num_threads=threads,
    )  # fmt: skip


def predicted(spark: Any, model: str, scene: Path, out: Path, **options: Any) -> dict[str, Any]:
    from sattile.prediction import predict

    shutil.rmtree(out, ignore_errors=True)
    predict(spark, model=model, scenes=[str(scene)], out=str(out), **options)
    return json.loads((out / "_run.json").read_text())


def cheap(folder: Path, megapixels: int = 64, repeats: int = 3) -> dict[str, Any]:
    """All but the network: print and return ratios and peaks."""
    from sattile.engine import session

    found: dict[str, Any] = {}
    scene, pixels = _scene(folder, megapixels)
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:  # TensorFlow stays out of this process, as it stays out of Spark's driver
        model = pool.apply(cheap_bundle, (folder,))
    for cores in (1, 2):
        spark = session(f"local[{cores}]")
        try:
            for _ in range(STARTS):
                predicted(spark, model, scene, folder / "cheap_out")
            ours, theirs = [], []
            for _ in range(repeats):
                record = predicted(spark, model, scene, folder / "cheap_out")
                ours.append(record["delivered_mpix_per_s"])
                with context.Pool(1) as pool:
                    pool.apply(time.sleep, (0.1,))
                    theirs.append(pixels / pool.apply(plain, (str(scene), str(folder / "plain"))))
            ratio = paired_ratio(ours, theirs)
            found[f"cheap_{cores}"] = ratio
            print(
                f"cheap model, {pixels:.0f} Mpix, {cores} core(s): sattile {np.median(ours):.1f} Mpix/s, plain loop "
                f"{np.median(theirs):.1f} on one, ratio {ratio:.2f}, per core {ratio / cores:.2f} "
                f"(medians of {repeats})"
            )
        finally:
            spark.stop()

    spark = session("local[2]")
    try:
        large, _ = _scene(folder, megapixels * 4)
        peaks = []
        for one in (scene, large):
            record = predicted(spark, model, one, folder / "memory_out")
            peaks.append(record["peak_memory_mb"])
    finally:
        spark.stop()
    found["peaks_mb"] = peaks
    print(f"memory, cheap model: {peaks[0]:.0f} MB a worker at {pixels:.0f} Mpix, {peaks[1]:.0f} at four times it")
    return found


ENGINES = ("tensorflow", "openvino", "openvino:float32")
"""Engines of `networks`, OpenVINO's in the precision behind the colon; bfloat16 is that of the first."""


def networks(
    folder: Path,
    megapixels: int = 64,
    repeats: int = 3,
    *,
    worker_memory: str = "3g",
    engines: Sequence[str] = ENGINES,
    cores: int = 2,
    plain_scene: bool = False,
) -> dict[str, Any]:
    """The default network by each engine and precision, and by auto: print and return ratios to the bare model, and of
    the engines."""
    from sattile.engine import session
    from sattile.grid import Geometry
    from sattile.scorers import cpu

    found: dict[str, Any] = {}
    scene, pixels = _scene(folder, megapixels, plain=plain_scene)
    edge = round((pixels * 1e6) ** 0.5)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        model = pool.apply(unet_bundle, (folder,))
    print(f"CPU: {cpu()}; what it has not is emulated")
    delivered = {}
    for name in engines:
        engine, _, said = name.partition(":")
        precision = said or ("bfloat16" if engine == "openvino" else "float32")
        options = {"worker_memory": worker_memory, "engine": engine, "precision": precision}
        spark = session(f"local[{cores}]")  # workers of its own: what they held at most is said of them
        try:
            # The first run is the start: workers, the network's compilation, memory taken for the first time.
            predicted(spark, model, scene, folder / "unet_out", **options)
            records, alone = [], []
            for _ in range(repeats):
                record = predicted(spark, model, scene, folder / "unet_out", **options)
                records.append(record)
                settings = record["settings"]
                geometry = Geometry(**{name: settings[name] for name in Geometry.__dataclass_fields__})
                shape = geometry.input_shape(edge, edge)
                batch = (settings["batch"], *shape, len(BANDS))
                alone.append(bare_speed(model, engine, batch, cores, precision))
        finally:
            spark.stop()
        speeds = [one["evaluated_mpix_per_s"] for one in records]
        delivered[name] = float(np.median([one["delivered_mpix_per_s"] for one in records]))
        found[name] = paired_ratio(speeds, alone)
        price = record["evaluated_pixels"] / record["delivered_pixels"]
        print(
            f"U-Net by {engine} in {precision}, {pixels:.0f} Mpix, {cores} cores, {worker_memory} a worker: windows of "
            f"{shape[0]} px, {delivered[name]:.2f} Mpix/s delivered, {np.median(speeds):.2f} evaluated ({price:.2f} "
            f"for each delivered), bare model {np.median(alone):.2f}, ratio {found[name]:.2f}; "
            f"peak {max(one['peak_memory_mb'] for one in records):.0f} MB a worker (medians of {repeats})"
        )
        if engine == "tensorflow-gpu":
            continue
        # Not between the runs: Spark ends workers that had nothing to do for a minute.
        plainly = [bare_speed(model, engine, batch, cores, precision, as_given=True) for _ in range(repeats)]
        found[f"{name}_as_given"] = float(np.median(speeds) / np.median(plainly))
        print(
            f"  the network as Keras gives it: {np.median(plainly):.2f} Mpix/s, ratio {found[f'{name}_as_given']:.2f}"
        )
    if {"tensorflow", "openvino"} <= delivered.keys():
        found["openvino_to_tensorflow"] = delivered["openvino"] / delivered["tensorflow"]
        print(
            f"OpenVINO to TensorFlow, delivered: {delivered['openvino']:.2f} to {delivered['tensorflow']:.2f} Mpix/s, "
            f"ratio {found['openvino_to_tensorflow']:.2f}"
        )
    if len(delivered) > 1 and "tensorflow-gpu" not in delivered:
        found["unasked"] = unasked(folder, model, scene, delivered, repeats, worker_memory=worker_memory, cores=cores)
    return found


def unasked(
    folder: Path, model: str, scene: Path, forced: dict[str, float], repeats: int, *, worker_memory: str, cores: int
) -> dict[str, float]:
    """What `--engine openvino` and `auto` deliver, against the faster of the engines that were forced.

    The network was not trained, and so its labels were compared with nothing: for `auto` they are taken to agree.
    """
    from sattile.engine import session

    agreeing = folder / "agreeing"
    shutil.rmtree(agreeing, ignore_errors=True)
    shutil.copytree(model, agreeing)
    described = json.loads((agreeing / "bundle.json").read_text())
    described["openvino"] |= {"agreement": 1.0, "pixels": 0, "version": "", "precision": "bf16"}
    (agreeing / "bundle.json").write_text(json.dumps(described))
    best = max(forced, key=lambda name: forced[name])
    ratios = {}
    for engine in ("openvino", "auto"):
        spark = session(f"local[{cores}]")
        try:
            predicted(spark, str(agreeing), scene, folder / "unet_out", engine=engine, worker_memory=worker_memory)
            records = [
                predicted(spark, str(agreeing), scene, folder / "unet_out", engine=engine, worker_memory=worker_memory)
                for _ in range(repeats)
            ]
        finally:
            spark.stop()
        chosen = records[-1]["engine"]
        speed = float(np.median([one["delivered_mpix_per_s"] for one in records]))
        ratios[engine] = speed / forced[best]
        print(
            f"--engine {engine}: takes {chosen['engine']} in {chosen['precision']} ({chosen['why']}), {speed:.2f} "
            f"Mpix/s delivered, {ratios[engine]:.2f} of the fastest that was forced ({best})"
        )
    return ratios


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the ratios of runs that followed each other: a machine is not as fast at all times."""
    return float(np.median(np.divide(ours, theirs)))


def _scene(folder: Path, megapixels: int, *, plain: bool = False) -> tuple[Path, float]:
    """A square scene of so many megapixels or a few more, and how many they are."""
    edge = -(-int((megapixels * 1e6) ** 0.5) // 1024) * 1024
    path, _ = imagery.write(folder, edge, plain=plain)
    return path, edge * edge / 1e6
