"""What a bundle says of itself: a model card for people, a STAC item for catalogues.

Both follow from `bundle.json` alone and say nothing of when they were written: the same bundle has the same bytes.
The card's front matter is that of Hugging Face (https://huggingface.co/docs/hub/model-cards), the item is one of STAC's
MLM extension (https://github.com/stac-extensions/mlm). What is not known is said to be unknown, or left out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sattile import drift, stac, storage
from sattile.schema import SegmentClass, read_classes
from sattile.split import SPLITS

CARD, ITEM = "README.md", "item.json"

EXTENSIONS = [f"{stac.EXTENSION}/mlm/v1.5.2/schema.json", f"{stac.EXTENSION}/file/v2.1.0/schema.json"]

RARE = 0.01
"""Share of the labelled training pixels below which a class is said to be rare."""

OWN = ("parameters", "best_epoch", "arch", "source", "activation", "unbounded")
"""What the bundle says of a network beside the settings that it was trained with."""


def training_data(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a bundle keeps of the `dataset.json` that it was trained on: `data` in `bundle.json`."""
    kept = {name: description.get(name) for name in ("size", "stride", "dtype", "footprint", "interval")}
    counts = ("tiles", "scenes", "class_pixels")
    splits = {
        name: {one: part.get(one) for one in counts} for name, part in description["splits"].items() if part["tiles"]
    }
    statistics = {
        band: {"percentiles": {at: one for at, one in said.get("percentiles", {}).items() if at in drift.PERCENTILES}}
        for band, said in description["statistics"].items()
    }
    return kept | {"statistics": statistics, "sources": len(description.get("sources", [])) or None, "splits": splits}


# --- for people ---------------------------------------------------------------------------------------------------


def model_card(described: Mapping[str, Any], speeds: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """`README.md` of a bundle: Markdown with front matter.

    Args:
        described: what `bundle.json` says.
        speeds: Mpix/s by kind of CPU and engine, as `processors` measured them.
    """
    import yaml

    parts = [
        "---\n" + yaml.safe_dump(_front_matter(described), sort_keys=False, allow_unicode=True) + "---",
        f"# {_name(described)}: {_listed(one.name for one in read_classes(described['classes']))}",
        _purpose(described),
        *_section("Use", _use(described)),
        *_section("What goes in", _input(described)),
        *_section("What comes out", _output(described)),
        *_section("Windows", _windows(described)),
        *_section("Training data", _data(described)),
        *_section("Training", _training(described)),
        *_section("Accuracy", _accuracy(described)),
        *_section("Engines", _engines(described, speeds or {})),
        *_section("Limits", _limits(described)),
        *_section("Made with", [", ".join(f"{name} {one}" for name, one in described["versions"].items())]),
    ]
    return "\n\n".join(parts) + "\n"


def with_speeds(text: str, described: Mapping[str, Any], speeds: Mapping[str, Mapping[str, float]]) -> str:
    """A card that lies there, with its section on engines written anew; the others may be somebody's own."""
    section = "\n\n".join(_section("Engines", _engines(described, speeds)))
    return re.sub(r"(?ms)^## Engines$.*?(?=\n\n## |\Z)", lambda _: section, text, count=1)


def _section(title: str, parts: list[str]) -> list[str]:
    return [f"## {title}", *parts] if parts else []


def _name(described: Mapping[str, Any]) -> str:
    return str(described["network"].get("arch") or "network")


def _listed(names: Iterable[str], most: int = 6) -> str:
    names = [_plain(one) for one in names]
    return ", ".join(names) if len(names) <= most else f"{len(names)} classes"


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' if count != 1 else ''}"


def _plain(text: Any) -> str:
    """Somebody's word in our Markdown: no markup, no cell's end."""
    return re.sub(r"([\\`*_|<>\[\]#])", r"\\\1", " ".join(str(text).split()))


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]], words: int = 1) -> str:
    """The first columns hold words, the others numbers, which stand to the right."""
    lines = [head, ["---"] * words + ["---:"] * (len(head) - words), *rows]
    return "\n".join("| " + " | ".join(str(one) for one in line) + " |" for line in lines)


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{100 * value:.1f} %"


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _front_matter(described: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": "keras",
        "pipeline_tag": "image-segmentation",
        "tags": ["sattile", "semantic-segmentation", "earth-observation", "satellite-imagery"],
        "metrics": ["mean_iou", "accuracy"],
    }
    measured = described["metrics"]
    if measured and measured.get("miou") is not None:
        # https://huggingface.co/docs/hub/model-cards#evaluation-results
        dataset = {
            "type": "sattile-tiles",
            "name": f"{SPLITS.get(measured['split'], measured['split'])} tiles",
            "split": measured["split"],
        }
        if described["dataset_digest"]:
            dataset["revision"] = described["dataset_digest"]
        scores = [("mean_iou", measured["miou"]), ("accuracy", measured["accuracy"])]
        found["model-index"] = [
            {
                "name": _name(described),
                "results": [
                    {
                        "task": {"type": "image-segmentation"},
                        "dataset": dataset,
                        "metrics": [{"type": name, "value": round(value, 6)} for name, value in scores],
                    }
                ],
            }
        ]
    return found


def _purpose(described: Mapping[str, Any]) -> str:
    network, classes = described["network"], read_classes(described["classes"])
    gsd = f" with pixels of {described['gsd']:g} m" if described["gsd"] else ""
    source = f", from {_plain(network['source'])}" if "source" in network else ""
    what = "each tile" if network.get("arch") == "tile-classifier" else "each pixel"
    return (
        f"A Keras network ({_plain(_name(described))}, {network['parameters']:,} parameters{source}) for satellite "
        f"scenes{gsd}. From {_many(len(described['bands']), 'band')} it gives {what} one of {len(classes)} "
        f"classes. Normalisation is inside: it takes {described['values']} band values."
    )


def _use(described: Mapping[str, Any]) -> list[str]:
    bands = shlex.quote(",".join(described["bands"]))
    return [
        "From the folder of this file:",
        f"```sh\nsattile predict --model . --scenes '/archive/*.tif' --bands {bands} --out /maps\n```",
        "stitches a map of each scene. `--bands` selects by the files' own band names or, where they have none, names "
        "their bands in this order. Without sattile, `keras.models.load_model('model.keras')` gives the network, and "
        "`saved_model/` is for TensorFlow Serving.",
    ]


def _input(described: Mapping[str, Any]) -> list[str]:
    values = {
        "raw": "the numbers as stored in the files, no scale or offset applied",
        "scaled": "stored number x scale + offset, as the files declare them",
    }[described["values"]]
    mean = " (the mean of the training tiles)" if described["dataset_digest"] else ""
    rows = [
        [index, _plain(name), f"{fill:.6g}"]
        for index, (name, fill) in enumerate(zip(described["bands"], described["fill"], strict=True))
    ]
    head, known = ["channel", "band", "fill value"], _known(described)
    if known is not None:
        head += ["1 % of the training pixels below", "1 % above"]
        rows = [[*row, f"{low:.6g}", f"{high:.6g}"] for row, low, high in zip(rows, known.low, known.high, strict=True)]
    return [
        f"A float32 tensor (batch, height, width, {len(described['bands'])}), channels last. Values: {values}. Pixels "
        f"without data are set to the fill value{mean}, and get no class in the maps.",
        _table(head, rows, words=2),
    ]


def _known(described: Mapping[str, Any]) -> drift.Known | None:
    return drift.Known.of(described["bands"], (described.get("data") or {}).get("statistics") or {})


def _output(described: Mapping[str, Any]) -> list[str]:
    classes = read_classes(described["classes"])
    if described["output"] == "second":
        shape = (
            f"(batch, height, width, 1): the probability of {_plain(classes[1].name)}; that of "
            f"{_plain(classes[0].name)} is what is left of 1"
        )
    else:
        shape = f"(batch, height, width, {len(classes)}), a score per class, in this order; the largest wins"
    rows = [(index, one.id, _plain(one.name), f"`{one.color}`") for index, one in enumerate(classes)]
    return [
        f"A float32 tensor {shape}. Maps hold the class ids, and 255 where there is no data.",
        _table(("score", "id in maps", "class", "colour"), rows, words=4),
    ]


def _windows(described: Mapping[str, Any]) -> list[str]:
    stride, radius, shape = described["total_stride"], described["receptive_radius"], described["input_shape"]
    said = (
        f"It takes windows of {shape[0]} x {shape[1]} pixels and no others."
        if shape
        else f"It takes windows of any size whose height and width are multiples of {stride}."
        if stride > 1
        else "It takes windows of any size."
    )
    if radius is None:
        said += (
            " A pixel's scores may depend on the whole window: windows that are laid side by side show seams, and "
            "sattile blends overlapping ones."
        )
    elif radius == 0:
        said += " A pixel's scores depend on that pixel alone."
    else:
        halo = -(-radius // stride) * stride
        said += (
            f" A pixel's scores depend on what lies up to {radius} pixels away: read {halo} pixels more on each side "
            f"and throw their scores away, and windows meet without a seam (sattile does)."
        )
    return [said]


def _data(described: Mapping[str, Any]) -> list[str]:
    data = described.get("data") or {}
    if not data:
        if described["dataset_digest"]:
            return [f"A sattile tiles dataset with the digest `{described['dataset_digest']}`."]
        return ["Not known to sattile: ask those who trained it."]
    classes, splits = read_classes(described["classes"]), data["splits"]
    names = sorted(splits, key=[*SPLITS, *splits].index)
    size = data["size"]
    said = [f"Tiles of {size} x {size} pixels"]
    if data["sources"]:
        said.append(f"from {_many(data['sources'], 'scene')} with labels")
    if described["gsd"]:
        said.append(f"at {described['gsd']:g} m per pixel")
    if data.get("interval"):
        first, last = (one[:10] for one in data["interval"])
        said[-1] += ","
        said.append(f"taken on {first}" if first == last else f"taken from {first} to {last}")
    rows: list[list[Any]] = [["tiles", *(f"{splits[name]['tiles']:,}" for name in names)]]
    if all(splits[name].get("scenes") for name in names):
        rows.append(["scenes they come from", *(f"{splits[name]['scenes']:,}" for name in names)])
    labelled = [sum((splits[name].get("class_pixels") or {}).values()) for name in names]
    overlap = (data.get("stride") or data["size"]) < data["size"]
    rows.append(["labelled pixels" + ", of each tile" * overlap, *(f"{one:,}" for one in labelled)])
    for one in classes:
        shares = [_class_share(splits[name], one) for name in names]
        rows.append([f"labelled {_plain(one.name)}", *map(_share, shares)])
    return [
        " ".join(said) + f"; digest of the dataset `{described['dataset_digest']}`.",
        _table(("", *(SPLITS.get(name, name) for name in names)), rows),
    ]


def _class_share(split: Mapping[str, Any], one: SegmentClass) -> float | None:
    pixels = split.get("class_pixels") or {}
    total = sum(pixels.values())
    return pixels.get(str(one.id), 0) / total if total else None


def _settings(described: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in described["network"].items() if name not in OWN}


def _training(described: Mapping[str, Any]) -> list[str]:
    settings = _settings(described)
    if not settings:
        return []
    best = described["network"].get("best_epoch")
    validates = described["metrics"].get("split") == "val"
    where = "validation" if validates else "training tiles, for there are no validation"
    why = "the last" if settings.get("keep") == "last" else f"the best on the {where} tiles"
    said = f"The weights are those of epoch {best}, {why}. " if best else ""
    if settings.get("start_from"):
        said += (
            f"It began with the weights of an earlier network, {_plain(storage.name(settings['start_from']))}: what is "
            f"said of data here does not say what that one has seen. "
        )
    words = {True: "on", False: "off", None: "not set"}
    rows = [
        (f"`{name}`", words[value] if isinstance(value, bool | None) else _plain(_in_words(value)))
        for name, value in settings.items()
        if name != "warmup"  # no option of the command
    ]
    table = _table(("setting", "value"), rows)
    return [f"{said}Settings of `sattile train`:", table]


def _in_words(value: Any) -> Any:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value


def _accuracy(described: Mapping[str, Any]) -> list[str]:
    measured = described["metrics"]
    if not measured:
        return ["Not measured. `sattile evaluate --model . --scenes SCENES --labels LABELS --out OUT` measures it."]
    validates = measured["split"] == "val"
    chose = described["network"].get("keep") != "last"
    where = (
        f"On the validation tiles{', which also chose the epoch' * chose}: expect less elsewhere."
        if validates
        else f"On the {SPLITS.get(measured['split'], measured['split'])} tiles, which the network has seen: this says "
        f"how well it learned them, not how well it does elsewhere."
    )
    rows = [
        (_plain(name), *(_score(one and one[key]) for key in ("iou", "precision", "recall", "f1")),
         f"{one['pixels']:,}" if one else 0)
        for name, one in measured["classes"].items()
    ]  # fmt: skip
    return [
        f"{where} Mean IoU {_score(measured['miou'])}, {_share(measured['accuracy'])} of {measured['pixels']:,} "
        f"labelled pixels right.",
        _table(("class", "IoU", "precision", "recall", "F1", "pixels"), rows),
    ]


def _engines(described: Mapping[str, Any], speeds: Mapping[str, Mapping[str, float]]) -> list[str]:
    fast = described["openvino"]
    said = "TensorFlow, in float32 (`model.keras`, `saved_model/`)"
    if not fast:
        return [f"{said}."]
    said += "; OpenVINO, in bfloat16 on CPUs that have it, else in float32 (`openvino/`). "
    if "agreement" not in fast:
        return [said + "The two were not compared: sattile takes OpenVINO only if it is asked to."]
    shares = [
        f"{100 * fast[name]['agreement']:.3f} % in {name}" for name in ("bfloat16", "float32") if name in fast
    ] or [f"{100 * fast['agreement']:.3f} %"]
    said += (
        f"OpenVINO {fast['version']} gave {' and '.join(shares)} of {fast['pixels']:,} pixels of "
        f"{'validation' if described['metrics'].get('split') == 'val' else 'training'} tiles the class that TensorFlow "
        f"gives them. Which of the two is faster is measured when the model is first used on a kind of CPU."
    )
    rows = [
        (_plain(kind), f"{one['tensorflow']:.2f}", f"{one['openvino']:.2f}") for kind, one in sorted(speeds.items())
    ]
    return [said, _table(("measured on", "TensorFlow, Mpix/s", "OpenVINO, Mpix/s"), rows)] if rows else [said]


def _limits(described: Mapping[str, Any]) -> list[str]:
    classes, data, measured = read_classes(described["classes"]), described.get("data") or {}, described["metrics"]
    said = []
    if _known(described):
        said.append(
            "Scenes that hold other values than its training tiles did are told by `sattile predict`, and mapped."
        )
    if described["gsd"]:
        said.append(
            f"It was trained for pixels of {described['gsd']:g} m; scenes of other resolutions show it other things "
            f"than it knows."
        )
    else:
        said.append("The pixel size that it was trained for is not known.")
    if measured:
        split = SPLITS.get(measured["split"], measured["split"])
        said.append(
            f"Its accuracy was measured on {split} tiles only, not on other regions, seasons or sensors than those of "
            f"the scenes that the tiles were cut from."
        )
        absent = [name for name, one in measured["classes"].items() if not one or not one["pixels"]]
        if absent:
            said.append(
                f"No pixel of these tiles is labelled {_listed(absent)}: nothing is known of how well it finds that."
            )
    else:
        said.append("Its accuracy was not measured by sattile.")
    shares = [(one, _class_share(data["splits"]["train"], one)) for one in classes] if data else []
    unseen = [one.name for one, share in shares if share == 0]
    if unseen:
        said.append(f"No labelled training pixel is {_listed(unseen)}: it can't have learned that.")
    rare = [one.name for one, share in shares if share and share < RARE]
    if rare:
        said.append(f"Less than {RARE:.0%} of the labelled training pixels are {_listed(rare)}.")
    if data and "test" in data["splits"]:
        said.append("Its training did not look at the test tiles; `sattile evaluate --split test` does, once.")
    said.append(
        "Each pixel with data gets one of the classes, also where none of them fits (clouds, shadows, haze). Labels "
        "may be wrong, and what they got wrong it learned. No licence is stated here."
    )
    return [" ".join(said)]


# --- for catalogues -----------------------------------------------------------------------------------------------


def model_item(described: Mapping[str, Any]) -> dict[str, Any]:
    """`item.json` of a bundle: a STAC item of the MLM extension.

    Its place and time are those of the training scenes, as far as the tiles dataset says them. Else the geometry is
    null, and the time is from 1970 to 2099, flagged and described as a placeholder: STAC wants a time, and that of
    writing would be another one for the same model.

    Args:
        described: what `bundle.json` says.
    """
    import pystac

    data = described.get("data") or {}
    geometry, interval = data.get("footprint"), data.get("interval")
    times = stac.time_properties(None, interval)
    time = "" if interval else " The time of the training scenes is not stated: start and end are placeholders."
    item = pystac.Item(
        id=f"{_slug(_name(described))}-{described['digest'][:12]}",
        geometry=geometry,
        bbox=stac.bbox(geometry) if geometry else None,
        datetime=None,
        properties={
            "title": _title(described),
            "description": _purpose(described) + time,
            **_properties(described),
            **times,
        },
        stac_extensions=EXTENSIONS,
    )
    for name, asset in _assets(described).items():
        item.add_asset(name, pystac.Asset(**asset))
    found: dict[str, Any] = item.to_dict(include_self_link=False, transform_hrefs=False)
    return found


def _title(described: Mapping[str, Any]) -> str:
    return f"{_name(described)}: {', '.join(one['name'] for one in described['classes'])}"


def _slug(text: str) -> str:
    return re.sub("[^0-9A-Za-z]+", "-", text).strip("-") or "network"


def _properties(described: Mapping[str, Any]) -> dict[str, Any]:
    network, bands = described["network"], described["bands"]
    arch = _name(described)
    ours = ":" not in arch and "arch" in network and "source" not in network
    start = network.get("start_from")
    # A letter first and no less than three characters: so says the schema.
    name = f"model-{_slug(arch)}" if not re.match("[A-Za-z]..", _slug(arch)) else _slug(arch)
    found: dict[str, Any] = {
        "bands": [{"name": band} for band in bands],
        "mlm:name": name,
        "mlm:architecture": "U-Net" if ours and "unet" in arch else arch,
        "mlm:tasks": _tasks(arch),
        "mlm:framework": "Keras",
        "mlm:accelerator": "amd64",
        "mlm:accelerator_constrained": False,
        "mlm:accelerator_summary": "Runs on CPUs; TensorFlow takes a GPU where there is one",
        "mlm:total_parameters": network["parameters"],
        "mlm:input": [_mlm_input(described)],
        "mlm:output": [_mlm_output(described)],
    }
    if described["gsd"]:
        found["gsd"] = described["gsd"]
    version = described["versions"].get("keras", "")
    if re.fullmatch(r"\d+\.\d+\.\d+", version):
        found["mlm:framework_version"] = version
    if ours:  # a builder of somebody's own may have begun with anything
        found |= {"mlm:pretrained": bool(start), "mlm:pretrained_source": storage.name(start) if start else None}
    settings = {key: value for key, value in _settings(described).items() if re.fullmatch("[0-9a-zA-Z_.-]+", key)}
    if settings:
        found["mlm:hyperparameters"] = settings
    return found


def _tasks(arch: str) -> list[str]:
    return ["scene-classification" if arch == "tile-classifier" else "semantic-segmentation"]


def _edges(described: Mapping[str, Any]) -> list[int]:
    return list(described["input_shape"] or (-1, -1))


def _mlm_input(described: Mapping[str, Any]) -> dict[str, Any]:
    values = "Stored numbers" if described["values"] == "raw" else "Stored numbers x scale + offset"
    fill = ", ".join(f"{one:g}" for one in described["fill"])
    return {
        "name": "bands",
        "bands": list(described["bands"]),
        "input": {
            "shape": [-1, *_edges(described), len(described["bands"])],
            "dim_order": ["batch", "height", "width", "bands"],
            "data_type": "float32",
        },
        "description": (
            f"{values}; normalisation is inside the network. Pixels without data are set to {fill} (by band). Height "
            f"and width are multiples of {described['total_stride']}."
        ),
        "value_scaling": None,
        "resize_type": None,
        "pre_processing_function": None,
    }


def _mlm_output(described: Mapping[str, Any]) -> dict[str, Any]:
    classes = read_classes(described["classes"])
    second = described["output"] == "second"
    what = (
        f"One channel, the probability of {classes[1].name}; that of {classes[0].name} is what is left of 1"
        if second
        else "A score per class, in the order of the classes; the largest wins"
    )
    return {
        "name": "scores",
        "tasks": _tasks(_name(described)),
        "result": {
            "shape": [-1, *_edges(described), 1 if second else len(classes)],
            "dim_order": ["batch", "height", "width", "class"],
            "data_type": "float32",
        },
        "description": f"{what}. The values of the classes are their ids in maps.",
        "classification:classes": stac.classes_of(classes),
        "post_processing_function": None,
    }


def _assets(described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    # MLM wants them in the properties, and STAC allows them there only where an asset has them, too.
    bands = [{"name": band} for band in described["bands"]]

    def model(href: str, title: str, kind: str, **more: Any) -> dict[str, Any]:
        extra = {"mlm:artifact_type": kind, "bands": bands, **more}
        return {"href": href, "title": title, "roles": ["mlm:model"], "extra_fields": extra}

    found = {
        "model": model(
            "./model.keras", "The network, by Keras", "tf.keras.Model.save",
            **{"file:checksum": stac.checksum(described["digest"])},
        ) | {"media_type": "application/zip"},
        "saved_model": model("./saved_model", "The same for TensorFlow Serving", "tf.keras.Model.export"),
    }  # fmt: skip
    if described["openvino"]:
        found["openvino"] = model("./openvino/model.xml", "The same for OpenVINO", "openvino.save_model") | {
            "media_type": "application/xml"
        }
        found["openvino_weights"] = {
            "href": "./openvino/model.bin", "title": "Its weights", "roles": ["mlm:weights"],
            "media_type": "application/octet-stream",
        }  # fmt: skip
    found["card"] = {
        "href": f"./{CARD}", "title": "Model card", "roles": ["metadata"], "media_type": "text/markdown",
    }  # fmt: skip
    found["bundle"] = {
        "href": "./bundle.json", "title": "What sattile needs to know", "roles": ["metadata"],
        "media_type": "application/json",
    }  # fmt: skip
    return found
