"""Scenes in, maps out: blocks of each scene inferred on the scene's own grid, stitched, written and published.

The driver plans from metadata alone. A task takes a run of neighbouring blocks, reads each once with its context,
and infers, adds up and decides in one go (`label_blocks`): only labels travel to the writers, one a scene. The archive
goes through in waves, so that what is finished is published while the rest is still being computed.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile import engine as engines
from sattile import labels as label_module
from sattile import mosaic, record, storage
from sattile.errors import Refused, UsageError
from sattile.grid import Window
from sattile.inference import (
    Inference,
    Labelled,
    Piece,
    block_memory,
    describe_job,
    label_blocks,
    own_peak_mb,
    parse_memory,
    prepare,
)
from sattile.model import Bundle, load_bundle
from sattile.mosaic import Part, Product
from sattile.record import Run
from sattile.schema import Refusal, Scene

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import Row, SparkSession

log = logging.getLogger("sattile")

ROW_BYTES = 16_000_000
"""Most that one row brings to the writer, before compression: a JVM holds several at once."""

TASK_PIXELS = 24_000_000
"""Most pixels that one task evaluates: some seconds to half a minute, so that the end is even and a retry is cheap."""

WAVE_PIXELS = 1_000_000_000
"""Pixels after which finished scenes are published, and a killed run has lost no more than two of these."""

WAVE_SCENES = 64

MOST_WRITER_THREADS = 4


# --- the plan: what runs on the driver ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What will be computed, from metadata alone.

    Attributes:
        job: how.
        scenes: those to compute.
        pieces: all their blocks, scene after scene, row by row.
        edge: of a block, in pixels.
        delivered: pixels of these blocks.
        evaluated: pixels that the network runs on for them (fewer where there is nodata).
        memory: estimated peak bytes of a worker.
    """

    job: Inference
    scenes: tuple[Scene, ...]
    pieces: tuple[Piece, ...]
    edge: int
    delivered: int
    evaluated: int
    memory: int

    def describe(self, speed: float | None = None) -> dict[str, Any]:
        """The plan in numbers; `speed` is that of an earlier run, in evaluated Mpix/s."""
        return {
            "scenes": len(self.scenes),
            "blocks": len(self.pieces),
            "block_edge": self.edge,
            **{name: getattr(self.job.geometry, name) for name in ("merge", "size", "stride", "halo")},
            "delivered_pixels": self.delivered,
            "evaluated_pixels": self.evaluated,
            "price": round(self.evaluated / self.delivered, 3) if self.delivered else None,
            "worker_memory_mb": round(self.memory / 1e6),
            "seconds": round(self.evaluated / 1e6 / speed, 1) if speed else None,
        }


def choose_edge(job: Inference, scenes: Sequence[Scene], memory: int, slots: int) -> int:
    """Edge of the blocks: as large as memory allows, and no larger than leaves every core several.

    The result does not depend on it (law 2): only speed and memory do.
    """
    unit = job.geometry.size if job.geometry.merge == "crop" else mosaic.cog.TILE
    total = sum(scene.height * scene.width for scene in scenes)
    wanted = math.isqrt(max(total // max(3 * slots, 1), 1))
    most = 4096 if job.geometry.merge == "blend" else 2048
    limit = max(min(wanted, most), 512)
    fitting = [edge for edge in range(unit, max(limit, unit) + 1, unit) if block_memory(job, edge) <= memory]
    return fitting[-1] if fitting else unit


def plan(job: Inference, scenes: Sequence[Scene], *, worker_memory: int | str = "3g", slots: int = 1) -> Plan:
    """Cut scenes into blocks. From metadata alone; blocks that do not touch the aoi are left out."""
    memory = parse_memory(worker_memory)
    edge = choose_edge(job, scenes, memory, slots)
    pieces: list[Piece] = []
    evaluated = 0
    touches = _AoiTest(job.aoi) if job.aoi else None
    for scene in scenes:
        every = job.geometry.blocks(scene.height, scene.width, edge)
        found = [one for one, hit in zip(every, touches(scene, every), strict=True) if hit] if touches else every
        pieces.extend(Piece(scene, block) for block in found)
        area = math.prod(job.geometry.input_shape(scene.height, scene.width))
        # Windows of a block differ little from block to block.
        evaluated += round(job.geometry.count(scene.height, scene.width, edge) * area * len(found) / len(every))
    delivered = sum(piece.block.area for piece in pieces)
    estimate = block_memory(job, edge)
    if estimate > memory:
        log.warning(
            "predict: a worker may need %.1f GB for windows of %d px, more than worker_memory %.1f GB; "
            "a smaller --size needs less", estimate / 1e9, job.geometry.input_size, memory / 1e9,
        )  # fmt: skip
    touched = {piece.scene.scene_id for piece in pieces}
    left = tuple(scene for scene in scenes if scene.scene_id in touched)
    return Plan(job, left, tuple(pieces), edge, delivered, evaluated, estimate)


class _AoiTest:
    """Which blocks of a scene an area touches, judged in the scene's pixel coordinates."""

    def __init__(self, aoi: tuple[bytes, str]):
        import shapely

        self._shape, self._crs = shapely.from_wkb(aoi[0]), aoi[1]
        # Straight edges of one CRS are curves in another.
        west, south, east, north = self._shape.bounds
        self._shape = shapely.segmentize(self._shape, max(east - west, north - south, 1e-9) / 200)
        self._moved: dict[str, Any] = {}

    def __call__(self, scene: Scene, found: Sequence[Window]) -> list[bool]:
        import pyproj
        import shapely
        import shapely.affinity

        assert scene.crs is not None  # checked before: an aoi refuses scenes without a CRS
        if scene.crs not in self._moved:
            move = pyproj.Transformer.from_crs(self._crs, scene.crs, always_xy=True)
            moved = shapely.transform(self._shape, lambda xy: np.column_stack(move.transform(xy[:, 0], xy[:, 1])))
            # What lies beyond a projection's reach comes back infinite.
            whole = np.isfinite(shapely.get_coordinates(moved)).all()
            self._moved[scene.crs] = shapely.make_valid(moved) if whole else None
        moved = self._moved[scene.crs]
        if moved is None:
            return [True] * len(found)
        a, b, c, d, e, f = scene.transform
        scale = a * e - b * d
        inverse = [e / scale, -b / scale, -d / scale, a / scale, (b * f - c * e) / scale, (c * d - a * f) / scale]
        pixels = shapely.affinity.affine_transform(moved, inverse)
        boxes = shapely.box(
            *np.array([[one.col - 1, one.row - 1, one.stop_col + 1, one.stop_row + 1] for one in found], float).T
        )
        shapely.prepare(pixels)
        return list(shapely.intersects(pixels, boxes))


def read_aoi(url: str | None) -> tuple[bytes, str] | None:
    """An area of interest: all polygons of a vector file as one, (WKB, CRS).

    Raises:
        UsageError: if the file can't be read, or holds no polygon.
    """
    if url is None:
        return None
    import shapely

    features = label_module.read_vector(url)
    area = shapely.union_all(shapely.from_wkb(list(features.wkb)))
    if area.is_empty or not area.area:
        raise UsageError(f"--aoi {url} holds no polygon")
    return shapely.to_wkb(area), features.crs


def fitting(
    scenes: Sequence[Scene], bundle: Bundle, *, max_gsd_ratio: float, aoi: bool = False, stage: str = "predict"
) -> tuple[list[Scene], list[Refusal]]:
    """Scenes that this bundle can be used on, with the bundle's bands in its order; the others with the reason."""
    good, refused = [], []
    for scene in scenes:
        reason = _misfit(scene, bundle, max_gsd_ratio, aoi)
        if reason:
            refused.append(Refusal(scene.url, stage, reason))
        else:
            good.append(scene.select(bundle.bands))
    return good, refused


def _misfit(scene: Scene, bundle: Bundle, max_gsd_ratio: float, aoi: bool) -> str | None:
    missing = [name for name in bundle.bands if name not in scene.band_names]
    if missing:
        return (
            f"lacks band {', '.join(missing)} that the model wants ({', '.join(bundle.bands)}); it has "
            f"{', '.join(scene.band_names)}; name its bands with --bands in file order"
        )
    if bundle.values == "scaled":
        unsaid = [band.name for band in scene.select(bundle.bands).bands if band.scale is None and band.offset is None]
        if unsaid:
            return (
                f"states no scale and offset for {', '.join(unsaid)}, and the model takes scaled values (Sentinel-2's "
                f"offset differs from scene to scene); write them into the file's metadata"
            )
    if scene.gsd and bundle.gsd and max(scene.gsd / bundle.gsd, bundle.gsd / scene.gsd) > max_gsd_ratio:
        return (
            f"its pixels are {scene.gsd:g} m and the model was trained on {bundle.gsd:g} m, off by more than a factor "
            f"of {max_gsd_ratio:g}; resample it, or raise max_gsd_ratio"
        )
    if aoi and scene.crs is None:
        return "has no CRS, so the area of interest cannot be found on it; leave --aoi out for it"
    return None


# --- tasks and waves ----------------------------------------------------------------------------------------------


def tasks_of(pieces: Sequence[Piece], job: Inference, slots: int) -> list[list[Piece]]:
    """Runs of neighbouring blocks, several a core so that the end is even; small scenes share a task.

    Neighbours share the files' tiles under their halo, which GDAL's cache then decodes once.
    """

    def cost(piece: Piece) -> int:
        return piece.block.area

    limit = min(max(sum(map(cost, pieces)) // max(4 * slots, 1), 1), TASK_PIXELS)
    found: list[list[Piece]] = [[]]
    load = 0
    for piece in pieces:
        if found[-1] and load + cost(piece) / 2 > limit:
            found.append([])
            load = 0
        found[-1].append(piece)
        load += cost(piece)
    return [group for group in found if group]


def waves_of(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Whole scenes, up to `WAVE_PIXELS` and `WAVE_SCENES` together (one scene at least)."""
    found: list[list[Piece]] = []
    load = scenes = 0
    current = None
    size: dict[str, int] = {}
    for piece in pieces:
        size[piece.scene.scene_id] = size.get(piece.scene.scene_id, 0) + piece.block.area
    for piece in pieces:
        if piece.scene.scene_id != current:
            current = piece.scene.scene_id
            if not found or load + size[current] > WAVE_PIXELS or scenes >= WAVE_SCENES:
                found.append([])
                load = scenes = 0
            load += size[current]
            scenes += 1
        found[-1].append(piece)
    return found


INFERRED = (
    "scene_id string, rank int, row int, col int, height int, width int, labels binary, scores binary, "
    "coverage binary, evaluated long, valid long, memory_mb double, reason string"
)
WRITTEN = "scene_id string, staged string, evaluated long, valid long, memory_mb double, reason string"


def infer(frames: Iterable[pd.DataFrame], *, tasks: Any, job: Inference) -> Iterator[pd.DataFrame]:
    """Map: task numbers in (`id`), labelled rectangles out (columns of `INFERRED`), for `mapInPandas`.

    Args:
        tasks: broadcast list of lists of pieces, by task number.
    """
    import pandas as pd

    numbers = (int(number) for frame in frames for number in frame["id"])
    for done in label_blocks((piece for number in numbers for piece in tasks.value[number]), job):
        yield pd.DataFrame(list(_rows(done, job)), columns=[part.split()[0] for part in INFERRED.split(", ")])


def _rows(done: Labelled, job: Inference) -> Iterator[tuple[Any, ...]]:
    block, scene_id = done.piece.block, done.piece.scene.scene_id
    if done.labels is None or done.wanted is None:
        yield scene_id, 0, *_numbers(block), None, None, None, 0, 0, done.memory_mb, done.reason
        return
    width = 1 + 4 * len(job.bundle.classes) * job.scores + 4 * job.coverage
    height = max(ROW_BYTES // (width * max(block.width, 1)) // 512 * 512, 512)
    for start in range(0, block.height, height):
        rows = slice(start, min(start + height, block.height))
        part = Window(block.row + start, block.col, rows.stop - start, block.width)
        yield (
            scene_id, 1, *_numbers(part), mosaic.pack(done.labels[rows]),
            mosaic.pack(None if done.scores is None else done.scores[rows]),
            mosaic.pack(None if done.coverage is None else done.coverage[rows]),
            done.evaluated if start == 0 else 0, int(done.wanted[rows].sum()), done.memory_mb, None,
        )  # fmt: skip


def _numbers(window: Window) -> tuple[int, int, int, int]:
    return window.row, window.col, window.height, window.width


def write(
    frames: Iterable[pd.DataFrame], *, scenes: Any, product: Product, staging: str, classes: int, threads: int = 1
) -> Iterator[pd.DataFrame]:
    """Reduce: rows of `INFERRED` sorted by scene and rank in, one row of `WRITTEN` a scene out.

    Refusals come first (rank 0): such a scene is not written.

    Args:
        scenes: broadcast {scene_id: Scene}.
        staging: URL of the folder for finished scenes.
        threads: that compress a scene.
    """
    import pandas as pd

    rows = _Rows(row for frame in frames for row in frame.itertuples(index=False))
    while (first := rows.peek()) is not None:
        scene_id, reason, staged = first.scene_id, None, None
        tally = _Tally()
        if first.rank == 0:
            reason = first.reason
            deque((tally.add(row) for row in rows.of(scene_id)), maxlen=0)
        else:
            # Another attempt of this task may be writing the same scene.
            staged = storage.join(staging, uuid.uuid4().hex)
            parts = (_part(tally.add(row), classes) for row in rows.of(scene_id))
            try:
                mosaic.write_scene(scenes.value[scene_id], parts, product, staged, threads)
            except Refused as error:
                reason, staged = error.reason, None
                deque(parts, maxlen=0)
        memory = max(tally.memory_mb, own_peak_mb())
        yield pd.DataFrame(
            [(scene_id, staged, tally.evaluated, tally.valid, memory, reason)],
            columns=[part.split()[0] for part in WRITTEN.split(", ")],
        )


@dataclass
class _Tally:
    evaluated: int = 0
    valid: int = 0
    memory_mb: float = 0.0

    def add(self, row: Any) -> Any:
        self.evaluated += row.evaluated
        self.valid += row.valid
        self.memory_mb = max(self.memory_mb, row.memory_mb)
        return row


class _Rows:
    """Rows sorted by scene, taken scene by scene, one in memory at a time."""

    def __init__(self, rows: Iterator[Any]):
        self._rows = rows
        self._next = next(rows, None)

    def peek(self) -> Any:
        return self._next

    def of(self, scene_id: str) -> Iterator[Any]:
        while self._next is not None and self._next.scene_id == scene_id:
            row, self._next = self._next, None
            yield row
            self._next = next(self._rows, None)


def _part(row: Any, classes: int) -> Part:
    window = Window(int(row.row), int(row.col), int(row.height), int(row.width))
    labels = mosaic.unpack(row.labels, "uint8", window.shape)
    assert labels is not None
    return Part(
        window,
        labels,
        mosaic.unpack(row.scores, "float32", (*window.shape, classes)),
        mosaic.unpack(row.coverage, "uint32", window.shape),
    )


def _run_wave(
    spark: SparkSession, pieces: Sequence[Piece], job: Inference, product: Product, staging: str
) -> list[Row]:
    """Map, shuffle by scene, reduce; the rows of `WRITTEN`."""
    tasks = tasks_of(pieces, job, engines.slots(spark))
    scenes = {piece.scene.scene_id: piece.scene for piece in pieces}
    tasks_sent, scenes_sent = spark.sparkContext.broadcast(tasks), spark.sparkContext.broadcast(scenes)
    try:
        # Task numbers, one a partition: the pieces themselves would pass through a second Python worker.
        numbers = spark.range(0, len(tasks), 1, len(tasks))
        inferred = numbers.mapInPandas(engines.on_worker(partial(infer, tasks=tasks_sent, job=job)), INFERRED)
        by_scene = inferred.repartition(len(scenes), "scene_id").sortWithinPartitions("scene_id", "rank", "row", "col")
        # Fewer scenes than cores: those without one would idle while the others compress.
        threads = max(min(engines.slots(spark) // len(scenes), MOST_WRITER_THREADS), 1)
        reduce = partial(
            write, scenes=scenes_sent, product=product, staging=staging, classes=len(job.bundle.classes),
            threads=threads,
        )  # fmt: skip
        return by_scene.mapInPandas(engines.on_worker(reduce), WRITTEN).collect()
    finally:
        tasks_sent.unpersist()
        scenes_sent.unpersist()


# --- the command --------------------------------------------------------------------------------------------------


def predict(
    spark: SparkSession,
    *,
    model: str,
    scenes: Sequence[str],
    out: str,
    bands: str | Sequence[str] | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
    merge: str | None = None,
    size: int | None = None,
    stride: int | None = None,
    halo: int | None = None,
    scores: bool = False,
    coverage: bool = False,
    threshold: float | None = None,
    aoi: str | None = None,
    fill: float | str | Sequence[float] | None = None,
    engine: str = "auto",
    worker_memory: int | str = "3g",
    max_gsd_ratio: float = 1.5,
    dry_run: bool = False,
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Label scenes: a COG, a quicklook and a STAC item each, and a collection over all.

    Args:
        spark: the caller's session.
        model: a bundle.
        scenes: files, globs, folders, STAC items, or a catalogue.
        out: folder for the maps.
        bands: names of the files' bands, see the README.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value, whatever the files declare.
        merge: `crop` or `blend`; the model decides if not given.
        size, stride, halo: in pixels; chosen from the model and `worker_memory` if not given.
        scores: write the scores, a float32 band a class.
        coverage: write the sum of weights of each pixel.
        threshold: with two classes, the score from which the second is taken; with more, the least score to decide.
        aoi: vector file; what lies outside is nodata, and is not computed.
        fill: what the model sees for missing pixels; one value or one a band; the bundle's own if not given.
        engine: `tensorflow`, `openvino` (faster on CPUs), or `auto`: OpenVINO where it is installed and gave 99.9 % of
            the pixels of validation tiles the label that TensorFlow gives them.
        worker_memory: what one Python worker (a Spark core) may use: bytes, or `1500m`, `3g`.
        max_gsd_ratio: scenes whose pixel size differs by more than this factor from the model's are refused.
        dry_run: print the plan and write nothing.
        overwrite: replace maps made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of `out`.

    Raises:
        UsageError: before anything is computed.
        TooManyRefused: see max_failed_fraction; what is good is published.
    """
    from sattile.scenes import resolve

    bundle = load_bundle(model)
    area = read_aoi(aoi)
    job = prepare(
        bundle, merge=merge, size=size, stride=stride, halo=halo, engine=engine, gpu=engines.gpus_a_task(spark) > 0,
        threads=int(spark.conf.get("spark.task.cpus", "1") or 1), fill=fill, threshold=threshold, nodata=nodata,
        aoi=area, scores=scores, coverage=coverage, worker_memory=worker_memory,
    )  # fmt: skip
    asked = [part.strip() for part in bands.split(",")] if isinstance(bands, str) else list(bands) if bands else None
    settings = describe_job(job) | {
        "bands": asked, "pattern": pattern, "max_gsd_ratio": max_gsd_ratio, "scores": scores, "coverage": coverage,
    }  # fmt: skip
    # Files named by a pattern say which band they are: only those that the model wants are read, on the finest of
    # their grids. Elsewhere a name might be given to the wrong band.
    wanted = asked or (list(bundle.bands) if pattern else None)
    out = storage.absolute(out)
    if dry_run:
        resolved = resolve(spark, list(scenes), bands=wanted, pattern=pattern, nodata=nodata)
        found, refused = fitting(resolved.scenes, bundle, max_gsd_ratio=max_gsd_ratio, aoi=area is not None)
        todo = plan(job, found, worker_memory=worker_memory, slots=engines.slots(spark))
        announce_plan(todo, [*resolved.refused, *refused], last_speed(out))
        return out

    with Run("predict", out, settings, overwrite, max_failed_fraction) as run:
        run.extra["model"] = model
        with run.stage("list scenes"):
            resolved = resolve(spark, list(scenes), bands=wanted, pattern=pattern, nodata=nodata)
        run.given = resolved.given
        run.refuse(resolved.refused)
        found, refused = fitting(resolved.scenes, bundle, max_gsd_ratio=max_gsd_ratio, aoi=area is not None)
        run.refuse(refused)
        run.inputs = [
            {"url": url, "size": version[0], "time": version[1]}
            for scene in found
            for url, version in scene.identity.items()
        ]
        product = Product(
            bundle.classes, storage.digest(["sattile-mosaic/1", settings]), scores, coverage,
            f"Semantic segmentation into {', '.join(one.name for one in bundle.classes)} by a network "
            f"({storage.name(bundle.url)}, {bundle.digest[:16]}), merged with {job.geometry.merge}",
        )  # fmt: skip
        staging = storage.join(out, mosaic.STAGING)
        storage.remove(staging)  # what a killed run left; the lease is ours
        with run.stage("plan"):
            stale = [scene for scene in found if not mosaic.is_done(out, scene, product)]
            todo = plan(job, stale, worker_memory=worker_memory, slots=engines.slots(spark))
        run.skipped = len(found) - len(todo.scenes)
        run.extra["plan"] = todo.describe(last_speed(out))
        outside = len(stale) - len(todo.scenes)
        if outside:
            run.extra["outside_aoi"] = outside
            log.info("predict: %d scenes lie outside the area of interest", outside)
        _clean(out, found, run.replacing, product)
        try:
            _compute(spark, todo, product, out, staging, run)
        finally:
            storage.remove(staging)
            mosaic.write_collection(out, product)
        if not todo.pieces:
            # The speed stays that of the run that made these maps: the next plan reckons with it.
            for name in ("evaluated_mpix_per_s", "delivered_mpix_per_s"):
                run.extra[name] = (run.previous or {}).get(name)
        run.finish()
    return out


def _compute(spark: SparkSession, todo: Plan, product: Product, out: str, staging: str, run: Run) -> None:
    """Infer and write all waves, publishing each scene as its wave is done."""
    urls = {scene.scene_id: scene.url for scene in todo.scenes}
    area = dict.fromkeys(urls, 0)
    for piece in todo.pieces:
        area[piece.scene.scene_id] += piece.block.area
    evaluated = delivered = valid = 0
    work = partial(_run_wave, spark, job=todo.job, product=product, staging=staging)
    with run.stage("infer and write") as stage, engines.few_rows_a_batch(spark), engines.progress(spark, "predict"):
        for rows in engines.in_waves(spark, waves_of(todo.pieces), work):
            for row in sorted(rows, key=lambda one: one.scene_id):
                run.peak_memory = max(run.peak_memory, row.memory_mb)
                evaluated += row.evaluated
                if row.staged is None:
                    run.refuse([Refusal(urls[row.scene_id], "predict", row.reason)])
                    continue
                mosaic.publish(row.staged, out, row.scene_id)
                run.done += 1
                valid += row.valid
                delivered += area[row.scene_id]
        stage.pixels = delivered
    seconds = stage.seconds
    run.extra |= {
        "evaluated_pixels": evaluated,
        "delivered_pixels": delivered,
        "valid_pixels": valid,
        "evaluated_mpix_per_s": round(evaluated / 1e6 / seconds, 3) if evaluated else None,
        "delivered_mpix_per_s": round(delivered / 1e6 / seconds, 3) if delivered else None,
    }


def _clean(out: str, found: Sequence[Scene], replacing: bool, product: Product) -> None:
    """Say which maps lie in `out` though their scenes were not given; those of other settings go with `--overwrite`."""
    present = {scene.scene_id for scene in found}
    for name, item in list(mosaic.finished(out)):
        if name in present:
            continue
        if replacing and item["properties"][mosaic.SETTINGS] != product.settings:
            log.warning("predict: removed %s, made with other settings from a scene that is not given now", name)
            storage.remove(storage.join(out, name))
        else:
            log.info("predict: %s is of an earlier run, and its scene was refused or not given now; left so", name)


def last_speed(out: str) -> float | None:
    """Evaluated Mpix/s of the last run into this folder that computed something."""
    url = storage.join(out, record.RUN)
    with suppress(Exception):
        return storage.read_json(url).get("evaluated_mpix_per_s") if storage.exists(url) else None
    return None


def announce_plan(todo: Plan, refused: Sequence[Refusal], speed: float | None) -> None:
    """Print a plan."""
    numbers = todo.describe(speed)
    geometry = todo.job.geometry
    around = f"halo {geometry.halo}" if geometry.merge == "crop" else f"stride {geometry.stride}"
    lines = [
        f"scenes      {numbers['scenes']} ({len(refused)} refused)",
        f"blocks      {numbers['blocks']} of {todo.edge} px",
        f"windows     {geometry.merge}, size {geometry.size}, {around}, {todo.job.batch} a batch",
        f"delivered   {todo.delivered / 1e6:.1f} Mpix",
        f"evaluated   {todo.evaluated / 1e6:.1f} Mpix ({numbers['price'] or 0:.2f} per pixel delivered)",
        f"memory      {todo.memory / 1e9:.1f} GB a worker (an estimate)",
        f"time        {numbers['seconds']:.0f} s at the last run's {speed:g} Mpix/s"
        if speed
        else "time        unknown: no run has been recorded in this folder",
        *(f"refused     {one.url}: {one.reason}" for one in refused),
    ]
    for line in lines:
        record.announce(line)
