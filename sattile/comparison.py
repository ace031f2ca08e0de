"""Several models on the same pixels: which is best, and whether other ground would say so, too.

EVALUATION/blocks.parquet    what was counted, by scene, spatial block and region: `schema.COUNTED`
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sattile import metrics, schema, storage
from sattile.metrics import Counted
from sattile.record import read_rows

BLOCKS = "blocks.parquet"


def write_blocks(url: str, counted: Counted) -> None:
    """Write what was counted; the same bytes for the same counts in any order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = sorted((key for key, table in counted.items() if table.any()), key=lambda key: (*key[:2], key[2] or ""))
    rows = [(*key, counted[key].ravel().tolist()) for key in keys]
    columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in schema.COUNTED]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns, schema=schema.COUNTED), sink, compression="zstd")
    storage.write_bytes(url, sink.getvalue().to_pybytes())


def read_blocks(url: str) -> Counted | None:
    """The same again; None where there is no such file."""
    if not storage.exists(url):
        return None
    rows = read_rows(url)
    classes = round(len(rows[0]["confusion"]) ** 0.5) if rows else 0
    return {
        (row["scene_id"], row["spatial_block"], row["region"]): np.array(row["confusion"]).reshape(classes, classes)
        for row in rows
    }


def differences(
    models: Sequence[tuple[Sequence[str], Counted | None]],
) -> tuple[int | None, list[tuple[float, list[float] | None] | None]]:
    """By how much each model's mIoU is above the best one's, which is below 0.

    Models are compared where they counted the same pixels of the same classes: of several such groups, in the largest
    (of equally large ones, in that of the best model).

    Args:
        models: names of the classes, and what was counted.

    Returns:
        The number of the best one, None if no two can be compared; for each model (difference, its interval), None for
        the best one and for those that counted other pixels.
    """
    models = [_by_name(names, counted) for names, counted in models]  # they may have the same classes in other orders
    groups: dict[str, list[int]] = {}
    mious: list[float] = []
    tables = [np.stack(list(metrics.by_block(counted).values())) if counted else None for _, counted in models]
    for index, (names, counted) in enumerate(models):
        table = tables[index]
        miou = metrics.ratios(table.sum(0))["miou"] if table is not None else np.nan
        mious.append(float(np.nan_to_num(miou, nan=-1)))
        if counted:
            groups.setdefault(_pixels(names, counted), []).append(index)
    group = max(groups.values(), key=lambda one: (len(one), max(mious[index] for index in one)), default=[])
    found: list[tuple[float, list[float] | None] | None] = [None] * len(models)
    if len(group) < 2:
        return None, found
    best = max(group, key=lambda index: mious[index])
    for index in group:
        mine, other = tables[index], tables[best]
        if index != best and mine is not None and other is not None:
            found[index] = metrics.paired_difference(mine, other)
    return best, found


def _by_name(names: Sequence[str], counted: Counted | None) -> tuple[Sequence[str], Counted | None]:
    """The same with the classes in the order of their names."""
    if not counted or any(len(table) != len(names) for table in counted.values()):
        return names, counted
    order = np.argsort(list(names))
    return sorted(names), {key: table[np.ix_(order, order)] for key, table in counted.items()}


def _pixels(names: Sequence[str], counted: Counted) -> str:
    """A digest of the pixels that were counted: how many of each true class in each block of each scene."""
    true: dict[tuple[str, str], np.ndarray] = {}
    for (scene_id, block, _), table in counted.items():
        true[scene_id, block] = true.get((scene_id, block), 0) + table.sum(1)
    return storage.digest([list(names), [[*key, true[key].tolist()] for key in sorted(true)]])
