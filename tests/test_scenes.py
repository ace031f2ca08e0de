"""What a user names becomes scenes, the same ones whatever the order, or a reason why not."""

from __future__ import annotations

import ast
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from sattile import raster, record, scenes
from sattile.errors import Refused, TooManyRefused, UsageError
from sattile.grid import Window
from sattile.schema import Scene

BEAUFORT = "2018-10-13, Sentinel-2B L1C"


@pytest.fixture(autouse=True)
def _closed_files():
    yield
    raster.close_files()


def tiff(
    path: Path, *, height=12, width=20, count=1, resolution=10.0, value=1, dtype="uint16", names=None, crs="EPSG:32618",
    origin=(500_000, 5_000_000), **profile,
) -> str:  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        PurePosixPath(path), "w", driver="GTiff", height=height, width=width, count=count, dtype=dtype, crs=crs,
        transform=from_origin(*origin, resolution, resolution), **profile,
    ) as out:  # fmt: skip
        out.write(np.arange(value, value + count, dtype=dtype)[:, None, None] * np.ones((1, height, width), dtype))
        if names:
            out.descriptions = names
    return str(path)


def found(arguments, **options) -> list[tuple[str, str]]:
    return [(one.scene_id, one.url) for one in scenes.find(arguments, **options)]


def described(arguments, *, nodata=None, bands=None, pattern=None):
    """Scenes and refusals, without Spark."""
    good, bad = [], {}
    for one in scenes.find(arguments, bands=bands, pattern=pattern):
        try:
            good.append(scenes.describe(one, raster.describe_file, bands=bands, nodata=nodata))
        except Refused as error:
            bad[one.url] = error.reason
    return good, bad


def one_of(arguments, **options):
    good, bad = described(arguments, **options)
    assert not bad
    (scene,) = good
    return scene


# ---------------------------------------------------------------- finding


def test_a_folder_gives_images_of_any_case_below_it_and_no_sidecars(tmp_path):
    names = ("a.tif", "b.TIFF", "deep/er/c.JP2", "x y, z.tif")
    others = ("a.tif.msk", "a.tif.ovr", "a.tif.aux.xml", ".hidden.tif", "_part/d.tif", "e.txt", "f.tfw", ".g/h.tif")
    for name in names + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert found(str(tmp_path)) == [
        ("a", f"{tmp_path}/a.tif"), ("b", f"{tmp_path}/b.TIFF"), ("c", f"{tmp_path}/deep/er/c.JP2"),
        ("x y, z", f"{tmp_path}/x y, z.tif"),
    ]  # fmt: skip
    assert found(f"{tmp_path}/a*") == [("a", f"{tmp_path}/a.tif")]
    assert len(found(f"{tmp_path}/**/*.JP2")) == 1
    assert len(found([f"{tmp_path}/a.tif", str(tmp_path), f"{tmp_path}/./a.tif", f"{tmp_path}/*.tif"])) == 4


def test_what_is_not_there_is_wrong_usage(tmp_path):
    (tmp_path / "empty").mkdir()
    for argument in ("nowhere.tif", "no*.tif", "empty", "nowhere/"):
        with pytest.raises(UsageError, match=r"nowhere|no\*|empty"):
            scenes.find(f"{tmp_path}/{argument}")
    with pytest.raises(UsageError, match="no scenes named"):
        scenes.find([])
    with pytest.raises(UsageError, match="twice"):
        scenes.find(str(tmp_path), bands=["a", "a"])
    with pytest.raises(UsageError, match="storage for s3"):
        scenes.find("s3://bucket/a.tif")


def test_a_name_with_wildcards_is_taken_as_it_is(tmp_path):
    tiff(tmp_path / "[1]*.tif")
    tiff(tmp_path / "1.tif")
    assert found(f"{tmp_path}/[1]*.tif") == [("[1]*", f"{tmp_path}/[1]*.tif")]


@pytest.mark.parametrize(
    ("name", "scene_id"),
    [("a.b.tif", "a.b"), ("T18:SUV.tif", "T18_SUV"), (" a, b .tiff", " a, b "), ("...tif", "__"), ("é.tif", "é")],
)
def test_scene_ids_are_stems_that_are_folders_names(tmp_path, name, scene_id):
    (tmp_path / name).touch()
    assert [one for one, _ in found(f"{tmp_path}/{name}")] == [scene_id]


def test_equal_ids_each_get_a_digest_of_their_url(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.tif").touch()
    (tmp_path / "b.tif").touch()
    digests = [hashlib.sha256(f"{tmp_path}/{folder}/a.tif".encode()).hexdigest()[:8] for folder in "xy"]
    assert {one for one, _ in found(str(tmp_path))} == {"b", *(f"a-{digest}" for digest in digests)}


def test_order_of_arguments_does_not_matter(tmp_path):
    for name in ("x/a.tif", "y/a.tif", "c.tif"):
        tiff(tmp_path / name)
    arguments = [f"{tmp_path}/x", f"{tmp_path}/y/../y/a.tif", f"{tmp_path}/y/a.tif", f"{tmp_path}/*.tif"]
    ways = {repr(scenes.find(list(order))) for order in itertools.permutations(arguments)}
    assert len(ways) == 1


def test_a_name_that_is_no_text_is_refused_alone(tmp_path):
    tiff(tmp_path / "good.tif")
    with open(os.fsencode(tmp_path) + b"/b\xe9.tif", "wb"):
        pass
    good, bad = described(str(tmp_path))
    assert [scene.scene_id for scene in good] == ["good"]
    ((url, reason),) = bad.items()
    assert url.endswith("b\\xe9.tif")
    assert "UTF-8" in reason


# ---------------------------------------------------------------- patterns


def test_band_files_by_pattern(tmp_path):
    for band in ("B01", "B02", "B8A"):
        tiff(tmp_path / f"{BEAUFORT}, {band}.tiff")
    pattern = "{scene}, {band}.tiff"
    scene = one_of(str(tmp_path), pattern=pattern)
    assert scene.scene_id == BEAUFORT
    assert scene.url == f"{tmp_path}/{BEAUFORT}, {{band}}.tiff"
    assert scene.band_names == ("B01", "B02", "B8A")
    assert one_of(str(tmp_path), pattern=pattern, bands=["B8A", "B01"]).band_names == ("B8A", "B01")
    assert one_of(f"{tmp_path}/*", pattern=pattern, bands=["B02"]).band_names == ("B02",)


def test_bands_called_otherwise_are_found_in_files_items_and_catalogues(spark, tmp_path):
    """However a scene comes, it is the same pixels under the names asked for."""
    own, wanted = ("B02", "B08", "B11", "B12"), ["swir1", "nir", "blue"]
    for at, band in enumerate(own):
        tiff(tmp_path / "apart" / f"s_{band}.tif", value=10 + at)
    tiff(tmp_path / "one" / "s.tif", count=4, names=own, value=10)
    assets = {band: {"href": f"apart/s_{band}.tif", "type": TIFF_TYPE, "roles": ["data"]} for band in own}
    stac = item(tmp_path / "s.json", assets)
    pattern = "{scene}_{band}.tif"
    scenes.index(spark, str(tmp_path / "apart"), out=str(tmp_path / "catalog"), pattern=pattern)
    (listed,) = scenes.resolve(spark, str(tmp_path / "catalog"), bands=wanted).scenes
    for scene in (
        one_of(str(tmp_path / "apart"), pattern=pattern, bands=wanted),
        one_of(str(tmp_path / "one" / "s.tif"), bands=wanted),
        one_of(stac, bands=wanted),
        listed,
    ):
        assert [name for name in scene.band_names if name in wanted] == wanted
        data, _ = raster.read(scene.select(wanted), Window(0, 0, 12, 20))
        assert (data == [12, 11, 10]).all()
    # Said by hand, where numbers alone tell nothing: pixels are those of the files' own names, in the order given.
    rgb = tiff(tmp_path / "rgb" / "t.tif", count=3, names=("B02", "B03", "B04"), value=5)
    for band in ("B02", "B03", "B04"):
        tiff(tmp_path / "rgb apart" / f"t_{band}.tif", value=3 + int(band[1:]))
    asked = ["red=B04", "blue=B02"]
    for where, how in (([rgb], None), ([str(tmp_path / "rgb apart")], pattern)):
        (scene,) = scenes.resolve(spark, where, bands=asked, pattern=how).scenes
        assert scene.band_names == ("red", "blue")
        assert (raster.read(scene, Window(0, 0, 12, 20))[0] == [7, 5]).all()
    scenes.index(spark, rgb, out=str(tmp_path / "named"), bands=",".join(asked))
    (listed,) = scenes.resolve(spark, str(tmp_path / "named"), bands=["blue"]).scenes
    assert (raster.read(listed, Window(0, 0, 12, 20))[0] == 5).all()
    for wrong in (["red=B04", "red=B03"], ["=B04"], ["red="]):
        with pytest.raises(UsageError, match="write red, or red=B04"):
            scenes.resolve(spark, rgb, bands=wrong)
    for names in (own, ("blue", "nir", None, None)):  # never in file order where the file says what they are
        stack = tiff(tmp_path / "other.tif", count=4, names=names)
        _, bad = described(stack, bands=["nir", "red", "blue", "swir1"])
        assert "has no band red" in bad[stack]


@pytest.mark.parametrize(
    ("pattern", "files", "expected"),
    [
        ("{band}_{scene}.tif", ["B02_a_b.tif", "B03_a_b.tif"], {"a_b": ("B02", "B03")}),
        ("{scene}_{band}.tif", ["a_b_B02.tif", "c_B02.tif", "d.tif"], {"a_b": ("B02",), "c": ("B02",)}),
        ("{band}.tif", ["one/B02.tif", "two/B02.tif", "two/B03.tif"], {"one": ("B02",), "two": ("B02", "B03")}),
        ("{scene}/i/*_{band}_10m.tif", ["S:1/i/x_B02_10m.tif", "T/i/y_B02_10m.tif"], {"S_1": ("B02",), "T": ("B02",)}),
        ("{scene}/{scene}_{band}.tif", ["a/a_r.tif", "a/b_r.tif"], {"a": ("r",)}),
        ("x+({scene}).{band}.tif", ["x+(a).r.tif", "xx(a).r.tif"], {"a": ("r",)}),
    ],
)  # fmt: skip
def test_patterns(tmp_path, pattern, files, expected):
    for name in files:
        tiff(tmp_path / "folder" / name)
    good, bad = described(str(tmp_path / "folder"), pattern=pattern)
    assert not bad
    assert {scene.scene_id: scene.band_names for scene in good} == expected


def test_names_asked_for_decide_where_a_name_can_be_split_in_several_ways(tmp_path):
    tiff(tmp_path / "a_B_8.tif")
    assert one_of(str(tmp_path), pattern="{scene}_{band}.tif", bands=["B_8"]).scene_id == "a"
    assert one_of(str(tmp_path), pattern="{scene}_{band}.tif").scene_id == "a_B"


def test_patterns_that_cannot_be(tmp_path):
    tiff(tmp_path / "a.tif")
    for pattern, says in (
        ("{scene}.tif", "no {band}"),
        ("{date}_{band}.tif", "{date}"),
        ("{scene}_{band}.jp2", "a.tif"),
    ):
        with pytest.raises(UsageError, match=says):
            scenes.find(str(tmp_path), pattern=pattern)


def test_a_scene_that_lacks_a_band_is_refused_and_the_others_are_not(tmp_path):
    for name in ("a_B02", "a_B03", "b_B02", "c_B08"):
        tiff(tmp_path / f"{name}.tif")
    good, bad = described(str(tmp_path), pattern="{scene}_{band}.tif", bands=["B02", "B03"])
    assert [scene.scene_id for scene in good] == ["a"]
    assert "no file of band B03" in bad[f"{tmp_path}/b_{{band}}.tif"]
    assert "B02, B03; it has B08; is it still to be fetched?" in bad[f"{tmp_path}/c_{{band}}.tif"]
    _, bad = described(str(tmp_path), pattern="{scene}_{band}.tif", bands=["blue", "green"])
    assert "since Landsat's mean other bands" in bad[f"{tmp_path}/b_{{band}}.tif"]


def test_a_folder_that_may_not_be_looked_into_is_told_and_the_others_are_not(tmp_path):
    """A process of another user, for root may all."""
    tiff(tmp_path / "in" / "good" / "a.tif")
    (tmp_path / "in" / "closed").mkdir(mode=0o000)
    tmp_path.chmod(0o755)
    script = (
        "import os; from sattile import scenes; os.geteuid() or os.seteuid(65534)\n"
        "print([(one.url, one.reason) for one in scenes.find('in/*')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    reason = "not listed: the folder can't be listed: Permission denied"
    assert sorted(ast.literal_eval(done.stdout)) == [("in/closed", reason), ("in/good/a.tif", None)], done.stderr


def test_a_band_file_of_several_bands_is_refused(tmp_path):
    tiff(tmp_path / "a_TCI.tif", count=3)
    _, bad = described(str(tmp_path), pattern="{scene}_{band}.tif")
    assert "3 bands" in next(iter(bad.values()))


# ---------------------------------------------------------------- bands and grids


@pytest.mark.parametrize(
    ("names", "bands", "expected"),
    [
        (None, None, ("b1", "b2", "b3")),
        (None, ["red", "nir"], ("red", "nir")),  # the first ones, in file order
        (None, ["b3", "b1"], ("b3", "b1")),
        (("B02", "B03", "B08"), None, ("B02", "B03", "B08")),
        (("B02", "B03", "B08"), ["B08", "B02"], ("B08", "B02")),  # selects
        (("B02", "B03", "B08"), ["x", "y", "z"], ("x", "y", "z")),
        (("B02", None, "B08"), None, ("B02", "b2", "B08")),
        (("same", "same", "B08"), None, ("b1", "b2", "b3")),
    ],
)
def test_names_of_bands(tmp_path, names, bands, expected):
    url = tiff(tmp_path / "a.tif", count=3, names=names)
    scene = one_of(url, bands=bands)
    assert scene.band_names == expected
    data, _ = raster.read(scene, Window(0, 0, 1, 1))
    own = list(names) if names and bands and set(bands) <= set(names) else ["b1", "b2", "b3"]
    order = [own.index(name) + 1 if name in own else at for at, name in enumerate(expected, 1)]
    assert data[0, 0].tolist() == order


def test_too_few_bands_and_bands_that_the_file_names_otherwise_are_refused(tmp_path):
    tiff(tmp_path / "few.tif", count=2)
    tiff(tmp_path / "named.tif", count=3, names=("B02", "B03", "B08"))
    _, bad = described(str(tmp_path), bands=["B02", "B03", "B12"])
    assert "2 bands" in bad[f"{tmp_path}/few.tif"]
    assert "no band B12; its bands are B02, B03, B08" in bad[f"{tmp_path}/named.tif"]


def test_the_grid_is_the_finest_of_the_bands_asked_for(tmp_path):
    tiff(tmp_path / "s_B02.tif", height=12, width=20, resolution=10, value=2)
    tiff(tmp_path / "s_B11.tif", height=6, width=10, resolution=20, value=11)
    tiff(tmp_path / "s_B01.tif", height=2, width=4, resolution=60, value=1)
    pattern = "{scene}_{band}.tif"
    for bands, shape in ((None, (12, 20)), (["B11", "B02"], (12, 20)), (["B01", "B11"], (6, 10)), (["B01"], (2, 4))):
        scene = one_of(str(tmp_path), pattern=pattern, bands=bands)
        assert (scene.height, scene.width) == shape
        data, valid = raster.read(scene, Window(0, 0, *shape))
        assert (data[valid] == [int(name[1:]) for name in scene.band_names]).all()
        assert valid.mean() == 1 if shape != (12, 20) or "B01" not in scene.band_names else valid.mean() > 0.9
        assert set(scene.identity) == {band.url for band in scene.bands}


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    tiff(tmp_path / "a_1.tif")
    tiff(tmp_path / "a_2.tif", crs="EPSG:32617")
    tiff(tmp_path / "b_1.tif")
    tiff(tmp_path / "b_2.tif", origin=(800_000, 5_000_000))
    tiff(tmp_path / "c_1.tif")
    (tmp_path / "c_2.tif").write_bytes(b"no image")
    _, bad = described(str(tmp_path), pattern="{scene}_{band}.tif")
    assert "different CRSs" in bad[f"{tmp_path}/a_{{band}}.tif"]
    assert "do not overlap" in bad[f"{tmp_path}/b_{{band}}.tif"]
    assert "c_2.tif: " in bad[f"{tmp_path}/c_{{band}}.tif"]


def test_nodata_of_the_user_is_kept_and_goes_before_all(tmp_path):
    scene = one_of(tiff(tmp_path / "a.tif", nodata=5), nodata=1)
    assert scene.bands[0].nodata == 1
    assert not raster.read(scene, Window(0, 0, 12, 20))[1].any()


# ---------------------------------------------------------------- STAC


def item(path: Path, assets: dict, *, links=(), **properties) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    value = {
        "type": "Feature", "stac_version": "1.0.0", "id": path.stem, "geometry": None,
        "properties": {"datetime": "2020-05-17T10:00:00+02:00", **properties}, "links": list(links), "assets": assets,
    }  # fmt: skip
    path.write_text(json.dumps(value))
    return str(path)


TIFF_TYPE = "image/tiff; application=geotiff; profile=cloud-optimized"


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_stac_item_names_bands_and_states_values(tmp_path, version):
    tiff(tmp_path / "img" / "blue 1.tif", value=2)
    tiff(tmp_path / "img" / "swir.tif", value=11, height=6, width=10, resolution=20)
    said = {"nodata": 0, "scale": 0.0001, "offset": -0.1}
    fields = {
        "1.0": lambda name, common: {"eo:bands": [{"name": name, "common_name": common}], "raster:bands": [said]},
        "1.1": lambda name, common: {
            "bands": [{"name": name, "eo:common_name": common}],
            "nodata": 0, "raster:scale": 0.0001, "raster:offset": -0.1,
        },
    }[version]  # fmt: skip
    url = item(
        tmp_path / "one.json",
        {
            "swir16": {"href": "img/swir.tif", "type": TIFF_TYPE, "roles": ["data"], **fields("B11", "swir16")},
            "blue": {"href": "./img/blue%201.tif", "type": TIFF_TYPE, "roles": ["data"], **fields("B02", "blue")},
            "thumbnail": {"href": "t.png", "type": "image/png", "roles": ["thumbnail"]},
            "visual": {"href": "tci.tif", "type": TIFF_TYPE, "roles": ["visual"]},
        },
    )
    scene = one_of(url)
    assert scene.scene_id == "one"
    assert scene.url == url
    assert scene.datetime == "2020-05-17T08:00:00Z"
    assert set(scene.band_names) == {"B02", "B11"}
    assert (scene.height, scene.width) == (12, 20)
    for bands in (["B02", "B11"], ["blue", "swir16"]):  # by name, by asset or common name
        scene = one_of(url, bands=bands)
        assert scene.band_names == tuple(bands)
        assert [(band.nodata, band.scale, band.offset) for band in scene.bands] == [(0, 0.0001, -0.1)] * 2
        data, valid = raster.read(scene, Window(0, 0, 12, 20))
        assert (data == [2, 11]).all()
        assert valid.all()
    assert (one_of(url, bands=["B11"]).height, one_of(url, bands=["B11"]).width) == (6, 10)
    _, bad = described(url, bands=["B08"])
    assert "no asset with band B08" in bad[url]


FIRST, LAST, NOMINAL = "2020-01-01T00:00:00Z", "2020-03-31T23:59:59Z", "2020-02-15T12:00:00Z"


@pytest.mark.parametrize(
    ("stated", "datetime", "interval"),
    [
        ({"datetime": None, "start_datetime": FIRST, "end_datetime": LAST}, None, (FIRST, LAST)),
        ({"datetime": NOMINAL, "start_datetime": FIRST, "end_datetime": LAST}, NOMINAL, (FIRST, LAST)),
        ({"datetime": None, "start_datetime": "2020-01-01T01:00:00+01:00", "end_datetime": LAST}, None, (FIRST, LAST)),
        ({"datetime": NOMINAL}, NOMINAL, None),
        ({"datetime": NOMINAL, "start_datetime": LAST, "end_datetime": FIRST}, NOMINAL, None),
        ({"datetime": NOMINAL, "start_datetime": FIRST, "end_datetime": "in March"}, NOMINAL, None),
        ({"datetime": NOMINAL, "start_datetime": FIRST, "end_datetime": None}, NOMINAL, None),
    ],
)
def test_an_item_s_interval_is_kept(tmp_path, stated, datetime, interval):
    """Of a composite, the file's own date is that of its making."""
    tiff(tmp_path / "image.tif")
    with rasterio.open(tmp_path / "image.tif", "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2023:05:06 07:08:09")
    url = item(tmp_path / "one.json", {"image": {"href": "image.tif", "type": TIFF_TYPE}}, **stated)
    scene = one_of(url)
    assert (scene.datetime, scene.interval) == (datetime, interval)
    assert scene.span == (interval or (NOMINAL, NOMINAL))
    assert Scene.from_json(scene.to_json()) == scene


@pytest.mark.parametrize(
    "stated",
    [
        {"datetime": None, "start_datetime": "1970-01-01T00:00:00Z", "end_datetime": "2099-12-31T23:59:59Z"},
        {
            "datetime": None, "start_datetime": FIRST, "end_datetime": LAST, "sattile:datetime_missing": True,
        },
        {"datetime": None},
    ],
    ids=["our placeholders", "flagged", "null alone"],
)  # fmt: skip
def test_an_item_without_a_date_is_of_no_time(tmp_path, stated):
    tiff(tmp_path / "image.tif")
    url = item(tmp_path / "one.json", {"image": {"href": "image.tif", "type": TIFF_TYPE}}, **stated)
    scene = one_of(url)
    assert (scene.datetime, scene.interval, scene.span) == (None, None, None)
    assert "interval" not in scene.to_json()


def test_a_catalogue_has_the_intervals_of_composites(spark, tmp_path):
    tiff(tmp_path / "image.tif")
    assets = {"image": {"href": "image.tif", "type": TIFF_TYPE}}
    whole = {"datetime": None, "start_datetime": FIRST, "end_datetime": LAST}
    urls = [item(tmp_path / "items" / "plain.json", {"image": {"href": "../image.tif", "type": TIFF_TYPE}})]
    table = pq.read_table(scenes.index(spark, urls, out=str(tmp_path / "plain")))
    assert not {"start_datetime", "end_datetime"} & set(table.column_names)  # as it was before there were any
    urls.append(item(tmp_path / "whole.json", assets, **whole))
    url = scenes.index(spark, urls, out=str(tmp_path / "out"))
    rows = pq.read_table(url, columns=["scene_id", *whole]).to_pylist()
    nothing = {"start_datetime": None, "end_datetime": None}
    assert rows == [
        {"scene_id": "plain", "datetime": "2020-05-17T08:00:00Z", **nothing}, {"scene_id": "whole", **whole},
    ]  # fmt: skip
    assert [one.interval for one in scenes.resolve(spark, url).scenes] == [None, (FIRST, LAST)]
    tiff(tmp_path / "image.tif", height=13)  # described anew, as the catalogue says
    assert [one.interval for one in scenes.resolve(spark, url).scenes] == [None, (FIRST, LAST)]


def test_an_item_of_one_file_that_says_nothing_of_its_bands(tmp_path):
    tiff(tmp_path / "image.tif", count=3)
    url = item(tmp_path / "one.json", {"image": {"href": "image.tif", "type": TIFF_TYPE}})
    assert one_of(url).band_names == ("b1", "b2", "b3")
    assert one_of(url, bands=["r", "g"]).band_names == ("r", "g")


def test_collections_are_followed_and_the_network_is_not(tmp_path):
    for name in ("a", "b"):
        tiff(tmp_path / name / f"{name}.tif")
        item(
            tmp_path / name / f"{name}.json",
            {"data": {"href": f"./{name}.tif", "type": TIFF_TYPE, "roles": ["data"]}},
            links=[{"rel": "root", "href": "../collection.json"}],
        )
    item(tmp_path / "far.json", {"B02": {"href": "https://example.com/a.tif", "type": TIFF_TYPE}})
    item(tmp_path / "gone.json", {"B02": {"href": "nothing.tif", "type": TIFF_TYPE}})
    item(tmp_path / "virtual.json", {"B02": {"href": "/vsicurl/http://example.com/a.tif", "type": TIFF_TYPE}})
    (tmp_path / "bad.json").write_text('{"type": "Feature", "id": "bad"}')
    links = ["a/a.json", "./b/b.json", "far.json", "gone.json", "virtual.json", "bad.json", "missing.json",
             "https://example.com/item.json"]  # fmt: skip
    collection = {"type": "Collection", "id": "c", "links": [{"rel": "item", "href": href} for href in links]}
    (tmp_path / "collection.json").write_text(json.dumps(collection))
    (tmp_path / "catalog.json").write_text(
        json.dumps({"type": "Catalog", "id": "r", "links": [{"rel": "child", "href": "collection.json"},
                                                            {"rel": "self", "href": "catalog.json"}]})
    )  # fmt: skip
    for start in ("collection.json", "catalog.json"):
        good, bad = described(f"{tmp_path}/{start}")
        assert [scene.scene_id for scene in good] == ["a", "b"]
        assert len(bad) == 6
        assert "network" in bad[f"{tmp_path}/far.json"]
        assert "gone" in bad[f"{tmp_path}/gone.json"]
        assert "virtual path" in bad[f"{tmp_path}/virtual.json"]
        assert "no valid STAC item" in bad[f"{tmp_path}/bad.json"]
        assert "cannot be read" in bad[f"{tmp_path}/missing.json"]
        assert "network" in bad["https://example.com/item.json"]


def test_a_hostile_id_does_not_leave_the_folder(tmp_path):
    tiff(tmp_path / "a.tif")
    url = item(tmp_path / "one.json", {"data": {"href": "a.tif", "type": TIFF_TYPE}})
    for scene_id, expected in (("../../etc", ".._.._etc"), ("..", "__"), ("", "one")):
        value = json.loads(Path(url).read_text()) | {"id": scene_id}
        Path(url).write_text(json.dumps(value))
        assert found(url)[0][0] == expected


def test_json_that_is_no_stac_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "b.json").write_text("no json")
    _, bad = described([f"{tmp_path}/a.json", f"{tmp_path}/b.json"])
    assert "no STAC" in bad[f"{tmp_path}/a.json"]
    assert "not JSON" in bad[f"{tmp_path}/b.json"]


# ---------------------------------------------------------------- Spark, the catalogue


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.name != record.RUN
    }


def test_resolve_through_spark_survives_bad_files(spark, tmp_path):
    for name in ("b", "a", "c"):
        tiff(tmp_path / f"{name}.tif")
    (tmp_path / "bad.tif").write_bytes(b"II*\0garbage")
    (tmp_path / "empty.tif").touch()
    arguments = [f"{tmp_path}/c.tif", str(tmp_path)]
    resolved = scenes.resolve(spark, arguments, bands=["x"], nodata=3)
    assert [scene.scene_id for scene in resolved.scenes] == ["a", "b", "c"]
    assert [scene.bands[0].name for scene in resolved.scenes] == ["x"] * 3
    assert all(scene.bands[0].nodata == 3 and scene.bands[0].forced for scene in resolved.scenes)
    assert [one.url for one in resolved.refused] == [f"{tmp_path}/bad.tif", f"{tmp_path}/empty.tif"]
    assert resolved.given == 5
    assert repr(scenes.resolve(spark, arguments[::-1], bands=["x"], nodata=3)) == repr(resolved)


def test_wide_strips_are_warned_of_and_tiles_are_not(spark, tmp_path, caplog):
    for name in ("a", "b"):
        tiff(tmp_path / "wide" / f"{name}.tif", width=2600)
    tiff(tmp_path / "good" / "narrow.tif", width=500)
    tiff(tmp_path / "good" / "tiled.tif", width=2600, tiled=True, blockxsize=512, blockysize=512)
    scenes.resolve(spark, [str(tmp_path / "good")])
    assert "strips" not in caplog.text
    scenes.resolve(spark, [str(tmp_path / "wide"), str(tmp_path / "good")])
    assert "wide/a.tif and 1 more: stored in strips" in caplog.text
    assert "gdal_translate -of COG" in caplog.text


def test_a_file_on_which_gdal_dies_costs_that_file(spark, tmp_path):
    """The header of one file kills the reading process: Spark's worker and the other files live on."""
    for name in ("a", "b", "c"):
        tiff(tmp_path / f"{name}.tif")
    candidates = scenes.find(str(tmp_path))
    rows = spark.sparkContext.parallelize(list(enumerate(candidates)), 1)
    path = str(tmp_path)

    def with_a_deadly_file(part):
        import sys

        sys.path.insert(0, path)
        import deadly

        yield from deadly.describe_all(part)

    module = tmp_path / "deadly.py"
    module.write_text(
        "import os, signal\n"
        "from unittest import mock\n"
        "from sattile import raster, scenes\n"
        "real = raster.describe_file\n"
        "def header(url):\n"
        "    if url.endswith('b.tif'):\n"
        "        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(url)\n"
        "def describe_all(part):\n"
        "    with mock.patch.object(raster, 'describe_file', header):\n"
        "        yield from scenes._describe_all(part, bands=None, nodata=None)\n"
    )
    outcomes = rows.mapPartitions(with_a_deadly_file).collect()
    assert [reason is None for _, _, reason, _ in outcomes] == [True, False, True]
    assert "signal 11" in outcomes[1][2]


def test_index_writes_geoparquet_and_a_rerun_writes_nothing(spark, tmp_path):
    tiff(tmp_path / "in" / "a.tif", count=2, names=("B02", "B03"), nodata=0)
    tiff(tmp_path / "in" / "b.tif", count=2, crs="EPSG:32601", origin=(330_000, 7_000_000), resolution=3000)
    tiff(tmp_path / "in" / "n.tif", count=2, crs=None)
    (tmp_path / "in" / "bad.tif").write_bytes(b"")
    out = tmp_path / "out"
    url = scenes.index(spark, str(tmp_path / "in"), out=str(out), max_failed_fraction=0.5)
    assert url == f"{out}/scenes.parquet"
    before = snapshot(out)
    assert scenes.index(spark, [f"{tmp_path}/in/*.tif"], out=str(out), max_failed_fraction=0.5) == url
    assert snapshot(out) == before
    run = json.loads((out / record.RUN).read_text())
    assert (run["command"], run["done"], run["skipped"], run["quarantined"]) == ("index", 0, 3, 1)
    assert {one["url"] for one in run["inputs"]} == {f"{tmp_path}/in/{name}.tif" for name in "abn"}
    quarantine = pq.read_table(out / record.QUARANTINE).to_pylist()
    assert quarantine == [
        {
            "url": f"{tmp_path}/in/bad.tif",
            "stage": "index",
            "reason": "the file is empty (a broken download?); fetch it again",
        }
    ]

    import geopandas

    frame = geopandas.read_parquet(url)
    assert frame.crs.to_epsg() == 4326
    assert list(frame["scene_id"]) == ["a", "b", "n"]
    assert {"urls", "width", "height", "bands", "dtype", "crs", "transform", "gsd", "nodata", "scales", "offsets",
            "datetime", "footprint"} <= set(frame.columns)  # fmt: skip
    row = frame.iloc[0]
    assert (row["width"], row["height"], row["crs"], row["gsd"], row["dtype"]) == (20, 12, "EPSG:32618", 10.0, "uint16")
    assert list(row["bands"]) == ["B02", "B03"]
    assert list(row["urls"]) == [f"{tmp_path}/in/a.tif"]
    assert list(row["nodata"]) == [0, 0]
    assert row["footprint"].equals(shapely.from_wkb(raster.describe_file(f"{tmp_path}/in/a.tif").footprint))
    assert frame.iloc[1]["footprint"].geom_type == "MultiPolygon"
    assert frame.iloc[2]["footprint"] is None


def test_a_catalogue_is_trusted_while_its_files_are_as_they_were(spark, tmp_path):
    for name in ("a", "b", "c"):
        tiff(tmp_path / "in" / f"{name}.tif", count=2, names=("B02", "B03"))
    out = str(tmp_path / "out")
    scenes.index(spark, str(tmp_path / "in"), out=out, nodata=7)
    listed = scenes.read_catalog(out)
    assert listed == scenes.read_catalog(f"{out}/scenes.parquet")
    assert [scene.scene_id for scene in listed] == ["a", "b", "c"]
    resolved = scenes.resolve(spark, out)
    assert resolved.scenes == listed
    assert scenes.resolve(spark, [out, str(tmp_path / "in")]).scenes == listed  # once each, as in the catalogue
    tiff(tmp_path / "in" / "b.tif", count=2, names=("B02", "B03"), height=30)
    os.remove(tmp_path / "in" / "c.tif")
    resolved = scenes.resolve(spark, f"{out}/scenes.parquet", bands=["B03"])
    assert [(scene.scene_id, scene.height, scene.band_names) for scene in resolved.scenes] == [
        ("a", 12, ("B03",)), ("b", 30, ("B03",)),
    ]  # fmt: skip
    assert all(scene.bands[0].nodata == 7 and scene.bands[0].forced for scene in resolved.scenes)
    assert "file is gone" in resolved.refused[0].reason
    assert not scenes.resolve(spark, out, bands=["B99"]).scenes


def test_a_scene_whose_mask_has_gone_or_changed_is_described_again(spark, tmp_path):
    path = tmp_path / "in" / "a.tif"
    tiff(path)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"), rasterio.open(path, "r+") as file:
        file.write_mask(np.zeros((file.height, file.width), np.uint8))
    out = str(tmp_path / "out")
    scenes.index(spark, str(tmp_path / "in"), out=out)
    (listed,) = scenes.read_catalog(out)
    assert set(listed.identity) == {str(path), f"{path}.msk"}
    assert scenes.resolve(spark, out).scenes == [listed]
    os.utime(f"{path}.msk", (1, 1))
    (touched,) = scenes.resolve(spark, out).scenes
    assert touched.identity[f"{path}.msk"] != listed.identity[f"{path}.msk"]
    os.remove(f"{path}.msk")
    (bare,) = scenes.resolve(spark, out).scenes
    assert set(bare.identity) == {str(path)}
    again = str(tmp_path / "again")
    scenes.index(spark, str(tmp_path / "in"), out=again)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"), rasterio.open(path, "r+") as file:
        file.write_mask(np.zeros((file.height, file.width), np.uint8))
    (masked,) = scenes.resolve(spark, again).scenes
    assert set(masked.identity) == {str(path), f"{path}.msk"}


def test_a_file_whose_name_leaves_no_room_for_a_mask_beside_it(spark, tmp_path):
    names = ["a.tif", "y" * 249 + ".tif"]
    for one in names:
        tiff(tmp_path / one)
    resolved = scenes.resolve(spark, str(tmp_path))
    assert ([one.scene_id + ".tif" for one in resolved.scenes], resolved.refused) == (names, [])


def test_nodata_that_is_declared_beside_a_file_of_a_catalogue_counts(spark, tmp_path):
    tiff(tmp_path / "in" / "a.tif")
    out = str(tmp_path / "out")
    scenes.index(spark, str(tmp_path / "in"), out=out)
    (before,) = scenes.resolve(spark, out).scenes
    (tmp_path / "in" / "a.tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>7</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    (scene,) = scenes.resolve(spark, out).scenes
    assert (before.bands[0].nodata, scene.bands[0].nodata) == (None, 7)


def test_a_link_to_what_is_not_there_is_a_scene_that_is_gone(spark, tmp_path):
    """And is told: a disk may be away."""
    tiff(tmp_path / "in" / "a.tif")
    (tmp_path / "in" / "b.tif").symlink_to(tmp_path / "away" / "b.tif")
    for argument in (tmp_path / "in", tmp_path / "in" / "*.tif"):
        resolved = scenes.resolve(spark, str(argument))
        assert [one.scene_id for one in resolved.scenes] == ["a"]
        assert [(one.url, "is gone" in one.reason) for one in resolved.refused] == [(f"{tmp_path}/in/b.tif", True)]


def test_fewer_bands_of_a_catalogue_have_the_finest_grid_of_those(spark, tmp_path):
    tiff(tmp_path / "in" / "s_B02.tif")
    tiff(tmp_path / "in" / "s_B11.tif", height=6, width=10, resolution=20)
    out = str(tmp_path / "out")
    scenes.index(spark, str(tmp_path / "in"), out=out, pattern="{scene}_{band}.tif")
    (scene,) = scenes.resolve(spark, out, bands=["B11"]).scenes
    assert (scene.height, scene.width, scene.band_names, scene.scene_id) == (6, 10, ("B11",), "s")


def test_index_with_nothing_good_writes_an_empty_catalogue_and_why(spark, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.tif").write_bytes(b"x")
    with pytest.raises(TooManyRefused):
        scenes.index(spark, str(tmp_path / "in"), out=str(tmp_path / "out"))
    assert scenes.read_catalog(str(tmp_path / "out")) == []
    assert pq.read_table(tmp_path / "out" / record.QUARANTINE).num_rows == 1
    # the file mended, the catalogue follows
    tiff(tmp_path / "in" / "bad.tif")
    scenes.index(spark, str(tmp_path / "in"), out=str(tmp_path / "out"))
    assert len(scenes.read_catalog(str(tmp_path / "out"))) == 1
    assert not (tmp_path / "out" / record.QUARANTINE).exists()
    with pytest.raises(UsageError, match="other settings"):
        scenes.index(spark, str(tmp_path / "in"), out=str(tmp_path / "out"), bands=["b1"])


def test_wrong_usage_leaves_no_folder(spark, tmp_path):
    with pytest.raises(UsageError):
        scenes.index(spark, f"{tmp_path}/nothing*.tif", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "other.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="no catalogue"):
        scenes.find(f"{tmp_path}/other.parquet")


# ---------------------------------------------------------------- real


def test_beaufort_is_one_scene_of_eight_files(shared_data, tmp_path):
    bands = ["B02", "B03", "B04", "B08"]
    scene = one_of(str(shared_data / "beaufort"), pattern="{scene}, {band}.tiff", bands=bands, nodata=255)
    assert scene.scene_id == BEAUFORT
    assert scene.band_names == tuple(bands)
    assert (scene.height, scene.width) == (2201, 2629)
    data, valid = raster.read(scene, Window(0, 0, 300, 400))
    with rasterio.open(shared_data / "beaufort" / f"{BEAUFORT}, B04.tiff") as source:
        assert np.array_equal(data[..., 2], source.read(1, window=((0, 300), (0, 400))))
    assert np.array_equal(valid, (data != 255).all(axis=2))
    for name in os.listdir(shared_data / "beaufort"):
        if name.endswith("B02.tiff"):
            shutil.copy(shared_data / "beaufort" / name, tmp_path / name)
    _, bad = described(str(tmp_path), pattern="{scene}, {band}.tiff", bands=bands)
    assert "no file of band B03, B04, B08" in next(iter(bad.values()))


def test_landsat_at_two_resolutions_is_read_onto_the_finer(shared_data):
    folder = str(shared_data / "pansharpen" / "landsat8_elkton")
    scene = one_of(folder, pattern="{scene}-{band}-Elkton-VA.tiff", bands=["B2", "B8", "B4"])
    assert (scene.height, scene.width) == (337, 371)
    data, valid = raster.read(scene, Window(0, 0, 337, 371))
    assert valid.mean() > 0.95
    with rasterio.open(f"{folder}/L8-B2-Elkton-VA.tiff") as source:
        coarse = source.read(1)
    assert abs(data[..., 0][valid].mean() / coarse.mean() - 1) < 0.01
    assert one_of(folder, pattern="{scene}-{band}-Elkton-VA.tiff", bands=["B2", "B4"]).height == 169


def test_a_scene_named_by_path_and_by_url_is_one(spark, tmp_path):
    path = tiff(tmp_path / "a b.tif")
    ways = [str(path), f"file:{path}", f"file://{path}", f"file://{path}".replace(" ", "%20")]
    (scene,) = scenes.resolve(spark, ways).scenes
    assert (scene.scene_id, scene.url) == ("a b", str(path))


def test_a_date_that_utc_has_not_is_left_out_and_told(spark, tmp_path, caplog):
    """Year 1 east of Greenwich began in year 0; year 9999 west of it ends in 10000."""
    caplog.set_level("WARNING", "sattile")
    for name in ("early", "late", "good"):
        tiff(tmp_path / f"{name}.tif")
        item(tmp_path / f"{name}.json", {"data": {"href": f"./{name}.tif", "type": TIFF_TYPE}})
        value = json.loads((tmp_path / f"{name}.json").read_text())
        value["properties"]["datetime"] = {
            "early": "0001-01-01T00:00:00+02:00", "late": "9999-12-31T23:00:00-03:00", "good": "2023-05-06T10:11:12Z",
        }[name]  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    url = scenes.index(spark, f"{tmp_path}/*.json", out=str(tmp_path / "out"))
    assert {one.scene_id.rpartition("/")[2]: one.datetime for one in scenes.read_catalog(url)} == {
        "early": None, "late": None, "good": "2023-05-06T10:11:12Z",
    }  # fmt: skip
    told = [record.getMessage() for record in caplog.records if "can't be used" in record.getMessage()]
    assert [line.partition(": ")[0] for line in told] == [f"{tmp_path}/early.json", f"{tmp_path}/late.json"]
    assert "0001-01-01" in told[0]


@pytest.mark.parametrize(
    "content", ["[" * 100_000, '{"type": "Catalog", "links": 7}', '{"type": "Feature", "assets": 3}']
)
def test_odd_json_costs_itself(tmp_path, as_in_production, content):
    tiff(tmp_path / "a.tif")
    item(tmp_path / "a.json", {"data": {"href": "a.tif", "type": TIFF_TYPE}})
    (tmp_path / "b.json").write_text(content)
    (tmp_path / "all.json").write_text(
        json.dumps({"type": "Catalog", "links": [{"rel": "item", "href": href} for href in ("b.json", "a.json")]})
    )
    good, _ = described(f"{tmp_path}/all.json")
    assert [scene.scene_id for scene in good] == ["a"]
