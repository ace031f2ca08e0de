"""Metrics over tiles and over scenes with labels. The network gives its input back: the larger band is the class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes_for_tests import write_scene

from sattile import evaluation, prediction
from sattile.errors import UsageError
from sattile.evaluation import check_dataset, evaluate, owners
from sattile.grid import Window
from sattile.model import load_bundle

# Pictures have no georeference.
pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")

SHAPES = {"one": (150, 233), "two, b": (200, 70), "small": (20, 31)}


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
    return bundle(str(folder / "identity.keras"), bands="x,y", classes="land=0,water=7", out=str(folder / "bundle"))


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
    for name in ("one", "two, b"):
        np.testing.assert_array_equal(found["scenes"][name]["confusion"], expected([name]))
    assert len(json.loads((out / "samples" / "samples.json").read_text())) == 2
    assert json.loads((out / "_run.json").read_text())["evaluated_mpix_per_s"] > 0
    with pytest.raises(UsageError, match="no tiles in split 'val'; it has train, test"):
        evaluate(spark, model=model, dataset=dataset, split="val", out=str(tmp_path / "val"))


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
    assert json.loads((out / "metrics.json").read_text())["pixels"] == 0


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
    picture = evaluation.stretch(image, np.ones((2, 50), bool), ["B02", "B03", "B04", "B08"])
    assert picture[0, 49].tolist() == [255, 0, 0]
    picture = evaluation.stretch(image, np.zeros((2, 50), bool), ["a"])
    assert not picture.any()
