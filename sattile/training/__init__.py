"""Training: tiles in, a model bundle out. The driver's side; TensorFlow runs in other processes.

networks   U-Nets by size, or a user's builder
data       the tiles as batches, the same for any number of workers
loop       `fit`: one worker's part, under the current `tf.distribute` strategy
__main__   the child process of the driver: the runner's `local_mode`, and assembling the bundle
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from sattile import engine, storage
from sattile.errors import SattileError, UsageError
from sattile.training.data import SHARDS, Dataset, load_dataset
from sattile.training.loop import PROGRESS, Settings, describe
from sattile.versions import opened

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

WORK = ".training"
"""Below the out folder while a training is under way: checkpoint, progress, the bundle until it is whole."""

PORT_TRIES = 3


def train(
    spark: SparkSession,
    *,
    dataset: str,
    out: str,
    arch: str = "unet-small",
    epochs: int = 30,
    batch_size: int = 16,
    workers: int = 1,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-3,
    dice: float = 1.0,
    class_weights: str = "none",
    augment: bool = True,
    patience: int = 0,
    seed: int = 0,
    max_restarts: int = 3,
    versions: bool = False,
    overwrite: bool = False,
) -> str:
    """Train a segmentation model on a tiles dataset.

    Always through MirroredStrategyRunner: on one machine a single worker in its `local_mode`, in a child process of the
    driver; several, and those of a cluster, as barrier tasks of the session. The weights do not depend on the number of
    workers. A training that was killed goes on from its last epoch when it is started again with the same settings.

    Args:
        spark: the caller's session; its tasks do the work if there is more than one worker.
        dataset: folder that `sattile tile` wrote.
        out: folder for the model bundle.
        arch: unet-tiny, unet-small, unet-medium, unet-large, or package.module:function, which is called with the
            keywords bands, classes and statistics and returns a Keras model (stored values in, softmax scores out).
        epochs: passes over the training tiles.
        batch_size: tiles of a step, over all workers together.
        workers: a divisor of 12 and of batch_size; each takes one slot of the cluster.
        learning_rate: its peak; warm-up of one epoch, then a cosine down to 0.
        weight_decay: of AdamW.
        dice: weight of the Dice term beside cross-entropy; 0 leaves it out.
        class_weights: 'none', or 'balanced' to weigh rare classes more (by the root of their inverse share).
        augment: flips, quarter turns, brightness and band jitter.
        patience: stop after so many epochs without a better validation mIoU; 0 never does.
        seed: of weights, order and augmentation.
        max_restarts: how often several workers begin again from the last epoch when one of them is lost.
        versions: make a version of the model below out, v1, v2, ..., and let latest.json name it once it is whole; one
            that was made with the same settings and tiles is left as it is.
        overwrite: replace a model made with other settings or other tiles.

    Returns:
        URL of the bundle: `out`, or the version's folder.

    Raises:
        UsageError: for settings that cannot be, before anything runs.
        SattileError: if the training fails; it says why.
    """
    settings = Settings(
        arch=arch, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, weight_decay=weight_decay,
        dice=dice, class_weights=class_weights, augment=augment, patience=patience, seed=seed,
    )  # fmt: skip
    described = load_dataset(dataset)
    _check(settings, described, workers)
    # On a cluster a single worker is an executor's, too: the driver's container is small, and has no Spark to start.
    on_cluster = workers > 1 or not re.fullmatch(r"local(\[.*\])?", spark.sparkContext.master or "")
    if on_cluster:
        _check_slots(spark, workers)
        if engine.gpus_a_task(spark) > 1:
            raise UsageError("a worker trains on one GPU: --conf spark.task.resource.gpu.amount=1, and more --workers")
    dataset, out = storage.absolute(dataset), storage.absolute(out)
    made_of = {**settings.to_dict(), "dataset": described.digest}
    with opened("train", out, made_of, overwrite, versions) as run:
        out = run.out
        work = storage.join(out, WORK)
        job = {"dataset": dataset, "work": work, "settings": settings.to_dict()}
        run.inputs = [{"url": storage.join(dataset, "dataset.json"), "digest": described.digest}]
        run.extra["workers"] = workers
        run.given = 1
        # In a version's folder, which is never made anew, a bundle is whole and of these settings.
        if (run.finished_before or versions) and storage.exists(storage.join(out, "bundle.json")):
            log.info("train: %s is done already", out)
            run.skipped = 1
        else:
            if run.replacing:
                storage.remove(work)
            pixels = described.tiles("train") * described.size**2 * epochs
            with run.stage("train", pixels=pixels), _followed(work, epochs):
                if not on_cluster:
                    _child({"do": ["fit", "assemble"], **job})
                else:
                    if ":" in arch:
                        _child({"do": ["build"], **job})
                    run.extra["restarts"] = _fit_on_cluster(spark, workers, job, max_restarts)
            with run.stage("bundle"):
                if on_cluster:
                    _child({"do": ["assemble"], **job})
                _publish(storage.join(work, "bundle"), out)
            run.done = 1
        storage.remove(work)
        run.finish()
    return out


def _check(settings: Settings, dataset: Dataset, workers: int) -> None:
    if not dataset.tiles("train"):
        raise UsageError(f"dataset {dataset.url} has no training tiles; see its split_rule in dataset.json")
    if not dataset.class_pixels("train").any():
        raise UsageError(f"dataset {dataset.url}: not one pixel of its training tiles is labelled")
    if len(dataset.classes) < 2:
        raise UsageError(f"dataset {dataset.url} has one class, {dataset.classes[0].name}; two are needed at least")
    if settings.epochs < 1 or settings.batch_size < 1:
        raise UsageError(f"epochs {settings.epochs}, batch_size {settings.batch_size}: give at least 1")
    if settings.learning_rate <= 0:
        raise UsageError(f"learning_rate {settings.learning_rate:g}: give a positive number")
    if settings.class_weights not in ("none", "balanced"):
        raise UsageError(f"class_weights {settings.class_weights!r}: use none or balanced")
    good = [n for n in range(1, SHARDS + 1) if SHARDS % n == 0 and settings.batch_size % n == 0]
    if workers not in good:
        raise UsageError(
            f"workers {workers} with batch_size {settings.batch_size}: the weights must not depend on the "
            f"number of workers, so it has to divide {SHARDS} and the batch; use {', '.join(map(str, good))}"
        )
    if ":" not in settings.arch:
        from sattile.training.networks import UNETS

        if settings.arch not in UNETS:
            raise UsageError(f"arch {settings.arch!r}: use {', '.join(UNETS)}, or package.module:function")


def _check_slots(spark: SparkSession, workers: int) -> None:
    """All barrier tasks must run at once: say so now, not in Spark's words after a minute of waiting."""
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise UsageError(
            "training on several workers needs a fixed number of executors: submit with "
            f"--conf spark.dynamicAllocation.enabled=false --num-executors {workers}"
        )
    slots = engine.concurrent_tasks(spark)
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
            gpu = engine.gpus_a_task(spark) > 0
            runner = MirroredStrategyRunner(num_slots=workers, local_mode=False, use_gpu=gpu)
            runner.run(functools.partial(fit_worker, dict(job), storage.access(), gpu))
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
    end = time.monotonic() + REPLACEMENT
    while (slots := engine.concurrent_tasks(spark)) < workers:
        if time.monotonic() > end:
            raise SattileError(
                f"{slots} of {workers} workers are left, and the cluster gave no replacement within {REPLACEMENT} s; "
                f"run it again: it goes on from its last epoch"
            )
        time.sleep(2)


def fit_worker(job: Mapping[str, Any], access: storage.Access | None = None, gpu: bool = False) -> None:
    """What each worker runs; `gpu`: on the one that Spark gave it."""
    from sattile.training.loop import fit

    storage.use(access)
    if gpu:
        _check_gpu()
    fit(dataset=job["dataset"], work=job["work"], settings=Settings(**job["settings"]))


def _check_gpu() -> None:
    import tensorflow as tf

    if not tf.config.list_physical_devices("GPU"):
        raise SattileError(
            f"Spark gave this worker GPU {os.environ.get('CUDA_VISIBLE_DEVICES')} and TensorFlow sees none: "
            f"install sattile[gpu] into the environment, and look at the node's driver (nvidia-smi)"
        )


def _reason(text: str) -> SattileError:
    """The worker's own words out of Spark's."""
    for kind in (UsageError, SattileError):
        mark = f"sattile.errors.{kind.__name__}: "
        if mark in text:
            return kind(text.split(mark, 1)[1].splitlines()[0])
    lines = [line.strip() for line in text.splitlines() if "Error" in line and not line.strip().startswith("at ")]
    return SattileError(f"training failed on a worker: {(lines or [text[:300]])[-1][:500]}")


def _child(job: Mapping[str, Any]) -> None:
    """Run `python -m sattile.training` on a job and hand on what it prints; its errors are raised here.

    TensorFlow stays out of the caller's process, which may be a notebook with a TensorFlow of its own. The child ends
    when this process does: it reads its standard input to the end.
    """
    environment = {
        # The caller's gateway and submit arguments would bind the child to the caller's session.
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
                if not line.startswith(_NOISE):
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
        found = storage.read_json(answer) if storage.exists(answer) else {}
    if status == 0 and found.get("done"):
        return
    if "usage" in found:
        raise UsageError(found["usage"])
    if "error" in found:
        raise SattileError(found["error"])
    how = f"was killed by signal {-status} (out of memory?)" if status < 0 else f"ended with status {status}"
    raise SattileError(f"the training process {how}; it said last:\n{''.join(said)}".rstrip())


# Said by TensorFlow and Spark before their log levels can be set; no news to anyone.
_NOISE = (
    "WARNING: All log messages before absl::InitializeLog",
    "WARNING: Using incubator modules",
    "I0000 ",
    "Doing CPU training...",
    "MirroredStrategyRunner will run in local mode",
    "Setting default log level",
    "To adjust logging",
)


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
