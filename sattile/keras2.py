"""Configs of Keras 2 as Keras 3 reads them: the same layers and the same graph. JSON in, JSON out.

TensorFlow up to 2.15 and the package tf_keras write them. Keras 3 says no to most of their files, for reasons that have
nothing to do with what the networks compute: where a class lives, what an argument is called, one that it never had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MODELS = {"Functional": "functional", "Model": "functional", "Sequential": "sequential"}
"""Classes of models, and Keras 3's module of each."""

GONE = {
    "Conv2DTranspose": ("groups",),
    "DepthwiseConv2D": ("groups",),
    "MultiHeadAttention": ("query_shape", "key_shape", "value_shape", "softmax_robust_masking"),
    "SeparableConv2D": ("groups", "kernel_initializer", "kernel_regularizer", "kernel_constraint"),
    "SpatialDropout2D": ("trainable", "noise_shape"),
}
"""Arguments that Keras 2 writes and never used: it has no groups in these, and the shapes follow from what is given."""

OPERATIONS = ("TFOpLambda", "SlicingOpLambda")
"""Keras 2's layers for calls of TensorFlow's functions, and for x[...]; Keras 3 has none of the kind."""

CHANGED = {"hard_sigmoid": "clips 0.2 x + 0.5 in Keras 2 and x / 6 + 0.5 in Keras 3"}
"""Activations that are another function in Keras 3."""


def is_old(version: str) -> bool:
    """Whether a file says that Keras 2 or 1 wrote it."""
    return version.partition(".")[0] in ("1", "2")


def modern(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's config for Keras 3; the one that is given stays as it is.

    Args:
        model: `config.json` of a `.keras` file, or `model_config` of an HDF5 file.
    """
    found = {name: one for name, one in model.items() if name != "compile_config"}
    if isinstance(found.get("config"), list):  # of a Sequential, before Keras 2.2.3
        found["config"] = {"name": "sequential", "layers": found["config"]}
    config = dict(found["config"])
    if found.get("class_name") in MODELS:
        module = MODELS[found["class_name"]]
        found |= {
            "module": f"keras.src.models.{module}", "class_name": module.capitalize(),
            "registered_name": module.capitalize(),
        }  # fmt: skip
        config["layers"] = [_layer(one) for one in (*_input(config["layers"]), *config["layers"])]
        inner = {one["config"].get("name") for one in config["layers"] if "layers" in one["config"]}
        if module == "functional":
            config = _renumbered(config, inner)
    return found | {"config": config}


def layers_of(model: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The layers' configs, those inside of inner models and wrappers, too, in the order of the file."""
    config = model.get("config")
    config = config if isinstance(config, dict) else {"layers": config}
    inside = config.get("layers") or ([config["layer"]] if isinstance(config.get("layer"), dict) else [])
    for one in inside:
        yield one
        yield from layers_of(one)


def _input(layers: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """An input layer where the first one only says what it takes: of a Sequential, before Keras 2.2.3."""
    if not layers or layers[0]["class_name"] == "InputLayer" or not layers[0]["config"].get("batch_input_shape"):
        return []
    name, shape = f"{layers[0]['config']['name']}_input", layers[0]["config"]["batch_input_shape"]
    return [{"class_name": "InputLayer", "config": {"name": name, "batch_input_shape": shape, "dtype": "float32"}}]


def _layer(layer: Mapping[str, Any]) -> dict[str, Any]:
    if layer["class_name"] in MODELS:
        return modern(layer)
    config = dict(layer["config"])
    name = layer["class_name"]
    if isinstance(config.get("layer"), dict):  # a wrapper's
        config["layer"] = _layer(config["layer"])
    shape = config.pop("batch_input_shape", None)
    if name == "InputLayer":
        config |= {"batch_shape": shape or config.get("batch_shape")}
        config.pop("ragged", None)
    axis = config.get("axis")
    if isinstance(axis, list) and len(axis) == 1:
        config["axis"] = axis[0]
    policy = config.get("dtype")
    if isinstance(policy, dict) and "config" in policy:
        config["dtype"] = policy["config"]["name"]
    for gone in (*GONE.get(name, ()), "rng_type"):  # of layers that augment: how their dice are thrown
        config.pop(gone, None)
    if name == "LeakyReLU" and "alpha" in config:
        config["negative_slope"] = config.pop("alpha")
    return {"module": "keras.layers", "registered_name": None, **layer, "config": config}


def _renumbered(config: dict[str, Any], inner: set[str]) -> dict[str, Any]:
    """The same graph with the calls of inner models numbered from 0: Keras 2 counts their own making as a call."""
    links = ("input_layers", "output_layers")
    first: dict[str, int] = {}

    def look(one: Any) -> None:
        if _is_link(one) and one[0] in inner:
            first[one[0]] = min(first.get(one[0], one[1]), one[1])
        for part in _parts(one):
            look(part)

    def moved(one: Any) -> Any:
        if isinstance(one, dict):
            return {name: moved(part) for name, part in one.items()}
        if _is_link(one):
            return [one[0], one[1] - first.get(one[0], 0), *map(moved, one[2:])]
        return [moved(part) for part in one] if isinstance(one, list) else one

    look([[layer.get("inbound_nodes") for layer in config["layers"]], [config.get(name) for name in links]])
    layers = [layer | {"inbound_nodes": moved(layer.get("inbound_nodes", []))} for layer in config["layers"]]
    # One tensor is a list of one for Keras 2 alone.
    ends = {
        name: one[0] if isinstance(one, list) and len(one) == 1 and _is_link(one[0]) else one
        for name in links
        if (one := config.get(name))
    }
    return config | {"layers": layers} | {name: moved(one) for name, one in ends.items()}


def _is_link(one: Any) -> bool:
    """Whether this names a tensor: [layer, its call, the call's output, ...]."""
    return isinstance(one, list) and [type(part) for part in one[:3]] == [str, int, int]


def _parts(one: Any) -> list[Any]:
    return list(one.values()) if isinstance(one, dict) else one if isinstance(one, list) else []
