"""Finished maps: one folder a scene with COGs, a quicklook and a STAC item, published whole or not at all.

```
OUT/collection.json
OUT/<scene_id>/labels.tif  [scores.tif coverage.tif]  quicklook.png  item.json
```

The item is what makes a folder finished: it is written last, names every file's size and sha256, and carries the
digests of the settings and of the input it was made from. A folder without a matching item is done again.
"""

from __future__ import annotations

import datetime as dt
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

import sattile
from sattile import cog, storage
from sattile.grid import Window
from sattile.schema import Scene, SegmentClass
from sattile.stitch import NODATA

ITEM = "item.json"
COLLECTION = "collection.json"
STAGING = "_staging"
"""Folder inside OUT where executors leave finished folders until the driver renames them into place."""

SETTINGS, SOURCE = "sattile:settings", "sattile:source"

EXTENSION = "https://stac-extensions.github.io"
EXTENSIONS = [
    f"{EXTENSION}/projection/v2.0.0/schema.json",
    f"{EXTENSION}/raster/v2.0.0/schema.json",
    f"{EXTENSION}/classification/v1.1.0/schema.json",
    f"{EXTENSION}/file/v2.1.0/schema.json",
    f"{EXTENSION}/processing/v1.2.0/schema.json",
]

UNKNOWN_TIME = ("1970-01-01T00:00:00Z", "2099-12-31T23:59:59Z")
"""STAC wants a start and an end where `datetime` is null; these say "not stated" in what pandas can hold, too."""


@dataclass(frozen=True)
class Product:
    """What is written for each scene.

    Attributes:
        classes: of the labels.
        settings: digest of all settings that shape the pixels.
        scores, coverage: which rasters beside the labels.
        lineage: one sentence for people, the same for every scene.
    """

    classes: tuple[SegmentClass, ...]
    settings: str
    scores: bool = False
    coverage: bool = False
    lineage: str = ""

    def layers(self) -> list[cog.Layer]:
        described = [(one.id, one.name, one.color) for one in self.classes]
        return cog.layers(described, scores=self.scores, coverage=self.coverage)


@dataclass(frozen=True)
class Part:
    """A rectangle of a scene's result; arrays are (height, width[, classes])."""

    window: Window
    labels: np.ndarray
    scores: np.ndarray | None = None
    coverage: np.ndarray | None = None


def pack(values: np.ndarray | None) -> bytes | None:
    """An array's values for the way to the writer, zstd."""
    return None if values is None else zstandard.compress(np.ascontiguousarray(values).tobytes(), 1)


def unpack(data: bytes | None, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    return None if data is None else np.frombuffer(zstandard.decompress(data), dtype).reshape(shape)


def source_digest(scene: Scene) -> str:
    """What tells one version of a scene's input from another: its files' sizes and times, bands and grid."""
    return storage.digest(json.loads(scene.to_json()))


def is_done(out: str, scene: Scene, product: Product) -> bool:
    """Whether this scene's folder holds what would be written now, whole."""
    item = read_item(out, scene.scene_id)
    if item is None:
        return False
    properties = item["properties"]
    if properties.get(SETTINGS) != product.settings or properties.get(SOURCE) != source_digest(scene):
        return False
    wanted = {layer.name for layer in product.layers()}
    return wanted <= set(item["assets"]) and all(
        (entry := storage.stat(storage.join(out, scene.scene_id, asset["href"].removeprefix("./")))) is not None
        and entry.size == asset["file:size"]
        for asset in item["assets"].values()
    )


def read_item(out: str, scene_id: str) -> dict[str, Any] | None:
    """The STAC item of a finished scene; None if there is none that can be read."""
    url = storage.join(out, scene_id, ITEM)
    if not storage.exists(url):
        return None
    try:
        item = json.loads(storage.read_bytes(url))
    except ValueError:
        return None
    return item if isinstance(item, dict) and "properties" in item and "assets" in item else None


def write_scene(scene: Scene, parts: Iterable[Part], product: Product, staged: str, threads: int = 1) -> None:
    """Write one scene's finished folder, item included, to `staged`. Runs on an executor.

    Args:
        scene: whose grid it is.
        parts: rectangles that do not overlap, in any order, each no larger than a task's memory allows; what none of
            them covers is nodata.
        product: what to write.
        staged: URL of the folder, which no other attempt shares.
        threads: that compress.
    """
    layers = product.layers()
    raw = scene.height * scene.width * sum(layer.pixel_bytes for layer in layers)
    # The COG driver copies: for a while the scratch raster, its compressed copy and its overviews lie side by side.
    with storage.scratch(int(raw * 1.7) + 2**20) as folder:
        canvases = [
            cog.Canvas(
                os.path.join(folder, f"{layer.name}.raw.tif"), layer,
                height=scene.height, width=scene.width, crs=scene.crs, transform=scene.transform,
            )
            for layer in layers
        ]  # fmt: skip
        for canvas in canvases:
            canvas.__enter__()
        for part in parts:
            for canvas in canvases:
                values = getattr(part, canvas.layer.name)
                if values is not None:
                    canvas.write(part.window, values)
        for canvas in canvases:
            canvas.__exit__(None, None, None)
        finished = os.path.join(folder, "finished")
        os.makedirs(finished)
        for canvas in canvases:
            cog.to_cog(canvas, os.path.join(finished, f"{canvas.layer.name}.tif"), threads)
        picture = cog.preview(os.path.join(finished, "labels.tif"))
        colors = {one.id: cog.rgb(one.color) for one in product.classes}
        with open(os.path.join(finished, "quicklook.png"), "wb") as file:
            file.write(cog.encode_png(picture, colors))
        item = describe(scene, product, finished)
        storage.upload_folder(finished, staged)
        storage.write_json(storage.join(staged, ITEM), item)


def describe(scene: Scene, product: Product, folder: str) -> dict[str, Any]:
    """The STAC item of one scene's finished files; says nothing of when it was written.

    Args:
        scene: as read.
        product: as written.
        folder: local folder that holds the files.
    """
    geometry = _geometry(scene)
    properties: dict[str, Any] = {
        "datetime": _utc(scene.datetime) if scene.datetime else None,
        "processing:software": {"sattile": sattile.__version__},
        "processing:lineage": product.lineage or "Semantic segmentation",
        SETTINGS: product.settings,
        SOURCE: source_digest(scene),
        **_projection(scene),
    }
    if scene.gsd:
        properties["gsd"] = scene.gsd
    if scene.datetime is None:
        properties["start_datetime"], properties["end_datetime"] = UNKNOWN_TIME
        properties["description"] = "The time of acquisition is not stated: start and end are placeholders."
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": EXTENSIONS,
        "id": scene.scene_id,
        "geometry": geometry,
        "properties": properties,
        "links": [
            {"rel": "root", "href": f"../{COLLECTION}", "type": "application/json"},
            {"rel": "parent", "href": f"../{COLLECTION}", "type": "application/json"},
            {"rel": "collection", "href": f"../{COLLECTION}", "type": "application/json"},
            {"rel": "derived_from", "href": scene.url},
        ],
        "assets": {},
        "collection": "sattile-mosaics",
    }
    if geometry:
        item["bbox"] = _bbox(geometry)
    for layer in product.layers():
        item["assets"][layer.name] = _raster_asset(layer, product, folder)
    item["assets"]["quicklook"] = {
        "href": "./quicklook.png",
        "type": "image/png",
        "title": "Labels in class colours",
        "roles": ["thumbnail"],
        **_file(os.path.join(folder, "quicklook.png")),
    }
    return item


def _raster_asset(layer: cog.Layer, product: Product, folder: str) -> dict[str, Any]:
    titles = {
        "labels": "Class ids",
        "scores": "Scores of the network, one band a class",
        "coverage": "Sum of the integer blend weights of each pixel (crop: 1); 0 without data",
    }
    bits = np.dtype(layer.dtype).itemsize * 8
    asset: dict[str, Any] = {
        "href": f"./{layer.name}.tif",
        "type": "image/tiff; application=geotiff; profile=cloud-optimized",
        "title": titles[layer.name],
        "roles": ["data"] if layer.name == "labels" else ["metadata"],
        "data_type": layer.dtype,
        "raster:bits_per_sample": bits,
        "raster:sampling": "area",
        "bands": [{"name": name} for name in layer.bands],
    }
    if layer.nodata is not None:
        asset["nodata"] = "nan" if math.isnan(layer.nodata) else int(layer.nodata)
    if layer.name == "labels":
        asset["classification:classes"] = [
            {
                "value": one.id,
                # The schema takes letters, digits, - and _ only; the name as it is goes into the title.
                "name": re.sub("[^0-9A-Za-z_-]", "_", one.name) or "_",
                "title": one.name,
                "color_hint": one.color.lstrip("#").upper(),
            }
            for one in product.classes
        ] + [{"value": NODATA, "name": "nodata", "title": "no data", "nodata": True}]
    return asset | _file(os.path.join(folder, f"{layer.name}.tif"))


def _file(path: str) -> dict[str, Any]:
    # Multihash (https://multiformats.io/multihash/): 12 = sha2-256, 20 = 32 bytes.
    return {"file:size": os.path.getsize(path), "file:checksum": "1220" + storage.sha256_file(path)}


def _projection(scene: Scene) -> dict[str, Any]:
    found: dict[str, Any] = {"proj:shape": [scene.height, scene.width], "proj:transform": list(scene.transform)}
    if scene.crs is None:
        return found
    import pyproj

    crs = pyproj.CRS.from_user_input(scene.crs)
    authority = crs.to_authority(min_confidence=100)
    return {"proj:code": ":".join(authority)} | found if authority else {"proj:wkt2": crs.to_wkt()} | found


def _geometry(scene: Scene) -> dict[str, Any] | None:
    if scene.footprint is None:
        return None
    import shapely

    return json.loads(shapely.to_geojson(shapely.from_wkb(scene.footprint)))


def _bbox(geometry: dict[str, Any]) -> list[float]:
    """West, south, east, north; west > east where it crosses the antimeridian (RFC 7946, 5.2)."""
    import shapely

    shape = shapely.from_geojson(json.dumps(geometry))
    west, south, east, north = shape.bounds
    if west <= -180 and east >= 180 and shape.geom_type == "MultiPolygon":
        eastern = [part.bounds for part in shape.geoms if part.bounds[2] >= 180]
        western = [part.bounds for part in shape.geoms if part.bounds[2] < 180]
        if eastern and western:
            west, east = min(bounds[0] for bounds in eastern), max(bounds[2] for bounds in western)
    return [west, south, east, north]


def publish(staged: str, out: str, scene_id: str) -> None:
    """Make a staged folder visible as `out/scene_id`. Runs on the driver, which holds the lease.

    The first time this is one rename. A folder can't be renamed onto a full one: there the item goes first, so that
    the folder counts as unfinished, then each file is replaced by a rename, and the new item comes last.
    """
    target = storage.join(out, scene_id)
    if not storage.exists(target):
        storage.rename(staged, target)
        return
    storage.remove(storage.join(target, ITEM))
    new = {storage.name(entry.url) for entry in storage.list_folder(staged)}
    for entry in storage.list_folder(target):
        if storage.name(entry.url) not in new:
            storage.remove(entry.url)
    for name in sorted(new - {ITEM}):
        storage.rename(storage.join(staged, name), storage.join(target, name))
    storage.rename(storage.join(staged, ITEM), storage.join(target, ITEM))
    storage.remove(staged)


def finished(out: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scene ids and STAC items of all finished folders of `out`, by name."""
    for entry in storage.list_folder(out):
        name = storage.name(entry.url)
        if entry.is_folder and name != STAGING:
            item = read_item(out, name)
            if item is not None and SETTINGS in item["properties"]:
                yield name, item


def write_collection(out: str, product: Product) -> None:
    """Write `collection.json` over all that lies finished in `out`; nothing is written if it would not change."""
    items = list(finished(out))
    boxes = [item["bbox"] for _, item in items if "bbox" in item]
    times = sorted({item["properties"]["datetime"] for _, item in items if item["properties"]["datetime"]})
    collection = {
        "type": "Collection",
        "stac_version": "1.1.0",
        "id": "sattile-mosaics",
        "title": "Labels of scenes",
        "description": product.lineage or "Semantic segmentation of satellite scenes by sattile.",
        "license": "other",
        "extent": {
            "spatial": {"bbox": _extents(boxes)},
            "temporal": {"interval": [[_utc(times[0]), _utc(times[-1])] if times else [None, None]]},
        },
        "links": [
            {"rel": "root", "href": f"./{COLLECTION}", "type": "application/json"},
            *(
                {"rel": "item", "href": f"./{name}/{ITEM}", "type": "application/geo+json", "title": name}
                for name, _ in items
            ),
        ],
    }
    text = json.dumps(collection, indent=2, ensure_ascii=False) + "\n"
    url = storage.join(out, COLLECTION)
    if not storage.exists(url) or storage.read_bytes(url) != text.encode():
        storage.write_text(url, text)


def _extents(boxes: Sequence[list[float]]) -> list[list[float]]:
    """The whole first, as STAC wants; a box across the antimeridian makes it the whole circle."""
    if not boxes:
        return [[-180.0, -90.0, 180.0, 90.0]]
    crossing = any(box[0] > box[2] for box in boxes)
    west, east = (-180.0, 180.0) if crossing else (min(box[0] for box in boxes), max(box[2] for box in boxes))
    return [[west, min(box[1] for box in boxes), east, max(box[3] for box in boxes)]]


def _utc(text: str) -> str:
    moment = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (
        (moment if moment.tzinfo else moment.replace(tzinfo=dt.UTC))
        .astimezone(dt.UTC)
        .isoformat()
        .replace("+00:00", "Z")
    )
