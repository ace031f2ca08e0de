"""The nightly run: what is new or has changed is done, what is as it was is left, and the record tells them apart."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from pyspark import BarrierTaskContext
from scenes_for_tests import write_scene

from sattile import pipeline, raster, storage
from sattile.decoder import decoder
from sattile.engine import on_worker
from sattile.errors import TooManyRefused, UsageError

HEIGHT, WIDTH = 96, 640
WEST, NORTH = 5120 * 100, 5120 * 1000
"""A corner of a sheet of the grid below."""

GRID = {"predict": {"grid": "EPSG:32632@10", "sheet": 512}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the bundles `versions/v1` and `other`: which of two bands is larger, and the other way round."""
    import keras

    from sattile.model import bundle

    folder = tmp_path_factory.mktemp("models")
    for name, factor in (("one", 1.0), ("two", -1.0)):
        given = keras.Input((None, None, 2))
        layer = keras.layers.Conv2D(2, 1, use_bias=False)
        network = keras.Model(given, layer(given))
        layer.set_weights([factor * np.eye(2, dtype=np.float32)[None, None]])
        network.save(folder / f"{name}.keras")
    options: dict[str, Any] = {"bands": "x,y", "classes": "x,y", "activation": "none"}
    bundle(keras=str(folder / "one.keras"), out=str(folder / "versions"), versions=True, **options)
    bundle(keras=str(folder / "two.keras"), out=str(folder / "other"), **options)
    return folder


def scene(archive: Path, name: str, seed: int, col: int = 0) -> Path:
    values = np.random.default_rng(seed).integers(1, 900, (2, HEIGHT, WIDTH)).astype(np.uint16)
    path = archive / f"{name}.tif"
    write_scene(path, values, names=("x", "y"), nodata=0, west=WEST + 10 * col, north=NORTH)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three scenes side by side."""
    for number, name in enumerate("abc"):
        scene(tmp_path / "archive", name, number, number * WIDTH)
    return tmp_path / "archive"


def nightly(spark: Any, models: Path, archive: Path, **options: Any) -> dict[str, Any]:
    """The record of a run over the archive."""
    out = archive.parent / "nightly"
    given = {"model": str(models / "versions"), "scenes": [str(archive / "*.tif")], "out": str(out)} | options
    pipeline.reprocess(spark, **given)
    return json.loads((out / "_run.json").read_text())


def changes(record: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    return record["new"], record["changed"], record["removed"]


def contents(out: Path) -> dict[str, tuple[bytes, int]]:
    """All that lies there but the records of runs: bytes, and when they were written."""
    files = (path for path in out.rglob("*") if path.is_file() and path.name != "_run.json")
    return {str(path.relative_to(out)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def listed(out: Path) -> list[str]:
    collection = json.loads((out / "mosaics" / "collection.json").read_text())
    return [link["title"] for link in collection["links"] if link["rel"] == "item"]


def test_a_night_does_what_is_new_or_has_changed(spark: Any, models: Path, archive: Path) -> None:
    out = archive.parent / "nightly"
    first = nightly(spark, models, archive)
    assert changes(first) == (["a", "b", "c"], [], [])
    assert first["model"] == str(models / "versions" / "v1")
    assert (out / "report" / "index.html").exists()
    before = contents(out)
    again = nightly(spark, models, archive)
    assert changes(again) == ([], [], [])
    assert (again["done"], again["skipped"]) == (0, 3)
    assert contents(out) == before

    scene(archive, "b", 7, WIDTH)
    scene(archive, "d", 8, 3 * WIDTH)
    (archive / "c.tif").unlink()
    assert changes(nightly(spark, models, archive)) == (["d"], ["b"], [])
    assert listed(out) == ["a", "b", "c", "d"], "what has left the archive stays, unless told otherwise"
    now = contents(out)
    assert all(now[name] == before[name] for name in before if name.startswith(("mosaics/a/", "mosaics/c/")))

    assert changes(nightly(spark, models, archive, prune=True)) == ([], [], ["c"])
    assert listed(out) == ["a", "b", "d"]
    assert not (out / "mosaics" / "c").exists()


def test_an_archive_is_the_same_from_whatever_folder(
    spark: Any, models: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nightly(spark, models, archive)
    before = contents(archive.parent / "nightly")
    monkeypatch.chdir(archive)
    relative = {"model": os.path.relpath(models / "versions"), "scenes": ["*.tif"], "out": "../nightly"}
    assert changes(nightly(spark, models, archive, prune=True, **relative)) == ([], [], [])
    assert contents(archive.parent / "nightly") == before


def test_what_can_not_be_read_tonight_keeps_its_map(spark: Any, models: Path, archive: Path) -> None:
    nightly(spark, models, archive)
    (archive / "b.tif").write_bytes(b"half of a file")
    (archive / "c.tif").unlink()
    with pytest.raises(TooManyRefused, match="1 of 2"):
        nightly(spark, models, archive, prune=True)
    out = archive.parent / "nightly"
    record = json.loads((out / "_run.json").read_text())
    assert changes(record) == ([], [], ["c"])
    assert record["quarantined"] == 1
    assert listed(out) == ["a", "b"]
    assert "b.tif" in (out / "report" / "index.html").read_text()


def test_what_a_killed_run_published_is_new_to_the_next_one(
    spark: Any, models: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nightly(spark, models, archive)
    scene(archive, "b", 7, WIDTH)
    scene(archive, "d", 8, 3 * WIDTH)

    def killed(*_: Any, **__: Any) -> str:
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr("sattile.reporting.report", killed)
        with pytest.raises(RuntimeError, match="killed"):
            nightly(spark, models, archive)
    assert (archive.parent / "nightly" / "mosaics" / "d" / "item.json").exists()
    assert changes(nightly(spark, models, archive)) == (["d"], ["b"], [])
    assert changes(nightly(spark, models, archive)) == ([], [], [])


def test_a_later_version_of_the_model_makes_all_maps_anew(
    spark: Any, models: Path, archive: Path, tmp_path: Path
) -> None:
    from sattile.model import bundle

    versions = tmp_path / "versions"
    options: dict[str, Any] = {
        "bands": "x,y",
        "classes": "x,y",
        "activation": "none",
        "out": str(versions),
        "versions": True,
    }
    bundle(keras=str(models / "one.keras"), **options)
    nightly(spark, models, archive, model=str(versions))
    before = contents(archive.parent / "nightly" / "mosaics")
    bundle(keras=str(models / "two.keras"), **options)
    record = nightly(spark, models, archive, model=str(versions))
    assert changes(record) == ([], ["a", "b", "c"], [])
    assert record["model"] == str(versions / "v2")
    assert contents(archive.parent / "nightly" / "mosaics")["a/labels.tif"] != before["a/labels.tif"]

    (archive / "b.tif").write_bytes(b"half of a file")
    (archive / "c.tif").unlink()
    bundle(keras=str(models / "one.keras"), **options, fill="7")
    with pytest.raises(TooManyRefused, match="1 of 2"):
        nightly(spark, models, archive, model=str(versions))
    assert listed(archive.parent / "nightly") == ["a", "b", "c"], "what can't be made anew stays"
    with pytest.raises(UsageError, match=r"made with other settings \(model"):
        nightly(spark, models, archive, model=str(models / "other"))
    other: dict[str, Any] = {"model": str(models / "other"), "settings": {"predict": {"threshold": 0.4}}}
    nightly(spark, models, archive, **other, overwrite=True, max_failed_fraction=1.0)
    assert listed(archive.parent / "nightly") == ["a"]


def test_sheets_of_a_grid(spark: Any, models: Path, archive: Path) -> None:
    """1,920 columns in sheets of 512: four side by side. `c` has the last to itself, and shares the third."""
    out = archive.parent / "nightly"
    first = nightly(spark, models, archive, settings=GRID)
    names = first["new"]
    assert len(names) == 4
    (archive / "c.tif").unlink()
    record = nightly(spark, models, archive, settings=GRID, prune=True)
    assert changes(record) == ([], [names[2]], [names[3]])
    assert listed(out) == names[:3]
    assert names[3] not in (out / "mosaics" / "labels.vrt").read_text()


def test_a_sheet_whose_scene_has_moved_or_cannot_be_read(spark: Any, models: Path, archive: Path) -> None:
    out = archive.parent / "nightly"
    names = nightly(spark, models, archive, settings=GRID)["new"]
    (archive / "c.tif").write_bytes((archive / "c.tif").read_bytes()[:-200_000])
    unread = nightly(spark, models, archive, settings=GRID, prune=True, max_failed_fraction=1.0)
    assert (unread["quarantined"], changes(unread)) == (1, ([], [names[2]], []))
    assert listed(out) == names, "the sheet that c has to itself stays"
    (archive / "c.tif").unlink()
    scene(archive, "c", 2, 4 * WIDTH)
    moved = nightly(spark, models, archive, settings=GRID, prune=True)
    assert names[3] in moved["removed"]
    assert set(listed(out)) == {*names[:3], *moved["new"]}


def test_a_sheet_whose_scene_has_rotted_when_the_model_has_a_later_version(
    spark: Any, models: Path, archive: Path, tmp_path: Path
) -> None:
    """Its size and time are as they were, and so is its header."""
    from sattile.model import bundle

    options: dict[str, Any] = {
        "bands": "x,y", "classes": "x,y", "activation": "none", "out": str(tmp_path / "versions"), "versions": True,
    }  # fmt: skip
    bundle(keras=str(models / "one.keras"), **options)
    values = np.random.default_rng(2).integers(1, 900, (2, HEIGHT, WIDTH)).astype(np.uint16)
    place = {"west": WEST + 20 * WIDTH, "north": NORTH}
    path = Path(write_scene(archive / "c.tif", values, names=("x", "y"), nodata=0, compress="deflate", **place))
    given: dict[str, Any] = {"model": str(tmp_path / "versions"), "settings": GRID, "prune": True}
    names = nightly(spark, models, archive, **given)["new"]
    before, stat = path.read_bytes(), path.stat()
    path.write_bytes(before[:2000] + b"\xff" * (len(before) - 4000) + before[-2000:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    def forget(frames: Any) -> Any:
        BarrierTaskContext.get().barrier()  # both workers do it
        decoder().call(raster.close_files)
        yield from frames

    # A night later they have it not open.
    spark.range(0, 2, 1, 2).mapInPandas(on_worker(forget), "id long", barrier=True).collect()
    bundle(keras=str(models / "two.keras"), **options)
    record = nightly(spark, models, archive, **given, max_failed_fraction=1.0)
    assert (record["quarantined"], record["removed"]) == (1, [])
    assert listed(archive.parent / "nightly") == names, "the sheet that c has to itself stays"


def test_scenes_that_come_to_bear_one_name(spark: Any, models: Path, archive: Path) -> None:
    out = archive.parent / "nightly"
    given: dict[str, Any] = {"scenes": [str(archive)], "prune": True}
    nightly(spark, models, archive, **given)
    scene(archive / "again", "a", 9)
    record = nightly(spark, models, archive, **given)
    assert record["removed"] == ["a"]
    assert sorted(one[:2] for one in record["new"]) == ["a-", "a-"]
    (archive / "again" / "a.tif").unlink()
    nightly(spark, models, archive, **given)
    assert listed(out) == ["a", "b", "c"]


@pytest.mark.parametrize("listed_in", ["items.json", "items.geojson"])
def test_nothing_is_removed_where_a_listing_could_not_be_read(
    spark: Any, models: Path, archive: Path, listed_in: str, caplog: pytest.LogCaptureFixture
) -> None:
    item = {
        "type": "Feature", "stac_version": "1.0.0", "id": "c", "geometry": None, "links": [],
        "properties": {"datetime": "2024-01-01T00:00:00Z"}, "assets": {"all": {"href": "../archive/c.tif"}},
    }  # fmt: skip
    text = json.dumps({"type": "FeatureCollection", "features": [item]})
    listing = archive.parent / "stac" / listed_in
    listing.parent.mkdir()
    listing.write_text(text)
    given: dict[str, Any] = {"scenes": [str(archive / "[ab].tif"), str(listing)], "max_failed_fraction": 1.0}
    assert nightly(spark, models, archive, **given)["new"] == ["a", "b", "c"]
    listing.write_text(text[:60])
    assert changes(nightly(spark, models, archive, prune=True, **given)) == ([], [], [])
    assert "no map is removed: " in caplog.text


def test_nothing_is_removed_while_a_linked_folder_is_away(spark: Any, models: Path, archive: Path) -> None:
    disk = archive.parent / "disk"
    (archive / "c.tif").rename(disk.with_suffix(".tif"))
    disk.mkdir()
    disk.with_suffix(".tif").rename(disk / "c.tif")
    (archive / "more").symlink_to(disk)
    for scenes in ([str(archive)], [str(archive / "*.tif"), str(archive / "*" / "*.tif")]):
        given: dict[str, Any] = {"scenes": scenes, "prune": True, "max_failed_fraction": 1.0}
        nightly(spark, models, archive, **given)
        disk.rename(archive.parent / "away")
        record = nightly(spark, models, archive, **given)
        assert changes(record) == ([], [], [])
        assert record["quarantined"] == 1
        (archive.parent / "away").rename(disk)
    (archive / "more").unlink()
    assert nightly(spark, models, archive, **given | {"scenes": [str(archive)]})["removed"] == ["c"]


def test_sheets_of_a_scene_that_is_damaged_in_one_of_them_stay(spark: Any, models: Path, archive: Path) -> None:
    """Those that come before the damage could be made of the new file, until it showed."""
    given: dict[str, Any] = {"settings": GRID, "max_failed_fraction": 1.0, "scenes": [str(archive / "long.tif")]}
    values = np.random.default_rng(1).integers(1, 900, (2, HEIGHT, 4 * WIDTH)).astype(np.uint16)
    place: dict[str, Any] = {"names": ("x", "y"), "nodata": 0, "compress": "deflate", "tiled": True}
    place |= {"west": WEST, "north": NORTH, "blockxsize": 64, "blockysize": 64}
    path = Path(write_scene(archive / "long.tif", values, **place))
    names = nightly(spark, models, archive, **given)["new"]
    assert len(names) == 5
    write_scene(path, values[:, ::-1], **place)
    with rasterio.open(path) as file:
        offset = int(file.get_tag_item("BLOCK_OFFSET_30_0", "TIFF", bidx=1))
    data = bytearray(path.read_bytes())
    data[offset : offset + 2000] = bytes(2000)
    path.write_bytes(data)
    for _ in range(2):
        record = nightly(spark, models, archive, **given)
        assert (record["removed"], record["quarantined"]) == ([], 1)
        assert listed(archive.parent / "nightly") == names


def test_settings_that_cannot_be_leave_the_folder_to_others(spark: Any, models: Path, archive: Path) -> None:
    for wrong in ({"tta": "some"}, {"grid": "EPSG:99999@10"}):
        with pytest.raises(UsageError):
            nightly(spark, models, archive, settings={"predict": wrong})
    nightly(spark, models, archive)
    with pytest.raises(UsageError, match="EPSG:99999"):
        nightly(spark, models, archive, settings={"predict": {"grid": "EPSG:99999@10"}}, overwrite=True)
    assert changes(nightly(spark, models, archive)) == ([], [], [])
    with pytest.raises(UsageError, match=r"predict\.dry_run is chosen by the chain"):
        nightly(spark, models, archive, settings={"predict": {"dry_run": True}})


def test_maps_below_the_archive_are_no_scenes(spark: Any, models: Path, archive: Path) -> None:
    out = str(archive / "maps" / "nightly")
    pipeline.reprocess(spark, model=str(models / "other"), scenes=[str(archive)], out=out)
    pipeline.reprocess(spark, model=str(models / "other"), scenes=[str(archive)], out=out)
    record = json.loads((archive / "maps" / "nightly" / "_run.json").read_text())
    assert (record["skipped"], record["quarantined"]) == (3, 0)


def test_a_map_that_was_half_removed_is_none(
    spark: Any, models: Path, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nightly(spark, models, archive)
    (archive / "c.tif").unlink()
    gone = archive.parent / "nightly" / "mosaics" / "c"
    remove = storage.remove

    def killed(url: str) -> None:
        if url == str(gone):
            raise RuntimeError("killed")
        remove(url)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(storage, "remove", killed)
        nightly(spark, models, archive, prune=True)
    assert gone.exists()
    assert changes(nightly(spark, models, archive)) == ([], [], ["c"])
    assert listed(archive.parent / "nightly") == ["a", "b"]


def test_what_is_wrong_is_said_before_anything_runs(spark: Any, models: Path, archive: Path, tmp_path: Path) -> None:
    out = archive.parent / "nightly"
    with pytest.raises(UsageError, match="does not exist"):
        nightly(spark, models, archive, model=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="settings of train: steps are index, predict, report"):
        nightly(spark, models, archive, settings={"train": {"epochs": 3}})
    assert not out.exists()
    with pytest.raises(UsageError, match="no file"):
        nightly(spark, models, archive, scenes=[str(tmp_path / "empty" / "*.tif")])
    nightly(spark, models, archive)
    with storage.Lease(str(out)), pytest.raises(UsageError, match="is being written by another job"):
        nightly(spark, models, archive)


def test_of_band_files_those_that_the_model_wants_give_the_grid(spark: Any, models: Path, tmp_path: Path) -> None:
    archive = tmp_path / "archive"
    values = np.random.default_rng(3).integers(1, 900, (2, HEIGHT, WIDTH)).astype(np.uint16)
    for band, name in zip(values, "xy", strict=True):
        write_scene(archive / f"s_{name}.tif", band[None], nodata=0)
    write_scene(archive / "s_pan.tif", np.ones((1, 2 * HEIGHT, 2 * WIDTH), np.uint16), nodata=0, gsd=5)
    record = nightly(spark, models, archive, pattern="{scene}_{band}.tif")
    assert record["new"] == ["s"]
    item = json.loads((tmp_path / "nightly" / "mosaics" / "s" / "item.json").read_text())
    assert item["properties"]["proj:shape"] == [HEIGHT, WIDTH]
