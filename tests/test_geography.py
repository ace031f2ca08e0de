"""Where grids lie: on the ground, around a pole, across the antimeridian."""

from __future__ import annotations

import math

import pyproj
import pytest
import shapely
from affine import Affine

from sattile import geography

UTM = Affine(10, 0, 500_000, 0, -10, 5_000_000)


def test_ground_sample_distance_is_on_the_ground():
    utm = geography.ground_sample_distance("EPSG:32618", tuple(UTM)[:6], 100, 140)
    assert utm == 10.0
    # 60 degrees north: Web Mercator's metres are half as long; a degree of longitude is half of one at the equator.
    y = pyproj.Transformer.from_crs(4326, 3857, always_xy=True).transform(0, 60)[1]
    assert geography.ground_sample_distance("EPSG:3857", (10, 0, 0, 0, -10, y), 2, 2) == pytest.approx(5, rel=0.01)
    degrees = geography.ground_sample_distance("EPSG:4326", (0.001, 0, 0, 0, -0.001, 60), 2, 2)
    assert degrees == pytest.approx(math.sqrt(111.4 * 55.8), rel=0.01)
    feet = geography.ground_sample_distance("EPSG:2263", (100, 0, 980_000, 0, -100, 200_000), 50, 50)
    assert feet == pytest.approx(30.48, rel=1e-3)
    assert geography.ground_sample_distance(None, tuple(UTM)[:6], 1, 1) is None


def outline(crs, transform, height, width):
    shape = shapely.from_wkb(geography.footprint(crs, tuple(transform)[:6], height, width))
    assert shape.is_valid
    west, south, east, north = shape.bounds
    assert -180 <= west <= east <= 180
    assert -90 <= south <= north <= 90
    return shape


def test_footprint_lies_where_the_pixels_do():
    shape = outline("EPSG:32618", UTM, 300, 200)
    to_lonlat = pyproj.Transformer.from_crs(32618, 4326, always_xy=True)
    for row, col in ((1, 1), (299, 1), (299, 199), (150, 100)):
        assert shape.contains(shapely.Point(to_lonlat.transform(*(UTM * (col, row)))))
    assert not shape.contains(shapely.Point(to_lonlat.transform(*(UTM * (201, 150)))))
    assert outline("EPSG:4326", Affine(0.5, 0, 10, 0, -0.5, 50), 4, 8).equals(shapely.box(10, 48, 14, 50))


def test_footprint_splits_at_the_antimeridian():
    shape = outline("EPSG:32601", Affine(1000, 0, 200_000, 0, -1000, 7_500_000), 300, 600)
    assert shape.geom_type == "MultiPolygon"
    assert {round(part.bounds[0]) for part in shape.geoms} >= {-180}
    assert max(part.bounds[2] for part in shape.geoms) == 180
    assert shape.area < 300
    shifted = outline("EPSG:4326", Affine(1, 0, 0, 0, -1, 90), 180, 360)  # longitudes 0 to 360
    assert shifted.area == pytest.approx(180 * 360)


def test_footprint_reaches_the_pole():
    arctic = outline("EPSG:3413", Affine(10_000, 0, -1_000_000, 0, -10_000, 1_000_000), 200, 200)
    assert arctic.bounds[3] == 90
    for lon in (-170, -90, 0, 90, 170):
        assert arctic.contains(shapely.Point(lon, 89))
        assert not arctic.contains(shapely.Point(lon, 70))
    antarctic = outline("EPSG:3031", Affine(10_000, 0, -1_000_000, 0, -10_000, 1_000_000), 200, 200)
    assert antarctic.contains(shapely.Point(45, -89))
    assert antarctic.bounds[1] == -90


def test_footprint_of_a_full_disk_is_the_earth_it_shows():
    disk = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x +ellps=GRS80"
    shape = outline(disk, Affine(50_000, 0, -5_500_000, 0, -50_000, 5_500_000), 220, 220)
    assert shape.contains(shapely.Point(-75, 0))
    assert not shape.contains(shapely.Point(105, 0))
