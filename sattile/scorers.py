"""How a network is run: by TensorFlow in float32, on CPUs or GPUs, or by OpenVINO in float32 or bfloat16 on CPUs.

Each gives the same bits for the same input: an input shape is compiled once, for inference, and the number of threads
is fixed.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sattile.errors import Outage, SattileError, UsageError, said_by_task

Scorer = Callable[[np.ndarray], np.ndarray]
"""(N, H, W, bands) of any dtype -> (N, H, W, classes) float32, to be read only: it may be an engine's own memory."""

PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
"""Of OpenVINO's arithmetic, by the names that it has for them. A CPU without bfloat16 emulates it, slowly."""

GPU = "tensorflow-gpu"
"""The engine that is TensorFlow on the GPU that Spark gives a task."""

CPU = "/CPU:0"
"""TensorFlow's name of it; where it sees GPUs it would take them unasked."""

ALIGNED = 64
"""Bytes: TensorFlow's tensors begin on multiples of it."""

NOISE = ("WARNING: All log messages before absl::InitializeLog", "I0000 ", "To enable the following instructions")
"""What TensorFlow says while it is imported, whatever its log level; news to nobody."""


# --- what the CPU does by itself ------------------------------------------------------------------------------------


NATIVE = {"avx512_bf16", "amx_bf16", "bf16"}
"""Flags of CPUs that multiply bfloat16: of x86 with AVX-512 or AMX, and of ARM."""


@dataclass(frozen=True)
class Cpu:
    """A kind of CPU.

    Attributes:
        name: as the system calls it.
        bfloat16: it computes in bfloat16 by itself.
    """

    name: str
    bfloat16: bool

    def __str__(self) -> str:
        return f"{self.name} ({'with' if self.bfloat16 else 'without'} bfloat16)"


@functools.cache
def cpu() -> Cpu:
    """This machine's. OpenVINO takes bfloat16 for native on any CPU with AVX-512: its word and the flags both count."""
    text = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    lines = dict(part for line in text.splitlines() if len(part := [one.strip() for one in line.split(":", 1)]) == 2)
    name = lines.get("model name") or platform.processor() or platform.machine()
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    return Cpu(name, bool(flags & NATIVE) and (not has_openvino() or openvino_has_bfloat16()))


# --- TensorFlow ---------------------------------------------------------------------------------------------------


def import_tensorflow() -> Any:
    """The tensorflow module; what it says while it starts goes to standard error without the `NOISE`."""
    if "tensorflow" in sys.modules:
        return sys.modules["tensorflow"]
    # Several tasks share a GPU, of which the first would take all memory.
    os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")
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


def use_gpu() -> str:
    """Make TensorFlow compute on this process's GPU as it does elsewhere; TensorFlow's name of the device.

    cuDNN's kernels are chosen by what they are, not by a race between them, and float32 is not cut to TF32's 10 bits:
    a retried task gives the same bits.

    Raises:
        SattileError: if it sees none.
    """
    tf = import_tensorflow()
    if not tf.config.list_physical_devices("GPU"):
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise SattileError(
            f"engine {GPU}: TensorFlow sees no GPU here{f', though Spark gave this task GPU {given}' if given else ''}"
            f"; install sattile[gpu] into the environment (sattile[cpu] has no CUDA), look at the node's driver "
            f"(nvidia-smi), or use --engine tensorflow"
        )
    tf.config.experimental.enable_op_determinism()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    return "/GPU:0"


def check_gpu() -> None:
    """Whether TensorFlow sees a GPU on this machine, asked in a process of its own: this one is to stay without it.

    Raises:
        UsageError: if it sees none.
    """
    script = "from sattile import scorers; scorers.use_gpu()"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = said_by_task(done.stderr)
        raise UsageError(str(said) if said else f"engine {GPU}: TensorFlow does not start: {done.stderr[-300:]}")


def placed_on(device: str) -> AbstractContextManager[None]:
    """A context in which TensorFlow puts what it makes on this device."""
    return import_tensorflow().device(device)


def by_tensorflow(network: Any, *, second: bool, device: str = CPU) -> Scorer:
    """The scores of a Keras network.

    Args:
        second: it gives one channel, the probability of the second of two classes.
        device: TensorFlow's name of it.
    """
    tf = import_tensorflow()
    compiled: dict[tuple[int, ...], Any] = {}
    # A CPU's tensor may lie where the array lies, and what comes out is looked at where it is: nothing is copied.
    laid = (lambda pixels: tf.experimental.dlpack.from_dlpack(pixels.__dlpack__())) if device == CPU else tf.constant

    def compile_for(shape: tuple[int, ...]) -> Any:
        def run(values: Any) -> Any:
            with tf.device(device):
                return tf.cast(network(values, training=False), tf.float32)

        traced = tf.function(run, input_signature=[tf.TensorSpec(shape, tf.float32)], autograph=False)
        return traced.get_concrete_function()  # spares each call the search for it

    def score(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.shape not in compiled:
            _forget_large(compiled)
            compiled[images.shape] = compile_for(images.shape)
        pixels = _by_pixel(images)
        try:
            with tf.device(device):
                return _both(np.asarray(memoryview(compiled[images.shape](laid(pixels)))), second)
        except tf.errors.ResourceExhaustedError:
            if device == CPU:
                raise
            raise Outage(
                f"the GPU's memory does not hold an input of {' x '.join(map(str, images.shape[:3]))} pixels beside "
                f"what else runs on it: give a smaller --size, or let fewer tasks share a GPU (a larger "
                f"spark.task.resource.gpu.amount)"
            ) from None

    return score


def _by_pixel(images: np.ndarray) -> np.ndarray:
    """A copy in float32 with a pixel's bands side by side, which begins where TensorFlow wants memory to begin."""
    memory = np.empty(images.size * 4 + ALIGNED, np.uint8)
    start = -memory.ctypes.data % ALIGNED
    pixels = memory[start : start + images.size * 4].view(np.float32).reshape(images.shape)
    if images.flags.c_contiguous:
        pixels[:] = images
    else:
        for band in range(images.shape[-1]):  # planes: thrice as fast as all at once
            pixels[..., band] = images[..., band]
    return pixels


KEPT_PIXELS, KEPT_SHAPES = 1_000_000, 16
"""Most pixels and number of the input shapes that a network stays compiled for, beside the one in use: OpenVINO holds
the activations of each, 0.25 GB for this many pixels of the default U-Net, and scenes of an archive may all differ."""


def _forget_large(compiled: dict[tuple[int, ...], Any]) -> None:
    """Forget the oldest shapes before another is compiled."""
    known = len(compiled)
    while compiled and (sum(math.prod(shape[:3]) for shape in compiled) > KEPT_PIXELS or len(compiled) >= KEPT_SHAPES):
        del compiled[next(iter(compiled))]
    if len(compiled) < known:
        # TensorFlow's graphs hold themselves in circles, and a worker's are frozen with all that it has.
        frozen = gc.get_freeze_count()
        gc.unfreeze()
        gc.collect()
        if frozen:
            gc.freeze()


def _both(scores: np.ndarray, second: bool) -> np.ndarray:
    return np.concatenate([1 - scores, scores], axis=-1) if second else scores


# --- OpenVINO -----------------------------------------------------------------------------------------------------


NO_OPENVINO = "engine openvino: it is not installed here: pip install 'sattile[openvino]'"


@functools.cache  # asked for each block
def has_openvino() -> bool:
    return importlib.util.find_spec("openvino") is not None


@functools.cache
def openvino_has_bfloat16() -> bool:
    """Whether OpenVINO computes in bfloat16 on this machine, by itself or emulated."""
    return "BF16" in _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


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
    network = openvino.Core().read_model(saved_model)
    for node in network.get_ordered_ops():
        if node.get_type_name() == "Softmax":
            _over_planes(node)
    openvino.save_model(network, xml, compress_to_fp16=False)


def _over_planes(softmax: Any) -> None:
    """Take a softmax over channels before they are moved last: the same values, ten times as fast."""
    opset = _openvino().opset13
    moved = softmax.input_value(0).get_node()
    if moved.get_type_name() != "Transpose" or moved.input_value(1).get_node().get_type_name() != "Constant":
        return
    order = moved.input_value(1).get_node().data
    before = opset.softmax(moved.input_value(0), int(order[softmax.get_attributes()["axis"]]))
    after = opset.transpose(before, moved.input_value(1))
    after.set_friendly_name(softmax.get_friendly_name())
    softmax.output(0).replace(after.output(0))


def by_openvino(xml: str, *, threads: int, second: bool, precision: str = "bfloat16") -> Scorer:
    """The scores of a network that `convert` wrote; see `by_tensorflow`.

    Args:
        precision: of its arithmetic: a name of `PRECISIONS`. What comes out is float32.
    """
    openvino = _openvino()
    core = openvino.Core()
    read = core.read_model(xml)
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        # Several workers of a machine would all be pinned to the same first core.
        "ENABLE_CPU_PINNING": False,
    }
    compiled: dict[tuple[int, ...], Callable[[np.ndarray], np.ndarray]] = {}

    def compile_for(shape: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
        def request(model: Any, precision: str) -> Any:
            made = core.compile_model(model, "CPU", settings | {"INFERENCE_PRECISION_HINT": precision})
            return made.create_infer_request()

        network = read.clone()
        network.reshape({0: shape})
        head, body = _cut_head(_by_planes(network))
        last = request(body, PRECISIONS[precision])
        if head is None:
            return lambda planes: last.infer([planes], share_inputs=True)[0]
        first = request(head, "f32")
        for index in range(len(head.outputs)):
            last.set_input_tensor(index, first.get_output_tensor(index))

        def run(planes: np.ndarray) -> np.ndarray:
            first.infer([planes], share_inputs=True, share_outputs=True)
            return last.infer()[0]

        return run

    def score(images: np.ndarray) -> np.ndarray:
        images = np.asarray(images)
        if images.shape not in compiled:
            _forget_large(compiled)
            compiled[images.shape] = compile_for(images.shape)
        planes = np.ascontiguousarray(np.moveaxis(images, -1, 1), np.float32)
        return _both(np.moveaxis(np.asarray(compiled[images.shape](planes), np.float32), 1, -1), second)

    return score


def _by_planes(network: Any) -> Any:
    """The same network with a plane for each band in and for each class out, as OpenVINO computes: it moves none."""
    from openvino.preprocess import PrePostProcessor

    openvino = _openvino()
    planes, pixels = openvino.Layout("NCHW"), openvino.Layout("NHWC")
    processor = PrePostProcessor(network)
    for port in (processor.input(), processor.output()):
        # As float32 whatever the network's own: its Python binding takes bfloat16 for float16.
        port.tensor().set_layout(planes).set_element_type(openvino.Type.f32)
        port.model().set_layout(pixels)
    return processor.build()


HEAD = {
    "Abs", "Add", "Clamp", "Concat", "Convert", "Divide", "Elu", "Exp", "Gather", "HardSigmoid", "Log", "Maximum",
    "Minimum", "Multiply", "Negative", "Power", "PRelu", "Relu", "Reshape", "Select", "Sigmoid", "Slice", "Split",
    "Sqrt", "SquaredDifference", "Squeeze", "StridedSlice", "Subtract", "Tanh", "Transpose", "Unsqueeze",
    "VariadicSplit",
}  # fmt: skip
"""Operations of OpenVINO that work on single values, or move them."""


def _cut_head(network: Any) -> tuple[Any, Any]:
    """Cut a network behind what it does to stored values before anything looks at neighbours: normalising them.

    OpenVINO's CPU plugin makes bfloat16 of what it is given, and subtracts a mean afterwards: of values near 10,000
    only steps of 64 are left.

    Args:
        network: an `openvino.Model` of one input.

    Returns:
        The head, None where there is none, and the rest, which takes the outputs of the head in their order.
    """
    openvino = _openvino()
    given = network.inputs[0].get_node()
    head, changed = {given.get_name()}, {given.get_name()}  # changed: what depends on the input at all
    for node in network.get_ordered_ops():
        sources = {port.get_source_output().get_node().get_name() for port in node.inputs()} & changed
        if sources:
            changed.add(node.get_name())
            if sources <= head and node.get_type_name() in HEAD:
                head.add(node.get_name())
    if len(head) == 1:
        return None, network
    outputs, inputs = [], []
    for node in network.get_ordered_ops():
        for port in node.outputs() if node.get_name() in head else []:
            users = [user for user in port.get_target_inputs() if user.get_node().get_name() not in head]
            if users:
                outputs.append(port)
                inputs.append(openvino.opset13.parameter(port.get_shape(), port.get_element_type()))
                for user in users:
                    user.replace_source_output(inputs[-1].output(0))
    # A clone: nodes belong to one model each.
    return openvino.Model(outputs, [given]), openvino.Model(network.get_results(), inputs).clone()


# --- several evaluations of one window ---------------------------------------------------------------------------


TURNS: dict[str, tuple[tuple[int, bool], ...]] = {
    "none": ((0, False),),
    "flips": ((0, False), (0, True), (2, False), (2, True)),
    "turns": tuple((quarters, mirrored) for quarters in range(4) for mirrored in (False, True)),
}
"""Test-time augmentation: the quarter turns, each then mirrored or not, that a window is looked at in."""


def turned(scorer: Scorer, how: str) -> Scorer:
    """The mean of a network's scores over the turns of a window, each turned back.

    What a network says of a pixel follows from its surroundings, however they lie; the mean over all 8 ways makes its
    maps the same, too. Windows begin and end on multiples of the total stride, so pooling grids turn with them.
    """
    turns = TURNS[how]
    if len(turns) == 1:
        return scorer

    def score(images: np.ndarray) -> np.ndarray:
        total: np.ndarray | None = None
        for quarters, mirrored in turns:
            given = np.rot90(images, quarters, (1, 2))
            found = scorer(given[:, :, ::-1] if mirrored else given)
            back = np.rot90(found[:, :, ::-1] if mirrored else found, -quarters, (1, 2))
            total = np.array(back) if total is None else np.add(total, back, out=total)
        assert total is not None
        return np.divide(total, np.float32(len(turns)), out=total)

    return score


def averaged(scorers: Sequence[Scorer]) -> Scorer:
    """The mean of several networks' scores."""
    if len(scorers) == 1:
        return scorers[0]

    def score(images: np.ndarray) -> np.ndarray:
        total = scorers[0](images).copy()
        for one in scorers[1:]:
            total += one(images)
        return np.divide(total, np.float32(len(scorers)), out=total)

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
