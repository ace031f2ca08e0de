"""The run record: what a folder is, who may write there, how a job ends."""

from __future__ import annotations

import json
import time

import pyarrow.parquet as pq
import pytest

from sattile.errors import SattileError, TooManyRefused, UsageError
from sattile.record import Run
from sattile.schema import Refusal


def finished(folder, settings=None, **options):
    with Run("tile", str(folder), settings or {"size": 4}, **options) as run:
        run.given = 2
        run.done = 2
        with run.stage("cut", pixels=10):
            pass
        run.finish()
    return run


def test_the_record_has_the_keys_of_the_contract(tmp_path):
    finished(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "_run.json").read_text())
    assert {"command", "settings", "versions", "inputs", "stages", "evaluated_mpix_per_s", "delivered_mpix_per_s",
            "peak_memory_mb", "done", "skipped", "quarantined"} <= set(record)  # fmt: skip
    assert record["stages"][0]["name"] == "cut"
    assert record["peak_memory_mb"] > 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["_run.json"]


def test_no_folder_is_not_the_root():
    with pytest.raises(UsageError, match="--out is empty"):
        finished("")


def test_other_settings_are_refused_unless_overwritten(tmp_path):
    finished(tmp_path / "out")
    (tmp_path / "out" / "made").write_text("")
    with pytest.raises(UsageError, match="size: 4 -> 8"):
        finished(tmp_path / "out", {"size": 8})
    assert not finished(tmp_path / "out", {"size": 8}, overwrite=True).finished_before
    assert finished(tmp_path / "out", {"size": 8}).finished_before


def test_a_folder_in_which_nothing_was_made_is_not_bound_to_its_settings(tmp_path):
    finished(tmp_path / "out")
    assert finished(tmp_path / "out", {"size": 8}).changed


def test_what_a_killed_run_left_for_the_next_is_bound_to_its_settings(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run("train", str(tmp_path / "out"), {"rate": 1}):
        (tmp_path / "out" / ".training").mkdir()
        (tmp_path / "out" / "half").write_text("")
        raise KeyboardInterrupt
    (tmp_path / "out" / "half").unlink()
    with pytest.raises(UsageError, match="rate: 1 -> 2"), Run("train", str(tmp_path / "out"), {"rate": 2}):
        pass


def test_of_two_marks_a_whole_one_counts(tmp_path):
    finished(tmp_path / "out")
    (tmp_path / "out" / "made").write_text("")
    for damaged in ("", '{"command": "tile"}', '{"command": "tile", "settings": []}', "{}"):
        (tmp_path / "out" / "_started.json").write_text(damaged)
        with pytest.raises(UsageError, match="was written by `sattile tile`"), Run("train", str(tmp_path / "out"), {}):
            pass
        with pytest.raises(UsageError, match="size: 4 -> 8"):
            finished(tmp_path / "out", {"size": 8})


def test_what_differs_is_named_however_deep(tmp_path):
    deep = {"layout": {"transform": [10.0] * 60, "block": 64, "weights": {"edge": False}}}
    finished(tmp_path / "out", deep)
    (tmp_path / "out" / "made").write_text("")
    now = {"layout": {**deep["layout"], "weights": {"edge": True}}}
    with pytest.raises(UsageError, match=r"\(layout\.weights\.edge: False -> True\)"):
        finished(tmp_path / "out", now)


@pytest.mark.parametrize("damaged", ["", "[]", '{\n  "command": "tile",\n  "sett'])
def test_a_damaged_mark_does_not_block_a_folder(tmp_path, damaged):
    finished(tmp_path / "out")
    (tmp_path / "out" / "made").write_text("")
    (tmp_path / "out" / "_run.json").write_text(damaged)
    if damaged[:1] == "{":
        with pytest.raises(UsageError, match="was written by `sattile tile`"), Run("train", str(tmp_path / "out"), {}):
            pass
    finished(tmp_path / "out", {"size": 8})
    assert json.loads((tmp_path / "out" / "_run.json").read_text())["settings"] == {"size": 8}


def test_another_commands_folder_and_strangers_are_refused(tmp_path):
    finished(tmp_path / "out")
    with pytest.raises(UsageError, match="was written by `sattile tile`"), Run("train", str(tmp_path / "out"), {}):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.doc"), Run("train", str(tmp_path / "mine"), {}):
        pass
    with pytest.raises(UsageError, match="is a file"), Run("train", str(tmp_path / "mine" / "thesis.doc"), {}):
        pass


def test_a_killed_run_is_finished_by_the_next_with_its_settings_only(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt), Run("tile", str(out), {"size": 4}):
        (out / "half").write_text("")
        raise KeyboardInterrupt
    with pytest.raises(UsageError, match="size: 4 -> 8"):
        finished(out, {"size": 8})
    assert not finished(out).finished_before


def test_a_run_that_made_nothing_leaves_nothing_to_agree_with(tmp_path):
    with pytest.raises(UsageError), Run("tile", str(tmp_path / "out"), {"size": 4}):
        raise UsageError("no scenes")
    finished(tmp_path / "out", {"size": 8})


def test_refusals_are_listed_and_too_many_fail_after_all_is_written(tmp_path):
    with pytest.raises(TooManyRefused, match="1 of 3"), Run("tile", str(tmp_path), {}, max_failed_fraction=0.3) as run:
        run.given, run.done = 3, 2
        run.refuse([Refusal("b.tif", "index", "too short"), Refusal("b.tif", "index", "too short")])
        run.finish()
    assert json.loads((tmp_path / "_run.json").read_text())["quarantined"] == 2
    assert pq.read_table(tmp_path / "_quarantine.parquet").to_pylist() == [
        {"url": "b.tif", "stage": "index", "reason": "too short"}
    ]
    with Run("tile", str(tmp_path), {}, max_failed_fraction=0.34) as run:
        run.given = 3
        run.finish()
    assert not (tmp_path / "_quarantine.parquet").exists()


def test_a_run_that_finds_nothing_to_do_keeps_what_was_measured(tmp_path):
    """Speeds and versions are those of the run that made what lies there; what was skipped is this run's."""
    out = tmp_path / "out"
    with Run("predict", str(out), {}) as run:
        run.given = run.done = 2
        run.extra |= {"delivered_mpix_per_s": 3.5, "plan": {"scenes": 2}}
        run.peak_memory = 1e6
        with run.stage("infer", pixels=10):
            pass
        run.finish()
    first = json.loads((out / "_run.json").read_text())
    with Run("predict", str(out), {}) as run:
        run.given = run.skipped = 2
        run.extra |= {"delivered_mpix_per_s": None, "plan": {"scenes": 0}}
        with run.stage("plan"):
            pass
        run.finish()
    assert json.loads((out / "_run.json").read_text()) == {**first, "done": 0, "skipped": 2}


def test_a_job_that_lost_its_folder_does_not_finish(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(SattileError, match="taken over by another job"), Run("tile", str(out), {}) as run:
        (out / "_lock.json").write_text(json.dumps({"owner": "another:1:0", "time": time.time(), "seconds": 60}))
        run.finish()
    assert not (out / "_run.json").exists()
    assert {path.name for path in out.iterdir()} == {"_lock.json", "_started.json"}  # the other's


def test_settings_that_json_has_no_number_for_are_kept_as_text(tmp_path):
    finished(tmp_path, {"nodata": float("nan"), "shape": (1, 2)})
    assert json.loads((tmp_path / "_run.json").read_text())["settings"] == {"nodata": "nan", "shape": [1, 2]}
    assert finished(tmp_path, {"nodata": float("nan"), "shape": (1, 2)}).finished_before


def test_what_a_killed_overwrite_began_the_next_run_finishes(tmp_path):
    """Otherwise results of both settings would lie side by side for good."""
    finished(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), Run("tile", str(tmp_path / "out"), {"size": 8}, overwrite=True) as run:
        assert run.changed
        assert run.replacing
        (tmp_path / "out" / "old").write_text("")
        raise KeyboardInterrupt
    with Run("tile", str(tmp_path / "out"), {"size": 8}) as run:
        assert not run.changed
        assert run.replacing
        run.finish()
    with Run("tile", str(tmp_path / "out"), {"size": 8}) as run:
        assert not run.replacing


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_from_0_to_1(tmp_path, share):
    with pytest.raises(UsageError, match="a share from 0 to 1"):
        finished(tmp_path / "out", max_failed_fraction=share)
    assert not (tmp_path / "out").exists()


def refused_by(folder, refusals, **options):
    with Run("tile", str(folder), {}, **options) as run:
        run.given = len(refusals)
        run.refuse(refusals)
        run.finish()


def test_the_last_line_says_the_commonest_reason_with_an_example(tmp_path):
    refusals = [Refusal(f"/in/s{n}.tif", "tile", f"s{n}.tif has {n} bands, and 4 are wanted") for n in (3, 2, 1)]
    refusals += [Refusal("/in/a.tif", "tile", "the file is empty")]
    with pytest.raises(TooManyRefused) as told:
        refused_by(tmp_path / "out", refusals)
    assert str(told.value) == (
        "4 of 4 scenes were refused, more than max_failed_fraction 0.1 allows; "
        f"{tmp_path}/out/_quarantine.parquet says why; "
        "the commonest reason (3 of 4): /in/s1.tif: s1.tif has 1 bands, and 4 are wanted"
    )
    with pytest.raises(TooManyRefused, match=r"; the reason: /in/s1\.tif: s1\.tif has 1 bands"):
        refused_by(tmp_path / "out", refusals[:3])


def test_one_error_that_nobody_foresaw_for_all_is_not_theirs(tmp_path):
    at = "({}.py, line 7); please report it, with its traceback from the log"
    same = [Refusal(f"/in/s{n}.tif", "tile", f"unexpected KeyError: {n} {at.format('raster')}") for n in (1, 2)]
    other = Refusal("/in/s3.tif", "tile", f"unexpected KeyError: 1 {at.format('warp')}")
    for options in ({}, {"max_failed_fraction": 1.0}):
        with pytest.raises(SattileError, match="all 2 scenes were refused, 2 of them by the same error") as told:
            refused_by(tmp_path / "out", same, **options)
        assert told.value.exit_status == 1
    with pytest.raises(SattileError, match="all 3 scenes were refused, 2 of them"):
        refused_by(tmp_path / "out", [*same, other])
    for few in ([same[0]], [same[0], other]):
        with pytest.raises(TooManyRefused):
            refused_by(tmp_path / "out", few)
