"""One block of a scene, from file to labels: what every task of prediction and evaluation does, and its memory.

A block is read once with its context in the decoder, while the block before it is inferred; windows go through the
network as `grid.Geometry` lays them; what overlaps is added up (`stitch`), and decided.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np

from sattile import drift, metrics, raster, scorers, shapes, storage
from sattile import labels as label_module
from sattile.decoder import read_ahead
from sattile.errors import Refused, UsageError, about, refusal
from sattile.grid import CELL, Geometry, Placement, Window, ceil_to, choose_geometry
from sattile.labels import LabelSource
from sattile.memory import peak_mb
from sattile.model import Bundle, choose_engine, load_scorer
from sattile.schema import Scene
from sattile.scorers import TURNS, Scorer
from sattile.stitch import NODATA, Stitcher, blend_weights, to_labels

log = logging.getLogger("sattile")

WORKER_BASE = {"tensorflow": 1_100_000_000, "openvino": 650_000_000, scorers.GPU: 2_500_000_000}
"""Bytes a worker holds before it reads a pixel: Python, the engine, the decoder with GDAL and its cache (measured, but
for the last: TensorFlow's and a guess of 1.4 GB for CUDA's libraries)."""

ACTIVATIONS = {"tensorflow": 1.15, "openvino": 0.42, scorers.GPU: 0.0}
"""What an engine holds in a worker's memory for each byte of a bundle's `activation_bytes` (measured); OpenVINO in
bfloat16, in float32 twice that."""

GPU_PIXELS = 2048 * 2048
"""What a GPU is given at once, in one window or in a batch of small ones, as far as `GPU_MEMORY` allows."""

GPU_MEMORY = 4_000_000_000
"""Bytes that an evaluation may take of a GPU: three tasks share one of 16 GB."""

LEAST_MEMORY = 100_000_000
"""Less is a slip of the pen: `3` for 3g."""

BATCH_PIXELS = 512 * 512
"""Small windows share a batch up to this many pixels; on CPUs larger batches win nothing."""


# --- settings -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inference:
    """How blocks are labelled; everything a task has to know, fixed once on the driver.

    Attributes:
        bundle: the network.
        geometry: how it is laid over a scene.
        batch: windows of one evaluation; always as many (the last ones are padded), so that shapes never vary.
        engine, threads: what runs it.
        fill: value of invalid and added pixels, per band.
        threshold: see `stitch.to_labels`.
        nodata: overrides what files declare.
        aoi: (WKB, CRS); pixels outside are nodata.
        scores, coverage: whether these are wanted beside the labels.
        image: whether to hand out the pixels read, too.
        tta: the turns that scores are averaged over: a name of `scorers.TURNS`.
        rescale: (factor, offset) of what scenes hold, to the numbers that the network knows.
        precision: of OpenVINO's arithmetic: a name of `scorers.PRECISIONS`.
    """

    bundle: Bundle
    geometry: Geometry
    batch: int
    engine: str
    threads: int
    fill: tuple[float, ...]
    threshold: float | None = None
    nodata: float | None = None
    aoi: tuple[bytes, str] | None = None
    scores: bool = False
    coverage: bool = False
    image: bool = False
    tta: str = "none"
    rescale: tuple[float, float] = (1.0, 0.0)
    precision: str = "bfloat16"

    def present(self, data: np.ndarray, valid: np.ndarray, out: np.ndarray) -> None:
        """Write pixels as the network is to see them: rescaled, and `fill` where they are not valid.

        Args:
            data: (height, width, bands); valid: (height, width) bool.
            out: (height, width, bands) float32.
        """
        out[:] = data
        factor, offset = self.rescale
        if self.rescale != (1.0, 0.0):
            with np.errstate(over="ignore", invalid="ignore"):  # whatever lies under nodata
                out *= np.float32(factor)
                out += np.float32(offset)
        if not valid.all():
            for band, value in enumerate(self.fill):
                np.copyto(out[..., band], np.float32(value), where=~valid)

    @property
    def scorer(self) -> Scorer:
        return load_scorer(
            self.bundle, engine=self.engine, threads=self.threads, tta=self.tta, precision=self.precision
        )

    @property
    def passes(self) -> int:
        """How often a pixel goes through a network."""
        return len(TURNS[self.tta]) * max(len(self.bundle.members), 1)

    @property
    def class_ids(self) -> np.ndarray:
        return np.array([one.id for one in self.bundle.classes], np.uint8)


def parse_memory(value: int | str) -> int:
    """`1500000000`, `1500m`, `3g` -> bytes.

    Raises:
        UsageError: for anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?", str(value).strip().lower())
    if not match:
        raise UsageError(f"worker_memory {value!r}: give bytes, or a number with m or g, such as 3g")
    found = int(float(match.group(1)) * 1024 ** " kmgt".index(match.group(2) or " "))
    if found < LEAST_MEMORY:
        raise UsageError(f"worker_memory {value!r} is {found} bytes: give what a worker needs, such as 1500m or 3g")
    return found


def prepare(
    bundle: Bundle,
    *,
    merge: str | None = None,
    size: int | None = None,
    stride: int | None = None,
    halo: int | None = None,
    engine: str = "auto",
    precision: str = "bfloat16",
    gpu: bool = False,
    local: bool = False,
    threads: int = 1,
    fill: float | str | Sequence[float] | None = None,
    threshold: float | None = None,
    nodata: float | None = None,
    aoi: tuple[bytes, str] | None = None,
    scores: bool = False,
    coverage: bool = False,
    worker_memory: int | str = "3g",
    tta: str = "none",
    rescale: str | Sequence[float] | None = None,
) -> Inference:
    """Everything about a run that does not depend on the scenes, checked.

    Args:
        engine, precision: see `processors.choose`, which says what is best here.
        gpu: Spark gives its tasks GPUs.
        local: its tasks run on this machine.

    Raises:
        UsageError: for a geometry, engine, fill, threshold or rescaling that cannot be.
    """
    chosen = choose_engine(bundle, engine, gpu=gpu)
    on_gpu = chosen == scorers.GPU
    if on_gpu and local:
        scorers.check_gpu()
    if tta not in TURNS:
        raise UsageError(f"tta {tta!r}: use {', '.join(TURNS)}")
    if threshold is not None and not math.isfinite(threshold):
        raise UsageError(f"threshold {threshold}: give a score")
    if threshold is not None and threshold > 1:
        log.warning("threshold %g: scores that are probabilities never reach it, and all is nodata", threshold)
    given = _fill(bundle, fill)
    room = max(parse_memory(worker_memory) - WORKER_BASE[chosen], 0)
    # As `block_memory` of a block that is one window, and a tenth to spare.
    pixels = room * 0.9 / (window_memory(bundle, chosen, precision) + 2 * (4 * len(bundle.bands) + 1))
    if on_gpu:
        pixels = min(pixels, pixels_at_once(bundle, chosen))
    max_input = max(math.isqrt(int(pixels)), 64)
    geometry = choose_geometry(
        total_stride=bundle.total_stride, radius=bundle.receptive_radius, input_shape=bundle.input_shape,
        merge=merge, size=size, stride=stride, halo=halo, max_input=max_input,
        cell=max_input if on_gpu else CELL,
    )  # fmt: skip
    return Inference(
        bundle, geometry, batch_of(bundle, chosen, geometry.input_size), chosen, threads, given,
        threshold, nodata, aoi, scores, coverage, tta=tta, rescale=_parse_rescale(rescale),
        precision=precision,
    )  # fmt: skip


def window_memory(bundle: Bundle, engine: str, precision: str = "bfloat16") -> float:
    """Bytes that a worker holds for each pixel of a window: its network's own, and twice what goes in and comes out."""
    wide = 2 if (engine, precision) == ("openvino", "float32") else 1
    return wide * bundle.activation_bytes * ACTIVATIONS[engine] + 8 * len(bundle.bands) + 8 * len(bundle.classes)


def pixels_at_once(bundle: Bundle, engine: str) -> int:
    """How many pixels are worth one evaluation."""
    if engine != scorers.GPU:
        return BATCH_PIXELS
    return min(GPU_PIXELS, int(GPU_MEMORY / window_memory(bundle, "tensorflow")))


def batch_of(bundle: Bundle, engine: str, edge: int) -> int:
    """Windows of one evaluation whose inputs have this edge."""
    return max(min(pixels_at_once(bundle, engine) // edge**2, 64 if engine == scorers.GPU else 16), 1)


def _parse_rescale(given: str | Sequence[float] | None) -> tuple[float, float]:
    if given is None:
        return 1.0, 0.0
    try:
        parts = [float(one) for one in (given.split(",") if isinstance(given, str) else given)]
    except (TypeError, ValueError):
        parts = []
    if len(parts) != 2 or not parts[0] or not all(map(math.isfinite, parts)):
        raise UsageError(f"rescale {given!r}: give a factor and an offset, such as 1,-1000")
    return parts[0], parts[1]


def _fill(bundle: Bundle, fill: float | str | Sequence[float] | None) -> tuple[float, ...]:
    if fill is None:
        if len({one.fill for one in bundle.members}) > 1:
            raise UsageError(
                f"the models {bundle.url} were made for other fill values (the means of their training tiles): "
                f"--fill VALUE gives all of them one for missing pixels"
            )
        return tuple(bundle.fill)
    try:
        parts = fill.split(",") if isinstance(fill, str) else [fill] if isinstance(fill, int | float) else list(fill)
        values = tuple(float(part) for part in parts)
    except ValueError:
        raise UsageError(f"fill {fill!r}: give a number, or one a band, such as 0,0,0,0") from None
    values = values * len(bundle.bands) if len(values) == 1 else values
    if len(values) != len(bundle.bands) or not all(map(math.isfinite, values)):
        raise UsageError(f"fill {fill!r}: give one finite number, or {len(bundle.bands)} ({', '.join(bundle.bands)})")
    return values


def block_memory(job: Inference, edge: int) -> int:
    """Bytes that a worker needs for blocks of this edge, its network included: an estimate."""
    bands, classes = len(job.bundle.bands), len(job.bundle.classes)
    geometry = job.geometry
    context = geometry.halo if geometry.merge == "crop" else geometry.size
    read = (edge + 2 * context) ** 2 * (4 * bands + 1)
    window = geometry.input_size**2 * job.batch * window_memory(job.bundle, job.engine, job.precision)
    sums = edge**2 * (8 * classes + 8) if geometry.merge == "blend" else 0
    out = edge**2 * (2 + 4 * classes * job.scores + 4 * job.coverage)
    # Twice what is read: the block being inferred here, the next one in the decoder.
    return int(WORKER_BASE[job.engine] + 2 * read + window + sums + out)


def warn_of_memory(need: int, memory: int, what: str) -> None:
    """Say that a worker may need more than it may use.

    Args:
        need, memory: both in bytes.
        what: takes it.
    """
    if need > memory:
        log.warning(
            "a worker may need %.1f GB for %s, more than worker_memory %.1f GB; a smaller --size needs less",
            need / 1e9, what, memory / 1e9,
        )  # fmt: skip


def describe_job(job: Inference) -> dict[str, Any]:
    """All of a job that shapes its result, as JSON: part of the settings of a run."""
    return json.loads(
        json.dumps(
            {
                "model": job.bundle.identity, **asdict(job.geometry), "batch": job.batch, "engine": job.engine,
                "threads": job.threads, "fill": job.fill, "threshold": job.threshold, "nodata": job.nodata,
                "aoi": storage.digest([job.aoi[0].hex(), job.aoi[1]]) if job.aoi else None,
                # What OpenVINO has computed in since there were maps by it.
                **({"precision": "float32"} if (job.engine, job.precision) == ("openvino", "float32") else {}),
                **({"tta": job.tta} if job.tta != "none" else {}),
                **({"rescale": job.rescale} if job.rescale != (1.0, 0.0) else {}),
            }
        )
    )  # fmt: skip


# --- one block ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """A block to be labelled, and the labels to compare it with, if any."""

    scene: Scene
    block: Window
    truth: LabelSource | None = None


@dataclass(frozen=True)
class Labelled:
    """A labelled block, or the reason why its scene is refused.

    Attributes:
        labels: (height, width) uint8.
        scores: (height, width, classes) float32, NaN without data; if wanted.
        coverage: (height, width) uint32; if wanted.
        truth: (height, width) uint8, IGNORE where unlabelled; if the piece had labels.
        image: (height, width, bands) as read; if asked for.
        wanted: (height, width) bool: pixels with data (and inside the aoi).
        reliability: see `metrics.reliability`; of pieces that had labels.
        seen: counts of `drift.look`, if the bundle says what it was trained on.
        evaluated: pixels that the network ran on.
        memory_mb: peak of this worker and its decoder.
    """

    piece: Piece
    reason: str | None = None
    labels: np.ndarray | None = None
    scores: np.ndarray | None = None
    coverage: np.ndarray | None = None
    truth: np.ndarray | None = None
    image: np.ndarray | None = None
    wanted: np.ndarray | None = None
    reliability: np.ndarray | None = None
    seen: np.ndarray | None = None
    evaluated: int = 0
    memory_mb: float = 0.0


def label_blocks(pieces: Iterable[Piece], job: Inference) -> Iterator[Labelled]:
    """Label blocks one after the other; the next is read while the present one is inferred.

    A scene of which a block can't be read or inferred is refused: one result says why, and its further blocks are left
    out.
    """
    how: dict[str, Any] = {"scaled": job.bundle.values == "scaled", "nodata": job.nodata, "aoi": job.aoi}
    bad: set[str] = set()

    def call(piece: Piece) -> Callable[[], BlockRead] | None:
        return None if piece.scene.scene_id in bad else partial(read_block, piece, job.geometry, **how)

    for piece, block in read_ahead(pieces, call, lambda piece: piece.scene.scene_id):
        if isinstance(block, Refused):
            yield Labelled(piece, block.reason)
        elif block is not None and piece.scene.scene_id not in bad:
            scorer = job.scorer  # a network that can't be loaded is no scene's fault
            try:
                done = label_block(piece, block, job, scorer)
            except Exception as error:
                bad.add(piece.scene.scene_id)
                done = Labelled(piece, refusal(error).reason)
            yield done


@dataclass(frozen=True)
class BlockRead:
    """Pixels of a block with its context.

    Attributes:
        region: where `data` lies.
        data: (height, width, bands), valid: (height, width) bool, both of `region`.
        wanted: (height, width) bool of the block: valid and inside the aoi.
        truth: (height, width) uint8 of the block.
        memory_mb: peak of the process that read it.
    """

    region: Window
    data: np.ndarray
    valid: np.ndarray
    wanted: np.ndarray
    truth: np.ndarray | None
    memory_mb: float


def read_block(
    piece: Piece,
    geometry: Geometry,
    *,
    scaled: bool,
    nodata: float | None = None,
    aoi: tuple[bytes, str] | None = None,
) -> BlockRead:
    """Read a block, its context and its labels, in one visit. Runs in the decoder.

    Raises:
        Refused: if the scene or its labels can't be read.
    """
    scene, block = piece.scene, piece.block
    region = geometry.region(scene.height, scene.width, block)
    inside = shapes.aoi_mask(*aoi, scene, block) if aoi else None
    truth = None
    if piece.truth:
        with about(f"labels {piece.truth.url}"):
            truth, _ = label_module.read(piece.truth, scene, block)
    if inside is not None and not inside.any():
        region = block
        data, valid = np.zeros((*block.shape, 0)), np.zeros(block.shape, bool)
    else:
        data, valid = raster.read(scene, region, nodata=nodata, scaled=scaled, by_band=True)
    wanted = valid[block.slices(region)]
    return BlockRead(region, data, valid, wanted if inside is None else wanted & inside, truth, peak_mb())


def label_block(piece: Piece, read: BlockRead, job: Inference, scorer: Scorer) -> Labelled:
    """Infer, add up and decide one block that has been read. Pure but for the network."""
    block, classes, truth = piece.block, len(job.bundle.classes), read.truth
    reliability = np.zeros((metrics.BINS + 1, 3), np.int64)
    labels = np.full(block.shape, NODATA, np.uint8)
    scores = np.full((*block.shape, classes), np.nan, np.float32) if job.scores else None
    coverage = np.zeros(block.shape, np.uint32) if job.coverage else None
    placements = [
        one
        for one in job.geometry.placements(piece.scene.height, piece.scene.width, block)
        if read.wanted[one.keep.slices(block)].any()
    ]
    evaluated, count = 0, batch_for(job, piece.scene)
    if job.geometry.merge == "crop":
        for place, window in run_windows(placements, read, job, scorer, count):
            part = place.keep.slices(block)
            kept, wanted = window[place.keep.slices(place.read)], read.wanted[part]
            labels[part] = to_labels(kept, wanted, job.class_ids, job.threshold)
            if truth is not None:
                reliability += metrics.reliability(kept, truth[part], labels[part], job.class_ids.tolist())
            if scores is not None:
                scores[part] = np.where(wanted[..., None], kept, np.nan)
        if coverage is not None:
            coverage[:] = read.wanted
    elif placements:
        stitcher = Stitcher(block, classes)
        weights = blend_weights(*placements[0].read.shape)
        for place, window in run_windows(placements, read, job, scorer, count):
            inside = place.keep.slices(place.read)
            stitcher.add(place.keep, window[inside], read.wanted[place.keep.slices(block)], weights[inside])
        # A strip at a time: the normalised map of the whole block would be half as large as the sums again.
        for start in range(0, block.height, 256):
            rows = slice(start, min(start + 256, block.height))
            strip = stitcher.scores(rows)
            labels[rows] = to_labels(strip, read.wanted[rows], job.class_ids, job.threshold)
            if truth is not None:
                reliability += metrics.reliability(strip, truth[rows], labels[rows], job.class_ids.tolist())
            if scores is not None:
                scores[rows] = strip
        if coverage is not None:
            coverage[:] = stitcher.coverage
    if placements:
        evaluated = ceil_to(len(placements), count) * placements[0].read.area * job.passes
    image = read.data[block.slices(read.region)] if job.image else None
    return Labelled(
        piece, labels=labels, scores=scores, coverage=coverage, truth=truth, image=image, wanted=read.wanted,
        reliability=reliability, seen=see(read, block, job), evaluated=evaluated,
        memory_mb=peak_mb() + read.memory_mb,
    )  # fmt: skip


def see(read: BlockRead, window: Window, job: Inference) -> np.ndarray | None:
    """What `drift.look` counts of a window that was read (`read.wanted` is of it)."""
    known = job.bundle.known
    if known is None or not read.wanted.any():
        return None
    return drift.look(read.data[window.slices(read.region)], read.wanted, known, job.rescale)


def batch_for(job: Inference, scene: Scene) -> int:
    """Windows of one evaluation on this scene; follows from the scene, not from how it is cut into blocks."""
    return min(job.batch, max(job.geometry.count(scene.height, scene.width, max(scene.height, scene.width)), 1))


@lru_cache(maxsize=1)  # filled again with each block: fresh memory takes longer to get than to fill
def _batch(count: int, bands: int, height: int, width: int) -> np.ndarray:
    """(count, height, width, bands) float32; a plane for each band, as it was read, and as OpenVINO takes it."""
    return np.moveaxis(np.empty((count, bands, height, width), np.float32), 1, -1)


def run_windows(
    placements: Sequence[Placement], read: BlockRead, job: Inference, scorer: Scorer, count: int
) -> Iterator[tuple[Placement, np.ndarray]]:
    """The network's scores, (height, width, classes) float32, of each placement, in order.

    Pixels that are not valid, or lie beyond the scene, are `fill` for the network.

    Args:
        count: windows of one evaluation; the last ones are padded to as many.
    """
    if not placements:
        return
    shape = placements[0].read.shape
    fill = np.asarray(job.fill, np.float32)
    batch = _batch(count, len(job.bundle.bands), *shape)
    for first in range(0, len(placements), count):
        group = placements[first : first + count]
        for index in range(count):
            if index >= len(group):
                batch[index] = fill
                continue
            part = group[index].read.slices(read.region)
            job.present(read.data[part], read.valid[part], batch[index])
        scores = scorer(batch)
        yield from zip(group, scores, strict=False)
