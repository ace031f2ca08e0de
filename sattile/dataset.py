"""The tiles dataset on disk: its description, its rows, and what petastorm wants beside them.

A folder: `dataset.json` says what it is and lists its files (what it does not list is not published); `train/`, `val/`
and `test/` are one Parquet dataset each (rows: `schema.TILE`), which pyarrow, pandas, Spark and petastorm's
`make_reader` all read.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sattile import schema, storage
from sattile.errors import UsageError
from sattile.split import SPLITS
from sattile.statistics import MEASURED

FORMAT = "sattile-tiles/1"
DESCRIPTION = "dataset.json"


def read_dataset(url: str) -> dict[str, Any]:
    """The description of a tiles dataset.

    Raises:
        UsageError: if there is none, or of a newer format.
    """
    found = read_description(url)
    if found is None:
        raise UsageError(f"{url} is no tiles dataset: it has no {DESCRIPTION}; make one with `sattile tile`")
    if found.get("format") != FORMAT:
        raise UsageError(f"{url} is of format {found.get('format')}; this sattile reads {FORMAT}")
    return found


def read_description(url: str) -> dict[str, Any] | None:
    """The same, None where there is none."""
    path = storage.join(url, DESCRIPTION)
    return storage.read_json(path) if storage.exists(path) else None


def unseen_classes(description: Mapping[str, Any]) -> list[str]:
    """Names of the classes that no training pixel is labelled with: no network learns them."""
    pixels = description["splits"]["train"].get("class_pixels")
    if not pixels:
        return []
    return [one["name"] for one in description["classes"] if not pixels.get(str(one["id"]))]


def unmeasured_classes(description: Mapping[str, Any]) -> list[str]:
    """What can't be measured of tiles around shapes, or not apart from what chose the weights: a sentence for a class.

    Nothing for tiles of a grid.
    """
    if "windows" not in description:
        return []
    shapes, rule = description["windows"]["classes"], description["split_rule"]
    wanted = [name for name, share in zip(SPLITS, rule["fractions"], strict=True) if share > 0]
    said = []
    for one in description["classes"]:
        found = shapes.get(str(one["id"]))
        if not found:
            continue
        groups = sum(found[name] for name in SPLITS)
        pixels = {name: description["splits"][name]["class_pixels"].get(str(one["id"]), 0) for name in wanted}
        missing = [SPLITS[name] for name in wanted if name != "train" and not pixels[name]]
        if not missing:
            continue
        many = f"class {one['name']} has {found['shapes']} shape{'s' * (found['shapes'] != 1)}"
        if found["shapes"] > groups:
            where = f"in {groups} places" if groups > 1 else "at one place"
            many += f" {where} (what lies within {rule['buffer']} px is one)"
        if len(missing) < len(wanted) - 1:
            said.append(f"{many}: none is left for {missing[0]}")
        elif groups < 2:
            said.append(f"{many}: it is in training alone, and no recall can be told for it")
        else:
            said.append(f"{many}, but no pixel of it for {' or '.join(missing)}: no recall can be told for it")
    return said


WILD = 1000
"""How many times the range of 98 % of the values a value is off that range, from which on it is told."""


def wild_bands(description: Mapping[str, Any]) -> dict[str, str]:
    """{band: what to say} where some values lie far off from all others: a missing value that no file declares?"""
    found = {}
    for band, one in description["statistics"].items():
        if one["mean"] is None:
            continue
        low, high = one["percentiles"]["1"], one["percentiles"]["99"]
        below, above = low - one["min"], one["max"] - high
        far = one["min"] if below > above else one["max"]
        if max(below, above) > WILD * (high - low) > 0 or abs(far) > MEASURED:
            found[band] = f"98 % of the values lie between {low:g} and {high:g}, and some at {far:.9g}"
    return found


class Part:
    """One part file on local scratch, written a row group at a time.

    Args:
        path: of the file.
        group: rows of a row group.
    """

    def __init__(self, path: str, group: int):
        self.path, self.group = path, group
        # Arrays are incompressible as dictionaries and meaningless as minima: leave both out for them.
        scalars = [name for name in schema.TILE.names if name not in ("image", "labels", "valid")]
        self.writer = pq.ParquetWriter(
            path, schema.TILE, compression="zstd", compression_level=1, use_dictionary=scalars, write_statistics=scalars
        )
        self.rows: list[dict[str, Any]] = []
        self.groups: list[int] = []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == self.group:
            self._flush()

    def _flush(self) -> None:
        if self.rows:
            columns = [[row[name] for row in self.rows] for name in schema.TILE.names]
            self.writer.write_table(pa.table(columns, schema=schema.TILE))
            self.groups.append(len(self.rows))
            self.rows = []

    def close(self) -> list[int]:
        self._flush()
        self.writer.close()
        return self.groups

    def discard(self) -> None:
        self.writer.close()
        os.remove(self.path)


def npy(array: np.ndarray) -> bytes:
    """The bytes `np.save` would write (format 1.0), which petastorm's NdarrayCodec reads."""
    array = np.ascontiguousarray(array)
    return _npy_header(array.dtype.str, array.shape) + array.tobytes()


def _npy_header(dtype: str, shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue()


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


def owners(tiles: Sequence[tuple[str, int, int]], size: int) -> dict[tuple[str, int, int], tuple[tuple[int, int], ...]]:
    """For each tile (scene_id, row, col), the earlier tiles (row, col) of its scene that share pixels with it.

    What is left of each tile without those parts covers each pixel exactly once.
    """
    cells: dict[tuple[str, int, int], list[tuple[int, int]]] = {}
    for scene_id, row, col in tiles:
        cells.setdefault((scene_id, row // size, col // size), []).append((row, col))
    found = {}
    for scene_id, row, col in tiles:
        near = (
            other
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            for other in cells.get((scene_id, row // size + down, col // size + right), ())
        )
        found[scene_id, row, col] = tuple(
            sorted(one for one in near if one < (row, col) and abs(one[0] - row) < size and abs(one[1] - col) < size)
        )
    return found


def petastorm_metadata(description: Mapping[str, Any], row_groups: Mapping[str, int]) -> bytes:
    """The `_common_metadata` file with which petastorm's `make_reader` opens one split.

    The Unischema is pickled, as petastorm has it: for those who want it. Our own readers never load it.

    Args:
        description: that of the dataset.
        row_groups: {file name: row groups in it}.
    """
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # petastorm's imports print a page of deprecations
        from petastorm.codecs import NdarrayCodec, ScalarCodec
        from petastorm.etl.dataset_metadata import ROW_GROUPS_PER_FILE_KEY, UNISCHEMA_KEY
        from petastorm.unischema import Unischema, UnischemaField
    from pyspark.sql.types import IntegerType, StringType

    size, bands = description["size"], len(description["bands"])
    text, number = ScalarCodec(StringType()), ScalarCodec(IntegerType())
    fields = [
        UnischemaField("tile_id", np.str_, (), text, False),
        UnischemaField("scene_id", np.str_, (), text, False),
        UnischemaField("row", np.int32, (), number, False),
        UnischemaField("col", np.int32, (), number, False),
        UnischemaField("spatial_block", np.str_, (), text, False),
        UnischemaField("image", np.dtype(description["dtype"]).type, (size, size, bands), NdarrayCodec(), False),
        UnischemaField("labels", np.uint8, (size, size), NdarrayCodec(), False),
        UnischemaField("valid", np.bool_, (size, size), NdarrayCodec(), False),
    ]
    metadata = {
        UNISCHEMA_KEY: pickle.dumps(Unischema("Tile", fields), protocol=2),
        ROW_GROUPS_PER_FILE_KEY: json.dumps(dict(row_groups)).encode(),
    }
    sink = pa.BufferOutputStream()
    pq.write_metadata(schema.TILE.with_metadata(metadata), sink)
    return sink.getvalue().to_pybytes()


def petastorm_reader(url: str, split: str, **options: Any) -> Any:
    """petastorm's reader of one split, wherever the dataset lies (its own way to HDFS wants libhdfs).

    The schema beside the split is pickled, as petastorm has it: read what you trust.

    Args:
        url: of the dataset.
        split: train, val or test.
        options: of `petastorm.make_reader`: num_epochs, cur_shard, shard_count, reader_pool_type ...

    Returns:
        An iterator of named tuples with the columns of `schema.TILE`; a context manager.
    """
    import warnings
    from urllib.parse import quote

    read_dataset(url)
    folder = storage.join(storage.absolute(url), split)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from petastorm import make_reader

        if storage.scheme_of(url) == "file":
            return make_reader(f"file://{quote(storage.local_path(folder))}", **options)
        return make_reader(folder, filesystem=_elsewhere(folder), **options)


def _elsewhere(url: str) -> Any:
    """A file system that is not on this machine, to read, in the form in which petastorm takes one: pyarrow's old one.

    petastorm hands on paths without scheme and authority.
    """
    from pyarrow.filesystem import FileSystem

    found = re.match(r"[a-z]+://[^/]*", url)
    root = found.group() if found else ""

    class Elsewhere(FileSystem):
        def _isfilestore(self) -> bool:
            return True

        def exists(self, path: str) -> bool:
            return storage.exists(root + path)

        def isdir(self, path: str) -> bool:
            entry = storage.stat(root + path)
            return entry is not None and entry.is_folder

        def isfile(self, path: str) -> bool:
            return self.exists(path) and not self.isdir(path)

        def ls(self, path: str) -> list[str]:
            return [entry.url.removeprefix(root) for entry in storage.list_folder(root + path)]

        def walk(self, path: str) -> Iterator[tuple[str, list[str], list[str]]]:
            entries = storage.list_folder(root + path)
            folders = [storage.name(entry.url) for entry in entries if entry.is_folder]
            yield path, folders, [storage.name(entry.url) for entry in entries if not entry.is_folder]
            for name in folders:
                yield from self.walk(storage.join(path, name))

        def open(self, path: str, mode: str = "rb") -> Any:
            return storage.open_file(root + path)

    return Elsewhere()
