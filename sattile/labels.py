"""Labels of a scene: which file, which class, and how they look on the scene's grid.

Labels are rasters (any grid; resampled nearest) or vectors (GeoJSON, GeoPackage, shapefile; a class from an
attribute; drawn onto the scene's grid). Wherever nothing is said, a pixel is unlabelled (`schema.IGNORE`).
"""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from sattile import storage
from sattile.errors import Refused, UsageError
from sattile.grid import Window
from sattile.schema import IGNORE, Refusal, Scene, SegmentClass, colored, unnamed_classes

if TYPE_CHECKING:
    import shapely

log = logging.getLogger("sattile")

# By what each kind begins: GDAL would take a file for what it holds, and a VRT may pull in other files and addresses.
_BEGINNINGS = {
    ".geojson": b"{", ".json": b"{", ".gpkg": b"SQLite format 3\0", ".shp": b"\0\0\x27\x0a", ".fgb": b"fgb",
    ".parquet": b"PAR1",
}  # fmt: skip
VECTORS = tuple(_BEGINNINGS)
RASTERS = (".tif", ".tiff", ".jp2")


@dataclass(frozen=True)
class LabelSource:
    """Where one scene's labels come from; travels to executors.

    Attributes:
        url: the file.
        ids: the class ids it may hold; None takes whatever it holds.
        ignore: values of a raster that mean "unlabelled", besides its nodata.
        shapes: for vectors: those that touch the scene and their class ids, in the file's order, as `shapes.pack` has
            them: later ones win.
        crs: of the shapes.
        background: class of pixels outside all shapes; None leaves them unlabelled.
    """

    url: str
    ids: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = (IGNORE,)
    shapes: bytes | None = None
    crs: str | None = None
    background: int | None = None

    def identity(self) -> dict[str, list[int]]:
        """{url: [size, mtime in ns]} of the file, as it is now; of a shapefile, also of those beside it."""
        stem, suffix = os.path.splitext(self.url)
        beside = [stem + one for one in (".dbf", ".prj", ".cpg")] if suffix.lower() == ".shp" else []
        entries = {url: storage.stat(url) for url in (self.url, *beside)}
        found = {url: [entry.size, entry.mtime] for url, entry in entries.items() if entry}
        return found or {self.url: [0, 0]}


@dataclass(frozen=True)
class Matched:
    """Scenes with their labels.

    Attributes:
        sources: by scene id.
        refused: scenes that have none.
        classes: known beforehand (named by the user, or from an attribute), else None.
    """

    sources: Mapping[str, LabelSource]
    refused: tuple[Refusal, ...]
    classes: tuple[SegmentClass, ...] | None


def match(
    labels: str,
    scenes: Sequence[Scene],
    *,
    classes: tuple[SegmentClass, ...] | None = None,
    attribute: str | None = None,
    ignore: Sequence[int] = (),
    background: str | None = None,
) -> Matched:
    """Find the labels of each scene.

    Args:
        labels: one file, matched by location, or a folder with a file named after each scene_id.
        scenes: those to label.
        classes: as named by the user.
        attribute: of vectors, the one that says the class; without it, all shapes are of the last class.
        ignore: raster values that mean "unlabelled".
        background: class (name or id) of pixels outside all shapes.

    Raises:
        UsageError: if `labels` does not exist, or a vector's attribute or classes are not as said.
    """
    labels = storage.absolute(labels)
    entry = storage.stat(labels)
    if entry is None:
        raise UsageError(f"--labels {labels} does not exist")
    if not entry.is_folder:
        return match_pairs({scene.scene_id: labels for scene in scenes}, scenes, classes=classes, attribute=attribute,
                           ignore=ignore, background=background)  # fmt: skip
    by_stem: dict[str, list[str]] = {}
    for file in storage.list_folder(labels):
        stem, suffix = os.path.splitext(storage.name(file.url))
        if suffix.lower() in VECTORS + RASTERS:
            by_stem.setdefault(stem, []).append(file.url)
    if not by_stem:
        raise UsageError(f"--labels {labels} holds no label files ({', '.join(RASTERS + VECTORS)})")
    found = {
        scene.scene_id: by_stem[scene.scene_id][0] for scene in scenes if len(by_stem.get(scene.scene_id, ())) == 1
    }
    matched = match_pairs(found, [scene for scene in scenes if scene.scene_id in found], classes=classes,
                          attribute=attribute, ignore=ignore, background=background)  # fmt: skip
    missing = []
    for scene in scenes:
        several = by_stem.get(scene.scene_id, ())
        if several and scene.scene_id not in found:
            missing.append(Refusal(scene.url, "labels", f"has several label files: {', '.join(several)}; leave one"))
        elif not several:
            reason = f"no labels: {labels} has no file named {scene.scene_id}.tif (or .geojson, ...)"
            missing.append(Refusal(scene.url, "labels", reason))
    return Matched(matched.sources, (*matched.refused, *missing), matched.classes)


def match_pairs(
    urls: Mapping[str, str],
    scenes: Sequence[Scene],
    *,
    classes: tuple[SegmentClass, ...] | None = None,
    attribute: str | None = None,
    ignore: Sequence[int] = (),
    background: str | None = None,
) -> Matched:
    """The labels of scenes whose label files are known: {scene_id: url}. See `match`."""
    from sattile.shapes import pack

    sources: dict[str, LabelSource] = {}
    refused: list[Refusal] = []
    by_id = {scene.scene_id: scene for scene in scenes}
    vectors = {url for url in urls.values() if is_vector(url)}
    features: dict[str, Features] = {}
    unread: dict[str, UsageError] = {}
    for url in sorted(vectors):
        try:
            features[url] = read_vector(url, attribute)
        except UsageError as error:
            unread[url] = error
    if unread and len(unread) == len({*urls.values()}):  # nothing is left: the first one says why
        raise unread[min(unread)]
    if features:
        classes = classes or _classes_of(features, attribute)
        ids = {one.name: one.id for one in classes} | {str(one.id): one.id for one in classes}
        outside = _background_id(background, ids)
        default = classes[-1].id
    for scene_id, url in urls.items():
        scene = by_id[scene_id]
        if url in unread or not storage.exists(url):
            reason = str(unread[url]) if url in unread else f"its labels {url} do not exist"
            refused.append(Refusal(scene.url, "labels", reason))
            continue
        if url not in vectors:
            allowed = tuple(one.id for one in classes) if classes else None
            sources[scene_id] = LabelSource(url, allowed, tuple(sorted({IGNORE, *ignore})))
            continue
        if scene.crs is None or scene.footprint is None:
            refused.append(Refusal(scene.url, "labels", f"the scene has no CRS, so {url} cannot be laid over it"))
            continue
        touching = _touching(features[url], scene, ids, default)
        if not touching and outside is None:
            refused.append(Refusal(scene.url, "labels", f"no shape of {url} touches the scene"))
            continue
        sources[scene_id] = LabelSource(url, None, (IGNORE,), pack(touching), features[url].crs, outside)
    return Matched(sources, tuple(refused), classes)


def read_pairs(url: str) -> list[dict[str, str]]:
    """Rows of a pairs file: CSV with columns scene, labels and, if wanted, split.

    Relative names are looked up beside the file first, then from the current folder.

    Raises:
        UsageError: for missing columns or an unknown split.
    """
    if not storage.exists(url):
        raise UsageError(f"--pairs {url} does not exist")
    try:
        text = storage.read_bytes(url).decode("utf-8-sig")  # spreadsheets begin a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UsageError(f"{url} is not UTF-8 ({error}); save it as CSV UTF-8") from None
    found: list[dict[str, str]] = []
    lines: dict[str, int] = {}
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        number = reader.line_num
        values = {(key or "").strip(): (value or "").strip() for key, value in row.items() if isinstance(value, str)}
        if not any(values.values()):
            continue
        if not values.get("scene") or not values.get("labels"):
            raise UsageError(f"{url}, line {number}: needs columns scene and labels; has {', '.join(values) or 'none'}")
        if values.get("split", "") not in ("", "train", "val", "test"):
            raise UsageError(f"{url}, line {number}: split {values['split']!r} is none of train, val, test")
        for column in ("scene", "labels"):
            beside = storage.join(storage.parent(url), values[column])
            if storage.scheme_of(values[column]) == "file" and not os.path.isabs(values[column]):
                values[column] = beside if storage.exists(beside) else values[column]
            values[column] = storage.absolute(values[column])
        if values["scene"] in lines:
            raise UsageError(
                f"{url}, line {number}: {values['scene']} is on line {lines[values['scene']]} already; a scene has one "
                f"labels file and one split"
            )
        lines[values["scene"]] = number
        found.append(values)
    if not found:
        raise UsageError(f"{url} has no rows; give lines of scene,labels[,split] below that header")
    return found


@dataclass(frozen=True)
class Features:
    """Shapes of a vector file with the text of their class attribute, and their numbers in the file, from 1."""

    url: str
    crs: str
    wkb: tuple[bytes, ...]
    values: tuple[str, ...]
    numbers: tuple[int, ...]

    @cached_property
    def tree(self) -> shapely.STRtree:
        """An index of the shapes in EPSG:4326."""
        import geopandas
        import shapely

        return shapely.STRtree(geopandas.GeoSeries.from_wkb(list(self.wkb), crs=self.crs).to_crs(4326).values)


def is_vector(url: str) -> bool:
    return os.path.splitext(url)[1].lower() in VECTORS


def read_vector(url: str, attribute: str | None = None) -> Features:
    """All shapes of a vector file.

    Raises:
        UsageError: if it can't be read, states no CRS, or lacks the attribute (the ones it has are named).
    """
    import geopandas
    import shapely

    entry = storage.stat(url)
    if entry is None:
        raise UsageError(f"{url} does not exist")
    suffix = os.path.splitext(url)[1].lower()
    if suffix not in _BEGINNINGS:
        raise UsageError(f"{url} is no vector file that sattile reads ({', '.join(VECTORS)})")
    with storage.open_file(url) as file:
        begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n" if suffix.endswith("json") else b"")
    if not begins.startswith(_BEGINNINGS[suffix]):
        raise UsageError(f"{url} cannot be read as a vector file: it does not hold what its name ({suffix}) says")
    try:
        with storage.beside(url) as path:
            read = geopandas.read_parquet if suffix == ".parquet" else partial(geopandas.read_file, engine="pyogrio")
            frame = read(path)
    except Exception as error:
        raise UsageError(f"{url} cannot be read as a vector file: {error}") from error
    if frame.crs is None:
        raise UsageError(f"{url} states no CRS: add its .prj, or write it again with one")
    names = [name for name in frame.columns if name != frame.geometry.name]
    if attribute is not None and attribute not in names:
        raise UsageError(f"{url} has no attribute {attribute!r}; it has {', '.join(names) or 'none'}")
    frame.index = range(1, len(frame) + 1)
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
    if attribute is not None:
        without = frame[attribute].isna() | (frame[attribute].astype(str).str.strip() == "")
        if without.any():
            log.warning("%s: %d of %d shapes have no %s and are left out", url, without.sum(), len(frame), attribute)
            frame = frame[~without]
    shapes, kept = _polygons(url, frame.geometry.to_numpy())
    frame = frame[kept]
    values = frame[attribute].map(_text) if attribute else [""] * len(frame)
    return Features(url, frame.crs.to_wkt(), tuple(shapely.to_wkb(shapes)), tuple(values), tuple(frame.index))


def _polygons(url: str, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The polygons among the shapes of a file, valid, and which of all they are: (n,) bool.

    Others hold no pixel; they are told. What make_valid finds beside a polygon, such as a spike as a line, is dropped.

    Raises:
        UsageError: if no polygon is left.
    """
    import shapely

    valid = shapely.make_valid(shapes)  # a bow-tie would be drawn with holes
    for index in np.flatnonzero(shapely.get_type_id(valid) == shapely.GeometryType.GEOMETRYCOLLECTION):
        parts = shapely.get_parts(valid[index])
        valid[index] = shapely.union_all(parts[shapely.area(parts) > 0])
    kept = shapely.area(valid) > 0
    if not kept.all():
        kinds = (("point", "points"), ("line", "lines"), ("polygon without area", "polygons without area"))
        counts = np.bincount(shapely.get_dimensions(shapes[~kept]), minlength=3).tolist()
        told = ", ".join(f"{count} {kind[count > 1]}" for count, kind in zip(counts, kinds, strict=True) if count)
        if not kept.any():
            raise UsageError(f"{url} holds no polygon: {told}; draw areas, or give lines and points a width (a buffer)")
        log.warning("%s: %d of %d shapes left out, as only areas hold pixels: %s", url, (~kept).sum(), len(kept), told)
    return valid[kept], kept


def _text(value: object) -> str:
    """An attribute as written: 3.0 of a shapefile's numeric column is class 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _classes_of(features: Mapping[str, Features], attribute: str | None) -> tuple[SegmentClass, ...]:
    """Classes in order of their names, ids from 0; numbers that fit are their own ids."""
    if attribute is None:
        raise UsageError("vector labels need --attribute (the one that names the class) or --classes NAME")
    values = sorted({value for one in features.values() for value in one.values})
    if len(values) > IGNORE:
        raise UsageError(f"attribute {attribute!r} has {len(values)} values; a labels map holds at most {IGNORE}")
    if all(_is_number(value) and int(value) < IGNORE for value in values):
        return unnamed_classes(sorted({int(value) for value in values}))  # 01 is 1
    return colored([(number, value, None) for number, value in enumerate(values)])


def parse_ignore(value: str | int | Sequence[int] | None) -> list[int]:
    """Stored values that mean "unlabelled": 0, [0, 99] or '0,99'.

    Raises:
        UsageError: for what is no number.
    """
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value or ()
    try:
        return sorted({int(part) for part in parts})
    except ValueError:
        raise UsageError(f"ignore {value!r}: give label values, such as 0,99") from None


def _is_number(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _background_id(background: str | None, ids: Mapping[str, int]) -> int | None:
    if background is None:
        return None
    if str(background) not in ids:
        raise UsageError(f"--background {background!r} is no class; classes are {', '.join(ids)}")
    return ids[str(background)]


def _touching(features: Features, scene: Scene, ids: Mapping[str, int], default: int) -> list[tuple[bytes, int]]:
    """The shapes that touch a scene, with their class ids; shapes of other classes are left out."""
    import shapely

    found = []
    for index in sorted(features.tree.query(shapely.from_wkb(scene.footprint), predicate="intersects").tolist()):
        value = features.values[index]
        known = str(int(value)) if value not in ids and _is_number(value) else value
        class_id = ids.get(known) if value else default
        if class_id is not None:
            found.append((features.wkb[index], class_id))
    return found


def read(source: LabelSource, scene: Scene, window: Window) -> np.ndarray:
    """Labels of a window on the scene's grid, (height, width) uint8; IGNORE where there are none.

    Runs where foreign files may be opened (see `decoder`).

    Raises:
        Refused: if the file holds values that are no class.
    """
    from sattile import raster, shapes

    if source.shapes is not None:
        drawn = shapes.rasterize(source.shapes, source.crs, scene, window)
        return drawn if source.background is None else np.where(drawn == IGNORE, np.uint8(source.background), drawn)
    labels = raster.read_labels(source.url, scene, window, ignore=source.ignore)
    if source.ids is not None:
        known = np.zeros(256, bool)
        known[[*source.ids, IGNORE]] = True
        strange = np.flatnonzero(np.bincount(labels.ravel(), minlength=256) * ~known)
        if strange.size:
            raise Refused(
                f"labels {source.url} hold value {', '.join(map(str, strange[:5]))}, which is no class "
                f"({', '.join(map(str, source.ids))}); name it among the classes, or ignore it: "
                f"--ignore {','.join(map(str, strange))}"
            )
    return labels
