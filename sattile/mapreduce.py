"""The way of labelled rectangles from the tasks that infer them to those that write maps, one map a group of rows.

Only what is published travels: labels, and on demand scores and coverage, compressed. What is inferred and how it is
added up is the caller's; this is the shuffle after it, and the reduce that writes.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from sattile import engine as engines
from sattile import mosaic, storage
from sattile.drift import Sights
from sattile.errors import Refused, SattileError, refusal
from sattile.grid import Window
from sattile.memory import peak_mb
from sattile.mosaic import Part, Product, Target

if TYPE_CHECKING:
    import pandas as pd
    from pyspark.sql import DataFrame, Row, SparkSession

T = TypeVar("T")

ROW_BYTES = 16_000_000
"""Most that one row brings to the writer, before compression: a JVM holds several at once."""

MOST_WRITER_THREADS = 4

INFERRED = (
    "name string, rank int, row int, col int, height int, width int, labels binary, scores binary, coverage binary, "
    "scenes binary, evaluated long, valid long, moved long, memory_mb double, seen string, reason string"
)
"""A labelled rectangle of the map `name`; of rank 0, the reason why there will be none. `moved`: bytes that have gone
from task to task for it before. `seen`: of `drift.Sights`, whose pixels it was made from."""

WRITTEN = (
    "name string, staged string, evaluated long, valid long, moved long, memory_mb double, seen string, reason string"
)
"""A map that is written to the folder `staged`, or the reason why not. `moved`: bytes sent between tasks for it."""


def deal(items: Sequence[T], costs: Sequence[int], *, most: int, slots: int) -> list[list[T]]:
    """Tasks: runs of neighbours that cost about the same, four a core at least so that the end is even.

    In the order in which to start them: cores take turns, and each finds next to its last run what it read for that.

    Args:
        costs: of each item; what costs nothing is still something to do.
        most: that a task should cost.
        slots: cores.
    """
    costs = [max(cost, 1) for cost in costs]
    total = sum(costs)
    turns = max(-(-total // (most * slots)), 4)
    count = turns * slots
    found: list[list[T]] = [[] for _ in range(count)]
    before = 0
    for item, cost in zip(items, costs, strict=True):
        found[(2 * before + cost) * count // (2 * total)].append(item)
        before += cost
    return [group for turn in range(turns) for group in found[turn::turns] if group]


def columns(schema: str) -> list[str]:
    """Names of a schema like `INFERRED`."""
    return [part.split()[0] for part in schema.split(", ")]


@dataclass
class Tally:
    """What it took to make some pixels of a map, added up on the way.

    Attributes:
        evaluated: pixels that the network ran on.
        valid: pixels with data.
        moved: bytes that came from other tasks.
        memory_mb: the most that a worker held.
        seen: what was counted of the scenes' values.
    """

    evaluated: int = 0
    valid: int = 0
    moved: int = 0
    memory_mb: float = 0.0
    seen: Sights = field(default_factory=Sights)

    def add(self, row: Any) -> Any:
        """Add a row of `INFERRED`, and hand it on."""
        self.evaluated += row.evaluated
        self.valid += row.valid
        self.moved += row.moved + sum(
            len(one) for one in (row.labels, row.scores, row.coverage, row.scenes) if one is not None
        )
        self.memory_mb = max(self.memory_mb, row.memory_mb)
        self.seen.merge(row.seen)
        return row


def refused(name: str, reason: str, memory_mb: float) -> tuple[Any, ...]:
    """A row of `INFERRED` that says why a map can't be."""
    return name, 0, 0, 0, 0, 0, None, None, None, None, 0, 0, 0, memory_mb, None, reason


def rows_of(name: str, part: Part, valid: np.ndarray, tally: Tally) -> Iterator[tuple[Any, ...]]:
    """Rows of `INFERRED` for one rectangle of the map `name`, each of at most `ROW_BYTES`.

    Args:
        valid: (height, width) bool: pixels with data, for the count of them.
        tally: of the rectangle, but for `valid`; the first row tells it.
    """
    block = part.window
    arrays = [one for one in (part.labels, part.scores, part.coverage, part.scenes) if one is not None]
    width = sum(one.itemsize * (one.shape[2] if one.ndim == 3 else 1) for one in arrays)
    height = max(ROW_BYTES // (width * max(block.width, 1)) // 512 * 512, 512)
    for start in range(0, block.height, height):
        rows = slice(start, min(start + height, block.height))
        packed = (
            mosaic.pack(None if one is None else one[rows])
            for one in (part.labels, part.scores, part.coverage, part.scenes)
        )
        yield (
            name, 1, block.row + start, block.col, rows.stop - start, block.width, *packed,
            tally.evaluated if start == 0 else 0, int(valid[rows].sum()), tally.moved if start == 0 else 0,
            tally.memory_mb, tally.seen.to_json() if start == 0 else None, None,
        )  # fmt: skip


def task_numbers(spark: SparkSession, count: int) -> DataFrame:
    """Task numbers (`id`), one a partition: what a task is to do would pass through a second Python worker."""
    return spark.range(0, count, 1, count)


def write_maps(
    spark: SparkSession, inferred: DataFrame, targets: Mapping[str, Target], product: Product, staging: str
) -> list[Row]:
    """Shuffle rows of `INFERRED` by map and write each: rows of `WRITTEN`."""
    sent = spark.sparkContext.broadcast(dict(targets))
    try:
        by_map = inferred.repartition(len(targets), "name").sortWithinPartitions("name", "rank", "row", "col")
        # Fewer maps than cores: those without one would idle while the others compress.
        threads = max(min(engines.slots(spark) // len(targets), MOST_WRITER_THREADS), 1)
        reduce = partial(write, targets=sent, product=product, staging=staging, threads=threads)
        return by_map.mapInPandas(engines.on_worker(reduce), WRITTEN).collect()
    finally:
        sent.unpersist()


def write(
    frames: Iterable[pd.DataFrame], *, targets: Any, product: Product, staging: str, threads: int = 1
) -> Iterator[pd.DataFrame]:
    """Reduce: rows of `INFERRED` sorted by name and rank in, one row of `WRITTEN` a map out.

    Refusals come first (rank 0): such a map is not written.

    Args:
        targets: broadcast {name: Target}.
        staging: URL of the folder for finished maps.
        threads: that compress a map.
    """
    import pandas as pd

    rows = _Rows(row for frame in frames for row in frame.itertuples(index=False))
    while (first := rows.peek()) is not None:
        name, reason, staged = first.name, None, None
        tally = Tally()
        if first.rank == 0:
            reasons = {row.reason: None for row in map(tally.add, rows.of(name)) if row.reason}
            reason = "\n".join(reasons)
        else:
            # Another attempt of this task may be writing the same map.
            staged = storage.join(staging, uuid.uuid4().hex)
            parts = (_part(tally.add(row), len(product.classes)) for row in rows.of(name))
            try:
                mosaic.write_map(targets.value[name], parts, product, staged, threads)
            except Exception as error:
                # What the system says here is of scratch, the out folder or Spark, not of what is written.
                if isinstance(error, OSError | EOFError | SattileError) and not isinstance(error, Refused):
                    raise
                reason, staged = refusal(error).reason, None
                deque(parts, maxlen=0)
        memory = max(tally.memory_mb, peak_mb())
        yield pd.DataFrame(
            [(name, staged, tally.evaluated, tally.valid, tally.moved, memory, tally.seen.to_json(), reason)],
            columns=columns(WRITTEN),
        )


class _Rows:
    """Rows sorted by map, taken map by map, one in memory at a time."""

    def __init__(self, rows: Iterator[Any]):
        self._rows = rows
        self._next = next(rows, None)

    def peek(self) -> Any:
        return self._next

    def of(self, name: str) -> Iterator[Any]:
        while self._next is not None and self._next.name == name:
            row, self._next = self._next, None
            yield row
            self._next = next(self._rows, None)


def _part(row: Any, classes: int) -> Part:
    window = Window(int(row.row), int(row.col), int(row.height), int(row.width))
    labels = mosaic.unpack(row.labels, "uint8", window.shape)
    assert labels is not None
    return Part(
        window,
        labels,
        mosaic.unpack(row.scores, "float32", (*window.shape, classes)),
        mosaic.unpack(row.coverage, "uint32", window.shape),
        mosaic.unpack(row.scenes, "uint16", window.shape),
    )
