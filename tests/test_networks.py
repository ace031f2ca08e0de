"""Networks by name, their inputs and first weights, and what they are trained to make small."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sattile.errors import UsageError
from sattile.model import save_bundle
from sattile.receptive import measure
from sattile.schema import IGNORE, SegmentClass
from sattile.statistics import BandStatistics, steady
from sattile.training import indices, losses, networks, transfer


def test_normalisation_is_inside_and_stands_wild_values() -> None:
    statistics = {"a": {"mean": 100, "std": 10}, "b": {"mean": -3, "std": 0}}
    import keras

    values = keras.Input((None, None, 2))
    network = keras.Model(values, networks.normalise(values, ["a", "b"], statistics))
    found = np.asarray(network(np.array([[[[110, -3], [1e9, -1e9], [70, -2]]]], np.float32)))
    np.testing.assert_allclose(found[0, 0], [[1, 0], [6, -6], [-3, 1]], atol=1e-5)


def test_a_few_wild_values_do_not_flatten_a_band() -> None:
    # Normal around 100 with deviation 10, and one glint in a thousand that blows the plain deviation up to 900.
    assert networks.spread({"mean": 101, "std": 900, "percentiles": {"1": 77, "99": 124}}) == pytest.approx(
        10.3, abs=0.1
    )
    assert networks.spread({"mean": 5, "std": 0, "percentiles": {"1": 5, "99": 5}}) == 1


def test_values_that_carry_the_mean_off_do_not_count() -> None:
    """One in ten thousand is -1e9; or float32's least number, as files without a declared nodata have it."""
    rng = np.random.default_rng(0)
    for wild in (-1e9, float(np.finfo(np.float32).min)):
        values = rng.normal(100, 10, 100_000).astype(np.float32)
        values[::10_000] = wild
        made = BandStatistics("float32")
        made.add(values)
        found = steady(made.summary())
        assert found["mean"] == pytest.approx(100, abs=1)
        assert found["std"] == pytest.approx(10, abs=0.5)
    usual = {"mean": 90.0, "std": 12.0, "percentiles": {"1": 77, "50": 95, "99": 124}}
    assert steady(usual) is usual


def test_a_network_is_known_by_what_it_does_not_by_how_keras_counts() -> None:
    import keras

    def found(activation: str = "relu", seed: int = 0) -> str:
        keras.utils.set_random_seed(seed)
        given = keras.Input((None, None, 2))
        x = keras.layers.Conv2D(4, 3, padding="same", activation=activation)(given)
        x = keras.layers.Concatenate()([given, x])
        return networks.fingerprint(keras.Model(given, keras.layers.Conv2D(2, 1)(x)))

    assert found() == found()
    assert len({found(), found("tanh"), found(seed=1)}) == 3


@pytest.mark.parametrize("arch", list(networks.BODIES))
def test_tiles_are_multiples_of_the_stride(arch: str) -> None:
    given = {"bands": ["a"], "classes": ["x", "y"], "statistics": {"a": {"mean": 1, "std": 1}}}
    step = networks.stride(arch)
    network = networks.build(arch, size=3 * step, **given)
    networks.check_size(arch, network, 3 * step)
    if step > 1:
        with pytest.raises(UsageError, match=f"tiles of {3 * step + 1} x"):
            networks.check_size(arch, network, 3 * step + 1)


def build_foreign(bands: list[str], classes: list[str], statistics: dict[str, Any]) -> Any:
    """A user's builder: normalised by hand, one convolution."""
    import keras

    values = keras.Input((None, None, len(bands)))
    x = keras.layers.Rescaling(1 / statistics[bands[0]]["std"])(values)
    return keras.Model(values, keras.layers.Conv2D(len(classes), 1, activation="softmax")(x))


def build_wrong(**_: Any) -> Any:
    return build_foreign(["a", "b"], ["x", "y", "z"], {"a": {"std": 1}})


def needs_more(bands: list[str], depth: int) -> Any:
    return bands, depth


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("unet-huge", "unet-small"),
        ("no.such.module:build", "PYTHONPATH"),
        (f"{__name__}:nothing", "has no nothing"),
        (f"{__name__}:build_wrong", "output shape"),
        (f"{__name__}:needs_more", "must take the keywords"),
    ],
)
def test_what_cannot_be_built_is_refused(arch: str, words: str) -> None:
    statistics = {"a": {"mean": 0, "std": 1}, "b": {"mean": 0, "std": 1}}
    with pytest.raises(UsageError, match=words):
        networks.build(arch, bands=["a", "b"], classes=["x", "y"], statistics=statistics, size=16)


def test_dice_is_per_tile_over_the_classes_it_shows() -> None:
    probabilities = np.zeros((3, 1, 4, 2), np.float32)
    probabilities[0, 0] = [[1, 0], [1, 0], [0, 1], [0, 1]]
    probabilities[1, 0] = [[0.5, 0.5]] * 4
    probabilities[2] = 1
    labels = np.array([[[0, 0, 1, 1]], [[0, 0, 0, IGNORE]], [[IGNORE] * 4]], np.uint8)
    found = np.asarray(losses.dice_loss(probabilities, labels))
    # all right; 3 of 3 at one half: 1 - (2 * 1.5 + 1) / (3 + 1.5 + 1); no labels
    np.testing.assert_allclose(found, [0, 1 - 4 / 5.5, 0], atol=1e-6)


def test_balanced_weights_keep_the_mean() -> None:
    pixels = np.array([9900, 100])
    weights = losses.class_weights("balanced", pixels)
    assert weights[1] / weights[0] == pytest.approx(99**0.5, rel=1e-5)
    assert (weights * pixels).sum() == pytest.approx(pixels.sum(), rel=1e-5)


LANDSAT = ["coastal", "blue", "green", "red", "nir", "swir1", "swir2"]


def statistics_of(bands: list[str], offset: float = 0) -> dict[str, Any]:
    return {band: {"mean": 900.0 + 100 * place + offset, "std": 300.0 + 20 * place} for place, band in enumerate(bands)}


def make(arch: str, bands: list[str], classes: list[str], offset: float = 0, index_names: tuple[str, ...] = ()) -> Any:
    return networks.build(
        arch, bands=bands, classes=classes, statistics=statistics_of(bands, offset), size=32, index_names=index_names
    )


def some_values(bands: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.random.default_rng(1).normal(1200, 400, (1, height, width, bands)).astype(np.float32)


@pytest.mark.parametrize("arch", [name for name in networks.BODIES if not name.endswith(("medium", "large"))])
def test_each_architecture_keeps_height_and_width_and_can_be_measured(arch: str) -> None:
    network = make(arch, LANDSAT, ["land", "water", "ice"], index_names=("ndwi", "nir~red"))
    found = measure(network)
    width = 32 if arch == networks.CLASSIFIER else 64
    scores = np.asarray(network(some_values(7, 32, width)))
    assert scores.shape == (1, 32, width, 3)
    np.testing.assert_allclose(scores.sum(-1), 1, atol=1e-5)
    assert (found.receptive_radius is None) == (arch == networks.CLASSIFIER)
    if arch == "pixel-mlp":
        assert (found.total_stride, found.receptive_radius) == (1, 0)


def test_a_light_network_has_a_tenth_of_the_weights() -> None:
    plain, light = (make(arch, LANDSAT, ["a", "b"]).count_params() for arch in ("unet-small", "light-small"))
    assert light < plain / 6


def test_an_index_does_not_change_with_brightness() -> None:
    import keras

    values = keras.Input((None, None, 7))
    pairs = indices.parse(("mndwi", "red~blue"), LANDSAT)
    zero = {band: {"mean": 0.0} for band in LANDSAT}
    network = keras.Model(values, keras.layers.Concatenate()(indices.layers(values, pairs, zero)))
    given = np.abs(some_values(7, 5, 8))
    found = np.asarray(network(given))
    green, swir, red, blue = (given[..., LANDSAT.index(name)] for name in ("green", "swir1", "red", "blue"))
    np.testing.assert_allclose(found[..., 0], 2 * (green - swir) / (green + swir), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[..., 1], 2 * (red - blue) / (red + blue), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.asarray(network(given * 1.7)), found, rtol=1e-4, atol=1e-5)
    assert np.isfinite(np.asarray(network(np.zeros_like(given)))).all()
    assert np.isfinite(np.asarray(network(-given))).all()


def test_indices_are_chosen_by_the_names_of_bands() -> None:
    assert indices.choose("auto", LANDSAT) == ("ndwi", "mndwi", "ndvi")
    assert indices.choose("auto", ["B02", "B03", "B08"]) == ("ndwi",)
    assert indices.choose("auto", ["b1", "b2", "b3"]) == ()
    # Harmonised Landsat: B05 is its near infrared, B11 thermal.
    assert indices.choose("auto", ["B02", "B03", "B04", "B05", "B06", "B07", "B10", "B11"]) == ()
    assert indices.choose("auto", ["B03", "B11", "B12"]) == ("mndwi",)
    assert indices.choose("none", LANDSAT) == ()
    assert indices.choose("ndvi, nir~blue", LANDSAT) == ("ndvi", "nir~blue")
    for text, words in (
        ("ndwii", "did you mean ndwi"),
        ("nbr", "swir2"),
        ("a~c", "two of the bands"),
        ("red~red", "one band"),
        ("ndvi,nir~red", "twice"),
    ):
        with pytest.raises(UsageError, match=words):
            indices.choose(text, ["green", "nir", "red"])


# --- Weights from an earlier network -------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["unet-tiny", "resunet-small", "light-small", "deeplab-small", "pixel-mlp"])
def test_a_wider_network_begins_with_what_the_earlier_one_said(arch: str) -> None:
    """Whatever the new bands and their order: same scores, though the new tiles have other statistics."""
    import keras

    old = make(arch, ["green", "nir", "red"], ["land", "water"], index_names=("ndwi",))
    source = transfer.Source("old", old, ("green", "nir", "red"), ("ndwi",), ("land", "water"))
    bands, classes = ["swir1", "red", "green", "nir"], ["land", "water"]
    index_names = ("mndwi", "ndwi")
    kept = transfer.statistics(source, bands, statistics_of(bands, offset=333))
    new = networks.build(arch, bands=bands, classes=classes, statistics=kept, size=32, index_names=index_names)
    transfer.start(new, source, bands=bands, indices=index_names, classes=classes)
    values = some_values(4)
    np.testing.assert_allclose(np.asarray(new(values)), np.asarray(old(values[..., [2, 3, 1]])), atol=2e-5)
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        coarse = networks.build(arch, bands=bands, classes=classes, statistics=kept, size=32, index_names=index_names)
    finally:
        keras.config.set_dtype_policy("float32")
    transfer.start(coarse, source, bands=bands, indices=index_names, classes=classes)
    new.set_weights(coarse.get_weights())  # which are float32
    np.testing.assert_allclose(np.asarray(new(values)), np.asarray(old(values[..., [2, 3, 1]])), atol=2e-5)


def test_scores_of_known_classes_are_kept() -> None:
    old = make("unet-tiny", ["a", "b"], ["land", "water"])
    source = transfer.Source("old", old, ("a", "b"), (), ("land", "water"))
    new = make("unet-tiny", ["a", "b"], ["water", "ice", "land"])
    transfer.start(new, source, bands=["a", "b"], indices=(), classes=["water", "ice", "land"])
    values = some_values(2)
    before, after = np.asarray(old(values)), np.asarray(new(values))
    ratio = after[..., 0] / after[..., 2]
    np.testing.assert_allclose(ratio, before[..., 1] / before[..., 0], rtol=1e-3)


def test_bands_are_known_by_other_names_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bands, here = ["green", "nir", "swir1"], ["B11", "B8A", "B03", "B12"]
    old = make("unet-tiny", bands, ["x", "y"], index_names=("ndwi", "nir~swir1"))
    classes = (SegmentClass(0, "x", "#000000"), SegmentClass(1, "y", "#ffffff"))
    about = {"arch": "unet-tiny", "indices": ["ndwi", "nir~swir1"]}
    save_bundle(str(tmp_path / "old"), old, bands=bands, classes=classes, fill=[0] * 3, about=about)
    given: dict[str, Any] = {"indices": (), "classes": ["x", "y"]}
    source = transfer.load(str(tmp_path / "old"), bands=here, **given)
    assert source.bands == ("B03", "B8A", "B11")
    assert source.indices == ("ndwi", "B8A~B11")
    with caplog.at_level(logging.WARNING, "sattile"):
        assert transfer.load(str(tmp_path / "old"), bands=["a", "b"], **given).bands == ("green", "nir", "swir1")
    assert "knows none of the bands here; weights of a, b begin anew" in caplog.text


def test_a_keras_file_that_names_no_bands_must_fit(tmp_path: Path) -> None:
    make("unet-tiny", ["a", "b", "c"], ["x", "y"]).save(tmp_path / "net.keras")
    url = str(tmp_path / "net.keras")
    assert transfer.load(url, bands=["c", "a", "d"], indices=(), classes=["x", "y"]).bands == ("c", "a", "d")
    for change in ({"bands": ["a", "b"]}, {"classes": ["x", "y", "z"]}, {"indices": ("a~b",)}):
        given: dict[str, Any] = {"bands": ["a", "b", "c"], "indices": (), "classes": ["x", "y"]} | change
        with pytest.raises(UsageError, match="sattile bundle --keras net"):
            transfer.load(url, **given)


def test_a_builders_layers_are_taken_in_their_order() -> None:
    """Keras numbers them from where it is in the process."""
    statistics = {"a": {"mean": 0, "std": 1}}
    old = build_foreign(["a"], ["x", "y"], statistics)
    source = transfer.Source("old", old, ("a",), (), ("x", "y"))
    new = build_foreign(["a"], ["x", "y"], statistics)
    assert new.layers[-1].name != old.layers[-1].name
    transfer.start(new, source, bands=["a"], indices=(), classes=["x", "y"])
    for one, other in zip(new.get_weights(), old.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("size", [7, 100])
def test_a_tile_classifier_looks_at_tiles_of_any_size(size: int) -> None:
    given: dict[str, Any] = {"bands": ["a"], "classes": ["x", "y"], "statistics": {"a": {"mean": 0, "std": 1}}}
    network = networks.build(networks.CLASSIFIER, size=size, **given)
    assert network.count_params() > 2000
    scores = np.asarray(network(np.random.default_rng(0).normal(size=(1, size, size, 1)).astype(np.float32)))
    assert np.ptp(scores, axis=(1, 2)).max() == 0


def test_weights_of_another_architecture_are_refused() -> None:
    source = transfer.Source("old", make("unet-tiny", ["a"], ["x", "y"]), ("a",), (), ("x", "y"))
    with pytest.raises(UsageError, match="--arch"):
        transfer.start(make("unet-small", ["a"], ["x", "y"]), source, bands=["a"], indices=(), classes=["x", "y"])


# --- Losses --------------------------------------------------------------------------------------------------------


def loss_of(labels: np.ndarray, logits: np.ndarray, **how: Any) -> tuple[np.ndarray, np.ndarray]:
    import tensorflow as tf

    loss = losses.Loss(np.ones(logits.shape[-1], np.float32), **how)
    logp = tf.nn.log_softmax(logits.astype(np.float32))
    return np.asarray(loss.sums(logp, labels)), np.asarray(loss.totals(labels))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), hard=st.sampled_from([1.0, 0.3]), smoothing=st.sampled_from([0.0, 0.2]))
def test_losses_of_parts_add_up(seed: int, hard: float, smoothing: float) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 1, 2, IGNORE], np.uint8), (5, 6, 9))
    labels[3] = IGNORE
    logits = rng.normal(0, 2, (5, 6, 9, 3))
    how = {"hard_share": hard, "smoothing": smoothing}
    whole = loss_of(labels, logits, **how)
    parts = [loss_of(labels[part], logits[part], **how) for part in (slice(0, 2), slice(2, 5))]
    for number in (0, 1):
        np.testing.assert_allclose(whole[number], parts[0][number] + parts[1][number], rtol=1e-5)
    assert whole[1].tolist()[1] == 4


def test_smoothing_asks_for_less_than_certainty_and_hard_pixels_are_the_worst() -> None:
    labels = np.array([[[0, 0, 1, IGNORE]]], np.uint8)
    logits = np.zeros((1, 1, 4, 2))
    logits[..., 0] = [3, -1, 0, 50]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    each = -logp[0, 0, [0, 1, 2], [0, 0, 1]]
    assert loss_of(labels, logits, dice=0)[0][0] == pytest.approx(each.sum(), rel=1e-5)
    sums, totals = loss_of(labels, logits, dice=0, hard_share=0.5)  # 2 of 3 pixels
    assert (sums[0], totals[0]) == (pytest.approx(np.sort(each)[1:].sum(), rel=1e-5), 2)
    smooth = -(0.9 * logp[0, 0, [0, 1, 2], [0, 0, 1]] + 0.1 * logp[0, 0, [0, 1, 2], [1, 1, 0]])
    assert loss_of(labels, logits, dice=0, smoothing=0.2)[0][0] == pytest.approx(smooth.sum(), rel=1e-5)
