"""Folders that earlier code made, as users have them: found done by this code, with nothing in them made anew.

`fixtures/folders/README.md` says what they are; `folders_for_tests` moves them to where the test has them.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from pathlib import Path
from typing import Any

# Before TensorFlow starts; test_model says why.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
from folders_for_tests import COMMANDS, FOLDER, INPUTS, ROOT, TIME, command, move, no_roots, set_times

import sattile

ADDED: tuple[str, ...] = ("*/labels.tif.aux.xml", "*/labels.qml")
"""What later code writes beside what was there, as patterns of its path (`*/labels.qml`): each may be new, nothing else
may."""

AMENDED = ("sheets/labels.vrt",)
"""What later code says more in, without inference: the names of the classes."""

WRITTEN = ("*/_run.json", "*/report/*")
"""What each run writes. Reports are left out of the fixture: they tell of all the rest, and cost nothing."""


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """All folders, and their inputs, as if they had been made where they are."""
    folder = tmp_path / "folders"
    folder.mkdir()
    for name in (*INPUTS, *COMMANDS):
        copy = shutil.copytree if (FOLDER / name).is_dir() else shutil.copy
        copy(FOLDER / name, folder / name)
    set_times(folder)
    move(folder, ROOT, str(folder))
    return folder


def again(spark: Any, folders: Path, name: str, **other: Any) -> None:
    which, options = command(name, str(folders))
    getattr(sattile, which)(spark, **options | other)


def state(folders: Path) -> dict[str, tuple[bytes, int]]:
    """{path: content, time} of all files."""
    return {
        str(path.relative_to(folders)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folders.rglob("*"))
        if path.is_file()
    }


def changed(before: dict[str, tuple[bytes, int]], now: dict[str, tuple[bytes, int]]) -> set[str]:
    """Files that are new, gone, other or written anew, but for run records, reports and what may be added."""
    names = {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)}
    names -= {name for name in names - before.keys() if any(fnmatch.fnmatchcase(name, one) for one in ADDED)}
    return {name for name in names if not any(fnmatch.fnmatchcase(name, one) for one in (*WRITTEN, *AMENDED))}


def records(folders: Path, name: str) -> dict[str, dict[str, Any]]:
    """Run records of a folder and those below it, reports aside."""
    found = {str(path.parent.relative_to(folders)): path for path in sorted((folders / name).rglob("_run.json"))}
    return {key: json.loads(path.read_text()) for key, path in found.items() if not key.endswith("report")}


def test_they_are_small_and_say_where_they_were_made() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 1_300_000
    assert not no_roots(FOLDER, ROOT)
    for name in COMMANDS:
        assert f"| `{name}` |" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "half"])
def test_what_is_done_is_found_done(name: str, spark: Any, folders: Path) -> None:
    before, made = state(folders), records(folders, name)
    again(spark, folders, name)
    assert changed(before, state(folders)) == set()
    found = records(folders, name)
    assert found.keys() == made.keys()
    for key, now in found.items():
        if now["command"] in ("run", "reprocess"):
            continue
        assert now["settings"] == made[key]["settings"]
        assert (now["done"], now["skipped"], now["quarantined"]) == (0, made[key]["done"], 0), key
        assert now["skipped"] > 0
    if name == "nightly":
        assert [found[name][one] for one in ("new", "changed", "removed", "skipped")] == [[], [], [], 4]


def test_a_killed_training_goes_on_from_its_epoch(spark: Any, folders: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = state(folders)
    done = json.loads((folders / "half" / ".training" / "progress.json").read_text())
    again(spark, folders, "half")
    assert {name.split("/")[0] for name in changed(before, state(folders))} == {"half"}
    assert "train: going on after epoch 3 of 12" in capfd.readouterr().err
    # To the hundredth of a second that an epoch took: those before the kill were not trained again.
    history = json.loads((folders / "half" / "history.json").read_text())
    assert (len(done), history[:3]) == (3, done)
    assert [row["epoch"] for row in history] == list(range(1, 13))
    assert json.loads((folders / "half" / "bundle.json").read_text())["metrics"]["miou"] > 0.95


def test_tiles_of_rasters_are_what_they_were(spark: Any, folders: Path, tmp_path: Path) -> None:
    """To the bit, so that a model made of them is not said to be of other tiles."""
    _, options = command("run", str(folders))
    given = {"scenes": [folders / "run" / "catalog"], "labels": options["labels"], "classes": options["classes"]}
    sattile.tile(spark, **given, **options["settings"]["tile"], out=tmp_path / "tiles")
    made, found = (
        json.loads((folder / "tiles" / "dataset.json").read_text()) for folder in (folders / "run", tmp_path)
    )
    for name in ("digest", "statistics", "classes", "split_rule", "settings", "state"):
        assert found[name] == made[name], name


def test_one_scene_that_changed_costs_its_own_map(spark: Any, folders: Path) -> None:
    scene = folders / "scenes" / "east.tif"
    os.utime(scene, ns=(TIME, TIME + 1))
    before = state(folders)
    again(spark, folders, "maps")
    names = changed(before, state(folders))
    assert {"maps/east/item.json", "maps/east/labels.tif"} <= names
    assert {name.split("/")[1] for name in names} == {"east"}
