"""Files of a real HDFS: the same contract as those of a disk, whatever they are called and whoever fails meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
from scenes_for_tests import write_scene

from hadoop import libhdfs
from hadoop.cluster import SHELL, Cluster
from hadoop.conftest import need
from sattile import raster, scenes, storage
from sattile.errors import Refused, SattileError, UsageError
from sattile.grid import Window
from sattile.storage import elsewhere, hdfs

ODD = "a b,ü😀;#+%41&c=d.tif"


@pytest.fixture(scope="module", params=hdfs.WAYS)
def root(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[str]:
    """A folder of the cluster, for each way to it."""
    need(native=request.param == "libhdfs")
    before = dict(os.environ)
    os.environ.update(cluster.environment())
    os.environ.update(libhdfs.environment() if request.param == "libhdfs" else {"SATTILE_HDFS": request.param})
    hdfs.use(hdfs.find_access())
    yield f"{cluster.url}/by {request.param}"
    raster.close_files()
    os.environ.clear()
    os.environ.update(before)


def test_files_are_written_whole_listed_read_renamed_and_removed(root: str) -> None:
    folder = f"{root}/one two"
    storage.write_text(f"{folder}/{ODD}", "hällo")
    assert storage.read_text(f"{folder}/{ODD}") == "hällo"
    assert [storage.name(one.url) for one in storage.list_folder(folder)] == [ODD]
    assert storage.stat(f"{folder}/{ODD}") == storage.list_folder(folder)[0]
    storage.write_text(f"{folder}/{ODD}", "again")
    assert storage.read_text(f"{folder}/{ODD}") == "again"
    storage.rename(folder, f"{root}/three")
    assert [one.url for one in storage.glob(f"{root}/thr*/*.tif")] == [f"{root}/three/{ODD}"]
    assert storage.stat(folder) is None
    storage.remove(f"{root}/three")
    assert storage.list_folder(f"{root}/three") == []
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{root}/three/{ODD}")


def test_a_folder_is_never_renamed_onto_one_that_holds_something(root: str) -> None:
    storage.write_text(f"{root}/new/a", "1")
    storage.write_text(f"{root}/full/b", "2")
    with pytest.raises(SattileError, match="not empty"):
        storage.rename(f"{root}/new", f"{root}/full")
    assert storage.read_text(f"{root}/full/b") == "2"


def test_a_file_that_is_replaced_is_there_all_the_time(root: str) -> None:
    """For who reads it, and for who wants to create it: two would hold one lease."""
    url, stop = f"{root}/replaced", threading.Event()
    storage.write_text(url, "0" * 9)
    seen, created = set(), []

    def read() -> None:
        while not stop.is_set():
            seen.add(storage.read_text(url))

    def create() -> None:
        while not stop.is_set():
            created.append(storage.filesystem(url).create_exclusively(url, b"other"))

    with ThreadPoolExecutor() as pool:
        others = [pool.submit(read), pool.submit(create)]
        for number in range(20):
            storage.write_text(url, str(number % 10) * 9)
        stop.set()
        for one in others:
            one.result()
    assert seen <= {str(number) * 9 for number in range(10)}
    assert len(seen) > 1
    assert not any(created)
    assert [storage.name(one.url) for one in storage.list_folder(root) if "replaced" in one.url] == ["replaced"]


def test_one_of_many_gets_a_file_that_must_not_exist(root: str) -> None:
    won: list[int] = []

    def create(number: int) -> None:
        if storage.filesystem(root).create_exclusively(f"{root}/lock", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(won) == 1
    assert storage.read_text(f"{root}/lock") == str(won[0])
    with (
        storage.Lease(f"{root}/leased"),
        pytest.raises(UsageError, match="another job"),
        storage.Lease(f"{root}/leased"),
    ):
        pass


@pytest.fixture(scope="module")
def many(cluster: Cluster) -> str:
    """Ten thousand files, and what ten snapshots show of them: to make more would take minutes."""
    folder = f"{cluster.url}/many"
    names = [f"{folder}/scene {number:05}.tif" for number in range(10_000)]
    cluster.java("org.apache.hadoop.fs.FsShell", "-mkdir", folder)
    cluster.java("org.apache.hadoop.fs.FsShell", "-touchz", *names)
    cluster.java("org.apache.hadoop.hdfs.tools.DFSAdmin", "-allowSnapshot", folder)
    for number in range(10):
        cluster.java("org.apache.hadoop.fs.FsShell", "-createSnapshot", folder, f"s{number}")
    return folder


def test_a_hundred_thousand_files_are_listed_and_matched_in_seconds(root: str, many: str) -> None:
    start = time.monotonic()
    found = storage.glob(f"{many}/.snapshot/s*/scene*.tif")
    seconds = time.monotonic() - start
    assert len(found) == 100_000
    assert storage.name(found[-1].url) == "scene 09999.tif"
    assert seconds < 60


@pytest.fixture(scope="module")
def scene(root: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """(path on disk, URL) of a tiled scene of 16.8 Mpix, named awkwardly, with a mask beside it."""
    path = tmp_path_factory.mktemp("scene") / ODD
    data = np.random.default_rng(0).integers(1, 3000, (3, 3584, 4608)).astype(np.uint16)
    write_scene(path, data, nodata=0, tiled=True, blockxsize=512, blockysize=512, compress="deflate", interleave="band")
    copy = path.with_name("copy.tif")
    copy.write_bytes(path.read_bytes())
    storage.upload(str(copy), f"{root}/{ODD}")
    return str(path), f"{root}/{ODD}"


def open_scene(url: str):
    (candidate,) = scenes.find([url])
    return scenes.build_scene(candidate, [raster.describe_file(one.url) for one in candidate.sources])


def test_windows_are_those_of_the_local_file(scene: tuple[str, str]) -> None:
    local, remote = (open_scene(url) for url in scene)
    assert (local.transform, local.crs, local.bands[0].dtype) == (remote.transform, remote.crs, remote.bands[0].dtype)
    for window in (Window(0, 0, 700, 900), Window(3000, 4000, 1000, 1000), Window(1000, 7, 1, 4000)):
        for mine, theirs in zip(raster.read(remote, window), raster.read(local, window), strict=True):
            assert np.array_equal(mine, theirs)


def test_a_window_reads_hardly_more_than_its_bytes(scene: tuple[str, str]) -> None:
    path, url = scene
    raster.close_files()
    opened = open_scene(url)
    window = Window(1024, 2048, 512, 512)
    raster.read(opened, Window(0, 0, 1, 1))  # the header, and a tile elsewhere
    before = elsewhere.bytes_fetched, hdfs.requests_sent
    raster.read(opened, window)
    fetched, requests = elsewhere.bytes_fetched - before[0], hdfs.requests_sent - before[1]
    stored = os.path.getsize(path) * window.area / (opened.height * opened.width)
    assert fetched <= 1.2 * stored
    assert requests <= 3 * 2 + 1  # a range a band, each sent on to a DataNode, and the file's state


def test_sidecars_elsewhere_are_seen(root: str, tmp_path: Path) -> None:
    data = np.ones((1, 64, 96), np.uint8)
    write_scene(tmp_path / "m.tif", data)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(tmp_path / "m.tif", "r+") as file:
        mask = np.full((64, 96), 255, np.uint8)
        mask[:10] = 0
        file.write_mask(mask)
    assert (tmp_path / "m.tif.msk").exists()
    for name in ("m.tif", "m.tif.msk"):
        storage.upload(str(tmp_path / name), f"{root}/masked/{name}")
    opened = open_scene(f"{root}/masked/m.tif")
    _, valid = raster.read(opened, Window(0, 0, 64, 96))
    assert valid.sum() == 54 * 96


@pytest.mark.parametrize("profile", [{}, {"tiled": True, "blockxsize": 128, "blockysize": 128}, {"compress": "lzw"}])
def test_a_file_that_is_cut_short_is_refused(root: str, tmp_path: Path, profile: dict[str, object]) -> None:
    """GDAL would take what lies in memory for the missing pixels."""
    data = np.random.default_rng(0).integers(1, 2000, (3, 300, 333)).astype(np.uint16)
    whole = Path(write_scene(tmp_path / "whole.tif", data, **profile)).read_bytes()
    reasons = set()
    for folder in (str(tmp_path), root):
        storage.write_bytes(f"{folder}/short.tif", whole[: len(whole) * 6 // 10])
        opened = open_scene(f"{folder}/short.tif")
        with pytest.raises(Refused) as refused:
            raster.read(opened, Window(0, 0, 300, 333))
        reasons.add(refused.value.reason)
        raster.read(opened, Window(0, 0, 20, 20))  # this part is there
        storage.write_bytes(f"{folder}/short.tif", whole)
        assert (
            raster.read(open_scene(f"{folder}/short.tif"), Window(0, 0, 300, 333))[0] == data.transpose(1, 2, 0)
        ).all()
    assert len(reasons) == 1
    assert "ends too early" in reasons.pop()


def test_reading_and_writing_go_on_through_failures(cluster: Cluster, root: str, scene: tuple[str, str]) -> None:
    """The active NameNode dies, then a DataNode. GDAL's openers belong to the thread that made them: they stay here."""
    opened = open_scene(scene[1])
    expected = raster.read(open_scene(scene[0]), Window(0, 0, 3584, 4608))[0]
    first = cluster.active
    assert first
    failed: list[float] = []

    def fail() -> None:
        time.sleep(2)
        cluster.kill(first)
        time.sleep(3)
        cluster.failover("namenode-2" if first == "namenode-1" else "namenode-1")
        failed.append(time.monotonic())
        time.sleep(5)
        cluster.kill("datanode-1")
        failed.append(time.monotonic())

    thread = threading.Thread(target=fail)
    thread.start()
    try:
        turn = after = 0
        while after < 3:  # three whole turns with one DataNode and the other NameNode
            raster.close_files()
            assert np.array_equal(raster.read(opened, Window(0, 0, 3584, 4608))[0], expected)
            storage.write_text(f"{root}/turn", str(turn))
            assert storage.read_text(f"{root}/turn") == str(turn)
            turn += 1
            after += len(failed) == 2
    finally:
        thread.join()
        cluster.restart(first)
        cluster.restart("datanode-1")


def test_a_command_reaches_hdfs_where_webhdfs_is_closed(tmp_path: Path) -> None:
    """In its own process, in Spark's workers and in their decoders."""
    need(native=True)
    write_scene(tmp_path / "scene.tif", np.ones((1, 64, 96), np.uint8))
    with Cluster(tmp_path / "hadoop", datanodes=1, replication=1, webhdfs=False) as closed:
        closed.java(SHELL, "-put", str(tmp_path / "scene.tif"), f"{closed.url}/scene.tif")
        environment = os.environ | closed.environment() | libhdfs.environment()
        del environment["SATTILE_HDFS"]  # the configuration says it
        done = subprocess.run(
            [sys.executable, "-m", "sattile.cli", "index", "hdfs:///*.tif", "--out", "hdfs:///catalog", "--master",
             "local[1]"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        listed = closed.java(SHELL, "-ls", "-C", "/catalog").stdout
    assert "/catalog/scenes.parquet" in listed
