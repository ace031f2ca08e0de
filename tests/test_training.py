"""Training: the same batches, and so the same weights, for any number of workers, kills and reruns."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

# Before TensorFlow starts; test_model says why.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
from tiles_for_tests import BANDS, SIZE, make_tile, write_dataset

from sattile.errors import UsageError
from sattile.model import load_bundle
from sattile.training import loop, train
from sattile.training.loop import Settings


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    splits = {split: [make_tile(n, split) for n in range(count)] for split, count in (("train", 43), ("val", 7))}
    return write_dataset(tmp_path_factory.mktemp("tiles") / "set", splits)


# --- The loop ------------------------------------------------------------------------------------------------------

SMALL = Settings(arch="unet-tiny", epochs=3, batch_size=12, learning_rate=5e-3)


def weights_of(dataset: str, work: Path, how: Settings = SMALL, **more: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    result = loop.fit(dataset=dataset, work=str(work), settings=how, **more)
    return result, loop.read_best(str(work)).weights


@pytest.fixture(scope="module")
def undisturbed(
    dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[np.ndarray], Path]:
    work = tmp_path_factory.mktemp("undisturbed")
    return (*weights_of(dataset, work), work)


def test_it_learns(undisturbed: Any) -> None:
    result, _, work = undisturbed
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    assert result["history"][-1]["loss"] < 0.7 * result["history"][0]["loss"]
    assert result["metrics"]["pixels"] == 7 * SIZE * (SIZE - 1)  # each labelled pixel once
    assert result["metrics"]["split"] == "val"
    assert any((work / "tensorboard").iterdir())


def test_a_killed_training_goes_on_to_the_same_weights(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    weights_of(dataset, tmp_path, stop_after=1)
    result, weights = weights_of(dataset, tmp_path)
    assert [row["loss"] for row in result["history"]] == [row["loss"] for row in undisturbed[0]["history"]]
    for one, other in zip(weights, undisturbed[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_seed_decides_the_weights(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    how = Settings(**{**SMALL.to_dict(), "epochs": 1, "seed": 1})
    first = weights_of(dataset, tmp_path / "a", how)[1]
    again = weights_of(dataset, tmp_path / "b", how)[1]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    kernels = [(a, b) for a, b in zip(first, undisturbed[1], strict=True) if a.ndim == 4]
    assert all((one != other).any() for one, other in kernels)


def test_unlabelled_tiles_and_no_validation_tiles_give_no_nan(tmp_path: Path) -> None:
    tiles = [make_tile(n, "train", unlabelled=n < 6) for n in range(9)]
    dataset = write_dataset(tmp_path / "set", {"train": tiles})
    how = Settings(arch="unet-tiny", epochs=2, batch_size=1, patience=1)  # batches without a label
    result, weights = weights_of(dataset, tmp_path / "work", how)
    assert result["metrics"]["split"] == "train"
    assert all(np.isfinite(one).all() for one in weights)
    assert all(np.isfinite([row["loss"], row["val_loss"]]).all() for row in result["history"])


# --- The command ---------------------------------------------------------------------------------------------------


def test_one_worker_and_two_train_the_same_weights(spark: Any, dataset: str, tmp_path: Path) -> None:
    how = {"dataset": dataset, "arch": "unet-tiny", "epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    loaded = "tensorflow" in sys.modules
    alone = train(spark, out=str(tmp_path / "alone"), workers=1, **how)
    both = train(spark, out=str(tmp_path / "both"), workers=2, **how)
    assert ("tensorflow" in sys.modules) == loaded
    import keras

    networks = [keras.models.load_model(f"{url}/model.keras") for url in (alone, both)]  # plain: no code of ours
    for one, other in zip(*(network.get_weights() for network in networks), strict=True):  # after 22 steps
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)

    found = load_bundle(both)
    assert (found.bands, [one.id for one in found.classes], found.gsd) == (BANDS, [2, 7], 10.0)
    assert (found.fill, found.dataset_digest, found.total_stride) == ((700, 800, 900), "d1", 4)
    assert found.metrics["split"] == "val"
    assert sorted(path.name for path in Path(both).iterdir()) == [
        "_run.json", "bundle.json", "history.json", "model.keras", "openvino", "saved_model", "tensorboard",
    ]  # fmt: skip

    before = {path: path.stat().st_mtime_ns for path in Path(alone).rglob("*") if path.is_file()}
    train(spark, out=alone, workers=1, **how)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"_run.json"}
    with pytest.raises(UsageError, match="learning_rate"):
        train(spark, out=alone, **(how | {"learning_rate": 0.01}))


def test_a_builder_that_fails_is_a_usage_error(spark: Any, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no_such_module can't be imported"):
        train(spark, dataset=dataset, out=str(tmp_path / "model"), arch="no_such_module:build")
    assert not (tmp_path / "model" / "bundle.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 5}, "use 1, 2, 4"),
        ({"workers": 4}, r"runs 2 task\(s\) at once"),
        ({"arch": "unet-enormous"}, "unet-small"),
        ({"epochs": 0}, "at least 1"),
        ({"class_weights": "some"}, "none or balanced"),
        ({"dataset": "/nowhere/tiles"}, "no tiles dataset"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    spark: Any, dataset: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        train(spark, **({"dataset": dataset, "out": str(tmp_path / "model")} | change))
    assert not (tmp_path / "model").exists()
