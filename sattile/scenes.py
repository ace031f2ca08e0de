"""Finds scenes: what a user names becomes `schema.Scene`s, or a reason why not.

The driver lists and groups files without opening one (`find`); Spark tasks read the headers (`resolve`), through the
decoder; `index` keeps the result as a GeoParquet catalogue, which `resolve` takes in turn, trusting rows whose files
are unchanged.

What a scene argument may be: a file, a glob, a folder (every *.tif, *.tiff, *.jp2 below it), a folder of band files
with a pattern, a STAC item, collection or item collection on disk, a catalogue.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from sattile import engine, record, spectrum, storage
from sattile.errors import Refused, UsageError, is_outage, refusal
from sattile.schema import Band, Refusal, Scene
from sattile.stac import moment, stated_times, time_properties

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from sattile.raster import FileInfo

log = logging.getLogger("sattile")

CATALOG = "scenes.parquet"
LISTINGS = (".json", ".geojson")
"""STAC items, and what lists them."""
UNLISTED = "not listed: "
"""How the reason begins where it is not known which scenes there are."""

SUFFIXES = (".tif", ".tiff", ".jp2")
SIDECARS = (
    ".msk", ".ovr", ".aux.xml", ".qml", ".tfw", ".tifw", ".tiffw", ".j2w", ".wld", ".prj", ".imd", ".rpb", ".rpc.txt",
)  # fmt: skip
STAGE = "index"


@dataclass(frozen=True)
class Hint:
    """What is known of a band before its file is opened: the name by pattern or STAC, and what the item states.

    Attributes:
        index: 1-based band of the file; None is its only data band.
        names: the one it goes by, then others it may be asked for by.
        nodata, scale, offset, forced: as in `schema.Band`.
        soft: nothing is said of the file but its asset's name: if it has several bands, they name themselves.
    """

    names: tuple[str, ...]
    index: int | None = None
    nodata: float | None = None
    scale: float | None = None
    offset: float | None = None
    forced: bool = False
    soft: bool = False


@dataclass(frozen=True)
class Source:
    """One file of a candidate; no hints: its bands name themselves."""

    url: str
    hints: tuple[Hint, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """What may be a scene, before any of its files is opened.

    Attributes:
        scene_id: unique among those found together.
        url: as given or listed.
        sources: its files.
        datetime, interval: as a STAC item states them.
        known: `Scene.to_json` of a catalogue's row.
        reason: why it is refused already.
    """

    scene_id: str
    url: str
    sources: tuple[Source, ...] = ()
    datetime: str | None = None
    known: str | None = None
    reason: str | None = None
    interval: tuple[str, str] | None = None


@dataclass(frozen=True)
class Resolved:
    """Scenes in the order of their ids, what was refused, and how many were given."""

    scenes: list[Scene]
    refused: list[Refusal] = field(default_factory=list)
    given: int = 0


# ---------------------------------------------------------------- on the driver: listing


def find(
    arguments: str | Sequence[str], *, bands: Sequence[str] | None = None, pattern: str | None = None
) -> list[Candidate]:
    """List and group the files that scene arguments name; opens none but JSON and catalogues.

    Args:
        arguments: files, globs, folders, STAC JSON, catalogues; the same scene named twice counts once.
        bands: names wanted, in order.
        pattern: how band files are named, with `{band}` and maybe `{scene}` and `*`: `'{scene}, {band}.tiff'`; may
            begin with folders (`'{scene}/IMG_DATA/*_{band}.jp2'`). Without `{scene}`, the folder's name is the scene.

    Returns:
        Candidates in the order of their ids.

    Raises:
        UsageError: for an argument that does not exist, a glob or folder without a match, a pattern that can't be.
    """
    arguments = [arguments] if isinstance(arguments, str) else list(arguments)
    if not arguments:
        raise UsageError("no scenes named: give files, globs, folders, STAC items or a catalogue")
    if bands is not None and len(set(bands)) < len(bands):
        raise UsageError(f"bands {', '.join(bands)}: a name is there twice")
    matcher = _Pattern(pattern, bands) if pattern is not None else None
    found: dict[str, Candidate] = {}
    files: list[tuple[str, list[str]]] = []  # argument, files below it: for the pattern
    for argument in arguments:
        entries = _expand(argument)
        if all(one.is_folder and not (one.problem or _holds_scenes(one.url, pattern)) for one in entries):
            raise UsageError(
                f"{argument} holds no scenes: no {', '.join('*' + one for one in SUFFIXES)} below it, and no {CATALOG}"
            )
        for entry in entries:
            if _is_unlisted(entry):
                _add(found, [_unlisted(entry)])
            elif not entry.is_folder:
                lower = entry.url.lower()
                if lower.endswith(LISTINGS):
                    items = list(_read_stac(entry.url, bands))
                    if not items:
                        raise UsageError(f"{entry.url} is a STAC collection without items")
                    _add(found, items)
                elif lower.endswith(".parquet"):
                    _add(found, _read_rows(entry.url))
                elif matcher:
                    files.append((argument, [entry.url]))
                else:
                    _add(found, [_single(entry.url)])
            elif matcher:
                below = list(storage.walk(entry.url))
                files.append((argument, [one.url for one in below if not _is_unlisted(one)]))
                _add(found, (_unlisted(one) for one in below if _is_unlisted(one)))
            elif _is_catalog(entry.url):
                _add(found, _read_rows(storage.join(entry.url, CATALOG)))
            else:
                below = list(_rasters_below(entry.url))
                _add(found, (_unlisted(one) if _is_unlisted(one) else _single(one.url) for one in below))
    if matcher and files:
        _add(found, matcher.group(files))
    return _with_unique_ids(map(_writable, found.values()))


def _writable(candidate: Candidate) -> Candidate:
    """Names that are no text (bytes of an old encoding) can't be written down: not in a table, not in JSON."""
    try:
        "".join([candidate.url, candidate.scene_id, *(one.url for one in candidate.sources)]).encode()
    except UnicodeEncodeError:
        url, scene_id = (
            one.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
            for one in (candidate.url, candidate.scene_id)
        )
        return Candidate(scene_id, url, reason="its name is not UTF-8; rename it")
    return candidate


def _add(found: dict[str, Candidate], candidates: Iterable[Candidate]) -> None:
    """Once each; of several ways to name one, the same is kept whatever their order."""
    for one in candidates:
        key = storage.absolute(one.url)
        other = found.get(key)
        if other is None or (one.known is None, one.url, repr(one)) < (other.known is None, other.url, repr(other)):
            found[key] = one


def _expand(argument: str) -> list[storage.Entry]:
    entry = storage.stat(argument)
    if entry is not None:  # a name that holds [ or * is taken as it is if there is one
        return [entry]
    if not storage.GLOB.search(argument):
        raise UsageError(f"{argument} does not exist")
    entries = [one for one in storage.glob(argument) if one.is_folder or not one.url.lower().endswith(SIDECARS)]
    if not entries:
        raise UsageError(f"{argument} matches no file")
    return entries


def _holds_scenes(folder: str, pattern: str | None) -> bool:
    if pattern is not None:  # says itself what it wants
        return True
    return _is_catalog(folder) or next(_rasters_below(folder), None) is not None


def _is_catalog(folder: str) -> bool:
    try:
        return storage.exists(storage.join(folder, CATALOG))
    except PermissionError:  # told when it is listed
        return False


def _rasters_below(folder: str) -> Iterator[storage.Entry]:
    """Rasters in a folder and below it, but for what our own commands wrote there: maps are no scenes.

    With them what may be folders of more, and can't be looked into.
    """
    found = storage.walk(folder, unless=(record.RUN, record.STARTED))
    return (one for one in found if _is_unlisted(one) or one.url.lower().endswith(SUFFIXES))


def _is_unlisted(entry: storage.Entry) -> bool:
    """Whether it may be a folder of scenes, and can't be looked into."""
    return entry.is_folder and entry.problem is not None


def _unlisted(entry: storage.Entry) -> Candidate:
    """What the listing of an archive lacks."""
    return Candidate(_clean(storage.absolute(entry.url)), entry.url, reason=f"{UNLISTED}{entry.problem}")


def _single(url: str) -> Candidate:
    return Candidate(_clean(storage.name(url).rpartition(".")[0] or storage.name(url)), url, (_source(url),))


def _source(url: str, hints: Sequence[Hint] = ()) -> Source:
    return Source(storage.absolute(url), tuple(hints))


def _clean(scene_id: str) -> str:
    """A folder's name: as it is, but for what would make it another folder."""
    cleaned = re.sub(r"[:/\0]", "_", scene_id)
    return cleaned.replace(".", "_") if cleaned in ("", ".", "..") else cleaned


def _with_unique_ids(candidates: Iterable[Candidate]) -> list[Candidate]:
    by_id: dict[str, list[Candidate]] = {}
    for one in candidates:
        by_id.setdefault(one.scene_id or "_", []).append(one)
    unique = []
    for scene_id, ones in by_id.items():
        for one in ones:
            digest = hashlib.sha256(storage.absolute(one.url).encode("utf-8", "surrogateescape")).hexdigest()[:8]
            unique.append(replace(one, scene_id=f"{scene_id}-{digest}" if len(ones) > 1 else scene_id))
    return sorted(unique, key=lambda one: (one.scene_id, one.url))


class _Pattern:
    """`--pattern`: which band of which scene a file is."""

    def __init__(self, text: str, bands: Sequence[str] | None):
        strange = [one for one in re.findall(r"\{([^{}]*)\}", text) if one not in ("scene", "band")]
        if strange:
            raise UsageError(f"pattern {text!r}: {{{strange[0]}}} is none of {{scene}}, {{band}}")
        if "{band}" not in text:
            raise UsageError(f"pattern {text!r} has no {{band}} to tell bands by; e.g. '{{scene}}_{{band}}.tif'")
        self.text, self.bands = text.strip("/"), bands
        self.depth = self.text.count("/") + 1
        # The names asked for first: where several splits of a name fit, the one that makes sense is taken.
        named = "|".join(re.escape(one) for one in sorted(bands or (), key=len, reverse=True))
        self.expressions = [
            re.compile(self._expression(band)) for band in ([f"(?:{named})"] if named else []) + [r"[^/]+?"]
        ]

    def _expression(self, band: str) -> str:
        seen: set[str] = set()
        made = ""
        for part in re.split(r"(\{scene\}|\{band\}|\*)", self.text):
            if part in ("{scene}", "{band}"):
                name = part[1:-1]
                group = f"(?P<{name}>{band if name == 'band' else '[^/]+'})"
                made += f"(?P={name})" if name in seen else group
                seen.add(name)
            else:
                made += "[^/]*" if part == "*" else re.escape(part)
        return made

    def match(self, url: str) -> tuple[str, str, str] | None:
        """(folder above the match, scene, band) of a file."""
        parts = url.split("/")
        folder, rest = "/".join(parts[: -self.depth]), "/".join(parts[-self.depth :])
        for expression in self.expressions:
            match = expression.fullmatch(rest)
            if match:
                groups = match.groupdict()
                scene = groups.get("scene")
                if scene is None:
                    scene = storage.name(storage.absolute(folder or "."))
                return folder, scene, groups["band"]
        return None

    def group(self, listed: Sequence[tuple[str, list[str]]]) -> list[Candidate]:
        scenes: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
        for argument, urls in listed:
            matched = [(url, self.match(url)) for url in urls]
            if not any(match for _, match in matched):
                seen = ", ".join(repr(storage.name(url)) for url in urls[:3]) or "nothing"
                raise UsageError(f"{argument} holds no file named like {self.text!r}; it holds {seen}, ...")
            for url, match in matched:
                if match:
                    folder, scene, band = match
                    files = scenes.setdefault((storage.absolute(folder or "."), scene), {})
                    # One file listed twice, by two names of one folder: the same one is kept whatever their order.
                    same = files.setdefault(band, {})
                    same[storage.absolute(url)] = min(url, same.get(storage.absolute(url), url))
        return [self._candidate(scene, files) for (_, scene), files in scenes.items()]

    def _candidate(self, scene: str, files: Mapping[str, Mapping[str, str]]) -> Candidate:
        any_file = min(url for same in files.values() for url in same.values())
        folder = "/".join(any_file.split("/")[: -self.depth])
        url = (folder + "/" if folder or any_file.startswith("/") else "") + self.text.replace("{scene}", scene)
        if self.bands is not None and (called := spectrum.match(self.bands, files)):
            files = {name: files[own] for name, own in called.items()}
        names = list(self.bands) if self.bands is not None else sorted(files)
        missing = [name for name in names if name not in files]
        double = next((name for name in names if len(files.get(name, ())) > 1), None)
        reason = None
        if missing:
            have = ", ".join(sorted(files)) + spectrum.why(missing, files)
            reason = (
                f"has no file of band {', '.join(missing)}; it has {have}; is it still to be fetched? Or say which is "
                f"which: --bands {missing[0]}=ITS_NAME,..."
            )
        elif double:
            reason = f"has several files of band {double}: {', '.join(sorted(files[double].values()))}"
        sources = () if reason else tuple(_source(next(iter(files[name])), [Hint((name,))]) for name in names)
        return Candidate(_clean(scene), url, sources, reason=reason)


# ---------------------------------------------------------------- STAC


def _read_stac(url: str, bands: Sequence[str] | None, seen: set[str] | None = None) -> Iterator[Candidate]:
    """Items of a STAC item, collection, catalogue or item collection; links are followed on this storage only."""
    seen = set() if seen is None else seen
    if storage.absolute(url) in seen:
        return
    seen.add(storage.absolute(url))
    try:
        yield from _read_listing(url, bands, seen)
    except Exception as error:
        stem = _clean(storage.name(url).rpartition(".")[0] or storage.name(url))
        yield Candidate(stem, url, reason=f"{UNLISTED}the STAC file cannot be read: {refusal(error)}")


def _read_listing(url: str, bands: Sequence[str] | None, seen: set[str]) -> Iterator[Candidate]:
    """What one STAC file holds and leads to."""
    value = storage.read_json(url)
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "Feature":
        yield _read_item(url, value, bands)
    elif kind == "FeatureCollection" and isinstance(value.get("features"), list):
        for item in value["features"]:
            name = str(item.get("id")) if isinstance(item, dict) else "?"
            one = _read_item(url, item if isinstance(item, dict) else {}, bands)
            yield replace(one, url=f"{url}#{name}")
    elif kind in ("Collection", "Catalog"):
        links = value.get("links")
        for link in links if isinstance(links, list) else ():
            if not isinstance(link, dict) or link.get("rel") not in ("item", "child"):
                continue
            target = str(link.get("href", ""))
            try:
                resolved = _resolve_href(url, target)
            except Refused as error:
                yield Candidate(_clean(_stem(target)), target, reason=f"{UNLISTED}{error}")
                continue
            yield from _read_stac(resolved, bands, seen)
    else:
        raise Refused('it is JSON but no STAC item, collection or catalogue (no "type" that says so)')


def _stem(url: str) -> str:
    return storage.name(url).rpartition(".")[0] or storage.name(url) or "_"


def _resolve_href(base: str, href: str) -> str:
    """An href of a STAC file, relative ones to where it lies.

    Raises:
        Refused: if it leads to the network.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", href)
    if scheme and scheme.group(1).lower() not in (storage.scheme_of(base), "file"):
        raise Refused(
            f"{href} lies on the network ({scheme.group(1)}:), and sattile reads from its storage only; download it, "
            f"and let the item say where it is"
        )
    if href.startswith("/vsi"):
        raise Refused(f"{href} is a GDAL virtual path; name the file itself")
    if scheme:
        return href
    path = href if href.startswith("/") else f"{storage.parent(base)}/{href}"
    prefix = ""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+:/+)(.*)", path)
    if match:
        prefix, path = match.groups()
    path = prefix + posixpath.normpath(path)
    # Hrefs may be encoded; a file that really has a % in its name wins.
    return path if "%" not in path or storage.exists(path) else unquote(path)


def _read_item(url: str, value: dict[str, Any], bands: Sequence[str] | None) -> Candidate:
    import pystac

    stem = _clean(str(value.get("id") or _stem(url)))
    try:
        item = pystac.Item.from_dict(_with_a_time(value), href=storage.absolute(url), migrate=False, preserve_dict=True)
    except Exception as error:  # pystac raises KeyError, TypeError, ValueError, ... for what is no item
        if is_outage(error):
            raise
        what = f"is no valid STAC item: {type(error).__name__}: {error}"
        return Candidate(stem, url, reason=UNLISTED + what)
    try:
        stated = item.datetime.isoformat() if item.datetime else None
        sources, interval = _item_sources(url, item, bands), _interval(item.properties)
    except Refused as error:
        return Candidate(stem, url, reason=error.reason)
    except Exception as error:
        return Candidate(stem, url, reason=f"{UNLISTED}{refusal(error)}")
    return Candidate(stem, url, tuple(sources), stated, interval=interval)


def _with_a_time(item: dict[str, Any]) -> dict[str, Any]:
    """The item as pystac takes it: one that states no time, with the placeholders that STAC wants."""
    said = item.get("properties")
    if not isinstance(said, dict) or said.get("datetime") or {"start_datetime", "end_datetime"} <= said.keys():
        return item
    return item | {"properties": said | time_properties(None, None)}


def _interval(properties: Mapping[str, Any]) -> tuple[str, str] | None:
    """The interval that an item states, in UTC; None for placeholders, and where it can't be."""
    times = stated_times(properties)
    first, last = (_in_utc(times.get(name)) for name in ("start_datetime", "end_datetime"))
    return (first, last) if first and last and moment(first) <= moment(last) else None


def _item_sources(url: str, item: Any, bands: Sequence[str] | None) -> list[Source]:
    """The files of an item that hold the bands asked for, else its data assets."""
    images = {key: asset for key, asset in item.assets.items() if _is_image(asset)}
    if not images:
        raise Refused(f"has no asset that is a GeoTIFF or JPEG 2000; it has {', '.join(item.assets) or 'none'}")
    hinted = {key: _asset_hints(key, asset) for key, asset in images.items()}
    data = [key for key, asset in images.items() if "data" in (asset.roles or [])]
    data = data or [key for key, asset in images.items() if not asset.roles] or list(images)
    if bands is None:
        counts: dict[str, int] = {}
        for key in data:
            for hint in hinted[key]:
                counts[hint.names[0]] = counts.get(hint.names[0], 0) + 1
        twice = {name for name, count in counts.items() if count > 1}
        if twice:  # names said by several assets: a single band goes by its asset's
            hinted = {
                key: [replace(h, names=(key if len(hints) == 1 else f"{key}_{h.names[0]}", *h.names))
                      if h.names[0] in twice else h for h in hints]
                for key, hints in hinted.items()
            }  # fmt: skip
        picked = {key: hinted[key] for key in data}
    else:
        picked = {}
        order = data + [key for key in images if key not in data]
        missing = []
        called = spectrum.match(bands, {name for key in order for hint in hinted[key] for name in hint.names}) or {}
        for name in bands:
            own = called.get(name, name)
            places = [
                (hint.names.index(own), rank, key, hint)
                for rank, key in enumerate(order)
                for hint in hinted[key]
                if own in hint.names
            ]
            if places:
                _, _, key, hint = min(places, key=lambda one: one[:2])
                picked.setdefault(key, []).append(replace(hint, names=(name,), soft=False))
            else:
                missing.append(name)
        if missing:
            unnamed = [key for key in data if any(hint.soft for hint in hinted[key])]
            if len(unnamed) == 1 and len(missing) == len(bands):
                picked = {unnamed[0]: []}  # one file that the item says nothing about: named as any file's
            else:
                have = sorted({hint.names[0] for key in images for hint in hinted[key]})
                raise Refused(f"has no asset with band {', '.join(missing)}; it has {', '.join(have) or 'none named'}")
    return [_source(_resolve_href(url, images[key].href), hints) for key, hints in picked.items()]


def _is_image(asset: Any) -> bool:
    kind = (asset.media_type or "").lower()
    if "tiff" in kind or "jp2" in kind or "jpeg2000" in kind:
        return True
    return not kind and str(asset.href).lower().endswith(SUFFIXES)


def _asset_hints(key: str, asset: Any) -> list[Hint]:
    """Bands of an asset by `bands` (STAC 1.1), else `eo:bands` with `raster:bands`; its key if nothing is said."""
    fields = asset.extra_fields
    common = fields.get("bands") or []
    optical, rasters = fields.get("eo:bands") or [], fields.get("raster:bands") or []
    count = max(len(common), len(optical), len(rasters))
    if count == 0:
        return [
            Hint(
                names=(key,),
                nodata=_number(fields.get("nodata")),
                scale=_number(fields.get("raster:scale")),
                offset=_number(fields.get("raster:offset")),
                soft=True,
            )
        ]
    hints = []
    for at in range(count):
        said: dict[str, Any] = {}
        for source in (fields, *(one[at] for one in (rasters, optical, common) if at < len(one))):
            said |= {name: source[name] for name in source if source[name] is not None}
        own = next((one[at].get("name") for one in (common, optical) if at < len(one) and one[at].get("name")), None)
        name = own or (key if count == 1 else f"b{at + 1}")
        colour = said.get("eo:common_name", said.get("common_name"))
        others = [one for one in (key if count == 1 else None, colour) if one and one != name]
        hints.append(
            Hint(
                names=(str(name), *map(str, others)),
                index=at + 1,
                nodata=_number(said.get("nodata")),
                scale=_number(said.get("raster:scale", said.get("scale"))),
                offset=_number(said.get("raster:offset", said.get("offset"))),
            )
        )
    return hints


def _number(value: Any) -> float | None:
    if isinstance(value, str) and value.lower() in ("nan", "inf", "-inf"):
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


# ---------------------------------------------------------------- from headers to scenes


def resolve(
    spark: SparkSession,
    arguments: str | Sequence[str],
    *,
    bands: Sequence[str] | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
) -> Resolved:
    """Scenes from what a user names: `find`, then headers in Spark tasks.

    Args:
        arguments, pattern: see `find`.
        bands: as in `find`; `blue=B02` gives the files' B02 the name blue.
        nodata: missing value of all bands, before whatever the files say.

    Returns:
        Scenes in the order of their ids, with the bands wanted in that order, on the finest of their files' grids; the
        same for any order of arguments.

    Raises:
        UsageError: see `find`; for a name that is given twice; for a session that can't be used.
    """
    engine.check(spark)
    called = called_otherwise(bands)
    return _resolve(spark, find(arguments, bands=_own(called), pattern=pattern), called, nodata)


def called_otherwise(bands: Sequence[str] | None) -> dict[str, str] | None:
    """{name: the files' name} of bands as they are asked for: `red`, or `red=B04`.

    Raises:
        UsageError: for a name that is given twice, or empty.
    """
    if bands is None:
        return None
    found: dict[str, str] = {}
    for one in bands:
        name, equals, own = (part.strip() for part in one.partition("="))
        if not name or (equals and not own) or name in found:
            raise UsageError(
                f"bands {','.join(bands)}: {one!r} is no band, or stands there twice; write red, or red=B04"
            )
        found[name] = own or name
    return found


def _own(called: Mapping[str, str] | None) -> list[str] | None:
    """The files' names of the bands that are wanted."""
    return None if called is None else list(called.values())


def _resolve(
    spark: SparkSession, candidates: Sequence[Candidate], called: Mapping[str, str] | None, nodata: float | None
) -> Resolved:
    """`called`: see `called_otherwise`."""
    own = _own(called)
    outcomes: list[tuple[int, str | None, str | None, list[str]]] = []
    if candidates:
        context = spark.sparkContext
        # Several tasks a core, so that a slow disk or a crash does not hold up the rest; small ones cost 10 ms each.
        tasks = max(1, min(len(candidates), max(4 * context.defaultParallelism, len(candidates) // 200)))
        rows = context.parallelize(list(enumerate(candidates)), tasks)
        outcomes = rows.mapPartitions(engine.on_worker(partial(_describe_all, bands=own, nodata=nodata))).collect()
    scenes, refused = [], []
    striped = []
    for at, text, reason, urls in sorted(outcomes):
        striped += urls
        if text is None:
            refused.append(Refusal(candidates[at].url, STAGE, reason or "unknown"))
            continue
        try:
            scene = Scene.from_json(text)
            scenes.append(scene if called is None else scene.select_as(called))
            if (said := candidates[at].datetime) and scene.datetime is None:
                log.warning("%s: its date %r can't be used and is left out: no time of years 1 to 9999 in UTC",
                            candidates[at].url, said)  # fmt: skip
        except Exception as error:
            refused.append(Refusal(candidates[at].url, STAGE, refusal(error).reason))
    if striped:
        log.warning(
            "%s%s: stored in strips as wide as the file: each window reads whole rows, many times its own bytes; "
            "in tiles it would not: gdal_translate -of COG IN OUT.tif",
            striped[0], f" and {len(striped) - 1} more" if striped[1:] else "",
        )  # fmt: skip
    return Resolved(scenes, refused, len(candidates))


def _describe_all(
    rows: Iterable[tuple[int, Candidate]], *, bands: Sequence[str] | None, nodata: float | None
) -> Iterator[tuple[int, str | None, str | None, list[str]]]:
    """In a Spark task: (number, scene's JSON or None, reason or None, striped files) of each candidate."""
    from sattile import raster
    from sattile.decoder import decoder

    striped: list[str] = []

    def read_header(url: str) -> FileInfo:
        info: FileInfo = decoder().call(raster.describe_file, url)
        if info.striped:
            striped.append(url)
        return info

    for at, candidate in rows:
        striped.clear()
        try:
            yield at, describe(candidate, read_header, bands=bands, nodata=nodata).to_json(), None, list(striped)
        except Exception as error:
            yield at, None, refusal(error).reason, []


def describe(
    candidate: Candidate,
    read_header: Callable[[str], FileInfo],
    *,
    bands: Sequence[str] | None = None,
    nodata: float | None = None,
) -> Scene:
    """A candidate as a scene.

    Args:
        read_header: `raster.describe_file`, or that in the decoder.

    Raises:
        Refused: with the reason.
    """
    if candidate.reason is not None:
        raise Refused(candidate.reason)
    if candidate.known is not None:
        known = Scene.from_json(candidate.known)
        scene = _trusted(known, bands)
        if scene is None:
            candidate = _again(candidate, known, bands)
            scene = describe(candidate, read_header, bands=bands)
        scene = replace(scene, scene_id=candidate.scene_id)
    else:
        infos = []
        for source in candidate.sources:
            try:
                infos.append(read_header(source.url))
            except Refused as error:
                where = "" if len(candidate.sources) == 1 else f"{storage.name(source.url)}: "
                raise Refused(where + error.reason) from None
        scene = build_scene(candidate, infos, bands)
    if nodata is not None:
        scene = replace(scene, bands=tuple(replace(one, nodata=float(nodata), forced=True) for one in scene.bands))
    return scene


def _trusted(scene: Scene, bands: Sequence[str] | None) -> Scene | None:
    """A catalogue's scene with the bands wanted, if its files are as they were; None if it is to be described again."""
    from sattile.raster import masks_of

    described = {band.url for band in scene.bands}
    if bands is not None:
        called = spectrum.match(bands, scene.band_names)
        if called is None:
            missing = spectrum.missing(bands, scene.band_names)
            raise Refused(f"has no band {', '.join(missing)}; the catalogue has {', '.join(scene.band_names)}")
        scene = scene.select_as(called)
    for url, identity in scene.identity.items():
        entry = storage.stat(url)
        if entry is None and url in described:
            raise Refused(f"the file is gone: {url}; run `sattile index` again")
        if entry is None or [entry.size, entry.mtime] != list(identity):
            return None
    if any(mask not in scene.identity and storage.exists(mask) for url in described for mask in masks_of(url)):
        return None
    # What stands there beside statistics (nodata, a CRS) is part of the header; looking at a file in QGIS writes one.
    if any(storage.exists(url + ".aux.xml") for url in described):
        return None
    # With fewer files, another of them may have the finest grid.
    files = {band.url for band in scene.bands}
    return scene if bands is None or files == described else None


def _again(candidate: Candidate, scene: Scene, bands: Sequence[str] | None) -> Candidate:
    """A candidate from a catalogue's row, with what it says of its bands."""
    sources: dict[str, list[Hint]] = {}
    called = None if bands is None else spectrum.match(bands, scene.band_names)
    for band in (scene if called is None else scene.select_as(called)).bands:
        hint = Hint((band.name,), band.index, band.nodata, band.scale, band.offset, band.forced)
        sources.setdefault(band.url, []).append(hint)
    made = tuple(Source(url, tuple(hints)) for url, hints in sources.items())
    return Candidate(candidate.scene_id, scene.url, made, scene.datetime, interval=scene.interval)


def build_scene(candidate: Candidate, infos: Sequence[FileInfo], bands: Sequence[str] | None = None) -> Scene:
    """One scene from the headers of its files: bands named and selected, the finest grid.

    Raises:
        Refused: for a band that is missing, files of different CRSs, or turned against each other.
    """
    named: list[Band] = []
    for source, info in zip(candidate.sources, infos, strict=True):
        unsaid = len(info.bands) > 1 and all(hint.soft for hint in source.hints)
        named += _name_own(info, bands) if unsaid or not source.hints else _name_hinted(source, info)
    wanted = set(bands) if bands is not None else {one.name for one in named}
    twice = sorted({one.name for one in named if sum(other.name == one.name for other in named) > 1} & wanted)
    if twice:
        raise Refused(f"has several bands named {', '.join(twice)}; say which by --bands or --pattern")
    if bands is not None:
        by_name = {band.name: band for band in named}
        missing = [name for name in bands if name not in by_name]
        if missing:
            raise Refused(f"has no band {', '.join(missing)}; it has {', '.join(by_name)}")
        named = [by_name[name] for name in bands]
    by_url = {info.url: info for info in infos}
    used = [by_url[url] for url in dict.fromkeys(band.url for band in named)]
    finest = min(used, key=lambda info: (_pixel_area(info), -info.height * info.width))
    for info in used:
        _check_grids(finest, info)
    datetimes = [_in_utc(candidate.datetime)]
    if candidate.interval is None:  # a file of a composite says when it was made
        datetimes += [info.datetime for info in used]
    return Scene(
        scene_id=candidate.scene_id,
        url=candidate.url,
        height=finest.height,
        width=finest.width,
        bands=tuple(named),
        crs=finest.crs,
        transform=finest.transform,
        gsd=finest.gsd,
        datetime=next((one for one in datetimes if one), None),
        footprint=finest.footprint,
        identity={url: list(version) for info in used for url, version in info.identity.items()},
        interval=candidate.interval,
    )


def _in_utc(text: str | None) -> str | None:
    from sattile.raster import iso_datetime

    return iso_datetime(text)


def _name_hinted(source: Source, info: FileInfo) -> list[Band]:
    named = []
    for hint in source.hints:
        if hint.index is None and len(info.bands) > 1:
            raise Refused(
                f"{storage.name(info.url)} has {len(info.bands)} bands, and its name says it is {hint.names[0]} alone"
            )
        found = [band for band in info.bands if hint.index in (None, band.index)]
        if not found:
            raise Refused(
                f"{storage.name(info.url)} has no band number {hint.index} ({hint.names[0]}); it has {len(info.bands)}"
            )
        band = found[0]
        # The file's own word goes before the item's, except for what the user had said when it was indexed.
        nodata = hint.nodata if hint.forced or band.nodata is None else band.nodata
        stated = (band.scale, band.offset) != (None, None)
        named.append(
            replace(
                band,
                name=hint.names[0],
                nodata=nodata,
                forced=hint.forced,
                scale=band.scale if stated else hint.scale,
                offset=band.offset if stated else hint.offset,
            )
        )
    return named


def _name_own(info: FileInfo, bands: Sequence[str] | None) -> list[Band]:
    """By descriptions if they have all that is wanted, else the wanted names in file order, else b1, b2, ..."""
    own = [band.name for band in info.bands]
    numbered = [band.name or f"b{at}" for at, band in enumerate(info.bands, 1)]
    if len(set(numbered)) < len(numbered):
        numbered = [f"b{at}" for at in range(1, len(numbered) + 1)]
    if bands is None or set(bands) <= set(numbered):
        return [replace(band, name=name) for band, name in zip(info.bands, numbered, strict=True)]
    described = [name for name in own if name]
    if set(bands) <= set(own):
        return [band for band in info.bands if band.name in bands]
    called = spectrum.match(bands, described)
    if called is not None and len(set(described)) == len(described):
        by_name = dict(zip(own, info.bands, strict=True))
        return [replace(by_name[mine], name=name) for name, mine in called.items()]
    taken, known = list(zip(own, bands, strict=False)), spectrum.known(bands, described)
    if known and (len(bands) > len(own) or any(said and said != known.get(name) for said, name in taken)):
        # The file names its bands in these very words: in file order, one would get the name of another.
        missing = [name for name in bands if name not in known]
        raise Refused(
            f"has no band {', '.join(missing)}; its bands are {', '.join(described)}{spectrum.why(missing, described)}"
        )
    if len(bands) > len(info.bands):
        raise Refused(
            f"has {len(info.bands)} band{'s' * (len(info.bands) != 1)} ({', '.join(numbered)}), and {len(bands)} are "
            f"wanted ({', '.join(bands)}); is it one file of several? then say how they are named: --pattern"
        )
    return [replace(band, name=name) for band, name in zip(info.bands, bands, strict=False)]


def _pixel_area(info: FileInfo) -> float:
    a, b, _, d, e, _ = info.transform
    return round(abs(a * e - b * d), 12)


def _check_grids(finest: FileInfo, other: FileInfo) -> None:
    if other.url == finest.url:
        return
    from sattile.geography import same_crs
    from sattile.raster import shift_between

    names = f"{storage.name(finest.url)} and {storage.name(other.url)}"
    if not same_crs(finest.crs, other.crs):
        raise Refused(f"{names} are in different CRSs; bring them into one with gdalwarp -t_srs")
    if finest.crs is None and (finest.height, finest.width) != (other.height, other.width):
        raise Refused(
            f"{names} have no CRS, so their pixels must be the same, and they are {finest.height} x {finest.width} and "
            f"{other.height} x {other.width}"
        )
    shape = (finest.height, finest.width)
    shift = shift_between(finest.transform, shape, other.transform, (other.height, other.width), other.url)
    if shift is not None:
        row_step, row_offset, col_step, col_offset = shift
        rows = (row_offset, row_offset + finest.height * row_step)
        cols = (col_offset, col_offset + finest.width * col_step)
        if rows[1] <= 0 or cols[1] <= 0 or rows[0] >= other.height or cols[0] >= other.width:
            raise Refused(f"{names} do not overlap: they are not bands of one scene")


# ---------------------------------------------------------------- the catalogue


def index(
    spark: SparkSession,
    scenes: str | Sequence[str],
    *,
    out: str,
    bands: str | Sequence[str] | None = None,
    pattern: str | None = None,
    nodata: float | None = None,
    overwrite: bool = False,
    max_failed_fraction: float = 0.1,
) -> str:
    """Write a catalogue of scenes, `OUT/scenes.parquet` (GeoParquet), with the run's record and what was refused.

    Args:
        scenes: files, globs, folders, STAC items or collections, a catalogue.
        out: folder.
        bands: names wanted, in order; of files that name none, the first ones in file order. 'blue=B02,...' gives them
            other names.
        pattern: how band files are named, such as '{scene}, {band}.tiff'.
        nodata: missing value, whatever the files declare.
        overwrite: replace a catalogue made with other settings.
        max_failed_fraction: refused scenes / given ones above which the command fails (3).

    Returns:
        URL of the catalogue. A rerun with nothing changed leaves it as it is.

    Raises:
        UsageError: see `find` and `record.Run`.
        TooManyRefused: the catalogue holds the others.
    """
    engine.check(spark)
    bands = [name.strip() for name in bands.split(",")] if isinstance(bands, str) else bands
    called = called_otherwise(bands)
    candidates = find(scenes, bands=_own(called), pattern=pattern)  # wrong usage ends it before anything is written
    url = storage.join(out, CATALOG)
    settings = {"bands": None if bands is None else list(bands), "pattern": pattern, "nodata": plain(nodata)}
    with record.Run("index", out, settings, overwrite, max_failed_fraction) as run:
        with run.stage("index") as stage:
            resolved = _resolve(spark, candidates, called, nodata)
            stage.pixels = sum(scene.height * scene.width for scene in resolved.scenes)
            try:
                content = _catalog_bytes(resolved.scenes)
            except Exception:  # of one scene perhaps, and told by it
                resolved = _listable(resolved)
                content = _catalog_bytes(resolved.scenes)
            same = storage.exists(url) and storage.read_bytes(url) == content
            if not same:
                storage.write_bytes(url, content)
        run.given = len(candidates)
        run.done, run.skipped = (0, len(resolved.scenes)) if same else (len(resolved.scenes), 0)
        run.inputs = [
            {"url": file, "size": size, "time": mtime}
            for scene in resolved.scenes
            for file, (size, mtime) in scene.identity.items()
        ]
        run.refuse(resolved.refused)
        run.finish()
    return url


def plain(number: float | None) -> float | str | None:
    """A number as settings hold it, which JSON has: NaN as text."""
    return number if number is None or math.isfinite(number) else str(number)


def read_catalog(url: str) -> list[Scene]:
    """Scenes of a catalogue (its folder or `scenes.parquet`), as they were indexed.

    Raises:
        UsageError: if there is none, or it is none of sattile's.
    """
    import io

    import pyarrow.parquet as pq

    entry = storage.stat(url)
    file = storage.join(url, CATALOG) if entry is not None and entry.is_folder else url
    if not storage.exists(file):
        raise UsageError(f"{file} does not exist; `sattile index` makes a catalogue")
    try:
        texts = pq.read_table(io.BytesIO(storage.read_bytes(file)), columns=["scene"]).column("scene").to_pylist()
        return [Scene.from_json(text) for text in texts]
    except Exception as error:
        raise UsageError(f"{file} is no catalogue of `sattile index`: {error}") from error


def _read_rows(url: str) -> list[Candidate]:
    return [Candidate(scene.scene_id, scene.url, known=scene.to_json()) for scene in read_catalog(url)]


def _listable(resolved: Resolved) -> Resolved:
    """Refuses scenes of which no row can be made, such as those of a catalogue that was edited by hand."""
    good, refused = [], list(resolved.refused)
    for scene in resolved.scenes:
        try:
            _catalog_bytes([scene])
            good.append(scene)
        except Exception as error:
            refused.append(Refusal(scene.url, STAGE, refusal(error).reason))
    return replace(resolved, scenes=good, refused=refused)


def _catalog_bytes(scenes: Sequence[Scene]) -> bytes:
    """GeoParquet 1.0 (https://geoparquet.org/releases/v1.0.0): the same bytes for the same scenes."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyproj
    import shapely

    shapes = [shapely.from_wkb(one.footprint) for one in scenes if one.footprint]
    outlines: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({shape.geom_type for shape in shapes}),
        "crs": pyproj.CRS.from_epsg(4326).to_json_dict(),
    }
    if shapes:
        outlines["bbox"] = [float(one) for one in shapely.total_bounds(shapes)]
    geo = {"version": "1.0.0", "primary_column": "footprint", "columns": {"footprint": outlines}}
    columns: dict[str, tuple[pa.DataType, list[Any]]] = {
        "scene_id": (pa.string(), [one.scene_id for one in scenes]),
        "url": (pa.string(), [one.url for one in scenes]),
        "urls": (pa.list_(pa.string()), [list(dict.fromkeys(band.url for band in one.bands)) for one in scenes]),
        "width": (pa.int64(), [one.width for one in scenes]),
        "height": (pa.int64(), [one.height for one in scenes]),
        "bands": (pa.list_(pa.string()), [list(one.band_names) for one in scenes]),
        "dtype": (pa.string(), [_dtype(one) for one in scenes]),
        "crs": (pa.string(), [one.crs for one in scenes]),
        "transform": (pa.list_(pa.float64()), [list(one.transform) for one in scenes]),
        "gsd": (pa.float64(), [one.gsd for one in scenes]),
        "nodata": (pa.list_(pa.float64()), [[band.nodata for band in one.bands] for one in scenes]),
        "scales": (pa.list_(pa.float64()), [[band.scale for band in one.bands] for one in scenes]),
        "offsets": (pa.list_(pa.float64()), [[band.offset for band in one.bands] for one in scenes]),
        "datetime": (pa.string(), [one.datetime for one in scenes]),
        "footprint": (pa.binary(), [one.footprint for one in scenes]),
        "scene": (pa.string(), [one.to_json() for one in scenes]),
    }
    if any(one.interval for one in scenes):  # catalogues without composites stay as they are
        for place, name in enumerate(("start_datetime", "end_datetime")):
            columns[name] = pa.string(), [one.interval[place] if one.interval else None for one in scenes]
    arrays = [pa.array(values, kind) for kind, values in columns.values()]
    fields = [pa.field(name, kind) for name, (kind, _) in columns.items()]
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata={"geo": json.dumps(geo)}))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _dtype(scene: Scene) -> str:
    """The one that holds every band."""
    import numpy as np

    return str(np.result_type(*(np.dtype(band.dtype) for band in scene.bands)))
