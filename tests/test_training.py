"""Training: the same batches, and so the same weights, for any number of workers, kills and reruns."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from scenes_for_tests import write_scene
from tiles_for_tests import BANDS, SIZE, make_tile, write_dataset, write_splits

from sattile import storage
from sattile.errors import SattileError, UsageError
from sattile.model import bundle, load_bundle
from sattile.prediction import predict
from sattile.training import loop, train
from sattile.training.reader import load_dataset
from sattile.training.settings import Settings, make_settings, most_devices, said_by


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_splits(tmp_path_factory.mktemp("tiles") / "set", train=43, val=7)


# --- The loop ------------------------------------------------------------------------------------------------------

SMALL = Settings(arch="unet-tiny", epochs=3, batch_size=12, learning_rate=5e-3)


def weights_of(dataset: str, work: Path, how: Settings = SMALL, **more: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    result = loop.fit(dataset=dataset, work=str(work), settings=how, **more)
    return result, loop.read_best(str(work)).weights


@pytest.fixture(scope="module")
def undisturbed(
    dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[np.ndarray], Path]:
    work = tmp_path_factory.mktemp("undisturbed")
    return (*weights_of(dataset, work), work)


def test_it_learns(undisturbed: Any) -> None:
    result, _, work = undisturbed
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    assert result["history"][-1]["loss"] < 0.7 * result["history"][0]["loss"]
    assert result["metrics"]["pixels"] == 7 * SIZE * (SIZE - 1)  # each labelled pixel once
    assert result["metrics"]["split"] == "val"
    assert any((work / "tensorboard").iterdir())


def test_the_last_epoch_is_kept_if_asked_for(dataset: str, tmp_path: Path) -> None:
    import keras

    how = replace(SMALL, keep="last")
    result, weights = weights_of(dataset, tmp_path, how)
    with np.load(tmp_path / loop.CHECKPOINT) as saved:
        now = [saved[f"now{number}"] for number in range(len(weights))]
    assert result["best"] == 3
    assert result["metrics"]["miou"] == result["history"][-1]["val_miou"]
    assert all((one == other).all() for one, other in zip(weights, now, strict=True))
    # Also where an earlier one was better.
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    for last, kept in ((True, 2), (False, 1)):
        state = loop._State()
        for epoch, score in enumerate((0.9, 0.4), 1):
            state.add({"epoch": epoch, "val_miou": score}, {"miou": score}, network, last=last)
        assert (state.best, state.metrics["miou"]) == (kept, (0.9, 0.4)[kept - 1])
    # Trainings of before had no such setting: theirs are the same.
    assert "keep" not in SMALL.to_dict()
    assert how.to_dict()["keep"] == "last"
    assert Settings.from_dict(how.to_dict()) == how


def test_a_killed_training_goes_on_to_the_same_weights(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    weights_of(dataset, tmp_path, stop_after=1)
    result, weights = weights_of(dataset, tmp_path)
    assert [row["loss"] for row in result["history"]] == [row["loss"] for row in undisturbed[0]["history"]]
    for one, other in zip(weights, undisturbed[1], strict=True):
        np.testing.assert_array_equal(one, other)


def dropping(bands: list[str], classes: list[str], statistics: dict[str, Any]) -> Any:
    """A builder whose network draws numbers as it trains."""
    import keras

    given = keras.Input((None, None, len(bands)))
    x = keras.layers.Conv2D(6, 3, padding="same", activation="relu")(keras.layers.Rescaling(1e-3)(given))
    x = keras.layers.SpatialDropout2D(0.4)(x)
    return keras.Model(given, keras.layers.Conv2D(len(classes), 1, activation="softmax")(x))


def test_what_a_network_draws_goes_on_after_a_kill(dataset: str, tmp_path: Path) -> None:
    how = Settings(**{**SMALL.to_dict(), "arch": f"{__name__}:dropping"})
    weights_of(dataset, tmp_path / "killed", how, stop_after=1)
    whole, killed = (weights_of(dataset, tmp_path / name, how) for name in ("whole", "killed"))
    assert [row["loss"] for row in whole[0]["history"]] == [row["loss"] for row in killed[0]["history"]]
    for one, other in zip(whole[1], killed[1], strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_checkpoint_is_told_and_passed_over(
    dataset: str, undisturbed: Any, tmp_path: Path, damage: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    weights_of(dataset, tmp_path, stop_after=1)
    checkpoint = tmp_path / loop.CHECKPOINT
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    weights = weights_of(dataset, tmp_path)[1]
    assert "checkpoint.npz can't be used" in caplog.text
    assert all((one == other).all() for one, other in zip(weights, undisturbed[1], strict=True))


def test_a_part_that_is_damaged_or_missing_is_named(spark: Any, tmp_path: Path) -> None:
    """And which file it is."""
    url = write_splits(tmp_path / "set", train=6, val=2)
    part = tmp_path / "set" / "train" / "part-1.parquet"
    whole = part.read_bytes()
    for content, word in ((whole[:-50], "damaged"), (whole[:200] + bytes(len(whole) - 500) + whole[-300:], "damaged"),
                          (None, "missing")):  # fmt: skip
        part.unlink() if content is None else part.write_bytes(content)
        with pytest.raises(SattileError, match=rf"{part.name} is {word} .*tile again with --overwrite"):
            train(spark, dataset=url, out=str(tmp_path / "model"), arch="unet-tiny", epochs=1, batch_size=6)


def test_the_seed_decides_the_weights(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    how = Settings(**{**SMALL.to_dict(), "epochs": 1, "seed": 1})
    first = weights_of(dataset, tmp_path / "a", how)[1]
    again = weights_of(dataset, tmp_path / "b", how)[1]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    kernels = [(a, b) for a, b in zip(first, undisturbed[1], strict=True) if a.ndim == 4]
    assert all((one != other).any() for one, other in kernels)


def test_unlabelled_tiles_and_no_validation_tiles_give_no_nan(tmp_path: Path) -> None:
    tiles = [make_tile(n, "train", unlabelled=n < 6) for n in range(9)]
    dataset = write_dataset(tmp_path / "set", {"train": tiles})
    how = Settings(arch="unet-tiny", epochs=2, batch_size=1, patience=1)  # batches without a label
    result, weights = weights_of(dataset, tmp_path / "work", how)
    assert result["metrics"]["split"] == "train"
    assert all(np.isfinite(one).all() for one in weights)
    assert all(np.isfinite([row["loss"], row["val_loss"]]).all() for row in result["history"])


def no_norm(bands: list[str], classes: list[str], statistics: dict[str, Any]) -> Any:
    """A builder without batch statistics: then parts of a batch are the batch."""
    import keras

    values = keras.Input((None, None, len(bands)))
    x = keras.layers.Rescaling(1e-3)(values)
    x = keras.layers.Conv2D(6, 3, padding="same", activation="relu")(x)
    return keras.Model(values, keras.layers.Conv2D(len(classes), 1, activation="softmax")(x))


def test_a_batch_in_parts_gives_the_gradients_of_the_whole(dataset: str, tmp_path: Path) -> None:
    how = {"arch": f"{__name__}:no_norm", "epochs": 2, "batch_size": 12, "hard_share": 0.4, "label_smoothing": 0.1}
    (whole, one), (parts, other) = (
        weights_of(dataset, tmp_path / str(n), Settings(**how, accumulate=n))  # type: ignore[arg-type]
        for n in (1, 3)
    )
    assert whole["history"][1]["loss"] == pytest.approx(parts["history"][1]["loss"], rel=1e-5)
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_two_devices_of_one_worker_train_to_the_weights_of_one(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    """As several GPUs would; a process of its own, for devices are cut before TensorFlow starts."""
    script = f"""
import os
os.environ["TF_NUM_INTRAOP_THREADS"] = "1"
import tensorflow as tf
from sattile.training import loop
from sattile.training.settings import Settings, most_devices
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
assert strategy.num_replicas_in_sync == 2
with strategy.scope():
    loop.fit(dataset={dataset!r}, work={str(tmp_path)!r}, settings=Settings(**{SMALL.to_dict()!r}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for mine, theirs in zip(loop.read_best(str(tmp_path)).weights, undisturbed[1], strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-4)


def test_bfloat16_learns_and_keeps_weights_in_float32(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    result, weights = weights_of(dataset, tmp_path, Settings(**{**SMALL.to_dict(), "precision": "bfloat16"}))
    assert all(one.dtype == np.float32 for one in weights)
    losses = [result["history"][-1]["loss"], undisturbed[0]["history"][-1]["loss"]]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_balanced_draws_and_hard_pixels_learn(dataset: str, tmp_path: Path) -> None:
    how = {"sampling": "balanced", "class_weights": "balanced", "hard_share": 0.25, "label_smoothing": 0.05}
    result, _ = weights_of(dataset, tmp_path, Settings(**{**SMALL.to_dict(), **how}))
    assert result["history"][-1]["loss"] < 0.8 * result["history"][0]["loss"]
    assert result["metrics"]["miou"] > 0.5
    assert all(0 <= row["waiting"] < 1 for row in result["history"])


# --- The command ---------------------------------------------------------------------------------------------------


TRAINED: dict[str, Any] = {"arch": "unet-tiny", "epochs": 3, "batch_size": 12, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def trained(spark: Any, dataset: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one worker made; tests read it."""
    return train(spark, dataset=dataset, out=str(tmp_path_factory.mktemp("trained") / "model"), workers=1, **TRAINED)


def test_one_worker_and_two_train_the_same_weights(spark: Any, dataset: str, trained: str, tmp_path: Path) -> None:
    how = {"dataset": dataset, "out": str(tmp_path / "both"), "workers": 2, **TRAINED}
    loaded = "tensorflow" in sys.modules
    both = train(spark, **how)
    assert ("tensorflow" in sys.modules) == loaded
    import keras

    networks = [keras.models.load_model(f"{url}/model.keras") for url in (trained, both)]  # plain: no code of ours
    for one, other in zip(*(network.get_weights() for network in networks), strict=True):  # after 12 steps
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)

    found = load_bundle(both)
    assert (found.bands, [one.id for one in found.classes], found.gsd) == (BANDS, [2, 7], 10.0)
    assert (found.fill, found.dataset_digest, found.total_stride) == ((700, 800, 900), "d1", 4)
    assert found.metrics["split"] == "val"
    assert sorted(path.name for path in Path(both).iterdir()) == [
        "README.md", "_run.json", "bundle.json", "history.json", "item.json", "model.keras", "openvino", "saved_model",
        "tensorboard",
    ]  # fmt: skip

    before = {path: path.stat().st_mtime_ns for path in Path(both).rglob("*") if path.is_file()}
    train(spark, **how)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"_run.json"}
    with pytest.raises(UsageError, match="learning_rate"):
        train(spark, **(how | {"learning_rate": 0.01}))


@pytest.mark.parametrize("arch", ["pixel-mlp", "tile-classifier"])
def test_baselines_are_trained_and_map_scenes_by_the_same_commands(
    spark: Any, dataset: str, tmp_path: Path, arch: str
) -> None:
    model = train(spark, dataset=dataset, out=str(tmp_path / "model"), arch=arch, epochs=4, batch_size=12)
    found = load_bundle(model)
    water = np.zeros((40, 70), bool)
    water[:, 32:] = True
    image = np.where(water, np.array([600, 200, 100])[:, None, None], np.array([900, 2500, 2000])[:, None, None])
    write_scene(tmp_path / "scene.tif", image.astype(np.int16), names=BANDS)
    predict(spark, model=model, scenes=[str(tmp_path / "scene.tif")], out=str(tmp_path / "maps"))
    with rasterio.open(tmp_path / "maps" / "scene" / "labels.tif") as file:
        labels = file.read(1)
    merge = json.loads((tmp_path / "maps" / "_run.json").read_text())["settings"]["merge"]
    if arch == "pixel-mlp":
        assert (found.receptive_radius, merge) == (0, "crop")
        np.testing.assert_array_equal(labels, np.where(water, 7, 2))
    else:
        assert (found.input_shape, merge) == ((SIZE, SIZE), "blend")
        assert set(np.unique(labels)) <= {2, 7}


def test_training_goes_on_from_an_earlier_bundle(spark: Any, dataset: str, tmp_path: Path) -> None:
    first = train(spark, dataset=dataset, out=str(tmp_path / "first"), **TRAINED, indices="nir~swir")
    how = TRAINED | {"indices": "nir~swir,ndwi", "epochs": 1, "learning_rate": 1e-6, "start_from": first}
    second = train(spark, dataset=dataset, out=str(tmp_path / "second"), **how)
    before, after = (load_bundle(url) for url in (first, second))
    assert after.network["indices"] == ["nir~swir", "ndwi"]
    assert after.metrics["miou"] > before.metrics["miou"] - 0.02  # with a learning rate that learns nothing
    with pytest.raises(UsageError, match=r"is a unet-tiny.*: say --arch unet-tiny"):
        train(spark, dataset=dataset, out=str(tmp_path / "third"), **(how | {"arch": "resunet-small"}))


def test_training_goes_on_from_a_keras_file_and_from_a_bundle_made_of_it(
    spark: Any, dataset: str, trained: str, tmp_path: Path
) -> None:
    how = TRAINED | {"dataset": dataset, "epochs": 1, "learning_rate": 1e-6}  # which learns nothing
    file = f"{trained}/model.keras"
    names = {"bands": ",".join(BANDS), "classes": "land=2,water=7"}
    made = bundle(keras=file, out=str(tmp_path / "made"), **names)
    scores = [
        load_bundle(train(spark, out=str(tmp_path / f"{number}"), start_from=url, **how)).metrics["miou"]
        for number, url in enumerate((trained, file, made))
    ]
    assert scores[0] == pytest.approx(load_bundle(trained).metrics["miou"], abs=0.02)
    assert scores == [scores[0]] * 3


def test_a_version_is_the_latest_once_it_is_whole(
    spark: Any, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models" / "water"
    how = {"dataset": dataset, "out": str(root), "arch": "unet-tiny", "batch_size": 12, "versions": True}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sattile.training._publish", killed)
        train(spark, epochs=2, **how)
    assert not (root / "latest.json").exists()
    work = root / "v1" / ".training"
    begun = json.loads((work / "progress.json").read_text())
    assert train(spark, epochs=2, **how) == str(root / "v1")
    assert json.loads((root / "v1" / "history.json").read_text()) == begun  # not one epoch was trained again
    assert not work.exists()
    found = load_bundle(str(root))
    assert (found.url, found.data["splits"]["train"]["tiles"]) == (str(root / "v1"), 43)

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("sattile.training.child", killed)
        with pytest.raises(KeyboardInterrupt):
            train(spark, epochs=3, **how)  # other settings: another version
        assert train(spark, epochs=2, **how) == str(root / "v1")  # there is nothing to do
    assert load_bundle(str(root)).url == str(root / "v1")
    described = load_dataset(dataset)
    # Whatever is published later, a training goes on from the version that was the latest when it began.
    assert make_settings(described, {"start_from": str(root)}).start_from == str(root / "v1")
    changed = {str(path.relative_to(root)) for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"v1/_run.json"}


def test_a_builder_that_fails_is_a_usage_error(spark: Any, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no_such_module can't be imported"):
        train(spark, dataset=dataset, out=str(tmp_path / "model"), arch="no_such_module:build")
    assert not (tmp_path / "model" / "bundle.json").exists()


BUILDER = """
import keras

def build(bands, classes, statistics):
    given = keras.Input((None, None, len(bands)))
    x = keras.layers.Rescaling(1e-3)(given)
    x = keras.layers.Conv2D(4, 3, padding="same", activation="{activation}")(x)
    return keras.Model(given, keras.layers.Conv2D(len(classes), 1, activation="softmax")(x))

def broken(bands, classes, statistics):
    raise RuntimeError("my own\\nfault")
"""


def test_a_builder_is_known_by_what_it_builds(
    spark: Any, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    code, out = tmp_path / "a_builder.py", tmp_path / "model"
    code.write_text(BUILDER.format(activation="relu"))
    how: dict[str, Any] = {"dataset": dataset, "out": str(out), "arch": "a_builder:build", "epochs": 1}
    train(spark, **how)
    code.write_text(BUILDER.format(activation="tanh"))
    with pytest.raises(UsageError, match=r"made with other settings.*network:"):
        train(spark, **how)
    with pytest.raises(UsageError, match=r"the builder failed, in .*a_builder\.py line 11: RuntimeError: my own$"):
        train(spark, **(how | {"arch": "a_builder:broken", "out": str(tmp_path / "none")}))
    assert not (tmp_path / "none").exists()


def test_other_names_of_classes_or_bands_are_another_training(dataset: str) -> None:
    described = load_dataset(dataset)
    settings = make_settings(described, {})
    land, water = described.classes
    others = [
        replace(described, classes=(replace(land, name="water"), replace(water, name="land"))),
        replace(described, bands=("nir", "green", "swir")),
    ]
    assert len({storage.digest(said_by(settings, one)) for one in (described, *others)}) == 3


def test_a_validation_loss_that_is_no_number_is_said(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(SattileError, match=r"loss of epoch 1 is (nan|inf).*lower --learning-rate \(it was 1e\+30\)"):
        weights_of(dataset, tmp_path, Settings(**{**SMALL.to_dict(), "learning_rate": 1e30, "batch_size": 12}))


def test_a_missing_value_that_nobody_declared_is_said(spark: Any, tmp_path: Path) -> None:
    url = Path(write_splits(tmp_path / "set", train=3, val=1)) / "dataset.json"
    described = json.loads(url.read_text())
    least = float(np.finfo(np.float32).min)
    wild = {"mean": least / 50, "std": -least, "min": least, "max": 9, "percentiles": {"1": least, "50": 5, "99": 9}}
    url.write_text(json.dumps(described | {"statistics": described["statistics"] | {"nir": wild}}))
    with pytest.raises(UsageError, match=r"band nir has values from -3.4\d+e\+38 to 9.*--nodata -3.4028234"):
        train(spark, dataset=str(url.parent), out=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arch": "unet-large", "dataset": 24}, "tiles of .* have 24 pixels: tile again with --size 16 or 32, or use"),
        ({"workers": 5}, "use 1, 2, 4"),
        ({"workers": 4}, r"runs 2 task\(s\) at once"),
        ({"arch": "unet-enormous"}, "unet-small"),
        ({"epochs": 0}, "at least 1"),
        ({"class_weights": "some"}, "none or balanced"),
        ({"sampling": "some"}, "uniform or balanced"),
        ({"precision": "int8"}, "float32 or bfloat16"),
        ({"accumulate": 3}, "give a multiple of 3"),
        ({"accumulate": 0}, "accumulate 0: give at least 1"),
        ({"max_restarts": -1}, "0 or more"),
        ({"hard_share": 0.0}, "above 0"),
        ({"label_smoothing": 1.0}, "below 1"),
        ({"indices": "nbr"}, "swir2"),
        ({"haze": 1.0, "augment": False}, "part of augment"),
        ({"reader": "petastorm"}, "--trust"),
        ({"start_from": "/nowhere/model"}, "does not exist"),
        ({"seed": -1}, "from 0 to"),
        ({"learning_rate": float("nan")}, "learning_rate nan"),
        ({"weight_decay": -1.0}, "or 0"),
        ({"patience": -3}, "patience"),
        ({"keep": "first"}, "best or last"),
        ({"keep": "last", "patience": 2}, "leave one of them out"),
        ({"dataset": "/nowhere/tiles"}, "no tiles dataset"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    spark: Any, dataset: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    if "dataset" in change and isinstance(change["dataset"], int):
        url = Path(write_splits(tmp_path / "set", train=1)) / "dataset.json"
        url.write_text(json.dumps(json.loads(url.read_text()) | {"size": change["dataset"]}))
        change = change | {"dataset": str(url.parent)}
    with pytest.raises(UsageError, match=words):
        train(spark, **({"dataset": dataset, "out": str(tmp_path / "model")} | change))
    assert not (tmp_path / "model").exists()


def test_as_many_devices_as_share_a_batch_evenly() -> None:
    assert [most_devices(Settings(batch_size=12), there) for there in range(6)] == [0, 1, 2, 3, 4, 4]
    assert [most_devices(Settings(batch_size=12, accumulate=2), there) for there in (1, 4, 6)] == [1, 3, 6]
