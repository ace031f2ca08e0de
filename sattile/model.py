"""The model bundle: a Keras network and what must be known to run it over scenes. Exports it by TensorFlow.

    MODEL/README.md       what it is, for people: see `sattile.card`
    MODEL/item.json       the same for catalogues: a STAC item
    MODEL/bundle.json     bands, classes, window geometry, metrics, digests: all that planning needs, no TensorFlow
    MODEL/model.keras     the network: stored band values in, scores per class out
    MODEL/saved_model/    the same for TF Serving (`serving_default`)
    MODEL/openvino/       the same for OpenVINO, where that was installed

The window geometry is measured from the network's graph, whoever built it: `sattile.receptive`.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sattile import card, foreign, scorers, storage
from sattile.drift import Known
from sattile.errors import SattileError, UsageError, first_line
from sattile.foreign import load_keras
from sattile.fusion import fuse
from sattile.receptive import measure
from sattile.schema import SegmentClass, describe_classes, read_classes
from sattile.scorers import Scorer
from sattile.versions import BUNDLE, is_made, opened, resolve

if TYPE_CHECKING:
    import keras

log = logging.getLogger("sattile")

FORMAT = "sattile-bundle/1"
KERAS, SAVED_MODEL, OPENVINO = "model.keras", "saved_model", "openvino"
XML, BIN = "model.xml", "model.bin"
ENGINES = ("auto", "tensorflow", "openvino", scorers.GPU)
AGREEMENT = 0.999
"""Share of pixels that have to get the label that TensorFlow gives them, before OpenVINO is taken unasked."""

VALUES = ("raw", "scaled")


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says.

    Attributes:
        url: the bundle's folder; a version's own where the latest of a model was asked for.
        bands: names, in the order of the network's channels.
        classes: in the order of the scores.
        values: `raw` (stored numbers) or `scaled` (stored * scale + offset) is what the network takes.
        fill: per band, what invalid pixels are set to (the training mean).
        total_stride, receptive_radius, input_shape, activation_bytes: see `receptive.Measured`.
        gsd: pixel size of the training scenes in metres, None if unknown.
        output: `scores`, one channel per class, or `second`: one channel, the probability of the second of two.
        digest: sha256 of `model.keras`.
        dataset_digest: of the tiles it was trained on, None for a network from elsewhere.
        metrics: of the validation split, as in `metrics.json`; empty for a network from elsewhere.
        network: its `arch`, number of `parameters`, and how it was trained; `unbounded`: the layers for which its
            radius has no bound; `activation`: what `bundle` was asked for, see there.
        versions: of the packages that made it.
        openvino: of its files for OpenVINO: `digest`, and, where it was compared with TensorFlow on tiles, by precision
            the `agreement` (share of pixels with the same label), that of bfloat16 by itself, too; `pixels` and
            `version`; empty without them.
        members: the bundles whose scores are averaged, if it stands for several.
        data: of the tiles it was trained on, see `card.training_data`; empty for a network from elsewhere, and in
            bundles of before.
    """

    url: str
    bands: tuple[str, ...]
    classes: tuple[SegmentClass, ...]
    values: str
    fill: tuple[float, ...]
    total_stride: int
    receptive_radius: int | None
    input_shape: tuple[int, int] | None
    activation_bytes: float
    gsd: float | None
    output: str
    digest: str
    dataset_digest: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    openvino: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    members: tuple[Bundle, ...] = ()

    @property
    def notes(self) -> list[str]:
        """What is to be told wherever it is used."""
        return list(dict.fromkeys(note for one in self.members or (self,) for note in _notes(one)))

    @property
    def known(self) -> Known | None:
        """What values it was trained on; None for a network from elsewhere, and bundles of before."""
        return Known.of(self.bands, self.data.get("statistics") or {})

    @property
    def identity(self) -> str:
        """Digest of all of it that shapes a map, as settings name it."""
        return storage.digest(
            {
                "digest": self.digest, "bands": list(self.bands), "values": self.values, "output": self.output,
                "classes": describe_classes(self.classes), "gsd": self.gsd,
            }
        )  # fmt: skip

    def agreement(self, precision: str) -> float:
        """The share of pixels of real tiles that OpenVINO gave TensorFlow's label, in this precision.

        Bundles of before were compared in bfloat16 alone. float32 rounds 65,536 times as finely: it agrees no less.
        """
        found: float = self.openvino.get(precision, self.openvino).get("agreement", 0.0)
        return found


def _notes(bundle: Bundle) -> list[str]:
    told = []
    if bundle.receptive_radius is None:
        through = ", ".join(bundle.network.get("unbounded") or ())
        told.append(
            f"the network's scores depend on the whole window{f' ({through})' if through else ''}: seams are possible "
            f"where windows meet, though they overlap and are blended"
        )
    if bundle.network.get("activation") == "none":
        told.append("the network's scores are taken as they are (--activation none), and need not be probabilities")
    return told


def split_models(model: str | Sequence[str]) -> list[str]:
    """URLs of models out of 'a,b,c'; a folder may have a comma in its name."""
    urls = [model] if isinstance(model, str) else list(model)
    if len(urls) == 1 and "," in urls[0] and not storage.exists(urls[0]):
        return [one.strip() for one in urls[0].split(",") if one.strip()]
    return urls


def load_models(model: str | Sequence[str]) -> Bundle:
    """The bundle of a model, or one that stands for several, whose scores are averaged.

    Args:
        model: URL of a bundle, or several, 'a,b,c'.

    Raises:
        UsageError: see `load_bundle`; and where bands, values or classes of the models differ.
    """
    bundles = tuple(load_bundle(url) for url in split_models(model))
    if len(bundles) == 1:
        return bundles[0]
    return _join(bundles)


def _join(bundles: tuple[Bundle, ...]) -> Bundle:
    first = bundles[0]
    for one in bundles[1:]:
        for name in ("bands", "values", "classes", "input_shape", "gsd"):
            mine, other = getattr(first, name), getattr(one, name)
            if mine != other:
                raise UsageError(
                    f"models that are averaged must agree: {name} of {first.url} are {_words(mine)}, of {one.url} "
                    f"{_words(other)}"
                )
    radii = [one.receptive_radius for one in bundles if one.receptive_radius is not None]
    return replace(
        first,
        url=",".join(one.url for one in bundles),
        total_stride=math.lcm(*(one.total_stride for one in bundles)),
        receptive_radius=max(radii) if len(radii) == len(bundles) else None,
        activation_bytes=sum(one.activation_bytes for one in bundles),
        output="scores",
        digest=storage.digest([one.digest for one in bundles]),
        dataset_digest=None,
        metrics={},
        network={"models": [storage.name(one.url) for one in bundles]},
        openvino=_least_agreement(bundles),
        members=bundles,
        data=next((one.data for one in bundles if one.known), {}),
    )


def _least_agreement(bundles: Sequence[Bundle]) -> dict[str, Any]:
    """What holds for all of several bundles."""
    if not all(one.openvino for one in bundles):
        return {}
    found: dict[str, Any] = {"agreement": min(one.openvino.get("agreement", 0) for one in bundles)}
    for name in scorers.PRECISIONS:
        if all(name in one.openvino for one in bundles):
            found[name] = {"agreement": min(one.openvino[name]["agreement"] for one in bundles)}
    return found


def _words(value: Any) -> str:
    return ", ".join(str(getattr(one, "name", one)) for one in value) if isinstance(value, tuple) else str(value)


def load_bundle(url: str) -> Bundle:
    """Read `bundle.json`; TensorFlow is not needed.

    Args:
        url: of a bundle, or of a folder of versions: then the latest.

    Raises:
        UsageError: if the folder is missing, is no bundle, or was written by a newer sattile.
    """
    url = resolve(storage.absolute(url))  # executors have other working folders
    described = storage.join(url, BUNDLE)
    if not storage.exists(described):
        if not storage.exists(url):
            raise UsageError(f"model {url} does not exist; `sattile train` or `sattile bundle` makes one")
        raise UsageError(
            f"model {url} is no bundle (it has no {BUNDLE}): name the folder that `sattile train --out` or `sattile "
            f"bundle --out` wrote; a .keras or .h5 file becomes one with `sattile bundle --keras`"
        )
    found = storage.read_json(described)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        said = found.get("format") if isinstance(found, dict) else None
        raise UsageError(
            f"model {url} is of format {said!r} and this sattile reads {FORMAT!r}; was it made by a newer one?"
        )
    try:
        shape = found["input_shape"]
        return Bundle(
            url=url,
            bands=tuple(found["bands"]),
            classes=read_classes(found["classes"]),
            values=found["values"],
            fill=tuple(float(value) for value in found["fill"]),
            total_stride=found["total_stride"],
            receptive_radius=found["receptive_radius"],
            input_shape=(shape[0], shape[1]) if shape else None,
            activation_bytes=found["activation_bytes"],
            gsd=found["gsd"],
            output=found["output"],
            digest=found["digest"],
            dataset_digest=found.get("dataset_digest"),
            metrics=found.get("metrics") or {},
            network=found.get("network") or {},
            versions=found.get("versions") or {},
            openvino=found.get("openvino") or {},
            data=found.get("data") or {},
        )
    except (KeyError, TypeError, IndexError) as error:
        raise UsageError(f"model {url}: {BUNDLE} is damaged ({error!r}); make the bundle again") from error


def save_bundle(
    url: str,
    network: keras.Model,
    *,
    bands: Sequence[str],
    classes: Sequence[SegmentClass],
    fill: Sequence[float],
    values: str = "raw",
    gsd: float | None = None,
    dataset_digest: str | None = None,
    dataset: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    keras_file: str | None = None,
    tiles: tuple[np.ndarray, np.ndarray] | None = None,
) -> Bundle:
    """Measure a network and write its bundle; `bundle.json` comes last, and goes first when one is replaced.

    Where OpenVINO is installed, the network is written for it, too, and compared on the tiles.

    Args:
        url: folder.
        network: stored (or scaled) values (N, H, W, bands) in, (N, H, W, classes) or (N, H, W, 1) out.
        dataset: description of the tiles that it was trained on.
        keras_file: local file that the network was loaded from, kept byte for byte; saved anew if not given.
        about: for `network` of the bundle, beside the number of parameters.
        tiles: images (N, H, W, bands) as the network takes them, and (N, H, W) bool: the pixels that count.

    Raises:
        UsageError: if the network does not fit bands and classes, or changes height or width.
    """
    from sattile.record import versions

    output = _check_signature(network, bands, classes)
    fused = fuse(network)
    measured = measure(fused)
    with storage.scratch() as scratch:
        file = os.path.join(scratch, KERAS)
        if keras_file:
            file = keras_file
        else:
            network.save(file)
            _without_chance(file)
        digest = storage.sha256_file(file)
        _export(fused, os.path.join(scratch, SAVED_MODEL))
        fast = _for_openvino(network, scratch, output, tiles) if scorers.has_openvino() else {}
        storage.remove(storage.join(url, BUNDLE))
        for part in (SAVED_MODEL, OPENVINO):
            storage.remove(storage.join(url, part))
            storage.upload_folder(os.path.join(scratch, part), storage.join(url, part))
        if keras_file:
            with open(keras_file, "rb") as source:
                storage.write_bytes(storage.join(url, KERAS), source.read())
        else:
            storage.upload(file, storage.join(url, KERAS))
    described = {
        "format": FORMAT,
        "bands": list(bands),
        "classes": describe_classes(classes),
        "values": values,
        "fill": [float(value) for value in fill],
        "total_stride": measured.total_stride,
        "receptive_radius": measured.receptive_radius,
        "input_shape": measured.input_shape,
        "activation_bytes": measured.activation_bytes,
        "gsd": gsd,
        "output": output,
        "digest": digest,
        "dataset_digest": dataset_digest,
        "metrics": dict(metrics or {}),
        "network": {
            "parameters": int(network.count_params()),
            **(about or {}),
            **({"unbounded": list(measured.unbounded)} if measured.unbounded else {}),
        },
        "versions": versions(),
        "openvino": fast,
        "data": card.training_data(dataset) if dataset else {},
    }
    storage.write_text(storage.join(url, card.CARD), card.model_card(described))
    storage.write_json(storage.join(url, card.ITEM), card.model_item(described))
    storage.write_json(storage.join(url, BUNDLE), described)
    return load_bundle(url)


def _for_openvino(
    network: Any, scratch: str, output: str, tiles: tuple[np.ndarray, np.ndarray] | None
) -> dict[str, Any]:
    """Write a network for OpenVINO beside its SavedModel; what `bundle.json` says of it, {} if it can't be."""
    folder = os.path.join(scratch, OPENVINO)
    os.makedirs(folder)
    xml, second = os.path.join(folder, XML), output == "second"
    try:
        scorers.convert(os.path.join(scratch, SAVED_MODEL), xml)
        found: dict[str, Any] = {"digest": _digest_of_openvino(folder)}
        if tiles is not None and len(tiles[0]):
            exact = scorers.by_tensorflow(network, second=second)
            for precision in scorers.PRECISIONS:
                fast = scorers.by_openvino(xml, threads=1, second=second, precision=precision)
                same, pixels = scorers.agreement(exact, fast, *tiles)
                found[precision] = {"agreement": round(same, 6)}
                log.info(
                    "model: OpenVINO in %s gives %.3f %% of %d pixels the label of TensorFlow", precision, 100 * same,
                    pixels,
                )  # fmt: skip
            # As bundles of before say it: of bfloat16.
            found |= {
                "agreement": found["bfloat16"]["agreement"], "pixels": pixels, "version": scorers.openvino_version(),
                "precision": scorers.PRECISIONS["bfloat16"],
            }  # fmt: skip
    except Exception as error:  # whatever its converter says of an operation that it does not know
        reason = first_line(error)
        log.warning("model: it can't be written for OpenVINO, and will run by TensorFlow alone: %s", reason[:300])
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        return {}
    return found


def _digest_of_openvino(folder: str) -> str:
    return storage.digest([storage.sha256_file(os.path.join(folder, name)) for name in (XML, BIN)])


def _without_chance(path: str) -> None:
    """Take time and place of writing out of a .keras file: the same network is the same file, and the same digest."""
    with zipfile.ZipFile(path) as source:
        members = {name: source.read(name) for name in sorted(source.namelist())}
    about = json.loads(members["metadata.json"])
    members["metadata.json"] = json.dumps(about | {"date_saved": "1980-01-01@00:00:00"}).encode()
    numbers: dict[str, int] = {}  # Keras tells objects that layers share by their addresses in memory
    members["config.json"] = re.sub(
        r'("shared_object_id": )(\d+)',
        lambda match: match.group(1) + str(numbers.setdefault(match.group(2), len(numbers) + 1)),
        members["config.json"].decode(),
    ).encode()
    with zipfile.ZipFile(path, "w") as target:
        for name, content in members.items():
            target.writestr(zipfile.ZipInfo(name), content)


def _export(network: Any, folder: str) -> None:
    """Write a SavedModel that takes inputs of every size that the network takes."""
    import keras
    import tensorflow as tf

    class ResizingUpSampling2D(keras.layers.UpSampling2D):
        """The same values in one operation of TensorFlow, with a size that is not yet known.

        Keras 3.15 compares a smooth one's size with 0 in Python, which such a size does not allow. The nearest one it
        makes of six operations that move all values three times, in OpenVINO an eighth of a U-Net's time.
        """

        def call(self, inputs: Any) -> Any:
            size = tf.shape(inputs)[1:3] * tf.constant(self.size)
            return tf.image.resize(inputs, size, method=self.interpolation)

    def resizes(layer: Any) -> bool:
        return isinstance(layer, keras.layers.UpSampling2D) and layer.data_format == "channels_last"

    def replace(layer: Any) -> Any:
        return (ResizingUpSampling2D if resizes(layer) else type(layer)).from_config(layer.get_config())

    try:
        if any(resizes(layer) for layer in network._flatten_layers()):
            same = keras.models.clone_model(network, clone_function=replace, recursive=True)
            same.set_weights(network.get_weights())
            network = same
        network.export(folder, verbose=False)
    except Exception as error:  # Keras raises whatever its layers raise
        reason = first_line(error)
        raise UsageError(f"the model can't be written as a SavedModel: {reason[:400]}") from error


def bundle(
    keras: str,
    *,
    bands: str,
    classes: str,
    out: str,
    values: str = "raw",
    fill: str | None = None,
    gsd: float | None = None,
    activation: str | None = None,
    output: str | None = None,
    versions: bool = False,
    overwrite: bool = False,
) -> str:
    """Make a bundle of a Keras model trained elsewhere.

    The model takes band values, (N, H, W, bands), and gives scores of the same height and width: a channel per class,
    probabilities that a softmax (or a sigmoid each) makes, or one channel with two classes, the probability of the
    second, that a sigmoid makes. One that gives logits is refused unless `activation` says what to add. It is loaded in
    Keras's safe mode: one that needs code of its own (Lambda layers, custom classes) is refused.

    Args:
        keras: the file: `.keras`, of Keras 3 or Keras 2, or `.h5`.
        bands: names of the bands in the order of the model's channels, such as 'B02,B03,B04,B08'.
        classes: names in the order of the scores, 'land,water' (ids 0, 1), or with ids, 'land=1,water=7'.
        out: folder for the bundle.
        values: 'raw' if the model takes stored numbers, 'scaled' if stored * scale + offset (reflectance).
        fill: what the model sees for missing pixels: one number, or one a band, '0,0,0,0'; 0 if not given.
        gsd: pixel size in metres that the model was trained for; scenes far from it are refused then.
        activation: for a model that was trained on logits: `sigmoid` or `softmax` is added to the network in the
            bundle; `none` takes its scores as they are, though they are no probabilities.
        output: name of the output that holds the scores, of a model that has several, or gives a dict.
        versions: make a version of the model below out, v1, v2, ..., and let latest.json name it once it is whole; one
            that was made of the same file with the same settings is left as it is.
        overwrite: replace a bundle made with other settings.

    Returns:
        URL of the bundle: `out`, or the version's folder.

    Raises:
        UsageError: if the file can't be loaded safely, or does not fit `bands` and `classes`.
    """
    from sattile.legend import parse_classes

    names = [one.strip() for one in (bands.split(",") if isinstance(bands, str) else bands) if one.strip()]
    if not names or len(set(names)) < len(names):
        raise UsageError(f"bands {bands!r}: give the names of the model's bands in order, each once")
    named = parse_classes(classes, by_id=False)  # the order of the scores
    if not named or len(named) < 2:
        raise UsageError(f"classes {classes!r}: name at least two, in the order of the model's scores, as 'land,water'")
    if values not in VALUES:
        raise UsageError(f"values {values!r}: use raw or scaled")
    filled = _parse_fill(fill, names)
    if not storage.exists(keras):
        raise UsageError(f"--keras {keras} does not exist")
    if (entry := storage.stat(keras)) and entry.is_folder:
        raise UsageError(f"--keras {keras} is a folder (a SavedModel?); name a file that model.save('net.keras') wrote")
    local = storage.open_local(keras)
    out = storage.absolute(out)
    source = storage.sha256_file(local)
    settings = {
        "keras": source, "bands": names, "classes": describe_classes(named), "values": values, "fill": filled,
        "gsd": gsd,
    }  # fmt: skip
    settings |= {name: one for name, one in (("activation", activation), ("output", output)) if one is not None}
    if activation is not None and activation not in foreign.ACTIVATIONS:
        raise UsageError(f"activation {activation!r}: use {', '.join(foreign.ACTIVATIONS)}")
    with opened("bundle", out, settings, overwrite, versions) as run:
        out = run.out
        run.inputs = [{"url": keras, "sha256": source}]
        run.given = 1
        notes: list[str] = (run.previous or {}).get("notes") or []
        if is_made(run, versions):
            run.skipped = 1
        else:
            with run.stage("bundle"):
                loaded, kept = load_keras(local), foreign.is_of_today(local)
                if not kept:
                    log.info("bundle: %s is written anew, as Keras 3 does: model.keras in the bundle", keras)
                chosen = foreign.choose_output(loaded, output)
                _check_signature(chosen, names, named)
                foreign.run_once(chosen)
                network, told = foreign.settle(chosen, activation, [one.name for one in named])
                about = {"arch": network.name, "source": storage.name(keras)}
                made = save_bundle(
                    out, network, bands=names, classes=named, fill=filled, values=values, gsd=gsd,
                    about=about | ({"activation": activation} if activation else {}),
                    keras_file=local if kept and network is loaded else None,
                )  # fmt: skip
            notes = [*foreign.remarks(network), *told, *made.notes]
            run.done = 1
        for note in notes:
            log.warning("bundle: %s", note)
        if notes:
            run.extra["notes"] = notes
        run.finish()
    return out


def _parse_fill(fill: str | float | Sequence[float] | None, bands: Sequence[str]) -> list[float]:
    try:
        parts = fill.split(",") if isinstance(fill, str) else fill if isinstance(fill, Sequence) else [fill or 0]
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    numbers = numbers * len(bands) if len(numbers) == 1 else numbers
    if len(numbers) != len(bands) or not all(map(math.isfinite, numbers)):
        raise UsageError(f"fill {fill!r}: give one finite number, or {len(bands)}, one for each of {', '.join(bands)}")
    return numbers


def _check_signature(network: Any, bands: Sequence[str], classes: Sequence[SegmentClass]) -> str:
    """The bundle's `output`, once it is sure that the network fits; UsageError with the numbers if not."""
    try:
        taken, given, dtypes = network.input_shape, network.output_shape, {one.dtype for one in network.inputs}
    except AttributeError:
        raise UsageError("the model has no input shape yet: call or build it once before it is saved") from None
    if len(network.inputs) > 1:
        called = ", ".join(one.name for one in network.inputs)
        raise UsageError(
            f"the model takes {len(network.inputs)} inputs ({called}); one tensor (batch, "
            f"height, width, bands) is needed: begin it with one keras.Input and give its parts their bands, x[..., :3]"
        )
    for what, shape in (("input", taken), ("output", given)):
        if not isinstance(shape, tuple) or len(shape) != 4:
            flat = what == "output" and isinstance(shape, tuple) and len(shape) == 3
            hint = "; end it with a score a class and pixel: no argmax, no flattening of rows and columns" * flat
            raise UsageError(
                f"the model's {what} is {shape}; one tensor (batch, height, width, channels) is needed, channels "
                f"last{hint}"
            )
    if taken[3] != len(bands):
        planes = (
            "; is it channels first? sattile gives it (batch, height, width, bands): build it channels last, or with "
            "keras.layers.Permute((3, 1, 2)) in front and Permute((2, 3, 1)) behind" * (taken[1] == len(bands))
        )
        raise UsageError(
            f"the model takes {taken[3] or 'any number of'} bands and {len(bands)} are named ({', '.join(bands)}); "
            f"name those that it was trained on, in its order{planes}"
        )
    if strange := [one for one in dtypes if "float" not in one]:
        raise UsageError(
            f"the model takes {strange[0]}, in which larger numbers begin again at 0; give it an input of float32: "
            f"keras.Input(shape, dtype='float32')"
        )
    if "float" not in (dtype := network.outputs[0].dtype):
        raise UsageError(
            f"the model gives {dtype}, classes instead of scores; end it where the scores are, before the argmax or "
            f"the comparison with a threshold"
        )
    if None not in taken[1:3] and taken[1] != taken[2]:
        raise UsageError(f"the model takes inputs of {taken[1]} x {taken[2]} only; windows are square")
    if given[3] == 1 and len(classes) == 2:
        output = "second"
    elif given[3] == len(classes):
        output = "scores"
    else:
        names = ", ".join(one.name for one in classes)
        raise UsageError(
            f"the model gives {given[3]} score(s) per pixel and {len(classes)} classes are named ({names}); name one "
            f"per score (one score may stand for two classes: it is the probability of the second)"
        )
    return output


_loaded: dict[tuple[str, str, int, str], Scorer] = {}


def choose_engine(bundle: Bundle, engine: str = "auto", *, gpu: bool = False) -> str:
    """`tensorflow`, `openvino` or `tensorflow-gpu`: what can be had.

    `auto` takes the GPUs where Spark gives them to tasks; else OpenVINO where it is installed, has the bundle's
    network, and gave at least `AGREEMENT` of the pixels of real tiles the label that TensorFlow gives them, in one of
    its precisions. Which of the two is faster is for `processors` to find out.

    Args:
        gpu: Spark gives its tasks GPUs.

    Raises:
        UsageError: for OpenVINO where it or the bundle's part for it is missing.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine {engine!r}: use {', '.join(ENGINES)}")
    if engine == "openvino":
        if not scorers.has_openvino():
            raise UsageError(scorers.NO_OPENVINO)
        if not bundle.openvino or not _has_openvino_files(bundle):
            raise UsageError(
                f"engine openvino: model {bundle.url} was made where OpenVINO was not installed, could not be written "
                f"for it, or has lost its folder {OPENVINO}: make the bundle again, or use --engine tensorflow"
            )
    if engine != "auto":
        return engine
    if gpu:
        return scorers.GPU
    agrees = max(bundle.agreement(one) for one in scorers.PRECISIONS) >= AGREEMENT
    return "openvino" if scorers.has_openvino() and agrees and _has_openvino_files(bundle) else "tensorflow"


def _has_openvino_files(bundle: Bundle) -> bool:
    return all(storage.exists(storage.join(one.url, OPENVINO, XML)) for one in bundle.members or (bundle,))


def load_scorer(
    bundle: Bundle, *, engine: str = "auto", threads: int = 1, tta: str = "none", precision: str = "bfloat16"
) -> Scorer:
    """The function that gives scores; one per process and bundle.

    Args:
        bundle: as `load_bundle` or `load_models` gives it.
        engine: see `choose_engine`.
        threads: that an evaluation may use.
        tta: the turns that scores are averaged over: a name of `scorers.TURNS`.
        precision: of OpenVINO's arithmetic: a name of `scorers.PRECISIONS`.

    Raises:
        UsageError: see `choose_engine`.
        SattileError: if the bundle's network is not the one that it describes, or TensorFlow already runs in this
            process with other threads.
    """
    members = bundle.members or (bundle,)
    if not all((one.digest, engine, threads, precision) in _loaded for one in members):  # asked for with each block
        engine = choose_engine(bundle, engine)
    return scorers.turned(scorers.averaged([_load_one(one, engine, threads, precision) for one in members]), tta)


def _load_one(bundle: Bundle, engine: str, threads: int, precision: str) -> Scorer:
    key = (bundle.digest, engine, threads, precision)
    if key not in _loaded:
        second = bundle.output == "second"
        if engine == "openvino":
            with storage.beside(storage.join(bundle.url, OPENVINO, XML)) as xml:
                folder = os.path.dirname(xml)
                _check_digest(folder, _digest_of_openvino(folder), bundle.openvino["digest"])
                _loaded[key] = scorers.by_openvino(xml, threads=threads, second=second, precision=precision)
        else:
            scorers.use_threads(threads)
            path = storage.open_local(storage.join(bundle.url, KERAS))
            _check_digest(path, storage.sha256_file(path), bundle.digest)
            device = scorers.use_gpu() if engine == scorers.GPU else scorers.CPU
            with scorers.placed_on(device):
                network = load_keras(path)
                _loaded[key] = scorers.by_tensorflow(fuse(network), second=second, device=device)
    return _loaded[key]


def _check_digest(path: str, found: str, said: str) -> None:
    if found != said:
        raise SattileError(
            f"{path} has sha256 {found[:16]}..., and {BUNDLE} says {said[:16]}...: the bundle was changed while it was "
            f"in use, or by hand"
        )
