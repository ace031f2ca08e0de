"""What all STAC items that are written here have in common: of maps, and of models."""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sattile.schema import SegmentClass

EXTENSION = "https://stac-extensions.github.io"

UNKNOWN_TIME = ("1970-01-01T00:00:00Z", "2099-12-31T23:59:59Z")
"""STAC wants a start and an end where `datetime` is null; these say "not stated" in what pandas can hold, too."""

UNDATED = "sattile:datetime_missing"
"""Property that is true where start and end are these placeholders."""


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


def time_properties(datetime: str | None, interval: tuple[str, str] | None) -> dict[str, Any]:
    """Describes when something was acquired, in the properties of an item; flagged placeholders where nothing is known.

    Args:
        datetime: ISO 8601; None if not stated, or if only the interval is.
        interval: first and last acquisition.
    """
    found: dict[str, Any] = {"datetime": utc(datetime) if datetime else None}
    if interval:
        found["start_datetime"], found["end_datetime"] = map(utc, interval)
    elif datetime is None:
        found["start_datetime"], found["end_datetime"] = UNKNOWN_TIME
        found[UNDATED] = True
    return found


def stated_times(properties: Mapping[str, Any]) -> dict[str, str]:
    """Gives those of `datetime`, `start_datetime` and `end_datetime` that an item states: no placeholders."""
    names = ["datetime", "start_datetime", "end_datetime"]
    if properties.get(UNDATED) or (properties.get(names[1]), properties.get(names[2])) == UNKNOWN_TIME:
        names = names[:1]
    return {name: str(properties[name]) for name in names if properties.get(name)}


def whole_span(spans: Sequence[tuple[str, str] | None]) -> tuple[str, str] | None:
    """Gives the first and the last of several times; None where one is not stated: a part would pass for the whole."""
    known = [one for one in spans if one]
    if not known or len(known) < len(spans):
        return None
    return min((one[0] for one in known), key=moment), max((one[1] for one in known), key=moment)


def utc(text: str) -> str:
    """A time as STAC writes it; one without a zone is UTC."""
    return moment(text).isoformat().replace("+00:00", "Z")


def moment(text: str) -> dt.datetime:
    """The same as a value, in UTC."""
    found = dt.datetime.fromisoformat(text.replace("Z", "+00:00"))
    return (found if found.tzinfo else found.replace(tzinfo=dt.UTC)).astimezone(dt.UTC)
