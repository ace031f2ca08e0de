"""The tiles of a dataset's split, each read when it is asked for, in an order that follows from the tiles alone."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sattile import storage
from sattile.dataset import decode, npy, owners, petastorm_reader, read_dataset
from sattile.errors import SattileError, first_line
from sattile.grid import Window
from sattile.schema import IGNORE, TILE, SegmentClass, read_classes
from sattile.statistics import steady

GROUND = 2048
"""Pixels; tiles of a square of this edge follow each other."""

GROUP = 16
"""Tiles that are kept together where they come one by one."""

PLACE = ["tile_id", "scene_id", "row", "col"]
ARRAYS = ["image", "labels", "valid"]


@dataclass(frozen=True)
class Dataset:
    """What `dataset.json` says.

    Attributes:
        url: the folder.
        bands: names, in channel order.
        classes: in the order of the scores.
        size: edge of a tile, in pixels.
        statistics: of the training split by band: `mean`, `std`, `min`, `max`, `percentiles`; see `statistics.steady`.
        mean, std: of these, float32 (bands,), stored values.
        description: the whole JSON.
    """

    url: str
    bands: tuple[str, ...]
    classes: tuple[SegmentClass, ...]
    size: int
    statistics: Mapping[str, Mapping[str, Any]]
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
    statistics = {band: steady(description["statistics"][band]) for band in bands}
    return Dataset(
        url=url,
        bands=bands,
        classes=read_classes(description["classes"]),
        size=description["size"],
        statistics=statistics,
        mean=np.array([statistics[band]["mean"] for band in bands], np.float64).astype(np.float32),
        std=np.array([statistics[band]["std"] for band in bands], np.float64).astype(np.float32),
        description=description,
    )


class Split:
    """The tiles of one split, by scene and place. Reads row groups when asked for; threads may share it.

    Row groups are unpacked once: into memory, and beyond `memory_bytes` into files on local scratch that are mapped,
    where there is room; of a dataset elsewhere only a worker's share travels.

    Args:
        dataset: its description.
        name: `train`, `val` or `test`.
        memory_bytes: how much of it may stay in memory.
        petastorm: read through petastorm's `make_reader`, which loads the pickled schema beside the tiles.
    """

    def __init__(self, dataset: Dataset, name: str, *, memory_bytes: int = 1 << 29, petastorm: bool = False):
        self.dataset = dataset
        self.name = name
        self.memory_bytes = memory_bytes
        self._lock = threading.Lock()
        self._locks: dict[int, threading.Lock] = {}
        self._opened = threading.local()
        self._scratch: str | None = None
        self._mapped: dict[int, pa.Table] = {}
        self._memory: OrderedDict[int, pa.Table] = OrderedDict()
        self._held = 0
        files = dataset.description["splits"].get(name, {}).get("files", [])
        if petastorm and files:
            places, sizes = self._read_all_through_petastorm()
        else:
            self._urls = [storage.join(dataset.url, name, file) for file in files]
            opened = [self._file(number) for number in range(len(files))]
            self._groups = [(number, k) for number, file in enumerate(opened) for k in range(file.num_row_groups)]
            sizes = [opened[number].metadata.row_group(group).num_rows for number, group in self._groups]
            empty = pa.schema([TILE.field(column) for column in PLACE]).empty_table()
            places = pa.concat_tables([empty, *(file.read(columns=PLACE) for file in opened)])
        self._firsts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])[:-1]
        # How tiles are spread over files is chance: the same tiles in the same order train the same network. Tiles of
        # the same ground lie in the same files, so that it is read in pieces.
        row, col = (places[column].to_numpy() for column in ("row", "col"))
        scene = np.unique(places["scene_id"].to_pylist(), return_inverse=True)[1]
        self._order = np.lexsort([col, row, col // GROUND, row // GROUND, scene])
        self.index = places.take(self._order)
        self.tile_ids: list[str] = self.index["tile_id"].to_pylist()
        self._class_index = np.full(256, IGNORE, np.uint8)
        for position, one in enumerate(dataset.classes):
            self._class_index[one.id] = position

    def __len__(self) -> int:
        return len(self.tile_ids)

    def read(self, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One tile: image (size, size, bands) as stored, class index (size, size) uint8 with `IGNORE`, valid bool.

        Image and valid are views of what was read.
        """
        place = int(self._order[row])
        number = int(np.searchsorted(self._firsts, place, side="right")) - 1
        table = self._read_group(number)
        offset = place - int(self._firsts[number])
        image, labels, valid = (decode(table[name][offset].as_buffer()) for name in ARRAYS)
        return image, self._class_index[labels], valid

    def class_pixels(self) -> np.ndarray:
        """Labelled pixels of each class by tile, (tiles, classes) int64. No image is read for it."""
        classes, needed = len(self.dataset.classes), ["labels", "valid"]
        counts = np.zeros((len(self), classes), np.int64)
        for number, first in enumerate(self._firsts.tolist()):
            table = self._mapped.get(number)
            if table is None:
                table = self._unpack(number, needed)
            for place, packed in enumerate(zip(*(table[name] for name in needed), strict=True), start=first):
                labels, valid = (decode(one.as_buffer()) for one in packed)
                labels = self._class_index[labels[valid]]
                counts[place] = np.bincount(labels[labels < classes], minlength=classes)
        return counts[self._order]

    def _read_group(self, number: int) -> pa.Table:
        if number in self._mapped:
            return self._mapped[number]
        with self._lock:
            if number in self._memory:
                self._memory.move_to_end(number)
                return self._memory[number]
            own = self._locks.setdefault(number, threading.Lock())
        with own:  # one thread unpacks a group, others unpack other ones
            table = self._mapped.get(number, self._memory.get(number))
            if table is not None:
                return table
            return self._keep(number, self._unpack(number, ARRAYS))

    def _unpack(self, number: int, columns: list[str]) -> pa.Table:
        """Columns of a row group."""
        file, group = self._groups[number]
        with self._told_of(file):
            return self._file(file).read_row_group(group, columns=columns, use_threads=False)

    @contextmanager
    def _told_of(self, number: int) -> Iterator[None]:
        """Say which file it is that can't be read; errors of the storage, which may pass, go as they are."""
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            # What is wrong with its bytes pyarrow raises as a bare OSError.
            missing = isinstance(error, FileNotFoundError)
            if isinstance(error, OSError) and not missing and (type(error) is not OSError or error.errno):
                raise
            raise SattileError(
                f"dataset {self.dataset.url}: {self._urls[number]} is {'missing' if missing else 'damaged'} "
                f"({first_line(error)}); bring the file back, or tile again with --overwrite"
            ) from error

    def _file(self, number: int) -> pq.ParquetFile:
        """A file, opened for this thread."""
        mine: dict[int, pq.ParquetFile] = self._opened.__dict__.setdefault("files", {})
        if number not in mine:
            with self._told_of(number):
                mine[number] = pq.ParquetFile(storage.open_file(self._urls[number]))
        return mine[number]

    def _keep(self, number: int, table: pa.Table) -> pa.Table:
        with self._lock:
            full = self._held + table.nbytes > self.memory_bytes
        if full and self._has_room(table.nbytes):
            self._mapped[number] = self._map(table, number)
            return self._mapped[number]
        with self._lock:
            self._memory[number] = table
            self._held += table.nbytes
            while self._held > self.memory_bytes and len(self._memory) > 1:
                self._held -= self._memory.popitem(last=False)[1].nbytes
        return table

    def _read_all_through_petastorm(self) -> tuple[pa.Table, list[int]]:
        """All tiles, once: petastorm gives them in an order of its own."""
        places: list[dict[str, Any]] = []
        arrays: list[dict[str, bytes]] = []
        sizes: list[int] = []

        def flush() -> None:
            table = pa.Table.from_pylist(arrays, pa.schema([TILE.field(column) for column in ARRAYS]))
            self._mapped[len(sizes)] = self._map(table, len(sizes))
            sizes.append(len(arrays))
            arrays.clear()

        with petastorm_reader(self.dataset.url, self.name, num_epochs=1, shuffle_row_groups=False) as rows:
            for one in rows:
                places.append({column: getattr(one, column) for column in PLACE})
                arrays.append({column: npy(getattr(one, column)) for column in ARRAYS})
                if len(arrays) == GROUP:
                    flush()
        if arrays:
            flush()
        return pa.Table.from_pylist(places, pa.schema([TILE.field(column) for column in PLACE])), sizes

    def _has_room(self, size: int) -> bool:
        return shutil.disk_usage(storage.own_folder()).free > 2 * size + (1 << 28)

    def _map(self, table: pa.Table, number: int) -> pa.Table:
        """The same table, in a file on scratch."""
        with self._lock:
            self._scratch = self._scratch or tempfile.mkdtemp(dir=storage.own_folder())
        path = os.path.join(self._scratch, str(number))
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return pa.ipc.open_file(pa.memory_map(path)).read_all()


def seen_before(split: Split) -> list[list[tuple[slice, slice]]]:
    """Per tile, the parts that an earlier tile of its scene covers: so overlapping tiles count a pixel once."""
    size = split.dataset.size
    tiles = list(zip(*(split.index[name].to_pylist() for name in ("scene_id", "row", "col")), strict=True))
    earlier = owners(tiles, size)
    hidden = []
    for tile in tiles:
        own = Window(tile[1], tile[2], size, size)
        hidden.append([(own & Window(row, col, size, size)).slices(own) for row, col in earlier[tile]])
    return hidden
