"""Executors of their own. Law 6: N barrier tasks train to the weights of one worker, also if one is killed. Law 3: a
speculative twin that overtakes its task changes no byte."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from maps_for_tests import maps_of
from networks_for_tests import weights
from scenes_for_tests import write_scene
from tiles_for_tests import write_splits

from sattile import engine

pytestmark = pytest.mark.cluster

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


# --- speculation --------------------------------------------------------------------------------------------------

TWINS = """
import time
from pathlib import Path
from sattile import mapreduce, prediction

HERE = Path(__file__).parent
infer, write = prediction.infer, mapreduce.write

def overtaken(what, function, frames, **given):
    "The first attempt at one task dawdles when its work is done, until Spark ends it in favour of its twin."
    from pyspark import TaskContext
    frames = list(function(frames, **given))
    yield from frames
    if frames and TaskContext.get().attemptNumber():
        (HERE / f"{what}-overtook").touch()
    elif frames:
        try:
            (HERE / f"{what}-dawdles").mkdir()
        except FileExistsError:
            return
        time.sleep(100)

def slow_infer(frames, **given):
    return overtaken("infer", infer, frames, **given)

def slow_write(frames, **given):
    return overtaken("write", write, frames, **given)
"""

SPECULATION = """
import sys, twins
from sattile import engine, mapreduce, prediction

if __name__ == "__main__":
    master, model, scenes, out = sys.argv[1:]
    prediction.infer, mapreduce.write = twins.slow_infer, twins.slow_write
    soon = {"interval": "200ms", "quantile": "0.1", "multiplier": "1.2", "minTaskRuntime": "500ms"}
    spark = engine.session(master, conf={
        "spark.speculation": "true", **{f"spark.speculation.{name}": value for name, value in soon.items()},
        "spark.executor.memory": "512m", "spark.executorEnv.PYTHONPATH": sys.path[0],
        "spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1",
    })
    prediction.predict(spark, model=model, scenes=[scenes], out=out, merge="blend", size=64, stride=32)
    spark.stop()
"""


@pytest.fixture
def two_hosts(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """(URL, environment) of a standalone Spark: no twin starts on the host of its task, and local-cluster has one."""
    home, started = engine.spark_home(), []
    env = os.environ | {
        "JAVA_HOME": engine.find_java(), "SPARK_HOME": home, "SPARK_LOCAL_IP": "127.0.0.1",
        "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
        "SPARK_WORKER_DIR": str(tmp_path / "work"),
    }  # fmt: skip

    def start(what: str, host: str, *options: str) -> Path:
        log = tmp_path / f"{what}-{host}.log"
        command = [f"{home}/bin/spark-class", f"org.apache.spark.deploy.{what}", "--host", host, "--webui-port", "0"]
        with log.open("w") as file:
            mine = env | {"SPARK_LOCAL_IP": host}
            started.append(subprocess.Popen([*command, *options], env=mine, stdout=file, stderr=file, process_group=0))
        return log

    try:
        log = start("master.Master", "127.0.0.1", "--port", "0")
        until = time.monotonic() + 60
        while not (found := re.search(r"spark://[\d.]+:\d+", log.read_text())) and time.monotonic() < until:
            time.sleep(0.1)
        assert found, log.read_text()
        for host in ("127.0.0.1", "127.0.0.2"):
            start("worker.Worker", host, "--cores", "1", "--memory", "1g", found[0])
        yield found[0], env
    finally:
        for process in started:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def test_a_speculative_twin_changes_no_byte(spark: Any, two_hosts: tuple[str, dict[str, str]], tmp_path: Path) -> None:
    import keras

    from sattile.model import bundle
    from sattile.prediction import predict

    given = keras.Input((None, None, 2))
    network = keras.Model(given, keras.layers.Conv2D(2, 3, padding="same", activation="softmax")(given))
    network.save(tmp_path / "net.keras")
    model, scenes = str(tmp_path / "model"), tmp_path / "scenes"
    bundle(str(tmp_path / "net.keras"), bands="x,y", classes="land=0,water=7", fill="3,5", out=model)
    for seed, shape in enumerate([(300, 210), (170, 260), (90, 330), (250, 180)]):
        data = np.random.default_rng(seed).integers(1, 99, (2, *shape)).astype(np.uint16)
        write_scene(scenes / f"{seed}.tif", data, names=("x", "y"), nodata=0)
    (tmp_path / "twins.py").write_text(TWINS)
    (tmp_path / "script.py").write_text(SPECULATION)
    master, env = two_hosts
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), master, model, str(scenes), str(tmp_path / "raced")],
        capture_output=True, text=True, check=False, timeout=300, env=env, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for what in ("infer", "write"):
        assert (tmp_path / f"{what}-dawdles").exists()
        assert (tmp_path / f"{what}-overtook").exists()
    predict(spark, model=model, scenes=[str(scenes)], out=str(tmp_path / "calm"), merge="blend", size=64, stride=32)
    assert maps_of(tmp_path / "raced") == maps_of(tmp_path / "calm")
    assert sorted(path.name for path in (tmp_path / "raced").iterdir()) == [
        "0",
        "1",
        "2",
        "3",
        "_run.json",
        "collection.json",
    ]
