"""Tiles as batches: the same ones for any number of workers, files and readers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiles_for_tests import SIZE, make_tile, write_dataset, write_splits

from sattile.dataset import decode
from sattile.schema import IGNORE
from sattile.spectrum import haze
from sattile.training.augmentation import Augmentation, turned
from sattile.training.batches import Batches, draw_weights, plan
from sattile.training.reader import Split, load_dataset, seen_before

DIVISORS = [1, 2, 3, 4, 6, 12]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_splits(tmp_path_factory.mktemp("tiles") / "set", train=43, val=7)


@given(tiles=st.integers(1, 400), batch=st.integers(1, 40), epoch=st.integers(0, 3), shuffle=st.booleans())
def test_an_epoch_holds_each_tile_once_and_whole_batches(tiles: int, batch: int, epoch: int, shuffle: bool) -> None:
    rows, real = plan(tiles, batch, seed=5, epoch=epoch, shuffle=shuffle)
    assert sorted(rows[real]) == list(range(tiles))
    assert rows.shape == real.shape == (len(rows), batch)
    assert rows.min() >= 0
    assert rows.max() < tiles
    assert len(rows) <= -(-(tiles + 11) // batch)  # the last batch alone is filled up, and 11 slots of short shards


@given(tiles=st.integers(24, 200), workers=st.sampled_from(DIVISORS), times=st.integers(1, 4))
def test_a_worker_reads_its_own_shards_only(tiles: int, workers: int, times: int) -> None:
    rows, real = plan(tiles, 12 * times, seed=0, epoch=0)
    bounds = [tiles * s // 12 for s in range(13)]
    for worker in range(workers):
        own = rows[:, worker::workers][real[:, worker::workers]]
        shards = np.searchsorted(bounds, own, side="right") - 1
        assert set(shards % workers) == {worker}


@pytest.mark.parametrize("workers", DIVISORS)
def test_the_workers_share_the_batches_of_one(dataset: str, workers: int) -> None:
    split = Split(load_dataset(dataset), "train", memory_bytes=1)
    how: dict[str, Any] = {"batch_size": 12, "seed": 3, "epoch": 2, "augmentation": Augmentation()}
    alone = list(Batches(split, **how))
    shares = [list(Batches(split, worker=i, workers=workers, **how)) for i in range(workers)]
    assert {len(share) for share in shares} == {len(alone)}
    for step, (images, labels) in enumerate(alone):
        for worker in range(workers):
            np.testing.assert_array_equal(shares[worker][step][0], images[worker::workers])
            np.testing.assert_array_equal(shares[worker][step][1], labels[worker::workers])


def test_epochs_differ_and_repeat(dataset: str) -> None:
    split = Split(load_dataset(dataset), "train")
    first, again, other = (
        np.concatenate([images for images, _ in Batches(split, batch_size=8, epoch=epoch)]) for epoch in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_a_batch_is_what_was_stored(dataset: str) -> None:
    described = load_dataset(dataset)
    split = Split(described, "train")
    images, labels = (np.concatenate(part) for part in zip(*Batches(split, batch_size=4, shuffle=False), strict=True))
    rows, real = (part.ravel() for part in plan(43, 4, seed=0, epoch=0, shuffle=False))
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
        split = Split(load_dataset(write_dataset(tmp_path / name, {"train": order})), "train")
        found.append((split.tile_ids, list(Batches(split, batch_size=4, seed=3, epoch=1))))
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
    np.testing.assert_array_equal(decode(file.getvalue()), np.load(_file(file.getvalue())))


@given(st.integers(0, 200))
def test_image_labels_and_valid_turn_together(seed: int) -> None:
    labels = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
    valid = labels % 7 > 0
    image, out = np.empty((SIZE, SIZE, 2), np.float32), np.empty((SIZE, SIZE), np.uint8)
    tile = (np.stack([labels, 255 - labels], -1), labels, valid)
    still = Augmentation(gain=0, brightness=0, jitter=0, haze=0)
    mean = np.zeros(2, np.float32)
    left = still.vary(tile, (image, out), np.random.default_rng(seed), mean, mean, mean)
    np.testing.assert_array_equal(image[..., 0], out)
    np.testing.assert_array_equal(image[..., 1], 255 - out)
    np.testing.assert_array_equal(left, out % 7 > 0)
    assert sorted(out.ravel()) == sorted(labels.ravel())


def test_all_eight_turns_occur() -> None:
    labels = np.arange(9).reshape(3, 3)
    assert len({turned(labels, turns, mirrored).tobytes() for turns in range(4) for mirrored in (False, True)}) == 8


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

    hidden = seen_before(Fake())  # type: ignore[arg-type]
    counted = np.zeros((scenes, 30 + SIZE, 40 + SIZE), int)
    covered = counted.copy()
    for number, (row, col) in enumerate(list(places) * scenes):
        counts = np.ones((SIZE, SIZE), int)
        for part in hidden[number]:
            counts[part] = 0
        counted[number // len(places), row : row + SIZE, col : col + SIZE] += counts
        covered[number // len(places), row : row + SIZE, col : col + SIZE] = 1
    np.testing.assert_array_equal(counted, covered)


def test_a_reader_that_fails_fails_the_loop(dataset: str) -> None:
    split = Split(load_dataset(dataset), "train")
    read = split.read

    def broken(row: int) -> Any:
        if row == 30:
            raise OSError("the disk is gone")
        return read(row)

    split.read = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the disk is gone"):
        list(Batches(split, batch_size=4))


@pytest.mark.parametrize("how", [{"memory_bytes": 1}, {"petastorm": True}, {"petastorm": True, "memory_bytes": 1}])
def test_tiles_are_the_same_from_scratch_and_through_petastorm(dataset: str, how: dict[str, Any]) -> None:
    described = load_dataset(dataset)
    plain, other = Split(described, "train"), Split(described, "train", **how)
    assert plain.tile_ids == other.tile_ids
    for row in (*range(len(plain)), 0, 7):
        for one, same in zip(plain.read(row), other.read(row), strict=True):
            assert one.dtype == same.dtype
            np.testing.assert_array_equal(one, same)
    options = {"batch_size": 6, "seed": 1, "augmentation": Augmentation()}
    for (images, labels), (same_images, same_labels) in zip(
        Batches(plain, **options, threads=1), Batches(other, **options, threads=3), strict=True
    ):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(labels, same_labels)


def test_rare_classes_are_drawn_as_often_as_common_ones(dataset: str) -> None:
    pixels = np.zeros((600, 3), np.int64)
    pixels[:, 0] = 100
    pixels[::20] = [40, 60, 0]
    weights = draw_weights(pixels)
    rows = np.concatenate([plan(600, 12, seed=1, epoch=epoch, weights=weights)[0] for epoch in range(10)])
    seen = pixels[rows.ravel()].sum(0)
    assert 0.8 < seen[1] / (pixels[::20, 1].sum() / len(pixels[::20]) * (rows % 20 == 0).sum()) < 1.2
    assert seen[1] / seen[0] > 8 * pixels[:, 1].sum() / pixels[:, 0].sum()
    split = Split(load_dataset(dataset), "train")
    counted = split.class_pixels()
    assert counted.sum(0).tolist() == split.dataset.class_pixels("train").tolist()
    for row in range(len(split)):
        _, labels, valid = split.read(row)
        assert counted[row].tolist() == [(labels[valid] == one).sum() for one in range(len(split.dataset.classes))]


@given(tiles=st.integers(24, 200), workers=st.sampled_from(DIVISORS))
def test_a_worker_draws_from_its_own_shards_only(tiles: int, workers: int) -> None:
    weights = np.random.default_rng(tiles).uniform(0, 1, tiles) ** 4
    seen: list[set[int]] = [set() for _ in range(workers)]
    for epoch in range(3):
        rows, real = plan(tiles, 24, seed=0, epoch=epoch, weights=weights)
        for worker in range(workers):
            seen[worker] |= set(rows[:, worker::workers][real[:, worker::workers]].tolist())
    assert sum(map(len, seen)) == len(set.union(*seen))


def test_a_class_that_lies_at_one_place_is_drawn_as_often_as_the_others() -> None:
    pixels = np.tile([100, 0], (1200, 1))
    pixels[600:620] = [50, 50]
    weights = draw_weights(pixels)
    rows = np.concatenate([plan(1200, 12, seed=1, epoch=epoch, weights=weights)[0] for epoch in range(5)]).ravel()
    shown = ((rows >= 600) & (rows < 620)).mean()
    assert 0.35 < shown < 0.6


@given(tiles=st.integers(1, 60), batch=st.integers(1, 20), weighted=st.booleans())
def test_no_step_is_without_a_tile(tiles: int, batch: int, weighted: bool) -> None:
    weights = np.arange(tiles, dtype=float) + 1 if weighted else None
    rows, real = plan(tiles, batch, seed=2, epoch=1, weights=weights)
    assert real.any(1).all()
    assert real.sum() == tiles
    assert len(rows) == len(real)


def test_what_lies_under_nodata_may_be_of_any_size() -> None:
    image = np.full((4, 4, 2), -3.4e38, np.float32)
    out = np.empty((4, 4, 2), np.float32), np.empty((4, 4), np.uint8)
    tile = image, np.zeros((4, 4), np.uint8), np.zeros((4, 4), bool)
    loud = Augmentation(gain=9)
    for seed in range(5):  # warnings are errors here
        loud.vary(tile, out, np.random.default_rng(seed), *np.ones((3, 2), np.float32))


def test_haze_is_blue_and_of_half_of_the_tiles() -> None:
    mean = np.array([1800, 400, 500, 900], np.float32)
    sky = haze(("SWIR16", "coastal", "B02", "quality"), mean)
    assert sky[1] == 400
    np.testing.assert_allclose(sky[[0, 2]], [400 * (0.443 / 1.61) ** 4, 400 * (0.443 / 0.49) ** 4], rtol=1e-6)
    assert sky[3] == 0
    assert not haze(("b1", "b2"), mean[:2]).any()
    assert not haze(("blue", "nir"), np.array([-0.1, 0.2], np.float32)).any()
    hazy = Augmentation(gain=0, brightness=0, jitter=0, haze=1)
    offsets = np.stack([hazy.recolouring(np.random.default_rng(one), mean, mean, sky)[1] for one in range(900)])
    shares = offsets[:, 1] / 400
    np.testing.assert_allclose(offsets, shares[:, None] * sky, atol=1e-3)
    assert 0.4 < (shares != 0).mean() < 0.6
    assert -1 / 3 < shares.min() < -0.3
    assert 0.95 < shares.max() < 1


def test_a_tile_drawn_twice_is_varied_twice_and_alike_for_any_number_of_workers(dataset: str) -> None:
    split = Split(load_dataset(dataset), "train")
    weights = np.zeros(len(split))
    weights[::9] = 1  # one tile or none of a shard
    how: dict[str, Any] = {"batch_size": 12, "seed": 3, "augmentation": Augmentation(), "weights": weights}
    alone = list(Batches(split, **how))
    images = np.concatenate([images for images, _ in alone])
    assert len({image.tobytes() for image in images}) == len(images)
    shares = [list(Batches(split, worker=i, workers=3, **how)) for i in range(3)]
    for step, (images, labels) in enumerate(alone):
        for worker in range(3):
            np.testing.assert_array_equal(shares[worker][step][0], images[worker::3])
            np.testing.assert_array_equal(shares[worker][step][1], labels[worker::3])
