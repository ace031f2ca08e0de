"""Versions of a model: whatever is killed, and whoever comes at the same time, the latest is a whole bundle."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sattile import storage, versions
from sattile.errors import UsageError
from sattile.storage.files import LocalFiles
from sattile.versions import move_latest, opened, resolve


def make(root: Path, settings: dict[str, Any], command: str = "train") -> str:
    """As `train` and `bundle` do: `bundle.json` last, none where one lies."""
    with opened(command, str(root), settings, versions=True) as run:
        run.given = 1
        if storage.exists(storage.join(run.out, "bundle.json")):
            run.skipped = 1
        else:
            content = json.dumps(settings).encode()
            storage.write_bytes(storage.join(run.out, "model.keras"), content)
            storage.write_json(
                storage.join(run.out, "bundle.json"), {"digest": hashlib.sha256(content).hexdigest(), "made": settings}
            )
            run.done = 1
        run.finish()
    return storage.name(run.out)


def latest(root: Path) -> str | None:
    """What `latest.json` names, once it is sure that this is a whole bundle."""
    if not (root / "latest.json").exists():
        return None
    said = json.loads((root / "latest.json").read_text())
    folder = root / said["version"]
    assert json.loads((folder / "bundle.json").read_text())["digest"] == said["digest"]
    assert hashlib.sha256((folder / "model.keras").read_bytes()).hexdigest() == said["digest"]
    assert resolve(str(root)) == str(folder)
    return str(said["version"])


def files_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    """All but run records and leases, which a run that finds nothing to do writes, too."""
    return {
        str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("_run.json", "_lock.json", "_started.json")
    }


def test_other_settings_make_another_version_and_the_same_ones_nothing(tmp_path: Path) -> None:
    root = tmp_path / "models" / "water"
    assert [make(root, {"seed": seed}) for seed in (0, 1, 2)] == ["v1", "v2", "v3"]
    assert latest(root) == "v3"
    before = files_of(root)
    assert [make(root, {"seed": seed}) for seed in (1, 0, 2)] == ["v2", "v1", "v3"]
    assert latest(root) == "v3"
    assert files_of(root) == before
    assert make(root, {"seed": 0}, "bundle") == "v4"  # another command's settings are others
    assert json.loads((root / "v2" / "_run.json").read_text())["settings"] == {"seed": 1}
    assert sorted(path.name for path in root.iterdir()) == ["latest.json", "v1", "v2", "v3", "v4"]


def dying(patch: pytest.MonkeyPatch, step: int) -> Callable[[], bool]:
    """The process is killed before its n-th change on disk: neither this one nor what tidies up happens."""
    seen = 0

    def wrapped(name: str) -> None:
        original = getattr(LocalFiles, name)

        def run(*args: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen > step:
                raise KeyboardInterrupt
            return original(*args)

        patch.setattr(LocalFiles, name, run)

    for name in ("write_bytes", "create_exclusively", "rename", "remove"):
        wrapped(name)
    return lambda: seen > step


@pytest.mark.parametrize("before", [0, 1], ids=["the first version", "a later version"])
def test_killed_anywhere_the_latest_is_whole_and_the_next_run_finishes_it(tmp_path: Path, before: int) -> None:
    step, alive = 0, False
    while not alive:
        root = tmp_path / str(step)
        for seed in range(before):
            make(root, {"seed": seed})
        kept = files_of(root)
        with pytest.MonkeyPatch.context() as patch:
            killed = dying(patch, step)
            with suppress(KeyboardInterrupt):
                make(root, {"seed": "new"})
            alive = not killed()
        new = f"v{before + 1}"
        assert latest(root) in ({new} if alive else {new, f"v{before}" if before else None})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage, "_is_dead", lambda owner: True)  # the killed one's leases name this process
            if step % 2:
                assert make(root, {"seed": "other"}) in (f"v{before + 1}", f"v{before + 2}")
                assert latest(root) in (f"v{before + 1}", f"v{before + 2}")
            assert make(root, {"seed": "new"}) in (f"v{before + 1}", f"v{before + 2}")
            newest = max(int(path.name[1:]) for path in root.glob("v*") if (path / "bundle.json").exists())
            assert latest(root) == f"v{newest}"
        made = {name: json.loads((root / name / "bundle.json").read_text())["made"]["seed"] for name in names(root)}
        assert sorted(map(str, made.values())) == sorted({*map(str, range(before)), "new", *["other"] * (step % 2)})
        for name, content in kept.items():
            assert name == "latest.json" or files_of(root)[name] == content
        step += 1
    assert step > 8


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("v*") if (path / "bundle.json").exists())


def test_a_run_killed_before_it_moved_the_latest_is_made_up_for_by_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, {"seed": 0})
    with monkeypatch.context() as patch:
        patch.setattr(versions, "move_latest", lambda root: None)
        make(tmp_path, {"seed": 1})
    assert latest(tmp_path) == "v1"
    make(tmp_path, {"seed": 0})
    assert latest(tmp_path) == "v2"


def test_runs_that_start_together_take_numbers_of_their_own(tmp_path: Path) -> None:
    many, start, took, failed = 6, threading.Barrier(6), {}, []

    def one(seed: int) -> None:
        try:
            start.wait()
            took[seed] = make(tmp_path, {"seed": seed})
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert sorted(took.values()) == [f"v{number}" for number in range(1, many + 1)]
    assert latest(tmp_path) == f"v{many}"
    for seed, name in took.items():
        assert json.loads((tmp_path / name / "bundle.json").read_text())["made"] == {"seed": seed}


def test_two_of_the_same_settings_do_not_work_in_one_folder(tmp_path: Path) -> None:
    with opened("train", str(tmp_path), {"seed": 0}, versions=True):
        with pytest.raises(UsageError, match="being written by another job"):
            make(tmp_path, {"seed": 0})
        assert make(tmp_path, {"seed": 1}) == "v2"
        (tmp_path / "v1" / "half").write_text("")


def test_who_began_later_stays_the_latest(tmp_path: Path) -> None:
    with opened("train", str(tmp_path), {"seed": 0}, versions=True) as run:
        assert make(tmp_path, {"seed": 1}) == "v2"
        storage.write_json(storage.join(run.out, "bundle.json"), {"digest": "d"})
        run.finish()
    assert (tmp_path / "v1" / "bundle.json").exists()
    assert latest(tmp_path) == "v2"


def test_an_unfinished_version_is_not_the_latest(tmp_path: Path) -> None:
    with opened("train", str(tmp_path), {"seed": 0}, versions=True) as run:
        with pytest.raises(KeyboardInterrupt), opened("train", str(tmp_path), {"seed": 1}, versions=True) as other:
            Path(other.out, "model.keras").write_text("half")
            raise KeyboardInterrupt
        assert storage.name(other.out) == "v2"
        content = b"{}"
        storage.write_bytes(storage.join(run.out, "model.keras"), content)
        digest = hashlib.sha256(content).hexdigest()
        storage.write_json(storage.join(run.out, "bundle.json"), {"digest": digest})
        run.finish()
    assert latest(tmp_path) == "v1"


def test_an_unfinished_version_is_gone_on_with_by_its_own_settings_only(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), opened("train", str(tmp_path), {"seed": 0}, versions=True) as run:
        Path(run.out, ".training").mkdir()  # a checkpoint: all that one that fails in order leaves
        raise KeyboardInterrupt
    assert make(tmp_path, {"seed": 1}) == "v2"
    assert latest(tmp_path) == "v2"
    with opened("train", str(tmp_path), {"seed": 0}, versions=True) as run:
        assert Path(run.out, ".training").exists()
    assert make(tmp_path, {"seed": 0}) == "v1"
    assert latest(tmp_path) == "v2"


def test_a_run_that_made_nothing_takes_no_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError), opened("train", str(tmp_path), {"arch": "no such"}, versions=True):
        raise UsageError("no such arch")
    assert make(tmp_path, {"arch": "unet-tiny"}) == "v1"


def test_a_number_is_never_used_twice(tmp_path: Path) -> None:
    for seed in range(2):
        make(tmp_path, {"seed": seed})
    storage.remove(str(tmp_path / "v2"))
    assert make(tmp_path, {"seed": 2}) == "v3"
    storage.remove(str(tmp_path / "v3"))
    with pytest.raises(UsageError, match=r"names v3, which is not there; there are v1: name one, such as .*v1;"):
        resolve(str(tmp_path))
    move_latest(str(tmp_path))
    assert latest(tmp_path) == "v1"
    assert make(tmp_path, {"seed": 0}) == "v1"  # a second move knows it still
    assert make(tmp_path, {"seed": 3}) == "v4"
    assert "taken" not in json.loads((tmp_path / "latest.json").read_text())


def test_a_model_has_versions_or_has_none(tmp_path: Path) -> None:
    make(tmp_path / "with", {"seed": 0})
    for settings in ({"seed": 0}, {"seed": 1}):
        with (
            pytest.raises(UsageError, match="--versions makes the next one"),
            opened("train", str(tmp_path / "with"), settings, overwrite=True),
        ):
            pass
        for flag in (True, False):
            with (
                pytest.raises(UsageError, match="versions stay as they are"),
                opened("train", str(tmp_path / "with" / "v1"), settings, overwrite=True, versions=flag),
            ):
                pass
    with opened("train", str(tmp_path / "without"), {}) as run:
        storage.write_json(storage.join(run.out, "bundle.json"), {})
        run.finish()
    with pytest.raises(UsageError, match="holds a model without versions"):
        make(tmp_path / "without", {})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.doc").write_text("")
    with pytest.raises(UsageError, match=r"thesis\.doc"):
        make(tmp_path / "mine", {})
    with pytest.raises(UsageError, match="is a file"):
        make(tmp_path / "mine" / "thesis.doc", {})
    assert resolve(str(tmp_path / "without")) == str(tmp_path / "without")
    assert resolve(str(tmp_path / "with" / "v1")) == str(tmp_path / "with" / "v1")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"version": "../../other"}', '{"version": 1}', '{"version": "v0"}']
)
def test_a_damaged_latest_is_not_followed_and_is_written_anew(tmp_path: Path, content: str) -> None:
    make(tmp_path, {"seed": 0})
    (tmp_path / "latest.json").write_text(content)
    with pytest.raises(UsageError, match="name one"):
        resolve(str(tmp_path))
    assert make(tmp_path, {"seed": 1}) == "v2"
    assert latest(tmp_path) == "v2"


def test_versions_without_a_latest_are_still_versions(tmp_path: Path) -> None:
    root = tmp_path / "models"
    make(root, {"seed": 1})
    (root / "latest.json").unlink()
    with pytest.raises(UsageError, match=r"holds versions of a model \(v1\) and no latest\.json.*name one, such as"):
        resolve(str(root))
    before = files_of(root)
    for out in (root, root / "v1"):
        with pytest.raises(UsageError, match="--versions"), opened("train", str(out), {"seed": 2}, overwrite=True):
            pass
    assert files_of(root) == before
    assert make(root, {"seed": 2}) == "v2"
    assert latest(root) == "v2"
