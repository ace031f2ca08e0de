"""Which engine runs a network, and in which precision: what the workers' CPUs do decides, and one choice is kept."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scenes_for_tests import position_image, write_scene

from sattile import processors, scorers, storage
from sattile.doctor import doctor
from sattile.errors import UsageError
from sattile.model import Bundle, load_bundle, save_bundle
from sattile.prediction import predict
from sattile.processors import choose
from sattile.schema import SegmentClass
from sattile.scorers import Cpu
from sattile.training import networks

pytest.importorskip("openvino")

BANDS = ["red", "nir"]
CLASSES = (SegmentClass(0, "land", "#ddcc77"), SegmentClass(1, "water", "#332288"))
NEW, OLD = Cpu("New 1", True), Cpu("Old 2", False)


@pytest.fixture(scope="module")
def network() -> Any:
    statistics = {band: {"mean": 1000.0, "std": 300.0} for band in BANDS}
    return networks.build("unet-tiny", bands=BANDS, classes=["land", "water"], statistics=statistics, size=64)


@pytest.fixture
def bundle(network: Any, tmp_path: Path) -> Bundle:
    """As bundles of before are: compared in bfloat16 alone."""
    url = str(tmp_path / "model")
    save_bundle(url, network, bands=BANDS, classes=CLASSES, fill=[1000] * 2)
    described = storage.read_json(f"{url}/bundle.json")
    described["openvino"] |= {"agreement": 0.9995, "pixels": 4000, "version": "2026.4", "precision": "bf16"}
    storage.write_json(f"{url}/bundle.json", described)
    return load_bundle(url)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that the executors run on these kinds of CPU, and that engines were measured there so fast."""

    def pretend(*cpus: Cpu, speeds: dict[str, tuple[float, float]] | None = None) -> list[str]:
        asked: list[str] = []

        def measure(spark: Any, bundle: Any, kinds: set[str], precision: str, threads: int) -> Any:
            asked.append(precision)
            known = speeds or {}
            return {kind: dict(zip(("tensorflow", "openvino"), known[kind], strict=True)) for kind in kinds}

        monkeypatch.setattr(processors, "cpus", lambda _: tuple(cpus))
        if speeds is not None:
            monkeypatch.setattr(processors, "_measure_on", measure)
        return asked

    return pretend


def chosen(choice: processors.Choice) -> tuple[str, str]:
    return choice.engine, choice.precision


def test_bfloat16_only_where_all_cpus_have_it(spark, bundle, on):
    asked = on(NEW, speeds={str(NEW): (1.0, 4.0)})
    assert chosen(choose(spark, bundle)) == ("openvino", "bfloat16")
    asked += on(OLD, speeds={str(OLD): (1.0, 1.3)})
    assert chosen(choose(spark, bundle)) == ("openvino", "float32")
    mixed = on(NEW, OLD, speeds={str(NEW): (1.0, 1.2), str(OLD): (1.0, 1.3)})
    assert chosen(choose(spark, bundle)) == ("openvino", "float32")
    assert mixed == ["float32"]  # of the new ones; the old ones were measured in it before
    assert asked == ["bfloat16"]


def test_never_an_engine_that_was_measured_to_be_slower(spark, bundle, on):
    on(OLD, speeds={str(OLD): (2.1, 0.7)})
    choice = choose(spark, bundle)
    assert chosen(choice) == ("tensorflow", "float32")
    assert "0.33 times TensorFlow" in choice.why
    assert choice.describe()["mpix_per_s"] == {str(OLD): {"tensorflow": 2.1, "openvino": 0.7}}
    # Faster on the whole, and yet too slow on one kind.
    on(OLD, Cpu("Third", False), speeds={"Third (without bfloat16)": (1.0, 9.0)})
    assert chosen(choose(spark, bundle)) == ("tensorflow", "float32")
    assert choose(spark, bundle).why == "OpenVINO measured 0.33 times TensorFlow"


def test_what_was_measured_is_kept_beside_the_record_and_on_the_card(spark, bundle, on):
    asked = on(OLD, speeds={str(OLD): (1.0, 1.25)})
    first = choose(spark, bundle)
    assert choose(spark, bundle) == first
    assert len(asked) == 1
    (key,) = storage.read_json(f"{bundle.url}/speeds.json")["speeds"]
    assert key.startswith("Old 2 (without bfloat16); 1 thread; float32; tensorflow")
    card = Path(bundle.url, "README.md").read_text()
    assert "| Old 2 (without bfloat16); 1 thread; float32;" in card
    assert "| 1.00 | 1.25 |" in card
    choose(spark, bundle, threads=2)
    assert len(asked) == 2  # more threads are another measurement


def test_what_was_measured_of_another_network_is_not_used(spark, bundle, network, on):
    asked = on(OLD, speeds={str(OLD): (1.0, 1.25)})
    choose(spark, bundle)
    choose(spark, dataclasses.replace(bundle, digest="another"))
    assert len(asked) == 2


@pytest.mark.parametrize(
    "content", ["[]", "null", "5", "{", '{"network": "D", "speeds": {"x": {"tensorflow": "1", "openvino": null}}}']
)
def test_odd_records_of_speeds_are_measured_anew(spark, bundle, on, content):
    asked = on(OLD, speeds={str(OLD): (1.0, 1.25)})
    Path(bundle.url, "speeds.json").write_text(content.replace('"D"', f'"{bundle.digest}"'))
    assert choose(spark, bundle).speeds == {str(OLD): {"tensorflow": 1.0, "openvino": 1.25}}
    assert len(asked) == 1
    assert "| 1.00 | 1.25 |" in Path(bundle.url, "README.md").read_text()


def test_what_somebody_wrote_in_a_card_stays(spark, bundle, on):
    on(OLD, speeds={str(OLD): (1.0, 1.25)})
    path = Path(bundle.url, "README.md")
    path.write_text(path.read_text() + "\n## Our licence\n")
    before = path.read_text()
    choose(spark, bundle)
    assert [one for one in path.read_text().split("## ") if not one.startswith("Engines")] == [
        one for one in before.split("## ") if not one.startswith("Engines")
    ]
    assert "| 1.00 | 1.25 |" in path.read_text()
    assert Path(bundle.url, "speeds.json").exists()


def test_a_dry_run_and_wrong_arguments_write_nothing(spark, bundle, on, tmp_path):
    write_scene(tmp_path / "in" / "a.tif", position_image(70, 110, 2), names=tuple(BANDS))
    asked = on(OLD, speeds={str(OLD): (1.0, 1.25)})
    options = {"model": bundle.url, "scenes": [str(tmp_path / "in")], "out": str(tmp_path / "out")}
    with pytest.raises(UsageError):
        predict(spark, **options, size=7)
    assert not asked
    predict(spark, **options, dry_run=True)
    assert not Path(bundle.url, "speeds.json").exists()


def test_a_precision_limits_what_auto_chooses_from(spark, bundle, on):
    on(NEW, speeds={str(NEW): (4.0, 1.0)})
    assert chosen(choose(spark, bundle, "auto", "float32")) == ("tensorflow", "float32")
    assert chosen(choose(spark, bundle, "auto", "bfloat16")) == ("openvino", "bfloat16")
    poor = dataclasses.replace(bundle, openvino=bundle.openvino | {"agreement": 0.9, "float32": {"agreement": 1.0}})
    with pytest.raises(UsageError, match=r"in bfloat16 \(90.000 %\): --engine openvino"):
        choose(spark, poor, "auto", "bfloat16")


def test_a_kind_that_was_not_reached_is_named(spark, bundle, on, monkeypatch):
    on(OLD, Cpu("Third", False))
    monkeypatch.setattr(processors, "_measure_on", lambda *_: {str(OLD): {"tensorflow": 1.0, "openvino": 4.0}})
    choice = choose(spark, bundle)
    assert chosen(choice) == ("tensorflow", "float32")
    assert choice.why == "the engines could not be measured on Third (without bfloat16)"


def test_a_folder_keeps_an_engine_that_auto_would_not_take(spark, bundle, on, tmp_path):
    """Of networks from elsewhere no labels were compared."""
    write_scene(tmp_path / "in" / "a.tif", position_image(70, 110, 2), names=tuple(BANDS))
    described = storage.read_json(f"{bundle.url}/bundle.json")
    del described["openvino"]["agreement"]
    storage.write_json(f"{bundle.url}/bundle.json", described)
    options = {"model": bundle.url, "scenes": [str(tmp_path / "in")], "out": str(tmp_path / "out")}
    on(NEW)
    predict(spark, **options, engine="openvino")
    predict(spark, **options)
    assert storage.read_json(str(tmp_path / "out" / "_run.json"))["skipped"] == 1


def test_too_few_equal_labels_in_one_precision_leave_the_other(spark, bundle, on):
    on(NEW, speeds={str(NEW): (1.0, 1.5)})
    said = bundle.openvino | {"agreement": 0.99, "bfloat16": {"agreement": 0.99}}
    both = dataclasses.replace(bundle, openvino=said | {"float32": {"agreement": 1.0}})
    assert chosen(choose(spark, both)) == ("openvino", "float32")
    neither = dataclasses.replace(bundle, openvino=said | {"float32": {"agreement": 0.99}})
    assert chosen(choose(spark, neither)) == ("tensorflow", "float32")


def test_openvino_that_was_asked_for_takes_what_the_cpus_have(spark, bundle, on, caplog):
    caplog.set_level(logging.WARNING, "sattile")
    on(OLD)
    assert chosen(choose(spark, bundle, "openvino")) == ("openvino", "float32")
    assert not caplog.text
    assert chosen(choose(spark, bundle, "openvino", "bfloat16")) == ("openvino", "bfloat16")
    assert "emulates it, which is slow" in caplog.text
    on(NEW)
    assert chosen(choose(spark, bundle, "openvino")) == ("openvino", "bfloat16")
    assert chosen(choose(spark, bundle, "openvino", "float32")) == ("openvino", "float32")
    assert chosen(choose(spark, bundle, "tensorflow")) == ("tensorflow", "float32")
    with pytest.raises(UsageError, match="engine tensorflow computes in float32"):
        choose(spark, bundle, "tensorflow", "bfloat16")
    with pytest.raises(UsageError, match="use float32, bfloat16"):
        choose(spark, bundle, precision="int8")


def test_a_folder_keeps_what_it_began_with(spark, bundle, on, tmp_path, caplog):
    """One engine and one precision for all of its maps, whatever nodes tonight's run gets."""
    names = tuple(BANDS)
    write_scene(tmp_path / "in" / "a.tif", position_image(70, 110, 2), names=names)
    out = str(tmp_path / "out")
    on(NEW, speeds={str(NEW): (1.0, 4.0)})
    predict(spark, model=bundle.url, scenes=[str(tmp_path / "in")], out=out)
    record = storage.read_json(f"{out}/_run.json")
    assert record["engine"]["precision"] == "bfloat16"
    assert record["engine"]["mpix_per_s"] == {str(NEW): {"tensorflow": 1.0, "openvino": 4.0}}
    assert "precision" not in record["settings"]  # as it was before there was a choice
    write_scene(tmp_path / "in" / "b.tif", position_image(60, 80, 2), names=names)
    caplog.set_level(logging.WARNING, "sattile")
    on(OLD, speeds={})
    predict(spark, model=bundle.url, scenes=[str(tmp_path / "in")], out=out)
    record = storage.read_json(f"{out}/_run.json")
    assert (record["done"], record["skipped"]) == (1, 1)
    assert "made in bfloat16, which Old 2 (without bfloat16) emulates" in caplog.text
    predict(spark, model=bundle.url, scenes=[str(tmp_path / "in")], out=out, precision="float32", engine="openvino",
            overwrite=True)  # fmt: skip
    record = storage.read_json(f"{out}/_run.json")
    assert (record["done"], record["settings"]["precision"]) == (2, "float32")
    predict(spark, model=bundle.url, scenes=[str(tmp_path / "in")], out=out)
    assert storage.read_json(f"{out}/_run.json")["skipped"] == 2


def test_a_real_measurement_on_this_cpu(spark, bundle, capsys):
    """Both engines run in a process of their own; the worker's memory and the driver stay free of them."""
    choice = choose(spark, bundle)
    (speeds,) = choice.speeds.values()
    assert set(speeds) == {"tensorflow", "openvino"}
    assert min(speeds.values()) > 0
    faster = "openvino" if speeds["openvino"] >= speeds["tensorflow"] else "tensorflow"
    assert choice.engine == faster
    doctor(spark, model=bundle.url)
    told = capsys.readouterr().out
    assert f"{choice.engine} in {choice.precision}: measured" in told or choice.engine == "tensorflow"
    assert str(scorers.cpu()) in told


def test_a_network_that_can_not_be_measured_runs_by_tensorflow(spark, bundle, on, caplog):
    caplog.set_level(logging.WARNING, "sattile")
    Path(bundle.url, "openvino", "model.bin").write_bytes(b"damaged")
    choice = choose(spark, bundle)
    assert chosen(choice) == ("tensorflow", "float32")
    assert "could not be measured" in choice.why
    assert "could not be measured" in caplog.text
    assert not Path(bundle.url, "speeds.json").exists()


@pytest.mark.parametrize(
    ("flags", "native"),
    [("fpu avx512f avx512_bf16", True), ("avx512f amx_bf16 amx_tile", True), ("fpu avx2 avx512f avx512_vnni", False)],
)
def test_bfloat16_is_what_the_cpu_says_and_not_openvino_alone(monkeypatch, flags, native):
    text = f"processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: {flags}\n"
    monkeypatch.setattr(Path, "read_text", lambda *_: text)
    monkeypatch.setattr(scorers, "openvino_has_bfloat16", lambda: True)
    assert scorers.cpu.__wrapped__() == Cpu("Some CPU @ 2 GHz", native)
    monkeypatch.setattr(scorers, "openvino_has_bfloat16", lambda: False)
    assert not scorers.cpu.__wrapped__().bfloat16


SCRIPT = """
import json, os, sys
from sattile import engine, processors
from sattile.model import load_bundle

if __name__ == "__main__":
    conf = {"spark.executor.memory": "512m", "spark.executorEnv.PYTHONPATH": os.environ["PYTHONPATH"]}
    spark = engine.session("local-cluster[2,1,1024]", conf=conf)
    print(json.dumps(processors.choose(spark, load_bundle(sys.argv[1])).describe()))
    spark.stop()
"""


@pytest.mark.cluster
def test_executors_say_what_they_are_and_measure(bundle, tmp_path):
    (tmp_path / "choose.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, str(tmp_path / "choose.py"), bundle.url], env=environment,
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.strip().splitlines()[-1])
    assert said["cpus"] == [str(scorers.cpu())]
    (speeds,) = said["mpix_per_s"].values()
    assert min(speeds.values()) > 0
    assert set(speeds) == {"tensorflow", "openvino"}
    assert Path(bundle.url, "speeds.json").exists()
