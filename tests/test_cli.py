"""The command line: help that helps, exit statuses of the contract."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sattile import cli, config, errors

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sattile.cli", *arguments], capture_output=True, text=True, check=False, timeout=300
    )


def test_the_overview_names_every_command(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in config.COMMANDS)


@pytest.mark.parametrize("name", list(config.COMMANDS))
def test_help_shows_an_example_that_parses(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    command = config.COMMANDS[name]
    assert command.example in shown
    words = shlex.split(command.example)
    assert words[:2] == ["sattile", name]
    parsed = cli.parser(command).parse(words[2:])
    required = [option.name for option in command.options() if option.required]
    assert all(parsed.get(option) for option in required)


@pytest.mark.parametrize("name", list(config.COMMANDS))
def test_every_command_is_a_job(name):
    done = subprocess.run(
        [sys.executable, str(ROOT / "jobs" / f"{name}.py"), "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert f"usage: sattile {name}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predikt"], "'predikt' is no command; did you mean predict?"),
        (["predict"], "`sattile predict` needs --model, --scenes, --out"),
        (["tile", "--sise", "3"], "--sise is no option; did you mean --size?"),
        (["predict", "scene.tif", "--model", "m"], "what is scene.tif?"),
        (["--conf", "c.yaml", "predict"], "the command comes first: sattile predict --conf"),
        (["tile", "--size", "big"], "invalid int value: 'big'"),
        (["index", "x", "--out", "o", "--set", "index.bandz=a"], "did you mean index.bands?"),
        (["index", "x", "--out", "o", "--conf", "nowhere.yaml"], "does not exist"),
        (
            ["reprocess", "--model", "m", "--scenes", "s", "--out", "o", "--set", "train.epochs=3"],
            "takes no settings of train, only of reprocess, index, predict, report",
        ),
    ],
)
def test_wrong_usage_is_2_and_says_what_is_wrong(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_and_what_has_to_be_given(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for text in ("(default: unet-small)", "never does (default: 0)", "jitter (default: on)", "wrote (required)"):
        assert text in shown
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    assert "--settings" not in capsys.readouterr().out  # only Python can give a mapping


def test_scenes_may_stand_before_and_after_options():
    parsed = cli.parser(config.COMMANDS["index"]).parse(["a.tif", "--out", "o", "b.tif", "--nodata", "-9999"])
    assert parsed == {"scenes": ["a.tif", "b.tif"], "out": "o", "nodata": -9999.0}


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), "free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/out"), "choose another --out"),
        (OSError(errno.EROFS, "Read-only file system", "/out"), "can be written"),
    ],
)
def test_the_systems_errors_say_what_to_do(error, hint, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("sattile.reporting.report", fail)
    monkeypatch.setattr(config.Command, "options", lambda _: [])
    assert cli.main(["report"]) == 1
    shown = capsys.readouterr().err
    assert str(error) in shown
    assert hint in shown
    assert "Traceback" not in shown


def test_statuses_of_a_real_run(tmp_path):
    from scenes_for_tests import position_image, write_scene

    for index in range(3):
        write_scene(tmp_path / "scenes" / f"s{index}.tif", position_image(40, 60, 2))
    (tmp_path / "scenes" / "s1.tif").write_bytes(b"II*\0 not a TIFF")
    scenes, out = str(tmp_path / "scenes" / "*.tif"), str(tmp_path / "catalog")
    missing = call("index", str(tmp_path / "nowhere.tif"), "--out", out, "--master", "local[1]")
    assert missing.returncode == 2
    assert "nowhere.tif" in missing.stderr
    assert "Traceback" not in missing.stderr
    refused = call("index", scenes, "--out", out, "--master", "local[1]")
    assert refused.returncode == 3, refused.stderr
    assert "s1.tif" in refused.stderr
    assert (tmp_path / "catalog" / "scenes.parquet").exists()
    allowed = call("index", scenes, "--out", out, "--master", "local[1]", "--max-failed-fraction", "0.5")
    assert allowed.returncode == 0, allowed.stderr
    assert allowed.stdout.strip().startswith(out)


@pytest.mark.parametrize("place", ["in a Spark job", "in Python"])
def test_an_interrupt_ends_the_job_and_is_said(place):
    """Ctrl-C goes to the whole process group, as a terminal sends it."""
    work = "spark.sparkContext.parallelize(range(2), 2).foreach(sleep)" if place == "in a Spark job" else "sleep(0)"
    code = f"""
import sys, time, types, sattile.config as config
from sattile import cli
def sleep(_): time.sleep(60)
def wait(spark):
    print("ready", flush=True)
    {work}
command = config.Command("wait", "", "wait", "")
config.Command.function = lambda self: wait
config.COMMANDS["wait"] = command
sys.exit(cli.main(["wait", "--master", "local[2]"]))
"""
    job = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    time.sleep(3)
    os.killpg(job.pid, signal.SIGINT)
    _, said = job.communicate(timeout=30)
    assert job.returncode == 130, said
    assert said.strip() == ("sattile: interrupted; what is published is whole, and the next run goes on from there")


def test_spark_submit_runs_a_job_and_returns_its_status(tmp_path):
    from scenes_for_tests import position_image, write_scene

    write_scene(tmp_path / "a b.tif", position_image(40, 60, 2))
    submit = [str(ROOT / "spark-submit.sh"), "local[1]", "jobs/index.py"]
    done = subprocess.run(
        [*submit, str(tmp_path / "a b.tif"), "--out", str(tmp_path / "out")],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "scenes.parquet").exists()
    wrong = subprocess.run([*submit, "--out", str(tmp_path / "o")], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2


def test_values_below_zero_are_values():
    found = cli.parser(config.COMMANDS["tile"]).parse(["--nodata", "-3.4028235e+38", "--scenes", "a"])
    assert found["nodata"] == -3.4028235e38
    found = cli.parser(config.COMMANDS["predict"]).parse(
        ["--rescale", "-1,-1000", "--fill", "-.5,-1e3", "--threshold", "-2"]
    )
    assert (found["rescale"], found["fill"], found["threshold"]) == ("-1,-1000", "-.5,-1e3", -2.0)


def test_a_full_disk_in_a_task_is_told_with_the_remedy():
    text = """An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "files.py", line 1, in upload
OSError: [Errno 28] No space left on device: '/out/.labels.tif.1234'

\tat org.apache.spark.api.python.BasePythonRunner$ReaderIterator.handlePythonException(PythonRunner.scala:581)"""
    said = errors.said_by_task(text)
    assert str(said).startswith("a task says: No space left on device: '/out/.labels.tif.1234'; free some space there")
    assert errors.said_by_task(text.replace("28", "99")) is None
