"""What all STAC items that are written here have in common: of maps, and of models."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Sequence
from typing import Any

from sattile.schema import SegmentClass

EXTENSION = "https://stac-extensions.github.io"

UNKNOWN_TIME = ("1970-01-01T00:00:00Z", "2099-12-31T23:59:59Z")
"""STAC wants a start and an end where `datetime` is null; these say "not stated" in what pandas can hold, too."""


def classes_of(classes: Sequence[SegmentClass]) -> list[dict[str, Any]]:
    """`classification:classes`."""
    return [
        {
            "value": one.id,
            # The schema takes letters, digits, - and _ only; the name as it is goes into the title.
            "name": re.sub("[^0-9A-Za-z_-]", "_", one.name) or "_",
            "title": one.name,
            "color_hint": one.color.lstrip("#").upper(),
        }
        for one in classes
    ]


def checksum(sha256: str) -> str:
    """`file:checksum` of a file's sha256, hexadecimal."""
    # Multihash (https://multiformats.io/multihash/): 12 = sha2-256, 20 = 32 bytes.
    return "1220" + sha256


def bbox(geometry: dict[str, Any]) -> list[float]:
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


def utc(text: str) -> str:
    """A time as STAC writes it; one without a zone is UTC."""
    return moment(text).isoformat().replace("+00:00", "Z")


def moment(text: str) -> dt.datetime:
    """The same as a value, in UTC."""
    found = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (found if found.tzinfo else found.replace(tzinfo=dt.UTC)).astimezone(dt.UTC)
