"""Laws of reading. Files made here hold pixels that say where they are: 1000 * row + col, plus 7 a band."""

from __future__ import annotations

import math
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path, PurePosixPath

import numpy as np
import pyproj
import pytest
import rasterio
import shapely
from affine import Affine
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning

from sattile import labels as label_module
from sattile import raster, storage
from sattile.errors import Outage, Refused
from sattile.grid import Window
from sattile.labels import LabelSource
from sattile.schema import IGNORE, Band, Scene
from sattile.storage import hdfs
from sattile.storage.elsewhere import Elsewhere
from sattile.storage.files import Entry, LocalFiles

UTM = Affine(10, 0, 500_000, 0, -10, 5_000_000)

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(autouse=True)
def _closed_files():
    yield
    raster.close_files()


def positions(height: int, width: int, bands: int = 1) -> np.ndarray:
    rows, cols = np.mgrid[:height, :width]
    return np.stack([1000 * rows + cols + 7 * band for band in range(bands)], axis=-1)


def write(path: Path, data: np.ndarray, *, crs="EPSG:32618", transform=UTM, mask=None, alpha=False, **profile) -> str:
    """(height, width, bands) as a GeoTIFF."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            PurePosixPath(path), "w", driver="GTiff", height=data.shape[0], width=data.shape[1], count=data.shape[2],
            dtype=data.dtype, crs=crs, transform=transform, **profile,
        ) as out:  # fmt: skip
            if alpha:
                out.colorinterp = [ColorInterp.gray] * (data.shape[2] - 1) + [ColorInterp.alpha]
            out.write(np.moveaxis(data, 2, 0))
            if mask is not None:
                out.write_mask(mask)
    return str(path)


def scene_of(*urls: str, names: tuple[str, ...] = ()) -> Scene:
    """A scene of files, on the grid of the finest."""
    infos = [raster.describe_file(url) for url in urls]
    finest = min(infos, key=lambda info: abs(info.transform[0]))
    bands = [band for info in infos for band in info.bands]
    named = tuple(replace(band, name=f"b{at}") for at, band in enumerate(bands, 1))
    return Scene(
        "s", urls[0], finest.height, finest.width, named, finest.crs, finest.transform, finest.gsd, finest.datetime,
        finest.footprint, {url: one for info in infos for url, one in info.identity.items()},
    )  # fmt: skip


def read_labels(url: str, scene: Scene, window: Window) -> np.ndarray:
    """As the commands read a raster whose values are ids."""
    return label_module.read(LabelSource(url), scene, window)[0]


def whole(scene: Scene) -> Window:
    return Window(0, 0, scene.height, scene.width)


@st.composite
def windows(draw, height: int, width: int) -> Window:
    row, col = draw(st.integers(-9, height + 3)), draw(st.integers(-9, width + 3))
    return Window(row, col, draw(st.integers(1, height + 9)), draw(st.integers(1, width + 9)))


def assert_is_part(scene: Scene, window: Window, everything: tuple[np.ndarray, np.ndarray], **options) -> None:
    """A read of a window is that part of the whole, to the bit, and 0 and invalid outside."""
    data, valid = raster.read(scene, window, **options)
    expected = np.zeros((*window.shape, len(scene.bands)), data.dtype)
    expected_valid = np.zeros(window.shape, bool)
    inside = window & whole(scene)
    expected[inside.slices(window)] = everything[0][inside.slices()]
    expected_valid[inside.slices(window)] = everything[1][inside.slices()]
    assert data.shape == expected.shape
    assert np.array_equal(data, expected, equal_nan=data.dtype.kind == "f")
    assert np.array_equal(valid, expected_valid)
    lying, lying_valid = raster.read(scene, window, by_band=True, **options)
    assert np.moveaxis(lying, -1, 0).flags.c_contiguous
    assert lying.dtype == data.dtype
    assert np.array_equal(lying, data, equal_nan=data.dtype.kind == "f")
    assert np.array_equal(lying_valid, valid)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("interleave", ["band", "pixel"])
@pytest.mark.parametrize("tiled", [True, False])
@quick
@given(window=windows(37, 53))
def test_windows_hold_the_pixels_of_their_place(tmp_path, interleave, tiled, window):
    url = str(tmp_path / "a.tif")
    if not os.path.exists(url):
        shape = {"blockxsize": 16, "blockysize": 16} if tiled else {}
        write(url, positions(37, 53, 3).astype("uint16"), interleave=interleave, tiled=tiled, compress="lzw", **shape)
    scene = scene_of(url)
    assert_is_part(scene, window, (positions(37, 53, 3), np.ones((37, 53), bool)))


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64", "float32", "float64"]
)
def test_every_type_keeps_its_values(tmp_path, dtype):
    limits = np.iinfo(dtype) if np.dtype(dtype).kind in "iu" else np.finfo(dtype)
    values = np.array([limits.min, 0, 1, 2, 3, limits.max], dtype).reshape(2, 3, 1)
    scene = scene_of(write(tmp_path / "a.tif", values))
    data, valid = raster.read(scene, whole(scene))
    assert data.dtype == dtype
    assert np.array_equal(data, values)
    with np.errstate(over="ignore"):
        assert np.array_equal(valid, np.isfinite(values[..., 0].astype(np.float32)))  # 0 is a value
    assert valid.all() == (dtype != "float64")  # whose limits no network sees


def test_bands_come_in_the_order_asked_for(tmp_path):
    scene = scene_of(write(tmp_path / "a.tif", positions(5, 9, 4).astype("uint16"))).select(["b3", "b1", "b3"])
    data, _ = raster.read(scene, whole(scene))
    assert np.array_equal(data, positions(5, 9, 4)[..., [2, 0, 2]])


def test_bands_of_several_files_share_a_type_that_holds_all(tmp_path):
    one = write(tmp_path / "a.tif", np.full((3, 5, 1), 65535, "uint16"))
    two = write(tmp_path / "b.tif", np.full((3, 5, 1), -7, "int16"))
    scene = scene_of(one, two)
    data, valid = raster.read(scene, whole(scene))
    assert data.dtype == np.int32
    assert (data == [65535, -7]).all()
    assert valid.all()


def test_scaled_values_are_physical_and_need_a_scale(tmp_path):
    url = write(tmp_path / "a.tif", positions(4, 6, 2).astype("uint16"))
    with pytest.raises(Refused, match="b1 states no scale"):
        raster.read(scene_of(url), Window(0, 0, 4, 6), scaled=True)
    with rasterio.open(url, "r+") as out:
        out.scales, out.offsets = (0.0001, 0.0001), (-0.1, -0.1)
    scene = scene_of(url)
    assert [(band.scale, band.offset) for band in scene.bands] == [(0.0001, -0.1)] * 2
    data, valid = raster.read(scene, Window(-1, -1, 6, 8), scaled=True)
    assert data.dtype == np.float32
    assert np.allclose(data[1:5, 1:7], positions(4, 6, 2) * 0.0001 - 0.1, rtol=1e-6)
    assert not data[~valid].any()
    stored, _ = raster.read(scene, whole(scene))
    assert np.array_equal(stored, positions(4, 6, 2))


# ---------------------------------------------------------------- what is valid


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("nodata", [0, 3, 255, -9999, 2.5, math.nan, -3.4e38])
def test_declared_nodata_is_gdals(tmp_path, dtype, nodata):
    values = np.array([[0, 3, 2], [1, 100, 127]], "float64")
    if np.dtype(dtype).kind == "f":
        values[1] = [nodata, np.inf, 2.5]
    values = values.astype(dtype)[..., None]
    url = write(tmp_path / "a.tif", values)
    with rasterio.open(url, "r+") as out:
        out.nodata = nodata
    with rasterio.open(url) as source:
        expected = (source.read_masks(1) != 0) & np.isfinite(source.read(1))
    scene = scene_of(url)
    data, valid = raster.read(scene, whole(scene))
    assert np.array_equal(valid, expected)
    assert np.array_equal(data, values, equal_nan=np.dtype(dtype).kind == "f")


def test_without_nodata_zero_is_a_value_and_nan_is_none(tmp_path):
    values = np.array([[0, np.nan], [np.inf, -np.inf], [5, 6]], "float32")[..., None]
    scene = scene_of(write(tmp_path / "a.tif", values))
    _, valid = raster.read(scene, whole(scene))
    assert valid.tolist() == [[True, False], [False, False], [True, True]]


def test_one_invalid_band_is_enough_and_only_bands_in_use_count(tmp_path):
    values = positions(3, 4, 3).astype("int16") + 1
    values[0, 1, 0] = values[2, 3, 2] = -1
    scene = scene_of(write(tmp_path / "a.tif", values, nodata=-1))
    _, valid = raster.read(scene, whole(scene))
    assert np.argwhere(~valid).tolist() == [[0, 1], [2, 3]]
    _, valid = raster.read(scene.select(["b2", "b3"]), whole(scene))
    assert np.argwhere(~valid).tolist() == [[2, 3]]


def test_nodata_of_a_band(tmp_path):
    """A VRT can differ by band; a GeoTIFF by its .aux.xml."""
    url = write(tmp_path / "a.tif", np.array([[[1, 2], [2, 1]]], "uint8"))
    (tmp_path / "a.tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>1</NoDataValue></PAMRasterBand>'
        '<PAMRasterBand band="2"><NoDataValue>9</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    scene = scene_of(url)
    assert [band.nodata for band in scene.bands] == [1, 9]
    _, valid = raster.read(scene, whole(scene))
    assert valid.tolist() == [[False, True]]


@pytest.mark.parametrize("inside", ["YES", "NO"])
def test_a_mask_goes_before_nodata(tmp_path, inside):
    mask = np.array([[255, 0, 255], [0, 255, 255]], "uint8")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
        url = write(tmp_path / "a.tif", np.zeros((2, 3, 2), "uint8"), nodata=0, mask=mask)
    assert os.path.exists(url + ".msk") == (inside == "NO")
    scene = scene_of(url)
    _, valid = raster.read(scene, whole(scene))
    assert np.array_equal(valid, mask > 0)


def test_another_mask_beside_a_file_is_another_scene(tmp_path):
    """And is what is read from then on, though the file itself is as it was, and still open."""
    url = str(tmp_path / "a.tif")
    identities = []
    for seed in (1, 2, None):
        mask = None if seed is None else np.random.default_rng(seed).choice([0, 255], (6, 10)).astype("uint8")
        (tmp_path / "masked").mkdir(exist_ok=True)
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"):
            write(tmp_path / "masked" / "a.tif", np.ones((6, 10, 2), "uint8"), mask=mask)
        if not os.path.exists(url):
            shutil.copy(tmp_path / "masked" / "a.tif", url)
        if mask is None:
            os.remove(f"{url}.msk")
        else:
            shutil.copy(tmp_path / "masked" / "a.tif.msk", f"{url}.msk")
        scene = scene_of(url)
        _, valid = raster.read(scene, whole(scene))
        assert np.array_equal(valid, np.ones((6, 10), bool) if mask is None else mask > 0)
        identities.append(scene.identity)
    assert [set(one) for one in identities] == [{url, f"{url}.msk"}, {url, f"{url}.msk"}, {url}]
    assert identities[0] != identities[1]
    assert identities[0][url] == identities[2][url]


def test_a_mask_that_can_not_be_read_is_told(tmp_path):
    """GDAL passes over it, and what is masked would be ground."""
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="NO"):
        url = write(tmp_path / "a.tif", np.ones((60, 90, 2), "uint8"), nodata=0, mask=np.zeros((60, 90), "uint8"))
    mask = tmp_path / "a.tif.msk"
    for content in (mask.read_bytes()[:100], b"II*\0" + bytes(40)):
        mask.write_bytes(content)
        assert "mask beside it (a.tif.msk) can't be read" in refused(url)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.tif")
    assert refused(str(tmp_path / "a.tif")).startswith("cannot be opened: a.tif: it is no file, but a pipe")


def test_alpha_is_no_band_but_says_what_is_valid(tmp_path):
    values = positions(3, 5, 3).astype("uint16")
    values[..., 2] = 65535
    values[1, 2, 2] = 0
    values[2, 4, 2] = 1  # nearly transparent is still there
    scene = scene_of(write(tmp_path / "a.tif", values, alpha=True))
    assert [band.index for band in scene.bands] == [1, 2]
    data, valid = raster.read(scene, whole(scene))
    assert data.shape == (3, 5, 2)
    assert np.argwhere(~valid).tolist() == [[1, 2]]


def test_nodata_of_the_user_goes_before_all(tmp_path):
    mask = np.array([[0, 255, 255]], "uint8")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK="YES"):
        url = write(tmp_path / "a.tif", np.array([[[1], [2], [3]]], "uint8"), nodata=2, mask=mask)
    scene = scene_of(url)
    assert raster.read(scene, whole(scene))[1].tolist() == [[False, True, True]]
    assert raster.read(scene, whole(scene), nodata=3)[1].tolist() == [[True, True, False]]
    assert raster.read(scene, whole(scene), nodata=-9999)[1].tolist() == [[True, True, True]]
    assert raster.read(scene, whole(scene), nodata=math.nan)[1].tolist() == [[True, True, True]]
    forced = replace(scene, bands=tuple(replace(band, nodata=3.0, forced=True) for band in scene.bands))
    assert raster.read(forced, whole(scene))[1].tolist() == [[True, True, False]]


def test_nodata_that_a_stac_item_states_counts_where_the_file_states_none(tmp_path):
    said = {"nodata": 1.0}
    plain = scene_of(write(tmp_path / "a.tif", np.array([[[1], [2]]], "uint8")))
    said_of_plain = replace(plain, bands=tuple(replace(band, **said) for band in plain.bands))
    assert raster.read(said_of_plain, whole(plain))[1].tolist() == [[False, True]]


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("ratio", [2, 3, 6])
@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@quick
@given(window=windows(24, 36), seed=st.integers(0, 3))
def test_coarse_bands_come_in_windows_as_in_the_whole(tmp_path, ratio, dtype, window, seed):
    """With nodata, to the bit, whatever the window."""
    fine, coarse = str(tmp_path / "fine.tif"), str(tmp_path / f"coarse{seed}.tif")
    if not os.path.exists(fine):
        write(fine, positions(24, 36).astype(dtype))
    if not os.path.exists(coarse):
        rng = np.random.default_rng(seed)
        values = rng.uniform(1, 60_000, (24 // ratio, 36 // ratio, 2)).astype(dtype)
        values[rng.random(values.shape) < 0.2 * (seed > 0)] = 0
        write(coarse, values, transform=UTM @ Affine.scale(ratio), nodata=0)
    scene = scene_of(fine, coarse)
    everything = raster.read(scene, whole(scene))
    assert np.array_equal(everything[0][..., 0], positions(24, 36)[..., 0].astype(dtype))
    assert_is_part(scene, window, everything)


def slow_bilinear(values: np.ndarray, good: np.ndarray, row: float, col: float) -> float | None:
    """Value at (row, col), in pixels with centres at .5; None where the pixel that holds the point is invalid."""
    if not good[math.floor(row), math.floor(col)]:
        return None
    total = weights = 0.0
    for r in (math.floor(row - 0.5), math.floor(row - 0.5) + 1):
        for c in (math.floor(col - 0.5), math.floor(col - 0.5) + 1):
            weight = (1 - abs(row - 0.5 - r)) * (1 - abs(col - 0.5 - c))
            r_in, c_in = min(max(r, 0), values.shape[0] - 1), min(max(c, 0), values.shape[1] - 1)
            if good[r_in, c_in]:
                total, weights = total + weight * values[r_in, c_in], weights + weight
    return total / weights


@pytest.mark.parametrize(("ratio", "moved"), [(2, 0.0), (3, 0.0), (2, 0.25), (1, 0.5), (2.5, 0.1)])
def test_bilinear_equals_a_slow_reference(tmp_path, ratio, moved):
    rng = np.random.default_rng(1)
    values = rng.uniform(1, 100, (9, 7, 1)).astype("float64")
    good = rng.random((9, 7)) > 0.25
    values[~good] = -1
    height, width = 18, 15
    fine = write(tmp_path / "fine.tif", positions(height, width).astype("float64"))
    coarse = write(
        tmp_path / "coarse.tif", values, nodata=-1, transform=UTM @ Affine.scale(ratio) @ Affine.translation(-moved, 0)
    )
    scene = replace(scene_of(fine, coarse), height=height, width=width, transform=tuple(UTM)[:6])
    scene = replace(scene, bands=(*scene_of(fine).bands, replace(scene_of(coarse).bands[0], name="c")))
    data, valid = raster.read(scene, whole(scene))
    for row in range(height):
        for col in range(width):
            at_row, at_col = (row + 0.5) / ratio, (col + 0.5) / ratio + moved
            expected = slow_bilinear(values[..., 0], good, at_row, at_col) if at_row < 9 and at_col < 7 else None
            assert valid[row, col] == (expected is not None)
            if expected is not None:
                assert data[row, col, 1] == pytest.approx(expected, rel=1e-9)


def test_beyond_a_coarse_file_there_is_nothing(tmp_path):
    fine = write(tmp_path / "fine.tif", positions(16, 20).astype("uint16"))
    inner = UTM @ Affine.translation(4, 6) @ Affine.scale(2)
    coarse = write(tmp_path / "coarse.tif", np.full((3, 5, 1), 9, "uint16"), transform=inner)
    data, valid = raster.read(scene_of(fine, coarse), Window(0, 0, 16, 20))
    expected = np.zeros((16, 20), bool)
    expected[6:12, 4:14] = True
    assert np.array_equal(valid, expected)
    assert np.array_equal(data[..., 1], expected * 9)


def test_a_constant_band_stays_exactly_constant_beside_nodata(tmp_path):
    rng = np.random.default_rng(0)
    values = np.where(rng.random((8, 6, 1)) < 0.3, 0, 4095).astype("uint16")
    fine = write(tmp_path / "fine.tif", positions(24, 18).astype("uint16"))
    coarse = write(tmp_path / "coarse.tif", values, transform=UTM @ Affine.scale(3), nodata=0)
    data, valid = raster.read(scene_of(fine, coarse), Window(0, 0, 24, 18))
    assert np.array_equal(valid, np.kron(values[..., 0] > 0, np.ones((3, 3), bool)))
    assert (data[..., 1][valid] == 4095).all()


@pytest.mark.parametrize(
    ("transform", "what"),
    [
        (Affine(10, 0, 500_000, 0, 10, 4_999_000), "south-up"),
        (UTM @ Affine.rotation(30), "rotated"),
        (Affine(10, 0, 500_000, 0, -25, 5_000_000), "non-square"),
    ],
)
def test_odd_grids_are_read_as_stored(tmp_path, transform, what):
    scene = scene_of(write(tmp_path / "a.tif", positions(9, 14).astype("uint16"), transform=transform))
    data, valid = raster.read(scene, whole(scene))
    assert np.array_equal(data, positions(9, 14)), what
    assert valid.all()
    assert scene.transform == pytest.approx(tuple(transform)[:6])
    assert scene.gsd == pytest.approx(math.sqrt(250) if what == "non-square" else 10)
    assert shapely.from_wkb(scene.footprint).is_valid


def test_turned_and_flipped_band_files_are_refused(tmp_path):
    one = write(tmp_path / "a.tif", positions(9, 14).astype("uint16"))
    scene = scene_of(one)
    for name, transform in (
        ("turned", UTM @ Affine.rotation(5)),
        ("flipped", Affine(20, 0, 500_000, 0, 20, 4_999_910)),
    ):
        other = write(tmp_path / f"{name}.tif", positions(9, 14).astype("uint16"), transform=transform)
        with pytest.raises(Refused, match=name):
            raster.read(replace(scene, bands=raster.describe_file(other).bands), whole(scene))


def test_without_a_crs_a_file_is_its_own_grid(tmp_path):
    info = raster.describe_file(write(tmp_path / "a.tif", positions(4, 6).astype("uint16"), crs=None, transform=None))
    assert (info.crs, info.gsd, info.footprint) == (None, None, None)
    assert info.transform == (1, 0, 0, 0, 1, 0)


def test_one_pixel(tmp_path):
    scene = scene_of(write(tmp_path / "a.tif", np.full((1, 1, 1), 7, "uint8")))
    assert_is_part(scene, Window(-2, -3, 5, 9), (np.full((1, 1, 1), 7), np.ones((1, 1), bool)))


def test_a_sparse_file_is_read(tmp_path):
    url = str(tmp_path / "a.tif")
    with rasterio.open(url, "w", driver="GTiff", height=5000, width=7000, count=1, dtype="uint8", tiled=True,
                       crs="EPSG:32618", transform=UTM, sparse_ok=True, nodata=0):  # fmt: skip
        pass
    scene = scene_of(url)
    data, valid = raster.read(scene, Window(4000, 6500, 300, 700))
    assert not data.any()
    assert not valid.any()


@pytest.mark.parametrize(
    "name",
    ["a b, c.tif", "a#1.tif", "a%20b.tif", "a?b.tif", "a:b.tif", "é 日本.tif", "[1].tif", "&;'\"!.tif", "x.TIFF"],
)
def test_odd_names(tmp_path, name):
    (tmp_path / "dir #1, ü").mkdir()
    scene = scene_of(write(tmp_path / "dir #1, ü" / name, positions(3, 5).astype("uint16")))
    assert np.array_equal(raster.read(scene, whole(scene))[0], positions(3, 5))


# ---------------------------------------------------------------- the header


def test_bands_and_times(tmp_path):
    url = write(tmp_path / "a.tif", positions(3, 5, 2).astype("uint16"))
    with rasterio.open(url, "r+") as out:
        out.descriptions = ("B02", None)
        out.update_tags(TIFFTAG_DATETIME="2021:05:17 10:11:12")
    info = raster.describe_file(url)
    assert info.bands == (Band("B02", url, 1, "uint16"), Band("", url, 2, "uint16"))
    assert info.datetime == "2021-05-17T10:11:12Z"
    assert info.crs == "EPSG:32618"
    assert info.identity == {url: [os.stat(url).st_size, os.stat(url).st_mtime_ns]}
    with rasterio.open(url, "r+") as out:
        out.update_tags(ns="IMAGERY", ACQUISITIONDATETIME="2020-01-02T03:04:05+02:00")
    assert raster.describe_file(url).datetime == "2020-01-02T01:04:05Z"


@pytest.mark.parametrize("text", ["", None, "yesterday", "2021:13:40 99:99:99", "0000:00:00 00:00:00"])
def test_no_time_is_none(text):
    assert raster.iso_datetime(text) is None


# ---------------------------------------------------------------- refused


def refused(url) -> str:
    with pytest.raises(Refused) as caught:
        raster.describe_file(str(url))
    return caught.value.reason


def test_what_is_no_image_is_refused(tmp_path):
    for name, content in (("empty.tif", b""), ("text.tif", b"hello"), ("page.tif", b"<html>not found</html>")):
        (tmp_path / name).write_bytes(content)
    assert "empty" in refused(tmp_path / "empty.tif")
    assert "neither GeoTIFF" in refused(tmp_path / "text.tif")
    assert "neither GeoTIFF" in refused(tmp_path / "page.tif")
    assert "gone" in refused(tmp_path / "nowhere.tif")


def test_a_vrt_is_refused_whatever_it_is_called(tmp_path):
    inner = write(tmp_path / "a.tif", positions(3, 5).astype("uint16"))
    text = (
        f'<VRTDataset rasterXSize="5" rasterYSize="3"><VRTRasterBand dataType="UInt16" band="1"><SimpleSource>'
        f"<SourceFilename>{inner}</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>"
    )
    for name in ("b.vrt", "b.tif"):
        (tmp_path / name).write_text(text)
        assert "neither GeoTIFF" in refused(tmp_path / name)
    (tmp_path / "a.tif.msk").write_text(text)
    assert "mask beside it" in refused(inner)


def test_complex_numbers_are_refused(tmp_path):
    reason = refused(write(tmp_path / "a.tif", np.ones((3, 5, 1), "complex64")))
    assert "complex" in reason
    assert "amplitude" in reason


def test_a_position_by_control_points_is_refused_with_the_way_out(tmp_path):
    from rasterio.control import GroundControlPoint

    url = write(tmp_path / "a.tif", positions(30, 50).astype("uint16"), crs=None, transform=None)
    points = [GroundControlPoint(r, c, 10 + c / 100, 50 - r / 100) for r, c in ((0, 0), (0, 50), (30, 0), (30, 50))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(url, "r+") as out:
            out.gcps = (points, "EPSG:4326")
    reason = refused(url)
    assert "4 ground control points" in reason
    assert "gdalwarp" in reason


def test_pieces_that_take_the_memory_are_refused(tmp_path, monkeypatch):
    url = write(tmp_path / "a.tif", positions(64, 64, 2).astype("uint16"), blockysize=64, compress="deflate")
    monkeypatch.setattr(raster, "MAX_BLOCK_BYTES", 64 * 64 * 2 - 1)
    assert "gdal_translate -of COG" in refused(url)


def test_damaged_pixels_are_refused_when_read(tmp_path):
    url = write(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 9999, (300, 200, 2)).astype("uint16"),
                compress="deflate")  # fmt: skip
    with open(url, "r+b") as file:
        file.truncate(os.path.getsize(url) // 2)
    try:
        scene = scene_of(url)
    except Refused:
        return
    with pytest.raises(Refused) as caught:
        raster.read(scene, whole(scene))
    assert "cannot be read" in caught.value.reason
    assert "See previous" not in caught.value.reason


def test_a_damaged_file_leaves_the_next_ones_alone(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 9999, (300, 200, 1)).astype("uint16")
    bad = write(tmp_path / "bad.tif", pixels, compress="deflate", tiled=True, blockxsize=64, blockysize=64)
    labels = write(tmp_path / "labels.tif", (pixels % 2).astype("uint8"))
    damaged, scene = scene_of(bad), scene_of(write(tmp_path / "good.tif", pixels))
    raster.close_files()
    with open(bad, "r+b") as file:
        file.truncate(os.path.getsize(bad) - 2000)
    damaged = replace(damaged, identity={})
    expected = read_labels(labels, scene, whole(scene))
    with pytest.raises(Refused, match="cannot be read"):
        raster.read(damaged, whole(damaged))
    assert np.array_equal(read_labels(labels, scene, whole(scene)), expected)


def test_a_file_that_changed_or_went_is_refused(tmp_path):
    url = write(tmp_path / "a.tif", positions(3, 5).astype("uint16"))
    scene = scene_of(url)
    raster.read(scene, whole(scene))
    write(tmp_path / "a.tif", positions(4, 6).astype("uint16"))
    with pytest.raises(Refused, match="changed"):
        raster.read(scene, whole(scene))
    os.remove(url)
    with pytest.raises(Refused, match="gone"):
        raster.read(scene, whole(scene))


def test_few_files_stay_open(tmp_path):
    urls = [write(tmp_path / f"{at}.tif", np.full((2, 3, 1), at, "uint8")) for at in range(raster.OPEN_FILES + 5)]
    for _ in range(2):
        for at, url in enumerate(urls):
            assert (raster.read(scene_of(url), Window(0, 0, 2, 3))[0] == at).all()
    assert len(raster._files._open) == raster.OPEN_FILES


# ---------------------------------------------------------------- labels


def small_scene(tmp_path, height=40, width=60, transform=UTM, crs="EPSG:32618") -> Scene:
    return scene_of(
        write(tmp_path / "scene.tif", positions(height, width).astype("uint16"), transform=transform, crs=crs)
    )


def read_in_pieces(url: str, scene: Scene, window: Window, limit: int) -> np.ndarray:
    """Labels of a window, of which at most so many of the raster's pixels are read at once."""
    raster.MAX_LABEL_PIXELS, before = limit, raster.MAX_LABEL_PIXELS
    try:
        return read_labels(url, scene, window)
    finally:
        raster.MAX_LABEL_PIXELS = before


@pytest.mark.parametrize(("crs", "east", "north"), [("EPSG:32660", 830_000, 20_000), ("EPSG:3413", -20_000, 1_900_000)])
def test_labels_of_the_whole_earth_are_right_at_the_antimeridian(tmp_path, crs, east, north):
    """Longitudes jump there: between them nothing is interpolated."""
    classes = (np.add.outer(np.arange(360) * 7, np.arange(720) * 11) % 250).astype("uint8")[..., None]
    url = write(tmp_path / "earth.tif", classes, crs="EPSG:4326", transform=Affine(0.5, 0, -180, 0, -0.5, 90))
    if crs == "EPSG:3413":  # 180 degrees runs from the pole up and to the left of it
        east, north = pyproj.Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(180, 72)
        east, north = east - 20_000, north + 20_000
    ground = Affine(700, 0, east, 0, -700, north)
    image = write(tmp_path / "s.tif", np.ones((57, 83, 1), "uint8"), crs=crs, transform=ground)
    scene = scene_of(image)
    cols, rows = np.meshgrid(np.arange(83) + 0.5, np.arange(57) + 0.5)
    lon, lat = pyproj.Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(*(ground * (cols, rows)))
    assert lon.min() < -179
    assert lon.max() > 179
    expected = classes[np.floor((90 - lat) / 0.5).astype(int), np.floor((lon + 180) / 0.5).astype(int), 0]
    labels = read_labels(url, scene, whole(scene))
    # Pixels whose centre lies on an edge may fall on either side of it.
    inside = np.minimum(*(np.abs(one / 0.5 - np.round(one / 0.5)) for one in (lon, lat))) > 1e-4
    np.testing.assert_array_equal(labels[inside], expected[inside])
    np.testing.assert_array_equal(read_labels(url, scene, Window(19, 23, 30, 41)), labels[19:49, 23:64])


def test_labels_on_the_scenes_grid_are_as_stored(tmp_path):
    scene = small_scene(tmp_path)
    classes = (positions(40, 60) % 5).astype("uint8")
    classes[3, 4] = 9
    url = write(tmp_path / "labels.tif", classes, nodata=9)
    labels = read_labels(url, scene, Window(-2, -3, 50, 70))
    expected = np.full((50, 70), IGNORE)
    expected[2:42, 3:63] = np.where(classes[..., 0] == 9, IGNORE, classes[..., 0])
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, expected)


@pytest.mark.parametrize("finer", [4, 1, 0.5])
def test_labels_of_another_resolution_are_the_nearest(tmp_path, finer):
    scene = small_scene(tmp_path)
    height, width = int(40 * finer), int(60 * finer)
    classes = (np.add.outer(np.arange(height) * 3, np.arange(width)) % 200).astype("uint8")[..., None]
    url = write(tmp_path / "labels.tif", classes, transform=UTM @ Affine.scale(1 / finer))
    labels = read_labels(url, scene, whole(scene))
    rows, cols = np.floor((np.arange(40) + 0.5) * finer), np.floor((np.arange(60) + 0.5) * finer)
    assert np.array_equal(labels, classes[np.ix_(rows.astype(int), cols.astype(int))][..., 0])


@pytest.mark.parametrize("limit", [1 << 26, 300])
@pytest.mark.parametrize(
    "between",
    [(7, 1, -3, 1), (-4, 0.7, 11, 1.9), (30, -1, 2, 1), (25, -0.6, 50, -1.3)],
    ids=["shifted", "other pixels", "upside down", "turned by half"],
)
@quick
@given(window=windows(40, 60))
def test_labels_along_the_scenes_axes_hold_the_pixel_under_each_centre(tmp_path, limit, between, window):
    """In windows of any shape, one row or column too; beyond the raster nothing is labelled."""
    url = str(tmp_path / "labels.tif")
    row, row_step, col, col_step = between  # pixel corner (r, c) of the raster in pixels of the scene
    if not os.path.exists(url):
        grid = UTM @ Affine(col_step, 0, col, 0, row_step, row)
        write(url, (positions(30, 36) % 251).astype("uint8"), transform=grid)
    scene = small_scene(tmp_path)
    labels = read_in_pieces(url, scene, window, limit)
    stored = positions(30, 36)[..., 0] % 251
    expected = np.full(window.shape, IGNORE)
    for r, at_row in enumerate(range(window.row, window.stop_row)):
        for c, at_col in enumerate(range(window.col, window.stop_col)):
            y, x = round((at_row + 0.5 - row) / row_step, 6), round((at_col + 0.5 - col) / col_step, 6)
            if 0 <= at_row < 40 and 0 <= at_col < 60 and 0 <= y < 30 and 0 <= x < 36:
                expected[r, c] = stored[int(y), int(x)]
    np.testing.assert_array_equal(labels, expected)


@pytest.mark.parametrize("limit", [1 << 26, 300])
@quick
@given(window=windows(40, 60))
def test_labels_of_another_crs_hold_the_pixel_under_each_centre(tmp_path, limit, window):
    """Against a projection of every pixel, in windows as in the whole, in pieces too."""
    url = str(tmp_path / "labels.tif")
    if not os.path.exists(url):
        grid = Affine(0.0001, 0, -75.003, 0, -0.0001, 45.157)
        write(url, (positions(70, 120) % 251).astype("uint8"), crs="EPSG:4326", transform=grid)
    scene = small_scene(tmp_path)
    labels = read_in_pieces(url, scene, window, limit)
    to_lonlat = pyproj.Transformer.from_crs(32618, 4326, always_xy=True)
    cols, rows = np.meshgrid(np.arange(60) + 0.5, np.arange(40) + 0.5)
    lons, lats = to_lonlat.transform(UTM.a * cols + UTM.c, UTM.e * rows + UTM.f)
    at_cols, at_rows = (lons + 75.003) / 0.0001, (45.157 - lats) / 0.0001
    near_edge = (np.abs(at_cols - np.round(at_cols)) < 1e-3) | (np.abs(at_rows - np.round(at_rows)) < 1e-3)
    hit = (at_rows >= 0) & (at_rows < 70) & (at_cols >= 0) & (at_cols < 120)
    expected = np.full((40, 60), IGNORE)
    expected[hit] = (np.floor(at_rows[hit]) * 1000 + np.floor(at_cols[hit])) % 251
    assert (expected != IGNORE).mean() > 0.5
    inside = window & whole(scene)
    found = labels[inside.slices(window)]
    part = expected[inside.slices()]
    assert ((found == part) | near_edge[inside.slices()]).all()
    assert (labels == IGNORE).sum() >= window.area - inside.area


def test_labels_that_are_no_class_ids_are_refused(tmp_path):
    scene = small_scene(tmp_path)
    for values in (
        np.full((40, 60, 1), -1, "int16"),
        np.full((40, 60, 1), 300, "uint16"),
        np.full((40, 60, 1), 0.5, "f4"),
    ):
        url = write(tmp_path / "labels.tif", values)
        with pytest.raises(Refused, match="whole numbers"):
            read_labels(url, scene, whole(scene))
    good = np.full((40, 60, 1), 3, "float32")
    good[0, 0] = -9999
    labels = read_labels(write(tmp_path / "labels.tif", good, nodata=-9999), scene, whole(scene))
    assert labels[0, 0] == IGNORE
    assert (labels.ravel()[1:] == 3).all()


def test_labels_without_a_crs_must_be_the_scenes_pixels(tmp_path):
    scene = small_scene(tmp_path)
    same = write(tmp_path / "same.tif", (positions(40, 60) % 5).astype("uint8"), crs=None, transform=None)
    assert np.array_equal(read_labels(same, scene, whole(scene)), positions(40, 60)[..., 0] % 5)
    other = write(tmp_path / "other.tif", (positions(20, 30) % 5).astype("uint8"), crs=None, transform=None)
    with pytest.raises(Refused, match="no CRS"):
        read_labels(other, scene, whole(scene))
    nowhere = replace(scene, crs=None)
    placed = write(tmp_path / "placed.tif", (positions(40, 60) % 5).astype("uint8"))
    with pytest.raises(Refused, match="no CRS"):
        read_labels(placed, nowhere, whole(scene))


def test_jpeg2000_is_read(tmp_path):
    import rasterio.shutil

    tif = write(tmp_path / "a.tif", positions(70, 110, 2).astype("uint16") % 4000)
    rasterio.shutil.copy(tif, str(tmp_path / "a.jp2"), driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    scene = scene_of(str(tmp_path / "a.jp2"))
    assert scene.crs == "EPSG:32618"
    assert_is_part(scene, Window(-3, 40, 50, 90), raster.read(scene_of(tif), Window(0, 0, 70, 110)))


class Away(Elsewhere):
    """Files of a disk as if they were on another machine, which goes away once so many bytes were asked for."""

    def __init__(self, budget: int, error: Exception):
        self.budget, self.error = budget, error

    def stat(self, url: str) -> Entry | None:
        entry = LocalFiles().stat("/" + url.partition("://")[2].partition("/")[2])
        return entry and replace(entry, url=url)

    def fetch(self, url: str, offset: int, length: int) -> bytes:
        self.budget -= length
        if self.budget < 0:
            raise self.error
        return Path("/" + url.partition("://")[2].partition("/")[2]).read_bytes()[offset : offset + length]

    rename = remove = fill = None  # type: ignore[assignment]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of rasterio's callbacks
@pytest.mark.parametrize("error", [Outage("HDFS did not answer for 90 s"), ConnectionResetError(104, "reset")])
def test_storage_that_goes_away_is_not_the_files_fault(tmp_path, monkeypatch, error):
    """GDAL keeps what Python raises to itself, and says that the pixels can't be read."""
    path = write(tmp_path / "a.tif", positions(900, 700).astype("uint16"), tiled=True, blockxsize=256, blockysize=256)
    url, away = f"hdfs://nn/{path.lstrip('/')}", Away(1 << 30, error)
    monkeypatch.setitem(storage._HDFS, "webhdfs", away)
    monkeypatch.setattr(hdfs, "_access", storage.Access("nn"))
    scene = scene_of(url)
    assert raster.read(scene, whole(scene))[1].all()
    raster.close_files()
    away.budget = 200_000
    with pytest.raises(type(error)) as caught:
        raster.read(scene, whole(scene))
    assert caught.value is error
    away.budget = 10
    raster.close_files()
    with pytest.raises(type(error)):
        raster.describe_file(url)
    raster.close_files()
