"""Labels of a scene: which file, which class, and how they look on the scene's grid.

Labels are rasters (any grid; resampled nearest) or vectors (GeoJSON, GeoPackage, shapefile; a class from an
attribute; drawn onto the scene's grid). Wherever nothing is said, a pixel is unlabelled (`schema.IGNORE`).
"""

from __future__ import annotations

import csv
import io
import logging
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial

import numpy as np

from sattile import storage
from sattile.errors import Refused, UsageError
from sattile.grid import Window
from sattile.schema import IGNORE, Refusal, Scene, SegmentClass, colored, unnamed_classes

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
        shapes: for vectors: (WKB, class id) pairs that touch the scene, in the file's order: later ones win.
        crs: of the shapes.
        background: class of pixels outside all shapes; None leaves them unlabelled.
    """

    url: str
    ids: tuple[int, ...] | None = None
    ignore: tuple[int, ...] = (IGNORE,)
    shapes: tuple[tuple[bytes, int], ...] | None = None
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
        labels: one file, matched by location, or a folder with a file named after each scene_id; or named as the
            scene's file is, in subfolders named as the scene's are.
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
    named, shared = _by_name(labels, scenes)
    found = {scene_id: urls[0] for scene_id, urls in named.items() if len(urls) == 1}
    matched = match_pairs(found, [scene for scene in scenes if scene.scene_id in found], classes=classes,
                          attribute=attribute, ignore=ignore, background=background)  # fmt: skip
    missing = []
    for scene in scenes:
        several = named[scene.scene_id]
        if len(several) > 1:
            missing.append(Refusal(scene.url, "labels", f"has several label files: {', '.join(several)}; leave one"))
        elif scene.scene_id in shared:
            missing.append(Refusal(scene.url, "labels", shared[scene.scene_id]))
        elif not several:
            reason = f"no labels: {labels} has no file named {scene.scene_id}.tif (or .geojson, ...)"
            missing.append(Refusal(scene.url, "labels", reason))
    return Matched(matched.sources, (*matched.refused, *missing), matched.classes)


def _by_name(folder: str, scenes: Sequence[Scene]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """{scene id: its label files in a folder, or below it where its subfolders are named as the scene's own}; and
    {scene id: reason} where a file may be that of several scenes.

    The more of a scene's folders a file has in common with it, the more it is meant: `labels/2020/t1.tif` goes before
    `labels/t1.tif` for `scenes/2020/t1.tif`, and is none of `scenes/2021/t1.tif`. Unicode's composed and decomposed
    forms of a name are the same.

    Raises:
        UsageError: for a folder that holds no label files.
    """
    places = {scene.scene_id: _places(scene) for scene in scenes}
    above = {one for folders, _ in places.values() for one in folders}
    own = {storage.absolute(url) for scene in scenes for url in (scene.url, *(band.url for band in scene.bands))}
    by_place: dict[tuple[str, ...], list[str]] = {}
    deepest = max((len(folders) for folders, _ in places.values()), default=0)
    for place, url in _label_files(folder, above, deepest):
        if storage.absolute(url) not in own:
            by_place.setdefault(place, []).append(url)
    if not by_place:
        raise UsageError(f"--labels {folder} holds no label files ({', '.join(RASTERS + VECTORS)})")
    found: dict[str, list[str]] = {}
    for scene_id, (folders, stem) in places.items():
        names = (_composed(scene_id), stem)
        tries = [(*folders[depth:], name) for depth in range(len(folders)) for name in names] + [(names[0],)]
        found[scene_id] = next((by_place[one] for one in tries if one in by_place), [])
    users: dict[str, list[str]] = {}
    for scene_id, urls in found.items():
        for url in urls:
            users.setdefault(url, []).append(scene_id)
    shared = {  # scenes/2020/t1.tif and more/2020/t1.tif
        scene_id: f"its labels {url} may be those of {' or of '.join(ids)}; say which by --pairs"
        for url, ids in users.items()
        if len(ids) > 1
        for scene_id in ids
    }
    return {scene_id: [] if scene_id in shared else urls for scene_id, urls in found.items()}, shared


def _places(scene: Scene) -> tuple[tuple[str, ...], str]:
    """The folders that a scene lies in, and its file's name without the suffix, composed."""
    *folders, name = (_composed(part) for part in storage.absolute(scene.url).split("/"))
    scene_id = _composed(scene.scene_id)
    if scene_id in folders:  # a folder of band files is the scene itself
        folders = folders[: folders.index(scene_id)]
    return tuple(folders), os.path.splitext(name)[0]


def _label_files(
    folder: str, above: Set[str], deepest: int, at: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str]]:
    """((subfolders, name without suffix), URL) of the label files of a folder, and of subfolders with certain names."""
    for entry in storage.list_folder(folder):
        name = _composed(storage.name(entry.url))
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in VECTORS + RASTERS:
            yield (*at, stem), entry.url
        elif entry.is_folder and not entry.problem and name in above and len(at) < deepest:
            yield from _label_files(entry.url, above, deepest, (*at, name))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


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
        shapes = _touching(features[url], scene, ids, default)
        if not shapes and outside is None:
            refused.append(Refusal(scene.url, "labels", f"no shape of {url} touches the scene"))
            continue
        sources[scene_id] = LabelSource(url, None, (IGNORE,), tuple(shapes), features[url].crs, outside)
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
    shapes = shapely.make_valid(frame.geometry.values)  # a bow-tie would be drawn with holes
    values = frame[attribute].map(_text) if attribute else [""] * len(frame)
    return Features(url, frame.crs.to_wkt(), tuple(shapely.to_wkb(shapes)), tuple(values), tuple(frame.index))


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
    import geopandas
    import shapely

    shapes = geopandas.GeoSeries.from_wkb(list(features.wkb), crs=features.crs).to_crs(4326)
    touched = shapely.intersects(shapes.values, shapely.from_wkb(scene.footprint))
    found = []
    for wkb, value, touches in zip(features.wkb, features.values, touched, strict=True):
        known = str(int(value)) if value not in ids and _is_number(value) else value
        class_id = ids.get(known) if value else default
        if touches and class_id is not None:
            found.append((wkb, class_id))
    return found


def read(source: LabelSource, scene: Scene, window: Window) -> np.ndarray:
    """Labels of a window on the scene's grid, (height, width) uint8; IGNORE where there are none.

    Runs where foreign files may be opened (see `decoder`).

    Raises:
        Refused: if the file holds values that are no class.
    """
    from sattile import raster, shapes

    if source.shapes is not None:
        drawn = shapes.rasterize(list(source.shapes), source.crs, scene, window)
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
