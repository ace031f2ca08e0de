"""Scenes in, maps out: blocks of each scene inferred on the scene's own grid, stitched, written and published.

The driver plans from metadata alone. A task takes a run of neighbouring blocks, reads each once with its context,
and infers, adds up and decides in one go (`label_blocks`): only labels travel to the writers, one a scene. The archive
goes through in waves, so that what is finished is published while the rest is still being computed.
"""

from __future__ import annotations

import logging
import math
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from sattile import engine as engines
from sattile import labels as label_module
from sattile import mosaic, processors, record, shapes, sheets, spectrum, storage
from sattile.drift import Sights, judge
from sattile.errors import UsageError, refusal
from sattile.inference import (
    Inference,
    Labelled,
    Piece,
    block_memory,
    describe_job,
    label_blocks,
    parse_memory,
    prepare,
    warn_of_memory,
)
from sattile.mapreduce import INFERRED, Tally, columns, deal, refused, rows_of, task_numbers, write_maps
from sattile.model import Bundle, load_models
from sattile.mosaic import Part, Product, Target
from sattile.record import Run
from sattile.scenes import CATALOG, LISTINGS, UNLISTED, resolve
from sattile.schema import Refusal, Scene

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import Row, SparkSession

log = logging.getLogger("sattile")

TASK_PIXELS = 24_000_000
"""Most pixels that one task evaluates: some seconds to half a minute, so that the end is even and a retry is cheap."""

WAVE_PIXELS = 1_000_000_000
"""Pixels after which finished scenes are published, and a killed run has lost no more than two of these."""

WAVE_SCENES = 64

LONGEST_NAME = 255
"""Bytes of a folder's name, on local disks and on HDFS."""

STALE = ("auto", "keep", "remove")


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
        refused: scenes that can't be planned.
    """

    job: Inference
    scenes: tuple[Scene, ...]
    pieces: tuple[Piece, ...]
    edge: int
    delivered: int
    evaluated: int
    memory: int
    refused: tuple[Refusal, ...] = ()

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


def plan(
    job: Inference,
    scenes: Sequence[Scene],
    *,
    worker_memory: int | str = "3g",
    slots: int = 1,
    stage: str = "predict",
) -> Plan:
    """Cut scenes into blocks. From metadata alone; blocks that do not touch the aoi are left out."""
    memory = parse_memory(worker_memory)
    edge = choose_edge(job, scenes, memory, slots)
    pieces: list[Piece] = []
    refused: list[Refusal] = []
    evaluated = 0
    touches = shapes.AoiTest(job.aoi) if job.aoi else None
    for scene in scenes:
        try:
            every = job.geometry.blocks(scene.height, scene.width, edge)
            found = [one for one, hit in zip(every, touches(scene, every), strict=True) if hit] if touches else every
        except Exception as error:
            refused.append(Refusal(scene.url, stage, refusal(error).reason))
            continue
        pieces.extend(Piece(scene, block) for block in found)
        area = math.prod(job.geometry.input_shape(scene.height, scene.width))
        # Windows of a block differ little from block to block.
        evaluated += round(job.geometry.count(scene.height, scene.width, edge) * area * len(found) / len(every))
    evaluated *= job.passes
    delivered = sum(piece.block.area for piece in pieces)
    estimate = block_memory(job, edge)
    warn_of_memory(estimate, memory, f"windows of {job.geometry.input_size} px")
    touched = {piece.scene.scene_id for piece in pieces}
    left = tuple(scene for scene in scenes if scene.scene_id in touched)
    return Plan(job, left, tuple(pieces), edge, delivered, evaluated, estimate, tuple(refused))


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
    scenes: Sequence[Scene],
    bundle: Bundle,
    *,
    max_gsd_ratio: float,
    aoi: bool = False,
    on_grid: bool = False,
    dated: bool = False,
    also: Sequence[str] = (),
    stage: str = "predict",
) -> tuple[list[Scene], list[Refusal]]:
    """Scenes that this bundle can be used on, with the bundle's bands in its order; the others with the reason.

    Args:
        aoi, on_grid: each needs scenes with a CRS.
        dated: the rule needs scenes with a time.
        also: further bands that are wanted, after the bundle's.
    """
    good: list[Scene] = []
    refused: list[Refusal] = []
    for scene in scenes:
        reason = _misfit(scene, bundle, max_gsd_ratio)
        missing = [name for name in also if name not in scene.band_names]
        if not reason and missing:
            reason = f"lacks band {', '.join(missing)}, asked for by --weights; it has {', '.join(scene.band_names)}"
        if not reason and scene.crs is None and (aoi or on_grid):
            what = "it cannot be laid on a grid" if on_grid else "the area of interest cannot be found on it"
            reason = f"has no CRS, so {what}; leave --{'grid' if on_grid else 'aoi'} out for it"
        if not reason and dated and scene.span is None:
            reason = (
                "states no time of acquisition, and --rule newest goes by it; name the scene by a STAC item that "
                "states it, or write it into the file (TIFFTAG_DATETIME), and index again; or use --rule all"
            )
        if reason:
            refused.append(Refusal(scene.url, stage, reason))
        else:
            called = spectrum.match(bundle.bands, scene.band_names) or {}
            if any(name != own for name, own in called.items()) and not good:
                log.info("%s: %s are %s in %s", stage, *map(", ".join, (called, called.values())), scene.url)
            chosen = scene.select_as(called)
            good.append(replace(chosen, bands=(*chosen.bands, *scene.select(also).bands)))
    return good, refused


def _misfit(scene: Scene, bundle: Bundle, max_gsd_ratio: float) -> str | None:
    if scene.scene_id[:1] in "._" or scene.scene_id in mosaic.OWN:
        return f"its map would be called {scene.scene_id}, as files of sattile's own are; rename the scene"
    if len(scene.scene_id.encode()) > LONGEST_NAME:
        return f"its map would be called {scene.scene_id[:40]}..., too long for a folder's name; rename the scene"
    called = spectrum.match(bundle.bands, scene.band_names)
    if called is None:
        missing = spectrum.missing(bundle.bands, scene.band_names)
        return (
            f"lacks band {', '.join(missing)} that the model wants ({', '.join(bundle.bands)}); it has "
            f"{', '.join(scene.band_names)}{spectrum.why(missing, scene.band_names)}; say which is which: "
            f"--bands {missing[0]}=ITS_NAME,..."
        )
    if bundle.values == "scaled":
        bands = scene.select_as(called).bands
        unsaid = [band.name for band in bands if band.scale is None and band.offset is None]
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
    return None


# --- tasks and waves ----------------------------------------------------------------------------------------------


def tasks_of(pieces: Sequence[Piece], job: Inference, slots: int) -> list[list[Piece]]:
    """Runs of neighbouring blocks, several a core so that the end is even; small scenes share a task.

    Neighbours share the files' tiles under their halo, which GDAL's cache then decodes once.
    """

    return deal(pieces, [piece.block.area for piece in pieces], most=TASK_PIXELS, slots=slots)


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


def infer(frames: Iterable[pd.DataFrame], *, tasks: Any, job: Inference) -> Iterator[pd.DataFrame]:
    """Map: task numbers in (`id`), labelled rectangles out (columns of `INFERRED`), for `mapInPandas`.

    Args:
        tasks: broadcast list of lists of pieces, by task number.
    """
    import pandas as pd

    numbers = (int(number) for frame in frames for number in frame["id"])
    for done in label_blocks((piece for number in numbers for piece in tasks.value[number]), job):
        yield pd.DataFrame(list(_rows(done)), columns=columns(INFERRED))


def _rows(done: Labelled) -> Iterator[tuple[Any, ...]]:
    name = done.piece.scene.scene_id
    if done.labels is None or done.wanted is None:
        return iter([refused(name, done.reason or "", done.memory_mb)])
    part = Part(done.piece.block, done.labels, done.scores, done.coverage)
    tally = Tally(evaluated=done.evaluated, memory_mb=done.memory_mb)
    tally.seen.add(name, done.seen)
    return rows_of(name, part, done.wanted, tally)


def _run_wave(
    spark: SparkSession, pieces: Sequence[Piece], job: Inference, product: Product, staging: str
) -> list[Row]:
    """Map, shuffle by scene, reduce; the rows of `WRITTEN`."""
    tasks = tasks_of(pieces, job, engines.slots(spark))
    targets = {piece.scene.scene_id: Target.of(piece.scene) for piece in pieces}
    sent = spark.sparkContext.broadcast(tasks)
    try:
        work = engines.on_worker(partial(infer, tasks=sent, job=job))
        inferred = task_numbers(spark, len(tasks)).mapInPandas(work, INFERRED)
        return write_maps(spark, inferred, targets, product, staging)
    finally:
        sent.unpersist()


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
    precision: str | None = None,
    tta: str = "none",
    rescale: str | Sequence[float] | None = None,
    grid: str | None = None,
    like: str | None = None,
    sheet: int = sheets.SHEET,
    block: int | None = None,
    rule: str = "all",
    weights: str | Sequence[str] | None = None,
    vectors: str | Sequence[str] | None = None,
    sieve: float = 0.0,
    worker_memory: int | str = "3g",
    max_gsd_ratio: float = 1.5,
    dry_run: bool = False,
    stale: str = "auto",
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Label scenes: a COG, a quicklook and a STAC item each, and a collection over all.

    With `grid` or `like` all scenes become one mosaic on one grid, in sheets: scores are brought onto it and averaged
    where scenes overlap, and a rerun computes the sheets that are missing or whose scenes changed.

    Args:
        spark: the caller's session.
        model: a bundle; or several, a,b,c (seeds of one training, say), whose scores are averaged.
        scenes: files, globs, folders, STAC items, or a catalogue.
        out: folder for the maps.
        bands: names of the files' bands, see the README; 'blue=B02,...' says which is which.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value, whatever the files declare.
        merge: `crop` or `blend`; the model decides if not given.
        size, stride, halo: in pixels; chosen from the model and `worker_memory` if not given.
        scores: write the scores, a float32 band a class.
        coverage: write the sum of weights of each pixel, and on a grid the number of scenes it comes from.
        threshold: with two classes, the score from which the second is taken; with more, the least score to decide.
        aoi: vector file; what lies outside is nodata, and is not computed.
        fill: what the model sees for missing pixels; one value or one a band; the bundle's own if not given.
        engine: `tensorflow`, `openvino`, `tensorflow-gpu`, or `auto`: what an earlier run into this folder took; else
            the GPUs that Spark gives its tasks; else OpenVINO where it gave 99.9 % of the pixels of validation tiles
            the label that TensorFlow gives them and is measured to be faster on these CPUs.
        precision: of OpenVINO's arithmetic: `float32` or `bfloat16`; bfloat16 if not given, where all CPUs have it.
        tta: test-time augmentation: `flips` (4) or `turns` (8) of each window, whose scores are averaged; or `none`.
        rescale: 'FACTOR,OFFSET' that bring the scenes' values to those that the model was trained on: 1,-1000 for
            Sentinel-2 since 2022 where the model knows it without the offset.
        grid: one mosaic of all scenes, `EPSG:N@RES`, with pixels of RES units of that CRS.
        like: the same on the grid of this raster.
        sheet: edge of the files of such a mosaic, in pixels.
        block: edge of what one task computes of it; follows from the model and `worker_memory` if not given.
        rule: where scenes overlap: `all` (their weighted mean) or `newest` (scenes without a time are refused).
        weights: what scenes weigh there: `edge` (less towards a scene's edge), `cloud=BAND` (a band with the
            probability of cloud in per cent), or both with a comma; all the same if not given.
        vectors: classes of such a mosaic to write as polygons, `vectors.parquet`: names with commas, or `all`.
        sieve: square metres; smaller polygons are left out.
        worker_memory: what one Python worker (a Spark core) may use: bytes, or `1500m`, `3g`.
        max_gsd_ratio: scenes whose pixel size differs by more than this factor from the model's are refused.
        dry_run: print the plan and write nothing.
        stale: what becomes of earlier maps that no scene given now makes anew: `keep`; `remove`, but those of scenes
            that can't be read now stay; or `auto`: those of other settings go, others stay.
        overwrite: replace maps made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of `out`.

    Raises:
        UsageError: before anything is computed.
        TooManyRefused: see max_failed_fraction; what is good is published.
    """
    engines.check(spark)
    if stale not in STALE:
        raise UsageError(f"stale {stale!r}: use {', '.join(STALE)}")
    bundle = load_models(model)
    area = read_aoi(aoi)
    threads = int(spark.conf.get("spark.task.cpus", "1") or 1)
    options: dict[str, Any] = {
        "merge": merge, "size": size, "stride": stride, "halo": halo, "gpu": engines.gpus_a_task(spark) > 0,
        "local": engines.is_local(spark), "threads": threads, "fill": fill, "threshold": threshold, "nodata": nodata,
        "aoi": area, "scores": scores, "coverage": coverage, "worker_memory": worker_memory, "tta": tta,
        "rescale": rescale,
    }  # fmt: skip
    prepare(bundle, engine=engine, **options)  # what cannot be is refused before anything is measured
    choice = processors.choose(spark, bundle, engine, precision, threads=threads, out=out, keep=not dry_run)
    job = prepare(bundle, engine=choice.engine, precision=choice.precision, **options)
    asked = [part.strip() for part in bands.split(",")] if isinstance(bands, str) else list(bands) if bands else None
    settings = describe_job(job) | {
        "bands": asked, "pattern": pattern, "max_gsd_ratio": max_gsd_ratio, "scores": scores, "coverage": coverage,
    }  # fmt: skip
    layout = None
    if grid is not None or like is not None:
        layout = sheets.lay_out(
            job, grid=grid, like=like, sheet=sheet, block=block, rule=rule, weights=weights,
            worker_memory=worker_memory,
        )  # fmt: skip
        settings["layout"] = layout.describe()
    elif (sheet, block, rule, weights, vectors) != (sheets.SHEET, None, "all", None, None):
        raise UsageError(
            "sheet, block, rule, weights and vectors are for a mosaic of all scenes: give --grid or --like, too"
        )
    outlined = sheets.chosen_classes(bundle.classes, vectors, sieve)
    also = [layout.weights.cloud] if layout and layout.weights.cloud else []
    fit = partial(
        fitting, bundle=bundle, max_gsd_ratio=max_gsd_ratio, aoi=area is not None, on_grid=layout is not None,
        dated=layout is not None and layout.rule == "newest", also=also,
    )  # fmt: skip
    # Files named by a pattern say which band they are: only those that the model wants are read, on the finest of
    # their grids. Elsewhere a name might be given to the wrong band.
    wanted = asked or ([*bundle.bands, *also] if pattern else None)
    out = storage.absolute(out)
    for note in bundle.notes:
        log.warning("predict: %s", note)
    if dry_run:
        resolved = resolve(spark, list(scenes), bands=wanted, pattern=pattern, nodata=nodata)
        found, refused = fit(resolved.scenes)
        refused = [*resolved.refused, *refused]
        if layout is not None:
            sheets.announce_plan(found, refused, job, layout, last_speed(out))
        else:
            todo = plan(job, found, worker_memory=worker_memory, slots=engines.slots(spark))
            announce_plan(todo, [*refused, *todo.refused], last_speed(out))
        return out

    with Run("predict", out, settings, overwrite, max_failed_fraction) as run:
        run.extra["model"] = bundle.url  # which version it was
        run.extra["engine"] = choice.describe()
        if bundle.notes:
            run.extra["notes"] = bundle.notes
        with run.stage("list scenes"):
            resolved = resolve(spark, list(scenes), bands=wanted, pattern=pattern, nodata=nodata)
        run.given = resolved.given
        run.refuse(resolved.refused)
        found, refused = fit(resolved.scenes)
        run.refuse(refused)
        run.inputs = [
            {"url": url, "size": version[0], "time": version[1]}
            for scene in found
            for url, version in scene.identity.items()
        ]
        product = Product(
            bundle.classes, storage.digest(["sattile-mosaic/2", settings]), scores, coverage,
            f"Semantic segmentation into {', '.join(one.name for one in bundle.classes)} by a network "
            f"({storage.name(bundle.url)}, {bundle.digest[:16]}), merged with {job.geometry.merge}",
            on_grid=layout is not None,
        )  # fmt: skip
        run.check_held()
        storage.remove(storage.join(out, mosaic.STAGING))  # what a killed run left; the lease is ours
        # A name of its own: if this job sleeps and is taken for dead, the next one's is left alone.
        staging = storage.join(out, mosaic.STAGING, uuid.uuid4().hex[:12])
        ended = False
        try:
            if layout is None:
                present = _by_scene(spark, run, found, job, product, staging, worker_memory)
            else:
                present = _on_grid(spark, run, found, job, layout, product, staging, keep=stale != "auto")
            _clean(run, present, product, stale, _refused(run, scenes) if stale == "remove" else {})
            ended = True
        finally:
            storage.remove(staging)
            if run.is_held:
                storage.remove(storage.join(out, mosaic.STAGING))
                # A run that failed before anything was there leaves a folder that takes any settings.
                mosaic.write_collection(out, product, empty=ended)
                if layout is None:
                    mosaic.remove_whole(out)
                else:
                    grid_limits = layout.grid.limits if layout.grid.is_file else None
                    mosaic.write_whole(out, product, layout.grid.transform, grid_limits)
        with run.stage("vectors") if outlined else nullcontext():
            polygons = sheets.write_vectors(spark, out, product, layout.grid if layout else None, outlined, sieve)
        if outlined:
            run.extra["polygons"] = polygons
        run.finish()
    return out


def _by_scene(
    spark: SparkSession, run: Run, found: Sequence[Scene], job: Inference, product: Product, staging: str,
    worker_memory: int | str,
) -> dict[str, Target]:  # fmt: skip
    """A map a scene: plan, infer and write all waves, publishing each scene as its wave is done; all maps by name."""
    out = run.out
    with run.stage("plan"):
        targets = {scene.scene_id: Target.of(scene) for scene in found}
        stale = [scene for scene in found if not mosaic.is_done(out, targets[scene.scene_id], product)]
        todo = plan(job, stale, worker_memory=worker_memory, slots=engines.slots(spark))
    run.skipped = len(found) - len(stale)
    run.extra["plan"] = todo.describe(last_speed(out))
    run.refuse(todo.refused)
    outside = len(stale) - len(todo.scenes) - len(todo.refused)
    if outside:
        run.extra["outside_aoi"] = outside
        log.info("predict: %d scenes lie outside the area of interest", outside)
    urls = {scene.scene_id: scene.url for scene in todo.scenes}
    area = dict.fromkeys(urls, 0)
    for piece in todo.pieces:
        area[piece.scene.scene_id] += piece.block.area
    work = partial(_run_wave, spark, job=job, product=product, staging=staging)
    kept = {scene.scene_id for scene in found} - {scene.scene_id for scene in stale}
    with _Figures(spark, run, found, job, kept) as figures:
        for rows in engines.in_waves(spark, waves_of(todo.pieces), work):
            for row in sorted(rows, key=lambda one: one.name):
                figures.add(row)
                if row.staged is None:
                    run.refuse([Refusal(urls[row.name], "predict", row.reason)])
                    continue
                run.check_held()
                mosaic.publish(row.staged, out, row.name)
                run.done += 1
                figures.publish(row, area[row.name])
    return targets


def _on_grid(
    spark: SparkSession, run: Run, found: Sequence[Scene], job: Inference, layout: sheets.Layout, product: Product,
    staging: str, *, keep: bool,
) -> dict[str, Target]:  # fmt: skip
    """A map a sheet. A scene that can't be read is left out everywhere: sheets that it reaches are done without it.

    Args:
        keep: a sheet of which no scene is left stays as an earlier run made it of other files, or with other settings.

    Returns:
        All maps that were planned, by name.
    """
    out = run.out
    by_id = {scene.scene_id: scene for scene in found}
    bad: dict[str, str] = {}
    with run.stage("plan"):
        misfits = sheets.unfit(found, layout)
        fit = [scene for scene in found if scene.scene_id not in misfits]
        run.refuse([Refusal(by_id[one].url, "predict", reason) for one, reason in sorted(misfits.items())])
        every, outside, unplaced = sheets.plan_sheets(fit, layout, aoi=job.aoi)
        run.refuse([Refusal(by_id[one].url, "predict", reason) for one, reason in sorted(unplaced.items())])
        known: dict[str, dict[str, str]] = {}  # by sheet: what it was done without
        for sheet in every:
            item = mosaic.done_item(out, sheet.target.name, sheet.target.source, product)
            without = item["properties"].get(mosaic.REFUSED, {}) if item else {}
            if item is not None and without.keys() <= sheet.scenes:
                known[sheet.target.name] = without
                bad |= without
        # A sheet that was published with a scene before that one was refused elsewhere is not done.
        done = {one.target.name for one in every if known.get(one.target.name, {}).keys() == one.scenes & bad.keys()}
        done &= known.keys()
        told = {one: sorted(name for name in done if one in known[name]) for one in bad}
        every = [sheet.without(bad) for sheet in every]
        todo = [sheet for sheet in every if sheet.target.name not in done]
    run.skipped = len(done)
    run.extra["plan"] = sheets.describe_plan(todo, by_id, job, layout, last_speed(out))
    if outside:
        run.extra["outside"] = len(outside)
        log.warning("predict: %d scenes lie outside the grid or the area of interest", len(outside))
    if said := sheets.stretched(every, layout.grid):
        log.warning("predict: %s", said)
    for scene_id, reason in sorted(bad.items()):
        again = f"left out of {', '.join(told[scene_id])}; remove these folders to try it again"
        run.refuse([Refusal(by_id[scene_id].url, "predict", f"{reason} ({again})")])
    published: set[str] = set()
    kept = {one for sheet in every if sheet.target.name in done for one in sheet.scenes}
    with _Figures(spark, run, found, job, kept) as figures:
        while todo:
            run.check_held()
            for sheet in todo:
                name = sheet.target.name
                # All that reached it was refused; it may have been published before that was known.
                if not sheet.scenes and not keep:
                    mosaic.unpublish(out, name)
                    published.discard(name)
            now = {sheet.target.name: sheet for sheet in todo if sheet.scenes}
            fresh: dict[str, str] = {}
            settings: dict[str, Any] = {"job": job, "layout": layout, "product": product, "staging": staging}
            work = partial(sheets.run_wave, spark, scenes=by_id, **settings)
            for rows in engines.in_waves(spark, sheets.waves_of(list(now.values())), work):
                rows = sorted(rows, key=lambda one: one.name)
                for row in rows:
                    figures.add(row)
                    if row.staged is None:
                        blamed = sheets.refusals(row.reason)
                        if not blamed:
                            run.refuse([Refusal(storage.join(out, row.name), "predict", row.reason)])
                        fresh |= blamed
                for row in rows:
                    if row.staged is not None and not now[row.name].scenes & set(fresh):
                        run.check_held()
                        mosaic.publish(row.staged, out, row.name)
                        published.add(row.name)
                        figures.publish(row, row.valid)
            run.refuse([Refusal(by_id[one].url, "predict", reason) for one, reason in sorted(fresh.items())])
            todo = [sheet.without(fresh) for sheet in every if sheet.scenes & set(fresh)]
            every = [sheet.without(fresh) for sheet in every]
    run.done = len(published)
    return {sheet.target.name: sheet.target for sheet in every}


class _Figures:
    """The stage that infers and writes, and its figures in the run record. A context manager."""

    def __init__(self, spark: SparkSession, run: Run, scenes: Sequence[Scene], job: Inference, kept: set[str]):
        """
        Args:
            kept: ids of scenes in maps of an earlier run with these settings: what it said of them still holds.
        """
        self._run, self._stack = run, ExitStack()
        self._urls, self._known = {scene.scene_id: scene.url for scene in scenes}, job.bundle.known
        self._spark = spark
        earlier = {} if run.changed else (run.previous or {}).get("unlike", {})
        self.unlike = {scene_id: why for scene_id, why in earlier.items() if scene_id in kept}
        self.evaluated = self.delivered = self.valid = self.moved = 0
        self.seen = Sights()

    def __enter__(self) -> _Figures:
        self._stage = self._stack.enter_context(self._run.stage("infer and write"))
        self._stack.enter_context(engines.few_rows_a_batch(self._spark))
        self._stack.enter_context(engines.progress(self._spark, "predict"))
        return self

    def add(self, row: Row) -> None:
        """A row of `mapreduce.WRITTEN`, published or not."""
        self._run.peak_memory = max(self._run.peak_memory, row.memory_mb)
        self.evaluated += row.evaluated
        self.moved += row.moved
        found: dict[str, str] = {}
        for scene_id, counts in sorted(Sights(row.seen).counts.items()):
            self.seen.add(scene_id, counts)
            why = judge(self.seen.counts[scene_id], self._known) if self._known else None
            if why and scene_id not in self.unlike:
                log.warning("predict: %s is unlike what the model was trained on: %s", self._urls[scene_id], why)
            if why and why != self.unlike.get(scene_id):
                found[scene_id] = why
        if found:
            self.unlike |= found
            self._run.note(unlike=self.unlike)

    def publish(self, row: Row, pixels: int) -> None:
        self.delivered += pixels
        self.valid += row.valid

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._stage.pixels = self.delivered
        self._stack.__exit__(kind, *rest)
        if kind is not None:
            return
        seconds, before = self._stage.seconds, self._run.previous or {}
        speeds = {
            "evaluated_mpix_per_s": round(self.evaluated / 1e6 / seconds, 3) if self.evaluated else None,
            "delivered_mpix_per_s": round(self.delivered / 1e6 / seconds, 3) if self.delivered else None,
        }
        if not self.evaluated:
            # The speed stays that of the run that made these maps: the next plan reckons with it.
            speeds = {name: before.get(name) for name in speeds}
        self._run.extra |= {
            "evaluated_pixels": self.evaluated,
            "delivered_pixels": self.delivered,
            "valid_pixels": self.valid,
            "moved_bytes": self.moved,
            **({"unlike": dict(sorted(self.unlike.items()))} if self.unlike else {}),
            **speeds,
        }


def _refused(run: Run, scenes: Sequence[str]) -> dict[str, str]:
    """{URL: reason} of what could not be used now, by this run or by the one that made a catalogue that was given."""
    found = {one.url: one.reason for one in run.refused}
    for url in scenes:
        folder = storage.parent(url) if storage.name(url) == CATALOG else url
        if storage.exists(storage.join(folder, CATALOG)):
            found |= {one.url: one.reason for one in record.read_quarantine(folder)}
    return found


def _clean(run: Run, present: Mapping[str, Target], product: Product, stale: str, refused: Mapping[str, str]) -> None:
    """When all is published: remove, or say that they lie there, the maps that nothing given now makes anew; amend the
    others.

    Args:
        present: the maps that scenes given now lead to, by name; not all of them were made.
        stale: see `predict`.
        refused: {URL: reason} of what could not be used now, which matter where maps are to be removed.
    """
    run.check_held()
    unlisted = sorted(
        url for url, reason in refused.items() if reason.startswith(UNLISTED) or url.lower().endswith(LISTINGS)
    )
    if stale == "remove" and unlisted:
        log.warning("predict: no map is removed: %s could not be looked into, and may hold its scene", unlisted[0])
        stale = "keep"
    for name, item in list(mosaic.finished(run.out)):
        other = run.replacing and item["properties"][mosaic.SETTINGS] != product.settings
        unread = bool(
            refused.keys() & {link["href"] for link in item.get("links", ()) if link.get("rel") == "derived_from"}
        )
        if stale == "auto" and other:
            log.warning("predict: removed %s, which is of other settings and was not made anew with these", name)
            mosaic.unpublish(run.out, name)
            continue
        if stale == "remove" and not unread and (other or name not in present):
            log.info("predict: removed %s, which no scene given now leads to", name)
            mosaic.unpublish(run.out, name)
            continue
        if other or name not in present:
            log.warning("predict: %s is of an earlier run, and its scene was refused or not given now; left so", name)
        mosaic.amend(run.out, name, item, present.get(name))


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
