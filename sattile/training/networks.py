"""The networks: U-Nets by size name, or a user's own builder by dotted name.

Every network takes stored band values and carries its own normalisation, made of plain Keras layers, so that
`keras.models.load_model` needs none of our code.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sattile.errors import UsageError

if TYPE_CHECKING:
    import keras

UNETS = {"unet-tiny": (2, 8), "unet-small": (3, 16), "unet-medium": (4, 24), "unet-large": (4, 48)}
"""Poolings, and filters at full resolution (twice as many after each pooling)."""

CLIP = 6.0
"""Values further from the mean than this many standard deviations are clipped: glint, cloud tops, broken pixels."""

MOMENTUM = 0.9
"""Of batch normalisation's running statistics: Keras's 0.99 needs hundreds of steps to forget how it began, and a
short training (13 steps an epoch, say) would validate with statistics that are not the network's."""


def build(
    arch: str, *, bands: Sequence[str], classes: Sequence[str], statistics: Mapping[str, Mapping[str, Any]]
) -> keras.Model:
    """A network: (N, H, W, bands) float32 stored values in, (N, H, W, classes) float32 softmax scores out.

    Args:
        arch: a size of `UNETS`, or `package.module:function`, a builder of the user's own. It is called with the
            keywords below and returns a functional `keras.Model` of that signature: normalisation inside, height
            and width kept.
        bands: names, in the order of the channels.
        classes: names, in the order of the scores.
        statistics: of the training split by band: `mean`, `std`, `min`, `max`, `percentiles`.

    Raises:
        UsageError: if there is no such size or builder, or its network has another signature.
    """
    if ":" in arch:
        builder = _import_builder(arch)
        given = {"bands": list(bands), "classes": list(classes), "statistics": dict(statistics)}
        try:
            inspect.signature(builder).bind(**given)
        except TypeError as error:
            raise UsageError(f"arch {arch}: the builder must take the keywords {', '.join(given)} ({error})") from error
        network = builder(**given)
    elif arch in UNETS:
        network = unet(*UNETS[arch], bands=bands, classes=classes, statistics=statistics)
    else:
        raise UsageError(f"arch {arch!r}: use {', '.join(UNETS)}, or package.module:function for a builder of your own")
    _check(arch, network, len(bands), len(classes))
    return network


def unet(
    poolings: int,
    filters: int,
    *,
    bands: Sequence[str],
    classes: Sequence[str],
    statistics: Mapping[str, Mapping[str, Any]],
) -> keras.Model:
    """A U-Net after Ronneberger et al. 2015 with batch normalisation, same padding and nearest upsampling.

    Batch normalisation is synchronised over workers, and at inference a fixed affine map: a pixel's scores depend
    on its receptive field alone (group normalisation mixes the whole window), and it folds into the convolution.
    """
    import keras

    values = keras.Input((None, None, len(bands)), name="bands")
    x = normalise(values, bands, statistics)
    skips = []
    for level in range(poolings):
        x = _convolve(x, filters << level, f"down{level}")
        skips.append(x)
        x = keras.layers.MaxPooling2D(name=f"pool{level}")(x)
    x = _convolve(x, filters << poolings, "bottom")
    for level in reversed(range(poolings)):
        x = keras.layers.UpSampling2D(name=f"up{level}_grow")(x)
        x = keras.layers.Concatenate(name=f"up{level}_join")([skips[level], x])
        x = _convolve(x, filters << level, f"up{level}")
    x = keras.layers.Conv2D(len(classes), 1, name="logits")(x)
    scores = keras.layers.Activation("softmax", dtype="float32", name="scores")(x)
    return keras.Model(values, scores, name=f"unet_{poolings}_{filters}")


def normalise(x: Any, bands: Sequence[str], statistics: Mapping[str, Mapping[str, Any]]) -> Any:
    """Stored values to zero mean and unit deviation by band, clipped to +-`CLIP` deviations.

    The deviation is the larger half of the range from the 1st to the 99th percentile over 2.33 (a normal
    distribution's own ratio) where outliers have blown up the plain one.
    """
    import keras

    mean = [float(statistics[band]["mean"]) for band in bands]
    deviation = [spread(statistics[band]) for band in bands]
    x = keras.layers.Normalization(mean=mean, variance=[(CLIP * one) ** 2 for one in deviation], name="normalise")(x)
    x = keras.layers.Activation("hard_tanh", name="clip")(x)
    return keras.layers.Rescaling(CLIP, name="rescale")(x)


def spread(statistics: Mapping[str, Any]) -> float:
    """A band's deviation that a few wild values cannot blow up; 1 for a constant band."""
    std = float(statistics["std"])
    percentiles = statistics.get("percentiles") or {}
    if "1" in percentiles and "99" in percentiles:
        mean = float(statistics["mean"])
        half = max(float(percentiles["99"]) - mean, mean - float(percentiles["1"])) / 2.33
        if 0 < half < std:
            std = half
    return std if std > 0 else 1.0


def _convolve(x: Any, filters: int, name: str) -> Any:
    import keras

    for step in "ab":
        x = keras.layers.Conv2D(
            filters, 3, padding="same", use_bias=False, kernel_initializer="he_normal", name=f"{name}{step}_conv"
        )(x)
        x = keras.layers.BatchNormalization(momentum=MOMENTUM, synchronized=True, name=f"{name}{step}_norm")(x)
        x = keras.layers.Activation("relu", name=f"{name}{step}_relu")(x)
    return x


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
