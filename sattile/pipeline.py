"""The whole loop: index, tile, train, evaluate, predict, report, each into a folder of its own below one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sattile import storage
from sattile.errors import TooManyRefused, UsageError
from sattile.record import Run

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

FOLDERS = {
    "index": "catalog",
    "tile": "tiles",
    "train": "model",
    "evaluate": "evaluation",
    "predict": "mosaics",
    "report": "report",
}


def run(
    spark: SparkSession,
    *,
    out: str,
    scenes: Sequence[str] | None = None,
    labels: str | None = None,
    pairs: str | None = None,
    bands: str | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
    classes: str | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Index, tile, train, evaluate, predict and report; a rerun does only what has changed.

    What follows from something that has changed is made anew: other tiles, another model, other maps.

    Args:
        out: folder of it all; each step has a folder of its own below.
        scenes: files, globs, folders, STAC items; with labels.
        labels: one file, matched by location, or a folder with a file named after each scene_id.
        pairs: instead of both, a CSV with columns scene, labels and, if wanted, split.
        bands: names to take, in this order; all if not given.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value, whatever the files declare.
        classes: 'land,water' (ids 0, 1), or 'land=0,water=1'.
        settings: of each step, by command: {'train': {'epochs': 10}}; on the command
            line --conf, or --set train.epochs=10.
        overwrite: replace what was made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of the report.

    Raises:
        UsageError: wrong settings, missing files.
        TooManyRefused: after everything that is good has been published.
    """
    if (pairs is None) == (scenes is None or labels is None):
        raise UsageError("give either --scenes and --labels, or --pairs FILE.csv")
    return _chain(
        spark, storage.absolute(out), scenes=list(scenes or ()), labels=labels, pairs=pairs, classes=classes,
        reading={"bands": bands, "pattern": pattern, "nodata": nodata}, settings=settings or {},
        shared={"overwrite": overwrite, "max_failed_fraction": max_failed_fraction},
    )  # fmt: skip


def _chain(
    spark: SparkSession,
    out: str,
    *,
    scenes: list[str],
    labels: str | None,
    pairs: str | None,
    classes: str | None,
    reading: dict[str, Any],
    settings: Mapping[str, Mapping[str, Any]],
    shared: dict[str, Any],
    prepare: Callable[[], object] | None = None,
) -> str:
    """The steps one after the other; `prepare` runs first, once the out folder is known to be ours."""
    from sattile.dataset import read_dataset
    from sattile.evaluation import evaluate
    from sattile.labels import read_pairs
    from sattile.prediction import predict
    from sattile.reporting import report
    from sattile.scenes import index
    from sattile.tiles import tile
    from sattile.training import train

    functions: dict[str, Callable[..., str]] = {
        "index": index,
        "tile": tile,
        "train": train,
        "evaluate": evaluate,
        "predict": predict,
        "report": report,
    }
    steps = {name: dict(part) for name, part in settings.items()}
    _check(steps, functions)
    folder = {name: storage.join(out, base) for name, base in FOLDERS.items()}
    arguments = [row["scene"] for row in read_pairs(pairs)] if pairs else scenes
    late: list[TooManyRefused] = []

    with Run("run", out, {"steps": steps, **reading, "classes": classes}, shared["overwrite"], 1.0) as record:
        # Settings are agreed on above, for all steps; below, what differs follows from a step before.
        shared = {**shared, "overwrite": True}

        def step(name: str, **options: Any) -> None:
            session = (spark,) if name != "report" else ()
            with record.stage(name):
                try:
                    functions[name](*session, **{**options, **steps.get(name, {})})
                except TooManyRefused as error:  # the others are published: go on with them
                    late.append(error)

        if prepare is not None:
            prepare()
        step("index", scenes=arguments, out=folder["index"], **reading, **shared)
        labelled: dict[str, Any] = {"pairs": pairs} if pairs else {"scenes": [folder["index"]], "labels": labels}
        if pairs:
            labelled |= reading
        step("tile", out=folder["tile"], **labelled, classes=classes, **shared)
        step("train", dataset=folder["tile"], out=folder["train"], overwrite=shared["overwrite"])
        splits = read_dataset(folder["tile"])["splits"]
        split = next((name for name in ("test", "val", "train") if splits[name]["tiles"]), "train")
        if split != "test":
            log.warning("run: no test tiles: evaluating on %s, which flatters the model", split)
        step("evaluate", model=folder["train"], dataset=folder["tile"], split=split,
             out=folder["evaluate"], overwrite=shared["overwrite"])  # fmt: skip
        step("predict", model=folder["train"], scenes=[folder["index"]], out=folder["predict"],
             nodata=reading["nodata"], **shared)  # fmt: skip
        step("report", folders=[folder[name] for name in FOLDERS if name != "report"], out=folder["report"])
        record.done = len(FOLDERS)
        record.finish()
    page = storage.join(folder["report"], "index.html")
    if late:
        raise TooManyRefused("; ".join(str(error) for error in late) + f"; the report is {page}")
    return page


CHOSEN = {"out", "scenes", "labels", "pairs", "model", "dataset", "folders"}
"""What the chain itself says to its steps."""


def _check(steps: Mapping[str, Mapping[str, Any]], functions: Mapping[str, Callable[..., str]]) -> None:
    """Refuse settings that no step has, before the first one runs."""
    for name, part in steps.items():
        if name not in functions:
            raise UsageError(f"settings of {name}: steps are {', '.join(functions)}")
        known = set(inspect.signature(functions[name]).parameters) - CHOSEN - {"spark"}
        for option in part:
            if option in CHOSEN:
                raise UsageError(f"{name}.{option} is chosen by the chain of commands; leave it out of the settings")
            if option not in known:
                raise UsageError(f"{name}.{option} is no setting; there are {', '.join(sorted(known))}")


def demo(
    spark: SparkSession,
    *,
    out: str = "demo",
    seed: int = 0,
    epochs: int | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """Make a small archive that looks and behaves like Sentinel-2, and run everything on it.

    Args:
        out: folder of it all.
        seed: another seed, another world.
        epochs: of training, fewer for a quick look.
        settings: of each step, beside those of the demo, as in `run`.

    Returns:
        URL of the report.
    """
    from sattile import demo as world

    out = storage.absolute(out)
    archive = storage.join(out, "archive")
    steps = {name: {**world.SETTINGS.get(name, {}), **(settings or {}).get(name, {})} for name in FOLDERS}
    steps |= {name: dict(part) for name, part in (settings or {}).items() if name not in FOLDERS}
    if epochs is not None:
        steps["train"]["epochs"] = epochs

    def prepare() -> None:
        log.info("demo: making scenes in %s", archive)
        world.make_archive(archive, seed=seed)

    return _chain(
        spark,
        out,
        scenes=[storage.join(archive, "scenes")],
        labels=storage.join(archive, "labels"),
        pairs=None,
        classes=world.CLASSES,
        reading={"bands": None, "pattern": None, "nodata": None},
        settings=steps,
        shared={"overwrite": True, "max_failed_fraction": 0.3},  # one of its files is corrupt on purpose
        prepare=prepare,
    )
