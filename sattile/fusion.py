"""Networks with layers fused for inference: the same function of their input, in less arithmetic and memory.

What training needs apart, a forward pass does not: a batch normalisation is a fixed factor and offset of each channel
by then, and a convolution over repeated pixels multiplies the same values again and again.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import keras


def fuse(network: keras.Model) -> keras.Model:
    """A network that gives the same scores, but for rounding, sooner.

    * Batch normalisation goes into the weights of the convolution before it.
    * A convolution of what was upsampled by repeating pixels, alone or joined with others (a U-Net's way up), becomes a
      transposed one of the pixels before, whose kernel holds the sums of the weights that fall on one pixel, and a
      convolution of the others: for 3 x 3 weights and twice the size 4 products instead of 9, and neither the
      upsampled nor the joined channels are held.

    Args:
        network: its other layers, with their weights, become part of both. What lies in a model inside of it stays as
            it is, and so does one that has no graph (a subclassed model).
    """
    import keras

    graph = getattr(network, "_functional", None) or network
    if not hasattr(graph, "_nodes_by_depth"):
        return network
    nodes = [one for depth in sorted(graph._nodes_by_depth, reverse=True) for one in graph._nodes_by_depth[depth]]
    nodes = [node for node in nodes if not node.is_input]
    maker = {id(tensor): node for node in nodes for tensor in node.outputs}
    readers = Counter(
        id(tensor) for tensors in [graph.outputs, *(node.input_tensors for node in nodes)] for tensor in tensors
    )

    mark = "__"  # between a layer's name and a number: no layer's own name has it
    while any(mark in one.name for one in graph.operations):
        mark += "_"
    inputs = [keras.Input(batch_shape=one.shape, dtype=one.dtype, name=one.name) for one in graph.inputs]
    now = {id(before): after for before, after in zip(graph.inputs, inputs, strict=True)}
    for number, node in enumerate(nodes):
        convolution = _folded(node, maker, readers) or _convolution(node)
        parts = _parts(convolution, maker) if convolution else []
        if convolution and (convolution.layer is not node.operation or any(part.repeats != (1, 1) for part in parts)):
            outputs = [_convolve(convolution, parts, now, f"{convolution.layer.name}{mark}{number}")]
        else:
            args, kwargs = node.arguments.fill_in(now)
            outputs = keras.tree.flatten(node.operation(*args, **kwargs))
        now |= {id(before): after for before, after in zip(node.outputs, outputs, strict=True)}
    outputs = [now[id(one)] for one in graph.outputs]
    return keras.Model(*(one[0] if len(one) == 1 else one for one in (inputs, outputs)), name=network.name)


@dataclass(frozen=True)
class _Convolution:
    """A call of a layer, its kernel and bias (float64) and the tensor that it is given."""

    layer: Any
    kernel: np.ndarray
    bias: np.ndarray | None
    given: Any


@dataclass(frozen=True)
class _Part:
    """Channels of what a convolution is given: a tensor whose pixels are repeated so many times, down and across."""

    tensor: Any
    repeats: tuple[int, int]


def _convolution(node: Any) -> _Convolution | None:
    """A node as a convolution, if it is one; not of 16 bits, which fused weights would round otherwise."""
    import keras

    layer = node.operation
    if type(layer) not in (keras.layers.Conv2D, keras.layers.DepthwiseConv2D):
        return None
    if layer.data_format != "channels_last" or layer.compute_dtype != "float32":
        return None
    kernel, bias = np.asarray(layer.kernel, np.float64), np.asarray(layer.bias, np.float64) if layer.use_bias else None
    return _Convolution(layer, kernel, bias, node.input_tensors[0])


def _folded(node: Any, maker: dict[int, Any], readers: Counter[int]) -> _Convolution | None:
    """A node that is a batch normalisation as the convolution that it makes together with the one before it."""
    import keras

    norm = node.operation
    if type(norm) is not keras.layers.BatchNormalization or norm.axis not in (-1, 3):
        return None
    given = id(node.input_tensors[0])
    found = _convolution(maker[given]) if given in maker else None
    if found is None or found.layer.activation is not keras.activations.linear or readers[given] > 1:
        return None
    mean, variance = np.asarray(norm.moving_mean, np.float64), np.asarray(norm.moving_variance, np.float64)
    gamma = 1.0 if norm.gamma is None else np.asarray(norm.gamma, np.float64)
    beta = 0.0 if norm.beta is None else np.asarray(norm.beta, np.float64)
    factor = gamma / np.sqrt(variance + norm.epsilon)
    # The channels that come out: the last axis, of a depthwise kernel the last two.
    channels = found.kernel.shape[2:] if type(found.layer) is keras.layers.DepthwiseConv2D else (-1,)
    bias = 0.0 if found.bias is None else found.bias
    return replace(found, kernel=found.kernel * factor.reshape(channels), bias=(bias - mean) * factor + beta)


def _parts(convolution: _Convolution, maker: dict[int, Any]) -> list[_Part]:
    """What a convolution is given, one part after the other; a single one where that does not matter."""
    import keras

    layer, given = convolution.layer, convolution.given
    slides = (
        type(layer) is keras.layers.Conv2D and layer.padding == "same" and layer.groups == 1
        and all(one == 1 for one in (*layer.strides, *layer.dilation_rate)) and all(n % 2 for n in layer.kernel_size)
    )  # fmt: skip
    if not slides:
        return [_Part(given, (1, 1))]

    def made(tensor: Any, kind: type) -> Any:
        node = maker.get(id(tensor))
        return node if node is not None and type(node.operation) is kind else None

    join = made(given, keras.layers.Concatenate)
    found = []
    for tensor in join.input_tensors if join and join.operation.axis in (-1, 3) else [given]:
        grown = made(tensor, keras.layers.UpSampling2D)
        if grown and grown.operation.interpolation == "nearest" and grown.operation.data_format == "channels_last":
            found.append(_Part(grown.input_tensors[0], tuple(grown.operation.size)))
        else:
            found.append(_Part(tensor, (1, 1)))
    return found


def _convolve(convolution: _Convolution, parts: list[_Part], now: dict[int, Any], name: str) -> Any:
    """What a convolution gives in the new graph.

    Args:
        parts: see `_parts`.
        now: the new graph's tensors by the id of the old one's.
        name: of the new layer, or how those of several begin.
    """
    import keras

    layer, bias = convolution.layer, convolution.bias
    if all(part.repeats == (1, 1) for part in parts):
        options = layer.get_config() | {"use_bias": True, "name": name}
        # The kernel has what LoRA adds to it already.
        alone = type(layer).from_config({key: one for key, one in options.items() if not key.startswith("lora_")})
        return _call(alone, now[id(convolution.given)], convolution.kernel, bias)

    kernels = np.split(convolution.kernel, np.cumsum([part.tensor.shape[-1] for part in parts[:-1]]), axis=2)
    by_repeats: dict[tuple[int, int], list[tuple[Any, np.ndarray]]] = {}
    for part, kernel in zip(parts, kernels, strict=True):
        by_repeats.setdefault(part.repeats, []).append((now[id(part.tensor)], kernel))
    terms: list[Any] = []
    for repeats, found in by_repeats.items():
        each = f"{name}_{len(terms)}"
        tensors = [tensor for tensor, _ in found]
        x = tensors[0] if len(tensors) == 1 else keras.layers.Concatenate(name=f"{each}_join")(tensors)
        kernel = np.concatenate([kernel for _, kernel in found], axis=2)
        options = {"padding": "same", "use_bias": not terms, "name": each, "dtype": "float32"}
        if repeats == (1, 1):
            one = keras.layers.Conv2D(layer.filters, layer.kernel_size, **options)
        else:
            kernel = _gathered(kernel, repeats)
            one = keras.layers.Conv2DTranspose(layer.filters, kernel.shape[:2], strides=repeats, **options)
        terms.append(_call(one, x, kernel, None if terms else bias))
    x = terms[0] if len(terms) == 1 else keras.layers.Add(name=f"{name}_add", dtype="float32")(terms)
    if layer.activation is keras.activations.linear:
        return x
    return keras.layers.Activation(layer.activation, name=f"{name}_activation", dtype="float32")(x)


def _gathered(kernel: np.ndarray, repeats: tuple[int, int]) -> np.ndarray:
    """The kernel of a transposed convolution of pixels that gives what this one gives of the repeated pixels.

    Args:
        kernel: (height, width, in, out), of odd height and width.
        repeats: of each pixel, down and across: the strides of the transposed one.

    Returns:
        (height + repeats - 1, width + repeats - 1, out, in). Both kinds of padding "same" lie on it.
    """
    height, width, _, _ = kernel.shape
    wide = np.zeros((height + repeats[0] - 1, width + repeats[1] - 1, kernel.shape[3], kernel.shape[2]))
    # A pixel's copy `down` below its first one meets weight `row` at the output that lies `down - row` further.
    for down, across in np.ndindex(*repeats):
        wide[down : down + height, across : across + width] += kernel[::-1, ::-1].swapaxes(2, 3)
    return wide


def _call(layer: Any, x: Any, kernel: np.ndarray, bias: np.ndarray | None) -> Any:
    """Call a new layer and give it its weights."""
    result = layer(x)
    if layer.use_bias:
        layer.set_weights([kernel, np.zeros(layer.bias.shape) if bias is None else bias])
    else:
        layer.set_weights([kernel])
    return result
