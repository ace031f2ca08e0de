"""Law 6 on executors of their own: N barrier tasks train to the weights of one worker, also if one is killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiles_for_tests import write_splits

HOW = {"epochs": 3, "batch_size": 12}

SCRIPT = """
import sys
from sattile import engine
from sattile.training import train

if __name__ == "__main__":
    dataset, out, workers, arch = sys.argv[1:]
    conf = {"spark.executor.memory": "512m", "spark.executorEnv.PYTHONPATH": sys.path[0]}
    spark = engine.session(f"local-cluster[{workers},1,1024]", conf=conf)
    train(spark, dataset=dataset, out=out, workers=int(workers), arch=arch, epochs=3, batch_size=12)
    spark.stop()
"""

MORTAL = """
import json, os, signal, threading, time
from pathlib import Path
from sattile.training import networks

HERE = Path(__file__).parent

def build(bands, classes, statistics):
    if json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {}).get("index") == 1:
        threading.Thread(target=die, daemon=True).start()
    return networks.build("unet-tiny", bands=bands, classes=classes, statistics=statistics, size=16)

def die():
    "In the middle of the second epoch, once."
    progress = HERE / "model" / ".training" / "progress.json"
    while not progress.exists():
        time.sleep(0.01)
    if not (HERE / "died").exists():
        (HERE / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)
"""


def weights(model: Path) -> list[np.ndarray]:
    """All weights of a `.keras` file, by name, without TensorFlow."""
    import h5py

    found: list[np.ndarray] = []
    with zipfile.ZipFile(model / "model.keras") as archive, archive.open("model.weights.h5") as file:
        content = h5py.File(file, "r")
        content.visititems(lambda _, node: found.append(node[()]) if isinstance(node, h5py.Dataset) else None)
    return found


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    """41 tiles: the 12 shards, and what is left for the last batch, are uneven."""
    return write_splits(tmp_path_factory.mktemp("tiles") / "set", train=41, val=5)


@pytest.fixture(scope="module")
def alone(spark: Any, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    from sattile.training import train

    out = tmp_path_factory.mktemp("alone") / "model"
    train(spark, dataset=dataset, out=str(out), arch="unet-tiny", **HOW)  # type: ignore[arg-type]
    return weights(out)


def train_on_executors(folder: Path, dataset: str, workers: int, arch: str) -> dict[str, Any]:
    (folder / "script.py").write_text(SCRIPT)
    (folder / "mortal.py").write_text(MORTAL)
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), dataset, str(folder / "model"), str(workers), arch],
        capture_output=True, text=True, check=False, timeout=400,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "model" / "_run.json").read_text())
    return found


def test_three_executors_train_to_the_weights_of_one_worker(dataset: str, alone: list[Any], tmp_path: Path) -> None:
    run = train_on_executors(tmp_path, dataset, 3, "unet-tiny")
    assert (run["workers"], run["restarts"]) == (3, 0)
    assert_same(weights(tmp_path / "model"), alone)


def test_a_worker_killed_in_mid_epoch_changes_nothing(dataset: str, alone: list[Any], tmp_path: Path) -> None:
    run = train_on_executors(tmp_path, dataset, 2, "mortal:build")
    assert (tmp_path / "died").exists()
    assert (run["workers"], run["restarts"]) == (2, 1)
    assert_same(weights(tmp_path / "model"), alone)


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)
