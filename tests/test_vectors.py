"""Polygons out of labels maps: the same however the grid is cut, and the labels again when they are drawn."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise, product
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pytest
import rasterio.features
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rasterio.transform import Affine

from sattile import cog, raster, shapes, vectors
from sattile.errors import Refused, SattileError, UsageError
from sattile.grid import Window
from sattile.schema import SegmentClass
from sattile.vectors import Map, Pieces

quick = settings(deadline=None, max_examples=60)

UTM = "EPSG:32633"
AT_UTM = (10.0, 0.0, 4e5, 0.0, -10.0, 5.3e6)
LAND, WATER, ICE = (
    SegmentClass(0, "land", "#ddcc77"),
    SegmentClass(1, "water", "#332288"),
    SegmentClass(7, "é", "#fff000"),
)

# Few values, so that corners touch, rings nest and polygons cross borders several times.
labels = hnp.arrays(
    np.uint8, st.tuples(st.integers(1, 13), st.integers(1, 17)), elements=st.sampled_from([0, 0, 1, 1, 7, 255])
)


def slowly(ids: np.ndarray, wanted: Sequence[int]) -> dict[tuple[int, int, int], set[tuple[int, int]]]:
    """Pixels that hang together by edges: {(class, row, col of the first): pixels}."""
    left = {at for at in np.ndindex(*ids.shape) if ids[at] in wanted}
    found = {}
    for first in np.ndindex(*ids.shape):
        if first not in left:
            continue
        left.remove(first)
        reached, pixels = [first], {first}
        while reached:
            row, col = reached.pop()
            for at in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
                if at in left and ids[at] == ids[first]:
                    left.remove(at)
                    pixels.add(at)
                    reached.append(at)
        found[int(ids[first]), *first] = pixels
    return found


def cut(length: int, at: Sequence[int]) -> list[tuple[int, int]]:
    return list(pairwise(sorted({0, length, *(one % length for one in at)})))


def outlined(
    ids: np.ndarray, wanted: Sequence[int], origin: tuple[int, int], sheets: Sequence[Window], block: int
) -> list[tuple[int, bytes]]:
    """Class and WKB of each polygon, sorted; sheets are windows of `ids`, whose first pixel lies at `origin`."""
    whole, rest, count = [], [], 0

    def read(window: Window) -> tuple[np.ndarray, ...]:
        return shapes.polygonize(ids[window.slices(Window(*origin, 0, 0))], wanted)

    for sheet in sheets:
        area = Window(sheet.row + origin[0], sheet.col + origin[1], sheet.height, sheet.width)
        for pieces in vectors.outline(area, block, read):
            if not len(pieces.runs):
                whole += zip(pieces.classes.tolist(), shapely.to_wkb(pieces.shapes), strict=True)
                continue
            rest.append(Pieces(pieces.shapes, pieces.classes, pieces.runs + np.array([0, 0, 0, 0, 0, count])))
            count += len(pieces.shapes)
    if rest:
        every = (np.concatenate([getattr(one, name) for one in rest]) for name in ("shapes", "classes", "runs"))
        joined = vectors.join(Pieces(*every))
        whole += zip(joined.classes.tolist(), shapely.to_wkb(joined.shapes), strict=True)
    return sorted(whole)


@given(labels, st.sets(st.sampled_from([0, 1, 7]), min_size=1), st.data())
@settings(deadline=None, max_examples=200)
def test_polygons_are_the_same_however_the_grid_is_cut(ids: np.ndarray, wanted: set[int], data: st.DataObject) -> None:
    height, width = ids.shape
    origin = data.draw(st.tuples(st.integers(-50, 50), st.integers(-50, 50)))
    whole = outlined(ids, sorted(wanted), origin, [Window(0, 0, height, width)], 99)
    steps = st.lists(st.integers(0, 99), max_size=4)
    sheets = [
        Window(row, col, stop_row - row, stop_col - col)
        for (row, stop_row), (col, stop_col) in product(cut(height, data.draw(steps)), cut(width, data.draw(steps)))
    ]
    assert (
        outlined(ids, sorted(wanted), origin, data.draw(st.permutations(sheets)), data.draw(st.integers(1, 8))) == whole
    )


@given(labels, st.sets(st.sampled_from([0, 1, 7]), min_size=1), st.integers(1, 8))
@quick
def test_polygons_are_the_pixels_that_hang_together(ids: np.ndarray, wanted: set[int], block: int) -> None:
    found = outlined(ids, sorted(wanted), (0, 0), [Window(0, 0, *ids.shape)], block)
    expected = slowly(ids, sorted(wanted))
    assert len(found) == len(expected)
    if not found:
        return
    shapes, classes = shapely.from_wkb([wkb for _, wkb in found]), np.array([one for one, _ in found], np.uint8)
    assert shapely.is_valid(shapes).all()
    by_place = dict(zip(vectors.places(shapes, classes, Window(0, 0, *ids.shape)).tolist(), shapes, strict=True))
    places = {key: key[0] * ids.size + key[1] * ids.shape[1] + key[2] for key in expected}
    assert sorted(by_place) == sorted(places.values())
    for key, pixels in expected.items():
        boxes = shapely.union_all([shapely.box(col, row, col + 1, row + 1) for row, col in pixels])
        assert shapely.equals(by_place[places[key]], boxes)
    for shape in shapes:  # corners only
        for ring in (shape.exterior, *shape.interiors):
            points = [*ring.coords[:-1], *ring.coords[:2]]
            for (x, y), _, (next_x, next_y) in zip(points, points[1:], points[2:], strict=False):
                assert x != next_x
                assert y != next_y


@given(labels, st.integers(1, 8))
@quick
def test_polygons_drawn_are_the_labels(ids: np.ndarray, block: int) -> None:
    found = outlined(ids, [0, 7], (0, 0), [Window(0, 0, *ids.shape)], block)
    np.testing.assert_array_equal(draw(found, ids.shape), np.where(np.isin(ids, [0, 7]), ids, 255))


def draw(found: Sequence[tuple[int, bytes]], shape: tuple[int, int], transform: Affine | None = None) -> np.ndarray:
    if not found:
        return np.full(shape, 255, np.uint8)
    return rasterio.features.rasterize(
        [(shapely.from_wkb(wkb), one) for one, wkb in found], shape, fill=255, dtype=np.uint8,
        transform=transform or Affine.identity(),
    )  # fmt: skip


def test_pieces_that_touch_by_a_corner_across_a_border_stay_two() -> None:
    ids = np.uint8([[1, 0, 0], [0, 1, 1]])
    sheets = [Window(0, 0, 1, 3), Window(1, 0, 1, 3)]
    found = outlined(ids, [1], (0, 0), sheets, 2)
    assert sorted(shapely.from_wkb(wkb).area for _, wkb in found) == [1, 2]


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=40))
def test_components(count: int, pairs: list[tuple[int, int]]) -> None:
    least = list(range(count))
    pairs = [(one % count, two % count) for one, two in pairs]
    for _ in range(count):
        for one, two in pairs:
            least[one] = least[two] = min(least[one], least[two])
    found = vectors.components(count, np.array(pairs, np.int64).reshape(-1, 2))
    assert found.tolist() == least


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4), st.integers(1, 9),
       st.integers(1, 200))  # fmt: skip
def test_areas_have_each_pixel_once(sizes: list[tuple[int, int]], block: int, most: int) -> None:
    tops = np.cumsum([0] + [height for height, _ in sizes]) - 20
    maps = [Map(str(n), "", int(tops[n]), -7, *size) for n, size in enumerate(sizes)]
    areas = vectors.plan(maps[::-1], block, most)
    for one in maps:
        seen = np.zeros((one.height, one.width), int)
        for area in areas:
            if area.map == one:
                seen[area.window.slices(one.window)] += 1
                assert area.window in one.window
                assert area.window.area <= max(most, block * one.width)
        assert (seen == 1).all()


# ---------------------------------------------------------------- areas


def grid_box(*corners: int) -> np.ndarray:
    return np.array([shapely.box(*corners)], object)


def test_area_in_a_projected_crs_is_that_of_an_equal_area_projection() -> None:
    # 40 km a side, at the edge of the zone: planar area is off by 2e-3 there.
    shape = shapely.Polygon(shapely.box(0, 0, 4000, 3000).exterior, [shapely.box(10, 20, 2000, 2500).exterior])
    transform = (10.0, 0.0, 8e5, 0.0, -10.0, 6.6e6)
    fine = shapely.segmentize(vectors.on_ground(np.array([shape], object), transform)[0], 20)
    flat = pyproj.Transformer.from_crs(UTM, "+proj=laea +lat_0=59 +lon_0=20 +datum=WGS84", always_xy=True)
    expected = shapely.transform(fine, lambda at: np.column_stack(flat.transform(at[:, 0], at[:, 1]))).area
    found = vectors.measure(np.array([shape], object), UTM, transform)
    np.testing.assert_allclose(found, expected, rtol=1e-7)
    assert abs(found[0] / (shape.area * 100) - 1) > 1e-4


def test_area_in_a_geographic_crs_is_that_between_parallels_and_meridians() -> None:
    transform = (0.5, 0.0, 170.0, 0.0, -0.25, 62.0)  # over the antimeridian
    lons = 170 + 0.5 * 60 * np.linspace(0, 1, 20001)
    lats = np.full(20001, 62 - 0.25 * 8)
    top = np.full(20001, 62.0)
    geod = pyproj.CRS("EPSG:4326").get_geod()
    area, _ = geod.polygon_area_perimeter(np.concatenate([lons, lons[::-1]]), np.concatenate([lats, top]))
    np.testing.assert_allclose(vectors.measure(grid_box(0, 0, 60, 8), "EPSG:4326", transform), area, rtol=1e-9)


def test_area_of_a_grid_of_the_whole_earth() -> None:
    earth = vectors.measure(grid_box(0, 0, 360, 180), "EPSG:4326", (1, 0, -180, 0, -1, 90))
    np.testing.assert_allclose(earth, 510_065_621_724_088, rtol=1e-12)  # of WGS 84, from Karney's geographiclib


def test_area_without_a_place_on_earth_is_in_units_of_the_transform() -> None:
    shapes = np.array([shapely.Polygon(shapely.box(0, 0, 5, 3).exterior, [shapely.box(1, 1, 2, 2).exterior])], object)
    for crs in (None, 'LOCAL_CS["drawing",UNIT["metre",1]]'):
        assert vectors.measure(shapes, crs, (2, 0, 7, 0, -3, 8)).tolist() == [14 * 6]


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        # US survey feet: scale factor near 1.
        ("EPSG:2263", (10, 0, 1e6, 0, -10, 2e5), 5000 * 100 * (1200 / 3937) ** 2),
        # grads on the Clarke 1880 (IGN) ellipsoid, whose radii at 45 degrees these are
        ("EPSG:4807", (1e-5, 0, 1, 0, -1e-5, 50), 5e3 * (np.pi / 2e7) ** 2 * 6367386.6 * 6388895.0 * np.sqrt(0.5)),
        # metres on a datum in grads, at the origin of its grid
        ("EPSG:27572", (10, 0, 6e5, 0, -10, 2.2e6), 5000 * 100 / 0.99987742**2),
        # around the pole, with the scale there
        ("EPSG:3995", (20, 0, -1000, 0, -40, 1000), 4e6 / 0.97276901**2),
    ],
)  # fmt: skip
def test_area_in_other_units_and_around_a_pole(crs: str, transform: tuple[float, ...], expected: float) -> None:
    np.testing.assert_allclose(vectors.measure(grid_box(0, 0, 100, 50), crs, transform), expected, rtol=1e-3)


def test_area_is_not_known_off_the_earth() -> None:
    assert np.isnan(vectors.measure(grid_box(0, 0, 10, 5), UTM, (10, 0, 1e9, 0, -10, 5e6))).all()
    assert np.isnan(vectors.measure(grid_box(0, 0, 10, 5), "EPSG:4326", (1, 0, 0, 0, -1, 93))).all()


@pytest.mark.parametrize(
    ("crs", "transform"),
    [(UTM, AT_UTM), ("EPSG:4326", (1e-3, 0, 10, 0, -2e-3, 60)), ("EPSG:4326", (1, 2, 10, 1, -2, 9))],
)
def test_a_polygon_measures_the_same_among_others(crs: str, transform: tuple[float, ...]) -> None:
    ids = np.random.default_rng(3).choice(np.uint8([0, 1]), (40, 31))
    shapes = shapely.from_wkb([wkb for _, wkb in outlined(ids, [0, 1], (0, 0), [Window(0, 0, 40, 31)], 50)])
    alone = [vectors.measure(shapes[n : n + 1], crs, transform)[0] for n in range(len(shapes))]
    assert vectors.measure(shapes, crs, transform).tolist() == alone


# ---------------------------------------------------------------- files


def some_rows(places: Sequence[int], sizes: Sequence[int]) -> pa.Table:
    columns = [
        pa.array(places, pa.int64()), pa.array([0] * len(places), pa.int16()),
        pa.array([1.0] * len(places)), pa.array([b"x" * size for size in sizes], pa.binary()),
    ]  # fmt: skip
    return pa.Table.from_arrays(columns, schema=vectors.PART)


@given(st.lists(st.integers(1, 9), max_size=30), st.lists(st.integers(0, 30), max_size=5), st.integers(1, 6),
       st.integers(1, 25))  # fmt: skip
def test_row_groups_end_where_the_rows_say_wherever_the_tables_given_end(
    sizes: list[int], at: list[int], most_rows: int, most_bytes: int
) -> None:
    table = some_rows(range(len(sizes)), sizes)
    cuts = sorted({0, len(sizes), *(min(one, len(sizes)) for one in at)})
    found = list(vectors.regroup([table.slice(a, b - a) for a, b in pairwise(cuts)], most_rows, most_bytes))
    assert [one["place"].to_pylist() for one in found] == [
        one["place"].to_pylist() for one in vectors.regroup([table], most_rows, most_bytes)
    ]
    assert [place for one in found for place in one["place"].to_pylist()] == list(range(len(sizes)))
    for number, one in enumerate(found):
        lengths = [len(wkb) for wkb in one["geometry"].to_pylist()]
        assert sum(lengths[:-1]) < most_bytes
        assert len(lengths) <= most_rows
        assert number == len(found) - 1 or sum(lengths) >= most_bytes or len(lengths) == most_rows


def test_sorted_parts_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "PART_ROWS", 3)
    owner = np.random.default_rng(5).integers(0, 6, 200)
    urls = [vectors._write_part([some_rows(np.flatnonzero(owner == n), [1] * (owner == n).sum())], str(tmp_path))
            for n in range(7)]  # fmt: skip
    tables = list(vectors.merged(urls))
    assert [place for one in tables for place in one["place"].to_pylist()] == list(range(200))
    assert max(one.num_rows for one in tables) <= 3 * 7


def write_map(url: Path, ids: np.ndarray) -> str:
    """A labels.tif as predict publishes it."""
    url.parent.mkdir(parents=True, exist_ok=True)
    layer = cog.layers([(0, "land", "#ddcc77")], scores=False, coverage=False)[0]
    raw = str(url.with_suffix(".raw.tif"))
    with cog.Canvas(raw, layer, height=ids.shape[0], width=ids.shape[1], crs=UTM, transform=AT_UTM) as canvas:
        canvas.write(Window(0, 0, *ids.shape), ids)
    cog.to_cog(canvas, str(url))
    return str(url)


def sheets_of(ids: np.ndarray, folder: Path, rows: Sequence[int], cols: Sequence[int]) -> Iterator[Map]:
    """Maps cut from `ids`, whose first pixel lies at (-11, 5)."""
    for (row, stop_row), (col, stop_col) in product(cut(ids.shape[0], rows), cut(ids.shape[1], cols)):
        name = f"r{row}c{col}"
        url = write_map(folder / name / "labels.tif", ids[row:stop_row, col:stop_col])
        yield Map(name, url, row - 11, col + 5, stop_row - row, stop_col - col)


def realistic(height: int, width: int) -> np.ndarray:
    """Patches of three classes, with a rim of nodata in a corner and speckle."""
    rng = np.random.default_rng(11)
    ids = np.kron(rng.integers(0, 3, (height // 6 + 1, width // 6 + 1)), np.ones((6, 6), int))[:height, :width]
    speckle = rng.random(ids.shape) < 0.06
    ids[speckle] = rng.integers(0, 3, speckle.sum())
    ids = np.uint8([0, 1, 7])[ids]
    ids[:9, width - 14 :] = 255
    return ids


def test_the_file_is_the_same_however_maps_blocks_and_tasks_are_cut(spark, tmp_path, monkeypatch) -> None:
    ids = realistic(61, 83)
    classes = [ICE, LAND]
    arguments = {"classes": classes, "crs": UTM, "transform": AT_UTM, "source": "out/mosaic"}
    whole = list(sheets_of(ids, tmp_path / "whole", [], []))
    parts = list(sheets_of(ids, tmp_path / "parts", [20, 41], [30, 47]))
    one, two = str(tmp_path / "one.parquet"), str(tmp_path / "to" / "two.parquet")
    count = vectors.vectorize(spark, whole, out=one, **arguments)
    monkeypatch.setattr(vectors, "FAN_IN", 3)  # merging in several rounds
    assert vectors.vectorize(spark, parts[::-1], out=two, block=8, task_pixels=300, **arguments) == count
    assert Path(one).read_bytes() == Path(two).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.parquet", "parts", "to", "whole"]
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["two.parquet"]

    frame = geopandas.read_parquet(one)
    assert frame.columns.tolist() == ["class_id", "class", "area_m2", "geometry"]
    assert frame.crs == pyproj.CRS(UTM)
    assert frame.geometry.is_valid.all()
    assert frame.geometry.exterior.is_ccw.all()
    expected = slowly(ids, [0, 7])
    assert len(frame) == count == len(expected)
    assert frame["class_id"].dtype == np.int16
    assert frame["class_id"].tolist() == [key[0] for key in sorted(expected)]
    assert frame["class"].tolist() == [{0: "land", 7: "é"}[key[0]] for key in sorted(expected)]
    planar = np.array([len(expected[key]) * 100 for key in sorted(expected)])
    np.testing.assert_allclose(frame.area, planar, rtol=1e-12)
    np.testing.assert_allclose(frame["area_m2"] / planar, 1 / 0.9997203**2, rtol=2e-5)  # UTM's scale 100 km off
    at = Affine(*AT_UTM) * Affine.translation(5, -11)
    found = list(zip(frame["class_id"], frame.geometry.to_wkb(), strict=True))
    np.testing.assert_array_equal(draw(found, ids.shape, at), np.where(ids == 1, 255, ids))

    metadata = pq.read_schema(one).metadata
    geo = json.loads(metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert geo["columns"]["geometry"]["geometry_types"] == ["Polygon"]
    np.testing.assert_allclose(geo["columns"]["geometry"]["bbox"], frame.total_bounds, rtol=0)
    assert json.loads(metadata[b"sattile"]) == {"sieve_m2": 0.0, "source": "out/mosaic"}


def test_specks_are_left_out_after_joining_and_the_rest_stays_as_it_is(spark, tmp_path) -> None:
    ids = realistic(40, 52)
    maps = list(sheets_of(ids, tmp_path / "maps", [7, 19], [13, 33]))
    arguments = {"classes": [LAND, WATER, ICE], "crs": None, "transform": (2.0, 0.0, 0.0, 0.0, 3.0, 0.0)}
    vectors.vectorize(spark, maps, out=str(tmp_path / "all.parquet"), **arguments)
    count = vectors.vectorize(spark, maps, out=str(tmp_path / "few.parquet"), sieve=18, **arguments)
    every, few = (geopandas.read_parquet(tmp_path / f"{name}.parquet") for name in ("all", "few"))
    kept = every[every["area_m2"] >= 18]  # three pixels
    assert 0 < count == len(few) < len(every)
    assert few.crs is None
    assert few.geometry.exterior.is_ccw.all()  # rows go up here
    assert few["area_m2"].tolist() == kept["area_m2"].tolist()
    assert few.geometry.to_wkb().tolist() == kept.geometry.to_wkb().tolist()


def test_a_file_without_polygons_can_be_read(spark, tmp_path) -> None:
    maps = list(sheets_of(realistic(9, 12), tmp_path / "maps", [], []))
    out = str(tmp_path / "none.parquet")
    assert vectors.vectorize(spark, maps, classes=[LAND], crs=UTM, transform=AT_UTM, out=out, sieve=1e9) == 0
    frame = geopandas.read_parquet(out)
    assert (len(frame), frame.crs) == (0, pyproj.CRS(UTM))


def test_a_map_that_cannot_be_read_is_named_and_nothing_is_left(spark, tmp_path) -> None:
    good, bad = sheets_of(realistic(12, 20), tmp_path / "maps", [], [8])
    Path(bad.url).write_bytes(Path(bad.url).read_bytes()[:300])
    with pytest.raises(SattileError, match=rf"map {bad.name} cannot be outlined"):
        vectors.vectorize(
            spark, [good, bad], classes=[LAND], crs=UTM, transform=AT_UTM, out=str(tmp_path / "x.parquet")
        )
    assert [path.name for path in tmp_path.iterdir()] == ["maps"]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"maps": []}, "no maps"),
        ({"classes": []}, "no classes"),
        ({"transform": (10, 0, 0, 0, 0, 0)}, "no grid"),
        ({"sieve": -1}, "sieve"),
        ({"sieve": float("nan")}, "sieve"),
        ({"crs": "EPSG:0"}, "no CRS"),
        ({"maps": [Map("a", "", -3, 0, 5, 5), Map("c", "", 9, 9, 1, 1), Map("b", "", 1, 4, 5, 5)]}, "a and b overlap"),
    ],
)
def test_wrong_usage_is_told_before_any_work(changed: dict[str, object], says: str) -> None:
    arguments = {"maps": [Map("a", "", 0, 0, 5, 5)], "classes": [LAND], "crs": UTM, "transform": AT_UTM, "out": "x"}
    with pytest.raises(UsageError, match=says):
        vectors.vectorize(None, **{**arguments, **changed})


def test_a_map_of_another_size_or_kind_is_refused(tmp_path) -> None:
    url = write_map(tmp_path / "labels.tif", realistic(9, 12))
    with pytest.raises(Refused, match="9 x 12 px of uint8, and a labels map of 12 x 9 px"):
        shapes.outlines(url, (12, 9), Window(0, 0, 9, 9), [0])
    raster.close_files()
