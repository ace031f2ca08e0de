"""Trainings over a small grid of settings, side by side as Spark tasks."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sattile import engine, storage
from sattile.errors import SattileError, UsageError, nearest
from sattile.record import Run
from sattile.schema import Refusal
from sattile.training.loop import Settings
from sattile.training.reader import Dataset, load_dataset

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

RESULT = "search.json"
TRIALS = "trials"

OPTIONS = {one.name: one.default for one in dataclasses.fields(Settings) if one.name != "warmup"}
"""What may vary, with the defaults that say their types."""


def search(
    spark: SparkSession,
    *,
    dataset: str,
    out: str,
    grid: str,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    max_failed_fraction: float = 0.1,
) -> str:
    """Train one model for each combination of some settings, and say which is best on the validation tiles.

    Each training is one Spark task with the cores that a task has, and a folder of its own below `out`, a bundle like
    any other. A rerun, also with a larger grid, does those that are missing.

    Args:
        spark: the caller's session.
        dataset: folder that `sattile tile` wrote.
        out: folder for the trials and `search.json`.
        grid: options of train and their values, 'arch=unet-small,light-small; learning_rate=1e-3,3e-3'.
        settings: those of train that all share; on the command line --set train.epochs=10.
        max_failed_fraction: failed trainings / all above which the command fails (3).

    Returns:
        URL of the best trial's bundle.

    Raises:
        UsageError: for a grid that can't be, before anything runs.
        SattileError: if all trainings failed.
    """
    from sattile.training import check, make_settings

    described = load_dataset(dataset)
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    shared = dict((settings or {}).get("train", {}))
    varied = parse_grid(grid)
    trials = []
    for one in varied:
        made = make_settings(described, {**shared, **one})
        check(made, described, workers=1, devices=1)
        trials.append(_job(dataset, out, described, made, one))
    with Run("search", out, {"dataset": described.digest}, False, max_failed_fraction) as run:
        run.inputs = [{"url": storage.join(dataset, "dataset.json"), "digest": described.digest}]
        run.given = len(trials)
        pixels = described.tiles("train") * described.size**2
        with run.stage("train", pixels=sum(pixels * job["settings"]["epochs"] for job in trials)):
            threads = int(spark.conf.get("spark.task.cpus", "1") or 1)
            with engine.progress(spark, "search"), engine.few_rows_a_batch(spark):
                numbers = spark.range(0, len(trials), 1, len(trials))
                work = engine.on_worker(partial(run_trials, jobs=trials, threads=threads))
                said = {
                    row.id: row
                    for row in numbers.mapInPandas(work, "id long, skipped boolean, reason string").collect()
                }
        run.refuse([Refusal(job["name"], "train", said[k].reason) for k, job in enumerate(trials) if said[k].reason])
        run.skipped = sum(row.skipped for row in said.values())
        run.done = len(trials) - len(run.refused) - run.skipped
        rows = sorted(
            (_result(job) for k, job in enumerate(trials) if not said[k].reason),
            key=lambda row: (-(row["val_miou"] or 0.0), row["trial"]),
        )
        if not rows:
            raise SattileError(f"all {len(trials)} trainings failed; the first: {said[0].reason}")
        result = {"best": rows[0]["trial"], "trials": rows}
        url = storage.join(out, RESULT)
        if not storage.exists(url) or storage.read_bytes(url) != storage.json_bytes(result):
            storage.write_json(url, result)
        print("\n".join(table(rows)), file=sys.stderr, flush=True)
        run.finish()
    return storage.join(out, TRIALS, rows[0]["trial"])


def parse_grid(text: str) -> list[dict[str, Any]]:
    """All combinations of 'name=a,b; other=c,d', in the order in which they are written.

    Raises:
        UsageError: for names that are no settings of a training, or values of another type.
    """
    axes: list[list[tuple[str, Any]]] = []
    for part in (part.strip() for part in text.split(";") if part.strip()):
        name, _, values = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in OPTIONS:
            raise UsageError(f"grid: {name!r} is no setting of train{nearest(name, OPTIONS)}")
        given = [value.strip() for value in values.split(",") if value.strip()]
        if not given or name in [axis[0][0] for axis in axes]:
            raise UsageError(f"grid {part!r}: write name=value,value once for each name, with ; between them")
        axes.append([(name, _value(name, one)) for one in given])
    if not axes:
        raise UsageError(f"grid {text!r}: name what to vary, as 'arch=unet-small,light-small; learning_rate=1e-3,3e-3'")
    return [dict(chosen) for chosen in itertools.product(*axes)]


def _value(name: str, text: str) -> Any:
    default = OPTIONS[name]
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise UsageError(f"grid: {name} {text!r}: write true or false")
        return text == "true"
    kind = type(default) if isinstance(default, int | float) else str
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"grid: {name} {text!r} is no {kind.__name__}") from None


def _job(dataset: str, out: str, described: Dataset, made: Settings, varied: Mapping[str, Any]) -> dict[str, Any]:
    from sattile.training import said_by

    said = said_by(made, described)
    # Of all its settings: a larger grid, or another number of epochs, finds its own trials and leaves the others.
    named = ",".join(f"{name}={str(value).replace('/', '_')}" for name, value in varied.items())
    name = f"{named}-{storage.digest(said)[:8]}"
    return {
        "name": name, "out": storage.join(out, TRIALS, name), "dataset": dataset, "said": said,
        "settings": made.to_dict(), "varied": dict(varied),
    }  # fmt: skip


def run_trials(
    frames: Iterable[pd.DataFrame], *, jobs: Sequence[Mapping[str, Any]], threads: int
) -> Iterator[pd.DataFrame]:
    """Numbers of trials in (`id`), what became of each out, for `mapInPandas`."""
    import pandas as pd

    from sattile.training import train_here

    for number in (int(number) for frame in frames for number in frame["id"]):
        job, skipped, reason = jobs[number], False, None
        try:
            with Run("train", job["out"], dict(job["said"]), overwrite=True) as run:
                skipped = not train_here(run, {**job, "work": ""}, threads=threads)
                run.finish()
        except SattileError as error:
            reason = str(error)
        yield pd.DataFrame({"id": [number], "skipped": [skipped], "reason": [reason]})


def _result(job: Mapping[str, Any]) -> dict[str, Any]:
    bundle = storage.read_json(storage.join(job["out"], "bundle.json"))
    history = storage.read_json(storage.join(job["out"], "history.json"))
    classes = bundle["metrics"].get("classes") or {}
    return {
        "trial": job["name"],
        **job["varied"],
        "val_miou": bundle["metrics"].get("miou"),
        "val_iou": {name: found["iou"] for name, found in classes.items() if found},
        "best_epoch": bundle["network"]["best_epoch"],
        "parameters": bundle["network"]["parameters"],
        "seconds": round(sum(row["seconds"] for row in history), 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results as lines of a table, best first."""
    names = [name for name in rows[0] if name not in ("trial", "val_miou", "val_iou", "best_epoch", "seconds")]
    lines = [[*names, "val mIoU", "best epoch", "seconds"]]
    for row in rows:
        miou = "--" if row["val_miou"] is None else f"{row['val_miou']:.4f}"
        lines.append([*(str(row[name]) for name in names), miou, str(row["best_epoch"]), f"{row['seconds']:.0f}"])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
