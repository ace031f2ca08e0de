"""Scenes that hold other values than a network was trained on are told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from maps_for_tests import record_of
from scenes_for_tests import write_scene

from sattile import drift, mosaic
from sattile.drift import ENOUGH, STEP, Known, Sights, judge, look
from sattile.evaluation import evaluate
from sattile.prediction import predict
from sattile.statistics import BandStatistics

BANDS = ("blue", "nir")


def labels_of(folder: Path) -> np.ndarray:
    with rasterio.open(folder / "labels.tif") as file:
        return file.read(1)


def landscape(seed: int, height: int, width: int) -> np.ndarray:
    """(height, width, 2) uint16: reflectance as it is spread over land and water."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.gamma(4, 120, (height, width)), rng.gamma(2, 900, (height, width))], -1).astype(np.uint16)


def known_of(image: np.ndarray) -> Known:
    statistics = {
        name: {"percentiles": {str(at): float(np.percentile(image[..., band], at)) for at in (1, 25, 99)}}
        for band, name in enumerate(BANDS)
    }
    found = Known.of(BANDS, statistics)
    assert found is not None
    return found


KNOWN = known_of(landscape(0, 600, 700))


def said(image: np.ndarray) -> str | None:
    return judge(look(image, np.ones(image.shape[:2], bool), KNOWN), KNOWN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image, None),
        (lambda image: image * 1.3, None),
        (lambda image: image + 50, None),
        (lambda image: image + np.array([500, 900]), "brighter than the training tiles in every band"),
        (lambda image: image + np.array([1000, 0]), "values of blue .* most above"),
        (lambda image: image / 10_000, "98% of|99% of|100% of"),
        (lambda image: image / 40, r"most below their .* \(as in 2 of 2 bands\)"),
        (lambda image: np.where([True, False], image, image * 20), "values of nir .* most above"),
    ],
)
def test_what_was_stored_otherwise_is_told(change: Any, words: str | None) -> None:
    told = said(change(landscape(1, 400, 333).astype(np.float64)))
    if words is None:
        assert told is None
    else:
        assert told is not None
        with pytest.raises(ValueError, match=words):
            raise ValueError(told)


def test_a_scene_of_one_kind_of_ground_is_no_wrong_scale() -> None:
    image = landscape(2, 900, 700)
    dark = image[image[..., 1] < np.percentile(image[..., 1], 30)]  # water, say: the dark third of one band
    assert said(dark[: 400 * 390].reshape(400, 390, 2)) is None
    assert said(dark[: 400 * 390].reshape(400, 390, 2) + np.uint16(5000))


@pytest.mark.parametrize(
    "values",
    [
        np.full((900, 700), 7, np.uint16),
        np.full((900, 700), 288.7, np.float32),
        (np.random.default_rng(0).random((900, 700)) < 0.2).astype(np.uint8),
        np.random.default_rng(1).normal(289, 0.4, (900, 700)).astype(np.float32),
        np.random.default_rng(2).integers(1000, 1005, (900, 700)).astype(np.int16),
        np.random.default_rng(3).normal(0, 1, (900, 700)).astype(np.float32),
        np.zeros((900, 700), np.float32),
    ],
)
def test_no_scene_is_unlike_itself(values: np.ndarray) -> None:
    """Whatever its values: also where most percentiles are one number."""
    statistics = BandStatistics(values.dtype.name)
    statistics.add(values.ravel())
    itself = Known.of(("band",), {"band": statistics.summary()})
    assert itself is not None
    assert judge(look(values[..., None], np.ones(values.shape, bool), itself), itself) is None


def test_another_scale_is_told_as_such_though_it_is_brighter_too() -> None:
    told = said(landscape(1, 900, 700) * 10_000.0)
    assert told is not None
    assert "FACTOR,OFFSET" in told
    assert "-1000" not in told


def test_little_is_not_judged_and_missing_pixels_do_not_count() -> None:
    image = landscape(3, 400, 333) + 1000
    assert (400 // STEP) * (333 // STEP) > ENOUGH
    assert said(image)
    assert said(image[:100, :100]) is None
    valid = np.zeros(image.shape[:2], bool)
    valid[:, :300] = True
    image[:, 300:] = 0
    counts = look(image, valid, KNOWN)
    assert counts[0, 0] == 25 * 19
    assert judge(counts, KNOWN)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 9)), max_size=9), st.integers(0, 9))
def test_counts_add_up_in_any_order_and_parts(parts: list[tuple[str, int]], cut: int) -> None:
    def told(some: list[tuple[str, int]]) -> Sights:
        sights = Sights()
        for name, number in some:
            sights.add(name, np.full((2, 4), number))
        return sights

    apart = told(parts[cut:])
    apart.merge(told(parts[:cut][::-1]).to_json())
    whole = told(parts)
    assert apart.counts.keys() == whole.counts.keys()
    assert all((apart.counts[name] == whole.counts[name]).all() for name in whole.counts)


def test_bundles_of_before_know_nothing() -> None:
    assert Known.of(BANDS, {}) is None
    assert Known.of(BANDS, {"blue": {"percentiles": {}}, "nir": {"percentiles": {}}}) is None


def stopped_after(count: int) -> Any:
    """`mosaic.publish` that is interrupted after so many maps."""
    publish, done = mosaic.publish, []

    def once(*arguments: Any) -> None:
        if len(done) == count:
            raise KeyboardInterrupt
        done.append(publish(*arguments))

    return once


@pytest.mark.parametrize("grid", [None, "EPSG:32632@20"])
def test_a_prediction_says_which_scenes_are_unlike_what_it_was_trained_on(
    spark: Any,
    models: Path,
    tmp_path: Path,
    grid: str | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scenes, model, out = tmp_path / "scenes", tmp_path / "known", tmp_path / "out"
    model.mkdir()
    for path in (models / "convolutions").iterdir():
        (model / path.name).symlink_to(path)
    described = json.loads((model / "bundle.json").read_text()) | {"bands": list(BANDS)}
    percentiles = zip(BANDS, KNOWN.low, KNOWN.quarter, KNOWN.high, strict=True)
    described["data"] = {
        "statistics": {
            name: {"percentiles": dict(zip(drift.PERCENTILES, of, strict=True))} for name, *of in percentiles
        }
    }
    (model / "bundle.json").unlink()
    (model / "bundle.json").write_text(json.dumps(described))

    def scene(name: str, plus: int, west: float) -> None:
        image = landscape(7, 410, 305) + np.uint16(plus)
        write_scene(scenes / f"{name}.tif", image.transpose(2, 0, 1), west=west, names=BANDS)

    laid = {"grid": grid, "sheet": 512} if grid else {}

    def go(**more: Any) -> dict[str, Any]:
        predict(spark, model=str(model), scenes=[str(scenes)], out=str(out), **laid, **more)
        return record_of(out)

    scene("plain", 0, 600_000)
    scene("offset", 1000, 601_000)  # overlaps the other
    assert list(go()["unlike"]) == ["offset"]
    plain = None if grid else labels_of(out / "plain")
    assert "unlike what the model was trained on: it is brighter" in caplog.text
    scene("third", 0, 607_000)
    assert list(go()["unlike"]) == ["offset"]  # it was not looked at again
    if grid:
        small = min(out.glob("r*_c*"), key=lambda one: rasterio.open(one / "labels.tif").height)
        shutil.rmtree(small)
        assert list(go()["unlike"]) == ["offset"]  # only a part of it was
    else:
        monkeypatch.setattr("sattile.mosaic.publish", stopped_after(1))
        scene("fourth", 1000, 630_000)
        scene("zlast", 1000, 640_000)
        with pytest.raises(KeyboardInterrupt):
            go()
        monkeypatch.undo()
        assert list(go()["unlike"]) == ["fourth", "offset", "zlast"]
        for name in ("fourth", "zlast"):
            (scenes / f"{name}.tif").unlink()
            shutil.rmtree(out / name)
        write_scene(tmp_path / "truth.tif", np.zeros((1, 410, 305), np.uint8), west=601_000)
        told = {"scenes": [str(scenes / "offset.tif")], "labels": str(tmp_path / "truth.tif")}
        for _ in range(2):  # the second finds nothing to do
            evaluate(spark, model=str(model), **told, out=str(tmp_path / "evaluation"))
            assert list(record_of(tmp_path / "evaluation")["unlike"]) == ["offset"]
    assert list(go(rescale="1,-1000", overwrite=True)["unlike"]) == ["plain", "third"]
    if grid is None:
        np.testing.assert_array_equal(labels_of(out / "offset"), plain)
    scene("offset", 0, 601_000)
    assert "unlike" not in go(overwrite=True)
