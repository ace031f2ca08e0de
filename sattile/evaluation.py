"""How well a model does: on a split of a tiles dataset, or on scenes with labels. Each pixel is counted once.

Inference is that of `inference`, planned by `prediction`; only counts travel to the driver: by spatial block and
region (`strata`), so that it can say how sure the metrics are.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile import comparison, inference, legend, metrics, pictures, prediction, processors, storage, strata
from sattile import engine as engines
from sattile import labels as label_module
from sattile.comparison import BLOCKS
from sattile.dataset import decode, owners, read_dataset, unmeasured_classes
from sattile.drift import Sights
from sattile.errors import UsageError, refusal
from sattile.grid import Geometry, Window, ceil_to
from sattile.inference import BlockRead, Inference, Labelled, Piece
from sattile.memory import peak_mb
from sattile.model import Bundle, load_models
from sattile.record import Run
from sattile.schema import IGNORE, Refusal, Scene, SegmentClass
from sattile.scorers import Scorer
from sattile.stitch import to_labels
from sattile.strata import Regions, Strata, Stratum

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

METRICS = "metrics.json"

COUNTED = (
    "scene_id string, row int, col int, height int, width int, strata string, confusions binary, reliability binary, "
    "undecided long, labelled long, evaluated long, memory_mb double, pictures string, seen string, reason string"
)
COLUMNS = [part.split()[0] for part in COUNTED.split(", ")]


def evaluate(
    spark: SparkSession,
    *,
    model: str,
    out: str,
    dataset: str | None = None,
    split: str = "test",
    scenes: Sequence[str] | None = None,
    labels: str | None = None,
    bands: str | Sequence[str] | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
    attribute: str | None = None,
    ignore: str | Sequence[int] | None = None,
    background: str | None = None,
    label_encoding: str = "index",
    merge: str | None = None,
    size: int | None = None,
    stride: int | None = None,
    halo: int | None = None,
    threshold: float | None = None,
    aoi: str | None = None,
    fill: float | str | Sequence[float] | None = None,
    engine: str = "auto",
    precision: str | None = None,
    tta: str = "none",
    rescale: str | Sequence[float] | None = None,
    worker_memory: int | str = "3g",
    max_gsd_ratio: float = 1.5,
    regions: str | None = None,
    region_attribute: str | None = None,
    samples: int = pictures.SAMPLES,
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Measure a model: `metrics.json`, and some pictures for the report.

    Beside the metrics there are intervals that they lie in with 95 %: what they might have been on other ground of the
    same kind, by resampling spatial blocks; and whether the scores are as often right as they say (`calibration`).

    Args:
        spark: the caller's session.
        model: a bundle; or several, a,b,c, whose scores are averaged.
        out: folder for the metrics.
        dataset: a tiles dataset; each tile is inferred by itself, and pixels that tiles share are counted once.
        split: which part of it: train, val or test; several as val,test.
        scenes: instead of a dataset: files, globs, folders, STAC items, or a catalogue; with labels.
        labels: one file, matched by location, or a folder with a file named after each scene_id; rasters or vectors.
            A layer or a band stands behind a colon: FILE.gpkg:LAYER, FILE.tif:2, FOLDER:2.
        bands: names of the files' bands; 'blue=B02,...' says which is which.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value of the scenes, whatever the files declare.
        attribute: of vector labels, the one that names the class.
        ignore: label values that mean unlabelled, besides the labels' nodata: '0,99', 'clouds'. 255 means it, too, if
            it is no class.
        background: class of pixels outside all shapes of vector labels.
        label_encoding: as for tile.
        merge: `crop` or `blend`, see predict; of scenes only.
        size, stride, halo: see predict; of scenes only.
        threshold: see predict; undecided pixels are counted apart.
        aoi: vector file; pixels of scenes outside are not counted.
        fill: what the model sees for missing pixels; the bundle's own if not given.
        engine, precision: as for predict.
        tta: as for predict.
        rescale: as for predict; of a dataset's tiles, too.
        worker_memory: what one Python worker (a Spark core) may use: bytes, or `1500m`, `3g`.
        max_gsd_ratio: scenes whose pixel size differs by more than this factor from the model's are refused.
        regions: vector file; metrics for each of its regions, too. A tile belongs to the region that holds its middle,
            a scene is dealt out in squares of 32 pixels; where regions overlap, the later one of the file has them.
        region_attribute: the attribute that names a region; its number in the file, from 1, if not given.
        samples: pictures to keep.
        overwrite: replace metrics made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of `metrics.json`.

    Raises:
        UsageError: before anything is computed: also if bands or classes of model and dataset or labels differ.
        TooManyRefused: see max_failed_fraction.
    """
    engines.check(spark)
    if (dataset is None) == (scenes is None or labels is None) or (dataset is not None and (scenes or labels)):
        raise UsageError("give either --dataset, or --scenes and --labels")
    bundle = load_models(model)
    asked = [part.strip() for part in bands.split(",")] if isinstance(bands, str) else list(bands) if bands else None
    threads = int(spark.conf.get("spark.task.cpus", "1") or 1)
    choose = partial(processors.choose, spark, bundle, engine, precision, threads=threads, out=out)
    shared: dict[str, Any] = {
        "gpu": engines.gpus_a_task(spark) > 0, "local": engines.is_local(spark), "threads": threads, "fill": fill,
        "threshold": threshold, "nodata": nodata, "worker_memory": worker_memory, "tta": tta, "rescale": rescale,
    }  # fmt: skip
    areas = strata.read_regions(regions, region_attribute)
    settings: dict[str, Any] = {"samples": samples, "regions": areas.digest if areas else None}
    if dataset is not None:
        description = read_dataset(dataset)
        check_dataset(bundle, description, dataset, split)
        if size or stride or halo or merge:
            raise UsageError("merge, size, stride and halo are for --scenes: tiles are inferred one by one")
        if any(one is not None for one in (bands, pattern, attribute, ignore, background, aoi)) or (
            label_encoding != "index"
        ):
            raise UsageError(
                "bands, pattern, attribute, ignore, background, label_encoding and aoi are for --scenes and --labels"
            )
        choice = choose()  # once all that may be wrong is known
        job = inference.prepare(bundle, engine=choice.engine, precision=choice.precision, **shared)
        job = _tile_job(job, description["size"])
        settings |= inference.describe_job(job) | {"dataset": description["digest"], "split": split}
    else:
        area = prediction.read_aoi(aoi)
        ignored = None if ignore is None else legend.parse_values(ignore)
        label_module.check(bundle.classes, ignored or (), label_encoding)
        shared |= {"merge": merge, "size": size, "stride": stride, "halo": halo, "aoi": area}
        inference.prepare(bundle, engine=engine, **shared)
        choice = choose()
        job = inference.prepare(bundle, engine=choice.engine, precision=choice.precision, **shared)
        settings |= inference.describe_job(job) | {
            "bands": asked, "pattern": pattern, "labels": storage.absolute(str(labels)).rstrip("/"),
            "attribute": attribute, "ignore": ignored,
            "background": background, "max_gsd_ratio": max_gsd_ratio,
            **({"label_encoding": label_encoding} if label_encoding != "index" else {}),
        }  # fmt: skip
    out = storage.absolute(out)
    with Run("evaluate", out, json.loads(json.dumps(settings)), overwrite, max_failed_fraction) as run:
        run.extra |= {
            "model": bundle.url,
            "engine": choice.describe(),
            "network": {name: bundle.network.get(name) for name in ("arch", "parameters", "models")},
        }
        if regions is not None:
            entry = storage.stat(label_module.split_part(storage.absolute(regions))[0])
            run.inputs = [{"url": storage.absolute(regions), "size": entry.size, "time": entry.mtime}] if entry else []
        if dataset is not None:
            _on_tiles(spark, run, job, dataset, description, split, areas, samples)
        else:
            _on_scenes(
                spark, run, job, list(scenes or ()), str(labels), bands=asked, pattern=pattern, attribute=attribute,
                ignore=ignored or [], background=background, encoding=label_encoding, max_gsd_ratio=max_gsd_ratio,
                worker_memory=worker_memory, regions=areas, samples=samples,
            )  # fmt: skip
        log.info("evaluate: %s", metrics.headline(storage.read_json(storage.join(out, METRICS))))
        run.finish()
    return storage.join(out, METRICS)


def check_dataset(bundle: Bundle, description: Mapping[str, Any], url: str, split: str) -> None:
    """Whether a model can be measured on a split of a dataset.

    Raises:
        UsageError: naming what does not fit.
    """
    missing = [name for name in bundle.bands if name not in description["bands"]]
    if missing:
        raise UsageError(
            f"the model wants band {', '.join(missing)}; dataset {url} has {', '.join(description['bands'])}"
        )
    if description["values"] != bundle.values:
        raise UsageError(f"the model takes {bundle.values} values and dataset {url} holds {description['values']} ones")
    _check_classes(bundle, [SegmentClass(**one) for one in description["classes"]], f"dataset {url}")
    there = [name for name, part in description["splits"].items() if part["tiles"]]
    for name in split.split(","):
        if name not in there:
            raise UsageError(
                f"dataset {url} has no tiles in split {name!r}; it has {', '.join(there) or 'none at all'}"
            )


def _check_classes(bundle: Bundle, classes: Sequence[SegmentClass], whose: str) -> None:
    known, found = {one.id: one.name for one in bundle.classes}, {one.id: one.name for one in classes}
    if known != found:
        raise UsageError(f"the model's classes are {_listed(known)}; those of {whose} are {_listed(found)}")


def _listed(classes: Mapping[int, str]) -> str:
    return ", ".join(f"{name}={class_id}" for class_id, name in sorted(classes.items()))


# --- scenes with labels -------------------------------------------------------------------------------------------


def _on_scenes(
    spark: SparkSession,
    run: Run,
    job: Inference,
    arguments: list[str],
    labels: str,
    *,
    bands: list[str] | None,
    pattern: str | None,
    attribute: str | None,
    ignore: Sequence[legend.Value],
    background: str | None,
    encoding: str,
    max_gsd_ratio: float,
    worker_memory: int | str,
    regions: Regions | None,
    samples: int,
) -> None:
    from sattile.scenes import resolve

    bundle = job.bundle
    with run.stage("list scenes"):
        bands = bands or (list(bundle.bands) if pattern else None)
        resolved = resolve(spark, arguments, bands=bands, pattern=pattern, nodata=job.nodata)
        run.given = resolved.given
        run.refuse(resolved.refused)
        found, refused = prediction.fitting(
            resolved.scenes, bundle, max_gsd_ratio=max_gsd_ratio, aoi=job.aoi is not None, stage="evaluate"
        )
        run.refuse(refused)
        matched = label_module.match(
            labels,
            found,
            classes=tuple(sorted(bundle.classes, key=lambda one: one.id)),
            attribute=attribute,
            ignore=ignore,
            background=background,
            encoding=encoding,
            of_model=True,
        )
        run.refuse(matched.refused)
    found = [scene for scene in found if scene.scene_id in matched.sources]
    versions = [(scene.identity, matched.sources[scene.scene_id].identity()) for scene in found]
    run.inputs += [
        {"url": url, "size": version[0], "time": version[1]}
        for scene, truth in versions
        for url, version in {**scene, **truth}.items()
    ]
    state = storage.digest([[scene.source_json() for scene in found], versions])
    done = _finished(run, state)
    if done is not None and (
        done.get("label_rules") == label_module.RULES
        or label_module.as_before(spark, matched, ignore, done["scenes"].keys())
    ):
        run.skipped = len(found)
        return
    matched = label_module.survey(spark, matched, ignore, model=True)
    todo = prediction.plan(job, found, worker_memory=worker_memory, slots=engines.slots(spark), stage="evaluate")
    run.refuse(todo.refused)
    pieces = [replace(piece, truth=matched.sources[piece.scene.scene_id]) for piece in todo.pieces]
    urls = {scene.scene_id: scene.url for scene in found}
    dealt = strata.strata_of(found, regions)
    work = partial(_count_wave, spark, job=job, dealt=dealt)
    rows: list[Any] = []
    with (
        run.stage("infer and compare") as stage,
        engines.few_rows_a_batch(spark),
        engines.progress(spark, "evaluate"),
    ):
        for wave in engines.in_waves(spark, prediction.waves_of(pieces), work):
            rows.extend(wave)
        bad = {row.scene_id: row.reason for row in rows if row.reason}
        rows = [row for row in rows if row.scene_id not in bad]
        stage.pixels = sum(row.height * row.width for row in rows)
    run.refuse([Refusal(urls[key], "evaluate", reason) for key, reason in sorted(bad.items())])
    run.done = len(found) - len(bad) - len(todo.refused)
    _tell(run, job, rows, urls)
    shown = [_sample_window(by_id(found)[row.scene_id], row) for row in _telling(rows, samples)]
    with run.stage("pictures"), engines.few_rows_a_batch(spark):
        if shown:
            pictured = replace(job, image=True)
            chosen = [Piece(scene, window, matched.sources[scene.scene_id]) for scene, window in shown]
            drawn = _count_wave(spark, chosen, job=pictured, dealt=dealt)
            pictures.write(run.out, [row for row in drawn if row.pictures])
        else:
            pictures.write(run.out, [])
    _write_metrics(run, job, rows, state, {scene.scene_id: scene.url for scene in found}, regions)


def by_id(scenes: Sequence[Scene]) -> dict[str, Scene]:
    return {scene.scene_id: scene for scene in scenes}


def _telling(rows: Sequence[Any], count: int) -> list[Any]:
    """Blocks worth a picture: of as many scenes as there are, the one with most labelled pixels; then the next ones."""
    ranked: list[tuple[int, int, Any]] = []
    by_scene: dict[str, list[Any]] = {}
    for row in rows:
        if row.labelled:
            by_scene.setdefault(row.scene_id, []).append(row)
    for group in by_scene.values():
        group.sort(key=lambda row: (-row.labelled, row.row, row.col))
        ranked.extend((rank, -row.labelled, row) for rank, row in enumerate(group))
    ranked.sort(key=lambda one: (one[0], one[1], one[2].scene_id))
    return [row for _, _, row in ranked[:count]]


def _sample_window(scene: Scene, row: Any) -> tuple[Scene, Window]:
    """The middle of a block, no larger than a picture."""
    height, width = min(row.height, pictures.SAMPLE_EDGE), min(row.width, pictures.SAMPLE_EDGE)
    return scene, Window(row.row + (row.height - height) // 2, row.col + (row.width - width) // 2, height, width)


def _count_wave(spark: SparkSession, pieces: Sequence[Piece], job: Inference, dealt: Strata) -> list[Any]:
    tasks = prediction.tasks_of(pieces, job, engines.slots(spark))
    sent = spark.sparkContext.broadcast(tasks)
    try:
        numbers = spark.range(0, len(tasks), 1, len(tasks))
        count = engines.on_worker(partial(count_blocks, tasks=sent, job=job, dealt=dealt))
        return numbers.mapInPandas(count, COUNTED).collect()
    finally:
        sent.unpersist()


def count_blocks(
    frames: Iterable[pd.DataFrame], *, tasks: Any, job: Inference, dealt: Strata
) -> Iterator[pd.DataFrame]:
    """Task numbers in (`id`), one row of `COUNTED` a block out, for `mapInPandas`.

    Args:
        tasks: broadcast list of lists of pieces, by task number.
    """
    import pandas as pd

    numbers = (int(number) for frame in frames for number in frame["id"])
    for done in inference.label_blocks((piece for number in numbers for piece in tasks.value[number]), job):
        try:
            row = _count(done, job, strata.parts(done.piece.scene, done.piece.block, dealt))
        except Exception as error:
            row = _count(replace(done, labels=None, reason=refusal(error).reason), job, ())
        yield pd.DataFrame([row], columns=COLUMNS)


def _count(done: Labelled, job: Inference, parts: Iterable[tuple[Window, Stratum]]) -> tuple[Any, ...]:
    """A row of `COUNTED`.

    Args:
        parts: rectangles that together are the block, and what each counts for.
    """
    block = done.piece.block
    place = (done.piece.scene.scene_id, block.row, block.col, block.height, block.width)
    if done.labels is None or done.truth is None:
        return (*place, None, None, None, 0, 0, 0, done.memory_mb, None, None, done.reason)
    assert done.wanted is not None
    assert done.reliability is not None
    class_ids = job.class_ids.tolist()
    tables: dict[Stratum, np.ndarray] = {}
    try:
        for window, stratum in parts:
            inside = window.slices(block)
            table = metrics.confusion(done.truth[inside], done.labels[inside], class_ids)
            tables[stratum] = tables[stratum] + table if stratum in tables else table
    except ValueError as error:
        return (*place, None, None, None, 0, 0, 0, done.memory_mb, None, None, f"labels: {error}")
    truth = np.where(done.wanted, done.truth, np.uint8(IGNORE))
    labelled = int((truth != IGNORE).sum())
    decided = sum(int(table.sum()) for table in tables.values())
    drawn = None
    if job.image and done.image is not None and done.image.shape[-1]:
        drawn = pictures.draw(job.bundle.bands, job.bundle.classes, done.image, done.wanted, truth, done.labels)
    confusions = np.stack(list(tables.values())).tobytes()
    seen = Sights()
    seen.add(done.piece.scene.scene_id, done.seen)
    return (
        *place, json.dumps(list(tables)), confusions, done.reliability.tobytes(), labelled - decided, labelled,
        done.evaluated, done.memory_mb, drawn, seen.to_json(), None,
    )  # fmt: skip


# --- tiles --------------------------------------------------------------------------------------------------------


def _tile_job(job: Inference, size: int) -> Inference:
    """The same job on tiles: one window a tile, or, for a network of fixed input, its windows over the tile."""
    if job.bundle.input_shape is None:
        edge = ceil_to(size, job.bundle.total_stride)
        geometry = Geometry("blend", edge, edge, 0, job.bundle.total_stride)
    else:
        edge = job.bundle.input_shape[0]
        geometry = Geometry("blend", edge, max(edge // 2, 1), 0, 1, True)
    return replace(job, geometry=geometry, batch=inference.batch_of(job.bundle, job.engine, edge))


def _on_tiles(
    spark: SparkSession,
    run: Run,
    job: Inference,
    url: str,
    description: Mapping[str, Any],
    split: str,
    regions: Regions | None,
    samples: int,
) -> None:
    parts = split.split(",")
    tiles = sum(description["splits"][name]["tiles"] for name in parts)
    run.inputs += [{"url": storage.absolute(url), "digest": description["digest"]}]
    run.given = tiles
    state = storage.digest([description["digest"], split])
    if _finished(run, state) is not None:
        run.skipped = tiles
        return
    folder = storage.absolute(url)
    files = [storage.join(folder, name, file) for name in parts for file in description["splits"][name]["files"]]
    with run.stage("plan"):
        groups = _row_groups(files, description, regions)
    places = [description["bands"].index(name) for name in job.bundle.bands]
    sent = spark.sparkContext.broadcast(groups)
    with (
        run.stage("infer and compare") as stage,
        engines.few_rows_a_batch(spark),
        engines.progress(spark, "evaluate"),
    ):
        numbers = spark.range(0, len(groups), 1, len(groups))
        count = engines.on_worker(partial(count_tiles, tasks=sent, job=job, places=places))
        rows = numbers.mapInPandas(count, COUNTED).collect()
        stage.pixels = sum(row.height * row.width for row in rows)
        chosen = {(row.scene_id, row.row, row.col) for row in _telling(rows, samples)}
    with run.stage("pictures"), engines.few_rows_a_batch(spark):
        drawn = []
        if chosen:
            wanted = [
                replace(group, drawn=picked)
                for group in groups
                if (picked := tuple(sorted(chosen & {(one[0], one[1], one[2]) for one in group.tiles})))
            ]
            sent_again = spark.sparkContext.broadcast(wanted)
            again = spark.range(0, len(wanted), 1, len(wanted))
            with_image = replace(job, image=True)
            pictured = engines.on_worker(partial(count_tiles, tasks=sent_again, job=with_image, places=places))
            drawn = [row for row in again.mapInPandas(pictured, COUNTED).collect() if row.pictures]
        pictures.write(run.out, drawn)
    run.done = len(rows)
    urls = {one["scene_id"]: one["url"] for one in description["sources"]}
    _tell(run, job, rows, urls)
    _write_metrics(run, job, rows, state, urls, regions, description)


@dataclass(frozen=True)
class TileGroup:
    """A row group of a split's file: one task.

    Attributes:
        url: of the file.
        number: of the row group.
        tiles: (scene_id, row, col, parts counted with other tiles already, what it counts for) of each row.
        drawn: (scene_id, row, col) of the only tiles to take, for pictures; None takes all.
    """

    url: str
    number: int
    tiles: tuple[tuple[str, int, int, tuple[tuple[int, int], ...], Stratum], ...]
    drawn: tuple[tuple[str, int, int], ...] | None = None


def _row_groups(files: Sequence[str], description: Mapping[str, Any], regions: Regions | None) -> list[TileGroup]:
    """All row groups, from their small columns; a pixel that several tiles hold belongs to the first by (row, col)."""
    import pyarrow.parquet as pq

    names, size = ["scene_id", "row", "col", "spatial_block"], description["size"]
    read: list[tuple[str, int, list[tuple[str, int, int, str]]]] = []
    for url in files:
        with pq.ParquetFile(storage.open_file(url)) as file:
            for number in range(file.num_row_groups):
                columns = file.read_row_group(number, columns=names).to_pydict()
                read.append((url, number, list(zip(*(columns[name] for name in names), strict=True))))
    every = [tile for _, _, tiles in read for tile in tiles]
    owned = owners([tile[:3] for tile in every], size)
    counts_for = strata.of_tiles(every, description, regions)
    return [
        TileGroup(url, number, tuple((*tile[:3], owned[tile[:3]], counts_for[tile[:3]]) for tile in tiles))
        for url, number, tiles in read
    ]


def count_tiles(
    frames: Iterable[pd.DataFrame], *, tasks: Any, job: Inference, places: Sequence[int]
) -> Iterator[pd.DataFrame]:
    """Task numbers in (`id`), one row of `COUNTED` a tile out, for `mapInPandas`.

    Args:
        tasks: broadcast list of `TileGroup`, by task number.
        places: of the model's bands in the tiles.
    """
    import pandas as pd
    import pyarrow.parquet as pq

    scorer = job.scorer
    for number in (int(number) for frame in frames for number in frame["id"]):
        group = tasks.value[number]
        with pq.ParquetFile(storage.open_file(group.url)) as file:
            columns = file.read_row_group(group.number, columns=["image", "labels", "valid"]).to_pydict()
        stored = zip(group.tiles, columns["image"], columns["labels"], columns["valid"], strict=True)
        chosen = [one for one in stored if group.drawn is None or one[0][:3] in group.drawn]
        for first in range(0, len(chosen), job.batch):
            tiles = [_decode(one, places) for one in chosen[first : first + job.batch]]
            done = [
                _count(one, job, [(one.piece.block, tile.stratum)])
                for tile, one in zip(tiles, _label_tiles(tiles, job, scorer), strict=True)
            ]
            yield pd.DataFrame(done, columns=COLUMNS)


@dataclass(frozen=True)
class _Tile:
    scene_id: str
    row: int
    col: int
    image: np.ndarray
    valid: np.ndarray
    truth: np.ndarray
    stratum: Stratum


def _decode(stored: tuple[Any, bytes, bytes, bytes], places: Sequence[int]) -> _Tile:
    (scene_id, row, col, earlier, stratum), image, labels, valid = stored
    truth = decode(labels).copy()
    size = truth.shape[0]
    own = Window(row, col, *truth.shape)
    for other_row, other_col in earlier:
        part = (own & Window(other_row, other_col, size, size)).slices(own)
        truth[part] = IGNORE
    return _Tile(scene_id, row, col, decode(image)[..., list(places)], decode(valid), truth, stratum)


def _label_tiles(tiles: Sequence[_Tile], job: Inference, scorer: Scorer) -> Iterator[Labelled]:
    """Each tile as a scene of its own; where one window covers a tile, a batch of tiles is one evaluation."""
    together: dict[int, np.ndarray] = {}
    height, width = tiles[0].truth.shape
    if len(list(job.geometry.placements(height, width, Window(0, 0, height, width)))) == 1:
        shape = job.geometry.input_shape(height, width)
        batch = np.empty((job.batch, *shape, len(job.bundle.bands)), np.float32)
        batch[:] = np.asarray(job.fill, np.float32)
        for index, one in enumerate(tiles):
            job.present(one.image, one.valid, batch[index, :height, :width])
        together = {index: scores[:height, :width] for index, scores in enumerate(scorer(batch)[: len(tiles)])}
    for index, one in enumerate(tiles):
        window = Window(0, 0, height, width)
        scene = Scene(one.scene_id, one.scene_id, height, width, (), None, (1, 0, 0, 0, 1, 0))
        done: Labelled
        if together:
            labels = to_labels(together[index], one.valid, job.class_ids, job.threshold)
            done = Labelled(
                Piece(scene, window), labels=labels, truth=one.truth, wanted=one.valid,
                reliability=metrics.reliability(together[index], one.truth, labels, job.class_ids.tolist()),
                image=one.image if job.image else None,
                seen=inference.see(BlockRead(window, one.image, one.valid, one.valid, None, 0.0), window, job),
                evaluated=batch[..., 0].size * job.passes if index == 0 else 0, memory_mb=peak_mb(),
            )  # fmt: skip
        else:
            region = job.geometry.region(height, width, window)
            added = ((0, region.height - height), (0, region.width - width))
            data, valid = np.pad(one.image, (*added, (0, 0))), np.pad(one.valid, added)
            read = BlockRead(region, data, valid, one.valid, one.truth, 0.0)
            done = inference.label_block(Piece(scene, window), read, job, scorer)
        place = Window(one.row, one.col, height, width)
        yield replace(done, piece=Piece(scene, place))


# --- what is written ----------------------------------------------------------------------------------------------


def _tell(run: Run, job: Inference, rows: Sequence[Any], urls: Mapping[str, str]) -> None:
    """Say which scenes are unlike what the model was trained on: their metrics say little of the model."""
    seen = Sights()
    for row in rows:
        seen.merge(row.seen)
    unlike = dict(seen.unlike(job.bundle.known)) if job.bundle.known else {}
    for scene_id, why in unlike.items():
        log.warning("evaluate: %s is unlike what the model was trained on: %s", urls.get(scene_id, scene_id), why)
    if unlike:
        run.extra["unlike"] = unlike


def _finished(run: Run, state: str) -> dict[str, Any] | None:
    """The metrics that lie here, if they are whole and of this state."""
    url = storage.join(run.out, METRICS)
    if not (run.finished_before and storage.exists(url) and storage.exists(storage.join(run.out, BLOCKS))):
        return None
    found: dict[str, Any] = storage.read_json(url)
    if found.get("state") != state:
        return None
    run.extra |= {name: one for name, one in (run.previous or {}).items() if name == "unlike"}
    return found


def _write_metrics(
    run: Run,
    job: Inference,
    rows: Sequence[Any],
    state: str,
    urls: Mapping[str, str],
    regions: Regions | None,
    dataset: Mapping[str, Any] | None = None,
) -> None:
    """`metrics.json`: the contract's keys over all, the same under `scenes` by scene id and under `regions`, how sure
    they are, and what was left out. `blocks.parquet`: what all of it follows from, for comparisons."""
    classes = len(job.bundle.classes)
    counted: metrics.Counted = {}
    reliability = np.zeros((metrics.BINS + 1, 3), np.int64)
    for row in rows:
        tables = np.frombuffer(row.confusions, np.int64).reshape(-1, classes, classes)
        for (block, region), table in zip(json.loads(row.strata), tables, strict=True):
            key = row.scene_id, block, region
            counted[key] = counted[key] + table if key in counted else table
        reliability += np.frombuffer(row.reliability, np.int64).reshape(reliability.shape)
    evaluated = sum(row.evaluated for row in rows)
    stage = next(stage for stage in run.stages if stage.name == "infer and compare")
    run.peak_memory = max([run.peak_memory, *(row.memory_mb for row in rows)])
    run.extra |= {
        "evaluated_pixels": evaluated,
        "evaluated_mpix_per_s": round(evaluated / 1e6 / stage.seconds, 3) if stage.seconds else None,
        "delivered_mpix_per_s": round(stage.pixels / 1e6 / stage.seconds, 3) if stage.seconds else None,
    }
    if not rows and not run.refused:
        raise UsageError("there is nothing to measure: no scene has labels")
    around_shapes = bool(dataset and "windows" in dataset)
    found = metrics.assess(counted, reliability, job.bundle.classes, around_shapes=around_shapes)
    if dataset and around_shapes:
        found["notes"] += unmeasured_classes(dataset)
    missed = sorted({*regions.names} - {*found["regions"]}) if regions and found["pixels"] else []
    if regions and len(missed) == len({*regions.names}):
        found["notes"].append("no labelled pixel lies in any of the regions: do they state the right CRS?")
    elif missed:
        log.warning("evaluate: no labelled pixel lies in %d of the regions: %s", len(missed), ", ".join(missed[:8]))
    if not found["pixels"]:
        found["notes"].append(
            "not one labelled pixel was counted: labels and scenes share no ground, or all labels are ignored or nodata"
        )
    for note in found["notes"]:
        log.warning("evaluate: %s", note)
    found |= {
        "undecided": sum(row.undecided for row in rows),
        "class_ids": {one.name: one.id for one in job.bundle.classes},
        "scenes": {name: {"url": urls.get(name, name)} | values for name, values in found["scenes"].items()},
        "label_rules": label_module.RULES,
        "state": state,
    }
    comparison.write_blocks(storage.join(run.out, BLOCKS), counted)
    storage.write_json(storage.join(run.out, METRICS), found)
