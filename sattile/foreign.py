"""Networks from elsewhere: loaded without running code of theirs, and asked what their scores are.

Nothing in a file says what its numbers mean. A network that was trained on logits and one that ends with a sigmoid take
the same images and give the same shapes; of the first, half of a map is wrong. So the graph is read back from its
output to what made the scores, and where that says nothing, the network is run on random values.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile import keras2, storage
from sattile.errors import UsageError, first_line
from sattile.receptive import AUGMENTING, Step, measure, other_size, steps_of

if TYPE_CHECKING:
    import keras

ACTIVATIONS = ("sigmoid", "softmax", "none")
"""What can be said of scores: what to add, or that they are to be taken as they are."""


# --- loading ------------------------------------------------------------------------------------------------------


def load_keras(path: str) -> keras.Model:
    """A Keras model in safe mode, without its optimiser and losses.

    What Keras 2 wrote is read by way of `keras2.modern`; the file stays as it is.

    Args:
        path: a local `.keras` or HDF5 file, whatever its name.

    Raises:
        UsageError: if it is neither, or holds what Keras's safe mode does not load: the layer is named.
    """
    import keras

    version, config = _described(path)
    whose = f"{path}, saved by Keras {version}, can't be loaded in Keras's safe mode"
    if keras2.is_old(version) and (reason := _no_longer(config)):
        raise UsageError(f"{whose}: {reason}")
    kind = ".keras" if zipfile.is_zipfile(path) else ".h5"
    try:
        with storage.scratch() as folder:
            linked = os.path.join(folder, "net" + kind)  # Keras goes by the name
            os.symlink(os.path.abspath(path), linked)
            if not keras2.is_old(version):
                return keras.saving.load_model(linked, compile=False, safe_mode=True)
            network = keras.saving.deserialize_keras_object(keras2.modern(config), safe_mode=True)
            if kind == ".keras":
                with zipfile.ZipFile(path) as file:
                    linked = file.extract("model.weights.h5", folder)
            network.load_weights(linked)
            return network
    except Exception as error:  # Keras raises whatever a file's content makes its layers raise
        raise UsageError(f"{whose}: {_reason(config, error)}") from error


def is_of_today(path: str) -> bool:
    """Whether a file that `load_keras` takes is a `.keras` file of Keras 3: one that others load as it is."""
    return zipfile.is_zipfile(path) and not keras2.is_old(_described(path)[0])


def _described(path: str) -> tuple[str, dict[str, Any]]:
    """The version of Keras that wrote a file, and the model's config."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                version, config = json.loads(file.read("metadata.json"))["keras_version"], file.read("config.json")
        else:
            import h5py

            with h5py.File(path, "r") as file:
                if "model_config" not in file.attrs:
                    raise UsageError(
                        f"{path} holds weights without the network that they belong to: build it as it was built, "
                        f"network.load_weights({storage.name(path)!r}), network.save('net.keras')"
                    )
                version, config = file.attrs.get("keras_version", "1"), file.attrs["model_config"]
        return version if isinstance(version, str) else version.decode(), json.loads(config)
    except (KeyError, ValueError, OSError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{path} is no .keras file and no .h5 file of a Keras model ({first_line(error)[:200]}); load it where it "
            f"was trained and save it with model.save('net.keras')"
        ) from error


def _reason(config: Mapping[str, Any], error: Exception) -> str:
    """Why a file can't be loaded, and what to do; as far as its config tells, with the layer's name."""
    import keras

    for layer in keras2.layers_of(keras2.modern(config)):
        kind, called = layer["class_name"], layer["config"].get("name") or layer.get("name")
        if kind in keras2.MODELS:
            continue
        if kind == "Lambda":
            return (
                f"layer {called} is a Lambda layer, whose Python code would run here; rebuild it from Keras's own "
                f"layers or operations (keras.ops), which need no code in the file"
            )
        if kind in keras2.OPERATIONS:
            return (
                f"layer {called} is an operation of TensorFlow ({kind}), which Keras {_major(keras)} can't rebuild "
                f"from a file; use a layer of Keras or keras.ops there, and take the weights over"
            )
        theirs = not str(layer.get("module")).startswith("keras")
        if theirs or layer.get("registered_name") not in (None, kind) or ">" in kind:
            return (
                f"layer {called} is of a class of its own, {layer.get('registered_name') or kind}, whose code is not "
                f"in the file; rebuild it from Keras's own layers"
            )
        try:
            keras.saving.deserialize_keras_object(layer, safe_mode=True)
        except Exception as one:
            return (
                f"layer {called} ({kind}) can't be rebuilt by Keras {keras.__version__} ({_said(one)}); rebuild that "
                f"part of the network from layers that Keras {_major(keras)} has, and take the weights over"
            )
    kind = config.get("class_name")
    if kind not in keras2.MODELS:
        return (
            f"it is of a class of its own, {config.get('registered_name') or kind}, whose code is not in the file; "
            f"build the network with Keras's functional API, keras.Model(inputs, outputs), and take its weights over"
        )
    return f"{_said(error)}; load it where it was trained and save it by Keras {_major(keras)}"


def _major(keras: Any) -> str:
    return str(keras.__version__).partition(".")[0]


def _no_longer(config: Mapping[str, Any]) -> str | None:
    """What in a file of Keras 2 would be loaded, and compute something else."""
    for layer in keras2.layers_of(config):
        for value in layer["config"].values():
            if isinstance(value, str) and value in keras2.CHANGED:
                return (
                    f"layer {layer['config'].get('name')} has the activation {value}, which {keras2.CHANGED[value]}: "
                    f"the model's scores would be others; train it with another activation"
                )
    return None


def _said(error: Exception) -> str:
    """What Keras means, without the configs that it prints."""
    text = str(error).rpartition("Exception encountered: ")[2].partition("Full object config")[0]
    return first_line(Exception(text or repr(error)))[:300].strip().rstrip(".")


# --- its output ---------------------------------------------------------------------------------------------------


def choose_output(network: keras.Model, name: str | None) -> keras.Model:
    """The network with one output, a bare tensor as its input; itself where it is like that.

    Args:
        name: of the output, as `outputs_of` lists them.

    Raises:
        UsageError: if the network has several outputs, or gives a dict, and none is named; or has none of that name.
    """
    import keras

    found = outputs_of(network)
    if name is None and isinstance(found, Mapping):
        many = f"{len(found)} outputs" if len(found) > 1 else "its output as a dict"
        raise UsageError(
            f"the model gives {many}: {', '.join(found)}; say which one holds the scores: --output {next(iter(found))}"
        )
    if name is not None:
        if not isinstance(found, Mapping):
            raise UsageError(f"--output {name}: the model gives one tensor without a name; leave --output out")
        if name not in found:
            raise UsageError(f"--output {name}: the model's outputs are {', '.join(found)}")
        found = found[name]
    given = getattr(network, "input", None)
    single = len(network.inputs or ()) == 1
    if found is None or (found is network.output and (given is network.inputs[0] or not single)):
        return network
    return keras.Model(network.inputs[0] if single else given, found, name=network.name)


def outputs_of(network: keras.Model) -> Any:
    """{name: tensor} of a network that gives several or a dict, the tensor of one that gives just that.

    Those of a list are named by their layers.
    """
    given = getattr(network, "output", None)
    if isinstance(given, Mapping):
        return dict(given)
    if not isinstance(given, list | tuple):
        return given
    if len(given) == 1:
        return given[0]
    names = list(network.output_names)
    if len(set(names)) < len(names):  # several of one layer
        names = [f"{name}:{number}" for number, name in enumerate(names)]
    return dict(zip(names, given, strict=True))


# --- what its scores are ------------------------------------------------------------------------------------------

EACH = ("sigmoid", "hard_sigmoid", "sparse_sigmoid")
TOGETHER = ("softmax", "sparsemax")
"""Activations whose values lie from 0 to 1; these sum to 1, too."""

OPERATIONS = {
    "BatchNormalization": "linear", "HardSigmoid": "hard_sigmoid", "LogSoftmax": "log_softmax", "Sigmoid": "sigmoid",
    "Softmax": "softmax", "SparseSigmoid": "sparse_sigmoid", "Sparsemax": "sparsemax",
}  # fmt: skip
"""Layers and operations that are an activation by themselves, or behind which none can be any more."""

KEEPING = AUGMENTING | {
    "ActivityRegularization", "AlphaDropout", "AveragePooling2D", "Cast", "CenterCrop", "Cropping2D", "Dropout",
    "Identity", "Reshape", "Resize", "Resizing", "SpatialDropout2D", "UpSampling2D",
}  # fmt: skip
"""Layers and operations that give what they are given, or means of neighbours: of probabilities, probabilities."""

MEANS = (None, "nearest", "bilinear", "area")
"""Interpolations that give means of neighbours; others overshoot."""

MARGIN = 1e-3
"""How far from 0, from 1 and from a sum of 1 probabilities may be: 16 bits have no more."""


def settle(network: keras.Model, activation: str | None, names: Sequence[str]) -> tuple[keras.Model, list[str]]:
    """A network whose scores are probabilities, with an activation where it lacks one, and what to tell about that.

    With several channels the largest wins, whatever they are. But a threshold, blended windows, test-time turns,
    averaged models and calibration take them for probabilities; and of one channel 0.5 is the limit.

    Args:
        network: of one input and one output (N, H, W, channels).
        activation: one of `ACTIVATIONS` that the user asks for, or None.
        names: of the classes: as many as channels, or two for one channel.

    Raises:
        UsageError: if the scores are no probabilities and nothing is asked for; if what is asked for can't be.
    """
    alone = network.output_shape[-1] == 1
    if alone and activation == "softmax":
        raise UsageError("--activation softmax: of one channel that is 1 everywhere; use sigmoid")
    found, where = _of_graph(network)
    if alone and found in TOGETHER:
        raise UsageError(
            f"the model's scores are 1 everywhere: {where} takes a {found} over its only channel; it needs a sigmoid "
            f"there, or a channel for each of {' and '.join(names)}, and another training"
        )
    if activation == "none":
        return network, []
    if activation is not None:
        if found in (*EACH, *TOGETHER):
            raise UsageError(f"--activation {activation}: the model has a {found} already ({where}); leave it out")
        return _with(network, activation), [f"{activation} added behind its last layer"]
    wanted = "sigmoid" if alone else "softmax"
    meaning = (
        f"One channel has to be the probability of {names[1]}" if alone
        else "A threshold, blended windows, --tta, averaged models and calibration take them for that"
    )  # fmt: skip
    each = "" if alone else " (sigmoid, where each class was trained by itself)"
    remedy = (
        f"{meaning}. If they are logits (a loss with from_logits=True), --activation {wanted} adds the {wanted} that "
        f"is missing{each}; --activation none takes them as they are"
    )
    if found is not None and found not in (*EACH, *TOGETHER):
        raise UsageError(f"the model's scores are no probabilities: {where}. {remedy}")
    told = []
    if found is None:
        scores = _on_random_values(network)
        low, high = float(scores.min()), float(scores.max())
        if not (low >= -MARGIN and high <= 1 + MARGIN):
            raise UsageError(
                f"the model's scores are no probabilities: on random values they lie from {low:.3g} to {high:.3g}. "
                f"{remedy}"
            )
        found = TOGETHER[0] if not alone and np.abs(scores.sum(-1) - 1).max() <= MARGIN else EACH[0]
        told.append(
            f"its graph does not say what its scores are; on random values they lie from 0 to 1, and are taken "
            f"for probabilities. If they are logits, --activation {wanted} adds what is missing"
        )
    if not alone and found in EACH:
        told.append(
            "its scores need not sum to 1: each class has a sigmoid of its own. The largest wins, and a threshold is "
            "compared with that one"
        )
    return network, told


def _with(network: keras.Model, activation: str) -> keras.Model:
    import keras

    name = "scores"  # fixed, so that the same network is the same file
    while any(layer.name == name for layer in network.layers):
        name += "_"
    # In float32 also behind layers of 16 bits.
    last = keras.layers.Activation(activation, dtype="float32", name=name)
    return keras.Model(network.inputs[0], last(network.outputs[0]), name=network.name)


def _of_graph(network: keras.Model) -> tuple[str | None, str]:
    """The activation that made a network's scores, None if the graph does not tell, and how to say where that is."""
    made = {step.output: step for step in steps_of(network)}
    step = made[max(made)]
    channels_stay = True
    while True:
        operation, kind = step.operation, type(step.operation).__name__
        if operation is None:
            if not step.inputs:
                return "linear", "it gives its input"
            step = made[step.inputs[0]]
            continue
        where = f"{operation.name} ({kind})"
        found = _activation(step)
        if found in TOGETHER and not channels_stay:
            return None, where
        if found == "linear" and kind == "Activation":
            pass
        elif found is not None:
            said = where if found in (*EACH, *TOGETHER) else f"its last layer, {where}, has the activation {found}"
            return found, said if found != "linear" else f"its last layer, {where}, has no activation"
        elif kind not in KEEPING or getattr(step.operation, "interpolation", None) not in MEANS:
            return None, where
        channels_stay = channels_stay and step.shape[-1] == step.input_shapes[0][-1]
        step = made[step.inputs[0]]


def _activation(step: Step) -> str | None:
    """The name of what a layer or operation does to each value at its end; None if it is not known."""
    kind = type(step.operation).__name__
    if kind in OPERATIONS:
        name = OPERATIONS[kind]
        over_channels = getattr(step.operation, "axis", None) in (-1, len(step.shape) - 1)
        return name if name in ("linear", *EACH) or over_channels else None
    return getattr(getattr(step.operation, "activation", None), "__name__", None)


def _on_random_values(network: keras.Model) -> np.ndarray:
    """Scores of random values as small and as large as bands hold."""
    rng = np.random.default_rng(0)
    shape = (1, *window_of(network), network.input_shape[-1])
    given = (rng.uniform(*limits, shape).astype(np.float32) for limits in ((-1, 1), (0, 1), (0, 255), (0, 10_000)))
    return np.concatenate([np.asarray(network(one, training=False), np.float32) for one in given])


# --- whether it runs ----------------------------------------------------------------------------------------------


def window_of(network: keras.Model) -> tuple[int, int]:
    """Height and width of a small input that the network takes."""
    measured = measure(network)
    if measured.input_shape:
        return measured.input_shape
    stride = measured.total_stride
    edge = -(-8 // stride) * stride
    return edge * 2, edge * 3


def run_once(network: keras.Model) -> None:
    """A forward pass, so that a model that cannot run is refused now and not on the cluster."""
    height, width = window_of(network)
    try:
        given = np.zeros((1, height, width, network.input_shape[3]), np.float32)
        found = tuple(network(given, training=False).shape)
    except Exception as error:
        raise UsageError(f"the model does not run on a {height} x {width} window: {_said(error)}") from error
    if found[1:3] != (height, width):
        raise UsageError(other_size((height, width), found[1:3]))


def remarks(network: keras.Model) -> list[str]:
    """What is to be told of a network's layers: those that are for training alone."""
    kinds = (type(step.operation).__name__ for step in steps_of(network))
    idle = ", ".join(dict.fromkeys(kind for kind in kinds if kind in AUGMENTING))
    return [f"{idle}: for training only, changes nothing here"] if idle else []
