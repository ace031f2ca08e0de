"""Commands one after the other, each into a folder of its own below one: the whole loop, and what cron calls."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sattile import engine, storage
from sattile import record as records
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
"""By step, in their order."""

STEPS = {
    "run": tuple(FOLDERS),
    "demo": tuple(FOLDERS),
    "reprocess": ("index", "predict", "report"),
    "search": ("train",),
}
"""Whose settings a command takes beside its own."""


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

    What follows from something that has changed is made anew: other tiles, another model, other maps. Where tiles lie
    around few shapes (see windows of tile), a network that sees each pixel by itself is trained, and measured on all
    shapes that were left out; settings of train say otherwise.

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
    from sattile.dataset import read_dataset, read_description
    from sattile.labels import read_pairs

    steps = _checked("run", settings)
    engine.check(spark)
    arguments = [row["scene"] for row in read_pairs(pairs)] if pairs else scenes

    with Run("run", out, {"steps": steps, **reading, "classes": classes}, shared["overwrite"], 1.0) as record:
        step = _Steps(spark, record, steps)
        folder = step.folder
        # Settings are agreed on above, for all steps; below, what differs follows from a step before.
        shared = {**shared, "overwrite": True}
        if prepare is not None:
            prepare()
        step("index", scenes=arguments, **reading, **shared)
        labelled: dict[str, Any] = {"pairs": pairs} if pairs else {"scenes": [folder("index")], "labels": labels}
        if pairs:
            labelled |= reading
        step("tile", **labelled, classes=classes, **shared)
        chosen = _for_few_shapes(read_description(folder("tile")) or {}, steps.get("train", {}))
        if chosen:
            record.extra["train"] = chosen
            said = ", ".join(f"{name} {value}" for name, value in chosen.items())
            log.info("run: few shapes: training with %s (--set train.NAME=... says otherwise)", said)
        step("train", dataset=folder("tile"), overwrite=shared["overwrite"], **chosen)
        dataset = read_dataset(folder("tile"))
        splits = dataset["splits"]
        left_out = [name for name in ("val", "test") if splits[name]["tiles"]]
        if "windows" in dataset and left_out:
            split = ",".join(left_out)  # of few shapes, all that training did not see
        else:
            split = next((name for name in ("test", "val", "train") if splits[name]["tiles"]), "train")
        if "test" not in split:
            log.warning("run: no test tiles: evaluating on %s, which flatters the model", split)
        step("evaluate", model=folder("train"), dataset=folder("tile"), split=split, overwrite=shared["overwrite"])
        step("predict", model=folder("train"), scenes=[folder("index")], nodata=reading["nodata"], **shared)
        step("report", folders=[folder(name) for name in FOLDERS if name != "report"])
        record.done = len(FOLDERS)
        record.finish()
    return step.end()


def _for_few_shapes(dataset: Mapping[str, Any], said: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of `train` for tiles around shapes, but for those that the user said; none for other tiles.

    A few hundred pixels teach colours, no shapes; classes have as many as were drawn, which says nothing of how common
    they are. An epoch of so few tiles is a step or two, so there are more of both; and which of them was best on a few
    shapes is chance, so the last is kept, and these shapes measure it beside those of test.
    """
    if "windows" not in dataset:
        return {}
    tiles = max(dataset["splits"]["train"]["tiles"], 1)
    chosen = {
        "arch": "pixel-mlp", "epochs": min(max(10_000 // tiles, 30), 100), "batch_size": 4, "class_weights": "balanced",
        "keep": "last",
    }  # fmt: skip
    # What else the user said may need another one.
    for name, needs in (("batch_size", ("workers", "accumulate")), ("keep", ("patience",))):
        if any(one in said for one in needs):
            del chosen[name]
    return {name: value for name, value in chosen.items() if name not in said}


def reprocess(
    spark: SparkSession,
    *,
    model: str,
    scenes: Sequence[str],
    out: str,
    bands: str | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
    prune: bool = False,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Bring the maps of an archive up to date: index, predict and report; what is as it was is left so.

    For cron: a run that begins while the one before goes on is refused (2), and a killed one is finished by the next.
    `OUT/_run.json` names the maps that are `new`, `changed` and `removed`.

    Args:
        model: a bundle; of a folder of versions the latest, and once there is a later one all maps are made anew.
        scenes: files, globs, folders, STAC items: the archive.
        out: folder of it all: `catalog`, `mosaics` and `report` lie below.
        bands: names of the files' bands, see the README; 'blue=B02,...' says which is which.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value, whatever the files declare.
        prune: remove maps whose scenes are not among these any more; those of scenes that can't be read now stay.
        settings: of each step, by command: {'predict': {'merge': 'blend'}}; on the command line --conf, or --set
            predict.grid=EPSG:32633@10.
        overwrite: replace what was made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of the report.

    Raises:
        UsageError: wrong settings, missing files, an archive without scenes.
        TooManyRefused: after everything that is good has been published.
    """
    from sattile.model import load_models, split_models
    from sattile.sheets import parse_weights

    steps = _checked("reprocess", settings or {})
    engine.check(spark)
    bundle = load_models(model)
    reading = {"bands": bands, "pattern": pattern, "nodata": nodata}
    # The same from whatever folder it is called.
    out, archive = storage.absolute(out), [storage.absolute(one) for one in scenes]
    models = [storage.absolute(one).rstrip("/") for one in split_models(model)]
    for name in {"aoi", "like"} & steps.get("predict", {}).keys():
        steps["predict"][name] = storage.absolute(steps["predict"][name])
    agreed = {"model": ",".join(models), "steps": steps, **reading}
    if pattern and bands is None:
        # As `predict` does by itself: files that the model does not want would lend their grid to the others.
        cloud = parse_weights(steps.get("predict", {}).get("weights")).cloud
        reading["bands"] = ",".join([*bundle.bands, *([cloud] if cloud else [])])
    with Run("reprocess", out, agreed, overwrite, 1.0) as record:
        step = _Steps(spark, record, steps)
        # Settings are agreed on above; what differs below is another version of the model.
        shared = {"overwrite": True, "max_failed_fraction": max_failed_fraction}
        maps = step.folder("predict")
        before = record.notes.get("before")  # of a run that was killed: what it published is new, too
        if before is None:
            before = _published(maps)
            record.note(before=before)
        step("index", scenes=archive, **reading, **shared)
        # Of another version of the model nothing goes that it can't replace.
        stale = "remove" if prune else "auto" if overwrite else "keep"
        step("predict", model=bundle.url, scenes=[step.folder("index")], nodata=nodata, stale=stale, **shared)
        step("report", folders=[step.folder("index"), maps])
        now = _published(maps)
        changes = {
            "new": [name for name in now if name not in before],
            "changed": [name for name in now if name in before and now[name] != before[name]],
            "removed": [name for name in before if name not in now],
        }
        record.done = len(changes["new"]) + len(changes["changed"])
        record.skipped = len(now) - record.done
        record.finish(model=bundle.url, **changes)
    told = ", ".join(f"{len(names)} {word}" for word, names in changes.items())
    records.announce(f"maps: {told}, {record.skipped} as they were")
    return step.end()


def _published(maps: str) -> dict[str, str]:
    """Digests of the finished maps of a folder, by name: of all that their items say, checksums among it."""
    from sattile import mosaic

    return {name: storage.digest(item) for name, item in mosaic.finished(maps)} if storage.exists(maps) else {}


def _functions() -> dict[str, Callable[..., str]]:
    """The steps by name."""
    from sattile.evaluation import evaluate
    from sattile.prediction import predict
    from sattile.reporting import report
    from sattile.scenes import index
    from sattile.tiles import tile
    from sattile.training import train

    return {"index": index, "tile": tile, "train": train, "evaluate": evaluate, "predict": predict, "report": report}


@dataclass
class _Steps:
    """Runs steps, each into its folder below the out folder of the record.

    Attributes:
        settings: of each step by hand; they go before what the chain says.
        late: what was refused beyond the limit: the next steps go on with what is good.
    """

    spark: SparkSession
    record: Run
    settings: Mapping[str, Mapping[str, Any]]
    late: list[TooManyRefused] = field(default_factory=list)

    def folder(self, name: str) -> str:
        return storage.join(self.record.out, FOLDERS[name])

    def __call__(self, name: str, **options: Any) -> None:
        session = (self.spark,) if name != "report" else ()
        with self.record.stage(name):
            try:
                _functions()[name](*session, **{**options, **self.settings.get(name, {})}, out=self.folder(name))
            except TooManyRefused as error:
                self.late.append(error)
            except UsageError as error:
                if not self.late:
                    raise
                # What was refused may have left nothing for this step.
                raise TooManyRefused(f"{self._told()}; and {name} went no further: {error}") from error
            self.record.refused.extend(records.read_quarantine(self.folder(name)))  # told already, by the step

    def _told(self) -> str:
        return "; ".join(str(error) for error in self.late)

    def end(self) -> str:
        """URL of the report.

        Raises:
            TooManyRefused: if a step raised it.
        """
        page = storage.join(self.folder("report"), "index.html")
        if self.late:
            raise TooManyRefused(f"{self._told()}; the report is {page}")
        return page


CHOSEN = {"out", "scenes", "labels", "pairs", "model", "dataset", "folders", "dry_run"}
"""What the chain itself says to its steps."""


def _checked(chain: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Settings of the steps of a chain.

    Raises:
        UsageError: for settings that no step has, before the first one runs.
    """
    for name, part in settings.items():
        if name not in STEPS[chain]:
            raise UsageError(f"settings of {name}: steps are {', '.join(STEPS[chain])}")
        known = set(inspect.signature(_functions()[name]).parameters) - CHOSEN - {"spark"}
        for option in part:
            if option in CHOSEN:
                raise UsageError(f"{name}.{option} is chosen by the chain of commands; leave it out of the settings")
            if option not in known:
                raise UsageError(f"{name}.{option} is no setting; there are {', '.join(sorted(known))}")
    return {name: dict(part) for name, part in settings.items()}


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
