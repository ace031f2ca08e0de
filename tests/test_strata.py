"""Each counted pixel belongs to one spatial block and one region, however a scene is cut for prediction."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import Transformer

from sattile import geography, split, strata
from sattile.errors import UsageError
from sattile.grid import Window
from sattile.schema import Scene
from sattile.strata import OUTSIDE, Regions, Strata


def scene(height: int, width: int, crs: str | None = "EPSG:32632", gsd: float = 10.0) -> Scene:
    """Turned by a little, as scenes of another zone are on the equal-area plane."""
    transform = (gsd, 0.4, 600_000.0, 0.3, -gsd, 5_000_000.0)
    footprint = geography.footprint(crs, transform, height, width)
    return Scene("s", "s.tif", height, width, (), crs, transform, gsd if crs else None, None, footprint)


REGIONS = Regions(
    ("west", "east", "west"),
    tuple(
        shapely.to_wkb(shapely.box(*box))
        for box in ((600_000, 4_998_000, 601_000, 5_001_000), (600_800, 4_999_000, 602_000, 5_001_000),
                    (601_500, 4_997_000, 603_000, 4_999_500))
    ),
    "EPSG:32632",
)  # fmt: skip


def drawn(one: Scene, blocks: list[Window], dealt: Strata) -> tuple[np.ndarray, np.ndarray]:
    """The stratum of each pixel as a picture, and how often each pixel was dealt."""
    picture, hits = np.full((one.height, one.width), "", object), np.zeros((one.height, one.width), int)
    for block in blocks:
        for window, stratum in strata.parts(one, block, dealt):
            assert window.area
            assert window in block
            picture[window.slices()] = str(stratum)
            hits[window.slices()] += 1
    return picture, hits


def slow(one: Scene, dealt: Strata) -> np.ndarray:
    """The same pixel by pixel, by other functions."""
    to_degrees = Transformer.from_crs(one.crs, 4326, always_xy=True)
    shapes = shapely.from_wkb(list(REGIONS.wkb))
    picture = np.full((one.height, one.width), "", object)
    for row in range(0, one.height, 32):
        for col in range(0, one.width, 32):
            down, right = (row + min(row + 32, one.height)) / 2, (col + min(col + 32, one.width)) / 2
            x, y = 600_000 + 10 * right + 0.4 * down, 5_000_000 + 0.3 * right - 10 * down
            lon, lat = to_degrees.transform(x, y)
            (block,) = split.cells(np.array([lon]), np.array([lat]), dealt.cell)
            holders = [
                name for name, shape in zip(REGIONS.names, shapes, strict=True) if shape.covers(shapely.Point(x, y))
            ]
            picture[row : row + 32, col : col + 32] = str((block, (holders or [OUTSIDE])[-1]))
    return picture


@given(st.integers(1, 300), st.integers(1, 170), st.integers(40, 200), st.integers(40, 200))
@settings(max_examples=25, deadline=None)
def test_the_stratum_of_a_pixel_is_that_of_its_square_for_any_blocks(
    height: int, width: int, block_height: int, block_width: int
) -> None:
    one, dealt = scene(height, width), Strata(500.0, REGIONS)
    blocks = [
        Window(row, col, min(block_height, height - row), min(block_width, width - col))
        for row in range(0, height, block_height)
        for col in range(0, width, block_width)
    ]
    picture, hits = drawn(one, blocks, dealt)
    assert (hits == 1).all()
    assert (picture == slow(one, dealt)).all()


@given(st.lists(st.tuples(st.floats(-180, 180), st.floats(-89, 89)), min_size=1, max_size=9), st.floats(300, 200_000))
def test_the_cell_of_a_point_is_the_one_it_touches(points: list[tuple[float, float]], cell: float) -> None:
    lon, lat = np.array(points).T
    found = split.cells_at(lon, lat, cell)
    assert found == [split.cells(lon[i : i + 1], lat[i : i + 1], cell)[0] for i in range(len(points))]


@pytest.mark.parametrize("crs", [None, 'LOCAL_CS["a drawing",UNIT["metre",1]]'])
def test_a_scene_that_lies_nowhere_is_one_block_outside_all_regions(crs: str | None) -> None:
    one = scene(100, 70, crs=crs)
    whole = Window(0, 0, 100, 70)
    assert {stratum for _, stratum in strata.parts(one, whole, Strata(500.0, REGIONS))} == {("s", OUTSIDE)}
    assert {stratum for _, stratum in strata.parts(one, whole, Strata(500.0))} == {("s", None)}


@pytest.mark.parametrize(("shape", "pixels"), [((300, 233), 128), ((900, 1400), 204.939), ((5000, 7000), 512)])
def test_spatial_blocks_are_as_large_as_leaves_enough_of_them(shape: tuple[int, int], pixels: float) -> None:
    assert strata.strata_of([scene(*shape)], None).cell == pytest.approx(10 * pixels, rel=1e-3)


def write_regions(path: Path, names: list[str | None], **more: object) -> str:
    features = [
        {
            "type": "Feature",
            "properties": {"name": name},
            "geometry": shapely.geometry.mapping(shapely.box(i, 0, i + 1, 1)),
        }
        for i, name in enumerate(names)
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
    return str(path)


def test_regions_are_named_by_an_attribute_or_by_their_numbers(tmp_path: Path) -> None:
    url = write_regions(tmp_path / "r.geojson", ["a", "b", "a"])
    named, numbered = strata.read_regions(url, "name"), strata.read_regions(url, None)
    assert named is not None
    assert numbered is not None
    assert (named.names, numbered.names) == (("a", "b", "a"), ("1", "2", "3"))
    assert named.digest != numbered.digest
    at = strata.regions_at(named, "EPSG:4326", (1, 0, 0, 0, -1, 1), np.array([0.5, 1.5, 2.5, 3.5]), np.full(4, 0.5))
    assert at == ["a", "b", "a", OUTSIDE]
    content = json.loads(Path(url).read_text())
    content["features"][0]["geometry"] = None
    Path(url).write_text(json.dumps(content))
    rest = strata.read_regions(url, None)
    assert rest is not None
    assert rest.names == ("2", "3")


def test_regions_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    url = write_regions(tmp_path / "r.geojson", ["a", OUTSIDE])
    with pytest.raises(UsageError, match="rename that region"):
        strata.read_regions(url, "name")
    with pytest.raises(UsageError, match="no attribute 'county'; it has name"):
        strata.read_regions(url, "county")
    with pytest.raises(UsageError, match="no attribute 'geometry'; it has name"):
        strata.read_regions(url, "geometry")
    with pytest.raises(UsageError, match="no polygon with a name"):
        strata.read_regions(write_regions(tmp_path / "n.geojson", [None, None]), "name")
    with pytest.raises(UsageError, match="--regions; give that"):
        strata.read_regions(None, "name")
    point = {"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [1, 2]}}
    url = write_regions(tmp_path / "p.geojson", [], features=[point])
    with pytest.raises(UsageError, match="holds no polygon"):
        strata.read_regions(url, None)


def test_a_tile_is_in_the_region_of_its_middle() -> None:
    tiles = [("s", 0, 0, "1_2"), ("s", 64, 28, "1_3")]  # the corner of the second lies in the west alone
    source = {"scene_id": "s", "url": "s.tif", "crs": "EPSG:32632", "transform": [10, 0, 600_500, 0, -10, 5_000_000]}
    described = {"size": 32, "gsd": 10.0, "sources": [source], "split_rule": {"cell": 1920.0}}
    found = strata.of_tiles(tiles, described, REGIONS)
    assert found == {("s", 0, 0): ("1_2", "west"), ("s", 64, 28): ("1_3", "east")}
    assert strata.of_tiles(tiles, described, None)[("s", 64, 28)] == ("1_3", None)
    with pytest.raises(UsageError, match="tile it again"):
        strata.of_tiles(tiles, described | {"sources": [{"scene_id": "s"}]}, REGIONS)


def test_tiles_that_lie_near_are_one_spatial_block() -> None:
    """32 px: 16 of them are as large as the smallest block of scenes; without a place they stay as they are."""
    tiles = [("s", 32 * row, 32 * col, f"{row}_{col}") for row in range(12) for col in range(8)]
    source = {"scene_id": "s", "url": "s.tif", "crs": "EPSG:32632", "transform": [10, 0, 600_500, 0, -10, 5_000_000]}
    described = {"size": 32, "gsd": 10.0, "sources": [source], "split_rule": {"cell": None}}
    blocks = [block for block, _ in strata.of_tiles(tiles, described, None).values()]
    assert 6 <= len(set(blocks)) <= 12  # of 3 x 2 whole ones, wherever their borders lie
    assert max(blocks.count(one) for one in blocks) <= 20
    for without in ({"gsd": None}, {"sources": [{"scene_id": "s"}]}, {"size": 128}):
        kept = strata.of_tiles(tiles, described | without, None)
        assert [block for block, _ in kept.values()] == [tile[3] for tile in tiles]


def test_groups_of_shapes_are_spatial_blocks_however_small_they_are() -> None:
    """They were laid apart, and nothing else says how many observations there are."""
    tiles = [("a", 0, 0, "a/0/0"), ("a", 0, 16, "a/0/0"), ("a", 0, 48, "a/0/48")]
    description = {
        "size": 16, "gsd": 10.0, "split_rule": {"by": "shapes", "cell": 0},
        "sources": [{"scene_id": "a", "url": "a", "crs": "EPSG:32632", "transform": (10, 0, 6e5, 0, -10, 5e6)}],
    }  # fmt: skip
    assert strata.of_tiles(tiles, description, None) == {tile[:3]: (tile[3], None) for tile in tiles}
    # Cells of a grid that are as small are joined to blocks of 128 px.
    description["split_rule"] = {"by": "block", "cell": 160}
    assert not {block for block, _ in strata.of_tiles(tiles, description, None).values()} & {"a/0/0", "a/0/48"}
