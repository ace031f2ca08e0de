"""The training loop: one process's part of it, under whatever `tf.distribute` strategy is current. No Spark here.

Keras 3's own `model.fit` fails under MultiWorkerMirroredStrategy (a PerReplica tensor reaches the loss), so the loop
is written out. All that is divided by is summed over the workers first, so that the weights do not depend on how
many share a global batch.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import time
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from sattile import metrics, storage
from sattile.errors import SattileError, first_line
from sattile.training import losses, networks, transfer
from sattile.training.augmentation import Augmentation
from sattile.training.batches import Batches, draw_weights, plan
from sattile.training.reader import Dataset, Split, load_dataset, seen_before
from sattile.training.settings import PRECISIONS, Settings, said_by

log = logging.getLogger("sattile")

CHECKPOINT, PROGRESS = "checkpoint.npz", "progress.json"


def first_network(described: Dataset, settings: Settings, *, precision: str = "float32") -> Any:
    """The network that a training begins with: that of its seed."""
    import keras

    keras.utils.set_random_seed(settings.seed)
    return make_network(described, settings, precision=precision)


def make_network(described: Dataset, settings: Settings, *, precision: str = "float32") -> Any:
    """The network of a training, with its first weights.

    Args:
        precision: the weights are float32 in any case.
    """
    import keras

    names: dict[str, Any] = {"bands": described.bands, "classes": [one.name for one in described.classes]}
    statistics = described.statistics
    source = None
    if settings.start_from:
        source = transfer.load(settings.start_from, indices=settings.indices, **names)
        statistics = transfer.statistics(source, described.bands, statistics)
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(PRECISIONS[precision])
    try:
        network = networks.build(
            settings.arch, statistics=statistics, size=described.size, index_names=settings.indices, **names
        )
    finally:
        keras.config.set_dtype_policy(before)
    if source:
        transfer.start(network, source, indices=settings.indices, **names)
    return network


def fit(
    *,
    dataset: str,
    work: str,
    settings: Settings,
    petastorm: bool = False,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train, or go on where the last checkpoint ends. Called alike by every worker of the current strategy.

    Args:
        dataset: URL of the tiles dataset.
        work: URL of a folder that all workers see; the checkpoint of each epoch and TensorBoard's logs go there.
        settings: what to do.
        petastorm: read the tiles through petastorm, which runs what its pickled schema says.
        stop_after: end after this epoch as if killed (for tests).

    Returns:
        `history`: per epoch `epoch, loss, val_loss, val_miou, learning_rate, seconds, tiles_per_s, waiting, best`;
        `best`: the epoch that was kept; `metrics`: of that epoch, over the validation split (`split` says which it
        was). The weights are in the checkpoint: `read_best`.

    Raises:
        SattileError: if workers see different checkpoints.
    """
    import keras
    import tensorflow as tf

    strategy = tf.distribute.get_strategy()
    worker, workers = _place(strategy)
    described = load_dataset(dataset)
    split = Split(described, "train", petastorm=petastorm)
    held_out = Split(described, "val", petastorm=petastorm) if described.tiles("val") else split
    if worker == 0 and held_out is split:
        log.warning("train: the dataset has no validation tiles; the best epoch is chosen on the training tiles")
    shared: dict[str, Any] = {"batch_size": settings.batch_size, "worker": worker, "workers": workers}
    training = shared | {
        "seed": settings.seed,
        "augmentation": Augmentation(haze=settings.haze) if settings.augment else None,
        "weights": draw_weights(split.class_pixels()) if settings.sampling == "balanced" else None,
    }
    validating = shared | {"shuffle": False, "hidden": seen_before(held_out)}

    with strategy.scope():
        network = first_network(described, settings, precision=settings.precision)
        steps = len(plan(len(split), settings.batch_size, seed=0, epoch=0)[0])
        optimizer = keras.optimizers.AdamW(_schedule(settings, steps), weight_decay=settings.weight_decay)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        optimizer.build(network.trainable_variables)
    loss = losses.Loss(
        losses.class_weights(settings.class_weights, described.class_pixels("train")),
        dice=settings.dice, smoothing=settings.label_smoothing, hard_share=settings.hard_share,
    )  # fmt: skip
    train_step, validate_step = _steps(strategy, network, optimizer, loss, settings.accumulate)

    url = storage.join(work, CHECKPOINT)
    own = networks.fingerprint(network) if ":" in settings.arch else None
    key = storage.digest(said_by(settings, described, own))
    state = _resume(url, key, network, optimizer)
    _agree(strategy, len(state.history))
    callbacks = keras.callbacks.CallbackList([_tensorboard(work)] if worker == 0 else [], model=network)
    callbacks.on_train_begin()
    try:
        for epoch in range(len(state.history), settings.epochs):
            if state.stale >= settings.patience > 0:
                break
            callbacks.on_epoch_begin(epoch)
            start = time.monotonic()
            batches = Batches(split, epoch=epoch, **training)
            found = [train_step(*_spread(strategy, workers, batch)) for batch in batches]
            mean_loss = float(np.mean([float(one) for one in found]))
            _check_loss(mean_loss, "loss", epoch, settings)
            seconds = time.monotonic() - start
            parts = [validate_step(*_spread(strategy, workers, batch)) for batch in Batches(held_out, **validating)]
            confusion = np.sum([np.asarray(part[0], np.int64) for part in parts], axis=0)
            measured = metrics.summarize(confusion, described.classes)
            val_loss = float(sum(float(part[1]) for part in parts) / max(confusion.sum(), 1))
            _check_loss(val_loss, "validation loss", epoch, settings)
            logs = {
                "epoch": epoch + 1,
                "loss": mean_loss,
                "val_loss": val_loss,
                "val_miou": measured["miou"],
                "learning_rate": float(optimizer.learning_rate),
                "seconds": round(time.monotonic() - start, 2),
                "tiles_per_s": round(len(split) / seconds, 1),
                "waiting": round(batches.waited / seconds, 4),
            }
            state.add(logs, {**measured, "split": held_out.name}, network, last=settings.keep == "last")
            # Every worker reads the weights (that may take all of them), one writes.
            saved = state.to_bytes(key, network, optimizer)
            if worker == 0:
                storage.write_bytes(url, saved)
                storage.write_json(storage.join(work, PROGRESS), state.history)
            callbacks.on_epoch_end(epoch, {name: float(value) for name, value in logs.items() if value is not None})
            if stop_after == epoch + 1:
                break
    finally:
        callbacks.on_train_end()
    return {
        "history": state.history,
        "best": state.best,
        "metrics": state.metrics,
    }


def _check_loss(value: float, name: str, epoch: int, settings: Settings) -> None:
    if not np.isfinite(value):
        raise SattileError(
            f"the {name} of epoch {epoch + 1} is {value}: lower --learning-rate (it was {settings.learning_rate:g})"
        )


def describe(logs: dict[str, Any], epochs: int) -> str:
    """The line a person follows; * marks the best so far."""
    miou = "  --  " if logs["val_miou"] is None else f"{logs['val_miou']:.4f}"
    return (
        f"epoch {logs['epoch']:3d}/{epochs}  loss {logs['loss']:.4f}  val loss {logs['val_loss']:.4f}  "
        f"val mIoU {miou}  {logs['seconds']:.1f} s  {logs['tiles_per_s']:.0f} tiles/s  "
        f"waited {logs['waiting']:.1%}{' *' if logs['best'] else ''}"
    )


def _steps(strategy: Any, network: Any, optimizer: Any, loss: losses.Loss, accumulate: int) -> tuple[Any, Any]:
    """The two compiled functions over one distributed batch: train -> loss; validate -> (confusion, summed loss)."""
    import tensorflow as tf

    classes = len(loss.weights)
    log_probabilities = losses.log_probabilities(network)

    def train(images: Any, labels: Any) -> Any:
        context = tf.distribute.get_replica_context()
        totals = tf.maximum(context.all_reduce(tf.distribute.ReduceOp.SUM, loss.totals(labels)), 1e-6)
        # Contiguous parts: slot by slot the same ones for any number of workers.
        parts = list(zip(tf.split(images, accumulate), tf.split(labels, accumulate), strict=True))
        whole, gradients = tf.constant(0.0), None
        for some_images, some_labels in parts:
            # One after the other: their activations must not be alive together.
            with tf.control_dependencies([whole]), tf.GradientTape() as tape:
                logp = log_probabilities(tf.identity(some_images), training=True)
                value = tf.reduce_sum(loss.sums(logp, some_labels) / totals)
                if network.losses:
                    value += tf.add_n(network.losses) / (context.num_replicas_in_sync * accumulate)
            found = [_value(one) for one in tape.gradient(value, network.trainable_variables)]
            gradients = found if gradients is None else [a + b for a, b in zip(gradients, found, strict=True)]
            with tf.control_dependencies(gradients):
                whole += value
        optimizer.apply(gradients, network.trainable_variables)  # sums over the replicas
        return whole

    def validate(images: Any, labels: Any) -> tuple[Any, Any]:
        logp = log_probabilities(images, training=False)
        index = tf.cast(labels, tf.int32)
        counts = tf.boolean_mask(index * classes + tf.argmax(logp, -1, tf.int32), index < classes)
        confusion = tf.math.bincount(counts, minlength=classes * classes, maxlength=classes * classes)
        return tf.reshape(confusion, (classes, classes)), losses.cross_entropy_sum(logp, labels)

    @tf.function
    def train_step(images: Any, labels: Any) -> Any:
        return strategy.reduce(tf.distribute.ReduceOp.SUM, strategy.run(train, (images, labels)), axis=None)

    @tf.function
    def validate_step(images: Any, labels: Any) -> Any:
        parts = strategy.run(validate, (images, labels))
        return [strategy.reduce(tf.distribute.ReduceOp.SUM, part, axis=None) for part in parts]

    return train_step, validate_step


def _value(gradient: Any) -> Any:
    import tensorflow as tf

    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def _schedule(settings: Settings, steps: int) -> Any:
    import keras

    warmup = max(round(settings.warmup * steps), 1)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=settings.learning_rate / 20,
        decay_steps=max(settings.epochs * steps - warmup, 1),
        warmup_target=settings.learning_rate,
        warmup_steps=warmup,
        alpha=0.0,
    )


def _place(strategy: Any) -> tuple[int, int]:
    """This worker's number, and how many there are."""
    resolver = strategy.cluster_resolver
    if resolver is None or resolver.task_type != "worker" or not resolver.cluster_spec().jobs:
        return 0, 1
    return resolver.task_id, resolver.cluster_spec().num_tasks("worker")


def _spread(strategy: Any, workers: int, batch: tuple[np.ndarray, np.ndarray]) -> tuple[Any, Any]:
    """This worker's share of a batch, spread over its devices if it has several."""
    import tensorflow as tf

    devices = strategy.num_replicas_in_sync // workers
    tensors = [tf.constant(part) for part in batch]
    if devices == 1:
        return tensors[0], tensors[1]

    def part(whole: Any) -> Any:
        return strategy.experimental_distribute_values_from_function(
            lambda context: whole[context.replica_id_in_sync_group % devices :: devices]
        )

    return part(tensors[0]), part(tensors[1])


def _agree(strategy: Any, epochs: int) -> None:
    """All workers go on from the same epoch, or none: they must see one folder."""
    import tensorflow as tf

    @tf.function
    def total() -> Any:
        ones = strategy.run(lambda: tf.constant([1.0, float(epochs), float(epochs) ** 2]))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, ones, axis=None)

    count, first, second = total().numpy()
    if round(count * second) != round(first**2):
        raise SattileError(
            "the workers see different checkpoints: the out folder must be on storage that all of them share"
        )


def _tensorboard(work: str) -> Any:
    """A callback that writes TensorBoard's event files: TFRecords of Event messages, which need no TensorBoard here."""
    import keras
    import tensorflow as tf
    from tensorflow.core.util import event_pb2

    class Scalars(keras.callbacks.Callback):
        def on_train_begin(self, logs: Any = None) -> None:
            self.url = storage.join(work, "tensorboard", f"events.out.tfevents.{time.time_ns()}.sattile")
            self.scratch = tempfile.TemporaryDirectory(prefix="sattile-")
            self.path = os.path.join(self.scratch.name, "events")
            self.file = tf.io.TFRecordWriter(self.path)
            self.write(event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"))

        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            event = event_pb2.Event(wall_time=time.time(), step=epoch + 1)
            for name, value in (logs or {}).items():
                event.summary.value.add(tag=name, simple_value=value)
            self.write(event)

        def on_train_end(self, logs: Any = None) -> None:
            self.file.close()
            self.scratch.cleanup()

        def write(self, event: Any) -> None:
            self.file.write(event.SerializeToString())
            self.file.flush()
            storage.write_bytes(self.url, Path(self.path).read_bytes())

    return Scalars()


class _State:
    """How far a training has come, and the best so far."""

    def __init__(self) -> None:
        self.history: list[dict[str, Any]] = []
        self.best = 0
        self.score = -1.0
        self.metrics: dict[str, Any] = {}
        self.weights: list[np.ndarray] = []

    @property
    def stale(self) -> int:
        """Epochs since the best."""
        return len(self.history) - self.best

    def add(self, logs: dict[str, Any], measured: dict[str, Any], network: Any, *, last: bool = False) -> None:
        # Without a labelled validation pixel there is no mIoU: then the latest is kept.
        score = logs["val_miou"] if logs["val_miou"] is not None else 0.0
        if last or score > self.score or logs["val_miou"] is None:
            self.best, self.score, self.metrics = logs["epoch"], score, measured
            self.weights = network.get_weights()
        self.history.append({**logs, "best": self.best == logs["epoch"]})

    def to_bytes(self, key: str, network: Any, optimizer: Any) -> bytes:
        meta = {"key": key, "history": self.history, "best": self.best, "score": self.score, "metrics": self.metrics}
        arrays = {"meta": np.array(json.dumps(meta))}
        for name, values in (
            ("now", [np.asarray(one) for one in network.variables]),
            ("best", self.weights),
            ("optimizer", [np.asarray(one) for one in optimizer.variables]),
        ):
            arrays |= {f"{name}{number}": value for number, value in enumerate(values)}
        sink = io.BytesIO()
        np.savez(sink, **arrays)
        return sink.getvalue()


def _numbered(saved: Any, name: str) -> list[np.ndarray]:
    count = sum(one.startswith(name) for one in saved.files)
    return [saved[f"{name}{number}"] for number in range(count)]


def _resume(url: str, key: str, network: Any, optimizer: Any) -> _State:
    """Go on from the checkpoint of a training with the same settings and tiles, if there is one.

    Its variables (the states of dropout's random numbers among them, which are no weights) and moments are put into
    network and optimizer. One that can't be read is passed over: a machine that failed may have left it.
    """
    if not storage.exists(url):
        return _State()
    variables = [*network.variables, *optimizer.variables]
    try:
        with np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False) as saved:
            state, found = _read_state(saved)
            if found != key:
                return _State()
            values = [*_numbered(saved, "now"), *_numbered(saved, "optimizer")]
        if [one.shape for one in values] != [tuple(one.shape) for one in variables]:
            raise ValueError("it holds other variables")
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        log.warning("train: %s can't be used (%s): beginning anew", url, first_line(error))
        return _State()
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)
    return state


def read_best(work: str) -> _State:
    """The last checkpoint: `history`, `best` (epoch), its `metrics` and `weights` in the order of `model.weights`."""
    with np.load(io.BytesIO(storage.read_bytes(storage.join(work, CHECKPOINT))), allow_pickle=False) as saved:
        return _read_state(saved)[0]


def _read_state(saved: Any) -> tuple[_State, str]:
    meta = json.loads(str(saved["meta"]))
    state = _State()
    state.history, state.best, state.score = meta["history"], meta["best"], meta["score"]
    state.metrics, state.weights = meta["metrics"], _numbered(saved, "best")
    return state, meta["key"]
