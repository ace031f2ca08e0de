"""One bad thing costs itself: whatever a scene raises, the others are published; outages end the job."""

from __future__ import annotations

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scenes_for_tests import position_image, write_scene

import sattile
from sattile import engine, errors
from sattile.errors import Outage, Refused, SattileError, TooManyRefused, UsageError, refusal

NAMES = ("x", "y")


def raised(kind: type[Exception], *arguments: Any) -> Exception:
    """An exception as it is caught: with a traceback."""
    try:
        raise kind(*arguments)
    except Exception as error:
        return error


# --- the rule ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Refused("is no raster"), "is no raster"),
        (SattileError("a.json is not JSON"), "a.json is not JSON"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be read: Permission denied; grant the right"),
        (FileNotFoundError("hdfs:///a.tif does not exist"), "cannot be read: hdfs:///a.tif does not exist"),
        (OSError(errno.EIO, "Input/output error", "/a.tif"), "cannot be read: Input/output error"),
    ],
)
def test_what_was_foreseen_is_told_in_its_own_words(error, reason):
    assert refusal(error).reason.startswith(reason)
    assert errors.unforeseen(refusal(error).reason) is None


def test_what_nobody_foresaw_is_told_with_type_and_place(as_in_production, caplog):
    caplog.set_level("DEBUG", "sattile")
    told = [refusal(raised(KeyError, name)).reason for name in ("a\nb", "c")]
    assert told[0].startswith("unexpected KeyError: 'a\\nb' (test_faults.py, line ")
    assert "please report it" in told[0]
    assert len({errors.unforeseen(one) for one in told}) == 1
    assert errors.unforeseen(refusal(raised(ValueError, "c")).reason) != errors.unforeseen(told[1])
    assert "Traceback" in caplog.text
    assert caplog.text.count("KeyError: 'c'") == 0  # the same as the first: its traceback is there already


def test_in_tests_it_is_raised():
    with pytest.raises(KeyError, match="a"):
        refusal(raised(KeyError, "a"))


@pytest.mark.parametrize(
    "error",
    [
        UsageError("no such setting"), Outage("HDFS did not answer for 90 s"), MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"), OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"), ConnectionRefusedError(errno.ECONNREFUSED, "refused"),
        TimeoutError(errno.ETIMEDOUT, "timed out"), OSError(errno.ENETUNREACH, "Network is unreachable"),
    ],
    ids=repr,
)  # fmt: skip
def test_outages_and_wrong_usage_are_no_refusals(as_in_production, error):
    with pytest.raises(type(error)) as caught:
        refusal(error)
    assert caught.value is error


def test_outages_of_other_packages_are_known(as_in_production):
    import requests
    import tensorflow as tf

    for error in (
        requests.ConnectionError("x"),
        tf.errors.ResourceExhaustedError(None, None, "OOM"),
        pa.ArrowMemoryError(),
    ):
        with pytest.raises(type(error)):
            refusal(error)


def test_labels_are_named_in_whatever_is_raised_of_them(as_in_production):
    with pytest.raises(Refused, match=r"^labels /l\.tif: is empty$"), errors.about("labels /l.tif"):
        raise Refused("is empty")
    with pytest.raises(Refused, match=r"^values of labels /l\.tif are$"), errors.about("labels /l.tif"):
        raise Refused("values of labels /l.tif are")
    with pytest.raises(IndexError) as caught, errors.about("labels /l.tif"):
        raise IndexError("3")
    assert refusal(caught.value).reason.startswith("labels /l.tif: unexpected IndexError: 3 (")


# --- a scene that raises what nobody foresaw, in every command -------------------------------------------------------


@pytest.fixture(scope="module")
def archive(spark: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, `two`, `three`: labels by the parity of rows; a catalogue of them."""
    folder = tmp_path_factory.mktemp("archive")
    for number, name in enumerate(("one", "two", "three")):
        place = {"west": 600_000 + 20_000 * number}
        write_scene(folder / "scenes" / f"{name}.tif", position_image(80, 110, 2), names=NAMES, **place)
        labels = (np.indices((80, 110))[0] % 2).astype(np.uint8)
        write_scene(folder / "labels" / f"{name}.tif", labels[None], **place)
    sattile.index(spark, str(folder / "scenes"), out=str(folder / "catalog"))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The larger band is the class."""
    import keras

    from sattile.model import bundle

    folder = tmp_path_factory.mktemp("model")
    given = keras.Input((None, None, 2))
    keras.Model(given, keras.layers.Activation("linear")(given)).save(folder / "identity.keras")
    return bundle(str(folder / "identity.keras"), bands="x,y", classes="even,odd", out=str(folder / "bundle"),
                  activation="none")  # fmt: skip


def edited(archive: Path, out: Path, *names: str) -> str:
    """The archive's catalogue, in which someone wrote a text for the missing value of these scenes' bands."""
    out.mkdir()
    table = pq.read_table(archive / "catalog" / "scenes.parquet")
    scenes = [json.loads(text) for text in table.column("scene").to_pylist()]
    for scene in scenes:
        for band in scene["bands"] if scene["scene_id"] in names else ():
            band |= {"nodata": "none", "forced": True}
    column = pa.array([json.dumps(scene) for scene in scenes])
    pq.write_table(table.set_column(table.schema.get_field_index("scene"), "scene", column), out / "scenes.parquet")
    return str(out)


OPTIONS: dict[str, dict[str, Any]] = {
    "index": {},
    "tile": {"size": 32, "split": "scene", "fractions": "1,0,0", "buffer": 0, "classes": "even,odd"},
    "evaluate": {"engine": "tensorflow"},
    "predict": {"engine": "tensorflow"},
    "grid": {"engine": "tensorflow", "grid": "EPSG:32632@10", "sheet": 2048},
}


def run(command: str, spark: Any, archive: Path, model: str, scenes: str, out: Path, **options: Any) -> None:
    options = {"out": str(out), **OPTIONS[command], **options}
    if command in ("tile", "evaluate"):
        options["labels"] = str(archive / "labels")
    if command in ("evaluate", "predict", "grid"):
        options["model"] = model
    getattr(sattile, "predict" if command == "grid" else command)(spark, scenes=[scenes], **options)


def published(command: str, out: Path) -> set[str]:
    """Names of the scenes that a command's result holds."""
    if command == "index":
        return set(pq.read_table(out / "scenes.parquet").column("scene_id").to_pylist())
    if command == "tile":
        return {row for path in out.glob("*/part-*") for row in pq.read_table(path).column("scene_id").to_pylist()}
    if command == "evaluate":
        return set(json.loads((out / "metrics.json").read_text())["scenes"])
    if command == "predict":
        return {path.parent.name for path in out.glob("*/item.json")}
    items = [json.loads(path.read_text()) for path in out.glob("*/item.json")]
    links = [link["href"] for item in items for link in item["links"] if link["rel"] == "derived_from"]
    return {Path(link).stem for link in links}


COMMANDS = ("index", "tile", "evaluate", "predict", "grid")


@pytest.mark.parametrize("command", COMMANDS)
def test_one_scene_that_raises_costs_that_scene(spark, archive, model, tmp_path, as_in_production, command):
    scenes, out = edited(archive, tmp_path / "edited", "two"), tmp_path / "out"
    with pytest.raises(TooManyRefused, match=r"^1 of 3 scenes were refused.*; the reason: \S*two\.tif: unexpected "):
        run(command, spark, archive, model, scenes, out)
    assert published(command, out) == {"one", "three"}
    (row,) = pq.read_table(out / "_quarantine.parquet").to_pylist()
    assert Path(row["url"]).name == "two.tif"
    kind, place = ("ArrowInvalid", "scenes.py") if command == "index" else ("TypeError", "raster.py")
    assert str(errors.unforeseen(row["reason"])).startswith(f"{kind} ({place}, line ")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_all_scenes_raise_is_not_their_fault(spark, archive, model, tmp_path, as_in_production, command):
    scenes, out = edited(archive, tmp_path / "edited", "one", "two", "three"), tmp_path / "out"
    with pytest.raises(SattileError, match="all 3 scenes were refused, 3 of them by the same error") as caught:
        run(command, spark, archive, model, scenes, out, max_failed_fraction=1.0)
    assert caught.value.exit_status == 1
    assert "sattile's own fault or that of its environment" in str(caught.value)
    assert "one.tif: unexpected " in str(caught.value)
    assert len(pq.read_table(out / "_quarantine.parquet")) == 3


def test_a_test_finds_it_in_spark_and_in_the_decoder(spark, archive, model, tmp_path):
    scenes = edited(archive, tmp_path / "edited", "two")
    with pytest.raises(Exception, match="TypeError: must be real number, not str"):
        run("predict", spark, archive, model, scenes, tmp_path / "out")


def test_a_single_scene_is_no_pattern(spark, archive, model, tmp_path, as_in_production):
    table = edited(archive, tmp_path / "edited", "one")
    kept = pq.read_table(f"{table}/scenes.parquet")
    sink = io.BytesIO()
    pq.write_table(kept.filter(pa.compute.equal(kept.column("scene_id"), "one")), sink)
    Path(table, "scenes.parquet").write_bytes(sink.getvalue())
    with pytest.raises(TooManyRefused, match="1 of 1 scenes were refused"):
        run("predict", spark, archive, model, table, tmp_path / "out")


def test_no_scene_left_says_why(spark, archive, tmp_path):
    empty = tmp_path / "labels"
    write_scene(empty / "other.tif", np.zeros((1, 80, 110), np.uint8))
    with pytest.raises(UsageError, match=r"no scene is left to tile; .*; the reason: \S*one\.tif: no labels: "):
        sattile.tile(
            spark, scenes=[str(archive / "scenes")], labels=str(empty), out=str(tmp_path / "out"), size=32,
            max_failed_fraction=1.0,
        )  # fmt: skip


# --- sessions -----------------------------------------------------------------------------------------------------


def of_spark_connect() -> Any:
    return type("SparkSession", (), {"__module__": "pyspark.sql.connect.session"})()


@pytest.mark.parametrize(
    ("session", "says"),
    [
        (lambda: None, "None is no Spark session"),
        (lambda: "scenes/*.tif", "'scenes/.*' is no Spark session"),
        (of_spark_connect, "Spark Connect"),
    ],
)
@pytest.mark.parametrize("name", ["index", "tile", "train", "evaluate", "predict", "run", "reprocess", "search"])
def test_what_is_no_session_is_told_in_a_line(name, session, says):
    from sattile.pipeline import reprocess
    from sattile.pipeline import run as run_all
    from sattile.training.search import search

    calls: dict[str, Callable[[Any], Any]] = {
        "index": lambda spark: sattile.index(spark, "s", out="o"),
        "tile": lambda spark: sattile.tile(spark, scenes=["s"], labels="l", out="o"),
        "train": lambda spark: sattile.train(spark, dataset="d", out="o"),
        "evaluate": lambda spark: sattile.evaluate(spark, model="m", dataset="d", out="o"),
        "predict": lambda spark: sattile.predict(spark, model="m", scenes=["s"], out="o"),
        "run": lambda spark: run_all(spark, scenes=["s"], labels="l", out="o"),
        "reprocess": lambda spark: reprocess(spark, model="m", scenes=["s"], out="o"),
        "search": lambda spark: search(spark, dataset="d", grid={"arch": ["unet-small"]}, out="o"),
    }
    with pytest.raises(UsageError, match=says):
        calls[name](session())


def test_a_stopped_session_is_told_in_a_line(tmp_path):
    """In a process of its own: a process has one session."""
    import subprocess
    import sys

    code = (
        "import sattile, sattile.errors\n"
        "spark = sattile.session('local[1]')\n"
        "spark.stop()\n"
        "try:\n    sattile.index(spark, 'a.tif', out='o')\n"
        "except sattile.errors.UsageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "the Spark session was stopped: make a new one, such as sattile.session()\n", done.stderr


def test_a_working_folder_that_is_gone_is_told(tmp_path, monkeypatch, capsys):
    from sattile import cli

    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["index", "a.tif", "--out", "o"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("sattile: the working folder was removed: cd to a folder that exists")
    assert said.count("\n") == 1
    with pytest.raises(UsageError, match="working folder"):
        engine.check_working_folder()
