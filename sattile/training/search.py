"""Trainings over a small grid of settings, side by side as Spark tasks."""

from __future__ import annotations

import dataclasses
import itertools
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sattile import engine, storage
from sattile.errors import SattileError, UsageError, nearest
from sattile.record import Run
from sattile.schema import Refusal
from sattile.training.reader import Dataset, load_dataset
from sattile.training.settings import Settings, check, make_settings, said_by

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import SparkSession

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
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Train one model for each combination of some settings, and say which is best on the validation tiles.

    Each training is one Spark task with the cores that a task has, and a folder of its own below `out`, a bundle like
    any other. A rerun, also with a larger grid, does those that are missing.

    Args:
        spark: the caller's session.
        dataset: folder that `sattile tile` wrote.
        out: folder for the trials and `search.json`.
        grid: options of train and their values, 'arch=unet-small,light-small; learning_rate=1e-3,3e-3'; indices that
            are to be seen together with + between them, 'indices=none,ndwi+ndvi'.
        settings: those of train that all share; on the command line --set train.epochs=10.
        overwrite: begin anew where the folder holds a search on other tiles.
        max_failed_fraction: failed trainings / all above which the command fails (3).

    Returns:
        URL of the best trial's bundle.

    Raises:
        UsageError: for a grid that can't be, before anything runs.
        SattileError: if all trainings failed.
    """
    from sattile.training import built

    engine.check(spark)
    described = load_dataset(dataset)
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    shared = dict((settings or {}).get("train", {}))
    strange = sorted(set(shared) - {*OPTIONS})
    if strange:
        raise UsageError(
            f"train.{strange[0]} is nothing that the trainings of a search can share{nearest(strange[0], OPTIONS)}"
        )
    by_name: dict[str, Trial] = {}
    networks: dict[tuple[Any, ...], str | None] = {}
    for one in parse_grid(grid):
        made = make_settings(described, {**shared, **one})
        check(made, described)
        begins = made.arch, made.seed, made.start_from
        if begins not in networks:
            networks[begins] = built(dataset, made)
        trial = _trial(out, described, made, one, networks[begins])
        by_name.setdefault(trial.name, trial)  # `1e-3` and `0.001` are one
    trials = list(by_name.values())
    with Run("search", out, {"dataset": described.digest}, overwrite, max_failed_fraction) as run:
        run.inputs = [{"url": storage.join(dataset, "dataset.json"), "digest": described.digest}]
        run.given, run.what = len(trials), "trainings"
        pixels = described.tiles("train") * described.size**2
        with run.stage("train", pixels=sum(pixels * one.settings.epochs for one in trials)):
            threads = int(spark.conf.get("spark.task.cpus", "1") or 1)
            with engine.progress(spark, "search"), engine.few_rows_a_batch(spark):
                numbers = spark.range(0, len(trials), 1, len(trials))
                work = engine.on_worker(partial(run_trials, trials=trials, dataset=dataset, threads=threads))
                said = {row.id: row for row in numbers.mapInPandas(work, BECAME).collect()}
        run.refuse([Refusal(one.name, "train", said[k].reason) for k, one in enumerate(trials) if said[k].reason])
        run.skipped = sum(row.skipped for row in said.values())
        run.done = len(trials) - len(run.refused) - run.skipped
        rows = sorted(
            (_result(one) for k, one in enumerate(trials) if not said[k].reason),
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
    if name == "indices":
        return text.replace("+", ",")
    kind = type(default) if isinstance(default, int | float) else str
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"grid: {name} {text!r} is no {kind.__name__}") from None


@dataclasses.dataclass(frozen=True)
class Trial:
    """One training of a search: its name, folder, settings, and what of them varies."""

    name: str
    out: str
    settings: Settings
    varied: Mapping[str, Any]
    network: str | None = None


def _trial(out: str, described: Dataset, settings: Settings, varied: Mapping[str, Any], network: str | None) -> Trial:
    # Of all its settings, not of those that vary: a larger grid finds what is there, whatever it varies.
    name = f"{re.sub('[^A-Za-z0-9-]', '_', settings.arch)}-{storage.digest(said_by(settings, described, network))[:8]}"
    return Trial(name, storage.join(out, TRIALS, name), settings, dict(varied), network)


BECAME = "id long, skipped boolean, reason string"


def run_trials(
    frames: Iterable[pd.DataFrame], *, trials: Sequence[Trial], dataset: str, threads: int
) -> Iterator[pd.DataFrame]:
    """Numbers of trials in (`id`), what became of each out (`BECAME`), for `mapInPandas`.

    Each training is a child process of its task, as it is one of the driver in `train`.
    """
    import pandas as pd

    from sattile.training import child, job_of, run_training

    described = load_dataset(dataset)
    for number in (int(number) for frame in frames for number in frame["id"]):
        trial, skipped, reason = trials[number], 0, None
        job = job_of(dataset, trial.out, trial.settings)
        try:
            with Run("train", trial.out, said_by(trial.settings, described, trial.network)) as run:
                run_training(run, job, partial(child, {"do": ["fit", "assemble"], **job}, threads=threads), described)
                run.finish()
                skipped = run.skipped
        except SattileError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = " ".join(dict.fromkeys([lines[0], lines[-1]]))  # of what a process said last, the last word
        yield pd.DataFrame({"id": [number], "skipped": [bool(skipped)], "reason": [reason]})


def _result(trial: Trial) -> dict[str, Any]:
    bundle, history = (storage.read_json(storage.join(trial.out, name)) for name in ("bundle.json", "history.json"))
    classes = bundle["metrics"].get("classes") or {}
    return {
        "trial": trial.name,
        **trial.varied,
        "split": bundle["metrics"].get("split"),  # val; train where no tiles validate
        "val_miou": bundle["metrics"].get("miou"),
        "val_iou": {name: found["iou"] for name, found in classes.items() if found},
        "best_epoch": bundle["network"]["best_epoch"],
        "parameters": bundle["network"]["parameters"],
        "seconds": round(sum(row["seconds"] for row in history), 1),
    }


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The results as lines of a table, best first."""
    own = ("trial", "split", "val_miou", "val_iou", "best_epoch", "seconds")
    names = [name for name in rows[0] if name not in own]
    lines = [[*names, f"{rows[0]['split']} mIoU", "best epoch", "seconds"]]
    for row in rows:
        miou = "--" if row["val_miou"] is None else f"{row['val_miou']:.4f}"
        lines.append([*(str(row[name]) for name in names), miou, str(row["best_epoch"]), f"{row['seconds']:.0f}"])
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
