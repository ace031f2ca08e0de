"""The values that travel between stages, and the tables they are stored in."""

from __future__ import annotations

import colorsys
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa

IGNORE = 255
"""Label of a pixel that has none; the same number as a labels map's nodata."""


@dataclass(frozen=True)
class Band:
    """One band of a scene and where its pixels lie.

    Attributes:
        name: what models ask for.
        url: the file.
        index: 1-based band of that file, as GDAL counts.
        dtype: numpy dtype as stored.
        nodata: declared missing value, None if there is none (0 is a value then).
        scale, offset: physical value = stored * scale + offset; None where the file does not say.
        forced: `nodata` was given by the user (`--nodata`) and goes before whatever the file says.
    """

    name: str
    url: str
    index: int
    dtype: str
    nodata: float | None = None
    scale: float | None = None
    offset: float | None = None
    forced: bool = False


@dataclass(frozen=True)
class Scene:
    """One acquisition on one pixel grid: one file, or a set of band files read onto the finest of their grids.

    Attributes:
        scene_id: its name, and that of its output folder.
        url: the file, folder or STAC item as it was given or listed.
        height, width: of the grid, in pixels.
        bands: in the order in which the scene lists them.
        crs: WKT2 or `EPSG:n`; None where the scene has none.
        transform: affine coefficients (a, b, c, d, e, f): x = a * col + b * row + c, y = d * col + e * row + f,
            of pixel corners, in units of the CRS.
        gsd: pixel size in metres (geometric mean of both axes, at the scene's centre); None without a CRS.
        datetime: acquisition, ISO 8601 in UTC; None if not stated, or if only `interval` is.
        footprint: outline in EPSG:4326 as WKB (may be a MultiPolygon at the antimeridian); None without a CRS.
        identity: what tells a version of its files, and masks beside them, from another: {url: [bytes, mtime in ns]}.
        interval: first and last acquisition of a composite, ISO 8601 in UTC; None if not stated.
    """

    scene_id: str
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
    interval: tuple[str, str] | None = None

    @property
    def span(self) -> tuple[str, str] | None:
        """First and last acquisition; the same twice where there is one; None if not stated."""
        return self.interval or (None if self.datetime is None else (self.datetime, self.datetime))

    @property
    def band_names(self) -> tuple[str, ...]:
        return tuple(band.name for band in self.bands)

    def select(self, names: Sequence[str]) -> Scene:
        """The same scene with these bands, in this order. KeyError names the first that is missing."""
        by_name = {band.name: band for band in self.bands}
        return replace(self, bands=tuple(by_name[name] for name in names))

    def select_as(self, names: Mapping[str, str]) -> Scene:
        """The same with some bands under other names: {new name: its own}, in that order."""
        chosen = self.select(list(names.values())).bands
        return replace(self, bands=tuple(replace(band, name=name) for name, band in zip(names, chosen, strict=True)))

    def to_json(self) -> str:
        value = asdict(self)
        value["footprint"] = self.footprint.hex() if self.footprint else None
        if self.interval is None:
            del value["interval"]
        return json.dumps(value)

    def source_json(self) -> str:
        """Gives what tells one version of the scene's input from another, as JSON.

        It is what `to_json` gave before intervals were kept, when a composite had the first of its times: what was
        made of such scenes stays made.
        """
        return replace(self, datetime=self.datetime or (self.interval or (None,))[0], interval=None).to_json()

    @classmethod
    def from_json(cls, text: str) -> Scene:
        value = json.loads(text)
        value["bands"] = tuple(Band(**band) for band in value["bands"])
        value["transform"] = tuple(value["transform"])
        value["footprint"] = bytes.fromhex(value["footprint"]) if value["footprint"] else None
        if value.get("interval"):
            value["interval"] = tuple(value["interval"])
        return cls(**value)


@dataclass(frozen=True)
class SegmentClass:
    """One class of a labels map.

    Attributes:
        id: number in labels and maps, 0 to 254.
        name: for people and metrics.
        color: `#rrggbb`.
        value: what stands in label files for it, where that is not its id: see `legend`.
    """

    id: int
    name: str
    color: str
    value: int | float | str | None = None


# Paul Tol's "muted" palette (https://personal.sron.nl/~pault/): told apart by colour-blind people, too.
PALETTE = (
    "#ddcc77", "#332288", "#117733", "#cc6677", "#88ccee", "#999933", "#882255", "#44aa99", "#aa4499", "#bbbbbb",
)  # fmt: skip


def colored(found: Sequence[tuple[int, str, str | None, int | float | str | None]]) -> tuple[SegmentClass, ...]:
    """Classes in the order of their ids out of (id, name, colour or None, value or None), each with a colour of its
    own: that of the palette by its id, or else one that is free."""
    taken = {color.lower() for _, _, color, _ in found if color}
    free = itertools.chain(PALETTE, _more_colors())
    classes = []
    for class_id, name, given, value in sorted(found, key=lambda one: one[0]):
        own = PALETTE[class_id % len(PALETTE)]
        color = given or (own if own not in taken else next(one for one in free if one not in taken))
        taken.add(color.lower())
        classes.append(SegmentClass(class_id, name, color, value))
    return tuple(classes)


def _more_colors() -> Iterator[str]:
    """Colours without end; hues by the golden ratio, so that neighbours are far apart."""
    for number in itertools.count():
        lightness, saturation = ((0.45, 0.55), (0.7, 0.75), (0.3, 0.9))[number % 3]
        parts = colorsys.hls_to_rgb(number * 0.618034 % 1, lightness, saturation)
        yield "#" + "".join(f"{round(255 * part):02x}" for part in parts)


@dataclass(frozen=True)
class Refusal:
    """A scene that was not used: a row of the quarantine table."""

    url: str
    stage: str
    reason: str


QUARANTINE = pa.schema([("url", pa.string()), ("stage", pa.string()), ("reason", pa.string())])

TILE = pa.schema(
    [
        ("tile_id", pa.string()),  # scene_id/row/col
        ("scene_id", pa.string()),
        ("row", pa.int32()),  # top-left pixel in the scene
        ("col", pa.int32()),
        ("spatial_block", pa.string()),  # ground cell the tile's centre lies in; scene_id without a CRS
        ("image", pa.binary()),  # .npy (size, size, bands), the dataset's dtype; stored or scaled values
        ("labels", pa.binary()),  # .npy (size, size) uint8 class ids; IGNORE where unlabelled or invalid
        ("valid", pa.binary()),  # .npy (size, size) bool
    ]
)
"""One row of a tiles dataset. Arrays are `.npy` bytes, the encoding of petastorm's NdarrayCodec."""

COUNTED = pa.schema(
    [
        ("scene_id", pa.string()),
        ("spatial_block", pa.string()),  # ground cell; scene_id without a CRS
        ("region", pa.string()),  # null where none were asked for
        ("confusion", pa.list_(pa.int64())),  # classes x classes, row by row, as in `metrics.confusion`
    ]
)
"""What an evaluation counted, piece by piece: `blocks.parquet`, from which its intervals follow."""


def describe_classes(classes: Sequence[SegmentClass]) -> list[dict[str, Any]]:
    """As dataset and bundle store them; a value is left out where it is the id."""
    return [
        {key: value for key, value in asdict(one).items() if key != "value" or value is not None} for one in classes
    ]


def read_classes(values: Sequence[dict[str, Any]]) -> tuple[SegmentClass, ...]:
    return tuple(SegmentClass(**value) for value in values)
