"""A small archive of scenes that look and behave like Sentinel-2, made from nothing.

One world, defined for every point of the ground: a lake and rivers, fields and forest, towns and the roads between
them. Scenes are photographs of parts of it on different days, so they agree where they overlap, and differ in sun,
haze, season, clouds and noise. Soil, ripe crops and built-up ground share their spectra: a network has to look around.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from sattile import storage
from sattile.schema import IGNORE, PALETTE

SOIL, WATER, VEGETATION, BUILT_UP = 0, 1, 2, 3
CLASS_NAMES = ("soil", "water", "vegetation", "built-up")
"""By class id; in the order in which `schema.PALETTE` gives them the colours a person expects."""

CLASSES = ",".join(CLASS_NAMES)
BANDS = ("B02", "B03", "B04", "B08", "B11", "B12")
MODEL_BANDS = ("B02", "B03", "B04", "B08")
"""What the demo's network sees: the bands that Sentinel-2 has at 10 m."""

SETTINGS: dict[str, dict[str, Any]] = {
    "index": {"bands": ",".join(MODEL_BANDS)},
    # With these cells and this seed train, val and test get about 2/3, 1/10 and 1/4 of the tiles, and every class.
    "tile": {"size": 128, "stride": 128, "cell": 8, "seed": 1},
    "train": {"epochs": 12, "batch_size": 16},
}
"""By command: with these the whole loop over the default archive takes minutes on two cores."""

CRS = "EPSG:32632"
GSD = 10
ORIGIN = (621_000, 5_048_000)  # north-west corner (x, y) in metres; MGRS tile 32TPR
FORMAT = "sattile-demo/1"


@dataclass(frozen=True)
class Archive:
    """What `make_archive` wrote.

    Attributes:
        folder: all of it.
        scenes: folder of the scenes, `<scene_id>.tif`.
        labels: folder of their labels, `<scene_id>.tif` too.
        scene_ids: in order of acquisition, the corrupt one included.
        corrupt: scene_id of the file that ends too early, None if there is none.
    """

    folder: str
    scenes: str
    labels: str
    scene_ids: tuple[str, ...]
    corrupt: str | None


@dataclass(frozen=True)
class Acquisition:
    """One photograph of the world: where, when, and through what air.

    Attributes:
        scene_id: its name.
        time: UTC.
        row, col: top-left pixel, on the lattice of GSD metres anchored at ORIGIN; rows go south.
        height, width: in pixels.
        cloud_cover: fraction of the sky that is cloud, roughly.
        collar: fraction of the width beyond the swath's slanted edge: > 0 at the left, < 0 at the right.
        gain: sun on the ground; haze: reflectance (x 10,000) that the air adds to blue.
        greenness: 0 (winter) to 1 (early summer).
        seed: of clouds and noise.
    """

    scene_id: str
    time: datetime
    row: int
    col: int
    height: int
    width: int
    cloud_cover: float = 0.0
    collar: float = 0.0
    gain: float = 1.0
    haze: float = 0.0
    greenness: float = 1.0
    seed: int = 0

    @property
    def transform(self) -> tuple[float, float, float, float, float, float]:
        x, y = ORIGIN[0] + GSD * self.col, ORIGIN[1] - GSD * self.row
        return (float(GSD), 0.0, float(x), 0.0, -float(GSD), float(y))


def make_archive(
    folder: str | os.PathLike[str],
    *,
    scenes: int = 6,
    height: int = 960,
    width: int = 1120,
    seed: int = 0,
    corrupt: bool = True,
) -> Archive:
    """Write `FOLDER/scenes/*.tif` and `FOLDER/labels/*.tif`.

    Scenes: uint16, reflectance x 10,000 (scale 0.0001), bands named `BANDS`, 10 m, EPSG:32632, nodata 0, tiled.
    Labels: uint8, ids of `CLASS_NAMES`; IGNORE (declared as nodata) under clouds and outside the swath.
    An archive that is there already, made with the same arguments, is left as it is.

    Args:
        folder: path or URL.
        scenes: how many good ones; neighbours overlap by about a quarter.
        height, width: of a scene in pixels, about: each has its own.
        seed: of the world and of the days.
        corrupt: add one more scene whose file ends in the middle, as a broken download leaves it.
    """
    root = storage.absolute(os.fspath(folder))
    plan = plan_archive(scenes=scenes, height=height, width=width, seed=seed, corrupt=corrupt)
    archive = Archive(
        folder=root,
        scenes=storage.join(root, "scenes"),
        labels=storage.join(root, "labels"),
        scene_ids=tuple(one.scene_id for one in plan),
        corrupt=plan[-1].scene_id if corrupt else None,
    )
    made = {"format": FORMAT, "plan": storage.digest([str(asdict(one)) for one in plan]), "seed": seed}
    description = storage.join(root, "archive.json")
    if _is_whole(root, description, made):
        return archive
    sizes: dict[str, int] = {}
    for acquisition in plan:
        with storage.scratch(needed=acquisition.height * acquisition.width * (2 * len(BANDS) + 1)) as scratch:
            pixels, labels = photograph(acquisition, seed=seed)
            name = f"{acquisition.scene_id}.tif"
            for kind, write in (("scenes", write_scene), ("labels", write_labels)):
                local = os.path.join(scratch, f"{kind}.tif")
                write(local, pixels if kind == "scenes" else labels, acquisition)
                if kind == "scenes" and acquisition.scene_id == archive.corrupt:
                    os.truncate(local, os.path.getsize(local) * 2 // 5)
                sizes[f"{kind}/{name}"] = os.path.getsize(local)
                storage.upload(local, storage.join(root, kind, name))
    storage.write_json(description, {**made, "classes": list(CLASS_NAMES), "bands": list(BANDS), "files": sizes})
    return archive


def _is_whole(root: str, description: str, made: dict[str, Any]) -> bool:
    """Whether this very archive lies there, every file as long as it was written."""
    if not storage.exists(description):
        return False
    found = storage.read_json(description)
    if {name: found.get(name) for name in made} != made:
        return False
    entries = {name: storage.stat(storage.join(root, name)) for name in found["files"]}
    return all(entry is not None and entry.size == found["files"][name] for name, entry in entries.items())


def plan_archive(*, scenes: int, height: int, width: int, seed: int, corrupt: bool) -> list[Acquisition]:
    """Where and when each scene is taken. The corrupt one, if any, comes last and is smaller."""
    rng = np.random.default_rng([seed, 1])
    count = scenes + corrupt
    columns = max(1, math.ceil(math.sqrt(scenes * 1.3)))
    first = datetime(2024, 4, 20, 10, 10, 31)
    time, plan = first, []
    for index in range(count):
        is_corrupt = corrupt and index == count - 1
        # The broken one lies over the middle of the others: whatever it does, no ground is lost.
        down, right = (0.4, 0.5 * (columns - 1)) if is_corrupt else (float(index // columns), float(index % columns))
        shrink = 0.6 if is_corrupt else 1.0
        rows = round(height * shrink * rng.uniform(0.92, 1.08))
        cols = round(width * shrink * rng.uniform(0.92, 1.08))
        time += timedelta(days=5 * int(rng.integers(2, 5)), seconds=int(rng.integers(-4, 5)))
        day = time.timetuple().tm_yday
        season = math.cos((day - 172) / 365 * 2 * math.pi)  # 1 at midsummer
        orbit, satellite = ("R022", "S2A") if index % 3 else ("R065", "S2B")
        plan.append(
            Acquisition(
                scene_id=f"{satellite}_MSIL2A_{time:%Y%m%dT%H%M%S}_N0510_{orbit}_T32TPR",
                time=time,
                row=round(0.74 * height * down + rng.uniform(0, 0.08) * height),
                col=round(0.74 * width * right + rng.uniform(0, 0.08) * width),
                height=rows,
                width=cols,
                cloud_cover=(0.0, 0.09, 0.04, 0.0, 0.11, 0.06)[index % 6],
                collar=(0.0, 0.0, -0.22, 0.18, 0.0, 0.0)[index % 6],
                gain=round(0.9 + 0.1 * season + rng.uniform(-0.05, 0.05), 4),
                haze=round(float(rng.uniform(0, 260)), 1),
                greenness=round(0.72 + 0.28 * season + rng.uniform(-0.06, 0.06), 4),
                seed=int(rng.integers(1 << 30)),
            )
        )
    return plan


def photograph(acquisition: Acquisition, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The world as one acquisition sees it.

    Returns:
        pixels (height, width, bands) uint16, 0 outside the swath and at least 1 inside; labels (height, width) uint8.
    """
    pad = 2  # so that the blur of the optics is the same in the middle and at the edge
    rows = np.arange(acquisition.row - pad, acquisition.row + acquisition.height + pad)
    cols = np.arange(acquisition.col - pad, acquisition.col + acquisition.width + pad)
    x, y = _ground(cols, rows)
    world = survey(x, y, seed=seed)
    reflectance = spectra(world, greenness=acquisition.greenness)
    reflectance *= (acquisition.gain * world.shade)[..., None]

    cloud, shadow = sky(x, y, cover=acquisition.cloud_cover, seed=acquisition.seed)
    reflectance *= (1 - 0.62 * shadow)[..., None]
    haze = acquisition.haze * (0.7 + 0.6 * fractal(x, y, 9000, octaves=2, seed=acquisition.seed + 7))
    reflectance += haze[..., None] * np.array([1.0, 0.62, 0.4, 0.15, 0.04, 0.02], np.float32)
    bright = 3300 + 4600 * cloud * fractal(x, y, 700, octaves=4, seed=acquisition.seed + 3)
    white = np.array([1.0, 0.98, 0.98, 1.02, 0.62, 0.5], np.float32)
    reflectance += cloud[..., None] * (bright[..., None] * white - reflectance)

    reflectance = _blur(reflectance)[pad:-pad, pad:-pad]
    reflectance[..., 4:] = _coarsen(reflectance[..., 4:])  # the short-wave bands are measured at 20 m
    rng = np.random.default_rng([acquisition.seed, 2])
    reflectance += rng.standard_normal(reflectance.shape, np.float32) * (14 + 0.012 * reflectance)

    inside = swath(acquisition)
    pixels = np.where(inside[..., None], np.clip(np.rint(reflectance), 1, 16000), 0).astype(np.uint16)
    clear = cloud[pad:-pad, pad:-pad] < 0.3
    labels = np.where(inside & clear, world.labels[pad:-pad, pad:-pad], IGNORE).astype(np.uint8)
    return pixels, labels


def _ground(cols: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metres east and south of ORIGIN of pixel centres: x (width,), y (height,) float64."""
    return (cols + 0.5) * GSD, (rows + 0.5) * GSD


def swath(acquisition: Acquisition) -> np.ndarray:
    """(height, width) bool: inside the strip that the satellite saw. Its edge leans as the orbit does."""
    row = np.arange(acquisition.height)[:, None]
    col = np.arange(acquisition.width)[None, :]
    lean = 0.21 * (row - acquisition.height / 2)  # the descending track goes 12 degrees west of south
    edge = abs(acquisition.collar) * acquisition.width
    if acquisition.collar > 0:
        return col + lean >= edge
    if acquisition.collar < 0:
        return col + lean < acquisition.width - edge
    return np.ones((acquisition.height, acquisition.width), bool)


def sky(x: np.ndarray, y: np.ndarray, *, cover: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Clouds over ground points and the shadows they throw to the north-west.

    Returns:
        opacity and shadow, each (height, width) float32 in 0..1.
    """
    if cover <= 0:
        nothing = np.zeros((len(y), len(x)), np.float32)
        return nothing, nothing

    def opacity(east: float, south: float) -> np.ndarray:
        density = fractal(x + east, y + south, 2300, octaves=6, seed=seed + 11)
        level = 0.73 - 0.95 * cover
        return _smoothstep(density, level, level + 0.07)

    cloud = opacity(0, 0)
    return cloud, opacity(330, 470) * (1 - cloud)


# The world


@dataclass(frozen=True)
class Ground:
    """What lies at each ground point; all arrays (height, width).

    Attributes:
        labels: uint8 class ids.
        cover: uint8 index into COVERS.
        mix: float32 0..1, how far `cover` is towards `second`.
        second: uint8 index into COVERS.
        tone: float32 around 1: brightness of this very spot.
        shade: float32 around 1: slope towards the sun or away from it.
    """

    labels: np.ndarray
    cover: np.ndarray
    mix: np.ndarray
    second: np.ndarray
    tone: np.ndarray
    shade: np.ndarray


# Reflectance x 10,000 at B02, B03, B04, B08, B11, B12: of a plausible size and order, not measured anywhere.
COVERS: tuple[tuple[str, tuple[int, ...]], ...] = (
    ("lake", (390, 430, 270, 160, 80, 50)),
    ("river", (560, 760, 640, 420, 160, 110)),
    ("forest", (210, 370, 240, 2500, 1250, 560)),
    ("crop", (330, 640, 380, 3900, 1850, 860)),
    ("meadow", (430, 760, 570, 3150, 2150, 1150)),
    ("ripe", (720, 1080, 1420, 2650, 3050, 2050)),
    ("dark soil", (640, 850, 1090, 1650, 2450, 2050)),
    ("bright soil", (1010, 1400, 1830, 2550, 3450, 2950)),
    ("gravel", (1450, 1720, 1960, 2350, 2700, 2450)),
    ("tiles", (860, 1120, 1580, 2250, 2800, 2450)),
    ("concrete", (1650, 1830, 1970, 2420, 2500, 2300)),
    ("asphalt", (780, 880, 960, 1230, 1420, 1330)),
    ("metal", (2250, 2380, 2450, 2700, 2650, 2400)),
)
COVER = {name: index for index, (name, _) in enumerate(COVERS)}
GREEN = np.array([name in ("forest", "crop", "meadow") for name, _ in COVERS])


def spectra(world: Ground, *, greenness: float = 1.0) -> np.ndarray:
    """Reflectance x 10,000 of the ground, (height, width, bands) float32, before sun and air.

    Args:
        world: of the ground.
        greenness: 1 in early summer; less turns green covers towards straw.
    """
    table = np.array([values for _, values in COVERS], np.float32)
    straw = table[COVER["ripe"]]
    table[GREEN] += (1 - greenness) * 0.55 * (straw - table[GREEN])
    first = table[world.cover]
    first += world.mix[..., None] * (table[world.second] - first)
    first *= world.tone[..., None]
    return first


def survey(x: np.ndarray, y: np.ndarray, *, seed: int = 0) -> Ground:
    """What lies at the ground points (y[i], x[j]); a function of the place and the seed alone.

    Args:
        x, y: metres east and south of ORIGIN, (width,) and (height,) float64, each ascending and evenly spaced.
        seed: of the world.
    """
    height = fractal(x, y, 7000, octaves=5, seed=seed + 1)
    rough = fractal(x, y, 260, octaves=3, seed=seed + 2)
    fine = _speckle(x, y, seed + 3)
    bend_x = (fractal(x, y, 1900, octaves=4, seed=seed + 4) - 0.5) * 1500
    bend_y = (fractal(x, y, 1900, octaves=4, seed=seed + 5) - 0.5) * 1500
    grid_x = np.broadcast_to(x.astype(np.float32), height.shape)
    grid_y = np.broadcast_to(y.astype(np.float32)[:, None], height.shape)

    # Fields: strips of plots, each farm with its own direction.
    farm, _ = nearest_site(grid_x + 0.25 * bend_x, grid_y + 0.25 * bend_y, 1500, seed=seed + 6)
    plot, edge = _plots(grid_x + 0.04 * bend_x, grid_y + 0.04 * bend_y, farm)
    luck = _unit(plot)
    is_bare = luck < 0.27
    cover = np.select(
        [luck < 0.17, luck < 0.27, luck < 0.47, luck < 0.66],
        [COVER["bright soil"], COVER["dark soil"], COVER["ripe"], COVER["meadow"]],
        COVER["crop"],
    ).astype(np.uint8)
    second = np.select([is_bare, luck < 0.47], [COVER["ripe"], COVER["bright soil"]], COVER["meadow"]).astype(np.uint8)
    mix = (0.15 + 0.35 * _unit(plot + np.uint32(1)) + 0.35 * (rough - 0.5)).astype(np.float32)
    tone = (0.86 + 0.3 * _unit(plot + np.uint32(2)) + 0.16 * (rough - 0.5) + 0.05 * (fine - 0.5)).astype(np.float32)
    labels = np.where(is_bare, SOIL, VEGETATION).astype(np.uint8)

    hedge = (edge < 9) & (_unit(plot + np.uint32(3)) < 0.5) & ~is_bare
    woods = fractal(x, y, 2300, octaves=5, seed=seed + 8)
    forest = (woods + 0.45 * (height - 0.5) > 0.585) | hedge
    cover[forest], second[forest], labels[forest] = COVER["forest"], COVER["meadow"], VEGETATION
    mix[forest] = np.clip(0.75 * (rough[forest] - 0.4), 0, 1)
    tone[forest] = 0.62 + 0.5 * rough[forest] + 0.4 * (fine[forest] - 0.35)

    east, south = grid_x + 0.06 * bend_x, grid_y + 0.06 * bend_y
    _lay_towns(x, y, east, south, (labels, cover, second, mix, tone), fine, rough, seed)

    # Water last: it lies above all. The river is where a bent field of noise crosses its middle.
    course = noise_at(grid_x + 0.8 * bend_x, grid_y + 0.8 * bend_y, 9000, seed=seed + 9)
    reach = np.abs(course - 0.5)
    broad = 0.0035 + 0.006 * noise(x, y, 5000, seed=seed + 10)
    bank = (reach < broad * 1.5) & (rough > 0.55)
    cover[bank], second[bank], labels[bank] = COVER["gravel"], COVER["bright soil"], SOIL
    mix[bank], tone[bank] = 0.5 * fine[bank], 0.85 + 0.3 * rough[bank]
    level = 0.297
    river, lake = reach < broad, height < level + 0.012 * (rough - 0.5)
    beach = (height < level + 0.006 + 0.012 * (rough - 0.5)) & ~lake
    cover[beach], second[beach], labels[beach] = COVER["gravel"], COVER["dark soil"], SOIL
    mix[beach], tone[beach] = fine[beach], 0.9
    stirred = fractal(x, y, 2600, octaves=4, seed=seed + 12)
    for wet, name, other in ((river, "river", "lake"), (lake, "lake", "river")):
        cover[wet], second[wet], labels[wet] = COVER[name], COVER[other], WATER
        mix[wet] = np.clip(0.9 * (stirred[wet] - 0.35), 0, 1)
        tone[wet] = 0.95 + 0.1 * stirred[wet]
    shore = lake & ~river
    mix[shore] += np.clip(1 - (level - height[shore]) / 0.035, 0, 1) * 0.6  # shallow, hence brighter

    slope = np.gradient(height, GSD, axis=0) + np.gradient(height, GSD, axis=1)  # the sun stands in the south-east
    shade = np.where(labels == WATER, 1.0, np.clip(1 - 420 * slope, 0.72, 1.25)).astype(np.float32)
    return Ground(labels, cover, np.clip(mix, 0, 1), second, tone, shade)


def _plots(x: np.ndarray, y: np.ndarray, farm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Plot number (uint32) of each point, and metres to the plot's nearest side (float32)."""
    angle = _unit(farm) * np.float32(math.pi)
    cos, sin = np.cos(angle), np.sin(angle)
    along, across = cos * x + sin * y, cos * y - sin * x
    broad = 110 + 240 * _unit(farm + np.uint32(11))
    strip = np.floor(across / broad)
    key = mix_bits(farm ^ strip.astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1))
    long = 260 + 520 * _unit(key)
    part = along / long + _unit(key + np.uint32(5))
    number = np.floor(part)
    plot = mix_bits(key ^ number.astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA6B))
    fraction_across, fraction_along = across / broad - strip, part - number
    edge = np.minimum(
        np.minimum(fraction_across, 1 - fraction_across) * broad, np.minimum(fraction_along, 1 - fraction_along) * long
    )
    return plot, edge


def _lay_towns(
    x: np.ndarray,
    y: np.ndarray,
    grid_x: np.ndarray,
    grid_y: np.ndarray,
    ground: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    fine: np.ndarray,
    rough: np.ndarray,
    seed: int,
) -> None:
    """Put towns and roads over labels, cover, second, mix and tone, in place.

    A town is roofs, streets, gardens and yards, pixel by pixel; all of it is labelled built-up, as land-cover maps do.
    """
    labels, cover, second, mix, tone = ground
    towns = town_sites((x[0], x[-1]), (y[0], y[-1]), seed=seed)
    sprawl = fractal(x, y, 900, octaves=4, seed=seed + 20) - 0.5
    built = np.zeros(labels.shape, bool)
    turn = np.zeros(labels.shape, np.float32)
    for east, south, radius, angle in towns:
        reach = 1.6 * radius
        rows, cols = _around(x, y, (east - reach, east + reach), (south - reach, south + reach))
        distance = np.hypot(grid_x[rows, cols] - east, grid_y[rows, cols] - south)
        inside = distance < radius * (1 + 1.7 * sprawl[rows, cols])
        built[rows, cols] |= inside
        turn[rows, cols][inside] = angle

    cos, sin = np.cos(turn), np.sin(turn)
    u, v = cos * grid_x + sin * grid_y, cos * grid_y - sin * grid_x
    quarter, _ = nearest_site(grid_x, grid_y, 620, seed=seed + 21)
    pitch = 70 + 60 * _unit(quarter)
    street = (np.mod(u, pitch) < 11) | (np.mod(v, pitch * 1.5) < 11)
    block = mix_bits(
        np.floor(u / pitch).astype(np.int32).view(np.uint32) * np.uint32(0x27D4EB2F)
        ^ np.floor(v / (1.5 * pitch)).astype(np.int32).view(np.uint32) * np.uint32(0x165667B1)
        ^ quarter
    )
    kind, spot = _unit(block), fine
    is_works = _unit(quarter + np.uint32(3)) < 0.22
    is_park = (kind > 0.93) & ~is_works
    town_cover = np.select(
        [street, is_works & (kind < 0.4), is_works & (kind < 0.8), is_park, spot < 0.42, spot < 0.62],
        [COVER["asphalt"], COVER["metal"], COVER["concrete"], COVER["meadow"], COVER["tiles"], COVER["concrete"]],
        COVER["meadow"],
    )
    cover[built] = town_cover[built]
    second[built] = np.where(kind < 0.5, COVER["dark soil"], COVER["forest"])[built]
    mix[built] = np.where(is_works, 0.1, 0.22 + 0.5 * (rough - 0.4))[built]
    tone[built] = (0.72 + 0.36 * kind + 0.2 * (spot - 0.5))[built]
    labels[built] = BUILT_UP

    for road in _roads(towns):
        (east, south), (to_east, to_south), width = road
        low_x, high_x = min(east, to_east) - 120, max(east, to_east) + 120
        low_y, high_y = min(south, to_south) - 120, max(south, to_south) + 120
        rows, cols = _around(x, y, (low_x, high_x), (low_y, high_y))
        px, py = grid_x[rows, cols] - east, grid_y[rows, cols] - south
        dx, dy = to_east - east, to_south - south
        share = np.clip((px * dx + py * dy) / (dx * dx + dy * dy), 0, 1)
        on_road = np.hypot(px - share * dx, py - share * dy) < width
        cover[rows, cols][on_road] = COVER["asphalt"]
        second[rows, cols][on_road] = COVER["concrete"]
        mix[rows, cols][on_road] = 0.25
        tone[rows, cols][on_road] = 1.0
        labels[rows, cols][on_road] = BUILT_UP


def town_sites(
    x_range: tuple[float, float], y_range: tuple[float, float], *, seed: int, spacing: float = 3400
) -> list[tuple[float, float, float, float]]:
    """Towns in and around a rectangle of ground: (east, south, radius, direction of the streets)."""
    towns = []
    reach = 2 * spacing  # roads come in from towns outside
    for j in range(math.floor((y_range[0] - reach) / spacing), math.floor((y_range[1] + reach) / spacing) + 1):
        for i in range(math.floor((x_range[0] - reach) / spacing), math.floor((x_range[1] + reach) / spacing) + 1):
            draw = lattice(np.array([i]), np.arange(5 * j, 5 * j + 5), seed + 30)[:, 0]
            if draw[0] < 0.86:
                radius = 330 + 950 * float(draw[1]) ** 1.6
                east, south = (i + 0.15 + 0.7 * float(draw[2])) * spacing, (j + 0.15 + 0.7 * float(draw[3])) * spacing
                towns.append((east, south, radius, float(draw[4]) * math.pi / 2))
    return towns


Point = tuple[float, float]


def _roads(towns: Sequence[tuple[float, float, float, float]]) -> list[tuple[Point, Point, float]]:
    """Roads between towns less than 1.4 spacings apart: both ends and half the width, in metres."""
    roads = []
    for index, (east, south, radius, _) in enumerate(towns):
        for to_east, to_south, to_radius, _ in towns[index + 1 :]:
            if math.hypot(to_east - east, to_south - south) < 4300:
                roads.append(((east, south), (to_east, to_south), 16.0 if radius + to_radius > 1100 else 9.0))
    return roads


def _around(
    x: np.ndarray, y: np.ndarray, x_range: tuple[float, float], y_range: tuple[float, float]
) -> tuple[slice, slice]:
    """Rows and columns whose ground lies in a rectangle, with room for bent coordinates."""
    rows = slice(*np.searchsorted(y, [y_range[0] - 100, y_range[1] + 100]))
    cols = slice(*np.searchsorted(x, [x_range[0] - 100, x_range[1] + 100]))
    return rows, cols


# Noise: functions of the place, smooth or not, the same wherever a scene begins


def mix_bits(values: np.ndarray) -> np.ndarray:
    """A well-mixed uint32 for each uint32 (the finaliser of MurmurHash3, public domain)."""
    values = values.astype(np.uint32, copy=True)
    values ^= values >> np.uint32(16)
    values *= np.uint32(0x85EBCA6B)
    values ^= values >> np.uint32(13)
    values *= np.uint32(0xC2B2AE35)
    values ^= values >> np.uint32(16)
    return values


def _unit(keys: np.ndarray) -> np.ndarray:
    """Uniform float32 in [0, 1) for each uint32 key."""
    return (mix_bits(keys) >> np.uint32(8)).astype(np.float32) / np.float32(1 << 24)


def lattice(i: np.ndarray, j: np.ndarray, seed: int) -> np.ndarray:
    """Uniform float32 in [0, 1) at lattice points, (len(j), len(i))."""
    return _unit(_keys(i[None, :], j[:, None], seed))


def _keys(i: np.ndarray, j: np.ndarray, seed: int) -> np.ndarray:
    start = mix_bits(np.array([seed & 0xFFFFFFFF], np.uint32))[0]
    across = i.astype(np.int32).view(np.uint32) * np.uint32(0x9E3779B1)
    return mix_bits((across ^ start) + mix_bits(j.astype(np.int32).view(np.uint32) * np.uint32(0x85EBCA77)))


def noise(x: np.ndarray, y: np.ndarray, cell: float, *, seed: int) -> np.ndarray:
    """Smooth value noise in 0..1 at (y[i], x[j]): random numbers on a lattice of `cell` metres, interpolated.

    Separable, hence fast: (height, width) float32.
    """
    i, weight_i = _lattice_weights(x, cell)
    j, weight_j = _lattice_weights(y, cell)
    values = lattice(np.arange(i[0], i[-1] + 2), np.arange(j[0], j[-1] + 2), seed)
    i, j = i - i[0], j - j[0]
    across = values[:, i] + weight_i * (values[:, i + 1] - values[:, i])
    result = across[j]
    result += weight_j[:, None] * (across[j + 1] - result)
    return result


def _lattice_weights(at: np.ndarray, cell: float) -> tuple[np.ndarray, np.ndarray]:
    place = at / cell
    index = np.floor(place)
    part = place - index
    return index.astype(np.int64), (part**3 * (part * (part * 6 - 15) + 10)).astype(np.float32)


def noise_at(x: np.ndarray, y: np.ndarray, cell: float, *, seed: int) -> np.ndarray:
    """`noise` at any points: x and y (height, width), bent as one likes."""
    i, weight_i = _lattice_weights(x, cell)
    j, weight_j = _lattice_weights(y, cell)
    values = lattice(np.arange(i.min(), i.max() + 2), np.arange(j.min(), j.max() + 2), seed)
    i, j = i - i.min(), j - j.min()
    north = values[j, i] + weight_i * (values[j, i + 1] - values[j, i])
    south = values[j + 1, i] + weight_i * (values[j + 1, i + 1] - values[j + 1, i])
    return north + weight_j * (south - north)


def fractal(x: np.ndarray, y: np.ndarray, cell: float, *, octaves: int, seed: int) -> np.ndarray:
    """Noise of `octaves` scales, each half the size and half as strong, in 0..1: (height, width) float32."""
    total = noise(x, y, cell, seed=seed)
    for octave in range(1, octaves):
        # Each scale has its own origin: lattices that coincide leave a grid that the eye finds at once.
        shift = 0.37 * octave * cell
        total += noise(x + shift, y - shift, cell / 2**octave, seed=seed + 101 * octave) * np.float32(0.5**octave)
    return total / np.float32(2 - 0.5 ** (octaves - 1))


def _speckle(x: np.ndarray, y: np.ndarray, seed: int) -> np.ndarray:
    """Uniform in 0..1, each ground pixel for itself: (height, width) float32."""
    return lattice(np.floor(x / GSD).astype(np.int64), np.floor(y / GSD).astype(np.int64), seed)


def nearest_site(x: np.ndarray, y: np.ndarray, cell: float, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of sites strewn one in each square of `cell` metres.

    Returns:
        its number (uint32) and its distance in metres (float32), of x's shape.
    """
    i, j = np.floor(x / cell).astype(np.int64), np.floor(y / cell).astype(np.int64)
    low_i, low_j = i.min() - 1, j.min() - 1
    across, down = np.arange(low_i, i.max() + 2), np.arange(low_j, j.max() + 2)
    site_x = ((across[None, :] + 0.1 + 0.8 * lattice(across, down, seed)) * cell).astype(np.float32)
    site_y = ((down[:, None] + 0.1 + 0.8 * lattice(across, down, seed + 1)) * cell).astype(np.float32)
    number = _keys(across[None, :], down[:, None], seed + 2)
    i, j = i - low_i, j - low_j
    best = np.full(x.shape, np.inf, np.float32)
    found = np.zeros(x.shape, np.uint32)
    for row in (-1, 0, 1):
        for col in (-1, 0, 1):
            flat = (j + row) * len(across) + (i + col)
            distance = (x - site_x.ravel()[flat]) ** 2 + (y - site_y.ravel()[flat]) ** 2
            closer = distance < best
            best = np.where(closer, distance, best)
            found = np.where(closer, number.ravel()[flat], found)
    return found, np.sqrt(best)


def _smoothstep(value: np.ndarray, low: float, high: float) -> np.ndarray:
    part = np.clip((value - low) / (high - low), 0, 1)
    return (part * part * (3 - 2 * part)).astype(np.float32)


def _blur(image: np.ndarray) -> np.ndarray:
    """The optics: (1 4 1) / 6 along both axes; (height, width, bands) in and out."""
    down = image * np.float32(4)
    down[1:] += image[:-1]
    down[:-1] += image[1:]
    both = down * np.float32(4)
    both[:, 1:] += down[:, :-1]
    both[:, :-1] += down[:, 1:]
    both *= np.float32(1 / 36)
    return both


def _coarsen(image: np.ndarray) -> np.ndarray:
    """Means of 2 x 2 pixels, each repeated; (height, width, bands) in and out, any parity."""
    height, width = image.shape[:2]
    even = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    means = (even[::2, ::2] + even[1::2, ::2] + even[::2, 1::2] + even[1::2, 1::2]) / np.float32(4)
    return means.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


# Files


def write_scene(path: str, pixels: np.ndarray, acquisition: Acquisition) -> None:
    """A GeoTIFF of `pixels` (height, width, bands) uint16."""
    import rasterio
    from rasterio.transform import Affine

    profile = {
        "driver": "GTiff",
        "height": acquisition.height,
        "width": acquisition.width,
        "count": len(BANDS),
        "dtype": "uint16",
        "crs": CRS,
        "transform": Affine(*acquisition.transform),
        "nodata": 0,
        "tiled": True,
        "blockxsize": 512,
        "blockysize": 512,
        "interleave": "pixel",
        "compress": "zstd",
        "zstd_level": 1,
        "predictor": 2,
    }
    with rasterio.open(path, "w", **profile) as file:
        file.descriptions = BANDS
        file.scales = (0.0001,) * len(BANDS)
        file.offsets = (0.0,) * len(BANDS)
        file.update_tags(TIFFTAG_DATETIME=f"{acquisition.time:%Y:%m:%d %H:%M:%S}")
        file.update_tags(ns="IMAGERY", ACQUISITIONDATETIME=f"{acquisition.time:%Y-%m-%d %H:%M:%S}")
        file.write(np.moveaxis(pixels, -1, 0))


def write_labels(path: str, labels: np.ndarray, acquisition: Acquisition) -> None:
    """A GeoTIFF of `labels` (height, width) uint8 with a colour table, nodata IGNORE."""
    import rasterio
    from rasterio.transform import Affine

    profile = {
        "driver": "GTiff",
        "height": acquisition.height,
        "width": acquisition.width,
        "count": 1,
        "dtype": "uint8",
        "crs": CRS,
        "transform": Affine(*acquisition.transform),
        "nodata": IGNORE,
        "tiled": True,
        "blockxsize": 256,
        "blockysize": 256,
        "compress": "deflate",
    }
    with rasterio.open(path, "w", **profile) as file:
        file.write(labels, 1)
        colors = {number: _rgb(PALETTE[number]) for number in range(len(CLASS_NAMES))}
        file.write_colormap(1, {**colors, IGNORE: (0, 0, 0, 0)})


def _rgb(color: str) -> tuple[int, int, int, int]:
    return (int(color[1:3], 16), int(color[3:5], 16), int(color[5:7], 16), 255)
