"""Real imagery: what the product is for, end to end."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from rio_cogeo import cog_validate

from sattile.dataset import read_dataset
from sattile.evaluation import evaluate
from sattile.pipeline import run
from sattile.prediction import predict
from sattile.tiles import tile
from sattile.training import train

PATTERN = "{scene}, {band}.tiff"
BEAUFORT = "2018-10-13, Sentinel-2B L1C"


def pixels(dataset: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Labelled pixels of a split: (n, bands) and (n,)."""
    values, labels = [], []
    for name in read_dataset(dataset)["splits"][split]["files"]:
        for row in pq.read_table(Path(dataset) / split / name, columns=["image", "labels"]).to_pylist():
            marks = np.load(io.BytesIO(row["labels"]))
            values.append(np.load(io.BytesIO(row["image"]))[marks != 255])
            labels.append(marks[marks != 255])
    return np.concatenate(values).astype(np.float32), np.concatenate(labels)


@pytest.mark.real
def test_a_unet_beats_a_per_pixel_classifier_on_water(spark, shared_data, all_cores, tmp_path):
    from sklearn.ensemble import HistGradientBoostingClassifier

    water = shared_data / "water"
    lines = [f"{water}/water_{one}_img.tif,{water}/water_{one}_water.tif,{one}" for one in ("train", "val")]
    (tmp_path / "pairs.csv").write_text("\n".join(["scene,labels,split", *lines]))
    dataset = tile(
        spark, pairs=str(tmp_path / "pairs.csv"), out=str(tmp_path / "tiles"), size=128, classes="land,water",
        bands="coastal,blue,green,red,nir,swir1,swir2",
    )  # fmt: skip
    splits = read_dataset(dataset)["splits"]
    assert (splits["train"]["tiles"], splits["val"]["tiles"]) == (202, 43)
    model = train(spark, dataset=dataset, out=str(tmp_path / "model"), epochs=12)
    url = evaluate(spark, model=model, dataset=dataset, split="val", out=str(tmp_path / "evaluation"))
    network = json.loads(Path(url).read_text())["classes"]["water"]["iou"]

    values, labels = pixels(dataset, "train")
    some = np.random.default_rng(0).choice(len(values), 80_000, replace=False)
    classifier = HistGradientBoostingClassifier(max_iter=100, random_state=0)
    classifier.fit(values[some], labels[some])
    held, truth = pixels(dataset, "val")
    found = classifier.predict(held)
    baseline = ((truth == 1) & (found == 1)).sum() / ((truth == 1) | (found == 1)).sum()
    assert network > 0.55
    assert network > baseline, (network, baseline)

    # The same ground as another provider gives it: a file a band, numbered, of 10 and 30 m, with 1000 added.
    scenes, labels = tmp_path / "S2" / "scenes", tmp_path / "S2" / "labels"
    other_provider(water / "water_val_img.tif", water / "water_val_water.tif", scenes, labels)
    given = {"model": model, "scenes": [str(scenes)], "pattern": "{scene}_{band}.tif", "max_gsd_ratio": 3.0}
    url = evaluate(spark, **given, labels=str(labels), rescale="1,-1000", out=str(tmp_path / "other"))
    other = json.loads(Path(url).read_text())["classes"]["water"]["iou"]
    assert other > max(baseline - 0.05, network - 0.15), (other, network, baseline)
    predict(spark, **given, out=str(tmp_path / "maps"))
    assert list(json.loads((tmp_path / "maps" / "_run.json").read_text())["unlike"]) == ["S2A"]


def other_provider(image: Path, truth: Path, scenes: Path, labels: Path) -> None:
    for folder in (scenes, labels):
        folder.mkdir(parents=True)
    with rasterio.open(image) as file:
        bands, missing, profile = file.read(), file.nodata, file.profile
    with rasterio.open(truth) as file:
        marks = file.read(1)
    profile |= {"driver": "GTiff", "count": 1}

    def write(path: Path, data: np.ndarray, times: int, **options) -> None:
        data = data.repeat(times, 0).repeat(times, 1)
        grid = {"height": data.shape[0], "width": data.shape[1], "dtype": data.dtype, "count": 1}
        grid["transform"] = profile["transform"] @ rasterio.Affine.scale(1 / times)
        with rasterio.open(path, "w", **(profile | grid | options)) as file:
            file.write(data, 1)

    for name, band in zip(("B01", "B02", "B03", "B04", "B08", "B11", "B12"), bands, strict=True):
        stored = np.where(band == missing, 0, np.clip(band.astype(np.int32) + 1000, 1, 65535)).astype(np.uint16)
        write(scenes / f"S2A_{name}.tif", stored, 1 if name in ("B01", "B11", "B12") else 3, nodata=0)
    write(labels / "S2A.tif", marks, 3, nodata=255)


@pytest.mark.real
def test_beaufort_as_band_files_to_a_cog_whose_collar_is_nodata(spark, shared_data, tmp_path):
    scene, bands = shared_data / "beaufort", "B02,B03,B04,B08"
    reading = {"bands": bands, "pattern": PATTERN, "nodata": 255}
    dataset = tile(
        spark, scenes=[str(scene)], labels=str(scene / "s2_rcr_water_ndwi_otsu.tif"), out=str(tmp_path / "tiles"),
        size=128, classes="land,water", split="block", cell=4, buffer=16, **reading,
    )  # fmt: skip
    model = train(spark, dataset=dataset, out=str(tmp_path / "model"), arch="unet-tiny", epochs=3)
    out = predict(spark, model=model, scenes=[str(scene)], out=str(tmp_path / "maps"), pattern=PATTERN, nodata=255)
    path = Path(out) / BEAUFORT / "labels.tif"
    assert cog_validate(str(path), strict=True)[0]
    stack = []
    for band in bands.split(","):
        with rasterio.open(scene / f"{BEAUFORT}, {band}.tiff") as file:
            stack.append(file.read(1))
            grid = file.transform, file.crs
    valid = (np.stack(stack) != 255).all(0)
    with rasterio.open(path) as file:
        labels = file.read(1)
        assert (file.transform, file.crs, file.nodata) == (*grid, 255)
        assert file.colormap(1)[1][3] == 255
    assert ((labels == 255) == ~valid).all()
    with rasterio.open(scene / "s2_rcr_water_ndwi_otsu.tif") as file:
        water = file.read(1)
    known = valid & (water != 255)
    assert (labels[known] == water[known]).mean() > 0.9


def test_beauforts_polygons_are_labels(spark, shared_data, tmp_path):
    scene = shared_data / "beaufort"
    found = {}
    for name in ("rcr_landcover_4326.geojson", "rcr_landcover.shp"):
        dataset = tile(
            spark, scenes=[str(scene)], labels=str(scene / name), attribute="Classname", size=128, nodata=255,
            bands="B02,B03,B04,B08", pattern=PATTERN, fractions="1,0,0", out=str(tmp_path / name),
        )  # fmt: skip
        description = read_dataset(dataset)
        assert {one["name"] for one in description["classes"]} >= {"Sand", "Forested Wetland"}
        found[name] = description["splits"]["train"]["class_pixels"]
    first, second = found.values()
    assert all(count > 10 for count in first.values())
    # One file is the other in degrees: outlines may differ by a pixel here and there.
    assert all(abs(first[key] - second[key]) <= 0.1 * first[key] + 3 for key in first)


@pytest.mark.real
def test_beauforts_23_polygons_are_enough_to_begin(spark, shared_data, all_cores, tmp_path):
    """All defaults: recall by class on shapes that were left out, with its interval, on the page."""
    from sklearn.ensemble import RandomForestClassifier

    scene = shared_data / "beaufort"
    page = run(
        spark, scenes=[str(scene)], labels=str(scene / "rcr_landcover.shp"), pattern=PATTERN, nodata=255,
        settings={"tile": {"attribute": "Classname"}}, out=str(tmp_path / "out"),
    )  # fmt: skip
    description = read_dataset(str(tmp_path / "out" / "tiles"))
    assert description["windows"]["shapes"] == 23
    assert sum(part["labelled_pixels"] for part in description["splits"].values()) == 598
    found = json.loads((tmp_path / "out" / "evaluation" / "metrics.json").read_text())
    recall = found["shapes"]
    assert {name for name, one in recall.items() if one} == {
        "Emergent Wetland", "Forested Wetland", "Herbaceous", "Sand", "WetSand"
    }  # fmt: skip
    assert all(one["interval"][0] < one["recall"] <= one["interval"][1] + 1e-9 for one in recall.values() if one)
    assert all(one["groups"] == (1 if name == "WetSand" else 2) for name, one in recall.items() if one)
    html = Path(page).read_text()
    table = html[html.index("Recall on shapes that were left out") : html.index("<h3>By class</h3>")]
    assert table.count('class="ci"> [') == 5
    assert "no shape of it was left out: no recall can be told" in table
    assert "Class Subtidal Haline has 1 shape: it is in training alone" in html

    # Not far behind a forest on the same pixels, which sees the same colours.
    dataset = str(tmp_path / "out" / "tiles")
    forest = RandomForestClassifier(300, class_weight="balanced", random_state=0).fit(*pixels(dataset, "train"))
    held = [np.concatenate(parts) for parts in zip(pixels(dataset, "val"), pixels(dataset, "test"), strict=True)]
    assert found["pixels"] == len(held[1])
    assert found["accuracy"] > (forest.predict(held[0]) == held[1]).mean() - 0.1
    # And the map is one of all classes.
    with rasterio.open(tmp_path / "out" / "mosaics" / BEAUFORT / "labels.tif") as file:
        counts = np.bincount(file.read(1).ravel(), minlength=256)
    assert (counts[:6] > 1000).all()
