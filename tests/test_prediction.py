"""From scenes to maps: the laws, planning, and runs on Spark with small Keras networks."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from maps_for_tests import maps_of, record_of
from networks_for_tests import box, bundle_of, pooling_network, whole, window_network
from scenes_for_tests import write_scene

from sattile import inference, mapreduce, mosaic, prediction, scorers
from sattile.errors import SattileError, TooManyRefused, UsageError
from sattile.grid import Geometry, Window, blocks, ceil_to
from sattile.inference import BlockRead, Inference, Piece, label_block
from sattile.model import Bundle, load_bundle, load_models
from sattile.prediction import predict
from sattile.schema import Band, Scene

quick = settings(deadline=None, max_examples=40)


def scene_of(height: int, width: int, scene_id: str = "s", **changes: Any) -> Scene:
    bands = tuple(Band(name, f"/{scene_id}.tif", index, "uint16") for index, name in enumerate("xy", 1))
    made = Scene(scene_id, f"/{scene_id}.tif", height, width, bands, "EPSG:32632", (10, 0, 6e5, 0, -10, 5e6), gsd=10.0)
    return replace(made, **changes)


# --- laws 1, 2 and 4 on networks of numpy -------------------------------------------------------------------------


def run(job: Inference, scorer: Callable[..., Any], data: np.ndarray, valid: np.ndarray, edge: int) -> dict[str, Any]:
    """Label a whole image, block by block, as tasks do: each block sees its own part of the image alone."""
    height, width = valid.shape
    scene = scene_of(height, width)
    labels = np.empty(valid.shape, np.uint8)
    scores = np.empty((height, width, 2), np.float32)
    coverage = np.empty(valid.shape, np.uint32)
    hits = np.zeros(valid.shape, int)
    for block in blocks(height, width, edge):
        region = job.geometry.region(height, width, block)
        part, good = np.zeros((*region.shape, 2), data.dtype), np.zeros(region.shape, bool)
        inside = region & Window(0, 0, height, width)
        part[inside.slices(region)], good[inside.slices(region)] = data[inside.slices()], valid[inside.slices()]
        part[~good] = 12345  # what lies under nodata must not matter
        read = BlockRead(region, part, good, good[block.slices(region)], None, 0.0)
        done = label_block(Piece(scene, block), read, job, scorer)
        here = block.slices()
        labels[here], scores[here], coverage[here] = done.labels, done.scores, done.coverage
        hits[here] += 1
    assert (hits == 1).all()
    return {"labels": labels, "scores": scores, "coverage": coverage}


@st.composite
def images(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    valid = rng.random((height, width)) > draw(st.sampled_from([0.0, 0.3]))
    valid[: draw(st.integers(0, height))] = False  # a collar, often of whole windows
    return rng.integers(0, 100, (height, width, 2)).astype(np.uint16), valid


def job_of(geometry: Geometry, batch: int = 3) -> Inference:
    return Inference(bundle_of(), geometry, batch, "tensorflow", 1, (3.0, 5.0), scores=True, coverage=True)


@given(images(), st.integers(1, 8), st.integers(2, 6), st.integers(1, 70), st.integers(1, 4))
@quick
def test_crop_equals_whole_image_inference(
    image: tuple[np.ndarray, np.ndarray], cells: int, halo: int, edge: int, batch: int
) -> None:
    job = job_of(Geometry("crop", 2 * cells, 2 * cells, 2 * halo, 2), batch)
    data, valid = image
    found = run(job, pooling_network, data, valid, edge)
    expected = whole(job, pooling_network, data, valid)
    np.testing.assert_array_equal(found["scores"][valid], expected[valid])
    assert np.isnan(found["scores"][~valid]).all()
    np.testing.assert_array_equal(found["coverage"], valid)
    ids = np.where(expected[..., 1] > expected[..., 0], 7, 0)
    np.testing.assert_array_equal(found["labels"], np.where(valid, ids, 255))


@given(images(), st.sampled_from([(2.0, -6.0), (-1.0, 0.0), (1.0, 9.0)]))
@quick
def test_rescaled_pixels_are_what_the_network_sees_and_missing_ones_stay_its_own(
    image: tuple[np.ndarray, np.ndarray], rescale: tuple[float, float]
) -> None:
    data, valid = image
    job = job_of(Geometry("crop", 8, 8, 4, 2))
    found = run(replace(job, rescale=rescale), pooling_network, data, valid, 16)
    expected = run(job, pooling_network, data * rescale[0] + rescale[1], valid, 16)
    for name in ("labels", "scores"):
        np.testing.assert_array_equal(found[name], expected[name])


@given(images(), st.integers(1, 8), st.sampled_from(sorted(scorers.TURNS)), st.integers(1, 70))
@quick
def test_turns_and_several_networks_are_means_of_whole_image_inference(
    image: tuple[np.ndarray, np.ndarray], cells: int, how: str, edge: int
) -> None:
    """Of networks for which up is not down: whole numbers, halved once more than there are passes."""
    shear = lambda images: box(images, 1) + np.pad(images, ((0, 0), (0, 1), (0, 0), (0, 0)))[:, 1:]  # noqa: E731
    both = [pooling_network, shear]
    data, valid = image
    job = job_of(Geometry("crop", 2 * cells, 2 * cells, 4, 2))
    found = run(job, scorers.turned(scorers.averaged(both), how), data, valid, edge)
    total = np.zeros((*valid.shape, 2))
    for quarters, mirrored in scorers.TURNS[how]:
        for network in both:

            def turn_and_back(images: np.ndarray, network: Any = network, q: int = quarters, m: bool = mirrored) -> Any:
                given = np.rot90(images, q, (1, 2))
                scores = network(given[:, :, ::-1] if m else given)
                return np.rot90(scores[:, :, ::-1] if m else scores, -q, (1, 2))

            total += whole(job, turn_and_back, data, valid)
    expected = (total / (2 * len(scorers.TURNS[how]))).astype(np.float32)
    np.testing.assert_array_equal(found["scores"][valid], expected[valid])


def test_a_halo_below_the_radius_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The law above can fail."""
    rng = np.random.default_rng(0)
    data, valid = rng.integers(0, 100, (40, 30, 2)).astype(np.uint16), np.ones((40, 30), bool)
    job = job_of(Geometry("crop", 8, 8, 2, 2))
    found = run(job, pooling_network, data, valid, 16)["scores"]
    assert (found != whole(job, pooling_network, data, valid)).any()


@given(images(), st.integers(1, 8), st.data(), st.integers(1, 70))
@quick
def test_blend_does_not_depend_on_the_blocks(
    image: tuple[np.ndarray, np.ndarray], cells: int, data: st.DataObject, edge: int
) -> None:
    job = job_of(Geometry("blend", 2 * cells, 2 * data.draw(st.integers(1, cells)), 0, 2))
    one, other = (run(job, window_network, *image, cut) for cut in (edge, 60))
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)
    np.testing.assert_array_equal(one["coverage"] > 0, image[1])


@given(images(), st.sampled_from(["crop", "blend"]), st.integers(1, 16), st.integers(1, 70), st.booleans())
@quick
def test_identity_gives_the_input_and_a_constant_is_constant(
    image: tuple[np.ndarray, np.ndarray], merge: str, size: int, edge: int, fixed: bool
) -> None:
    stride = size if merge == "crop" else max(size // 2, 1)
    job = job_of(Geometry(merge, size, stride, 0, 1, fixed))
    data, valid = image
    found = run(job, lambda batch: batch, data, valid, edge)["scores"]
    np.testing.assert_array_equal(found[valid], data[valid])
    constant = run(job, lambda batch: np.full(batch.shape, 0.1, np.float32), data, valid, edge)["scores"]
    assert (constant[valid] == np.float32(0.1)).all()
    assert np.isnan(constant[~valid]).all()


def test_batches_are_of_one_shape_and_windows_without_data_are_not_evaluated() -> None:
    seen = []

    def scorer(batch: np.ndarray) -> np.ndarray:
        seen.append(batch.shape)
        return batch

    job = job_of(Geometry("crop", 8, 8, 0, 1), 4)
    data, valid = np.zeros((40, 24, 2), np.uint16), np.zeros((40, 24), bool)
    valid[33, 1] = valid[0, 0] = True
    run(job, scorer, data, valid, 24)
    assert seen == [(4, 8, 8, 2), (4, 8, 8, 2)]
    # A scene of fewer windows than a batch has them all in one, without padding.
    assert inference.batch_for(job, scene_of(8, 16)) == 2


# --- the plan -----------------------------------------------------------------------------------------------------


def test_memory_is_read_as_people_write_it() -> None:
    assert inference.parse_memory("1500m") == 1500 * 2**20
    assert inference.parse_memory("3g") == inference.parse_memory("3 GiB") == 3 * 2**30
    assert inference.parse_memory(500_000_000) == 500_000_000
    for slip in ("much", 3, "0", "300k"):
        with pytest.raises(UsageError, match="3g"):
            inference.parse_memory(slip)


@given(st.integers(100, 4000), st.one_of(st.none(), st.integers(0, 200)), st.sampled_from(["1500m", "3g", "12g"]))
@quick
def test_windows_and_blocks_follow_from_the_memory_of_a_worker(
    activation: int, radius: int | None, memory: str
) -> None:
    bundle = bundle_of(activation_bytes=float(activation), receptive_radius=radius, total_stride=8)
    job = inference.prepare(bundle, worker_memory=memory)
    scenes = [scene_of(20_000, 30_000)]
    edge = prediction.choose_edge(job, scenes, inference.parse_memory(memory), 2)
    unit = job.geometry.size if job.geometry.merge == "crop" else 512
    assert edge % unit == 0
    assert edge == unit or inference.block_memory(job, edge) <= inference.parse_memory(memory)


def test_the_default_network_pays_a_fair_price_in_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "choose_engine", lambda *_, **__: "openvino")
    network = bundle_of(bands=tuple("rgbn"), fill=(0,) * 4, total_stride=8, receptive_radius=51, activation_bytes=326.4)
    job = inference.prepare(network, worker_memory="1500m")
    for edge in (8192, 10_000, 10_980, 47_000):
        plan = prediction.plan(job, [scene_of(edge, edge)], worker_memory="1500m", slots=2)
        assert plan.evaluated <= 1.15 * plan.delivered
        assert plan.memory <= 1500 * 2**20


def test_gpus_get_large_inputs_and_no_batch_larger_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    network = bundle_of(bands=tuple("rgbn"), fill=(0,) * 4, total_stride=8, receptive_radius=51, activation_bytes=326.4)
    job = inference.prepare(network, gpu=True)
    assert (job.engine, job.geometry.input_size, job.batch) == ("tensorflow-gpu", 2048, 1)
    plan = prediction.plan(job, [scene_of(10_980, 10_980)], slots=4)
    assert plan.evaluated <= 1.15 * plan.delivered
    fixed = replace(network, input_shape=(256, 256), receptive_radius=None)
    job = inference.prepare(fixed, gpu=True)
    plan = prediction.plan(job, [scene_of(10_980, 10_980)], slots=4)
    assert job.batch == 64
    assert plan.evaluated <= 4.5 * plan.delivered  # each pixel by four windows
    heavy = replace(network, activation_bytes=20_000.0)
    assert inference.prepare(heavy, gpu=True).geometry.input_size < 512


def test_a_plan_counts_pixels_and_cuts_tasks_and_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    job = inference.prepare(bundle_of(receptive_radius=10, total_stride=2), size=100)
    scenes = [scene_of(300, 500, "a"), scene_of(90, 40, "b"), scene_of(1000, 250, "c")]
    plan = prediction.plan(job, scenes, slots=2)
    assert plan.delivered == 300 * 500 + 90 * 40 + 1000 * 250
    # No window is over 120. Of a 3 x 5: (300 + 2 * 20) / 3 and (500 + 4 * 20) / 5 pixels; of c 10 x 3; of b one.
    assert plan.evaluated == 3 * 114 * 5 * 116 + 10 * 118 * 3 * 98 + 90 * 40
    tasks = prediction.tasks_of(plan.pieces, job, 2)
    assert sorted((piece for task in tasks for piece in task), key=plan.pieces.index) == list(plan.pieces)
    monkeypatch.setattr(prediction, "WAVE_PIXELS", 200_000)
    waves = prediction.waves_of(plan.pieces)
    assert [piece for wave in waves for piece in wave] == list(plan.pieces)
    assert [{piece.scene.scene_id for piece in wave} for wave in waves] == [{"a", "b"}, {"c"}]


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 200), st.integers(1, 9))
def test_tasks_are_even_runs_of_neighbours_and_each_core_s_lie_side_by_side(
    costs: list[int], most: int, slots: int
) -> None:
    items = list(range(len(costs)))
    tasks = mapreduce.deal(items, costs, most=most, slots=slots)
    assert sorted(item for task in tasks for item in task) == items
    assert all(task == list(range(task[0], task[-1] + 1)) for task in tasks)
    costs = [max(cost, 1) for cost in costs]
    share = min(sum(costs) / (4 * slots), most)
    assert all(sum(costs[item] for item in task) <= share + max(costs) for task in tasks)
    full = mapreduce.deal(list(range(40 * slots)), [1] * 40 * slots, most=10, slots=slots)
    for core in range(slots):
        assert [item for task in full[core::slots] for item in task] == list(range(40 * core, 40 * core + 40))


@pytest.mark.parametrize(
    ("scene", "bundle", "reason"),
    [
        (scene_of(5, 6), bundle_of(bands=("x", "nir", "red")), "lacks band nir, red"),
        (scene_of(5, 6), bundle_of(values="scaled"), "states no scale"),
        (scene_of(5, 6, gsd=30.0), bundle_of(gsd=10.0), "30 m and the model was trained on 10 m"),
        (scene_of(5, 6, gsd=5.0), bundle_of(gsd=10.0), "5 m"),
    ],
)
def test_scenes_that_a_model_cannot_be_used_on(scene: Scene, bundle: Bundle, reason: str) -> None:
    good, refused = prediction.fitting([scene], bundle, max_gsd_ratio=1.5)
    assert not good
    assert reason in refused[0].reason


def test_a_rule_that_goes_by_time_refuses_scenes_without_one() -> None:
    span = ("2020-01-01T00:00:00Z", "2020-03-31T00:00:00Z")
    times: list[dict[str, Any]] = [{"datetime": span[0]}, {"interval": span}, {}]
    scenes = [replace(scene_of(5, 6), **one) for one in times]
    good, refused = prediction.fitting(scenes, bundle_of(), max_gsd_ratio=1.5, dated=True)
    assert [scene.span for scene in good] == [(span[0], span[0]), span]
    assert ["no time of acquisition, and --rule newest" in one.reason for one in refused] == [True]
    assert not prediction.fitting(scenes, bundle_of(), max_gsd_ratio=1.5)[1]


def test_scenes_within_the_ratio_or_without_a_gsd_are_fine_and_bands_come_in_the_models_order() -> None:
    scenes = [scene_of(5, 6, gsd=12.0), scene_of(5, 6, gsd=None)]
    good, refused = prediction.fitting(scenes, bundle_of(gsd=10.0, bands=("y", "x")), max_gsd_ratio=1.5)
    assert not refused
    assert [scene.band_names for scene in good] == [("y", "x")] * 2


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"engine": "abacus"}, "abacus"),
        ({"fill": (1.0, 2.0, 3.0)}, "x, y"),
        ({"fill": "a,b"}, "a,b"),
        ({"threshold": float("nan")}, "threshold"),
        ({"rescale": "1"}, "a factor and an offset"),
        ({"rescale": "0,5"}, "a factor and an offset"),
        ({"rescale": "one,2"}, "a factor and an offset"),
        ({"merge": "crop", "halo": 2}, "use halo 8"),
        ({"merge": "blend", "stride": 0}, "use stride 4"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(wish: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inference.prepare(bundle_of(receptive_radius=8, total_stride=4), **wish)


# --- runs on Spark ------------------------------------------------------------------------------------------------


def noise(seed: int, height: int, width: int) -> np.ndarray:
    """(2, height, width) uint16 with a collar of zeros."""
    data = np.random.default_rng(seed).integers(1, 2000, (2, height, width)).astype(np.uint16)
    data[:, : height // 5, : width // 3] = 0
    return data


SHAPES = {"one": (150, 233), "two, b": (300, 70), "small": (20, 31), "four": (64, 64)}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("archive")
    for seed, (name, shape) in enumerate(SHAPES.items()):
        write_scene(
            folder / f"{name}.tif", noise(seed, *shape), names=("x", "y"), nodata=0,
            tiled=True, blockxsize=64, blockysize=64,
        )  # fmt: skip
    return folder


def read(path: Path) -> np.ndarray:
    with rasterio.open(path) as file:
        return file.read().transpose(1, 2, 0)


def keras_scores(models: Path, name: str, image: np.ndarray) -> np.ndarray:
    """The plain Keras network on a whole image (extended to a multiple of its stride, missing pixels filled)."""
    import keras

    bands = image.transpose(1, 2, 0).astype(np.float32)
    height, width = bands.shape[:2]
    step = 2 if name == "pooling" else 1
    whole = np.empty((ceil_to(height, step), ceil_to(width, step), 2), np.float32)
    whole[:] = (3, 5)
    valid = (bands != 0).all(-1)
    whole[:height, :width][valid] = bands[valid]
    return np.asarray(keras.models.load_model(models / f"{name}.keras")(whole[None]))[0, :height, :width]


@pytest.mark.parametrize("name", ["convolutions", "pooling"])
def test_a_mosaic_is_whole_image_inference(spark: Any, models: Path, archive: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    predict(spark, model=str(models / name), scenes=[str(archive)], out=str(out), size=64, scores=True, coverage=True)
    assert record_of(out)["settings"]["merge"] == "crop"
    for seed, (scene, shape) in enumerate(SHAPES.items()):
        image = noise(seed, *shape)
        valid = image[0] != 0
        expected = keras_scores(models, name, image)
        scores, labels = read(out / scene / "scores.tif"), read(out / scene / "labels.tif")[..., 0]
        np.testing.assert_allclose(scores[valid], expected[valid], rtol=2e-5, atol=2e-3)
        assert np.isnan(scores[~valid]).all()
        best = np.where(scores[..., 1] > scores[..., 0], 7, 0)
        np.testing.assert_array_equal(labels, np.where(valid, best, 255))
        np.testing.assert_array_equal(read(out / scene / "coverage.tif")[..., 0], valid)


def test_several_models_are_averaged_and_turns_taken(spark: Any, models: Path, archive: Path, tmp_path: Path) -> None:
    names = ["convolutions", "pooling"]
    model = ",".join(str(models / name) for name in names)
    out = tmp_path / "out"
    predict(spark, model=model, scenes=[str(archive)], out=str(out), size=64, scores=True, tta="flips")
    for seed, (scene, shape) in enumerate(SHAPES.items()):
        if shape[0] % 2 or shape[1] % 2:
            continue  # keras_scores extends an image before it is flipped
        image = noise(seed, *shape)
        expected = np.mean(
            [
                keras_scores(models, name, image[:, ::down, ::right])[::down, ::right]
                for name in names
                for down in (1, -1)
                for right in (1, -1)
            ],
            axis=0,
        )
        valid = image[0] != 0
        np.testing.assert_allclose(read(out / scene / "scores.tif")[valid], expected[valid], rtol=2e-5, atol=2e-3)
    record = record_of(out)
    assert record["settings"]["tta"] == "flips"
    assert record["evaluated_pixels"] >= 8 * sum(height * width for height, width in SHAPES.values()) * 0.8
    with pytest.raises(UsageError, match="tta"):
        predict(spark, model=model, scenes=[str(archive)], out=str(out), size=64, scores=True, tta="none")
    with pytest.raises(UsageError, match="use none, flips, turns"):
        predict(spark, model=model, scenes=[str(archive)], out=str(tmp_path / "x"), tta="spin")


def test_models_that_do_not_agree_are_not_averaged(models: Path, tmp_path: Path) -> None:
    from sattile.model import bundle

    described = {"classes": "land=0,water=7", "activation": "none"}
    bundle(str(models / "pooling.keras"), bands="x,z", **described, out=str(tmp_path / "other"))
    with pytest.raises(UsageError, match="bands of"):
        load_models(f"{models / 'pooling'},{tmp_path / 'other'}")
    bundle(str(models / "pooling.keras"), bands="x,y", **described, out=str(tmp_path / "zero"))
    mixed = load_models(f"{models / 'pooling'},{tmp_path / 'zero'}")
    with pytest.raises(UsageError, match="--fill"):  # 3,5 and 0
        inference.prepare(mixed)
    assert inference.prepare(mixed, fill="1,2").fill == (1, 2)
    joined = load_models([str(models / "pooling"), str(models / "convolutions")])
    assert (joined.total_stride, joined.receptive_radius) == (2, load_models(str(models / "pooling")).receptive_radius)


@pytest.mark.parametrize("merge", ["crop", "blend"])
def test_identity_is_the_input_and_a_constant_is_constant(
    spark: Any, models: Path, archive: Path, tmp_path: Path, merge: str
) -> None:
    for name in ("identity", "constant"):
        out = tmp_path / name
        predict(spark, model=str(models / name), scenes=[str(archive)], out=str(out), merge=merge, size=64, scores=True)
        for seed, (scene, shape) in enumerate(SHAPES.items()):
            image = noise(seed, *shape).transpose(1, 2, 0)
            valid = image[..., 0] != 0
            scores = read(out / scene / "scores.tif")
            expected = image if name == "identity" else np.ones_like(image)
            np.testing.assert_array_equal(scores[valid], expected[valid].astype(np.float32))
            assert np.isnan(scores[~valid]).all()


@pytest.fixture(scope="module")
def reference(spark: Any, models: Path, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reference") / "out"
    predict(
        spark, model=str(models / "pooling"), scenes=[str(archive)], out=str(out), merge="blend", size=64, stride=32
    )
    return out


def test_the_same_bytes_for_any_order_block_task_and_wave(
    spark: Any, models: Path, archive: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prediction, "choose_edge", lambda *_: 128)
    monkeypatch.setattr(prediction, "TASK_PIXELS", 10_000)
    monkeypatch.setattr(prediction, "WAVE_SCENES", 1)
    files = sorted(map(str, archive.glob("*.tif")), reverse=True)
    out = tmp_path / "out"
    predict(spark, model=str(models / "pooling"), scenes=files, out=str(out), merge="blend", size=64, stride=32)
    assert maps_of(out) == maps_of(reference)


def test_a_second_run_writes_nothing_and_only_what_changed_is_done_again(
    spark: Any, models: Path, archive: Path, tmp_path: Path
) -> None:
    scenes = tmp_path / "scenes"
    for seed, name in enumerate(("a", "b")):
        write_scene(scenes / f"{name}.tif", noise(seed, 50, 70), names=("x", "y"), nodata=0)
    out = tmp_path / "out"

    def go(**options: Any) -> dict[str, Any]:
        predict(spark, model=str(models / "identity"), scenes=[str(scenes)], out=str(out), **options)
        return record_of(out)

    def times() -> dict[str, int]:
        return {
            str(path): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "_run.json"
        }

    assert go()["done"] == 2
    before = times()
    second = go()
    assert (second["done"], second["skipped"]) == (0, 2)
    assert second["delivered_mpix_per_s"] > 0
    assert times() == before
    contents = maps_of(out)
    for path in [*out.glob("*/labels.tif.aux.xml"), *out.glob("*/labels.qml")]:  # as in folders of before
        path.unlink()
    assert (go()["done"], maps_of(out)) == (0, contents)
    written = {Path(path).name for path, when in times().items() if before[path] != when}
    assert written == {"labels.tif.aux.xml", "labels.qml"}
    before = times()

    write_scene(scenes / "b.tif", noise(9, 50, 70), names=("x", "y"), nodata=0)
    third = go()
    assert (third["done"], third["skipped"]) == (1, 1)
    changed = {Path(path).parent.name for path, when in times().items() if before.get(path) != when}
    assert changed == {"b"}

    with pytest.raises(UsageError, match=r"threshold: not set -> 0\.5"):
        go(threshold=0.5)
    (scenes / "a.tif").unlink()
    assert go()["skipped"] == 1
    assert (out / "a" / "item.json").exists()  # left, with a word about it
    assert go(threshold=0.5, overwrite=True)["done"] == 1
    assert not (out / "a").exists()  # of other settings than the rest of the folder
    listed = json.loads((out / "collection.json").read_text())["links"]
    assert [link["href"] for link in listed if link["rel"] == "item"] == ["./b/item.json"]


def test_one_bad_scene_costs_that_scene(spark: Any, models: Path, tmp_path: Path) -> None:
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    for seed, name in enumerate(("bad", "good", "other")):
        write_scene(
            scenes / f"{name}.tif", noise(seed, 400, 300), names=("x", "y"), nodata=0, compress="deflate",
            tiled=True, blockxsize=64, blockysize=64,
        )  # fmt: skip
    with open(scenes / "bad.tif", "r+b") as file:  # in the midst of the pixels: its header is fine
        file.seek(os.path.getsize(scenes / "bad.tif") // 2)
        file.write(b"\xff" * 3000)
    with pytest.raises(TooManyRefused, match="1 of 3"):
        predict(spark, model=str(models / "identity"), scenes=[str(scenes)], out=str(out))
    table = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert [(row["url"], row["stage"]) for row in table] == [(str(scenes / "bad.tif"), "predict")]
    assert record_of(out)["done"] == 2
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["good", "other"]


def test_the_area_of_interest_limits_what_is_computed(
    spark: Any, models: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import geopandas
    import shapely

    # Ten metres a pixel: rows 0 to 60, columns 100 to 180 of scene `one`; the others end at column 70.
    area = shapely.box(600_000 + 1000, 5_000_000 - 600, 600_000 + 1800, 5_000_000)
    geopandas.GeoSeries([area], crs="EPSG:32632").to_crs(4326).to_file(tmp_path / "aoi.geojson")
    monkeypatch.setattr(prediction, "choose_edge", lambda *_: 64)
    out = tmp_path / "out"
    predict(
        spark, model=str(models / "identity"), scenes=[str(archive)], out=str(out), size=64,
        aoi=str(tmp_path / "aoi.geojson"),
    )  # fmt: skip
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["one"]
    found = record_of(out)
    assert found["outside_aoi"] == 3
    labels = read(out / "one" / "labels.tif")[..., 0]
    inside = np.zeros(labels.shape, bool)
    inside[:60, 100:180] = True
    valid = noise(0, *SHAPES["one"])[0] != 0
    # GeoJSON rounds; straight edges of one CRS are nearly so in the other: a pixel at the rim may differ.
    assert ((labels != 255) != (inside & valid)).sum() <= 300
    assert (labels[5:55, 105:175] != 255).all()
    assert (labels[65:] == 255).all()
    # Blocks of 50 by 58 or 59 px (at most 64, evenly): rows to 100, columns from 58 on.
    assert found["delivered_pixels"] == 100 * (233 - 58)


def test_overwriting_leaves_no_map_of_other_settings(
    spark: Any, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not of a scene outside the new area, nor of one that can't be read any more; also if it was killed in between."""
    import geopandas
    import shapely

    scenes, out = tmp_path / "scenes", tmp_path / "out"
    for seed, (name, west) in enumerate([("in", 600_000), ("torn", 600_100), ("outside", 700_000)]):
        write_scene(scenes / f"{name}.tif", noise(seed, 60, 40), names=("x", "y"), nodata=0, west=west)
    area = geopandas.GeoSeries([shapely.box(600_000, 4_999_000, 602_000, 5_000_000)], crs="EPSG:32632")
    area.to_file(tmp_path / "aoi.geojson")

    def go(**options: Any) -> dict[str, Any]:
        predict(spark, model=str(models / "identity"), scenes=[str(scenes)], out=str(out), **options)
        return record_of(out)

    assert go()["done"] == 3
    size = os.path.getsize(scenes / "torn.tif")
    os.truncate(scenes / "torn.tif", size - 2000)
    later: dict[str, Any] = {"aoi": str(tmp_path / "aoi.geojson"), "max_failed_fraction": 1.0}
    with monkeypatch.context() as patched:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr(prediction, "plan", killed)
        with pytest.raises(KeyboardInterrupt):
            go(**later, overwrite=True)
    found = go(**later)  # of these settings, so nothing is to be overwritten
    assert (found["done"], found["skipped"], found["quarantined"], found["outside_aoi"]) == (1, 0, 1, 1)
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["in"]
    listed = json.loads((out / "collection.json").read_text())["links"]
    assert [link["href"] for link in listed if link["rel"] == "item"] == ["./in/item.json"]


def test_a_job_that_slept_leaves_alone_what_another_one_does_now(
    spark: Any, models: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, publish = tmp_path / "out", mosaic.publish
    lock, theirs = out / "_lock.json", out / mosaic.STAGING / "theirs" / "half.tif"

    def last(*arguments: Any) -> None:
        publish(*arguments)
        lock.write_text(json.dumps({"owner": "another:1:0", "time": time.time(), "seconds": 60}))
        theirs.parent.mkdir()
        theirs.write_text("half")

    monkeypatch.setattr(mosaic, "publish", last)
    with pytest.raises(SattileError, match="taken over by another job"):
        predict(spark, model=str(models / "identity"), scenes=[str(archive)], out=str(out))
    assert theirs.read_text() == "half"
    assert [path.name for path in theirs.parent.parent.iterdir()] == ["theirs"]
    assert json.loads(lock.read_text())["owner"] == "another:1:0"
    assert len(list(out.glob("*/item.json"))) == 1
    assert not (out / "collection.json").exists()


def test_a_run_that_made_nothing_leaves_a_folder_for_any_settings(
    spark: Any, models: Path, archive: Path, tmp_path: Path
) -> None:
    wish: dict[str, Any] = {"model": str(models / "identity"), "scenes": [str(archive)], "out": str(tmp_path / "out")}
    with pytest.raises(UsageError, match="EPSG:32632@10"):
        predict(spark, **wish, grid="EPSG:32632@1e9")
    predict(spark, **wish, grid="EPSG:32632@10")
    assert list((tmp_path / "out").glob("*/item.json"))


def test_a_scene_with_a_name_of_our_own_costs_that_scene(spark: Any, models: Path, tmp_path: Path) -> None:
    names = ["_staging", "collection.json", "good", "labels.vrt"]
    paths = [write_scene(tmp_path / f"{name}.tif", noise(1, 30, 40), names=("x", "y"), nodata=0) for name in names]
    out = tmp_path / "out"
    predict(spark, model=str(models / "identity"), scenes=paths, out=str(out), max_failed_fraction=1)
    table = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert len(table) == 3
    assert all("rename the scene" in row["reason"] for row in table)
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["good"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    spark: Any, models: Path, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    predict(spark, model=str(models / "pooling"), scenes=[str(archive)], out=str(out), dry_run=True)
    assert not out.exists()
    text = capsys.readouterr().out
    assert "scenes      4 (0 refused)" in text
    assert "per pixel delivered" in text


def test_bad_wishes_stop_before_anything_is_read(spark: Any, models: Path, tmp_path: Path) -> None:
    common = {"model": str(models / "pooling"), "out": str(tmp_path / "out")}
    with pytest.raises(UsageError, match="use halo"):
        predict(spark, scenes=["/nowhere/*.tif"], merge="crop", halo=2, **common)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="nowhere"):
        predict(spark, scenes=["/nowhere/x.tif"], **common)  # type: ignore[arg-type]
    assert not (tmp_path / "out" / "collection.json").exists()


KILLED = """
import sys
from sattile import mosaic, prediction
from sattile.engine import session
published = mosaic.publish
def slow(*arguments):
    published(*arguments)
    print("published", flush=True)
    import time; time.sleep(1)
mosaic.publish = slow
prediction.WAVE_SCENES = 1
prediction.predict(session("local[2]"), model=sys.argv[1], scenes=[sys.argv[2]], out=sys.argv[3],
                   merge="blend", size=64, stride=32)
"""


def test_a_killed_run_leaves_nothing_half_visible_and_the_next_one_finishes_it(
    spark: Any, models: Path, archive: Path, tmp_path: Path, reference: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(models / "pooling"), str(archive), str(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "published\n"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folders = [path for path in out.iterdir() if path.is_dir() and path.name != mosaic.STAGING]
    assert folders
    assert not (out / "_run.json").exists()
    for folder in folders:
        for name in ("labels.tif", "quicklook.png", "item.json"):
            digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            assert maps_of(reference)[f"{folder.name}/{name}"] == digest
    time.sleep(0.2)
    predict(
        spark, model=str(models / "pooling"), scenes=[str(archive)], out=str(out), merge="blend", size=64, stride=32
    )
    assert record_of(out)["skipped"] == len(folders)
    assert maps_of(out) == maps_of(reference)
    assert not (out / mosaic.STAGING).exists()


def test_a_bundle_of_keras_has_the_geometry_that_the_laws_need(models: Path) -> None:
    pooling = load_bundle(str(models / "pooling"))
    assert pooling.total_stride == 2
    # 3x3, 2x2 maximum, 3x3 at half size: 1 + 2 + 1 to the side, at the worse phase.
    assert pooling.receptive_radius == 4
