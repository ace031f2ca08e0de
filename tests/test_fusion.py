"""Fused networks say what the networks say that they were made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sattile.fusion import fuse
from sattile.receptive import measure
from sattile.training.networks import BODIES, build

L = keras.layers
BANDS = ("red", "nir", "swir")


def trained(network: Any, seed: int = 0) -> Any:
    """A network with weights and batch statistics as after a training: none is 0 or 1."""
    rng = np.random.default_rng(seed)
    for layer in network._flatten_layers(include_self=False):
        if isinstance(layer, L.BatchNormalization):
            for one in layer.variables:
                low = 0.3 if "variance" in one.name else -1.0
                one.assign(rng.uniform(low, 1.5, one.shape))
        elif isinstance(layer, L.Conv2D | L.DepthwiseConv2D):
            layer.set_weights([rng.normal(0, 0.3, one.shape) for one in layer.get_weights()])
    return network


def differ(network: Any, shape: tuple[int, int] = (16, 24)) -> float:
    """How far the fused network's scores are from the network's, of the largest that there is and a tenth.

    The tenth is for rounding: inputs and weights are around 1, but a network's scores can all be next to 0.
    """
    values = np.random.default_rng(1).normal(0, 1, (2, *shape, network.input_shape[-1])).astype(np.float32)
    was = np.asarray(network(values, training=False))
    return float(np.abs(np.asarray(fuse(network)(values, training=False)) - was).max() / (0.1 + np.abs(was).max()))


def kinds(network: Any) -> set[str]:
    return {type(layer).__name__ for layer in network.layers}


@pytest.mark.parametrize("arch", sorted(BODIES))
def test_our_networks_keep_their_scores_and_geometry(arch: str) -> None:
    statistics = {band: {"mean": 0.2, "std": 1.1} for band in BANDS}
    network = trained(build(arch, bands=BANDS, classes=("land", "water"), statistics=statistics, size=32))
    logits = keras.Model(network.inputs[0], network.get_layer("logits").output)
    assert differ(logits, (32, 32) if arch == "tile-classifier" else (32, 48)) < 1e-5
    before, after = measure(network), measure(fuse(network))
    assert (after.total_stride, after.receptive_radius) == (before.total_stride, before.receptive_radius)
    assert after.activation_bytes <= before.activation_bytes


def test_a_unet_has_nothing_left_to_fuse() -> None:
    statistics = {band: {"mean": 0.2, "std": 1.1} for band in BANDS}
    network = build("unet-tiny", bands=BANDS, classes=("land", "water"), statistics=statistics, size=32)
    assert {"BatchNormalization", "UpSampling2D", "Concatenate"} <= kinds(network)
    assert not {"BatchNormalization", "UpSampling2D", "Concatenate"} & kinds(fuse(network))
    assert measure(fuse(network)).activation_bytes == measure(network).activation_bytes / 2


def test_the_given_network_stays_as_it_was() -> None:
    network = trained(way_up(lambda skip, x: L.Concatenate()([skip, L.UpSampling2D()(x)])))
    said, weights = network.to_json(), network.get_weights()
    assert kinds(fuse(network)) != kinds(network)
    assert network.to_json() == said
    assert all(np.array_equal(*pair) for pair in zip(network.get_weights(), weights, strict=True))


def way_up(join: Callable[[Any, Any], Any], convolution: Any = None) -> Any:
    """Half the size and back: `join` is given the features of both sizes."""
    values = keras.Input((None, None, 3))
    skip = L.Conv2D(4, 3, padding="same")(values)
    low = L.Conv2D(5, 3, padding="same")(L.MaxPooling2D()(skip))
    x = join(skip, low)
    return keras.Model(values, (convolution or L.Conv2D(2, 3, padding="same"))(x))


@settings(max_examples=60, deadline=None)
@given(
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.sampled_from([1, 3, 5])),
    grown=st.lists(st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3), (4, 3)]), min_size=1, max_size=3),
    activation=st.sampled_from(["linear", "relu", "sigmoid"]),
    bias=st.booleans(),
    norm=st.booleans(),
    seed=st.integers(0, 99),
)
@example(kernel=(1, 1), grown=[(4, 3)], activation="relu", bias=True, norm=False, seed=43)  # all its scores are 0
def test_a_convolution_of_repeated_pixels(
    kernel: tuple[int, int],
    grown: list[tuple[int, int]],
    activation: str,
    bias: bool,
    norm: bool,
    seed: int,
) -> None:
    """Any number of joined parts, each of a size of its own, in any order; edges included."""
    values = keras.Input((None, None, 2))
    parts = []
    for number, repeats in enumerate(grown):
        small = L.AveragePooling2D(repeats)(L.Conv2D(number + 2, 1)(values))
        parts.append(L.UpSampling2D(repeats)(small) if repeats != (1, 1) else small)
    x = parts[0] if len(parts) == 1 else L.Concatenate()(parts)
    x = L.Conv2D(4, kernel, padding="same", activation=activation, use_bias=bias)(x)
    network = trained(keras.Model(values, L.BatchNormalization()(x) if norm else x), seed)
    assert differ(network, (12, 24)) < 1e-5
    assert "UpSampling2D" not in kinds(fuse(network))


@pytest.mark.parametrize(
    "layer",
    [
        lambda: L.Conv2D(4, 3, strides=2, padding="same"),
        lambda: L.Conv2D(4, 3, padding="same", dilation_rate=2),
        lambda: L.Conv2D(4, 3),
        lambda: L.Conv2D(4, 2, padding="same"),
        lambda: L.Conv2D(3, 3, padding="same", groups=3),
        lambda: L.DepthwiseConv2D(3, padding="same"),
        lambda: L.SeparableConv2D(4, 3, padding="same"),
    ],
    ids=["strided", "dilated", "valid", "even", "groups", "depthwise", "separable"],
)
def test_other_convolutions_of_repeated_pixels_stay(layer: Callable[[], Any]) -> None:
    network = trained(way_up(lambda skip, x: L.Concatenate()([skip, L.UpSampling2D()(x)]), layer()))
    assert differ(network) < 1e-5
    assert "UpSampling2D" in kinds(fuse(network))


def test_smooth_upsampling_stays() -> None:
    network = trained(way_up(lambda skip, x: L.Concatenate()([L.UpSampling2D(interpolation="bilinear")(x), skip])))
    assert differ(network) < 1e-5
    assert "UpSampling2D" in kinds(fuse(network))


def test_upsampled_pixels_that_others_read_too() -> None:
    def join(skip: Any, x: Any) -> Any:
        grown = L.UpSampling2D()(x)
        joined = L.Concatenate()([grown, skip])
        return L.Concatenate()([L.Conv2D(3, 3, padding="same")(joined), L.Conv2D(3, 1)(joined), L.ReLU()(grown)])

    assert differ(trained(way_up(join))) < 1e-5


@pytest.mark.parametrize(
    ("layer", "options"),
    [
        (L.Conv2D(4, 3, padding="same"), {}),
        (L.Conv2D(4, 3, strides=2, use_bias=False), {"scale": False}),
        (L.Conv2D(6, 3, groups=3, dilation_rate=2), {"center": False}),
        (L.DepthwiseConv2D(3, depth_multiplier=2), {"epsilon": 0.1}),
        (L.DepthwiseConv2D(3, use_bias=False), {"scale": False, "center": False}),
    ],
    ids=["plain", "no bias", "groups", "depthwise", "bare"],
)
def test_batch_normalisation_goes_into_the_convolution(layer: Any, options: dict[str, Any]) -> None:
    values = keras.Input((None, None, 3))
    network = trained(keras.Model(values, L.BatchNormalization(**options)(layer(values))))
    assert differ(network) < 1e-5
    assert "BatchNormalization" not in kinds(fuse(network))


def test_normalisation_stays_where_it_has_no_convolution_of_its_own() -> None:
    values = keras.Input((None, None, 3))
    read_twice = L.Conv2D(3, 3, padding="same")(values)
    active = L.Conv2D(3, 3, padding="same", activation="relu")(values)
    parts = [L.BatchNormalization()(one) for one in (values, read_twice, active)]
    network = trained(keras.Model(values, L.Concatenate()([*parts, read_twice])))
    assert differ(network) < 1e-5
    assert sum(isinstance(layer, L.BatchNormalization) for layer in fuse(network).layers) == 3


def test_a_layer_that_is_called_twice() -> None:
    values = keras.Input((None, None, 3))
    shared, norm = L.Conv2D(3, 3, padding="same"), L.BatchNormalization()
    x = norm(shared(L.ReLU()(norm(shared(values)))))
    x = L.Add()([shared(L.UpSampling2D()(L.MaxPooling2D()(x))), x])
    assert differ(trained(keras.Model(values, x))) < 1e-5


def test_names_that_a_fused_layer_could_have() -> None:
    values = keras.Input((None, None, 3))
    x = L.BatchNormalization(name="b")(L.Conv2D(3, 3, padding="same", name="a")(values))
    for number in range(4):
        x = L.ReLU(name=f"a__{number}")(x)
    assert differ(trained(keras.Model(values, x))) < 1e-5


def test_low_rank_adaptation_is_part_of_the_kernel() -> None:
    values = keras.Input((None, None, 3))
    layer = L.Conv2D(4, 3, padding="same")
    network = trained(keras.Model(values, L.BatchNormalization()(layer(values))))
    layer.enable_lora(2)
    for one in (layer.lora_kernel_a, layer.lora_kernel_b):
        one.assign(np.random.default_rng(0).normal(0, 0.5, one.shape))
    assert differ(network) < 1e-5
    assert "BatchNormalization" not in kinds(fuse(network))


def test_networks_of_sixteen_bits_stay() -> None:
    values = keras.Input((None, None, 3))
    x = L.Conv2D(4, 3, padding="same", dtype="mixed_bfloat16")(values)
    network = trained(keras.Model(values, L.BatchNormalization(dtype="mixed_bfloat16")(x)))
    assert "BatchNormalization" in kinds(fuse(network))


def test_models_of_other_kinds() -> None:
    values = keras.Input((None, None, 3))
    inner = way_up(lambda skip, x: L.Concatenate()([skip, L.UpSampling2D()(x)]))
    nested = keras.Model(values, L.BatchNormalization()(L.Conv2D(2, 3, padding="same")(inner(values))))
    assert differ(trained(nested)) < 1e-5
    row = keras.Sequential([keras.Input((None, None, 3)), L.Conv2D(4, 3), L.BatchNormalization(), L.UpSampling2D()])
    assert differ(trained(row)) < 1e-5
    assert "BatchNormalization" not in kinds(fuse(row))

    class Own(keras.Model):
        def call(self, values: Any) -> Any:
            return values

    own = Own()
    assert fuse(own) is own
