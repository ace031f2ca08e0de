"""What the workers' CPUs do by themselves, and which engine runs a network fastest on them.

bfloat16 is half the work of float32 on a CPU that has it, and several times the work on one that has to emulate it. So
a job first asks its executors. One engine and one precision serve a whole job, and go on serving its out folder: what
all CPUs do is what is chosen from.
"""

from __future__ import annotations

import base64
import json
import logging
import math
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile import card, engine, model, scorers, storage
from sattile.errors import UsageError
from sattile.model import AGREEMENT, Bundle
from sattile.record import settings_of, versions
from sattile.scorers import Cpu, cpu

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

SPEEDS = "speeds.json"
"""Beside `bundle.json`: what was measured, by kind of CPU."""

SECONDS = 0.6
"""That each engine runs for, once it is compiled."""

EDGE = 512
"""Edge of the windows that are measured, where the network takes any: larger ones gain a few per cent by any engine."""

WINDOW_BYTES = 400_000_000
"""That a network may hold for such a window; of one that holds more, smaller windows are measured."""

PATIENCE = 180
"""Seconds until a measurement is given up."""

TOLERANCE = 0.95
"""OpenVINO may be this part as fast as TensorFlow on one kind of CPU, if it is faster over all of them."""


@dataclass(frozen=True)
class Choice:
    """What runs a job's network.

    Attributes:
        engine: one of `model.ENGINES`, but not auto.
        precision: `float32` or `bfloat16`.
        why: in words.
        cpus: of the executors.
        speeds: Mpix/s of one task, by kind of CPU and engine; empty where nothing had to be measured.
    """

    engine: str
    precision: str
    why: str
    cpus: tuple[Cpu, ...] = ()
    speeds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """As `_run.json` has it."""
        return {
            "engine": self.engine, "precision": self.precision, "why": self.why,
            "cpus": [str(one) for one in self.cpus],
            "mpix_per_s": {name: dict(one) for name, one in self.speeds.items()},
        }  # fmt: skip


# --- what the executors are --------------------------------------------------------------------------------------


def cpus(spark: SparkSession) -> tuple[Cpu, ...]:
    """The kinds that the executors run on, by name."""
    if engine.is_local(spark):
        return (cpu(),)
    tasks = 2 * max(engine.concurrent_tasks(spark), 1)
    rows = spark.sparkContext.parallelize(range(tasks), tasks)
    return tuple(sorted(set(rows.mapPartitions(engine.on_worker(_tell)).collect()), key=str))


def _tell(_rows: Iterator[int]) -> Iterator[Cpu]:
    yield cpu()
    time.sleep(0.2)  # so that one executor does not take all the tasks


# --- which engine ---------------------------------------------------------------------------------------------------


def choose(
    spark: SparkSession,
    bundle: Bundle,
    wanted: str = "auto",
    precision: str | None = None,
    *,
    threads: int = 1,
    out: str | None = None,
    keep: bool = True,
) -> Choice:
    """Decide what runs a job's network, once, on the driver.

    An out folder keeps what it began with. Else `auto` takes the GPUs that Spark gives to tasks; or OpenVINO, where it
    is installed, has the bundle's network, was seen to give TensorFlow's labels in the precision at hand, and is
    measured to be no slower; or TensorFlow.

    Args:
        wanted: one of `model.ENGINES`.
        precision: `float32` or `bfloat16`; None takes bfloat16 for OpenVINO where all CPUs have it.
        threads: of an evaluation.
        out: folder of an earlier run.
        keep: write what is measured beside the bundle.

    Raises:
        UsageError: for an engine or precision that can't be.
    """
    if precision not in (None, *scorers.PRECISIONS):
        raise UsageError(f"precision {precision!r}: use {', '.join(scorers.PRECISIONS)}")
    before = _before(bundle, out) if wanted in ("auto", "openvino") else None
    if before is not None and (wanted == "auto" or before[0] == wanted) and precision in (None, before[1]):
        return _as_before(spark, bundle, before, threads, out)
    allowed = model.choose_engine(bundle, wanted, gpu=engine.gpus_a_task(spark) > 0)
    if precision == "bfloat16" and allowed != "openvino":
        which = _why_tensorflow(bundle, allowed) if wanted == "auto" else f"engine {wanted} computes in float32"
        raise UsageError(f"precision bfloat16 is for engine openvino, and {which}")
    if allowed != "openvino":
        return Choice(allowed, "float32", "it was asked for" if wanted != "auto" else _why_tensorflow(bundle, allowed))
    found = cpus(spark)
    native = all(one.bfloat16 for one in found)
    chosen = precision or ("bfloat16" if native else "float32")
    if chosen == "bfloat16" and not native:
        log.warning("precision bfloat16: %s emulates it, which is slow", ", ".join(map(str, found)))
    if wanted == "openvino":
        why = "it was asked for" + ("" if precision or native else "; not all CPUs have bfloat16")
        return Choice("openvino", chosen, why, found)
    if bundle.agreement(chosen) < AGREEMENT and precision is None:
        chosen = "float32"
    if bundle.agreement(chosen) < AGREEMENT:
        if chosen == "bfloat16":
            raise UsageError(f"{_too_few(bundle, chosen)}: --engine openvino takes it all the same")
        return Choice("tensorflow", "float32", _too_few(bundle, chosen), found)
    if precision == "bfloat16":
        return Choice("openvino", chosen, "OpenVINO alone computes in the precision that was asked for", found)
    speeds = _speeds(spark, bundle, found, chosen, threads, keep=keep)
    if len(speeds) < len(found):
        missing = ", ".join(str(one) for one in found if str(one) not in speeds)
        return Choice("tensorflow", "float32", f"the engines could not be measured on {missing}", found, speeds)
    ratio = min(one["openvino"] / one["tensorflow"] for one in speeds.values())
    times = {name: sum(1 / one[name] for one in speeds.values()) for name in ("tensorflow", "openvino")}
    if ratio >= TOLERANCE and times["openvino"] <= times["tensorflow"]:
        return Choice("openvino", chosen, f"measured {ratio:.2f} times TensorFlow", found, speeds)
    return Choice("tensorflow", "float32", f"OpenVINO measured {ratio:.2f} times TensorFlow", found, speeds)


def _as_before(spark: SparkSession, bundle: Bundle, before: tuple[str, str], threads: int, out: str | None) -> Choice:
    """What an out folder began with."""
    model.choose_engine(bundle, before[0])  # whether it can be had
    found = cpus(spark)
    without = [str(one) for one in found if not one.bfloat16]
    if before[1] == "bfloat16" and without:
        log.warning(
            "%s was made in bfloat16, which %s emulates: it is slow there. --precision float32 --overwrite makes "
            "all of it anew, faster", out, ", ".join(without),
        )  # fmt: skip
    known = _known(bundle)
    keys = {str(one): _key(one, before[1], threads) for one in found}
    speeds = {name: known[key] for name, key in keys.items() if key in known}
    return Choice(*before, "the maps that lie there were made so", found, speeds)


def _too_few(bundle: Bundle, precision: str) -> str:
    return f"OpenVINO gave too few pixels its labels in {precision} ({100 * bundle.agreement(precision):.3f} %)"


def _why_tensorflow(bundle: Bundle, engine: str) -> str:
    if engine == scorers.GPU:
        return "Spark gives its tasks GPUs"
    if not scorers.has_openvino():
        return "OpenVINO is not installed"
    if not bundle.openvino:
        return "the bundle has no network for OpenVINO"
    if "agreement" not in bundle.openvino:
        return "OpenVINO was not compared with it on tiles"
    return _too_few(bundle, max(scorers.PRECISIONS, key=bundle.agreement))


def _before(bundle: Bundle, out: str | None) -> tuple[str, str] | None:
    """Engine and precision of the run that lies in a folder, if it was of this very network."""
    settings = settings_of(storage.absolute(out)) if out else None
    if (
        settings is None
        or settings.get("model") != bundle.identity
        or settings.get("engine") not in ("tensorflow", "openvino")
    ):
        return None
    return settings["engine"], settings.get("precision", "bfloat16" if settings["engine"] == "openvino" else "float32")


# --- how fast -------------------------------------------------------------------------------------------------------


def _speeds(
    spark: SparkSession, bundle: Bundle, found: Sequence[Cpu], precision: str, threads: int, *, keep: bool
) -> dict[str, dict[str, float]]:
    """Mpix/s of TensorFlow and OpenVINO by kind of CPU: what was measured before, else measured now."""
    known = _known(bundle)
    keys = {str(one): _key(one, precision, threads) for one in found}
    missing = {name for name, key in keys.items() if key not in known}
    if missing:
        log.info("engine: measures TensorFlow and OpenVINO on %s", ", ".join(sorted(missing)))
        measured = _measure_on(spark, bundle, missing, precision, threads)
        known |= {keys[name]: speeds for name, speeds in measured.items()}
        if keep and measured and not bundle.members:
            _keep(bundle, known)
    return {name: known[key] for name, key in keys.items() if key in known}


def _known(bundle: Bundle) -> dict[str, dict[str, float]]:
    """What was measured of this very network; nothing of a file that is damaged, may not be read or is another's."""
    if bundle.members:
        return {}
    try:
        found = storage.read_json(storage.join(bundle.url, SPEEDS))
        if found["network"] != bundle.digest:  # the bundle was made anew
            return {}
        return {key: dict(speeds) for key, speeds in found["speeds"].items() if _whole(speeds)}
    except Exception as error:
        log.debug("%s in %s is not used: %r", SPEEDS, bundle.url, error)
        return {}


def _whole(speeds: Any) -> bool:
    named = [speeds.get(name) for name in ("tensorflow", "openvino")] if isinstance(speeds, dict) else []
    return bool(named) and all(isinstance(one, int | float) and 0 < one < 1e9 for one in named)


def _key(kind: Cpu, precision: str, threads: int) -> str:
    """What a measurement holds for: other versions of the engines are measured anew."""
    known = versions()
    engines = ", ".join(
        f"{name} {known[name]}" for name in ("tensorflow", "tensorflow-cpu", "openvino") if name in known
    )
    return f"{kind}; {threads} thread{'s' if threads > 1 else ''}; {precision}; {engines}"


def _keep(bundle: Bundle, known: Mapping[str, Any]) -> None:
    """Write what was measured beside the record, and into the model card. A bundle may be somebody else's."""
    try:
        storage.write_json(storage.join(bundle.url, SPEEDS), {"network": bundle.digest, "speeds": known})
        described = storage.read_json(storage.join(bundle.url, model.BUNDLE))
        url = storage.join(bundle.url, card.CARD)
        storage.write_text(url, card.with_speeds(storage.read_text(url), described, known))
    except Exception as error:
        log.debug("the speeds of %s can't be kept: %r", bundle.url, error)


def _measure_on(
    spark: SparkSession, bundle: Bundle, kinds: set[str], precision: str, threads: int
) -> dict[str, dict[str, float]]:
    """Measured in a process of its own: a worker holds one engine, and the driver none."""
    urls = [one.url for one in bundle.members or (bundle,)]
    job = {"models": urls, "precision": precision, "threads": threads, "access": _packed(storage.access())}
    if engine.is_local(spark):
        return {kind: speeds for kind, speeds in [(str(cpu()), measured_apart(job))] if speeds}
    found: dict[str, dict[str, float]] = {}
    # One task does for a cluster of one kind. Spark sends no task to a machine by name: else all of them are asked.
    for tasks in (1, 2 * max(engine.concurrent_tasks(spark), 1)):
        if missing := kinds - found.keys():
            rows = spark.sparkContext.parallelize(range(tasks), tasks)
            answers = rows.mapPartitions(engine.on_worker(partial(_measure_here, job, missing))).collect()
            found |= {kind: speeds for kind, speeds in answers if speeds}
    return found


def _measure_here(job: dict[str, Any], kinds: set[str], _rows: Iterator[int]) -> Iterator[tuple[str, dict[str, float]]]:
    if str(cpu()) in kinds:
        yield str(cpu()), measured_apart(job)


def _packed(access: Any) -> str:
    return base64.b64encode(pickle.dumps(access)).decode()


def measured_apart(job: Mapping[str, Any]) -> dict[str, float]:
    """`measured` in a child process; {} if it fails, which is told."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.pop("TF_NUM_INTRAOP_THREADS", None)
    said = ""
    try:
        done = subprocess.run(
            [sys.executable, "-c", "from sattile import processors; processors.main()"],
            input=json.dumps(dict(job)), env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE,
        )  # fmt: skip
        said = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), f"status {done.returncode}")
        speeds = json.loads(done.stdout.strip().splitlines()[-1])
        if _whole(speeds):
            return dict(speeds)
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    except (IndexError, ValueError):
        pass
    log.warning("engine: TensorFlow and OpenVINO could not be measured: %s", said)
    return {}


def main() -> None:
    """The child's: a job as JSON from standard input, speeds as JSON to standard output."""
    job = json.load(sys.stdin)
    storage.use(pickle.loads(base64.b64decode(job["access"])))  # from our own parent
    print(json.dumps(measured(model.load_models(job["models"]), job["precision"], job["threads"])))


def measured(bundle: Bundle, precision: str, threads: int) -> dict[str, float]:
    """Mpix/s of both engines, in turns, on a window of noise."""
    if bundle.input_shape is not None:
        height, width = bundle.input_shape
    else:
        fits = math.isqrt(int(WINDOW_BYTES / (1.15 * bundle.activation_bytes + 16 * len(bundle.bands))))
        height = width = max(min(EDGE, fits) // bundle.total_stride, 1) * bundle.total_stride
    planes = np.random.default_rng(0).integers(0, 3_000, (1, len(bundle.bands), height, width)).astype(np.float32)
    window = np.moveaxis(planes, 1, -1)  # as sattile lays it
    engines = {
        "tensorflow": model.load_scorer(bundle, engine="tensorflow", threads=threads),
        "openvino": model.load_scorer(bundle, engine="openvino", threads=threads, precision=precision),
    }
    taken: dict[str, list[float]] = {name: [] for name in engines}
    for scorer in engines.values():
        for _ in range(2):  # compiled, then memory taken
            scorer(window)
    end = time.monotonic() + 2 * SECONDS
    while time.monotonic() < end or len(taken["openvino"]) < 3:
        for name, scorer in engines.items():
            begin = time.monotonic()
            scorer(window)
            taken[name].append(time.monotonic() - begin)
    return {name: round(height * width / 1e6 / float(np.median(times)), 3) for name, times in taken.items()}
