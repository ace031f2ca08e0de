"""Scenes and labels in, a tiles dataset out: windows cut in Spark tasks, dealt to splits, counted in the same pass.

The plan is made on the driver (`_rule` deals the ground to splits, `_plan` makes tasks), `_Cutter` works in the tasks,
and what they report becomes `dataset.json` (`_describe`, `_publish`). The format is in `dataset`.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import os
import pickle
import uuid
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from sattile import engine, geography, grid, legend, schema, shape_windows, storage
from sattile import labels as label_module  # `labels` and `split` are options of `tile`, by contract
from sattile import split as split_module
from sattile.dataset import (
    DESCRIPTION,
    FORMAT,
    Part,
    npy,
    petastorm_metadata,
    read_description,
    unmeasured_classes,
    unseen_classes,
    wild_bands,
)
from sattile.errors import Refused, UsageError, about, refusal
from sattile.grid import Window
from sattile.labels import LabelSource
from sattile.record import QUARANTINE, Run, why
from sattile.schema import IGNORE, Refusal, Scene, SegmentClass
from sattile.shape_windows import Drawn, ShapeWindows
from sattile.split import SPLITS, SplitRule
from sattile.stac import utc, whole_span
from sattile.statistics import BandStatistics

if TYPE_CHECKING:
    import pandas
    from pyspark.sql import SparkSession

T = TypeVar("T")

log = logging.getLogger("sattile")

SIZE = 256
"""Edge of a tile of the grid, in pixels."""

STRIP_BYTES = 48 << 20
"""Most that one read brings into memory; a strip of tiles is cut where it would be more."""

TASK_PIXELS = 24_000_000
"""About how much ground a task covers: a few seconds' work, so that the end of a job is even."""

FILED_FROM = 1 << 20
"""Bytes from which shapes and areas are not in each chunk: they lie in a file, which a process reads once."""

SMALL_PIXELS = 4_000_000
"""Scenes up to this share a part file with others; larger pieces have files of their own."""


def tile(
    spark: SparkSession,
    *,
    out: str,
    scenes: Sequence[str] | None = None,
    labels: str | None = None,
    pairs: str | None = None,
    size: int | None = None,
    stride: int | None = None,
    windows: str = "auto",
    bands: str | Sequence[str] | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
    values: str = "raw",
    classes: str | None = None,
    attribute: str | None = None,
    ignore: str | Sequence[int] | None = None,
    background: str | None = None,
    label_encoding: str = "index",
    aoi: str | None = None,
    split: str = "auto",
    fractions: str = "0.7,0.15,0.15",
    cell: int = 6,
    buffer: int | None = None,
    min_valid: float = 0.0,
    min_labelled: float = 0.0,
    keep_background: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Cut labelled scenes into tiles and deal them to train, val and test.

    Args:
        out: the dataset's folder.
        scenes: files, globs, folders, STAC items or a catalogue; with `labels`.
        labels: one file, matched by location, or a folder with a file named after each scene_id; rasters or vectors.
            A layer or a band stands behind a colon: FILE.gpkg:LAYER, FILE.tif:2, FOLDER:2.
        pairs: instead of both, a CSV with columns scene, labels and, if wanted, split (train, val, test).
        size: edge of a tile in pixels; if not given 256, or, around shapes, the largest that lets them lie apart.
        stride: distance between tiles in pixels; size if not given.
        windows: grid, over whole scenes; shapes, around the polygons of vector labels, those within buffer of each
            other in one split; or auto: shapes where they are few and cover little (see docs/training.md), unless
            background, stride or split are given, or fractions leave nothing out of training.
        bands: names to take, in this order; all if not given. 'blue=B02,...' gives them other names.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value, whatever the files declare.
        values: raw (stored numbers) or scaled (scale and offset applied; scenes that state none are refused).
        classes: 'land,water' (ids 0, 1), or with the values in the labels: 'land=0,water=255', 'land=L,water=W'; else
            what the labels hold.
        attribute: of vector labels, the one that names the class.
        ignore: label values that mean unlabelled, besides the labels' nodata: '0,99', 'clouds'. 255 among others means
            it, too, if it is no class.
        background: class of pixels outside all shapes of vector labels, and of the tiles thinned by
            keep_background (there the class of id 0, if not given).
        label_encoding: index (a number a pixel), rgb (the colours of --classes water=1=#0000ff,...), or one-hot (a
            band for each class); of label rasters.
        aoi: vector file; pixels outside are unlabelled, tiles outside are left out.
        split: by scene, by block (of ground), or auto (scene from 8 places on, else block).
        fractions: shares of train, val and test.
        cell: edge of a ground block, in tiles.
        buffer: pixels kept free between training tiles and the others; a tile's size if not given.
        min_valid: least share of valid pixels in a tile.
        min_labelled: least share of labelled pixels; one pixel is always asked for.
        keep_background: share kept of the tiles that show background alone.
        seed: of the split and of keep_background.
        overwrite: replace a dataset made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of the dataset.

    Raises:
        UsageError: wrong settings, missing files, no tile left.
        TooManyRefused: see max_failed_fraction.
    """
    from sattile.scenes import called_otherwise, plain, resolve

    engine.check(spark)
    asked_size, asked_buffer, asked_stride = size, buffer, stride
    size = SIZE if size is None else size
    stride = size if stride is None else stride
    if size < 1 or stride < 1:
        raise UsageError(f"size {size}, stride {stride}: both must be at least 1 pixel")
    grid.starts(1, size, stride)  # refuses a stride over size
    if (scenes is None or labels is None) == (pairs is None):
        raise UsageError("give either --scenes and --labels, or --pairs FILE.csv")
    if values not in ("raw", "scaled"):
        raise UsageError(f"values {values!r}: use raw or scaled")
    if split not in ("auto", "scene", "block"):
        raise UsageError(f"split {split!r}: use scene, block or auto")
    if windows not in ("auto", "grid", "shapes"):
        raise UsageError(f"windows {windows!r}: use grid, shapes or auto")
    shares = split_module.parse_fractions(fractions)
    buffer = size if buffer is None else buffer
    if cell < 1 or buffer < 0:
        raise UsageError(f"cell {cell}, buffer {buffer}: a ground cell is 1 tile wide at least, a buffer 0 pixels")
    for name, share in (
        ("min-valid", min_valid), ("min-labelled", min_labelled), ("keep-background", keep_background),
    ):  # fmt: skip
        if not 0 <= share <= 1:
            raise UsageError(f"--{name} {share}: give a share from 0 to 1")
    ignored = legend.parse_values(ignore)
    named = legend.parse_classes(classes)
    label_module.check(named, ignored, label_encoding)
    if label_encoding == "rgb" and not legend.all_colored(classes):
        raise UsageError(label_module.NO_COLORS)
    asked = _names(bands)
    settings = {
        "size": size, "stride": stride, "bands": asked, "pattern": pattern, "nodata": plain(nodata), "values": values,
        "classes": classes, "attribute": attribute, "ignore": ignored, "background": background, "aoi": aoi,
        "split": split, "fractions": shares, "cell": cell, "buffer": buffer, "min_valid": min_valid,
        "min_labelled": min_labelled, "keep_background": keep_background, "seed": seed,
    }  # fmt: skip
    if windows != "auto":
        settings["windows"] = windows
    if label_encoding != "index":
        settings["label_encoding"] = label_encoding
    settings = json.loads(json.dumps(settings))
    listed = label_module.read_pairs(pairs) if pairs else []
    arguments = [row["scene"] for row in listed] if pairs else list(scenes or ())
    area = label_module.read_vector(aoi) if aoi else None
    out = storage.absolute(out)

    with Run("tile", out, settings, overwrite, max_failed_fraction) as run:
        with run.stage("list scenes"):
            resolved = resolve(spark, arguments, bands=asked, pattern=pattern, nodata=nodata)
        run.given = resolved.given
        run.refuse(resolved.refused)
        found, refused = _with_bands(resolved.scenes, asked and list(called_otherwise(asked) or ()))
        run.refuse(refused)
        if values == "scaled":
            found, refused = _that_state_scales(found)
            run.refuse(refused)
        if pairs:
            chosen, fixed, refused = _rows_by_scene(listed, found)
            run.refuse(refused)
            matched = label_module.match_pairs(
                chosen, [scene for scene in found if scene.scene_id in chosen],
                classes=named, attribute=attribute, ignore=ignored, background=background, encoding=label_encoding,
            )  # fmt: skip
        else:
            fixed = {}
            matched = label_module.match(
                str(labels), found, classes=named, attribute=attribute, ignore=ignored, background=background,
                encoding=label_encoding,
            )  # fmt: skip
        run.refuse(matched.refused)
        found = [scene for scene in found if scene.scene_id in matched.sources]
        sources = [
            {"scene_id": scene.scene_id, "url": scene.url, "identity": scene.identity,
             "labels": matched.sources[scene.scene_id].identity()}
            for scene in found
        ]  # fmt: skip
        run.inputs = [
            {"url": url, "size": version[0], "time": version[1]}
            for scene in found
            for url, version in {**scene.identity, **matched.sources[scene.scene_id].identity()}.items()
        ]
        before = read_description(out) if run.finished_before else None
        asked_by_hand = {"size": asked_size, "buffer": asked_buffer, "stride": asked_stride}
        if before is not None and "windows" in before:
            run.compare(
                _by_hand(before), asked_by_hand | {"buffer": asked_size if asked_buffer is None else asked_buffer}
            )
        of_grid: list[Any] = [sources, fixed, _shapes_text(area)]
        of_shapes = storage.digest([*of_grid, "shapes", asked_size, asked_buffer])
        drawn: list[Drawn] | None = None
        aoi_shape = _whole_area(area)
        if not run.finished_before or before is None or before.get("state") != of_shapes:
            against = _not_around_shapes(matched.sources, asked_stride, split, fixed)
            if windows == "shapes" and against and found:
                run.finish()
                raise UsageError(f"windows around shapes: {against}")
            # Where nothing is left out of training, there is nothing to lay apart.
            if found and not against and (windows == "shapes" or (windows == "auto" and any(shares[1:]))):
                drawn = _few_shapes(found, matched.sources, aoi_shape, size=size, must=windows == "shapes")
            if drawn and before is not None and "by_hand" in before:
                run.compare(before["by_hand"], {"stride": asked_stride})
        before = before if run.finished_before else None
        state = of_shapes if drawn or (before or {}).get("state") == of_shapes else storage.digest(of_grid)
        if (
            before is not None and before.get("state") == state
            and (
                before.get("label_rules") == label_module.RULES
                or label_module.as_before(spark, matched, ignored, {one["scene_id"] for one in before["sources"]})
            )
        ):  # fmt: skip
            # Scenes refused while being cut are refused again without being read again.
            run.refuse([Refusal(**one) for one in before["refused"]])
            run.skipped = len(before["sources"])
            run.finish()
            return out
        if not found:
            run.finish()
            raise UsageError(_none_left(run))

        with run.stage("look through labels"):
            matched = label_module.survey(spark, matched, ignored)
        for entry in storage.list_folder(out):
            if storage.name(entry.url).startswith(".work-"):  # of a killed run: the lease is ours
                storage.remove(entry.url)
        work = storage.join(out, f".work-{uuid.uuid4().hex[:8]}")
        planned: ShapeWindows | None = None
        seen: list[Drawn] = []
        bands_seen: list[tuple[str, set[str] | None]] = []
        bad: dict[str, str | None] = {}
        try:
            slots = engine.slots(spark)
            if drawn:
                with run.stage("look at shapes"):
                    seen, bad, bands_seen = _look_at_shapes(
                        spark, found, matched.sources, drawn, aoi_shape, work, nodata=nodata, scaled=values == "scaled"
                    )
                # Without any, all are cut, which finds out why.
                planned = shape_windows.plan(
                    seen or drawn, found, size=asked_size, buffer=asked_buffer, fractions=shares, seed=seed
                )
                size = stride = planned.size
                rule = SplitRule("shapes", shares, seed, 0, planned.buffer, dict(planned.dealt))
                pixels = size * size * sum(map(len, planned.placed.values()))
                log.info(
                    "tile: windows of %d px around %d shapes in %d groups that lie apart, buffer %d px "
                    "(--windows grid cuts whole scenes)", size, planned.shapes, len(planned.dealt), planned.buffer,
                )  # fmt: skip
                chunks = _plan_around(
                    [one for one in found if one.scene_id not in bad], matched.sources, planned, aoi_shape, slots, work
                )
            else:
                rule = _rule(found, matched.sources, split, shares, seed, size, cell, buffer, fixed)
                pixels = sum(scene.height * scene.width for scene in found)
                chunks = _plan(found, matched.sources, rule, bool(fixed), size, stride, aoi_shape, slots, work)
            cut = partial(
                _cut,
                work=work, size=size, stride=stride, nodata=nodata, scaled=values == "scaled",
                dtype=_dtype(found, values), rule=rule, background=_background(background, matched.classes),
                min_valid=min_valid, min_labelled=min_labelled,
                keep_background=keep_background, bands=len(found[0].bands),
            )  # fmt: skip
            with run.stage("cut tiles", pixels), engine.progress(spark, "tile"):
                frame = engine.partitioned(spark, chunks, "chunk binary")
                pieces = [
                    pickle.loads(row.piece)  # from our own task, never stored
                    for row in frame.mapInPandas(engine.on_worker(cut), "piece binary").collect()
                ]
            bad |= {piece.scene_id: piece.refused for piece in pieces if piece.refused}
            by_id = {scene.scene_id: scene for scene in found}
            cut_refusals = [Refusal(by_id[key].url, "tile", reason) for key, reason in sorted(bad.items()) if reason]
            run.refuse(cut_refusals)
            run.peak_memory = max((piece.peak_memory for piece in pieces), default=0.0)
            good = [piece for piece in pieces if piece.scene_id not in bad]
            with run.stage("publish"):
                description = _describe(found, sources, good, matched.classes, rule, size, stride, settings, values)
                description |= {
                    "label_rules": label_module.RULES,
                    "state": state,
                    "refused": [asdict(one) for one in cut_refusals],
                }
                if planned:
                    description["windows"] = planned.to_dict()
                elif (
                    windows == "auto"
                    and asked_stride is not None
                    and any(shares[1:])
                    and not _not_around_shapes(matched.sources, None, split, fixed)
                ):
                    description["by_hand"] = {"stride": asked_stride}  # without, there may be windows around shapes
                blind = _blind(found, bands_seen or [(piece.scene_id, piece.seen) for piece in good])
                if (
                    drawn
                ):  # nothing was seen but what lies around shapes: there, scenes are blank at the edge of a swath
                    blind = {url: names for url, names in blind.items() if len(names) < len(found[0].bands)}
                for url, names in blind.items():
                    log.warning("tile: %s: %s", url, _without_valid(names))
                if not description["splits"]["train"]["tiles"]:
                    run.finish()
                    none_shown = bool(drawn) and not seen
                    raise UsageError(
                        _why_empty(description, rule, size, blind, none_shown) if good else _none_left(run)
                    )
                run.check_held()
                _publish(out, work, description)
        finally:
            storage.remove(work)
        run.done = len(found) - len(bad)
        run.extra["delivered_mpix_per_s"] = run.stages[-2].to_dict()["mpix_per_s"]
        if undeclared := sum(piece.undeclared for piece in good):
            share = undeclared / sum(piece.read for piece in good)
            log.warning(
                "tile: %.1f %% of the label pixels are 255, and were taken for unlabelled: --ignore 255 says so, "
                "--classes NAME=255 makes them a class", 100 * share,
            )  # fmt: skip
        for name in SPLITS:
            part = description["splits"][name]
            log.info("tile: %s: %d tiles, %d scenes", name, part["tiles"], part["scenes"])
        if not description["splits"]["val"]["tiles"]:
            log.warning("tile: no validation tiles: training will have to validate on its own tiles")
        for sentence in unmeasured_classes(description):
            log.warning("tile: %s", sentence)
        if unseen := unseen_classes(description):
            log.warning("tile: no training tile shows %s: a network can't learn it from these", ", ".join(unseen))
        for band, words in wild_bands(description).items():
            log.warning("tile: band %s: %s: a missing value that no file declares? --nodata says it", band, words)
        run.finish()
    return out


def _shapes_text(area: label_module.Features | None) -> str:
    """An area as datasets' states hold it, written out: the words were a dataclass's own once."""
    if area is None:
        return "None"
    return (
        f"Features(url={area.url!r}, crs={area.crs!r}, wkb={area.wkb!r}, values={area.values!r}, "
        f"numbers={area.numbers!r})"
    )


def _names(value: str | Sequence[str] | None) -> list[str] | None:
    if not value:
        return None
    return [part.strip() for part in (value.split(",") if isinstance(value, str) else value)]


def _with_bands(scenes: Sequence[Scene], asked: Sequence[str] | None) -> tuple[list[Scene], list[Refusal]]:
    """Scenes with exactly the dataset's bands: those asked for, else those that most scenes have."""
    if not scenes:
        return [], []
    names = tuple(asked) if asked else Counter(scene.band_names for scene in scenes).most_common(1)[0][0]
    good, refused = [], []
    for scene in scenes:
        missing = [name for name in names if name not in scene.band_names]
        if missing:
            reason = (
                f"lacks band {', '.join(missing)} of the dataset's {', '.join(names)}; it has "
                f"{', '.join(scene.band_names)}; choose common ones with --bands"
            )
            refused.append(Refusal(scene.url, "tile", reason))
        else:
            good.append(scene.select(names))
    return good, refused


def _that_state_scales(scenes: Sequence[Scene]) -> tuple[list[Scene], list[Refusal]]:
    good, refused = [], []
    for scene in scenes:
        unsaid = [band.name for band in scene.bands if band.scale is None and band.offset is None]
        if unsaid:
            reason = f"states no scale or offset for {', '.join(unsaid)}, and --values scaled needs them"
            refused.append(Refusal(scene.url, "tile", reason))
        else:
            good.append(scene)
    return good, refused


def _rows_by_scene(
    rows: Sequence[Mapping[str, str]], scenes: Sequence[Scene]
) -> tuple[dict[str, str], dict[str, str], list[Refusal]]:
    """Label url and, where said, split of each scene of a pairs file, by scene id; scenes that no line names."""
    by_url = {row["scene"]: row for row in rows}
    labels_of, split_of, refused = {}, {}, []
    for scene in scenes:
        row = by_url.get(storage.absolute(scene.url)) or by_url.get(storage.parent(storage.absolute(scene.url)))
        if row is None:
            reason = "no line of the pairs file names this scene; name each one itself, not a catalogue or a glob"
            refused.append(Refusal(scene.url, "labels", reason))
            continue
        labels_of[scene.scene_id] = row["labels"]
        if row.get("split"):
            split_of[scene.scene_id] = row["split"]
    return labels_of, split_of, refused


def _dtype(scenes: Sequence[Scene], values: str) -> str:
    if values == "scaled":
        return "float32"
    return str(np.result_type(*{band.dtype for scene in scenes for band in scene.bands}))


def _background(background: str | None, classes: Sequence[SegmentClass] | None) -> int:
    if background is None:
        return 0
    if classes:
        return label_module.background_id(background, classes) or 0
    value = legend.value_of(background)
    if value is None or not legend.is_id(value):
        raise UsageError(
            f"--background {background!r} is no class; classes are not named (--classes); give a label value"
        )
    return int(value)


# --- dealing tiles to splits -------------------------------------------------------------------------------------


def _rule(
    scenes: Sequence[Scene],
    sources: Mapping[str, LabelSource],
    by: str,
    fractions: tuple[float, float, float],
    seed: int,
    size: int,
    cell: int,
    buffer: int,
    fixed: Mapping[str, str],
) -> SplitRule:
    """How this archive is dealt; warns of leaks that a pairs file asked for."""
    import shapely

    shapes = [shapely.from_wkb(scene.footprint) if scene.footprint else None for scene in scenes]
    if fixed:
        rule = SplitRule("scene", fractions, seed, 0, 0, dict(fixed))
        rule = replace(rule, fixed={scene.scene_id: rule.of(scene.scene_id) for scene in scenes})
        for one, other in _touching(shapes, 0):
            if rule.of(scenes[one].scene_id) != rule.of(scenes[other].scene_id):
                log.warning(
                    "tile: %s (%s) and %s (%s) show common ground: the pairs file asks for it, but metrics "
                    "will flatter the model",
                    scenes[one].scene_id, rule.of(scenes[one].scene_id),
                    scenes[other].scene_id, rule.of(scenes[other].scene_id),
                )  # fmt: skip
        return rule
    places = split_module.same_place(_touching(shapes, 0.5), len(scenes))
    if by == "auto":
        by = "scene" if len(set(places)) >= 8 or not any(shapes) else "block"
    if by == "scene":
        rule = SplitRule("scene", fractions, seed, 0, buffer)
        sizes: Counter[str] = Counter()
        for scene, place in zip(scenes, places, strict=True):
            sizes[scenes[place].scene_id] += scene.height * scene.width
        rule = split_module.fill_empty(rule, sizes)
        dealt = {scene.scene_id: rule.of(scenes[place].scene_id) for scene, place in zip(scenes, places, strict=True)}
        return replace(rule, fixed=dealt)
    gsd = float(np.median([scene.gsd for scene in scenes if scene.gsd] or [1.0]))
    rule = SplitRule("block", fractions, seed, cell * size * gsd, buffer)
    drawn = all(source.shapes is not None and source.background is None for source in sources.values())
    areas = _cells_drawn(sources.values(), rule.cell) if drawn else _cells_of(scenes, shapes, rule.cell)
    return split_module.fill_empty(rule, areas)


def _not_around_shapes(
    sources: Mapping[str, LabelSource],
    stride: int | None,
    split: str,
    fixed: Mapping[str, str],
) -> str | None:
    """Why windows can't be laid around shapes; None if nothing speaks against it."""
    if any(source.shapes is None for source in sources.values()):
        return "the labels are rasters; give vectors, or --windows grid"
    if any(source.background is not None for source in sources.values()):
        return "--background labels whole scenes; leave it out, or give --windows grid"
    if stride is not None:
        return f"--stride {stride} is for a grid; leave it out, or give --windows grid"
    if split != "auto" or fixed:
        said = f"--split {split} deals ground or scenes" if split != "auto" else "the pairs file says a scene's split"
        return f"{said}, and these are dealt by groups of shapes; leave it out, or give --windows grid"
    return None


def _few_shapes(
    scenes: Sequence[Scene],
    sources: Mapping[str, LabelSource],
    aoi: tuple[bytes, str] | None,
    *,
    size: int,
    must: bool,
) -> list[Drawn] | None:
    """The shapes to lay windows around; None where a grid of this size is better, see `shape_windows.are_few`."""
    drawn = shape_windows.draw(scenes, sources, aoi, only_few=not must)
    if not drawn:
        if must:
            raise UsageError("windows around shapes: no shape holds the centre of a pixel of a scene")
        return None
    return drawn if must or shape_windows.are_few(drawn, scenes, size) else None


def _by_hand(description: Mapping[str, Any]) -> dict[str, int | None]:
    """What was asked for by hand of tiles around shapes: there, what `size` and `buffer` came to is no setting."""
    settings = description["settings"]
    size, buffer = description["size"], description["split_rule"]["buffer"]
    return {
        "size": size if size == settings["size"] else None,
        "buffer": buffer if buffer == settings["buffer"] else None,
        "stride": None,
    }


def _look_at_shapes(
    spark: SparkSession,
    scenes: Sequence[Scene],
    sources: Mapping[str, LabelSource],
    drawn: Sequence[Drawn],
    aoi: tuple[bytes, str] | None,
    work: str,
    *,
    nodata: float | None,
    scaled: bool,
) -> tuple[list[Drawn], dict[str, str | None], list[tuple[str, set[str] | None]]]:
    """The shapes that show a valid pixel, with how many they show; scenes that can't be read, with reasons; and, by
    scene id, bands of which a valid pixel was seen.

    Outlines alone don't say it: at the edge of a swath shapes lie on nothing, and later shapes hide earlier ones.
    """
    numbers_of: dict[str, list[int]] = defaultdict(list)
    for number, one in enumerate(drawn):
        numbers_of[one.scene_id].append(number)
    looks: list[bytes] = []
    filed: dict[bytes, str] = {}
    for scene in scenes:
        numbers = numbers_of[scene.scene_id]
        found = shape_windows.to_look_at([drawn[number] for number in numbers], scene)
        for first in range(0, len(found), LOOKS):
            windows = [
                (window, [(numbers[index], drawn[numbers[index]]) for index in within])
                for window, within in found[first : first + LOOKS]
            ]
            looks.append(_pack(_Look(scene, sources[scene.scene_id], aoi, windows), work, filed))
    rows = spark.sparkContext.parallelize(looks, max(min(len(looks), 4 * engine.slots(spark)), 1))
    pixels: Counter[int] = Counter()
    bad: dict[str, str | None] = {}
    bands_seen: list[tuple[str, set[str] | None]] = []
    for scene_id, found_there, bands, reason in rows.mapPartitions(
        engine.on_worker(partial(_shown, nodata=nodata, scaled=scaled))
    ).collect():
        pixels.update(found_there)
        bands_seen.append((scene_id, bands))
        if reason:
            bad[scene_id] = min(reason, bad.get(scene_id) or reason)
    seen = [
        replace(one, pixels=pixels[number])
        for number, one in enumerate(drawn)
        if pixels[number] and one.scene_id not in bad
    ]
    every, left = len({one.key for one in drawn if one.scene_id not in bad}), len({one.key for one in seen})
    if 0 < left < every:
        log.warning(
            "tile: %d of %d shapes show no valid pixel (missing values, or other shapes drawn over them): they count "
            "for nothing", every - left, every,
        )  # fmt: skip
    return seen, bad, [(scene_id, bands) for scene_id, bands in bands_seen if scene_id not in bad]


def _touching(shapes: Sequence[Any], share: float) -> Iterator[tuple[int, int]]:
    """Pairs of footprints that share more than this part of the smaller one."""
    import shapely

    known = [index for index, shape in enumerate(shapes) if shape is not None]
    if not known:  # shapely refuses an empty list
        return
    tree = shapely.STRtree([shapes[index] for index in known])
    for one, other in tree.query([shapes[index] for index in known], predicate="intersects").T:
        a, b = known[one], known[other]
        if a < b and shapes[a].intersection(shapes[b]).area > share * min(shapes[a].area, shapes[b].area):
            yield a, b


def _cells_drawn(sources: Iterable[LabelSource], cell: float) -> dict[str, float]:
    """The ground cells in which shapes were drawn: where labels are sparse, ground without any is of no use."""
    import geopandas

    from sattile.shapes import unpack

    sizes: dict[str, float] = {}
    for source in set(sources):
        if source.shapes:
            shapes = geopandas.GeoSeries(unpack(source.shapes)[0], crs=source.crs).to_crs(4326)
            points = shapes.representative_point()
            sizes |= dict.fromkeys(split_module.cells_at(points.x.to_numpy(), points.y.to_numpy(), cell), 1.0)
    return sizes


def _cells_of(scenes: Sequence[Scene], shapes: Sequence[Any], cell: float) -> dict[str, float]:
    """How much of the archive lies in each ground cell, from the footprints' rectangles; scenes without CRS are
    dealt whole."""
    sizes: dict[str, float] = defaultdict(float)
    for scene, shape in zip(scenes, shapes, strict=True):
        if shape is None:
            sizes[scene.scene_id] += 1.0
            continue
        for part in getattr(shape, "geoms", [shape]):
            for key, share in split_module.cell_shares(part.bounds, cell).items():
                sizes[key] += share
    return dict(sizes)


# --- the plan: what each task cuts ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """Some rows of tiles of one scene: what a task is given.

    Attributes:
        rows: first pixel rows of the tiles.
        alone: whether its tiles get part files of their own (pieces of large scenes).
        held: WKB in EPSG:4326 of ground that this scene's tiles must not touch (`scene` rule).
        aoi: WKB and its CRS, or None.
        placed: instead of rows, windows around shapes with their splits and groups, in (row, col) order.
    """

    scene: Scene
    source: LabelSource
    rows: tuple[int, ...]
    alone: bool
    split: str | None
    held: bytes | None
    aoi: tuple[bytes, str] | None
    placed: tuple[tuple[Window, str, str], ...] = ()


def _plan(
    scenes: Sequence[Scene],
    sources: Mapping[str, LabelSource],
    rule: SplitRule,
    as_given: bool,
    size: int,
    stride: int,
    aoi: tuple[bytes, str] | None,
    slots: int,
    work: str = "",
) -> list[list[tuple[bytes]]]:
    """Chunks, packed and grouped into tasks of about `TASK_PIXELS` each; less where that would leave a slot idle at the
    end.

    Args:
        work: folder for what is too large to be in each chunk (`FILED_FROM`).
    """
    held = {} if as_given or rule.by != "scene" else _held(scenes, rule)
    filed: dict[bytes, str] = {}
    tasks: list[list[tuple[bytes]]] = []
    shared: list[tuple[bytes]] = []
    shared_pixels = 0
    total = sum(scene.height * scene.width for scene in scenes)
    enough = min(TASK_PIXELS / 4, total / (3 * slots))
    most = min(TASK_PIXELS, max(total / (4 * slots), SMALL_PIXELS))
    for scene in scenes:
        rows = grid.starts(scene.height, size, stride)
        pixels = scene.height * scene.width
        small = pixels <= SMALL_PIXELS
        step = len(rows) if small else max(round(most / (scene.width * stride)), 1)
        alone_in_split = rule.of(scene.scene_id) if rule.by == "scene" or scene.footprint is None else None
        for first in range(0, len(rows), step):
            chunk = Chunk(
                scene, sources[scene.scene_id], tuple(rows[first : first + step]), not small, alone_in_split,
                held.get(scene.scene_id), aoi,
            )  # fmt: skip
            packed = (_pack(chunk, work, filed),)
            if small:
                shared.append(packed)
                shared_pixels += pixels
                if shared_pixels >= enough:
                    tasks.append(shared)
                    shared, shared_pixels = [], 0
            else:
                tasks.append([packed])
    return [*tasks, shared] if shared else tasks


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, work: str, filed: dict[bytes, str]):
        super().__init__(file)
        self.work, self.filed = work, filed

    def persistent_id(self, one: Any) -> str | None:
        if type(one) is not bytes or len(one) < FILED_FROM:
            return None
        if one not in self.filed:
            url = storage.join(self.work, f"large-{len(self.filed):05d}")
            storage.write_bytes(url, one)
            self.filed[one] = url
        return self.filed[one]


def _pack(chunk: Chunk | _Look, work: str, filed: dict[bytes, str]) -> bytes:
    """A chunk for a task; what is large in it, such as the shapes of its scene, goes into a file, once for all chunks.

    Args:
        filed: urls of what is in files already.
    """
    file = io.BytesIO()
    _Packer(file, work, filed).dump(chunk)
    return file.getvalue()


class _Unpacker(pickle.Unpickler):
    def persistent_load(self, url: str) -> bytes:
        return _read_large(url)


@lru_cache(maxsize=4)
def _read_large(url: str) -> bytes:
    return storage.read_bytes(url)


def _plan_around(
    scenes: Sequence[Scene],
    sources: Mapping[str, LabelSource],
    planned: ShapeWindows,
    aoi: tuple[bytes, str] | None,
    slots: int,
    work: str,
) -> list[list[tuple[bytes]]]:
    """Chunks of windows around shapes, a scene each, grouped into tasks of about as many windows; `work` as above."""
    enough = max(sum(map(len, planned.placed.values())) / (3 * slots), 1)
    tasks: list[list[tuple[bytes]]] = [[]]
    filed: dict[bytes, str] = {}
    count = 0
    for scene in scenes:
        placed = planned.placed.get(scene.scene_id, ())
        if count >= enough:
            tasks.append([])
            count = 0
        chunk = Chunk(scene, sources[scene.scene_id], (), False, None, None, aoi, placed)
        tasks[-1].append((_pack(chunk, work, filed),))
        count += len(placed)
    return tasks


def _held(scenes: Sequence[Scene], rule: SplitRule) -> dict[str, bytes]:
    """For each scene, the ground of scenes in splits that come before its own (test, then val, then train)."""
    import shapely

    rank = {"test": 0, "val": 1, "train": 2}
    known = [scene for scene in scenes if scene.footprint]
    shapes = [shapely.from_wkb(scene.footprint) for scene in known]
    tree = shapely.STRtree(shapes)
    found = {}
    for scene, shape in zip(known, shapes, strict=True):
        # A buffer around a tile may reach over the scene's edge: look a little further.
        near = tree.query(shapely.buffer(shape, 0.5), predicate="intersects")
        before = [shapes[i] for i in near if rank[rule.of(known[i].scene_id)] < rank[rule.of(scene.scene_id)]]
        if before:
            found[scene.scene_id] = shapely.to_wkb(shapely.union_all(before))
    return found


# --- on executors -----------------------------------------------------------------------------------------------------


LOOKS = 64
"""Windows with shapes that are looked at in one go."""


@dataclass(frozen=True)
class _Look:
    """Windows of a scene to be looked at, each with the shapes that it may show and their numbers, as drawn."""

    scene: Scene
    source: LabelSource
    aoi: tuple[bytes, str] | None
    windows: list[tuple[Window, list[tuple[int, Drawn]]]]


def _shown(looks: Iterable[bytes], **how: Any) -> Iterator[tuple[str, dict[int, int], set[str], str | None]]:
    """In a Spark task: (scene id, {number of a shape: valid pixels that it shows}, bands of which a valid pixel was
    seen, why the scene can't be read)."""
    from sattile.decoder import read_ahead

    for packed in looks:
        look: _Look = _Unpacker(io.BytesIO(packed)).load()
        pixels, bands, reason = Counter[int](), set[str](), None

        def call(one: tuple[Window, Any], look: _Look = look) -> Callable[[], Any]:
            return partial(read_labelled, look.scene, one[0], look.source, aoi=look.aoi, look=True, **how)

        for (window, drawn), read in read_ahead(look.windows, call, lambda _: "the scene"):
            if isinstance(read, Refused):
                reason = read.reason
                continue
            bands.update(read.seen)
            labels = np.where(read.valid, read.labels, np.uint8(IGNORE))
            counts = shape_windows.shown(labels, window, [one for _, one in drawn])
            pixels.update({number: count for (number, _), count in zip(drawn, counts, strict=True)})
        yield look.scene.scene_id, dict(pixels), bands, reason


@dataclass
class Piece:
    """What one chunk became; travels back to the driver.

    Attributes:
        files: per split, (path below the work folder, rows of each row group).
        tiles, class_pixels, valid_pixels: per split.
        dropped: tiles left out, by reason.
        read, undeclared: pixels of labels read, and those that are 255 though nobody says what that means.
        seen: bands of which a valid pixel was seen; of a piece without a valid pixel, else all.
        digest: sum of the rows' sha256, modulo 2**256: the same whatever the order.
        statistics: of the training tiles, per band.
    """

    scene_id: str
    refused: str | None = None
    files: dict[str, list[tuple[str, list[int]]]] = field(default_factory=dict)
    tiles: Counter[str] = field(default_factory=Counter)
    valid_pixels: Counter[str] = field(default_factory=Counter)
    class_pixels: dict[str, np.ndarray] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    read: int = 0
    undeclared: int = 0
    seen: set[str] | None = None
    digest: int = 0
    statistics: list[BandStatistics] = field(default_factory=list)
    peak_memory: float = 0.0


def _cut(batches: Iterable[pandas.DataFrame], **settings: Any) -> Iterator[pandas.DataFrame]:
    """mapInPandas: rows `chunk` (a pickled Chunk) in, rows `piece` (a pickled Piece) out."""
    import pandas

    with storage.scratch() as folder:
        cutter = _Cutter(folder, **settings)
        for batch in batches:
            for packed in batch["chunk"]:
                cutter.cut(_Unpacker(io.BytesIO(packed)).load())
        for piece in cutter.finish():
            yield pandas.DataFrame({"piece": [pickle.dumps(piece)]})


class _Cutter:
    """Cuts the chunks of one task into part files on local scratch, and uploads those when they are whole."""

    def __init__(
        self, folder: str, *, work: str, size: int, stride: int, nodata: float | None, scaled: bool, dtype: str,
        rule: SplitRule, background: int, min_valid: float, min_labelled: float, keep_background: float,
        bands: int,
    ):  # fmt: skip
        self.folder, self.work, self.size, self.nodata, self.scaled = folder, work, size, nodata, scaled
        self.stride, self.dtype, self.rule, self.background = stride, dtype, rule, background
        self.min_valid, self.min_labelled, self.keep_background, self.bands = (
            min_valid, min_labelled, keep_background, bands,
        )  # fmt: skip
        tile_bytes = size * size * (bands * np.dtype(dtype).itemsize + 2)
        self.group = min(max((24 << 20) // tile_bytes, 16), 64)
        self.name = uuid.uuid4().hex[:12]  # a retried or speculative attempt writes files of its own
        self.parts: dict[tuple[str, str], Part] = {}
        self.pieces: list[Piece] = []

    def cut(self, chunk: Chunk) -> None:
        """Cut one chunk. A chunk that fails leaves nothing behind but the reason."""
        piece = Piece(chunk.scene.scene_id)
        key = f"{len(self.pieces):05d}" if chunk.alone else "shared"
        rows: list[tuple[str, dict[str, Any]]] = []
        try:
            for part, row in _refusing(self._tiles(chunk, piece)):
                if chunk.alone:
                    self._part(part, key).add(row)
                else:
                    rows.append((part, row))  # small: held back until the scene is known to be good
        except Refused as error:
            piece = Piece(chunk.scene.scene_id, refused=error.reason)
            for part in SPLITS:
                if (part, key) in self.parts and chunk.alone:
                    self.parts.pop((part, key)).discard()
        for part, row in rows if not piece.refused else ():
            self._part(part, key).add(row)
        if chunk.alone and not piece.refused:
            piece.files = self._close(key)
        self.pieces.append(piece)

    def finish(self) -> list[Piece]:
        """Upload what is open, and give account."""
        from sattile.memory import peak_mb

        shared = self._close("shared")
        good = [piece for piece in self.pieces if not piece.refused]
        for piece in self.pieces:
            piece.peak_memory = peak_mb()
        if shared:
            good[0].files = {split: [*good[0].files.get(split, []), *files] for split, files in shared.items()}
        return self.pieces

    def _part(self, part: str, key: str) -> Part:
        if (part, key) not in self.parts:
            path = os.path.join(self.folder, f"{part}-{key}.parquet")
            self.parts[part, key] = Part(path, self.group)
        return self.parts[part, key]

    def _close(self, key: str) -> dict[str, list[tuple[str, list[int]]]]:
        files: dict[str, list[tuple[str, list[int]]]] = {}
        for split_name in SPLITS:
            part = self.parts.pop((split_name, key), None)
            if part is not None:
                groups = part.close()
                name = f"{split_name}/part-{self.name}-{key}.parquet"
                storage.upload(part.path, storage.join(self.work, name))
                files[split_name] = [(name, groups)]
        return files

    def _tiles(self, chunk: Chunk, piece: Piece) -> Iterator[tuple[str, dict[str, Any]]]:
        """The tiles of a chunk that are kept, each with its split, in (row, col) order."""
        from sattile.decoder import read_ahead

        scene = chunk.scene
        piece.statistics = [BandStatistics(self.dtype) for _ in range(self.bands)]
        how: dict[str, Any] = {"nodata": self.nodata, "scaled": self.scaled, "aoi": chunk.aoi}

        def call(strip: _Strip) -> Callable[[], Any]:
            look = len(piece.seen or ()) < self.bands  # for bands without a valid pixel
            return partial(read_labelled, scene, strip.window, chunk.source, look=look, **how)

        for strip, read in read_ahead(self._strips(chunk, piece), call, lambda _: scene.scene_id):
            if isinstance(read, Refused):
                raise read
            piece.read += read.labels.size
            piece.undeclared += read.undeclared
            piece.seen = {*(piece.seen or ()), *read.seen}
            data, valid, labelled = read.data, read.valid, read.labels
            data = data.astype(self.dtype, copy=False)
            labelled = np.where(valid, labelled, np.uint8(IGNORE))
            for window, part, cell in strip.tiles:
                inside = window.slices(strip.window)
                tile_id = f"{scene.scene_id}/{window.row}/{window.col}"
                row = self._row(piece, tile_id, part, data[inside], labelled[inside], valid[inside])
                if row is not None:
                    row |= {"scene_id": scene.scene_id, "row": window.row, "col": window.col, "spatial_block": cell}
                    yield part, row

    def _strips(self, chunk: Chunk, piece: Piece) -> Iterator[_Strip]:
        """Runs of kept tiles side by side, each read in one go."""
        for row, kept in self._kept_by_row(chunk, piece):
            pixel_bytes = self.bands * np.dtype(self.dtype).itemsize + 2
            widest = max(STRIP_BYTES // (self.size * pixel_bytes), self.size)
            while kept:
                run = [kept.pop(0)]
                while kept and kept[0][0].col <= run[-1][0].stop_col and kept[0][0].stop_col - run[0][0].col <= widest:
                    run.append(kept.pop(0))
                first, last = run[0][0], run[-1][0]
                yield _Strip(Window(row, first.col, self.size, last.stop_col - first.col), run)

    def _kept_by_row(self, chunk: Chunk, piece: Piece) -> Iterator[tuple[int, list[tuple[Window, str, str]]]]:
        """(first pixel row, tiles with their splits and ground cells) of each row of tiles."""
        if chunk.placed:
            for row, run in itertools.groupby(chunk.placed, key=lambda one: one[0].row):
                yield row, list(run)
        stride_cols = grid.starts(chunk.scene.width, self.size, self.stride)
        for row in chunk.rows:
            windows = [Window(row, col, self.size, self.size) for col in stride_cols]
            dealt = self._deal(chunk, windows)
            left_out = sum(part is None for part, _ in dealt)
            if left_out:
                piece.dropped["across a border between splits, or outside the aoi"] += left_out
            yield row, [(window, part, cell) for window, (part, cell) in zip(windows, dealt, strict=True) if part]

    def _deal(self, chunk: Chunk, windows: Sequence[Window]) -> list[tuple[str | None, str]]:
        """(split, ground cell) of each tile; split None leaves it out."""
        import shapely

        scene = chunk.scene
        if scene.footprint is None:
            return [(chunk.split, scene.scene_id) for _ in windows]
        outlines = _outlines(scene, windows, 0)
        padded = _outlines(scene, windows, self.rule.buffer)
        cell_edge = self.rule.cell or self.size * (scene.gsd or 1.0)
        held = shapely.from_wkb(chunk.held) if chunk.held else None
        area = _aoi_outline(chunk.aoi)
        dealt: list[tuple[str | None, str]] = []
        for outline, wide in zip(outlines, padded, strict=True):
            if not (np.isfinite(outline).all() and np.isfinite(wide).all()):  # the edge of a full-disk image
                on_no_ground = self.rule.by == "block" or held is not None or area is not None
                dealt.append((None if on_no_ground else chunk.split, scene.scene_id))
                continue
            middle = np.unwrap(outline[0], period=360).mean(keepdims=True), outline[1].mean(keepdims=True)
            cell = split_module.cells(*middle, cell_edge)[0]
            if self.rule.by == "block":
                part = split_module.split_of_tile(self.rule, outline, wide)
            else:
                part = chunk.split
                if held is not None and shapely.intersects(
                    held, geography.on_globe(*(wide if part == "train" else outline))
                ):
                    part = None
            if area is not None and not shapely.intersects(area, geography.on_globe(*outline)):
                part = None
            dealt.append((part, cell))
        return dealt

    def _row(
        self, piece: Piece, tile_id: str, part: str, image: np.ndarray, labelled: np.ndarray, valid: np.ndarray
    ) -> dict[str, Any] | None:
        """One row of the dataset, None if the tile is not worth keeping; counted in `piece`."""
        pixels = self.size * self.size
        counts = np.bincount(labelled.ravel(), minlength=256)
        known = pixels - int(counts[IGNORE])
        if not known and not valid.any():
            piece.dropped["without a valid pixel"] += 1
            return None
        if not known or known < self.min_labelled * pixels:
            piece.dropped["too few labelled pixels"] += 1
            return None
        if int(valid.sum()) < self.min_valid * pixels:
            piece.dropped["too few valid pixels"] += 1
            return None
        only_background = self.keep_background < 1 and known == counts[self.background]
        if only_background and not split_module.kept_background(tile_id, self.keep_background, self.rule.seed):
            piece.dropped["background beyond the share that is kept"] += 1
            return None
        whole, laid = bool(valid.all()), np.empty(image.shape, image.dtype)
        for band in range(image.shape[-1]):
            plane = image[..., band]
            if part == "train":
                piece.statistics[band].add(plane.ravel() if whole else plane[valid])
            # Zero, not what a file holds under its mask: the same rows whatever wrote the file.
            laid[..., band] = plane if whole else np.where(valid, plane, np.zeros((), image.dtype))
        arrays = {"image": npy(laid), "labels": npy(labelled), "valid": npy(valid)}
        sha = hashlib.sha256(f"{part}\0{tile_id}\0".encode())
        for content in arrays.values():
            sha.update(content)
        piece.digest = (piece.digest + int.from_bytes(sha.digest(), "big")) % 2**256
        piece.tiles[part] += 1
        piece.valid_pixels[part] += int(valid.sum())
        piece.class_pixels[part] = piece.class_pixels.get(part, 0) + counts
        return {"tile_id": tile_id, **arrays}


def _refusing(items: Iterator[T]) -> Iterator[T]:
    """Turns what the items' own making raises into a refusal; what is done with them stays outside."""
    try:
        yield from items
    except Exception as error:
        raise refusal(error) from None


@dataclass(frozen=True)
class _Strip:
    window: Window
    tiles: list[tuple[Window, str, str]]


class LabelledWindow(NamedTuple):
    """A window of a scene with its labels.

    Attributes:
        data: (height, width, bands), a plane for each band in memory.
        valid: (height, width) bool.
        labels: (height, width) uint8.
        undeclared: how many labels are 255 though nobody says what that means.
        seen: names of the bands that have a valid pixel, where no pixel is valid in all; if they were looked for, else
            all names.
    """

    data: np.ndarray
    valid: np.ndarray
    labels: np.ndarray
    undeclared: int
    seen: list[str]


def read_labelled(
    scene: Scene,
    window: Window,
    source: LabelSource,
    *,
    nodata: float | None = None,
    scaled: bool = False,
    aoi: tuple[bytes, str] | None = None,
    look: bool = False,
) -> LabelledWindow:
    """Read a window of a scene with its labels. Runs in the decoder's process.

    Args:
        look: for the bands that have a valid pixel, where no pixel is valid in all.
    """
    from sattile import raster, shapes

    data, valid = raster.read(scene, window, nodata=nodata, scaled=scaled, by_band=True)
    seen = list(scene.band_names)
    if look and not valid.any():  # rare, and GDAL has the window's blocks still: which band is it?
        seen = [name for name in seen if raster.read(scene.select([name]), window, nodata=nodata)[1].any()]
    with about(f"labels {source.url}"):
        labelled, undeclared = label_module.read(source, scene, window)
    if aoi is not None:
        labelled = np.where(shapes.aoi_mask(aoi[0], aoi[1], scene, window), labelled, np.uint8(IGNORE))
    return LabelledWindow(data, valid, labelled, undeclared, seen)


def _outlines(scene: Scene, windows: Sequence[Window], pad: int) -> list[split_module.Outline]:
    """Longitudes and latitudes along the outline of each window with so many pixels around it."""
    wide = [window.pad(pad) for window in windows]
    sides = np.array([[one.row, one.col, one.stop_row, one.stop_col] for one in wide])
    return geography.outlines(str(scene.crs), scene.transform, sides)


def _whole_area(area: label_module.Features | None) -> tuple[bytes, str] | None:
    """The area of interest as one shape: WKB and its CRS."""
    import shapely

    return None if area is None else (shapely.to_wkb(shapely.union_all(shapely.from_wkb(list(area.wkb)))), area.crs)


@lru_cache(maxsize=1)
def _aoi_outline(aoi: tuple[bytes, str] | None) -> Any:
    """The area of interest in EPSG:4326, made ready for many questions."""
    if aoi is None:
        return None
    import geopandas
    import shapely

    area = geopandas.GeoSeries.from_wkb([aoi[0]], crs=aoi[1]).to_crs(4326).iloc[0]
    shapely.prepare(area)
    return area


# --- back on the driver -----------------------------------------------------------------------------------------------


def _describe(
    scenes: Sequence[Scene],
    sources: Sequence[Mapping[str, Any]],
    pieces: Sequence[Piece],
    classes: tuple[SegmentClass, ...] | None,
    rule: SplitRule,
    size: int,
    stride: int,
    settings: Mapping[str, Any],
    values: str,
) -> dict[str, Any]:
    """`dataset.json`, all of it from what the tasks counted."""
    dtype = _dtype(scenes, values)
    statistics = [BandStatistics(dtype) for _ in scenes[0].bands]
    splits: dict[str, dict[str, Any]] = {}
    seen = np.zeros(256, np.int64)
    dropped: Counter[str] = Counter()
    for piece in pieces:
        dropped.update(piece.dropped)
        for total, one in zip(statistics, piece.statistics, strict=False):
            total.merge(one)
    for name in SPLITS:
        counts = sum((piece.class_pixels[name] for piece in pieces if name in piece.class_pixels), np.zeros(256, int))
        seen += counts
        files = sorted(
            ((path, groups) for piece in pieces for path, groups in piece.files.get(name, ())), key=lambda one: one[0]
        )
        splits[name] = {
            "tiles": sum(piece.tiles[name] for piece in pieces),
            "scenes": len({piece.scene_id for piece in pieces if piece.tiles[name]}),
            "files": [path for path, _ in files],
            "row_groups": [groups for _, groups in files],
            "rows": [sum(groups) for _, groups in files],
            "valid_pixels": sum(piece.valid_pixels[name] for piece in pieces),
            "labelled_pixels": int(counts[:IGNORE].sum()),
            "counts": counts,
        }
    classes = classes or legend.classes_of(np.flatnonzero(seen[:IGNORE]).tolist())
    for part in splits.values():
        counts = part.pop("counts")
        part["class_pixels"] = {str(one.id): int(counts[one.id]) for one in classes}
    digest = sum(piece.digest for piece in pieces) % 2**256
    gsds = [scene.gsd for scene in scenes if scene.gsd]
    good = {piece.scene_id for piece in pieces}
    trained = {piece.scene_id for piece in pieces if piece.tiles["train"]}
    return {
        "format": FORMAT,
        "bands": list(scenes[0].band_names),
        "dtype": dtype,
        "values": values,
        "size": size,
        "stride": stride,
        "gsd": float(np.median(gsds)) if gsds else None,
        **_whereabouts([one for one in scenes if one.scene_id in trained]),
        "classes": schema.describe_classes(classes),
        "ignore": IGNORE,
        "nodata": {
            band.name: sorted({str(one.bands[index].nodata) for one in scenes})
            for index, band in enumerate(scenes[0].bands)
        },
        "splits": splits,
        "dropped": dict(sorted(dropped.items())),
        "statistics": {
            band: total.summary() for band, total in zip(scenes[0].band_names, statistics, strict=True)
        },
        "split_rule": {**asdict(rule), "fixed": dict(sorted(rule.fixed.items()))},
        "sources": [
            {**source, "crs": scene.crs, "transform": scene.transform}
            for source, scene in zip(sources, scenes, strict=True)
            if scene.scene_id in good
        ],
        "settings": dict(settings),
        "digest": f"{digest:064x}",
    }  # fmt: skip


MOST_POINTS = 500
"""Of the footprint of all training scenes together; one of more is drawn by rectangles."""


def _whereabouts(scenes: Sequence[Scene]) -> dict[str, Any]:
    """Where and when the training scenes were taken: `footprint` (GeoJSON, EPSG:4326) and `interval` (first, last).

    None where a scene does not say it: a part would pass for the whole.
    """
    import shapely

    shapes = [shapely.from_wkb(one.footprint) for one in sorted(scenes, key=lambda one: one.scene_id) if one.footprint]
    interval = whole_span([one.span for one in scenes])
    whole = shapely.union_all(shapes)
    if shapely.get_num_coordinates(whole) > MOST_POINTS:
        whole = shapely.union_all(shapely.envelope(shapely.get_parts(whole)))
    if shapely.get_num_coordinates(whole) > MOST_POINTS:
        whole = shapely.envelope(whole)
    return {
        "footprint": json.loads(shapely.to_geojson(whole)) if shapes and len(shapes) == len(scenes) else None,
        "interval": list(map(utc, interval)) if interval else None,
    }


def _none_left(run: Run) -> str:
    table = storage.join(run.out, QUARANTINE)
    return f"no scene is left to tile; {table} has the reasons" + (f"; {why(run.refused)}" if run.refused else "")


def _blind(scenes: Sequence[Scene], bands_seen: Iterable[tuple[str, set[str] | None]]) -> dict[str, list[str]]:
    """{URL: bands without one valid pixel in all that was read} of scenes that have such bands.

    Args:
        bands_seen: by scene id; None where nothing was read.
    """
    seen: dict[str, set[str]] = {}
    for scene_id, names in bands_seen:
        if names is not None:
            seen.setdefault(scene_id, set()).update(names)
    read = [one for one in scenes if one.scene_id in seen]
    missing = {one.url: [name for name in one.band_names if name not in seen[one.scene_id]] for one in read}
    return {url: names for url, names in missing.items() if names}


def _without_valid(names: Sequence[str]) -> str:
    return (
        f"band {', '.join(names)} has no valid pixel (missing values or NaN everywhere), so no pixel of the scene "
        f"counts; leave it out with --bands, or replace the file"
    )


ASKED_OF_TILES = {
    "min_labelled": "too few labelled pixels",
    "min_valid": "too few valid pixels",
    "keep_background": "background beyond the share that is kept",
}
"""Options that leave tiles out, and what is said of these."""


def _why_empty(
    description: Mapping[str, Any],
    rule: SplitRule,
    size: int,
    blind: Mapping[str, Sequence[str]],
    none_shown: bool = False,
) -> str:
    every = len(description["sources"])
    told = ""
    if blind:
        url = min(blind)
        told = f"{url}: {_without_valid(blind[url])}"
        told += f" ({len(blind)} of {every} scenes are so)" if every > 1 else ""
    if len(blind) == every:
        return f"no training tile is left: {told}"
    counts = ", ".join(f"{number} {reason}" for reason, number in description["dropped"].items()) or "none was cut"
    if rule.by == "shapes":
        left_out = f"no training tile is left (windows of {size} px around shapes left out: {counts})"
        if none_shown:
            return (
                f"{left_out}: no shape holds a valid pixel; look at --nodata, and whether labels and scenes state the "
                f"right CRS"
            )
        settings = description["settings"]
        asked = [
            f"--{name.replace('_', '-')} {settings[name]:g}"
            for name, reason in ASKED_OF_TILES.items()
            if reason in description["dropped"] and settings[name] != (name == "keep_background")
        ]
        return left_out + (
            f": {' and '.join(asked)} leave{'s' * (len(asked) == 1)} none; ask for less, or give a smaller --size"
            if asked
            else "; more shapes are needed"
        )
    remedy = (
        f"ground blocks are {rule.cell:.0f} m wide and a buffer of {rule.buffer} px is kept: give a smaller --size, "
        f"--cell or --buffer, or more scenes"
        if rule.by == "block"
        else "give more scenes, a smaller --buffer, or --split block"
    )
    return f"no training tile is left (tiles of {size} px left out: {counts}); {remedy}" + (
        f"; and {told}" if told else ""
    )


def _publish(out: str, work: str, description: dict[str, Any]) -> None:
    """Move the parts into place, then `dataset.json`, which makes them the dataset; then drop those of before."""
    for name in SPLITS:
        part = description["splits"][name]
        groups = part.pop("row_groups")
        moved = []
        for number, path in enumerate(part["files"]):
            target = f"part-{number:05d}-{storage.name(path).split('-')[1]}.parquet"
            storage.rename(storage.join(work, path), storage.join(out, name, target))
            moved.append(target)
        part["files"] = moved
        if moved:
            metadata = petastorm_metadata(description, dict(zip(moved, map(len, groups), strict=True)))
            storage.write_bytes(storage.join(out, name, "_common_metadata"), metadata)
    storage.write_json(storage.join(out, DESCRIPTION), description)
    for name in SPLITS:
        listed = set(description["splits"][name]["files"])
        for entry in storage.list_folder(storage.join(out, name)):
            base = storage.name(entry.url)
            if base.startswith("part-") and base not in listed:
                storage.remove(entry.url)
        if not listed:
            storage.remove(storage.join(out, name))
