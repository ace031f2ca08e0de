"""Metrics over tiles and over scenes with labels. The network gives its input back: the larger band is the class."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes_for_tests import write_scene

from sattile import inference, metrics, pictures, prediction
from sattile.dataset import owners
from sattile.errors import UsageError
from sattile.evaluation import check_dataset, evaluate
from sattile.grid import Window
from sattile.inference import BlockRead, Piece
from sattile.model import load_bundle
from sattile.schema import Scene

# Pictures have no georeference.
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SHAPES = {"one": (150, 233), "two, b": (200, 70), "small": (20, 31)}


def others(found: dict[str, Any]) -> list[str]:
    """What is noted, but that small scenes have few spatial blocks."""
    few, rest = (
        [note for note in found["notes"] if note.startswith("intervals follow from") == told] for told in (True, False)
    )
    assert len(few) == (found["intervals"] is not None and found["intervals"]["blocks"] < metrics.FEW_BLOCKS)
    return rest


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40), st.integers(0, 40)), unique=True, max_size=30),
    st.integers(1, 16),
)
@settings(deadline=None)
def test_each_pixel_that_tiles_share_belongs_to_one_of_them(tiles: list[tuple[str, int, int]], size: int) -> None:
    hits = {name: np.zeros((60, 60), int) for name in "ab"}
    covered = {name: np.zeros((60, 60), bool) for name in "ab"}
    for (name, row, col), earlier in owners(tiles, size).items():
        own = Window(row, col, size, size)
        mine = np.ones((size, size), bool)
        for other in earlier:
            mine[(own & Window(*other, size, size)).slices(own)] = False
        hits[name][own.slices()] += mine
        covered[name][own.slices()] = True
    for name in "ab":
        np.testing.assert_array_equal(hits[name], covered[name])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    import keras

    from sattile.model import bundle

    folder = tmp_path_factory.mktemp("model")
    given = keras.Input((None, None, 2))
    keras.Model(given, keras.layers.Activation("linear")(given)).save(folder / "identity.keras")
    described = {"bands": "x,y", "classes": "land=0,water=7", "activation": "none"}
    return bundle(str(folder / "identity.keras"), **described, out=str(folder / "bundle"))


def made(name: str) -> tuple[np.ndarray, np.ndarray]:
    """(2, height, width) image with a collar of nodata, and labels that are right in three of four pixels."""
    height, width = SHAPES[name]
    rng = np.random.default_rng(sorted(SHAPES).index(name))
    image = rng.integers(1, 2000, (2, height, width)).astype(np.uint16)
    image[:, : height // 5, : width // 3] = 0
    labels = np.where(image[1] > image[0], 7, 0).astype(np.uint8)
    labels = np.where(rng.random(labels.shape) < 0.25, 7 - labels, labels).astype(np.uint8)
    labels[-height // 4 :, : width // 2] = 255
    return image, labels


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for index, name in enumerate(SHAPES):
        image, labels = made(name)
        place: dict[str, Any] = {"west": 600_000 + 50_000 * index}
        write_scene(folder / "scenes" / f"{name}.tif", image, names=("x", "y"), nodata=0, **place)
        write_scene(folder / "labels" / f"{name}.tif", labels[None], nodata=255, **place)
    return folder


def expected(names: list[str]) -> np.ndarray:
    table = np.zeros((2, 2), int)
    for name in names:
        image, labels = made(name)
        found = np.where(image[1] > image[0], 7, 0)
        for row, truth in enumerate((0, 7)):
            for col, predicted in enumerate((0, 7)):
                table[row, col] += ((labels == truth) & (found == predicted) & (image[0] != 0)).sum()
    return table


def spatial_blocks(name: str) -> np.ndarray:
    """The spatial block of each pixel, (height, width) of str: of the middle of its square of 32 px, in numpy alone but
    for the projection. Cells of 1,280 m: 128 px, the least, since the archive is small."""
    import pyproj

    height, width = SHAPES[name]
    rows, cols = ((one // 32 * 32 + np.minimum(one // 32 * 32 + 32, end)) / 2
                  for one, end in zip(np.indices((height, width)), (height, width), strict=True))  # fmt: skip
    west = 600_000 + 50_000 * list(SHAPES).index(name)
    lon, lat = pyproj.Transformer.from_crs(32632, 4326, always_xy=True).transform(west + 10 * cols, 5e6 - 10 * rows)
    radius, cosine = 6_371_008.8, np.cos(np.pi / 6)
    around = 2 * np.pi * radius * cosine
    across = np.floor(np.radians(lon) * radius * cosine / (around / round(around / 1280))).astype(int)
    up = np.floor(np.sin(np.radians(lat)) * radius / cosine / 1280).astype(int)
    return np.char.add(np.char.add(across.astype(str), "_"), up.astype(str))


def counted_by_block(name: str) -> dict[str, list[int]]:
    image, labels = made(name)
    found, cells = np.where(image[1] > image[0], 7, 0), spatial_blocks(name)
    good = (labels != 255) & (image[0] != 0)
    return {
        cell: [int((good & (cells == cell) & (labels == truth) & (found == said)).sum()) for truth in (0, 7)
               for said in (0, 7)]
        for cell in np.unique(cells[good])
    }  # fmt: skip


def read(url: str) -> dict[str, Any]:
    return json.loads(Path(url).read_text())


@pytest.mark.parametrize("merge", ["crop", "blend"])
def test_scenes_with_labels(
    spark: Any, model: str, archive: Path, tmp_path: Path, merge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "choose_edge", lambda *_: 64)
    out = tmp_path / "out"
    options: dict[str, Any] = {
        "model": model, "scenes": [str(archive / "scenes")], "labels": str(archive / "labels"), "out": str(out),
        "merge": merge, "size": 64,
    }  # fmt: skip
    found = read(evaluate(spark, **options))
    np.testing.assert_array_equal(found["confusion"], expected(list(SHAPES)))
    assert found["pixels"] == expected(list(SHAPES)).sum()
    assert found["classes"]["water"]["pixels"] == expected(list(SHAPES))[1].sum()
    assert found["undecided"] == 0
    for name in SHAPES:
        np.testing.assert_array_equal(found["scenes"][name]["confusion"], expected([name]))
        own = found["scenes"][name]["intervals"]
        assert own is None or own["blocks"] <= found["intervals"]["blocks"]

    blocks = pq.read_table(out / "blocks.parquet").to_pylist()
    expected_blocks = {name: counted_by_block(name) for name in SHAPES}
    assert {name: {row["spatial_block"]: row["confusion"] for row in blocks if row["scene_id"] == name}
            for name in SHAPES} == expected_blocks  # fmt: skip
    assert found["intervals"]["blocks"] == len({cell for one in expected_blocks.values() for cell in one}) > 3
    low, high = found["intervals"]["miou"]
    assert low < found["miou"] < high
    assert found["calibration"] is None
    assert others(found) == [f"no calibration: the scores of {found['pixels']} of {found['pixels']} pixels are no "
                              f"probabilities (from 0 to 1, and 1 in sum)"]  # fmt: skip
    assert "regions" not in found

    listed = json.loads((out / "samples" / "samples.json").read_text())
    assert {one["scene_id"] for one in listed} == set(SHAPES)
    for one in listed:
        for panel in ("image", "truth", "prediction", "errors"):
            with rasterio.open(out / "samples" / one[panel]) as file:
                assert file.shape == (one["window"]["height"], one["window"]["width"])

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "_run.json"}
    evaluate(spark, **options)
    assert json.loads((out / "_run.json").read_text())["skipped"] == 3
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("stride", [64, 24])
def test_a_dataset_counts_each_pixel_once_though_tiles_overlap(
    spark: Any, model: str, archive: Path, tmp_path: Path, stride: int
) -> None:
    from sattile.tiles import tile

    pairs = tmp_path / "pairs.csv"
    lines = [f'"{archive}/scenes/{name}.tif","{archive}/labels/{name}.tif",{split}'
             for name, split in zip(SHAPES, ("test", "test", "train"), strict=True)]  # fmt: skip
    pairs.write_text("scene,labels,split\n" + "\n".join(lines) + "\n")
    dataset = tile(
        spark, pairs=str(pairs), out=str(tmp_path / "tiles"), size=64, stride=stride, classes="land=0,water=7"
    )
    out = tmp_path / "out"
    found = read(evaluate(spark, model=model, dataset=dataset, out=str(out), samples=2))
    np.testing.assert_array_equal(found["confusion"], expected(["one", "two, b"]))
    assert set(found["scenes"]) == {"one", "two, b"}
    assert {"intervals", "miou"} <= set(found["scenes"]["one"])
    for name in ("one", "two, b"):
        np.testing.assert_array_equal(found["scenes"][name]["confusion"], expected([name]))
    assert len(json.loads((out / "samples" / "samples.json").read_text())) == 2
    assert json.loads((out / "_run.json").read_text())["evaluated_mpix_per_s"] > 0
    blocks = pq.read_table(out / "blocks.parquet").to_pylist()
    tiles = pq.read_table(tmp_path / "tiles" / "test", columns=["spatial_block"])["spatial_block"].to_pylist()
    # Tiles of 64 px: what lies nearer than 128 px counts as one block.
    assert found["intervals"]["blocks"] == len({row["spatial_block"] for row in blocks})
    assert 3 < found["intervals"]["blocks"] < len(set(tiles))
    with pytest.raises(UsageError, match="no tiles in split 'val'; it has train, test"):
        evaluate(spark, model=model, dataset=dataset, split="val", out=str(tmp_path / "val"))


@pytest.fixture(scope="module")
def sure(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A network that says 0.25 and 0.75 of every pixel, in logarithms through a softmax."""
    import keras

    from sattile.model import bundle

    folder = tmp_path_factory.mktemp("sure")
    given = keras.Input((None, None, 2))
    layer = keras.layers.Conv2D(2, 1, activation="softmax", kernel_initializer="zeros")
    network = keras.Model(given, layer(given))
    layer.set_weights([layer.get_weights()[0], np.log([1.0, 3.0])])
    network.save(folder / "sure.keras")
    return bundle(str(folder / "sure.keras"), bands="x,y", classes="land=0,water=7", out=str(folder / "bundle"))


def regions_of(path: Path, *names: str) -> str:
    """West and east half of `one`, in degrees, and all of `small`; `two, b` is in none, and nothing is in `far`."""
    import geopandas
    import shapely

    boxes = [shapely.box(599_000, 4_990_000, 601_150, 5_001_000), shapely.box(601_150, 4_990_000, 603_000, 5_001_000),
             shapely.box(699_000, 4_990_000, 702_000, 5_001_000), shapely.box(500_000, 10, 500_100, 20)]  # fmt: skip
    frame = geopandas.GeoDataFrame({"name": ["west", "east", "small", "far"]}, geometry=boxes, crs=32632)
    frame = frame[frame.name.isin(names or ["west", "east", "small"])]
    frame.to_crs(4326).to_file(path, driver="GeoJSON")
    return str(path)


def test_calibration_and_regions_of_scenes_are_those_of_a_dataset_and_of_numpy(
    spark: Any, sure: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    from sattile.tiles import tile

    monkeypatch.setattr(prediction, "choose_edge", lambda *_: 64)
    regions = regions_of(tmp_path / "regions.geojson")
    # Tiles of the squares' size, so that the middles of both are the same; the archive as its own training split.
    dataset = tile(
        spark, scenes=[str(archive / "scenes")], labels=str(archive / "labels"), out=str(tmp_path / "tiles"), size=32,
        classes="land=0,water=7", fractions="1,0,0", split="block",
    )  # fmt: skip
    shared: dict[str, Any] = {"model": sure, "regions": regions, "region_attribute": "name"}
    found = [read(evaluate(spark, **shared, out=str(tmp_path / "a"), dataset=dataset, split="train"))]
    by_place: dict[str, Any] = {"scenes": [str(archive / "scenes")], "labels": str(archive / "labels"), "size": 64}
    for merge in ("crop", "blend"):
        found.append(read(evaluate(spark, **shared, **by_place, out=str(tmp_path / merge), merge=merge)))
    truth = expected(list(SHAPES)).sum(1)  # all of it is taken for water
    for one in found:
        assert one["confusion"] == [[0, int(truth[0])], [0, int(truth[1])]]
        assert others(one) == []
        (bin_,) = [entry for entry in one["calibration"]["bins"] if entry["pixels"]]
        assert bin_["pixels"] == truth.sum()
        assert bin_["accuracy"] == truth[1] / truth.sum()
        assert bin_["confidence"] == pytest.approx(0.75, abs=1e-6)
        assert one["calibration"]["ece"] == one["calibration"]["mce"] == pytest.approx(0.75 - truth[1] / truth.sum())
        assert one["regions"].keys() == {"west", "east", "small", "(outside)"}
        total = sum(np.array(part["confusion"]) for part in one["regions"].values())
        np.testing.assert_array_equal(total, one["confusion"])
    # Of the last tiles, moved inside the scene, the middles are others: of a dataset only the other regions are equal.
    image, labels = made("one")
    middles = (np.arange(233) // 32 * 32 + np.minimum(np.arange(233) // 32 * 32 + 32, 233)) / 2
    west = (labels != 255) & (image[0] != 0) & (middles < 115)[None]
    for one in found[1:]:
        assert one["regions"]["west"]["confusion"] == [[0, int((west & (labels == value)).sum())] for value in (0, 7)]
        np.testing.assert_array_equal(one["regions"]["(outside)"]["confusion"], one["scenes"]["two, b"]["confusion"])
    for name in ("small", "(outside)"):
        assert found[0]["regions"][name]["confusion"] == found[1]["regions"][name]["confusion"]

    options = {**shared, "dataset": dataset, "split": "train", "out": str(tmp_path / "a")}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*") if path.name != "_run.json"}
    evaluate(spark, **options)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UsageError, match="was made with other settings \\(regions:"):
        evaluate(spark, **{**options, "region_attribute": None})

    far = regions_of(tmp_path / "far.geojson", "west", "far")
    other = read(evaluate(spark, **{**options, "regions": far, "out": str(tmp_path / "b")}))
    assert (other["regions"].keys(), others(other)) == ({"west", "(outside)"}, [])
    assert "no labelled pixel lies in 1 of the regions: far" in caplog.text
    far = regions_of(tmp_path / "further.geojson", "far")
    other = read(evaluate(spark, **{**options, "regions": far, "out": str(tmp_path / "c")}))
    assert others(other) == ["no labelled pixel lies in any of the regions: do they state the right CRS?"]


@pytest.mark.parametrize("merge", ["crop", "blend"])
def test_scores_are_counted_as_they_are_decided(model: str, merge: str) -> None:
    """A block taller than a strip, of several windows, some without data: as from its finished scores."""
    rng = np.random.default_rng(3)
    height, width = 531, 150
    job = replace(inference.prepare(load_bundle(model), merge=merge, size=64), scores=True)
    whole = Window(0, 0, height, width)
    scene = Scene("s", "s.tif", height, width, (), None, (1, 0, 0, 0, 1, 0))
    first = rng.random((height, width), np.float32)
    valid = rng.random((height, width)) < 0.9
    valid[200:300] = False
    truth = rng.choice(np.uint8([0, 7, 255]), (height, width))
    region = job.geometry.region(height, width, whole)
    assert region == whole
    read = BlockRead(region, np.stack([first, 1 - first], -1), valid, valid, truth, 0.0)
    done = inference.label_block(Piece(scene, whole), read, job, lambda images: images)
    assert done.scores is not None
    assert done.labels is not None
    assert done.reliability is not None
    assert done.reliability[:-1, 0].sum() == (valid & (truth != 255)).sum()
    np.testing.assert_array_equal(done.reliability, metrics.reliability(done.scores, truth, done.labels, (0, 7)))


def test_the_same_bytes_however_the_work_is_cut(
    spark: Any, sure: str, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regions = regions_of(tmp_path / "regions.geojson")
    written = []
    for number, (edge, size, slots) in enumerate([(32, 32, 1), (96, 48, 2), (4096, 128, 7)]):
        monkeypatch.setattr(prediction, "choose_edge", lambda *_, edge=edge: edge)
        monkeypatch.setattr("sattile.engine.slots", lambda _, slots=slots: slots)
        out = tmp_path / str(number)
        evaluate(spark, model=sure, scenes=[str(archive / "scenes")], labels=str(archive / "labels"), out=str(out),
                 merge="crop", size=size, regions=regions, samples=0)  # fmt: skip
        written.append([(out / name).read_bytes() for name in ("metrics.json", "blocks.parquet")])
    assert written[0] == written[1] == written[2]


def test_the_last_line_says_how_well_and_how_surely() -> None:
    classes = {"land": {"iou": 0.9}, "water": {"iou": 0.78123}}
    found: dict[str, Any] = {
        "classes": classes, "miou": 0.84, "calibration": {"ece": 0.0214},
        "intervals": {"classes": {"water": {"iou": [0.742, 0.8149]}}, "miou": [0.8, 0.88]},
    }  # fmt: skip
    assert metrics.headline(found) == "water IoU 0.781 [0.742, 0.815], mIoU 0.840 [0.800, 0.880], ECE 0.021"
    found |= {"intervals": None, "calibration": None, "classes": {**classes, "ice": None}}
    assert metrics.headline(found) == "mIoU 0.840"
    assert metrics.headline({**found, "miou": None}) == "no pixel was counted"


def test_labels_of_another_class_refuse_their_scene(spark: Any, model: str, archive: Path, tmp_path: Path) -> None:
    _, labels = made("one")
    write_scene(tmp_path / "labels" / "one.tif", np.where(labels == 7, 9, labels)[None].astype(np.uint8), nodata=255)
    out = tmp_path / "out"
    evaluate(
        spark, model=model, scenes=[str(archive / "scenes" / "one.tif")], labels=str(tmp_path / "labels"),
        out=str(out), max_failed_fraction=1.0,
    )  # fmt: skip
    record = json.loads((out / "_run.json").read_text())
    assert (record["done"], record["quarantined"]) == (0, 1)
    found = json.loads((out / "metrics.json").read_text())
    assert found["pixels"] == 0
    assert any("not one labelled pixel was counted" in note for note in found["notes"])


def test_a_model_that_does_not_fit_a_dataset_is_refused(model: str) -> None:
    bundle = load_bundle(model)
    description: dict[str, Any] = {
        "bands": ["y", "x"], "values": "raw", "splits": {"test": {"tiles": 1}},
        "classes": [{"id": 0, "name": "land", "color": "#000000"}, {"id": 7, "name": "water", "color": "#000000"}],
    }  # fmt: skip
    check_dataset(bundle, description, "D", "test")
    for change, message in (
        ({"bands": ["x"]}, "wants band y; dataset D has x"),
        ({"values": "scaled"}, "takes raw values and dataset D holds scaled"),
        ({"classes": [{"id": 0, "name": "land", "color": ""}]}, "land=0, water=7; those of dataset D are land=0"),
        ({"splits": {"train": {"tiles": 3}}}, "it has train"),
    ):
        with pytest.raises(UsageError, match=message):
            check_dataset(bundle, description | change, "D", "test")


def test_neither_and_both_of_dataset_and_scenes_are_refused(spark: Any, model: str, tmp_path: Path) -> None:
    for options in ({}, {"scenes": ["a"]}, {"dataset": "d", "scenes": ["a"]}, {"dataset": "d", "labels": "b"}):
        with pytest.raises(UsageError, match="either --dataset"):
            evaluate(spark, model=model, out=str(tmp_path / "out"), **options)  # type: ignore[arg-type]


def test_pictures_take_red_green_and_blue_where_they_are_named() -> None:
    image = np.zeros((2, 50, 4))
    image[0, :, 2] = np.arange(50)
    picture = pictures.stretch(image, np.ones((2, 50), bool), ["B02", "B03", "B04", "B08"])
    assert picture[0, 49].tolist() == [255, 0, 0]
    picture = pictures.stretch(image, np.zeros((2, 50), bool), ["a"])
    assert not picture.any()


def test_shapes_that_were_left_out_are_measured_together_and_told_on_the_page(
    spark: Any, model: str, tmp_path: Path
) -> None:
    """Ten squares of water, three of land; the network is wrong where its bands say the other."""
    import geopandas
    import shapely

    from sattile.reporting import report
    from sattile.tiles import tile

    rng = np.random.default_rng(0)
    image = rng.integers(1, 2000, (2, 420, 700)).astype(np.uint16)
    write_scene(tmp_path / "s.tif", image, names=("x", "y"))
    tops, lefts = np.repeat([30, 170, 310], 5)[:13], np.tile([40, 180, 320, 460, 600], 3)[:13]
    shapes = [
        shapely.box(600_000 + 10 * left, 5_000_000 - 10 * (top + 8), 600_000 + 10 * (left + 12), 5_000_000 - 10 * top)
        for top, left in zip(tops.tolist(), lefts.tolist(), strict=True)
    ]
    kinds = ["land" if number % 5 == 2 else "water" for number in range(13)]
    geopandas.GeoDataFrame({"kind": kinds}, geometry=shapes, crs=32632).to_file(tmp_path / "l.gpkg")
    dataset = tile(
        spark, scenes=[str(tmp_path / "s.tif")], labels=str(tmp_path / "l.gpkg"), attribute="kind",
        classes="land=0,water=7", out=str(tmp_path / "out" / "tiles"),
    )  # fmt: skip
    with pytest.raises(UsageError, match="no tiles in split 'tset'; it has train, val, test"):
        evaluate(spark, model=model, dataset=dataset, split="val,tset", out=str(tmp_path / "wrong"))
    url = evaluate(spark, model=model, dataset=dataset, split="val,test", out=str(tmp_path / "out" / "evaluation"))
    found = read(url)

    left_out, correct, groups = {"land": 0, "water": 0}, {"land": 0, "water": 0}, {"land": 0, "water": 0}
    fixed = json.loads((tmp_path / "out" / "tiles" / "dataset.json").read_text())["split_rule"]["fixed"]
    for kind, top, left in zip(kinds, tops, lefts, strict=True):
        (part,) = (
            part for name, part in fixed.items()
            if all(0 <= at - int(first) < 64 for at, first in zip((top, left), name.split("/")[1:], strict=True))
        )  # fmt: skip
        if part != "train":
            x, y = image[:, top : top + 8, left : left + 12]
            left_out[kind] += 96
            groups[kind] += 1
            correct[kind] += int(((y > x) == (kind == "water")).sum())
    assert min(groups.values()) == 2
    for kind, one in found["shapes"].items():
        assert (one["pixels"], one["groups"]) == (left_out[kind], groups[kind])
        assert one["recall"] == pytest.approx(correct[kind] / left_out[kind])
        assert one["interval"] == pytest.approx(metrics.wilson(one["recall"], groups[kind]))
    assert found["pixels"] == sum(left_out.values())
    again = read(url)
    evaluate(spark, model=model, dataset=dataset, split="val,test", out=str(tmp_path / "out" / "evaluation"))
    assert read(url) == again

    page = Path(report([str(tmp_path / "out")], out=str(tmp_path / "report"))).read_text()
    assert "Measured on the validation and test splits" in page
    assert "They lie around 13 shapes in 13 groups, each in one split and 64 px apart from the others." in page
    table = page[page.index("Recall on shapes that were left out") : page.index("<h3>By class</h3>")]
    low, high = found["shapes"]["land"]["interval"]
    assert f"[{low:.3f}, {high:.3f}]" in table
    assert f">{left_out['water']}</td>" in table
