"""What a bundle says of itself: all that is in it, nothing that is not known, the same bytes each time."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

# Before TensorFlow starts; test_model says why.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pystac
import pytest
import rasterio
import yaml
from maps_for_tests import validate
from scenes_for_tests import write_scene

from sattile.card import model_card, model_item, training_data
from sattile.cli import parser
from sattile.config import COMMANDS
from sattile.model import bundle
from sattile.prediction import predict

SQUARE = {"type": "Polygon", "coordinates": [[[15, 45], [15.5, 45], [15.5, 46], [15, 46], [15, 45]]]}
FIJI = {
    "type": "MultiPolygon",
    "coordinates": [
        [[[179, -18], [180, -18], [180, -17], [179, -17], [179, -18]]],
        [[[-180, -18], [-178, -18], [-178, -17], [-180, -17], [-180, -18]]],
    ],
}
DATASET: dict[str, Any] = {
    "size": 128,
    "stride": 64,
    "dtype": "uint16",
    "sources": [{"scene_id": "a"}, {"scene_id": "b"}],
    "splits": {
        "train": {"tiles": 1300, "scenes": 2, "class_pixels": {"2": 9950, "7": 50}},
        "val": {"tiles": 31, "scenes": 1, "class_pixels": {"2": 300, "7": 100}},
        "test": {"tiles": 0, "scenes": 0, "class_pixels": {"2": 0, "7": 0}},
    },
    "footprint": SQUARE,
    "statistics": {
        name: {"mean": 700.0, "percentiles": {"1": 50.0 + at, "25": 300.0, "50": 400.0, "99": 9000.5}}
        for at, name in enumerate(("B03", "B08", "SWIR"))
    },
    "interval": ["2020-06-01T10:00:00Z", "2021-07-02T10:00:00Z"],
}
TRAINED: dict[str, Any] = {
    "format": "sattile-bundle/1",
    "bands": ["B03", "B08", "SWIR"],
    "classes": [
        {"id": 2, "name": "land", "color": "#ddcc77"},
        {"id": 7, "name": "open water", "color": "#332288"},
    ],
    "values": "raw",
    "fill": [700.0, 800.5, 900.0],
    "total_stride": 8,
    "receptive_radius": 51,
    "input_shape": None,
    "activation_bytes": 600.0,
    "gsd": 10.0,
    "output": "scores",
    "digest": "29e3c9f90f54d37be0db73678a4b4e54efb838e8e228ef4451eadc42b4ea7b99",
    "dataset_digest": "d1",
    "metrics": {
        "classes": {
            "land": {"iou": 0.9, "precision": 0.95, "recall": 0.94, "f1": 0.947, "pixels": 300},
            "open water": {"iou": 0.61, "precision": None, "recall": 0.8, "f1": 0.7, "pixels": 100},
        },
        "miou": 0.755,
        "accuracy": 0.93,
        "confusion": [[1, 0], [0, 1]],
        "pixels": 400,
        "split": "val",
    },
    "network": {"parameters": 489604, "best_epoch": 11, "arch": "unet-small", "epochs": 12, "augment": True},
    "versions": {"python": "3.11.7", "sattile": "0.1.0", "keras": "3.15.1"},
    "openvino": {"digest": "o", "agreement": 0.99987, "pixels": 4_000_000, "version": "2026.4.1", "precision": "bf16"},
    "data": training_data(DATASET),
}
FOREIGN: dict[str, Any] = TRAINED | {
    "values": "scaled", "total_stride": 1, "receptive_radius": None, "input_shape": [64, 64], "gsd": None,
    "output": "second", "dataset_digest": None, "metrics": {}, "openvino": {}, "data": {},
    "network": {"parameters": 38, "arch": "functional_3", "source": "net.keras"}, "versions": {"keras": "4.0.0rc1"},
}  # fmt: skip
HOSTILE: dict[str, Any] = TRAINED | {
    "bands": ["a|b", "c\nd", "<script>"],
    "classes": [
        {"id": 0, "name": "Wald | Ödland\n# x", "color": "#ddcc77"},
        {"id": 1, "name": "水", "color": "#332288"},
    ],
    "network": {"parameters": 38, "arch": "7:", "size: of it": [1, 2], "best_epoch": 1},
    "metrics": {},
}  # fmt: skip
EARLIER = {name: value for name, value in TRAINED.items() if name != "data"}
KINDS = {
    "trained": TRAINED,
    "foreign": FOREIGN,
    "strange names": HOSTILE,
    "from before": EARLIER,
    "across the antimeridian": TRAINED | {"data": TRAINED["data"] | {"footprint": FIJI}},
    "place unknown": TRAINED | {"data": TRAINED["data"] | {"footprint": None, "interval": None}},
    "measured on training tiles": TRAINED | {"metrics": TRAINED["metrics"] | {"split": "train"}},
}


def tables(card: str) -> dict[str, list[list[str]]]:
    """{section: rows, the head first}."""
    found = {}
    for section in re.split(r"^## ", card, flags=re.MULTILINE)[1:]:
        lines = [line for line in section.splitlines() if line.startswith("|")]
        rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
        if rows:
            found[section.splitlines()[0]] = [rows[0], *rows[2:]]
    return found


def front_matter(card: str) -> Any:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("kind", KINDS)
def test_the_item_is_valid(kind: str, tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / "item.json").write_text(json.dumps(model_item(KINDS[kind])))
    validate(tmp_path / "item.json", shared_data / "stac-schemas")
    assert pystac.Item.from_file(str(tmp_path / "item.json")).get_assets(role="mlm:model")


def test_the_schemas_refuse_what_is_wrong(tmp_path: Path, shared_data: Path) -> None:
    """The check above is one: MLM's own schema is among those that are looked at."""
    for name, value in (("mlm:tasks", ["painting"]), ("mlm:name", "!"), ("mlm:input", [{"name": "bands"}])):
        item = model_item(TRAINED)
        item["properties"][name] = value
        (tmp_path / "item.json").write_text(json.dumps(item))
        with pytest.raises(pystac.STACValidationError):
            validate(tmp_path / "item.json", shared_data / "stac-schemas")


def test_the_item_says_what_the_network_takes_and_gives() -> None:
    said = model_item(TRAINED)
    properties = said["properties"]
    assert properties["mlm:input"][0]["bands"] == ["B03", "B08", "SWIR"] == [one["name"] for one in properties["bands"]]
    assert properties["mlm:input"][0]["input"]["shape"] == [-1, -1, -1, 3]
    assert properties["mlm:output"][0]["result"]["shape"] == [-1, -1, -1, 2]
    classes = properties["mlm:output"][0]["classification:classes"]
    assert [(one["value"], one["title"]) for one in classes] == [(2, "land"), (7, "open water")]
    assert properties["mlm:hyperparameters"] == {"epochs": 12, "augment": True}
    assert (properties["mlm:total_parameters"], properties["mlm:framework_version"]) == (489604, "3.15.1")
    assert (said["geometry"], said["bbox"]) == (SQUARE, [15, 45, 15.5, 46])
    assert (properties["datetime"], properties["start_datetime"]) == (None, "2020-06-01T10:00:00Z")
    assert properties["end_datetime"] == "2021-07-02T10:00:00Z"
    assert "sattile:datetime_missing" not in properties
    assert said["assets"]["model"]["file:checksum"] == "1220" + TRAINED["digest"]
    assert model_item(KINDS["across the antimeridian"])["bbox"] == [179, -18, -178, -17]

    said = model_item(FOREIGN)
    properties = said["properties"]
    assert said["geometry"] is None
    assert "bbox" not in said
    assert "placeholders" in properties["description"]
    assert properties["sattile:datetime_missing"] is True
    assert properties["mlm:input"][0]["input"]["shape"] == [-1, 64, 64, 3]
    assert properties["mlm:output"][0]["result"]["shape"] == [-1, 64, 64, 1]
    assert not {"mlm:pretrained", "mlm:hyperparameters", "mlm:framework_version", "gsd"} & {*properties}
    assert "openvino" not in said["assets"]


def test_the_card_holds_what_the_bundle_knows() -> None:
    card = model_card(TRAINED)
    found = tables(card)
    assert found["What goes in"][1:] == [
        ["0", "B03", "700", "50", "9000.5"],
        ["1", "B08", "800.5", "51", "9000.5"],
        ["2", "SWIR", "900", "52", "9000.5"],
    ]
    assert found["What comes out"][1:] == [
        ["0", "2", "land", "`#ddcc77`"],
        ["1", "7", "open water", "`#332288`"],
    ]
    assert found["Training data"] == [
        ["", "training", "validation"],
        ["tiles", "1,300", "31"],
        ["scenes they come from", "2", "1"],
        ["labelled pixels, of each tile", "10,000", "400"],
        ["labelled land", "99.5 %", "75.0 %"],
        ["labelled open water", "0.5 %", "25.0 %"],
    ]
    assert found["Training"][1:] == [["`epochs`", "12"], ["`augment`", "on"]]
    assert found["Accuracy"][1:] == [
        ["land", "0.900", "0.950", "0.940", "0.947", "300"],
        ["open water", "0.610", "–", "0.800", "0.700", "100"],
    ]
    for words in (
        "489,604 parameters", "pixels of 10 m", "multiples of 8", "read 56 pixels more", "from 2 scenes with labels",
        "per pixel, taken from 2020-06-01 to 2021-07-02;", "`d1`", "epoch 11", "Mean IoU 0.755, 93.0 % of 400",
        "also chose the",
        "99.987 % of 4,000,000 pixels", "Less than 1% of the labelled training pixels are open water", "keras 3.15.1",
    ):  # fmt: skip
        assert words in card, words
    assert "test tiles" not in card  # there are none
    said = front_matter(card)
    assert (said["library_name"], said["pipeline_tag"]) == ("keras", "image-segmentation")
    (result,) = said["model-index"][0]["results"]
    assert {one["type"]: one["value"] for one in result["metrics"]} == {"mean_iou": 0.755, "accuracy": 0.93}
    assert result["dataset"]["split"] == "val"


def test_tiles_side_by_side_and_whole_windows_are_called_so() -> None:
    beside = TRAINED | {"data": TRAINED["data"] | {"stride": TRAINED["data"]["size"]}}
    assert tables(model_card(beside))["Training data"][3][0] == "labelled pixels"
    classifier = model_item(TRAINED | {"network": TRAINED["network"] | {"arch": "tile-classifier"}})["properties"]
    assert classifier["mlm:tasks"] == classifier["mlm:output"][0]["tasks"] == ["scene-classification"]


def test_card_and_item_say_that_weights_came_from_an_earlier_network() -> None:
    network = TRAINED["network"] | {"start_from": "/models/water/v1", "warmup": 1.0, "indices": ["ndwi", "a~b"]}
    found = TRAINED | {"network": network}
    card, item = model_card(found), model_item(found)
    assert "began with the weights of an earlier network, v1" in card
    assert "| `indices` | ndwi, a~b |" in card
    assert "warmup" not in card
    assert (item["properties"]["mlm:pretrained"], item["properties"]["mlm:pretrained_source"]) == (True, "v1")
    assert model_item(TRAINED)["properties"]["mlm:pretrained"] is False
    assert "training tiles, for there are no validation tiles" in model_card(KINDS["measured on training tiles"])


def test_the_card_says_what_is_not_known() -> None:
    card = model_card(FOREIGN)
    for words in (
        "Not known to sattile", "Not measured", "64 x 64 pixels and no others", "show seams", "from net.keras",
        "The pixel size that it was trained for is not known", "the probability of open water", "scale + offset",
    ):  # fmt: skip
        assert words in card, words
    assert "model-index" not in front_matter(card)
    assert "`d1`" in model_card(EARLIER)
    assert "which the network has seen" in model_card(KINDS["measured on training tiles"])
    measured = TRAINED["metrics"]["classes"] | {"open water": None}
    absent = model_card(TRAINED | {"metrics": TRAINED["metrics"] | {"classes": measured}})
    assert "No pixel of these tiles is labelled open water" in absent
    train = TRAINED["data"]["splits"]["train"]
    never = train | {
        "class_pixels": {key: n * (key == min(train["class_pixels"])) for key, n in train["class_pixels"].items()}
    }
    unseen = model_card(TRAINED | {"data": TRAINED["data"] | {"splits": TRAINED["data"]["splits"] | {"train": never}}})
    assert "No labelled training pixel is open water" in unseen
    assert "Less than" not in unseen


def test_names_do_not_break_the_card() -> None:
    card = model_card(HOSTILE)
    for title, rows in tables(card).items():
        assert {len(row) for row in rows} == {len(rows[0])}, title
    assert tables(card)["What goes in"][1][1] == r"a\|b"
    assert "水" in card
    text = re.sub("```.*?```", "", card, flags=re.DOTALL)  # the command takes them as they are
    assert not re.search(r"(?<!\\)<script|^# x", text, re.MULTILINE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bundle_says_the_same(kind: str) -> None:
    again = json.loads(json.dumps(KINDS[kind]))
    assert model_card(again) == model_card(KINDS[kind])
    assert json.dumps(model_item(again)) == json.dumps(model_item(KINDS[kind]))


def test_the_command_of_the_card_runs(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import keras

    values = keras.Input((None, None, 2))
    network = keras.Model(values, keras.layers.Conv2D(2, 1, activation="softmax")(values))
    network.set_weights([np.eye(2)[None, None], np.zeros(2)])
    network.save(tmp_path / "net.keras")
    out = bundle(str(tmp_path / "net.keras"), bands="blue,near infrared", classes="a,b", out=str(tmp_path / "model"))
    image = np.random.default_rng(0).integers(1, 1000, (2, 40, 60)).astype(np.uint16)
    write_scene(tmp_path / "archive" / "s.tif", image)
    (line,) = re.findall(r"```sh\n(.*?)\n```", Path(out, "README.md").read_text(), re.DOTALL)
    line = line.replace("/archive/", f"{tmp_path}/archive/").replace("/maps", f"{tmp_path}/maps")
    program, command, *words = shlex.split(line)
    assert (program, command) == ("sattile", "predict")
    monkeypatch.chdir(out)
    predict(spark, **parser(COMMANDS[command]).parse(words))
    with rasterio.open(tmp_path / "maps" / "s" / "labels.tif") as file:
        np.testing.assert_array_equal(file.read(1), image[1] > image[0])
