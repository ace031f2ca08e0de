"""Reads rasters: what a file is, windows of a scene with their valid pixels, labels on a scene's grid.

Everything here opens foreign files: on executors it runs inside `decoder`. A scene's file is a
GeoTIFF, COG or JPEG 2000; the first bytes decide which driver may open it, and nothing else is opened: a VRT or XML
file could pull in other files and addresses.

What is read is what is stored. An alpha band is no data band, it says what is valid; a palette's band is its indices
(a class map, usually); a file of several pages is its first page; a file without a CRS, or without a position, is
taken on its own pixel grid. Refused, with the way out: complex numbers, positions by ground control points or RPCs
alone, single strips or tiles too large to decode.
"""

from __future__ import annotations

import atexit
import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyproj
import rasterio
from affine import Affine
from pyproj.exceptions import ProjError
from rasterio._err import CPLE_BaseError
from rasterio.abc import MultiByteRangeResourceContainer
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window as RasterioWindow
from shapely.errors import ShapelyError

from sattile import geography, storage
from sattile.errors import Refused, is_outage
from sattile.grid import Window
from sattile.schema import IGNORE, Band, Scene

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
JPEG2000 = (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51")

MAX_BLOCK_BYTES = 1 << 30
TOO_SHORT = "the file ends too early (a broken download?); fetch it again"
WIDE_BLOCK = 2048
"""Pixels; a file in pieces wider than this is in strips, of which a window of 512 px needs a quarter at most."""
OPEN_FILES = 16
STRIP = 64
# Labels much finer than the scene: at most this many of their pixels are held at once.
MAX_LABEL_PIXELS = 1 << 26

NOT_UNDERSTOOD = (RasterioError, CPLE_BaseError, ProjError, ShapelyError, ValueError, ArithmeticError)
"""What rasterio, GDAL, pyproj and shapely say of a strange header."""

_IDENTITY = Affine.identity()


@dataclass(frozen=True)
class FileInfo:
    """What one raster file is, from its header.

    Attributes:
        url: the file.
        height, width: in pixels.
        bands: those that hold data (alpha left out); their names are the file's descriptions, "" where it has none.
        crs: `EPSG:n` or WKT2; None if it has none, or one without a position on it.
        transform: see `schema.Scene`.
        gsd: in metres; None without a CRS that lies on Earth.
        datetime: ISO 8601 in UTC; None if not stated.
        footprint: WKB in EPSG:4326; None without a CRS that lies on Earth.
        identity: see `schema.Scene`: of the file, and of a mask beside it.
        striped: stored in rows as wide as the file, and wide: a window reads many times its bytes.
    """

    url: str
    height: int
    width: int
    bands: tuple[Band, ...]
    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    gsd: float | None = None
    datetime: str | None = None
    footprint: bytes | None = None
    identity: dict[str, list[int]] = field(default_factory=dict)
    striped: bool = False


def describe_file(url: str) -> FileInfo:
    """What a file is, from its header; no pixel is read.

    Raises:
        Refused: if it can't be used; says why and, where there is one, the way out.
    """
    entry = storage.stat(url)
    if entry is None:
        raise Refused(f"the file is gone: {url}")
    found = {url: entry} | {mask: storage.stat(mask) for mask in masks_of(url)}
    if problems := [f"{storage.name(name)}: {one.problem}" for name, one in found.items() if one and one.problem]:
        raise Refused(f"cannot be opened: {problems[0]}")
    identity = {name: [one.size, one.mtime] for name, one in found.items() if one is not None}
    with _open(url) as source:
        _check_mask_is_used(source, [storage.name(name) for name in identity if name != url])
        try:
            return _describe(url, source, identity)
        except NOT_UNDERSTOOD as error:
            reason = _reason(error, storage.local_path(url))
            raise Refused(f"its header is not understood: {type(error).__name__}: {reason}") from None


def _describe(url: str, source: rasterio.DatasetReader, identity: dict[str, list[int]]) -> FileInfo:
    crs, transform = _position(source)
    bands = _data_bands(url, source)
    _check_blocks(source)
    return FileInfo(
        url=url,
        height=source.height,
        width=source.width,
        bands=bands,
        crs=crs,
        transform=transform,
        gsd=geography.ground_sample_distance(crs, transform, source.height, source.width),
        datetime=_datetime(source),
        footprint=geography.footprint(crs, transform, source.height, source.width),
        identity=identity,
        striped=any(width > WIDE_BLOCK for _, width in source.block_shapes),
    )


def _open(url: str) -> rasterio.DatasetReader:
    path = storage.local_path(url)
    try:
        driver = _driver(url)
        _check_mask(url)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            if storage.scheme_of(url) != "file":
                storage.cut_short.difference_update([url, f"{url}.msk"])  # as it was before
                return rasterio.open(_Elsewhere.NAME, driver=driver, opener=_Elsewhere(url))
            # Of a str, rasterio would take what stands before a ":" or after a "?" or "#" for parts of a URL.
            return rasterio.open(PurePosixPath(path), driver=driver)
    except PermissionError:
        raise Refused("cannot be opened: permission denied; grant the right to read it") from None
    except OSError as error:  # RasterioIOError is one
        _check_outage(url, error)
        raise Refused(f"cannot be opened: {_reason(error, path)}") from None
    except (RasterioError, ValueError, AttributeError, SystemError) as error:
        _check_outage(url, error)
        # rasterio raises AttributeError for a TIFF's colour space that it has no name for
        raise Refused(f"cannot be opened: rasterio does not understand its header ({_reason(error, path)})") from None


def _check_outage(url: str, error: Exception) -> None:
    """Raises what is no fault of the file, be it kept by GDAL or not."""
    for one in (error, *(storage.failed.pop(name) for name in (url, f"{url}.msk") if name in storage.failed)):
        if is_outage(one):
            raise one


def _driver(url: str) -> str:
    with storage.open_file(url) as file:
        head = file.read(16)
    if not head:
        raise Refused("the file is empty (a broken download?); fetch it again")
    if head[:4] in TIFF:
        return "GTiff"
    if any(head.startswith(magic) for magic in JPEG2000):
        return "JP2OpenJPEG"
    remedy = "convert it: gdal_translate -of COG IN OUT.tif"
    if head.startswith(b"PK\3\4"):
        remedy = "it is a ZIP archive: unpack it"
    elif head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<", b"{")):
        remedy = "it is text; shapes (KML, GML, GeoJSON) are converted by: ogr2ogr OUT.gpkg IN"
    raise Refused(f"is neither GeoTIFF, COG nor JPEG 2000; {remedy}")


def masks_of(url: str) -> list[str]:
    """Where GDAL looks for a mask beside a file."""
    return [url + suffix for suffix in ((".msk", ".MSK") if storage.scheme_of(url) == "file" else (".msk",))]


_MATTERS = re.compile(
    rb'<PAMRasterBand\b[^>]*?\bband="(\d+)"|<(NoDataValue|SRS|GeoTransform|GCPList|Description|ColorInterp)\b.*?</\2>',
    re.DOTALL,
)
"""Of an `.aux.xml`, which band it speaks of, and what changes how pixels are read or placed."""


def beside(url: str) -> dict[str, tuple[int, int]]:
    """{url: version} of what lies beside a label raster and says how it is read: a mask by its size and time, an
    `.aux.xml` by what it says of nodata, position and bands.

    A GIS writes statistics into an `.aux.xml` of each raster that is looked at: nothing is made anew for them, nor for
    its time.
    """
    found = {mask: storage.stat(mask) for mask in masks_of(url)}
    versions = {mask: (entry.size, entry.mtime) for mask, entry in found.items() if entry is not None}
    aux = url + ".aux.xml"
    if storage.exists(aux):
        band, said = b"", []
        for match in _MATTERS.finditer(storage.read_bytes(aux)):
            band = match[1] or band
            if match[2]:
                said.append((band + b" " + match[0]).decode("utf-8", "replace"))
        if said:
            versions[aux] = (len(said), int(storage.digest(said)[:12], 16))
    return versions


def _check_mask(url: str) -> None:
    """GDAL opens a mask beside the file with any driver it has: let it be a TIFF."""
    for mask in masks_of(url):
        try:
            with storage.open_file(mask) as file:
                good = file.read(4) in TIFF
        except OSError:
            continue
        if not good:
            raise Refused(f"the mask beside it ({storage.name(mask)}) is no TIFF; remove it, or write it again")


def _check_mask_is_used(source: rasterio.DatasetReader, masks: Sequence[str]) -> None:
    """GDAL passes over a mask that it can't read."""
    unmasked = {MaskFlags.all_valid, MaskFlags.nodata, MaskFlags.alpha}
    if masks and any(unmasked & {*flags} for flags in source.mask_flag_enums):
        raise Refused(f"the mask beside it ({masks[0]}) can't be read; remove it, or write it again")


class _Elsewhere(MultiByteRangeResourceContainer):
    """GDAL's view of a file that is not on this machine, and of its sidecars.

    GDAL sees plain names: spaces, `#`, `;` and the like of a URL mean nothing to it. Of the many sidecars that it asks
    for, those that matter are looked up, once.
    """

    NAME = "scene.tif"
    SIDECARS = (".msk", ".aux.xml", ".ovr")
    WORLD_FILES = ("scene.tfw", "scene.wld")

    def __init__(self, url: str):
        self._url = url
        self._readers: dict[str, Any] = {}

    def _find(self, path: str) -> Any:
        """A reader of what GDAL calls `path`, of which others are made; None if there is no such file."""
        base = storage.name(path)
        if base not in self._readers:
            real = None
            if base == self.NAME or base.removeprefix(self.NAME) in self.SIDECARS:
                real = self._url + base.removeprefix(self.NAME)
            elif base in self.WORLD_FILES:
                real = self._url.rpartition(".")[0] + base.removeprefix("scene")
            try:
                self._readers[base] = storage.open_file(real) if real else None
            except FileNotFoundError:
                self._readers[base] = None
        return self._readers[base]

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        found = self._find(path)
        if found is None:
            raise FileNotFoundError(path)
        return found.again()

    def isfile(self, path: str) -> bool:
        return self._find(path) is not None

    def isdir(self, path: str) -> bool:
        return False

    def ls(self, path: str) -> list[str]:
        return []

    def mtime(self, path: str) -> int:
        return 0

    def size(self, path: str) -> int:
        found = self._find(path)
        if found is None:
            raise FileNotFoundError(path)
        return int(found.size)

    def rm(self, path: str) -> None:
        raise PermissionError(path)


def _reason(error: BaseException, path: str) -> str:
    """GDAL's own message at the bottom of a chain of exceptions, without paths and function names."""
    messages = []
    seen: BaseException | None = error
    while seen is not None:
        messages.append(str(getattr(seen, "errmsg", "") or seen))
        seen = seen.__cause__ or seen.__context__
    texts = [one for one in messages if one and not one.startswith("Read failed. See previous")]
    text = texts[-1] if texts else str(error)
    text = text.replace(path, storage.name(path))
    if re.search(r"got \d+ bytes, expected|Read error at (row|scanline)|(Cannot|Failed to) read.*offset", text):
        return TOO_SHORT
    name = re.escape(storage.name(path))
    text = re.sub(rf"^(?:'?{name}'?(?:, band \d+)?:\s*)+", "", text)
    text = re.sub(r"^(?:[A-Za-z0-9_]+\(\)?:?\s*|TIFF\w+:\s*)+", "", text)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


def _damaged(error: BaseException, path: str) -> Refused:
    """What to say of pixels that can't be read."""
    reason, where = _reason(error, path), f"(in {storage.name(path)})"
    return Refused(f"pixels cannot be read: {reason} {where}{'' if reason == TOO_SHORT else '; fetch it again'}")


def _position(source: rasterio.DatasetReader) -> tuple[str | None, tuple[float, float, float, float, float, float]]:
    transform = source.transform
    coefficients = tuple(transform)[:6]
    if transform == _IDENTITY:
        points, _ = source.gcps
        if points or source.rpcs:
            what = f"{len(points)} ground control points" if points else "rational polynomial coefficients (RPC)"
            raise Refused(
                f"is placed by {what} alone, not on a grid; put it on one first: gdalwarp -t_srs EPSG:4326 "
                f"{'-tps ' if points else '-rpc '}IN OUT.tif"
            )
        return None, coefficients  # a CRS without a position on it places nothing
    if not all(map(math.isfinite, coefficients)) or abs(transform.determinant) == 0:
        raise Refused(f"its geotransform {coefficients} is no grid: pixels without an area")
    return crs_text(source.crs), coefficients


def crs_text(crs: CRS | None) -> str | None:
    """`EPSG:n` where the CRS is exactly that, else WKT2; None for none."""
    if crs is None or not crs:
        return None
    epsg = crs.to_epsg(confidence_threshold=100)
    if epsg is not None:
        return f"EPSG:{epsg}"
    try:
        return crs.to_wkt(version="WKT2_2019")
    except RasterioError:
        return crs.to_wkt()


def _data_bands(url: str, source: rasterio.DatasetReader) -> tuple[Band, ...]:
    if not source.count:
        raise Refused("holds no raster, only sub-datasets or nothing; extract one: gdal_translate")
    bands = []
    colours = source.colorinterp
    for index in source.indexes:
        if colours[index - 1] == ColorInterp.alpha:
            continue
        dtype = source.dtypes[index - 1]
        if dtype.startswith("complex"):
            raise Refused(
                f"holds complex numbers ({dtype}); sattile reads real ones: write amplitude or intensity first, "
                f"e.g. with a derived VRT band: gdal_translate DERIVED_SUBDATASET:AMPLITUDE:IN OUT.tif"
            )
        nodata = source.nodatavals[index - 1]
        scale, offset = source.scales[index - 1], source.offsets[index - 1]
        stated = (scale, offset) != (1.0, 0.0)
        bands.append(
            Band(
                name=(source.descriptions[index - 1] or "").strip(),
                url=url,
                index=index,
                dtype=dtype,
                nodata=None if nodata is None else float(nodata),
                scale=scale if stated else None,
                offset=offset if stated else None,
            )
        )
    if not bands:
        raise Refused("holds an alpha band and no data")
    return tuple(bands)


def _check_blocks(source: rasterio.DatasetReader) -> None:
    """A strip or tile is decoded whole: one of gigabytes would take the worker's memory."""
    interleaved = source.count if source.profile.get("interleave") == "pixel" else 1
    for (height, width), dtype in zip(source.block_shapes, source.dtypes, strict=True):
        size = height * width * np.dtype(dtype if not dtype.startswith("complex") else "c16").itemsize * interleaved
        if size > MAX_BLOCK_BYTES:
            raise Refused(
                f"its pixels are stored in pieces of {height} x {width}, {size / 1e9:.1f} GB each, which must be "
                f"decoded whole; write it in tiles: gdal_translate -of COG IN OUT.tif"
            )


def _datetime(source: rasterio.DatasetReader) -> str | None:
    text = source.tags(ns="IMAGERY").get("ACQUISITIONDATETIME") or source.tags().get("ACQUISITIONDATETIME")
    return iso_datetime(text) or iso_datetime(source.tags().get("TIFFTAG_DATETIME"))


def iso_datetime(text: str | None) -> str | None:
    """`2020:05:17 10:11:12` (TIFF) or ISO 8601, with UTC if it names no zone -> ISO 8601 in UTC; None if neither.

    None, too, for what lies outside the years 1 to 9999 in UTC.
    """
    if not text:
        return None
    tiff = re.fullmatch(r"(\d{4}):(\d\d):(\d\d) (\d\d:\d\d:\d\d)\0?", text.strip())
    try:
        when = datetime.fromisoformat("{}-{}-{}T{}".format(*tiff.groups()) if tiff else text.strip())
        when = when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)
    except (ValueError, OverflowError):  # year 1 of a zone east of Greenwich is year 0 in UTC
        return None
    return when.isoformat(timespec="milliseconds" if when.microsecond else "seconds").replace("+00:00", "Z")


# ---------------------------------------------------------------- windows of a scene


class _Files:
    """The files opened last: consecutive windows come from the same ones, and GDAL's cache lives in them."""

    def __init__(self, limit: int = OPEN_FILES):
        self.limit = limit
        self._open: OrderedDict[tuple[str, int, int, Hashable], rasterio.DatasetReader] = OrderedDict()

    def get(self, url: str, masks: Hashable = ()) -> rasterio.DatasetReader:
        """A file, open.

        Args:
            masks: the version of what lies beside it, by the scene: GDAL keeps a mask that it has opened.
        """
        entry = storage.stat(url)
        if entry is None:
            raise Refused(f"the file is gone: {url}")
        key = (url, entry.size, entry.mtime, masks)
        if key in self._open:
            self._open.move_to_end(key)
            return self._open[key]
        source = _open(url)
        for old in [one for one in self._open if one[0] == url]:
            self._open.pop(old).close()
        self._open[key] = source
        while len(self._open) > self.limit:
            self._open.popitem(last=False)[1].close()
        return source

    def identity(self, url: str) -> list[int]:
        return next(([size, mtime] for name, size, mtime, _ in self._open if name == url), [])

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()


_files = _Files()


def close_files() -> None:
    """Close what `read` keeps open."""
    _files.close()


atexit.register(close_files)  # GDAL closing a file elsewhere after Python has ended would crash


def read(
    scene: Scene, window: Window, *, nodata: float | None = None, scaled: bool = False, by_band: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Read a window of a scene, on the scene's grid.

    Bands of files on other grids are interpolated bilinearly from their valid pixels, each pixel by itself, so that
    a part of a read is the read of that part, to the bit.

    Args:
        scene: its bands, in the order wanted.
        window: may reach outside the scene.
        nodata: missing value of all bands, before whatever the files say.
        scaled: physical values (stored * scale + offset) instead of stored ones.
        by_band: lay a band's pixels side by side in memory, as most files have them, instead of a pixel's bands.

    Returns:
        data: (height, width, bands) in either case; the smallest dtype that holds all bands, float32 if scaled; 0
            outside the scene.
        valid: (height, width) bool: every band is valid, as the files' masks, declared nodata or alpha say, and finite.

    Raises:
        Refused: for damaged pixels, a file that changed or went, a band without the scale and offset that are wanted.
    """
    if scaled:
        for band in scene.bands:
            if band.scale is None and band.offset is None:
                raise Refused(
                    f"band {band.name} states no scale and offset, and physical values are wanted; state them in "
                    f"the file (gdal_edit.py -scale S -offset O FILE) or in its STAC item"
                )

    inside = window & Window(0, 0, scene.height, scene.width)

    def empty(dtype: Any) -> np.ndarray:
        make = np.empty if inside == window else np.zeros
        if by_band:
            return np.moveaxis(make((len(scene.bands), *window.shape), dtype), 0, -1)
        return make((*window.shape, len(scene.bands)), dtype)

    dtype = result_dtype(scene)
    data = empty(dtype)
    valid = np.zeros(window.shape, bool)
    if inside.area:
        place = inside.slices(window)
        good = np.ones(inside.shape, bool)
        for url, positions in _by_file(scene.bands).items():
            bands = [scene.bands[position] for position in positions]
            source = _source(scene, url)
            shift = _shift(scene, source, url)
            if shift is None:
                direct = positions == list(range(len(scene.bands)))
                part = data[place] if direct else np.empty((*inside.shape, len(bands)), dtype)
                good &= _read_pixels(source, bands, inside, nodata, part)
                if not direct:
                    data[place][..., positions] = part
            else:
                part, part_good = _read_between(source, bands, inside, nodata, shift, dtype)
                data[place][..., positions] = part
                good &= part_good
        valid[place] = good
    if scaled:
        scales = np.array([1.0 if band.scale is None else band.scale for band in scene.bands])
        offsets = np.array([0.0 if band.offset is None else band.offset for band in scene.bands])
        physical = empty(np.float32)
        place = inside.slices(window)
        if inside.area:
            # In float64: float32 products of large stored numbers are off in the last digits.
            physical[place] = data[place].astype(np.float64) * scales + offsets
        data = physical
    return data, valid


def result_dtype(scene: Scene) -> np.dtype:
    """The smallest dtype that holds every band of a scene."""
    return np.result_type(*(np.dtype(band.dtype) for band in scene.bands))


def _by_file(bands: Iterable[Band]) -> dict[str, list[int]]:
    positions: dict[str, list[int]] = {}
    for position, band in enumerate(bands):
        positions.setdefault(band.url, []).append(position)
    return positions


def _source(scene: Scene, url: str) -> rasterio.DatasetReader:
    source = _files.get(url, tuple(tuple(scene.identity.get(mask, ())) for mask in masks_of(url)))
    expected, found = scene.identity.get(url), _files.identity(url)
    if expected and found and list(expected) != found:
        raise Refused(
            f"{url} changed while it was in use (size and time were {list(expected)}, are {found}); run again"
        )
    return source


def _shift(scene: Scene, source: rasterio.DatasetReader, url: str) -> tuple[float, float, float, float] | None:
    """How the scene's pixels lie in the file's: (row step, row offset, col step, col offset); None if they coincide."""
    if (source.height, source.width) == (scene.height, scene.width) and tuple(source.transform)[:6] == scene.transform:
        return None
    return shift_between(
        scene.transform, (scene.height, scene.width), tuple(source.transform)[:6], (source.height, source.width), url
    )


def shift_between(
    grid: Sequence[float], shape: tuple[int, int], other: Sequence[float], other_shape: tuple[int, int], url: str
) -> tuple[float, float, float, float] | None:
    """How one grid's pixels lie in another's.

    Returns:
        (row step, row offset, col step, col offset): pixel corner (r, c) of the grid is at (r * row step + row offset,
        c * col step + col offset) of the other; None if the two coincide.

    Raises:
        Refused: if one is turned against the other.
    """
    between = ~Affine(*other) * Affine(*grid)
    span = max(shape)
    if abs(between.b) * span > 0.01 or abs(between.d) * span > 0.01:
        raise Refused(
            f"{storage.name(url)} is turned against the scene's other files; bring them onto one grid with gdalwarp"
        )
    # Transforms carry the noise of their last digits: a thousandth of a pixel over the whole scene is none.
    row_step, col_step = round(between.e, 12), round(between.a, 12)
    row_offset, col_offset = round(between.f, 6), round(between.c, 6)
    still = abs(between.e - 1) * span < 1e-3 and abs(between.a - 1) * span < 1e-3
    if still and max(abs(row_offset), abs(col_offset)) < 1e-3 and tuple(shape) == tuple(other_shape):
        return None
    if row_step <= 0 or col_step <= 0:
        raise Refused(
            f"{storage.name(url)} is flipped against the scene's other files; bring them onto one grid with gdalwarp"
        )
    return row_step, row_offset, col_step, col_offset


def _read_pixels(
    source: rasterio.DatasetReader, bands: Sequence[Band], window: Window, nodata: float | None, out: np.ndarray
) -> np.ndarray:
    """Fill `out` (height, width, bands) with a window of one file on its own grid; returns valid (height, width)."""
    area = RasterioWindow(window.col, window.row, window.width, window.height)
    indexes = [band.index for band in bands]
    try:
        # GDAL writes into the array itself, however it lies.
        source.read(indexes, window=area, out=np.moveaxis(out, 2, 0))
        valid = _valid(source, bands, area, nodata, out)
        _check_whole(bands[0].url)
        return valid
    except (RasterioError, OSError, SystemError) as error:  # the last where a reader of ours raised amid GDAL
        _check_outage(bands[0].url, error)
        _check_whole(bands[0].url)
        path = storage.local_path(bands[0].url)
        # GDAL keeps the error until a file is opened; the next question to one that is open already would get it.
        _files.close()
        raise _damaged(error, path) from None


def _check_whole(url: str) -> None:
    """GDAL notices that a file is cut short on a disk only."""
    for one in (url, f"{url}.msk"):
        if one in storage.cut_short:
            _files.close()
            raise Refused(f"pixels cannot be read: {TOO_SHORT} (in {storage.name(one)})")


def _valid(
    source: rasterio.DatasetReader, bands: Sequence[Band], area: RasterioWindow, nodata: float | None, data: np.ndarray
) -> np.ndarray:
    valid = np.ones(data.shape[:2], bool)
    whole_file_mask = False
    for position, band in enumerate(bands):
        values = data[..., position]
        flags = source.mask_flag_enums[band.index - 1]
        override = nodata if nodata is not None else band.nodata if band.forced else None
        if override is not None:
            valid &= _differs(values, override, band.dtype)
        elif MaskFlags.all_valid in flags:
            if band.nodata is not None:  # said by the scene's STAC item, not by the file
                valid &= _differs(values, band.nodata, band.dtype)
            elif not whole_file_mask and ColorInterp.alpha in source.colorinterp:
                # GDAL takes alpha for a mask in files of 2 and 4 bands only; RGB + NIR + alpha is common, too.
                valid &= source.read(source.colorinterp.index(ColorInterp.alpha) + 1, window=area) != 0
                whole_file_mask = True
        elif MaskFlags.per_dataset in flags:
            if not whole_file_mask:
                valid &= source.read_masks(band.index, window=area) != 0
                whole_file_mask = True
        elif _is_plain(band) and band.nodata is not None:
            # The same as GDAL's mask, which would go through the pixels once more.
            valid &= _differs(values, band.nodata, band.dtype)
        else:
            valid &= source.read_masks(band.index, window=area) != 0
        if np.dtype(band.dtype).kind == "f":
            with np.errstate(over="ignore"):
                valid &= np.isfinite(values.astype(np.float32, copy=False))  # as networks see them
    return valid


def _is_plain(band: Band) -> bool:
    """Whether GDAL's nodata test on this band is a plain comparison of small integers."""
    dtype = np.dtype(band.dtype)
    return dtype.kind in "iu" and dtype.itemsize <= 4 and band.nodata is not None and float(band.nodata).is_integer()


def _differs(values: np.ndarray, nodata: float, dtype: str) -> np.ndarray:
    """Where values of a band stored as `dtype` are not its missing value."""
    stored = np.dtype(dtype)
    if stored.kind == "f":
        if math.isnan(nodata):
            return ~np.isnan(values)
        with np.errstate(over="ignore"):
            return values != stored.type(nodata)
    if not math.isfinite(nodata) or not float(nodata).is_integer():
        return np.ones(values.shape, bool)
    limits = np.iinfo(stored)
    if not limits.min <= int(nodata) <= limits.max:
        return np.ones(values.shape, bool)
    return values != values.dtype.type(int(nodata))


def _read_between(
    source: rasterio.DatasetReader,
    bands: Sequence[Band],
    window: Window,
    nodata: float | None,
    shift: tuple[float, float, float, float],
    dtype: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Bands of a file on another grid, bilinear, each pixel from the file's pixels alone.

    A pixel is valid where the file's pixel that holds its centre is; its value is the mean of the valid ones of the
    four pixels around its centre, by distance.
    """
    row_step, row_offset, col_step, col_offset = shift
    rows = _Axis(window.row, window.height, row_step, row_offset, source.height)
    cols = _Axis(window.col, window.width, col_step, col_offset, source.width)
    data = np.zeros((*window.shape, len(bands)), dtype)
    if rows.empty or cols.empty:
        return data, np.zeros(window.shape, bool)
    needed = Window(rows.start, cols.start, rows.stop - rows.start, cols.stop - cols.start)
    stored = np.empty((*needed.shape, len(bands)), dtype)
    valid = np.ones(window.shape, bool)
    good = _read_pixels_apart(source, bands, needed, nodata, stored)
    # 16-bit numbers and their weighted means are safe in float32, at half the time.
    real = np.dtype(np.float32 if dtype.kind in "iu" and dtype.itemsize <= 2 else np.float64)
    whole_numbers = dtype.kind in "iu"
    for position in range(len(bands)):
        usable = good[..., position]
        complete = bool(usable.all())
        values = np.where(usable, stored[..., position], 0).astype(real)
        across = _mix_across(values, cols)
        share_across = None if complete else _mix_across(usable.astype(real), cols)
        four_across = None if complete else usable[:, cols.low] & usable[:, cols.high]
        here_across = usable[:, cols.nearest] & cols.inside
        for start in range(0, window.height, STRIP):  # a strip's intermediate arrays stay in the CPU's cache
            strip = slice(start, start + STRIP)
            low, high = rows.low[strip], rows.high[strip]
            total = _mix_down(across, rows, strip)
            if share_across is not None and four_across is not None:
                weight = _mix_down(share_across, rows, strip)
                # Weights of four valid pixels are 1 but for the last bit: not divided, as in a window without nodata.
                divided = (weight > 0) & ~(four_across[low] & four_across[high])
                np.divide(total, weight, out=total, where=divided)
            here = here_across[rows.nearest[strip]] & rows.inside[strip, None]
            if whole_numbers:  # a mean is never outside what it is of: no clipping
                total += real.type(0.5)
                np.floor(total, out=total)
            total[~here] = 0
            data[strip, :, position] = total
            valid[strip] &= here
    return data, valid


def _read_pixels_apart(
    source: rasterio.DatasetReader, bands: Sequence[Band], window: Window, nodata: float | None, out: np.ndarray
) -> np.ndarray:
    """As `_read_pixels`, with valid pixels of each band apart: (height, width, bands)."""
    area = RasterioWindow(window.col, window.row, window.width, window.height)
    together = _read_pixels(source, bands, window, nodata, out)
    if len(bands) == 1 or together.all():
        return np.repeat(together[..., None], len(bands), axis=2)
    return np.stack(
        [_valid(source, [band], area, nodata, out[..., [at]]) for at, band in enumerate(bands)],
        axis=2,
    )


class Axis:
    """Where points along one axis lie between the pixels of another grid.

    Computed from each point alone, never from the window that it is in: any window gives the same for the same point.

    Args:
        at: where, in pixels of the grid.
        extent: pixels that the grid has.

    Attributes:
        inside: which points lie in a pixel.
        empty: none does; nothing else is known then.
        low, high: the pixels before and behind each point, by their centres; at an edge the one there is.
        share: how far it is from the first to the second.
        nearest: the pixel that holds it.
    """

    def __init__(self, at: np.ndarray, extent: int):
        holding = np.floor(at).astype(np.int64)
        self.inside = (holding >= 0) & (holding < extent)
        self.empty = not self.inside.any()
        if self.empty:
            return
        below = np.floor(at - 0.5)
        self.share = at - 0.5 - below
        self.low = np.clip(below.astype(np.int64), 0, extent - 1)
        self.high = np.clip(below.astype(np.int64) + 1, 0, extent - 1)
        self.nearest = np.clip(holding, 0, extent - 1)


class _Axis(Axis):
    """Of the pixels of a window, with the pixels of the other grid counted from the first that is needed."""

    def __init__(self, begin: int, length: int, step: float, offset: float, extent: int):
        super().__init__((np.arange(begin, begin + length) + 0.5) * step + offset, extent)
        if self.empty:
            return
        every = self.low, self.high, self.nearest
        used = [index[self.inside] for index in every]
        self.start = int(min(one.min() for one in used))
        self.stop = int(max(one.max() for one in used)) + 1
        self.low, self.high, self.nearest = (np.clip(index, self.start, self.stop - 1) - self.start for index in every)


def _mix_across(values: np.ndarray, cols: _Axis) -> np.ndarray:
    share = cols.share.astype(values.dtype)
    return values[:, cols.low] * (1 - share) + values[:, cols.high] * share


def _mix_down(values: np.ndarray, rows: _Axis, strip: slice) -> np.ndarray:
    share = rows.share[strip, None].astype(values.dtype)
    upper = values[rows.low[strip]]
    upper *= 1 - share
    lower = values[rows.high[strip]]
    lower *= share
    upper += lower
    return upper


# ---------------------------------------------------------------- labels on a scene's grid


def read_labels(
    url: str,
    scene: Scene,
    window: Window,
    to_ids: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    bands: str | None = None,
    masks: Hashable = (),
) -> np.ndarray:
    """Labels of a raster on any grid, on the scene's, by the pixel that holds each pixel's centre.

    Args:
        url: the raster; without a position it must have the scene's height and width.
        window: may reach outside the scene.
        to_ids: stored values (..., bands) and where they are no nodata (...) -> class ids (...) uint8.
        bands: which one, by number (from 1) or name; None for the only one, `all` for all of them.
        masks: the version of what lies beside it: a raster that is open is opened again where it is another.

    Returns:
        (height, width) uint8; `IGNORE` outside the raster.

    Raises:
        Refused: if it can't be read or placed, or has several bands of which none was chosen.
    """
    source = _files.get(url, masks)
    chosen = _label_bands(url, source, bands)
    _check_blocks(source)
    crs, transform = _position(source)
    place = _placement(url, crs, transform, (source.height, source.width), scene)
    labels = np.full(window.shape, IGNORE, np.uint8)
    inside = window & Window(0, 0, scene.height, scene.width)
    if inside.area:
        labels[inside.slices(window)] = _sample(source, chosen, place, inside, to_ids)
    return labels


def _label_bands(url: str, source: rasterio.DatasetReader, wanted: str | None) -> list[Band]:
    """The bands of a label raster that are wanted, see `read_labels`; alpha is none."""
    bands = list(_data_bands(url, source))
    if wanted == "all":
        return bands
    called = [f"{one.index} ({one.name})" if one.name else str(one.index) for one in bands]
    if wanted is not None:
        chosen = [one for one in bands if wanted in (str(one.index), one.name)]
        if len(chosen) != 1:
            raise Refused(f"labels {url} have no band {wanted!r}; they have {', '.join(called)}")
        return chosen
    if len(bands) > 1:
        raise Refused(
            f"labels {url} have {len(bands)} bands: {', '.join(called)}; name the one that holds classes, as in "
            f"{url}:{bands[0].index}, or say that they are a colour mask (--label-encoding rgb) or have a band for "
            f"each class (--label-encoding one-hot)"
        )
    return bands


def label_values(
    url: str, band: str | None, masks: Hashable = (), *, most: int, every: bool, ignored: Collection[float]
) -> list[float]:
    """Different values of a label raster, nodata and those that are ignored aside.

    Args:
        band, masks: see `read_labels`.
        most: a raster of more is no raster of classes: none is returned.
        every: look at all pixels; else of bytes no further than the first that is neither 0 nor 255.

    Raises:
        Refused: if it can't be read.
    """
    import pandas  # its `unique` hashes, where numpy's sorts

    source = _files.get(url, masks)
    chosen = _label_bands(url, source, band)
    _check_blocks(source)
    seen: set[float] = set()
    rows = max(MAX_LABEL_PIXELS // 8 // source.width // 256 * 256, 256)
    for first in range(0, source.height, rows):
        window = Window(first, 0, min(rows, source.height - first), source.width)
        stored, valid = _stored(source, chosen, window)
        found = pandas.unique(stored[valid].ravel())
        # 0.1 of float32 is 0.1.
        seen.update({float(str(one)) for one in found} if found.dtype.kind == "f" else found.tolist())
        seen -= set(ignored)
        if len(seen) > most:
            return []
        if not every and chosen[0].dtype == "uint8" and not seen <= {0, IGNORE}:
            break
    return sorted(seen)


def _stored(source: rasterio.DatasetReader, bands: Sequence[Band], window: Window) -> tuple[np.ndarray, np.ndarray]:
    """Values (height, width, bands) of a window of one file, and where at least one band is valid (height, width)."""
    stored = np.empty((*window.shape, len(bands)), np.result_type(*(band.dtype for band in bands)))
    valid = np.zeros(window.shape, bool)
    for at, band in enumerate(bands):  # 0 may be nodata, and yet a part of a colour
        valid |= _read_pixels(source, [band], window, None, stored[..., at : at + 1])
    return stored, valid


@dataclass(frozen=True)
class _Placement:
    """From pixels of a scene to those of a raster: by one affine map, or by way of two CRSs."""

    to_raster: Affine
    scene: Affine
    transformer: pyproj.Transformer | None = None

    SPACING = 16
    STRAIGHT = 0.01
    """Pixels of the raster."""

    def locate(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Pixel (row, col) of the raster that holds each pixel centre of a window; each (height, width) int64.

        Where the raster's rows are the scene's, (height, 1) and (1, width).

        Between two CRSs, computed at every 16th pixel of the scene and interpolated between: a hundred times fewer
        projections. Where the middle of such a cell is off by more than a hundredth of a pixel (longitudes jump at
        the antimeridian), each of its pixels is computed. The lattice is the scene's, so windows agree.
        """
        if self.transformer is None:
            between = self.to_raster * self.scene
            cols = (np.arange(window.col, window.stop_col) + 0.5)[None]
            rows = (np.arange(window.row, window.stop_row) + 0.5)[:, None]
            # Noise of the last digits would decide where centres lie on an edge.
            if between.b == between.d == 0:
                at_col, at_row = between.a * cols + between.c, between.e * rows + between.f
            else:
                at_col = between.a * cols + between.b * rows + between.c
                at_row = between.d * cols + between.e * rows + between.f
            return _floor(np.round(at_row, 6)), _floor(np.round(at_col, 6))
        first_row, first_col = window.row // self.SPACING, window.col // self.SPACING
        nodes_down = np.arange(first_row, (window.stop_row - 1) // self.SPACING + 2) * self.SPACING + 0.5
        nodes_right = np.arange(first_col, (window.stop_col - 1) // self.SPACING + 2) * self.SPACING + 0.5
        half = self.SPACING / 2
        corners = self._project(*np.meshgrid(nodes_down, nodes_right, indexing="ij"))
        middles = self._project(*np.meshgrid(nodes_down[:-1] + half, nodes_right[:-1] + half, indexing="ij"))
        down = np.arange(window.row, window.stop_row)
        right = np.arange(window.col, window.stop_col)
        i, s = down // self.SPACING - first_row, (down % self.SPACING / self.SPACING)[:, None]
        j, t = right // self.SPACING - first_col, right % self.SPACING / self.SPACING
        found = []
        bent = np.zeros(middles[0].shape, bool)
        with np.errstate(invalid="ignore"):
            for nodes, middle in zip(corners, middles, strict=True):
                along = nodes[:, j] * (1 - t) + nodes[:, j + 1] * t
                found.append(along[i] * (1 - s) + along[i + 1] * s)
                mean = (nodes[:-1, :-1] + nodes[:-1, 1:] + nodes[1:, :-1] + nodes[1:, 1:]) / 4
                bent |= ~(np.abs(mean - middle) <= self.STRAIGHT)  # no number at all is not straight either
        if bent.any():
            at = np.nonzero(bent[i][:, j])
            for values, exact in zip(found, self._project(down[at[0]] + 0.5, right[at[1]] + 0.5), strict=True):
                values[at] = exact
        rows, cols = (_floor(np.round(values, 6)) for values in found)
        return rows, cols

    def _project(self, rows: np.ndarray, cols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(row, col) of the raster for points of the scene, each of the shape of `rows`."""
        assert self.transformer is not None
        xs, ys = geography.apply(self.scene, cols.ravel(), rows.ravel())
        # One more, for pyproj makes a number of an array of one.
        found = self.transformer.transform(np.append(xs, xs[-1:]), np.append(ys, ys[-1:]))
        xs, ys = (np.asarray(one)[:-1].reshape(cols.shape) for one in found)
        at_cols, at_rows = geography.apply(self.to_raster, xs, ys)
        return at_rows, at_cols


def _floor(values: np.ndarray) -> np.ndarray:
    """Whole pixel numbers; -1 (outside) for what lies nowhere."""
    values = np.floor(values)
    return np.where(np.isfinite(values) & (np.abs(values) < 2**40), values, -1).astype(np.int64)


def _placement(
    url: str, crs: str | None, transform: Sequence[float], shape: tuple[int, int], scene: Scene
) -> _Placement:
    same_shape = shape == (scene.height, scene.width)
    unplaced = crs is None and tuple(transform) == tuple(_IDENTITY)[:6]
    if unplaced or (crs is None and scene.crs is None):
        if not same_shape or not (unplaced or tuple(transform) == scene.transform):
            raise Refused(
                f"labels {url} have no CRS, so their pixels must be the scene's; they are {shape[0]} x {shape[1]}, the "
                f"scene is {scene.height} x {scene.width}"
                + ("" if not same_shape else ", and their geotransforms differ")
            )
        return _Placement(_IDENTITY, _IDENTITY)
    if crs is None or scene.crs is None:
        which = f"labels {url} have" if crs is None else "the scene has"
        raise Refused(f"{which} no CRS, so the two can't be laid over each other; state it: gdal_edit.py -a_srs EPSG:N")
    transformer = geography.transformer_between(scene.crs, crs)
    return _Placement(~Affine(*transform), Affine(*scene.transform), transformer)


def _sample(
    source: rasterio.DatasetReader,
    bands: Sequence[Band],
    place: _Placement,
    window: Window,
    to_ids: Callable[[np.ndarray, np.ndarray], np.ndarray],
) -> np.ndarray:
    labels = np.full(window.shape, IGNORE, np.uint8)
    rows, cols = place.locate(window)
    down, right = (rows >= 0) & (rows < source.height), (cols >= 0) & (cols < source.width)
    if not (down & right).any():
        return labels
    hit: Any
    if along := rows.shape != cols.shape:
        rows, cols = rows[down], cols[right]
        hit = _run(np.flatnonzero(down)), _run(np.flatnonzero(right))
    else:
        hit = down & right
        rows, cols = rows[hit], cols[hit]
    needed = Window(
        int(rows.min()), int(cols.min()), int(rows.max() - rows.min()) + 1, int(cols.max() - cols.min()) + 1
    )
    if needed.area > MAX_LABEL_PIXELS and window.area > 1:
        for part in window.quarters():
            labels[part.slices(window)] = _sample(source, bands, place, part, to_ids)
        return labels
    stored, valid = _stored(source, bands, needed)
    if along:
        rows, cols = _run(rows - needed.row), _run(cols - needed.col)
        values, good = stored[rows][:, cols], valid[rows][:, cols]
    else:
        values, good = stored[rows - needed.row, cols - needed.col], valid[rows - needed.row, cols - needed.col]
    labels[hit] = to_ids(values, good)
    return labels


def _run(numbers: np.ndarray) -> Any:
    """Rising numbers as a slice, if none between them is left out."""
    whole = numbers.size == numbers[-1] - numbers[0] + 1 and (np.diff(numbers) == 1).all()
    return slice(int(numbers[0]), int(numbers[-1]) + 1) if whole else numbers


def read_ids(url: str, shape: tuple[int, int], window: Window) -> np.ndarray:
    """Class ids as stored, (height, width) uint8."""
    source = _files.get(url)
    found = (source.height, source.width), source.dtypes
    if found != (shape, ("uint8",)):
        raise Refused(
            f"{url} is {found[0][0]} x {found[0][1]} px of {', '.join(found[1])}, and a labels map of {shape[0]} x "
            f"{shape[1]} px of uint8 is wanted"
        )
    _check_blocks(source)
    area = RasterioWindow(window.col, window.row, window.width, window.height)
    try:
        ids = source.read(1, window=area)
        _check_whole(url)
        return ids
    except (RasterioError, OSError) as error:
        _check_outage(url, error)
        _check_whole(url)
        path = storage.local_path(url)
        _files.close()  # as in `_read_pixels`
        raise _damaged(error, path) from None
