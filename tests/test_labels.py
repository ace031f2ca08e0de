"""Labels of scenes: which file, which class; what is wrong with one file costs its scene."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import unicodedata
import warnings
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from scenes_for_tests import write_scene

from sattile import geography, labels, legend, raster, schema
from sattile.errors import Refused, UsageError
from sattile.grid import Window
from sattile.scenes import describe, find
from sattile.schema import IGNORE, Scene

WEST, NORTH = 600_000, 5_000_000


def scene_of(path: Path, height: int = 40, width: int = 60, **profile: object) -> Scene:
    url = write_scene(path, np.ones((1, height, width), np.uint8), **profile)
    return describe(find(url)[0], raster.describe_file)


def pixels(left: int, top: int, right: int, bottom: int) -> shapely.Polygon:
    return shapely.box(WEST + 10 * left, NORTH - 10 * bottom, WEST + 10 * right, NORTH - 10 * top)


def write_shapes(path: Path, shapes: list[object], crs: str = "EPSG:32632", **columns: object) -> str:
    geopandas.GeoDataFrame(columns, geometry=shapes, crs=crs).to_file(path)
    return str(path)


def drawn(source: labels.LabelSource, scene: Scene) -> np.ndarray:
    return labels.read(source, scene, Window(0, 0, scene.height, scene.width))[0]


def test_pairs_as_spreadsheets_write_them(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_bytes(b"\xef\xbb\xbfscene, labels\r\na b.tif, l.tif\r\n,\r\nc.tif, l.tif:2\r\n")
    for name in ("a b.tif", "l.tif", "c.tif"):
        (tmp_path / name).touch()
    assert labels.read_pairs(str(path)) == [
        {"scene": str(tmp_path / "a b.tif"), "labels": str(tmp_path / "l.tif")},
        {"scene": str(tmp_path / "c.tif"), "labels": str(tmp_path / "l.tif:2")},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"scene,labels\na.tif,\xe9.tif\n", "not UTF-8"),
        (b"scene;labels\na.tif;b.tif\n", "needs columns scene and labels"),
        (b"scene,labels,split\na.tif,b.tif,train\nx/../a.tif,c.tif,val\n", "line 3: .*a.tif is on line 2 already"),
    ],
)
def test_pairs_that_cannot_be_meant(tmp_path, content, message):
    path = tmp_path / "pairs.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        labels.read_pairs(str(path))


def test_one_bad_labels_file_costs_its_scene(tmp_path):
    one, two, three = (scene_of(tmp_path / name) for name in ("one.tif", "two.tif", "three.tif"))
    good = write_shapes(tmp_path / "good.geojson", [shapely.box(8, 40, 12, 48)], "EPSG:4326", kind=["a"])
    (tmp_path / "bad.geojson").write_text('{"type": "FeatureCollection", "features": [')
    urls = {"one": good, "two": str(tmp_path / "bad.geojson"), "three": str(tmp_path / "none.tif")}
    matched = labels.match_pairs(urls, [one, two, three], attribute="kind")
    assert list(matched.sources) == ["one"]
    reasons = {Path(refusal.url).stem: refusal.reason for refusal in matched.refused}
    assert "cannot be read as a vector file" in reasons["two"]
    assert "none.tif do not exist" in reasons["three"]
    with pytest.raises(UsageError, match="cannot be read"):
        labels.match(str(tmp_path / "bad.geojson"), [one, two], attribute="kind")


def test_two_label_files_of_one_scene_are_not_chosen_from(tmp_path):
    scene = scene_of(tmp_path / "s.tif")
    write_scene(tmp_path / "labels" / "s.tif", np.ones((1, 40, 60), np.uint8))
    write_shapes(tmp_path / "labels" / "s.geojson", [shapely.box(8, 40, 12, 48)], "EPSG:4326", kind=["a"])
    matched = labels.match(str(tmp_path / "labels"), [scene], attribute="kind")
    assert not matched.sources
    assert "several label files" in matched.refused[0].reason


def test_shapes_without_a_class_are_left_out(tmp_path, caplog):
    scene = scene_of(tmp_path / "s.tif")
    shapes = [pixels(0, 0, 10, 10), pixels(20, 0, 30, 10), pixels(40, 0, 50, 10)]
    url = write_shapes(tmp_path / "v.gpkg", shapes, kind=[3, None, 7])
    caplog.set_level("WARNING", "sattile")
    matched = labels.match(url, [scene], attribute="kind")
    assert [one.id for one in matched.classes or ()] == [3, 7]
    assert set(np.unique(drawn(matched.sources["s"], scene))) == {3, 7, IGNORE}
    url = write_shapes(tmp_path / "w.gpkg", shapes, kind=["b", "", "a"])
    matched = labels.match(url, [scene], attribute="kind")
    assert [one.name for one in matched.classes or ()] == ["a", "b"]


def test_numbers_with_zeros_before_them_are_numbers(tmp_path):
    scene = scene_of(tmp_path / "s.tif")
    shapes = [pixels(0, 0, 10, 10), pixels(20, 0, 30, 10), pixels(40, 0, 50, 10)]
    url = write_shapes(tmp_path / "v.gpkg", shapes, kind=["01", "1", "02"])
    matched = labels.match(url, [scene], attribute="kind")
    assert [(one.id, one.name) for one in matched.classes or ()] == [(1, "class_1"), (2, "class_2")]
    found = drawn(matched.sources["s"], scene)
    assert (found[5, 5], found[5, 25], found[5, 45]) == (1, 1, 2)


def test_values_to_be_ignored_need_be_no_class_ids(tmp_path):
    scene = scene_of(tmp_path / "s.tif")
    stored = np.ones((1, 40, 60), np.int16)
    stored[:, :5], stored[:, 30:] = -1, 999
    url = write_scene(tmp_path / "labels.tif", stored)
    matched = labels.match(url, [scene], ignore=[-1, 999])
    found = drawn(matched.sources["s"], scene)
    assert (found == np.where(stored[0] == 1, 1, IGNORE)).all()
    with pytest.raises(Refused, match="--ignore"):
        drawn(labels.match(url, [scene]).sources["s"], scene)


def test_a_changed_attribute_of_a_shapefile_is_a_change(tmp_path):
    scene = scene_of(tmp_path / "s.tif")
    url = write_shapes(tmp_path / "v.shp", [pixels(0, 0, 10, 10)], kind=["a"])
    before = labels.match(url, [scene], attribute="kind").sources["s"].identity()
    assert set(before) == {url, *(str(tmp_path / f"v.{one}") for one in ("dbf", "prj", "cpg"))}


def test_a_continent_can_be_a_label(tmp_path):
    """Its far side is not on the scene's projection, and sides of 60 degrees are far from straight there."""
    scene = scene_of(tmp_path / "s.tif")
    transformer = geography._to_lonlat("EPSG:32632")
    assert transformer is not None
    rows, cols = np.mgrid[:40, :60] + 0.5
    _, lats = transformer.transform(WEST + 10 * cols, NORTH - 10 * rows)
    edge = float(lats.mean())
    land = shapely.segmentize(shapely.box(-170, -60, 170, edge), 400)
    url = write_shapes(tmp_path / "land.geojson", [land], "EPSG:4326", kind=["land"])
    found = drawn(labels.match(url, [scene], attribute="kind").sources["s"], scene)
    clear = np.abs(lats - edge) > 1e-5  # a tenth of a pixel
    assert 0 < (found == 0).sum() < found.size
    assert ((found == 0) == (lats < edge))[clear].all()


def test_a_vrt_is_no_label_whatever_it_is_called(tmp_path):
    other = write_shapes(tmp_path / "o.geojson", [pixels(0, 0, 9, 9)], kind=["a"])
    path = tmp_path / "v.geojson"
    path.write_text(
        f'<OGRVRTDataSource><OGRVRTLayer name="o"><SrcDataSource>{other}</SrcDataSource></OGRVRTLayer>'
        f"</OGRVRTDataSource>"
    )
    with pytest.raises(UsageError, match="does not hold what its name"):
        labels.read_vector(str(path))


@pytest.mark.parametrize("ids", [range(40), (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 100), (0, 7, 200)])
def test_each_class_has_a_colour_of_its_own(ids):
    made = legend.parse_classes(",".join(f"c{one}={one}" for one in ids)) or ()
    assert [one.id for one in made] == list(ids)
    assert len({one.color for one in made}) == len(made)
    assert [one.color for one in legend.classes_of(ids)] == [one.color for one in made]
    assert all(one.color == schema.PALETTE[one.id] for one in made if one.id < 10)


def test_a_colour_that_was_given_is_given_to_no_other():
    made = legend.parse_classes(f"a=0,b=1={schema.PALETTE[0].upper()}") or ()
    assert made[0].color != made[1].color.lower() == schema.PALETTE[0]


@pytest.mark.parametrize("text", ["7,3", "7,land=3", "water=07,3", "7:water,3:land"])
def test_classes_may_be_kept_in_the_order_in_which_they_are_named(text):
    assert [one.id for one in legend.parse_classes(text, by_id=False) or ()] == [7, 3]
    assert [one.id for one in legend.parse_classes(text) or ()] == [3, 7]


@pytest.mark.parametrize("text", ["a=0=#zz", "a=0=#12", "a,,b", "1=2", "a=b=c", "a=1,b=1", "a,b=0", "a,a=3"])
def test_classes_that_are_none(text):
    with pytest.raises(UsageError, match="classes"):
        legend.parse_classes(text)


def test_what_has_no_area_is_left_out_and_told(tmp_path, caplog):
    """A spike is no part of a square; a polygon without an area, lines and points hold no pixel."""
    scene = scene_of(tmp_path / "s.tif")
    corner = np.array([WEST, NORTH])

    def at(*points: tuple[float, float]) -> list[np.ndarray]:
        return [corner + np.array([10 * col, -10 * row]) for col, row in points]

    spiked = shapely.Polygon(at((5, 5), (15, 5), (15, 15), (10, 15), (10, 35), (10, 15), (5, 15)))
    shapes = [
        shapely.LineString(at((0, 0), (60, 40))),
        spiked,
        shapely.Polygon(at((20, 20), (40, 20), (20, 20))),
        shapely.MultiPoint(at((1, 1), (2, 30))),
        shapely.GeometryCollection([pixels(30, 5, 34, 9), shapely.LineString(at((30, 30), (50, 30)))]),
        shapely.Point(at((3, 3))[0]),
    ]
    url = write_shapes(tmp_path / "v.gpkg", shapes, kind=[9, 0, 8, 9, 1, 7])
    features = labels.read_vector(url, "kind")
    assert (features.values, features.numbers) == (("0", "1"), (2, 5))
    assert "4 of 6 shapes left out, as only areas hold pixels: 2 points, 1 line, 1 polygon without area" in caplog.text
    matched = labels.match_pairs({"s": url}, [scene], attribute="kind")
    assert [one.id for one in matched.classes] == [0, 1]
    expected = np.full((40, 60), IGNORE)
    expected[5:15, 5:15] = 0
    expected[5:9, 30:34] = 1
    assert np.array_equal(drawn(matched.sources["s"], scene), expected)
    lines = write_shapes(tmp_path / "l.gpkg", shapes[:1] * 2, kind=[1, 2])
    with pytest.raises(UsageError, match=r"l.gpkg holds no polygon: 2 lines; .*buffer"):
        labels.read_vector(lines)


def test_a_scene_gets_the_shapes_that_touch_it_in_the_order_of_the_file(tmp_path):
    near, far = scene_of(tmp_path / "near.tif"), scene_of(tmp_path / "far.tif", west=WEST + 40_000)
    order = np.random.default_rng(0).permutation(60)
    shapes = [pixels(col, 0, col + 2, 40).union(pixels(col + 4000, 0, col + 4002, 40)) if col % 2 else
              pixels(col, 0, col + 5, 30) for col in order.tolist()]  # fmt: skip
    url = write_shapes(tmp_path / "v.gpkg", shapes, kind=order.tolist())
    matched = labels.match_pairs({"near": url, "far": url}, [near, far], attribute="kind")
    expected = np.full((2, 40, 60), IGNORE)
    for col in order.tolist():
        expected[0, : 40 if col % 2 else 30, col : col + (2 if col % 2 else 5)] = col
        if col % 2:
            expected[1, :, col : col + 2] = col
    for scene, right in zip((near, far), expected, strict=True):
        assert np.array_equal(drawn(matched.sources[scene.scene_id], scene), right)


def test_subfolders_that_mirror_the_scenes_hold_their_labels(tmp_path):
    new, old, more = (scene_of(tmp_path / name / "t1.tif") for name in ("scenes/2020", "scenes/2021", "scenes"))
    new, old, more = (replace(one, scene_id=f"t1-{n}") for n, one in enumerate((new, old, more)))
    flat, other = scene_of(tmp_path / "scenes" / "2021" / "t2.tif"), scene_of(tmp_path / "scenes" / "2021" / "t3.tif")
    for name in ("2020/t1.tif", "2021/t1.tif", "t2.tif", "2021/t2.tif", "2020/t3.tif", "t1.tif"):
        write_scene(tmp_path / "labels" / name, np.ones((1, 40, 60), np.uint8))
    matched = labels.match(str(tmp_path / "labels"), [new, old, more, flat, other])
    found = {name: source.url.removeprefix(f"{tmp_path}/labels/") for name, source in matched.sources.items()}
    assert found == {"t1-0": "2020/t1.tif", "t1-1": "2021/t1.tif", "t2": "2021/t2.tif"}
    # Of `scenes/t1.tif`, whose id is not its name, it is not sure; `t3` lies in another year's folder.
    assert {Path(one.url).name for one in matched.refused} == {"t1.tif", "t3.tif"}


def test_labels_that_may_be_of_two_scenes_are_of_none(tmp_path):
    one, two = (scene_of(tmp_path / name / "2020" / "t1.tif") for name in ("scenes", "more"))
    one, two = replace(one, scene_id="t1-a"), replace(two, scene_id="t1-b")
    write_scene(tmp_path / "labels" / "2020" / "t1.tif", np.ones((1, 40, 60), np.uint8))
    matched = labels.match(str(tmp_path / "labels"), [one, two])
    assert not matched.sources
    assert {one.reason for one in matched.refused} == {
        f"its labels {tmp_path}/labels/2020/t1.tif may be those of t1-a or of t1-b; say which by --pairs"
    }
    write_scene(tmp_path / "labels" / "2020" / "t1.tiff", np.ones((1, 40, 60), np.uint8))
    (refused,) = labels.match(str(tmp_path / "labels"), [one]).refused
    assert refused.reason.startswith("has several label files: ")
    assert "t1.tif, " in refused.reason
    assert "t1.tiff" in refused.reason


def test_a_scene_is_not_its_own_label(tmp_path):
    scene = scene_of(tmp_path / "all" / "scenes" / "t1.tif")
    label = write_scene(tmp_path / "all" / "t1.tif", np.ones((1, 40, 60), np.uint8))
    assert labels.match(str(tmp_path / "all"), [scene]).sources["t1"].url == label


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_in_composed_and_decomposed_unicode_are_the_same(tmp_path, form, other):
    scene = scene_of(tmp_path / unicodedata.normalize(form, "scènes/é") / unicodedata.normalize(form, "Zürich.tif"))
    label = tmp_path / "labels" / unicodedata.normalize(other, "é/Zürich.tif")
    write_scene(label, np.ones((1, 40, 60), np.uint8))
    assert [one.url for one in labels.match(str(tmp_path / "labels"), [scene]).sources.values()] == [str(label)]


@pytest.mark.parametrize(
    ("crs", "west", "north", "shape"),
    [
        ("EPSG:32601", 180_000, -1_810_000, shapely.box(138_000, -1_840_000, 199_000, -1_780_000)),
        ("EPSG:3035", 4.3e6, 5.395e6, shapely.box(2.6e6, 1.5e6, 6e6, 5.4e6)),
        ("EPSG:3413", 90_000, 4000, shapely.Point(0, 0).buffer(1e6)),
    ],
)
def test_shapes_are_laid_over_a_scene_as_they_are_drawn(tmp_path, crs, west, north, shape):
    """Across the antimeridian, with long sides, around a pole: their corners in degrees say nothing."""
    scene = scene_of(tmp_path / "s.tif", west=west, north=north, crs=crs)
    low = shapely.box(west, north - 400, west + 600, north - 300)
    url = write_shapes(tmp_path / "v.gpkg", [low, shape, low], crs, kind=[2, 1, 2])
    matched = labels.match(url, [scene], attribute="kind")
    expected = np.full((40, 60), 1)
    expected[30:] = 2
    assert np.array_equal(drawn(matched.sources["s"], scene), expected)
    far = scene_of(tmp_path / "far.tif", west=west, north=north - 2_500_000, crs=crs)
    if crs != "EPSG:3035":
        (refused,) = labels.match(url, [far], attribute="kind").refused
        assert "no shape of" in refused.reason
        assert "is the CRS that the file states the right one?" in refused.reason


def test_parts_of_a_shape_that_overlap_are_one(tmp_path):
    """Holes stay, where no other part lies; a bow-tie is what it was."""
    scene = scene_of(tmp_path / "s.tif", 80, 90)
    ring = shapely.difference(pixels(50, 5, 80, 35), pixels(60, 15, 70, 25))
    bow = shapely.Polygon([(WEST + 10 * col, NORTH - 10 * row) for col, row in ((0, 60), (20, 80), (20, 60), (0, 80))])
    shapes = [
        shapely.MultiPolygon([pixels(5, 5, 45, 45), pixels(20, 20, 55, 50)]),
        shapely.MultiPolygon([ring, pixels(62, 17, 68, 60)]),
        bow,
        shapely.MultiPolygon([pixels(70, 60, 75, 65), pixels(75, 60, 80, 70)]),  # side by side
        pixels(80, 70, 90, 80),
    ]
    url = write_shapes(tmp_path / "v.gpkg", shapes, kind=[0, 1, 2, 3, 4])
    features = labels.read_vector(url, "kind")
    expected = np.full((80, 90), IGNORE)
    expected[5:45, 5:45] = expected[20:50, 20:55] = 0
    expected[5:35, 50:80] = 1
    expected[15:25, 60:70] = IGNORE
    expected[17:60, 62:68] = 1
    expected[60:65, 70:75] = expected[60:70, 75:80] = 3
    expected[70:, 80:] = 4
    found = drawn(labels.match(url, [scene], attribute="kind").sources["s"], scene)
    assert np.array_equal(found[:60], expected[:60])
    assert np.array_equal(found[60:, 20:], expected[60:, 20:])
    assert features.left_out == 3  # with the one whose parts share a side, of which make_valid keeps a line
    as_before = shapely.make_valid(geopandas.read_file(url).geometry.to_numpy()[2:])
    as_before[1] = shapely.union_all([one for one in shapely.get_parts(as_before[1]) if one.area])
    assert list(features.wkb[2:]) == shapely.to_wkb(as_before).tolist()


PAM = '<PAMDataset><PAMRasterBand band="1">{}</PAMRasterBand></PAMDataset>'


def test_what_lies_beside_a_label_raster_is_part_of_it(tmp_path):
    """And read, though the raster itself is as it was, and open; what GDAL writes of its own accord is no change."""
    scene = scene_of(tmp_path / "s.tif")
    values = np.arange(2400, dtype=np.uint8).reshape(1, 40, 60) % 5
    url = write_scene(tmp_path / "l.tif", values)
    seen = []

    def look() -> np.ndarray:
        source = labels.match(url, [scene]).sources["s"]
        seen.append(source.identity())
        return drawn(source, scene)

    assert np.array_equal(look(), values[0])
    aux = Path(f"{url}.aux.xml")
    for number in (3, 4):
        aux.write_text(PAM.format(f"<NoDataValue>{number}</NoDataValue>"))
        assert np.array_equal(look(), np.where(values[0] == number, IGNORE, values[0]))
    aux.write_text(PAM.format('<NoDataValue>4</NoDataValue><Metadata><MDI key="STATISTICS_MEAN">2</MDI></Metadata>'))
    look()
    aux.write_text(PAM.format('<Metadata><MDI key="STATISTICS_MEAN">2</MDI></Metadata>'))
    assert np.array_equal(look(), values[0])
    aux.unlink()
    assert [set(one) for one in seen] == [{url}, *[{url, str(aux)}] * 3, {url}]
    assert seen[1] != seen[2] == seen[3]
    for mask in (values[0] < 2, values[0] < 3):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"):
            masked = write_scene(tmp_path / "masked" / "l.tif", values)
            with rasterio.open(masked, "r+") as file:
                file.write_mask(mask)
        shutil.copy(f"{masked}.msk", f"{url}.msk")
        assert np.array_equal(look(), np.where(mask, values[0], IGNORE))
    assert set(seen[-1]) == {url, f"{url}.msk"}
    assert seen[-1] != seen[-2]
    os.remove(f"{url}.msk")
    assert np.array_equal(look(), values[0])
    assert seen[-1] == seen[0]


def test_the_parts_of_a_shapefile_in_capitals_are_part_of_it(tmp_path):
    scene = scene_of(tmp_path / "s.tif")
    write_shapes(tmp_path / "v.shp", [pixels(0, 0, 10, 10)], kind=["a"])
    for path in tmp_path.glob("v.*"):
        path.rename(path.with_name(path.name.upper()))
    url = str(tmp_path / "V.SHP")
    before = labels.match(url, [scene], attribute="kind").sources["s"].identity()
    assert set(before) == {url, *(str(tmp_path / f"V.{one}") for one in ("DBF", "PRJ", "CPG"))}


@pytest.mark.parametrize("suffix", ["geojson", "gpkg", "shp", "parquet"])
def test_swapped_coordinates_are_swapped_back_as_it_is_told(tmp_path, suffix):
    frame = geopandas.GeoDataFrame({"kind": ["a"]}, geometry=[shapely.box(-33, 150, -32, 151)], crs=4326)
    url = str(tmp_path / f"v.{suffix}")
    frame.to_parquet(url) if suffix == "parquet" else frame.to_file(url)
    with pytest.raises(UsageError, match="look swapped") as error:
        labels.read_vector(url)
    command = shlex.split(re.search(r"python -c .*", str(error.value))[0])
    subprocess.run([sys.executable, *command[1:]], cwd=tmp_path, check=True)
    (made,) = tmp_path.glob("OUT.*")
    found = labels.read_vector(str(made), "kind")
    assert shapely.from_wkb(found.wkb[0]).bounds == (150, -33, 151, -32)
    assert found.values == ("a",)


@pytest.mark.parametrize(
    ("suffix", "said"),
    [
        ("shp", "add its .prj"),
        ("gpkg", "ogr2ogr -a_srs EPSG:N OUT.gpkg v.gpkg"),
        ("parquet", "geopandas.read_parquet('v.parquet').set_crs('EPSG:N').to_parquet('OUT.parquet')"),
    ],
)
def test_a_file_without_a_crs_is_told_how_to_state_it(tmp_path, suffix, said):
    frame = geopandas.GeoDataFrame({"kind": ["a"]}, geometry=[pixels(0, 0, 9, 9)])
    url = str(tmp_path / f"v.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame.to_parquet(url) if suffix == "parquet" else frame.to_file(url)
    with pytest.raises(UsageError, match="states no CRS") as error:
        labels.read_vector(url)
    assert said in str(error.value)
    assert ("prj" in str(error.value)) == (suffix == "shp")
