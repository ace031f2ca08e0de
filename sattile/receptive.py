"""The window geometry of a network, read from its Keras graph: total stride, receptive radius, memory. numpy only.

Whoever built the network, seams appear wherever a window's edge reaches a pixel that is kept, or a pooling grid shifts
from window to window. What is needed to rule both out is computed here, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile.errors import UsageError

if TYPE_CHECKING:
    import keras


OVERHEAD = 1.7
"""What TensorFlow 2.21 holds over what a graph needs: 1.5 to 1.65 for U-Nets of three sizes, windows of 512 to 1536 px
(oneDNN copies a convolution's input into a layout of its own)."""


@dataclass(frozen=True)
class Measured:
    """What a network's graph says about windows.

    Attributes:
        total_stride: inputs must begin and end on multiples of it, in pixels.
        receptive_radius: how far away a pixel may lie that changes another's scores; None if it has no bound.
        input_shape: (height, width) if the network takes this one only.
        activation_bytes: memory that an evaluation takes per input pixel, beside its input and output: the float32
            tensors that are alive at once, times `OVERHEAD`. (A process with TensorFlow holds 0.7 GB before that.)
        unbounded: classes of the layers and operations for which the radius has no bound, in the graph's order.
    """

    total_stride: int
    receptive_radius: int | None
    input_shape: tuple[int, int] | None
    activation_bytes: float
    unbounded: tuple[str, ...] = ()


def measure(network: keras.Model) -> Measured:
    """The window geometry of a network, from its graph.

    Instead of numbers, the graph is run on what each value may depend on: per axis, the first and last input pixel
    that reaches it. A layer's kernel, stride and dilation move these bounds exactly as they would move a network
    of positive kernels (the trained weights, ReLU and max-pooling swallow part of what is sent through them: tried, 43
    for a true 51), at every phase of the stride. Layers that mix the whole window, and those that are not known, have
    no bound.

    Raises:
        UsageError: if the output is of another height and width than the input.
    """
    steps = list(steps_of(network))
    rates = _rates(steps)
    final = rates[steps[-1].output]
    stride = math.lcm(*(axis.numerator for rate in rates.values() if rate for axis in rate))
    _, height, width, _ = network.input_shape
    if (height is None) != (width is None):
        raise UsageError(f"the model's input is {height} x {width}: fix both height and width, or neither")
    fixed = (int(height), int(width)) if height is not None else None

    extent = fixed or (stride * 4, stride * 4)
    if final is not None and final != (1, 1):
        raise UsageError(other_size(extent, tuple(int(n / rate) for n, rate in zip(extent, final, strict=True))))
    while True:
        reach = _reach(steps, extent)
        out = reach[steps[-1].output]
        if out is None or fixed:
            break
        given = tuple(len(low) for low, _ in out)
        if given != extent:
            raise UsageError(other_size(extent, given))
        # The bounds are clipped by the edges of a small input: the middle must see its whole surroundings.
        if extent[0] > 4 * _radius(out) + 4 * stride:
            break
        extent = (extent[0] * 2, extent[1] * 2)
    return Measured(
        total_stride=stride,
        receptive_radius=None if out is None else _radius(out),
        input_shape=fixed,
        activation_bytes=_peak(steps, rates),
        unbounded=_unbounded(steps, reach),
    )


def other_size(taken: tuple[int, int], given: tuple[Any, ...]) -> str:
    """What to say of a network that changes height or width."""
    return (
        f"the model gives {given[0]} x {given[1]} pixels for {taken[0]} x {taken[1]}; a score for every pixel is "
        f"needed: use padding='same', and upsample to the input's size"
    )


Rate = tuple[Fraction, Fraction]  # input pixels per position of a tensor, rows and columns
Bounds = tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]  # (first, last) input pixel, by axis


@dataclass(frozen=True)
class Step:
    """One call of a layer or operation; tensors are numbers. The input is a step without an operation."""

    operation: Any
    arguments: Any
    inputs: tuple[int, ...]
    output: int
    shape: tuple[int | None, ...]
    input_shapes: tuple[tuple[int | None, ...], ...]


def steps_of(network: keras.Model) -> Iterator[Step]:
    """The calls that make up a network, in the order in which Keras runs them; the first is its input."""
    names: dict[int, int] = {}
    yield Step(None, None, (), 0, tuple(network.input_shape), ())
    graph = _graph(network)
    names[id(graph.inputs[0])] = 0
    counter = [0]
    yield from _walk(graph, names, counter)
    out = names[id(graph.outputs[0])]
    if out != counter[0]:  # the output must be the last step
        shape = tuple(network.output_shape)
        yield Step(None, None, (out,), counter[0] + 1, shape, (shape,))


def _graph(network: Any) -> Any:
    """The functional graph of a model."""
    graph = getattr(network, "_functional", None) or network
    if not hasattr(graph, "_nodes_by_depth"):
        raise UsageError(
            f"model {network.name} is a subclassed model: its graph can't be read; build it with Keras's functional API"
        )
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise UsageError(
            f"model {network.name} has {len(graph.inputs)} inputs and {len(graph.outputs)} outputs; one of each is "
            f"needed"
        )
    return graph


def _walk(graph: Any, names: dict[int, int], counter: list[int]) -> Iterator[Step]:
    for depth in sorted(graph._nodes_by_depth, reverse=True):
        for node in graph._nodes_by_depth[depth]:
            if node.is_input or any(id(one) not in names for one in node.input_tensors):
                continue
            operation = node.operation
            inner = getattr(operation, "_functional", None) or operation
            if hasattr(inner, "_nodes_by_depth") and len(node.input_tensors) == len(inner.inputs):
                # A model inside the model. Its tensors get names of their own at each call.
                given = (names[id(one)] for one in node.input_tensors)
                inside = {id(one): number for one, number in zip(inner.inputs, given, strict=True)}
                yield from _walk(inner, inside, counter)
                for outside, one in zip(node.outputs, inner.outputs, strict=True):
                    names[id(outside)] = inside[id(one)]
                continue
            inputs = tuple(names[id(one)] for one in node.input_tensors)
            shapes = tuple(tuple(one.shape) for one in node.input_tensors)
            for output in node.outputs:
                counter[0] += 1
                names[id(output)] = counter[0]
                yield Step(operation, node.arguments, inputs, counter[0], tuple(output.shape), shapes)


# At inference these give what they are given, also where they were called with training=True: a model's own
# `training=False` goes to all of its layers. (RandomCrop cuts.)
AUGMENTING = {
    "AugMix", "CutMix", "GaussianDropout", "GaussianNoise", "MixUp", "RandAugment", "RandomBrightness",
    "RandomColorDegeneration", "RandomColorJitter", "RandomContrast", "RandomElasticTransform", "RandomErasing",
    "RandomFlip", "RandomGaussianBlur", "RandomGrayscale", "RandomHue", "RandomInvert", "RandomPerspective",
    "RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness", "RandomShear",
    "RandomTranslation", "RandomZoom",
}  # fmt: skip
# Each value's neighbours do not matter to these (the last axis may mix).
_POINTWISE = {
    "Activation", "ReLU", "LeakyReLU", "PReLU", "ELU", "Rescaling", "Normalization", "Dropout",
    "SpatialDropout2D", "AlphaDropout", "ActivityRegularization", "Dense",
    "Identity", "Add", "Subtract", "Multiply", "Divide", "TrueDivide", "DivideNoNan", "Average", "Maximum",
    "Minimum", "Clip", "Cast", "Relu", "Relu6", "Silu", "Gelu", "Elu", "Selu", "LeakyRelu", "Softplus",
    "Softsign", "HardSigmoid", "HardSilu", "HardTanh", "Sigmoid", "Tanh", "Exp", "Log", "Log1p", "Sqrt", "Square",
    "Power", "Abs", "Absolute", "Negative", "Where", "Sign", "Greater", "GreaterEqual", "Less", "LessEqual",
    "Equal", "NotEqual", "LogicalAnd", "LogicalOr", "LogicalNot", "Isnan", "NanToNum", "Discretization",
}  # fmt: skip
# These mix along `axis`: pointwise if that is the channels'.
_ALONG_AXIS = {
    "BatchNormalization", "LayerNormalization", "RMSNormalization", "UnitNormalization", "Softmax", "LogSoftmax",
    "Concatenate", "Mean", "Max", "Min", "Sum", "Normalize",
}  # fmt: skip
_TAPS = {"nearest": (0, 0), "bilinear": (0, 1), "bicubic": (-1, 2), "lanczos3": (-2, 3), "lanczos5": (-4, 5)}


def _kind(step: Step) -> str:
    """`pointwise`, `slide` (windows of a stride), `spread` (transposed), `grow`, `pad`, or `whole` (no bound)."""
    operation, name = step.operation, type(step.operation).__name__
    if operation is None:
        return "pointwise"
    if len(step.shape) != 4 or any(len(shape) not in (0, 4) for shape in step.input_shapes):
        return "whole"
    if getattr(operation, "data_format", None) == "channels_first":
        return "whole"
    if name in _POINTWISE or name in AUGMENTING:
        return "pointwise"
    if name in _ALONG_AXIS:
        axis = getattr(operation, "axis", None)
        axes = [axis] if isinstance(axis, int) else list(axis) if axis is not None else []
        return "pointwise" if axes and all(one in (-1, 3) for one in axes) else "whole"
    if name == "GetItem":
        key = step.arguments.args[1]
        key = tuple(key) if isinstance(key, tuple | list) else (key,)  # a list once it was saved and loaded
        spatial = key[: key.index(Ellipsis)] if Ellipsis in key else key[:3]
        return "pointwise" if all(one == slice(None) for one in spatial) else "whole"
    if name in ("Conv2D", "DepthwiseConv2D", "SeparableConv2D", "MaxPooling2D", "AveragePooling2D"):
        return "slide"
    if name == "Conv2DTranspose":
        return "spread"
    if name == "UpSampling2D":
        return "grow" if operation.interpolation in _TAPS else "whole"
    if name in ("ZeroPadding2D", "Cropping2D"):
        return "pad"
    return "whole"


def _rates(steps: Sequence[Step]) -> dict[int, Rate | None]:
    """Input pixels per position of each tensor; None where it has no positions (a summary of the window)."""
    rates: dict[int, Rate | None] = {}
    for step in steps:
        known = [rates[one] for one in step.inputs if rates[one] is not None]
        rate: Rate | None = known[0] if known else None
        kind = _kind(step)
        if step.operation is None and not step.inputs:
            rate = (Fraction(1), Fraction(1))
        elif rate is not None and kind == "slide":
            rate = tuple(one * s for one, s in zip(rate, step.operation.strides, strict=True))
        elif rate is not None and kind == "spread":
            rate = tuple(one / s for one, s in zip(rate, step.operation.strides, strict=True))
        elif rate is not None and kind == "grow":
            rate = tuple(one / s for one, s in zip(rate, step.operation.size, strict=True))
        elif kind == "whole" and (len(step.shape) != 4 or step.shape[1:3] == (1, 1) or _resizes(step)):
            rate = None
        rates[step.output] = rate
    return rates


def _resizes(step: Step) -> bool:
    """Whether an unknown operation gives a height and width of its own."""
    return bool(step.input_shapes) and step.shape[1:3] != step.input_shapes[0][1:3]


def _reach(steps: Sequence[Step], extent: tuple[int, int]) -> dict[int, Bounds | None]:
    """The bounds of each tensor for an input of this height and width; None where there are none."""
    reach: dict[int, Bounds | None] = {}
    for step in steps:
        parts = [reach[one] for one in step.inputs]
        kind = _kind(step)
        if step.operation is None and not step.inputs:
            line = [np.arange(n, dtype=np.int64) for n in extent]
            reach[step.output] = ((line[0], line[0]), (line[1], line[1]))
        elif kind == "whole" or not parts or any(one is None for one in parts):
            reach[step.output] = None
        elif kind == "pointwise":
            reach[step.output] = _hull([one for one in parts if one is not None])
        else:
            bounds = parts[0]
            assert bounds is not None
            moved = [_move(kind, step, axis, *bounds[axis]) for axis in (0, 1)]
            reach[step.output] = (moved[0], moved[1])
    return reach


def _unbounded(steps: Sequence[Step], reach: Mapping[int, Bounds | None]) -> tuple[str, ...]:
    """Classes of what has no bound though all that it is given has."""
    lost = [one for one in steps if reach[one.output] is None and all(reach[given] is not None for given in one.inputs)]
    return tuple(dict.fromkeys(type(one.operation).__name__ for one in lost))


def _hull(parts: Sequence[Bounds]) -> Bounds:
    """What depends on several values of one position depends on all that they do."""
    rows, cols = (
        (np.minimum.reduce([part[axis][0] for part in parts]), np.maximum.reduce([part[axis][1] for part in parts]))
        for axis in (0, 1)
    )
    return rows, cols


def _move(kind: str, step: Step, axis: int, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bounds after a layer that moves values along an axis. Padding is TensorFlow's."""
    n, operation = len(low), step.operation
    if kind == "pad":
        name = "padding" if hasattr(operation, "padding") else "cropping"
        before, after = getattr(operation, name)[axis]
        if name == "cropping":
            return low[before : n - after], high[before : n - after]
        taken = np.arange(-before, n + after)[:, None]
    elif kind == "grow":
        # https://keras.io/api/layers/reshaping_layers/up_sampling2d: half-pixel centres
        factor, mode = operation.size[axis], operation.interpolation
        if mode == "nearest":
            taken = (np.arange(n * factor) // factor)[:, None]
        else:
            first = np.floor((np.arange(n * factor) + 0.5) / factor - 0.5).astype(np.int64)
            least, most = _TAPS[mode]
            taken = np.clip(first[:, None] + np.arange(least, most + 1), 0, n - 1)
    else:
        size = (operation.kernel_size if hasattr(operation, "kernel_size") else operation.pool_size)[axis]
        stride = operation.strides[axis]
        dilation = getattr(operation, "dilation_rate", (1, 1))[axis]
        wide = (size - 1) * dilation + 1
        taps = np.arange(size) * dilation
        same = operation.padding == "same"
        if kind == "slide":
            # https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
            count = -(-n // stride) if same else (n - wide) // stride + 1
            before = max((count - 1) * stride + wide - n, 0) // 2 if same else 0
            taken = np.arange(count)[:, None] * stride - before + taps
        else:
            # The gradient of the sliding window that leads from this output's length back to the input's.
            count = operation.compute_output_shape((1, n, n, step.input_shapes[0][-1]))[1 + axis]
            before = max((n - 1) * stride + wide - count, 0) // 2 if same else 0
            back = np.arange(count)[:, None] + before - taps
            taken = np.where(back % stride == 0, back // stride, -1)
    inside = (taken >= 0) & (taken < n)
    taken = np.clip(taken, 0, n - 1)
    # Padding depends on nothing: the empty interval.
    first = np.where(inside, low[taken], np.iinfo(np.int64).max).min(1)
    last = np.where(inside, high[taken], np.iinfo(np.int64).min).max(1)
    return first, last


def _radius(bounds: Bounds) -> int:
    most = 0
    for low, high in bounds:
        own, some = np.arange(len(low)), low <= high
        if some.any():
            most = max(most, int((own - low)[some].max()), int((high - own)[some].max()))
    return most


def _peak(steps: Sequence[Step], rates: Mapping[int, Rate | None]) -> float:
    """Bytes per input pixel of the tensors that are alive at once: each lives until its last reader is done."""
    size: dict[int, float] = {}
    last: dict[int, int] = {}
    for number, step in enumerate(steps):
        rate, channels = rates[step.output], step.shape[-1]
        size[step.output] = 4.0 * channels / float(rate[0] * rate[1]) if rate and channels else 0.0
        for one in (*step.inputs, step.output):
            last[one] = number
    peak = alive = 0.0
    for number, step in enumerate(steps):
        alive += size[step.output]
        peak = max(peak, alive)
        alive -= sum(size[one] for one in {*step.inputs, step.output} if last[one] == number)
    return round(OVERHEAD * peak, 1)
