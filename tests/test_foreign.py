"""Networks from elsewhere: files of Keras 2, what scores are, several outputs, layers for training alone."""

from __future__ import annotations

import json
import logging
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before TensorFlow starts; test_model says why.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
from scenes_for_tests import write_scene

from sattile import keras2
from sattile.errors import UsageError
from sattile.foreign import load_keras
from sattile.model import bundle, load_bundle, load_scorer
from sattile.prediction import predict
from sattile.receptive import measure

keras = pytest.importorskip("keras")
L, ops = keras.layers, keras.ops

OLD = Path(__file__).parent / "fixtures" / "keras2"
IMAGE = np.random.default_rng(7).uniform(0, 6000, (1, 10, 14, 4)).astype(np.float32)
"""What Keras 2 computed `scores.npy` of."""

PLAIN = {"keras", "bands", "classes", "values", "fill", "gsd"}
"""Settings of a bundle before there were others: folders made then are taken up."""


def network(end: Callable[[Any], Any], size: tuple[int | None, int | None] = (None, None), bands: int = 4) -> Any:
    """One whose values before the end lie within some tens of 0."""
    keras.utils.set_random_seed(1)
    values = keras.Input((*size, bands))
    return keras.Model(values, end(L.Conv2D(8, 3, padding="same")(L.Rescaling(1 / 3000)(values))), name="net")


def bundled(folder: Path, made: Any, classes: str = "land,wood,water", **options: Any) -> str:
    if not (folder / "net.keras").exists():  # it says when it was saved
        made.save(folder / "net.keras")
    return bundle(str(folder / "net.keras"), bands="a,b,c,d", classes=classes, out=str(folder / "model"), **options)


def scores_of(url: str) -> np.ndarray:
    return load_scorer(load_bundle(url), engine="tensorflow")(IMAGE)


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def record(url: str) -> dict[str, Any]:
    return json.loads(Path(url, "_run.json").read_text())


# --- files of Keras 2 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["net.keras", "net.h5"])
def test_a_file_of_keras_2_gives_the_scores_of_keras_2(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    file.write_bytes((OLD / name).read_bytes())
    with pytest.raises(TypeError):  # as it is, Keras 3 does not take it
        keras.saving.load_model(file, compile=False)
    made = bundle(str(file), bands="a,b,c,d", classes="land,wood,water", out=str(tmp_path / "model"))
    expected = np.load(OLD / "scores.npy")
    assert expected.std() > 0.3  # not of zeros
    np.testing.assert_allclose(scores_of(made), expected, atol=1e-5)
    again = keras.saving.load_model(Path(made, "model.keras"), compile=False)
    np.testing.assert_allclose(again(IMAGE, training=False), expected, atol=1e-5)
    assert file.read_bytes() == (OLD / name).read_bytes()
    assert {*record(made)["settings"]} == PLAIN


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    for name, other in (("net.keras", "net.h5"), ("net.h5", "network")):
        (tmp_path / other).write_bytes((OLD / name).read_bytes())
        found = load_keras(str(tmp_path / other))
        assert (found.name, found.output_shape) == ("old", (None, None, None, 3))
    network(L.ReLU()).save_weights(tmp_path / "net.weights.h5")
    with pytest.raises(UsageError, match=r"holds weights without the network .*\.load_weights\('net\.weights"):
        load_keras(str(tmp_path / "net.weights.h5"))
    with zipfile.ZipFile(tmp_path / "net.zip", "w") as file:
        file.writestr("readme", "no network")
    with pytest.raises(UsageError, match=r"net.zip is no \.keras file and no \.h5 file"):
        load_keras(str(tmp_path / "net.zip"))


def test_a_config_stays_as_it_is_and_of_keras_3_it_says_the_same() -> None:
    with zipfile.ZipFile(OLD / "net.keras") as file:
        text = file.read("config.json").decode()
    config = json.loads(text)
    modern = keras2.modern(config)
    assert json.loads(text) == config
    assert keras2.modern(modern) == modern
    names = [layer["config"].get("name") for layer in keras2.layers_of(config)]
    assert {"values", "inner", "tail", "conv2d_1"} < {*names}  # those inside, too


def changed(
    folder: Path, change: Callable[[dict[str, Any]], None], version: str = "2.15.0", *, whole: bool = False
) -> str:
    """A file of Keras 2 with something else in the config of its layer `leaky_re_lu`, or of the `whole` network."""
    with zipfile.ZipFile(OLD / "net.keras") as old, zipfile.ZipFile(folder / "net.keras", "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "config.json":
                config = json.loads(content)
                layers = config["config"]["layers"]
                change(config["config"] if whole else next(one for one in layers if one["name"] == "leaky_re_lu"))
                content = json.dumps(config).encode()
            if name == "metadata.json":
                content = json.dumps({"keras_version": version}).encode()
            new.writestr(name, content)
    return str(folder / "net.keras")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"class_name": "TFOpLambda", "module": "keras.src.layers.core.tf_op_layer"},
            r"saved by Keras 2\.15\.0, .* layer leaky_re_lu is an operation of TensorFlow \(TFOpLambda\).* keras\.ops",
        ),
        (
            {"class_name": "Scale", "module": "mine", "registered_name": "mine>Scale"},
            r"saved by Keras 2\.15\.0, .* layer leaky_re_lu is of a class of its own, mine>Scale",
        ),
        (
            {"class_name": "ThresholdedReLU", "config": {"name": "leaky_re_lu", "theta": 1.0}},
            r"layer leaky_re_lu \(ThresholdedReLU\) can't be rebuilt by Keras 3",
        ),
        (
            {"class_name": "Activation", "config": {"name": "leaky_re_lu", "activation": "hard_sigmoid"}},
            r"layer leaky_re_lu has the activation hard_sigmoid, which clips 0\.2 x \+ 0\.5 in Keras 2",
        ),
    ],
    ids=["operation", "own class", "gone", "another function"],
)
def test_what_keras_3_cannot_load_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        load_keras(changed(tmp_path, lambda layer: layer.update(change)))
    assert "Lambda layer" not in str(caught.value)


def test_a_dict_of_outputs_of_keras_2_is_told_and_taken(tmp_path: Path) -> None:
    def as_dict(config: dict[str, Any]) -> None:
        (config["output_layers"],) = [{"o1": one} for one in config["output_layers"]]

    file = changed(tmp_path, as_dict, whole=True)
    options = {"bands": "a,b,c,d", "classes": "land,wood,water", "out": str(tmp_path / "model")}
    with pytest.raises(UsageError, match=r"as a dict: o1; .*--output o1"):
        bundle(file, **options)
    made = bundle(file, **options, output="o1")
    np.testing.assert_allclose(scores_of(made), np.load(OLD / "scores.npy"), atol=1e-5)


def test_layers_that_augment_are_taken_from_keras_2() -> None:
    layer = {"class_name": "RandomFlip", "config": {"name": "flip", "mode": "horizontal", "rng_type": "stateful"}}
    (found,) = keras2.modern({"class_name": "Sequential", "config": {"layers": [layer]}})["config"]["layers"]
    assert type(keras.saving.deserialize_keras_object(found)).__name__ == "RandomFlip"


def test_a_lambda_layer_is_named_and_its_code_does_not_run(tmp_path: Path) -> None:
    network(lambda x: L.Softmax()(L.Lambda(lambda x: x * 2, name="twice")(x))).save(tmp_path / "net.keras")
    network(lambda x: L.Softmax()(L.Lambda(lambda x: x * 2, name="twice")(x))).save(tmp_path / "net.h5")
    for name in ("net.keras", "net.h5"):
        with pytest.raises(UsageError, match=r"saved by Keras 3.* safe mode: layer twice is a Lambda layer"):
            load_keras(str(tmp_path / name))


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, **options: Any):
        super().__init__(**options)
        self.last = L.Conv2D(3, 1, activation="softmax")

    def call(self, values: Any) -> Any:
        return self.last(values)


def test_a_subclassed_model_is_told_from_lambda_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Subclassed()
    made(IMAGE)
    made.save(tmp_path / "net.keras")
    registered = keras.saving.get_custom_objects()
    for name in [name for name in registered if "Subclassed" in name]:
        monkeypatch.delitem(registered, name)
    with pytest.raises(UsageError, match=r"it is of a class of its own, tests>Subclassed, .* functional API") as caught:
        load_keras(str(tmp_path / "net.keras"))
    assert "Lambda" not in str(caught.value)


# --- what scores are ----------------------------------------------------------------------------------------------


def pooled(x: Any, activation: str, channels: int) -> Any:
    return L.Conv2D(channels, 1, activation=activation)(L.MaxPooling2D()(x))


def inner(channels: int, activation: str | None) -> Any:
    given = keras.Input((None, None, 8))
    return keras.Model(given, L.Conv2D(channels, 1, activation=activation)(given), name="inner")


def complement(x: Any) -> Any:
    water = L.Conv2D(1, 1, activation="sigmoid")(x)
    return L.Concatenate()([1 - water, water])


SEEN = "on random values they lie from 0 to 1"
EACH = "need not sum to 1"

PROBABILITIES: dict[str, tuple[Callable[[Any], Any], list[str]]] = {
    "softmax": (lambda x: L.Conv2D(3, 1, activation="softmax")(x), []),
    "softmax layer": (lambda x: L.Softmax()(L.Conv2D(3, 1)(x)), []),
    "softmax operation": (lambda x: ops.softmax(L.Conv2D(3, 1)(x)), []),
    "softmax in an inner model": (lambda x: inner(3, "softmax")(x), []),
    "softmax, made larger": (lambda x: L.UpSampling2D(2, interpolation="bilinear")(pooled(x, "softmax", 3)), []),
    "softmax, as float32": (lambda x: ops.cast(L.Conv2D(3, 1, activation="softmax")(x), "float32"), []),
    "sigmoid": (lambda x: L.Conv2D(1, 1, activation="sigmoid")(x), []),
    "hard sigmoid": (lambda x: L.Activation("hard_sigmoid")(L.Conv2D(1, 1)(x)), []),
    "sigmoid operation": (lambda x: ops.sigmoid(L.Conv2D(1, 1)(x)), []),
    "sigmoid, made larger": (lambda x: L.UpSampling2D()(pooled(x, "sigmoid", 1)), []),
    "sigmoid, made larger by a cubic": (
        lambda x: L.UpSampling2D(2, interpolation="bicubic")(pooled(x, "sigmoid", 1)),
        [SEEN],
    ),
    "a sigmoid each": (lambda x: L.Conv2D(3, 1, activation="sigmoid")(x), [EACH]),
    "tanh, moved": (lambda x: L.Rescaling(0.5, 0.5)(L.Conv2D(1, 1, activation="tanh")(x)), [SEEN]),
    "one of a softmax": (lambda x: L.Conv2D(2, 1, activation="softmax")(x)[..., 1:], [SEEN]),
    "1 - p and p": (complement, [SEEN]),
    "softmax along rows": (lambda x: L.Softmax(axis=1)(L.Conv2D(3, 1)(x)), [SEEN, EACH, "seams are possible"]),
}


def classes_of(made: Any) -> str:
    return "land,wood,water" if made.output_shape[-1] == 3 else "land,water"


@pytest.mark.parametrize("name", PROBABILITIES)
def test_probabilities_are_taken_and_the_file_is_kept(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sattile.scorers.has_openvino", lambda: False)  # it has no part in this, and takes its time
    end, told = PROBABILITIES[name]
    made = network(end)
    url = bundled(tmp_path, made, classes_of(made))
    assert Path(url, "model.keras").read_bytes() == (tmp_path / "net.keras").read_bytes()
    notes = record(url).get("notes", [])
    assert len(notes) == len(told)
    for note, words in zip(notes, told, strict=True):
        assert words in note
    assert {*record(url)["settings"]} == PLAIN
    assert "activation" not in load_bundle(url).network


def test_a_softmax_over_other_channels_does_not_make_them_sum_to_1(tmp_path: Path) -> None:
    made = network(lambda x: L.Reshape((8, 8, 3))(L.Conv2D(12, 1, strides=2, activation="softmax")(x)), size=(8, 8))
    seen, each, _ = record(bundled(tmp_path, made))["notes"]
    assert SEEN in seen
    assert EACH in each


NUMBERS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "one channel": (
        lambda x: L.Conv2D(1, 1, name="last")(x),
        r"its last layer, last \(Conv2D\), has no activation\. One channel .* probability of water\. "
        r".* --activation sigmoid adds the sigmoid",
    ),
    "several": (
        lambda x: L.Conv2D(3, 1, name="last")(x),
        r"its last layer, last \(Conv2D\), has no activation\. .* --activation softmax adds the softmax",
    ),
    "in an inner model": (lambda x: inner(3, None)(x), "has no activation.* --activation softmax"),
    "linear, in float32": (lambda x: L.Activation("linear")(L.Conv2D(3, 1)(x)), "has no activation.* softmax"),
    "relu": (lambda x: L.Conv2D(3, 1, activation="relu")(x), "has the activation relu"),
    "normalised": (lambda x: L.BatchNormalization(name="last")(x)[..., :3], "lie from -.* --activation softmax"),
    "log softmax": (lambda x: ops.log_softmax(L.Conv2D(3, 1)(x)), "has the activation log_softmax.* softmax"),
    "a sum": (lambda x: L.Add()([L.Conv2D(3, 1)(x), L.Conv2D(3, 1)(x)]), "on random values they lie from -"),
    "a softmax over one channel": (lambda x: L.Conv2D(1, 1, activation="softmax")(x), "1 everywhere.* needs a sigmoid"),
    "classes": (lambda x: ops.argmax(x, axis=-1, keepdims=True), r"gives int32, classes instead of scores"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_other_numbers_are_refused_with_the_remedy(name: str, tmp_path: Path) -> None:
    end, words = NUMBERS[name]
    made = network(end)
    with pytest.raises(UsageError, match=words):
        bundled(tmp_path, made, classes_of(made))
    assert not (tmp_path / "model" / "bundle.json").exists()


@pytest.mark.parametrize(("channels", "activation"), [(1, "sigmoid"), (3, "softmax"), (3, "sigmoid")])
def test_what_is_missing_is_added_in_the_bundle(channels: int, activation: str, tmp_path: Path) -> None:
    made = network(L.Conv2D(channels, 1, name="scores"))
    logits = np.asarray(made(IMAGE), np.float64)
    before = None
    for out in ("one", "other"):
        (tmp_path / out).mkdir()
        url = bundled(tmp_path / out, made, classes_of(made), activation=activation)
        assert before in (None, load_bundle(url).digest)  # the same network is the same file
        before = load_bundle(url).digest
    expected = softmax(logits) if activation == "softmax" else 1 / (1 + np.exp(-logits))
    expected = np.concatenate([1 - expected, expected], -1) if channels == 1 else expected
    np.testing.assert_allclose(scores_of(url), expected, atol=1e-5)
    again = np.asarray(keras.saving.load_model(Path(url, "model.keras"))(IMAGE))
    np.testing.assert_allclose(again, expected[..., -channels:], atol=1e-5)
    assert load_bundle(url).network["activation"] == activation
    assert record(url)["settings"]["activation"] == activation
    for _ in range(2):  # a rerun, which makes nothing, says the same
        assert record(url)["notes"] == [f"{activation} added behind its last layer"]
        assert bundled(tmp_path / out, made, classes_of(made), activation=activation) == url
    assert f"| `activation` | {activation} |" not in Path(url, "README.md").read_text()  # no setting of a training


def test_scores_are_taken_as_they_are_where_that_is_asked_for(tmp_path: Path) -> None:
    url = bundled(tmp_path, network(L.Conv2D(3, 1)), activation="none")
    assert Path(url, "model.keras").read_bytes() == (tmp_path / "net.keras").read_bytes()
    assert load_bundle(url).notes == record(url)["notes"]
    assert "taken as they are" in record(url)["notes"][0]


@pytest.mark.parametrize(
    ("end", "activation", "words"),
    [
        (lambda x: L.Conv2D(1, 1)(x), "softmax", "of one channel that is 1 everywhere; use sigmoid"),
        (lambda x: L.Conv2D(1, 1, activation="sigmoid")(x), "sigmoid", "the model has a sigmoid already"),
        (lambda x: L.Conv2D(3, 1, activation="softmax")(x), "sigmoid", "the model has a softmax already"),
        (lambda x: L.Conv2D(3, 1)(x), "tanh", "use sigmoid, softmax, none"),
    ],
)
def test_an_activation_that_cannot_be_is_refused(end: Any, activation: str, words: str, tmp_path: Path) -> None:
    made = network(end)
    with pytest.raises(UsageError, match=words):
        bundled(tmp_path, made, classes_of(made), activation=activation)


# --- inputs and outputs -------------------------------------------------------------------------------------------


def two(x: Any) -> dict[str, Any]:
    return {"edge": L.Conv2D(1, 1, activation="sigmoid")(x), "mask": L.Conv2D(3, 1, activation="softmax")(x)}


def test_an_output_of_several_is_named(tmp_path: Path) -> None:
    made = network(two)
    with pytest.raises(UsageError, match=r"gives 2 outputs: edge, mask; say .*: --output edge"):
        bundled(tmp_path, made)
    with pytest.raises(UsageError, match=r"--output masks: the model's outputs are edge, mask"):
        bundled(tmp_path, made, output="masks")
    url = bundled(tmp_path, made, output="mask")
    np.testing.assert_allclose(scores_of(url), made(IMAGE)["mask"], atol=1e-5)
    assert record(url)["settings"]["output"] == "mask"


def test_a_dict_of_one_is_told_and_a_list_of_one_is_that_one(tmp_path: Path) -> None:
    made = network(lambda x: {"mask": L.Conv2D(3, 1, activation="softmax")(x)})
    with pytest.raises(UsageError, match=r"gives its output as a dict: mask; .* --output mask"):
        bundled(tmp_path, made)
    (tmp_path / "net.keras").unlink()
    single = keras.Model([made.inputs[0]], [made.outputs[0]], name="net")
    np.testing.assert_allclose(scores_of(bundled(tmp_path, single)), made(IMAGE)["mask"], atol=1e-5)
    with pytest.raises(UsageError, match="one tensor without a name; leave --output out"):
        bundled(tmp_path, single, output="mask", overwrite=True)


def test_outputs_of_a_list_go_by_their_layers(tmp_path: Path) -> None:
    made = network(lambda x: [L.Conv2D(3, 1, name="first")(x), L.Conv2D(3, 1, activation="softmax", name="last")(x)])
    with pytest.raises(UsageError, match=r"gives 2 outputs: first, last;"):
        bundled(tmp_path, made)
    np.testing.assert_allclose(scores_of(bundled(tmp_path, made, output="last")), made(IMAGE)[1], atol=1e-5)


def test_inputs_and_outputs_of_other_forms_are_told(tmp_path: Path) -> None:
    image, height = keras.Input((None, None, 3), name="image"), keras.Input((None, None, 1), name="height")
    joined = L.Conv2D(3, 1, activation="softmax")(L.Concatenate()([image, height]))
    with pytest.raises(UsageError, match=r"takes 2 inputs \(image, height\); one tensor"):
        bundled(tmp_path, keras.Model([image, height], joined))
    (tmp_path / "net.keras").unlink()
    flat = network(lambda x: ops.squeeze(L.Conv2D(1, 1, activation="sigmoid")(x), -1))
    with pytest.raises(UsageError, match=r"output is \(None, None, None\); .* no argmax, no flattening"):
        bundled(tmp_path, flat, "land,water")


# --- layers -------------------------------------------------------------------------------------------------------


def test_layers_for_training_alone_change_nothing_and_are_told(tmp_path: Path) -> None:
    def end(x: Any) -> Any:
        for layer in (L.RandomFlip(), L.RandomRotation(0.2), L.RandomZoom(0.3), L.GaussianNoise(0.5)):
            x = layer(x)
        return L.Conv2D(3, 5, padding="same", activation="softmax")(x)

    url = bundled(tmp_path, network(end))
    assert (load_bundle(url).receptive_radius, "unbounded" in load_bundle(url).network) == (3, False)
    assert record(url)["notes"] == [
        "RandomFlip, RandomRotation, RandomZoom, GaussianNoise: for training only, changes nothing here"
    ]
    np.testing.assert_array_equal(scores_of(url), scores_of(url))


def squeeze_and_excitation(x: Any) -> Any:
    gate = L.Dense(8, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
    return L.Conv2D(2, 1, activation="softmax")(L.Multiply()([L.GroupNormalization(4)(x), gate]))


def test_what_sees_the_whole_window_is_told_when_it_is_made_and_when_it_maps(
    spark: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = network(squeeze_and_excitation, bands=2)
    assert {*measure(made).unbounded} == {"GlobalAveragePooling2D", "GroupNormalization"}
    made.save(tmp_path / "net.keras")
    model = bundle(str(tmp_path / "net.keras"), bands="x,y", classes="land,water", out=str(tmp_path / "model"))
    (note,) = record(model)["notes"]
    assert all(words in note for words in ("GroupNormalization", "GlobalAveragePooling2D", "seams are possible"))
    scene = write_scene(tmp_path / "s.tif", np.ones((2, 70, 90), np.uint16), names=("x", "y"))
    with caplog.at_level(logging.WARNING, "sattile"):
        out = predict(spark, model=model, scenes=[scene], out=str(tmp_path / "maps"), engine="tensorflow")
    assert f"predict: {note}" in caplog.messages
    assert record(out)["notes"] == [note]
    assert "notes" not in record(out)["settings"]


def test_a_bundle_of_before_tells_without_names(tmp_path: Path) -> None:
    url = bundled(tmp_path, network(squeeze_and_excitation), "land,water")
    described = json.loads(Path(url, "bundle.json").read_text())
    del described["network"]["unbounded"]
    Path(url, "bundle.json").write_text(json.dumps(described))
    (note,) = load_bundle(url).notes
    assert note.startswith("the network's scores depend on the whole window: seams are possible")
