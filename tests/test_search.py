"""A search: one training for each combination, each a bundle of its own, and only what is missing is done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiles_for_tests import write_splits

from sattile.errors import TooManyRefused, UsageError
from sattile.model import load_bundle
from sattile.training.search import parse_grid, search, table


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_splits(tmp_path_factory.mktemp("tiles") / "set", train=24, val=5)


def test_a_grid_is_all_combinations() -> None:
    found = parse_grid("arch=unet-tiny,pixel-mlp; learning-rate=1e-3,0.002; augment=false")
    assert len(found) == 4
    assert found[1] == {"arch": "unet-tiny", "learning_rate": 0.002, "augment": False}
    assert parse_grid("indices=none,ndwi+ndvi") == [{"indices": "none"}, {"indices": "ndwi,ndvi"}]


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        ("arhc=unet-tiny", "did you mean arch"),
        ("epochs=two", "'two' is no int"),
        ("augment=yes", "true or false"),
        ("arch=", "name=value"),
        ("arch=unet-tiny;arch=pixel-mlp", "once for each name"),
        ("  ", "name what to vary"),
        ("arch=unet-tiny,unet-huge", "unet-huge"),
        ("batch_size=0", "at least 1"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(spark: Any, dataset: str, tmp_path: Path, grid: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        search(spark, dataset=dataset, out=str(tmp_path / "search"), grid=grid)
    assert not (tmp_path / "search").exists()


def fails(bands: list[str], classes: list[str], statistics: dict[str, Any]) -> Any:
    raise MemoryError("too large for this machine")


def test_each_combination_is_a_bundle_and_a_larger_grid_does_what_is_missing(
    spark: Any, dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "search"
    shared = {"epochs": 2, "batch_size": 12, "arch": "unet-tiny"}
    how: dict[str, Any] = {"dataset": dataset, "out": str(out), "settings": {"train": shared}}
    best = search(spark, grid="learning_rate=5e-3,0.005,1e-9", **how)  # two of them are one
    result = json.loads((out / "search.json").read_text())
    assert [row["learning_rate"] for row in result["trials"]] == [0.005, 1e-9]
    assert best == str(out / "trials" / result["best"])
    assert load_bundle(best).metrics["miou"] == result["trials"][0]["val_miou"]
    assert table(result["trials"])[0].split() == [
        "learning_rate",
        "parameters",
        "val",
        "mIoU",
        "best",
        "epoch",
        "seconds",
    ]
    assert "0.005" in capsys.readouterr().err

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"the builder failed, in .*test_search\.py line \d+: MemoryError: too large"):
        search(spark, grid=f"learning_rate=5e-3; arch=unet-tiny,{__name__}:fails", **how)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    with pytest.raises(TooManyRefused, match="1 of 2 trainings were refused"):
        search(spark, grid="learning_rate=5e-3,1e30", **how)
    [refused] = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert "lower --learning-rate" in refused["reason"]
    assert "\n" not in refused["reason"]
    changed = {path.name for path, time in before.items() if not path.exists() or path.stat().st_mtime_ns != time}
    assert changed <= {"_run.json", "search.json"}
    run = json.loads((out / "_run.json").read_text())
    assert (run["skipped"], run["done"], run["quarantined"]) == (1, 0, 1)
