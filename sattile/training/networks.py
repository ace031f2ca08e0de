"""The networks, by name, or a user's own builder by dotted name.

Every network takes stored band values and carries its own normalisation and spectral indices, made of plain Keras
layers, so that `keras.models.load_model` needs none of our code. What it says of a pixel depends on the pixel's
receptive field alone (`tile-classifier` excepted, which judges a whole window): normalisation is by batch, at inference
a fixed affine map that folds into the convolution; group normalisation would mix the whole window.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile.errors import UsageError, first_line, nearest
from sattile.statistics import spread
from sattile.training import indices

if TYPE_CHECKING:
    import keras

CLIP = 6.0
"""Values further from the mean than this many standard deviations are clipped: glint, cloud tops, broken pixels."""

MOMENTUM = 0.9
"""Of batch normalisation's running statistics: Keras's 0.99 needs hundreds of steps to forget how it began, and a
short training (13 steps an epoch, say) would validate with statistics that are not the network's."""

FIRST, NORMALISE, LOGITS = "first", "normalise", "logits"
"""Names of the layers that weights from another network are fitted into: see `transfer`."""


# --- bodies: features (N, H, W, C) in, features of the same height and width out ----------------------------------


def unet(x: Any, poolings: int, filters: int, block: Callable[..., Any]) -> Any:
    """A U-Net after Ronneberger et al. 2015 (https://arxiv.org/abs/1505.04597), same padding, nearest upsampling."""
    import keras

    skips = []
    for level in range(poolings):
        x = block(x, filters << level, f"down{level}")
        skips.append(x)
        x = keras.layers.MaxPooling2D(name=f"pool{level}")(x)
    x = block(x, filters << poolings, "bottom")
    for level in reversed(range(poolings)):
        x = keras.layers.UpSampling2D(name=f"up{level}_grow")(x)
        x = keras.layers.Concatenate(name=f"up{level}_join")([skips[level], x])
        x = block(x, filters << level, f"up{level}")
    return x


def _deeplab(x: Any, filters: int) -> Any:
    """After DeepLabv3+ (Chen et al. 2018, https://arxiv.org/abs/1802.02611): atrous convolutions side by side at a
    quarter of the resolution, joined with the first features. Without its image pooling, which has no bound."""
    import keras

    fine = x = _residual(x, filters, "down0")
    for level in (1, 2):
        x = keras.layers.MaxPooling2D(name=f"pool{level - 1}")(x)
        x = _residual(x, filters << level, f"down{level}")
    parts = [_step(x, filters * 2, "aspp1", size=1)]
    parts += [_step(x, filters * 2, f"aspp{rate}", dilation=rate) for rate in (2, 4, 8)]
    x = _step(keras.layers.Concatenate(name="aspp_join")(parts), filters * 4, "aspp", size=1)
    x = keras.layers.UpSampling2D(4, interpolation="bilinear", name="grow")(x)
    return plain(keras.layers.Concatenate(name="join")([fine, x]), filters * 2, "up")


def _pixels(x: Any, widths: Sequence[int]) -> Any:
    """A multilayer perceptron on each pixel by itself: what can be had without looking at neighbours."""
    for number, width in enumerate(widths):
        x = _step(x, width, f"dense{number}", size=1)
    return x


def plain(x: Any, filters: int, name: str) -> Any:
    return _step(_step(x, filters, f"{name}a"), filters, f"{name}b")


def _residual(x: Any, filters: int, name: str) -> Any:
    """He et al. 2016 (https://arxiv.org/abs/1512.03385); the way past is a 1x1 convolution where channels change."""
    import keras

    past = x
    if x.shape[-1] != filters:
        past = _step(x, filters, f"{name}_past", size=1, activate=False)
    x = _step(_step(x, filters, f"{name}a"), filters, f"{name}b", activate=False)
    return keras.layers.Activation("relu", name=f"{name}_relu")(keras.layers.Add(name=f"{name}_add")([past, x]))


def _separable(x: Any, filters: int, name: str) -> Any:
    """Depthwise, then pointwise (Howard et al. 2017, https://arxiv.org/abs/1704.04861): a sixth of the arithmetic."""
    return _step(_step(x, filters, f"{name}a", depthwise=True), filters, f"{name}b", depthwise=True)


def _step(
    x: Any, filters: int, name: str, *, size: int = 3, dilation: int = 1, depthwise: bool = False, activate: bool = True
) -> Any:
    """Convolution, batch normalisation over all workers, ReLU."""
    import keras

    if depthwise:
        x = keras.layers.DepthwiseConv2D(size, padding="same", use_bias=False, name=f"{name}_depthwise")(x)
        size = 1
    x = keras.layers.Conv2D(
        filters, size, padding="same", dilation_rate=dilation, use_bias=False, kernel_initializer="he_normal",
        name=f"{name}_conv",
    )(x)  # fmt: skip
    x = keras.layers.BatchNormalization(momentum=MOMENTUM, synchronized=True, name=f"{name}_norm")(x)
    return keras.layers.Activation("relu", name=f"{name}_relu")(x) if activate else x


def _encoder(x: Any, filters: int, size: int) -> Any:
    """Residual blocks and poolings down to one vector for the whole window, (N, 1, 1, C)."""
    import keras

    level = 0
    while size > 4 and level < 5:
        x = _residual(x, filters << level, f"down{level}")
        x = keras.layers.MaxPooling2D(padding="same", name=f"pool{level}")(x)
        size, level = -(-size // 2), level + 1
    return keras.layers.GlobalAveragePooling2D(keepdims=True, name="pool")(x)


CLASSIFIER = "tile-classifier"

BODIES: dict[str, partial[Any]] = {
    "unet-tiny": partial(unet, poolings=2, filters=8, block=plain),
    "unet-small": partial(unet, poolings=3, filters=16, block=plain),
    "unet-medium": partial(unet, poolings=4, filters=24, block=plain),
    "unet-large": partial(unet, poolings=4, filters=48, block=plain),
    "resunet-small": partial(unet, poolings=3, filters=16, block=_residual),
    "resunet-medium": partial(unet, poolings=4, filters=32, block=_residual),
    "light-small": partial(unet, poolings=3, filters=16, block=_separable),
    "light-medium": partial(unet, poolings=4, filters=32, block=_separable),
    "deeplab-small": partial(_deeplab, filters=16),
    "deeplab-medium": partial(_deeplab, filters=32),
    "pixel-mlp": partial(_pixels, widths=(64, 64, 32)),
    CLASSIFIER: partial(_encoder, filters=16),
}
"""By the name that `--arch` takes: plain and residual U-Nets, light ones of depthwise convolutions for CPUs, networks
like DeepLabv3+, a baseline that sees each pixel by itself, and one that gives a whole tile one label."""


# --- whole networks -----------------------------------------------------------------------------------------------


def build(
    arch: str,
    *,
    bands: Sequence[str],
    classes: Sequence[str],
    statistics: Mapping[str, Mapping[str, Any]],
    size: int,
    index_names: Sequence[str] = (),
) -> keras.Model:
    """A network: (N, H, W, bands) float32 stored values in, (N, H, W, classes) float32 softmax scores out.

    Args:
        arch: a name of `BODIES`, or `package.module:function`, a builder of the user's own. It is called with the
            keywords bands, classes and statistics and returns a functional `keras.Model` of that signature:
            normalisation inside, height and width kept.
        bands: names, in the order of the channels.
        classes: names, in the order of the scores.
        statistics: of the training split by band: `mean`, `std`, `min`, `max`, `percentiles`.
        size: edge of a tile; a network that judges whole windows takes this size only.
        index_names: spectral indices that it sees beside the bands, as `indices.parse` takes them.

    Raises:
        UsageError: if there is no such name or builder, its network has another signature, or an index lacks a band.
    """
    given: dict[str, Any] = {"bands": list(bands), "classes": list(classes), "statistics": dict(statistics)}
    if ":" in arch:
        if index_names:
            raise UsageError(f"arch {arch}: a builder of your own makes its own indices; leave --indices out")
        builder = _import_builder(arch)
        try:
            inspect.signature(builder).bind(**given)
        except TypeError as error:
            raise UsageError(f"arch {arch}: the builder must take the keywords {', '.join(given)} ({error})") from error
        try:
            network = builder(**given)
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            raise UsageError(
                f"arch {arch}: the builder failed, in {at.filename} line {at.lineno}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
    else:
        check_name(arch)
        network = _assemble(arch, **given, size=size, pairs=indices.parse(index_names, bands))
    _check(arch, network, len(bands), len(classes))
    return network


def stride(arch: str) -> int:
    """Of which a tile's edge has to be a multiple, for a network of ours."""
    body = BODIES[arch]
    return 4 if body.func is _deeplab else 1 << body.keywords.get("poolings", 0)


def fingerprint(network: keras.Model) -> str:
    """Of a network's layers and weights, whatever Keras calls them: it numbers those without names as they come."""
    text = re.sub(r'"shared_object_id": \d+', "", network.to_json())
    for number, layer in enumerate([network, *network._flatten_layers(include_self=False)]):
        text = text.replace(f'"{layer.name}"', f'"#{number}"')
    content = hashlib.sha256(text.encode())
    for one in network.get_weights():
        content.update(np.ascontiguousarray(one).tobytes())
    return content.hexdigest()


def check_name(arch: str) -> None:
    """Raises: UsageError: for a name that is none of ours."""
    if arch not in BODIES:
        raise UsageError(
            f"arch {arch!r}: use {', '.join(BODIES)}, or package.module:function for a builder of your own"
            f"{nearest(arch, BODIES)}"
        )


def _assemble(
    arch: str,
    *,
    bands: Sequence[str],
    classes: Sequence[str],
    statistics: Mapping[str, Mapping[str, Any]],
    size: int,
    pairs: Sequence[indices.Pair],
) -> keras.Model:
    import keras

    whole = arch == CLASSIFIER
    values = keras.Input((size, size, len(bands)) if whole else (None, None, len(bands)), name="bands")
    x = normalise(values, bands, statistics)
    if pairs:
        x = keras.layers.Concatenate(name="inputs", dtype="float32")([x, *indices.layers(values, pairs, statistics)])
    x = keras.layers.Identity(name=FIRST, dtype="float32")(x)
    x = BODIES[arch](x, size=size) if whole else BODIES[arch](x)
    # In float32 whatever the precision: small differences between large logits decide a label.
    x = keras.layers.Conv2D(len(classes), 1, dtype="float32", name=LOGITS)(x)
    if whole:
        x = keras.layers.UpSampling2D(size, name="spread")(x)
    scores = keras.layers.Activation("softmax", dtype="float32", name="scores")(x)
    return keras.Model(values, scores, name=arch.replace("-", "_"))


def normalise(x: Any, bands: Sequence[str], statistics: Mapping[str, Mapping[str, Any]]) -> Any:
    """Stored values to zero mean and unit deviation (`spread`) by band, clipped to +-`CLIP` of them; in float32."""
    import keras

    mean = [float(statistics[band]["mean"]) for band in bands]
    variance = [(CLIP * spread(statistics[band])) ** 2 for band in bands]
    x = keras.layers.Normalization(mean=mean, variance=variance, dtype="float32", name=NORMALISE)(x)
    x = keras.layers.Activation("hard_tanh", dtype="float32", name="clip")(x)
    return keras.layers.Rescaling(CLIP, dtype="float32", name="rescale")(x)


def _import_builder(arch: str) -> Callable[..., keras.Model]:
    module, _, function = arch.partition(":")
    try:
        builder = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise UsageError(f"arch {arch}: {module} can't be imported ({error}); is it on PYTHONPATH?") from error
    except AttributeError as error:
        raise UsageError(f"arch {arch}: module {module} has no {function}") from error
    return builder


def _check(arch: str, network: Any, bands: int, classes: int) -> None:
    import keras

    if not isinstance(network, keras.Model):
        raise UsageError(f"arch {arch}: the builder returned {type(network).__name__}, not a keras.Model")
    for what, shape, channels in (("input", network.input_shape, bands), ("output", network.output_shape, classes)):
        if not (isinstance(shape, tuple) and len(shape) == 4 and shape[-1] == channels):
            raise UsageError(
                f"arch {arch}: {what} shape {shape}; (None, None, None, {channels}) is needed: channels last, one "
                f"{'per band' if what == 'input' else 'score per class'}"
            )


def check_size(arch: str, network: Any, size: int) -> None:
    """Run a builder's network on one tile.

    Raises:
        UsageError: if it does not take it, or makes another size of it.
    """
    try:
        found = network(np.zeros((1, size, size, network.input_shape[-1]), np.float32), training=False).shape[1:3]
    except Exception as error:  # Keras raises whatever its layers raise
        raise UsageError(
            f"arch {arch}: it does not take tiles of {size} x {size} pixels: {first_line(error)}"
        ) from error
    if tuple(found) != (size, size):
        raise UsageError(
            f"arch {arch}: of tiles of {size} x {size} pixels it makes scores of {found[0]} x {found[1]}; both have to "
            f"be of one size"
        )
