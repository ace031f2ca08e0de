"""Weights from an earlier network, also where bands or classes differ: what both know is kept, the rest starts anew.

Before training, the new network says of the known bands what the earlier one said: it keeps that one's normalisation
of them, and the weights of bands that are new begin at zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sattile import spectrum, storage
from sattile.errors import UsageError
from sattile.training.networks import CLIP, FIRST, LOGITS, NORMALISE

log = logging.getLogger("sattile")


@dataclass(frozen=True)
class Source:
    """An earlier network.

    Attributes:
        url: where it came from.
        network: it.
        bands, indices: names of what it takes, as the new network calls them.
        classes: names in the order of its scores.
    """

    url: str
    network: Any
    bands: tuple[str, ...]
    indices: tuple[str, ...]
    classes: tuple[str, ...]


def is_file(url: str) -> bool:
    """Whether this names a Keras file, and no bundle."""
    return url.endswith(".keras")


def load(url: str, *, bands: Sequence[str], indices: Sequence[str], classes: Sequence[str]) -> Source:
    """Read a bundle, or a `.keras` file, whose bands, indices and classes are taken to be those given.

    Raises:
        UsageError: if it is neither, can't be loaded safely, or is a file whose bands or classes are others: it does
            not name them, as a bundle does.
    """
    from sattile.model import KERAS, load_bundle, load_keras

    if is_file(url):
        if not storage.exists(url):
            raise UsageError(f"--start-from {url} does not exist")
        source = Source(url, load_keras(storage.open_local(url)), tuple(bands), tuple(indices), tuple(classes))
        first = next((one.output.shape[-1] for one in source.network.layers if one.name == FIRST), None)
        found = (source.network.input_shape[-1], source.network.output_shape[-1], first or len(bands) + len(indices))
        if found != (len(bands), len(classes), len(bands) + len(indices)):
            raise UsageError(
                f"--start-from {url}: the file takes {found[0]} bands, gives {found[1]} scores and does not name them; "
                f"here are {len(bands)} bands, {len(indices)} indices and {len(classes)} classes. Make a bundle of it "
                f"(sattile bundle --keras {storage.name(url)} --bands ... --classes ...) and start from that"
            )
        return source
    bundle = load_bundle(url)
    network = load_keras(storage.open_local(storage.join(bundle.url, KERAS)))
    called = spectrum.known(bundle.bands, bands)
    if len(called) < len(bands):
        new = [name for name in bands if name not in called.values()]
        log.log(
            logging.INFO if called else logging.WARNING,
            "train: %s, whose bands are %s, knows %s of the bands here; weights of %s begin anew",
            url, ", ".join(bundle.bands), "some" if called else "none", ", ".join(new),
        )  # fmt: skip
    known = tuple(
        "~".join(called.get(end, end) for end in name.split("~")) for name in bundle.network.get("indices") or ()
    )
    names = tuple(called.get(band, band) for band in bundle.bands)
    return Source(url, network, names, known, tuple(one.name for one in bundle.classes))


def digest(url: str) -> str:
    """Of the weights behind a URL: another file there is another training."""
    from sattile.model import load_bundle

    if is_file(url):
        return storage.sha256_file(storage.open_local(url))
    return load_bundle(url).digest


def arch(url: str) -> str | None:
    """The name under which a bundle's network was built; None if it is not known: it was made of a Keras file."""
    from sattile.model import load_bundle

    network = {} if is_file(url) else load_bundle(url).network
    return None if "source" in network else network.get("arch")


def statistics(
    source: Source, bands: Sequence[str], found: Mapping[str, Mapping[str, Any]]
) -> dict[str, Mapping[str, Any]]:
    """Those of the dataset, but of bands that the earlier network knew those by which it normalises."""
    layer = next((one for one in source.network.layers if one.name == NORMALISE), None)
    if layer is None:
        return dict(found)
    mean, variance = (np.asarray(one).reshape(-1) for one in (layer.mean, layer.variance))
    kept = {
        band: {"mean": float(mean[place]), "std": math.sqrt(float(variance[place])) / CLIP}
        for place, band in enumerate(source.bands)
    }
    return {band: kept.get(band, found[band]) for band in bands}


def start(
    network: Any, source: Source, *, bands: Sequence[str], indices: Sequence[str], classes: Sequence[str]
) -> None:
    """Put the earlier network's weights into a new one of the same architecture.

    Raises:
        UsageError: if it is of another architecture.
    """
    own, theirs_all = _layers(network), _layers(source.network)
    earlier = {layer.name: layer for layer in theirs_all}
    if FIRST not in {layer.name for layer in network.layers} and len(own) == len(theirs_all):
        # A builder's layers are numbered by Keras, from where it is in the process: their order is what stays.
        earlier = {layer.name: other for layer, other in zip(own, theirs_all, strict=True)}
    inputs = _places((*source.bands, *source.indices), (*bands, *indices))
    scores = _places(source.classes, classes)
    first = _first_layers(network)
    for layer in own:
        if layer.name not in earlier:
            raise UsageError(
                f"--start-from {source.url}: its network ({source.network.name}) has no layer {layer.name}, which "
                f"{network.name} has: give the --arch that it was trained with, if it is one of ours or a builder"
            )
        theirs, weights = earlier[layer.name].get_weights(), layer.get_weights()
        if layer.name in first:
            # New channels of a depthwise layer keep their first weights: behind it, theirs are zero already.
            blank = weights[0] if "Depthwise" in type(layer).__name__ else np.zeros_like(weights[0])
            theirs[0] = _moved(theirs[0], blank, inputs, axis=2)
        if layer.name == LOGITS:
            theirs = [_moved(old, new, scores, axis=-1) for old, new in zip(theirs, weights, strict=True)]
        shapes = [tuple(one.shape for one in group) for group in (theirs, weights)]
        if shapes[0] != shapes[1]:
            raise UsageError(
                f"--start-from {source.url}: its layer {layer.name} has weights of {shapes[0]}, and {network.name}'s "
                f"are of {shapes[1]}: give the --arch and --indices that it was trained with"
            )
        layer.set_weights(theirs)


def _layers(network: Any) -> list[Any]:
    """Those with weights of their own."""
    return [one for one in network._flatten_layers() if one.weights and not hasattr(one, "layers")]


def _places(earlier: Sequence[str], names: Sequence[str]) -> list[tuple[int, int]]:
    """(earlier place, new place) of what both know."""
    return [(earlier.index(name), place) for place, name in enumerate(names) if name in earlier]


def _moved(old: np.ndarray, blank: np.ndarray, places: Sequence[tuple[int, int]], axis: int) -> np.ndarray:
    """`blank`, with what both know at its new place along an axis."""
    moved = np.moveaxis(blank.copy(), axis, 0)
    known = np.moveaxis(old, axis, 0)
    if known.shape[1:] == moved.shape[1:]:
        for before, after in places:
            moved[after] = known[before]
    return np.moveaxis(moved, 0, axis)


def _first_layers(network: Any) -> set[str]:
    """Layers with weights that see the inputs by name: those behind `FIRST`, and behind a depthwise one there."""
    found: set[str] = set()
    todo = [layer for layer in network.layers if layer.name == FIRST]
    while todo:
        for node in todo.pop()._outbound_nodes:
            layer = node.operation
            if getattr(layer, "weights", None):
                found.add(layer.name)
            if "Depthwise" in type(layer).__name__ or type(layer).__name__ == "Cast":  # to 16 bits: no layer
                todo.append(layer)
    return found
