"""Label files as people have them, from file to tiles: each pixel has the class that its file says, or it is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from scenes_for_tests import position_image, write_scene

import sattile
from sattile.dataset import decode, read_dataset
from sattile.errors import TooManyRefused, UsageError
from sattile.record import read_quarantine
from sattile.schema import IGNORE

HEIGHT, WIDTH, SIZE = 64, 96, 32
WEST, NORTH = 600_000, 5_000_000
LEFT, RIGHT, BELOW = (0, 0, 48, 40), (48, 0, 96, 40), (0, 40, 96, 64)  # left, top, right, bottom in pixels
AREAS = (48 * 40, 48 * 40, 96 * 24)


@pytest.fixture
def scene(tmp_path: Path) -> str:
    return write_scene(tmp_path / "s.tif", position_image(HEIGHT, WIDTH, 2))


def box(left: int, top: int, right: int, bottom: int) -> shapely.Polygon:
    return shapely.box(WEST + 10 * left, NORTH - 10 * bottom, WEST + 10 * right, NORTH - 10 * top)


def shapes(path: Path, values: list[Any], crs: str | None = "EPSG:32632", layer: str | None = None) -> str:
    frame = geopandas.GeoDataFrame({"code": values}, geometry=[box(*one) for one in (LEFT, RIGHT, BELOW)], crs=crs)
    frame.to_file(path, **({"layer": layer} if layer else {}))
    return str(path)


def raster(path: Path, values: list[Any], dtype: str = "uint8", **profile: Any) -> str:
    """Bands of labels, three areas each."""
    bands = values if isinstance(values[0], list) else [values]
    data = np.zeros((len(bands), HEIGHT, WIDTH), dtype)
    for band, three in zip(data, bands, strict=True):
        for (left, top, right, bottom), value in zip((LEFT, RIGHT, BELOW), three, strict=True):
            band[top:bottom, left:right] = value
    return write_scene(path, data, **profile)


def drawn(out: str) -> tuple[dict[str, list[Any]], np.ndarray]:
    """Classes by name as (id, value), and the scene's label ids, put together from its tiles."""
    import pyarrow.parquet as pq

    found = read_dataset(out)
    whole = np.full((HEIGHT, WIDTH), IGNORE, np.uint8)
    for split in ("train", "val", "test"):
        for name in found["splits"][split]["files"]:
            for row in pq.read_table(f"{out}/{split}/{name}", columns=["row", "col", "labels"]).to_pylist():
                ids = decode(row["labels"])
                part = whole[row["row"] : row["row"] + SIZE, row["col"] : row["col"] + SIZE]
                part[:] = ids[: part.shape[0], : part.shape[1]]
    return {one["name"]: [one["id"], one.get("value")] for one in found["classes"]}, whole


@pytest.fixture
def tiled(spark: Any, scene: str, tmp_path: Path) -> Any:
    def make(labels: str, **options: Any) -> tuple[dict[str, list[Any]], list[int]]:
        """Classes, and the id of each of the three areas; all of an area's pixels have it."""
        options = {"fractions": "1,0,0", "split": "block", "size": SIZE, "buffer": 0} | options
        out = sattile.tile(spark, scenes=[scene], labels=labels, out=str(tmp_path / "tiles"), **options)
        classes, ids = drawn(out)
        areas = [np.unique(ids[top:bottom, left:right]) for left, top, right, bottom in (LEFT, RIGHT, BELOW)]
        assert [len(one) for one in areas] == [1, 1, 1]
        return classes, [int(one[0]) for one in areas]

    return make


@pytest.mark.parametrize(
    ("values", "classes", "ids"),
    [
        ([1, 2, 255], {"class_255": [0, 255], "class_1": [1, None], "class_2": [2, None]}, [1, 2, 0]),
        (["1", "2", "urban"], {"urban": [0, "urban"], "class_1": [1, None], "class_2": [2, None]}, [1, 2, 0]),
        (["b", "a", "b "], {"a": [0, None], "b": [1, None]}, [1, 0, 1]),
        ([2.5, -1.0, 3.0], {"class_-1": [0, -1], "class_2.5": [1, 2.5], "class_3": [3, None]}, [1, 0, 3]),
        ([1000, 7, 111], {"class_1000": [0, 1000], "class_7": [7, None], "class_111": [111, None]}, [0, 7, 111]),
    ],
)
def test_each_value_of_an_attribute_is_a_class_of_its_own(tiled, tmp_path, values, classes, ids):
    assert tiled(shapes(tmp_path / "v.gpkg", values), attribute="code") == (classes, ids)


def test_numbers_of_a_raster_that_are_no_ids_get_free_ones(tiled, tmp_path):
    """The same in all files, be their ids of bytes or not."""
    url = raster(tmp_path / "l.tif", [-1, 2, 1000], "int16")
    assert tiled(url) == ({"class_-1": [0, -1], "class_1000": [1, 1000], "class_2": [2, None]}, [0, 2, 1])
    url = raster(tmp_path / "f.tif", [2.5, 0, -9999], "float32", nodata=-9999)
    assert tiled(url, overwrite=True) == ({"class_0": [0, None], "class_2.5": [1, 2.5]}, [1, 0, IGNORE])


@pytest.mark.parametrize("kind", ["raster", "vector"])
def test_what_is_to_be_ignored_is_unlabelled(tiled, tmp_path, kind):
    url = raster(tmp_path / "l.tif", [1, 2, 99]) if kind == "raster" else shapes(tmp_path / "v.gpkg", [1, 2, 99])
    attribute = None if kind == "raster" else "code"
    classes, ids = tiled(url, attribute=attribute, ignore="99")
    assert classes == {"class_1": [1, None], "class_2": [2, None]}
    assert ids == [1, 2, IGNORE]
    with pytest.raises(UsageError, match="99 is a class and to be ignored"):
        tiled(url, attribute=attribute, ignore="99", classes="a=99,b=1,c=2", overwrite=True)


def test_a_shape_to_be_ignored_takes_labels_and_background_away(spark, scene, tmp_path):
    frame = geopandas.GeoDataFrame(
        {"code": ["field", "cloud"]}, geometry=[box(0, 0, 48, 64), box(40, 0, 60, 64)], crs="EPSG:32632"
    )
    frame.to_file(tmp_path / "v.gpkg")
    out = sattile.tile(
        spark, scenes=[scene], labels=str(tmp_path / "v.gpkg"), out=str(tmp_path / "tiles"), size=SIZE, buffer=0,
        attribute="code", ignore="cloud", classes="other,field", background="other", fractions="1,0,0",
    )  # fmt: skip
    _, ids = drawn(out)
    assert (ids[:, :40] == 1).all()
    assert (ids[:, 40:60] == IGNORE).all()
    assert (ids[:, 60:] == 0).all()


@pytest.mark.parametrize("kind", ["raster", "vector"])
def test_named_values_and_what_they_leave_out(tiled, tmp_path, kind):
    url = raster(tmp_path / "l.tif", [1, 2, 3]) if kind == "raster" else shapes(tmp_path / "v.gpkg", [1, 2, 3])
    attribute = None if kind == "raster" else "code"
    error = UsageError if kind == "vector" else TooManyRefused
    with pytest.raises(error) as told:
        tiled(url, attribute=attribute, classes="water,land,wood")
    if kind == "vector":
        assert "3 (1 of 3 shapes)" in str(told.value)
        assert "--classes water=1,land=2,wood=3" in str(told.value)
    else:
        (row,) = read_quarantine(str(tmp_path / "tiles"))
        assert "hold value 3, which is no class (water=0, land=1, wood=2)" in row.reason
        assert "--ignore 3" in row.reason
    classes, ids = tiled(url, attribute=attribute, classes="water=1,land=2,wood=3", overwrite=True)
    assert classes == {"water": [1, None], "land": [2, None], "wood": [3, None]}
    assert ids == [1, 2, 3]


def test_a_layer_is_chosen_and_not_guessed(tiled, tmp_path):
    path = tmp_path / "v.gpkg"
    shapes(path, ["x", "x", "y"], layer="districts")
    shapes(path, ["a", "b", "a"], layer="land cover")
    with pytest.raises(UsageError, match=f"several layers: districts, land cover; name one: {path}:"):
        tiled(str(path), attribute="code")
    assert tiled(f"{path}:land cover", attribute="code") == ({"a": [0, None], "b": [1, None]}, [0, 1, 0])
    with pytest.raises(UsageError, match="'roads' is none of its layers; there are districts, land cover"):
        tiled(f"{path}:roads", attribute="code", overwrite=True)
    with pytest.raises(UsageError, match="several layers"):
        tiled(f"{path}:land cover", attribute="code", aoi=str(path), overwrite=True)
    # Another layer of the same file is other labels, also for a run with the same settings.
    assert tiled(f"{path}:districts", attribute="code") == ({"x": [0, None], "y": [1, None]}, [0, 0, 1])


@pytest.mark.parametrize("name", ["a:b", "x/y", "a: b/c"])
def test_layers_may_have_any_name(tiled, tmp_path, name):
    path = tmp_path / "v.gpkg"
    shapes(path, ["x", "x", "y"], layer="districts")
    shapes(path, ["a", "b", "a"], layer=name)
    assert tiled(f"{path}:{name}", attribute="code")[1] == [0, 1, 0]


def test_rasters_and_vectors_of_an_archive_have_one_legend(spark, tmp_path):
    """What is a number in one file and a text in another stays apart."""
    (tmp_path / "labels").mkdir()
    for number, name in enumerate(("r", "v")):
        write_scene(tmp_path / "scenes" / f"{name}.tif", position_image(HEIGHT, WIDTH, 2), west=WEST + 40_000 * number)
    raster(tmp_path / "labels" / "r.tif", [0, 1, 300], "int16")
    frame = geopandas.GeoDataFrame({"code": ["urban", "7"]}, geometry=[box(*LEFT), box(*RIGHT)], crs="EPSG:32632")
    frame.geometry = frame.translate(40_000)
    frame.to_file(tmp_path / "labels" / "v.gpkg")
    out = sattile.tile(
        spark, scenes=[str(tmp_path / "scenes")], labels=str(tmp_path / "labels"), attribute="code", size=SIZE,
        buffer=0, out=str(tmp_path / "out"), fractions="1,0,0", split="block",
    )  # fmt: skip
    found = {one["name"]: one["id"] for one in read_dataset(out)["classes"]}
    assert found == {"class_0": 0, "class_1": 1, "class_300": 2, "urban": 3, "class_7": 7}
    pixels = {name: sum(part["class_pixels"][str(one)] for part in read_dataset(out)["splits"].values())
              for name, one in found.items()}  # fmt: skip
    assert pixels == {
        "class_0": AREAS[0],
        "class_1": AREAS[1],
        "class_300": AREAS[2],
        "urban": AREAS[0],
        "class_7": AREAS[1],
    }


def test_without_an_attribute_it_is_told_what_shapes_are(tiled, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "sattile")
    assert tiled(shapes(tmp_path / "v.gpkg", ["a", "b", "c"]), classes="land,water", ignore="b")[1] == [1, 1, 1]
    assert "all shapes are taken for class water, and --ignore b has no part in it" in caplog.text


def test_layers_without_shapes_do_not_count(tiled, tmp_path):
    path = tmp_path / "v.gpkg"
    shapes(path, ["a", "b", "a"])
    import pandas
    import pyogrio

    pyogrio.write_dataframe(pandas.DataFrame({"style": ["x"]}), path, layer="layer_styles", append=True)
    assert tiled(str(path), attribute="code")[1] == [0, 1, 0]


def test_a_band_is_chosen_and_not_guessed(tiled, tmp_path):
    url = raster(tmp_path / "l.tif", [[1, 2, 3], [4, 5, 6]], names=("dates", "cover"))
    with pytest.raises(TooManyRefused):
        tiled(url)
    (row,) = read_quarantine(str(tmp_path / "tiles"))
    assert f"{url} have 2 bands: 1 (dates), 2 (cover)" in row.reason
    assert f"{url}:1" in row.reason
    assert tiled(f"{url}:2")[1] == [4, 5, 6]
    assert tiled(f"{url}:dates")[1] == [1, 2, 3]
    (tmp_path / "folder").mkdir()
    (tmp_path / "l.tif").rename(tmp_path / "folder" / "s.tif")
    assert tiled(f"{tmp_path / 'folder'}:cover")[1] == [4, 5, 6]


def test_colour_masks_and_bands_for_classes_by_an_option(tiled, tmp_path):
    # 0 is nodata, and a part of the colours.
    url = raster(tmp_path / "l.tif", [[0, 0, 9], [0, 200, 9], [255, 0, 9]], nodata=0, photometric="rgb")
    classes, ids = tiled(url, label_encoding="rgb", classes="water=4=#0000ff,land=2=#00c800", ignore="#090909")
    assert (classes, ids) == ({"land": [2, None], "water": [4, None]}, [4, 2, IGNORE])
    url = raster(tmp_path / "h.tif", [[0, 1, 0], [1, 0, 0]])
    assert tiled(url, label_encoding="one-hot", classes="a,b", overwrite=True)[1] == [1, 0, IGNORE]
    with pytest.raises(UsageError, match="needs the colour of each class"):
        tiled(url, label_encoding="rgb", overwrite=True)
    with pytest.raises(UsageError, match="needs the colour of each class"):
        tiled(url, label_encoding="rgb", classes="a=#010000,b", overwrite=True)
    with pytest.raises(UsageError, match="two classes have the same colour"):
        tiled(url, label_encoding="rgb", classes="a=#01000a,b=#01000A", overwrite=True)
    with pytest.raises(UsageError, match=r"made with other settings .*label_encoding"):
        tiled(url, classes="a,b")
    with pytest.raises(UsageError, match="use index, rgb, one-hot"):
        tiled(url, label_encoding="color", overwrite=True)


@pytest.mark.parametrize("named", [None, "land,water"])
def test_nothing_but_0_and_255_is_questioned(tiled, tmp_path, named):
    url = raster(tmp_path / "l.tif", [0, 255, 255])
    with pytest.raises(UsageError, match=r"--classes land=0,water=255; unlabelled: --ignore 255"):
        tiled(url, classes=named)
    assert tiled(url, classes="land=0,water=255", overwrite=True) == (
        {"land": [0, None], "water": [1, 255]}, [0, 1, 1],
    )  # fmt: skip
    assert tiled(url, ignore="255", classes=named, overwrite=True)[1] == [0, IGNORE, IGNORE]
    url = raster(tmp_path / "n.tif", [0, 255, 255], nodata=255)
    assert tiled(url, classes=named, overwrite=True)[1] == [0, IGNORE, IGNORE]


def test_255_among_other_values_is_unlabelled_and_told(tiled, tmp_path, caplog):
    caplog.set_level(logging.WARNING, "sattile")
    assert tiled(raster(tmp_path / "l.tif", [0, 1, 255])) == (
        {"class_0": [0, None], "class_1": [1, None]}, [0, 1, IGNORE],
    )  # fmt: skip
    assert "37.5 % of the label pixels are 255" in caplog.text  # 24 of 64 rows
    caplog.clear()
    tiled(str(tmp_path / "l.tif"), ignore="255", overwrite=True)
    assert "255" not in caplog.text


def test_coordinates_that_cannot_be_are_questioned(tiled, tmp_path):
    (tmp_path / "m.geojson").write_text(shapes_json([box(*LEFT)]))
    with pytest.raises(UsageError, match=r"no degrees \(x from 600000 to 600480.*-a_srs EPSG:N"):
        tiled(str(tmp_path / "m.geojson"), classes="a")
    degrees = geopandas.GeoSeries([box(*LEFT)], crs="EPSG:32632").to_crs(4326)
    turned = shapely.transform(degrees.iloc[0], lambda at: at[:, ::-1])
    (tmp_path / "t.geojson").write_text(shapes_json([turned]))
    with pytest.raises(TooManyRefused):
        tiled(str(tmp_path / "t.geojson"), classes="a")
    (row,) = read_quarantine(str(tmp_path / "tiles"))
    assert "with x and y swapped they would" in row.reason
    far = shapely.transform(degrees.iloc[0], lambda at: at[:, ::-1] + [0, 100])
    (tmp_path / "far.geojson").write_text(shapes_json([far]))
    with pytest.raises(UsageError, match="look swapped"):
        tiled(str(tmp_path / "far.geojson"), classes="a", overwrite=True)


def shapes_json(found: list[Any]) -> str:
    features = ",".join(
        f'{{"type": "Feature", "properties": {{}}, "geometry": {shapely.to_geojson(one)}}}' for one in found
    )
    return f'{{"type": "FeatureCollection", "features": [{features}]}}'


def test_tiles_of_labels_that_were_read_wrongly_are_made_anew_and_no_others(spark, scene, tmp_path):
    """Datasets of before say nothing of the rules that they were made by."""
    from sattile import storage

    same = {"scenes": [scene], "size": SIZE, "buffer": 0, "fractions": "1,0,0", "split": "block"}

    def aged(labels: str, **options: Any) -> bool:
        """Whether a dataset that the first rules made is taken up."""
        out = str(tmp_path / f"of-{Path(labels).stem}")
        sattile.tile(spark, labels=labels, out=out, **same, **options)
        for _ in range(2):
            description = storage.read_json(f"{out}/dataset.json")
            description.pop("label_rules", None)
            storage.write_json(f"{out}/dataset.json", description)
            before = Path(f"{out}/dataset.json").stat().st_mtime_ns
            sattile.tile(spark, labels=labels, out=out, **same, **options)
            taken = Path(f"{out}/dataset.json").stat().st_mtime_ns == before
        made = Path(f"{out}/dataset.json").stat().st_mtime_ns
        sattile.tile(spark, labels=labels, out=out, **same, **options)
        assert Path(f"{out}/dataset.json").stat().st_mtime_ns == made  # once is enough
        return taken

    assert aged(raster(tmp_path / "bytes.tif", [0, 1, 255]))
    assert aged(shapes(tmp_path / "texts.gpkg", ["a", "b", "b"]), attribute="code")
    assert aged(shapes(tmp_path / "ids.gpkg", [3, 0, 7]), attribute="code")
    assert not aged(shapes(tmp_path / "mixed.gpkg", ["1", "2", "urban"]), attribute="code")
    assert not aged(shapes(tmp_path / "large.gpkg", [1, 2, 255]), attribute="code")
    assert not aged(shapes(tmp_path / "ignored.gpkg", [1, 2, 99]), attribute="code", ignore="99")
