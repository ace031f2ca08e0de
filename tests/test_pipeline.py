"""The chain of commands: settings reach their steps, and what no step has is refused before anything runs."""

from __future__ import annotations

import pytest

from sattile import cli, demo, pipeline
from sattile.config import COMMANDS
from sattile.errors import UsageError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trian": {"epochs": 1}}, "settings of trian: steps are index, tile"),
        ({"train": {"epoch": 1}}, r"train\.epoch is no setting; there are .*epochs"),
        ({"index": {"out": "elsewhere"}}, r"index\.out is chosen by the chain"),
        ({"predict": {"scenes": ["a.tif"]}}, r"predict\.scenes is chosen by the chain"),
    ],
)
def test_settings_that_no_step_has_are_refused_at_once(tmp_path, settings, message):
    with pytest.raises(UsageError, match=message):
        pipeline.run(None, out=str(tmp_path / "work"), scenes=["s"], labels="l", settings=settings)
    assert not (tmp_path / "work").exists()


@pytest.fixture
def chained(monkeypatch):
    """What the chain is given by a command; no Spark."""
    calls = []
    monkeypatch.setattr(pipeline, "_chain", lambda spark, out, **given: calls.append(given))
    monkeypatch.setattr(cli, "_with_session", lambda command, values, master, conf: command.function()(None, **values))
    return calls


def test_one_settings_file_serves_all_commands(tmp_path, chained):
    """`run` takes the sections of its steps, its own for itself, and leaves the others alone."""
    conf = tmp_path / "c.yaml"
    conf.write_text("run: {classes: 'a,b'}\nbundle: {gsd: 10}\ndemo: {seed: 3}\ntrain: {epochs: 2}\n")
    given = ["run", "--scenes", "s", "--labels", "l", "--out", str(tmp_path), "--conf", str(conf)]
    assert cli.main([*given, "--set", "tile.size=64"]) == 0
    assert chained[0]["settings"] == {"train": {"epochs": 2}, "tile": {"size": 64}}
    assert chained[0]["classes"] == "a,b"


def test_each_command_takes_the_settings_of_its_steps_from_the_command_line(tmp_path, monkeypatch):
    """Of those of a file that all commands share, those of others are left alone."""
    given = []
    monkeypatch.setattr(cli, "_with_session", lambda command, values, master, conf: given.append((command, values)))
    conf = tmp_path / "c.yaml"
    conf.write_text("train: {epochs: 2}\npredict: {merge: blend}\n")
    words = {
        "run": ["--out", "o"], "demo": [], "reprocess": ["--model", "m", "--scenes", "s", "--out", "o"],
        "search": ["--dataset", "d", "--grid", "arch=unet-tiny", "--out", "o"],
    }  # fmt: skip
    chaining = [name for name, command in COMMANDS.items() if command.chains]
    assert sorted(words) == sorted(chaining)
    for name in chaining:
        said = [] if name == "reprocess" else ["--set", "train.seed=3"]
        assert cli.main([name, *words[name], "--conf", str(conf), *said]) == 0
        of_steps = given.pop()[1]["settings"]
        assert of_steps.get("train", {}) == ({"epochs": 2, "seed": 3} if said else {})
        assert ("predict" in of_steps) == (name != "search")


def test_the_demo_takes_settings_of_its_steps(tmp_path, chained):
    assert cli.main(["demo", "--out", str(tmp_path), "--set", "train.epochs=2", "--set", "predict.merge=blend"]) == 0
    settings = chained[0]["settings"]
    assert settings["train"] == {**demo.SETTINGS["train"], "epochs": 2}
    assert settings["predict"] == {"merge": "blend"}
    assert settings["tile"] == demo.SETTINGS["tile"]
    assert cli.main(["demo", "--out", str(tmp_path), "--set", "train.epochs=2", "--epochs", "1"]) == 0
    assert chained[1]["settings"]["train"]["epochs"] == 1


def test_a_changed_archive_is_followed_and_changed_settings_are_refused(spark, tmp_path, monkeypatch):
    import numpy as np
    from scenes_for_tests import position_image, write_scene

    from sattile import pipeline
    from sattile.errors import UsageError

    seen = []
    for name in ("training:train", "evaluation:evaluate", "prediction:predict", "reporting:report"):
        module, _, function = name.partition(":")
        monkeypatch.setattr(
            f"sattile.{module}.{function}", lambda *_, _name=function, **given: seen.append((_name, given))
        )
    write_scene(tmp_path / "scenes" / "a.tif", position_image(64, 96, 2))
    write_scene(tmp_path / "l.tif", np.ones((1, 64, 96), np.uint8))
    given = {"scenes": [str(tmp_path / "scenes")], "labels": str(tmp_path / "l.tif"), "out": str(tmp_path / "out")}
    steps = {"tile": {"size": 32, "fractions": "1,0,0"}}
    pipeline.run(spark, **given, settings=steps)
    assert all(options["overwrite"] for name, options in seen if name != "report")
    with pytest.raises(UsageError, match="made with other settings"):
        pipeline.run(spark, **given, settings={"tile": {"size": 48, "fractions": "1,0,0"}})


def test_where_all_scenes_are_refused_that_is_the_reason(spark, tmp_path):
    """And not that the next step finds no dataset."""
    import numpy as np
    from scenes_for_tests import position_image, write_scene

    from sattile.errors import TooManyRefused

    write_scene(tmp_path / "scenes" / "a.tif", position_image(64, 96, 2))
    write_scene(tmp_path / "labels" / "b.tif", np.ones((1, 64, 96), np.uint8))
    with pytest.raises(TooManyRefused, match=r"1 of 1 scenes were refused.*tiles/_quarantine\.parquet says why"):
        pipeline.run(
            spark, scenes=[str(tmp_path / "scenes")], labels=str(tmp_path / "labels"), out=str(tmp_path / "out"),
            classes="land,water", settings={"tile": {"size": 32}},
        )  # fmt: skip


def few_shapes(folder, classes: int = 4, each: int = 3):
    """A scene of 260 x 412 px, and so many squares of 7 px of each class, 50 px apart, with values of their own."""
    import geopandas
    import numpy as np
    import shapely
    from scenes_for_tests import write_scene

    rng = np.random.default_rng(0)
    image = rng.integers(90, 110, (2, 260, 412)).astype(np.uint16)
    kinds, shapes = [], []
    for number in range(classes * each):
        kind, top, left = number % classes, 20 + 56 * (number // 7), 12 + 57 * (number % 7)
        image[:, top - 4 : top + 12, left - 4 : left + 12] = rng.integers(0, 12, (2, 16, 16)) + 40 * kind + 200
        image[1, top - 4 : top + 12, left - 4 : left + 12] -= np.uint16(35 * (kind % 2))
        kinds.append(f"kind {kind}")
        west, north = 600_000 + 10 * left, 5_000_000 - 10 * top
        shapes.append(shapely.box(west, north - 70, west + 70, north))
    # One more class, with a single shape.
    kinds.append("lone")
    shapes.append(shapely.box(603_700, 4_997_450, 603_790, 4_997_550))
    write_scene(folder / "scenes" / "a.tif", image)
    geopandas.GeoDataFrame({"kind": kinds}, geometry=shapes, crs=32632).to_file(folder / "l.gpkg")
    return {"scenes": [str(folder / "scenes")], "labels": str(folder / "l.gpkg"), "out": str(folder / "out")}


def test_on_few_shapes_a_network_of_pixels_is_trained_and_measured_on_all_that_were_left_out(
    spark, tmp_path, monkeypatch, caplog
):
    import functools
    import importlib
    import json

    seen = []
    for name in ("training:train", "evaluation:evaluate", "prediction:predict", "reporting:report"):
        module, _, function = name.partition(":")
        real = getattr(importlib.import_module(f"sattile.{module}"), function)

        @functools.wraps(real)  # its options are those that may be set
        def noted(*_, _name=function, **given):
            seen.append((_name, given))

        monkeypatch.setattr(f"sattile.{module}.{function}", noted)
    given = few_shapes(tmp_path)
    settings = {"tile": {"attribute": "kind"}}
    with caplog.at_level("INFO", "sattile"):
        pipeline.run(spark, **given, settings=settings)
    told = {"arch": "pixel-mlp", "epochs": 100, "batch_size": 4, "class_weights": "balanced", "keep": "last"}
    asked = dict(seen)
    assert {name: asked["train"][name] for name in told} == told
    assert asked["evaluate"]["split"] == "val,test"
    assert "few shapes: training with arch pixel-mlp, epochs 100" in caplog.text
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["train"] == told
    # What the user says goes before.
    seen.clear()
    settings["train"] = {"arch": "unet-tiny", "patience": 3, "workers": 2}
    pipeline.run(spark, **given, settings=settings, overwrite=True)
    asked = dict(seen)
    assert (asked["train"]["arch"], asked["train"]["epochs"], asked["train"]["patience"]) == ("unet-tiny", 100, 3)
    assert not {"batch_size", "keep"} & asked["train"].keys()
