"""A tiles dataset as batches: the same global batches for any number of workers.

The rows of a split, by scene and place, are cut into 12 virtual shards. Slot `j` of an epoch is filled from
shard `j mod 12`, and worker `i` of `N` (a divisor of 12) takes the slots with `j mod N = i`: it reads its own shards
only, and the union over the workers does not depend on `N`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import queue
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sattile import storage
from sattile.dataset import read_dataset
from sattile.errors import UsageError
from sattile.schema import IGNORE, TILE, SegmentClass, read_classes

SHARDS = 12
GROUND = 2048
"""Pixels; tiles of a square of this edge follow each other."""

RUN = 16
"""Neighbouring rows that are read together: whole runs are shuffled, then the rows of 8 runs among themselves."""


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says.

    Attributes:
        url: the folder.
        bands: names, in channel order.
        classes: in the order of the scores.
        size: edge of a tile, in pixels.
        mean, std: of the training split, float32 (bands,), stored values.
        description: the whole JSON.
    """

    url: str
    bands: tuple[str, ...]
    classes: tuple[SegmentClass, ...]
    size: int
    mean: np.ndarray
    std: np.ndarray
    description: dict[str, Any]

    @property
    def digest(self) -> str:
        return self.description["digest"]

    def tiles(self, split: str) -> int:
        return self.description["splits"].get(split, {}).get("tiles", 0)

    def class_pixels(self, split: str) -> np.ndarray:
        """Labelled pixels of each class, in the order of `classes`, int64."""
        counted = self.description["splits"].get(split, {}).get("class_pixels", {})
        return np.array([counted.get(str(one.id), 0) for one in self.classes], np.int64)


def load_dataset(url: str) -> Dataset:
    """Read `dataset.json`.

    Raises:
        UsageError: if the folder is missing, is no tiles dataset, or is of a newer format.
    """
    description = read_dataset(url)
    bands = tuple(description["bands"])
    statistics = [description["statistics"][band] for band in bands]
    return Dataset(
        url=url,
        bands=bands,
        classes=read_classes(description["classes"]),
        size=description["size"],
        mean=np.array([one["mean"] for one in statistics], np.float32),
        std=np.array([one["std"] for one in statistics], np.float32),
        description=description,
    )


class Split:
    """The tiles of one split, by scene and place. Reads row groups when asked for and keeps the last ones.

    Of a dataset elsewhere only the row groups that are asked for travel (a worker's share), once: they stay on scratch.

    Args:
        dataset: its description.
        name: `train`, `val` or `test`.
        cache_bytes: how much of it may stay in memory.
    """

    def __init__(self, dataset: Dataset, name: str, *, cache_bytes: int = 2 << 30):
        self.dataset = dataset
        self.name = name
        self.cache_bytes = cache_bytes
        split = dataset.description["splits"].get(name, {})
        self._files = [
            pq.ParquetFile(storage.open_file(storage.join(dataset.url, name, file))) for file in split.get("files", [])
        ]
        elsewhere = storage.scheme_of(dataset.url) != "file"
        self._scratch = tempfile.mkdtemp(dir=storage.own_folder()) if elsewhere else None
        # (first row, file, row group), in order
        self._groups: list[tuple[int, int, int]] = []
        rows = 0
        for number, file in enumerate(self._files):
            for group in range(file.metadata.num_row_groups):
                self._groups.append((rows, number, group))
                rows += file.metadata.row_group(group).num_rows
        self._firsts = np.array([first for first, _, _ in self._groups], np.int64)
        self._kept: dict[int, pa.Table] = {}
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._cached = 0
        columns = ["tile_id", "scene_id", "row", "col"]
        index = (
            pa.concat_tables([file.read(columns=columns) for file in self._files])
            if self._files
            else pa.schema([TILE.field(name) for name in columns]).empty_table()
        )
        # How tiles are spread over files is chance: the same tiles in the same order train the same network. Tiles of
        # the same ground lie in the same files, so that it is read in pieces.
        row, col = (index[name].to_numpy() for name in ("row", "col"))
        scene = np.unique(index["scene_id"].to_pylist(), return_inverse=True)[1]
        self._order = np.lexsort([col, row, col // GROUND, row // GROUND, scene])
        self.index = index.take(self._order)
        self.tile_ids: list[str] = self.index["tile_id"].to_pylist()
        self._class_index = np.full(256, IGNORE, np.uint8)
        for position, one in enumerate(dataset.classes):
            self._class_index[one.id] = position

    def __len__(self) -> int:
        return len(self.tile_ids)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One tile: image (size, size, bands) as stored, class index (size, size) uint8 with `IGNORE`, valid bool."""
        row = int(self._order[row])
        number = int(np.searchsorted(self._firsts, row, side="right")) - 1
        table = self._read_group(number)
        offset = row - self._groups[number][0]
        image, labels, valid = (decode(table[name][offset].as_buffer()) for name in ("image", "labels", "valid"))
        return image, self._class_index[labels], valid

    def _read_group(self, number: int) -> pa.Table:
        if number in self._kept:
            return self._kept[number]
        if number in self._cache:
            self._cache.move_to_end(number)
            return self._cache[number]
        _, file, group = self._groups[number]
        table = self._files[file].read_row_group(group, columns=["image", "labels", "valid"])
        if self._scratch and shutil.disk_usage(self._scratch).free > 2 * table.nbytes + (1 << 28):
            self._kept[number] = _mapped(table, os.path.join(self._scratch, str(number)))
            return self._kept[number]
        self._cache[number] = table
        self._cached += table.nbytes
        while self._cached > self.cache_bytes and len(self._cache) > 1:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return table


def _mapped(table: pa.Table, path: str) -> pa.Table:
    """The same table, in a file."""
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


def decode(data: Any) -> np.ndarray:
    """The array in `.npy` bytes, without copying them (read-only)."""
    view = memoryview(data)
    if bytes(view[6:8]) != b"\x01\x00":
        return np.load(io.BytesIO(view), allow_pickle=False)
    start = 10 + int.from_bytes(view[8:10], "little")
    shape, fortran, dtype = _read_header(bytes(view[:start]))
    return np.frombuffer(view, dtype, offset=start).reshape(shape, order="F" if fortran else "C")


@functools.lru_cache(maxsize=64)
def _read_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    file = io.BytesIO(header)
    np.lib.format.read_magic(file)
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("object arrays are not read")
    return shape, fortran, dtype


def plan(tiles: int, batch_size: int, *, seed: int, epoch: int, shuffle: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Which tile fills which slot of an epoch. Pure.

    Args:
        tiles: rows of the split.
        batch_size: of the global batch.

    Returns:
        rows (steps, batch_size) int64, and real (steps, batch_size) bool: each tile is real exactly once. The other
        slots make the last batch whole; they hold some tile, whose labels do not count. Worker `i` of `N` takes the
        columns `i::N`.
    """
    shards = [np.arange(tiles * s // SHARDS, tiles * (s + 1) // SHARDS) for s in range(SHARDS)]
    if shuffle:
        shards = [_shuffle(shard, np.random.default_rng([seed, epoch, s])) for s, shard in enumerate(shards)]
    longest = max(len(shard) for shard in shards)
    slots = -(-longest * SHARDS // batch_size) * batch_size
    rows = np.arange(slots) % max(tiles, 1)
    real = np.zeros(slots, bool)
    for s, shard in enumerate(shards):
        own = s + SHARDS * np.arange(len(shard))
        rows[own], real[own] = shard, True
    return rows.reshape(-1, batch_size), real.reshape(-1, batch_size)


def _shuffle(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shuffled, yet read nearly in order: runs of rows change places, then rows within 8 runs."""
    runs = [rows[start : start + RUN] for start in range(0, len(rows), RUN)]
    mixed = np.concatenate([runs[k] for k in rng.permutation(len(runs))]) if runs else rows
    for start in range(0, len(mixed), 8 * RUN):
        rng.shuffle(mixed[start : start + 8 * RUN])
    return mixed


@dataclass(frozen=True)
class Augmentation:
    """How a training tile is varied: the 8 flips and quarter turns, and its values, in standard deviations of a band.

    Attributes:
        gain: spread of a factor on the distance from the mean, common to all bands.
        brightness: spread of an offset common to all bands.
        jitter: spread of an offset of each band.
    """

    gain: float = 0.1
    brightness: float = 0.1
    jitter: float = 0.05


def recolour(
    image: np.ndarray, rng: np.random.Generator, how: Augmentation, mean: np.ndarray, std: np.ndarray
) -> np.ndarray:
    """Vary the values of one tile, (size, size, bands) float32."""
    factor = np.float32(1 + how.gain * rng.uniform(-1, 1))
    offset = how.brightness * rng.normal() + how.jitter * rng.normal(size=len(mean))
    return image * factor + (mean * (1 - factor) + std * offset).astype(np.float32)


def turn(image: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """One of the 8 flips and quarter turns, the same for image (size, size, bands) and labels (size, size)."""
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    return (image[:, ::-1], labels[:, ::-1]) if mirrored else (image, labels)


def batches(
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
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One worker's share of each global batch of an epoch, read ahead in a thread.

    Args:
        split: the tiles.
        batch_size: of the global batch; a multiple of `workers`, which divides 12.
        seed, epoch: with the tile's id, they alone decide order and augmentation.
        hidden: per tile, pixels that do not count (`seen_before`).

    Yields:
        images (batch_size / workers, size, size, bands) float32 with the training mean where invalid, and labels
        (batch_size / workers, size, size) uint8 class index, `IGNORE` where a pixel does not count; as many
        on every worker.
    """
    if SHARDS % workers or batch_size % workers:
        raise UsageError(f"{workers} workers: use a divisor of {SHARDS} that divides batch_size {batch_size}, too")
    rows, real = plan(len(split), batch_size, seed=seed, epoch=epoch, shuffle=shuffle)
    mean, std = split.dataset.mean, split.dataset.std

    def make(row: int, counts: bool) -> tuple[np.ndarray, np.ndarray]:
        image, labels, valid = split.read(row)
        labels = np.where(valid & counts, labels, IGNORE).astype(np.uint8)
        for part in hidden[row] if hidden else ():
            labels[part] = IGNORE
        rng = np.random.default_rng([seed, epoch, _number(split.tile_ids[row])])
        image = image.astype(np.float32)
        if augmentation:
            image = recolour(image, rng, augmentation, mean, std)
        # After recolouring, as at prediction; floats may hold NaN there, and one would spoil a batch's statistics.
        image = np.where(valid[..., None], image, mean)
        if augmentation:
            image, labels = turn(image, labels, rng)
        return image, labels

    def generate() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch_rows, batch_real in zip(rows[:, worker::workers], real[:, worker::workers], strict=True):
            made = [make(int(row), bool(counts)) for row, counts in zip(batch_rows, batch_real, strict=True)]
            yield np.stack([image for image, _ in made]), np.stack([labels for _, labels in made])

    return _read_ahead(generate())


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _read_ahead(items: Iterator[Any], depth: int = 2) -> Iterator[Any]:
    """The same items, made by a thread while the caller works on the one before."""
    ready: queue.Queue[tuple[bool, Any]] = queue.Queue(depth)
    stop = threading.Event()

    def put(good: bool, value: Any) -> bool:
        while not stop.is_set():
            try:
                ready.put((good, value), timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put(True, item):
                    return
            put(False, None)
        except BaseException as error:
            put(False, error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            good, value = ready.get()
            if good:
                yield value
            elif value is None:
                return
            else:
                raise value
    finally:
        stop.set()
        thread.join()


def seen_before(split: Split) -> list[list[tuple[slice, slice]]]:
    """Per tile, the parts that an earlier tile of its scene covers: so overlapping tiles count a pixel once."""
    size = split.dataset.size
    by_scene: dict[str, list[tuple[int, int, int]]] = {}
    for number, (scene, row, col) in enumerate(
        zip(*(split.index[name].to_pylist() for name in ("scene_id", "row", "col")), strict=True)
    ):
        by_scene.setdefault(scene, []).append((row, col, number))
    hidden: list[list[tuple[slice, slice]]] = [[] for _ in range(len(split))]
    for tiles in by_scene.values():
        tiles.sort()
        first = 0
        for later, (row, col, number) in enumerate(tiles):
            while tiles[first][0] <= row - size:
                first += 1
            for other_row, other_col, _ in tiles[first:later]:
                down, right = row - other_row, col - other_col
                if abs(right) < size:
                    across = slice(0, size - right) if right >= 0 else slice(-right, size)
                    hidden[number].append((slice(0, size - down), across))
    return hidden
