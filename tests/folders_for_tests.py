"""Folders that earlier code made, moved to another place: what was recorded there is as if it had been made here.

What was made follows from where its inputs lie and when they were written: run records, catalogues and items hold
URLs, and digests are taken over them. Moving folders replaces the URLs, and those digests. Their formulas stand here
as they were when the folders were made, and use none of sattile's code: where sattile's change, what people have is
made anew, and `test_folders` says so.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from pathlib import Path
from typing import Any

import geopandas
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

FOLDER = Path(__file__).parent / "fixtures" / "folders"
ROOT = "/archive/2026"
"""Where the folders say that they lie."""

INPUTS = ("scenes", "labels", "ground.geojson", "area.geojson", "pairs.csv")
TIME = 1_772_706_600_123_456_789
"""When all inputs were written, in ns: what git does not keep."""

SCENES = ("east", "north", "south", "west")
TILES = {"size": 16, "cell": 2, "buffer": 0}
TRAINING = {"arch": "pixel-mlp", "batch_size": 4, "learning_rate": 0.02}

COMMANDS: dict[str, tuple[str, dict[str, Any]]] = {
    "run": (
        "run",
        {
            "scenes": [f"{ROOT}/scenes"], "labels": f"{ROOT}/labels", "classes": "land=0,water=1,wood=2",
            "settings": {
                "tile": {**TILES, "split": "scene"}, "train": {**TRAINING, "epochs": 8}, "evaluate": {"samples": 1},
            },
        },
    ),
    "shapes": (
        "tile",
        {
            "scenes": [f"{ROOT}/run/catalog"], "labels": f"{ROOT}/ground.geojson", "attribute": "cover",
            "aoi": f"{ROOT}/area.geojson", "background": "land", **TILES,
        },
    ),
    "pairs": ("tile", {"pairs": f"{ROOT}/pairs.csv", "classes": "land,water,wood", **TILES}),
    "half": ("train", {"dataset": f"{ROOT}/run/tiles", **TRAINING, "epochs": 12}),
    "evaluation": (
        "evaluate",
        {
            "model": f"{ROOT}/run/model", "scenes": [f"{ROOT}/run/catalog"], "labels": f"{ROOT}/ground.geojson",
            "attribute": "cover", "samples": 1,
        },
    ),
    "maps": (
        "predict",
        {
            "model": f"{ROOT}/run/model", "scenes": [f"{ROOT}/scenes/{name}.tif" for name in ("east", "north")],
            "merge": "blend", "size": 32, "stride": 16, "coverage": True,
            "aoi": f"{ROOT}/area.geojson",
        },
    ),
    "sheets": (
        "predict",
        {
            "model": f"{ROOT}/run/model", "scenes": [f"{ROOT}/run/catalog"], "grid": "EPSG:32632@10", "sheet": 512,
            "coverage": True, "vectors": "water,wood",
        },
    ),
    "nightly": (
        "reprocess",
        {
            "model": f"{ROOT}/run/model", "scenes": [f"{ROOT}/scenes"],
            "settings": {"predict": {"aoi": f"{ROOT}/area.geojson"}},
        },
    ),
}  # fmt: skip
"""By folder, in the order in which they are made: the command, and its options but `out`."""


def command(name: str, root: str) -> tuple[str, dict[str, Any]]:
    """The command that made a folder, and its options, for folders that lie at `root`."""
    which, options = COMMANDS[name]
    return which, {**json.loads(json.dumps(options).replace(ROOT + "/", root + "/")), "out": f"{root}/{name}"}


def set_times(folder: Path) -> None:
    """Give all inputs the time that identities name."""
    for name in INPUTS:
        path = folder / name
        for one in sorted(path.iterdir()) if path.is_dir() else [path]:
            os.utime(one, ns=(TIME, TIME))


def move(folder: Path, old: str, new: str) -> None:
    """Have folders that were made at `old` say that they were made at `new`.

    Args:
        folder: where they are now; changed in place.
    """
    texts = {path: path.read_text() for path in sorted(folder.rglob("*")) if path.is_file() and _is_text(path)}
    digests = _digests(folder, texts, old, new)
    for path, text in texts.items():
        moved = text.replace(old + "/", new + "/")
        for before, after in digests.get(path, {}).items():
            assert moved.count(before) == 1, f"{path}: {before}"
            moved = moved.replace(before, after)
        if moved != text:
            path.write_text(moved)
    for path in sorted(folder.rglob("scenes.parquet")):
        path.write_bytes(_moved_catalogue(path.read_bytes(), old, new))


def _is_text(path: Path) -> bool:
    return path.suffix in (".json", ".md", ".vrt", ".html", ".csv")


def _moved_catalogue(content: bytes, old: str, new: str) -> bytes:
    """The same bytes as if it had been written there by this pyarrow."""
    read = pq.read_table(io.BytesIO(content))
    arrays, fields = [], []
    for field in read.schema:
        # Reading calls an element of a list otherwise than `pa.list_` does, and pyarrow writes down which it was.
        kind = pa.list_(field.type.value_type) if pa.types.is_list(field.type) else field.type
        values = read[field.name].to_pylist()
        if field.name in ("url", "urls", "scene"):
            one_by_one = [value if isinstance(value, list) else [value] for value in values]
            moved = [[text.replace(f"{old}/", f"{new}/") for text in texts] for texts in one_by_one]
            values = moved if kind == pa.list_(pa.string()) else [text for texts in moved for text in texts]
        arrays.append(pa.array(values, kind))
        fields.append(pa.field(field.name, kind))
    sink = pa.BufferOutputStream()
    schema = pa.schema(fields, metadata=read.schema.metadata)
    pq.write_table(pa.Table.from_arrays(arrays, schema=schema), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


# --- digests that URLs and times enter, as they were taken -------------------------------------------------------


def _digests(folder: Path, texts: dict[Path, str], old: str, new: str) -> dict[Path, dict[str, str]]:
    """{file: {digest at `old`: the same at `new`}} of all that the folders hold."""
    catalogue = pq.read_table(folder / "run" / "catalog" / "scenes.parquet", columns=["scene_id", "scene"]).to_pydict()
    scenes = dict(zip(catalogue["scene_id"], catalogue["scene"], strict=True))
    found: dict[Path, dict[str, str]] = {}
    for path, text in texts.items():
        value = json.loads(text) if path.suffix == ".json" else {}
        if path.name == "dataset.json":
            fixed = path.parent == folder / "pairs"
            made = [_state_of_tiles(folder, value, old, root, fixed=fixed) for root in (old, new)]
        elif path.name == "metrics.json" and path.parent.name == "evaluation" and path.parent.parent == folder:
            made = [_state_of_evaluation(folder, scenes, old, root) for root in (old, new)]
        elif path.name == "item.json" and "sattile:source" in value["properties"]:
            made = [_source_of_map(value, scenes, old, root) for root in (old, new)]
        else:
            continue
        found[path] = {made[0]: made[1]}
    return found


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


SCENE = (
    "scene_id", "url", "height", "width", "bands", "crs", "transform", "gsd", "datetime", "footprint", "identity",
)  # fmt: skip
BAND = ("name", "url", "index", "dtype", "nodata", "scale", "offset", "forced")


def scene_text(text: str, old: str, new: str) -> str:
    """A scene as a catalogue writes it, which was `old` there."""
    value = json.loads(text.replace(f"{old}/", f"{new}/"))
    value["bands"] = [{name: band[name] for name in BAND} for band in value["bands"]]
    return json.dumps({name: value[name] for name in SCENE})


def _source_of_map(item: dict[str, Any], scenes: dict[str, str], old: str, new: str) -> str:
    """Of one scene; of a sheet, all scenes that reach it by their ids, and its window."""
    urls = [link["href"] for link in item["links"] if link["rel"] == "derived_from"]
    used = [json.loads(scene_text(scenes[Path(url).stem], old, new)) for url in sorted(urls)]
    window = item["properties"].get("sattile:window")
    return digest([used, window] if window else used[0])


def _state_of_tiles(folder: Path, dataset: dict[str, Any], old: str, new: str, *, fixed: bool) -> str:
    """Each scene's version and that of its labels; splits that a pairs file fixes; the area of interest as its repr."""
    sources = [
        {name: one[name] for name in ("scene_id", "url", "identity", "labels")} for one in dataset["sources"]
    ]  # fmt: skip
    moved = json.loads(json.dumps(sources).replace(f"{old}/", f"{new}/"))
    area, aoi = "None", dataset["settings"]["aoi"]
    if aoi:
        shapes = geopandas.read_file(folder / Path(aoi).name, engine="pyogrio")
        wkb = tuple(shapely.to_wkb(shapes.geometry.values))
        url, crs = aoi.replace(f"{old}/", f"{new}/"), shapes.crs.to_wkt()
        values, numbers = ("",) * len(wkb), tuple(range(1, len(wkb) + 1))
        area = f"Features(url={url!r}, crs={crs!r}, wkb={wkb!r}, values={values!r}, numbers={numbers!r})"
    return digest([moved, dataset["split_rule"]["fixed"] if fixed else {}, area])


def _state_of_evaluation(folder: Path, scenes: dict[str, str], old: str, new: str) -> str:
    """Scenes as their JSON, and the versions of each and of its labels."""
    texts = [scene_text(scenes[name], old, new) for name in sorted(scenes)]
    labels = {f"{new}/ground.geojson": [(folder / "ground.geojson").stat().st_size, TIME]}
    return digest([texts, [[json.loads(text)["identity"], labels] for text in texts]])


def no_roots(folder: Path, root: str) -> list[str]:
    """Files whose bytes name a place other than as `move` replaces it."""
    named = re.compile(re.escape(root.encode()))
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not _is_text(path) and path.name != "scenes.parquet" and named.search(path.read_bytes())
    ]
