"""Training: tiles in, a model bundle out. The driver's side; TensorFlow runs in other processes.

networks      by name, or a user's builder; with their indices, and weights from an earlier one (transfer)
reader        the tiles of a split
batches       the same global batches for any number of workers, varied by augmentation
settings      all that shapes the weights, and what of it can't be
loop          `fit`: one worker's part, under the current `tf.distribute` strategy; what it makes small is in losses
search        trainings over a small grid of settings, as Spark tasks
__main__      the child process of the driver: training on this machine, and assembling the bundle
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sattile import engine, storage
from sattile.dataset import unmeasured_classes, unseen_classes
from sattile.errors import SattileError, UsageError, said_by_task
from sattile.record import Run
from sattile.scorers import NOISE
from sattile.training.loop import PROGRESS, describe
from sattile.training.reader import Dataset, load_dataset
from sattile.training.settings import Settings, check, make_settings, said_by
from sattile.versions import is_made, opened

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

WORK = ".training"
"""Below the out folder while a training is under way: checkpoint, progress, the bundle until it is whole."""

PORT_TRIES = 3

READERS = ("pyarrow", "petastorm")


def train(
    spark: SparkSession,
    *,
    dataset: str,
    out: str,
    arch: str = "unet-small",
    indices: str = "none",
    start_from: str | None = None,
    epochs: int = 30,
    batch_size: int = 16,
    accumulate: int = 1,
    workers: int = 1,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-3,
    precision: str = "float32",
    dice: float = 1.0,
    label_smoothing: float = 0.0,
    hard_share: float = 1.0,
    class_weights: str = "none",
    sampling: str = "uniform",
    augment: bool = True,
    haze: float = 0.0,
    keep: str = "best",
    patience: int = 0,
    seed: int = 0,
    max_restarts: int = 3,
    reader: str = "pyarrow",
    trust: bool = False,
    versions: bool = False,
    overwrite: bool = False,
) -> str:
    """Train a segmentation model on a tiles dataset.

    On one machine a single worker, in a child process of the driver; several, and those of a cluster, as barrier tasks
    of the session, through MirroredStrategyRunner. The weights do not depend on the number of workers. A training that
    was killed goes on from its last epoch when it is started again with the same settings.

    Args:
        spark: the caller's session; its tasks do the work if there is more than one worker.
        dataset: folder that `sattile tile` wrote.
        out: folder for the model bundle.
        arch: unet-tiny, unet-small, unet-medium, unet-large; residual: resunet-small, resunet-medium; of depthwise
            convolutions, for CPUs: light-small, light-medium; deeplab-small, deeplab-medium; pixel-mlp (a baseline
            that sees each pixel by itself), tile-classifier (one label a tile); or package.module:function, which
            is called with the keywords bands, classes and statistics and returns a Keras model (stored values in,
            softmax scores out).
        indices: spectral indices that the network sees beside the bands: 'ndwi,mndwi,ndvi,ndmi,nbr,ndbi', or a~b for
            two bands by name; auto is ndwi, mndwi and ndvi where the bands' names say which they are.
        start_from: bundle or .keras file whose weights to begin with; bands and classes may differ.
        epochs: passes over the training tiles.
        batch_size: tiles of a step, over all workers together.
        accumulate: send a batch through the network in so many parts, if memory is short.
        workers: a divisor of 12 and of batch_size; each takes one slot of the cluster.
        learning_rate: its peak; warm-up of one epoch, then a cosine down to 0.
        weight_decay: of AdamW.
        precision: float32, or bfloat16 for faster arithmetic where the hardware has it (weights stay float32); a CPU
            that has not emulates it, which is told.
        dice: weight of the Dice term beside cross-entropy; 0 leaves it out.
        label_smoothing: share of a label spread over all classes: 0.1 where labels are often wrong.
        hard_share: cross-entropy counts this share of a tile's pixels only, those with the largest losses.
        class_weights: 'none', or 'balanced' to weigh rare classes more (by the root of their inverse share).
        sampling: 'uniform', each tile once an epoch, or 'balanced': tiles of rare classes more often.
        augment: flips, quarter turns, brightness and band jitter.
        haze: add up to so much haze to half of the tiles (1 doubles the bluest band), for networks that will see scenes
            of another atmospheric correction, or none; on scenes like the training tiles it costs accuracy.
        keep: the weights of the best epoch on the validation tiles, or of the last, for few tiles: the best of them is
            chance, and those that chose no weights measure them as test tiles do.
        patience: stop after so many epochs without a better validation mIoU; 0 never does.
        seed: of weights, order and augmentation.
        max_restarts: how often several workers begin again from the last epoch when one of them is lost.
        reader: pyarrow, or petastorm, which gives the same tiles more slowly and runs code out of its pickled schema.
        trust: allow that, for a dataset that you trust.
        versions: make a version of the model below out, v1, v2, ..., and let latest.json name it once it is whole; one
            that was made with the same settings and tiles is left as it is.
        overwrite: replace a model made with other settings or other tiles; versions are never replaced.

    Returns:
        URL of the bundle: `out`, or the version's folder.

    Raises:
        UsageError: for settings that cannot be, before anything runs.
        SattileError: if the training fails; it says why.
    """
    engine.check(spark)
    described = load_dataset(dataset)
    settings = make_settings(
        described,
        {
            "arch": arch, "indices": indices, "start_from": start_from, "epochs": epochs, "batch_size": batch_size,
            "accumulate": accumulate, "learning_rate": learning_rate, "weight_decay": weight_decay,
            "precision": precision, "dice": dice, "label_smoothing": label_smoothing, "hard_share": hard_share,
            "class_weights": class_weights, "sampling": sampling, "augment": augment, "haze": haze,
            "keep": keep, "patience": patience, "seed": seed,
        },
    )  # fmt: skip
    check(settings, described, workers=workers, devices=max(_gpus(spark), 1))
    if unseen := unseen_classes(described.description):
        log.warning("train: no training tile shows %s: the network can't learn it", ", ".join(unseen))
    for sentence in unmeasured_classes(described.description):
        log.warning("train: %s", sentence)
    if max_restarts < 0:
        raise UsageError(f"max_restarts {max_restarts}: give 0 or more")
    if reader not in READERS:
        raise UsageError(f"reader {reader!r}: use {' or '.join(READERS)}")
    if reader == "petastorm" and not trust:
        raise UsageError(
            f"reader petastorm runs code out of the pickled schema in {dataset}: add --trust if you know who wrote it, "
            f"or leave --reader out: the tiles are the same"
        )
    # On a cluster a single worker is an executor's, too: the driver's container is small, and has no Spark to start.
    on_cluster = workers > 1 or not engine.is_local(spark)
    if on_cluster:
        _check_slots(spark, workers)
    if settings.precision == "bfloat16" and not engine.gpus_a_task(spark):
        _tell_emulation(spark)
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    with opened("train", out, said_by(settings, described, built(dataset, settings)), overwrite, versions) as run:
        job = job_of(dataset, run.out, settings, petastorm=reader == "petastorm")
        run.extra["workers"] = workers

        def make() -> None:
            if on_cluster:
                run.extra["restarts"] = _fit_on_cluster(spark, workers, job, max_restarts)
            child({"do": ["assemble"] if on_cluster else ["fit", "assemble"], **job})

        run_training(run, job, make, described, versions)
        run.finish()
        return run.out


def _tell_emulation(spark: SparkSession) -> None:
    from sattile import processors

    without = [str(one) for one in processors.cpus(spark) if not one.bfloat16]
    if without:
        log.warning("train: precision bfloat16 is emulated by %s: float32 is faster there", ", ".join(without))


def job_of(dataset: str, out: str, settings: Settings, *, petastorm: bool = False) -> dict[str, Any]:
    """A training as JSON, for those who do it."""
    work = storage.join(out, WORK)
    return {"dataset": dataset, "work": work, "settings": settings.to_dict(), "petastorm": petastorm}


def built(dataset: str, settings: Settings) -> str | None:
    """Build what a builder of the user's own makes, and say what it is: `networks.fingerprint`.

    Raises:
        UsageError: if it can't be built.
    """
    if ":" not in settings.arch:
        return None
    found: str = child({"do": ["build"], **job_of(dataset, "", settings)})["network"]
    return found


def run_training(
    run: Run, job: Mapping[str, Any], make: Callable[[], object], described: Dataset, versions: bool = False
) -> None:
    """Make and publish the bundle of a run, if it is not there already.

    Args:
        make: leaves a bundle in the work folder of the job.
    """
    run.inputs = [{"url": storage.join(job["dataset"], "dataset.json"), "digest": described.digest}]
    run.given = 1
    if is_made(run, versions):
        log.info("train: %s is done already", run.out)
        run.skipped = 1
    else:
        if run.changed:
            storage.remove(job["work"])
        epochs = job["settings"]["epochs"]
        pixels = described.tiles("train") * described.size**2 * epochs
        with run.stage("train", pixels=pixels), _followed(job["work"], epochs):
            make()
        with run.stage("bundle"):
            run.check_held()
            _publish(storage.join(job["work"], "bundle"), run.out)
        run.done = 1
    storage.remove(job["work"])


def _check_slots(spark: SparkSession, workers: int) -> None:
    """All barrier tasks must run at once: say so now, not in Spark's words after a minute of waiting."""
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise UsageError(
            "training on a cluster needs a fixed number of executors: submit with "
            f"--conf spark.dynamicAllocation.enabled=false --num-executors {workers}"
        )
    # Executors register one after the other in the first moments of a session; the threads of a local one are there.
    slots = _slots(spark, workers, 0 if engine.is_local(spark) else REGISTRATION)
    if slots < workers:
        raise UsageError(
            f"workers {workers}: the session {spark.sparkContext.master} runs {slots} task(s) at once and all workers "
            f"must run together; use --workers {slots}, or a larger one (--master local[{workers}], or more executors)"
        )


LOST = (
    "ExecutorLostFailure", "Python worker exited unexpectedly", "Connection reset by peer", "UnavailableError",
    "UNAVAILABLE", "Collective ops is aborted", "Barrier task set", "worker lost", "is dead", "AbortedError",
)  # fmt: skip
"""What is said when a worker, or the one that it talked to, is gone."""

REGISTRATION = 15
"""Seconds to wait for executors that a new session has asked for."""

REPLACEMENT = 300
"""Seconds to wait for the cluster to replace what was lost."""


def _fit_on_cluster(spark: SparkSession, workers: int, job: Mapping[str, Any], max_restarts: int) -> int:
    """`fit` in barrier tasks of the session, begun again from its last checkpoint if a worker is lost.

    Spark tries the runner's stage once only: it ends in a `collect` of barrier tasks.

    Returns:
        How often it was begun again.
    """
    from spark_tensorflow_distributor import MirroredStrategyRunner

    restarts, ports = 0, PORT_TRIES
    while True:
        try:
            gpus = _gpus(spark)
            # Its slots are GPUs, of which each task gets as many as Spark gives it.
            runner = MirroredStrategyRunner(num_slots=workers * max(gpus, 1), local_mode=False, use_gpu=gpus > 0)
            runner.run(functools.partial(fit_worker, dict(job), storage.access(), gpus))
            return restarts
        except Exception as error:
            text = str(error)
            # The distributor finds a port, closes it, and lets TensorFlow open it again: another may be quicker.
            if any(one in text for one in ("Address already in use", "Could not start gRPC server")) and ports > 1:
                ports -= 1
                log.warning("train: a port was taken by another process; trying again")
                continue
            if "sattile.errors." in text or not any(one in text for one in LOST) or restarts >= max_restarts:
                raise _reason(text) from error
            restarts += 1
            log.warning("train: a worker was lost; going on from the last epoch (%d of %d)", restarts, max_restarts)
            _wait_for_slots(spark, workers)


def _wait_for_slots(spark: SparkSession, workers: int) -> None:
    slots = _slots(spark, workers, REPLACEMENT)
    if slots < workers:
        raise SattileError(
            f"{slots} of {workers} workers are left, and the cluster gave no replacement within {REPLACEMENT} s; "
            f"run it again: it goes on from its last epoch"
        )


def _gpus(spark: SparkSession) -> int:
    """GPUs of each worker.

    Raises:
        UsageError: for a part of one: the distributor counts whole ones.
    """
    amount = engine.gpus_a_task(spark)
    if amount % 1:
        raise UsageError(
            f"spark.task.resource.gpu.amount {amount:g}: workers of a training take whole GPUs, set it to 1 (tasks of "
            f"predict and evaluate may share one)"
        )
    return int(amount)


def _slots(spark: SparkSession, workers: int, seconds: float) -> int:
    """How many tasks can run at once, waited for until those are enough or the time is up."""
    end = time.monotonic() + seconds
    while (slots := engine.concurrent_tasks(spark)) < workers and time.monotonic() < end:
        time.sleep(0.5)
    return slots


def fit_worker(job: Mapping[str, Any], access: storage.Access | None = None, gpus: int = 0) -> None:
    """What each worker runs; `gpus`: on so many, which Spark gave it."""
    from sattile.training.loop import fit

    storage.use(access)
    if gpus:
        _check_gpus(gpus)
    fit(
        dataset=job["dataset"],
        work=job["work"],
        settings=Settings.from_dict(job["settings"]),
        petastorm=job.get("petastorm", False),
    )


def _check_gpus(gpus: int) -> None:
    import tensorflow as tf

    seen = len(tf.config.list_physical_devices("GPU"))
    if seen < gpus:
        raise SattileError(
            f"Spark gave this worker GPU {os.environ.get('CUDA_VISIBLE_DEVICES')} and TensorFlow sees "
            f"{seen or 'none'}: "
            f"install sattile[gpu] into the environment, and look at the node's driver (nvidia-smi)"
        )


def _reason(text: str) -> SattileError:
    """The worker's own words out of Spark's."""
    if said := said_by_task(text):
        return said
    lines = [line.strip() for line in text.splitlines() if "Error" in line and not line.strip().startswith("at ")]
    return SattileError(f"training failed on a worker: {(lines or [text[:300]])[-1][:500]}")


def child(job: Mapping[str, Any], *, threads: int | None = None) -> dict[str, Any]:
    """Run `python -m sattile.training` on a job and hand on what it prints; its errors are raised here.

    TensorFlow stays out of the caller's process, which may be a notebook with a TensorFlow of its own. The child ends
    when this process does: it reads its standard input to the end.

    Args:
        threads: that TensorFlow may use; all cores if not given.

    Returns:
        Its answer.
    """
    environment = {
        # The caller's gateway and submit arguments would bind what looks for Spark there to the caller's session.
        name: value
        for name, value in os.environ.items()
        if name not in ("PYSPARK_GATEWAY_PORT", "PYSPARK_GATEWAY_SECRET", "PYSPARK_SUBMIT_ARGS", "TF_CONFIG")
    } | {
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "PYTHONUNBUFFERED": "1",
        # Operations that run side by side split their sums by the threads that are free just then: from layers of 64
        # channels on, two runs with one seed differed in the last bits from the first epoch on. It costs no speed.
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_CPP_MIN_LOG_LEVEL": os.environ.get("TF_CPP_MIN_LOG_LEVEL", "2"),
        **({"TF_NUM_INTRAOP_THREADS": str(threads)} if threads else {}),
    }
    with storage.scratch() as scratch:
        answer = os.path.join(scratch, "answer.json")
        command = [sys.executable, "-m", "sattile.training", json.dumps({**job, "answer": answer})]
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, errors="replace",
        )  # fmt: skip
        said: deque[str] = deque(maxlen=30)
        try:
            assert process.stdout is not None
            assert process.stdin is not None
            # Not among the arguments, which others can see: a token may be in it.
            process.stdin.write(base64.b64encode(pickle.dumps(storage.access())).decode() + "\n")
            process.stdin.flush()
            for line in process.stdout:
                if not line.startswith(NOISE):
                    said.append(line)
                    sys.stderr.write(line)
                    sys.stderr.flush()
            status = process.wait()
        finally:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()
        found: dict[str, Any] = storage.read_json(answer) if storage.exists(answer) else {}
    if status == 0 and found.get("done"):
        return found
    if "usage" in found:
        raise UsageError(found["usage"])
    if "error" in found:
        raise SattileError(found["error"])
    how = f"was killed by signal {-status} (out of memory?)" if status < 0 else f"ended with status {status}"
    raise SattileError(f"the training process {how}; it said last:\n{''.join(said)}".rstrip())


@contextmanager
def _followed(work: str, epochs: int) -> Iterator[None]:
    """Show each epoch's line as it ends, wherever the workers run."""
    stop = threading.Event()
    shown = len(_read_progress(work))
    if shown:
        print(f"train: going on after epoch {shown} of {epochs}", file=sys.stderr, flush=True)

    def show() -> None:
        nonlocal shown
        rows = _read_progress(work)
        if len(rows) < shown:  # begun anew: other settings
            shown = 0
        for row in rows[shown:]:
            print(describe(row, epochs), file=sys.stderr, flush=True)
        shown = len(rows)

    def follow() -> None:
        while not stop.wait(0.5):
            show()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        show()


def _read_progress(work: str) -> list[dict[str, Any]]:
    url = storage.join(work, PROGRESS)
    with suppress(OSError, SattileError):
        return storage.read_json(url) if storage.exists(url) else []
    return []


def _publish(staged: str, out: str) -> None:
    """Move a whole bundle into place. `bundle.json`, without which it is none, goes first and comes last."""
    last = "bundle.json"
    storage.remove(storage.join(out, last))
    names = [storage.name(entry.url) for entry in storage.list_folder(staged)]
    for name in sorted(names, key=lambda one: one == last):
        storage.remove(storage.join(out, name))
        storage.rename(storage.join(staged, name), storage.join(out, name))
