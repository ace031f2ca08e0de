"""What is written for a scene, and how it becomes visible."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pystac
import pytest
import rasterio
import rasterio.shutil
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from maps_for_tests import validate
from rasterio.crs import CRS
from rio_cogeo import cog_validate

from sattile import cog, mosaic, stac
from sattile.grid import Window, blocks
from sattile.mosaic import ITEM, Part, Product, Target
from sattile.schema import Band, Scene, SegmentClass

CLASSES = (SegmentClass(0, "bare land", "#ddcc77"), SegmentClass(7, "water", "#332288"))
PRODUCT = Product(CLASSES, "settings-1", scores=True, coverage=True)
UTM = CRS.from_epsg(32633).to_wkt()

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def scene_of(
    scene_id: str = "S2, 2020 a",
    *,
    shape: tuple[int, int] = (700, 1100),
    crs: str | None = UTM,
    transform: tuple[float, ...] = (10.0, 0.0, 5e5, 0.0, -10.0, 5e6),
    datetime: str | None = "2020-06-01T10:00:00Z",
    interval: tuple[str, str] | None = None,
) -> Scene:
    import shapely

    footprint = shapely.to_wkb(shapely.box(15.0, 45.0, 15.1, 45.2)) if crs else None
    band = Band("B02", f"/archive/{scene_id}.tif", 1, "uint16")
    return Scene(
        scene_id, band.url, *shape, (band,), crs, transform,  # type: ignore[arg-type]
        gsd=10.0 if crs else None, datetime=datetime, footprint=footprint, identity={band.url: [123, 456]},
        interval=interval,
    )  # fmt: skip


def result_of(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels that encode their position, with a collar of nodata; scores and coverage to match."""
    rows, cols = np.mgrid[: scene.height, : scene.width]
    valid = rows >= 30
    labels = np.where(valid, np.where((rows // 64 + cols // 128) % 3 == 0, 7, 0), 255).astype(np.uint8)
    scores = np.dstack([rows, cols]).astype(np.float32)
    scores[~valid] = np.nan
    return labels, scores, (valid * (rows + 1)).astype(np.uint32)


def parts_of(scene: Scene, edge: int = 512) -> list[Part]:
    labels, scores, coverage = result_of(scene)
    return [
        Part(one, labels[one.slices()], scores[one.slices()], coverage[one.slices()])
        for one in blocks(scene.height, scene.width, edge)
    ]


def files_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    "scene",
    [
        scene_of(),
        scene_of("no-crs", crs=None, transform=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0), datetime=None),
        scene_of("rotated", transform=(8.0, 3.0, 5e5, 3.0, -8.0, 5e6)),
        scene_of("south-up", transform=(10.0, 0.0, 5e5, 0.0, 10.0, 4.9e6)),
        scene_of("oblong", transform=(10.0, 0.0, 5e5, 0.0, -25.0, 5e6)),
        scene_of("tiny", shape=(1, 3)),
    ],
    ids=lambda scene: scene.scene_id,
)
def test_a_finished_folder_is_valid_and_keeps_the_scene_s_grid(scene: Scene, tmp_path: Path, shared_data: Path) -> None:
    folder = tmp_path / scene.scene_id
    mosaic.write_map(Target.of(scene), parts_of(scene), PRODUCT, str(folder))
    assert sorted(files_of(folder)) == [
        "coverage.tif", "item.json", "labels.qml", "labels.tif", "labels.tif.aux.xml", "quicklook.png", "scores.tif",
    ]  # fmt: skip
    labels, scores, coverage = result_of(scene)
    for name, expected in (("labels", labels), ("scores", scores), ("coverage", coverage)):
        path = folder / f"{name}.tif"
        is_cog, errors, _ = cog_validate(path, quiet=True)
        assert is_cog, errors
        with rasterio.open(path) as file:
            found = file.read().transpose(1, 2, 0)
            np.testing.assert_array_equal(found, expected.reshape(found.shape))
            assert file.transform[:6] == scene.transform
            assert (file.crs.to_wkt() if file.crs else None) == (
                CRS.from_user_input(UTM).to_wkt() if scene.crs else None
            )
            if max(scene.height, scene.width) > 512:
                assert file.overviews(1)
    with rasterio.open(folder / "labels.tif") as file:
        assert file.nodata == 255
        assert file.colormap(1)[7] == (0x33, 0x22, 0x88, 255)
        if file.overviews(1):
            # Class ids are never averaged: 3 would be one.
            small = file.read(1, out_shape=(file.height // 2, file.width // 2))
            assert set(np.unique(small)) <= {0, 7, 255}
    with rasterio.open(folder / "scores.tif") as file:
        assert file.descriptions == ("bare land", "water")
        assert np.isnan(file.nodata)

    mosaic.write_collection(str(tmp_path), PRODUCT)
    item = pystac.Item.from_file(str(folder / ITEM))
    validate(folder / ITEM, shared_data / "stac-schemas")
    assert item.id == scene.scene_id
    asset = item.assets["labels"]
    data = (folder / "labels.tif").read_bytes()
    assert asset.extra_fields["file:size"] == len(data)
    assert asset.extra_fields["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
    assert item.properties["proj:shape"] == [scene.height, scene.width]
    assert item.properties.get("proj:code") == ("EPSG:32633" if scene.crs else None)


@settings(deadline=None)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16]),
        st.tuples(st.integers(1, 9), st.integers(1, 9)),
        elements=st.sampled_from([0, 1, 7, 255]),
    ),
    st.sampled_from([255, None]),
)
def test_an_overview_s_pixel_is_the_most_frequent_of_four(values: np.ndarray, nodata: int | None) -> None:
    found = cog.mode(values, nodata)
    assert found.dtype == values.dtype
    assert found.shape == (-(-values.shape[0] // 2), -(-values.shape[1] // 2))
    for row, col in np.ndindex(found.shape):
        four = values[2 * row : 2 * row + 2, 2 * col : 2 * col + 2].ravel().tolist()
        voting = [one for one in four if one != nodata] or four
        assert found[row, col] == max(voting, key=voting.count)  # the first of the most frequent


def test_all_overviews_of_labels_are_modes_as_gdal_makes_them(tmp_path: Path) -> None:
    """Larger than what is halved at once; sides that stay even and blobs, as GDAL rounds and decides ties otherwise."""
    scene = scene_of(shape=(4512, 1120))
    rows, cols = np.mgrid[: scene.height, : scene.width]
    labels = np.where(rows < 64, 255, np.where((rows // 64 + cols // 128) % 3 == 0, 7, 0)).astype(np.uint8)
    part = Part(Window(0, 0, *labels.shape), labels)
    mosaic.write_map(Target.of(scene), [part], Product(CLASSES, "x"), str(tmp_path / "s"))
    rasterio.shutil.copy(
        tmp_path / "s" / "labels.tif",
        tmp_path / "gdal.tif",
        driver="COG",
        overview_resampling="mode",
        overviews="IGNORE_EXISTING",
    )
    level, expected = 0, labels
    while max(expected.shape) > 512:
        expected = cog.mode(expected, 255)
        for path in ("s/labels.tif", "gdal.tif"):
            with rasterio.open(tmp_path / path, overview_level=level) as file:
                np.testing.assert_array_equal(file.read(1), expected)
        level += 1
    with rasterio.open(tmp_path / "s" / "labels.tif") as file:
        assert len(file.overviews(1)) == level == 4


@settings(deadline=None, max_examples=8)
@given(st.randoms(use_true_random=False), st.sampled_from([100, 256, 512, 640]))
def test_the_bytes_do_not_depend_on_the_blocks_or_their_order(
    tmp_path_factory: pytest.TempPathFactory, order: random.Random, edge: int
) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    scene = scene_of(shape=(600, 900))
    mosaic.write_map(Target.of(scene), parts_of(scene), PRODUCT, str(folder / "one"))
    parts = parts_of(scene, edge)
    order.shuffle(parts)
    mosaic.write_map(Target.of(scene), parts, PRODUCT, str(folder / "two"))
    assert files_of(folder / "one") == files_of(folder / "two")


def test_what_no_part_covers_is_nodata(tmp_path: Path) -> None:
    scene = scene_of()
    part = parts_of(scene)[-1]
    mosaic.write_map(Target.of(scene), [part], PRODUCT, str(tmp_path / "s"))
    outside = np.ones((scene.height, scene.width), bool)
    outside[part.window.slices()] = False
    with rasterio.open(tmp_path / "s" / "labels.tif") as file:
        assert (file.read(1)[outside] == 255).all()
    with rasterio.open(tmp_path / "s" / "scores.tif") as file:
        assert np.isnan(file.read()[:, outside]).all()
    with rasterio.open(tmp_path / "s" / "coverage.tif") as file:
        assert (file.read(1)[outside] == 0).all()


def publish(out: Path, scene: Scene, product: Product, stop: int | None = None) -> None:
    """Write and publish a scene; `stop` dies before that rename or removal."""
    staged = out / mosaic.STAGING / "x"
    # Other settings give other pixels.
    parts = parts_of(scene)
    if product.settings != PRODUCT.settings:
        parts = [
            Part(one.window, one.labels, one.scores, one.coverage + 1) for one in parts if one.coverage is not None
        ]
    mosaic.write_map(Target.of(scene), parts, product, str(staged))
    if stop is None:
        mosaic.publish(str(staged), str(out), scene.scene_id)
        return
    steps = iter(range(100))

    def dying(function: Any) -> Any:
        def run(*args: str) -> None:
            if next(steps) == stop:
                raise KeyboardInterrupt
            function(*args)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mosaic.storage, "rename", dying(mosaic.storage.rename))
        patch.setattr(mosaic.storage, "remove", dying(mosaic.storage.remove))
        mosaic.publish(str(staged), str(out), scene.scene_id)


@pytest.mark.parametrize("scores", [True, False])
@pytest.mark.parametrize("stop", range(10))
def test_a_replacement_that_dies_anywhere_leaves_a_folder_that_counts_as_old_new_or_unfinished(
    tmp_path: Path, stop: int, scores: bool
) -> None:
    scene = scene_of(shape=(40, 60))
    new = Product(CLASSES, "settings-2", scores=scores, coverage=True)  # as many files, or one less
    publish(tmp_path, scene, PRODUCT)
    assert mosaic.is_done(str(tmp_path), Target.of(scene), PRODUCT)
    assert not mosaic.is_done(str(tmp_path), Target.of(scene), new)
    try:
        publish(tmp_path, scene, new, stop)
        died = False
    except KeyboardInterrupt:
        died = True
    done = [product for product in (PRODUCT, new) if mosaic.is_done(str(tmp_path), Target.of(scene), product)]
    assert len(done) <= 1
    assert died or done == [new]
    item = mosaic.read_item(str(tmp_path), scene.scene_id)
    assert (item is not None) == bool(done)
    if item is not None:
        for asset in item["assets"].values():
            data = (tmp_path / scene.scene_id / asset["href"]).read_bytes()
            assert asset["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
    publish(tmp_path, scene, new)  # the next run finishes it
    assert mosaic.is_done(str(tmp_path), Target.of(scene), new)
    classes = ["labels.qml", "labels.tif", "labels.tif.aux.xml"]
    expected = ["coverage.tif", "item.json", *classes, "quicklook.png", *["scores.tif"] * scores]
    assert sorted(files_of(tmp_path / scene.scene_id)) == expected


def test_a_scene_is_done_only_if_settings_input_and_files_are_as_they_were(tmp_path: Path) -> None:
    scene = scene_of(shape=(40, 60))
    publish(tmp_path, scene, PRODUCT)
    out, folder = str(tmp_path), tmp_path / scene.scene_id
    assert mosaic.is_done(out, Target.of(scene), PRODUCT)
    changed = Scene.from_json(scene.to_json().replace("456", "457"))
    assert not mosaic.is_done(out, Target.of(changed), PRODUCT)
    text = (folder / ITEM).read_text()
    for broken in (text[: len(text) // 2], "[]", "{}"):
        (folder / ITEM).write_text(broken)
        assert not mosaic.is_done(out, Target.of(scene), PRODUCT)
    (folder / ITEM).write_text(text)
    assert mosaic.is_done(out, Target.of(scene), PRODUCT)
    os.truncate(folder / "labels.tif", 100)
    assert not mosaic.is_done(out, Target.of(scene), PRODUCT)


def test_digests_of_scenes_are_what_they_were_and_an_interval_is_not_in_them() -> None:
    """Written down by the code of before intervals were kept, when a composite had the first of its times."""
    band = Band("B02", "/archive/a.tif", 1, "uint16", nodata=0.0)
    scene = Scene(
        "a", "/archive/a.tif", 61, 83, (band,), "EPSG:32633", (10.0, 0.0, 5e5, 0.0, -10.0, 5e6), gsd=10.0,
        datetime="2020-01-01T00:00:00Z", footprint=b"\x01\x02", identity={"/archive/a.tif": [123, 456]},
    )  # fmt: skip
    bare = Scene("u", "/archive/u.tif", 61, 83, (band,), None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0))
    assert (mosaic.source_digest(scene), mosaic.source_digest(bare)) == ("e779f0f3c3ff3c27", "ca72c0100417b07a")
    # As in the state of an evaluation of scenes: the text itself.
    texts = [one.source_json() for one in (scene, bare)]
    assert mosaic.storage.digest([texts, ["v"]]) == "45fd089410bc7a4f"
    interval = ("2020-01-01T00:00:00Z", "2020-03-31T00:00:00Z")
    for datetime in (None, "2020-01-01T00:00:00Z"):
        composite = dataclasses.replace(scene, datetime=datetime, interval=interval)
        assert mosaic.source_digest(composite) == "e779f0f3c3ff3c27"


def test_the_collection_lists_what_is_finished_and_is_valid(tmp_path: Path, shared_data: Path) -> None:
    scenes = [scene_of("a, b", shape=(40, 60)), scene_of("c", shape=(60, 40), crs=None, datetime=None)]
    for scene in scenes:
        publish(tmp_path, scene, PRODUCT)
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "_run.json").write_text("{}")
    mosaic.write_collection(str(tmp_path), PRODUCT)
    collection = pystac.Collection.from_file(str(tmp_path / "collection.json"))
    validate(tmp_path / "collection.json", shared_data / "stac-schemas")
    assert [item.id for item in collection.get_items()] == ["a, b", "c"]
    assert all(item.get_collection() is not None for item in collection.get_items())
    assert collection.extent.spatial.bboxes == [[15.0, 45.0, 15.1, 45.2]]
    before = os.stat(tmp_path / "collection.json").st_mtime_ns
    mosaic.write_collection(str(tmp_path), PRODUCT)
    assert os.stat(tmp_path / "collection.json").st_mtime_ns == before


def test_a_collection_of_nothing_is_valid_too(tmp_path: Path, shared_data: Path) -> None:
    mosaic.write_collection(str(tmp_path), PRODUCT)
    validate(tmp_path / "collection.json", shared_data / "stac-schemas")


def test_a_footprint_across_the_antimeridian_has_its_west_east_of_its_east() -> None:
    ring = (
        [[[179, 0], [180, 0], [180, 1], [179, 1], [179, 0]]],
        [[[-180, 0], [-178, 0], [-178, 1], [-180, 1], [-180, 0]]],
    )
    assert stac.bbox({"type": "MultiPolygon", "coordinates": list(ring)}) == [179, 0, -178, 1]
    assert stac.bbox({"type": "MultiPolygon", "coordinates": [ring[0]]}) == [179, 0, 180, 1]


@pytest.mark.filterwarnings("ignore")
def test_pictures_are_png_with_transparent_nodata(tmp_path: Path) -> None:
    pixels = np.array([[0, 7, 255], [7, 7, 0]], np.uint8)
    (tmp_path / "p.png").write_bytes(cog.encode_png(pixels, {0: (1, 2, 3), 7: (4, 5, 6)}))
    import matplotlib.image

    picture = (matplotlib.image.imread(tmp_path / "p.png") * 255).round().astype(int)
    assert picture.shape == (2, 3, 4)
    assert picture[0, 0].tolist() == [1, 2, 3, 255]
    assert picture[1, 0].tolist() == [4, 5, 6, 255]
    assert picture[0, 2, 3] == 0
    color = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    (tmp_path / "c.png").write_bytes(cog.encode_png(color))
    np.testing.assert_array_equal((matplotlib.image.imread(tmp_path / "c.png")[..., :3] * 255).round(), color)


def test_parts_travel_packed() -> None:
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    packed = mosaic.pack(values[:, ::-1])
    np.testing.assert_array_equal(mosaic.unpack(packed, "float32", (2, 3, 2)), values[:, ::-1])
    assert mosaic.pack(None) is None
    assert mosaic.unpack(None, "float32", (2, 3, 2)) is None
    assert Window(0, 0, 2, 3).area == 6


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([(10, 20), (15, 30)], (10, 30)),
        ([(-120, -60), (10, 40)], (-120, 40)),
        ([(170, 180), (-180, -175)], (170, -175)),
        ([(179, -179), (-180, -178.5)], (179, -178.5)),
        ([(-180, 180)], (-180, 180)),
        ([(-180, 0), (0, 180)], (-180, 180)),
        ([(5, 5)], (5, 5)),
    ],
)
def test_the_longitudes_of_all_maps_are_the_shortest_way_around(
    spans: list[tuple[float, float]], expected: tuple[float, float]
) -> None:
    assert mosaic._longitudes(spans) == expected
