"""Spark 3.5 gives what Spark 4.0 gives: the same tiles and, by one model, the same maps, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scenes_for_tests import position_image, write_scene
from spark35 import VERSION, spark35

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]  # the first run fetches 320 MB

SIZES = {"a": (96, 150), "b": (130, 70)}
TILING = {"size": 32, "fractions": "0.6,0.2,0.2"}

ON_EXECUTORS = """
import shutil
import sys
from pathlib import Path

from sattile import engine
from sattile.prediction import predict


def pyspark_of_worker(rows):
    import pyspark

    yield pyspark.__version__, pyspark.__file__, [one for one in sys.path_importer_cache if "pyspark.zip" in one]


if __name__ == "__main__":
    model, scenes, out = sys.argv[1:]
    spark = engine.session("local-cluster[2,1,1024]", conf={"spark.executor.memory": "512m"})
    assert spark.sparkContext.master.startswith("local-cluster")
    tasks = spark.sparkContext.parallelize(range(2), 2).mapPartitions(engine.on_worker(pyspark_of_worker))
    for version, file, slow_importers in tasks.collect():
        assert version == spark.version, version
        assert file.startswith(f"{engine.spark_home()}/python/lib/pyspark.zip"), file
        assert not slow_importers, slow_importers
    predict(spark, model=model, scenes=[scenes], out=out)
    # local-cluster makes it in Spark's own home, whatever is set.
    work = Path(engine.spark_home()) / "work" / spark.sparkContext.applicationId
    version = spark.version
    spark.stop()
    shutil.rmtree(work, ignore_errors=True)
    print(version)
"""


def child(env: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments], env=env, capture_output=True, text=True, check=False, timeout=500
    )
    # Java's stack traces, which can be long, bury Python's.
    assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if not line.startswith("\tat "))
    return done.stdout


@pytest.fixture(scope="module")
def env() -> dict[str, str]:
    return spark35()


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for number, (name, (height, width)) in enumerate(SIZES.items()):
        west = 600_000 + number * 10_000
        write_scene(folder / "scenes" / f"{name}.tif", position_image(height, width, 3), west=west)
        classes = (np.indices((height, width)).sum(0) // 24 % 2).astype(np.uint8)
        write_scene(folder / "labels" / f"{name}.tif", classes[None], west=west)
    return folder


@pytest.fixture(scope="module")
def chain(env, archive, tmp_path_factory) -> Path:
    """Where Spark 3.5 has made catalog, tiles, model, evaluation and mosaics."""
    out = tmp_path_factory.mktemp("chain") / "work"
    steps = {**{f"tile.{name}": value for name, value in TILING.items()}, "train.arch": "unet-tiny", "train.epochs": 1}
    child(
        env, "-m", "sattile.cli", "run", "--scenes", str(archive / "scenes"), "--labels", str(archive / "labels"),
        "--out", str(out), "--master", "local[2]",
        *(word for name, value in steps.items() for word in ("--set", f"{name}={value}")),
    )  # fmt: skip
    for step in ("catalog", "tiles", "model", "evaluation", "mosaics"):
        assert json.loads((out / step / "_run.json").read_text())["versions"]["pyspark"] == VERSION
    return out


@pytest.fixture(scope="module")
def maps(spark, chain, archive, tmp_path_factory) -> dict[str, bytes]:
    """labels.tif of each scene, by Spark 4.0 and the model of the chain."""
    from sattile.prediction import predict

    assert spark.version.startswith("4.0.")
    out = tmp_path_factory.mktemp("spark40") / "mosaics"
    predict(spark, model=str(chain / "model"), scenes=[str(archive / "scenes")], out=str(out))
    return labels_of(out)


def labels_of(mosaics: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in mosaics.glob("*/labels.tif")}


def test_tiles_have_the_same_digest(spark, chain, archive, tmp_path):
    from sattile.tiles import tile

    tile(spark, scenes=[str(archive / "scenes")], labels=str(archive / "labels"), out=str(tmp_path / "tiles"), **TILING)
    old, new = (json.loads((folder / "tiles" / "dataset.json").read_text()) for folder in (chain, tmp_path))
    assert old["digest"] == new["digest"]


def test_maps_have_the_same_bytes(chain, maps):
    assert set(maps) == set(SIZES)
    assert labels_of(chain / "mosaics") == maps


def test_maps_by_executors_of_their_own_have_the_same_bytes(env, chain, maps, archive, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ON_EXECUTORS)
    said = child(env, str(script), str(chain / "model"), str(archive / "scenes"), str(tmp_path / "mosaics"))
    assert said.split()[-1] == VERSION
    assert labels_of(tmp_path / "mosaics") == maps
