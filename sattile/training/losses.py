"""What a network is trained to make small: cross-entropy and Dice, both of sums that add up over workers and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

TABLE = 256
"""Labels are looked up as they are stored, uint8: `IGNORE` weighs nothing."""


@dataclass(frozen=True)
class Loss:
    """The loss of a batch, and what it is divided by.

    Attributes:
        weights: by class, (K,) float32, in cross-entropy.
        dice: weight of the Dice term.
        smoothing: share of a label that is spread over all classes (Szegedy et al. 2016,
            https://arxiv.org/abs/1512.00567): where labels are wrong now and then, certainty is not asked for.
        hard_share: share of a tile's labelled pixels, those with the largest losses, that cross-entropy counts
            (Shrivastava et al. 2016, https://arxiv.org/abs/1604.03540); 1 counts all.
    """

    weights: np.ndarray
    dice: float = 1.0
    smoothing: float = 0.0
    hard_share: float = 1.0

    def totals(self, labels: Any) -> Any:
        """What the sums of a batch are divided by, (2,) float32: the weight of its pixels, its labelled tiles.

        Args:
            labels: (N, H, W) uint8 class index.
        """
        import tensorflow as tf

        known = tf.cast(labels, tf.int32) < len(self.weights)
        labelled = tf.reduce_any(known, axis=[1, 2])
        weight = tf.reduce_sum(self._weight(labels), [1, 2])
        if self.hard_share < 1:
            # As many pixels as are counted, at the mean weight of the tile's.
            pixels = tf.reduce_sum(tf.cast(known, tf.float32), [1, 2])
            weight = tf.math.divide_no_nan(weight, pixels) * self._counted(pixels)
        return tf.stack([tf.reduce_sum(weight), tf.reduce_sum(tf.cast(labelled, tf.float32))])

    def sums(self, logp: Any, labels: Any) -> Any:
        """The losses of a batch, (2,) float32: cross-entropy over pixels, Dice over tiles. To be divided by `totals`.

        Args:
            logp: (N, H, W, K) float32 logarithms of probabilities.
            labels: (N, H, W) uint8 class index.
        """
        import tensorflow as tf

        classes = len(self.weights)
        truth = tf.one_hot(tf.cast(labels, tf.int32), classes)  # IGNORE: all zero
        wanted = truth
        if self.smoothing:
            known = tf.reduce_sum(truth, -1, keepdims=True)
            wanted = truth * (1 - self.smoothing) + known * (self.smoothing / classes)
        pixels = -self._weight(labels) * tf.reduce_sum(wanted * logp, -1)
        if self.hard_share < 1:
            pixels = self._hardest(pixels, tf.reduce_sum(truth, [1, 2, 3]))
        cross_entropy = tf.reduce_sum(pixels)
        tiles = tf.reduce_sum(dice_loss(tf.exp(logp), labels)) if self.dice else tf.constant(0.0)
        return tf.stack([cross_entropy, self.dice * tiles])

    def _weight(self, labels: Any) -> Any:
        import tensorflow as tf

        table = np.zeros(TABLE, np.float32)
        table[: len(self.weights)] = self.weights
        return tf.gather(table, tf.cast(labels, tf.int32))

    def _counted(self, pixels: Any) -> Any:
        import tensorflow as tf

        return tf.math.ceil(self.hard_share * pixels)

    def _hardest(self, losses: Any, labelled: Any) -> Any:
        """(N, H, W) losses with those of easier pixels set to 0. By tile: so it does not matter who else is there."""
        import tensorflow as tf

        flat = tf.reshape(losses, (tf.shape(losses)[0], -1))
        order = tf.sort(flat, direction="DESCENDING")
        rank = tf.range(tf.shape(flat)[1], dtype=tf.float32)[None, :]
        return tf.where(rank < self._counted(labelled)[:, None], order, 0.0)


def cross_entropy_sum(logp: Any, labels: Any) -> Any:
    """Plain cross-entropy summed over the labelled pixels: what validation reports."""
    import tensorflow as tf

    return -tf.reduce_sum(tf.one_hot(tf.cast(labels, tf.int32), logp.shape[-1]) * logp)


def dice_loss(probabilities: Any, labels: Any) -> Any:
    """1 - soft Dice per tile, (N,): the mean over the classes that a tile's labelled pixels show; 0 for none.

    Args:
        probabilities: (N, H, W, K) float32.
        labels: (N, H, W) class index; others (`IGNORE`) do not count.
    """
    import tensorflow as tf

    classes = probabilities.shape[-1]
    index = tf.cast(labels, tf.int32)
    truth = tf.one_hot(index, classes)
    probabilities *= tf.cast(index < classes, tf.float32)[..., None]
    both = tf.reduce_sum(truth * probabilities, [1, 2])
    area = tf.reduce_sum(truth, [1, 2])
    present = tf.cast(area > 0, tf.float32)
    # Smoothing by one pixel: a class of a few pixels has a gradient, too.
    score = (2 * both + 1) / (area + tf.reduce_sum(probabilities, [1, 2]) + 1)
    return tf.math.divide_no_nan(tf.reduce_sum(present * (1 - score), -1), tf.reduce_sum(present, -1))


def class_weights(how: str, pixels: np.ndarray) -> np.ndarray:
    """A weight per class, (K,) float32, from the labelled pixels of each: `none`, or `balanced`."""
    if how == "none" or not pixels.any():
        return np.ones(len(pixels), np.float32)
    # Tempered by a square root: full balance makes a network shout about rare classes.
    share = np.maximum(pixels, 1) / max(pixels.sum(), 1)
    weights = share**-0.5
    return (weights / (weights * share).sum()).astype(np.float32)


def log_probabilities(network: Any) -> Callable[..., Any]:
    """A function (images, training=) -> (N, H, W, K) float32 logarithms of a network's scores.

    From the logits where the last layer is a softmax of its own: more exact than log(softmax).
    """
    import keras
    import tensorflow as tf

    last = network.layers[-1]
    is_softmax = isinstance(last, keras.layers.Softmax) or (
        isinstance(last, keras.layers.Activation) and last.activation is keras.activations.softmax
    )
    if is_softmax and last.output is network.output and len(last._inbound_nodes) == 1:
        logits = keras.Model(network.inputs, last.input)
        return lambda images, training: tf.nn.log_softmax(tf.cast(logits(images, training=training), tf.float32))

    def from_scores(images: Any, training: bool) -> Any:
        scores = tf.cast(network(images, training=training), tf.float32)
        return tf.math.log(tf.clip_by_value(scores, 1e-7, 1.0))

    return from_scores
