"""The bundle, the window geometry measured from a network, and the scorer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Before TensorFlow starts: a scorer insists on its number of threads.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import sattile
from sattile.errors import SattileError, UsageError
from sattile.model import bundle, load_bundle, load_scorer
from sattile.receptive import OVERHEAD, measure
from sattile.training import networks

L = keras.layers


# --- Geometry, against a slow reference: poke every pixel and see which outputs move ------------------------------


def poke(network: Any, extent: int) -> int:
    """The radius by brute force: a clone of positive kernels, without biases, where nothing swallows a change."""

    def clone(layer: Any) -> Any:
        if isinstance(layer, L.MaxPooling2D):
            return L.AveragePooling2D(layer.pool_size, layer.strides, layer.padding, name=layer.name)
        config = layer.get_config()
        return layer.__class__.from_config(config | ({"activation": "linear"} if "activation" in config else {}))

    copy = keras.models.clone_model(network, clone_function=clone, recursive=True)
    for variable in copy.weights:
        positive = "kernel" in variable.name
        one = variable.name in ("gamma", "moving_variance", "variance")
        value = 1 / np.sqrt(np.prod(variable.shape)) if positive else 1.0 if one else 0.0
        variable.assign(np.full(variable.shape, value, np.float32))
    bands, most, each = network.input_shape[-1], 0, np.arange(extent)
    still = np.asarray(copy(np.zeros((1, extent, extent, bands), np.float32), training=False))
    for axis in (1, 2):
        pokes = np.zeros((extent, extent, extent, bands), np.float32)
        # Whole lines: a stride can pass over any one pixel of them.
        pokes[(each, each) if axis == 1 else (each, slice(None), each)] = 1e6
        for start in range(0, extent, 16):
            scores = np.asarray(copy(pokes[start : start + 16], training=False))
            moved = (scores != still).any(-1).any(3 - axis)
            for number, line in enumerate(moved, start):
                # Away from the edges, where the input ends before the network's view does.
                most = max(most, int(np.abs(np.flatnonzero(line) - number).max(initial=0)))
    return most


def chain(*layers: Any, bands: int = 2, classes: int = 2) -> Any:
    values = keras.Input((None, None, bands))
    x = values
    for layer in layers:
        x = layer(x)
    return keras.Model(values, L.Conv2D(classes, 1, activation="softmax")(x))


def skip_network() -> Any:
    """Two branches of other strides and reach that meet again, one of them a model inside the model."""
    values = keras.Input((None, None, 2))
    inner = keras.Sequential([keras.Input((None, None, 2)), L.Conv2D(2, 3, padding="same"), L.ReLU()])
    near = inner(values)
    far = L.Conv2D(2, 3, strides=2, padding="same", dilation_rate=1)(inner(near))
    far = L.UpSampling2D()(L.DepthwiseConv2D(5, padding="same")(far))
    return keras.Model(values, L.Conv2D(2, 1)(keras.ops.concatenate([near + 1.0, far], axis=-1)))


def backbone_network() -> Any:
    """A model inside the model that gives two tensors, one of them at half the size, as pretrained backbones do."""
    inside = keras.Input((None, None, 2))
    near = L.Conv2D(2, 3, padding="same")(inside)
    backbone = keras.Model(inside, [near, L.Conv2D(2, 5, strides=2, padding="same")(near)])
    values = keras.Input((None, None, 2))
    near, far = backbone(values)
    return keras.Model(values, L.Conv2D(2, 1)(L.Concatenate()([near, L.UpSampling2D(2)(far)])))


def small_unet(poolings: int) -> Any:
    values = keras.Input((None, None, 2))
    return keras.Model(values, L.Conv2D(2, 1)(networks.unet(values, poolings, 2, networks.plain)))


NETWORKS = {
    "pointwise": (lambda: chain(L.Dense(3), L.ReLU()), 1, 0),
    "conv": (lambda: chain(L.Conv2D(2, (3, 7), padding="same")), 1, 3),
    "even kernel": (lambda: chain(L.Conv2D(2, (4, 2), padding="same")), 1, 2),
    "dilated": (lambda: chain(L.Conv2D(2, 3, dilation_rate=4, padding="same")), 1, 4),
    "separable": (lambda: chain(L.SeparableConv2D(2, 5, padding="same")), 1, 2),
    "padded valid": (lambda: chain(L.ZeroPadding2D(((2, 0), (1, 1))), L.Conv2D(2, 3)), 1, 2),
    "strided, nearest": (lambda: chain(L.Conv2D(2, 3, 2, padding="same"), L.UpSampling2D(2)), 2, 2),
    "strided, bilinear": (
        lambda: chain(L.Conv2D(2, 3, 4, padding="same"), L.UpSampling2D(4, interpolation="bilinear")),
        4,
        None,
    ),
    "uneven strides": (lambda: chain(L.MaxPooling2D((2, 3)), L.UpSampling2D((2, 3))), 6, 2),
    "overlapping pool": (lambda: chain(L.MaxPooling2D(3, 2, padding="same"), L.UpSampling2D(2)), 2, None),
    "transposed 2": (lambda: chain(L.AveragePooling2D(2), L.Conv2DTranspose(2, 2, 2, padding="same")), 2, 1),
    "transposed 3": (lambda: chain(L.AveragePooling2D(2), L.Conv2DTranspose(2, 3, 2, padding="same")), 2, None),
    "transposed 4": (lambda: chain(L.AveragePooling2D(2), L.Conv2DTranspose(2, 4, 2, padding="same")), 2, None),
    "two branches": (skip_network, 2, None),
    "backbone of two outputs": (backbone_network, 2, 4),
    "unet, 1 pooling": (lambda: small_unet(1), 2, 9),
    "unet, 2 poolings": (lambda: small_unet(2), 4, 23),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_geometry_is_that_of_the_slow_reference(name: str) -> None:
    make, stride, radius = NETWORKS[name]
    network = make()
    found = measure(network)
    extent = 12 * stride * (1 + (found.receptive_radius or 0) // (4 * stride))
    assert found.total_stride == stride
    assert found.receptive_radius == poke(network, extent)
    if radius is not None:
        assert found.receptive_radius == radius  # worked out by hand


@settings(max_examples=8, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.sampled_from(["conv", "pool", "up"])),
        min_size=1,
        max_size=3,
    )
)
@example([(2, 2, 2, "up"), (1, 1, 2, "conv")])  # sees every other row and column alone
def test_any_chain_has_the_geometry_of_the_slow_reference(plan: list[tuple[int, int, int, str]]) -> None:
    layers: list[Any] = []
    for high, wide, step, kind in plan:
        if kind == "conv":
            layers.append(L.Conv2D(1, (high, wide), step, padding="same"))
        elif kind == "pool":
            layers.append(L.MaxPooling2D((high, wide), step, padding="same"))
        else:
            layers.append(L.Conv2D(1, (high, wide), dilation_rate=step, padding="same"))
            step = 1
        if step > 1:
            layers.append(L.UpSampling2D(step) if wide % 2 else L.Conv2DTranspose(1, high, step, padding="same"))
    network = chain(*layers)
    found = measure(network)
    assert found.receptive_radius == poke(network, -(-72 // found.total_stride) * found.total_stride)


def test_default_network_reaches_51_pixels() -> None:
    found = measure(small_unet(3))
    assert (found.total_stride, found.receptive_radius) == (8, 51)


@pytest.mark.parametrize(
    "layer",
    [L.GroupNormalization(1), L.UnitNormalization(axis=(1, 2)), L.Softmax(axis=1)],
    ids=["groups", "unit", "softmax"],
)
def test_statistics_over_the_window_have_no_bound(layer: Any) -> None:
    found = measure(chain(L.Conv2D(2, 3, 2, padding="same"), layer, L.UpSampling2D(2)))
    assert (found.total_stride, found.receptive_radius) == (2, None)


def test_global_pooling_has_no_bound() -> None:
    values = keras.Input((None, None, 3))
    gate = L.GlobalAveragePooling2D(keepdims=True)(values)
    assert measure(keras.Model(values, L.Conv2D(2, 1)(L.Multiply()([values, gate])))).receptive_radius is None
    assert measure(keras.Model(values, L.Conv2D(2, 1)(values))).receptive_radius == 0


def test_slices_of_channels_have_no_neighbours_once_loaded_either(tmp_path: Path) -> None:
    values = keras.Input((None, None, 3))
    x = keras.layers.Concatenate()([values[..., :2], values[:, :, :, 1:]])
    network = keras.Model(values, L.Conv2D(2, 3, padding="same")(x))
    network.save(tmp_path / "net.keras")
    assert measure(network).receptive_radius == 1
    assert measure(keras.models.load_model(tmp_path / "net.keras")).receptive_radius == 1
    rows = keras.Model(values, L.Conv2D(2, 1)(values[:, ::1, 0:]))
    assert measure(rows).receptive_radius is None


def test_fixed_input_shape_is_kept() -> None:
    values = keras.Input((24, 40, 3))
    found = measure(keras.Model(values, L.Conv2D(2, 5, padding="same")(values)))
    assert (found.input_shape, found.receptive_radius) == ((24, 40), 2)


@pytest.mark.parametrize(
    "layer", [L.Conv2D(2, 3), L.MaxPooling2D(2), L.UpSampling2D(2)], ids=["valid", "half", "twice"]
)
def test_another_output_size_is_refused(layer: Any) -> None:
    with pytest.raises(UsageError, match=r"gives \d+ x \d+ pixels for \d+ x \d+"):
        measure(chain(layer))


def test_activations_are_those_alive_at_once() -> None:
    values = keras.Input((None, None, 2))
    wide = L.Conv2D(10, 1)(values)
    narrow = L.Conv2D(3, 1)(wide)
    # 4 bytes; 10 and 3 channels are alive together, the input no more.
    assert measure(keras.Model(values, L.Conv2D(2, 1)(narrow))).activation_bytes == pytest.approx(OVERHEAD * 4 * 13)
    half = L.MaxPooling2D(2)(wide)
    joined = L.Concatenate()([wide, L.UpSampling2D()(half)])
    found = measure(keras.Model(values, L.Conv2D(2, 1)(joined)))
    assert found.activation_bytes == pytest.approx(OVERHEAD * 4 * (10 + 10 + 20))


# --- Bundles of foreign networks -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Keras file: 3 bands in, 2 probabilities out."""
    path = tmp_path_factory.mktemp("foreign") / "net.keras"
    keras.utils.set_random_seed(1)
    values = keras.Input((None, None, 3))
    # Small weights: of values like stored ones, the scores are neither 0 nor 1.
    small = keras.initializers.RandomNormal(stddev=1e-4)
    x = L.Conv2D(2, 3, padding="same", activation="softmax", kernel_initializer=small)(values)
    keras.Model(values, x, name="foreign").save(path)
    return path


@pytest.fixture(scope="module")
def made(foreign: Path) -> str:
    return bundle(str(foreign), bands="B02,B03,B04", classes="land=3,water=1", out=str(foreign.parent / "model"))


def test_bundle_says_what_the_network_is(made: str, foreign: Path) -> None:
    found = load_bundle(made)
    assert (found.bands, [one.id for one in found.classes]) == (("B02", "B03", "B04"), [3, 1])  # scores' order
    assert (found.total_stride, found.receptive_radius, found.input_shape) == (1, 1, None)
    assert (found.fill, found.values, found.output, found.gsd) == ((0, 0, 0), "raw", "scores", None)
    assert Path(made, "model.keras").read_bytes() == foreign.read_bytes()


def test_scores_are_the_same_bits_for_any_dtype_and_batch(made: str, foreign: Path) -> None:
    score = load_scorer(load_bundle(made))
    images = np.random.default_rng(0).integers(-500, 9000, (3, 20, 31, 3)).astype(np.int16)
    whole = score(images)
    assert (whole.shape, whole.dtype) == ((3, 20, 31, 2), np.float32)
    np.testing.assert_array_equal(whole, score(images.astype(np.float64)))
    np.testing.assert_array_equal(whole, score(images))
    np.testing.assert_array_equal(whole[1:2], score(images[1:2]))
    expected = keras.models.load_model(foreign)(images.astype(np.float32))
    np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-2)
    assert load_scorer(load_bundle(made)) is score


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((2,), "float32", "one tensor .batch, height, width, channels. is needed"),
        ((None, None, None), "float32", "takes any number of bands and 2 are named"),
        ((2, None, None), "float32", "one tensor|is it channels first"),
        (
            (None, None, 2),
            "uint8",
            "takes uint8, in which larger numbers begin again at 0; give it an input of float32",
        ),
    ],
)
def test_networks_that_cannot_be_mapped_with_are_told(tmp_path: Path, shape: Any, dtype: str, message: str) -> None:
    values = keras.Input(shape, dtype=dtype)
    keras.Model(values, L.Rescaling(0.5)(values)).save(tmp_path / "net.keras")
    with pytest.raises(UsageError, match=message):
        bundle(str(tmp_path / "net.keras"), bands="a,b", classes="no,yes", out=str(tmp_path / "model"))
    with pytest.raises(UsageError, match="is a folder"):
        bundle(str(tmp_path), bands="a,b", classes="no,yes", out=str(tmp_path / "model"))


def test_paths_may_be_pathlibs(foreign: Path, tmp_path: Path) -> None:
    out = sattile.bundle(foreign, bands=["a", "b", "c"], classes=["no", "yes"], out=tmp_path / "model")
    assert out == str(tmp_path / "model")
    assert sattile.load_bundle(Path(out)).bands == ("a", "b", "c")
    assert Path(sattile.report(tmp_path / "model", out=tmp_path / "page")).name == "index.html"


def test_saved_model_serves_the_same_scores(made: str) -> None:
    import tensorflow as tf

    images = np.random.default_rng(0).normal(size=(2, 16, 24, 3)).astype(np.float32)
    signature = tf.saved_model.load(f"{made}/saved_model").signatures["serving_default"]
    (scores,) = signature(tf.constant(images)).values()
    np.testing.assert_allclose(scores, load_scorer(load_bundle(made))(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["nearest", "bilinear", "bicubic"])
def test_upsampling_of_every_kind_is_served(tmp_path: Path, mode: str) -> None:
    import tensorflow as tf

    grow = keras.Sequential([keras.Input((None, None, 3)), L.UpSampling2D((2, 3), interpolation=mode)])
    network = chain(L.Conv2D(3, 3, (2, 3), padding="same"), grow, bands=3)
    network.save(tmp_path / "net.keras")
    out = bundle(str(tmp_path / "net.keras"), bands="a,b,c", classes="no,yes", out=str(tmp_path / "model"))
    images = np.random.default_rng(0).normal(size=(2, 12, 30, 3)).astype(np.float32)
    signature = tf.saved_model.load(f"{out}/saved_model").signatures["serving_default"]
    (scores,) = signature(tf.constant(images)).values()
    np.testing.assert_allclose(scores, network(images), rtol=1e-5, atol=1e-5)


def test_the_same_network_is_the_same_file(tmp_path: Path) -> None:
    from sattile.model import save_bundle
    from sattile.schema import SegmentClass

    network = small_unet(1)
    classes = (SegmentClass(0, "a", "#000000"), SegmentClass(1, "b", "#ffffff"))
    written = set()
    for name in ("one", "other"):
        url = tmp_path / name
        save_bundle(str(url), network, bands=["b1", "b2"], classes=classes, fill=[0, 0])
        files = ("model.keras", "README.md", "item.json")
        written.add(tuple((url / file).read_bytes() for file in files))
        time.sleep(1.1)  # a .keras file says when it was written, in seconds
    assert len(written) == 1
    keras.models.load_model(tmp_path / "one" / "model.keras")


def test_where_a_network_lies_in_memory_is_not_in_its_file(tmp_path: Path) -> None:
    from sattile.model import save_bundle
    from sattile.schema import SegmentClass

    classes = (SegmentClass(0, "a", "#000000"), SegmentClass(1, "b", "#ffffff"))
    kept, digests = [], set()
    for name in ("one", "other"):
        shared = [keras.DTypePolicy("float32"), keras.DTypePolicy("float32")]
        values = keras.Input((None, None, 2), name="values")
        x = values
        for number in range(4):
            x = L.Conv2D(2, 1, kernel_initializer="ones", dtype=shared[number % 2], name=f"layer_{number}")(x)
        kept.append(keras.Model(values, x, name="net"))
        found = save_bundle(str(tmp_path / name), kept[-1], bands=["b1", "b2"], classes=classes, fill=[0, 0])
        digests.add(found.digest)
        keras.models.load_model(tmp_path / name / "model.keras")
    assert len(digests) == 1


def test_one_channel_is_the_probability_of_the_second(tmp_path: Path) -> None:
    values = keras.Input((None, None, 1))
    keras.Model(values, L.Conv2D(1, 1, activation="sigmoid")(values)).save(tmp_path / "net.keras")
    out = bundle(str(tmp_path / "net.keras"), bands="b", classes="no,yes", out=str(tmp_path / "model"), fill="7")
    found = load_bundle(out)
    assert (found.output, found.fill) == ("second", (7,))
    images = np.random.default_rng(0).normal(size=(1, 5, 9, 1))
    scores = load_scorer(found)(images)
    np.testing.assert_allclose(scores.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        scores[..., 1:], keras.models.load_model(tmp_path / "net.keras")(images.astype("float32")), rtol=1e-5
    )


def test_a_rerun_writes_nothing_but_its_record(made: str, foreign: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(made).rglob("*") if path.name != "_run.json"}
    bundle(str(foreign), bands="B02,B03,B04", classes="land=3,water=1", out=made)
    after = {path: path.stat().st_mtime_ns for path in Path(made).rglob("*") if path.name != "_run.json"}
    assert {path: time for path, time in before.items() if path.is_file()} == {
        path: time for path, time in after.items() if path.is_file()
    }
    with pytest.raises(UsageError, match="other settings"):
        bundle(str(foreign), bands="B04,B03,B02", classes="land=3,water=1", out=made)


def test_versions_lie_side_by_side_and_the_latest_is_loaded(
    foreign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the whole bundle and its run record or `latest.json`: the old one is loaded until then."""
    root = str(tmp_path / "models" / "water")

    def version(classes: str) -> str:
        return bundle(str(foreign), bands="B02,B03,B04", classes=classes, out=root, versions=True)

    assert version("land,water") == f"{root}/v1"
    assert load_bundle(root) == load_bundle(f"{root}/v1")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    written = set()
    for where in ("sattile.record.Run.finish", "sattile.versions.move_latest"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, killed)
            version("land,sea")
        assert load_bundle(f"{root}/v2").classes[1].name == "sea"  # whole
        assert load_bundle(root).url == f"{root}/v1"
        written.add(Path(root, "v2", "bundle.json").stat().st_mtime_ns)
    assert len(written) == 1  # what is whole is not made again
    before = {path: path.stat().st_mtime_ns for path in Path(root).rglob("*") if path.is_file()}
    assert version("land,sea") == f"{root}/v2"
    changed = {str(path.relative_to(root)) for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"latest.json", "v2/_run.json"}
    assert load_bundle(root) == load_bundle(f"{root}/v2")
    assert version("land,water") == f"{root}/v1"
    assert load_bundle(root).url == f"{root}/v2"
    with pytest.raises(UsageError, match="--versions makes the next one"):
        bundle(str(foreign), bands="B02,B03,B04", classes="land,water", out=root, overwrite=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bands": "B02,B03"}, "takes 3 bands and 2 are named"),
        ({"classes": "a,b,c"}, r"gives 2 score\(s\) per pixel and 3 classes"),
        ({"classes": "water"}, "at least two"),
        ({"fill": "1,2"}, "give one finite number, or 3"),
        ({"fill": "nan"}, "finite"),
        ({"values": "reflectance"}, "raw or scaled"),
        ({"keras": "/nowhere/net.keras"}, "does not exist"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_numbers(
    foreign: Path, tmp_path: Path, change: dict[str, str], words: str
) -> None:
    good = {"keras": str(foreign), "bands": "B02,B03,B04", "classes": "land,water", "out": str(tmp_path / "model")}
    with pytest.raises(UsageError, match=words):
        bundle(**(good | change))
    assert not (tmp_path / "model" / "bundle.json").exists()


@pytest.mark.parametrize(
    ("shape", "words"),
    [((64, 96), "64 x 96 only; windows are square"), ((None, 64), "fix both")],
    ids=["oblong", "half fixed"],
)
def test_an_input_that_no_window_fits_is_refused_at_once(
    tmp_path: Path, shape: tuple[int | None, int], words: str
) -> None:
    values = keras.Input((*shape, 1))
    keras.Model(values, L.Conv2D(2, 3, padding="same")(values)).save(tmp_path / "net.keras")
    with pytest.raises(UsageError, match=words):
        bundle(str(tmp_path / "net.keras"), bands="b", classes="a,b", out=str(tmp_path / "model"))


def test_code_in_a_keras_file_is_refused(tmp_path: Path) -> None:
    values = keras.Input((None, None, 1))
    keras.Model(values, L.Lambda(lambda x: keras.ops.concatenate([x, -x], -1))(values)).save(tmp_path / "net.keras")
    with pytest.raises(UsageError, match="safe mode"):
        bundle(str(tmp_path / "net.keras"), bands="b", classes="a,b", out=str(tmp_path / "model"))
    (tmp_path / "net.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(UsageError, match=r"no \.keras file"):
        bundle(str(tmp_path / "net.h5"), bands="b", classes="a,b", out=str(tmp_path / "model"))


def test_what_is_no_bundle_is_refused(made: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_bundle(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match="is no bundle"):
        load_bundle(str(tmp_path))
    content = json.loads(Path(made, "bundle.json").read_text())
    (tmp_path / "bundle.json").write_text(json.dumps(content | {"format": "sattile-bundle/2"}))
    with pytest.raises(UsageError, match="newer"):
        load_bundle(str(tmp_path))
    (tmp_path / "bundle.json").write_text(json.dumps({"format": content["format"]}))
    with pytest.raises(UsageError, match="damaged"):
        load_bundle(str(tmp_path))


def test_a_changed_network_is_not_run(made: str, tmp_path: Path) -> None:
    (tmp_path / "bundle.json").write_bytes(
        Path(made, "bundle.json").read_bytes().replace(load_bundle(made).digest.encode(), b"0" * 64)
    )
    (tmp_path / "model.keras").write_bytes(Path(made, "model.keras").read_bytes())
    with pytest.raises(SattileError, match="changed"):
        load_scorer(load_bundle(str(tmp_path)))


def test_planning_needs_no_tensorflow(made: str) -> None:
    code = (
        f"import sys, sattile.model; sattile.model.load_bundle({made!r}); "
        "print({'tensorflow', 'keras'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
