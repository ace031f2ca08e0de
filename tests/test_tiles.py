"""Tiles datasets, cut by real Spark from real files."""

from __future__ import annotations

import io
import itertools
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.features
import rasterio.transform
import rasterio.warp
import shapely
from scenes_for_tests import position_image, write_scene

import sattile.tiles
from sattile import storage
from sattile.dataset import petastorm_reader, read_dataset
from sattile.errors import TooManyRefused, UsageError
from sattile.labels import LabelSource
from sattile.schema import Scene
from sattile.split import SplitRule
from sattile.tiles import _plan, _whereabouts, tile
from sattile.training.reader import load_dataset

NAMES = ("B02", "B03", "B04")


def archive(
    folder: Path, *, count: int = 3, height: int = 203, width: int = 331, gap: int = 5_000, nodata: int | None = 0
):
    """Scenes side by side on the ground, 5 km apart, with labels by column parity; a nodata corner each."""
    for index in range(count):
        image = position_image(height, width, 3, col0=1000 * index)
        image[:, :20, :30] = 0
        where = {"west": 600_000 + gap * index}
        write_scene(folder / "scenes" / f"s{index}.tif", image, names=NAMES, nodata=nodata, **where)
        labels = ((np.indices((height, width)).sum(0) // 8) % 2).astype(np.uint8)
        labels[-11:] = 255
        write_scene(folder / "labels" / f"s{index}.tif", labels[None], nodata=255, **where)
    return {"scenes": [str(folder / "scenes")], "labels": str(folder / "labels")}


def rows_of(dataset: str) -> pandas.DataFrame:
    """All rows of a dataset, decoded, with their split."""
    found = []
    for split, part in read_dataset(dataset)["splits"].items():
        for name in part["files"]:
            frame = pq.read_table(os.path.join(dataset, split, name)).to_pandas()
            for column in ("image", "labels", "valid"):
                frame[column] = [np.load(io.BytesIO(value), allow_pickle=False) for value in frame[column]]
            found.append(frame.assign(split=split))
    return pandas.concat(found, ignore_index=True).sort_values("tile_id", ignore_index=True)


@pytest.fixture(scope="module")
def made(spark, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiles")
    given = archive(folder)
    out = tile(spark, **given, out=str(folder / "out"), size=64, stride=48, classes="even,odd", split="scene")
    return folder, given, out


def test_every_pixel_of_a_tile_is_the_scenes(made):
    folder, _, out = made
    rows = rows_of(out)
    assert Counter(rows["split"]).keys() == {"train", "val", "test"}
    for scene_id, part in rows.groupby("scene_id"):
        with rasterio.open(folder / "scenes" / f"{scene_id}.tif") as file:
            image = np.moveaxis(file.read(), 0, -1)
        with rasterio.open(folder / "labels" / f"{scene_id}.tif") as file:
            labels = file.read(1)
        seen = np.zeros(image.shape[:2], bool)
        for row in part.itertuples():
            where = slice(row.row, row.row + 64), slice(row.col, row.col + 64)
            valid = (image[where] != 0).all(-1)
            assert (row.valid == valid).all()
            assert (row.image == np.where(valid[..., None], image[where], 0)).all()
            assert (row.labels == np.where(valid, labels[where], 255)).all()
            assert row.tile_id == f"{scene_id}/{row.row}/{row.col}"
            seen[where] = True
        assert seen.all(), "right and bottom edge are reached"


def test_one_scene_is_in_one_split(made):
    rows = rows_of(made[2])
    assert rows.groupby("scene_id")["split"].nunique().max() == 1


def test_the_description_counts_what_is_there(made):
    description, rows = read_dataset(made[2]), rows_of(made[2])
    assert description["bands"] == list(NAMES)
    assert [one["name"] for one in description["classes"]] == ["even", "odd"]
    for split, part in description["splits"].items():
        mine = rows[rows["split"] == split]
        assert part["tiles"] == sum(part["rows"]) == len(mine)
        labels = np.concatenate([value.ravel() for value in mine["labels"]])
        assert part["class_pixels"] == {"0": int((labels == 0).sum()), "1": int((labels == 1).sum())}
        assert part["valid_pixels"] == sum(int(value.sum()) for value in mine["valid"])
    train = rows[rows["split"] == "train"]
    for band, name in enumerate(NAMES):
        values = np.concatenate([r.image[..., band][r.valid] for r in train.itertuples()]).astype(np.float64)
        found = description["statistics"][name]
        assert found["mean"] == pytest.approx(values.mean(), rel=1e-12)
        assert found["std"] == pytest.approx(values.std(), rel=1e-12)
        assert found["percentiles"]["50"] == np.sort(values)[int(np.ceil(len(values) / 2)) - 1]


def test_the_description_says_where_the_training_scenes_lie(made):
    folder, _, out = made
    rows = rows_of(out)
    area = shapely.from_geojson(json.dumps(read_dataset(out)["footprint"]))
    for scene_id, split in zip(rows["scene_id"], rows["split"], strict=True):
        with rasterio.open(folder / "scenes" / f"{scene_id}.tif") as file:
            ground = shapely.box(*rasterio.warp.transform_bounds(file.crs, 4326, *file.bounds))
        assert area.intersects(ground) == (split == "train")
    assert read_dataset(out)["interval"] is None  # the files don't say it


def test_the_training_ground_is_whole_or_not_said(made):
    def scene(number, **change):
        where = shapely.box(number % 40 * 0.5, number // 40 * 0.5, number % 40 * 0.5 + 0.3, number // 40 * 0.5 + 0.3)
        known = {"footprint": shapely.to_wkb(where), "datetime": f"2020-{1 + number % 12:02}-02T03:04:05Z"}
        return Scene(f"s{number}", "u", 1, 1, (), None, (1, 0, 0, 0, -1, 0), **(known | change))

    few = [scene(number) for number in (7, 3, 5)]
    found = _whereabouts(few)
    assert found["interval"] == ["2020-04-02T03:04:05Z", "2020-08-02T03:04:05Z"]
    assert shapely.from_geojson(json.dumps(found["footprint"])).area == pytest.approx(3 * 0.09)
    assert _whereabouts(few[::-1]) == found
    many = [scene(number) for number in range(400)]
    area = shapely.from_geojson(json.dumps(_whereabouts(many)["footprint"]))
    assert shapely.get_num_coordinates(area) <= 500
    assert all(area.covers(shapely.from_wkb(one.footprint)) for one in many)
    assert _whereabouts([*few, scene(9, footprint=None)]) == {**_whereabouts([*few, scene(9)]), "footprint": None}
    assert _whereabouts([*few, scene(9, datetime=None)])["interval"] is None
    composite = scene(9, datetime=None, interval=("2020-05-01T00:00:00Z", "2020-12-31T00:00:00Z"))
    assert _whereabouts([*few, composite])["interval"] == ["2020-04-02T03:04:05Z", "2020-12-31T00:00:00Z"]
    assert _whereabouts([]) == {"footprint": None, "interval": None}


def test_the_same_rows_for_any_order_partitioning_and_rerun(spark, made, tmp_path, monkeypatch):
    folder, given, out = made
    monkeypatch.setattr("sattile.tiles.SMALL_PIXELS", 1)
    monkeypatch.setattr("sattile.tiles.TASK_PIXELS", 20_000)
    scenes = [str(folder / "scenes" / f"s{i}.tif") for i in (2, 0, 1, 0)]
    options = {"size": 64, "stride": 48, "classes": "even,odd", "split": "scene"}
    other = tile(spark, scenes=scenes, labels=given["labels"], out=str(tmp_path / "o"), **options)
    assert read_dataset(other)["digest"] == read_dataset(out)["digest"]
    assert read_dataset(other)["statistics"] == read_dataset(out)["statistics"]
    before = {entry.url: (entry.size, entry.mtime) for entry in storage.walk(other)}
    tile(spark, scenes=scenes, labels=given["labels"], out=other, **options)
    assert before == {entry.url: (entry.size, entry.mtime) for entry in storage.walk(other)}
    assert json.loads((tmp_path / "o" / "_run.json").read_text())["skipped"] == 3


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_every_core_has_tasks_to_the_end(slots):
    """A scene of three tasks' pixels, on two cores, would take as long as one of four."""
    scene, rule = Scene("s", "u", 8192, 8192, (), None, (1, 0, 0, 0, -1, 0)), SplitRule("scene", (1, 0, 0), 0, 1, 0)
    tasks = _plan([scene], {"s": LabelSource("u")}, rule, True, 256, 256, None, slots)
    rows = [len(pickle.loads(chunk).rows) for task in tasks for (chunk,) in task]
    assert sum(rows) == 32
    shares = [sum(rows[slot::slots]) for slot in range(slots)]
    assert max(shares) <= 1.25 * 32 / slots


def test_large_shapes_are_read_from_a_file_that_all_chunks_share(spark, tmp_path, monkeypatch):
    import geopandas

    monkeypatch.setattr("sattile.tiles.SMALL_PIXELS", 1)
    monkeypatch.setattr("sattile.tiles.TASK_PIXELS", 20_000)
    for index in range(2):
        west = 600_000 + 20_000 * index
        write_scene(tmp_path / "scenes" / f"s{index}.tif", position_image(200, 300, 1), west=west)
    boxes = [shapely.box(600_000 + at, 4_998_000, 600_050 + at, 5_000_000) for at in range(0, 23_000, 90)]
    geopandas.GeoDataFrame({"kind": [at % 3 for at in range(len(boxes))]}, geometry=boxes, crs=32632).to_file(
        tmp_path / "l.gpkg"
    )
    area = shapely.Point(611_000, 4_999_000).buffer(10_500, 90)
    geopandas.GeoDataFrame(geometry=[area], crs=32632).to_crs(4326).to_file(tmp_path / "a.gpkg")
    options = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "l.gpkg"), "attribute": "kind",
               "aoi": str(tmp_path / "a.gpkg"), "size": 64, "split": "scene", "fractions": "1,0,0"}  # fmt: skip
    inline = read_dataset(tile(spark, **options, out=str(tmp_path / "inline")))
    monkeypatch.setattr("sattile.tiles.FILED_FROM", 2000)
    filed, pack = [], sattile.tiles._pack
    monkeypatch.setattr(
        "sattile.tiles._pack", lambda chunk, work, known: filed.append(known) or pack(chunk, work, known)
    )
    in_files = read_dataset(tile(spark, **options, out=str(tmp_path / "filed")))
    assert len(filed) > 4  # chunks
    assert len(filed[0]) == 3  # two scenes' shapes and the area
    assert in_files["digest"] == inline["digest"]
    assert sum(part["tiles"] for part in inline["splits"].values()) > 20
    assert not list((tmp_path / "filed").glob(".work-*"))


def test_what_a_killed_run_left_is_cleared_away(spark, tmp_path):
    given = archive(tmp_path, count=1, height=70, width=70)
    left = tmp_path / "out" / ".work-12345678" / "train"
    left.mkdir(parents=True)
    (left / "part.parquet").write_bytes(b"half")
    tile(spark, **given, out=str(tmp_path / "out"), size=32, split="scene")
    assert not list((tmp_path / "out").glob(".work-*"))


def test_a_changed_label_is_seen(spark, tmp_path):
    given = archive(tmp_path)
    options = {"out": str(tmp_path / "out"), "size": 64, "classes": "even,odd", "split": "scene"}
    before = read_dataset(tile(spark, **given, **options))["digest"]
    with rasterio.open(tmp_path / "labels" / "s1.tif", "r+") as file:
        file.write(np.ones((1, 9, 9), np.uint8), window=rasterio.windows.Window(100, 100, 9, 9))
    assert read_dataset(tile(spark, **given, **options))["digest"] != before
    listed = {name for split, part in read_dataset(options["out"])["splits"].items() for name in part["files"]}
    assert {path.name for path in (tmp_path / "out").rglob("*.parquet")} == listed


def test_petastorm_pandas_and_spark_read_it(spark, made):
    rows = rows_of(made[2])
    train = rows[rows["split"] == "train"].set_index("tile_id")
    url = os.path.join(made[2], "train")
    with petastorm_reader(made[2], "train", reader_pool_type="dummy", num_epochs=1) as reader:
        seen = {row.tile_id: row for row in reader}
    assert seen.keys() == set(train.index)
    for tile_id, row in seen.items():
        assert (row.image == train.loc[tile_id].image).all()
        assert row.image.dtype == np.uint16
        assert (row.labels == train.loc[tile_id].labels).all()
        assert (row.valid == train.loc[tile_id].valid).all()
    assert set(pandas.read_parquet(url)["tile_id"]) == set(train.index)
    assert spark.read.parquet(url).count() == len(train)


def test_blocks_of_ground_keep_a_buffer_between_splits(spark, tmp_path):
    image = position_image(901, 1203, 1)
    write_scene(tmp_path / "scenes" / "a.tif", image)
    write_scene(tmp_path / "scenes" / "later.tif", image, west=600_170, north=4_999_830)
    write_scene(tmp_path / "labels.tif", np.ones((1, 1200, 1500), np.uint8))
    out = tile(
        spark, scenes=[str(tmp_path / "scenes")], labels=str(tmp_path / "labels.tif"), out=str(tmp_path / "out"),
        size=32, split="block", fractions="0.6,0.2,0.2", buffer=20, seed=1,
    )  # fmt: skip
    rows = rows_of(out)
    assert set(rows["split"]) == {"train", "val", "test"}
    assert rows[rows["split"] == "train"]["scene_id"].nunique() == 2
    # Ground in pixels of 10 m: the second scene lies 17 pixels to the south-east.
    shift = rows["scene_id"].eq("later") * 17
    boxes = shapely.box(rows["col"] + shift, rows["row"] + shift, rows["col"] + shift + 32, rows["row"] + shift + 32)
    train, held = boxes[rows["split"] == "train"], boxes[rows["split"] != "train"]
    # A pixel of tolerance: the buffer is measured on the ellipsoid's own grid.
    assert shapely.distance(shapely.union_all(train), shapely.union_all(held)) >= 19


def test_scenes_of_one_place_on_several_dates_share_a_split(spark, tmp_path):
    for place in range(4):
        for date in range(3):
            image = position_image(64, 96, 1) + date
            where = {"west": 600_000 + 20_000 * place + 10 * date}
            write_scene(tmp_path / "scenes" / f"p{place}_d{date}.tif", image, **where)
            write_scene(tmp_path / "labels" / f"p{place}_d{date}.tif", np.ones((1, 64, 96), np.uint8), **where)
    out = tile(spark, scenes=[str(tmp_path / "scenes")], labels=str(tmp_path / "labels"), out=str(tmp_path / "out"),
               size=32, split="scene", fractions="0.5,0.25,0.25")  # fmt: skip
    rows = rows_of(out)
    assert rows.groupby(rows["scene_id"].str[:2])["split"].nunique().max() == 1
    assert rows["split"].nunique() == 3


def test_training_tiles_on_the_ground_of_test_scenes_are_left_out(spark, tmp_path):
    # Neighbours overlap by a quarter: not one place, but common ground.
    given = archive(tmp_path, count=6, height=160, width=160, gap=1_200)
    out = tile(spark, **given, out=str(tmp_path / "out"), size=32, buffer=0, split="scene",
               fractions="0.5,0.25,0.25")  # fmt: skip
    rows = rows_of(out)
    left = rows["scene_id"].str[1:].astype(int) * 120 + rows["col"]
    boxes = shapely.box(left, rows["row"], left + 32, rows["row"] + 32)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        first, second = boxes[rows["split"] == one], boxes[rows["split"] == other]
        assert shapely.union_all(first).intersection(shapely.union_all(second)).area == 0


def test_pairs_with_a_split_are_taken_as_they_are(spark, tmp_path, caplog):
    archive(tmp_path, count=2, gap=0)
    (tmp_path / "pairs.csv").write_text(
        "scene,labels,split\nscenes/s0.tif,labels/s0.tif,train\nscenes/s1.tif,labels/s1.tif,val\n"
    )
    out = tile(spark, pairs=str(tmp_path / "pairs.csv"), out=str(tmp_path / "out"), size=64, classes="even,odd")
    assert {(row.scene_id, row.split) for row in rows_of(out).itertuples()} == {("s0", "train"), ("s1", "val")}
    assert len(rows_of(out)) == 2 * 4 * 6
    assert "show common ground" in caplog.text


def test_vector_labels_are_drawn_onto_the_grid(spark, tmp_path):
    write_scene(tmp_path / "a.tif", position_image(100, 140, 1))
    import geopandas

    def to_ground(box):
        top, left, bottom, right = box
        return shapely.box(
            600_000 + 10 * left, 5_000_000 - 10 * bottom, 600_000 + 10 * right, 5_000_000 - 10 * top
        )  # fmt: skip

    shapes = {"Sand": (10, 20, 30, 60), "Marsh, wet": (50, 5, 90, 44), "Cloud": (0, 100, 9, 120)}
    frame = geopandas.GeoDataFrame(
        {"kind": list(shapes)}, geometry=[to_ground(b) for b in shapes.values()], crs=32632
    ).to_crs(4326)
    for name in ("l.geojson", "l.gpkg", "l.shp"):
        frame.to_file(tmp_path / name)
        out = tile(spark, scenes=[str(tmp_path / "a.tif")], labels=str(tmp_path / name), attribute="kind", size=140,
                   classes="Sand=1,Cloud=7", ignore='"Marsh, wet"',
                   fractions="1,0,0", out=str(tmp_path / (name + ".out")))  # fmt: skip
        (row,) = rows_of(out).itertuples()
        expected = np.full((140, 140), 255)
        expected[10:30, 20:60] = 1
        expected[0:9, 100:120] = 7
        assert (row.labels == expected).mean() > 0.999, name  # the outline went through degrees
        assert row.valid[:100].all()
        assert not row.valid[100:].any()


def test_without_classes_an_attributes_values_are_the_classes(spark, tmp_path):
    import geopandas

    write_scene(tmp_path / "a.tif", position_image(64, 64, 1))
    box = shapely.box(600_000, 4_999_800, 600_300, 5_000_000)
    geopandas.GeoDataFrame({"kind": ["Marsh", "Alder"]}, geometry=[box, box], crs=32632).to_file(tmp_path / "l.gpkg")
    out = tile(spark, scenes=[str(tmp_path / "a.tif")], labels=str(tmp_path / "l.gpkg"), attribute="kind", size=64,
               fractions="1,0,0", background="Marsh", out=str(tmp_path / "o"))  # fmt: skip
    assert [(one["id"], one["name"]) for one in read_dataset(out)["classes"]] == [(0, "Alder"), (1, "Marsh")]
    (row,) = rows_of(out).itertuples()
    assert (row.labels[:20, :30] == 0).all()  # later shapes lie on top
    assert (row.labels[20:] == 1).all()


def test_missing_values_that_no_file_declares_are_told(spark, tmp_path, caplog):
    """Float32's least number is a value, if a wild one; what float32 can't hold no network sees."""
    rng = np.random.default_rng(0)
    for index in range(3):
        image = rng.normal(100, 10, (2, 64, 96))
        image[0, 3, 5] = np.finfo(np.float32).min
        image[1, 7, 9] = 1e300
        where = {"west": 600_000 + 5000 * index}
        write_scene(tmp_path / "scenes" / f"s{index}.tif", image, names=("a", "b"), **where)
        write_scene(tmp_path / "labels" / f"s{index}.tif", rng.integers(0, 2, (1, 64, 96)).astype(np.uint8), **where)
    given = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "labels")}
    out = tile(spark, **given, out=str(tmp_path / "out"), size=32, classes="even,odd", split="scene")
    assert "band a: 98 % of the values lie between 7" in caplog.text
    assert "and some at -3.40282347e+38: a missing value that no file declares? --nodata says it" in caplog.text
    assert "band b:" not in caplog.text
    hidden = [int((~row.valid).sum()) for row in rows_of(out).itertuples()]
    assert sum(hidden) == 3
    described = load_dataset(out)  # as a training takes it
    np.testing.assert_allclose(described.mean, 100, atol=1)
    np.testing.assert_allclose(described.std, 10, atol=1)


def test_a_class_without_a_training_pixel_is_told(spark, tmp_path, caplog):
    archive(tmp_path, count=1)
    given = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "labels"), "fractions": "1,0,0"}
    tile(spark, **given, out=str(tmp_path / "out"), size=64, classes="even,odd,never")
    assert "no training tile shows never: a network can't learn it" in caplog.text


def test_small_scenes_are_padded_and_thin_tiles_left_out(spark, tmp_path):
    write_scene(tmp_path / "a.tif", position_image(20, 50, 2))
    write_scene(tmp_path / "l.tif", np.ones((1, 20, 50), np.uint8))
    given = {"scenes": [str(tmp_path / "a.tif")], "labels": str(tmp_path / "l.tif"), "size": 64, "fractions": "1,0,0"}
    (row,) = rows_of(tile(spark, **given, out=str(tmp_path / "o"))).itertuples()
    assert row.valid.sum() == 20 * 50
    assert (row.labels == 255).sum() == 64 * 64 - 20 * 50
    with pytest.raises(UsageError, match="1 too few valid pixels"):
        tile(spark, **given, out=str(tmp_path / "p"), min_valid=0.5)


def test_background_tiles_are_thinned(spark, tmp_path):
    write_scene(tmp_path / "a.tif", position_image(320, 320, 1))
    labels = np.zeros((1, 320, 320), np.uint8)
    labels[:, :32] = 1
    write_scene(tmp_path / "l.tif", labels)
    out = tile(spark, scenes=[str(tmp_path / "a.tif")], labels=str(tmp_path / "l.tif"), size=32, fractions="1,0,0",
               keep_background=0.3, out=str(tmp_path / "o"))  # fmt: skip
    rows = rows_of(out)
    only = [not row.labels.any() for row in rows.itertuples()]
    assert sum(only) == pytest.approx(27, abs=14)
    assert len(rows) - sum(only) == 10


def test_an_aoi_hides_labels_outside(spark, tmp_path):
    import geopandas

    write_scene(tmp_path / "a.tif", position_image(128, 192, 1))
    write_scene(tmp_path / "l.tif", np.ones((1, 128, 192), np.uint8))
    inside = shapely.box(600_000, 5_000_000 - 10 * 40, 600_000 + 10 * 100, 5_000_000)
    geopandas.GeoDataFrame(geometry=[inside], crs=32632).to_file(tmp_path / "aoi.geojson")
    out = tile(spark, scenes=[str(tmp_path / "a.tif")], labels=str(tmp_path / "l.tif"), size=64, fractions="1,0,0",
               aoi=str(tmp_path / "aoi.geojson"), out=str(tmp_path / "o"))  # fmt: skip
    rows = rows_of(out)
    assert sorted(zip(rows["row"], rows["col"], strict=True)) == [(0, 0), (0, 64)]
    assert sum(int((labels == 1).sum()) for labels in rows["labels"]) == 40 * 100


def test_scenes_that_fail_are_quarantined_and_the_others_published(spark, tmp_path):
    given = archive(tmp_path, count=4)
    path = tmp_path / "scenes" / "s1.tif"
    path.write_bytes(path.read_bytes()[:150_000])  # the header lies in front: it fails while being read
    (tmp_path / "labels" / "s2.tif").unlink()
    write_scene(tmp_path / "labels" / "s3.tif", np.full((1, 203, 331), 9, np.uint8), west=615_000)
    with pytest.raises(TooManyRefused, match="3 of 4"):
        tile(spark, **given, out=str(tmp_path / "out"), size=64, classes="even,odd", fractions="1,0,0")
    reasons = {
        os.path.basename(row["url"]): row["reason"]
        for row in pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    }
    assert reasons.keys() == {"s1.tif", "s2.tif", "s3.tif"}
    assert "no file named s2.tif" in reasons["s2.tif"]
    assert "value 9" in reasons["s3.tif"]
    assert set(rows_of(str(tmp_path / "out"))["scene_id"]) == {"s0"}


def test_a_scene_without_the_datasets_bands_is_refused(spark, tmp_path):
    given = archive(tmp_path, count=3)
    write_scene(tmp_path / "scenes" / "s1.tif", position_image(203, 331, 2), names=NAMES[:2], west=605_000)
    out = tile(spark, **given, out=str(tmp_path / "out"), size=64, max_failed_fraction=0.5, fractions="1,0,0")
    (row,) = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    assert "lacks band B04" in row["reason"]
    assert set(rows_of(out)["scene_id"]) == {"s0", "s2"}
    chosen = tile(spark, **given, out=str(tmp_path / "two"), size=64, bands="B03,B02", fractions="1,0,0")
    assert read_dataset(chosen)["bands"] == ["B03", "B02"]
    assert set(rows_of(chosen)["scene_id"]) == {"s0", "s1", "s2"}
    for row in rows_of(chosen).itertuples():
        inside = row.valid.nonzero()
        assert (row.image[inside][:, 1] == row.row + 1 + inside[0]).all()


def test_float_statistics_do_not_depend_on_order(tmp_path):
    from sattile.statistics import BandStatistics

    rng = np.random.default_rng(5)
    tiles = [rng.normal(-3, 40, 999).astype(np.float32) for _ in range(6)]
    one, other = BandStatistics("float32"), BandStatistics("float32")
    for values in tiles:
        one.add(values)
    for values in reversed(tiles):
        part = BandStatistics("float32")
        part.add(values)
        other.merge(part)
    assert one.summary() == other.summary()
    everything = np.concatenate(tiles).astype(np.float64)
    assert one.summary()["mean"] == pytest.approx(everything.mean(), rel=1e-9)
    assert one.summary()["std"] == pytest.approx(everything.std(), rel=1e-9)
    assert (one.summary()["min"], one.summary()["max"]) == (everything.min(), everything.max())
    for p in (1, 25, 75, 99):
        assert one.summary()["percentiles"][str(p)] == pytest.approx(np.percentile(everything, p), rel=0.01, abs=0.3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 64, "stride": 65}, "stride 65"),
        ({"size": 0}, "at least 1"),
        ({"fractions": "0.5,0.5"}, "sum to 1"),
        ({"split": "random"}, "scene, block or auto"),
        ({"classes": "a=0,b=0"}, "names must differ, and so must values"),
        ({"labels": "nowhere.tif"}, "does not exist"),
        ({"pairs": "x.csv"}, "either"),
        ({"scenes": ["nowhere.tif"]}, "nowhere"),
        ({"stride": 0}, "at least 1"),
        ({"cell": 0}, "cell 0"),
        ({"buffer": -1}, "buffer -1"),
        ({"min_valid": 1.5}, "--min-valid"),
        ({"keep_background": -0.1}, "--keep-background"),
        ({"background": "sea"}, "'sea' is no class"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_written(spark, tmp_path, options, message):
    given = archive(tmp_path, count=1)
    with pytest.raises(UsageError, match=message):
        tile(spark, **{**given, "out": str(tmp_path / "out"), **options})
    assert not [path for path in (tmp_path / "out").rglob("*") if path.name[:1] not in "_."]


def test_scenes_that_all_lack_a_crs_are_dealt_whole(spark, tmp_path):
    for index in range(8):
        image = position_image(40, 60, 3, row0=index)
        write_scene(tmp_path / "scenes" / f"s{index}.tif", image, crs=None)
        labels = (image[:1] % 2).astype(np.uint8)
        write_scene(tmp_path / "labels" / f"s{index}.tif", labels, crs=None)
    given = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "labels")}
    rows = rows_of(tile(spark, **given, out=str(tmp_path / "out"), size=20))
    assert len(rows) == 8 * 6
    assert set(rows["split"]) == {"train", "val", "test"}
    assert rows.groupby("scene_id")["split"].nunique().max() == 1


def test_scenes_that_lie_nowhere_on_earth_or_beyond_its_edge(spark, tmp_path):
    """A drawing's CRS, and a full-disk image whose corners see space: neither stops the others."""
    disk = "+proj=geos +h=35785831 +lon_0=0 +a=6378169 +b=6356583.8 +units=m"
    places = {
        "drawing": ('LOCAL_CS["drawing",UNIT["metre",1]]', rasterio.Affine(1, 0, 5, 0, -1, 9)),
        "disk": (disk, rasterio.Affine(120_000, 0, -5.5e6, 0, -120_000, 5.5e6)),
        "usual": ("EPSG:32632", rasterio.Affine(10, 0, 600_000, 0, -10, 5_000_000)),
    }
    for name, (crs, transform) in places.items():
        image = position_image(92, 92, 3)
        write_scene(tmp_path / "scenes" / f"{name}.tif", image, crs=crs, transform=transform)
        labels = (image[:1] % 2).astype(np.uint8)
        write_scene(tmp_path / "labels" / f"{name}.tif", labels, crs=crs, transform=transform)
    given = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "labels")}
    for by in ("scene", "block"):
        out = str(tmp_path / by)
        rows = rows_of(tile(spark, **given, out=out, size=16, split=by, fractions="1,0,0", buffer=0))
        counts = Counter(rows["scene_id"])
        assert counts["drawing"] == counts["usual"] == 36
        assert counts["disk"] == 36 if by == "scene" else 9 <= counts["disk"] < 36  # those that lie wholly on Earth


def test_no_ground_is_shared_across_the_antimeridian(spark, tmp_path):
    """A test scene that reaches into a training tile across 180 degrees, on one side of it."""
    fractions = (0.5, 0.0, 0.5)
    seed = next(
        seed for seed in range(99)
        if [SplitRule("scene", fractions, seed, 0, 0).of(one) for one in "abcd"] == ["train", "test", "train", "test"]
    )  # fmt: skip
    # Pixels of 0.001 degrees: a spans 179.97 E to 179.966 W; b lies in its middle tile, and north of it.
    for name, west, north, width in (
        ("a", 179.97, -17.0, 64),
        ("b", -179.99, -16.95, 9),
        ("c", 9, 50, 64),
        ("d", 9, 40, 64),
    ):
        where = {"crs": "EPSG:4326", "transform": rasterio.transform.from_origin(west, north, 0.001, 0.001)}
        image = position_image(64, width, 3)
        write_scene(tmp_path / "scenes" / f"{name}.tif", image, **where)
        write_scene(tmp_path / "labels" / f"{name}.tif", np.ones((1, 64, width), np.uint8), **where)
    given = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "labels")}
    options = {"split": "scene", "fractions": "0.5,0,0.5", "buffer": 0, "seed": seed}
    rows = rows_of(tile(spark, **given, out=str(tmp_path / "out"), size=64, **options))
    assert dict(zip(rows["scene_id"], rows["split"], strict=True)) == {"b": "test", "c": "train", "d": "test"}


def test_west_of_greenwich_a_sliver_is_no_block(tmp_path):
    """Which blocks are worth dealing by hand follows from how much of the archive lies in each."""
    from sattile import raster
    from sattile.scenes import describe, find
    from sattile.tiles import _cells_of

    for west, crs in ((600_000, "EPSG:32632"), (600_000, "EPSG:32612")):
        url = write_scene(tmp_path / f"{crs[-2:]}.tif", position_image(64, 64, 1), west=west, crs=crs)
        scene = describe(find(url)[0], raster.describe_file)
        sizes = _cells_of([scene], [shapely.from_wkb(scene.footprint)], 400.0)
        assert sum(sizes.values()) == pytest.approx(640**2 / 400**2, rel=0.05)
        assert max(sizes.values()) < 1 + 1e-9


def test_nodata_that_is_no_number_can_be_named_and_rerun(spark, tmp_path):
    image = np.ones((1, 64, 64), np.float32)
    image[0, :9] = np.nan
    url = write_scene(tmp_path / "s.tif", image)
    labels = write_scene(tmp_path / "labels.tif", np.ones((1, 64, 64), np.uint8))
    options = {"size": 16, "split": "scene", "fractions": "1,0,0", "nodata": float("nan")}
    for _ in range(2):
        out = tile(spark, scenes=[url], labels=labels, out=str(tmp_path / "out"), **options)
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["skipped"] == 1
    assert read_dataset(out)["splits"]["train"]["labelled_pixels"] == 64 * 55


def test_a_scene_that_no_line_of_the_pairs_names_is_said(spark, tmp_path):
    given = archive(tmp_path, count=2)
    pairs = tmp_path / "pairs.csv"
    pairs.write_text(
        f"scene,labels\n{given['scenes'][0]}/s1*.tif,labels/s1.tif\nscenes/../scenes/s0.tif,labels/s0.tif\n"
    )
    out = tile(
        spark, pairs=str(pairs), out=str(tmp_path / "out"), size=64, split="scene", fractions="1,0,0",
        max_failed_fraction=0.5,
    )  # fmt: skip
    assert set(rows_of(out)["scene_id"]) == {"s0"}
    (row,) = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    assert row["url"].endswith("s1.tif")
    assert "no line of the pairs file names" in row["reason"]


def test_a_band_without_a_valid_pixel_is_named_with_its_scene(spark, tmp_path, caplog):
    given = archive(tmp_path, count=3, height=97, width=130, nodata=None)
    names = ("B02", "B03", "B11")

    def without(*numbers: int) -> None:
        for number in numbers:
            image = position_image(97, 130, 3, col0=1000 * number).astype(np.float32)
            image[2] = np.nan
            image[0, :50] = np.nan
            write_scene(tmp_path / "scenes" / f"s{number}.tif", image, names=names, west=600_000 + 5_000 * number)

    for number in range(3):
        image = position_image(97, 130, 3, col0=1000 * number).astype(np.float32)
        write_scene(tmp_path / "scenes" / f"s{number}.tif", image, names=names, west=600_000 + 5_000 * number)
    without(1)
    caplog.set_level("WARNING", "sattile")
    options = {"size": 32, "classes": "even,odd", "split": "scene", "fractions": "1,0,0", "buffer": 0}
    out = tile(spark, **given, **options, out=str(tmp_path / "out"))
    assert set(rows_of(out)["scene_id"]) == {"s0", "s2"}
    (told,) = [record.getMessage() for record in caplog.records if "no valid pixel" in record.getMessage()]
    assert told.startswith(f"tile: {tmp_path}/scenes/s1.tif: band B11 has no valid pixel")
    assert read_dataset(out)["dropped"]["without a valid pixel"] > 0
    without(0, 2)
    says = r"no training tile is left: \S*s0\.tif: band B11 has no valid pixel .*--bands.*\(3 of 3 scenes are so\)"
    with pytest.raises(UsageError, match=says):
        tile(spark, **given, **options, out=str(tmp_path / "none"))
    tile(spark, **given, **options, bands="B02,B03", out=str(tmp_path / "two"))


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("l.kml", b"<?xml version='1.0'?><kml/>", "is neither GeoTIFF, COG nor JPEG 2000; it is text; shapes (KML"),
        ("l.zip", b"PK\3\4and more of it", "is neither GeoTIFF, COG nor JPEG 2000; it is a ZIP archive: unpack it"),
        ("l.tif", b"", "the file is empty"),
    ],
)
def test_labels_that_cannot_be_read_are_blamed_themselves(spark, tmp_path, name, content, says):
    url = write_scene(tmp_path / "s.tif", position_image(50, 70, 2))
    (tmp_path / name).write_bytes(content)
    (tmp_path / "pairs.csv").write_text(f"scene,labels\n{url},{name}\n")
    with pytest.raises(TooManyRefused, match="1 of 1"):
        tile(
            spark, pairs=str(tmp_path / "pairs.csv"), out=str(tmp_path / "out"), size=32, split="scene",
            fractions="1,0,0", buffer=0,
        )  # fmt: skip
    (row,) = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    assert row["reason"].startswith(f"labels {tmp_path}/{name}: {says}")


def few_shapes(folder: Path) -> dict:
    """Two overlapping scenes, 600 x 560 and 220 x 190 px, and squares of 9 px: kind 0 has one, kind 1 two, the others
    three each; a bar of 60 px, with a square beside it, is of kind 3, too."""
    import geopandas

    write_scene(folder / "scenes" / "a.tif", position_image(600, 560, 2), names=("x", "y"))
    write_scene(
        folder / "scenes" / "b.tif", position_image(220, 190, 2), names=("x", "y"), west=600_930, north=4_999_510
    )
    kinds, shapes = [], []
    for number, (top, left) in enumerate(itertools.product((20, 200, 380), (20, 200, 380))):
        kinds.append(f"kind {[0, 1, 2, 3, 1, 2, 3, 2, 3][number]}")
        shapes.append(square(top, left, 9))
    kinds += ["kind 3", "kind 3"]
    shapes += [shapely.box(*square(540, 100, 9).bounds[:2], *square(540, 151, 9).bounds[2:]), square(527, 165, 6)]
    geopandas.GeoDataFrame({"kind": kinds}, geometry=shapes, crs=32632).to_file(folder / "l.gpkg")
    return {"scenes": [str(folder / "scenes")], "labels": str(folder / "l.gpkg"), "attribute": "kind"}


def square(top: float, left: float, edge: float) -> shapely.Polygon:
    west, north = 600_000 + 10 * left, 5_000_000 - 10 * top
    return shapely.box(west, north - 10 * edge, west + 10 * edge, north)


def test_windows_lie_around_few_shapes(spark, tmp_path, caplog):
    given = few_shapes(tmp_path)
    with caplog.at_level("INFO", "sattile"):
        out = tile(spark, **given, out=str(tmp_path / "out"))
    description, rows = read_dataset(out), rows_of(out)
    assert description["windows"]["shapes"] == 11
    # The bar and the square beside it are one place, as is each other square.
    assert description["windows"]["groups"] == 10
    assert description["split_rule"]["by"] == "shapes"
    size = description["size"]
    assert size == description["stride"] == description["split_rule"]["buffer"] == 64
    assert f"windows of {size} px around 11 shapes in 10 groups that lie apart, buffer {size} px" in caplog.text
    # Each labelled pixel of each scene once, as the whole scene has it.
    import geopandas

    frame = geopandas.read_file(given["labels"])
    drawn = [(one, int(kind[-1])) for one, kind in zip(frame.geometry, frame.kind, strict=True)]
    for name in ("a", "b"):
        with rasterio.open(tmp_path / "scenes" / f"{name}.tif") as file:
            whole = rasterio.features.rasterize(drawn, file.shape, 255, transform=file.transform, dtype=np.uint8)
            image = np.moveaxis(file.read(), 0, -1)
        found, times = np.full((700, 700), 255, np.uint8), np.zeros((700, 700), int)
        for row in rows[rows["scene_id"] == name].itertuples():
            where = slice(row.row, row.row + size), slice(row.col, row.col + size)
            found[where] = np.minimum(found[where], row.labels)
            times[where] += 1
            inside = image[where]
            assert (row.image[: inside.shape[0], : inside.shape[1]] == inside).all()
        assert times.max() == 1
        assert (found[: whole.shape[0], : whole.shape[1]] == whole).all()
    # Each class where it can be, and what can't be is told.
    parts = {
        class_id: [name for name in ("train", "val", "test") if description["splits"][name]["class_pixels"][class_id]]
        for class_id in "0123"
    }
    assert parts == {"0": ["train"], "1": ["train", "val"]} | {key: ["train", "val", "test"] for key in "23"}
    assert "class kind 0 has 1 shape: it is in training alone, and no recall can be told for it" in caplog.text
    assert "class kind 1 has 2 shapes: none is left for test" in caplog.text
    # Law 7, in pixels of 10 m.
    shift = rows["scene_id"].map({"a": 0, "b": 1})
    top, left = rows["row"] + 49 * shift, rows["col"] + 93 * shift
    boxes = shapely.box(left, top, left + size, top + size)
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        first, second = (shapely.union_all(boxes[rows["split"] == name]) for name in (one, other))
        assert shapely.distance(first, second) >= size - 1


def test_tiles_around_shapes_are_the_same_for_any_order_and_are_not_cut_again(spark, tmp_path):
    given = few_shapes(tmp_path)
    out = tile(spark, **given, out=str(tmp_path / "out"))
    again = tile(
        spark, **given | {"scenes": [str(tmp_path / "scenes" / f"{one}.tif") for one in "ba"]}, out=str(tmp_path / "o")
    )
    assert read_dataset(again)["digest"] == read_dataset(out)["digest"]
    before = {entry.url: (entry.size, entry.mtime) for entry in storage.walk(out)}
    tile(spark, **given, out=out)
    assert before == {entry.url: (entry.size, entry.mtime) for entry in storage.walk(out)}
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["skipped"] == 2


def test_the_size_of_windows_by_hand_is_kept_and_a_grid_is_what_it_was(spark, tmp_path):
    given = few_shapes(tmp_path)
    chosen = read_dataset(tile(spark, **given, out=str(tmp_path / "s"), size=16, buffer=20))
    assert (chosen["size"], chosen["split_rule"]["by"], chosen["split_rule"]["buffer"]) == (16, "shapes", 20)
    plain = read_dataset(tile(spark, **given, out=str(tmp_path / "g"), windows="grid"))
    assert (plain["size"], plain["split_rule"]["by"]) == (256, "block")
    assert "windows" not in plain
    # Who asks for other splits, other strides or no validation at all gets them.
    for number, options in enumerate(
        ({"split": "scene"}, {"size": 32, "stride": 16, "buffer": 0, "cell": 2}, {"fractions": "1,0,0"})
    ):
        assert "windows" not in read_dataset(tile(spark, **given, out=str(tmp_path / str(number)), **options))


def test_tiles_of_before_are_taken_up_but_for_those_that_would_differ(spark, tmp_path, monkeypatch):
    """As they were made before there were windows around shapes: the same settings, the same state."""
    rasters = archive(tmp_path / "r", count=2)
    options = {"classes": "even,odd", "out": str(tmp_path / "r" / "out")}
    tile(spark, **rasters, **options)
    written = json.loads((tmp_path / "r" / "out" / "_run.json").read_text())["settings"]
    assert written == {
        "size": 256, "stride": 256, "bands": None, "pattern": None, "nodata": None, "values": "raw",
        "classes": "even,odd", "attribute": None, "ignore": [], "background": None, "aoi": None, "split": "auto",
        "fractions": [0.7, 0.15, 0.15], "cell": 6, "buffer": 256, "min_valid": 0.0, "min_labelled": 0.0,
        "keep_background": 1.0, "seed": 0,
    }  # fmt: skip
    description = read_dataset(options["out"])
    sources = [
        {name: one[name] for name in ("scene_id", "url", "identity", "labels")} for one in description["sources"]
    ]
    assert description["state"] == storage.digest([sources, {}, "None"])

    given = few_shapes(tmp_path)
    out = str(tmp_path / "out")
    monkeypatch.setattr("sattile.shape_windows.are_few", lambda *_: False)
    tile(spark, **given, out=out)
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["settings"] == written | {
        "classes": None,
        "attribute": "kind",
    }
    tile(spark, **given, out=out)
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["skipped"] == 2
    monkeypatch.undo()
    tile(spark, **given, out=out)
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["done"] == 2
    assert read_dataset(out)["windows"]["shapes"] == 11


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"background": "kind 1"}, "--background labels whole scenes"),
        ({"stride": 16, "size": 32}, "--stride 16 is for a grid"),
        ({"split": "block"}, "--split block deals ground or scenes"),
        ({"windows": "squares"}, "windows 'squares': use grid, shapes or auto"),
    ],
)
def test_windows_around_shapes_that_cannot_be_are_refused(spark, tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        tile(spark, **few_shapes(tmp_path), out=str(tmp_path / "out"), **({"windows": "shapes"} | options))


def test_windows_around_the_shapes_of_rasters_are_refused(spark, tmp_path):
    with pytest.raises(UsageError, match="windows around shapes: the labels are rasters; give vectors"):
        tile(spark, **archive(tmp_path, count=1), out=str(tmp_path / "out"), windows="shapes")


def beside_a_swath(folder: Path) -> dict:
    """A scene of 500 x 560 px whose upper 150 rows are missing: 12 squares lie there, 3 of each class below."""
    import geopandas

    image = position_image(500, 560, 2) + 1
    image[:, :150] = 0
    write_scene(folder / "scenes" / "a.tif", image, names=("x", "y"), nodata=0)
    places = [*itertools.product((10, 100), range(20, 560, 90)), *itertools.product((280, 420), (50, 200, 350))]
    kinds = [f"kind {number % 2}" for number in range(12)] + ["kind 0"] * 3 + ["kind 1"] * 3
    shapes = [square(top, left, 9) for top, left in places]
    geopandas.GeoDataFrame({"kind": kinds}, geometry=shapes, crs=32632).to_file(folder / "l.gpkg")
    return {"scenes": [str(folder / "scenes")], "labels": str(folder / "l.gpkg"), "attribute": "kind"}


@pytest.mark.parametrize("seed", range(3))
def test_shapes_on_missing_values_are_not_dealt(spark, tmp_path, caplog, seed):
    description = read_dataset(tile(spark, **beside_a_swath(tmp_path), out=str(tmp_path / "out"), seed=seed))
    assert description["windows"]["shapes"] == description["windows"]["groups"] == 6
    for name in ("train", "val", "test"):
        assert description["splits"][name]["class_pixels"] == {"0": 81, "1": 81}
    assert "12 of 18 shapes show no valid pixel" in caplog.text


def test_a_shape_hidden_by_later_ones_is_none(spark, tmp_path, caplog):
    """One of the two squares of kind 1 lies under a later one of kind 2, one of kind 3 under one of its own kind."""
    import geopandas

    given = few_shapes(tmp_path)
    later = geopandas.GeoDataFrame(
        {"kind": ["kind 2", "kind 3"]}, geometry=[square(19, 199, 11), square(199, 19, 11)], crs=32632
    )
    pandas.concat([geopandas.read_file(given["labels"]), later]).to_file(given["labels"])
    windows = read_dataset(tile(spark, **given, out=str(tmp_path / "out")))["windows"]
    assert "2 of 13 shapes show no valid pixel" in caplog.text
    assert {key: one["shapes"] for key, one in windows["classes"].items()} == {"0": 1, "1": 1, "2": 4, "3": 5}
    assert [windows["classes"]["1"][name] for name in ("train", "val", "test")] == [1, 0, 0]


def test_shapes_of_a_scene_that_cannot_be_read_are_not_dealt(spark, tmp_path):
    given = beside_a_swath(tmp_path)
    other = tmp_path / "scenes" / "b.tif"
    write_scene(
        other, position_image(400, 400, 2), names=("x", "y"), nodata=0, west=604_000, north=4_995_000,
        compress="deflate",
    )  # fmt: skip
    import geopandas

    frame = geopandas.read_file(given["labels"])
    more = [square(500 + top, 400 + left, 9) for top, left in itertools.product((20, 200), (20, 200))]
    more = geopandas.GeoDataFrame({"kind": ["kind 0", "kind 1"] * 2}, geometry=more, crs=32632)
    pandas.concat([frame, more]).to_file(given["labels"])
    content = bytearray(other.read_bytes())
    content[len(content) // 4 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 4)
    other.write_bytes(content)
    description = read_dataset(tile(spark, **given, out=str(tmp_path / "out"), max_failed_fraction=0.5))
    (row,) = pq.read_table(tmp_path / "out" / "_quarantine.parquet").to_pylist()
    assert row["url"].endswith("b.tif")
    assert description["windows"]["shapes"] == 6
    assert [one["scene_id"] for one in description["sources"]] == ["a"]
    assert [one["url"] for one in description["refused"]] == [row["url"]]


BY_HAND = ({}, {"stride": 256}, {"size": 256}, {"buffer": 256})


def test_what_is_asked_by_hand_is_not_what_it_comes_to_without(spark, tmp_path):
    """256 is what the settings say of a size, stride and buffer that nobody asked for."""
    given = few_shapes(tmp_path)
    for number, made in enumerate(BY_HAND):
        out = str(tmp_path / str(number))
        description = read_dataset(tile(spark, **given, out=out, **made))
        for asked in BY_HAND:
            before = {entry.url: (entry.size, entry.mtime) for entry in storage.walk(out)}
            if asked == made:
                tile(spark, **given, out=out, **asked)
            else:
                with pytest.raises(UsageError, match=r"was made with other settings .*--overwrite to replace it"):
                    tile(spark, **given, out=out, **asked)
            assert before == {entry.url: (entry.size, entry.mtime) for entry in storage.walk(out)}, (made, asked)
        other = BY_HAND[(number + 1) % 4]
        replaced = read_dataset(tile(spark, **given, out=out, **other, overwrite=True))
        assert replaced["digest"] != description["digest"], (made, other)
        tile(spark, **given, out=out, **other)
        assert json.loads((tmp_path / str(number) / "_run.json").read_text())["skipped"] == 2


@pytest.mark.parametrize(
    ("options", "missing", "says"),
    [
        ({"min_labelled": 0.5}, False, "too few labelled pixels.: --min-labelled 0.5 leaves none; ask for less"),
        ({"keep_background": 0, "min_labelled": 0.5}, False, "pixels.: --min-labelled 0.5 leaves none"),
        ({"min_valid": 0.5}, True, "no shape holds a valid pixel; look at --nodata"),
        ({}, True, "no shape holds a valid pixel; look at --nodata"),
    ],
)
def test_what_left_no_window_is_named(spark, tmp_path, options, missing, says):
    import geopandas

    given = beside_a_swath(tmp_path)
    if missing:
        geopandas.read_file(given["labels"])[:12].to_file(given["labels"])
    with pytest.raises(UsageError, match=says):
        tile(spark, **given, out=str(tmp_path / "out"), windows="shapes", **options)


def test_a_band_that_is_missing_where_shapes_lie_is_named(spark, tmp_path, caplog):
    given = few_shapes(tmp_path)
    image = position_image(220, 190, 2)
    image[1] = 0
    write_scene(tmp_path / "scenes" / "b.tif", image, names=("x", "y"), west=600_930, north=4_999_510, nodata=0)
    tile(spark, **given, out=str(tmp_path / "out"))
    assert "b.tif: band y has no valid pixel" in caplog.text
