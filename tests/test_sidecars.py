"""What GIS programs read of a labels map: names and colours, asked for by GDAL's own functions in C."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_double, c_int, c_short, c_void_p
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
import rasterio._base
from test_mosaic import files_of, scene_of, validate

from sattile import mosaic, sidecars, stac
from sattile.grid import Window
from sattile.mosaic import Part, Product, Target
from sattile.schema import SegmentClass

CLASSES = (
    SegmentClass(0, "bare land", "#ddcc77"), SegmentClass(2, "Löss & <Lehm>", "#332288"),
    SegmentClass(7, "open water", "#88CCEE"),
)  # fmt: skip
PRODUCT = Product(CLASSES, "settings-1", on_grid=True)

NAMES = ["bare land", "", "Löss & <Lehm>", "", "", "", "", "open water"]
COLORS = {0: (0xDD, 0xCC, 0x77, 255), 2: (0x33, 0x22, 0x88, 255), 7: (0x88, 0xCC, 0xEE, 255)}
TABLE = [
    [0, "bare land", 0xDD, 0xCC, 0x77, 255], [2, "Löss & <Lehm>", 0x33, 0x22, 0x88, 255],
    [7, "open water", 0x88, 0xCC, 0xEE, 255],
]  # fmt: skip
USAGES = [5, 2, 6, 7, 8, 9]
"""GFU_MinMax, GFU_Name, GFU_Red, GFU_Green, GFU_Blue, GFU_Alpha: https://gdal.org/en/stable/api/raster_c_api.html"""


class ColorEntry(ctypes.Structure):
    _fields_ = [(name, c_short) for name in ("red", "green", "blue", "alpha")]


@pytest.fixture(scope="module")
def gdal() -> Any:
    """GDAL's C API: what rasterio's own module is linked with, however the wheel calls it."""
    library = ctypes.CDLL(rasterio._base.__file__)
    library.GDALGetRasterCategoryNames.restype = POINTER(c_char_p)
    library.GDALGetColorEntry.restype = POINTER(ColorEntry)
    library.GDALRATGetValueAsString.restype = c_char_p
    library.GDALRATGetNameOfCol.restype = c_char_p
    library.GDALGetMetadataItem.restype = c_char_p
    for name in ("GDALOpen", "GDALGetRasterBand", "GDALGetDefaultRAT", "GDALGetRasterColorTable"):
        getattr(library, name).restype = c_void_p
    library.GDALAllRegister()
    return library


@contextmanager
def opened(gdal: Any, path: Path) -> Iterator[tuple[c_void_p, c_void_p]]:
    """A file and its first band; what GDAL would write into the sidecar is written when it is closed."""
    dataset = c_void_p(gdal.GDALOpen(os.fsencode(path), 0))
    assert dataset
    try:
        # GDAL 3.10 looks for a GeoTIFF's sidecar only when it is asked for something like this.
        gdal.GDALGetGeoTransform(dataset, (c_double * 6)())
        yield dataset, c_void_p(gdal.GDALGetRasterBand(dataset, 1))
    finally:
        gdal.GDALClose(dataset)


def read(gdal: Any, path: Path) -> dict[str, Any]:
    """What the first band says of its values."""
    with opened(gdal, path) as (_, band):
        names = []
        found = gdal.GDALGetRasterCategoryNames(band)
        while found and found[len(names)] is not None:
            names.append(found[len(names)].decode())
        colors = c_void_p(gdal.GDALGetRasterColorTable(band))
        entries = [gdal.GDALGetColorEntry(colors, value)[0] for value in range(gdal.GDALGetColorEntryCount(colors))]
        table = c_void_p(gdal.GDALGetDefaultRAT(band))
        assert table
        columns = range(gdal.GDALRATGetColumnCount(table))
        kinds = [gdal.GDALRATGetTypeOfCol(table, column) for column in columns]
        rows = [
            [
                gdal.GDALRATGetValueAsString(table, row, column).decode()
                if kinds[column] == 2
                else gdal.GDALRATGetValueAsInt(table, row, column)
                for column in columns
            ]
            for row in range(gdal.GDALRATGetRowCount(table))
        ]
        return {
            "names": names,
            "colors": [(one.red, one.green, one.blue, one.alpha) for one in entries],
            "columns": [gdal.GDALRATGetNameOfCol(table, column).decode() for column in columns],
            "usages": [gdal.GDALRATGetUsageOfCol(table, column) for column in columns],
            "table": rows,
        }


def write_statistics(gdal: Any, path: Path) -> None:
    with opened(gdal, path) as (_, band):
        numbers = [c_double() for _ in range(4)]
        assert gdal.GDALComputeRasterStatistics(band, c_int(0), *map(byref, numbers), None, None) == 0


def check(found: dict[str, Any]) -> None:
    assert found["names"] == NAMES
    assert found["colors"] == [COLORS.get(value, (0, 0, 0, 0)) for value in range(256)]
    assert found["columns"] == ["Value", "Class", "Red", "Green", "Blue", "Alpha"]
    assert found["usages"] == USAGES
    assert found["table"] == TABLE


def write_map(out: Path, scene_id: str = "a", product: Product = PRODUCT, **changes: Any) -> Path:
    """A published map of 40 x 90 px, all classes in it, and an id that is none of them."""
    scene = scene_of(scene_id, shape=(40, 90), **changes)
    labels = np.resize(np.array([0, 2, 7, 255, 7], np.uint8), scene.height * scene.width).reshape(40, 90)
    target = Target.of(scene)
    target.properties[mosaic.WINDOW] = [0, 0, 40, 90]
    staged = out / mosaic.STAGING / "x"
    mosaic.write_map(target, [Part(Window(0, 0, 40, 90), labels)], product, str(staged))
    mosaic.publish(str(staged), str(out), scene_id)
    return out / scene_id


def amend(out: Path, target: Target | None = None) -> None:
    for name, item in mosaic.finished(str(out)):
        mosaic.amend(str(out), name, item, target)


def stamps(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_gdal_reads_names_colours_and_a_table_of_a_map(tmp_path: Path, gdal: Any) -> None:
    check(read(gdal, write_map(tmp_path) / "labels.tif"))


def test_gdal_reads_the_same_of_the_vrt_over_all_sheets(tmp_path: Path, gdal: Any) -> None:
    write_map(tmp_path)
    mosaic.write_whole(str(tmp_path), PRODUCT, (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))
    check(read(gdal, tmp_path / "labels.vrt"))
    assert (tmp_path / "labels.qml").read_bytes() == (tmp_path / "a" / "labels.qml").read_bytes()
    before = stamps(tmp_path)
    mosaic.write_whole(str(tmp_path), PRODUCT, (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))
    assert stamps(tmp_path) == before
    (tmp_path / "labels.qml").unlink()
    mosaic.write_whole(str(tmp_path), PRODUCT, (10.0, 0.0, 5e5, 0.0, -10.0, 5e6))
    assert stamps(tmp_path).keys() == before.keys()
    mosaic.remove_whole(str(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.is_file()]


def test_the_style_has_a_colour_and_a_name_for_each_class_and_for_nothing_else(tmp_path: Path) -> None:
    root = Xml.parse(write_map(tmp_path) / "labels.qml").getroot()
    assert root.tag == "qgis"
    renderer = root.find("pipe/rasterrenderer")
    assert renderer is not None
    assert (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    assert [one.attrib for one in renderer.iterfind("colorPalette/paletteEntry")] == [
        {"value": "0", "label": "bare land", "color": "#ddcc77", "alpha": "255"},
        {"value": "2", "label": "Löss & <Lehm>", "color": "#332288", "alpha": "255"},
        {"value": "7", "label": "open water", "color": "#88ccee", "alpha": "255"},
    ]


def test_no_sidecar_decides_whether_a_map_is_done(tmp_path: Path) -> None:
    folder = write_map(tmp_path)
    item = json.loads((folder / "item.json").read_text())
    assert {asset["href"] for asset in item["assets"].values()} == {"./labels.tif", "./quicklook.png"}
    target = Target.of(scene_of("a", shape=(40, 90)))
    (folder / "labels.tif.aux.xml").write_text("<PAMDataset/>")
    (folder / "labels.qml").unlink()
    assert mosaic.is_done(str(tmp_path), target, PRODUCT)


def test_what_is_missing_of_the_sidecars_is_written_again_and_nothing_else(tmp_path: Path) -> None:
    """As over a folder of before there were any: from the item alone, to the byte as the writer of a map does."""
    write_map(tmp_path)
    write_map(tmp_path, "undated", datetime=None)
    whole, before = files_of(tmp_path), stamps(tmp_path)
    amend(tmp_path)
    assert stamps(tmp_path) == before
    for damage in (None, b"", b"<PAMData", b"<PAMDataset/>"):
        for path in tmp_path.glob("*/labels.tif.aux.xml"):
            path.unlink()
            if damage is not None:
                path.write_bytes(damage)
        (tmp_path / "a" / "labels.qml").unlink()
        amend(tmp_path)
        assert files_of(tmp_path) == whole
        kept = {name: stamp for name, stamp in stamps(tmp_path).items() if "labels." not in name or name[-1] == "f"}
        assert kept == {name: before[name] for name in kept}


def test_statistics_that_a_reader_writes_stay_and_leave_the_names(tmp_path: Path, gdal: Any) -> None:
    folder = write_map(tmp_path)
    path = folder / "labels.tif.aux.xml"
    write_statistics(gdal, folder / "labels.tif")
    rewritten = path.read_bytes()
    assert b"STATISTICS_MAXIMUM" in rewritten
    check(read(gdal, folder / "labels.tif"))
    amend(tmp_path)
    assert path.read_bytes() == rewritten
    path.unlink()  # statistics of a map of before, without names
    write_statistics(gdal, folder / "labels.tif")
    assert b"STATISTICS_MAXIMUM" in path.read_bytes()
    amend(tmp_path)
    check(read(gdal, folder / "labels.tif"))


def test_a_style_of_the_user_s_stays(tmp_path: Path) -> None:
    style = write_map(tmp_path) / "labels.qml"
    style.write_text("<qgis><!-- mine --></qgis>")
    amend(tmp_path)
    assert style.read_text() == "<qgis><!-- mine --></qgis>"


@pytest.mark.parametrize("name", ["a\x0bb\x00", "  two  spaces ", "tab\tand\nline", "\ud800", "<![CDATA[x]]>", ""])
def test_any_name_fits_into_xml_and_is_known_again(name: str, tmp_path: Path, gdal: Any) -> None:
    classes = (SegmentClass(0, "first", "#000000"), SegmentClass(254, name, "#ffffff"))
    data = sidecars.pam(classes, {})
    assert sidecars.names_classes(data, classes)
    assert not sidecars.names_classes(data, (SegmentClass(0, "other", "#000000"),))
    Xml.fromstring(sidecars.style(classes))
    folder = write_map(tmp_path)
    (folder / "labels.tif.aux.xml").write_bytes(data)
    write_statistics(gdal, folder / "labels.tif")
    assert sidecars.names_classes((folder / "labels.tif.aux.xml").read_bytes(), classes)
    assert len(read(gdal, folder / "labels.tif")["names"]) == 255


# ---------------------------------------------------------------- the time


QUARTER = ("2020-01-01T00:00:00Z", "2020-03-31T23:59:59Z")


def times_of(folder: Path) -> dict[str, Any]:
    properties = json.loads((folder / "item.json").read_text())["properties"]
    return {name: properties[name] for name in (*mosaic.TIMES, stac.UNDATED) if name in properties}


def tags_of(path: Path) -> dict[str, str]:
    with rasterio.open(path) as file:
        return {name: text for name, text in file.tags().items() if "datetime" in name.lower()}


@pytest.mark.parametrize(
    ("stated", "expected", "extent"),
    [
        (
            {"datetime": None, "interval": QUARTER},
            {"datetime": None, "start_datetime": QUARTER[0], "end_datetime": QUARTER[1]},
            [*QUARTER],
        ),
        (
            {"datetime": "2020-02-01T00:00:00Z", "interval": QUARTER},
            {"datetime": "2020-02-01T00:00:00Z", "start_datetime": QUARTER[0], "end_datetime": QUARTER[1]},
            [*QUARTER],
        ),
        ({"datetime": "2020-02-01T00:00:00Z"}, {"datetime": "2020-02-01T00:00:00Z"}, ["2020-02-01T00:00:00Z"] * 2),
        (
            {"datetime": None},
            {
                "datetime": None,
                "start_datetime": "1970-01-01T00:00:00Z",
                "end_datetime": "2099-12-31T23:59:59Z",
                "sattile:datetime_missing": True,
            },
            [None, None],
        ),
    ],
    ids=["composite", "composite with a nominal time", "acquisition", "undated"],
)
def test_a_map_says_when_it_is_of_and_claims_nothing_else(
    stated: dict[str, Any], expected: dict[str, Any], extent: list[str | None], tmp_path: Path, shared_data: Path
) -> None:
    folder = write_map(tmp_path, **stated)
    validate(folder / "item.json", shared_data / "stac-schemas")
    assert times_of(folder) == expected
    mosaic.write_collection(str(tmp_path), PRODUCT)
    validate(tmp_path / "collection.json", shared_data / "stac-schemas")
    collection = json.loads((tmp_path / "collection.json").read_text())
    assert collection["extent"]["temporal"]["interval"] == [extent]
    claimed = {name: text for name, text in expected.items() if text and stac.UNDATED not in expected}
    assert tags_of(folder / "labels.tif") == claimed
    if extent == [None, None]:
        for path in (folder / "labels.tif", folder / "labels.tif.aux.xml", tmp_path / "collection.json"):
            assert b"1970" not in path.read_bytes()
            assert b"2099" not in path.read_bytes()


def test_a_map_of_before_intervals_were_kept_stays_done_and_learns_its_own(tmp_path: Path) -> None:
    """It has the first time of the composite as its datetime."""
    folder = write_map(tmp_path, datetime=QUARTER[0])
    before, stamp = files_of(folder), stamps(folder)
    target = Target.of(scene_of("a", shape=(40, 90), datetime=None, interval=QUARTER))
    assert mosaic.is_done(str(tmp_path), target, PRODUCT)
    amend(tmp_path, target)
    assert times_of(folder) == {"datetime": None, "start_datetime": QUARTER[0], "end_datetime": QUARTER[1]}
    assert tags_of(folder / "labels.tif") == {"start_datetime": QUARTER[0], "end_datetime": QUARTER[1]}
    now = files_of(folder)
    assert {name for name in before if before[name] != now[name]} == {"item.json", "labels.tif.aux.xml"}
    assert stamps(folder)["labels.tif"] == stamp["labels.tif"]
    stamp = stamps(folder)
    amend(tmp_path, target)
    assert stamps(folder) == stamp


def test_an_item_of_before_placeholders_were_flagged_is_left_as_it_is(tmp_path: Path) -> None:
    folder = write_map(tmp_path, datetime=None)
    item = json.loads((folder / "item.json").read_text())
    del item["properties"][stac.UNDATED]
    (folder / "item.json").write_text(json.dumps(item))
    before = files_of(folder)
    amend(tmp_path, Target.of(scene_of("a", shape=(40, 90), datetime=None)))
    assert files_of(folder) == before
    mosaic.write_collection(str(tmp_path), PRODUCT)
    assert "1970" not in (tmp_path / "collection.json").read_text()
