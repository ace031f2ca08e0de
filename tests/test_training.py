"""Training: the same batches, and so the same weights, for any number of workers, kills and reruns."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# Before TensorFlow starts; test_model says why.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sattile import schema
from sattile.dataset import npy
from sattile.errors import UsageError
from sattile.model import load_bundle
from sattile.schema import IGNORE
from sattile.training import data, loop, networks, train
from sattile.training.loop import Settings

DIVISORS = [1, 2, 3, 4, 6, 12]
BANDS = ("green", "nir", "swir")
SIZE = 16


def make_tile(number: int, split: str, *, unlabelled: bool = False) -> dict[str, Any]:
    """A tile of water (id 7, dark) left of a slanted shore and land (id 2); its first row is invalid."""
    rng = np.random.default_rng([number, len(split)])
    row, col = np.mgrid[:SIZE, :SIZE]
    water = col + row * rng.uniform(-0.5, 0.5) < rng.uniform(4, SIZE - 4)
    image = np.where(water[..., None], [600, 200, 100], [900, 2500, 2000]) + rng.normal(0, 250, (SIZE, SIZE, 3))
    valid = row > 0
    labels = np.where(valid & (not unlabelled), np.where(water, 7, 2), IGNORE).astype(np.uint8)
    scene = f"{split}{number % 3}"
    return {
        "tile_id": f"{scene}/0/{number * SIZE}",
        "scene_id": scene,
        "row": 0,
        "col": number * SIZE,
        "spatial_block": "0/0",
        "image": npy(np.where(valid[..., None], image, -32768).astype(np.int16)),
        "labels": npy(labels),
        "valid": npy(valid),
    }


def write_dataset(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> str:
    """A tiles dataset, two files a split."""
    described: dict[str, Any] = {}
    for name, tiles in splits.items():
        (folder / name).mkdir(parents=True)
        files, half = [], -(-len(tiles) // 2)
        for part in (tiles[:half], tiles[half:]):
            if part:
                files.append(f"part-{len(files)}.parquet")
                table = pa.Table.from_pylist(part, schema=schema.TILE)
                pq.write_table(table, folder / name / files[-1], row_group_size=5)
        labels = np.stack([data.decode(tile["labels"]) for tile in tiles])
        described[name] = {
            "tiles": len(tiles),
            "files": files,
            "class_pixels": {str(one): int((labels == one).sum()) for one in (2, 7)},
        }
    statistics = {band: {"mean": 100.0 * i + 700, "std": 500.0} for i, band in enumerate(BANDS)}
    description = {
        "format": "sattile-tiles/1", "bands": list(BANDS), "dtype": "int16", "values": "raw", "size": SIZE,
        "classes": [{"id": 2, "name": "land", "color": "#ddcc77"}, {"id": 7, "name": "water", "color": "#332288"}],
        "ignore": IGNORE, "gsd": 10.0, "splits": described, "statistics": statistics, "digest": "d1",
    }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(description))
    return str(folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    splits = {split: [make_tile(n, split) for n in range(count)] for split, count in (("train", 43), ("val", 7))}
    return write_dataset(tmp_path_factory.mktemp("tiles") / "set", splits)


# --- Batches -------------------------------------------------------------------------------------------------------


@given(tiles=st.integers(1, 400), batch=st.integers(1, 40), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_an_epoch_holds_each_tile_once_and_whole_batches(tiles: int, batch: int, epoch: int, shuffle: bool) -> None:
    rows, real = data.plan(tiles, batch, seed=5, epoch=epoch, shuffle=shuffle)
    assert sorted(rows[real]) == list(range(tiles))
    assert rows.shape == real.shape == (len(rows), batch)
    assert rows.min() >= 0
    assert rows.max() < tiles
    assert len(rows) <= -(-(tiles + 11) // batch)  # the last batch alone is filled up, and 11 slots of short shards


@given(tiles=st.integers(24, 200), workers=st.sampled_from(DIVISORS), times=st.integers(1, 4))
def test_a_worker_reads_its_own_shards_only(tiles: int, workers: int, times: int) -> None:
    rows, real = data.plan(tiles, 12 * times, seed=0, epoch=0)
    bounds = [tiles * s // 12 for s in range(13)]
    for worker in range(workers):
        own = rows[:, worker::workers][real[:, worker::workers]]
        shards = np.searchsorted(bounds, own, side="right") - 1
        assert set(shards % workers) == {worker}


@pytest.mark.parametrize("workers", DIVISORS)
def test_the_workers_share_the_batches_of_one(dataset: str, workers: int) -> None:
    split = data.Split(data.load_dataset(dataset), "train", cache_bytes=1)
    how = {"batch_size": 12, "seed": 3, "epoch": 2, "augmentation": data.Augmentation()}
    alone = list(data.batches(split, **how))
    shares = [list(data.batches(split, worker=i, workers=workers, **how)) for i in range(workers)]
    assert {len(share) for share in shares} == {len(alone)}
    for step, (images, labels) in enumerate(alone):
        for worker in range(workers):
            np.testing.assert_array_equal(shares[worker][step][0], images[worker::workers])
            np.testing.assert_array_equal(shares[worker][step][1], labels[worker::workers])


def test_epochs_differ_and_repeat(dataset: str) -> None:
    split = data.Split(data.load_dataset(dataset), "train")
    first, again, other = (
        np.concatenate([images for images, _ in data.batches(split, batch_size=8, epoch=epoch)]) for epoch in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_batch_is_what_was_stored(dataset: str) -> None:
    described = data.load_dataset(dataset)
    split = data.Split(described, "train")
    images, labels = (
        np.concatenate(part) for part in zip(*data.batches(split, batch_size=4, shuffle=False), strict=True)
    )
    rows, real = (part.ravel() for part in data.plan(43, 4, seed=0, epoch=0, shuffle=False))
    by_place = sorted(range(43), key=lambda number: (number % 3, number))  # scene, then column
    for number, (row, counts) in enumerate(zip(rows, real, strict=True)):
        tile = make_tile(by_place[row], "train")
        stored, truth = np.load(_file(tile["image"])), np.load(_file(tile["labels"]))
        np.testing.assert_array_equal(images[number, 1:], stored[1:])
        np.testing.assert_array_equal(images[number, 0], np.broadcast_to(described.mean, (SIZE, 3)))  # invalid
        index = np.select([truth == 2, truth == 7], [0, 1], IGNORE)
        np.testing.assert_array_equal(labels[number], index if counts else np.full_like(truth, IGNORE))


def test_batches_do_not_depend_on_how_tiles_lie_in_files(tmp_path: Path) -> None:
    """Which task writes which file is chance, and the digest of the tiles knows nothing of it."""
    tiles = [make_tile(number, "train") for number in range(17)]
    found = []
    for name, order in (("one", tiles), ("other", tiles[5:] + tiles[4::-1])):
        split = data.Split(data.load_dataset(write_dataset(tmp_path / name, {"train": order})), "train")
        found.append((split.tile_ids, list(data.batches(split, batch_size=4, seed=3, epoch=1))))
    assert found[0][0] == found[1][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        for mine, theirs in zip(one, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)


def _file(content: bytes) -> Any:
    import io

    return io.BytesIO(content)


@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    dtype=st.sampled_from(["<u2", ">i2", "<f4", "|u1", "|b1"]),
    order=st.sampled_from("CF"),
)
def test_npy_bytes_are_what_numpy_reads(shape: tuple[int, int], dtype: str, order: Any) -> None:
    import io

    array = np.asarray(np.arange(shape[0] * shape[1]).reshape(shape), dtype, order=order)
    file = io.BytesIO()
    np.save(file, array)
    np.testing.assert_array_equal(data.decode(file.getvalue()), np.load(_file(file.getvalue())))


@given(st.integers(0, 200))
def test_image_and_labels_turn_together(seed: int) -> None:
    labels = np.arange(SIZE * SIZE).reshape(SIZE, SIZE)
    image, turned = data.turn(np.stack([labels, -labels], -1), labels, np.random.default_rng(seed))
    np.testing.assert_array_equal(image[..., 0], turned)
    assert sorted(turned.ravel()) == list(range(SIZE * SIZE))


def test_all_eight_turns_occur() -> None:
    labels = np.arange(9).reshape(3, 3)
    seen = {data.turn(labels[..., None], labels, np.random.default_rng(n))[1].tobytes() for n in range(100)}
    assert len(seen) == 8


@settings(max_examples=25)
@given(st.sets(st.tuples(st.integers(0, 30), st.integers(0, 40)), min_size=1, max_size=12), st.integers(1, 2))
def test_overlapping_tiles_count_each_pixel_once(places: set[tuple[int, int]], scenes: int) -> None:
    class Fake:
        index = pa.table(
            {
                "scene_id": [f"s{i}" for i in range(scenes) for _ in places],
                "row": [row for _ in range(scenes) for row, _ in places],
                "col": [col for _ in range(scenes) for _, col in places],
            }
        )
        dataset = type("Described", (), {"size": SIZE})

        def __len__(self) -> int:
            return scenes * len(places)

    hidden = data.seen_before(Fake())  # type: ignore[arg-type]
    counted = np.zeros((scenes, 30 + SIZE, 40 + SIZE), int)
    covered = counted.copy()
    for number, (row, col) in enumerate(list(places) * scenes):
        counts = np.ones((SIZE, SIZE), int)
        for part in hidden[number]:
            counts[part] = 0
        counted[number // len(places), row : row + SIZE, col : col + SIZE] += counts
        covered[number // len(places), row : row + SIZE, col : col + SIZE] = 1
    np.testing.assert_array_equal(counted, covered)


def test_a_failing_reader_fails_the_loop() -> None:
    def broken() -> Any:
        yield 1
        raise OSError("the disk is gone")

    items = data._read_ahead(broken())
    assert next(items) == 1
    with pytest.raises(OSError, match="the disk is gone"):
        next(items)


# --- Networks and losses -------------------------------------------------------------------------------------------


def test_normalisation_is_inside_and_stands_wild_values() -> None:
    statistics = {"a": {"mean": 100, "std": 10}, "b": {"mean": -3, "std": 0}}
    import keras

    values = keras.Input((None, None, 2))
    network = keras.Model(values, networks.normalise(values, ["a", "b"], statistics))
    found = np.asarray(network(np.array([[[[110, -3], [1e9, -1e9], [70, -2]]]], np.float32)))
    np.testing.assert_allclose(found[0, 0], [[1, 0], [6, -6], [-3, 1]], atol=1e-5)


def test_a_few_wild_values_do_not_flatten_a_band() -> None:
    # Normal around 100 with deviation 10, and one glint in a thousand that blows the plain deviation up to 900.
    assert networks.spread({"mean": 101, "std": 900, "percentiles": {"1": 77, "99": 124}}) == pytest.approx(
        10.3, abs=0.1
    )
    assert networks.spread({"mean": 5, "std": 0, "percentiles": {"1": 5, "99": 5}}) == 1


def build_foreign(bands: list[str], classes: list[str], statistics: dict[str, Any]) -> Any:
    """A user's builder: normalised by hand, one convolution."""
    import keras

    values = keras.Input((None, None, len(bands)))
    x = keras.layers.Rescaling(1 / statistics[bands[0]]["std"])(values)
    return keras.Model(values, keras.layers.Conv2D(len(classes), 1, activation="softmax")(x))


def build_wrong(**_: Any) -> Any:
    return build_foreign(["a", "b"], ["x", "y", "z"], {"a": {"std": 1}})


@pytest.mark.parametrize(
    ("arch", "words"),
    [
        ("unet-huge", "unet-small"),
        ("no.such.module:build", "PYTHONPATH"),
        (f"{__name__}:nothing", "has no nothing"),
        (f"{__name__}:build_wrong", "output shape"),
        (f"{__name__}:make_tile", "must take the keywords"),
    ],
)
def test_what_cannot_be_built_is_refused(arch: str, words: str) -> None:
    statistics = {"a": {"mean": 0, "std": 1}, "b": {"mean": 0, "std": 1}}
    with pytest.raises(UsageError, match=words):
        networks.build(arch, bands=["a", "b"], classes=["x", "y"], statistics=statistics)


def test_dice_is_per_tile_over_the_classes_it_shows() -> None:
    probabilities = np.zeros((3, 1, 4, 2), np.float32)
    probabilities[0, 0] = [[1, 0], [1, 0], [0, 1], [0, 1]]
    probabilities[1, 0] = [[0.5, 0.5]] * 4
    probabilities[2] = 1
    labels = np.array([[[0, 0, 1, 1]], [[0, 0, 0, IGNORE]], [[IGNORE] * 4]], np.uint8)
    found = np.asarray(loop.dice_loss(probabilities, labels))
    # all right; 3 of 3 at one half: 1 - (2 * 1.5 + 1) / (3 + 1.5 + 1); no labels
    np.testing.assert_allclose(found, [0, 1 - 4 / 5.5, 0], atol=1e-6)


def test_balanced_weights_keep_the_mean() -> None:
    pixels = np.array([9900, 100])
    weights = loop._class_weights("balanced", pixels)
    assert weights[1] / weights[0] == pytest.approx(99**0.5, rel=1e-5)
    assert (weights * pixels).sum() == pytest.approx(pixels.sum(), rel=1e-5)


# --- The loop ------------------------------------------------------------------------------------------------------

SMALL = Settings(arch="unet-tiny", epochs=3, batch_size=12, learning_rate=5e-3)


def weights_of(dataset: str, work: Path, how: Settings = SMALL, **more: Any) -> tuple[dict[str, Any], list[np.ndarray]]:
    result = loop.fit(dataset=dataset, work=str(work), settings=how, **more)
    return result, loop.read_best(str(work)).weights


@pytest.fixture(scope="module")
def undisturbed(
    dataset: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], list[np.ndarray], Path]:
    work = tmp_path_factory.mktemp("undisturbed")
    return (*weights_of(dataset, work), work)


def test_it_learns(undisturbed: Any) -> None:
    result, _, work = undisturbed
    assert [row["epoch"] for row in result["history"]] == [1, 2, 3]
    assert result["history"][-1]["loss"] < 0.7 * result["history"][0]["loss"]
    assert result["metrics"]["pixels"] == 7 * SIZE * (SIZE - 1)  # each labelled pixel once
    assert result["metrics"]["split"] == "val"
    assert any((work / "tensorboard").iterdir())


def test_a_killed_training_goes_on_to_the_same_weights(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    weights_of(dataset, tmp_path, stop_after=1)
    result, weights = weights_of(dataset, tmp_path)
    assert [row["loss"] for row in result["history"]] == [row["loss"] for row in undisturbed[0]["history"]]
    for one, other in zip(weights, undisturbed[1], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_seed_decides_the_weights(dataset: str, undisturbed: Any, tmp_path: Path) -> None:
    how = Settings(**{**SMALL.to_dict(), "epochs": 1, "seed": 1})
    first = weights_of(dataset, tmp_path / "a", how)[1]
    again = weights_of(dataset, tmp_path / "b", how)[1]
    assert all((one == other).all() for one, other in zip(first, again, strict=True))
    kernels = [(a, b) for a, b in zip(first, undisturbed[1], strict=True) if a.ndim == 4]
    assert all((one != other).any() for one, other in kernels)


def test_unlabelled_tiles_and_no_validation_tiles_give_no_nan(tmp_path: Path) -> None:
    tiles = [make_tile(n, "train", unlabelled=n < 6) for n in range(9)]
    dataset = write_dataset(tmp_path / "set", {"train": tiles})
    how = Settings(arch="unet-tiny", epochs=2, batch_size=1, patience=1)  # batches without a label
    result, weights = weights_of(dataset, tmp_path / "work", how)
    assert result["metrics"]["split"] == "train"
    assert all(np.isfinite(one).all() for one in weights)
    assert all(np.isfinite([row["loss"], row["val_loss"]]).all() for row in result["history"])


# --- The command ---------------------------------------------------------------------------------------------------


def test_one_worker_and_two_train_the_same_weights(spark: Any, dataset: str, tmp_path: Path) -> None:
    how = {"dataset": dataset, "arch": "unet-tiny", "epochs": 1, "batch_size": 2, "learning_rate": 1e-3}
    loaded = "tensorflow" in sys.modules
    alone = train(spark, out=str(tmp_path / "alone"), workers=1, **how)
    both = train(spark, out=str(tmp_path / "both"), workers=2, **how)
    assert ("tensorflow" in sys.modules) == loaded
    import keras

    networks = [keras.models.load_model(f"{url}/model.keras") for url in (alone, both)]  # plain: no code of ours
    for one, other in zip(*(network.get_weights() for network in networks), strict=True):  # after 22 steps
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)

    found = load_bundle(both)
    assert (found.bands, [one.id for one in found.classes], found.gsd) == (BANDS, [2, 7], 10.0)
    assert (found.fill, found.dataset_digest, found.total_stride) == ((700, 800, 900), "d1", 4)
    assert found.metrics["split"] == "val"
    assert sorted(path.name for path in Path(both).iterdir()) == [
        "README.md", "_run.json", "bundle.json", "history.json", "item.json", "model.keras", "openvino", "saved_model",
        "tensorboard",
    ]  # fmt: skip

    before = {path: path.stat().st_mtime_ns for path in Path(alone).rglob("*") if path.is_file()}
    train(spark, out=alone, workers=1, **how)
    changed = {path.name for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"_run.json"}
    with pytest.raises(UsageError, match="learning_rate"):
        train(spark, out=alone, **(how | {"learning_rate": 0.01}))


def test_a_version_is_the_latest_once_it_is_whole(
    spark: Any, dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models" / "water"
    how = {"dataset": dataset, "out": str(root), "arch": "unet-tiny", "batch_size": 12, "versions": True}

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sattile.training._publish", killed)
        train(spark, epochs=2, **how)
    assert not (root / "latest.json").exists()
    work = root / "v1" / ".training"
    begun = json.loads((work / "progress.json").read_text())
    assert train(spark, epochs=2, **how) == str(root / "v1")
    assert json.loads((root / "v1" / "history.json").read_text()) == begun  # not one epoch was trained again
    assert not work.exists()
    found = load_bundle(str(root))
    assert (found.url, found.data["splits"]["train"]["tiles"]) == (str(root / "v1"), 43)

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("sattile.training._child", killed)
        with pytest.raises(KeyboardInterrupt):
            train(spark, epochs=3, **how)  # other settings: another version
        assert train(spark, epochs=2, **how) == str(root / "v1")  # there is nothing to do
    assert load_bundle(str(root)).url == str(root / "v1")
    changed = {str(path.relative_to(root)) for path, time in before.items() if path.stat().st_mtime_ns != time}
    assert changed == {"v1/_run.json"}


def test_a_builder_that_fails_is_a_usage_error(spark: Any, dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no_such_module can't be imported"):
        train(spark, dataset=dataset, out=str(tmp_path / "model"), arch="no_such_module:build")
    assert not (tmp_path / "model" / "bundle.json").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"workers": 5}, "use 1, 2, 4"),
        ({"workers": 4}, r"runs 2 task\(s\) at once"),
        ({"arch": "unet-enormous"}, "unet-small"),
        ({"epochs": 0}, "at least 1"),
        ({"class_weights": "some"}, "none or balanced"),
        ({"dataset": "/nowhere/tiles"}, "no tiles dataset"),
    ],
)
def test_what_cannot_be_is_said_before_anything_runs(
    spark: Any, dataset: str, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        train(spark, **({"dataset": dataset, "out": str(tmp_path / "model")} | change))
    assert not (tmp_path / "model").exists()
