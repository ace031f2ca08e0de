"""Finished maps: one folder a scene with COGs, a quicklook and a STAC item, published whole or not at all.

```
OUT/collection.json
OUT/<scene_id>/labels.tif  labels.tif.aux.xml  labels.qml  [scores.tif coverage.tif]  quicklook.png  item.json
```

On a common grid there is a folder a sheet, named by the sheet's row and column, with `scenes.tif` (how many scenes a
pixel comes from) beside `coverage.tif`; `OUT/labels.vrt` (one for each raster) and `OUT/overview.png` show all sheets,
`OUT/labels.qml` styles the VRT.

The item is what makes a folder finished: it is written last, names every file's size and sha256, and carries the
digests of the settings and of the input it was made from. A folder without a matching item is done again. The sidecars
(`labels.tif.aux.xml`, `labels.qml`) are no part of that: GIS programs write into such files as they please. They are
written again where they are missing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zstandard

import sattile
from sattile import cog, sidecars, storage
from sattile.grid import Window, hull
from sattile.schema import Scene, SegmentClass
from sattile.stac import EXTENSION, UNDATED, bbox, checksum, classes_of, stated_times, time_properties, utc
from sattile.stitch import NODATA

ITEM = "item.json"
COLLECTION = "collection.json"
STAGING = "_staging"
"""Folder inside OUT where executors leave finished folders until the driver renames them into place."""

SETTINGS, SOURCE = "sattile:settings", "sattile:source"

WINDOW = "sattile:window"
"""Of a sheet: row, column, height and width in its grid."""

Affine6 = tuple[float, float, float, float, float, float]

EXTENSIONS = [
    f"{EXTENSION}/projection/v2.0.0/schema.json",
    f"{EXTENSION}/raster/v2.0.0/schema.json",
    f"{EXTENSION}/classification/v1.1.0/schema.json",
    f"{EXTENSION}/file/v2.1.0/schema.json",
    f"{EXTENSION}/processing/v1.2.0/schema.json",
]


@dataclass(frozen=True)
class Product:
    """What is written for each map.

    Attributes:
        classes: of the labels.
        settings: digest of all settings that shape the pixels.
        scores, coverage: which rasters beside the labels.
        lineage: one sentence for people, the same for every map.
        on_grid: maps are sheets of a common grid.
    """

    classes: tuple[SegmentClass, ...]
    settings: str
    scores: bool = False
    coverage: bool = False
    lineage: str = ""
    on_grid: bool = False

    def layers(self) -> list[cog.Layer]:
        described = [(one.id, one.name, one.color) for one in self.classes]
        return cog.layers(described, scores=self.scores, coverage=self.coverage, scenes=self.on_grid and self.coverage)


@dataclass(frozen=True)
class Target:
    """What one map is of: a scene, or a sheet of a grid that many scenes share.

    Attributes:
        name: of its folder.
        height, width, crs, transform, gsd, footprint, datetime: as of `schema.Scene`.
        source: digest of the input; with the product's settings it decides whether the map is up to date.
        interval: first and last acquisition, ISO 8601 in UTC, where they are not the same.
        links: URLs that it is derived from.
        properties: more to say in its item.
    """

    name: str
    height: int
    width: int
    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    gsd: float | None
    footprint: bytes | None
    datetime: str | None
    source: str
    interval: tuple[str, str] | None = None
    links: tuple[str, ...] = ()
    properties: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, scene: Scene) -> Target:
        return cls(
            scene.scene_id, scene.height, scene.width, scene.crs, scene.transform, scene.gsd, scene.footprint,
            scene.datetime, source_digest(scene), scene.interval, links=(scene.url,),
        )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A rectangle of a map; arrays are (height, width[, classes])."""

    window: Window
    labels: np.ndarray
    scores: np.ndarray | None = None
    coverage: np.ndarray | None = None
    scenes: np.ndarray | None = None


def pack(values: np.ndarray | None) -> bytes | None:
    """An array's values for the way to the writer, zstd."""
    return None if values is None else zstandard.compress(np.ascontiguousarray(values).tobytes(), 1)


def unpack(data: bytes | None, dtype: str, shape: tuple[int, ...]) -> np.ndarray | None:
    return None if data is None else np.frombuffer(zstandard.decompress(data), dtype).reshape(shape)


def source_digest(scene: Scene) -> str:
    """What tells one version of a scene's input from another: its files' sizes and times, bands and grid."""
    return storage.digest(json.loads(scene.source_json()))


def is_done(out: str, target: Target, product: Product) -> bool:
    """Whether this map's folder holds what would be written now, whole."""
    return done_item(out, target.name, target.source, product) is not None


def done_item(out: str, name: str, source: str, product: Product) -> dict[str, Any] | None:
    """The item of a map that is whole, and made from this source with these settings."""
    item = read_item(out, name)
    if item is None:
        return None
    properties = item["properties"]
    if properties.get(SETTINGS) != product.settings or properties.get(SOURCE) != source:
        return None
    wanted = {layer.name for layer in product.layers()}
    whole = wanted <= set(item["assets"]) and all(
        (entry := storage.stat(storage.join(out, name, asset["href"].removeprefix("./")))) is not None
        and entry.size == asset["file:size"]
        for asset in item["assets"].values()
    )
    return item if whole else None


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


def write_map(target: Target, parts: Iterable[Part], product: Product, staged: str, threads: int = 1) -> None:
    """Write one map's finished folder, item included, to `staged`. Runs on an executor.

    Args:
        target: what it is of.
        parts: rectangles that do not overlap, in any order, each no larger than a task's memory allows; what none of
            them covers is nodata.
        product: what to write.
        staged: URL of the folder, which no other attempt shares.
        threads: that compress.
    """
    layers = product.layers()
    raw = target.height * target.width * sum(layer.pixel_bytes for layer in layers)
    # The COG driver copies: for a while the scratch raster, its compressed copy and its overviews lie side by side.
    with storage.scratch(int(raw * 1.7) + 2**20) as folder:
        canvases = [
            cog.Canvas(
                os.path.join(folder, f"{layer.name}.raw.tif"), layer,
                height=target.height, width=target.width, crs=target.crs, transform=target.transform,
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
        times = stated_times(time_properties(target.datetime, target.interval))
        for name, data in _sidecars(product.classes, times).items():
            with open(os.path.join(finished, name), "wb") as file:
                file.write(data)
        item = describe(target, product, finished)
        storage.upload_folder(finished, staged)
        storage.write_json(storage.join(staged, ITEM), item)


def describe(target: Target, product: Product, folder: str) -> dict[str, Any]:
    """The STAC item of one map's finished files; says nothing of when it was written.

    Args:
        target: what it is of.
        product: as written.
        folder: local folder that holds the files.
    """
    geometry = _geometry(target)
    properties: dict[str, Any] = {
        **time_properties(target.datetime, target.interval),
        "processing:software": {"sattile": sattile.__version__},
        "processing:lineage": product.lineage or "Semantic segmentation",
        SETTINGS: product.settings,
        SOURCE: target.source,
        **_projection(target),
    }
    if target.gsd:
        properties["gsd"] = target.gsd
    properties |= target.properties
    if UNDATED in properties:
        properties["description"] = "The time of acquisition is not stated: start and end are placeholders."
    item: dict[str, Any] = {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": EXTENSIONS,
        "id": target.name,
        "geometry": geometry,
        "properties": properties,
        "links": [
            {"rel": "root", "href": f"../{COLLECTION}", "type": "application/json"},
            {"rel": "parent", "href": f"../{COLLECTION}", "type": "application/json"},
            {"rel": "collection", "href": f"../{COLLECTION}", "type": "application/json"},
            *({"rel": "derived_from", "href": url} for url in target.links),
        ],
        "assets": {},
        "collection": "sattile-mosaics",
    }
    if geometry:
        item["bbox"] = bbox(geometry)
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


def _sidecars(classes: Sequence[SegmentClass], times: Mapping[str, str]) -> dict[str, bytes]:
    """{name: content} of what lies beside `labels.tif`; it follows from the map's item alone."""
    return {sidecars.PAM: sidecars.pam(classes, times), sidecars.STYLE: sidecars.style(classes)}


TIMES = ("datetime", "start_datetime", "end_datetime")


def amend(out: str, name: str, item: dict[str, Any], target: Target | None = None) -> None:
    """Write anew what a finished map says of itself, as far as that is missing or no longer so; its pixels stay.

    A sidecar into which another program has written (statistics, say) stays as long as it names the classes.

    Args:
        item: the map's own.
        target: what is known of it now, if anything is: where its time is another one, the item is written, too.
    """
    folder = storage.join(out, name)
    if target and item["properties"].get(SOURCE) == target.source:
        times = time_properties(target.datetime, target.interval)
        if any(item["properties"].get(one) != times.get(one) for one in TIMES):
            kept = {one: value for one, value in item["properties"].items() if one not in TIMES}
            item = item | {"properties": kept | times}
            storage.remove(storage.join(folder, sidecars.PAM))  # it states the time, too
            storage.write_json(storage.join(folder, ITEM), item)
    classes = [
        SegmentClass(one["value"], one["title"], f"#{one['color_hint'].lower()}")
        for one in item["assets"].get("labels", {}).get("classification:classes", [])
        if not one.get("nodata")
    ]
    for file, data in _sidecars(classes, stated_times(item["properties"])).items():
        url = storage.join(folder, file)
        entry = storage.stat(url)
        # Of the size that it would have it is ours, and need not be read.
        sound = entry is not None and (file == sidecars.STYLE or entry.size == len(data))
        if not sound and not (entry and sidecars.names_classes(storage.read_bytes(url), classes)):
            storage.write_bytes(url, data)


def _raster_asset(layer: cog.Layer, product: Product, folder: str) -> dict[str, Any]:
    titles = {
        "labels": "Class ids",
        "scores": "Scores of the network, one band a class",
        "coverage": "Sum of the integer weights of each pixel; 0 without data",
        "scenes": "How many scenes each pixel comes from",
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
        nodata = {"value": NODATA, "name": "nodata", "title": "no data", "nodata": True}
        asset["classification:classes"] = [*classes_of(product.classes), nodata]
    return asset | _file(os.path.join(folder, f"{layer.name}.tif"))


def _file(path: str) -> dict[str, Any]:
    return {"file:size": os.path.getsize(path), "file:checksum": checksum(storage.sha256_file(path))}


def _projection(target: Target) -> dict[str, Any]:
    found: dict[str, Any] = {"proj:shape": [target.height, target.width], "proj:transform": list(target.transform)}
    if target.crs is None:
        return found
    import pyproj

    crs = pyproj.CRS.from_user_input(target.crs)
    authority = crs.to_authority(min_confidence=100)
    return {"proj:code": ":".join(authority)} | found if authority else {"proj:wkt2": crs.to_wkt()} | found


def _geometry(target: Target) -> dict[str, Any] | None:
    if target.footprint is None:
        return None
    import shapely

    return json.loads(shapely.to_geojson(shapely.from_wkb(target.footprint)))


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


def unpublish(out: str, name: str) -> None:
    """Remove a map: its item first, so that what is half removed is no map."""
    storage.remove(storage.join(out, name, ITEM))
    storage.remove(storage.join(out, name))


def finished(out: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Scene ids and STAC items of all finished folders of `out`, by name."""
    for entry in storage.list_folder(out):
        name = storage.name(entry.url)
        if entry.is_folder and name != STAGING:
            item = read_item(out, name)
            if item is not None and SETTINGS in item["properties"]:
                yield name, item


def write_collection(out: str, product: Product, *, empty: bool = True) -> None:
    """Write `collection.json` over all that lies finished in `out`; nothing is written if it would not change.

    Args:
        empty: also the first one, of nothing.
    """
    items = list(finished(out))
    boxes = [item["bbox"] for _, item in items if "bbox" in item]
    times = sorted(
        {one for _, item in items for one in stated_times(item["properties"]).values()},
        key=utc,
    )
    collection = {
        "type": "Collection",
        "stac_version": "1.1.0",
        "id": "sattile-mosaics",
        "title": "Sheets of labels on one grid" if product.on_grid else "Labels of scenes",
        "description": product.lineage or "Semantic segmentation of satellite scenes by sattile.",
        "license": "other",
        "extent": {
            "spatial": {"bbox": _extents(boxes)},
            "temporal": {"interval": [[utc(times[0]), utc(times[-1])] if times else [None, None]]},
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
    if not items and not empty and not storage.exists(url):
        return
    if not storage.exists(url) or storage.read_bytes(url) != text.encode():
        storage.write_text(url, text)


def _extents(boxes: Sequence[list[float]]) -> list[list[float]]:
    """The whole first, as STAC wants; it crosses the antimeridian (west > east) where that is the shorter way."""
    if not boxes:
        return [[-180.0, -90.0, 180.0, 90.0]]
    west, east = _longitudes([(box[0], box[2]) for box in boxes])
    return [[west, min(box[1] for box in boxes), east, max(box[3] for box in boxes)]]


def _longitudes(spans: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The shortest span that holds all; one with west > east crosses the antimeridian."""
    ordered = sorted((west, east if east >= west else east + 360) for west, east in spans)
    ordered.append((ordered[0][0] + 360, ordered[0][0] + 360))
    end, gaps = ordered[0][1], []
    for west, east in ordered[1:]:
        gaps.append((west - end, end, west))
        end = max(end, east)
    gap, last, first = max(gaps)
    if gap <= 0:
        return -180.0, 180.0
    return tuple(one if -180 <= one <= 180 else (one + 180) % 360 - 180 for one in (first, last))  # type: ignore[return-value]


# --- all sheets of a grid as one ----------------------------------------------------------------------------------


VRT_TYPES = {"uint8": "Byte", "uint16": "UInt16", "uint32": "UInt32", "float32": "Float32"}

RASTERS = ("labels", "scores", "coverage", "scenes")
OVERVIEW = "overview.png"
OWN = frozenset({COLLECTION, OVERVIEW, sidecars.STYLE, *(f"{one}.vrt" for one in RASTERS), "vectors.parquet"})
"""What lies beside the folders of maps."""

OVERVIEW_EDGE = 2048


def write_whole(out: str, product: Product, grid: Affine6, whole: Window | None = None) -> None:
    """Over all finished sheets of `out`: a VRT for each raster, which GIS programs open as one, a style, and a picture.

    Args:
        grid: affine coefficients of the grid's pixel (0, 0).
        whole: the pixels to show; those of the sheets if not given.
    """
    names = [layer.name for layer in product.layers()]
    for name in RASTERS:
        if name not in names and storage.exists(storage.join(out, f"{name}.vrt")):
            storage.remove(storage.join(out, f"{name}.vrt"))
    sheets = [(name, item) for name, item in finished(out) if item["properties"][SETTINGS] == product.settings]
    if not sheets:
        remove_whole(out)
        return
    windows = {name: Window(*item["properties"][WINDOW]) for name, item in sheets}
    shown = whole or hull(windows.values())
    row, col = shown.row, shown.col
    a, b, c, d, e, f = grid
    transform = c + a * col + b * row, a, b, f + d * col + e * row, d, e
    crs = sheets[0][1]["properties"].get("proj:code") or sheets[0][1]["properties"].get("proj:wkt2", "")
    for layer in product.layers():
        classes = product.classes if layer.name == "labels" else ()
        vrt = _vrt(layer, classes, shown, windows, crs, transform)
        changed = _write_changed(storage.join(out, f"{layer.name}.vrt"), vrt.encode())
        style = storage.join(out, sidecars.STYLE)
        if classes and (changed or not storage.exists(style)):
            storage.write_bytes(style, sidecars.style(classes))
    colors = {one.id: cog.rgb(one.color) for one in product.classes}
    _write_changed(storage.join(out, OVERVIEW), cog.encode_png(_overview(out, shown, windows), colors))


def remove_whole(out: str) -> None:
    """Remove what `write_whole` wrote."""
    for name in (*(f"{one}.vrt" for one in RASTERS), OVERVIEW, sidecars.STYLE):
        storage.remove(storage.join(out, name))


def _vrt(
    layer: cog.Layer, classes: Sequence[SegmentClass], shown: Window, windows: dict[str, Window], crs: str,
    transform: Sequence[float],
) -> str:  # fmt: skip
    from xml.etree import ElementTree as Xml

    kind = VRT_TYPES[layer.dtype]
    root = Xml.Element("VRTDataset", rasterXSize=str(shown.width), rasterYSize=str(shown.height))
    Xml.SubElement(root, "SRS").text = crs  # without a mapping of axes, GDAL takes x first, as everywhere here
    Xml.SubElement(root, "GeoTransform").text = ", ".join(f"{value:.17g}" for value in transform)
    for number, description in enumerate(layer.bands, start=1):
        band = Xml.SubElement(root, "VRTRasterBand", dataType=kind, band=str(number))
        Xml.SubElement(band, "Description").text = description
        if layer.nodata is not None:
            Xml.SubElement(band, "NoDataValue").text = f"{layer.nodata:g}"
        if classes:
            band.extend(sidecars.band_elements(classes))
        for name, window in sorted(windows.items()):
            source = Xml.SubElement(band, "SimpleSource")
            Xml.SubElement(source, "SourceFilename", relativeToVRT="1").text = f"{name}/{layer.name}.tif"
            Xml.SubElement(source, "SourceBand").text = str(number)
            size = {"xSize": str(window.width), "ySize": str(window.height)}
            described = {"RasterXSize": size["xSize"], "RasterYSize": size["ySize"], "DataType": kind}
            tiles = {"BlockXSize": str(cog.TILE), "BlockYSize": str(cog.TILE)}
            Xml.SubElement(source, "SourceProperties", described | tiles)
            Xml.SubElement(source, "SrcRect", {"xOff": "0", "yOff": "0"} | size)
            place = {"xOff": str(window.col - shown.col), "yOff": str(window.row - shown.row)}
            Xml.SubElement(source, "DstRect", place | size)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode") + "\n"


def _overview(out: str, shown: Window, windows: dict[str, Window]) -> np.ndarray:
    """All quicklooks on one sheet of paper: (height, width) uint8, class ids."""
    scale = max(shown.height / OVERVIEW_EDGE, shown.width / OVERVIEW_EDGE, 1.0)
    paper = np.full((max(round(shown.height / scale), 1), max(round(shown.width / scale), 1)), NODATA, np.uint8)
    for name, window in sorted(windows.items()):
        picture = cog.read_png(storage.read_bytes(storage.join(out, name, "quicklook.png")))
        first = round((window.row - shown.row) / scale), round((window.col - shown.col) / scale)
        last = round((window.stop_row - shown.row) / scale), round((window.stop_col - shown.col) / scale)
        height = max(min(last[0], paper.shape[0]) - first[0], 0)
        width = max(min(last[1], paper.shape[1]) - first[1], 0)
        rows = np.minimum((np.arange(height) + 0.5) * picture.shape[0] / max(height, 1), picture.shape[0] - 1)
        cols = np.minimum((np.arange(width) + 0.5) * picture.shape[1] / max(width, 1), picture.shape[1] - 1)
        part = picture[rows.astype(int)][:, cols.astype(int)]
        paper[first[0] : first[0] + height, first[1] : first[1] + width] = part
    return paper


def _write_changed(url: str, data: bytes) -> bool:
    """Whether it had to be written."""
    same = storage.exists(url) and storage.read_bytes(url) == data
    if not same:
        storage.write_bytes(url, data)
    return not same
