"""Many scenes on one grid: the laws with networks of numpy on real files, and runs on Spark with Keras networks."""

from __future__ import annotations

import base64
import itertools
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from maps_for_tests import maps_of, record_of, validate
from networks_for_tests import bundle_of, pooling_network, whole, window_network
from rasterio.features import rasterize
from rasterio.transform import from_origin
from scenes_for_tests import write_scene

from sattile import inference, mosaic, raster, sheets
from sattile.errors import TooManyRefused, UsageError
from sattile.grid import Geometry, Window
from sattile.inference import Inference
from sattile.mapreduce import INFERRED, Tally, columns
from sattile.prediction import predict
from sattile.record import read_quarantine
from sattile.reporting import report
from sattile.scenes import describe, find
from sattile.schema import Scene
from sattile.sheets import Layout, Weights
from sattile.stitch import NODATA
from sattile.warp import Grid, Warp, parse_grid

SAME, ZONE, COARSE, DEGREES = "EPSG:32632@10", "EPSG:32631@10", "EPSG:32632@20", "EPSG:4326@0.0001"

PLACES = {"a": (600_000, 5_000_000), "b": (600_400, 4_999_700), "c": (600_150, 4_999_600)}
SHAPES = {"a": (61, 83), "b": (40, 95), "c": (1, 1)}


def image_of(name: str, shape: tuple[int, int]) -> np.ndarray:
    """(2, height, width) uint16 with a collar of zeros in larger ones."""
    data = np.random.default_rng(sum(map(ord, name))).integers(1, 100, (2, *shape)).astype(np.uint16)
    if shape[0] > 10:
        data[:, : shape[0] // 5, : shape[1] // 3] = 0
    return data


def write_archive(folder: Path, names: Sequence[str] = tuple(PLACES), **profile: Any) -> Path:
    for name in names:
        west, north = PLACES[name]
        write_scene(
            folder / f"{name}.tif", image_of(name, SHAPES[name]), west=west, north=north, names=("x", "y"), nodata=0,
            **profile,
        )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_archive(tmp_path_factory.mktemp("archive"))


def scenes_of(folder: Path, bands: Sequence[str] = ("x", "y")) -> list[Scene]:
    return [describe(one, raster.describe_file).select(bands) for one in find(str(folder))]


def job_of(geometry: Geometry | None = None, batch: int = 2, **changes: Any) -> Inference:
    geometry = geometry or Geometry("crop", 32, 32, 6, 2)
    return replace(
        Inference(bundle_of(), geometry, batch, "tensorflow", 1, (3.0, 5.0), scores=True, coverage=True), **changes
    )


def layout_of(grid: str | Grid, block: int = 48, sheet: int = 512, **changes: Any) -> Layout:
    found = parse_grid(grid) if isinstance(grid, str) else grid
    return replace(Layout(found, sheet, block, "all", Weights()), **changes)


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    def use(function: Callable[..., Any]) -> None:
        monkeypatch.setattr(inference, "load_scorer", lambda *_, **__: function)

    use(pooling_network)
    return use


def sent(value: Any) -> Any:
    return SimpleNamespace(value=value)


def stitched(
    scenes: Sequence[Scene], job: Inference, layout: Layout, *, apart: bool = False, shuffle: int | None = None,
    tasks: int = 3,
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """{sheet: its rasters} as the tasks of a wave make them, in this process."""
    planned, *_ = sheets.plan_sheets(scenes, layout, aoi=job.aoi)
    by_id = {scene.scene_id: scene for scene in scenes}
    works = [work for sheet in planned for work in sheet.works]
    windows = sent({sheet.target.name: sheet.window for sheet in planned})
    rng = np.random.default_rng(shuffle)
    if apart:
        works = [replace(one, scenes=(s,), first=rank) for one in works for rank, s in enumerate(one.scenes)]
    if shuffle is not None:
        works = [works[i] for i in rng.permutation(len(works))]
    groups = [works[start::tasks] for start in range(tasks)]
    common: dict[str, Any] = {"job": job, "layout": layout}
    rows = []
    for number in range(tasks):
        frames = iter([pd.DataFrame({"id": [number]})])
        work = sheets.infer if apart else sheets.stitch
        extra = {} if apart else {"windows": windows}
        rows += list(work(frames, tasks=sent(groups), scenes=sent(by_id), **extra, **common))
    if apart:
        table = joined(rows)
        if shuffle is not None:
            table = table.sample(frac=1, random_state=shuffle)
        table = table.sort_values(["name", "row", "col", "rank", "top"], kind="stable")
        chunks = (table.iloc[start : start + 2] for start in range(0, len(table), 2))
        rows = list(sheets.add_up(chunks, windows=windows, **common))
    table = joined(rows)
    assert list(table.columns) == columns(INFERRED)
    return {sheet.target.name: canvas_of(sheet, table[table.name == sheet.target.name], job) for sheet in planned}


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    rows = [row for frame in frames for row in frame.itertuples(index=False)]
    return pd.DataFrame(rows, columns=frames[0].columns, dtype=object)


def canvas_of(sheet: sheets.Sheet, rows: pd.DataFrame, job: Inference) -> dict[str, np.ndarray]:
    shape, classes = sheet.window.shape, len(job.bundle.classes)
    found: dict[str, Any] = {
        "labels": np.full(shape, NODATA, np.uint8), "scores": np.full((*shape, classes), np.nan, np.float32),
        "coverage": np.zeros(shape, np.uint32), "scenes": np.zeros(shape, np.uint16),
    }  # fmt: skip
    hits = np.zeros(shape, int)
    for row in rows.itertuples():
        assert row.reason is None, row.reason
        block = Window(row.row, row.col, row.height, row.width)
        hits[block.slices()] += 1
        for name, values in found.items():
            values[block.slices()] = mosaic.unpack(
                getattr(row, name), str(values.dtype), (*block.shape, *values.shape[2:])
            )
    assert hits.max() <= 1
    return found | {"window": sheet.window}


def expected_on(grid: Grid, window: Window, scenes: Sequence[Scene], job: Inference, network: Any) -> dict[str, Any]:
    """The mean of whole-image inference of each scene, each warped as a whole."""
    sums, weights = np.zeros((*window.shape, 2)), np.zeros(window.shape)
    count = np.zeros(window.shape, int)
    for scene in sorted(scenes, key=lambda one: one.scene_id):
        data, valid = raster.read(scene, Window(0, 0, scene.height, scene.width))
        scores = whole(job, network, data, valid)
        warp = Warp(grid, scene)
        cut = warp.cut(window)
        if cut.need.area:
            part = cut.need.slices()
            on_grid, heavy = warp.apply(cut, scores[part], valid[part].astype(np.int64))
            sums += np.where(heavy[..., None] > 0, on_grid, 0) * heavy[..., None].astype(float)
            weights += heavy
            count += heavy > 0
    with np.errstate(invalid="ignore"):
        scores = (sums / weights[..., None]).astype(np.float32)
    labels = np.where(weights > 0, np.where(scores[..., 1] > scores[..., 0], 7, 0), NODATA)
    return {"scores": scores, "coverage": weights, "scenes": count, "labels": labels}


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name in ("labels", "scores", "coverage", "scenes"):
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# --- laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [SAME, ZONE, COARSE, DEGREES])
@pytest.mark.parametrize("block", [16, 77, 512])
def test_a_mosaic_is_the_mean_of_whole_image_inference(archive: Path, network: Any, grid: str, block: int) -> None:
    scenes, job, layout = scenes_of(archive), job_of(), layout_of(grid, block)
    found = stitched(scenes, job, layout)
    assert found
    for sheet in found.values():
        same(sheet, expected_on(layout.grid, sheet["window"], scenes, job, pooling_network))
    assert max(sheet["scenes"].max() for sheet in found.values()) >= 2


@st.composite
def archives(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Scenes that overlap, of one pixel to some thousand, in two UTM zones, with holes."""
    found = []
    for number in range(draw(st.integers(1, 4))):
        shape = draw(st.sampled_from([(1, 1), (1, 40), (33, 2), (29, 37), (50, 41)]))
        zone = draw(st.sampled_from([32632, 32631]))
        # The same ground in both zones: 8.3 degrees east, 45.1 north.
        west, north = {32632: (445_000, 5_000_000), 32631: (917_000, 5_013_000)}[zone]
        found.append(
            {
                "name": f"s{number}", "shape": shape, "crs": f"EPSG:{zone}", "gsd": draw(st.sampled_from([10.0, 13.0])),
                "west": west + draw(st.integers(-300, 300)), "north": north + draw(st.integers(-300, 300)),
                "holes": draw(st.sampled_from([0.0, 0.2, 1.0])),
            }
        )  # fmt: skip
    return found


@given(
    archives(), st.sampled_from(["EPSG:32632@10", "EPSG:32631@10", "EPSG:32632@26", "EPSG:4326@0.0002", "EPSG:3857@9"]),
    st.integers(16, 90), st.booleans(), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_archive_on_any_grid_is_the_mean_of_whole_image_inference(
    monkeypatch: pytest.MonkeyPatch, given_: list[dict[str, Any]], grid: str, block: int, apart: bool, seed: int
) -> None:
    monkeypatch.setattr(inference, "load_scorer", lambda *_, **__: pooling_network)
    monkeypatch.setattr("sattile.decoder.decoder", Here)
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(seed)
        for one in given_:
            data = rng.integers(1, 100, (2, *one["shape"])).astype(np.uint16)
            data[:, rng.random(one["shape"]) < one["holes"]] = 0
            write_scene(
                Path(folder) / f"{one['name']}.tif", data, crs=one["crs"], west=one["west"], north=one["north"],
                gsd=one["gsd"], names=("x", "y"), nodata=0,
            )  # fmt: skip
        layout, job = layout_of(grid, block), job_of(Geometry("crop", 32, 32, 6, 2))
        scenes = scenes_of(Path(folder))
        found = stitched(scenes, job, layout, apart=apart, shuffle=seed)
        held = np.zeros(len(scenes), int)
        for sheet in found.values():
            expected = expected_on(layout.grid, sheet["window"], scenes, job, pooling_network)
            same(sheet, expected)
            held += int(expected["scenes"].sum())
        if not held.any():  # nothing but holes, or pixels smaller than the grid's
            assert all(one["holes"] or min(one["shape"]) < 3 for one in given_)


@pytest.mark.parametrize("apart", [False, True])
def test_a_scene_much_finer_than_the_grid_is_taken_in_parts(
    archive: Path, network: Any, monkeypatch: pytest.MonkeyPatch, apart: bool
) -> None:
    largest = 0
    read = sheets.read_step

    def watch(scene: Scene, region: Window, need: Window, **options: Any) -> Any:
        nonlocal largest
        largest = max(largest, need.area)
        return read(scene, region, need, **options)

    monkeypatch.setattr(sheets, "read_step", watch)
    monkeypatch.setattr("sattile.decoder.decoder", Here)
    layout = layout_of("EPSG:32632@70", 64)
    geometry = Geometry("crop", 16, 16, 6, 2)
    scenes, job = scenes_of(archive), job_of(geometry)
    [sheet] = stitched(scenes, job, layout, apart=apart, shuffle=1).values()
    same(sheet, expected_on(layout.grid, sheet["window"], scenes, job, pooling_network))
    assert 16**2 / 2 < largest <= 2 * 16**2


class Here:
    """The decoder's work in this process, where it can be watched."""

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        self._got = function(*arguments, **options)

    def result(self) -> Any:
        return self._got


@pytest.mark.parametrize("merge", ["crop", "blend"])
@pytest.mark.parametrize("rule", ["all", "newest"])
@pytest.mark.parametrize("weights", [Weights(), Weights(edge=True)])
def test_two_ways_of_composing_any_order_and_any_tasks_give_the_same_bits(
    archive: Path, network: Any, merge: str, rule: str, weights: Weights
) -> None:
    geometry = Geometry("crop", 32, 32, 6, 2) if merge == "crop" else Geometry("blend", 32, 16, 0, 2)
    network(pooling_network if merge == "crop" else window_network)
    scenes, job = scenes_of(archive), job_of(geometry)
    layout = layout_of(ZONE, 70, rule=rule, weights=weights)
    reference = stitched(scenes, job, layout)
    for seed in range(2):
        for apart in (False, True):
            other = stitched(scenes[::-1], job, layout, apart=apart, shuffle=seed, tasks=1 + 3 * seed)
            assert reference.keys() == other.keys()
            for name, sheet in reference.items():
                same(sheet, other[name])


def test_the_size_of_sheets_changes_no_pixel(archive: Path, network: Any) -> None:
    import shapely

    area = shapely.Polygon([(9.5, 45.0), (11.0, 45.27), (10.2, 45.8)])
    scenes, job = scenes_of(archive), job_of(aoi=(shapely.to_wkb(area), "EPSG:4326"))
    small, large = (stitched(scenes, job, layout_of(ZONE, 64, sheet)) for sheet in (512, 4096))
    assert len(small) >= len(large)
    pixels: list[dict[tuple[int, int], tuple[int, int]]] = []
    for sheets_ in (small, large):
        found = {}
        for sheet in sheets_.values():
            for row, col in zip(*np.nonzero(sheet["labels"] != NODATA), strict=True):
                at = sheet["window"].row + int(row), sheet["window"].col + int(col)
                found[at] = int(sheet["labels"][row, col]), float(sheet["scores"][row, col, 0])
        pixels.append(found)
    assert pixels[0] == pixels[1]


@pytest.mark.parametrize("merge", ["crop", "blend"])
@pytest.mark.parametrize("grid", [SAME, ZONE, COARSE])
def test_a_constant_is_constant_and_nodata_is_nodata(archive: Path, network: Any, grid: str, merge: str) -> None:
    geometry = Geometry("crop", 32, 32, 6, 2) if merge == "crop" else Geometry("blend", 32, 16, 0, 2)
    network(lambda batch: np.full((*batch.shape[:3], 2), 0.1, np.float32))
    layout = layout_of(grid, 50, weights=Weights(edge=True))
    scenes = scenes_of(archive)
    for sheet in stitched(scenes, job_of(geometry), layout).values():
        there = sheet["coverage"] > 0
        assert set(np.unique(sheet["scores"][there])) == {np.float32(0.1)}
        assert np.isnan(sheet["scores"][~there]).all()
        np.testing.assert_array_equal(sheet["labels"] == NODATA, ~there)
        np.testing.assert_array_equal(sheet["scenes"] > 0, there)
        expected = expected_on(layout.grid, sheet["window"], scenes, job_of(), pooling_network)
        np.testing.assert_array_equal(there, expected["coverage"] > 0)


def test_the_newest_scene_wins_where_it_is_valid(archive: Path, network: Any) -> None:
    network(lambda batch: np.concatenate([batch[..., :1], batch[..., :1] * 0 + 50], -1))
    times = {"a": "2021-01-01T00:00:00Z", "b": "2021-01-01T00:00:00.900Z", "c": None}  # as text, a would be later
    scenes = [replace(one, datetime=times[one.scene_id]) for one in scenes_of(archive)]
    layout = layout_of(SAME, 64, rule="newest")
    [sheet] = stitched(scenes, job_of(Geometry("crop", 32, 32, 0, 1)), layout).values()
    assert sheet["scenes"].max() == 1
    expected = np.full(sheet["window"].shape, np.nan)
    for name in ("c", "a", "b"):  # the newest last
        data = image_of(name, SHAPES[name])
        west, north = PLACES[name]
        place = Window(-north // 10, west // 10, *SHAPES[name]).slices(sheet["window"])
        expected[place] = np.where(data[0] != 0, data[0], expected[place])
    np.testing.assert_array_equal(sheet["scores"][..., 0], expected.astype(np.float32))


QUARTERS = [("2020-01-01T00:00:00Z", "2020-03-31T00:00:00Z"), ("2020-04-01T00:00:00Z", "2020-06-30T00:00:00Z")]


@pytest.mark.parametrize(
    ("times", "datetime", "interval"),
    [
        ([{"interval": QUARTERS[1]}, {"interval": QUARTERS[0]}], None, (QUARTERS[0][0], QUARTERS[1][1])),
        ([{"interval": QUARTERS[0]}] * 2, None, QUARTERS[0]),
        ([{"interval": QUARTERS[0]}, {"datetime": "2020-02-01T00:00:00Z"}], None, QUARTERS[0]),
        ([{"datetime": "2020-02-01T00:00:00Z"}] * 2, "2020-02-01T00:00:00Z", None),
        ([{"datetime": "2020-02-01T00:00:00Z"}, {}], None, None),
        ([{}, {}], None, None),
    ],
)
def test_a_sheet_is_of_the_whole_time_of_its_scenes(
    archive: Path, times: list[dict[str, Any]], datetime: str | None, interval: tuple[str, str] | None
) -> None:
    scenes = [replace(one, **stated) for one, stated in zip(scenes_of(archive)[:2], times, strict=True)]
    [sheet], *_ = sheets.plan_sheets(scenes, layout_of(SAME, 64))
    assert (sheet.target.datetime, sheet.target.interval) == (datetime, interval)


def test_composites_are_as_new_as_they_begin_unless_they_state_a_time(archive: Path) -> None:
    days = {"a": None, "b": "2020-03-01T00:00:00Z", "c": "2020-02-01T00:00:00Z"}
    spans = {"a": QUARTERS[1], "b": None, "c": ("2019-01-01T00:00:00Z", "2021-01-01T00:00:00Z")}
    scenes = [replace(one, datetime=days[one.scene_id], interval=spans[one.scene_id]) for one in scenes_of(archive)]
    assert [one.scene_id for one in sheets.in_order(scenes, "newest")] == ["a", "b", "c"]
    undated = replace(scenes[0], scene_id="0", datetime=None, interval=None)
    assert [one.scene_id for one in sheets.in_order([undated, *scenes], "newest")] == ["a", "b", "c", "0"]


def test_weights_of_clouds_and_edges(tmp_path: Path, network: Any) -> None:
    network(lambda batch: batch)
    for name, value, cloud in (("a", 10, 25), ("b", 20, 75)):
        data = np.full((3, 40, 60), value, np.uint16)
        data[2] = cloud
        data[2, :10] = 100
        write_scene(tmp_path / f"{name}.tif", data, names=("x", "y", "clp"), nodata=0)
    scenes, job = scenes_of(tmp_path, ("x", "y", "clp")), job_of(Geometry("crop", 32, 32, 0, 1))
    [sheet] = stitched(scenes, job, layout_of(SAME, 64, weights=Weights(cloud="clp"))).values()
    assert (sheet["scores"][10:, :, 0] == np.float32((75 * 10 + 25 * 20) / 100)).all()
    assert (sheet["coverage"][10:] == 100).all()
    assert (sheet["labels"][:10] == NODATA).all()  # cloud for certain is no data
    near = sheets.edge_weights(scenes[0], Window(0, 0, 40, 60))
    assert near.min() == near[0, 0] == near[-1, 7] == near[12, 0] >= 1
    assert near.max() == near[20, 30] <= 256
    np.testing.assert_array_equal(near, near[::-1, ::-1])
    np.testing.assert_array_equal(near[7:19, 5:30], sheets.edge_weights(scenes[0], Window(7, 5, 12, 25)))


def test_two_hundred_scenes_over_one_block(tmp_path: Path, network: Any) -> None:
    network(lambda batch: batch)
    rng = np.random.default_rng(0)
    data = rng.integers(1, 60_000, (200, 2, 12, 17)).astype(np.uint16)
    for number in range(200):
        write_scene(tmp_path / f"s{number:03d}.tif", data[number], names=("x", "y"))
    scenes, job = scenes_of(tmp_path), job_of(Geometry("crop", 32, 32, 0, 1))
    layout = layout_of(SAME, 64)
    [sheet] = stitched(scenes, job, layout, tasks=1).values()
    assert (sheet["scenes"][:12, :17] == 200).all()
    means = data.astype(float).mean(axis=0).transpose(1, 2, 0).astype(np.float32)
    np.testing.assert_array_equal(sheet["scores"][:12, :17], means)
    [other] = stitched(scenes, job, layout, apart=True, shuffle=3, tasks=7).values()
    same(sheet, other)


def test_coverage_does_not_wrap(archive: Path) -> None:
    scene = scenes_of(archive)[0]
    work = sheets.Work("r0_c0", Window(0, 0, 2, 3), (scene.scene_id,))
    frame = sheets._frame(parse_grid(SAME), work.block)
    sums = sheets.Sums(work, frame, job_of(), layout_of(SAME))
    for _ in range(3):
        sums.add(work.block, np.ones((2, 3, 2), np.float32), np.full((2, 3), 2**31, np.uint32))
    [row] = sums.rows(Tally())
    coverage = mosaic.unpack(row[columns(INFERRED).index("coverage")], "uint32", (2, 3))
    assert (coverage == 2**32 - 1).all()


def test_a_grid_like_a_file_is_covered_as_the_file_is(archive: Path, network: Any) -> None:
    like = Grid("EPSG:32632", (10, 0, 600_300, 0, -10, 4_999_900), Window(0, 0, 1100, 700), True)
    found = stitched(scenes_of(archive), job_of(), layout_of(like, 128))
    assert {name: sheet["window"] for name, sheet in found.items()} == {"r0_c0": Window(0, 0, 512, 512)}
    for sheet in found.values():
        same(sheet, expected_on(like, sheet["window"], scenes_of(archive), job_of(), pooling_network))


def test_pixels_outside_the_area_of_interest_are_nodata(archive: Path, network: Any) -> None:
    import shapely

    area = shapely.Polygon([(600_203.3, 4_999_907.1), (600_711.7, 4_999_798.9), (600_497.3, 4_999_301.9)])
    plain = stitched(scenes_of(archive), job_of(), layout_of(SAME, 32))
    cut = stitched(scenes_of(archive), job_of(aoi=(shapely.to_wkb(area), "EPSG:32632")), layout_of(SAME, 32))
    [one], [other] = plain.values(), cut.values()
    rows, cols = np.mgrid[0 : other["window"].height, 0 : other["window"].width] + 0.5
    xs, ys = (cols + other["window"].col) * 10, -(rows + other["window"].row) * 10
    inside = shapely.contains_xy(area, xs, ys)
    part = one["labels"][(other["window"]).slices(one["window"])]
    np.testing.assert_array_equal(other["labels"], np.where(inside, part, NODATA))
    assert (other["coverage"][~inside] == 0).all()


def test_no_block_decides_about_a_pixel_at_the_edge_of_an_area() -> None:
    """Its sides are curves on the grid, and are drawn in parts."""
    import shapely

    area = shapely.Polygon([(-20, 30), (60, 41.3), (20, 66), (5, 52)])
    grid = parse_grid("EPSG:3035@2000")
    whole = Window(-2500, 700, 2600, 2900)
    aoi = shapely.to_wkb(area), "EPSG:4326"
    inside = sheets.aoi_on_grid(aoi, grid, whole)
    assert 0.1 < inside.mean() < 0.9
    for part in (Window(-2500, 700, 1, 2900), Window(-2011, 1033, 1517, 1211), Window(-9, 3001, 109, 599)):
        np.testing.assert_array_equal(sheets.aoi_on_grid(aoi, grid, part), inside[part.slices(whole)])


def test_a_small_scene_in_a_block_of_a_coarse_grid_is_looked_up_where_it_lies(archive: Path, network: Any) -> None:
    scenes, job, layout = scenes_of(archive), job_of(Geometry("crop", 64, 64, 6, 2)), layout_of("EPSG:32632@200", 448)
    by_id = {one.scene_id: one for one in scenes}
    [sheet], *_ = sheets.plan_sheets(scenes, layout)
    steps = [step for work in sheet.works for step in sheets.steps_of(work, by_id, job, layout)]
    assert {step.scene.scene_id for step in steps} == set("abc")
    assert max(step.cut.window.area for step in steps) < 100
    [found] = stitched(scenes, job, layout).values()
    same(found, expected_on(layout.grid, found["window"], scenes, job, pooling_network))


# --- the plan -----------------------------------------------------------------------------------------------------


def test_an_estimate_is_of_what_is_left_to_do(archive: Path) -> None:
    scenes, job, layout = scenes_of(archive, ("x", "y")), job_of(), layout_of(SAME, block=16)
    by_id = {scene.scene_id: scene for scene in scenes}
    planned, *_ = sheets.plan_sheets(scenes, layout)
    whole = sheets.describe_plan(planned, by_id, job, layout, None)["evaluated_pixels"]
    assert whole >= sum(scene.height * scene.width for scene in scenes)
    one = [replace(sheet, works=sheet.works[:1]) for sheet in planned[:1]]
    assert 0 < sheets.describe_plan(one, by_id, job, layout, None)["evaluated_pixels"] < whole / 8


def test_sheets_keep_name_and_source_when_the_archive_grows_elsewhere(tmp_path: Path) -> None:
    layout = layout_of(SAME, 64)
    first, *_ = sheets.plan_sheets(scenes_of(write_archive(tmp_path)), layout)
    write_scene(tmp_path / "far.tif", image_of("far", (30, 40)), west=700_000, north=5_100_000, names=("x", "y"))
    second, *_ = sheets.plan_sheets(scenes_of(tmp_path), layout)
    assert [one for one in second if one.target.name == first[0].target.name] == first
    assert len(second) == 2
    write_scene(tmp_path / "near.tif", image_of("near", (30, 40)), west=600_100, north=4_999_900, names=("x", "y"))
    third, *_ = sheets.plan_sheets(scenes_of(tmp_path), layout)
    changed = [one.target.name for one, before in zip(third, second, strict=True) if one != before]
    assert changed == [first[0].target.name]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ("EPSG:32632@10", None),
        ("EPSG:32631@10", None),  # its neighbour
        ("EPSG:4326@0.0001", None),  # degrees promise no metres
        ("EPSG:32638@10", "calls 10 m are "),
        ("EPSG:3857@10", "calls 10 m are "),
    ],
)
def test_a_grid_whose_pixels_are_not_what_its_crs_calls_them_is_told(
    archive: Path, grid: str, says: str | None
) -> None:
    layout = layout_of(grid)
    planned, *_ = sheets.plan_sheets(scenes_of(archive), layout)
    said = sheets.stretched(planned, layout.grid)
    assert (said is None) == (says is None)
    if said and says:
        assert says in said
        assert said.endswith("EPSG:32632")


def test_blocks_follow_from_model_grid_and_memory_alone() -> None:
    def block(memory: int = 4_000_000_000, grid: str = SAME, **changes: Any) -> int:
        bundle = bundle_of(gsd=10.0, activation_bytes=600.0, **changes)
        job = replace(job_of(Geometry("crop", 1024, 1024, 64, 8)), bundle=bundle)
        return sheets.choose_block(job, parse_grid(grid), memory, 16_384)

    assert block() % 16 == 0
    assert 850 <= block() < 1024  # one window of the network, turned a little
    assert block(grid="EPSG:32632@40") <= block() // 4 + 16
    assert 16 <= block(memory=1_000_000_000) <= block()


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ({}, "--grid EPSG:N@RES or --like FILE"),
        ({"grid": SAME, "like": "x.tif"}, "either --grid"),
        ({"grid": SAME, "rule": "best"}, "all or newest"),
        ({"grid": SAME, "sheet": 1000}, "1024"),
        ({"grid": SAME, "block": 7}, "from 16"),
        ({"grid": SAME, "weights": "cloud"}, "cloud=BAND"),
        ({"like": "/no/such.tif"}, "does not exist"),
    ],
)
def test_layouts_that_cannot_be_are_refused(wish: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        sheets.lay_out(job_of(), **({"grid": None, "like": None} | wish))


# --- on Spark -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small network with pooling, random weights."""
    import keras

    from sattile.model import bundle

    folder = tmp_path_factory.mktemp("model")
    keras.utils.set_random_seed(3)
    inputs = keras.Input((None, None, 2))
    x = keras.layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = keras.layers.UpSampling2D()(keras.layers.MaxPooling2D()(x))
    keras.Model(inputs, keras.layers.Conv2D(2, 3, padding="same")(x)).save(folder / "net.keras")
    described = {"bands": "x,y", "classes": "land=0,water=7", "activation": "none"}
    bundle(keras=str(folder / "net.keras"), **described, out=str(folder / "model"))
    return str(folder / "model")


OPTIONS: dict[str, Any] = {
    "grid": ZONE, "sheet": 512, "block": 64, "size": 32, "coverage": True, "scores": True, "engine": "tensorflow",
}  # fmt: skip


def go(spark: Any, model: str, scenes: Path | list[str], out: Path, **options: Any) -> dict[str, Any]:
    given = scenes if isinstance(scenes, list) else [str(scenes)]
    predict(spark, model=model, scenes=given, out=str(out), **(OPTIONS | options))
    return record_of(out)


@pytest.fixture(scope="module")
def reference(spark: Any, model: str, archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sheets") / "out"
    go(spark, model, archive, out)
    return out


def test_what_is_published_opens_as_one_and_is_valid(reference: Path, shared_data: Path) -> None:
    names = sorted(path.parent.name for path in reference.glob("*/item.json"))
    assert names
    record = record_of(reference)
    assert record["done"] == len(names)
    assert record["delivered_pixels"] > 0
    assert record["moved_bytes"] > 0
    for name in names:
        validate(reference / name / "item.json", shared_data / "stac-schemas")
        item = json.loads((reference / name / "item.json").read_text())
        assert {"labels", "scores", "coverage", "scenes", "quicklook"} == set(item["assets"])
        assert item["properties"]["sattile:window"]
    validate(reference / "collection.json", shared_data / "stac-schemas")
    for layer in ("labels", "scores", "coverage", "scenes"):
        with rasterio.open(reference / f"{layer}.vrt") as file:
            assert file.crs.to_epsg() == 32631
            values = file.read(1)
            for name in names:
                with rasterio.open(reference / name / f"{layer}.tif") as sheet:
                    window = file.window(*sheet.bounds)
                    part = file.read(1, window=window)
                    np.testing.assert_array_equal(part, sheet.read(1))
                    assert set(sheet.block_shapes) == {(512, 512)} or max(sheet.shape) < 512
            if layer == "labels":
                assert set(np.unique(values)) <= {0, 7, 255}
                with rasterio.open(reference / names[0] / "labels.tif") as sheet:
                    assert [file.colormap(1)[one] for one in (0, 7)] == [sheet.colormap(1)[one] for one in (0, 7)]
                assert file.nodata == 255
    picture = mosaic.cog.read_png((reference / mosaic.OVERVIEW).read_bytes())
    assert set(np.unique(picture)) == {0, 7, 255}


def test_the_report_shows_all_sheets_as_one_picture(reference: Path, tmp_path: Path) -> None:
    page = Path(report([str(reference)], out=str(tmp_path / "report"))).read_text()
    assert "One map of all scenes" in page
    assert base64.b64encode((reference / mosaic.OVERVIEW).read_bytes()).decode() in page


def test_vectors_are_the_labels_joined_over_sheets_and_a_rerun_leaves_them(
    spark: Any, model: str, archive: Path, tmp_path: Path
) -> None:
    import geopandas

    out = tmp_path / "out"
    options = {"sheet": 512, "block": 64, "grid": "EPSG:32632@2", "vectors": "water"}  # over several sheets
    go(spark, model, archive, out, **options)
    assert len(list(out.glob("*/item.json"))) > 1
    found = geopandas.read_parquet(out / "vectors.parquet")
    with rasterio.open(out / "labels.vrt") as file:
        labels = file.read(1)
        drawn = rasterize(list(found.geometry), labels.shape, transform=file.transform)
        assert found.crs == file.crs
    np.testing.assert_array_equal(drawn == 1, labels == 7)
    assert set(found["class"]) == {"water"}
    before = (out / "vectors.parquet").stat().st_mtime_ns
    go(spark, model, archive, out, **options)
    assert (out / "vectors.parquet").stat().st_mtime_ns == before
    go(spark, model, archive, out, **options, sieve=1000)
    large = geopandas.read_parquet(out / "vectors.parquet")
    assert len(large) == (found.area_m2 >= 1000).sum() < len(found)
    with pytest.raises(UsageError, match="did you mean water"):
        go(spark, model, archive, out, **(options | {"vectors": "watre"}))
    with pytest.raises(UsageError, match="--grid or --like"):
        go(spark, model, archive, tmp_path / "other", **(options | {"grid": None, "sheet": 16_384, "block": None}))


def test_the_same_bytes_by_a_shuffle_and_for_any_order_task_and_wave(
    spark: Any, model: str, archive: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "shares_a_task", lambda *_: False)
    monkeypatch.setattr(sheets, "TASK_PIXELS", 5_000)
    monkeypatch.setattr(sheets, "WAVE_PIXELS", 1)
    record = go(spark, model, sorted(map(str, archive.glob("*.tif")), reverse=True), tmp_path / "out")
    assert maps_of(tmp_path / "out") == maps_of(reference)
    assert record["moved_bytes"] > record_of(reference)["moved_bytes"]  # scores went from task to task, too


def test_a_killed_worker_changes_nothing(
    spark: Any, model: str, archive: Path, tmp_path: Path, reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "TASK_PIXELS", 5_000)
    killed: list[int] = []
    over = threading.Event()

    def kill_one() -> None:
        """Of the Python workers that Spark forked from its daemon, as soon as one is busy."""
        while not over.is_set():
            for process in psutil.Process(os.getpid()).children(recursive=True):
                try:
                    command = " ".join(process.cmdline())
                    forked = "pyspark.daemon" in command and "pyspark.daemon" in " ".join(process.parent().cmdline())
                    if forked and process.cpu_times().user > 0.2 and process.status() != psutil.STATUS_ZOMBIE:
                        os.kill(process.pid, signal.SIGKILL)
                        killed.append(process.pid)
                        return
                except (psutil.Error, AttributeError):
                    continue
            time.sleep(0.02)

    thread = threading.Thread(target=kill_one)
    thread.start()
    try:
        go(spark, model, archive, tmp_path / "out")
    finally:
        over.set()
        thread.join()
    assert killed
    assert maps_of(tmp_path / "out") == maps_of(reference)


def test_a_rerun_does_only_sheets_that_are_missing_or_changed(spark: Any, model: str, tmp_path: Path) -> None:
    scenes, out = write_archive(tmp_path / "scenes"), tmp_path / "out"
    write_scene(scenes / "far.tif", image_of("far", (30, 40)), west=640_000, north=5_040_000, names=("x", "y"))
    first = go(spark, model, scenes, out)
    assert first["skipped"] == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name[0] not in "._"}
    second = go(spark, model, scenes, out)
    assert (second["done"], second["skipped"]) == (0, first["done"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    whole_ = maps_of(out)
    far = next(path.parent for path in out.glob("*/item.json") if "far.tif" in path.read_text())
    (far / "item.json").unlink()
    third = go(spark, model, scenes, out)
    assert (third["done"], third["skipped"]) == (1, first["done"] - 1)
    assert maps_of(out) == whole_
    write_scene(scenes / "far.tif", image_of("other", (30, 40)), west=640_000, north=5_040_000, names=("x", "y"))
    fourth = go(spark, model, scenes, out)
    assert (fourth["done"], fourth["skipped"]) == (1, first["done"] - 1)
    changed = {name for name, digest in maps_of(out).items() if whole_[name] != digest}
    assert {name.split("/")[0] for name in changed} <= {far.name, "overview.png", "collection.json"}
    with pytest.raises(UsageError, match="other settings"):
        go(spark, model, scenes, out, block=80)


def test_the_newest_of_scenes_without_a_time_is_not_guessed(spark: Any, model: str, tmp_path: Path) -> None:
    scenes, out = write_archive(tmp_path / "scenes", ("a", "b")), tmp_path / "out"
    with pytest.raises(TooManyRefused, match="2 of 2 scenes were refused"):
        go(spark, model, scenes, out, rule="newest")
    assert {one.reason.partition(";")[0] for one in read_quarantine(str(out))} == {
        "states no time of acquisition, and --rule newest goes by it"
    }
    with rasterio.open(scenes / "b.tif", "r+") as file:
        file.update_tags(TIFFTAG_DATETIME="2020:05:06 07:08:09")
    record = go(spark, model, scenes, out, rule="newest", max_failed_fraction=0.5)
    assert (record["done"] > 0, record["quarantined"]) == (True, 1)
    for path in out.glob("*/item.json"):
        properties = json.loads(path.read_text())["properties"]
        assert properties["datetime"] == "2020-05-06T07:08:09Z"
        assert "sattile:datetime_missing" not in properties


def test_a_scene_that_cannot_be_read_is_left_out_everywhere(
    spark: Any, model: str, archive: Path, tmp_path: Path
) -> None:
    scenes, out = write_archive(tmp_path / "scenes", tiled=True, blockxsize=16, blockysize=16), tmp_path / "out"
    profile = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", "names": ("x", "y")}
    broken = write_scene(scenes / "broken.tif", image_of("q", (200, 60)), west=600_100, north=5_000_100, **profile)
    data = bytearray(Path(broken).read_bytes())
    middle = len(data) * 7 // 10
    data[middle : middle + 100] = bytes(100)  # some of its tiles, so that other blocks read it well
    Path(broken).write_bytes(data)
    with pytest.raises(TooManyRefused):
        go(spark, model, scenes, out)
    quarantine = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert [row["url"].rpartition("/")[2] for row in quarantine] == ["broken.tif"]
    plain = go(spark, model, write_archive(tmp_path / "plain"), tmp_path / "plain_out")
    assert plain["done"]
    for item in (tmp_path / "plain_out").glob("*/item.json"):
        name = item.parent.name
        with rasterio.open(out / name / "labels.tif") as one, rasterio.open(item.parent / "labels.tif") as other:
            window = one.window(*other.bounds)
            np.testing.assert_array_equal(one.read(1, window=window), other.read(1))
            assert (one.read(1) != 255).sum() == (other.read(1) != 255).sum()
        stated = json.loads((out / name / "item.json").read_text())["properties"]["sattile:refused"]
        assert list(stated) == ["broken"]
    # The next night knows it, and computes nothing.
    again = maps_of(out)
    with pytest.raises(TooManyRefused):
        go(spark, model, scenes, out)
    assert record_of(out)["done"] == 0
    assert maps_of(out) == again


def damaged(path: Path, west: float, north: float, height: int, *, last_rows: int) -> None:
    """A scene whose last rows can't be read."""
    profile = {"tiled": True, "blockxsize": 16, "blockysize": 16, "compress": "deflate", "names": ("x", "y")}
    write_scene(path, image_of("q", (height, 60)), west=west, north=north, interleave="pixel", **profile)
    with rasterio.open(path) as file:
        tile = json.loads(json.dumps(file.tags(1, ns="TIFF")))  # touches the file: it is whole until now
        assert tile is not None
        offsets = [
            int(file.get_tag_item(f"BLOCK_OFFSET_0_{row}", "TIFF", bidx=1))
            for row in range((height - last_rows) // 16, height // 16)
        ]
    data = bytearray(path.read_bytes())
    for offset in offsets:
        data[offset : offset + 20] = bytes(20)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "north", [4_997_000, 5_122_000]
)  # sheets r-977, r-976; r-1001, r-1000: the other order by name
def test_what_a_scene_gave_before_it_was_refused_goes(
    spark: Any, model: str, tmp_path: Path, north: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sheets, "WAVE_PIXELS", 1)
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    top = -(-north // 5120) * 5120 - 5120 + 600  # 60 rows above the border between two sheets
    damaged(scenes / "x.tif", 600_000, top, 160, last_rows=32)
    options = {"grid": "EPSG:32632@10", "max_failed_fraction": 1.0, "vectors": "water"}
    go(spark, model, scenes, out, **options)
    assert not list(out.glob("*/item.json"))
    # Beside a good scene that reaches both sheets, each is as if the damaged one were not there.
    write_scene(scenes / "good.tif", image_of("g", (160, 70)), west=600_100, north=top, names=("x", "y"), nodata=0)
    plan = sheets.waves_of
    stopped = False

    def stop_early(todo: Sequence[sheets.Sheet]) -> list[list[sheets.Sheet]]:
        nonlocal stopped
        waves = plan(todo)
        if any(sheet.refused for sheet in todo) and not stopped:  # in the redo: only its last sheet is done
            stopped = True
            return waves[-1:]
        return waves

    monkeypatch.setattr(sheets, "waves_of", stop_early)
    go(spark, model, scenes, out, **options)
    monkeypatch.setattr(sheets, "waves_of", plan)
    go(spark, model, scenes, out, **options)
    go(spark, model, scenes, tmp_path / "clean", **options)
    assert len(list(out.glob("*/item.json"))) == 2
    assert maps_of(out) == maps_of(tmp_path / "clean")
    for item in out.glob("*/item.json"):
        assert list(json.loads(item.read_text())["properties"]["sattile:refused"]) == ["x"]


def test_what_is_over_all_sheets_goes_with_what_it_shows(spark: Any, model: str, archive: Path, tmp_path: Path) -> None:
    scenes, out = write_archive(tmp_path / "scenes"), tmp_path / "out"
    go(spark, model, scenes, out, vectors="all")
    assert (out / "scores.vrt").exists()
    (scenes / "b.tif").unlink()
    go(spark, model, scenes, out)
    assert not (out / "vectors.parquet").exists()
    go(spark, model, scenes, out, scores=False, coverage=False, overwrite=True)
    assert sorted(path.name for path in out.glob("*.vrt")) == ["labels.vrt"]
    # Axes are x and y whatever a CRS calls them: a mapping would be taken at its word by GDAL.
    assert "dataAxisToSRSAxisMapping" not in (out / "labels.vrt").read_text()


def test_what_is_over_all_sheets_goes_with_the_last_of_them(spark: Any, model: str, tmp_path: Path) -> None:
    """With a scene that can't be read any more, and with maps of scenes instead."""
    scenes, out = tmp_path / "scenes", tmp_path / "out"
    write_scene(scenes / "x.tif", image_of("q", (160, 60)), names=("x", "y"), nodata=0)
    whole = {"labels.vrt", "overview.png", "vectors.parquet"}
    wish: dict[str, Any] = {"grid": "EPSG:32632@10", "vectors": "all", "max_failed_fraction": 1.0}
    go(spark, model, scenes, out, **wish)
    assert whole <= {path.name for path in out.iterdir()}
    kept = (scenes / "x.tif").read_bytes()
    damaged(scenes / "x.tif", 600_000, 5_000_000, 160, last_rows=32)
    assert go(spark, model, scenes, out, **wish)["polygons"] == 0
    assert sorted(path.name for path in out.iterdir()) == ["_quarantine.parquet", "_run.json", "collection.json"]

    (scenes / "x.tif").write_bytes(kept)
    go(spark, model, scenes, out, **wish)
    assert whole <= {path.name for path in out.iterdir()}
    predict(spark, model=model, scenes=[str(scenes)], out=str(out), overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["_run.json", "collection.json", "x"]


def test_a_resolution_that_cannot_be_meant_is_refused_before_anything_runs(
    spark: Any, model: str, archive: Path, tmp_path: Path
) -> None:
    for dry_run in (True, False):
        with pytest.raises(UsageError, match=r"finer than the scene's.*EPSG:32632@10"):
            go(spark, model, archive, tmp_path / "out", grid="EPSG:32632@0.0001", dry_run=dry_run)


def test_scenes_without_a_crs_or_off_the_grid_are_told(spark: Any, model: str, tmp_path: Path) -> None:
    scenes = write_archive(tmp_path / "scenes")
    write_scene(scenes / "nowhere.tif", image_of("n", (20, 30)), crs=None, transform=from_origin(5, 7, 1, 1))
    like = write_scene(tmp_path / "like.tif", np.zeros((1, 90, 130), np.uint8), west=600_100, north=4_999_900)
    out = tmp_path / "out"
    options = {"grid": None, "like": like, "bands": "x,y", "max_failed_fraction": 0.5}
    record = go(spark, model, scenes, out, **options)
    assert record["done"] == 1
    [refused] = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert "no CRS, so it cannot be laid on a grid" in refused["reason"]
    with rasterio.open(out / "r0_c0" / "labels.tif") as file, rasterio.open(like) as wanted:
        assert (file.shape, file.transform) == (wanted.shape, wanted.transform)


def test_a_dry_run_tells_the_plan_and_writes_nothing(
    spark: Any, model: str, archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict(spark, model=model, scenes=[str(archive)], out=str(tmp_path / "out"), dry_run=True, **OPTIONS)
    said = capsys.readouterr().out
    for word in ("sheets", "blocks", "evaluated", "memory", "scenes in one"):
        assert word in said
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="--grid or --like"):
        predict(spark, model=model, scenes=[str(archive)], out=str(tmp_path / "out"), rule="newest")
    assert list(itertools.chain(tmp_path.iterdir())) == []


def test_a_scene_with_no_way_onto_the_grid_costs_that_scene(spark: Any, model: str, tmp_path: Path) -> None:
    """A drawing's CRS lies nowhere on Earth."""
    scenes, out = write_archive(tmp_path / "scenes", ["a", "b"]), tmp_path / "out"
    drawing = 'LOCAL_CS["drawing",UNIT["metre",1]]'
    write_scene(scenes / "drawn.tif", image_of("q", (70, 60)), names=("x", "y"), crs=drawing)
    with pytest.raises(TooManyRefused, match=r"1 of 3 scenes were refused.*drawn\.tif: there is no way from CRS"):
        go(spark, model, scenes, out)
    assert record_of(out)["done"]
    (row,) = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert row["url"] == str(scenes / "drawn.tif")


@pytest.mark.parametrize("way", ["together", "apart", "by scene"])
def test_a_scene_that_the_network_fails_on_costs_that_scene(
    tmp_path: Path, network: Any, as_in_production: None, way: str
) -> None:
    folder = write_archive(tmp_path, ["a", "b"])
    hot = np.full((2, 150, 60), 60_000, np.uint16)
    write_scene(folder / "hot.tif", hot, west=600_100, north=5_000_000, names=("x", "y"))
    scenes, job, layout = scenes_of(folder), job_of(), layout_of(SAME)

    def fails(images: np.ndarray) -> np.ndarray:
        if images.max() > 50_000:
            raise FloatingPointError("overflow")
        return images

    network(fails)
    by_id = {scene.scene_id: scene for scene in scenes}
    if way == "by scene":
        pieces = [
            inference.Piece(scene, block)
            for scene in scenes
            for block in job.geometry.blocks(scene.height, scene.width, 48)
        ]
        done = list(inference.label_blocks(pieces, job))
        told = [(one.piece.scene.scene_id, one.reason) for one in done if one.reason]
        assert sum(one.labels is not None for one in done) == sum(one.scene.scene_id != "hot" for one in pieces)
    else:
        planned, *_ = sheets.plan_sheets(scenes, layout)
        tasks = [[work for sheet in planned for work in sheet.works]]
        windows = {"windows": sent({sheet.target.name: sheet.window for sheet in planned})}
        work, extra = (sheets.stitch, windows) if way == "together" else (sheets.infer, {})
        frames = [pd.DataFrame({"id": [0]})]
        rows = joined(list(work(frames, tasks=sent(tasks), scenes=sent(by_id), job=job, layout=layout, **extra)))
        if way == "together":
            told = [one for text in rows["reason"].dropna() for one in sheets.refusals(text).items()]
        else:
            told = list(rows[["scene", "reason"]].dropna().itertuples(index=False, name=None))
    ((scene_id, reason),) = told  # once: its further blocks are left out
    assert scene_id == "hot"
    assert reason.startswith("unexpected FloatingPointError: overflow (")
