"""One page that a person opens: maps, metrics, throughput, what failed and why.

Everything is read from the out folders of the other commands; a folder that is not given is a section less. The page
is one HTML file with its pictures inside: it opens offline, prints, and is the same bytes for the same folders.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sattile import comparison, storage
from sattile.card import CARD
from sattile.errors import SattileError, UsageError
from sattile.figures import (
    curves_figure,
    footprint_figure,
    intervals_figure,
    is_number,
    reliability_figure,
    split_rank,
)
from sattile.record import RUN, Run, read_quarantine
from sattile.schema import PALETTE
from sattile.split import SPLITS
from sattile.versions import is_version, resolve

ORDER = ("index", "tile", "train", "bundle", "evaluate", "predict")
CHAINS = ("run", "reprocess")
NOT_TOLD = ("report", *CHAINS)  # itself, and the sums of the others
PAGE = "index.html"

MAX_SAMPLES = 12
MAX_MAPS = 24
MAX_TILES = 20_000
MAX_PICTURE = 4_000_000  # bytes; a page of a hundred megabytes opens nowhere


@dataclass(frozen=True)
class Folder:
    """One out folder: where it is, and what its run record says."""

    url: str
    run: dict[str, Any]

    @property
    def command(self) -> str:
        return str(self.run.get("command", ""))

    def join(self, *names: str) -> str:
        return storage.join(self.url, *names)

    def read(self, *names: str) -> Any:
        """A JSON file of the folder; None if it is not there."""
        url = self.join(*names)
        return storage.read_json(url) if storage.exists(url) else None


def report(folders: Sequence[str], *, out: str) -> str:
    """Write `OUT/index.html` about any out folders of sattile.

    Args:
        folders: out folders of `index`, `tile`, `train`, `bundle`, `evaluate`, `predict`, in any order, or folders
            that hold such folders; of a model's versions the latest is told of, unless one is named.
        out: the folder to write into.

    Returns:
        URL of the page.

    Raises:
        UsageError: if a folder is not one of sattile's, or `out` is a file.
    """
    found = collect(folders)
    with Run("report", out, {}) as run:
        run.inputs = [_input(one) for one in found]
        run.given = len(found)
        with run.stage("render"):
            html = render(found).encode("utf-8")
        url = storage.join(out, PAGE)
        if storage.exists(url) and storage.read_bytes(url) == html:
            run.skipped = len(found)
        else:
            storage.write_bytes(url, html)
            run.done = len(found)
        run.finish()
    return url


def _input(folder: Folder) -> dict[str, Any]:
    entry = storage.stat(folder.join(RUN))
    return {"url": folder.url, "size": entry.size if entry else 0, "time": entry.mtime if entry else 0}


def collect(folders: Sequence[str]) -> list[Folder]:
    """The out folders among `folders` and directly in them, by command and then as given."""
    found: dict[str, Folder] = {}
    for url in folders:
        entry = storage.stat(url)
        if entry is None or not entry.is_folder:
            raise UsageError(f"{url} is not a folder; name out folders of sattile")
        here = _records([resolve(url)])
        if not here or here[0].command in CHAINS:
            here = _records([resolve(one.url) for one in storage.list_folder(url) if one.is_folder])
        if not here:
            raise UsageError(f"{url} has no {RUN}, nor has a folder in it: no sattile run has finished there")
        for folder in here:
            if folder.command not in NOT_TOLD:
                found.setdefault(storage.absolute(folder.url), folder)
    rank = {command: index for index, command in enumerate(ORDER)}
    return sorted(found.values(), key=lambda one: rank.get(one.command, len(ORDER)))


def _records(urls: Sequence[str]) -> list[Folder]:
    at = [(url, storage.join(url, RUN)) for url in urls]
    found = [Folder(url, storage.read_json(record)) for url, record in at if storage.exists(record)]
    for one in found:
        if not isinstance(one.run, dict):
            raise SattileError(f"{one.join(RUN)} is damaged: it is no run record; run the command into {one.url} again")
    return found


def render(folders: Sequence[Folder]) -> str:
    """The page, as HTML text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("sattile"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        between=between, count=count, number=number, percent=percent, seconds=duration, pretty=pretty
    )
    return environment.get_template("report.html").render(describe(folders))


def describe(folders: Sequence[Folder]) -> dict[str, Any]:
    """All that the page says, as the template wants it."""
    by_command: dict[str, list[Folder]] = {}
    for folder in folders:
        by_command.setdefault(folder.command, []).append(folder)
    datasets = [_describe_dataset(one) for one in by_command.get("tile", []) if one.read("dataset.json")]
    models = [_describe_model(one) for one in (*by_command.get("train", []), *by_command.get("bundle", []))]
    classes = _classes(folders)
    quarantine = list(_quarantine(folders))
    scenes = [scene for one in by_command.get("index", []) for scene in _scenes(one)]
    _mark_refused(scenes, quarantine)
    measured = by_command.get("evaluate", [])
    evaluations = [
        {**_describe_evaluation(one, classes), "model": name}
        for one, name in zip(measured, _model_names(measured), strict=True)
    ]
    mosaics = [_describe_mosaics(one) for one in by_command.get("predict", [])]
    return {
        "title": _title(folders),
        "summary": _summary(by_command, datasets, models, evaluations, quarantine),
        "cards": _cards(by_command, datasets, models, evaluations, quarantine),
        "classes": list(classes.items()),
        "scenes": scenes,
        "footprints": footprint_figure(scenes, _tiles(by_command.get("tile", []), scenes)),
        "evaluations": evaluations,
        "comparison": _compare(measured, evaluations),
        "mosaics": mosaics,
        "models": models,
        "datasets": datasets,
        "runs": [_describe_run(one) for one in folders],
        "longest": max((stage["seconds"] for one in folders for stage in one.run.get("stages", [])), default=0) or 1,
        "quarantine": quarantine,
        "versions": _versions(folders),
    }


def _title(folders: Sequence[Folder]) -> str:
    names = {storage.name(storage.parent(storage.absolute(one.url))) for one in folders}
    return names.pop() if len(names) == 1 else "sattile"


def _summary(
    by_command: dict[str, list[Folder]],
    datasets: list[dict[str, Any]],
    models: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
) -> list[str]:
    """What happened, in sentences."""
    said = []
    for folder in by_command.get("index", []):
        said.append(f"{_scene_count(folder)} were catalogued.")
    for dataset in datasets:
        parts = [f"{count(one['tiles'])} for {SPLITS.get(one['name'], one['name'])}" for one in dataset["splits"]]
        said.append(f"They were cut into {count(dataset['tiles'])} tiles: {', '.join(parts)}.")
    for model in models:
        if model["epochs"]:
            said.append(f"A network was trained for {_times(model['epochs'], 'epoch')}.")
    for evaluation in evaluations:
        if evaluation["miou"] is not None:
            whose = "its" if len(evaluations) == 1 else f"{evaluation['model']}'s"
            said.append(
                f"On {evaluation['what']}, {whose} mean intersection over union (mIoU) is {number(evaluation['miou'])}"
                f"{between(evaluation['intervals'].get('miou'))} and {percent(evaluation['accuracy'])} of the pixels "
                f"are right."
            )
    for folder in by_command.get("predict", []):
        speed = folder.run.get("delivered_mpix_per_s")
        said.append(f"{_scene_count(folder)} were mapped{f', at {number(speed)} Mpix/s' if speed else ''}.")
        if folder.run.get("unlike"):
            scenes = _times(len(folder.run["unlike"]), "of them is", "of them are")
            said.append(f"{scenes} unlike what the model was trained on, so look at those maps twice.")
    if quarantine:
        files = len({one["url"] for one in quarantine})
        said.append(f"{_times(files, 'scene was', 'scenes were')} refused; the reasons are below.")
    elif _any_given(by_command):
        said.append("Nothing was refused.")
    return said


def _any_given(by_command: dict[str, list[Folder]]) -> bool:
    return any(by_command.values())


def _scene_count(folder: Folder) -> str:
    return _times(_done(folder), "scene")


def _done(folder: Folder) -> int:
    """What lies finished in a folder, whichever run made it: a rerun that does nothing leaves the page as it is."""
    return int(folder.run.get("done") or 0) + int(folder.run.get("skipped") or 0)


def _times(many: int, one: str, more: str | None = None) -> str:
    return f"{count(many)} {one if many == 1 else more or one + 's'}"


def _cards(
    by_command: dict[str, list[Folder]],
    datasets: list[dict[str, Any]],
    models: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
) -> list[dict[str, str]]:
    """The numbers to see first: value, name, and a word more."""
    cards = []
    scored = [one for one in evaluations if one["miou"] is not None]
    trained = [one for one in models if one["best"] is not None]
    if scored:
        cards.append({"value": number(scored[0]["miou"]), "name": "mIoU", "more": f"on {scored[0]['what']}"})
    elif trained:
        best = trained[0]["best"]
        name = f"{trained[0]['judged']} mIoU"
        cards.append({"value": number(best["val_miou"]), "name": name, "more": f"epoch {best['epoch']}"})
    runs = by_command.get("predict") or by_command.get("tile") or by_command.get("index") or []
    if runs:
        name = {"predict": "scenes mapped", "tile": "scenes tiled"}.get(runs[0].command, "scenes catalogued")
        cards.append({"value": count(_done(runs[0])), "name": name, "more": ""})
    refused = len({one["url"] for one in quarantine})
    cards.append(
        {"value": count(refused), "name": "scenes refused", "more": "each with its reason" if refused else "none"}
    )
    if datasets:
        cards.append(
            {
                "value": count(datasets[0]["tiles"]),
                "name": "tiles",
                "more": f"{datasets[0]['size']} × {datasets[0]['size']} px",
            }
        )
    speeds = [one.run.get("delivered_mpix_per_s") for one in by_command.get("predict", [])]
    if speeds and speeds[0]:
        cards.append({"value": number(speeds[0]), "name": "Mpix/s delivered", "more": "by predict, in all"})
    total = sum(
        stage["seconds"] for group in by_command.values() for one in group for stage in one.run.get("stages", [])
    )
    if total:
        cards.append({"value": duration(total), "name": "in all stages", "more": ""})
    return cards


def _classes(folders: Sequence[Folder]) -> dict[str, str]:
    """Colour by class name, from the first dataset or model that says it."""
    for name in ("dataset.json", "bundle.json"):
        for folder in folders:
            described = folder.read(name) if folder.command in ("tile", "train", "bundle") else None
            if described and described.get("classes"):
                return {str(one["name"]): _color(one.get("color"), one.get("id", 0)) for one in described["classes"]}
    for folder in folders:
        measured = folder.read("metrics.json") if folder.command == "evaluate" else None
        if measured:
            return {name: _color(None, index) for index, name in enumerate(measured["classes"])}
    return {}


def _color(value: Any, index: int) -> str:
    # It goes into a style attribute: nothing but a colour may.
    return (
        value if isinstance(value, str) and re.fullmatch(r"#[0-9a-fA-F]{6}", value) else PALETTE[index % len(PALETTE)]
    )


# Quarantine


def _quarantine(folders: Sequence[Folder]) -> Iterable[dict[str, Any]]:
    """Refused scenes, one row for each reason: url, name, reason, stages ('tile: read')."""
    rows: dict[tuple[str, str], list[str]] = {}
    for folder in folders:
        for one in read_quarantine(folder.url):
            stages = rows.setdefault((one.url, one.reason), [])
            stage = f"{folder.command}: {one.stage}" if one.stage != folder.command else folder.command
            if stage not in stages:
                stages.append(stage)
    for (url, reason), stages in rows.items():
        yield {"url": url, "name": storage.name(url), "reason": reason, "stages": stages}


def _read_table(url: str, columns: list[str] | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    return pq.read_table(pa.BufferReader(storage.read_bytes(url)), columns=columns)


# Catalogue


def _scenes(folder: Folder) -> list[dict[str, Any]]:
    """Rows of the catalogue, as far as the page shows them."""
    url = folder.join("scenes.parquet")
    if not storage.exists(url):
        return []
    table = _read_table(url)
    times = ("datetime", "start_datetime", "end_datetime")
    wanted = ("scene_id", "url", "width", "height", "bands", *times, "gsd", "footprint", "crs", "transform")
    table = table.select([name for name in wanted if name in table.column_names])
    scenes = []
    for index, row in enumerate(table.to_pylist()):
        scene = {name: row.get(name) for name in wanted}
        scene["number"] = index + 1
        days = [str(scene[name])[:10] for name in (times[1:] if scene["start_datetime"] else times[:1]) if scene[name]]
        scene["days"] = " – ".join(dict.fromkeys(days)) or "–"
        scene["bands"] = _band_names(scene["bands"])
        scene["url"] = str(scene["url"] or "")
        scene["refused"] = ""
        scenes.append(scene)
    return scenes


def _band_names(value: Any) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    return ", ".join(str(one.get("name")) if isinstance(one, dict) else str(one) for one in value or [])


def _mark_refused(scenes: list[dict[str, Any]], quarantine: list[dict[str, Any]]) -> None:
    refused = {storage.absolute(row["url"]): row["stages"] for row in quarantine}
    for scene in scenes:
        scene["refused"] = ", ".join(refused.get(storage.absolute(scene["url"]), []))


def _tiles(folders: Sequence[Folder], scenes: list[dict[str, Any]]) -> dict[str, list[list[tuple[float, float]]]]:
    """Outlines of tiles in degrees, by split; none where the catalogue does not say where its scenes lie."""
    places = {
        scene["scene_id"]: (scene["crs"], tuple(scene["transform"]))
        for scene in scenes
        if scene["crs"] and scene["transform"] is not None and len(scene["transform"]) == 6
    }
    outlines: dict[str, list[list[tuple[float, float]]]] = {}
    for folder in folders if places else ():
        dataset = folder.read("dataset.json") or {}
        if sum(split["tiles"] for split in dataset.get("splits", {}).values()) > MAX_TILES:
            continue
        for name, split in dataset.get("splits", {}).items():
            for file in split["files"]:
                url = folder.join(name, file)
                if not storage.exists(url):
                    continue
                rows = _read_table(url, ["scene_id", "row", "col"]).to_pydict()
                outlines.setdefault(name, []).extend(_outlines(rows, int(dataset["size"]), places))
    return outlines


def _outlines(
    rows: dict[str, list[Any]], size: int, places: dict[str, tuple[str, tuple[float, ...]]]
) -> Iterable[list[tuple[float, float]]]:
    import pyproj

    corners = ((0, 0), (0, size), (size, size), (size, 0))
    to_degrees: dict[str, Any] = {}
    for scene_id, row, col in zip(rows["scene_id"], rows["row"], rows["col"], strict=True):
        if scene_id not in places:
            continue
        crs, (a, b, c, d, e, f) = places[scene_id]
        if crs not in to_degrees:
            to_degrees[crs] = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
        at = [(row + down, col + right) for down, right in corners]
        x = [a * right + b * down + c for down, right in at]
        y = [d * right + e * down + f for down, right in at]
        yield list(zip(*to_degrees[crs].transform(x, y), strict=True))


# Dataset, model, evaluation, mosaics


def _describe_dataset(folder: Folder) -> dict[str, Any]:
    dataset = folder.read("dataset.json")
    classes = [
        {"id": one["id"], "name": one["name"], "color": _color(one.get("color"), one["id"])}
        for one in dataset["classes"]
    ]
    splits = []
    for name, split in sorted(dataset["splits"].items(), key=lambda item: split_rank(item[0])):
        labelled = sum(split["class_pixels"].values())
        shares = [
            {**one, "share": split["class_pixels"].get(str(one["id"]), 0) / labelled if labelled else 0.0}
            for one in classes
        ]
        splits.append({**split, "name": name, "shares": shares, "labelled": labelled})
    statistics = [
        {"band": band, **values, "percentiles": values.get("percentiles", {})}
        for band, values in dataset.get("statistics", {}).items()
    ]
    return {
        "url": folder.url,
        "size": dataset["size"],
        "stride": dataset.get("stride"),
        "gsd": dataset.get("gsd"),
        "dtype": dataset.get("dtype"),
        "tiles": sum(split["tiles"] for split in splits),
        "splits": splits,
        "statistics": statistics,
        "split_rule": dataset.get("split_rule"),
        "windows": dataset.get("windows"),
        "sources": len(dataset.get("sources", [])),
        "digest": dataset.get("digest"),
    }


def _describe_model(folder: Folder) -> dict[str, Any]:
    bundle = folder.read("bundle.json") or {}
    history = [row for row in folder.read("history.json") or [] if isinstance(row, dict)]
    scored = [row for row in history if is_number(row.get("val_miou"))]
    # The first of equals, if not the last of all: the checkpoint that training keeps.
    best = max(scored, key=lambda row: row["val_miou"], default=None)
    if (bundle.get("network") or {}).get("keep") == "last" and scored:
        best = scored[-1]
    split = (bundle.get("metrics") or {}).get("split", "val")  # training tiles, where there are no others
    judged = SPLITS.get(split, split)
    facts = [
        ("version", storage.name(folder.url) if is_version(folder.url) else None),
        ("model card", folder.join(CARD) if storage.exists(folder.join(CARD)) else None),
        ("bands", ", ".join(bundle.get("bands", []))),
        ("classes", ", ".join(str(one["name"]) for one in bundle.get("classes", []))),
        ("total stride", bundle.get("total_stride")),
        (
            "receptive radius",
            f"{bundle['receptive_radius']} px" if bundle.get("receptive_radius") is not None else None,
        ),
        ("values", bundle.get("values")),
        ("gsd", f"{bundle['gsd']:g} m" if is_number(bundle.get("gsd")) else None),
    ]
    return {
        "url": folder.url,
        "epochs": len(history),
        "best": best,
        "judged": judged,
        "curves": curves_figure(history, judged if judged != SPLITS["train"] else "training, after the epoch"),
        "facts": [(name, value) for name, value in facts if value not in (None, "")],
        "seconds": sum(row["seconds"] for row in history if is_number(row.get("seconds"))),
    }


def _describe_evaluation(folder: Folder, colors: dict[str, str]) -> dict[str, Any]:
    measured = folder.read("metrics.json") or {}
    names = list(measured.get("classes", {}))
    confusion = measured.get("confusion") or []
    sure = measured.get("intervals") or {}
    rows = []
    for index, name in enumerate(names):
        color = colors.get(name, PALETTE[index % len(PALETTE)])
        between = (sure.get("classes") or {}).get(name) or {}
        rows.append({"name": name, "color": color, "values": measured["classes"][name], "intervals": between})
    table = []
    for name, line in zip(names, confusion, strict=False):
        total = sum(line)
        table.append(
            {"name": name, "cells": [{"count": n, "share": n / total if total else None} for n in line], "total": total}
        )
    settings = folder.run.get("settings", {})
    split = settings.get("split")  # of tiles
    split = " and ".join(SPLITS.get(name, name) for name in str(split).split(",")) if split else None
    left_out_shapes = measured.get("shapes") or {}
    for row in rows if left_out_shapes else ():
        # One interval for a number: that of the shapes, which holds for a single one, too.
        row["intervals"] = {**row["intervals"], "recall": (left_out_shapes[row["name"]] or {}).get("interval")}
    samples, left_out = _samples(folder)
    calibration = measured.get("calibration")
    return {
        "url": folder.url,
        "what": f"the {split} split{'s' * (' and ' in split)}" if split else "scenes with labels",
        "shapes": left_out_shapes,
        "miou": measured.get("miou"),
        "accuracy": measured.get("accuracy"),
        "pixels": measured.get("pixels") or 0,
        "names": names,
        "rows": rows,
        "confusion": table,
        "scenes": _worst_first(measured.get("scenes")),
        "regions": _worst_first(measured.get("regions")),
        "intervals": sure,
        "calibration": calibration,
        "reliability": reliability_figure([("this model", calibration)]) if calibration else None,
        "notes": measured.get("notes") or [],
        "unlike": _unlike(folder),
        "samples": samples,
        "samples_left_out": left_out,
    }


def _worst_first(measured: dict[str, Any] | None) -> list[tuple[str, dict[str, Any]]]:
    """By mIoU; what has none comes last."""

    def rank(item: tuple[str, dict[str, Any]]) -> tuple[bool, float, str]:
        miou = item[1].get("miou")
        return miou is None, miou or 0.0, item[0]

    return sorted((measured or {}).items(), key=rank)


def _compare(folders: Sequence[Folder], evaluations: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Several evaluations side by side, best first; None for one."""
    if len(folders) < 2:
        return None
    counted = [comparison.read_blocks(folder.join(comparison.BLOCKS)) for folder in folders]
    best, differences = comparison.differences(
        [(one["names"], blocks) for one, blocks in zip(evaluations, counted, strict=True)]
    )
    models = []
    for index, (folder, one) in enumerate(zip(folders, evaluations, strict=True)):
        network = folder.run.get("network") or {}
        sure = one["intervals"]
        models.append(
            {
                "name": one["model"],
                "url": folder.url,
                "arch": network.get("arch"),
                "parameters": network.get("parameters"),
                "miou": (one["miou"], sure.get("miou")),
                "classes": {
                    row["name"]: ((row["values"] or {}).get("iou"), (row["intervals"] or {}).get("iou"))
                    for row in one["rows"]
                },
                "calibration": one["calibration"],
                "speed": folder.run.get("delivered_mpix_per_s"),
                "best": index == best,
                "difference": differences[index],
            }
        )
    # Those that can't be compared come last, and into no figure: side by side they would be compared after all.
    models.sort(
        key=lambda one: (
            not one["best"] and one["difference"] is None, one["miou"][0] is None, -(one["miou"][0] or 0), one["name"]
        )
    )  # fmt: skip
    names = list(dict.fromkeys(name for one in models for name in one["classes"]))
    alike = [one for one in models if one["best"] or one["difference"]]
    values = [(one["name"], [one["miou"], *(one["classes"][name] for name in one["classes"])]) for one in alike]
    return {
        "models": models,
        "names": names,
        "best": next((one["name"] for one in models if one["best"]), None),
        "apart": [one["name"] for one in models if one not in alike],
        "intervals": intervals_figure(["mIoU", *alike[0]["classes"]], values) if alike else None,
        "reliability": reliability_figure([(one["name"], one["calibration"]) for one in alike if one["calibration"]]),
    }


def _model_names(folders: Sequence[Folder]) -> list[str]:
    """What to call the models of evaluations: their folders' names, with the evaluation's where that is not enough."""
    names = [_model_name(one) for one in folders]
    return [
        name if names.count(name) == 1 else f"{name} ({storage.name(folder.url)})"
        for name, folder in zip(names, folders, strict=True)
    ]


def _model_name(folder: Folder) -> str:
    """Of several models that are averaged the first one's and how many more, and how a window was turned."""
    models = (folder.run.get("network") or {}).get("models") or [storage.name(str(folder.run.get("model") or ""))]
    turns = (folder.run.get("settings") or {}).get("tta")
    more = f" and {len(models) - 1} more" if len(models) > 1 else ""
    return (models[0] + more if models[0] else storage.name(folder.url)) + (f", {turns}" if turns else "")


PANELS = (("image", "image"), ("truth", "labels"), ("prediction", "map"), ("errors", "errors"))


def _samples(folder: Folder) -> tuple[list[dict[str, Any]], int]:
    """Picture rows of EVAL/samples: name and (caption, data URI) of each panel that is there."""
    listed = [one for one in folder.read("samples", "samples.json") or [] if isinstance(one, dict)]
    samples = []
    for one in listed[:MAX_SAMPLES]:
        panels = []
        for key, caption in PANELS:
            uri = _picture(folder.join("samples"), one.get(key))
            if uri:
                panels.append({"caption": caption, "uri": uri})
        if panels:
            samples.append({"name": str(one.get("name", "")), "panels": panels})
    return samples, max(0, len(listed) - MAX_SAMPLES)


def _describe_mosaics(folder: Folder) -> dict[str, Any]:
    """Quicklooks of the labels maps, by scene; of sheets on one grid, the picture of them all."""
    on_grid = bool((folder.run.get("settings") or {}).get("layout"))
    overview = _picture(folder.url, OVERVIEW) if on_grid else None
    scenes = [one for one in storage.list_folder(folder.url) if one.is_folder and storage.name(one.url)[:1] not in "._"]
    shown = [] if overview else scenes[:MAX_MAPS]  # an archive has thousands, and each is a file to read
    maps = [{"name": storage.name(one.url), "uri": uri} for one in shown if (uri := _thumbnail(one.url))]
    left_out = 0 if overview else len(scenes) - len(shown)
    return {
        "url": folder.url,
        "maps": maps,
        "left_out": left_out,
        "on_grid": on_grid,
        "overview": overview,
        "unlike": _unlike(folder),
    }


def _unlike(folder: Folder) -> list[tuple[str, str]]:
    """(scene id, why) of scenes that are unlike what the model was trained on."""
    found = folder.run.get("unlike")
    return sorted(found.items()) if isinstance(found, dict) else []


def _thumbnail(folder: str) -> str | None:
    """The thumbnail asset of the STAC item in a folder, as a data URI."""
    for entry in storage.list_folder(folder):
        if not entry.url.endswith(".json") or storage.name(entry.url)[:1] in "._":
            continue
        item = storage.read_json(entry.url)
        for name, asset in (item.get("assets") or {}).items() if isinstance(item, dict) else ():
            if name == "thumbnail" or "thumbnail" in (asset.get("roles") or ()):
                return _picture(folder, str(asset.get("href", "")).removeprefix("./"))
    return None


OVERVIEW = "overview.png"

KINDS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp"}


def _picture(folder: str, name: Any) -> str | None:
    """A picture of a folder as a data URI; None for what is no picture, too large, or outside of it."""
    if not isinstance(name, str) or not name or "/" in name or "\\" in name or name.startswith("."):
        return None
    entry = storage.stat(storage.join(folder, name))
    if entry is None or entry.is_folder or entry.size > MAX_PICTURE:
        return None
    data = storage.read_bytes(entry.url)
    kind = next((kind for magic, kind in KINDS.items() if data.startswith(magic)), None)
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}" if kind else None


def _describe_run(folder: Folder) -> dict[str, Any]:
    run = folder.run
    stages = [
        {
            "name": str(one.get("name", "")),
            "seconds": one.get("seconds") or 0.0,
            "pixels": one.get("pixels") or 0,
            "rate": one.get("mpix_per_s"),
        }
        for one in run.get("stages", [])
    ]
    known = {"command", "settings", "versions", "inputs", "stages", "finished", "done", "skipped", "engine"}
    facts = [(key, value) for key, value in run.items() if key not in known and value is not None]
    return {
        "command": folder.command,
        "url": folder.url,
        "stages": stages,
        "settings": sorted(run.get("settings", {}).items()),
        "facts": [*facts, *_engine(run.get("engine"))],
        "inputs": len(run.get("inputs", [])),
        "done": _done(folder),
        "quarantined": run.get("quarantined") or 0,
        "evaluated": run.get("evaluated_mpix_per_s"),
        "delivered": run.get("delivered_mpix_per_s"),
        "memory": run.get("peak_memory_mb"),
    }


def _engine(chosen: Any) -> list[tuple[str, str]]:
    """What ran the network, on what, and how fast each engine was measured there."""
    if not isinstance(chosen, dict):
        return []
    facts = [("engine", f"{chosen.get('engine')} in {chosen.get('precision')}: {chosen.get('why')}")]
    if chosen.get("cpus"):
        facts.append(("cpu", ", ".join(chosen["cpus"])))
    for kind, speeds in (chosen.get("mpix_per_s") or {}).items():
        words = ", ".join(f"{name} {number(one)}" for name, one in sorted(speeds.items(), reverse=True))
        facts.append(("Mpix/s of one task", f"{words} ({kind})"))
    return facts


def _versions(folders: Sequence[Folder]) -> list[tuple[str, str]]:
    """Package and its version, or versions if the folders were made with different ones."""
    seen: dict[str, list[str]] = {}
    for folder in folders:
        for package, version in folder.run.get("versions", {}).items():
            if version not in seen.setdefault(package, []):
                seen[package].append(str(version))
    return [(package, ", ".join(found)) for package, found in sorted(seen.items())]


# Numbers for people


def count(value: float | int) -> str:
    """12345 -> '12 345', with a space that does not break."""
    return f"{int(value):,}".replace(",", "\u202f")


def number(value: float | None) -> str:
    """Three digits that mean something; a dash for what was not measured."""
    if not is_number(value) or value is None:
        return "–"
    if isinstance(value, int) or value == 0 or abs(value) >= 100:
        return count(round(value))
    value = float(f"{value:.3g}")  # first, since 0.9996 is 1.00
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if abs(value) >= 0.01 else f"{value:.2g}"


def between(interval: Sequence[float] | None) -> str:
    """An interval, to stand behind its number: ' [0.742, 0.815]'; nothing for none."""
    return f" [{number(interval[0])}, {number(interval[1])}]" if interval else ""


def percent(value: float | None) -> str:
    return f"{100 * value:.1f} %" if is_number(value) and value is not None else "–"


def duration(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def pretty(value: Any) -> str:
    """A setting as text: strings as they are, all else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
