"""Labels of a scene: which file, which class, and how they look on the scene's grid.

Labels are rasters (any grid; resampled nearest) or vectors (GeoJSON, GeoPackage, shapefile; a class from an
attribute; drawn onto the scene's grid). Which value is which class is `legend`'s to say. Wherever nothing is said, a
pixel is unlabelled (`schema.IGNORE`).
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
import shlex
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from sattile import legend, storage
from sattile.errors import Refused, UsageError, refusal, unforeseen
from sattile.grid import Window
from sattile.legend import Legend, Value
from sattile.schema import IGNORE, Refusal, Scene, SegmentClass

if TYPE_CHECKING:
    import geopandas
    import shapely
    from pyspark.sql import SparkSession

log = logging.getLogger("sattile")

# By what each kind begins: GDAL would take a file for what it holds, and a VRT may pull in other files and addresses.
_BEGINNINGS = {
    ".geojson": b"{", ".json": b"{", ".gpkg": b"SQLite format 3\0", ".shp": b"\0\0\x27\x0a", ".fgb": b"fgb",
    ".parquet": b"PAR1",
}  # fmt: skip
VECTORS = tuple(_BEGINNINGS)
RASTERS = (".tif", ".tiff", ".jp2")


NO_COLORS = "label_encoding rgb needs the colour of each class: --classes land=0=#00ff00,water=1=#0000ff"

RULES = 2
"""Version of the rules for labels, as datasets and metrics record it; those without it were made by the first ones."""


AS_IT_STANDS = Legend()


@dataclass(frozen=True)
class LabelSource:
    """Where one scene's labels come from; travels to executors.

    Attributes:
        url: the file.
        part: of a raster the band, by number or name; of a vector file the layer; None where there is one.
        legend: what the values of a raster mean.
        shapes: for vectors: those that touch the scene and their class ids, in the file's order, as `shapes.pack` has
            them: later ones win. `IGNORE` takes the label away.
        crs: of the shapes.
        background: class of pixels outside all shapes; None leaves them unlabelled.
        mended: whether the first rules read this file otherwise.
        beside: of a raster: (url, version) of what lies beside it, see `raster.beside`.
    """

    url: str
    part: str | None = None
    legend: Legend = AS_IT_STANDS
    shapes: bytes | None = None
    crs: str | None = None
    background: int | None = None
    mended: bool = False
    beside: tuple[tuple[str, tuple[int, int]], ...] = ()

    def identity(self) -> dict[str, list[int]]:
        """{url: [size, mtime in ns]} of the file, as it is now; also of what lies beside it: parts of a shapefile, and
        what says how a raster is read, as it was when it was matched."""
        stem, suffix = os.path.splitext(self.url)
        entries = {self.url: storage.stat(self.url)}
        for one in (".dbf", ".prj", ".cpg") if suffix.lower() == ".shp" else ():
            for name in (stem + one, stem + one.upper()):  # in capitals only if the other is not there
                entries[name] = storage.stat(name)
                if entries[name]:
                    break
        found = {url: [entry.size, entry.mtime] for url, entry in entries.items() if entry} or {self.url: [0, 0]}
        found |= {url: [*version] for url, version in self.beside}
        return {url if self.part is None else f"{url}:{self.part}": version for url, version in found.items()}


@dataclass(frozen=True)
class Matched:
    """Scenes with their labels.

    Attributes:
        sources: by scene id.
        refused: scenes that have none.
        classes: known beforehand (named by the user, or from an attribute), else None.
        values: of an attribute, where the classes follow from it; else None.
    """

    sources: Mapping[str, LabelSource]
    refused: tuple[Refusal, ...]
    classes: tuple[SegmentClass, ...] | None
    values: frozenset[Value] | None = None


def check(classes: Sequence[SegmentClass] | None, ignore: Sequence[Value], encoding: str) -> None:
    """Whether options of labels go together.

    Raises:
        UsageError: if not.
    """
    if encoding not in legend.ENCODINGS:
        raise UsageError(f"label_encoding {encoding!r}: use {', '.join(legend.ENCODINGS)}")
    if encoding == "rgb" and not classes:
        raise UsageError(NO_COLORS)
    if encoding == "rgb" and len({one.color.lower() for one in classes or ()}) < len(classes or ()):
        raise UsageError(f"label_encoding rgb: two classes have the same colour: {legend.called(classes or ())}")
    both = [value for value in ignore if value in legend.lookup(classes or ())]
    if both:
        raise UsageError(f"{legend.shown(both)} is a class and to be ignored; leave it out of --classes or of --ignore")


def match(
    labels: str,
    scenes: Sequence[Scene],
    *,
    classes: tuple[SegmentClass, ...] | None = None,
    attribute: str | None = None,
    ignore: Sequence[Value] = (),
    background: str | None = None,
    encoding: str = "index",
    of_model: bool = False,
) -> Matched:
    """Find the labels of each scene.

    Args:
        labels: one file, matched by location, or a folder with a file named after each scene_id; or named as the
            scene's file is, in subfolders named as the scene's are. A layer of a file or a band of a raster stands
            behind a colon: `FILE.gpkg:LAYER`, `FILE.tif:2`, `FOLDER:2`.
        scenes: those to label.
        classes: as named by the user.
        attribute: of vectors, the one that says the class; without it, all shapes are of the last class.
        ignore: values that mean "unlabelled".
        background: class (name or value) of pixels outside all shapes.
        encoding: of rasters, one of `legend.ENCODINGS`.
        of_model: the classes are a model's.

    Raises:
        UsageError: if `labels` does not exist, or a vector's attribute or classes are not as said.
    """
    labels, part = split_part(storage.absolute(labels))
    entry = storage.stat(labels)
    if entry is None:
        raise UsageError(f"--labels {labels} does not exist")
    if not entry.is_folder:
        return match_pairs({scene.scene_id: _with_part(labels, part) for scene in scenes}, scenes, classes=classes,
                           attribute=attribute, ignore=ignore, background=background, encoding=encoding,
                           of_model=of_model)  # fmt: skip
    named, shared = _by_name(labels, scenes)
    found = {scene_id: _with_part(urls[0], part) for scene_id, urls in named.items() if len(urls) == 1}
    matched = match_pairs(found, [scene for scene in scenes if scene.scene_id in found], classes=classes,
                          attribute=attribute, ignore=ignore, background=background, encoding=encoding,
                          of_model=of_model)  # fmt: skip
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
    return replace(matched, refused=(*matched.refused, *missing))


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
    ignore: Sequence[Value] = (),
    background: str | None = None,
    encoding: str = "index",
    of_model: bool = False,
) -> Matched:
    """The labels of scenes whose label files are known: {scene_id: url}. See `match`."""
    from sattile.raster import beside
    from sattile.shapes import pack

    sources: dict[str, LabelSource] = {}
    refused: list[Refusal] = []
    by_id = {scene.scene_id: scene for scene in scenes}
    parts = {url: split_part(url) for url in sorted({*urls.values()})}
    features: dict[str, Features] = {}
    unread: dict[str, str] = {}
    lies_beside: dict[str, tuple[tuple[str, tuple[int, int]], ...]] = {}
    for url, (file, _) in parts.items():
        try:
            if is_vector(file):
                features[url] = read_vector(url, attribute)
                if classes is not None and attribute is not None:
                    _check_named(features[url], attribute, classes, ignore, of_model)
        except UsageError as error:
            unread[url] = str(error)
        except Exception as error:
            unread[url] = f"labels {url}: {refusal(error).reason}"
    if unread and len(unread) == len(parts) and not any(map(unforeseen, unread.values())):
        raise UsageError(unread[min(unread)])  # nothing is left: the first one says why
    ignored = {*ignore}
    values: frozenset[Value] | None = None
    if features and attribute is None and classes is not None:
        left = f", and --ignore {', '.join(map(legend.written, ignore))} has no part in it" if ignore else ""
        if len(classes) > 1 or left:
            log.warning("labels: no --attribute was given: all shapes are taken for class %s%s", classes[-1].name, left)
    if features:
        named = classes
        if classes is None:
            values = _values_of([one for url, one in features.items() if url not in unread], attribute, ignored)
            classes = legend.classes_of(values)
        ids = legend.lookup(classes)
        outside = background_id(background, classes)
        default = classes[-1].id
        mended = _are_mended(features.values(), named, ignored)
    for scene_id, url in urls.items():
        scene, (file, part) = by_id[scene_id], parts[url]
        try:
            if url in unread:
                raise Refused(unread[url])
            if (entry := storage.stat(file)) is None or entry.problem:
                why = f"cannot be read: {entry.problem}" if entry else "do not exist"
                raise Refused(f"its labels {file} {why}")
            if url not in features:
                if file not in lies_beside:
                    lies_beside[file] = tuple(beside(file).items())
                read_as = Legend(encoding, classes, tuple(ignore), of_model)
                sources[scene_id] = LabelSource(file, part, read_as, beside=lies_beside[file])
                continue
            if scene.crs is None or scene.footprint is None:
                raise Refused(f"the scene has no CRS, so {url} cannot be laid over it")
            touching = _touching(features[url], scene, {**ids, **dict.fromkeys(ignored, IGNORE)}, default)
            if not touching and outside is None:
                raise Refused(f"no shape of {url} touches the scene{_suspicion(features[url], scene)}")
            sources[scene_id] = LabelSource(
                file, part, shapes=pack(touching), crs=features[url].crs, background=outside, mended=mended
            )
        except Exception as error:
            refused.append(Refusal(scene.url, "labels", refusal(error).reason))
    return Matched(sources, tuple(refused), classes, values)


def _check_named(
    features: Features, attribute: str, classes: tuple[SegmentClass, ...], ignore: Sequence[Value], of_model: bool
) -> None:
    """Whether each value of an attribute is a class.

    Raises:
        UsageError: with the values, and what to write.
    """
    counts: dict[Value, int] = {}
    for value in map(legend.value_of, features.values):
        if value is not None and value not in ignore:
            counts[value] = counts.get(value, 0) + 1
    strange = {value for value in counts if value not in legend.lookup(classes)}
    if strange:
        shapes = sum(counts[value] for value in strange)
        raise UsageError(
            f"{features.url}: attribute {attribute!r} has values that are no class: {legend.shown(strange)} "
            f"({shapes} of {len(features.values)} shapes); it has {legend.shown(counts)}, and the classes are "
            f"{legend.called(classes)}. "
            + ("Leave" if of_model else f"Name them: {legend.named_line(classes, counts)}; or leave")
            + f" them unlabelled: {legend.ignore_line(strange)}"
        )
    for value in {*ignore} - {legend.value_of(text) for text in features.values}:
        log.warning("%s: no shape has %s, which --ignore names", features.url, legend.written(value))


def _are_mended(features: Iterable[Features], named: tuple[SegmentClass, ...] | None, ignored: set[Value]) -> bool:
    """Whether the first rules drew these shapes otherwise: they took texts for ids, and drew what is to be ignored."""
    texts = {value for one in features for value in one.values}
    values = {legend.value_of(text) for text in texts} - {None}
    if any(one.left_out for one in features) or values & ignored:
        return True
    if named is not None:
        return any(one.value is not None for one in named)
    numeric = [value for value in values if value is not None and not isinstance(value, str)]
    return bool(numeric) and not all(map(legend.is_id, values - {None}))  # type: ignore[arg-type]


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
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UsageError(f"{url}, line {reader.line_num + 1}: is no CSV: {error}") from None
    columns = [name.strip() for name in reader.fieldnames or ()]
    for number, row in rows:
        values = {(key or "").strip(): (value or "").strip() for key, value in row.items() if isinstance(value, str)}
        if not any(values.values()):
            continue
        if not {"scene", "labels"} <= {*columns}:
            raise UsageError(f"{url}, line {number}: needs columns scene and labels; has {', '.join(columns)}")
        for column in ("scene", "labels"):
            if not values.get(column):
                raise UsageError(f"{url}, line {number}: {column} is empty; name a file")
            if "\0" in values[column]:
                raise UsageError(f"{url}, line {number}: {column} {values[column]!r} holds a NUL; no file is named so")
        if values.get("split", "") not in ("", "train", "val", "test"):
            raise UsageError(f"{url}, line {number}: split {values['split']!r} is none of train, val, test")
        for column in ("scene", "labels"):
            beside = storage.join(storage.parent(url), values[column])
            if storage.scheme_of(values[column]) == "file" and not os.path.isabs(values[column]):
                values[column] = beside if storage.exists(split_part(beside)[0]) else values[column]
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
    """Shapes of a vector file with the text of their class attribute, and their numbers in the file, from 1.

    Attributes:
        left_out: from how many shapes something was left out that has no area, or was not, as parts of them overlap.
        without: how many shapes are left out as they have no value of the attribute.
    """

    url: str
    crs: str
    wkb: tuple[bytes, ...]
    values: tuple[str, ...]
    numbers: tuple[int, ...]
    left_out: int = 0
    without: int = 0

    @cached_property
    def tree(self) -> shapely.STRtree:
        """An index of the shapes in their own CRS."""
        import shapely

        return shapely.STRtree(shapely.from_wkb(list(self.wkb)))


def is_vector(url: str) -> bool:
    return os.path.splitext(url)[1].lower() in VECTORS


def split_part(url: str) -> tuple[str, str | None]:
    """`FILE.gpkg:LAYER` -> (file, layer), `FILE.tif:2`, `FOLDER:2` -> (file, band); None where no part is named.

    Names of layers and bands may have colons and slashes; what lies there under the whole name goes before.
    """
    if ":" in url and not storage.exists(url):
        for at in (found.start() for found in re.finditer(":", url)):
            head, part = url[:at], url[at + 1 :]
            entry = storage.stat(head) if head and part and not part.startswith("//") else None
            if entry is not None and not (entry.is_folder and "/" in part):
                return head, part
    return url, None


def _with_part(url: str, part: str | None) -> str:
    return url if part is None else f"{url}:{part}"


def read_vector(named: str, attribute: str | None = None) -> Features:
    """All shapes of a vector file, or of one of its layers: `FILE.gpkg:LAYER`.

    Raises:
        UsageError: if it can't be read, has several layers with shapes, states no CRS or a wrong one, or lacks the
            attribute (the ones it has are named).
    """
    import geopandas
    import shapely

    url, layer = split_part(named)
    if not storage.exists(url):
        raise UsageError(f"{url} does not exist")
    stem, suffix = os.path.splitext(url)
    suffix = suffix.lower()
    beside = [stem + one for one in (".shx", ".dbf", ".prj", ".cpg")] if suffix == ".shp" else []
    for part in (url, *beside):
        if (entry := storage.stat(part)) and entry.problem:  # who reads a pipe waits for its writer
            raise UsageError(f"{part} cannot be read as a vector file: {entry.problem}")
    if suffix not in _BEGINNINGS:
        raise UsageError(f"{url} is no vector file that sattile reads ({', '.join(VECTORS)})")
    with storage.open_file(url) as file:
        begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n" if suffix.endswith("json") else b"")
    if not begins.startswith(_BEGINNINGS[suffix]):
        raise UsageError(f"{url} cannot be read as a vector file: it does not hold what its name ({suffix}) says")
    try:
        with storage.beside(url) as path:
            if suffix == ".parquet":
                frame = geopandas.read_parquet(path)
            else:
                frame = geopandas.read_file(path, engine="pyogrio", layer=_layer(path, url, layer))
    except UsageError:
        raise
    except Exception as error:
        words = re.sub(r"[;\s]*It might help to specify the correct driver.*", "", str(error), flags=re.DOTALL)
        raise UsageError(f"{url} cannot be read as a vector file: {words}") from error
    if frame.crs is None:
        name = storage.name(url)
        remedy = f"state it: ogr2ogr -a_srs EPSG:N OUT.gpkg {name}"
        if suffix == ".shp":
            remedy = "add its .prj, or write it again with one"
        elif suffix == ".parquet":
            remedy = f"state it: geopandas.read_parquet({name!r}).set_crs('EPSG:N').to_parquet('OUT.parquet')"
        raise UsageError(f"{url} states no CRS; {remedy}")
    _check_degrees(url, frame)
    names = [name for name in frame.columns if name != frame.geometry.name]
    if attribute is not None and attribute not in names:
        raise UsageError(f"{url} has no attribute {attribute!r}; it has {', '.join(names) or 'none'}")
    frame.index = range(1, len(frame) + 1)
    frame = frame[~(frame.geometry.isna() | frame.geometry.is_empty)]
    unsaid = 0
    if attribute is not None:
        without = frame[attribute].isna() | (frame[attribute].astype(str).str.strip() == "")
        unsaid = int(without.sum())
        if unsaid:
            log.warning("%s: %d of %d shapes have no %s and are left out", url, unsaid, len(frame), attribute)
            frame = frame[~without]
    shapes, kept, trimmed = _polygons(url, frame.geometry.to_numpy())
    frame = frame[kept]
    values = frame[attribute].map(_text) if attribute else [""] * len(frame)
    wkb = tuple(shapely.to_wkb(shapes))
    return Features(url, frame.crs.to_wkt(), wkb, tuple(values), tuple(frame.index), trimmed, unsaid)


def _layer(path: str, url: str, wanted: str | None) -> str | None:
    """The layer to read: the one wanted, or the only one with shapes (QGIS keeps its styles in one without)."""
    import pyogrio

    layers = {str(name): kind is not None for name, kind in pyogrio.list_layers(path)}
    shapes = [name for name, has_shapes in layers.items() if has_shapes]
    if wanted is not None and wanted not in shapes:
        what = "has no shapes" if wanted in layers else "is none of its layers"
        raise UsageError(f"{url}: {wanted!r} {what}; there are {', '.join(shapes) or 'none with shapes'}")
    if wanted is None and len(shapes) > 1:
        raise UsageError(
            f"{url} has several layers: {', '.join(shapes)}; name one: {shlex.quote(f'{url}:{shapes[0]}')}"
        )
    return wanted or (shapes[0] if shapes else None)


def _check_degrees(url: str, frame: geopandas.GeoDataFrame) -> None:
    """Whether coordinates that are said to be degrees can be: GeoJSON without a CRS is in degrees, by its standard."""
    if not frame.crs.is_geographic or frame.empty:
        return
    west, south, east, north = frame.total_bounds
    if not np.isfinite([west, south, east, north]).all() or (max(-south, north) <= 91 and max(-west, east) <= 541):
        return
    seen = f"x from {west:g} to {east:g}, y from {south:g} to {north:g}"
    if max(-west, east) <= 91 and max(-south, north) <= 181:
        raise UsageError(
            f"{url}: its coordinates look swapped ({seen}): longitude comes first; write it again: "
            + _in_python(url, "frame.geometry = frame.geometry.transform(lambda at: at[:, ::-1]); ")
        )
    raise UsageError(
        f"{url}: its coordinates are no degrees ({seen}), though its CRS is {frame.crs.to_string()} (that of GeoJSON, "
        f"where it states none); say which one they are in: ogr2ogr -a_srs EPSG:N OUT.gpkg {storage.name(url)}"
    )


def _in_python(url: str, change: str) -> str:
    """A command that writes a vector file anew, with a change to its `frame`; a GDAL that can do it is rare."""
    read, write, out = ("read_parquet", "to_parquet", "parquet") if url.lower().endswith(".parquet") else (
        "read_file", "to_file", "gpkg")  # fmt: skip
    code = f"import geopandas; frame = geopandas.{read}({storage.name(url)!r}); {change}frame.{write}('OUT.{out}')"
    return f'python -c "{code}"'


def _suspicion(features: Features, scene: Scene) -> str:
    """What may be wrong with shapes that do not touch a scene, in words; nothing where nothing is suspected."""
    import geopandas
    import shapely

    if not features.wkb:
        none = f"none of its {features.without} shapes has a value of the attribute"
        return f": {none if features.without else 'the file holds no shapes'}"
    bounds = shapely.bounds(features.tree.geometries)
    footprint = shapely.from_wkb(scene.footprint)

    def on_earth(boxes: np.ndarray) -> np.ndarray:
        # Boxes do: this is a guess. Of some a corner lies nowhere on Earth.
        found = geopandas.GeoSeries(shapely.segmentize(boxes, np.ptp(bounds) / 16), crs=features.crs)
        found = found.to_crs(4326).to_numpy()
        return found[np.isfinite(shapely.bounds(found)).all(axis=1) & shapely.is_valid(found)]

    if shapely.intersects(on_earth(shapely.box(*bounds.T[[1, 0, 3, 2]])), footprint).any():
        return "; with x and y swapped they would: are its axes in the order that its CRS states?"
    found = on_earth(shapely.box(*bounds.T))
    if not len(found):
        return "; is the CRS that the file states the right one?"
    lie, around = (
        ", ".join(f"{one:.6g}" for one in bounds) for bounds in (shapely.total_bounds(found), footprint.bounds)
    )
    return (
        f": they lie in {lie} (west, south, east, north in degrees), the scene in {around}; is the CRS that the file "
        f"states the right one?"
    )


def _polygons(url: str, shapes: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """The polygons among the shapes of a file, valid, which of all they are, (n,) bool, and how many shapes the first
    rules read otherwise.

    Others hold no pixel; they are told. What make_valid finds beside a polygon, such as a spike as a line, is dropped.
    A shape holds what any of its parts does.

    Raises:
        UsageError: if no polygon is left.
    """
    import shapely

    valid = shapely.make_valid(shapes)  # a bow-tie would be drawn with holes
    mixed = np.flatnonzero(shapely.get_type_id(valid) == shapely.GeometryType.GEOMETRYCOLLECTION)
    for index in mixed:
        parts = shapely.get_parts(valid[index])
        valid[index] = shapely.union_all(parts[shapely.area(parts) > 0])
    several = np.isin(
        shapely.get_type_id(shapes), (shapely.GeometryType.MULTIPOLYGON, shapely.GeometryType.GEOMETRYCOLLECTION)
    )
    overlapping = []
    for index in np.flatnonzero(several & ~shapely.is_valid(shapes)):
        # make_valid takes away where two parts of a shape overlap, as if one were the other's hole.
        parts = shapely.get_parts(shapely.make_valid(shapely.get_parts(shapely.get_parts(shapes[index]))))
        whole = shapely.union_all(parts[shapely.area(parts) > 0])
        if shapely.area(whole) > shapely.area(valid[index]) * (1 + 1e-9):
            valid[index] = whole
            overlapping.append(index)
    kept = shapely.area(valid) > 0
    if not kept.all():
        kinds = (("point", "points"), ("line", "lines"), ("polygon without area", "polygons without area"))
        counts = np.bincount(shapely.get_dimensions(shapes[~kept]), minlength=3).tolist()
        told = ", ".join(f"{count} {kind[count > 1]}" for count, kind in zip(counts, kinds, strict=True) if count)
        if not kept.any():
            raise UsageError(f"{url} holds no polygon: {told}; draw areas, or give lines and points a width (a buffer)")
        log.warning("%s: %d of %d shapes left out, as only areas hold pixels: %s", url, (~kept).sum(), len(kept), told)
    return valid[kept], kept, int((~kept).sum()) + len({*mixed, *overlapping})


def _text(value: object) -> str:
    """An attribute as written: 3.0 of a shapefile's numeric column is class 3."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _values_of(features: Iterable[Features], attribute: str | None, ignored: set[Value]) -> frozenset[Value]:
    """The values of an attribute that are to be classes."""
    if attribute is None:
        raise UsageError("vector labels need --attribute (the one that names the class) or --classes NAME")
    values = {legend.value_of(text) for one in features for text in one.values} - ignored - {None}
    if not values:
        why = "--ignore leaves out all of its values" if ignored else "no shape has a value of it"
        raise UsageError(f"attribute {attribute!r}: {why}")
    return frozenset(value for value in values if value is not None)


def background_id(background: str | None, classes: Sequence[SegmentClass]) -> int | None:
    """The class id of a background, given by name or value.

    Raises:
        UsageError: if it is no class.
    """
    if background is None:
        return None
    known, value = legend.lookup(classes), legend.value_of(background)
    if value is None or value not in known:
        raise UsageError(f"--background {background!r} is no class; classes are {legend.called(classes)}")
    return known[value]


def _touching(features: Features, scene: Scene, ids: Mapping[Value, int], default: int) -> list[tuple[bytes, int]]:
    """The shapes that touch a scene, with their class ids, in the order of the file."""
    from sattile import shapes

    found = []
    for index in shapes.near(features.tree, features.crs, scene).tolist():
        value = legend.value_of(features.values[index])
        found.append((features.wkb[index], default if value is None else ids[value]))
    return found


def read(source: LabelSource, scene: Scene, window: Window) -> tuple[np.ndarray, int]:
    """Labels of a window on the scene's grid.

    Runs where foreign files may be opened (see `decoder`).

    Returns:
        (height, width) uint8, IGNORE where there are none; and how many pixels of a raster are 255 though neither its
        nodata nor an option says what that means.

    Raises:
        Refused: if the file holds values that are no class, or several bands of which none was chosen.
    """
    from sattile import raster, shapes

    if source.shapes is not None:
        outside = IGNORE if source.background is None else source.background
        return shapes.rasterize(source.shapes, source.crs, scene, window, outside=outside), 0
    undeclared = 0

    def to_ids(values: np.ndarray, good: np.ndarray) -> np.ndarray:
        nonlocal undeclared
        ids, unsaid = source.legend.ids(values, good, source.url)
        undeclared += unsaid
        return ids

    bands = source.part if source.legend.encoding == "index" else "all"
    return raster.read_labels(source.url, scene, window, to_ids, bands=bands, masks=source.beside), undeclared


# --- what label rasters hold, where that decides what they mean ------------------------------------------------------

MOST_VALUES = 1000
"""Different values that a raster of classes may hold; one of more is a measurement."""


def as_before(spark: SparkSession, matched: Matched, ignore: Sequence[Value], taken: Collection[str]) -> bool:
    """Whether the first rules for labels read these as today's do: what was made by them can stay then.

    Args:
        taken: scene ids whose labels they read.
    """
    sources = [matched.sources[key] for key in taken if key in matched.sources]
    if any(one.mended for one in sources):
        return False
    rasters = {(one.url, one.part, one.beside) for one in sources if one.shapes is None}
    found = _look(spark, sorted(rasters, key=str), _numbers(ignore), every=False)
    seen = {value for values in found.values() for value in values or ()}
    if any(values is None for values in found.values()):
        return False  # several bands, of which they took the first
    return _is_said(matched, ignore) or IGNORE not in seen or not seen <= {0, IGNORE}


def _is_said(matched: Matched, ignore: Sequence[Value]) -> bool:
    """Whether somebody says what 255 means."""
    return IGNORE in ignore or (matched.classes is not None and IGNORE in legend.lookup(matched.classes))


def _numbers(values: Iterable[Value]) -> set[Value]:
    return {value for value in values if not isinstance(value, str)}


def survey(spark: SparkSession, matched: Matched, ignore: Sequence[Value], *, model: bool = False) -> Matched:
    """Look through label rasters, in Spark tasks, where what they hold decides what it means.

    Files of nothing but 0 and 255 may mean two classes, or one and "unlabelled": nobody can know. Numbers that are no
    ids get ids of their own, the same in all files.

    Args:
        ignore: values that mean "unlabelled".
        model: whether the classes are a model's, which no option changes.

    Returns:
        The same with classes for all that was found, where numbers are no ids; else as it was.

    Raises:
        UsageError: for labels of nothing but 0 and 255.
    """
    classes = matched.classes
    rasters = {
        (one.url, one.part, one.beside)
        for one in matched.sources.values()
        if one.shapes is None and one.legend.encoding == "index"
    }
    said = _is_said(matched, ignore)
    # Classes that somebody named are as they are; those of an attribute make room for what rasters hold beside it.
    free = classes is None or matched.values is not None
    if not rasters or (said and not free):
        return matched
    files, ignored = sorted(rasters, key=str), _numbers(ignore)
    seen = _seen(spark, files, ignored, every=matched.values is not None)
    if not said and seen <= {0, IGNORE} and IGNORE in seen:
        named = (
            classes if classes and len(classes) == 2 else (SegmentClass(0, "land", ""), SegmentClass(1, "water", ""))
        )
        line = legend.named_line(named, {0, IGNORE} - ignored)
        what = "A class, by a model that was made with" if model else "A class of its own:"
        raise UsageError(
            f"the labels hold nothing but {legend.shown(seen)}, and 255 may be a class or mean unlabelled: say which. "
            f"{what} {line}; unlabelled: {legend.ignore_line({*ignored, IGNORE})}"
        )
    strange = {value for value in seen if not legend.is_id(value) and value != IGNORE}
    if not free or not (strange or matched.values is not None):
        return matched
    if matched.values is None:
        seen = _seen(spark, files, ignored, every=True)
    made = legend.classes_of({*(seen - {IGNORE}), *(matched.values or ())})
    log.info("labels: classes are %s", ", ".join(f"{one.name} (id {one.id})" for one in made))
    return _renumbered(matched, made)


def _renumbered(matched: Matched, made: tuple[SegmentClass, ...]) -> Matched:
    """The same with other classes, in which the values of an attribute may have other ids."""
    from sattile.shapes import renumber

    before, now = legend.lookup(matched.classes or ()), legend.lookup(made)
    ids = {before[value]: now[value] for value in matched.values or ()}
    sources = {}
    for key, one in matched.sources.items():
        if one.shapes is None:
            sources[key] = replace(one, legend=replace(one.legend, classes=made))
        else:
            background = None if one.background is None else ids[one.background]
            sources[key] = replace(one, shapes=renumber(one.shapes, ids), background=background)
    return replace(matched, sources=sources, classes=made)


def _seen(
    spark: SparkSession, files: Sequence[tuple[str, str | None, object]], ignored: Collection[Value], *, every: bool
) -> set[Value]:
    return {value for values in _look(spark, files, ignored, every=every).values() for value in values or ()}


def _look(
    spark: SparkSession, files: Sequence[tuple[str, str | None, object]], ignored: Collection[Value], *, every: bool
) -> dict[tuple[str, str | None], set[Value] | None]:
    """Values by file and band; None for files that are refused."""
    from sattile import engine

    if not files:
        return {}

    tasks = max(1, min(len(files), 4 * engine.slots(spark)))
    rows = spark.sparkContext.parallelize(list(files), tasks)
    work = engine.on_worker(partial(_values_of_files, ignored=ignored, every=every))
    return {
        (url, part): None if values is None else set(values) for url, part, values in rows.mapPartitions(work).collect()
    }


def _values_of_files(
    files: Iterable[tuple[str, str | None, object]], *, ignored: Collection[Value], every: bool
) -> Iterator[tuple[str, str | None, list[Value] | None]]:
    """In a Spark task: the values of each file; None for those that can't be read, which the cut refuses."""
    from sattile import raster
    from sattile.decoder import decoder

    for url, part, masks in files:
        try:
            values = decoder().call(
                raster.label_values, url, part, masks, most=MOST_VALUES, every=every, ignored=ignored
            )
            yield url, part, [value for value in map(legend.value_of, values) if value is not None]
        except Exception as error:
            refusal(error)  # which lets outages pass
            yield url, part, None
