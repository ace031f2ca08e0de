"""Bundles that earlier code made: read, run and mapped by this code, to the same scores and labels."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

# Before TensorFlow starts; test_model says why.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pytest
import rasterio
from scenes_for_tests import write_scene

from sattile.model import FORMAT, load_bundle, load_scorer
from sattile.prediction import predict

FOLDER = Path(__file__).parent / "fixtures" / "bundles"
KEPT = sorted(path.parent.name for path in FOLDER.glob("*/bundle.json"))


def test_there_is_one_of_each_format_and_each_is_small() -> None:
    formats = {json.loads((FOLDER / name / "bundle.json").read_text())["format"] for name in KEPT}
    assert FORMAT in formats, f"bundles have a new format: keep one of {FORMAT}, see {FOLDER}/README.md"
    for name in KEPT:
        assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 60_000
        assert f"| `{name}` |" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", KEPT)
def test_it_is_read_and_scores_as_it_did(name: str) -> None:
    found = load_bundle(str(FOLDER / name))
    assert (found.bands, [(one.id, one.name) for one in found.classes]) == (
        ("green", "nir", "swir"), [(2, "land"), (7, "water")],
    )  # fmt: skip
    assert (found.total_stride, found.receptive_radius, found.fill, found.gsd) == (2, 3, (700, 800, 900), 10)
    assert (found.values, found.output, found.input_shape, found.dataset_digest) == ("raw", "scores", None, "d1")
    assert found.metrics["miou"] == pytest.approx(0.8913, abs=1e-4)
    assert found.network["parameters"] == 38
    image = np.load(FOLDER / name / "scene.npy").transpose(1, 2, 0).astype(np.float32)
    image[image == -32768] = np.broadcast_to(found.fill, image.shape)[image == -32768]
    whole = np.concatenate([image, np.broadcast_to(np.float32(found.fill), (22, 1, 3))], axis=1)
    scores = load_scorer(found, engine="tensorflow")(whole[None])[0, :, :-1]
    np.testing.assert_allclose(scores, np.load(FOLDER / name / "scores.npy"), atol=1e-4)


def test_a_scene_is_mapped_as_it_was_by_whichever_version(spark: Any, tmp_path: Path) -> None:
    root = tmp_path / "models" / "shore"
    for number, name in enumerate(KEPT, start=1):
        shutil.copytree(FOLDER / name, root / f"v{number}")
    last = f"v{len(KEPT)}"
    (root / "latest.json").write_text(json.dumps({"version": last, "digest": "d"}))
    scene = write_scene(
        tmp_path / "s.tif", np.load(FOLDER / KEPT[0] / "scene.npy"), nodata=-32768, names=("green", "nir", "swir")
    )
    used = {str(root / f"v{number}"): root / f"v{number}" for number in range(1, len(KEPT) + 1)}
    for number, (asked, version) in enumerate({**used, str(root): root / last}.items()):
        out = tmp_path / f"maps{number}"
        predict(spark, model=asked, scenes=[scene], out=str(out), engine="tensorflow")
        assert json.loads((out / "_run.json").read_text())["model"] == str(version)
        with rasterio.open(out / "s" / "labels.tif") as file:
            np.testing.assert_array_equal(file.read(1), np.load(version / "labels.npy"))
