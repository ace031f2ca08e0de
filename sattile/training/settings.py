"""All that shapes the weights of a training: given by the user, checked once, the same on every worker."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sattile import spectrum, storage, versions
from sattile.errors import UsageError
from sattile.statistics import MEASURED
from sattile.training import indices, networks, transfer
from sattile.training.batches import SHARDS
from sattile.training.reader import Dataset

PRECISIONS = {"float32": "float32", "bfloat16": "mixed_bfloat16"}
"""Keras's names of them."""

CHOICES = {
    "precision": tuple(PRECISIONS),
    "class_weights": ("none", "balanced"),
    "sampling": ("uniform", "balanced"),
    "keep": ("best", "last"),
}
"""Settings that are one of some words."""


@dataclass(frozen=True)
class Settings:
    """All that shapes the weights.

    Attributes:
        arch: as `networks.build` takes it.
        indices: spectral indices beside the bands, see `indices`.
        start_from: bundle or Keras file to take the first weights from; None starts from the seed.
        epochs: passes over the training tiles.
        batch_size: of the global batch, over all workers.
        accumulate: parts that a batch goes through the network in; its gradients are added up.
        learning_rate: its peak; it warms up over `warmup` epochs and falls to 0 along a cosine.
        weight_decay: AdamW's.
        precision: `float32`, or `bfloat16` for activations and their gradients.
        dice, label_smoothing, hard_share: see `losses.Loss`.
        class_weights: `none`, or `balanced`: (1 / share of a class) ** 0.5, mean 1 over the labelled pixels.
        sampling: `uniform`, each tile once an epoch, or `balanced`: see `batches.draw_weights`.
        keep: the weights of which epoch: `best` by validation mIoU, or `last`.
        patience: epochs without a better validation mIoU after which it ends; 0 is never.
        augment, haze: see `augmentation`.
        seed: of weights, order and augmentation.
    """

    arch: str = "unet-small"
    indices: tuple[str, ...] = ()
    start_from: str | None = None
    epochs: int = 30
    batch_size: int = 16
    accumulate: int = 1
    learning_rate: float = 2e-3
    weight_decay: float = 1e-3
    precision: str = "float32"
    warmup: float = 1.0
    dice: float = 1.0
    label_smoothing: float = 0.0
    hard_share: float = 1.0
    class_weights: str = "none"
    sampling: str = "uniform"
    patience: int = 0
    augment: bool = True
    haze: float = 0.0
    keep: str = "best"
    seed: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what came later and is not used is left out, so that earlier trainings have the same settings."""
        values = asdict(self) | {"indices": list(self.indices)}
        unused = {"haze": 0.0, "keep": "best"}
        return {name: value for name, value in values.items() if name not in unused or value != unused[name]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        return cls(**{**values, "indices": tuple(values.get("indices", ()))})


def make_settings(dataset: Dataset, options: Mapping[str, Any]) -> Settings:
    """Settings from the options of `train`: indices in words, where weights come from as the user wrote it."""
    given = dict(options)
    given["indices"] = indices.choose(given.get("indices") or "none", dataset.bands)
    if given.get("start_from"):
        # Of a folder of versions the one that is the latest now, whatever is published while this trains.
        url = storage.absolute(given["start_from"])
        given["start_from"] = url if transfer.is_file(url) else versions.resolve(url)
    return Settings.from_dict(given)


def said_by(settings: Settings, dataset: Dataset, network: str | None = None) -> dict[str, Any]:
    """What the run record says a model was made of: two trainings of one record give the same weights (to the bit with
    as many threads).

    Args:
        network: `networks.fingerprint` of what a builder of the user's own makes, whose name says nothing.
    """
    said = {
        **settings.to_dict(),
        # The digest is of the tiles: what their bands and labels are called is another thing.
        "dataset": dataset.digest,
        "bands": list(dataset.bands),
        "classes": {str(one.id): one.name for one in dataset.classes},
    }
    if network is not None:
        said["network"] = network
    if settings.start_from:
        said["start_from"] = transfer.digest(settings.start_from)
    return said


def most_devices(settings: Settings, there: int) -> int:
    """How many of the devices that are there can share a batch evenly."""
    return max((n for n in range(1, there + 1) if settings.batch_size % (n * settings.accumulate) == 0), default=0)


def check(settings: Settings, dataset: Dataset, *, workers: int = 1, devices: int = 1) -> None:
    """Refuse what cannot be, before anything runs.

    Args:
        workers: that share a batch; each with so many devices.
    """
    if not dataset.tiles("train"):
        raise UsageError(f"dataset {dataset.url} has no training tiles; see its split_rule in dataset.json")
    if not dataset.class_pixels("train").any():
        raise UsageError(f"dataset {dataset.url}: not one pixel of its training tiles is labelled")
    if len(dataset.classes) < 2:
        raise UsageError(f"dataset {dataset.url} has one class, {dataset.classes[0].name}; two are needed at least")
    if settings.epochs < 1 or settings.batch_size < 1:
        raise UsageError(f"epochs {settings.epochs}, batch_size {settings.batch_size}: give at least 1")
    for name in ("learning_rate", "weight_decay", "dice", "patience", "haze"):
        value = getattr(settings, name)
        if not (math.isfinite(value) and value >= 0) or (name == "learning_rate" and value == 0):
            raise UsageError(f"{name} {value:g}: give a positive number{', or 0' * (name != 'learning_rate')}")
    if not 0 <= settings.seed < 1 << 32:
        raise UsageError(f"seed {settings.seed}: give a whole number from 0 to {(1 << 32) - 1}")
    for name, known in CHOICES.items():
        if getattr(settings, name) not in known:
            raise UsageError(f"{name} {getattr(settings, name)!r}: use {' or '.join(known)}")
    if not 0 <= settings.label_smoothing < 1:
        raise UsageError(f"label_smoothing {settings.label_smoothing:g}: give a share below 1, such as 0.1")
    if not 0 < settings.hard_share <= 1:
        raise UsageError(f"hard_share {settings.hard_share:g}: give a share above 0, such as 0.25; 1 counts all pixels")
    if settings.keep == "last" and settings.patience:
        raise UsageError(
            f"patience {settings.patience}: it waits for a better epoch than the one that is kept, and keep says the "
            f"last; leave one of them out"
        )
    if settings.haze and not settings.augment:
        raise UsageError(f"haze {settings.haze:g}: it is a part of augment, which is off; leave one of them out")
    if settings.haze and not spectrum.haze(dataset.bands, np.ones(len(dataset.bands))).any():
        raise UsageError(
            f"haze {settings.haze:g}: the wavelength of no band is known by its name; name them coastal, blue, green, "
            f"red, nir, swir1, swir2 at `sattile tile`, or leave haze out; here are {', '.join(dataset.bands)}"
        )
    if settings.accumulate < 1:
        raise UsageError(f"accumulate {settings.accumulate}: give at least 1, the parts that a batch is cut into")
    parts = devices * settings.accumulate
    if settings.batch_size % parts:
        raise UsageError(
            f"batch_size {settings.batch_size}: give a multiple of {parts} (accumulate {settings.accumulate} x "
            f"{devices} device(s) a worker)"
        )
    good = [n for n in range(1, SHARDS + 1) if SHARDS % n == 0 and settings.batch_size % (n * parts) == 0]
    if workers not in good:
        raise UsageError(
            f"workers {workers} with batch_size {settings.batch_size}: the weights must not depend on the "
            f"number of workers, so it has to divide {SHARDS} and the batch; use {', '.join(map(str, good))}"
        )
    if ":" not in settings.arch:
        networks.check_name(settings.arch)
        step = networks.stride(settings.arch)
        if dataset.size % step:
            fitting = " or ".join(str(one * step) for one in (dataset.size // step, dataset.size // step + 1) if one)
            also = [name for name in networks.BODIES if dataset.size % networks.stride(name) == 0]
            raise UsageError(
                f"arch {settings.arch} halves its input down to 1/{step}, and the tiles of dataset {dataset.url} have "
                f"{dataset.size} pixels: tile again with --size {fitting}, or use --arch {', '.join(also)}"
            )
    for band, found in dataset.statistics.items():
        if max(abs(found["mean"]), found["std"]) > MEASURED:
            raise UsageError(
                f"dataset {dataset.url}: band {band} has values from {found['min']:g} to {found['max']:g}, which no "
                f"sensor measures: a missing value that the files do not declare, most likely; tile again with "
                f"--nodata {found['min' if -found['min'] > found['max'] else 'max']:.9g}"
            )
    if settings.start_from:
        transfer.digest(settings.start_from)  # it is there, and a network
        earlier = transfer.arch(settings.start_from)
        if earlier and earlier != settings.arch and ":" not in earlier + settings.arch:
            raise UsageError(
                f"start_from {settings.start_from} is a {earlier}, whose weights a {settings.arch} has no place for: "
                f"say --arch {earlier}"
            )
