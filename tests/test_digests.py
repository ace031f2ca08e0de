"""What digests are taken over, and their values, for inputs written by hand.

Folders are found done by them. A value here that is another one makes what people have anew: a new field or option
leaves them as they are where it has its default, and is left out of what is stored. These values are never renewed
to let a change pass. They were taken by hand: sha256 of the sorted JSON, its first 16 digits.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from sattile import comparison, inference, mosaic, sheets, storage
from sattile.grid import Window, choose_geometry
from sattile.labels import LabelSource
from sattile.legend import Legend
from sattile.model import Bundle
from sattile.schema import Band, Scene, SegmentClass
from sattile.sheets import Layout, Weights
from sattile.strata import Regions
from sattile.training.reader import Dataset
from sattile.training.settings import Settings, said_by
from sattile.warp import Grid

UTM = "EPSG:32632"

# Two files of other grids, one with a mask beside it, a name with an accent, values of each type.
FULL = Scene(
    scene_id="été_T32TQM",
    url="hdfs://archive/2026/été, {band}.tif",
    height=320,
    width=512,
    bands=(
        Band("green", "hdfs://archive/2026/été, B03.tif", 1, "uint16", 0.0, 0.0001, -0.1),
        Band("nir", "hdfs://archive/2026/été, B08.tif", 2, "uint16", -9999.5, None, None, True),
    ),
    crs=UTM,
    transform=(10.0, 0.0, 600_000.0, 0.0, -10.0, 5_000_000.0),
    gsd=10.0,
    datetime="2026-03-05T10:30:00+00:00",
    footprint=bytes.fromhex("0103000000") + bytes(range(16)),
    identity={
        "hdfs://archive/2026/été, B03.tif": [327_680, 1_772_706_600_123_456_789],
        "hdfs://archive/2026/été, B03.tif.msk": [4_096, 1_772_706_600_000_000_000],
    },
)
BARE = Scene("drawing", "/d/drawing.tif", 3, 7, (Band("b1", "/d/drawing.tif", 1, "float32"),), None, (1, 0, 0, 0, 1, 0))

CLASSES = (SegmentClass(2, "land", "#ddcc77"), SegmentClass(7, "water", "#332288"))
BUNDLE = Bundle(
    url="/models/shore", bands=("green", "nir"), classes=CLASSES, values="raw", fill=(700.5, 800.0), total_stride=4,
    receptive_radius=21, input_shape=None, activation_bytes=96.0, gsd=10.0, output="scores", digest="ab" * 32,
)  # fmt: skip


def test_json_values() -> None:
    value = {"b": [1, 2.5, None, True, -0.0], "a": {"é": "ß"}, "c": 1e-7}
    assert storage.digest(value) == "f7f061d129c68f31"
    assert storage.digest({name: value[name] for name in ("c", "a", "b")}) == "f7f061d129c68f31"


def test_a_scene_as_json() -> None:
    """Kept as text: catalogues hold it, and evaluations take their digest over it."""
    assert BARE.to_json() == (
        '{"scene_id": "drawing", "url": "/d/drawing.tif", "height": 3, "width": 7, "bands": [{"name": "b1", "url": '
        '"/d/drawing.tif", "index": 1, "dtype": "float32", "nodata": null, "scale": null, "offset": null, "forced": '
        'false}], "crs": null, "transform": [1, 0, 0, 0, 1, 0], "gsd": null, "datetime": null, "footprint": null, '
        '"identity": {}}'
    )
    assert storage.digest(FULL.to_json()) == "23ccd3d5a1a8758a"
    whole = replace(FULL, footprint=shapely.to_wkb(shapely.box(8, 45, 9, 46)))  # read back, an outline has to be one
    assert Scene.from_json(whole.to_json()) == whole


def test_the_source_of_a_map() -> None:
    assert mosaic.source_digest(BARE) == "07285a723bd219ad"
    assert mosaic.source_digest(FULL) == "c03fa6ca88976388"
    assert mosaic.Target.of(FULL).source == "c03fa6ca88976388"


def test_the_source_of_a_sheet() -> None:
    grid = Grid(UTM, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0))
    corner = (10, 0, 601_000, 0, -10, 4_999_000)
    older = replace(FULL, scene_id="a", datetime="2026-03-04T10:30:00+00:00", transform=corner)
    for rule, expected in (("all", "8ad00ac00dc918ba"), ("newest", "f55710cc98a071bd")):
        (sheet,) = sheets.plan_sheets([FULL, older], Layout(grid, 1 << 20, 512, rule, Weights()))[0]
        assert (sheet.target.source, sheet.window) == (expected, Window(-500_000, 60_000, 420, 612))


def test_how_a_grid_is_laid_out() -> None:
    plain = Layout(Grid(UTM, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0)), 16_384, 1024, "all", Weights())
    said: dict[str, Any] = {
        "grid": "EPSG:32632", "transform": [10.0, 0.0, 0.0, 0.0, -10.0, 0.0], "limits": None, "sheet": 16_384,
        "block": 1024, "rule": "all", "weights": {"edge": False, "cloud": None},
    }  # fmt: skip
    assert plain.describe() == said
    file = replace(
        plain, grid=replace(plain.grid, limits=Window(3, 5, 70, 90), is_file=True), weights=Weights(True, "cp")
    )
    assert file.describe() == {**said, "limits": [3, 5, 70, 90], "weights": {"edge": True, "cloud": "cp"}}


def test_what_shapes_a_map() -> None:
    geometry = choose_geometry(total_stride=4, radius=21, input_shape=None, merge="crop", size=128, halo=24)
    job = inference.Inference(BUNDLE, geometry, 16, "openvino", 1, BUNDLE.fill)
    said = {
        "model": "2143e75dc41d7f59", "merge": "crop", "size": 128, "stride": 128, "halo": 24, "total_stride": 4,
        "fixed": False, "batch": 16, "engine": "openvino", "threads": 1, "fill": [700.5, 800.0], "threshold": None,
        "nodata": None, "aoi": None,
    }  # fmt: skip
    assert inference.describe_job(job) == said
    chosen = replace(
        job, threshold=0.25, nodata=-1.0, aoi=(b"\1\2", UTM), tta="flips", rescale=(1.0, -1000.0),
        scores=True, coverage=True, image=True,
    )  # fmt: skip
    assert inference.describe_job(chosen) == said | {
        "threshold": 0.25, "nodata": -1.0, "aoi": "5233b335076000b2", "tta": "flips", "rescale": [1.0, -1000.0],
    }  # fmt: skip


def test_labels_are_their_files(tmp_path: Path) -> None:
    """Not what is drawn of them, nor which classes: those are in a run's settings."""
    for name in ("a.tif", "s.shp", "s.dbf", "s.prj", "s.shx"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, ns=(0, 1_772_706_600_123_456_789))
    version = [5, 1_772_706_600_123_456_789]
    raster = LabelSource(f"{tmp_path}/a.tif", legend=Legend(ignore=(9,)))
    assert raster.identity() == {f"{tmp_path}/a.tif": version}
    band = LabelSource(f"{tmp_path}/a.tif", "2")
    assert band.identity() == {f"{tmp_path}/a.tif:2": version}
    vector = LabelSource(f"{tmp_path}/s.shp", shapes=b"\1", crs=UTM, background=0)
    assert list(vector.identity().items()) == [(f"{tmp_path}/s.{suffix}", version) for suffix in ("shp", "dbf", "prj")]
    assert LabelSource("/nowhere.tif").identity() == {"/nowhere.tif": [0, 0]}


def test_regions_and_counted_pixels() -> None:
    assert Regions(("north", "süd"), (b"\1\2", b"\xff"), UTM).digest == "179854c4916c9aaf"
    one, two = np.array([[5, 1], [0, 7]]), np.array([[2, 2], [3, 3]])
    counted = {("s", "1/2", None): one, ("s", "1/3", "north"): two}
    turned = {(*key[:2], None): table[::-1, ::-1] for key, table in reversed(counted.items())}
    assert comparison._pixels(["land", "water"], counted) == "a65f44feb5a61c87"
    assert comparison._pixels(*comparison._by_name(["water", "land"], turned)) == "a65f44feb5a61c87"


DATASET = Dataset(
    url="/tiles", bands=("green", "nir"), classes=CLASSES, size=64, statistics={}, mean=np.zeros(2), std=np.ones(2),
    description={"digest": "cd" * 32},
)  # fmt: skip

SAID: dict[str, Any] = {
    "arch": "unet-small", "indices": [], "start_from": None, "epochs": 30, "batch_size": 16, "accumulate": 1,
    "learning_rate": 0.002, "weight_decay": 0.001, "precision": "float32", "warmup": 1.0, "dice": 1.0,
    "label_smoothing": 0.0, "hard_share": 1.0, "class_weights": "none", "sampling": "uniform", "patience": 0,
    "augment": True, "seed": 0,
}  # fmt: skip


def test_what_shapes_a_training() -> None:
    made_of = {"dataset": "cd" * 32, "bands": ["green", "nir"], "classes": {"2": "land", "7": "water"}}
    assert Settings().to_dict() == SAID
    assert said_by(Settings(), DATASET) == SAID | made_of
    # Of a checkpoint, which goes on, and of a trial's folder.
    assert storage.digest(said_by(Settings(), DATASET)) == "a07a0a29ff8ac215"
    chosen = Settings(arch="nets:small", indices=("ndwi", "green~nir"), haze=0.5, epochs=3, seed=11)
    own = {"arch": "nets:small", "indices": ["ndwi", "green~nir"], "haze": 0.5, "epochs": 3, "seed": 11}
    assert said_by(chosen, DATASET, "f1") == SAID | own | made_of | {"network": "f1"}
    assert storage.digest(said_by(chosen, DATASET, "f1")) == "26e564d4599539ad"


@pytest.mark.parametrize("text", [FULL.to_json(), BARE.to_json()])
def test_what_is_stored_has_no_field_that_was_not_there(text: str) -> None:
    value = json.loads(text)
    assert list(value) == [
        "scene_id", "url", "height", "width", "bands", "crs", "transform", "gsd", "datetime", "footprint", "identity",
    ]  # fmt: skip
    for band in value["bands"]:
        assert list(band) == ["name", "url", "index", "dtype", "nodata", "scale", "offset", "forced"]
