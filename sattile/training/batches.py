"""Tiles as batches: the same global batches for any number of workers.

The tiles of a split, by scene and place, are cut into 12 virtual shards. Slot `j` of an epoch is filled from shard
`j mod 12`, and worker `i` of `N` (a divisor of 12) takes the slots with `j mod N = i`: it reads its own only, and
the union over the workers does not depend on `N`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from sattile import spectrum
from sattile.errors import UsageError
from sattile.schema import IGNORE
from sattile.training.augmentation import Augmentation
from sattile.training.reader import Split

SHARDS = 12

RUN = 16
"""Neighbouring tiles that are read together: whole runs are shuffled, then the tiles of 8 runs among themselves."""

AHEAD = 3
"""Batches under way beside the one in use."""


def plan(
    tiles: int,
    batch_size: int,
    *,
    seed: int,
    epoch: int,
    shuffle: bool = True,
    weights: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Which tile fills which slot of an epoch. Pure.

    Args:
        tiles: rows of the split.
        batch_size: of the global batch.
        weights: (tiles,) how often a tile is to be drawn, relative to others; None is each once. The shards are then of
            tiles from everywhere: those of a class may all lie at one place.

    Returns:
        rows (steps, batch_size) int64, and real (steps, batch_size) bool: each tile is real exactly once, or, with
        weights, as many slots of its shard are. The other slots make the last batch whole; they hold some tile,
        whose labels do not count. Worker `i` of `N` takes the columns `i::N`.
    """
    order = np.arange(tiles) if weights is None else np.random.default_rng(0).permutation(tiles)
    shards = [order[tiles * s // SHARDS : tiles * (s + 1) // SHARDS] for s in range(SHARDS)]
    for s, shard in enumerate(shards):
        rng = np.random.default_rng([seed, epoch, s])
        if weights is not None and len(shard) and weights[shard].sum() > 0:
            shard = np.sort(rng.choice(shard, len(shard), p=weights[shard] / weights[shard].sum()))
        shards[s] = _shuffle(shard, rng) if shuffle else shard
    longest = max(len(shard) for shard in shards)
    slots = -(-longest * SHARDS // batch_size) * batch_size
    rows = np.arange(slots) % max(tiles, 1)
    real = np.zeros(slots, bool)
    for s, shard in enumerate(shards):
        own = s + SHARDS * np.arange(len(shard))
        rows[own], real[own] = shard, True
    rows, real = rows.reshape(-1, batch_size), real.reshape(-1, batch_size)
    counts = real.any(1)  # a step without a tile would move weights by decay and momentum alone
    return rows[counts], real[counts]


def _shuffle(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffled, yet read nearly in order: runs of rows change places, then rows within 8 runs."""
    runs = [rows[start : start + RUN] for start in range(0, len(rows), RUN)]
    mixed = np.concatenate([runs[k] for k in rng.permutation(len(runs))]) if runs else rows
    for start in range(0, len(mixed), 8 * RUN):
        rng.shuffle(mixed[start : start + 8 * RUN])
    return mixed


def draw_weights(class_pixels: np.ndarray) -> np.ndarray:
    """How often tiles are drawn so that each class is seen as often as the others, (tiles,) float64.

    A class is drawn, then one of its pixels: the tile that holds it.

    Args:
        class_pixels: (tiles, classes) labelled pixels.
    """
    totals = class_pixels.sum(0)
    shares = class_pixels[:, totals > 0] / totals[totals > 0]
    return shares.mean(1) if shares.size else np.ones(len(class_pixels))


class Batches:
    """One worker's share of each global batch of an epoch, made by threads while the caller works on an earlier one.

    Iterating yields images (batch_size / workers, size, size, bands) float32, with the training mean where invalid, and
    labels (batch_size / workers, size, size) uint8 class index, `IGNORE` where a pixel does not count; as many batches
    on every worker.

    Args:
        split: the tiles.
        batch_size: of the global batch; a multiple of `workers`, which divides 12.
        seed, epoch: with the tile's id, they alone decide order and augmentation.
        hidden: per tile, pixels that do not count (`reader.seen_before`).
        weights: see `plan`.
        threads: that make batches; None is as many as there are cores, 8 at most.

    Attributes:
        waited: seconds that the caller has waited for a batch.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        worker: int = 0,
        workers: int = 1,
        seed: int = 0,
        epoch: int = 0,
        augmentation: Augmentation | None = None,
        shuffle: bool = True,
        hidden: Sequence[Sequence[tuple[slice, slice]]] | None = None,
        weights: np.ndarray | None = None,
        threads: int | None = None,
    ):
        if SHARDS % workers or batch_size % workers:
            raise UsageError(f"{workers} workers: use a divisor of {SHARDS} that divides batch_size {batch_size}, too")
        rows, real = plan(len(split), batch_size, seed=seed, epoch=epoch, shuffle=shuffle, weights=weights)
        self._slots = list(zip(rows[:, worker::workers], real[:, worker::workers], strict=True))
        self._split, self._seed, self._epoch = split, seed, epoch
        self._augmentation, self._hidden = augmentation, hidden
        self._haze = spectrum.haze(split.dataset.bands, split.dataset.mean)
        self._batch_size, self._worker, self._workers = batch_size, worker, workers
        self._drawn_once = weights is None
        self._threads = threads or min(len(os.sched_getaffinity(0)), 8)
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self._slots)

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        size, bands = self._split.dataset.size, len(self._split.dataset.bands)
        with ThreadPoolExecutor(self._threads, thread_name_prefix="tiles") as pool:
            under_way: deque[tuple[list[Future[None]], np.ndarray, np.ndarray]] = deque()

            def begin(number: int) -> None:
                rows, real = self._slots[number]
                images = np.empty((len(rows), size, size, bands), np.float32)
                labels = np.empty((len(rows), size, size), np.uint8)
                tasks = [
                    pool.submit(self._make, int(row), bool(counts), images[slot], labels[slot], self._key(number, slot))
                    for slot, (row, counts) in enumerate(zip(rows, real, strict=True))
                ]
                under_way.append((tasks, images, labels))

            try:
                for number in range(min(AHEAD, len(self))):
                    begin(number)
                for number in range(len(self)):
                    start = time.perf_counter()
                    tasks, images, labels = under_way.popleft()
                    for task in tasks:
                        task.result()
                    self.waited += time.perf_counter() - start
                    if number + AHEAD < len(self):
                        begin(number + AHEAD)
                    yield images, labels
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _key(self, step: int, slot: int) -> list[int]:
        """What the augmentation of a slot follows from, beside its tile: the same for any number of workers.

        A tile that is drawn twice in an epoch is varied twice.
        """
        if self._drawn_once:
            return [self._seed, self._epoch]
        return [self._seed, self._epoch, step * self._batch_size + self._worker + slot * self._workers]

    def _make(self, row: int, counts: bool, image_out: np.ndarray, labels_out: np.ndarray, key: list[int]) -> None:
        """Read, vary and fill one tile, into its place in a batch."""
        split = self._split
        image, labels, valid = split.read(row)
        if not counts:
            labels[:] = IGNORE
        elif not valid.all():
            labels[~valid] = IGNORE
        for part in self._hidden[row] if self._hidden else ():
            labels[part] = IGNORE
        if self._augmentation is None:
            np.copyto(image_out, image, casting="unsafe")
            np.copyto(labels_out, labels)
        else:
            rng = np.random.default_rng([*key, _number(split.tile_ids[row])])
            dataset = split.dataset
            tile, out = (image, labels, valid), (image_out, labels_out)
            valid = self._augmentation.vary(tile, out, rng, dataset.mean, dataset.std, self._haze)
        # Last, as at prediction; floats may hold NaN there, and one would spoil a batch's statistics.
        if not valid.all():
            image_out[~valid] = split.dataset.mean


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
