"""TensorFlow and OpenVINO give a network's scores: which one is taken, and what both promise."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
from scenes_for_tests import position_image, write_scene

from sattile import scorers
from sattile.errors import SattileError, UsageError
from sattile.model import AGREEMENT, Bundle, choose_engine, load_bundle, load_scorer, save_bundle
from sattile.prediction import predict
from sattile.schema import SegmentClass
from sattile.training import networks

BANDS = ["red", "nir", "swir"]
CLASSES = (SegmentClass(0, "land", "#ddcc77"), SegmentClass(7, "water", "#332288"))
STATISTICS = {band: {"mean": 1000.0, "std": 300.0} for band in BANDS}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A U-Net that was not trained, compared on noise: its agreement means nothing, but is there."""
    import keras

    keras.utils.set_random_seed(0)
    network = networks.build("unet-tiny", bands=BANDS, classes=["land", "water"], statistics=STATISTICS, size=64)
    rng = np.random.default_rng(0)
    images = rng.integers(1, 3000, (3, 64, 96, 3)).astype(np.float32)
    return save_bundle(
        str(tmp_path_factory.mktemp("made") / "model"), network, bands=BANDS, classes=CLASSES, fill=[1000] * 3,
        tiles=(images, rng.random((3, 64, 96)) > 0.25),
    )  # fmt: skip


def with_agreement(bundle: Bundle, value: float | None) -> Bundle:
    fast = {key: one for key, one in bundle.openvino.items() if key not in ("agreement", *scorers.PRECISIONS)}
    return dataclasses.replace(bundle, openvino=fast if value is None else fast | {"agreement": value})


def test_the_bundle_says_how_far_both_agree(made: Bundle) -> None:
    assert made.openvino["agreement"] > 0.9
    assert 0.7 < made.openvino["pixels"] / (3 * 64 * 96) < 0.8  # those that count
    assert made.openvino["precision"] == "bf16"
    assert made.openvino["agreement"] == made.agreement("bfloat16") == made.openvino["bfloat16"]["agreement"]
    assert made.agreement("float32") == made.openvino["float32"]["agreement"] > 0.999
    images = np.random.default_rng(1).integers(1, 3000, (2, 64, 96, 3))
    one, other = (load_scorer(made, engine=engine)(images) for engine in ("tensorflow", "openvino"))
    assert np.abs(one - other).mean() < 0.01
    assert not np.array_equal(one, other)  # two engines, indeed
    exact = load_scorer(made, engine="openvino", precision="float32")(images)
    assert np.abs(one - exact).max() < 1e-4
    assert np.abs(one - other).mean() > 10 * np.abs(one - exact).mean()  # two precisions, indeed


def test_auto_takes_openvino_where_it_was_seen_to_agree(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_engine(with_agreement(made, AGREEMENT)) == "openvino"
    assert choose_engine(with_agreement(made, AGREEMENT), gpu=True) == scorers.GPU
    assert choose_engine(with_agreement(made, AGREEMENT - 1e-6)) == "tensorflow"
    assert choose_engine(with_agreement(made, None)) == "tensorflow"
    assert choose_engine(dataclasses.replace(made, openvino={})) == "tensorflow"
    assert choose_engine(with_agreement(made, None), "openvino") == "openvino"
    both = with_agreement(made, 0.9)
    assert (
        choose_engine(dataclasses.replace(both, openvino=both.openvino | {"float32": {"agreement": 1.0}})) == "openvino"
    )
    with pytest.raises(UsageError, match="make the bundle again"):
        choose_engine(dataclasses.replace(made, openvino={}), "openvino")
    with pytest.raises(UsageError, match="auto, tensorflow, openvino"):
        choose_engine(made, "onnx")
    monkeypatch.setattr(scorers, "has_openvino", lambda: False)
    assert choose_engine(with_agreement(made, 1.0)) == "tensorflow"
    with pytest.raises(UsageError, match=r"sattile\[openvino\]"):
        choose_engine(made, "openvino")


@pytest.mark.parametrize("engine", ["tensorflow", "openvino"])
def test_scores_follow_from_the_values_and_stay_as_they_are(made: Bundle, engine: str) -> None:
    """However the values lie in memory, whatever is scored next, and what is done with the images afterwards."""
    score = load_scorer(made, engine=engine)
    rng = np.random.default_rng(2)
    planes = rng.integers(1, 3000, (2, 3, 64, 96)).astype(np.float32)
    images = np.moveaxis(planes, 1, -1)
    first = score(images)
    expected = first.copy()
    np.testing.assert_array_equal(score(np.ascontiguousarray(images)), expected)
    np.testing.assert_array_equal(score(np.ascontiguousarray(images[:, ::-1])[:, ::-1]), expected)
    np.testing.assert_array_equal(score(np.asfortranarray(images)), expected)
    np.testing.assert_array_equal(score(images.tolist()), expected)
    images[:] = rng.integers(1, 3000, images.shape)
    assert not np.array_equal(score(images), expected)
    np.testing.assert_array_equal(first, expected)


def test_graphs_of_forgotten_shapes_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a worker, too, which freezes what it has before each task."""
    monkeypatch.setattr(scorers, "KEPT_SHAPES", 2)
    graphs = []

    def network(values: Any, training: bool) -> Any:
        graphs.append(weakref.ref(values.graph))
        return values * 2

    score = scorers.by_tensorflow(network, second=False)
    try:
        for width in range(2, 12):
            assert score(np.ones((1, 3, width, 2), np.float32)).shape == (1, 3, width, 2)
            gc.freeze()
    finally:
        gc.unfreeze()
    assert len(graphs) == 10
    assert sum(one() is not None for one in graphs) <= 3


def test_a_network_that_changes_nothing_gives_no_memory_of_the_caller() -> None:
    import keras

    given = keras.Input((None, None, 2))
    score = scorers.by_tensorflow(keras.Model(given, keras.layers.Identity()(given)), second=False)
    images = np.random.default_rng(0).random((1, 5, 7, 2)).astype(np.float32)
    found, expected = score(images), images.copy()
    images[:] = 9
    score(images)
    np.testing.assert_array_equal(found, expected)


def test_openvino_gives_the_same_bits_for_any_dtype_and_again(made: Bundle) -> None:
    score = load_scorer(made, engine="openvino")
    images = np.random.default_rng(0).integers(0, 9000, (2, 64, 32, 3)).astype(np.uint16)
    whole = score(images)
    assert (whole.shape, whole.dtype) == ((2, 64, 32, 2), np.float32)
    again = score(images[:, :32])
    assert again.shape == (2, 32, 32, 2)
    np.testing.assert_array_equal(whole, score(images.astype(np.float64)))
    np.testing.assert_array_equal(again, score(images[:, :32]))
    assert load_scorer(load_bundle(made.url), engine="openvino") is score


def test_what_is_written_for_speed_gives_the_same_scores(made: Bundle) -> None:
    """Nothing is only enlarged, and the softmax goes over planes: in float32 the scores are TensorFlow's."""
    network = openvino.Core().read_model(f"{made.url}/openvino/model.xml")
    kinds = [node.get_type_name() for node in network.get_ordered_ops() if node.get_type_name() != "Constant"]
    assert kinds.count("ConvolutionBackpropData") == 2
    assert not {"Interpolate", "Tile"} & set(kinds)
    assert kinds[-3:] == ["Softmax", "Transpose", "Result"]
    images = np.random.default_rng(1).integers(1, 3000, (2, 64, 96, 3))
    score = scorers.by_openvino(f"{made.url}/openvino/model.xml", threads=1, second=False, precision="float32")
    np.testing.assert_allclose(score(images), load_scorer(made, engine="tensorflow")(images), atol=1e-4)


def as_is(offset: float) -> object:
    """The U-Net, made for stored values that are this much larger."""
    shifted = {band: {"mean": 1000.0 + offset, "std": 300.0} for band in BANDS}
    return networks.build("unet-tiny", bands=BANDS, classes=["land", "water"], statistics=shifted, size=64)


def foreign(offset: float) -> object:
    """Batch normalisation first, a difference of two bands, and the stored values looked at once more, by a pooling."""
    import keras

    inputs = keras.Input((None, None, 3))
    first = keras.layers.BatchNormalization(epsilon=0.0)
    plain = first(inputs)
    plain = keras.layers.Concatenate()([plain, keras.layers.Subtract()([plain[..., :1], plain[..., 1:2]])])
    x = keras.layers.Conv2D(8, 3, padding="same", activation="relu")(plain)
    far = keras.layers.AveragePooling2D(3, 1, padding="same")(inputs)
    x = keras.layers.Concatenate()([x, keras.layers.Rescaling(1e-12)(far)])
    x = keras.layers.Conv2D(2, 3, padding="same", activation="softmax")(x)
    first.set_weights([np.full(3, value, np.float32) for value in (1, 0, 1000 + offset, 300**2)])
    return keras.Model(inputs, x)


def test_scores_of_sixteen_bits_are_read_as_what_they_are(tmp_path: Path) -> None:
    import keras

    from sattile.model import _export

    inputs = keras.Input((None, None, 3))
    x = keras.layers.Conv2D(2, 3, padding="same", dtype="bfloat16")(keras.layers.Rescaling(1e-3)(inputs))
    network, xml = keras.Model(inputs, x), str(tmp_path / "model.xml")
    _export(network, str(tmp_path / "saved_model"))
    scorers.convert(str(tmp_path / "saved_model"), xml)
    images = np.random.default_rng(0).integers(1, 3000, (1, 24, 40, 3))
    expected = scorers.by_tensorflow(network, second=False)(images)
    found = scorers.by_openvino(xml, threads=1, second=False)(images)
    assert found.dtype == np.float32
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("build", [as_is, foreign])
def test_stored_values_far_from_zero_cost_nothing(build: Callable[[float], Any], tmp_path: Path) -> None:
    """OpenVINO's own bfloat16 keeps steps of 128 of values near 30,000: normalising comes before it."""
    import keras

    images = np.random.default_rng(0).integers(1, 3000, (2, 64, 96, 3)).astype(np.float32)
    found = []
    for offset in (0.0, 30_000.0):
        keras.utils.set_random_seed(0)
        network, xml = build(offset), str(tmp_path / f"{offset}" / "model.xml")
        network.export(str(tmp_path / f"{offset}"), verbose=False)
        scorers.convert(str(tmp_path / f"{offset}"), xml)
        exact = scorers.by_tensorflow(network, second=False)(images + offset)
        score = scorers.by_openvino(xml, threads=1, second=False)
        found.append(np.abs(score(images + offset) - exact).mean())
        np.testing.assert_array_equal(score(images + offset), score(images + offset))
    assert found[1] < 1.2 * found[0]


def test_a_bundle_that_lost_its_part_for_openvino_runs_tensorflow(made: Bundle, tmp_path: Path) -> None:
    shutil.copytree(made.url, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "openvino")
    copy = with_agreement(load_bundle(str(tmp_path / "copy")), 1.0)
    assert choose_engine(copy) == "tensorflow"
    with pytest.raises(UsageError, match="has lost its folder openvino"):
        choose_engine(copy, "openvino")


def test_a_gpu_that_tensorflow_does_not_see_is_refused(made: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers.import_tensorflow().config, "list_physical_devices", lambda *_: [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # for the process that the driver asks
    with pytest.raises(SattileError, match=r"sees no GPU here; install sattile\[gpu\].*or use --engine tensorflow"):
        load_scorer(made, engine=scorers.GPU)
    with pytest.raises(UsageError, match="sees no GPU here"):  # by the driver, before anything runs
        scorers.check_gpu()


def test_a_network_runs_on_the_device_that_is_named_and_gives_the_same(made: Bundle, tmp_path: Path) -> None:
    """As on a GPU; a process of its own, for devices are cut before TensorFlow starts."""
    script = f"""
import os
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
import numpy as np
import tensorflow as tf
from sattile import model, scorers
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
scorers.use_gpu = lambda: "/CPU:1"
loaded, load = [], model.load_keras
model.load_keras = lambda path: loaded.append(load(path)) or loaded[-1]
bundle = model.load_bundle({made.url!r})
images = np.random.default_rng(1).integers(1, 3000, (2, 64, 96, 3))
scores = [model.load_scorer(bundle, engine=engine)(images) for engine in ("tensorflow", scorers.GPU)]
assert np.array_equal(*scores)
found = [{{weight.value.device[-5:] for weight in network.weights}} for network in loaded]
assert found == [{{"CPU:0"}}, {{"CPU:1"}}], found
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_large_shapes_are_forgotten_before_the_next_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held beside the shape in use is bounded, in pixels and in number."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # a second each where TensorFlow and Spark are loaded
    compiled: dict[tuple[int, ...], Any] = {}
    rng = np.random.default_rng(0)
    for edge in [*rng.integers(8, 1500, 50).tolist(), *range(8, 40)]:
        scorers._forget_large(compiled)
        assert sum(shape[1] * shape[2] for shape in compiled) <= scorers.KEPT_PIXELS
        assert len(compiled) < scorers.KEPT_SHAPES
        compiled[(1, edge, edge, 3)] = None
    assert list(compiled) == [(1, edge, edge, 3) for edge in range(40 - scorers.KEPT_SHAPES, 40)]


def test_files_that_were_changed_are_refused(made: Bundle, tmp_path: Path) -> None:
    shutil.copytree(made.url, tmp_path / "model")
    with open(tmp_path / "model" / "openvino" / "model.bin", "r+b") as file:
        file.write(b"\x01\x02")
    changed = dataclasses.replace(load_bundle(str(tmp_path / "model")), digest="another")
    with pytest.raises(SattileError, match="was changed"):
        load_scorer(changed, engine="openvino")


def test_a_network_openvino_cannot_take_is_still_a_bundle(
    made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("No conversion rule found for operations: Strange")

    monkeypatch.setattr(scorers, "convert", refuse)
    network = networks.build("unet-tiny", bands=BANDS, classes=["land", "water"], statistics=STATISTICS, size=64)
    found = save_bundle(str(tmp_path / "model"), network, bands=BANDS, classes=CLASSES, fill=[0] * 3)
    assert found.openvino == {}
    assert choose_engine(found) == "tensorflow"


def test_maps_are_the_same_for_every_way_to_cut_the_work(spark: object, made: Bundle, tmp_path: Path) -> None:
    """Blocks and tasks follow from the memory and the scenes; windows and their batches do not."""
    for name, (height, width) in {"a": (700, 1100), "b": (900, 300)}.items():
        write_scene(tmp_path / "in" / f"{name}.tif", position_image(height, width, 3), names=tuple(BANDS))
    found = []
    for scenes in (["in"], ["in/a.tif"], ["in/b.tif"]):
        for size in (128,):
            out = tmp_path / f"out{len(found)}"
            predict(
                spark, model=made.url, scenes=[str(tmp_path / one) for one in scenes], out=str(out),  # type: ignore[arg-type]
                engine="openvino", size=size,
            )  # fmt: skip
            found.append({path.parent.name: path.read_bytes() for path in out.glob("*/labels.tif")})
    assert found[0] == found[1] | found[2]
    assert set(found[0]) == {"a", "b"}
