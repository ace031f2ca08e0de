"""One peer's run over one scene, in an environment that has the peers and no sattile; `benchmarks.peers` starts it.

    python -m benchmarks.peer NAME --scene TIF --out STEM [--model KERAS] --size 1024 --halo 56 --stride 256

Each does its job twice and times the second time, as sattile is timed: libraries are imported, workers started, and the
network is compiled for its shapes. Each makes the same product: STEM.tif, class ids with 255 for nodata, as a COG with
mode overviews. The last line on standard output is JSON: seconds, evaluated_pixels, delivered_pixels, peak_mb.

* `loop`: one process, window after window; the network and the COG may use two threads.
* `dask-threads`, `dask-processes`: rioxarray opens the scene in chunks, `map_overlap` brings each its halo, rioxarray
  writes the labels; two workers, each with one thread for the network.
* `rastervision`: windows are slid with overlap, and its `SemanticSegmentationSmoothLabels` adds up their scores and
  makes labels of the mean. One process, as there: the network may use two threads, and one more reads ahead.
* `rastervision-crop`: the same without double work, by its `crop_sz`: only the middles of windows are added.
"""

from __future__ import annotations

import argparse
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np

from benchmarks.memory import Peak
from benchmarks.predicting import cells, cheap_scores, plain, to_cog

WORKERS = 2


@functools.cache
def scorer(model: str | None, intra: int, inter: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """(height, width, bands) -> (height, width, classes) float32; the cheap model if there is no file.

    Args:
        model: a .keras file; it is compiled once a shape and never traced again, as sattile calls it.
        intra: threads of one operation.
        inter: operations at once: as many as threads call the network.
    """
    if model is None:
        return cheap_scores
    import keras
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(intra)
    tf.config.threading.set_inter_op_parallelism_threads(inter)
    network = keras.saving.load_model(model, compile=False, safe_mode=True)
    compiled: dict[tuple[int, ...], Any] = {}
    lock = threading.Lock()

    def scores(data: np.ndarray) -> np.ndarray:
        batch = np.ascontiguousarray(data, np.float32)[None]
        with lock:
            if batch.shape not in compiled:
                function = tf.function(
                    lambda values: tf.cast(network(values, training=False), tf.float32),
                    input_signature=[tf.TensorSpec(batch.shape, tf.float32)],
                    autograph=False,
                )
                compiled[batch.shape] = function.get_concrete_function()
        return compiled[batch.shape](tf.constant(batch)).numpy()[0]

    return scores


# --- dask and rioxarray -------------------------------------------------------------------------------------------


def label_chunk(chunk: np.ndarray, model: str | None, inter: int) -> np.ndarray:
    """(bands, height, width) -> (height, width) uint8, 255 where a band is nodata."""
    data = np.moveaxis(chunk, 0, -1)
    labels = scorer(model, 1, inter)(data).argmax(-1).astype(np.uint8)
    return np.where((data != 0).all(-1), labels, np.uint8(255))


def with_dask(scene: str, out: str, model: str | None, size: int, halo: int, lock: Any, inter: int) -> None:
    import dask.array as da
    import rioxarray

    with rioxarray.open_rasterio(scene, chunks={"band": -1, "y": size, "x": size}, lock=False) as source:
        labels = da.map_overlap(
            label_chunk, source.data, depth={0: 0, 1: halo, 2: halo}, boundary="none", drop_axis=0, dtype=np.uint8,
            meta=np.empty((0, 0), np.uint8), model=model, inter=inter,
        )  # fmt: skip
        mapped = source.isel(band=0, drop=True).copy(data=labels)
        mapped.attrs, mapped.encoding = {}, {}
        mapped = mapped.rio.write_crs(source.rio.crs).rio.write_nodata(255)
        mapped.rio.to_raster(f"{out}.part.tif", tiled=True, blockxsize=512, blockysize=512, lock=lock)
    to_cog(f"{out}.part.tif", f"{out}.tif", WORKERS)


@contextmanager
def dask_threads() -> Iterator[tuple[Any, int]]:
    """The lock for writing, and how many threads call the network of a process."""
    import dask

    with dask.config.set(scheduler="threads", num_workers=WORKERS):
        yield threading.Lock(), WORKERS


def warm(model: str | None, shapes: list[tuple[int, ...]]) -> None:
    """Compile the network for these (height, width): chunks of the timed run may meet another worker than before."""
    for shape in shapes:
        label_chunk(np.ones((4, *shape), np.uint16), model, 1)


@contextmanager
def dask_processes(model: str | None, shapes: list[tuple[int, ...]]) -> Iterator[tuple[Any, int]]:
    import dask
    from distributed import Client, LocalCluster, Lock

    # Memory is measured and not limited: a worker that spills or is restarted would be another measurement.
    settings = {"distributed.worker.memory.terminate": False, "distributed.worker.memory.pause": False}
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=WORKERS, threads_per_worker=1, dashboard_address=None, memory_limit=0) as cluster,
        Client(cluster) as client,
    ):
        client.run(warm, model, shapes)
        yield Lock("labels"), 1


# --- raster-vision ------------------------------------------------------------------------------------------------


def with_rastervision(scene: str, out: str, model: str | None, size: int, stride: int, crop: int) -> int:
    """Pixels that the network ran on.

    Args:
        size: edge of the network's input.
        stride: between windows.
        crop: pixels on each side of a window that are not added.
    """
    import rasterio
    from rastervision.core.box import Box
    from rastervision.core.data import RasterioSource, SemanticSegmentationSmoothLabels

    scores = scorer(model, WORKERS)
    source = RasterioSource(scene)
    height, width = source.extent.size
    if crop:
        # Cropped windows reach over the scene; 0 is read there. Its own padding for `crop_sz` leaves pixels without a
        # window where the extent is a multiple of the stride.
        rows, cols = -(-height // stride) * stride, -(-width // stride) * stride
        extent = Box(-crop, -crop, rows + crop, cols + crop)
        windows = extent.get_windows(size, stride, padding=0)
    else:
        windows = source.extent.get_windows(size, stride)
    labels = SemanticSegmentationSmoothLabels(source.extent, num_classes=2)

    def predictions() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(source.get_chip, windows[0])
            for window in [*windows[1:], None]:
                data = following.result()
                if window is not None:
                    following = pool.submit(source.get_chip, window)
                found = scores(data)
                valid = (data != 0).all(-1)
                # Pixels without a score get the null class.
                yield np.moveaxis(found if valid.all() else np.where(valid[..., None], found, np.nan), -1, 0)

    labels.add_predictions(windows, predictions(), crop_sz=crop or None)
    with rasterio.open(scene) as file:
        profile = {
            "driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "uint8", "crs": file.crs,
            "transform": file.transform, "tiled": True, "blockxsize": 512, "blockysize": 512, "nodata": 255,
        }  # fmt: skip
    with rasterio.open(f"{out}.part.tif", "w", **profile) as target:
        for _, (row, col, rows, cols) in cells(height, width, 2048, 0):
            box = Box(row, col, row + rows, col + cols)
            found = labels.get_label_arr(box, null_class_id=255).astype(np.uint8)
            target.write(found, 1, window=box.rasterio_format())
    to_cog(f"{out}.part.tif", f"{out}.tif", WORKERS)
    return len(windows) * size * size


# --- one run ------------------------------------------------------------------------------------------------------


@contextmanager
def job(name: str, given: argparse.Namespace) -> Iterator[Callable[[], int]]:
    """What makes the product and returns the pixels that the network ran on; its workers live as long as the block."""
    import rasterio

    scene, out, model, size, halo = given.scene, given.out, given.model, given.size, given.halo
    with rasterio.open(scene) as file:
        read = [
            (bottom - top, right - left) for (top, left, bottom, right), _ in cells(file.height, file.width, size, halo)
        ]
    clipped = sum(height * width for height, width in read)  # windows end at the scene's edge
    if name == "loop":

        def loop() -> int:
            plain(scene, out, scorer(model, WORKERS), size=size, halo=halo, threads=WORKERS)
            return clipped

        yield loop
    elif name in ("dask-threads", "dask-processes"):
        workers = dask_threads() if name == "dask-threads" else dask_processes(model, sorted(set(read)))
        with workers as (lock, inter):

            def chunks() -> int:
                with_dask(scene, out, model, size, halo, lock, inter)
                return clipped

            yield chunks
    elif name == "rastervision":
        yield lambda: with_rastervision(scene, out, model, 2 * given.stride, given.stride, 0)
    else:
        yield lambda: with_rastervision(scene, out, model, size + 2 * halo, size, halo)


NAMES = ("loop", "dask-threads", "dask-processes", "rastervision", "rastervision-crop")


def main() -> None:
    import rasterio

    parser = argparse.ArgumentParser(prog="python -m benchmarks.peer")
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--scene", required=True)
    parser.add_argument("--out", required=True, help="path of the product without .tif")
    parser.add_argument("--model", help="a .keras file; the cheap model if not given")
    parser.add_argument("--size", type=int, required=True, help="pixels of a window that count, each side")
    parser.add_argument("--halo", type=int, required=True, help="context on each side")
    parser.add_argument("--stride", type=int, required=True, help="between overlapping windows, of twice this size")
    given = parser.parse_args()
    with rasterio.open(given.scene) as file:
        delivered = file.height * file.width
    with Peak() as peak, job(given.name, given) as run:
        run()
        begin = time.monotonic()
        evaluated = run()
        seconds = time.monotonic() - begin
    found = {"seconds": seconds, "evaluated_pixels": evaluated, "delivered_pixels": delivered}
    print(json.dumps(found | {"peak_mb": peak.megabytes}), flush=True)


if __name__ == "__main__":
    # Workers of other processes find its functions by this name, not by __main__.
    from benchmarks.peer import main as run_by_name

    run_by_name()
