"""How a network is run: by TensorFlow in float32, or by OpenVINO in bfloat16, some times faster on CPUs.

Both give the same bits for the same input: each input shape is compiled once, for inference, and the number of threads
is fixed.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from sattile.errors import SattileError, UsageError

Scorer = Callable[[np.ndarray], np.ndarray]
"""(N, H, W, bands) of any dtype -> (N, H, W, classes) float32."""

PRECISION = "bf16"
"""Of OpenVINO's arithmetic. A CPU without it computes in float32."""

NOISE = ("WARNING: All log messages before absl::InitializeLog", "I0000 ", "To enable the following instructions")
"""What TensorFlow says while it is imported, whatever its log level; news to nobody."""


# --- TensorFlow ---------------------------------------------------------------------------------------------------


def import_tensorflow() -> Any:
    """The tensorflow module; what it says while it starts goes to standard error without the `NOISE`."""
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    sys.stderr.flush()
    stderr = os.dup(2)  # the C++ side writes to the descriptor, not to sys.stderr
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            try:
                import tensorflow as tf
            finally:
                os.dup2(stderr, 2)
                said.seek(0)
                for line in said.read().decode(errors="replace").splitlines():
                    if line and not line.startswith(NOISE):
                        print(line, file=sys.stderr)
    finally:
        os.close(stderr)
    tf.get_logger().setLevel("ERROR")  # warns of retracing where shapes differ by design
    return tf


def use_threads(threads: int) -> None:
    """Fix TensorFlow's threads in this process.

    Raises:
        SattileError: if it has started with another number.
    """
    config = import_tensorflow().config.threading
    try:
        config.set_intra_op_parallelism_threads(threads)
        config.set_inter_op_parallelism_threads(threads)
    except RuntimeError as error:
        # It has started. TensorFlow takes the variable where nothing was set.
        running = config.get_intra_op_parallelism_threads() or int(os.environ.get("TF_NUM_INTRAOP_THREADS", 0))
        if running != threads:
            raise SattileError(
                f"TensorFlow runs in this process with {running or 'as many threads as there are cores'} and {threads} "
                f"were asked for: load the scorer before anything else uses TensorFlow, or set "
                f"TF_NUM_INTRAOP_THREADS={threads} first"
            ) from error


def by_tensorflow(network: Any, *, second: bool) -> Scorer:
    """The scores of a Keras network.

    Args:
        second: it gives one channel, the probability of the second of two classes.
    """
    tf = import_tensorflow()
    compiled: dict[tuple[int, ...], Any] = {}

    def score(images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, np.float32)
        if images.shape not in compiled:
            signature = [tf.TensorSpec(images.shape, tf.float32)]
            compiled[images.shape] = tf.function(
                lambda values: tf.cast(network(values, training=False), tf.float32),
                input_signature=signature,
                autograph=False,
            )
        return _both(compiled[images.shape](tf.constant(images)).numpy(), second)

    return score


def _both(scores: np.ndarray, second: bool) -> np.ndarray:
    return np.concatenate([1 - scores, scores], axis=-1) if second else scores


# --- OpenVINO -----------------------------------------------------------------------------------------------------


NO_OPENVINO = "engine openvino: it is not installed here: pip install 'sattile[openvino]'"


@functools.cache  # asked for each block
def has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


def openvino_version() -> str:
    return str(_openvino().__version__).partition("-")[0]


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise UsageError(NO_OPENVINO) from None
    return openvino


def convert(saved_model: str, xml: str) -> None:
    """Write a network for OpenVINO: `xml`, and its weights beside it (`.bin`).

    Args:
        saved_model: local folder.
        xml: local file.
    """
    openvino = _openvino()
    # Not `convert_model`, which reports its use to Intel. bfloat16 is chosen when a network is compiled: float32
    # weights serve every CPU.
    openvino.save_model(openvino.Core().read_model(saved_model), xml, compress_to_fp16=False)


def by_openvino(xml: str, *, threads: int, second: bool) -> Scorer:
    """The scores of a network that `convert` wrote; see `by_tensorflow`."""
    openvino = _openvino()
    core = openvino.Core()
    read = core.read_model(xml)
    settings = {
        "INFERENCE_PRECISION_HINT": PRECISION,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Several workers of a machine would all be pinned to the same first core.
        "ENABLE_CPU_PINNING": False,
    }
    compiled: dict[tuple[int, ...], Any] = {}

    def score(images: np.ndarray) -> np.ndarray:
        images = np.ascontiguousarray(images, np.float32)
        if images.shape not in compiled:
            network = read.clone()
            network.reshape({0: images.shape})
            compiled[images.shape] = core.compile_model(network, "CPU", settings).create_infer_request()
        found = compiled[images.shape].infer([images], share_inputs=True)
        return _both(np.array(found[0], np.float32), second)

    return score


def agreement(one: Scorer, other: Scorer, images: np.ndarray, valid: np.ndarray) -> tuple[float, int]:
    """The share of pixels that get the same label by both, and how many pixels were compared.

    Args:
        images: (N, H, W, bands), as the network takes them.
        valid: (N, H, W) bool: pixels that count.
    """
    same = pixels = 0
    for image, counts in zip(images, valid, strict=True):
        labels = [scorer(image[None])[0].argmax(-1) for scorer in (one, other)]
        same += int((labels[0] == labels[1])[counts].sum())
        pixels += int(counts.sum())
    return (same / pixels if pixels else 0.0), pixels
